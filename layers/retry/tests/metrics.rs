//! What is counted, under the names that the documentation gives.

use std::{collections::BTreeMap, convert::Infallible, time::Duration};

use buttress_core::testing::web;
use buttress_retry::{Backoff, RetryLayer, Settings};
use http::Request;
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use tower::{Layer, ServiceExt, service_fn};

#[tokio::test(start_paused = true)]
async fn attempts_requests_and_what_was_given_up_on() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);
    let layer = RetryLayer::builder()
        .name("api")
        .settings(Settings::standard().backoff(Backoff::fixed(Duration::from_millis(1))))
        .build()
        .unwrap();
    let service = layer.layer(service_fn(async |request: Request<_>| {
        let _: buttress_retry::ReplayBody<_> = request.into_body();
        Ok::<_, Infallible>(web::response(503, ""))
    }));
    let well = layer.layer(service_fn(async |request: Request<_>| {
        let _: buttress_retry::ReplayBody<_> = request.into_body();
        Ok::<_, Infallible>(web::response(200, ""))
    }));
    service.clone().oneshot(web::get("/")).await.unwrap();
    service.oneshot(web::post("/", "")).await.unwrap();
    well.oneshot(web::get("/")).await.unwrap();

    let mut values = BTreeMap::new();
    for (key, _, description, value) in snapshotter.snapshot().into_vec() {
        assert!(description.is_some(), "{key:?} is not described");
        let (_, key) = key.into_parts();
        let labels = key
            .labels()
            .map(|label| format!("{}={}", label.key(), label.value()));
        let name = format!("{}{{{}}}", key.name(), labels.collect::<Vec<_>>().join(","));
        let value = match value {
            DebugValue::Counter(0) => continue,
            DebugValue::Counter(count) => count.to_string(),
            DebugValue::Histogram(values) => values
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" "),
            DebugValue::Gauge(value) => panic!("{name} is a gauge: {value}"),
        };
        values.insert(name, value);
    }
    let expected = [
        ("retry_attempts_count{name=api}", "3 1 1"),
        ("retry_attempts_total{name=api,result=failure}", "4"),
        ("retry_attempts_total{name=api,result=success}", "1"),
        ("retry_give_ups_total{name=api,reason=attempts}", "1"),
        ("retry_give_ups_total{name=api,reason=unsafe}", "1"),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(values, expected.into());
}
