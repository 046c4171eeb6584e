//! All there is to say of a registry, at one moment.

use std::{sync::Arc, time::Duration};

use buttress_core::clock::Instant;

use crate::{CheckState, Standing, check::CheckCell};

/// How a process stands:
/// [`HealthRegistry::report`](crate::HealthRegistry::report).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct HealthReport {
    /// Whether new requests are welcome.
    pub standing: Standing,
    /// Whether all latches are released.
    pub started: bool,
    /// The score, from 0.0 to 1.0.
    pub score: f64,
    /// What it is made of.
    pub sources: Vec<SourceReport>,
    /// The checks.
    pub checks: Vec<CheckReport>,
    /// The gates.
    pub gates: Vec<GateReport>,
    /// The startup latches.
    pub latches: Vec<LatchReport>,
}

/// How a source is doing.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SourceReport {
    /// Its name.
    pub name: Arc<str>,
    /// From 0.0 to 1.0; `None` where it is switched off.
    pub score: Option<f64>,
    /// How much it counts.
    pub weight: f64,
    /// Whether the whole is no better than this.
    pub critical: bool,
}

/// What is known of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Its name.
    pub name: Arc<str>,
    /// Whether readiness depends on it.
    pub required: bool,
    /// What is known.
    pub state: CheckState,
    /// How long ago its last run ended; `None` where there was none.
    pub age: Option<Duration>,
    /// How long that took.
    pub took: Option<Duration>,
    /// What the error of its last run said, if it failed by one: up to 512
    /// characters. It may hold what outsiders should not read.
    pub error: Option<Arc<str>>,
}

impl CheckReport {
    pub(crate) fn new(check: &CheckCell, now: Instant) -> Self {
        let last = check.last();
        Self {
            name: Arc::clone(check.name()),
            required: check.is_required(),
            state: check.state(now),
            age: last.as_ref().map(|last| now - last.at),
            took: last.as_ref().map(|last| last.took),
            error: last.and_then(|last| last.error),
        }
    }
}

/// Whether a gate is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GateReport {
    /// Its name.
    pub name: Arc<str>,
    /// Why it is closed; `None` where it is open.
    pub closed: Option<&'static str>,
}

/// Whether a startup latch was released.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LatchReport {
    /// Its name.
    pub name: Arc<str>,
    /// Whether it was.
    pub released: bool,
}
