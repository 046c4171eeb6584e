//! What a client gets: the limiter's numbers, and each kind of refusal.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::Request;
use http_body_util::Full;
use tokio::{io::AsyncWriteExt, time::Instant};

use crate::support::{
    Proxy, Raw, Upstream, fetch, get, nobody, number, problem, read_head, reply, to,
};

#[expect(
    clippy::disallowed_methods,
    reason = "it is what the headers are compared with"
)]
fn unix_now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

/// A route with this limit, and an upstream that says yes.
async fn limited(rule: &str) -> (Proxy, Upstream) {
    let upstream = Upstream::start(|_| async { reply("yes") }).await;
    let url = upstream.address;
    let proxy = Proxy::start(&format!(
        "trusted_proxies: [127.0.0.1]\nroutes: [{{ name: a, path: /, upstream: ['http://{url}'], rate_limit: {rule} }}]"
    ))
    .await;
    (proxy, upstream)
}

#[tokio::test]
async fn every_answer_tells_the_limit_in_exact_numbers() {
    // One comes back every 20 s, so that no second can pass in between.
    let (proxy, _upstream) = limited("{ limit: 3, period: 60s, burst: 4, key: global }").await;
    for spent in 1..=4_u64 {
        let before = unix_now();
        let response = proxy.get("/").await;
        let after = unix_now();
        let headers = response.headers();
        assert_eq!(response.status(), 200);
        assert_eq!(number(headers, "x-ratelimit-limit"), 4);
        assert_eq!(number(headers, "x-ratelimit-remaining"), 4 - spent);
        let reset = number(headers, "x-ratelimit-reset") as f64;
        let whole = 20.0 * spent as f64;
        // Rounded up, and what has come back since the first is not owed.
        assert!(
            reset >= (before + whole - 2.0).ceil(),
            "{reset} after {before}"
        );
        assert!(reset <= (after + whole).ceil(), "{reset} after {after}");
        assert!(!headers.contains_key("retry-after"));
        assert!(!headers.contains_key("ratelimit"));
    }
    let refused = proxy.get("/").await;
    problem(&refused, 429, "rate_limited");
    assert_eq!(number(refused.headers(), "x-ratelimit-limit"), 4);
    assert_eq!(number(refused.headers(), "x-ratelimit-remaining"), 0);
    let wait = number(refused.headers(), "retry-after");
    assert!((19..=20).contains(&wait), "{wait}");
}

#[tokio::test]
async fn who_waits_as_told_is_let_in() {
    let (proxy, _upstream) = limited("{ limit: 2, period: 3s, burst: 1, key: global }").await;
    assert_eq!(proxy.get("/").await.status(), 200);
    let refused = proxy.get("/").await;
    assert_eq!(refused.status(), 429);
    let wait = number(refused.headers(), "retry-after");
    assert_eq!(wait, 2);
    let start = Instant::now();
    tokio::time::sleep(Duration::from_secs(wait)).await;
    assert_eq!(
        proxy.get("/").await.status(),
        200,
        "after {:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn clients_are_told_apart_by_the_key() {
    let ask = |proxy: &Proxy, name: &'static str, value: &'static str| {
        let mut request = get("/");
        if !name.is_empty() {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        let answer = fetch(proxy.listen, request);
        async move { answer.await.status().as_u16() }
    };

    let (proxy, _upstream) = limited("{ limit: 1, period: 60s, key: 'header:X-Api-Key' }").await;
    assert_eq!(ask(&proxy, "x-api-key", "one").await, 200);
    assert_eq!(ask(&proxy, "x-api-key", "two").await, 200);
    assert_eq!(ask(&proxy, "x-api-key", "one").await, 429);
    // Without one it is the address, which has a quota of its own.
    assert_eq!(ask(&proxy, "", "").await, 200);
    assert_eq!(ask(&proxy, "", "").await, 429);

    let (proxy, _upstream) = limited("{ limit: 1, period: 60s, key: 'cookie:id' }").await;
    assert_eq!(ask(&proxy, "cookie", "a=b; id=one").await, 200);
    assert_eq!(ask(&proxy, "cookie", "id=two").await, 200);
    assert_eq!(ask(&proxy, "cookie", "id=one; c=d").await, 429);

    // The peer is trusted here, so that it may name the client.
    let (proxy, _upstream) = limited("{ limit: 1, period: 60s }").await;
    assert_eq!(ask(&proxy, "x-forwarded-for", "192.0.2.1").await, 200);
    assert_eq!(ask(&proxy, "x-forwarded-for", "192.0.2.2").await, 200);
    assert_eq!(
        ask(&proxy, "x-forwarded-for", "9.9.9.9, 192.0.2.1").await,
        429
    );
    // IPv6 counts by /64.
    assert_eq!(ask(&proxy, "x-forwarded-for", "2001:db8::1").await, 200);
    assert_eq!(
        ask(&proxy, "x-forwarded-for", "2001:db8::ffff:1").await,
        429
    );
    assert_eq!(ask(&proxy, "x-forwarded-for", "2001:db8:0:1::1").await, 200);
}

#[tokio::test]
async fn the_drafts_headers_are_there_if_asked_for() {
    let (proxy, _upstream) = limited("{ limit: 5, headers: [x-ratelimit, draft] }").await;
    let headers = proxy.get("/").await.headers().clone();
    for name in ["x-ratelimit-limit", "ratelimit", "ratelimit-policy"] {
        assert!(headers.contains_key(name), "{headers:?}");
    }
    let (proxy, _upstream) = limited("{ limit: 5, headers: [] }").await;
    let headers = proxy.get("/").await.headers().clone();
    assert!(
        headers
            .keys()
            .all(|name| !name.as_str().contains("ratelimit")),
        "{headers:?}"
    );
}

/// A host that is gone says nothing at all, as a socket does whose queue of
/// connections is full. Connecting has two seconds; then another endpoint has
/// its turn, or the answer is that time ran out.
#[tokio::test]
async fn an_endpoint_that_does_not_answer_costs_two_seconds() {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let silent = socket.listen(0).unwrap();
    let silent = (silent.local_addr().unwrap(), silent);
    let mut queued = Vec::new();
    loop {
        let connect = tokio::net::TcpStream::connect(silent.0);
        match tokio::time::timeout(Duration::from_millis(200), connect).await {
            Ok(stream) => queued.push(stream.unwrap()),
            Err(_) => break,
        }
        assert!(queued.len() < 100, "the queue never fills");
    }
    let alive = Upstream::mirror().await;
    let proxy = Proxy::start(&format!(
        "routes:
- {{ name: alone, path: /alone, upstream: ['http://{0}'] }}
- {{ name: both, path: /both, upstream: ['http://{0}', 'http://{1}'] }}
- {{ name: hurry, path: /hurry, upstream: ['http://{0}', 'http://{1}'], timeout: 1s }}
- {{ name: h2c, path: /h2c, upstream: ['h2c://{0}', 'http://{1}'] }}
",
        silent.0, alive.address
    ))
    .await;
    let before = tokio::time::Instant::now();
    problem(&proxy.get("/alone").await, 504, "timed_out");
    let took = before.elapsed();
    assert!((1500..4000).contains(&took.as_millis()), "{took:?}");
    // Whichever of the two is picked first.
    for _ in 0..3 {
        assert_eq!(proxy.get("/both").await.status(), 200);
    }
    // Less, where that would leave no time for the other.
    for _ in 0..5 {
        assert_eq!(proxy.get("/hurry").await.status(), 200);
    }
    // And once, for all that wait for the same connection.
    let before = tokio::time::Instant::now();
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..20 {
        all.spawn(fetch(proxy.listen, get("/h2c")));
    }
    while let Some(response) = all.join_next().await {
        assert_eq!(response.unwrap().status(), 200);
    }
    let took = before.elapsed();
    assert!(took.as_millis() < 4000, "{took:?}");
}

#[tokio::test]
async fn the_limiter_is_outermost() {
    // Of errors, too: the upstream's, the proxy's, and what is too large.
    let (dead, slow) = (
        nobody().await,
        Upstream::raw(|stream| async move {
            tokio::time::sleep(Duration::from_secs(60)).await;
            drop(stream);
        })
        .await,
    );
    let limit = "rate_limit: { limit: 9, period: 60s }";
    let proxy = Proxy::start(&format!(
        "limits: {{ max_body: 10B, max_path: 100B, max_headers: 1KiB }}
routes:
- {{ name: dead, path: /dead, upstream: ['http://{dead}'], {limit} }}
- {{ name: slow, path: /slow, upstream: ['http://{}'], timeout: 100ms, {limit} }}
",
        slow.address
    ))
    .await;
    let body = |length: usize| {
        let body = Full::from(vec![b'x'; length]);
        Request::post("/dead")
            .header("host", "a")
            .body(body)
            .unwrap()
    };
    let mut wide = get("/dead");
    wide.headers_mut()
        .insert("x-wide", "x".repeat(1200).parse().unwrap());

    let answers = [
        (proxy.get("/dead").await, 502, "bad_gateway"),
        (proxy.get("/slow").await, 504, "timed_out"),
        (fetch(proxy.listen, body(11)).await, 413, "body_too_large"),
        (
            proxy.get(&format!("/dead/{}", "x".repeat(100))).await,
            414,
            "uri_too_long",
        ),
        (fetch(proxy.listen, wide).await, 431, "headers_too_large"),
    ];
    for (response, status, reason) in answers {
        problem(&response, status, reason);
        assert_eq!(response.headers()["x-ratelimit-limit"], "9");
    }
    // Without a route there is no limit.
    let nowhere = proxy.get("/nowhere").await;
    problem(&nowhere, 404, "no_route");
    assert!(!nowhere.headers().contains_key("x-ratelimit-limit"));
    problem(
        &proxy.get(&format!("/{}", "x".repeat(100))).await,
        414,
        "uri_too_long",
    );
    // At the limit is not over it.
    assert_eq!(fetch(proxy.listen, body(10)).await.status(), 502);
    assert_eq!(
        proxy
            .get(&format!("/dead/{}", "x".repeat(94)))
            .await
            .status(),
        502
    );
}

#[tokio::test]
async fn sizes_far_above_the_defaults_get_a_document_too() {
    let upstream = Upstream::raw(|mut stream| async move {
        let head = read_head(&mut stream).await.unwrap();
        // What came in a head may go back in one.
        let (_, fields) = head.split_once("\r\n").unwrap();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n{fields}");
        let _ = stream.write_all(answer.as_bytes()).await;
    })
    .await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    problem(
        &proxy.get(&format!("/{}", "x".repeat(9 << 10))).await,
        414,
        "uri_too_long",
    );
    problem(
        &proxy.get(&format!("/{}", "x".repeat(40 << 10))).await,
        414,
        "uri_too_long",
    );
    for size in [66 << 10, 120 << 10] {
        let mut request = get("/");
        request
            .headers_mut()
            .insert("x-wide", "x".repeat(size).parse().unwrap());
        problem(
            &fetch(proxy.listen, request).await,
            431,
            "headers_too_large",
        );
    }
    // Two hundred small fields are no crime.
    let mut many = get("/");
    for index in 0..200 {
        let name: http::HeaderName = format!("x-{index}").parse().unwrap();
        many.headers_mut().insert(name, "1".parse().unwrap());
    }
    assert_eq!(fetch(proxy.listen, many).await.status(), 200);
}

#[tokio::test]
async fn a_body_that_grows_past_the_limit_is_413_and_breaks_off_upstream() {
    let (ended, mut end) = tokio::sync::mpsc::channel(1);
    let upstream = Upstream::start(move |request| {
        let ended = ended.clone();
        async move {
            use http_body_util::BodyExt;
            let whole = request.into_body().collect().await.is_ok();
            ended.send(whole).await.unwrap();
            reply("read it")
        }
    })
    .await;
    let proxy = Proxy::start(&format!(
        "limits: {{ max_body: 100KiB }}\n{}",
        to(upstream.address)
    ))
    .await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        .await;
    for _ in 0..11 {
        raw.send(format!("2800\r\n{}\r\n", "x".repeat(0x2800)))
            .await;
    }
    let answer = raw.until("}").await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert_eq!(end.recv().await, Some(false));
}

#[tokio::test]
async fn a_client_that_sends_all_before_it_reads_still_gets_its_413() {
    let upstream = Upstream::start(|_| async { reply("yes") }).await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    let body = vec![b'x'; 12 << 20];
    for _ in 0..5 {
        let mut raw = Raw::connect(proxy.listen).await;
        let head = format!(
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        raw.send(head).await;
        raw.send(&body).await;
        let answer = raw.rest().await;
        assert!(
            answer.starts_with("HTTP/1.1 413 ") && answer.ends_with('}'),
            "{answer}"
        );
    }
    assert_eq!(
        upstream
            .connections
            .load(std::sync::atomic::Ordering::SeqCst),
        0
    );
}

#[tokio::test]
async fn an_upstream_that_resets_or_babbles_is_502() {
    for nonsense in [
        "",
        "hello\r\n\r\n",
        "HTTP/1.1 abc\r\n\r\n",
        // Without the word, the bytes would be taken for what they are not.
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    ] {
        let upstream = Upstream::raw(move |mut stream| async move {
            read_head(&mut stream).await;
            let _ = stream.write_all(nonsense.as_bytes()).await;
        })
        .await;
        let proxy = Proxy::start(&to(upstream.address)).await;
        problem(&proxy.get("/").await, 502, "bad_gateway");
        let line = proxy.access("/").await;
        assert!(line["error"].is_string(), "{line}");
    }
}

#[tokio::test]
async fn a_loop_is_508() {
    // The proxy is its own upstream.
    let listen = nobody().await;
    let path = crate::support::file(&to(listen));
    let flags = ["--config", path.to_str().unwrap(), "--admin", "127.0.0.1:0"];
    let mut command = crate::support::program();
    command.args(["--listen", &listen.to_string()]).args(flags);
    let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    crate::support::eventually("listening", || async {
        tokio::net::TcpStream::connect(listen).await.is_ok()
    })
    .await;
    let response = fetch(listen, get("/")).await;
    child.kill().unwrap();
    child.wait().unwrap();
    problem(&response, 508, "loop_detected");
}

#[tokio::test]
async fn grpc_gets_trailers_only() {
    let dead = nobody().await;
    let slow = Upstream::raw(|stream| async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(stream);
    })
    .await;
    let proxy = Proxy::start(&format!(
        "limits: {{ max_path: 100B }}
routes:
- {{ name: few, path: /few, upstream: ['http://{dead}'], rate_limit: {{ limit: 1, period: 60s }} }}
- {{ name: slow, path: /slow, upstream: ['http://{}'], timeout: 100ms }}
",
        slow.address
    ))
    .await;
    let call = |path: String| {
        let request = Request::post(path)
            .header("host", "a")
            .header("content-type", "application/grpc+proto")
            .body(Full::default())
            .unwrap();
        fetch(proxy.listen, request)
    };
    for (path, code) in [
        ("/few".to_owned(), "14"),
        ("/few".to_owned(), "8"),
        ("/slow".to_owned(), "4"),
        ("/slow?".to_owned() + &"x".repeat(100), "8"),
        ("/none".to_owned(), "12"),
    ] {
        let response = call(path.clone()).await;
        assert_eq!(response.status(), 200, "{path}");
        assert_eq!(response.headers()["grpc-status"], code, "{path}");
        assert!(response.headers().contains_key("grpc-message"));
        assert_eq!(response.headers()["content-type"], "application/grpc");
        assert!(response.body().is_empty());
        assert_eq!(
            response.headers().contains_key("grpc-retry-pushback-ms"),
            code == "8" && path == "/few"
        );
    }
}
