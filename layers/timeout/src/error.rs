//! What this layer itself can say.

use std::{fmt, sync::Arc, time::Duration};

use buttress_core::{BoxError, Inspect, Refusal, RefusalKind};

/// Settings that make no sense; the message says what they must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(Problem);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    Name,
    Limit,
}

impl From<Problem> for ConfigError {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Problem::Name => "the name must be 1 to 128 printable ASCII characters",
            Problem::Limit => "the limit must be above 0 and at most 366 days",
        })
    }
}

impl std::error::Error for ConfigError {}

/// Time ran out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elapsed {
    name: Arc<str>,
    after: Duration,
}

impl Elapsed {
    pub(crate) const fn new(name: Arc<str>, after: Duration) -> Self {
        Self { name, after }
    }

    /// The name of the layer whose time it was.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How much time there was when the call came; zero if its deadline was
    /// past by then, and the service was not called.
    #[must_use]
    pub const fn after(&self) -> Duration {
        self.after
    }
}

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, after } = self;
        if after.is_zero() {
            write!(f, "the deadline was past before the call ({name})")
        } else {
            write!(f, "time ran out after {after:?} ({name})")
        }
    }
}

impl std::error::Error for Elapsed {}

/// As other layers and responders know it, with the name as its origin.
impl From<Elapsed> for Refusal {
    fn from(elapsed: Elapsed) -> Self {
        let refusal = Self::new(RefusalKind::TimedOut).with_origin(elapsed.name.to_string());
        if elapsed.after.is_zero() {
            // Nobody has heard of the request, so any may go again.
            refusal.before_sending()
        } else {
            refusal
        }
    }
}

/// What a call, or a response's body, with a limit of time fails with: its own
/// error, or the limit's.
///
/// No [`std::error::Error`] itself, so that it can become a [`BoxError`] that
/// holds what is inside: the [`Refusal`] that other layers look for, or the
/// inner error as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error<E> {
    /// Time ran out.
    Elapsed(Elapsed),
    /// It failed by itself.
    Inner(E),
}

impl<E> Error<E> {
    /// The limit's error, if it is one.
    pub const fn elapsed(&self) -> Option<&Elapsed> {
        match self {
            Self::Elapsed(elapsed) => Some(elapsed),
            Self::Inner(_) => None,
        }
    }

    /// The call's own error, if it is one.
    pub fn into_inner(self) -> Option<E> {
        match self {
            Self::Elapsed(_) => None,
            Self::Inner(error) => Some(error),
        }
    }
}

impl<E: fmt::Display> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elapsed(elapsed) => elapsed.fmt(f),
            Self::Inner(error) => error.fmt(f),
        }
    }
}

impl<E> From<Elapsed> for Error<E> {
    fn from(elapsed: Elapsed) -> Self {
        Self::Elapsed(elapsed)
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
            Self::Elapsed(elapsed) => Some(Refusal::from(elapsed.clone())),
            Self::Inner(error) => error.refusal(),
        }
    }
}

impl<E: Into<BoxError>> From<Error<E>> for BoxError {
    fn from(error: Error<E>) -> Self {
        match error {
            Error::Elapsed(elapsed) => Refusal::from(elapsed).into(),
            Error::Inner(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_never_called_for_was_never_sent() {
        let refusal = |after| Refusal::from(Elapsed::new("api".into(), after));
        assert!(refusal(Duration::ZERO).was_never_sent());
        assert!(!refusal(Duration::from_nanos(1)).was_never_sent());
    }
}
