//! Looking at what signs and changing it while it serves.

use std::{fmt, sync::Arc};

use super::shared::Shared;
use crate::Signer;

/// A handle on a layer's signer: shared by all clones of the layer and by all
/// of its services. Cheap to clone.
///
/// ```
/// use buttress_webhook::{Secret, SignLayer, Signer, Standard};
///
/// let old = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
/// let new = Secret::new("whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBk=")?;
/// let layer = SignLayer::builder(Signer::new(Standard::new(), [old.clone()])?).build()?;
///
/// // Both, until every receiver knows the new one.
/// let handle = layer.handle();
/// handle.set_signer(Signer::new(Standard::new(), [new.clone(), old])?);
/// handle.set_signer(Signer::new(Standard::new(), [new])?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct SignHandle {
    shared: Arc<Shared>,
}

impl SignHandle {
    pub(crate) const fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The layer's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.shared.name()
    }

    /// What signs now.
    #[must_use]
    pub fn signer(&self) -> Signer {
        self.shared.active().signer.clone()
    }

    /// Has another one sign: requests whose bodies are still being read by
    /// now, too. The old keys are wiped when nobody holds them any more.
    pub fn set_signer(&self, signer: Signer) {
        self.shared.set_signer(signer);
    }

    /// How long a body may be, in bytes.
    #[must_use]
    pub fn max_body(&self) -> usize {
        self.shared.max_body()
    }

    /// Replaces how long a body may be, in bytes. Calls that have begun keep
    /// what they began with.
    pub fn set_max_body(&self, bytes: usize) {
        self.shared.set_max_body(bytes);
    }
}

impl fmt::Debug for SignHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignHandle")
            .field("name", &self.name())
            .field("signer", &self.signer())
            .field("max_body", &self.max_body())
            .finish()
    }
}
