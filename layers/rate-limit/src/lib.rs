#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod config;
mod error;
mod future;
mod gcra;
mod handle;
mod headers;
mod layer;
mod limiter;
pub mod metrics;
mod quota;
#[cfg(feature = "redis")]
pub mod redis;
mod service;
mod store;
#[cfg(feature = "wait")]
mod wait;

pub use config::{InMemory, Limit, MissingKey, RateLimitBuilder, WhenFull};
pub use error::ConfigError;
pub use future::{ErrorFuture, ResponseFuture};
pub use gcra::Gcra;
pub use handle::{Handle, HandleError, LimitHandle, Usage};
pub use headers::HeaderFormat;
pub use layer::{Errors, RateLimitLayer, Respond};
pub use quota::Quota;
pub use service::{RateLimit, RateLimitInfo};
#[cfg(feature = "wait")]
pub use wait::{Wait, WaitFuture, WaitLayer};
