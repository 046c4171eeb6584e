//! How long to stay open, the next time.
//!
//! A callee that fails again as soon as it is probed is left alone for longer
//! each time, and one that stays healthy earns its way back: a level up for
//! every opening, a level down for every healthy while, so that one which
//! flaps remembers. (Decay in the place of a reset follows gRFC A50's outlier
//! detection, where an ejection's multiplier falls by one in each interval
//! without an ejection.)

use std::time::Duration;

use crate::{ConfigError, error::Problem};

/// How the time that a breaker stays open grows.
///
/// The wait after `n` openings that have not been forgotten is
/// `reset_timeout · factor^n`, at most `max`, and then up to `jitter` of
/// itself longer, at random, so that a fleet does not probe in step. Never
/// shorter.
///
/// The default is constant: factor 1, no jitter.
///
/// ```
/// use std::time::Duration;
/// use buttress_circuit_breaker::{ReopenBackoff, Settings};
///
/// let settings = Settings::moderate().reopen_backoff(
///     ReopenBackoff::new(2.0)
///         .max(Duration::from_secs(300))
///         .jitter(0.1)
///         .decay(Duration::from_secs(60)),
/// );
/// assert!(settings.check().is_ok());
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReopenBackoff {
    pub(crate) factor: f64,
    pub(crate) max: Duration,
    pub(crate) jitter: f64,
    decay: Option<Duration>,
}

/// Nothing grows any more beyond this.
const MAX_LEVEL: u32 = 1000;

impl ReopenBackoff {
    /// Each opening lasts `factor` times as long as the one before: from 1
    /// (constant) to 100. At most an hour, no jitter, and one opening is
    /// forgotten for each `reset_timeout` that the breaker stays closed.
    #[must_use]
    pub const fn new(factor: f64) -> Self {
        Self {
            factor,
            max: Duration::from_secs(3600),
            jitter: 0.0,
            decay: None,
        }
    }

    /// The longest that it stays open, before the jitter. Not below the
    /// `reset_timeout`; 366 days at most, jitter and all. Openings beyond are
    /// not remembered.
    #[must_use]
    pub const fn max(mut self, max: Duration) -> Self {
        self.max = max;
        self
    }

    /// How much longer it may be at random: from 0 (not at all) to 1 (up to
    /// twice as long).
    #[must_use]
    pub const fn jitter(mut self, ratio: f64) -> Self {
        self.jitter = ratio;
        self
    }

    /// How long the breaker must stay closed for one opening to be forgotten.
    /// Zero: closing forgets them all. Default: the `reset_timeout`.
    #[must_use]
    pub const fn decay(mut self, span: Duration) -> Self {
        self.decay = Some(span);
        self
    }

    pub(crate) fn check(&self, reset_timeout: Duration) -> Result<(), ConfigError> {
        if !(1.0..=100.0).contains(&self.factor) {
            return Err(Problem::BackoffFactor.into());
        }
        if !(0.0..=1.0).contains(&self.jitter) {
            return Err(Problem::BackoffJitter.into());
        }
        if self.factor > 1.0 && self.max < reset_timeout {
            return Err(Problem::BackoffMax.into());
        }
        Ok(())
    }

    /// The wait at this level; `draw` is random.
    pub(crate) fn wait(&self, base: Duration, level: u32, draw: u64) -> Duration {
        let wait = self.grown(base, level);
        if self.jitter <= 0.0 {
            return wait;
        }
        // 53 bits: as many as a float holds, from 0 to just below 1.
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit exactly")]
        let part = (draw >> 11) as f64 / (1u64 << 53) as f64;
        let longer = wait.as_secs_f64() * self.jitter * part;
        wait.saturating_add(Duration::try_from_secs_f64(longer).unwrap_or_default())
    }

    fn grown(&self, base: Duration, level: u32) -> Duration {
        // What cannot be told apart from the base stays exactly the base.
        if self.factor <= 1.0 || level == 0 {
            return base;
        }
        let level = i32::try_from(level.min(MAX_LEVEL)).unwrap_or(i32::MAX);
        let grown = base.as_secs_f64() * self.factor.powi(level);
        // Too large for a `Duration` is too large for the ceiling.
        Duration::try_from_secs_f64(grown).map_or(self.max, |grown| grown.min(self.max))
    }

    /// The level after an opening at this one: higher only as long as that
    /// makes the wait longer, so that a day at the ceiling takes no longer to
    /// be forgotten than reaching it took. (Envoy's outlier detection stops
    /// its multiplier there, too.)
    pub(crate) fn raised(&self, base: Duration, level: u32) -> u32 {
        let next = level.saturating_add(1);
        if self.grown(base, next) > self.grown(base, level) {
            next
        } else {
            level
        }
    }

    /// After how long a healthy while an opening is forgotten.
    pub(crate) fn span(&self, reset_timeout: Duration) -> Duration {
        self.decay.unwrap_or(reset_timeout)
    }

    /// The level that is left after so long a healthy while.
    pub(crate) fn decayed(&self, level: u32, healthy: Duration, reset_timeout: Duration) -> u32 {
        let span = self.span(reset_timeout);
        let forgotten = healthy
            .as_nanos()
            .checked_div(span.as_nanos())
            .map_or(u32::MAX, |n| u32::try_from(n).unwrap_or(u32::MAX));
        level.saturating_sub(forgotten)
    }
}

impl Default for ReopenBackoff {
    fn default() -> Self {
        Self::new(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Duration = Duration::from_secs(10);

    #[test]
    fn it_is_constant_unless_asked() {
        let backoff = ReopenBackoff::default();
        for level in [0, 1, 1000, u32::MAX] {
            assert_eq!(backoff.wait(BASE, level, u64::MAX), BASE);
        }
        // Also where the base is above the ceiling that only growth has.
        let base = Duration::from_secs(100_000);
        assert!(backoff.check(base).is_ok());
        assert_eq!(backoff.wait(base, 5, 0), base);
    }

    #[test]
    fn it_doubles_up_to_the_ceiling() {
        let backoff = ReopenBackoff::new(2.0).max(Duration::from_secs(60));
        let waits = [0, 1, 2, 3, 4, 1000, u32::MAX]
            .map(|level| backoff.wait(BASE, level, u64::MAX).as_secs());
        assert_eq!(waits, [10, 20, 40, 60, 60, 60, 60]);
    }

    #[test]
    fn jitter_only_makes_it_longer() {
        let backoff = ReopenBackoff::new(2.0).jitter(0.5);
        assert_eq!(backoff.wait(BASE, 0, 0), BASE);
        let longest = backoff.wait(BASE, 0, u64::MAX);
        assert!(longest > Duration::from_secs(14) && longest <= Duration::from_secs(15));
        assert_eq!(
            backoff.wait(BASE, 0, 1 << 63),
            Duration::from_millis(12_500)
        );
    }

    #[test]
    fn a_healthy_while_forgets() {
        let backoff = ReopenBackoff::new(2.0).decay(Duration::from_secs(60));
        let left = |secs| backoff.decayed(3, Duration::from_secs(secs), BASE);
        assert_eq!(
            [left(0), left(59), left(60), left(179), left(180)],
            [3, 3, 2, 1, 0]
        );
        assert_eq!(left(u64::MAX), 0);
        assert_eq!(
            backoff
                .decay(Duration::ZERO)
                .decayed(3, Duration::ZERO, BASE),
            0
        );
        // By default, the time that it stays open for.
        assert_eq!(ReopenBackoff::new(2.0).decayed(3, BASE, BASE), 2);
    }

    #[test]
    fn a_long_outage_is_not_remembered_longer_than_the_ceiling() {
        let backoff = ReopenBackoff::new(2.0).max(Duration::from_secs(60));
        let after = |openings| (0..openings).fold(0, |level, _| backoff.raised(BASE, level));
        assert_eq!([0, 1, 2, 3, 4, 100_000].map(after), [0, 1, 2, 3, 3, 3]);
        assert_eq!(backoff.wait(BASE, 3, 0), Duration::from_secs(60));
        assert_eq!(ReopenBackoff::default().raised(BASE, 0), 0);
    }

    #[test]
    fn nonsense_is_refused() {
        for factor in [0.0, 0.99, -1.0, 101.0, f64::NAN, f64::INFINITY] {
            assert!(ReopenBackoff::new(factor).check(BASE).is_err(), "{factor}");
        }
        for jitter in [-0.1, 1.1, f64::NAN] {
            assert!(ReopenBackoff::new(2.0).jitter(jitter).check(BASE).is_err());
        }
        assert!(ReopenBackoff::new(2.0).max(BASE / 2).check(BASE).is_err());
    }
}
