//! Where locks are: in this process, or in Redis.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use buttress_core::key::Key;
#[cfg(feature = "redis")]
use buttress_core::{BoxError, clock};

use crate::{lease::Lease, shared::Core};

pub(crate) mod memory;
#[cfg(feature = "redis")]
pub(crate) mod redis;

pub(crate) enum Store {
    Memory(Arc<memory::Memory>),
    /// Behind a line of this process: of those that wait here for one key, one
    /// asks.
    #[cfg(feature = "redis")]
    Redis(redis::Remote, Arc<memory::Memory>),
}

/// What is held, and freed when it is dropped.
pub(crate) enum Held {
    Memory(#[expect(dead_code, reason = "it is dropped")] memory::Held),
    #[cfg(feature = "redis")]
    Redis(#[expect(dead_code, reason = "it is dropped")] redis::Held),
}

impl Held {
    pub(crate) const fn can_be_lost(&self) -> bool {
        match self {
            Self::Memory(_) => false,
            #[cfg(feature = "redis")]
            Self::Redis(_) => true,
        }
    }
}

/// What comes of asking for a lock.
pub(crate) type Claimed = Result<Lease, Denied>;

/// The answer that a store has yet to give. Dropped, it leaves nothing locked.
pub(crate) type Claiming = Pin<Box<dyn Future<Output = Claimed> + Send>>;

/// Why there is no lock.
#[derive(Debug)]
pub(crate) enum Denied {
    /// Somebody else has it.
    Busy,
    /// There are too many.
    Full,
    /// The store could not be asked.
    #[cfg(feature = "redis")]
    Failed(BoxError),
}

/// At once, or later.
pub(crate) enum Claim {
    Now(Claimed),
    Later(Claiming),
}

impl Store {
    /// How long to wait in line.
    fn patience(&self, place: &memory::Place, wait: Duration) -> Duration {
        #[cfg(feature = "redis")]
        if let Self::Redis(remote, _) = self
            && place.leaving().is_some()
        {
            // It is free but for a trip to Redis: who sends one request after
            // the other must not find its own last one in its way.
            return wait.max(remote.timeout());
        }
        let _ = place;
        wait
    }

    /// Takes the lock of `key`, or waits for it for `wait`.
    pub(crate) fn claim(&self, core: &Arc<Core>, key: &Key, wait: Duration) -> Claim {
        let line = match self {
            Self::Memory(line) => line,
            #[cfg(feature = "redis")]
            Self::Redis(_, line) => line,
        };
        let place = match Arc::clone(line).claim(key.clone()) {
            Ok(place) => place,
            Err(memory::Full) => return Claim::Now(Err(Denied::Full)),
        };
        let first = place.try_take();
        let patience = match &first {
            Ok(_) => Duration::ZERO,
            Err(place) => self.patience(place, wait),
        };
        if first.is_err() && patience.is_zero() {
            return Claim::Now(Err(Denied::Busy));
        }
        let core = Arc::clone(core);
        match self {
            Self::Memory(_) => match first {
                Ok(turn) => Claim::Now(Ok(here(turn, &core))),
                Err(place) => Claim::Later(Box::pin(async move {
                    let turn = place.take(patience).await.map_err(|_| Denied::Busy)?;
                    Ok(here(turn, &core))
                })),
            },
            #[cfg(feature = "redis")]
            Self::Redis(remote, _) => {
                let (lock, timeout) = (remote.lock(&core, key), remote.timeout());
                Claim::Later(Box::pin(async move {
                    let deadline = clock::now() + wait;
                    let turn = match first {
                        Ok(turn) => turn,
                        Err(place) => place
                            .take(patience)
                            .await
                            .map_err(|place| redis::overdue(&place, timeout))?,
                    };
                    // Who had it here has given it back by now.
                    let lock = lock.wait(deadline - clock::now());
                    let (fence, held) = redis::take(lock, turn, &core).await?;
                    Ok(Lease::new(fence, Held::Redis(held), &core))
                }))
            }
        }
    }
}

/// In this process alone, whose turn it is has the lock.
fn here(turn: memory::Turn, core: &Arc<Core>) -> Lease {
    let (fence, held) = turn.into_lock();
    Lease::new(fence, Held::Memory(held), core)
}
