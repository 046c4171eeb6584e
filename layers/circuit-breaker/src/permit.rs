//! Leave to call: a guard that tells the breaker how the call went.

use std::{fmt, mem, sync::Arc, time::Duration};

use buttress_core::{
    classify::Verdict,
    clock::{self, Instant},
};

use crate::{
    Event,
    cell::{Cell, Kind, Observer, Outcome, Ticket},
    window::Mark,
};

/// One call's leave to pass, from [`Breaker::try_acquire`].
///
/// Say how the call went with [`record`](Self::record). A permit that is
/// dropped without a word was a call that someone gave up on: it counts as
/// nothing, and a probe's place is free again at once. But with a slow-call
/// rule a call given up on after that long counts as a slow one (a probe only
/// where [`count_dropped_probes`] says so): else a timeout around the breaker
/// would hide that its callee hangs.
///
/// That goes for a permit dropped by a panic, too, as nobody can tell whose
/// panic it is; a step run by [`during`](Self::during) has failed if it panics.
///
/// A permit belongs to the generation that it was given in. If the state has
/// changed since, what it says feeds metrics and listeners, and changes
/// nothing else.
///
/// [`Breaker::try_acquire`]: crate::Breaker::try_acquire
/// [`count_dropped_probes`]: crate::Settings::count_dropped_probes
#[must_use = "dropping it says that the call was given up on"]
pub struct Permit {
    cell: &'static Cell,
    ticket: Ticket,
    pace: Pace,
    /// Only where someone hears of each call.
    observer: Option<Arc<Observer>>,
}

#[derive(Clone, Copy)]
enum Pace {
    /// Nobody asks.
    Untimed,
    Since(Instant),
    /// The head is there: it took so long.
    Took {
        slow: bool,
    },
    Recorded,
}

impl Permit {
    #[inline]
    pub(crate) fn new(
        cell: &'static Cell,
        ticket: Ticket,
        observer: Option<Arc<Observer>>,
    ) -> Self {
        Self::new_at(cell, ticket, observer, clock::now)
    }

    #[inline]
    pub(crate) fn new_at(
        cell: &'static Cell,
        ticket: Ticket,
        observer: Option<Arc<Observer>>,
        now: impl Fn() -> Instant,
    ) -> Self {
        Self {
            cell,
            ticket,
            pace: if ticket.timed {
                Pace::Since(now())
            } else {
                Pace::Untimed
            },
            observer,
        }
    }

    /// Whether the call is a probe of a half-open breaker.
    #[must_use]
    pub const fn is_probe(&self) -> bool {
        matches!(self.ticket.kind, Kind::Probe)
    }

    /// The response's head is there: how long the call took is settled, what
    /// its body takes is not the callee's doing alone.
    #[inline]
    pub fn arrived(&mut self) {
        self.arrived_at(clock::now);
    }

    #[inline]
    pub(crate) fn arrived_at(&mut self, now: impl Fn() -> Instant) {
        if let Pace::Since(started) = self.pace {
            let slow = now() - started >= self.cell.slow_limit();
            self.pace = Pace::Took { slow };
        }
    }

    /// Says how the call went.
    #[inline]
    pub fn record(self, verdict: Verdict) {
        self.finish(Some(verdict), None, clock::now);
    }

    /// Says how the call went, and that the callee asks to be left alone for
    /// so long (its `Retry-After`): whatever the verdict, the breaker opens at
    /// once, for at least that long (366 days at most). Nothing is asked for by
    /// zero.
    pub fn record_holding_off(self, verdict: Verdict, hold: Duration) {
        self.finish(Some(verdict), Some(hold), clock::now);
    }

    /// Runs a step of the call. Should it panic, the call has failed.
    #[inline]
    pub fn during<R>(slot: &mut Option<Self>, step: impl FnOnce() -> R) -> R {
        Self::during_at(slot, clock::now, step)
    }

    #[inline]
    pub(crate) fn during_at<R>(
        slot: &mut Option<Self>,
        now: impl Fn() -> Instant,
        step: impl FnOnce() -> R,
    ) -> R {
        struct Unwinding<'a, F: Fn() -> Instant>(&'a mut Option<Permit>, F);

        impl<F: Fn() -> Instant> Drop for Unwinding<'_, F> {
            fn drop(&mut self) {
                if let Some(permit) = self.0.take() {
                    permit.finish(Some(Verdict::Failure), None, &self.1);
                }
            }
        }

        let unwinding = Unwinding(slot, now);
        let result = step();
        mem::forget(unwinding);
        result
    }

    /// Without a verdict: the call was given up on.
    #[inline]
    pub(crate) fn finish(
        mut self,
        verdict: Option<Verdict>,
        hold: Option<Duration>,
        now: impl Fn() -> Instant,
    ) {
        self.settle(verdict, hold.filter(|hold| !hold.is_zero()), now);
    }

    #[inline]
    fn settle(
        &mut self,
        verdict: Option<Verdict>,
        hold: Option<Duration>,
        now: impl Fn() -> Instant,
    ) {
        // Read once, also where the window asks for it again.
        let ended = match self.pace {
            Pace::Since(_) => Some(now()),
            Pace::Untimed | Pace::Took { .. } | Pace::Recorded => None,
        };
        let slow = match (self.pace, ended) {
            (Pace::Since(started), Some(ended)) => ended - started >= self.cell.slow_limit(),
            (Pace::Took { slow }, _) => slow,
            _ => false,
        };
        self.pace = Pace::Recorded;
        let mark = |failed| Outcome::Done(Mark { failed, slow });
        let outcome = match verdict {
            Some(Verdict::Success) => mark(false),
            Some(Verdict::Failure) => mark(true),
            None if slow => Outcome::DroppedSlow,
            Some(Verdict::Ignored) | None => Outcome::Nothing,
        };
        self.cell
            .record(self.ticket, outcome, hold, || ended.unwrap_or_else(&now));
        if let Some(observer) = self.observer.take() {
            observer.tell(&match verdict {
                Some(Verdict::Success) => Event::Success { slow },
                Some(Verdict::Failure) => Event::Failure { slow },
                Some(Verdict::Ignored) | None => Event::Ignored,
            });
        }
    }
}

impl Drop for Permit {
    #[inline]
    fn drop(&mut self) {
        if !matches!(self.pace, Pace::Recorded) {
            self.settle(None, None, clock::now);
        }
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit")
            .field("generation", &self.ticket.generation)
            .field("kind", &self.ticket.kind)
            .finish_non_exhaustive()
    }
}
