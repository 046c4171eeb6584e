//! The settings, and what is seen from outside.

use std::time::Duration;

use buttress_core::{clock::Instant, sync::atomic::Ordering::Relaxed};

use super::{Cell, Cold, NEVER, News, View};
use crate::{
    Cause, State, Window,
    settings::Plan,
    window::{CallWindow, Epochs, Sums, TimeWindow},
    word::{Counts, Probes, Word},
};

impl Cell {
    /// New settings, and news to be told. The state stays, with the wait that
    /// it had; what was counted, and the calls in flight, count no more.
    pub(crate) fn set_plan(&self, plan: Plan, now: Instant) -> News {
        let mut cold = self.lock();
        let word = self.word();
        let until = match word.state() {
            State::HalfOpen => now + plan.half_open,
            _ => self.until_locked(word),
        };
        let next = self.settle(&mut cold, plan, word.next(word.state()));
        self.publish(&mut cold, next, until, now, Cause::Manual, None)
    }

    /// Writes the settings, and into the word what it says of them.
    pub(super) fn settle(&self, cold: &mut Cold, plan: Plan, word: Word) -> Word {
        let params = &self.hot.params;
        let nanos = |span: Duration| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
        params.in_a_row.store(plan.in_a_row, Relaxed);
        params.failure_ppm.store(plan.failure_ppm, Relaxed);
        params.slow_ppm.store(plan.slow_ppm, Relaxed);
        // Without a rule nothing is slow, also not a call that was timed by
        // one that was replaced since.
        let slow = if plan.is_timed() {
            nanos(plan.slow)
        } else {
            u64::MAX
        };
        params.slow_nanos.store(slow, Relaxed);
        params.minimum.store(plan.minimum, Relaxed);
        match plan.window {
            Window::Calls(calls) => params.calls.store(calls, Relaxed),
            Window::Time(span) => params.epochs.store(Epochs::of(span).0, Relaxed),
        }
        match plan.counts {
            Counts::Nowhere => {}
            Counts::Calls => drop(self.calls.get_or_init(CallWindow::new)),
            Counts::Time => drop(self.time.get_or_init(TimeWindow::new)),
        }
        let drops = u8::from(plan.drops_of_slow_probes);
        let probes = [plan.probes, plan.at_once, plan.tolerated, drops];
        params.probes.store(u32::from_le_bytes(probes), Relaxed);
        let observed = cold
            .observer
            .as_ref()
            .is_some_and(|observer| observer.hears_calls());
        let word = word.with_settings(plan.counts, plan.is_timed(), observed);
        cold.plan = Some(plan);
        word
    }

    /// From how long on a call is slow.
    pub(crate) fn slow_limit(&self) -> Duration {
        Duration::from_nanos(self.hot.params.slow_nanos.load(Relaxed))
    }

    /// The state: half-open only until its time is up. The clock is read
    /// where it is half-open.
    pub(crate) fn state(&self, now: impl Fn() -> Instant) -> State {
        let state = self.word().state();
        if state != State::HalfOpen {
            return state;
        }
        self.catch_up(now());
        self.word().state()
    }

    pub(crate) fn view(&self, now: Instant) -> View {
        self.catch_up(now);
        let cold = self.lock();
        let word = self.word();
        let state = word.state();
        let until = self.until_locked(word);
        let counts_runs = cold.plan.as_ref().is_some_and(|plan| plan.in_a_row > 0);
        View {
            state,
            generation: word.generation(),
            since: cold.since,
            until: (until != NEVER).then_some(until),
            in_a_row: (counts_runs && state.counts()).then(|| word.in_a_row()),
            sums: if state.counts() {
                self.sums(word, || now)
            } else {
                Sums::default()
            },
            probes: if state == State::HalfOpen {
                word.probes()
            } else {
                Probes::default()
            },
            opened: cold.opened,
        }
    }
}
