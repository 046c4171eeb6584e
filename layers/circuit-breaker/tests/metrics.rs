//! What is counted, under the names that the documentation gives.

use std::{collections::BTreeMap, time::Duration};

use buttress_circuit_breaker::{Breaker, CircuitBreakerLayer, Settings};
use buttress_core::{classify::Verdict, testing::advance};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tower::{Layer, ServiceExt, service_fn};

/// Name and labels as Prometheus would write them, and the value.
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
            DebugValue::Histogram(_) => panic!("{name} is a histogram"),
        };
        (name, value)
    });
    // The state is told where it is zero, too.
    values
        .filter(|(name, value)| *value != 0.0 || name.contains("_state{"))
        .collect()
}

fn expected<const N: usize>(values: [(&str, u32); N]) -> BTreeMap<String, f64> {
    values
        .map(|(name, value)| (name.to_owned(), value.into()))
        .into()
}

/// The debugging recorder starts each snapshot's counters anew.
#[tokio::test(start_paused = true)]
async fn states_changes_requests_and_rejections() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let layer = CircuitBreakerLayer::any()
        .name("api")
        .settings(Settings::aggressive())
        .classify(|result: Result<&u32, &&str>| match result {
            Ok(0) => Verdict::Ignored,
            Ok(_) => Verdict::Success,
            Err(_) => Verdict::Failure,
        })
        .build()
        .unwrap();
    let service = layer.layer(service_fn(async |n: u32| match n {
        9 => Err("down"),
        n => Ok(n),
    }));
    let send = async |requests: &[u32]| {
        for n in requests {
            let _ = service.clone().oneshot(*n).await;
        }
    };
    assert_eq!(
        values(&snapshotter),
        expected([("circuit_breaker_state{name=api}", 0)])
    );

    send(&[1, 1, 0, 9, 9, 9, 1, 1]).await;
    assert_eq!(
        values(&snapshotter),
        expected([
            ("circuit_breaker_requests_total{name=api,result=failure}", 3),
            ("circuit_breaker_requests_total{name=api,result=ignored}", 1),
            ("circuit_breaker_requests_total{name=api,result=success}", 2),
            ("circuit_breaker_rejections_total{name=api,reason=open}", 2),
            ("circuit_breaker_state{name=api}", 2),
            (
                "circuit_breaker_state_changes_total{name=api,from=closed,to=open}",
                1
            ),
        ])
    );

    advance(Duration::from_secs(10)).await;
    let probe = layer.breaker().try_acquire().unwrap();
    send(&[1]).await;
    assert_eq!(
        values(&snapshotter),
        expected([
            (
                "circuit_breaker_rejections_total{name=api,reason=half_open}",
                1
            ),
            ("circuit_breaker_state{name=api}", 1),
            (
                "circuit_breaker_state_changes_total{name=api,from=open,to=half_open}",
                1
            ),
        ])
    );

    probe.record(Verdict::Success);
    layer.breaker().force_open();
    send(&[1]).await;
    assert_eq!(
        values(&snapshotter),
        expected([
            ("circuit_breaker_requests_total{name=api,result=success}", 1),
            (
                "circuit_breaker_rejections_total{name=api,reason=forced_open}",
                1
            ),
            ("circuit_breaker_state{name=api}", 2),
            (
                "circuit_breaker_state_changes_total{name=api,from=half_open,to=closed}",
                1
            ),
            (
                "circuit_breaker_state_changes_total{name=api,from=closed,to=forced_open}",
                1
            ),
        ])
    );

    // Switched off it still counts what passes, and a reset takes the gauge
    // down.
    layer.breaker().force_closed();
    send(&[1, 9]).await;
    layer.breaker().metrics_only();
    layer.breaker().reset();
    assert_eq!(
        values(&snapshotter),
        expected([
            ("circuit_breaker_requests_total{name=api,result=failure}", 1),
            ("circuit_breaker_requests_total{name=api,result=success}", 1),
            ("circuit_breaker_state{name=api}", 0),
            (
                "circuit_breaker_state_changes_total{name=api,from=forced_open,to=forced_closed}",
                1
            ),
            (
                "circuit_breaker_state_changes_total{name=api,from=forced_closed,to=metrics_only}",
                1
            ),
            (
                "circuit_breaker_state_changes_total{name=api,from=metrics_only,to=closed}",
                1
            ),
        ])
    );
}

/// A call that outlives its generation is counted, and changes nothing.
#[tokio::test(start_paused = true)]
async fn late_calls_are_counted() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let layer = CircuitBreakerLayer::builder().name("late").build().unwrap();
    let (late, gone) = (
        layer.breaker().try_acquire().unwrap(),
        layer.breaker().try_acquire().unwrap(),
    );
    layer.breaker().trip(None).unwrap();
    late.record(Verdict::Failure);
    drop(gone);
    assert_eq!(
        values(&snapshotter),
        expected([
            (
                "circuit_breaker_requests_total{name=late,result=failure}",
                1
            ),
            (
                "circuit_breaker_requests_total{name=late,result=ignored}",
                1
            ),
            ("circuit_breaker_state{name=late}", 2),
            (
                "circuit_breaker_state_changes_total{name=late,from=closed,to=open}",
                1
            ),
        ])
    );
}

/// The gauge of a breaker that was dropped while it was open stayed at 2.
#[tokio::test(start_paused = true)]
async fn what_is_gone_is_not_open() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);
    let gauge = || values(&snapshotter)["circuit_breaker_state{name=gone}"];

    let breaker = Breaker::builder("gone").build().unwrap();
    breaker.force_open();
    assert!((gauge() - 2.0).abs() < f64::EPSILON);
    drop(breaker);
    assert!(gauge().abs() < f64::EPSILON);
}
