#![doc = include_str!("guide.md")]

mod probe;
mod script;
mod time;
pub mod web;

pub use probe::ReadinessProbe;
pub use script::{Call, Fate, Script, ScriptHandle, Scripted, ScriptedFuture, Step};
pub use time::{advance, elapsed, settle};

#[cfg(test)]
mod tests;
