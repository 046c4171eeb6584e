//! Being woken at a time or at a phase, whichever a connection waits for, at no
//! cost for each read.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use buttress_core::clock::{self, Instant};
use pin_project_lite::pin_project;
use tokio::time::{Instant as TokioInstant, Sleep, sleep_until};

use crate::{Phase, Reached, shutdown::Inner};

pin_project! {
    /// [`Reached`], which takes a lock at each poll: this one polls it once for
    /// each task that waits.
    #[derive(Debug)]
    pub(crate) struct Told {
        #[pin]
        reached: Reached,
        waker: Option<Waker>,
    }
}

impl Told {
    pub(crate) const fn new(reached: Reached) -> Self {
        Self {
            reached,
            waker: None,
        }
    }
}

impl Future for Told {
    type Output = ();

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        if this.reached.is_reached() {
            return Poll::Ready(());
        }
        if this.waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        *this.waker = Some(cx.waker().clone());
        this.reached.poll(cx)
    }
}

pin_project! {
    /// One timer and one phase for all that a connection waits for. The timer
    /// is set when it would be too late; where it is too early it stays as it
    /// is, and who is woken looks again.
    #[derive(Debug)]
    pub(crate) struct Watch {
        #[pin]
        sleep: Option<Sleep>,
        // When it fires.
        armed: Instant,
        waker: Option<Waker>,
        #[pin]
        told: Option<Told>,
        phase: Phase,
    }
}

impl Watch {
    pub(crate) const fn new() -> Self {
        Self {
            sleep: None,
            armed: Instant::from_nanos(0),
            waker: None,
            told: None,
            phase: Phase::Serving,
        }
    }

    #[cfg(test)]
    pub(crate) fn armed(&self) -> Instant {
        self.armed
    }

    /// Whether the timer has fired.
    pub(crate) fn is_due(&self) -> bool {
        self.sleep.as_ref().is_some_and(Sleep::is_elapsed)
    }

    /// Pending, and the task is woken when it is due; ready if it may be so by
    /// now.
    pub(crate) fn poll_due(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        due: Instant,
    ) -> Poll<()> {
        let mut this = self.as_mut().project();
        let known = this.waker.as_ref().is_some_and(|w| w.will_wake(cx.waker()));
        let set = this.sleep.as_ref().as_pin_ref();
        match set.is_some_and(|sleep| !sleep.is_elapsed()) && *this.armed <= due {
            true if known => return Poll::Pending,
            true => {}
            false => {
                let at = TokioInstant::now() + (due - clock::now());
                match this.sleep.as_mut().as_pin_mut() {
                    Some(sleep) => sleep.reset(at),
                    None => this.sleep.set(Some(sleep_until(at))),
                }
                *this.armed = due;
            }
        }
        if !known {
            *this.waker = Some(cx.waker().clone());
        }
        match this.sleep.as_mut().as_pin_mut() {
            Some(sleep) => sleep.poll(cx),
            None => Poll::Pending,
        }
    }

    /// Pending, and the task is woken at this phase; ready if it is reached.
    pub(crate) fn poll_phase(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        shutdown: &Arc<Inner>,
        phase: Phase,
    ) -> Poll<()> {
        let mut this = self.as_mut().project();
        if this.told.is_none() || *this.phase != phase {
            let reached = Reached::new(Arc::clone(shutdown), phase);
            this.told.set(Some(Told::new(reached)));
            *this.phase = phase;
        }
        match this.told.as_mut().as_pin_mut() {
            Some(told) => told.poll(cx),
            None => Poll::Pending,
        }
    }
}
