//! The driver: through the phases, by deadlines that were fixed at the trigger.

use std::{
    collections::HashMap,
    future::{Future, pending, poll_fn},
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress_core::{
    BoxError,
    clock::{self, Instant},
};
use tokio::{
    task::{Id, JoinError, JoinSet},
    time::{error::Elapsed, sleep, timeout},
};
use tracing::{error, info, warn};

use crate::{
    Label, Phase, Priority, Report, Shutdown,
    current::ConnectionId,
    hook::Hook,
    ledger::Kind,
    report::{Cut, CutKind, Facts, HookOutcome, HookReport},
    shutdown::{Inner, Plan},
};

/// What is cut is dropped by others, who need a moment for it: the hooks wait
/// so long at most, or for a quarter of what is theirs.
const MOMENT: Duration = Duration::from_millis(500);

impl Shutdown {
    /// Waits for the trigger, goes through the phases, and tells what came of
    /// it.
    ///
    /// One caller drives, the others wait for the same report. Dropping the
    /// future stops the drain where it is, with what it had started of hooks
    /// and callbacks dropped; the next call goes on from there, and the
    /// deadlines are what they were.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with a timer.
    pub async fn run(&self) -> Report {
        let inner = &self.inner;
        let mut facts = inner.driver.lock().await;
        if let Some(report) = inner.report.get() {
            return report.clone();
        }
        self.reached(Phase::Draining).await;
        let plan = inner.plan.get().expect("set before the phase is");
        let report = drive(inner, plan, &mut facts).await;
        inner.report.get_or_init(|| report).clone()
    }

    /// The report, once it is [`Done`](Phase::Done).
    #[must_use]
    pub fn report(&self) -> Option<Report> {
        self.inner.report.get().cloned()
    }
}

async fn drive(inner: &Arc<Inner>, plan: &Plan, facts: &mut Facts) -> Report {
    drain(inner, plan, facts).await;
    if inner.phase() == Phase::Cut {
        let moment = MOMENT.min(inner.settings.hook_reserve / 4);
        let gone = inner.emptied(|inner| inner.books.ledger.is_idle());
        if !inner.is_forced() && timeout(moment, gone).await.is_err() {
            warn!(
                name = &*inner.name,
                requests = inner.books.ledger.open(Kind::Request),
                connections = inner.books.ledger.open(Kind::Connection),
                guards = inner.books.ledger.open(Kind::Guard),
                "what was cut is still there"
            );
        }
    }
    inner.advance(Phase::Hooks);
    hooks(inner, plan, &mut facts.hooks).await;
    done(inner, plan, facts)
}

/// To the moment when nothing is left, or the rest is cut.
async fn drain(inner: &Arc<Inner>, plan: &Plan, facts: &mut Facts) {
    if inner.phase() >= Phase::Cut {
        return;
    }
    let mut running = Running::new(&inner.name, &mut facts.callbacks);
    for callback in inner.callbacks.close() {
        running.start(callback, plan.cut - clock::now());
    }
    let finish = pin!(running.finish());
    let mut callbacks = Beside::new(finish);

    if inner.phase() < Phase::Closing {
        let delay = by(inner, plan.closing, pending::<()>());
        callbacks.with(delay).await;
        inner.advance(Phase::Closing);
    }
    if inner.phase() < Phase::Closed {
        let listeners = inner.emptied(|inner| inner.books.ledger.is_idle_of(Kind::Listener));
        match callbacks.with(by(inner, plan.cut, listeners)).await {
            Some(()) => inner.advance(Phase::Closed),
            None => listeners_left(inner),
        }
    }
    let all = async {
        callbacks.finish().await;
        inner.emptied(|inner| inner.books.ledger.is_idle()).await;
    };
    if by(inner, plan.cut, all).await.is_none() {
        (facts.requests, facts.cut) = cut(inner);
        let idle = facts.requests == 0 && facts.cut.is_empty();
        facts.deadline = !idle && !inner.is_forced();
        inner.advance(Phase::Cut);
    }
    facts.drained_after = clock::now() - plan.start;
}

/// A future that is polled while others are waited for.
struct Beside<'a, F> {
    future: Pin<&'a mut F>,
    over: bool,
}

impl<'a, F: Future<Output = ()>> Beside<'a, F> {
    fn new(future: Pin<&'a mut F>) -> Self {
        let over = false;
        Self { future, over }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.over {
            ready!(self.future.as_mut().poll(cx));
            self.over = true;
        }
        Poll::Ready(())
    }

    async fn with<G: Future>(&mut self, other: G) -> G::Output {
        let mut other = pin!(other);
        poll_fn(|cx| {
            let _ = self.poll(cx);
            other.as_mut().poll(cx)
        })
        .await
    }

    async fn finish(&mut self) {
        poll_fn(|cx| self.poll(cx)).await;
    }
}

/// The future's output, unless the deadline is there first, or force.
async fn by<F: Future>(inner: &Inner, deadline: Instant, future: F) -> Option<F::Output> {
    let late = async {
        loop {
            let left = deadline - clock::now();
            if left.is_zero() {
                return;
            }
            sleep(left).await;
        }
    };
    let (mut forced, mut future, mut late) = (pin!(inner.forced()), pin!(future), pin!(late));
    poll_fn(|cx| {
        if forced.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        late.as_mut().poll(cx).map(|()| None)
    })
    .await
}

fn listeners_left(inner: &Inner) {
    if inner.is_forced() {
        return;
    }
    let servers = inner.servers.lock().clone();
    for (_, server) in servers {
        inner.server_failed(server, "its listener was not closed in time".to_owned());
    }
}

/// Writes down what is there: the number of requests, and what has a name.
fn cut(inner: &Inner) -> (usize, Vec<Cut>) {
    let now = clock::now();
    let requests = inner.books.ledger.open(Kind::Request);
    let tracked = inner.tracked.snapshot();
    let mut named = HashMap::<_, usize>::new();
    for id in tracked.iter().filter_map(|request| request.connection) {
        *named.entry(id).or_default() += 1;
    }
    let tracked = tracked.into_iter().map(|request| Cut {
        kind: CutKind::Request,
        label: Some(request.route),
        age: now - request.since,
        bytes: Some(request.bytes),
    });
    let mut all: Vec<_> = tracked.collect();

    let connections = inner.connections.lock().clone();
    for (_, connection) in &connections {
        let tunnels = connection.tunnels();
        let requests = named
            .get(&ConnectionId::of(connection))
            .copied()
            .unwrap_or(0);
        // What it is busy with is there already, or will be.
        let kind = CutKind::of(connection.state()).filter(|kind| {
            *kind != CutKind::Connection || !connection.is_named_by(requests + tunnels.len())
        });
        all.extend(kind.map(|kind| Cut {
            kind,
            label: connection.route(),
            age: now - connection.since,
            bytes: Some(connection.bytes()),
        }));
        all.extend(tunnels.into_iter().map(|tunnel| Cut {
            kind: CutKind::Tunnel,
            label: tunnel.label,
            age: now - tunnel.since,
            bytes: Some(connection.bytes()),
        }));
    }

    let guards = inner.guards.lock().clone();
    all.extend(guards.into_iter().map(|(_, guard)| Cut {
        kind: CutKind::Guard,
        label: Some(guard.label),
        age: now - guard.since,
        bytes: None,
    }));

    for cut in &all {
        warn!(
            name = &*inner.name,
            kind = cut.kind.as_str(),
            route = cut.label.as_ref().map(tracing::field::display),
            age_ms = millis(cut.age),
            bytes = cut.bytes,
            "cut off"
        );
        inner.metrics.cut(cut.kind.as_str(), 1);
    }
    let known = all.iter().filter(|cut| cut.kind == CutKind::Request);
    let unknown = requests.saturating_sub(known.count());
    if unknown > 0 {
        let name = &*inner.name;
        warn!(name, requests = unknown, "cut off, not tracked");
        inner.metrics.cut(CutKind::Request.as_str(), unknown as u64);
    }
    (requests, all)
}

/// By priority, each within its limit and all within what is left.
async fn hooks(inner: &Inner, plan: &Plan, reports: &mut Vec<HookReport>) {
    loop {
        let group = inner.hooks.take_or_close(highest);
        if group.is_empty() {
            return;
        }
        let left = plan.end - clock::now();
        if inner.is_forced() || left.is_zero() {
            for hook in group {
                tell(&inner.name, reports, skipped(hook));
            }
            continue;
        }
        let mut running = Running::new(&inner.name, reports);
        for hook in group {
            let limit = hook.limit.unwrap_or(inner.settings.hook_limit);
            running.start(hook, limit.min(left));
        }
        // A hook that blocks its thread heeds no limit of its own.
        let _ = by(inner, plan.end, running.finish()).await;
    }
}

/// Those of the highest priority there is, in the order of their registration.
fn highest(hooks: &mut Vec<Hook>) -> Vec<Hook> {
    let priority = hooks.iter().map(|hook| hook.priority).max();
    let (now, later) = mem::take(hooks)
        .into_iter()
        .partition(|hook| Some(hook.priority) == priority);
    *hooks = later;
    now
}

fn skipped(hook: Hook) -> HookReport {
    HookReport {
        name: hook.name,
        priority: hook.priority,
        took: Duration::ZERO,
        outcome: HookOutcome::Skipped,
    }
}

fn tell(name: &str, reports: &mut Vec<HookReport>, report: HookReport) {
    let HookReport {
        name: hook,
        priority,
        took,
        outcome,
    } = &report;
    let (result, took_ms) = (outcome.as_str(), millis(*took));
    match outcome {
        HookOutcome::Done => info!(name, %hook, priority = priority.0, took_ms, result, "hook"),
        HookOutcome::Failed(why) | HookOutcome::Panicked(why) => {
            error!(name, %hook, priority = priority.0, took_ms, result, why, "hook");
        }
        HookOutcome::TimedOut | HookOutcome::Skipped => {
            warn!(name, %hook, priority = priority.0, took_ms, result, "hook");
        }
    }
    reports.push(report);
}

fn done(inner: &Inner, plan: &Plan, facts: &mut Facts) -> Report {
    facts.reason = plan.reason.clone();
    facts.took = clock::now() - plan.start;
    facts.forced = inner.is_forced();
    facts.failures.clone_from(&inner.failed.lock());
    let hooks = facts.hooks.iter().chain(&facts.callbacks);
    let cut = hooks.filter(|hook| hook.is_cut()).count();
    inner.metrics.cut("hook", cut as u64);
    inner.metrics.took(facts.took);
    let report = Report::new(facts.clone());
    // There before anybody who waits for the phase looks for it.
    let report = inner.report.get_or_init(|| report).clone();
    inner.disarm();
    inner.advance(Phase::Done);
    info!(
        name = &*inner.name,
        took_ms = millis(report.took()),
        exit_code = report.exit_code(),
        "shut down"
    );
    report
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// Hooks on tasks of their own: a panic of one is nobody else's. Those that are
/// left when this is dropped are dropped, too, and written down.
struct Running<'a> {
    /// The shutdown's.
    name: &'a str,
    reports: &'a mut Vec<HookReport>,
    tasks: JoinSet<Result<Result<(), BoxError>, Elapsed>>,
    known: HashMap<Id, Known>,
}

type Known = (Label, Priority, Instant);

impl<'a> Running<'a> {
    fn new(name: &'a str, reports: &'a mut Vec<HookReport>) -> Self {
        Self {
            name,
            reports,
            tasks: JoinSet::new(),
            known: HashMap::new(),
        }
    }

    fn start(&mut self, hook: Hook, limit: Duration) {
        let Hook {
            name,
            priority,
            action,
            ..
        } = hook;
        let start = clock::now();
        // Made in the task, since making it may panic, too.
        let running = timeout(limit, async { action().await });
        let task = self.tasks.spawn(running);
        self.known.insert(task.id(), (name, priority, start));
    }

    /// Waits for all of them. Whoever is dropped meanwhile has lost nothing.
    async fn finish(&mut self) {
        while let Some(ended) = self.tasks.join_next_with_id().await {
            let (id, outcome) = match ended {
                Ok((id, Ok(Ok(())))) => (id, HookOutcome::Done),
                Ok((id, Ok(Err(error)))) => (id, HookOutcome::Failed(error.to_string())),
                Ok((id, Err(_))) => (id, HookOutcome::TimedOut),
                Err(error) => (error.id(), panicked(error)),
            };
            if let Some(known) = self.known.remove(&id) {
                tell(self.name, self.reports, report(known, outcome));
            }
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        for (_, known) in self.known.drain() {
            tell(
                self.name,
                self.reports,
                report(known, HookOutcome::TimedOut),
            );
        }
    }
}

fn report(known: Known, outcome: HookOutcome) -> HookReport {
    let (name, priority, start) = known;
    HookReport {
        name,
        priority,
        took: clock::now() - start,
        outcome,
    }
}

fn panicked(error: JoinError) -> HookOutcome {
    let Ok(panic) = error.try_into_panic() else {
        return HookOutcome::TimedOut;
    };
    let message = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    // What a panic carries may panic when it is dropped.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(panic)));
    HookOutcome::Panicked(message.unwrap_or_else(|| "no message".to_owned()))
}
