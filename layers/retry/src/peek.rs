//! gRPC's status where a callee tells it only after the head.
//!
//! A callee that has sent its response's head commits to it: the status comes
//! in the trailers, when the caller may have begun to read. A retry looks at
//! heads alone (gRFC A6), so a call that fails at once, but not in
//! *trailers-only* form, is not repeated. [`PeekLayer`] stands further in and
//! waits for the first frame of the body. If that is the trailers, their fields
//! are attached to the response as [`Trailers`], and the retry (or hedge) goes
//! by them, as a breaker between the two does; all else is handed on as it came.
//!
//! ```text
//! retry ─▶ breaker ─▶ timeout ─▶ peek ─▶ transport
//!   ▲                              │ head, first frame = trailers
//!   └──── response + `Trailers` ◀──┘
//! ```
//!
//! The price is a head that comes no sooner than the first message does. Where
//! a callee sends its head early on purpose, and its caller waits for that (a
//! stream in both directions), leave it out for those calls with
//! [`only_if`](PeekLayer::only_if). A timeout that is enforced to the head then
//! holds to the first frame.
//!
//! Source of the idea: linkerd2-proxy's `linkerd/http/retry` (29637b6).

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use buttress_core::{
    Head,
    classify::{GrpcCode, Trailers},
};
use bytes::Buf;
use http::{Request, Response, StatusCode, response::Parts};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

type Only = Arc<dyn Fn(Head<'_>) -> bool + Send + Sync>;

/// Lets a retry or hedge further out see gRPC's status in trailers that follow
/// the head at once.
///
/// What is no gRPC passes untouched. So do heads that have a status, and those
/// whose HTTP status is not 200. Over gRPC a response whose first frame was
/// waited for costs an allocation.
///
/// ```
/// use buttress_retry::{PeekLayer, Trailers};
/// use http::{HeaderMap, HeaderValue, Request, Response};
/// use http_body_util::{BodyExt, Empty};
/// use tower::{Layer, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let callee = service_fn(async |_: Request<()>| {
///     let mut trailers = HeaderMap::new();
///     trailers.insert("grpc-status", HeaderValue::from_static("14"));
///     let body = Empty::<bytes::Bytes>::new().with_trailers(async { Some(Ok(trailers)) });
///     Ok::<_, std::convert::Infallible>(Response::new(body))
/// });
/// let request = Request::post("/cities.Weather/Now").header("content-type", "application/grpc");
/// let response = PeekLayer::new().layer(callee).oneshot(request.body(())?).await?;
/// let trailers = response.extensions().get::<Trailers>().unwrap();
/// assert_eq!(trailers.fields()["grpc-status"], "14");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Default)]
pub struct PeekLayer {
    only: Option<Only>,
}

impl PeekLayer {
    /// For all gRPC requests.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Only for those of which the closure says so.
    #[must_use]
    pub fn only_if(mut self, only: impl Fn(Head<'_>) -> bool + Send + Sync + 'static) -> Self {
        self.only = Some(Arc::new(only));
        self
    }
}

impl fmt::Debug for PeekLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeekLayer").finish_non_exhaustive()
    }
}

impl<S> Layer<S> for PeekLayer {
    type Service = Peek<S>;

    fn layer(&self, inner: S) -> Peek<S> {
        Peek {
            inner,
            only: self.only.clone(),
        }
    }
}

/// The service of a [`PeekLayer`]. Readiness is the inner service's.
#[derive(Clone)]
pub struct Peek<S> {
    inner: S,
    only: Option<Only>,
}

impl<S> Peek<S> {
    /// The inner service.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The inner service.
    pub const fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The inner service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, B, R> Service<Request<B>> for Peek<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Body,
{
    type Response = Response<PeekBody<R>>;
    type Error = S::Error;
    type Future = PeekFuture<S::Future, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let head = Head::from(&request);
        let looks = head.is_grpc() && self.only.as_ref().is_none_or(|only| only(head));
        PeekFuture {
            state: State::Calling {
                response: self.inner.call(request),
                looks,
            },
        }
    }
}

impl<S: fmt::Debug> fmt::Debug for Peek<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peek")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

pin_project! {
    /// Response future of [`Peek`]. Dropping it drops the response.
    pub struct PeekFuture<F, R> {
        #[pin]
        state: State<F, R>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, R> {
        Calling {
            #[pin]
            response: F,
            looks: bool,
        },
        // Boxed, as it is moved on with the response when it was polled.
        Waiting {
            head: Option<(Parts, Pin<Box<R>>)>,
        },
    }
}

impl<F, R, E> Future for PeekFuture<F, R>
where
    F: Future<Output = Result<Response<R>, E>>,
    R: Body,
{
    type Output = Result<Response<PeekBody<R>>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let StateProj::Calling { response, looks } = self.as_mut().project().state.project() {
            let response = ready!(response.poll(cx)?);
            if !*looks || !may_have_trailers_alone(&response) {
                return Poll::Ready(Ok(response.map(PeekBody::plain)));
            }
            let (parts, body) = response.into_parts();
            let head = Some((parts, Box::pin(body)));
            self.as_mut().project().state.set(State::Waiting { head });
        }
        let StateProj::Waiting { head } = self.project().state.project() else {
            unreachable!("it was called");
        };
        let (_, body) = head.as_mut().expect("polled after completion");
        let first = loop {
            let frame = ready!(body.as_mut().poll_frame(cx));
            // One without a byte tells nothing.
            if !frame.as_ref().is_some_and(is_empty) {
                break frame;
            }
        };
        let (mut parts, body) = head.take().expect("it was there");
        if let Some(Ok(frame)) = &first
            && let Some(trailers) = frame.trailers_ref()
        {
            Trailers::attach(trailers.clone(), &mut parts.extensions);
        }
        Poll::Ready(Ok(Response::from_parts(
            parts,
            PeekBody::begun(first, body),
        )))
    }
}

fn is_empty<D: Buf, E>(frame: &Result<Frame<D>, E>) -> bool {
    let data = frame.as_ref().ok().and_then(Frame::data_ref);
    data.is_some_and(|data| !data.has_remaining())
}

fn may_have_trailers_alone<R: Body>(response: &Response<R>) -> bool {
    response.status() == StatusCode::OK
        && GrpcCode::of(response.headers()).is_none()
        && !response.body().is_end_stream()
}

impl<F, R> fmt::Debug for PeekFuture<F, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeekFuture").finish_non_exhaustive()
    }
}

pin_project! {
    /// Body of a response of [`Peek`]: the inner one, frame by frame.
    pub struct PeekBody<R: Body> {
        #[pin]
        kind: Kind<R>,
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<R: Body> {
        Plain { #[pin] body: R },
        Begun { first: First<R>, body: Pin<Box<R>> },
    }
}

/// What the first poll of a body came to, until it is handed on.
enum First<R: Body> {
    Frame(Frame<R::Data>),
    Error(R::Error),
    /// There was none.
    End,
    Taken,
}

impl<R: Body> PeekBody<R> {
    const fn plain(body: R) -> Self {
        Self {
            kind: Kind::Plain { body },
        }
    }

    fn begun(first: Option<Result<Frame<R::Data>, R::Error>>, body: Pin<Box<R>>) -> Self {
        let first = match first {
            Some(Ok(frame)) => First::Frame(frame),
            Some(Err(error)) => First::Error(error),
            None => First::End,
        };
        Self {
            kind: Kind::Begun { first, body },
        }
    }
}

impl<R: Body> Body for PeekBody<R> {
    type Data = R::Data;
    type Error = R::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<R::Data>, R::Error>>> {
        match self.project().kind.project() {
            KindProj::Plain { body } => body.poll_frame(cx),
            KindProj::Begun { first, body } => match mem::replace(first, First::Taken) {
                First::Frame(frame) => Poll::Ready(Some(Ok(frame))),
                First::Error(error) => Poll::Ready(Some(Err(error))),
                First::End => {
                    *first = First::End;
                    Poll::Ready(None)
                }
                First::Taken => body.as_mut().poll_frame(cx),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Plain { body } => body.is_end_stream(),
            Kind::Begun { first, body } => match first {
                First::Frame(_) | First::Error(_) => false,
                First::End => true,
                First::Taken => body.is_end_stream(),
            },
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Plain { body } => body.size_hint(),
            Kind::Begun { first, body } => {
                let held = match first {
                    First::Frame(frame) => frame.data_ref().map_or(0, |data| {
                        u64::try_from(data.remaining()).unwrap_or(u64::MAX)
                    }),
                    _ => 0,
                };
                let rest = body.size_hint();
                let mut hint = SizeHint::new();
                hint.set_lower(rest.lower().saturating_add(held));
                if let Some(upper) = rest.upper() {
                    hint.set_upper(upper.saturating_add(held));
                }
                hint
            }
        }
    }
}

impl<R: Body> fmt::Debug for PeekBody<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            Kind::Plain { .. } => "PeekBody::Plain",
            Kind::Begun { .. } => "PeekBody::Begun",
        })
    }
}
