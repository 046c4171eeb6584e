//! Retries: what goes again, where to and when, and what ends it.

use std::{
    future::pending,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{task::JoinSet, time::Instant};

use crate::support::{
    Proxy, Raw, Reply, Upstream, eventually, fetch, get, json, nobody, number, problem, read_head,
    reply, soon,
};

/// Waits so short that a test is not slow, and a budget that is never used up.
pub(crate) const FAST: &str =
    "backoff: fixed, initial_delay: 10ms, budget: { percent: 1000, min_per_second: 1000000 }";

/// What an upstream does with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Act {
    Says(u16),
    /// 503, and not before so many seconds.
    Later(u64),
    /// 503 before it has read the body.
    Early,
    /// And with none of its own.
    Bare,
    /// Reads it, and closes without a word.
    Dies,
    /// Says nothing.
    Hangs,
    /// This gRPC status, and no body.
    Grpc(u8),
}

/// What an upstream has seen of a request.
#[derive(Debug)]
pub(crate) struct Seen {
    method: Method,
    pub(crate) headers: HeaderMap,
    body: Bytes,
    trailers: Option<HeaderMap>,
    pub(crate) at: Instant,
}

/// An upstream that goes by a script, stays with its last line, and keeps what
/// it was sent.
pub(crate) struct Scripted {
    pub(crate) address: SocketAddr,
    hits: Arc<AtomicUsize>,
    pub(crate) seen: Arc<Mutex<Vec<Seen>>>,
    /// Bytes of bodies that have come so far.
    bytes: Arc<AtomicUsize>,
}

impl Scripted {
    pub(crate) async fn start(script: &'static [Act]) -> Self {
        let hits: Arc<AtomicUsize> = Arc::default();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let bytes: Arc<AtomicUsize> = Arc::default();
        let (count, list, total) = (Arc::clone(&hits), Arc::clone(&seen), Arc::clone(&bytes));
        let upstream = Upstream::raw(move |stream| {
            let (count, list, total) = (Arc::clone(&count), Arc::clone(&list), Arc::clone(&total));
            async move {
                let service = service_fn(|request| {
                    let hit = count.fetch_add(1, SeqCst);
                    let act = script[hit.min(script.len() - 1)];
                    perform(act, request, Arc::clone(&list), Arc::clone(&total))
                });
                // Whoever has enough of it may leave.
                let _ = auto::Builder::new(TokioExecutor::new())
                    .serve_connection_with_upgrades(TokioIo::new(stream), service)
                    .await;
            }
        })
        .await;
        Self {
            address: upstream.address,
            hits,
            seen,
            bytes,
        }
    }

    pub(crate) fn hits(&self) -> usize {
        self.hits.load(SeqCst)
    }

    /// What there was between each request and the next.
    fn gaps(&self) -> Vec<Duration> {
        let seen = self.seen.lock().unwrap();
        seen.windows(2).map(|two| two[1].at - two[0].at).collect()
    }
}

async fn perform(
    act: Act,
    request: Request<Incoming>,
    list: Arc<Mutex<Vec<Seen>>>,
    total: Arc<AtomicUsize>,
) -> Result<Reply, io::Error> {
    let at = Instant::now();
    let (head, mut body) = request.into_parts();
    let (mut data, mut trailers) = (Vec::new(), None);
    while !matches!(act, Act::Early | Act::Bare)
        && let Some(frame) = body.frame().await
    {
        match frame.map_err(io::Error::other)?.into_data() {
            Ok(chunk) => {
                total.fetch_add(chunk.len(), SeqCst);
                data.extend_from_slice(&chunk);
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    list.lock().unwrap().push(Seen {
        method: head.method,
        headers: head.headers,
        body: data.into(),
        trailers,
        at,
    });
    let mut answer = reply("an answer");
    match act {
        Act::Says(status) => *answer.status_mut() = status.try_into().unwrap(),
        Act::Later(secs) => {
            *answer.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
            answer.headers_mut().insert("retry-after", secs.into());
        }
        Act::Early => *answer.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE,
        Act::Bare => {
            answer = reply("");
            *answer.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
        }
        Act::Dies => return Err(io::ErrorKind::ConnectionReset.into()),
        Act::Hangs => pending().await,
        Act::Grpc(code) => {
            answer = reply("");
            let headers = answer.headers_mut();
            headers.insert("content-type", HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", u16::from(code).into());
        }
    }
    Ok(answer)
}

/// A route `orders` to these upstreams with these retries, and more keys.
pub(crate) async fn proxy(upstreams: &[SocketAddr], retry: &str, more: &str) -> Proxy {
    let urls: Vec<_> = upstreams.iter().map(|it| format!("http://{it}")).collect();
    let more = if more.is_empty() {
        String::new()
    } else {
        format!(", {more}")
    };
    Proxy::start(&format!(
        "routes: [{{ name: orders, path: /, upstream: {urls:?}, retry: {{ {retry} }}{more} }}]"
    ))
    .await
}

fn request(method: &str, path: &str, body: &'static str) -> Request<Full<Bytes>> {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "a")
        .body(Full::from(Bytes::from(body)))
        .unwrap()
}

async fn send(proxy: &Proxy, method: &str, path: &str, body: &'static str) -> Response<Bytes> {
    fetch(proxy.listen, request(method, path, body)).await
}

async fn attempts(proxy: &Proxy) -> f64 {
    let labels = ["name=\"orders\""];
    proxy.metric("retry_attempts_total", &labels).await
}

pub(crate) async fn state(proxy: &Proxy, upstream: SocketAddr) -> String {
    let name = format!("orders@{upstream}");
    let breakers = json(&fetch(proxy.admin, get("/breakers")).await);
    let found = breakers.as_array().unwrap().iter();
    let found = found.clone().find(|it| it["name"] == *name).unwrap();
    found["state"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_put_in_chunks_goes_again_byte_for_byte() {
    let upstream = Scripted::start(&[Act::Says(503), Act::Dies, Act::Says(200)]).await;
    let proxy = proxy(&[upstream.address], FAST, "").await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("PUT /chunks HTTP/1.1\r\nhost: a\r\nconnection: close\r\nte: trailers\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n")
        .await;
    let mut body = String::new();
    for chunk in 0..20 {
        let text = format!("chunk {chunk};");
        raw.send(format!("{:x}\r\n{text}\r\n", text.len())).await;
        body += &text;
        if chunk % 5 == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    raw.send("0\r\nx-sum: 42\r\n\r\n").await;
    let answer = raw.rest().await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.ends_with("an answer"), "{answer}");
    {
        let seen = upstream.seen.lock().unwrap();
        assert_eq!(seen.len(), 3);
        for attempt in &*seen {
            assert_eq!(attempt.method, Method::PUT);
            assert_eq!(attempt.body, body);
            assert_eq!(attempt.trailers.as_ref().unwrap()["x-sum"], "42");
            assert_eq!(attempt.headers["transfer-encoding"], "chunked");
            // One request, one name.
            for name in ["x-request-id", "traceparent"] {
                assert_eq!(attempt.headers[name], seen[0].headers[name], "{name}");
            }
            assert_eq!(attempt.headers.get_all("via").iter().count(), 1);
        }
    }
    let line = proxy.access("/chunks").await;
    assert_eq!(
        (&line["status"], &line["attempts"]),
        (&200.into(), &3.into())
    );
    assert_eq!(line["upstream"], format!("http://{}", upstream.address));
    assert!(line["error"].is_null(), "{line}");
    assert_eq!(attempts(&proxy).await, 3.0);
    let count = |name| proxy.metric(name, &["name=\"orders\""]);
    assert_eq!(count("retry_attempts_count{").await, 1.0);
    assert_eq!(count("retry_attempts_count_sum").await, 3.0);
}

#[tokio::test]
async fn what_may_have_been_acted_upon_goes_once_unless_it_has_a_key() {
    for failure in [
        &[Act::Says(503), Act::Says(200)],
        &[Act::Dies, Act::Says(200)],
    ] {
        let upstream = Scripted::start(failure).await;
        let proxy = proxy(&[upstream.address], FAST, "").await;
        let first = send(&proxy, "POST", "/", "charge my card").await;
        let expected = if failure[0] == Act::Dies { 502 } else { 503 };
        assert_eq!(first.status(), expected);
        assert_eq!(upstream.hits(), 1);

        let upstream = Scripted::start(failure).await;
        let proxy = self::proxy(&[upstream.address], FAST, "").await;
        let mut keyed = request("POST", "/", "charge my card");
        keyed
            .headers_mut()
            .insert("idempotency-key", "\"1\"".parse().unwrap());
        assert_eq!(fetch(proxy.listen, keyed).await.status(), 200);
        let seen = upstream.seen.lock().unwrap();
        assert_eq!(seen.len(), 2);
        assert!(seen.iter().all(|it| it.body == "charge my card"));
    }
}

#[tokio::test]
async fn of_what_nobody_heard_anything_may_go_again() {
    let dead = nobody().await;
    let proxy = proxy(&[dead], FAST, "").await;
    let answer = send(&proxy, "POST", "/post", "charge my card").await;
    problem(&answer, 502, "bad_gateway");
    assert_eq!(attempts(&proxy).await, 3.0);
    // It comes up between two attempts.
    let proxy = self::proxy(&[dead], &format!("max_attempts: 100, {FAST}"), "").await;
    let listening = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let listener = tokio::net::TcpListener::bind(dead).await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        let head = read_head(&mut stream).await.unwrap();
        assert!(head.starts_with("POST /late"), "{head}");
        let answer = b"HTTP/1.1 204 X\r\n\r\n";
        tokio::io::AsyncWriteExt::write_all(&mut stream, answer)
            .await
            .unwrap();
        stream
    };
    let (answer, _stream) = tokio::join!(send(&proxy, "POST", "/late", "charge"), listening);
    assert_eq!(answer.status(), 204);
}

#[tokio::test]
async fn methods_and_statuses_are_those_of_the_settings() {
    let upstream = Scripted::start(&[Act::Says(418)]).await;
    let retry = format!("methods: [PATCH], statuses: [418], {FAST}");
    let proxy = proxy(&[upstream.address], &retry, "").await;
    assert_eq!(send(&proxy, "PATCH", "/", "x").await.status(), 418);
    assert_eq!(upstream.hits(), 3);
    assert_eq!(proxy.get("/").await.status(), 418);
    assert_eq!(upstream.hits(), 4);

    let upstream = Scripted::start(&[Act::Says(503)]).await;
    let proxy = self::proxy(&[upstream.address], &retry, "").await;
    assert_eq!(send(&proxy, "PATCH", "/", "x").await.status(), 503);
    assert_eq!(upstream.hits(), 1);
}

#[tokio::test]
async fn the_upstream_says_when() {
    let upstream = Scripted::start(&[Act::Later(1), Act::Says(200)]).await;
    let proxy = proxy(&[upstream.address], FAST, "").await;
    assert_eq!(proxy.get("/").await.status(), 200);
    assert!(
        upstream.gaps()[0] >= Duration::from_secs(1),
        "{:?}",
        upstream.gaps()
    );

    // Later than there is time: the client hears it at once.
    let upstream = Scripted::start(&[Act::Later(20)]).await;
    let retry = format!("total_timeout: 10s, {FAST}");
    let proxy = self::proxy(&[upstream.address], &retry, "").await;
    let start = Instant::now();
    let answer = proxy.get("/").await;
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.headers()["retry-after"], "20");
    assert_eq!(answer.body(), "an answer");
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(upstream.hits(), 1);
}

#[tokio::test]
async fn a_long_body_streams_and_goes_once() {
    for framing in ["content-length: 8000", "transfer-encoding: chunked"] {
        let upstream = Scripted::start(&[Act::Says(503), Act::Says(200)]).await;
        let retry = format!("max_body: 4KiB, {FAST}");
        let proxy = proxy(&[upstream.address], &retry, "").await;
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send(format!(
            "PUT /long HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{framing}\r\n\r\n"
        ))
        .await;
        let chunked = framing.ends_with("chunked");
        let half = vec![b'x'; 4000];
        for part in 1..=2 {
            if chunked {
                raw.send("fa0\r\n").await;
            }
            raw.send(&half).await;
            if chunked {
                raw.send("\r\n").await;
            }
            // It is there before the rest is sent.
            eventually("a part", || async {
                upstream.bytes.load(SeqCst) == part * 4000
            })
            .await;
        }
        if chunked {
            raw.send("0\r\n\r\n").await;
        }
        let answer = raw.rest().await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert_eq!(upstream.hits(), 1, "{framing}");
        // A short one is another matter.
        assert_eq!(send(&proxy, "PUT", "/", "short").await.status(), 200);
    }
}

#[tokio::test]
async fn an_answer_before_the_body_was_there_is_given_up_with_what_was_sent() {
    for scheme in ["http", "h2c"] {
        let upstream = Scripted::start(&[Act::Early, Act::Bare, Act::Says(200)]).await;
        let address = upstream.address;
        let proxy = Proxy::start(&format!(
            "routes: [{{ name: orders, path: /, upstream: ['{scheme}://{address}'], retry: {{ {FAST} }} }}]"
        ))
        .await;
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send(
            "PUT / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 10\r\n\r\nhello",
        )
        .await;
        // The third waits for the rest.
        eventually("three attempts", || async { upstream.hits() == 3 }).await;
        raw.send("world").await;
        let answer = raw.rest().await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{scheme}: {answer}");
        let seen = upstream.seen.lock().unwrap();
        assert_eq!(seen.last().unwrap().body, "helloworld");
    }
}

#[tokio::test]
async fn a_client_that_waits_for_100_continue_gets_one_and_sends_once() {
    let upstream = Scripted::start(&[Act::Says(503), Act::Early, Act::Says(200)]).await;
    let proxy = proxy(&[upstream.address], FAST, "").await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("PUT / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
        .await;
    raw.until("HTTP/1.1 100 Continue\r\n\r\n").await;
    raw.send("hello").await;
    let answer = raw.rest().await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let seen = upstream.seen.lock().unwrap();
    assert_eq!(seen.len(), 3);
    assert_eq!(seen[0].body, "hello");
    assert_eq!(seen[2].body, "hello");
}

#[tokio::test]
async fn what_the_client_does_wrong_is_not_tried_again() {
    let upstream = Scripted::start(&[Act::Says(200)]).await;
    let proxy = proxy(&[upstream.address], FAST, "timeout: 500ms").await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send(
        "PUT / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nnonsense\r\n",
    )
    .await;
    let answer = raw.rest().await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(upstream.hits() <= 1);
    assert_eq!(attempts(&proxy).await, 1.0);
    // So slow that time runs out.
    let retry = format!("attempt_timeout: 100ms, {FAST}");
    let proxy = self::proxy(&[upstream.address], &retry, "").await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhello")
        .await;
    let answer = raw.until("\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 504 "), "{answer}");
    assert_eq!(attempts(&proxy).await, 1.0);
}

#[tokio::test]
async fn the_next_attempt_goes_elsewhere() {
    let (bad, good) = (
        Scripted::start(&[Act::Dies]).await,
        Scripted::start(&[Act::Says(200)]).await,
    );
    let proxy = proxy(
        &[bad.address, good.address],
        &format!("max_attempts: 2, {FAST}"),
        "",
    )
    .await;
    for _ in 0..20 {
        assert_eq!(send(&proxy, "PUT", "/put", "x").await.status(), 200);
        let line = proxy.access("/put").await;
        assert_eq!(line["upstream"], format!("http://{}", good.address));
    }
    assert_eq!(good.hits(), 20);
    assert!(bad.hits() > 0);
    assert_eq!(attempts(&proxy).await, 20.0 + bad.hits() as f64);
}

#[tokio::test]
async fn an_outage_is_not_made_worse() {
    const REQUESTS: usize = 1000;
    let upstream = Scripted::start(&[Act::Says(503)]).await;
    let retry = "initial_delay: 10ms, max_attempts: 5, budget: { percent: 20, min_per_second: 3 }";
    let proxy = Arc::new(proxy(&[upstream.address], retry, "").await);
    let start = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..50 {
        let proxy = Arc::clone(&proxy);
        clients.spawn(async move {
            for _ in 0..REQUESTS / 50 {
                assert_eq!(proxy.get("/").await.status(), 503);
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    // The second that it began with, and those that began since.
    let seconds = start.elapsed().as_secs() as usize + 2;
    let hits = upstream.hits();
    assert!(
        hits <= REQUESTS + REQUESTS / 5 + 3 * seconds,
        "{hits} in {seconds} s"
    );
    // What there is of a budget is used.
    assert!(hits >= REQUESTS + REQUESTS / 10, "{hits} in {seconds} s");
    assert_eq!(attempts(&proxy).await, hits as f64);
}

#[tokio::test]
async fn a_hang_is_a_failure_that_the_breaker_sees() {
    let upstream = Scripted::start(&[Act::Hangs]).await;
    let retry = format!("attempt_timeout: 100ms, {FAST}");
    let breaker = "circuit_breaker: { failure_threshold: 3 }";
    let proxy = proxy(&[upstream.address], &retry, breaker).await;
    let start = Instant::now();
    problem(&proxy.get("/").await, 504, "timed_out");
    let took = start.elapsed();
    assert!(
        took >= Duration::from_millis(300) && took < Duration::from_secs(5),
        "{took:?}"
    );
    assert_eq!(upstream.hits(), 3);
    assert_eq!(state(&proxy, upstream.address).await, "open");
    problem(&proxy.get("/").await, 503, "circuit_open");
    assert_eq!(upstream.hits(), 3);
    eventually("nothing is in flight", || async {
        proxy.in_flight().await == 0.0
    })
    .await;

    let proxy = self::proxy(&[upstream.address], &retry, "").await;
    let mut call = request("POST", "/", "");
    let grpc = "application/grpc".parse().unwrap();
    call.headers_mut().insert("content-type", grpc);
    let answer = fetch(proxy.listen, call).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["grpc-status"], "4");
    // A hang may be followed by an answer.
    let upstream = Scripted::start(&[Act::Hangs, Act::Says(200)]).await;
    let proxy = self::proxy(&[upstream.address], &retry, "").await;
    assert_eq!(send(&proxy, "PUT", "/", "x").await.status(), 200);
}

#[tokio::test]
async fn the_shorter_of_timeout_and_total_timeout_rules() {
    for (retry, more) in [
        ("total_timeout: 400ms", ""),
        ("total_timeout: 20s", "timeout: 400ms"),
    ] {
        let within = |start: Instant| {
            let took = start.elapsed();
            assert!(took < Duration::from_secs(3), "{took:?}");
            took
        };
        let upstream = Scripted::start(&[Act::Hangs]).await;
        let proxy = proxy(&[upstream.address], &format!("{retry}, {FAST}"), more).await;
        let start = Instant::now();
        problem(&proxy.get("/").await, 504, "timed_out");
        assert!(within(start) >= Duration::from_millis(400));
        assert_eq!(upstream.hits(), 1);

        // No wait that would be too long: what is in hand is handed on.
        let upstream = Scripted::start(&[Act::Says(503)]).await;
        let retry = format!("{retry}, max_attempts: 100, backoff: fixed, initial_delay: 150ms");
        let proxy = self::proxy(&[upstream.address], &retry, more).await;
        let start = Instant::now();
        let answer = proxy.get("/").await;
        assert_eq!(
            (answer.status().as_u16(), &**answer.body()),
            (503, &b"an answer"[..])
        );
        within(start);
        assert!((1..=3).contains(&upstream.hits()), "{}", upstream.hits());
    }
}

#[tokio::test]
async fn a_client_that_goes_away_ends_it() {
    let upstream = Scripted::start(&[Act::Says(503)]).await;
    let retry = "max_attempts: 1000, backoff: fixed, initial_delay: 50ms, budget: { percent: 1000, min_per_second: 1000 }";
    let proxy = proxy(&[upstream.address], retry, "").await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET /gone HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("some attempts", || async { upstream.hits() >= 3 }).await;
    drop(raw);
    let line = proxy.access("/gone").await;
    assert_eq!(line["status"], 499);
    let hits = upstream.hits();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(upstream.hits(), hits);
    assert_eq!(line["attempts"], hits);
    assert_eq!(proxy.in_flight().await, 0.0);
}

#[tokio::test]
async fn an_open_breaker_is_passed_over_and_the_last_one_ends_it() {
    let (shut, flaky) = (
        Scripted::start(&[Act::Says(200)]).await,
        Scripted::start(&[Act::Says(500), Act::Says(200), Act::Says(500)]).await,
    );
    let breaker = "circuit_breaker: { failure_threshold: 2, reset_timeout: 20s }";
    let retry = format!("max_attempts: 10, {FAST}");
    let proxy = proxy(&[shut.address, flaky.address], &retry, breaker).await;
    let open = format!("/breakers/orders@{}/open", shut.address);
    let done = fetch(proxy.admin, request("POST", &open, "")).await;
    assert_eq!(done.status(), 204);
    // Where it has been before, if there is no other.
    assert_eq!(proxy.get("/").await.status(), 200);
    assert_eq!((shut.hits(), flaky.hits()), (0, 2));
    // Two failures open the other one, too: that is the end.
    let start = Instant::now();
    let answer = proxy.get("/end").await;
    problem(&answer, 503, "circuit_open");
    assert!((15..=20).contains(&number(answer.headers(), "retry-after")));
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!((shut.hits(), flaky.hits()), (0, 4));
    let line = proxy.access("/end").await;
    assert_eq!(line["attempts"], 2);
    let refused = ["name=\"orders\"", "reason=\"refused\""];
    assert_eq!(proxy.metric("retry_give_ups_total", &refused).await, 1.0);
}

/// No attempt, and no wait for one, where every breaker has opened meanwhile.
#[tokio::test]
async fn nobody_waits_for_a_refusal() {
    // By whatever opens it: an answer, a reset, a hang, no connection at all.
    let scripts: [&'static [Act]; 4] = [&[Act::Says(500)], &[Act::Dies], &[Act::Hangs], &[]];
    for script in scripts {
        for per in ["upstream", "route"] {
            let (upstream, sent) = match script {
                [] => (nobody().await, 0),
                script => (Scripted::start(script).await.address, 1),
            };
            let retry = "backoff: fixed, initial_delay: 8s, attempt_timeout: 200ms";
            let breaker = format!(
                "circuit_breaker: {{ failure_threshold: 1, reset_timeout: 40s, per: {per} }}"
            );
            let proxy = proxy(&[upstream], retry, &breaker).await;
            let start = Instant::now();
            let answer = proxy.get("/end").await;
            let took = start.elapsed();
            assert!(took < Duration::from_secs(3), "{script:?} {per}: {took:?}");
            problem(&answer, 503, "circuit_open");
            assert!((38..=40).contains(&number(answer.headers(), "retry-after")));
            let line = proxy.access("/end").await;
            assert_eq!(line["attempts"], sent, "{line}");
            assert!(line["error"].is_string(), "{line}");
            assert_eq!(proxy.in_flight().await, 0.0);

            // It is one request of one attempt, whoever ended it.
            let count = |name| proxy.metric(name, &["name=\"orders"]);
            assert_eq!(count("retry_attempts_total").await, 1.0);
            assert_eq!(count("retry_attempts_count{").await, 1.0);
            assert_eq!(count("retry_attempts_count_sum").await, 1.0);
            assert_eq!(count("retry_give_ups_total").await, 1.0);
            assert_eq!(count("circuit_breaker_rejections_total").await, 1.0);
        }
    }
}

#[tokio::test]
async fn what_would_not_go_again_is_handed_on_whatever_the_breakers_say() {
    let breaker = "circuit_breaker: { failure_threshold: 1 }";
    for (method, retry) in [
        ("POST", "initial_delay: 8s"),
        ("PUT", "initial_delay: 8s, max_attempts: 1"),
        ("PUT", "initial_delay: 8s, max_body: 1B"),
        ("PUT", "initial_delay: 8s, statuses: [502]"),
    ] {
        let upstream = Scripted::start(&[Act::Says(500)]).await;
        let proxy = proxy(&[upstream.address], retry, breaker).await;
        let answer = send(&proxy, method, "/", "a body").await;
        assert_eq!(answer.status(), 500, "{method} {retry}");
        assert_eq!(answer.body(), "an answer");
        assert_eq!(state(&proxy, upstream.address).await, "open");
        assert_eq!(upstream.hits(), 1);
    }
}

#[tokio::test]
async fn with_another_endpoint_left_it_waits_and_goes_there() {
    let (bad, good) = (
        Scripted::start(&[Act::Says(500)]).await,
        Scripted::start(&[Act::Says(200)]).await,
    );
    let wait = Duration::from_millis(400);
    let retry = "backoff: fixed, initial_delay: 400ms";
    let breaker = "circuit_breaker: { failure_threshold: 1, reset_timeout: 40s }";
    let proxy = proxy(&[bad.address, good.address], retry, breaker).await;
    let mut slowest = Duration::ZERO;
    // Until it was the bad one's turn.
    while bad.hits() == 0 {
        let start = Instant::now();
        assert_eq!(proxy.get("/").await.status(), 200);
        slowest = start.elapsed();
    }
    assert!(slowest >= wait, "{slowest:?}");
    assert!(slowest < wait + Duration::from_secs(3), "{slowest:?}");
    assert_eq!(
        (state(&proxy, bad.address).await, bad.hits()),
        ("open".into(), 1)
    );
    assert_eq!(state(&proxy, good.address).await, "closed");
}

/// What there is between the attempts, by the keys `backoff`, `initial_delay`
/// and `max_delay`.
#[tokio::test]
async fn the_waits_are_those_of_the_settings() {
    // In milliseconds: the least and the most of each.
    let exactly = |waits: [u64; 3]| waits.map(|wait| (wait, wait));
    let mut cases = Vec::new();
    for (backoff, waits) in [
        ("backoff: fixed", exactly([300, 300, 300])),
        ("backoff: linear", exactly([300, 600, 900])),
        ("backoff: exponential", exactly([300, 600, 1200])),
        (
            "backoff: exponential, max_delay: 400ms",
            exactly([300, 400, 400]),
        ),
        (
            "backoff: exponential-jitter",
            [(0, 300), (0, 600), (0, 1200)],
        ),
        ("max_delay: 300ms", [(0, 300); 3]),
        (
            "backoff: decorrelated-jitter, max_delay: 1200ms",
            [(300, 900), (300, 1200), (300, 1200)],
        ),
        (
            "backoff: decorrelated-jitter, max_delay: 350ms",
            [(300, 350); 3],
        ),
    ] {
        let upstream = Scripted::start(&[Act::Bare]).await;
        let budget = "budget: { percent: 1000, min_per_second: 1000 }";
        let retry = format!("{backoff}, initial_delay: 300ms, max_attempts: 4, {budget}");
        let proxy = proxy(&[upstream.address], &retry, "").await;
        cases.push((backoff, waits, upstream, proxy));
    }
    let mut clients = JoinSet::new();
    for (.., proxy) in &cases {
        clients.spawn(fetch(proxy.listen, get("/")));
    }
    while let Some(answer) = clients.join_next().await {
        assert_eq!(answer.unwrap().status(), 503);
    }
    for (backoff, waits, upstream, _) in cases {
        let gaps = upstream.gaps();
        assert_eq!(gaps.len(), 3, "{backoff}");
        for (gap, (least, most)) in gaps.iter().zip(waits) {
            // What a request takes is not part of a wait, and may differ; a
            // busy machine may be late, by less than makes another backoff.
            let early = Duration::from_millis(least.saturating_sub(10));
            let late = Duration::from_millis(most + 250);
            assert!((early..=late).contains(gap), "{backoff}: {gaps:?}");
        }
    }
}

#[tokio::test]
async fn a_preset_says_how_often_and_a_key_says_otherwise() {
    for (retry, hits) in [
        ("preset: quick", 2),
        ("preset: quick, max_attempts: 3", 3),
        ("initial_delay: 1ms", 3),
        ("preset: patient, initial_delay: 1ms, max_delay: 1ms", 5),
        ("preset: aggressive, initial_delay: 1ms, max_delay: 1ms", 10),
    ] {
        let upstream = Scripted::start(&[Act::Says(503)]).await;
        let retry = format!("{retry}, budget: {{ percent: 1000, min_per_second: 1000 }}");
        let proxy = proxy(&[upstream.address], &retry, "").await;
        assert_eq!(proxy.get("/").await.status(), 503);
        assert_eq!(upstream.hits(), hits, "{retry}");
    }
}

#[tokio::test]
async fn the_budget_is_a_part_of_the_requests_and_a_few_a_second() {
    let upstream = Scripted::start(&[Act::Says(503)]).await;
    let retry = "max_attempts: 2, initial_delay: 1ms, budget: { percent: 50, min_per_second: 0 }";
    let proxy = proxy(&[upstream.address], retry, "").await;
    for _ in 0..10 {
        assert_eq!(proxy.get("/").await.status(), 503);
    }
    assert_eq!(upstream.hits(), 10 + 5);
    let refused = ["name=\"orders\"", "reason=\"budget\""];
    assert_eq!(proxy.metric("retry_give_ups_total", &refused).await, 5.0);

    let upstream = Scripted::start(&[Act::Says(503)]).await;
    let retry = "max_attempts: 2, initial_delay: 1ms, budget: { percent: 0, min_per_second: 2 }";
    let proxy = self::proxy(&[upstream.address], retry, "").await;
    let start = Instant::now();
    for _ in 0..10 {
        assert_eq!(proxy.get("/").await.status(), 503);
    }
    let seconds = start.elapsed().as_secs() as usize + 2;
    let retries = upstream.hits() - 10;
    assert!(
        (2..=2 * seconds).contains(&retries),
        "{retries} in {seconds} s"
    );
}

#[tokio::test]
async fn a_breaker_around_the_route_ends_it_too() {
    let upstream = Scripted::start(&[Act::Dies]).await;
    let breaker = "circuit_breaker: { failure_threshold: 2, per: route }";
    let proxy = proxy(&[upstream.address], FAST, breaker).await;
    problem(&proxy.get("/").await, 503, "circuit_open");
    assert_eq!(upstream.hits(), 2);
}

#[tokio::test]
async fn a_stream_that_was_refused_goes_again_whatever_it_is() {
    let streams = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&streams);
    let upstream = Upstream::raw(move |stream| {
        let count = Arc::clone(&count);
        async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                if count.fetch_add(1, SeqCst) == 0 || request.uri().path() == "/never" {
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                } else {
                    let _ = respond.send_response(Response::new(()), true);
                }
            }
        }
    })
    .await;
    let start = |retry: String| {
        let address = upstream.address;
        async move {
            Proxy::start(&format!(
                "routes: [{{ name: orders, path: /, upstream: ['h2c://{address}'], retry: {{ {retry} }} }}]"
            ))
            .await
        }
    };
    // Once for free.
    let proxy = start("max_attempts: 1".to_owned()).await;
    let answer = send(&proxy, "POST", "/", "charge my card").await;
    assert_eq!(answer.status(), 200);
    assert_eq!(streams.swap(1, SeqCst), 2);
    let proxy = start(FAST.to_owned()).await;
    let answer = send(&proxy, "POST", "/never", "charge my card").await;
    problem(&answer, 502, "bad_gateway");
    assert_eq!(streams.load(SeqCst), 1 + 4);
}

#[tokio::test]
async fn grpc_goes_by_its_own_codes() {
    for (code, hits) in [("14", 3), ("13", 1)] {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let upstream = Upstream::start(move |_| {
            count.fetch_add(1, SeqCst);
            async move {
                let mut answer = reply("");
                let headers = answer.headers_mut();
                headers.insert("content-type", "application/grpc".parse().unwrap());
                headers.insert("grpc-status", code.parse().unwrap());
                answer
            }
        })
        .await;
        let proxy = proxy(&[upstream.address], FAST, "").await;
        let mut call = request("POST", "/", "a call");
        let grpc = "application/grpc".parse().unwrap();
        call.headers_mut().insert("content-type", grpc);
        let answer = fetch(proxy.listen, call).await;
        assert_eq!(answer.headers()["grpc-status"], code);
        assert_eq!(asked.load(SeqCst), hits);
    }
}

#[tokio::test]
async fn a_stale_connection_is_no_attempt() {
    // Hangs up on the second request of a connection, unseen until then.
    let upstream = Upstream::raw(|mut stream| async move {
        let _ = read_head(&mut stream).await;
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, answer).await;
        let _ = read_head(&mut stream).await;
    })
    .await;
    let proxy = proxy(&[upstream.address], "max_attempts: 1", "").await;
    for _ in 0..4 {
        assert_eq!(proxy.get("/").await.status(), 200);
    }
    assert_eq!(attempts(&proxy).await, 4.0);
    assert!(upstream.connections.load(SeqCst) >= 3);
}

#[tokio::test]
async fn an_upgrade_is_tunnelled_after_a_failure() {
    let asked = Arc::new(AtomicUsize::new(0));
    let upstream = Upstream::raw(move |mut stream| {
        let asked = Arc::clone(&asked);
        async move {
            use tokio::io::AsyncWriteExt;

            let Some(head) = read_head(&mut stream).await else {
                return;
            };
            assert!(
                head.to_ascii_lowercase().contains("upgrade: echo"),
                "{head}"
            );
            if asked.fetch_add(1, SeqCst) == 0 {
                let no = b"HTTP/1.1 503 X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                let _ = stream.write_all(no).await;
                return;
            }
            let yes = b"HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
            stream.write_all(yes).await.unwrap();
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        }
    })
    .await;
    let proxy = proxy(&[upstream.address], FAST, "").await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        .await;
    let head = raw.until("\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    raw.send("hello").await;
    soon("an echo", raw.until("hello")).await;
}

#[tokio::test]
async fn what_is_given_up_on_is_gone_before_the_wait() {
    // An answer that does not end: it holds a connection for as long as
    // somebody wants it.
    let gone = Arc::new(AtomicUsize::new(0));
    let told = Arc::clone(&gone);
    let upstream = Upstream::raw(move |mut stream| {
        let told = Arc::clone(&told);
        async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};

            let _ = read_head(&mut stream).await;
            let endless = b"HTTP/1.1 503 X\r\ncontent-length: 1000\r\n\r\nhello";
            let _ = stream.write_all(endless).await;
            let _ = stream.read_u8().await;
            told.fetch_add(1, SeqCst);
        }
    })
    .await;
    let retry = "max_attempts: 2, backoff: fixed, initial_delay: 10s";
    let proxy = proxy(&[upstream.address], retry, "").await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    eventually("the connection is closed", || async {
        gone.load(SeqCst) == 1
    })
    .await;
    assert_eq!(proxy.in_flight().await, 0.0);
    assert_eq!(upstream.connections.load(SeqCst), 1);
}

#[tokio::test]
async fn who_answers_early_and_holds_on_does_not_hold_the_body() {
    for early in [
        "HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 200 X\r\ncontent-type: application/grpc\r\ngrpc-status: 14\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 503 X\r\ncontent-length: 2\r\n\r\nno",
        "HTTP/1.1 503 X\r\ncontent-length: 10\r\n\r\nhello",
        // What can be no answer to an upload.
        "HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        "HTTP/1.1 200 X\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
    ] {
        let (first, gone) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let told = Arc::clone(&gone);
        let upstream = Upstream::raw(move |mut stream| {
            let (first, told) = (Arc::clone(&first), Arc::clone(&told));
            async move {
                use tokio::io::{AsyncReadExt, AsyncWriteExt};

                read_head(&mut stream).await.unwrap();
                if first.fetch_add(1, SeqCst) == 0 {
                    stream.write_all(early.as_bytes()).await.unwrap();
                    let mut waste = Vec::new();
                    let _ = stream.read_to_end(&mut waste).await;
                    told.fetch_add(1, SeqCst);
                    return;
                }
                let mut body = [0; 10];
                stream.read_exact(&mut body).await.unwrap();
                let head = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n";
                stream.write_all(head).await.unwrap();
                stream.write_all(&body).await.unwrap();
            }
        })
        .await;
        let proxy = proxy(&[upstream.address], FAST, "").await;
        let mut raw = Raw::connect(proxy.listen).await;
        let kind = if early.contains("grpc") {
            "application/grpc"
        } else {
            "text/plain"
        };
        raw.send(&format!(
            "PUT / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: 10\r\n\r\nhello",
        ))
        .await;
        eventually("a second attempt", || async {
            upstream.connections.load(SeqCst) == 2
        })
        .await;
        eventually("the first is gone", || async { gone.load(SeqCst) == 1 }).await;
        raw.send("world").await;
        let answer = raw.rest().await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{early}: {answer}");
        assert!(answer.ends_with("helloworld"), "{early}: {answer}");
        assert_eq!(attempts(&proxy).await, 2.0);
    }
}
