//! What is logged, and what may happen while it is.

use buttress_circuit_breaker::{Breaker, Settings};
use buttress_core::{classify::Verdict, testing::Log};

/// Cause and wait were Rust's own notation, which no query can compare.
#[tokio::test(start_paused = true)]
async fn what_is_logged_is_plain() {
    let log = Log::new();
    log.within(|| {
        let breaker = Breaker::builder("breaker")
            .settings(Settings::new().consecutive_failures(1))
            .build()
            .unwrap();
        breaker.try_acquire().unwrap().record(Verdict::Failure);
        breaker.close().unwrap();
        breaker.metrics_only();
        breaker.try_acquire().unwrap().record(Verdict::Failure);
    });
    assert_eq!(
        log.take(),
        [
            "WARN circuit breaker opened name=breaker from=closed to=open \
             cause=consecutive_failures wait_ms=30000",
            "INFO circuit breaker changed name=breaker from=open to=closed cause=manual",
            "INFO circuit breaker changed name=breaker from=closed to=metrics_only \
             cause=manual",
            "WARN circuit breaker would have opened name=breaker \
             cause=consecutive_failures",
        ]
    );
}

/// Whoever tells of a change may be overtaken by the last handle's drop, and
/// the place be another breaker's by then: its state was shown as the first
/// one's, for good.
#[cfg(feature = "metrics")]
#[tokio::test(start_paused = true)]
async fn a_gauge_never_shows_anothers_state() {
    use std::{collections::HashMap, sync::Mutex};

    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);
    let first = Breaker::builder("first").build().unwrap();
    let permits = [(); 5].map(|()| first.try_acquire().unwrap());
    // Called between the change and the gauge.
    let left = Mutex::new((Some(first), Vec::new()));
    let overtakes = Log::new().on_event(move |_| {
        let Some(first) = left.lock().unwrap().0.take() else {
            return;
        };
        drop(first);
        let others = (0..100).map(|_| {
            let other = Breaker::builder("other").build().unwrap();
            other.force_open();
            other
        });
        let others = others.collect();
        left.lock().unwrap().1 = others;
    });
    overtakes.within(|| {
        for permit in permits {
            permit.record(Verdict::Failure);
        }
        let mut states = HashMap::new();
        for (key, _, _, value) in snapshotter.snapshot().into_vec() {
            if let (DebugValue::Gauge(state), Some(name)) = (value, key.key().labels().next()) {
                states.insert(name.value().to_owned(), state.into_inner());
            }
        }
        assert_eq!(
            states,
            HashMap::from([("first".into(), 0.0), ("other".into(), 2.0)])
        );
    });
}
