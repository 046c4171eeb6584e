//! A request's body, streamed to the first attempt while a bounded buffer
//! remembers it, and replayed to the later ones.
//!
//! The live body has one owner at a time: the slot that the retry shares with
//! the bodies of its attempts, or the attempt that reads it. What was read of
//! it lies in the slot.
//!
//! ```text
//!           attempt()                         end of the body
//!   Idle ────────────────▶ Held ──────────────────────────▶ Complete
//!   live body, buffer      buffer; the attempt              buffer
//!     ▲                    has the live body                attempt(): replays
//!     │                      │    │                         it all, several
//!     └── attempt dropped ───┘    │                         at a time
//!                                 ▼
//!                               Lost(why)
//!           over the cap, no memory left, body failed, retry gone:
//!           the buffer is freed at once, the attempt streams on alone
//! ```
//!
//! An attempt's body replays what the buffer held when it was made, then goes
//! on with the live body and appends to the buffer. So no lock is held while a
//! body is polled, and there is one for each frame that is replayed or
//! remembered; none once nothing is remembered any more. Empty chunks are
//! handed on and not remembered.
//!
//! As linkerd2-proxy's `linkerd/http/retry/src/replay.rs` does, but for these:
//! a failed body is not polled again; a body that was read to its end can be
//! replayed while it is still held; a body too large, but of which nothing was
//! read, can still go to another attempt; and chunks go on one by one.

use std::{
    fmt, mem,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use buttress_core::sync::{Arc, Mutex};
use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};

use self::buffer::Buffer;

mod buffer;
mod pool;

pub use self::pool::Memory;

/// Why a request's body cannot be sent once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NotReplayable {
    /// More of it was read than may be remembered of one body.
    TooLarge,
    /// The body itself ended with an error, or with a panic.
    BodyFailed,
    /// The attempt before has not read it to its end and still holds it, as an
    /// HTTP/2 connection does for a moment after an early answer. This passes.
    InUse,
    /// There was no room for it beside the other requests' bodies: see
    /// [`Memory`].
    NoMemory,
}

impl fmt::Display for NotReplayable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLarge => "the request body is too large to be sent again",
            Self::BodyFailed => "the request body failed",
            Self::InUse => "the request body is still being sent",
            Self::NoMemory => "no memory is left to send the request body again",
        })
    }
}

impl std::error::Error for NotReplayable {}

/// Where the live body is, and what was read of it.
enum Slot<B> {
    Idle {
        live: Pin<Box<B>>,
        buffer: Buffer,
    },
    Held {
        buffer: Buffer,
        /// The attempt has not yet handed on all that it found in the buffer.
        replaying: bool,
        /// There is a retry that may want the buffer after this attempt.
        wanted: bool,
        /// Who waits for the attempt to give the live body up.
        waits: WakeOnDrop,
    },
    Complete(Buffer),
    Lost(NotReplayable),
}

/// Dropped with [`Slot::Held`], however that ends.
#[derive(Default)]
struct WakeOnDrop(Option<Waker>);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        if let Some(waker) = self.0.take() {
            waker.wake();
        }
    }
}

impl<B> Slot<B> {
    /// What is in the slot now must be dropped when it is unlocked: bytes and
    /// bodies run their owners' code.
    #[must_use = "drop it when the slot is unlocked"]
    fn lose(&mut self, why: NotReplayable) -> Self {
        mem::replace(self, Self::Lost(why))
    }

    /// Who is to be woken must be dropped when the slot is unlocked.
    #[must_use = "drop it when the slot is unlocked"]
    fn complete(&mut self) -> Option<WakeOnDrop> {
        match self.lose(NotReplayable::InUse) {
            Self::Held { buffer, waits, .. } => {
                *self = Self::Complete(buffer);
                Some(waits)
            }
            other => {
                *self = other;
                None
            }
        }
    }
}

type Shared<B> = Arc<Mutex<Slot<B>>>;

/// What is kept of one request's body, to make the bodies of its attempts.
///
/// When it is dropped, the body of the last attempt streams on and nothing is
/// remembered for it any more.
pub(crate) struct Replay<B> {
    /// The original's.
    size: SizeHint,
    /// None for an empty body.
    shared: Option<Shared<B>>,
}

impl<B: Body> Replay<B> {
    /// Remembers at most `cap` bytes of `body`: those of its data, and of its
    /// trailers as [RFC 7541 §4.1] counts them. `memory` is charged for them.
    ///
    /// An empty body costs no allocation, any other two.
    ///
    /// [RFC 7541 §4.1]: https://www.rfc-editor.org/rfc/rfc7541#section-4.1
    pub(crate) fn new(body: B, cap: usize, memory: &Memory) -> Self {
        let size = body.size_hint();
        let shared = (!body.is_end_stream()).then(|| {
            // What will be given up in the end is not begun.
            let fits = usize::try_from(size.lower()).is_ok_and(|lower| lower <= cap);
            Arc::new(Mutex::new(Slot::Idle {
                live: Box::pin(body),
                buffer: Buffer::new(if fits { cap } else { 0 }, memory),
            }))
        });
        Self { size, shared }
    }

    /// The body of the next attempt.
    ///
    /// # Errors
    ///
    /// What stands in the way; never for the first one.
    pub(crate) fn attempt(&mut self) -> Result<ReplayBody<B>, NotReplayable> {
        let source = match &self.shared {
            None => Source::Done,
            Some(shared) => Source::take(shared)?,
        };
        Ok(ReplayBody {
            size: self.size,
            sent: 0,
            source,
        })
    }

    /// Whether [`attempt`](Self::attempt) would succeed now.
    ///
    /// # Errors
    ///
    /// What stands in the way. [`NotReplayable::InUse`] passes when the body of
    /// the attempt before is dropped or read to its end; the others do not.
    pub(crate) fn check(&self) -> Result<(), NotReplayable> {
        let Some(shared) = &self.shared else {
            return Ok(());
        };
        match &*shared.lock() {
            Slot::Idle { .. } | Slot::Complete(_) => Ok(()),
            Slot::Held { .. } => Err(NotReplayable::InUse),
            Slot::Lost(why) => Err(*why),
        }
    }

    /// The body of the next attempt, once the one before has given it up. An
    /// HTTP connection does so soon after its early answer was dropped.
    ///
    /// # Errors
    ///
    /// What stands in the way for good.
    pub(crate) fn poll_attempt(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<ReplayBody<B>, NotReplayable>> {
        if let Some(shared) = &self.shared {
            let mut slot = shared.lock();
            if let Slot::Held { waits, .. } = &mut *slot {
                let before = waits.0.replace(cx.waker().clone());
                drop(slot);
                drop(before);
                return Poll::Pending;
            }
        }
        Poll::Ready(self.attempt())
    }
}

impl<B> Drop for Replay<B> {
    fn drop(&mut self) {
        let Some(shared) = &self.shared else {
            return;
        };
        let mut slot = shared.lock();
        let unwanted = match &mut *slot {
            Slot::Held {
                replaying: false, ..
            } => Some(slot.lose(NotReplayable::InUse)),
            // It needs the buffer itself, and frees it when it has read it.
            Slot::Held { wanted, .. } => {
                *wanted = false;
                None
            }
            // Freed with the last that holds the slot.
            Slot::Idle { .. } | Slot::Complete(_) | Slot::Lost(_) => None,
        };
        drop(slot);
        drop(unwanted);
    }
}

impl<B> fmt::Debug for Replay<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replay")
            .field("size", &self.size)
            .field("empty", &self.shared.is_none())
            .finish_non_exhaustive()
    }
}

/// The body of one attempt: the request's own, which is remembered as it is
/// read, or replayed as far as it was read before.
///
/// Byte for byte what the request's body is, with its trailers; its size hint
/// is the original's less what was handed on, so that each attempt is framed
/// as the first was. Dropping it before its end hands the request's body back,
/// for the attempt after it.
///
/// # Panics
///
/// If it is polled after a poll of the request's body has panicked: an end
/// would be taken for that of the whole body.
pub struct ReplayBody<B> {
    /// The original's, for this attempt's start.
    size: SizeHint,
    /// Bytes of data handed on.
    sent: u64,
    source: Source<B>,
}

impl<B: Body> ReplayBody<B> {
    /// Of a request that will have no other attempt. One allocation, or none if
    /// it is empty.
    pub(crate) fn once(body: B) -> Self {
        let size = body.size_hint();
        let source = if body.is_end_stream() {
            Source::Done
        } else {
            Source::Live {
                live: Box::pin(body),
                shared: None,
            }
        };
        Self {
            size,
            sent: 0,
            source,
        }
    }
}

/// Where an attempt's next frame comes from.
enum Source<B> {
    /// The buffer, as far as it went when the attempt began, and then the live
    /// body; without one the buffer is the whole.
    Buffer {
        shared: Shared<B>,
        live: Option<Pin<Box<B>>>,
        next: usize,
        end: usize,
        /// To come after the last chunk.
        trailers: bool,
    },
    /// The live body, which is remembered if there is a slot.
    Live {
        live: Pin<Box<B>>,
        shared: Option<Shared<B>>,
    },
    Done,
    Panicked,
}

impl<B> Source<B> {
    /// A new attempt's.
    fn take(shared: &Shared<B>) -> Result<Self, NotReplayable> {
        let mut slot = shared.lock();
        let (end, trailers, live) = match slot.lose(NotReplayable::InUse) {
            Slot::Idle { live, buffer } => {
                let end = buffer.chunks();
                *slot = Slot::Held {
                    buffer,
                    replaying: end > 0,
                    wanted: true,
                    waits: WakeOnDrop::default(),
                };
                (end, false, Some(live))
            }
            Slot::Complete(buffer) => {
                let (end, trailers) = (buffer.chunks(), buffer.trailers().is_some());
                *slot = Slot::Complete(buffer);
                (end, trailers, None)
            }
            held @ Slot::Held { .. } => {
                *slot = held;
                return Err(NotReplayable::InUse);
            }
            Slot::Lost(why) => {
                *slot = Slot::Lost(why);
                return Err(why);
            }
        };
        drop(slot);
        let shared = Arc::clone(shared);
        Ok(match live {
            Some(live) if end == 0 => Self::Live {
                live,
                shared: Some(shared),
            },
            None if end == 0 && !trailers => Self::Done,
            live => Self::Buffer {
                shared,
                live,
                next: 0,
                end,
                trailers,
            },
        })
    }

    /// The next remembered frame.
    fn replay(&mut self) -> Option<Frame<Bytes>> {
        let Self::Buffer {
            shared,
            live,
            next,
            end,
            trailers,
        } = self
        else {
            return None;
        };
        let mut slot = shared.lock();
        let (Slot::Held { buffer, .. } | Slot::Complete(buffer)) = &*slot else {
            unreachable!("nobody takes the buffer from an attempt that replays it");
        };
        let frame = if next < end {
            let chunk = buffer.chunk(*next).clone();
            *next += 1;
            Frame::data(chunk)
        } else {
            let remembered = buffer.trailers().cloned().unwrap_or_default();
            *trailers = false;
            Frame::trailers(remembered)
        };
        if next < end || *trailers {
            return Some(frame);
        }
        let mut wanted_by_none = None;
        if let Slot::Held {
            replaying, wanted, ..
        } = &mut *slot
        {
            *replaying = false;
            if !*wanted {
                wanted_by_none = Some(slot.lose(NotReplayable::InUse));
            }
        }
        drop(slot);
        let shared = wanted_by_none.is_none().then(|| Arc::clone(shared));
        *self = match live.take() {
            Some(live) => Self::Live { live, shared },
            None => Self::Done,
        };
        Some(frame)
    }

    /// Nothing comes after this: the next attempt replays it all.
    fn complete(&mut self) {
        if let Self::Live {
            shared: Some(shared),
            ..
        } = self
        {
            let waits = shared.lock().complete();
            drop(waits);
        }
        *self = Self::Done;
    }

    /// There will be no next attempt.
    fn lose(&mut self, why: NotReplayable) {
        if let Self::Live { shared, .. } = self
            && let Some(shared) = shared.take()
        {
            let mut slot = shared.lock();
            let lost = match &*slot {
                Slot::Held { .. } => Some(slot.lose(why)),
                // For another reason already.
                _ => None,
            };
            drop(slot);
            drop(lost);
        }
    }

    /// Keeps what is about to be handed on. `last`: nothing comes after it.
    fn remember(&mut self, frame: &Frame<Bytes>, last: bool) {
        if let Self::Live {
            shared: Some(shared),
            ..
        } = self
        {
            let mut slot = shared.lock();
            let kept = match &mut *slot {
                Slot::Held { buffer, .. } => buffer.push(frame),
                // The retry has gone, and with it the need.
                _ => Err(NotReplayable::InUse),
            };
            let waits = if last && kept.is_ok() {
                slot.complete()
            } else {
                None
            };
            drop(slot);
            drop(waits);
            if let Err(why) = kept {
                self.lose(why);
            }
        }
        if last {
            *self = Self::Done;
        }
    }
}

/// Dropped by nothing but the panic of the live body.
struct OnPanic<'a, B>(&'a mut Source<B>);

impl<B> Drop for OnPanic<'_, B> {
    fn drop(&mut self) {
        self.0.lose(NotReplayable::BodyFailed);
        *self.0 = Source::Panicked;
    }
}

impl<B: Body> Source<B> {
    /// The next frame of the live body, remembered.
    #[allow(clippy::type_complexity)]
    fn stream(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let on_panic = OnPanic(self);
        let Source::Live { live, .. } = &mut *on_panic.0 else {
            mem::forget(on_panic);
            return Poll::Ready(None);
        };
        let polled = live.as_mut().poll_frame(cx).map_ok(|frame| {
            // Copies nothing where the data is `Bytes`.
            let frame = frame.map_data(|mut data| data.copy_to_bytes(data.remaining()));
            // Nobody polls after trailers, nor what says that it has ended.
            let last = frame.is_trailers() || live.is_end_stream();
            (frame, last)
        });
        mem::forget(on_panic);
        Poll::Ready(match ready!(polled) {
            None => {
                self.complete();
                None
            }
            Some(Err(error)) => {
                self.lose(NotReplayable::BodyFailed);
                *self = Self::Done;
                Some(Err(error))
            }
            Some(Ok((frame, last))) => {
                self.remember(&frame, last);
                Some(Ok(frame))
            }
        })
    }
}

impl<B: Body> Body for ReplayBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = match &mut self.source {
            Source::Buffer { .. } => self.source.replay().map(Ok),
            Source::Live { .. } => ready!(self.source.stream(cx)),
            Source::Done => None,
            Source::Panicked => panic!("`ReplayBody` polled after the request's body panicked"),
        };
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.sent += data.len() as u64;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Done => true,
            Source::Live { live, .. } => live.is_end_stream(),
            Source::Buffer { .. } | Source::Panicked => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        let mut left = SizeHint::new();
        left.set_lower(self.size.lower().saturating_sub(self.sent));
        if let Some(upper) = self.size.upper() {
            left.set_upper(upper.saturating_sub(self.sent));
        }
        left
    }
}

impl<B> Drop for ReplayBody<B> {
    fn drop(&mut self) {
        let (Source::Live {
            live,
            shared: Some(shared),
        }
        | Source::Buffer {
            live: Some(live),
            shared,
            ..
        }) = mem::replace(&mut self.source, Source::Done)
        else {
            return;
        };
        let mut slot = shared.lock();
        let waits = match slot.lose(NotReplayable::InUse) {
            Slot::Held { buffer, waits, .. } => {
                *slot = Slot::Idle { live, buffer };
                Some(waits)
            }
            other => {
                *slot = other;
                None
            }
        };
        drop(slot);
        drop(waits);
    }
}

impl<B> fmt::Debug for ReplayBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = match &self.source {
            Source::Buffer { .. } => "buffer",
            Source::Live { .. } => "live",
            Source::Done => "done",
            Source::Panicked => "panicked",
        };
        f.debug_struct("ReplayBody")
            .field("size", &self.size)
            .field("sent", &self.sent)
            .field("source", &source)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests;

#[cfg(all(test, buttress_loom))]
mod loom_tests;
