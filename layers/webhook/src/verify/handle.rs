//! Looking at a layer's settings and changing them while it serves.

use std::{fmt, sync::Arc, time::Duration};

use super::{
    VerifyConfigError,
    error::Problem,
    shared::{Secrets, Shared},
};
use crate::{Keyring, Secret};

/// A handle on a [`VerifyLayer`](crate::VerifyLayer): shared by all its clones
/// and services. Cheap to clone.
///
/// ```
/// use buttress_webhook::{Secret, Standard, VerifyLayer};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let old = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
/// let new = Secret::new("whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBk=")?;
/// let layer = VerifyLayer::builder(Standard::new()).secrets([old.clone()]).build()?;
/// // Both hold until the sender has moved on.
/// layer.handle().set_secrets([new, old])?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct VerifyHandle {
    shared: Arc<Shared>,
}

impl VerifyHandle {
    pub(crate) const fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The layer's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The name of its scheme.
    #[must_use]
    pub fn scheme(&self) -> &'static str {
        self.shared.scheme.name()
    }

    /// Replaces the secrets, for what is verified from now on.
    ///
    /// # Errors
    ///
    /// As [`VerifyBuilder::build`](crate::VerifyBuilder::build), or if they are
    /// looked up; the old ones stay.
    pub fn set_secrets(
        &self,
        secrets: impl IntoIterator<Item = Secret>,
    ) -> Result<(), VerifyConfigError> {
        let Secrets::Given(keys) = &self.shared.secrets else {
            return Err(Problem::LookedUp.into());
        };
        let new = Keyring::new(&*self.shared.scheme, secrets)?;
        keys.set(new);
        Ok(())
    }

    /// Forgets the secrets that were looked up, so that the next request of
    /// each tenant has them looked up again. Does nothing where they are given.
    pub fn forget_secrets(&self) {
        if let Secrets::LookedUp(tenants) = &self.shared.secrets {
            tenants.forget();
        }
    }

    /// How far a message's time may be from this end's.
    #[must_use]
    pub fn tolerance(&self) -> Duration {
        self.shared.tolerance()
    }

    /// Replaces the tolerance, and with it how long completed messages are
    /// remembered. After a shorter one that is as long as before until what
    /// passed by the longer one can pass no more. After a longer one those that
    /// are forgotten already are not remembered again: they may repeat once.
    ///
    /// # Errors
    ///
    /// Unless it is whole seconds, from 1 to 366 days' worth; the old one
    /// stays.
    pub fn set_tolerance(&self, tolerance: Duration) -> Result<(), VerifyConfigError> {
        self.shared.set_tolerance(tolerance)
    }

    /// How many bytes a body may have.
    #[must_use]
    pub fn max_body(&self) -> usize {
        self.shared.max_body()
    }

    /// Replaces how many bytes a body may have. Calls that have begun keep what
    /// they began with.
    ///
    /// # Errors
    ///
    /// If it is 0; the old one stays.
    pub fn set_max_body(&self, bytes: usize) -> Result<(), VerifyConfigError> {
        self.shared.set_max_body(bytes)
    }

    /// How many messages are remembered in this process, those in progress and
    /// those that are about to be forgotten among them.
    #[must_use]
    pub fn claims(&self) -> usize {
        let replays = self.shared.replays.as_ref();
        replays.map_or(0, |replays| replays.memory.lock().len())
    }
}

impl fmt::Debug for VerifyHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyHandle")
            .field("name", &self.name())
            .field("scheme", &self.scheme())
            .field("tolerance", &self.tolerance())
            .field("max_body", &self.max_body())
            .finish_non_exhaustive()
    }
}
