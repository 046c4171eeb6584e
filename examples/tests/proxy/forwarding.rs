//! What a proxy does to a message on its way (RFC 9110, 9112 and 9113).

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, Version};
use http_body::Frame;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{
    Proxy, Raw, Upstream, eventually, fetch, get, json, read_head, reply, seen, soon, to,
};

/// One request over HTTP/2 with prior knowledge, and its trailers.
async fn fetch_h2<B>(proxy: &Proxy, request: Request<B>) -> (Response<Bytes>, Option<HeaderMap>)
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    soon("an answer over HTTP/2", async {
        let stream = TcpStream::connect(proxy.listen).await.unwrap();
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        let (head, body) = sender.send_request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap();
        let trailers = body.trailers().cloned();
        (Response::from_parts(head, body.to_bytes()), trailers)
    })
    .await
}

#[tokio::test]
async fn hop_by_hop_fields_stop_here_both_ways() {
    let upstream = Upstream::raw(|mut stream| async move {
        let head = read_head(&mut stream).await.unwrap().to_ascii_lowercase();
        let answer = format!(
            "HTTP/1.1 200 OK\r\nconnection: x-up-one\r\nConnection: X-Up-Two, close\r\nx-up-one: 1\r\nx-up-two: 2\r\nkeep-alive: timeout=1\r\nproxy-authenticate: Basic\r\nupgrade: h2c\r\nx-up-end: 3\r\ncontent-length: {}\r\n\r\n{head}",
            head.len()
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    let mut request = get("/");
    for (name, value) in [
        ("connection", "x-one"),
        ("connection", "X-Two, x-forwarded-for, x-request-id, host"),
        ("x-one", "1"),
        ("x-two", "2"),
        ("x-end", "3"),
        ("keep-alive", "timeout=1"),
        ("proxy-connection", "close"),
        ("proxy-authorization", "Basic eA=="),
        ("te", "gzip"),
        ("upgrade", "h2c"),
        ("x-three", "3"),
    ] {
        request.headers_mut().append(name, value.parse().unwrap());
    }
    // One name that is none hides no other.
    let junk = http::HeaderValue::from_bytes(b"\xff, x-three").unwrap();
    request.headers_mut().append("connection", junk);
    let response = fetch(proxy.listen, request).await;
    let head = String::from_utf8(response.body().to_vec()).unwrap();
    for gone in [
        "x-one",
        "x-two",
        "x-three",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "\nte:",
        "upgrade",
        "connection",
    ] {
        assert!(!head.contains(gone), "{gone}: {head}");
    }
    for here in [
        "x-end: 3",
        "host: test.example",
        "x-forwarded-for: 127.0.0.1",
        "x-request-id: ",
    ] {
        assert!(head.contains(here), "{here}: {head}");
    }
    let headers = response.headers();
    for gone in [
        "x-up-one",
        "x-up-two",
        "keep-alive",
        "proxy-authenticate",
        "upgrade",
        "connection",
    ] {
        assert!(!headers.contains_key(gone), "{headers:?}");
    }
    assert_eq!(headers["x-up-end"], "3");
}

#[tokio::test]
async fn forwarding_fields_are_added_to_for_the_trusted_and_replaced_for_others() {
    let upstream = Upstream::mirror().await;
    let claim = || {
        let mut request = get("/");
        for (name, value) in [
            ("x_forwarded_for", "192.0.2.9"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-for", "192.0.2.2"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "public.example"),
            ("forwarded", "for=192.0.2.3"),
            ("via", "2 edge"),
        ] {
            request.headers_mut().append(name, value.parse().unwrap());
        }
        request
    };

    let proxy = Proxy::start(&to(upstream.address)).await;
    let response = fetch(proxy.listen, claim()).await;
    assert_eq!(seen(&response, "x-forwarded-for"), ["127.0.0.1"]);
    assert!(seen(&response, "x_forwarded_for").is_empty());
    assert_eq!(seen(&response, "x-forwarded-proto"), ["http"]);
    assert_eq!(seen(&response, "x-forwarded-host"), ["test.example"]);
    assert!(seen(&response, "forwarded").is_empty());
    let via = seen(&response, "via").join(", ");
    assert!(via.starts_with("1.1 ") && !via.contains("edge"), "{via}");

    let trusting = format!("trusted_proxies: [127.0.0.0/8]\n{}", to(upstream.address));
    let proxy = Proxy::start(&trusting).await;
    let response = fetch(proxy.listen, claim()).await;
    assert_eq!(
        seen(&response, "x-forwarded-for"),
        ["192.0.2.1, 192.0.2.2, 127.0.0.1"]
    );
    assert_eq!(seen(&response, "x-forwarded-proto"), ["https"]);
    assert_eq!(seen(&response, "x-forwarded-host"), ["public.example"]);
    assert_eq!(seen(&response, "forwarded"), ["for=192.0.2.3"]);
    let via = seen(&response, "via").join(", ");
    assert!(via.starts_with("2 edge, 1.1 "), "{via}");

    // A chain that came in `Forwarded` is not lost on who reads the other.
    let mut request = get("/");
    request
        .headers_mut()
        .insert("forwarded", "for=192.0.2.3".parse().unwrap());
    let response = fetch(proxy.listen, request).await;
    assert_eq!(seen(&response, "x-forwarded-for"), ["192.0.2.3, 127.0.0.1"]);
}

#[tokio::test]
async fn the_host_is_kept_and_must_be_one() {
    let upstream = Upstream::mirror().await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    assert_eq!(seen(&proxy.get("/").await, "host"), ["test.example"]);
    assert_eq!(
        json(&proxy.get("/a%2Fb/c?d=%20e").await)["uri"],
        "/a%2Fb/c?d=%20e"
    );

    // What was meant for another process first names it in the target.
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET http://target.example/x HTTP/1.1\r\nhost: other\r\nconnection: close\r\n\r\n")
        .await;
    let answer = raw.rest().await;
    assert!(
        answer.contains("[\"host\",\"target.example\"]") && answer.contains("\"uri\":\"/x\""),
        "{answer}"
    );

    for head in [
        "GET / HTTP/1.1\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n",
        "GET / HTTP/1.1\r\nhost: a/b\r\n",
        "GET / HTTP/1.1\r\nhost: user@a\r\n",
        "GET http://a/ HTTP/1.1\r\n",
        "GET http://user@a/ HTTP/1.1\r\nhost: a\r\n",
        "GET /../etc HTTP/1.1\r\nhost: a\r\n",
        "GET /x/..;/etc HTTP/1.1\r\nhost: a\r\n",
        "GET /x/%2e%2E/etc HTTP/1.1\r\nhost: a\r\n",
    ] {
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send(format!("{head}connection: close\r\n\r\n")).await;
        let answer = raw.rest().await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{head}: {answer}");
    }
    // HTTP/1.0 knows no Host.
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET /old HTTP/1.0\r\n\r\n").await;
    let answer = raw.rest().await;
    assert!(
        answer.starts_with("HTTP/1.0 200 ") && answer.contains("/old"),
        "{answer}"
    );
    assert_eq!(
        upstream
            .connections
            .load(std::sync::atomic::Ordering::SeqCst),
        1
    );
}

#[tokio::test]
async fn the_longest_prefix_wins_on_whole_segments_and_a_hosts_own_first() {
    let upstream = Upstream::mirror().await;
    let url = upstream.address;
    let route = |name: &str, rest: &str| {
        format!("- {{ name: {name}, upstream: ['http://{url}'], {rest} }}\n")
    };
    let proxy = Proxy::start(&format!(
        "routes:\n{}{}{}{}",
        route("a", "path: /a"),
        route("ab", "path: /a/b/, strip_prefix: true"),
        route("host", "path: /, host: own.example"),
        route("hosta", "path: /a/b, host: own.example, strip_prefix: true"),
    ))
    .await;
    for (host, path, route, uri) in [
        ("x", "/a", "a", "/a"),
        ("x", "/a/", "a", "/a/"),
        ("x", "/a/bc?d", "a", "/a/bc?d"),
        ("x", "/a/b", "ab", "/"),
        ("x", "/a/b/", "ab", "/"),
        ("x", "/a/b/c?d=e", "ab", "/c?d=e"),
        ("OWN.example:8080", "/ab", "host", "/ab"),
        ("own.example", "/a", "host", "/a"),
        ("own.example", "/a/b?x", "hosta", "/?x"),
        // Another spelling is no way round a route and its limits.
        ("x", "/%61/x", "a", "/%61/x"),
        ("x", "//a", "a", "//a"),
        ("x", "/a/%62/c%20d?e", "ab", "/c%20d?e"),
        ("own.example.", "/q", "host", "/q"),
    ] {
        let mut request = get(path);
        request.headers_mut().insert("host", host.parse().unwrap());
        let response = fetch(proxy.listen, request).await;
        assert_eq!(json(&response)["uri"], uri, "{host} {path}");
        let line = proxy.access(path.split('?').next().unwrap()).await;
        assert_eq!(line["route"], route, "{host} {path}");
    }
    assert_eq!(proxy.get("/ab").await.status(), 404);
    assert_eq!(proxy.get("/").await.status(), 404);
}

#[tokio::test]
async fn ids_are_passed_on_or_made() {
    let upstream = Upstream::mirror().await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    let mut request = get("/given");
    request
        .headers_mut()
        .insert("x-request-id", "abc-123".parse().unwrap());
    request
        .headers_mut()
        .insert("traceparent", parent.parse().unwrap());
    let response = fetch(proxy.listen, request).await;
    assert_eq!(seen(&response, "x-request-id"), ["abc-123"]);
    assert_eq!(seen(&response, "traceparent"), [parent]);
    assert_eq!(response.headers()["x-request-id"], "abc-123");
    assert_eq!(proxy.access("/given").await["request_id"], "abc-123");

    let mut request = get("/made");
    request
        .headers_mut()
        .insert("x-request-id", "not an id".parse().unwrap());
    let response = fetch(proxy.listen, request).await;
    let id = seen(&response, "x-request-id").join(" ");
    assert_eq!(id.len(), 32);
    assert_eq!(proxy.access("/made").await["request_id"], id.as_str());
    assert_eq!(seen(&response, "traceparent").join(" ").len(), 55);
    assert_ne!(seen(&proxy.get("/").await, "x-request-id"), [id]);
}

/// A body of one chunk, with trailers.
fn with_trailers() -> Frames {
    let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), "42".parse().unwrap())]);
    Frames([Frame::trailers(trailers), Frame::data(Bytes::from("hello"))].into())
}

/// A body of these frames, the last one first.
struct Frames(Vec<Frame<Bytes>>);

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(self.0.pop().map(Ok))
    }
}

#[tokio::test]
async fn trailers_pass_both_ways_on_both_protocols() {
    let upstream = Upstream::start(|request| async move {
        let te = request.headers().get("te").cloned();
        let body = request.into_body().collect().await.unwrap();
        let sum = body.trailers().map(|trailers| trailers["x-sum"].clone());
        let mut response =
            reply("").map(|_| with_trailers().map_err(|never| match never {}).boxed());
        let headers = response.headers_mut();
        headers.insert("trailer", "x-sum".parse().unwrap());
        headers.insert("x-te", te.unwrap_or_else(|| "none".parse().unwrap()));
        headers.insert("x-saw", sum.unwrap_or_else(|| "none".parse().unwrap()));
        response
    })
    .await;
    for scheme in ["http", "h2c"] {
        let url = upstream.address;
        let proxy = Proxy::start(&format!(
            "routes: [{{ name: a, path: /, upstream: ['{scheme}://{url}'] }}]"
        ))
        .await;

        let mut raw = Raw::connect(proxy.listen).await;
        raw.send("POST / HTTP/1.1\r\nhost: a\r\nte: trailers, gzip\r\nconnection: te, close\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx-sum: 42\r\n\r\n").await;
        let answer = raw.rest().await;
        assert!(answer.contains("x-saw: 42\r\n"), "{scheme}: {answer}");
        assert!(answer.contains("x-te: trailers\r\n"), "{scheme}: {answer}");
        assert!(
            answer.ends_with("0\r\nx-sum: 42\r\n\r\n"),
            "{scheme}: {answer}"
        );

        let request = Request::post("http://test.example/")
            .header("te", "trailers")
            .header("trailer", "x-sum")
            .body(with_trailers())
            .unwrap();
        let (response, trailers) = fetch_h2(&proxy, request).await;
        assert_eq!(response.version(), Version::HTTP_2);
        assert_eq!(response.headers()["x-saw"], "42", "{scheme}");
        assert_eq!(response.body(), "hello");
        assert_eq!(trailers.unwrap()["x-sum"], "42", "{scheme}");
    }
}

#[tokio::test]
async fn http2_clients_and_upstreams_are_spoken_to_in_their_way() {
    let upstream = Upstream::mirror().await;
    for (scheme, version) in [("http", "HTTP/1.1"), ("h2c", "HTTP/2.0")] {
        let url = upstream.address;
        let proxy = Proxy::start(&format!(
            "routes: [{{ name: a, path: /, upstream: ['{scheme}://{url}'] }}]"
        ))
        .await;
        let request = Request::post("http://test.example/x?y")
            .header("cookie", "a=1")
            .header("cookie", "b=2")
            .body(Full::from("hello"))
            .unwrap();
        let (response, _) = fetch_h2(&proxy, request).await;
        let mirrored = json(&response);
        assert_eq!(mirrored["version"], version);
        assert_eq!(mirrored["body"], "hello");
        if scheme == "http" {
            assert_eq!(seen(&response, "host"), ["test.example"]);
            assert_eq!(seen(&response, "cookie"), ["a=1; b=2"]);
        } else {
            assert_eq!(mirrored["uri"], "http://test.example/x?y");
        }
        assert!(seen(&response, "via").join("").starts_with("2 "));

        let mirrored = json(&proxy.get("/h1").await);
        assert_eq!(mirrored["version"], version);

        // Host and :authority must not differ.
        let request = Request::get("http://test.example/").header("host", "other.example");
        let (response, _) = fetch_h2(&proxy, request.body(Full::<Bytes>::default()).unwrap()).await;
        assert_eq!(response.status(), 400);
    }
}

#[tokio::test]
async fn the_upstream_says_continue_not_the_proxy() {
    let heads: Arc<Mutex<Vec<String>>> = Arc::default();
    let record = Arc::clone(&heads);
    let upstream = Upstream::raw(move |mut stream| {
        let record = Arc::clone(&record);
        async move {
            let Some(head) = read_head(&mut stream).await else {
                return;
            };
            let path = head.split(' ').nth(1).unwrap().to_owned();
            record.lock().unwrap().push(head);
            if path == "/no" {
                let _ = stream
                    .write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno")
                    .await;
                // It would be a fault to see a body now.
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
                record
                    .lock()
                    .unwrap()
                    .push(format!("after no: {}", rest.len()));
                return;
            }
            // Nothing may come before it is asked for.
            let mut byte = [0];
            let early = tokio::time::timeout(
                std::time::Duration::from_millis(200),
                stream.peek(&mut byte),
            )
            .await;
            record
                .lock()
                .unwrap()
                .push(format!("early: {}", early.is_ok()));
            if path == "/yes" {
                stream
                    .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                    .await
                    .unwrap();
            }
            let mut body = [0; 5];
            stream.read_exact(&mut body).await.unwrap();
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
                .await;
            let _ = stream.write_all(&body).await;
        }
    })
    .await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    let ask = |path: &str| {
        format!(
            "PUT {path} HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n"
        )
    };

    let mut raw = Raw::connect(proxy.listen).await;
    raw.send(ask("/yes")).await;
    assert_eq!(raw.until("\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    raw.send("hello").await;
    assert!(raw.until("hello").await.starts_with("HTTP/1.1 200 "));

    // An upstream that knows no 100 gets the body after a while.
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send(ask("/silent")).await;
    assert_eq!(raw.until("\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    raw.send("hello").await;
    assert!(raw.until("hello").await.starts_with("HTTP/1.1 200 "));

    let mut raw = Raw::connect(proxy.listen).await;
    raw.send(ask("/no")).await;
    assert!(raw.until("no").await.starts_with("HTTP/1.1 403 "));
    let refused = tokio::time::Instant::now();

    let all = || heads.lock().unwrap().clone();
    eventually("the refusing upstream's connection to close", || async {
        all().iter().any(|line| line.starts_with("after no"))
    })
    .await;
    // At once, and not when the patience with silent ones is over.
    assert!(
        refused.elapsed().as_millis() < 700,
        "{:?}",
        refused.elapsed()
    );
    let all = all();
    assert!(all.iter().any(|line| line == "after no: 0"), "{all:?}");
    assert_eq!(
        all.iter().filter(|line| *line == "early: false").count(),
        2,
        "{all:?}"
    );
    assert!(all[0].contains("expect: 100-continue"), "{all:?}");
    assert_eq!(proxy.in_flight().await, 0.0);
}

#[tokio::test]
async fn an_upgrade_becomes_a_tunnel_once_the_upstream_says_so() {
    let upstream = Upstream::raw(|mut stream| async move {
        let Some(head) = read_head(&mut stream).await else { return };
        let head = head.to_ascii_lowercase();
        if !head.contains("upgrade: echo") || !head.contains("connection: upgrade") || head.starts_with("get /no") {
            let _ = stream.write_all(b"HTTP/1.1 426 Upgrade Required\r\ncontent-length: 0\r\n\r\n").await;
            return;
        }
        stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: echo\r\n\r\nfirst")
            .await
            .unwrap();
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    })
    .await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    let ask = |path: &str, protocol: &str| {
        format!(
            "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, Upgrade\r\nupgrade: {protocol}\r\n\r\n"
        )
    };

    let mut raw = Raw::connect(proxy.listen).await;
    raw.send(ask("/yes", "echo")).await;
    let head = raw.until("\r\n\r\n").await.to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 "), "{head}");
    assert!(
        head.contains("upgrade: echo") && head.contains("connection: upgrade"),
        "{head}"
    );
    assert_eq!(raw.until("first").await, "first");
    raw.send("ping").await;
    assert_eq!(raw.until("ping").await, "ping");
    assert_eq!(proxy.in_flight().await, 1.0);
    raw.0.shutdown().await.unwrap();
    assert_eq!(raw.rest().await, "");
    let line = proxy.access("/yes").await;
    assert_eq!(line["status"], 101);
    assert_eq!(line["bytes"], 9);
    assert_eq!(proxy.in_flight().await, 0.0);

    // Refused by the upstream, and HTTP/2, to which it is never asked.
    for (path, protocol) in [("/no", "echo"), ("/h2", "h2c")] {
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send(ask(path, protocol)).await;
        assert!(raw.until("\r\n\r\n").await.starts_with("HTTP/1.1 426 "));
    }
}

#[tokio::test]
async fn a_tunnel_closes_each_way_by_itself() {
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    let upstream = Upstream::raw(move |mut stream| {
        let tell = tell.clone();
        async move {
            read_head(&mut stream).await;
            let head =
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nbye";
            stream.write_all(head).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
            tell.send(rest.len()).await.unwrap();
        }
    })
    .await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")
        .await;
    raw.until("\r\n\r\nbye").await;
    assert_eq!(raw.rest().await, "");
    for _ in 0..20 {
        raw.send([b'x'; 1000]).await;
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    raw.0.shutdown().await.unwrap();
    assert_eq!(soon("the upstream's end", told.recv()).await, Some(20_000));
}

#[tokio::test]
async fn ambiguous_framing_never_reaches_the_upstream() {
    let arrived: Arc<Mutex<Vec<u8>>> = Arc::default();
    let record = Arc::clone(&arrived);
    // Says yes to all, and remembers every byte.
    let upstream = Upstream::raw(move |mut stream| {
        let record = Arc::clone(&record);
        async move {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                record.lock().unwrap().extend_from_slice(&buffer[..n]);
                let whole = record.lock().unwrap().clone();
                if whole.ends_with(b"\r\n\r\n") || whole.ends_with(b"hello") {
                    let _ = stream
                        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                        .await;
                }
            }
        }
    })
    .await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    let smuggled = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
    for (framing, body) in [
        // Two lengths.
        ("content-length: 5\r\ncontent-length: 6\r\n", "hello"),
        ("content-length: 5, 6\r\n", "hello"),
        ("content-length: +5\r\n", "hello"),
        ("content-length: 0x5\r\n", "hello"),
        ("content-length: -5\r\n", "hello"),
        ("content-length : 5\r\n", "hello"),
        // Two framings, in all their disguises.
        (
            "content-length: 4\r\ntransfer-encoding: chunked\r\n",
            "0\r\n\r\nSMUGGLED",
        ),
        (
            "transfer-encoding: chunked\r\ncontent-length: 4\r\n",
            "0\r\n\r\nSMUGGLED",
        ),
        (
            "transfer-encoding: xchunked\r\ncontent-length: 5\r\n",
            "hello",
        ),
        (
            "transfer-encoding : chunked\r\ncontent-length: 5\r\n",
            "0\r\n\r\nSMUGGLED",
        ),
        (
            "transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
            "0\r\n\r\n",
        ),
        (
            "transfer-encoding: chunked, identity\r\ncontent-length: 5\r\n",
            "hello",
        ),
        ("transfer-encoding: gzip, chunked\r\n", "0\r\n\r\n"),
        (
            "transfer-encoding: \u{ff}\r\ntransfer-encoding: chunked\r\n",
            "0\r\n\r\n",
        ),
        ("transfer-encoding: chunked, chunked\r\n", "0\r\n\r\n"),
        (
            "transfer-encoding:\x0bchunked\r\ncontent-length: 5\r\n",
            "0\r\n\r\nSMUGGLED",
        ),
        (
            "transfer-encoding:\r\n chunked\r\ncontent-length: 5\r\n",
            "0\r\n\r\nSMUGGLED",
        ),
        // Chunks that are none.
        (
            "transfer-encoding: chunked\r\n",
            "xyz\r\nhello\r\n0\r\n\r\n",
        ),
        ("transfer-encoding: chunked\r\n", "-5\r\nhello\r\n0\r\n\r\n"),
        ("transfer-encoding: chunked\r\n", "5\r\nhelloX0\r\n\r\n"),
        (
            "transfer-encoding: chunked\r\n",
            "ffffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        ),
    ] {
        arrived.lock().unwrap().clear();
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send(format!(
            "POST /x HTTP/1.1\r\nhost: a\r\n{framing}\r\n{body}{smuggled}"
        ))
        .await;
        raw.0.shutdown().await.unwrap();
        let answer = raw.rest().await;
        let arrived = String::from_utf8_lossy(&arrived.lock().unwrap()).to_ascii_lowercase();
        let heads = arrived.matches("http/1.1\r\n").count();
        let lengths = arrived.matches("content-length:").count();
        let codings = arrived.matches("transfer-encoding:").count();
        // One reading only: either nothing arrived, or one framing, and what
        // the client hid in the body is not a request of its own.
        assert!(lengths + codings <= heads, "{framing:?}: {arrived}");
        assert!(
            codings == 0 || arrived.contains("transfer-encoding: chunked\r\n"),
            "{framing:?}: {arrived}"
        );
        assert!(!arrived.contains("smuggled"), "{framing:?}: {arrived}");
        let status = answer.split(' ').nth(1).unwrap_or("");
        assert!(
            matches!(status, "" | "200" | "400" | "501" | "502"),
            "{framing:?}: {answer}"
        );
        if !framing.contains("content-length: 4") {
            assert_ne!(status, "200", "{framing:?}: {arrived}");
        }
    }
    // A length said twice is one length.
    arrived.lock().unwrap().clear();
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("POST /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello").await;
    assert!(raw.rest().await.starts_with("HTTP/1.1 200 "));
    let arrived = String::from_utf8_lossy(&arrived.lock().unwrap()).into_owned();
    assert_eq!(arrived.matches("content-length:").count(), 1, "{arrived}");
}

#[tokio::test]
async fn answers_with_two_framings_or_none_are_read_in_one_way() {
    for (answer, body) in [
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            "hello",
        ),
        (
            "HTTP/1.1 200 OK\r\nconnection: transfer-encoding\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            "hello",
        ),
        ("HTTP/1.0 200 OK\r\n\r\nuntil the end", "until the end"),
        ("HTTP/1.1 204 No Content\r\n\r\n", ""),
        (
            "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            "ok",
        ),
    ] {
        let upstream = Upstream::raw(move |mut stream| async move {
            read_head(&mut stream).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        })
        .await;
        let proxy = Proxy::start(&to(upstream.address)).await;
        let response = proxy.get("/").await;
        assert_eq!(response.body(), body, "{answer}");
        let length = response.headers().get("content-length");
        assert!(
            length.is_none_or(|length| *length == body.len().to_string().as_str()),
            "{response:?}"
        );
    }
}

#[tokio::test]
async fn head_and_empty_answers_keep_their_headers_and_the_connection() {
    let upstream = Upstream::raw(|mut stream| async move {
        while let Some(head) = read_head(&mut stream).await {
            let answer: &[u8] = if head.starts_with("HEAD") {
                b"HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n"
            } else {
                b"HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\n\r\n"
            };
            if stream.write_all(answer).await.is_err() {
                return;
            }
        }
    })
    .await;
    let proxy = Proxy::start(&to(upstream.address)).await;
    let mut raw = Raw::connect(proxy.listen).await;
    for _ in 0..3 {
        raw.send("HEAD / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        assert!(raw.until("\r\n\r\n").await.contains("content-length: 1234"));
        raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        assert!(raw.until("\r\n\r\n").await.contains("etag: \"x\""));
    }
    assert_eq!(
        upstream
            .connections
            .load(std::sync::atomic::Ordering::SeqCst),
        1
    );
    assert_eq!(proxy.in_flight().await, 0.0);
}
