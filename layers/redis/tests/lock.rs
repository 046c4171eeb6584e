//! Locks against a real server: one holds, tokens grow, whatever is lost.

use std::{
    collections::HashMap,
    future::Future,
    io::{Read, Write},
    net::TcpStream,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Waker},
    time::Duration,
};

use buttress_core::clock;
use buttress_redis::{
    Cmd, Config, ErrorKind, FencingToken, Key, Lock, LockError, Redis,
    testing::{Server, Wire},
};
use proptest::{
    prelude::*,
    test_runner::{Config as Cases, TestRunner},
};
use tokio::time::{sleep, timeout};

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
    redis.keyspace("lock").tag([name])
}

/// Within a time that is long enough for any machine.
async fn eventually(mut is_so: impl AsyncFnMut() -> bool) {
    let all = async {
        while !is_so().await {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(LONG, all).await.expect("it never was so");
}

async fn is_free(redis: &Redis, name: &str) -> bool {
    run(redis, ["EXISTS", key_of(redis, name).as_str()]).await == 0
}

#[tokio::test]
async fn one_holds_it_until_it_is_given_back() {
    let server = Server::start().await;
    let (ours, theirs) = (server.redis(), server.redis());
    let lock = ours.lock("a:{b}").ttl(LONG).take().await.unwrap();
    assert!(lock.is_held());
    assert_eq!(lock.owner().len(), 32);
    // From the question on, less what clocks may differ by.
    let left = lock.valid_until() - clock::now();
    assert!(left <= LONG * 99 / 100, "{left:?}");
    assert!(left > LONG / 2, "{left:?}");

    let error = theirs.lock("a:{b}").take().await.unwrap_err();
    let LockError::Busy { left } = error else {
        panic!("{error:?}")
    };
    assert!(left <= LONG && left > LONG / 2, "{left:?}");
    // Another name is another lock, and so is one of two parts.
    drop(theirs.lock("a").take().await.unwrap());
    drop(theirs.lock_of(["a", "{b}"]).take().await.unwrap());

    let token = lock.token();
    lock.release().await.unwrap();
    let next = theirs.lock("a:{b}").take().await.unwrap();
    assert!(next.token() > token);
}

#[tokio::test]
async fn everything_has_the_prefix_and_an_end_but_the_fence() {
    let server = Server::start().await;
    let config = Config::new(server.url())
        .key_prefix("shop:")
        .timeout(Duration::from_secs(5));
    let redis = Redis::from_config(config).unwrap();
    let lock = redis.lock("x").ttl(LONG).take().await.unwrap();
    let ttl = run(&redis, ["PTTL", "shop:lock:{x}"]).await;
    assert!((1..=60_000).contains(&ttl), "{ttl}");
    assert_eq!(run(&redis, ["PTTL", "shop:lock:{x}:fence"]).await, -1);
    let told: u64 = redis
        .run("test", &cmd(["GET", "shop:lock:{x}:fence"]))
        .await
        .unwrap();
    assert_eq!(told, lock.token().get());

    let _kept = redis.lock("y").keep_fence(LONG).take().await.unwrap();
    let ttl = run(&redis, ["PTTL", "shop:lock:{y}:fence"]).await;
    assert!((1..=60_000).contains(&ttl), "{ttl}");
    let keys: Vec<String> = redis.run("test", &cmd(["KEYS", "*"])).await.unwrap();
    assert!(keys.iter().all(|key| key.starts_with("shop:")), "{keys:?}");
}

#[tokio::test]
async fn a_dropped_one_is_given_back_in_the_background() {
    let server = Server::start().await;
    let redis = server.redis();
    let lock = redis.lock("x").ttl(LONG).take().await.unwrap();
    let validity = lock.validity();
    assert!(validity.is_held());
    // From a thread that is of no runtime, too.
    std::thread::spawn(|| drop(lock)).join().unwrap();
    assert!(!validity.is_held());
    timeout(LONG, validity.lost()).await.unwrap();
    eventually(async || is_free(&redis, "x").await).await;
}

#[tokio::test]
async fn a_question_that_nobody_waits_for_leaves_nothing() {
    let server = Server::start().await;
    let redis = server.redis();
    redis.connect().await.unwrap();
    let builder = redis.lock("x").ttl(LONG);
    for polls in 1..20 {
        {
            let mut take = pin!(builder.take());
            for _ in 0..polls {
                let mut cx = Context::from_waker(Waker::noop());
                if take.as_mut().poll(&mut cx).is_ready() {
                    break;
                }
                sleep(Duration::from_micros(300)).await;
            }
        }
        // Were it left behind it would be for a minute.
        let taken = builder.clone().wait(LONG / 4).take().await.unwrap();
        taken.release().await.unwrap();
    }
}

#[tokio::test]
async fn a_dropped_release_and_a_dropped_extension_do_no_harm() {
    let server = Server::start().await;
    let redis = server.redis();
    let lock = redis.lock("x").ttl(LONG).take().await.unwrap();
    {
        let mut shorter = pin!(lock.extend(LONG / 2));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(shorter.as_mut().poll(&mut cx).is_pending());
    }
    // It may have been sent: the lesser counts.
    assert!(lock.valid_until() - clock::now() < LONG / 2);
    lock.extend(LONG).await.unwrap();
    assert!(lock.valid_until() - clock::now() > LONG / 2);
    {
        let mut release = pin!(lock.release());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(release.as_mut().poll(&mut cx).is_pending());
    }
    eventually(async || is_free(&redis, "x").await).await;
}

#[tokio::test]
async fn only_its_owner_extends_and_releases_it() {
    let server = Server::start().await;
    let redis = server.redis();
    let ours = redis.lock("x").ttl(LONG).take().await.unwrap();
    // The lease is over and somebody else has it; we do not know.
    let key = key_of(&redis, "x");
    run(&redis, ["DEL", key.as_str()]).await;
    let theirs = redis.lock("x").ttl(LONG).take().await.unwrap();
    assert!(theirs.token() > ours.token());
    assert!(ours.is_held(), "as far as it can know");

    let told = ours.validity();
    assert!(matches!(ours.extend(LONG).await, Err(LockError::Lost)));
    assert!(!ours.is_held());
    timeout(LONG, told.lost()).await.unwrap();
    assert!(matches!(ours.release().await, Err(LockError::Lost)));
    assert!(!is_free(&redis, "x").await);
    theirs.extend(LONG).await.unwrap();
    theirs.release().await.unwrap();
    assert!(is_free(&redis, "x").await);
}

#[tokio::test]
async fn a_lease_ends_by_itself_and_its_holder_knows_first() {
    let server = Server::start().await;
    let redis = server.redis();
    let began = clock::now();
    let lease = Duration::from_millis(500);
    let lock = redis.lock("x").ttl(lease).take().await.unwrap();
    let sent = clock::now();
    assert!(lock.valid_until() <= sent + lease);
    lock.lost().await;
    assert!(!lock.is_held());
    // Never later than the server, which began to count after we did.
    assert!(lock.valid_until() < began + lease + (sent - began));
    // As after a crash: nobody gives it back.
    std::mem::forget(lock);
    let next = redis.lock("x").wait(LONG).take().await.unwrap();
    assert!(clock::now() - began >= lease - Duration::from_millis(1));
    next.release().await.unwrap();
}

#[tokio::test]
async fn who_waits_gets_it_or_is_told_in_time() {
    let server = Server::start().await;
    let redis = server.redis();
    let held = redis.lock("x").ttl(LONG).take().await.unwrap();
    let wait = Duration::from_millis(120);
    let began = clock::now();
    let error = redis.lock("x").wait(wait).take().await.unwrap_err();
    assert!(matches!(error, LockError::Busy { .. }), "{error:?}");
    assert!(clock::now() - began >= wait);

    let waiting = redis.lock("x").wait(LONG);
    let waiting = tokio::spawn(async move { waiting.take().await });
    sleep(Duration::from_millis(20)).await;
    let token = held.token();
    held.release().await.unwrap();
    assert!(waiting.await.unwrap().unwrap().token() > token);
}

#[tokio::test]
async fn a_lease_that_makes_no_sense_is_not_asked_for() {
    let redis = Redis::from_url("redis://127.0.0.1:1").unwrap();
    for ttl in [Duration::ZERO, Duration::from_millis(9), Duration::MAX] {
        let error = redis.lock("x").ttl(ttl).take().await.unwrap_err();
        assert!(matches!(error, LockError::Ttl), "{error:?}");
    }
}

/// Each by one of three handles, as of three processes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_fifty_at_once_one_holds() {
    let server = Server::start().await;
    let handles = [server.redis(), server.redis(), server.redis()];
    let tasks: Vec<_> = (0..50)
        .map(|n| {
            let builder = handles[n % 3].lock("x").ttl(LONG);
            tokio::spawn(async move { builder.take().await })
        })
        .collect();
    let mut held = Vec::new();
    for task in tasks {
        match task.await.unwrap() {
            Ok(lock) => held.push(lock),
            Err(LockError::Busy { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    assert_eq!(held.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_in_turn_are_never_two() {
    let server = Server::start().await;
    let handles = [server.redis(), server.redis(), server.redis()];
    let inside = Arc::new(AtomicBool::new(false));
    let last = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..50)
        .map(|n| {
            let builder = handles[n % 3].lock("x").ttl(LONG).wait(LONG);
            let builder = builder.every(Duration::from_millis(20));
            let (inside, last) = (Arc::clone(&inside), Arc::clone(&last));
            tokio::spawn(async move {
                let lock = builder.take().await.unwrap();
                assert!(!inside.swap(true, Ordering::SeqCst), "two at once");
                let before = last.swap(lock.token().get(), Ordering::SeqCst);
                assert!(before < lock.token().get());
                tokio::task::yield_now().await;
                inside.store(false, Ordering::SeqCst);
                lock.release().await.unwrap();
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn tokens_grow_whatever_the_server_forgets() {
    let mut server = Server::start().await;
    let redis = server.redis();
    let mut last = FencingToken::new(0);
    let mut grows = async |redis: &Redis| {
        let lock = redis.lock("x").ttl(LONG).wait(LONG).take().await.unwrap();
        assert!(lock.token() > last, "{} after {last}", lock.token());
        last = lock.token();
        lock
    };
    grows(&redis).await.release().await.unwrap();
    order(&redis, ["SCRIPT", "FLUSH"]).await;
    grows(&redis).await.release().await.unwrap();
    // Over its end.
    let lock = grows(&redis).await;
    run(&redis, ["PEXPIRE", key_of(&redis, "x").as_str(), "1"]).await;
    std::mem::forget(lock);
    grows(&redis).await.release().await.unwrap();
    // Restarted empty.
    std::mem::forget(grows(&redis).await);
    server.restart().await;
    let again = server.redis();
    let fence = key_of(&again, "x").segment("fence");
    assert_eq!(run(&again, ["EXISTS", fence.as_str()]).await, 0);
    grows(&again).await.release().await.unwrap();
    // The clock set back, as the counter tells.
    let ahead = "5000000000000000";
    order(&again, ["SET", fence.as_str(), ahead]).await;
    let lock = grows(&again).await;
    assert_eq!(lock.token().get(), 5_000_000_000_000_001);
    lock.release().await.unwrap();
    let lock = grows(&again).await;
    assert_eq!(lock.token().get(), 5_000_000_000_000_002);
}

#[tokio::test]
async fn foreign_values_are_healed() {
    let server = Server::start().await;
    let redis = server.redis();
    let key = key_of(&redis, "x");
    let fence = key.clone().segment("fence");
    for made in [
        ["SET", fence.as_str(), "garbage"],
        ["SET", fence.as_str(), "99999999999999999999"],
        ["SET", fence.as_str(), "9999999999999999"],
        ["LPUSH", fence.as_str(), "1"],
    ] {
        run(&redis, ["DEL", fence.as_str()]).await;
        order(&redis, made).await;
        let lock = redis.lock("x").take().await.unwrap();
        let token = lock.token().get();
        // A time, in microseconds, of this century.
        assert!((1_700_000_000_000_000..4_200_000_000_000_000).contains(&token));
        lock.release().await.unwrap();
    }
    // Held by nobody that we know, and until for ever: from now on for a lease.
    for made in [["SET", key.as_str(), "1"], ["LPUSH", key.as_str(), "1"]] {
        order(&redis, made).await;
        let error = redis.lock("x").ttl(LONG).take().await.unwrap_err();
        assert!(matches!(error, LockError::Busy { .. }), "{error:?}");
        assert!((1..=60_000).contains(&run(&redis, ["PTTL", key.as_str()]).await));
        run(&redis, ["DEL", key.as_str()]).await;
    }
    // What is no string is not ours.
    let lock = redis.lock("x").ttl(LONG).take().await.unwrap();
    run(&redis, ["DEL", key.as_str()]).await;
    run(&redis, ["LPUSH", key.as_str(), "1"]).await;
    assert!(matches!(lock.extend(LONG).await, Err(LockError::Lost)));
    assert!(matches!(lock.release().await, Err(LockError::Lost)));
    assert!(!is_free(&redis, "x").await);
}

#[tokio::test]
async fn a_server_that_is_gone_is_an_error_in_time() {
    let mut server = Server::start().await;
    let config = Config::new(server.url())
        .timeout(Duration::from_millis(400))
        .connect_timeout(Duration::from_secs(5));
    let redis = Redis::from_config(config).unwrap();
    redis.connect().await.unwrap();
    let lease = Duration::from_secs(3);
    let lock = redis.lock("x").ttl(lease).take().await.unwrap();
    let until = lock.valid_until();
    server.pause();
    let error = lock.extend(LONG).await.unwrap_err();
    let LockError::Redis(error) = error else {
        panic!("{error:?}")
    };
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(lock.valid_until(), until, "the lesser counts");
    // Who waits for a lock does not wait for a server.
    let began = clock::now();
    let error = redis.lock("y").wait(LONG).take().await.unwrap_err();
    assert!(matches!(error, LockError::Redis(_)), "{error:?}");
    assert!(clock::now() - began < LONG / 2);
    lock.lost().await;
    server.kill();
    assert!(matches!(lock.release().await, Err(LockError::Redis(_))));
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

/// A server that has all slots refuses scripts whose keys are of two.
#[tokio::test]
async fn in_a_cluster_its_keys_are_of_one_slot() {
    let server = Server::with(["--cluster-enabled", "yes"]).await;
    let redis = server.redis();
    own_all_slots(&server);
    let ping = cmd(["SET", "ping", "1", "PX", "1"]);
    eventually(async || redis.run::<()>("test", &ping).await.is_ok()).await;
    for name in ["x", "y:{z}", "", "}{"] {
        let lock = redis.lock(name).take().await.unwrap();
        lock.extend(LONG).await.unwrap();
        lock.release().await.unwrap();
    }
}

/// What may have been taken is given back when the server comes to itself.
#[tokio::test]
async fn a_taking_that_timed_out_is_given_back() {
    let server = Server::start().await;
    let config = Config::new(server.url())
        .timeout(Duration::from_millis(400))
        .connect_timeout(Duration::from_secs(5));
    let redis = Redis::from_config(config).unwrap();
    redis.connect().await.unwrap();
    server.pause();
    let error = redis.lock("x").ttl(LONG).take().await.unwrap_err();
    assert!(matches!(error, LockError::Redis(_)), "{error:?}");
    server.resume();
    let calm = server.redis();
    let next = calm.lock("x").wait(LONG / 4).take().await.unwrap();
    next.release().await.unwrap();
}

/// A server that had forgotten the script was asked again in full, with nobody
/// there any more; and what is kept with a lock goes when all is settled.
#[tokio::test]
async fn a_taking_that_was_dropped_is_given_back_however_it_goes() {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let (redis, direct) = (wire.redis(), server.redis());
    redis.connect().await.unwrap();
    wire.delay(Duration::from_millis(60));
    for forgotten in [true, false, true] {
        if forgotten {
            order(&direct, ["SCRIPT", "FLUSH"]).await;
        }
        let companion = Arc::new(());
        let lock = redis.lock("x").ttl(LONG).keep(Arc::clone(&companion));
        let mut taking = Box::pin(lock.take());
        let mut context = Context::from_waker(Waker::noop());
        assert!(taking.as_mut().poll(&mut context).is_pending());
        drop(taking);
        drop(lock);
        assert_eq!(Arc::strong_count(&companion), 2);
        eventually(async || Arc::strong_count(&companion) == 1).await;
        assert!(is_free(&direct, "x").await);
    }
    // What was taken keeps it, too, until it is given back.
    wire.delay(Duration::ZERO);
    let companion = Arc::new(());
    let builder = redis.lock("x").ttl(LONG).keep(Arc::clone(&companion));
    let lock = builder.take().await.unwrap();
    drop(builder);
    assert_eq!(Arc::strong_count(&companion), 2);
    drop(lock);
    eventually(async || Arc::strong_count(&companion) == 1).await;
    assert!(is_free(&direct, "x").await);
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Take(usize),
    Extend(usize),
    Release(usize),
    Drop(usize),
    /// The lease is over.
    End,
    /// All is lost, as by a restart without a disk.
    Flush,
    ScriptFlush,
}

fn op() -> impl Strategy<Value = Op> {
    let who = 0..3_usize;
    prop_oneof![
        6 => who.clone().prop_map(Op::Take),
        2 => who.clone().prop_map(Op::Extend),
        3 => who.clone().prop_map(Op::Release),
        1 => who.prop_map(Op::Drop),
        2 => Just(Op::End),
        1 => Just(Op::Flush),
        1 => Just(Op::ScriptFlush),
    ]
}

/// Random operations by three against a model: who holds it, and the last
/// token.
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
    let key = key_of(redis, "x");
    // Those who think that they hold it; who does.
    let mut locks: HashMap<usize, Lock> = HashMap::new();
    let mut holder: Option<usize> = None;
    let mut last = FencingToken::new(0);
    for &op in ops {
        match op {
            Op::Take(who) => match redis.lock("x").ttl(LONG).take().await {
                Ok(lock) => {
                    prop_assert_eq!(holder, None);
                    prop_assert!(lock.token() > last);
                    last = lock.token();
                    holder = Some(who);
                    if let Some(old) = locks.insert(who, lock) {
                        // It is not the holder: this changes nothing.
                        prop_assert!(matches!(old.release().await, Err(LockError::Lost)));
                    }
                }
                Err(LockError::Busy { left }) => {
                    prop_assert!(holder.is_some());
                    prop_assert!(left <= LONG);
                }
                Err(error) => return Err(TestCaseError::fail(format!("{error:?}"))),
            },
            Op::Extend(who) => {
                if let Some(lock) = locks.get(&who) {
                    let extended = lock.extend(LONG).await;
                    prop_assert_eq!(extended.is_ok(), holder == Some(who));
                    prop_assert_eq!(lock.is_held(), holder == Some(who));
                }
            }
            Op::Release(who) => {
                if let Some(lock) = locks.remove(&who) {
                    let released = lock.release().await;
                    prop_assert_eq!(released.is_ok(), holder == Some(who));
                    holder = holder.filter(|&holder| holder != who);
                }
            }
            Op::Drop(who) => {
                if let Some(lock) = locks.remove(&who) {
                    drop(lock);
                    if holder == Some(who) {
                        holder = None;
                        eventually(async || is_free(redis, "x").await).await;
                    }
                }
            }
            Op::End => {
                run(redis, ["DEL", key.as_str()]).await;
                holder = None;
            }
            Op::Flush => {
                order(redis, ["FLUSHALL"]).await;
                holder = None;
            }
            Op::ScriptFlush => order(redis, ["SCRIPT", "FLUSH"]).await,
        }
        prop_assert_eq!(is_free(redis, "x").await, holder.is_none(), "{:?}", op);
    }
    for (who, lock) in locks {
        prop_assert_eq!(lock.release().await.is_ok(), holder == Some(who));
    }
    Ok(())
}
