//! What this layer itself can say.

use std::{fmt, sync::Arc, time::Duration};

use buttress_core::{BoxError, Inspect, Refusal, RefusalKind};

use crate::{
    Reason, State,
    cell::{Cell, Lease, Rejection},
};

/// Settings that make no sense; the message says what they must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(Problem);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    Name,
    ConsecutiveFailures,
    FailureRate,
    SlowDuration,
    SlowRate,
    WindowCalls,
    WindowTime,
    MinimumCalls,
    ResetTimeout,
    HalfOpenTimeout,
    Probes,
    ProbesAtOnce,
    FailedProbes,
    BackoffFactor,
    BackoffJitter,
    BackoffMax,
    MaxKeys,
    RetryAfterMax,
    SharedBreaker,
    SharedRegistry,
    BreakerAndKeys,
    #[cfg(feature = "back-pressure")]
    KeyedBackPressure,
    #[cfg(feature = "redis")]
    Fleet,
    #[cfg(feature = "redis")]
    Quorum,
    #[cfg(feature = "redis")]
    Pull,
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
            Problem::ConsecutiveFailures => "the failures in a row must be 1 to 16777215",
            Problem::FailureRate => "the failure rate must be above 0 and at most 1",
            Problem::SlowDuration => "the slow-call duration must be above 0 and at most 366 days",
            Problem::SlowRate => "the slow-call rate must be above 0 and at most 1",
            Problem::WindowCalls => "a window of calls must hold 1 to 4096",
            Problem::WindowTime => "a window of time must be 100 ms to 366 days",
            Problem::MinimumCalls => {
                "the minimum of calls must be at least 1 and fit into the window"
            }
            Problem::ResetTimeout => "the reset timeout must be above 0 and at most 366 days",
            Problem::HalfOpenTimeout => {
                "the half-open timeout must be above 0 and at most 366 days"
            }
            Problem::Probes => "the number of probes must be 1 to 255",
            Problem::ProbesAtOnce => "the probes at once must be 1 to the number of probes",
            Problem::FailedProbes => "the tolerated failures must be fewer than the probes",
            Problem::BackoffFactor => "the backoff's factor must be 1 to 100",
            Problem::BackoffJitter => "the backoff's jitter must be 0 to 1",
            Problem::BackoffMax => "the backoff's ceiling must not be below the reset timeout",
            Problem::MaxKeys => "the most keys must be at least 1",
            Problem::RetryAfterMax => "the longest Retry-After must be above 0",
            Problem::SharedBreaker => {
                "a breaker that is shared has its name, settings, listeners and randomness already"
            }
            Problem::SharedRegistry => {
                "a registry that is shared has its name, settings, listeners, randomness and bound already"
            }
            Problem::BreakerAndKeys => "one breaker is given, and one for each key asked for",
            #[cfg(feature = "back-pressure")]
            Problem::KeyedBackPressure => {
                "back-pressure needs one breaker for all: before there is a request there is no key"
            }
            #[cfg(feature = "redis")]
            Problem::Fleet => "the fleet's name must be 1 to 128 printable ASCII characters",
            #[cfg(feature = "redis")]
            Problem::Quorum => "the quorum must be 1 to 10000 nodes",
            #[cfg(feature = "redis")]
            Problem::Pull => "the interval of pulls must be 100 ms to an hour",
        })
    }
}

impl std::error::Error for ConfigError {}

/// A change by hand that makes no sense in the state the breaker is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransitionError {
    /// The state it is in, and stays in.
    pub from: State,
    /// The state that was asked for.
    pub to: State,
}

impl fmt::Display for TransitionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "a breaker that is {} cannot be made {} by hand",
            self.from, self.to
        )
    }
}

impl std::error::Error for TransitionError {}

/// The breaker did not let the call pass.
///
/// Small, and made without an allocation: it knows the name by the place of
/// the breaker. For tests of your own, have one from a breaker that is
/// [forced open](crate::Breaker::force_open).
#[derive(Clone, Copy)]
pub struct CircuitOpen {
    cell: &'static Cell,
    rejection: Rejection,
}

impl CircuitOpen {
    #[inline]
    pub(crate) const fn of(lease: Lease, rejection: Rejection) -> Self {
        Self {
            cell: lease.cell,
            rejection: lease.mark(rejection),
        }
    }

    /// The breaker's name; `None` if the breaker is gone.
    #[must_use]
    pub fn name(&self) -> Option<Arc<str>> {
        self.cell.name_of(self.rejection)
    }

    /// Why.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        self.rejection.reason()
    }

    /// How long until the breaker lets a probe pass; `None` where it was
    /// forced open and nobody can tell. Never too short, and up to a tick of
    /// the system's clock too long (mostly 4 ms): refusing costs less than to
    /// know it better.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        self.rejection.retry_after()
    }

    pub(crate) fn refusal(&self) -> Refusal {
        Refusal::new(RefusalKind::CircuitOpen).with_retry_after(self.retry_after())
    }
}

impl fmt::Debug for CircuitOpen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitOpen")
            .field("name", &self.name())
            .field("reason", &self.reason())
            .field("retry_after", &self.retry_after())
            .finish()
    }
}

impl fmt::Display for CircuitOpen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "the circuit breaker {name} is open")?,
            None => f.write_str("the circuit breaker was open")?,
        }
        match self.retry_after() {
            Some(wait) => write!(f, " (retry after {wait:?})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for CircuitOpen {}

/// As other layers and responders know it, with the name as its origin.
impl From<CircuitOpen> for Refusal {
    fn from(open: CircuitOpen) -> Self {
        match open.name() {
            Some(name) => open.refusal().with_origin(name.to_string()),
            None => open.refusal(),
        }
    }
}

/// What a protected call fails with: its own error, or the breaker's.
///
/// No [`std::error::Error`] itself, so that it can become a [`BoxError`] that
/// holds what is inside: the [`Refusal`] that other layers look for, or the
/// inner error as it was.
#[derive(Clone, Debug)]
pub enum Error<E> {
    /// The breaker did not let it pass.
    Open(CircuitOpen),
    /// It failed by itself.
    Inner(E),
}

impl<E> Error<E> {
    /// The breaker's refusal, if it is one.
    pub const fn open(&self) -> Option<&CircuitOpen> {
        match self {
            Self::Open(open) => Some(open),
            Self::Inner(_) => None,
        }
    }

    /// The call's own error, if it is one.
    pub fn into_inner(self) -> Option<E> {
        match self {
            Self::Open(_) => None,
            Self::Inner(error) => Some(error),
        }
    }
}

impl<E: fmt::Display> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(open) => open.fmt(f),
            Self::Inner(error) => error.fmt(f),
        }
    }
}

impl<E> From<CircuitOpen> for Error<E> {
    fn from(open: CircuitOpen) -> Self {
        Self::Open(open)
    }
}

impl<E: Inspect> Inspect for Error<E> {
    fn error(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Open(open) => Some(open),
            Self::Inner(error) => error.error(),
        }
    }

    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Open(open) => Some(Refusal::from(*open)),
            Self::Inner(error) => error.refusal(),
        }
    }
}

impl<E: Into<BoxError>> From<Error<E>> for BoxError {
    fn from(error: Error<E>) -> Self {
        match error {
            Error::Open(open) => Refusal::from(open).into(),
            Error::Inner(error) => error.into(),
        }
    }
}
