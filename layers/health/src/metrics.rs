//! The names of what this crate measures, all of them.
//!
//! | metric | kind | labels | shows |
//! | --- | --- | --- | --- |
//! | `health_ready` | gauge | `name` | 1 where the process is ready, 0 where it is not |
//! | `health_score` | gauge | `name` | the score, 0.0 to 1.0, at the last evaluation |
//! | `health_check_up` | gauge | `name`, `check` | 1 where the check passes, 0 where it fails or nothing is known of it |
//! | `health_check_duration_seconds` | histogram | `name`, `check` | how long its runs took |
//! | `health_notices_missed_total` | counter | `name` | notices that a listener was too slow for |
//!
//! `name` is the registry's. They are shown while its background tasks run, and
//! go to the recorder that is installed when it is built.

#[cfg(feature = "metrics")]
pub(crate) use on::{CheckMetrics, Metrics};

#[cfg(not(feature = "metrics"))]
pub(crate) use off::{CheckMetrics, Metrics};

#[cfg(feature = "metrics")]
mod on {
    use std::{sync::Arc, time::Duration};

    use metrics::{
        Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge,
        describe_histogram, gauge, histogram,
    };

    const READY: &str = "health_ready";
    const SCORE: &str = "health_score";
    const CHECK_UP: &str = "health_check_up";
    const CHECK_DURATION: &str = "health_check_duration_seconds";
    const MISSED: &str = "health_notices_missed_total";

    pub(crate) struct Metrics {
        ready: Gauge,
        score: Gauge,
        missed: Counter,
    }

    impl Metrics {
        pub(crate) fn new(name: &Arc<str>) -> Self {
            describe_gauge!(READY, "1 ready for requests, 0 not.");
            describe_gauge!(SCORE, "How well all is doing, from 0 to 1.");
            describe_counter!(MISSED, "Notices that a listener was too slow for.");
            Self {
                ready: gauge!(READY, "name" => Arc::clone(name)),
                score: gauge!(SCORE, "name" => Arc::clone(name)),
                missed: counter!(MISSED, "name" => Arc::clone(name)),
            }
        }

        pub(crate) fn ready(&self, ready: bool) {
            self.ready.set(f64::from(u8::from(ready)));
        }

        pub(crate) fn score(&self, score: f64) {
            self.score.set(score);
        }

        pub(crate) fn missed(&self, more: u64) {
            self.missed.increment(more);
        }
    }

    pub(crate) struct CheckMetrics {
        up: Gauge,
        duration: Histogram,
    }

    impl CheckMetrics {
        pub(crate) fn new(name: &Arc<str>, check: &Arc<str>) -> Self {
            describe_gauge!(CHECK_UP, "1 the check passes, 0 it does not.");
            describe_histogram!(CHECK_DURATION, Unit::Seconds, "How long a check took.");
            let up = gauge!(CHECK_UP, "name" => Arc::clone(name), "check" => Arc::clone(check));
            let duration = histogram!(CHECK_DURATION, "name" => Arc::clone(name), "check" => Arc::clone(check));
            Self { up, duration }
        }

        pub(crate) fn ran(&self, took: Duration) {
            self.duration.record(took.as_secs_f64());
        }

        pub(crate) fn up(&self, up: bool) {
            self.up.set(f64::from(u8::from(up)));
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use std::{sync::Arc, time::Duration};

    /// Nothing is shown without the feature `metrics`.
    pub(crate) struct Metrics(());

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl Metrics {
        pub(crate) fn new(_: &Arc<str>) -> Self {
            Self(())
        }

        pub(crate) fn ready(&self, _: bool) {}
        pub(crate) fn score(&self, _: f64) {}
        pub(crate) fn missed(&self, _: u64) {}
    }

    pub(crate) struct CheckMetrics(());

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl CheckMetrics {
        pub(crate) fn new(_: &Arc<str>, _: &Arc<str>) -> Self {
            Self(())
        }

        pub(crate) fn ran(&self, _: Duration) {}
        pub(crate) fn up(&self, _: bool) {}
    }
}
