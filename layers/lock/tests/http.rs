//! Over HTTP, in one process: who is served and who is told what.

use std::{convert::Infallible, time::Duration};

use buttress_core::{
    Head, Refusal,
    key::{self, ExtractKeyExt, Key},
    refusal::Tell,
    testing::{
        advance, elapsed, settle,
        web::{self, ScriptedBody},
    },
};
use buttress_lock::{Errors, Fence, LockBuilder, LockLayer, MissingKey};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use tokio_test::{assert_pending, assert_ready, task};
use tower::{Layer, Service, ServiceExt, service_fn};

const SECOND: Duration = Duration::from_secs(1);

type Web = Request<Full<Bytes>>;

fn by_order() -> LockBuilder {
    LockLayer::builder(key::header("x-order")).name("orders")
}

fn order(id: &str) -> Web {
    let mut request = web::post("/", "");
    request.headers_mut().insert("x-order", id.parse().unwrap());
    request
}

/// Answers at once with a body that takes a second, and the token.
async fn slow_body(request: Web) -> Result<Response<ScriptedBody>, Infallible> {
    let fence = request.extensions().get::<Fence>();
    let body = ScriptedBody::new().data("a").wait(SECOND).data("b");
    let mut response = Response::new(body);
    if let Some(fence) = fence {
        assert!(fence.is_held());
        response.extensions_mut().insert(fence.clone());
    }
    Ok(response)
}

fn fence_of<B>(response: &Response<B>) -> Fence {
    response.extensions().get::<Fence>().unwrap().clone()
}

#[tokio::test(start_paused = true)]
async fn one_request_a_key_to_the_end_of_its_body() {
    let layer = by_order().build().unwrap();
    let handle = layer.handle();
    let service = layer.layer(service_fn(slow_body));
    let call = async |id| service.clone().oneshot(order(id)).await.unwrap();

    let first = call("1").await;
    let fence = fence_of(&first);
    assert_eq!(first.status(), 200);
    assert_eq!(handle.held(), 1);
    // By another clone of the layer, too.
    let other = layer.clone().layer(service_fn(slow_body));
    let busy = other.oneshot(order("1")).await.unwrap();
    assert_eq!(busy.status(), 409);
    assert_eq!(busy.headers()["retry-after"], "1");
    assert_eq!(busy.headers()["content-type"], "application/problem+json");
    let problem: serde_json::Value = serde_json::from_str(&web::text(busy).await).unwrap();
    assert_eq!(problem["reason"], "locked");
    assert_eq!(problem["status"], 409);
    // Another key is another lock.
    assert_eq!(call("2").await.status(), 200);

    assert!(fence.is_held());
    assert_eq!(web::text(first).await, "ab");
    assert!(!fence.is_held());
    assert_eq!(handle.held(), 0);
    let next = call("1").await;
    assert_eq!(next.status(), 200);
    assert!(fence_of(&next).token() > fence.token());
}

#[tokio::test(start_paused = true)]
async fn it_is_free_however_a_body_ends() {
    let service = by_order().build().unwrap().layer(service_fn(
        async |request: Web| -> Result<_, Infallible> {
            let body = ScriptedBody::new().data("a");
            Ok(Response::new(match request.uri().path() {
                "/breaks" => body.fail("broken"),
                "/trailers" => body.trailers(HeaderMap::new()),
                _ => body.hang(),
            }))
        },
    ));
    let call = async |path: &str| {
        let mut request = order("1");
        *request.uri_mut() = path.parse().unwrap();
        service.clone().oneshot(request).await.unwrap()
    };
    for path in ["/breaks", "/trailers", "/breaks"] {
        let mut body = call(path).await.into_body();
        assert_eq!(call("/").await.status(), 409);
        while body.frame().await.is_some_and(|frame| frame.is_ok()) {}
        // Known with its last frame: it need not be dropped.
        let dropped = call("/").await;
        assert_eq!(dropped.status(), 200);
        drop(dropped);
        drop(body);
    }
    // What has no body is over with its head.
    let empty = by_order()
        .build()
        .unwrap()
        .layer(service_fn(async |_: Web| {
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
        }));
    let first = empty.clone().oneshot(order("1")).await.unwrap();
    assert!(first.body().is_end_stream());
    assert_eq!(empty.oneshot(order("1")).await.unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_served_in_turn_or_told_in_time() {
    let layer = by_order().wait(SECOND * 2).build().unwrap();
    let mut service = layer.layer(service_fn(slow_body));
    let first = service.clone().oneshot(order("1")).await.unwrap();
    let mut second = task::spawn(service.ready().await.unwrap().call(order("1")));
    let mut third = task::spawn(service.ready().await.unwrap().call(order("1")));
    assert_pending!(second.poll());
    assert_pending!(third.poll());
    assert_eq!(web::text(first).await, "ab");
    assert!(second.is_woken());
    let second = assert_ready!(second.poll()).unwrap();
    assert_eq!(second.status(), 200);
    assert_pending!(third.poll());
    // It does not end: one second is gone, and another one.
    advance(SECOND - Duration::from_nanos(1)).await;
    assert_pending!(third.poll());
    advance(Duration::from_millis(1)).await;
    let third = assert_ready!(third.poll()).unwrap();
    assert_eq!(third.status(), 409);
    drop(second);
    assert_eq!(layer.handle().held(), 0);

    layer.handle().set_wait(Duration::ZERO).unwrap();
    let held = service.clone().oneshot(order("1")).await.unwrap();
    let (took, busy) = elapsed(service.oneshot(order("1"))).await;
    assert_eq!(
        (took, busy.unwrap().status().as_u16()),
        (Duration::ZERO, 409)
    );
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn a_request_without_a_key() {
    let call = async |builder: LockBuilder| {
        let service = builder.build().unwrap().layer(service_fn(slow_body));
        let first = service.clone().oneshot(web::get("/")).await.unwrap();
        let second = service.oneshot(web::get("/")).await.unwrap();
        let told = first.extensions().get::<Fence>().is_some();
        (first.status().as_u16(), second.status().as_u16(), told)
    };
    assert_eq!(call(by_order()).await, (400, 400, false));
    let skip = by_order().missing_key(MissingKey::Skip);
    assert_eq!(call(skip).await, (200, 200, false));
    let share = by_order().missing_key(MissingKey::Share);
    assert_eq!(call(share).await, (200, 409, true));
}

#[tokio::test(start_paused = true)]
async fn grpc_is_told_aborted() {
    let service = by_order().build().unwrap().layer(service_fn(slow_body));
    let _held = service.clone().oneshot(order("1")).await.unwrap();
    let mut request = web::grpc("/shop.Orders/Pay");
    request
        .headers_mut()
        .insert("x-order", "1".parse().unwrap());
    let response = service.oneshot(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["grpc-status"], "10");
    assert_eq!(response.headers()["grpc-retry-pushback-ms"], "1000");
    assert!(response.body().is_end_stream());
}

#[tokio::test(start_paused = true)]
async fn answers_of_ones_own_at_once_and_after_a_wait() {
    for wait in [Duration::ZERO, SECOND / 2] {
        let layer = by_order()
            .wait(wait)
            .retry_after(None)
            .responder(|refusal: &Refusal, request: Head<'_>| {
                // The whole head is there, after a wait too.
                let order = request.headers["x-order"].to_str().unwrap();
                let text = format!("{order}: {}", refusal.reason());
                Response::builder().status(423).body(text.into()).unwrap()
            })
            .build()
            .unwrap();
        let service = layer.layer(service_fn(slow_body));
        let held = service.clone().oneshot(order("7")).await.unwrap();
        let mut request = order("7");
        Tell::attach(request.extensions_mut());
        let response = service.oneshot(request).await.unwrap();
        assert_eq!(response.status(), 423);
        let refusal = Refusal::of(response.extensions()).unwrap();
        assert_eq!(refusal.retry_after(), None);
        assert_eq!(refusal.origin(), Some("orders"));
        assert!(refusal.was_never_sent());
        assert_eq!(web::text(response).await, "7: locked");
        drop(held);
    }
}

#[tokio::test(start_paused = true)]
async fn errors_in_place_of_responses() {
    let layer = by_order().errors().build().unwrap();
    let service = layer.layer(service_fn(slow_body));
    let held = service.clone().oneshot(order("1")).await.unwrap();
    let error = service.clone().oneshot(order("1")).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().status(), 409);
    let error: buttress_core::BoxError = error.into();
    assert!(Refusal::find(&*error).is_some());
    assert_eq!(web::text(held).await, "ab");
    assert!(service.oneshot(order("1")).await.is_ok());
    let _: LockLayer<_, Errors> = layer;
}

#[tokio::test(start_paused = true)]
async fn dropped_anywhere_it_is_free() {
    let layer = by_order().wait(SECOND * 60).build().unwrap();
    let handle = layer.handle();
    let hangs = layer.layer(service_fn(async |_: Web| {
        std::future::pending::<Result<Response<ScriptedBody>, Infallible>>().await
    }));
    let works = layer.layer(service_fn(slow_body));
    for polls in 0..3 {
        // In the call, or before it; waiting; and with its turn to come.
        let mut calling = task::spawn(hangs.clone().oneshot(order("1")));
        let mut waiting = task::spawn(works.clone().oneshot(order("1")));
        let mut next = task::spawn(works.clone().oneshot(order("1")));
        for _ in 0..polls {
            assert_pending!(calling.poll());
            assert_pending!(waiting.poll());
            assert_pending!(next.poll());
        }
        drop(calling);
        drop(waiting);
        let response = next.await.unwrap();
        assert_eq!(handle.held(), 1);
        drop(response);
        assert_eq!(handle.held(), 0, "{polls}");
    }
    // A turn that was given and never seen.
    let held = works.clone().oneshot(order("1")).await.unwrap();
    let mut waiting = task::spawn(works.clone().oneshot(order("1")));
    assert_pending!(waiting.poll());
    drop(held);
    assert!(waiting.is_woken());
    drop(waiting);
    settle().await;
    assert_eq!(works.oneshot(order("1")).await.unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn a_panic_frees_it() {
    let layer = by_order().build().unwrap();
    let service = layer.layer(service_fn(
        async |request: Web| -> Result<Response<Full<Bytes>>, Infallible> {
            assert_ne!(request.uri().path(), "/panics");
            Ok(web::response(200, "ok"))
        },
    ));
    let mut panics = order("1");
    *panics.uri_mut() = "/panics".parse().unwrap();
    let call = tokio::spawn(service.clone().oneshot(panics));
    assert!(call.await.unwrap_err().is_panic());
    assert_eq!(layer.handle().held(), 0);
    assert_eq!(service.oneshot(order("1")).await.unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn too_many_keys_are_refused() {
    let layer = by_order().max_keys(2.try_into().unwrap()).build().unwrap();
    let service = layer.layer(service_fn(slow_body));
    let call = async |id| service.clone().oneshot(order(id)).await.unwrap();
    let held = [call("1").await, call("2").await];
    assert_eq!(call("3").await.status(), 503);
    assert_eq!(call("1").await.status(), 409);
    drop(held);
    assert_eq!(call("3").await.status(), 200);
}

/// In one process a lock cannot be lost: a body that is to be cut when it is
/// runs to its end.
#[tokio::test(start_paused = true)]
async fn what_is_never_lost_is_never_cut() {
    let by = key::header("x-order").or(Key::from("none"));
    let layer = LockLayer::builder(by)
        .ttl(Duration::from_millis(10))
        .cut_when_lost()
        .build()
        .unwrap();
    let service = layer.layer(service_fn(slow_body));
    let response = service.oneshot(order("1")).await.unwrap();
    let fence = fence_of(&response);
    let mut lost = task::spawn(fence.lost());
    assert_pending!(lost.poll());
    assert_eq!(
        web::text(response.map(|body| body.map_err(|_| ()))).await,
        "ab"
    );
    assert_ready!(lost.poll());
}
