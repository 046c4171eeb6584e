//! A request that is counted.

use std::sync::Arc;

use buttress_core::clock;

use crate::{Label, ledger::Kind, shutdown::Inner, tracked::Slot};

/// A request that is counted until this is dropped.
pub(crate) struct Permit {
    pub(crate) inner: Arc<Inner>,
    /// None where nobody keeps track.
    slot: Option<Slot>,
}

impl Permit {
    #[inline]
    pub(crate) fn take(inner: &Arc<Inner>) -> Self {
        inner.ledger.enter(Kind::Request);
        inner.metrics.request_begins();
        Self {
            inner: Arc::clone(inner),
            slot: None,
        }
    }

    /// Has the report name it, if it is cut.
    pub(crate) fn track(&mut self, route: Label) {
        self.slot = Some(self.inner.tracked.insert(route, clock::recent()));
    }

    #[inline]
    pub(crate) fn sent(&self, bytes: usize) {
        if let Some(slot) = self.slot {
            self.inner.tracked.sent(slot, bytes as u64);
        }
    }
}

impl Drop for Permit {
    #[inline]
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.inner.tracked.remove(slot);
        }
        self.inner.metrics.request_ends();
        self.inner.leave(Kind::Request);
    }
}
