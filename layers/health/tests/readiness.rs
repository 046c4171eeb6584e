//! When a process is ready, alive and started, by the paused clock.

use std::{
    convert::Infallible,
    future::pending,
    num::NonZeroU32,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress_core::testing::{advance, settle, web};
use buttress_health::{
    Beat, Check, CheckState, ConfigError, Failure, Gate, Health, HealthRegistry, HealthService,
    HealthSource, Indicator, Latch, Readiness, ReadinessGate, Reason, Source, Standing, StartError,
    Threshold,
};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::time::Instant;
use tower::ServiceExt;

const SECOND: Duration = Duration::from_secs(1);

/// Status and document of a probe.
async fn probe(health: &HealthRegistry, path: &str) -> (u16, Value) {
    let response = health.service().oneshot(web::get(path)).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap())
}

async fn ready(health: &HealthRegistry) -> (u16, Value) {
    probe(health, "/health/ready").await
}

fn not_ready(reason: &str, score: f64) -> (u16, Value) {
    (
        503,
        json!({"ready": false, "reason": reason, "score": score}),
    )
}

fn fine() -> (u16, Value) {
    (200, json!({"ready": true, "score": 1.0}))
}

#[tokio::test(start_paused = true)]
async fn an_empty_registry_is_ready_and_well() {
    let health = HealthRegistry::builder().build().unwrap();
    assert_eq!(ready(&health).await, fine());
    assert_eq!(
        probe(&health, "/health/live").await,
        (200, json!({"live": true}))
    );
    assert_eq!(
        probe(&health, "/health/startup").await,
        (200, json!({"started": true}))
    );
    let summary = json!({"ready": true, "score": 1.0, "started": true});
    assert_eq!(probe(&health, "/health").await, (200, summary));
}

#[tokio::test(start_paused = true)]
async fn it_has_started_when_all_latches_are_released_and_for_good() {
    let (routes, cache) = (Latch::new("routes"), Latch::new("cache"));
    let health = HealthRegistry::builder()
        .latch(&routes)
        .latch(&cache)
        .build()
        .unwrap();
    for released in [&routes, &cache] {
        assert_eq!(ready(&health).await, not_ready("starting", 1.0));
        let (status, startup) = probe(&health, "/health/startup").await;
        assert_eq!(
            (status, startup),
            (503, json!({"started": false, "reason": "starting"}))
        );
        released.release();
        released.release();
    }
    assert_eq!(ready(&health).await, fine());
    assert_eq!(probe(&health, "/health/startup").await.0, 200);
    // What comes after is no matter of the start.
    health
        .add_gate("drain", Gate::closed("shutting_down"))
        .unwrap();
    assert_eq!(probe(&health, "/health/startup").await.0, 200);
    assert_eq!(ready(&health).await.0, 503);
}

#[tokio::test(start_paused = true)]
async fn a_drain_is_not_ready_at_once_and_alive_to_the_end() {
    let drain = Gate::open();
    let latch = Latch::new("routes");
    let health = HealthRegistry::builder()
        .gate("drain", drain.clone())
        .latch(&latch)
        .build()
        .unwrap();
    // Also in the middle of a start.
    drain.close("shutting_down");
    assert_eq!(ready(&health).await, not_ready("shutting_down", 1.0));
    drain.reopen();
    latch.release();
    assert_eq!(ready(&health).await, fine());
    drain.close("shutting_down");
    assert_eq!(ready(&health).await, not_ready("shutting_down", 1.0));
    assert_eq!(probe(&health, "/health/live").await.0, 200);
    assert_eq!(probe(&health, "/health/startup").await.0, 200);
    assert_eq!(probe(&health, "/health").await.0, 503);
}

#[tokio::test(start_paused = true)]
async fn gates_come_and_go_while_it_serves() {
    let health = HealthRegistry::builder()
        .gate("drain", Gate::open())
        .build()
        .unwrap();
    let maintenance = Gate::closed("maintenance");
    health.add_gate("maintenance", maintenance.clone()).unwrap();
    assert!(health.add_gate("maintenance", Gate::open()).is_err());
    assert!(health.add_gate("", Gate::open()).is_err());
    assert_eq!(ready(&health).await, not_ready("maintenance", 1.0));
    maintenance.reopen();
    assert_eq!(ready(&health).await, fine());
    maintenance.close("again");
    assert!(health.remove_gate("maintenance"));
    assert!(!health.remove_gate("maintenance"));
    assert_eq!(ready(&health).await, fine());

    // A closure is one, and the registry itself.
    let other = health.clone();
    other
        .add_gate("closure", || Readiness::NotReady { reason: "no" })
        .unwrap();
    let readiness = ReadinessGate::readiness(&health);
    assert_eq!(readiness, Readiness::NotReady { reason: "no" });
    // One that panics is closed, and does no more harm.
    other.remove_gate("closure");
    other
        .add_gate("bad", || panic!("a gate's own fault"))
        .unwrap();
    assert_eq!(ready(&health).await, not_ready("panicked", 1.0));
}

#[tokio::test(start_paused = true)]
async fn the_score_is_a_weighted_mean_capped_by_the_worst_critical_one() {
    let [a, b, c] = ["a", "b", "c"].map(Indicator::new);
    let health = HealthRegistry::builder()
        .source(a.clone())
        .source(Source::new(b.clone()).weight(3.0))
        .build()
        .unwrap();
    a.set(0.0);
    assert_eq!(health.score(), 0.75);
    b.set(0.5);
    assert_eq!(health.score(), 0.375);
    a.disable();
    assert_eq!(health.score(), 0.5);
    b.disable();
    assert_eq!(health.score(), 1.0);
    a.set(1.0);
    b.set(1.0);
    c.set(0.25);
    health
        .add_source(Source::new(c.clone()).weight(0.001).critical(true))
        .unwrap();
    assert_eq!(health.score(), 0.25);
    assert!(health.add_source(Indicator::new("c")).is_err());
    assert!(
        health
            .add_source(Source::new(Indicator::new("d")).weight(f64::NAN))
            .is_err()
    );
    assert!(health.remove_source("c"));
    assert!(!health.remove_source("c"));
    assert_eq!(health.score(), 1.0);
    // It is shown, and readiness does not go by it.
    for source in [&a, &b] {
        source.set(0.0);
    }
    assert_eq!(
        ready(&health).await,
        (200, json!({"ready": true, "score": 0.0}))
    );
}

/// As a breaker is one: 1 closed, 0.5 half-open, 0 open, switched off.
#[derive(Clone)]
struct Breaker(Arc<Mutex<Health>>);

impl HealthSource for Breaker {
    fn name(&self) -> &str {
        "orders"
    }
    fn health(&self) -> Health {
        *self.0.lock().unwrap()
    }
    fn critical(&self) -> bool {
        true
    }
}

#[tokio::test(start_paused = true)]
async fn an_open_breaker_lowers_the_score_and_leaves_it_ready() {
    let breaker = Breaker(Arc::new(Mutex::new(Health::HEALTHY)));
    let health = HealthRegistry::builder()
        .source(breaker.clone())
        .source(Indicator::new("other"))
        .build()
        .unwrap();
    let running = health.start().unwrap();
    for (state, score) in [
        (Health::HEALTHY, 1.0),
        (Health::UNHEALTHY, 0.0),
        (Health::scored(0.5), 0.5),
        (Health::DISABLED, 1.0),
    ] {
        *breaker.0.lock().unwrap() = state;
        advance(60 * SECOND).await;
        assert_eq!(
            ready(&health).await,
            (200, json!({"ready": true, "score": score}))
        );
    }
    drop(running);
}

#[tokio::test(start_paused = true)]
async fn with_a_threshold_three_low_scores_are_not_ready_and_two_better_ones_are() {
    let breaker = Breaker(Arc::new(Mutex::new(Health::HEALTHY)));
    let health = HealthRegistry::builder()
        .source(breaker.clone())
        .threshold(Threshold::new(0.5))
        .build()
        .unwrap();
    // Evaluated now, and every five seconds from now.
    let running = health.start().unwrap();
    advance(SECOND).await;
    let now_at = async |state: Health, until: Duration| {
        *breaker.0.lock().unwrap() = state;
        advance(until).await;
        // Those who ask make no evaluation.
        for _ in 0..20 {
            assert_eq!(ready(&health).await, ready(&health).await);
        }
        ready(&health).await
    };
    let low = (200, json!({"ready": true, "score": 0.0}));
    assert_eq!(now_at(Health::UNHEALTHY, 5 * SECOND).await, low);
    assert_eq!(now_at(Health::UNHEALTHY, 5 * SECOND).await, low);
    assert_eq!(
        now_at(Health::UNHEALTHY, 5 * SECOND).await,
        not_ready("score", 0.0)
    );
    // At the threshold is not below it.
    let half = not_ready("score", 0.5);
    assert_eq!(now_at(Health::scored(0.5), 5 * SECOND).await, half);
    assert_eq!(
        now_at(Health::UNHEALTHY, 5 * SECOND).await,
        not_ready("score", 0.0)
    );
    assert_eq!(now_at(Health::scored(0.5), 5 * SECOND).await, half);
    let back = (200, json!({"ready": true, "score": 0.5}));
    assert_eq!(now_at(Health::scored(0.5), 5 * SECOND).await, back);

    // And a start begins anew.
    assert_eq!(
        now_at(Health::UNHEALTHY, 15 * SECOND).await,
        not_ready("score", 0.0)
    );
    running.stop().await;
    let _running = health.start().unwrap();
    settle().await;
    assert_eq!(ready(&health).await, low);
}

#[tokio::test(start_paused = true)]
async fn what_learns_from_traffic_gets_some_again() {
    let source = Indicator::new("breaker");
    source.set(0.0);
    let n = |n| NonZeroU32::new(n).unwrap();
    let health = HealthRegistry::builder()
        .source(source)
        .threshold(
            Threshold::new(0.5)
                .down_after(n(2))
                .retry_after(20 * SECOND),
        )
        .evaluate_every(SECOND)
        .build()
        .unwrap();
    let _running = health.start().unwrap();
    let mut seen = String::new();
    for _ in 0..26 {
        settle().await;
        seen.push(if ready(&health).await.0 == 200 {
            '.'
        } else {
            '#'
        });
        advance(SECOND).await;
    }
    // Not ready from 1 s on, tried at 21 s and given up at 23 s.
    assert_eq!(seen, format!(".{}..###", "#".repeat(20)));
}

/// A check that does as it is told, and counts.
#[derive(Clone, Default)]
struct Script {
    runs: Arc<AtomicUsize>,
    at_once: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    starts: Arc<Mutex<Vec<Instant>>>,
    mode: Arc<Mutex<Mode>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Mode {
    #[default]
    Pass,
    Fail,
    Hang,
    Take(Duration),
    Panic,
    PanicLater,
}

struct Leave(Arc<AtomicUsize>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Script {
    fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }

    fn runs(&self) -> usize {
        self.runs.load(SeqCst)
    }

    async fn ask(self) -> Result<(), &'static str> {
        self.runs.fetch_add(1, SeqCst);
        self.starts.lock().unwrap().push(Instant::now());
        let now = self.at_once.fetch_add(1, SeqCst) + 1;
        let _leave = Leave(Arc::clone(&self.at_once));
        self.most.fetch_max(now, SeqCst);
        let mode = *self.mode.lock().unwrap();
        match mode {
            Mode::Pass => Ok(()),
            Mode::Fail => Err("no route to host"),
            Mode::Hang => pending().await,
            Mode::Take(span) => {
                tokio::time::sleep(span).await;
                Ok(())
            }
            Mode::Panic => panic!("at once"),
            Mode::PanicLater => {
                tokio::task::yield_now().await;
                panic!("later")
            }
        }
    }

    fn required(&self, name: &str) -> Check {
        let script = self.clone();
        Check::required(name, move || script.clone().ask())
    }

    fn optional(&self, name: &str) -> Check {
        let script = self.clone();
        Check::optional(name, move || script.clone().ask())
    }
}

fn failing(reason: &str, check: &str) -> (u16, Value) {
    let document = json!({"ready": false, "reason": reason, "check": check, "score": 1.0});
    (503, document)
}

#[tokio::test(start_paused = true)]
async fn a_required_check_is_unknown_until_it_has_run_and_runs_at_once() {
    let script = Script::default();
    let health = HealthRegistry::builder()
        .check(script.required("db"))
        .build()
        .unwrap();
    assert_eq!(ready(&health).await, failing("unknown", "db"));
    advance(60 * SECOND).await;
    assert_eq!(script.runs(), 0, "nothing runs before start");
    let _running = health.start().unwrap();
    settle().await;
    assert_eq!(script.runs(), 1);
    assert_eq!(ready(&health).await, fine());
}

#[tokio::test(start_paused = true)]
async fn a_check_fails_by_error_time_and_panic_and_comes_back() {
    let script = Script::default();
    let health = HealthRegistry::builder()
        .check(script.required("db"))
        .build()
        .unwrap();
    let _running = health.start().unwrap();
    settle().await;
    for (mode, failure) in [
        (Mode::Fail, Failure::Error),
        (Mode::Hang, Failure::TimedOut),
        (Mode::Panic, Failure::Panicked),
        (Mode::PanicLater, Failure::Panicked),
        (Mode::Take(3 * SECOND), Failure::TimedOut),
    ] {
        script.set(mode);
        // The longest interval, and the time-out.
        advance(Duration::from_millis(7600)).await;
        assert_eq!(
            health.check("db"),
            Some(CheckState::Failing(failure)),
            "{mode:?}"
        );
        assert_eq!(ready(&health).await, failing("check_failed", "db"));
        let report = health.report();
        let error = (mode == Mode::Fail).then_some("no route to host");
        assert_eq!(report.checks[0].error.as_deref(), error);

        script.set(Mode::Pass);
        advance(Duration::from_millis(7600)).await;
        assert_eq!(ready(&health).await, fine(), "{mode:?}");
    }
    assert_eq!(health.check("of another name"), None);
}

#[tokio::test(start_paused = true)]
async fn an_optional_check_is_told_and_does_not_count() {
    let script = Script::default();
    script.set(Mode::Fail);
    let health = HealthRegistry::builder()
        .check(script.optional("cache"))
        .build()
        .unwrap();
    assert_eq!(ready(&health).await, fine());
    let _running = health.start().unwrap();
    settle().await;
    assert_eq!(
        health.check("cache"),
        Some(CheckState::Failing(Failure::Error))
    );
    assert_eq!(ready(&health).await, fine());
}

#[tokio::test(start_paused = true)]
async fn a_failed_check_is_told_before_an_unknown_one() {
    let (first, second) = (Script::default(), Script::default());
    first.set(Mode::Hang);
    second.set(Mode::Fail);
    let health = HealthRegistry::builder()
        .check(first.required("first"))
        .check(second.required("second"))
        .build()
        .unwrap();
    let _running = health.start().unwrap();
    settle().await;
    assert_eq!(ready(&health).await, failing("check_failed", "second"));
    let reason = Reason::CheckFailed("second".into());
    assert_eq!(health.readiness(), Standing::NotReady(reason.clone()));
    assert_eq!(reason.to_string(), "the check \"second\" has failed");
}

#[tokio::test(start_paused = true)]
async fn checks_run_every_five_seconds_give_or_take_a_tenth() {
    let script = Script::default();
    let health = HealthRegistry::builder()
        .check(script.required("db"))
        .build()
        .unwrap();
    let _running = health.start().unwrap();
    advance(1000 * SECOND).await;
    let starts = script.starts.lock().unwrap().clone();
    let gaps: Vec<Duration> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!((180..=223).contains(&gaps.len()), "{}", gaps.len());
    for gap in &gaps {
        // A timer of tokio's is up to 1 ms late; on a paused clock, 2.
        assert!(*gap >= Duration::from_millis(4500), "{gap:?}");
        assert!(*gap <= Duration::from_millis(5502), "{gap:?}");
    }
    // Not all alike: 2⁻⁶⁰⁰ for a false alarm.
    assert!(
        gaps.iter()
            .max()
            .unwrap()
            .abs_diff(*gaps.iter().min().unwrap())
            > SECOND / 10
    );
}

#[tokio::test(start_paused = true)]
async fn jitter_is_drawn_from_what_it_is_given() {
    for (draw, millis) in [(0, 4500), (1 << 63, 5000), (u64::MAX, 5500)] {
        let script = Script::default();
        let health = HealthRegistry::builder()
            .check(script.required("db"))
            .random(move || draw)
            .build()
            .unwrap();
        let _running = health.start().unwrap();
        advance(12 * SECOND).await;
        let starts = script.starts.lock().unwrap().clone();
        assert_eq!(starts.len(), 3);
        let gap = starts[2] - starts[1];
        assert!(
            gap.abs_diff(Duration::from_millis(millis)) <= Duration::from_millis(2),
            "{gap:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn one_run_at_a_time_and_no_probe_runs_one() {
    let script = Script::default();
    script.set(Mode::Take(30 * SECOND));
    let check = script.required("db").interval(SECOND).timeout(60 * SECOND);
    let health = HealthRegistry::builder().check(check).build().unwrap();
    let running = health.start().unwrap();
    for _ in 0..100 {
        advance(SECOND).await;
        for path in [
            "/health/live",
            "/health/ready",
            "/health/startup",
            "/health",
        ] {
            probe(&health, path).await;
        }
    }
    assert_eq!(script.most.load(SeqCst), 1);
    assert_eq!(script.runs(), 4);

    // Nor does one that began before a restart overlap with one after.
    drop(running);
    let _running = health.start().unwrap();
    settle().await;
    assert_eq!(script.runs(), 5);
    assert_eq!(script.most.load(SeqCst), 1);
}

/// A check that blocks its thread cannot be ended; what was started since
/// waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_run_that_cannot_be_ended_is_waited_for() {
    let (begin, mut began) = tokio::sync::mpsc::unbounded_channel();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = Mutex::new(held);
    let check = Check::required("db", move || {
        begin.send(()).unwrap();
        let _ = held.lock().unwrap().recv_timeout(10 * SECOND);
        async { Ok::<_, Infallible>(()) }
    });
    let health = HealthRegistry::builder().check(check).build().unwrap();
    let running = health.start().unwrap();
    let mut next = async |within| tokio::time::timeout(within, began.recv()).await.is_ok();
    assert!(next(10 * SECOND).await);
    drop(running);
    let _running = health.start().unwrap();
    assert!(!next(SECOND / 5).await);
    release.send(()).unwrap();
    assert!(next(10 * SECOND).await);
    release.send(()).unwrap();
}

#[tokio::test(start_paused = true)]
async fn after_three_intervals_nothing_is_known() {
    let (required, optional) = (Script::default(), Script::default());
    let health = HealthRegistry::builder()
        .check(required.required("db"))
        .check(optional.optional("cache"))
        .build()
        .unwrap();
    let running = health.start().unwrap();
    settle().await;
    running.stop().await;
    advance(15 * SECOND).await;
    assert_eq!(ready(&health).await, fine());
    advance(Duration::from_millis(1)).await;
    assert_eq!(health.check("cache"), Some(CheckState::Unknown));
    assert_eq!(ready(&health).await, failing("unknown", "db"));

    // A failure is not remembered for longer, and an optional check does not count.
    let cache = Script::default();
    cache.set(Mode::Fail);
    let health = HealthRegistry::builder()
        .check(cache.optional("cache"))
        .build()
        .unwrap();
    let running = health.start().unwrap();
    settle().await;
    drop(running);
    advance(16 * SECOND).await;
    assert_eq!(health.check("cache"), Some(CheckState::Unknown));
    assert_eq!(ready(&health).await, fine());
}

#[tokio::test(start_paused = true)]
async fn a_beat_that_stops_lowers_the_score() {
    let beat = Beat::new("consumer", 10 * SECOND);
    let health = HealthRegistry::builder()
        .source(beat.clone())
        .build()
        .unwrap();
    for _ in 0..5 {
        advance(9 * SECOND).await;
        assert_eq!(health.score(), 1.0);
        beat.beat();
    }
    advance(11 * SECOND).await;
    assert_eq!(health.score(), 0.0);
    beat.beat();
    assert_eq!(health.score(), 1.0);
}

/// The tasks of the runtime but this one, which has none of its own.
fn tasks() -> usize {
    tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks()
}

#[tokio::test(start_paused = true)]
async fn no_task_is_left_when_the_guard_is_dropped() {
    let script = Script::default();
    script.set(Mode::Hang);
    let heard = Arc::new(AtomicUsize::new(0));
    let hears = Arc::clone(&heard);
    let health = HealthRegistry::builder()
        .check(script.required("db"))
        .check(script.optional("cache"))
        .stall_limit(SECOND)
        .on_change(move |_| {
            hears.fetch_add(1, SeqCst);
            pending()
        })
        .build()
        .unwrap();
    assert_eq!(tasks(), 0);
    let running = health.start().unwrap();
    assert!(health.is_running());
    assert_eq!(health.start().unwrap_err(), StartError::Running);
    advance(SECOND).await;
    assert_eq!((tasks(), script.at_once.load(SeqCst)), (5, 2));
    assert_eq!(heard.load(SeqCst), 1);

    drop(running);
    assert!(!health.is_running());
    settle().await;
    assert_eq!((tasks(), script.at_once.load(SeqCst)), (0, 0));

    // As often as one likes; and `stop` waits for it.
    for _ in 0..3 {
        let running = health.start().unwrap();
        settle().await;
        assert_eq!(tasks(), 5);
        running.stop().await;
        assert_eq!((tasks(), script.at_once.load(SeqCst)), (0, 0));
    }
    // A registry that is gone does not live on in its tasks.
    let running = health.start().unwrap();
    drop(health);
    drop(running);
    settle().await;
    assert_eq!(tasks(), 0);
    assert_eq!(Arc::strong_count(&heard), 1);
}

#[test]
fn it_starts_in_a_runtime_only() {
    let health = HealthRegistry::builder().build().unwrap();
    assert_eq!(health.start().unwrap_err(), StartError::NoRuntime);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let _in = runtime.enter();
    assert!(health.start().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_runtime_that_does_not_come_round_is_stalled() {
    let health = HealthRegistry::builder()
        .stall_limit(2 * SECOND)
        .build()
        .unwrap();
    let live = async || probe(&health, "/health/live").await;
    // Nothing ticks yet, and nobody is late.
    advance(60 * SECOND).await;
    assert_eq!(live().await.0, 200);
    let running = health.start().unwrap();
    for _ in 0..20 {
        advance(SECOND).await;
        assert_eq!(live().await.0, 200);
    }
    // The clock runs, and no task does.
    tokio::time::advance(Duration::from_millis(2600)).await;
    let late = health.service().oneshot(web::get("/health/live"));
    let (status, document) = {
        let response = late.await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice::<Value>(&body).unwrap())
    };
    assert_eq!(status, 503);
    assert_eq!(document["reason"], "stalled");
    assert!(document["stalled_ms"].as_u64().unwrap() > 2000);
    // It is no matter of readiness.
    assert_eq!(ready(&health).await, fine());
    settle().await;
    assert_eq!(live().await.0, 200);
    // One that was ended is not late.
    running.stop().await;
    advance(60 * SECOND).await;
    assert_eq!(live().await.0, 200);
}

#[tokio::test(start_paused = true)]
async fn without_a_limit_nothing_stalls() {
    let health = HealthRegistry::builder().build().unwrap();
    let _running = health.start().unwrap();
    settle().await;
    tokio::time::advance(3600 * SECOND).await;
    assert_eq!(probe(&health, "/health/live").await.0, 200);
}

/// A source is asked outside of every lock: it may ask the registry back.
#[tokio::test(start_paused = true)]
async fn who_is_asked_may_ask_back() {
    #[derive(Clone, Default)]
    struct Curious(Arc<Mutex<Option<HealthRegistry>>>, Arc<AtomicBool>);
    impl HealthSource for Curious {
        fn name(&self) -> &str {
            "curious"
        }
        fn health(&self) -> Health {
            let health = self.0.lock().unwrap().clone();
            if let Some(health) = health {
                health.remove_source("other");
                let _ = health.add_source(Indicator::new("other"));
                self.1.store(true, SeqCst);
            }
            Health::scored(0.5)
        }
    }
    let curious = Curious::default();
    let health = HealthRegistry::builder()
        .source(curious.clone())
        .build()
        .unwrap();
    *curious.0.lock().unwrap() = Some(health.clone());
    assert_eq!(health.score(), 0.5);
    assert!(curious.1.load(SeqCst));
    assert_eq!(health.report().sources.len(), 2);
    *curious.0.lock().unwrap() = None;
}

#[test]
fn what_makes_no_sense_cannot_be_built() {
    let says = |built: Result<HealthRegistry, ConfigError>, what: &str| {
        let error = built.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    let new = HealthRegistry::builder;
    let check = |name: &str| Check::required(name, async || Ok::<_, Infallible>(()));
    says(new().name("").build(), "name of the registry");
    says(
        new().source(Indicator::new("é")).build(),
        "name of a source",
    );
    says(
        new()
            .source(Indicator::new("a"))
            .source(Indicator::new("a"))
            .build(),
        "\"a\" already",
    );
    says(
        new()
            .source(Source::new(Indicator::new("a")).weight(0.0))
            .build(),
        "weight",
    );
    says(new().gate("", Gate::open()).build(), "name of a gate");
    says(
        new()
            .gate("a", Gate::open())
            .gate("a", Gate::open())
            .build(),
        "\"a\" already",
    );
    says(new().latch(&Latch::new("\n")).build(), "name of a latch");
    says(
        new()
            .latch(&Latch::new("a"))
            .latch(&Latch::new("a"))
            .build(),
        "\"a\" already",
    );
    says(
        new().check(check("a")).check(check("a")).build(),
        "\"a\" already",
    );
    says(
        new().check(check("a").interval(Duration::ZERO)).build(),
        "interval of a check",
    );
    for score in [0.0, -0.5, 1.01, f64::NAN] {
        says(new().threshold(Threshold::new(score)).build(), "threshold");
        says(new().mark(score).build(), "mark");
    }
    let at_once = Threshold::new(0.5).retry_after(Duration::ZERO);
    says(new().threshold(at_once).build(), "wait of the threshold");
    says(new().evaluate_every(Duration::ZERO).build(), "evaluations");
    says(new().look_every(Duration::MAX).build(), "looks");
    says(new().stall_limit(Duration::ZERO).build(), "stall");
    says(new().capacity(0).build(), "changes kept");
    says(new().capacity(usize::MAX).build(), "changes kept");
    assert!(
        HealthService::builder(&new().build().unwrap())
            .build()
            .is_ok()
    );
}

/// Nobody would take it back.
#[tokio::test(start_paused = true)]
async fn a_score_that_is_not_watched_any_more_is_not_too_low() {
    let queue = Indicator::new("queue");
    let threshold = Threshold::new(0.5).down_after(NonZeroU32::MIN);
    let health = HealthRegistry::builder()
        .source(queue.clone())
        .threshold(threshold)
        .build()
        .unwrap();
    let running = health.start().unwrap();
    queue.set(0.0);
    tokio::time::sleep(Duration::from_secs(11)).await;
    assert!(!health.readiness().is_ready());
    running.stop().await;
    assert!(health.readiness().is_ready());
}
