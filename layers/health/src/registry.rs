//! The registry: all that there is to say of a process, and who may ask.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress_core::{
    clock::{self, Instant},
    health::{Readiness, ReadinessGate},
    random::SharedRandom,
    sync::Mutex,
};
use tokio::sync::Notify;

use crate::{
    CheckState, ConfigError, HealthRegistryBuilder, HealthService, Latch, Reason, Running, Source,
    Standing, StartError, Threshold,
    change::Listener,
    check::{CheckCell, unless_panicked},
    error::{self, Problem},
    metrics::Metrics,
    report::{CheckReport, GateReport, HealthReport, LatchReport, SourceReport},
    run,
    score::score,
    standing::standing,
};

/// What is known of the health of a process: the [crate's front page](crate)
/// shows it at work. A cheap handle: clones are the same registry.
///
/// Whoever asks reads what is there: no check is run, nothing is waited for,
/// and no lock is held while a source or a gate is asked.
#[derive(Clone)]
pub struct HealthRegistry(pub(crate) Arc<Inner>);

/// A gate with the name that it is shown under.
#[derive(Clone)]
pub(crate) struct NamedGate {
    pub(crate) name: Arc<str>,
    pub(crate) gate: Arc<dyn ReadinessGate>,
}

impl NamedGate {
    /// Why it is closed, if it is. One that panics is.
    pub(crate) fn closed(&self) -> Option<&'static str> {
        closed(&*self.gate)
    }
}

pub(crate) fn closed(gate: &dyn ReadinessGate) -> Option<&'static str> {
    match unless_panicked(|| gate.readiness()) {
        Some(Readiness::Ready) => None,
        Some(Readiness::NotReady { reason }) => Some(reason),
        None => Some("panicked"),
    }
}

/// A list that is replaced when it changes: asked without a lock.
pub(crate) struct List<T>(Mutex<Arc<[T]>>);

impl<T: Clone> List<T> {
    pub(crate) fn new(items: Vec<T>) -> Self {
        Self(Mutex::new(items.into()))
    }

    pub(crate) fn get(&self) -> Arc<[T]> {
        Arc::clone(&self.0.lock())
    }

    /// Adds it unless there is one that is the same.
    fn add(&self, item: T, same: impl Fn(&T, &T) -> bool) -> bool {
        let old;
        {
            let mut items = self.0.lock();
            if items.iter().any(|there| same(there, &item)) {
                return false;
            }
            let longer = items.iter().cloned().chain([item]).collect();
            old = std::mem::replace(&mut *items, longer);
        }
        drop(old);
        true
    }

    /// Whether there was one. It is dropped outside of the lock.
    fn remove(&self, is: impl Fn(&T) -> bool) -> bool {
        let old;
        let less;
        {
            let mut items = self.0.lock();
            let rest: Arc<[T]> = items.iter().filter(|item| !is(item)).cloned().collect();
            less = rest.len() < items.len();
            old = std::mem::replace(&mut *items, rest);
        }
        drop(old);
        less
    }
}

pub(crate) struct Inner {
    pub(crate) name: Arc<str>,
    pub(crate) sources: List<Source>,
    pub(crate) gates: List<NamedGate>,
    pub(crate) latches: Box<[Latch]>,
    pub(crate) checks: Box<[CheckCell]>,
    pub(crate) threshold: Option<Threshold>,
    /// Whether the threshold has spoken against us.
    pub(crate) low: AtomicBool,
    pub(crate) marks: Box<[f64]>,
    pub(crate) evaluate_every: Duration,
    pub(crate) look_every: Duration,
    pub(crate) stall: Option<Duration>,
    /// When the runtime last ticked, on the monotonic clock; 0 where nothing
    /// is to be told of it.
    pub(crate) tick: AtomicU64,
    pub(crate) random: SharedRandom,
    pub(crate) listeners: Box<[Listener]>,
    pub(crate) capacity: usize,
    pub(crate) missed: AtomicU64,
    pub(crate) news: Notify,
    pub(crate) running: AtomicBool,
    /// Held by the one task that evaluates.
    pub(crate) turn: tokio::sync::Mutex<()>,
    pub(crate) metrics: Metrics,
    #[cfg(feature = "grpc")]
    pub(crate) grpc: crate::grpc::Grpc,
}

impl Inner {
    pub(crate) fn has_started(&self) -> bool {
        self.latches.iter().all(Latch::is_released)
    }

    pub(crate) fn standing(&self, now: Instant) -> Standing {
        let gates = self.gates.get();
        let required = self.checks.iter().filter(|check| check.is_required());
        standing(
            gates.iter().find_map(NamedGate::closed),
            self.has_started(),
            required.map(|check| (check.name(), check.state(now))),
            self.threshold.is_some() && self.low.load(Relaxed),
        )
    }

    pub(crate) fn score(&self) -> f64 {
        score(self.sources.get().iter().map(Source::part))
    }

    /// For how long the runtime has not ticked, where that is too long.
    pub(crate) fn stalled(&self, now: Instant) -> Option<Duration> {
        let limit = self.stall?;
        match self.tick.load(Relaxed) {
            0 => None,
            tick => Some(now - Instant::from_nanos(tick)).filter(|age| *age > limit),
        }
    }
}

impl HealthRegistry {
    /// Starts a registry.
    pub fn builder() -> HealthRegistryBuilder {
        HealthRegistryBuilder::new()
    }

    /// Its name, a label of metrics.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Runs the checks, watches for changes and tells of them, until the guard
    /// is dropped.
    ///
    /// Latches, gates, sources and endpoints work without; checks are unknown
    /// until it was called, and a [threshold](HealthRegistryBuilder::threshold)
    /// counts nothing.
    ///
    /// # Errors
    ///
    /// If they run already, or outside of a tokio runtime.
    pub fn start(&self) -> Result<Running, StartError> {
        run::start(&self.0)
    }

    /// Whether new requests are welcome: it has started, no gate is closed,
    /// the required checks pass, and the score is not too low where there is a
    /// threshold.
    #[must_use]
    pub fn readiness(&self) -> Standing {
        self.0.standing(clock::now())
    }

    /// Whether all latches are released.
    #[must_use]
    pub fn has_started(&self) -> bool {
        self.0.has_started()
    }

    /// How well all is doing, from 0.0 to 1.0: the mean of the sources by
    /// their weights, and no better than the worst critical one. What is
    /// switched off is left out; 1.0 where nothing is left.
    #[must_use]
    pub fn score(&self) -> f64 {
        self.0.score()
    }

    /// What is known of a check; `None` where there is none of this name.
    #[must_use]
    pub fn check(&self, name: &str) -> Option<CheckState> {
        let mut checks = self.0.checks.iter();
        let check = checks.find(|check| **check.name() == *name)?;
        Some(check.state(clock::now()))
    }

    /// All there is to say, as of now.
    #[must_use]
    pub fn report(&self) -> HealthReport {
        let now = clock::now();
        let sources = self.0.sources.get();
        let parts: Vec<_> = sources
            .iter()
            .map(|source| (source, source.part()))
            .collect();
        HealthReport {
            standing: self.0.standing(now),
            started: self.has_started(),
            // Of the same answers, so that it is the score of what is shown.
            score: score(parts.iter().map(|(_, part)| *part)),
            sources: parts
                .iter()
                .map(|(source, part)| SourceReport {
                    name: Arc::clone(source.name()),
                    score: part.score,
                    weight: part.weight,
                    critical: part.critical,
                })
                .collect(),
            checks: self
                .0
                .checks
                .iter()
                .map(|check| CheckReport::new(check, now))
                .collect(),
            gates: self
                .0
                .gates
                .get()
                .iter()
                .map(|gate| GateReport {
                    name: Arc::clone(&gate.name),
                    closed: gate.closed(),
                })
                .collect(),
            latches: self
                .0
                .latches
                .iter()
                .map(|latch| LatchReport {
                    name: Arc::clone(latch.shared_name()),
                    released: latch.is_released(),
                })
                .collect(),
        }
    }

    /// Has the background look now for what has changed, and not at its next
    /// [look](HealthRegistryBuilder::look_every). Endpoints never need it.
    /// Costs a wake-up: not for the path of a request.
    pub fn look(&self) {
        self.0.news.notify_one();
    }

    /// Adds a source while it serves.
    ///
    /// # Errors
    ///
    /// If there is one of this name, or its name or weight makes no sense.
    pub fn add_source(&self, source: impl Into<Source>) -> Result<(), ConfigError> {
        let source = source.into();
        source.check()?;
        let name = Arc::clone(source.name());
        if !self.0.sources.add(source, |a, b| a.name() == b.name()) {
            return Err(Problem::Taken("a source", name).into());
        }
        Ok(())
    }

    /// Takes a source away. Whether there was one of this name.
    #[expect(clippy::must_use_candidate, reason = "gone is gone")]
    pub fn remove_source(&self, name: &str) -> bool {
        self.0.sources.remove(|source| **source.name() == *name)
    }

    /// Adds a gate while it serves.
    ///
    /// # Errors
    ///
    /// If there is one of this name, or the name makes no sense.
    pub fn add_gate(
        &self,
        name: impl Into<Arc<str>>,
        gate: impl ReadinessGate + 'static,
    ) -> Result<(), ConfigError> {
        let name = name.into();
        error::name("a gate", &name)?;
        let gate = NamedGate {
            name: Arc::clone(&name),
            gate: Arc::new(gate),
        };
        if !self.0.gates.add(gate, |a, b| a.name == b.name) {
            return Err(Problem::Taken("a gate", name).into());
        }
        self.look();
        Ok(())
    }

    /// Takes a gate away. Whether there was one of this name.
    #[expect(clippy::must_use_candidate, reason = "gone is gone")]
    pub fn remove_gate(&self, name: &str) -> bool {
        let removed = self.0.gates.remove(|gate| *gate.name == *name);
        self.look();
        removed
    }

    /// How many notices did not reach a listener that was too slow.
    #[must_use]
    pub fn missed_notices(&self) -> u64 {
        self.0.missed.load(Relaxed)
    }

    /// Whether the background tasks run.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.0.running.load(SeqCst)
    }

    /// The endpoints, with the usual paths and no details: see
    /// [`HealthService`], which has a builder for others.
    #[must_use]
    pub fn service(&self) -> HealthService {
        HealthService::new(self)
    }
}

/// For layers that ask whether requests are welcome: a reason's
/// [word](Reason::as_str).
impl ReadinessGate for HealthRegistry {
    fn readiness(&self) -> Readiness {
        match self.0.standing(clock::now()) {
            Standing::Ready => Readiness::Ready,
            Standing::NotReady(reason) => Readiness::NotReady {
                reason: Reason::as_str(&reason),
            },
        }
    }
}

impl fmt::Debug for HealthRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthRegistry")
            .field("name", &self.name())
            .field("checks", &self.0.checks)
            .field("latches", &self.0.latches)
            .finish_non_exhaustive()
    }
}
