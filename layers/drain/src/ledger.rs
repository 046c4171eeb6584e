//! The counts and the phase: who comes, who goes, and when there is nobody.
//!
//! Who comes counts itself and then looks at the phase; the drain sets the
//! phase and then looks at the counts. One of the two sees the other, so that
//! whoever came in before the door was shut is waited for. Who goes does it the
//! same way round: it counts itself out and then looks whether somebody waits.
//!
//! That takes no fence, and no total order of all that happens: the drain reads
//! a count by adding nothing to it. Who adds to it later has then seen what the
//! drain had done before; what was added earlier, the drain sees.
//!
//! What has begun and what has ended are counted apart, and only ever grow.
//! Reading all that has ended before all that has begun cannot show nobody
//! where there always was somebody: what has ended by the first reading is at
//! most what had by any moment between the two, and what has begun by the
//! second at least that. One number that goes up and down, summed over several
//! places, could.

use buttress_core::sync::{
    Padded,
    atomic::{
        AtomicU8, AtomicUsize,
        Ordering::{AcqRel, Acquire, Relaxed},
    },
};

use crate::Phase;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Kind {
    Request = 0,
    Connection = 1,
    Guard = 2,
    Listener = 3,
}

const KINDS: usize = 4;

#[derive(Debug)]
pub(crate) struct Ledger {
    /// Apart from the counts: it is read at every request, and written six
    /// times in a life.
    phase: Padded<AtomicU8>,
    counters: [Padded<Counter>; KINDS],
}

#[derive(Debug)]
struct Counter {
    begun: AtomicUsize,
    ended: AtomicUsize,
}

impl Counter {
    fn new() -> Self {
        Self {
            begun: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
        }
    }

    fn open(&self) -> usize {
        let ended = self.ended.load(Acquire);
        self.begun.load(Acquire).wrapping_sub(ended)
    }
}

impl Ledger {
    pub(crate) fn new() -> Self {
        Self {
            phase: Padded(AtomicU8::new(Phase::Serving as u8)),
            counters: std::array::from_fn(|_| Padded(Counter::new())),
        }
    }

    /// Counts one in, and tells the phase that it came in.
    #[inline]
    pub(crate) fn enter(&self, kind: Kind) -> Phase {
        self.counters[kind as usize].begun.fetch_add(1, AcqRel);
        self.phase()
    }

    /// Counts one out. Whether somebody who waits must be woken: it was the
    /// last of its kind.
    #[inline]
    #[must_use]
    pub(crate) fn leave(&self, kind: Kind) -> bool {
        let counter = &self.counters[kind as usize];
        counter.ended.fetch_add(1, AcqRel);
        self.phase() != Phase::Serving && counter.open() == 0
    }

    /// For decisions that may come a moment late.
    #[inline]
    pub(crate) fn glance(&self) -> Phase {
        Phase::from_u8(self.phase.load(Relaxed))
    }

    #[inline]
    pub(crate) fn phase(&self) -> Phase {
        Phase::from_u8(self.phase.load(Acquire))
    }

    /// Goes forward to this phase, and tells which it was.
    pub(crate) fn advance(&self, to: Phase) -> Phase {
        Phase::from_u8(self.phase.fetch_max(to as u8, AcqRel))
    }

    /// How many there are of a kind; of a moment in the past.
    pub(crate) fn open(&self, kind: Kind) -> usize {
        self.counters[kind as usize].open()
    }

    /// Whether there was a moment, during this call, with nobody of any kind.
    pub(crate) fn is_idle(&self) -> bool {
        let sum = |of: fn(&Counter) -> &AtomicUsize| {
            let counters = self.counters.iter();
            let counts = counters.map(|counter| of(counter).fetch_add(0, AcqRel));
            counts.fold(0_usize, usize::wrapping_add)
        };
        let ended = sum(|counter| &counter.ended);
        ended == sum(|counter| &counter.begun)
    }
}

#[cfg(all(test, buttress_loom))]
mod loom_tests;
#[cfg(all(test, not(buttress_loom)))]
mod tests;
