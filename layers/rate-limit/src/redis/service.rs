//! The service of a fleet: asks, waits for the answer, and calls the inner
//! service or does not.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use buttress_core::{BoxError, Head, Http, Refusal, Sees, View, body::ResponseBody};
use bytes::Bytes;
use http::{Request, Response};
use tower_service::Service;

use super::{
    FleetAsk, FleetShared,
    backed::Outcome,
    future::{ErrorFuture, Refund, ResponseFuture},
};
use crate::{RateLimit, Respond, future::After, layer::Errors, limiter::Admission, store::Detail};

/// The service of a [`FleetLayer`](super::FleetLayer).
///
/// Readiness is the inner service's. Only the instance that was polled ready is
/// called: where Redis has to be asked first, it goes with the request into the
/// response future, and a clone takes its place. A reservation that it holds
/// (a permit of a concurrency limit, say) is held while Redis is asked, for no
/// longer than an operation may take.
///
/// A future that is dropped before Redis was asked charges nothing; after that
/// the request is charged, once, or it was refused.
pub struct FleetRateLimit<S, V: View = Http, M = Respond> {
    inner: S,
    shared: Arc<FleetShared<V, M>>,
}

impl<S, V: View, M> FleetRateLimit<S, V, M> {
    pub(super) fn new(inner: S, shared: Arc<FleetShared<V, M>>) -> Self {
        Self { inner, shared }
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

impl<S: Clone, V: View, M> Clone for FleetRateLimit<S, V, M> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<S: fmt::Debug, V: View, M> fmt::Debug for FleetRateLimit<S, V, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FleetRateLimit")
            .field("inner", &self.inner)
            .field("limiter", self.shared.limiter())
            .finish_non_exhaustive()
    }
}

/// An answer that is awaited, and what was asked.
pub(super) type Deciding = Pin<Box<dyn Future<Output = (Outcome, Vec<FleetAsk>)> + Send>>;

/// How far a request gets in `call`.
enum Entry {
    Bypass,
    Decided(Outcome, Vec<FleetAsk>),
    Deciding(Deciding),
    Refused(Admission),
}

impl<V: View, M: Send + Sync + 'static> FleetShared<V, M> {
    fn enter(this: &Arc<Self>, request: V::Ref<'_>, detail: Detail) -> Entry {
        let asks = match this.limiter().read_fleet(request) {
            Ok(asks) => asks,
            Err(refused @ Admission::Refuse(..)) => return Entry::Refused(refused),
            Err(_) => return Entry::Bypass,
        };
        if let Some(outcome) = this.backed.decide_now(&asks, detail) {
            return Entry::Decided(outcome, asks);
        }
        let backed = Arc::clone(&this.backed);
        Entry::Deciding(Box::pin(async move {
            let outcome = backed.decide(&asks, detail).await;
            (outcome, asks)
        }))
    }

    /// Counts and tells of what came of it. Whether it was decided here alone.
    pub(super) fn conclude(&self, outcome: Outcome, asks: &[FleetAsk]) -> (Admission, bool) {
        let limiter = self.limiter();
        match outcome {
            Outcome::Decided(decision) => return (limiter.conclude(decision), false),
            Outcome::Alone(_) | Outcome::Allowed | Outcome::Denied => {
                limiter.without_store(self.on_error);
            }
        }
        match outcome {
            Outcome::Decided(decision) | Outcome::Alone(decision) => {
                (limiter.conclude(decision), true)
            }
            Outcome::Allowed => (limiter.bypassed(), true),
            Outcome::Denied => (limiter.conclude_unavailable(asks[0].limit), true),
        }
    }
}

impl<V: View> FleetShared<V, Errors> {
    pub(super) fn refusal(&self, outcome: Outcome, asks: &[FleetAsk]) -> Option<Refusal> {
        match self.conclude(outcome, asks).0 {
            Admission::Refuse(refusal, ..) => Some(refusal),
            _ => None,
        }
    }
}

impl FleetShared<Http, Respond> {
    /// The same service in memory, which knows how to answer.
    fn front(&self) -> RateLimit<(), Http, Respond> {
        RateLimit::new((), Arc::clone(&self.shared))
    }

    /// What is to be done with the response, and what is given back by it; or
    /// the response to a request that does not pass.
    #[expect(
        clippy::result_large_err,
        reason = "a box would be an allocation a refusal"
    )]
    pub(super) fn settle<B>(
        this: &Arc<Self>,
        outcome: Outcome,
        asks: Vec<FleetAsk>,
        request: &mut Request<B>,
    ) -> Result<(After, Option<Refund>), Response<Bytes>> {
        let (admission, alone) = this.conclude(outcome, &asks);
        let is_shadow = this.limiter().is_shadow();
        match admission {
            Admission::Bypass | Admission::Shadow => Ok((After::default(), None)),
            Admission::Pass(tightest, all) => {
                let mode = &this.shared.mode;
                let mut after = After::default();
                if let Some(tightest) = &tightest {
                    let front = this.front();
                    if mode.info {
                        let info = front.info(tightest);
                        request.extensions_mut().insert(info);
                    }
                    if !is_shadow {
                        after = front.after(tightest, &all);
                    }
                }
                let refund = mode.refund.is_some().then(|| Refund {
                    shared: Arc::clone(this),
                    asks,
                    alone,
                });
                Ok((after, refund))
            }
            refused @ Admission::Refuse(..) => Err(this.refuse(refused, request)),
        }
    }

    fn refuse<B>(&self, admission: Admission, request: &Request<B>) -> Response<Bytes> {
        let Admission::Refuse(refusal, tightest, all) = admission else {
            unreachable!("only refusals are answered");
        };
        let front = self.front();
        front.refuse(refusal, Head::from(request), tightest.as_ref(), &all)
    }
}

impl<S, B, R> Service<Request<B>> for FleetRateLimit<S, Http, Respond>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
{
    type Response = Response<ResponseBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, B, R, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let shared = &self.shared;
        let detail = shared.shared.mode.detail;
        match FleetShared::enter(shared, Head::from(&request), detail) {
            Entry::Bypass => {
                ResponseFuture::calling(self.inner.call(request), After::default(), None)
            }
            Entry::Decided(outcome, asks) => {
                match FleetShared::settle(shared, outcome, asks, &mut request) {
                    Ok((after, refund)) => {
                        ResponseFuture::calling(self.inner.call(request), after, refund)
                    }
                    Err(response) => ResponseFuture::refused(response),
                }
            }
            Entry::Refused(admission) => {
                ResponseFuture::refused(shared.refuse(admission, &request))
            }
            Entry::Deciding(deciding) => {
                // Only the polled instance was promised ready: it goes with
                // the request, and the clone will be polled afresh.
                let fresh = self.inner.clone();
                let ready = mem::replace(&mut self.inner, fresh);
                ResponseFuture::deciding(deciding, Arc::clone(shared), ready, request)
            }
        }
    }
}

impl<S, V, Req> Service<Req> for FleetRateLimit<S, V, Errors>
where
    V: Sees<Req>,
    S: Service<Req, Error: Into<BoxError>> + Clone,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = ErrorFuture<S, V, Req, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let shared = &self.shared;
        let refusal = match FleetShared::enter(shared, V::see(&request), Detail::None) {
            Entry::Bypass => None,
            Entry::Decided(outcome, asks) => shared.refusal(outcome, &asks),
            Entry::Refused(Admission::Refuse(refusal, ..)) => Some(refusal),
            Entry::Refused(_) => None,
            Entry::Deciding(deciding) => {
                let fresh = self.inner.clone();
                let ready = mem::replace(&mut self.inner, fresh);
                return ErrorFuture::deciding(deciding, Arc::clone(shared), ready, request);
            }
        };
        match refusal {
            None => ErrorFuture::calling(self.inner.call(request)),
            Some(refusal) => ErrorFuture::refused(refusal),
        }
    }
}
