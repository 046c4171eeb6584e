//! Checks: what is asked of others in the background, and what came of it.

mod run;

use std::{fmt, panic::AssertUnwindSafe, pin::Pin, sync::Arc, time::Duration};

use buttress_core::{BoxError, clock::Instant, sync::Mutex};

use crate::{
    ConfigError,
    error::{self, Problem},
    metrics::CheckMetrics,
};

pub(crate) use run::{caught, run};

/// A question that is asked in the background, again and again: does the
/// database answer?
///
/// First when the registry is [started](crate::HealthRegistry::start), then at
/// every interval, which is moved by up to a tenth either way so that the
/// replicas of a service do not ask all at once. One run at a time: an answer
/// that takes longer than the interval puts off the next. A probe never runs a
/// check; it reads what came of the last run.
///
/// ```
/// use std::time::Duration;
/// use buttress_health::{Check, CheckState, HealthRegistry};
/// # #[derive(Clone)]
/// # struct Pool;
/// # impl Pool {
/// #     async fn ping(&self) -> Result<(), std::io::Error> { Ok(()) }
/// # }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pool = Pool;
/// let database = Check::required("database", move || {
///     let pool = pool.clone();
///     async move { pool.ping().await }
/// });
/// let health = HealthRegistry::builder()
///     .check(database.interval(Duration::from_secs(10)))
///     .build()?;
/// assert!(!health.readiness().is_ready());
///
/// let running = health.start()?;
/// tokio::time::sleep(Duration::from_millis(1)).await;
/// assert_eq!(health.check("database"), Some(CheckState::Passing));
/// assert!(health.readiness().is_ready());
/// # drop(running);
/// # Ok(())
/// # }
/// ```
#[must_use = "it is run by a registry"]
pub struct Check {
    pub(crate) name: Arc<str>,
    required: bool,
    interval: Duration,
    timeout: Duration,
    ask: Ask,
}

type Ask =
    Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>> + Send + Sync>;

impl Check {
    /// One without which the process is not ready.
    ///
    /// It fails by an error, by taking longer than its
    /// [timeout](Self::timeout), when it is dropped, and by a panic.
    pub fn required<F, E>(
        name: impl Into<Arc<str>>,
        ask: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<BoxError>,
    {
        let ask = Arc::new(ask);
        Self {
            name: name.into(),
            required: true,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(2),
            ask: Box::new(move || {
                let ask = Arc::clone(&ask);
                // Asked when polled, where a panic is caught.
                Box::pin(async move { ask().await.map_err(Into::into) })
            }),
        }
    }

    /// One that is shown and told of, and of which readiness does not depend.
    pub fn optional<F, E>(
        name: impl Into<Arc<str>>,
        ask: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<BoxError>,
    {
        Self {
            required: false,
            ..Self::required(name, ask)
        }
    }

    /// From the start of one run to the start of the next, give or take a
    /// tenth. 1 ms to 1 day. Default 5 s.
    pub const fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// How long a run may take. 1 ms to 1 day. Default 2 s.
    pub const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    pub(crate) fn into_cell(self, registry: &Arc<str>) -> Result<CheckCell, ConfigError> {
        error::name("a check", &self.name)?;
        let day = Duration::from_secs(24 * 3600);
        for (what, span) in [
            ("the interval of a check", self.interval),
            ("the timeout of a check", self.timeout),
        ] {
            if !(Duration::from_millis(1)..=day).contains(&span) {
                return Err(Problem::Span(what).into());
            }
        }
        Ok(CheckCell {
            metrics: CheckMetrics::new(registry, &self.name),
            check: self,
            last: Mutex::new(None),
            turn: tokio::sync::Mutex::new(()),
        })
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Check")
            .field("name", &self.name)
            .field("required", &self.required)
            .field("interval", &self.interval)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// What is known of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckState {
    /// Its last run has found nothing wrong.
    Passing,
    /// Its last run has failed, and how.
    Failing(Failure),
    /// There is no result, or none for three intervals (or timeouts, where
    /// these are longer): it has not run yet, runs no more, or the runtime is
    /// kept busy.
    Unknown,
}

impl CheckState {
    /// In a word for programs: `passing`, `failing`, `unknown`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Passing => "passing",
            Self::Failing(_) => "failing",
            Self::Unknown => "unknown",
        }
    }

    /// Whether its last run, not long ago, has found nothing wrong.
    #[must_use]
    pub const fn is_passing(self) -> bool {
        matches!(self, Self::Passing)
    }
}

/// How a check has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// By its error.
    Error,
    /// It took too long.
    TimedOut,
    /// It panicked.
    Panicked,
}

impl Failure {
    /// In a word for programs: `error`, `timed_out`, `panicked`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::TimedOut => "timed_out",
            Self::Panicked => "panicked",
        }
    }
}

/// What came of one run.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) failure: Option<Failure>,
    /// What the error said.
    pub(crate) error: Option<Arc<str>>,
    pub(crate) at: Instant,
    pub(crate) took: Duration,
}

/// How many intervals a result is good for.
const STALE: u32 = 3;

/// What is known of a check, by the last that came of it.
pub(crate) fn judge(
    last: Option<(Option<Failure>, Instant)>,
    good_for: Duration,
    now: Instant,
) -> CheckState {
    match last {
        Some((_, at)) if now - at > good_for => CheckState::Unknown,
        None => CheckState::Unknown,
        Some((None, _)) => CheckState::Passing,
        Some((Some(failure), _)) => CheckState::Failing(failure),
    }
}

/// A check as a registry has it.
pub(crate) struct CheckCell {
    check: Check,
    last: Mutex<Option<Outcome>>,
    /// Held by the one task that runs it, for as long as there is that task.
    turn: tokio::sync::Mutex<()>,
    pub(crate) metrics: CheckMetrics,
}

impl CheckCell {
    pub(crate) const fn name(&self) -> &Arc<str> {
        &self.check.name
    }

    pub(crate) const fn is_required(&self) -> bool {
        self.check.required
    }

    pub(crate) fn state(&self, now: Instant) -> CheckState {
        let last = self.last.lock();
        let last = last.as_ref().map(|last| (last.failure, last.at));
        judge(last, self.good_for(), now)
    }

    pub(crate) fn last(&self) -> Option<Outcome> {
        self.last.lock().clone()
    }

    pub(crate) fn good_for(&self) -> Duration {
        STALE * self.check.interval.max(self.check.timeout)
    }
}

impl fmt::Debug for CheckCell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.check.fmt(f)
    }
}

/// What `work` gives, unless it panics.
pub(crate) fn unless_panicked<T>(work: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_result_is_good_for_three_intervals() {
        let at = Instant::from_nanos(1_000_000_000_000);
        let judged = |failure, age| judge(Some((failure, at)), 15 * SECOND, at + age);
        assert_eq!(judge(None, 15 * SECOND, at), CheckState::Unknown);
        for (age, known) in [
            (Duration::ZERO, true),
            (15 * SECOND, true),
            (15 * SECOND + Duration::from_nanos(1), false),
        ] {
            let passing = if known {
                CheckState::Passing
            } else {
                CheckState::Unknown
            };
            assert_eq!(judged(None, age), passing);
            let failing = if known {
                CheckState::Failing(Failure::TimedOut)
            } else {
                CheckState::Unknown
            };
            assert_eq!(judged(Some(Failure::TimedOut), age), failing);
        }
    }

    #[test]
    fn of_the_interval_and_the_timeout_the_longer_counts() {
        let cell = |interval, timeout| {
            let check = Check::required("a", async || Ok::<_, BoxError>(()));
            let check = check.interval(interval).timeout(timeout);
            check.into_cell(&"default".into()).unwrap().good_for()
        };
        assert_eq!(cell(5 * SECOND, 2 * SECOND), 15 * SECOND);
        assert_eq!(cell(SECOND, 10 * SECOND), 30 * SECOND);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let built = |name: &str, interval, timeout| {
            let check = Check::optional(name, async || Ok::<_, BoxError>(()));
            let check = check.interval(interval).timeout(timeout);
            check.into_cell(&"default".into()).map(drop)
        };
        assert!(built("a", Duration::from_millis(1), 86_400 * SECOND).is_ok());
        for span in [Duration::ZERO, Duration::from_micros(999), 86_401 * SECOND] {
            let error = built("a", span, SECOND).unwrap_err().to_string();
            assert!(error.contains("interval"), "{error}");
            let error = built("a", SECOND, span).unwrap_err().to_string();
            assert!(error.contains("timeout"), "{error}");
        }
        for name in ["", "caf\u{e9}", "a\nb"] {
            let error = built(name, SECOND, SECOND).unwrap_err().to_string();
            assert!(error.contains("name of a check"), "{error}");
        }
    }

    proptest! {
        /// Against a list of all there ever was: what counts is the last
        /// result, where it is new enough.
        #[test]
        fn only_the_last_result_counts(
            results in proptest::collection::vec((0..100_u64, any::<bool>()), 0..20),
            later in 0..100_u64,
            good_for in 1..50_u64,
        ) {
            let mut now = 0;
            let mut last = None;
            for (wait, fine) in &results {
                now += wait;
                let failure = (!fine).then_some(Failure::Error);
                last = Some((failure, Instant::from_nanos(now)));
            }
            let judged = judge(last, Duration::from_nanos(good_for), Instant::from_nanos(now + later));
            let expected = match results.last() {
                Some((_, true)) if later <= good_for => CheckState::Passing,
                Some((_, false)) if later <= good_for => CheckState::Failing(Failure::Error),
                _ => CheckState::Unknown,
            };
            prop_assert_eq!(judged, expected);
        }
    }
}
