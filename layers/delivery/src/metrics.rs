//! The names of what this crate measures, all of them.
//!
//! | metric | kind | labels | shows |
//! | --- | --- | --- | --- |
//! | `webhook_deliveries_total` | counter | `name`, `status` | deliveries that are over: `delivered`, `failed` |
//! | `webhook_attempts_total` | counter | `name`, `outcome` | attempts: `delivered`, `retrying`, `failed` |
//! | `webhook_attempt_duration_seconds` | histogram | `name` | how long they took |
//! | `webhook_queue_depth` | gauge | `name` | deliveries accepted and not over |
//! | `webhook_dead_letters` | gauge | `name` | dead letters that are kept |
//! | `webhook_dead_letters_dropped_total` | counter | `name` | dead letters that gave way to newer ones |
//! | `webhook_refused_total` | counter | `name` | deliveries that a full queue had no room for |
//!
//! `name` is that of the [`Webhooks`](crate::Webhooks). They go to the recorder
//! that is installed when these are built.

#[cfg(feature = "metrics")]
pub(crate) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(crate) use off::Metrics;

#[cfg(feature = "metrics")]
mod on {
    use std::{sync::Arc, time::Duration};

    use metrics::{
        Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge,
        describe_histogram, gauge, histogram,
    };

    use crate::Status;

    const DELIVERIES: &str = "webhook_deliveries_total";
    const ATTEMPTS: &str = "webhook_attempts_total";
    const DURATION: &str = "webhook_attempt_duration_seconds";
    const DEPTH: &str = "webhook_queue_depth";
    const LETTERS: &str = "webhook_dead_letters";
    const DROPPED: &str = "webhook_dead_letters_dropped_total";
    const REFUSED: &str = "webhook_refused_total";

    pub(crate) struct Metrics {
        over: [Counter; 2],
        attempts: [Counter; 3],
        duration: Histogram,
        depth: Gauge,
        letters: Gauge,
        dropped: Counter,
        refused: Counter,
    }

    impl Metrics {
        pub(crate) fn new(name: &Arc<str>) -> Self {
            describe_counter!(DELIVERIES, "Deliveries that are over.");
            describe_counter!(ATTEMPTS, "Attempts to deliver.");
            describe_histogram!(DURATION, Unit::Seconds, "How long an attempt took.");
            describe_gauge!(DEPTH, "Deliveries accepted and not over.");
            describe_gauge!(LETTERS, "Dead letters that are kept.");
            describe_counter!(DROPPED, "Dead letters that gave way to newer ones.");
            describe_counter!(REFUSED, "Deliveries that a full queue had no room for.");
            let over = |status: Status| counter!(DELIVERIES, "name" => Arc::clone(name), "status" => status.as_str());
            let attempts = |outcome: Status| counter!(ATTEMPTS, "name" => Arc::clone(name), "outcome" => outcome.as_str());
            Self {
                over: [Status::Delivered, Status::Failed].map(over),
                attempts: [Status::Delivered, Status::Failed, Status::Retrying].map(attempts),
                duration: histogram!(DURATION, "name" => Arc::clone(name)),
                depth: gauge!(DEPTH, "name" => Arc::clone(name)),
                letters: gauge!(LETTERS, "name" => Arc::clone(name)),
                dropped: counter!(DROPPED, "name" => Arc::clone(name)),
                refused: counter!(REFUSED, "name" => Arc::clone(name)),
            }
        }

        pub(crate) fn over(&self, status: Status) {
            match status {
                Status::Delivered => self.over[0].increment(1),
                Status::Failed => self.over[1].increment(1),
                Status::Pending | Status::Retrying => {}
            }
        }

        pub(crate) fn attempted(&self, outcome: Status, took: Duration) {
            match outcome {
                Status::Delivered => self.attempts[0].increment(1),
                Status::Failed => self.attempts[1].increment(1),
                Status::Pending | Status::Retrying => self.attempts[2].increment(1),
            }
            self.duration.record(took.as_secs_f64());
        }

        /// Deliveries and letters, before and after. By differences: the last of
        /// several threads to say how many there are need not be the last to
        /// have counted.
        pub(crate) fn held(&self, before: (usize, usize), after: (usize, usize)) {
            fn change(gauge: &Gauge, before: usize, after: usize) {
                #[expect(clippy::cast_precision_loss, reason = "no more than some millions")]
                let float = |count: usize| count as f64;
                if before != after {
                    gauge.increment(float(after) - float(before));
                }
            }
            change(&self.depth, before.0, after.0);
            change(&self.letters, before.1, after.1);
        }

        pub(crate) fn dropped(&self, letters: usize) {
            self.dropped.increment(letters as u64);
        }

        pub(crate) fn refused(&self, deliveries: usize) {
            self.refused.increment(deliveries as u64);
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use std::{sync::Arc, time::Duration};

    use crate::Status;

    /// Nothing is shown without the feature `metrics`.
    pub(crate) struct Metrics(());

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl Metrics {
        pub(crate) fn new(_: &Arc<str>) -> Self {
            Self(())
        }

        pub(crate) fn over(&self, _: Status) {}
        pub(crate) fn attempted(&self, _: Status, _: Duration) {}
        pub(crate) fn held(&self, _: (usize, usize), _: (usize, usize)) {}
        pub(crate) fn dropped(&self, _: usize) {}
        pub(crate) fn refused(&self, _: usize) {}
    }
}
