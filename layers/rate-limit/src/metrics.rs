//! The names of what this layer counts, all of them.
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `rate_limit_requests_total` | counter | `name`, `result`: `allowed`, `refused`, `shadowed`, `bypassed` | requests seen |
//! | `rate_limit_refusals_total` | counter | `name`, `limit`, `reason`: `rate_limited`, `never_fits`, `overloaded` | refusals (in shadow mode: what they would have been), by the limit that refused |
//! | `rate_limit_evictions_total` | counter | `name`, `limit` | keys forgotten in debt because `max_keys` was reached |
//! | `rate_limit_keys` | gauge | `name`, `limit` | keys remembered, set when one is added |
//!
//! They go to the recorder that is installed when the layer sees its first
//! request.

#[cfg(feature = "metrics")]
pub(crate) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(crate) use off::Metrics;

/// How a request went, as the label says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Result {
    Allowed,
    Refused,
    Shadowed,
    Bypassed,
}

#[cfg(feature = "metrics")]
mod on {
    use std::sync::OnceLock;

    use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};

    use super::Result;
    use crate::store::Table;

    const REQUESTS: &str = "rate_limit_requests_total";
    const REFUSALS: &str = "rate_limit_refusals_total";
    const EVICTIONS: &str = "rate_limit_evictions_total";
    const KEYS: &str = "rate_limit_keys";

    /// Looked up once: an event costs one increment.
    #[derive(Default)]
    pub(crate) struct Metrics {
        handles: OnceLock<Handles>,
    }

    struct Handles {
        requests: [Counter; 4],
        limits: Box<[(Counter, Gauge)]>,
    }

    impl Metrics {
        fn handles(&self, name: &str, tables: &[Table]) -> &Handles {
            self.handles.get_or_init(|| {
                describe_counter!(REQUESTS, "Requests that the rate limiter has seen.");
                describe_counter!(REFUSALS, "Requests refused, by the limit that refused them.");
                describe_counter!(EVICTIONS, "Keys forgotten in debt for want of room.");
                describe_gauge!(KEYS, "Keys remembered.");
                let requests = |result: &'static str| {
                    counter!(REQUESTS, "name" => name.to_owned(), "result" => result)
                };
                Handles {
                    requests: [
                        requests("allowed"),
                        requests("refused"),
                        requests("shadowed"),
                        requests("bypassed"),
                    ],
                    limits: tables
                        .iter()
                        .map(|table| {
                            let labels = [
                                ("name", name.to_owned()),
                                ("limit", table.name.clone().into_owned()),
                            ];
                            (counter!(EVICTIONS, &labels), gauge!(KEYS, &labels))
                        })
                        .collect(),
                }
            })
        }

        #[inline]
        pub(crate) fn request(&self, name: &str, tables: &[Table], result: Result) {
            self.handles(name, tables).requests[result as usize].increment(1);
        }

        pub(crate) fn refusal(&self, name: &str, table: &Table, reason: &'static str) {
            let (name, limit) = (name.to_owned(), table.name.clone().into_owned());
            counter!(REFUSALS, "name" => name, "limit" => limit, "reason" => reason).increment(1);
        }

        pub(crate) fn evicted(&self, name: &str, tables: &[Table], limit: usize) {
            self.handles(name, tables).limits[limit].0.increment(1);
        }

        #[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
        pub(crate) fn keys(&self, name: &str, tables: &[Table], limit: usize) {
            let keys = tables[limit].map().len();
            self.handles(name, tables).limits[limit].1.set(keys as f64);
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use super::Result;
    use crate::store::Table;

    /// Nothing is counted without the feature `metrics`.
    #[derive(Default)]
    pub(crate) struct Metrics(());

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl Metrics {
        #[inline]
        pub(crate) fn request(&self, _: &str, _: &[Table], _: Result) {}
        #[inline]
        pub(crate) fn refusal(&self, _: &str, _: &Table, _: &'static str) {}
        #[inline]
        pub(crate) fn evicted(&self, _: &str, _: &[Table], _: usize) {}
        #[inline]
        pub(crate) fn keys(&self, _: &str, _: &[Table], _: usize) {}
    }
}
