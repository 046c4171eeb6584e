//! What requests there were and are on a connection, as its server tells it.

use buttress_core::{
    clock::{self, Instant},
    sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// Of one connection.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    /// How many have begun, in the upper half, and how many are open.
    count: AtomicU64,
    /// How many pieces of answers there are that are not written yet: the
    /// request may be over by then.
    held: AtomicU32,
    /// A write waits for the other end to take something.
    stalled: AtomicBool,
    /// When the last of either ended, in nanoseconds of the clock; 0 if none has.
    ended: AtomicU64,
    protocol: AtomicU8,
    leaving: AtomicBool,
    refusing: AtomicBool,
    /// The last request that began has no body.
    bare: AtomicBool,
    /// How many answers wait for the other end to take more of them.
    waiting: AtomicU32,
    /// When it took something, in nanoseconds of the clock, or could have.
    taken: AtomicU64,
    /// The first that began was the handshake.
    shaken: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Count {
    /// Goes round.
    pub(crate) begun: u32,
    pub(crate) open: u32,
    pub(crate) held: u32,
}

impl Count {
    #[inline]
    pub(crate) const fn is_busy(self) -> bool {
        self.open > 0 || self.held > 0
    }
}

/// What is spoken on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Protocol {
    /// Or nobody knows yet.
    Http1 = 0,
    Http2 = 1,
    Handshake = 2,
    Tunnel = 3,
}

const BEGUN: u64 = 1 << 32;

impl Traffic {
    #[inline]
    pub(crate) fn load(&self) -> Count {
        let count = self.count.load(Acquire);
        Count {
            begun: (count >> 32) as u32,
            #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
            open: count as u32,
            // After it: what an answer leaves behind is held before it ends.
            held: self.held.load(Acquire),
        }
    }

    #[inline]
    pub(crate) fn begin(&self) {
        self.count.fetch_add(BEGUN + 1, Relaxed);
    }

    #[inline]
    pub(crate) fn end(&self) {
        self.ends();
        // Who sees that it has ended sees when.
        self.count.fetch_sub(1, Release);
    }

    /// Of the request that begins.
    #[inline]
    pub(crate) fn bare(&self, bare: bool) {
        self.bare.store(bare, Relaxed);
    }

    #[inline]
    pub(crate) fn is_bare(&self) -> bool {
        self.bare.load(Relaxed)
    }

    /// Whether there were bytes of a handshake: what is read is not what was
    /// sent then.
    #[inline]
    pub(crate) fn is_shaken(&self) -> bool {
        self.shaken.load(Relaxed)
    }

    #[inline]
    pub(crate) fn wait(&self) {
        self.take();
        // Who sees that it waits sees since when.
        self.waiting.fetch_add(1, Release);
    }

    #[inline]
    pub(crate) fn wait_no_more(&self) {
        self.waiting.fetch_sub(1, Relaxed);
    }

    /// The other end takes something.
    #[inline]
    pub(crate) fn take(&self) {
        let now = clock::recent().as_nanos();
        self.taken.store(now, Relaxed);
    }

    /// Since when the other end takes nothing of what there is for it; `None`
    /// if there is nothing.
    pub(crate) fn untaken(&self) -> Option<Instant> {
        let waits = self.waiting.load(Acquire) > 0 || self.held.load(Acquire) > 0;
        waits.then(|| Instant::from_nanos(self.taken.load(Relaxed)))
    }

    #[inline]
    pub(crate) fn hold(&self) {
        self.take();
        self.held.fetch_add(1, Release);
    }

    #[inline]
    pub(crate) fn release(&self) {
        self.ends();
        self.held.fetch_sub(1, Release);
    }

    #[inline]
    fn ends(&self) {
        let now = clock::recent().as_nanos();
        self.ended.store(now.max(1), Relaxed);
    }

    #[inline]
    pub(crate) fn stall(&self, stalled: bool) {
        self.stalled.store(stalled, Relaxed);
    }

    /// When the last request ended, or the last of an answer was written.
    #[inline]
    pub(crate) fn ended(&self) -> Option<Instant> {
        match self.ended.load(Relaxed) {
            0 => None,
            nanos => Some(Instant::from_nanos(nanos)),
        }
    }

    /// Whether something would be lost with it.
    pub(crate) fn is_busy(&self) -> bool {
        self.load().is_busy() || self.stalled.load(Relaxed)
    }

    /// What was read so far was the handshake's; it counts as a request that
    /// is over.
    pub(crate) fn shaken(&self) {
        self.begin();
        self.end();
        self.shaken.store(true, Relaxed);
        self.speak(Protocol::Http1);
    }

    /// Whether there was a request.
    pub(crate) fn is_used(&self) -> bool {
        self.load().begun > u32::from(self.shaken.load(Relaxed))
    }

    pub(crate) fn speak(&self, protocol: Protocol) {
        self.protocol.store(protocol as u8, Relaxed);
    }

    #[inline]
    pub(crate) fn protocol(&self) -> Protocol {
        match self.protocol.load(Relaxed) {
            0 => Protocol::Http1,
            1 => Protocol::Http2,
            2 => Protocol::Handshake,
            _ => Protocol::Tunnel,
        }
    }

    /// No more requests are wanted on it.
    pub(crate) fn leave(&self) {
        self.leaving.store(true, Relaxed);
    }

    #[inline]
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.load(Relaxed)
    }

    /// It was told so long ago that those which come all the same are refused.
    pub(crate) fn refuse(&self) {
        self.refusing.store(true, Relaxed);
    }

    #[inline]
    pub(crate) fn is_refusing(&self) -> bool {
        self.refusing.load(Relaxed)
    }
}

#[cfg(all(test, buttress_loom))]
mod loom_tests {
    use buttress_core::sync::{Arc, model::model, thread};

    use super::*;

    /// The time is of what waits, not of what was taken before it came.
    #[test]
    fn who_sees_that_an_answer_waits_sees_since_when() {
        for begin in [Traffic::wait, Traffic::hold] {
            model(move || {
                let before = Instant::from_nanos(u64::MAX);
                let traffic = Arc::new(Traffic::default());
                traffic.taken.store(before.as_nanos(), Relaxed);
                let other = Arc::clone(&traffic);
                let other = thread::spawn(move || begin(&other));
                assert_ne!(traffic.untaken(), Some(before));
                other.join().unwrap();
                assert!(traffic.untaken().is_some_and(|since| since < before));
            });
        }
    }
}
