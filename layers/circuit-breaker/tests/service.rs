//! The layer as a tower service of any kind: readiness, cancellation, panics,
//! contention, and generations.

use std::{
    convert::Infallible,
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress_circuit_breaker::{
    Breaker, Cause, CircuitBreakerLayer, Error, Errors, Event, Reason, ResultClassifier, Rule,
    Settings, State, Window,
};
use buttress_core::{
    Any, BoxError, Refusal, RefusalKind,
    classify::Verdict,
    testing::{ReadinessProbe, Script, Step, advance},
};
use tokio::task::JoinSet;
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimit, service_fn};

type Numbers = CircuitBreakerLayer<Any<u32>, Errors, ResultClassifier>;

const SECOND: Duration = Duration::from_secs(1);

/// Opens after so many failures in a row, for 10 s.
fn after(failures: u32) -> Settings {
    Settings::aggressive().consecutive_failures(failures)
}

fn numbers(settings: Settings) -> Numbers {
    CircuitBreakerLayer::any()
        .settings(settings)
        .build()
        .unwrap()
}

/// The polled instance is the one called, and what a dropped future held is
/// given back: closed, and where everything is refused.
#[tokio::test(start_paused = true)]
async fn readiness() {
    let probe = || ReadinessProbe::new(|| 1, |n: &u32| Step::<u32, Infallible>::ok(*n));
    let layer = numbers(after(1));
    probe().check(&layer).await;
    layer.breaker().half_open().unwrap_err();
    layer.breaker().trip(None).unwrap();
    layer.breaker().half_open().unwrap();
    probe().check(&layer).await;
    assert_eq!(layer.breaker().state(), State::Closed);
    assert_eq!(layer.breaker().status().probes_in_flight, 0);
}

/// An instance that has refused has the slot that it was promised still, since
/// it cannot be given back without a clone; dropping the instance frees it.
#[tokio::test(start_paused = true)]
async fn a_refusal_uses_no_slot_up() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|n| Step::ok(*n))
        .build();
    let layer = numbers(after(1));
    let mut service = layer.layer(ConcurrencyLimit::new(inner, 1));
    let mut other = task::spawn(service.clone());
    assert_eq!(service.ready().await.unwrap().call(7).await.unwrap(), 7);

    layer.breaker().trip(None).unwrap();
    let error = service.ready().await.unwrap().call(8).await.unwrap_err();
    let open = error.open().unwrap();
    assert_eq!(open.reason(), Reason::Open);
    assert_eq!(open.retry_after(), Some(10 * SECOND));
    assert_eq!(script.requests(), [7]);

    let mut service = task::spawn(service);
    assert_ready_ok!(service.enter(|cx, mut service| service.poll_ready(cx)));
    let readiness = other.enter(|cx, mut other| other.poll_ready(cx));
    assert!(readiness.is_pending());
    drop(service);
    assert!(other.is_woken());
    assert_ready_ok!(other.enter(|cx, mut other| other.poll_ready(cx)));
    drop(other);
    script.assert_finished();
}

/// Clones start unready, whatever their origin was promised.
#[tokio::test(start_paused = true)]
async fn contending_clones_over_one_slot() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|n| Step::ok(*n).after(SECOND))
        .build();
    let service = numbers(after(1)).layer(ConcurrencyLimit::new(inner, 1));
    let mut calls = JoinSet::new();
    for n in 0..10 {
        calls.spawn(service.clone().oneshot(n));
    }
    let mut answers: Vec<u32> = calls
        .join_all()
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    answers.sort_unstable();
    assert_eq!(answers, Vec::from_iter(0..10));
    assert_eq!(script.peak_in_flight(), 1);
    script.assert_finished();
}

/// Readiness is the inner service's, its errors too, which are no failures of
/// a call.
#[tokio::test(start_paused = true)]
async fn errors_of_the_inner_service_pass_untouched() {
    let (inner, script) = Script::<u32, u32, &str>::new()
        .then(Step::err("broken"))
        .unready()
        .build();
    let layer = numbers(after(2));
    let mut service = task::spawn(layer.layer(inner));
    assert!(
        service
            .enter(|cx, mut service| service.poll_ready(cx))
            .is_pending()
    );
    script.set_ready();
    assert!(service.is_woken());
    assert_ready_ok!(service.enter(|cx, mut service| service.poll_ready(cx)));
    let mut future = task::spawn(service.call(1));
    let error = assert_ready!(future.poll()).unwrap_err();
    assert_eq!(error.into_inner(), Some("broken"));
    script.fail_readiness("gone");
    let gone = assert_ready!(service.enter(|cx, mut service| service.poll_ready(cx)));
    assert!(matches!(gone, Err(Error::Inner("gone"))));
    assert_eq!(layer.breaker().status().failures, 1);
}

/// A refusal answers one request and is not the end of the service: a `Buffer`
/// in front, which gives up for good when readiness fails, sees it recover.
#[tokio::test(start_paused = true)]
async fn behind_a_buffer() {
    let (inner, script) = Script::<u32, u32, BoxError>::new()
        .otherwise(|n| match n {
            0 => Step::err("down".into()),
            n => Step::ok(*n),
        })
        .build();
    let service = tower::buffer::Buffer::new(numbers(after(2)).layer(inner), 8);
    for _ in 0..3 {
        for _ in 0..2 {
            let error = service.clone().oneshot(0).await.unwrap_err();
            assert_eq!(error.to_string(), "down");
        }
        for _ in 0..5 {
            let error = service.clone().oneshot(1).await.unwrap_err();
            let refusal = error.downcast_ref::<Refusal>().unwrap();
            assert_eq!(refusal.kind(), RefusalKind::CircuitOpen);
            assert_eq!(refusal.origin(), Some("default"));
        }
        advance(10 * SECOND).await;
        for n in 1..=3 {
            assert_eq!(service.clone().oneshot(n).await.unwrap(), n);
        }
    }
    assert_eq!(script.call_count(), 15);
}

/// A caller that leaves decides nothing, and a probe's place is free at once.
#[tokio::test(start_paused = true)]
async fn dropped_futures_decide_nothing() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|_| Step::hang())
        .build();
    let layer = numbers(after(1));
    let mut service = layer.layer(inner);
    for polls in 0..3 {
        let mut future = task::spawn(service.ready().await.unwrap().call(0));
        for _ in 0..polls {
            assert_pending!(future.poll());
        }
    }
    assert_eq!(layer.breaker().state(), State::Closed);

    layer.breaker().trip(None).unwrap();
    advance(10 * SECOND).await;
    for polls in 0..3 {
        let mut probe = task::spawn(service.ready().await.unwrap().call(0));
        for _ in 0..polls {
            assert_pending!(probe.poll());
        }
        assert_eq!(layer.breaker().status().probes_in_flight, 1);
        let refused = service.ready().await.unwrap().call(0).await.unwrap_err();
        assert_eq!(refused.open().unwrap().reason(), Reason::HalfOpen);
        drop(probe);
        assert_eq!(layer.breaker().status().probes_in_flight, 0);
    }
    assert_eq!(layer.breaker().state(), State::HalfOpen);
    assert_eq!(script.call_count(), 6);
    drop(service);
    script.assert_finished();
}

/// A service that was polled ready and is not needed takes nothing with it.
#[tokio::test(start_paused = true)]
async fn a_dropped_ready_service_holds_nothing() {
    let (inner, script) = Script::<u32, u32, Infallible>::new().build();
    let layer = numbers(after(1));
    layer.breaker().trip(None).unwrap();
    layer.breaker().half_open().unwrap();
    let mut service = layer.layer(ConcurrencyLimit::new(inner, 1));
    let other = service.clone();
    service.ready().await.unwrap();
    // A probe's place is taken in `call`.
    assert_eq!(layer.breaker().status().probes_in_flight, 0);
    drop(service);
    drop(task::spawn(other.ready_oneshot()).await.unwrap());
    script.assert_finished();
}

/// With a slow-call rule, a timeout around the breaker does not hide that the
/// callee hangs.
#[tokio::test(start_paused = true)]
async fn a_hang_given_up_by_a_timeout_outside_opens_it() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|_| Step::hang())
        .build();
    let settings = Settings::new()
        .slow_calls(SECOND, 1.0)
        .window(Window::Calls(3))
        .minimum_calls(3);
    let layer = numbers(settings);
    let service = layer.layer(inner);
    for _ in 0..3 {
        assert_eq!(layer.breaker().state(), State::Closed);
        let gave_up = tokio::time::timeout(SECOND, service.clone().oneshot(1)).await;
        assert!(gave_up.is_err());
    }
    assert_eq!(layer.breaker().state(), State::Open);
    assert_eq!(script.call_count(), 3);
}

/// The timeout inside makes a hang an error.
#[tokio::test(start_paused = true)]
async fn a_timeout_inside_is_a_failure() {
    let (inner, _script) = Script::<u32, u32, BoxError>::new()
        .otherwise(|_| Step::hang())
        .build();
    let layer = numbers(after(2));
    let service = layer.layer(tower::timeout::Timeout::new(inner, SECOND));
    for _ in 0..2 {
        let error = service.clone().oneshot(1).await.unwrap_err();
        let elapsed = error.into_inner().unwrap();
        assert!(elapsed.is::<tower::timeout::error::Elapsed>());
    }
    assert_eq!(layer.breaker().state(), State::Open);
}

/// A panic is a failure wherever it is: in `call`, in the future, and in the
/// classifier. Nothing is locked by it.
#[tokio::test(start_paused = true)]
async fn panics_are_failures() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|n| match n {
            0 => Step::panic_in_call("call"),
            1 => Step::panic("future"),
            n => Step::ok(*n),
        })
        .build();
    let layer = CircuitBreakerLayer::<Any<u32>, _, _>::any()
        .settings(after(3))
        .classify(|result: Result<&u32, &Infallible>| match result {
            Ok(2) => panic!("classifier"),
            _ => Verdict::Success,
        })
        .build()
        .unwrap();
    let service = layer.layer(inner);
    let send = |n| tokio::spawn(service.clone().oneshot(n));
    for (failures, n) in (1..).zip([0, 1, 2]) {
        assert_eq!(layer.breaker().state(), State::Closed);
        assert!(send(n).await.unwrap_err().is_panic(), "{n}");
        let state = layer.breaker().status();
        assert_eq!(
            (state.state == State::Open, failures),
            (failures == 3, failures)
        );
    }
    // As a probe: it is not hanging in half-open, and opens again.
    advance(10 * SECOND).await;
    assert!(send(1).await.unwrap_err().is_panic());
    assert_eq!(layer.breaker().state(), State::Open);
    advance(10 * SECOND).await;
    assert_eq!(send(7).await.unwrap().unwrap(), 7);
    assert_eq!(layer.breaker().state(), State::Closed);
    assert_eq!(script.call_count(), 5);
}

/// A call that was let in before the breaker opened says nothing about what
/// came after.
#[tokio::test(start_paused = true)]
async fn late_verdicts_change_nothing() {
    let (inner, script) = Script::<u32, u32, &str>::new()
        .otherwise(|n| match n {
            0 => Step::err("down"),
            1 => Step::ok(1).held(),
            _ => Step::err("late").held(),
        })
        .build();
    let layer = numbers(after(1));
    let service = layer.layer(inner);
    let late_success = tokio::spawn(service.clone().oneshot(1));
    let late_failure = tokio::spawn(service.clone().oneshot(2));
    buttress_core::testing::settle().await;
    service.clone().oneshot(0).await.unwrap_err();
    advance(10 * SECOND).await;
    let probe = tokio::spawn(service.clone().oneshot(1));
    buttress_core::testing::settle().await;
    assert_eq!(layer.breaker().state(), State::HalfOpen);

    script.release(0);
    assert_eq!(late_success.await.unwrap().unwrap(), 1);
    assert_eq!(layer.breaker().state(), State::HalfOpen);
    script.release(1);
    late_failure.await.unwrap().unwrap_err();
    assert_eq!(layer.breaker().state(), State::HalfOpen);
    assert_eq!(layer.breaker().status().probes_in_flight, 1);

    script.release(3);
    probe.await.unwrap().unwrap();
    assert_eq!(layer.breaker().state(), State::Closed);
}

/// One probe of fifty callers, on threads and in tasks.
#[test]
fn one_probe_of_fifty_callers() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(8)
        .enable_all()
        .build()
        .unwrap();
    for at_once in [1, 3] {
        let layer = numbers(after(1).half_open_probes(3).half_open_concurrency(at_once));
        layer.breaker().trip(Duration::from_nanos(1)).unwrap();
        std::thread::yield_now();
        let calls = Arc::new(AtomicUsize::new(0));
        let inner = {
            let calls = Arc::clone(&calls);
            service_fn(move |_: u32| {
                calls.fetch_add(1, Ordering::Relaxed);
                pending::<Result<(), Infallible>>()
            })
        };
        let service = layer.layer(inner);
        let start = Arc::new(tokio::sync::Barrier::new(50));
        let refused = runtime.block_on(async {
            let mut tasks = JoinSet::new();
            for n in 0..50 {
                let (service, start) = (service.clone(), Arc::clone(&start));
                tasks.spawn(async move {
                    start.wait().await;
                    service.oneshot(n).await
                });
            }
            let mut refused = 0;
            while refused < 50 - at_once {
                let result = tasks.join_next().await.unwrap().unwrap();
                assert_eq!(
                    result.unwrap_err().open().unwrap().reason(),
                    Reason::HalfOpen
                );
                refused += 1;
            }
            // The others hang, and are dropped with the set.
            assert_eq!(tasks.len(), at_once as usize);
            refused
        });
        assert_eq!(refused, 50 - at_once);
        assert_eq!(calls.load(Ordering::Relaxed), at_once as usize);
        while layer.breaker().status().probes_in_flight > 0 {
            std::thread::yield_now();
        }
        assert_eq!(layer.breaker().state(), State::HalfOpen);
    }
}

/// Clones of the layer, of its services, and layers made of a breaker that is
/// there already: one state.
#[tokio::test(start_paused = true)]
async fn one_state_however_it_is_shared() {
    let breaker = Breaker::builder("one").settings(after(4)).build().unwrap();
    let layer: Numbers = CircuitBreakerLayer::any()
        .breaker(breaker.clone())
        .build()
        .unwrap();
    let other = CircuitBreakerLayer::<Any<u32>, _, _>::any()
        .breaker(breaker.clone())
        .build()
        .unwrap();
    let fails = || service_fn(async |_: u32| Err::<(), _>("down"));
    let service = layer.layer(fails());
    service.clone().oneshot(1).await.unwrap_err();
    layer.clone().layer(fails()).oneshot(1).await.unwrap_err();
    other.layer(fails()).oneshot(1).await.unwrap_err();
    breaker
        .call(async || Err::<(), _>("down"))
        .await
        .unwrap_err();
    let error = service.oneshot(1).await.unwrap_err();
    assert_eq!(error.open().unwrap().name().as_deref(), Some("one"));
    assert!(layer.breaker().is(&breaker) && other.breaker().is(&breaker));
}

/// What is heard, and in which order.
#[tokio::test(start_paused = true)]
async fn listeners_hear_it_all() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    let layer = CircuitBreakerLayer::<Any<u32>, _, _>::any()
        .name("heard")
        .settings(after(1))
        .classify(|result: Result<&u32, &&str>| match result {
            Ok(0) => Verdict::Ignored,
            Ok(_) => Verdict::Success,
            Err(_) => Verdict::Failure,
        })
        .on_event(move |name, event| {
            assert_eq!(name, "heard");
            hears.lock().unwrap().push(*event);
        })
        .build()
        .unwrap();
    let (inner, _script) = Script::<u32, u32, &str>::new()
        .otherwise(|n| {
            if *n == 9 {
                Step::err("down")
            } else {
                Step::ok(*n)
            }
        })
        .build();
    let service = layer.layer(inner);
    for n in [1, 0, 9, 1] {
        let _ = service.clone().oneshot(n).await;
    }
    let heard = heard.lock().unwrap();
    let [
        Event::Call,
        Event::Success { slow: false },
        Event::Call,
        Event::Ignored,
        Event::Call,
        Event::StateChange(change),
        Event::Failure { slow: false },
        Event::Rejected(Reason::Open),
    ] = heard[..]
    else {
        panic!("{heard:?}");
    };
    assert_eq!((change.from, change.to), (State::Closed, State::Open));
    assert_eq!(change.cause, Cause::Rule(Rule::ConsecutiveFailures));
    assert_eq!(change.wait, Some(10 * SECOND));
}

/// A listener may look at the breaker and even change it: no lock is held.
#[tokio::test(start_paused = true)]
async fn a_listener_may_use_the_breaker() {
    let slot: Arc<Mutex<Option<Breaker>>> = Arc::default();
    let seen = Arc::clone(&slot);
    let breaker = Breaker::builder("self")
        .settings(after(1))
        .on_event(move |_, event| {
            let breaker = seen.lock().unwrap().clone();
            if let (Event::StateChange(change), Some(breaker)) = (event, breaker)
                && change.to == State::Open
            {
                assert!(breaker.status().next_probe.is_some());
                breaker.half_open().unwrap();
            }
        })
        .build()
        .unwrap();
    *slot.lock().unwrap() = Some(breaker.clone());
    breaker.call(async || Err::<(), _>(())).await.unwrap_err();
    assert_eq!(breaker.state(), State::HalfOpen);
    *slot.lock().unwrap() = None;
}

/// Futures and services go where servers send them.
#[test]
fn it_is_send_and_static() {
    fn fits<T: Send + 'static>(_: &T) {}
    let layer = numbers(after(1));
    let mut service = layer.layer(service_fn(async |n: u32| Ok::<_, Infallible>(n)));
    fits(&service.call(1));
    fits(&service);
}
