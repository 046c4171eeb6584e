//! Waiting for a change.

use std::{mem, task::Waker};

use super::Cell;

impl Cell {
    /// Has `waker` woken at the next change, or when a probe's place is free.
    /// Look at the [`outlook`](Self::outlook) again after this.
    pub(crate) fn wait(&self, id: u64, waker: &Waker) {
        // Wakers are cloned and dropped outside of the lock: a task may be
        // dropped with its waker, and this breaker with the task.
        let new = waker.clone();
        let mut cold = self.lock();
        let known = cold.waiters.iter_mut().find(|(other, _)| *other == id);
        let old = if let Some((_, old)) = known {
            Some(mem::replace(old, new))
        } else {
            cold.waiters.push((id, new));
            None
        };
        self.set_waited_for(true);
        drop(cold);
        drop(old);
    }

    pub(crate) fn stop_waiting(&self, id: u64) {
        let mut cold = self.lock();
        let gone = cold
            .waiters
            .iter()
            .position(|(other, _)| *other == id)
            .map(|index| cold.waiters.swap_remove(index));
        drop(cold);
        drop(gone);
    }

    /// Under the lock.
    fn set_waited_for(&self, waited_for: bool) {
        loop {
            let word = self.word();
            if word.is_waited_for() == waited_for || self.swap(word, word.with_waiters(waited_for))
            {
                return;
            }
        }
    }

    /// A place is free.
    #[cold]
    pub(super) fn wake(&self, generation: u32) {
        let mut cold = self.lock();
        if self.word().generation() != generation {
            // Then that change has woken them.
            return;
        }
        self.set_waited_for(false);
        let wakers = mem::take(&mut cold.waiters);
        drop(cold);
        for (_, waker) in wakers {
            waker.wake();
        }
    }
}
