//! What a layer is made of, checked once by `build()`.

use std::{fmt, marker::PhantomData, sync::Arc, time::Duration};

use buttress_core::{
    Any, Http, Responder, View, classify::HttpClassifier, respond::SharedResponder,
};
use http::HeaderName;

use crate::{
    ConfigError, Errors, Respond, TimeoutLayer, ToEnd, ToHead,
    shared::{Kind, Shared, Wire},
};

/// Builds a [`TimeoutLayer`].
#[must_use = "nothing is limited before `build()`"]
pub struct TimeoutBuilder<V: View = Http, M = Respond, X = ToHead> {
    name: Arc<str>,
    limit: Option<Duration>,
    wire: Wire,
    attach: bool,
    streaming: HttpClassifier,
    responder: SharedResponder,
    kind: Kind<V, M, X>,
}

impl<V: View, M, X> TimeoutBuilder<V, M, X> {
    pub(crate) fn new() -> Self {
        Self {
            name: "default".into(),
            limit: None,
            wire: Wire {
                adopt: false,
                grpc_timeout: true,
                header: None,
            },
            attach: false,
            streaming: HttpClassifier::new(),
            responder: SharedResponder::default(),
            kind: PhantomData,
        }
    }

    fn into_kind<W: View, N, Y>(self) -> TimeoutBuilder<W, N, Y> {
        TimeoutBuilder {
            name: self.name,
            limit: self.limit,
            wire: self.wire,
            attach: self.attach,
            streaming: self.streaming,
            responder: self.responder,
            kind: PhantomData,
        }
    }

    /// Names the layer: for logs, metrics and errors. 1 to 128 printable ASCII
    /// characters. Default `default`.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// How long a call may take, from `call` on. Above 0 and at most 366 days.
    /// Default: no limit but the requests' own deadlines. It can be changed
    /// later, by the [handle](crate::Handle).
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Checks the settings and makes the state that all clones of the layer
    /// share.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings: see [`ConfigError`].
    pub fn build(self) -> Result<TimeoutLayer<V, M, X>, ConfigError> {
        Ok(TimeoutLayer::new(Shared::new(
            self.name,
            self.limit,
            self.wire,
            self.attach,
            self.streaming,
            self.responder,
        )?))
    }
}

impl<X> TimeoutBuilder<Http, Respond, X> {
    /// Makes the answers when time is up. Default:
    /// [`ProblemResponder`](buttress_core::ProblemResponder), a 504, or gRPC's
    /// DEADLINE_EXCEEDED.
    ///
    /// It is asked of every limited call what to
    /// [keep](Responder::keep) of the request: nothing is allocated for the
    /// default one, the whole head is copied for a closure.
    pub fn responder(mut self, responder: impl Responder) -> Self {
        self.responder = SharedResponder::new(responder);
        self
    }

    /// Fails with errors in place of responses, for clients: the service's
    /// error becomes [`Error`](crate::Error).
    /// tonic's make an UNKNOWN of it: a response tells them better.
    pub fn errors(self) -> TimeoutBuilder<Http, Errors, X> {
        self.into_kind()
    }
}

impl<M> TimeoutBuilder<Http, M> {
    /// Has the limit reach to the end of the response's body, which becomes a
    /// [`TimedBody`](crate::TimedBody): when time is up, its stream ends with
    /// an error, and the inner body is dropped. Default: to the head.
    ///
    /// The stream of a gRPC answer ends with the trailers of DEADLINE_EXCEEDED,
    /// as the [responder](TimeoutBuilder::responder) has it, unless
    /// [`errors`](TimeoutBuilder::errors) are asked for; gRPC-Web, which has
    /// its trailers in its data, with an error.
    ///
    /// A 101 is over with its head, and so are the types that are named by
    /// [`streaming`](TimeoutBuilder::streaming).
    ///
    /// ```
    /// use std::{convert::Infallible, time::Duration};
    ///
    /// use buttress_core::{BoxError, Refusal, testing::web::ScriptedBody};
    /// use buttress_timeout::TimeoutLayer;
    /// use http::{Request, Response};
    /// use http_body_util::BodyExt;
    /// use tower::{Layer, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), BoxError> {
    /// let limit = Duration::from_secs(2);
    /// let layer = TimeoutLayer::builder().limit(limit).to_the_end().build()?;
    /// let service = layer.layer(service_fn(async |_: Request<String>| {
    ///     // A good head, some data, and then nothing more.
    ///     let body = ScriptedBody::new().data("once upon a time").hang();
    ///     Ok::<_, Infallible>(Response::new(body))
    /// }));
    /// let response = service.oneshot(Request::default()).await?;
    /// assert_eq!(response.status(), 200);
    ///
    /// let error: BoxError = response.into_body().collect().await.unwrap_err().into();
    /// assert!(Refusal::find(&*error).is_some());
    /// # Ok(())
    /// # }
    /// ```
    pub fn to_the_end(self) -> TimeoutBuilder<Http, M, ToEnd> {
        self.into_kind()
    }
}

impl<M> TimeoutBuilder<Http, M, ToEnd> {
    /// Content types whose bodies go on for as long as somebody listens, and
    /// are not limited: `text/event-stream`, say. Default: none. Compared as
    /// [`HttpClassifier::streaming`] does.
    pub fn streaming(mut self, types: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        self.streaming = self.streaming.streaming(types);
        self
    }
}

impl<M, X> TimeoutBuilder<Http, M, X> {
    /// Heeds what callers say is left, as one limit more: `grpc-timeout` of
    /// gRPC requests, and the [header](Self::header) if there is one. What
    /// cannot be read is passed over; of several the least counts; zero is a
    /// deadline that is past. For servers. Default: no.
    pub fn adopt(mut self) -> Self {
        self.wire.adopt = true;
        self
    }

    /// Attaches the deadline to the request's extensions for layers further
    /// in. Default: only where an outer layer has attached one, which is then
    /// brought nearer, since the first extension of a request allocates.
    pub fn attach_deadline(mut self) -> Self {
        self.attach = true;
        self
    }

    /// Whether gRPC requests tell their upstream by `grpc-timeout` how much
    /// time is left; if they have one already, the smaller holds. Default: yes.
    pub fn grpc_timeout(mut self, grpc_timeout: bool) -> Self {
        self.wire.grpc_timeout = grpc_timeout;
        self
    }

    /// Has requests of every kind tell their upstream by this header how much
    /// time is left, in whole milliseconds, rounded down and at least 1; if
    /// they have one already, the smaller holds. Default: none.
    pub fn header(mut self, name: HeaderName) -> Self {
        self.wire.header = Some(name);
        self
    }
}

impl<V: View, M, X> fmt::Debug for TimeoutBuilder<V, M, X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TimeoutBuilder")
            .field("name", &self.name)
            .field("limit", &self.limit)
            .field("wire", &self.wire)
            .field("attach", &self.attach)
            .finish_non_exhaustive()
    }
}

/// So that the compiler can say it where the layer is built, not where it is
/// used: what a server stack asks of a layer.
const _: fn() = || {
    fn fits<T: Clone + Send + Sync + 'static>() {}
    fits::<TimeoutLayer>();
    fits::<TimeoutLayer<Http, Errors, ToEnd>>();
    fits::<TimeoutLayer<Any<std::cell::Cell<u8>>, Errors>>();
    fits::<crate::Timeout<()>>();
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_named() {
        let new = TimeoutLayer::builder;
        for name in ["", "caf\u{e9}", "a\nb", &"x".repeat(129)] {
            let error = new().name(name).build().unwrap_err().to_string();
            assert!(error.contains("name"), "{name:?}");
        }
        let days = |days: u64| Duration::from_secs(days * 24 * 3600);
        for limit in [Duration::ZERO, days(367), Duration::MAX] {
            let error = new().limit(limit).build().unwrap_err().to_string();
            assert!(error.contains("limit"), "{limit:?}");
        }
        for limit in [Duration::from_nanos(1), days(366)] {
            let layer = new().limit(limit).build().unwrap();
            assert_eq!(layer.handle().limit(), Some(limit));
        }
        assert_eq!(new().build().unwrap().handle().limit(), None);
    }

    #[test]
    fn a_limit_that_makes_no_sense_changes_nothing() {
        let second = Duration::from_secs(1);
        let layer = TimeoutLayer::builder().limit(second).build().unwrap();
        let handle = layer.clone().handle();
        assert!(handle.set_limit(Duration::ZERO).is_err());
        assert!(handle.set_limit(Duration::MAX).is_err());
        assert_eq!(layer.handle().limit(), Some(second));
        handle.set_limit(None).unwrap();
        assert_eq!(layer.handle().limit(), None);
    }
}
