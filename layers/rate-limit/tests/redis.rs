//! A fleet's limits against a real Redis: what clients see, what is in it, and
//! what happens when it is gone.

use std::{convert::Infallible, sync::Arc, time::Duration};

use buttress_core::{
    Head, Refusal, RefusalKind, clock,
    key::{self, Key},
    testing::{ReadinessProbe, Step, web},
};
use buttress_rate_limit::{
    HeaderFormat, Limit, Quota, RateLimitBuilder, RateLimitInfo, RateLimitLayer,
    redis::{FleetLayer, Mode, OnStoreError, TokenBucket},
};
use buttress_redis::{
    Cmd, Config, Redis,
    testing::{Server, Wire},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimit, service_fn};

type Body = Full<Bytes>;

fn builder(quota: Quota) -> RateLimitBuilder {
    RateLimitLayer::builder().limit(Limit::new(quota).key(key::header("x-key")))
}

fn layer(redis: &Redis, quota: Quota) -> FleetLayer {
    builder(quota).redis(redis).build().unwrap()
}

fn request(key: &str) -> Request<Body> {
    Request::builder()
        .header("x-key", key)
        .body(Body::default())
        .unwrap()
}

async fn ok(_: Request<Body>) -> Result<Response<Body>, Infallible> {
    Ok(web::response(200, ""))
}

async fn send(layer: &FleetLayer, key: &str) -> Response<()> {
    let response = layer.layer(service_fn(ok)).oneshot(request(key)).await;
    response.unwrap().map(drop)
}

fn header<'a>(response: &'a Response<()>, name: &str) -> Option<&'a str> {
    response
        .headers()
        .get(name)
        .map(|value| value.to_str().unwrap())
}

/// A handle whose operations take no longer than that.
fn hasty(server: &Server, millis: u64) -> Redis {
    let config = Config::new(server.url()).timeout(Duration::from_millis(millis));
    Redis::from_config(config).unwrap()
}

async fn ask<T: buttress_redis::FromRedisValue>(redis: &Redis, words: &[&str]) -> T {
    let mut cmd = Cmd::new();
    for word in words {
        cmd.arg(word);
    }
    redis.run("test", &cmd).await.unwrap()
}

/// How often scripts were called.
async fn calls(redis: &Redis) -> u64 {
    let text: String = ask(redis, &["INFO", "commandstats"]).await;
    (text.lines())
        .filter_map(|line| line.strip_prefix("cmdstat_eval"))
        .map(|line| {
            let calls = line.split("calls=").nth(1).unwrap();
            calls.split(',').next().unwrap().parse::<u64>().unwrap()
        })
        .sum()
}

#[tokio::test]
async fn two_processes_share_one_quota_and_tell_it_alike() {
    let server = Server::start().await;
    let quota = Quota::per_hour(5);
    let one = layer(&server.redis(), quota);
    let two = layer(&server.redis(), quota);
    for left in [4, 3, 2, 1, 0_u32] {
        let response = send(if left % 2 == 0 { &one } else { &two }, "a").await;
        assert_eq!(response.status(), 200);
        assert_eq!(header(&response, "x-ratelimit-limit"), Some("5"));
        let told = header(&response, "x-ratelimit-remaining").unwrap();
        assert_eq!(told, left.to_string());
    }
    for layer in [&one, &two] {
        let response = send(layer, "a").await;
        assert_eq!(response.status(), 429);
        let wait: u64 = header(&response, "retry-after").unwrap().parse().unwrap();
        assert!((715..=720).contains(&wait), "{wait}");
        assert_eq!(header(&response, "x-ratelimit-remaining"), Some("0"));
    }
    // Another client, and another layer, have their own.
    assert_eq!(send(&one, "b").await.status(), 200);
    let other = builder(quota)
        .name("other")
        .redis(&server.redis())
        .build()
        .unwrap();
    assert_eq!(send(&other, "a").await.status(), 200);
}

/// Whoever came while the last token was asked for asked, too, and all asked a
/// trip too early.
#[tokio::test]
async fn a_crowd_that_is_denied_costs_about_a_command_for_each_token() {
    let server = Server::start().await;
    let layer = layer(&server.redis(), Quota::per_second(5).burst(1));
    assert_eq!(send(&layer, "a").await.status(), 200);
    let before = calls(&server.redis()).await;
    let began = clock::now();
    let mut crowd = tokio::task::JoinSet::new();
    for _ in 0..30 {
        let layer = layer.clone();
        crowd.spawn(async move {
            let mut passed = 0;
            while clock::now() - began < Duration::from_millis(1900) {
                passed += u64::from(send(&layer, "a").await.status() == 200);
                tokio::task::yield_now().await;
            }
            passed
        });
    }
    let passed: u64 = crowd.join_all().await.into_iter().sum();
    let asked = calls(&server.redis()).await - before;
    // Nine tokens came back; a busy machine may be late for some.
    assert!((5..=10).contains(&passed), "{passed}");
    assert!(asked <= passed + 4, "{asked} for {passed}");
}

#[tokio::test]
async fn a_denied_key_costs_redis_nothing_until_it_may_pass() {
    let server = Server::start().await;
    let redis = server.redis();
    let layer = layer(&redis, Quota::new(2, Duration::from_secs(2)).burst(2));
    assert_eq!(send(&layer, "a").await.status(), 200);
    assert_eq!(send(&layer, "a").await.status(), 200);
    let before = calls(&redis).await;
    let began = clock::now();
    let mut refused = 0;
    while refused < 1000 && clock::now() - began < Duration::from_millis(900) {
        assert_eq!(send(&layer, "a").await.status(), 429);
        refused += 1;
    }
    assert!(refused > 50);
    assert_eq!(calls(&redis).await, before);
    // Waiting what is told succeeds.
    tokio::time::sleep(Duration::from_secs(1).saturating_sub(clock::now() - began)).await;
    assert_eq!(send(&layer, "a").await.status(), 200);
    // A reset through the same handle is noticed at once.
    assert_eq!(send(&layer, "a").await.status(), 429);
    let key = key::header("x-key").key("a");
    assert!(layer.handle().reset("default", &key).await.unwrap());
    assert_eq!(send(&layer, "a").await.status(), 200);
}

#[tokio::test]
async fn what_costs_more_may_be_refused_while_less_passes() {
    let server = Server::start().await;
    let layer =
        RateLimitLayer::builder()
            .limit(Limit::new(Quota::per_hour(10)).cost_by(|head: Head<'_>| {
                head.headers["x-cost"].to_str().unwrap().parse().unwrap()
            }))
            .redis(&server.redis())
            .build()
            .unwrap();
    let service = layer.layer(service_fn(ok));
    let mut statuses = Vec::new();
    for cost in ["8", "5", "2", "1", "11", "0"] {
        let request = Request::builder()
            .header("x-cost", cost)
            .body(Body::default())
            .unwrap();
        let response = service.clone().oneshot(request).await.unwrap();
        statuses.push(response.status().as_u16());
        if cost == "11" {
            assert!(!response.headers().contains_key("retry-after"));
        }
    }
    assert_eq!(statuses, [200, 429, 200, 429, 403, 200]);
}

#[tokio::test]
async fn several_limits_are_charged_all_or_none_in_one_trip() {
    let server = Server::start().await;
    let redis = server.redis();
    let layer = RateLimitLayer::builder()
        .limit(
            Limit::new(Quota::per_hour(10))
                .name("a")
                .key(key::header("x-key")),
        )
        .limit(
            Limit::new(Quota::per_hour(2))
                .name("b")
                .key(key::header("x-key")),
        )
        .limit(Limit::new(Quota::per_hour(10)).name("c"))
        .headers([HeaderFormat::XRateLimit, HeaderFormat::Draft11])
        .redis(&redis)
        .build()
        .unwrap();
    // The script is known.
    send(&layer, "x").await;
    let before = calls(&redis).await;
    for _ in 0..2 {
        let response = send(&layer, "k").await;
        assert_eq!(response.status(), 200);
        assert_eq!(header(&response, "x-ratelimit-limit"), Some("2"));
    }
    assert_eq!(calls(&redis).await, before + 2);
    let other = RateLimitLayer::builder()
        .limit(
            Limit::new(Quota::per_hour(10))
                .name("a")
                .key(key::header("x-key")),
        )
        .limit(
            Limit::new(Quota::per_hour(2))
                .name("b")
                .key(key::header("x-key")),
        )
        .limit(Limit::new(Quota::per_hour(10)).name("c"))
        .headers([HeaderFormat::Draft11])
        .redis(&server.redis())
        .build()
        .unwrap();
    // One that knows nothing has to ask, and hears the same.
    for layer in [&layer, &other, &other] {
        let response = send(layer, "k").await;
        assert_eq!(response.status(), 429);
        let told = header(&response, "ratelimit").unwrap();
        assert!(told.starts_with("\"a\";r=8;t="), "{told}");
        assert!(
            told.contains("\"b\";r=0;t=") && told.contains("\"c\";r=7;t="),
            "{told}"
        );
    }
    let handle = other.handle();
    let key = key::header("x-key").key("k");
    assert_eq!(handle.usage("a", &key).await.unwrap().remaining, 8);
    assert_eq!(
        handle.usage("c", &Key::global()).await.unwrap().remaining,
        7
    );
}

#[tokio::test]
async fn every_key_has_the_prefix_a_ttl_and_no_secret() {
    let server = Server::start().await;
    let config = Config::new(server.url()).key_prefix("shop:");
    let redis = Redis::from_config(config.timeout(Duration::from_secs(5))).unwrap();
    let layer = RateLimitLayer::builder()
        .name("api")
        .limit(
            Limit::new(Quota::per_minute(3))
                .name("by key")
                .key(key::header("x-key")),
        )
        .limit(Limit::new(Quota::new(7, Duration::from_micros(11))).name("all"))
        .redis(&redis)
        .build()
        .unwrap();
    for key in ["sk-secret-1", "sk-secret-2", "2001:db8::1"] {
        for _ in 0..4 {
            send(&layer, key).await;
        }
    }
    let keys: Vec<String> = ask(&redis, &["KEYS", "*"]).await;
    assert!(keys.len() >= 3, "{keys:?}");
    for key in keys {
        assert!(key.starts_with("shop:"), "{key}");
        assert!(!key.contains("secret") && !key.contains("2001"), "{key}");
        let ttl: i64 = ask(&redis, &["PTTL", &key]).await;
        // -2: it is gone by now.
        assert!((-2..=60_001).contains(&ttl) && ttl != -1, "{key} has {ttl}");
        if key.starts_with("shop:rate-limit:") {
            assert!(key.starts_with("shop:rate-limit:{api:"), "{key}");
            assert!(
                key.ends_with("}:by%20key") || key.ends_with("}:all"),
                "{key}"
            );
        }
    }
}

#[tokio::test]
async fn a_tracked_key_takes_little_memory() {
    let server = Server::start().await;
    let redis = server.redis();
    let limit = layer(&redis, Quota::per_hour(10))
        .handle()
        .limit("default")
        .unwrap();
    let memory = async || -> u64 {
        let text: String = ask(&redis, &["INFO", "memory"]).await;
        let line = text
            .lines()
            .find(|line| line.starts_with("used_memory_dataset:"));
        line.unwrap().split(':').nth(1).unwrap().parse().unwrap()
    };
    let before = memory().await;
    for key in 0..10_000_u32 {
        limit.check(&Key::from(key)).await.unwrap();
    }
    let each = (memory().await - before) / 10_000;
    assert!(each <= 200, "{each} bytes a key");
}

#[tokio::test]
async fn a_script_that_was_forgotten_costs_a_trip_and_nothing_else() {
    let server = Server::start().await;
    let redis = server.redis();
    let layer = layer(&redis, Quota::per_hour(10));
    assert_eq!(
        header(&send(&layer, "a").await, "x-ratelimit-remaining"),
        Some("9")
    );
    ask::<()>(&redis, &["SCRIPT", "FLUSH"]).await;
    assert_eq!(
        header(&send(&layer, "a").await, "x-ratelimit-remaining"),
        Some("8")
    );
}

/// Fifty layers, each with a connection of its own, on several threads.
#[test]
fn a_fleet_never_lets_more_through_than_the_quota() {
    const FLEET: usize = 50;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let server = Server::start().await;
        let quota = Quota::per_second(20).burst(30);
        let mut tasks = tokio::task::JoinSet::new();
        let began = clock::now();
        for number in 0..FLEET {
            let redis = server.redis();
            tasks.spawn(async move {
                // A clock that is wrong by years is no matter.
                let wrong = Duration::from_secs(number as u64 * 100_000_000);
                let layer = builder(quota)
                    .wall_clock(move || wrong)
                    .redis(&redis)
                    .build();
                let layer = layer.unwrap();
                let mut passed = 0_u32;
                while clock::now() - began < Duration::from_millis(1500) {
                    passed += u32::from(send(&layer, "a").await.status() == 200);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                passed
            });
        }
        let mut passed = 0;
        while let Some(one) = tasks.join_next().await {
            passed += one.unwrap();
        }
        let took = (clock::now() - began).as_secs_f64();
        let most = 30.0 + 20.0 * took;
        assert!(f64::from(passed) <= most, "{passed} of {most}");
        // And what there is can be had.
        assert!(passed >= 45, "{passed} of {most}");
    });
}

#[tokio::test]
async fn refunds_by_response_are_told_and_true() {
    let server = Server::start().await;
    let layer = builder(Quota::per_hour(3))
        .refund_if(|status, _| status.is_success())
        .headers([HeaderFormat::XRateLimit, HeaderFormat::Draft11])
        .redis(&server.redis())
        .build()
        .unwrap();
    for _ in 0..10 {
        let response = send(&layer, "a").await;
        assert_eq!(response.status(), 200);
        assert_eq!(header(&response, "x-ratelimit-remaining"), Some("3"));
        assert_eq!(header(&response, "ratelimit"), Some("\"default\";r=3;t=0"));
    }
    let fails = layer.layer(service_fn(async |_: Request<Body>| {
        Ok::<_, Infallible>(web::response(401, ""))
    }));
    for left in ["2", "1", "0"] {
        let response = fails.clone().oneshot(request("a")).await.unwrap();
        assert_eq!(response.headers()["x-ratelimit-remaining"], left);
    }
    assert_eq!(send(&layer, "a").await.status(), 429);
    layer
        .handle()
        .refund("default", &key::header("x-key").key("a"), 2)
        .await
        .unwrap();
    assert_eq!(send(&layer, "a").await.status(), 200);
}

#[tokio::test]
async fn handlers_are_told_shadows_pass_and_grpc_is_answered() {
    let server = Server::start().await;
    let redis = server.redis();
    let told = builder(Quota::per_hour(5))
        .info(true)
        .redis(&redis)
        .build()
        .unwrap();
    let service = told.layer(service_fn(async |request: Request<Body>| {
        let info = request
            .extensions()
            .get::<RateLimitInfo>()
            .expect("it is told");
        assert_eq!((info.limit, info.remaining), (5, 4));
        Ok::<_, Infallible>(web::response(200, ""))
    }));
    service.oneshot(request("info")).await.unwrap();

    let shadow = builder(Quota::per_hour(1))
        .shadow(true)
        .redis(&redis)
        .build()
        .unwrap();
    for _ in 0..3 {
        let response = send(&shadow, "shadow").await;
        assert_eq!(response.status(), 200);
        assert_eq!(header(&response, "x-ratelimit-limit"), None);
    }

    let layer = layer(&redis, Quota::per_hour(1));
    send(&layer, "grpc").await;
    for fresh in [&layer, &self::layer(&server.redis(), Quota::per_hour(1))] {
        let mut call = request("grpc");
        call.headers_mut()
            .insert("content-type", "application/grpc".parse().unwrap());
        let response = fresh.layer(service_fn(ok)).oneshot(call).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "8");
        assert!(response.headers().contains_key("grpc-retry-pushback-ms"));
    }
}

#[tokio::test]
async fn tiers_and_keys_of_their_own_have_their_quotas() {
    let server = Server::start().await;
    let gold = Quota::per_hour(100).check().unwrap();
    let free = Quota::per_hour(2).check().unwrap();
    let by_key = key::header("x-key");
    let layer = RateLimitLayer::builder()
        .limit(
            Limit::new(Quota::per_hour(2))
                .quota_by(move |head: Head<'_>| {
                    if head.headers["x-key"] == "gold" {
                        gold
                    } else {
                        free
                    }
                })
                .quota_for(by_key.key("best"), Quota::per_hour(500))
                .key(by_key.clone()),
        )
        .redis(&server.redis())
        .build()
        .unwrap();
    for (key, burst) in [("gold", "100"), ("x", "2"), ("best", "500")] {
        assert_eq!(
            header(&send(&layer, key).await, "x-ratelimit-limit"),
            Some(burst)
        );
    }
}

#[tokio::test]
async fn errors_where_it_is_no_http() {
    let server = Server::start().await;
    let layer = RateLimitLayer::any()
        .limit(Limit::any(Quota::per_hour(1)))
        .redis(&server.redis())
        .build()
        .unwrap();
    let service = layer.layer(service_fn(async |n: u32| Ok::<_, Infallible>(n)));
    assert_eq!(service.clone().oneshot(1).await.unwrap(), 1);
    let error = service.oneshot(2).await.unwrap_err();
    let refusal = error.downcast_ref::<Refusal>().unwrap();
    assert_eq!(refusal.kind(), RefusalKind::RateLimited);
    assert!(refusal.retry_after().is_some());
}

/// Only the instance that was polled ready is called, and what a dropped future
/// held is given back.
#[tokio::test]
async fn readiness_goes_with_the_request() {
    let server = Server::start().await;
    let layer = layer(&server.redis(), Quota::per_hour(1000));
    ReadinessProbe::new(
        || request("a"),
        |_: &Request<Body>| Step::<Response<Body>, Infallible>::ok(web::response(200, "")),
    )
    .check(&layer)
    .await;
    let numbers = RateLimitLayer::any()
        .limit(Limit::any(Quota::per_hour(1000)))
        .redis(&server.redis())
        .build()
        .unwrap();
    ReadinessProbe::new(|| 1, |n: &u32| Step::<u32, Infallible>::ok(*n))
        .check(&numbers)
        .await;
    let mut service = layer.layer(ConcurrencyLimit::new(service_fn(ok), 1));
    for _ in 0..3 {
        service
            .ready()
            .await
            .unwrap()
            .call(request("a"))
            .await
            .unwrap();
    }
    // Dropped while Redis is asked.
    let mut asking = Box::pin(service.ready().await.unwrap().call(request("a")));
    assert!(tokio_test::task::spawn(asking.as_mut()).poll().is_pending());
    drop(asking);
    let again = tokio::time::timeout(Duration::from_secs(5), service.ready());
    again.await.expect("the permit is back").unwrap();
    service.call(request("a")).await.unwrap();
}

#[tokio::test]
async fn without_redis_each_way_is_as_it_was_set() {
    let mut server = Server::start().await;
    let redis = hasty(&server, 100);
    let quota = Quota::per_hour(4);
    let with = |on_error, name: &'static str| {
        builder(quota)
            .name(name)
            .redis(&redis)
            .on_store_error(on_error)
            .build()
            .unwrap()
    };
    let (local, allow, deny) = (
        with(OnStoreError::Local, "local"),
        with(OnStoreError::Allow, "allow"),
        with(OnStoreError::Deny, "deny"),
    );
    for layer in [&local, &allow, &deny] {
        assert_eq!(send(layer, "a").await.status(), 200);
    }
    server.kill();
    // Each request has its answer in time, the first too, and what was known
    // stays known.
    let began = clock::now();
    let response = send(&local, "a").await;
    assert!(clock::now() - began < Duration::from_secs(2));
    assert_eq!(response.status(), 200);
    assert_eq!(header(&response, "x-ratelimit-remaining"), Some("2"));
    for _ in 0..2 {
        assert_eq!(send(&local, "a").await.status(), 200);
    }
    let refused = send(&local, "a").await;
    assert_eq!(refused.status(), 429);
    for _ in 0..6 {
        let passed = send(&allow, "a").await;
        assert_eq!(passed.status(), 200);
        assert_eq!(header(&passed, "x-ratelimit-limit"), None);
        let denied = send(&deny, "a").await;
        assert_eq!(denied.status(), 503);
        assert_eq!(header(&denied, "retry-after"), None);
        assert_eq!(header(&denied, "x-ratelimit-limit"), None);
    }
    assert!(!redis.is_up());
    let began = clock::now();
    for _ in 0..1000 {
        send(&allow, "a").await;
    }
    assert!(clock::now() - began < Duration::from_secs(1), "they wait");
    // Back, with nothing in it: what was let through is told to it.
    server.restart().await;
    let mut watch = redis.watch();
    while !redis.is_up() {
        tokio::time::timeout(Duration::from_secs(5), watch.changed())
            .await
            .unwrap();
    }
    assert_eq!(send(&local, "b").await.status(), 200);
    assert_eq!(send(&deny, "a").await.status(), 200);
    let fresh = builder(quota)
        .name("local")
        .redis(&server.redis())
        .build()
        .unwrap();
    let key = key::header("x-key").key("a");
    let began = clock::now();
    loop {
        let left = fresh
            .handle()
            .usage("default", &key)
            .await
            .unwrap()
            .remaining;
        if left == 0 {
            break;
        }
        assert!(clock::now() - began < Duration::from_secs(5), "{left} left");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn alone_a_process_takes_its_share() {
    let mut server = Server::start().await;
    let redis = hasty(&server, 100);
    let layer = builder(Quota::per_hour(100))
        .redis(&redis)
        .share(10)
        .build()
        .unwrap();
    // 50 of 100 are spent by all together: 5 are left to each of ten.
    for _ in 0..50 {
        assert_eq!(send(&layer, "a").await.status(), 200);
    }
    server.kill();
    let mut passed = 0;
    for _ in 0..100 {
        passed += u32::from(send(&layer, "a").await.status() == 200);
    }
    assert_eq!(passed, 5);
}

#[tokio::test]
async fn a_stopped_server_holds_nobody_up() {
    let server = Server::start().await;
    let redis = hasty(&server, 1000);
    let layer = Arc::new(layer(&redis, Quota::per_second(1_000_000)));
    assert_eq!(send(&layer, "a").await.status(), 200);
    server.pause();
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..200_u32 {
        let layer = Arc::clone(&layer);
        tasks.spawn(async move {
            let mut longest = Duration::ZERO;
            for _ in 0..20 {
                let began = clock::now();
                assert_eq!(send(&layer, &number.to_string()).await.status(), 200);
                longest = longest.max(clock::now() - began);
            }
            longest
        });
    }
    let mut longest = Duration::ZERO;
    while let Some(one) = tasks.join_next().await {
        longest = longest.max(one.unwrap());
    }
    // Nobody waits for two calls, one after the other.
    assert!(longest < Duration::from_millis(1900), "{longest:?}");
    assert!(longest >= Duration::from_millis(1000), "{longest:?}");
    server.resume();
    let mut watch = redis.watch();
    while !redis.is_up() {
        tokio::time::timeout(Duration::from_secs(5), watch.changed())
            .await
            .unwrap();
    }
    let before = calls(&redis).await;
    assert_eq!(send(&layer, "z").await.status(), 200);
    assert!(calls(&redis).await > before);
}

#[tokio::test]
async fn a_bucket_of_tokens() {
    let server = Server::start().await;
    let bucket = TokenBucket::new(&server.redis(), "mails", 10, 2).unwrap();
    let other = TokenBucket::new(&server.redis(), "mails", 10, 2).unwrap();
    let ann = Key::from("ann");
    let taken = bucket.take(&ann, 8).await.unwrap();
    assert!(taken.allowed && taken.remaining == 2 && taken.retry_after_ms == Some(0));
    assert!(taken.reset > Duration::from_secs(3) && taken.reset <= Duration::from_secs(4));
    for bucket in [&bucket, &other] {
        let taken = bucket.take(&ann, 5).await.unwrap();
        assert!(!taken.allowed && taken.remaining >= 2);
        assert!(
            (500..=1500).contains(&taken.retry_after_ms.unwrap()),
            "{taken:?}"
        );
    }
    assert_eq!(bucket.take(&ann, 11).await.unwrap().retry_after_ms, None);
    assert_eq!(
        bucket.take(&Key::from("bob"), 0).await.unwrap().remaining,
        10
    );
    assert!(TokenBucket::new(&server.redis(), "", 1, 1).is_err());
    assert!(TokenBucket::new(&server.redis(), "a", 0, 1).is_err());
}

/// A cluster of one node.
async fn cluster() -> Server {
    let server = Server::with(["--cluster-enabled", "yes"]).await;
    server
        .cmd::<()>(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"])
        .await;
    let began = clock::now();
    loop {
        let state: String = server.cmd(&["CLUSTER", "INFO"]).await;
        if state.contains("cluster_state:ok") {
            break;
        }
        assert!(clock::now() - began < Duration::from_secs(20), "{state}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    server
}

/// In a cluster, of one node here, a script's keys must be of one slot.
#[tokio::test]
async fn in_a_cluster_limits_of_several_slots_are_all_or_none() {
    let server = cluster().await;
    let config = Config::cluster([server.url(), server.url()])
        .timeout(Duration::from_secs(5))
        .connect_timeout(Duration::from_secs(5));
    let redis = Redis::from_config(config).unwrap();
    assert!(redis.is_cluster());
    let layer = RateLimitLayer::builder()
        .limit(
            Limit::new(Quota::per_hour(10))
                .name("user")
                .key(key::header("x-key")),
        )
        .limit(
            Limit::new(Quota::per_hour(8))
                .name("same")
                .key(key::header("x-key")),
        )
        .limit(Limit::new(Quota::per_hour(3)).name("all"))
        .redis(&redis)
        .build()
        .unwrap();
    for left in ["2", "1", "0"] {
        let response = send(&layer, "a").await;
        assert_eq!(response.status(), 200);
        assert_eq!(header(&response, "x-ratelimit-remaining"), Some(left));
    }
    for _ in 0..3 {
        let response = send(&layer, "a").await;
        assert_eq!(response.status(), 429);
        assert_eq!(header(&response, "x-ratelimit-limit"), Some("3"));
    }
    // What was charged to the others was given back.
    let (handle, key) = (layer.handle(), key::header("x-key").key("a"));
    assert_eq!(handle.usage("user", &key).await.unwrap().remaining, 7);
    assert_eq!(handle.usage("same", &key).await.unwrap().remaining, 5);
    assert_eq!(
        handle.usage("all", &Key::global()).await.unwrap().remaining,
        0
    );
    // Many at once, of many slots.
    let mut tasks = tokio::task::JoinSet::new();
    let many = RateLimitLayer::builder()
        .name("many")
        .limit(
            Limit::new(Quota::per_hour(3))
                .name("user")
                .key(key::header("x-key")),
        )
        .limit(Limit::new(Quota::per_hour(100)).name("all"))
        .redis(&redis)
        .build()
        .unwrap();
    for number in 0..150 {
        let many = many.clone();
        tasks.spawn(async move {
            let key = (number % 30).to_string();
            send(&many, &key).await.status() == 200
        });
    }
    let mut passed = 0;
    while let Some(one) = tasks.join_next().await {
        passed += u32::from(one.unwrap());
    }
    let spent = 100
        - many
            .handle()
            .usage("all", &Key::global())
            .await
            .unwrap()
            .remaining;
    assert_eq!(passed, spent);
    // 30 users have 3 each; some are refused in the gap of another's giving back.
    assert!((30..=90).contains(&passed), "{passed}");
}

/// Before Redis went away 54 were charged, one more was taken back without it.
#[tokio::test]
async fn a_refund_that_redis_does_not_hear_of_leaves_what_is_owed() {
    let mut server = Server::start().await;
    let redis = hasty(&server, 100);
    let layer = builder(Quota::per_hour(100))
        .redis(&redis)
        .share(10)
        .build()
        .unwrap();
    for _ in 0..55 {
        assert_eq!(send(&layer, "a").await.status(), 200);
    }
    server.kill();
    let key = key::header("x-key").key("a");
    layer.handle().refund("default", &key, 1).await.unwrap();
    let mut passed = 0;
    for _ in 0..100 {
        passed += u32::from(send(&layer, "a").await.status() == 200);
    }
    // 46 of the 100 are left to ten.
    assert_eq!(passed, 4);
}

/// Charges in three slots are given back all at once.
#[tokio::test]
async fn in_a_cluster_a_refund_takes_no_longer_than_one_operation() {
    let server = cluster().await;
    let config = Config::cluster([server.url(), server.url()])
        .timeout(Duration::from_secs(2))
        .connect_timeout(Duration::from_secs(5));
    let redis = Redis::from_config(config).unwrap();
    let limit = |name: &'static str| Limit::new(Quota::per_hour(10)).name(name);
    let layer = RateLimitLayer::builder()
        .limit(limit("user").key(key::header("x-key")))
        .limit(limit("other").key(key::header("x-other")))
        .limit(limit("all"))
        .refund_if(|status, _| status.is_server_error())
        .redis(&redis)
        .build()
        .unwrap();
    let server = Arc::new(server);
    let paused = Arc::clone(&server);
    let service = layer.layer(service_fn(move |_: Request<Body>| {
        paused.pause();
        std::future::ready(Ok::<_, Infallible>(web::response(500, "")))
    }));
    let mut request = request("a");
    let other = http::HeaderValue::from_static("b");
    request.headers_mut().insert("x-other", other);
    let began = clock::now();
    let response = service.oneshot(request).await.unwrap();
    let took = clock::now() - began;
    server.resume();
    assert_eq!(response.status(), 500);
    assert!(took >= Duration::from_secs(2), "{took:?}");
    assert!(took < Duration::from_millis(3900), "{took:?}");
}

/// It answers, but cannot: no memory, or no master any more.
#[tokio::test]
async fn a_server_that_cannot_is_as_one_that_is_gone() {
    let server = Server::start().await;
    let redis = server.redis();
    let with = |on_error, name: &'static str| {
        let builder = builder(Quota::per_hour(4)).name(name).redis(&redis);
        builder.on_store_error(on_error).build().unwrap()
    };
    let (local, deny) = (
        with(OnStoreError::Local, "l"),
        with(OnStoreError::Deny, "d"),
    );
    assert_eq!(send(&local, "a").await.status(), 200);
    for (breaks, mends) in [
        (
            &["CONFIG", "SET", "maxmemory", "1"][..],
            &["CONFIG", "SET", "maxmemory", "0"][..],
        ),
        (
            &["REPLICAOF", "127.0.0.1", "1"],
            &["REPLICAOF", "NO", "ONE"],
        ),
    ] {
        server.cmd::<()>(breaks).await;
        for _ in 0..4 {
            assert_eq!(send(&deny, "a").await.status(), 503, "{breaks:?}");
        }
        assert_eq!(send(&local, "a").await.status(), 200, "{breaks:?}");
        server.cmd::<()>(mends).await;
        let began = clock::now();
        while send(&deny, "b").await.status() != 200 {
            assert!(clock::now() - began < Duration::from_secs(10), "{mends:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        server.cmd::<()>(&["FLUSHALL"]).await;
        deny.handle()
            .reset("default", &key::header("x-key").key("b"))
            .await
            .unwrap();
    }
}

#[test]
fn strict_is_the_default() {
    assert_eq!(Mode::default(), Mode::Strict);
    assert_eq!(OnStoreError::default(), OnStoreError::Local);
}

/// How much of a burst another process sees used of a key: told within a second
/// of `since`, that is, and what a busy machine adds.
async fn told(other: &FleetLayer, key: &str, used: std::ops::RangeInclusive<u32>) {
    let key = key::header("x-key").key(key);
    let began = clock::now();
    loop {
        let seen = other.handle().usage("default", &key).await.unwrap();
        let seen = seen.limit - seen.remaining;
        if used.contains(&seen) {
            break;
        }
        let took = clock::now() - began;
        assert!(took < Duration::from_secs(3), "{seen} of {used:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // And no more of it is told later.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let seen = other.handle().usage("default", &key).await.unwrap();
    let seen = seen.limit - seen.remaining;
    assert!(used.contains(&seen), "{seen} of {used:?}");
}

/// Nobody sends a request after the server is back.
async fn an_idle_process_tells(mode: Mode) {
    let mut server = Server::start().await;
    let redis = hasty(&server, 100);
    let quota = Quota::per_hour(1_000);
    let with = |redis: &Redis| builder(quota).redis(redis).mode(mode.clone());
    let one = with(&redis).build().unwrap();
    assert_eq!(send(&one, "a").await.status(), 200);
    server.kill();
    let mut passed = 0;
    for _ in 0..20 {
        passed += u32::from(send(&one, "b").await.status() == 200);
    }
    assert_eq!(passed, 20);
    assert_eq!(send(&one, "c").await.status(), 200);
    server.restart().await;
    let other = with(&server.redis()).build().unwrap();
    told(&other, "b", 20..=20).await;
    told(&other, "c", 1..=1).await;
}

#[tokio::test]
async fn an_idle_process_tells_what_it_let_through_alone() {
    an_idle_process_tells(Mode::Strict).await;
}

#[tokio::test]
async fn an_idle_process_that_leases_tells_what_it_let_through_alone() {
    an_idle_process_tells(Mode::leased()).await;
}

#[tokio::test]
async fn a_limiter_that_is_gone_is_told_for_all_the_same() {
    let mut server = Server::start().await;
    let quota = Quota::per_hour(1_000);
    server.kill();
    {
        let one = layer(&hasty(&server, 100), quota);
        for _ in 0..10 {
            assert_eq!(send(&one, "a").await.status(), 200);
        }
    }
    server.restart().await;
    told(&layer(&server.redis(), quota), "a", 10..=10).await;
}

/// Who was to tell is gone with its runtime.
#[tokio::test]
async fn what_is_owed_outlives_the_runtime_in_which_it_was_let_through() {
    let mut server = Server::start().await;
    let redis = hasty(&server, 100);
    let quota = Quota::per_hour(1_000);
    let one = layer(&redis, quota);
    server.kill();
    let there = one.clone();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            for _ in 0..10 {
                assert_eq!(send(&there, "a").await.status(), 200);
            }
        });
    });
    let thread = tokio::task::spawn_blocking(move || thread.join().unwrap());
    thread.await.unwrap();
    server.restart().await;
    let began = clock::now();
    // Whichever request finds that it is back.
    redis.connect().await.unwrap();
    assert_eq!(send(&one, "b").await.status(), 200);
    told(&layer(&server.redis(), quota), "a", 10..=10).await;
    assert!(clock::now() - began < Duration::from_secs(4));
}

/// A connection that is never made looked like an answer that never came.
#[tokio::test]
async fn what_was_never_sent_is_charged_in_the_end() {
    for mode in [Mode::Strict, Mode::leased()] {
        let server = Server::start().await;
        let wire = Wire::to(&server).await;
        wire.stall();
        let config = Config::new(wire.url()).timeout(Duration::from_millis(100));
        let redis = Redis::from_config(config).unwrap();
        let with = |redis: &Redis| {
            builder(Quota::per_hour(1_000))
                .redis(redis)
                .mode(mode.clone())
        };
        let one = with(&redis).build().unwrap();
        for _ in 0..10 {
            assert_eq!(send(&one, "a").await.status(), 200);
        }
        assert!(!redis.is_up());
        wire.flow();
        let other = with(&server.redis()).build().unwrap();
        told(&other, "a", 10..=10).await;
    }
}

/// Requests of four clients of one key without a pause, until it is said to be
/// over. How many passed.
fn load(layer: &FleetLayer) -> (tokio::sync::watch::Sender<bool>, tokio::task::JoinSet<u32>) {
    let (over, is_over) = tokio::sync::watch::channel(false);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (layer, is_over) = (layer.clone(), is_over.clone());
        tasks.spawn(async move {
            let mut passed = 0;
            while !*is_over.borrow() {
                passed += u32::from(send(&layer, "a").await.status() == 200);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            passed
        });
    }
    (over, tasks)
}

/// Under load over the server's return: each request is charged there, or told
/// to it, once.
async fn each_is_charged_once(mode: Mode) {
    let mut server = Server::start().await;
    // Long: what runs into it may have been charged or not.
    let redis = hasty(&server, 5000);
    let quota = Quota::new(1_000_000, Duration::from_secs(100 * 24 * 60 * 60));
    let with = |redis: &Redis| builder(quota).redis(redis).mode(mode.clone());
    let one = with(&redis).build().unwrap();
    redis.connect().await.unwrap();
    server.kill();
    let (over, tasks) = load(&one);
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.restart().await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    over.send(true).unwrap();
    let passed: u32 = tasks.join_all().await.into_iter().sum();
    // What it holds ahead is not used.
    one.handle().give_back().await;
    let other = with(&server.redis()).build().unwrap();
    told(&other, "a", passed..=passed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_each_is_charged_once() {
    each_is_charged_once(Mode::Strict).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_that_leases_each_is_charged_once() {
    each_is_charged_once(Mode::leased()).await;
}

/// What was sent before the network stood still may be lost or come late, and is
/// nobody's; all else is charged once.
async fn stalled(mode: Mode, share: u32) {
    let server = Server::start().await;
    let wire = Wire::to(&server).await;
    let config = Config::new(wire.url()).timeout(Duration::from_millis(100));
    let redis = Redis::from_config(config).unwrap();
    let quota = Quota::new(1_000_000, Duration::from_secs(100 * 24 * 60 * 60));
    let with = |redis: &Redis| builder(quota).redis(redis).mode(mode.clone());
    let one = with(&redis).build().unwrap();
    redis.connect().await.unwrap();
    let (over, tasks) = load(&one);
    tokio::time::sleep(Duration::from_millis(200)).await;
    wire.stall();
    tokio::time::sleep(Duration::from_millis(800)).await;
    wire.flow();
    tokio::time::sleep(Duration::from_millis(600)).await;
    over.send(true).unwrap();
    let passed: u32 = tasks.join_all().await.into_iter().sum();
    one.handle().give_back().await;
    let other = with(&server.redis()).build().unwrap();
    // Three calls of four requests shut the gate; and a share may have been
    // granted to nobody.
    told(&other, "a", passed - 12..=passed + share + 12).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_it_tells_what_was_not_sent() {
    stalled(Mode::Strict, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_while_it_leases_it_tells_what_was_not_sent() {
    stalled(Mode::leased(), 100).await;
}
