//! A server that you can curl: five requests at once for each address, one
//! more every two seconds; and a circuit breaker before what is broken.
//!
//! ```text
//! cargo run --example axum
//! ```

#![expect(clippy::print_stdout, reason = "it is there to be read")]

use std::net::SocketAddr;

use axum::{Router, http::StatusCode, routing::get};
use buttress::{
    circuit_breaker::{CircuitBreakerLayer, Settings},
    key::ClientIp,
    rate_limit::{Limit, Quota, RateLimitLayer},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let limit = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_minute(30).burst(5)).key(ClientIp::new()))
        .build()?;
    // Three failures in a row, and for ten seconds nobody is let in.
    let breaker = CircuitBreakerLayer::builder()
        .settings(Settings::aggressive())
        .build()?;
    let broken = get(|| async { StatusCode::INTERNAL_SERVER_ERROR });
    let app = Router::new()
        .route("/", get(|| async { "hello\n" }))
        .route("/broken", broken.layer(breaker))
        .layer(limit);

    let address = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:3000".into());
    let listener = tokio::net::TcpListener::bind(address).await?;
    let url = format!("http://{}", listener.local_addr()?);
    println!("Listening. Six at once, of which the last is refused:\n");
    println!("    for i in 1 2 3 4 5 6; do curl -si {url}; done\n");
    println!("And one that waits as Retry-After says, and gets in:\n");
    println!("    curl -si --retry 1 {url}\n");
    println!("Four that fail, of which the last is not even tried:\n");
    println!("    for i in 1 2 3 4; do curl -si {url}/broken; done");

    // So that the limiter knows who asks.
    let app = app.into_make_service_with_connect_info::<SocketAddr>();
    Ok(axum::serve(listener, app).await?)
}
