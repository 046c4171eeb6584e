//! The response future: hands its permit on to the body.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{HeaderValue, Response, StatusCode, header::CONNECTION};
use http_body::Body;
use pin_project_lite::pin_project;

use crate::{DrainBody, Phase, layer::Options, permit::Permit};

pin_project! {
    /// Response future of [`Drain`](crate::Drain). Dropping it drops the call,
    /// and its count.
    pub struct ResponseFuture<F> {
        #[pin]
        call: F,
        // None once the body has it.
        permit: Option<Permit>,
        // Whether the response may say that the connection closes.
        closable: bool,
        // None where no body is ended.
        streams: Option<Arc<Options>>,
    }
}

impl<F> ResponseFuture<F> {
    #[inline]
    pub(crate) const fn new(
        call: F,
        permit: Permit,
        closable: bool,
        streams: Option<Arc<Options>>,
    ) -> Self {
        Self {
            call,
            permit: Some(permit),
            closable,
            streams,
        }
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body,
{
    type Output = Result<Response<DrainBody<B>>, E>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = ready!(this.call.poll(cx));
        let permit = this.permit.take().expect("polled after completion");
        // An error drops the permit.
        let mut response = result?;
        if permit.inner.ledger.glance() != Phase::Serving && *this.closable {
            close(&mut response);
        }
        let streams = this.streams.as_ref();
        let ends = streams.is_some_and(|options| options.ends(&response));
        Poll::Ready(Ok(response.map(|body| DrainBody::new(body, permit, ends))))
    }
}

/// Has the client send its next request elsewhere.
#[cold]
pub(crate) fn close<B>(response: &mut Response<B>) {
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture")
            .field("answered", &self.permit.is_none())
            .finish_non_exhaustive()
    }
}
