//! The names of what this layer counts, all of them.
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `timeouts_total` | counter | `name` | calls and bodies whose time ran out, and calls whose deadline was past when they came |
//!
//! It goes to the recorder that is installed when the layer is built.

#[cfg(feature = "metrics")]
pub(crate) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(crate) use off::Metrics;

#[cfg(feature = "metrics")]
mod on {
    use std::sync::Arc;

    use metrics::{Counter, counter, describe_counter};

    const TIMEOUTS: &str = "timeouts_total";

    /// Looked up once: a timeout costs one increment.
    pub(crate) struct Metrics {
        timeouts: Counter,
    }

    impl Metrics {
        pub(crate) fn new(name: &Arc<str>) -> Self {
            describe_counter!(TIMEOUTS, "Calls and bodies whose time ran out.");
            Self {
                timeouts: counter!(TIMEOUTS, "name" => Arc::clone(name)),
            }
        }

        pub(crate) fn timed_out(&self) {
            self.timeouts.increment(1);
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    /// Nothing is counted without the feature `metrics`.
    pub(crate) struct Metrics(());

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl Metrics {
        pub(crate) fn new(_: &std::sync::Arc<str>) -> Self {
            Self(())
        }

        #[inline]
        pub(crate) fn timed_out(&self) {}
    }
}
