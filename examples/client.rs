//! A client that stands up to a flaky callee: what fails is tried again, as
//! long as there is time and a budget for it; an attempt that hangs is given
//! up; and a callee that fails again and again is left alone.
//!
//! ```text
//! deadline and retry ─▶ circuit breaker ─▶ attempt's timeout ─▶ hyper-util
//! ```
//!
//! Run it by `cargo run --example client`. The features of `buttress` that it
//! takes: `retry`, `circuit-breaker`, `timeout`, and `hyper`, so that the retry
//! knows what a connection's errors mean.

#![expect(clippy::print_stdout, reason = "it is there to be read")]

use std::{
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use axum::{Router, http::StatusCode, routing::any};
use buttress::{
    BoxError, ServiceBuilderExt,
    circuit_breaker::{self, CircuitBreakerLayer},
    retry::{Backoff, ReplayBody, RetryBudget, RetryLayer, Settings},
    timeout::TimeoutLayer,
};
use bytes::Bytes;
use http::{Request, header::RETRY_AFTER};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{net::TcpListener, time::Instant};
use tower::{ServiceBuilder, ServiceExt};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let url = format!("http://{}", callee().await?);

    // Four attempts of a quarter of a second, waits between them that are random
    // and up to 50, 100 and 200 ms, and three seconds for it all: the deadline.
    let retry = RetryLayer::builder()
        .settings(
            Settings::standard()
                .max_attempts(4)
                .backoff(Backoff::exponential(Duration::from_millis(50)))
                .total_timeout(Duration::from_secs(3))
                .attempt_timeout(Duration::from_millis(250)),
        )
        // 20 retries for every 100 requests, and 10 a second in any case.
        .budget(RetryBudget::new(20, 10)?)
        .on_retry(|attempt, delay, cause| {
            println!("          attempt {attempt}: {cause}; again in {delay:.0?}");
        })
        .build()?;
    // Each attempt counts: after three failures in a row nothing is sent for ten
    // seconds. (Where there are several callees, each gets its own by `per`.)
    let breaker = CircuitBreakerLayer::builder()
        .settings(circuit_breaker::Settings::aggressive())
        .build()?;
    // Ends an attempt that hangs, inside the breaker, which so sees it fail. It
    // needs no limit of its own: the retry says until when.
    let timeout = TimeoutLayer::builder().build()?;
    // Outermost first. What they refuse is a response, 503 or 504; an error is
    // always hyper-util's own.
    let client = ServiceBuilder::new()
        .retry_requests(retry)
        .circuit_breaker(breaker)
        .limit_time(timeout)
        .service(Client::builder(TokioExecutor::new()).build_http::<ReplayBody<Full<Bytes>>>());

    let start = Instant::now();
    for (method, path) in [
        ("PUT", "/flaky"),
        // It may have been acted upon: a POST goes once.
        ("POST", "/busy"),
        // Its second failure is the third in a row: the breaker opens.
        ("GET", "/broken"),
        // And this one is not even sent.
        ("GET", "/flaky"),
    ] {
        let body = Full::new(Bytes::from_static(b"sent again with each attempt"));
        let request = Request::builder()
            .method(method)
            .uri(format!("{url}{path}"));
        let response = client.clone().oneshot(request.body(body)?).await?;
        let (head, body) = response.into_parts();
        // To its end: only then is it a success to the breaker, and the
        // connection free for the next.
        let bytes = body.collect().await?.to_bytes().len();
        let (after, status) = (start.elapsed(), head.status);
        println!("{after:>7.0?}  {method} {path}: {status}, {bytes} bytes");
        if let Some(wait) = head.headers.get(RETRY_AFTER) {
            println!("          the breaker is open for {} s", wait.to_str()?);
        }
    }
    Ok(())
}

/// The callee: `/flaky` fails once, hangs once, and is well then.
async fn callee() -> std::io::Result<std::net::SocketAddr> {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let flaky = async |body: Bytes| match ASKED.fetch_add(1, Relaxed) {
        0 => Err(StatusCode::SERVICE_UNAVAILABLE),
        1 => std::future::pending().await,
        _ => Ok(body),
    };
    let app = Router::new()
        .route("/flaky", any(flaky))
        .route("/busy", any(async || StatusCode::SERVICE_UNAVAILABLE))
        .route("/broken", any(async || StatusCode::BAD_GATEWAY));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(address)
}
