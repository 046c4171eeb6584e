//! Services of any kind: when a call ends, and what is left of it.

use std::{
    cell::Cell,
    convert::Infallible,
    future::pending,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use buttress_core::{
    Any, BoxError, Refusal, RefusalKind, clock,
    testing::{Fate, ReadinessProbe, Script, Step, advance, elapsed, settle},
};
use buttress_timeout::{Error, Errors, TimeoutLayer};
use tokio::task::consume_budget;
use tokio_test::{assert_pending, assert_ready, task};
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimit, service_fn};

const SECOND: Duration = Duration::from_secs(1);

type Numbers = TimeoutLayer<Any<u32>, Errors>;

fn limited(limit: Duration) -> Numbers {
    TimeoutLayer::any()
        .name("numbers")
        .limit(limit)
        .build()
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn readiness() {
    let probe = || ReadinessProbe::new(|| 1, |n: &u32| Step::<u32, Infallible>::ok(*n));
    probe().check(&limited(SECOND)).await;
    probe().check(&Numbers::any().build().unwrap()).await;
    let hangs = ReadinessProbe::new(|| 1, |_: &u32| Step::<u32, Infallible>::hang());
    hangs.check(&limited(SECOND)).await;
}

#[tokio::test(start_paused = true)]
async fn a_hang_ends_exactly_when_time_is_up() {
    let (inner, script) = Script::<u32, u32, &str>::new()
        .then(Step::hang())
        .then(Step::ok(2).after(SECOND - Duration::from_millis(1)))
        .then(Step::err("down").after(SECOND / 2))
        .then(Step::ok(4).after(SECOND + Duration::from_millis(1)))
        .build();
    let service = limited(SECOND).layer(inner);
    let call = async |n| elapsed(service.clone().oneshot(n)).await;

    let (took, result) = call(1).await;
    assert_eq!(took, SECOND);
    let error = result.unwrap_err();
    assert_eq!(error.elapsed().unwrap().after(), SECOND);
    assert_eq!(error.elapsed().unwrap().name(), "numbers");
    assert_eq!(error.to_string(), "time ran out after 1s (numbers)");

    assert_eq!(
        call(2).await,
        (SECOND - Duration::from_millis(1), Ok(2)),
        "in time"
    );
    assert_eq!(call(3).await, (SECOND / 2, Err(Error::Inner("down"))));
    let (took, result) = call(4).await;
    assert_eq!(took, SECOND);
    assert!(result.is_err());

    assert_eq!(script.count(Fate::Dropped), 2);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn an_answer_at_the_same_moment_wins() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .then(Step::ok(1).held())
        .build();
    let mut service = limited(SECOND).layer(inner);
    service.ready().await.unwrap();
    let mut call = task::spawn(service.call(1));
    assert_pending!(call.poll());
    advance(SECOND).await;
    assert!(call.is_woken());
    script.release(0);
    assert_eq!(assert_ready!(call.poll()), Ok(1));
    script.assert_finished();
}

/// tonic's client reads the `grpc-timeout` that it is to send, and fails by a
/// timer of its own: which of two errors there was, was left to chance.
#[tokio::test(start_paused = true)]
async fn an_error_at_the_same_moment_does_not_win() {
    let almost = SECOND - Duration::from_nanos(1);
    for (when, elapsed) in [(almost, false), (SECOND, true)] {
        let (inner, script) = Script::<u32, u32, &str>::new()
            .then(Step::err("timeout expired").held())
            .build();
        let mut service = limited(SECOND).layer(inner);
        service.ready().await.unwrap();
        let mut call = task::spawn(service.call(1));
        assert_pending!(call.poll());
        advance(when).await;
        script.release(0);
        let error = assert_ready!(call.poll()).unwrap_err();
        assert_eq!(error.elapsed().is_some(), elapsed, "{error:?}");
        script.assert_finished();
    }
}

#[tokio::test(start_paused = true)]
async fn a_moment_before_it_is_not_over() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .then(Step::hang())
        .build();
    let mut service = limited(SECOND).layer(inner);
    service.ready().await.unwrap();
    let mut call = task::spawn(service.call(1));
    assert_pending!(call.poll());
    advance(SECOND - Duration::from_nanos(1)).await;
    // However often it is asked.
    assert_pending!(call.poll());
    assert_pending!(call.poll());
    advance(Duration::from_nanos(1)).await;
    assert!(assert_ready!(call.poll()).is_err());
    script.assert_finished();
}

/// The limit counts from the call, not from the first poll.
#[tokio::test(start_paused = true)]
async fn time_passes_before_the_first_poll_too() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .then(Step::hang())
        .then(Step::ok(2))
        .build();
    let mut service = limited(SECOND).layer(inner);
    service.ready().await.unwrap();
    let mut late = task::spawn(service.call(1));
    service.ready().await.unwrap();
    let mut there = task::spawn(service.call(2));
    advance(SECOND).await;
    assert!(assert_ready!(late.poll()).is_err());
    assert_eq!(assert_ready!(there.poll()), Ok(2), "an answer is one");
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn the_call_is_gone_before_its_answer() {
    struct Gone(Arc<Mutex<Vec<&'static str>>>);
    impl Drop for Gone {
        fn drop(&mut self) {
            self.0.lock().unwrap().push("dropped");
        }
    }
    let told = Arc::new(Mutex::new(Vec::new()));
    let inner = service_fn(|_: u32| {
        let held = Gone(Arc::clone(&told));
        async move {
            let _held = held;
            pending::<Result<u32, Infallible>>().await
        }
    });
    let mut call = Box::pin(limited(SECOND).layer(inner).oneshot(1));
    // The future itself lives on.
    let result = (&mut call).await;
    told.lock().unwrap().push("answered");
    assert!(result.is_err());
    assert_eq!(*told.lock().unwrap(), ["dropped", "answered"]);
}

#[tokio::test(start_paused = true)]
async fn a_slot_is_free_when_time_is_up() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .then(Step::hang())
        .then(Step::ok(2))
        .build();
    let service = limited(SECOND).layer(ConcurrencyLimit::new(inner, 1));
    let (first, second) = tokio::join!(
        elapsed(service.clone().oneshot(1)),
        elapsed(service.clone().oneshot(2)),
    );
    assert_eq!(first.0, SECOND);
    assert!(first.1.is_err());
    // Waiting for readiness takes nothing of the second's time.
    assert_eq!((second.0, second.1.unwrap()), (SECOND, 2));
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn who_leaves_takes_the_call_along() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .then(Step::hang())
        .build();
    let layer = limited(SECOND);
    let mut call = task::spawn(layer.layer(inner).oneshot(1));
    // Ready first, then called.
    assert_pending!(call.poll());
    assert_pending!(call.poll());
    advance(SECOND / 2).await;
    drop(call);
    assert_eq!(script.count(Fate::Dropped), 1);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn without_a_limit_a_call_passes_through() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|n| Step::ok(*n).after(SECOND * 3600 * 24 * 500))
        .build();
    let layer = Numbers::any().build().unwrap();
    let (took, answer) = elapsed(layer.layer(inner).oneshot(7)).await;
    assert_eq!((took, answer.unwrap()), (SECOND * 3600 * 24 * 500, 7));
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_limit_can_be_changed_while_it_serves() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|_| Step::hang())
        .build();
    let layer = limited(SECOND);
    let service = layer.layer(inner);
    let handle = service.handle();
    let call = async || elapsed(service.clone().oneshot(1)).await.0;

    let (before, ()) = tokio::join!(call(), async {
        settle().await;
        // What has begun keeps what it began with.
        handle.set_limit(SECOND * 5).unwrap();
    });
    assert_eq!(before, SECOND);
    assert_eq!(call().await, SECOND * 5);
    layer.handle().set_limit(SECOND / 4).unwrap();
    assert_eq!(call().await, SECOND / 4);

    handle.set_limit(None).unwrap();
    let mut unlimited = task::spawn(service.clone().oneshot(1));
    assert_pending!(unlimited.poll());
    advance(SECOND * 1000).await;
    assert_pending!(unlimited.poll());
    drop(unlimited);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_panic_passes_through() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .then(Step::panic("in the future").after(SECOND / 2))
        .then(Step::panic_in_call("in the call"))
        .build();
    let mut service = limited(SECOND).layer(inner);
    for expected in ["in the future", "in the call"] {
        service.ready().await.unwrap();
        let called = std::panic::catch_unwind(AssertUnwindSafe(|| service.call(1)));
        let panic = match called {
            Ok(call) => tokio::spawn(call).await.unwrap_err().into_panic(),
            Err(panic) => panic,
        };
        assert_eq!(panic.downcast_ref::<String>().unwrap(), expected);
    }
    assert_eq!(script.count(Fate::Panicked), 2);
}

#[tokio::test(start_paused = true)]
async fn as_a_boxed_error_it_is_a_refusal() {
    let inner = service_fn(async |_: u32| pending::<Result<u32, std::io::Error>>().await);
    let service = limited(SECOND).layer(inner).map_err(BoxError::from);
    let error = service.oneshot(1).await.unwrap_err();
    let refusal = Refusal::find(&*error).unwrap();
    assert_eq!(refusal.kind(), RefusalKind::TimedOut);
    assert_eq!(refusal.origin(), Some("numbers"));
    assert_eq!(refusal.retry_after(), None);

    let inner = service_fn(async |_: u32| Err::<u32, _>(std::io::Error::other("reset")));
    let service = limited(SECOND).layer(inner).map_err(BoxError::from);
    let error = service.oneshot(1).await.unwrap_err();
    assert_eq!(error.to_string(), "reset");
    assert!(error.is::<std::io::Error>());
}

#[tokio::test(start_paused = true)]
async fn an_error_of_readiness_is_the_inner_ones() {
    let (inner, script) = Script::<u32, u32, &str>::new().build();
    script.fail_readiness("closed");
    let mut service = limited(SECOND).layer(inner);
    let error = service.ready().await.err();
    assert_eq!(error, Some(Error::Inner("closed")));
}

/// tokio has a task that has done enough find every one of its resources
/// pending, timers too: a call that always does enough would have no limit.
#[tokio::test(start_paused = true)]
async fn a_call_that_uses_up_its_budget_ends_too() {
    let inner = service_fn(async |_: u32| {
        loop {
            consume_budget().await;
        }
        #[expect(unreachable_code, reason = "names the type")]
        Ok::<u32, Infallible>(1)
    });
    let call = tokio::spawn(limited(SECOND).layer(inner).oneshot(1));
    settle().await;
    tokio::time::advance(SECOND * 2).await;
    settle().await;
    assert!(call.is_finished());
    assert!(call.await.unwrap().is_err());
}

/// What no clock can reach is never reached.
#[tokio::test(start_paused = true)]
async fn the_longest_limit_is_one() {
    let days = Duration::from_secs(366 * 24 * 3600);
    let inner = service_fn(async |_: u32| pending::<Result<u32, Infallible>>().await);
    let (took, result) = elapsed(limited(days).layer(inner).oneshot(1)).await;
    assert_eq!(took, days);
    assert!(result.is_err());
}

/// A timer that is left behind wakes a task for nothing.
#[tokio::test(start_paused = true)]
async fn no_timer_is_left_when_the_answer_is_there() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .then(Step::ok(1).held())
        .build();
    let mut service = limited(SECOND).layer(inner);
    service.ready().await.unwrap();
    let mut call = task::spawn(service.call(1));
    assert_pending!(call.poll());
    script.release(0);
    assert_eq!(assert_ready!(call.poll()), Ok(1));
    advance(SECOND * 2).await;
    assert!(!call.is_woken());
    script.assert_finished();
}

/// No timer is made, so none is missed: there is no runtime here.
#[test]
fn an_answer_at_once_needs_no_runtime() {
    let calls = Arc::new(AtomicUsize::new(0));
    let inner = service_fn(|n: u32| {
        calls.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Ok::<_, Infallible>(n))
    });
    let mut service = limited(SECOND).layer(inner);
    let _ = clock::now();
    let mut call = std::pin::pin!(service.call(7));
    let polled = call.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert_eq!(polled, Poll::Ready(Ok(7)));
    assert_eq!(calls.load(Ordering::Relaxed), 1);
}

/// Whatever the request is.
#[test]
fn it_is_send_and_sync() {
    fn check<T: Clone + Send + Sync>(_: &T) {}
    let layer = TimeoutLayer::<Any<Cell<u8>>, _>::any().build().unwrap();
    check(&layer);
    check(&layer.layer(service_fn(async |_: Cell<u8>| Ok::<_, Infallible>(()))));
}
