//! One breaker, as one holds it in the hand.

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use buttress_core::{
    classify::Verdict,
    clock::{self, Instant},
    health::{Health, HealthSource},
    label,
    random::{Random, SharedRandom},
    sync::Mutex,
};

use crate::{
    Cause, CircuitOpen, ConfigError, Error, Event, Permit, Reason, Settings, State,
    TransitionError,
    cell::{AtOnce, Lease, Observer, Outlook, Rejection, Ticket},
    error::Problem,
    event::Listener,
    metrics::Metrics,
    settings::Plan,
};
#[cfg(feature = "redis")]
use crate::{
    FleetStatus, Sharing,
    shared::{Hub, Link, Membership},
};

/// A circuit breaker: a cheap handle, whose clones are all the same breaker.
///
/// The [layer](crate::CircuitBreakerLayer) has one inside. By itself it
/// protects any fallible future:
///
/// ```
/// use buttress_circuit_breaker::{Breaker, Error, Settings, State};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let breaker = Breaker::builder("geocoder")
///     .settings(Settings::aggressive())
///     .build()?;
/// for _ in 0..3 {
///     let result = breaker.call(async || Err::<(), _>("no route to host")).await;
///     assert!(matches!(result, Err(Error::Inner("no route to host"))));
/// }
/// assert_eq!(breaker.state(), State::Open);
///
/// // Open: the closure is not even called.
/// let error = breaker.call(async || Ok::<_, &str>(())).await.unwrap_err();
/// assert!(error.open().unwrap().retry_after().unwrap().as_secs() < 10);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Breaker(Arc<Owner>);

/// Has the cell, and gives it back when the last handle is gone.
struct Owner {
    lease: Lease,
    observer: Arc<Observer>,
    settings: Mutex<Settings>,
    critical: bool,
    #[cfg(feature = "redis")]
    shared: std::sync::OnceLock<Shared>,
}

/// In which fleet it is, and as what.
#[cfg(feature = "redis")]
struct Shared {
    hub: Arc<Hub>,
    link: Arc<Link>,
}

/// A breaker that is not kept alive.
#[cfg(feature = "redis")]
pub(crate) struct WeakBreaker(std::sync::Weak<Owner>);

#[cfg(feature = "redis")]
impl WeakBreaker {
    pub(crate) fn upgrade(&self) -> Option<Breaker> {
        self.0.upgrade().map(Breaker)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.lease.give_back();
    }
}

/// Makes a [`Breaker`].
pub struct BreakerBuilder {
    pub(crate) name: Arc<str>,
    pub(crate) settings: Settings,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) random: SharedRandom,
    pub(crate) critical: bool,
    #[cfg(feature = "redis")]
    pub(crate) sharing: Option<Sharing>,
}

impl BreakerBuilder {
    /// Shares it with all processes of a fleet that have one of this name:
    /// see [`Sharing`].
    ///
    /// The work is done by a task in the tokio runtime that it is built in;
    /// built outside of one, in that of whoever makes a service of its layer,
    /// or changes its state, first. Where the runtime ends, the same starts
    /// another. It ends with the last handle.
    #[cfg(feature = "redis")]
    #[must_use]
    pub fn redis(mut self, sharing: impl Into<Sharing>) -> Self {
        self.sharing = Some(sharing.into());
        self
    }

    /// Whether the whole is unhealthy when this breaker is open: what it says
    /// as a [`HealthSource`]. Default: no.
    #[must_use]
    pub fn critical(mut self, critical: bool) -> Self {
        self.critical = critical;
        self
    }

    /// When it opens, for how long, and what closes it. Default:
    /// [`Settings::moderate`].
    #[must_use]
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Has `listener` called with the breaker's name for every [`Event`], in
    /// the thread where it happens, outside of every lock. It should be quick,
    /// and must not panic. Several may listen.
    #[must_use]
    pub fn on_event(mut self, listener: impl Fn(&str, &Event) + Send + Sync + 'static) -> Self {
        self.listeners.push(Box::new(listener));
        self
    }

    /// Where the jitter of [`ReopenBackoff`](crate::ReopenBackoff) comes from.
    #[must_use]
    pub fn random(mut self, random: impl Random) -> Self {
        self.random = SharedRandom::new(random);
        self
    }

    /// Makes the breaker, closed.
    ///
    /// # Errors
    ///
    /// Settings that make no sense, or a name that is not 1 to 128 printable
    /// ASCII characters.
    pub fn build(self) -> Result<Breaker, ConfigError> {
        let Self {
            name,
            settings,
            listeners,
            random,
            critical,
            #[cfg(feature = "redis")]
            sharing,
        } = self;
        check_name(&name)?;
        let plan = settings.plan()?;
        #[cfg(feature = "redis")]
        if let Some(sharing) = &sharing {
            sharing.check()?;
        }
        let observer = Arc::new(Observer {
            metrics: Metrics::new(&name),
            listeners: listeners.into_boxed_slice(),
            name,
        });
        let breaker = Breaker::observed(observer, settings, plan, random, critical);
        #[cfg(feature = "redis")]
        if let Some(sharing) = sharing {
            let hub = sharing.hub();
            let key = hub.key([breaker.name().as_bytes()]);
            breaker.join(Membership { hub, key });
        }
        Ok(breaker)
    }
}

pub(crate) fn check_name(name: &str) -> Result<(), ConfigError> {
    if label::is_sound(name, 128) {
        Ok(())
    } else {
        Err(Problem::Name.into())
    }
}

/// What became of a call that asked while a lock was held over the breaker:
/// to be told once it is not.
#[must_use = "a call that was let through must be recorded"]
pub(crate) struct Admission {
    lease: Lease,
    result: Result<Ticket, Rejection>,
    observer: Option<Arc<Observer>>,
}

impl Admission {
    /// Tells who listens.
    #[inline]
    pub(crate) fn tell(self) -> Result<Permit, CircuitOpen> {
        let Self {
            lease,
            result,
            observer,
        } = self;
        match result {
            Ok(ticket) if observer.is_none() => Ok(Permit::new(lease.cell, ticket, None)),
            result => Self::heard(lease, result, observer),
        }
    }

    #[inline(never)]
    fn heard(
        lease: Lease,
        result: Result<Ticket, Rejection>,
        observer: Option<Arc<Observer>>,
    ) -> Result<Permit, CircuitOpen> {
        // The permit first: should a listener panic, it is given back.
        let (event, answer) = match result {
            Ok(ticket) => (
                Event::Call,
                Ok(Permit::new(lease.cell, ticket, observer.clone())),
            ),
            Err(rejection) => (
                Event::Rejected(rejection.reason()),
                Err(CircuitOpen::of(lease, rejection)),
            ),
        };
        if let Some(observer) = observer {
            observer.tell(&event);
        }
        answer
    }
}

impl fmt::Debug for BreakerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BreakerBuilder")
            .field("name", &self.name)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// A breaker at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Status {
    /// Whether calls pass, and why.
    pub state: State,
    /// The number of the generation: one more with every change.
    pub generation: u32,
    /// Since when it is in this state.
    pub since: Instant,
    /// When the next probe may pass: where it is open.
    pub next_probe: Option<Instant>,
    /// What opened it last: where it is open, or half-open since.
    pub opened_by: Option<Cause>,
    /// Failures in a row, where they are a rule; otherwise those in the
    /// window; half-open, those of the probes; open, those that opened it.
    pub failures: u64,
    /// Calls in the window.
    pub calls: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// Those of them that were slow.
    pub slow: u64,
    /// Probes in flight.
    pub probes_in_flight: u8,
    /// Probes that have succeeded in this half-open.
    pub probes_succeeded: u8,
}

impl Breaker {
    /// Starts a breaker of this name: for logs, metrics and listeners.
    pub fn builder(name: impl Into<Arc<str>>) -> BreakerBuilder {
        BreakerBuilder {
            name: name.into(),
            settings: Settings::new(),
            listeners: Vec::new(),
            random: SharedRandom::default(),
            critical: false,
            #[cfg(feature = "redis")]
            sharing: None,
        }
    }

    /// One of settings that have been checked.
    pub(crate) fn observed(
        observer: Arc<Observer>,
        settings: Settings,
        plan: Plan,
        random: SharedRandom,
        critical: bool,
    ) -> Self {
        let lease = Lease::take(Arc::clone(&observer), plan, random, clock::now());
        Self(Arc::new(Owner {
            lease,
            observer,
            settings: Mutex::new(settings),
            critical,
            #[cfg(feature = "redis")]
            shared: std::sync::OnceLock::new(),
        }))
    }

    /// Makes it one of a fleet's, for good.
    #[cfg(feature = "redis")]
    pub(crate) fn join(&self, membership: Membership) {
        let Membership { hub, key } = membership;
        self.0.shared.get_or_init(|| {
            let link = hub.join(key, self);
            Shared { hub, link }
        });
    }

    #[cfg(feature = "redis")]
    pub(crate) fn downgrade(&self) -> WeakBreaker {
        WeakBreaker(Arc::downgrade(&self.0))
    }

    /// Sees to it that the fleet is heard, where there is a runtime for it.
    #[cfg(feature = "redis")]
    pub(crate) fn attend(&self) {
        if let Some(shared) = self.0.shared.get() {
            shared.hub.ensure();
        }
    }

    /// How it stands in its fleet, if it is [shared](Sharing).
    #[cfg(feature = "redis")]
    #[must_use]
    pub fn fleet(&self) -> Option<FleetStatus> {
        let shared = self.0.shared.get()?;
        Some(FleetStatus::of(&shared.hub, &shared.link))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.0.observer.name
    }

    /// Asks for leave to call.
    ///
    /// # Errors
    ///
    /// [`CircuitOpen`] if it is open, or if half-open has all its probes under
    /// way.
    #[inline]
    pub fn try_acquire(&self) -> Result<Permit, CircuitOpen> {
        match self.0.lease.at_once() {
            AtOnce::Passes(permit) => Ok(permit),
            AtOnce::Refused(open) => Err(open),
            AtOnce::Unclear => self.try_acquire_otherwise(),
        }
    }

    /// The rest.
    #[inline(never)]
    pub(crate) fn try_acquire_otherwise(&self) -> Result<Permit, CircuitOpen> {
        let Owner {
            lease, observer, ..
        } = &*self.0;
        match lease.cell.admit(clock::now) {
            Ok(ticket) if ticket.observed() => Ok(self.heard(ticket)),
            Ok(ticket) => Ok(Permit::new(lease.cell, ticket, None)),
            Err(rejection) => {
                if observer.hears_calls() {
                    self.tell_rejected(rejection.reason());
                }
                Err(CircuitOpen::of(*lease, rejection))
            }
        }
    }

    fn heard(&self, ticket: Ticket) -> Permit {
        let Owner {
            lease, observer, ..
        } = &*self.0;
        // The permit first: should a listener panic, it is given back.
        let permit = Permit::new(lease.cell, ticket, Some(Arc::clone(observer)));
        observer.tell(&Event::Call);
        permit
    }

    /// As [`try_acquire`](Self::try_acquire), to be called under a lock: nobody
    /// is told, and `None` is the answer where the state would have to change
    /// first, or a probe's place to be taken.
    #[inline]
    pub(crate) fn admit_settled(&self) -> Option<Admission> {
        let Owner {
            lease, observer, ..
        } = &*self.0;
        let result = lease.cell.admit_settled(clock::now)?;
        let heard = match &result {
            Ok(ticket) => ticket.observed(),
            Err(_) => observer.hears_calls(),
        };
        Some(Admission {
            lease: *lease,
            result,
            observer: heard.then(|| Arc::clone(observer)),
        })
    }

    /// Ends the breaker's last generation, if there is nothing to lose: see
    /// [`Cell::retire`](crate::cell::Cell::retire). Only for who has the one
    /// handle, and then lets go of it.
    pub(crate) fn retire(&self, now: Instant, stale: bool) -> bool {
        self.0.lease.cell.retire(now, stale)
    }

    #[inline(never)]
    fn tell_rejected(&self, reason: Reason) {
        self.0.observer.tell(&Event::Rejected(reason));
    }

    /// Calls `f` if the breaker lets it: an `Err` is a failure, an `Ok` a
    /// success.
    ///
    /// Dropping the future gives the call up: see [`Permit`]. A panic is a
    /// failure.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] if the breaker does not let it pass; `f` is not called
    /// then. Otherwise what `f` failed with.
    pub async fn call<F, Fut, T, E>(&self, f: F) -> Result<T, Error<E>>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let judge = |result: &Result<T, E>| match result {
            Ok(_) => Verdict::Success,
            Err(_) => Verdict::Failure,
        };
        self.call_judged(judge, f).await
    }

    /// The same, where `judge` says what its result means.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub async fn call_judged<J, F, Fut, T, E>(&self, judge: J, f: F) -> Result<T, Error<E>>
    where
        J: FnOnce(&Result<T, E>) -> Verdict,
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let mut permit = self.try_acquire()?;
        // Dropped before the permit, so that a probe's place is free when its
        // call is really gone.
        let mut future = pin!(permit.during(f));
        let result = poll_fn(|cx| permit.during(|| future.as_mut().poll(cx))).await;
        let verdict = permit.during(|| judge(&result));
        permit.record(verdict);
        result.map_err(Error::Inner)
    }

    /// Whether calls pass, and why. One that is open stays so until a call
    /// comes after its wait; half-open whose time is up is open.
    #[must_use]
    pub fn state(&self) -> State {
        self.0.lease.cell.state(clock::now)
    }

    /// All there is to know.
    #[must_use]
    pub fn status(&self) -> Status {
        let view = self.0.lease.cell.view(clock::now());
        Status {
            state: view.state,
            generation: view.generation,
            since: view.since,
            next_probe: view.until.filter(|_| view.state == State::Open),
            opened_by: view.opened.map(|opened| opened.cause),
            failures: match view.state {
                State::HalfOpen => view.probes.failed.into(),
                State::Open => view.opened.map_or(0, |opened| opened.failures),
                _ => view.in_a_row.map_or(view.sums.failed, u64::from),
            },
            calls: view.sums.calls,
            failed: view.sums.failed,
            slow: view.sums.slow,
            probes_in_flight: view.probes.in_flight,
            probes_succeeded: view.probes.good,
        }
    }

    /// What it decides by.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.0.settings.lock().clone()
    }

    /// Replaces what it decides by, while it serves. Its state stays, an open
    /// one with the wait that it has; counting begins anew, and the calls in
    /// flight count no more.
    ///
    /// # Errors
    ///
    /// Settings that make no sense; nothing is changed then.
    pub fn configure(&self, settings: Settings) -> Result<(), ConfigError> {
        let plan = settings.plan()?;
        let cell = self.0.lease.cell;
        let now = clock::now();
        cell.catch_up(now);
        let mut held = self.0.settings.lock();
        *held = settings;
        // Both under one lock: of two changes at once, the same one stays.
        let news = cell.set_plan(plan, now);
        drop(held);
        cell.tell(news);
        Ok(())
    }

    /// Refuses all calls until [`reset`](Self::reset).
    pub fn force_open(&self) {
        self.force(State::ForcedOpen);
    }

    /// Lets all calls pass and counts nothing until [`reset`](Self::reset):
    /// switched off.
    pub fn force_closed(&self) {
        self.force(State::ForcedClosed);
    }

    /// Lets all calls pass, counts them, and tells once what would have opened
    /// it ([`Event::WouldOpen`]), until [`reset`](Self::reset).
    pub fn metrics_only(&self) {
        self.force(State::MetricsOnly);
    }

    fn force(&self, to: State) {
        // Always possible, also where it is so already.
        let forced = self.bring_about(to, None, Cause::Manual);
        debug_assert!(forced.is_ok());
    }

    /// Closed, empty and automatic again, whatever it was.
    pub fn reset(&self) {
        self.0.lease.cell.reset(clock::now());
    }

    /// Opens it now, as a rule would: for `wait` (366 days at most), or for as
    /// long as the settings say.
    ///
    /// # Errors
    ///
    /// Only one that is closed or half-open can be opened.
    pub fn trip(&self, wait: impl Into<Option<Duration>>) -> Result<(), TransitionError> {
        self.bring_about(State::Open, wait.into(), Cause::Manual)
    }

    /// Lets probes pass now, and not only when the wait is over.
    ///
    /// # Errors
    ///
    /// Only one that is open can be made half-open.
    pub fn half_open(&self) -> Result<(), TransitionError> {
        self.bring_about(State::HalfOpen, None, Cause::Manual)
    }

    /// Closes it now.
    ///
    /// # Errors
    ///
    /// Only one that is open or half-open can be closed; an override ends with
    /// [`reset`](Self::reset).
    pub fn close(&self) -> Result<(), TransitionError> {
        self.bring_about(State::Closed, None, Cause::Manual)
    }

    /// Follows another breaker of the same name, in another process: the seam
    /// for shared state. Its [`Event::StateChange`] comes with
    /// [`Cause::Remote`], so that who publishes changes need not publish this
    /// one.
    ///
    /// `wait` is for how long it is to be open yet. An override ends when
    /// [`State::Closed`] is followed, as by a [`reset`](Self::reset).
    ///
    /// # Errors
    ///
    /// Where otherwise the same change by hand would make no sense.
    pub fn follow(&self, to: State, wait: Option<Duration>) -> Result<(), TransitionError> {
        self.bring_about(to, wait, Cause::Remote)
    }

    fn bring_about(
        &self,
        to: State,
        wait: Option<Duration>,
        cause: Cause,
    ) -> Result<(), TransitionError> {
        self.0.lease.cell.bring_about(to, wait, cause, clock::now())
    }

    /// Whether a call would pass now; no place is taken.
    #[must_use]
    pub fn would_pass(&self) -> bool {
        self.0.lease.cell.outlook(clock::now()) == Outlook::Passes
    }

    pub(crate) fn lease(&self) -> Lease {
        self.0.lease
    }

    /// How many handles there are.
    pub(crate) fn handles(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// Whether two handles are of one breaker.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Observer {
    /// Whether calls have to be told, and not only changes.
    #[inline]
    pub(crate) fn hears_calls(&self) -> bool {
        Metrics::is_on() || !self.listeners.is_empty()
    }
}

/// 1 closed, 0.5 half-open, 0 open, left out where it is switched off.
impl HealthSource for Breaker {
    fn name(&self) -> &str {
        &self.0.observer.name
    }

    fn health(&self) -> Health {
        match self.state() {
            State::Closed | State::MetricsOnly => Health::HEALTHY,
            State::HalfOpen => Health::scored(0.5),
            State::Open | State::ForcedOpen => Health::UNHEALTHY,
            State::ForcedClosed => Health::DISABLED,
        }
    }

    fn critical(&self) -> bool {
        self.0.critical
    }
}

impl fmt::Debug for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Breaker")
            .field("name", &self.name())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
