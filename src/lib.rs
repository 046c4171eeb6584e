// The front page's examples need these; without them it would not compile.
#![cfg_attr(
    all(feature = "circuit-breaker", feature = "wait", feature = "axum"),
    doc = include_str!("../README.md")
)]
#![cfg_attr(
    not(all(feature = "circuit-breaker", feature = "wait", feature = "axum")),
    doc = "Tower layers for services that must stay up. The front page is shown with all features."
)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "tower")]
mod ext;

/// Circuit breaking: the crate `buttress-circuit-breaker`.
#[cfg(feature = "circuit-breaker")]
pub use buttress_circuit_breaker as circuit_breaker;

/// Webhook delivery: the crate `buttress-delivery`.
#[cfg(feature = "delivery")]
pub use buttress_delivery as delivery;

/// Graceful shutdown: the crate `buttress-drain`.
#[cfg(feature = "drain")]
pub use buttress_drain as drain;

/// Who is ready and how well: what layers tell of themselves, and, with the
/// feature `health`, the endpoints and checks of the crate `buttress-health`.
#[cfg(not(feature = "health"))]
pub use buttress_core::health;

/// Health endpoints, background checks and a score, and what layers tell of
/// themselves: the crate `buttress-health`.
#[cfg(feature = "health")]
pub use buttress_health as health;

/// One request a key at a time: the crate `buttress-lock`.
#[cfg(feature = "lock")]
pub use buttress_lock as lock;

/// GCRA rate limiting with `X-RateLimit` headers: the crate
/// `buttress-rate-limit`.
#[cfg(feature = "rate-limit")]
pub use buttress_rate_limit as rate_limit;

/// Redis for services that must stay up: the crate `buttress-redis`.
#[cfg(feature = "redis")]
pub use buttress_redis as redis;

/// Retries with jittered backoff and replayed bodies: the crate
/// `buttress-retry`.
#[cfg(feature = "retry")]
pub use buttress_retry as retry;

/// Time limits of calls and of their bodies: the crate `buttress-timeout`.
#[cfg(feature = "timeout")]
pub use buttress_timeout as timeout;

/// Signing and verifying requests: the crate `buttress-webhook`.
#[cfg(feature = "webhook")]
pub use buttress_webhook as webhook;

#[cfg(feature = "tower")]
pub use buttress_core::tower_errors;
pub use buttress_core::{
    Any, BoxError, Head, Http, Inspect, ProblemResponder, Refusal, RefusalKind, Responder, Sees,
    View, body, classify, clock, deadline, key, keyed, random, refusal, request, respond,
    retry_after,
};
#[cfg(feature = "tower")]
pub use ext::ServiceBuilderExt;

/// What you need to unit-test your stacks: `buttress_core::testing`, and a
/// guide.
///
#[cfg_attr(
    all(feature = "rate-limit", feature = "circuit-breaker"),
    doc = include_str!("testing_guide.md")
)]
#[cfg(feature = "testing")]
pub mod testing {
    pub use buttress_core::testing::*;
}
