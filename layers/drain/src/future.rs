//! The response future: hands its permit on to the body.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{HeaderValue, Response, StatusCode, header::CONNECTION, response::Parts};
use http_body::Body;
use pin_project_lite::pin_project;

use crate::{
    DrainBody,
    permit::{Extra, Permit},
};

pin_project! {
    /// Response future of [`Drain`](crate::Drain). Dropping it drops the call,
    /// and its count.
    pub struct ResponseFuture<F> {
        #[pin]
        call: F,
        // None once the body has it.
        permit: Option<Permit>,
        extra: Option<Box<Extra>>,
        // Whether the response may say that the connection closes.
        closable: bool,
        connect: bool,
    }
}

impl<F> ResponseFuture<F> {
    #[inline]
    pub(crate) const fn new(
        call: F,
        permit: Permit,
        closable: bool,
        connect: bool,
        extra: Option<Box<Extra>>,
    ) -> Self {
        Self {
            call,
            permit: Some(permit),
            extra,
            closable,
            connect,
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
        let (mut head, body) = result?.into_parts();
        let closing = *this.closable && permit.is_draining();
        let mut extra = this.extra.take();
        let tunnel = *this.connect && head.status.is_success();
        // A tunnel's head says nothing of the connection.
        if closing && !tunnel {
            close(&mut head);
        }
        if let Some(extra) = &mut extra {
            extra.name(&mut head, tunnel);
            extra.look(&head);
        }
        let body = DrainBody::new(body, permit, extra);
        Poll::Ready(Ok(Response::from_parts(head, body)))
    }
}

/// Has the client send its next request elsewhere.
#[cold]
pub(crate) fn close(head: &mut Parts) {
    if head.status != StatusCode::SWITCHING_PROTOCOLS {
        let headers = &mut head.headers;
        // What else it says stands: a 426 lists its `upgrade` there.
        let mut told = Vec::new();
        for value in headers.get_all(CONNECTION) {
            for token in value.as_bytes().split(|byte| *byte == b',') {
                let token = token.trim_ascii();
                let known: [&[u8]; 3] = [b"", b"close", b"keep-alive"];
                if !known.iter().any(|known| token.eq_ignore_ascii_case(known)) {
                    told.extend_from_slice(token);
                    told.extend_from_slice(b", ");
                }
            }
        }
        told.extend_from_slice(b"close");
        let told = HeaderValue::from_bytes(&told);
        let close = told.unwrap_or(HeaderValue::from_static("close"));
        headers.insert(CONNECTION, close);
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture")
            .field("answered", &self.permit.is_none())
            .finish_non_exhaustive()
    }
}
