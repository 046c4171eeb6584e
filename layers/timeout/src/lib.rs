#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod body;
mod config;
mod error;
mod future;
mod handle;
mod layer;
pub mod metrics;
mod service;
mod shared;
mod timer;
mod wire;

pub use body::TimedBody;
pub use config::TimeoutBuilder;
pub use error::{ConfigError, Elapsed, Error};
pub use future::{ErrorFuture, ResponseFuture};
pub use handle::Handle;
pub use layer::{Errors, Extent, Respond, TimeoutLayer, ToEnd, ToHead};
pub use service::Timeout;
