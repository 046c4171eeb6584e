//! The server's side: collects, verifies, claims, and hands on.

mod claim;
mod config;
mod error;
mod future;
mod handle;
mod layer;
mod lookup;
mod metrics;
mod replay;
mod service;
mod shared;

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
