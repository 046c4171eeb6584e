#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backoff;
mod breaker;
mod cell;
mod error;
mod event;
pub mod metrics;
#[cfg(all(test, not(buttress_loom)))]
mod model_tests;
mod permit;
mod settings;
mod window;
mod word;

pub use backoff::ReopenBackoff;
pub use breaker::{Breaker, BreakerBuilder, Status};
pub use error::{CircuitOpen, ConfigError, Error, TransitionError};
pub use event::{Cause, Event, Reason, Rule, State, Transition};
pub use permit::Permit;
pub use settings::{Settings, Window};
