use std::{
    collections::BTreeMap,
    sync::{
        Barrier, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

use buttress_core::{
    Head,
    classify::Verdict,
    health::{Health, HealthSource},
    key::{self, ExtractKey},
    testing::advance,
};
use http::Request;
use proptest::prelude::*;

use super::*;
use crate::{Reason, State, Window};

fn registry(max_keys: usize) -> Registry {
    Registry::builder("test")
        .max_keys(max_keys)
        .build()
        .unwrap()
}

/// Without a handle in the hand, as the layer does.
fn succeed(registry: &Registry, name: &str) {
    registry.try_acquire(name).unwrap().record(Verdict::Success);
}

fn fail(registry: &Registry, name: &str) {
    registry.try_acquire(name).unwrap().record(Verdict::Failure);
}

fn state(registry: &Registry, name: &str) -> Option<State> {
    registry.get(name).map(|breaker| breaker.state())
}

/// New keys, until one found no room.
fn fill(registry: &Registry, settle: impl Fn(&Breaker)) {
    for n in 0.. {
        let breaker = registry.get_or_create(&format!("filler-{n}"));
        if registry.overflowed() > 0 {
            return;
        }
        settle(&breaker);
        assert!(n < registry.max_keys(), "the bound holds");
    }
}

#[test]
fn what_makes_no_sense_is_not_built() {
    let says = |builder: RegistryBuilder| builder.build().unwrap_err().to_string();
    let builder = || Registry::builder("r");
    assert_eq!(
        says(builder().max_keys(0)),
        "the most keys must be at least 1"
    );
    assert!(says(Registry::builder("")).contains("name"));
    assert!(says(Registry::builder("a\nb")).contains("name"));
    assert!(says(builder().settings(Settings::new().failure_rate(2.0))).contains("failure rate"));
    let longest = Registry::builder("x".repeat(128)).build().unwrap();
    assert!(longest.overflow().name().ends_with(":overflow"));
}

#[test]
fn a_key_has_one_breaker() {
    let registry = registry(10);
    let one = registry.get_or_create("one");
    assert!(one.is(&registry.get_or_create("one")));
    assert!(one.is(&registry.clone().get("one").unwrap()));
    assert!(one.is(&registry.get(&"one".to_owned()).unwrap()));
    assert!(one.is(&registry.get(&Key::from("one")).unwrap()));
    assert!(!one.is(&registry.get_or_create("two")));
    assert!(registry.get("three").is_none());
    assert_eq!(registry.len(), 2);
    assert_eq!(&**one.name(), "one");
}

#[test]
fn keys_that_are_written_alike_are_not_the_same() {
    let registry = registry(10);
    let request = Request::builder().uri("http://one/").body(()).unwrap();
    let host = key::host().extract(Head::from(&request)).unwrap();
    let keys = [Key::from("one"), host, Key::from_bytes(b"one")];
    for key in &keys {
        registry.get_or_create(key).force_open();
        assert_eq!(registry.get(key).unwrap().state(), State::ForcedOpen);
        assert!(registry.reset(key));
    }
    assert_eq!(registry.len(), 3);
    // A long one is known by its digest, whichever way it comes.
    let long = "x".repeat(5000);
    let breaker = registry.get_or_create(&long);
    assert!(breaker.is(&registry.get(&Key::from(&long)).unwrap()));
    assert!(registry.get(&long[1..]).is_none());
}

#[test]
fn settings_by_name() {
    let wrong = |name: &str| (name == "wrong").then(|| Settings::new().failure_rate(7.0));
    let registry = Registry::builder("services")
        .settings(Settings::critical())
        .settings_for(move |name| wrong(name).or_else(|| Settings::for_service(name)))
        .build()
        .unwrap();
    let of = |name: &str| registry.get_or_create(name).settings();
    assert_eq!(of("openai"), Settings::tolerant());
    assert_eq!(of("redis"), Settings::aggressive());
    assert_eq!(of("another"), Settings::critical());
    assert_eq!(of("wrong"), Settings::critical());

    registry.configure(&Settings::moderate()).unwrap();
    assert_eq!(of("openai"), Settings::tolerant());
    assert_eq!(of("another"), Settings::moderate());
    assert_eq!(of("new"), Settings::moderate());
    assert_eq!(registry.overflow().settings(), Settings::moderate());
    let nonsense = Settings::new().failure_rate(7.0);
    assert!(registry.configure(&nonsense).is_err());
    assert_eq!(of("newer"), Settings::moderate());
}

#[test]
fn the_bound_holds_under_a_flood_and_open_ones_survive_it() {
    let flood = if cfg!(debug_assertions) {
        100_000
    } else {
        1_000_000
    };
    let registry = Registry::builder("flooded")
        .settings(Settings::aggressive())
        .build()
        .unwrap();
    for n in 0..100 {
        let name = format!("dead-{n}");
        (0..3).for_each(|_| fail(&registry, &name));
        assert_eq!(state(&registry, &name), Some(State::Open));
    }
    registry.get_or_create("forced").force_open();
    registry.get_or_create("off").force_closed();
    registry.get_or_create("watched").metrics_only();
    fail(&registry, "failed once");
    let held = registry.get_or_create("held");
    for n in 0..flood {
        succeed(&registry, &format!("flood-{n}"));
        // One in use among them.
        if n % 100 == 0 {
            succeed(&registry, "busy");
        }
    }
    assert_eq!(registry.len(), 1000);
    assert_eq!(registry.statuses().len(), 1000);
    assert_eq!(registry.overflowed(), 0);
    assert_eq!(registry.evicted(), flood + 106 - 1000);
    for n in 0..100 {
        assert_eq!(state(&registry, &format!("dead-{n}")), Some(State::Open));
    }
    assert_eq!(state(&registry, "forced"), Some(State::ForcedOpen));
    assert_eq!(state(&registry, "off"), Some(State::ForcedClosed));
    assert_eq!(state(&registry, "watched"), Some(State::MetricsOnly));
    assert_eq!(registry.get("failed once").unwrap().status().failures, 1);
    assert!(held.is(&registry.get("held").unwrap()));
    assert!(registry.get("busy").is_some(), "used ones stay");
    assert!(registry.get("flood-0").is_none());
}

#[test]
fn what_finds_no_room_shares_one_until_it_does() {
    let registry = registry(40);
    fill(&registry, Breaker::force_open);
    assert_eq!(registry.len(), 40);
    assert_eq!(registry.evicted(), 0);

    let overflow = registry.overflow().clone();
    assert_eq!(&**overflow.name(), "test:overflow");
    let one = registry.get_or_create("one");
    assert!(one.is(&overflow) && registry.get_or_create("two").is(&overflow));
    assert!(registry.get("one").is_none());
    assert_eq!(registry.overflowed(), 3);
    // They share their fate: one is dead, and two is refused.
    (0..5).for_each(|_| fail(&registry, "one"));
    let refused = registry.try_acquire("two").unwrap_err();
    assert_eq!(refused.name().as_deref(), Some("test:overflow"));
    assert_eq!(refused.reason(), Reason::Open);
    let last = registry.breakers().pop().unwrap();
    assert_eq!(&*last.0, "test:overflow");
    assert!(last.1.is(&overflow));
    assert_eq!(registry.health_summary().open, 1);

    // Room comes.
    for n in 0..40 {
        assert!(registry.reset(&format!("filler-{n}")));
    }
    let two = registry.get_or_create("two");
    assert!(!two.is(&overflow));
    assert_eq!(two.state(), State::Closed);
    assert_eq!(registry.len(), 40);
    assert_eq!(registry.evicted(), 1);

    assert_eq!(overflow.state(), State::Open);
    registry.reset_all();
    assert_eq!(overflow.state(), State::Closed);
}

#[test]
fn removing_makes_room() {
    let registry = registry(3);
    fill(&registry, Breaker::force_open);
    let old = registry.get("filler-1").unwrap();
    assert!(registry.remove("filler-1"));
    assert!(!registry.remove("filler-1"));
    assert!(!registry.remove("never"));
    assert_eq!(registry.len(), 2);
    assert_eq!(old.state(), State::ForcedOpen);
    let new = registry.get_or_create("filler-1");
    assert!(!new.is(&old) && !new.is(registry.overflow()));
    assert_eq!(new.state(), State::Closed);
    assert_eq!(registry.len(), 3);
}

#[test]
fn a_handle_in_the_hand_keeps_it() {
    let registry = registry(2);
    let held = registry.get_or_create("held");
    for n in 0..100 {
        succeed(&registry, &format!("other-{n}"));
        assert!(held.is(&registry.get("held").unwrap()), "{n}");
    }
    assert_eq!(registry.evicted(), 98 + 1);
    drop(held);
}

#[test]
fn forgotten_in_flight_and_made_again() {
    let registry = registry(1);
    let late: Vec<_> = (0..5)
        .map(|n| {
            let permit = registry.try_acquire("a").unwrap();
            // Never used again: it gives way at once.
            assert!(!registry.get_or_create("b").is(registry.overflow()));
            assert!(registry.get("a").is_none(), "{n}");
            assert!(registry.remove("b"));
            permit
        })
        .collect();
    fail(&registry, "a");
    for permit in late {
        permit.record(Verdict::Failure);
    }
    let status = registry.get("a").unwrap().status();
    assert_eq!((status.state, status.failures), (State::Closed, 1));
}

#[tokio::test(start_paused = true)]
async fn what_was_counted_is_kept_for_a_while() {
    let registry = registry(1);
    fail(&registry, "a");
    let crowded = || registry.get_or_create("b").is(registry.overflow());
    assert!(crowded());
    advance(super::config::FORGET_AFTER - Duration::from_secs(1)).await;
    assert!(crowded());
    assert_eq!(registry.get("a").unwrap().status().failures, 1);
    // That was a use: the hand sees it now.
    assert!(crowded());
    advance(super::config::FORGET_AFTER - Duration::from_secs(1)).await;
    assert!(crowded());
    advance(Duration::from_secs(1)).await;
    assert!(!crowded());
    assert!(registry.get("a").is_none());
}

#[tokio::test(start_paused = true)]
async fn what_has_slid_out_of_the_window_is_not_counted() {
    let registry = Registry::builder("windows")
        .settings(
            Settings::new()
                .failure_rate(0.5)
                .window(Window::Time(Duration::from_secs(2))),
        )
        .max_keys(1)
        .build()
        .unwrap();
    fail(&registry, "a");
    let crowded = || registry.get_or_create("b").is(registry.overflow());
    assert!(crowded());
    advance(Duration::from_secs(1)).await;
    assert!(crowded());
    advance(Duration::from_secs(1)).await;
    assert!(!crowded());
}

#[tokio::test(start_paused = true)]
async fn slow_calls_count_and_so_do_openings() {
    let slow = Settings::new().slow_calls(Duration::from_secs(1), 0.5);
    let registry = Registry::builder("slow")
        .settings(slow)
        .max_keys(1)
        .build()
        .unwrap();
    let permit = registry.try_acquire("a").unwrap();
    advance(Duration::from_secs(1)).await;
    permit.record(Verdict::Success);
    let crowded = |registry: &Registry| registry.get_or_create("b").is(registry.overflow());
    assert!(crowded(&registry));

    let growing = Settings::new()
        .reset_timeout(Duration::from_secs(5))
        .reopen_backoff(crate::ReopenBackoff::new(2.0));
    let registry = Registry::builder("flaps")
        .settings(growing)
        .max_keys(1)
        .build()
        .unwrap();
    registry.get_or_create("a").trip(None).unwrap();
    registry.get("a").unwrap().close().unwrap();
    // The lookup was a use, which the hand has to see first.
    assert!(crowded(&registry));
    assert!(crowded(&registry));
    advance(Duration::from_secs(5)).await;
    assert!(crowded(&registry), "used twice: not before ten seconds");
    advance(Duration::from_secs(5)).await;
    assert!(!crowded(&registry));
}

#[tokio::test(start_paused = true)]
async fn a_second_use_earns_it_a_while() {
    let registry = registry(1);
    succeed(&registry, "a");
    succeed(&registry, "a");
    let crowded = || registry.get_or_create("b").is(registry.overflow());
    assert!(crowded(), "used since the hand came by");
    advance(Duration::from_secs(9)).await;
    assert!(crowded());
    advance(Duration::from_secs(1)).await;
    assert!(!crowded());
}

#[test]
fn events_of_all_outside_of_every_lock() {
    let heard: Arc<Mutex<Vec<(String, Event)>>> = Arc::default();
    let registry_in_listener: Arc<Mutex<Option<Registry>>> = Arc::default();
    let (log, inner) = (Arc::clone(&heard), Arc::clone(&registry_in_listener));
    let registry = Registry::builder("told")
        .max_keys(2)
        .settings(Settings::new().consecutive_failures(1))
        .on_event(move |name, event| {
            log.lock().unwrap().push((name.to_owned(), *event));
            let registry = inner.lock().unwrap().clone();
            // Would wait for ever, were one of its locks held.
            if let Some(registry) = registry {
                let _ = registry.get_or_create(name).state();
                let _ = registry.statuses();
            }
        })
        .build()
        .unwrap();
    *registry_in_listener.lock().unwrap() = Some(registry.clone());
    fail(&registry, "a");
    registry.try_acquire("a").unwrap_err();
    registry.get("a").unwrap().half_open().unwrap();
    registry.try_acquire("a").unwrap().record(Verdict::Success);
    let heard: Vec<_> = heard
        .lock()
        .unwrap()
        .iter()
        .map(|(name, event)| {
            let what = match event {
                Event::StateChange(change) => change.to.as_str(),
                Event::Call => "call",
                Event::Success { .. } => "success",
                Event::Failure { .. } => "failure",
                Event::Rejected(_) => "rejected",
                _ => "?",
            };
            format!("{name} {what}")
        })
        .collect();
    assert_eq!(
        heard,
        [
            "a call",
            "a open",
            "a failure",
            "a rejected",
            "a half_open",
            "a call",
            "a closed",
            "a success"
        ]
    );
    // A circle of its own making.
    registry_in_listener.lock().unwrap().take();
}

#[tokio::test(start_paused = true)]
async fn one_probe_when_the_wait_is_over() {
    let registry = Registry::builder("probes")
        .settings(Settings::aggressive())
        .build()
        .unwrap();
    (0..3).for_each(|_| fail(&registry, "a"));
    let wait = registry.try_acquire("a").unwrap_err().retry_after();
    assert!(wait.unwrap() <= Duration::from_secs(10));
    advance(Duration::from_secs(10)).await;
    let probe = registry.try_acquire("a").unwrap();
    assert!(probe.is_probe());
    let refused = registry.try_acquire("a").unwrap_err();
    assert_eq!(refused.reason(), Reason::HalfOpen);
    probe.record(Verdict::Success);
    assert_eq!(state(&registry, "a"), Some(State::Closed));
}

/// Whoever looks on may be the one who notices that a half-open is overdue:
/// that is told, and not under a lock.
#[tokio::test(start_paused = true)]
async fn to_look_on_may_change_a_state() {
    let this: Arc<Mutex<Option<Registry>>> = Arc::default();
    let told = Arc::new(AtomicUsize::new(0));
    let (inner, count) = (Arc::clone(&this), Arc::clone(&told));
    let registry = Registry::builder("watched")
        .on_event(move |name, _| {
            let registry = inner.lock().unwrap().clone().unwrap();
            let _ = registry.get(name);
            count.fetch_add(1, SeqCst);
        })
        .build()
        .unwrap();
    *this.lock().unwrap() = Some(registry.clone());
    let looks: [fn(&Registry); 3] = [
        |registry| assert_eq!(registry.health_summary().open, 1),
        |registry| assert_eq!(registry.health(), Health::UNHEALTHY),
        |registry| assert_eq!(registry.statuses()[0].1.state, State::Open),
    ];
    for look in looks {
        let breaker = registry.get_or_create("a");
        breaker.trip(None).unwrap();
        breaker.half_open().unwrap();
        advance(Duration::from_secs(30)).await;
        let before = told.load(SeqCst);
        look(&registry);
        assert_eq!(told.load(SeqCst), before + 1);
        breaker.reset();
    }
    this.lock().unwrap().take();
}

#[test]
fn names_that_clients_choose_are_not_shown() {
    let names: Arc<Mutex<Vec<String>>> = Arc::default();
    let build = |name_keys: Option<bool>| {
        let log = Arc::clone(&names);
        let builder = Registry::builder("reg").on_event(move |name, event| {
            if matches!(event, Event::Call) {
                log.lock().unwrap().push(name.to_owned());
            }
        });
        match name_keys {
            Some(name_keys) => builder.name_keys(name_keys),
            None => builder,
        }
        .build()
        .unwrap()
    };
    let shown = |registry: &Registry, by_key: &Key| {
        registry
            .try_acquire("given")
            .unwrap()
            .record(Verdict::Success);
        registry
            .try_acquire(by_key)
            .unwrap()
            .record(Verdict::Success);
        mem::take(&mut *names.lock().unwrap())
    };
    let key = Key::from(7_u64);
    let registry = build(None);
    assert_eq!(shown(&registry, &key), ["given", "reg"]);
    let labels = |registry: &Registry| {
        let all = registry.statuses().into_iter();
        all.map(|(name, _)| name.to_string()).collect::<Vec<_>>()
    };
    // Here they are told apart all the same.
    assert_eq!(labels(&registry), ["7", "given"]);
    assert_eq!(shown(&build(Some(true)), &key), ["given", "7"]);
    assert_eq!(shown(&build(Some(false)), &key), ["reg", "reg"]);
    // What may not be told is not told, whatever was asked for.
    let secret = key::header("x-api-key").key("s3cret");
    let registry = build(Some(true));
    assert_eq!(shown(&registry, &secret), ["given", "reg"]);
    let label = &labels(&registry)[1];
    assert!(label.starts_with("header#") && label.len() == 19, "{label}");
    registry.get(&secret).unwrap().force_open();
    let refused = registry.try_acquire(&secret).unwrap_err();
    assert_eq!(refused.name().as_deref(), Some("reg"));
}

#[test]
fn health_all_in_all() {
    let registry = registry(10);
    assert_eq!(HealthSource::name(&registry), "test");
    assert_eq!(registry.health(), Health::HEALTHY);
    let off = registry.get_or_create("off");
    off.force_closed();
    assert_eq!(registry.health(), Health::DISABLED);
    assert_eq!(registry.health_summary().least(), Health::DISABLED);

    let _ = registry.get_or_create("closed");
    registry.get_or_create("watched").metrics_only();
    let half = registry.get_or_create("half");
    half.trip(None).unwrap();
    half.half_open().unwrap();
    let summary = registry.health_summary();
    assert_eq!(
        (summary.closed, summary.half_open, summary.total()),
        (1, 1, 4)
    );
    assert_eq!(summary.least().score(), Some(0.5));
    registry.get_or_create("forced").force_open();
    registry.get_or_create("open").trip(None).unwrap();
    let summary = registry.health_summary();
    assert_eq!(
        summary,
        HealthSummary {
            closed: 1,
            open: 1,
            half_open: 1,
            forced_open: 1,
            forced_closed: 1,
            metrics_only: 1,
        }
    );
    assert_eq!(summary.least(), Health::UNHEALTHY);
    assert_eq!(summary.mean().score(), Some(0.5));
    assert_eq!(registry.health(), summary.mean());
    assert!(!HealthSource::critical(&registry));

    let critical = Registry::builder("c").critical(true).build().unwrap();
    critical.get_or_create("open").trip(None).unwrap();
    let _ = critical.get_or_create("closed");
    assert_eq!(critical.health(), Health::UNHEALTHY);
    assert!(HealthSource::critical(&critical));

    registry.reset_all();
    let summary = registry.health_summary();
    assert_eq!((summary.closed, summary.total()), (6, 6));
}

#[test]
fn threads_that_ask_at_once_are_given_one() {
    const THREADS: usize = 8;
    let made = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&made);
    let registry = Registry::builder("raced")
        .max_keys(500)
        .settings_for(move |_| {
            counted.fetch_add(1, SeqCst);
            None
        })
        .build()
        .unwrap();
    let barrier = Barrier::new(THREADS);
    let all: Vec<Vec<Breaker>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    (0..200)
                        .map(|n| {
                            barrier.wait();
                            registry.get_or_create(&format!("key-{n}"))
                        })
                        .collect()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for n in 0..200 {
        assert!(all.iter().all(|one| one[n].is(&all[0][n])), "{n}");
        assert!(!all[0][n].is(registry.overflow()));
    }
    assert_eq!(registry.len(), 200);
    assert!(made.load(SeqCst) >= 200);
}

#[test]
fn many_threads_never_exceed_the_bound_nor_meet_anothers_breaker() {
    let registry = Registry::builder("storm")
        .settings(Settings::new().consecutive_failures(1))
        .max_keys(64)
        .build()
        .unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|thread| {
                let registry = &registry;
                scope.spawn(move || {
                    for n in 0..20_000_u32 {
                        let name = format!("{thread}-{}", n % 500);
                        let permit = registry.try_acquire(&name);
                        if n % 7 == 0 {
                            registry.remove(&format!("{thread}-{}", (n + 250) % 500));
                        }
                        if let Ok(permit) = permit {
                            permit.record(Verdict::Success);
                        }
                        // Did a failure reach another key's breaker, that would
                        // open.
                        if n % 100 == 0 {
                            let own = format!("dead-{thread}-{}", n / 100 % 8);
                            if let Ok(permit) = registry.try_acquire(&own) {
                                permit.record(Verdict::Failure);
                            }
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                assert!(registry.len() <= 64);
                // All at one moment: whoever holds one waits for no other.
                let all: Vec<_> = registry.0.shards.iter().map(|shard| shard.lock()).collect();
                let there: usize = all.iter().map(|shard| shard.entries().len()).sum();
                drop(all);
                assert!(there <= 64, "{there}");
                thread::yield_now();
            }
        });
        let results: Vec<_> = workers
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .collect();
        stop.store(true, SeqCst);
        results.into_iter().for_each(|result| result.unwrap());
    });
    for (name, breaker) in registry.handles() {
        let dead = name.starts_with("dead-");
        assert_eq!(breaker.state() == State::Open, dead, "{name}");
    }
    assert!(registry.evicted() > 1000);
    assert_eq!(registry.len(), registry.handles().len());
}

#[test]
fn a_panic_in_the_users_settings_takes_no_room() {
    let registry = Registry::builder("panics")
        .max_keys(1)
        .settings_for(|name| {
            assert_ne!(name, "bad");
            None
        })
        .build()
        .unwrap();
    for _ in 0..3 {
        let bad = std::panic::AssertUnwindSafe(|| registry.get_or_create("bad"));
        assert!(std::panic::catch_unwind(bad).is_err());
    }
    assert_eq!(registry.len(), 0);
    assert!(!registry.get_or_create("good").is(registry.overflow()));
}

#[test]
fn equal_hashes_are_not_equal_keys() {
    let registry = registry(4);
    let one = registry.get_or_create("one");
    // Another key under the same 48 bits.
    let id = Key::from("one");
    let id = registry.0.id(Probe::of(&id));
    let other = Key::from("other");
    let shard = registry.0.shard(id);
    assert!(shard.lock().find(id, Probe::of(&other)).is_none());
    assert!(shard.lock().remove(id, Probe::of(&other)).is_none());
    let (entry, _) = registry.0.make(id, other, true);
    let refused = shard.lock().add(entry);
    assert!(matches!(refused, Err((Refused::Collides, _))));
    assert!(one.is(&registry.get("one").unwrap()));
}

#[cfg(feature = "metrics")]
#[test]
fn metrics_of_keys_that_clients_choose_are_of_bounded_number() {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let series = || {
        let all = snapshotter.snapshot().into_vec().into_iter();
        all.map(|(key, _, _, value)| {
            let labels: Vec<_> = key.key().labels().map(|l| l.value().to_owned()).collect();
            (format!("{} {}", key.key().name(), labels.join(" ")), value)
        })
        .collect::<BTreeMap<_, _>>()
    };
    metrics::with_local_recorder(&recorder, || {
        let registry = Registry::builder("reg").max_keys(50).build().unwrap();
        for n in 0..1000_u64 {
            let permit = registry.try_acquire(&Key::from(n)).unwrap();
            permit.record(Verdict::Success);
        }
        let all = series();
        let success = "circuit_breaker_requests_total reg success";
        assert_eq!(all[success], DebugValue::Counter(1000));
        assert!(all.len() < 20, "{all:?}");

        // The gauge is of the worst.
        let gauge = || match series()["circuit_breaker_state reg"] {
            DebugValue::Gauge(value) => value.0,
            _ => unreachable!(),
        };
        let breaker = |n: u64| registry.get_or_create(&Key::from(n));
        assert_eq!(gauge(), 0.0);
        breaker(1).trip(None).unwrap();
        breaker(2).trip(None).unwrap();
        let _ = breaker(3);
        assert_eq!(gauge(), 2.0);
        breaker(1).close().unwrap();
        breaker(2).half_open().unwrap();
        assert_eq!(gauge(), 1.0);
        breaker(1).force_open();
        assert_eq!(gauge(), 2.0);
        // Gone with the last handle.
        assert!(registry.remove(&Key::from(1_u64)));
        assert_eq!(gauge(), 1.0);
        breaker(2).reset();
        assert_eq!(gauge(), 0.0);
        breaker(2).force_open();
        drop(registry);
        assert_eq!(gauge(), 0.0);
    });
}

// ---- Any schedule, against a model that only knows what must not happen.

#[derive(Clone, Debug)]
enum Step {
    Ask(u8),
    Succeed(u8),
    Fail(u8),
    Force(u8, State),
    Reset(u8),
    Remove(u8),
    Hold(u8),
    LetGo,
    Begin(u8),
    End(bool),
    Wait(u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = || 0..24_u8;
    let forced = prop_oneof![
        Just(State::ForcedOpen),
        Just(State::ForcedClosed),
        Just(State::MetricsOnly),
        Just(State::Open),
    ];
    let step = prop_oneof![
        3 => key().prop_map(Step::Ask),
        4 => key().prop_map(Step::Succeed),
        4 => key().prop_map(Step::Fail),
        1 => (key(), forced).prop_map(|(key, state)| Step::Force(key, state)),
        1 => key().prop_map(Step::Reset),
        1 => key().prop_map(Step::Remove),
        1 => key().prop_map(Step::Hold),
        1 => Just(Step::LetGo),
        1 => key().prop_map(Step::Begin),
        1 => any::<bool>().prop_map(Step::End),
        1 => (0..90_u16).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 1..150)
}

/// What the model knows of a key that has a breaker of its own.
#[derive(Clone, Debug, Default)]
struct Known {
    forced: Option<State>,
    failures: u32,
    open: bool,
    /// When it was last asked for, in seconds.
    asked: u64,
    /// Its own, and another with each change.
    generation: u64,
}

fn run(max_keys: usize, schedule: Vec<Step>) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        // Open for longer than any schedule, so that the model needs no probes.
        let registry = Registry::builder("model")
            .settings(
                Settings::new()
                    .consecutive_failures(3)
                    .reset_timeout(Duration::from_secs(100_000)),
            )
            .max_keys(max_keys)
            .build()
            .unwrap();
        let overflow = registry.overflow();
        let mut model: BTreeMap<u8, Known> = BTreeMap::new();
        let mut held: Vec<(u8, Breaker)> = Vec::new();
        let mut flying: Vec<(u8, u64, Permit)> = Vec::new();
        let mut generations = 1..;
        let mut generation = move || generations.next().unwrap();
        let mut now = 0_u64;
        let name = |key: u8| format!("key-{key}");
        for step in schedule {
            // The overflow breaker is not what this is about.
            overflow.reset();
            let asked = match step {
                Step::Ask(key)
                | Step::Succeed(key)
                | Step::Fail(key)
                | Step::Force(key, _)
                | Step::Hold(key)
                | Step::Begin(key) => Some(key),
                _ => None,
            };
            let before = registry.evicted();
            let was_full = registry.len() == max_keys;
            if let Some(key) = asked {
                let known = model.contains_key(&key);
                let breaker = registry.get_or_create(&name(key));
                let own = !breaker.is(overflow);
                drop(breaker);
                if known {
                    prop_assert!(own, "{key} lost its breaker");
                    prop_assert_eq!(registry.evicted(), before);
                } else if own {
                    prop_assert_eq!(registry.evicted() - before, u64::from(was_full));
                    let known = Known {
                        generation: generation(),
                        ..Known::default()
                    };
                    model.insert(key, known);
                } else {
                    prop_assert!(was_full, "no room for {} where there was", key);
                }
                // Whoever went may have gone.
                // Looked at without a use.
                let there = registry.handles();
                let is_gone = |key: &u8| !there.iter().any(|(label, _)| **label == *name(*key));
                let gone: Vec<u8> = model.keys().copied().filter(is_gone).collect();
                drop(there);
                prop_assert_eq!(gone.len() as u64, registry.evicted() - before);
                for key in gone {
                    let known = model.remove(&key).unwrap();
                    prop_assert!(known.forced.is_none() && !known.open, "{key}: {known:?}");
                    prop_assert!(held.iter().all(|(other, _)| *other != key));
                    let unused = now - known.asked;
                    prop_assert!(known.failures == 0 || unused >= 60, "{key}: {known:?}");
                }
                let Some(known) = model.get_mut(&key) else {
                    continue;
                };
                known.asked = now;
                let free = known.forced.is_none() && !known.open;
                let permit = || registry.try_acquire(&name(key));
                match step {
                    Step::Succeed(_) => {
                        if let Ok(permit) = permit() {
                            permit.record(Verdict::Success);
                        }
                        known.failures = 0;
                    }
                    Step::Fail(_) => {
                        let permit = permit();
                        let refused = known.open || known.forced == Some(State::ForcedOpen);
                        prop_assert_eq!(permit.is_err(), refused);
                        if let Ok(permit) = permit {
                            permit.record(Verdict::Failure);
                        }
                        if free {
                            known.failures += 1;
                            if known.failures >= 3 {
                                known.open = true;
                                known.generation = generation();
                            }
                        }
                    }
                    Step::Force(_, state) => {
                        let breaker = registry.get_or_create(&name(key));
                        match state {
                            State::ForcedOpen => breaker.force_open(),
                            State::ForcedClosed => breaker.force_closed(),
                            State::MetricsOnly => breaker.metrics_only(),
                            _ => {
                                if breaker.trip(None).is_ok() {
                                    known.open = true;
                                    known.generation = generation();
                                }
                                continue;
                            }
                        }
                        known.forced = Some(state);
                        known.generation = generation();
                        known.open = false;
                        known.failures = 0;
                    }
                    Step::Hold(_) => held.push((key, registry.get_or_create(&name(key)))),
                    Step::Begin(_) => {
                        flying.extend(permit().map(|permit| (key, known.generation, permit)));
                    }
                    _ => {}
                }
            } else {
                match step {
                    Step::Reset(key) => {
                        let there = registry.reset(&name(key));
                        prop_assert_eq!(there, model.contains_key(&key));
                        if let Some(known) = model.get_mut(&key) {
                            *known = Known {
                                asked: now,
                                generation: generation(),
                                ..Known::default()
                            };
                        }
                    }
                    Step::Remove(key) => {
                        let there = registry.remove(&name(key));
                        prop_assert_eq!(there, model.remove(&key).is_some());
                        held.retain(|(other, _)| *other != key);
                    }
                    Step::LetGo => drop(held.pop()),
                    Step::End(good) => {
                        let Some((key, begun, permit)) = flying.pop() else {
                            continue;
                        };
                        permit.record(if good {
                            Verdict::Success
                        } else {
                            Verdict::Failure
                        });
                        // A late verdict is nobody's, whose cell it may be now.
                        if let Some(known) = model.get_mut(&key)
                            && known.generation == begun
                            && known.forced.is_none()
                        {
                            known.failures = if good { 0 } else { known.failures + 1 };
                            if known.failures >= 3 {
                                known.open = true;
                                known.generation = generation();
                            }
                        }
                    }
                    Step::Wait(seconds) => {
                        tokio::time::advance(Duration::from_secs(seconds.into())).await;
                        now += u64::from(seconds);
                    }
                    _ => unreachable!(),
                }
            }
            prop_assert_eq!(registry.len(), model.len());
            prop_assert!(registry.len() <= max_keys);
            for (name, status) in registry.statuses() {
                let Some(key) = name.strip_prefix("key-") else {
                    continue;
                };
                let known = &model[&key.parse::<u8>().unwrap()];
                let state = known.forced.unwrap_or(if known.open {
                    State::Open
                } else {
                    State::Closed
                });
                prop_assert_eq!(status.state, state, "{}", &name);
                if state == State::Closed {
                    prop_assert_eq!(status.failures, u64::from(known.failures), "{}", name);
                }
            }
        }
        Ok(())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn never_more_and_never_one_that_matters(max_keys in 1..20_usize, schedule in steps()) {
        run(max_keys, schedule)?;
    }
}
