//! What is wrong with settings.

use std::{error, fmt};

use crate::SecretError;

/// Settings that make no sense; the message says what they must be.
#[derive(Clone, Debug)]
pub struct VerifyConfigError(Problem);

#[derive(Clone, Debug)]
pub(crate) enum Problem {
    Name,
    Tolerance,
    MaxBody,
    LookupTtl,
    NoSecrets,
    TwoSources,
    LookedUp,
    IdleStore,
    #[cfg(feature = "redis")]
    Lease,
    Secret(SecretError),
}

impl From<Problem> for VerifyConfigError {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl From<SecretError> for VerifyConfigError {
    fn from(error: SecretError) -> Self {
        Self(Problem::Secret(error))
    }
}

impl fmt::Display for VerifyConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Problem::Name => "the name must be 1 to 128 printable ASCII characters",
            Problem::Tolerance => "the tolerance must be whole seconds, 1 to 366 days' worth",
            Problem::MaxBody => "the largest body must have at least 1 byte",
            Problem::LookupTtl => "what is looked up must count for above 0 and at most 366 days",
            Problem::NoSecrets => "there must be secrets, or a lookup of them",
            Problem::TwoSources => "secrets are given or looked up, not both",
            Problem::LookedUp => "the secrets are looked up, so they are not set here",
            Problem::IdleStore => {
                "there is a store of claims, but the scheme signs neither id nor time, or replay protection is off"
            }
            #[cfg(feature = "redis")]
            Problem::Lease => "the lease of a claim must be from a second to a day",
            Problem::Secret(_) => "a secret cannot be used",
        })
    }
}

impl error::Error for VerifyConfigError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match &self.0 {
            Problem::Secret(error) => Some(error),
            _ => None,
        }
    }
}
