//! The names of what this layer counts, all of them.
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `lock_requests_total` | counter | `name`, `outcome` | requests, by what became of them: `locked`, `busy`, `full`, `missing_key`, `skipped`, `denied`, `allowed` |
//! | `locks_held` | gauge | `name` | locks that requests of this process hold |
//! | `locks_lost_total` | counter | `name` | locks that were lost while their request was served |
//! | `lock_wait_duration_seconds` | histogram | `name` | how long requests took to get a lock, or not, that did not get it at once |
//!
//! `busy`: somebody else holds it; `full`: too many keys are held in this
//! process; `missing_key`: refused for having none; `skipped`: passed without
//! one; `denied` and `allowed`: Redis could not be asked.
//!
//! They go to the recorder that is installed when the layer is built.

#[cfg(feature = "metrics")]
pub(crate) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(crate) use off::Metrics;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(any(feature = "metrics", feature = "redis")),
    expect(dead_code, reason = "two are of Redis")
)]
pub(crate) enum Outcome {
    Locked,
    Busy,
    Full,
    MissingKey,
    Skipped,
    Denied,
    Allowed,
}

impl Outcome {
    #[cfg(feature = "metrics")]
    const ALL: [Self; 7] = [
        Self::Locked,
        Self::Busy,
        Self::Full,
        Self::MissingKey,
        Self::Skipped,
        Self::Denied,
        Self::Allowed,
    ];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Locked => "locked",
            Self::Busy => "busy",
            Self::Full => "full",
            Self::MissingKey => "missing_key",
            Self::Skipped => "skipped",
            Self::Denied => "denied",
            Self::Allowed => "allowed",
        }
    }
}

#[cfg(feature = "metrics")]
mod on {
    use std::{sync::Arc, time::Duration};

    use metrics::{
        Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge,
        describe_histogram, gauge, histogram,
    };

    use super::Outcome;

    const REQUESTS: &str = "lock_requests_total";
    const HELD: &str = "locks_held";
    const LOST: &str = "locks_lost_total";
    const WAIT: &str = "lock_wait_duration_seconds";

    /// Looked up once: a request costs three increments.
    pub(crate) struct Metrics {
        requests: [Counter; Outcome::ALL.len()],
        held: Gauge,
        lost: Counter,
        wait: Histogram,
    }

    impl Metrics {
        pub(crate) fn new(name: &Arc<str>) -> Self {
            describe_counter!(REQUESTS, "Requests that asked for a lock.");
            describe_gauge!(HELD, "Locks that requests of this process hold.");
            describe_counter!(LOST, "Locks lost while their request was served.");
            describe_histogram!(
                WAIT,
                Unit::Seconds,
                "How long requests took to get a lock, or not, that did not get it at once."
            );
            let name = || Arc::clone(name);
            let held = gauge!(HELD, "name" => name());
            held.set(0.0);
            Self {
                requests: Outcome::ALL.map(
                    |outcome| counter!(REQUESTS, "name" => name(), "outcome" => outcome.as_str()),
                ),
                held,
                lost: counter!(LOST, "name" => name()),
                wait: histogram!(WAIT, "name" => name()),
            }
        }

        pub(crate) fn request(&self, outcome: Outcome) {
            self.requests[outcome as usize].increment(1);
        }

        pub(crate) fn took(&self) {
            self.held.increment(1.0);
        }

        pub(crate) fn gave_back(&self) {
            self.held.decrement(1.0);
        }

        #[cfg_attr(not(feature = "redis"), expect(dead_code, reason = "of Redis"))]
        pub(crate) fn lost(&self) {
            self.lost.increment(1);
        }

        pub(crate) fn waited(&self, span: Duration) {
            self.wait.record(span.as_secs_f64());
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use std::{sync::Arc, time::Duration};

    use super::Outcome;

    /// Nothing is counted without the feature `metrics`.
    pub(crate) struct Metrics(());

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl Metrics {
        pub(crate) fn new(_: &Arc<str>) -> Self {
            Self(())
        }

        #[inline]
        pub(crate) fn request(&self, _: Outcome) {}

        #[inline]
        pub(crate) fn took(&self) {}

        #[inline]
        pub(crate) fn gave_back(&self) {}

        #[inline]
        #[cfg_attr(not(feature = "redis"), expect(dead_code, reason = "of Redis"))]
        pub(crate) fn lost(&self) {}

        #[inline]
        pub(crate) fn waited(&self, _: Duration) {}
    }
}
