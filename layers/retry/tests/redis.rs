//! One budget for a fleet, over a real Redis and without it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use buttress_core::clock::{self, Instant};
use buttress_redis::{Cmd, Config, FromRedisValue, Redis, testing::Server};
use buttress_retry::{
    Backoff, Budget, FleetBudget, OnStoreError, RetryBudget, RetryLayer, Settings,
};
use tokio::time::sleep;
use tower::{Layer, ServiceExt, service_fn};

/// The longest that anything is waited for here: never needed.
const PATIENCE: Duration = Duration::from_secs(20);

fn hasty(server: &Server) -> Redis {
    let config = Config::new(server.url())
        .timeout(Duration::from_millis(400))
        .connect_timeout(Duration::from_secs(2));
    Redis::from_config(config).unwrap()
}

fn budget(redis: &Redis, percent: u32, per_second: u32) -> FleetBudget {
    let budget = RetryBudget::new(percent, per_second).unwrap();
    budget.redis(redis, "orders").unwrap()
}

async fn within(limit: Duration, holds: impl AsyncFn() -> bool) {
    let began = clock::now();
    while !holds().await {
        assert!(clock::now() - began < limit, "it does not come to be");
        sleep(Duration::from_millis(10)).await;
    }
}

async fn shared(budget: &FleetBudget, shared: bool) {
    within(PATIENCE, async || budget.is_shared() == shared).await;
}

async fn of(budget: &FleetBudget, processes: u64) {
    within(PATIENCE, async || budget.processes() == processes).await;
}

async fn ask<T: FromRedisValue>(redis: &Redis, words: &[&str]) -> T {
    let mut cmd = Cmd::new();
    for word in words {
        cmd.arg(word);
    }
    redis.run("test", &cmd).await.unwrap()
}

fn given(budget: &FleetBudget, wanted: u64) -> u64 {
    (0..wanted).filter(|_| budget.withdraw()).count() as u64
}

fn seconds_since(began: Instant) -> f64 {
    (clock::now() - began).as_secs_f64()
}

/// Each of them asks for all it can get, for so long; how many retries there
/// were, and in how many seconds.
async fn hammer(budgets: &[FleetBudget], requests: u64, span: Duration) -> (u64, u64, f64) {
    let began = clock::now();
    let (retries, served) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let tasks: Vec<_> = budgets
        .iter()
        .map(|budget| {
            let budget = budget.clone();
            let (retries, served) = (Arc::clone(&retries), Arc::clone(&served));
            tokio::spawn(async move {
                while clock::now() - began < span {
                    for _ in 0..requests {
                        budget.request();
                        served.fetch_add(1, Relaxed);
                    }
                    retries.fetch_add(given(&budget, requests + 1), Relaxed);
                    sleep(Duration::from_millis(5)).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let seconds = seconds_since(began);
    (retries.load(Relaxed), served.load(Relaxed), seconds)
}

#[expect(clippy::cast_precision_loss, reason = "there are few")]
fn bounded(percent: u64, per_second: f64, counts: (u64, u64, f64), more: f64) {
    let (retries, requests, seconds) = counts;
    let of_requests = requests as f64 * percent as f64 / 100.0;
    let most = of_requests + per_second * (seconds + 1.0) + more;
    assert!(retries as f64 <= most, "{retries} of {most}");
    // And most of it is used.
    let least = 0.6 * (of_requests + per_second * seconds);
    assert!(retries as f64 >= least, "{retries}, and not {least}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_have_one_minimum() {
    let server = Server::start().await;
    let began = clock::now();
    let both = [(); 2].map(|()| budget(&server.redis(), 0, 10));
    of(&both[0], 2).await;
    of(&both[1], 2).await;
    let waited = seconds_since(began);
    let counts = hammer(&both, 0, Duration::from_secs(3)).await;
    // What came in while they waited is in the pool or in a pocket.
    bounded(0, 10.0, counts, 10.0 * waited);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_processes_are_bounded_as_one() {
    let server = Server::start().await;
    let began = clock::now();
    let fleet: Vec<_> = (0..10).map(|_| budget(&server.redis(), 20, 20)).collect();
    for budget in &fleet {
        of(budget, 10).await;
    }
    let waited = seconds_since(began);
    let counts = hammer(&fleet, 4, Duration::from_secs(3)).await;
    bounded(20, 20.0, counts, 20.0 * waited);
}

#[tokio::test]
async fn what_one_saves_up_another_may_spend() {
    let server = Server::start().await;
    let (busy, failing) = (
        budget(&server.redis(), 20, 0),
        budget(&server.redis(), 20, 0),
    );
    assert_eq!(given(&failing, 10), 0);
    for _ in 0..250 {
        busy.request();
    }
    let retries = AtomicU64::new(0);
    within(PATIENCE, async || {
        retries.fetch_add(given(&failing, 100), Relaxed);
        retries.load(Relaxed) >= 45
    })
    .await;
    // A fifth of 250, whoever gets them.
    sleep(Duration::from_millis(600)).await;
    let all = retries.load(Relaxed) + given(&failing, 100) + given(&busy, 100);
    assert!((45..=50).contains(&all), "{all}");
}

#[tokio::test]
async fn without_the_server_each_has_its_part_until_it_is_back() {
    let mut server = Server::start().await;
    let both = [(); 2].map(|()| budget(&hasty(&server), 0, 8));
    of(&both[0], 2).await;
    of(&both[1], 2).await;
    server.kill();
    for budget in &both {
        shared(budget, false).await;
        // What is in the pocket, and then a half of the minimum.
        let pocket = budget.pocket();
        let began = clock::now();
        let at_once = given(budget, 100);
        assert!((pocket + 4..=pocket + 5).contains(&at_once), "{at_once}");
        sleep(Duration::from_millis(1000)).await;
        let more = given(budget, 100);
        let most = (4.0 * seconds_since(began)).ceil();
        assert!(more >= 4 && more as f64 <= most, "{more} of {most}");
    }
    let began = clock::now();
    server.restart().await;
    for budget in &both {
        shared(budget, true).await;
    }
    // Within a second, on a machine that is not busy.
    assert!(clock::now() - began < Duration::from_secs(5));
    of(&both[0], 2).await;
    let waited = seconds_since(began);
    let counts = hammer(&both, 0, Duration::from_secs(2)).await;
    bounded(0, 8.0, counts, 8.0 * waited);
}

#[tokio::test]
async fn a_stopped_server_is_noticed_by_no_request() {
    let server = Server::start().await;
    let budget = budget(&hasty(&server), 0, 4);
    of(&budget, 1).await;
    server.pause();
    let began = clock::now();
    for _ in 0..100_000 {
        budget.request();
        budget.withdraw();
    }
    assert!(clock::now() - began < Duration::from_secs(5));
    shared(&budget, false).await;
    assert!(budget.withdraw(), "by its own minimum");
    server.resume();
    shared(&budget, true).await;
}

#[tokio::test]
async fn what_is_allowed_without_the_server_is_set() {
    let mut server = Server::start().await;
    let made = |rule| budget(&hasty(&server), 0, 2).on_store_error(rule);
    let allow = made(OnStoreError::Allow);
    let deny = made(OnStoreError::Deny);
    let local = made(OnStoreError::Local);
    for budget in [&allow, &deny, &local] {
        of(budget, 3).await;
    }
    server.kill();
    for budget in [&allow, &deny, &local] {
        shared(budget, false).await;
    }
    assert_eq!(given(&allow, 1000), 1000);
    deny.request();
    assert_eq!(given(&deny, 1000), 0);
    let pocket = local.pocket();
    let at_once = given(&local, 1000);
    assert!((pocket + 2..=pocket + 3).contains(&at_once), "{at_once}");
    server.restart().await;
    for budget in [&allow, &deny, &local] {
        shared(budget, true).await;
    }
    assert!(given(&allow, 1000) < 10);
}

#[tokio::test]
async fn keys_have_the_prefix_and_a_ttl_and_are_small() {
    let server = Server::start().await;
    let redis = server.redis();
    let fleet: Vec<_> = (0..5).map(|_| budget(&server.redis(), 20, 10)).collect();
    of(&fleet[0], 5).await;
    ask::<()>(&redis, &["SCRIPT", "FLUSH"]).await;
    sleep(Duration::from_millis(300)).await;
    let mut keys: Vec<String> = ask(&redis, &["KEYS", "*orders*"]).await;
    keys.sort();
    assert_eq!(
        keys,
        [
            "buttress:retry-budget:{orders}",
            "buttress:retry-budget:{orders}:processes"
        ]
    );
    let mut used = Vec::new();
    for key in &keys {
        let ttl: i64 = ask(&redis, &["PTTL", key]).await;
        assert!((50_000..=60_000).contains(&ttl), "{ttl}");
        used.push(ask::<u64>(&redis, &["MEMORY", "USAGE", key]).await);
    }
    assert!(used[0] < 1000 && used[1] < 1000, "{used:?}");
    assert!(fleet.iter().all(FleetBudget::is_shared));
}

#[tokio::test]
async fn what_is_corrupt_heals_and_what_is_foreign_is_left() {
    let server = Server::start().await;
    let redis = server.redis();
    let key = "buttress:retry-budget:{orders}";
    for broken in ["nan", "inf", "-5", "1e99", "many", ""] {
        for field in ["minimum", "balance", "at"] {
            let _: i64 = ask(&redis, &["HSET", key, field, broken]).await;
            let budget = budget(&server.redis(), 0, 10);
            of(&budget, 1).await;
            within(PATIENCE, async || budget.withdraw()).await;
            let held: String = ask(&redis, &["HGET", key, "minimum"]).await;
            assert!(held.parse::<u64>().unwrap() <= 10_000_000, "{held}");
            drop(budget);
            let _: i64 = ask(&redis, &["DEL", key, &format!("{key}:processes")]).await;
        }
    }
    // A clock of the server that was ahead.
    let words = ["HSET", key, "minimum", "0", "balance", "0", "at", "8e15"];
    let _: i64 = ask(&redis, &words).await;
    let healing = budget(&server.redis(), 0, 10);
    within(PATIENCE, async || healing.withdraw()).await;
    drop(healing);

    for foreign in [key.to_owned(), format!("{key}:processes")] {
        let both = format!("{key}:processes");
        sleep(Duration::from_millis(300)).await;
        let _: i64 = ask(&redis, &["DEL", key, &both]).await;
        ask::<()>(&redis, &["SET", &foreign, "mine"]).await;
        let budget = budget(&server.redis(), 0, 10);
        shared(&budget, false).await;
        assert!(budget.withdraw(), "by its own minimum");
        let left: String = ask(&redis, &["GET", &foreign]).await;
        assert_eq!(left, "mine");
    }
}

#[tokio::test]
async fn a_full_server_is_one_that_fails() {
    let server = Server::with(["--maxmemory-policy", "noeviction"]).await;
    let redis = server.redis();
    let budget = budget(&server.redis(), 0, 10);
    of(&budget, 1).await;
    ask::<()>(&redis, &["CONFIG", "SET", "maxmemory", "1"]).await;
    shared(&budget, false).await;
    assert!(budget.withdraw());
    ask::<()>(&redis, &["CONFIG", "SET", "maxmemory", "0"]).await;
    shared(&budget, true).await;
}

#[tokio::test]
async fn who_is_gone_is_not_counted_for_long() {
    let server = Server::start().await;
    let staying = budget(&server.redis(), 0, 10);
    let leaving = budget(&server.redis(), 0, 10);
    of(&staying, 2).await;
    drop(leaving);
    of(&staying, 1).await;
}

/// Made before there is a runtime, and kept from one to the next.
#[test]
fn it_goes_from_runtime_to_runtime() {
    let outer = tokio::runtime::Runtime::new().unwrap();
    let server = outer.block_on(Server::start());
    // A connection belongs to a runtime; another handle lives in the next.
    let redis = server.redis();
    let budget = budget(&redis, 0, 10);
    assert!(!budget.is_shared());
    assert_eq!(given(&budget, 100), 10, "by its own minimum");
    for _ in 0..2 {
        let inner = tokio::runtime::Runtime::new().unwrap();
        inner.block_on(async {
            within(PATIENCE, async || {
                budget.withdraw();
                budget.is_shared()
            })
            .await;
        });
        drop(inner);
        assert!(!budget.is_shared());
    }
}

#[tokio::test]
async fn a_retry_asks_the_fleet() {
    let server = Server::start().await;
    let budget = budget(&server.redis(), 0, 2);
    of(&budget, 1).await;
    within(PATIENCE, async || budget.pocket() == 1).await;
    let backoff = Backoff::fixed(Duration::from_millis(1));
    let layer = RetryLayer::any()
        .settings(Settings::standard().backoff(backoff).max_attempts(5))
        .budget(budget.clone())
        .build()
        .unwrap();
    let calls = AtomicU64::new(0);
    let failing = service_fn(|()| {
        calls.fetch_add(1, Relaxed);
        async { Err::<(), _>(std::io::Error::other("failed")) }
    });
    let service = layer.layer(failing);
    service.clone().oneshot(()).await.unwrap_err();
    let attempts = calls.load(Relaxed);
    // One that was in the pocket, and one that may have come meanwhile.
    assert!((2..=3).contains(&attempts), "{attempts}");
}

#[tokio::test]
async fn a_name_is_one() {
    let server = Server::start().await;
    let redis = server.redis();
    for name in ["", "a b\n", &"x".repeat(129)] {
        let error = RetryBudget::default().redis(&redis, name).unwrap_err();
        assert!(error.to_string().contains("name of a budget"));
    }
    let budget = RetryBudget::default().redis(&redis, "orders").unwrap();
    assert_eq!((budget.percent(), budget.min_per_second()), (20, 10));
    budget.set(30, 5).unwrap();
    assert_eq!((budget.percent(), budget.min_per_second()), (30, 5));
    assert!(budget.set(1001, 5).is_err());
    let shown = format!("{budget:?}");
    assert!(
        shown.starts_with("FleetBudget { name: \"orders\", percent: 30,"),
        "{shown}"
    );
}
