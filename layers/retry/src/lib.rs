#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backoff;
mod error;

pub use backoff::{Backoff, Delays, Jitter};
pub use error::ConfigError;
