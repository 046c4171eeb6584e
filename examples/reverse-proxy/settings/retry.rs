//! The section `retry` of a route.

use std::{fmt, str::FromStr, time::Duration};

use buttress::retry::{self, Jitter, RetryBudget};
use http::{Method, StatusCode};
use serde::{Deserialize, Deserializer};

use super::{
    Count, Size, Span,
    breaker::FailureStatus,
    present,
    scalar::{from_scalar, words},
};

/// How often a request goes upstream that failed there, and when.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section of keys")]
pub(crate) struct Retry {
    pub(crate) preset: Preset,
    #[serde(deserialize_with = "present")]
    pub(crate) max_attempts: Option<Count>,
    pub(crate) backoff: Backoff,
    #[serde(deserialize_with = "present")]
    pub(crate) initial_delay: Option<Span>,
    pub(crate) max_delay: Span,
    #[serde(deserialize_with = "present")]
    pub(crate) total_timeout: Option<Span>,
    #[serde(deserialize_with = "present")]
    pub(crate) attempt_timeout: Option<Span>,
    pub(crate) budget: Budget,
    pub(crate) methods: Vec<Verb>,
    pub(crate) statuses: Vec<FailureStatus>,
    pub(crate) max_body: Size,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            preset: Preset::Standard,
            max_attempts: None,
            backoff: Backoff::ExponentialJitter,
            initial_delay: None,
            max_delay: Span::secs(10),
            total_timeout: None,
            attempt_timeout: None,
            budget: Budget::default(),
            methods: [
                Method::GET,
                Method::HEAD,
                Method::OPTIONS,
                Method::TRACE,
                Method::PUT,
                Method::DELETE,
            ]
            .map(Verb)
            .into(),
            statuses: [408, 425, 429, 500, 502, 503, 504]
                .map(FailureStatus)
                .into(),
            max_body: Size(64 << 10),
        }
    }
}

/// How many requests may be repeated, all of the route together.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section of keys")]
pub(crate) struct Budget {
    pub(crate) percent: UpTo<1000>,
    pub(crate) min_per_second: UpTo<1_000_000>,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            percent: UpTo(20),
            min_per_second: UpTo(3),
        }
    }
}

impl Budget {
    pub(crate) fn build(self) -> RetryBudget {
        RetryBudget::new(self.percent.0, self.min_per_second.0).expect("checked when it was read")
    }
}

impl Retry {
    /// The layer's settings, where the route has this long in all. Those that
    /// have been checked make sense.
    pub(crate) fn settings(&self, timeout: Duration) -> retry::Settings {
        let Span(initial) = self.effective_initial_delay();
        let backoff = match self.backoff {
            Backoff::Fixed => retry::Backoff::fixed(initial),
            Backoff::Linear => retry::Backoff::linear(initial),
            Backoff::Exponential => retry::Backoff::exponential(initial).jitter(Jitter::None),
            Backoff::ExponentialJitter => retry::Backoff::exponential(initial),
            Backoff::DecorrelatedJitter => {
                retry::Backoff::exponential(initial).jitter(Jitter::Decorrelated)
            }
        };
        retry::Settings::standard()
            .max_attempts(self.effective_max_attempts().0)
            .backoff(backoff.max(self.max_delay.0))
            .total_timeout(self.effective_total_timeout().0.min(timeout))
            .attempt_timeout(self.attempt_timeout.map(|Span(limit)| limit))
    }

    /// How long one attempt may take at the most, where the route has this
    /// long in all.
    pub(crate) fn attempt(&self, timeout: Duration) -> Duration {
        let total = self.effective_total_timeout().0.min(timeout);
        self.attempt_timeout
            .map_or(total, |Span(limit)| limit.min(total))
    }

    pub(crate) fn methods(&self) -> impl Iterator<Item = Method> {
        self.methods.iter().map(|Verb(method)| method.clone())
    }

    pub(crate) fn statuses(&self) -> impl Iterator<Item = StatusCode> {
        self.statuses.iter().map(|FailureStatus(status)| {
            StatusCode::from_u16(*status).expect("checked when it was read")
        })
    }

    /// The key that makes no sense, as a path from here, and why.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        let initial = self.effective_initial_delay();
        if initial.0 > self.max_delay.0 {
            let (max, default) = (self.max_delay, Self::default().max_delay);
            return Err(if max == default {
                let expected = format!("expected at most max_delay, {max}, got `{initial}`");
                (".initial_delay", expected)
            } else {
                let expected = format!("expected at least initial_delay, {initial}, got `{max}`");
                (".max_delay", expected)
            });
        }
        let Budget {
            percent: UpTo(percent),
            min_per_second: UpTo(minimum),
        } = self.budget;
        if percent == 0 && minimum == 0 {
            let expected = "expected percent or min_per_second above 0: else there is no retry";
            return Err((".budget", expected.to_owned()));
        }
        Ok(())
    }

    pub(super) fn effective_max_attempts(&self) -> Count {
        self.max_attempts.unwrap_or(self.preset.rule().0)
    }

    pub(super) fn effective_initial_delay(&self) -> Span {
        self.initial_delay.unwrap_or(self.preset.rule().1)
    }

    pub(super) fn effective_total_timeout(&self) -> Span {
        self.total_timeout.unwrap_or(self.preset.rule().2)
    }
}

words!(
    /// Settings that have proved themselves.
    Preset {
        Quick = "quick",
        Standard = "standard",
        Patient = "patient",
        Aggressive = "aggressive"
    }
);
words!(
    /// How the waits grow.
    Backoff {
        Fixed = "fixed",
        Linear = "linear",
        Exponential = "exponential",
        ExponentialJitter = "exponential-jitter",
        DecorrelatedJitter = "decorrelated-jitter"
    }
);

impl Preset {
    /// What the layer's presets say: attempts, the first wait, and how long in
    /// all.
    const fn rule(self) -> (Count, Span, Span) {
        match self {
            Self::Quick => (Count(2), Span::millis(100), Span::secs(5)),
            Self::Standard => (Count(3), Span::secs(1), Span::secs(30)),
            Self::Patient => (Count(5), Span::secs(2), Span::secs(120)),
            Self::Aggressive => (Count(10), Span::millis(500), Span::secs(60)),
        }
    }
}

/// A whole number from 0 on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UpTo<const MAX: u32>(pub(super) u32);

impl<const MAX: u32> FromStr for UpTo<MAX> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse()
            .ok()
            .filter(|number| *number <= MAX)
            .map(Self)
            .ok_or_else(|| format!("expected a whole number from 0 to {MAX}, got `{text}`"))
    }
}

/// A method that may be sent twice.
#[derive(Clone, Debug)]
pub(crate) struct Verb(Method);

impl FromStr for Verb {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Methods know upper and lower case; `get` is none that anyone sends.
        text.parse()
            .ok()
            .filter(|_| !text.bytes().any(|b| b.is_ascii_lowercase()))
            .map(Self)
            .ok_or_else(|| format!("expected a method such as GET, got `{text}`"))
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

from_scalar!(Preset, Backoff, Verb, UpTo<1000>, UpTo<1_000_000>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_check_shows_of_a_preset_is_what_the_layer_does() {
        for (word, settings) in [
            ("quick", retry::Settings::quick()),
            ("standard", retry::Settings::standard()),
            ("patient", retry::Settings::patient()),
            ("aggressive", retry::Settings::aggressive()),
        ] {
            let section = Retry {
                preset: word.parse().unwrap(),
                ..Retry::default()
            };
            let ours = section.settings(Duration::from_secs(3600));
            assert_eq!(format!("{ours:?}"), format!("{settings:?}"));
        }
    }

    #[test]
    fn the_shortest_time_rules() {
        let section = Retry::default();
        let secs = Duration::from_secs;
        assert_eq!(section.attempt(secs(60)), secs(30));
        assert_eq!(section.attempt(secs(5)), secs(5));
        let section = Retry {
            attempt_timeout: Some(Span::secs(2)),
            ..section
        };
        assert_eq!(section.attempt(secs(60)), secs(2));
        assert_eq!(section.attempt(secs(1)), secs(1));
    }
}
