#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod config;
mod error;
mod guard;
mod label;
mod ledger;
mod phase;
mod shutdown;
mod signal;

pub use config::ShutdownBuilder;
pub use error::ConfigError;
pub use guard::{ConnectionGuard, ConnectionState, Guard, ServerGuard};
pub use label::Label;
pub use phase::{Phase, Reached};
pub use shutdown::{Schedule, Shutdown};
pub use signal::DrainSignal;
