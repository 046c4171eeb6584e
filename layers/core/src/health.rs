//! Health and readiness: what layers tell of themselves.
//!
//! A layer that knows how well something is doing (a breaker its callee) is a
//! [`HealthSource`]. Something that decides whether new requests are welcome
//! (a drain, above all) is a [`ReadinessGate`]. Whoever answers a probe asks
//! both, and neither side needs to know the other.
//!
//! ```
//! use buttress_core::health::{Gate, Readiness, ReadinessGate};
//!
//! let gate = Gate::open();
//! let shutdown = gate.clone();
//! assert!(gate.is_ready());
//!
//! shutdown.close("draining");
//! assert_eq!(gate.readiness(), Readiness::NotReady { reason: "draining" });
//! ```

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// How well something is doing: a score from 0.0 (not at all) to 1.0
/// (perfectly), or nothing if it is switched off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Health(Option<f64>);

impl Health {
    /// All is well: 1.0.
    pub const HEALTHY: Self = Self(Some(1.0));
    /// Nothing works: 0.0.
    pub const UNHEALTHY: Self = Self(Some(0.0));
    /// Switched off: it says nothing, neither good nor bad.
    pub const DISABLED: Self = Self(None);

    /// This well. What lies outside of 0.0 to 1.0 is moved to its nearer end;
    /// NaN is 0.0, as a score that cannot be told is no reason for trust.
    #[must_use]
    pub fn scored(score: f64) -> Self {
        Self(Some(if score.is_nan() {
            0.0
        } else {
            score.clamp(0.0, 1.0)
        }))
    }

    /// The score, unless it is switched off.
    #[must_use]
    pub const fn score(self) -> Option<f64> {
        self.0
    }

    /// Whether it is switched off.
    #[must_use]
    pub const fn is_disabled(self) -> bool {
        self.0.is_none()
    }
}

/// Something that knows how well it is doing.
///
/// Asked by every probe, so the answer is at hand: no I/O, no wait.
/// Implemented for [`Arc`]s of sources.
pub trait HealthSource: Send + Sync {
    /// The name that it is reported under: stable, and no secret.
    fn name(&self) -> &str;

    /// How well it is doing now.
    fn health(&self) -> Health;

    /// Whether the whole is unhealthy when this is. Default: no.
    fn critical(&self) -> bool {
        false
    }
}

impl<S: HealthSource + ?Sized> HealthSource for Arc<S> {
    fn name(&self) -> &str {
        (**self).name()
    }

    fn health(&self) -> Health {
        (**self).health()
    }

    fn critical(&self) -> bool {
        (**self).critical()
    }
}

/// Whether new requests are welcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// They are.
    Ready,
    /// They are not.
    NotReady {
        /// Why: a word for programs, and a label of metrics.
        reason: &'static str,
    },
}

impl Readiness {
    /// Whether new requests are welcome.
    #[must_use]
    pub const fn is_ready(self) -> bool {
        matches!(self, Self::Ready)
    }
}

/// Something that decides whether new requests are welcome.
///
/// Implemented for closures, for [`Arc`]s of gates, and for slices and vectors
/// of them: ready when all are, and otherwise the first reason.
pub trait ReadinessGate: Send + Sync {
    /// Whether new requests are welcome now.
    fn readiness(&self) -> Readiness;
}

impl<F> ReadinessGate for F
where
    F: Fn() -> Readiness + Send + Sync,
{
    fn readiness(&self) -> Readiness {
        self()
    }
}

impl<G: ReadinessGate + ?Sized> ReadinessGate for Arc<G> {
    fn readiness(&self) -> Readiness {
        (**self).readiness()
    }
}

impl<G: ReadinessGate> ReadinessGate for [G] {
    fn readiness(&self) -> Readiness {
        self.iter()
            .map(ReadinessGate::readiness)
            .find(|readiness| !readiness.is_ready())
            .unwrap_or(Readiness::Ready)
    }
}

impl<G: ReadinessGate> ReadinessGate for Vec<G> {
    fn readiness(&self) -> Readiness {
        self.as_slice().readiness()
    }
}

/// A gate that is opened and closed by hand. Clones are the same gate.
///
/// It has one opinion: the last caller's. Parties that close for reasons of
/// their own have a gate each, and are asked together.
#[derive(Clone, Debug)]
pub struct Gate(Arc<State>);

#[derive(Debug)]
struct State {
    /// Follows `closed`, and is only written under its lock.
    ready: AtomicBool,
    closed: Mutex<Option<&'static str>>,
}

impl Gate {
    /// A gate that is open.
    #[must_use]
    pub fn open() -> Self {
        Self::new(None)
    }

    /// A gate that is closed for this reason: until a start-up is done, say.
    #[must_use]
    pub fn closed(reason: &'static str) -> Self {
        Self::new(Some(reason))
    }

    fn new(closed: Option<&'static str>) -> Self {
        Self(Arc::new(State {
            ready: AtomicBool::new(closed.is_none()),
            closed: Mutex::new(closed),
        }))
    }

    /// Opens it.
    pub fn reopen(&self) {
        self.set(None);
    }

    /// Closes it. If it was closed already, the new reason holds.
    pub fn close(&self, reason: &'static str) {
        self.set(Some(reason));
    }

    /// Whether it is open: one atomic load. What was done before it was opened
    /// or closed is seen by who sees it open or closed.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.0.ready.load(Ordering::Acquire)
    }

    fn set(&self, closed: Option<&'static str>) {
        let mut held = self.lock();
        *held = closed;
        self.0.ready.store(closed.is_none(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Option<&'static str>> {
        // Nothing that can panic runs under it.
        self.0.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Open.
impl Default for Gate {
    fn default() -> Self {
        Self::open()
    }
}

impl ReadinessGate for Gate {
    fn readiness(&self) -> Readiness {
        if self.is_ready() {
            return Readiness::Ready;
        }
        // It may have been opened since: the word under the lock counts.
        match *self.lock() {
            None => Readiness::Ready,
            Some(reason) => Readiness::NotReady { reason },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_stay_in_their_range() {
        assert_eq!(Health::scored(0.25).score(), Some(0.25));
        assert_eq!(Health::scored(7.0), Health::HEALTHY);
        assert_eq!(Health::scored(-0.1), Health::UNHEALTHY);
        assert_eq!(Health::scored(f64::NAN), Health::UNHEALTHY);
        assert_eq!(Health::scored(f64::INFINITY), Health::HEALTHY);
        assert!(Health::DISABLED.is_disabled());
        assert!(!Health::UNHEALTHY.is_disabled());
    }

    #[test]
    fn a_gate_opens_and_closes_for_all_its_clones() {
        let gate = Gate::closed("starting");
        let clone = gate.clone();
        assert!(!clone.is_ready());
        gate.reopen();
        assert!(clone.is_ready());
        assert!(clone.readiness().is_ready());
        clone.close("draining");
        clone.close("draining hard");
        assert_eq!(
            gate.readiness(),
            Readiness::NotReady {
                reason: "draining hard"
            }
        );
    }

    #[test]
    fn gates_are_asked_together() {
        let (first, second) = (Gate::open(), Gate::open());
        let all: Vec<Arc<dyn ReadinessGate>> = vec![
            Arc::new(|| Readiness::Ready),
            Arc::new(first.clone()),
            Arc::new(second.clone()),
        ];
        assert_eq!(all.readiness(), Readiness::Ready);
        second.close("second");
        assert_eq!(all.readiness(), Readiness::NotReady { reason: "second" });
        first.close("first");
        assert_eq!(all.readiness(), Readiness::NotReady { reason: "first" });
        let none: [Gate; 0] = [];
        assert!(none.as_slice().readiness().is_ready());
    }

    #[test]
    fn a_reason_is_never_of_another_state() {
        // What says NotReady has a reason that someone gave, whatever the
        // interleaving; and it ends as it was left.
        let gate = Gate::open();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..10_000 {
                    gate.close("shut");
                    gate.reopen();
                }
                gate.close("for good");
            });
            scope.spawn(|| {
                for _ in 0..10_000 {
                    match gate.readiness() {
                        Readiness::Ready => {}
                        Readiness::NotReady { reason } => {
                            assert!(matches!(reason, "shut" | "for good"));
                        }
                    }
                }
            });
        });
        assert!(!gate.is_ready());
        let reason = "for good";
        assert_eq!(gate.readiness(), Readiness::NotReady { reason });
    }

    #[test]
    fn a_source_is_shared() {
        struct Half;
        impl HealthSource for Half {
            fn name(&self) -> &str {
                "half"
            }
            fn health(&self) -> Health {
                Health::scored(0.5)
            }
        }
        let source: Arc<dyn HealthSource> = Arc::new(Arc::new(Half));
        assert_eq!(source.name(), "half");
        assert_eq!(source.health().score(), Some(0.5));
        assert!(!source.critical());
    }
}
