//! Looking at a limiter and changing it while it serves.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use buttress_core::{Refusal, clock, key::Key, keyed::KeyId};

use crate::{
    ConfigError, Quota,
    store::{self, Ask, Detail, Table},
};

/// A handle on the state of a layer: what a key has left, and the means to
/// reset it or to replace a quota. Cheap to clone.
///
/// Limits are named as in [`Limit::name`](crate::Limit::name).
///
/// ```
/// use buttress_core::key::Key;
/// use buttress_rate_limit::{Limit, Quota, RateLimitLayer};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let layer = RateLimitLayer::builder()
///     .limit(Limit::new(Quota::per_second(10)).name("all"))
///     .build()?;
/// let handle = layer.handle();
/// assert_eq!(handle.usage("all", &Key::global())?.remaining, 10);
/// handle.set_quota("all", Quota::per_second(20))?;
/// assert_eq!(handle.usage("all", &Key::global())?.limit, 20);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Handle {
    tables: Arc<[Table]>,
}

/// How a key stands with a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// How many may come at once: the burst.
    pub limit: u32,
    /// How many of them are left.
    pub remaining: u32,
    /// In how long all of them are back; zero when they are.
    pub reset_after: Duration,
    /// In how long one more fits than does now; zero when all are back.
    pub next_after: Duration,
}

/// What can be wrong with a handle's call.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HandleError {
    /// The layer has no limit of this name.
    UnknownLimit(String),
    /// The quota makes no sense.
    Quota(ConfigError),
    /// The limit's own quota is never asked for: a closure chooses for each
    /// request ([`quota_by`](crate::Limit::quota_by)).
    QuotaIsChosen(String),
    /// Redis did not answer.
    #[cfg(feature = "redis")]
    Unanswered,
}

impl fmt::Display for HandleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownLimit(name) => write!(f, "there is no limit named {name:?}"),
            Self::Quota(_) => f.write_str("the quota cannot replace the limit's"),
            Self::QuotaIsChosen(name) => write!(
                f,
                "the limit {name:?} has no quota to replace: a closure chooses for each request"
            ),
            #[cfg(feature = "redis")]
            Self::Unanswered => f.write_str("redis did not answer"),
        }
    }
}

impl Error for HandleError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::UnknownLimit(_) | Self::QuotaIsChosen(_) => None,
            #[cfg(feature = "redis")]
            Self::Unanswered => None,
            Self::Quota(error) => Some(error),
        }
    }
}

impl Handle {
    pub(crate) fn new(tables: Arc<[Table]>) -> Self {
        Self { tables }
    }

    /// The names of the limits.
    pub fn limits(&self) -> impl Iterator<Item = &str> {
        self.tables.iter().map(|table| &*table.name)
    }

    /// One of the limits, to be asked without a service.
    ///
    /// # Errors
    ///
    /// Where there is no such limit.
    pub fn limit(&self, limit: &str) -> Result<LimitHandle, HandleError> {
        let (index, _) = self.table(limit)?;
        Ok(LimitHandle {
            tables: Arc::clone(&self.tables),
            index,
        })
    }

    /// A charge of `cost` to `key`, under the quota that a handle knows of.
    fn ask(&self, limit: &str, key: &Key, cost: u32) -> Result<(Ask, &Table), HandleError> {
        let (limit, table) = self.table(limit)?;
        let id = table.id(key);
        let quota = table.exception(id);
        let ask = Ask {
            limit,
            id,
            cost,
            quota,
        };
        Ok((ask, table))
    }

    fn table(&self, limit: &str) -> Result<(usize, &Table), HandleError> {
        self.tables
            .iter()
            .enumerate()
            .find(|(_, table)| table.name == limit)
            .ok_or_else(|| HandleError::UnknownLimit(limit.to_owned()))
    }

    /// How `key` stands with a limit, under its own quota or the limit's (not
    /// one that [`quota_by`](crate::Limit::quota_by) chose). Charges nothing,
    /// and a key that was not there still is not.
    ///
    /// # Errors
    ///
    /// Where there is no such limit.
    pub fn usage(&self, limit: &str, key: &Key) -> Result<Usage, HandleError> {
        let (ask, table) = self.ask(limit, key, 0)?;
        let standing = table.peek(&ask, clock::now());
        Ok(Usage {
            limit: standing.burst,
            remaining: standing.remaining,
            reset_after: Duration::from_nanos(standing.until_full),
            next_after: Duration::from_nanos(standing.until_more),
        })
    }

    /// Gives `cost` back to `key`, as far as it has not come back by itself.
    ///
    /// # Errors
    ///
    /// Where there is no such limit.
    pub fn refund(&self, limit: &str, key: &Key, cost: u32) -> Result<(), HandleError> {
        let (ask, table) = self.ask(limit, key, cost)?;
        table.refund(&ask, clock::now());
        Ok(())
    }

    /// Makes the quota of `key` whole. Whether anything was spent of it.
    ///
    /// # Errors
    ///
    /// Where there is no such limit.
    pub fn reset(&self, limit: &str, key: &Key) -> Result<bool, HandleError> {
        let (_, table) = self.table(limit)?;
        Ok(table.reset(table.id(key), clock::now()))
    }

    /// Makes the quotas of all keys of a limit whole.
    ///
    /// # Errors
    ///
    /// Where there is no such limit.
    pub fn reset_all(&self, limit: &str) -> Result<(), HandleError> {
        self.table(limit)?.1.map().clear();
        Ok(())
    }

    /// Replaces the quota of a limit. Every key keeps the number of requests
    /// it has spent, at most the new burst: with 60 of 100 spent, 140 of 200
    /// are left, or none of 20.
    ///
    /// Takes effect shard by shard: while it runs (some milliseconds for a
    /// million keys) requests are decided by the old quota or the new one,
    /// and none waits for more than a shard.
    ///
    /// # Errors
    ///
    /// Where there is no such limit, it has no quota of its own (a closure
    /// chooses), or the new one makes no sense.
    pub fn set_quota(&self, limit: &str, quota: Quota) -> Result<(), HandleError> {
        let (_, table) = self.table(limit)?;
        if table.chosen {
            return Err(HandleError::QuotaIsChosen(limit.to_owned()));
        }
        let gcra = quota.check().map_err(HandleError::Quota)?;
        table.replace(gcra, clock::now());
        Ok(())
    }

    /// Gives `key` a quota of its own, or with `None` the limit's again. What
    /// it has spent stays spent, as in [`set_quota`](Self::set_quota); or, where
    /// the quota before or after is one that [`quota_by`](crate::Limit::quota_by)
    /// chooses, as it does there.
    ///
    /// # Errors
    ///
    /// Where there is no such limit, or the quota makes no sense.
    pub fn set_quota_for(
        &self,
        limit: &str,
        key: &Key,
        quota: Option<Quota>,
    ) -> Result<(), HandleError> {
        let (_, table) = self.table(limit)?;
        let gcra = quota
            .map(Quota::check)
            .transpose()
            .map_err(HandleError::Quota)?;
        table.except(table.id(key), gcra, clock::now());
        Ok(())
    }

    /// How many keys of a limit are in debt now. Walks the table, a shard at
    /// a time.
    ///
    /// # Errors
    ///
    /// Where there is no such limit.
    pub fn keys(&self, limit: &str) -> Result<usize, HandleError> {
        Ok(self.table(limit)?.1.map().live(clock::now()))
    }

    /// How many keys of a limit were forgotten in debt, because `max_keys`
    /// others were.
    ///
    /// # Errors
    ///
    /// Where there is no such limit.
    pub fn evicted(&self, limit: &str) -> Result<u64, HandleError> {
        Ok(self.table(limit)?.1.map().evicted())
    }
}

/// One limit, for what is limited and is no request of a service: a job, a
/// message, a log line. Shares its keys with the layer. Cheap to clone.
///
/// ```
/// use buttress_core::key::Key;
/// use buttress_rate_limit::{Limit, Quota, RateLimitLayer};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let layer = RateLimitLayer::builder()
///     .limit(Limit::new(Quota::per_minute(3)).name("mails"))
///     .build()?;
/// let mails = layer.handle().limit("mails")?;
/// let ann = Key::from("ann");
/// assert!(mails.check(&ann).is_ok());
/// assert!(mails.charge(&ann, 2).is_ok());
/// let refusal = mails.check(&ann).unwrap_err();
/// assert_eq!(refusal.retry_after_secs(), Some(20));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct LimitHandle {
    tables: Arc<[Table]>,
    index: usize,
}

impl LimitHandle {
    /// Charges 1 to `key`: see [`charge`](Self::charge).
    ///
    /// # Errors
    ///
    /// As [`charge`](Self::charge).
    #[inline(always)]
    pub fn check(&self, key: &Key) -> Result<(), Refusal> {
        self.charge(key, 1)
    }

    /// Charges `cost` to `key` if it fits, under the key's own quota or the
    /// limit's (not one that [`quota_by`](crate::Limit::quota_by) chooses).
    ///
    /// Decides this limit alone, and is not among the requests that the
    /// layer's metrics count.
    ///
    /// # Errors
    ///
    /// Why it does not fit, and when it will. Nothing is charged then.
    // The key is hashed where it was made: one that has to go through memory
    // costs more than its hash.
    #[inline(always)]
    pub fn charge(&self, key: &Key, cost: u32) -> Result<(), Refusal> {
        let table = &self.tables[self.index];
        self.charge_id(table.id(key), cost)
    }

    #[inline(always)]
    fn charge_id(&self, id: KeyId, cost: u32) -> Result<(), Refusal> {
        let table = &self.tables[self.index];
        if !table.has_exceptions() {
            let mut held = table.hold_known(id, clock::now());
            if held.charge_known(id, cost).is_some() {
                return Ok(());
            }
        }
        self.charge_slowly(id, cost)
    }

    /// The same where the key is not there yet, does not fit or has a quota
    /// of its own.
    #[inline(never)]
    fn charge_slowly(&self, id: KeyId, cost: u32) -> Result<(), Refusal> {
        let table = &self.tables[self.index];
        let ask = Ask {
            limit: self.index,
            id,
            cost,
            quota: table.exception(id),
        };
        let held = table.hold(id, clock::now());
        let decision = store::decide_one(held, &ask, Detail::None);
        match decision.verdict.refusal() {
            None => Ok(()),
            Some((_, refusal)) => Err(refusal),
        }
    }
}

#[cfg(test)]
mod tests;
