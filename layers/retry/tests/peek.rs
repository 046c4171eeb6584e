//! gRPC's status in trailers that follow the head at once.

use std::{io, time::Duration};

use buttress_core::{
    BoxError, clock,
    testing::{
        ReadinessProbe, Script, ScriptHandle, Scripted, Step, elapsed, settle,
        web::{self, BodyFate, ScriptedBody},
    },
};
use buttress_retry::{
    Backoff, HedgeLayer, PeekBody, PeekLayer, ReplayBody, RetryLayer, Settings, Trailers,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::Body as _;
use http_body_util::{BodyExt, Full};
use tokio_test::{assert_pending, task};
use tower::{Layer, ServiceExt};

type Body = Full<Bytes>;
type Res = Response<ScriptedBody>;

const SECOND: Duration = Duration::from_secs(1);

fn fields(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    let field = |(name, value): &(&'static str, &'static str)| {
        let name = HeaderName::from_static(name);
        (name, HeaderValue::from_static(value))
    };
    fields.iter().map(field).collect()
}

fn status(code: &'static str) -> HeaderMap {
    fields(&[("grpc-status", code)])
}

fn fails_at_once() -> Step<Res, io::Error> {
    Step::ok(Response::new(ScriptedBody::new().trailers(status("14"))))
}

fn well() -> ScriptedBody {
    ScriptedBody::new().data("hello").trailers(status("0"))
}

fn script<Req>(
    body: ScriptedBody,
) -> (
    Scripted<Req, Res, io::Error>,
    ScriptHandle<Req, Res, io::Error>,
) {
    let step = Step::ok(Response::new(body));
    Script::new().then(step).build()
}

async fn whole(response: Response<PeekBody<ScriptedBody>>) -> (Bytes, Option<HeaderMap>) {
    let whole = response.into_body().collect().await.unwrap();
    let trailers = whole.trailers().cloned();
    (whole.to_bytes(), trailers)
}

#[tokio::test]
async fn trailers_alone_are_told_and_handed_on() {
    let trailers = fields(&[("grpc-status", "14"), ("grpc-message", "not yet")]);
    let (inner, _script) = script(ScriptedBody::new().trailers(trailers.clone()));
    let service = PeekLayer::new().layer(inner);
    let response = service.oneshot(web::grpc("/a.B/C")).await.unwrap();
    let told = response.extensions().get::<Trailers>().unwrap();
    assert_eq!(told.fields(), &trailers);
    assert!(!response.body().is_end_stream());
    assert_eq!(whole(response).await, (Bytes::new(), Some(trailers)));
}

#[tokio::test]
async fn what_has_begun_is_handed_on_frame_by_frame() {
    let bodies = [
        (well(), 5, "hello"),
        (well().data("never"), 5, "hellonever"),
        (ScriptedBody::new(), 0, ""),
    ];
    for (body, lower, text) in bodies {
        let (inner, _script) = script(body);
        let service = PeekLayer::new().layer(inner);
        let response = service.oneshot(web::grpc("/a.B/C")).await.unwrap();
        assert!(response.extensions().get::<Trailers>().is_none());
        assert_eq!(response.body().size_hint().lower(), lower);
        assert_eq!(response.body().is_end_stream(), text.is_empty());
        assert_eq!(whole(response).await.0, text);
    }
}

#[tokio::test]
async fn a_frame_without_a_byte_hides_nothing() {
    let body = ScriptedBody::new().data("").data("").trailers(status("14"));
    let (inner, _script) = script(body);
    let service = PeekLayer::new().layer(inner);
    let response = service.oneshot(web::grpc("/a.B/C")).await.unwrap();
    assert!(Trailers::of(response.extensions()).is_some());
    assert_eq!(whole(response).await.1, Some(status("14")));
}

#[tokio::test]
async fn a_body_that_breaks_at_once_says_so_where_it_is_read() {
    let (inner, _script) = script(ScriptedBody::new().fail("it broke"));
    let service = PeekLayer::new().layer(inner);
    let response = service.oneshot(web::grpc("/a.B/C")).await.unwrap();
    let error: BoxError = response.into_body().collect().await.unwrap_err();
    assert_eq!(error.to_string(), "it broke");
}

/// What is waited for is the first frame of gRPC's good heads, and no other's.
#[tokio::test(start_paused = true)]
async fn nothing_else_is_waited_for() {
    let late = || ScriptedBody::new().wait(SECOND).trailers(status("0"));
    let of = |body, edit: fn(&mut Res)| {
        let mut response = Response::new(body);
        edit(&mut response);
        response
    };
    let with_status = |response: &mut Res| *response.headers_mut() = status("0");
    let not_found = |response: &mut Res| *response.status_mut() = http::StatusCode::NOT_FOUND;
    let peek = PeekLayer::new;
    let but_one = peek().only_if(|head| head.uri.path() != "/a.B/C");
    for (layer, request, response, waits) in [
        (peek(), web::grpc("/a.B/C"), of(late(), |_| {}), true),
        (peek(), web::get("/a.B/C"), of(late(), |_| {}), false),
        (peek(), web::grpc("/a.B/C"), of(late(), with_status), false),
        (peek(), web::grpc("/a.B/C"), of(late(), not_found), false),
        (
            but_one.clone(),
            web::grpc("/a.B/C"),
            of(late(), |_| {}),
            false,
        ),
        (but_one, web::grpc("/a.B/D"), of(late(), |_| {}), true),
    ] {
        let (inner, _script) = Script::new().then(Step::ok(response)).build();
        let inner: Scripted<_, _, io::Error> = inner;
        let (took, response) = elapsed(layer.layer(inner).oneshot(request)).await;
        let response = response.unwrap();
        assert_eq!(took, if waits { SECOND } else { Duration::ZERO });
        let told = response.extensions().get::<Trailers>().is_some();
        assert_eq!(told, waits);
        assert_eq!(whole(response).await.1, Some(status("0")));
    }
}

#[tokio::test(start_paused = true)]
async fn dropped_while_it_waits_the_response_is_dropped() {
    let body = ScriptedBody::new().hang();
    let watch = body.watch();
    let (inner, _script) = script(body);
    let service = PeekLayer::new().layer(inner);
    let mut response = task::spawn(service.oneshot(web::grpc("/a.B/C")));
    assert_pending!(response.poll());
    settle().await;
    assert_pending!(response.poll());
    assert_eq!(watch.fate(), BodyFate::Open);
    drop(response);
    assert_eq!(watch.fate(), BodyFate::Dropped);
}

fn plain() -> Settings {
    Settings::standard()
        .backoff(Backoff::fixed(SECOND))
        .total_timeout(None)
}

/// Before: the answer. With it: another attempt, after what the trailers say.
#[tokio::test(start_paused = true)]
async fn a_retry_goes_by_it() {
    let retry = RetryLayer::builder().settings(plain()).build().unwrap();
    let pushed = |value: &'static str| {
        let told = [("grpc-status", "14"), ("grpc-retry-pushback-ms", value)];
        Step::ok(Response::new(ScriptedBody::new().trailers(fields(&told))))
    };
    for (first, peeks, calls, waited, text) in [
        (fails_at_once(), false, 1, Duration::ZERO, ""),
        (fails_at_once(), true, 2, SECOND, "hello"),
        (pushed("2500"), true, 2, SECOND * 5 / 2, "hello"),
        (pushed("-1"), true, 1, Duration::ZERO, ""),
        (
            Step::ok(Response::new(well())),
            true,
            1,
            Duration::ZERO,
            "hello",
        ),
    ] {
        let (inner, script) = Script::<Request<ReplayBody<Body>>, Res, io::Error>::new()
            .then(first)
            .then(Step::ok(Response::new(well())))
            .build();
        let layer = PeekLayer::new().only_if(move |_| peeks);
        let before = clock::now();
        let service = retry.layer(layer.layer(inner));
        let response = service.oneshot(web::grpc("/a.B/C")).await.unwrap();
        assert_eq!(clock::now() - before, waited);
        assert_eq!(script.call_count(), calls);
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.to_bytes(), text);
        script.assert_sound();
    }
}

#[tokio::test(start_paused = true)]
async fn a_hedge_goes_by_it() {
    let hedge = HedgeLayer::builder().after(SECOND);
    let (inner, script) = Script::<Request<ReplayBody<Body>>, Res, io::Error>::new()
        .then(fails_at_once().after(SECOND * 2))
        .then(Step::ok(Response::new(well())).after(SECOND * 2))
        .build();
    let service = hedge.build().unwrap().layer(PeekLayer::new().layer(inner));
    let mut request = web::grpc("/a.B/C");
    let key = HeaderValue::from_static("1f2e");
    request.headers_mut().insert("idempotency-key", key);
    let (took, response) = elapsed(service.oneshot(request)).await;
    assert_eq!(took, SECOND * 3);
    assert_eq!(whole(response.unwrap()).await.0, "hello");
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn readiness() {
    ReadinessProbe::new(
        || web::grpc("/a.B/C"),
        |_: &Request<Body>| Step::<Response<Body>, io::Error>::ok(web::response(200, "")),
    )
    .check(&PeekLayer::new())
    .await;
}
