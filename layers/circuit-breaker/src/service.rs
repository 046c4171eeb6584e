//! The service: asks the breaker, and calls the inner service or does not.

use std::{
    fmt,
    marker::PhantomData,
    sync::Arc,
    task::{Context, Poll, ready},
};

use buttress_core::{
    Any, Head, Http, View,
    body::{GuardedBody, ResponseBody},
    classify::{Classify, HttpClassifier},
    respond::integer,
};
use bytes::Bytes;
use http::{Request, Response, header::RETRY_AFTER};
use http_body::Body;
use tower_service::Service;

#[cfg(feature = "back-pressure")]
use crate::ready::Gate;
use crate::{
    Breaker, CircuitOpen, Error, Fallback, PerKey, Permit, Registry, Source,
    cell::{AtOnce, Lease},
    future::{ErrorFuture, FallbackFuture, Guard, Guarded, Judge, Judged, ResponseFuture},
    layer::{Errors, Instead, Respond, Shared},
    permit::Parts,
};

/// The service of a [`CircuitBreakerLayer`](crate::CircuitBreakerLayer).
///
/// Readiness is the inner service's: what is refused is refused in `call`. An
/// instance that has refused keeps what it was promised by the inner service
/// (a slot of a concurrency limit, say) for its next call; dropping it gives
/// it back. With [`back_pressure`] it is not ready, and does not ask the inner
/// service, while the breaker would refuse.
///
/// The breaker is asked in `call`, and a probe's place is taken there. A
/// response future that is dropped was a call that someone gave up on: see
/// [`Permit`]. A panic of the inner service, in `call` or in its future, is a
/// failure.
///
/// [`back_pressure`]: crate::CircuitBreakerBuilder::back_pressure
pub struct CircuitBreaker<S, V: View = Http, M = Respond, C = HttpClassifier, P = Breaker> {
    inner: S,
    /// The breaker's, if there is one for all: here, since what is allocated
    /// with others may lie on a line that others write.
    lease: Option<Lease>,
    shared: Arc<Shared<M, C, P>>,
    view: PhantomData<fn(V)>,
    #[cfg(feature = "back-pressure")]
    gate: Gate,
}

impl<S, V: View, M, C> CircuitBreaker<S, V, M, C> {
    /// Its breaker.
    #[must_use]
    pub fn breaker(&self) -> &Breaker {
        &self.shared.source
    }
}

impl<S, V: View, M, C> CircuitBreaker<S, V, M, C, PerKey<V>> {
    /// Its breakers, one for each key.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        self.shared.source.registry()
    }
}

impl<S, V: View, M, C, P> CircuitBreaker<S, V, M, C, P> {
    pub(crate) fn new(inner: S, shared: Arc<Shared<M, C, P>>) -> Self {
        Self {
            inner,
            lease: shared.lease,
            shared,
            view: PhantomData,
            #[cfg(feature = "back-pressure")]
            gate: Gate::default(),
        }
    }

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
}

impl<S, V: View, M, C, P: Source<V>> CircuitBreaker<S, V, M, C, P> {
    #[cfg(feature = "back-pressure")]
    #[inline]
    fn poll_gate(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.shared.source.one() {
            Some(breaker) if self.shared.back_pressure => self.gate.poll(breaker, cx),
            _ => Poll::Ready(()),
        }
    }

    #[cfg(not(feature = "back-pressure"))]
    #[inline]
    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    fn poll_gate(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    #[inline(always)]
    fn at_once(&self) -> AtOnce {
        match self.lease {
            Some(lease) => lease.at_once(),
            None => AtOnce::Unclear,
        }
    }

    /// Asks the request's breaker for leave to call.
    #[inline]
    fn admit(&self, request: V::Ref<'_>) -> Result<Permit, CircuitOpen> {
        match self.lease.and_then(Lease::passes_at_once) {
            Some(permit) => Ok(permit),
            None => self.shared.source.admit(request),
        }
    }

    /// Readiness, before it is the mode's.
    #[inline]
    fn poll_inner<Req>(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>>
    where
        S: Service<Req>,
    {
        // First, so that nothing is reserved that will not be used soon.
        ready!(self.poll_gate(cx));
        self.inner.poll_ready(cx)
    }
}

impl<S, M, C: Clone, P> CircuitBreaker<S, Http, M, C, P> {
    #[inline]
    fn guarded<B>(&mut self, request: Request<B>, mut permit: Permit) -> Guarded<S::Future, C>
    where
        S: Service<Request<B>>,
    {
        let judge = Judge {
            classifier: self.shared.classifier.clone(),
            hold: self.shared.hold.clone(),
        };
        let future = permit.during(|| self.inner.call(request));
        Guarded::judged(future, permit, judge)
    }
}

impl<S, Req: 'static, M, C: Clone, P> CircuitBreaker<S, Any<Req>, M, C, P> {
    #[inline(always)]
    fn judged(&mut self, request: Req, mut permit: Permit) -> Judged<S::Future, C>
    where
        S: Service<Req>,
    {
        let classifier = self.shared.classifier.clone();
        let future = permit.during(|| self.inner.call(request));
        Judged::new(future, permit, classifier)
    }
}

impl<S: Clone, V: View, M, C, P> Clone for CircuitBreaker<S, V, M, C, P> {
    /// The clone waits for its own readiness.
    fn clone(&self) -> Self {
        Self::new(self.inner.clone(), Arc::clone(&self.shared))
    }
}

impl<S: fmt::Debug, V: View, M, C, P: fmt::Debug> fmt::Debug for CircuitBreaker<S, V, M, C, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreaker")
            .field("inner", &self.inner)
            .field("source", &self.shared.source)
            .finish_non_exhaustive()
    }
}

impl<S, C, P: Source<Http>> CircuitBreaker<S, Http, Respond, C, P> {
    #[cold]
    fn refuse(&self, open: &CircuitOpen, head: Head<'_>) -> Response<Bytes> {
        let Shared { source, mode, .. } = &*self.shared;
        let refusal = source.refusal(open);
        let mut response = mode.responder.respond(&refusal, head);
        // gRPC has a field of its own for it, which is the responder's.
        if let Some(secs) = refusal.retry_after_secs()
            && !head.is_grpc()
            && !response.headers().contains_key(RETRY_AFTER)
        {
            response.headers_mut().insert(RETRY_AFTER, integer(secs));
        }
        response
    }
}

impl<S, C, B, R, P> Service<Request<B>> for CircuitBreaker<S, Http, Respond, C, P>
where
    P: Source<Http>,
    S: Service<Request<B>, Response = Response<R>>,
    C: Classify<Response<R>, S::Error> + Clone,
    R: Body,
{
    type Response = Response<ResponseBody<GuardedBody<R, Guard<C>>>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, C>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.poll_inner(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<B>) -> Self::Future {
        match self.admit(Head::from(&request)) {
            Ok(permit) => ResponseFuture::calling(self.guarded(request, permit)),
            Err(open) => ResponseFuture::refused(self.refuse(&open, Head::from(&request))),
        }
    }
}

impl<S, C, B, R, P> Service<Request<B>> for CircuitBreaker<S, Http, Errors, C, P>
where
    P: Source<Http>,
    S: Service<Request<B>, Response = Response<R>>,
    C: Classify<Response<R>, S::Error> + Clone,
    R: Body,
{
    type Response = Response<GuardedBody<R, Guard<C>>>;
    type Error = Error<S::Error>;
    type Future = ErrorFuture<Guarded<S::Future, C>>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.poll_inner(cx).map_err(Error::Inner)
    }

    #[inline]
    fn call(&mut self, request: Request<B>) -> Self::Future {
        match self.admit(Head::from(&request)) {
            Ok(permit) => ErrorFuture::calling(self.guarded(request, permit)),
            Err(open) => ErrorFuture::refused(open),
        }
    }
}

impl<S, F, C, B, R, P> Service<Request<B>> for CircuitBreaker<S, Http, Instead<F>, C, P>
where
    P: Source<Http>,
    S: Service<Request<B>, Response = Response<R>>,
    F: Fallback<Request<B>, Response = Response<R>, Error = S::Error>,
    C: Classify<Response<R>, S::Error> + Clone,
    R: Body,
{
    type Response = Response<GuardedBody<R, Guard<C>>>;
    type Error = S::Error;
    type Future = FallbackFuture<Guarded<S::Future, C>, Guarded<F::Future, C>>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.poll_inner(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<B>) -> Self::Future {
        match self.admit(Head::from(&request)) {
            Ok(permit) => FallbackFuture::calling(self.guarded(request, permit)),
            Err(open) => {
                let instead = self.shared.mode.0.fall_back(request, open);
                FallbackFuture::instead(Guarded::passed(instead))
            }
        }
    }
}

impl<S, C, Req, P> Service<Req> for CircuitBreaker<S, Any<Req>, Errors, C, P>
where
    P: Source<Any<Req>>,
    S: Service<Req>,
    C: Classify<S::Response, S::Error> + Clone,
    Req: 'static,
{
    type Response = S::Response;
    type Error = Error<S::Error>;
    type Future = ErrorFuture<Judged<S::Future, C>>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.poll_inner(cx).map_err(Error::Inner)
    }

    #[inline(always)]
    fn call(&mut self, request: Req) -> Self::Future {
        let permit = match self.at_once() {
            AtOnce::Passes(permit) => permit,
            AtOnce::Refused(open) => return ErrorFuture::refused(open),
            AtOnce::Unclear => match self.admit_otherwise(&request) {
                Ok(parts) => Permit::of(parts),
                Err(open) => return ErrorFuture::refused(open),
            },
        };
        ErrorFuture::calling(self.judged(request, permit))
    }
}

impl<S, C, Req, P> CircuitBreaker<S, Any<Req>, Errors, C, P>
where
    P: Source<Any<Req>>,
    S: Service<Req>,
    C: Classify<S::Response, S::Error> + Clone,
    Req: 'static,
{
    /// Apart, as [`Lease::at_once`] says.
    #[inline(never)]
    fn admit_otherwise(&self, request: &Req) -> Result<Parts, CircuitOpen> {
        self.shared.source.admit(request).map(Permit::into_parts)
    }
}

impl<S, F, C, Req, P> Service<Req> for CircuitBreaker<S, Any<Req>, Instead<F>, C, P>
where
    P: Source<Any<Req>>,
    S: Service<Req>,
    F: Fallback<Req, Response = S::Response, Error = S::Error>,
    C: Classify<S::Response, S::Error> + Clone,
    Req: 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = FallbackFuture<Judged<S::Future, C>, F::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.poll_inner(cx)
    }

    #[inline]
    fn call(&mut self, request: Req) -> Self::Future {
        match self.admit(&request) {
            Ok(permit) => FallbackFuture::calling(self.judged(request, permit)),
            Err(open) => FallbackFuture::instead(self.shared.mode.0.fall_back(request, open)),
        }
    }
}
