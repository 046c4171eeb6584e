//! A body in one piece: what a signature is of.

use std::{
    convert::Infallible,
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

/// What the first bytes that are put together have room for: a claim of
/// megabytes alone takes no memory.
const FIRST: usize = 8 * 1024;

/// A body that is there as a whole, with the trailers that came with it.
///
/// One frame of data at most: the very bytes that were signed, or are.
#[derive(Clone, Default)]
pub struct WholeBody {
    bytes: Bytes,
    trailers: Option<Box<HeaderMap>>,
}

impl WholeBody {
    /// Of these bytes, without trailers.
    #[must_use]
    pub const fn new(bytes: Bytes) -> Self {
        Self {
            bytes,
            trailers: None,
        }
    }

    /// What is left of its bytes: all, until it is read as a body.
    #[must_use]
    pub const fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Its bytes without the trailers.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }
}

impl Body for WholeBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if !self.bytes.is_empty() {
            let bytes = std::mem::take(&mut self.bytes);
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        let trailers = self.trailers.take();
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(*trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_empty() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.len() as u64)
    }
}

impl fmt::Debug for WholeBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WholeBody")
            .field("length", &self.bytes.len())
            .finish_non_exhaustive()
    }
}

/// Why a body is not there as a whole.
#[derive(Debug)]
pub(crate) enum NotWhole<E> {
    /// It is longer than it may be. What is left of it was not read.
    TooLarge,
    /// Its stream broke.
    Broken(E),
}

pin_project! {
    /// Reads a body to its end, as far as it is no longer than it may be.
    pub(crate) struct Collect<B> {
        #[pin]
        body: B,
        most: usize,
        // A body of one frame is handed on as it is.
        only: Bytes,
        together: BytesMut,
        trailers: Option<Box<HeaderMap>>,
    }
}

impl<B: Body> Collect<B> {
    pub(crate) fn new(body: B, most: usize) -> Self {
        Self {
            body,
            most,
            only: Bytes::new(),
            together: BytesMut::new(),
            trailers: None,
        }
    }
}

impl<B: Body> Future for Collect<B> {
    type Output = Result<WholeBody, NotWhole<B::Error>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            let held = this.only.len() + this.together.len();
            let left = this.most.saturating_sub(held);
            // What it says of itself is enough to refuse it.
            if this.body.size_hint().lower() > left as u64 {
                return Poll::Ready(Err(NotWhole::TooLarge));
            }
            let Some(frame) = ready!(this.body.as_mut().poll_frame(cx)) else {
                break;
            };
            let frame = match frame {
                Ok(frame) => frame,
                Err(error) => return Poll::Ready(Err(NotWhole::Broken(error))),
            };
            match frame.into_data() {
                Ok(mut data) => {
                    let length = data.remaining();
                    if length > left {
                        return Poll::Ready(Err(NotWhole::TooLarge));
                    }
                    if held == 0 {
                        *this.only = data.copy_to_bytes(length);
                        continue;
                    }
                    if !this.only.is_empty() {
                        let only = std::mem::take(this.only);
                        this.together
                            .reserve((only.len() + length).max(FIRST).min(*this.most));
                        this.together.put(only);
                    }
                    this.together.put(data);
                }
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        match this.trailers {
                            Some(earlier) => earlier.extend(trailers),
                            None => *this.trailers = Some(Box::new(trailers)),
                        }
                    }
                }
            }
        }
        let bytes = match this.together.is_empty() {
            true => std::mem::take(this.only),
            false => this.together.split().freeze(),
        };
        Poll::Ready(Ok(WholeBody {
            bytes,
            trailers: this.trailers.take(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, io};

    use http_body_util::{BodyExt, Full};
    use tokio_test::task;

    use super::*;

    /// Frames one by one, with a claim of how many bytes there are.
    struct Frames {
        frames: VecDeque<io::Result<Frame<Bytes>>>,
        least: u64,
        polled: usize,
    }

    impl Body for Frames {
        type Data = Bytes;
        type Error = io::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
            self.polled += 1;
            // Not at once, as from a socket.
            if self.polled % 2 == 1 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(self.frames.pop_front())
        }

        fn size_hint(&self) -> SizeHint {
            let mut hint = SizeHint::new();
            hint.set_lower(self.least);
            hint
        }
    }

    fn frames(frames: impl IntoIterator<Item = &'static str>) -> Frames {
        let data = |text: &'static str| Ok(Frame::data(Bytes::from_static(text.as_bytes())));
        Frames {
            frames: frames.into_iter().map(data).collect(),
            least: 0,
            polled: 0,
        }
    }

    fn collect<B: Body>(body: B, most: usize) -> Result<WholeBody, NotWhole<B::Error>> {
        let mut task = task::spawn(Collect::new(body, most));
        for _ in 0..100 {
            if let Poll::Ready(collected) = task.poll() {
                return collected;
            }
        }
        panic!("it does not end");
    }

    #[test]
    fn a_body_of_one_frame_is_not_copied() {
        let bytes = Bytes::from(vec![7; 100]);
        let whole = collect(Full::new(bytes.clone()), 100).unwrap();
        assert_eq!(whole.bytes().as_ptr(), bytes.as_ptr());
        assert!(matches!(
            collect(Full::new(bytes), 99),
            Err(NotWhole::TooLarge)
        ));
    }

    #[test]
    fn frames_are_put_together_up_to_the_limit() {
        let whole = collect(frames(["ab", "", "c", "def"]), 6).unwrap();
        assert_eq!(whole.into_bytes(), "abcdef");
        let longer = collect(frames(["ab", "", "c", "defg"]), 6);
        assert!(matches!(longer, Err(NotWhole::TooLarge)));
        let empty = collect(frames([]), 0).unwrap();
        assert!(empty.is_end_stream());
    }

    #[test]
    fn a_claim_is_enough_to_refuse_it() {
        let mut claims = frames(["a"]);
        claims.least = 7;
        let mut task = task::spawn(Collect::new(claims, 6));
        assert!(matches!(task.poll(), Poll::Ready(Err(NotWhole::TooLarge))));
        assert_eq!(task.body.polled, 0);
    }

    #[test]
    fn a_stream_that_breaks_is_not_a_shorter_body() {
        let mut broken = frames(["ab"]);
        broken
            .frames
            .push_back(Err(io::ErrorKind::ConnectionReset.into()));
        let error = collect(broken, 10).unwrap_err();
        assert!(matches!(error, NotWhole::Broken(error)
            if error.kind() == io::ErrorKind::ConnectionReset));
    }

    #[tokio::test]
    async fn trailers_are_kept() {
        let mut body = frames(["ab", "cd"]);
        let trailers = HeaderMap::from_iter([(
            http::HeaderName::from_static("x-checksum"),
            http::HeaderValue::from_static("1"),
        )]);
        body.frames.push_back(Ok(Frame::trailers(trailers.clone())));
        let whole = collect(body, 10).unwrap();
        assert_eq!(whole.size_hint().exact(), Some(4));
        assert!(!whole.is_end_stream());
        let collected = whole.collect().await.unwrap();
        assert_eq!(collected.trailers(), Some(&trailers));
        assert_eq!(collected.to_bytes(), "abcd");
    }
}
