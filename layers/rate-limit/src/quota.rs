//! What a limit allows, and what makes a quota sound.

use std::{fmt, time::Duration};

use crate::{error::ConfigError, gcra::Gcra};

/// So many requests in so long, and so many of them at once.
///
/// A quota of `limit` in `period` regains one request every `period / limit`,
/// exactly: no interval is rounded to milliseconds, microseconds or
/// nanoseconds. (Only of limits above 1,048,576 that share no large divisor
/// with the period is it rounded up, by less than a millionth of a
/// nanosecond.)
///
/// `burst` is how many may come at once after a quiet while; it is the limit
/// unless set. Over any span of time `t` at most `burst + t × limit / period`
/// requests pass.
///
/// ```
/// use std::time::Duration;
/// use buttress_rate_limit::Quota;
///
/// let quota = Quota::per_second(100).burst(200);
/// let daily = Quota::new(1_000, Duration::from_secs(24 * 60 * 60));
/// assert!(quota.check().is_ok() && daily.check().is_ok());
///
/// // Nonsense is found when the layer is built, not when it serves.
/// assert!(Quota::per_second(0).check().is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quota {
    limit: u32,
    period: Duration,
    burst: Option<u32>,
}

impl Quota {
    /// `limit` requests in every `period`.
    #[must_use]
    pub const fn new(limit: u32, period: Duration) -> Self {
        Self {
            limit,
            period,
            burst: None,
        }
    }

    /// `limit` requests in every second.
    #[must_use]
    pub const fn per_second(limit: u32) -> Self {
        Self::new(limit, Duration::from_secs(1))
    }

    /// `limit` requests in every minute.
    #[must_use]
    pub const fn per_minute(limit: u32) -> Self {
        Self::new(limit, Duration::from_secs(60))
    }

    /// `limit` requests in every hour.
    #[must_use]
    pub const fn per_hour(limit: u32) -> Self {
        Self::new(limit, Duration::from_secs(60 * 60))
    }

    /// How many may come at once. Default: the limit.
    #[must_use]
    pub const fn burst(mut self, burst: u32) -> Self {
        self.burst = Some(burst);
        self
    }

    /// Checks the quota and works out its constants.
    ///
    /// The layer's `build()` does so by itself; a closure that chooses among
    /// quotas for each request returns them checked.
    ///
    /// # Errors
    ///
    /// A limit, a burst or a period of zero; a burst that takes more than nine
    /// years to come back; more than one request a nanosecond.
    pub const fn check(self) -> Result<Gcra, ConfigError> {
        let burst = match self.burst {
            Some(burst) => burst,
            None => self.limit,
        };
        if self.limit == 0 {
            return Err(ConfigError::ZeroLimit);
        }
        if self.period.is_zero() {
            return Err(ConfigError::ZeroPeriod);
        }
        if burst == 0 {
            return Err(ConfigError::ZeroBurst);
        }
        Gcra::new(self.limit, self.period, burst)
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {:?}", self.limit, self.period)?;
        match self.burst {
            Some(burst) => write!(f, ", {burst} at once"),
            None => Ok(()),
        }
    }
}
