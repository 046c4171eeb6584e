//! The gate before the server: three failures in a row shut it.
//!
//! One word, read once an operation. A result counts only in the generation in
//! which its operation began: what was sent before the gate shut and fails
//! after it has opened again says nothing of the server that is back.
//!
//! A server may let probes pass and deny what is asked of it. Where the gate
//! was opened and nothing has passed before it was shut for that once more, the
//! next probe comes later, each time twice as late, up to five seconds. What
//! passes ends that, and so does an outage of any other kind, which is to be
//! over as soon as the server is back.

use buttress_core::sync::atomic::{AtomicU64, Ordering};

/// How many outages in a row shut it.
const LIMIT: u64 = 3;

const FAILURES: u64 = 0xff;
const SHUT: u64 = 1 << 8;
/// Nothing has passed since a probe opened it.
const UNPROVEN: u64 = 1 << 9;
/// How often in a row it was opened for nothing.
const LEVEL: u64 = 1 << 16;
const LEVELS: u64 = 0xf << 16;
/// How many probes are left out before the next.
const SKIP: u64 = 1 << 24;
const SKIPS: u64 = 0xff << 24;
const GENERATION: u64 = 1 << 32;

/// Of so many probes one is made at least: one in five seconds.
const FEWEST: u64 = 25;

/// Open, or shut, or about to be.
#[derive(Debug, Default)]
pub(crate) struct Gate(AtomicU64);

/// The right to tell the gate what became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u32);

impl Gate {
    /// Lets an operation through, or not.
    #[inline]
    pub(crate) fn pass(&self) -> Option<Ticket> {
        let word = self.0.load(Ordering::Acquire);
        (word & SHUT == 0).then(|| Ticket(generation(word)))
    }

    pub(crate) fn is_open(&self) -> bool {
        self.0.load(Ordering::Acquire) & SHUT == 0
    }

    /// The server has answered.
    #[inline]
    pub(crate) fn answered(&self, ticket: Ticket) {
        const FAULTS: u64 = FAILURES | UNPROVEN | LEVELS;
        let word = self.0.load(Ordering::Relaxed);
        if word & FAULTS != 0 {
            self.change(ticket, |word| word & !FAULTS);
        }
    }

    /// It has, but to nobody who wanted something of it.
    pub(crate) fn is_alive(&self, ticket: Ticket) {
        let word = self.0.load(Ordering::Relaxed);
        if word & FAILURES != 0 {
            self.change(ticket, |word| word & !FAILURES);
        }
    }

    /// It has not. Whether that has shut the gate.
    #[cold]
    pub(crate) fn failed(&self, ticket: Ticket) -> bool {
        self.count(ticket, |_| 0)
    }

    /// It is there, and has denied what was asked. Whether that has shut the
    /// gate.
    #[cold]
    pub(crate) fn denied(&self, ticket: Ticket) -> bool {
        self.count(ticket, |word| {
            let level = match word & UNPROVEN {
                0 => 0,
                _ => ((word & LEVELS) / LEVEL + 1).min(LEVELS / LEVEL),
            };
            let turn = FEWEST.min(1 << level);
            (level * LEVEL) | ((turn - 1) * SKIP)
        })
    }

    /// Counts a failure. Whether that has shut the gate; then with the level
    /// and the probes to be left out.
    fn count(&self, ticket: Ticket, rest: impl Fn(u64) -> u64) -> bool {
        self.change(ticket, |word| {
            let next = word + 1;
            if next & FAILURES >= LIMIT {
                next & !(LEVELS | SKIPS) | SHUT | rest(word)
            } else {
                next
            }
        })
        .is_some_and(|word| word & SHUT != 0)
    }

    /// Whether it is to be probed, this time: asked each time.
    pub(crate) fn is_due(&self) -> bool {
        let less = |word: u64| (word & SKIPS != 0).then(|| word - SKIP);
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, less)
            .is_err()
    }

    /// Whether it is not to be probed for a while.
    pub(crate) fn rests(&self) -> bool {
        self.0.load(Ordering::Acquire) & SKIPS != 0
    }

    /// Shuts it at once. Whether it was open.
    pub(crate) fn shut(&self) -> bool {
        let word = self.update(|word| word & !(LEVELS | SKIPS) | SHUT);
        word & SHUT == 0
    }

    /// Opens it for a new generation. Whether it was shut.
    pub(crate) fn open(&self) -> bool {
        let word = self.update(|word| {
            let next = u64::from(generation(word).wrapping_add(1)) * GENERATION;
            next | UNPROVEN | word & LEVELS
        });
        word & SHUT != 0
    }

    /// The word before the change.
    fn update(&self, change: impl Fn(u64) -> u64) -> u64 {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            match self.0.compare_exchange_weak(
                word,
                change(word),
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(word) => return word,
                Err(now) => word = now,
            }
        }
    }

    /// The word after the change, where there was one: the gate is open, and of
    /// the ticket's generation.
    fn change(&self, ticket: Ticket, change: impl Fn(u64) -> u64) -> Option<u64> {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            if word & SHUT != 0 || generation(word) != ticket.0 {
                return None;
            }
            let next = change(word);
            match self
                .0
                .compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return Some(next),
                Err(now) => word = now,
            }
        }
    }
}

const fn generation(word: u64) -> u32 {
    (word >> 32) as u32
}

#[cfg(all(test, buttress_loom))]
mod loom_tests;

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;

    #[test]
    fn three_in_a_row_shut_it() {
        let gate = Gate::default();
        let ticket = gate.pass().unwrap();
        assert!(!gate.failed(ticket));
        assert!(!gate.failed(ticket));
        gate.answered(ticket);
        assert!(!gate.failed(ticket));
        assert!(!gate.failed(ticket));
        assert!(gate.pass().is_some());
        assert!(gate.failed(ticket), "the one that shuts it is told");
        assert!(!gate.failed(ticket), "and no other");
        assert!(gate.pass().is_none());
        assert!(gate.open());
        assert!(gate.pass().is_some());
    }

    /// How many probes are left out, each time that it is denied three times.
    fn skipped(gate: &Gate, times: usize) -> Vec<usize> {
        (0..times)
            .map(|_| {
                let ticket = gate.pass().unwrap();
                assert!((0..3).any(|_| gate.denied(ticket)));
                let skipped = (0..100).take_while(|_| !gate.is_due()).count();
                gate.open();
                skipped
            })
            .collect()
    }

    #[test]
    fn opened_for_nothing_it_is_probed_less_and_less() {
        let gate = Gate::default();
        assert!(gate.is_due());
        assert_eq!(skipped(&gate, 7), [0, 1, 3, 7, 15, 24, 24]);
        assert_eq!(skipped(&gate, 40), [24; 40]);
        // A sign of life is nothing that has passed.
        gate.is_alive(gate.pass().unwrap());
        assert_eq!(skipped(&gate, 1), [24]);
        gate.answered(gate.pass().unwrap());
        assert_eq!(skipped(&gate, 3), [0, 1, 3]);
        // An outage of another kind is looked for as ever, at once and later.
        let ticket = gate.pass().unwrap();
        assert!((0..3).any(|_| gate.failed(ticket)));
        assert!(gate.is_due());
        gate.open();
        assert_eq!(skipped(&gate, 2), [1, 3]);
        let ticket = gate.pass().unwrap();
        assert!((0..3).any(|_| gate.denied(ticket)));
        assert!(!gate.is_due());
        assert!(!gate.shut(), "it was");
        assert!(gate.is_due());
    }

    #[test]
    fn what_began_before_says_nothing_after() {
        let gate = Gate::default();
        let before = gate.pass().unwrap();
        assert!(gate.shut());
        assert!(!gate.shut());
        gate.open();
        for _ in 0..10 {
            gate.failed(before);
        }
        let ticket = gate.pass().expect("still open");
        gate.failed(ticket);
        gate.failed(ticket);
        gate.answered(before);
        assert!(gate.failed(ticket), "an old answer clears nothing");
    }
}
