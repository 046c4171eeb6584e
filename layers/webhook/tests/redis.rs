//! Claims in a real Redis: one fleet, one handling, whatever becomes of the
//! server.

use std::{
    collections::HashSet,
    convert::Infallible,
    future::{Future, pending},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress_core::{BoxError, clock};
use buttress_redis::{Cmd, Config, FromRedisValue, Redis, testing::Server};
use buttress_webhook::{
    Claim, ClaimKey, Message, OnStoreError, RedisReplays, ReplayStore, Secret, Signer, Standard,
    VerifyBuilder, VerifyLayer, WholeBody, testing::check_replay_store,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tokio::time::sleep;
use tower::{Layer, ServiceExt, service_fn, util::BoxCloneSyncService};

const NOW: Duration = Duration::from_secs(1_700_000_000);
const KEEP: Duration = Duration::from_secs(601);
/// The longest that anything is waited for here: never needed.
const PATIENCE: Duration = Duration::from_secs(20);

fn secret() -> Secret {
    Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap()
}

fn request(id: &str) -> Request<Full<Bytes>> {
    let signer = Signer::new(Standard::new(), [secret()]).unwrap();
    let (mut parts, ()) = Request::post("/hooks").body(()).unwrap().into_parts();
    let message = Message {
        id,
        timestamp: NOW.as_secs(),
        body: b"x",
    };
    signer.sign(&mut parts, &message).unwrap();
    Request::from_parts(parts, Full::new(Bytes::from_static(b"x")))
}

/// With a time limit that tests can wait for.
fn hasty(server: &Server) -> Redis {
    let config = Config::new(server.url())
        .timeout(Duration::from_millis(400))
        .connect_timeout(Duration::from_secs(2));
    Redis::from_config(config).unwrap()
}

type Answering = Pin<Box<dyn Future<Output = u16> + Send>>;

/// A process of a fleet: a layer of its own, over what all of them call.
struct Node {
    service: BoxCloneSyncService<Request<Full<Bytes>>, (u16, String), BoxError>,
    layer: VerifyLayer,
}

impl Node {
    fn new<F>(builder: VerifyBuilder, handler: F) -> Self
    where
        F: Fn() -> Answering + Clone + Send + Sync + 'static,
    {
        let layer = builder.build().unwrap();
        let handler = service_fn(move |_: Request<WholeBody>| {
            let answer = handler();
            async move {
                let response = Response::builder().status(answer.await);
                Ok::<_, Infallible>(response.body(Full::<Bytes>::from("done")).unwrap())
            }
        });
        let service = layer.layer(handler);
        let service = service_fn(move |request| {
            let service = service.clone();
            async move {
                let (parts, body) = service.oneshot(request).await?.into_parts();
                let body = body.collect().await?.to_bytes();
                let text = String::from_utf8(body.to_vec())?;
                Ok((parts.status.as_u16(), text))
            }
        });
        Self {
            service: BoxCloneSyncService::new(service),
            layer,
        }
    }

    /// The status, and whether it is the handler's answer.
    async fn send(&self, id: &str) -> (u16, bool) {
        let answer = self.service.clone().oneshot(request(id)).await;
        let (status, body) = answer.unwrap();
        (status, body == "done")
    }

    /// Until it is answered like this.
    async fn sends_until(&self, id: &str, wanted: (u16, bool)) {
        within(PATIENCE, async || self.send(id).await == wanted).await;
    }
}

fn layer(redis: &Redis) -> VerifyBuilder {
    VerifyLayer::builder(Standard::new())
        .name("orders")
        .secrets([secret()])
        .wall_clock(|| NOW)
        .redis(redis)
}

/// Counts its calls, and answers with 200.
fn counting() -> (
    Arc<AtomicUsize>,
    impl Fn() -> Answering + Clone + Send + Sync,
) {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let handler = move || {
        counted.fetch_add(1, SeqCst);
        Box::pin(async { 200_u16 }) as Answering
    };
    (calls, handler)
}

/// Answers with what stands in it, one after the other.
fn answering(statuses: &[u16]) -> impl Fn() -> Answering + Clone + Send + Sync + use<> {
    let left = Arc::new(Mutex::new(statuses.to_vec()));
    move || {
        let status = left.lock().unwrap().remove(0);
        Box::pin(async move { status })
    }
}

fn hanging() -> Answering {
    Box::pin(pending())
}

async fn within(limit: Duration, holds: impl AsyncFn() -> bool) {
    let began = clock::now();
    while !holds().await {
        assert!(clock::now() - began < limit, "it does not come to be");
        sleep(Duration::from_millis(10)).await;
    }
}

async fn ask<T: FromRedisValue>(redis: &Redis, words: &[&str]) -> T {
    let mut cmd = Cmd::new();
    for word in words {
        cmd.arg(word);
    }
    redis.run("test", &cmd).await.unwrap()
}

/// Waits until so many messages are known as done.
async fn completed(redis: &Redis, count: usize) {
    within(PATIENCE, async || {
        let keys: Vec<String> = ask(redis, &["KEYS", "buttress:webhook:*"]).await;
        let mut done = 0;
        for key in keys {
            let value: Option<Vec<u8>> = ask(redis, &["GET", &key]).await;
            done += usize::from(value.as_deref() == Some(b"c"));
        }
        done == count
    })
    .await;
}

#[tokio::test]
async fn it_does_what_every_store_must() {
    let server = Server::start().await;
    check_replay_store(RedisReplays::new(&server.redis()), "test ", sleep).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_fifty_copies_over_a_fleet_one_is_handled() {
    let server = Server::start().await;
    let (calls, handler) = counting();
    let slow = move || {
        let answer = handler();
        Box::pin(async move {
            sleep(Duration::from_millis(50)).await;
            answer.await
        }) as Answering
    };
    let nodes = [(); 2].map(|()| Arc::new(Node::new(layer(&server.redis()), slow.clone())));
    let tasks: Vec<_> = (0..50)
        .map(|copy| {
            let node = Arc::clone(&nodes[copy % 2]);
            tokio::spawn(async move { node.send("msg_1").await })
        })
        .collect();
    let mut handled = 0;
    for task in tasks {
        match task.await.unwrap() {
            (200, true) => handled += 1,
            // Told as in progress, or, whoever came late, as done.
            (409, _) | (200, false) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((handled, calls.load(SeqCst)), (1, 1));
    nodes[0].sends_until("msg_1", (200, false)).await;
    nodes[1].sends_until("msg_1", (200, false)).await;
    assert_eq!(calls.load(SeqCst), 1);
    // Nothing of it is in either process.
    assert_eq!(nodes[0].layer.handle().claims(), 0);
}

#[tokio::test]
async fn what_a_handler_fails_another_process_may_do() {
    let server = Server::start().await;
    let failing = Node::new(layer(&server.redis()), answering(&[500]));
    let other = Node::new(layer(&server.redis()), answering(&[200]));
    assert_eq!(failing.send("msg_1").await.0, 500);
    other.sends_until("msg_1", (200, true)).await;
    failing.sends_until("msg_1", (200, false)).await;
}

#[tokio::test]
async fn layers_of_another_name_have_claims_of_their_own() {
    let server = Server::start().await;
    let (calls, handler) = counting();
    let orders = Node::new(layer(&server.redis()), handler.clone());
    let refunds = Node::new(layer(&server.redis()).name("refunds"), handler);
    assert_eq!(orders.send("msg_1").await, (200, true));
    assert_eq!(refunds.send("msg_1").await, (200, true));
    assert_eq!(calls.load(SeqCst), 2);
}

/// A call that is neither polled nor dropped any more: as in a process that is
/// killed, nobody is told.
#[tokio::test]
async fn what_a_dead_process_had_is_free_after_its_lease() {
    let server = Server::start().await;
    let store = |redis: &Redis| {
        let store = RedisReplays::new(redis).lease(Duration::from_secs(2));
        layer(redis).replay_store(store.unwrap())
    };
    let other = Node::new(store(&server.redis()), answering(&[200]));
    let dying = Node::new(store(&server.redis()), hanging);
    let began = clock::now();
    let mut call = Box::pin(dying.send("msg_1"));
    tokio::select! {
        _ = &mut call => panic!("it hangs"),
        () = within(PATIENCE, async || {
            ask::<Vec<String>>(&server.redis(), &["KEYS", "buttress:webhook:*"]).await.len() == 1
        }) => {}
    }
    std::mem::forget(call);
    other.sends_until("msg_1", (200, true)).await;
    assert!(clock::now() - began >= Duration::from_secs(2));
    other.sends_until("msg_1", (200, false)).await;
}

/// The lease is over and another one has it: what the slow one says later is
/// heeded where it does no harm.
#[tokio::test]
async fn a_handler_slower_than_its_lease_changes_no_others() {
    let server = Server::start().await;
    let redis = server.redis();
    let store = RedisReplays::new(&redis)
        .lease(Duration::from_secs(1))
        .unwrap();
    let claim = async |key: &ClaimKey| store.claim(key, KEEP).await.unwrap();
    let granted = async |key: &ClaimKey| match claim(key).await {
        Claim::New(token) => token,
        other => panic!("{other:?}"),
    };
    let (both, alone) = (ClaimKey::new("both"), ClaimKey::new("alone"));
    let (slow, lost) = (granted(&both).await, granted(&alone).await);
    sleep(Duration::from_millis(1100)).await;
    let fast = granted(&both).await;
    store.release(&both, slow).await.unwrap();
    assert_eq!(claim(&both).await, Claim::InProgress);
    store.complete(&both, slow, KEEP).await.unwrap();
    assert_eq!(claim(&both).await, Claim::InProgress);
    store.complete(&both, fast, KEEP).await.unwrap();
    assert_eq!(claim(&both).await, Claim::Completed);
    // Nobody else has asked for it, and it is done.
    store.complete(&alone, lost, KEEP).await.unwrap();
    assert_eq!(claim(&alone).await, Claim::Completed);
    // What was done without the store is done, whoever is at it now.
    let anyway = ClaimKey::new("anyway");
    let held = granted(&anyway).await;
    store.remember(&anyway, KEEP).await.unwrap();
    store.release(&anyway, held).await.unwrap();
    assert_eq!(claim(&anyway).await, Claim::Completed);
}

#[tokio::test]
async fn without_the_server_it_is_refused_and_again_handled_when_it_is_back() {
    let mut server = Server::start().await;
    let (calls, handler) = counting();
    let node = Node::new(layer(&hasty(&server)), handler);
    assert_eq!(node.send("msg_1").await, (200, true));
    completed(&server.redis(), 1).await;
    server.kill();
    for _ in 0..5 {
        assert_eq!(node.send("msg_2").await, (503, false));
    }
    let began = clock::now();
    for _ in 0..100 {
        assert_eq!(node.send("msg_2").await, (503, false));
    }
    // A hundred time limits would be forty seconds.
    assert!(clock::now() - began < Duration::from_secs(2));
    assert_eq!(calls.load(SeqCst), 1, "by default nothing passes");
    server.restart().await;
    node.sends_until("msg_2", (200, true)).await;
    // It has come back empty: what was done before is not known any more.
    node.sends_until("msg_1", (200, true)).await;
    assert_eq!(calls.load(SeqCst), 3);
}

#[tokio::test]
async fn what_is_done_while_the_server_is_gone_is_known_when_it_is_back() {
    let mut server = Server::start().await;
    let (done, failed) = (tokio::sync::watch::channel(0_u16).0, answering(&[500]));
    let wait = done.clone();
    let slow = move || {
        let mut wait = wait.subscribe();
        Box::pin(async move { *wait.wait_for(|status| *status > 0).await.unwrap() }) as Answering
    };
    let redis = hasty(&server);
    let node = Arc::new(Node::new(layer(&redis), slow));
    let failing = Node::new(layer(&redis).name("other"), failed);
    let task = tokio::spawn({
        let node = Arc::clone(&node);
        async move { node.send("msg_1").await }
    });
    let keys = async || ask::<Vec<String>>(&server.redis(), &["KEYS", "buttress:webhook:*"]).await;
    within(PATIENCE, async || keys().await.len() == 1).await;
    server.kill();
    done.send_replace(200);
    assert_eq!(task.await.unwrap(), (200, true));
    assert_eq!(failing.send("msg_1").await, (503, false));
    server.restart().await;
    completed(&server.redis(), 1).await;
    assert_eq!(node.send("msg_1").await, (200, false));
}

/// The server does not hear of it, and has the claim still when it goes on.
#[tokio::test]
async fn what_fails_while_the_server_stands_still_may_come_again() {
    let server = Server::start().await;
    let failed = tokio::sync::watch::channel(false).0;
    let wait = failed.clone();
    let handler = move || {
        let mut wait = wait.subscribe();
        Box::pin(async move {
            let again = *wait.borrow();
            wait.wait_for(|failed| *failed).await.unwrap();
            if again { 200_u16 } else { 500 }
        }) as Answering
    };
    let node = Arc::new(Node::new(layer(&hasty(&server)), handler));
    let task = tokio::spawn({
        let node = Arc::clone(&node);
        async move { node.send("msg_1").await.0 }
    });
    let keys = async || ask::<Vec<String>>(&server.redis(), &["KEYS", "buttress:webhook:*"]).await;
    within(PATIENCE, async || keys().await.len() == 1).await;
    server.pause();
    failed.send_replace(true);
    assert_eq!(task.await.unwrap(), 500);
    // Long enough for the release to have failed.
    while node.send("msg_2").await != (503, false) {}
    server.resume();
    let back = clock::now();
    node.sends_until("msg_1", (200, true)).await;
    assert!(
        clock::now() - back < Duration::from_secs(10),
        "not by the lease"
    );
}

#[tokio::test]
async fn a_stopped_server_costs_a_time_limit_and_gets_its_claims_back() {
    let server = Server::start().await;
    let (calls, handler) = counting();
    let node = Node::new(layer(&hasty(&server)), handler);
    assert_eq!(node.send("msg_1").await, (200, true));
    server.pause();
    let began = clock::now();
    // What these two ask for the server does, later: nobody waits any more.
    assert_eq!(node.send("msg_2").await, (503, false));
    assert_eq!(node.send("msg_3").await, (503, false));
    assert!(clock::now() - began >= Duration::from_millis(400));
    for _ in 0..100 {
        assert_eq!(node.send("msg_4").await, (503, false));
    }
    // A hundred time limits would be forty.
    assert!(clock::now() - began < Duration::from_secs(10));
    server.resume();
    let back = clock::now();
    for id in ["msg_2", "msg_3", "msg_4"] {
        node.sends_until(id, (200, true)).await;
    }
    // Given back, and not lapsed: a lease is a minute.
    assert!(clock::now() - back < Duration::from_secs(10));
    assert_eq!(calls.load(SeqCst), 4);
    node.sends_until("msg_1", (200, false)).await;
    assert_eq!(calls.load(SeqCst), 4);
}

#[tokio::test]
async fn allow_lets_pass_and_local_tells_what_was_done() {
    let mut server = Server::start().await;
    let (calls, handler) = counting();
    let node = |rule| {
        let builder = layer(&hasty(&server)).on_store_error(rule);
        Node::new(builder, handler.clone())
    };
    let (allowing, local) = (node(OnStoreError::Allow), node(OnStoreError::Local));
    let other = Node::new(layer(&hasty(&server)), handler.clone());
    assert_eq!(local.send("msg_0").await, (200, true));
    completed(&server.redis(), 1).await;
    server.kill();
    for _ in 0..3 {
        assert_eq!(allowing.send("msg_1").await, (200, true));
    }
    assert_eq!(local.send("msg_2").await, (200, true));
    assert_eq!(local.send("msg_2").await, (200, false));
    assert_eq!(local.layer.handle().claims(), 1);
    assert_eq!(calls.load(SeqCst), 5);
    server.restart().await;
    completed(&server.redis(), 1).await;
    other.sends_until("msg_2", (200, false)).await;
    // And both go by the store again.
    allowing.sends_until("msg_3", (200, true)).await;
    allowing.sends_until("msg_3", (200, false)).await;
    other.sends_until("msg_3", (200, false)).await;
    local.sends_until("msg_4", (200, true)).await;
    other.sends_until("msg_4", (200, false)).await;
}

#[tokio::test]
async fn scripts_that_are_forgotten_and_clients_that_are_killed_cost_nothing() {
    let server = Server::start().await;
    let redis = server.redis();
    let (calls, handler) = counting();
    let node = Node::new(layer(&redis), handler);
    assert_eq!(node.send("msg_1").await, (200, true));
    completed(&redis, 1).await;
    ask::<()>(&redis, &["SCRIPT", "FLUSH"]).await;
    assert_eq!(node.send("msg_1").await, (200, false));
    ask::<()>(&redis, &["SCRIPT", "FLUSH"]).await;
    assert_eq!(node.send("msg_2").await, (200, true));
    completed(&redis, 2).await;
    let killer = server.redis();
    let _: i64 = ask(
        &killer,
        &["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"],
    )
    .await;
    // It may have been on its way.
    node.sends_until("msg_3", (200, true)).await;
    node.sends_until("msg_3", (200, false)).await;
    assert_eq!(calls.load(SeqCst), 3);
}

#[tokio::test]
async fn every_key_has_the_prefix_a_ttl_and_its_size() {
    let server = Server::start().await;
    let redis = server.redis();
    let store = RedisReplays::new(&redis);
    let used = async || -> i64 {
        let info: String = ask(&redis, &["INFO", "memory"]).await;
        let line = info
            .lines()
            .find_map(|line| line.strip_prefix("used_memory:"));
        line.unwrap().trim().parse().unwrap()
    };
    // Two, so that the tables of the server are there.
    let node = Node::new(layer(&redis), answering(&[200]));
    assert_eq!(node.send("msg_1").await, (200, true));
    completed(&redis, 1).await;
    const MANY: i64 = 10_000;
    let before = used().await;
    let mut held = Vec::new();
    for n in 0..MANY {
        let key = ClaimKey::new(format!(
            "6:orders,0:,0:,id:msg_2KWPBgLlAfxdpx2AI54pPJ85f4W{n}"
        ));
        match store.claim(&key, KEEP).await.unwrap() {
            Claim::New(token) => held.push((key, token)),
            other => panic!("{other:?}"),
        }
    }
    for (key, token) in &held[1..] {
        store.complete(key, *token, KEEP).await.unwrap();
    }
    let each = (used().await - before) / MANY;
    assert!(
        (150..=250).contains(&each),
        "README.md says about 200: {each}"
    );

    let keys: Vec<String> = ask(&redis, &["KEYS", "*"]).await;
    // The probe of the connection may be there.
    let keys: HashSet<_> = keys
        .into_iter()
        .filter(|key| key.contains("webhook"))
        .collect();
    assert_eq!(keys.len() as i64, MANY + 1);
    let mut leases = 0;
    for key in keys {
        assert!(
            key.starts_with("buttress:webhook:{") && key.len() == 62,
            "{key}"
        );
        let ttl: i64 = ask(&redis, &["PTTL", &key]).await;
        let length: i64 = ask(&redis, &["STRLEN", &key]).await;
        match length {
            1 => assert!((400_000..=601_000).contains(&ttl), "{ttl}"),
            17 => {
                leases += 1;
                assert!((1..=60_000).contains(&ttl), "{ttl}");
            }
            _ => panic!("{length}"),
        }
    }
    assert_eq!(leases, 1);
}

#[tokio::test]
async fn a_value_that_is_not_ours_is_neither_new_nor_touched() {
    let server = Server::start().await;
    let redis = server.redis();
    let (calls, handler) = counting();
    let node = Node::new(layer(&redis), handler);
    assert_eq!(node.send("msg_1").await, (200, true));
    completed(&redis, 1).await;
    let keys: Vec<String> = ask(&redis, &["KEYS", "buttress:webhook:*"]).await;
    let key = &*keys[0];
    let store = RedisReplays::new(&redis);

    let foreign: [&[&str]; 5] = [
        &["SET", key, "1"],
        &["SET", key, ""],
        &["SET", key, "q23456789abcdefgh"],
        &["RPUSH", key, "p"],
        &["HSET", key, "c", "c"],
    ];
    for words in foreign {
        let _: i64 = ask(&redis, &["DEL", key]).await;
        let mut set = words.to_vec();
        let _: buttress_redis::Value = ask(&redis, &set).await;
        assert_eq!(node.send("msg_1").await, (503, false), "{set:?}");
        let whose = ClaimKey::new("6:orders,0:,0:,id:msg_1");
        assert!(store.remember(&whose, KEEP).await.is_err());
        set[0] = "TYPE";
        let kind: String = ask(&redis, &set[..2]).await;
        let expected = match words[0] {
            "SET" => "string",
            "RPUSH" => "list",
            _ => "hash",
        };
        assert_eq!(kind, expected, "it is as it was");
    }
    assert_eq!(calls.load(SeqCst), 1);

    // Ours, whose end somebody has taken away: it gets one.
    for (value, least, most) in [("c", 500_000, 601_000), ("p0123456789abcdef", 1, 60_000)] {
        let _: i64 = ask(&redis, &["DEL", key]).await;
        ask::<()>(&redis, &["SET", key, value]).await;
        let (status, handled) = node.send("msg_1").await;
        assert!(matches!(status, 200 | 409) && !handled);
        let ttl: i64 = ask(&redis, &["PTTL", key]).await;
        assert!((least..=most).contains(&ttl), "{ttl}");
    }
    assert_eq!(calls.load(SeqCst), 1);
}

#[tokio::test]
async fn a_full_server_takes_nothing_new_and_still_knows_the_old() {
    let server = Server::with(["--maxmemory-policy", "noeviction"]).await;
    let redis = server.redis();
    let (calls, handler) = counting();
    let node = Node::new(layer(&redis), handler);
    assert_eq!(node.send("msg_1").await, (200, true));
    completed(&redis, 1).await;
    ask::<()>(&redis, &["CONFIG", "SET", "maxmemory", "1"]).await;
    assert_eq!(node.send("msg_2").await, (503, false));
    assert_eq!(node.send("msg_1").await, (200, false), "it is known");
    ask::<()>(&redis, &["CONFIG", "SET", "maxmemory", "0"]).await;
    node.sends_until("msg_2", (200, true)).await;
    assert_eq!(calls.load(SeqCst), 2);
}

#[tokio::test]
async fn a_lease_has_its_bounds() {
    let server = Server::start().await;
    let redis = server.redis();
    let lease = |lease| RedisReplays::new(&redis).lease(lease);
    for wrong in [0, 999, 24 * 3_600_000 + 1] {
        let error = lease(Duration::from_millis(wrong)).unwrap_err();
        assert!(error.to_string().contains("lease"), "{error}");
    }
    let store = lease(Duration::from_secs(1)).unwrap();
    let shown = format!("{store:?}");
    assert!(
        shown.contains("lease: 1s") && !shown.contains("127.0.0.1"),
        "{shown}"
    );
    // Nor is the store for a scheme that knows no repeats.
    let github = VerifyLayer::builder(buttress_webhook::GitHub)
        .secrets([Secret::new("a secret of GitHub").unwrap()])
        .redis(&redis);
    assert!(github.build().is_err());
}
