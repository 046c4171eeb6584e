//! The circuit breaker in whole stacks, over real sockets.

mod axum;
mod client;
mod tonic;
