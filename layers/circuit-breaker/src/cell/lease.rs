//! Cells pass from one breaker to the next.

use std::{mem, sync::Arc};

use buttress_core::{
    clock::{self, Instant},
    random::SharedRandom,
};

use super::{Cell, NEVER, Observer, Rejection, Ticket};
use crate::{Cause, CircuitOpen, Event, Permit, State, settings::Plan, word::Word};

/// A cell, for as long as it is one breaker's.
#[derive(Clone, Copy)]
pub(crate) struct Lease {
    pub(crate) cell: &'static Cell,
    tenancy: u64,
}

/// What can be said of a call at once.
pub(crate) enum AtOnce {
    Passes(Permit),
    Refused(CircuitOpen),
    Unclear,
}

impl Lease {
    /// What is nearly always the answer, apart from the rest: so that it stays
    /// in registers, and need not go where a call writes its own. What is
    /// handed over in memory is copied in other sizes than it was written in,
    /// and the processor waits for each of these copies longer than for all
    /// else together.
    #[inline(always)]
    pub(crate) fn at_once(self) -> AtOnce {
        let word = self.cell.word();
        if word.is_plain() {
            return AtOnce::Passes(Permit::plain(self.cell, Ticket::of(word)));
        }
        match self.cell.refuse(word, clock::recent) {
            Some(rejection) => AtOnce::Refused(CircuitOpen::of(self, rejection)),
            None => AtOnce::Unclear,
        }
    }

    /// The same, where what is refused is to be told the time to the second.
    #[inline(always)]
    pub(crate) fn passes_at_once(self) -> Option<Permit> {
        let word = self.cell.word();
        word.is_plain()
            .then(|| Permit::plain(self.cell, Ticket::of(word)))
    }

    /// A closed cell of one's own, to be [given back](Self::give_back).
    pub(crate) fn take(
        observer: Arc<Observer>,
        plan: Plan,
        random: SharedRandom,
        now: Instant,
    ) -> Self {
        let cell = pool::take();
        let tenancy = cell.move_in(observer, plan, random, now);
        Self { cell, tenancy }
    }

    /// Gives the cell back. Calls in flight will find another generation.
    pub(crate) fn give_back(self) {
        self.cell.move_out();
        pool::give_back(self.cell);
    }

    /// With the lease's mark.
    #[inline]
    pub(crate) const fn mark(self, rejection: Rejection) -> Rejection {
        rejection.by(self.tenancy)
    }
}

impl Cell {
    /// Who said no, if it is still the cell's owner.
    pub(crate) fn name_of(&self, rejection: Rejection) -> Option<Arc<str>> {
        let cold = self.lock();
        let observer = cold.observer.as_ref()?;
        rejection
            .is_by(cold.tenancy)
            .then(|| Arc::clone(&observer.name))
    }

    /// Which of its owners this one is.
    pub(super) fn move_in(
        &self,
        observer: Arc<Observer>,
        plan: Plan,
        random: SharedRandom,
        now: Instant,
    ) -> u64 {
        let mut cold = self.lock();
        cold.observer = Some(observer);
        let unused = mem::replace(&mut cold.random, random);
        cold.since = now;
        cold.level = 0;
        let tenancy = cold.tenancy;
        let next = self.settle(&mut cold, plan, self.word().next(State::Closed));
        let news = self.publish(&mut cold, next, NEVER, now, Cause::Manual, None);
        drop(cold);
        drop(unused);
        // A change to closed that nobody need hear of: it begins.
        drop(news);
        tenancy
    }

    /// Ends the cell's generation, so that it may be given back and nothing is
    /// lost: only when it is closed, with no failure and no slow call counted
    /// and no opening remembered; or `stale`, when these may be forgotten.
    /// Whether it has. What comes later finds another generation, so that what
    /// has been retired never opens.
    pub(crate) fn retire(&self, now: Instant, stale: bool) -> bool {
        let blank = |word: Word| word.state() == State::Closed && (stale || word.in_a_row() == 0);
        if !blank(self.word()) {
            return false;
        }
        // Nothing opens under the lock.
        let cold = self.lock();
        loop {
            let word = self.word();
            if !blank(word) {
                return false;
            }
            if !stale {
                let sums = self.sums(word, || now);
                let level = cold.plan.as_ref().map_or(0, |plan| {
                    let healthy = now - cold.since;
                    let backoff = &plan.backoff;
                    backoff.decayed(cold.level, healthy, plan.reset_timeout)
                });
                if sums.failed > 0 || sums.slow > 0 || level > 0 {
                    return false;
                }
            }
            if self.swap(word, word.next(State::Closed)) {
                return true;
            }
        }
    }

    pub(super) fn move_out(&self) {
        let unused = SharedRandom::default();
        let mut cold = self.lock();
        cold.tenancy = cold.tenancy.wrapping_add(1);
        let next = self.word().next(State::ForcedClosed);
        let now = cold.since;
        let mut news = self.publish(&mut cold, next, NEVER, now, Cause::Manual, None);
        let last = news.event.take();
        let observer = cold.observer.take();
        let follower = cold.follower.take();
        let random = mem::replace(&mut cold.random, unused);
        drop(cold);
        if let (Some(observer), Some(Event::StateChange(last))) = (&observer, last) {
            observer.metrics.gone(last.from);
        }
        // Listeners and generators are the user's: their drop does not run
        // under the lock.
        drop((observer, random, follower));
        self.tell(news);
    }
}

/// Cells that are nobody's. There are never more than there were breakers at
/// one time.
#[cfg(not(buttress_loom))]
mod pool {
    use std::sync::{Mutex, PoisonError};

    use super::Cell;

    static FREE: Mutex<Vec<&'static Cell>> = Mutex::new(Vec::new());

    pub(super) fn take() -> &'static Cell {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| Box::leak(Box::new(Cell::new())))
    }

    pub(super) fn give_back(cell: &'static Cell) {
        FREE.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(cell);
    }
}

/// A model's cells must not outlive it.
#[cfg(buttress_loom)]
mod pool {
    use super::Cell;

    pub(super) fn take() -> &'static Cell {
        Box::leak(Box::new(Cell::new()))
    }

    pub(super) fn give_back(_: &'static Cell) {}
}
