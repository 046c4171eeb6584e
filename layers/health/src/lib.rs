#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod change;
mod check;
mod config;
mod error;
#[cfg(feature = "grpc")]
mod grpc;
mod json;
mod latch;
pub mod metrics;
mod registry;
mod report;
mod run;
mod score;
mod service;
mod source;
mod standing;
mod threshold;

pub use buttress_core::health::{Gate, Health, HealthSource, Readiness, ReadinessGate};
pub use change::{Change, Notice};
pub use check::{Check, CheckState, Failure};
pub use config::HealthRegistryBuilder;
pub use error::{ConfigError, StartError};
#[cfg(feature = "grpc")]
pub use grpc::{GrpcHealth, GrpcServer, GrpcService, GrpcWatch};
pub use latch::Latch;
pub use registry::HealthRegistry;
pub use report::{CheckReport, GateReport, HealthReport, LatchReport, SourceReport};
pub use run::Running;
pub use service::{Details, Endpoint, HealthService, HealthServiceBuilder};
pub use source::{Beat, Indicator, Source};
pub use standing::{Reason, Standing};
pub use threshold::Threshold;
