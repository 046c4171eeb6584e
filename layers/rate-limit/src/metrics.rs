//! The names of what this layer counts, all of them.
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `rate_limit_requests_total` | counter | `name`, `result`: `allowed`, `refused`, `shadowed`, `bypassed` | requests seen |
//! | `rate_limit_refusals_total` | counter | `name`, `limit`, `reason`: `rate_limited`, `never_fits`, `overloaded`, `missing_key`, `store_unavailable` | refusals (in shadow mode: what they would have been), by the limit that refused |
//! | `rate_limit_evictions_total` | counter | `name`, `limit` | keys forgotten in debt because `max_keys` was reached |
//! | `rate_limit_keys` | gauge | `name`, `limit` | keys remembered, set when one is added |
//! | `rate_limit_without_store_total` | counter | `name`, `mode`: `local`, `allow`, `deny` | requests for which Redis could not be asked, by what was done instead |
//!
//! They go to the recorder that is installed when the layer sees its first
//! request.

use buttress_core::RefusalKind;

#[cfg(feature = "metrics")]
pub(crate) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(crate) use off::Metrics;

/// Why a request was refused, as the label says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    RateLimited,
    NeverFits,
    Overloaded,
    MissingKey,
    #[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "no store can fail"))]
    StoreUnavailable,
}

impl Reason {
    #[cfg(feature = "metrics")]
    const ALL: [Self; 5] = [
        Self::RateLimited,
        Self::NeverFits,
        Self::Overloaded,
        Self::MissingKey,
        Self::StoreUnavailable,
    ];

    /// The `reason` of the refusal.
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::RateLimited => RefusalKind::RateLimited.reason(),
            Self::NeverFits => RefusalKind::NeverFits.reason(),
            Self::Overloaded => RefusalKind::Overloaded.reason(),
            Self::MissingKey => "missing_key",
            Self::StoreUnavailable => RefusalKind::StoreUnavailable.reason(),
        }
    }
}

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

    use super::{Reason, Result};
    use crate::store::Table;

    const REQUESTS: &str = "rate_limit_requests_total";
    const REFUSALS: &str = "rate_limit_refusals_total";
    const EVICTIONS: &str = "rate_limit_evictions_total";
    const KEYS: &str = "rate_limit_keys";
    #[cfg(feature = "redis")]
    const WITHOUT: &str = "rate_limit_without_store_total";

    /// Looked up once: an event costs one increment.
    #[derive(Default)]
    pub(crate) struct Metrics {
        handles: OnceLock<Handles>,
        #[cfg(feature = "redis")]
        without: OnceLock<[Counter; 3]>,
    }

    struct Handles {
        requests: [Counter; 4],
        limits: Box<[Limit]>,
    }

    struct Limit {
        refusals: [Counter; 5],
        evictions: Counter,
        keys: Gauge,
    }

    impl Limit {
        fn new(name: &str, table: &Table) -> Self {
            let labels = [
                ("name", name.to_owned()),
                ("limit", table.name.clone().into_owned()),
            ];
            let [name, limit] = labels.clone();
            Self {
                refusals: Reason::ALL.map(|reason| {
                    let reason = ("reason", reason.label().to_owned());
                    counter!(REFUSALS, &[name.clone(), limit.clone(), reason])
                }),
                evictions: counter!(EVICTIONS, &labels),
                keys: gauge!(KEYS, &labels),
            }
        }
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
                    limits: tables.iter().map(|table| Limit::new(name, table)).collect(),
                }
            })
        }

        #[inline]
        pub(crate) fn request(&self, name: &str, tables: &[Table], result: Result) {
            self.handles(name, tables).requests[result as usize].increment(1);
        }

        pub(crate) fn refusal(&self, name: &str, tables: &[Table], limit: usize, reason: Reason) {
            self.handles(name, tables).limits[limit].refusals[reason as usize].increment(1);
        }

        #[cfg(feature = "redis")]
        pub(crate) fn without_store(&self, name: &str, mode: crate::redis::OnStoreError) {
            use crate::redis::OnStoreError;

            let without = self.without.get_or_init(|| {
                describe_counter!(WITHOUT, "Requests for which Redis could not be asked.");
                OnStoreError::ALL.map(
                    |mode| counter!(WITHOUT, "name" => name.to_owned(), "mode" => mode.label()),
                )
            });
            without[mode as usize].increment(1);
        }

        pub(crate) fn evicted(&self, name: &str, tables: &[Table], limit: usize, keys: u64) {
            self.handles(name, tables).limits[limit]
                .evictions
                .increment(keys);
        }

        #[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
        pub(crate) fn keys(&self, name: &str, tables: &[Table], limit: usize) {
            let keys = tables[limit].map().len();
            self.handles(name, tables).limits[limit]
                .keys
                .set(keys as f64);
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use super::{Reason, Result};
    use crate::store::Table;

    /// Nothing is counted without the feature `metrics`.
    #[derive(Default)]
    pub(crate) struct Metrics(());

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl Metrics {
        #[inline]
        pub(crate) fn request(&self, _: &str, _: &[Table], _: Result) {}
        #[inline]
        pub(crate) fn refusal(&self, _: &str, _: &[Table], _: usize, _: Reason) {}
        #[cfg(feature = "redis")]
        pub(crate) fn without_store(&self, _: &str, _: crate::redis::OnStoreError) {}
        #[inline]
        pub(crate) fn evicted(&self, _: &str, _: &[Table], _: usize, _: u64) {}
        #[inline]
        pub(crate) fn keys(&self, _: &str, _: &[Table], _: usize) {}
    }
}
