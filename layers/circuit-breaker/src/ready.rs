//! Back-pressure: not ready while the breaker would refuse.

use std::{
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
};

use buttress_core::clock;
use tokio::time::{Sleep, sleep};

use crate::{Breaker, State, cell::Outlook};

/// One service's wait for its breaker; nothing as long as it passes.
#[derive(Default)]
pub(crate) struct Gate(Option<Box<Waiting>>);

struct Waiting {
    breaker: Breaker,
    id: u64,
    /// Until the breaker is due.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Gate {
    /// Ready when a call would pass. Otherwise the task is woken at every
    /// change of the breaker, and when it is due.
    #[inline]
    pub(crate) fn poll(&mut self, breaker: &Breaker, cx: &mut Context<'_>) -> Poll<()> {
        match breaker.state() {
            // No clock is read where there is nothing to wait for.
            State::Closed | State::MetricsOnly | State::ForcedClosed => {
                self.0 = None;
                Poll::Ready(())
            }
            State::Open | State::HalfOpen | State::ForcedOpen => self.poll_open(breaker, cx),
        }
    }

    #[cold]
    fn poll_open(&mut self, breaker: &Breaker, cx: &mut Context<'_>) -> Poll<()> {
        let cell = breaker.lease().cell;
        if cell.outlook(clock::now()) == Outlook::Passes {
            self.0 = None;
            return Poll::Ready(());
        }
        let waiting = self
            .0
            .get_or_insert_with(|| Box::new(Waiting::new(breaker)));
        cell.wait(waiting.id, cx.waker());
        loop {
            // Looked at again, for what changed before the waker was there
            // wakes nobody.
            let now = clock::now();
            let due = match cell.outlook(now) {
                Outlook::Passes => break,
                Outlook::Waits(None) => {
                    waiting.timer = None;
                    return Poll::Pending;
                }
                Outlook::Waits(Some(due)) => due,
            };
            // Anew each time: it may be due at another time than before.
            let mut timer = Box::pin(sleep(due - now));
            let pending = timer.as_mut().poll(cx).is_pending();
            waiting.timer = Some(timer);
            if pending {
                return Poll::Pending;
            }
        }
        self.0 = None;
        Poll::Ready(())
    }
}

impl Waiting {
    fn new(breaker: &Breaker) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            breaker: breaker.clone(),
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            timer: None,
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.breaker.lease().cell.stop_waiting(self.id);
    }
}
