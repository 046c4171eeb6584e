//! Whole stacks on real sockets: `retry → circuit breaker → timeout →
//! hyper-util's client`, and what the upstream counts of them.

mod bodies;
mod support;
