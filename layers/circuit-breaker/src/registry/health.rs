//! How well a registry's breakers are doing, all in all.

use buttress_core::health::{Health, HealthSource};

use super::Registry;
use crate::State;

/// The breakers of a [`Registry`], counted by their states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthSummary {
    /// How many are closed.
    pub closed: usize,
    /// How many are open.
    pub open: usize,
    /// How many are half-open.
    pub half_open: usize,
    /// How many are forced open.
    pub forced_open: usize,
    /// How many are forced closed: switched off.
    pub forced_closed: usize,
    /// How many are metrics-only.
    pub metrics_only: usize,
}

impl HealthSummary {
    pub(super) fn count(&mut self, state: State) {
        *match state {
            State::Closed => &mut self.closed,
            State::Open => &mut self.open,
            State::HalfOpen => &mut self.half_open,
            State::ForcedOpen => &mut self.forced_open,
            State::ForcedClosed => &mut self.forced_closed,
            State::MetricsOnly => &mut self.metrics_only,
        } += 1;
    }

    /// All of them.
    #[must_use]
    pub const fn total(&self) -> usize {
        self.scored() + self.forced_closed
    }

    /// Those that are not switched off.
    const fn scored(&self) -> usize {
        self.closed + self.metrics_only + self.half_open + self.open + self.forced_open
    }

    /// The health of the least healthy one: 1 closed, 0.5 half-open, 0 open.
    /// What is switched off is left out; [`Health::HEALTHY`] where there is
    /// none at all, and [`Health::DISABLED`] where all are switched off.
    #[must_use]
    pub fn least(&self) -> Health {
        if self.open + self.forced_open > 0 {
            Health::UNHEALTHY
        } else if self.half_open > 0 {
            Health::scored(0.5)
        } else {
            self.otherwise()
        }
    }

    /// The mean of their healths, with the same exceptions.
    #[must_use]
    pub fn mean(&self) -> Health {
        let scored = self.scored();
        if scored == 0 {
            return self.otherwise();
        }
        let well = self.closed + self.metrics_only;
        #[expect(clippy::cast_precision_loss, reason = "below 2⁵², as memory is")]
        Health::scored((well as f64 + 0.5 * self.half_open as f64) / scored as f64)
    }

    fn otherwise(&self) -> Health {
        if self.scored() == 0 && self.forced_closed > 0 {
            Health::DISABLED
        } else {
            Health::HEALTHY
        }
    }
}

/// The mean of all breakers, so that one dead host of twenty is 0.95; for a
/// [critical](super::RegistryBuilder::critical) registry the worst of them.
impl HealthSource for Registry {
    fn name(&self) -> &str {
        self.name()
    }

    fn health(&self) -> Health {
        let summary = self.health_summary();
        if self.critical() {
            summary.least()
        } else {
            summary.mean()
        }
    }

    fn critical(&self) -> bool {
        self.0.critical
    }
}
