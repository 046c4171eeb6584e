//! The layer as a tower service: readiness, cancellation, panics, contention,
//! and keys beyond number.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress_core::{
    Any, Head, Refusal, RefusalKind,
    clock::{self, Instant},
    key::{self, Key},
    testing::{ReadinessProbe, Script, Step, advance, web},
};
use buttress_rate_limit::{Errors, Limit, Quota, RateLimitLayer};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use tokio::task::JoinSet;
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimit, service_fn};

type Body = Full<Bytes>;
type Numbers = RateLimitLayer<Any<u32>, Errors>;

fn numbers(quota: Quota) -> Numbers {
    RateLimitLayer::any()
        .limit(Limit::any(quota))
        .build()
        .unwrap()
}

fn web(quota: Quota) -> RateLimitLayer {
    RateLimitLayer::builder()
        .limit(Limit::new(quota))
        .build()
        .unwrap()
}

/// 31, first half: the polled instance is the one called, in both modes, and
/// what a dropped future held is given back.
#[tokio::test(start_paused = true)]
async fn readiness() {
    ReadinessProbe::new(|| 1, |n: &u32| Step::<u32, Infallible>::ok(*n))
        .check(&numbers(Quota::per_second(1000)))
        .await;
    ReadinessProbe::new(
        || web::get("/"),
        |_: &Request<Body>| Step::<Response<Body>, Infallible>::ok(web::response(200, "")),
    )
    .check(&web(Quota::per_second(1000)))
    .await;
}

/// 31, second half: what is refused does not reach the inner service. The
/// instance keeps the slot that it was promised for its next call, since it
/// cannot be given back without a clone; dropping the instance frees it.
#[tokio::test(start_paused = true)]
async fn a_refusal_uses_no_slot_up() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|n| Step::ok(*n))
        .build();
    let mut service = numbers(Quota::per_second(1)).layer(ConcurrencyLimit::new(inner, 1));
    let mut other = task::spawn(service.clone());
    assert_eq!(service.ready().await.unwrap().call(7).await.unwrap(), 7);

    let error = service.ready().await.unwrap().call(8).await.unwrap_err();
    let refusal = error.downcast_ref::<Refusal>().unwrap();
    assert_eq!(refusal.kind(), RefusalKind::RateLimited);
    assert_eq!(refusal.retry_after(), Some(Duration::from_secs(1)));
    assert_eq!(script.requests(), [7]);

    // Ready at once: it still has the slot.
    let mut service = task::spawn(service);
    assert_ready_ok!(service.enter(|cx, mut service| service.poll_ready(cx)));
    assert_pending!(
        other
            .enter(|cx, mut other| other.poll_ready(cx))
            .map_err(drop)
    );
    drop(service);
    assert!(other.is_woken());
    assert_ready_ok!(other.enter(|cx, mut other| other.poll_ready(cx)));
    drop(other);
    script.assert_finished();
}

/// Readiness is the inner service's, its errors too.
#[tokio::test(start_paused = true)]
async fn errors_of_the_inner_service_pass_untouched() {
    let (inner, script) = Script::<Request<Body>, Response<Body>, &str>::new()
        .then(Step::err("broken"))
        .unready()
        .build();
    let mut service = task::spawn(web(Quota::per_second(5)).layer(inner));
    assert_pending!(service.enter(|cx, mut service| service.poll_ready(cx)));
    script.set_ready();
    assert!(service.is_woken());
    assert_ready_ok!(service.enter(|cx, mut service| service.poll_ready(cx)));
    let mut future = task::spawn(service.call(web::get("/")));
    assert_eq!(assert_ready!(future.poll()).err(), Some("broken"));
    script.fail_readiness("gone");
    let gone = assert_ready!(service.enter(|cx, mut service| service.poll_ready(cx)));
    assert_eq!(gone, Err("gone"));
}

/// A refusal is an answer to one request, not the end of the service: a
/// `Buffer` in front, which gives up for good when readiness fails, goes on.
#[tokio::test(start_paused = true)]
async fn behind_a_buffer() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|n| Step::ok(*n))
        .build();
    let layer = numbers(Quota::per_second(2));
    let service = tower::buffer::Buffer::new(layer.layer(inner), 8);
    for _ in 0..3 {
        assert_eq!(service.clone().oneshot(1).await.unwrap(), 1);
        assert_eq!(service.clone().oneshot(2).await.unwrap(), 2);
        for _ in 0..5 {
            let error = service.clone().oneshot(3).await.unwrap_err();
            assert!(error.is::<Refusal>(), "{error}");
        }
        advance(Duration::from_secs(1)).await;
    }
    assert_eq!(script.call_count(), 6);
}

/// The charge is taken in `call` and stays taken, whatever becomes of the
/// future: nobody gains by hanging up.
#[tokio::test(start_paused = true)]
async fn dropped_futures_stay_charged() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|_| Step::hang())
        .build();
    let layer = numbers(Quota::per_hour(10));
    let mut service = layer.layer(inner);
    for polls in 0..3 {
        let mut future = task::spawn(service.ready().await.unwrap().call(0));
        for _ in 0..polls {
            assert_pending!(future.poll());
        }
    }
    assert_eq!(
        layer
            .handle()
            .usage("default", &Key::global())
            .unwrap()
            .remaining,
        7
    );
    assert_eq!(script.call_count(), 3);
    drop(service);
    script.assert_finished();
}

/// Whatever of a user's panics, no lock is held: the layer serves on.
#[tokio::test(start_paused = true)]
async fn panics_break_nothing() {
    fn bad(head: Head<'_>, what: &str) {
        assert!(head.uri.path() != what, "{what} panics");
    }
    let (fine, other) = (Quota::per_hour(100).check().unwrap(), Quota::per_hour(50));
    let layer = RateLimitLayer::builder()
        .bypass(|head| {
            bad(head, "/bypass");
            false
        })
        .limit(
            Limit::new(Quota::per_hour(100))
                .name("first")
                .key(|head: Head<'_>| {
                    bad(head, "/key");
                    Some(Key::global())
                }),
        )
        .limit(
            Limit::new(other)
                .name("second")
                .cost_by(|head| {
                    bad(head, "/cost");
                    1
                })
                .quota_by(move |head| {
                    bad(head, "/quota");
                    fine
                }),
        )
        .responder(|_: &Refusal, head: Head<'_>| {
            bad(head, "/responder");
            Response::new(Bytes::new())
        })
        .refund_if(|status, _| {
            assert!(status != 500, "refund panics");
            false
        })
        .build()
        .unwrap();
    let (inner, _script) = Script::<Request<Body>, _, Infallible>::new()
        .otherwise(|request: &Request<Body>| match request.uri().path() {
            "/call" => Step::panic_in_call("call"),
            "/future" => Step::panic("future"),
            "/refund" => Step::ok(web::response(500, "")),
            _ => Step::ok(web::response(200, "")),
        })
        .build();
    let service = layer.layer(inner);
    let send = |path: &'static str| {
        let service = service.clone();
        tokio::spawn(async move { service.oneshot(web::get(path)).await.unwrap().status() })
    };
    let remaining = |limit| {
        layer
            .handle()
            .usage(limit, &Key::global())
            .unwrap()
            .remaining
    };

    for (path, charged) in [
        ("/bypass", 0),
        ("/key", 0),
        ("/cost", 0),
        ("/quota", 0),
        // These went through the limiter.
        ("/call", 1),
        ("/future", 1),
        ("/refund", 1),
    ] {
        let before = remaining("first");
        assert!(send(path).await.unwrap_err().is_panic(), "{path}");
        assert_eq!(before - remaining("first"), charged, "{path}");
        assert_eq!(send("/").await.unwrap(), 200, "after {path}");
    }
    layer
        .handle()
        .set_quota("first", Quota::per_hour(1))
        .unwrap();
    assert!(send("/responder").await.unwrap_err().is_panic());
    layer.handle().reset_all("first").unwrap();
    assert_eq!(send("/").await.unwrap(), 200);
}

/// 200 at once on many threads: the burst, exactly.
#[test]
fn contention_admits_exactly_the_burst() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(8)
        .build()
        .unwrap();
    let in_all = |layer: &Numbers| {
        let calls = Arc::new(AtomicUsize::new(0));
        let inner = {
            let calls = Arc::clone(&calls);
            service_fn(move |_: u32| {
                calls.fetch_add(1, Ordering::Relaxed);
                std::future::ready(Ok::<_, Infallible>(()))
            })
        };
        let service = layer.layer(inner);
        let start = Arc::new(tokio::sync::Barrier::new(200));
        let admitted = runtime.block_on(async {
            let mut tasks = JoinSet::new();
            for n in 0..200 {
                let (service, start) = (service.clone(), Arc::clone(&start));
                tasks.spawn(async move {
                    start.wait().await;
                    service.oneshot(n).await.is_ok()
                });
            }
            tasks
                .join_all()
                .await
                .into_iter()
                .filter(|admitted| *admitted)
                .count()
        });
        assert_eq!(calls.load(Ordering::Relaxed), admitted);
        admitted
    };
    for burst in [1, 50, 199] {
        assert_eq!(
            in_all(&numbers(Quota::per_hour(1).burst(burst))),
            burst as usize
        );
        // Several limits: all or none, in whatever order they refuse.
        let several = RateLimitLayer::any()
            .limit(Limit::any(Quota::per_hour(1).burst(burst + 7)).name("a"))
            .limit(Limit::any(Quota::per_hour(1).burst(burst)).name("b"))
            .limit(Limit::any(Quota::per_hour(1).burst(burst + 3)).name("c"))
            .build()
            .unwrap();
        assert_eq!(in_all(&several), burst as usize);
        let left = ["a", "b", "c"].map(|limit| {
            several
                .handle()
                .usage(limit, &Key::global())
                .unwrap()
                .remaining
        });
        assert_eq!(left, [7, 0, 3]);
    }
}

/// A quota raised under load: what was spent before is not spent again.
#[test]
fn a_quota_replaced_under_load() {
    for (before, after) in [(1000, 3000), (3000, 1000)] {
        let layer = numbers(Quota::per_hour(1).burst(before));
        let handle = layer.handle();
        let halfway = before / 2;
        let admitted = Arc::new(AtomicUsize::new(0));
        let replaced = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (layer, admitted) = (layer.clone(), Arc::clone(&admitted));
                let replaced = Arc::clone(&replaced);
                std::thread::spawn(move || {
                    loop {
                        // Up to a refusal by the new quota.
                        let last = replaced.load(Ordering::Acquire);
                        if knock(&layer, 0) {
                            admitted.fetch_add(1, Ordering::Relaxed);
                        } else if last {
                            return;
                        }
                    }
                })
            })
            .collect();
        while admitted.load(Ordering::Relaxed) < halfway as usize {
            std::thread::yield_now();
        }
        let usage = || handle.usage("default", &Key::global()).unwrap();
        handle
            .set_quota("default", Quota::per_hour(1).burst(after))
            .unwrap();
        replaced.store(true, Ordering::Release);
        let spent_then = before.max(after);
        for thread in threads {
            thread.join().unwrap();
        }
        let admitted = admitted.load(Ordering::Relaxed);
        assert!(admitted <= spent_then as usize, "{admitted}");
        assert!(admitted >= after.min(halfway) as usize, "{admitted}");
        if after > before {
            // Every charge was kept, so just as many were left as fit.
            assert_eq!(admitted, after as usize);
        }
        assert_eq!((usage().limit, usage().remaining), (after, 0));
    }
}

/// Refunds from many threads: in the end all is as if nothing had come.
#[test]
fn refunds_contend() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .build()
        .unwrap();
    let layer = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_hour(1).burst(500)).name("a").cost(2))
        .limit(Limit::new(Quota::per_hour(1).burst(300)).name("b"))
        .refund_if(|status, _| status == 204)
        .build()
        .unwrap();
    let service = layer.layer(service_fn(|request: Request<Body>| async move {
        tokio::task::yield_now().await;
        let keep = request.uri().path() == "/keep";
        Ok::<_, Infallible>(web::response(if keep { 200 } else { 204 }, ""))
    }));
    runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for n in 0..200 {
            let service = service.clone();
            let path = if n % 10 == 0 { "/keep" } else { "/" };
            tasks.spawn(async move { service.oneshot(web::get(path)).await.unwrap().status() });
        }
        let statuses = tasks.join_all().await;
        assert!(statuses.iter().all(StatusCode::is_success));
    });
    let left = |limit| {
        layer
            .handle()
            .usage(limit, &Key::global())
            .unwrap()
            .remaining
    };
    assert_eq!((left("a"), left("b")), (460, 280));
}

/// Decides as fast as it can, for a million keys.
fn knock(layer: &Numbers, n: u32) -> bool {
    let mut service = layer.layer(service_fn(|_: u32| {
        std::future::ready(Ok::<_, Infallible>(()))
    }));
    let mut future = task::spawn(service.call(n));
    assert_ready!(future.poll()).is_ok()
}

fn by_number(quota: Quota, max_keys: usize) -> Numbers {
    RateLimitLayer::any()
        .limit(
            Limit::any(quota)
                .key(key::from_request(|n: &u32| Key::from(u64::from(*n))))
                .max_keys(max_keys),
        )
        .build()
        .unwrap()
}

/// A flood of keys of one request each does not clean the slate of those who
/// are deep in debt, and takes no more room than it was given.
#[test]
fn a_million_keys_in_room_for_a_hundred_thousand() {
    // A tenth of it all where nothing is optimised.
    const TENTH: u32 = if cfg!(debug_assertions) { 10 } else { 1 };
    const KEYS: u32 = 1_000_000 / TENTH;
    const MAX: usize = (KEYS / 10) as usize;
    const INDEBTED: u32 = KEYS / 1000;
    let layer = by_number(Quota::per_hour(10), MAX);
    let handle = layer.handle();
    for n in 0..INDEBTED {
        for _ in 0..10 {
            assert!(knock(&layer, n));
        }
        assert!(!knock(&layer, n));
    }
    for n in INDEBTED..KEYS {
        assert!(knock(&layer, n));
        if n % (KEYS / 10) == 0 {
            assert!(handle.keys("default").unwrap() <= MAX);
        }
    }
    assert!(handle.keys("default").unwrap() <= MAX);
    assert_eq!(
        handle.evicted("default").unwrap(),
        u64::from(KEYS) - MAX as u64
    );
    let forgotten = (0..INDEBTED).filter(|n| knock(&layer, *n)).count();
    assert_eq!(forgotten, 0);
}

/// Fewer debtors than the ceiling at a time: nobody is ever forgotten, though
/// there are ten times as many keys in the end.
#[tokio::test(start_paused = true)]
async fn while_debtors_are_fewer_than_the_ceiling_none_is_forgotten() {
    const MAX: u32 = 20_000;
    let layer = by_number(Quota::new(2, Duration::from_secs(2)), MAX as usize);
    let handle = layer.handle();
    for wave in 0..10 {
        let keys = wave * MAX..(wave + 1) * MAX;
        for n in keys.clone() {
            assert!(knock(&layer, n) && knock(&layer, n));
        }
        assert_eq!(handle.keys("default").unwrap(), MAX as usize);
        for n in keys {
            assert!(!knock(&layer, n));
        }
        advance(Duration::from_secs(2)).await;
        assert_eq!(handle.keys("default").unwrap(), 0);
    }
    assert_eq!(handle.evicted("default").unwrap(), 0);
}

/// On the real clock, from many threads: over any while, no more than the
/// burst and what comes back in it.
#[test]
fn the_bound_holds_on_threads() {
    const BURST: u32 = 10;
    // One every 20 µs.
    let layer = numbers(Quota::per_second(50_000).burst(BURST));
    let start = clock::now();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let layer = layer.clone();
            std::thread::spawn(move || {
                let mut admitted: Vec<(Instant, Instant)> = Vec::new();
                while clock::now() - start < Duration::from_millis(100) {
                    let before = clock::now();
                    if knock(&layer, 0) {
                        admitted.push((before, clock::now()));
                    }
                }
                admitted
            })
        })
        .collect();
    let mut admitted: Vec<_> = threads
        .into_iter()
        .flat_map(|thread| thread.join().unwrap())
        .collect();
    admitted.sort_unstable();
    assert!(admitted.len() > 100, "only {}", admitted.len());
    // The whole of it, and every thousandth part.
    for span in [admitted.len(), 100, 20] {
        for window in admitted.windows(span) {
            let (first, last) = (window[0].0, window.iter().map(|span| span.1).max().unwrap());
            let most = u128::from(BURST) + (last - first).as_nanos() / 20_000 + 1;
            assert!(span as u128 <= most, "{span} in {:?}", last - first);
        }
    }
}
