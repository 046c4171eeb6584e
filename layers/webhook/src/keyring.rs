//! The keys that may have signed a request.

use std::sync::Arc;

use crate::{Key, Scheme, Secret, SecretError};

/// More would have one request compute too much.
const MOST: usize = 16;

/// The keys of one scheme, each of which may have signed: the new one and the
/// old ones of a rotation. Never empty; cheap to clone.
#[derive(Clone, Debug)]
pub struct Keyring(Arc<[Key]>);

impl Keyring {
    /// The keys that `scheme` reads from these secrets.
    ///
    /// # Errors
    ///
    /// If there are none or more than 16, or if one is none of this scheme.
    pub fn new(
        scheme: &dyn Scheme,
        secrets: impl IntoIterator<Item = Secret>,
    ) -> Result<Self, SecretError> {
        let keys = secrets
            .into_iter()
            .take(MOST + 1)
            .map(|secret| scheme.key(&secret))
            .collect::<Result<Arc<[Key]>, _>>()?;
        match keys.len() {
            0 => Err(SecretError::None),
            1..=MOST => Ok(Self(keys)),
            _ => Err(SecretError::TooMany { most: MOST }),
        }
    }

    /// Of this key alone.
    pub(crate) fn of(key: Key) -> Self {
        Self(Arc::new([key]))
    }

    /// The keys, in the order of their secrets.
    #[must_use]
    pub fn keys(&self) -> &[Key] {
        &self.0
    }

    /// How many there are: at least one.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}
