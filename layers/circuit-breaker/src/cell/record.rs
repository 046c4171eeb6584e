//! A call ends.

use std::{cell::OnceCell, time::Duration};

use buttress_core::{
    clock::Instant,
    sync::atomic::{
        AtomicU32,
        Ordering::{Relaxed, SeqCst},
    },
};

use super::{Cell, Kind, Outcome, Ticket};
use crate::{
    Rule,
    window::{Epochs, Mark, Sums, order_for_loom},
    word::{Counts, Word},
};

impl Cell {
    /// Records that a call of a [plain](Word::is_plain) ticket went well.
    #[inline(always)]
    pub(crate) fn record_good(&self, ticket: Ticket, now: impl Fn() -> Instant) {
        let word = self.word();
        if ticket.is(word) && word.is_spotless() {
            return;
        }
        if word.generation() == ticket.generation() {
            self.record_good_in(word, now);
        }
    }

    #[inline]
    fn record_good_in(&self, word: Word, now: impl Fn() -> Instant) {
        if word.in_a_row() != 0 {
            self.end_run(word.generation());
        }
        // Armed is read after the window was written, and the window is
        // summed after arming: one of the two sees the other. (Not where the
        // thread has a stripe of its own: there the next call may have to.)
        if self.note(word, Mark::GOOD, &now) && Word(self.hot.word.load(SeqCst)).is_armed() {
            self.judge(word, &now);
        }
    }

    /// Records how a call went. `hold` is how long the callee asks to be left
    /// alone.
    pub(crate) fn record(
        &self,
        ticket: Ticket,
        outcome: Outcome,
        hold: Option<Duration>,
        now: impl Fn() -> Instant,
    ) {
        let word = self.word();
        if word.generation() != ticket.generation() {
            return;
        }
        match (ticket.kind(), outcome) {
            (Kind::Call, Outcome::Done(mark)) if mark.is_good() && hold.is_none() => {
                self.record_good_in(word, now);
            }
            (Kind::Free, _) => {}
            (Kind::Call, Outcome::Nothing) if hold.is_none() => {}
            (Kind::Call, outcome) => self.record_bad(word, outcome, hold, now),
            (Kind::Probe, outcome) => self.record_probe(ticket, outcome, hold, now),
        }
    }

    /// Whether the window has changed.
    #[inline]
    fn note(&self, word: Word, mark: Mark, now: impl Fn() -> Instant) -> bool {
        let params = &self.hot.params;
        let noted = match word.counts() {
            Counts::Nowhere => false,
            Counts::Calls => self.calls.get().is_some_and(|window| {
                window.note(word.generation(), params.calls.load(Relaxed), mark)
            }),
            Counts::Time => self.time.get().is_some_and(|window| {
                let epoch = Epochs(params.epochs.load(Relaxed)).at(now());
                window.note(word.generation(), epoch, mark);
                true
            }),
        };
        order_for_loom();
        noted
    }

    /// A success ends a run of failures.
    fn end_run(&self, generation: u32) {
        let mut word = self.word();
        while word.generation() == generation && word.in_a_row() != 0 {
            if self.swap(word, word.with_in_a_row(0)) {
                return;
            }
            word = self.word();
        }
    }

    #[cold]
    fn record_bad(
        &self,
        word: Word,
        outcome: Outcome,
        hold: Option<Duration>,
        now: impl Fn() -> Instant,
    ) {
        let read = OnceCell::new();
        let now = || *read.get_or_init(&now);
        let (mark, decides) = match outcome {
            Outcome::Done(mark) => (Some(mark), true),
            Outcome::DroppedSlow => (Some(Mark::SLOW), false),
            Outcome::Nothing => (None, false),
        };
        let mut rule = None;
        if mark.is_some_and(|mark| mark.failed) {
            if self.run_is_full(word.generation()) {
                rule = Some(Rule::ConsecutiveFailures);
            }
        } else if decides {
            self.end_run(word.generation());
        }
        if let Some(mark) = mark
            && word.counts() != Counts::Nowhere
        {
            self.note(word, mark, now);
            rule = rule.or_else(|| self.reached(word, now));
        }
        if let Some(rule) = rule.or(hold.map(|_| Rule::RetryAfter)) {
            self.trip(word.generation(), rule, hold, now());
        }
    }

    /// Counts a failure in a row, where they are counted. Whether these are
    /// too many.
    fn run_is_full(&self, generation: u32) -> bool {
        let most = self.hot.params.in_a_row.load(Relaxed);
        if most == 0 {
            return false;
        }
        loop {
            let word = self.word();
            if word.generation() != generation {
                return false;
            }
            let failures = word.in_a_row() + 1;
            if self.swap(word, word.with_in_a_row(failures)) {
                return failures >= most;
            }
        }
    }

    #[cold]
    fn judge(&self, word: Word, now: impl Fn() -> Instant) {
        if let Some(rule) = self.reached(word, &now) {
            self.trip(word.generation(), rule, None, now());
        }
    }

    /// The rule whose rate is reached, with calls enough; notes where only
    /// calls are lacking.
    fn reached(&self, word: Word, now: impl Fn() -> Instant) -> Option<Rule> {
        let params = &self.hot.params;
        loop {
            let sums = self.sums(word, &now);
            let over = |part: u64, ppm: &AtomicU32| {
                let ppm = u64::from(ppm.load(Relaxed));
                // Counts stay far below 2⁴⁴.
                ppm > 0 && part > 0 && part * 1_000_000 >= ppm * sums.calls
            };
            let rule = if over(sums.failed, &params.failure_ppm) {
                Some(Rule::FailureRate)
            } else if over(sums.slow, &params.slow_ppm) {
                Some(Rule::SlowCalls)
            } else {
                None
            };
            let enough = sums.calls >= u64::from(params.minimum.load(Relaxed));
            // Once it was changed, count again: who completed the minimum
            // meanwhile did not see it.
            if !self.arm(word.generation(), rule.is_some() && !enough) {
                return rule.filter(|_| enough);
            }
        }
    }

    pub(super) fn sums(&self, word: Word, now: impl Fn() -> Instant) -> Sums {
        order_for_loom();
        let params = &self.hot.params;
        match word.counts() {
            Counts::Nowhere => None,
            Counts::Calls => self
                .calls
                .get()
                .map(|window| window.sums(word.generation(), params.calls.load(Relaxed))),
            Counts::Time => self.time.get().map(|window| {
                let epoch = Epochs(params.epochs.load(Relaxed)).at(now());
                window.sums(word.generation(), epoch)
            }),
        }
        .unwrap_or_default()
    }

    /// Whether that was a change.
    fn arm(&self, generation: u32, armed: bool) -> bool {
        let mut word = self.word();
        while word.generation() == generation && word.is_armed() != armed {
            if self.swap(word, word.with_armed(armed)) {
                return true;
            }
            word = self.word();
        }
        false
    }

    fn record_probe(
        &self,
        ticket: Ticket,
        outcome: Outcome,
        hold: Option<Duration>,
        now: impl Fn() -> Instant,
    ) {
        let [most, _, tolerated, count_drops] = self.probes();
        let failed = match outcome {
            _ if hold.is_some() => Some(true),
            Outcome::Done(mark) => Some(!mark.is_good()),
            Outcome::DroppedSlow if count_drops != 0 => Some(true),
            Outcome::DroppedSlow | Outcome::Nothing => None,
        };
        loop {
            let word = self.word();
            if word.generation() != ticket.generation() {
                return;
            }
            let mut probes = word.probes();
            probes.in_flight = probes.in_flight.saturating_sub(1);
            let Some(failed) = failed else {
                if self.swap(word, word.with_probes(probes)) {
                    if word.is_waited_for() {
                        self.wake(ticket.generation());
                    }
                    return;
                }
                continue;
            };
            let now = now();
            let Some(until) = self.until(word) else {
                return;
            };
            if now >= until {
                // Its time was over before it came.
                self.overdue(word.generation(), now);
                return;
            }
            if failed {
                probes.failed += 1;
            } else {
                probes.good += 1;
            }
            if !self.swap(word, word.with_probes(probes)) {
                continue;
            }
            if hold.is_some() || probes.failed > tolerated {
                self.reopen(ticket.generation(), hold, now);
            } else if probes.good >= most - tolerated {
                self.close_probed(ticket.generation(), now);
            } else if word.is_waited_for() {
                self.wake(ticket.generation());
            }
            return;
        }
    }
}
