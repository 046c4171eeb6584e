//! The section `circuit_breaker` of a route.

use std::{fmt, str::FromStr};

use buttress::{
    circuit_breaker,
    classify::{HttpClassifier, StatusClassifier},
};
use http::StatusCode;
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::{
    Count, Rate, Span, present,
    scalar::{from_scalar, words},
};

/// When to stop asking an upstream, and for how long.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section of keys")]
pub(crate) struct CircuitBreaker {
    pub(crate) preset: Preset,
    #[serde(deserialize_with = "present")]
    pub(crate) failure_threshold: Option<Count>,
    #[serde(deserialize_with = "present")]
    pub(crate) failure_rate: Option<Rate>,
    #[serde(deserialize_with = "present")]
    pub(crate) window: Option<Window>,
    #[serde(deserialize_with = "present")]
    pub(crate) minimum_requests: Option<Count>,
    #[serde(deserialize_with = "present")]
    pub(crate) slow_call: Option<SlowCall>,
    pub(crate) failure_statuses: Vec<FailureStatus>,
    #[serde(deserialize_with = "present")]
    pub(crate) reset_timeout: Option<Span>,
    pub(crate) half_open_requests: Count,
    pub(crate) per: Per,
    pub(crate) shared: Shared,
}

impl Default for CircuitBreaker {
    fn default() -> Self {
        Self {
            preset: Preset::Moderate,
            failure_threshold: None,
            failure_rate: None,
            window: None,
            minimum_requests: None,
            slow_call: None,
            failure_statuses: [500, 502, 503, 504].map(FailureStatus).into(),
            reset_timeout: None,
            half_open_requests: Count(1),
            per: Per::Upstream,
            shared: Shared::Not,
        }
    }
}

impl CircuitBreaker {
    /// The breaker's settings. Those who have been checked make sense.
    pub(crate) fn settings(&self) -> circuit_breaker::Settings {
        let steps = self.steps();
        let last = steps.into_iter().next_back();
        last.expect("the preset is the first").1
    }

    /// The key that makes no sense, as a path from here, and why.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        for (key, settings) in self.steps() {
            settings.check().map_err(|error| (key, error.to_string()))?;
        }
        // Without a rate nobody would look at them.
        let idle = match (self.window, self.minimum_requests) {
            _ if self.has_rate() => None,
            (Some(_), _) => Some(".window"),
            (None, Some(_)) => Some(".minimum_requests"),
            (None, None) => None,
        };
        let expected = "expected failure_rate or slow_call beside it, whose rates it is for";
        idle.map_or(Ok(()), |key| Err((key, expected.to_owned())))
    }

    fn has_rate(&self) -> bool {
        self.failure_rate.is_some() || self.slow_call.is_some()
    }

    /// The settings as they grow key by key. The layer's own check looks at
    /// all of them at once: the first step that it finds fault with is that of
    /// the key at fault.
    fn steps(&self) -> Vec<(&'static str, circuit_breaker::Settings)> {
        let preset = circuit_breaker::Settings::named(&self.preset.to_string())
            .expect("the layer has them all");
        let mut steps = vec![(".preset", preset)];
        let mut then = |key, step: &dyn Fn(circuit_breaker::Settings) -> _| {
            let settings = step(steps[steps.len() - 1].1.clone());
            steps.push((key, settings));
        };
        if let Some(Count(failures)) = self.failure_threshold {
            then(".failure_threshold", &|it| {
                it.consecutive_failures(failures)
            });
        }
        if let Some(Rate(rate)) = self.failure_rate {
            then(".failure_rate", &|it| it.failure_rate(rate));
        }
        if let Some(SlowCall { duration, rate }) = self.slow_call {
            then(".slow_call", &|it| it.slow_calls(duration.0, rate.0));
        }
        match self.window {
            Some(Window::Requests(Count(calls))) => then(".window.requests", &|it| {
                it.window(circuit_breaker::Window::Calls(calls))
            }),
            Some(Window::Time(Span(span))) => then(".window.time", &|it| {
                it.window(circuit_breaker::Window::Time(span))
            }),
            None => {}
        }
        if let Some(Count(calls)) = self.minimum_requests {
            then(".minimum_requests", &|it| it.minimum_calls(calls));
        }
        if let Some(Span(timeout)) = self.reset_timeout {
            then(".reset_timeout", &|it| it.reset_timeout(timeout));
        }
        then(".half_open_requests", &|it| {
            it.half_open_probes(self.half_open_requests.0)
        });
        steps
    }

    /// What is a failure. A stream of events is a success once it has begun:
    /// it ends when somebody tires of it.
    pub(crate) fn judge(&self) -> HttpClassifier {
        let statuses = self.failure_statuses.iter().map(|FailureStatus(status)| {
            StatusCode::from_u16(*status).expect("checked when it was read")
        });
        HttpClassifier::new()
            .with_status(StatusClassifier::new().failures(statuses))
            .streaming(["text/event-stream"])
    }

    /// Failures in a row, where they are a rule: a rate alone replaces the
    /// preset's.
    pub(super) fn effective_threshold(&self) -> Option<Count> {
        let (failures, _) = self.preset.rule();
        self.failure_threshold
            .or((!self.has_rate()).then_some(failures))
    }

    /// The window and the least that it must hold, where there is a rate.
    pub(super) fn effective_window(&self) -> Option<(Window, Count)> {
        let window = self.window.unwrap_or(Window::Requests(Count(100)));
        let minimum = self.minimum_requests.unwrap_or(match window {
            Window::Requests(Count(calls)) => Count(calls.min(20)),
            Window::Time(_) => Count(20),
        });
        self.has_rate().then_some((window, minimum))
    }

    pub(super) fn effective_reset_timeout(&self) -> Span {
        let (_, reset_timeout) = self.preset.rule();
        self.reset_timeout.unwrap_or(reset_timeout)
    }
}

words!(
    /// Settings that have proved themselves.
    Preset {
        Aggressive = "aggressive",
        Moderate = "moderate",
        Tolerant = "tolerant",
        Critical = "critical"
    }
);
words!(
    /// What has a breaker: each endpoint, or the route.
    Per { Upstream = "upstream", Route = "route" }
);

impl Preset {
    /// What the layer's presets say, to be shown by `--check`: failures in a
    /// row, and how long it is open then.
    const fn rule(self) -> (Count, Span) {
        match self {
            Self::Aggressive => (Count(3), Span::secs(10)),
            Self::Moderate => (Count(5), Span::secs(30)),
            Self::Tolerant => (Count(10), Span::secs(60)),
            Self::Critical => (Count(2), Span::secs(60)),
        }
    }
}

/// Over what rates are counted: `{ requests: 100 }` or `{ time: 10s }`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Window {
    Requests(Count),
    Time(Span),
}

impl<'de> Deserialize<'de> for Window {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields, default, expecting = "a section of keys")]
        #[derive(Default)]
        struct Section {
            #[serde(deserialize_with = "present")]
            requests: Option<Count>,
            #[serde(deserialize_with = "present")]
            time: Option<Span>,
        }

        match Section::deserialize(deserializer)? {
            Section {
                requests: Some(calls),
                time: None,
            } => Ok(Self::Requests(calls)),
            Section {
                requests: None,
                time: Some(span),
            } => Ok(Self::Time(span)),
            _ => Err(D::Error::custom(
                "expected either requests or time, such as { requests: 100 } or { time: 10s }",
            )),
        }
    }
}

/// Calls that take so long, and the part of them that is too much.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section of keys")]
pub(crate) struct SlowCall {
    pub(super) duration: Span,
    pub(super) rate: Rate,
}

/// A status that is a failure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FailureStatus(pub(super) u16);

impl FromStr for FailureStatus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse()
            .ok()
            .filter(|status| (400..600).contains(status))
            .map(Self)
            .ok_or_else(|| format!("expected a status from 400 to 599, got `{text}`"))
    }
}

impl fmt::Display for FailureStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

from_scalar!(Preset, Per, FailureStatus);

/// Whether processes open together: `false`, `true`, or `{ quorum: 2 }`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shared {
    Not,
    /// In all, once so many of them find the upstream failing.
    By(Count),
}

impl<'de> Deserialize<'de> for Shared {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        #[derive(Deserialize)]
        #[serde(deny_unknown_fields, expecting = "a section of keys")]
        struct Section {
            quorum: Count,
        }

        impl<'de> Visitor<'de> for Any {
            type Value = Shared;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or { quorum: 2 }")
            }
            fn visit_bool<E: Error>(self, shared: bool) -> Result<Shared, E> {
                Ok(match shared {
                    false => Shared::Not,
                    true => Shared::By(Count(1)),
                })
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Shared, A::Error> {
                let section = MapAccessDeserializer::new(map);
                Section::deserialize(section).map(|section| Shared::By(section.quorum))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use buttress::classify::Verdict;
    use circuit_breaker::{Breaker, State};

    use super::*;

    #[test]
    fn what_check_shows_of_a_preset_is_what_the_layer_does() {
        for word in ["aggressive", "moderate", "tolerant", "critical"] {
            let section = CircuitBreaker {
                preset: word.parse().unwrap(),
                ..CircuitBreaker::default()
            };
            let breaker = Breaker::builder(word)
                .settings(section.settings())
                .build()
                .unwrap();
            let Count(failures) = section.effective_threshold().unwrap();
            for _ in 0..failures {
                assert_eq!(breaker.state(), State::Closed);
                breaker.try_acquire().unwrap().record(Verdict::Failure);
            }
            assert_eq!(breaker.state(), State::Open);
            let status = breaker.status();
            let open = status.next_probe.unwrap() - status.since;
            assert_eq!(Span(open), section.effective_reset_timeout());
        }
    }
}
