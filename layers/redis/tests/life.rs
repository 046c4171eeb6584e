//! The connection's life: who keeps it, and when it ends.

use std::time::Duration;

use buttress_core::clock;
use buttress_redis::{Cmd, Config, ErrorKind, Redis, testing::Server};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    time::{sleep, timeout},
};

const MS: Duration = Duration::from_millis(1);

fn cmd(words: &[&str]) -> Cmd {
    let mut cmd = Cmd::new();
    for word in words {
        cmd.arg(word);
    }
    cmd
}

fn set(key: &str) -> Cmd {
    cmd(&["SET", key, "1", "PX", "60000"])
}

fn runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn a_runtime_that_ends_takes_only_its_connection_with_it() {
    let home = runtime();
    let server = home.block_on(Server::start());
    let redis = home.block_on(async { server.redis() });
    for _ in 0..3 {
        let other = runtime();
        other.block_on(redis.run::<()>("test", &set("k"))).unwrap();
        other.shutdown_timeout(Duration::from_secs(5));
    }
    // Also for those who wait, in another runtime, for what it was making.
    server.pause();
    let other = runtime();
    let _gone = other.spawn({
        let redis = redis.clone();
        async move { redis.connect().await }
    });
    home.block_on(async {
        sleep(100 * MS).await;
        let command = set("k");
        let mut waits = std::pin::pin!(redis.run::<()>("test", &command));
        assert!(timeout(50 * MS, &mut waits).await.is_err());
        other.shutdown_background();
        server.resume();
        let began = clock::now();
        waits.await.unwrap();
        assert!(clock::now() - began < 4000 * MS, "not by its time limit");
    });
    home.block_on(async { drop(server) });
}

#[tokio::test]
async fn the_last_handle_takes_all_with_it() {
    let server = Server::start().await;
    let alive = || Handle::current().metrics().num_alive_tasks();
    let before = alive();
    for gone in [false, true] {
        let redis = server.redis();
        redis.run::<()>("test", &set("k")).await.unwrap();
        let clients: i64 = server.info("clients").await["connected_clients"]
            .parse()
            .unwrap();
        assert_eq!(clients, 2, "ours, and the one that asks");
        if gone {
            server.pause();
            // An answer is due that will not come.
            let set = set("k");
            let asked = redis.run::<()>("test", &set);
            assert!(timeout(20 * MS, asked).await.is_err());
            let hasty = Redis::from_config(Config::new(server.url()).timeout(20 * MS)).unwrap();
            hasty.connect().await.unwrap_err();
            let mut watch = hasty.watch();
            while hasty.is_up() {
                watch.changed().await;
            }
        }
        drop(redis);
        let began = clock::now();
        while alive() > before {
            assert!(
                clock::now() - began < 5000 * MS,
                "{} tasks are left",
                alive() - before
            );
            sleep(MS).await;
        }
    }
    server.resume();
}

#[tokio::test]
async fn all_share_one_connection() {
    let server = Server::start().await;
    let redis = server.redis();
    let sets: Vec<_> = (0..500).map(|n| set(&n.to_string())).collect();
    let all = sets.iter().map(|set| {
        let redis = redis.clone();
        async move { redis.run::<()>("test", set).await }
    });
    for result in futures_util::future::join_all(all).await {
        result.unwrap();
    }
    let clients: i64 = server.info("clients").await["connected_clients"]
        .parse()
        .unwrap();
    assert_eq!(clients, 2, "ours, and the one that asks");
}

#[tokio::test]
async fn what_the_server_refuses_is_no_outage() {
    let server = Server::start().await;
    let redis = server.redis();
    redis
        .run::<()>("test", &cmd(&["SET", "text", "abc"]))
        .await
        .unwrap();
    for _ in 0..5 {
        let error = redis
            .run::<i64>("test", &cmd(&["LPUSH", "text", "x"]))
            .await
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.code()),
            (ErrorKind::Refused, Some("WRONGTYPE"))
        );
        let error = redis
            .run::<i64>("test", &cmd(&["GET", "text"]))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Answer);
        let error = redis
            .run::<i64>("test", &cmd(&["EVAL", "error('x')", "0"]))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
    }
    assert!(redis.is_up());
    assert_eq!(
        redis
            .run::<String>("test", &cmd(&["GET", "text"]))
            .await
            .unwrap(),
        "abc"
    );
}

#[tokio::test]
async fn callers_who_do_not_wait_are_no_outage() {
    let server = Server::start().await;
    let redis = server.redis();
    redis.connect().await.unwrap();
    server.pause();
    for _ in 0..10 {
        let set = set("k");
        let asked = redis.run::<()>("test", &set);
        assert!(timeout(5 * MS, asked).await.is_err());
    }
    assert!(redis.is_up());
    server.resume();
    redis.run::<()>("test", &set("k")).await.unwrap();
}

#[tokio::test]
async fn what_blocks_has_a_connection_of_its_own() {
    let server = Server::start().await;
    let redis = server.redis();
    let mut dedicated = redis.dedicated().await.unwrap();
    let pop = cmd(&["BLPOP", "list", "0"]);
    let blocked = dedicated.run::<(String, String)>("test", &pop, 5000 * MS);
    let pushed = async {
        for _ in 0..20 {
            redis.run::<()>("test", &set("k")).await.unwrap();
        }
        redis
            .run::<i64>("test", &cmd(&["RPUSH", "list", "x"]))
            .await
            .unwrap();
    };
    let (popped, ()) = tokio::join!(blocked, pushed);
    assert_eq!(popped.unwrap().1, "x");
    let error = dedicated
        .run::<()>("test", &pop, 20 * MS)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
}
