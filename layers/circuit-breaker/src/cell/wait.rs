//! Waiting for a change.

use std::mem;
#[cfg(any(feature = "back-pressure", all(test, buttress_loom)))]
use std::task::Waker;

use super::Cell;

impl Cell {
    /// Has `waker` woken at the next change, or when a probe's place is free.
    /// Look at the [`outlook`](Self::outlook) again after this.
    #[cfg(any(feature = "back-pressure", all(test, buttress_loom)))]
    pub(crate) fn wait(&self, id: u64, waker: &Waker) {
        // Wakers are cloned and dropped outside of the lock: a task may be
        // dropped with its waker, and this breaker with the task.
        let new = waker.clone();
        let mut cold = self.lock();
        let old = cold.waiters.insert(id, new);
        self.set_waited_for(true);
        drop(cold);
        drop(old);
    }

    #[cfg(any(feature = "back-pressure", all(test, buttress_loom)))]
    pub(crate) fn stop_waiting(&self, id: u64) {
        let mut cold = self.lock();
        let gone = cold.waiters.remove(&id);
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
        for waker in wakers.into_values() {
            waker.wake();
        }
    }
}
