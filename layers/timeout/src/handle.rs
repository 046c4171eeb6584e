//! Looking at a limit and changing it while it serves.

use std::{fmt, sync::Arc, time::Duration};

use crate::{ConfigError, shared::Shared};

/// A handle on a layer's limit: shared by all clones of the layer and by all of
/// its services. Cheap to clone.
///
/// ```
/// use std::time::Duration;
/// use buttress_timeout::TimeoutLayer;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let layer = TimeoutLayer::builder().limit(Duration::from_secs(2)).build()?;
/// let handle = layer.handle();
/// handle.set_limit(Duration::from_secs(5))?;
/// assert_eq!(handle.limit(), Some(Duration::from_secs(5)));
/// handle.set_limit(None)?;
/// assert_eq!(layer.handle().limit(), None);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    pub(crate) const fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The layer's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.shared.name()
    }

    /// The limit; `None` where there is none but the requests' deadlines.
    #[must_use]
    pub fn limit(&self) -> Option<Duration> {
        self.shared.limit()
    }

    /// Replaces the limit, or takes it away. Calls that have begun keep what
    /// they began with.
    ///
    /// # Errors
    ///
    /// Unless it is above 0 and at most 366 days; the old one stays.
    pub fn set_limit(&self, limit: impl Into<Option<Duration>>) -> Result<(), ConfigError> {
        self.shared.set_limit(limit.into())
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("name", &self.name())
            .field("limit", &self.limit())
            .finish()
    }
}
