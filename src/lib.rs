#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod ext;

/// GCRA rate limiting with `X-RateLimit` headers: the crate
/// `buttress-rate-limit`.
#[cfg(feature = "rate-limit")]
pub use buttress_rate_limit as rate_limit;

#[cfg(feature = "testing")]
pub use buttress_core::testing;
#[cfg(feature = "tower")]
pub use buttress_core::tower_errors;
pub use buttress_core::{
    Any, BoxError, Head, Http, ProblemResponder, Refusal, RefusalKind, Responder, Sees, View, body,
    classify, clock, deadline, health, key, keyed, refusal, request, respond,
};
pub use ext::ServiceBuilderExt;
