//! Breakers that are shared, and a Redis that fails.

mod fleet;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress_circuit_breaker::{Breaker, Sharing, State};
use buttress_core::{classify::Verdict, clock};
use buttress_redis::{
    Config, Redis,
    testing::{Server, Wire},
};
use fleet::*;

/// A handle with time limits as they are in use.
fn brisk(server: &Server) -> Redis {
    let config = Config::new(server.url())
        .timeout(ms(100))
        .connect_timeout(ms(1000));
    Redis::from_config(config).unwrap()
}

async fn brisk_nodes(server: &Server, count: usize, wait: Duration) -> Vec<Breaker> {
    let mut nodes = Vec::new();
    for _ in 0..count {
        let sharing = Sharing::new(&brisk(server));
        nodes.push(joined(node_of(sharing, "shared", opens_for(wait))).await);
    }
    nodes
}

/// The first of the nodes by way of a wire.
async fn wired(server: &Server, wire: &Wire, count: usize) -> Vec<Breaker> {
    let config = Config::new(wire.url())
        .timeout(ms(100))
        .connect_timeout(ms(1000));
    let sharing = Sharing::new(&Redis::from_config(config).unwrap());
    let first = joined(node_of(sharing, "shared", opens_for(ms(60_000)))).await;
    let mut nodes = vec![first];
    nodes.extend(brisk_nodes(server, count - 1, ms(60_000)).await);
    nodes
}

/// It was lost to a rule elsewhere that held before the word had come.
#[tokio::test]
async fn what_an_operator_forces_where_redis_is_out_of_reach_stands() {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let nodes = wired(&server, &wire, 3).await;
    wire.close();
    within(3 * SOON, "alone", || !nodes[0].fleet().unwrap().up).await;
    nodes[0].force_closed();
    tokio::time::sleep(ms(20)).await;
    trip(&nodes[1]);
    within(SOON, "open", || all(&nodes[1..], State::Open)).await;
    wire.open();
    within(3 * SOON, "forced", || all(&nodes, State::ForcedClosed)).await;
    // No rule ends it, and an operator anywhere does.
    for node in &nodes {
        fail(node);
        fail(node);
    }
    tokio::time::sleep(ms(100)).await;
    assert!(all(&nodes, State::ForcedClosed));
    nodes[2].reset();
    within(SOON, "reset", || all(&nodes, State::Closed)).await;
    trip(&nodes[1]);
    within(SOON, "open", || all(&nodes, State::Open)).await;
}

/// With a rule that held at the same time, the others waited as long as is
/// set, and so did who had been asked.
#[tokio::test]
async fn a_pause_that_was_asked_for_is_the_fleet_s() {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let nodes = wired(&server, &wire, 3).await;
    wire.stall();
    trip(&nodes[1]);
    within(SOON, "open", || all(&nodes[1..], State::Open)).await;
    fail(&nodes[0]);
    let permit = nodes[0].try_acquire().unwrap();
    permit.record_holding_off(Verdict::Failure, ms(600_000));
    assert_eq!(nodes[0].state(), State::Open);
    wire.flow();
    within(5 * SOON, "told", || {
        nodes.iter().all(|node| left(node) > ms(500_000))
    })
    .await;
}

/// Calls that never stop, and must never be refused.
struct Load {
    stop: Arc<AtomicBool>,
    refused: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<Duration>>,
}

impl Load {
    fn on(nodes: &[Breaker]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let refused = Arc::new(AtomicU64::new(0));
        let tasks = nodes
            .iter()
            .cloned()
            .map(|node| {
                let (stop, refused) = (stop.clone(), refused.clone());
                tokio::spawn(async move {
                    let mut longest = Vec::new();
                    while !stop.load(SeqCst) {
                        let began = clock::now();
                        if !succeed(&node) {
                            refused.fetch_add(1, SeqCst);
                        }
                        longest.push(clock::now() - began);
                        tokio::time::sleep(ms(1)).await;
                    }
                    longest.sort_unstable();
                    longest[longest.len() * 99 / 100]
                })
            })
            .collect();
        Self {
            stop,
            refused,
            tasks,
        }
    }

    /// How many were refused.
    async fn end(self) -> u64 {
        self.stop.store(true, SeqCst);
        for task in self.tasks {
            let p99 = task.await.unwrap();
            assert!(p99 < ms(10), "a call waited: {p99:?}");
        }
        self.refused.load(SeqCst)
    }
}

#[tokio::test]
async fn killed_and_back_with_nothing() {
    let mut server = Server::start().await;
    let nodes = brisk_nodes(&server, 3, ms(60_000)).await;
    let load = Load::on(&nodes);
    server.kill();
    within(5 * SOON, "noticed", || {
        nodes.iter().all(|node| !node.fleet().unwrap().up)
    })
    .await;
    tokio::time::sleep(ms(500)).await;
    assert_eq!(load.end().await, 0);
    // Alone, each follows its own rule.
    trip(&nodes[0]);
    nodes[1].force_open();
    nodes[1].reset();
    trip(&nodes[2]);
    tokio::time::sleep(ms(100)).await;
    nodes[2].close().unwrap();
    tokio::time::sleep(ms(200)).await;
    assert_eq!(nodes[1].state(), State::Closed);
    server.restart().await;
    // What was last is so for all: of the one that was closed by hand.
    within(5 * SOON, "reconciled", || all(&nodes, State::Closed)).await;
    trip(&nodes[0]);
    within(5 * SOON, "open", || all(&nodes, State::Open)).await;
}

#[tokio::test]
async fn what_opened_meanwhile_is_told_when_it_is_back() {
    let mut server = Server::start().await;
    let nodes = brisk_nodes(&server, 3, ms(60_000)).await;
    server.kill();
    within(5 * SOON, "noticed", || {
        nodes.iter().all(|node| !node.fleet().unwrap().up)
    })
    .await;
    trip(&nodes[1]);
    tokio::time::sleep(ms(300)).await;
    assert_eq!(nodes[0].state(), State::Closed);
    server.restart().await;
    within(5 * SOON, "open", || all(&nodes, State::Open)).await;
    // The wait is that of before.
    assert!(left(&nodes[0]) < ms(59_800));
}

#[tokio::test]
async fn stopped_for_three_seconds_under_load() {
    let server = Server::start().await;
    let nodes = brisk_nodes(&server, 3, ms(60_000)).await;
    let load = Load::on(&nodes);
    server.pause();
    tokio::time::sleep(ms(3_000)).await;
    server.resume();
    tokio::time::sleep(ms(1_000)).await;
    assert_eq!(load.end().await, 0);
    trip(&nodes[0]);
    within(5 * SOON, "open", || all(&nodes, State::Open)).await;
}

/// Without the fleet nobody waits for leave.
#[tokio::test]
async fn alone_each_probes_for_itself() {
    let mut server = Server::start().await;
    let nodes = brisk_nodes(&server, 2, ms(1_500)).await;
    trip(&nodes[0]);
    within(SOON, "open", || all(&nodes, State::Open)).await;
    server.kill();
    let before = clock::now();
    for node in &nodes {
        within(5 * SOON, "probed", || succeed(node)).await;
    }
    assert!(clock::now() - before < ms(3_000));
    assert!(all(&nodes, State::Closed));
    server.restart().await;
    let late = node(&server, "shared", opens_for(ms(1_500))).await;
    tokio::time::sleep(ms(300)).await;
    assert_eq!(late.state(), State::Closed);
    assert!(all(&nodes, State::Closed));
}

/// Nobody is there at first.
#[tokio::test]
async fn joins_when_there_is_something_to_join() {
    let mut server = Server::start().await;
    server.kill();
    let build = || node_of((&brisk(&server)).into(), "shared", opens_for(ms(60_000)));
    let (one, two) = (build(), build());
    trip(&one);
    assert!(succeed(&two));
    tokio::time::sleep(ms(300)).await;
    server.restart().await;
    within(5 * SOON, "open", || two.state() == State::Open).await;
}

#[tokio::test]
async fn scripts_may_be_forgotten() {
    let server = Server::start().await;
    let nodes = nodes(&server, 2, &opens_for(ms(60_000))).await;
    let redis = server.redis();
    trip(&nodes[0]);
    within(SOON, "open", || all(&nodes, State::Open)).await;
    run::<String>(&redis, &["SCRIPT", "FLUSH"]).await;
    nodes[1].reset();
    within(SOON, "closed", || all(&nodes, State::Closed)).await;
}

/// Subscribers that are cut off hear of what they have missed.
#[tokio::test]
async fn lost_messages_are_made_up_for() {
    let server = Server::start().await;
    let nodes = nodes(&server, 3, &opens_for(ms(60_000))).await;
    let redis = server.redis();
    for _ in 0..5 {
        let killed: u64 = run(&redis, &["CLIENT", "KILL", "TYPE", "pubsub"]).await;
        assert!(killed > 0);
        trip(&nodes[0]);
        within(2 * SOON, "open", || all(&nodes, State::Open)).await;
        nodes[2].close().unwrap();
        within(2 * SOON, "closed", || all(&nodes, State::Closed)).await;
    }
}

/// With no message at all, pulls tell: within their interval and a fifth.
#[tokio::test]
async fn pulls_alone_will_do() {
    let server = Server::with(["--rename-command", "PUBLISH", ""]).await;
    let mut nodes = Vec::new();
    for _ in 0..3 {
        let sharing = Sharing::new(&server.redis()).pull(ms(500));
        nodes.push(joined(node_of(sharing, "shared", opens_for(ms(60_000)))).await);
    }
    for _ in 0..3 {
        trip(&nodes[0]);
        within(SOON, "open", || all(&nodes, State::Open)).await;
        nodes[1].close().unwrap();
        within(SOON, "closed", || all(&nodes, State::Closed)).await;
    }
}

#[tokio::test]
async fn what_is_foreign_is_healed() {
    let server = Server::start().await;
    let mut nodes = Vec::new();
    for _ in 0..2 {
        let sharing = Sharing::new(&server.redis()).pull(ms(300));
        nodes.push(joined(node_of(sharing, "shared", opens_for(ms(60_000)))).await);
    }
    let redis = server.redis();
    let (record, index) = (
        "buttress:circuit-breaker:{default}:shared",
        "buttress:circuit-breaker:{default}",
    );
    let foreign: [&[&str]; 9] = [
        &["SET", record, "what is this"],
        &["RPUSH", record, "a", "list"],
        &["HSET", record, "v", "nan", "s", "o"],
        &["HSET", record, "v", "-7", "s", "x", "u", "inf"],
        &[
            "HSET",
            record,
            "v",
            "99999999999999999999",
            "s",
            "c",
            "u",
            "0",
            "w",
            "0",
            "t",
            "0",
            "o",
            "x",
        ],
        &["HSET", record, "unrelated", "field"],
        &["SET", index, "what is this"],
        &["ZADD", index, "inf", "junk"],
        &["ZADD", index, "-inf", "junk", "0.5", "\u{1f9f1}"],
    ];
    for (number, foreign) in foreign.iter().enumerate() {
        run::<u64>(&redis, &["DEL", record, index]).await;
        run::<buttress_redis::Value>(&redis, foreign).await;
        trip(&nodes[0]);
        within(2 * SOON, "open", || all(&nodes, State::Open)).await;
        nodes[1].close().unwrap();
        within(2 * SOON, "closed", || all(&nodes, State::Closed)).await;
        for key in [record, index] {
            let ttl: i64 = run(&redis, &["PTTL", key]).await;
            assert!(ttl > 0, "{number}: {key} has no TTL: {ttl}");
        }
    }
    // Words on the channel that are none of ours.
    let channel = "buttress:circuit-breaker:default";
    for message in ["", "x", "1 2 3", "9007199254740993 0 o x 0 key", "\u{0}"] {
        run::<u64>(&redis, &["PUBLISH", channel, message]).await;
    }
    trip(&nodes[0]);
    within(2 * SOON, "open", || all(&nodes, State::Open)).await;
}

/// A history that is lost while it is open is written anew.
#[tokio::test]
async fn what_is_lost_is_written_again() {
    let server = Server::start().await;
    let mut nodes = Vec::new();
    let build = || Sharing::new(&server.redis()).pull(ms(300));
    for _ in 0..2 {
        nodes.push(joined(node_of(build(), "shared", opens_for(ms(60_000)))).await);
    }
    trip(&nodes[0]);
    within(SOON, "open", || all(&nodes, State::Open)).await;
    let redis = server.redis();
    run::<String>(&redis, &["FLUSHALL"]).await;
    // Whichever of them is the first to notice.
    let late = joined(node_of(build(), "shared", opens_for(ms(60_000)))).await;
    within(2 * SOON, "open", || late.state() == State::Open).await;
    assert!(left(&late) <= ms(60_000));
    nodes[1].force_open();
    within(SOON, "forced", || late.state() == State::ForcedOpen).await;
    run::<String>(&redis, &["FLUSHALL"]).await;
    let later = joined(node_of(build(), "shared", opens_for(ms(60_000)))).await;
    within(2 * SOON, "forced", || later.state() == State::ForcedOpen).await;
}

/// A server that takes no writes is as good as none.
#[tokio::test]
async fn out_of_memory_is_out_of_reach() {
    let server = Server::start().await;
    let nodes = brisk_nodes(&server, 2, ms(60_000)).await;
    let redis = server.redis();
    run::<String>(&redis, &["CONFIG", "SET", "maxmemory", "1"]).await;
    trip(&nodes[0]);
    tokio::time::sleep(ms(500)).await;
    assert_eq!(nodes[1].state(), State::Closed);
    assert!(succeed(&nodes[1]));
    run::<String>(&redis, &["CONFIG", "SET", "maxmemory", "0"]).await;
    within(5 * SOON, "open", || all(&nodes, State::Open)).await;
}
