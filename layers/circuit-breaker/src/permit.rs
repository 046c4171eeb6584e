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
        Self {
            cell,
            ticket,
            pace: if ticket.timed {
                Pace::Since(clock::now())
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
        if let Pace::Since(_) = self.pace {
            let slow = self.is_slow();
            self.pace = Pace::Took { slow };
        }
    }

    fn is_slow(&self) -> bool {
        match self.pace {
            Pace::Untimed | Pace::Recorded => false,
            Pace::Since(started) => clock::now() - started >= self.cell.slow_limit(),
            Pace::Took { slow } => slow,
        }
    }

    /// Says how the call went.
    #[inline]
    pub fn record(self, verdict: Verdict) {
        self.finish(Some(verdict), None);
    }

    /// Says how the call went, and that the callee asks to be left alone for
    /// so long (its `Retry-After`): the breaker opens at once, for at least
    /// that long.
    pub fn record_holding_off(self, verdict: Verdict, hold: Duration) {
        self.finish(Some(verdict), Some(hold));
    }

    /// Runs a step of the call. Should it panic, the call has failed.
    #[inline]
    pub fn during<R>(slot: &mut Option<Self>, step: impl FnOnce() -> R) -> R {
        struct Unwinding<'a>(&'a mut Option<Permit>);

        impl Drop for Unwinding<'_> {
            fn drop(&mut self) {
                if let Some(permit) = self.0.take() {
                    permit.record(Verdict::Failure);
                }
            }
        }

        let unwinding = Unwinding(slot);
        let result = step();
        mem::forget(unwinding);
        result
    }

    #[inline]
    fn finish(mut self, verdict: Option<Verdict>, hold: Option<Duration>) {
        self.settle(verdict, hold);
    }

    #[inline]
    fn settle(&mut self, verdict: Option<Verdict>, hold: Option<Duration>) {
        let slow = self.is_slow();
        self.pace = Pace::Recorded;
        let mark = |failed| Outcome::Done(Mark { failed, slow });
        let outcome = match verdict {
            Some(Verdict::Success) => mark(false),
            Some(Verdict::Failure) => mark(true),
            None if slow => Outcome::DroppedSlow,
            Some(Verdict::Ignored) | None => Outcome::Nothing,
        };
        self.cell.record(self.ticket, outcome, hold, clock::now);
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
            self.settle(None, None);
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
