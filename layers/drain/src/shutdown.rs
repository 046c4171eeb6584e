//! The shutdown: a value that all who take part in it share.

use std::{
    borrow::Cow,
    fmt,
    future::Future,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use buttress_core::{
    clock::{self, Instant},
    health::{Readiness, ReadinessGate},
    sync::Mutex,
};
use slab::Slab;
use tokio::sync::Notify;
use tracing::{error, info, warn};

use crate::{
    ConnectionGuard, DrainSignal, Guard, Hook, HookOutput, Label, Phase, Reached, Report,
    ServerGuard, ShutdownBuilder,
    books::Books,
    config::Settings,
    guard::{Connection, Guarded},
    ledger::Kind,
    metrics::Metrics,
    report::{Facts, Failure},
    tracked::Tracked,
    watchdog::Watchdog,
};

/// A shutdown: what is asked for it, how far it has got, and who is still
/// there. The [crate's front page](crate) shows it at work.
///
/// A cheap clone of it is the same one. It is no global: a process has as many
/// as it makes, most often one.
#[derive(Clone)]
pub struct Shutdown {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    /// For logs, as the metrics have it.
    pub(crate) name: Arc<str>,
    pub(crate) books: &'static Books,
    pub(crate) settings: Settings,
    /// Set before the phase is: who sees a drain sees its plan.
    pub(crate) plan: OnceLock<Plan>,
    reached: [Arc<Notify>; Phase::COUNT],
    /// Nobody is to wait any longer.
    force: Notify,
    forced: AtomicBool,
    /// The signals are listened to.
    pub(crate) signals: AtomicBool,
    watchdog: OnceLock<Watchdog>,
    pub(crate) tracked: Tracked,
    pub(crate) connections: Mutex<Slab<Arc<Connection>>>,
    pub(crate) guards: Mutex<Slab<Guarded>>,
    pub(crate) servers: Mutex<Slab<Label>>,
    pub(crate) failed: Mutex<Vec<Failure>>,
    pub(crate) callbacks: Pending,
    pub(crate) hooks: Pending,
    /// Who holds it drives.
    pub(crate) driver: tokio::sync::Mutex<Facts>,
    pub(crate) report: OnceLock<Report>,
    pub(crate) metrics: Metrics,
}

/// Hooks that have not run, until it is too late to register one.
pub(crate) struct Pending(Mutex<Option<Vec<Hook>>>);

impl Pending {
    fn new() -> Self {
        Self(Mutex::new(Some(Vec::new())))
    }

    fn push(&self, hook: Hook, name: &str) -> bool {
        let mut held = self.0.lock();
        if let Some(hooks) = &mut *held {
            hooks.push(hook);
            return true;
        }
        // What it captured is dropped outside of the lock.
        drop(held);
        warn!(name, hook = %hook.name, "it is too late for a hook");
        false
    }

    /// All of them; no more come.
    pub(crate) fn close(&self) -> Vec<Hook> {
        self.0.lock().take().unwrap_or_default()
    }

    /// What `take` takes of them; no more come if there is none left.
    pub(crate) fn take_or_close(&self, take: fn(&mut Vec<Hook>) -> Vec<Hook>) -> Vec<Hook> {
        let mut held = self.0.lock();
        let taken = held.as_mut().map(take).unwrap_or_default();
        if taken.is_empty() {
            *held = None;
        }
        taken
    }
}

/// What is fixed at the trigger.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) reason: Cow<'static, str>,
    pub(crate) start: Instant,
    pub(crate) closing: Instant,
    pub(crate) cut: Instant,
    pub(crate) end: Instant,
}

impl Shutdown {
    /// Starts with the defaults: a delay of 5 s, 30 s in all, of which 5 s are
    /// the hooks'.
    pub const fn builder() -> ShutdownBuilder {
        ShutdownBuilder::new()
    }

    pub(crate) fn new(settings: Settings) -> Self {
        // Its first reading takes a while.
        let _ = clock::now();
        let name = settings.name();
        Self {
            inner: Arc::new(Inner {
                books: Books::open(),
                settings,
                plan: OnceLock::new(),
                reached: std::array::from_fn(|_| Arc::default()),
                force: Notify::new(),
                forced: AtomicBool::new(false),
                signals: AtomicBool::new(false),
                watchdog: OnceLock::new(),
                tracked: Tracked::new(),
                connections: Mutex::default(),
                guards: Mutex::default(),
                servers: Mutex::default(),
                failed: Mutex::default(),
                callbacks: Pending::new(),
                hooks: Pending::new(),
                driver: tokio::sync::Mutex::default(),
                report: OnceLock::new(),
                metrics: Metrics::new(&name),
                name,
            }),
        }
    }

    /// The name that it has in logs and metrics.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.inner.name
    }

    /// Asks for it: the notice is given, and every deadline fixed, from now.
    /// The reason is for logs and the report. Whether it was the first to ask;
    /// later ones change nothing.
    ///
    /// It may be called anywhere, outside of a runtime too; somebody must
    /// await [`run`](Self::run) for it to get any further.
    pub fn trigger(&self, reason: impl Into<Cow<'static, str>>) -> bool {
        let delay = self.inner.settings.drain_delay;
        self.inner.trigger(reason.into(), delay)
    }

    /// The same without the delay: where nobody sends requests who would have
    /// to hear of it first.
    pub fn trigger_without_delay(&self, reason: impl Into<Cow<'static, str>>) -> bool {
        self.inner.trigger(reason.into(), Duration::ZERO)
    }

    /// Ends it by force, triggered or not: what is left is cut now, the hooks
    /// are skipped, and the exit code is 1. What a second signal does.
    pub fn force(&self, reason: impl Into<Cow<'static, str>>) {
        self.trigger_without_delay(reason);
        self.inner.force();
    }

    /// Registers what runs when nothing is left in flight. Whether it was in
    /// time: not when the hooks have run.
    #[expect(clippy::must_use_candidate, reason = "it is done for its effect")]
    pub fn hook(&self, hook: Hook) -> bool {
        self.inner.hooks.push(hook, self.name())
    }

    /// Registers what runs at once at the trigger, beside all that is still
    /// served: leave a registry, stop taking jobs. All of them run at the same
    /// time, and until the cut at most; a panic or an error of one is reported
    /// and stops nothing. Whether it was in time: not when they have begun.
    pub fn on_drain<F, R>(&self, name: impl Into<Label>, callback: F) -> bool
    where
        F: FnOnce() -> R + Send + 'static,
        R: Future<Output: HookOutput> + Send + 'static,
    {
        let hook = Hook::new(name, callback);
        self.inner.callbacks.push(hook, self.name())
    }

    /// How far it has got: one atomic load.
    #[must_use]
    #[inline]
    pub fn phase(&self) -> Phase {
        self.inner.phase()
    }

    /// Ready when it has got so far, or further.
    #[must_use]
    pub fn reached(&self, phase: Phase) -> Reached {
        Reached::new(Arc::clone(&self.inner), phase)
    }

    /// Whether the notice was given: from the trigger on, for good.
    #[must_use]
    #[inline]
    pub fn is_draining(&self) -> bool {
        self.phase() >= Phase::Draining
    }

    /// Whether new requests are still to be served: until the listeners are
    /// closed, so for the whole of the drain delay, too. To be told not to
    /// send any in the first place, ask whether it is
    /// [draining](Self::is_draining).
    #[must_use]
    #[inline]
    pub fn should_accept_requests(&self) -> bool {
        self.phase() < Phase::Closed
    }

    /// How long there is until what is in flight is cut; `None` before the
    /// trigger.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.inner.remaining()
    }

    /// Why it was asked for, and when each phase is due at the latest; `None`
    /// before the trigger.
    #[must_use]
    pub fn schedule(&self) -> Option<Schedule> {
        let plan = self.inner.plan.get()?;
        Some(Schedule { plan: plan.clone() })
    }

    /// What tells handlers and other work of the drain.
    #[must_use]
    pub fn signal(&self) -> DrainSignal {
        DrainSignal::new(Arc::clone(&self.inner))
    }

    /// Has the drain wait for work of one's own, under this name, until the
    /// guard is dropped.
    pub fn guard(&self, label: impl Into<Label>) -> Guard {
        Guard::take(&self.inner, label.into()).0
    }

    /// The same, if new work is still welcome
    /// ([`should_accept_requests`](Self::should_accept_requests)); what was let
    /// in is waited for, without a gap between the two.
    pub fn try_guard(&self, label: impl Into<Label>) -> Option<Guard> {
        let (guard, phase) = Guard::take(&self.inner, label.into());
        (phase < Phase::Closed).then_some(guard)
    }

    /// Has the drain wait for a connection that was accepted.
    pub fn connection(&self) -> ConnectionGuard {
        ConnectionGuard::take(&self.inner)
    }

    /// Has the drain wait for a server to close its listener, when it is told
    /// to.
    pub fn server(&self, name: impl Into<Label>) -> ServerGuard {
        ServerGuard::take(&self.inner, name.into())
    }

    /// How many requests there are, from the call to the end of the body.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.inner.books.ledger.open(Kind::Request)
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.inner.books.ledger.open(Kind::Connection)
    }

    /// How many guards there are.
    #[must_use]
    pub fn guards(&self) -> usize {
        self.inner.books.ledger.open(Kind::Guard)
    }

    /// Whether nothing is left to wait for: no request, connection or guard,
    /// and no listener.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.inner.books.ledger.is_idle()
    }
}

/// Unready from the trigger on: `shutting_down`.
impl ReadinessGate for Shutdown {
    fn readiness(&self) -> Readiness {
        if self.is_draining() {
            Readiness::NotReady {
                reason: "shutting_down",
            }
        } else {
            Readiness::Ready
        }
    }
}

impl fmt::Debug for Shutdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shutdown")
            .field("name", self.name())
            .field("phase", &self.phase())
            .field("requests", &self.requests())
            .field("connections", &self.connections())
            .field("guards", &self.guards())
            .finish_non_exhaustive()
    }
}

/// When each phase is due at the latest: fixed at the trigger.
#[derive(Clone, Debug)]
pub struct Schedule {
    plan: Plan,
}

impl Schedule {
    /// Why it was asked for.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.plan.reason
    }

    /// When it was asked for.
    #[must_use]
    pub const fn start(&self) -> Instant {
        self.plan.start
    }

    /// When the listeners are to be closed.
    #[must_use]
    pub const fn closing(&self) -> Instant {
        self.plan.closing
    }

    /// When what is left is cut.
    #[must_use]
    pub const fn cut(&self) -> Instant {
        self.plan.cut
    }

    /// When all of it is to be over, hooks included.
    #[must_use]
    pub const fn end(&self) -> Instant {
        self.plan.end
    }
}

/// What is still in flight counts itself out, of what is nobody's any more.
impl Drop for Inner {
    fn drop(&mut self) {
        self.books.abandon();
    }
}

impl Inner {
    #[inline]
    pub(crate) fn phase(&self) -> Phase {
        self.books.ledger.phase()
    }

    pub(crate) fn reached(&self, phase: Phase) -> &Arc<Notify> {
        &self.reached[phase as usize]
    }

    pub(crate) fn remaining(&self) -> Option<Duration> {
        Some(self.plan.get()?.cut - clock::now())
    }

    fn trigger(&self, reason: Cow<'static, str>, delay: Duration) -> bool {
        let Settings {
            timeout,
            hook_reserve,
            ..
        } = self.settings;
        let start = clock::now();
        let plan = Plan {
            reason,
            start,
            closing: start + delay,
            cut: start + (timeout - hook_reserve),
            end: start + timeout,
        };
        if let Err(plan) = self.plan.set(plan) {
            let name = &*self.name;
            info!(name, reason = &*plan.reason, "shutting down already");
            return false;
        }
        if let Some(exit) = &self.settings.exit
            && let Some(watchdog) = Watchdog::arm(Arc::clone(&self.name), timeout, exit.clone())
        {
            // Nobody else has passed the line above.
            let _ = self.watchdog.set(watchdog);
        }
        self.advance(Phase::Draining);
        true
    }

    pub(crate) fn disarm(&self) {
        if let Some(watchdog) = self.watchdog.get() {
            watchdog.disarm();
        }
    }

    fn force(&self) {
        if !self.forced.swap(true, Ordering::AcqRel) {
            warn!(name = &*self.name, "the shutdown is forced");
        }
        self.force.notify_waiters();
    }

    pub(crate) fn is_forced(&self) -> bool {
        self.forced.load(Ordering::Acquire)
    }

    /// Ready when it is forced.
    pub(crate) async fn forced(&self) {
        loop {
            // Hears of all that comes from here on.
            let notified = self.force.notified();
            if self.is_forced() {
                return;
            }
            notified.await;
        }
    }

    /// Ready when this holds, which is looked at whenever the last of a kind
    /// has gone.
    pub(crate) async fn emptied(&self, holds: impl Fn(&Self) -> bool) {
        loop {
            let notified = self.books.emptied.notified();
            if holds(self) {
                return;
            }
            notified.await;
        }
    }

    /// Goes forward to this phase and tells all who wait for it, or for one on
    /// the way.
    pub(crate) fn advance(&self, to: Phase) {
        let from = self.books.ledger.advance(to);
        for phase in to.since(from) {
            self.reached(*phase).notify_waiters();
        }
        if from < to {
            info!(
                name = &*self.name,
                phase = to.as_str(),
                reason = self.plan.get().map(|plan| &*plan.reason),
                requests = self.books.ledger.open(Kind::Request),
                connections = self.books.ledger.open(Kind::Connection),
                guards = self.books.ledger.open(Kind::Guard),
                "shutdown"
            );
        }
    }

    #[inline]
    pub(crate) fn leave(&self, kind: Kind) {
        self.books.leave(kind);
    }

    pub(crate) fn server_failed(&self, server: Label, why: String) {
        error!(name = &*self.name, server = %server, why, "a server has failed");
        self.failed.lock().push(Failure { server, why });
    }
}
