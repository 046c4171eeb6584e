//! The layer: secrets, and a memory, that all of its services share.

use std::{fmt, sync::Arc};

use tower_layer::Layer;

use super::{Verify, VerifyBuilder, VerifyHandle, shared::Shared};
use crate::Scheme;

/// Lets in what is signed, once. The [crate's front page](crate) shows it at
/// work.
///
/// The state was made by [`build`](VerifyBuilder::build): clones of the layer
/// and all services they make share it.
#[derive(Clone)]
pub struct VerifyLayer {
    shared: Arc<Shared>,
}

impl VerifyLayer {
    /// Starts a layer over HTTP services that lets in what is signed by this
    /// scheme, and by no other.
    pub fn builder(scheme: impl Scheme) -> VerifyBuilder {
        VerifyBuilder::new(Arc::new(scheme))
    }

    pub(crate) fn new(shared: Shared) -> Self {
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Looks at the settings and changes them, while it serves.
    #[must_use]
    pub fn handle(&self) -> VerifyHandle {
        VerifyHandle::new(Arc::clone(&self.shared))
    }
}

impl<S> Layer<S> for VerifyLayer {
    type Service = Verify<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Verify::new(inner, Arc::clone(&self.shared))
    }
}

impl fmt::Debug for VerifyLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyLayer")
            .field("name", &self.shared.name)
            .field("scheme", &self.shared.scheme.name())
            .finish_non_exhaustive()
    }
}
