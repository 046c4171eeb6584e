//! The test kit itself: does it do what it says?

use std::time::Duration;

use buttress_core::clock;
use buttress_redis::{
    Cmd, ErrorKind,
    testing::{Cluster, Server, Wire},
};

fn set(key: &str) -> Cmd {
    let mut cmd = Cmd::new();
    cmd.arg("SET").arg(key).arg(1).arg("PX").arg(60_000);
    cmd
}

#[tokio::test]
async fn a_server_counts_what_it_is_asked() {
    let server = Server::start().await;
    let redis = server.redis();
    redis.connect().await.unwrap();
    let before = server.calls().await;
    for _ in 0..7 {
        redis.run::<()>("test", &set("k")).await.unwrap();
    }
    assert_eq!(server.calls().await - before, 7);
    assert_eq!(server.scripts().await, 0);
    server.cmd::<i64>(&["EVAL", "return 1", "0"]).await;
    assert_eq!(server.scripts().await, 1);
    assert!(server.cpu().await > Duration::ZERO);
    let error = server.try_cmd::<()>(&["INCR"]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
}

#[tokio::test]
async fn a_replica_follows_until_it_is_promoted() {
    let master = Server::setup().password("opensesame").start().await;
    let replica = Server::setup().password("opensesame").start().await;
    master.cmd::<()>(&["SET", "k", "v"]).await;
    replica.replica_of(&master).await;
    assert_eq!(replica.cmd::<String>(&["GET", "k"]).await, "v");
    let error = replica.try_cmd::<()>(&["SET", "k", "w"]).await.unwrap_err();
    assert_eq!(error.code(), Some("READONLY"));
    replica.promote().await;
    replica.cmd::<()>(&["SET", "k", "w"]).await;
}

#[tokio::test]
async fn a_cluster_has_all_slots_and_moves_them() {
    let cluster = Cluster::start().await;
    let redis = cluster.redis();
    let keys = redis.keyspace("test");
    for key in ["a", "b", "c", "d", "e", "f"].map(|name| keys.tag([name])) {
        redis.run::<()>("test", &set(key.as_str())).await.unwrap();
    }
    let key = keys.tag(["a"]);
    let from = cluster.owner(&key).await;
    let to = (from + 1) % 3;
    cluster.move_slot(&key, to).await;
    assert_eq!(cluster.owner(&key).await, to);
    let there: i64 = cluster.nodes()[to].cmd(&["EXISTS", key.as_str()]).await;
    assert_eq!(there, 1);
    cluster.settled().await;
}

#[tokio::test]
async fn a_wire_delays_stalls_and_cuts() {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let redis = wire.redis();
    redis.run::<()>("test", &set("k")).await.unwrap();

    wire.delay(Duration::from_millis(60));
    let began = clock::now();
    redis.run::<()>("test", &set("k")).await.unwrap();
    assert!(clock::now() - began >= Duration::from_millis(60));
    wire.delay(Duration::ZERO);

    wire.stall();
    let command = set("k");
    let mut waiting = std::pin::pin!(redis.run::<()>("test", &command));
    let waited = tokio::time::timeout(Duration::from_millis(60), &mut waiting);
    assert!(waited.await.is_err());
    wire.flow();
    waiting.await.unwrap();

    wire.cut_after(3);
    let error = redis.run::<()>("test", &set("k")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connection);
    redis.run::<()>("test", &set("k")).await.unwrap();
}

#[tokio::test]
async fn a_server_may_want_a_user_and_listen_on_a_socket() {
    let server = Server::setup()
        .user("app", "opensesame")
        .unix_socket()
        .start()
        .await;
    server.redis().run::<()>("test", &set("k")).await.unwrap();
    let redis = buttress_redis::Redis::from_url(server.unix_url()).unwrap();
    redis.run::<()>("test", &set("k")).await.unwrap();
}
