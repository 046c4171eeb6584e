//! Bodies that hold a lock.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use buttress_core::{Refusal, body::GuardedBody};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::{
    Error,
    lease::{Hold, Lease, Lost},
};

pin_project! {
    /// A body that holds its request's lock until it ends, errs or is dropped.
    pub struct LockedBody<B> {
        #[pin]
        body: GuardedBody<B, Hold>,
    }
}

impl<B: Body> LockedBody<B> {
    pub(crate) fn new(body: B, lease: Option<Lease>) -> Self {
        Self {
            body: GuardedBody::new(body, Hold(lease)),
        }
    }
}

impl<B: Body> Body for LockedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.project().body.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B: Body + Default> Default for LockedBody<B> {
    /// An inner body that holds nothing.
    fn default() -> Self {
        Self::new(B::default(), None)
    }
}

impl<B: fmt::Debug> fmt::Debug for LockedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LockedBody").field(&self.body).finish()
    }
}

pin_project! {
    /// A [`LockedBody`] that is cut when its lock is lost: its stream ends with
    /// [`Error::Refused`], and the inner body is dropped at that moment.
    ///
    /// An end that is there at the same moment wins. A body that nobody polls
    /// is cut when it is polled next.
    pub struct CutBody<B> {
        // None when it was cut.
        #[pin]
        body: Option<LockedBody<B>>,
        watch: Option<Watch>,
    }
}

/// When to cut, and what to say.
struct Watch {
    lost: Lost,
    refusal: Refusal,
}

impl<B: Body> CutBody<B> {
    pub(crate) fn new(body: B, lease: Option<Lease>) -> Self {
        let watch = lease.as_ref().filter(|_| !body.is_end_stream());
        let watch = watch.and_then(|lease| {
            let lost = lease.lost()?;
            let refusal = lease.core().lost();
            Some(Watch { lost, refusal })
        });
        Self {
            body: Some(LockedBody::new(body, lease)),
            watch,
        }
    }
}

impl<B: Body> Body for CutBody<B> {
    type Data = B::Data;
    type Error = Error<B::Error>;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, Self::Error>>> {
        let mut this = self.project();
        let Some(mut body) = this.body.as_mut().as_pin_mut() else {
            return Poll::Ready(None);
        };
        let polled = body.as_mut().poll_frame(cx);
        if let Some(mut watch) = this.watch.take() {
            let goes_on = match &polled {
                Poll::Pending => true,
                Poll::Ready(Some(Ok(frame))) => frame.is_data() && !body.is_end_stream(),
                Poll::Ready(_) => false,
            };
            // What has ended has given its lock back, which looks the same.
            if goes_on {
                if watch.lost.as_mut().poll(cx).is_ready() {
                    this.body.set(None);
                    return Poll::Ready(Some(Err(Error::Refused(watch.refusal))));
                }
                *this.watch = Some(watch);
            }
        }
        polled.map_err(Error::Inner)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            Some(body) => body.size_hint(),
            None => SizeHint::with_exact(0),
        }
    }
}

impl<B: Body + Default> Default for CutBody<B> {
    /// An inner body that holds nothing.
    fn default() -> Self {
        Self::new(B::default(), None)
    }
}

impl<B: fmt::Debug> fmt::Debug for CutBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CutBody").field(&self.body).finish()
    }
}
