//! Values against a real server: what is refused, and what becomes of foreign
//! ones.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use buttress_redis::{
    Change, Cmd, ErrorKind, FencedError, FencingToken, JsonError, Key, Redis, Version,
    testing::Server,
};
use proptest::{
    prelude::*,
    test_runner::{Config as Cases, TestRunner},
};

const LONG: Duration = Duration::from_secs(60);

fn cmd<const N: usize>(parts: [&str; N]) -> Cmd {
    let mut cmd = Cmd::new();
    for part in parts {
        cmd.arg(part);
    }
    cmd
}

async fn run<const N: usize>(redis: &Redis, parts: [&str; N]) -> i64 {
    redis.run("test", &cmd(parts)).await.unwrap()
}

async fn order<const N: usize>(redis: &Redis, parts: [&str; N]) {
    redis.run::<()>("test", &cmd(parts)).await.unwrap();
}

fn key_of(redis: &Redis, name: &str) -> Key {
    redis.keyspace("app").tag([name])
}

const fn token(token: u64) -> FencingToken {
    FencingToken::new(token)
}

#[tokio::test]
async fn older_tokens_are_refused() {
    let server = Server::start().await;
    let redis = server.redis();
    let key = key_of(&redis, "x");
    assert_eq!(redis.fenced_get(&key).await.unwrap(), None);
    // As text "9" is greater than "10", and as a double the last two are one.
    for number in [0, 9, 10, 1 << 53, (1 << 53) + 1, u64::MAX - 1, u64::MAX] {
        redis
            .fenced_set(&key, number.to_string(), token(number), LONG)
            .await
            .unwrap();
        let there = redis.fenced_get(&key).await.unwrap().unwrap();
        assert_eq!(there.token, Some(token(number)));
        assert_eq!(there.data, number.to_string().into_bytes());
        // The same again passes, one less does not.
        redis
            .fenced_set(&key, "again", token(number), LONG)
            .await
            .unwrap();
        if let Some(older) = number.checked_sub(1).filter(|older| *older > 0) {
            let refused = redis.fenced_set(&key, "late", token(older), LONG).await;
            let Err(FencedError::Outdated { newer }) = refused else {
                panic!("{refused:?}")
            };
            assert_eq!(newer, token(number));
        }
        let there = redis.fenced_get(&key).await.unwrap().unwrap();
        assert_eq!(there.data, b"again");
    }
}

#[tokio::test]
async fn a_token_outlives_its_value() {
    let server = Server::start().await;
    let redis = server.redis();
    let key = key_of(&redis, "x");
    redis.fenced_set(&key, "a", token(2), LONG).await.unwrap();
    let day = 24 * 3600 * 1000;
    let of_value = run(&redis, ["PTTL", key.as_str()]).await;
    let fence = key.clone().segment("fence");
    let of_token = run(&redis, ["PTTL", fence.as_str()]).await;
    assert!((1..=60_000).contains(&of_value), "{of_value}");
    assert!((day..=day + 60_000).contains(&of_token), "{of_token}");
    // Its end.
    run(&redis, ["DEL", key.as_str()]).await;
    assert_eq!(redis.fenced_get(&key).await.unwrap(), None);
    assert!(redis.fenced_set(&key, "b", token(1), LONG).await.is_err());
    redis.fenced_set(&key, "c", token(2), LONG).await.unwrap();
}

#[tokio::test]
async fn foreign_tokens_and_values_are_healed() {
    let server = Server::start().await;
    let redis = server.redis();
    let key = key_of(&redis, "x");
    let fence = key.clone().segment("fence");
    for made in [
        ["SET", fence.as_str(), "zzz"],
        ["SET", fence.as_str(), "999999999999999999999"],
        ["SET", fence.as_str(), "007"],
        ["LPUSH", fence.as_str(), "1"],
        ["LPUSH", key.as_str(), "1"],
    ] {
        order(&redis, ["FLUSHALL"]).await;
        order(&redis, made).await;
        assert_eq!(redis.fenced_get(&key).await.unwrap(), None);
        redis.fenced_set(&key, "a", token(1), LONG).await.unwrap();
        let there = redis.fenced_get(&key).await.unwrap().unwrap();
        assert_eq!((there.token, &*there.data), (Some(token(1)), &b"a"[..]));
    }
}

#[tokio::test]
async fn a_change_is_made_of_what_was_read() {
    let server = Server::start().await;
    let redis = server.redis();
    let key = key_of(&redis, "x");
    assert_eq!(redis.get_versioned(&key).await.unwrap(), None);
    let none = redis.update_if_version(&key, Version::new(1), "a", LONG);
    assert_eq!(none.await.unwrap(), Change::Refused(None));

    let first = redis.create_if_absent(&key, "one", LONG).await.unwrap();
    let first = first.done().unwrap();
    let again = redis.create_if_absent(&key, "two", LONG).await.unwrap();
    let Change::Refused(Some(there)) = again else {
        panic!("{again:?}")
    };
    assert_eq!((there.version, &*there.data), (first, &b"one"[..]));

    let second = redis.update_if_version(&key, first, "two", LONG).await;
    let second = second.unwrap().done().unwrap();
    assert!(second > first);
    let late = redis.update_if_version(&key, first, "three", LONG).await;
    let Change::Refused(Some(there)) = late.unwrap() else {
        panic!("it was outdated")
    };
    assert_eq!((there.version, &*there.data), (second, &b"two"[..]));
    assert_eq!(redis.get_versioned(&key).await.unwrap(), Some(there));
    assert!((1..=60_000).contains(&run(&redis, ["PTTL", key.as_str()]).await));

    // What was read before the end is worth nothing after it.
    run(&redis, ["DEL", key.as_str()]).await;
    let anew = redis.create_if_absent(&key, [0, 255], LONG).await.unwrap();
    assert!(anew.done().unwrap() > second);
    let late = redis.update_if_version(&key, second, "four", LONG).await;
    assert!(matches!(late.unwrap(), Change::Refused(Some(_))));
    let there = redis.get_versioned(&key).await.unwrap().unwrap();
    assert_eq!(there.data, [0, 255]);
}

#[tokio::test]
async fn a_foreign_value_is_not_overwritten() {
    let server = Server::start().await;
    let redis = server.redis();
    let key = key_of(&redis, "x");
    for made in [
        &["SET", key.as_str(), "mine"][..],
        &["LPUSH", key.as_str(), "mine"],
        &["HSET", key.as_str(), "mine", "1"],
        &["HSET", key.as_str(), "v", "one", "d", "1"],
        &["HSET", key.as_str(), "v", "1"],
    ] {
        order(&redis, ["FLUSHALL"]).await;
        let mut cmd = Cmd::new();
        cmd.arg(made);
        redis.run::<()>("test", &cmd).await.unwrap();
        let before: Vec<u8> = redis
            .run("test", &self::cmd(["DUMP", key.as_str()]))
            .await
            .unwrap();
        let error = redis.create_if_absent(&key, "a", LONG).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{made:?}");
        assert_eq!(error.code(), Some("FOREIGN"));
        let update = redis.update_if_version(&key, Version::new(1), "a", LONG);
        assert_eq!(update.await.unwrap_err().code(), Some("FOREIGN"));
        let after: Vec<u8> = redis
            .run("test", &self::cmd(["DUMP", key.as_str()]))
            .await
            .unwrap();
        assert_eq!(before, after);
        assert!(redis.is_up(), "a foreign value is no outage");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_who_count_none_is_lost() {
    let server = Server::start().await;
    let redis = server.redis();
    let key = key_of(&redis, "x");
    let _ = redis.create_if_absent(&key, "0", LONG).await.unwrap();
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (redis, key) = (redis.clone(), key.clone());
            tokio::spawn(async move {
                let mut there = redis.get_versioned(&key).await.unwrap().unwrap();
                for _ in 0..5 {
                    loop {
                        let count: u32 = str::from_utf8(&there.data).unwrap().parse().unwrap();
                        let count = (count + 1).to_string();
                        let update = redis.update_if_version(&key, there.version, &count, LONG);
                        match update.await.unwrap() {
                            Change::Done(version) => {
                                there.version = version;
                                there.data = count.into();
                                break;
                            }
                            Change::Refused(now) => there = now.unwrap(),
                        }
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let there = redis.get_versioned(&key).await.unwrap().unwrap();
    assert_eq!(there.data, b"40");
}

/// On a connection of its own: the shared one is not there before a write goes
/// through.
fn own_all_slots(server: &Server) {
    let mut stream = TcpStream::connect(("127.0.0.1", server.port())).unwrap();
    for first in (0..16_384_u32).step_by(1024) {
        let slots = first..first + 1024;
        let slots: String = slots.map(|slot| format!(" {slot}")).collect();
        write!(stream, "CLUSTER ADDSLOTS{slots}\r\n").unwrap();
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+OK\r\n");
    }
}

/// A server that has all slots refuses what has keys of two.
#[tokio::test]
async fn in_a_cluster_their_keys_are_of_one_slot() {
    let server = Server::with(["--cluster-enabled", "yes"]).await;
    let redis = server.redis();
    own_all_slots(&server);
    let ping = cmd(["SET", "ping", "1", "PX", "1"]);
    let whole = async {
        while redis.run::<()>("test", &ping).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, whole).await.unwrap();
    for name in ["x", "y:{z}", "", "}{"] {
        let key = key_of(&redis, name).segment("part");
        redis.fenced_set(&key, "a", token(1), LONG).await.unwrap();
        assert!(redis.fenced_get(&key).await.unwrap().is_some());
        let key = key.segment("other");
        let made = redis.create_if_absent(&key, "a", LONG).await.unwrap();
        let version = made.done().unwrap();
        let made = redis.update_if_version(&key, version, "b", LONG).await;
        assert!(made.unwrap().done().is_some());
    }
}

#[tokio::test]
async fn json_comes_back() {
    let server = Server::start().await;
    let redis = server.redis();
    let key = key_of(&redis, "x");
    assert_eq!(redis.get_json::<u8>(&key).await.unwrap(), None);
    let value = HashMap::from([("a".to_owned(), vec![1, 2]), ("b".to_owned(), vec![])]);
    redis.set_json(&key, &value, LONG).await.unwrap();
    assert_eq!(redis.get_json(&key).await.unwrap(), Some(value));
    assert!((1..=60_000).contains(&run(&redis, ["PTTL", key.as_str()]).await));
    let error = redis.get_json::<u8>(&key).await.unwrap_err();
    assert!(matches!(error, JsonError::Json(_)), "{error:?}");
    // A map whose keys are no text cannot be JSON: nothing is sent.
    let odd = HashMap::from([((1, 2), 3)]);
    let error = redis.set_json(&key, &odd, LONG).await.unwrap_err();
    assert!(matches!(error, JsonError::Json(_)), "{error:?}");
    order(&redis, ["DEL", key.as_str()]).await;
    order(&redis, ["LPUSH", key.as_str(), "1"]).await;
    let error = redis.get_json::<u8>(&key).await.unwrap_err();
    assert!(matches!(error, JsonError::Redis(_)), "{error:?}");
}

#[derive(Clone, Debug)]
enum Op {
    FencedSet(u64, u8),
    Create(u8),
    /// With the version that is there, or with an older one.
    Update(bool, u8),
    End,
    ScriptFlush,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (prop_oneof![1..20_u64, (1_u64 << 53)..(1 << 53) + 4], any::<u8>())
            .prop_map(|(token, data)| Op::FencedSet(token, data)),
        2 => any::<u8>().prop_map(Op::Create),
        4 => (any::<bool>(), any::<u8>()).prop_map(|(new, data)| Op::Update(new, data)),
        1 => Just(Op::End),
        1 => Just(Op::ScriptFlush),
    ]
}

/// Random operations against a model.
#[test]
fn as_the_model_has_it() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(Server::start());
    let redis = server.redis();
    let mut runner = TestRunner::new(Cases {
        cases: 60,
        failure_persistence: None,
        ..Cases::default()
    });
    let checked = runner.run(&prop::collection::vec(op(), 1..40), |ops| {
        runtime.block_on(check(&redis, &ops))
    });
    if let Err(error) = checked {
        panic!("{error}");
    }
}

async fn check(redis: &Redis, ops: &[Op]) -> Result<(), TestCaseError> {
    order(redis, ["FLUSHALL"]).await;
    let (fenced, versioned) = (key_of(redis, "fenced"), key_of(redis, "versioned"));
    let mut greatest = 0;
    let mut fenced_data: Option<u8> = None;
    let mut there: Option<(Version, u8)> = None;
    let mut old = Version::new(1);
    for op in ops {
        match *op {
            Op::FencedSet(number, data) => {
                let set = redis.fenced_set(&fenced, [data], token(number), LONG).await;
                prop_assert_eq!(set.is_ok(), number >= greatest);
                if set.is_ok() {
                    (greatest, fenced_data) = (number, Some(data));
                }
            }
            Op::Create(data) => {
                let made = redis
                    .create_if_absent(&versioned, [data], LONG)
                    .await
                    .unwrap();
                match (made, there) {
                    (Change::Done(version), None) => {
                        prop_assert!(version > old);
                        there = Some((version, data));
                    }
                    (Change::Refused(Some(told)), Some((version, data))) => {
                        prop_assert_eq!((told.version, told.data), (version, vec![data]));
                    }
                    other => return Err(TestCaseError::fail(format!("{other:?}"))),
                }
            }
            Op::Update(new, data) => {
                let with = there.filter(|_| new).map_or(old, |(version, _)| version);
                let made = redis
                    .update_if_version(&versioned, with, [data], LONG)
                    .await
                    .unwrap();
                match (made, there.filter(|_| new)) {
                    (Change::Done(version), Some((before, _))) => {
                        prop_assert!(version > before);
                        old = before;
                        there = Some((version, data));
                    }
                    (Change::Refused(told), None) => {
                        let told = told.map(|told| (told.version, told.data));
                        let there = there.map(|(version, data)| (version, vec![data]));
                        prop_assert_eq!(told, there);
                    }
                    other => return Err(TestCaseError::fail(format!("{other:?}"))),
                }
            }
            Op::End => {
                run(redis, ["DEL", fenced.as_str(), versioned.as_str()]).await;
                fenced_data = None;
                if let Some((version, _)) = there.take() {
                    old = version;
                }
            }
            Op::ScriptFlush => order(redis, ["SCRIPT", "FLUSH"]).await,
        }
        let told = redis.fenced_get(&fenced).await.unwrap();
        prop_assert_eq!(
            told.map(|told| told.data),
            fenced_data.map(|data| vec![data])
        );
    }
    Ok(())
}
