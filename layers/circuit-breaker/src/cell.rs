//! The state of one breaker, and every change of it.
//!
//! ```text
//! admit ──▶ word ──▶ ticket { generation } ─ ─ call ─ ─ ▶ record ──▶ same generation?
//!            │                                                        │ no: nothing
//!            │ open, and due                                          ▼ yes
//!            └──────────▶ lock ──▶ next generation ◀── a rule holds ── windows, failures in a row
//! ```
//!
//! A closed call loads one word when it comes and again when it is done. What
//! is counted is counted with atomics; the state itself only changes under the
//! lock, which then writes the deadline first and the word last, so that who
//! has read the word of a generation finds its deadline.
//!
//! Cells are never freed but used again, in later generations: so a call in
//! flight refers to its breaker by a plain reference and no count that threads
//! would fight over. A cell that was used again knows a late call by its
//! generation, as every breaker does.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    task::Waker,
    time::Duration,
};

use buttress_core::{
    clock::Instant,
    random::SharedRandom,
    sync::{
        Mutex, MutexGuard, Padded,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
};

use crate::{
    Cause, Event, Reason, Rule, State, Transition, TransitionError,
    event::Listener,
    metrics::Metrics,
    settings::Plan,
    window::{CallWindow, Epochs, Mark, Sums, TimeWindow},
    word::{Counts, Probes, Word},
};

/// When nothing is due.
const NEVER: Instant = Instant::from_nanos(u64::MAX);

/// How soon a refused call may find a place among the probes: nobody can tell,
/// but asking more often than this helps nobody.
const PROBE_PLACE: Duration = Duration::from_secs(1);

/// Who hears of a breaker.
pub(crate) struct Observer {
    pub(crate) name: Arc<str>,
    pub(crate) listeners: Box<[Listener]>,
    pub(crate) metrics: Metrics,
}

impl Observer {
    pub(crate) fn tell(&self, event: &Event) {
        self.metrics.event(event);
        for listener in &self.listeners {
            listener(&self.name, event);
        }
    }
}

/// The settings as a call reads them. Torn reads during a change do no harm:
/// it begins a new generation, and what was decided by a mixture is void.
struct Params {
    in_a_row: AtomicU32,
    failure_ppm: AtomicU32,
    slow_ppm: AtomicU32,
    minimum: AtomicU32,
    calls: AtomicU32,
    /// Probes, those at once, those that may fail, and whether dropped ones
    /// count: 8 bits each.
    probes: AtomicU32,
    epochs: AtomicU64,
    slow_nanos: AtomicU64,
}

struct Hot {
    word: AtomicU64,
    /// The end of open, or of half-open. Written before the word.
    until: AtomicU64,
    params: Params,
}

struct Cold {
    /// Which of its owners the cell belongs to.
    tenancy: u32,
    observer: Option<Arc<Observer>>,
    plan: Option<Plan>,
    random: SharedRandom,
    since: Instant,
    /// Openings that are not forgotten.
    level: u32,
    waiters: Vec<(u64, Waker)>,
}

pub(crate) struct Cell {
    hot: Padded<Hot>,
    calls: OnceLock<CallWindow>,
    time: OnceLock<TimeWindow>,
    cold: Padded<Mutex<Cold>>,
}

/// Leave to call, from a generation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    pub(crate) generation: u32,
    pub(crate) kind: Kind,
    /// Whether the call is to be timed.
    pub(crate) timed: bool,
    /// Whether someone hears of the call.
    pub(crate) observed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Call,
    Probe,
    /// Counts as nothing.
    Free,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rejection {
    pub(crate) reason: Reason,
    pub(crate) retry_after: Option<Duration>,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done(Mark),
    /// Given up on, after it had run past the slow limit.
    DroppedSlow,
    /// Says nothing.
    Nothing,
}

/// What a breaker looks like from outside.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct View {
    pub(crate) state: State,
    pub(crate) generation: u32,
    pub(crate) since: Instant,
    pub(crate) until: Option<Instant>,
    pub(crate) in_a_row: u32,
    pub(crate) sums: Sums,
    pub(crate) probes: Probes,
}

/// Whether a call would pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outlook {
    Passes,
    /// Not before this, if nothing else happens; `None` if only a change by
    /// hand helps.
    Waits(Option<Instant>),
}

/// What is to be told after unlocking.
#[must_use = "it must be told"]
struct News {
    observer: Option<Arc<Observer>>,
    event: Option<Event>,
    wakers: Vec<(u64, Waker)>,
}

impl Cell {
    fn new() -> Self {
        let number = || AtomicU32::new(0);
        Self {
            hot: Padded(Hot {
                word: AtomicU64::new(Word::new(0).0),
                until: AtomicU64::new(NEVER.as_nanos()),
                params: Params {
                    in_a_row: number(),
                    failure_ppm: number(),
                    slow_ppm: number(),
                    minimum: number(),
                    calls: number(),
                    probes: number(),
                    epochs: AtomicU64::new(0),
                    slow_nanos: AtomicU64::new(0),
                },
            }),
            calls: OnceLock::new(),
            time: OnceLock::new(),
            cold: Padded(Mutex::new(Cold {
                tenancy: 0,
                observer: None,
                plan: None,
                random: SharedRandom::default(),
                since: Instant::from_nanos(0),
                level: 0,
                waiters: Vec::new(),
            })),
        }
    }

    #[inline]
    fn word(&self) -> Word {
        Word(self.hot.word.load(Acquire))
    }

    fn until(&self) -> Instant {
        Instant::from_nanos(self.hot.until.load(Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Cold> {
        self.cold.lock()
    }

    // ---- A call comes.

    /// Lets a call pass or not. Every ticket must be recorded, or given back.
    #[inline]
    pub(crate) fn admit(&self, now: impl Fn() -> Instant) -> Result<Ticket, Rejection> {
        let word = self.word();
        if word.state().counts() {
            return Ok(Ticket::of(word, Kind::Call));
        }
        self.admit_unless_open(word, now)
    }

    fn admit_unless_open(
        &self,
        mut word: Word,
        now: impl Fn() -> Instant,
    ) -> Result<Ticket, Rejection> {
        loop {
            match word.state() {
                State::Closed | State::MetricsOnly => return Ok(Ticket::of(word, Kind::Call)),
                State::ForcedClosed => return Ok(Ticket::of(word, Kind::Free)),
                State::ForcedOpen => {
                    return Err(Rejection {
                        reason: Reason::ForcedOpen,
                        retry_after: None,
                    });
                }
                State::Open => {
                    let now = now();
                    let until = self.until();
                    if self.word().generation() != word.generation() {
                        // That was another generation's.
                    } else if now < until {
                        return Err(Rejection {
                            reason: Reason::Open,
                            retry_after: Some(until - now),
                        });
                    } else if let Some(ticket) = self.begin_probing(word.generation(), now) {
                        return Ok(ticket);
                    }
                }
                State::HalfOpen => {
                    let now = now();
                    let until = self.until();
                    if self.word().generation() != word.generation() {
                    } else if now >= until {
                        self.overdue(word.generation(), now);
                    } else {
                        let [most, at_once, ..] = self.probes();
                        let mut probes = word.probes();
                        let asked = u32::from(probes.in_flight)
                            + u32::from(probes.good)
                            + u32::from(probes.failed);
                        if probes.in_flight >= at_once || asked >= u32::from(most) {
                            return Err(Rejection {
                                reason: Reason::HalfOpen,
                                retry_after: Some(PROBE_PLACE.min(until - now)),
                            });
                        }
                        probes.in_flight += 1;
                        if self.swap(word, word.with_probes(probes)) {
                            return Ok(Ticket::of(word, Kind::Probe));
                        }
                    }
                }
            }
            word = self.word();
        }
    }

    /// Whether a call would pass now, without a place being taken.
    pub(crate) fn outlook(&self, now: Instant) -> Outlook {
        loop {
            let word = self.word();
            let until = self.until();
            if self.word().generation() != word.generation() {
                continue;
            }
            return match word.state() {
                State::Closed | State::MetricsOnly | State::ForcedClosed => Outlook::Passes,
                State::ForcedOpen => Outlook::Waits(None),
                State::Open if now >= until => Outlook::Passes,
                State::Open => Outlook::Waits(Some(until)),
                State::HalfOpen if now >= until => {
                    self.overdue(word.generation(), now);
                    continue;
                }
                State::HalfOpen => {
                    let [most, at_once, ..] = self.probes();
                    let probes = word.probes();
                    let asked = u32::from(probes.in_flight)
                        + u32::from(probes.good)
                        + u32::from(probes.failed);
                    if probes.in_flight < at_once && asked < u32::from(most) {
                        Outlook::Passes
                    } else {
                        Outlook::Waits(Some(until))
                    }
                }
            };
        }
    }

    fn probes(&self) -> [u8; 4] {
        self.hot.params.probes.load(Relaxed).to_le_bytes()
    }

    fn swap(&self, from: Word, to: Word) -> bool {
        self.hot
            .word
            .compare_exchange(from.0, to.0, AcqRel, Acquire)
            .is_ok()
    }

    // ---- A call ends.

    /// Records how a call went. `hold` is how long the callee asks to be left
    /// alone.
    #[inline]
    pub(crate) fn record(
        &self,
        ticket: Ticket,
        outcome: Outcome,
        hold: Option<Duration>,
        now: impl Fn() -> Instant,
    ) {
        let word = self.word();
        if word.generation() != ticket.generation {
            return;
        }
        match (ticket.kind, outcome) {
            (Kind::Call, Outcome::Done(mark)) if mark.is_good() && hold.is_none() => {
                if word.in_a_row() != 0 {
                    self.end_run(ticket.generation);
                }
                if word.counts() != Counts::Nowhere {
                    self.note(word, mark, &now);
                    if word.is_armed() {
                        self.judge(word, &now);
                    }
                }
            }
            (Kind::Free, _) | (Kind::Call, Outcome::Nothing) => {}
            (Kind::Call, outcome) => self.record_bad(word, outcome, hold, now),
            (Kind::Probe, outcome) => self.record_probe(ticket, outcome, hold, now),
        }
    }

    #[inline]
    fn note(&self, word: Word, mark: Mark, now: impl Fn() -> Instant) {
        let params = &self.hot.params;
        match word.counts() {
            Counts::Nowhere => {}
            Counts::Calls => {
                if let Some(window) = self.calls.get() {
                    window.note(word.generation(), params.calls.load(Relaxed), mark);
                }
            }
            Counts::Time => {
                if let Some(window) = self.time.get() {
                    let epoch = Epochs(params.epochs.load(Relaxed)).at(now());
                    window.note(word.generation(), epoch, mark);
                }
            }
        }
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
        let (mark, decides) = match outcome {
            Outcome::Done(mark) => (mark, true),
            Outcome::DroppedSlow => (
                Mark {
                    failed: false,
                    slow: true,
                },
                false,
            ),
            Outcome::Nothing => return,
        };
        let mut rule = None;
        if mark.failed {
            if self.run_is_full(word.generation()) {
                rule = Some(Rule::ConsecutiveFailures);
            }
        } else if decides {
            self.end_run(word.generation());
        }
        if word.counts() != Counts::Nowhere {
            self.note(word, mark, &now);
            rule = rule.or_else(|| self.reached(word, &now));
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
    fn judge(&self, word: Word, now: &impl Fn() -> Instant) {
        if let Some(rule) = self.reached(word, now) {
            self.trip(word.generation(), rule, None, now());
        }
    }

    /// The rule whose rate is reached, with calls enough; notes where only
    /// calls are lacking.
    fn reached(&self, word: Word, now: &impl Fn() -> Instant) -> Option<Rule> {
        let params = &self.hot.params;
        let sums = self.sums(word, now);
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
        self.arm(word.generation(), rule.is_some() && !enough);
        rule.filter(|_| enough)
    }

    fn sums(&self, word: Word, now: impl Fn() -> Instant) -> Sums {
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

    fn arm(&self, generation: u32, armed: bool) {
        let mut word = self.word();
        while word.generation() == generation && word.is_armed() != armed {
            if self.swap(word, word.with_armed(armed)) {
                return;
            }
            word = self.word();
        }
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
            Outcome::Done(mark) => Some(!mark.is_good() || hold.is_some()),
            Outcome::DroppedSlow if count_drops != 0 => Some(true),
            Outcome::DroppedSlow | Outcome::Nothing => None,
        };
        loop {
            let word = self.word();
            if word.generation() != ticket.generation {
                return;
            }
            let mut probes = word.probes();
            probes.in_flight = probes.in_flight.saturating_sub(1);
            let Some(failed) = failed else {
                if self.swap(word, word.with_probes(probes)) {
                    if word.is_waited_for() {
                        self.wake(ticket.generation);
                    }
                    return;
                }
                continue;
            };
            let now = now();
            let until = self.until();
            if self.word().generation() != word.generation() {
                return;
            }
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
                self.reopen(ticket.generation, hold, now);
            } else if probes.good >= most - tolerated {
                self.close_probed(ticket.generation, now);
            } else if word.is_waited_for() {
                self.wake(ticket.generation);
            }
            return;
        }
    }

    // ---- The state changes.

    /// Begins the next generation. The lock is held, so that no other begins.
    fn publish(
        &self,
        cold: &mut Cold,
        next: Word,
        until: Instant,
        at: Instant,
        cause: Cause,
        wait: Option<Duration>,
    ) -> News {
        let from = self.word().state();
        if next.state().counts() {
            // Before the word, after which calls are counted.
            if let Some(window) = self.calls.get() {
                window.clear(next.generation());
            }
            if let Some(window) = self.time.get() {
                window.clear();
            }
        }
        self.hot.until.store(until.as_nanos(), Relaxed);
        // Others change this word too, but only from what they have read in
        // this generation: their exchange fails.
        self.hot.word.store(next.0, Release);
        let to = next.state();
        let changed = from != to;
        if changed {
            cold.since = at;
        }
        News {
            observer: cold.observer.clone(),
            event: changed.then_some(Event::StateChange(Transition {
                from,
                to,
                generation: next.generation(),
                at,
                cause,
                wait,
            })),
            wakers: std::mem::take(&mut cold.waiters),
        }
    }

    fn tell(&self, news: News) {
        let News {
            observer,
            event,
            wakers,
        } = news;
        for (_, waker) in wakers {
            waker.wake();
        }
        let (Some(observer), Some(event)) = (observer, event) else {
            return;
        };
        if let Event::StateChange(change) = &event {
            trace(&observer.name, change);
            // The gauge shows the latest state, whoever is the last to set it.
            loop {
                let state = self.word().state();
                observer.metrics.state(state);
                if self.word().state() == state {
                    break;
                }
            }
        }
        observer.tell(&event);
    }

    /// The first caller after the wait begins to probe, with a place taken.
    #[cold]
    fn begin_probing(&self, generation: u32, now: Instant) -> Option<Ticket> {
        let mut cold = self.lock();
        let word = self.word();
        if word.generation() != generation {
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
        self.tell(news);
        Some(Ticket::of(next, Kind::Probe))
    }

    /// Opens, from closed; or tells that it would have.
    #[cold]
    fn trip(&self, generation: u32, rule: Rule, hold: Option<Duration>, now: Instant) {
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
                observer: cold.observer.clone(),
                event: Some(Event::WouldOpen(rule)),
                wakers: Vec::new(),
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
                cold.level = cold.level.saturating_add(1);
                wait.max(hold.unwrap_or_default())
            }
        };
        self.publish(
            cold,
            word.next(State::Open),
            at + wait,
            at,
            cause,
            Some(wait),
        )
    }

    /// Half-open was undecided for too long. It has been open since then.
    #[cold]
    fn overdue(&self, generation: u32, now: Instant) {
        let draw = self.draw();
        let mut cold = self.lock();
        let word = self.word();
        let until = self.until();
        if word.generation() != generation || word.state() != State::HalfOpen || now < until {
            return;
        }
        let news = self.open(&mut cold, Cause::ProbesOverdue, None, until, draw);
        drop(cold);
        self.tell(news);
    }

    #[cold]
    fn reopen(&self, generation: u32, hold: Option<Duration>, now: Instant) {
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
    fn close_probed(&self, generation: u32, now: Instant) {
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
        let draw = self.draw();
        let mut cold = self.lock();
        let word = self.word();
        let from = word.state();
        let sense = match to {
            State::Open => matches!(from, State::Closed | State::HalfOpen),
            State::HalfOpen => from == State::Open,
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
            to => self.publish(&mut cold, word.next(to), NEVER, now, cause, None),
        };
        drop(cold);
        self.tell(news);
        Ok(())
    }

    /// Closed, empty and automatic, from whatever state.
    pub(crate) fn reset(&self, now: Instant) {
        let mut cold = self.lock();
        cold.level = 0;
        cold.since = now;
        let next = self.word().next(State::Closed);
        let news = self.publish(&mut cold, next, NEVER, now, Cause::Manual, None);
        drop(cold);
        self.tell(news);
    }

    // ---- Settings, and who looks on.

    /// New settings. The state stays, with the wait that it had; what was
    /// counted, and the calls in flight, count no more.
    pub(crate) fn set_plan(&self, plan: Plan, now: Instant) {
        let mut cold = self.lock();
        let word = self.word();
        let until = match word.state() {
            State::HalfOpen => now + plan.half_open,
            _ => self.until(),
        };
        let next = self.settle(&mut cold, plan, word.next(word.state()));
        let news = self.publish(&mut cold, next, until, now, Cause::Manual, None);
        drop(cold);
        self.tell(news);
    }

    /// Writes the settings, and into the word what it says of them.
    fn settle(&self, cold: &mut Cold, plan: Plan, word: Word) -> Word {
        let params = &self.hot.params;
        let nanos = |span: Duration| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
        params.in_a_row.store(plan.in_a_row, Relaxed);
        params.failure_ppm.store(plan.failure_ppm, Relaxed);
        params.slow_ppm.store(plan.slow_ppm, Relaxed);
        params.slow_nanos.store(nanos(plan.slow), Relaxed);
        params.minimum.store(plan.minimum, Relaxed);
        match plan.window {
            crate::Window::Calls(calls) => params.calls.store(calls, Relaxed),
            crate::Window::Time(span) => params.epochs.store(Epochs::of(span).0, Relaxed),
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

    pub(crate) fn state(&self) -> State {
        self.word().state()
    }

    pub(crate) fn view(&self, now: Instant) -> View {
        let word = self.word();
        if word.state() == State::HalfOpen && now >= self.until() {
            self.overdue(word.generation(), now);
        }
        let cold = self.lock();
        let word = self.word();
        let state = word.state();
        let until = self.until();
        View {
            state,
            generation: word.generation(),
            since: cold.since,
            until: (until != NEVER).then_some(until),
            in_a_row: if state.counts() { word.in_a_row() } else { 0 },
            sums: self.sums(word, || now),
            probes: if state == State::HalfOpen {
                word.probes()
            } else {
                Probes::default()
            },
        }
    }

    // ---- Waiting for a change.

    /// Has `waker` woken at the next change, or when a probe's place is free.
    /// Look at the [`outlook`](Self::outlook) again after this.
    pub(crate) fn wait(&self, id: u64, waker: &Waker) {
        let mut cold = self.lock();
        match cold.waiters.iter_mut().find(|(other, _)| *other == id) {
            Some((_, old)) => old.clone_from(waker),
            None => cold.waiters.push((id, waker.clone())),
        }
        self.set_waited_for(true);
    }

    pub(crate) fn stop_waiting(&self, id: u64) {
        let mut cold = self.lock();
        let gone = cold
            .waiters
            .iter()
            .position(|(other, _)| *other == id)
            .map(|index| cold.waiters.swap_remove(index));
        drop(cold);
        drop(gone);
    }

    /// Under the lock.
    fn set_waited_for(&self, waited_for: bool) {
        loop {
            let word = self.word();
            if word.is_waited_for() == waited_for || self.swap(word, word.with_waiters(waited_for))
            {
                return;
            }
        }
    }

    #[cold]
    fn wake(&self, generation: u32) {
        let mut cold = self.lock();
        if self.word().generation() != generation {
            return;
        }
        self.set_waited_for(false);
        let wakers = std::mem::take(&mut cold.waiters);
        drop(cold);
        for (_, waker) in wakers {
            waker.wake();
        }
    }
}

impl Ticket {
    #[inline]
    const fn of(word: Word, kind: Kind) -> Self {
        Self {
            generation: word.generation(),
            kind,
            timed: word.is_timed(),
            observed: word.is_observed(),
        }
    }
}

fn trace(name: &str, change: &Transition) {
    let Transition {
        from,
        to,
        cause,
        wait,
        ..
    } = change;
    if matches!(to, State::Open | State::ForcedOpen) {
        tracing::warn!(
            name,
            from = from.as_str(),
            to = to.as_str(),
            ?cause,
            ?wait,
            "circuit breaker opened"
        );
    } else {
        tracing::info!(
            name,
            from = from.as_str(),
            to = to.as_str(),
            ?cause,
            "circuit breaker changed"
        );
    }
}

impl fmt::Debug for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cell")
            .field("word", &self.word())
            .finish_non_exhaustive()
    }
}

/// A cell, for as long as it is one breaker's.
#[derive(Clone, Copy)]
pub(crate) struct Lease {
    pub(crate) cell: &'static Cell,
    tenancy: u32,
}

impl Lease {
    /// A closed cell of one's own, to be [given back](Self::give_back).
    pub(crate) fn take(
        observer: Arc<Observer>,
        plan: Plan,
        random: SharedRandom,
        now: Instant,
    ) -> Self {
        let cell = pool::take();
        let mut cold = cell.lock();
        cold.observer = Some(observer);
        cold.random = random;
        cold.since = now;
        cold.level = 0;
        let tenancy = cold.tenancy;
        let next = cell.settle(&mut cold, plan, cell.word().next(State::Closed));
        let news = cell.publish(&mut cold, next, NEVER, now, Cause::Manual, None);
        drop(cold);
        // A change to closed that nobody need hear of: it begins.
        drop(news);
        Self { cell, tenancy }
    }

    /// Gives the cell back. Calls in flight will find another generation.
    pub(crate) fn give_back(self) {
        let mut cold = self.cell.lock();
        cold.tenancy = cold.tenancy.wrapping_add(1);
        let next = self.cell.word().next(State::ForcedClosed);
        let now = cold.since;
        let mut news = self
            .cell
            .publish(&mut cold, next, NEVER, now, Cause::Manual, None);
        news.event = None;
        let observer = cold.observer.take();
        cold.random = SharedRandom::default();
        drop(cold);
        // Listeners are the user's: their drop does not run under the lock.
        drop(observer);
        self.cell.tell(news);
        pool::give_back(self.cell);
    }

    pub(crate) fn name(self) -> Option<Arc<str>> {
        let cold = self.cell.lock();
        let observer = cold.observer.as_ref()?;
        (cold.tenancy == self.tenancy).then(|| Arc::clone(&observer.name))
    }
}

/// Cells that are nobody's. There are never more than there were breakers at
/// one time.
#[cfg(not(buttress_loom))]
mod pool {
    use std::sync::{Mutex, PoisonError};

    use super::Cell;

    static FREE: Mutex<Vec<&'static Cell>> = Mutex::new(Vec::new());

    pub(super) fn take() -> &'static Cell {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| Box::leak(Box::new(Cell::new())))
    }

    pub(super) fn give_back(cell: &'static Cell) {
        FREE.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(cell);
    }
}

/// A model's cells must not outlive it.
#[cfg(buttress_loom)]
mod pool {
    use super::Cell;

    pub(super) fn take() -> &'static Cell {
        Box::leak(Box::new(Cell::new()))
    }

    pub(super) fn give_back(_: &'static Cell) {}
}
