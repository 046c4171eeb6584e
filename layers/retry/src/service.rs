//! The service: sends the first attempt, and keeps what another would take.

use std::{
    fmt,
    marker::PhantomData,
    sync::Arc,
    task::{Context, Poll},
};

use buttress_core::{Any, Http, View, body::ResponseBody, deadline::Deadline, refusal::Tell};
use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use crate::{
    AnyCall, Error, HttpCall, Looks, ReplayBody, ResponseFuture, RetryIf, RetryPolicy,
    call::stamp,
    layer::{Errors, Respond},
    policy::Shared,
    replay::Replay,
};

/// The service of a [`RetryLayer`](crate::RetryLayer).
///
/// Readiness is the inner service's, and the instance that was polled is the
/// one that is called first; each response future has a clone of its own for
/// further attempts, and makes it ready before each. A clone whose readiness
/// holds something (a slot of a concurrency limit) holds it only from then to
/// the attempt.
pub struct Retry<S, V: View = Http, M = Respond> {
    inner: S,
    shared: Arc<Shared>,
    mode: M,
    view: PhantomData<fn(V)>,
}

impl<S, V: View, M> Retry<S, V, M> {
    pub(crate) const fn new(inner: S, shared: Arc<Shared>, mode: M) -> Self {
        Self {
            inner,
            shared,
            mode,
            view: PhantomData,
        }
    }

    /// Its rules.
    #[must_use]
    pub fn policy(&self) -> RetryPolicy {
        RetryPolicy(Arc::clone(&self.shared))
    }

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

impl<S, B, R, I> Service<Request<B>> for Retry<S, Http, Respond<I>>
where
    S: Service<Request<ReplayBody<B>>, Response = Response<R>> + Clone,
    B: Body,
    I: Looks<S::Error>,
{
    type Response = Response<ResponseBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<HttpCall<B, R, S::Error, I>, S>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (mut parts, body) = request.into_parts();
        let outer = Deadline::of(&parts.extensions);
        let session = self.shared.begin(outer);
        let deadline = self.shared.attempt_deadline(&session);
        // What holds for all attempts, so that none is copied without it.
        if let Some(whole) = session.deadline() {
            Deadline::at(whole).attach(&mut parts.extensions);
        }
        // Without a deadline it would be the first extension, which allocates.
        if deadline.is_some() {
            Tell::attach(&mut parts.extensions);
        }
        let mode = &self.mode.shared;
        let mut replay = Replay::new(body, self.mode.max_body, &self.mode.memory);
        let first = replay.attempt().expect("there was no attempt before");
        let mut request = Request::from_parts(parts.clone(), first);
        stamp(mode, &mut request, 1, deadline);
        let attempt = self.inner.call(request);
        let call = HttpCall::new(Arc::clone(mode), parts, replay);
        let shared = Arc::clone(&self.shared);
        ResponseFuture::new(attempt, call, self.inner.clone(), shared, session)
    }
}

impl<S, Req, W> Service<Req> for Retry<S, Any<Req>, Errors<W>>
where
    S: Service<Req> + Clone,
    Req: Clone + 'static,
    W: RetryIf<Req, S::Response, S::Error> + Clone,
{
    type Response = S::Response;
    type Error = Error<S::Error>;
    type Future = ResponseFuture<AnyCall<Req, S::Response, S::Error, W>, S>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Error::Inner)
    }

    #[inline(always)]
    fn call(&mut self, request: Req) -> Self::Future {
        let shared = Arc::clone(&self.shared);
        let session = shared.begin(None);
        let call = AnyCall::new(request.clone(), self.mode.judge.clone());
        let attempt = self.inner.call(request);
        ResponseFuture::new(attempt, call, self.inner.clone(), shared, session)
    }
}

impl<S: Clone, V: View, M: Clone> Clone for Retry<S, V, M> {
    fn clone(&self) -> Self {
        Self::new(
            self.inner.clone(),
            Arc::clone(&self.shared),
            self.mode.clone(),
        )
    }
}

impl<S: fmt::Debug, V: View, M> fmt::Debug for Retry<S, V, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retry")
            .field("inner", &self.inner)
            .field("name", &self.shared.name)
            .finish_non_exhaustive()
    }
}
