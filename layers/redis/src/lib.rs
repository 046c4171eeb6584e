#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod config;
mod dial;
mod error;
mod gate;
mod keeper;
mod key;
mod link;
pub mod metrics;
mod nodes;
mod redis;
mod script;
mod subscribe;
#[cfg(feature = "testing")]
pub mod testing;

pub use config::{Config, ConfigError};
pub use error::{Error, ErrorKind};
pub use key::{Key, Keyspace, Slot};
pub use redis::{Dedicated, Redis, Watch};
pub use script::{Call, Script};
pub use subscribe::{Notice, Subscription};

pub use ::redis::{Cmd, FromRedisValue, ToRedisArgs, Value};
