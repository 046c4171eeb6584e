//! The service: refuses what is too large at once, and has the rest judged in
//! its future.

use std::{
    fmt, mem,
    sync::Arc,
    task::{Context, Poll},
};

use buttress_core::{BoxError, Head};
use http::{HeaderMap, Request, Response, header::CONTENT_LENGTH};
use http_body::Body;
use tower_service::Service;

use super::{VerifyBody, VerifyFuture, VerifyHandle, metrics::Verdict, shared::Shared};
use crate::WholeBody;

/// The service of a [`VerifyLayer`](crate::VerifyLayer).
///
/// Readiness is the inner service's, and the instance that was polled ready is
/// the one that is called. It is held while the body comes and the message is
/// judged, so that a sender who takes long keeps, say, a slot of a concurrency
/// limit further in: put a time limit around it. What is refused gives it
/// back. A panic of the inner service passes through, and its claim is
/// released.
pub struct Verify<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl<S> Verify<S> {
    pub(crate) const fn new(inner: S, shared: Arc<Shared>) -> Self {
        Self { inner, shared }
    }

    /// Looks at the settings and changes them, while it serves.
    #[must_use]
    pub fn handle(&self) -> VerifyHandle {
        VerifyHandle::new(Arc::clone(&self.shared))
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

impl<S: Clone> Clone for Verify<S> {
    /// The clone waits for its own readiness.
    fn clone(&self) -> Self {
        Self::new(self.inner.clone(), Arc::clone(&self.shared))
    }
}

impl<S: fmt::Debug> fmt::Debug for Verify<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verify")
            .field("inner", &self.inner)
            .field("name", &self.shared.name)
            .field("scheme", &self.shared.scheme.name())
            .finish_non_exhaustive()
    }
}

impl<S, B, R> Service<Request<B>> for Verify<S>
where
    S: Service<Request<WholeBody>, Response = Response<R>> + Clone,
    B: Body,
    B::Error: Into<BoxError>,
    R: Body,
{
    type Response = Response<VerifyBody<R>>;
    type Error = S::Error;
    type Future = VerifyFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // Only the polled instance was promised ready: it is called, or dropped
        // with what it was promised.
        let fresh = self.inner.clone();
        let ready = mem::replace(&mut self.inner, fresh);
        let max_body = self.shared.max_body();
        let most = max_body as u64;
        let least = request.body().size_hint().lower();
        // The body says it where the server has it from the header; another
        // layer's body may not.
        if least > most || claimed_length(request.headers()).is_some_and(|claimed| claimed > most) {
            let refused = self.shared.refuse(Verdict::TooLarge, Head::from(&request));
            return VerifyFuture::answered(refused);
        }
        VerifyFuture::collecting(ready, request, Arc::clone(&self.shared), max_body)
    }
}

fn claimed_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
