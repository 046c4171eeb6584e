//! The gate before the server: three failures in a row shut it.
//!
//! One word, read once an operation. A result counts only in the generation in
//! which its operation began: what was sent before the gate shut and fails
//! after it has opened again says nothing of the server that is back.

use buttress_core::sync::atomic::{AtomicU64, Ordering};

/// How many outages in a row shut it.
const LIMIT: u64 = 3;

const FAILURES: u64 = 0xff;
const SHUT: u64 = 1 << 8;
const GENERATION: u64 = 1 << 32;

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
        let word = self.0.load(Ordering::Relaxed);
        if word & FAILURES != 0 {
            self.change(ticket, |word| word & !FAILURES);
        }
    }

    /// It has not. Whether that has shut the gate.
    #[cold]
    pub(crate) fn failed(&self, ticket: Ticket) -> bool {
        self.change(ticket, |word| {
            let word = word + 1;
            if word & FAILURES >= LIMIT {
                word | SHUT
            } else {
                word
            }
        })
        .is_some_and(|word| word & SHUT != 0)
    }

    /// Shuts it at once. Whether it was open.
    pub(crate) fn shut(&self) -> bool {
        self.0.fetch_or(SHUT, Ordering::AcqRel) & SHUT == 0
    }

    /// Opens it for a new generation. Whether it was shut.
    pub(crate) fn open(&self) -> bool {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            let next = u64::from(generation(word).wrapping_add(1)) * GENERATION;
            match self
                .0
                .compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(word) => return word & SHUT != 0,
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
