#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod body;
mod books;
mod config;
mod error;
mod future;
mod guard;
mod hook;
#[cfg(any(unix, windows))]
mod interrupt;
mod label;
mod layer;
mod ledger;
pub mod metrics;
mod permit;
mod phase;
mod refuse;
mod report;
mod run;
mod service;
mod shutdown;
mod signal;
mod stripe;
mod tracked;
mod watchdog;

pub use body::DrainBody;
pub use config::ShutdownBuilder;
pub use error::ConfigError;
pub use future::ResponseFuture;
pub use guard::{ConnectionGuard, ConnectionState, Guard, ServerGuard};
pub use hook::{Hook, HookOutput, Priority};
pub use label::Label;
pub use layer::DrainLayer;
pub use phase::{Phase, Reached};
pub use refuse::{Refuse, RefuseFuture, RefuseLayer};
pub use report::{Cut, CutKind, Failure, HookOutcome, HookReport, Report};
pub use service::Drain;
pub use shutdown::{Schedule, Shutdown};
pub use signal::DrainSignal;
