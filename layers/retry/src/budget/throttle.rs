//! gRPC's throttle: as long as not too many fail.

use buttress_core::{
    classify::Verdict,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use super::Budget;
use crate::error::ConfigError;

/// A token, in the unit that is counted: gRFC A6 ignores what is finer.
const TOKEN: u32 = 1000;
const MAX_TOKENS: u32 = 1000;

/// gRPC's `retryThrottling`: a failure takes a token, a success brings a part
/// of one, and there are retries as long as more than half of the tokens are
/// left.
///
/// Tokens are counted in thousandths. It begins with all of them and leave for
/// an attempt costs none: what the attempt costs, its outcome says. So of many
/// that are under way at once, all may be retried before the first of them
/// fails again, and there is no bound other than how soon failures are seen.
///
/// A failure is for A6 an attempt that ended with a status which is retried, or
/// with a pushback that forbids to retry. Errors that are the caller's own are
/// to be [ignored](Verdict::Ignored).
///
/// A request is nothing to it; a success with all tokens there, and a
/// [`withdraw`](Budget::withdraw), are a read.
///
/// Source: gRFC A6, "Throttling Retry Attempts and Hedged RPCs".
///
/// ```
/// use buttress_core::classify::Verdict;
/// use buttress_retry::{Budget, Throttle};
///
/// # fn main() -> Result<(), buttress_retry::ConfigError> {
/// // In a service config: {"maxTokens": 10, "tokenRatio": 0.1}
/// let throttle = Throttle::new(10, 100)?;
/// let retried = [(); 5].map(|()| {
///     throttle.outcome(Verdict::Failure);
///     throttle.withdraw()
/// });
/// assert_eq!(retried, [true, true, true, true, false]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Throttle {
    tokens: AtomicU32,
    max: u32,
    ratio: u32,
}

impl Throttle {
    /// With `max_tokens`, 1 to 1000, of which a success brings
    /// `ratio_thousandths` / 1000, more than none and no more than all.
    ///
    /// # Errors
    ///
    /// When either is out of its range.
    pub fn new(max_tokens: u32, ratio_thousandths: u32) -> Result<Self, ConfigError> {
        if !(1..=MAX_TOKENS).contains(&max_tokens) {
            return Err(ConfigError::new("a throttle has from 1 to 1000 tokens"));
        }
        let max = max_tokens * TOKEN;
        if !(1..=max).contains(&ratio_thousandths) {
            return Err(ConfigError::new(
                "a success brings some of a throttle's tokens",
            ));
        }
        Ok(Self {
            tokens: AtomicU32::new(max),
            max,
            ratio: ratio_thousandths,
        })
    }

    /// How many tokens are left, in thousandths.
    #[must_use]
    pub fn tokens_thousandths(&self) -> u32 {
        self.tokens.load(Relaxed)
    }
}

impl Budget for Throttle {
    #[inline]
    fn request(&self) {}

    #[inline]
    fn withdraw(&self) -> bool {
        self.tokens.load(Relaxed) > self.max / 2
    }

    #[inline]
    fn outcome(&self, verdict: Verdict) {
        // None is written that changes nothing: successes while all is well.
        let next = |tokens: u32| match verdict {
            Verdict::Success if tokens < self.max => Some((tokens + self.ratio).min(self.max)),
            Verdict::Failure if tokens > 0 => Some(tokens.saturating_sub(TOKEN)),
            _ => None,
        };
        let _ = self.tokens.fetch_update(Relaxed, Relaxed, next);
    }
}
