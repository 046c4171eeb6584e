//! A breaker as plain as it can be: every result with its time in a list, no
//! atomics, no packing, nothing incremental that could be counted anew.

use std::time::Duration;

use buttress_core::{classify::Verdict, clock::Instant};

use crate::{
    Cause, Event, Reason, ReopenBackoff, Rule, Settings, State, Transition, Window,
    cell::{Kind, Opened, Outlook, Rejection, View},
    window::{Mark, Sums},
    word::{GENERATIONS, Probes},
};

const MS: u64 = 1_000_000;

/// Times are milliseconds, rates are hundredths; zero is no rule.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) in_a_row: u32,
    pub(super) failure_pct: u64,
    pub(super) slow_ms: u64,
    pub(super) slow_pct: u64,
    pub(super) window: Kept,
    pub(super) minimum: u64,
    pub(super) reset_ms: u64,
    /// Waits double.
    pub(super) doubles: bool,
    pub(super) max_ms: u64,
    /// Up to half as long again.
    pub(super) jitters: bool,
    pub(super) decay_ms: Option<u64>,
    pub(super) probes: u32,
    pub(super) at_once: u32,
    pub(super) tolerated: u32,
    pub(super) half_open_ms: u64,
    pub(super) count_drops: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Kept {
    Calls(u32),
    /// Of milliseconds, a multiple of ten.
    Time(u64),
}

impl Rules {
    pub(super) fn settings(&self) -> Settings {
        let ms = Duration::from_millis;
        let rate = |hundredths: u64| hundredths as f64 / 100.0;
        let mut backoff = ReopenBackoff::new(if self.doubles { 2.0 } else { 1.0 })
            .max(ms(self.max_ms))
            .jitter(if self.jitters { 0.5 } else { 0.0 });
        if let Some(decay) = self.decay_ms {
            backoff = backoff.decay(ms(decay));
        }
        let mut settings = Settings::new()
            .window(match self.window {
                Kept::Calls(calls) => Window::Calls(calls),
                Kept::Time(span) => Window::Time(ms(span)),
            })
            .minimum_calls(u32::try_from(self.minimum).unwrap())
            .reset_timeout(ms(self.reset_ms))
            .reopen_backoff(backoff)
            .half_open_probes(self.probes)
            .half_open_concurrency(self.at_once)
            .half_open_failures(self.tolerated)
            .half_open_timeout(ms(self.half_open_ms))
            .count_dropped_probes(self.count_drops);
        if self.in_a_row > 0 {
            settings = settings.consecutive_failures(self.in_a_row);
        }
        if self.failure_pct > 0 {
            settings = settings.failure_rate(rate(self.failure_pct));
        }
        if self.slow_pct > 0 {
            settings = settings.slow_calls(ms(self.slow_ms), rate(self.slow_pct));
        }
        settings
    }

    pub(super) fn rated(&self) -> bool {
        self.failure_pct > 0 || self.slow_pct > 0
    }

    /// After so many openings, without jitter.
    fn wait(&self, level: u32) -> u64 {
        if !self.doubles {
            return self.reset_ms * MS;
        }
        let doubled = u128::from(self.reset_ms) << level.min(60);
        u64::try_from(doubled.min(u128::from(self.max_ms))).unwrap() * MS
    }
}

/// A call that was let through.
#[derive(Clone, Copy, Debug)]
pub(super) struct Called {
    generation: u32,
    kind: Kind,
    /// If it is timed.
    started: Option<u64>,
    /// Once its head is there.
    took_long: Option<bool>,
}

pub(super) struct Oracle {
    pub(super) rules: Rules,
    pub(super) state: State,
    generation: u32,
    since: u64,
    pub(super) until: Option<u64>,
    level: u32,
    /// What was counted in this generation.
    results: Vec<(u64, Mark)>,
    run: u32,
    /// The last look found a rate reached, and only calls lacking.
    lacking: bool,
    told: bool,
    probes: Probes,
    opened: Option<Opened>,
    pub(super) told_events: Vec<Event>,
}

impl Oracle {
    pub(super) fn new(rules: Rules, generation: u32, now: u64) -> Self {
        Self {
            rules,
            state: State::Closed,
            generation,
            since: now,
            until: None,
            level: 0,
            results: Vec::new(),
            run: 0,
            lacking: false,
            told: false,
            probes: Probes::default(),
            opened: None,
            told_events: Vec::new(),
        }
    }

    fn begin(&mut self, to: State, until: Option<u64>, at: u64, cause: Cause, wait: Option<u64>) {
        self.generation = (self.generation + 1) % GENERATIONS;
        self.results.clear();
        self.run = 0;
        self.lacking = false;
        self.told = false;
        self.probes = Probes::default();
        self.until = until;
        if !matches!(to, State::Open | State::HalfOpen) {
            self.opened = None;
        }
        if to != self.state {
            self.told_events.push(Event::StateChange(Transition {
                from: self.state,
                to,
                generation: self.generation,
                at: Instant::from_nanos(at),
                cause,
                wait: wait.map(Duration::from_nanos),
            }));
            self.since = at;
            self.state = to;
        }
    }

    fn open(&mut self, cause: Cause, hold: Option<u64>, at: u64, draw_quarters: u64) {
        let by_rate = cause == Cause::Rule(Rule::FailureRate);
        let failures = if self.state == State::HalfOpen {
            self.probes.failed.into()
        } else if self.rules.in_a_row > 0 && !by_rate {
            self.run.into()
        } else {
            self.sums(at).failed
        };
        self.opened = Some(Opened { cause, failures });
        if self.state == State::Closed {
            let healthy = at.saturating_sub(self.since);
            let decay = self.rules.decay_ms.unwrap_or(self.rules.reset_ms) * MS;
            let forgotten = healthy.checked_div(decay).unwrap_or(u64::MAX);
            self.level = self
                .level
                .saturating_sub(u32::try_from(forgotten).unwrap_or(u32::MAX));
        }
        let by_hand = matches!(cause, Cause::Manual | Cause::Remote);
        let only_asked = cause == Cause::Rule(Rule::RetryAfter);
        let wait = match hold {
            Some(hold) if by_hand || only_asked => hold,
            _ => {
                let plain = self.rules.wait(self.level);
                if self.rules.wait(self.level + 1) > plain {
                    self.level += 1;
                }
                let longer = if self.rules.jitters {
                    plain / 2 * draw_quarters / 4
                } else {
                    0
                };
                (plain + longer).max(hold.unwrap_or(0))
            }
        };
        self.begin(State::Open, Some(at + wait), at, cause, Some(wait));
    }

    /// Half-open whose time is up has been open since.
    pub(super) fn catch_up(&mut self, now: u64, draw: u64) {
        if let (State::HalfOpen, Some(until)) = (self.state, self.until)
            && now >= until
        {
            self.open(Cause::ProbesOverdue, None, until, draw);
        }
    }

    fn has_place(&self) -> bool {
        let Probes {
            in_flight,
            good,
            failed,
        } = self.probes;
        let [in_flight, good, failed] = [in_flight, good, failed].map(u32::from);
        in_flight < self.rules.at_once && in_flight + good + failed < self.rules.probes
    }

    pub(super) fn admit(&mut self, now: u64, draw: u64) -> Result<Called, Rejection> {
        self.catch_up(now, draw);
        if self.state == State::Open && self.until.is_some_and(|until| now >= until) {
            let end = now + self.rules.half_open_ms * MS;
            self.begin(State::HalfOpen, Some(end), now, Cause::WaitOver, None);
        }
        let left = Duration::from_nanos(self.until.unwrap_or(0).saturating_sub(now));
        let reject = |reason, retry_after| Err(Rejection::new(reason, retry_after));
        let kind = match self.state {
            State::Closed | State::MetricsOnly => Kind::Call,
            State::ForcedClosed => Kind::Free,
            State::ForcedOpen => return reject(Reason::ForcedOpen, None),
            State::Open => return reject(Reason::Open, Some(left)),
            State::HalfOpen if self.has_place() => {
                self.probes.in_flight += 1;
                Kind::Probe
            }
            State::HalfOpen => {
                return reject(Reason::HalfOpen, Some(left.min(Duration::from_secs(1))));
            }
        };
        Ok(Called {
            generation: self.generation,
            kind,
            started: (self.rules.slow_pct > 0).then_some(now),
            took_long: None,
        })
    }

    pub(super) fn outlook(&mut self, now: u64, draw: u64) -> Outlook {
        self.catch_up(now, draw);
        let until = self.until.map(Instant::from_nanos);
        match self.state {
            State::Closed | State::MetricsOnly | State::ForcedClosed => Outlook::Passes,
            State::ForcedOpen => Outlook::Waits(None),
            State::Open if self.until.is_some_and(|until| now >= until) => Outlook::Passes,
            State::HalfOpen if self.has_place() => Outlook::Passes,
            State::Open | State::HalfOpen => Outlook::Waits(until),
        }
    }

    fn ran_long(&self, call: &Called, now: u64) -> bool {
        call.took_long.unwrap_or_else(|| {
            let limit = self.rules.slow_ms * MS;
            call.started.is_some_and(|started| {
                self.rules.slow_pct > 0 && now.saturating_sub(started) >= limit
            })
        })
    }

    pub(super) fn arrived(&self, call: &mut Called, now: u64) {
        if call.started.is_some() {
            call.took_long = Some(self.ran_long(call, now));
        }
    }

    /// Without a verdict the call was given up on.
    pub(super) fn finish(
        &mut self,
        call: Called,
        verdict: Option<Verdict>,
        hold: Option<u64>,
        now: u64,
        draw: u64,
    ) {
        let slow = self.ran_long(&call, now);
        let hold = hold.filter(|&hold| hold > 0);
        if call.generation == self.generation {
            match call.kind {
                Kind::Free => {}
                Kind::Call => self.count(verdict, slow, hold, now, draw),
                Kind::Probe => self.probed(verdict, slow, hold, now, draw),
            }
        }
        self.told_events.push(match verdict {
            Some(Verdict::Success) => Event::Success { slow },
            Some(Verdict::Failure) => Event::Failure { slow },
            Some(Verdict::Ignored) | None => Event::Ignored,
        });
    }

    fn count(
        &mut self,
        verdict: Option<Verdict>,
        slow: bool,
        hold: Option<u64>,
        now: u64,
        draw: u64,
    ) {
        let failed = verdict == Some(Verdict::Failure);
        let decided = matches!(verdict, Some(Verdict::Success | Verdict::Failure));
        let counted = decided || (verdict.is_none() && slow);
        if decided {
            self.run = if failed { self.run + 1 } else { 0 };
        }
        if counted {
            self.results.push((now, Mark { failed, slow }));
        }
        let mut rule = None;
        if failed && self.rules.in_a_row > 0 && self.run >= self.rules.in_a_row {
            rule = Some(Rule::ConsecutiveFailures);
        }
        let bad = failed || slow || hold.is_some();
        if counted && self.rules.rated() && (bad || self.lacking) {
            let looked = self.look(now);
            rule = rule.or(looked);
        }
        if hold.is_some() {
            rule = rule.or(Some(Rule::RetryAfter));
        }
        let Some(rule) = rule else { return };
        if self.state == State::Closed {
            self.open(Cause::Rule(rule), hold, now, draw);
        } else if !self.told {
            self.told = true;
            self.told_events.push(Event::WouldOpen(rule));
        }
    }

    fn look(&mut self, now: u64) -> Option<Rule> {
        let sums = self.sums(now);
        let over = |part: u64, pct: u64| pct > 0 && part > 0 && part * 100 >= pct * sums.calls;
        let rule = if over(sums.failed, self.rules.failure_pct) {
            Some(Rule::FailureRate)
        } else if over(sums.slow, self.rules.slow_pct) {
            Some(Rule::SlowCalls)
        } else {
            None
        };
        let enough = sums.calls >= self.rules.minimum;
        self.lacking = rule.is_some() && !enough;
        rule.filter(|_| enough)
    }

    fn sums(&self, now: u64) -> Sums {
        let mut sums = Sums::default();
        if !self.rules.rated() {
            return sums;
        }
        let kept: Vec<Mark> = match self.rules.window {
            Kept::Calls(calls) => {
                let last = self.results.iter().rev().take(calls as usize);
                last.map(|(_, mark)| *mark).collect()
            }
            Kept::Time(ms) => {
                let span = ms * MS / 10;
                // Another thread may have entered the next span before.
                let within = |at: u64| at / span <= now / span + 1 && at / span + 9 >= now / span;
                let last = self.results.iter().filter(|(at, _)| within(*at));
                last.map(|(_, mark)| *mark).collect()
            }
        };
        for mark in kept {
            sums.calls += 1;
            sums.failed += u64::from(mark.failed);
            sums.slow += u64::from(mark.slow);
        }
        sums
    }

    fn probed(
        &mut self,
        verdict: Option<Verdict>,
        slow: bool,
        hold: Option<u64>,
        now: u64,
        draw: u64,
    ) {
        let failed = match verdict {
            _ if hold.is_some() => Some(true),
            Some(Verdict::Failure) => Some(true),
            Some(Verdict::Success) => Some(slow),
            Some(Verdict::Ignored) => None,
            None => (slow && self.rules.count_drops).then_some(true),
        };
        if failed.is_some() && self.until.is_some_and(|until| now >= until) {
            self.catch_up(now, draw);
            return;
        }
        self.probes.in_flight -= 1;
        match failed {
            None => {}
            Some(true) => {
                self.probes.failed += 1;
                if hold.is_some() || u32::from(self.probes.failed) > self.rules.tolerated {
                    self.open(Cause::ProbeFailed, hold, now, draw);
                }
            }
            Some(false) => {
                self.probes.good += 1;
                let needed = self.rules.probes - self.rules.tolerated;
                if u32::from(self.probes.good) >= needed {
                    self.begin(State::Closed, None, now, Cause::Probed, None);
                }
            }
        }
    }

    /// Whether it made sense.
    pub(super) fn bring_about(
        &mut self,
        to: State,
        wait: Option<u64>,
        cause: Cause,
        now: u64,
        draw: u64,
    ) -> bool {
        self.catch_up(now, draw);
        match (self.state, to) {
            (State::Closed | State::HalfOpen, State::Open) => self.open(cause, wait, now, draw),
            (State::Open, State::HalfOpen) => {
                let end = now + self.rules.half_open_ms * MS;
                self.begin(State::HalfOpen, Some(end), now, cause, None);
            }
            (State::Open | State::HalfOpen, State::Closed) => {
                self.begin(State::Closed, None, now, cause, None);
            }
            (from, State::Closed) if from.is_override() && cause == Cause::Remote => {
                self.level = 0;
                self.begin(State::Closed, None, now, cause, None);
            }
            (from, to) if to.is_override() => {
                if from != to {
                    self.begin(to, None, now, cause, None);
                }
            }
            _ => return false,
        }
        true
    }

    pub(super) fn reset(&mut self, now: u64, draw: u64) {
        self.catch_up(now, draw);
        self.level = 0;
        self.begin(State::Closed, None, now, Cause::Manual, None);
        self.since = now;
    }

    pub(super) fn configure(&mut self, rules: Rules, now: u64, draw: u64) {
        self.catch_up(now, draw);
        self.rules = rules;
        let until = if self.state == State::HalfOpen {
            Some(now + self.rules.half_open_ms * MS)
        } else {
            self.until
        };
        self.begin(self.state, until, now, Cause::Manual, None);
    }

    pub(super) fn view(&mut self, now: u64, draw: u64) -> View {
        self.catch_up(now, draw);
        let counts = matches!(self.state, State::Closed | State::MetricsOnly);
        View {
            state: self.state,
            generation: self.generation,
            since: Instant::from_nanos(self.since),
            until: self.until.map(Instant::from_nanos),
            in_a_row: (counts && self.rules.in_a_row > 0).then_some(self.run),
            sums: if counts {
                self.sums(now)
            } else {
                Sums::default()
            },
            probes: self.probes,
            opened: self.opened,
        }
    }
}
