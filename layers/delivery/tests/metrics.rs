//! What is measured, under the names that the documentation gives.

mod common;

use std::collections::BTreeMap;

use buttress_core::testing::{advance, settle};
use common::*;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

/// Name and labels as Prometheus would write them, and the value; of a
/// histogram how often. The debugging recorder starts each snapshot anew.
fn values(snapshotter: &Snapshotter) -> BTreeMap<String, f64> {
    let snapshot = snapshotter.snapshot().into_vec();
    let values = snapshot
        .into_iter()
        .filter_map(|(key, _, description, value)| {
            let (_, key) = key.into_parts();
            if !key.name().starts_with("webhook_") {
                return None;
            }
            assert!(description.is_some(), "{key:?} is not described");
            let labels = key
                .labels()
                .map(|label| format!("{}={}", label.key(), label.value()));
            let name = format!("{}{{{}}}", key.name(), labels.collect::<Vec<_>>().join(","));
            Some(match value {
                DebugValue::Counter(count) => (name, count as f64),
                DebugValue::Gauge(value) => (name, value.0),
                DebugValue::Histogram(runs) => {
                    assert!(
                        runs.iter().all(|took| (took.0 - 0.25).abs() < 0.01),
                        "{runs:?}"
                    );
                    (name, runs.len() as f64)
                }
            })
        });
    values.collect()
}

#[tokio::test(start_paused = true)]
async fn deliveries_attempts_and_what_is_held() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let (transport, receiver) = receiver(|_| status(200).after(millis(250)));
    let webhooks = builder()
        .name("shop")
        .capacity(2)
        .max_dead_letters(1)
        .build(transport)
        .unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    for code in [500, 302, 302] {
        receiver.push(status(code).after(millis(250)));
    }
    webhooks.emit(event("a")).await.unwrap();
    webhooks.emit(event("b")).await.unwrap();
    webhooks.emit(event("c")).await.unwrap_err();
    let now = values(&snapshotter);
    assert_eq!(now["webhook_queue_depth{name=shop}"], 2.0);
    assert_eq!(now["webhook_refused_total{name=shop}"], 1.0);

    let _worker = webhooks.start().unwrap();
    advance(millis(300)).await;
    // `a` waits for its retry, `b` is dead.
    let now = values(&snapshotter);
    assert_eq!(now["webhook_queue_depth{name=shop}"], 1.0);
    assert_eq!(now["webhook_dead_letters{name=shop}"], 1.0);
    assert_eq!(
        now["webhook_attempts_total{name=shop,outcome=retrying}"],
        1.0
    );
    assert_eq!(now["webhook_attempts_total{name=shop,outcome=failed}"], 1.0);
    assert_eq!(
        now["webhook_deliveries_total{name=shop,status=failed}"],
        1.0
    );
    assert_eq!(now["webhook_attempt_duration_seconds{name=shop}"], 2.0);

    webhooks.emit(event("d")).await.unwrap();
    advance(secs(5)).await;
    settle().await;
    let now = values(&snapshotter);
    assert_eq!(now["webhook_queue_depth{name=shop}"], 0.0);
    assert_eq!(now["webhook_dead_letters{name=shop}"], 1.0);
    assert_eq!(now["webhook_dead_letters_dropped_total{name=shop}"], 1.0);
    assert_eq!(
        now["webhook_attempts_total{name=shop,outcome=delivered}"],
        1.0
    );
    assert_eq!(
        now["webhook_deliveries_total{name=shop,status=delivered}"],
        1.0
    );
    assert_eq!(
        now["webhook_deliveries_total{name=shop,status=failed}"],
        1.0
    );
}
