#![doc = include_str!("../README.md")]

mod error;
mod gcra;
mod quota;

pub use error::ConfigError;
pub use gcra::Gcra;
pub use quota::Quota;
