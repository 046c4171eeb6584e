#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod body;
pub mod classify;
pub mod clock;
pub mod deadline;
pub mod health;
pub mod key;
pub mod keyed;
pub mod label;
pub mod random;
pub mod refusal;
pub mod request;
pub mod respond;
pub mod retry_after;
pub mod sync;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "tower")]
pub mod tower_errors;

pub use refusal::{Inspect, Refusal, RefusalKind};
pub use request::{Any, Head, Http, Sees, View};
pub use respond::{ProblemResponder, Responder};

/// The error type of a service that any error may leave.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
