//! Buttress beside its peers, as ratios within one run. How it is measured,
//! and what came of it: `docs/benchmarks.md`.

pub mod breaker;
pub mod contend;
pub mod counts;
pub mod delivery;
pub mod drain;
pub mod measure;
pub mod redis;
pub mod retry;
pub mod scenarios;
pub mod serve;
pub mod table;
pub mod webhook;
