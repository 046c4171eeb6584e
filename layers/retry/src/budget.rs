//! What bounds the work that retries add.
//!
//! Each caller that tries four times makes five of an outage: retries are for
//! faults that are few. A [`Budget`] is asked before every attempt beyond a
//! request's first, be it a retry or a hedge, and one budget may be shared by
//! the clones of a service, by several layers and by hedges.
//!
//! | | leaves to retry |
//! |---|---|
//! | [`RetryBudget`] | a percentage of the requests, and a minimum each second. What a hedge has by default; a retry has none. |
//! | `FleetBudget` (feature `redis`) | the same for all processes of a fleet together |
//! | [`Throttle`] | as long as fewer than so many attempts failed, less those that succeeded: gRPC's |
//! | [`Adaptive`] | the more rarely, the more of the attempts lately were not accepted |
//!
//! ```text
//! request() ─▶ attempt ─▶ outcome(verdict) ─▶ again? ─▶ withdraw() ─┬─ true ──▶ attempt ─▶ outcome(…) …
//!                                                                   └─ false ─▶ what there is, is the answer
//! ```
//!
//! Requests are counted when they begin, whatever comes of them: a budget that
//! only a success fills (the example of tower 0.5) is empty in just the outage
//! that it is for.

use std::{fmt, sync::Arc};

use buttress_core::classify::Verdict;

mod adaptive;
#[cfg(feature = "redis")]
mod fleet;
mod percent;
mod throttle;

pub use adaptive::Adaptive;
#[cfg(feature = "redis")]
pub use fleet::{FleetBudget, OnStoreError};
pub use percent::RetryBudget;
pub use throttle::Throttle;

/// Decides whether there may be one more attempt.
///
/// Called on the hot path, outside every lock: an implementation must not
/// block. Implemented for [`Arc`]s of budgets, so that a budget can be shared
/// and still be looked at.
pub trait Budget: Send + Sync + fmt::Debug + 'static {
    /// A request begins: once for each, whatever comes of it; not for its
    /// retries and hedges.
    fn request(&self);

    /// Asks leave for one more attempt, a retry or a hedge. What was given is
    /// spent, even if the attempt is then dropped.
    fn withdraw(&self) -> bool;

    /// How an attempt ended, the first one and each other, before leave is
    /// asked for the next. One that was cancelled has no outcome. Only some
    /// budgets go by it: by default nothing happens.
    fn outcome(&self, verdict: Verdict) {
        let _ = verdict;
    }
}

impl<B: Budget + ?Sized> Budget for Arc<B> {
    fn request(&self) {
        (**self).request();
    }

    fn withdraw(&self) -> bool {
        (**self).withdraw()
    }

    fn outcome(&self, verdict: Verdict) {
        (**self).outcome(verdict);
    }
}

/// A [`Budget`] that every clone shares.
///
/// ```
/// use buttress_retry::{Budget, RetryBudget, SharedBudget};
///
/// # fn main() -> Result<(), buttress_retry::ConfigError> {
/// let reads = SharedBudget::new(RetryBudget::new(20, 0)?);
/// let writes = reads.clone();
/// for _ in 0..5 {
///     reads.request();
/// }
/// assert!(writes.withdraw());
/// assert!(!reads.withdraw());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct SharedBudget(Arc<dyn Budget>);

impl SharedBudget {
    /// Shares `budget`.
    pub fn new(budget: impl Budget) -> Self {
        Self(Arc::new(budget))
    }
}

impl Budget for SharedBudget {
    #[inline]
    fn request(&self) {
        self.0.request();
    }

    #[inline]
    fn withdraw(&self) -> bool {
        self.0.withdraw()
    }

    #[inline]
    fn outcome(&self, verdict: Verdict) {
        self.0.outcome(verdict);
    }
}

/// That of [`RetryBudget::default`], shared by nobody yet.
impl Default for SharedBudget {
    fn default() -> Self {
        Self::new(RetryBudget::default())
    }
}

impl fmt::Debug for SharedBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(all(test, buttress_loom))]
mod loom_tests;
#[cfg(all(test, not(buttress_loom)))]
mod tests;
