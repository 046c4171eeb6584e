//! What all clones of a layer have in common.

use std::{fmt, sync::Arc, time::Duration};

use buttress_core::{
    classify::Verdict,
    clock::{self, Instant},
};

use super::{
    latency::Latencies,
    metrics::{Metrics, Result as Went},
};
use crate::{Budget, SharedBudget};

pub(super) type OnHedge = Box<dyn Fn(u32, Duration) + Send + Sync>;

/// How long after an attempt there is the next.
#[derive(Debug)]
pub(super) enum Delay {
    Fixed(Duration),
    Percentile {
        seen: Latencies,
        min: Duration,
        max: Duration,
    },
}

impl Delay {
    pub(super) fn at(&self, now: impl FnOnce() -> Instant) -> Duration {
        match self {
            Self::Fixed(delay) => *delay,
            Self::Percentile { seen, min, max } => match seen.percentile(now()) {
                Some(found) => found.clamp(*min, *max),
                None => *max,
            },
        }
    }
}

pub(super) struct Shared {
    pub(super) name: Arc<str>,
    pub(super) delay: Delay,
    pub(super) max_hedges: u32,
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

    /// The clock is read only where someone wants to know.
    #[inline]
    pub(super) fn started(&self) -> Option<Instant> {
        match &self.delay {
            Delay::Fixed(_) => None,
            Delay::Percentile { .. } => Some(clock::now()),
        }
    }

    pub(super) fn delay(&self) -> Duration {
        self.delay.at(clock::now)
    }

    /// A good answer came to a request of which an attempt began then.
    pub(super) fn record(&self, started: Option<Instant>) {
        if let (Delay::Percentile { seen, .. }, Some(started)) = (&self.delay, started) {
            let now = clock::now();
            seen.record(now - started, now);
        }
    }

    /// An attempt was bad, and is not the answer.
    #[cold]
    pub(super) fn failed(&self) {
        if let Some(budget) = &self.budget {
            budget.outcome(Verdict::Failure);
        }
    }

    /// A request was answered so.
    #[inline]
    pub(super) fn answered(&self, verdict: Verdict) {
        if let Some(budget) = &self.budget
            && !self.counted_outside
        {
            budget.outcome(verdict);
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
