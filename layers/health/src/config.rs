//! What a registry is made of, checked once by `build()`.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use buttress_core::{
    clock,
    health::ReadinessGate,
    random::{Random, SharedRandom},
};
use tokio::sync::Notify;

use crate::{
    Check, ConfigError, HealthRegistry, Latch, Notice, Source, Threshold,
    change::{self, Listener},
    check::CheckCell,
    error::{self, Problem},
    metrics::Metrics,
    registry::{Inner, List, NamedGate},
};

/// Builds a [`HealthRegistry`].
#[must_use = "nothing is known before `build()`"]
pub struct HealthRegistryBuilder {
    name: Arc<str>,
    sources: Vec<Source>,
    gates: Vec<NamedGate>,
    latches: Vec<Latch>,
    checks: Vec<Check>,
    threshold: Option<Threshold>,
    marks: Vec<f64>,
    evaluate_every: Duration,
    look_every: Duration,
    stall: Option<Duration>,
    random: SharedRandom,
    listeners: Vec<Listener>,
    capacity: usize,
    #[cfg(feature = "grpc")]
    grpc: Vec<crate::GrpcService>,
}

impl HealthRegistryBuilder {
    pub(crate) fn new() -> Self {
        Self {
            name: "default".into(),
            sources: Vec::new(),
            gates: Vec::new(),
            latches: Vec::new(),
            checks: Vec::new(),
            threshold: None,
            marks: Vec::new(),
            evaluate_every: Duration::from_secs(5),
            look_every: Duration::from_millis(50),
            stall: None,
            random: SharedRandom::default(),
            listeners: Vec::new(),
            capacity: 64,
            #[cfg(feature = "grpc")]
            grpc: Vec::new(),
        }
    }

    /// Names the registry: for logs and metrics. 1 to 128 printable ASCII
    /// characters. Default `default`.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// Adds a source to the score: a breaker, an
    /// [`Indicator`](crate::Indicator), a [`Beat`](crate::Beat), or one of them
    /// as a [`Source`] with a weight. No two have one name.
    pub fn source(mut self, source: impl Into<Source>) -> Self {
        self.sources.push(source.into());
        self
    }

    /// Adds a gate: the process is not ready while it is closed, for the
    /// gate's own reason. A drain is one. Where several are closed the first
    /// that was added says why. One that panics when it is asked is closed:
    /// `panicked`.
    pub fn gate(mut self, name: impl Into<Arc<str>>, gate: impl ReadinessGate + 'static) -> Self {
        self.gates.push(NamedGate {
            name: name.into(),
            gate: Arc::new(gate),
        });
        self
    }

    /// Adds something that the start waits for. It has started when all of
    /// them are released, and for good.
    pub fn latch(mut self, latch: &Latch) -> Self {
        self.latches.push(latch.clone());
        self
    }

    /// Adds a check.
    pub fn check(mut self, check: Check) -> Self {
        self.checks.push(check);
        self
    }

    /// Has readiness depend on the score. Default: it does not.
    ///
    /// Read first what is said of it at [`Threshold`].
    pub fn threshold(mut self, threshold: Threshold) -> Self {
        self.threshold = Some(threshold);
        self
    }

    /// A score that listeners are told of when it is crossed, as the
    /// [threshold](Self::threshold)'s is in any case. Above 0.0 and at most
    /// 1.0.
    pub fn mark(mut self, score: f64) -> Self {
        self.marks.push(score);
        self
    }

    /// How often the score is evaluated in the background: for the threshold,
    /// the marks and the metrics. 1 ms to 1 day. Default 5 s.
    pub fn evaluate_every(mut self, interval: Duration) -> Self {
        self.evaluate_every = interval;
        self
    }

    /// How often the background looks whether readiness has changed: how late
    /// listeners and gRPC may hear of a gate or a latch, unless
    /// [`look`](HealthRegistry::look) is called; of a check they hear at once.
    /// The sources of the score are not asked for it. 1 ms to 1 day. Default 50
    /// ms.
    pub fn look_every(mut self, interval: Duration) -> Self {
        self.look_every = interval;
        self
    }

    /// Has the process count as not alive when the runtime in which the
    /// registry was started has not come round to a small task of its own for
    /// this long: when its workers are blocked. 1 ms to 1 day. Default: it is
    /// alive as long as it answers.
    ///
    /// Only an answer from elsewhere can tell: endpoints that are served in the
    /// blocked runtime do not answer at all, which a prober takes the same way.
    /// A machine that was stopped for a while looks stalled for a moment.
    pub fn stall_limit(mut self, limit: Duration) -> Self {
        self.stall = Some(limit);
        self
    }

    /// Has this called after every change of readiness, every crossing of a
    /// mark, and every change of a check, in their order and one at a time,
    /// while the registry is [started](HealthRegistry::start).
    ///
    /// Changes come through a channel of bounded [capacity](Self::capacity), so
    /// that a slow listener keeps nobody waiting; when it is full the oldest
    /// that do not fit are dropped, counted, and told in [`Notice::missed`] of
    /// the next. The newest is never dropped. A panic is logged, and the next
    /// one is told again. What does not last until the next look may not be
    /// heard of.
    ///
    /// The future is polled on the runtime: it must not block. It is
    /// dropped when the [guard](crate::Running) is.
    pub fn on_change<F>(mut self, listen: impl Fn(Notice) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.listeners.push(change::listener(listen));
        self
    }

    /// How many changes wait for each listener. 1 to 65536. Default 64.
    pub fn capacity(mut self, changes: usize) -> Self {
        self.capacity = changes;
        self
    }

    /// Draws the jitter of the checks. Default: the thread's generator.
    pub fn random(mut self, random: impl Random) -> Self {
        self.random = SharedRandom::new(random);
        self
    }

    /// Tells gRPC clients of this service by its name. The whole, named `""`,
    /// is always told: see [`grpc_server`](HealthRegistry::grpc_server).
    #[cfg(feature = "grpc")]
    pub fn grpc_service(mut self, service: crate::GrpcService) -> Self {
        self.grpc.push(service);
        self
    }

    /// Checks the settings and makes the registry. Nothing runs yet.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings: see [`ConfigError`].
    pub fn build(self) -> Result<HealthRegistry, ConfigError> {
        error::name("the registry", &self.name)?;
        for source in &self.sources {
            source.check()?;
        }
        unique("a source", self.sources.iter().map(Source::name))?;
        for gate in &self.gates {
            error::name("a gate", &gate.name)?;
        }
        unique("a gate", self.gates.iter().map(|gate| &gate.name))?;
        for latch in &self.latches {
            error::name("a latch", latch.name())?;
        }
        unique("a latch", self.latches.iter().map(Latch::shared_name))?;
        unique("a check", self.checks.iter().map(|check| &check.name))?;

        if let Some(threshold) = &self.threshold {
            part("the threshold", threshold.score)?;
            if let Some(wait) = threshold.retry_after {
                span("the wait of the threshold", wait)?;
            }
        }
        let mut marks = self.marks;
        for mark in &marks {
            part("a mark", *mark)?;
        }
        marks.extend(self.threshold.map(|threshold| threshold.score));
        marks.sort_by(f64::total_cmp);
        marks.dedup();

        span("the interval of evaluations", self.evaluate_every)?;
        span("the interval of looks", self.look_every)?;
        if let Some(limit) = self.stall {
            span("the limit of a stall", limit)?;
        }
        if !(1..=65536).contains(&self.capacity) {
            return Err(Problem::Capacity.into());
        }
        let checks = self
            .checks
            .into_iter()
            .map(|check| check.into_cell(&self.name));
        let checks = checks.collect::<Result<Box<[CheckCell]>, _>>()?;
        #[cfg(feature = "grpc")]
        let grpc = crate::grpc::Grpc::new(self.grpc, &checks)?;

        // Its first reading takes a while.
        let _ = clock::now();
        Ok(HealthRegistry(Arc::new(Inner {
            metrics: Metrics::new(&self.name),
            name: self.name,
            sources: List::new(self.sources),
            gates: List::new(self.gates),
            latches: self.latches.into(),
            checks,
            threshold: self.threshold,
            low: AtomicBool::new(false),
            marks: marks.into(),
            evaluate_every: self.evaluate_every,
            look_every: self.look_every,
            stall: self.stall,
            tick: AtomicU64::new(0),
            random: self.random,
            listeners: self.listeners.into(),
            capacity: self.capacity,
            missed: AtomicU64::new(0),
            news: Notify::new(),
            running: AtomicBool::new(false),
            turn: tokio::sync::Mutex::new(()),
            #[cfg(feature = "grpc")]
            grpc,
        })))
    }
}

pub(crate) fn unique<'a>(
    what: &'static str,
    names: impl Iterator<Item = &'a Arc<str>>,
) -> Result<(), ConfigError> {
    let mut seen = std::collections::HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(Problem::Taken(what, Arc::clone(name)).into());
        }
    }
    Ok(())
}

/// A score that something can be below.
pub(crate) fn part(what: &'static str, score: f64) -> Result<(), ConfigError> {
    // Not NaN either.
    if score > 0.0 && score <= 1.0 {
        return Ok(());
    }
    Err(Problem::Score(what).into())
}

fn span(what: &'static str, span: Duration) -> Result<(), ConfigError> {
    if (Duration::from_millis(1)..=Duration::from_secs(24 * 3600)).contains(&span) {
        return Ok(());
    }
    Err(Problem::Span(what).into())
}

impl fmt::Debug for HealthRegistryBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthRegistryBuilder")
            .field("name", &self.name)
            .field("sources", &self.sources)
            .field("latches", &self.latches)
            .field("checks", &self.checks)
            .field("threshold", &self.threshold)
            .finish_non_exhaustive()
    }
}

/// So that the compiler can say it where they are made, not where they are
/// used: what a server stack asks of a service.
const _: fn() = || {
    fn fits<T: Clone + Send + Sync + 'static>() {}
    fits::<HealthRegistry>();
    fits::<crate::HealthService>();
    fits::<crate::Indicator>();
    fits::<crate::Beat>();
    fits::<Latch>();
    fn moves<T: Send + Sync + 'static>() {}
    moves::<crate::Running>();
    moves::<HealthRegistryBuilder>();
};
