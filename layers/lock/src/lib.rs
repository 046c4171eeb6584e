#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod body;
mod config;
mod error;
mod fence;
mod future;
mod handle;
mod layer;
mod lease;
pub mod metrics;
mod policy;
mod service;
mod shared;
mod store;

pub use body::{CutBody, LockedBody};
pub use config::LockBuilder;
pub use error::{ConfigError, Error};
pub use fence::Fence;
pub use future::{ErrorFuture, ResponseFuture};
pub use handle::Handle;
pub use layer::{Call, Cut, Errors, Extent, Keep, LockLayer, Respond};
#[cfg(feature = "redis")]
pub use policy::OnStoreError;
pub use policy::{MissingKey, Reaches, Target};
pub use service::Lock;
