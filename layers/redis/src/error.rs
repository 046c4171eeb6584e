//! What can go wrong between us and the server.

use std::{error, fmt};

use redis::{ParsingError, RedisError, ServerErrorKind};

/// An operation that failed, and how.
///
/// [`Display`](fmt::Display) names the operation and the kind; what the server
/// or the system said is the [`source`](error::Error::source), in its words.
/// Neither holds a password.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    operation: &'static str,
    /// Whether the server may have been sent it.
    sent: bool,
    cause: Option<RedisError>,
}

/// How an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// It was not tried: the server is known to be gone. Takes nanoseconds.
    /// Never done.
    Gone,
    /// It was sent, and there was no answer within the time limit. The server
    /// may have done it all the same, or do it yet.
    Timeout,
    /// There was no connection within the time limit, and it was never sent; or
    /// the connection was lost under it, and the server may have done it all the
    /// same: [`Error::may_be_done`] tells which.
    Connection,
    /// The server answers, and cannot do it now: it is loading, out of memory,
    /// read-only, without a master. Not done.
    Unable,
    /// The server does not let us in, or not do this. Not done.
    Denied,
    /// The server refuses the command: a fault of ours or a foreign value. Not
    /// done, unless it was a script that failed halfway.
    Refused,
    /// The answer is not what it should be. Whatever it was, it is done.
    Answer,
}

impl ErrorKind {
    /// As a label of metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Timeout => "timeout",
            Self::Connection => "connection",
            Self::Unable => "unable",
            Self::Denied => "denied",
            Self::Refused => "refused",
            Self::Answer => "answer",
        }
    }

    /// Whether the server, as far as this tells, can do nothing for us now:
    /// what shuts the gate when it comes three times in a row.
    #[must_use]
    pub const fn is_outage(self) -> bool {
        match self {
            Self::Gone | Self::Timeout | Self::Connection | Self::Unable | Self::Denied => true,
            Self::Refused | Self::Answer => false,
        }
    }
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, operation: &'static str) -> Self {
        Self {
            kind,
            operation,
            sent: kind != ErrorKind::Gone,
            cause: None,
        }
    }

    /// The time was over before there was a connection.
    pub(crate) fn unsent(operation: &'static str) -> Self {
        Self {
            sent: false,
            ..Self::new(ErrorKind::Connection, operation)
        }
    }

    pub(crate) fn caused(operation: &'static str, cause: RedisError) -> Self {
        Self {
            kind: kind_of(&cause),
            operation,
            // No node was found to send it to.
            sent: cause.kind() != redis::ErrorKind::ClusterConnectionNotFound,
            cause: Some(cause),
        }
    }

    /// An answer came, and is none to what was asked.
    pub(crate) fn answer(operation: &'static str, cause: ParsingError) -> Self {
        Self {
            kind: ErrorKind::Answer,
            operation,
            sent: true,
            cause: Some(cause.into()),
        }
    }

    /// How it failed.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether the server may have done it all the same, or may do it yet.
    /// Where not, trying it again does it once.
    #[must_use]
    pub fn may_be_done(&self) -> bool {
        match self.kind {
            ErrorKind::Timeout | ErrorKind::Connection | ErrorKind::Answer => self.sent,
            ErrorKind::Gone | ErrorKind::Unable | ErrorKind::Denied | ErrorKind::Refused => false,
        }
    }

    /// What failed, as it is named in metrics.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        self.operation
    }

    /// The code that the server's error begins with, as `WRONGTYPE`.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        self.cause.as_ref()?.code()
    }

    /// Whether the connection is of no use any more, or leads to a server that
    /// has lost its place.
    pub(crate) fn wants_another_link(&self) -> bool {
        let Some(cause) = &self.cause else {
            return false;
        };
        cause.code() == Some("READONLY") || cause.is_unrecoverable_error()
    }
}

fn kind_of(cause: &RedisError) -> ErrorKind {
    use redis::ErrorKind as Their;
    match cause.kind() {
        Their::Io if cause.is_timeout() => ErrorKind::Timeout,
        // What cannot be parsed was cut, or is not Redis.
        Their::Io | Their::ClusterConnectionNotFound | Their::Parse => ErrorKind::Connection,
        Their::AuthenticationFailed | Their::Server(ServerErrorKind::NoPerm) => ErrorKind::Denied,
        Their::Server(
            ServerErrorKind::BusyLoading
            | ServerErrorKind::TryAgain
            | ServerErrorKind::ClusterDown
            | ServerErrorKind::MasterDown
            | ServerErrorKind::ReadOnly
            | ServerErrorKind::Moved
            | ServerErrorKind::Ask,
        ) => ErrorKind::Unable,
        Their::UnexpectedReturnType => ErrorKind::Answer,
        _ => match cause.code() {
            Some("OOM" | "MISCONF" | "NOREPLICAS" | "BUSY") => ErrorKind::Unable,
            Some("NOAUTH" | "WRONGPASS") => ErrorKind::Denied,
            _ => ErrorKind::Refused,
        },
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            ErrorKind::Gone => "not tried: the server is gone",
            ErrorKind::Timeout => "no answer in time",
            ErrorKind::Connection => "no connection",
            ErrorKind::Unable => "the server cannot do it now",
            ErrorKind::Denied => "the server does not permit it",
            ErrorKind::Refused => "the server refuses it",
            ErrorKind::Answer => "the answer makes no sense",
        };
        write!(f, "redis {}: {what}", self.operation)
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.cause.as_ref().map(|cause| cause as _)
    }
}
