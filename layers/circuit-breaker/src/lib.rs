#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backoff;
mod breaker;
mod cell;
mod config;
mod error;
mod event;
mod fallback;
mod future;
mod layer;
pub mod metrics;
#[cfg(all(test, not(buttress_loom)))]
mod model_tests;
mod permit;
#[cfg(feature = "back-pressure")]
mod ready;
mod registry;
mod service;
mod settings;
#[cfg(feature = "redis")]
mod shared;
mod source;
mod window;
mod word;

pub use backoff::ReopenBackoff;
pub use breaker::{Breaker, BreakerBuilder, Status};
pub use config::{CircuitBreakerBuilder, One, Per};
pub use error::{CircuitOpen, ConfigError, Error, TransitionError};
pub use event::{Cause, Event, Reason, Rule, State, Transition};
pub use fallback::{Fallback, FallbackService, ServiceFallback};
pub use future::{ErrorFuture, FallbackFuture, Guard, Guarded, Judged, ResponseFuture};
pub use layer::{CircuitBreakerLayer, Errors, Instead, Respond, ResultClassifier};
pub use permit::Permit;
pub use registry::{HealthSummary, Registry, RegistryBuilder, RegistryKey};
pub use service::CircuitBreaker;
pub use settings::{Rules, Settings, Window};
#[cfg(feature = "redis")]
pub use shared::{FleetStatus, Sharing};
pub use source::{PerKey, Source};
