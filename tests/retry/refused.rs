//! What our own layers refuse over HTTP, as a retry further out sees it. On a
//! paused clock, and so without sockets.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress::{
    Refusal, RefusalKind,
    circuit_breaker::{Breaker, CircuitBreakerLayer, Settings as BreakerSettings},
    clock::{self, Instant},
    rate_limit::{Limit, Quota, RateLimitLayer},
    retry::{Backoff, Cause, GiveUp, ReplayBody, RetryBuilder, RetryLayer, Settings},
    testing::web,
    timeout::TimeoutLayer,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use tower::{Layer, ServiceExt, service_fn, util::BoxCloneSyncService};

use crate::support::MS;

type Body = Full<Bytes>;
type Callee = BoxCloneSyncService<Request<ReplayBody<Body>>, Response<Body>, Infallible>;

const SECOND: Duration = Duration::from_secs(1);
const OPEN: Duration = Duration::from_millis(1300);

/// What came to the callee, and when.
#[derive(Clone, Default)]
struct Came(Arc<Mutex<Vec<(Instant, Bytes)>>>);

impl Came {
    fn take(&self) -> Vec<(Instant, Bytes)> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

/// Answers when it has read all.
fn callee() -> (Callee, Came) {
    let came = Came::default();
    let hears = came.clone();
    let service = service_fn(move |request: Request<ReplayBody<Body>>| {
        let came = hears.clone();
        async move {
            let now = clock::now();
            let body = request.into_body().collect().await.unwrap().to_bytes();
            came.0.lock().unwrap().push((now, body));
            Ok(web::response(201, "made"))
        }
    });
    (Callee::new(service), came)
}

/// What a retry tells: of an attempt to come, or of the end.
type Word = Result<(Duration, Cause), (u32, GiveUp)>;

#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<Word>>>);

impl Told {
    fn take(&self) -> Vec<Word> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

/// Three attempts, half a second between them where nobody asks for more.
fn retry() -> (RetryBuilder, Told) {
    let told = Told::default();
    let (again, ends) = (told.clone(), told.clone());
    let builder = RetryLayer::builder()
        .settings(Settings::standard().backoff(Backoff::fixed(500 * MS)))
        .on_retry(move |_, wait, cause| again.0.lock().unwrap().push(Ok((wait, cause))))
        .on_give_up(move |attempts, _, why| ends.0.lock().unwrap().push(Err((attempts, why))));
    (builder, told)
}

fn breaker() -> (CircuitBreakerLayer, Breaker) {
    let layer = CircuitBreakerLayer::builder()
        .settings(BreakerSettings::critical().reset_timeout(OPEN))
        .build()
        .unwrap();
    let breaker = layer.breaker().clone();
    (layer, breaker)
}

fn order() -> Request<Body> {
    web::post("/orders", "an order")
}

#[tokio::test(start_paused = true)]
async fn an_order_that_an_open_breaker_refused_comes_again_when_it_may() {
    let (callee, came) = callee();
    let (layer, breaker) = breaker();
    let (retry, told) = retry();
    let retry = retry.build().unwrap();
    breaker.trip(None).unwrap();
    let began = clock::now();
    let service = retry.layer(layer.layer(callee));
    let response = service.clone().oneshot(order()).await.unwrap();
    assert_eq!(response.status(), StatusCode::CREATED);
    // Not after the two seconds that the header says.
    assert_eq!(came.take(), [(began + OPEN, Bytes::from("an order"))]);
    let open = Cause::Refused(RefusalKind::CircuitOpen);
    assert_eq!(told.take(), [Ok((OPEN, open))]);

    // A retry without any timeout has nothing to ask with: a status, and a
    // method that may not be repeated.
    let settings = Settings::standard().total_timeout(None);
    let unasked = RetryLayer::builder().settings(settings).build().unwrap();
    let (callee, came) = self::callee();
    let (layer, breaker) = self::breaker();
    breaker.trip(None).unwrap();
    let service = unasked.layer(layer.layer(callee));
    let response = service.oneshot(order()).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()["retry-after"], "2");
    assert!(came.take().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_breaker_that_is_forced_open_is_asked_once() {
    let (callee, came) = callee();
    let (layer, breaker) = breaker();
    let (retry, told) = retry();
    let service = retry.build().unwrap().layer(layer.layer(callee));
    breaker.force_open();
    let began = clock::now();
    for request in [web::get("/"), order(), web::grpc("/shop.Orders/List")] {
        let response = service.clone().oneshot(request).await.unwrap();
        // The answer in hand, at once.
        assert!(!response.headers().contains_key("retry-after"));
        assert_eq!(told.take(), [Err((1, GiveUp::Pushback))]);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert!(body.is_empty() || body.starts_with(b"{"), "{body:?}");
    }
    assert_eq!(clock::now(), began);
    assert!(came.take().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_a_limiter_refused_comes_again_when_it_fits() {
    let (callee, came) = callee();
    let (retry, told) = retry();
    let every = 2700 * MS;
    let limit = RateLimitLayer::builder()
        .limit(Limit::new(Quota::new(1, every)))
        .build()
        .unwrap();
    let service = retry.build().unwrap().layer(limit.layer(callee));
    let began = clock::now();
    for request in [order(), order(), web::grpc("/shop.Orders/Create")] {
        let response = service.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::CREATED);
    }
    let came = came.take().into_iter().map(|(when, _)| when - began);
    assert_eq!(came.collect::<Vec<_>>(), [0, 1, 2].map(|n| n * every));
    // gRPC's RESOURCE_EXHAUSTED, too, of which no code says that it is worth
    // another attempt.
    let limited = Cause::Refused(RefusalKind::RateLimited);
    assert_eq!(told.take(), [Ok((every, limited)); 2]);
}

/// A timeout keeps little of the head, and answers when the request is gone.
#[tokio::test(start_paused = true)]
async fn a_timeout_is_no_proof_that_nothing_has_begun() {
    let (retry, told) = retry();
    let hangs = service_fn(|_: Request<ReplayBody<Body>>| {
        std::future::pending::<Result<Response<Body>, Infallible>>()
    });
    let timeout = TimeoutLayer::builder().limit(SECOND).build().unwrap();
    let service = retry.build().unwrap().layer(timeout.layer(hangs));
    let response = service.clone().oneshot(order()).await.unwrap();
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(told.take(), [Err((1, GiveUp::Unsafe))]);
    let refusal = Refusal::of(response.extensions()).unwrap();
    assert_eq!(refusal.kind(), RefusalKind::TimedOut);

    service.oneshot(web::get("/")).await.unwrap();
    let late = Cause::Refused(RefusalKind::TimedOut);
    let again = Ok((500 * MS, late));
    assert_eq!(told.take(), [again, again, Err((3, GiveUp::Attempts))]);
}

/// Each layer that refuses answers through the same responder; and what is
/// sent of it is the same, asked or not.
#[tokio::test(start_paused = true)]
async fn on_the_wire_there_is_no_difference() {
    let fields = async |total: Option<Duration>| -> (StatusCode, HeaderMap, Bytes) {
        let limit = RateLimitLayer::builder()
            .limit(Limit::new(Quota::new(1, SECOND * 100)))
            .wall_clock(|| Duration::from_secs(1_790_000_000))
            .build()
            .unwrap();
        let settings = Settings::standard().total_timeout(total);
        let layer = RetryLayer::builder().settings(settings).build().unwrap();
        let service = layer.layer(limit.layer(callee().0));
        service.clone().oneshot(order()).await.unwrap();
        let (head, body) = service.oneshot(order()).await.unwrap().into_parts();
        assert_eq!(Refusal::of(&head.extensions).is_some(), total.is_some());
        let body = body.collect().await.unwrap().to_bytes();
        (head.status, head.headers, body)
    };
    let asked = fields(Some(SECOND * 30)).await;
    assert_eq!(asked.0, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(asked.1["retry-after"], "100");
    assert_eq!(asked, fields(None).await);
}
