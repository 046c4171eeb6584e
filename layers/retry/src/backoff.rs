//! How long to wait before the next attempt.
//!
//! A [`Backoff`] is settings, shared by all; [`Delays`] is the one session of
//! them that a request has. Nothing here sleeps or keeps a generator: each wait
//! is drawn from the [`SharedRandom`] that is given, so no two sessions draw the
//! same sequence (tower's `ExponentialBackoffMaker` clones its generator, and
//! they do).
//!
//! With `c` for the wait of the n-th retry before jitter, at most the cap:
//!
//! | [`Jitter`] | wait |
//! |---|---|
//! | `None` | c |
//! | `Full` | U\[0, c\] |
//! | `Equal` | c/2 + U\[0, c/2\] |
//! | `Decorrelated` | min(cap, U\[initial, 3 · the wait before\]) |
//!
//! Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture
//! Blog, 2015. There and here the cap comes before full and equal jitter:
//! capping what was drawn (as resilience4j does) would heap the waits up on the
//! cap, where all who failed together meet again. And each wait is a number of
//! nanoseconds, never of seconds and the rest apart: one of exactly a second is
//! spread like any other (tower 0.5 and linkerd give it no jitter).

use std::{fmt, sync::Arc, time::Duration};

use buttress_core::random::SharedRandom;

use crate::error::ConfigError;

/// The cap of [`Backoff::exponential`]: that of the AWS SDKs' standard mode.
const EXPONENTIAL_MAX: Duration = Duration::from_secs(20);

/// How long to wait before each retry.
///
/// ```
/// use std::time::Duration;
/// use buttress_core::random::SharedRandom;
/// use buttress_retry::{Backoff, Jitter};
///
/// let backoff = Backoff::exponential(Duration::from_millis(100))
///     .max(Duration::from_secs(1))
///     .jitter(Jitter::None);
/// let mut delays = backoff.delays();
/// let waits = [(); 5].map(|()| delays.next(&backoff, &SharedRandom::default()).as_millis());
/// assert_eq!(waits, [100, 200, 400, 800, 1000]);
/// ```
#[derive(Clone, Debug)]
pub struct Backoff {
    growth: Growth,
    factor: f64,
    max: Duration,
    jitter: Jitter,
}

/// How the waits of a [`Backoff`] are spread, so that who failed together does
/// not come back together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Jitter {
    /// Not at all.
    None,
    /// Anything from nothing to the whole wait: the least work for a service
    /// that all come back to, and the default of [`Backoff::exponential`].
    #[default]
    Full,
    /// From half of the wait to the whole: where it must never be too short.
    Equal,
    /// From the initial wait to three times the wait before, at most the cap.
    /// It grows by that alone: neither the kind of backoff nor its factor
    /// matters. Once at the cap it stays there about two times of three.
    Decorrelated,
}

#[derive(Clone)]
enum Growth {
    Fixed(Duration),
    Linear(Duration),
    Exponential(Duration),
    Custom(Arc<dyn Fn(u32) -> Duration + Send + Sync>),
}

impl Backoff {
    const fn new(growth: Growth) -> Self {
        Self {
            growth,
            factor: 2.0,
            max: Duration::MAX,
            jitter: Jitter::None,
        }
    }

    /// The same wait each time; it may be zero. No jitter unless asked for.
    #[must_use]
    pub const fn fixed(delay: Duration) -> Self {
        Self::new(Growth::Fixed(delay))
    }

    /// `initial · n` before the n-th retry: no cap and no jitter unless asked
    /// for.
    #[must_use]
    pub const fn linear(initial: Duration) -> Self {
        Self::new(Growth::Linear(initial))
    }

    /// `initial · factor^(n − 1)` before the n-th retry: factor 2, at most 20
    /// seconds, [full jitter](Jitter::Full).
    #[must_use]
    pub const fn exponential(initial: Duration) -> Self {
        Self::new(Growth::Exponential(initial))
            .max(EXPONENTIAL_MAX)
            .jitter(Jitter::Full)
    }

    /// What `wait` says before the n-th retry, n from 1: no cap and no jitter
    /// unless asked for.
    ///
    /// It is called for each retry, outside every lock, and may be asked for
    /// any n at any time.
    pub fn custom(wait: impl Fn(u32) -> Duration + Send + Sync + 'static) -> Self {
        Self::new(Growth::Custom(Arc::new(wait)))
    }

    /// How many times longer each wait is than the one before, where it is
    /// exponential: 1 or more. Default: 2.
    #[must_use]
    pub const fn factor(mut self, factor: f64) -> Self {
        self.factor = factor;
        self
    }

    /// The cap: no wait is longer, jitter and all. Not below the initial wait.
    #[must_use]
    pub const fn max(mut self, max: Duration) -> Self {
        self.max = max;
        self
    }

    /// How the waits are spread. [`Jitter::Decorrelated`] needs a cap.
    #[must_use]
    pub const fn jitter(mut self, jitter: Jitter) -> Self {
        self.jitter = jitter;
        self
    }

    /// The waits of one session: one request with its retries.
    #[must_use]
    pub const fn delays(&self) -> Delays {
        Delays {
            retries: 0,
            previous: None,
        }
    }

    /// No wait is longer than this; `Duration::MAX` where there is no cap.
    #[must_use]
    pub const fn longest(&self) -> Duration {
        self.max
    }

    /// The wait before the n-th retry, n from 1, as it is without jitter. Zero
    /// is read as 1.
    #[must_use]
    pub fn without_jitter(&self, retry: u32) -> Duration {
        let retry = retry.max(1);
        let wait = match &self.growth {
            Growth::Fixed(delay) => *delay,
            Growth::Linear(initial) => initial.saturating_mul(retry),
            Growth::Exponential(initial) => grown(*initial, self.factor, retry - 1),
            Growth::Custom(wait) => wait(retry),
        };
        wait.min(self.max)
    }

    /// Whether these settings make sense.
    #[cfg_attr(
        any(not(test), buttress_loom),
        expect(dead_code, reason = "for who builds a policy")
    )]
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        // What cannot be compared makes no sense either.
        if !(self.factor >= 1.0 && self.factor.is_finite()) {
            return Err(ConfigError::new(
                "the factor of a backoff is no finite number from 1 on",
            ));
        }
        let initial = match self.growth {
            Growth::Fixed(delay) => delay,
            Growth::Linear(initial) | Growth::Exponential(initial) => {
                if initial.is_zero() {
                    return Err(ConfigError::new("a backoff that grows begins at zero"));
                }
                initial
            }
            // The user's code is not run only to look at it.
            Growth::Custom(_) => Duration::ZERO,
        };
        if initial > self.max {
            return Err(ConfigError::new(
                "the initial wait of a backoff is above its cap",
            ));
        }
        if self.jitter == Jitter::Decorrelated && self.max == Duration::MAX {
            return Err(ConfigError::new(
                "decorrelated jitter grows for ever without a cap",
            ));
        }
        Ok(())
    }
}

/// `initial · factor^exponent`, to the nearest nanosecond.
///
/// In nanoseconds, not in seconds: a tenth of a second is no exact float, but
/// its 10⁸ nanoseconds are, and so is each doubling of them.
fn grown(initial: Duration, factor: f64, exponent: u32) -> Duration {
    if exponent == 0 {
        return initial;
    }
    let exponent = i32::try_from(exponent).unwrap_or(i32::MAX);
    #[expect(clippy::cast_precision_loss, reason = "exact up to 104 days")]
    let nanos = initial.as_nanos() as f64 * factor.powi(exponent);
    // A cast saturates, and what is no number (zero times infinity) is zero.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let nanos = nanos.round() as u128;
    from_nanos(nanos).max(initial)
}

/// Saturates.
fn from_nanos(nanos: u128) -> Duration {
    const SECOND: u128 = 1_000_000_000;
    let rest = (nanos % SECOND) as u32;
    u64::try_from(nanos / SECOND).map_or(Duration::MAX, |secs| Duration::new(secs, rest))
}

/// Where one session of a [`Backoff`] stands: how many retries it had and how
/// long the last wait was.
#[derive(Clone, Copy, Debug)]
pub struct Delays {
    retries: u32,
    previous: Option<Duration>,
}

impl Delays {
    /// The next wait, by the settings that the session was made from and one
    /// draw at most.
    pub fn next(&mut self, backoff: &Backoff, random: &SharedRandom) -> Duration {
        self.retries = self.retries.saturating_add(1);
        let wait = match backoff.jitter {
            Jitter::None => backoff.without_jitter(self.retries),
            Jitter::Full => random.up_to(backoff.without_jitter(self.retries)),
            Jitter::Equal => {
                let longest = backoff.without_jitter(self.retries);
                let half = longest / 2;
                half + random.up_to(longest - half)
            }
            Jitter::Decorrelated => {
                let shortest = backoff.without_jitter(1);
                let previous = self.previous.unwrap_or(shortest);
                let longest = previous.saturating_mul(3).max(shortest);
                let drawn = shortest + random.up_to(longest - shortest);
                drawn.min(backoff.max)
            }
        };
        self.previous = Some(wait);
        wait
    }

    /// Begins again with the first wait, as gRPC asks after a server's
    /// pushback (gRFC A6).
    pub const fn restart(&mut self) {
        self.retries = 0;
        self.previous = None;
    }
}

impl fmt::Debug for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(delay) => f.debug_tuple("Fixed").field(delay).finish(),
            Self::Linear(initial) => f.debug_tuple("Linear").field(initial).finish(),
            Self::Exponential(initial) => f.debug_tuple("Exponential").field(initial).finish(),
            Self::Custom(_) => f.write_str("Custom"),
        }
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests;
