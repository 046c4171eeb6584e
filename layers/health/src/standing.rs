//! Whether new requests are welcome, and why not.

use std::{fmt, sync::Arc};

use crate::CheckState;

/// Whether new requests are welcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// They are.
    Ready,
    /// They are not, and this is why.
    NotReady(Reason),
}

impl Standing {
    /// Whether new requests are welcome.
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }

    /// Why they are not.
    #[must_use]
    pub const fn reason(&self) -> Option<&Reason> {
        match self {
            Self::Ready => None,
            Self::NotReady(reason) => Some(reason),
        }
    }
}

/// Why a process is not ready. Where there are several reasons it is the first
/// of these.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// A gate is closed, for a reason of its own: `shutting_down`, say.
    Gate(&'static str),
    /// A startup latch holds.
    Starting,
    /// This required check has failed.
    CheckFailed(Arc<str>),
    /// This required check has no result, or none that is new enough.
    CheckUnknown(Arc<str>),
    /// The score is below the threshold.
    Score,
}

impl Reason {
    /// In a word for programs: the gate's own, or `starting`, `check_failed`,
    /// `unknown`, `score`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Gate(reason) => reason,
            Self::Starting => "starting",
            Self::CheckFailed(_) => "check_failed",
            Self::CheckUnknown(_) => "unknown",
            Self::Score => "score",
        }
    }

    /// The check whose fault it is, if it is one's.
    #[must_use]
    pub fn check(&self) -> Option<&str> {
        match self {
            Self::CheckFailed(name) | Self::CheckUnknown(name) => Some(name),
            _ => None,
        }
    }
}

/// In words for people.
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gate(reason) => f.write_str(reason),
            Self::Starting => f.write_str("it has not started yet"),
            Self::CheckFailed(name) => write!(f, "the check {name:?} has failed"),
            Self::CheckUnknown(name) => write!(f, "nothing is known of the check {name:?}"),
            Self::Score => f.write_str("the score is too low"),
        }
    }
}

/// The verdict on all there is to say: what somebody has decided first, then
/// what is not yet, then what is wrong.
pub(crate) fn standing<'a>(
    closed: Option<&'static str>,
    started: bool,
    required: impl Iterator<Item = (&'a Arc<str>, CheckState)>,
    low: bool,
) -> Standing {
    if let Some(reason) = closed {
        return Standing::NotReady(Reason::Gate(reason));
    }
    if !started {
        return Standing::NotReady(Reason::Starting);
    }
    let mut unknown = None;
    for (name, state) in required {
        match state {
            CheckState::Passing => {}
            CheckState::Failing(_) => {
                return Standing::NotReady(Reason::CheckFailed(Arc::clone(name)));
            }
            CheckState::Unknown => unknown = unknown.or(Some(name)),
        }
    }
    if let Some(name) = unknown {
        return Standing::NotReady(Reason::CheckUnknown(Arc::clone(name)));
    }
    if low {
        return Standing::NotReady(Reason::Score);
    }
    Standing::Ready
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Failure;

    fn state() -> impl Strategy<Value = CheckState> {
        prop_oneof![
            3 => Just(CheckState::Passing),
            1 => Just(CheckState::Unknown),
            1 => Just(CheckState::Failing(Failure::Error)),
            1 => Just(CheckState::Failing(Failure::TimedOut)),
        ]
    }

    proptest! {
        /// Ready is the conjunction, and the reason one that holds and before
        /// which none does.
        #[test]
        fn ready_is_all_of_it(
            closed in proptest::option::of(Just("shutting_down")),
            started: bool,
            states in proptest::collection::vec(state(), 0..5),
            low: bool,
        ) {
            let names: Vec<Arc<str>> = (0..states.len()).map(|n| n.to_string().into()).collect();
            let told = standing(closed, started, names.iter().zip(states.iter().copied()), low);
            let find = |wanted: fn(&CheckState) -> bool| {
                let at = states.iter().position(wanted)?;
                Some(Arc::clone(&names[at]))
            };
            let failed = find(|state| matches!(state, CheckState::Failing(_)));
            let unknown = find(|state| *state == CheckState::Unknown);
            let reasons = [
                closed.map(Reason::Gate),
                (!started).then_some(Reason::Starting),
                failed.map(Reason::CheckFailed),
                unknown.map(Reason::CheckUnknown),
                low.then_some(Reason::Score),
            ];
            let first = reasons.into_iter().flatten().next();
            prop_assert_eq!(told.is_ready(), first.is_none());
            prop_assert_eq!(told.reason().cloned(), first);
        }
    }
}
