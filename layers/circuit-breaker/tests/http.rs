//! HTTP: what a head decides, what only the body's end does, and what a client
//! sees of a refusal.

use std::{
    convert::Infallible,
    io,
    pin::pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress_circuit_breaker::{
    Breaker, CircuitBreakerBuilder, CircuitBreakerLayer, Event, Settings, State,
};
use buttress_core::{
    Head, Http, Refusal, RefusalKind,
    classify::{Classify, GrpcClassifier, HttpClassifier, StatusClassifier, Verdict},
    testing::{
        ReadinessProbe, Script, Step, advance,
        web::{self, BodyFate, ScriptedBody},
    },
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::{BodyExt, Full};
use tower::{Layer, Service, ServiceExt, service_fn};

type Body = Full<Bytes>;

const SECOND: Duration = Duration::from_secs(1);

/// Opens at the first failure, for 10 s.
fn touchy() -> Settings {
    Settings::aggressive().consecutive_failures(1)
}

/// What a call came to: the verdicts that were told, in order.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<Event>>>);

impl Told {
    fn take(&self) -> Vec<Event> {
        let mut told = std::mem::take(&mut *self.0.lock().unwrap());
        told.retain(|event| !matches!(event, Event::Call | Event::StateChange(_)));
        told
    }
}

const SUCCESS: Event = Event::Success { slow: false };
const FAILURE: Event = Event::Failure { slow: false };

fn listening() -> (CircuitBreakerBuilder, Told) {
    let told = Told::default();
    let hears = told.clone();
    let builder = CircuitBreakerLayer::builder()
        .settings(Settings::new().consecutive_failures(1000))
        .on_event(move |_, event| hears.0.lock().unwrap().push(*event));
    (builder, told)
}

fn head(status: u16, headers: &[(&'static str, &'static str)]) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    for (name, value) in headers {
        let value = HeaderValue::from_static(value);
        response.headers_mut().append(*name, value);
    }
    response
}

fn trailers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    for (name, value) in fields {
        trailers.append(*name, HeaderValue::from_static(value));
    }
    trailers
}

/// Sends one request to a service that answers so.
async fn send<C>(
    layer: &CircuitBreakerLayer<Http, buttress_circuit_breaker::Respond, C>,
    response: Response<ScriptedBody>,
) -> Response<impl http_body::Body<Data = Bytes, Error = buttress_core::BoxError> + use<C>>
where
    C: Classify<Response<ScriptedBody>, Infallible> + Clone,
{
    let response = Mutex::new(Some(response));
    let inner = service_fn(move |_: Request<Body>| {
        let response = response.lock().unwrap().take();
        std::future::ready(Ok::<_, Infallible>(response.expect("one call")))
    });
    layer.layer(inner).oneshot(web::get("/")).await.unwrap()
}

fn with(head: &Response<()>, body: ScriptedBody) -> Response<ScriptedBody> {
    let mut response = Response::new(body);
    *response.status_mut() = head.status();
    *response.headers_mut() = head.headers().clone();
    response
}

/// The polled instance is the one called, and what is dropped is given back.
#[tokio::test(start_paused = true)]
async fn readiness() {
    ReadinessProbe::new(
        || web::get("/"),
        |_: &Request<Body>| Step::<Response<Body>, Infallible>::ok(web::response(200, "")),
    )
    .check(&CircuitBreakerLayer::builder().build().unwrap())
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_body_decides_when_it_ends() {
    let grpc = [("content-type", "application/grpc")];
    let text = [("content-type", "text/plain")];
    let broken = || io::Error::new(io::ErrorKind::ConnectionReset, "cut off");
    let body = ScriptedBody::new;
    // Head, body, what is told once the body was read to its end.
    for (n, (head, body, expected)) in [
        (head(200, &text), body().data("whole"), SUCCESS),
        (head(200, &text), body(), SUCCESS),
        (head(200, &text), body().data("hal").fail(broken()), FAILURE),
        (head(200, &text), body().fail(broken()), FAILURE),
        (head(404, &text), body().data("no such thing"), SUCCESS),
        // HTTP trailers mean nothing to it.
        (
            head(200, &text),
            body().trailers(trailers(&[("grpc-status", "14")])),
            SUCCESS,
        ),
        (
            head(200, &grpc),
            body().data("m").trailers(trailers(&[("grpc-status", "0")])),
            SUCCESS,
        ),
        (
            head(200, &grpc),
            body()
                .data("m")
                .trailers(trailers(&[("grpc-status", "14")])),
            FAILURE,
        ),
        (
            head(200, &grpc),
            body().trailers(trailers(&[("grpc-status", "5")])),
            SUCCESS,
        ),
        (
            head(200, &grpc),
            body().trailers(trailers(&[("grpc-status", "1")])),
            Event::Ignored,
        ),
        // Cut short of its trailers.
        (head(200, &grpc), body().data("m"), FAILURE),
    ]
    .into_iter()
    .enumerate()
    {
        let (builder, told) = listening();
        let layer = builder.build().unwrap();
        let response = send(&layer, with(&head, body)).await;
        assert_eq!(told.take(), [], "{n}: nothing is decided at the head");
        let _ = response.into_body().collect().await;
        assert_eq!(told.take(), [expected], "{n}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_may_decide_for_good() {
    // What comes after it changes nothing: hanging bodies, broken and dropped.
    for (n, (head, expected)) in [
        (head(500, &[]), FAILURE),
        (head(503, &[]), FAILURE),
        (
            head(
                200,
                &[("content-type", "application/grpc"), ("grpc-status", "14")],
            ),
            FAILURE,
        ),
        (
            head(
                200,
                &[("content-type", "application/grpc"), ("grpc-status", "1")],
            ),
            Event::Ignored,
        ),
        (head(101, &[]), SUCCESS),
        (head(200, &[("content-type", "text/event-stream")]), SUCCESS),
    ]
    .into_iter()
    .enumerate()
    {
        let (builder, told) = listening();
        let classifier = HttpClassifier::new().streaming(["text/event-stream"]);
        let layer = builder.classify(classifier).build().unwrap();
        for body in [
            ScriptedBody::new().hang(),
            ScriptedBody::new().fail("broken"),
            ScriptedBody::new().data("whole"),
        ] {
            let response = send(&layer, with(&head, body)).await;
            assert_eq!(told.take(), [expected], "{n}");
            let read = tokio::time::timeout(SECOND, response.into_body().collect());
            let _ = read.await;
            assert_eq!(told.take(), [], "{n}");
        }
    }
}

/// Nothing is left to come, so that nobody need read it.
#[tokio::test]
async fn an_empty_body_is_at_its_end() {
    let (builder, told) = listening();
    let layer = builder.build().unwrap();
    let service = layer.layer(service_fn(async |_: Request<Body>| {
        Ok::<_, Infallible>(web::response(204, ""))
    }));
    drop(service.oneshot(web::get("/")).await.unwrap());
    assert_eq!(told.take(), [SUCCESS]);
}

/// A good head whose body the caller drops decides nothing, but a slow head
/// was slow.
#[tokio::test(start_paused = true)]
async fn a_body_dropped_early_decides_nothing() {
    let layer = CircuitBreakerLayer::builder()
        .settings(touchy())
        .build()
        .unwrap();
    let body = || ScriptedBody::new().data("first").hang();
    let fresh = || with(&head(200, &[]), body());
    drop(send(&layer, fresh()).await);
    let response = send(&layer, fresh()).await;
    let mut rest = pin!(response.into_body());
    rest.frame().await.unwrap().unwrap();
    assert_eq!(layer.breaker().status().failures, 0);
    assert_eq!(layer.breaker().state(), State::Closed);
}

/// Half-open, the probe lasts until its body ends: its place is free when the
/// body is dropped, and it is decided by nothing but its end.
#[tokio::test(start_paused = true)]
async fn a_probes_place_is_its_bodys() {
    let layer = CircuitBreakerLayer::builder()
        .settings(touchy())
        .build()
        .unwrap();
    let breaker = layer.breaker();
    breaker.trip(None).unwrap();
    advance(10 * SECOND).await;
    let whole = || {
        with(
            &head(200, &[]),
            ScriptedBody::new().data("a").wait(SECOND).data("b"),
        )
    };

    let given_up = send(&layer, whole()).await;
    assert_eq!(given_up.status(), 200);
    assert_eq!(
        (breaker.state(), breaker.status().probes_in_flight),
        (State::HalfOpen, 1)
    );
    assert_eq!(send(&layer, whole()).await.status(), 503);
    drop(given_up);
    assert_eq!(
        (breaker.state(), breaker.status().probes_in_flight),
        (State::HalfOpen, 0)
    );

    let probe = send(&layer, whole()).await;
    probe.into_body().collect().await.unwrap();
    assert_eq!(breaker.state(), State::Closed);

    // And one that breaks off opens it again.
    breaker.trip(None).unwrap();
    breaker.half_open().unwrap();
    let truncated = with(
        &head(200, &[]),
        ScriptedBody::new().data("a").fail("cut off"),
    );
    let probe = send(&layer, truncated).await;
    assert_eq!(breaker.state(), State::HalfOpen);
    probe.into_body().collect().await.err().unwrap();
    assert_eq!(breaker.state(), State::Open);
}

/// The stopwatch stops at the head: what a body takes is its reader's doing
/// too.
#[tokio::test(start_paused = true)]
async fn only_the_head_is_timed() {
    for (head_takes, slow) in [(SECOND, true), (SECOND / 2, false)] {
        let told = Told::default();
        let hears = told.clone();
        let layer = CircuitBreakerLayer::builder()
            .settings(Settings::new().slow_calls(SECOND, 1.0))
            .on_event(move |_, event| hears.0.lock().unwrap().push(*event))
            .build()
            .unwrap();
        let (inner, _) = Script::<Request<Body>, _, Infallible>::new()
            .then(Step::ok(Response::new(ScriptedBody::new().wait(60 * SECOND))).after(head_takes))
            .build();
        let response = layer.layer(inner).oneshot(web::get("/")).await.unwrap();
        response.into_body().collect().await.unwrap();
        assert_eq!(told.take(), [Event::Success { slow }]);
    }
}

/// A body that panics has failed.
#[tokio::test]
async fn a_body_that_panics_is_a_failure() {
    struct Panics;
    impl http_body::Body for Panics {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
            panic!("in the body")
        }
    }
    let (builder, told) = listening();
    let layer = builder.build().unwrap();
    let service = layer.layer(service_fn(async |_: Request<Body>| {
        Ok::<_, Infallible>(Response::new(Panics))
    }));
    let response = service.oneshot(web::get("/")).await.unwrap();
    let read = tokio::spawn(response.into_body().collect());
    assert!(read.await.err().unwrap().is_panic());
    assert_eq!(told.take(), [FAILURE]);
}

/// A verdict that comes with the end of a body after the state has changed.
#[tokio::test(start_paused = true)]
async fn a_late_body_changes_nothing() {
    let layer = CircuitBreakerLayer::builder()
        .settings(touchy())
        .build()
        .unwrap();
    let late = send(
        &layer,
        with(&head(200, &[]), ScriptedBody::new().fail("late")),
    )
    .await;
    layer.breaker().trip(None).unwrap();
    layer.breaker().reset();
    late.into_body().collect().await.err().unwrap();
    assert_eq!(layer.breaker().state(), State::Closed);
    assert_eq!(layer.breaker().status().failures, 0);
}

/// What the responses say and how they are sized passes through.
#[tokio::test]
async fn responses_pass_whole() {
    let layer = CircuitBreakerLayer::builder().build().unwrap();
    let service = layer.layer(service_fn(async |_: Request<Body>| {
        let mut response = web::response(201, "hello");
        response
            .headers_mut()
            .insert("x-kept", HeaderValue::from_static("yes"));
        Ok::<_, Infallible>(response)
    }));
    let response = service.oneshot(web::get("/")).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-kept"]),
        (201, &HeaderValue::from_static("yes"))
    );
    assert_eq!(response.body().size_hint().exact(), Some(5));
    assert_eq!(web::text(response).await, "hello");

    let body = ScriptedBody::new().data("x");
    let watch = body.watch();
    let response = send(&layer, Response::new(body)).await;
    drop(response);
    assert_eq!(watch.fate(), BodyFate::Dropped);
}

fn refusing() -> CircuitBreakerLayer {
    let layer = CircuitBreakerLayer::builder()
        .name("billing")
        .settings(touchy())
        .build()
        .unwrap();
    layer.breaker().trip(None).unwrap();
    layer
}

async fn refused(layer: &CircuitBreakerLayer, request: Request<Body>) -> Response<Bytes> {
    let inner = service_fn(
        async |_: Request<Body>| -> Result<Response<Body>, Infallible> { panic!("it was refused") },
    );
    let response = layer.layer(inner).oneshot(request).await.unwrap();
    let (head, body) = response.into_parts();
    Response::from_parts(head, body.collect().await.unwrap().to_bytes())
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_a_problem_document() {
    let layer = refusing();
    advance(Duration::from_millis(1500)).await;
    let response = refused(&layer, web::get("/")).await;
    assert_eq!(response.status(), 503);
    // Rounded up: 8.5 s are left.
    assert_eq!(response.headers()["retry-after"], "9");
    assert_eq!(
        response.headers()["content-type"],
        "application/problem+json"
    );
    let problem: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
    assert_eq!(problem["status"], 503);
    assert_eq!(problem["reason"], "circuit_open");
    // Which breaker it was is nobody's business.
    assert!(!problem.to_string().contains("billing"));

    // Nobody knows when: it is not said.
    layer.breaker().force_open();
    let response = refused(&layer, web::get("/")).await;
    assert_eq!(response.status(), 503);
    assert!(!response.headers().contains_key("retry-after"));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_of_grpc_is_trailers_only() {
    let response = refused(&refusing(), web::grpc("/s/M")).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["grpc-status"], "14");
    assert_eq!(response.headers()["grpc-retry-pushback-ms"], "10000");
    assert!(!response.headers().contains_key("retry-after"));
    assert!(response.body().is_empty());
}

/// A half-open breaker whose probe is on its way may have a place soon.
#[tokio::test(start_paused = true)]
async fn half_open_says_to_come_again_soon() {
    let layer = refusing();
    layer.breaker().half_open().unwrap();
    let _probe = layer.breaker().try_acquire().unwrap();
    let response = refused(&layer, web::get("/")).await;
    assert_eq!(response.headers()["retry-after"], "1");
}

#[tokio::test(start_paused = true)]
async fn a_responder_of_ones_own() {
    let layer = CircuitBreakerLayer::builder()
        .name("billing")
        .responder(|refusal: &Refusal, head: Head<'_>| {
            assert_eq!(refusal.kind(), RefusalKind::CircuitOpen);
            let text = format!("{} by {:?}", head.uri, refusal.origin());
            Response::builder()
                .status(418)
                .body(Bytes::from(text))
                .unwrap()
        })
        .build()
        .unwrap();
    layer.breaker().trip(10 * SECOND).unwrap();
    let response = refused(&layer, web::get("/tea")).await;
    assert_eq!(response.status(), 418);
    assert_eq!(response.body(), "/tea by Some(\"billing\")");
    assert_eq!(response.headers()["retry-after"], "10");
}

/// As errors, on HTTP: the refusal, the inner error, and bodies that still
/// decide.
#[tokio::test(start_paused = true)]
async fn refusals_as_errors() {
    let layer = CircuitBreakerLayer::builder()
        .settings(touchy())
        .errors()
        .build()
        .unwrap();
    let truncated = || Response::new(ScriptedBody::new().data("a").fail("cut off"));
    let (inner, script) = Script::<Request<Body>, Response<ScriptedBody>, &str>::new()
        .then(Step::ok(truncated()))
        .then(Step::err("unreachable"))
        .build();
    let service = layer.layer(inner);
    let response = service.clone().oneshot(web::get("/")).await.unwrap();
    response.into_body().collect().await.err().unwrap();
    let error = service.clone().oneshot(web::get("/")).await.unwrap_err();
    assert_eq!(error.open().unwrap().retry_after(), Some(10 * SECOND));
    advance(10 * SECOND).await;
    let error = service.clone().oneshot(web::get("/")).await.unwrap_err();
    assert_eq!(error.into_inner(), Some("unreachable"));
    let error: buttress_core::BoxError = service.oneshot(web::get("/")).await.unwrap_err().into();
    assert_eq!(
        Refusal::find(&*error).unwrap().kind(),
        RefusalKind::CircuitOpen
    );
    assert_eq!(script.call_count(), 2);
}

/// A classifier of one's own: by status, or a closure over heads.
#[tokio::test]
async fn other_classifiers() {
    let status = StatusClassifier::new().failures([StatusCode::IM_A_TEAPOT]);
    let layer = CircuitBreakerLayer::builder()
        .settings(touchy())
        .classify(status)
        .build()
        .unwrap();
    drop(send(&layer, with(&head(500, &[]), ScriptedBody::new())).await);
    assert_eq!(layer.breaker().state(), State::Closed);
    drop(send(&layer, with(&head(418, &[]), ScriptedBody::new())).await);
    assert_eq!(layer.breaker().state(), State::Open);

    let by_header = |result: Result<&Response<ScriptedBody>, &Infallible>| match result {
        Ok(response) if response.headers().contains_key("x-sick") => Verdict::Failure,
        _ => Verdict::Success,
    };
    let layer = CircuitBreakerLayer::builder()
        .settings(touchy())
        .classify(by_header)
        .build()
        .unwrap();
    drop(send(&layer, with(&head(500, &[]), ScriptedBody::new())).await);
    assert_eq!(layer.breaker().state(), State::Closed);
    drop(
        send(
            &layer,
            with(&head(200, &[("x-sick", "1")]), ScriptedBody::new()),
        )
        .await,
    );
    assert_eq!(layer.breaker().state(), State::Open);

    let grpc = CircuitBreakerLayer::builder()
        .settings(touchy())
        .classify(Arc::new(GrpcClassifier::new()))
        .build()
        .unwrap();
    drop(send(&grpc, with(&head(503, &[]), ScriptedBody::new())).await);
    assert_eq!(grpc.breaker().state(), State::Open);
}

// ---- The callee asks to be left alone.

fn heeding() -> CircuitBreakerLayer {
    CircuitBreakerLayer::builder()
        .settings(Settings::aggressive())
        .retry_after(120 * SECOND)
        // Five seconds before the date of RFC 9110's examples.
        .wall_clock(|| Duration::from_secs(784_111_772))
        .build()
        .unwrap()
}

fn wait(breaker: &Breaker) -> Option<Duration> {
    let due = breaker.status().next_probe?;
    Some(due - buttress_core::clock::now())
}

#[tokio::test(start_paused = true)]
async fn retry_after_opens_it_for_as_long() {
    let grpc = ("content-type", "application/grpc");
    for (status, headers, expected) in [
        (503, vec![("retry-after", "60")], Some(60)),
        (429, vec![("retry-after", "60")], Some(60)),
        (503, vec![("retry-after", "3600")], Some(120)),
        (
            503,
            vec![("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT")],
            Some(5),
        ),
        // It asks for no pause, or says nothing.
        (503, vec![("retry-after", "0")], None),
        (503, vec![("retry-after", "soon")], None),
        (503, vec![], None),
        // Of others it is not meant so.
        (500, vec![("retry-after", "60")], None),
        (301, vec![("retry-after", "60")], None),
        (
            200,
            vec![
                grpc,
                ("grpc-status", "14"),
                ("grpc-retry-pushback-ms", "7000"),
            ],
            Some(7),
        ),
        (
            200,
            vec![
                grpc,
                ("grpc-status", "8"),
                ("grpc-retry-pushback-ms", "7000"),
            ],
            Some(7),
        ),
        (
            200,
            vec![grpc, ("grpc-status", "8"), ("grpc-retry-pushback-ms", "-1")],
            None,
        ),
        (
            200,
            vec![
                grpc,
                ("grpc-status", "5"),
                ("grpc-retry-pushback-ms", "7000"),
            ],
            None,
        ),
    ] {
        let layer = heeding();
        let told = format!("{status} {headers:?}");
        drop(send(&layer, with(&head(status, &headers), ScriptedBody::new())).await);
        let expected = expected.map(Duration::from_secs);
        assert_eq!(wait(layer.breaker()), expected, "{told}");
        // Unless asked, nobody looks.
        let deaf = CircuitBreakerLayer::builder().build().unwrap();
        drop(send(&deaf, with(&head(status, &headers), ScriptedBody::new())).await);
        assert_eq!(deaf.breaker().state(), State::Closed, "{told}");
    }
}

#[tokio::test(start_paused = true)]
async fn pushback_in_trailers_opens_it_too() {
    let layer = heeding();
    let body = ScriptedBody::new().data("m").trailers(trailers(&[
        ("grpc-status", "8"),
        ("grpc-retry-pushback-ms", "1500"),
    ]));
    let grpc = head(200, &[("content-type", "application/grpc")]);
    let response = send(&layer, with(&grpc, body)).await;
    assert_eq!(layer.breaker().state(), State::Closed);
    response.into_body().collect().await.unwrap();
    assert_eq!(wait(layer.breaker()), Some(Duration::from_millis(1500)));
}

/// A probe that is told to wait opens it again, for no less than it would be
/// open anyway.
#[tokio::test(start_paused = true)]
async fn a_probe_told_to_wait() {
    for (asked, expected) in [("60", 60), ("1", 10)] {
        let layer = heeding();
        layer.breaker().trip(None).unwrap();
        advance(10 * SECOND).await;
        drop(
            send(
                &layer,
                with(&head(429, &[("retry-after", asked)]), ScriptedBody::new()),
            )
            .await,
        );
        assert_eq!(wait(layer.breaker()), Some(Duration::from_secs(expected)));
    }
}

/// The service has no more in its hands than the layer: it can be taken apart.
#[tokio::test]
async fn the_inner_service_can_be_reached() {
    let layer = CircuitBreakerLayer::builder().build().unwrap();
    let mut service = layer.layer(7);
    *service.get_mut() += 1;
    assert_eq!(*service.get_ref(), 8);
    assert!(service.breaker().is(layer.breaker()));
    assert!(format!("{service:?} {layer:?}").contains("Closed"));
    assert_eq!(service.into_inner(), 8);
    let mut service = layer.layer(service_fn(async |_: Request<Body>| {
        Ok::<_, Infallible>(web::response(200, ""))
    }));
    assert!(format!("{:?}", service.call(web::get("/"))).contains("Permit"));
}
