//! A cluster: slots that move, nodes that go.

use std::time::Duration;

use buttress_core::clock;
use buttress_redis::{
    Change, Cmd, Config, ErrorKind, FencedError, FencingToken, Key, LockError, Notice, Redis,
    Script,
    testing::{Cluster, Server},
};
use futures_util::future::join_all;
use tokio::time::{sleep, timeout};

const MS: Duration = Duration::from_millis(1);
const SOON: Duration = Duration::from_secs(8);

fn set(key: &Key) -> Cmd {
    let mut cmd = Cmd::new();
    cmd.arg("SET")
        .arg(key.as_str())
        .arg(1)
        .arg("PX")
        .arg(60_000);
    cmd
}

fn handle(cluster: &Cluster) -> Redis {
    Redis::from_config(Config::new(cluster.url()).timeout(250 * MS)).unwrap()
}

/// A key for each node.
async fn keys(cluster: &Cluster, redis: &Redis) -> Vec<Key> {
    let space = redis.keyspace("test");
    let mut keys = [const { None }; 3];
    for n in 0..1000 {
        let key = space.tag([n.to_string()]);
        let owner = cluster.owner(&key).await;
        keys[owner].get_or_insert(key);
        if keys.iter().all(Option::is_some) {
            break;
        }
    }
    keys.map(|key| key.expect("a third of the slots each"))
        .into()
}

async fn recovered(redis: &Redis, key: &Key) -> Duration {
    let began = clock::now();
    while redis.run::<()>("test", &set(key)).await.is_err() {
        assert!(clock::now() - began < SOON, "it does not come back");
        sleep(MS).await;
    }
    clock::now() - began
}

#[tokio::test]
async fn slots_are_where_the_servers_say() {
    let server = Server::with(["--cluster-enabled", "yes"]).await;
    let redis = server.redis();
    let space = redis.keyspace("test");
    for n in 0..50 {
        let key = space.tag([format!("{n}{{}}::1")]).segment("x");
        let theirs: u16 = server.cmd(&["CLUSTER", "KEYSLOT", key.as_str()]).await;
        assert_eq!(key.slot().number(), theirs);
    }
}

#[tokio::test]
async fn a_slot_that_moves_is_followed_within_the_time_limit() {
    let cluster = Cluster::start().await;
    // One node is enough to find the others.
    let urls = &cluster.urls()[..1];
    let config = Config::cluster(urls.iter().cloned()).timeout(Duration::from_secs(2));
    let redis = Redis::from_config(config).unwrap();
    assert!(redis.is_cluster());
    let script = Script::new("return redis.call('INCR', KEYS[1])");
    let key = redis.keyspace("test").tag(["a"]).segment("n");
    let mut count = 0;
    let mut next = async || {
        count += 1;
        let answer = redis.call::<i64>("test", &script.on([&key])).await;
        assert_eq!(answer.expect("no error is seen"), count);
    };
    next().await;
    let mut from = cluster.owner(&key).await;
    for _ in 0..3 {
        let to = (from + 1) % 3;
        cluster.begin_move(&key, to).await;
        for _ in 0..5 {
            next().await;
        }
        cluster.finish_move(&key, to).await;
        for _ in 0..5 {
            next().await;
        }
        from = to;
    }
    assert!(redis.is_up());
}

#[tokio::test]
async fn scripts_forgotten_by_one_node_are_told_again() {
    let cluster = Cluster::start().await;
    let redis = cluster.redis();
    let script = Script::new("return redis.call('INCR', KEYS[1])");
    let keys = keys(&cluster, &redis).await;
    for round in 1..4 {
        for key in &keys {
            assert_eq!(
                redis.call::<i64>("test", &script.on([key])).await.unwrap(),
                round
            );
        }
        for node in cluster.nodes() {
            node.cmd::<()>(&["SCRIPT", "FLUSH"]).await;
        }
    }
}

/// While `victim` is gone: its slots cost nothing, the others work.
async fn lives_without(redis: &Redis, keys: &[Key], victim: usize) {
    let began = clock::now();
    // Until it is known, a few wait.
    let mut tried = 0;
    loop {
        let error = redis
            .run::<()>("test", &set(&keys[victim]))
            .await
            .unwrap_err();
        if error.kind() == ErrorKind::Gone {
            break;
        }
        assert!(matches!(
            error.kind(),
            ErrorKind::Timeout | ErrorKind::Connection | ErrorKind::Unable
        ));
        tried += 1;
        assert!(tried <= 6, "{error:?}");
    }
    assert!(redis.is_up(), "the others are there");
    let mut failed = Vec::new();
    let mut waited = 0;
    tried = 0;
    while clock::now() - began < 1500 * MS {
        for (node, key) in keys.iter().enumerate() {
            let one = clock::now();
            let result = redis.run::<()>("test", &set(key)).await;
            if node == victim {
                let error = result.unwrap_err();
                waited += usize::from(error.kind() != ErrorKind::Gone);
            } else {
                tried += 1;
                failed.extend(result.err());
            }
            assert!(clock::now() - one < 600 * MS);
        }
        sleep(2 * MS).await;
    }
    // A few may wait in vain while the client asks whose slots are whose.
    assert!(
        failed.len() * 20 <= tried,
        "what the others have is untouched: {} of {tried}: {failed:?}",
        failed.len()
    );
    assert_eq!(waited, 0, "it is not tried until it is back");
}

#[tokio::test]
async fn a_silent_node_costs_its_slots_and_no_others() {
    let cluster = Cluster::start().await;
    let redis = handle(&cluster);
    let keys = keys(&cluster, &redis).await;
    for victim in [0, 2] {
        for key in &keys {
            recovered(&redis, key).await;
        }
        cluster.nodes()[victim].pause();
        lives_without(&redis, &keys, victim).await;
        cluster.nodes()[victim].resume();
        let took = recovered(&redis, &keys[victim]).await;
        assert!(took < 4000 * MS, "{took:?}");
        cluster.settled().await;
    }
}

#[tokio::test]
async fn a_killed_node_costs_its_slots_and_no_others() {
    let mut cluster = Cluster::start().await;
    let redis = handle(&cluster);
    let keys = keys(&cluster, &redis).await;
    for key in &keys {
        recovered(&redis, key).await;
    }
    cluster.node_mut(1).kill();
    lives_without(&redis, &keys, 1).await;
    cluster.node_mut(1).restart().await;
    let took = recovered(&redis, &keys[1]).await;
    assert!(took < 4000 * MS, "{took:?}");
}

#[tokio::test]
async fn a_cluster_that_is_gone_is_found_again() {
    let mut cluster = Cluster::start().await;
    let redis = handle(&cluster);
    let keys = keys(&cluster, &redis).await;
    redis.connect().await.unwrap();
    for node in 0..3 {
        cluster.node_mut(node).kill();
    }
    let began = clock::now();
    while redis.is_up() {
        for key in &keys {
            redis.run::<()>("test", &set(key)).await.unwrap_err();
        }
        assert!(clock::now() - began < SOON);
    }
    let began = clock::now();
    for _ in 0..1000 {
        let error = redis.run::<()>("test", &set(&keys[0])).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone);
    }
    assert!(clock::now() - began < 100 * MS);
    for node in 0..3 {
        cluster.node_mut(node).restart().await;
    }
    cluster.settled().await;
    for key in &keys {
        let took = recovered(&redis, key).await;
        assert!(took < 4000 * MS, "{took:?}");
    }
}

#[tokio::test]
async fn who_starts_while_a_node_is_silent_has_the_others() {
    let cluster = Cluster::start().await;
    let calm = handle(&cluster);
    let keys = keys(&cluster, &calm).await;
    for victim in [0, 1] {
        cluster.nodes()[victim].pause();
        let redis = handle(&cluster);
        let took = recovered(&redis, &keys[2]).await;
        assert!(took < 4000 * MS, "{took:?}");
        lives_without(&redis, &keys, victim).await;
        cluster.nodes()[victim].resume();
        let took = recovered(&redis, &keys[victim]).await;
        assert!(took < 4000 * MS, "{took:?}");
        cluster.settled().await;
    }
}

#[tokio::test]
async fn messages_are_heard_from_any_node() {
    let cluster = Cluster::start().await;
    let redis = Redis::from_config(Config::new(cluster.url())).unwrap();
    let mut news = redis.subscribe("news");
    assert_eq!(news.next().await, Notice::Listening);
    let _: i64 = cluster.nodes()[2].cmd(&["PUBLISH", "news", "one"]).await;
    assert_eq!(news.next().await, Notice::Message(b"one".to_vec()));
    // The first is the one that is listened to: another takes its place.
    cluster.nodes()[0].pause();
    let again = timeout(SOON, news.next()).await.expect("by another node");
    assert_eq!(again, Notice::Listening);
    let _: i64 = cluster.nodes()[2].cmd(&["PUBLISH", "news", "two"]).await;
    assert_eq!(news.next().await, Notice::Message(b"two".to_vec()));
    cluster.nodes()[0].resume();
}

/// A charge whose answer was lost may have been made: it is not made again.
#[tokio::test]
async fn what_was_sent_is_not_sent_again() {
    let cluster = Cluster::start().await;
    let wire = cluster.wire_to(1).await;
    let config = Config::cluster([cluster.nodes()[0].url()]).timeout(Duration::from_secs(1));
    let redis = Redis::from_config(config).unwrap();
    let keys = keys(&cluster, &redis).await;
    let script = Script::new("return redis.call('INCR', KEYS[1])");
    let (mut asked, mut passed) = (0, 0);
    for round in 0..10 {
        recovered(&redis, &keys[1]).await;
        if round % 2 == 0 {
            wire.cut_after(0);
        } else {
            // Without a word, and with nothing under way.
            wire.cut();
        }
        let count = keys[1].clone().segment("n");
        for _ in 0..3 {
            asked += 1;
            passed += i64::from(
                redis
                    .call::<i64>("test", &script.on([&count]))
                    .await
                    .is_ok(),
            );
        }
    }
    let count = keys[1].clone().segment("n");
    let made: i64 = cluster.nodes()[1].cmd(&["GET", count.as_str()]).await;
    assert!(passed <= made, "{passed} of {made}");
    assert!(made <= asked, "{made} for {asked}");
}

/// Asks one node after the other until nothing is tried any more; how many
/// requests waited for half of the time limit, and how many there were.
async fn until_gone(redis: &Redis, keys: &[Key], workers: usize) -> (usize, usize) {
    let began = clock::now();
    let worker = async |start: usize| {
        let (mut waited, mut asked) = (0, 0);
        for key in keys.iter().cycle().skip(start) {
            let one = clock::now();
            let error = redis.run::<()>("test", &set(key)).await.unwrap_err();
            let took = clock::now() - one;
            assert!(took < redis.timeout() + 100 * MS, "{took:?}");
            asked += 1;
            waited += usize::from(took >= redis.timeout() / 2);
            if error.kind() == ErrorKind::Gone && !redis.is_up() {
                break;
            }
            assert!(clock::now() - began < SOON, "it is not noticed");
            sleep(MS).await;
        }
        (waited, asked)
    };
    let counts = join_all((0..workers).map(worker)).await;
    counts
        .iter()
        .fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
}

/// With few requests and many nodes, each node's own three failures would make
/// every one of them wait.
#[tokio::test]
async fn a_silent_cluster_is_noticed_by_the_first_requests() {
    let cluster = Cluster::start().await;
    let redis = Redis::from_config(Config::new(cluster.url()).timeout(100 * MS)).unwrap();
    let keys = keys(&cluster, &redis).await;
    for workers in [1, 8] {
        for key in &keys {
            recovered(&redis, key).await;
        }
        for node in cluster.nodes() {
            node.pause();
        }
        let began = clock::now();
        let (waited, asked) = until_gone(&redis, &keys, workers).await;
        let took = clock::now() - began;
        assert!(
            waited <= 6 * workers,
            "{waited} of {asked} waited in {took:?}"
        );
        for node in cluster.nodes() {
            node.resume();
        }
        cluster.settled().await;
    }
}

#[tokio::test]
async fn a_killed_cluster_makes_nobody_wait() {
    let mut cluster = Cluster::start().await;
    let redis = handle(&cluster);
    let keys = keys(&cluster, &redis).await;
    for key in &keys {
        recovered(&redis, key).await;
    }
    for node in 0..3 {
        cluster.node_mut(node).kill();
    }
    let began = clock::now();
    let (waited, asked) = until_gone(&redis, &keys, 8).await;
    let took = clock::now() - began;
    assert!(waited <= 8, "{waited} of {asked} waited in {took:?}");
    assert!(asked <= 100, "{asked} in {took:?}");
}

/// What was lost while nobody asked is mended before somebody does.
#[tokio::test]
async fn a_connection_lost_at_rest_costs_nothing() {
    let cluster = Cluster::start().await;
    let wire = cluster.wire_to(1).await;
    let redis = cluster.redis();
    let keys = keys(&cluster, &redis).await;
    recovered(&redis, &keys[1]).await;
    for _ in 0..3 {
        wire.cut();
        sleep(1500 * MS).await;
        for _ in 0..10 {
            redis.run::<()>("test", &set(&keys[1])).await.unwrap();
        }
    }
}

/// Leave to ask is for the next command on the connection, whosever it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_are_redirected_at_once_are_all_served() {
    let cluster = Cluster::start().await;
    let redis = cluster.redis();
    let script = Script::new("return redis.call('INCR', KEYS[1])");
    let key = redis.keyspace("test").tag(["a"]).segment("n");
    redis.call::<i64>("test", &script.on([&key])).await.unwrap();
    let to = (cluster.owner(&key).await + 1) % 3;
    cluster.begin_move(&key, to).await;
    let tasks = (0..50).map(|_| {
        let (redis, key) = (redis.clone(), key.clone());
        tokio::spawn(async move {
            for _ in 0..20 {
                redis.call::<i64>("test", &script.on([&key])).await.unwrap();
            }
        })
    });
    for task in join_all(tasks).await {
        task.unwrap();
    }
    cluster.finish_move(&key, to).await;
    let count = redis.call::<i64>("test", &script.on([&key])).await;
    assert_eq!(count.unwrap(), 1002);
}

#[tokio::test]
async fn locks_and_values_go_with_their_slots() {
    const LONG: Duration = Duration::from_secs(60);
    let cluster = Cluster::start().await;
    let (ours, theirs) = (cluster.redis(), cluster.redis());
    let space = ours.keyspace("test");
    let mut owners = [0; 3];
    let mut held = Vec::new();
    for n in 0..12 {
        let name = n.to_string();
        let key = space.tag([&name]);
        owners[cluster.owner(&key).await] += 1;
        held.push(ours.lock(&name).ttl(LONG).take().await.unwrap());
        let fenced = key.clone().segment("fenced");
        ours.fenced_set(&fenced, "one", FencingToken::new(2), LONG)
            .await
            .unwrap();
        let value = key.segment("value");
        let made = ours.create_if_absent(&value, "one", LONG).await.unwrap();
        assert!(made.done().is_some());
    }
    assert!(!owners.contains(&0), "{owners:?}");
    for _ in 0..2 {
        cluster.move_all().await;
        for (n, lock) in held.iter().enumerate() {
            lock.extend(LONG).await.unwrap();
            let busy = theirs.lock(n.to_string()).take().await.unwrap_err();
            assert!(matches!(busy, LockError::Busy { .. }), "{busy:?}");
            let key = space.tag([n.to_string()]);
            let fenced = key.clone().segment("fenced");
            let late = theirs.fenced_set(&fenced, "late", FencingToken::new(1), LONG);
            let late = late.await.unwrap_err();
            assert!(matches!(late, FencedError::Outdated { .. }), "{late:?}");
            let value = key.segment("value");
            let there = theirs.get_versioned(&value).await.unwrap().unwrap();
            let made = theirs.create_if_absent(&value, "new", LONG).await.unwrap();
            assert!(matches!(made, Change::Refused(Some(_))), "{made:?}");
            let change = theirs.update_if_version(&value, there.version, "next", LONG);
            assert!(change.await.unwrap().done().is_some());
            let late = ours.update_if_version(&value, there.version, "late", LONG);
            assert!(late.await.unwrap().done().is_none());
        }
    }
    for (n, lock) in held.into_iter().enumerate() {
        let before = lock.token();
        lock.release().await.unwrap();
        let next = theirs.lock(n.to_string()).take().await.unwrap();
        assert!(next.token() > before);
    }
}

/// A node that takes connections and says nothing, when those that there were
/// are lost: what is done to reach it again holds up nobody else.
#[tokio::test]
async fn a_node_out_of_reach_holds_up_nobody_else() {
    let cluster = Cluster::start().await;
    let wire = cluster.wire_to(1).await;
    let redis = handle(&cluster);
    let keys = keys(&cluster, &redis).await;
    for key in &keys {
        recovered(&redis, key).await;
    }
    wire.stall();
    wire.cut();
    let began = clock::now();
    let (mut waited, mut asked) = (0, 0);
    while clock::now() - began < 3000 * MS {
        let _ = redis.run::<()>("test", &set(&keys[1])).await;
        let one = clock::now();
        let answer = redis.run::<()>("test", &set(&keys[2])).await;
        asked += 1;
        waited += u32::from(answer.is_err() || clock::now() - one > 125 * MS);
        sleep(2 * MS).await;
    }
    assert!(waited <= 2, "{waited} of {asked}");
    wire.flow();
    let took = recovered(&redis, &keys[1]).await;
    assert!(took < 4000 * MS, "{took:?}");
}

/// Nodes that do not know their own addresses: they are where they were asked.
#[tokio::test]
async fn nodes_without_names_come_back() {
    let cluster = Cluster::start().await;
    for node in cluster.nodes() {
        let kind = ["cluster-preferred-endpoint-type", "unknown-endpoint"];
        let words = [&["CONFIG", "SET"], &kind[..]].concat();
        node.cmd::<()>(&words).await;
    }
    let redis = handle(&cluster);
    let keys = keys(&cluster, &redis).await;
    for key in &keys {
        recovered(&redis, key).await;
    }
    cluster.nodes()[1].pause();
    lives_without(&redis, &keys, 1).await;
    cluster.nodes()[1].resume();
    let took = recovered(&redis, &keys[1]).await;
    assert!(took < 4000 * MS, "{took:?}");
}

/// What a node denies it answers: it is not gone.
#[tokio::test]
async fn a_cluster_that_denies_a_sign_of_life_is_not_gone() {
    let mut cluster = Cluster::start().await;
    let redis = handle(&cluster);
    let keys = keys(&cluster, &redis).await;
    for key in &keys {
        recovered(&redis, key).await;
    }
    for node in cluster.nodes() {
        node.cmd::<()>(&["ACL", "SETUSER", "default", "-ping"])
            .await;
    }
    cluster.node_mut(1).kill();
    lives_without(&redis, &keys, 1).await;
}

/// The probes for one that is gone opened the gates of those that deny, too,
/// each time.
#[tokio::test]
async fn nodes_that_deny_are_left_alone_while_another_is_gone() {
    let mut cluster = Cluster::start().await;
    let redis = handle(&cluster);
    let keys = keys(&cluster, &redis).await;
    for key in &keys {
        recovered(&redis, key).await;
    }
    for node in cluster.nodes() {
        let words = ["ACL", "SETUSER", "default", "-evalsha"];
        node.cmd::<()>(&words).await;
    }
    cluster.node_mut(1).kill();
    let script = Script::new("return 1");
    let began = clock::now();
    let mut denied = 0;
    while clock::now() - began < 4000 * MS {
        for key in &keys {
            let error = redis.call::<i64>("test", &script.on([key])).await;
            denied += u32::from(error.unwrap_err().kind() == ErrorKind::Denied);
        }
        sleep(2 * MS).await;
    }
    // Each of two nodes at first, after 0.2, 0.4, 0.8 and 1.6 s, three times.
    assert!(denied >= 6, "{denied}");
    assert!(denied <= 2 * 3 * 8, "{denied}");
}
