//! A second attempt while the first is under way.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use buttress_core::{
    Any,
    classify::Verdict,
    clock,
    deadline::Deadline,
    testing::{
        Fate, ReadinessProbe, Script, ScriptHandle, Scripted, Step, advance, elapsed, settle,
        web::{ScriptedBody, get, grpc, post, response, text},
    },
};
use buttress_retry::{
    Adaptive, Budget, Hedge, HedgeLayer, Opaque, Plain, ReplayBody, RetryBudget, SharedBudget,
    hedge::{HedgeBuilder, OverAny, OverHttp},
};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimitLayer, service_fn};

const MS: Duration = Duration::from_millis(1);

type Fails = io::ErrorKind;

fn any() -> HedgeBuilder<Any<u32>, OverAny<u32, buttress_retry::AnyError<Opaque>>> {
    HedgeLayer::any().after(50 * MS).opaque_errors()
}

fn script() -> Script<u32, &'static str, Fails> {
    Script::new()
}

type Whole = Full<Bytes>;
type WebScript = Script<Request<ReplayBody<Whole>>, Response<Whole>, Fails>;

fn web() -> HedgeBuilder<buttress_core::Http, OverHttp<Opaque>> {
    HedgeLayer::builder().after(50 * MS).opaque_errors()
}

/// Notes what it is told, and gives leave so often.
#[derive(Debug, Default)]
struct Noted {
    leave: AtomicU32,
    requests: AtomicU32,
    asked: AtomicU32,
    good: AtomicU32,
    bad: AtomicU32,
}

impl Noted {
    fn new(leave: u32) -> Arc<Self> {
        let leave = AtomicU32::new(leave);
        Arc::new(Self {
            leave,
            ..Self::default()
        })
    }

    fn seen(&self) -> [u32; 4] {
        [&self.requests, &self.asked, &self.good, &self.bad].map(|count| count.load(Relaxed))
    }
}

impl Budget for Noted {
    fn request(&self) {
        self.requests.fetch_add(1, Relaxed);
    }

    fn withdraw(&self) -> bool {
        self.asked.fetch_add(1, Relaxed);
        let take = |leave: u32| leave.checked_sub(1);
        self.leave.fetch_update(Relaxed, Relaxed, take).is_ok()
    }

    fn outcome(&self, verdict: Verdict) {
        match verdict {
            Verdict::Success => self.good.fetch_add(1, Relaxed),
            _ => self.bad.fetch_add(1, Relaxed),
        };
    }
}

fn fates<Req, Res, Err>(script: &ScriptHandle<Req, Res, Err>) -> Vec<Fate> {
    script.calls().iter().map(|call| call.fate).collect()
}

#[tokio::test(start_paused = true)]
async fn the_second_is_faster_and_the_first_dropped_that_instant() {
    let (inner, script) = script()
        .then(Step::ok("first").after(1000 * MS))
        .then(Step::ok("second").after(20 * MS))
        .build();
    let mut service = any().build().unwrap().layer(inner);
    let mut answer = pin!(service.ready().await.unwrap().call(1));
    let (took, answered) = elapsed(answer.as_mut()).await;
    assert_eq!((took, answered), (70 * MS, Ok("second")));
    // The future is still held.
    assert_eq!(script.arrivals(), [Duration::ZERO, 50 * MS]);
    assert_eq!(fates(&script), [Fate::Dropped, Fate::Answered]);
    assert_eq!(script.requests(), [1, 1]);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn the_first_is_faster_after_all() {
    let (inner, script) = script()
        .then(Step::ok("first").after(60 * MS))
        .then(Step::ok("second").after(20 * MS))
        .build();
    let mut service = any().build().unwrap().layer(inner);
    let mut answer = pin!(service.ready().await.unwrap().call(1));
    let (took, answered) = elapsed(answer.as_mut()).await;
    assert_eq!((took, answered), (60 * MS, Ok("first")));
    assert_eq!(fates(&script), [Fate::Answered, Fate::Dropped]);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_fast_first_has_no_hedge() {
    let (inner, script) = script().then(Step::ok("first").after(49 * MS)).build();
    let service = any().build().unwrap().layer(inner);
    let (took, answered) = elapsed(service.oneshot(1)).await;
    assert_eq!((took, answered), (49 * MS, Ok("first")));
    advance(100 * MS).await;
    script.assert_finished();
}

/// Outside of a runtime a timer would panic.
#[test]
fn an_answer_at_once_has_no_timer_and_costs_no_allocation() {
    let layer = any().budget(Noted::new(1)).build().unwrap();
    let mut service = layer.layer(service_fn(|n: u32| {
        std::future::ready(Ok::<_, Fails>(n + 1))
    }));
    let mut ask = || {
        let answer = pin!(service.call(1));
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(answer.poll(&mut cx), Poll::Ready(Ok(2)));
    };
    ask();
    assert_eq!(allocation_counter::measure(ask).count_total, 0);
}

#[tokio::test(start_paused = true)]
async fn each_hedge_comes_after_the_delay_again() {
    let (inner, script) = script()
        .then(Step::hang())
        .then(Step::hang())
        .then(Step::hang())
        .then(Step::ok("fourth").after(300 * MS))
        .build();
    let service = any().max_hedges(3).build().unwrap().layer(inner);
    let (took, answered) = elapsed(service.oneshot(1)).await;
    assert_eq!((took, answered), (450 * MS, Ok("fourth")));
    assert_eq!(script.arrivals(), [0, 50, 100, 150].map(|ms| ms * MS));
    assert_eq!(script.count(Fate::Dropped), 3);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn without_delay_both_are_sent_together() {
    let (inner, script) = script()
        .then(Step::hang())
        .then(Step::ok("second").after(7 * MS))
        .build();
    let layer = any().after(Duration::ZERO).build().unwrap();
    let (took, answered) = elapsed(layer.layer(inner).oneshot(1)).await;
    assert_eq!((took, answered), (7 * MS, Ok("second")));
    assert_eq!(script.arrivals(), [Duration::ZERO; 2]);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_bad_answer_waits_for_the_other() {
    let bad = || Step::err(Fails::TimedOut);
    let good = || Step::ok("good");
    for (first, second, until) in [
        (bad().after(60 * MS), good().after(100 * MS), 150),
        (good().after(200 * MS), bad().after(30 * MS), 200),
    ] {
        let (inner, script) = script().then(first).then(second).build();
        let service = any().build().unwrap().layer(inner);
        let (took, answered) = elapsed(service.oneshot(1)).await;
        assert_eq!((took, answered), (until * MS, Ok("good")));
        assert_eq!(script.count(Fate::Failed), 1);
        script.assert_finished();
    }
}

#[tokio::test(start_paused = true)]
async fn a_bad_answer_before_the_delay_is_handed_on_at_once() {
    let (inner, script) = script()
        .then(Step::err(Fails::TimedOut).after(10 * MS))
        .build();
    let service = any().build().unwrap().layer(inner);
    let (took, answered) = elapsed(service.oneshot(1)).await;
    assert_eq!((took, answered), (10 * MS, Err(Fails::TimedOut)));
    advance(100 * MS).await;
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn of_two_bad_answers_the_last_is_handed_on() {
    let (inner, script) = script()
        .then(Step::err(Fails::TimedOut).after(60 * MS))
        .then(Step::err(Fails::NotFound).after(100 * MS))
        .build();
    let service = any().build().unwrap().layer(inner);
    let (took, answered) = elapsed(service.oneshot(1)).await;
    assert_eq!((took, answered), (150 * MS, Err(Fails::NotFound)));
    script.assert_finished();
}

/// A clone that is not ready, a body that is not through or has failed, a
/// deadline that is past: leave for what cannot be sent would be wasted.
#[tokio::test(start_paused = true)]
async fn the_budget_is_asked_when_there_is_nothing_else_in_the_way() {
    let budget = Noted::new(9);
    let (inner, script) = script()
        .ready_after(30 * MS)
        .then(Step::ok("first").after(70 * MS))
        .build();
    let layer = any().budget(Arc::clone(&budget)).build().unwrap();
    let mut service = layer.layer(inner);
    let answer = service.ready().await.unwrap().call(1);
    assert_eq!(answer.await, Ok("first"));
    script.assert_finished();
    let web = || HedgeLayer::builder().after(50 * MS).hedge_always();
    for body in [
        ScriptedBody::new().data("held").hang(),
        ScriptedBody::new().data("broken").fail("no more"),
    ] {
        let layer = web().budget(Arc::clone(&budget)).build().unwrap();
        let service = layer.layer(service_fn(
            async |request: Request<ReplayBody<ScriptedBody>>| {
                let read = tokio::time::timeout(1000 * MS, request.into_body().collect()).await;
                tokio::time::sleep(1000 * MS).await;
                Ok::<_, Infallible>(Response::new(read.is_ok()))
            },
        ));
        let answered = service.oneshot(Request::post("/").body(body).unwrap());
        assert_eq!(answered.await.unwrap().status(), 200);
    }
    let (inner, script) = WebScript::new()
        .then(Step::ok(response(200, "")).after(100 * MS))
        .build();
    let layer = self::web().budget(Arc::clone(&budget)).build().unwrap();
    let answered = layer.layer(inner).oneshot(late(get("/"))).await;
    assert_eq!(answered.unwrap().status(), 200);
    script.assert_finished();
    assert_eq!(budget.seen(), [4, 0, 4, 0]);
}

fn told(status: u16, field: &'static str, value: &'static str) -> Response<Whole> {
    let mut response = response(status, "");
    let value = http::HeaderValue::from_static(value);
    response.headers_mut().insert(field, value);
    response
}

#[tokio::test(start_paused = true)]
async fn who_was_told_to_come_later_sends_no_further_hedge() {
    for (request, bad) in [
        (get("/"), told(503, "retry-after", "5")),
        (grpc("/service/method"), {
            let mut bad = told(200, "grpc-retry-pushback-ms", "7000");
            bad.headers_mut()
                .insert("grpc-status", http::HeaderValue::from_static("14"));
            bad
        }),
    ] {
        let name = bad.headers().keys().next().unwrap().clone();
        let (inner, script) = WebScript::new()
            .then(Step::ok(bad).after(70 * MS))
            .then(Step::ok(response(503, "")).after(200 * MS))
            .build();
        let service = web()
            .hedge_always()
            .max_hedges(5)
            .build()
            .unwrap()
            .layer(inner);
        let (took, answered) = elapsed(service.oneshot(request)).await;
        assert_eq!(took, 250 * MS);
        // What it said is kept, for a retry further out.
        assert!(answered.unwrap().headers().contains_key(name));
        assert_eq!(script.arrivals(), [Duration::ZERO, 50 * MS]);
        script.assert_finished();
    }
}

/// Of two that were told something the later is handed on: it knows better.
#[tokio::test(start_paused = true)]
async fn the_last_to_be_told_something_is_handed_on() {
    for (first, second, expected) in [
        ((70, Some("5")), (90, None), Some("5")),
        ((70, Some("5")), (90, Some("7")), Some("7")),
        ((200, Some("5")), (90, Some("7")), Some("5")),
        ((200, None), (90, Some("7")), Some("7")),
        ((200, Some("5")), (90, None), Some("5")),
    ] {
        let step = |(after, later): (u32, _)| {
            let bad = match later {
                Some(later) => told(503, "retry-after", later),
                None => response(503, ""),
            };
            Step::ok(bad).after(after * MS)
        };
        let (inner, script) = WebScript::new()
            .then(step(first))
            .then(step(second))
            .build();
        let service = web().build().unwrap().layer(inner);
        let answered = service.oneshot(get("/")).await.unwrap();
        let later = answered.headers().get("retry-after");
        assert_eq!(later.map(|later| later.to_str().unwrap()), expected);
        script.assert_finished();
    }
}

#[tokio::test(start_paused = true)]
async fn a_bad_answer_that_told_nothing_stops_no_hedge() {
    let (inner, script) = WebScript::new()
        .then(Step::ok(response(503, "")).after(70 * MS))
        .then(Step::hang())
        .then(Step::ok(response(200, "")).after(5 * MS))
        .build();
    let service = web().max_hedges(2).build().unwrap().layer(inner);
    let (took, answered) = elapsed(service.oneshot(get("/"))).await;
    assert_eq!(took, 105 * MS);
    assert_eq!(answered.unwrap().status(), 200);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn an_empty_budget_allows_no_hedge() {
    let budget = Noted::new(0);
    let (inner, script) = script().then(Step::ok("first").after(200 * MS)).build();
    let layer = any().max_hedges(3).budget(Arc::clone(&budget));
    let service = layer.build().unwrap().layer(inner);
    let (took, answered) = elapsed(service.oneshot(1)).await;
    assert_eq!((took, answered), (200 * MS, Ok("first")));
    // Asked once, and not again.
    assert_eq!(budget.seen(), [1, 1, 1, 0]);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_budget_bounds_the_hedges_of_a_callee_that_is_ill() {
    let started = clock::now();
    let budget = RetryBudget::new(10, 1).unwrap();
    let layer = any().budget(budget).build().unwrap();
    let (inner, script) = script()
        .otherwise(|_| Step::ok("late").after(400 * MS))
        .build();
    let mut answers = tokio::task::JoinSet::new();
    for n in 0..100 {
        answers.spawn(layer.layer(inner.clone()).oneshot(n));
    }
    while let Some(answer) = answers.join_next().await {
        assert_eq!(answer.unwrap(), Ok("late"));
    }
    let seconds = (clock::now() - started).as_secs_f64().ceil() as usize;
    let hedges = script.call_count() - 100;
    assert!((10..=10 + seconds).contains(&hedges), "{hedges}");
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn each_request_and_each_outcome_is_counted_once() {
    let steps = |script: Script<u32, &'static str, Fails>| {
        script
            .then(Step::err(Fails::TimedOut).after(60 * MS))
            .then(Step::ok("second").after(90 * MS))
            .then(Step::ok("third"))
            .then(Step::err(Fails::TimedOut))
            .then(Step::hang())
            .then(Step::ok("sixth"))
    };
    let own = Noted::new(9);
    let outside = Noted::new(9);
    for (layer, budget, expected) in [
        (any().budget(Arc::clone(&own)), &own, [4, 2, 3, 2]),
        (
            any().budget_of_retry(SharedBudget::new(Arc::clone(&outside))),
            &outside,
            [0, 2, 0, 1],
        ),
    ] {
        let (inner, script) = steps(script()).build();
        let layer = layer.build().unwrap();
        for n in 0..4 {
            let _ = layer.layer(inner.clone()).oneshot(n).await;
        }
        assert_eq!(budget.seen(), expected);
        script.assert_finished();
    }
}

/// What has no outcome is not counted: to the adaptive throttle it would be a
/// request that was not accepted.
#[tokio::test(start_paused = true)]
async fn what_is_never_hedged_is_nothing_to_the_budget() {
    let adaptive = Arc::new(Adaptive::default());
    let layer = web().budget(Arc::clone(&adaptive)).build().unwrap();
    let service = layer.layer(service_fn(async |_: Request<ReplayBody<Full<Bytes>>>| {
        Ok::<_, Infallible>(buttress_core::testing::web::response(200, ""))
    }));
    for _ in 0..90 {
        service.clone().oneshot(post("/", "")).await.unwrap();
    }
    for _ in 0..10 {
        service.clone().oneshot(get("/")).await.unwrap();
    }
    assert!(adaptive.refusal_probability().abs() < f64::EPSILON);
}

#[tokio::test(start_paused = true)]
async fn only_what_may_be_sent_twice_is_hedged() {
    let keyed = || {
        let mut request = post("/", "");
        let key = http::HeaderValue::from_static("8e03978e-40d5-43dd-bc93-6894a57f9324");
        request.headers_mut().insert("idempotency-key", key);
        request
    };
    let body = |of: &str| post("/", of.to_owned());
    let posts = || web().methods([Method::POST]);
    for (layer, request, hedged) in [
        (web(), get("/"), true),
        (web(), body(""), false),
        (web(), keyed(), true),
        // Nobody can tell whether the method is idempotent.
        (web(), grpc("/service/method"), false),
        (posts(), grpc("/service/method"), true),
        (web().hedge_always(), body(""), true),
        (posts(), body(""), true),
        (posts(), get("/"), false),
        (web().hedge_if(|head| head.uri == "/yes"), get("/no"), false),
        (
            web().hedge_if(|head| head.uri == "/yes"),
            post("/yes", ""),
            true,
        ),
        // Its body is held by the first attempt, which never reads it.
        (posts(), body("held"), false),
        // It would be, but for the deadline.
        (web(), late(get("/")), false),
    ] {
        let (inner, script) = WebScript::new()
            .then(Step::ok(response(200, "")).after(600 * MS))
            .otherwise(|_| Step::ok(response(201, "")))
            .build();
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let service = layer.build().unwrap().layer(inner);
        let (took, answered) = elapsed(service.oneshot(request)).await;
        let until = if hedged { 50 } else { 600 };
        assert_eq!(took, until * MS, "{method} {uri}");
        assert_eq!(answered.unwrap().status(), if hedged { 201 } else { 200 });
        script.assert_finished();
    }
}

fn late(mut request: Request<Whole>) -> Request<Whole> {
    Deadline::after(50 * MS).attach(request.extensions_mut());
    request
}

#[tokio::test(start_paused = true)]
async fn a_closure_says_which_are_hedged_and_what_is_bad() {
    let (inner, script) = script()
        .then(Step::ok("slow").after(100 * MS))
        .then(Step::ok("empty").after(60 * MS))
        .then(Step::ok("full").after(30 * MS))
        .build();
    let layer = any()
        .hedge_if(|n| *n > 5)
        .bad_if(|_: &u32, result: Result<&&str, &Fails>| result.is_ok_and(|of| *of == "empty"))
        .build()
        .unwrap();
    let (took, answered) = elapsed(layer.layer(inner.clone()).oneshot(5)).await;
    assert_eq!((took, answered), (100 * MS, Ok("slow")));
    let (took, answered) = elapsed(layer.layer(inner).oneshot(6)).await;
    assert_eq!((took, answered), (80 * MS, Ok("full")));
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn which_answers_are_bad_over_http() {
    let steps = |first: Step<Response<Whole>, Fails>| {
        let second = Step::ok(response(200, "")).after(100 * MS);
        WebScript::new().then(first.after(60 * MS)).then(second)
    };
    let gone = || web().statuses([StatusCode::GONE]);
    let stands = || {
        web().bad_if(|_, outcome| {
            matches!(outcome, buttress_retry::Outcome::Error(_)).then_some(false)
        })
    };
    for (layer, first, bad) in [
        (web(), Step::ok(response(503, "")), true),
        (web(), Step::ok(response(404, "")), false),
        (web(), Step::err(Fails::InvalidData), true),
        (gone(), Step::ok(response(410, "")), true),
        (gone(), Step::ok(response(503, "")), false),
        (
            gone().bad_if(|_, _| None),
            Step::err(Fails::InvalidData),
            true,
        ),
        (stands(), Step::err(Fails::InvalidData), false),
        (stands(), Step::ok(response(503, "")), true),
        (
            web().bad_if(|_, _| Some(true)),
            Step::ok(response(404, "")),
            true,
        ),
    ] {
        let (inner, script) = steps(first).build();
        let service = layer.build().unwrap().layer(inner);
        let (took, _) = elapsed(service.oneshot(get("/"))).await;
        assert_eq!(took, if bad { 150 * MS } else { 60 * MS });
        script.assert_finished();
    }
}

type Read = Arc<Mutex<Vec<Bytes>>>;

/// Reads the whole request, and answers the n-th after so long.
fn echo<B>(
    waits: impl IntoIterator<Item = Duration>,
) -> (
    impl Service<Request<ReplayBody<B>>, Response = Response<Whole>, Error = Infallible, Future: Send>
    + Clone,
    Read,
)
where
    B: http_body::Body<Error: std::fmt::Debug + Send> + Send + 'static,
{
    let waits: Vec<_> = waits.into_iter().collect();
    let waits = Arc::new(Mutex::new(waits.into_iter()));
    let read = Arc::new(Mutex::new(Vec::new()));
    let service = service_fn({
        let read = Arc::clone(&read);
        move |request: Request<ReplayBody<B>>| {
            let wait = waits.lock().unwrap().next().expect("one more attempt");
            let read = Arc::clone(&read);
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                read.lock().unwrap().push(body.clone());
                tokio::time::sleep(wait).await;
                Ok(Response::new(Full::new(body)))
            }
        }
    });
    (service, read)
}

#[tokio::test(start_paused = true)]
async fn the_hedge_gets_the_whole_body() {
    let (inner, read) = echo([1000 * MS, 10 * MS]);
    let layer = HedgeLayer::builder().after(50 * MS).hedge_always();
    let layer = layer.build().unwrap();
    let body = ScriptedBody::new()
        .data("hello ")
        .wait(20 * MS)
        .data("world");
    let request = Request::post("/").body(body).unwrap();
    let (took, answered) = elapsed(layer.layer(inner).oneshot(request)).await;
    assert_eq!(took, 60 * MS);
    assert_eq!(text(answered.unwrap()).await, "hello world");
    assert_eq!(*read.lock().unwrap(), ["hello world"; 2]);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_being_read_puts_the_hedge_off() {
    // Looked at after 50, 100, 150 and 200 ms.
    for (reads, hedge) in [(120, Some(150)), (180, Some(200)), (220, None)] {
        let (inner, read) = echo([1000 * MS, 10 * MS]);
        let hedges = Arc::new(AtomicU32::new(0));
        let layer = HedgeLayer::builder().after(50 * MS).hedge_always();
        let layer = layer
            .on_hedge({
                let hedges = Arc::clone(&hedges);
                move |_, _| {
                    hedges.fetch_add(1, Relaxed);
                }
            })
            .build()
            .unwrap();
        let body = ScriptedBody::new().wait(reads * MS).data("late");
        let request = Request::post("/").body(body).unwrap();
        let (took, _) = elapsed(layer.layer(inner).oneshot(request)).await;
        let until = hedge.map_or(reads + 1000, |hedge| hedge + 10);
        assert_eq!(took, until * MS);
        assert_eq!(hedges.load(Relaxed), u32::from(hedge.is_some()));
        assert_eq!(read.lock().unwrap().len(), 1 + usize::from(hedge.is_some()));
    }
}

/// Looked at at once, and after 1, 2 and 3 ms.
#[tokio::test(start_paused = true)]
async fn without_delay_a_body_is_looked_at_each_millisecond() {
    for (reads, hedge) in [(0, Some(0)), (2, Some(3)), (5, None)] {
        let (inner, read) = echo([1000 * MS, 10 * MS]);
        let layer = HedgeLayer::builder().after(Duration::ZERO).hedge_always();
        let service = layer.build().unwrap().layer(inner);
        let body = ScriptedBody::new().data("now").wait(reads * MS);
        let request = Request::post("/").body(body).unwrap();
        let (took, _) = elapsed(service.oneshot(request)).await;
        let until = hedge.map_or(reads + 1000, |hedge| hedge + 10);
        let took = took.as_millis();
        assert!(
            took.abs_diff(until.into()) <= 1,
            "{took} ms of a body of {reads} ms"
        );
        let attempts = 1 + usize::from(hedge.is_some());
        assert_eq!(*read.lock().unwrap(), vec!["now"; attempts]);
    }
}

/// A request that is sent once costs no memory while it streams.
#[tokio::test(start_paused = true)]
async fn what_is_not_hedged_is_not_remembered() {
    let memory = buttress_retry::Memory::new(1000);
    let layer = HedgeLayer::builder().after(50 * MS).memory(memory.clone());
    let layer = layer.build().unwrap();
    for (method, max_hedges, used) in [("PUT", 1, 5), ("POST", 1, 0), ("PUT", 0, 0)] {
        layer.policy().set_max_hedges(max_hedges).unwrap();
        let (inner, read) = echo([1000 * MS]);
        let body = ScriptedBody::new().data("hello").wait(100 * MS);
        let request = Request::builder().method(method).body(body).unwrap();
        let answer = tokio::spawn(layer.layer(inner).oneshot(request));
        advance(20 * MS).await;
        assert_eq!(memory.used(), used, "{method} {max_hedges}");
        answer.abort();
        settle().await;
        assert_eq!(memory.used(), 0);
        assert!(read.lock().unwrap().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_too_large_goes_once() {
    let (inner, read) = echo([500 * MS]);
    let layer = HedgeLayer::builder().after(50 * MS).max_body(3);
    let service = layer.build().unwrap().layer(inner);
    let request = Request::put("/")
        .body(Full::new(Bytes::from("four")))
        .unwrap();
    let (took, answered) = elapsed(service.oneshot(request)).await;
    assert_eq!(took, 500 * MS);
    assert_eq!(text(answered.unwrap()).await, "four");
    assert_eq!(*read.lock().unwrap(), ["four"]);
}

#[tokio::test(start_paused = true)]
async fn the_memory_of_a_body_is_free_when_there_is_no_further_hedge() {
    let memory = buttress_retry::Memory::new(1000);
    let (inner, _) = echo([1000 * MS, 900 * MS]);
    let layer = HedgeLayer::builder().after(50 * MS).memory(memory.clone());
    let mut service = layer.build().unwrap().layer(inner);
    let request = Request::put("/")
        .body(Full::new(Bytes::from("hello")))
        .unwrap();
    let answer = tokio::spawn(service.ready().await.unwrap().call(request));
    advance(49 * MS).await;
    assert_eq!(memory.used(), 5);
    advance(2 * MS).await;
    assert_eq!(memory.used(), 0);
    assert!(answer.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn the_header_tells_of_hedges_where_it_is_asked_for() {
    for (layer, outer, expected) in [
        (web(), None, [None, None, None]),
        (web().attempt_header(), None, [None, Some("1"), Some("2")]),
        (
            web().attempt_header(),
            Some("2"),
            [Some("2"), Some("3"), Some("4")],
        ),
        (
            web().attempt_header(),
            Some("x"),
            [Some("x"), Some("1"), Some("2")],
        ),
    ] {
        let (inner, script) = WebScript::new()
            .then(Step::hang())
            .then(Step::hang())
            .then(Step::ok(response(200, "")))
            .build();
        let mut request = get("/");
        if let Some(outer) = outer {
            let outer = http::HeaderValue::from_static(outer);
            request.headers_mut().insert("x-retry-attempt", outer);
        }
        let service = layer.max_hedges(2).build().unwrap().layer(inner);
        service.oneshot(request).await.unwrap();
        let sent = script.take_requests();
        let sent = sent.iter().map(|request| {
            let value = request.headers().get("x-retry-attempt");
            value.map(|value| value.to_str().unwrap())
        });
        assert_eq!(sent.collect::<Vec<_>>(), expected);
        script.assert_finished();
    }
}

#[tokio::test(start_paused = true)]
async fn listeners_hear_of_each_hedge() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let layer = any().max_hedges(2).on_hedge({
        let heard = Arc::clone(&heard);
        move |attempt, delay| heard.lock().unwrap().push((attempt, delay))
    });
    let (inner, script) = script()
        .then(Step::hang())
        .then(Step::hang())
        .then(Step::ok("third"))
        .build();
    let service = layer.build().unwrap().layer(inner);
    assert_eq!(service.oneshot(1).await, Ok("third"));
    assert_eq!(*heard.lock().unwrap(), [(2, 50 * MS), (3, 50 * MS)]);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_dropped_future_drops_both() {
    let (inner, script) = script().then(Step::hang()).then(Step::hang()).build();
    let mut service = any().build().unwrap().layer(inner);
    let answer = tokio::spawn(service.ready().await.unwrap().call(1));
    advance(60 * MS).await;
    assert_eq!(script.in_flight(), 2);
    answer.abort();
    settle().await;
    assert_eq!(fates(&script), [Fate::Dropped; 2]);
    advance(1000 * MS).await;
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn readiness_is_treated_as_it_should_be() {
    for after in [5, 5000] {
        ReadinessProbe::new(|| 1, |_: &u32| Step::<_, Fails>::ok("late").after(20 * MS))
            .check(&any().after(after * MS).build().unwrap())
            .await;
    }
    // Over HTTP, the request is another one further in.
    let (inner, script) = WebScript::new()
        .pending_first()
        .otherwise(|_| Step::ok(response(200, "")).after(20 * MS))
        .build();
    let mut service = web().after(5 * MS).build().unwrap().layer(inner);
    for _ in 0..3 {
        let answer = service.ready().await.unwrap().call(get("/"));
        assert_eq!(answer.await.unwrap().status(), 200);
    }
    assert_eq!(script.call_count(), 6);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_hedge_that_is_not_ready_holds_nothing_up() {
    // Every instance gets ready 30 ms after it is first asked.
    let (inner, script) = script()
        .ready_after(30 * MS)
        .then(Step::ok("first").after(70 * MS))
        .then(Step::ok("first").after(200 * MS))
        .then(Step::ok("second").after(10 * MS))
        .build();
    let mut service = any().build().unwrap().layer(inner);
    let answer = service.ready().await.unwrap().call(1);
    let (took, answered) = elapsed(answer).await;
    assert_eq!((took, answered), (70 * MS, Ok("first")));
    let answer = service.ready().await.unwrap().call(1);
    let (took, answered) = elapsed(answer).await;
    assert_eq!((took, answered), (90 * MS, Ok("second")));
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_limit_of_one_leaves_no_room_for_a_hedge() {
    let (inner, script) = script()
        .then(Step::ok("first").after(100 * MS))
        .then(Step::ok("next"))
        .build();
    let limited = ConcurrencyLimitLayer::new(1).layer(inner);
    let mut service = any().build().unwrap().layer(limited);
    let answer = service.ready().await.unwrap().call(1);
    let (took, answered) = elapsed(answer).await;
    assert_eq!((took, answered), (100 * MS, Ok("first")));
    // Its place in the queue is given back.
    assert_eq!(service.ready().await.unwrap().call(2).await, Ok("next"));
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_clone_that_fails_leaves_the_first_alone() {
    let (inner, script) = script()
        .ready_after(20 * MS)
        .then(Step::ok("first").after(100 * MS))
        .build();
    let mut service = any().max_hedges(2).build().unwrap().layer(inner);
    let answer = tokio::spawn(service.ready().await.unwrap().call(1));
    advance(40 * MS).await;
    script.fail_readiness(Fails::BrokenPipe);
    assert_eq!(answer.await.unwrap(), Ok("first"));
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn panics_pass_through() {
    for (first, second, at) in [
        (Step::panic("first").after(70 * MS), Step::hang(), 70),
        (Step::hang(), Step::panic("second").after(30 * MS), 80),
        (Step::hang(), Step::panic_in_call("second"), 50),
    ] {
        let (inner, script) = script().then(first).then(second).build();
        let service = any().build().unwrap().layer(inner);
        let (took, answer) = elapsed(tokio::spawn(service.oneshot(1))).await;
        assert_eq!(took, at * MS);
        assert!(answer.unwrap_err().is_panic());
        assert_eq!(script.count(Fate::Panicked), 1);
        script.assert_finished();
    }
}

#[tokio::test(start_paused = true)]
async fn the_delay_follows_what_was_seen() {
    let layer = any()
        .after_percentile(0.9, 10 * MS, 1000 * MS)
        .build()
        .unwrap();
    let (inner, script) = script().otherwise(|n| Step::ok("").after(*n * MS)).build();
    // 81 ms, 82 ms, …: nineteen say nothing yet.
    for n in 1..=20 {
        assert_eq!(layer.policy().delay(), 1000 * MS);
        assert!(layer.layer(inner.clone()).oneshot(80 + n).await.is_ok());
    }
    // The eighteenth of them, to a 32nd.
    let delay = layer.policy().delay();
    assert!((98 * MS..=102 * MS).contains(&delay), "{delay:?}");
    let calls = script.call_count();
    assert!(layer.layer(inner.clone()).oneshot(500).await.is_ok());
    assert_eq!(script.call_count() - calls, 2);
    let [first, second] = script.arrivals()[calls..] else {
        panic!("two attempts")
    };
    let waited = second - first;
    assert!((delay..delay + 2 * MS).contains(&waited), "{waited:?}");

    // Faster than the least, and forgotten after a minute.
    for _ in 0..1000 {
        assert!(layer.layer(inner.clone()).oneshot(1).await.is_ok());
    }
    assert_eq!(layer.policy().delay(), 10 * MS);
    advance(Duration::from_secs(61)).await;
    assert_eq!(layer.policy().delay(), 1000 * MS);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn bad_answers_and_what_may_not_be_hedged_tell_no_latency() {
    let layer = any()
        .hedge_if(|n| *n != 7)
        .after_percentile(0.5, MS, 1000 * MS)
        .build()
        .unwrap();
    let service = layer.layer(service_fn(|n: u32| async move {
        tokio::time::sleep(n * MS).await;
        if n == 3 { Err(Fails::TimedOut) } else { Ok(()) }
    }));
    for _ in 0..30 {
        assert!(service.clone().oneshot(3).await.is_err());
        assert!(service.clone().oneshot(7).await.is_ok());
    }
    assert_eq!(layer.policy().delay(), 1000 * MS);
    for _ in 0..30 {
        assert!(service.clone().oneshot(20).await.is_ok());
    }
    assert!((20 * MS..=21 * MS).contains(&layer.policy().delay()));
}

/// The slow ones lose to their hedges. If they did not count, the percentile
/// would be one of the fast, and sink until a fifth is hedged.
#[tokio::test(start_paused = true)]
async fn the_95th_percentile_hedges_a_twentieth_for_good() {
    let hedges = Arc::new(AtomicU64::new(0));
    let layer = any()
        .after_percentile(0.95, MS, 1000 * MS)
        .without_budget()
        .on_hedge({
            let hedges = Arc::clone(&hedges);
            move |_, _| {
                hedges.fetch_add(1, Relaxed);
            }
        })
        .build()
        .unwrap();
    // A long tail: a twentieth takes longer than 200 ms, and half less than 20.
    let draw = Arc::new(AtomicU64::new(1));
    let service = layer.layer(service_fn(move |_: u32| {
        let step = |seed: u64| Some(seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        let seed = draw.fetch_update(Relaxed, Relaxed, step).unwrap();
        let wait = 10_000 / (1 + (seed >> 33) % 1000);
        async move {
            tokio::time::sleep(Duration::from_millis(wait)).await;
            Ok::<_, Fails>(())
        }
    }));
    for round in 0..10 {
        hedges.store(0, Relaxed);
        let mut answers = tokio::task::JoinSet::new();
        for n in 0..1000 {
            answers.spawn(service.clone().oneshot(n));
            advance(20 * MS).await;
        }
        while let Some(answer) = answers.join_next().await {
            answer.unwrap().unwrap();
        }
        let hedged = hedges.load(Relaxed);
        assert!(
            round == 0 || (20..=90).contains(&hedged),
            "{hedged} of 1000 in round {round}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn the_rules_can_be_changed_while_serving() {
    let (inner, script) = script().otherwise(|_| Step::ok("").after(100 * MS)).build();
    let layer = any().name("api").build().unwrap();
    let service = layer.layer(inner);
    let policy = service.policy();
    assert_eq!(policy.name(), "api");
    let attempts = async || {
        let before = script.call_count();
        assert!(service.clone().oneshot(1).await.is_ok());
        script.call_count() - before
    };
    assert_eq!(attempts().await, 2);
    policy.set_max_hedges(0).unwrap();
    assert_eq!(attempts().await, 1);
    policy.set_max_hedges(3).unwrap();
    policy.set_after(30 * MS).unwrap();
    assert_eq!(attempts().await, 4);
    policy.set_after(100 * MS).unwrap();
    assert_eq!(attempts().await, 1);
    policy.set_after_percentile(0.5, 60 * MS, 70 * MS).unwrap();
    for _ in 0..20 {
        assert_eq!(policy.delay(), 70 * MS);
        assert_eq!(attempts().await, 2);
    }
    policy
        .set_after_percentile(0.5, 60 * MS, 1000 * MS)
        .unwrap();
    assert!((100 * MS..104 * MS).contains(&policy.delay()));
    assert_eq!(attempts().await, 1);
    script.assert_finished();
}

#[test]
fn nonsense_cannot_be_built() {
    let fails = |layer: HedgeBuilder<buttress_core::Http, OverHttp<Plain>>| {
        layer.build().unwrap_err().to_string()
    };
    let new = HedgeLayer::builder;
    let good = || new().after(MS);
    assert!(fails(new()).contains("needs a delay"));
    assert!(fails(good().after(3601 * 1000 * MS)).contains("delay"));
    assert!(fails(good().max_hedges(17)).contains("16"));
    for percentile in [0.0, 1.0, -1.0, f64::NAN] {
        let layer = new().after_percentile(percentile, MS, 2 * MS);
        assert!(fails(layer).contains("percentile"));
    }
    for (min, max) in [
        (2 * MS, MS),
        (Duration::ZERO, Duration::ZERO),
        (MS, Duration::MAX),
    ] {
        assert!(fails(new().after_percentile(0.5, min, max)).contains("longest delay"));
    }
    for window in [Duration::ZERO, 999 * MS, Duration::MAX] {
        let layer = new().after_percentile(0.5, MS, 2 * MS).window(window);
        assert!(fails(layer).contains("window"));
    }
    assert!(good().max_hedges(16).build().is_ok());

    let layer = good().build().unwrap();
    let policy = layer.policy();
    assert!(policy.set_after(Duration::MAX).is_err());
    assert!(policy.set_after_percentile(1.5, MS, MS).is_err());
    assert!(policy.set_max_hedges(17).is_err());
    assert_eq!(policy.delay(), MS);
}

#[tokio::test(start_paused = true)]
async fn layer_service_and_future_go_everywhere() {
    fn sound<T: Clone + Send + Sync + 'static>(_: &T) {}
    fn sent<T: Send>(_: &T) {}
    let layer = web().build().unwrap();
    sound(&layer);
    let (inner, script) = WebScript::new().then(Step::ok(response(200, ""))).build();
    let mut service: Hedge<Scripted<_, _, _>, _, _> = layer.layer(inner);
    sound(&service);
    poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
    let answer = service.call(get("/"));
    sent(&answer);
    // The response's body is the inner one's own.
    let answered: Result<Response<Whole>, Fails> = answer.await;
    assert_eq!(answered.unwrap().status(), 200);
    script.assert_finished();
}

#[cfg(feature = "metrics")]
#[tokio::test(start_paused = true)]
async fn what_became_of_hedges_is_counted() {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);
    let layer = any()
        .name("api")
        .max_hedges(2)
        .budget(Noted::new(5))
        .build()
        .unwrap();
    let (inner, script) = script()
        // One wins and one loses.
        .then(Step::hang())
        .then(Step::hang())
        .then(Step::ok("third"))
        // One is bad and one loses to the first.
        .then(Step::ok("first").after(120 * MS))
        .then(Step::err(Fails::TimedOut))
        .then(Step::hang())
        // One is under way as the budget ends, and given up on.
        .then(Step::hang())
        .then(Step::hang())
        .build();
    for n in 0..2 {
        assert!(layer.layer(inner.clone()).oneshot(n).await.is_ok());
    }
    let last = tokio::time::timeout(500 * MS, layer.layer(inner).oneshot(2));
    assert!(last.await.is_err());
    let mut seen: Vec<_> = snapshotter
        .snapshot()
        .into_vec()
        .into_iter()
        .map(|(key, _, description, value)| {
            assert!(description.is_some());
            let (_, key) = key.into_parts();
            let labels: Vec<_> = key.labels().map(|label| label.value().to_owned()).collect();
            assert_eq!(key.name(), "hedge_attempts_total");
            (labels.join(" "), value)
        })
        .collect();
    seen.sort_by(|one, other| one.0.cmp(&other.0));
    let counts = [("api lost", 3), ("api refused", 1), ("api won", 1)];
    let counts = counts.map(|(labels, count)| (labels.to_owned(), DebugValue::Counter(count)));
    assert_eq!(seen, counts);
    script.assert_finished();
}
