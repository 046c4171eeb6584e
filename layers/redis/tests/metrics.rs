//! What is counted.

use std::{collections::BTreeMap, time::Duration};

use buttress_redis::{Cmd, Config, Redis, testing::Server};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tokio::time::{sleep, timeout};

/// What was counted since the last look, by name and labels: the gauge's change,
/// too, which the snapshot sets back.
fn seen(snapshotter: &Snapshotter) -> BTreeMap<String, f64> {
    let all = snapshotter.snapshot().into_vec().into_iter();
    all.map(|(key, _, described, value)| {
        assert!(described.is_some(), "{key:?} is described");
        let labels = key
            .key()
            .labels()
            .map(|label| format!("{}={}", label.key(), label.value()));
        let labels: Vec<_> = labels.collect();
        let value = match value {
            DebugValue::Counter(count) => count as f64,
            DebugValue::Gauge(value) => value.into_inner(),
            DebugValue::Histogram(values) => {
                assert!(
                    values
                        .iter()
                        .all(|it| (0.0..60.0).contains(&it.into_inner()))
                );
                values.len() as f64
            }
        };
        (
            format!("{}{{{}}}", key.key().name(), labels.join(",")),
            value,
        )
    })
    .collect()
}

#[tokio::test]
async fn all_that_is_documented_is_counted() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    recorder.install().unwrap();

    let mut server = Server::start().await;
    let redis =
        Redis::from_config(Config::new(server.url()).timeout(Duration::from_secs(1))).unwrap();
    let other = Redis::from_url(server.url()).unwrap();
    assert_eq!(
        seen(&snapshotter)["redis_connected{}"],
        0.0,
        "there before it is used"
    );

    let cmd = |words: &[&str]| {
        let mut cmd = Cmd::new();
        for word in words {
            cmd.arg(word);
        }
        cmd
    };
    redis.run::<()>("get", &cmd(&["GET", "k"])).await.unwrap();
    redis.run::<()>("get", &cmd(&["GET", "k"])).await.unwrap();
    redis.run::<()>("incr", &cmd(&["INCR"])).await.unwrap_err();
    redis
        .run::<i64>("echo", &cmd(&["ECHO", "x"]))
        .await
        .unwrap_err();
    let now = seen(&snapshotter);
    assert_eq!(now["redis_operation_duration_seconds{operation=get}"], 2.0);
    assert_eq!(now["redis_operation_duration_seconds{operation=incr}"], 1.0);
    assert_eq!(now["redis_errors_total{type=refused}"], 1.0);
    assert_eq!(now["redis_errors_total{type=answer}"], 1.0);
    assert_eq!(now["redis_connected{}"], 1.0);
    other.connect().await.unwrap();
    assert_eq!(seen(&snapshotter)["redis_connected{}"], 1.0, "two, that is");
    drop(other);
    assert_eq!(gone(&snapshotter).await, 1);

    server.kill();
    while redis.is_up() {
        let _ = redis.run::<()>("get", &cmd(&["GET", "k"])).await;
    }
    assert_eq!(gone(&snapshotter).await, 1);
    for _ in 0..10 {
        redis
            .run::<()>("get", &cmd(&["GET", "k"]))
            .await
            .unwrap_err();
    }
    let now = seen(&snapshotter);
    assert_eq!(now["redis_errors_total{type=gone}"], 10.0);
    assert!(
        now.get("redis_operation_duration_seconds{operation=get}")
            .is_none_or(|&count| count == 0.0),
        "what is not tried takes no time"
    );
    sleep(Duration::from_millis(600)).await;
    assert!(
        seen(&snapshotter)["redis_errors_total{type=connection}"] >= 2.0,
        "the probes"
    );

    server.restart().await;
    let back = async { while redis.connect().await.is_err() {} };
    timeout(Duration::from_secs(5), back)
        .await
        .expect("it is back");
    assert_eq!(seen(&snapshotter)["redis_connected{}"], 1.0);
    drop(redis);
    assert_eq!(gone(&snapshotter).await, 1);
}

/// How many connections have gone since the last look: at least one.
async fn gone(snapshotter: &Snapshotter) -> u64 {
    for _ in 0..500 {
        let change = seen(snapshotter)["redis_connected{}"];
        if change != 0.0 {
            return -change as u64;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("a connection that is closed is still counted");
}
