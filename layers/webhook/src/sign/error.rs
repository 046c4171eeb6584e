//! What this layer itself can say.

use std::{fmt, sync::Arc};

use buttress_core::{BoxError, Inspect, Refusal, RefusalKind};

use crate::SignError;

/// Settings that make no sense; the message says what they must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignConfigError(pub(crate) ());

impl fmt::Display for SignConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name must be 1 to 128 printable ASCII characters")
    }
}

impl std::error::Error for SignConfigError {}

/// Why a request was not signed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Cause {
    /// Its body is longer than may be kept for it.
    TooLarge {
        /// How long it may be, in bytes.
        most: usize,
    },
    /// Its body broke off, with this error.
    Body(BoxError),
    /// A scheme cannot sign it.
    Sign(SignError),
}

impl Cause {
    /// A word for programs: the label `result` of the metric.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too_large",
            Self::Body(_) => "body",
            Self::Sign(_) => "unsignable",
        }
    }
}

/// A request that was not signed. Nothing of it was sent.
#[derive(Debug)]
pub struct NotSigned {
    name: Arc<str>,
    cause: Cause,
}

impl NotSigned {
    pub(crate) const fn new(name: Arc<str>, cause: Cause) -> Self {
        Self { name, cause }
    }

    /// The name of the layer that was to sign it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Why it was not signed.
    #[must_use]
    pub const fn cause(&self) -> &Cause {
        &self.cause
    }
}

/// As other layers and responders know it, with the name as its origin.
impl From<&NotSigned> for Refusal {
    fn from(not_signed: &NotSigned) -> Self {
        let refusal = match &not_signed.cause {
            Cause::TooLarge { .. } => Self::new(RefusalKind::BodyTooLarge),
            Cause::Body(error) => match Self::find(&**error) {
                // A layer further out has ended it, and says why.
                Some(refusal) => return refusal.clone().before_sending(),
                None => Self::new(RefusalKind::BadRequest)
                    .with_detail("the body of the request broke off"),
            },
            Cause::Sign(_) => {
                Self::new(RefusalKind::Internal).with_detail("the request could not be signed")
            }
        };
        let refusal = refusal.with_origin(not_signed.name.to_string());
        refusal.before_sending()
    }
}

impl fmt::Display for NotSigned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        match &self.cause {
            Cause::TooLarge { most } => {
                write!(
                    f,
                    "the body is longer than the {most} bytes that are signed ({name})"
                )
            }
            Cause::Body(_) => write!(f, "the body broke off before it was signed ({name})"),
            Cause::Sign(_) => write!(f, "the request cannot be signed ({name})"),
        }
    }
}

impl std::error::Error for NotSigned {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.cause {
            Cause::TooLarge { .. } => None,
            Cause::Body(error) => Some(&**error),
            Cause::Sign(error) => Some(error),
        }
    }
}

/// What a call that is to be signed fails with: its own error, or that of the
/// signing.
///
/// No [`std::error::Error`] itself, so that it can become a [`BoxError`] that
/// holds what is inside: the [`Refusal`] that other layers look for, the
/// body's error as it was, or the inner service's.
#[derive(Debug)]
pub enum Error<E> {
    /// It was not signed, and not sent.
    NotSigned(NotSigned),
    /// It failed by itself.
    Inner(E),
}

impl<E> Error<E> {
    /// Why it was not signed, if it was not.
    pub const fn not_signed(&self) -> Option<&NotSigned> {
        match self {
            Self::NotSigned(why) => Some(why),
            Self::Inner(_) => None,
        }
    }

    /// The call's own error, if it is one.
    pub fn into_inner(self) -> Option<E> {
        match self {
            Self::NotSigned(_) => None,
            Self::Inner(error) => Some(error),
        }
    }
}

impl<E: fmt::Display> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotSigned(why) => why.fmt(f),
            Self::Inner(error) => error.fmt(f),
        }
    }
}

impl<E: Inspect> Inspect for Error<E> {
    fn error(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NotSigned(why) => match &why.cause {
                Cause::Body(error) => Some(&**error),
                _ => Some(why),
            },
            Self::Inner(error) => error.error(),
        }
    }

    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::NotSigned(why) => Some(why.into()),
            Self::Inner(error) => error.refusal(),
        }
    }
}

impl<E: Into<BoxError>> From<Error<E>> for BoxError {
    fn from(error: Error<E>) -> Self {
        match error {
            Error::NotSigned(why) => match why.cause {
                Cause::Body(error) => error,
                _ => Refusal::from(&why).into(),
            },
            Error::Inner(error) => error.into(),
        }
    }
}
