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
    phase: Phase,
    /// Only where someone hears of each call.
    observer: Option<Arc<Observer>>,
}

/// How far the call is, and since when it runs: `nanoseconds:60 stepping:1
/// pace:3`. A whole word, as all of a permit's fields are: what is written as
/// bytes and then copied as a word makes the processor wait. And few of them,
/// for a permit moves with its future.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Phase(u64);

impl Phase {
    const PACE: u64 = 0b111;
    /// Nobody asks how long it takes.
    const UNTIMED: Self = Self(0);
    const RUNNING: u64 = 1;
    /// The head is there, in time.
    const QUICK: Self = Self(2);
    /// The head is there, too late.
    const SLOW: Self = Self(3);
    const RECORDED: Self = Self(4);
    /// A step of the call runs. Should the permit be dropped meanwhile, then
    /// by the step's panic.
    const STEPPING: u64 = 0b1000;
    const SINCE_AT: u32 = 4;

    /// 2⁶⁰ ns are 36 years.
    #[inline]
    const fn running(since: Instant) -> Self {
        Self(since.as_nanos() << Self::SINCE_AT | Self::RUNNING)
    }

    /// Since when it runs, if it is timed and does.
    #[inline]
    const fn since(self) -> Option<Instant> {
        if self.0 & Self::PACE == Self::RUNNING {
            Some(Instant::from_nanos(self.0 >> Self::SINCE_AT))
        } else {
            None
        }
    }

    #[inline]
    const fn is_slow(self) -> bool {
        self.0 & Self::PACE == Self::SLOW.0
    }

    #[inline]
    const fn is_recorded(self) -> bool {
        self.0 == Self::RECORDED.0
    }

    #[inline]
    const fn is_stepping(self) -> bool {
        self.0 & Self::STEPPING != 0
    }

    #[inline]
    const fn begin_step(&mut self) {
        self.0 |= Self::STEPPING;
    }

    #[inline]
    const fn end_step(&mut self) {
        self.0 &= !Self::STEPPING;
    }
}

/// What a permit is made of, where one comes from a function that is called:
/// put together again at its caller it stays in registers, while a permit that
/// was written through a pointer draws all that is made of it into memory.
pub(crate) struct Parts {
    cell: &'static Cell,
    ticket: Ticket,
    phase: Phase,
    observer: Option<Arc<Observer>>,
}

impl Permit {
    #[inline]
    pub(crate) fn of(parts: Parts) -> Self {
        let Parts {
            cell,
            ticket,
            phase,
            observer,
        } = parts;
        Self {
            cell,
            ticket,
            phase,
            observer,
        }
    }

    #[inline]
    pub(crate) fn into_parts(mut self) -> Parts {
        let parts = Parts {
            cell: self.cell,
            ticket: self.ticket,
            phase: self.phase,
            observer: self.observer.take(),
        };
        mem::forget(self);
        parts
    }

    /// Of a [plain](Ticket::is_plain) ticket.
    #[inline]
    pub(crate) const fn plain(cell: &'static Cell, ticket: Ticket) -> Self {
        Self {
            cell,
            ticket,
            phase: Phase::UNTIMED,
            observer: None,
        }
    }

    pub(crate) fn new(
        cell: &'static Cell,
        ticket: Ticket,
        observer: Option<Arc<Observer>>,
    ) -> Self {
        Self::new_at(cell, ticket, observer, clock::now)
    }

    pub(crate) fn new_at(
        cell: &'static Cell,
        ticket: Ticket,
        observer: Option<Arc<Observer>>,
        now: impl Fn() -> Instant,
    ) -> Self {
        Self {
            cell,
            ticket,
            phase: if ticket.timed() {
                Phase::running(now())
            } else {
                Phase::UNTIMED
            },
            observer,
        }
    }

    /// Whether the call is a probe of a half-open breaker.
    #[must_use]
    pub const fn is_probe(&self) -> bool {
        matches!(self.ticket.kind(), Kind::Probe)
    }

    /// The response's head is there: how long the call took is settled, what
    /// its body takes is not the callee's doing alone.
    #[inline]
    pub fn arrived(&mut self) {
        self.arrived_at(clock::now);
    }

    #[inline]
    pub(crate) fn arrived_at(&mut self, now: impl Fn() -> Instant) {
        if let Some(since) = self.phase.since() {
            let slow = now() - since >= self.cell.slow_limit();
            self.phase = if slow { Phase::SLOW } else { Phase::QUICK };
        }
    }

    /// Runs a step of the call. Should it panic, the call has failed: told when
    /// the permit is dropped, as the panic unwinds.
    #[inline(always)]
    pub fn during<R>(&mut self, step: impl FnOnce() -> R) -> R {
        self.phase.begin_step();
        let result = step();
        self.phase.end_step();
        result
    }

    /// The same, where the call may be none of ours.
    #[inline(always)]
    pub(crate) fn during_if_any<R>(slot: &mut Option<Self>, step: impl FnOnce() -> R) -> R {
        if let Some(permit) = slot {
            permit.phase.begin_step();
        }
        let result = step();
        if let Some(permit) = slot {
            permit.phase.end_step();
        }
        result
    }

    /// As [`record`](Self::record), where the permit stays where it is.
    #[inline(always)]
    pub(crate) fn conclude(&mut self, verdict: Verdict) {
        if self.is_good(verdict) {
            self.phase = Phase::RECORDED;
            self.cell.record_good(self.ticket, clock::recent);
        } else {
            self.conclude_otherwise(verdict);
        }
    }

    #[cold]
    #[inline(never)]
    fn conclude_otherwise(&mut self, verdict: Verdict) {
        self.settle(Some(verdict), None, clock::now);
    }

    /// What nearly all are, and what is done for them has to be short.
    #[inline(always)]
    fn is_good(&self, verdict: Verdict) -> bool {
        verdict == Verdict::Success && self.ticket.is_plain()
    }

    /// Says how the call went.
    #[inline]
    pub fn record(mut self, verdict: Verdict) {
        self.conclude(verdict);
    }

    /// Says how the call went, and that the callee asks to be left alone for
    /// so long (its `Retry-After`): whatever the verdict, the breaker opens at
    /// once, for at least that long (366 days at most). Nothing is asked for by
    /// zero.
    pub fn record_holding_off(self, verdict: Verdict, hold: Duration) {
        self.finish(Some(verdict), Some(hold), clock::now);
    }

    /// Without a verdict: the call was given up on.
    pub(crate) fn finish(
        mut self,
        verdict: Option<Verdict>,
        hold: Option<Duration>,
        now: impl Fn() -> Instant,
    ) {
        self.settle(verdict, hold.filter(|hold| !hold.is_zero()), now);
    }

    #[cold]
    #[inline(never)]
    fn give_up(&mut self) {
        self.give_up_at(clock::now);
    }

    /// What dropping it does.
    pub(crate) fn give_up_at(&mut self, now: impl Fn() -> Instant) {
        let verdict = self.phase.is_stepping().then_some(Verdict::Failure);
        self.settle(verdict, None, now);
    }

    fn settle(
        &mut self,
        verdict: Option<Verdict>,
        hold: Option<Duration>,
        now: impl Fn() -> Instant,
    ) {
        // Read once, also where the window asks for it again.
        let since = self.phase.since();
        let ended = since.is_some().then(&now);
        let slow = match since.zip(ended) {
            Some((since, ended)) => ended - since >= self.cell.slow_limit(),
            None => self.phase.is_slow(),
        };
        self.phase = Phase::RECORDED;
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
        if !self.phase.is_recorded() {
            self.give_up();
        }
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit")
            .field("generation", &self.ticket.generation())
            .field("kind", &self.ticket.kind())
            .finish_non_exhaustive()
    }
}
