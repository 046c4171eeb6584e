//! HTTP: what a client sees when time is up, which deadline holds, and what
//! upstreams are told.

use std::{
    convert::Infallible,
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress_core::{
    Head, Refusal, RefusalKind, clock,
    deadline::Deadline,
    testing::{
        Fate, ReadinessProbe, Script, Step, advance, elapsed,
        web::{self, BodyFate, ScriptedBody},
    },
};
use buttress_timeout::{Error, TimeoutBuilder, TimeoutLayer};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Version};
use http_body::Body as _;
use http_body_util::{BodyExt, Full};
use tower::{Layer, Service, ServiceExt, service_fn};

type Body = Full<Bytes>;

const SECOND: Duration = Duration::from_secs(1);
const BUDGET: HeaderName = HeaderName::from_static("x-budget-ms");

fn limited(limit: Duration) -> TimeoutBuilder {
    TimeoutLayer::builder().name("api").limit(limit)
}

fn unlimited() -> TimeoutBuilder {
    TimeoutLayer::builder()
}

/// A request that must be answered within this long.
fn due_in(span: Duration) -> Request<Body> {
    let mut request = web::get("/");
    Deadline::after(span).attach(request.extensions_mut());
    request
}

/// How long it takes, and the status, of a call that hangs.
async fn hang(builder: TimeoutBuilder, request: Request<Body>) -> (Duration, StatusCode) {
    let (inner, script) = Script::<_, Response<Body>, Infallible>::new()
        .then(Step::hang())
        .build();
    let service = builder.build().unwrap().layer(inner);
    let (took, response) = elapsed(service.oneshot(request)).await;
    assert_eq!(script.count(Fate::Dropped), 1);
    script.assert_finished();
    (took, response.unwrap().status())
}

#[tokio::test(start_paused = true)]
async fn readiness() {
    let probe = || {
        ReadinessProbe::new(
            || web::get("/"),
            |_: &Request<Body>| Step::<_, Infallible>::ok(web::response(200, "fine")),
        )
    };
    probe().check(&limited(SECOND).build().unwrap()).await;
    let errors = limited(SECOND).errors().build().unwrap();
    probe().check(&errors).await;
    let whole = limited(SECOND).to_the_end().build().unwrap();
    probe().check(&whole).await;
}

/// Without a clone of the inner service it cannot be given back.
#[tokio::test(start_paused = true)]
async fn who_is_late_leaves_the_readiness_for_the_next() {
    let (inner, script) = Script::<Request<Body>, _, Infallible>::new()
        .then(Step::ok(web::response(200, "")))
        .build();
    let mut service = limited(SECOND).build().unwrap().layer(inner);
    let late = service.ready().await.unwrap().call(due_in(Duration::ZERO));
    assert_eq!(late.await.unwrap().status(), 504);
    assert_eq!(script.reserved(), 1);
    let next = service.ready().await.unwrap().call(web::get("/"));
    assert_eq!(next.await.unwrap().status(), 200);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_hang_becomes_a_problem_document() {
    let inner = service_fn(async |_: Request<Body>| {
        pending::<()>().await;
        Ok::<_, Infallible>(Response::new(Body::default()))
    });
    let service = limited(SECOND).build().unwrap().layer(inner);
    let (took, response) = elapsed(service.oneshot(web::get("/"))).await;
    assert_eq!(took, SECOND);
    let response = response.unwrap();
    assert_eq!(response.status(), 504);
    assert_eq!(
        response.headers()["content-type"],
        "application/problem+json"
    );
    let text = web::text(response).await;
    assert!(text.contains("\"reason\":\"timed_out\""), "{text}");
}

#[tokio::test(start_paused = true)]
async fn grpc_gets_trailers_only() {
    for due in [SECOND, Duration::ZERO] {
        let inner = service_fn(async |_: Request<Body>| {
            pending::<()>().await;
            Ok::<_, Infallible>(Response::new(Body::default()))
        });
        let service = unlimited().build().unwrap().layer(inner);
        let mut request = web::grpc("/pkg.Service/Method");
        Deadline::after(due).attach(request.extensions_mut());
        let response = service.oneshot(request).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/grpc");
        assert_eq!(response.headers()["grpc-status"], "4");
        assert!(response.body().is_end_stream());
    }
}

/// tonic's servers end a call at the `grpc-timeout` that they were told, with
/// CANCELLED: whether they or the timer came first was left to chance, and a
/// breaker ignores CANCELLED.
#[tokio::test(start_paused = true)]
async fn a_cancellation_at_the_same_moment_does_not_win() {
    let almost = SECOND - Duration::from_nanos(1);
    for (when, told, code) in [(almost, "1", "1"), (SECOND, "1", "4"), (SECOND, "14", "14")] {
        let mut answer = Response::new(Body::default());
        let told = HeaderValue::from_static(told);
        answer.headers_mut().insert("grpc-status", told);
        let (inner, script) = Script::<_, Response<Body>, Infallible>::new()
            .then(Step::ok(answer).held())
            .build();
        let mut service = limited(SECOND).build().unwrap().layer(inner);
        service.ready().await.unwrap();
        let mut call = tokio_test::task::spawn(service.call(grpc(&[])));
        tokio_test::assert_pending!(call.poll());
        advance(when).await;
        script.release(0);
        let response = tokio_test::assert_ready!(call.poll()).unwrap();
        assert_eq!(response.headers()["grpc-status"], code);
        script.assert_finished();
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_in_time_is_not_touched() {
    let (inner, script) = Script::<Request<Body>, _, _>::new()
        .then(Step::ok(web::response(418, "short")).after(SECOND / 2))
        .then(Step::err("reset").after(SECOND / 2))
        .build();
    let service = limited(SECOND).build().unwrap().layer(inner);
    let response = service.clone().oneshot(web::get("/")).await.unwrap();
    assert_eq!(response.status(), 418);
    assert!(response.headers().is_empty());
    // To the head only: what comes after has its time.
    advance(SECOND * 10).await;
    assert_eq!(web::text(response).await, "short");
    assert_eq!(service.oneshot(web::get("/")).await.unwrap_err(), "reset");
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn the_nearer_deadline_holds() {
    let two = SECOND * 2;
    assert_eq!(hang(limited(two), due_in(SECOND)).await.0, SECOND);
    assert_eq!(hang(limited(SECOND), due_in(two)).await.0, SECOND);
    assert_eq!(hang(unlimited(), due_in(two)).await.0, two);
    assert_eq!(hang(limited(two), web::get("/")).await.0, two);
    assert_eq!(hang(limited(two), due_in(Duration::MAX)).await.0, two);
}

#[tokio::test(start_paused = true)]
async fn without_limit_and_deadline_it_passes_through() {
    let (inner, script) = Script::<Request<Body>, Response<Body>, Infallible>::new()
        .then(Step::ok(web::response(200, "at last")).after(SECOND * 1_000_000))
        .build();
    let layer = unlimited().header(BUDGET).adopt().attach_deadline();
    let service = layer.build().unwrap().layer(inner);
    let request = web::grpc("/");
    let (took, response) = elapsed(service.oneshot(request)).await;
    assert_eq!(took, SECOND * 1_000_000);
    assert_eq!(web::text(response.unwrap()).await, "at last");
    let request = script.take_requests().remove(0);
    assert!(!request.headers().contains_key("grpc-timeout"));
    assert!(!request.headers().contains_key(BUDGET));
    assert!(request.extensions().is_empty());
}

#[tokio::test(start_paused = true)]
async fn who_is_late_already_is_not_called_for() {
    let (inner, script) = Script::<Request<Body>, Response<Body>, Infallible>::new().build();
    let service = limited(SECOND).build().unwrap().layer(inner.clone());
    let late = due_in(SECOND);
    advance(SECOND).await;
    let (took, response) = elapsed(service.oneshot(late)).await;
    assert_eq!(took, Duration::ZERO);
    assert_eq!(response.unwrap().status(), 504);

    let errors = limited(SECOND).errors().build().unwrap();
    let error = errors.layer(inner).oneshot(due_in(Duration::ZERO)).await;
    let error = error.unwrap_err();
    assert_eq!(error.elapsed().unwrap().after(), Duration::ZERO);
    assert_eq!(
        error.to_string(),
        "the deadline was past before the call (api)"
    );
    assert_eq!(script.call_count(), 0);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn as_errors_responses_keep_their_type() {
    let (inner, script) = Script::<Request<Body>, Response<Body>, &str>::new()
        .then(Step::ok(web::response(200, "fine")))
        .then(Step::hang())
        .then(Step::err("reset"))
        .build();
    let service = limited(SECOND).errors().build().unwrap().layer(inner);
    let call = async || service.clone().oneshot(web::get("/")).await;
    let response: Response<Body> = call().await.unwrap();
    assert_eq!(web::text(response).await, "fine");
    let error = call().await.unwrap_err();
    assert_eq!(error.elapsed().unwrap().after(), SECOND);
    assert_eq!(call().await.unwrap_err(), Error::Inner("reset"));
    script.assert_finished();
}

/// When there is something to refuse, the request is long gone.
#[tokio::test(start_paused = true)]
async fn a_closure_sees_the_request_as_it_came() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    let layer = limited(SECOND)
        .header(BUDGET)
        .responder(move |refusal: &Refusal, request: Head<'_>| {
            assert_eq!(refusal.kind(), RefusalKind::TimedOut);
            assert_eq!(refusal.origin(), Some("api"));
            assert!(!request.headers.contains_key(BUDGET));
            let tag = request.extensions.get::<u8>().copied();
            log.lock().unwrap().push((request.uri.to_string(), tag));
            Response::new(Bytes::from_static(b"too slow"))
        })
        .build()
        .unwrap();
    let service = layer.layer(service_fn(async |_: Request<Body>| {
        pending::<()>().await;
        Ok::<_, Infallible>(Response::new(Body::default()))
    }));
    let mut late = due_in(Duration::ZERO);
    *late.uri_mut() = "/late".parse().unwrap();
    let mut slow = web::get("/slow?a");
    slow.extensions_mut().insert(7_u8);
    for request in [late, slow] {
        let response = service.clone().oneshot(request).await.unwrap();
        assert_eq!(web::text(response).await, "too slow");
    }
    let expected = [("/late".into(), None), ("/slow?a".into(), Some(7))];
    assert_eq!(*seen.lock().unwrap(), expected);
}

/// What the inner service gets of this request.
async fn forwarded(builder: TimeoutBuilder, request: Request<Body>) -> Request<Body> {
    let (inner, script) = Script::<_, Response<Body>, Infallible>::new()
        .then(Step::ok(web::response(200, "")))
        .build();
    let service = builder.build().unwrap().layer(inner);
    assert_eq!(service.oneshot(request).await.unwrap().status(), 200);
    script.take_requests().remove(0)
}

fn field<'a>(request: &'a Request<Body>, name: &str) -> Vec<&'a str> {
    let values = request.headers().get_all(name).iter();
    values.map(|value| value.to_str().unwrap()).collect()
}

fn grpc(timeouts: &[&'static str]) -> Request<Body> {
    let mut request = web::grpc("/");
    for value in timeouts {
        let value = HeaderValue::from_static(value);
        request.headers_mut().append("grpc-timeout", value);
    }
    request
}

#[tokio::test(start_paused = true)]
async fn grpc_upstreams_are_told_what_is_left() {
    let told = async |timeouts: &[&'static str]| {
        let request = forwarded(limited(SECOND), grpc(timeouts)).await;
        field(&request, "grpc-timeout").join(", ")
    };
    assert_eq!(told(&[]).await, "1000000u");
    // The smaller holds, as it was written.
    assert_eq!(told(&["250m"]).await, "250m");
    assert_eq!(told(&["1S"]).await, "1S");
    assert_eq!(told(&["2S"]).await, "1000000u");
    assert_eq!(told(&["soon"]).await, "1000000u");
    assert_eq!(told(&["2S", "250m"]).await, "250000u");
    assert_eq!(told(&["250m", "soon"]).await, "250000u");

    // By the nearer deadline, and from now.
    let mut request = grpc(&[]);
    Deadline::after(SECOND / 2).attach(request.extensions_mut());
    advance(SECOND / 4).await;
    let request = forwarded(limited(SECOND), request).await;
    assert_eq!(field(&request, "grpc-timeout"), ["250000u"]);

    // Nobody else, and not where it is not wanted.
    let request = forwarded(limited(SECOND), web::get("/")).await;
    assert!(request.headers().is_empty());
    let request = forwarded(limited(SECOND).grpc_timeout(false), grpc(&[])).await;
    assert!(field(&request, "grpc-timeout").is_empty());
    let request = forwarded(unlimited(), grpc(&["2S"])).await;
    assert_eq!(field(&request, "grpc-timeout"), ["2S"]);
}

#[tokio::test(start_paused = true)]
async fn a_header_tells_any_upstream() {
    let told = async |limit, there: &[&'static str]| {
        let mut request = web::get("/");
        for value in there {
            let value = HeaderValue::from_static(value);
            request.headers_mut().append(BUDGET, value);
        }
        let request = forwarded(limited(limit).header(BUDGET), request).await;
        field(&request, BUDGET.as_str()).join(", ")
    };
    assert_eq!(told(SECOND, &[]).await, "1000");
    assert_eq!(told(Duration::from_micros(1_999), &[]).await, "1");
    assert_eq!(told(Duration::from_nanos(1), &[]).await, "1");
    assert_eq!(told(SECOND, &["700"]).await, "700");
    assert_eq!(told(SECOND, &["1700"]).await, "1000");
    assert_eq!(told(SECOND, &["-5"]).await, "1000");
}

#[tokio::test(start_paused = true)]
async fn a_callers_deadline_is_adopted_where_it_is_asked_for() {
    let with = |name: HeaderName, value| {
        let mut request = grpc(&[]);
        let value = HeaderValue::from_static(value);
        request.headers_mut().insert(name, value);
        request
    };
    let name = HeaderName::from_static("grpc-timeout");
    let grpc = |value| with(name.clone(), value);
    let two = SECOND * 2;

    // Not by itself.
    assert_eq!(hang(limited(SECOND), grpc("10m")).await.0, SECOND);

    let adopting = || limited(SECOND).header(BUDGET).adopt();
    let ms = Duration::from_millis;
    assert_eq!(hang(adopting(), grpc("10m")).await.0, ms(10));
    assert_eq!(hang(adopting(), grpc("2S")).await.0, SECOND);
    assert_eq!(hang(adopting(), with(BUDGET, "20")).await.0, ms(20));
    // Nonsense says nothing.
    for nonsense in ["", "soon", "-1S", "123456789n", "1x"] {
        assert_eq!(hang(adopting(), grpc(nonsense)).await.0, SECOND);
        assert_eq!(hang(adopting(), with(BUDGET, nonsense)).await.0, SECOND);
    }
    // The nearest of all.
    let mut request = grpc("30m");
    request
        .headers_mut()
        .insert(BUDGET, HeaderValue::from_static("20"));
    let (took, _) = hang(adopting(), request).await;
    assert_eq!(took, ms(20));
    let mut request = grpc("30m");
    Deadline::after(ms(10)).attach(request.extensions_mut());
    assert_eq!(hang(adopting(), request).await.0, ms(10));
    // It is enough by itself.
    assert_eq!(hang(unlimited().adopt(), grpc("2S")).await.0, two);
    // gRPC's own says nothing of other requests.
    let mut request = web::get("/");
    request
        .headers_mut()
        .insert(name.clone(), HeaderValue::from_static("10m"));
    assert_eq!(hang(adopting(), request).await.0, SECOND);

    // None left: the handler is not called.
    let (inner, script) = Script::<_, Response<Body>, Infallible>::new().build();
    let service = adopting().build().unwrap().layer(inner);
    let response = service.oneshot(grpc("0n")).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "4");
    assert_eq!(script.call_count(), 0);
}

#[tokio::test(start_paused = true)]
async fn layers_further_in_are_told_where_one_was_told() {
    let inwards = async |builder, request| {
        let now = clock::now();
        let request = forwarded(builder, request).await;
        Deadline::of(request.extensions()).map(|deadline| deadline.remaining(now))
    };
    let two = SECOND * 2;
    assert_eq!(inwards(limited(SECOND), web::get("/")).await, None);
    assert_eq!(inwards(limited(SECOND), due_in(two)).await, Some(SECOND));
    assert_eq!(inwards(limited(two), due_in(SECOND)).await, Some(SECOND));
    let attaching = || limited(SECOND).attach_deadline();
    assert_eq!(inwards(attaching(), web::get("/")).await, Some(SECOND));
    assert_eq!(inwards(attaching(), due_in(two)).await, Some(SECOND));
}

#[tokio::test(start_paused = true)]
async fn the_rest_of_a_request_stays_as_it_was() {
    let mut request = web::post("/a?b", "body");
    *request.version_mut() = Version::HTTP_2;
    request.extensions_mut().insert("kept");
    request
        .headers_mut()
        .insert("x-tenant", HeaderValue::from_static("acme"));
    let builder = limited(SECOND).header(BUDGET).attach_deadline();
    let request = forwarded(builder, request).await;
    assert_eq!(request.uri(), "/a?b");
    assert_eq!(request.version(), Version::HTTP_2);
    assert_eq!(request.extensions().get(), Some(&"kept"));
    assert_eq!(request.headers()["x-tenant"], "acme");
    let body = request.into_body().collect().await.unwrap();
    assert_eq!(body.to_bytes(), "body");
}

/// Answers after half a second, with this body and content type.
fn streams(
    body: ScriptedBody,
    status: u16,
    content_type: &'static str,
) -> impl Service<Request<Body>, Response = Response<ScriptedBody>, Error = Infallible, Future: Send>
{
    let mut body = Some(body);
    service_fn(move |_: Request<Body>| {
        let mut response = Response::new(body.take().unwrap());
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        let value = HeaderValue::from_static(content_type);
        response.headers_mut().insert("content-type", value);
        async move {
            tokio::time::sleep(SECOND / 2).await;
            Ok(response)
        }
    })
}

#[tokio::test(start_paused = true)]
async fn a_body_is_cut_when_time_is_up() {
    let body = ScriptedBody::new().data("first").wait(SECOND).data("last");
    let watch = body.watch();
    let layer = limited(SECOND).to_the_end().build().unwrap();
    let service = layer.layer(streams(body, 200, "text/plain"));

    let start = clock::now();
    let response = service.oneshot(web::get("/")).await.unwrap();
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    let first = body.frame().await.unwrap().unwrap();
    assert_eq!(first.into_data().unwrap(), "first");
    assert_eq!(clock::now() - start, SECOND / 2);
    assert!(!body.is_end_stream());

    let error = body.frame().await.unwrap().unwrap_err();
    assert_eq!(clock::now() - start, SECOND);
    assert_eq!(error.elapsed().unwrap().after(), SECOND);
    // The inner body went while ours lives on, and stays at its end.
    assert_eq!(watch.fate(), BodyFate::Dropped);
    assert!(body.is_end_stream());
    assert_eq!(body.size_hint().exact(), Some(0));
    assert!(body.frame().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_body_that_ends_in_time_is_whole() {
    let mut trailers = http::HeaderMap::new();
    trailers.insert("x-sum", HeaderValue::from_static("7"));
    let body = ScriptedBody::new()
        .data("first ")
        .wait(SECOND / 4)
        .data("last")
        .trailers(trailers.clone());
    let watch = body.watch();
    let layer = limited(SECOND).errors().to_the_end().build().unwrap();
    let service = layer.layer(streams(body, 200, "text/plain"));
    let (took, whole) = elapsed(async {
        let response = service.oneshot(web::get("/")).await.unwrap();
        response.into_body().collect().await.unwrap()
    })
    .await;
    assert_eq!(took, SECOND / 4 * 3);
    assert_eq!(whole.trailers(), Some(&trailers));
    assert_eq!(whole.to_bytes(), "first last");
    assert_eq!(watch.fate(), BodyFate::Complete);
}

#[tokio::test(start_paused = true)]
async fn a_grpc_stream_ends_with_its_status() {
    let cut = async |layer: TimeoutBuilder, content_type| {
        let body = ScriptedBody::new().data("message").hang();
        let watch = body.watch();
        let layer = layer.to_the_end().build().unwrap();
        let service = layer.layer(streams(body, 200, content_type));
        let response = service.oneshot(web::grpc("/")).await.unwrap();
        let whole = response.into_body().collect().await;
        assert_eq!(watch.fate(), BodyFate::Dropped);
        whole.map(|whole| whole.trailers().cloned().unwrap())
    };
    let trailers = cut(limited(SECOND), "application/grpc").await.unwrap();
    assert_eq!(trailers["grpc-status"], "4");
    assert_eq!(trailers["grpc-message"], "the request took too long");
    assert_eq!(trailers.len(), 2);

    // It has its trailers in its data.
    let web = cut(limited(SECOND), "application/grpc-web+proto").await;
    assert!(web.unwrap_err().elapsed().is_some());
    // The responder has no status for it.
    let teapot = |_: &Refusal, _: Head<'_>| Response::new(Bytes::new());
    let silent = cut(limited(SECOND).responder(teapot), "application/grpc").await;
    assert!(silent.unwrap_err().elapsed().is_some());

    // Nobody is to answer.
    let body = ScriptedBody::new().data("message").hang();
    let layer = limited(SECOND).errors().to_the_end().build().unwrap();
    let service = layer.layer(streams(body, 200, "application/grpc"));
    let response = service.oneshot(web::grpc("/")).await.unwrap();
    let error = response.into_body().collect().await.unwrap_err();
    assert!(error.elapsed().is_some());
}

/// Whoever reads late finds what was there in time.
#[tokio::test(start_paused = true)]
async fn a_body_that_is_there_is_whole_however_late_it_is_read() {
    let inner = service_fn(async |_: Request<Body>| Ok::<_, Infallible>(web::response(200, "it")));
    let service = limited(SECOND).to_the_end().build().unwrap().layer(inner);
    let response = service.oneshot(web::get("/")).await.unwrap();
    assert_eq!(response.body().size_hint().exact(), Some(2));
    advance(SECOND * 2).await;
    assert_eq!(web::text(response).await, "it");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_has_ended_wakes_nobody() {
    let body = ScriptedBody::new().wait(SECOND / 4);
    let layer = limited(SECOND).to_the_end().build().unwrap();
    let service = layer.layer(streams(body, 200, "text/plain"));
    let response = service.oneshot(web::get("/")).await.unwrap();
    let mut body = response.into_body();
    let mut end = tokio_test::task::spawn(body.frame());
    tokio_test::assert_pending!(end.poll());
    advance(SECOND / 4).await;
    assert!(end.is_woken());
    assert!(tokio_test::assert_ready!(end.poll()).is_none());
    advance(SECOND * 2).await;
    assert!(!end.is_woken());
}

/// The end that is there when time is up is one; another piece is not the end.
#[tokio::test(start_paused = true)]
async fn an_end_at_the_same_moment_wins() {
    for (body, whole) in [
        (ScriptedBody::new().wait(SECOND / 2), true),
        (ScriptedBody::new().wait(SECOND / 2).data("more"), false),
        (ScriptedBody::new().wait(SECOND / 2).fail("broken"), false),
    ] {
        let layer = limited(SECOND).to_the_end().build().unwrap();
        let service = layer.layer(streams(body, 200, "text/plain"));
        let response = service.oneshot(web::get("/")).await.unwrap();
        let mut body = response.into_body();
        let mut next = tokio_test::task::spawn(body.frame());
        tokio_test::assert_pending!(next.poll());
        advance(SECOND / 2).await;
        let frame = tokio_test::assert_ready!(next.poll());
        assert_eq!(frame.is_none(), whole, "{frame:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_body_is_its_own() {
    let body = ScriptedBody::new().fail("broken");
    let layer = limited(SECOND).to_the_end().build().unwrap();
    let service = layer.layer(streams(body, 200, "text/plain"));
    let response = service.oneshot(web::get("/")).await.unwrap();
    let error = response.into_body().collect().await.unwrap_err();
    assert_eq!(error.into_inner().unwrap().to_string(), "broken");
}

/// A body that always has more is never waited for.
#[tokio::test(start_paused = true)]
async fn a_body_that_never_pauses_is_cut_too() {
    let body = (0..100).fold(ScriptedBody::new(), |body, _| body.data("piece"));
    let watch = body.watch();
    let layer = limited(SECOND).to_the_end().build().unwrap();
    let service = layer.layer(streams(body, 200, "text/plain"));
    let response = service.oneshot(web::get("/")).await.unwrap();
    let mut body = response.into_body();
    let mut pieces = 0;
    let error = loop {
        match body.frame().await.unwrap() {
            Ok(_) => pieces += 1,
            Err(error) => break error,
        }
        advance(SECOND / 10).await;
    };
    assert_eq!(pieces, 5);
    assert!(error.elapsed().is_some());
    assert_eq!(watch.fate(), BodyFate::Dropped);
}

#[tokio::test(start_paused = true)]
async fn streams_and_upgrades_are_limited_to_their_heads() {
    let slow = || ScriptedBody::new().wait(SECOND * 3600).data("tick");
    let layer = || {
        let whole = limited(SECOND).to_the_end();
        whole.streaming(["text/event-stream"]).build().unwrap()
    };
    for (status, content_type, fine) in [
        (200, "text/event-stream; charset=utf-8", true),
        (101, "text/plain", true),
        (200, "text/plain", false),
        (200, "application/grpc", false),
    ] {
        let service = layer().layer(streams(slow(), status, content_type));
        let response = service.oneshot(web::get("/")).await.unwrap();
        let whole = response.into_body().collect().await;
        assert_eq!(whole.is_ok(), fine, "{status} {content_type}");
    }
    // The head has its limit.
    let layer = limited(SECOND / 4).to_the_end();
    let layer = layer.streaming(["text/event-stream"]).build().unwrap();
    let service = layer.layer(streams(slow(), 200, "text/event-stream"));
    let response = service.oneshot(web::get("/")).await.unwrap();
    assert_eq!(response.status(), 504);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_body_takes_the_inner_one_along() {
    let body = ScriptedBody::new().data("first").hang();
    let watch = body.watch();
    let layer = limited(SECOND).to_the_end().build().unwrap();
    let service = layer.layer(streams(body, 200, "text/plain"));
    let mut body = service.oneshot(web::get("/")).await.unwrap().into_body();
    let _ = body.frame().await;
    assert_eq!(watch.fate(), BodyFate::Open);
    drop(body);
    assert_eq!(watch.fate(), BodyFate::Dropped);
}

/// A timeout inside of a timeout: the nearer one answers, and the outer one
/// passes it on.
#[tokio::test(start_paused = true)]
async fn one_stands_in_another() {
    let inner = service_fn(async |_: Request<Body>| {
        pending::<()>().await;
        Ok::<_, Infallible>(Response::new(Body::default()))
    });
    let outer = limited(SECOND * 2).attach_deadline().build().unwrap();
    let attempt = limited(SECOND).build().unwrap();
    let service = outer.layer(attempt.layer(inner));
    let (took, response) = elapsed(service.oneshot(web::get("/"))).await;
    assert_eq!(took, SECOND);
    assert_eq!(response.unwrap().status(), 504);
}

/// What an upstream is told, another instance adopts: what is left only ever
/// gets less on the way.
#[tokio::test(start_paused = true)]
async fn what_is_told_is_adopted_by_the_next() {
    let server = TimeoutLayer::builder().adopt().build().unwrap();
    let server = server.layer(service_fn(async |_: Request<Body>| {
        pending::<()>().await;
        Ok::<_, Infallible>(Response::new(Body::default()))
    }));
    let client = limited(SECOND * 3).build().unwrap();
    let client = client.layer(server);
    let (took, response) = elapsed(client.oneshot(web::grpc("/"))).await;
    assert_eq!(took, SECOND * 3);
    assert_eq!(response.unwrap().headers()["grpc-status"], "4");
}
