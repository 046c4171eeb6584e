//! One quota for a whole fleet, kept in Redis.
//!
//! [`RateLimitBuilder::redis`] is the one line that it takes. The layer that is
//! built then is a [`FleetLayer`]; its headers, refusals, keys, costs and
//! metrics are those of [`RateLimitLayer`](crate::RateLimitLayer).
//!
//! ```text
//!                              ┌ known to be refused: no trip
//!  request ──▶ keys, costs ────┤
//!                              ├ Redis: one script decides, and charges all
//!                              │ limits or none ──▶ pass, or refuse
//!                              └ Redis is gone: OnStoreError
//! ```
//!
//! ```no_run
//! use buttress_core::key::header;
//! use buttress_rate_limit::{Limit, Quota, RateLimitLayer};
//! use buttress_redis::Redis;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let redis = Redis::from_env()?;
//! let layer = RateLimitLayer::builder()
//!     .name("api")
//!     .limit(Limit::new(Quota::per_minute(100)).key(header("x-api-key")))
//!     .redis(&redis)
//!     .build()?;
//! # let _ = layer;
//! # Ok(())
//! # }
//! ```
//!
//! # What is in Redis
//!
//! One key for each limit and client in debt,
//! `{prefix}rate-limit:{layer:client}:limit`, whose value is the microsecond at
//! which its quota is whole again, by the server's clock, and which is gone a
//! few milliseconds after that. The client is 128 bits of the SHA-256 of its
//! key, in base64: who can look into Redis sees no API key. Processes share a
//! quota where the prefix, the layer's name and the limit's name are the same;
//! layers that are not to share one need names that differ. What others put
//! under such a key is taken for nothing, or cut to what the quota allows, and
//! replaced.
//!
//! A process's clock has no say in a decision. Where the server's steps back
//! (a replica was promoted), no debt is more than a whole burst.
//!
//! # What is known to be refused
//!
//! Each process remembers when the keys that it has asked for are whole again,
//! as far as the time it sent the question tells, at most
//! [`max_keys`](crate::Limit::max_keys) of them. What does not fit by that is
//! refused without asking. Where a trip is short beside the time of a token (a
//! thirty-second of it), the time of the answer is taken, which may refuse for a
//! trip too long and never asks too early; and who comes for a key while one
//! of its last tokens is asked for waits for that answer: a key that is denied
//! costs one command for each token's time, however many want it. That holds as
//! long as nobody gives anything back: another process's [`FleetHandle::reset`],
//! or a key that was deleted by hand, is noticed only when the request would
//! have been let in without it. Where
//! [`refund_if`](RateLimitBuilder::refund_if) is set, and for several limits in
//! a cluster, nothing is refused so.

mod ask;
mod backed;
mod bucket;
mod fleet;
mod future;
mod ground;
mod handle;
mod lane;
mod layer;
mod lease;
mod pack;
mod script;
mod service;
mod strict;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use buttress_core::View;
use buttress_redis::Redis;

pub(crate) use ask::FleetAsk;
pub use bucket::{StoreError, Taken, TokenBucket};
pub use future::{ErrorFuture, ResponseFuture};
pub use handle::{FleetHandle, FleetLimit};
pub use layer::FleetLayer;
pub use lease::Lease;
pub use service::FleetRateLimit;

use self::{backed::Backed, fleet::Fleet, ground::Ground};
use crate::{
    ConfigError, RateLimitBuilder, Respond,
    config::InMemory,
    layer::{Errors, Shared},
    limiter::Limiter,
};

/// How processes share a quota.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// What passes was charged in Redis first: over any span `t` all processes
    /// together let no more than `burst + t × limit / period` through. One trip
    /// for each request that may pass, or less: checks that wait at the same
    /// time share one. The default.
    #[default]
    Strict,
    /// A process takes a share of a busy key's quota ahead, and charges it
    /// itself: some tens of nanoseconds, and one trip for a hundred requests.
    /// The fleet lets a little more through in a span of time, or less:
    /// [`Lease`] says how much.
    Leased(Lease),
}

impl Mode {
    /// Leased, as it comes.
    #[must_use]
    pub fn leased() -> Self {
        Self::Leased(Lease::default())
    }
}

/// What happens to a request when Redis cannot be asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnStoreError {
    /// The same limits in this process alone, from what it knew of their keys;
    /// [`share`](RateLimitBuilder::share) says how much of the quota. What it
    /// lets through is charged in Redis within a second of its return, whether
    /// requests come then or not, as long as time has not paid it, the tokio
    /// runtime runs, and for a minute after the last of the layer is dropped. Of
    /// a request whose question was sent and not answered in time nobody knows
    /// whether it was charged: it is not charged again. One whose connection was
    /// lost is. The default.
    #[default]
    Local,
    /// It passes, uncharged, and without headers.
    Allow,
    /// It is refused, 503, without `Retry-After` or headers.
    Deny,
}

impl OnStoreError {
    #[cfg(feature = "metrics")]
    pub(crate) const ALL: [Self; 3] = [Self::Local, Self::Allow, Self::Deny];

    /// As a label of metrics.
    #[cfg(feature = "metrics")]
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

/// The state is in Redis: see [`RateLimitBuilder::redis`].
#[derive(Clone, Debug)]
pub struct InRedis {
    redis: Redis,
    mode: Mode,
    on_error: OnStoreError,
    share: u32,
}

impl<V: View, M> RateLimitBuilder<V, M, InMemory> {
    /// Keeps the state in Redis: one quota for all processes that give the
    /// layer and the limit the same names.
    ///
    /// Waiting for one's turn ([`WaitLayer`](crate::WaitLayer)) is not to be
    /// had so: a line is in one process.
    pub fn redis(self, redis: &Redis) -> RateLimitBuilder<V, M, InRedis> {
        self.kept_in(InRedis {
            redis: redis.clone(),
            mode: Mode::default(),
            on_error: OnStoreError::default(),
            share: 1,
        })
    }
}

impl<V: View, M> RateLimitBuilder<V, M, InRedis> {
    /// How processes share the quota. Default: [`Mode::Strict`].
    pub fn mode(mut self, mode: Mode) -> Self {
        self.kept.mode = mode;
        self
    }

    /// What happens to requests while Redis cannot be asked. Default:
    /// [`OnStoreError::Local`].
    pub fn on_store_error(mut self, on_error: OnStoreError) -> Self {
        self.kept.on_error = on_error;
        self
    }

    /// How many processes there are, about: with [`OnStoreError::Local`] each
    /// takes that part of the quota for its own while Redis is gone. Default:
    /// 1, the whole quota each. 0 is taken for 1. Of a burst that is smaller
    /// than their number each lets one request through in the time in which the
    /// burst comes back.
    pub fn share(mut self, processes: u32) -> Self {
        self.kept.share = processes.max(1);
        self
    }

    fn fleet(self, gives_back: impl FnOnce(&M) -> bool) -> Result<FleetShared<V, M>, ConfigError> {
        let name = self.name_of().to_owned();
        let kept = self.kept.clone();
        let shared = Arc::new(self.shared()?);
        let tables = Arc::clone(shared.limiter.tables());
        let gives_back = gives_back(&shared.mode);
        let ground = Arc::new(Ground::new(kept.redis, tables, &name, gives_back));
        let fleet = Fleet::new(Arc::clone(&ground), kept.mode);
        Ok(FleetShared {
            shared,
            on_error: kept.on_error,
            backed: Arc::new(Backed::new(ground, fleet, kept.on_error, kept.share)),
        })
    }
}

impl<V: View> RateLimitBuilder<V, Respond, InRedis> {
    /// Checks the settings and makes what all clones of the layer share. Does
    /// not wait for Redis to be there.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings: see [`ConfigError`].
    pub fn build(self) -> Result<FleetLayer<V, Respond>, ConfigError> {
        self.fleet(|mode| mode.refund.is_some())
            .map(FleetLayer::new)
    }
}

impl<V: View> RateLimitBuilder<V, Errors, InRedis> {
    /// Checks the settings and makes what all clones of the layer share. Does
    /// not wait for Redis to be there.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings: see [`ConfigError`].
    pub fn build(self) -> Result<FleetLayer<V, Errors>, ConfigError> {
        self.fleet(|_| false).map(FleetLayer::new)
    }
}

/// What a server stack asks of a layer.
const _: fn() = || {
    fn fits<T: Clone + Send + Sync + 'static>() {}
    fn sent<T: Send>() {}
    fits::<FleetLayer>();
    fits::<FleetLayer<buttress_core::Any<std::cell::Cell<u8>>, Errors>>();
    fits::<FleetRateLimit<()>>();
    sent::<ResponseFuture<(), (), (), ()>>();
    sent::<ErrorFuture<(), buttress_core::Http, (), ()>>();
};

/// What a fleet's layer, its services and their futures have in common.
pub(crate) struct FleetShared<V: View, M> {
    pub(crate) shared: Arc<Shared<V, M>>,
    pub(crate) backed: Arc<Backed>,
    on_error: OnStoreError,
}

impl<V: View, M> FleetShared<V, M> {
    pub(crate) fn limiter(&self) -> &Limiter<V> {
        &self.shared.limiter
    }
}
