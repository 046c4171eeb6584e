//! What can be heard of a retry.

use std::fmt;

use buttress_core::{RefusalKind, classify::GrpcCode};
use http::StatusCode;

/// Why an attempt is thought to be worth another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// The status of a response.
    Status(StatusCode),
    /// The code of a gRPC response, told in its headers, or in trailers that a
    /// [`PeekLayer`](crate::PeekLayer) found.
    Grpc(GrpcCode),
    /// No connection: nothing was sent.
    Connect,
    /// The connection broke off: nobody knows how far the callee came.
    Reset,
    /// The callee said that it has not looked at it (HTTP/2's `REFUSED_STREAM`).
    RefusedStream,
    /// A layer further in refused it. That is found among an error's causes,
    /// too: a callee in this process that has begun to act, and fails because a
    /// breaker of its own refuses, should not pass that on as a cause.
    Refused(RefusalKind),
    /// The same, and it said that nothing of it was sent, which the kind alone
    /// does not say.
    Unsent(RefusalKind),
    /// Another error, or what a closure said.
    Error,
}

impl Cause {
    /// Whether the callee has surely not begun to act on the request, so that
    /// any may be sent again.
    #[must_use]
    pub const fn was_never_begun(self) -> bool {
        match self {
            Self::Connect | Self::RefusedStream | Self::Unsent(_) => true,
            Self::Refused(kind) => kind.is_before_sending(),
            _ => false,
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "status {}", status.as_u16()),
            Self::Grpc(code) => write!(f, "gRPC status {}", *code as u8),
            Self::Connect => f.write_str("no connection"),
            Self::Reset => f.write_str("the connection broke off"),
            Self::RefusedStream => f.write_str("the stream was refused"),
            Self::Refused(kind) => write!(f, "refused: {}", kind.reason()),
            Self::Unsent(kind) => write!(f, "refused before sending: {}", kind.reason()),
            Self::Error => f.write_str("an error"),
        }
    }
}

/// Why there was no further attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GiveUp {
    /// There were as many as there may be.
    Attempts,
    /// It would have come too late.
    Deadline,
    /// Too many were repeated already.
    Budget,
    /// The callee forbade it, or asked for a longer wait than is granted.
    Pushback,
    /// It may not be sent twice: the method, and no `Idempotency-Key`.
    Unsafe,
    /// Its body cannot be sent again: too large, broken off, or in use. Where the
    /// answer was given up before that turned out (a connection that has
    /// answered early and still holds the body, after a second), one of the
    /// same status is made in its place.
    Body,
    /// [`refuse_if`](crate::RetryBuilder::refuse_if) had an answer instead.
    Refused,
    /// Someone said to stop.
    Aborted,
}

impl GiveUp {
    /// All of them, in the order of their numbers.
    #[cfg(feature = "metrics")]
    pub(crate) const ALL: [Self; Self::Aborted as usize + 1] = [
        Self::Attempts,
        Self::Deadline,
        Self::Budget,
        Self::Pushback,
        Self::Unsafe,
        Self::Body,
        Self::Refused,
        Self::Aborted,
    ];

    /// In a word for programs: the label of a metric.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Attempts => "attempts",
            Self::Deadline => "deadline",
            Self::Budget => "budget",
            Self::Pushback => "pushback",
            Self::Unsafe => "unsafe",
            Self::Body => "body",
            Self::Refused => "refused",
            Self::Aborted => "aborted",
        }
    }
}

impl fmt::Display for GiveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attempts => "no attempt left",
            Self::Deadline => "no time left",
            Self::Budget => "the retry budget is used up",
            Self::Pushback => "the callee asked not to be called again so soon",
            Self::Unsafe => "the request may not be repeated",
            Self::Body => "the body cannot be sent again",
            Self::Refused => "refused instead",
            Self::Aborted => "aborted",
        })
    }
}
