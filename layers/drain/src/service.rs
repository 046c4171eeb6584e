//! The service: counts a request in, and calls.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Method, Request, Response, Version};
use http_body::Body;
use tower_service::Service;

use crate::{
    DrainBody, DrainSignal, ResponseFuture,
    layer::Options,
    permit::{Extra, Permit, Track},
    shutdown::Inner,
};

/// The service of a [`DrainLayer`](crate::DrainLayer).
///
/// Readiness is the inner service's. A request counts from `call` until its
/// future is dropped or fails, or until the end, error or drop of its
/// response's body; a panic of the inner service ends it, too. It counts for
/// nothing that it may be refused further in.
///
/// While the shutdown drains, answers to HTTP/1 requests say `Connection:
/// close`, unless they are a 101. HTTP/2 knows no such header.
pub struct Drain<S> {
    inner: S,
    shutdown: Arc<Inner>,
    options: Arc<Options>,
}

impl<S> Drain<S> {
    pub(crate) const fn new(inner: S, shutdown: Arc<Inner>, options: Arc<Options>) -> Self {
        Self {
            inner,
            shutdown,
            options,
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

    /// What only those who asked for it pay for.
    #[cold]
    fn opted<B>(&self, request: &mut Request<B>) -> Option<Box<Extra>> {
        let track = self.options.route(request);
        let track = track.map(|route| Track::new(&self.shutdown, route));
        if self.options.signal {
            let signal = DrainSignal::new(Arc::clone(&self.shutdown));
            request.extensions_mut().insert(signal);
        }
        let streams = self.options.any_streams();
        if track.is_none() && !streams {
            return None;
        }
        let streams = streams.then(|| (Arc::clone(&self.options), Arc::clone(&self.shutdown)));
        let end = None;
        Some(Box::new(Extra {
            track,
            streams,
            end,
        }))
    }
}

impl<S, ReqB, B> Service<Request<ReqB>> for Drain<S>
where
    S: Service<Request<ReqB>, Response = Response<B>>,
    B: Body,
{
    type Response = Response<DrainBody<B>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, mut request: Request<ReqB>) -> Self::Future {
        let permit = Permit::take(&self.shutdown);
        let mut extra = None;
        if !self.options.is_plain() {
            extra = self.opted(&mut request);
        }
        let closable = request.version() < Version::HTTP_2;
        let connect = request.method() == Method::CONNECT;
        ResponseFuture::new(self.inner.call(request), permit, closable, connect, extra)
    }
}

impl<S: Clone> Clone for Drain<S> {
    fn clone(&self) -> Self {
        Self::new(
            self.inner.clone(),
            Arc::clone(&self.shutdown),
            Arc::clone(&self.options),
        )
    }
}

impl<S: fmt::Debug> fmt::Debug for Drain<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drain")
            .field("inner", &self.inner)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
