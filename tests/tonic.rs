//! The rate limiter on tonic: refusals that gRPC clients understand, and the
//! limiter in front of a client's channel.

use std::{error::Error, net::Ipv4Addr, net::SocketAddr, time::Duration};

use buttress::{
    Refusal,
    key::{self, ClientIp, Key},
    rate_limit::{Limit, Quota, RateLimitLayer},
};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::body::Body as _;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
    time::timeout,
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Server, server::TcpIncoming},
};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_client::HealthClient},
    server::{HealthReporter, health_reporter},
};
use tower::{Layer, ServiceBuilder};

const LONG: Duration = Duration::from_secs(10);

fn hourly(burst: u32) -> RateLimitLayer {
    let quota = Quota::per_hour(1).burst(burst);
    RateLimitLayer::builder()
        .limit(Limit::new(quota))
        .build()
        .unwrap()
}

/// gRPC's own health service behind a limit, until it is dropped.
struct Bed {
    address: SocketAddr,
    reporter: HealthReporter,
    _stop: oneshot::Sender<()>,
}

impl Bed {
    async fn start(layer: RateLimitLayer) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (reporter, service) = health_reporter();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = Server::builder()
            .layer(layer)
            .add_service(service)
            .serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(async move {
            tokio::select! {
                result = server => result.unwrap(),
                _ = stopped => {}
            }
        });
        Self {
            address,
            reporter,
            _stop: stop,
        }
    }

    async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        endpoint.timeout(LONG).connect().await.unwrap()
    }

    async fn client(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel().await)
    }
}

fn metadata<'a>(status: &'a Status, name: &str) -> Option<&'a str> {
    status
        .metadata()
        .get(name)
        .map(|value| value.to_str().unwrap())
}

#[tokio::test]
async fn a_refusal_is_resource_exhausted_and_says_when_to_retry() {
    let bed = Bed::start(hourly(2)).await;
    let mut client = bed.client().await;
    for left in ["1", "0"] {
        let response = client.check(HealthCheckRequest::default()).await.unwrap();
        assert_eq!(
            response.metadata().get("x-ratelimit-remaining").unwrap(),
            left
        );
        assert_eq!(response.metadata().get("x-ratelimit-limit").unwrap(), "2");
        assert_eq!(
            response.into_inner().status(),
            tonic_health::pb::health_check_response::ServingStatus::Serving
        );
    }
    let refused = client
        .check(HealthCheckRequest::default())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(refused.message(), "the quota is used up for now");
    let pushback: u64 = metadata(&refused, "grpc-retry-pushback-ms")
        .unwrap()
        .parse()
        .unwrap();
    assert!((3_590_000..=3_600_000).contains(&pushback), "{pushback}");
    assert_eq!(metadata(&refused, "x-ratelimit-remaining"), Some("0"));
    assert_eq!(metadata(&refused, "retry-after"), None);

    // Another connection, the same state.
    let again = bed
        .client()
        .await
        .check(HealthCheckRequest::default())
        .await;
    assert_eq!(again.unwrap_err().code(), Code::ResourceExhausted);
}

/// As the bytes go: the status is in the head, and the head ends the stream.
#[tokio::test]
async fn a_refusal_is_trailers_only_on_the_wire() {
    let bed = Bed::start(hourly(1)).await;
    let stream = TcpStream::connect(bed.address).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let mut send = async |content_type| {
        let request = Request::post(format!(
            "http://{}/grpc.health.v1.Health/Check",
            bed.address
        ))
        .header("content-type", content_type)
        .header("te", "trailers")
        .body(Empty::<Bytes>::new())
        .unwrap();
        timeout(LONG, sender.send_request(request))
            .await
            .unwrap()
            .unwrap()
    };
    send("application/grpc").await;
    let refused = send("application/grpc+proto").await;
    assert_eq!(refused.status(), 200);
    assert_eq!(refused.headers()["grpc-status"], "8");
    assert_eq!(refused.headers()["content-type"], "application/grpc");
    assert!(refused.body().is_end_stream());

    // Who does not speak gRPC on the same port is told in HTTP.
    let refused = send("text/plain").await;
    assert_eq!(refused.status(), 429);
    assert_eq!(
        refused.headers()["content-type"],
        "application/problem+json"
    );
    assert_eq!(refused.headers()["retry-after"], "3600");
    assert!(!refused.headers().contains_key("grpc-status"));
    let body = refused.into_body().collect().await.unwrap().to_bytes();
    assert!(body.starts_with(b"{"));
}

/// A stream is one request, however long it lasts and whatever becomes of the
/// quota meanwhile.
#[tokio::test]
async fn a_stream_passes_and_is_charged_once() {
    let layer = hourly(2);
    let bed = Bed::start(layer.clone()).await;
    let mut client = bed.client().await;
    let request = || HealthCheckRequest {
        service: String::from("s"),
    };
    bed.reporter
        .set_service_status("s", ServingStatus::Serving)
        .await;

    let response = client.watch(request()).await.unwrap();
    assert_eq!(
        response.metadata().get("x-ratelimit-remaining").unwrap(),
        "1"
    );
    let mut updates = response.into_inner();
    let mut next = async || {
        timeout(LONG, updates.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
            .status
    };
    assert_eq!(next().await, ServingStatus::Serving as i32);
    client.check(request()).await.unwrap();
    for status in [ServingStatus::NotServing, ServingStatus::Serving] {
        bed.reporter.set_service_status("s", status).await;
        assert_eq!(next().await, status as i32);
    }
    let refused = client.watch(request()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(
        layer
            .handle()
            .usage("default", &Key::global())
            .unwrap()
            .remaining,
        0
    );
}

#[tokio::test]
async fn what_never_fits_is_not_to_be_retried() {
    let layer = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_second(5)).cost_by(|head| {
            let cost = head
                .headers
                .get("x-cost")
                .and_then(|cost| cost.to_str().ok()?.parse().ok());
            cost.unwrap_or(1)
        }))
        .build()
        .unwrap();
    let bed = Bed::start(layer).await;
    let mut request = tonic::Request::new(HealthCheckRequest::default());
    request.metadata_mut().insert("x-cost", 6.into());
    let refused = bed.client().await.check(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(
        refused.message(),
        "the request costs more than its limit can ever hold"
    );
    // A negative pushback forbids the retry.
    assert_eq!(metadata(&refused, "grpc-retry-pushback-ms"), Some("-1"));
    assert_eq!(metadata(&refused, "x-ratelimit-limit"), Some("5"));
}

#[tokio::test]
async fn the_peer_is_found() {
    let layer = RateLimitLayer::builder()
        .limit(
            Limit::new(Quota::per_hour(10))
                .name("peer")
                .key(ClientIp::new()),
        )
        .limit(
            Limit::new(Quota::per_hour(10))
                .name("method")
                .key(key::path()),
        )
        .build()
        .unwrap();
    let handle = layer.handle();
    let bed = Bed::start(layer).await;
    bed.client()
        .await
        .check(HealthCheckRequest::default())
        .await
        .unwrap();
    bed.client()
        .await
        .watch(HealthCheckRequest::default())
        .await
        .unwrap();
    let peer = ClientIp::new().key(Ipv4Addr::LOCALHOST.into());
    assert_eq!(handle.usage("peer", &peer).unwrap().remaining, 8);
    assert_eq!(handle.keys("peer").unwrap(), 1);
    assert_eq!(handle.keys("method").unwrap(), 2);
}

/// In front of a channel: the refusal is in the status' sources.
#[tokio::test]
async fn in_front_of_a_client() {
    let bed = Bed::start(hourly(100)).await;
    let limit = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_hour(1)))
        .errors()
        .build()
        .unwrap();
    let channel = ServiceBuilder::new()
        .layer(limit.clone())
        .service(bed.channel().await);
    let mut client = HealthClient::new(channel);
    client.check(HealthCheckRequest::default()).await.unwrap();
    let status = client
        .check(HealthCheckRequest::default())
        .await
        .unwrap_err();
    let mut source = status.source();
    let refusal = loop {
        let error = source.expect("the refusal is among the sources");
        match error.downcast_ref::<Refusal>() {
            Some(refusal) => break refusal,
            None => source = error.source(),
        }
    };
    assert!(refusal.retry_after().unwrap() > Duration::from_secs(3500));
    // Clones of the client share the limit.
    let mut other = HealthClient::new(limit.layer(bed.channel().await));
    assert!(other.check(HealthCheckRequest::default()).await.is_err());
}

/// Waiting in front of a channel.
#[cfg(feature = "wait")]
#[tokio::test]
async fn a_client_that_waits() {
    use buttress::clock;

    let layer = hourly(8);
    let bed = Bed::start(layer.clone()).await;
    let wait = RateLimitLayer::builder()
        .limit(Limit::new(
            Quota::new(1, Duration::from_millis(40)).burst(1),
        ))
        .errors()
        .build_waiting(LONG, 100)
        .unwrap();
    let client = HealthClient::new(wait.layer(bed.channel().await));
    let start = clock::now();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let mut client = client.clone();
        calls.spawn(async move { client.check(HealthCheckRequest::default()).await.is_ok() });
    }
    assert_eq!(calls.join_all().await, [true; 8]);
    assert!(clock::now() - start >= Duration::from_millis(7 * 40));
    assert_eq!(wait.waiting(), 0);
    // Each was sent once.
    let usage = layer.handle().usage("default", &Key::global()).unwrap();
    assert_eq!(usage.remaining, 0);
}
