//! Looking at a fleet's limits and changing them while it serves.

use std::{fmt, sync::Arc, time::Duration};

use buttress_core::{Refusal, RefusalKind, clock, key::Key};

use super::{
    FleetAsk,
    backed::{Backed, Outcome},
    ground::Stand,
};
use crate::{
    Gcra, HandleError, Quota, Usage,
    store::{Detail, Standing, Table},
};

/// A handle on a fleet's limits: what a key has left, and the means to reset it
/// or to replace a quota. Cheap to clone.
///
/// What it asks of Redis takes no longer than an operation may. Quotas are each
/// process's own: who replaces one does so in all of them. What a key owes by
/// then stays owed, as the time it takes to come back, at most a whole burst.
#[derive(Clone)]
pub struct FleetHandle {
    backed: Arc<Backed>,
}

impl FleetHandle {
    pub(super) fn new(backed: Arc<Backed>) -> Self {
        Self { backed }
    }

    fn tables(&self) -> &[Table] {
        &self.backed.ground.tables
    }

    /// The names of the limits.
    pub fn limits(&self) -> impl Iterator<Item = &str> {
        self.tables().iter().map(|table| &*table.name)
    }

    /// One of the limits, to be asked without a service.
    ///
    /// # Errors
    ///
    /// Where there is no such limit.
    pub fn limit(&self, limit: &str) -> Result<FleetLimit, HandleError> {
        let (index, _) = self.table(limit)?;
        Ok(FleetLimit {
            backed: Arc::clone(&self.backed),
            index,
        })
    }

    fn table(&self, limit: &str) -> Result<(usize, &Table), HandleError> {
        self.tables()
            .iter()
            .enumerate()
            .find(|(_, table)| table.name == limit)
            .ok_or_else(|| HandleError::UnknownLimit(limit.to_owned()))
    }

    fn ask(&self, limit: &str, key: &Key, cost: u32) -> Result<FleetAsk, HandleError> {
        let (index, _) = self.table(limit)?;
        Ok(ask(&self.backed, index, key, cost))
    }

    /// How `key` stands with a limit, under its own quota or the limit's (not
    /// one that [`quota_by`](crate::Limit::quota_by) chose). Charges nothing,
    /// and a key that was not there still is not. One trip.
    ///
    /// # Errors
    ///
    /// Where there is no such limit, or Redis does not answer.
    pub async fn usage(&self, limit: &str, key: &Key) -> Result<Usage, HandleError> {
        let ask = self.ask(limit, key, 0)?;
        let stand = self.backed.peek(&ask).await;
        let stand = stand.map_err(|_| HandleError::Unanswered)?;
        let standing = standing(&ask, stand);
        Ok(Usage {
            limit: standing.burst,
            remaining: standing.remaining,
            reset_after: Duration::from_nanos(standing.until_full),
            next_after: Duration::from_nanos(standing.until_more),
        })
    }

    /// Gives back what this process has taken ahead of all keys' quotas, and
    /// takes nothing ahead from then on: for the end of a drain. Waits until
    /// Redis was told, as long as an operation may take for each 64 keys; what
    /// it could not be told, time gives back.
    ///
    /// Without [`Mode::Leased`](super::Mode::Leased) there is nothing to do.
    /// Dropped, it may have given back some and not told of others.
    pub async fn give_back(&self) {
        self.backed.give_back().await;
    }

    /// Gives `cost` back to `key`, as far as it has not come back by itself;
    /// where Redis does not answer, in this process.
    ///
    /// # Errors
    ///
    /// Where there is no such limit.
    pub async fn refund(&self, limit: &str, key: &Key, cost: u32) -> Result<(), HandleError> {
        let ask = self.ask(limit, key, cost)?;
        self.backed.refund(&[ask], false).await;
        Ok(())
    }

    /// Makes the quota of `key` whole. Whether anything was spent of it.
    ///
    /// Other processes that know the key to be refused notice when it would
    /// have been let in without that.
    ///
    /// # Errors
    ///
    /// Where there is no such limit, or Redis does not answer.
    pub async fn reset(&self, limit: &str, key: &Key) -> Result<bool, HandleError> {
        let ask = self.ask(limit, key, 0)?;
        let reset = self.backed.reset(&ask).await;
        reset.map_err(|_| HandleError::Unanswered)
    }

    /// Replaces the quota of a limit, in this process.
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
        // What is known was put in terms that the server does not know of.
        table.map().clear();
        Ok(())
    }

    /// Gives `key` a quota of its own, or with `None` the limit's again, in
    /// this process.
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
        let (index, table) = self.table(limit)?;
        let gcra = quota
            .map(Quota::check)
            .transpose()
            .map_err(HandleError::Quota)?;
        let id = table.id(key);
        table.except(id, gcra, clock::now());
        self.backed.ground.forget(index, id);
        Ok(())
    }
}

impl fmt::Debug for FleetHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FleetHandle")
            .field("tables", &self.tables())
            .finish_non_exhaustive()
    }
}

/// One of a fleet's limits, for what is limited and is no request of a service:
/// a job, a message. Shares its keys with the layer. Cheap to clone.
#[derive(Clone)]
pub struct FleetLimit {
    backed: Arc<Backed>,
    index: usize,
}

impl FleetLimit {
    /// Charges 1 to `key`: see [`charge`](Self::charge).
    ///
    /// # Errors
    ///
    /// As [`charge`](Self::charge).
    pub async fn check(&self, key: &Key) -> Result<(), Refusal> {
        self.charge(key, 1).await
    }

    /// Charges `cost` to `key` if it fits, under the key's own quota or the
    /// limit's (not one that [`quota_by`](crate::Limit::quota_by) chooses).
    /// Where Redis cannot be asked, it goes as
    /// [`on_store_error`](crate::RateLimitBuilder::on_store_error) says.
    ///
    /// Decides this limit alone, and is not among the requests that the
    /// layer's metrics count. Dropped, it has charged once or not at all.
    ///
    /// # Errors
    ///
    /// Why it does not fit, and when it will. Nothing is charged then.
    pub async fn charge(&self, key: &Key, cost: u32) -> Result<(), Refusal> {
        let asks = [ask(&self.backed, self.index, key, cost)];
        let outcome = match self.backed.decide_now(&asks, Detail::None) {
            Some(outcome) => outcome,
            None => self.backed.decide(&asks, Detail::None).await,
        };
        match outcome {
            Outcome::Decided(decision) | Outcome::Alone(decision) => {
                match decision.verdict.refusal() {
                    None => Ok(()),
                    Some((_, refusal)) => Err(refusal),
                }
            }
            Outcome::Allowed => Ok(()),
            Outcome::Denied => Err(Refusal::new(RefusalKind::StoreUnavailable)),
        }
    }
}

impl fmt::Debug for FleetLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FleetLimit")
            .field("name", &self.backed.ground.tables[self.index].name)
            .finish_non_exhaustive()
    }
}

/// A charge of `cost` to `key`, under the quota that a handle knows of.
fn ask(backed: &Backed, limit: usize, key: &Key, cost: u32) -> FleetAsk {
    let table = &backed.ground.tables[limit];
    let id = table.id(key);
    let gcra: Gcra = table.exception(id).unwrap_or_else(|| table.common(id));
    FleetAsk {
        limit,
        key: key.clone(),
        id,
        cost,
        gcra,
    }
}

fn standing(ask: &FleetAsk, (tat, now): Stand) -> Standing {
    Standing::of(ask.limit, &ask.gcra, tat, now, Detail::All)
}
