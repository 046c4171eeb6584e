//! Whole stacks on real sockets: `retry → circuit breaker → timeout →
//! hyper-util's client`, and what the upstream counts of them.

mod bodies;
#[cfg(feature = "tower")]
mod builder;
mod cancel;
mod connect;
mod hedge;
mod http2;
#[cfg(feature = "tower")]
mod nested;
mod outage;
#[cfg(all(feature = "rate-limit", feature = "testing"))]
mod refused;
mod servers;
mod support;
mod time;
mod tonic;
