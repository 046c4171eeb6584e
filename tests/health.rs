//! Health and a real circuit breaker, and a real drain: what one tells, the
//! other shows.

use std::{convert::Infallible, time::Duration};

use buttress::{
    circuit_breaker::{Breaker, CircuitBreakerLayer},
    drain::{DrainLayer, Phase, Server, Shutdown},
    health::{
        Gate, HealthRegistry, HealthRegistryBuilder, Readiness, ReadinessGate, Source, Threshold,
    },
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use serde_json::{Value, json};
use tokio::{net::TcpListener, time::timeout};
use tonic::{Code, service::Routes, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tower::{Layer, ServiceExt, service_fn};

const LONG: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(20);

async fn ready(health: &HealthRegistry) -> (u16, Value) {
    let request = Request::get("/health/ready").body(()).unwrap();
    let response = health.service().oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap())
}

/// Has a breaker opened by an upstream that fails.
async fn break_it() -> Breaker {
    let layer = CircuitBreakerLayer::builder()
        .name("orders")
        .build()
        .unwrap();
    let service = layer.layer(service_fn(async |_: Request<Empty<Bytes>>| {
        let mut response = Response::new(Full::<Bytes>::default());
        *response.status_mut() = StatusCode::BAD_GATEWAY;
        Ok::<_, Infallible>(response)
    }));
    let breaker = layer.breaker().clone();
    for _ in 0..100 {
        let request = Request::new(Empty::new());
        let response = service.clone().oneshot(request).await.unwrap();
        if response.status() == StatusCode::SERVICE_UNAVAILABLE {
            return breaker;
        }
    }
    panic!("it never opens");
}

fn with(breaker: &Breaker) -> HealthRegistryBuilder {
    HealthRegistry::builder().source(breaker.clone())
}

#[tokio::test]
async fn an_open_breaker_is_shown_and_stays_ready() {
    let breaker = break_it().await;
    let health = with(&breaker).evaluate_every(TICK).build().unwrap();
    let _running = health.start().unwrap();
    tokio::time::sleep(10 * TICK).await;
    let fallen = (200, json!({"ready": true, "score": 0.0}));
    assert_eq!(ready(&health).await, fallen);
    breaker.force_closed();
    // Switched off, and nothing else there.
    assert_eq!(
        ready(&health).await,
        (200, json!({"ready": true, "score": 1.0}))
    );
    breaker.reset();
    assert_eq!(health.score(), 1.0);

    // A critical one is the score, whatever else is well.
    let other = Breaker::builder("users").build().unwrap();
    health.add_source(Source::new(other).weight(9.0)).unwrap();
    breaker.force_open();
    assert!((health.score() - 0.9).abs() < 1e-9);
    assert!(health.remove_source("orders"));
    health
        .add_source(Source::new(breaker).critical(true))
        .unwrap();
    assert_eq!(health.score(), 0.0);
}

#[tokio::test]
async fn with_a_threshold_it_is_not_ready_after_three_evaluations() {
    let breaker = break_it().await;
    let health = with(&breaker)
        .threshold(Threshold::new(0.5))
        .evaluate_every(10 * TICK)
        .build()
        .unwrap();
    assert_eq!(ready(&health).await.0, 200);
    let begun = tokio::time::Instant::now();
    let _running = health.start().unwrap();
    let until = async |status: u16| {
        let polling = async {
            while ready(&health).await.0 != status {
                tokio::time::sleep(TICK / 10).await;
            }
        };
        tokio::time::timeout(LONG, polling).await.unwrap();
    };
    until(503).await;
    // At once, and twice more.
    assert!(begun.elapsed() >= 19 * TICK, "{:?}", begun.elapsed());
    let document = json!({"ready": false, "reason": "score", "score": 0.0});
    assert_eq!(ready(&health).await, (503, document));
    breaker.reset();
    until(200).await;
}

/// The types of `health` are those of core, with and without the feature: a
/// gate of the one is a gate of the other.
#[tokio::test]
async fn gates_are_those_of_core() {
    let gate = Gate::closed("shutting_down");
    let health = HealthRegistry::builder()
        .gate("drain", gate.clone())
        .build()
        .unwrap();
    let readiness = ReadinessGate::readiness(&health);
    assert_eq!(
        readiness,
        Readiness::NotReady {
            reason: "shutting_down"
        }
    );
    let _server = health.grpc_server();
}

/// Those who watch over the port that drains are told, and sent away as it
/// closes: the drain does not wait for them until the cut.
#[tokio::test]
async fn a_watch_does_not_hold_a_drain() {
    for delay in [15 * TICK, Duration::ZERO] {
        let shutdown = Shutdown::builder()
            .drain_delay(delay)
            .timeout(LONG)
            .hook_reserve(TICK)
            .build()
            .unwrap();
        let health = HealthRegistry::builder()
            .gate("drain", shutdown.clone())
            .build()
            .unwrap();
        let _running = health.start().unwrap();
        let server = health.grpc_server_until(shutdown.reached(Phase::Closing));
        let service = DrainLayer::new(&shutdown).layer(Routes::new(server).prepare());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(Server::new(&shutdown).serve(listener, service));
        let drain = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.run().await }
        });

        let channel = Channel::from_shared(format!("http://{address}")).unwrap();
        let mut client = HealthClient::new(channel.connect().await.unwrap());
        let watch = client.watch(HealthCheckRequest::default()).await.unwrap();
        let mut watch = watch.into_inner();
        let next = async |watch: &mut tonic::Streaming<_>| {
            let message = timeout(LONG, watch.message()).await.unwrap();
            message.map(|message: Option<tonic_health::pb::HealthCheckResponse>| {
                message.unwrap().status()
            })
        };
        while next(&mut watch).await.unwrap() != ServingStatus::Serving {}
        assert!(shutdown.trigger("a test"));
        let told = next(&mut watch).await.unwrap();
        assert_eq!(told, ServingStatus::NotServing);
        if !delay.is_zero() {
            // By the gate, while all is still served.
            assert_eq!(shutdown.phase(), Phase::Draining);
        }
        let end = next(&mut watch).await.unwrap_err();
        assert_eq!(end.code(), Code::Unavailable, "{end}");
        assert!(shutdown.phase() >= Phase::Closing);

        let report = timeout(LONG, drain).await.unwrap().unwrap();
        assert_eq!(report.exit_code(), 0, "{report}");
        assert!(report.took() >= delay, "{report}");
        assert!(report.took() < LONG / 3, "{report}");
        timeout(LONG, serving).await.unwrap().unwrap();
    }
}
