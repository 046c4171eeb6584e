//! What is logged: that the server is gone, and that it is back, once each.

use std::time::Duration;

use buttress_core::testing::Log;
use buttress_redis::{Cmd, Config, Redis, testing::Server};
use tokio::time::timeout;

#[tokio::test]
async fn coming_and_going_are_told_once() {
    let log = Log::new().target("buttress");
    let _here = log.here();

    let mut server = Server::setup().password("opensesame").start().await;
    let url = server.url();
    server.kill();
    let redis = Redis::from_config(Config::new(url)).unwrap();
    let mut ping = Cmd::new();
    ping.arg("PING");
    redis.connect().await.unwrap_err();
    for _ in 0..100 {
        redis.run::<()>("test", &ping).await.unwrap_err();
    }
    let gone: Vec<_> = log.take().iter().map(ToString::to_string).collect();
    assert_eq!(gone.len(), 1, "{gone:?}");
    let start =
        "WARN redis is gone: it is skipped until it is back error=redis connect: no connection: ";
    assert!(gone[0].starts_with(start), "{gone:?}");

    let mut watch = redis.watch();
    server.restart().await;
    let back = async { while !watch.changed().await {} };
    timeout(Duration::from_secs(5), back)
        .await
        .expect("it is back");
    assert_eq!(log.take(), ["INFO redis is back"]);

    server.cmd::<()>(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let mut set = Cmd::new();
    set.arg("SET")
        .arg("customer")
        .arg("4111")
        .arg("PX")
        .arg(1000);
    for _ in 0..20 {
        redis.run::<()>("test", &set).await.unwrap_err();
    }
    let gone: Vec<_> = log.take().iter().map(ToString::to_string).collect();
    assert_eq!(gone.len(), 1, "{gone:?}");
    assert!(
        gone[0].contains("redis test: the server cannot do it now: "),
        "{gone:?}"
    );
    for secret in ["customer", "4111", "opensesame"] {
        assert!(!gone[0].contains(secret), "{gone:?}");
    }
}
