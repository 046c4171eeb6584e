//! HTTP: what is worth another attempt, when it comes, and what the service
//! is given.

use std::{
    convert::Infallible,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress_core::{
    BoxError, Refusal, RefusalKind,
    body::ResponseBody,
    classify::GrpcCode,
    clock,
    deadline::Deadline,
    testing::{
        Fate, ReadinessProbe, Script, ScriptHandle, Scripted, Step, advance, settle,
        web::{self, BodyFate, ScriptedBody},
    },
};
use buttress_retry::{
    Backoff, Budget, Cause, GiveUp, HedgeLayer, Outcome, ReplayBody, Retry, RetryBudget,
    RetryBuilder, RetryLayer, Settings, Throttle,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use tokio_test::{assert_pending, task};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, limit::ConcurrencyLimit, service_fn};

type Body = Full<Bytes>;
type Sent = Request<ReplayBody<Body>>;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Three attempts, a second between them, no end.
fn plain() -> Settings {
    Settings::standard()
        .backoff(Backoff::fixed(SECOND))
        .total_timeout(None)
}

fn builder() -> RetryBuilder {
    RetryLayer::builder().settings(plain())
}

fn answer(status: u16) -> Step<Response<Body>, io::Error> {
    Step::ok(web::response(status, ""))
}

type Inner = Scripted<Sent, Response<Body>, io::Error>;
type Handle = ScriptHandle<Sent, Response<Body>, io::Error>;

fn script(steps: impl IntoIterator<Item = Step<Response<Body>, io::Error>>) -> (Inner, Handle) {
    let script = steps.into_iter().fold(Script::new(), Script::then);
    script.otherwise(|_| answer(200)).build()
}

async fn status<S, B>(service: S, request: Request<Body>) -> StatusCode
where
    S: Service<Request<Body>, Response = Response<B>, Error = io::Error>,
{
    service.oneshot(request).await.unwrap().status()
}

fn with(status: u16, headers: &[(&'static str, &'static str)]) -> Response<Body> {
    let mut response = web::response(status, "");
    for (name, value) in headers {
        let value = HeaderValue::from_static(value);
        response.headers_mut().append(*name, value);
    }
    response
}

#[tokio::test(start_paused = true)]
async fn the_statuses_of_the_field_are_repeated_and_no_others() {
    let layer = builder().build().unwrap();
    for code in 200..=599 {
        let (inner, script) = script([answer(code)]);
        let last = status(layer.layer(inner), web::get("/")).await;
        let again = [408, 425, 429, 500, 502, 503, 504].contains(&code);
        assert_eq!(last.as_u16(), if again { 200 } else { code });
        assert_eq!(script.call_count(), if again { 2 } else { 1 }, "{code}");
        script.assert_finished();
    }
}

#[tokio::test(start_paused = true)]
async fn attempts_come_after_exactly_the_wait_and_the_last_answer_stands() {
    let layer = builder().build().unwrap();
    let start = clock::now();
    let (inner, script) = script([503, 502, 500].map(|code| answer(code).after(250 * MS)));
    assert_eq!(status(layer.layer(inner), web::get("/")).await, 500);
    assert_eq!(script.arrivals(), [Duration::ZERO, 1250 * MS, 2500 * MS]);
    assert_eq!(clock::now() - start, 2750 * MS);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn only_what_may_be_sent_twice_is() {
    let down = || io::Error::from(io::ErrorKind::ConnectionRefused);
    let reset = || io::Error::from(io::ErrorKind::ConnectionReset);
    let request = |method: &Method, key: bool| {
        let mut request = web::get("/");
        *request.method_mut() = method.clone();
        if key {
            let value = HeaderValue::from_static("1f2e");
            request.headers_mut().insert("idempotency-key", value);
        }
        request
    };
    let safe = [
        Method::GET,
        Method::HEAD,
        Method::OPTIONS,
        Method::TRACE,
        Method::PUT,
        Method::DELETE,
    ];
    let unsafe_ = [Method::POST, Method::PATCH, Method::CONNECT];
    for method in safe.iter().chain(&unsafe_) {
        for rule in ["default", "methods", "always", "never", "closure"] {
            for key in [false, true] {
                let (layer, may) = match rule {
                    "default" => (builder(), key || safe.contains(method)),
                    "methods" => (
                        builder().methods([Method::POST]),
                        key || method == Method::POST,
                    ),
                    "always" => (builder().repeat_always(), true),
                    "never" => (builder().repeat_never(), false),
                    _ => (
                        builder().repeat_if(|head| head.method == Method::PATCH),
                        method == Method::PATCH,
                    ),
                };
                let layer = layer.build().unwrap();
                for (step, always) in [
                    (answer(503), false),
                    (Step::err(reset()), false),
                    (Step::err(down()), true),
                ] {
                    let (inner, script) = script([step]);
                    let _ = layer.layer(inner).oneshot(request(method, key)).await;
                    let calls = if may || always { 2 } else { 1 };
                    assert_eq!(script.call_count(), calls, "{rule} {method} {key} {always}");
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_never_undercut() {
    // 1994-11-06 08:49:30.25.
    let wall = || Duration::from_millis(784_111_770_250);
    let date = "Sun, 06 Nov 1994 08:49:37 GMT";
    for (code, value, expected) in [
        (503, "5", 5 * SECOND),
        (429, " 5", 5 * SECOND),
        (503, date, 7 * SECOND),
        // What is shorter than the backoff, past, or junk: the backoff.
        (503, "0", SECOND),
        (503, "Sun, 06 Nov 1994 08:49:29 GMT", SECOND),
        (503, "soon", SECOND),
    ] {
        let layer = builder().wall_clock(wall).build().unwrap();
        let (inner, script) = script([Step::ok(with(code, &[("retry-after", value)]))]);
        assert_eq!(status(layer.layer(inner), web::get("/")).await, 200);
        assert_eq!(
            script.arrivals()[1] - script.arrivals()[0],
            expected,
            "{value}"
        );
    }
}

/// Jitter comes on top, and nothing is cut.
#[tokio::test(start_paused = true)]
async fn who_was_told_the_same_does_not_come_at_the_same_time() {
    let settings = plain().backoff(Backoff::exponential(2 * SECOND));
    let layer = RetryLayer::builder()
        .settings(settings)
        .random(|| u64::MAX / 2 + 1)
        .build()
        .unwrap();
    let (inner, script) = script([Step::ok(with(503, &[("retry-after", "5")]))]);
    status(layer.layer(inner), web::get("/")).await;
    assert_eq!(script.arrivals()[1], 6 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_wait_too_long_is_not_begun_and_the_answer_is_handed_on_at_once() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&told);
    let layer = RetryLayer::builder()
        .settings(
            plain()
                .total_timeout(10 * SECOND)
                .max_retry_after(8 * SECOND),
        )
        .on_give_up(move |attempts, cause, reason| {
            hears.lock().unwrap().push((attempts, cause, reason));
        })
        .build()
        .unwrap();
    let cause = Cause::Status(StatusCode::SERVICE_UNAVAILABLE);
    for (took, retry_after, reason) in [
        (Duration::ZERO, "9", GiveUp::Pushback),
        (3 * SECOND, "7", GiveUp::Deadline),
        (9 * SECOND, "0", GiveUp::Deadline),
    ] {
        let before = clock::now();
        let response = with(503, &[("retry-after", retry_after)]);
        let (inner, script) = script([Step::ok(response).after(took)]);
        let response = layer.layer(inner).oneshot(web::get("/")).await.unwrap();
        // The answer in hand, header and all.
        assert_eq!(response.headers()["retry-after"], retry_after);
        assert_eq!(clock::now() - before, took);
        assert_eq!(script.call_count(), 1);
        assert_eq!(*told.lock().unwrap(), [(1, cause, reason)]);
        told.lock().unwrap().clear();
    }
}

#[tokio::test(start_paused = true)]
async fn grpc_goes_by_its_code_and_its_pushback() {
    let layer = builder().build().unwrap();
    for (headers, expected) in [
        (&[("grpc-status", "14")][..], Some(SECOND)),
        (
            &[("grpc-status", "14"), ("grpc-retry-pushback-ms", "5000")],
            Some(5 * SECOND),
        ),
        (
            &[("grpc-status", "14"), ("grpc-retry-pushback-ms", "0")],
            Some(Duration::ZERO),
        ),
        (
            &[("grpc-status", "14"), ("grpc-retry-pushback-ms", "-1")],
            None,
        ),
        (
            &[("grpc-status", "14"), ("grpc-retry-pushback-ms", "abc")],
            None,
        ),
        (&[("grpc-status", "8")], None),
        (&[("grpc-status", "0")], None),
        // With a body: the caller has begun to be told.
        (&[], None),
    ] {
        let (inner, script) = script([Step::ok(with(200, headers))]);
        status(layer.layer(inner), web::grpc("/a.B/C")).await;
        let calls = script.arrivals();
        let waited = calls.get(1).map(|second| *second - calls[0]);
        assert_eq!(waited, expected, "{headers:?}");
    }
    // A proxy's 503 is UNAVAILABLE to gRPC, its 500 UNKNOWN.
    for (code, calls) in [(503, 2), (500, 1)] {
        let (inner, script) = script([answer(code)]);
        status(layer.layer(inner), web::grpc("/a.B/C")).await;
        assert_eq!(script.call_count(), calls);
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_further_in_is_heeded() {
    type Boxed = Scripted<Sent, Response<Body>, BoxError>;
    let layer = builder().boxed_errors().build().unwrap();
    let refused = |kind, wait: Option<Duration>| -> BoxError {
        Refusal::new(kind).with_retry_after(wait).into()
    };
    for (error, expected) in [
        (
            refused(RefusalKind::CircuitOpen, Some(4 * SECOND)),
            Some(4 * SECOND),
        ),
        (
            refused(RefusalKind::RateLimited, Some(2 * SECOND)),
            Some(2 * SECOND),
        ),
        (refused(RefusalKind::TimedOut, None), Some(SECOND)),
        // Open until someone says otherwise; never fits; none of ours.
        (refused(RefusalKind::CircuitOpen, None), None),
        (refused(RefusalKind::NeverFits, None), None),
        (refused(RefusalKind::BodyTooLarge, None), None),
        ("some error".into(), None),
        (
            io::Error::from(io::ErrorKind::BrokenPipe).into(),
            Some(SECOND),
        ),
        (io::Error::from(io::ErrorKind::InvalidData).into(), None),
    ] {
        let text = error.to_string();
        let (inner, script): (Boxed, _) = Script::new()
            .then(Step::err(error))
            .otherwise(|_| Step::ok(web::response(200, "")))
            .build();
        let _ = layer.layer(inner).oneshot(web::get("/")).await;
        let calls = script.arrivals();
        let waited = calls.get(1).map(|second| *second - calls[0]);
        assert_eq!(waited, expected, "{text}");
    }
}

/// An order that timed out was sent again where the timeout said so by an
/// error, and not where it said so by a response.
#[tokio::test(start_paused = true)]
async fn a_grpc_error_is_no_better_than_its_code() {
    let late = || -> BoxError { Refusal::new(RefusalKind::TimedOut).into() };
    let reset = || -> BoxError { io::Error::from(io::ErrorKind::ConnectionReset).into() };
    let down = || -> BoxError { io::Error::from(io::ErrorKind::ConnectionRefused).into() };
    let layers = || {
        [
            builder(),
            builder().grpc_codes([]),
            builder().grpc_codes([GrpcCode::DeadlineExceeded]),
        ]
    };
    for (error, expected) in [
        (late as fn() -> BoxError, [1, 1, 2]),
        (reset, [2, 1, 1]),
        (down, [2, 2, 2]),
    ] {
        let sent = async |layer: RetryBuilder| {
            let (inner, script) = Script::<Sent, Response<Body>, BoxError>::new()
                .then(Step::err(error()))
                .otherwise(|_| Step::ok(with(200, &[("grpc-status", "0")])))
                .build();
            let layer = layer.boxed_errors().build().unwrap();
            let _ = layer
                .layer(inner)
                .oneshot(web::grpc("/shop.Orders/Create"))
                .await;
            script.call_count()
        };
        let mut counts = Vec::new();
        for layer in layers() {
            counts.push(sent(layer).await);
        }
        assert_eq!(counts, expected, "{}", error());
    }
}

#[tokio::test(start_paused = true)]
async fn nested_retriers_see_each_other() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sees = Arc::clone(&seen);
    let inner = service_fn(move |request: Request<ReplayBody<ReplayBody<Body>>>| {
        let told = request.headers().get("x-retry-attempt");
        let told = told.map(|value| value.to_str().unwrap().to_owned());
        sees.lock().unwrap().push(told.unwrap_or_default());
        async { Ok::<_, Infallible>(web::response(503, "")) }
    });
    let layer = || {
        let settings = plain().max_attempts(2);
        RetryLayer::builder()
            .settings(settings)
            .attempt_header()
            .build()
            .unwrap()
    };
    let service = layer().layer(layer().layer(inner));
    service.oneshot(web::get("/")).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), ["", "1", "1", "2"]);
}

#[tokio::test(start_paused = true)]
async fn a_closure_has_the_last_word() {
    let layer = builder()
        .retry_if(|head, outcome| match outcome {
            Outcome::Response {
                status, headers, ..
            } => {
                let text = headers.get("x-again")?;
                assert_eq!(head.uri.path(), "/asked");
                Some(text == "yes" && status != 418)
            }
            Outcome::Error(error) => Some(error.unwrap().to_string().contains("again")),
        })
        .build()
        .unwrap();
    for (step, calls) in [
        (Step::ok(with(200, &[("x-again", "yes")])), 2),
        (Step::ok(with(503, &[("x-again", "no")])), 1),
        (answer(503), 2),
        (answer(200), 1),
        (Step::err(io::Error::other("again, please")), 2),
        (
            Step::err(io::Error::from(io::ErrorKind::ConnectionReset)),
            1,
        ),
    ] {
        let (inner, script) = script([step]);
        let _ = layer.layer(inner).oneshot(web::get("/asked")).await;
        assert_eq!(script.call_count(), calls);
    }
    // It says what is worth it, not what may be sent twice.
    let (inner, script) = script([Step::ok(with(200, &[("x-again", "yes")]))]);
    let _ = layer.layer(inner).oneshot(web::post("/asked", "")).await;
    assert_eq!(script.call_count(), 1);
}

/// Total 5 s, 2 s an attempt.
#[tokio::test(start_paused = true)]
async fn each_attempt_is_told_until_when() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sees = Arc::clone(&seen);
    let begun = clock::now();
    let inner = service_fn(move |request: Sent| {
        let deadline = Deadline::of(request.extensions()).unwrap();
        sees.lock()
            .unwrap()
            .push((clock::now() - begun, deadline.remaining(clock::now())));
        async {
            tokio::time::sleep(SECOND).await;
            Ok::<_, Infallible>(web::response(503, ""))
        }
    });
    let settings = plain()
        .total_timeout(5 * SECOND)
        .attempt_timeout(2 * SECOND)
        .max_attempts(9);
    let layer = RetryLayer::builder().settings(settings).build().unwrap();
    let service = layer.layer(inner);
    let last = service.clone().oneshot(web::get("/")).await.unwrap();
    assert_eq!(last.status(), 503);
    let told = std::mem::take(&mut *seen.lock().unwrap());
    assert_eq!(
        told,
        [
            (Duration::ZERO, 2 * SECOND),
            (2 * SECOND, 2 * SECOND),
            (4 * SECOND, SECOND)
        ]
    );

    // Whoever waits further out has less time.
    let start = clock::now() - begun;
    let mut request = web::get("/");
    Deadline::after(1500 * MS).attach(request.extensions_mut());
    service.oneshot(request).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), [(start, 1500 * MS)]);
}

/// A deadline that nobody asked for would be an allocation a request.
#[tokio::test(start_paused = true)]
async fn without_timeouts_nothing_is_attached() {
    let inner = service_fn(async |request: Sent| {
        assert_eq!(Deadline::of(request.extensions()), None);
        assert!(request.extensions().is_empty());
        Ok::<_, Infallible>(web::response(200, ""))
    });
    let service = builder().build().unwrap().layer(inner);
    service.oneshot(web::get("/")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_given_up_on_is_dropped_before_the_wait() {
    let body = ScriptedBody::new().data("not now").hang();
    let watch = body.watch();
    let inner = tower::util::BoxCloneService::new(service_fn({
        let body = Arc::new(Mutex::new(Some(body)));
        move |_: Sent| {
            let body = body.lock().unwrap().take();
            let status = if body.is_some() { 503 } else { 200 };
            let mut response = Response::new(body.unwrap_or_default());
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            async { Ok::<_, Infallible>(response) }
        }
    }));
    let mut call = task::spawn(
        builder()
            .build()
            .unwrap()
            .layer(inner)
            .oneshot(web::get("/")),
    );
    assert_pending!(call.poll());
    assert_eq!(watch.fate(), BodyFate::Dropped);
    advance(SECOND).await;
    assert!(call.poll().is_ready());
}

#[tokio::test(start_paused = true)]
async fn the_wait_for_readiness_ends_with_the_deadline() {
    // One slot, which another request holds from the moment on at which the
    // first attempt has left it.
    let limit = ConcurrencyLimit::new(
        service_fn(async |request: Sent| {
            if request.uri().path() == "/other" {
                std::future::pending::<()>().await;
            }
            Ok::<_, io::Error>(web::response(503, ""))
        }),
        1,
    );
    let layer = RetryLayer::builder()
        .settings(plain().total_timeout(5 * SECOND))
        .build()
        .unwrap();
    let service = layer.layer(limit);
    let mut call = task::spawn(service.clone().oneshot(web::get("/")));
    assert_pending!(call.poll());
    let mut other = task::spawn(service.oneshot(web::get("/other")));
    assert_pending!(other.poll());
    advance(SECOND).await;
    assert_pending!(call.poll());
    advance(4 * SECOND - MS).await;
    assert_pending!(call.poll());
    advance(MS).await;
    let std::task::Poll::Ready(response) = call.poll() else {
        panic!("time is up");
    };
    let response = response.unwrap();
    assert_eq!(response.status(), 504);
    assert_eq!(
        response.headers()["content-type"],
        "application/problem+json"
    );
}

#[tokio::test(start_paused = true)]
async fn extensions_headers_and_version_are_kept_and_the_attempt_is_told() {
    #[derive(Clone, Debug, PartialEq)]
    struct Mark(u32);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sees = Arc::clone(&seen);
    let inner = service_fn(move |request: Sent| {
        assert_eq!(request.extensions().get(), Some(&Mark(7)));
        assert_eq!(request.headers()["x-own"], "kept");
        assert_eq!(request.version(), Version::HTTP_2);
        assert_eq!(request.uri(), "/a?b=c");
        let attempt = request.headers().get("x-retry-attempt").cloned();
        sees.lock().unwrap().push(attempt);
        async { Ok::<_, Infallible>(web::response(503, "")) }
    });
    let service = builder().attempt_header().build().unwrap().layer(inner);
    let mut request = web::get("/a?b=c");
    *request.version_mut() = Version::HTTP_2;
    request.extensions_mut().insert(Mark(7));
    request
        .headers_mut()
        .insert("x-own", HeaderValue::from_static("kept"));
    service.oneshot(request).await.unwrap();
    let told = ["", "1", "2"].map(|text| (!text.is_empty()).then(|| text.parse().unwrap()));
    assert_eq!(*seen.lock().unwrap(), told);
}

/// Answers 503 after so much of the body was read, and then echoes.
fn picky(
    reads: usize,
) -> impl Service<
    Request<ReplayBody<ScriptedBody>>,
    Response = Response<Body>,
    Error = Infallible,
    Future: Send,
> + Clone {
    let first = Arc::new(Mutex::new(true));
    service_fn(move |request: Request<ReplayBody<ScriptedBody>>| {
        let first = std::mem::take(&mut *first.lock().unwrap());
        async move {
            let mut body = request.into_body();
            if first {
                for _ in 0..reads {
                    body.frame().await;
                }
                return Ok(web::response(503, ""));
            }
            let Ok(collected) = body.collect().await else {
                return Ok(web::response(400, "broken off"));
            };
            let trailers = collected.trailers().cloned();
            let mut response = web::response(200, collected.to_bytes());
            response.headers_mut().extend(trailers.unwrap_or_default());
            Ok(response)
        }
    })
}

fn upload() -> ScriptedBody {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", HeaderValue::from_static("42"));
    ScriptedBody::new()
        .data("one ")
        .wait(10 * MS)
        .data("two ")
        .data("three")
        .trailers(trailers)
}

fn put<B>(body: B) -> Request<B> {
    Request::put("/").body(body).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_retry_has_the_whole_body_wherever_the_first_stopped() {
    let layer = builder().build().unwrap();
    for reads in 0..=5 {
        let response = layer
            .layer(picky(reads))
            .oneshot(put(upload()))
            .await
            .unwrap();
        assert_eq!(response.status(), 200, "{reads}");
        assert_eq!(response.headers()["x-sum"], "42");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, "one two three");
        assert_eq!(layer.memory().used(), 0);
    }
}

/// An early answer: the connection still has the body, and gives it up some
/// time after the answer was dropped.
#[tokio::test(start_paused = true)]
async fn a_body_in_use_is_waited_for() {
    let held = Arc::new(Mutex::new(None));
    let holds = Arc::clone(&held);
    let inner = service_fn(move |request: Request<ReplayBody<ScriptedBody>>| {
        let holds = Arc::clone(&holds);
        async move {
            let mut body = request.into_body();
            body.frame().await;
            let first = holds.lock().unwrap().is_none();
            if first {
                *holds.lock().unwrap() = Some(Some(body));
                return Ok::<_, Infallible>(web::response(503, ""));
            }
            body.collect().await.unwrap();
            Ok(web::response(200, ""))
        }
    });
    let layer = builder().build().unwrap();
    let mut call = task::spawn(layer.layer(inner).oneshot(put(upload())));
    assert_pending!(call.poll());
    advance(1500 * MS).await;
    assert_pending!(call.poll());
    held.lock().unwrap().as_mut().unwrap().take();
    assert!(call.is_woken());
    assert_pending!(call.poll());
    advance(10 * MS).await;
    let std::task::Poll::Ready(response) = call.poll() else {
        panic!("it was given up");
    };
    assert_eq!(response.unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_never_given_up_is_not_waited_for_for_ever() {
    let held = Arc::new(Mutex::new(Vec::new()));
    let holds = Arc::clone(&held);
    let inner = service_fn(move |request: Request<ReplayBody<ScriptedBody>>| {
        holds.lock().unwrap().push(request);
        async { Ok::<_, Infallible>(web::response(503, "")) }
    });
    let layer = builder().build().unwrap();
    let start = clock::now();
    let response = layer.layer(inner).oneshot(put(upload())).await.unwrap();
    // What it was, for the answer itself is no more.
    assert_eq!(response.status(), 503);
    assert_eq!(
        response.headers()["content-type"],
        "application/problem+json"
    );
    assert_eq!(clock::now() - start, 2 * SECOND);
    assert_eq!(held.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn over_the_cap_it_goes_once() {
    let given_up = Arc::new(Mutex::new(None));
    let hears = Arc::clone(&given_up);
    let layer = builder()
        .max_body(12)
        .on_give_up(move |_, _, reason| *hears.lock().unwrap() = Some(reason))
        .build()
        .unwrap();
    // Nothing read yet: it is not over the cap by then.
    for (reads, expected) in [(0, 200), (2, 200), (3, 503)] {
        let response = layer
            .layer(picky(reads))
            .oneshot(put(upload()))
            .await
            .unwrap();
        assert_eq!(response.status(), expected, "{reads}");
        drop(response);
        assert_eq!(layer.memory().used(), 0);
    }
    assert_eq!(*given_up.lock().unwrap(), Some(GiveUp::Body));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_broke_off_is_never_sent_again() {
    let layer = builder().build().unwrap();
    let body = || {
        ScriptedBody::new()
            .data("one ")
            .fail("the client went away")
    };
    let response = layer.layer(picky(2)).oneshot(put(body())).await.unwrap();
    assert_eq!(response.status(), 503);
    // It has not been seen to break off, and does so in the retry.
    let response = layer.layer(picky(1)).oneshot(put(body())).await.unwrap();
    assert_eq!(response.status(), 400);
}

#[tokio::test(start_paused = true)]
async fn who_goes_away_stops_it() {
    let (inner, script) = script([answer(503), answer(503).after(5 * SECOND)]);
    let layer = builder().build().unwrap();
    let mut call = task::spawn(layer.layer(inner).oneshot(web::get("/")));
    assert_pending!(call.poll());
    advance(500 * MS).await;
    drop(call);
    advance(10 * SECOND).await;
    assert_eq!(script.call_count(), 1);

    let (inner, script) = self::script([answer(503), answer(503).after(5 * SECOND)]);
    let mut call = task::spawn(layer.layer(inner).oneshot(web::get("/")));
    assert_pending!(call.poll());
    advance(2 * SECOND).await;
    assert_pending!(call.poll());
    assert_eq!(script.in_flight(), 1);
    drop(call);
    assert_eq!(script.count(Fate::Dropped), 1);
    advance(10 * SECOND).await;
    assert_eq!(script.call_count(), 2);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn listeners_hear_of_every_retry() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&told);
    let layer = builder()
        .on_retry(move |attempt, delay, cause| hears.lock().unwrap().push((attempt, delay, cause)))
        .build()
        .unwrap();
    let reset = io::Error::from(io::ErrorKind::ConnectionReset);
    let (inner, _script) = script([answer(429), Step::err(reset)]);
    status(layer.layer(inner), web::get("/")).await;
    let limited = Cause::Status(StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(
        *told.lock().unwrap(),
        [(1, SECOND, limited), (2, SECOND, Cause::Reset)]
    );
}

/// 1000 requests to a callee that is down.
#[tokio::test(start_paused = true)]
async fn an_outage_is_not_amplified() {
    let layer = RetryLayer::builder()
        .settings(Settings::aggressive().backoff(Backoff::fixed(MS)))
        .budget(RetryBudget::new(20, 3).unwrap())
        .build()
        .unwrap();
    let (inner, script) = Script::<Sent, _, Infallible>::new()
        .otherwise(|_| Step::ok(web::response(503, "")))
        .build();
    let service = layer.layer(inner);
    let start = clock::now();
    for _ in 0..1000 {
        service.clone().oneshot(web::get("/")).await.unwrap();
    }
    let took = (clock::now() - start).as_secs_f64();
    let most = 1000.0 * 1.2 + 3.0 * (took + 1.0);
    let calls = script.call_count();
    assert!(calls > 1150, "{calls}");
    assert!(calls as f64 <= most, "{calls} in {took} s");
}

#[tokio::test(start_paused = true)]
async fn a_budget_counts_requests_and_hears_how_attempts_went() {
    #[derive(Clone, Debug, Default)]
    struct Ledger(Arc<Mutex<Vec<&'static str>>>);
    impl Budget for Ledger {
        fn request(&self) {
            self.0.lock().unwrap().push("request");
        }
        fn withdraw(&self) -> bool {
            let mut told = self.0.lock().unwrap();
            told.push("withdraw");
            told.iter().filter(|word| **word == "withdraw").count() < 2
        }
        fn outcome(&self, verdict: buttress_core::classify::Verdict) {
            let failed = verdict == buttress_core::classify::Verdict::Failure;
            self.0
                .lock()
                .unwrap()
                .push(if failed { "failure" } else { "success" });
        }
    }
    let ledger = Ledger::default();
    let layer = builder().budget(ledger.clone()).build().unwrap();
    let (inner, script) = script([answer(503), answer(503), answer(200)]);
    assert_eq!(status(layer.layer(inner), web::get("/")).await, 503);
    assert_eq!(script.call_count(), 2);
    assert_eq!(
        *ledger.0.lock().unwrap(),
        ["request", "failure", "withdraw", "failure", "withdraw"]
    );
}

#[tokio::test(start_paused = true)]
async fn settings_are_changed_while_serving() {
    let layer = builder().build().unwrap();
    let (inner, script) = Script::<Sent, _, io::Error>::new()
        .otherwise(|_| answer(503))
        .build();
    let service = layer.layer(inner);
    let mut call = task::spawn(service.clone().oneshot(web::get("/")));
    assert_pending!(call.poll());
    layer
        .policy()
        .set_settings(plain().max_attempts(2))
        .unwrap();
    assert!(
        layer
            .policy()
            .set_settings(plain().max_attempts(0))
            .is_err()
    );
    advance(SECOND).await;
    assert!(call.poll().is_ready());
    assert_eq!(script.call_count(), 2);
    layer
        .policy()
        .set_settings(plain().max_attempts(1))
        .unwrap();
    status(service, web::get("/")).await;
    assert_eq!(script.call_count(), 3);
}

#[tokio::test(start_paused = true)]
async fn readiness() {
    let stack = ServiceBuilder::new()
        .layer(builder().build().unwrap())
        .map_request(|request: Sent| request.map(|_| Body::default()));
    ReadinessProbe::new(
        || web::get("/"),
        |_: &Request<Body>| Step::<Response<Body>, Infallible>::ok(web::response(200, "")),
    )
    .check(&stack.into_inner())
    .await;
}

/// What is not ready for the next attempt holds nothing meanwhile.
#[tokio::test(start_paused = true)]
async fn a_slot_is_free_during_the_wait() {
    let (inner, script) = script([answer(503)]);
    let service = builder()
        .build()
        .unwrap()
        .layer(ConcurrencyLimit::new(inner, 1));
    let mut call = task::spawn(service.clone().oneshot(web::get("/")));
    assert_pending!(call.poll());
    // Another one passes.
    assert_eq!(status(service, web::get("/")).await, 200);
    advance(SECOND).await;
    settle().await;
    assert!(call.poll().is_ready());
    script.assert_finished();
}

#[test]
fn a_layer_and_its_service_are_clone_send_and_sync_whatever_the_body() {
    fn check<T: Clone + Send + Sync + 'static>(_: &T) {}
    let layer = builder().build().unwrap();
    check(&layer);
    let service: Retry<_, _, _> = layer.layer(service_fn(
        async |_: Request<
            ReplayBody<http_body_util::combinators::UnsyncBoxBody<Bytes, BoxError>>,
        >| { Ok::<_, Infallible>(Response::new(ResponseBody::inner(Body::default()))) },
    ));
    check(&service);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_success_gives_a_throttle_nothing_back() {
    let grpc = |fields: &[(&'static str, &'static str)]| {
        let mut response = with(200, fields);
        let grpc = HeaderValue::from_static("application/grpc");
        response.headers_mut().insert("content-type", grpc);
        response
    };
    let call = || {
        let request = Request::post("/a.B/C").header("content-type", "application/grpc");
        request.body(Body::default()).unwrap()
    };
    let forbidden = [("grpc-status", "13"), ("grpc-retry-pushback-ms", "-1")];
    // After three failures of ten tokens, seven are left.
    for (request, response, left) in [
        (web::get("/"), with(200, &[]), 7_500),
        (web::get("/"), with(404, &[]), 7_500),
        (web::get("/"), with(501, &[]), 7_000),
        (call(), grpc(&[]), 7_500),
        (call(), grpc(&[("grpc-status", "0")]), 7_500),
        (call(), grpc(&[("grpc-status", "13")]), 7_000),
        (call(), grpc(&forbidden), 6_000),
    ] {
        let throttle = Arc::new(Throttle::new(10, 500).unwrap());
        for _ in 0..3 {
            throttle.outcome(buttress_core::classify::Verdict::Failure);
        }
        let retry = builder().budget(Arc::clone(&throttle)).build().unwrap();
        let (inner, _script) = script([Step::ok(response)]);
        let _ = status(retry.layer(inner), request).await;
        assert_eq!(throttle.tokens_thousandths(), left);
    }
    // So for hedges.
    let throttle = Arc::new(Throttle::new(10, 500).unwrap());
    throttle.outcome(buttress_core::classify::Verdict::Failure);
    let hedge = HedgeLayer::builder()
        .after(SECOND)
        .budget(Arc::clone(&throttle));
    let (inner, _script) = script([answer(501), answer(200)]);
    let service = hedge.build().unwrap().layer(inner);
    for left in [9_000, 9_500] {
        let answer = service.clone().oneshot(web::get("/")).await;
        let _ = answer.unwrap();
        assert_eq!(throttle.tokens_thousandths(), left);
    }
}

/// Nobody will be there to ask: the answer comes before the wait, the attempt's
/// own is dropped, and no budget is charged for what is not sent.
#[tokio::test(start_paused = true)]
async fn a_refusal_can_take_the_place_of_a_wait() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let (waits, reasons) = (Arc::clone(&told), Arc::new(Mutex::new(Vec::new())));
    let heard = Arc::clone(&reasons);
    let budget = Arc::new(RetryBudget::new(100, 0).unwrap());
    let layer = builder()
        .budget(Arc::clone(&budget))
        .on_give_up(move |attempts, _, reason| heard.lock().unwrap().push((attempts, reason)))
        .refuse_if(move |head, wait| {
            waits.lock().unwrap().push(wait);
            let open = Refusal::new(RefusalKind::CircuitOpen).with_retry_after(SECOND * 9);
            (head.uri.path() == "/closed").then_some(open)
        })
        .build()
        .unwrap();

    let (inner, script) = script([answer(500)]);
    let before = clock::now();
    let response = layer.layer(inner).oneshot(web::get("/closed")).await;
    let response = response.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "9");
    assert_eq!(clock::now(), before);
    assert_eq!(script.call_count(), 1);
    assert_eq!(*told.lock().unwrap(), [SECOND]);
    assert_eq!(*reasons.lock().unwrap(), [(1, GiveUp::Refused)]);
    assert!(budget.withdraw(), "it was not charged");

    // Elsewhere, and where nothing is worth another attempt or may be repeated,
    // all is as ever.
    for (request, first, last, calls, asked) in [
        (web::get("/open"), 500, 200, 2, 2),
        (web::get("/closed"), 404, 404, 1, 2),
        (web::post("/closed", ""), 500, 500, 1, 2),
    ] {
        let (inner, script) = self::script([answer(first)]);
        assert_eq!(status(layer.layer(inner), request).await.as_u16(), last);
        assert_eq!(script.call_count(), calls);
        assert_eq!(told.lock().unwrap().len(), asked);
    }
}
