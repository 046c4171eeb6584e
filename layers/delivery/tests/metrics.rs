//! What is measured, under the names that the documentation gives.

mod common;

use std::collections::BTreeMap;

use buttress_core::testing::{advance, settle};
use buttress_delivery::Selector;
use common::*;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

/// Name and labels as Prometheus would write them, and the value; of a
/// histogram how often. The debugging recorder starts each snapshot anew, so
/// what a gauge held is kept in `held`.
fn values(snapshotter: &Snapshotter, held: &mut BTreeMap<String, f64>) -> BTreeMap<String, f64> {
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
                DebugValue::Gauge(change) => {
                    let value = held.entry(name.clone()).or_default();
                    *value += change.0;
                    (name, *value)
                }
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
    let mut held = BTreeMap::new();
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
    let now = values(&snapshotter, &mut held);
    assert_eq!(now["webhook_queue_depth{name=shop}"], 2.0);
    assert_eq!(now["webhook_refused_total{name=shop}"], 1.0);

    let worker = webhooks.start().unwrap();
    advance(millis(300)).await;
    // `a` waits for its retry, `b` is dead.
    let now = values(&snapshotter, &mut held);
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
    let now = values(&snapshotter, &mut held);
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

    // Taken back while its attempt is under way, which fails: its last.
    receiver.push(status(500).after(millis(250)));
    webhooks.emit(event("e")).await.unwrap();
    advance(millis(100)).await;
    assert_eq!(webhooks.status().in_flight, 1);
    webhooks.unregister(Selector::all()).await;
    advance(millis(200)).await;
    settle().await;
    let now = values(&snapshotter, &mut held);
    assert_eq!(now["webhook_queue_depth{name=shop}"], 0.0);
    assert_eq!(now["webhook_attempts_total{name=shop,outcome=failed}"], 1.0);
    assert_eq!(
        now["webhook_attempts_total{name=shop,outcome=retrying}"],
        0.0
    );

    // What is gone with its owner is not held any more.
    drop((worker, webhooks));
    settle().await;
    let now = values(&snapshotter, &mut held);
    assert_eq!(now["webhook_dead_letters{name=shop}"], 0.0);
}

/// Whoever changes something last need not be the last to say so.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_held_is_right_in_the_end() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let webhooks = {
        let _here = metrics::set_default_local_recorder(&recorder);
        let (transport, _receiver) = receiver(|_| status(200));
        let webhooks = builder().name("busy").without_breaker();
        webhooks.build(transport).unwrap()
    };
    webhooks.register(hook("https://a.example/")).unwrap();
    let _worker = webhooks.start().unwrap();
    let emitters: Vec<_> = (0..4)
        .map(|_| {
            let webhooks = webhooks.clone();
            tokio::spawn(async move {
                for _ in 0..200 {
                    webhooks.emit(event("a")).await.unwrap();
                }
            })
        })
        .collect();
    for emitter in emitters {
        emitter.await.unwrap();
    }
    for _ in 0..10_000 {
        if webhooks.status().queued == 0 {
            break;
        }
        tokio::time::sleep(millis(1)).await;
    }
    // The last attempt is over, and soon says so.
    tokio::time::sleep(millis(50)).await;
    let depth = snapshotter
        .snapshot()
        .into_vec()
        .into_iter()
        .find(|(key, ..)| key.key().name() == "webhook_queue_depth");
    let (_, _, _, value) = depth.unwrap();
    assert_eq!(value, DebugValue::Gauge(0.0.into()));
}
