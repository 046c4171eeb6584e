#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
#[allow(dead_code)]
mod replay;

pub use error::ConfigError;
pub use replay::{Memory, NotReplayable, ReplayBody};
