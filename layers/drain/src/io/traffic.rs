//! What requests there were and are on a connection, as its server tells it.

use buttress_core::clock::{self, Instant};
use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Of one connection.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    /// How many have begun, in the upper half, and how many are open.
    count: AtomicU64,
    /// When the last one ended, in nanoseconds of the clock; 0 if none has.
    ended: AtomicU64,
    protocol: AtomicU8,
    leaving: AtomicBool,
    /// The first that began was the handshake.
    shaken: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Count {
    /// Goes round.
    pub(crate) begun: u32,
    pub(crate) open: u32,
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
        }
    }

    #[inline]
    pub(crate) fn begin(&self) {
        self.count.fetch_add(BEGUN + 1, Relaxed);
    }

    #[inline]
    pub(crate) fn end(&self) {
        let now = clock::recent().as_nanos();
        self.ended.store(now.max(1), Relaxed);
        // Who sees that it has ended sees when.
        self.count.fetch_sub(1, Release);
    }

    /// When the last request ended.
    #[inline]
    pub(crate) fn ended(&self) -> Option<Instant> {
        match self.ended.load(Relaxed) {
            0 => None,
            nanos => Some(Instant::from_nanos(nanos)),
        }
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.load().open > 0
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
}
