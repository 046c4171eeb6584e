use std::{
    convert::Infallible,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Mutex,
};

use buttress_core::{
    Any,
    key::{self, Key},
    testing::{
        ReadinessProbe, Script, ScriptHandle, Scripted, Step, advance, elapsed, settle, web,
    },
};
use tokio::task::JoinSet;
use tokio_test::{assert_pending, assert_ready, task};
use tower::{Layer, ServiceExt, limit::ConcurrencyLimit};

use super::*;
use crate::{Limit, Quota, RateLimitBuilder, RateLimitLayer};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// A request costs what it is.
type Inner = Scripted<u32, u32, Infallible>;
type Client<S = Inner> = Wait<S, Any<u32>>;
type Waits<S = Inner> = task::Spawn<WaitFuture<S, u32, <S as Service<u32>>::Future>>;

fn costs(quota: Quota) -> Limit<Any<u32>> {
    Limit::any(quota).cost_by(|cost: &u32| *cost)
}

fn limits(limits: impl IntoIterator<Item = Limit<Any<u32>>>) -> RateLimitBuilder<Any<u32>, Errors> {
    let builder = RateLimitLayer::any();
    limits.into_iter().fold(builder, RateLimitBuilder::limit)
}

/// One every 100 ms.
fn slow() -> RateLimitBuilder<Any<u32>, Errors> {
    limits([costs(Quota::new(1, 100 * MS).burst(1))])
}

fn script() -> (Inner, ScriptHandle<u32, u32, Infallible>) {
    Script::new().otherwise(|n| Step::ok(*n)).build()
}

type Bed = (
    WaitLayer<Any<u32>>,
    Client,
    ScriptHandle<u32, u32, Infallible>,
);

fn bed(builder: RateLimitBuilder<Any<u32>, Errors>, longest: Duration, room: usize) -> Bed {
    let layer = builder.build_waiting(longest, room).unwrap();
    let (inner, script) = script();
    let service = layer.layer(inner);
    (layer, service, script)
}

async fn call<S>(service: &mut Client<S>, request: u32) -> Waits<S>
where
    S: Service<u32, Error: Into<BoxError>> + Clone,
{
    task::spawn(
        service
            .ready()
            .await
            .unwrap_or_else(|_| panic!("not ready"))
            .call(request),
    )
}

/// Calls, and polls once.
async fn stand(service: &mut Client, request: u32) -> Waits {
    let mut future = call(service, request).await;
    assert_pending!(future.poll());
    future
}

#[track_caller]
fn refusal<T: fmt::Debug>(result: Result<T, BoxError>) -> Refusal {
    result
        .unwrap_err()
        .downcast_ref::<Refusal>()
        .expect("it is a refusal")
        .clone()
}

fn left(layer: &WaitLayer<Any<u32>>) -> u32 {
    layer
        .handle()
        .usage("default", &Key::global())
        .unwrap()
        .remaining
}

#[tokio::test(start_paused = true)]
async fn each_has_its_turn_at_its_time_in_the_order_of_coming() {
    let (layer, service, script) = bed(
        limits([Limit::any(Quota::new(3, 300 * MS).burst(2))]),
        SECOND,
        10,
    );
    let mut tasks = JoinSet::new();
    for request in 0..7 {
        tasks.spawn(service.clone().oneshot(request));
        settle().await;
    }
    assert_eq!(layer.waiting(), 5);
    while let Some(done) = tasks.join_next().await {
        done.unwrap().unwrap();
    }
    assert_eq!(script.requests(), [0, 1, 2, 3, 4, 5, 6]);
    let times = [0, 0, 100, 200, 300, 400, 500];
    assert_eq!(script.arrivals(), times.map(|at| at * MS));
    assert_eq!(layer.waiting(), 0);
    assert!(layer.shared.lines.lock().lines.is_empty());
    drop(service);
    script.assert_finished();
}

/// A small request does not slip in before a large one that came first.
#[tokio::test(start_paused = true)]
async fn nobody_overtakes() {
    let (_layer, service, script) = bed(limits([costs(Quota::new(10, SECOND))]), 10 * SECOND, 10);
    let mut tasks = JoinSet::new();
    for request in [9, 8, 1, 2] {
        tasks.spawn(service.clone().oneshot(request));
        settle().await;
    }
    tasks.join_all().await;
    assert_eq!(script.requests(), [9, 8, 1, 2]);
    let times = [0, 700, 800, 1000];
    assert_eq!(script.arrivals(), times.map(|at| at * MS));
}

#[tokio::test(start_paused = true)]
async fn who_would_wait_too_long_is_refused_at_once() {
    let (layer, mut service, _script) = bed(slow(), 250 * MS, 10);
    service.ready().await.unwrap().call(1).await.unwrap();
    let _first = stand(&mut service, 1).await;
    let second = stand(&mut service, 1).await;
    let (took, third) = elapsed(service.clone().oneshot(1)).await;
    assert_eq!(took, Duration::ZERO);
    let third = refusal(third);
    assert_eq!(
        (third.kind(), third.retry_after()),
        (RefusalKind::RateLimited, Some(300 * MS))
    );
    assert_eq!(layer.waiting(), 2);
    // It took nobody's place: with the second gone there is one.
    drop(second);
    let (took, fourth) = {
        let service = service.clone();
        tokio::join!(_first, elapsed(service.oneshot(1))).1
    };
    fourth.unwrap();
    assert_eq!(took, 200 * MS);
}

/// Exactly as long as it may.
#[tokio::test(start_paused = true)]
async fn the_longest_wait_is_granted_to_the_end() {
    let (_layer, service, _script) = bed(slow(), 100 * MS, 10);
    service.clone().oneshot(1).await.unwrap();
    let (took, result) = elapsed(service.clone().oneshot(1)).await;
    result.unwrap();
    assert_eq!(took, 100 * MS);
    advance(MS / 2).await;
    // A nanosecond more than it may.
    let (layer, service, _script) = bed(slow(), 100 * MS - Duration::from_nanos(1), 10);
    service.clone().oneshot(1).await.unwrap();
    let (took, result) = elapsed(service.oneshot(1)).await;
    assert_eq!(took, Duration::ZERO);
    assert_eq!(refusal(result).retry_after(), Some(100 * MS));
    assert_eq!(layer.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_full_room_refuses() {
    let (layer, mut service, _script) = bed(slow(), 10 * SECOND, 2);
    service.ready().await.unwrap().call(1).await.unwrap();
    let first = stand(&mut service, 1).await;
    let _second = stand(&mut service, 1).await;
    let third = refusal(service.clone().oneshot(1).await);
    assert_eq!(
        (third.kind(), third.retry_after()),
        (RefusalKind::Overloaded, Some(300 * MS))
    );
    drop(first);
    assert_eq!(layer.waiting(), 1);
    let _third = stand(&mut service, 1).await;
    assert_eq!(layer.waiting(), 2);
}

/// It used to stand in line first, and hold it up, where there was one.
#[tokio::test(start_paused = true)]
async fn what_can_never_fit_does_not_wait() {
    let (layer, mut service, _script) =
        bed(limits([costs(Quota::new(5, SECOND))]), 10 * SECOND, 10);
    for _ in 0..2 {
        let refused = refusal(service.clone().oneshot(6).await);
        assert_eq!(
            (refused.kind(), refused.retry_after()),
            (RefusalKind::NeverFits, None)
        );
        if layer.waiting() == 0 {
            service.ready().await.unwrap().call(5).await.unwrap();
            std::mem::forget(stand(&mut service, 1).await);
        }
    }
    assert_eq!(layer.waiting(), 1);
}

/// Wherever in the line a future is dropped, it is as if it had never come.
#[tokio::test(start_paused = true)]
async fn who_leaves_makes_room_for_the_next() {
    for leaves in 0..3_usize {
        let (layer, mut service, script) = bed(slow(), 10 * SECOND, 3);
        let start = script.arrivals().len();
        service.ready().await.unwrap().call(1).await.unwrap();
        let mut line = Vec::new();
        for _ in 0..3 {
            line.push(stand(&mut service, 1).await);
        }
        advance(50 * MS).await;
        drop(line.remove(leaves));
        assert_eq!(layer.waiting(), 2);
        assert_eq!(left(&layer), 0);
        let mut tasks = JoinSet::new();
        for future in line {
            tasks.spawn(async move { future.await.unwrap() });
        }
        // Whoever comes now is reckoned behind two, not three.
        let (took, result) = elapsed(service.clone().oneshot(1)).await;
        result.unwrap();
        assert_eq!(took, 250 * MS, "{leaves} left");
        tasks.join_all().await;
        assert_eq!(
            script.arrivals()[start..],
            [0, 100, 200, 300].map(|at| at * MS)
        );
        assert_eq!(layer.waiting(), 0);
        drop(service);
        script.assert_finished();
    }
}

/// All of them are gone before one had its turn: nothing was charged.
#[tokio::test(start_paused = true)]
async fn who_leaves_is_not_charged() {
    let (layer, mut service, script) = bed(limits([costs(Quota::new(5, SECOND))]), 10 * SECOND, 10);
    service.ready().await.unwrap().call(5).await.unwrap();
    let polled = stand(&mut service, 5).await;
    let behind = stand(&mut service, 5).await;
    let unpolled = call(&mut service, 5).await;
    assert_eq!(layer.waiting(), 3);
    advance(SECOND).await;
    // Its turn has come, and it was woken, but it was not polled again.
    assert!(polled.is_woken());
    drop((unpolled, polled, behind));
    assert_eq!((layer.waiting(), left(&layer)), (0, 5));
    assert!(layer.shared.lines.lock().lines.is_empty());
    assert_eq!(script.call_count(), 1);
    assert_eq!(script.reserved(), 0);
}

/// Woken for the front and dropped before it was polled: the next is woken.
#[tokio::test(start_paused = true)]
async fn the_front_is_handed_on() {
    let (layer, mut service, script) = bed(slow(), 10 * SECOND, 10);
    service.ready().await.unwrap().call(1).await.unwrap();
    let first = stand(&mut service, 1).await;
    let second = stand(&mut service, 1).await;
    let mut third = stand(&mut service, 1).await;
    drop(first);
    assert!(second.is_woken() && !third.is_woken());
    drop(second);
    assert!(third.is_woken());
    assert_pending!(third.poll());
    advance(100 * MS).await;
    assert!(third.is_woken());
    assert!(assert_ready!(third.poll()).is_ok());
    assert_eq!(layer.waiting(), 0);
    assert_eq!(script.arrivals(), [Duration::ZERO, 100 * MS]);
}

/// The one ahead sleeps through its turn, and this one is polled late: it
/// waits no longer for that, counted from its call. (It did.)
#[tokio::test(start_paused = true)]
async fn the_longest_wait_begins_with_the_call() {
    let (_layer, mut service, _script) = bed(slow(), 250 * MS, 10);
    service.ready().await.unwrap().call(1).await.unwrap();
    let _stuck = stand(&mut service, 1).await;
    let late = call(&mut service, 1).await;
    advance(200 * MS).await;
    let (took, result) = elapsed(late).await;
    assert_eq!(took, 50 * MS);
    // By now a request would fit, if it were its turn.
    assert_eq!(refusal(result).retry_after(), Some(Duration::ZERO));
}

/// A wake-up that is not its own changes nothing.
#[tokio::test(start_paused = true)]
async fn polling_again_charges_once() {
    let (layer, mut service, script) = bed(slow(), 10 * SECOND, 10);
    service.ready().await.unwrap().call(1).await.unwrap();
    let mut first = stand(&mut service, 1).await;
    for _ in 0..10 {
        advance(9 * MS).await;
        assert_pending!(first.poll());
        assert_eq!(layer.waiting(), 1);
    }
    advance(10 * MS).await;
    assert!(assert_ready!(first.poll()).is_ok());
    assert_eq!(script.call_count(), 2);
}

#[tokio::test(start_paused = true)]
async fn keys_have_lines_of_their_own() {
    let builder = RateLimitLayer::any().limit(
        Limit::any(Quota::new(1, SECOND))
            .key(key::from_request(|n: &u32| Key::from(u64::from(*n)))),
    );
    let (layer, service, script) = bed(builder, 10 * SECOND, 10);
    let mut tasks = JoinSet::new();
    for request in [1, 1, 1, 2, 2] {
        tasks.spawn(service.clone().oneshot(request));
        settle().await;
    }
    assert_eq!(layer.waiting(), 3);
    assert_eq!(layer.shared.lines.lock().lines.len(), 2);
    tasks.join_all().await;
    let times = [0, 0, 1, 1, 2];
    assert_eq!(script.arrivals(), times.map(|at| at * SECOND));
    assert_eq!(script.requests()[..2], [1, 2]);
    assert_eq!(script.requests()[4], 1);
}

/// Lines that share a limit compete; the bound holds, and all get in.
#[tokio::test(start_paused = true)]
async fn lines_that_share_a_limit_share_it() {
    let builder = limits([
        Limit::any(Quota::new(1, SECOND))
            .name("own")
            .key(key::from_request(|n: &u32| Key::from(u64::from(*n)))),
        Limit::any(Quota::new(10, SECOND).burst(1)).name("all"),
    ]);
    let (layer, service, script) = bed(builder, 100 * SECOND, 100);
    let mut tasks = JoinSet::new();
    for _ in 0..3 {
        for request in 0..5 {
            tasks.spawn(service.clone().oneshot(request));
            settle().await;
        }
    }
    for result in tasks.join_all().await {
        result.unwrap();
    }
    let arrivals = script.arrivals();
    assert!(
        arrivals
            .windows(2)
            .all(|pair| pair[1] - pair[0] >= 100 * MS),
        "{arrivals:?}"
    );
    assert!(*arrivals.last().unwrap() < 3 * SECOND, "{arrivals:?}");
    assert_eq!(layer.waiting(), 0);
}

/// Reckoned to be in time, and then another line was faster.
#[tokio::test(start_paused = true)]
async fn who_loses_its_turn_is_not_kept_beyond_the_longest_wait() {
    let builder = limits([
        Limit::any(Quota::new(1, MS))
            .name("own")
            .key(key::from_request(|n: &u32| Key::from(u64::from(*n)))),
        Limit::any(Quota::new(1, 100 * MS)).name("all"),
    ]);
    let (layer, service, _script) = bed(builder, 150 * MS, 10);
    service.clone().oneshot(0).await.unwrap();
    let (one, two) = tokio::join!(
        elapsed(service.clone().oneshot(1)),
        elapsed(service.clone().oneshot(2)),
    );
    let (took, loser) = if one.1.is_ok() { two } else { one };
    assert_eq!(took, 100 * MS);
    assert_eq!(refusal(loser).retry_after(), Some(100 * MS));
    assert_eq!(layer.waiting(), 0);
}

/// The deadline of the request counts, where it is nearer than the longest
/// wait, and only there.
#[tokio::test(start_paused = true)]
async fn a_deadline_that_cannot_be_met_is_told_at_once() {
    let layer = RateLimitLayer::builder()
        .limit(Limit::new(Quota::new(1, SECOND)))
        .errors()
        .build_waiting(3 * SECOND, 10)
        .unwrap();
    let (inner, _script) = Script::<_, _, Infallible>::new()
        .otherwise(|_| Step::ok(web::response(200, "")))
        .build();
    let service = layer.layer(inner);
    let within = |span| {
        let mut request = web::get("/");
        Deadline::after(span).attach(request.extensions_mut());
        elapsed(service.clone().oneshot(request))
    };
    within(SECOND).await.1.unwrap();

    let (took, result) = within(SECOND - Duration::from_nanos(1)).await;
    assert_eq!(took, Duration::ZERO);
    assert_eq!(refusal(result.map(drop)).retry_after(), Some(SECOND));
    let (took, result) = within(SECOND).await;
    result.unwrap();
    assert_eq!(took, SECOND);

    let (mut first, second, third, fourth, fifth) = tokio::join!(
        within(100 * SECOND),
        within(SECOND),
        within(2 * SECOND),
        within(100 * SECOND),
        within(100 * SECOND),
    );
    assert_eq!(first.0, SECOND);
    // Behind the first, a second is not enough.
    assert_eq!(second.0, Duration::ZERO);
    assert_eq!(refusal(second.1.map(drop)).retry_after(), Some(2 * SECOND));
    assert_eq!((third.0, fourth.0), (2 * SECOND, 3 * SECOND));
    third.1.unwrap();
    // A far deadline does not stretch the longest wait.
    assert_eq!(fifth.0, Duration::ZERO);
    assert_eq!(refusal(fifth.1.map(drop)).retry_after(), Some(4 * SECOND));
    let _ = first.1.as_mut().unwrap();
}

#[tokio::test(start_paused = true)]
async fn shadow_and_bypass_wait_for_nobody() {
    let (layer, service, script) = bed(slow().shadow(true), SECOND, 1);
    let (took, ()) = elapsed(async {
        for _ in 0..5 {
            service.clone().oneshot(1).await.unwrap();
        }
    })
    .await;
    assert_eq!(
        (took, script.call_count(), left(&layer)),
        (Duration::ZERO, 5, 0)
    );

    let (layer, mut service, _script) = bed(slow().bypass(|n: &u32| *n == 0), SECOND, 1);
    service.ready().await.unwrap().call(1).await.unwrap();
    let _waits = stand(&mut service, 1).await;
    let (took, result) = elapsed(service.clone().oneshot(0)).await;
    assert_eq!(
        (took, result.unwrap(), layer.waiting()),
        (Duration::ZERO, 0, 1)
    );
}

/// A quota is raised while they wait: the line stays a line.
#[tokio::test(start_paused = true)]
async fn a_change_while_they_wait_is_noticed_at_the_reckoned_turn() {
    let (layer, service, script) = bed(slow(), 10 * SECOND, 10);
    service.clone().oneshot(1).await.unwrap();
    let mut tasks = JoinSet::new();
    for request in [1, 1, 1] {
        tasks.spawn(service.clone().oneshot(request));
        settle().await;
    }
    layer
        .handle()
        .set_quota("default", Quota::per_second(1000))
        .unwrap();
    advance(50 * MS).await;
    // It would fit now, but three came before.
    tasks.spawn(service.clone().oneshot(1));
    settle().await;
    assert_eq!((script.call_count(), layer.waiting()), (1, 4));
    tasks.join_all().await;
    assert_eq!(script.arrivals()[1..], [100 * MS; 4]);

    // Lowered: what was reckoned does not hold any more.
    let (layer, service, _script) = bed(slow(), SECOND, 10);
    service.clone().oneshot(1).await.unwrap();
    let (waiting, ()) = tokio::join!(elapsed(service.clone().oneshot(1)), async {
        settle().await;
        layer
            .handle()
            .set_quota("default", Quota::new(1, 2 * SECOND))
            .unwrap();
    });
    assert_eq!(waiting.0, 100 * MS);
    assert_eq!(refusal(waiting.1).retry_after(), Some(1900 * MS));
}

/// The instance that was polled ready is the one that is called, at once or
/// after the wait, and a reservation goes back when a future is dropped.
#[tokio::test(start_paused = true)]
async fn readiness() {
    for quota in [Quota::per_second(1000), Quota::new(1, 100 * MS)] {
        let layer = limits([Limit::any(quota)])
            .build_waiting(1000 * SECOND, 10)
            .unwrap();
        ReadinessProbe::new(|| 1, |n: &u32| Step::<u32, Infallible>::ok(*n))
            .check(&layer)
            .await;
    }
    // Nobody waits, everyone is refused.
    let layer = slow().build_waiting(MS, 10).unwrap();
    ReadinessProbe::new(|| 1, |n: &u32| Step::<u32, Infallible>::ok(*n))
        .check(&layer)
        .await;
}

/// While it waits, a request holds the slot that it was promised: the cost
/// that the documentation names. When it leaves, the slot is free.
#[tokio::test(start_paused = true)]
async fn a_slot_is_held_while_waiting_and_freed_on_leaving() {
    let layer = slow().build_waiting(10 * SECOND, 10).unwrap();
    let (inner, script) = script();
    let mut service = layer.layer(ConcurrencyLimit::new(inner, 1));
    service.ready().await.unwrap().call(1).await.unwrap();
    let mut waits = call(&mut service, 1).await;
    assert_pending!(waits.poll());
    let mut other = task::spawn(service.clone());
    assert_pending!(
        other
            .enter(|cx, mut service| service.poll_ready(cx))
            .map_err(drop)
    );
    drop(waits);
    assert!(other.is_woken());
    let ready = assert_ready!(
        other
            .enter(|cx, mut service| service.poll_ready(cx))
            .map_err(drop)
    );
    assert!(ready.is_ok());
    assert_eq!(script.call_count(), 1);
}

/// A key closure that panics does so before anything is taken.
#[tokio::test(start_paused = true)]
async fn a_panic_in_a_callback_breaks_nothing() {
    let by = key::from_request(|n: &u32| {
        assert!(*n != 13, "thirteen");
        Key::global()
    });
    let (layer, mut service, _script) = bed(
        limits([Limit::any(Quota::new(1, 100 * MS)).key(by)]),
        SECOND,
        10,
    );
    service.ready().await.unwrap().call(1).await.unwrap();
    let _first = stand(&mut service, 1).await;
    for _ in 0..3 {
        service.ready().await.unwrap();
        let panicked = catch_unwind(AssertUnwindSafe(|| drop(service.call(13))));
        assert!(panicked.is_err());
    }
    assert_eq!(layer.waiting(), 1);
    let (_, result) = tokio::join!(_first, service.oneshot(1));
    result.unwrap();
    assert_eq!(layer.waiting(), 0);
}

/// Many clones on many threads, on the real clock: each starts at its time or
/// later, none is lost, nothing is left behind.
#[test]
fn clones_contend() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_time()
        .build()
        .unwrap();
    let layer = limits([Limit::any(Quota::new(1, MS).burst(1))])
        .build_waiting(60 * SECOND, 1000)
        .unwrap();
    let starts = Arc::new(Mutex::new(Vec::new()));
    let inner = {
        let starts = Arc::clone(&starts);
        tower::service_fn(move |_: u32| {
            starts.lock().unwrap().push(clock::now());
            std::future::ready(Ok::<_, Infallible>(()))
        })
    };
    runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for n in 0..200 {
            let mut service = layer.layer(inner.clone());
            tasks.spawn(async move {
                let mut future = std::pin::pin!(service.ready().await.unwrap().call(n));
                // Every fourth goes away early, some of them as their turn
                // comes.
                if n % 4 == 0 {
                    timeout(MS * n / 3, &mut future)
                        .await
                        .is_ok_and(|result| result.is_ok())
                } else {
                    future.await.unwrap();
                    true
                }
            });
        }
        let served = tasks
            .join_all()
            .await
            .into_iter()
            .filter(|served| *served)
            .count();
        assert!(served >= 150);
        assert_eq!(starts.lock().unwrap().len(), served);
    });
    assert_eq!(layer.waiting(), 0);
    assert!(layer.shared.lines.lock().lines.is_empty());
    let mut starts = starts.lock().unwrap();
    starts.sort_unstable();
    let first = starts[0];
    for (n, start) in (0_u32..).zip(&*starts) {
        // Charged at a moment that is a little before the call.
        assert!(
            *start - first + MS >= MS * n,
            "the {n}th after {:?}",
            *start - first
        );
    }
}

/// The order is that of the calls, whoever is polled first.
#[tokio::test(start_paused = true)]
async fn the_order_is_that_of_the_calls() {
    let (_layer, mut service, script) = bed(slow(), 10 * SECOND, 10);
    service.ready().await.unwrap().call(1).await.unwrap();
    let mut first = call(&mut service, 1).await;
    let mut second = call(&mut service, 1).await;
    assert_pending!(second.poll());
    assert_pending!(first.poll());
    advance(100 * MS).await;
    assert_pending!(second.poll());
    assert!(assert_ready!(first.poll()).is_ok());
    assert_eq!(script.call_count(), 2);
    advance(100 * MS).await;
    assert!(assert_ready!(second.poll()).is_ok());
}
