//! What this layer itself can say.

use std::fmt;

use buttress_core::{BoxError, Inspect, Refusal, RefusalKind};

/// A setting that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigError(&'static str);

impl ConfigError {
    pub(crate) const fn new(what: &'static str) -> Self {
        Self(what)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for ConfigError {}

/// Time was up before the service was ready for another attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed {
    /// A whole word: what is written as half of one and copied as more makes
    /// the processor wait.
    attempts: u64,
}

impl Elapsed {
    pub(crate) const fn after(attempts: u32) -> Self {
        Self {
            attempts: attempts as u64,
        }
    }

    /// How many attempts there were.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "it was one")]
    pub const fn attempts(self) -> u32 {
        self.attempts as u32
    }
}

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.attempts == 1 { "" } else { "s" };
        write!(f, "no time left after {} attempt{plural}", self.attempts)
    }
}

impl std::error::Error for Elapsed {}

/// The error of a retry over services of any kind.
///
/// No [`std::error::Error`] itself, so that it can become a [`BoxError`] that
/// holds what is inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error<E> {
    /// The inner service's, of the last attempt.
    Inner(E),
    /// Time was up between two attempts.
    Elapsed(Elapsed),
}

impl<E> Error<E> {
    /// The inner service's error, if it is one.
    pub fn into_inner(self) -> Option<E> {
        match self {
            Self::Inner(error) => Some(error),
            Self::Elapsed(_) => None,
        }
    }
}

impl<E: fmt::Display> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inner(error) => error.fmt(f),
            Self::Elapsed(elapsed) => elapsed.fmt(f),
        }
    }
}

impl From<Elapsed> for Refusal {
    fn from(_: Elapsed) -> Self {
        Self::new(RefusalKind::TimedOut)
    }
}

impl<E: Inspect> Inspect for Error<E> {
    fn error(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Elapsed(elapsed) => Some(elapsed),
            Self::Inner(error) => error.error(),
        }
    }

    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Elapsed(elapsed) => Some(Refusal::from(*elapsed)),
            Self::Inner(error) => error.refusal(),
        }
    }
}

impl<E: Into<BoxError>> From<Error<E>> for BoxError {
    fn from(error: Error<E>) -> Self {
        match error {
            Error::Inner(error) => error.into(),
            Error::Elapsed(elapsed) => Refusal::from(elapsed).into(),
        }
    }
}
