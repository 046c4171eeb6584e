//! From the trigger to the report, on a paused clock.

use std::{
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress_core::{
    health::{Readiness, ReadinessGate},
    testing::{advance, elapsed, settle},
};
use buttress_drain::{
    ConnectionState, CutKind, Hook, HookOutcome, HookReport, Phase, Priority, Report, Shutdown,
};
use proptest::prelude::*;
use tokio::{
    task::{JoinHandle, yield_now},
    time::{sleep, timeout},
};
use tokio_test::{assert_pending, assert_ready, task};

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Five of thirty seconds, and five of them the hooks'.
fn shutdown() -> Shutdown {
    Shutdown::builder().build().unwrap()
}

fn run(shutdown: &Shutdown) -> JoinHandle<Report> {
    let shutdown = shutdown.clone();
    tokio::spawn(async move { shutdown.run().await })
}

#[tokio::test(start_paused = true)]
async fn nothing_happens_before_the_trigger() {
    let shutdown = shutdown();
    let driver = run(&shutdown);
    advance(secs(3600)).await;
    assert!(!driver.is_finished());
    assert_eq!(shutdown.phase(), Phase::Serving);
    assert_eq!(shutdown.readiness(), Readiness::Ready);
    assert!(shutdown.should_accept_requests() && !shutdown.is_draining());
    assert_eq!(shutdown.remaining(), None);
    assert!(shutdown.schedule().is_none() && shutdown.report().is_none());
}

#[tokio::test(start_paused = true)]
async fn an_idle_server_is_done_after_the_delay() {
    let shutdown = shutdown();
    let driver = run(&shutdown);
    assert!(shutdown.trigger("SIGTERM"));
    let reason = "shutting_down";
    assert_eq!(shutdown.readiness(), Readiness::NotReady { reason });
    assert!(shutdown.should_accept_requests() && shutdown.is_draining());
    // All is still served, to the end of the delay.
    advance(millis(4_990)).await;
    assert_eq!(shutdown.phase(), Phase::Draining);
    advance(millis(10)).await;
    assert_eq!(shutdown.phase(), Phase::Done);
    assert!(!shutdown.should_accept_requests());

    let report = driver.await.unwrap();
    assert_eq!(report.took(), secs(5));
    assert_eq!((report.exit_code(), report.reason()), (0, "SIGTERM"));
    assert!(report.is_clean() && report.cut().is_empty());
    assert_eq!(report.to_string(), "shut down in 5s (SIGTERM), exit code 0");
    assert!(shutdown.report().is_some());
}

#[tokio::test(start_paused = true)]
async fn the_first_trigger_counts() {
    let shutdown = shutdown();
    assert!(shutdown.trigger_without_delay("first"));
    let schedule = shutdown.schedule().unwrap();
    advance(secs(1)).await;
    assert!(!shutdown.trigger("second"));
    assert_eq!(shutdown.schedule().unwrap().start(), schedule.start());
    assert_eq!(shutdown.schedule().unwrap().reason(), "first");
    assert_eq!(schedule.closing(), schedule.start());
    assert_eq!(schedule.cut() - schedule.start(), secs(25));
    assert_eq!(schedule.end() - schedule.start(), secs(30));
    assert_eq!(shutdown.remaining(), Some(secs(24)));
    // A driver that comes late finds the deadlines where they were.
    let guard = shutdown.guard("job");
    let (took, report) = elapsed(shutdown.run()).await;
    assert!((millis(24_000)..millis(24_600)).contains(&took), "{took:?}");
    assert_eq!(report.reason(), "first");
    drop(guard);
}

/// Each kind of thing that is waited for, and what a deadline makes of it.
#[tokio::test(start_paused = true)]
async fn all_of_them_are_waited_for() {
    for which in 0..4 {
        let shutdown = shutdown();
        let driver = run(&shutdown);
        let connection = (which == 0).then(|| shutdown.connection());
        let guard = (which == 1).then(|| shutdown.guard("job"));
        let late = (which == 2).then(|| shutdown.try_guard("late").unwrap());
        let server = (which == 3).then(|| shutdown.server("http"));
        shutdown.trigger("test");
        advance(secs(15)).await;
        let phase = shutdown.phase();
        let waiting = if which == 3 {
            Phase::Closing
        } else {
            Phase::Closed
        };
        assert_eq!(phase, waiting, "{which}");
        drop((connection, guard, late, server));
        settle().await;
        assert_eq!(shutdown.phase(), Phase::Done, "{which}");
        let report = driver.await.unwrap();
        assert_eq!((report.exit_code(), report.drained_after()), (0, secs(15)));
    }
}

#[tokio::test(start_paused = true)]
async fn the_listeners_close_before_the_rest_is_looked_at() {
    let shutdown = shutdown();
    let driver = run(&shutdown);
    let mut servers = [shutdown.server("http"), shutdown.server("admin")];
    let mut told = task::spawn(servers[0].closing());
    assert_pending!(told.poll());
    shutdown.trigger("test");
    advance(millis(4_990)).await;
    assert_pending!(told.poll());
    advance(millis(10)).await;
    assert!(told.is_woken());
    assert_ready!(told.poll());
    servers[0].listener_closed();
    servers[0].listener_closed();
    settle().await;
    // What waits in the other's backlog is welcome.
    assert_eq!(shutdown.phase(), Phase::Closing);
    assert!(shutdown.should_accept_requests());
    let late = shutdown.try_guard("from the backlog").unwrap();
    drop(servers);
    settle().await;
    assert_eq!(shutdown.phase(), Phase::Closed);
    assert!(shutdown.try_guard("too late").is_none());
    assert_eq!(shutdown.guards(), 1);
    drop(late);
    assert!(driver.await.unwrap().is_clean());
}

#[tokio::test(start_paused = true)]
async fn a_listener_that_stays_is_a_failure() {
    let shutdown = shutdown();
    let server = shutdown.server("http");
    shutdown.trigger("test");
    let (took, report) = elapsed(shutdown.run()).await;
    assert!(took >= secs(25) && took < secs(26), "{took:?}");
    assert_eq!(report.exit_code(), 1);
    assert_eq!(report.failures()[0].server(), server.name());
    assert!(
        report
            .to_string()
            .ends_with("server http: its listener was not closed in time")
    );
}

#[tokio::test(start_paused = true)]
async fn a_server_that_fails_is_exit_code_1() {
    let shutdown = shutdown();
    let server = shutdown.server("http");
    server.failed(std::io::Error::other("no more descriptors"));
    drop(server);
    assert_eq!(shutdown.phase(), Phase::Serving);
    shutdown.trigger_without_delay("test");
    let report = shutdown.run().await;
    assert_eq!(report.exit_code(), 1);
    assert_eq!(report.failures()[0].why(), "no more descriptors");
}

#[tokio::test(start_paused = true)]
async fn what_is_left_is_cut_and_named() {
    let shutdown = shutdown();
    let driver = run(&shutdown);
    let (idle, busy, tunnel) = (
        shutdown.connection(),
        shutdown.connection(),
        shutdown.connection(),
    );
    busy.set_state(ConnectionState::Busy);
    busy.wrote(700);
    busy.wrote(7);
    tunnel.set_state(ConnectionState::Upgraded);
    tunnel.set_route("/ws");
    advance(secs(100)).await;
    shutdown.trigger("test");
    let guard = shutdown.guard("export");
    let signal = guard.signal();
    let mut told = [signal.cut(), idle.cut()].map(task::spawn);
    advance(millis(24_990)).await;
    for told in &mut told {
        assert_pending!(told.poll());
    }
    assert_eq!(signal.remaining(), Some(millis(10)));
    assert!(!busy.is_cut());
    advance(millis(10)).await;
    for mut told in told {
        assert!(told.is_woken());
        assert_ready!(told.poll());
    }
    assert!(busy.is_cut() && signal.is_cut());
    assert_eq!(shutdown.phase(), Phase::Cut);

    // They go, and the hooks need not wait.
    drop((idle, busy, tunnel, guard));
    settle().await;
    let report = driver.await.unwrap();
    assert_eq!(report.took(), secs(25));
    assert_eq!((report.exit_code(), report.requests_cut()), (124, 0));
    let mut cut: Vec<_> = report.cut().iter().map(ToString::to_string).collect();
    cut.sort();
    assert_eq!(
        cut,
        [
            "connection after 125s and 707 bytes",
            "guard export after 25s",
            "tunnel /ws after 125s and 0 bytes",
        ]
    );
    assert_eq!(report.cut()[0].kind(), CutKind::Connection);
}

/// A socket on which nothing happens is closed, and nobody is sorry.
#[tokio::test(start_paused = true)]
async fn idle_connections_are_cut_and_do_not_count() {
    let shutdown = shutdown();
    let idle = shutdown.connection();
    shutdown.trigger("test");
    let (took, report) = elapsed(shutdown.run()).await;
    assert!(idle.is_cut());
    assert!(took < secs(26), "{took:?}");
    assert_eq!(report.exit_code(), 0, "{report}");
}

/// What does not heed the cut takes a moment of the hooks' time and no more.
#[tokio::test(start_paused = true)]
async fn what_cannot_be_cut_holds_nothing_up() {
    let shutdown = shutdown();
    let _stuck = shutdown.guard("stuck");
    shutdown.hook(Hook::new("flush", async || ()));
    shutdown.trigger("test");
    let (took, report) = elapsed(shutdown.run()).await;
    assert_eq!(took, millis(25_500));
    assert_eq!(report.hooks()[0].outcome(), &HookOutcome::Done);
    assert_eq!(report.exit_code(), 124);

    let short = Shutdown::builder()
        .drain_delay(Duration::ZERO)
        .timeout(millis(300))
        .hook_reserve(millis(200))
        .build()
        .unwrap();
    let _stuck = short.guard("stuck");
    short.trigger("test");
    let (took, _) = elapsed(short.run()).await;
    assert_eq!(took, millis(150));
}

type Log = Arc<Mutex<Vec<String>>>;

fn log(log: &Log, what: &str) {
    log.lock().unwrap().push(what.to_owned());
}

/// A hook that says when it begins and when it ends.
fn slow(told: &Log, name: &'static str, span: Duration) -> Hook {
    let told = Arc::clone(told);
    Hook::new(name, move || async move {
        log(&told, &format!("{name} begins"));
        sleep(span).await;
        log(&told, &format!("{name} ends"));
    })
}

#[tokio::test(start_paused = true)]
async fn hooks_run_by_priority_and_equal_ones_at_once() {
    let shutdown = shutdown();
    let told = Log::default();
    for (name, priority, span) in [
        ("background", Priority::BACKGROUND, 10),
        ("normal", Priority::NORMAL, 30),
        ("also normal", Priority::default(), 10),
        ("last", Priority(-7), 10),
        ("critical", Priority::CRITICAL, 10),
        ("between", Priority::from(60), 10),
    ] {
        let hook = slow(&told, name, millis(span)).priority(priority);
        assert!(shutdown.hook(hook));
    }
    shutdown.trigger_without_delay("test");
    let (took, report) = elapsed(shutdown.run()).await;
    assert_eq!(took, millis(10 + 10 + 30 + 10 + 10));
    assert_eq!(
        *told.lock().unwrap(),
        [
            "critical begins",
            "critical ends",
            "between begins",
            "between ends",
            "normal begins",
            "also normal begins",
            "also normal ends",
            "normal ends",
            "background begins",
            "background ends",
            "last begins",
            "last ends",
        ]
    );
    let names: Vec<_> = report
        .hooks()
        .iter()
        .map(|hook| hook.name().as_str())
        .collect();
    assert_eq!(
        names,
        [
            "critical",
            "between",
            "also normal",
            "normal",
            "background",
            "last"
        ]
    );
    assert_eq!(report.exit_code(), 0);
    assert!(!shutdown.hook(Hook::new("too late", async || ())));
}

/// One that fails or panics, in its future or before there is one, stops none.
#[tokio::test(start_paused = true)]
async fn a_hook_that_fails_is_its_own_affair() {
    fn broken() -> std::future::Ready<()> {
        panic!("before it began")
    }
    let shutdown = shutdown();
    let ran = Arc::new(AtomicUsize::new(0));
    shutdown.hook(Hook::new("fails", async || Err("disk full")).priority(3));
    let panics = async || -> Result<(), &str> { panic!("at {}", "work") };
    shutdown.hook(Hook::new("panics", panics).priority(2));
    shutdown.hook(Hook::new("breaks", broken).priority(2));
    let count = Arc::clone(&ran);
    shutdown.hook(Hook::new("works", async move || {
        count.fetch_add(1, Ordering::Relaxed);
        Ok::<_, std::io::Error>(())
    }));
    shutdown.trigger_without_delay("test");
    let report = shutdown.run().await;
    assert_eq!(ran.load(Ordering::Relaxed), 1);
    assert_eq!(report.exit_code(), 1);
    let outcome = |name: &str| {
        let mut hooks = report.hooks().iter();
        let hook = hooks.find(|hook| *hook.name() == name);
        hook.unwrap().outcome().clone()
    };
    assert_eq!(outcome("fails"), HookOutcome::Failed("disk full".into()));
    assert_eq!(outcome("panics"), HookOutcome::Panicked("at work".into()));
    assert_eq!(
        outcome("breaks"),
        HookOutcome::Panicked("before it began".into())
    );
    assert_eq!(outcome("works"), HookOutcome::Done);
    let text = report.to_string();
    assert!(text.contains("hook: fails (priority 3) failed after 0ns: disk full"));
    assert!(text.contains("hook: breaks (priority 2) panicked after 0ns"));
}

#[tokio::test(start_paused = true)]
async fn a_hook_ends_at_its_limit() {
    let shutdown = Shutdown::builder().hook_limit(secs(3)).build().unwrap();
    let told = Log::default();
    shutdown.hook(slow(&told, "default", secs(100)).priority(99));
    shutdown.hook(slow(&told, "own", secs(100)).priority(98).limit(secs(1)));
    shutdown.hook(slow(&told, "quick", millis(1)));
    shutdown.trigger_without_delay("test");
    let (took, report) = elapsed(shutdown.run()).await;
    assert_eq!(took, millis(4_001));
    let told = told.lock().unwrap();
    assert_eq!(
        *told,
        ["default begins", "own begins", "quick begins", "quick ends"]
    );
    let outcomes: Vec<_> = report
        .hooks()
        .iter()
        .map(|hook| (hook.outcome().as_str(), hook.took()))
        .collect();
    let expected = [
        ("timed_out", secs(3)),
        ("timed_out", secs(1)),
        ("done", millis(1)),
    ];
    assert_eq!(outcomes, expected);
    // A deadline cut it off.
    assert_eq!(report.exit_code(), 124);
}

/// All of them within what is left of the whole, whatever their limits; those
/// that find nothing left are told of.
#[tokio::test(start_paused = true)]
async fn hooks_have_their_reserve_and_no_more() {
    let shutdown = shutdown();
    let _stuck = shutdown.guard("stuck");
    let told = Log::default();
    shutdown.hook(slow(&told, "long", secs(100)).priority(99).limit(secs(60)));
    shutdown.hook(slow(&told, "skipped", secs(1)));
    shutdown.hook(slow(&told, "too", secs(1)).priority(1));
    shutdown.trigger("test");
    let (took, report) = elapsed(shutdown.run()).await;
    assert_eq!(took, secs(30));
    assert_eq!(*told.lock().unwrap(), ["long begins"]);
    let outcomes: Vec<_> = report
        .hooks()
        .iter()
        .map(|hook| hook.outcome().as_str())
        .collect();
    assert_eq!(outcomes, ["timed_out", "skipped", "skipped"]);
    assert!(
        report
            .to_string()
            .contains("hook: too (priority 1) was skipped")
    );
    assert_eq!(report.exit_code(), 124);
}

/// 124 wins over 1.
#[tokio::test(start_paused = true)]
async fn a_cut_weighs_more_than_a_failure() {
    let shutdown = shutdown();
    let _stuck = shutdown.guard("stuck");
    shutdown.hook(Hook::new("fails", async || Err("no")));
    shutdown.server("http").failed("no");
    shutdown.trigger("test");
    assert_eq!(shutdown.run().await.exit_code(), 124);
}

/// A hook may register another, as long as they run.
#[tokio::test(start_paused = true)]
async fn a_hook_registers_a_hook() {
    let shutdown = shutdown();
    let inner = shutdown.clone();
    shutdown.hook(Hook::new("first", async move || {
        assert!(inner.hook(Hook::new("second", async || ()).priority(100)));
    }));
    shutdown.trigger_without_delay("test");
    let report = shutdown.run().await;
    assert_eq!(report.hooks().len(), 2);
    assert_eq!(report.exit_code(), 0);
}

#[tokio::test(start_paused = true)]
async fn callbacks_run_at_once_and_do_not_wait_for_each_other() {
    let shutdown = shutdown();
    let told = Log::default();
    let (first, second) = (Arc::clone(&told), Arc::clone(&told));
    assert!(shutdown.on_drain("deregister", move || async move {
        sleep(secs(2)).await;
        log(&first, "deregistered");
    }));
    shutdown.on_drain("panics", async || -> Result<(), &str> { panic!("no") });
    let seen = shutdown.clone();
    shutdown.on_drain("stop the queue", move || async move {
        assert_eq!(seen.phase(), Phase::Draining);
        log(&second, "stopped");
    });
    let driver = run(&shutdown);
    settle().await;
    shutdown.trigger("test");
    settle().await;
    assert_eq!(*told.lock().unwrap(), ["stopped"]);
    advance(secs(2)).await;
    assert_eq!(*told.lock().unwrap(), ["stopped", "deregistered"]);
    assert!(!shutdown.on_drain("too late", async || ()));
    let report = driver.await.unwrap();
    assert_eq!(report.took(), secs(5));
    let took = report.callbacks().iter().map(HookReport::took);
    assert_eq!(took.max(), Some(secs(2)));
    assert_eq!(report.callbacks().len(), 3);
    assert_eq!(report.exit_code(), 1);
}

/// One that takes longer than the delay is waited for, to the cut.
#[tokio::test(start_paused = true)]
async fn a_callback_is_waited_for_to_the_cut() {
    for (span, ends, code) in [(secs(9), secs(9), 0), (secs(60), secs(25), 124)] {
        let shutdown = shutdown();
        shutdown.on_drain("slow", move || sleep(span));
        shutdown.trigger("test");
        let (took, report) = elapsed(shutdown.run()).await;
        assert_eq!((took, report.exit_code()), (ends, code), "{report}");
    }
}

#[tokio::test(start_paused = true)]
async fn force_ends_it_whatever_it_is_at() {
    for at in [millis(1), secs(1), secs(6), secs(24)] {
        let shutdown = shutdown();
        let driver = run(&shutdown);
        let _stuck = shutdown.guard("stuck");
        let server = shutdown.server("http");
        let told = Log::default();
        shutdown.hook(slow(&told, "hook", secs(1)));
        shutdown.trigger("test");
        advance(at).await;
        if at > secs(5) {
            drop(server);
            settle().await;
        }
        shutdown.force("enough");
        let (took, report) = elapsed(driver).await;
        let report = report.unwrap();
        assert_eq!(took, Duration::ZERO, "{at:?}");
        assert!(report.was_forced());
        // No deadline did it.
        assert_eq!(report.exit_code(), 1, "{report}");
        assert_eq!(report.cut().len(), 1);
        assert_eq!(report.hooks()[0].outcome(), &HookOutcome::Skipped);
        assert!(told.lock().unwrap().is_empty());
        assert!(report.failures().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn force_ends_the_hooks_and_needs_no_trigger() {
    let shutdown = shutdown();
    let told = Log::default();
    shutdown.hook(slow(&told, "slow", secs(3)));
    shutdown.hook(slow(&told, "skipped", secs(1)).priority(1));
    let driver = run(&shutdown);
    shutdown.trigger_without_delay("test");
    advance(secs(1)).await;
    assert_eq!(shutdown.phase(), Phase::Hooks);
    shutdown.force("enough");
    let report = driver.await.unwrap();
    assert_eq!((report.took(), report.exit_code()), (secs(1), 1));

    let other = self::shutdown();
    other.force("at once");
    let (took, report) = elapsed(other.run()).await;
    assert_eq!((took, report.exit_code()), (Duration::ZERO, 1));
    assert_eq!(report.reason(), "at once");
}

/// Nobody who waits is left behind, whenever they came.
#[tokio::test(start_paused = true)]
async fn many_wait_for_each_phase() {
    let shutdown = shutdown();
    let heard = Arc::new(AtomicUsize::new(0));
    let phases = [
        Phase::Draining,
        Phase::Closing,
        Phase::Closed,
        Phase::Cut,
        Phase::Hooks,
        Phase::Done,
    ];
    let wait = |phase| {
        let (reached, heard) = (shutdown.reached(phase), Arc::clone(&heard));
        tokio::spawn(async move {
            reached.await;
            heard.fetch_add(1, Ordering::Relaxed);
        })
    };
    let mut all: Vec<_> = (0..1000).map(|n| wait(phases[n % 6])).collect();
    let driver = run(&shutdown);
    settle().await;
    shutdown.trigger("test");
    all.extend((0..60).map(|n| wait(phases[n % 6])));
    advance(secs(1)).await;
    assert_eq!(heard.load(Ordering::Relaxed), 1000 / 6 + 1 + 10);
    assert!(driver.await.unwrap().is_clean());
    // Cut was skipped, since there was nothing to cut; they heard.
    for task in all {
        timeout(secs(1), task).await.unwrap().unwrap();
    }
    let mut late = task::spawn(shutdown.reached(Phase::Cut));
    assert_ready!(late.poll());
    assert_ready!(late.poll());
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_is_dropped_is_nobody() {
    let shutdown = shutdown();
    let waits = shutdown.reached(Phase::Draining);
    assert!(!waits.is_reached());
    let mut waits = task::spawn(waits);
    assert_pending!(waits.poll());
    drop(waits);
    // Made before, polled after.
    let mut late = task::spawn(shutdown.signal().notified());
    shutdown.trigger("test");
    assert_ready!(late.poll());
}

/// From another thread, and many at once: the wake-up comes.
#[test]
fn no_wake_up_is_lost_between_threads() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
    };
    for _ in 0..200 {
        let shutdown = shutdown();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let waits = shutdown.reached(Phase::Draining);
                scope.spawn(move || {
                    runtime().block_on(async {
                        timeout(secs(30), waits).await.expect("it was triggered");
                    });
                });
            }
            shutdown.trigger("test");
        });
    }
}

#[tokio::test(start_paused = true)]
async fn several_drivers_have_one_report() {
    let shutdown = shutdown();
    let drivers = [run(&shutdown), run(&shutdown)];
    let ran = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&ran);
    shutdown.hook(Hook::new("once", async move || {
        count.fetch_add(1, Ordering::Relaxed);
    }));
    shutdown.trigger("test");
    for driver in drivers {
        assert_eq!(driver.await.unwrap().hooks().len(), 1);
    }
    assert_eq!(shutdown.run().await.took(), secs(5));
    assert_eq!(ran.load(Ordering::Relaxed), 1);
}

/// A driver that is dropped is taken over where it was.
#[tokio::test(start_paused = true)]
async fn a_driver_can_be_dropped() {
    let shutdown = shutdown();
    let told = Log::default();
    shutdown.hook(slow(&told, "first", secs(3)).priority(99));
    shutdown.hook(slow(&told, "second", secs(1)));
    shutdown.trigger("test");
    // During the delay, and in the midst of a hook.
    assert!(timeout(secs(1), shutdown.run()).await.is_err());
    assert_eq!(shutdown.phase(), Phase::Draining);
    assert!(timeout(secs(5), shutdown.run()).await.is_err());
    assert_eq!(shutdown.phase(), Phase::Hooks);
    let report = shutdown.run().await;
    assert_eq!(report.took(), secs(7));
    assert_eq!(
        *told.lock().unwrap(),
        ["first begins", "second begins", "second ends"]
    );
    // What was lost with it is not passed over.
    assert_eq!(report.hooks()[0].outcome(), &HookOutcome::TimedOut);
    assert_eq!((report.hooks().len(), report.exit_code()), (2, 124));
}

/// Ends nothing, and remembers with what.
fn watched(exits: &Arc<AtomicI32>) -> Shutdown {
    let exits = Arc::clone(exits);
    Shutdown::builder()
        .drain_delay(Duration::ZERO)
        .timeout(millis(200))
        .hook_reserve(millis(100))
        .exit_with(move |code| exits.store(code, Ordering::SeqCst))
        .build()
        .unwrap()
}

/// On the real clock, since a thread has no other.
#[test]
fn the_watchdog_ends_what_is_stuck() {
    let exits = Arc::new(AtomicI32::new(-1));
    let shutdown = watched(&exits);
    // Nobody drives: the runtime is blocked.
    shutdown.trigger("test");
    let start = buttress_core::clock::now();
    let took = || buttress_core::clock::now() - start;
    while exits.load(Ordering::SeqCst) == -1 && took() < secs(20) {
        std::thread::yield_now();
    }
    assert_eq!(exits.load(Ordering::SeqCst), 124);
    assert!(took() >= millis(690), "{:?}", took());
}

#[test]
fn the_watchdog_leaves_alone_what_is_done() {
    let exits = Arc::new(AtomicI32::new(-1));
    let shutdown = watched(&exits);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    shutdown.trigger("test");
    let report = runtime.block_on(async {
        let report = shutdown.run().await;
        // Beyond when it would have bitten.
        sleep(millis(1_200)).await;
        report
    });
    assert_eq!(report.exit_code(), 0);
    assert_eq!(exits.load(Ordering::SeqCst), -1);
}

/// A task that blocks the one thread of its runtime, and a hook that blocks
/// one of several: the others go on.
#[test]
fn a_hook_that_blocks_its_thread_is_left_behind() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .unwrap();
    let shutdown = Shutdown::builder()
        .drain_delay(Duration::ZERO)
        .timeout(millis(400))
        .hook_reserve(millis(300))
        .build()
        .unwrap();
    let (release, held) = std::sync::mpsc::channel::<()>();
    shutdown.hook(Hook::new("blocks", move || async move {
        let _ = held.recv_timeout(secs(20));
    }));
    shutdown.trigger("test");
    let report = runtime.block_on(async { timeout(secs(10), shutdown.run()).await.unwrap() });
    assert_eq!(report.hooks()[0].outcome(), &HookOutcome::TimedOut);
    assert_eq!(report.exit_code(), 124);
    drop(release);
}

#[tokio::test(start_paused = true)]
async fn work_that_is_told_ends_by_itself() {
    let shutdown = shutdown();
    let guard = shutdown.guard("queue");
    let jobs = Arc::new(AtomicUsize::new(0));
    let done = Arc::clone(&jobs);
    tokio::spawn(async move {
        let signal = guard.signal();
        let mut stop = std::pin::pin!(signal.notified());
        while timeout(millis(100), stop.as_mut()).await.is_err() {
            done.fetch_add(1, Ordering::Relaxed);
        }
        assert!(signal.is_draining());
        drop(guard);
    });
    advance(secs(1)).await;
    shutdown.trigger("test");
    let report = shutdown.run().await;
    assert_eq!(report.exit_code(), 0);
    assert!(jobs.load(Ordering::Relaxed) >= 9);
}

/// A task that never ends holds its guard to the cut, and is told of it.
#[tokio::test(start_paused = true)]
async fn a_task_races_its_work_against_the_cut() {
    let shutdown = shutdown();
    let guard = shutdown.guard("endless");
    let task = tokio::spawn(async move {
        guard.signal().cut().await;
        drop(guard);
    });
    shutdown.trigger("test");
    let (took, report) = elapsed(shutdown.run()).await;
    assert_eq!(took, secs(25));
    assert_eq!(report.exit_code(), 124);
    task.await.unwrap();
    // And one that awaits for ever is nobody's, without a guard.
    let lost = tokio::spawn(pending::<()>());
    yield_now().await;
    lost.abort();
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Take(u8),
    Drop(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..3_u8).prop_map(Step::Take),
        any::<usize>().prop_map(Step::Drop),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However guards come and go, and whenever the trigger comes: it is over
    /// when the last of them is dropped, and not before.
    #[test]
    fn it_is_over_when_all_are_gone(steps in steps(), trigger in 0..60_usize) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let shutdown = shutdown();
            let driver = run(&shutdown);
            let mut held: Vec<Box<dyn Send>> = Vec::new();
            for (at, step) in steps.iter().enumerate() {
                if at == trigger {
                    shutdown.trigger_without_delay("test");
                    settle().await;
                }
                match *step {
                    Step::Take(0) => held.push(Box::new(shutdown.connection())),
                    Step::Take(1) => held.push(Box::new(shutdown.server("http"))),
                    Step::Take(_) => held.push(Box::new(shutdown.guard("job"))),
                    Step::Drop(which) if !held.is_empty() => drop(held.swap_remove(which % held.len())),
                    Step::Drop(_) => {}
                }
                assert_eq!(shutdown.is_idle(), held.is_empty());
                settle().await;
                let over = shutdown.phase() == Phase::Done;
                if over {
                    // There was a moment, and what came after it is not waited for.
                    break;
                }
                assert!(at < trigger || !held.is_empty());
            }
            shutdown.trigger_without_delay("test");
            settle().await;
            if shutdown.phase() != Phase::Done {
                assert!(!held.is_empty());
                while held.len() > 1 {
                    held.pop();
                    settle().await;
                    assert!(!driver.is_finished());
                }
                held.pop();
            }
            assert_eq!(driver.await.unwrap().took(), Duration::ZERO);
        });
    }
}
