//! `grpc-timeout`: how long a gRPC client waits, and what upstreams hear of it.
//! And a client that is waited for.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tokio::time::Instant;
use tonic::transport::{Channel, Server, server::TcpIncoming};
use tonic_health::{
    ServingStatus,
    pb::{
        HealthCheckRequest, health_check_response::ServingStatus as Status,
        health_client::HealthClient,
    },
};

use crate::{
    retries::{Act, FAST, Scripted, proxy, state},
    support::{Proxy, Raw, Upstream, eventually, fetch, get, reply, soon},
};

/// Calls with these fields; not gRPC but for its `content-type`.
async fn call(proxy: &Proxy, fields: &[(&'static str, &str)]) -> Response<Bytes> {
    let mut request = Request::post("/call").header("host", "a");
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::from(Bytes::from("a message")));
    fetch(proxy.listen, request.unwrap()).await
}

async fn grpc(proxy: &Proxy, timeout: &str) -> Response<Bytes> {
    let fields = [
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("grpc-timeout", timeout),
    ];
    call(proxy, &fields).await
}

/// An answer of trailers only, with this code.
fn ended(answer: &Response<Bytes>, code: &str) {
    assert_eq!(answer.status(), 200, "{answer:?}");
    assert_eq!(answer.headers()["grpc-status"], code, "{answer:?}");
    assert!(answer.headers().contains_key("grpc-message"), "{answer:?}");
    assert_eq!(answer.headers()["content-type"], "application/grpc");
    assert!(answer.body().is_empty());
}

/// What each attempt was told, as its upstream saw it.
fn told(upstream: &Scripted) -> Vec<Option<Duration>> {
    let seen = upstream.seen.lock().unwrap();
    let told = seen.iter().map(|attempt| {
        let mut values = attempt.headers.get_all("grpc-timeout").iter();
        let value = values.next()?.to_str().unwrap();
        assert_eq!(values.next(), None);
        let (number, unit) = value.split_at(value.len() - 1);
        assert!(number.len() <= 8, "{value}");
        let number = number.parse().unwrap();
        Some(match unit {
            "n" => Duration::from_nanos(number),
            "u" => Duration::from_micros(number),
            "m" => Duration::from_millis(number),
            "S" => Duration::from_secs(number),
            "M" => Duration::from_secs(number * 60),
            "H" => Duration::from_secs(number * 3600),
            _ => panic!("{value}"),
        })
    });
    told.collect()
}

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn each_attempt_is_told_what_is_left() {
    let upstream = Scripted::start(&[Act::Grpc(14), Act::Grpc(14), Act::Grpc(0)]).await;
    let wait = SECOND / 5;
    let retry = "backoff: fixed, initial_delay: 200ms, attempt_timeout: 2s";
    let proxy = proxy(&[upstream.address], retry, "timeout: 5s").await;
    let answer = grpc(&proxy, "10S").await;
    assert_eq!(answer.headers()["grpc-status"], "0");
    // The route's times are those to a response's head; that of the client is
    // the whole call's, and a stream goes on after its head.
    let told: Vec<_> = told(&upstream).into_iter().map(Option::unwrap).collect();
    assert_eq!(told.len(), 3);
    assert!(told[0] <= 10 * SECOND && told[0] > 8 * SECOND, "{told:?}");
    assert!(
        told[1] <= told[0] - wait && told[1] > 7 * SECOND,
        "{told:?}"
    );
    assert!(
        told[2] <= told[1] - wait && told[2] > 6 * SECOND,
        "{told:?}"
    );
    // No later than the client itself gives up.
    let seen = upstream.seen.lock().unwrap();
    let end = |index: usize| seen[index].at + told[index];
    assert!(end(2) <= end(0) + SECOND && end(0) <= end(2) + SECOND);
}

#[tokio::test]
async fn nothing_is_told_but_what_the_client_has_said() {
    let upstream = Scripted::start(&[Act::Grpc(0)]).await;
    let retry = format!("attempt_timeout: 2s, {FAST}");
    let proxy = proxy(&[upstream.address], &retry, "timeout: 5s").await;
    let grpc = ("content-type", "application/grpc+proto");
    let ok = async |fields: &[_]| {
        assert_eq!(call(&proxy, fields).await.headers()["grpc-status"], "0");
    };
    ok(&[grpc]).await;
    // Of two, the one that says less.
    ok(&[grpc, ("grpc-timeout", "1H"), ("grpc-timeout", "30S")]).await;
    let told = told(&upstream);
    assert_eq!(told[0], None);
    assert!(told[1].is_some_and(|told| told <= 30 * SECOND && told > 25 * SECOND));
    // What nobody can read is passed on, and limits nothing.
    ok(&[grpc, ("grpc-timeout", "soon")]).await;
    let seen = upstream.seen.lock().unwrap();
    assert_eq!(seen[2].headers["grpc-timeout"], "soon");
}

#[tokio::test]
async fn of_a_request_that_is_not_grpc_it_is_a_header_like_any_other() {
    let upstream = Upstream::start(|request| async move {
        tokio::time::sleep(SECOND / 5).await;
        let values = request.headers().get_all("grpc-timeout").iter();
        let values: Vec<_> = values.map(|value| value.to_str().unwrap()).collect();
        reply(values.join("|"))
    })
    .await;
    for retry in ["", ", retry: {}"] {
        let proxy = Proxy::start(&format!(
            "routes: [{{ name: orders, path: /, upstream: ['http://{}']{retry} }}]",
            upstream.address
        ))
        .await;
        let fields = [
            ("content-type", "application/json"),
            ("grpc-timeout", "1m"),
            ("grpc-timeout", "whatever"),
        ];
        let answer = call(&proxy, &fields).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.body(), "1m|whatever");
    }
}

/// The nearest of the client's time and the route's rules, and only the route's
/// is a failure of the endpoint: else anyone could open its breaker.
#[tokio::test]
async fn the_nearest_rules() {
    let breaker = "circuit_breaker: { failure_threshold: 1 }";
    let timeout = |timeout: &str| format!("timeout: {timeout}, {breaker}");
    let slow = "circuit_breaker: { slow_call: { duration: 200ms, rate: 1 }, minimum_requests: 1 }";
    let retry = format!(", retry: {{ {FAST} }}");
    let attempt = format!(", retry: {{ attempt_timeout: 400ms, {FAST} }}");
    let total = format!(", retry: {{ total_timeout: 400ms, {FAST} }}");
    for (client, more, state) in [
        ("400m", timeout("20s"), "closed"),
        ("400m", timeout("20s") + &retry, "closed"),
        ("20S", timeout("400ms"), "open"),
        ("20S", timeout("400ms") + &retry, "open"),
        ("20S", timeout("20s") + &attempt, "open"),
        ("20S", timeout("20s") + &total, "open"),
        // But a rule for slow calls sees the hang.
        ("400m", slow.to_owned(), "open"),
        // More than any clock can count.
        ("99999999H", timeout("400ms"), "open"),
    ] {
        let upstream = Scripted::start(&[Act::Hangs]).await;
        let address = upstream.address;
        let proxy = Proxy::start(&format!(
            "routes: [{{ name: orders, path: /, upstream: ['http://{address}'], {more} }}]"
        ))
        .await;
        let start = Instant::now();
        ended(&grpc(&proxy, client).await, "4");
        let took = start.elapsed();
        assert!(
            took >= 2 * SECOND / 5 && took < 4 * SECOND,
            "{client} {more}: {took:?}"
        );
        assert_eq!(
            self::state(&proxy, upstream.address).await,
            state,
            "{client} {more}"
        );
        assert_eq!(upstream.hits(), 1);
        assert_eq!(proxy.in_flight().await, 0.0);
        let line = proxy.access("/call").await;
        assert_eq!(
            (&line["status"], &line["attempts"]),
            (&200.into(), &1.into())
        );
        if more.contains("retry") {
            let labels = ["name=\"orders\""];
            assert_eq!(proxy.metric("retry_attempts_total", &labels).await, 1.0);
        }
    }
}

#[tokio::test]
async fn what_is_too_late_is_not_begun() {
    let upstream = Scripted::start(&[Act::Grpc(14)]).await;
    // Before the first attempt.
    let limit = "rate_limit: { limit: 9, period: 60s }";
    let retry = "backoff: fixed, initial_delay: 8s";
    let proxy = proxy(&[upstream.address], retry, limit).await;
    let answer = grpc(&proxy, "0n").await;
    ended(&answer, "4");
    assert_eq!(answer.headers()["x-ratelimit-limit"], "9");
    assert_eq!(upstream.hits(), 0);
    // And before the second: what is in hand is handed on.
    let start = Instant::now();
    let answer = grpc(&proxy, "4S").await;
    assert!(start.elapsed() < 3 * SECOND);
    assert_eq!(answer.headers()["grpc-status"], "14");
    assert_eq!(upstream.hits(), 1);
}

/// As tonic's servers do: by CANCELLED, at the moment that the client gives up.
#[tokio::test]
async fn an_upstream_that_gives_up_on_its_own_has_run_out_of_time() {
    let upstream = Upstream::start(|request| async move {
        let told = request.headers()["grpc-timeout"].to_str().unwrap();
        let micros = told.strip_suffix('u').unwrap().parse().unwrap();
        tokio::time::sleep(Duration::from_micros(micros)).await;
        let mut answer = reply("");
        let headers = answer.headers_mut();
        headers.insert("content-type", "application/grpc".parse().unwrap());
        headers.insert("grpc-status", 1.into());
        answer
    })
    .await;
    let breaker = "circuit_breaker: { failure_threshold: 1 }";
    let proxy = proxy(&[upstream.address], FAST, breaker).await;
    for _ in 0..20 {
        ended(&grpc(&proxy, "120m").await, "4");
    }
    assert_eq!(state(&proxy, upstream.address).await, "closed");
}

/// tonic on both sides.
#[tokio::test]
async fn a_stream_goes_on_after_its_head_for_as_long_as_its_client_waits() {
    let (reporter, service) = tonic_health::server::health_reporter();
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let server = Server::builder().add_service(service);
    let server = tokio::spawn(server.serve_with_incoming(incoming));
    let retry = "{ attempt_timeout: 200ms }";
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: orders, path: /, upstream: ['h2c://{address}'], timeout: 300ms, retry: {retry} }}]"
    ))
    .await;
    let channel = Channel::from_shared(format!("http://{}", proxy.listen));
    let mut client = HealthClient::new(channel.unwrap().connect().await.unwrap());
    for timeout in [None, Some(20 * SECOND)] {
        reporter
            .set_service_status("", ServingStatus::Serving)
            .await;
        let mut watch = tonic::Request::new(HealthCheckRequest::default());
        if let Some(timeout) = timeout {
            watch.set_timeout(timeout);
        }
        let mut statuses = client.watch(watch).await.unwrap().into_inner();
        let first = soon("a status", statuses.message()).await.unwrap().unwrap();
        assert_eq!(first.status(), Status::Serving);
        tokio::time::sleep(4 * SECOND / 5).await;
        reporter
            .set_service_status("", ServingStatus::NotServing)
            .await;
        let second = soon("another", statuses.message()).await.unwrap().unwrap();
        assert_eq!(second.status(), Status::NotServing);
    }
    server.abort();
}

/// The time between two pieces of a body is longer than a test may take; that
/// of the route is not, and frees the same place. (Its own tests are beside
/// what forwards.)
#[tokio::test]
async fn an_upload_that_stalls_holds_its_place_no_longer_than_the_route_allows() {
    let upstream = Upstream::start(|request| async move {
        let body = request.into_body().collect().await;
        reply(body.map_or(0, |body| body.to_bytes().len()).to_string())
    })
    .await;
    let proxy = Proxy::start(&format!(
        "limits: {{ max_connections: 1 }}\n\
         routes: [{{ name: orders, path: /, upstream: ['http://{}'], timeout: 600ms, \
         circuit_breaker: {{ failure_threshold: 1 }} }}]",
        upstream.address
    ))
    .await;
    let open = async || {
        let name = ["name=\"proxy\""];
        proxy.metric("drain_connections_open", &name).await
    };
    let begun = Instant::now();
    let mut stalled = Raw::connect(proxy.listen).await;
    let head = "POST /stalled HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf";
    stalled.send(head).await;
    eventually("the connection", async || open().await == 1.0).await;
    // There is room for one.
    let next = tokio::spawn(fetch(proxy.listen, get("/next")));
    let answer = stalled.rest().await;
    assert!(answer.starts_with("HTTP/1.1 504 "), "{answer}");
    assert!(answer.contains("\"reason\":\"timed_out\""), "{answer}");
    assert!(begun.elapsed() >= 3 * SECOND / 5);
    assert_eq!(soon("the next", next).await.unwrap().status(), 200);
    eventually("no connection", async || open().await == 0.0).await;
    assert_eq!(state(&proxy, upstream.address).await, "closed");
    assert_eq!(proxy.access("/stalled").await["status"], 504);

    // One that is slow, but does not stall, has the route's time all the same.
    let mut slow = Raw::connect(proxy.listen).await;
    slow.send("POST /slow HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n")
        .await;
    for _ in 0..4 {
        tokio::time::sleep(SECOND / 20).await;
        slow.send("x").await;
    }
    assert!(slow.until("4").await.starts_with("HTTP/1.1 200 "));
}
