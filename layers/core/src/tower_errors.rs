//! tower's own errors as refusals.
//!
//! tower's `Timeout` and `LoadShed` say what they refuse in errors, and their
//! error type is [`BoxError`]. [`RefuseErrorsLayer`], outside of them, answers
//! with a response instead:
//!
//! | error | response |
//! |---|---|
//! | [`tower::timeout::error::Elapsed`] | [`TimedOut`](RefusalKind::TimedOut): 504, gRPC 4 |
//! | [`tower::load_shed::error::Overloaded`] | [`Overloaded`](RefusalKind::Overloaded): 503, gRPC 8 |
//! | a [`Refusal`] of ours | that |
//!
//! Each is found in the error itself or anywhere in its chain of sources, so
//! that a `Buffer` in between hides nothing. Other errors pass
//! through; or, with [`catch_all`](RefuseErrorsLayer::catch_all), become a 500
//! that keeps their text to itself, and the service never errs. So axum needs
//! no `HandleErrorLayer`:
//!
//! ```
//! use std::{convert::Infallible, time::Duration};
//! use buttress_core::{body::ResponseBody, tower_errors::RefuseErrorsLayer};
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::Full;
//! use tower::{Layer, ServiceExt, service_fn, timeout::TimeoutLayer};
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() {
//! let slow = service_fn(|_: Request<()>| async {
//!     tokio::time::sleep(Duration::from_secs(60)).await;
//!     Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
//! });
//! let timed = TimeoutLayer::new(Duration::from_secs(1)).layer(slow);
//! let service = RefuseErrorsLayer::new().catch_all().layer(timed);
//!
//! let result: Result<Response<ResponseBody<_>>, Infallible> =
//!     service.oneshot(Request::new(())).await;
//! assert_eq!(result.unwrap().status(), 504);
//! # }
//! ```

use std::{
    convert::Infallible,
    error::Error,
    fmt,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::{
    BoxError, Head, ProblemResponder, Refusal, RefusalKind, Responder,
    body::ResponseBody,
    respond::{KeptHead, respond},
};

/// The refusal that an error stands for, if it does: the first one in its
/// chain of sources.
#[must_use]
pub fn refusal_of(error: &(dyn Error + 'static)) -> Option<Refusal> {
    // No sound chain is as long; one that bites its tail ends here.
    const LINKS: usize = 64;

    std::iter::successors(Some(error), |&error| error.source())
        .take(LINKS)
        .find_map(|error| {
            if let Some(refusal) = error.downcast_ref::<Refusal>() {
                Some(refusal.clone())
            } else if error.is::<tower::timeout::error::Elapsed>() {
                Some(RefusalKind::TimedOut.into())
            } else if error.is::<tower::load_shed::error::Overloaded>() {
                Some(RefusalKind::Overloaded.into())
            } else {
                None
            }
        })
}

/// Errors that are no refusals pass through: the error type is [`BoxError`].
#[derive(Clone, Copy, Debug)]
pub enum PassOn {}

/// Errors that are no refusals become a 500: the error type is [`Infallible`].
#[derive(Clone, Copy, Debug)]
pub enum CatchAll {}

/// Turns errors that are refusals into responses: [see the module](self).
///
/// The responder is asked, before the request goes in, what of it to
/// [keep](Responder::keep): nothing is allocated for the default one, the
/// whole head is copied for a closure.
pub struct RefuseErrorsLayer<M = PassOn, R = ProblemResponder> {
    responder: R,
    mode: PhantomData<fn() -> M>,
}

impl RefuseErrorsLayer {
    /// With the default responder; other errors pass through.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            responder: ProblemResponder,
            mode: PhantomData,
        }
    }
}

impl<M, R> RefuseErrorsLayer<M, R> {
    /// Replaces the responder.
    #[must_use]
    pub fn responder<T: Responder + Clone>(self, responder: T) -> RefuseErrorsLayer<M, T> {
        RefuseErrorsLayer {
            responder,
            mode: PhantomData,
        }
    }

    /// Answers every other error with a 500 whose text says nothing of it. It
    /// goes to `tracing` instead, at level ERROR.
    ///
    /// An error of the inner `poll_ready`, after which a service may not be
    /// used, is answered from `call`; and so is every later request to the
    /// same instance. Its clones start anew.
    #[must_use]
    pub fn catch_all(self) -> RefuseErrorsLayer<CatchAll, R> {
        RefuseErrorsLayer {
            responder: self.responder,
            mode: PhantomData,
        }
    }
}

impl Default for RefuseErrorsLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<M, R: Clone> Clone for RefuseErrorsLayer<M, R> {
    fn clone(&self) -> Self {
        Self {
            responder: self.responder.clone(),
            mode: PhantomData,
        }
    }
}

impl<M, R> fmt::Debug for RefuseErrorsLayer<M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RefuseErrorsLayer").finish_non_exhaustive()
    }
}

impl<S, M, R: Clone> Layer<S> for RefuseErrorsLayer<M, R> {
    type Service = RefuseErrors<S, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        RefuseErrors {
            inner,
            failed: None,
            responder: self.responder.clone(),
            mode: PhantomData,
        }
    }
}

/// The service of [`RefuseErrorsLayer`].
pub struct RefuseErrors<S, M = PassOn, R = ProblemResponder> {
    inner: S,
    /// What the inner `poll_ready` died of.
    failed: Option<Refusal>,
    responder: R,
    mode: PhantomData<fn() -> M>,
}

impl<S, M, R> RefuseErrors<S, M, R> {
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

impl<S: Clone, M, R: Clone> Clone for RefuseErrors<S, M, R> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            // The clone of the inner service will say for itself.
            failed: None,
            responder: self.responder.clone(),
            mode: PhantomData,
        }
    }
}

impl<S: fmt::Debug, M, R> fmt::Debug for RefuseErrors<S, M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RefuseErrors")
            .field("inner", &self.inner)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

impl<S, R, A, B> Service<Request<A>> for RefuseErrors<S, PassOn, R>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    R: Responder + Clone,
    B: Body<Data: From<Bytes>>,
{
    type Response = Response<ResponseBody<B>>;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future, PassOn, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let kept = self.responder.keep(Head::from(&request));
        ResponseFuture::calling(self.inner.call(request), kept, &self.responder)
    }
}

impl<S, R, A, B> Service<Request<A>> for RefuseErrors<S, CatchAll, R>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    R: Responder + Clone,
    B: Body<Data: From<Bytes>>,
{
    type Response = Response<ResponseBody<B>>;
    type Error = Infallible;
    type Future = ResponseFuture<S::Future, CatchAll, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        if self.failed.is_none()
            && let Err(error) = ready!(self.inner.poll_ready(cx))
        {
            self.failed = Some(caught(&*error.into()));
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let head = Head::from(&request);
        if let Some(refusal) = &self.failed {
            return ResponseFuture {
                state: State::Refused {
                    response: Some(respond(&self.responder, refusal, head)),
                },
                mode: PhantomData,
            };
        }
        let kept = self.responder.keep(head);
        ResponseFuture::calling(self.inner.call(request), kept, &self.responder)
    }
}

/// The refusal that answers any error at all.
fn caught(error: &(dyn Error + 'static)) -> Refusal {
    refusal_of(error).unwrap_or_else(|| {
        tracing::error!(error, "an error of the inner service was answered with 500");
        RefusalKind::Internal.into()
    })
}

pin_project! {
    /// The response future of [`RefuseErrors`]. Dropping it drops the inner
    /// one, and that is all it holds.
    pub struct ResponseFuture<F, M = PassOn, R = ProblemResponder> {
        #[pin]
        state: State<F, R>,
        mode: PhantomData<fn() -> M>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, R> {
        Calling { #[pin] inner: F, kept: KeptHead, responder: R },
        Refused { response: Option<Response<Bytes>> },
    }
}

impl<F, M, R: Responder + Clone> ResponseFuture<F, M, R> {
    fn calling(inner: F, kept: KeptHead, responder: &R) -> Self {
        Self {
            state: State::Calling {
                inner,
                kept,
                responder: responder.clone(),
            },
            mode: PhantomData,
        }
    }

    /// The inner response or the refusal that `refuse` makes of an error.
    fn poll_with<B, E, T>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        refuse: impl FnOnce(BoxError) -> Result<Refusal, T>,
    ) -> Poll<Result<Response<ResponseBody<B>>, T>>
    where
        F: Future<Output = Result<Response<B>, E>>,
        E: Into<BoxError>,
    {
        let response = match self.project().state.project() {
            StateProj::Calling {
                inner,
                kept,
                responder,
            } => match ready!(inner.poll(cx)) {
                Ok(response) => return Poll::Ready(Ok(response.map(ResponseBody::inner))),
                Err(error) => respond(responder, &refuse(error.into())?, kept.head()),
            },
            StateProj::Refused { response } => response.take().expect("polled after completion"),
        };
        Poll::Ready(Ok(response.map(ResponseBody::refusal)))
    }
}

impl<F, M, R> fmt::Debug for ResponseFuture<F, M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

impl<F, R, B, E> Future for ResponseFuture<F, PassOn, R>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: Into<BoxError>,
    R: Responder + Clone,
{
    type Output = Result<Response<ResponseBody<B>>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_with(cx, |error| refusal_of(&*error).ok_or(error))
    }
}

impl<F, R, B, E> Future for ResponseFuture<F, CatchAll, R>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: Into<BoxError>,
    R: Responder + Clone,
{
    type Output = Result<Response<ResponseBody<B>>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_with(cx, |error| Ok(caught(&*error)))
    }
}

#[cfg(test)]
mod tests;
