//! Locks of a fleet, against a real server and its faults.

use std::{
    collections::HashMap,
    convert::Infallible,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress_core::{
    Refusal, clock,
    key::{self, Key},
    testing::web::{self, ScriptedBody},
};
use buttress_lock::{Error, Fence, LockBuilder, LockLayer, OnStoreError};
use buttress_redis::{
    Cmd, Config, Redis,
    testing::{Server, Wire},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use proptest::{
    prelude::*,
    test_runner::{Config as Cases, TestRunner},
};
use tokio::time::{sleep, timeout};
use tokio_test::task;
use tower::{Layer, ServiceExt, service_fn};

const LONG: Duration = Duration::from_secs(60);

type Web = Request<Full<Bytes>>;

/// As one process of a fleet has it.
fn process(redis: &Redis) -> LockBuilder {
    LockLayer::builder(key::header("x-order"))
        .name("orders")
        .redis(redis)
        .ttl(LONG)
}

fn order(id: &str) -> Web {
    let mut request = web::post("/", "");
    request.headers_mut().insert("x-order", id.parse().unwrap());
    request
}

/// Answers with the fence, and a body that goes on for a while.
async fn serve(request: Web) -> Result<Response<ScriptedBody>, Infallible> {
    let body = ScriptedBody::new().data("a").wait(LONG).data("b");
    let mut response = Response::new(body);
    if let Some(fence) = request.extensions().get::<Fence>() {
        response.extensions_mut().insert(fence.clone());
    }
    Ok(response)
}

fn fence_of<B>(response: &Response<B>) -> Option<Fence> {
    response.extensions().get::<Fence>().cloned()
}

async fn flush(redis: &Redis) {
    let mut cmd = Cmd::new();
    cmd.arg("FLUSHALL");
    redis.run::<()>("test", &cmd).await.unwrap();
}

async fn keys(redis: &Redis) -> Vec<String> {
    let mut cmd = Cmd::new();
    cmd.arg("KEYS").arg("*lock*");
    redis.run("test", &cmd).await.unwrap()
}

async fn ttl(redis: &Redis, key: &str) -> i64 {
    let mut cmd = Cmd::new();
    cmd.arg("PTTL").arg(key);
    redis.run("test", &cmd).await.unwrap()
}

#[tokio::test]
async fn processes_exclude_each_other() {
    let server = Server::start().await;
    let (here, there) = (server.redis(), server.redis());
    let ours = process(&here).build().unwrap();
    let theirs = process(&there).build().unwrap();
    let ours = ours.layer(service_fn(serve));
    let theirs = theirs.layer(service_fn(serve));

    let first = ours.clone().oneshot(order("1")).await.unwrap();
    let fence = fence_of(&first).unwrap();
    assert!(fence.is_held());
    assert_eq!(fence.fencing_token().get(), fence.token());
    for service in [&ours, &theirs] {
        let busy = service.clone().oneshot(order("1")).await.unwrap();
        assert_eq!(busy.status(), 409);
        assert_eq!(busy.headers()["retry-after"], "1");
    }
    let other = theirs.clone().oneshot(order("2")).await.unwrap();
    assert_eq!(other.status(), 200);
    // A layer of another name locks nothing of theirs.
    let apart = process(&there).name("carts").build().unwrap();
    let apart = apart.layer(service_fn(serve)).oneshot(order("1")).await;
    assert_eq!(apart.unwrap().status(), 200);

    // Who waits gets it once the body has ended, here by being dropped.
    theirs.handle().set_wait(LONG).unwrap();
    drop(first);
    assert!(!fence.is_held());
    let next = theirs.oneshot(order("1")).await.unwrap();
    assert_eq!(next.status(), 200);
    assert!(fence_of(&next).unwrap().token() > fence.token());
}

#[tokio::test]
async fn keys_tell_nothing_of_clients_and_end() {
    let server = Server::start().await;
    let redis = server.redis();
    let service = process(&redis).build().unwrap().layer(service_fn(serve));
    let held = service.oneshot(order("a secret")).await.unwrap();
    let keys = keys(&redis).await;
    assert_eq!(keys.len(), 2, "{keys:?}");
    for key in keys {
        assert!(key.starts_with("buttress:lock:{orders:"), "{key}");
        assert!(!key.contains("secret"), "{key}");
        let most = if key.ends_with(":fence") {
            24 * 3_600_000
        } else {
            60_000
        };
        let left = ttl(&redis, &key).await;
        assert!((1..=most).contains(&left), "{key}: {left}");
    }
    drop(held);
}

/// For twice its lease, and more.
#[tokio::test]
async fn it_is_extended_while_the_body_lasts() {
    let server = Server::start().await;
    let (here, there) = (server.redis(), server.redis());
    let lease = Duration::from_millis(1200);
    let ours = process(&here).ttl(lease).build().unwrap();
    let theirs = process(&there).ttl(lease).build().unwrap();
    let held = ours.layer(service_fn(serve)).oneshot(order("1")).await;
    let held = held.unwrap();
    let fence = fence_of(&held).unwrap();
    let theirs = theirs.layer(service_fn(serve));
    let began = clock::now();
    while clock::now() - began < lease * 9 / 4 {
        assert!(fence.is_held());
        let busy = theirs.clone().oneshot(order("1")).await.unwrap();
        assert_eq!(busy.status(), 409);
        sleep(lease / 20).await;
    }
    drop(held);
}

/// Its runtime ends, and with it whoever would extend or give back.
#[tokio::test]
async fn after_a_crash_it_is_free_when_the_lease_is_over() {
    let server = Server::start().await;
    let url = server.url();
    let lease = Duration::from_millis(600);
    let token = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let token = runtime.block_on(async {
            let config = Config::new(url).timeout(Duration::from_secs(5));
            let redis = Redis::from_config(config).unwrap();
            let layer = process(&redis).ttl(lease).build().unwrap();
            let held = layer.layer(service_fn(serve)).oneshot(order("1")).await;
            let held = held.unwrap();
            let token = fence_of(&held).unwrap().token();
            std::mem::forget(held);
            token
        });
        runtime.shutdown_background();
        token
    });
    let token = token.join().unwrap();
    let redis = server.redis();
    let layer = process(&redis).wait(LONG).build().unwrap();
    let service = layer.layer(service_fn(serve));
    let next = service.oneshot(order("1")).await.unwrap();
    assert_eq!(next.status(), 200);
    assert!(fence_of(&next).unwrap().token() > token);
}

/// However far a request has come when nobody waits for it any more: with its
/// question sent, with its answer there, in the call.
#[tokio::test]
async fn dropped_at_every_await_it_is_free() {
    let server = Server::start().await;
    let redis = server.redis();
    let layer = process(&redis).wait(LONG).build().unwrap();
    let hangs = layer.layer(service_fn(async |_: Web| {
        std::future::pending::<Result<Response<ScriptedBody>, Infallible>>().await
    }));
    let works = process(&redis).wait(LONG).build().unwrap();
    let works = works.layer(service_fn(serve));
    for polls in 0..20 {
        let mut call = task::spawn(hangs.clone().oneshot(order("1")));
        for _ in 0..polls {
            assert!(call.poll().is_pending());
            sleep(Duration::from_micros(200)).await;
        }
        drop(call);
        // Its lease is a minute: it was given back, or this does not end.
        let response = timeout(LONG / 2, works.clone().oneshot(order("1"))).await;
        assert_eq!(response.unwrap().unwrap().status(), 200);
    }
    assert_eq!(layer.handle().held(), 0);
}

/// The next one asked before what the last one had taken was given back, and
/// was refused for nothing.
#[tokio::test]
async fn who_comes_after_one_that_was_dropped_while_it_claimed_is_not_refused() {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let (redis, direct) = (wire.redis(), server.redis());
    let layer = process(&redis).build().unwrap();
    let service = layer.layer(service_fn(serve));
    // The script is known there, and the connection made.
    let first = service.clone().oneshot(order("0")).await.unwrap();
    drop(first);
    wire.delay(Duration::from_millis(100));
    for round in 0..3 {
        let mut call = task::spawn(service.clone().oneshot(order("1")));
        assert!(call.poll().is_pending());
        // It has it by now, and does not know.
        let taken = async || {
            let all = keys(&direct).await;
            all.iter().filter(|key| !key.ends_with(":fence")).count() == 1
        };
        let all = async {
            while !taken().await {
                sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(LONG / 2, all).await.unwrap();
        drop(call);
        let next = service.clone().oneshot(order("1")).await.unwrap();
        assert_eq!(next.status(), 200, "round {round}");
        drop(next);
        // In another process, as soon as it can be told.
        let theirs = process(&direct).wait(LONG).build().unwrap();
        let theirs = theirs.layer(service_fn(serve));
        let held = timeout(LONG / 2, theirs.oneshot(order("1"))).await;
        assert_eq!(held.unwrap().unwrap().status(), 200);
    }
}

/// Where it could not be given back for want of Redis, who comes next is told
/// so, and not that somebody has it.
#[tokio::test]
async fn who_comes_after_one_that_was_dropped_goes_as_without_redis() {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let config = Config::new(wire.url()).timeout(Duration::from_millis(300));
    let redis = Redis::from_config(config).unwrap();
    redis.connect().await.unwrap();
    let layer = process(&redis).on_store_error(OnStoreError::Allow);
    let layer = layer.build().unwrap();
    let service = layer.layer(service_fn(serve));
    wire.stall();
    let mut call = task::spawn(service.clone().oneshot(order("1")));
    assert!(call.poll().is_pending());
    drop(call);
    let began = clock::now();
    let next = service.oneshot(order("1")).await.unwrap();
    assert_eq!(next.status(), 200);
    assert!(fence_of(&next).is_none(), "it has no lock");
    assert!(clock::now() - began < LONG / 6);
}

/// Who waited in vain for one that was just about to leave was let go on
/// without a lock, as if Redis had failed.
#[tokio::test]
async fn who_waited_for_one_that_has_only_begun_to_leave_is_refused() {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let redis = Redis::from_config(Config::new(wire.url()).timeout(LONG / 6)).unwrap();
    let layer = process(&redis).on_store_error(OnStoreError::Allow);
    let layer = layer.wait(Duration::from_millis(100)).build().unwrap();
    let service = layer.layer(service_fn(serve));
    let first = service.clone().oneshot(order("1")).await.unwrap();
    let mut next = task::spawn(service.oneshot(order("1")));
    assert!(next.poll().is_pending());
    wire.stall();
    drop(first);
    let began = clock::now();
    let next = next.await.unwrap();
    assert_eq!(next.status(), 409);
    assert!(clock::now() - began < LONG / 6);
}

/// With nobody left to give back what it takes: nothing panics.
#[test]
fn a_claim_that_is_dropped_after_its_runtime_is_no_trouble() {
    let home = tokio::runtime::Runtime::new().unwrap();
    let (server, wire) = home.block_on(async {
        let server = Server::start().await;
        let wire = Wire::to(&server).await;
        (server, wire)
    });
    let other = tokio::runtime::Runtime::new().unwrap();
    let (redis, call) = other.block_on(async {
        let redis = wire.redis();
        redis.connect().await.unwrap();
        wire.delay(Duration::from_millis(300));
        let lease = Duration::from_millis(500);
        let layer = process(&redis).ttl(lease).build().unwrap();
        let service = layer.layer(service_fn(serve));
        let mut call = Box::pin(service.oneshot(order("1")));
        assert!(task::spawn(call.as_mut()).poll().is_pending());
        (redis, call)
    });
    other.shutdown_timeout(LONG);
    drop(call);
    drop(redis);
    home.block_on(async {
        let layer = process(&server.redis()).wait(LONG).build().unwrap();
        let next = layer.layer(service_fn(serve)).oneshot(order("1"));
        let next = timeout(LONG / 2, next).await.unwrap().unwrap();
        assert_eq!(next.status(), 200);
        drop((server, wire));
    });
}

#[tokio::test]
async fn a_lost_lock_is_told_and_nothing_is_cut_by_default() {
    let server = Server::start().await;
    let redis = server.redis();
    let layer = process(&redis).ttl(Duration::from_millis(300)).build();
    let service = layer.unwrap().layer(service_fn(serve));
    let held = service.oneshot(order("1")).await.unwrap();
    let fence = fence_of(&held).unwrap();
    let mut body = held.into_body();
    body.frame().await.unwrap().unwrap();
    flush(&redis).await;
    timeout(LONG, fence.lost()).await.unwrap();
    assert!(!fence.is_held());
    let rest = timeout(Duration::from_millis(100), body.frame()).await;
    assert!(rest.is_err(), "it goes on");
}

#[tokio::test]
async fn a_lost_lock_cuts_where_that_is_asked_for() {
    let server = Server::start().await;
    let redis = server.redis();
    let builder = || process(&redis).ttl(Duration::from_millis(300));
    // In its body.
    let layer = builder().cut_when_lost().build().unwrap();
    let held = layer.layer(service_fn(serve)).oneshot(order("1")).await;
    let mut body = held.unwrap().into_body();
    body.frame().await.unwrap().unwrap();
    flush(&redis).await;
    let error = timeout(LONG, body.frame()).await.unwrap();
    let Some(Err(Error::Refused(refusal))) = error else {
        panic!("{error:?}")
    };
    assert_eq!(refusal.reason(), "lock_lost");
    assert!(body.frame().await.is_none());
    assert_eq!(layer.handle().held(), 0);

    // In the call.
    let hangs = service_fn(async |_: Web| {
        std::future::pending::<Result<Response<ScriptedBody>, Infallible>>().await
    });
    let mut call = pin!(layer.layer(hangs).oneshot(order("2")));
    while layer.handle().held() == 0 {
        let moment = timeout(Duration::from_millis(1), call.as_mut()).await;
        assert!(moment.is_err());
    }
    flush(&redis).await;
    let response = timeout(LONG, call).await.unwrap().unwrap();
    assert_eq!(response.status(), 503);
    let text = web::text(response.map(|body| body.map_err(|_| ()))).await;
    assert!(text.contains("lock_lost"), "{text}");

    // And in one of any kind.
    let layer = LockLayer::any(key::from_request(|_: &u8| Key::from("x")))
        .redis(&redis)
        .ttl(Duration::from_millis(300))
        .cut_when_lost()
        .build()
        .unwrap();
    let hangs = service_fn(async |_: u8| std::future::pending::<Result<u8, Infallible>>().await);
    let mut call = pin!(layer.layer(hangs).oneshot(1));
    while layer.handle().held() == 0 {
        assert!(
            timeout(Duration::from_millis(1), call.as_mut())
                .await
                .is_err()
        );
    }
    flush(&redis).await;
    let error = timeout(LONG, call).await.unwrap().unwrap_err();
    assert_eq!(error.refusal().map(Refusal::reason), Some("lock_lost"));
}

#[tokio::test]
async fn without_redis_requests_are_refused_at_once_or_pass() {
    let mut server = Server::start().await;
    let config = Config::new(server.url()).timeout(Duration::from_secs(1));
    let redis = Redis::from_config(config).unwrap();
    redis.connect().await.unwrap();
    let deny = process(&redis).wait(LONG).build().unwrap();
    let deny = deny.layer(service_fn(serve));
    let allow = process(&redis).on_store_error(OnStoreError::Allow);
    let allow = allow.build().unwrap().layer(service_fn(serve));
    let held = deny.clone().oneshot(order("1")).await.unwrap();
    assert_eq!(held.status(), 200);

    server.kill();
    // None waits: not for the lock, and not for the server once it is known.
    let began = clock::now();
    for _ in 0..100 {
        let refused = deny.clone().oneshot(order("2")).await.unwrap();
        assert_eq!(refused.status(), 503);
        let passed = allow.clone().oneshot(order("2")).await.unwrap();
        assert_eq!(passed.status(), 200);
        assert!(fence_of(&passed).is_none(), "it has no lock");
    }
    assert!(clock::now() - began < Duration::from_secs(5));
    drop(held);

    server.restart().await;
    let mut watch = redis.watch();
    while !redis.is_up() {
        timeout(LONG, watch.changed()).await.unwrap();
    }
    let served = deny.oneshot(order("1")).await.unwrap();
    assert_eq!(served.status(), 200);
    let busy = allow.oneshot(order("1")).await.unwrap();
    assert_eq!(busy.status(), 409);
}

/// Where the server is away for less than the lease, nobody notices.
#[tokio::test]
async fn a_lease_outlasts_a_short_outage() {
    let server = Server::start().await;
    let config = Config::new(server.url())
        .timeout(Duration::from_millis(300))
        .connect_timeout(Duration::from_secs(5));
    let redis = Redis::from_config(config).unwrap();
    redis.connect().await.unwrap();
    let lease = Duration::from_secs(5);
    let layer = process(&redis).ttl(lease).build().unwrap();
    let held = layer.layer(service_fn(serve)).oneshot(order("1")).await;
    let held = held.unwrap();
    let fence = fence_of(&held).unwrap();
    // Across the first extension, after a third of it.
    sleep(Duration::from_millis(1500)).await;
    server.pause();
    sleep(Duration::from_millis(800)).await;
    server.resume();
    let mut watch = redis.watch();
    while !redis.is_up() {
        timeout(LONG, watch.changed()).await.unwrap();
    }
    // Tried again in time: past the end that the lease had.
    sleep(Duration::from_millis(3100)).await;
    assert!(fence.is_held());
    drop(held);
}

/// It was extended when a third of the new length had passed, and so lost.
#[tokio::test]
async fn a_lease_that_was_asked_for_before_a_longer_one_is_extended_in_time() {
    let server = Server::start().await;
    let redis = server.redis();
    let lease = Duration::from_secs(1);
    let layer = process(&redis).ttl(lease).wait(LONG).build().unwrap();
    let service = layer.layer(service_fn(serve));
    let first = service.clone().oneshot(order("1")).await.unwrap();
    let mut next = task::spawn(service.oneshot(order("1")));
    assert!(next.poll().is_pending());
    layer.handle().set_ttl(24 * 60 * LONG).unwrap();
    drop(first);
    let held = timeout(LONG, next).await.unwrap().unwrap();
    let fence = fence_of(&held).unwrap();
    sleep(lease + Duration::from_millis(200)).await;
    assert!(fence.is_held());
}

/// How many scripts the server has run.
async fn scripts(redis: &Redis) -> u64 {
    let mut cmd = Cmd::new();
    cmd.arg("INFO").arg("commandstats");
    let stats: String = redis.run("test", &cmd).await.unwrap();
    let of = |name: &str| {
        let line = stats.lines().find_map(|line| line.strip_prefix(name));
        line.map_or(0, |rest| rest.split(',').next().unwrap().parse().unwrap())
    };
    of("cmdstat_evalsha:calls=") + of("cmdstat_eval:calls=")
}

/// What the process knows by itself it does not ask, and of those that wait
/// one asks.
#[tokio::test]
async fn a_crowd_costs_redis_no_more_than_one() {
    let server = Server::start().await;
    let (here, there) = (server.redis(), server.redis());
    let ours = process(&here).build().unwrap();
    let service = ours.layer(service_fn(serve));
    let held = service.clone().oneshot(order("1")).await.unwrap();
    let before = scripts(&here).await;
    for _ in 0..100 {
        let busy = service.clone().oneshot(order("1")).await.unwrap();
        assert_eq!(busy.status(), 409);
    }
    assert_eq!(scripts(&here).await, before);

    // Held by another process.
    let theirs = process(&there).build().unwrap().layer(service_fn(serve));
    let elsewhere = theirs.oneshot(order("2")).await.unwrap();
    let before = scripts(&here).await;
    ours.handle().set_wait(Duration::from_millis(500)).unwrap();
    let began = clock::now();
    let crowd: Vec<_> = (0..100)
        .map(|_| tokio::spawn(service.clone().oneshot(order("2"))))
        .collect();
    for one in crowd {
        assert_eq!(one.await.unwrap().unwrap().status(), 409);
    }
    let took = clock::now() - began;
    // Each 25 ms at most, and once when its wait is over.
    let most = u64::try_from(took.as_millis()).unwrap() / 25 + 2 + 100;
    let asked = scripts(&here).await - before;
    assert!((5..=most).contains(&asked), "{asked} in {took:?}");
    drop((held, elsewhere));
}

#[tokio::test]
async fn who_sends_one_after_the_other_is_not_in_its_own_way() {
    let server = Server::start().await;
    let redis = server.redis();
    let service = process(&redis).build().unwrap().layer(service_fn(serve));
    let mut last = 0;
    for _ in 0..200 {
        let response = service.clone().oneshot(order("1")).await.unwrap();
        assert_eq!(response.status(), 200);
        let token = fence_of(&response).unwrap().token();
        assert!(token > last);
        last = token;
    }
}

/// On several threads, each with a layer of one of two processes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_in_turn_are_never_two() {
    let server = Server::start().await;
    let inside = Arc::new(AtomicUsize::new(0));
    let serve = {
        let inside = Arc::clone(&inside);
        service_fn(move |request: Web| {
            let inside = Arc::clone(&inside);
            async move {
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                tokio::task::yield_now().await;
                inside.fetch_sub(1, Ordering::SeqCst);
                serve(request).await
            }
        })
    };
    let processes = [server.redis(), server.redis()].map(|redis| {
        let layer = process(&redis).wait(LONG).build().unwrap();
        layer.layer(serve.clone())
    });
    let calls: Vec<_> = (0..50)
        .map(|n| {
            let call = processes[n % 2].clone().oneshot(order("1"));
            tokio::spawn(async move {
                let response = call.await.unwrap();
                assert_eq!(response.status(), 200);
                fence_of(&response).unwrap().token()
            })
        })
        .collect();
    let mut tokens = Vec::new();
    for call in calls {
        tokens.push(call.await.unwrap());
    }
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens.len(), 50);
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Begin {
        order: u8,
        process: usize,
    },
    /// Its body is read to the end.
    Read(u8),
    /// Its body is dropped.
    Drop(u8),
    /// Somebody waits for it, and gives up.
    GiveUp {
        order: u8,
        process: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let order = 0..3_u8;
    let process = 0..2_usize;
    prop_oneof![
        5 => (order.clone(), process.clone())
            .prop_map(|(order, process)| Op::Begin { order, process }),
        2 => order.clone().prop_map(Op::Read),
        2 => order.clone().prop_map(Op::Drop),
        1 => (order, process).prop_map(|(order, process)| Op::GiveUp { order, process }),
    ]
}

/// One suite for both stores: random operations against a model of who holds
/// what.
#[test]
fn in_memory_and_in_redis_as_the_model_has_it() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(Server::start());
    let mut runner = TestRunner::new(Cases {
        cases: 30,
        failure_persistence: None,
        ..Cases::default()
    });
    let checked = runner.run(&prop::collection::vec(op(), 1..30), |ops| {
        runtime.block_on(async {
            let memory = LockLayer::builder(key::header("x-order")).build().unwrap();
            check(&[memory.clone(), memory], &ops).await?;
            let fleet = [server.redis(), server.redis()];
            flush(&fleet[0]).await;
            check(&fleet.map(|redis| process(&redis).build().unwrap()), &ops).await
        })
    });
    if let Err(error) = checked {
        panic!("{error}");
    }
}

async fn check(layers: &[LockLayer; 2], ops: &[Op]) -> Result<(), TestCaseError> {
    let short = service_fn(async |request: Web| {
        let mut response = Response::new(ScriptedBody::new().data("a"));
        let fence = request.extensions().get::<Fence>().expect("it has one");
        response.extensions_mut().insert(fence.clone());
        Ok::<_, Infallible>(response)
    });
    let services = [0, 1].map(|process: usize| layers[process].layer(short));
    let mut held = HashMap::new();
    let mut tokens = HashMap::new();
    for &op in ops {
        match op {
            Op::Begin { order, process } => {
                let busy = held.contains_key(&order);
                // What was given back may be on its way yet.
                let wait = if busy { Duration::ZERO } else { LONG };
                layers[process].handle().set_wait(wait).unwrap();
                let request = self::order(&order.to_string());
                let response = services[process].clone().oneshot(request).await.unwrap();
                prop_assert_eq!(response.status().as_u16(), if busy { 409 } else { 200 });
                if !busy {
                    let fence = fence_of(&response).unwrap();
                    prop_assert!(fence.is_held());
                    let last = tokens.insert(order, fence.token());
                    prop_assert!(last.is_none_or(|last| last < fence.token()));
                    held.insert(order, response);
                }
            }
            Op::Read(order) | Op::Drop(order) => {
                if let Some(response) = held.remove(&order) {
                    let fence = fence_of(&response).unwrap();
                    prop_assert!(fence.is_held());
                    if matches!(op, Op::Read(_)) {
                        prop_assert_eq!(web::text(response).await, "a");
                    } else {
                        drop(response);
                    }
                    prop_assert!(!fence.is_held());
                }
            }
            Op::GiveUp { order, process } => {
                if held.contains_key(&order) {
                    layers[process].handle().set_wait(LONG).unwrap();
                    let request = self::order(&order.to_string());
                    let call = services[process].clone().oneshot(request);
                    let given_up = timeout(Duration::from_millis(3), call).await;
                    prop_assert!(given_up.is_err());
                }
            }
        }
        let count: usize = layers[0].handle().held() + layers[1].handle().held();
        // In memory both are one.
        prop_assert!(count == held.len() || count == 2 * held.len());
    }
    Ok(())
}
