//! The service: takes the lock, and calls the inner service or does not.

use std::{
    fmt,
    marker::PhantomData,
    mem,
    sync::Arc,
    task::{Context, Poll},
};

use buttress_core::{Head, Http, body::ResponseBody};
use http::{Request, Response};
use tower_service::Service;

use crate::{
    Error, ErrorFuture, Errors, Extent, Handle, Keep, Reaches, Respond, ResponseFuture, Target,
    future::Locking,
    lease::Lease,
    shared::{Asked, Kind, Shared},
};

/// The service of a [`LockLayer`](crate::LockLayer).
///
/// Readiness is the inner service's: who finds the lock held is refused in
/// `call`. A request that waits, or for which Redis is asked, takes the
/// instance that was polled ready with it, and what that was promised (a slot
/// of a concurrency limit, say); a refused one gives it back.
///
/// A response future that is dropped gives back its lock, wherever it was; so
/// does one that panics.
pub struct Lock<S, V: Target = Http, M = Respond, X = Keep> {
    inner: S,
    shared: Arc<Shared<V>>,
    kind: Kind<V, M, X>,
}

impl<S, V: Target, M, X> Lock<S, V, M, X> {
    pub(crate) const fn new(inner: S, shared: Arc<Shared<V>>) -> Self {
        Self {
            inner,
            shared,
            kind: PhantomData,
        }
    }

    /// Looks at the lock and changes it, while it serves.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(&self.shared.core))
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

    /// The request on its way: called, refused, or waiting.
    fn locking<Req>(&mut self, asked: Asked, mut request: Req) -> Locking<S, Req, V>
    where
        S: Service<Req> + Clone,
        V: Reaches<Req>,
    {
        match asked {
            Asked::Pass(lease) => {
                self.shared.tell(&mut request, lease.as_ref());
                Locking::calling(self.inner.call(request), lease, self.shared.cut)
            }
            Asked::Refuse(refusal) => Locking::refused(refusal),
            Asked::Later(claiming) => {
                // Only the polled instance was promised ready; the clone will
                // be polled afresh.
                let fresh = self.inner.clone();
                let ready = mem::replace(&mut self.inner, fresh);
                Locking::claiming(claiming, ready, request, Arc::clone(&self.shared))
            }
        }
    }
}

impl<S: Clone, V: Target, M, X> Clone for Lock<S, V, M, X> {
    /// The clone waits for its own readiness.
    fn clone(&self) -> Self {
        Self::new(self.inner.clone(), Arc::clone(&self.shared))
    }
}

impl<S: fmt::Debug, V: Target, M, X> fmt::Debug for Lock<S, V, M, X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lock")
            .field("inner", &self.inner)
            .field("name", &self.shared.core.name())
            .field("held", &self.shared.core.held())
            .finish_non_exhaustive()
    }
}

impl<S, X, B, R, W> Service<Request<B>> for Lock<S, Http, Respond, X>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    X: Extent<Response<R>, Output = Response<W>>,
{
    type Response = Response<ResponseBody<W>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, Request<B>, X>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let head = Head::from(&request);
        let asked = self.shared.ask(head);
        let later = match &asked {
            Asked::Refuse(refusal) => {
                return ResponseFuture::refused(self.shared.respond(refusal, head));
            }
            Asked::Later(_) => true,
            Asked::Pass(lease) => self.shared.cut && lease.as_ref().is_some_and(Lease::can_be_lost),
        };
        let answer = later.then(|| (self.shared.responder.keep(head), Arc::clone(&self.shared)));
        ResponseFuture::locking(self.locking(asked, request), answer)
    }
}

impl<S, V, X, Req> Service<Req> for Lock<S, V, Errors, X>
where
    S: Service<Req> + Clone,
    V: Reaches<Req>,
    X: Extent<S::Response>,
{
    type Response = X::Output;
    type Error = Error<S::Error>;
    type Future = ErrorFuture<S, Req, V, X>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Error::Inner)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let asked = self.shared.ask(V::see(&request));
        ErrorFuture::locking(self.locking(asked, request))
    }
}
