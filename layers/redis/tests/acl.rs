//! The ACL that `docs/redis.md` gives its readers, on a real server.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use buttress_core::clock;
use buttress_redis::{Cmd, Config, ErrorKind, Notice, Redis, Script, Value, testing::Server};
use tokio::time::{sleep, timeout};

const MINUTE: Duration = Duration::from_secs(60);

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What comes behind the name and the password.
fn rules() -> Vec<String> {
    let page = fs::read_to_string(workspace().join("docs/redis.md")).unwrap();
    let line = page
        .lines()
        .find_map(|it| it.strip_prefix("user buttress "));
    let words = line.expect("the line is there").split(' ');
    let rules = words.filter(|it| *it != "on" && !it.starts_with('>'));
    rules.map(ToOwned::to_owned).collect()
}

/// A server that has this user, and a handle of his.
async fn start() -> (Server, Redis) {
    let server = Server::start().await;
    let rules = rules();
    let words = ["ACL", "SETUSER", "buttress", "on", ">opensesame"];
    let words: Vec<&str> = (words.into_iter().chain(rules.iter().map(String::as_str))).collect();
    server.cmd::<()>(&words).await;
    let url = format!("redis://buttress:opensesame@127.0.0.1:{}", server.port());
    let config = Config::new(url).timeout(Duration::from_secs(5));
    (server, Redis::from_config(config).unwrap())
}

#[tokio::test]
async fn it_is_enough_for_all_that_is_here_and_not_for_all() {
    let (_server, redis) = start().await;
    redis.connect().await.unwrap();

    let lock = redis.lock("a").keep_fence(MINUTE).take().await.unwrap();
    redis.lock("a").take().await.unwrap_err();
    lock.extend(MINUTE).await.unwrap();
    let token = lock.token();
    lock.release().await.unwrap();

    let key = |name: &str| redis.keyspace("test").tag([name]);
    redis
        .fenced_set(&key("b"), "1", token, MINUTE)
        .await
        .unwrap();
    assert!(redis.fenced_get(&key("b")).await.unwrap().is_some());
    let made = redis
        .create_if_absent(&key("c"), "1", MINUTE)
        .await
        .unwrap();
    let version = made.done().unwrap();
    let c = key("c");
    let made = redis.update_if_version(&c, version, "2", MINUTE).await;
    made.unwrap().done().unwrap();
    assert!(redis.get_versioned(&key("c")).await.unwrap().is_some());
    redis.set_json(&key("d"), &1, MINUTE).await.unwrap();
    assert_eq!(redis.get_json::<u8>(&key("d")).await.unwrap(), Some(1));

    let channel = redis.keyspace("test").channel("e");
    let mut subscription = redis.subscribe(&channel);
    let mut next = async || timeout(MINUTE, subscription.next()).await.unwrap();
    assert_eq!(next().await, Notice::Listening);
    let mut say = Cmd::new();
    say.arg("PUBLISH").arg(&channel).arg("hello");
    redis.run::<()>("test", &say).await.unwrap();
    assert_eq!(next().await, Notice::Message(b"hello".to_vec()));

    for denied in [["GET", "somebody:else"], ["KEYS", "*"]] {
        let mut cmd = Cmd::new();
        cmd.arg(&denied);
        let error = redis.run::<Value>("test", &cmd).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{denied:?}");
    }
}

/// Of every layer, whether it is built here or not.
#[tokio::test]
async fn it_has_each_command_of_each_script() {
    let mut words = BTreeSet::new();
    scan(&workspace().join("layers"), &mut words);
    let server = Server::start().await;
    let mut ask = vec!["COMMAND", "INFO"];
    ask.extend(words.iter().map(String::as_str));
    let known: Vec<Value> = server.cmd(&ask).await;
    let commands = words.iter().zip(known);
    let commands = commands.filter(|(_, known)| *known != Value::Nil);
    let commands: BTreeSet<_> = commands.map(|(word, _)| word.to_lowercase()).collect();
    assert!(commands.len() > 20, "{commands:?}");
    let rules = rules();
    let has = |command: &&String| !rules.contains(&format!("+{command}"));
    let missing: Vec<_> = commands.iter().filter(has).collect();
    assert!(missing.is_empty(), "not in docs/redis.md: {missing:?}");
}

/// Words in quotes and capitals, in files with scripts.
fn scan(directory: &Path, words: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy();
        if path.is_dir() {
            if !matches!(&*name, "tests" | "testing" | "benches" | "target") {
                scan(&path, words);
            }
        } else if (name.ends_with(".rs") || name.ends_with(".lua")) && name != "tests.rs" {
            let text = fs::read_to_string(&path).unwrap();
            if name.ends_with(".lua") || text.contains("redis.call") {
                let quoted = text.split(['\'', '"']).filter(|word| {
                    word.len() > 2 && word.bytes().all(|byte| byte.is_ascii_uppercase())
                });
                words.extend(quoted.map(ToOwned::to_owned));
            }
        }
    }
}

/// Each second it was taken for gone.
#[tokio::test]
async fn a_server_that_denies_a_sign_of_life_is_alive() {
    let server = Server::start().await;
    for rule in ["on", ">opensesame", "~*", "&*", "+@all", "-ping"] {
        let words = ["ACL", "SETUSER", "silent", rule];
        server.cmd::<()>(&words).await;
    }
    let url = format!("redis://silent:opensesame@127.0.0.1:{}", server.port());
    let config = Config::new(url).timeout(Duration::from_secs(5));
    let redis = Redis::from_config(config).unwrap();
    redis.connect().await.unwrap();
    let mut watch = redis.watch();
    let change = timeout(Duration::from_millis(2500), watch.changed()).await;
    assert!(change.is_err(), "up: {change:?}");
    assert!(redis.is_up());
}

/// Operations that are denied while probes pass: each 200 ms the gate opened,
/// three failed, and it shut.
#[tokio::test]
async fn a_server_that_denies_what_is_asked_is_asked_less_and_less() {
    let server = Server::start().await;
    let may_not = |rule: &'static str| ["ACL", "SETUSER", "narrow", rule];
    for rule in ["on", ">opensesame", "~*", "&*", "+@all", "-evalsha"] {
        server.cmd::<()>(&may_not(rule)).await;
    }
    let url = format!("redis://narrow:opensesame@127.0.0.1:{}", server.port());
    let config = Config::new(url).timeout(Duration::from_millis(400));
    let redis = Redis::from_config(config).unwrap();
    redis.connect().await.unwrap();
    let script = Script::new("return 1");
    let call = script.on([&redis.keyspace("test").tag(["a"])]);
    let ask = async || redis.call::<u64>("test", &call).await;

    let (mut denied, began) = (0, clock::now());
    while clock::now() - began < Duration::from_secs(4) {
        match ask().await.unwrap_err().kind() {
            ErrorKind::Denied => denied += 1,
            ErrorKind::Gone => {}
            other => panic!("{other:?}"),
        }
        sleep(Duration::from_millis(1)).await;
    }
    // At once, and then after 0.2, 0.6, 1.4 and 3 s, give or take a quarter.
    assert!(
        (6..=18).contains(&denied),
        "{denied} were asked for nothing"
    );

    // It is looked for again all the same.
    server.cmd::<()>(&may_not("+evalsha")).await;
    let back = async {
        while ask().await.is_err() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(10), back).await.unwrap();

    // And what is gone after that is back within a second.
    server.pause();
    while redis.is_up() {
        ask().await.unwrap_err();
    }
    sleep(Duration::from_millis(500)).await;
    server.resume();
    let resumed = clock::now();
    while ask().await.is_err() {
        sleep(Duration::from_millis(5)).await;
    }
    let took = clock::now() - resumed;
    assert!(took < Duration::from_secs(1), "{took:?}");
}
