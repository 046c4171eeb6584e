//! What answers in the place of a callee that is left alone.

use std::{convert::Infallible, time::Duration};

use buttress_circuit_breaker::{CircuitBreakerLayer, CircuitOpen, Settings, State};
use buttress_core::{
    Any,
    testing::{Fate, ReadinessProbe, Script, Step, advance, web},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tokio_test::{assert_pending, assert_ready, task};
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimit};

type Body = Full<Bytes>;

const SECOND: Duration = Duration::from_secs(1);

fn touchy() -> Settings {
    Settings::aggressive().consecutive_failures(1)
}

/// The inner service answers `n`, or fails at 0; the fallback answers 100 more.
#[tokio::test(start_paused = true)]
async fn a_closure_answers_while_it_is_open() {
    let (inner, script) = Script::<u32, u32, &str>::new()
        .otherwise(|n| {
            if *n == 0 {
                Step::err("down")
            } else {
                Step::ok(*n)
            }
        })
        .build();
    let layer = CircuitBreakerLayer::any()
        .settings(touchy())
        .fallback(async |n: u32, open: CircuitOpen| {
            if n == 13 {
                return Err("the fallback fails");
            }
            Ok(100 + n + u32::try_from(open.retry_after().unwrap().as_secs()).unwrap())
        })
        .build()
        .unwrap();
    let service = layer.layer(inner);
    let send = async |n| service.clone().oneshot(n).await;
    assert_eq!(send(1).await, Ok(1));
    // The failure that opens it is the callee's own still.
    assert_eq!(send(0).await, Err("down"));
    assert_eq!(send(2).await, Ok(112));
    // Not judged.
    assert_eq!(send(13).await, Err("the fallback fails"));
    advance(10 * SECOND).await;
    assert_eq!(send(3).await, Ok(3));
    assert_eq!(layer.breaker().state(), State::Closed);
    assert_eq!(send(4).await, Ok(4));
    assert_eq!(script.requests(), [1, 0, 3, 4]);
}

#[tokio::test(start_paused = true)]
async fn readiness() {
    let layer = CircuitBreakerLayer::any()
        .fallback(async |n: u32, _: CircuitOpen| Ok::<_, Infallible>(n))
        .build()
        .unwrap();
    ReadinessProbe::new(|| 1, |n: &u32| Step::<u32, Infallible>::ok(*n))
        .check(&layer)
        .await;
}

/// On HTTP the error type stays the inner one, and a fallback's response has
/// nothing to do with the breaker.
#[tokio::test(start_paused = true)]
async fn a_closure_on_http() {
    let (inner, script) = Script::<Request<Body>, Response<Body>, Infallible>::new()
        .otherwise(|_| Step::ok(web::response(500, "down")))
        .build();
    let layer = CircuitBreakerLayer::builder()
        .settings(touchy())
        .fallback(async |request: Request<Body>, open: CircuitOpen| {
            let text = format!("{} without {}", request.uri(), open.name().unwrap());
            Ok::<_, Infallible>(web::response(500, text))
        })
        .build()
        .unwrap();
    let service = layer.layer(inner);
    let get = async || {
        let Ok::<_, Infallible>(response) = service.clone().oneshot(web::get("/x")).await;
        let whole = response.into_body().collect().await.unwrap();
        whole.to_bytes()
    };
    assert_eq!(get().await, "down");
    let since = layer.breaker().status();
    for _ in 0..3 {
        assert_eq!(get().await, "/x without default");
    }
    assert_eq!(layer.breaker().status(), since);
    assert_eq!(script.call_count(), 1);
}

/// A service in the background is polled ready before it is called: two
/// callers take turns at one slot.
#[tokio::test(start_paused = true)]
async fn a_service_is_polled_ready() {
    let (inner, _) = Script::<u32, u32, Infallible>::new().build();
    let (spare, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|n| Step::ok(100 + *n).after(SECOND))
        .build();
    let layer = CircuitBreakerLayer::<Any<u32>, _, _>::any()
        .fallback_service(ConcurrencyLimit::new(spare, 1))
        .build()
        .unwrap();
    layer.breaker().force_open();
    let service = layer.layer(inner);
    let (first, second) = tokio::join!(service.clone().oneshot(1), service.clone().oneshot(2));
    assert_eq!((first, second), (Ok(101), Ok(102)));
    assert_eq!(script.peak_in_flight(), 1);
    script.assert_finished();
}

/// Dropped while it waits for its turn, or while it is served: nothing of it
/// is left.
#[tokio::test(start_paused = true)]
async fn a_dropped_fallback_is_gone() {
    let (inner, _) = Script::<u32, u32, Infallible>::new().build();
    let (spare, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|_| Step::hang())
        .build();
    let layer = CircuitBreakerLayer::<Any<u32>, _, _>::any()
        .fallback_service(ConcurrencyLimit::new(spare, 1))
        .build()
        .unwrap();
    layer.breaker().force_open();
    let mut service = layer.layer(inner);
    let mut served = task::spawn(service.ready().await.unwrap().call(1));
    assert_pending!(served.poll());
    let mut waits = task::spawn(service.call(2));
    assert_pending!(waits.poll());
    drop(waits);
    let mut next = task::spawn(service.call(3));
    assert_pending!(next.poll());
    drop(served);
    assert!(next.is_woken());
    assert_pending!(next.poll());
    assert_eq!(script.requests(), [1, 3]);
    drop((next, service, layer));
    assert_eq!(script.count(Fate::Dropped), 2);
    script.assert_finished();
}

/// A fallback that is not ready for good says so by its own error.
#[tokio::test(start_paused = true)]
async fn a_service_whose_readiness_fails() {
    let (inner, _) = Script::<u32, u32, &str>::new().build();
    let (spare, script) = Script::<u32, u32, &str>::new().build();
    script.fail_readiness("no spare either");
    let layer = CircuitBreakerLayer::<Any<u32>, _, _>::any()
        .fallback_service(spare)
        .build()
        .unwrap();
    layer.breaker().force_open();
    let mut call = task::spawn(layer.layer(inner).oneshot(1));
    assert_eq!(assert_ready!(call.poll()), Err("no spare either"));
}

/// On HTTP, as services are used there.
#[tokio::test(start_paused = true)]
async fn a_service_on_http() {
    let (inner, _) = Script::<Request<Body>, Response<Body>, Infallible>::new().build();
    let (spare, script) = Script::<Request<Body>, Response<Body>, Infallible>::new()
        .otherwise(|_| Step::ok(web::response(203, "a copy")))
        .build();
    let layer = CircuitBreakerLayer::builder()
        .fallback_service(spare)
        .build()
        .unwrap();
    layer.breaker().force_open();
    let response = layer.layer(inner).oneshot(web::get("/")).await.unwrap();
    assert_eq!(response.status(), 203);
    assert_eq!(web::text(response).await, "a copy");
    script.assert_finished();
}
