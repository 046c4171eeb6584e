//! A lock that is held: dropping it frees it.

use std::{future::Future, pin::Pin, sync::Arc};

use buttress_core::body::{BodyEnd, BodyGuard};

use crate::{Fence, shared::Core, store::Held};

/// A lock that a request holds until this is dropped.
pub struct Lease {
    fence: Fence,
    // Before it is counted as given back.
    held: Held,
    _tally: Tally,
}

impl Lease {
    pub(crate) fn new(fence: Fence, held: Held, core: &Arc<Core>) -> Self {
        core.took();
        Self {
            fence,
            held,
            _tally: Tally(Arc::clone(core)),
        }
    }

    pub(crate) const fn fence(&self) -> &Fence {
        &self.fence
    }

    /// Whether it can end while it is held.
    pub(crate) const fn can_be_lost(&self) -> bool {
        self.held.can_be_lost()
    }

    /// Ends when the lease does.
    pub(crate) fn lost(&self) -> Option<Lost> {
        self.can_be_lost().then(|| {
            let fence = self.fence.clone();
            let lost: Lost = Box::pin(async move { fence.lost().await });
            lost
        })
    }

    pub(crate) const fn core(&self) -> &Arc<Core> {
        &self._tally.0
    }
}

/// Ends when a lease does.
pub(crate) type Lost = Pin<Box<dyn Future<Output = ()> + Send>>;

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.fence).finish()
    }
}

struct Tally(Arc<Core>);

impl Drop for Tally {
    fn drop(&mut self) {
        self.0.gave_back();
    }
}

/// What a body holds: a lease, if there is one.
pub(crate) struct Hold(pub(crate) Option<Lease>);

impl BodyGuard for Hold {
    fn ended(self, _: BodyEnd<'_>, _: u64) {
        drop(self.0);
    }
}
