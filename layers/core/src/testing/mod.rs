#![doc = include_str!("guide.md")]

mod log;
mod probe;
mod script;
mod time;
pub mod web;

pub use log::{Log, LogEvent};
pub use probe::ReadinessProbe;
pub use script::{Call, Fate, Script, ScriptHandle, Scripted, ScriptedFuture, Step};
pub use time::{advance, elapsed, settle};

#[cfg(test)]
mod log_tests;
#[cfg(test)]
mod tests;
