//! The timer that only a call that waits has.

use std::{
    future::Future,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use buttress_core::{clock, deadline::Deadline};
use pin_project_lite::pin_project;
use tokio::{
    task::unconstrained,
    time::{Sleep, sleep},
};

pin_project! {
    /// Made at the first poll, which is when there is something to wait for.
    #[derive(Debug)]
    pub(crate) struct Timer {
        #[pin]
        sleep: Option<Sleep>,
    }
}

impl Timer {
    pub(crate) const fn new() -> Self {
        Self { sleep: None }
    }

    /// Ready when `deadline` is past.
    pub(crate) fn poll(self: Pin<&mut Self>, deadline: Deadline, cx: &mut Context<'_>) -> Poll<()> {
        let mut sleep = self.project().sleep;
        loop {
            if let Some(sleep) = sleep.as_mut().as_pin_mut() {
                // A call that uses up its task's budget whenever it is polled
                // would keep a constrained timer from ever being asked.
                ready!(pin!(unconstrained(sleep)).poll(cx));
            }
            // What tokio's clock holds to be over need not be so on ours, and
            // it waits some decades at most.
            let left = deadline.remaining(clock::now());
            if left.is_zero() {
                return Poll::Ready(());
            }
            sleep.set(Some(self::sleep(left)));
        }
    }

    /// Leaves the runtime's list of timers.
    #[inline]
    pub(crate) fn stop(self: Pin<&mut Self>) {
        let mut sleep = self.project().sleep;
        if sleep.is_some() {
            sleep.set(None);
        }
    }
}
