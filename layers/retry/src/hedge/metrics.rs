//! The names of what hedging counts.
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `hedge_attempts_total` | counter | `name`, `result`: `won`, `lost`, `refused` | hedges: whose good answer was handed on; that were dropped for another's, or whose own was bad; that the budget did not allow |
//!
//! A hedge that is dropped with its request is in none of them. They go to the
//! recorder that is installed when the layer is built.

/// What became of a hedge.
#[derive(Clone, Copy, Debug)]
pub(super) enum Result {
    Won,
    Lost,
    Refused,
}

#[cfg(feature = "metrics")]
pub(super) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(super) use off::Metrics;

#[cfg(feature = "metrics")]
mod on {
    use std::sync::Arc;

    use metrics::{Counter, counter, describe_counter};

    const ATTEMPTS: &str = "hedge_attempts_total";

    /// Looked up once: a hedge costs one increment.
    pub(in super::super) struct Metrics {
        won: Counter,
        lost: Counter,
        refused: Counter,
    }

    impl Metrics {
        pub(in super::super) fn new(name: &Arc<str>) -> Self {
            describe_counter!(ATTEMPTS, "Hedges, by what became of them.");
            let attempts =
                |result| counter!(ATTEMPTS, "name" => name.to_string(), "result" => result);
            Self {
                won: attempts("won"),
                lost: attempts("lost"),
                refused: attempts("refused"),
            }
        }

        pub(in super::super) fn hedges(&self, result: super::Result, count: u64) {
            let counter = match result {
                super::Result::Won => &self.won,
                super::Result::Lost => &self.lost,
                super::Result::Refused => &self.refused,
            };
            counter.increment(count);
        }
    }
}

#[cfg(not(feature = "metrics"))]
#[expect(clippy::unused_self, reason = "the same shape as with the feature")]
mod off {
    use std::sync::Arc;

    pub(in super::super) struct Metrics;

    impl Metrics {
        pub(in super::super) fn new(_: &Arc<str>) -> Self {
            Self
        }

        #[inline]
        pub(in super::super) fn hedges(&self, _: super::Result, _: u64) {}
    }
}
