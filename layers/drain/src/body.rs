//! The body of a response that is counted.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Buf;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::permit::{Extra, Permit};

pin_project! {
    /// A body whose request is counted until it ends, errs or is dropped.
    ///
    /// The count goes with the last frame where the inner body can tell that
    /// it is the last (hyper does not poll again after it), or at once where
    /// there is nothing to send. What hyper drops unpolled, the answer to HEAD,
    /// a 204 or 304, counts no longer than that.
    pub struct DrainBody<B> {
        // None where it was ended at the notice.
        #[pin]
        body: Option<B>,
        // None when it counts no more.
        permit: Option<Permit>,
        // What few have. Boxed, since a response is moved often.
        extra: Option<Box<Extra>>,
    }
}

impl<B: Body> DrainBody<B> {
    #[inline]
    pub(crate) fn new(body: B, permit: Permit, extra: Option<Box<Extra>>) -> Self {
        let over = body.is_end_stream();
        let body = Some(body);
        if over {
            let (permit, extra) = (None, None);
            return Self {
                body,
                permit,
                extra,
            };
        }
        let permit = Some(permit);
        Self {
            body,
            permit,
            extra,
        }
    }
}

/// Ends the count if it is dropped, which only a panic does.
struct OnPanic<'a>(&'a mut Option<Permit>, &'a mut Option<Box<Extra>>);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        *self.1 = None;
        *self.0 = None;
    }
}

impl<B: Body> Body for DrainBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        if let Some(extra) = this.extra
            && let Some(end) = &mut extra.end
            && end.as_mut().poll(cx).is_ready()
        {
            this.body.set(None);
            *this.extra = None;
            *this.permit = None;
        }
        let Some(mut body) = this.body.as_mut().as_pin_mut() else {
            return Poll::Ready(None);
        };
        if this.permit.is_none() {
            // At once, so that the frame is made where it is returned.
            return body.poll_frame(cx);
        }
        let on_panic = OnPanic(this.permit, this.extra);
        let polled = body.as_mut().poll_frame(cx);
        mem::forget(on_panic);
        let over = match &polled {
            Poll::Pending => false,
            Poll::Ready(Some(Ok(frame))) => match frame.data_ref() {
                Some(data) => {
                    if let Some(extra) = &*this.extra
                        && let Some(track) = &extra.track
                    {
                        track.sent(data.remaining());
                    }
                    body.is_end_stream()
                }
                None => frame.is_trailers(),
            },
            Poll::Ready(_) => true,
        };
        if over {
            *this.extra = None;
            *this.permit = None;
        }
        polled
    }

    #[inline]
    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            // It may be less.
            Some(body) if self.extra.as_ref().is_some_and(|extra| extra.end.is_some()) => {
                let mut hint = SizeHint::new();
                if let Some(upper) = body.size_hint().upper() {
                    hint.set_upper(upper);
                }
                hint
            }
            Some(body) => body.size_hint(),
            None => SizeHint::with_exact(0),
        }
    }
}

impl<B: Default> Default for DrainBody<B> {
    /// An inner body that nobody counts.
    fn default() -> Self {
        Self {
            body: Some(B::default()),
            permit: None,
            extra: None,
        }
    }
}

impl<B: fmt::Debug> fmt::Debug for DrainBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DrainBody")
            .field("body", &self.body)
            .field("counted", &self.permit.is_some())
            .finish_non_exhaustive()
    }
}
