//! Claims in a cluster of three nodes.

use std::time::Duration;

use buttress_core::clock;
use buttress_redis::{Config, Redis, testing::Cluster};
use buttress_webhook::{
    Claim, ClaimKey, ClaimToken, RedisReplays, ReplayStore, testing::check_replay_store,
};
use tokio::time::sleep;

const KEEP: Duration = Duration::from_secs(601);

fn key(n: u32) -> ClaimKey {
    ClaimKey::new(format!("orders msg_{n}"))
}

async fn granted(store: &RedisReplays, n: u32) -> ClaimToken {
    match store.claim(&key(n), KEEP).await.unwrap() {
        Claim::New(token) => token,
        other => panic!("{n}: {other:?}"),
    }
}

#[tokio::test]
async fn it_does_what_every_store_must() {
    let cluster = Cluster::start().await;
    check_replay_store(RedisReplays::new(&cluster.redis()), "test ", sleep).await;
}

#[tokio::test]
async fn claims_go_with_their_slots() {
    let cluster = Cluster::start().await;
    let [ours, theirs] = [(); 2].map(|()| RedisReplays::new(&cluster.redis()));
    let mut tokens = Vec::new();
    for n in 0..12 {
        tokens.push(granted(&ours, n).await);
    }
    for node in cluster.nodes() {
        let there: Vec<String> = node.cmd(&["KEYS", "*webhook*"]).await;
        assert!(!there.is_empty());
    }
    cluster.move_all().await;
    for n in 0..12 {
        let claim = theirs.claim(&key(n), KEEP).await.unwrap();
        assert_eq!(claim, Claim::InProgress);
    }
    // Half are done, and half may come again.
    for (n, token) in (0..).zip(tokens) {
        if n % 2 == 0 {
            ours.complete(&key(n), token, KEEP).await.unwrap();
        } else {
            ours.release(&key(n), token).await.unwrap();
        }
    }
    cluster.move_all().await;
    for n in 0..12 {
        if n % 2 == 0 {
            let claim = theirs.claim(&key(n), KEEP).await.unwrap();
            assert_eq!(claim, Claim::Completed);
        } else {
            granted(&theirs, n).await;
        }
    }
}

/// A claim whose answer was lost, or that was made after its time, is given
/// back: what comes again is handled.
#[tokio::test]
async fn a_claim_that_nobody_heard_of_is_given_back() {
    let cluster = Cluster::start().await;
    let config = || Config::cluster([cluster.nodes()[0].url()]);
    let patient = Redis::from_config(config().timeout(Duration::from_secs(5))).unwrap();
    let all = RedisReplays::new(&patient);
    granted(&all, 0).await;
    let there = &cluster.keys().await[0];
    let wire = cluster.wire_to(cluster.owner(there).await).await;
    let hasty = config().timeout(Duration::from_millis(400));
    let hasty = RedisReplays::new(&Redis::from_config(hasty).unwrap());
    // It is there, and knows the wire.
    let began = clock::now();
    while hasty.claim(&key(0), KEEP).await.is_err() {
        assert!(clock::now() - began < Duration::from_secs(10));
        sleep(Duration::from_millis(5)).await;
    }
    let mut lost = 0;
    for n in 1..40 {
        wire.cut_after(0);
        match hasty.claim(&key(n), KEEP).await {
            Ok(Claim::New(token)) => hasty.release(&key(n), token).await.unwrap_or_default(),
            Ok(other) => panic!("{other:?}"),
            Err(_) => lost += 1,
        }
        let began = clock::now();
        loop {
            match all.claim(&key(n), KEEP).await {
                Ok(Claim::New(_)) => break,
                Ok(Claim::InProgress) | Err(_) => {}
                Ok(other) => panic!("{other:?}"),
            }
            let passed = clock::now() - began;
            assert!(passed < Duration::from_secs(20), "{n} stays claimed");
            sleep(Duration::from_millis(5)).await;
        }
    }
    assert!(lost > 0, "no answer was lost");
}
