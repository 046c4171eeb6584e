#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod cause;
#[cfg(feature = "client")]
pub mod client;
mod config;
mod error;
mod event;
pub mod guard;
mod map;
pub mod metrics;
mod outcome;
mod pattern;
mod registration;
mod result;
mod state;
mod store;
mod transport;
mod webhooks;
mod worker;

pub use cause::Cause;
pub use config::WebhooksBuilder;
pub use error::{ConfigError, EmitError, RedriveError, RegisterError, StartError};
pub use event::{Event, Message};
pub use registration::{Registration, RegistrationId, RegistrationInfo, Scope, Selector};
pub use result::{DeliveryResult, Status, Subscriber, Update};
pub use store::{DeadLetter, DeliveryId, DeliveryStore, Kept, MemoryStore, Record, StoreFuture};
pub use webhooks::{QueueStatus, Redriven, Webhooks};
pub use worker::{Stopped, Worker};
