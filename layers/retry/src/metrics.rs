//! The names of what this layer counts, all of them.
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `retry_attempts_total` | counter | `name`, `result`: `success`, `failure` | attempts that have ended, the first ones too; `failure` where another would have been worth it |
//! | `retry_attempts_count` | histogram | `name` | attempts of a request, when it has ended |
//! | `retry_give_ups_total` | counter | `name`, `reason`: `attempts`, `deadline`, `budget`, `pushback`, `unsafe`, `body`, `refused`, `aborted` | requests that ended though another attempt would have been worth it |
//!
//! An attempt that is given up on with its request is in none of them. They go
//! to the recorder that is installed when the policy or the layer is built.

/// How an attempt ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Result {
    Success,
    Failure,
}

#[cfg(feature = "metrics")]
pub(crate) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(crate) use off::Metrics;

#[cfg(feature = "metrics")]
mod on {
    use std::sync::Arc;

    use metrics::{Counter, Histogram, counter, describe_counter, describe_histogram, histogram};

    use crate::GiveUp;

    const ATTEMPTS: &str = "retry_attempts_total";
    const COUNT: &str = "retry_attempts_count";
    const GIVE_UPS: &str = "retry_give_ups_total";

    /// Looked up once: an attempt costs one increment.
    pub(crate) struct Metrics {
        success: Counter,
        failure: Counter,
        count: Histogram,
        give_ups: [Counter; GiveUp::ALL.len()],
    }

    impl Metrics {
        pub(crate) fn new(name: &Arc<str>) -> Self {
            describe_counter!(ATTEMPTS, "Attempts that have ended.");
            describe_histogram!(COUNT, "Attempts of a request.");
            describe_counter!(GIVE_UPS, "Requests that ended in want of another attempt.");
            let attempts =
                |result| counter!(ATTEMPTS, "name" => name.to_string(), "result" => result);
            Self {
                success: attempts("success"),
                failure: attempts("failure"),
                count: histogram!(COUNT, "name" => name.to_string()),
                give_ups: GiveUp::ALL.map(|reason| {
                    counter!(GIVE_UPS, "name" => name.to_string(), "reason" => reason.as_str())
                }),
            }
        }

        pub(crate) fn attempt(&self, result: super::Result) {
            match result {
                super::Result::Success => self.success.increment(1),
                super::Result::Failure => self.failure.increment(1),
            }
        }

        pub(crate) fn request(&self, attempts: u32) {
            self.count.record(f64::from(attempts));
        }

        pub(crate) fn gave_up(&self, reason: GiveUp) {
            self.give_ups[reason as usize].increment(1);
        }
    }
}

#[cfg(not(feature = "metrics"))]
#[expect(clippy::unused_self, reason = "the same shape as with the feature")]
mod off {
    use std::sync::Arc;

    use crate::GiveUp;

    pub(crate) struct Metrics;

    impl Metrics {
        pub(crate) fn new(_: &Arc<str>) -> Self {
            Self
        }

        #[inline]
        pub(crate) fn attempt(&self, _: super::Result) {}

        #[inline]
        pub(crate) fn request(&self, _: u32) {}

        #[inline]
        pub(crate) fn gave_up(&self, _: GiveUp) {}
    }
}
