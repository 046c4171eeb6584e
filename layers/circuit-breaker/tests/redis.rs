//! Breakers that are shared by a fleet.

mod fleet;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress_circuit_breaker::{
    Breaker, Cause, CircuitBreakerLayer, Event, Registry, Sharing, State,
};
use buttress_core::{classify::Verdict, clock, key::Key};
use buttress_redis::testing::Server;
use fleet::*;

#[tokio::test]
async fn one_opens_and_all_are_open() {
    let server = Server::start().await;
    let nodes = nodes(&server, 10, &opens_for(ms(60_000))).await;
    trip(&nodes[3]);
    // 2.5 ms, mostly.
    within(SOON, "open", || all(&nodes, State::Open)).await;
    for (number, node) in nodes.iter().enumerate() {
        let left = left(node);
        assert!(
            left > ms(55_000) && left <= ms(60_000),
            "{number}: {left:?}"
        );
        let opened_by = node.status().opened_by;
        assert_eq!(opened_by == Some(Cause::Remote), number != 3, "{number}");
    }
    // And all at once by hand.
    nodes[7].reset();
    within(SOON, "closed", || all(&nodes, State::Closed)).await;
}

#[tokio::test]
async fn one_probes_and_all_close() {
    let server = Server::start().await;
    let nodes = nodes(&server, 10, &opens_for(ms(300))).await;
    let opened = clock::now();
    trip(&nodes[0]);
    within(SOON, "open", || all(&nodes, State::Open)).await;

    let probing = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let probes = Arc::new(AtomicUsize::new(0));
    let callers: Vec<_> = nodes
        .iter()
        .cloned()
        .map(|node| {
            let (probing, most, probes) = (probing.clone(), most.clone(), probes.clone());
            tokio::spawn(async move {
                for _ in 0..5000 {
                    if node.state() == State::Closed {
                        return;
                    }
                    if let Ok(permit) = node.try_acquire() {
                        // What is closed meanwhile is no probe.
                        if node.state() == State::HalfOpen {
                            assert!(clock::now() - opened >= ms(300), "too early");
                            probes.fetch_add(1, SeqCst);
                            let now = probing.fetch_add(1, SeqCst) + 1;
                            most.fetch_max(now, SeqCst);
                            tokio::time::sleep(ms(300)).await;
                            probing.fetch_sub(1, SeqCst);
                        }
                        permit.record(Verdict::Success);
                    }
                    tokio::time::sleep(ms(2)).await;
                }
                panic!("it never closed");
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    assert_eq!(most.load(SeqCst), 1);
    assert_eq!(probes.load(SeqCst), 1);
    assert!(all(&nodes, State::Closed));
}

#[tokio::test]
async fn a_failed_probe_keeps_all_open() {
    let server = Server::start().await;
    let nodes = nodes(&server, 3, &opens_for(ms(400))).await;
    trip(&nodes[0]);
    within(SOON, "open", || all(&nodes, State::Open)).await;
    let before: Vec<_> = nodes
        .iter()
        .map(|node| node.fleet().unwrap().version)
        .collect();
    within(3 * SOON, "a failed probe", || {
        nodes.iter().any(|node| {
            fail(node);
            let cause = node.status().opened_by;
            cause == Some(Cause::ProbeFailed)
        })
    })
    .await;
    // Known to all, with the new wait.
    within(SOON, "open again", || {
        let mut versions = nodes.iter().map(|node| node.fleet().unwrap().version);
        all(&nodes, State::Open)
            && versions.all(|version| version > before[0])
            && nodes.iter().all(|node| left(node) > ms(200))
    })
    .await;
}

/// A prober that is gone, or does nothing, blocks nobody for long.
#[tokio::test]
async fn leave_expires() {
    let server = Server::start().await;
    let nodes = nodes(&server, 2, &opens_for(ms(300))).await;
    trip(&nodes[0]);
    within(SOON, "open", || all(&nodes, State::Open)).await;
    let probe = Mutex::new(None);
    within(3 * SOON, "a probe", || {
        let permit = nodes[0].try_acquire().ok();
        *probe.lock().unwrap() = permit;
        nodes[0].state() == State::HalfOpen
    })
    .await;
    // It probes for longer than any lease, and keeps its leave.
    let held = clock::now();
    while clock::now() - held < ms(3_800) {
        assert!(nodes[1].try_acquire().is_err());
        tokio::time::sleep(ms(5)).await;
    }
    // Its process is gone.
    let [gone, other] = <[Breaker; 2]>::try_from(nodes).unwrap();
    drop(gone);
    within(6 * SOON, "the other's turn", || succeed(&other)).await;
    assert_eq!(other.state(), State::Closed);
}

#[tokio::test]
async fn who_comes_later_is_told() {
    let server = Server::start().await;
    let first = node(&server, "shared", opens_for(ms(60_000))).await;
    trip(&first);
    within(SOON, "told", || !first.fleet().unwrap().pending).await;
    let second = node(&server, "shared", opens_for(ms(60_000))).await;
    within(SOON, "open", || second.state() == State::Open).await;
    let other = node(&server, "other", opens_for(ms(60_000))).await;
    assert_eq!(other.state(), State::Closed);
    // Another fleet is another.
    let sharing = Sharing::new(&server.redis()).fleet("staging");
    let stranger = joined(node_of(sharing, "shared", opens_for(ms(60_000)))).await;
    tokio::time::sleep(ms(50)).await;
    assert_eq!(stranger.state(), State::Closed);
}

#[tokio::test]
async fn what_is_done_by_hand_is_done_for_all() {
    let server = Server::start().await;
    let nodes = nodes(&server, 3, &opens_for(ms(60_000))).await;
    let is = async |state, what| within(SOON, what, || all(&nodes, state)).await;
    nodes[0].force_open();
    is(State::ForcedOpen, "forced open").await;
    let late = node(&server, "shared", opens_for(ms(60_000))).await;
    within(SOON, "late", || late.state() == State::ForcedOpen).await;
    nodes[1].force_closed();
    is(State::ForcedClosed, "forced closed").await;
    nodes[2].metrics_only();
    is(State::MetricsOnly, "metrics only").await;
    nodes[0].reset();
    is(State::Closed, "reset").await;
    nodes[1].trip(ms(30_000)).unwrap();
    is(State::Open, "tripped").await;
    assert!(left(&nodes[2]) <= ms(30_000));
    nodes[2].close().unwrap();
    is(State::Closed, "closed").await;
    // One that is closed is reset, and so is who is not.
    nodes[0].trip(ms(30_000)).unwrap();
    is(State::Open, "tripped again").await;
    nodes[1].half_open().unwrap();
    within(SOON, "leave", || nodes[1].fleet().unwrap().leave).await;
    assert!(succeed(&nodes[1]));
    is(State::Closed, "probed").await;
}

#[tokio::test]
async fn what_is_done_by_hand_may_stay_at_home() {
    let server = Server::start().await;
    let member = || Sharing::new(&server.redis()).by_hand(false);
    let one = joined(node_of(member(), "shared", opens_for(ms(60_000)))).await;
    let two = joined(node_of(member(), "shared", opens_for(ms(60_000)))).await;
    one.force_closed();
    trip(&two);
    within(SOON, "told", || !two.fleet().unwrap().pending).await;
    tokio::time::sleep(ms(100)).await;
    assert_eq!(one.state(), State::ForcedClosed);
    assert_eq!(two.state(), State::Open);
    // Back in the fleet, it is as the fleet is.
    one.reset();
    within(SOON, "followed", || one.state() == State::Open).await;
    two.force_open();
    tokio::time::sleep(ms(100)).await;
    assert_eq!(one.state(), State::Open);
}

/// It stayed forced for ever.
#[tokio::test]
async fn an_override_of_the_fleet_ends_where_none_is_shared() {
    let server = Server::start().await;
    let one = node(&server, "shared", opens_for(ms(60_000))).await;
    let member = Sharing::new(&server.redis()).by_hand(false);
    let two = joined(node_of(member, "shared", opens_for(ms(60_000)))).await;
    one.force_open();
    within(SOON, "forced", || two.state() == State::ForcedOpen).await;
    one.reset();
    within(SOON, "closed", || two.state() == State::Closed).await;
    // Its own stays.
    two.force_closed();
    trip(&one);
    tokio::time::sleep(ms(100)).await;
    assert_eq!(two.state(), State::ForcedClosed);
}

/// Two of one name in a process had two votes, and opened it for all.
#[tokio::test]
async fn a_process_has_one_vote() {
    let server = Server::start().await;
    let redis = server.redis();
    let twin = || Sharing::new(&redis).quorum(2);
    let one = joined(node_of(twin(), "shared", opens_for(ms(60_000)))).await;
    let two = joined(node_of(twin(), "shared", opens_for(ms(60_000)))).await;
    let other = Sharing::new(&server.redis()).quorum(2);
    let other = joined(node_of(other, "shared", opens_for(ms(60_000)))).await;
    for breaker in [&one, &two] {
        trip(breaker);
        within(SOON, "voted", || !breaker.fleet().unwrap().pending).await;
    }
    tokio::time::sleep(ms(100)).await;
    assert_eq!(other.state(), State::Closed);
    trip(&other);
    within(SOON, "open for all", || !other.fleet().unwrap().closed).await;
}

/// The first to be well again took the votes of all, and closed them.
#[tokio::test]
async fn a_vote_taken_back_is_one_vote() {
    let server = Server::start().await;
    let mut nodes = Vec::new();
    for wait in [60_000, 200] {
        let sharing = Sharing::new(&server.redis()).quorum(3);
        nodes.push(joined(node_of(sharing, "shared", opens_for(ms(wait)))).await);
    }
    for node in &nodes {
        trip(node);
        within(SOON, "voted", || !node.fleet().unwrap().pending).await;
    }
    within(5 * SOON, "well again", || {
        succeed(&nodes[1]);
        nodes[1].state() == State::Closed && !nodes[1].fleet().unwrap().pending
    })
    .await;
    tokio::time::sleep(ms(100)).await;
    assert_eq!(nodes[0].state(), State::Open);
    // Its vote counts yet.
    let sharing = Sharing::new(&server.redis()).quorum(3);
    nodes.push(joined(node_of(sharing, "shared", opens_for(ms(60_000)))).await);
    trip(&nodes[1]);
    trip(&nodes[2]);
    let fleets = || nodes.iter().all(|node| !node.fleet().unwrap().closed);
    within(SOON, "open for all", fleets).await;
}

#[tokio::test]
async fn a_quorum_of_two_outvotes_one() {
    let server = Server::start().await;
    let mut nodes = Vec::new();
    for _ in 0..3 {
        let sharing = Sharing::new(&server.redis()).quorum(2);
        nodes.push(joined(node_of(sharing, "shared", opens_for(ms(1_000)))).await);
    }
    // One whose network is bad: again and again, and alone.
    let began = clock::now();
    let mut opened = 0;
    while clock::now() - began < ms(3_500) {
        if nodes[0].state() == State::Closed {
            trip(&nodes[0]);
            opened += 1;
        }
        fail(&nodes[0]);
        assert!(succeed(&nodes[1]) && succeed(&nodes[2]), "open for all");
        tokio::time::sleep(ms(5)).await;
    }
    assert!(opened >= 1);
    assert_eq!(
        nodes[0].status().opened_by,
        Some(Cause::ProbeFailed),
        "it probed alone"
    );
    // A second one agrees.
    within(2 * SOON, "the bad one is open", || {
        fail(&nodes[0]);
        nodes[0].state() == State::Open && left(&nodes[0]) > ms(500)
    })
    .await;
    trip(&nodes[1]);
    within(SOON, "open for all", || nodes[2].state() == State::Open).await;
    // All is well but for the bad one: its probes do not keep the others out.
    within(8 * SOON, "closed for the good", || {
        fail(&nodes[0]);
        succeed(&nodes[1]) & succeed(&nodes[2])
    })
    .await;
}

#[tokio::test]
async fn breakers_of_a_registry_are_shared_by_key() {
    let server = Server::start().await;
    let registry = || {
        Registry::builder("upstreams")
            .settings(opens_for(ms(60_000)))
            .redis(server.redis())
            .build()
            .unwrap()
    };
    let (one, two) = (registry(), registry());
    let here = one.get_or_create("a");
    let there = two.get_or_create("a");
    joined(here.clone()).await;
    joined(there.clone()).await;
    trip(&here);
    within(SOON, "open", || there.state() == State::Open).await;
    assert_eq!(two.get_or_create("b").state(), State::Closed);
    // Made after it had opened elsewhere.
    let secret = Key::from_bytes(b"a secret");
    trip(&one.get_or_create(&secret));
    trip(&one.get_or_create("c"));
    within(SOON, "told", || {
        ["c"]
            .iter()
            .all(|name| !one.get_or_create(*name).fleet().unwrap().pending)
    })
    .await;
    let redis = server.redis();
    within(SOON, "open", || {
        two.get_or_create("c").state() == State::Open
    })
    .await;
    within(SOON, "open", || {
        two.get_or_create(&secret).state() == State::Open
    })
    .await;
    let keys: Vec<String> = run(&redis, &["KEYS", "*breaker*"]).await;
    assert_eq!(keys.len(), 4, "{keys:?}");
    for key in &keys {
        assert!(
            key.starts_with("buttress:circuit-breaker:{default}"),
            "{key}"
        );
        assert!(!key.contains("secret"), "{key}");
        let ttl: i64 = run(&redis, &["PTTL", key]).await;
        assert!(ttl > 0 && ttl < 3 * 3600 * 1000, "{key}: {ttl}");
    }
}

/// Neither a call nor a new key costs a command where all is closed.
#[tokio::test]
async fn calls_and_new_keys_cost_nothing() {
    let server = Server::start().await;
    let registry = Registry::builder("upstreams")
        .redis(Sharing::new(&server.redis()).pull(Duration::from_secs(3600)))
        .build()
        .unwrap();
    joined(registry.get_or_create("first")).await;
    let redis = server.redis();
    let count = async || {
        let stats: String = run(&redis, &["INFO", "commandstats"]).await;
        let line = stats
            .lines()
            .find(|line| line.starts_with("cmdstat_evalsha:"));
        line.map(|line| line.split([':', '=', ',']).nth(2).unwrap().to_owned())
    };
    let before = count().await;
    for number in 0..500_u64 {
        let breaker = registry.get_or_create(&Key::from(number));
        assert!(succeed(&breaker));
        fail(&breaker);
        assert!(succeed(&breaker));
    }
    tokio::time::sleep(ms(100)).await;
    assert_eq!(count().await, before);
}

#[tokio::test]
async fn one_line_shares_a_layer() {
    use tower::{Layer, ServiceExt, service_fn};
    let server = Server::start().await;
    let layer = || {
        CircuitBreakerLayer::builder()
            .name("inventory")
            .settings(opens_for(ms(60_000)))
            .redis(server.redis())
            .build()
            .unwrap()
    };
    let (one, two) = (layer(), layer());
    joined(one.breaker().clone()).await;
    joined(two.breaker().clone()).await;
    let service = one.layer(service_fn(|_: http::Request<String>| async {
        let mut response = http::Response::new(String::new());
        *response.status_mut() = http::StatusCode::BAD_GATEWAY;
        Ok::<_, std::convert::Infallible>(response)
    }));
    for _ in 0..2 {
        service
            .clone()
            .oneshot(http::Request::default())
            .await
            .unwrap();
    }
    within(SOON, "open", || two.breaker().state() == State::Open).await;
}

/// Built outside of a runtime, it joins where its first service is made; and
/// again in another, where that ends.
#[test]
fn a_runtime_may_come_and_go() {
    use tower::Layer;
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let home = runtime();
    let server = home.block_on(Server::start());
    let layer = CircuitBreakerLayer::<buttress_core::Any<u8>, _, _>::any()
        .name("shared")
        .settings(opens_for(ms(200)))
        .redis(server.redis())
        .build()
        .unwrap();
    let breaker = layer.breaker().clone();
    assert!(!breaker.fleet().unwrap().up);
    for _ in 0..2 {
        let runtime = runtime();
        runtime.block_on(async {
            drop(layer.layer(()));
            joined(breaker.clone()).await;
        });
        drop(runtime);
        assert!(!breaker.fleet().unwrap().up, "nobody is there");
        // Alone, it is a breaker like any other.
        trip(&breaker);
        std::thread::park_timeout(ms(220));
        assert!(succeed(&breaker));
        assert_eq!(breaker.state(), State::Closed);
    }
    // What has happened alone is told.
    trip(&breaker);
    home.block_on(async {
        drop(layer.layer(()));
        let other = node(&server, "shared", opens_for(ms(200))).await;
        within(SOON, "open", || other.state() == State::Open).await;
    });
}

/// The task of a second runtime kept nothing alive: it took the alarms of the
/// first for its own.
#[test]
fn leave_is_renewed_in_another_runtime() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let home = runtime();
    let server = home.block_on(Server::start());
    let breaker = home.block_on(async {
        let breaker = node(&server, "shared", opens_for(ms(700))).await;
        trip(&breaker);
        within(SOON, "told", || !breaker.fleet().unwrap().pending).await;
        tokio::time::sleep(ms(50)).await;
        breaker
    });
    drop(home);
    let home = runtime();
    let _permit = home.block_on(async {
        let probe = loop {
            match breaker.try_acquire() {
                Ok(probe) => break probe,
                Err(_) => tokio::time::sleep(ms(5)).await,
            }
        };
        joined(breaker.clone()).await;
        let version = || breaker.fleet().unwrap().version;
        let first = version();
        within(5 * SOON, "renewed", || version() > first).await;
        let second = version();
        within(5 * SOON, "renewed again", || version() > second).await;
        probe
    });
    assert_eq!(breaker.state(), State::HalfOpen);
}

/// With the last handle the task ends, and its connections.
#[tokio::test]
async fn the_last_handle_ends_it() {
    let server = Server::start().await;
    let redis = server.redis();
    let subscribers = async || {
        let clients: String = run(&redis, &["CLIENT", "LIST", "TYPE", "pubsub"]).await;
        clients.lines().filter(|line| !line.is_empty()).count()
    };
    let sharing = Sharing::new(&redis);
    let one = joined(node_of(sharing.clone(), "one", opens_for(ms(200)))).await;
    let two = joined(node_of(sharing.clone(), "two", opens_for(ms(200)))).await;
    tokio::time::sleep(ms(100)).await;
    assert_eq!(subscribers().await, 1, "one task for both");
    drop((one, two, sharing));
    for _ in 0..200 {
        if subscribers().await == 0 {
            return;
        }
        tokio::time::sleep(ms(10)).await;
    }
    panic!("it listens still");
}

/// Events say whose doing it was; and nobody echoes: a change is one change.
#[tokio::test]
async fn each_change_is_told_once() {
    let server = Server::start().await;
    let heard = Arc::new(Mutex::new(Vec::new()));
    let mut nodes = Vec::new();
    for number in 0..4 {
        let heard = Arc::clone(&heard);
        let breaker = Breaker::builder("shared")
            .settings(opens_for(ms(60_000)))
            .on_event(move |_, event| {
                if let Event::StateChange(change) = event {
                    heard
                        .lock()
                        .unwrap()
                        .push((number, change.to, change.cause));
                }
            })
            .redis(server.redis())
            .build()
            .unwrap();
        nodes.push(joined(breaker).await);
    }
    trip(&nodes[0]);
    within(SOON, "open", || all(&nodes, State::Open)).await;
    nodes[1].close().unwrap();
    within(SOON, "closed", || all(&nodes, State::Closed)).await;
    tokio::time::sleep(ms(300)).await;
    let mut heard = heard.lock().unwrap().clone();
    heard.sort_by_key(|(number, ..)| *number);
    let remote = |number| {
        [
            (number, State::Open, Cause::Remote),
            (number, State::Closed, Cause::Remote),
        ]
    };
    let rule = Cause::Rule(buttress_circuit_breaker::Rule::ConsecutiveFailures);
    let mut all = vec![
        (0, State::Open, rule),
        (0, State::Closed, Cause::Remote),
        (1, State::Open, Cause::Remote),
        (1, State::Closed, Cause::Manual),
    ];
    all.extend(remote(2));
    all.extend(remote(3));
    assert_eq!(heard, all);
    let redis = server.redis();
    let versions: u64 = run(&redis, &["ZCARD", "buttress:circuit-breaker:{default}"]).await;
    // One record, and when it was begun.
    assert_eq!(versions, 2);
}

#[cfg(feature = "metrics")]
#[tokio::test]
async fn what_is_told_and_heard_is_counted() {
    use std::collections::HashMap;

    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    let server = Server::start().await;
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let counted = {
        let _here = metrics::set_default_local_recorder(&recorder);
        let sharing = Sharing::new(&server.redis())
            .fleet("counted")
            .pull(ms(60_000));
        node_of(sharing, "shared", opens_for(ms(60_000)))
    };
    let counted = joined(counted).await;
    let sharing = Sharing::new(&server.redis()).fleet("counted");
    let other = joined(node_of(sharing, "shared", opens_for(ms(60_000)))).await;
    trip(&counted);
    within(SOON, "open", || other.state() == State::Open).await;
    other.close().unwrap();
    within(SOON, "closed", || counted.state() == State::Closed).await;
    let values: HashMap<String, DebugValue> = snapshotter
        .snapshot()
        .into_vec()
        .into_iter()
        .filter(|(key, ..)| key.key().name().starts_with("circuit_breaker_fleet"))
        .map(|(key, _, _, value)| {
            let labels = key.key().labels().map(|label| label.value().to_owned());
            let labels: Vec<_> = labels.collect();
            (format!("{} {}", key.key().name(), labels.join(" ")), value)
        })
        .collect();
    let counter = |name: &str| match values[name] {
        DebugValue::Counter(count) => count,
        _ => panic!("{name} is no counter"),
    };
    assert_eq!(
        counter("circuit_breaker_fleet_changes_total counted took"),
        1
    );
    assert_eq!(
        counter("circuit_breaker_fleet_changes_total counted failed"),
        0
    );
    let heard = counter("circuit_breaker_fleet_news_total counted message")
        + counter("circuit_breaker_fleet_news_total counted pull");
    assert!(heard >= 2, "{heard}");
    let up = &values["circuit_breaker_fleet_up counted"];
    assert_eq!(*up, DebugValue::Gauge(1.0.into()));
}

#[test]
fn what_makes_no_sense_is_named() {
    let redis = buttress_redis::Redis::from_url("redis://127.0.0.1:1").unwrap();
    let error = |sharing: Sharing| {
        let breaker = Breaker::builder("x").redis(sharing.clone()).build();
        let registry = Registry::builder("x").redis(sharing).build();
        let error = breaker.unwrap_err();
        assert_eq!(registry.unwrap_err(), error);
        error.to_string()
    };
    let new = || Sharing::new(&redis);
    assert!(error(new().quorum(0)).contains("quorum"));
    assert!(error(new().pull(ms(99))).contains("pull"));
    assert!(error(new().fleet("")).contains("fleet"));
}
