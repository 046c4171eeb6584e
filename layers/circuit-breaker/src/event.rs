//! What can be heard of a breaker.

use std::{fmt, time::Duration};

use buttress_core::clock::Instant;

/// Whether calls pass, and why.
///
/// ```text
///         a rule holds           reset timeout over
/// closed ─────────────────▶ open ─────────────────▶ half-open
///    ▲                        ▲ a probe fails, or time is up │
///    │                        └──────────────────────────────┤
///    └───────────────────── the probes succeed ──────────────┘
///
/// forced open, forced closed, metrics-only: by hand, until reset
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// Calls pass and are counted.
    Closed = 0,
    /// Calls are refused until the wait is over.
    Open = 1,
    /// A few calls pass as probes.
    HalfOpen = 2,
    /// Calls are refused until reset.
    ForcedOpen = 3,
    /// Calls pass and count as nothing, until reset: switched off.
    ForcedClosed = 4,
    /// Calls pass and are counted, and it is told once what would have opened
    /// it, until reset.
    MetricsOnly = 5,
}

impl State {
    /// In words for programs: `closed`, `open`, `half_open`, `forced_open`,
    /// `forced_closed`, `metrics_only`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
            Self::ForcedOpen => "forced_open",
            Self::ForcedClosed => "forced_closed",
            Self::MetricsOnly => "metrics_only",
        }
    }

    /// Whether it was brought about by hand and stays until reset.
    #[must_use]
    pub const fn is_override(self) -> bool {
        matches!(
            self,
            Self::ForcedOpen | Self::ForcedClosed | Self::MetricsOnly
        )
    }

    /// Whether calls are counted by the rules.
    pub(crate) const fn counts(self) -> bool {
        matches!(self, Self::Closed | Self::MetricsOnly)
    }
}

/// In words for people.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half-open",
            Self::ForcedOpen => "forced open",
            Self::ForcedClosed => "forced closed",
            Self::MetricsOnly => "metrics-only",
        })
    }
}

/// The rule by which a breaker opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// So many failures in a row.
    ConsecutiveFailures,
    /// The part of failures in the window.
    FailureRate,
    /// The part of slow calls in the window.
    SlowCalls,
    /// The callee asked to be left alone, by `Retry-After`.
    RetryAfter,
}

impl Rule {
    /// In words for programs: `consecutive_failures`, `failure_rate`,
    /// `slow_calls`, `retry_after`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ConsecutiveFailures => "consecutive_failures",
            Self::FailureRate => "failure_rate",
            Self::SlowCalls => "slow_calls",
            Self::RetryAfter => "retry_after",
        }
    }
}

/// Why a state has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// A rule held: closed → open.
    Rule(Rule),
    /// The wait was over and a call came: open → half-open.
    WaitOver,
    /// Enough probes succeeded: half-open → closed.
    Probed,
    /// Too many probes failed: half-open → open.
    ProbeFailed,
    /// Half-open was undecided for too long: half-open → open.
    ProbesOverdue,
    /// Someone asked for it.
    Manual,
    /// It was so elsewhere, and is followed here.
    Remote,
}

impl Cause {
    /// In words for programs: the [rule's](Rule::as_str), or `wait_over`,
    /// `probed`, `probe_failed`, `probes_overdue`, `manual`, `remote`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rule(rule) => rule.as_str(),
            Self::WaitOver => "wait_over",
            Self::Probed => "probed",
            Self::ProbeFailed => "probe_failed",
            Self::ProbesOverdue => "probes_overdue",
            Self::Manual => "manual",
            Self::Remote => "remote",
        }
    }
}

/// A change of state.
///
/// Every change begins a generation, and so do new settings and a reset, of
/// which nobody hears where the state stays. They are numbered in order
/// (wrapping at 2³⁰), so that who hears of two changes knows which was
/// first: listeners are called outside of every lock, and may hear of them in
/// another order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transition {
    /// The state before.
    pub from: State,
    /// The state now.
    pub to: State,
    /// The number of the generation that begins.
    pub generation: u32,
    /// When. Half-open that was overdue is open since its time was up,
    /// whenever that is noticed.
    pub at: Instant,
    /// Why.
    pub cause: Cause,
    /// How long it will be open, where it is for a time.
    pub wait: Option<Duration>,
}

/// Why a call was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reason {
    /// Open.
    Open = 0,
    /// Half-open, and the probes are under way.
    HalfOpen = 1,
    /// Forced open.
    ForcedOpen = 2,
}

impl Reason {
    #[cfg(feature = "metrics")]
    pub(crate) const ALL: [Self; 3] = [Self::Open, Self::HalfOpen, Self::ForcedOpen];

    /// In words for programs: `open`, `half_open`, `forced_open`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::HalfOpen => "half_open",
            Self::ForcedOpen => "forced_open",
        }
    }
}

/// What happened at a breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The state has changed.
    StateChange(Transition),
    /// In metrics-only: this rule would have opened it. Told once.
    WouldOpen(Rule),
    /// A call was let through.
    Call,
    /// A call succeeded.
    Success {
        /// Whether it took as long as the slow-call rule says, or longer.
        slow: bool,
    },
    /// A call failed.
    Failure {
        /// Whether it took as long as the slow-call rule says, or longer.
        slow: bool,
    },
    /// A call says nothing: by its verdict, or because it was given up on.
    /// (Given up on after it had become slow it may count all the same: see
    /// [`Permit`](crate::Permit).)
    Ignored,
    /// A call was refused.
    Rejected(Reason),
}

/// Hears of events: called with the breaker's name, in the thread where it
/// happened, outside of every lock. Should be quick; must not panic.
pub(crate) type Listener = Box<dyn Fn(&str, &Event) + Send + Sync>;
