//! A token bucket by the name that people know it by.

use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

use buttress_core::{Any, RefusalKind, clock, key::Key, keyed};
use buttress_redis::{Error, Redis};

use super::{
    FleetAsk, Mode,
    fleet::Fleet,
    ground::{Ground, Unanswered},
};
use crate::{
    ConfigError, Gcra, Limit, Quota,
    store::{Detail, Table, Verdict},
};

/// A token bucket for each key, shared over Redis: so many tokens, and so many
/// a second more until it is full.
///
/// A thin face of the [strict](Mode::Strict) rate limit, by the same script:
/// one trip, or none for a key that is known to be refused.
///
/// ```no_run
/// use buttress_core::key::Key;
/// use buttress_rate_limit::redis::TokenBucket;
/// use buttress_redis::Redis;
///
/// # async fn send() -> Result<(), Box<dyn std::error::Error>> {
/// let bucket = TokenBucket::new(&Redis::from_env()?, "mails", 10, 2)?;
/// let taken = bucket.take(&Key::from("ann"), 1).await?;
/// if !taken.allowed {
///     println!("again in {:?} ms", taken.retry_after_ms);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct TokenBucket {
    fleet: Arc<Fleet>,
    ground: Arc<Ground>,
    gcra: Gcra,
}

/// What came of taking tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Taken {
    /// Whether they were taken.
    pub allowed: bool,
    /// How many are left.
    pub remaining: u32,
    /// When they can be, in milliseconds, rounded up: 0 where they were taken,
    /// `None` where there can never be so many.
    pub retry_after_ms: Option<u64>,
    /// In how long the bucket is full.
    pub reset: Duration,
}

impl TokenBucket {
    /// Buckets of `capacity` tokens, into which `refill_per_second` come each
    /// second. Processes that give them one name share them.
    ///
    /// # Errors
    ///
    /// A capacity or refill of zero, or one that takes more than nine years; a
    /// name that is not 1 to 64 printable ASCII characters.
    pub fn new(
        redis: &Redis,
        name: impl Into<Cow<'static, str>>,
        capacity: u32,
        refill_per_second: u32,
    ) -> Result<Self, ConfigError> {
        let quota = Quota::per_second(refill_per_second).burst(capacity);
        let gcra = quota.check()?;
        let name = name.into();
        // A limit's name has the same rules.
        Limit::<Any<()>>::any(quota)
            .name(name.clone())
            .check_name()?;
        let max_keys = const { std::num::NonZeroUsize::new(1_000_000).unwrap() };
        let table = Table::new("bucket".into(), gcra, max_keys, keyed::WhenFull::Evict);
        let _ = clock::now();
        let ground = Arc::new(Ground::new(redis.clone(), Arc::new([table]), &name, false));
        Ok(Self {
            fleet: Arc::new(Fleet::new(Arc::clone(&ground), Mode::Strict)),
            ground,
            gcra,
        })
    }

    /// Takes `tokens` out of the bucket of `key`, all or none. 0 only looks.
    ///
    /// Dropped, it has taken them once or not at all.
    ///
    /// # Errors
    ///
    /// Redis did not answer: whether they were taken is not known.
    pub async fn take(&self, key: &Key, tokens: u32) -> Result<Taken, StoreError> {
        let asks = [FleetAsk {
            limit: 0,
            id: self.ground.tables[0].id(key),
            key: key.clone(),
            cost: tokens,
            gcra: self.gcra,
        }];
        let decision = match self.fleet.decide_now(&asks, Detail::Tightest) {
            Some(decision) => decision,
            None => (self.fleet.decide(&asks, Detail::Tightest).await).map_err(|unanswered| {
                StoreError {
                    cause: match unanswered {
                        Unanswered::Failed(error) => Some(error),
                        Unanswered::Unasked | Unanswered::Unheard => None,
                    },
                }
            })?,
        };
        let standing = decision.tightest.expect("it was asked for");
        Ok(Taken {
            allowed: decision.verdict == Verdict::Pass,
            remaining: standing.remaining,
            retry_after_ms: match decision.verdict {
                Verdict::Pass => Some(0),
                Verdict::Wait { wait, .. } => Some(wait.div_ceil(1_000_000)),
                Verdict::Never { .. } | Verdict::NoRoom { .. } => None,
            },
            reset: Duration::from_nanos(standing.until_full),
        })
    }
}

impl fmt::Debug for TokenBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenBucket")
            .field("quota", &self.gcra)
            .finish_non_exhaustive()
    }
}

/// Redis did not answer.
#[derive(Clone, Debug)]
pub struct StoreError {
    cause: Option<Error>,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(RefusalKind::StoreUnavailable.default_detail())
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_ref().map(|cause| cause as _)
    }
}
