#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backoff;
mod budget;
mod error;

pub use backoff::{Backoff, Delays, Jitter};
pub use budget::{Adaptive, Budget, RetryBudget, SharedBudget, Throttle};
pub use error::ConfigError;
