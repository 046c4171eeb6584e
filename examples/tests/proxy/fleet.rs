//! Several proxies on one Redis, and what becomes of them when it is gone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::{
    clock,
    webhook::{Message, Secret, Signer, Standard},
};
use buttress_redis::testing::Server;
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;

use crate::support::{Proxy, Upstream, eventually, fetch, get, json, nobody, problem, reply};

/// Answers with a status that can be changed, and counts who came.
struct Counted {
    upstream: Upstream,
    status: Arc<AtomicU16>,
    calls: Arc<AtomicUsize>,
}

impl Counted {
    async fn start() -> Self {
        let status = Arc::new(AtomicU16::new(200));
        let calls = Arc::new(AtomicUsize::new(0));
        let (told, count) = (Arc::clone(&status), Arc::clone(&calls));
        let upstream = Upstream::start(move |_| {
            count.fetch_add(1, SeqCst);
            let mut answer = reply("");
            *answer.status_mut() = StatusCode::from_u16(told.load(SeqCst)).unwrap();
            async move { answer }
        })
        .await;
        Self {
            upstream,
            status,
            calls,
        }
    }

    /// A proxy before it whose one route has this section.
    async fn proxy(&self, redis: &str, section: &str) -> Proxy {
        Proxy::start(&format!(
            "redis: {{ url: '{redis}', timeout: 100ms }}
routes: [{{ name: all, path: /, upstream: ['http://{}'], {section} }}]
",
            self.upstream.address
        ))
        .await
    }
}

async fn passes(proxy: &Proxy) -> bool {
    match proxy.get("/").await.status().as_u16() {
        200 => true,
        429 => false,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn two_proxies_have_one_limit() {
    let server = Server::start().await;
    let counted = Counted::start().await;
    let limit = "rate_limit: { limit: 10, period: 1h, key: global }";
    let one = counted.proxy(&server.url(), limit).await;
    let two = counted.proxy(&server.url(), limit).await;
    let mut left = Vec::new();
    for proxy in [&one, &two, &one, &two] {
        let response = proxy.get("/").await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["x-ratelimit-limit"], "10");
        left.push(response.headers()["x-ratelimit-remaining"].clone());
    }
    assert_eq!(left, ["9", "8", "7", "6"]);
    let mut passed = 4;
    for proxy in [&one, &two].repeat(8) {
        passed += usize::from(passes(proxy).await);
    }
    assert_eq!(passed, 10);
    // What one has spent a third finds spent.
    let three = counted.proxy(&server.url(), limit).await;
    let refused = three.get("/").await;
    assert_eq!(refused.status(), 429);
    let wait: u64 = refused.headers()["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=360).contains(&wait), "{wait}");
    assert_eq!(one.metric("redis_connected", &[]).await, 1.0);
    assert!(
        one.metric("redis_operation_duration_seconds_count", &["operation"])
            .await
            > 0.0
    );
}

#[tokio::test]
async fn leased_shares_stay_within_the_limit() {
    let server = Server::start().await;
    let counted = Counted::start().await;
    let limit = "rate_limit: { limit: 200, period: 1h, key: global, mode: leased }";
    let one = counted.proxy(&server.url(), limit).await;
    let two = counted.proxy(&server.url(), limit).await;
    let mut passed = 0;
    for proxy in [&one, &two].repeat(300) {
        passed += usize::from(passes(proxy).await);
    }
    // Whatever is charged ahead is charged: never more; and both are asked for
    // so much that little is left lying.
    assert!((160..=200).contains(&passed), "{passed}");
}

#[tokio::test]
async fn without_redis_each_route_goes_by_its_own_rule() {
    let counted = Counted::start().await;
    let redis = format!("redis://{}", nobody().await);
    let limit = |rule| {
        format!("rate_limit: {{ limit: 2, period: 1h, key: global, on_store_error: {rule} }}")
    };
    for (rule, statuses) in [
        ("local", [200, 200, 429]),
        ("allow", [200, 200, 200]),
        ("deny", [503, 503, 503]),
    ] {
        let proxy = counted.proxy(&redis, &limit(rule)).await;
        for status in statuses {
            let response = proxy.get("/").await;
            assert_eq!(response.status(), status, "{rule}");
            let told = response.headers().contains_key("x-ratelimit-limit");
            assert_eq!(told, rule == "local", "{rule}");
            if status == 503 {
                problem(&response, 503, "store_unavailable");
            }
        }
        assert_eq!(proxy.metric("redis_connected", &[]).await, 0.0);
        assert!(proxy.metric("redis_errors_total", &[]).await > 0.0);
        proxy
            .logged("redis", |line| {
                line["message"]
                    .as_str()
                    .is_some_and(|it| it.starts_with("redis is gone"))
            })
            .await;
    }
}

#[tokio::test]
async fn a_silent_redis_costs_no_client_more_than_its_timeout_and_soon_nothing() {
    let server = Server::start().await;
    let counted = Counted::start().await;
    let limit = "rate_limit: { limit: 1000000, key: global }";
    let proxy = counted.proxy(&server.url(), limit).await;
    assert!(passes(&proxy).await);
    server.pause();
    let mut slowest = Duration::ZERO;
    for _ in 0..30 {
        let began = clock::now();
        assert!(passes(&proxy).await);
        slowest = slowest.max(clock::now() - began);
    }
    // A hundred milliseconds, and what a busy machine adds.
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    let began = clock::now();
    for _ in 0..30 {
        assert!(passes(&proxy).await);
    }
    // Thirty timeouts would be three seconds.
    assert!(clock::now() - began < Duration::from_millis(1500));
    server.resume();
    eventually("back", || async {
        proxy.metric("redis_connected", &[]).await == 1.0
    })
    .await;
}

#[tokio::test]
async fn a_breaker_that_opens_in_one_is_open_in_both() {
    let server = Server::start().await;
    let counted = Counted::start().await;
    let rule =
        "circuit_breaker: { failure_threshold: 3, reset_timeout: 1h, per: route, shared: true }";
    let one = counted.proxy(&server.url(), rule).await;
    let two = counted.proxy(&server.url(), rule).await;
    assert_eq!(one.get("/").await.status(), 200);
    assert_eq!(two.get("/").await.status(), 200);
    // Both listen before there is something to hear: what is missed is pulled
    // later than this wants to wait.
    counted.status.store(500, SeqCst);
    for _ in 0..3 {
        assert_eq!(one.get("/").await.status(), 500);
    }
    assert_eq!(one.get("/").await.status(), 503);
    let state =
        async |proxy: &Proxy| json(&fetch(proxy.admin, get("/breakers")).await)[0]["state"].clone();
    eventually("open in the other", || async {
        state(&two).await == "open"
    })
    .await;
    let before = counted.calls.load(SeqCst);
    problem(&two.get("/").await, 503, "circuit_open");
    assert_eq!(counted.calls.load(SeqCst), before);
}

#[tokio::test]
async fn a_webhook_that_one_has_taken_is_a_repeat_to_the_other() {
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let mut server = Server::start().await;
    let counted = Counted::start().await;
    let rule = format!("verify_webhook: {{ scheme: standard, secrets: [{SECRET}] }}");
    let one = counted.proxy(&server.url(), &rule).await;
    let two = counted.proxy(&server.url(), &rule).await;
    let hook = |id: &str| {
        let signer = Signer::new(Standard::new(), [Secret::new(SECRET).unwrap()]).unwrap();
        let request = Request::post("/").header("host", "test.example");
        let (mut head, ()) = request.body(()).unwrap().into_parts();
        let timestamp = clock::WallClock::unix_now(&clock::SystemClock).as_secs();
        let body = b"{}".as_slice();
        let message = Message {
            id,
            timestamp,
            body,
        };
        signer.sign(&mut head, &message).unwrap();
        Request::from_parts(head, Full::new(Bytes::from_static(b"{}")))
    };
    assert_eq!(fetch(one.listen, hook("a")).await.status(), 200);
    assert_eq!(counted.calls.load(SeqCst), 1);
    // What is completed is told in the background.
    eventually("a repeat", || async {
        let response = fetch(two.listen, hook("a")).await;
        response.status() == 200 && response.body().is_empty()
    })
    .await;
    assert_eq!(counted.calls.load(SeqCst), 1);
    // Who cannot tell a repeat takes nothing.
    server.kill();
    assert_eq!(fetch(two.listen, hook("b")).await.status(), 503);
    assert_eq!(counted.calls.load(SeqCst), 1);
    server.restart().await;
    eventually("back", || async {
        fetch(two.listen, hook("b")).await.status() == 200
    })
    .await;
    assert_eq!(counted.calls.load(SeqCst), 2);
}
