//! The layer of a fleet.

use std::{fmt, sync::Arc};

use buttress_core::{Http, View};
use tower_layer::Layer;

use super::{FleetHandle, FleetRateLimit, FleetShared};
use crate::Respond;

/// Limits how many requests pass in all processes together: see the
/// [module](super).
///
/// The state was made by `build()`: clones of the layer and all services they
/// make share it, and with it the trips to Redis.
pub struct FleetLayer<V: View = Http, M = Respond> {
    shared: Arc<FleetShared<V, M>>,
}

impl<V: View, M> FleetLayer<V, M> {
    pub(super) fn new(shared: FleetShared<V, M>) -> Self {
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Looks up and resets keys and replaces quotas, while it serves.
    #[must_use]
    pub fn handle(&self) -> FleetHandle {
        FleetHandle::new(Arc::clone(&self.shared.backed))
    }
}

impl<S, V: View, M> Layer<S> for FleetLayer<V, M> {
    type Service = FleetRateLimit<S, V, M>;

    fn layer(&self, inner: S) -> Self::Service {
        FleetRateLimit::new(inner, Arc::clone(&self.shared))
    }
}

impl<V: View, M> Clone for FleetLayer<V, M> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<V: View, M> fmt::Debug for FleetLayer<V, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FleetLayer")
            .field("limiter", self.shared.limiter())
            .field("redis", &self.shared.backed.ground.redis)
            .finish_non_exhaustive()
    }
}
