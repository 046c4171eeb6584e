//! What those hear of a drain who are in the middle of something.

use std::{fmt, sync::Arc, time::Duration};

use crate::{Phase, Reached, shutdown::Inner};

/// Tells a handler, or any work of its own, of the drain: softly first, and
/// hard when its time is up. Cheap to clone.
///
/// ```
/// use std::time::Duration;
/// use buttress_drain::Shutdown;
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let shutdown = Shutdown::builder().build()?;
/// let signal = shutdown.signal();
/// let worker = tokio::spawn(async move {
///     signal.notified().await;
///     // 30 s in all, less the 5 s that are the hooks'.
///     assert_eq!(signal.remaining(), Some(Duration::from_secs(25)));
/// });
/// shutdown.trigger("the operator");
/// worker.await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct DrainSignal {
    inner: Arc<Inner>,
}

impl DrainSignal {
    pub(crate) const fn new(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// Whether the notice was given: one atomic load.
    #[must_use]
    #[inline]
    pub fn is_draining(&self) -> bool {
        self.inner.phase() >= Phase::Draining
    }

    /// Ready at the notice: bring to an end what would go on for ever.
    #[must_use]
    pub fn notified(&self) -> Reached {
        Reached::new(Arc::clone(&self.inner), Phase::Draining)
    }

    /// Ready when what is still there is cut; or when nothing was left to cut,
    /// and the hooks begin.
    #[must_use]
    pub fn cut(&self) -> Reached {
        Reached::new(Arc::clone(&self.inner), Phase::Cut)
    }

    /// Whether it was cut: one atomic load.
    #[must_use]
    #[inline]
    pub fn is_cut(&self) -> bool {
        self.inner.phase() >= Phase::Cut
    }

    /// How long there is until the cut; `None` before the notice.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        self.inner.remaining()
    }
}

impl fmt::Debug for DrainSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DrainSignal")
            .field("phase", &self.inner.phase())
            .finish_non_exhaustive()
    }
}
