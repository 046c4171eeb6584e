//! Claims in Redis, for a fleet.
//!
//! ```text
//!         claim: SET NX, for the lease        complete: for `keep`
//!  absent ───────────────────────────▶ p‹token› ──────────────────▶ c
//!    ▲                                    │                         │
//!    └─ release, or the lease is over ────┴──────── keep is over ───┘
//! ```
//!
//! One string a message and one script a step, which sets a TTL on whatever it
//! writes. What must be told and could not be is told later.

mod later;

use std::{fmt, sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use buttress_core::{BoxError, clock};
use buttress_redis::{Key, Redis};

use self::later::{Desk, Work};
use super::{Claim, ClaimKey, ClaimToken, ReplayStore, StoreFuture};
use crate::{VerifyConfigError, mac::sha256, verify::error::Problem};

/// Twice of what the vendors' senders wait for an answer at most.
const LEASE: Duration = Duration::from_secs(60);
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// A [`ReplayStore`] in Redis: of the copies of one message that come to a
/// fleet one is handled.
///
/// ```
/// use std::time::Duration;
///
/// use buttress_redis::Redis;
/// use buttress_webhook::{RedisReplays, Secret, Standard, VerifyLayer};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let secret = || Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
/// let redis = Redis::from_url("redis://127.0.0.1:6379")?;
/// let layer = VerifyLayer::builder(Standard::new())
///     .name("orders")
///     .secrets([secret()?])
///     .redis(&redis)
///     .build()?;
/// // Or, where a handler may take longer than a minute:
/// let store = RedisReplays::new(&redis).lease(Duration::from_secs(600))?;
/// let layer = VerifyLayer::builder(Standard::new())
///     .name("reports")
///     .secrets([secret()?])
///     .replay_store(store)
///     .build()?;
/// # let _ = layer;
/// # Ok(())
/// # }
/// ```
///
/// A claim is one round trip of one script, and so is its end, which nobody
/// waits for. None takes longer than [`Redis::timeout`].
///
/// # When a process dies
///
/// A claim in progress is freed by its lease, 60 s unless [set](Self::lease):
/// until then repeats are told 409. A handler that takes longer than that is
/// not protected: a repeat reaches a handler too. What the slower one has done
/// then is known as done, unless the other one still is at work.
///
/// # When Redis fails
///
/// What happens to a message is [`OnStoreError`](super::OnStoreError), by
/// default a 503. A claim that may have been made all the same (no answer in
/// time, a connection that was cut) is given back. The end of a message that
/// could not be told, and what was done under
/// [`Local`](super::OnStoreError::Local) meanwhile, is told within a second of
/// the server's return: at most 10 000 of them wait for that, and what is
/// beyond them stays in progress until its lease is over.
///
/// A server that comes back empty, or that evicts (have `maxmemory-policy
/// noeviction`), has forgotten what was done: a repeat of that is handled
/// again. What is done by then is known.
///
/// # In Redis
///
/// A message's key is `{prefix}webhook:{‹SHA-256 of the claim key, base64›}`,
/// 62 bytes with the default prefix; its value 17 bytes while it is in
/// progress and then 1; it always has a TTL. A message that is done takes
/// about 200 bytes of Redis 7's memory. There is no bound here on how many
/// there are, since the server has its own: at its `maxmemory` a new message
/// fails, and known ones are still known. A value that is not of this store is
/// never touched nor taken for anything: its message fails.
pub struct RedisReplays {
    desk: Arc<Desk>,
    lease: Duration,
}

impl RedisReplays {
    /// Claims on this server or cluster, with a lease of 60 s.
    #[must_use]
    pub fn new(redis: &Redis) -> Self {
        Self {
            desk: Arc::new(Desk::new(redis.clone())),
            lease: LEASE,
        }
    }

    /// How long a claim in progress stands when nobody ends it, because its
    /// process is gone. Longer than a handler takes, its answer's body
    /// included. Default: 60 s; 1 s to a day.
    ///
    /// # Errors
    ///
    /// When it is out of that range.
    pub fn lease(mut self, lease: Duration) -> Result<Self, VerifyConfigError> {
        if !(SHORTEST..=LONGEST).contains(&lease) {
            return Err(Problem::Lease.into());
        }
        self.lease = lease;
        Ok(self)
    }

    /// Hashed, so that it is as short for all, and shows nothing of them.
    fn key(&self, key: &ClaimKey) -> Key {
        let digest = sha256(&[key.as_str().as_bytes()]);
        self.desk.key(URL_SAFE_NO_PAD.encode(digest))
    }

    /// Does it now, or else later.
    async fn settle(&self, key: Key, work: Work) -> Result<(), BoxError> {
        let done = self.desk.settle(&key, &work).await;
        if done.as_ref().is_err_and(|error| error.kind().is_outage()) {
            self.desk.later(key, work);
        }
        Ok(done?)
    }
}

impl ReplayStore for RedisReplays {
    fn claim<'a>(&'a self, key: &'a ClaimKey, keep: Duration) -> StoreFuture<'a, Claim> {
        Box::pin(async move {
            let mut bytes = [0; 16];
            getrandom::fill(&mut bytes)?;
            let token = ClaimToken::new(u128::from_be_bytes(bytes));
            let key = self.key(key);
            let call = self.desk.claim(&key, token, self.lease, keep);
            match self.desk.redis.call::<u8>("webhook_claim", &call).await {
                Ok(later::NEW) => Ok(Claim::New(token)),
                Ok(later::IN_PROGRESS) => Ok(Claim::InProgress),
                Ok(later::COMPLETED) => Ok(Claim::Completed),
                Ok(_) => Err("redis webhook_claim: the answer makes no sense".into()),
                Err(error) => {
                    if error.may_be_done() {
                        let until = clock::now() + self.lease;
                        self.desk.later(key, Work::Release { token, until });
                    }
                    Err(error.into())
                }
            }
        })
    }

    fn complete<'a>(
        &'a self,
        key: &'a ClaimKey,
        token: ClaimToken,
        keep: Duration,
    ) -> StoreFuture<'a, ()> {
        let until = clock::now() + keep;
        let token = Some(token);
        Box::pin(self.settle(self.key(key), Work::Complete { token, until }))
    }

    fn release<'a>(&'a self, key: &'a ClaimKey, token: ClaimToken) -> StoreFuture<'a, ()> {
        let until = clock::now() + self.lease;
        Box::pin(self.settle(self.key(key), Work::Release { token, until }))
    }

    fn remember<'a>(&'a self, key: &'a ClaimKey, keep: Duration) -> StoreFuture<'a, ()> {
        let until = clock::now() + keep;
        Box::pin(self.settle(self.key(key), Work::Complete { token: None, until }))
    }
}

impl fmt::Debug for RedisReplays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisReplays")
            .field("redis", &self.desk.redis)
            .field("lease", &self.lease)
            .finish_non_exhaustive()
    }
}
