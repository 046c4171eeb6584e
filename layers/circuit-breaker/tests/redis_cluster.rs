//! Breakers that are shared over a cluster of three nodes.

mod fleet;

use buttress_circuit_breaker::{Breaker, Cause, Sharing, State};
use buttress_redis::{Config, Redis, testing::Cluster};
use fleet::*;

/// Processes that begin with another node each, and so listen to another.
fn handles(cluster: &Cluster, millis: u64) -> Vec<Redis> {
    let mut urls = cluster.urls();
    (0..3)
        .map(|_| {
            urls.rotate_left(1);
            let config = Config::cluster(urls.clone());
            Redis::from_config(config.timeout(ms(millis))).unwrap()
        })
        .collect()
}

async fn fleet(cluster: &Cluster, millis: u64, pull: Option<u64>) -> Vec<Breaker> {
    let mut nodes = Vec::new();
    for redis in handles(cluster, millis) {
        let sharing = Sharing::new(&redis);
        let sharing = match pull {
            Some(millis) => sharing.pull(ms(millis)),
            None => sharing,
        };
        nodes.push(joined(node_of(sharing, "shared", opens_for(ms(60_000)))).await);
    }
    nodes
}

#[tokio::test]
async fn what_opens_here_is_open_there_wherever_its_slot_is() {
    let cluster = Cluster::start().await;
    let nodes = fleet(&cluster, 5000, None).await;
    for round in 0..4 {
        trip(&nodes[round % 3]);
        within(SOON, "open", || all(&nodes, State::Open)).await;
        let other = nodes[(round + 1) % 3].status();
        assert_eq!(other.opened_by, Some(Cause::Remote));
        cluster.move_all().await;
        nodes[(round + 2) % 3].reset();
        within(SOON, "closed", || all(&nodes, State::Closed)).await;
    }
    let breakers = cluster.keys().await;
    assert!(!breakers.is_empty());
    // All of a fleet's is on one node: what a script touches is of one slot.
    assert!(breakers.iter().all(|key| key.slot() == breakers[0].slot()));
}

#[tokio::test]
async fn one_probes_for_all_over_a_cluster() {
    let cluster = Cluster::start().await;
    let mut nodes = Vec::new();
    for redis in handles(&cluster, 5000) {
        let node = node_of(Sharing::new(&redis), "shared", opens_for(ms(300)));
        nodes.push(joined(node).await);
    }
    trip(&nodes[0]);
    within(SOON, "open", || all(&nodes, State::Open)).await;
    cluster.move_all().await;
    within(5 * SOON, "closed by a probe", || {
        for node in &nodes {
            succeed(node);
        }
        all(&nodes, State::Closed)
    })
    .await;
}

#[tokio::test]
async fn those_who_are_cut_off_hear_of_it_and_pulls_alone_will_do() {
    let cluster = Cluster::start().await;
    let nodes = fleet(&cluster, 5000, None).await;
    for _ in 0..3 {
        for node in cluster.nodes() {
            node.cmd::<u64>(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
        }
        trip(&nodes[0]);
        within(3 * SOON, "open", || all(&nodes, State::Open)).await;
        nodes[2].close().unwrap();
        within(SOON, "closed", || all(&nodes, State::Closed)).await;
    }

    let mute = Cluster::with(["--rename-command", "PUBLISH", ""]).await;
    let nodes = fleet(&mute, 5000, Some(500)).await;
    trip(&nodes[0]);
    within(SOON, "open", || all(&nodes, State::Open)).await;
    mute.move_all().await;
    nodes[1].close().unwrap();
    within(SOON, "closed", || all(&nodes, State::Closed)).await;
}

/// The node that has the record is gone: each goes on alone, and what opened
/// meanwhile is told when it is back.
#[tokio::test]
async fn without_the_node_each_is_alone_until_it_is_back() {
    let mut cluster = Cluster::start().await;
    let nodes = fleet(&cluster, 250, None).await;
    trip(&nodes[0]);
    within(SOON, "open", || all(&nodes, State::Open)).await;
    nodes[1].reset();
    within(SOON, "closed", || all(&nodes, State::Closed)).await;
    let owner = cluster.owner(&cluster.keys().await[0]).await;
    cluster.node_mut(owner).kill();
    trip(&nodes[0]);
    within(10 * SOON, "noticed", || !nodes[0].fleet().unwrap().up).await;
    assert_eq!(nodes[1].state(), State::Closed);
    assert!(succeed(&nodes[1]));
    cluster.node_mut(owner).restart().await;
    cluster.settled().await;
    within(10 * SOON, "told", || all(&nodes, State::Open)).await;
}
