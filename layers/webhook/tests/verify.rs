//! The layer before handlers of every kind: what reaches them, and what does
//! not.

use std::{
    collections::VecDeque,
    convert::Infallible,
    fmt,
    future::{Future, poll_fn},
    num::NonZeroUsize,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    task::Poll,
    time::Duration,
};

use buttress_core::{
    BoxError, Head, Refusal, RefusalKind,
    testing::{
        Fate, ReadinessProbe, Script, ScriptHandle, Scripted, Step, advance, settle,
        web::{self, BodyFate, ScriptedBody},
    },
};
use buttress_webhook::{
    Claim, ClaimKey, ClaimToken, Envelope, GitHub, Key, Message, OnStoreError, Reason, Repeat,
    ReplayStore, Scheme, Secret, SecretError, Sha256, SignError, Signer, Slack, Standard,
    StoreFuture, Stripe, Verified, Verify, VerifyBuilder, VerifyHandle, VerifyLayer, WholeBody,
    lookup_fn,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, request::Parts};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use tokio_test::{assert_pending, task};
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimitLayer, service_fn};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const OTHER: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBk=";
const NOW: u64 = 1_700_000_000;

fn secret(text: &str) -> Secret {
    Secret::new(text).unwrap()
}

fn now() -> Duration {
    Duration::from_secs(NOW)
}

fn standard() -> VerifyBuilder {
    VerifyLayer::builder(Standard::new())
        .secrets([secret(SECRET)])
        .wall_clock(now)
}

fn head(scheme: impl Scheme, text: &str, message: &Message<'_>) -> Parts {
    let signer = Signer::new(scheme, [secret(text)]).unwrap();
    let (mut parts, ()) = Request::post("/hooks").body(()).unwrap().into_parts();
    signer.sign(&mut parts, message).unwrap();
    parts
}

fn with<B>(parts: Parts, body: B) -> Request<B> {
    Request::from_parts(parts, body)
}

/// Signed at [`NOW`] by the layer's scheme and secret.
fn signed(id: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    signed_by(Standard::new(), SECRET, id, NOW, body)
}

fn signed_by(
    scheme: impl Scheme,
    text: &str,
    id: &str,
    timestamp: u64,
    body: impl Into<Bytes>,
) -> Request<Full<Bytes>> {
    let body = body.into();
    let message = Message {
        id,
        timestamp,
        body: &body,
    };
    with(head(scheme, text, &message), Full::new(body))
}

type Answer = Response<ScriptedBody>;
type Handler = Scripted<Request<WholeBody>, Answer, &'static str>;
type Handle = ScriptHandle<Request<WholeBody>, Answer, &'static str>;
type Written = Script<Request<WholeBody>, Answer, &'static str>;

fn answer(status: u16, body: ScriptedBody) -> Answer {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

fn script() -> Written {
    Script::new()
}

/// Answers everything with 200 and "done".
fn handler() -> (Handler, Handle) {
    script()
        .otherwise(|_| Step::ok(answer(200, ScriptedBody::new().data("done"))))
        .build()
}

/// Status, headers and the whole body.
async fn send<S, B, R>(service: &S, request: Request<B>) -> Response<String>
where
    S: Service<Request<B>, Response = Response<R>, Error: fmt::Debug> + Clone,
    R: Body<Error: fmt::Debug>,
{
    let response = service.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Response::from_parts(parts, String::from_utf8(body.into()).unwrap())
}

async fn status<S, B, R>(service: &S, request: Request<B>) -> u16
where
    S: Service<Request<B>, Response = Response<R>, Error: fmt::Debug> + Clone,
    R: Body<Error: fmt::Debug>,
{
    send(service, request).await.status().as_u16()
}

#[track_caller]
fn is_problem(response: &Response<String>, status: u16, reason: &str) {
    assert_eq!(response.status(), status, "{response:?}");
    assert_eq!(
        response.headers()["content-type"],
        "application/problem+json"
    );
    let problem: serde_json::Value = serde_json::from_str(response.body()).unwrap();
    assert_eq!(problem["status"], status);
    assert_eq!(problem["reason"], reason, "{problem}");
}

// What reaches the handler

#[tokio::test(start_paused = true)]
async fn the_handler_gets_the_very_bytes_and_who_sent_them() {
    let layer = standard()
        .secrets([secret(OTHER), secret(SECRET)])
        .build()
        .unwrap();
    let bodies = [
        Bytes::new(),
        Bytes::from_static(b"\xef\xbb\xbf{\"b\": 1,  \"a\": 2}\r\n"),
        Bytes::from_static("caf\u{e9} \u{1f3d7}".as_bytes()),
        Bytes::from_static(b"\0\xff\xfe\x80binary"),
        Bytes::from(
            (0..1024 * 1024)
                .map(|n| (n % 251) as u8)
                .collect::<Vec<_>>(),
        ),
    ];
    for (n, body) in bodies.into_iter().enumerate() {
        let (inner, script) = handler();
        let id = format!("msg_{n}");
        let response = send(&layer.layer(inner), signed(&id, body.clone())).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.body(), "done");
        let request = script.take_requests().pop().unwrap();
        assert_eq!(request.body().bytes(), &body);
        assert_eq!(request.uri(), "/hooks");
        let verified = request.extensions().get::<Verified>().unwrap();
        assert_eq!(verified.id.as_deref(), Some(&*id));
        assert_eq!(verified.timestamp, Some(NOW));
        assert_eq!(verified.key_index, 1);
        assert_eq!(verified.scheme, "standard");
        assert!(!verified.repeat);
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_in_pieces_is_put_together_and_keeps_its_trailers() {
    let (inner, script) = handler();
    let service = standard().build().unwrap().layer(inner);
    let trailers = HeaderMap::from_iter([(
        HeaderName::from_static("x-checksum"),
        HeaderValue::from_static("1"),
    )]);
    let (parts, _) = signed("msg_1", "first second").into_parts();
    let body = ScriptedBody::new()
        .data("first ")
        .wait(Duration::from_secs(2))
        .data("second")
        .trailers(trailers.clone());
    assert_eq!(status(&service, with(parts, body)).await, 200);
    let request = script.take_requests().pop().unwrap();
    let whole = request.into_body().collect().await.unwrap();
    assert_eq!(whole.trailers(), Some(&trailers));
    assert_eq!(whole.to_bytes(), "first second");
}

#[tokio::test(start_paused = true)]
async fn the_inner_services_errors_pass_through() {
    let (inner, _script) = script().then(Step::err("inner")).build();
    let service = standard().build().unwrap().layer(inner);
    let error = service.oneshot(signed("msg_1", "x")).await.unwrap_err();
    assert_eq!(error, "inner");
}

// What does not

#[tokio::test(start_paused = true)]
async fn each_class_is_told_apart() {
    let (inner, script) = handler();
    let service = standard().build().unwrap().layer(inner);
    let changed = |change: &dyn Fn(&mut HeaderMap)| {
        let mut request = signed("msg_1", "body");
        change(request.headers_mut());
        request
    };
    let signed_at = |timestamp| signed_by(Standard::new(), SECRET, "msg_1", timestamp, "body");
    let value = |text| HeaderValue::from_str(text).unwrap();
    let cases: [(&str, Request<Full<Bytes>>); 11] = [
        ("missing_id", changed(&|all| drop(all.remove("webhook-id")))),
        (
            "missing_timestamp",
            changed(&|all| drop(all.remove("webhook-timestamp"))),
        ),
        (
            "missing_signature",
            changed(&|all| drop(all.remove("webhook-signature"))),
        ),
        (
            "malformed",
            changed(&|all| drop(all.insert("webhook-timestamp", value("1700000000.0")))),
        ),
        (
            "malformed",
            changed(&|all| drop(all.insert("webhook-signature", value("v1,AAAA")))),
        ),
        (
            "unsupported_scheme",
            changed(&|all| drop(all.insert("webhook-signature", value("v1a,AAAA")))),
        ),
        (
            "duplicate_header",
            changed(&|all| assert!(all.append("webhook-id", value("msg_2")))),
        ),
        (
            "signature_mismatch",
            changed(&|all| drop(all.insert("webhook-id", value("msg_2")))),
        ),
        (
            "signature_mismatch",
            signed_by(Standard::new(), OTHER, "msg_1", NOW, "body"),
        ),
        ("timestamp_too_old", signed_at(NOW - 301)),
        ("timestamp_too_new", signed_at(NOW + 301)),
    ];
    for (reason, request) in cases {
        let response = send(&service, request).await;
        is_problem(&response, 401, reason);
        assert!(!response.headers().contains_key("retry-after"));
    }
    assert_eq!(script.call_count(), 0);
    for (n, timestamp) in [NOW - 300, NOW + 300].into_iter().enumerate() {
        let request = signed_by(Standard::new(), SECRET, &n.to_string(), timestamp, "body");
        assert_eq!(status(&service, request).await, 200);
    }
}

/// A scheme of one's own: says what it is told to say, and counts how often it
/// is asked.
#[derive(Clone, Debug)]
struct Says(Reason, Arc<AtomicUsize>);

impl Scheme for Says {
    fn name(&self) -> &'static str {
        "says"
    }
    fn key(&self, secret: &Secret) -> Result<Key, SecretError> {
        Key::of(secret)
    }
    fn sign(&self, _: &mut Parts, _: &Message<'_>, _: &[Key]) -> Result<(), SignError> {
        Ok(())
    }
    fn read<'r>(&self, _: Head<'r>) -> Result<Envelope<'r>, Reason> {
        self.1.fetch_add(1, SeqCst);
        Err(self.0)
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_scheme_of_ones_own_says_is_told() {
    for reason in [Reason::CoverageMissing, Reason::MissingDigest] {
        let layer = VerifyLayer::builder(Says(reason, Arc::default()))
            .secrets([secret(SECRET)])
            .build()
            .unwrap();
        let response = send(&layer.layer(handler().0), web::post("/", "")).await;
        is_problem(&response, 401, reason.as_str());
    }
}

#[tokio::test(start_paused = true)]
async fn two_mismatches_are_equal_byte_for_byte() {
    let service = standard().build().unwrap().layer(handler().0);
    let mut body = signed("msg_1", "body");
    *body.body_mut() = Full::new(Bytes::from_static(b"ybod"));
    let key = signed_by(Standard::new(), OTHER, "another", NOW - 7, vec![b'x'; 5000]);
    let (one, other) = (send(&service, body).await, send(&service, key).await);
    is_problem(&one, 401, "signature_mismatch");
    assert_eq!(one.status(), other.status());
    assert_eq!(one.headers(), other.headers());
    assert_eq!(one.body(), other.body());
}

#[tokio::test(start_paused = true)]
async fn grpc_gets_its_own_kind_of_answer() {
    let service = standard().build().unwrap().layer(handler().0);
    let response = send(&service, web::grpc("/hooks.Hooks/Receive")).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["grpc-status"], "16");
    assert_eq!(response.body(), "");

    // Nor can a repeat be acknowledged with nothing.
    let grpc = || {
        let mut request = signed("msg_1", "x");
        let grpc = HeaderValue::from_static("application/grpc");
        request.headers_mut().insert("content-type", grpc);
        request
    };
    assert_eq!(send(&service, grpc()).await.body(), "done");
    let repeated = send(&service, grpc()).await;
    assert_eq!(repeated.headers()["grpc-status"], "6");
}

#[tokio::test(start_paused = true)]
async fn a_responder_of_ones_own_answers() {
    let layer = standard()
        .responder(|refusal: &Refusal, request: Head<'_>| {
            let text = format!("{} {}", refusal.reason(), request.uri);
            let mut response = Response::new(Bytes::from(text));
            *response.status_mut() = StatusCode::IM_A_TEAPOT;
            response
        })
        .build()
        .unwrap();
    let response = send(&layer.layer(handler().0), web::post("/a", "")).await;
    assert_eq!(response.status(), 418);
    assert_eq!(response.body(), "missing_id /a");
}

// Sizes

#[tokio::test(start_paused = true)]
async fn what_is_too_large_is_refused_before_anything_is_computed() {
    let (inner, script) = handler();
    let read = Arc::new(AtomicUsize::new(0));
    let service = VerifyLayer::builder(Says(Reason::Malformed, Arc::clone(&read)))
        .secrets([secret(SECRET)])
        .max_body(1000)
        .build()
        .unwrap()
        .layer(inner);

    // By what the body says of itself.
    let response = send(&service, web::post("/", vec![0; 1001])).await;
    is_problem(&response, 413, "body_too_large");

    // By the header, where the body does not say it: not a byte is read.
    let body = ScriptedBody::new().hang();
    let watch = body.watch();
    let mut request = Request::new(body);
    let length = HeaderValue::from_static("1001");
    request.headers_mut().insert("content-length", length);
    is_problem(&send(&service, request).await, 413, "body_too_large");
    assert_eq!(watch.fate(), BodyFate::Dropped);

    // By what comes: the rest is not read.
    let body = ScriptedBody::new()
        .data(vec![0; 600])
        .wait(Duration::from_secs(1))
        .data(vec![0; 401])
        .hang();
    let watch = body.watch();
    is_problem(
        &send(&service, Request::new(body)).await,
        413,
        "body_too_large",
    );
    assert_eq!(watch.fate(), BodyFate::Dropped);

    assert_eq!(read.load(SeqCst), 0);
    let just = ScriptedBody::new().data(vec![0; 600]).data(vec![0; 400]);
    assert_eq!(status(&service, Request::new(just)).await, 401);
    assert_eq!(read.load(SeqCst), 1);
    assert_eq!(script.call_count(), 0);
}

#[tokio::test(start_paused = true)]
async fn how_large_a_body_may_be_is_changed_while_it_serves() {
    let (inner, script) = handler();
    let layer = standard().build().unwrap();
    let handle = layer.handle();
    assert_eq!(handle.max_body(), 1024 * 1024);
    handle.set_max_body(4).unwrap();
    assert_eq!(handle.max_body(), 4);
    let service = layer.layer(inner);
    assert_eq!(status(&service, signed("1", "four")).await, 200);
    assert_eq!(status(&service, signed("2", "fives")).await, 413);

    // What has begun keeps what it began with, in both ways.
    let slow = |id: &str, text: &'static str| {
        let (parts, _) = signed(id, text).into_parts();
        let body = ScriptedBody::new().wait(Duration::from_secs(1)).data(text);
        send(&service, Request::from_parts(parts, body))
    };
    let (four, ()) = tokio::join!(slow("3", "four"), async {
        handle.set_max_body(3).unwrap();
    });
    assert_eq!(four.status(), 200);
    let (five, ()) = tokio::join!(slow("4", "fives"), async {
        handle.set_max_body(5).unwrap();
    });
    assert_eq!(five.status(), 413);
    assert_eq!(status(&service, signed("4", "fives")).await, 200);

    let error = handle.set_max_body(0).unwrap_err();
    assert!(error.to_string().contains("body"), "{error}");
    assert_eq!(handle.max_body(), 5);
    assert_eq!(script.call_count(), 3);
}

#[tokio::test(start_paused = true)]
async fn who_ends_a_body_may_say_why() {
    let (inner, script) = handler();
    let service = standard().build().unwrap().layer(inner);
    let (parts, _) = signed("msg_1", "first").into_parts();
    let body = ScriptedBody::new().data("first").fail("stalled");
    let body = body.map_err(|_| BoxError::from(Refusal::new(RefusalKind::RequestTimeout)));
    let response = send(&service, with(parts, body)).await;
    is_problem(&response, 408, "request_timeout");
    assert_eq!(script.call_count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_breaks_is_no_shorter_message() {
    let (inner, script) = handler();
    let service = standard().build().unwrap().layer(inner);
    let (parts, _) = signed("msg_1", "first").into_parts();
    let body = ScriptedBody::new().data("first").fail("reset");
    let response = send(&service, with(parts, body)).await;
    is_problem(&response, 400, "body_broken");
    assert_eq!(script.call_count(), 0);
    assert_eq!(status(&service, signed("msg_1", "first")).await, 200);
}

// Repeats

#[tokio::test(start_paused = true)]
async fn a_repeat_of_what_is_done_is_acknowledged_without_the_handler() {
    let (inner, script) = handler();
    let layer = standard().build().unwrap();
    let service = layer.layer(inner);
    assert_eq!(send(&service, signed("msg_1", "x")).await.body(), "done");

    let repeated = send(&service, signed("msg_1", "x")).await;
    assert_eq!(repeated.status(), 200);
    assert_eq!(repeated.body(), "");
    // The next attempt has a new time, and the same id.
    let later = signed_by(Standard::new(), SECRET, "msg_1", NOW + 60, "x");
    assert_eq!(send(&service, later).await.body(), "");
    // It is the id that is known.
    assert_eq!(send(&service, signed("msg_1", "another")).await.body(), "");
    // For all services of the layer.
    let (another, other_script) = handler();
    let clone = layer.clone().layer(another);
    assert_eq!(send(&clone, signed("msg_1", "x")).await.body(), "");
    assert_eq!(script.call_count() + other_script.call_count(), 1);

    // Twice the tolerance and a second later it could not pass in any case.
    advance(Duration::from_secs(600)).await;
    assert_eq!(send(&service, signed("msg_1", "x")).await.body(), "");
    advance(Duration::from_secs(1)).await;
    assert_eq!(send(&service, signed("msg_1", "x")).await.body(), "done");
}

#[tokio::test(start_paused = true)]
async fn a_repeat_of_what_is_in_progress_comes_again() {
    let (inner, script) = script()
        .then(Step::ok(answer(200, ScriptedBody::new().data("done"))).held())
        .build();
    let layer = standard().build().unwrap();
    let service = layer.layer(inner);
    let mut first = task::spawn(service.clone().oneshot(signed("msg_1", "x")));
    assert_pending!(first.poll());

    let response = send(&service, signed("msg_1", "x")).await;
    is_problem(&response, 409, "in_progress");
    assert_eq!(response.headers()["retry-after"], "1");

    script.release(0);
    let answered = first.await.unwrap();
    // Not done before its body is.
    let response = send(&service, signed("msg_1", "x")).await;
    is_problem(&response, 409, "in_progress");
    answered.into_body().collect().await.unwrap();
    let response = send(&service, signed("msg_1", "x")).await;
    assert_eq!((response.status().as_u16(), &**response.body()), (200, ""));
    assert_eq!(script.call_count(), 1);
    assert_eq!(layer.handle().claims(), 1);
}

#[tokio::test(start_paused = true)]
async fn where_no_id_is_signed_the_message_itself_is_known() {
    let (inner, script) = handler();
    let layer = VerifyLayer::builder(Slack)
        .secrets([secret(SECRET)])
        .wall_clock(now)
        .build()
        .unwrap();
    let service = layer.layer(inner);
    let slack = |timestamp, body: &'static str| signed_by(Slack, SECRET, "-", timestamp, body);
    assert_eq!(status(&service, slack(NOW, "x")).await, 200);
    let response = send(&service, slack(NOW, "x")).await;
    is_problem(&response, 409, "replayed");
    assert!(!response.headers().contains_key("retry-after"));
    assert_eq!(status(&service, slack(NOW, "y")).await, 200);
    assert_eq!(status(&service, slack(NOW + 1, "x")).await, 200);
    assert_eq!(script.call_count(), 3);
}

/// In a rotation a message has two signatures; who replays it with either one
/// alone, or after the secrets were replaced, replays the same message.
#[tokio::test(start_paused = true)]
async fn another_signature_of_the_same_message_is_a_repeat() {
    let layer = VerifyLayer::builder(Stripe)
        .secrets([secret(SECRET), secret(OTHER)])
        .wall_clock(now)
        .build()
        .unwrap();
    let (inner, script) = handler();
    let service = layer.layer(inner);
    let stripe = |text| signed_by(Stripe, text, "-", NOW, "x");
    assert_eq!(status(&service, stripe(SECRET)).await, 200);
    assert_eq!(status(&service, stripe(OTHER)).await, 409);
    layer.handle().set_secrets([secret(OTHER)]).unwrap();
    assert_eq!(status(&service, stripe(SECRET)).await, 401);
    assert_eq!(status(&service, stripe(OTHER)).await, 409);
    assert_eq!(script.call_count(), 1);
}

#[tokio::test(start_paused = true)]
async fn where_neither_id_nor_time_is_signed_it_is_off_unless_asked_for() {
    let (inner, script) = handler();
    let github = || VerifyLayer::builder(GitHub).secrets([secret(SECRET)]);
    let request = || signed_by(GitHub, SECRET, "-", NOW, "x");
    let service = github().build().unwrap().layer(inner.clone());
    for _ in 0..3 {
        assert_eq!(send(&service, request()).await.body(), "done");
    }
    let layer = github().replay_protection(true).build().unwrap();
    let service = layer.layer(inner);
    assert_eq!(status(&service, request()).await, 200);
    assert_eq!(status(&service, request()).await, 409);
    advance(Duration::from_secs(601)).await;
    assert_eq!(status(&service, request()).await, 200);
    assert_eq!(script.call_count(), 5);

    let off = standard().replay_protection(false).build().unwrap();
    let service = off.layer(handler().0);
    for _ in 0..3 {
        assert_eq!(send(&service, signed("msg_1", "x")).await.body(), "done");
    }
    assert_eq!(off.handle().claims(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_a_repeat_gets_can_be_set() {
    let layer = standard()
        .completed(Repeat::Pass)
        .in_progress(Repeat::Acknowledge)
        .build()
        .unwrap();
    let (inner, script) = script()
        .then(Step::ok(answer(200, ScriptedBody::new())).held())
        .then(Step::ok(answer(200, ScriptedBody::new().data("again"))))
        .build();
    let service = layer.layer(inner);
    let mut first = task::spawn(service.clone().oneshot(signed("msg_1", "x")));
    assert_pending!(first.poll());
    let response = send(&service, signed("msg_1", "x")).await;
    assert_eq!((response.status().as_u16(), &**response.body()), (200, ""));
    script.release(0);
    first.await.unwrap().into_body().collect().await.unwrap();
    assert_eq!(send(&service, signed("msg_1", "x")).await.body(), "again");
    let told = script
        .take_requests()
        .iter()
        .map(|request| request.extensions().get::<Verified>().unwrap().repeat)
        .collect::<Vec<_>>();
    assert_eq!(told, [false, true]);

    let layer = standard().completed(Repeat::Refuse).build().unwrap();
    let service = layer.layer(handler().0);
    assert_eq!(status(&service, signed("msg_1", "x")).await, 200);
    is_problem(&send(&service, signed("msg_1", "x")).await, 409, "replayed");
}

#[tokio::test(start_paused = true)]
async fn a_forged_request_does_not_stand_in_a_genuine_ones_way() {
    let (inner, script) = handler();
    let layer = standard().build().unwrap();
    let service = layer.layer(inner);
    let forged = signed_by(Standard::new(), OTHER, "msg_1", NOW, "x");
    assert_eq!(status(&service, forged).await, 401);
    assert_eq!(layer.handle().claims(), 0);
    assert_eq!(send(&service, signed("msg_1", "x")).await.body(), "done");
    assert_eq!(script.call_count(), 1);
}

#[tokio::test(start_paused = true)]
async fn at_the_ceiling_what_counts_is_kept() {
    let (inner, script) = handler();
    let layer = standard()
        .max_replays(NonZeroUsize::new(2).unwrap())
        .build()
        .unwrap();
    let service = layer.layer(inner);
    assert_eq!(status(&service, signed("1", "x")).await, 200);
    advance(Duration::from_secs(10)).await;
    assert_eq!(status(&service, signed("2", "x")).await, 200);
    let response = send(&service, signed("3", "x")).await;
    is_problem(&response, 503, "replays_full");
    assert_eq!(response.headers()["retry-after"], "591");
    assert_eq!(layer.handle().claims(), 2);
    // Neither is forgotten for it.
    for id in ["1", "2"] {
        assert_eq!(send(&service, signed(id, "x")).await.body(), "");
    }
    advance(Duration::from_secs(591)).await;
    assert_eq!(send(&service, signed("3", "x")).await.body(), "done");
    assert_eq!(send(&service, signed("2", "x")).await.body(), "");
    assert_eq!(script.call_count(), 3);
}

#[tokio::test(start_paused = true)]
async fn endpoints_are_told_apart_where_it_is_asked_for() {
    let to = |path: &'static str| {
        let mut request = signed("msg_1", "x");
        *request.uri_mut() = path.parse().unwrap();
        request
    };
    let service = standard().build().unwrap().layer(handler().0);
    assert_eq!(send(&service, to("/a")).await.body(), "done");
    assert_eq!(send(&service, to("/b")).await.body(), "");

    let layer = standard()
        .endpoint(|request| request.uri.path().to_owned())
        .build()
        .unwrap();
    let service = layer.layer(handler().0);
    let long = Box::leak(format!("/{}", "l".repeat(3000)).into_boxed_str());
    for path in ["/a", "/b", &*long] {
        assert_eq!(send(&service, to(path)).await.body(), "done");
        assert_eq!(send(&service, to(path)).await.body(), "");
    }
}

// What the handler does

/// After each of these the same message reaches the handler again.
#[tokio::test(start_paused = true)]
async fn when_the_handler_fails_the_message_may_come_again() {
    for code in [199, 301, 400, 401, 404, 410, 429, 500, 503] {
        // A status of 1xx cannot be sent, but is none of the good ones either.
        let (inner, script) = script()
            .then(Step::ok(answer(code, ScriptedBody::new())))
            .then(Step::ok(answer(204, ScriptedBody::new())))
            .build();
        let layer = standard().build().unwrap();
        let service = layer.layer(inner);
        assert_eq!(status(&service, signed("msg_1", "x")).await, code);
        assert_eq!(layer.handle().claims(), 0);
        assert_eq!(status(&service, signed("msg_1", "x")).await, 204);
        assert_eq!(status(&service, signed("msg_1", "x")).await, 200);
        assert_eq!(script.call_count(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_or_a_panic_or_a_departure_releases_the_claim() {
    let steps: [(Step<Answer, &'static str>, Fate); 4] = [
        (Step::err("down"), Fate::Failed),
        (Step::panic("in the future"), Fate::Panicked),
        (Step::panic_in_call("in call"), Fate::Panicked),
        (Step::hang(), Fate::Dropped),
    ];
    for (step, fate) in steps {
        let (inner, script) = script()
            .then(step)
            .otherwise(|_| Step::ok(answer(200, ScriptedBody::new().data("done"))))
            .build();
        let layer = standard().build().unwrap();
        let service = layer.layer(inner);
        let call = tokio::spawn(service.clone().oneshot(signed("msg_1", "x")));
        settle().await;
        assert_eq!(layer.handle().claims(), usize::from(fate == Fate::Dropped));
        call.abort();
        settle().await;
        assert_eq!(script.count(fate), 1, "{fate:?}");
        assert_eq!(layer.handle().claims(), 0);
        assert_eq!(send(&service, signed("msg_1", "x")).await.body(), "done");
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_body_decides() {
    let grpc = |code| {
        let code = HeaderValue::from_static(code);
        HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), code)])
    };
    let breaks = ScriptedBody::new().data("some").fail("reset");
    let fails = ScriptedBody::new().trailers(grpc("13"));
    let holds = ScriptedBody::new().trailers(grpc("0"));
    for (body, claims) in [(breaks, 0), (fails, 0), (holds, 1)] {
        let (inner, _script) = script().then(Step::ok(answer(200, body))).build();
        let layer = standard().build().unwrap();
        let response = layer
            .layer(inner)
            .oneshot(signed("msg_1", "x"))
            .await
            .unwrap();
        assert_eq!(layer.handle().claims(), 1);
        let _ = response.into_body().collect().await;
        assert_eq!(layer.handle().claims(), claims);
    }

    // Who leaves after a good head does not undo it.
    let (inner, script) = script()
        .then(Step::ok(answer(200, ScriptedBody::new().hang())))
        .build();
    let service = standard().build().unwrap().layer(inner);
    let response = service.clone().oneshot(signed("msg_1", "x")).await.unwrap();
    drop(response);
    assert_eq!(send(&service, signed("msg_1", "x")).await.status(), 200);
    assert_eq!(script.call_count(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_done_can_be_set() {
    let layer = standard()
        .completes(|status, headers| status == 409 || headers.contains_key("x-done"))
        .build()
        .unwrap();
    let (inner, script) = script()
        .then(Step::ok(answer(200, ScriptedBody::new())))
        .then(Step::ok(answer(409, ScriptedBody::new())))
        .build();
    let service = layer.layer(inner);
    assert_eq!(status(&service, signed("msg_1", "x")).await, 200);
    assert_eq!(status(&service, signed("msg_1", "x")).await, 409);
    let acknowledged = send(&service, signed("msg_1", "x")).await;
    assert_eq!(acknowledged.status(), 200);
    assert_eq!(script.call_count(), 2);
}

#[test]
fn of_fifty_copies_at_once_one_reaches_the_handler() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .build()
        .unwrap();
    for round in 0..20 {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let inner = service_fn(move |_: Request<WholeBody>| {
            let calls = Arc::clone(&counted);
            async move {
                calls.fetch_add(1, SeqCst);
                for _ in 0..20 {
                    tokio::task::yield_now().await;
                }
                Ok::<_, Infallible>(web::response(200, "done"))
            }
        });
        let service = standard().build().unwrap().layer(inner);
        let tasks: Vec<_> = (0..50)
            .map(|_| {
                let service = service.clone();
                runtime.spawn(async move { send(&service, signed("msg_1", "x")).await })
            })
            .collect();
        let mut done = 0;
        for task in tasks {
            let response = runtime.block_on(task).unwrap();
            match (response.status().as_u16(), &**response.body()) {
                (200, "done") => done += 1,
                (200, "") | (409, _) => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((done, calls.load(SeqCst)), (1, 1), "round {round}");
    }
}

// Readiness and cancellation

#[tokio::test(start_paused = true)]
async fn it_treats_readiness_as_tower_demands() {
    let signed = || {
        let (parts, body) = signed("msg_1", "x").into_parts();
        let bytes = body.collect();
        let bytes = futures_free(bytes);
        with(parts, WholeBody::new(bytes))
    };
    let wrong = || Request::new(WholeBody::new(Bytes::from_static(b"x")));
    let large = || Request::new(WholeBody::new(Bytes::from(vec![0; 2000])));
    let requests: [fn() -> Request<WholeBody>; 3] = [signed, wrong, large];
    for request in requests {
        let layer = standard()
            .replay_protection(false)
            .max_body(1000)
            .build()
            .unwrap();
        ReadinessProbe::new(request, |_: &Request<WholeBody>| {
            Step::<_, &str>::ok(web::response(200, "done"))
        })
        .check(&layer)
        .await;
    }
}

/// What is there at once.
fn futures_free(
    collected: impl Future<Output = Result<http_body_util::Collected<Bytes>, Infallible>>,
) -> Bytes {
    let mut task = task::spawn(collected);
    match task.poll() {
        Poll::Ready(Ok(whole)) => whole.to_bytes(),
        _ => panic!("it is there at once"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_slot_is_held_while_the_body_comes_and_given_back() {
    let (inner, script) = handler();
    let service = ConcurrencyLimitLayer::new(1).layer(inner);
    let service = standard().build().unwrap().layer(service);
    let (parts, _) = signed("msg_1", "x").into_parts();

    let mut first = service.clone();
    poll_fn(|cx| Service::<Request<ScriptedBody>>::poll_ready(&mut first, cx))
        .await
        .unwrap();
    let slow = with(parts, ScriptedBody::new().hang());
    let mut call = task::spawn(first.call(slow));
    assert_pending!(call.poll());

    let mut second = task::spawn(service.clone().oneshot(signed("msg_2", "x")));
    assert_pending!(second.poll());
    drop(call);
    assert!(second.is_woken());
    let response = second.await.unwrap();
    response.into_body().collect().await.unwrap();
    // A refusal gives it back, too.
    assert_eq!(status(&service, web::post("/", "x")).await, 401);
    assert_eq!(status(&service, signed("msg_3", "x")).await, 200);
    assert_eq!(script.call_count(), 2);
}

#[tokio::test(start_paused = true)]
async fn dropped_at_any_await_it_leaves_nothing() {
    // While the body comes, while the secrets are looked up, while the handler
    // works.
    let lookup = lookup_fn(
        |_| Some(1),
        |_: i32| async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            Ok(Some(vec![secret(SECRET)]))
        },
    );
    let layer = VerifyLayer::builder(Standard::new())
        .lookup(lookup)
        .wall_clock(now)
        .build()
        .unwrap();
    let (inner, script) = script()
        .otherwise(|_| Step::ok(answer(200, ScriptedBody::new())).after(Duration::from_secs(5)))
        .build();
    let service = layer.layer(inner);
    let mut fates = Vec::new();
    for after in [1, 7, 12] {
        layer.handle().forget_secrets();
        let (parts, _) = signed("msg_1", "x").into_parts();
        let body = ScriptedBody::new().wait(Duration::from_secs(5)).data("x");
        let watch = body.watch();
        let call = tokio::spawn(service.clone().oneshot(with(parts, body)));
        advance(Duration::from_secs(after)).await;
        fates.push((watch.fate(), script.call_count(), layer.handle().claims()));
        call.abort();
        settle().await;
        assert_eq!(layer.handle().claims(), 0);
        assert_eq!(script.in_flight(), 0);
        assert_eq!(script.reserved(), 0);
        assert_ne!(watch.fate(), BodyFate::Open);
    }
    assert_eq!(
        fates,
        [
            (BodyFate::Open, 0, 0),
            (BodyFate::Complete, 0, 0),
            (BodyFate::Complete, 1, 1),
        ]
    );
    assert_eq!(status(&service, signed("msg_1", "x")).await, 200);
}

// While it serves

#[tokio::test(start_paused = true)]
async fn secrets_are_replaced_while_it_serves() {
    let layer = standard().build().unwrap();
    let service = layer.layer(handler().0);
    let old = |id: &str| signed(id, "x");
    let new = |id: &str| signed_by(Standard::new(), OTHER, id, NOW, "x");
    assert_eq!(status(&service, old("1")).await, 200);
    assert_eq!(status(&service, new("2")).await, 401);

    let handle = layer.handle();
    handle.set_secrets([secret(OTHER), secret(SECRET)]).unwrap();
    assert_eq!(status(&service, old("3")).await, 200);
    assert_eq!(status(&service, new("4")).await, 200);

    handle.set_secrets([secret(OTHER)]).unwrap();
    assert_eq!(status(&service, old("5")).await, 401);
    assert_eq!(status(&service, new("6")).await, 200);

    // What cannot be leaves the old ones.
    assert!(handle.set_secrets([]).is_err());
    assert!(handle.set_secrets([secret("not base64!")]).is_err());
    assert_eq!(status(&service, new("7")).await, 200);
}

#[tokio::test(start_paused = true)]
async fn the_tolerance_is_changed_while_it_serves() {
    let layer = standard().name("orders").build().unwrap();
    let handle: VerifyHandle = layer.handle();
    let service = layer.layer(handler().0);
    let at = |id: &str, timestamp| signed_by(Standard::new(), SECRET, id, timestamp, "x");
    assert_eq!(handle.name(), "orders");
    assert_eq!(handle.scheme(), "standard");
    assert_eq!(handle.tolerance(), Duration::from_secs(300));
    assert_eq!(status(&service, at("1", NOW - 11)).await, 200);
    handle.set_tolerance(Duration::from_secs(10)).unwrap();
    assert_eq!(status(&service, at("2", NOW - 11)).await, 401);
    assert_eq!(status(&service, at("3", NOW - 10)).await, 200);
    for wrong in [
        Duration::ZERO,
        Duration::from_millis(1500),
        Duration::from_secs(367 * 86_400),
    ] {
        assert!(handle.set_tolerance(wrong).is_err());
    }
    assert_eq!(handle.tolerance(), Duration::from_secs(10));
    // What is done is remembered as before for 601 seconds, and then for 21.
    advance(Duration::from_secs(600)).await;
    assert_eq!(send(&service, at("3", NOW)).await.body(), "");
    assert_eq!(send(&service, at("4", NOW)).await.body(), "done");
    advance(Duration::from_secs(20)).await;
    assert_eq!(send(&service, at("4", NOW)).await.body(), "");
    advance(Duration::from_secs(1)).await;
    assert_eq!(send(&service, at("4", NOW)).await.body(), "done");
}

/// What is from a clock that is ahead is forgotten sooner by a shorter
/// tolerance, and was new again when its own time came.
#[tokio::test(start_paused = true)]
async fn what_passed_by_a_longer_tolerance_does_not_pass_again() {
    let start = tokio::time::Instant::now();
    let layer = standard().wall_clock(move || now() + start.elapsed());
    let layer = layer.build().unwrap();
    let service = layer.layer(handler().0);
    let ahead = |id: &str| signed_by(Standard::new(), SECRET, id, NOW + 300, "x");
    assert_eq!(send(&service, ahead("1")).await.body(), "done");
    let handle = layer.handle();
    for tolerance in [200, 10, 100, 10] {
        let tolerance = Duration::from_secs(tolerance);
        handle.set_tolerance(tolerance).unwrap();
        assert_eq!(handle.tolerance(), tolerance);
    }
    assert_eq!(status(&service, ahead("2")).await, 401);
    advance(Duration::from_secs(310)).await;
    assert_eq!(send(&service, ahead("2")).await.body(), "done");
    assert_eq!(send(&service, ahead("1")).await.body(), "");
}

// Lookups

#[derive(Clone, Default)]
struct Database {
    asked: Arc<Mutex<Vec<String>>>,
    down: Arc<AtomicUsize>,
}

impl Database {
    fn layer(&self, change: impl FnOnce(VerifyBuilder) -> VerifyBuilder) -> VerifyLayer {
        let database = self.clone();
        let lookup = lookup_fn(
            |request| Some(request.headers.get("x-tenant")?.to_str().ok()?.to_owned()),
            move |tenant: String| {
                let database = database.clone();
                async move {
                    database.asked.lock().unwrap().push(tenant.clone());
                    tokio::task::yield_now().await;
                    if database.down.load(SeqCst) > 0 {
                        return Err("out of reach".into());
                    }
                    Ok(match &*tenant {
                        "empty" => Some(vec![]),
                        "other" => Some(vec![secret(OTHER)]),
                        "broken" => Some(vec![secret("not base64!")]),
                        known if known.starts_with("known") => Some(vec![secret(SECRET)]),
                        _ => None,
                    })
                }
            },
        );
        change(
            VerifyLayer::builder(Standard::new())
                .lookup(lookup)
                .wall_clock(now),
        )
        .build()
        .unwrap()
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

fn of(tenant: &str, mut request: Request<Full<Bytes>>) -> Request<Full<Bytes>> {
    let tenant = HeaderValue::from_str(tenant).unwrap();
    request.headers_mut().insert("x-tenant", tenant);
    request
}

#[tokio::test(start_paused = true)]
async fn secrets_are_looked_up_and_kept_for_a_while() {
    let database = Database::default();
    let layer = database.layer(|builder| builder);
    let service = layer.layer(handler().0);
    let mut ids = (0..).map(|n| n.to_string());
    let mut next = |tenant: &str| of(tenant, signed(&ids.next().unwrap(), "x"));

    assert_eq!(status(&service, next("known")).await, 200);
    assert_eq!(database.asked(), ["known"]);
    advance(Duration::from_secs(59)).await;
    assert_eq!(status(&service, next("known")).await, 200);
    assert_eq!(database.asked(), [""; 0]);
    advance(Duration::from_secs(1)).await;
    assert_eq!(status(&service, next("known")).await, 200);
    assert_eq!(database.asked(), ["known"]);

    // That there is no such tenant, for less long.
    for _ in 0..2 {
        assert_eq!(status(&service, next("unknown")).await, 401);
        assert_eq!(status(&service, next("empty")).await, 401);
    }
    assert_eq!(database.asked(), ["unknown", "empty"]);
    advance(Duration::from_secs(10)).await;
    assert_eq!(status(&service, next("unknown")).await, 401);
    assert_eq!(database.asked(), ["unknown"]);

    layer.handle().forget_secrets();
    assert_eq!(status(&service, next("known")).await, 200);
    assert_eq!(database.asked(), ["known"]);
    assert!(layer.handle().set_secrets([secret(SECRET)]).is_err());
}

#[tokio::test(start_paused = true)]
async fn an_unknown_tenant_is_a_mismatch_like_any_other() {
    let database = Database::default();
    let layer = database.layer(|builder| builder);
    let service = layer.layer(handler().0);
    let mismatch = send(&service, of("other", signed("1", "x"))).await;
    is_problem(&mismatch, 401, "signature_mismatch");
    // The key that it is tried with is no key.
    let zeros = Secret::from_bytes([0; 32]).unwrap();
    let message = Message {
        id: "1",
        timestamp: NOW,
        body: b"x",
    };
    let (mut parts, ()) = Request::new(()).into_parts();
    let signer = Signer::new(Standard::new(), [zeros]).unwrap();
    signer.sign(&mut parts, &message).unwrap();
    let zeros = with(parts, Full::new(Bytes::from_static(b"x")));
    let unknown = [
        of("unknown", signed("1", "x")),
        of("empty", signed("1", "x")),
        signed("1", "x"),
        of("unknown", zeros),
    ];
    for request in unknown {
        let response = send(&service, request).await;
        assert_eq!(response.status(), mismatch.status());
        assert_eq!(response.headers(), mismatch.headers());
        assert_eq!(response.body(), mismatch.body());
    }
}

#[tokio::test(start_paused = true)]
async fn a_lookup_that_fails_is_not_kept() {
    let database = Database::default();
    let (inner, script) = handler();
    let layer = database.layer(|builder| builder);
    let service = layer.layer(inner);
    database.down.store(1, SeqCst);
    let request = || of("known", signed("1", "x"));
    is_problem(&send(&service, request()).await, 503, "lookup_failed");
    is_problem(&send(&service, request()).await, 503, "lookup_failed");
    assert_eq!(database.asked().len(), 2);
    database.down.store(0, SeqCst);
    assert_eq!(status(&service, request()).await, 200);
    // Secrets that are none of the scheme are an error of ours, too.
    let broken = send(&service, of("broken", signed("2", "x"))).await;
    is_problem(&broken, 503, "lookup_failed");
    assert_eq!(script.call_count(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_genuine_is_not_looked_up() {
    let database = Database::default();
    let layer = database.layer(|builder| builder.max_body(100));
    let service = layer.layer(handler().0);
    let old = signed_by(Standard::new(), SECRET, "1", NOW - 301, "x");
    assert_eq!(
        status(&service, of("known", web::post("/", "x"))).await,
        401
    );
    assert_eq!(status(&service, of("known", old)).await, 401);
    let large = of("known", signed("1", vec![0; 101]));
    assert_eq!(status(&service, large).await, 413);
    assert_eq!(database.asked(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn what_was_looked_up_is_bounded() {
    let database = Database::default();
    let most = NonZeroUsize::new(50).unwrap();
    let layer = database.layer(|builder| builder.max_tenants(most));
    let service = layer.layer(handler().0);
    let ask = async |tenant: String| status(&service, of(&tenant, web_signed(&tenant))).await;
    // One that comes again outlives a flood of those that come once.
    for _ in 0..3 {
        assert_eq!(ask("known".to_owned()).await, 200);
    }
    for n in 0..1000 {
        assert_eq!(ask(format!("flood {n}")).await, 401);
    }
    assert_eq!(database.asked().len(), 1001);
    assert_eq!(ask("known".to_owned()).await, 200);
    assert_eq!(database.asked(), [""; 0]);
    // Whatever is left of them, it is no more than fits.
    for n in (0..1000).rev() {
        ask(format!("flood {n}")).await;
    }
    let kept = 1000 - database.asked().len();
    assert!((1..=50).contains(&kept), "{kept} were kept");
}

fn web_signed(id: &str) -> Request<Full<Bytes>> {
    signed(&id.replace(' ', "_"), "x")
}

#[tokio::test(start_paused = true)]
async fn tenants_do_not_stand_in_each_others_way() {
    let database = Database::default();
    let layer = database.layer(|builder| builder);
    let (inner, script) = handler();
    let service = layer.layer(inner);
    let long = format!("known{}", "n".repeat(300));
    for tenant in ["known1", "known2", &long] {
        let request = || of(tenant, signed("msg_1", "x"));
        assert_eq!(send(&service, request()).await.body(), "done");
        assert_eq!(send(&service, request()).await.body(), "");
    }
    assert_eq!(script.call_count(), 3);
}

/// What was asked for before the secrets were to be forgotten does not count
/// after.
#[tokio::test(start_paused = true)]
async fn a_lookup_under_way_is_forgotten_too() {
    let database = Database::default();
    let layer = database.layer(|builder| builder);
    let service = layer.layer(handler().0);
    let mut call = task::spawn(service.clone().oneshot(of("known", signed("1", "x"))));
    assert_pending!(call.poll());
    layer.handle().forget_secrets();
    assert_eq!(call.await.unwrap().status(), 200);
    assert_eq!(status(&service, of("known", signed("2", "x"))).await, 200);
    assert_eq!(database.asked(), ["known", "known"]);
}

// A store of one's own

#[derive(Clone, Default)]
struct Store {
    /// What it answers, one after the other; in the end it fails.
    claims: Arc<Mutex<VecDeque<Claim>>>,
    slow: Option<Duration>,
    told: Arc<Mutex<Vec<String>>>,
    keys: Arc<Mutex<Vec<ClaimKey>>>,
}

impl Store {
    fn of(claims: impl IntoIterator<Item = Claim>) -> Self {
        Self {
            claims: Arc::new(Mutex::new(claims.into_iter().collect())),
            ..Self::default()
        }
    }

    fn tell(&self, what: impl Into<String>) {
        self.told.lock().unwrap().push(what.into());
    }

    async fn told(&self) -> Vec<String> {
        settle().await;
        std::mem::take(&mut self.told.lock().unwrap())
    }
}

impl ReplayStore for Store {
    fn claim<'a>(&'a self, key: &'a ClaimKey, keep: Duration) -> StoreFuture<'a, Claim> {
        Box::pin(async move {
            self.tell(format!("claim {}", keep.as_secs()));
            self.keys.lock().unwrap().push(key.clone());
            if let Some(slow) = self.slow {
                tokio::time::sleep(slow).await;
            }
            let claim = self.claims.lock().unwrap().pop_front();
            claim.ok_or_else(|| "out of reach".into())
        })
    }

    fn complete<'a>(
        &'a self,
        _: &'a ClaimKey,
        token: ClaimToken,
        keep: Duration,
    ) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            self.tell(format!("complete {} {}", token.get(), keep.as_secs()));
            Ok(())
        })
    }

    fn release<'a>(&'a self, _: &'a ClaimKey, token: ClaimToken) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            self.tell(format!("release {}", token.get()));
            Ok(())
        })
    }
}

const fn new(token: u128) -> Claim {
    Claim::New(ClaimToken::new(token))
}

#[tokio::test(start_paused = true)]
async fn a_store_is_asked_and_told() {
    let full = Claim::Full {
        retry_after: Some(Duration::from_millis(2100)),
    };
    let claims = [new(7), Claim::Completed, Claim::InProgress, full, new(8)];
    let store = Store::of(claims);
    let (inner, script) = script()
        .then(Step::ok(answer(200, ScriptedBody::new())))
        .then(Step::ok(answer(500, ScriptedBody::new())))
        .build();
    let layer = standard()
        .name("orders")
        .replay_store(store.clone())
        .build()
        .unwrap();
    let service = layer.layer(inner);
    let request = || signed("msg_1", "x");

    assert_eq!(status(&service, request()).await, 200);
    assert_eq!(store.told().await, ["claim 601", "complete 7 601"]);
    let response = send(&service, request()).await;
    assert_eq!((response.status().as_u16(), &**response.body()), (200, ""));
    is_problem(&send(&service, request()).await, 409, "in_progress");
    let response = send(&service, request()).await;
    is_problem(&response, 503, "replays_full");
    assert_eq!(response.headers()["retry-after"], "3");
    assert_eq!(store.told().await, ["claim 601"; 3]);
    assert_eq!(status(&service, request()).await, 500);
    assert_eq!(store.told().await, ["claim 601", "release 8"]);
    assert_eq!(script.call_count(), 2);
    assert_eq!(layer.handle().claims(), 0);

    let keys = store.keys.lock().unwrap();
    assert_eq!(keys[0].as_str(), "6:orders,0:,0:,id:msg_1");
    assert_eq!(format!("{:?}", keys[0]), "ClaimKey(..)");
}

#[tokio::test(start_paused = true)]
async fn what_happens_without_the_store_is_set() {
    let (inner, script) = handler();
    let service = |rule| {
        let store = Store::default();
        let layer = standard().replay_store(store).on_store_error(rule);
        layer.build().unwrap().layer(inner.clone())
    };
    let request = || signed("msg_1", "x");
    let deny = service(OnStoreError::Deny);
    is_problem(&send(&deny, request()).await, 503, "store_unavailable");
    assert_eq!(script.call_count(), 0);
    let allow = service(OnStoreError::Allow);
    for _ in 0..2 {
        assert_eq!(send(&allow, request()).await.body(), "done");
    }
    let local = service(OnStoreError::Local);
    assert_eq!(send(&local, request()).await.body(), "done");
    assert_eq!(send(&local, request()).await.body(), "");
    assert_eq!(local.handle().claims(), 1);
    assert_eq!(script.call_count(), 3);
}

/// Whoever leaves while the store decides does not know whether it has.
#[tokio::test(start_paused = true)]
async fn a_claim_that_nobody_waits_for_is_given_back() {
    let mut store = Store::of([new(7), Claim::Completed]);
    store.slow = Some(Duration::from_secs(1));
    let (inner, script) = handler();
    let layer = standard().replay_store(store.clone()).build().unwrap();
    let service = layer.layer(inner);

    // Never polled: nothing was asked.
    drop(service.clone().oneshot(signed("msg_1", "x")));
    assert_eq!(store.told().await, [""; 0]);

    for expected in [&["claim 601", "release 7"][..], &["claim 601"]] {
        let mut call = task::spawn(service.clone().oneshot(signed("msg_1", "x")));
        assert_pending!(call.poll());
        drop(call);
        advance(Duration::from_secs(2)).await;
        assert_eq!(store.told().await, expected);
    }
    assert_eq!(script.call_count(), 0);
}

/// Without a runtime nobody is there to tell the store: no panic, either.
#[test]
fn outside_of_a_runtime_the_store_is_not_told() {
    let store = Store::of([new(7)]);
    let (inner, _script) = script().then(Step::hang()).build();
    let layer = standard().replay_store(store.clone()).build().unwrap();
    let mut call = task::spawn(layer.layer(inner).oneshot(signed("msg_1", "x")));
    assert_pending!(call.poll());
    drop(call);
    assert_eq!(*store.told.lock().unwrap(), ["claim 601"]);
}

// What is shown, and what cannot be built

#[tokio::test(start_paused = true)]
async fn no_secret_is_ever_shown() {
    let builder = standard().name("orders");
    let mut shown = format!("{builder:?} {builder:#?}");
    let layer = builder.build().unwrap();
    let (inner, script) = handler();
    let service: Verify<_> = layer.layer(inner);
    shown += &format!("{layer:?} {:?} {:?}", layer.handle(), service.handle());
    shown += &format!("{:?}", layer.layer(service_fn_of("inner")));
    let mut call = pin!(service.clone().call_ready(signed("msg_hidden", "x")).await);
    shown += &format!("{call:?}");
    let response = call.as_mut().await.unwrap();
    shown += &format!("{call:?} {response:?}");
    let request = script.take_requests().pop().unwrap();
    shown += &format!("{request:?}");
    shown += &format!("{:?}", send(&service, web::post("/", "x")).await);
    let error = layer.handle().set_secrets([secret("not base64!")]);
    let error = error.unwrap_err();
    shown += &format!("{error} {error:?}");
    for secret in [&SECRET[6..], "not base64", "MfKQ9r8G"] {
        assert!(!shown.contains(secret), "{shown}");
    }
    assert!(shown.contains("VerifyFuture::Collecting"), "{shown}");
}

fn service_fn_of(text: &'static str) -> &'static str {
    text
}

/// Ready, and then called.
trait CallReady<R>: Service<R> + Sized {
    async fn call_ready(mut self, request: R) -> Self::Future
    where
        Self::Error: fmt::Debug,
    {
        poll_fn(|cx| self.poll_ready(cx)).await.unwrap();
        self.call(request)
    }
}

impl<R, S: Service<R>> CallReady<R> for S {}

#[test]
fn what_makes_no_sense_is_named() {
    let none = || VerifyLayer::builder(Sha256::new());
    let new = || none().secrets([secret(SECRET)]);
    let lookup = || lookup_fn(|_| Some(1), |_: i32| async { Ok(None) });
    let wrong = [
        (none(), "secrets"),
        (none().secrets([]), "secret"),
        (new().lookup(lookup()), "not both"),
        (new().name(""), "name"),
        (new().name("caf\u{e9}"), "name"),
        (new().name("x".repeat(129)), "name"),
        (new().tolerance(Duration::ZERO), "tolerance"),
        (new().tolerance(Duration::from_millis(1500)), "tolerance"),
        (new().tolerance(Duration::MAX), "tolerance"),
        (new().max_body(0), "body"),
        // It was never asked, and its owner thought that repeats were known.
        (new().replay_store(Store::default()), "store"),
        (
            standard()
                .replay_store(Store::default())
                .replay_protection(false),
            "store",
        ),
        (
            none()
                .lookup(lookup())
                .lookup_ttl(Duration::ZERO, Duration::from_secs(1)),
            "looked up",
        ),
        (
            none()
                .lookup(lookup())
                .lookup_ttl(Duration::from_secs(1), Duration::MAX),
            "looked up",
        ),
        (
            VerifyLayer::builder(Standard::new()).secrets([secret("not base64!")]),
            "secret",
        ),
    ];
    for (builder, named) in wrong {
        let error = builder.build().unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    assert!(new().build().is_ok());
    let store = new().replay_store(Store::default());
    assert!(store.replay_protection(true).build().is_ok());
}

/// The clock of the receiver is the one that was given.
#[tokio::test(start_paused = true)]
async fn the_wall_clock_can_be_given() {
    let clock = Arc::new(AtomicU64::new(NOW + 301));
    let read = Arc::clone(&clock);
    let layer = standard()
        .wall_clock(move || Duration::from_secs(read.load(SeqCst)))
        .build()
        .unwrap();
    let service = layer.layer(handler().0);
    let response = send(&service, signed("msg_1", "x")).await;
    is_problem(&response, 401, "timestamp_too_old");
    clock.store(NOW + 300, SeqCst);
    assert_eq!(status(&service, signed("msg_1", "x")).await, 200);
}
