//! What is measured, under the names that the documentation gives.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress_core::testing::{advance, settle};
use buttress_health::{Check, Gate, HealthRegistry, Indicator};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

/// Name and labels as Prometheus would write them, and the value; of a
/// histogram how often. The debugging recorder starts each snapshot anew.
fn values(snapshotter: &Snapshotter) -> BTreeMap<String, f64> {
    let snapshot = snapshotter.snapshot().into_vec();
    let values = snapshot.into_iter().map(|(key, _, description, value)| {
        assert!(description.is_some(), "{key:?} is not described");
        let (_, key) = key.into_parts();
        let labels = key
            .labels()
            .map(|label| format!("{}={}", label.key(), label.value()));
        let name = format!("{}{{{}}}", key.name(), labels.collect::<Vec<_>>().join(","));
        match value {
            DebugValue::Counter(count) => (name, count as f64),
            DebugValue::Gauge(value) => (name, value.0),
            DebugValue::Histogram(runs) => {
                assert!(
                    runs.iter().all(|took| (took.0 - 0.25).abs() < 0.01),
                    "{runs:?}"
                );
                (name, runs.len() as f64)
            }
        }
    });
    values.collect()
}

#[tokio::test(start_paused = true)]
async fn readiness_the_score_and_checks() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let fails = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&fails);
    let check = Check::required("db", move || {
        let fails = asked.load(SeqCst);
        async move {
            tokio::time::sleep(Duration::from_millis(250)).await;
            if fails { Err("down") } else { Ok(()) }
        }
    });
    let (source, drain) = (Indicator::new("queue"), Gate::open());
    let health = HealthRegistry::builder()
        .name("shop")
        .source(source.clone())
        .gate("drain", drain.clone())
        .check(check)
        .capacity(1)
        .on_change(|_| std::future::pending())
        .build()
        .unwrap();
    let running = health.start().unwrap();
    settle().await;
    let told = |expected: &[(&str, f64)]| {
        let values = values(&snapshotter);
        assert_eq!(values.len(), 5);
        for (name, value) in expected {
            assert_eq!(values[*name], *value, "{name}");
        }
    };
    const READY: &str = "health_ready{name=shop}";
    const SCORE: &str = "health_score{name=shop}";
    const UP: &str = "health_check_up{name=shop,check=db}";
    const RAN: &str = "health_check_duration_seconds{name=shop,check=db}";
    const MISSED: &str = "health_notices_missed_total{name=shop}";

    told(&[
        (READY, 0.0),
        (SCORE, 1.0),
        (UP, 0.0),
        (RAN, 0.0),
        (MISSED, 0.0),
    ]);
    // One notice is at work, one waits, one more does.
    advance(Duration::from_secs(1)).await;
    told(&[(READY, 1.0), (UP, 1.0), (RAN, 1.0), (MISSED, 0.0)]);
    source.set(0.25);
    fails.store(true, SeqCst);
    advance(Duration::from_secs(6)).await;
    told(&[
        (READY, 0.0),
        (SCORE, 0.25),
        (UP, 0.0),
        (RAN, 1.0),
        (MISSED, 2.0),
    ]);
    fails.store(false, SeqCst);
    drain.close("shutting_down");
    advance(Duration::from_secs(6)).await;
    told(&[(READY, 0.0), (SCORE, 0.25), (UP, 1.0), (RAN, 1.0)]);
    // A start anew has the check's last result still.
    drop(running);
    drain.reopen();
    let _running = health.start().unwrap();
    settle().await;
    told(&[(READY, 1.0), (UP, 1.0), (RAN, 0.0)]);
}
