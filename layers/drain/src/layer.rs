//! The layer that counts requests.

use std::{fmt, sync::Arc};

use buttress_core::Head;
use http::{Request, StatusCode, header::CONTENT_TYPE, response::Parts};
use tower_layer::Layer;

use crate::{Drain, Label, Shutdown};

/// Counts requests for a [`Shutdown`], from the call to the end of the
/// response's body, and has HTTP/1 connections close while it drains. The
/// [crate's front page](crate) shows it at work.
///
/// It stands outermost: what is outside of it is not counted. Clones of it and
/// all services they make count for the same shutdown.
///
/// What follows is opt-in, since it costs every request something:
/// [`signal`](Self::signal), [`route`](Self::route) and
/// [`end_streams`](Self::end_streams).
#[derive(Clone)]
pub struct DrainLayer {
    shutdown: Shutdown,
    options: Arc<Options>,
}

#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) signal: bool,
    route: Route,
    /// Media types without their parameters.
    streams: Vec<Box<str>>,
}

/// How a request is named in the report.
#[derive(Clone)]
enum Route {
    Untracked,
    One(Label),
    By(Arc<dyn Fn(Head<'_>) -> Label + Send + Sync>),
}

impl DrainLayer {
    /// Counts for this shutdown.
    #[must_use]
    pub fn new(shutdown: &Shutdown) -> Self {
        Self {
            shutdown: shutdown.clone(),
            options: Arc::new(Options {
                signal: false,
                route: Route::Untracked,
                streams: Vec::new(),
            }),
        }
    }

    /// Attaches a [`DrainSignal`](crate::DrainSignal) to the extensions of each
    /// request, so that handlers that go on for long can hear of the drain. The
    /// first extension of a request allocates. Default: no.
    ///
    /// ```
    /// use std::convert::Infallible;
    /// use buttress_drain::{DrainLayer, DrainSignal, Shutdown};
    /// use http::{Request, Response};
    /// use tower::{Layer, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let shutdown = Shutdown::builder().build()?;
    /// let layer = DrainLayer::new(&shutdown).signal();
    /// let service = layer.layer(service_fn(async |request: Request<String>| {
    ///     let drain = request.extensions().get::<DrainSignal>().cloned();
    ///     // A long poll: the answer is there at the notice, at the latest.
    ///     drain.expect("the layer is there").notified().await;
    ///     Ok::<_, Infallible>(Response::new(String::from("nothing new")))
    /// }));
    /// let poll = tokio::spawn(service.oneshot(Request::default()));
    /// tokio::task::yield_now().await;
    /// shutdown.trigger("SIGTERM");
    /// let response = poll.await??;
    /// assert_eq!(response.headers()["connection"], "close");
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn signal(mut self) -> Self {
        self.options_mut().signal = true;
        self
    }

    /// Keeps track of each request under this name, so that the report can say
    /// what was cut: the route, the age, the bytes of the body that were sent.
    /// An allocation and two uncontended locks a request, and one for each piece
    /// of its body. Default: requests are counted and have no names.
    #[must_use]
    pub fn route(mut self, route: impl Into<Label>) -> Self {
        self.options_mut().route = Route::One(route.into());
        self
    }

    /// The same with a name that differs by request: the pattern that was
    /// matched, where a router inside of which it stands has attached it.
    /// Names are meant to be few: no path with an identifier in it.
    ///
    /// ```
    /// use buttress_core::Head;
    /// use buttress_drain::{DrainLayer, Shutdown};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let shutdown = Shutdown::builder().build()?;
    /// let layer = DrainLayer::new(&shutdown).route_by(|request: Head<'_>| {
    ///     match request.uri.path() {
    ///         "/export" => "/export".into(),
    ///         _ => "other".into(),
    ///     }
    /// });
    /// # let _ = layer;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn route_by<F>(mut self, route: F) -> Self
    where
        F: Fn(Head<'_>) -> Label + Send + Sync + 'static,
    {
        self.options_mut().route = Route::By(Arc::new(route));
        self
    }

    /// Ends response bodies of these content types at the notice, where they
    /// stand: those that go on for as long as somebody listens
    /// (`text/event-stream`), whose clients connect again by themselves. A
    /// stream that begins after the notice ends when the listeners are to
    /// close, so that its client does not come straight back. Two allocations
    /// for each such stream. Default: none.
    ///
    /// Types are compared without regard to case, and without what follows a
    /// `;`. The stream ends as if it were complete, without the trailers that
    /// it may have had; those of bodies that get to them by themselves pass
    /// through. gRPC's are never ended, since they would lack their status:
    /// tell their handlers by [`signal`](Self::signal).
    #[must_use]
    pub fn end_streams(mut self, types: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        let types = types.into_iter();
        self.options_mut().streams = types
            .map(|name| essence(name.as_ref().as_bytes()).to_ascii_lowercase())
            .filter_map(|name| Some(String::from_utf8(name).ok()?.into_boxed_str()))
            .filter(|name| !name.is_empty() && !name.starts_with("application/grpc"))
            .collect();
        self
    }

    /// The shutdown that it counts for.
    #[must_use]
    pub const fn shutdown(&self) -> &Shutdown {
        &self.shutdown
    }

    fn options_mut(&mut self) -> &mut Options {
        Arc::make_mut(&mut self.options)
    }
}

impl<S> Layer<S> for DrainLayer {
    type Service = Drain<S>;

    fn layer(&self, inner: S) -> Drain<S> {
        let shutdown = Arc::clone(&self.shutdown.inner);
        Drain::new(inner, shutdown, Arc::clone(&self.options))
    }
}

impl Options {
    /// Whether there is no more to do than to count.
    #[inline]
    pub(crate) const fn is_plain(&self) -> bool {
        !self.signal && matches!(self.route, Route::Untracked) && self.streams.is_empty()
    }

    #[inline]
    pub(crate) const fn any_streams(&self) -> bool {
        !self.streams.is_empty()
    }

    /// How this request is named, if somebody keeps track.
    #[inline]
    pub(crate) fn route<B>(&self, request: &Request<B>) -> Option<Label> {
        match &self.route {
            Route::Untracked => None,
            Route::One(label) => Some(label.clone()),
            Route::By(label) => Some(label(Head::from(request))),
        }
    }

    /// Whether this response's body is ended at the notice.
    pub(crate) fn ends(&self, head: &Parts) -> bool {
        let Some(value) = head.headers.get(CONTENT_TYPE) else {
            return false;
        };
        let streams = &mut self.streams.iter();
        head.status != StatusCode::SWITCHING_PROTOCOLS
            && streams.any(|name| essence(value.as_bytes()).eq_ignore_ascii_case(name.as_bytes()))
    }
}

/// A media type without its parameters.
fn essence(value: &[u8]) -> &[u8] {
    let end = value.iter().position(|byte| *byte == b';');
    value[..end.unwrap_or(value.len())].trim_ascii()
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("signal", &self.signal)
            .field("tracked", &!matches!(self.route, Route::Untracked))
            .field("streams", &self.streams)
            .finish()
    }
}

impl fmt::Debug for DrainLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DrainLayer")
            .field("shutdown", &self.shutdown)
            .field("options", &self.options)
            .finish()
    }
}
