//! What this crate itself can say.

use std::{fmt, sync::Arc};

use buttress_core::BoxError;

use crate::guard::Denied;

/// Settings that make no sense; the message says what they must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(Problem);

/// A registration that cannot be one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegisterError {
    /// It makes no sense; the message says what it must be.
    Invalid(ConfigError),
    /// Its url is none that may be called.
    Denied(Denied),
    /// There is one of this id.
    Taken(Arc<str>),
    /// There are as many as there may be.
    TooMany {
        /// How many.
        most: usize,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    Name,
    Count(&'static str),
    Lane,
    LaneCapacity,
    Breaker(String),
    Quota(String),
    Span(&'static str),
    Url(&'static str),
    Pattern(Box<str>),
    NoPattern,
    Patterns,
    Header(Box<str>),
    Headers,
    Id,
    RequestId,
    LaneName,
    Status(u16),
}

impl From<Problem> for ConfigError {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl From<Problem> for RegisterError {
    fn from(problem: Problem) -> Self {
        Self::Invalid(problem.into())
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Problem::Name => f.write_str("the name must be 1 to 128 printable ASCII characters"),
            Problem::Count(what) => write!(f, "{what} must be from 1 to 1000000"),
            Problem::Lane => {
                f.write_str("a lane may have at most half of the attempts that run at once")
            }
            Problem::LaneCapacity => {
                f.write_str("a lane cannot hold more deliveries than all together")
            }
            Problem::Breaker(error) => write!(f, "the breaker: {error}"),
            Problem::Quota(error) => write!(f, "the rate limit: {error}"),
            Problem::Span(what) => write!(f, "{what} must be from 1 ms to 366 days"),
            Problem::Url(what) => write!(f, "the url {what}"),
            Problem::Pattern(pattern) => write!(
                f,
                "{pattern:?} is no pattern: an event's name, a name with .* at its end, or *"
            ),
            Problem::NoPattern => f.write_str("a registration must be for some event"),
            Problem::Patterns => f.write_str("a registration may name at most 256 patterns"),
            Problem::Headers => {
                f.write_str("a registration may set at most 64 headers, of 16 KiB together")
            }
            Problem::Header(name) => write!(
                f,
                "the header {name:?} is set by the delivery itself or belongs to the connection"
            ),
            Problem::Id => f.write_str("an id must be 1 to 128 printable ASCII characters"),
            Problem::RequestId => {
                f.write_str("a request's id must be 1 to 256 printable ASCII characters")
            }
            Problem::LaneName => {
                f.write_str("a lane's name must be 1 to 256 printable ASCII characters")
            }
            Problem::Status(status) => write!(
                f,
                "{status} cannot be permanent: 408, 425 and 429 are always retried, and only 4xx and 5xx are failures"
            ),
        }
    }
}

impl std::error::Error for ConfigError {}

impl fmt::Display for RegisterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(error) => error.fmt(f),
            Self::Denied(_) => f.write_str("the url may not be called"),
            Self::Taken(id) => write!(f, "there is a registration {id:?} already"),
            Self::TooMany { most } => write!(f, "there are {most} registrations already"),
        }
    }
}

impl std::error::Error for RegisterError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Denied(denied) => Some(denied),
            _ => None,
        }
    }
}

/// Why an event was not taken on: none of its deliveries is.
#[derive(Debug)]
#[non_exhaustive]
pub enum EmitError {
    /// The queue has no room for all of them, or the store is as far behind with
    /// what has changed as it may be.
    Full {
        /// How many deliveries it would have been.
        deliveries: usize,
        /// How many of them did not fit.
        over: usize,
    },
    /// The event's name is not 1 to 128 letters, digits, `_`, `-`, `:` and `/`
    /// in segments between dots.
    Name,
    /// The event's id is not 1 to 256 printable characters of ASCII without
    /// spaces and dots.
    Id,
    /// The id of its request is not 1 to 256 printable characters of ASCII.
    RequestId,
    /// Its content type is none.
    ContentType,
    /// Its body is longer than [allowed](crate::WebhooksBuilder::max_body).
    TooLarge {
        /// The most bytes that it may have.
        most: usize,
    },
    /// The store did not keep it.
    Store(BoxError),
}

impl fmt::Display for EmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { deliveries, over } => write!(
                f,
                "the queue is full: of {deliveries} deliveries {over} do not fit"
            ),
            Self::Name => f.write_str("the event's name cannot be one"),
            Self::Id => f.write_str(
                "the event's id must be 1 to 256 printable ASCII characters without spaces and dots",
            ),
            Self::RequestId => {
                f.write_str("a request's id must be 1 to 256 printable ASCII characters")
            }
            Self::ContentType => f.write_str("the event's content type is none"),
            Self::TooLarge { most } => {
                write!(f, "the event's body must have at most {most} bytes")
            }
            Self::Store(_) => f.write_str("the store did not keep the event"),
        }
    }
}

impl std::error::Error for EmitError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Store(error) => Some(&**error),
            _ => None,
        }
    }
}

/// Why a dead letter was not sent again: it is where it was.
#[derive(Debug)]
#[non_exhaustive]
pub enum RedriveError {
    /// There is no such letter.
    Unknown,
    /// Its registration is gone.
    Unregistered,
    /// Its registration is disabled: [enable](crate::Webhooks::enable) it
    /// first.
    Disabled,
    /// The queue is full, or the lane holds as much as it may.
    Full,
    /// The store did not keep the delivery.
    Store(BoxError),
}

impl fmt::Display for RedriveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "there is no such dead letter",
            Self::Unregistered => "the dead letter's registration is gone",
            Self::Disabled => "the dead letter's registration is disabled",
            Self::Full => "the queue or the lane is full",
            Self::Store(_) => "the store did not keep the delivery",
        })
    }
}

impl std::error::Error for RedriveError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Store(error) => Some(&**error),
            _ => None,
        }
    }
}

/// Why [`start`](crate::Webhooks::start) has started nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartError {
    /// The worker is running already.
    Running,
    /// It was not called within a tokio runtime.
    NoRuntime,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "the webhooks' worker is running already",
            Self::NoRuntime => "the webhooks' worker must be started within a tokio runtime",
        })
    }
}

impl std::error::Error for StartError {}
