//! What is counted, under the names that the documentation gives.

use std::{collections::BTreeMap, convert::Infallible, time::Duration};

use buttress_core::{
    key,
    testing::web::{self, ScriptedBody},
};
use buttress_lock::{LockBuilder, LockLayer, MissingKey};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tower::{Layer, ServiceExt, service_fn};

/// Name and labels as Prometheus would write them, and the value, where it is
/// not zero. The debugging recorder starts each snapshot anew, gauges too.
fn values(snapshotter: &Snapshotter) -> BTreeMap<String, f64> {
    let snapshot = snapshotter.snapshot().into_vec();
    let values = snapshot.into_iter().map(|(key, _, description, value)| {
        assert!(description.is_some(), "{key:?} is not described");
        let (_, key) = key.into_parts();
        let labels = key
            .labels()
            .map(|label| format!("{}={}", label.key(), label.value()));
        let name = format!("{}{{{}}}", key.name(), labels.collect::<Vec<_>>().join(","));
        let value = match value {
            DebugValue::Counter(count) => count as f64,
            DebugValue::Gauge(value) => value.into_inner(),
            DebugValue::Histogram(values) => values.into_iter().map(f64::from).sum(),
        };
        (name, value)
    });
    values.filter(|(_, value)| *value != 0.0).collect()
}

fn told<const N: usize>(expected: [(&str, f64); N]) -> BTreeMap<String, f64> {
    expected
        .map(|(name, value)| (name.to_owned(), value))
        .into()
}

fn outcome(outcome: &str) -> String {
    format!("lock_requests_total{{name=api,outcome={outcome}}}")
}

fn request(order: Option<&str>) -> Request<Full<Bytes>> {
    let mut request = web::get("/");
    if let Some(order) = order {
        let order = order.parse().unwrap();
        request.headers_mut().insert("x-order", order);
    }
    request
}

async fn answer(_: Request<Full<Bytes>>) -> Result<Response<ScriptedBody>, Infallible> {
    Ok(Response::new(ScriptedBody::new().data("a").hang()))
}

#[tokio::test(start_paused = true)]
async fn requests_and_what_is_held() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);
    let builder = || -> LockBuilder {
        LockLayer::builder(key::header("x-order"))
            .name("api")
            .max_keys(1.try_into().unwrap())
    };
    let layer = builder().build().unwrap();
    let service = layer.layer(service_fn(answer));
    let call = async |order| service.clone().oneshot(request(order)).await.unwrap();
    const HELD: &str = "locks_held{name=api}";

    let held = call(Some("1")).await;
    let (locked, busy) = (outcome("locked"), outcome("busy"));
    let (full, missing) = (outcome("full"), outcome("missing_key"));
    assert_eq!(values(&snapshotter), told([(&locked, 1.0), (HELD, 1.0)]));
    call(Some("1")).await;
    assert_eq!(values(&snapshotter), told([(&busy, 1.0)]));
    call(Some("2")).await;
    assert_eq!(values(&snapshotter), told([(&full, 1.0)]));
    layer.handle().set_wait(Duration::from_secs(2)).unwrap();
    call(Some("1")).await;
    let wait = "lock_wait_duration_seconds{name=api}";
    let expected = told([(&busy, 1.0), (wait, 2.0)]);
    assert_eq!(values(&snapshotter), expected);
    drop(held);
    assert_eq!(values(&snapshotter), told([(HELD, -1.0)]));
    call(None).await;
    assert_eq!(values(&snapshotter), told([(&missing, 1.0)]));

    let skip = builder().missing_key(MissingKey::Skip).build().unwrap();
    let skip = skip.layer(service_fn(answer));
    skip.oneshot(request(None)).await.unwrap();
    assert_eq!(values(&snapshotter), told([(&outcome("skipped"), 1.0)]));
}

#[cfg(feature = "redis")]
#[tokio::test]
async fn what_redis_has_part_in() {
    use buttress_core::clock;
    use buttress_lock::{Fence, OnStoreError};
    use buttress_redis::{Cmd, testing::Server};

    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);
    let mut server = Server::start().await;
    let redis = server.redis();
    let builder = || -> LockBuilder {
        LockLayer::builder(key::header("x-order"))
            .name("api")
            .redis(&redis)
            .ttl(Duration::from_millis(600))
    };
    let serve = async |request: Request<Full<Bytes>>| {
        let mut response = Response::new(ScriptedBody::new().hang());
        if let Some(fence) = request.extensions().get::<Fence>() {
            response.extensions_mut().insert(fence.clone());
        }
        Ok::<_, Infallible>(response)
    };
    let service = builder().build().unwrap().layer(service_fn(serve));
    let held = service.clone().oneshot(request(Some("1"))).await.unwrap();
    let mut flush = Cmd::new();
    flush.arg("FLUSHALL");
    redis.run::<()>("test", &flush).await.unwrap();
    held.extensions().get::<Fence>().unwrap().lost().await;
    // The task that extends it says so in the same breath.
    let began = clock::now();
    let mut seen = values(&snapshotter);
    while !seen.contains_key("locks_lost_total{name=api}") {
        assert!(clock::now() - began < Duration::from_secs(30));
        tokio::task::yield_now().await;
        seen = values(&snapshotter);
    }
    assert_eq!(seen["locks_lost_total{name=api}"], 1.0);

    server.kill();
    drop(held);
    let allow = builder().on_store_error(OnStoreError::Allow);
    let allow = allow.build().unwrap().layer(service_fn(serve));
    for (service, what) in [(service, "denied"), (allow, "allowed")] {
        values(&snapshotter);
        let _ = service.oneshot(request(Some("1"))).await.unwrap();
        assert_eq!(values(&snapshotter)[&outcome(what)], 1.0);
    }
}
