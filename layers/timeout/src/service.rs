//! The service: looks how long there is, and calls the inner service or does
//! not.

use std::{
    fmt,
    marker::PhantomData,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use buttress_core::{Any, Head, Http, View, body::ResponseBody, deadline::Deadline};
use http::{Request, Response};
use tower_service::Service;

use crate::{
    Error, ErrorFuture, Errors, Extent, Handle, Respond, ResponseFuture, ToHead,
    future::{Limited, Watch},
    shared::{Due, Kind, Shared, Stage},
};

/// The service of a [`TimeoutLayer`](crate::TimeoutLayer).
///
/// Readiness is the inner service's, and waiting for it takes nothing of the
/// time: that begins with `call`. A request whose deadline is past by then is
/// answered without the inner service; the instance keeps what it was promised
/// (a slot of a concurrency limit, say) for its next call, and dropping it
/// gives it back.
///
/// When time is up the inner future is dropped, and only then is there an
/// answer. A response that is there at the same moment wins; an error does not,
/// nor does gRPC's CANCELLED, since whoever was told the deadline may have
/// given up at it, too. Dropping the response future drops the call and its
/// timer. A panic of the inner service passes through.
pub struct Timeout<S, V: View = Http, M = Respond, X = ToHead> {
    inner: S,
    shared: Arc<Shared>,
    kind: Kind<V, M, X>,
}

impl<S, V: View, M, X> Timeout<S, V, M, X> {
    pub(crate) const fn new(inner: S, shared: Arc<Shared>) -> Self {
        Self {
            inner,
            shared,
            kind: PhantomData,
        }
    }

    /// Looks at the limit and changes it, while it serves.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(&self.shared))
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

    /// Calls the inner service, which has until `due`, if that is known.
    #[inline]
    fn limited<Req>(&mut self, request: Req, watch: Option<Watch>) -> Limited<S::Future>
    where
        S: Service<Req>,
    {
        Limited::new(self.inner.call(request), watch)
    }
}

impl<S, M, X> Timeout<S, Http, M, X> {
    /// Has the request tell those further in, and watches over its call.
    #[inline]
    fn watch<B>(&self, request: &mut Request<B>, deadline: Deadline, left: Duration) -> Watch {
        let grpc = Head::from(&*request).is_grpc();
        self.shared.tell_layers(request.extensions_mut(), deadline);
        self.shared.tell_upstream(request.headers_mut(), grpc, left);
        Watch::new(Arc::clone(&self.shared), deadline, left)
    }
}

impl<S: Clone, V: View, M, X> Clone for Timeout<S, V, M, X> {
    /// The clone waits for its own readiness.
    fn clone(&self) -> Self {
        Self::new(self.inner.clone(), Arc::clone(&self.shared))
    }
}

impl<S: fmt::Debug, V: View, M, X> fmt::Debug for Timeout<S, V, M, X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timeout")
            .field("inner", &self.inner)
            .field("name", &self.shared.name())
            .field("limit", &self.shared.limit())
            .finish_non_exhaustive()
    }
}

impl<S, X, B, R, W> Service<Request<B>> for Timeout<S, Http, Respond, X>
where
    S: Service<Request<B>, Response = Response<R>>,
    X: Extent<Response<R>, Output = Response<W>>,
{
    type Response = Response<ResponseBody<W>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, X>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let head = Head::from(&request);
        match self.shared.due_of(head) {
            Due::Whenever => ResponseFuture::calling(self.limited(request, None)),
            Due::Past => {
                let elapsed = self.shared.elapsed(Duration::ZERO, Stage::Call);
                ResponseFuture::late(self.shared.respond(elapsed, head))
            }
            Due::At(deadline, left) => {
                let kept = self.shared.responder().keep(head);
                let watch = self.watch(&mut request, deadline, left);
                let watch = watch.answering(kept);
                ResponseFuture::calling(self.limited(request, Some(watch)))
            }
        }
    }
}

impl<S, X, B> Service<Request<B>> for Timeout<S, Http, Errors, X>
where
    S: Service<Request<B>>,
    X: Extent<S::Response>,
{
    type Response = X::Output;
    type Error = Error<S::Error>;
    type Future = ErrorFuture<S::Future, X>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Error::Inner)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        match self.shared.due_of(Head::from(&request)) {
            Due::Whenever => ErrorFuture::calling(self.limited(request, None)),
            Due::Past => ErrorFuture::late(self.shared.elapsed(Duration::ZERO, Stage::Call)),
            Due::At(deadline, left) => {
                let watch = self.watch(&mut request, deadline, left);
                ErrorFuture::calling(self.limited(request, Some(watch)))
            }
        }
    }
}

impl<S, Req> Service<Req> for Timeout<S, Any<Req>, Errors>
where
    S: Service<Req>,
    Req: 'static,
{
    type Response = S::Response;
    type Error = Error<S::Error>;
    type Future = ErrorFuture<S::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Error::Inner)
    }

    #[inline]
    fn call(&mut self, request: Req) -> Self::Future {
        let watch = match self.shared.due(None, None) {
            Due::Whenever => None,
            Due::Past => {
                return ErrorFuture::late(self.shared.elapsed(Duration::ZERO, Stage::Call));
            }
            Due::At(deadline, left) => Some(Watch::new(Arc::clone(&self.shared), deadline, left)),
        };
        ErrorFuture::calling(self.limited(request, watch))
    }
}
