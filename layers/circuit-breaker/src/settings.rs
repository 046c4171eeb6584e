//! What a breaker decides by.

use std::time::Duration;

use crate::{
    ConfigError, ReopenBackoff,
    error::Problem,
    window::{MAX_CALLS, MIN_TIME},
    word::{Counts, MAX_IN_A_ROW},
};

/// The window over which rates are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Window {
    /// The last so many calls: 1 to 4096. They are counted where one fails or
    /// is slow, a load for each 24 of them; for more than some thousand, a
    /// window of time says the same and costs the same however many they are.
    Calls(u32),
    /// What ended within the last so long: from 100 ms to a year. It slides by
    /// tenths: a result counts for the whole of it at most, and for nine
    /// tenths at least.
    Time(Duration),
}

/// When a breaker opens, for how long, and what closes it again.
///
/// Plain data: [`check`](Self::check) says whether it makes sense, and so does
/// the `build` of whatever it is given to.
///
/// # Rules
///
/// | rule | opens when |
/// | --- | --- |
/// | [`consecutive_failures`](Self::consecutive_failures) | so many fail in a row |
/// | [`failure_rate`](Self::failure_rate) | of the calls in the window, this part or more failed |
/// | [`slow_calls`](Self::slow_calls) | of the calls in the window, this part or more took so long or longer |
///
/// Each alone or together; the first that holds opens it. The presets have the
/// first. If a rate is set and no number in a row, the preset's number is off.
///
/// A rate says nothing before the window has
/// [`minimum_calls`](Self::minimum_calls). It is looked at whenever a call
/// fails or is slow. If it is reached by then and only calls are lacking, the
/// call that completes the minimum opens the breaker, even when it is a
/// success. No other success does: not when older ones fall out of the window.
///
/// ```
/// use std::time::Duration;
/// use buttress_circuit_breaker::{Settings, Window};
///
/// let settings = Settings::moderate()
///     .failure_rate(0.5)
///     .slow_calls(Duration::from_secs(2), 0.8)
///     .window(Window::Time(Duration::from_secs(10)))
///     .minimum_calls(20)
///     .reset_timeout(Duration::from_secs(15));
/// assert!(settings.check().is_ok());
///
/// let error = Settings::new().failure_rate(1.5).check().unwrap_err();
/// assert_eq!(error.to_string(), "the failure rate must be above 0 and at most 1");
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    preset: u32,
    consecutive: Option<u32>,
    failure_rate: Option<f64>,
    slow: Option<(Duration, f64)>,
    window: Window,
    minimum_calls: Option<u32>,
    reset_timeout: Duration,
    backoff: ReopenBackoff,
    probes: u32,
    probes_at_once: Option<u32>,
    failed_probes: u32,
    half_open_timeout: Option<Duration>,
    drops_of_slow_probes: bool,
}

/// Calls that a rate needs unless told otherwise.
const DEFAULT_MINIMUM: u32 = 20;
/// The longest of all spans.
pub(crate) const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

impl Settings {
    /// The defaults: [`moderate`](Self::moderate).
    #[must_use]
    pub const fn new() -> Self {
        Self::moderate()
    }

    const fn preset(failures: u32, reset_secs: u64) -> Self {
        Self {
            preset: failures,
            consecutive: None,
            failure_rate: None,
            slow: None,
            window: Window::Calls(100),
            minimum_calls: None,
            reset_timeout: Duration::from_secs(reset_secs),
            backoff: ReopenBackoff::new(1.0),
            probes: 1,
            probes_at_once: None,
            failed_probes: 0,
            half_open_timeout: None,
            drops_of_slow_probes: false,
        }
    }

    /// For what should answer at once, a cache say: opens after 3 failures in
    /// a row, for 10 s.
    #[must_use]
    pub const fn aggressive() -> Self {
        Self::preset(3, 10)
    }

    /// For most: 5 failures in a row, 30 s.
    #[must_use]
    pub const fn moderate() -> Self {
        Self::preset(5, 30)
    }

    /// For what fails now and then, a model behind an API say: 10 failures in
    /// a row, 60 s.
    #[must_use]
    pub const fn tolerant() -> Self {
        Self::preset(10, 60)
    }

    /// For what must not be hit while it is down: 2 failures in a row, 60 s.
    #[must_use]
    pub const fn critical() -> Self {
        Self::preset(2, 60)
    }

    /// The preset of this name: `aggressive`, `moderate`, `tolerant` or
    /// `critical`.
    #[must_use]
    pub fn named(preset: &str) -> Option<Self> {
        Some(match preset {
            "aggressive" => Self::aggressive(),
            "moderate" => Self::moderate(),
            "tolerant" => Self::tolerant(),
            "critical" => Self::critical(),
            _ => return None,
        })
    }

    /// The settings that suit a service known by name, whatever its case:
    ///
    /// | services | preset |
    /// | --- | --- |
    /// | `openai`, `gemini`, `anthropic` | [`tolerant`](Self::tolerant) |
    /// | `redis` | [`aggressive`](Self::aggressive) |
    /// | `finnhub`, `coingecko`, `openweathermap` | [`moderate`](Self::moderate) |
    ///
    /// ```
    /// use buttress_circuit_breaker::Settings;
    ///
    /// assert_eq!(Settings::for_service("OpenAI"), Some(Settings::tolerant()));
    /// assert_eq!(Settings::for_service("example"), None);
    /// ```
    #[must_use]
    pub fn for_service(service: &str) -> Option<Self> {
        const SERVICES: [(&str, Settings); 7] = [
            ("openai", Settings::tolerant()),
            ("gemini", Settings::tolerant()),
            ("anthropic", Settings::tolerant()),
            ("redis", Settings::aggressive()),
            ("finnhub", Settings::moderate()),
            ("coingecko", Settings::moderate()),
            ("openweathermap", Settings::moderate()),
        ];
        SERVICES
            .into_iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(service))
            .map(|(_, settings)| settings)
    }

    /// Opens after this many failures in a row: 1 to 16 777 215.
    #[must_use]
    pub const fn consecutive_failures(mut self, failures: u32) -> Self {
        self.consecutive = Some(failures);
        self
    }

    /// Opens when of the calls in the window this part or more failed: above
    /// 0, at most 1. Kept to the millionth.
    #[must_use]
    pub const fn failure_rate(mut self, rate: f64) -> Self {
        self.failure_rate = Some(rate);
        self
    }

    /// Opens when of the calls in the window this part or more (above 0, at
    /// most 1) took `duration` or longer, until the head of their response.
    ///
    /// A call that is given up on (its future dropped) after that long counts
    /// as a slow one; and a slow probe is a failed one.
    #[must_use]
    pub const fn slow_calls(mut self, duration: Duration, rate: f64) -> Self {
        self.slow = Some((duration, rate));
        self
    }

    /// Where rates are counted. Default: the last 100 calls.
    #[must_use]
    pub const fn window(mut self, window: Window) -> Self {
        self.window = window;
        self
    }

    /// Calls that the window must have before a rate says anything: at least
    /// 1, and not more than a window of calls holds. Default: 20, or the whole
    /// of a smaller window.
    #[must_use]
    pub const fn minimum_calls(mut self, calls: u32) -> Self {
        self.minimum_calls = Some(calls);
        self
    }

    /// How long it stays open before it lets a probe pass. Above 0, at most
    /// 366 days.
    #[must_use]
    pub const fn reset_timeout(mut self, timeout: Duration) -> Self {
        self.reset_timeout = timeout;
        self
    }

    /// How that time grows when it opens again and again. Default: not.
    #[must_use]
    pub const fn reopen_backoff(mut self, backoff: ReopenBackoff) -> Self {
        self.backoff = backoff;
        self
    }

    /// How many probes a half-open breaker asks for: 1 to 255. Default: 1.
    ///
    /// It closes once all but the tolerated ones have succeeded, and opens
    /// again as soon as more have failed.
    #[must_use]
    pub const fn half_open_probes(mut self, probes: u32) -> Self {
        self.probes = probes;
        self
    }

    /// How many of them may be in flight at once: 1 to the number of probes.
    /// Default: all.
    #[must_use]
    pub const fn half_open_concurrency(mut self, probes: u32) -> Self {
        self.probes_at_once = Some(probes);
        self
    }

    /// How many probes may fail without opening it again: fewer than there
    /// are. Default: none.
    #[must_use]
    pub const fn half_open_failures(mut self, tolerated: u32) -> Self {
        self.failed_probes = tolerated;
        self
    }

    /// How long half-open may stay undecided before it is open again. Above 0,
    /// at most 366 days. Default: the `reset_timeout`.
    ///
    /// With several probes and little traffic give it room: what has succeeded
    /// by then is forgotten.
    #[must_use]
    pub const fn half_open_timeout(mut self, timeout: Duration) -> Self {
        self.half_open_timeout = Some(timeout);
        self
    }

    /// Whether a probe that is given up on (its future dropped) after it ran
    /// past the slow-call duration is a failed one. Default: no, its place is
    /// free again and nothing is decided.
    #[must_use]
    pub const fn count_dropped_probes(mut self, count: bool) -> Self {
        self.drops_of_slow_probes = count;
        self
    }

    /// What these settings say, one by one and with the defaults filled in,
    /// whether they make sense or not.
    ///
    /// ```
    /// use std::time::Duration;
    /// use buttress_circuit_breaker::Settings;
    ///
    /// let rules = Settings::tolerant().half_open_probes(3).rules();
    /// assert_eq!(rules.consecutive_failures, Some(10));
    /// assert_eq!(rules.failure_rate, None);
    /// assert_eq!(rules.half_open_timeout, Duration::from_secs(60));
    /// assert_eq!(rules.half_open_concurrency, 3);
    /// ```
    #[must_use]
    pub fn rules(&self) -> Rules {
        let rated = self.failure_rate.is_some() || self.slow.is_some();
        let in_window = match self.window {
            Window::Calls(calls) => calls,
            Window::Time(_) => u32::MAX,
        };
        Rules {
            consecutive_failures: self.consecutive.or((!rated).then_some(self.preset)),
            failure_rate: self.failure_rate,
            slow_calls: self.slow,
            window: self.window,
            minimum_calls: self.minimum_calls.unwrap_or(DEFAULT_MINIMUM.min(in_window)),
            reset_timeout: self.reset_timeout,
            reopen_factor: self.backoff.factor,
            reopen_max: self.backoff.max,
            reopen_jitter: self.backoff.jitter,
            reopen_decay: self.backoff.span(self.reset_timeout),
            half_open_probes: self.probes,
            half_open_concurrency: self.probes_at_once.unwrap_or(self.probes),
            half_open_failures: self.failed_probes,
            half_open_timeout: self.half_open_timeout.unwrap_or(self.reset_timeout),
            count_dropped_probes: self.drops_of_slow_probes,
        }
    }

    /// Whether these settings make sense.
    ///
    /// # Errors
    ///
    /// The first that does not, with what it must be.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.plan().map(drop)
    }

    pub(crate) fn plan(&self) -> Result<Plan, ConfigError> {
        let rules = self.rules();
        let in_a_row = match rules.consecutive_failures {
            Some(failures) if failures == 0 || failures > MAX_IN_A_ROW => {
                return Err(Problem::ConsecutiveFailures.into());
            }
            Some(failures) => failures,
            None => 0,
        };
        let failure_ppm = match rules.failure_rate {
            Some(rate) => millionths(rate).ok_or(Problem::FailureRate)?,
            None => 0,
        };
        let (slow, slow_ppm) = match rules.slow_calls {
            Some((duration, rate)) => {
                if duration.is_zero() || duration > LONGEST {
                    return Err(Problem::SlowDuration.into());
                }
                (duration, millionths(rate).ok_or(Problem::SlowRate)?)
            }
            None => (Duration::ZERO, 0),
        };
        let rated = failure_ppm > 0 || slow_ppm > 0;
        let (counts, most_calls) = match rules.window {
            Window::Calls(calls) if !(1..=MAX_CALLS).contains(&calls) => {
                return Err(Problem::WindowCalls.into());
            }
            Window::Time(span) if !(MIN_TIME..=LONGEST).contains(&span) => {
                return Err(Problem::WindowTime.into());
            }
            _ if !rated => (Counts::Nowhere, u32::MAX),
            Window::Calls(calls) => (Counts::Calls, calls),
            Window::Time(_) => (Counts::Time, u32::MAX),
        };
        let minimum = rules.minimum_calls;
        if minimum == 0 || minimum > most_calls {
            return Err(Problem::MinimumCalls.into());
        }
        let span = |span: Duration| (!span.is_zero() && span <= LONGEST).then_some(span);
        let reset_timeout = span(rules.reset_timeout).ok_or(Problem::ResetTimeout)?;
        self.backoff.check(reset_timeout)?;
        let half_open = span(rules.half_open_timeout).ok_or(Problem::HalfOpenTimeout)?;
        let probes = u8::try_from(rules.half_open_probes)
            .ok()
            .filter(|&probes| probes > 0)
            .ok_or(Problem::Probes)?;
        let at_once = u8::try_from(rules.half_open_concurrency)
            .ok()
            .filter(|at_once| (1..=probes).contains(at_once))
            .ok_or(Problem::ProbesAtOnce)?;
        let tolerated = u8::try_from(rules.half_open_failures)
            .ok()
            .filter(|&failed| failed < probes)
            .ok_or(Problem::FailedProbes)?;
        Ok(Plan {
            in_a_row,
            failure_ppm,
            slow_ppm,
            slow,
            counts,
            window: rules.window,
            minimum,
            reset_timeout,
            backoff: self.backoff,
            half_open,
            probes,
            at_once,
            tolerated,
            drops_of_slow_probes: rules.count_dropped_probes,
        })
    }
}

/// What [`Settings`] say, one by one: [`Settings::rules`]. The fields are named
/// as what sets them.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Rules {
    /// Opens after so many failures in a row; `None` where that is no rule.
    pub consecutive_failures: Option<u32>,
    /// Opens where of the calls in the window this part or more failed; `None`
    /// where that is no rule.
    pub failure_rate: Option<f64>,
    /// Opens where of the calls in the window this part or more took so long
    /// or longer; `None` where that is no rule.
    pub slow_calls: Option<(Duration, f64)>,
    /// Where rates are counted.
    pub window: Window,
    /// Calls that a rate needs.
    pub minimum_calls: u32,
    /// How long it stays open.
    pub reset_timeout: Duration,
    /// How many times as long an opening is as the one before:
    /// [`ReopenBackoff::new`].
    pub reopen_factor: f64,
    /// The longest that it stays open: [`ReopenBackoff::max`].
    pub reopen_max: Duration,
    /// How much longer it may be at random: [`ReopenBackoff::jitter`].
    pub reopen_jitter: f64,
    /// How long it must stay closed for one opening to be forgotten:
    /// [`ReopenBackoff::decay`].
    pub reopen_decay: Duration,
    /// Probes that half-open asks for.
    pub half_open_probes: u32,
    /// Those at once.
    pub half_open_concurrency: u32,
    /// Those that may fail.
    pub half_open_failures: u32,
    /// How long half-open may stay undecided.
    pub half_open_timeout: Duration,
    /// Whether a slow probe that is given up on has failed.
    pub count_dropped_probes: bool,
}

/// [`moderate`](Settings::moderate).
impl Default for Settings {
    fn default() -> Self {
        Self::new()
    }
}

/// Integers, so that 7 of 100 are 0.07 and not a hair less; and never more than
/// was asked for, so that 2 of 3 are 2/3.
fn millionths(rate: f64) -> Option<u32> {
    if !(rate > 0.0 && rate <= 1.0) {
        return None;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and a million"
    )]
    let parts = (rate * 1e6 + 1e-4) as u32;
    Some(parts.max(1))
}

/// Settings that make sense, as numbers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    /// 0: not a rule.
    pub(crate) in_a_row: u32,
    /// 0: not a rule.
    pub(crate) failure_ppm: u32,
    /// 0: not a rule.
    pub(crate) slow_ppm: u32,
    pub(crate) slow: Duration,
    pub(crate) counts: Counts,
    pub(crate) window: Window,
    pub(crate) minimum: u32,
    pub(crate) reset_timeout: Duration,
    pub(crate) backoff: ReopenBackoff,
    pub(crate) half_open: Duration,
    pub(crate) probes: u8,
    pub(crate) at_once: u8,
    pub(crate) tolerated: u8,
    pub(crate) drops_of_slow_probes: bool,
}

impl Plan {
    pub(crate) fn is_timed(&self) -> bool {
        self.slow_ppm > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(settings: &Settings) -> String {
        settings.check().unwrap_err().to_string()
    }

    #[test]
    fn the_presets() {
        let rule = |settings: Settings| {
            let plan = settings.plan().unwrap();
            (plan.in_a_row, plan.reset_timeout.as_secs())
        };
        assert_eq!(rule(Settings::aggressive()), (3, 10));
        assert_eq!(rule(Settings::moderate()), (5, 30));
        assert_eq!(rule(Settings::tolerant()), (10, 60));
        assert_eq!(rule(Settings::critical()), (2, 60));
        assert_eq!(Settings::default(), Settings::moderate());
        assert_eq!(Settings::named("critical"), Some(Settings::critical()));
        assert_eq!(Settings::named("Critical"), None);
        for service in ["openai", "gemini", "anthropic"] {
            assert_eq!(Settings::for_service(service), Some(Settings::tolerant()));
        }
        assert_eq!(Settings::for_service("REDIS"), Some(Settings::aggressive()));
        for service in ["finnhub", "coingecko", "openweathermap"] {
            assert_eq!(Settings::for_service(service), Some(Settings::moderate()));
        }
    }

    #[test]
    fn a_rate_alone_replaces_the_presets_rule() {
        let plan = |settings: Settings| settings.plan().unwrap();
        assert_eq!(plan(Settings::new()).in_a_row, 5);
        assert_eq!(plan(Settings::new()).counts, Counts::Nowhere);
        assert_eq!(plan(Settings::new().failure_rate(0.5)).in_a_row, 0);
        let slow = Settings::new().slow_calls(Duration::from_secs(1), 0.5);
        assert_eq!(plan(slow).in_a_row, 0);
        let both = Settings::new().failure_rate(0.5).consecutive_failures(7);
        assert_eq!(plan(both.clone()).in_a_row, 7);
        assert_eq!(plan(both).counts, Counts::Calls);
    }

    #[test]
    fn what_is_said_can_be_read() {
        let ms = Duration::from_millis;
        let settings = Settings::critical()
            .consecutive_failures(7)
            .failure_rate(0.25)
            .slow_calls(ms(30), 0.75)
            .window(Window::Time(ms(400)))
            .minimum_calls(5)
            .reset_timeout(ms(60))
            .reopen_backoff(
                ReopenBackoff::new(2.0)
                    .max(ms(90))
                    .jitter(0.5)
                    .decay(ms(80)),
            )
            .half_open_probes(9)
            .half_open_concurrency(8)
            .half_open_failures(3)
            .half_open_timeout(ms(70))
            .count_dropped_probes(true);
        assert_eq!(
            settings.rules(),
            Rules {
                consecutive_failures: Some(7),
                failure_rate: Some(0.25),
                slow_calls: Some((ms(30), 0.75)),
                window: Window::Time(ms(400)),
                minimum_calls: 5,
                reset_timeout: ms(60),
                reopen_factor: 2.0,
                reopen_max: ms(90),
                reopen_jitter: 0.5,
                reopen_decay: ms(80),
                half_open_probes: 9,
                half_open_concurrency: 8,
                half_open_failures: 3,
                half_open_timeout: ms(70),
                count_dropped_probes: true,
            }
        );
        let rules = Settings::critical().window(Window::Calls(7)).rules();
        assert_eq!(rules.consecutive_failures, Some(2));
        assert_eq!(rules.minimum_calls, 7);
        assert_eq!(rules.reopen_decay, rules.reset_timeout);
        let rated = Settings::new().failure_rate(0.5).rules();
        assert_eq!(rated.consecutive_failures, None);
    }

    #[test]
    fn rates_are_exact() {
        assert_eq!(millionths(0.07), Some(70_000));
        assert_eq!(millionths(1.0), Some(1_000_000));
        assert_eq!(millionths(1e-12), Some(1));
        // Decimals that are not exact, and thirds, which were rounded up.
        for hundredths in 1..=100_u32 {
            let rate = f64::from(hundredths) / 100.0;
            assert_eq!(millionths(rate), Some(hundredths * 10_000));
        }
        for calls in 1..=200_u64 {
            for failed in 1..=calls {
                let rate = failed as f64 / calls as f64;
                let ppm = u64::from(millionths(rate).unwrap());
                let over = |failed: u64| failed * 1_000_000 >= ppm * calls;
                assert!(over(failed) && !over(failed - 1), "{failed} of {calls}");
            }
        }
        for rate in [0.0, -0.5, 1.000_001, f64::NAN, f64::INFINITY] {
            assert_eq!(millionths(rate), None);
        }
    }

    #[test]
    fn the_minimum_fits_the_window() {
        let minimum = |settings: Settings| settings.plan().map(|plan| plan.minimum);
        let rate = Settings::new().failure_rate(0.5);
        assert_eq!(minimum(rate.clone()).unwrap(), 20);
        assert_eq!(minimum(rate.clone().window(Window::Calls(5))).unwrap(), 5);
        let time = Window::Time(Duration::from_secs(1));
        assert_eq!(
            minimum(rate.clone().window(time).minimum_calls(5000)).unwrap(),
            5000
        );
        assert!(minimum(rate.clone().window(Window::Calls(5)).minimum_calls(6)).is_err());
        assert!(minimum(rate.minimum_calls(0)).is_err());
    }

    #[test]
    fn nonsense_is_refused_with_what_it_must_be() {
        let new = Settings::new;
        assert!(says(&new().consecutive_failures(0)).contains("1 to 16777215"));
        assert!(says(&new().failure_rate(0.0)).contains("above 0 and at most 1"));
        assert!(says(&new().slow_calls(Duration::ZERO, 0.5)).contains("slow-call duration"));
        assert!(says(&new().slow_calls(LONGEST, 1.1)).contains("slow-call rate"));
        assert!(says(&new().window(Window::Calls(0))).contains("1 to 4096"));
        assert!(says(&new().window(Window::Calls(4097))).contains("1 to 4096"));
        assert!(says(&new().window(Window::Time(Duration::from_millis(99)))).contains("100 ms"));
        assert!(says(&new().reset_timeout(Duration::ZERO)).contains("reset timeout"));
        assert!(says(&new().half_open_timeout(Duration::MAX)).contains("half-open timeout"));
        assert!(says(&new().half_open_probes(0)).contains("1 to 255"));
        assert!(says(&new().half_open_probes(256)).contains("1 to 255"));
        assert!(says(&new().half_open_concurrency(2)).contains("1 to the number of probes"));
        assert!(says(&new().half_open_concurrency(0)).contains("1 to the number of probes"));
        assert!(says(&new().half_open_failures(1)).contains("fewer than"));
        assert!(says(&new().reopen_backoff(ReopenBackoff::new(0.5))).contains("factor"));
    }
}
