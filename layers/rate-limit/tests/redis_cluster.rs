//! Limits on a cluster of three nodes: slots that move, nodes that go, answers
//! that are lost.

use std::time::Duration;

use buttress_core::{clock, key::Key};
use buttress_rate_limit::{
    Limit, Quota, RateLimitLayer,
    redis::{FleetLayer, Lease, Mode, OnStoreError, TokenBucket},
};
use buttress_redis::{Config, Redis, testing::Cluster};
use tokio::{task::JoinSet, time::sleep};

const SHARE: u32 = 50;
/// So long that no token comes back by time while a test runs.
const DAYS: Duration = Duration::from_secs(10 * 24 * 60 * 60);

fn process(redis: &Redis, limit: u32, mode: Mode) -> FleetLayer {
    RateLimitLayer::builder()
        .name("fleet")
        .limit(Limit::new(Quota::new(limit, DAYS)).name("all"))
        .redis(redis)
        .mode(mode)
        .on_store_error(OnStoreError::Deny)
        .build()
        .unwrap()
}

fn leased() -> Mode {
    Mode::Leased(Lease::default().share(SHARE))
}

async fn remaining(layer: &FleetLayer) -> u32 {
    let usage = layer.handle().usage("all", &Key::global()).await;
    usage.unwrap().remaining
}

#[tokio::test]
async fn a_share_is_taken_and_given_back_while_its_slot_moves() {
    let cluster = Cluster::start().await;
    let layer = process(&cluster.redis(), 10_000, leased());
    let other = process(&cluster.redis(), 10_000, leased());
    let limit = layer.handle().limit("all").unwrap();
    let pass = async || {
        for _ in 0..100 {
            limit.check(&Key::global()).await.unwrap();
        }
    };
    pass().await;
    let held = remaining(&other).await;
    assert!((9_900 - 63..9_900).contains(&held), "{held}");
    let key = &cluster.keys().await[0];
    for round in 1..4 {
        let to = (cluster.owner(key).await + 1) % 3;
        cluster.begin_move(key, to).await;
        pass().await;
        cluster.finish_move(key, to).await;
        pass().await;
        assert_eq!(remaining(&layer).await, 9_900 - 200 * round);
    }
    layer.handle().give_back().await;
    assert_eq!(remaining(&other).await, 9_300);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bound_is_kept_while_slots_move() {
    for mode in [Mode::Strict, leased()] {
        let cluster = Cluster::start().await;
        let layers: Vec<_> = (0..3)
            .map(|_| process(&cluster.redis(), 2_000, mode.clone()))
            .collect();
        // So that there is a slot to be moved.
        let first = layers[0].handle().limit("all").unwrap();
        first.check(&Key::global()).await.unwrap();
        let mut all = JoinSet::new();
        for layer in layers.iter().cycle().take(6) {
            let limit = layer.handle().limit("all").unwrap();
            all.spawn(async move {
                let (mut passed, mut refused) = (0, 0);
                while refused < 20 {
                    match limit.check(&Key::global()).await {
                        Ok(()) => passed += 1,
                        Err(_) => refused += 1,
                    }
                    sleep(Duration::from_millis(1)).await;
                }
                passed
            });
        }
        for _ in 0..5 {
            sleep(Duration::from_millis(50)).await;
            cluster.move_all().await;
        }
        let passed: u32 = 1 + all.join_all().await.into_iter().sum::<u32>();
        // Nothing comes back by time, and nothing is left but what another had
        // in hand when one was refused.
        assert!(passed <= 2_000, "{mode:?}: {passed}");
        assert!(passed >= 2_000 - 3 * 63, "{mode:?}: {passed}");
    }
}

/// What is let through was charged, and nothing is charged twice, whatever
/// answers are lost.
#[tokio::test]
async fn lost_answers_cost_a_charge_at_most() {
    let cluster = Cluster::start().await;
    let config = |limit| {
        let config = Config::cluster([cluster.nodes()[0].url()]);
        Redis::from_config(config.timeout(limit)).unwrap()
    };
    let calm = process(&config(Duration::from_secs(5)), 10_000, Mode::Strict);
    let all = calm.handle().limit("all").unwrap();
    all.check(&Key::global()).await.unwrap();
    let key = &cluster.keys().await[0];
    let wire = cluster.wire_to(cluster.owner(key).await).await;
    let limit = Duration::from_millis(500);
    let hasty = process(&config(limit), 10_000, Mode::Strict);
    let all = hasty.handle().limit("all").unwrap();
    let (mut asked, mut passed) = (1, 1);
    for round in 0..10 {
        let began = clock::now();
        loop {
            let one = clock::now();
            let answer = all.check(&Key::global()).await;
            assert!(clock::now() - one < limit + Duration::from_millis(250));
            asked += 1;
            passed += u32::from(answer.is_ok());
            if answer.is_ok() {
                break;
            }
            assert!(clock::now() - began < Duration::from_secs(10));
            sleep(Duration::from_millis(5)).await;
        }
        if round % 2 == 0 {
            wire.cut_after(0);
        } else {
            wire.cut();
        }
    }
    let began = clock::now();
    let left = loop {
        match calm.handle().usage("all", &Key::global()).await {
            Ok(usage) => break usage.remaining,
            Err(_) => assert!(clock::now() - began < Duration::from_secs(10)),
        }
        sleep(Duration::from_millis(20)).await;
    };
    let charged = 10_000 - left;
    assert!(passed <= charged, "{passed} passed, {charged} charged");
    assert!(charged <= asked, "{asked} asked, {charged} charged");
}

#[tokio::test]
async fn a_node_that_is_gone_costs_its_keys_and_no_others() {
    let mut cluster = Cluster::start().await;
    let config = Config::cluster(cluster.urls()).timeout(Duration::from_millis(250));
    let redis = Redis::from_config(config).unwrap();
    let layer = RateLimitLayer::builder()
        .limit(Limit::new(Quota::new(1_000, DAYS)).name("user"))
        .redis(&redis)
        .on_store_error(OnStoreError::Deny)
        .build()
        .unwrap();
    let user = layer.handle().limit("user").unwrap();
    let count = async || {
        let mut passed = 0;
        for n in 0..30_u64 {
            passed += u32::from(user.check(&Key::from(n)).await.is_ok());
        }
        passed
    };
    assert_eq!(count().await, 30);
    let there: Vec<String> = cluster.nodes()[1].cmd(&["KEYS", "*rate-limit*"]).await;
    let theirs = u32::try_from(there.len()).unwrap();
    assert!((1..30).contains(&theirs), "{theirs}");
    cluster.node_mut(1).kill();
    let began = clock::now();
    while count().await != 30 - theirs {
        let passed = clock::now() - began;
        assert!(passed < Duration::from_secs(8), "it stays another number");
    }
    // Those that nobody can ask about are refused at once.
    let began = clock::now();
    for _ in 0..20 {
        count().await;
    }
    let took = clock::now() - began;
    assert!(took < Duration::from_secs(5), "{took:?}");
    cluster.node_mut(1).restart().await;
    cluster.settled().await;
    let began = clock::now();
    while count().await != 30 {
        assert!(clock::now() - began < Duration::from_secs(8));
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn buckets_of_tokens_are_on_all_nodes() {
    let cluster = Cluster::start().await;
    let [ours, theirs] =
        [(); 2].map(|()| TokenBucket::new(&cluster.redis(), "mails", 1_000, 1).unwrap());
    let keys: Vec<_> = (0..15_u64).map(Key::from).collect();
    for key in &keys {
        assert!(ours.take(key, 600).await.unwrap().allowed);
    }
    for node in cluster.nodes() {
        let there: Vec<String> = node.cmd(&["KEYS", "*rate-limit*"]).await;
        assert!(!there.is_empty());
    }
    cluster.move_all().await;
    for key in &keys {
        let taken = theirs.take(key, 600).await.unwrap();
        assert!(!taken.allowed && taken.remaining >= 400, "{taken:?}");
        let taken = theirs.take(key, 300).await.unwrap();
        assert!(taken.allowed && taken.remaining < 250, "{taken:?}");
    }
}
