//! Where locks are: in this process, or in Redis.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

#[cfg(feature = "redis")]
use buttress_core::BoxError;
use buttress_core::key::Key;

use crate::{Fence, lease::Lease, shared::Core};

pub(crate) mod memory;
#[cfg(feature = "redis")]
pub(crate) mod redis;

pub(crate) enum Store {
    Memory(Arc<memory::Memory>),
    #[cfg(feature = "redis")]
    Redis(redis::Remote),
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
    /// Takes the lock of `key`, or waits for it for `wait`.
    pub(crate) fn claim(&self, core: &Arc<Core>, key: Key, wait: Duration) -> Claim {
        let lease = {
            let core = Arc::clone(core);
            move |fence: Fence, held: Held| Lease::new(fence, held, &core)
        };
        match self {
            Self::Memory(memory) => {
                let memory = Arc::clone(memory);
                match memory.claim(key) {
                    Ok(place) => match place.try_take() {
                        Ok((fence, held)) => Claim::Now(Ok(lease(fence, Held::Memory(held)))),
                        Err(place) if !wait.is_zero() => Claim::Later(Box::pin(async move {
                            let (fence, held) = place.take(wait).await.ok_or(Denied::Busy)?;
                            Ok(lease(fence, Held::Memory(held)))
                        })),
                        Err(_) => Claim::Now(Err(Denied::Busy)),
                    },
                    Err(memory::Full) => Claim::Now(Err(Denied::Full)),
                }
            }
            #[cfg(feature = "redis")]
            Self::Redis(remote) => {
                let core = Arc::clone(core);
                let lock = remote.lock(&core, &key, wait);
                Claim::Later(Box::pin(async move {
                    let (fence, held) = redis::take(lock, core).await?;
                    Ok(lease(fence, Held::Redis(held)))
                }))
            }
        }
    }
}
