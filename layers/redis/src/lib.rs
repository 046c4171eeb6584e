#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod config;
mod detour;
mod dial;
mod error;
mod gate;
mod keeper;
mod key;
mod link;
mod lock;
pub mod metrics;
mod nodes;
mod redis;
mod script;
mod subscribe;
#[cfg(feature = "testing")]
pub mod testing;
mod value;

pub use config::{Config, ConfigError};
pub use error::{Error, ErrorKind};
pub use key::{Family, Key, Keyspace, Slot};
pub use lock::{FencingToken, Lock, LockBuilder, LockError, Validity};
pub use redis::{Dedicated, Redis, Watch};
pub use script::{Call, Script};
pub use subscribe::{Notice, Subscription};
#[cfg(feature = "json")]
pub use value::JsonError;
pub use value::{Change, Fenced, FencedError, Version, Versioned};

pub use ::redis::{Cmd, FromRedisValue, ToRedisArgs, Value};
