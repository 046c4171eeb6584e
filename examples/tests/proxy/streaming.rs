//! Bodies flow, and nothing is kept; connections are used again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};

use crate::support::{
    Proxy, Raw, Upstream, eventually, fetch, get, nobody, read_head, reply, soon, to,
};

const MIB: usize = 1 << 20;
const LARGE: usize = 64 * MIB;

/// Sends `length` bytes that tell their place, and counts them.
async fn pour(stream: &mut TcpStream, length: usize, sent: &AtomicU64) {
    let block: Vec<u8> = (0..=255).cycle().take(64 << 10).collect();
    for _ in 0..length / block.len() {
        if stream.write_all(&block).await.is_err() {
            return;
        }
        sent.fetch_add(block.len() as u64, SeqCst);
    }
}

/// Reads `length` such bytes.
async fn drain(stream: &mut TcpStream, length: usize) {
    let mut block = vec![0; 64 << 10];
    for _ in 0..length / block.len() {
        stream.read_exact(&mut block).await.unwrap();
        assert!(
            block
                .iter()
                .enumerate()
                .all(|(index, byte)| *byte == index as u8)
        );
    }
}

#[tokio::test]
async fn large_bodies_pass_both_ways_with_backpressure_and_little_memory() {
    large_bodies_pass("").await;
}

#[tokio::test]
async fn a_retry_keeps_none_of_them() {
    large_bodies_pass(", retry: { methods: [GET, POST] }").await;
}

/// On a route with these keys, too.
async fn large_bodies_pass(keys: &str) {
    let sent = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&sent);
    let (go, went) = mpsc::channel::<()>(1);
    let went = Arc::new(tokio::sync::Mutex::new(went));
    let upstream = Upstream::raw(move |mut stream| {
        let (count, went) = (Arc::clone(&count), Arc::clone(&went));
        async move {
            let Some(head) = read_head(&mut stream).await else {
                return;
            };
            if head.starts_with("POST") {
                // Slow to begin with.
                went.lock().await.recv().await;
                drain(&mut stream, LARGE).await;
                let _ = stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                    .await;
            } else {
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {LARGE}\r\n\r\n");
                stream.write_all(head.as_bytes()).await.unwrap();
                pour(&mut stream, LARGE, &count).await;
            }
        }
    })
    .await;
    let proxy = Proxy::start(&format!(
        "limits: {{ max_body: 64MiB }}\nroutes: [{{ name: all, path: /, upstream: ['http://{}']{keys} }}]",
        upstream.address
    ))
    .await;
    proxy.metric("proxy_requests_total", &[]).await;
    let before = proxy.memory();

    // A client that does not read stops the upstream.
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(raw.until("\r\n\r\n").await.contains(&LARGE.to_string()));
    let stalled = async |sent: &AtomicU64| {
        soon("the sender to stall", async {
            let mut last = 0;
            loop {
                tokio::time::sleep(Duration::from_millis(150)).await;
                let now = sent.load(SeqCst);
                if std::mem::replace(&mut last, now) == now {
                    return now;
                }
            }
        })
        .await
    };
    let early = stalled(&sent).await;
    assert!(
        early < 24 * MIB as u64,
        "{early} bytes went ahead of a client that reads none"
    );
    soon("a large download", drain(&mut raw.0, LARGE)).await;

    // An upstream that does not read stops the client.
    let sent = AtomicU64::new(0);
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send(format!(
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {LARGE}\r\n\r\n"
    ))
    .await;
    let (early, ()) = tokio::join!(
        async {
            let early = stalled(&sent).await;
            go.send(()).await.unwrap();
            early
        },
        soon("a large upload", pour(&mut raw.0, LARGE, &sent)),
    );
    assert!(
        early < 24 * MIB as u64,
        "{early} bytes went ahead of an upstream that reads none"
    );
    assert!(raw.until("ok").await.starts_with("HTTP/1.1 200 "));

    if let (Some((before, _)), Some((_, most))) = (before, proxy.memory()) {
        assert!(most < before + 8 * 1024, "{before} KiB grew to {most} KiB");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_the_upstream() {
    let (tell, mut told) = mpsc::channel(4);
    let upstream = Upstream::raw(move |mut stream| {
        let tell = tell.clone();
        async move {
            let head = read_head(&mut stream).await.unwrap();
            tell.send("arrived").await.unwrap();
            if head.starts_with("GET /body") {
                let _ = stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nsome")
                    .await;
            }
            // Until the proxy hangs up.
            let end = stream.read(&mut [0; 16]).await;
            let gone = matches!(end, Ok(0) | Err(_));
            tell.send(if gone { "gone" } else { "more" }).await.unwrap();
        }
    })
    .await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    for (path, sign) in [("/head", ""), ("/body", "some")] {
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n"))
            .await;
        raw.until(sign).await;
        assert_eq!(soon("the request", told.recv()).await, Some("arrived"));
        assert_eq!(proxy.in_flight().await, 1.0);
        drop(raw);
        assert_eq!(soon("the cancellation", told.recv()).await, Some("gone"));
        let line = proxy.access(path).await;
        assert_eq!(line["status"], if sign.is_empty() { 499 } else { 200 });
        assert_eq!(line["bytes"], sign.len());
        eventually("nothing in flight", || async {
            proxy.in_flight().await == 0.0
        })
        .await;
    }
}

#[tokio::test]
async fn requests_spread_by_what_is_in_flight_to_the_last_byte() {
    // One of three keeps its bodies open.
    let hits: Arc<[AtomicUsize; 3]> = Arc::default();
    let mut urls = Vec::new();
    for index in 0..3 {
        let hits = Arc::clone(&hits);
        let upstream = Upstream::raw(move |mut stream| {
            let hits = Arc::clone(&hits);
            async move {
                while read_head(&mut stream).await.is_some() {
                    hits[index].fetch_add(1, SeqCst);
                    let answer: &[u8] = if index == 0 {
                        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nopen"
                    } else {
                        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nopen"
                    };
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            }
        })
        .await;
        urls.push(format!("'http://{}'", upstream.address));
    }
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: a, path: /, upstream: [{}] }}]",
        urls.join(", ")
    ))
    .await;
    let mut open = Vec::new();
    for _ in 0..200 {
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        raw.until("open").await;
        open.push(raw);
    }
    let counts: Vec<_> = hits.iter().map(|hits| hits.load(SeqCst)).collect();
    assert_eq!(counts.iter().sum::<usize>(), 200);
    // The head was long since there, and still it counts as loaded: it is
    // chosen only until it holds one.
    assert!(counts[0] <= 2, "{counts:?}");
    assert!(counts[1] > 50 && counts[2] > 50, "{counts:?}");
    assert_eq!(proxy.in_flight().await, counts[0] as f64);
    drop(open);
    eventually("nothing in flight", || async {
        proxy.in_flight().await == 0.0
    })
    .await;
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_reached_costs_nothing_while_there_are_others() {
    let upstream = Upstream::start(|_| async { reply("yes") }).await;
    let (live, dead, gone) = (upstream.address, nobody().await, nobody().await);
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: a, path: /, upstream: ['http://{dead}', 'h2c://{gone}', 'http://{live}'] }}]"
    ))
    .await;
    for round in 0..60 {
        let request = Request::post("/")
            .header("host", "a")
            .body(Full::from("x"))
            .unwrap();
        let status = fetch(proxy.listen, request).await.status();
        assert_eq!(status, 200, "{round}");
    }
}

#[tokio::test]
async fn an_h2c_connection_that_was_closed_is_replaced_once() {
    let hang_up = Arc::new(tokio::sync::Notify::new());
    let told = Arc::clone(&hang_up);
    let upstream = Upstream::raw(move |stream| {
        let told = Arc::clone(&told);
        async move {
            let service = hyper::service::service_fn(async |_| {
                Ok::<_, std::convert::Infallible>(reply("yes"))
            });
            let executor = hyper_util::rt::TokioExecutor::new();
            let builder = hyper::server::conn::http2::Builder::new(executor);
            let serving = builder.serve_connection(hyper_util::rt::TokioIo::new(stream), service);
            tokio::select! {
                _ = serving => {}
                () = told.notified() => {}
            }
        }
    })
    .await;
    let url = upstream.address;
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: a, path: /, upstream: ['h2c://{url}'] }}]"
    ))
    .await;
    assert_eq!(proxy.get("/").await.status(), 200);
    hang_up.notify_waiters();
    // All at once on the connection that is gone.
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..20 {
        all.spawn(fetch(proxy.listen, get("/")));
    }
    while let Some(response) = all.join_next().await {
        assert_eq!(response.unwrap().status(), 200);
    }
    assert_eq!(upstream.connections.load(SeqCst), 2);
}

#[tokio::test]
async fn upstream_connections_are_used_again() {
    let upstream = Upstream::start(|_| async { reply("yes") }).await;
    for (scheme, expected) in [("http", 1), ("h2c", 2)] {
        let url = upstream.address;
        let proxy = Proxy::start(&format!(
            "routes: [{{ name: a, path: /, upstream: ['{scheme}://{url}'] }}]"
        ))
        .await;
        for _ in 0..20 {
            assert_eq!(proxy.get("/").await.status(), 200);
        }
        assert_eq!(upstream.connections.load(SeqCst), expected, "{scheme}");
    }
}

#[tokio::test]
async fn a_stale_connection_costs_an_idempotent_request_nothing() {
    // Hangs up on the second request of a connection, unseen until then.
    let upstream = Upstream::raw(|mut stream| async move {
        let Some(head) = read_head(&mut stream).await else {
            return;
        };
        let length: usize = head
            .to_ascii_lowercase()
            .split("content-length: ")
            .nth(1)
            .map_or(0, |rest| rest.split('\r').next().unwrap().parse().unwrap());
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
        let _ = stream.write_all(answer.as_bytes()).await;
        let _ = stream.write_all(&body).await;
        let _ = read_head(&mut stream).await;
    })
    .await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    let send = |method: &str, path: &str, body: &'static str| {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "a")
            .body(Full::from(Bytes::from(body)))
            .unwrap();
        fetch(proxy.listen, request)
    };
    for (method, path, body, status) in [
        ("GET", "/get", "", 200),
        ("PUT", "/put", "a body that has to go again", 200),
        ("DELETE", "/delete", "", 200),
        // It may have been acted upon: not for us to repeat.
        ("POST", "/post", "charge my card", 502),
    ] {
        assert_eq!(proxy.get("/first").await.status(), 200);
        let response = send(method, path, body).await;
        assert_eq!(response.status(), status, "{method}");
        if status == 200 {
            assert_eq!(response.body(), body, "{method}");
        }
        let attempts = proxy.access(path).await["attempts"].as_u64().unwrap();
        assert_eq!(attempts, if status == 200 { 2 } else { 1 }, "{method}");
        // Whatever was left idle is used up.
        let _ = send("GET", "/last", "").await;
    }
}

#[tokio::test]
async fn a_connection_that_was_closed_in_the_open_costs_nobody_anything() {
    let upstream = Upstream::raw(|mut stream| async move {
        read_head(&mut stream).await;
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            .await;
    })
    .await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    for _ in 0..10 {
        let request = Request::post("/")
            .header("host", "a")
            .body(Full::from("x"))
            .unwrap();
        assert_eq!(fetch(proxy.listen, request).await.status(), 200);
        // The proxy learns of it from its runtime, between two requests.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn chunks_arrive_as_they_are_sent() {
    let (push, pushed) = mpsc::channel::<()>(1);
    let pushed = Arc::new(tokio::sync::Mutex::new(pushed));
    let upstream = Upstream::raw(move |mut stream| {
        let pushed = Arc::clone(&pushed);
        async move {
            read_head(&mut stream).await;
            let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
            stream.write_all(head).await.unwrap();
            while pushed.lock().await.recv().await.is_some() {
                stream.write_all(b"4\r\ntick\r\n").await.unwrap();
            }
            let _ = stream.write_all(b"0\r\n\r\n").await;
        }
    })
    .await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET /ticks HTTP/1.1\r\nhost: a\r\n\r\n").await;
    raw.until("\r\n\r\n").await;
    for _ in 0..5 {
        push.send(()).await.unwrap();
        raw.until("tick\r\n").await;
    }
    drop(push);
    raw.until("0\r\n\r\n").await;
    assert_eq!(proxy.access("/ticks").await["bytes"], 20);
    assert_eq!(fetch(proxy.admin, get("/health/live")).await.status(), 200);
}

#[tokio::test]
async fn clients_that_do_not_read_hold_up_no_one_else_on_their_connection() {
    let upstream = Upstream::start(|request| async move {
        let length = match request.uri().path() {
            // More than the kernel takes in for a client that does not.
            "/large" => 32 * MIB,
            _ => 5,
        };
        reply(vec![b'x'; length])
    })
    .await;
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: a, path: /, upstream: ['h2c://{}'] }}]",
        upstream.address
    ))
    .await;
    let mut idle = Vec::new();
    for _ in 0..4 {
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send("GET /large HTTP/1.1\r\nhost: a\r\n\r\n").await;
        raw.until("\r\n\r\n").await;
        idle.push(raw);
    }
    // Until nothing moves any more.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let small = tokio::time::timeout(Duration::from_secs(4), proxy.get("/small"));
    assert_eq!(small.await.expect("nobody is in the way").body(), "xxxxx");
    assert_eq!(proxy.in_flight().await, 4.0);
    assert_eq!(upstream.connections.load(SeqCst), 1);
    drop(idle);
    eventually("nothing is in flight", || async {
        proxy.in_flight().await == 0.0
    })
    .await;
}
