//! What is counted, under the name that the documentation gives.

use std::{convert::Infallible, future::pending, time::Duration};

use buttress_core::{
    deadline::Deadline,
    testing::web::{self, ScriptedBody},
};
use buttress_timeout::TimeoutLayer;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tower::{Layer, ServiceExt, service_fn};

/// Name and labels as Prometheus would write them, and the value.
fn values(snapshotter: &Snapshotter) -> Vec<(String, u64)> {
    let snapshot = snapshotter.snapshot().into_vec();
    let values = snapshot.into_iter().map(|(key, _, description, value)| {
        assert!(description.is_some(), "{key:?} is not described");
        let (_, key) = key.into_parts();
        let labels = key
            .labels()
            .map(|label| format!("{}={}", label.key(), label.value()));
        let name = format!("{}{{{}}}", key.name(), labels.collect::<Vec<_>>().join(","));
        match value {
            DebugValue::Counter(count) => (name, count),
            other => panic!("{name} is {other:?}"),
        }
    });
    values.collect()
}

/// The debugging recorder starts each snapshot's counters anew.
#[tokio::test(start_paused = true)]
async fn timeouts_of_calls_and_bodies() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let layer = TimeoutLayer::builder()
        .name("api")
        .limit(Duration::from_secs(1))
        .to_the_end()
        .build()
        .unwrap();
    let service = layer.layer(service_fn(async |request: Request<Full<Bytes>>| {
        let body = match request.uri().path() {
            "/hangs" => pending().await,
            "/stalls" => ScriptedBody::new().data("first").hang(),
            _ => ScriptedBody::new().data("whole"),
        };
        Ok::<_, Infallible>(Response::new(body))
    }));
    let count = async |request| {
        let response = service.clone().oneshot(request).await.unwrap();
        let _ = response.into_body().collect().await;
        values(&snapshotter)
    };
    let told = |count| vec![("timeouts_total{name=api}".to_owned(), count)];

    assert_eq!(count(web::get("/")).await, told(0));
    assert_eq!(count(web::get("/hangs")).await, told(1));
    assert_eq!(count(web::get("/stalls")).await, told(1));
    let mut late = web::get("/");
    Deadline::after(Duration::ZERO).attach(late.extensions_mut());
    assert_eq!(count(late).await, told(1));
    assert_eq!(count(web::get("/")).await, told(0));
}
