//! What is logged, and what may happen while it is.
//!
//! In a program of their own, and one at a time: `tracing` asks only the
//! subscriber of the thread that comes first by an event whether anybody wants
//! it, so that another test's thread could switch it off for these.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use buttress_circuit_breaker::{Breaker, Settings};
use buttress_core::classify::Verdict;
use tracing::{Event, Metadata, Subscriber, field, span, subscriber::with_default};

fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cause and wait were Rust's own notation, which no query can compare.
#[tokio::test(start_paused = true)]
async fn what_is_logged_is_plain() {
    let _alone = alone();

    #[derive(Default)]
    struct Log(Arc<Mutex<Vec<String>>>);
    impl field::Visit for Line {
        fn record_debug(&mut self, field: &field::Field, value: &dyn std::fmt::Debug) {
            self.0.push(format!("{}={value:?}", field.name()));
        }
        fn record_str(&mut self, field: &field::Field, value: &str) {
            self.0.push(format!("{}={value}", field.name()));
        }
    }
    struct Line(Vec<String>);
    impl Subscriber for Log {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, event: &Event<'_>) {
            let mut line = Line(vec![event.metadata().level().to_string()]);
            event.record(&mut line);
            self.0.lock().unwrap().push(line.0.join(" "));
        }
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    let log = Log::default();
    let lines = Arc::clone(&log.0);
    with_default(log, || {
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
        *lines.lock().unwrap(),
        [
            "WARN message=circuit breaker opened name=breaker from=closed to=open \
             cause=consecutive_failures wait_ms=30000",
            "INFO message=circuit breaker changed name=breaker from=open to=closed cause=manual",
            "INFO message=circuit breaker changed name=breaker from=closed to=metrics_only \
             cause=manual",
            "WARN message=circuit breaker would have opened name=breaker \
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
    use std::collections::HashMap;

    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    /// Called between the change and the gauge.
    struct Overtakes(Mutex<(Option<Breaker>, Vec<Breaker>)>);
    impl Subscriber for Overtakes {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, _: &Event<'_>) {
            let Some(first) = self.0.lock().unwrap().0.take() else {
                return;
            };
            drop(first);
            let others = (0..100).map(|_| {
                let other = Breaker::builder("other").build().unwrap();
                other.force_open();
                other
            });
            let others = others.collect();
            self.0.lock().unwrap().1 = others;
        }
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    let _alone = alone();
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);
    let first = Breaker::builder("first").build().unwrap();
    let permits = [(); 5].map(|()| first.try_acquire().unwrap());
    with_default(Overtakes(Mutex::new((Some(first), Vec::new()))), || {
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
