//! What this layer itself can say.

use std::fmt;

/// Settings that make no sense; the message says what they must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(Problem);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    Name,
    Timeout,
    Fit,
    HookLimit,
    /// What this must be.
    #[cfg(feature = "serve")]
    Limit(&'static str),
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
            Problem::Timeout => "the timeout must be above 0 and at most a day",
            Problem::Fit => {
                "the drain delay and the hooks' reserve together must be below the timeout"
            }
            Problem::HookLimit => "the hooks' limit must be above 0 and at most a day",
            #[cfg(feature = "serve")]
            Problem::Limit(told) => told,
        })
    }
}

impl std::error::Error for ConfigError {}
