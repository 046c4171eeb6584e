//! Looking at a lock and changing it while it serves.

use std::{fmt, sync::Arc, time::Duration};

use crate::{ConfigError, shared::Core};

/// A handle on a layer: shared by all clones of the layer and by all of its
/// services. Cheap to clone.
///
/// ```
/// use std::time::Duration;
/// use buttress_core::key;
/// use buttress_lock::LockLayer;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let layer = LockLayer::builder(key::header("x-order")).build()?;
/// let handle = layer.handle();
/// assert_eq!(handle.held(), 0);
/// handle.set_wait(Duration::from_millis(250))?;
/// assert_eq!(layer.handle().wait(), Duration::from_millis(250));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Handle {
    core: Arc<Core>,
}

impl Handle {
    pub(crate) const fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// The layer's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.core.name()
    }

    /// How many locks requests of this process hold.
    #[must_use]
    pub fn held(&self) -> usize {
        self.core.held()
    }

    /// How long a lease lasts: see [`ttl`](crate::LockBuilder::ttl).
    #[must_use]
    pub fn ttl(&self) -> Duration {
        self.core.ttl()
    }

    /// Changes how long leases last: of those that are held, from their next
    /// extension on.
    ///
    /// # Errors
    ///
    /// Unless it is from 10 ms to a day; the old one stays.
    pub fn set_ttl(&self, ttl: Duration) -> Result<(), ConfigError> {
        self.core.set_ttl(ttl)
    }

    /// How long a request waits for a lock: see
    /// [`wait`](crate::LockBuilder::wait).
    #[must_use]
    pub fn wait(&self) -> Duration {
        self.core.wait()
    }

    /// Changes how long requests wait that come from now on.
    ///
    /// # Errors
    ///
    /// If it is more than a day; the old one stays.
    pub fn set_wait(&self, wait: Duration) -> Result<(), ConfigError> {
        self.core.set_wait(wait)
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("name", &self.name())
            .field("held", &self.held())
            .finish_non_exhaustive()
    }
}
