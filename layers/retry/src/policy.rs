//! A retry's rules with all that its users share, and any function retried by
//! them.

use std::{
    fmt,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use buttress_core::{
    classify::Verdict,
    clock::{self, Instant},
    deadline::Deadline,
    label,
    random::{Random, SharedRandom},
};

use crate::{
    Budget, Cause, ConfigError, GiveUp, Settings, SharedBudget,
    metrics::{Metrics, Result as Went},
    session::{Seen, Session},
};

type OnRetry = Box<dyn Fn(u32, Duration, Cause) + Send + Sync>;
type OnGiveUp = Box<dyn Fn(u32, Cause, GiveUp) + Send + Sync>;

/// What all clones of a layer, or all users of a policy, have in common.
pub(crate) struct Shared {
    pub(crate) name: Arc<str>,
    /// Read where an attempt has failed.
    settings: RwLock<Settings>,
    /// An attempt can be told until when it is awaited.
    tells_attempts: bool,
    /// What each request has to know of them, in nanoseconds; 0 for none.
    total: AtomicU64,
    attempt: AtomicU64,
    budget: Option<SharedBudget>,
    random: SharedRandom,
    on_retry: Vec<OnRetry>,
    on_give_up: Vec<OnGiveUp>,
    metrics: Metrics,
}

/// Below this a tick of the system's clock is too much of it.
const SHORT: u64 = 1_000_000_000;

impl Shared {
    /// A request's first attempt begins.
    #[inline]
    pub(crate) fn begin(&self, outer: Option<Deadline>) -> Session {
        if let Some(budget) = &self.budget {
            budget.request();
        }
        let own = match self.total.load(Relaxed) {
            0 => None,
            total => Some(now_for(total) + Duration::from_nanos(total)),
        };
        let outer = outer.map(Deadline::instant);
        Session::new(match (own, outer) {
            (Some(own), Some(outer)) => Some(own.min(outer)),
            (own, outer) => own.or(outer),
        })
    }

    /// Until when the attempt that begins now may take.
    #[inline]
    pub(crate) fn attempt_deadline(&self, session: &Session) -> Option<Deadline> {
        let own = match self.attempt.load(Relaxed) {
            0 => None,
            limit => Some(clock::now() + Duration::from_nanos(limit)),
        };
        let whole = session.deadline();
        let nearer = match (own, whole) {
            (Some(own), Some(whole)) => Some(own.min(whole)),
            (own, whole) => own.or(whole),
        };
        nearer.map(Deadline::at)
    }

    /// An attempt has ended that is worth no other. What it was is asked where
    /// someone goes by it.
    #[inline]
    pub(crate) fn settled(&self, session: &Session, verdict: impl FnOnce() -> Verdict) {
        if let Some(budget) = &self.budget {
            budget.outcome(verdict());
        }
        self.metrics.attempt(Went::Success);
        self.ended(session);
    }

    /// A request has ended.
    #[inline]
    pub(crate) fn ended(&self, session: &Session) {
        self.metrics.request(session.attempts());
    }

    /// An attempt has ended that is worth another: after how long there is
    /// one, unless `obstacle`, a rule, or in the end `leave` is in the way.
    #[cold]
    pub(crate) fn next(
        &self,
        session: &mut Session,
        seen: Seen,
        obstacle: impl FnOnce() -> Result<(), GiveUp>,
        leave: impl FnOnce(Duration) -> Result<(), GiveUp>,
    ) -> Result<Duration, GiveUp> {
        if let Some(budget) = &self.budget {
            budget.outcome(Verdict::Failure);
        }
        self.metrics.attempt(Went::Failure);
        let attempt = session.attempts();
        let next = obstacle().and_then(|()| {
            let settings = self.settings();
            let leave = |wait| {
                leave(wait)?;
                let withdrawn = self.budget.as_ref().is_none_or(Budget::withdraw);
                withdrawn.then_some(()).ok_or(GiveUp::Budget)
            };
            session.next(&settings, seen, clock::now(), &self.random, leave)
        });
        let Seen { cause, .. } = seen;
        match next {
            Ok(delay) => {
                tracing::debug!(
                    name = &*self.name,
                    attempt,
                    delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
                    %cause,
                    "retrying"
                );
                for listener in &self.on_retry {
                    listener(attempt, delay, cause);
                }
            }
            Err(reason) => self.gave_up(session, cause, reason),
        }
        next
    }

    /// There is no further attempt though one would have been worth it.
    #[cold]
    pub(crate) fn gave_up(&self, session: &Session, cause: Cause, reason: GiveUp) {
        let attempts = session.attempts();
        self.metrics.gave_up(reason);
        self.metrics.request(attempts);
        tracing::debug!(name = &*self.name, attempts, %cause, reason = reason.as_str(), "gave up");
        for listener in &self.on_give_up {
            listener(attempts, cause, reason);
        }
    }

    fn settings(&self) -> Settings {
        self.settings
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn check(&self, settings: &Settings) -> Result<(), ConfigError> {
        if settings.attempt_timeout.is_some() && !self.tells_attempts {
            return Err(ConfigError::new(
                "an attempt timeout can be told only to services over HTTP",
            ));
        }
        settings.check()
    }

    fn set(&self, settings: Settings) {
        let nanos = |span: Option<Duration>| {
            span.map_or(0, |span| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX))
        };
        // Locked first: of two at once, one is in force as a whole.
        let mut place = self
            .settings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        self.total.store(nanos(settings.total_timeout), Relaxed);
        self.attempt.store(nanos(settings.attempt_timeout), Relaxed);
        *place = settings;
    }
}

/// A total of seconds may end a tick earlier; reading the exact clock costs
/// three times as much.
#[inline]
fn now_for(total: u64) -> Instant {
    if total < SHORT {
        clock::now()
    } else {
        clock::recent()
    }
}

/// The rules of a retry, without tower: [`run`](Self::run) wraps any fallible
/// async function. Also the handle of a layer
/// ([`RetryLayer::policy`](crate::RetryLayer::policy)).
///
/// Cheap to clone; clones share the budget and whatever is
/// [set](Self::set_settings).
#[derive(Clone)]
pub struct RetryPolicy(pub(crate) Arc<Shared>);

impl RetryPolicy {
    /// Starts a policy.
    pub fn builder() -> PolicyBuilder {
        PolicyBuilder::default()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The settings in force.
    pub fn settings(&self) -> Settings {
        self.0.settings()
    }

    /// Replaces the settings while serving. Requests under way keep the
    /// deadline that they were given, and go by the new settings else.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if they make no sense, as where it was built; the old
    /// ones stay.
    pub fn set_settings(&self, settings: Settings) -> Result<(), ConfigError> {
        self.0.check(&settings)?;
        self.0.set(settings);
        Ok(())
    }
}

impl fmt::Debug for RetryPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryPolicy")
            .field("name", &self.name())
            .field("settings", &self.settings())
            .field("budget", &self.0.budget)
            .finish_non_exhaustive()
    }
}

pub(crate) fn check_name(name: &str) -> Result<(), ConfigError> {
    if label::is_sound(name, 128) {
        Ok(())
    } else {
        Err(ConfigError::new(
            "the name must be 1 to 128 printable ASCII characters",
        ))
    }
}

/// Builds a [`RetryPolicy`].
#[must_use = "nothing is retried before `build()`"]
pub struct PolicyBuilder {
    name: Arc<str>,
    tells_attempts: bool,
    settings: Settings,
    budget: Option<SharedBudget>,
    random: SharedRandom,
    on_retry: Vec<OnRetry>,
    on_give_up: Vec<OnGiveUp>,
}

impl Default for PolicyBuilder {
    fn default() -> Self {
        Self {
            name: "default".into(),
            tells_attempts: true,
            settings: Settings::default(),
            budget: None,
            random: SharedRandom::default(),
            on_retry: Vec::new(),
            on_give_up: Vec::new(),
        }
    }
}

impl PolicyBuilder {
    /// The name in logs and metrics: 1 to 128 printable ASCII characters.
    /// Default: `default`.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// How often, how soon and for how long. Default:
    /// [`Settings::standard`].
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// What bounds how many requests are repeated, all together: one of the
    /// [budgets](crate::RetryBudget), or a [`SharedBudget`] that other layers
    /// have too. Default: none.
    pub fn budget(mut self, budget: impl Budget) -> Self {
        self.budget = Some(SharedBudget::new(budget));
        self
    }

    /// Where jitter comes from. Default: the thread's generator.
    pub fn random(mut self, random: impl Random) -> Self {
        self.random = SharedRandom::new(random);
        self
    }

    /// Calls `listener` before each wait: with the number of the attempt that
    /// failed, from 1, how long there is to the next, and why. Called outside
    /// every lock, on the task of the request.
    pub fn on_retry(
        mut self,
        listener: impl Fn(u32, Duration, Cause) + Send + Sync + 'static,
    ) -> Self {
        self.on_retry.push(Box::new(listener));
        self
    }

    /// Calls `listener` where a result is handed on that would have been worth
    /// another attempt: with the number of attempts, what the last has told,
    /// and what was in the way.
    pub fn on_give_up(
        mut self,
        listener: impl Fn(u32, Cause, GiveUp) + Send + Sync + 'static,
    ) -> Self {
        self.on_give_up.push(Box::new(listener));
        self
    }

    /// For a layer over services of any kind.
    pub(crate) fn without_attempt_timeout(mut self) -> Self {
        self.tells_attempts = false;
        self
    }

    /// Builds it.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if the name or the settings make no sense.
    pub fn build(self) -> Result<RetryPolicy, ConfigError> {
        check_name(&self.name)?;
        let shared = Shared {
            metrics: Metrics::new(&self.name),
            name: self.name,
            settings: RwLock::new(self.settings.clone()),
            tells_attempts: self.tells_attempts,
            total: AtomicU64::new(0),
            attempt: AtomicU64::new(0),
            budget: self.budget,
            random: self.random,
            on_retry: self.on_retry,
            on_give_up: self.on_give_up,
        };
        shared.check(&self.settings)?;
        shared.set(self.settings);
        Ok(RetryPolicy(Arc::new(shared)))
    }
}

impl fmt::Debug for PolicyBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyBuilder")
            .field("name", &self.name)
            .field("settings", &self.settings)
            .field("budget", &self.budget)
            .finish_non_exhaustive()
    }
}
