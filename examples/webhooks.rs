//! Webhooks from end to end, sender and receiver in one process: what happens
//! to one that arrives, one that is retried, one that is replayed, one that was
//! tampered with, and one that was to go where it may not.
//!
//! ```text
//! emit ─▶ Webhooks: queue, lanes, retries, signature ─▶ guarded client
//!                                                            │
//!             handler ◀─ VerifyLayer: signature, time, once ◀┘
//! ```
//!
//! Run it by `cargo run --example webhooks`. The features of `buttress` that it
//! takes: `delivery-client` and `webhook`.

#![expect(clippy::print_stdout, reason = "it is there to be read")]

use std::{
    error::Error,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{Extension, Json, Router, http::StatusCode, routing::post};
use buttress::{
    BoxError,
    delivery::{
        Event, Registration, Status, Webhooks,
        client::{client, webpki_roots},
        guard::Guard,
    },
    webhook::{Secret, Standard, Verified, VerifyLayer, WholeBody},
};
use http::Request;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tower::{ServiceBuilder, ServiceExt};

/// Both know it, and nobody else.
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let receiver = receiver().await?;

    // What users register is dialled by this machine: to public addresses only,
    // and here to this one test receiver, without TLS.
    let guard = Guard::new().allow("127.0.0.1/32".parse()?).allow_http();
    let client = client(guard.clone(), webpki_roots());
    // An eavesdropper, who has what was sent first.
    let heard: Arc<Mutex<Option<Request<WholeBody>>>> = Arc::default();
    let hears = Arc::clone(&heard);
    let transport = ServiceBuilder::new()
        .map_request(move |request: Request<WholeBody>| {
            let mut heard = hears.lock().unwrap();
            heard.get_or_insert_with(|| request.clone());
            drop(heard);
            request
        })
        .service(client.clone());

    let webhooks = Webhooks::builder().guard(guard).build(transport)?;
    webhooks.register(
        Registration::new(format!("http://{receiver}/hooks"))
            .events(["order.*"])
            .signed_by(Standard::new(), [Secret::new(SECRET)?])?
            .retry_delay(Duration::from_millis(100)),
    )?;
    let mut updates = webhooks.subscribe(None);
    let worker = webhooks.start()?;

    for (event, data) in [
        ("order.paid", json!({ "order": 17, "amount": 1200 })),
        // The receiver fails at it, once.
        ("order.shipped", json!({ "order": 17 })),
    ] {
        let deliveries = webhooks.emit(Event::new(event, data)).await?;
        println!("sender    {event}: for {deliveries} receiver");
        while let Some(update) = updates.recv().await {
            let result = update.result;
            match (result.status, result.response_status) {
                (status, Some(answer)) => {
                    println!(
                        "sender    {event}: attempt {}, {answer}: {status:?}",
                        result.attempt
                    );
                }
                (status, None) => println!("sender    {event}: {status:?}"),
            }
            if result.status.is_final() {
                assert_eq!(result.status, Status::Delivered);
                break;
            }
        }
    }

    // The same bytes again: right in every way, but known.
    let heard = heard.lock().unwrap().take().expect("something was sent");
    let answer = client.clone().oneshot(heard.clone()).await?;
    println!("replayed  the same request again: {}", answer.status());

    // One byte of the body is another.
    let (head, body) = heard.into_parts();
    let body = String::from_utf8(body.into_bytes().to_vec())?.replace("1200", "9200");
    let tampered = Request::from_parts(head, WholeBody::new(body.into()));
    let answer = client.oneshot(tampered).await?;
    let status = answer.status();
    let problem: Value = serde_json::from_slice(&answer.into_body().collect().await?.to_bytes())?;
    println!("tampered  another amount: {status}, {}", problem["reason"]);

    // A receiver that is none: the cloud's metadata.
    let inside = Registration::new("http://169.254.169.254/latest/meta-data").events(["*"]);
    let refused = webhooks.register(inside).unwrap_err();
    let why = refused
        .source()
        .map(ToString::to_string)
        .unwrap_or_default();
    println!("refused   169.254.169.254: {refused}: {why}");

    let stopped = worker.stop(Duration::from_secs(5)).await;
    println!("sender    stopped, {} left in the queue", stopped.queued);
    Ok(())
}

/// A service that takes orders, if they are signed and new.
async fn receiver() -> Result<SocketAddr, BoxError> {
    let verify = VerifyLayer::builder(Standard::new())
        .name("orders")
        .secrets([Secret::new(SECRET)?])
        .build()?;
    let app = Router::new().route("/hooks", post(order)).layer(verify);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(address)
}

/// Sees genuine messages only, and each of them until it has taken it.
async fn order(Extension(verified): Extension<Verified>, Json(event): Json<Value>) -> StatusCode {
    static SHIPPED: AtomicU32 = AtomicU32::new(0);
    let status = match event["type"].as_str() {
        Some("order.shipped") if SHIPPED.fetch_add(1, Relaxed) == 0 => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
        _ => StatusCode::NO_CONTENT,
    };
    assert_eq!(verified.id.as_deref(), event["id"].as_str());
    println!("receiver  {}: {}", event["type"], status.as_u16());
    status
}
