//! The body of a response that is counted.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Buf;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::{Phase, Reached, permit::Permit};

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
        // When it is to end. Boxed: few have one, and a response is moved
        // often.
        end: Option<Pin<Box<Reached>>>,
    }
}

impl<B: Body> DrainBody<B> {
    #[inline]
    pub(crate) fn new(body: B, permit: Permit, ends: bool) -> Self {
        let over = body.is_end_stream();
        let end = match ends && !over {
            true => Some(end(&permit)),
            false => None,
        };
        Self {
            body: Some(body),
            permit: Some(permit).filter(|_| !over),
            end,
        }
    }
}

/// Those that were there before the notice end at it.
fn end(permit: &Permit) -> Pin<Box<Reached>> {
    let phase = match permit.inner.ledger.glance() {
        Phase::Serving => Phase::Draining,
        _ => Phase::Closing,
    };
    Box::pin(Reached::new(Arc::clone(&permit.inner), phase))
}

impl<B: Body> Body for DrainBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        if let Some(end) = this.end
            && end.as_mut().poll(cx).is_ready()
        {
            this.body.set(None);
            *this.end = None;
            *this.permit = None;
        }
        let Some(mut body) = this.body.as_mut().as_pin_mut() else {
            return Poll::Ready(None);
        };
        // Taken out, so that a panic drops it.
        let permit = this.permit.take();
        let polled = body.as_mut().poll_frame(cx);
        let goes_on = match &polled {
            Poll::Pending => true,
            Poll::Ready(Some(Ok(frame))) => match frame.data_ref() {
                Some(data) => {
                    if let Some(permit) = &permit {
                        permit.sent(data.remaining());
                    }
                    !body.is_end_stream()
                }
                None => !frame.is_trailers(),
            },
            Poll::Ready(_) => false,
        };
        *this.permit = permit.filter(|_| goes_on);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            // It may be less.
            Some(body) if self.end.is_some() => {
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
            end: None,
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
