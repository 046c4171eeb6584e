//! What all clones of a layer have in common.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use buttress_core::{
    classify::Verdict,
    clock::{self, Instant},
};

use super::{
    latency::Latencies,
    metrics::{Metrics, Result as Went},
};
use crate::{Budget, ConfigError, SharedBudget};

pub(super) type OnHedge = Box<dyn Fn(u32, Duration) + Send + Sync>;

/// How long after an attempt there is the next, in nanoseconds. Two threads
/// that set it at once may leave a mixture.
pub(super) struct Delay {
    min: AtomicU64,
    max: AtomicU64,
    /// The bits of a float; of 0 where the delay is fixed.
    percentile: AtomicU64,
    seen: Latencies,
}

/// The same as it is asked for, and checked.
#[derive(Clone, Copy, Debug)]
pub(super) enum After {
    Fixed(Duration),
    Percentile(f64, Duration, Duration),
}

/// The longest delay: an hour.
const LONGEST: Duration = Duration::from_secs(3600);

impl After {
    pub(super) fn check(self) -> Result<(), ConfigError> {
        match self {
            Self::Fixed(delay) if delay > LONGEST => {
                Err(ConfigError::new("a hedge's delay must be at most an hour"))
            }
            // Written so that NaN is none.
            Self::Percentile(percentile, ..) if !(percentile > 0.0 && percentile < 1.0) => Err(
                ConfigError::new("a hedge's percentile must be above 0 and below 1"),
            ),
            Self::Percentile(_, min, max) if min > max || max > LONGEST || max.is_zero() => {
                Err(ConfigError::new(
                    "a hedge's longest delay must be above 0, at least the shortest, and at most an hour",
                ))
            }
            _ => Ok(()),
        }
    }
}

impl Delay {
    pub(super) fn new(after: After, window: Duration) -> Self {
        let none = || AtomicU64::new(0);
        let delay = Self {
            min: none(),
            max: none(),
            percentile: none(),
            seen: Latencies::new(window),
        };
        delay.set(after);
        delay
    }

    pub(super) fn set(&self, after: After) {
        let (percentile, min, max) = match after {
            After::Fixed(delay) => (0.0, delay, delay),
            After::Percentile(percentile, min, max) => (percentile, min, max),
        };
        let nanos = |span: Duration| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
        self.min.store(nanos(min), Relaxed);
        self.max.store(nanos(max), Relaxed);
        self.percentile.store(f64::to_bits(percentile), Relaxed);
    }

    fn percentile(&self) -> Option<f64> {
        let percentile = f64::from_bits(self.percentile.load(Relaxed));
        (percentile > 0.0).then_some(percentile)
    }

    fn at(&self, now: impl FnOnce() -> Instant) -> Duration {
        let max = Duration::from_nanos(self.max.load(Relaxed));
        let Some(percentile) = self.percentile() else {
            return max;
        };
        let min = Duration::from_nanos(self.min.load(Relaxed));
        match self.seen.percentile(percentile, now()) {
            Some(found) => found.max(min).min(max),
            None => max,
        }
    }
}

impl fmt::Debug for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let span = |nanos: &AtomicU64| Duration::from_nanos(nanos.load(Relaxed));
        f.debug_struct("Delay")
            .field("percentile", &self.percentile())
            .field("min", &span(&self.min))
            .field("max", &span(&self.max))
            .finish_non_exhaustive()
    }
}

pub(super) struct Shared {
    pub(super) name: Arc<str>,
    pub(super) delay: Delay,
    pub(super) max_hedges: AtomicU32,
    pub(super) budget: Option<SharedBudget>,
    /// The requests and their outcomes are counted further out.
    pub(super) counted_outside: bool,
    pub(super) on_hedge: Vec<OnHedge>,
    pub(super) metrics: Metrics,
}

impl Shared {
    #[inline]
    pub(super) fn begin(&self) {
        if let Some(budget) = &self.budget
            && !self.counted_outside
        {
            budget.request();
        }
    }

    #[inline]
    pub(super) fn max_hedges(&self) -> u32 {
        self.max_hedges.load(Relaxed)
    }

    /// The clock is read only where someone wants to know.
    #[inline]
    pub(super) fn started(&self) -> Option<Instant> {
        self.delay.percentile().map(|_| clock::now())
    }

    /// Of a request that began then.
    pub(super) fn delay(&self, started: Option<Instant>) -> Duration {
        self.delay.at(|| started.unwrap_or_else(clock::now))
    }

    /// A good answer came to a request of which an attempt began then.
    pub(super) fn record(&self, started: Option<Instant>) {
        if let Some(started) = started {
            let now = clock::now();
            self.delay.seen.record(now - started, now);
        }
    }

    /// An attempt was bad, and is not the answer.
    #[cold]
    pub(super) fn failed(&self) {
        if let Some(budget) = &self.budget {
            budget.outcome(Verdict::Failure);
        }
    }

    /// A request was answered. How is asked where someone goes by it.
    #[inline]
    pub(super) fn answered(&self, verdict: impl FnOnce() -> Verdict) {
        if let Some(budget) = &self.budget
            && !self.counted_outside
        {
            budget.outcome(verdict());
        }
    }

    pub(super) fn withdraw(&self) -> bool {
        let leave = self.budget.as_ref().is_none_or(Budget::withdraw);
        if !leave {
            self.metrics.hedges(Went::Refused, 1);
            tracing::debug!(name = &*self.name, "the budget allows no hedge");
        }
        leave
    }

    #[cold]
    pub(super) fn hedging(&self, attempt: u32, delay: Duration) {
        tracing::debug!(
            name = &*self.name,
            attempt,
            delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
            "hedging"
        );
        for listener in &self.on_hedge {
            listener(attempt, delay);
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("name", &self.name)
            .field("delay", &self.delay)
            .field("max_hedges", &self.max_hedges)
            .field("budget", &self.budget)
            .finish_non_exhaustive()
    }
}
