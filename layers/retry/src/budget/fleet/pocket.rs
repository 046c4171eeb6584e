//! What one process may spend without asking anybody, and what it tells the
//! others of it.
//!
//! Requests pay in, retries are paid out; every so often what is more than this
//! process needs goes to the pool, and what it lacks comes from there. Nothing
//! is ever in two places: what goes is taken out before it is sent, and what
//! comes is put in when it is there. A message that is lost takes with it what
//! it carried, and no more.

use buttress_core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::super::percent::{RETRY, Rates, bound};

/// In thousandths of a retry, as the balance of a
/// [`RetryBudget`](super::super::RetryBudget).
#[derive(Debug)]
pub(super) struct Pocket {
    balance: AtomicU64,
    /// Requests pay in up to here.
    ceiling: AtomicU64,
    given: AtomicU64,
    refused: AtomicU64,
}

/// What the one who tells remembers from one time to the next.
#[derive(Debug)]
pub(super) struct Ledger {
    /// Retries that were asked for, as of the last time.
    asked: u64,
    target: u64,
    pub(super) processes: u64,
}

/// What is told, in thousandths of a retry: one of the two is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Report {
    /// Taken out already.
    pub(super) offered: u64,
    pub(super) wanted: u64,
}

/// What comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) granted: u64,
    /// The pool saves up no more.
    pub(super) full: bool,
    pub(super) processes: u64,
}

impl Pocket {
    pub(super) fn new(saved: u32) -> Self {
        Self {
            balance: AtomicU64::new(0),
            ceiling: AtomicU64::new(bound(saved)),
            given: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    #[inline]
    pub(super) fn request(&self, deposit: u64) {
        // Nothing is written while nobody needs more: as a rule, while all is
        // well.
        if deposit > 0 && self.balance.load(Relaxed) < self.ceiling.load(Relaxed) {
            self.balance.fetch_add(deposit, Relaxed);
        }
    }

    pub(super) fn withdraw(&self) -> bool {
        let next = |balance: u64| balance.checked_sub(RETRY);
        let given = self.balance.fetch_update(Relaxed, Relaxed, next).is_ok();
        let count = if given { &self.given } else { &self.refused };
        count.fetch_add(1, Relaxed);
        given
    }

    pub(super) fn balance(&self) -> u64 {
        self.balance.load(Relaxed)
    }

    fn asked(&self) -> u64 {
        let given = self.given.load(Relaxed);
        given.wrapping_add(self.refused.load(Relaxed))
    }

    pub(super) fn ledger(&self) -> Ledger {
        Ledger {
            asked: self.asked(),
            target: RETRY,
            processes: 0,
        }
    }

    /// What this process needs is what was asked of it since the last time;
    /// where that is nothing, its part of half a second's minimum, but one
    /// retry at least: the first that fails is not to wait for a trip.
    pub(super) fn report(&self, ledger: &mut Ledger, rates: Rates) -> Report {
        let asked = self.asked();
        let wanted = asked.wrapping_sub(ledger.asked).saturating_mul(RETRY);
        ledger.asked = asked;
        let half = u64::from(rates.per_second) * RETRY / 2;
        let quiet = half / ledger.processes.max(1);
        let target = wanted.max(quiet).max(RETRY);
        ledger.target = target;
        let before = self
            .balance
            .fetch_update(Relaxed, Relaxed, |balance| Some(balance.min(target)))
            .unwrap_or_default();
        Report {
            offered: before.saturating_sub(target),
            wanted: target.saturating_sub(before),
        }
    }

    pub(super) fn receive(&self, ledger: &mut Ledger, answer: Answer, saved: u32) {
        self.put(answer.granted);
        ledger.processes = answer.processes;
        let ceiling = match answer.full {
            true => ledger.target,
            false => bound(saved).max(ledger.target),
        };
        self.ceiling.store(ceiling, Relaxed);
    }

    /// What was to go and has not gone.
    pub(super) fn put(&self, thousandths: u64) {
        if thousandths > 0 {
            self.balance.fetch_add(thousandths, Relaxed);
        }
    }

    /// Without the others there is nobody else to save up.
    pub(super) fn save(&self, saved: u32, parts: u64) {
        let ceiling = (bound(saved) / parts.max(1)).max(RETRY);
        self.ceiling.store(ceiling, Relaxed);
    }
}
