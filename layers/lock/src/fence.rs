//! What whoever serves a request knows of its lock.

use std::fmt;

use tokio::sync::watch;

/// The lock that a request holds, for whoever serves it: an extension of the
/// request over HTTP. Cheap to clone; a clone keeps nothing locked.
///
/// ```
/// use buttress_lock::Fence;
/// use http::Request;
///
/// fn serve(request: &Request<()>) -> Option<u64> {
///     let fence = request.extensions().get::<Fence>()?;
///     // With each write, so that it is refused once a later one has been.
///     Some(fence.token())
/// }
/// # assert_eq!(serve(&Request::new(())), None);
/// ```
#[derive(Clone)]
pub struct Fence {
    token: u64,
    standing: Standing,
}

#[derive(Clone)]
enum Standing {
    /// Over when its sender is gone.
    Here(watch::Receiver<()>),
    #[cfg(feature = "redis")]
    There(buttress_redis::Validity),
}

impl Fence {
    pub(crate) const fn here(token: u64, held: watch::Receiver<()>) -> Self {
        Self {
            token,
            standing: Standing::Here(held),
        }
    }

    #[cfg(feature = "redis")]
    pub(crate) fn there(lock: &buttress_redis::Lock) -> Self {
        Self {
            token: lock.token().get(),
            standing: Standing::There(lock.validity()),
        }
    }

    /// The fencing token: greater than that of all who held this lock before,
    /// so that what the lock protects can refuse who comes too late.
    #[must_use]
    pub const fn token(&self) -> u64 {
        self.token
    }

    /// The same as `buttress-redis` takes it, for its `fenced_set`.
    #[cfg(feature = "redis")]
    #[must_use]
    pub const fn fencing_token(&self) -> buttress_redis::FencingToken {
        buttress_redis::FencingToken::new(self.token)
    }

    /// Whether the lock is held, as far as this side can know. In one process
    /// that is certain; over Redis it [is not](crate#what-it-is-not).
    #[must_use]
    pub fn is_held(&self) -> bool {
        match &self.standing {
            Standing::Here(held) => held.has_changed().is_ok(),
            #[cfg(feature = "redis")]
            Standing::There(held) => held.is_held(),
        }
    }

    /// Waits until it is not held any more: because it was lost, or because
    /// the request is over.
    pub async fn lost(&self) {
        match &self.standing {
            Standing::Here(held) => {
                let mut held = held.clone();
                while held.changed().await.is_ok() {}
            }
            #[cfg(feature = "redis")]
            Standing::There(held) => held.lost().await,
        }
    }
}

impl fmt::Debug for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fence")
            .field("token", &self.token)
            .field("is_held", &self.is_held())
            .finish()
    }
}
