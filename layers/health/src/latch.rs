//! What must have happened once before a process has started.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// Something that a start waits for: a cache that is warm, a migration that is
/// done. Released once, and for good. Clones are the same latch.
///
/// ```
/// use buttress_health::{HealthRegistry, Latch};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let warm = Latch::new("cache");
/// let health = HealthRegistry::builder().latch(&warm).build()?;
/// assert!(!health.has_started());
///
/// warm.release();
/// assert!(health.has_started() && health.readiness().is_ready());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Latch(Arc<State>);

struct State {
    name: Arc<str>,
    released: AtomicBool,
}

impl Latch {
    /// One that holds. The name is checked where it is added: 1 to 128
    /// printable ASCII characters.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(Arc::new(State {
            name: name.into(),
            released: AtomicBool::new(false),
        }))
    }

    /// Releases it. Again does nothing.
    pub fn release(&self) {
        self.0.released.store(true, Ordering::Release);
    }

    /// Whether it was released. Who sees that sees what was done before, too.
    #[must_use]
    pub fn is_released(&self) -> bool {
        self.0.released.load(Ordering::Acquire)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub(crate) fn shared_name(&self) -> &Arc<str> {
        &self.0.name
    }
}

impl fmt::Debug for Latch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Latch")
            .field("name", &self.name())
            .field("released", &self.is_released())
            .finish()
    }
}
