//! Locks that a fleet shares, as leases in Redis.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use buttress_core::{clock, key::Key};
use buttress_redis::{Lock, LockBuilder, LockError, Redis};
use sha2::{Digest, Sha256};
use tokio::{task::AbortHandle, time::sleep};

use super::{
    Denied,
    memory::{Place, Turn},
};
use crate::{Fence, shared::Core};

/// How long the counter of a key's tokens is kept after its last request:
/// clients choose keys, so not for ever.
const FENCE: Duration = Duration::from_secs(24 * 3600);

/// Between two attempts to extend after one that failed, of a lease's length.
const AGAIN: u32 = 10;

pub(crate) struct Remote {
    redis: Redis,
}

impl Remote {
    pub(crate) const fn new(redis: Redis) -> Self {
        Self { redis }
    }

    /// How long giving a lock back takes at most.
    pub(crate) fn timeout(&self) -> Duration {
        self.redis.timeout()
    }

    pub(crate) fn lock(&self, core: &Core, key: &Key) -> LockBuilder {
        // What a client has sent is nobody's business there.
        let key = const_hex::const_encode::<32, false>(&Sha256::digest(key.as_bytes()).into());
        self.redis
            .lock_of([core.name(), key.as_str()])
            .ttl(core.ttl())
            .keep_fence(FENCE)
    }
}

/// A lease that is extended in the background, and given back when this is
/// dropped.
pub(crate) struct Held {
    renewal: AbortHandle,
    // In this order: who comes is told to wait for a lock that is free soon,
    // and where it is being extended at this moment, what is left of that gives
    // it back.
    _leaving: Leaving,
    _lock: Arc<Lock>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

/// When this is dropped the turn is over soon. It is over once the lock is
/// given back: the next one here would find it held until then.
struct Leaving(Arc<Turn>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Why there was no turn in time: whoever has it would be gone by now if Redis
/// answered, or is still there, or was until just now.
pub(crate) fn overdue(place: &Place, timeout: Duration) -> Denied {
    if place.leaving().is_some_and(|span| span >= timeout) {
        Denied::Failed("the last lock could not be given back in time".into())
    } else {
        Denied::Busy
    }
}

pub(crate) async fn take(
    lock: LockBuilder,
    turn: Turn,
    core: &Arc<Core>,
) -> Result<(Fence, Held), Denied> {
    let turn = Arc::new(turn);
    // Before the question: should nobody wait for the answer, what was taken is
    // given back behind it.
    let leaving = Leaving(Arc::clone(&turn));
    let taken = lock.keep(turn).take().await;
    let lock = match taken {
        Ok(lock) => lock,
        Err(LockError::Busy { .. }) => {
            core.store_works();
            return Err(Denied::Busy);
        }
        Err(LockError::Redis(error)) => return Err(Denied::Failed(error.into())),
        Err(error) => return Err(Denied::Failed(error.into())),
    };
    core.store_works();
    let fence = Fence::there(&lock);
    let lock = Arc::new(lock);
    // It does not keep the lock, or it would be given back only once the task
    // has been seen to.
    let left = lock.valid_until() - clock::now();
    let renewal = tokio::spawn(renew(Arc::downgrade(&lock), Arc::clone(core), left));
    let held = Held {
        renewal: renewal.abort_handle(),
        _leaving: leaving,
        _lock: lock,
    };
    Ok((fence, held))
}

/// Extends the lease until it is given back or lost. Its length is the lease's
/// own: the layer's may have been changed since it was asked for.
async fn renew(lock: Weak<Lock>, core: Arc<Core>, mut lease: Duration) {
    let mut pause = lease / 3;
    loop {
        sleep(pause).await;
        let Some(lock) = lock.upgrade() else {
            return;
        };
        let ttl = core.ttl();
        pause = match lock.extend(ttl).await {
            Ok(()) => {
                lease = ttl;
                lease / 3
            }
            Err(LockError::Lost) => return core.lock_lost("taken away"),
            Err(_) if !lock.is_held() => return core.lock_lost("not extended in time"),
            // It was tried, within the time limit of Redis; and again before
            // the lease is over.
            Err(_) => {
                lease = lease.min(ttl);
                lease / AGAIN
            }
        };
    }
}
