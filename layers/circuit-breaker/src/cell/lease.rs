//! Cells pass from one breaker to the next.

use std::{mem, sync::Arc};

use buttress_core::{clock::Instant, random::SharedRandom};

use super::{Cell, NEVER, Observer};
use crate::{Cause, State, settings::Plan};

/// A cell, for as long as it is one breaker's.
#[derive(Clone, Copy)]
pub(crate) struct Lease {
    pub(crate) cell: &'static Cell,
    tenancy: u32,
}

impl Lease {
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

    pub(crate) fn name(self) -> Option<Arc<str>> {
        let cold = self.cell.lock();
        let observer = cold.observer.as_ref()?;
        (cold.tenancy == self.tenancy).then(|| Arc::clone(&observer.name))
    }
}

impl Cell {
    /// Which of its owners this one is.
    pub(super) fn move_in(
        &self,
        observer: Arc<Observer>,
        plan: Plan,
        random: SharedRandom,
        now: Instant,
    ) -> u32 {
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

    pub(super) fn move_out(&self) {
        let unused = SharedRandom::default();
        let mut cold = self.lock();
        cold.tenancy = cold.tenancy.wrapping_add(1);
        let next = self.word().next(State::ForcedClosed);
        let now = cold.since;
        let mut news = self.publish(&mut cold, next, NEVER, now, Cause::Manual, None);
        news.event = None;
        let observer = cold.observer.take();
        let random = mem::replace(&mut cold.random, unused);
        drop(cold);
        // Listeners and generators are the user's: their drop does not run
        // under the lock.
        drop((observer, random));
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
