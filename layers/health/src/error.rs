//! What this crate itself can say.

use std::{fmt, sync::Arc};

use buttress_core::label;

/// Settings that make no sense; the message says what they must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(Problem);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    Name(&'static str),
    Taken(&'static str, Arc<str>),
    Weight(Arc<str>),
    Score(&'static str),
    Span(&'static str),
    Capacity,
    Path,
    SamePath(Arc<str>),
    #[cfg(feature = "grpc")]
    NoCheck(Arc<str>),
}

impl From<Problem> for ConfigError {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Problem::Name(what) => write!(
                f,
                "the name of {what} must be 1 to 128 printable ASCII characters"
            ),
            Problem::Taken(what, name) => write!(f, "there is {what} {name:?} already"),
            Problem::Weight(name) => write!(
                f,
                "the weight of source {name:?} must be from 0.000001 to 1000000"
            ),
            Problem::Score(what) => write!(f, "{what} must be above 0.0 and at most 1.0"),
            Problem::Span(what) => write!(f, "{what} must be from 1 ms to 1 day"),
            Problem::Capacity => f.write_str("the changes kept must be from 1 to 65536"),
            Problem::Path => {
                f.write_str("a path must begin with / and have neither query nor fragment")
            }
            Problem::SamePath(path) => write!(f, "the path {path:?} is given twice"),
            #[cfg(feature = "grpc")]
            Problem::NoCheck(name) => write!(f, "there is no check {name:?}"),
        }
    }
}

impl std::error::Error for ConfigError {}

/// Why [`start`](crate::HealthRegistry::start) has started nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartError {
    /// The background tasks are running already.
    Running,
    /// It was not called within a tokio runtime.
    NoRuntime,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "the health checks are running already",
            Self::NoRuntime => "health checks must be started within a tokio runtime",
        })
    }
}

impl std::error::Error for StartError {}

/// Names are labels of metrics, and shown to people.
pub(crate) fn name(what: &'static str, name: &str) -> Result<(), ConfigError> {
    if label::is_sound(name, 128) {
        Ok(())
    } else {
        Err(Problem::Name(what).into())
    }
}
