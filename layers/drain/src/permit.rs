//! A request that is counted.

use std::{pin::Pin, sync::Arc};

use buttress_core::clock;
use http::{StatusCode, response::Parts};

use crate::{
    Label, Phase, Reached, books::Books, layer::Options, ledger::Kind, metrics::Metrics,
    shutdown::Inner, tracked::Slot,
};

/// A request that is counted until this is dropped. One word, since it is moved
/// from the call to the response and on to its body: two would be written one
/// by one and read together, which a processor waits for.
pub(crate) struct Permit {
    books: &'static Books,
    metrics: Metrics,
}

impl Permit {
    #[inline]
    pub(crate) fn take(inner: &Inner) -> Self {
        inner.books.ledger.enter(Kind::Request);
        inner.metrics.request_begins();
        Self {
            books: inner.books,
            metrics: inner.metrics.clone(),
        }
    }

    /// Whether the notice was given, of which it may hear a moment late.
    #[inline]
    pub(crate) fn is_draining(&self) -> bool {
        self.books.ledger.glance() != Phase::Serving
    }
}

impl Drop for Permit {
    #[inline]
    fn drop(&mut self) {
        self.metrics.request_ends();
        self.books.leave(Kind::Request);
    }
}

/// What a request has where the layer was asked for more than to count.
pub(crate) struct Extra {
    pub(crate) track: Option<Track>,
    /// None where no body is ended.
    pub(crate) streams: Option<(Arc<Options>, Arc<Inner>)>,
    /// When the body is to end.
    pub(crate) end: Option<Pin<Box<Reached>>>,
}

impl Extra {
    /// Has the server know the tunnel that this turns into.
    pub(crate) fn name(&self, head: &mut Parts, connect: bool) {
        if let Some(track) = &self.track
            && (connect || head.status == StatusCode::SWITCHING_PROTOCOLS)
            && head.extensions.get::<Label>().is_none()
            && let Some(route) = track.inner.tracked.route(track.slot)
        {
            head.extensions.insert(route);
        }
    }

    /// Has the body end, if it is of a type that does: at the notice, where it
    /// was there before.
    pub(crate) fn look(&mut self, head: &Parts) {
        let Some((types, inner)) = self.streams.take() else {
            return;
        };
        if !types.ends(head) {
            return;
        }
        let phase = match inner.phase() {
            Phase::Serving => Phase::Draining,
            _ => Phase::Closing,
        };
        self.end = Some(Box::pin(Reached::new(inner, phase)));
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
