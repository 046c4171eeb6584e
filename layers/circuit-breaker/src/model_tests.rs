//! The breaker beside its [oracle], through random schedules: both are told
//! the same, and must say the same after every step.

use std::{
    fmt::Write as _,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use buttress_core::{classify::Verdict, clock::Instant, random::SharedRandom};
use proptest::prelude::*;

use crate::{
    Cause, Event, Permit, State,
    cell::{Lease, Observer},
    metrics::Metrics,
};
use oracle::{Called, Kept, Oracle, Rules};

mod oracle;

const MS: u64 = 1_000_000;

/// Numbers for the choices of one step, from one random one.
struct Dice(u64);

impl Dice {
    /// Less than `sides`.
    fn roll(&mut self, sides: u64) -> u64 {
        let rolled = self.0 % sides;
        self.0 /= sides;
        rolled
    }

    fn one_of<T: Copy, const N: usize>(&mut self, of: [T; N]) -> T {
        of[self.roll(N as u64) as usize]
    }

    fn state(&mut self) -> State {
        self.one_of([
            State::Closed,
            State::Open,
            State::HalfOpen,
            State::ForcedOpen,
            State::ForcedClosed,
            State::MetricsOnly,
        ])
    }

    fn verdict(&mut self) -> Option<Verdict> {
        self.one_of([
            Some(Verdict::Success),
            Some(Verdict::Failure),
            Some(Verdict::Success),
            Some(Verdict::Failure),
            Some(Verdict::Ignored),
            None,
        ])
    }

    fn wait(&mut self) -> Option<u64> {
        let ms = self.one_of([None, None, None, Some(0), Some(1), Some(100), Some(5000)]);
        ms.map(|ms| ms * MS)
    }
}

struct Pair {
    lease: Lease,
    oracle: Oracle,
    heard: Arc<Mutex<Vec<Event>>>,
    observer: Arc<Observer>,
    /// Quarters of the greatest draw.
    draw: Arc<AtomicU64>,
    calls: Vec<(Permit, Called)>,
    now: u64,
    latest: u64,
    log: String,
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.calls.clear();
        self.lease.give_back();
    }
}

impl Pair {
    fn new(rules: Rules) -> Self {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hears = Arc::clone(&heard);
        let name = "model".into();
        let observer = Arc::new(Observer {
            metrics: Metrics::new(&name),
            name,
            listeners: Box::new([Box::new(move |_, event| hears.lock().unwrap().push(*event))]),
        });
        let draw = Arc::new(AtomicU64::new(0));
        let drawn = Arc::clone(&draw);
        let now = 1 << 40;
        let lease = Lease::take(
            Arc::clone(&observer),
            rules.settings().plan().unwrap(),
            SharedRandom::new(move || drawn.load(Relaxed) << 62),
            Instant::from_nanos(now),
        );
        let begun = lease.cell.view(Instant::from_nanos(now)).generation;
        Self {
            log: format!("{rules:#?}\n"),
            oracle: Oracle::new(rules, begun, now),
            lease,
            heard,
            observer,
            draw,
            calls: Vec::new(),
            now,
            latest: now,
        }
    }

    fn at(&self) -> Instant {
        Instant::from_nanos(self.now)
    }

    fn drawn(&self) -> u64 {
        self.draw.load(Relaxed)
    }

    fn call(&mut self) {
        let at = self.at();
        let ours = self.lease.cell.admit(|| at);
        let theirs = self.oracle.admit(self.now, self.drawn());
        let _ = writeln!(self.log, "{} call: {ours:?}", self.now);
        match (ours, theirs) {
            (Ok(ticket), Ok(called)) => {
                let heard = ticket.observed().then(|| Arc::clone(&self.observer));
                let permit = Permit::new_at(self.lease.cell, ticket, heard, || at);
                self.calls.push((permit, called));
            }
            (Err(ours), Err(theirs)) => assert_eq!(ours, theirs),
            (ours, theirs) => panic!("admitted: {ours:?}, but {theirs:?}"),
        }
    }

    fn finish(&mut self, index: usize, verdict: Option<Verdict>, hold: Option<u64>, panics: bool) {
        let at = self.at();
        let (mut permit, called) = self.calls.swap_remove(index);
        let _ = writeln!(
            self.log,
            "{} ends: {permit:?} {verdict:?}, holding {hold:?}, panics: {panics}",
            self.now
        );
        let drawn = self.drawn();
        if panics {
            // Quietly: the hook is not called.
            let step = || permit.during(|| resume_unwind(Box::new(())));
            assert!(catch_unwind(AssertUnwindSafe(step)).is_err());
            permit.give_up_at(|| at);
            self.oracle
                .finish(called, Some(Verdict::Failure), None, self.now, drawn);
        } else {
            permit.finish(verdict, hold.map(Duration::from_nanos), || at);
            self.oracle.finish(called, verdict, hold, self.now, drawn);
        }
    }

    fn let_pass(&mut self, dice: &mut Dice) {
        let half_open = self.oracle.rules.half_open_ms * MS;
        let slow = self.oracle.rules.slow_ms * MS;
        let until = self.oracle.until.unwrap_or(self.now);
        let span = match self.oracle.rules.window {
            Kept::Calls(_) => None,
            Kept::Time(ms) => Some(ms * MS / 10),
        };
        let to = match dice.roll(12) {
            0..=2 => self.now + dice.roll(50 * MS),
            3 => self.now + dice.roll(5000 * MS),
            4 => until - 1,
            5 => until,
            6 => until + 1,
            7 => self.now + slow,
            8 => self.now + slow.saturating_sub(1),
            9 => self.now + half_open,
            // A span of the window ends; or so many that it is empty.
            10 => {
                let span = span.unwrap_or(1000 * MS);
                let spans = dice.one_of([1, 1, 9, 10, 160]);
                (self.now / span + spans) * span
            }
            // Another thread has read the clock before.
            _ => match span {
                Some(span) => self.latest - dice.roll(5) * span,
                None => self.now - dice.roll(self.now / 2),
            },
        };
        let least = span.map_or(0, |span| self.latest.saturating_sub(5 * span));
        self.now = to.max(least);
        self.off_the_edge();
        self.latest = self.latest.max(self.now);
        let _ = writeln!(self.log, "{} now", self.now);
    }

    /// Spans are shorter than a tenth by a hair, of which the oracle has not
    /// heard: no call just before the end of one.
    fn off_the_edge(&mut self) {
        if let Kept::Time(ms) = self.oracle.rules.window {
            let span = ms * MS / 10;
            let left = span - self.now % span;
            if left < 1000 {
                self.now += left;
            }
        }
    }

    fn step(&mut self, random: u64, others: &[Rules]) {
        let mut dice = Dice(random);
        self.draw.store(dice.roll(4), Relaxed);
        let (at, drawn) = (self.at(), self.drawn());
        let cell = self.lease.cell;
        match dice.roll(32) {
            0..=5 => self.call(),
            6..=10 if !self.calls.is_empty() => {
                let index = dice.roll(self.calls.len() as u64) as usize;
                let verdict = dice.verdict();
                let panics = dice.roll(10) == 0;
                let hold = if dice.roll(8) == 0 { dice.wait() } else { None };
                self.finish(index, verdict, hold, panics);
            }
            11 if !self.calls.is_empty() => {
                let index = dice.roll(self.calls.len() as u64) as usize;
                let (permit, called) = &mut self.calls[index];
                permit.arrived_at(|| at);
                self.oracle.arrived(called, self.now);
            }
            // Several of a kind, that come and go.
            6..=18 => {
                let verdict = dice.verdict();
                for _ in 0..=dice.roll(8) {
                    let before = self.calls.len();
                    self.call();
                    if self.calls.len() > before {
                        self.finish(before, verdict, None, false);
                    }
                }
            }
            19..=26 => {
                self.let_pass(&mut dice);
                if dice.roll(2) == 0 {
                    // Nobody looks: the next step finds what it finds.
                    return;
                }
            }
            27 => {
                let (to, wait) = (dice.state(), dice.wait());
                let cause = dice.one_of([Cause::Manual, Cause::Remote]);
                let _ = writeln!(self.log, "{} to {to:?}, {wait:?}, {cause:?}", self.now);
                let ours = cell.bring_about(to, wait.map(Duration::from_nanos), cause, at);
                let theirs = self.oracle.bring_about(to, wait, cause, self.now, drawn);
                assert_eq!(ours.is_ok(), theirs);
            }
            28 => {
                let _ = writeln!(self.log, "{} reset", self.now);
                cell.reset(at);
                self.oracle.reset(self.now, drawn);
            }
            29 => {
                let outlook = cell.outlook(at);
                let _ = writeln!(self.log, "{} outlook {outlook:?}", self.now);
                assert_eq!(outlook, self.oracle.outlook(self.now, drawn));
            }
            30 => {
                let state = cell.state(|| at);
                self.oracle.catch_up(self.now, drawn);
                assert_eq!(state, self.oracle.state);
            }
            _ if dice.roll(4) == 0 => {
                let rules = &others[dice.roll(others.len() as u64) as usize];
                let _ = writeln!(self.log, "{} configure {rules:?}", self.now);
                cell.catch_up(at);
                let news = cell.set_plan(rules.settings().plan().unwrap(), at);
                cell.tell(news);
                self.oracle.configure(rules.clone(), self.now, drawn);
                self.latest = self.now;
                self.off_the_edge();
            }
            _ => {}
        }
        self.compare();
    }

    fn compare(&mut self) {
        let drawn = self.drawn();
        let ours = self.lease.cell.view(self.at());
        let theirs = self.oracle.view(self.now, drawn);
        assert_eq!(ours, theirs);
        let heard = std::mem::take(&mut *self.heard.lock().unwrap());
        let expected = std::mem::take(&mut self.oracle.told_events);
        assert_eq!(heard, expected);
    }
}

/// Says what was done when it fails.
fn run(rules: &[Rules], schedule: &[u64]) -> Result<(), TestCaseError> {
    let mut pair = Pair::new(rules[0].clone());
    for &random in schedule {
        let step = || pair.step(random, rules);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(step)) {
            let why = panic
                .downcast_ref::<String>()
                .map_or("a step panicked", String::as_str);
            return Err(TestCaseError::fail(format!("{}{why}", pair.log)));
        }
    }
    Ok(())
}

prop_compose! {
    /// `rates`: whether the failure rate and the slow calls are rules.
    fn rules(
        runs: BoxedStrategy<u32>,
        rates: BoxedStrategy<(bool, bool)>,
        kept: BoxedStrategy<Kept>,
    )(
        in_a_row in runs,
        (fails, slows) in rates,
        window in kept,
        failure_pct in prop_oneof![1u64..=100, Just(50), Just(100)],
        slow_pct in prop_oneof![1u64..=100, Just(50)],
        slow_ms in prop_oneof![Just(1u64), Just(20), Just(300)],
        minimum in 1u64..25,
        reset_ms in prop_oneof![Just(1u64), Just(100), Just(1000)],
        (doubles, ceiling, jitters, decay_ms) in (
            any::<bool>(),
            1u64..100,
            any::<bool>(),
            prop_oneof![Just(None), Just(Some(0)), Just(Some(400))],
        ),
        (probes, at_once, tolerated) in (1u32..=5).prop_flat_map(|probes| {
            let probes = if probes == 5 { 255 } else { probes };
            (Just(probes), 1..=probes, 0..probes)
        }),
        half_open_ms in prop_oneof![Just(1u64), Just(50), Just(1500)],
        count_drops: bool,
    ) -> Rules {
        Rules {
            in_a_row,
            failure_pct: if fails { failure_pct } else { 0 },
            slow_ms,
            slow_pct: if slows { slow_pct } else { 0 },
            window,
            minimum: match window {
                Kept::Calls(calls) => minimum.min(calls.into()),
                Kept::Time(_) => minimum,
            },
            reset_ms,
            doubles,
            max_ms: reset_ms * ceiling,
            jitters,
            decay_ms,
            probes,
            at_once,
            tolerated,
            half_open_ms,
            count_drops,
        }
    }
}

fn some_run() -> BoxedStrategy<u32> {
    (1u32..8).boxed()
}

fn calls() -> BoxedStrategy<Kept> {
    prop_oneof![1u32..40, Just(100), Just(4096)]
        .prop_map(Kept::Calls)
        .boxed()
}

fn time() -> BoxedStrategy<Kept> {
    prop_oneof![Just(100u64), Just(250), Just(1000), Just(10_000)]
        .prop_map(Kept::Time)
        .boxed()
}

fn some_rate() -> BoxedStrategy<(bool, bool)> {
    prop_oneof![Just((true, false)), Just((false, true)), Just((true, true))].boxed()
}

fn any_rules() -> impl Strategy<Value = Rules> {
    prop_oneof![
        rules(some_run(), Just((false, false)).boxed(), calls()),
        rules(Just(0).boxed(), some_rate(), calls()),
        rules(Just(0).boxed(), some_rate(), time()),
        rules(
            (0u32..6).boxed(),
            some_rate(),
            prop_oneof![calls(), time()].boxed()
        ),
    ]
}

fn schedule() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(any::<u64>(), 60..140)
}

proptest! {
    // In all 12,000 schedules of about a hundred steps.
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn failures_in_a_row_go_as_the_oracle_says(
        rules in rules(some_run(), Just((false, false)).boxed(), calls()),
        schedule in schedule(),
    ) {
        run(&[rules], &schedule)?;
    }

    #[test]
    fn rates_over_calls_go_as_the_oracle_says(
        rules in rules(Just(0).boxed(), some_rate(), calls()),
        schedule in schedule(),
    ) {
        run(&[rules], &schedule)?;
    }

    #[test]
    fn rates_over_time_go_as_the_oracle_says(
        rules in rules(Just(0).boxed(), some_rate(), time()),
        schedule in schedule(),
    ) {
        run(&[rules], &schedule)?;
    }

    #[test]
    fn all_rules_and_changes_of_them_go_as_the_oracle_says(
        rules in prop::collection::vec(any_rules(), 2..4),
        schedule in schedule(),
    ) {
        run(&rules, &schedule)?;
    }
}
