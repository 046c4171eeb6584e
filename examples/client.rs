//! A client that keeps to its callee's quota: what does not fit waits in line,
//! and what would wait too long is told so at once.
//!
//! ```text
//! cargo run --example client
//! ```

#![expect(clippy::print_stdout, reason = "it is there to be read")]

use std::time::Duration;

use axum::{Router, routing::get};
use buttress::{
    BoxError, Refusal,
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
    let app = Router::new().route("/", get(|| async { "hello" }));
    tokio::spawn(async move { axum::serve(listener, app).await });

    // Five a second for each host, two of them at once; nobody waits longer
    // than a second, and no more than 100 wait.
    let wait = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_second(5).burst(2)).key(host()))
        .errors()
        .build_waiting(Duration::from_secs(1), 100)?;
    let client = ServiceBuilder::new()
        .layer(wait)
        .service(Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>());

    let start = Instant::now();
    let mut calls = JoinSet::new();
    for call in 1..=10 {
        let request = http::Request::get(&url).body(Empty::new())?;
        let response = client.clone().oneshot(request);
        calls.spawn(async move { (call, response.await, start.elapsed()) });
    }
    while let Some(done) = calls.join_next().await {
        let (call, result, after) = done?;
        match result {
            Ok(response) => println!("{after:>7.0?}  call {call}: {}", response.status()),
            Err(error) => match error.downcast_ref::<Refusal>() {
                Some(refusal) => println!("{after:>7.0?}  call {call} not sent: {refusal}"),
                None => return Err(error),
            },
        }
    }
    Ok(())
}
