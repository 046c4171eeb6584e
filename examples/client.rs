//! A client that keeps to its callee's quota: what does not fit waits in line,
//! and what would wait too long is told so at once. And when the callee fails
//! again and again, it is left alone.
//!
//! ```text
//! cargo run --example client
//! ```

#![expect(clippy::print_stdout, reason = "it is there to be read")]

use std::time::Duration;

use axum::{Router, http::StatusCode, routing::get};
use buttress::{
    BoxError, Refusal,
    circuit_breaker::{CircuitBreakerLayer, Settings},
    key::host,
    rate_limit::{Limit, Quota, RateLimitLayer},
};
use bytes::Bytes;
use http_body_util::Empty;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{net::TcpListener, task::JoinSet, time::Instant};
use tower::{ServiceBuilder, ServiceExt};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // The callee, which allows us five a second and would be cross.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", listener.local_addr()?);
    let app = Router::new()
        .route("/", get(|| async { "hello" }))
        .route("/broken", get(|| async { StatusCode::BAD_GATEWAY }));
    tokio::spawn(async move { axum::serve(listener, app).await });

    // Five a second for each host, two of them at once; nobody waits longer
    // than a second, and no more than 100 wait.
    let wait = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_second(5).burst(2)).key(host()))
        .errors()
        .build_waiting(Duration::from_secs(1), 100)?;
    // Inside, so that it judges the callee and not the line before it: three
    // failures in a row, and nothing is sent for ten seconds.
    let breaker = CircuitBreakerLayer::builder()
        .settings(Settings::aggressive())
        .errors()
        .build()?;
    let client = ServiceBuilder::new()
        .layer(wait)
        .layer(breaker)
        .service(Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>());

    let start = Instant::now();
    let send = |path: &str| {
        let request = http::Request::get(format!("{url}{path}")).body(Empty::new());
        let client = client.clone();
        async move { client.oneshot(request?).await }
    };
    let mut calls = JoinSet::new();
    for call in 1..=10 {
        let response = send("");
        calls.spawn(async move { (call, response.await) });
    }
    while let Some(done) = calls.join_next().await {
        let (call, result) = done?;
        tell(start, call, result)?;
    }
    for call in 11..=15 {
        tell(start, call, send("broken").await)?;
    }
    Ok(())
}

fn tell<B>(
    start: Instant,
    call: u32,
    result: Result<http::Response<B>, BoxError>,
) -> Result<(), BoxError> {
    let after = start.elapsed();
    match result {
        Ok(response) => println!("{after:>7.0?}  call {call}: {}", response.status()),
        Err(error) => match Refusal::find(&*error) {
            Some(refusal) => println!("{after:>7.0?}  call {call} not sent: {refusal}"),
            None => return Err(error),
        },
    }
    Ok(())
}
