//! Hooks: what is done once nothing is left in flight.

use std::{fmt, future::Future, pin::Pin, time::Duration};

use buttress_core::BoxError;

use crate::Label;

/// How early a hook runs: higher first, equal ones at the same time. Any
/// number is one.
///
/// ```
/// use buttress_drain::Priority;
///
/// assert!(Priority::CRITICAL > Priority::from(99));
/// assert_eq!(Priority::default(), Priority::from(50));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Priority(pub i32);

impl Priority {
    /// 100: what must not be lost, whatever comes after it.
    pub const CRITICAL: Self = Self(100);
    /// 75.
    pub const HIGH: Self = Self(75);
    /// 50, the default.
    pub const NORMAL: Self = Self(50);
    /// 25.
    pub const LOW: Self = Self(25);
    /// 0: what is good to do if there is time.
    pub const BACKGROUND: Self = Self(0);
}

impl Default for Priority {
    fn default() -> Self {
        Self::NORMAL
    }
}

impl From<i32> for Priority {
    fn from(priority: i32) -> Self {
        Self(priority)
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a hook may end with: nothing, or a `Result` of nothing.
pub trait HookOutput: Send + 'static {
    /// The same for all.
    ///
    /// # Errors
    ///
    /// The hook's own.
    fn into_result(self) -> Result<(), BoxError>;
}

impl HookOutput for () {
    fn into_result(self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl<E: Into<BoxError> + Send + 'static> HookOutput for Result<(), E> {
    fn into_result(self) -> Result<(), BoxError> {
        self.map_err(Into::into)
    }
}

/// Something that is done when nothing is left in flight: flush, commit, close.
///
/// A panic or an error of one is reported and stops no other. One that takes
/// longer than its limit, or than all of it may take, is dropped where it
/// awaits; those after it are skipped when no time is left. A hook that blocks
/// its thread cannot be ended, and blocks the others on a runtime of one thread.
///
/// ```
/// use std::time::Duration;
/// use buttress_drain::{Hook, Priority, Shutdown};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let shutdown = Shutdown::builder().build()?;
/// shutdown.hook(
///     Hook::new("flush", async || Err::<(), _>("the disk is full"))
///         .priority(Priority::CRITICAL)
///         .limit(Duration::from_secs(2)),
/// );
/// shutdown.hook(Hook::new("say goodbye", async || ()));
///
/// shutdown.trigger_without_delay("it is time");
/// let report = shutdown.run().await;
/// assert_eq!(report.hooks().len(), 2);
/// assert_eq!(report.exit_code(), 1);
/// # Ok(())
/// # }
/// ```
#[must_use = "a hook does nothing before it is registered"]
pub struct Hook {
    pub(crate) name: Label,
    pub(crate) priority: Priority,
    pub(crate) limit: Option<Duration>,
    pub(crate) action: Action,
}

pub(crate) type Action = Box<dyn FnOnce() -> Running + Send>;
type Running = Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>>;

impl Hook {
    /// A hook of this name, for logs and the report.
    pub fn new<F, R>(name: impl Into<Label>, action: F) -> Self
    where
        F: FnOnce() -> R + Send + 'static,
        R: Future<Output: HookOutput> + Send + 'static,
    {
        Self {
            name: name.into(),
            priority: Priority::default(),
            limit: None,
            action: Box::new(|| {
                let running = action();
                Box::pin(async { running.await.into_result() })
            }),
        }
    }

    /// How early it runs. Default [`Priority::NORMAL`], 50.
    pub fn priority(mut self, priority: impl Into<Priority>) -> Self {
        self.priority = priority.into();
        self
    }

    /// How long it may take. Default: as the
    /// [builder](crate::ShutdownBuilder::hook_limit) has it, 5 s. Never longer
    /// than what is left of the whole.
    pub const fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hook")
            .field("name", &self.name)
            .field("priority", &self.priority)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}
