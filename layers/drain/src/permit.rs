//! A request that is counted.

use std::{pin::Pin, sync::Arc};

use buttress_core::clock;
use http::response::Parts;

use crate::{Label, Phase, Reached, layer::Options, ledger::Kind, shutdown::Inner, tracked::Slot};

/// A request that is counted until this is dropped. One word, since it is moved
/// from the call to the response and on to its body: two would be written one
/// by one and read together, which a processor waits for.
pub(crate) struct Permit(pub(crate) Arc<Inner>);

impl Permit {
    #[inline]
    pub(crate) fn take(inner: &Arc<Inner>) -> Self {
        inner.ledger.enter(Kind::Request);
        inner.metrics.request_begins();
        Self(Arc::clone(inner))
    }
}

impl Drop for Permit {
    #[inline]
    fn drop(&mut self) {
        self.0.metrics.request_ends();
        self.0.leave(Kind::Request);
    }
}

/// What a request has where the layer was asked for more than to count.
pub(crate) struct Extra {
    pub(crate) track: Option<Track>,
    /// None where no body is ended.
    pub(crate) streams: Option<Arc<Options>>,
    /// When the body is to end.
    pub(crate) end: Option<Pin<Box<Reached>>>,
}

impl Extra {
    /// Has the body end, if it is of a type that does: at the notice, where it
    /// was there before.
    pub(crate) fn look(&mut self, head: &Parts, inner: &Arc<Inner>) {
        if !self.streams.take().is_some_and(|types| types.ends(head)) {
            return;
        }
        let phase = match inner.phase() {
            Phase::Serving => Phase::Draining,
            _ => Phase::Closing,
        };
        self.end = Some(Box::pin(Reached::new(Arc::clone(inner), phase)));
    }
}

/// A request that the report can name, until this is dropped.
pub(crate) struct Track {
    inner: Arc<Inner>,
    slot: Slot,
}

impl Track {
    pub(crate) fn new(inner: &Arc<Inner>, route: Label) -> Self {
        let slot = inner.tracked.insert(route, clock::recent());
        let inner = Arc::clone(inner);
        Self { inner, slot }
    }

    pub(crate) fn sent(&self, bytes: usize) {
        self.inner.tracked.sent(self.slot, bytes as u64);
    }
}

impl Drop for Track {
    fn drop(&mut self) {
        self.inner.tracked.remove(self.slot);
    }
}
