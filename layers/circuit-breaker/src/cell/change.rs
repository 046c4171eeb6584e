//! The state changes: always under the lock, and told after it.

use std::{collections::BTreeMap, mem, time::Duration};

use buttress_core::{
    clock::Instant,
    sync::atomic::Ordering::{AcqRel, Release},
};

use super::{Cell, Cold, NEVER, News, Opened, Outcome, Ticket, place};
use crate::{
    Cause, Event, Rule, State, Transition, TransitionError,
    settings::{LONGEST, Plan},
    word::{Probes, Word},
};

impl Cell {
    /// Begins the next generation. The lock is held, so that no other begins.
    pub(super) fn publish(
        &self,
        cold: &mut Cold,
        next: Word,
        until: Instant,
        at: Instant,
        cause: Cause,
        wait: Option<Duration>,
    ) -> News {
        let from = self.word().state();
        if !matches!(next.state(), State::Open | State::HalfOpen) {
            cold.opened = None;
        }
        if next.state().counts() {
            // Before the word, after which calls are counted.
            if let Some(window) = self.calls.get() {
                window.clear(next.generation());
            }
            if let Some(window) = self.time.get() {
                window.clear();
            }
        }
        cold.due = until;
        cold.asked = false;
        cold.hold = match &cold.follower {
            Some(follower) if next.state() == State::Open => until + follower.grace(),
            _ => Instant::from_nanos(0),
        };
        // The generation before last had this place: who reads of it what is
        // not its own finds a later word, too.
        self.hot.until[place(next)].store(until.as_nanos(), Release);
        // Others change this word too, but only from what they have read in
        // this generation: their exchange fails. A swap and no store, as loom
        // orders the one with their exchanges and not the other.
        self.hot.word.swap(next.0, AcqRel);
        let to = next.state();
        let changed = from != to;
        if changed {
            cold.since = at;
        }
        News {
            tenancy: cold.tenancy,
            observer: cold.observer.clone(),
            event: changed.then_some(Event::StateChange(Transition {
                from,
                to,
                generation: next.generation(),
                at,
                cause,
                wait,
            })),
            asked: None,
            follower: changed.then(|| cold.follower.clone()).flatten(),
            wakers: mem::take(&mut cold.waiters),
        }
    }

    pub(crate) fn tell(&self, news: News) {
        let News {
            tenancy,
            observer,
            event,
            asked,
            follower,
            wakers,
        } = news;
        // First of all, as nothing that follows is sure to return.
        if let (Some(follower), Some(Event::StateChange(change))) = (follower, &event) {
            follower.changed(change, asked);
        }
        for waker in wakers.into_values() {
            waker.wake();
        }
        let (Some(observer), Some(event)) = (observer, event) else {
            return;
        };
        trace(&observer.name, &event);
        if let Event::StateChange(_) = &event {
            // The gauge shows the latest state, whoever is the last to set it.
            loop {
                let state = self.state_for(tenancy);
                observer.metrics.state(state);
                if self.state_for(tenancy) == state {
                    break;
                }
            }
        }
        observer.tell(&event);
    }

    /// The state for this owner: for one who is gone, that of nothing.
    fn state_for(&self, tenancy: u64) -> State {
        let cold = self.lock();
        if cold.tenancy == tenancy {
            self.word().state()
        } else {
            State::Closed
        }
    }

    /// The first caller after the wait begins to probe, with a place taken.
    #[cold]
    pub(super) fn begin_probing(&self, generation: u32, now: Instant) -> Option<Ticket> {
        let mut cold = self.lock();
        let word = self.word();
        if word.generation() != generation {
            return None;
        }
        if cold.needs_leave(now) {
            self.ask_for_leave(cold, word, now);
            return None;
        }
        let next = word.next(State::HalfOpen).with_probes(Probes {
            in_flight: 1,
            ..Probes::default()
        });
        let limit = cold
            .plan
            .as_ref()
            .map_or(Duration::ZERO, |plan| plan.half_open);
        let news = self.publish(&mut cold, next, now + limit, now, Cause::WaitOver, None);
        drop(cold);
        let place = Place(self, Ticket::of(next), now);
        self.tell(news);
        Some(place.keep())
    }

    /// Opens, from closed; or tells that it would have.
    #[cold]
    pub(super) fn trip(&self, generation: u32, rule: Rule, hold: Option<Duration>, now: Instant) {
        let word = self.word();
        if word.state() == State::MetricsOnly && word.is_told() {
            return;
        }
        let draw = self.draw();
        let mut cold = self.lock();
        let word = self.word();
        if word.generation() != generation {
            return;
        }
        let news = if word.state() == State::MetricsOnly {
            if !self.told() {
                return;
            }
            News {
                tenancy: cold.tenancy,
                observer: cold.observer.clone(),
                event: Some(Event::WouldOpen(rule)),
                asked: None,
                follower: None,
                wakers: BTreeMap::new(),
            }
        } else {
            self.open(&mut cold, Cause::Rule(rule), hold, now, draw)
        };
        drop(cold);
        self.tell(news);
    }

    /// Whether this is the first time.
    fn told(&self) -> bool {
        loop {
            let word = self.word();
            if word.is_told() {
                return false;
            }
            if self.swap(word, word.told()) {
                return true;
            }
        }
    }

    /// Drawn before locking: a user's generator does not run under the lock.
    fn draw(&self) -> u64 {
        let random = self.lock().random.clone();
        random.next_u64()
    }

    fn open(
        &self,
        cold: &mut Cold,
        cause: Cause,
        hold: Option<Duration>,
        at: Instant,
        draw: u64,
    ) -> News {
        let word = self.word();
        let plan = cold.plan.as_ref().expect("set with the owner");
        cold.opened = Some(Opened {
            cause,
            failures: self.failures(word, plan, cause, at),
        });
        if word.state() == State::Closed {
            let healthy = at - cold.since;
            cold.level = plan
                .backoff
                .decayed(cold.level, healthy, plan.reset_timeout);
        }
        let wait = match (cause, hold) {
            // It asked for a pause and has not failed: a pause it is.
            (Cause::Rule(Rule::RetryAfter) | Cause::Manual | Cause::Remote, Some(hold)) => hold,
            (_, hold) => {
                let wait = plan.backoff.wait(plan.reset_timeout, cold.level, draw);
                cold.level = plan.backoff.raised(plan.reset_timeout, cold.level);
                wait.max(hold.unwrap_or_default())
            }
        };
        let wait = wait.min(LONGEST);
        let next = word.next(State::Open);
        let mut news = self.publish(cold, next, at + wait, at, cause, Some(wait));
        if matches!(cause, Cause::Rule(_) | Cause::ProbeFailed) {
            news.asked = hold.map(|hold| hold.min(LONGEST));
        }
        news
    }

    /// Those that are about to open it: of the rule that does, or all that are
    /// counted.
    fn failures(&self, word: Word, plan: &Plan, cause: Cause, at: Instant) -> u64 {
        match (word.state(), cause) {
            (State::HalfOpen, _) => word.probes().failed.into(),
            // A success may have ended the run since it was full.
            (_, Cause::Rule(Rule::ConsecutiveFailures)) => {
                word.in_a_row().max(plan.in_a_row).into()
            }
            (_, Cause::Rule(Rule::FailureRate)) => self.sums(word, || at).failed,
            _ if plan.in_a_row > 0 => word.in_a_row().into(),
            _ => self.sums(word, || at).failed,
        }
    }

    /// Half-open was undecided for too long. It has been open since then.
    #[cold]
    pub(super) fn overdue(&self, generation: u32, now: Instant) {
        let draw = self.draw();
        let mut cold = self.lock();
        let word = self.word();
        let until = self.until_locked(word);
        if word.generation() != generation || word.state() != State::HalfOpen || now < until {
            return;
        }
        let news = self.open(&mut cold, Cause::ProbesOverdue, None, until, draw);
        drop(cold);
        self.tell(news);
    }

    /// Opens a half-open that is overdue, so that what is done by hand finds
    /// the state that it should be.
    pub(crate) fn catch_up(&self, now: Instant) {
        let word = self.word();
        if word.state() == State::HalfOpen && self.until(word).is_some_and(|until| now >= until) {
            self.overdue(word.generation(), now);
        }
    }

    #[cold]
    pub(super) fn reopen(&self, generation: u32, hold: Option<Duration>, now: Instant) {
        let draw = self.draw();
        let mut cold = self.lock();
        if self.word().generation() != generation {
            return;
        }
        let news = self.open(&mut cold, Cause::ProbeFailed, hold, now, draw);
        drop(cold);
        self.tell(news);
    }

    #[cold]
    pub(super) fn close_probed(&self, generation: u32, now: Instant) {
        let mut cold = self.lock();
        let word = self.word();
        if word.generation() != generation {
            return;
        }
        let next = word.next(State::Closed);
        let news = self.publish(&mut cold, next, NEVER, now, Cause::Probed, None);
        drop(cold);
        self.tell(news);
    }

    /// Brings about a state by hand, or because it is so elsewhere. `wait` is
    /// for how long it is to be open.
    pub(crate) fn bring_about(
        &self,
        to: State,
        wait: Option<Duration>,
        cause: Cause,
        now: Instant,
    ) -> Result<(), TransitionError> {
        self.catch_up(now);
        self.bring_about_in(None, to, wait, cause, now)
    }

    /// The same, only while it is in this generation, if one is given.
    pub(super) fn bring_about_in(
        &self,
        generation: Option<u32>,
        to: State,
        wait: Option<Duration>,
        cause: Cause,
        now: Instant,
    ) -> Result<(), TransitionError> {
        let draw = self.draw();
        let mut cold = self.lock();
        let word = self.word();
        let from = word.state();
        if generation.is_some_and(|generation| generation != word.generation()) {
            return Err(TransitionError { from, to });
        }
        let sense = match to {
            State::Open => matches!(from, State::Closed | State::HalfOpen),
            State::HalfOpen => from == State::Open,
            // Elsewhere it was reset: else who follows would never hear of it.
            State::Closed if cause == Cause::Remote && from.is_override() => true,
            State::Closed => matches!(from, State::Open | State::HalfOpen),
            State::ForcedOpen | State::ForcedClosed | State::MetricsOnly => true,
        };
        if !sense {
            return Err(TransitionError { from, to });
        }
        if from == to {
            // An override that is there already.
            return Ok(());
        }
        let news = match to {
            State::Open => self.open(&mut cold, cause, wait, now, draw),
            State::HalfOpen => {
                let limit = cold
                    .plan
                    .as_ref()
                    .map_or(Duration::ZERO, |plan| plan.half_open);
                let next = word.next(State::HalfOpen);
                self.publish(&mut cold, next, now + limit, now, cause, None)
            }
            to => {
                if to == State::Closed && from.is_override() {
                    cold.level = 0;
                }
                self.publish(&mut cold, word.next(to), NEVER, now, cause, None)
            }
        };
        drop(cold);
        self.tell(news);
        Ok(())
    }

    /// Closed, empty and automatic, from whatever state.
    pub(crate) fn reset(&self, now: Instant) {
        self.catch_up(now);
        let mut cold = self.lock();
        cold.level = 0;
        cold.since = now;
        let next = self.word().next(State::Closed);
        let news = self.publish(&mut cold, next, NEVER, now, Cause::Manual, None);
        // Here it may have been closed already, and elsewhere not.
        let follower = news
            .event
            .is_none()
            .then(|| cold.follower.clone())
            .flatten();
        drop(cold);
        if let Some(follower) = follower {
            let change = Transition {
                from: State::Closed,
                to: State::Closed,
                generation: next.generation(),
                at: now,
                cause: Cause::Manual,
                wait: None,
            };
            follower.changed(&change, None);
        }
        self.tell(news);
    }
}

/// A probe's place, given back should a listener panic before there is a
/// permit.
struct Place<'a>(&'a Cell, Ticket, Instant);

impl Place<'_> {
    fn keep(self) -> Ticket {
        let ticket = self.1;
        mem::forget(self);
        ticket
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.record(self.1, Outcome::Nothing, None, || self.2);
    }
}

fn trace(name: &str, event: &Event) {
    match event {
        Event::StateChange(change) => {
            let (from, to) = (change.from.as_str(), change.to.as_str());
            let cause = change.cause.as_str();
            let wait = change.wait.map(|wait| wait.as_millis());
            // Not an `u128`, which not every subscriber writes.
            let wait_ms = wait.map(|wait| u64::try_from(wait).unwrap_or(u64::MAX));
            if matches!(change.to, State::Open | State::ForcedOpen) {
                tracing::warn!(name, from, to, cause, wait_ms, "circuit breaker opened");
            } else {
                tracing::info!(name, from, to, cause, "circuit breaker changed");
            }
        }
        Event::WouldOpen(rule) => {
            let cause = rule.as_str();
            tracing::warn!(name, cause, "circuit breaker would have opened");
        }
        _ => {}
    }
}
