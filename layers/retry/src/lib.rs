#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backoff;
mod budget;
mod call;
mod config;
mod error;
mod event;
mod future;
pub mod hedge;
#[cfg(feature = "hyper")]
mod hyper_errors;
mod layer;
pub mod metrics;
mod peek;
mod policy;
mod replay;
mod rules;
mod run;
mod service;
mod session;
mod settings;

pub use backoff::{Backoff, Delays, Jitter};
pub use budget::{Adaptive, Budget, RetryBudget, SharedBudget, Throttle};
#[cfg(feature = "redis")]
pub use budget::{FleetBudget, OnStoreError};
pub use buttress_core::classify::Trailers;
pub use call::{Again, AnyCall, AnyError, Boxed, Call, HttpCall, Looks, Opaque, Plain, RetryIf};
pub use config::{RetryBuilder, Web};
pub use error::{ConfigError, Elapsed, Error};
pub use event::{Cause, GiveUp};
pub use future::ResponseFuture;
pub use hedge::{Hedge, HedgeBuilder, HedgeLayer, HedgePolicy};
pub use layer::{Errors, Respond, RetryLayer};
pub use peek::{Peek, PeekBody, PeekFuture, PeekLayer};
pub use policy::{PolicyBuilder, RetryPolicy};
pub use replay::{Memory, NotReplayable, ReplayBody};
pub use rules::Outcome;
pub use run::{AbortHandle, AllErrors, JudgeError, Never, RetryError, Runner};
pub use service::Retry;
pub use settings::Settings;
