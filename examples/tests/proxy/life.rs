//! Connections and their limits, the log, the admin port, and the end.

use std::{sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Notify,
    time::{Instant, timeout},
};

use crate::support::{
    Proxy, Raw, Upstream, eventually, fetch, get, json, nobody, read_head, reply, soon, to,
};

/// An upstream that answers when told.
async fn patient() -> (Upstream, Arc<Notify>) {
    let go = Arc::new(Notify::new());
    let wait = Arc::clone(&go);
    let upstream = Upstream::start(move |_| {
        let wait = Arc::clone(&wait);
        async move {
            wait.notified().await;
            reply("at last")
        }
    })
    .await;
    (upstream, go)
}

#[tokio::test]
async fn no_more_connections_than_allowed_are_accepted() {
    let upstream = Upstream::start(|_| async { reply("yes") }).await;
    let proxy = Proxy::start(&format!(
        "limits: {{ max_connections: 2 }}\n{}",
        to(upstream.address)
    ))
    .await;
    let ask = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send(ask).await;
        raw.until("yes").await;
        held.push(raw);
    }
    // The third waits in the backlog until one of them goes.
    let mut third = Raw::connect(proxy.listen).await;
    third.send(ask).await;
    let mut byte = [0];
    let early = timeout(Duration::from_millis(300), third.0.peek(&mut byte)).await;
    assert!(early.is_err(), "{early:?}");
    drop(held.pop());
    third.until("yes").await;
}

#[tokio::test]
async fn a_slow_head_is_closed_and_an_idle_connection_is_not_taken_for_one() {
    let upstream = Upstream::start(|_| async { reply("yes") }).await;
    let proxy = Proxy::start(&format!(
        "limits: {{ header_timeout: 400ms, idle_timeout: 1500ms }}\n{}",
        to(upstream.address)
    ))
    .await;
    let span = async |mut raw: Raw| {
        let start = Instant::now();
        let rest = raw.rest().await;
        (start.elapsed(), rest)
    };
    let connect = || Raw::connect(proxy.listen);
    let head = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";

    // Says nothing; says a little; drips.
    let silent = connect().await;
    let mut partial = connect().await;
    partial.send("GET / HTTP/1.1\r\nhost:").await;
    let mut preface = connect().await;
    preface.send("PRI").await;
    let dripping = async {
        let mut raw = connect().await;
        let start = Instant::now();
        for byte in head.bytes().cycle().filter(|byte| *byte != b'\n') {
            if raw.0.write_all(&[byte]).await.is_err() {
                break;
            }
            if timeout(Duration::from_millis(20), raw.0.read_u8())
                .await
                .is_ok()
            {
                break;
            }
        }
        start.elapsed()
    };
    // Between two requests there is more time; within the second head there
    // is not.
    let mut idle = connect().await;
    idle.send(head).await;
    idle.until("yes").await;
    let mut second = connect().await;
    second.send(head).await;
    second.until("yes").await;
    second.send("GET / HT").await;
    let (silent, partial, preface, dripping, idle, second) = tokio::join!(
        span(silent),
        span(partial),
        span(preface),
        dripping,
        span(idle),
        span(second)
    );
    for (name, (took, rest)) in [
        ("silent", silent),
        ("partial", partial),
        ("preface", preface),
        ("second", second),
    ] {
        assert!((300..1200).contains(&took.as_millis()), "{name}: {took:?}");
        assert!(
            rest.is_empty() || rest.starts_with("HTTP/1.1 408 "),
            "{name}: {rest}"
        );
    }
    assert!((300..1200).contains(&dripping.as_millis()), "{dripping:?}");
    assert!((1400..3000).contains(&idle.0.as_millis()), "{idle:?}");
}

#[tokio::test]
async fn a_slow_upstream_is_neither_a_slow_head_nor_idleness() {
    let (upstream, go) = patient().await;
    let proxy = Proxy::start(&format!(
        "limits: {{ header_timeout: 100ms, idle_timeout: 100ms }}\n{}",
        to(upstream.address)
    ))
    .await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    go.notify_one();
    raw.until("at last").await;
}

#[tokio::test]
async fn the_access_line_says_what_was_and_never_the_query() {
    let upstream = Upstream::start(|_| async { reply("hello") }).await;
    let dead = nobody().await;
    let proxy = Proxy::start(&format!(
        "routes:
- {{ name: live, path: /live, upstream: ['http://{}'] }}
- {{ name: dead, path: /dead, upstream: ['http://{dead}'] }}
",
        upstream.address
    ))
    .await;
    assert_eq!(proxy.get("/live/x?token=secret").await.status(), 200);
    let line = proxy.access("/live/x").await;
    assert_eq!(line["method"], "GET");
    assert_eq!(line["status"], 200);
    assert_eq!(line["bytes"], 5);
    assert!(
        line["duration_ms"]
            .as_f64()
            .is_some_and(|took| took > 0.0 && took < 5000.0)
    );
    assert_eq!(line["route"], "live");
    assert_eq!(line["upstream"], format!("http://{}", upstream.address));
    assert_eq!(line["attempts"], 1);
    assert_eq!(line["request_id"].as_str().map(str::len), Some(32));
    assert!(line["error"].is_null());
    assert!(!line.to_string().contains("secret"), "{line}");

    assert_eq!(proxy.get("/dead").await.status(), 502);
    let line = proxy.access("/dead").await;
    assert_eq!(
        (&line["status"], &line["attempts"]),
        (&502.into(), &0.into())
    );
    assert!(
        line["error"].as_str().unwrap().starts_with("connect: "),
        "{line}"
    );

    assert_eq!(proxy.get("/none").await.status(), 404);
    let line = proxy.access("/none").await;
    assert_eq!(
        (&line["route"], &line["upstream"]),
        (&"".into(), &"".into())
    );
    assert!(line["bytes"].as_u64().unwrap() > 0);

    let requests = async |route: &str, class: &str| {
        let labels = [format!("route=\"{route}\""), format!("class=\"{class}\"")];
        proxy
            .metric("proxy_requests_total", &[&labels[0], &labels[1]])
            .await
    };
    assert_eq!(requests("live", "2xx").await, 1.0);
    assert_eq!(requests("dead", "5xx").await, 1.0);
    assert_eq!(requests("", "4xx").await, 1.0);
    assert_eq!(
        proxy
            .metric("proxy_request_duration_seconds_count", &["route=\"live\""])
            .await,
        1.0
    );
}

#[tokio::test]
async fn there_is_a_line_whatever_the_end_was() {
    // A client may be gone before it has had any answer at all.
    let upstream = Upstream::start(|_| async { reply("hello") }).await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    for _ in 0..20 {
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send("GET /gone HTTP/1.1\r\nhost: a\r\n\r\n").await;
        raw.0.shutdown().await.unwrap();
        proxy.access("/gone").await;
    }

    // Nor does a tunnel need an end in peace.
    let upstream = Upstream::raw(|mut stream| async move {
        read_head(&mut stream).await;
        let head =
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nhello";
        stream.write_all(head).await.unwrap();
        stream.read_u8().await.unwrap();
        stream.set_zero_linger().unwrap();
    })
    .await;
    let other = Proxy::start(&to(upstream.address)).await;
    let mut raw = Raw::connect(other.listen).await;
    raw.send("GET /tunnel HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")
        .await;
    raw.until("hello").await;
    raw.send("x").await;
    let line = other.access("/tunnel").await;
    assert_eq!((&line["status"], &line["bytes"]), (&101.into(), &5.into()));
    assert!(
        line["error"].as_str().unwrap().starts_with("tunnel: "),
        "{line}"
    );

    // The status was sent before it broke off; the line knows.
    let upstream = Upstream::raw(|mut stream| async move {
        read_head(&mut stream).await;
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello")
            .await;
    })
    .await;
    let other = Proxy::start(&to(upstream.address)).await;
    let mut raw = Raw::connect(other.listen).await;
    raw.send("GET /half HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(raw.rest().await.ends_with("hello"));
    let line = other.access("/half").await;
    assert_eq!((&line["status"], &line["bytes"]), (&200.into(), &5.into()));
    assert_eq!(line["error"], "the response broke off");
}

#[tokio::test]
async fn the_admin_port_answers_and_keeps_its_token() {
    let upstream = Upstream::start(|_| async { reply("yes") }).await;
    let proxy = Proxy::start(&format!("admin_token: hunter2\n{}", to(upstream.address))).await;
    let ask = |method: &str, path: &str, authorization: &str| {
        let mut request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "a");
        if !authorization.is_empty() {
            request = request.header("authorization", authorization);
        }
        fetch(proxy.admin, request.body(Full::default()).unwrap())
    };
    // Probes have none.
    for (path, word) in [("live", "live"), ("ready", "ready"), ("startup", "started")] {
        let probe = ask("GET", &format!("/health/{path}"), "").await;
        assert_eq!(probe.status(), 200, "{path}");
        assert_eq!(json(&probe)[word], true);
        assert_eq!(probe.headers()["cache-control"], "no-store");
    }
    for path in ["/health", "/health/", "/health/none"] {
        assert_eq!(ask("GET", path, "").await.status(), 401, "{path}");
    }
    for wrong in [
        "",
        "hunter2",
        "Bearer",
        "Bearer hunter",
        "Bearer hunter22",
        "Basic hunter2",
    ] {
        let response = ask("GET", "/metrics", wrong).await;
        assert_eq!(response.status(), 401, "{wrong}");
        assert!(
            response.headers()["www-authenticate"]
                .to_str()
                .unwrap()
                .starts_with("Bearer")
        );
    }
    let right = "bearer hunter2";
    let metrics = ask("GET", "/metrics", right).await;
    assert_eq!(metrics.status(), 200);
    assert!(
        metrics.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/plain")
    );
    let page = ask("GET", "/", right).await;
    assert!(
        page.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/html")
    );
    assert_eq!(ask("GET", "/nothing", right).await.status(), 404);
    assert_eq!(ask("POST", "/metrics", right).await.status(), 405);
    let head = ask("HEAD", "/metrics", right).await;
    assert_eq!((head.status().as_u16(), head.body().len()), (200, 0));
}

#[tokio::test]
async fn an_open_breaker_lowers_the_score_and_turns_nobody_away() {
    let (up, down) = (nobody().await, nobody().await);
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: a, path: /, upstream: ['http://{up}', 'http://{down}'], circuit_breaker: {{}} }}]"
    ))
    .await;
    let health = async |path: &str| {
        let response = fetch(proxy.admin, get(path)).await;
        (response.status().as_u16(), json(&response))
    };
    let (status, ready) = health("/health/ready").await;
    assert_eq!(
        (status, ready),
        (200, serde_json::json!({ "ready": true, "score": 1.0 }))
    );
    let open = http::Request::post(format!("/breakers/a@{down}/open")).header("host", "a");
    let opened = fetch(proxy.admin, open.body(Full::default()).unwrap()).await;
    assert_eq!(opened.status(), 204);
    let (status, ready) = health("/health/ready").await;
    assert_eq!(
        (status, ready),
        (200, serde_json::json!({ "ready": true, "score": 0.5 }))
    );

    // The whole of it.
    let (status, all) = health("/health").await;
    assert_eq!(
        (status, &all["ready"], &all["started"]),
        (200, &true.into(), &true.into())
    );
    let score = |name: String| {
        let mut sources = all["sources"].as_array().unwrap().iter();
        sources.find(|source| source["name"] == name).unwrap()["score"].clone()
    };
    assert_eq!(score(format!("a@{up}")), 1.0);
    assert_eq!(score(format!("a@{down}")), 0.0);
    assert_eq!(all["gates"][0]["name"], "drain");
    assert_eq!(all["latches"][0]["released"], true);
    assert_eq!(proxy.metric("health_ready", &["name=\"proxy\""]).await, 1.0);
}

#[tokio::test]
async fn told_to_stop_it_finishes_what_it_has_begun() {
    for signal in ["TERM", "INT"] {
        let (upstream, go) = patient().await;
        let mut proxy = Proxy::start(&to(upstream.address)).await;
        let mut idle = Raw::connect(proxy.listen).await;
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        eventually("the request to arrive", || async {
            proxy.in_flight().await == 1.0
        })
        .await;
        proxy.signal(signal);
        assert_eq!(idle.rest().await, "");
        // No new ones; but the admin port still says that it lives.
        eventually("the port to close", || async {
            TcpStream::connect(proxy.listen).await.is_err()
        })
        .await;
        assert_eq!(fetch(proxy.admin, get("/health/live")).await.status(), 200);
        // Each connection hears of it by itself; nothing tells when all have.
        tokio::time::sleep(Duration::from_millis(250)).await;
        go.notify_one();
        let answer = raw.rest().await;
        assert!(
            answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("at last"),
            "{answer}"
        );
        assert!(answer.contains("connection: close"), "{answer}");
        assert_eq!(proxy.exit().await.code(), Some(0));
    }
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let (upstream, _go) = patient().await;
    let mut proxy = Proxy::start(&to(upstream.address)).await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the request to arrive", || async {
        proxy.in_flight().await == 1.0
    })
    .await;
    proxy.signal("TERM");
    proxy
        .logged("stopping", |line| line["message"] == "stopping")
        .await;
    proxy.signal("INT");
    assert_eq!(proxy.exit().await.code(), Some(1));
}

#[tokio::test]
async fn an_open_tunnel_is_in_flight_too() {
    let upstream = Upstream::raw(|mut stream| async move {
        read_head(&mut stream).await;
        let _ = stream
            .write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
            )
            .await;
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    })
    .await;
    let mut proxy = Proxy::start(&to(upstream.address)).await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        .await;
    raw.until("\r\n\r\n").await;
    proxy.signal("TERM");
    proxy
        .logged("stopping", |line| line["message"] == "stopping")
        .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    raw.send("still here").await;
    raw.until("still here").await;
    drop(raw);
    assert_eq!(proxy.exit().await.code(), Some(0));
}

#[tokio::test]
async fn an_http2_connection_may_be_opened_ahead_and_is_told_when_it_idles() {
    let upstream = Upstream::start(|_| async { reply("yes") }).await;
    let proxy = Proxy::start(&format!(
        "limits: {{ header_timeout: 300ms, idle_timeout: 1200ms }}\n{}",
        to(upstream.address)
    ))
    .await;
    let stream = TcpStream::connect(proxy.listen).await.unwrap();
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    // Longer than a head may take.
    tokio::time::sleep(Duration::from_millis(700)).await;
    for _ in 0..2 {
        let request = http::Request::get("http://a/")
            .body(Full::<bytes::Bytes>::default())
            .unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    // A GOAWAY, and no reset: the client's connection ends without an error.
    let start = Instant::now();
    soon("the end of an idle connection", connection)
        .await
        .unwrap()
        .unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn pings_keep_no_idle_connection_open() {
    let upstream = Upstream::start(|_| async { reply("yes") }).await;
    let proxy = Proxy::start(&format!(
        "limits: {{ header_timeout: 300ms, idle_timeout: 500ms }}\n{}",
        to(upstream.address)
    ))
    .await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    raw.send([0, 0, 0, 4, 0, 0, 0, 0, 0]).await;
    let (mut reads, mut writes) = raw.0.into_split();
    let pings = tokio::spawn(async move {
        let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        while writes.write_all(&ping).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let mut bytes = Vec::new();
    let end = timeout(Duration::from_secs(3), reads.read_to_end(&mut bytes)).await;
    pings.abort();
    assert!(end.is_ok(), "it is still open");
}
