use std::{
    any::Any,
    convert::Infallible,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, interval, sleep, timeout};
use tokio_test::{assert_pending, assert_ready_eq, assert_ready_err, assert_ready_ok, task};
use tower::{
    ServiceBuilder, ServiceExt, buffer::BufferLayer, layer::layer_fn, limit::ConcurrencyLimitLayer,
};
use tower_layer::Layer;
use tower_service::Service;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

type Echo = Scripted<u32, u32, &'static str>;

fn echo() -> Script<u32, u32, &'static str> {
    Script::new().otherwise(|n| Step::ok(*n))
}

fn probe() -> ReadinessProbe<u32, u32, &'static str> {
    ReadinessProbe::new(|| 7, |n| Step::ok(*n))
}

/// What it panicked with.
fn panic_of(f: impl FnOnce()) -> String {
    message(catch_unwind(AssertUnwindSafe(f)).expect_err("it panics"))
}

/// What the probe says of a layer that fails it.
async fn complaint<L>(probe: ReadinessProbe<u32, u32, &'static str>, layer: L) -> String
where
    L: Layer<Echo>,
    L::Service: Service<u32> + Clone,
{
    let mut check = Box::pin(probe.check(&layer));
    let caught = poll_fn(|cx| {
        let poll = catch_unwind(AssertUnwindSafe(|| check.as_mut().poll(cx)));
        match poll {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(panic)),
        }
    });
    message(caught.await.expect_err("the layer is bad"))
}

fn message(panic: Box<dyn Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => (*panic.downcast_ref::<&str>().unwrap()).to_owned(),
    }
}

// The script.

#[tokio::test(start_paused = true)]
async fn steps_come_in_order_and_in_their_time() {
    let (mut service, script) = Script::<u32, u32, &str>::new()
        .then(Step::ok(10))
        .then(Step::err("down").after(2 * SECOND))
        .otherwise(|n| Step::ok(n * 100).after(SECOND))
        .build();
    let mut results = Vec::new();
    for n in 0..4 {
        let service = service.ready().await.unwrap();
        results.push(elapsed(service.call(n)).await);
    }
    assert_eq!(
        results,
        [
            (Duration::ZERO, Ok(10)),
            (2 * SECOND, Err("down")),
            (SECOND, Ok(200)),
            (SECOND, Ok(300)),
        ]
    );
    assert_eq!(script.requests(), [0, 1, 2, 3]);
    assert_eq!(script.arrivals(), [0, 0, 2, 3].map(Duration::from_secs));
    assert_eq!(script.count(Fate::Answered), 3);
    assert_eq!(script.count(Fate::Failed), 1);
    assert_eq!(script.ready_polls(), 4);
    assert_eq!(script.take_requests().len(), 4);
    assert!(script.requests().is_empty());
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn hangs_hang_and_dropped_futures_are_told() {
    let (service, script) = echo().then(Step::hang()).build();
    let late = timeout(SECOND, service.clone().oneshot(1)).await;
    assert!(late.is_err());
    assert_eq!(script.count(Fate::Dropped), 1);
    assert_eq!(script.in_flight(), 0);

    // Never polled, and dropped all the same.
    drop(service.clone().ready().await.unwrap().call(2));
    assert_eq!(script.count(Fate::Dropped), 2);
    assert_eq!(service.oneshot(3).await, Ok(3));
    assert_eq!(script.count(Fate::Answered), 1);
    script.assert_finished();
}

#[tokio::test]
async fn panics_come_from_the_future_or_from_the_call() {
    let (mut service, script) = Script::<u32, u32, &str>::new()
        .then(Step::panic("in the future"))
        .then(Step::panic_in_call("in the call"))
        .then(Step::ok(3))
        .build();
    let mut future = task::spawn(service.ready().await.unwrap().call(1));
    let text = panic_of(|| assert!(future.poll().is_pending()));
    assert_eq!(text, "in the future");
    let ready = service.ready().await.unwrap();
    let text = panic_of(|| drop(ready.call(2)));
    assert_eq!(text, "in the call");
    assert_eq!(service.ready().await.unwrap().call(3).await, Ok(3));
    drop(future);
    assert_eq!(script.count(Fate::Panicked), 2);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn held_calls_end_when_they_are_released() {
    let (service, script) = Script::<u32, u32, &str>::new()
        .otherwise(|n| Step::ok(*n).held())
        .build();
    let mut calls: Vec<_> = (0..3)
        .map(|n| task::spawn(service.clone().oneshot(n)))
        .collect();
    for call in &mut calls {
        assert_pending!(call.poll());
    }
    assert_eq!((script.in_flight(), script.peak_in_flight()), (3, 3));
    script.release(1);
    assert!(!calls[0].is_woken());
    assert!(calls[1].is_woken());
    assert_ready_eq!(calls[1].poll(), Ok(1));
    script.release_all();
    assert_ready_eq!(calls[0].poll(), Ok(0));
    assert_ready_eq!(calls[2].poll(), Ok(2));
    assert_eq!((script.in_flight(), script.peak_in_flight()), (0, 3));
    assert_eq!(
        panic_of(|| script.release(9)),
        "call 9 was to be released, and 3 have come"
    );
}

#[tokio::test(start_paused = true)]
async fn calls_can_be_waited_for() {
    let (service, script) = echo().build();
    let mut two = task::spawn(script.wait_for_calls(2));
    assert_pending!(two.poll());
    service.clone().oneshot(1).await.unwrap();
    assert_pending!(two.poll());
    service.oneshot(2).await.unwrap();
    assert!(two.is_woken());
    tokio_test::assert_ready!(two.poll());
    script.wait_for_calls(0).await;
}

#[tokio::test(start_paused = true)]
#[should_panic(expected = "2 calls were waited for, and 1 have come")]
async fn what_never_comes_is_not_waited_for() {
    let (service, script) = echo().build();
    let late = tokio::spawn(async {
        sleep(3600 * SECOND).await;
        service.oneshot(1).await
    });
    script.wait_for_calls(1).await;
    late.await.unwrap().unwrap();
    script.wait_for_calls(2).await;
}

#[tokio::test]
async fn readiness_comes_and_goes_and_promises_are_kept() {
    let (service, script) = echo().unready().build();
    let (mut first, mut second) = (service.clone(), service);
    {
        let mut ready = task::spawn(poll_fn(|cx| first.poll_ready(cx)));
        assert_pending!(ready.poll());
        assert_pending!(ready.poll());
        script.set_ready();
        assert!(ready.is_woken());
        assert_ready_ok!(ready.poll());
    }
    assert_eq!(script.reserved(), 1);
    script.set_unready();
    let mut ready = task::spawn(poll_fn(|cx| second.poll_ready(cx)));
    assert_pending!(ready.poll());
    assert_eq!(first.call(1).await, Ok(1));
    assert_eq!(script.reserved(), 0);

    script.fail_readiness("gone");
    assert!(ready.is_woken());
    assert_eq!(assert_ready_err!(ready.poll()), "gone");
    assert_pending!(ready.poll());
}

#[tokio::test(start_paused = true)]
async fn each_instance_takes_its_time_to_get_ready() {
    let (mut service, script) = echo().ready_after(SECOND).build();
    for _ in 0..2 {
        let (took, ready) = elapsed(service.ready()).await;
        assert_eq!(took, SECOND);
        ready.unwrap().call(1).await.unwrap();
    }
    let (took, _) = elapsed(service.clone().ready()).await;
    assert_eq!(took, SECOND);
    script.assert_finished();
}

#[tokio::test]
async fn a_call_that_was_not_promised_panics_and_is_kept() {
    let (service, script) = echo().build();
    let text = panic_of(|| drop(service.clone().call(1)));
    assert!(text.contains("not polled ready"), "{text}");

    // Ready counts once.
    let mut once = service.clone();
    once.ready().await.unwrap().call(1).await.unwrap();
    panic_of(|| drop(once.call(2)));

    // And a clone of what is ready is not.
    let mut ready = service;
    ready.ready().await.unwrap();
    panic_of(|| drop(ready.clone().call(3)));
    ready.call(4).await.unwrap();

    assert_eq!(script.call_count(), 2);
    let text = panic_of(|| script.assert_finished());
    assert_eq!(text.lines().count(), 3, "{text}");
}

#[tokio::test]
async fn an_unfinished_script_is_told() {
    let (service, script) = Script::<u32, u32, &str>::new()
        .then(Step::ok(1).held())
        .then(Step::ok(2))
        .build();
    assert!(panic_of(|| script.assert_finished()).contains("not used"));
    let mut service = service;
    let held = service.ready().await.unwrap().call(1);
    service.ready().await.unwrap().call(2).await.unwrap();
    assert!(panic_of(|| script.assert_finished()).contains("in flight"));
    drop(held);
    script.assert_finished();
    service.ready().await.unwrap();
    assert!(panic_of(|| script.assert_finished()).contains("never called"));
    assert!(panic_of(|| drop(service.call(3))).contains("come to its end"));
    script.push(Step::ok(4));
    assert_eq!(service.oneshot(4).await, Ok(4));
}

#[test]
fn they_are_what_stacks_ask_for() {
    fn sound<T: Clone + Send + Sync + std::fmt::Debug + 'static>() {}
    sound::<Scripted<u32, u32, Infallible>>();
    sound::<ScriptHandle<u32, u32, Infallible>>();
    fn sends<T: Send + 'static>() {}
    sends::<ScriptedFuture<u32, u32, Infallible>>();
}

// The probe.

#[derive(Clone)]
struct Bad<S> {
    inner: S,
    how: How,
    spare: Option<S>,
}

#[derive(Clone, Copy)]
enum How {
    /// Calls a clone that was never polled.
    CallsTheClone,
    /// The same, and before there is a future.
    CallsTheCloneAtOnce,
    /// Says that it is ready, whatever the inner service says.
    NeverAsks,
    /// Forgets that the inner service was pending, and wakes nobody.
    Sleeps,
    /// Looks again a few times, and then sleeps.
    DozesOff(u8),
    /// Keeps in mind that it was ready, and its clones do so, too.
    Remembers(bool),
    /// Gets a second instance ready, and keeps it.
    Hoards,
    /// Lets the call go on in a task of its own, whoever has left.
    Detaches,
    /// Does all that it should.
    Behaves,
}

impl<S> Service<u32> for Bad<S>
where
    S: Service<u32> + Clone + Send + 'static,
    S::Response: Send,
    S::Error: Send + std::fmt::Debug,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        match self.how {
            How::NeverAsks => Poll::Ready(Ok(())),
            How::Sleeps => {
                let mut unheard = Context::from_waker(std::task::Waker::noop());
                self.inner.poll_ready(&mut unheard)
            }
            How::DozesOff(looks) => {
                let mut unheard = Context::from_waker(std::task::Waker::noop());
                let poll = self.inner.poll_ready(&mut unheard);
                if poll.is_pending() && looks > 0 {
                    self.how = How::DozesOff(looks - 1);
                    cx.waker().wake_by_ref();
                }
                poll
            }
            How::Remembers(true) => Poll::Ready(Ok(())),
            How::Remembers(false) => {
                std::task::ready!(self.inner.poll_ready(cx))?;
                self.how = How::Remembers(true);
                Poll::Ready(Ok(()))
            }
            How::Hoards => {
                if self.spare.is_none() {
                    self.spare = Some(self.inner.clone());
                }
                let spare = self.spare.as_mut().unwrap();
                std::task::ready!(spare.poll_ready(cx))?;
                self.inner.poll_ready(cx)
            }
            _ => self.inner.poll_ready(cx),
        }
    }

    fn call(&mut self, request: u32) -> Self::Future {
        match self.how {
            How::CallsTheClone => {
                let mut clone = self.inner.clone();
                Box::pin(async move { clone.call(request).await })
            }
            How::CallsTheCloneAtOnce => Box::pin(self.inner.clone().call(request)),
            How::Remembers(_) => {
                self.how = How::Remembers(false);
                Box::pin(self.inner.call(request))
            }
            How::Detaches => {
                let task = tokio::spawn(self.inner.call(request));
                Box::pin(async move { task.await.unwrap() })
            }
            _ => {
                let fresh = self.inner.clone();
                let mut ready = std::mem::replace(&mut self.inner, fresh);
                Box::pin(async move { ready.call(request).await })
            }
        }
    }
}

fn bad(how: How) -> impl Layer<Echo, Service = Bad<Echo>> + Send + Sync + 'static {
    layer_fn(move |inner| Bad {
        inner,
        how,
        spare: None,
    })
}

#[tokio::test(start_paused = true)]
async fn the_probe_finds_out_bad_layers() {
    for (how, expected) in [
        (How::CallsTheClone, "not polled ready"),
        (How::CallsTheCloneAtOnce, "not polled ready"),
        (How::NeverAsks, "not polled ready"),
        (How::Sleeps, "never came"),
        (How::Remembers(false), "not polled ready"),
        (How::DozesOff(5), "nothing woke its task"),
        (How::Hoards, "polled ready and not called"),
        (How::Detaches, "still in flight"),
    ] {
        let text = complaint(probe(), bad(how)).await;
        assert!(text.contains(expected), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_probe_hears_of_panics_that_a_task_swallowed() {
    // Behind a Buffer the panic kills the worker, and callers are told that it
    // is closed: no error that a layer's test would look at.
    let buffered = layer_fn(|inner: Echo| {
        ServiceBuilder::new()
            .layer(BufferLayer::new(4))
            .layer(bad(How::CallsTheCloneAtOnce))
            .service(inner)
    });
    let text = complaint(probe(), buffered).await;
    assert!(text.contains("not polled ready"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn the_probe_passes_good_layers() {
    probe().check(&bad(How::Behaves)).await;
    probe().check(&ConcurrencyLimitLayer::new(1)).await;
    probe().check(&layer_fn(|inner: Echo| inner)).await;
    let whole = ServiceBuilder::new()
        .load_shed()
        .concurrency_limit(1)
        .timeout(SECOND)
        .into_inner();
    probe().check(&whole).await;
    let buffered = layer_fn(|inner: Echo| BufferLayer::new(4).layer(inner));
    probe().check(&buffered).await;
}

#[tokio::test(start_paused = true)]
async fn the_probe_bears_refusals_and_slow_answers() {
    let slow = ReadinessProbe::new(|| 7, |_: &u32| Step::<u32, &str>::err("no").after(SECOND));
    slow.check(&ConcurrencyLimitLayer::new(1)).await;

    let never = ReadinessProbe::new(|| 7, |_: &u32| Step::<u32, &str>::hang());
    let text = complaint(never, ConcurrencyLimitLayer::new(1)).await;
    assert_eq!(text, "the answer to a call in a row never came");
}

#[cfg(feature = "tower")]
#[tokio::test(start_paused = true)]
async fn our_own_adapter_passes() {
    use crate::tower_errors::RefuseErrorsLayer;

    let probe = ReadinessProbe::new(
        || web::get("/"),
        |_| Step::<_, Infallible>::ok(web::response(200, "")),
    );
    probe.check(&RefuseErrorsLayer::new()).await;
    probe.check(&RefuseErrorsLayer::new().catch_all()).await;

    // What failed to get ready is done with: never polled or called again.
    let (inner, script) = Script::<_, _, &str>::new()
        .otherwise(|_| Step::ok(web::response(200, "")))
        .build();
    let mut service = RefuseErrorsLayer::new().catch_all().layer(inner);
    script.fail_readiness("down");
    for _ in 0..2 {
        let service = service.ready().await.unwrap();
        assert_eq!(service.call(web::get("/")).await.unwrap().status(), 500);
    }
    assert_eq!((script.ready_polls(), script.call_count()), (1, 0));
}

// Time.

#[tokio::test(start_paused = true)]
async fn advancing_stops_at_every_timer_on_the_way() {
    let start = Instant::now();
    let ticks = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&ticks);
    let ticker = tokio::spawn(async move {
        let mut interval = interval(SECOND);
        loop {
            interval.tick().await;
            seen.lock().unwrap().push(start.elapsed().as_secs());
        }
    });
    advance(3 * SECOND).await;
    assert_eq!(*ticks.lock().unwrap(), [0, 1, 2, 3]);
    assert_eq!(start.elapsed(), 3 * SECOND);
    ticker.abort();
}

#[tokio::test(start_paused = true)]
async fn advancing_is_exact_to_the_nanosecond() {
    let start = Instant::now();
    let mut sum = Duration::ZERO;
    for nanos in [
        1,
        999,
        1_000_000,
        1_000_001,
        1_999_999,
        2_500_000,
        7,
        123_456_789,
    ] {
        let span = Duration::from_nanos(nanos);
        advance(span).await;
        sum += span;
        assert_eq!(start.elapsed(), sum);
    }
    for step in 0..200 {
        let span = Duration::from_nanos(step * 137_137);
        advance(span).await;
        sum += span;
        assert_eq!(start.elapsed(), sum);
    }
    advance(Duration::ZERO).await;
    assert_eq!(start.elapsed(), sum);
}

#[tokio::test(start_paused = true)]
async fn settling_runs_the_others_and_moves_no_clock() {
    let start = Instant::now();
    let sleeper = tokio::spawn(sleep(SECOND));
    let chain = (0..20).fold(tokio::spawn(async {}), |before, _| {
        tokio::spawn(async move { before.await.unwrap() })
    });
    settle().await;
    assert!(chain.is_finished());
    assert!(!sleeper.is_finished());
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test]
#[should_panic(expected = "time is not frozen")]
async fn a_running_clock_cannot_be_advanced() {
    advance(3600 * SECOND).await;
}

// HTTP.

#[tokio::test]
async fn requests_and_responses_are_what_they_say() {
    let request = web::get("/a?b=c");
    assert_eq!(
        (request.method().as_str(), request.uri().path()),
        ("GET", "/a")
    );
    let request = web::post("https://example.com/", "body");
    assert_eq!(
        (request.method().as_str(), request.uri().host()),
        ("POST", Some("example.com"))
    );
    assert!(crate::Head::from(&web::grpc("/pkg.Service/Method")).is_grpc());
    let response = web::response(429, "slow down");
    assert_eq!(response.status(), 429);
    assert_eq!(web::text(response).await, "slow down");
    assert!(panic_of(|| drop(web::get("\0"))).contains("no request target"));
    assert_eq!(panic_of(|| drop(web::response(42, ""))), "42 is no status");
}

#[tokio::test(start_paused = true)]
async fn bodies_follow_their_script_and_tell_their_end() {
    use http_body_util::BodyExt;
    use web::{BodyFate, ScriptedBody};

    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    let body = ScriptedBody::new().data("data").trailers(trailers.clone());
    let watch = body.watch();
    let whole = body.collect().await.unwrap();
    assert_eq!(whole.trailers(), Some(&trailers));
    assert_eq!(whole.to_bytes(), "data");
    assert_eq!(watch.fate(), BodyFate::Complete);

    let mut body = ScriptedBody::new().data("half").fail("broken").data("no");
    let watch = body.watch();
    assert!(body.frame().await.unwrap().is_ok());
    assert_eq!(watch.fate(), BodyFate::Open);
    let error = body.frame().await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "broken");
    assert!(body.frame().await.is_none());
    drop(body);
    assert_eq!(watch.fate(), BodyFate::Failed);

    let mut body = ScriptedBody::new().wait(SECOND).data("late").hang();
    let watch = body.watch();
    let (took, frame) = elapsed(body.frame()).await;
    assert_eq!((took, frame.unwrap().unwrap().is_data()), (SECOND, true));
    for _ in 0..2 {
        assert!(timeout(SECOND, body.frame()).await.is_err());
    }
    assert_eq!(watch.fate(), BodyFate::Open);
    drop(body);
    assert_eq!(watch.fate(), BodyFate::Dropped);
}
