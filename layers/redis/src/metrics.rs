//! The names of what is counted here, all of them.
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `redis_operation_duration_seconds` | histogram | `operation` | how long operations took that were tried |
//! | `redis_errors_total` | counter | `type` | operations and connections that failed, by [`ErrorKind::label`](crate::ErrorKind::label) |
//! | `redis_connected` | gauge | | 1 while there is a connection that a write has gone through, else 0; the sum, where a process has several [`Redis`](crate::Redis) that are no clones of each other |
//!
//! They go to the recorder that is installed when the handle is made.

#[cfg(feature = "metrics")]
pub(crate) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(crate) use off::Metrics;

#[cfg(feature = "metrics")]
mod on {
    use std::collections::HashMap;

    use buttress_core::{
        clock::{self, Instant},
        sync::{
            Mutex,
            atomic::{AtomicBool, Ordering},
        },
    };
    use metrics::{
        Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge,
        describe_histogram, gauge, histogram,
    };

    use crate::{Error, ErrorKind};

    const DURATION: &str = "redis_operation_duration_seconds";
    const ERRORS: &str = "redis_errors_total";
    const CONNECTED: &str = "redis_connected";

    const KINDS: [ErrorKind; 7] = [
        ErrorKind::Gone,
        ErrorKind::Timeout,
        ErrorKind::Connection,
        ErrorKind::Unable,
        ErrorKind::Denied,
        ErrorKind::Refused,
        ErrorKind::Answer,
    ];

    pub(crate) struct Metrics {
        errors: [Counter; KINDS.len()],
        connected: Gauge,
        is_connected: AtomicBool,
        /// By the operation's name: a few, each looked up once.
        durations: Mutex<HashMap<&'static str, Histogram>>,
    }

    impl Metrics {
        pub(crate) fn new() -> Self {
            describe_histogram!(
                DURATION,
                Unit::Seconds,
                "How long operations on Redis took that were tried."
            );
            describe_counter!(
                ERRORS,
                "Operations on Redis, and connections to it, that failed."
            );
            describe_gauge!(
                CONNECTED,
                "Whether there is a connection to Redis that works."
            );
            let connected = gauge!(CONNECTED);
            // It is there before the first connection.
            connected.increment(0.0);
            Self {
                errors: KINDS.map(|kind| counter!(ERRORS, "type" => kind.label())),
                connected,
                is_connected: AtomicBool::new(false),
                durations: Mutex::default(),
            }
        }

        pub(crate) fn begin(&self) -> Instant {
            clock::now()
        }

        pub(crate) fn ended(&self, operation: &'static str, began: Instant) {
            let took = clock::now() - began;
            let histogram = self
                .durations
                .lock()
                .entry(operation)
                .or_insert_with(|| histogram!(DURATION, "operation" => operation))
                .clone();
            histogram.record(took.as_secs_f64());
        }

        pub(crate) fn failed(&self, error: &Error) {
            let index = KINDS.iter().position(|&kind| kind == error.kind());
            self.errors[index.expect("all are there")].increment(1);
        }

        pub(crate) fn connected(&self, connected: bool) {
            // Added to and taken from, so that several handles do not tell
            // each other's tale.
            match (
                self.is_connected.swap(connected, Ordering::Relaxed),
                connected,
            ) {
                (false, true) => self.connected.increment(1.0),
                (true, false) => self.connected.decrement(1.0),
                _ => {}
            }
        }
    }

    impl Drop for Metrics {
        fn drop(&mut self) {
            self.connected(false);
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use crate::Error;

    /// Nothing is counted without the feature `metrics`.
    pub(crate) struct Metrics(());

    /// No clock is read.
    pub(crate) struct Timer;

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl Metrics {
        pub(crate) fn new() -> Self {
            Self(())
        }

        pub(crate) fn begin(&self) -> Timer {
            Timer
        }

        pub(crate) fn ended(&self, _: &'static str, _: Timer) {}

        pub(crate) fn failed(&self, _: &Error) {}

        pub(crate) fn connected(&self, _: bool) {}
    }
}
