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
        AtomicUsize,
        Ordering::{AcqRel, Acquire, Relaxed},
    },
};

use crate::{
    Phase,
    stripe::{STRIPES, stripe},
};

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Request,
    Connection,
    Guard,
    Listener,
}

/// Who is left when one has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Somebody, or nobody who asks.
    Others,
    /// None of its kind, and somebody waits for that.
    Emptied,
    /// Nobody at all, and nobody will ever come: the ledger is the caller's.
    Free,
}

#[derive(Debug)]
pub(crate) struct Ledger {
    /// The phase, and above it which life this is. Apart from the counts: it is
    /// read at every request, and written six times in a life.
    word: Padded<AtomicUsize>,
    /// Each thread has its own of these. It may count in at one and out at
    /// another; only the sums mean anything.
    requests: [Padded<Counter>; STRIPES],
    connections: Padded<Counter>,
    guards: Padded<Counter>,
    listeners: Padded<Counter>,
}

/// The bits of the phase.
const PHASE: usize = 7;
/// In the place of a phase: nobody has a handle any more.
const ABANDONED: usize = 7;

#[derive(Debug)]
struct Counter {
    begun: AtomicUsize,
    ended: AtomicUsize,
}

impl Counter {
    fn new() -> Padded<Self> {
        Padded(Self {
            begun: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
        })
    }
}

/// The sum of these as they are now, for who decides by it.
fn sum<'a>(counts: impl Iterator<Item = &'a AtomicUsize>) -> usize {
    counts
        .map(|count| count.fetch_add(0, AcqRel))
        .fold(0, usize::wrapping_add)
}

const fn phase(word: usize) -> Phase {
    #[expect(clippy::cast_possible_truncation, reason = "three bits")]
    Phase::from_u8((word & PHASE) as u8)
}

impl Ledger {
    pub(crate) fn new() -> Self {
        Self {
            word: Padded(AtomicUsize::new(Phase::Serving as usize)),
            requests: std::array::from_fn(|_| Counter::new()),
            connections: Counter::new(),
            guards: Counter::new(),
            listeners: Counter::new(),
        }
    }

    fn counters(&self, kind: Kind) -> &[Padded<Counter>] {
        match kind {
            Kind::Request => &self.requests,
            Kind::Connection => std::slice::from_ref(&self.connections),
            Kind::Guard => std::slice::from_ref(&self.guards),
            Kind::Listener => std::slice::from_ref(&self.listeners),
        }
    }

    fn counter(&self, kind: Kind, stripe: impl FnOnce() -> usize) -> &Counter {
        match kind {
            Kind::Request => &self.requests[stripe() % STRIPES],
            Kind::Connection => &self.connections,
            Kind::Guard => &self.guards,
            Kind::Listener => &self.listeners,
        }
    }

    /// Counts one in, and tells the phase that it came in.
    #[inline]
    pub(crate) fn enter(&self, kind: Kind) -> Phase {
        self.enter_at(kind, stripe)
    }

    #[inline]
    fn enter_at(&self, kind: Kind, stripe: impl FnOnce() -> usize) -> Phase {
        self.counter(kind, stripe).begun.fetch_add(1, AcqRel);
        self.phase()
    }

    /// Counts one out.
    #[inline]
    #[must_use]
    pub(crate) fn leave(&self, kind: Kind) -> Left {
        self.leave_at(kind, stripe)
    }

    #[inline]
    fn leave_at(&self, kind: Kind, stripe: impl FnOnce() -> usize) -> Left {
        self.counter(kind, stripe).ended.fetch_add(1, AcqRel);
        match self.word.load(Acquire) {
            word if word & PHASE == Phase::Serving as usize => Left::Others,
            word => self.left(kind, word),
        }
    }

    #[cold]
    fn left(&self, kind: Kind, word: usize) -> Left {
        if word & PHASE == ABANDONED {
            return match self.free(word) {
                true => Left::Free,
                false => Left::Others,
            };
        }
        match self.is_idle_of(kind) {
            true => Left::Emptied,
            false => Left::Others,
        }
    }

    /// Says that nobody comes any more. Whether nobody is there, and the ledger
    /// is the caller's: as good as new.
    #[must_use]
    pub(crate) fn abandon(&self) -> bool {
        let word = self.word.fetch_or(ABANDONED, AcqRel) | ABANDONED;
        self.free(word)
    }

    /// Of those who find nobody there, one ends this life; who comes late and
    /// still thinks of an earlier one does not end the next.
    fn free(&self, word: usize) -> bool {
        let next = (word | PHASE).wrapping_add(1);
        self.is_idle()
            && self
                .word
                .compare_exchange(word, next, AcqRel, Relaxed)
                .is_ok()
    }

    /// For decisions that may come a moment late.
    #[inline]
    pub(crate) fn glance(&self) -> Phase {
        phase(self.word.load(Relaxed))
    }

    #[inline]
    pub(crate) fn phase(&self) -> Phase {
        phase(self.word.load(Acquire))
    }

    /// Goes forward to this phase, and tells which it was.
    pub(crate) fn advance(&self, to: Phase) -> Phase {
        let life = self.word.load(Relaxed) & !PHASE;
        phase(self.word.fetch_max(life | to as usize, AcqRel))
    }

    /// How many there are of a kind; of a moment in the past. To tell, not to
    /// decide by.
    pub(crate) fn open(&self, kind: Kind) -> usize {
        let counters = self.counters(kind);
        let sum = |of: fn(&Counter) -> &AtomicUsize| {
            let counts = counters.iter().map(|counter| of(counter).load(Acquire));
            counts.fold(0, usize::wrapping_add)
        };
        let ended = sum(|counter| &counter.ended);
        sum(|counter| &counter.begun).wrapping_sub(ended)
    }

    /// Whether there was a moment, during this call, with nobody of this kind.
    pub(crate) fn is_idle_of(&self, kind: Kind) -> bool {
        let counters = self.counters(kind);
        let ended = sum(counters.iter().map(|counter| &counter.ended));
        ended == sum(counters.iter().map(|counter| &counter.begun))
    }

    /// Whether there was a moment, during this call, with nobody of any kind.
    pub(crate) fn is_idle(&self) -> bool {
        let all = || {
            let others = [&self.connections, &self.guards, &self.listeners];
            self.requests.iter().chain(others)
        };
        let ended = sum(all().map(|counter| &counter.ended));
        ended == sum(all().map(|counter| &counter.begun))
    }
}

#[cfg(all(test, buttress_loom))]
mod loom_tests;
#[cfg(all(test, not(buttress_loom)))]
mod tests;
