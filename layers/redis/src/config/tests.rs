use std::collections::HashMap;

use super::*;
use crate::Redis;

fn from(vars: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let vars: HashMap<_, _> = vars.iter().copied().collect();
    Config::from_vars(|name| vars.get(name).map(ToString::to_string))
}

/// Address, database, user and password of each.
type Server = (String, i64, Option<String>, Option<String>);

fn servers(config: &Config) -> Vec<Server> {
    let servers = config.check().unwrap();
    let settings = servers.all.iter().map(|server| {
        let settings = server.redis_settings();
        (
            server.addr().to_string(),
            settings.db(),
            settings.username().map(ToOwned::to_owned),
            settings.password().map(ToOwned::to_owned),
        )
    });
    settings.collect()
}

fn one(vars: &[(&str, &str)]) -> Server {
    let mut servers = servers(&from(vars).unwrap());
    assert_eq!(servers.len(), 1);
    servers.remove(0)
}

fn server(address: &str, database: i64) -> Server {
    (address.to_owned(), database, None, None)
}

fn error(config: &Config) -> String {
    let error = config.check().err().expect("it makes no sense");
    format!("{error}")
}

#[test]
fn the_url_comes_first() {
    assert_eq!(one(&[]), server("127.0.0.1:6379", 0));
    let url = ("REDIS_URL", "redis://cache/3");
    let others = [
        ("REDIS_HOST", "other"),
        ("REDIS_PORT", "1"),
        ("REDIS_PASSWORD", "x"),
    ];
    assert_eq!(one(&[url]), server("cache:6379", 3));
    assert_eq!(
        one(&[url, others[0], others[1], others[2], ("REDIS_DB", "5")]),
        server("cache:6379", 3),
        "REDIS_DB is for URLs that name none"
    );
    assert_eq!(
        one(&[("REDIS_URL", "redis://cache:1/"), ("REDIS_DB", " 5 ")]),
        server("cache:1", 5)
    );
    assert_eq!(
        one(&[
            ("REDIS_URL", ""),
            ("REDIS_HOST", "other"),
            ("REDIS_DB", "5")
        ]),
        server("other:6379", 5),
        "an empty variable is none"
    );
    assert_eq!(
        one(&[("REDIS_URL", "redis://cache/0"), ("REDIS_DB", "5")]).1,
        0
    );
    // Not a database for TCP, whatever other clients think.
    assert_eq!(
        one(&[("REDIS_URL", "redis://cache?db=2"), ("REDIS_DB", "5")]).1,
        5
    );
}

#[test]
fn without_one_its_parts() {
    let (address, database, user, password) = one(&[
        ("REDIS_HOST", "cache"),
        ("REDIS_PORT", "7000"),
        ("REDIS_PASSWORD", "p@ss/w:rd"),
        ("REDIS_DB", "2"),
    ]);
    assert_eq!((address.as_str(), database, user), ("cache:7000", 2, None));
    assert_eq!(password.as_deref(), Some("p@ss/w:rd"));
    assert_eq!(
        one(&[("REDIS_HOST", "::1")]).0,
        one(&[("REDIS_HOST", "[::1]")]).0
    );
    assert_eq!(
        one(&[("REDIS_HOST", "u:p@cache/4")]),
        server("u:p@cache/4:6379", 0),
        "a name is no URL"
    );
}

#[test]
fn nonsense_is_told() {
    for (name, value) in [
        ("REDIS_PORT", "tcp://10.0.0.1:6379"),
        ("REDIS_PORT", "65536"),
        ("REDIS_DB", "-1"),
        ("REDIS_DB", "one"),
    ] {
        let error = from(&[(name, value)]).unwrap_err();
        assert_eq!(error.to_string(), format!("{name} must be a number"));
    }
    let wrong = |url| error(&Config::new(url));
    assert!(wrong("").starts_with("there is no URL"));
    assert!(wrong(",").starts_with("there is no URL"));
    assert!(wrong("localhost:6379").starts_with("the URL must begin with"));
    assert!(wrong("http://cache").starts_with("the URL must begin with"));
    assert!(wrong("redis://cache/x").starts_with("the URL makes no sense"));
    assert!(wrong("redis://cache/-1").contains("below zero"));
    let plain = Config::new("redis://cache");
    assert!(error(&plain.clone().timeout(Duration::ZERO)).contains("1 ms"));
    assert!(error(&plain.clone().connect_timeout(Duration::MAX)).contains("minute"));
    for prefix in ["a b", "{a}", "a}", "ä", &"x".repeat(65)] {
        assert!(error(&plain.clone().key_prefix(prefix)).contains("key prefix"));
    }
    plain.clone().key_prefix("").check().unwrap();
    plain.key_prefix("x".repeat(64)).check().unwrap();
}

#[test]
fn several_are_a_cluster() {
    let config = from(&[("REDIS_URL", "redis://u:p@a, redis://u:p@b:7000/0")]).unwrap();
    assert!(config.check().unwrap().cluster);
    let nodes = servers(&config);
    assert_eq!(
        (nodes[0].0.as_str(), nodes[1].0.as_str()),
        ("a:6379", "b:7000")
    );
    assert!(nodes.iter().all(|node| node.3.as_deref() == Some("p")));
    assert!(Config::cluster(["redis://a"]).check().unwrap().cluster);
    assert!(Config::new("redis://a,").check().unwrap().cluster);
    assert!(!Config::new("redis://a").check().unwrap().cluster);

    let database = "a cluster has no database other than 0";
    assert_eq!(error(&Config::new("redis://a,redis://b/1")), database);
    assert_eq!(error(&Config::cluster(["redis://a"]).database(1)), database);
    let nodes = "the nodes of a cluster must have one user and password";
    assert!(error(&Config::new("redis://:p@a,redis://:q@b")).starts_with(nodes));
    assert!(error(&Config::new("redis://a,redis://:q@b")).starts_with(nodes));
    assert!(error(&Config::new("redis+unix:///a,redis+unix:///b")).starts_with(nodes));
    let filled = Config::new("redis://a,redis://:q@b").password("q");
    assert!(
        filled.check().is_ok(),
        "a password for those that have none"
    );
}

#[test]
fn users_and_sockets() {
    let unix = Config::new("redis+unix:///run/redis.sock?db=2&user=u&pass=p").database(5);
    let server = servers(&unix).remove(0);
    assert_eq!((server.0.as_str(), server.1), ("/run/redis.sock", 2));
    assert_eq!(
        (server.2.as_deref(), server.3.as_deref()),
        (Some("u"), Some("p"))
    );
    let config = Config::new("redis+unix:///run/redis.sock")
        .database(5)
        .user("v")
        .password("w");
    let server = servers(&config).remove(0);
    assert_eq!(
        (server.1, server.2.as_deref(), server.3.as_deref()),
        (5, Some("v"), Some("w"))
    );
    let escaped = Config::new("redis://us%40er:pa%2Css@cache")
        .user("v")
        .password("w");
    let server = servers(&escaped).remove(0);
    assert_eq!(
        (server.2.as_deref(), server.3.as_deref()),
        (Some("us@er"), Some("pa,ss"))
    );
}

#[test]
fn tls_is_a_feature_and_is_never_blind() {
    let secure = Config::new("rediss://cache").check();
    if cfg!(feature = "tls") {
        secure.unwrap();
        #[cfg(feature = "tls")]
        {
            let mixed = Config::new("rediss://a,redis://b");
            assert!(matches!(mixed.check(), Err(ConfigError::ClusterNodes)));
            let empty = Config::new("rediss://cache").root_certificates("nothing");
            let error = Redis::from_config(empty).unwrap_err();
            assert!(matches!(error, ConfigError::Certificate(_)));
        }
    } else {
        assert!(matches!(secure, Err(ConfigError::NotBuiltIn)));
    }
    let blind = Config::new("rediss://cache#insecure").check();
    assert!(matches!(blind, Err(ConfigError::NotBuiltIn)));
}

/// A key that has lost its line breaks, as variables do to it, was shown whole.
#[cfg(feature = "tls")]
#[test]
fn a_key_that_cannot_be_read_is_not_shown() {
    let words = "opensesame opensesame";
    for key in [
        format!("-----BEGIN PRIVATE KEY----- {words} -----END PRIVATE KEY-----"),
        format!("-----BEGIN PRIVATE KEY----- {words}"),
        format!("-----BEGIN PRIVATE KEY-----\n{words}"),
        words.to_owned(),
    ] {
        let certificates: [fn(Config, &str) -> Config; 3] = [
            |config, key| config.client_certificate("", key),
            |config, key| config.client_certificate(key, key),
            |config, key| config.root_certificates(key),
        ];
        for with in certificates {
            let config = with(Config::new("rediss://cache"), &key);
            let error = Redis::from_config(config).unwrap_err();
            let cause = Error::source(&error).expect("what is wrong");
            for shown in [format!("{error:?}"), format!("{cause} {cause:?}")] {
                // As text, or byte by byte.
                assert!(!shown.contains("opens"), "{shown}");
                assert!(!shown.contains("111, 112, 101"), "{shown}");
            }
        }
    }
}

#[test]
fn secrets_are_not_shown() {
    const SECRETS: [&str; 3] = ["opensesame", "alibaba", "cave"];
    let hidden = |shown: &str| {
        for secret in SECRETS {
            assert!(!shown.contains(secret), "{shown}");
        }
    };
    let config = Config::new("redis://alibaba:opensesame@cave")
        .user("alibaba")
        .password("opensesame");
    hidden(&format!("{config:?}"));
    let redis = Redis::from_config(config).unwrap();
    hidden(&format!(
        "{redis:?} {:?} {:?}",
        redis.watch(),
        redis.subscribe("x")
    ));
    for url in [
        "redis://alibaba:opensesame@cave/x",
        "redis://alibaba:opensesame@cave:99999",
        "redis://alibaba:opensesame@cave/-1",
        "reddis://alibaba:opensesame@cave",
        "redis://alibaba:opensesame@cave,redis://cave",
        "redis://alibaba:open sesame@",
        "redis://alibaba:opensesame@cave?protocol=7",
    ] {
        let error = Redis::from_url(url).unwrap_err();
        let mut shown = format!("{error} {error:?}");
        let mut cause = Error::source(&error);
        while let Some(error) = cause {
            shown.push_str(&format!(" {error} {error:?}"));
            cause = error.source();
        }
        hidden(&shown);
    }
}
