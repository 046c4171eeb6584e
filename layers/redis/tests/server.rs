//! Against a real server: what comes back, and what happens when it is gone.

use std::time::Duration;

use buttress_core::clock;
use buttress_redis::{Cmd, ErrorKind, Notice, Redis, Script, testing::Server};

fn set(key: &str) -> Cmd {
    let mut cmd = Cmd::new();
    cmd.arg("SET").arg(key).arg(1).arg("PX").arg(60_000);
    cmd
}

#[tokio::test]
async fn a_script_runs_also_after_the_server_has_forgotten_it() {
    let server = Server::start().await;
    let redis = server.redis();
    let script = Script::new("return redis.call('INCRBY', KEYS[1], ARGV[1])");
    let key = redis.keyspace("test").tag(["a", "2001:db8::1"]);
    assert_eq!(key.as_str(), "buttress:test:{a:2001%3Adb8%3A%3A1}");
    let call = script.on([&key]).arg(2);
    assert_eq!(redis.call::<i64>("test", &call).await.unwrap(), 2);
    let mut flush = Cmd::new();
    flush.arg("SCRIPT").arg("FLUSH");
    redis.run::<()>("test", &flush).await.unwrap();
    assert_eq!(redis.call::<i64>("test", &call).await.unwrap(), 4);
}

#[tokio::test]
async fn a_stopped_server_costs_three_timeouts_and_then_nothing() {
    let server = Server::start().await;
    let config = buttress_redis::Config::new(server.url()).timeout(Duration::from_millis(50));
    let redis = Redis::from_config(config).unwrap();
    redis.connect().await.unwrap();
    server.pause();
    for _ in 0..3 {
        let error = redis.run::<()>("test", &set("k")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
    }
    let began = clock::now();
    for _ in 0..1000 {
        let error = redis.run::<()>("test", &set("k")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone);
    }
    assert!(clock::now() - began < Duration::from_millis(50));
    server.resume();
    let mut watch = redis.watch();
    while !redis.is_up() {
        watch.changed().await;
    }
    redis.run::<()>("test", &set("k")).await.unwrap();
}

#[tokio::test]
async fn a_killed_server_is_found_again() {
    let mut server = Server::start().await;
    let redis = server.redis();
    let mut messages = redis.subscribe("news");
    assert_eq!(messages.next().await, Notice::Listening);
    redis.run::<()>("test", &set("k")).await.unwrap();
    server.kill();
    while redis.is_up() {
        let _ = redis.run::<()>("test", &set("k")).await;
    }
    server.restart().await;
    let began = clock::now();
    while redis.run::<()>("test", &set("k")).await.is_err() {
        tokio::task::yield_now().await;
    }
    assert!(clock::now() - began < Duration::from_secs(5));
    assert_eq!(messages.next().await, Notice::Listening);
    let mut publish = Cmd::new();
    publish.arg("PUBLISH").arg("news").arg("hello");
    assert_eq!(redis.run::<i64>("test", &publish).await.unwrap(), 1);
    assert_eq!(messages.next().await, Notice::Message(b"hello".to_vec()));
}
