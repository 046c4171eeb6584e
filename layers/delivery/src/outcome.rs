//! What an answer means, and when the next attempt is due. Pure.

use std::time::Duration;

use buttress_core::{classify::Verdict, random::SharedRandom};
use http::{HeaderMap, StatusCode};

use crate::Cause;

/// What the endpoint says of further deliveries, in `webhook-delivery`
/// (standard-webhooks#291).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Disable,
    Abort,
}

impl Word {
    /// `disable` wins where both stand: it asks for more.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all("webhook-delivery").iter();
        let mut word = None;
        for value in values.filter_map(|value| value.to_str().ok()) {
            for part in value.split(',').map(str::trim) {
                if part.eq_ignore_ascii_case("disable") {
                    return Some(Self::Disable);
                }
                if part.eq_ignore_ascii_case("abort-message") {
                    word = Some(Self::Abort);
                }
            }
        }
        word
    }
}

/// What was seen of one attempt.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) status: Option<StatusCode>,
    pub(crate) retry_after: Option<Duration>,
    pub(crate) word: Option<Word>,
    /// What went wrong beside the status.
    pub(crate) trouble: Option<Cause>,
}

/// What becomes of the delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Delivered,
    Retry {
        cause: Cause,
        /// Not before this long.
        floor: Option<Duration>,
    },
    Fail(Cause),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) next: Next,
    /// Why the registration is sent nothing any more, if so.
    pub(crate) disable: Option<Cause>,
    /// What it says of the endpoint's health.
    pub(crate) verdict: Verdict,
}

/// The statuses that are not worth another attempt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Permanent {
    pub(crate) client_errors: bool,
    pub(crate) statuses: Vec<StatusCode>,
}

impl Permanent {
    /// 408, 425 and 429 say that another time may be better.
    pub(crate) fn may_hold(status: StatusCode) -> bool {
        (status.is_client_error() || status.is_server_error())
            && !matches!(status.as_u16(), 408 | 425 | 429)
    }

    fn holds(&self, status: StatusCode) -> bool {
        Self::may_hold(status)
            && (self.client_errors && status.is_client_error() || self.statuses.contains(&status))
    }
}

pub(crate) fn judge(seen: &Seen, permanent: &Permanent) -> Judgement {
    let Some(status) = seen.status else {
        let cause = seen.trouble.clone().unwrap_or(Cause::Timeout);
        // Ours: another attempt would be no better.
        let (next, verdict) = match cause {
            Cause::NotSigned | Cause::Denied(_) => (Next::Fail(cause), Verdict::Ignored),
            _ => (Next::Retry { cause, floor: None }, Verdict::Failure),
        };
        return Judgement {
            next,
            disable: None,
            verdict,
        };
    };
    let verdict = match status.as_u16() {
        _ if status.is_server_error() => Verdict::Failure,
        // It lives, and is asked too much.
        408 | 425 | 429 => Verdict::Ignored,
        _ if status.is_success() && seen.trouble.is_some() => Verdict::Failure,
        _ => Verdict::Success,
    };
    let disable = match (seen.word, status) {
        (Some(Word::Disable), _) => Some(Cause::Disabled),
        (_, StatusCode::GONE) => Some(Cause::Gone),
        _ => None,
    };
    let next = match &seen.trouble {
        None if status.is_success() => Next::Delivered,
        _ if disable.is_some() => Next::Fail(disable.clone().unwrap_or(Cause::Disabled)),
        _ if seen.word == Some(Word::Abort) => Next::Fail(Cause::Aborted),
        _ if status.is_redirection() => Next::Fail(Cause::Redirected(status)),
        _ if permanent.holds(status) => Next::Fail(Cause::Permanent(status)),
        Some(trouble) if status.is_success() => Next::Retry {
            cause: trouble.clone(),
            floor: None,
        },
        // A head that fails is final, whatever became of its body.
        _ => Next::Retry {
            cause: Cause::Status(status),
            floor: seen
                .retry_after
                .filter(|_| matches!(status.as_u16(), 429 | 503)),
        },
    };
    Judgement {
        next,
        disable,
        verdict,
    }
}

/// `initial · 2^(retry − 1)`, at most the cap, half of it jittered ("equal
/// jitter": Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture
/// Blog, 2015): who failed together does not come back together, and nobody
/// comes back at once. `retry` counts from 1.
pub(crate) fn backoff(
    initial: Duration,
    retry: u32,
    cap: Duration,
    random: &SharedRandom,
) -> Duration {
    let factor = 1_u32
        .checked_shl(retry.saturating_sub(1))
        .unwrap_or(u32::MAX);
    let wait = initial.saturating_mul(factor).min(cap);
    wait / 2 + random.up_to(wait - wait / 2)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answered(status: u16) -> Seen {
        Seen {
            status: Some(StatusCode::from_u16(status).unwrap()),
            ..Seen::default()
        }
    }

    fn next(seen: &Seen, permanent: &Permanent) -> &'static str {
        match judge(seen, permanent).next {
            Next::Delivered => "delivered",
            Next::Retry { .. } => "retry",
            Next::Fail(cause) => cause.as_str(),
        }
    }

    #[test]
    fn every_status_has_its_outcome() {
        let none = Permanent::default();
        let client = Permanent {
            client_errors: true,
            statuses: vec![StatusCode::NOT_IMPLEMENTED],
        };
        for status in 200..600 {
            let (by_default, strictly) = match status {
                200..300 => ("delivered", "delivered"),
                300..400 => ("redirected", "redirected"),
                410 => ("gone", "gone"),
                408 | 425 | 429 => ("retry", "retry"),
                400..=499 | 501 => ("retry", "permanent"),
                _ => ("retry", "retry"),
            };
            let seen = answered(status);
            assert_eq!(next(&seen, &none), by_default, "{status}");
            assert_eq!(next(&seen, &client), strictly, "{status}");
            let disables = judge(&seen, &none).disable.is_some();
            assert_eq!(disables, status == 410);
        }
    }

    #[test]
    fn what_the_endpoint_says_of_further_deliveries_is_heeded() {
        for (status, word, expected, disables) in [
            (200, Word::Abort, "delivered", false),
            (200, Word::Disable, "delivered", true),
            (500, Word::Abort, "aborted", false),
            (503, Word::Disable, "disabled", true),
            (302, Word::Abort, "aborted", false),
        ] {
            let seen = Seen {
                word: Some(word),
                ..answered(status)
            };
            assert_eq!(next(&seen, &Permanent::default()), expected);
            let judged = judge(&seen, &Permanent::default());
            assert_eq!(judged.disable.is_some(), disables, "{status} {word:?}");
        }
        let word = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("webhook-delivery", value.parse().unwrap());
            Word::of(&headers)
        };
        assert_eq!(word("Disable"), Some(Word::Disable));
        assert_eq!(word("abort-message, disable"), Some(Word::Disable));
        assert_eq!(word(" abort-message "), Some(Word::Abort));
        assert_eq!(word("disabled"), None);
    }

    #[test]
    fn a_good_head_is_no_delivery_until_its_body_ends_well() {
        let broken = |status| Seen {
            trouble: Some(Cause::Timeout),
            ..answered(status)
        };
        let judged = judge(&broken(200), &Permanent::default());
        assert_eq!(judged.verdict, Verdict::Failure);
        assert_eq!(
            judged.next,
            Next::Retry {
                cause: Cause::Timeout,
                floor: None
            }
        );
        assert_eq!(next(&broken(410), &Permanent::default()), "gone");
        assert_eq!(next(&broken(302), &Permanent::default()), "redirected");
    }

    #[test]
    fn only_429_and_503_say_when_to_come_again() {
        for (status, heeded) in [(429, true), (503, true), (500, false), (404, false)] {
            let seen = Seen {
                retry_after: Some(Duration::from_secs(9)),
                ..answered(status)
            };
            let Next::Retry { floor, .. } = judge(&seen, &Permanent::default()).next else {
                panic!("{status} is tried again");
            };
            assert_eq!(floor.is_some(), heeded, "{status}");
        }
    }

    proptest! {
        #[test]
        fn waits_grow_between_half_and_whole_up_to_the_cap(
            initial in 1..100_000_u64,
            retry in 1..100_u32,
            cap in 1..10_000_000_u64,
            draw: u64,
        ) {
            let cap = Duration::from_millis(cap.max(initial));
            let initial = Duration::from_millis(initial);
            let wait = backoff(initial, retry, cap, &SharedRandom::new(move || draw));
            let whole = (initial.as_nanos() << retry.min(40).saturating_sub(1))
                .min(cap.as_nanos());
            prop_assert!(wait.as_nanos() <= whole && wait.as_nanos() >= whole / 2);
            let most = backoff(initial, retry, cap, &SharedRandom::new(|| u64::MAX));
            prop_assert_eq!(most.as_nanos(), whole);
        }
    }
}
