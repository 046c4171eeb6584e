//! Why a delivery, or one attempt of it, has failed.

use std::{fmt, sync::Arc};

use http::StatusCode;

use crate::guard::Denied;

/// Why an attempt failed, or why there will be no other.
///
/// Says nothing of the message, and no more of the endpoint than what it
/// answered.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// The endpoint answered with this status, which is tried again.
    Status(StatusCode),
    /// It answered with a status that the registration calls permanent.
    Permanent(StatusCode),
    /// It sent the message elsewhere, where it does not go.
    Redirected(StatusCode),
    /// It answered 410: the registration is disabled.
    Gone,
    /// It asked by `webhook-delivery: abort-message` not to be sent this one
    /// again.
    Aborted,
    /// It asked by `webhook-delivery: disable` to be sent nothing any more.
    Disabled,
    /// It has not answered in time, or its body did not end in time.
    Timeout,
    /// The transport failed: what it said, without the url.
    Transport(Arc<str>),
    /// The answer was good so far, and broke off: what the transport said.
    Broken(Arc<str>),
    /// The [guard](crate::guard) let no connection be made. Not tried again: an
    /// address that may not be dialled does not become one that may.
    Denied(Denied),
    /// The transport panicked.
    Panicked,
    /// The message could not be signed.
    NotSigned,
    /// The registration was taken back, or is not there.
    Unregistered,
    /// The lane held as much as it may.
    Crowded,
}

impl Cause {
    /// A word for programs, of a bounded number.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Status(_) => "status",
            Self::Permanent(_) => "permanent",
            Self::Redirected(_) => "redirected",
            Self::Gone => "gone",
            Self::Aborted => "aborted",
            Self::Disabled => "disabled",
            Self::Timeout => "timeout",
            Self::Transport(_) => "transport",
            Self::Broken(_) => "broken",
            Self::Denied(_) => "denied",
            Self::Panicked => "panicked",
            Self::NotSigned => "not_signed",
            Self::Unregistered => "unregistered",
            Self::Crowded => "crowded",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "the endpoint answered {}", status.as_u16()),
            Self::Permanent(status) => {
                write!(f, "the endpoint answered {}, for good", status.as_u16())
            }
            Self::Redirected(status) => write!(
                f,
                "the endpoint answered {}, and redirects are not followed",
                status.as_u16()
            ),
            Self::Gone => f.write_str("the endpoint is gone (410)"),
            Self::Aborted => f.write_str("the endpoint does not want this message"),
            Self::Disabled => f.write_str("the endpoint wants no more messages"),
            Self::Timeout => f.write_str("the endpoint did not answer in time"),
            Self::Transport(error) => write!(f, "the endpoint was not reached: {error}"),
            Self::Broken(error) => write!(f, "the answer broke off: {error}"),
            Self::Denied(denied) => denied.fmt(f),
            Self::Panicked => f.write_str("the transport panicked"),
            Self::NotSigned => f.write_str("the message could not be signed"),
            Self::Unregistered => f.write_str("the registration is gone"),
            Self::Crowded => f.write_str("too much was waiting for the endpoint"),
        }
    }
}

impl std::error::Error for Cause {}
