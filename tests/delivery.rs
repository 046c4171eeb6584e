//! Webhook delivery over hyper's client, to receivers on real sockets that
//! behave as badly as they can.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress::{
    clock::{SystemClock, WallClock},
    delivery::{Cause, DeliveryResult, Event, Registration, Status, Webhooks},
    webhook::{Secret, Standard, Verifier, WholeBody},
};
use bytes::Bytes;
use http::Request;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
    time::{sleep, timeout},
};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
/// Nothing here takes longer, or it hangs.
const LONG: Duration = Duration::from_secs(20);

type Received = Arc<Mutex<HashMap<String, Vec<Request<Bytes>>>>>;

/// A receiver that does what the path says.
struct Receiver {
    address: SocketAddr,
    received: Received,
    /// The sender has hung up on an answer without end.
    closed: Arc<Notify>,
}

impl Receiver {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (received, closed) = (Received::default(), Arc::new(Notify::new()));
        let (seen, close) = (Arc::clone(&received), Arc::clone(&closed));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, close) = (Arc::clone(&seen), Arc::clone(&close));
                tokio::spawn(async move {
                    // An error is the sender's hanging up.
                    let _ = serve(stream, &seen, &close).await;
                });
            }
        });
        Self {
            address,
            received,
            closed,
        }
    }

    fn calls(&self, path: &str) -> usize {
        self.received.lock().unwrap().get(path).map_or(0, Vec::len)
    }
}

async fn serve(mut stream: TcpStream, seen: &Received, closed: &Notify) -> std::io::Result<()> {
    loop {
        let Some(request) = read(&mut stream).await? else {
            return Ok(());
        };
        let path = request.uri().path().to_owned();
        seen.lock()
            .unwrap()
            .entry(path.clone())
            .or_default()
            .push(request);
        let mut answer = async |text: &str| stream.write_all(text.as_bytes()).await;
        match path.as_str() {
            "/ok" => answer("HTTP/1.1 204 No Content\r\n\r\n").await?,
            "/down" => answer("HTTP/1.1 500 Oh\r\ncontent-length: 4\r\n\r\ndown").await?,
            "/redirect" => {
                let to = "HTTP/1.1 307 There\r\nlocation: /ok\r\ncontent-length: 0\r\n\r\n";
                answer(to).await?;
            }
            "/reset" => {
                stream.set_zero_linger()?;
                return Ok(());
            }
            "/hang" => std::future::pending().await,
            "/trickle" => {
                answer("HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n").await?;
                loop {
                    answer("x").await?;
                    sleep(Duration::from_millis(20)).await;
                }
            }
            "/endless" => {
                answer("HTTP/1.1 200 OK\r\n\r\n").await?;
                let chunk = "x".repeat(16 * 1024);
                // Bounded, so that a sender who reads on is found out.
                for _ in 0..10_000 {
                    if answer(&chunk).await.is_err() {
                        closed.notify_one();
                        return Ok(());
                    }
                }
                return Ok(());
            }
            other => panic!("nobody is at {other}"),
        }
    }
}

/// One request; `None` at the connection's end.
async fn read(stream: &mut TcpStream) -> std::io::Result<Option<Request<Bytes>>> {
    let mut bytes = Vec::new();
    loop {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, _)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let mut lines = head.lines();
        let target = lines.next().unwrap().split(' ').nth(1).unwrap();
        let mut request = Request::post(target);
        let mut length = 0;
        for (name, value) in lines.filter_map(|line| line.split_once(": ")) {
            if name.eq_ignore_ascii_case("content-length") {
                length = value.parse().unwrap();
            }
            request = request.header(name, value);
        }
        let begin = head.len() + 4;
        if bytes.len() >= begin + length {
            let body = Bytes::copy_from_slice(&bytes[begin..begin + length]);
            return Ok(Some(request.body(body).unwrap()));
        }
    }
}

fn client() -> Client<HttpConnector, WholeBody> {
    Client::builder(TokioExecutor::new()).build_http()
}

async fn ended(updates: &mut buttress::delivery::Subscriber) -> Arc<DeliveryResult> {
    let end = async {
        loop {
            let update = updates.recv().await.expect("the worker runs");
            if update.result.status.is_final() {
                return update.result;
            }
        }
    };
    timeout(LONG, end).await.expect("it ends")
}

#[tokio::test]
async fn receivers_that_misbehave() {
    let receiver = Receiver::start().await;
    let webhooks = Webhooks::builder()
        .without_breaker()
        .build(client())
        .unwrap();
    let mut updates = webhooks.subscribe(None);
    let worker = webhooks.start().unwrap();
    let status_of = |cause: Option<&Cause>| cause.map(Cause::as_str);

    for (path, status, cause, calls) in [
        ("/ok", Status::Delivered, None, 1),
        ("/down", Status::Failed, Some("status"), 2),
        ("/redirect", Status::Failed, Some("redirected"), 1),
        ("/reset", Status::Failed, Some("transport"), 2),
        ("/hang", Status::Failed, Some("timeout"), 2),
        ("/trickle", Status::Failed, Some("timeout"), 2),
        ("/endless", Status::Delivered, None, 1),
    ] {
        let registration = Registration::new(format!("http://{}{path}", receiver.address))
            .events(["*"])
            .signed_by(Standard::new(), [Secret::new(SECRET).unwrap()])
            .unwrap()
            .timeout(Duration::from_millis(300))
            .retry_delay(Duration::from_millis(1))
            .max_retries(1);
        let id = webhooks.register(registration).unwrap();
        let event = Event::new("request.completed", json!({"path": path}));
        assert_eq!(webhooks.emit(event).await.unwrap(), 1);
        let result = ended(&mut updates).await;
        assert_eq!(
            (result.status, status_of(result.error.as_ref())),
            (status, cause),
            "{path}"
        );
        assert_eq!(receiver.calls(path), calls, "{path}");
        webhooks.unregister(id).await;
    }
    timeout(LONG, receiver.closed.notified())
        .await
        .expect("the connection is closed");
    // The redirect was not followed.
    assert_eq!(receiver.calls("/ok"), 1);
    assert_eq!(webhooks.dead_letters().len(), 5);
    assert_eq!(worker.stop(Duration::ZERO).await.queued, 0);

    // What came over the wire is what was signed, each time.
    let verifier = Verifier::new(Standard::new(), [Secret::new(SECRET).unwrap()]).unwrap();
    for requests in receiver.received.lock().unwrap().values() {
        for request in requests {
            let now = SystemClock.unix_now();
            verifier
                .verify(request.into(), request.body(), now)
                .unwrap();
            assert_eq!(
                request.headers()["webhook-id"],
                requests[0].headers()["webhook-id"]
            );
        }
    }
}

#[tokio::test]
async fn a_port_where_nobody_listens() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let webhooks = Webhooks::builder().build(client()).unwrap();
    let url = format!("http://{address}/T0KEN?key=K3Y");
    webhooks
        .register(Registration::new(url).events(["*"]).max_retries(0))
        .unwrap();
    let mut updates = webhooks.subscribe(None);
    let _worker = webhooks.start().unwrap();
    webhooks.emit(Event::new("a", json!(null))).await.unwrap();
    let result = ended(&mut updates).await;
    let said = result.error.as_ref().unwrap().to_string();
    assert!(said.starts_with("the endpoint was not reached: "), "{said}");
    assert!(said.contains("refused"), "{said}");
    assert!(!said.contains("T0KEN") && !said.contains("K3Y"), "{said}");
}
