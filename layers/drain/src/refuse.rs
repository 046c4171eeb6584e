//! Refusal in the place of service, once the listeners are closed.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress_core::{
    Head, Refusal, RefusalKind, Responder, body::ResponseBody, respond::SharedResponder,
};
use bytes::Bytes;
use http::{Request, Response, Version};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::{Phase, Shutdown, future::close, shutdown::Inner};

/// Refuses requests once the listeners are [closed](Phase::Closed): 503 with
/// `Retry-After` and, on HTTP/1, `Connection: close`; gRPC's UNAVAILABLE.
///
/// Off unless you add it, and mostly not what is wanted: what comes so late has
/// come on a connection that was there before, often because its client had
/// not yet heard, and serving it costs no more than to refuse it. It is for
/// clients that never heed the end of a connection.
///
/// It stands just inside of [`DrainLayer`](crate::DrainLayer), which has
/// counted the request by then: it is refused, or it is waited for.
///
/// ```
/// use std::convert::Infallible;
/// use buttress_drain::{DrainLayer, RefuseLayer, Shutdown};
/// use http::{Request, Response};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let shutdown = Shutdown::builder().build()?;
/// let service = ServiceBuilder::new()
///     .layer(DrainLayer::new(&shutdown))
///     .layer(RefuseLayer::new(&shutdown))
///     .service(service_fn(async |_: Request<String>| {
///         Ok::<_, Infallible>(Response::new(String::from("hello")))
///     }));
/// let response = service.clone().oneshot(Request::default()).await?;
/// assert_eq!(response.status(), 200);
///
/// shutdown.trigger("SIGTERM");
/// shutdown.run().await;
/// let response = service.oneshot(Request::default()).await?;
/// assert_eq!(response.status(), 503);
/// assert_eq!(response.headers()["retry-after"], "1");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RefuseLayer {
    shutdown: Shutdown,
    rule: Arc<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    retry_after: Option<Duration>,
    responder: SharedResponder,
}

impl RefuseLayer {
    /// Refuses once this shutdown has closed its listeners.
    #[must_use]
    pub fn new(shutdown: &Shutdown) -> Self {
        Self {
            shutdown: shutdown.clone(),
            rule: Arc::new(Rule {
                retry_after: Some(Duration::from_secs(1)),
                responder: SharedResponder::default(),
            }),
        }
    }

    /// When to try again, elsewhere most likely; nothing is said by `None`.
    /// Default 1 s.
    #[must_use]
    pub fn retry_after(mut self, wait: impl Into<Option<Duration>>) -> Self {
        Arc::make_mut(&mut self.rule).retry_after = wait.into();
        self
    }

    /// Makes the answers. Default:
    /// [`ProblemResponder`](buttress_core::ProblemResponder).
    #[must_use]
    pub fn responder(mut self, responder: impl Responder) -> Self {
        Arc::make_mut(&mut self.rule).responder = SharedResponder::new(responder);
        self
    }
}

impl<S> Layer<S> for RefuseLayer {
    type Service = Refuse<S>;

    fn layer(&self, inner: S) -> Refuse<S> {
        Refuse {
            inner,
            shutdown: Arc::clone(&self.shutdown.inner),
            rule: Arc::clone(&self.rule),
        }
    }
}

/// The service of a [`RefuseLayer`].
///
/// Readiness is the inner service's. An instance that refuses keeps what it was
/// promised (a slot of a concurrency limit, say) for its next call, and
/// dropping it gives it back.
#[derive(Clone)]
pub struct Refuse<S> {
    inner: S,
    shutdown: Arc<Inner>,
    rule: Arc<Rule>,
}

impl<S> Refuse<S> {
    /// The inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The inner service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The inner service.
    pub fn into_inner(self) -> S {
        self.inner
    }

    #[cold]
    fn refuse<B>(&self, request: &Request<B>) -> Response<Bytes> {
        let refusal = Refusal::new(RefusalKind::Draining).with_retry_after(self.rule.retry_after);
        let responder = &self.rule.responder;
        let response = responder.respond(&refusal, Head::from(request));
        let (mut head, body) = response.into_parts();
        if request.version() < Version::HTTP_2 {
            close(&mut head);
        }
        Response::from_parts(head, body)
    }
}

impl<S, ReqB, B> Service<Request<ReqB>> for Refuse<S>
where
    S: Service<Request<ReqB>, Response = Response<B>>,
    B: Body,
    B::Data: From<Bytes>,
{
    type Response = Response<ResponseBody<B>>;
    type Error = S::Error;
    type Future = RefuseFuture<S::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqB>) -> Self::Future {
        // The ledger's load, in the order that its counts are made for.
        let state = if self.shutdown.phase() < Phase::Closed {
            State::Calling {
                call: self.inner.call(request),
            }
        } else {
            State::Refused {
                response: Some(self.refuse(&request)),
            }
        };
        RefuseFuture { state }
    }
}

impl<S: fmt::Debug> fmt::Debug for Refuse<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refuse")
            .field("inner", &self.inner)
            .field("rule", &self.rule)
            .finish_non_exhaustive()
    }
}

pin_project! {
    /// Response future of [`Refuse`]. Dropping it drops the call.
    pub struct RefuseFuture<F> {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F> {
        Calling { #[pin] call: F },
        Refused { response: Option<Response<Bytes>> },
    }
}

impl<F, B, E> Future for RefuseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<ResponseBody<B>>, E>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match self.project().state.project() {
            StateProj::Calling { call } => {
                let result = ready!(call.poll(cx));
                result.map(|response| response.map(ResponseBody::inner))
            }
            StateProj::Refused { response } => {
                let response = response.take().expect("polled after completion");
                Ok(response.map(ResponseBody::refusal))
            }
        })
    }
}

impl<F> fmt::Debug for RefuseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            State::Calling { .. } => "RefuseFuture::Calling",
            State::Refused { .. } => "RefuseFuture::Refused",
        })
    }
}
