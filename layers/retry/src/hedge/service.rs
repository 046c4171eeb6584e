//! The service: sends the first attempt, and keeps what a hedge would take.

use std::{
    fmt,
    marker::PhantomData,
    sync::Arc,
    task::{Context, Poll},
};

use buttress_core::{Any, Head, Http, View, deadline::Deadline, refusal::Tell};
use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use super::{
    AnyCall, HedgePolicy, HttpCall, ResponseFuture,
    layer::{OverAny, OverHttp},
    shared::Shared,
};
use crate::{Looks, ReplayBody, RetryIf, replay::Replay};

/// The service of a [`HedgeLayer`](crate::HedgeLayer).
///
/// Readiness is the inner service's, and the instance that was polled is the
/// one that the first attempt goes to. A request that may be hedged has a clone
/// of its own, which is asked for readiness when it is time for a hedge, and
/// does not hold up the first attempt if it is not ready.
pub struct Hedge<S, V: View = Http, M = OverHttp> {
    inner: S,
    shared: Arc<Shared>,
    mode: M,
    view: PhantomData<fn(V)>,
}

impl<S, V: View, M> Hedge<S, V, M> {
    pub(super) const fn new(inner: S, shared: Arc<Shared>, mode: M) -> Self {
        Self {
            inner,
            shared,
            mode,
            view: PhantomData,
        }
    }

    /// Its rules.
    #[must_use]
    pub fn policy(&self) -> HedgePolicy {
        HedgePolicy(Arc::clone(&self.shared))
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

impl<S, B, R, I> Service<Request<B>> for Hedge<S, Http, OverHttp<I>>
where
    S: Service<Request<ReplayBody<B>>, Response = Response<R>> + Clone,
    B: Body,
    I: Looks<S::Error>,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = ResponseFuture<HttpCall<B, R, S::Error, I>, S>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let web = &self.mode.web;
        let may = self.shared.max_hedges() > 0 && web.rules.may_send_twice(Head::from(&request));
        if !may {
            let first = self.inner.call(request.map(ReplayBody::once));
            return ResponseFuture::alone(first);
        }
        let (mut parts, body) = request.into_parts();
        let mut replay = Replay::new(body, web.max_body, &web.memory);
        let body = replay.attempt().expect("there was no attempt before");
        // Without a deadline it may be the first extension, which allocates.
        if Deadline::of(&parts.extensions).is_some() {
            Tell::attach(&mut parts.extensions);
        }
        self.shared.begin();
        let started = self.shared.started();
        let first = Request::from_parts(parts.clone(), body);
        let first = self.inner.call(first);
        let call = HttpCall::new(Arc::clone(web), parts, replay);
        let shared = Arc::clone(&self.shared);
        ResponseFuture::new(first, call, self.inner.clone(), shared, started)
    }
}

impl<S, Req, W> Service<Req> for Hedge<S, Any<Req>, OverAny<Req, W>>
where
    S: Service<Req> + Clone,
    Req: Clone + 'static,
    W: RetryIf<Req, S::Response, S::Error> + Clone,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<AnyCall<Req, S::Response, S::Error, W>, S>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Req) -> Self::Future {
        let hedge_if = self.mode.hedge_if.as_ref();
        let may =
            self.shared.max_hedges() > 0 && hedge_if.is_none_or(|hedge_if| hedge_if(&request));
        if !may {
            return ResponseFuture::alone(self.inner.call(request));
        }
        self.shared.begin();
        let started = self.shared.started();
        let call = AnyCall::new(request.clone(), self.mode.judge.clone());
        let first = self.inner.call(request);
        let shared = Arc::clone(&self.shared);
        ResponseFuture::new(first, call, self.inner.clone(), shared, started)
    }
}

impl<S: Clone, V: View, M: Clone> Clone for Hedge<S, V, M> {
    fn clone(&self) -> Self {
        Self::new(
            self.inner.clone(),
            Arc::clone(&self.shared),
            self.mode.clone(),
        )
    }
}

impl<S: fmt::Debug, V: View, M> fmt::Debug for Hedge<S, V, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hedge")
            .field("inner", &self.inner)
            .field("name", &self.shared.name)
            .finish_non_exhaustive()
    }
}
