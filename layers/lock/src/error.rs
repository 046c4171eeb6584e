//! What this layer itself can say.

use std::fmt;

use buttress_core::{BoxError, Inspect, Refusal};

/// Settings that make no sense; the message says what they must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(Problem);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    Name,
    Ttl,
    Wait,
    RetryAfter,
}

impl From<Problem> for ConfigError {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Problem::Name => "the name must be 1 to 64 printable ASCII characters",
            Problem::Ttl => "the lease must be from 10 ms to a day",
            Problem::Wait => "the wait must be at most a day",
            Problem::RetryAfter => "retry_after must be at most a day",
        })
    }
}

impl std::error::Error for ConfigError {}

/// What a call, or a response's body, fails with: its own error, or the
/// lock's, a [`Refusal`].
///
/// Of kind `Locked` it is where another request holds the lock; `Overloaded`
/// where too many keys are held; `BadRequest` where there is no key;
/// `StoreUnavailable` where Redis cannot be asked, or, with the reason
/// `lock_lost`, where the lock was lost while the request was served.
///
/// No [`std::error::Error`] itself, so that it can become a [`BoxError`] that
/// holds what is inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error<E> {
    /// It was not let through, or has lost its lock.
    Refused(Refusal),
    /// It failed by itself.
    Inner(E),
}

impl<E> Error<E> {
    /// The lock's error, if it is one.
    pub const fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            Self::Inner(_) => None,
        }
    }

    /// The call's own error, if it is one.
    pub fn into_inner(self) -> Option<E> {
        match self {
            Self::Refused(_) => None,
            Self::Inner(error) => Some(error),
        }
    }
}

impl<E: fmt::Display> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => refusal.fmt(f),
            Self::Inner(error) => error.fmt(f),
        }
    }
}

impl<E> From<Refusal> for Error<E> {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl<E: Inspect> Inspect for Error<E> {
    fn error(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            Self::Inner(error) => error.error(),
        }
    }

    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal.clone()),
            Self::Inner(error) => error.refusal(),
        }
    }
}

impl<E: Into<BoxError>> From<Error<E>> for BoxError {
    fn from(error: Error<E>) -> Self {
        match error {
            Error::Refused(refusal) => refusal.into(),
            Error::Inner(error) => error.into(),
        }
    }
}
