//! Webhooks verified on axum, over real sockets: extractors behind the layer,
//! what a client is told that waits for `100 Continue`, and one that leaves.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{Extension, Router, routing::post};
use buttress::{
    ServiceBuilderExt,
    webhook::{Message, Secret, Signer, Standard, Verified, VerifyLayer},
};
use bytes::Bytes;
use http::Request;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
    time::timeout,
};
use tower::ServiceBuilder;

const LONG: Duration = Duration::from_secs(10);

fn secret() -> Secret {
    Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap()
}

fn layer() -> VerifyLayer {
    VerifyLayer::builder(Standard::new())
        .secrets([secret()])
        .build()
        .unwrap()
}

async fn serve(router: Router) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    // Ends with the test's runtime.
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

/// The headers of this message, signed now by the system's clock.
fn signed(id: &str, body: &[u8]) -> String {
    #[expect(clippy::disallowed_methods, reason = "the layer reads the same one")]
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let (mut parts, ()) = Request::new(()).into_parts();
    let message = Message {
        id,
        timestamp: now.as_secs(),
        body,
    };
    let signer = Signer::new(Standard::new(), [secret()]).unwrap();
    signer.sign(&mut parts, &message).unwrap();
    parts
        .headers
        .iter()
        .map(|(name, value)| format!("{name}: {}\r\n", value.to_str().unwrap()))
        .collect()
}

/// One request on a connection of its own, and all that comes back.
async fn exchange(address: SocketAddr, headers: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("POST /hooks HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    timeout(LONG, read).await.expect("it answers").unwrap();
    answer
}

#[tokio::test]
async fn extractors_get_the_bytes_and_who_sent_them() {
    let router = Router::new()
        .route(
            "/hooks",
            post(
                async |Extension(verified): Extension<Verified>, body: Bytes| {
                    format!("{} {} bytes", verified.id.unwrap(), body.len())
                },
            ),
        )
        .layer(ServiceBuilder::new().verify_webhooks(layer()));
    let address = serve(router).await;

    let headers = signed("msg_1", b"first second");
    let chunked = format!("transfer-encoding: chunked\r\n{headers}");
    let chunks = "6\r\nfirst \r\n6\r\nsecond\r\n0\r\n\r\n";
    let answer = exchange(address, &chunked, chunks).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.ends_with("msg_1 12 bytes"), "{answer}");

    let plain = format!("content-length: 12\r\n{headers}");
    let answer = exchange(address, &plain, "first second").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("content-length: 0\r\n"), "{answer}");

    let answer = exchange(address, &plain, "first_second").await;
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    assert!(answer.contains("signature_mismatch"), "{answer}");
}

#[tokio::test]
async fn who_waits_for_100_is_refused_before_it_sends() {
    let router = Router::new()
        .route("/hooks", post(async || "done"))
        .layer(layer());
    let address = serve(router).await;
    let headers = signed("msg_1", b"x");
    let large = format!("content-length: 1048577\r\nexpect: 100-continue\r\n{headers}");
    let answer = exchange(address, &large, "").await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");

    let small = format!("content-length: 1\r\nexpect: 100-continue\r\n{headers}");
    let answer = exchange(address, &small, "x").await;
    assert!(answer.starts_with("HTTP/1.1 100"), "{answer}");
    assert!(answer.ends_with("done"), "{answer}");
}

#[tokio::test]
async fn when_the_sender_leaves_the_message_may_come_again() {
    let calls = Arc::new(AtomicUsize::new(0));
    let called = Arc::new(Notify::new());
    let handler = {
        let (calls, called) = (Arc::clone(&calls), Arc::clone(&called));
        move || {
            let (calls, called) = (Arc::clone(&calls), Arc::clone(&called));
            async move {
                if calls.fetch_add(1, SeqCst) == 0 {
                    called.notify_one();
                    std::future::pending::<()>().await;
                }
                "done"
            }
        }
    };
    let layer = layer();
    let router = Router::new()
        .route("/hooks", post(handler))
        .layer(layer.clone());
    let address = serve(router).await;

    let headers = format!("content-length: 1\r\n{}", signed("msg_1", b"x"));
    let first = tokio::spawn({
        let headers = headers.clone();
        async move { exchange(address, &headers, "x").await }
    });
    timeout(LONG, called.notified())
        .await
        .expect("it is called");
    assert_eq!(layer.handle().claims(), 1);
    let answer = exchange(address, &headers, "x").await;
    assert!(answer.starts_with("HTTP/1.1 409"), "{answer}");
    assert!(answer.contains("retry-after: 1\r\n"), "{answer}");

    first.abort();
    let freed = async {
        while layer.handle().claims() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, freed).await.expect("the claim is released");
    let answer = exchange(address, &headers, "x").await;
    assert!(answer.ends_with("done"), "{answer}");
    assert_eq!(calls.load(SeqCst), 2);
}
