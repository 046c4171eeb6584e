//! The body of a response whose end is limited.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::{Error, future::Watch, shared::Stage, timer::Timer};

pin_project! {
    /// A body that must have ended by its call's deadline.
    ///
    /// If it has not, its stream ends with [`Error::Elapsed`], and the inner
    /// body is dropped at that moment. Where the layer answers by responses, a
    /// gRPC stream ends with trailers instead, and in them the status. An end that is there at the same moment
    /// wins. The deadline is looked at when the body is polled: one that nobody
    /// polls is not cut, and so a reader that takes its time is cut at the next
    /// piece that it asks for.
    ///
    /// # Panics
    ///
    /// If it has to wait outside of a tokio runtime with a timer.
    pub struct TimedBody<B> {
        // None when time was up.
        #[pin]
        body: Option<B>,
        // None when there is nothing left to watch over.
        watch: Option<Watch>,
        // Boxed, and made when it is waited for: a response is moved often.
        timer: Option<Pin<Box<Timer>>>,
    }
}

impl<B: Body> TimedBody<B> {
    #[inline]
    pub(crate) fn new(body: B, watch: Option<Watch>) -> Self {
        let watch = watch.filter(|_| !body.is_end_stream());
        Self {
            body: Some(body),
            watch,
            timer: None,
        }
    }
}

impl<B: Body> Body for TimedBody<B> {
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
        if let Some(watch) = this.watch.take() {
            let late = match &polled {
                Poll::Pending => {
                    let timer = this.timer.get_or_insert_with(|| Box::pin(Timer::new()));
                    timer.as_mut().poll(watch.deadline, cx).is_ready()
                }
                // There is always a next piece: without this look it would
                // never be cut.
                Poll::Ready(Some(Ok(frame))) if frame.is_data() && !body.is_end_stream() => {
                    watch.is_past()
                }
                // As in the head: what ends at the same moment ends by it.
                Poll::Ready(Some(Err(_))) if watch.is_past() => true,
                Poll::Ready(_) => {
                    *this.timer = None;
                    return polled.map_err(Error::Inner);
                }
            };
            if late {
                this.body.set(None);
                *this.timer = None;
                let end = watch.trailers(watch.elapsed(Stage::Body));
                return Poll::Ready(Some(end.map(Frame::trailers).map_err(Error::Elapsed)));
            }
            *this.watch = Some(watch);
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

impl<B: Default> Default for TimedBody<B> {
    /// An inner body without a limit.
    fn default() -> Self {
        Self {
            body: Some(B::default()),
            watch: None,
            timer: None,
        }
    }
}

impl<B: fmt::Debug> fmt::Debug for TimedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TimedBody")
            .field("body", &self.body)
            .field("watch", &self.watch)
            .finish_non_exhaustive()
    }
}
