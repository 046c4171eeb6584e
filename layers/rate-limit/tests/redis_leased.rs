//! Leased limits on a real Redis: many nodes, each with a connection of its
//! own, as many processes have.

use std::time::Duration;

use buttress_core::{clock, key::Key};
use buttress_rate_limit::{
    Limit, Quota, RateLimitLayer,
    redis::{FleetHandle, FleetLayer, Lease, Mode, OnStoreError},
};
use buttress_redis::{
    Cmd, Config, Redis,
    testing::{Server, Wire},
};
use tokio::{task::JoinSet, time::sleep};

const SHARE: u32 = 50;
/// So long that no token comes back by time while a test runs.
const DAYS: Duration = Duration::from_secs(10 * 24 * 60 * 60);
/// A share and a quarter: what one node holds at most.
const HELD: u64 = 63;

fn node(server: &Server, quota: Quota) -> FleetLayer {
    node_on(&server.redis(), quota, OnStoreError::Local)
}

fn node_on(redis: &Redis, quota: Quota, on_error: OnStoreError) -> FleetLayer {
    RateLimitLayer::builder()
        .name("leased")
        .limit(Limit::new(quota).name("all"))
        .redis(redis)
        .mode(Mode::Leased(Lease::default().share(SHARE)))
        .on_store_error(on_error)
        .build()
        .unwrap()
}

/// How often a request passes, asked `tasks` at a time without a pause.
async fn demand(handle: FleetHandle, tasks: u32, length: Duration) -> u64 {
    let end = clock::now() + length;
    let mut all = JoinSet::new();
    for _ in 0..tasks {
        let limit = handle.limit("all").unwrap();
        all.spawn(async move {
            let mut passed = 0;
            while clock::now() < end {
                match limit.check(&Key::global()).await {
                    Ok(()) => passed += 1,
                    Err(_) => sleep(Duration::from_millis(1)).await,
                }
                tokio::task::yield_now().await;
            }
            passed
        });
    }
    all.join_all().await.into_iter().sum()
}

async fn stats(redis: &Redis, section: &str, name: &str) -> String {
    let mut cmd = Cmd::new();
    cmd.arg("INFO").arg(section);
    let info: String = redis.run("info", &cmd).await.unwrap();
    info.lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap_or("")
        .trim()
        .to_owned()
}

/// How often scripts were called.
async fn calls(redis: &Redis) -> u64 {
    let line = |command: &'static str| async move {
        let line = stats(redis, "commandstats", command).await;
        let calls = line
            .strip_prefix(":calls=")
            .and_then(|line| line.split(',').next());
        calls.map_or(0, |calls| calls.parse::<u64>().unwrap())
    };
    line("cmdstat_evalsha").await + line("cmdstat_eval").await
}

async fn at_full_demand(nodes: u32, limit: u32) {
    let server = Server::start().await;
    let quota = Quota::new(limit, Duration::from_millis(500));
    let layers: Vec<_> = (0..nodes).map(|_| node(&server, quota)).collect();
    let start = clock::now();
    let mut all = JoinSet::new();
    for layer in &layers {
        all.spawn(demand(layer.handle(), 3, Duration::from_secs(5)));
    }
    let passed: u64 = all.join_all().await.into_iter().sum();
    let took = clock::now() - start;
    let periods = took.as_secs_f64() / 0.5;
    let strict = f64::from(limit) * (1.0 + periods);
    // The shares were empty at first, so that strict's bound is theirs.
    assert!(passed as f64 <= strict, "{passed} of {strict}");
    assert!(passed as f64 >= 0.8 * strict, "{passed} of {strict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_at_full_demand() {
    at_full_demand(2, 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_nodes_at_full_demand() {
    at_full_demand(10, 400).await;
}

#[tokio::test]
async fn one_node_passes_what_strict_passes() {
    let server = Server::start().await;
    for limit in [1, 2, 10, 100] {
        let layer = RateLimitLayer::builder()
            .name(format!("n{limit}"))
            .limit(Limit::new(Quota::per_hour(limit)).name("all"))
            .redis(&server.redis())
            .mode(Mode::leased())
            .build()
            .unwrap();
        let all = layer.handle().limit("all").unwrap();
        for _ in 0..limit {
            all.check(&Key::global()).await.unwrap();
        }
        let refusal = all.check(&Key::global()).await.unwrap_err();
        let interval = Duration::from_secs(3600) / limit;
        let wait = refusal.retry_after().unwrap();
        assert!(wait <= interval + Duration::from_secs(1), "{wait:?}");
        assert!(wait + Duration::from_secs(30) >= interval, "{wait:?}");
    }
}

#[tokio::test]
async fn a_busy_key_costs_few_calls_and_a_denied_one_none() {
    let server = Server::start().await;
    let redis = server.redis();
    let layer = RateLimitLayer::builder()
        .name("few")
        .limit(Limit::new(Quota::per_second(100_000_000)).name("plenty"))
        .limit(Limit::new(Quota::per_hour(20)).name("scarce"))
        .redis(&redis)
        .mode(Mode::leased())
        .build()
        .unwrap();
    let plenty = layer.handle().limit("plenty").unwrap();
    // The share has grown by then.
    for _ in 0..1_000 {
        plenty.check(&Key::global()).await.unwrap();
    }
    let before = calls(&redis).await;
    for _ in 0..100_000 {
        plenty.check(&Key::global()).await.unwrap();
    }
    let each = (calls(&redis).await - before) as f64 / 100_000.0;
    assert!(each <= 0.011, "{each} calls a check");

    let scarce = layer.handle().limit("scarce").unwrap();
    while scarce.check(&Key::global()).await.is_ok() {}
    let before = calls(&redis).await;
    for _ in 0..1_000 {
        assert!(scarce.check(&Key::global()).await.is_err());
    }
    // What was lent for the other limit may have been given back meanwhile.
    assert!(calls(&redis).await - before <= 2);
}

#[tokio::test]
async fn concurrent_requests_share_trips_and_pass_exactly() {
    let server = Server::start().await;
    let layer = node(&server, Quota::per_hour(300));
    let mut all = JoinSet::new();
    for _ in 0..500 {
        let limit = layer.handle().limit("all").unwrap();
        all.spawn(async move { limit.check(&Key::global()).await.is_ok() });
    }
    let passed = all.join_all().await.into_iter().filter(|&passed| passed);
    // All of them wait for the same few answers: nobody is refused while
    // there is one left.
    assert_eq!(passed.count(), 300);
    let redis = server.redis();
    assert!(calls(&redis).await <= 20, "{}", calls(&redis).await);
}

#[tokio::test]
async fn drained_it_gives_back_what_it_holds() {
    let server = Server::start().await;
    let quota = Quota::new(10_000, DAYS);
    let layer = node(&server, quota);
    let limit = layer.handle().limit("all").unwrap();
    for _ in 0..200 {
        limit.check(&Key::global()).await.unwrap();
    }
    let other = node(&server, quota);
    let seen = other.handle().usage("all", &Key::global()).await.unwrap();
    assert!(seen.remaining < 9_800, "nothing is in hand: {seen:?}");
    // It knows of its own.
    let usage = layer.handle().usage("all", &Key::global()).await.unwrap();
    assert_eq!(usage.remaining, 9_800);

    layer.handle().give_back().await;
    let seen = other.handle().usage("all", &Key::global()).await.unwrap();
    assert_eq!(seen.remaining, 9_800);

    // And takes no more ahead.
    for _ in 0..50 {
        limit.check(&Key::global()).await.unwrap();
    }
    let seen = other.handle().usage("all", &Key::global()).await.unwrap();
    assert_eq!(seen.remaining, 9_750);
}

#[tokio::test]
async fn idle_or_dropped_it_gives_back_what_it_holds() {
    let server = Server::start().await;
    let quota = Quota::new(10_000, DAYS);
    let other = node(&server, quota);
    let wait = async |remaining: u32| {
        for _ in 0..100 {
            let seen = other.handle().usage("all", &Key::global()).await.unwrap();
            if seen.remaining == remaining {
                return;
            }
            assert!(seen.remaining < remaining, "{seen:?}");
            sleep(Duration::from_millis(100)).await;
        }
        panic!("not given back");
    };
    let layer = node(&server, quota);
    let limit = layer.handle().limit("all").unwrap();
    for _ in 0..200 {
        limit.check(&Key::global()).await.unwrap();
    }
    wait(9_800).await;
    for _ in 0..200 {
        limit.check(&Key::global()).await.unwrap();
    }
    let seen = other.handle().usage("all", &Key::global()).await.unwrap();
    assert!(seen.remaining < 9_600);
    drop((layer, limit));
    wait(9_600).await;
}

#[tokio::test]
async fn a_killed_node_strands_a_share_at_most() {
    let server = Server::start().await;
    let quota = Quota::per_hour(2_000);
    let killed = {
        // With its runtime everything of it goes, and nobody gives back.
        let redis = server.redis();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let layer = node_on(&redis, quota, OnStoreError::Deny);
            runtime.block_on(async {
                let limit = layer.handle().limit("all").unwrap();
                for _ in 0..500 {
                    limit.check(&Key::global()).await.unwrap();
                }
            });
            runtime.shutdown_background();
            // Outside of any runtime.
            drop(layer);
        });
        tokio::task::spawn_blocking(move || thread.join().unwrap())
            .await
            .unwrap();
        500
    };
    let layer = node(&server, quota);
    let limit = layer.handle().limit("all").unwrap();
    let mut passed = 0;
    while limit.check(&Key::global()).await.is_ok() {
        passed += 1;
    }
    let total = killed + passed;
    assert!(total <= 2_001, "{total}");
    assert!(total >= 2_000 - HELD, "{total}");
}

#[tokio::test]
async fn restarted_empty_it_starts_over_within_the_bound() {
    let mut server = Server::start().await;
    let quota = Quota::per_hour(1_000);
    let nodes: Vec<_> = (0..2)
        .map(|_| node_on(&server.redis(), quota, OnStoreError::Deny))
        .collect();
    let limits: Vec<_> = (nodes.iter())
        .map(|node| node.handle().limit("all").unwrap())
        .collect();
    for _ in 0..200 {
        for limit in &limits {
            limit.check(&Key::global()).await.unwrap();
        }
    }
    server.kill();
    // What is in hand is spent, and then nothing passes.
    let mut spent = 0;
    for limit in &limits {
        for _ in 0..1_000 {
            spent += u64::from(limit.check(&Key::global()).await.is_ok());
        }
    }
    assert!(spent <= 2 * HELD, "{spent}");
    server.restart().await;
    let begun = clock::now();
    let mut after = 0_u64;
    // Full again, and not a token above it but what was in hand.
    while clock::now() - begun < Duration::from_secs(5) && after < 1_000 {
        for limit in &limits {
            after += u64::from(limit.check(&Key::global()).await.is_ok());
        }
        if after == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    }
    for limit in &limits {
        while limit.check(&Key::global()).await.is_ok() {
            after += 1;
        }
    }
    assert!(after >= 1_000 - 2 * HELD, "{after}");
    assert!(after <= 1_000 + 2 * HELD + 5, "{after}");
}

#[tokio::test]
async fn several_limits_are_charged_all_or_none() {
    let server = Server::start().await;
    let layer = RateLimitLayer::builder()
        .name("both")
        .limit(Limit::new(Quota::per_hour(1_000)).name("wide"))
        .limit(Limit::new(Quota::per_hour(30)).name("narrow"))
        .errors()
        .redis(&server.redis())
        .mode(Mode::Leased(Lease::default().share(SHARE)))
        .build()
        .unwrap();
    use tower::{Layer as _, Service as _, ServiceExt as _};
    let mut service = layer.layer(tower::service_fn(|_: http::Request<()>| async {
        Ok::<_, std::convert::Infallible>(http::Response::new(()))
    }));
    let mut passed = 0;
    for _ in 0..100 {
        let ready = service.ready().await.unwrap();
        passed += u32::from(ready.call(http::Request::new(())).await.is_ok());
    }
    assert_eq!(passed, 30);
    layer.handle().give_back().await;
    let wide = layer.handle().usage("wide", &Key::global()).await.unwrap();
    assert_eq!(wide.remaining, 970);
    let narrow = layer
        .handle()
        .usage("narrow", &Key::global())
        .await
        .unwrap();
    assert_eq!(narrow.remaining, 0);
}

#[tokio::test]
async fn a_quota_replaced_or_made_whole_is_heeded() {
    let server = Server::start().await;
    let layer = node(&server, Quota::per_hour(10));
    let handle = layer.handle();
    let limit = handle.limit("all").unwrap();
    let key = Key::global();
    for _ in 0..10 {
        limit.check(&key).await.unwrap();
    }
    assert!(limit.check(&key).await.is_err());
    // What is given back is to be had here at once.
    handle.refund("all", &key, 3).await.unwrap();
    for _ in 0..3 {
        limit.check(&key).await.unwrap();
    }
    assert!(limit.check(&key).await.is_err());
    assert!(handle.reset("all", &key).await.unwrap());
    limit.check(&key).await.unwrap();
    handle.set_quota("all", Quota::per_second(1_000)).unwrap();
    // What was owed by the old quota is a whole burst of the new one.
    handle.reset("all", &key).await.unwrap();
    for _ in 0..100 {
        limit.check(&key).await.unwrap();
    }
    // Costs above a share, and above the burst.
    limit.charge(&key, 300).await.unwrap();
    let refusal = limit.charge(&key, 1_001).await.unwrap_err();
    assert_eq!(refusal.retry_after(), None);
}

#[tokio::test]
async fn what_is_dropped_while_it_waits_takes_nothing_with_it() {
    let server = Server::start().await;
    let layer = node(&server, Quota::per_hour(100));
    let limit = layer.handle().limit("all").unwrap();
    limit.check(&Key::global()).await.unwrap();
    server.pause();
    for _ in 0..20 {
        let key = Key::global();
        let check = limit.charge(&key, 3);
        let waited = tokio::time::timeout(Duration::from_millis(5), check).await;
        assert!(waited.is_err(), "{waited:?}");
    }
    server.resume();
    let mut passed = 1;
    while limit.check(&Key::global()).await.is_ok() {
        passed += 1;
    }
    // What was charged for those who went away is for those who came.
    assert_eq!(passed, 100);
}

#[tokio::test]
async fn keys_without_room_for_a_share_are_charged_in_redis() {
    let server = Server::start().await;
    let layer = RateLimitLayer::builder()
        .name("room")
        .limit(Limit::new(Quota::new(50, DAYS)).name("all").max_keys(1))
        .redis(&server.redis())
        .mode(Mode::leased())
        .build()
        .unwrap();
    let limit = layer.handle().limit("all").unwrap();
    // One after the other, so that whoever has the room has it all the while.
    let keys: Vec<_> = (0..5_u64).map(Key::from).collect();
    for round in 0..60 {
        for key in &keys {
            assert_eq!(limit.check(key).await.is_ok(), round < 50, "{round}");
        }
    }
}

/// What has no share was asked for each time that it was refused.
#[tokio::test]
async fn a_denied_key_without_a_share_costs_nothing_until_it_may_pass() {
    let server = Server::start().await;
    let redis = server.redis();
    let layer = RateLimitLayer::builder()
        .name("room")
        .limit(Limit::new(Quota::new(50, DAYS)).name("all").max_keys(1))
        .redis(&redis)
        .mode(Mode::leased())
        .build()
        .unwrap();
    let limit = layer.handle().limit("all").unwrap();
    let (has, has_none) = (Key::from(0_u64), Key::from(1_u64));
    // Denied, it is remembered for as long as anything is.
    while limit.check(&has).await.is_ok() {}
    limit.charge(&has_none, 45).await.unwrap();
    let refusal = limit.charge(&has_none, 6).await.unwrap_err();
    let wait = refusal.retry_after().unwrap();
    let before = calls(&redis).await;
    for _ in 0..1_000 {
        let again = limit.charge(&has_none, 6).await.unwrap_err();
        assert!(again.retry_after().unwrap() <= wait);
    }
    assert_eq!(calls(&redis).await - before, 0);
    // What costs less passes, and is denied when it is its turn.
    for _ in 0..5 {
        limit.check(&has_none).await.unwrap();
    }
    let before = calls(&redis).await;
    for _ in 0..1_000 {
        assert!(limit.check(&has_none).await.is_err());
    }
    assert!(calls(&redis).await - before <= 1);
}

/// A token that was charged under one quota pays for none under a dearer one.
#[tokio::test]
async fn what_was_taken_ahead_is_worth_what_was_paid_for_it() {
    let server = Server::start().await;
    let layer = node(&server, Quota::per_second(1_000));
    let handle = layer.handle();
    let limit = handle.limit("all").unwrap();
    let key = Key::global();
    // So that the share has grown.
    for _ in 0..300 {
        limit.check(&key).await.unwrap();
    }
    handle.set_quota("all", Quota::per_hour(10)).unwrap();
    let mut passed = 0;
    for _ in 0..100 {
        passed += u32::from(limit.check(&key).await.is_ok());
    }
    assert!((1..=10).contains(&passed), "{passed}");
}

/// A share was asked for again and again for those who wait, each time for one
/// of them, until their time was over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_costs_the_whole_burst_waits_for_no_share() {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let config = Config::new(wire.url()).timeout(Duration::from_secs(2));
    let redis = Redis::from_config(config).unwrap();
    redis.connect().await.unwrap();
    // There is another burst in a millisecond.
    let quota = Quota::new(10_000, Duration::from_secs(1)).burst(10);
    let limit = node_on(&redis, quota, OnStoreError::Deny).handle();
    let limit = limit.limit("all").unwrap();
    limit.charge(&Key::global(), 10).await.unwrap();
    wire.delay(Duration::from_millis(700));
    let mut all = JoinSet::new();
    for _ in 0..30 {
        let limit = limit.clone();
        all.spawn(async move { limit.charge(&Key::global(), 10).await });
        sleep(Duration::from_millis(2)).await;
    }
    let mut passed = 0;
    while let Some(decided) = all.join_next().await {
        match decided.unwrap() {
            Ok(()) => passed += 1,
            Err(refusal) => assert!(refusal.retry_after().is_some(), "not decided: {refusal:?}"),
        }
    }
    assert!(passed >= 1, "{passed}");
    let own = server.redis();
    assert!(calls(&own).await <= 12, "{}", calls(&own).await);
}

/// A share in hand is no reason to refuse what the quota has room for.
#[tokio::test]
async fn what_costs_more_than_a_share_has_what_is_in_hand() {
    let server = Server::start().await;
    let layer = node(&server, Quota::new(1_000, DAYS));
    let limit = layer.handle().limit("all").unwrap();
    let key = Key::global();
    for _ in 0..200 {
        limit.check(&key).await.unwrap();
    }
    let refusal = limit.charge(&key, 801).await.unwrap_err();
    assert!(refusal.retry_after().is_some());
    limit.charge(&key, 750).await.unwrap();
    let redis = server.redis();
    let before = calls(&redis).await;
    for _ in 0..100 {
        limit.charge(&key, 51).await.unwrap_err();
    }
    // Told once, it is known.
    assert!(calls(&redis).await - before <= 4);
    for _ in 0..50 {
        limit.check(&key).await.unwrap();
    }
    limit.check(&key).await.unwrap_err();
}

/// As many as a fleet is large.
const NODES: u32 = 50;
/// What each of them takes ahead, and what it holds at most: a quarter more.
const PART: u32 = 20;
const PART_HELD: u64 = 25;

fn fleet(server: &Server, quota: Quota) -> Vec<FleetLayer> {
    (0..NODES)
        .map(|_| {
            RateLimitLayer::builder()
                .name("fleet")
                .limit(Limit::new(quota).name("all"))
                .redis(&server.redis())
                .mode(Mode::Leased(Lease::default().share(PART)))
                .on_store_error(OnStoreError::Deny)
                .build()
                .unwrap()
        })
        .collect()
}

/// Fifty nodes want many times the quota, rest for so long that some of what
/// they hold is given back, and want it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_nodes_pass_no_more_than_the_bound_in_any_span() {
    const RATE: u32 = 2_000;
    const TASKS: u64 = 2;

    let server = Server::start().await;
    let nodes = fleet(&server, Quota::per_second(RATE).burst(RATE));
    let start = clock::now();
    let mut all = JoinSet::new();
    for node in &nodes {
        for _ in 0..TASKS {
            let limit = node.handle().limit("all").unwrap();
            all.spawn(async move {
                // When each passed, and how long that was not known at most.
                let (mut passed, mut longest) = (Vec::new(), Duration::ZERO);
                while clock::now() - start < Duration::from_millis(2_300) {
                    let began = clock::now();
                    if (800..1_300).contains(&(began - start).as_millis()) {
                        sleep(Duration::from_millis(10)).await;
                        continue;
                    }
                    if limit.check(&Key::global()).await.is_ok() {
                        let now = clock::now();
                        longest = longest.max(now - began);
                        passed.push(now - start);
                        tokio::task::yield_now().await;
                    } else {
                        sleep(Duration::from_millis(2)).await;
                    }
                }
                (passed, longest)
            });
        }
    }
    let (mut passed, mut longest) = (Vec::new(), Duration::ZERO);
    for (some, took) in all.join_all().await {
        passed.extend(some);
        longest = longest.max(took);
    }
    passed.sort_unstable();
    let rate = f64::from(RATE);
    let bound = rate + (u64::from(NODES) * (PART_HELD + TASKS)) as f64;
    // How far the fleet was behind the quota's time when each span began.
    let mut least = f64::MAX;
    for (before, at) in passed.iter().enumerate() {
        let refilled = rate * at.as_secs_f64();
        least = least.min(before as f64 - refilled);
        let over = before as f64 + 1.0 - refilled - least;
        let bound = bound + rate * longest.as_secs_f64();
        assert!(over <= bound, "{over} of {bound} at {at:?}");
    }
    let took = clock::now() - start;
    let count = passed.len() as f64;
    // The shares were empty at first, so that strict's bound is theirs.
    let strict = rate * (1.0 + took.as_secs_f64());
    assert!(count <= strict, "{count} of {strict}");
    // A busy machine may not get round to all of it: a tenth is lost at rest.
    let wanted = rate * (1.0 + 2.3 - 0.5) * 0.5;
    assert!(count >= wanted, "{count} of {wanted}");
}

/// No token comes back by time: what Redis has charged is spent or in a share.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fifty_nodes_hold_is_within_the_bound_when_half_are_killed() {
    const QUOTA: u32 = 40_000;

    let server = Server::start().await;
    let mut nodes = fleet(&server, Quota::new(QUOTA, DAYS));
    let spend = |nodes: &[FleetLayer], each: u64| {
        let mut all = JoinSet::new();
        for node in nodes {
            let limit = node.handle().limit("all").unwrap();
            all.spawn(async move {
                let mut passed = 0;
                while passed < each && limit.check(&Key::global()).await.is_ok() {
                    passed += 1;
                }
                passed
            });
        }
        async { all.join_all().await.into_iter().sum::<u64>() }
    };
    // With their runtime those who are killed are gone at once.
    let doomed = nodes.split_off(nodes.len() / 2);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (lost, kept) = tokio::join!(
        async {
            let spent = runtime.spawn(spend(&doomed, 250));
            spent.await.unwrap()
        },
        spend(&nodes, 250)
    );
    assert_eq!(lost + kept, 250 * u64::from(NODES));
    runtime.shutdown_background();
    let watcher = RateLimitLayer::builder()
        .name("fleet")
        .limit(Limit::new(Quota::new(QUOTA, DAYS)).name("all"))
        .redis(&server.redis())
        .build()
        .unwrap();
    let seen = watcher.handle().usage("all", &Key::global()).await.unwrap();
    let held = u64::from(QUOTA - seen.remaining) - lost - kept;
    assert!(held > 0, "they take nothing ahead");
    assert!(held <= u64::from(NODES) * PART_HELD, "{held} held");
    // Outside of any runtime nobody gives back.
    std::thread::spawn(move || drop(doomed)).join().unwrap();
    // What all the others can have is all but that.
    let rest = spend(&nodes, u64::from(QUOTA)).await;
    let total = lost + kept + rest;
    assert!(total <= u64::from(QUOTA), "{total}");
    let stranded = u64::from(QUOTA) - total;
    assert!(stranded <= u64::from(NODES / 2) * PART_HELD, "{stranded}");
}

/// What a process holds: so far as another one sees, with what was spent.
async fn held(other: &FleetLayer, quota: u32, spent: u32) -> u32 {
    let seen = other.handle().usage("all", &Key::global()).await.unwrap();
    quota - seen.remaining - spent
}

/// A trip, another to give back what is in hand, and a third that was under way
/// when the time was over: charged there, it was told on top.
#[tokio::test]
async fn what_was_cut_off_under_way_is_not_charged_twice() {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let config = Config::new(wire.url()).timeout(Duration::from_secs(1));
    let redis = Redis::from_config(config).unwrap();
    let layer = node_on(&redis, Quota::new(1_000, DAYS), OnStoreError::Local);
    let other = node(&server, Quota::new(1_000, DAYS));
    let limit = layer.handle().limit("all").unwrap();
    for _ in 0..200 {
        limit.check(&Key::global()).await.unwrap();
    }
    let held = held(&other, 1_000, 200).await;
    assert!(held > 10, "{held}");
    wire.delay(Duration::from_millis(450));
    // Less than all is left when it is charged once.
    let cost = 800 - held + 1;
    limit.charge(&Key::global(), cost).await.unwrap();
    // Whoever is told is told by now.
    sleep(Duration::from_millis(2_500)).await;
    let left = other.handle().usage("all", &Key::global()).await.unwrap();
    assert_eq!(left.remaining, held - 1);
}

/// Who goes away while what is in hand is given back, takes it along no more.
#[tokio::test]
async fn what_is_given_back_for_one_who_goes_away_is_given_back() {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let config = Config::new(wire.url()).timeout(Duration::from_secs(5));
    let redis = Redis::from_config(config).unwrap();
    let layer = node_on(&redis, Quota::new(1_000, DAYS), OnStoreError::Deny);
    let other = node(&server, Quota::new(1_000, DAYS));
    let limit = layer.handle().limit("all").unwrap();
    for _ in 0..200 {
        limit.check(&Key::global()).await.unwrap();
    }
    assert!(held(&other, 1_000, 200).await > 10);
    // Nothing can be sent for a while.
    wire.stall();
    wire.cut();
    sleep(Duration::from_millis(50)).await;
    let key = Key::global();
    let charge = limit.charge(&key, 800);
    tokio::time::timeout(Duration::from_millis(50), charge)
        .await
        .unwrap_err();
    wire.flow();
    let began = clock::now();
    while held(&other, 1_000, 200).await > 0 {
        assert!(clock::now() - began < Duration::from_secs(10));
        sleep(Duration::from_millis(20)).await;
    }
}
