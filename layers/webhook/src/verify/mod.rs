//! Verifying what a server is sent: the [`VerifyLayer`], which collects,
//! verifies, claims, and hands on. The [crate's front page](crate) shows it at
//! work.

mod claim;
mod config;
mod error;
mod future;
mod handle;
mod layer;
mod lookup;
pub mod metrics;
mod replay;
mod service;
mod shared;

#[cfg(feature = "redis")]
pub use self::replay::RedisReplays;
pub use self::{
    claim::{Settle, VerifyBody},
    config::VerifyBuilder,
    error::VerifyConfigError,
    future::VerifyFuture,
    handle::VerifyHandle,
    layer::VerifyLayer,
    lookup::{Lookup, LookupFn, lookup_fn},
    replay::{Claim, ClaimKey, ClaimToken, OnStoreError, Repeat, ReplayStore, StoreFuture},
    service::Verify,
};
