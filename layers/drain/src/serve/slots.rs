//! How many connections of a listener there are.

use std::{
    sync::{
        Arc,
        atomic::{
            AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    task::{Context, Poll, Waker},
};

use buttress_core::sync::Mutex;

/// The places of a listener. One task at a time waits for one to be free, or
/// for all.
#[derive(Debug)]
pub(crate) struct Slots {
    max: usize,
    open: AtomicUsize,
    /// Of these, those that have sent nothing yet, where that is counted.
    fresh: AtomicUsize,
    waiter: Mutex<Option<Waker>>,
}

/// A place that is taken, until it is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Arc<Slots>,
    fresh: bool,
}

impl Slots {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max,
            open: AtomicUsize::new(0),
            fresh: AtomicUsize::new(0),
            waiter: Mutex::default(),
        })
    }

    /// Takes one, whether there is room or not.
    pub(crate) fn take(self: &Arc<Self>) -> Slot {
        self.open.fetch_add(1, AcqRel);
        self.fresh.fetch_add(1, Relaxed);
        Slot {
            slots: Arc::clone(self),
            fresh: true,
        }
    }

    #[cfg(any(test, feature = "axum", feature = "tonic"))]
    pub(crate) fn fresh(&self) -> usize {
        self.fresh.load(Relaxed)
    }

    pub(crate) fn poll_room(&self, cx: &Context<'_>) -> Poll<()> {
        self.poll(cx, |open| open < self.max)
    }

    pub(crate) fn poll_empty(&self, cx: &Context<'_>) -> Poll<()> {
        self.poll(cx, |open| open == 0)
    }

    fn poll(&self, cx: &Context<'_>, ready: impl Fn(usize) -> bool) -> Poll<()> {
        if ready(self.open.load(Acquire)) {
            return Poll::Ready(());
        }
        let old = self.waiter.lock().replace(cx.waker().clone());
        drop(old);
        // Whoever left before the waker was there is seen now.
        match ready(self.open.load(Acquire)) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }
}

impl Slot {
    /// Its connection has sent something.
    pub(crate) fn stirs(&mut self) {
        if self.fresh {
            self.fresh = false;
            self.slots.fresh.fetch_sub(1, Relaxed);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.stirs();
        let open = self.slots.open.fetch_sub(1, AcqRel);
        // Where nobody can be waiting there is no lock to take.
        if open == self.slots.max || open == 1 {
            let waiter = self.slots.waiter.lock().take();
            if let Some(waiter) = waiter {
                waiter.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    #[test]
    fn room_and_emptiness_are_waited_for() {
        let slots = Slots::new(2);
        let mut room = task::spawn(std::future::poll_fn(|cx| slots.poll_room(cx)));
        assert_ready!(room.poll());
        let [mut a, b, c] = [slots.take(), slots.take(), slots.take()];
        assert_pending!(room.poll());
        drop(a);
        assert!(!room.is_woken(), "there was one beyond the limit");
        drop(b);
        assert!(room.is_woken());
        assert_ready!(room.poll());

        let mut empty = task::spawn(std::future::poll_fn(|cx| slots.poll_empty(cx)));
        assert_pending!(empty.poll());
        assert_eq!(slots.fresh(), 1);
        a = slots.take();
        a.stirs();
        a.stirs();
        assert_eq!(slots.fresh(), 1);
        drop(c);
        assert_eq!(slots.fresh(), 0);
        assert_pending!(empty.poll());
        drop(a);
        assert!(empty.is_woken());
        assert_ready!(empty.poll());
    }
}
