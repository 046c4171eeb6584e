//! Scenarios that other rate limiters are known by (redis-cell, redis_rate,
//! tower-rate-tier, bucket4j, governor), through the layer, on a paused clock
//! that starts at Unix second 1000.

use std::{convert::Infallible, time::Duration};

use buttress_core::{
    Head,
    key::{self, Key},
    testing::{Script, Scripted, Step, advance, web},
};
use buttress_rate_limit::{
    Handle, HeaderFormat, Limit, Quota, RateLimit, RateLimitBuilder, RateLimitLayer, WhenFull,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::Full;
use tokio::time::Instant;
use tower::{Layer, ServiceExt};

const SECOND: Duration = Duration::from_secs(1);

type Body = Full<Bytes>;

/// A limiter at work, and the clock it stands on.
struct Bed {
    start: Instant,
    service: RateLimit<Scripted<Request<Body>, Response<Body>, Infallible>>,
    handle: Handle,
}

/// What a client sees.
#[derive(Debug)]
struct Seen {
    status: StatusCode,
    headers: HeaderMap,
}

impl Seen {
    #[track_caller]
    fn number(&self, name: &str) -> u64 {
        let value = self
            .headers
            .get(name)
            .unwrap_or_else(|| panic!("no {name} in {self:?}"));
        value.to_str().unwrap().parse().unwrap()
    }

    fn remaining(&self) -> u64 {
        self.number("x-ratelimit-remaining")
    }

    fn reset(&self) -> u64 {
        self.number("x-ratelimit-reset")
    }

    fn retry_after(&self) -> Option<u64> {
        self.headers
            .contains_key("retry-after")
            .then(|| self.number("retry-after"))
    }

    fn passed(&self) -> bool {
        assert_eq!(self.status == 200, self.retry_after().is_none());
        self.status == 200
    }
}

impl Bed {
    fn new(builder: RateLimitBuilder) -> Self {
        let start = Instant::now();
        let layer = builder
            .wall_clock(move || Duration::from_secs(1000) + start.elapsed())
            .build()
            .unwrap();
        let (inner, _) = Script::new()
            .otherwise(|_| Step::ok(web::response(200, "")))
            .build();
        Self {
            start,
            service: layer.layer(inner),
            handle: layer.handle(),
        }
    }

    fn one(limit: u32, period: Duration) -> Self {
        Self::new(RateLimitLayer::builder().limit(Limit::new(Quota::new(limit, period))))
    }

    /// A limit whose requests say themselves what they cost.
    fn costly(limit: u32, period: Duration) -> Self {
        let cost = |head: Head<'_>| head.headers["x-cost"].to_str().unwrap().parse().unwrap();
        let limit = Limit::new(Quota::new(limit, period)).cost_by(cost);
        Self::new(RateLimitLayer::builder().limit(limit))
    }

    /// Goes on to this long after the start.
    async fn until(&self, at: f64) {
        let at = self.start + Duration::from_secs_f64(at);
        advance(at.duration_since(Instant::now())).await;
    }

    async fn send(&self, request: Request<Body>) -> Seen {
        let (parts, _) = self
            .service
            .clone()
            .oneshot(request)
            .await
            .unwrap()
            .into_parts();
        Seen {
            status: parts.status,
            headers: parts.headers,
        }
    }

    async fn get(&self) -> Seen {
        self.send(web::get("/")).await
    }

    async fn cost(&self, cost: u32) -> Seen {
        let mut request = web::get("/");
        request.headers_mut().insert("x-cost", cost.into());
        self.send(request).await
    }

    async fn drain(&self, limit: u64) {
        for left in (0..limit).rev() {
            assert_eq!(self.get().await.remaining(), left);
        }
        assert!(!self.get().await.passed());
    }

    fn remaining(&self, limit: &str) -> u32 {
        self.handle.usage(limit, &Key::global()).unwrap().remaining
    }

    fn reset_after(&self) -> Duration {
        self.handle
            .usage("default", &Key::global())
            .unwrap()
            .reset_after
    }
}

/// 1 (redis-cell).
#[tokio::test(start_paused = true)]
async fn six_at_once_where_five_in_ten_seconds_fit() {
    let bed = Bed::one(5, 10 * SECOND);
    for (remaining, reset) in [(4, 1002), (3, 1004), (2, 1006), (1, 1008), (0, 1010)] {
        let seen = bed.get().await;
        assert!(seen.passed());
        assert_eq!((seen.remaining(), seen.reset()), (remaining, reset));
        assert_eq!(seen.number("x-ratelimit-limit"), 5);
    }
    let sixth = bed.get().await;
    assert_eq!(sixth.status, 429);
    assert_eq!((sixth.remaining(), sixth.reset()), (0, 1010));
    assert_eq!(sixth.retry_after(), Some(2));
    bed.until(1.999_999_999).await;
    assert!(!bed.get().await.passed());
    bed.until(2.0).await;
    assert!(bed.get().await.passed());
}

/// 3 (redis-cell).
#[tokio::test(start_paused = true)]
async fn what_comes_back_between_requests() {
    let bed = Bed::one(5, 5 * SECOND);
    bed.drain(5).await;
    for (at, remaining, reset) in [
        (3.0, 2, 3.0),
        (3.1, 1, 3.9),
        (4.0, 1, 4.0),
        (8.0, 4, 1.0),
        (9.5, 4, 1.0),
    ] {
        bed.until(at).await;
        let seen = bed.get().await;
        assert_eq!(seen.remaining(), remaining, "at {at}");
        assert_eq!(bed.reset_after(), Duration::from_secs_f64(reset), "at {at}");
        // 1000 + at + reset, rounded up, without the noise of floats.
        let full = ((at + reset) * 10.0).round() as u64;
        assert_eq!(seen.reset(), 1000 + full.div_ceil(10), "at {at}");
    }
}

/// 5 (governor, which once let a sixth in).
#[tokio::test(start_paused = true)]
async fn a_quiet_while_gives_no_extra_one() {
    let bed = Bed::one(5, SECOND);
    bed.drain(5).await;
    bed.until(2.0).await;
    bed.drain(5).await;
    bed.until(1_000_000.0).await;
    bed.drain(5).await;
}

/// 7 (tower-rate-tier).
#[tokio::test(start_paused = true)]
async fn a_hundred_refusals_change_nothing() {
    let bed = Bed::one(10, 3600 * SECOND);
    bed.drain(10).await;
    for _ in 0..100 {
        let seen = bed.get().await;
        assert_eq!(seen.retry_after(), Some(360));
        assert_eq!((seen.remaining(), seen.reset()), (0, 4600));
    }
    bed.until(360.0).await;
    assert!(bed.get().await.passed());
    assert!(!bed.get().await.passed());
}

/// 9 (tower-rate-tier).
#[tokio::test(start_paused = true)]
async fn reset_is_rounded_up() {
    let bed = Bed::one(2, 5 * SECOND);
    assert_eq!(bed.get().await.reset(), 1003);
    bed.until(0.5).await;
    // Whole again at 1005 sharp.
    assert_eq!(bed.get().await.reset(), 1005);
}

/// 11 (tower-rate-tier).
#[tokio::test(start_paused = true)]
async fn what_costs_much_waits_longer() {
    let bed = Bed::costly(10, SECOND);
    assert_eq!(bed.cost(8).await.remaining(), 2);
    let refused = bed.cost(5).await;
    // What is left is told, though this request did not fit in it.
    assert_eq!((refused.status.as_u16(), refused.remaining()), (429, 2));
    assert_eq!(refused.retry_after(), Some(1));
    bed.until(0.299_999_999).await;
    assert!(!bed.cost(5).await.passed());
    bed.until(0.3).await;
    let seen = bed.cost(5).await;
    assert!(seen.passed());
    assert_eq!(seen.remaining(), 0);
}

/// Of scenario 11's kind: what can never fit is not told to come back.
#[tokio::test(start_paused = true)]
async fn what_costs_more_than_the_burst_is_forbidden() {
    let bed = Bed::costly(10, SECOND);
    let seen = bed.cost(11).await;
    assert_eq!(seen.status, 403);
    assert_eq!(seen.retry_after(), None);
    assert_eq!(
        (seen.number("x-ratelimit-limit"), seen.remaining()),
        (10, 10)
    );
    assert_eq!(seen.reset(), 1000);
    let all = bed.cost(10).await;
    assert_eq!((all.status.as_u16(), all.remaining()), (200, 0));
    assert_eq!(bed.cost(u32::MAX).await.status, 403);
    // What costs nothing passes always.
    assert_eq!(bed.cost(0).await.status, 200);
}

/// 13 (redis_rate).
#[tokio::test(start_paused = true)]
async fn looking_at_a_key_does_not_make_it() {
    let bed = Bed::one(10, SECOND);
    assert_eq!(bed.remaining("default"), 10);
    assert_eq!(bed.reset_after(), Duration::ZERO);
    assert_eq!(bed.handle.keys("default").unwrap(), 0);
    bed.get().await;
    assert_eq!(bed.remaining("default"), 9);
    assert_eq!(bed.reset_after(), Duration::from_millis(100));
    assert_eq!(bed.handle.keys("default").unwrap(), 1);
    assert!(bed.handle.reset("default", &Key::global()).unwrap());
    assert!(!bed.handle.reset("default", &Key::global()).unwrap());
    assert_eq!(bed.handle.keys("default").unwrap(), 0);
}

/// 17 (bucket4j).
#[tokio::test(start_paused = true)]
async fn the_wait_is_that_of_the_cost() {
    let bed = Bed::costly(4, 4 * SECOND);
    bed.cost(4).await;
    bed.until(0.2).await;
    assert_eq!(bed.cost(1).await.retry_after(), Some(1));
    assert_eq!(bed.cost(3).await.retry_after(), Some(3));
    bed.until(2.999_999_999).await;
    assert!(!bed.cost(3).await.passed());
    bed.until(3.0).await;
    assert!(bed.cost(3).await.passed());
}

/// 21 (tower-rate-tier): state further ahead than the quota can ever be.
#[tokio::test(start_paused = true)]
async fn a_key_that_is_too_far_ahead_is_put_right() {
    let slow = Quota::new(1, 100 * SECOND).check().unwrap();
    let fast = Quota::per_second(4).check().unwrap();
    let bed = Bed::new(
        RateLimitLayer::builder().limit(Limit::new(Quota::per_second(4)).quota_by(
            move |head: Head<'_>| {
                if head.uri.path() == "/slow" {
                    slow
                } else {
                    fast
                }
            },
        )),
    );
    assert!(bed.send(web::get("/slow")).await.passed());
    let seen = bed.get().await;
    assert_eq!((seen.remaining(), seen.reset()), (0, 1001));
    assert_eq!(seen.retry_after(), Some(1));
    bed.until(0.249_999_999).await;
    assert!(!bed.get().await.passed());
    bed.until(0.25).await;
    let seen = bed.get().await;
    assert!(seen.passed());
    assert_eq!(seen.remaining(), 0);
}

/// 25 (a complaint about redis-cell): all or none.
#[tokio::test(start_paused = true)]
async fn what_one_limit_refuses_is_charged_to_none() {
    let bed = Bed::new(
        RateLimitLayer::builder()
            .limit(Limit::new(Quota::per_second(10)).name("a"))
            .limit(Limit::new(Quota::new(2, 10 * SECOND)).name("b"))
            .headers([HeaderFormat::XRateLimit, HeaderFormat::Draft11]),
    );
    assert!(bed.get().await.passed());
    assert!(bed.get().await.passed());
    for _ in 0..20 {
        let third = bed.get().await;
        assert_eq!(third.retry_after(), Some(5));
        assert_eq!(
            (third.number("x-ratelimit-limit"), third.remaining()),
            (2, 0)
        );
        assert_eq!(third.headers["ratelimit"], r#""a";r=8;t=1, "b";r=0;t=5"#);
    }
    assert_eq!(bed.remaining("a"), 8);

    // And the other way round: the first refuses, the second is spared.
    bed.until(10.0).await;
    bed.handle
        .set_quota("b", Quota::new(20, 10 * SECOND))
        .unwrap();
    for _ in 0..10 {
        assert!(bed.get().await.passed());
    }
    for _ in 0..20 {
        assert_eq!(bed.get().await.number("x-ratelimit-limit"), 10);
    }
    assert_eq!(bed.remaining("b"), 10);
}

/// Of 25's kind: for want of room, too.
#[tokio::test(start_paused = true)]
async fn what_finds_no_room_is_charged_to_none() {
    let by_client = || key::header("x-client");
    let bed = Bed::new(
        RateLimitLayer::builder()
            .limit(Limit::new(Quota::per_second(10)).name("all"))
            .limit(
                Limit::new(Quota::per_hour(10))
                    .name("roomy")
                    .key(by_client()),
            )
            .limit(
                Limit::new(Quota::per_hour(10))
                    .name("narrow")
                    .key(by_client())
                    .max_keys(1)
                    .when_full(WhenFull::Refuse),
            ),
    );
    let by = |client: &'static str| {
        let mut request = web::get("/");
        request
            .headers_mut()
            .insert("x-client", client.parse().unwrap());
        bed.send(request)
    };
    assert!(by("first").await.passed());
    for _ in 0..20 {
        assert_eq!(by("second").await.status, 503);
    }
    assert_eq!(bed.remaining("all"), 9);
    assert_eq!(bed.handle.keys("roomy").unwrap(), 1);
    assert!(by("first").await.passed());
}

/// Of 25's kind: where both refuse, waiting for the longer is what helps.
#[tokio::test(start_paused = true)]
async fn the_longest_wait_is_told() {
    for swapped in [false, true] {
        let mut limits = [
            Limit::new(Quota::new(1, 7 * SECOND)).name("long"),
            Limit::new(Quota::new(1, 3 * SECOND)).name("short"),
        ];
        if swapped {
            limits.reverse();
        }
        let [first, second] = limits;
        let bed = Bed::new(RateLimitLayer::builder().limit(first).limit(second));
        bed.get().await;
        assert_eq!(bed.get().await.retry_after(), Some(7));
        bed.until(3.0).await;
        assert_eq!(bed.get().await.retry_after(), Some(4));
        bed.until(7.0).await;
        assert!(bed.get().await.passed());
    }
}

/// 29, as far as it is not a store's: where nothing was decided, nothing is
/// told.
#[tokio::test(start_paused = true)]
async fn what_is_let_by_has_no_headers() {
    let bed = Bed::new(
        RateLimitLayer::builder()
            .limit(Limit::new(Quota::per_hour(1)))
            .headers([HeaderFormat::XRateLimit, HeaderFormat::Draft11])
            .expose_headers(true)
            .bypass(|head| head.uri.path() == "/health"),
    );
    for _ in 0..3 {
        let seen = bed.send(web::get("/health")).await;
        assert_eq!(seen.status, 200);
        assert!(seen.headers.is_empty(), "{seen:?}");
    }
    assert_eq!(bed.get().await.remaining(), 0);
    assert_eq!(bed.send(web::get("/health")).await.status, 200);
    assert_eq!(bed.get().await.status, 429);
}

/// 33 (bucket4j's "as is"; ours keeps the number spent).
#[tokio::test(start_paused = true)]
async fn a_new_quota_knows_what_was_spent() {
    for (quota, left) in [(200, 140), (100, 40), (61, 1), (20, 0)] {
        let bed = Bed::one(100, 3600 * SECOND);
        for _ in 0..60 {
            bed.get().await;
        }
        assert_eq!(bed.remaining("default"), 40);
        bed.handle
            .set_quota("default", Quota::per_hour(quota))
            .unwrap();
        assert_eq!(bed.remaining("default"), left, "to {quota}");
        let seen = bed.get().await;
        assert_eq!(seen.passed(), left > 0, "to {quota}");
        assert_eq!(seen.number("x-ratelimit-limit"), u64::from(quota));
        if left == 0 {
            // 20 an hour: the next one in three minutes, no debt beyond that.
            assert_eq!(seen.retry_after(), Some(180));
            bed.until(180.0).await;
            assert!(bed.get().await.passed());
        }
    }
}

/// A client that does as `Retry-After` says is always let in, whatever the
/// quota's fractions.
#[tokio::test(start_paused = true)]
async fn waiting_as_told_is_rewarded() {
    for (limit, period, burst) in [
        (3, SECOND, 1),
        (7, SECOND, 7),
        (1, Duration::from_nanos(1_500_000_001), 2),
        (13, Duration::from_millis(9999), 4),
        (1, Duration::from_secs(86_400), 1),
        (1_000_000, SECOND, 3),
    ] {
        let quota = Quota::new(limit, period).burst(burst);
        let bed = Bed::new(RateLimitLayer::builder().limit(Limit::new(quota)));
        let mut at = 0;
        for round in 0..20 {
            let refused = loop {
                let seen = bed.get().await;
                if !seen.passed() {
                    break seen;
                }
            };
            at += refused.retry_after().unwrap();
            bed.until(at as f64).await;
            assert!(bed.get().await.passed(), "{quota} in round {round}");
        }
    }
}

/// A shared limit and one for each client: nobody is charged for what the
/// other limit refused.
#[tokio::test(start_paused = true)]
async fn per_client_and_global() {
    let bed = Bed::new(
        RateLimitLayer::builder()
            .limit(
                Limit::new(Quota::new(4, 100 * SECOND))
                    .name("client")
                    .key(key::header("x-client")),
            )
            .limit(Limit::new(Quota::new(6, 60 * SECOND)).name("all")),
    );
    let by = |client: &'static str| {
        let mut request = web::get("/");
        request
            .headers_mut()
            .insert("x-client", client.parse().unwrap());
        bed.send(request)
    };
    for _ in 0..4 {
        assert!(by("greedy").await.passed());
    }
    assert_eq!(by("greedy").await.retry_after(), Some(25));
    assert_eq!(bed.remaining("all"), 2);
    assert!(by("modest").await.passed());
    let last = by("modest").await;
    // Both have something to say; the tighter one is shown.
    assert_eq!((last.number("x-ratelimit-limit"), last.remaining()), (6, 0));
    assert_eq!(by("modest").await.retry_after(), Some(10));
    let modest = key::header("x-client").key("modest");
    assert_eq!(bed.handle.usage("client", &modest).unwrap().remaining, 2);
}
