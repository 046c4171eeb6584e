//! Response bodies: the inner one or a refusal's, and one that tells when it
//! has ended.
//!
//! [`ResponseBody`] is what lets a layer answer by itself without asking more
//! of the inner body than that its data can be made from [`Bytes`].
//! [`GuardedBody`] keeps a permit until the response has really been sent:
//! what a request holds is not free when its head is.

use std::{
    fmt, mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

pin_project! {
    /// The body of the inner service's response, or of a refusal.
    pub struct ResponseBody<B> {
        #[pin]
        kind: Kind<B>,
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<B> {
        Inner { #[pin] body: B },
        // Never holds empty bytes: an empty refusal ends the stream with its
        // head, as gRPC's trailers-only must.
        Refusal { bytes: Option<Bytes> },
    }
}

impl<B> ResponseBody<B> {
    /// The inner service's body, passed through.
    pub const fn inner(body: B) -> Self {
        Self {
            kind: Kind::Inner { body },
        }
    }

    /// A refusal's body: one frame, or none if there are no bytes.
    #[must_use]
    pub fn refusal(bytes: Bytes) -> Self {
        Self {
            kind: Kind::Refusal {
                bytes: Some(bytes).filter(|bytes| !bytes.is_empty()),
            },
        }
    }
}

impl<B> fmt::Debug for ResponseBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            Kind::Inner { .. } => "ResponseBody::Inner",
            Kind::Refusal { .. } => "ResponseBody::Refusal",
        })
    }
}

impl<B: Default> Default for ResponseBody<B> {
    fn default() -> Self {
        Self::inner(B::default())
    }
}

impl<B> Body for ResponseBody<B>
where
    B: Body,
    B::Data: From<Bytes>,
{
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        match self.project().kind.project() {
            KindProj::Inner { body } => body.poll_frame(cx),
            KindProj::Refusal { bytes } => Poll::Ready(
                bytes
                    .take()
                    .map(|bytes| Ok(Frame::data(B::Data::from(bytes)))),
            ),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Inner { body } => body.is_end_stream(),
            Kind::Refusal { bytes } => bytes.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Inner { body } => body.size_hint(),
            Kind::Refusal { bytes } => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
        }
    }
}

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BodyEnd<'a> {
    /// Whole, with these trailers if there were any.
    Complete {
        /// The trailers.
        trailers: Option<&'a HeaderMap>,
    },
    /// With an error in its stream, or a panic in the midst of it.
    Failed,
    /// Dropped before its end: the client went away, or lost interest.
    Dropped,
}

/// What a [`GuardedBody`] tells how the body ended. Its own `Drop` frees what
/// it holds.
///
/// Implemented for closures that take the end and the count of data bytes.
pub trait BodyGuard {
    /// Called once, with how the body ended and how many bytes of data it had
    /// handed on. It must not panic: it may be called while the panic of the
    /// body unwinds, and a second one aborts the process.
    fn ended(self, end: BodyEnd<'_>, bytes: u64);
}

impl<F: FnOnce(BodyEnd<'_>, u64)> BodyGuard for F {
    fn ended(self, end: BodyEnd<'_>, bytes: u64) {
        self(end, bytes);
    }
}

pin_project! {
    /// A body that holds a guard until it ends, errs or is dropped.
    ///
    /// The guard goes as soon as the end is known: with the last frame where
    /// the inner body can tell (hyper does not poll again after it), or at once
    /// where there is nothing to send. A body that hyper drops unpolled (the
    /// answer to HEAD, a 204 or 304) counts as dropped unless it was empty.
    /// One whose `poll_frame` panics has failed; what is dropped by a panic
    /// elsewhere was dropped.
    pub struct GuardedBody<B, G: BodyGuard>
    {
        #[pin]
        body: B,
        guard: Option<G>,
        bytes: u64,
    }

    impl<B, G: BodyGuard> PinnedDrop for GuardedBody<B, G> {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if let Some(guard) = this.guard.take() {
                guard.ended(BodyEnd::Dropped, *this.bytes);
            }
        }
    }
}

impl<B: Body, G: BodyGuard> GuardedBody<B, G> {
    /// Ties `guard` to `body`.
    pub fn new(body: B, guard: G) -> Self {
        let mut this = Self {
            body,
            guard: Some(guard),
            bytes: 0,
        };
        if this.body.is_end_stream() {
            this.finish(BodyEnd::Complete { trailers: None });
        }
        this
    }

    fn finish(&mut self, end: BodyEnd<'_>) {
        if let Some(guard) = self.guard.take() {
            guard.ended(end, self.bytes);
        }
    }
}

/// Tells the guard if it is dropped, which only a panic does.
struct OnPanic<'a, G: BodyGuard> {
    guard: &'a mut Option<G>,
    bytes: u64,
}

impl<G: BodyGuard> Drop for OnPanic<'_, G> {
    fn drop(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.ended(BodyEnd::Failed, self.bytes);
        }
    }
}

impl<B: fmt::Debug, G: BodyGuard> fmt::Debug for GuardedBody<B, G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardedBody")
            .field("body", &self.body)
            .field("ended", &self.guard.is_none())
            .finish_non_exhaustive()
    }
}

impl<B: Body, G: BodyGuard> Body for GuardedBody<B, G> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let mut this = self.project();
        let on_panic = OnPanic {
            guard: &mut *this.guard,
            bytes: *this.bytes,
        };
        let polled = this.body.as_mut().poll_frame(cx);
        mem::forget(on_panic);
        let frame = ready!(polled);
        let mut finish = |end: BodyEnd<'_>, bytes| {
            if let Some(guard) = this.guard.take() {
                guard.ended(end, bytes);
            }
        };
        match &frame {
            None => finish(BodyEnd::Complete { trailers: None }, *this.bytes),
            Some(Err(_)) => finish(BodyEnd::Failed, *this.bytes),
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    *this.bytes += data.remaining() as u64;
                    if this.body.is_end_stream() {
                        finish(BodyEnd::Complete { trailers: None }, *this.bytes);
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    let trailers = Some(trailers);
                    finish(BodyEnd::Complete { trailers }, *this.bytes);
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests;
