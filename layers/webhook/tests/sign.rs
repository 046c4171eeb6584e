//! The signing layer: what is sent, what is not, and what is left of it.

use std::{
    convert::Infallible,
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use buttress_core::{
    BoxError, Refusal, RefusalKind,
    refusal::{Inspect, Tell},
    testing::{
        ReadinessProbe, Script, ScriptHandle, Scripted, Step,
        web::{BodyFate, ScriptedBody},
    },
};
use buttress_webhook::{
    GitHub, MessageId, MessageIdLayer, Secret, Shopify, SignError, SignHandle, SignLayer, Signer,
    Slack, Standard, Stripe, Verifier, WholeBody,
    sign::{Cause, Error, Respond},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use tokio_test::{assert_pending, assert_ready, task};
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimit, retry};

const OLD: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const NEW: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBk=";
const NOW: u64 = 1_700_000_000;

type Sent = Request<WholeBody>;
type Wire = Scripted<Sent, Response<Full<Bytes>>, fmt::Error>;
type WireHandle = ScriptHandle<Sent, Response<Full<Bytes>>, fmt::Error>;

fn secret(text: &str) -> Secret {
    Secret::new(text).unwrap()
}

fn signer(text: &str) -> Signer {
    Signer::new(Standard::new(), [secret(text)]).unwrap()
}

fn layer(signer: Signer) -> SignLayer {
    let builder = SignLayer::builder(signer).name("orders");
    let builder = builder.wall_clock(|| Duration::from_secs(NOW));
    builder
        .ids(|| MessageId::new("msg_made").unwrap())
        .build()
        .unwrap()
}

/// A transport that answers everything.
fn wire() -> (Wire, WireHandle) {
    Script::new()
        .otherwise(|_: &Sent| Step::ok(Response::default()))
        .build()
}

/// Ready for a request with a body of this type.
async fn ready<B, S: Service<Request<B>>>(service: &mut S, _: &Request<B>)
where
    S::Error: fmt::Debug,
{
    service.ready().await.unwrap();
}

/// Whether it is ready at once.
fn is_ready<S: Service<Request<Full<Bytes>>>>(service: &mut S) -> bool {
    task::spawn(service.ready()).poll().is_ready()
}

fn post<B>(body: B) -> Request<B> {
    Request::post("/hooks").body(body).unwrap()
}

fn full(bytes: impl Into<Bytes>) -> Request<Full<Bytes>> {
    post(Full::new(bytes.into()))
}

fn verified(sent: Sent, text: &str, now: u64) -> buttress_webhook::Verified {
    let (parts, body) = sent.into_parts();
    let verifier = Verifier::new(Standard::new(), [secret(text)]).unwrap();
    let now = Duration::from_secs(now);
    verifier.verify((&parts).into(), body.bytes(), now).unwrap()
}

#[tokio::test(start_paused = true)]
async fn readiness() {
    let probe = || {
        ReadinessProbe::new(
            || post(WholeBody::new(Bytes::from("{}"))),
            |_: &Sent| Step::<Response<Full<Bytes>>, Infallible>::ok(Response::default()),
        )
    };
    probe().check(&layer(signer(OLD))).await;
    probe().check(&MessageIdLayer::new()).await;
    let refusing = SignLayer::builder(signer(OLD)).max_body(1);
    probe().check(&refusing.build().unwrap()).await;
    let responding = SignLayer::builder(signer(OLD)).responses().build().unwrap();
    probe().check(&responding).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_sent_is_verified() {
    let mebibyte = Bytes::from(vec![0xa5; 1024 * 1024]);
    for body in [
        Bytes::new(),
        Bytes::from_static(&[0, 159, 146, 150, 255]),
        mebibyte,
    ] {
        let (wire, script) = wire();
        let service = layer(signer(OLD)).layer(wire);
        service.oneshot(full(body.clone())).await.unwrap();
        let sent = script.take_requests().remove(0);
        assert_eq!(sent.body().bytes(), &body);
        assert_eq!(sent.body().size_hint().exact(), Some(body.len() as u64));
        let verified = verified(sent, OLD, NOW + 300);
        assert_eq!(verified.id.as_deref(), Some("msg_made"));
        assert_eq!(verified.timestamp, Some(NOW));
    }
}

#[tokio::test(start_paused = true)]
async fn several_schemes_at_once() {
    let signer = signer(OLD)
        .and(Standard::svix(), [secret(NEW), secret(OLD)])
        .unwrap()
        .and(Stripe, [secret(OLD)])
        .unwrap()
        .and(GitHub, [secret("correct horse")])
        .unwrap();
    let (wire, script) = wire();
    let service = layer(signer).layer(wire);
    service.oneshot(full("{}")).await.unwrap();
    let (parts, body) = script.take_requests().remove(0).into_parts();
    let now = Duration::from_secs(NOW);
    let judge = |verifier: Result<Verifier, _>| {
        let verifier: Verifier = verifier.unwrap();
        verifier.verify((&parts).into(), body.bytes(), now).unwrap()
    };
    judge(Verifier::new(Standard::new(), [secret(OLD)]));
    judge(Verifier::new(Standard::svix(), [secret(OLD)]));
    judge(Verifier::new(Standard::svix(), [secret(NEW)]));
    judge(Verifier::new(Stripe, [secret(OLD)]));
    judge(Verifier::new(GitHub, [secret("correct horse")]));
    assert_eq!(parts.headers["webhook-id"], parts.headers["svix-id"]);
}

/// What each attempt was sent with: the id, and the time.
fn id_and_time(sent: &Sent) -> (String, String) {
    let text = |name: &str| sent.headers()[name].to_str().unwrap().to_owned();
    (text("webhook-id"), text("webhook-timestamp"))
}

#[derive(Clone)]
struct Thrice(u8);

impl<Res, E> retry::Policy<Request<Full<Bytes>>, Res, E> for Thrice {
    type Future = std::future::Ready<()>;

    fn retry(
        &mut self,
        _: &mut Request<Full<Bytes>>,
        _: &mut Result<Res, E>,
    ) -> Option<Self::Future> {
        self.0 = self.0.checked_sub(1)?;
        Some(std::future::ready(()))
    }

    fn clone_request(&mut self, request: &Request<Full<Bytes>>) -> Option<Request<Full<Bytes>>> {
        Some(request.clone())
    }
}

#[tokio::test(start_paused = true)]
async fn attempts_share_an_id_and_no_timestamp() {
    let seconds = Arc::new(AtomicU64::new(NOW));
    let clock = move || Duration::from_secs(seconds.fetch_add(1, Ordering::Relaxed));
    let sign = SignLayer::builder(signer(OLD))
        .wall_clock(clock)
        .build()
        .unwrap();
    let (inner, script) = wire();
    let attempts = retry::RetryLayer::new(Thrice(2)).layer(sign.layer(inner));

    // Without an id from outside each attempt looks like a message of its own.
    attempts.clone().oneshot(full("{}")).await.unwrap();
    let sent: Vec<_> = script.take_requests().iter().map(id_and_time).collect();
    assert_eq!(sent.len(), 3);
    assert_ne!(sent[0].0, sent[1].0);

    let service = MessageIdLayer::new().layer(attempts);
    service.clone().oneshot(full("{}")).await.unwrap();
    let requests = script.take_requests();
    let sent: Vec<_> = requests.iter().map(id_and_time).collect();
    let id = sent[0].0.clone();
    assert!(id.starts_with("msg_") && id.len() == 26);
    let expected: Vec<_> = (NOW + 3..NOW + 6)
        .map(|time| (id.clone(), time.to_string()))
        .collect();
    assert_eq!(sent, expected);
    for (request, time) in requests.into_iter().zip(NOW + 3..) {
        assert_eq!(verified(request, OLD, time).timestamp, Some(time));
    }

    service.oneshot(full("{}")).await.unwrap();
    assert_ne!(id_and_time(&script.take_requests()[0]).0, id);
}

#[tokio::test(start_paused = true)]
async fn an_id_that_is_there_is_kept() {
    let (wire, script) = wire();
    let ids = MessageIdLayer::new().ids(|| MessageId::new("msg_outside").unwrap());
    let service = ids.layer(layer(signer(OLD)).layer(wire));
    let sent = async |request| {
        service.clone().oneshot(request).await.unwrap();
        id_and_time(&script.take_requests()[0]).0
    };
    assert_eq!(sent(full("")).await, "msg_outside");

    let mut attached = full("");
    MessageId::new("evt_1")
        .unwrap()
        .attach(attached.extensions_mut());
    assert_eq!(sent(attached.clone()).await, "evt_1");

    // The header is what the caller wrote down; the extension may be a layer's.
    let header = HeaderValue::from_static("evt_2");
    attached.headers_mut().insert("webhook-id", header);
    assert_eq!(sent(attached).await, "evt_2");
}

#[tokio::test(start_paused = true)]
async fn no_id_is_made_that_nobody_signs() {
    let (wire, script) = wire();
    let signer = Signer::new(Slack, [secret("correct horse")]).unwrap();
    let layer = SignLayer::builder(signer).ids(|| panic!("not needed"));
    let service = layer.build().unwrap().layer(wire);
    service.oneshot(full("{}")).await.unwrap();
    assert_eq!(script.call_count(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_id_that_cannot_be_signed_is_an_error() {
    let (wire, script) = wire();
    let service = layer(signer(OLD)).layer(wire);
    let headers = |values: &[&'static str]| {
        let mut request = full("{}");
        for value in values {
            let value = HeaderValue::from_str(value).unwrap();
            request.headers_mut().append("webhook-id", value);
        }
        request
    };
    let wrong: [&[&str]; 4] = [&["a.b"], &["a b"], &[""], &["evt_1", "evt_1"]];
    for values in wrong {
        let error = service.clone().oneshot(headers(values)).await.unwrap_err();
        let cause = error.not_signed().unwrap().cause();
        assert!(matches!(cause, Cause::Sign(SignError::Id)), "{values:?}");
        assert_eq!(error.refusal().unwrap().kind(), RefusalKind::Internal);
    }
    assert_eq!(script.call_count(), 0);
    assert_eq!(script.reserved(), 0);
}

/// Whether its length is known or not.
#[tokio::test(start_paused = true)]
async fn of_a_body_that_is_too_long_nothing_is_sent() {
    let (wire, script) = wire();
    let sign = layer(signer(OLD));
    sign.handle().set_max_body(6);
    let service = sign.layer(wire);

    let fits = ScriptedBody::new().data("abc").data("def");
    service.clone().oneshot(post(fits)).await.unwrap();
    assert_eq!(script.take_requests()[0].body().bytes(), "abcdef");

    let known = service.clone().oneshot(full("abcdefg")).await.unwrap_err();
    let streamed = ScriptedBody::new().data("abc").data("defg").hang();
    let watch = streamed.watch();
    let streamed = service.clone().oneshot(post(streamed)).await.unwrap_err();
    assert_eq!(watch.fate(), BodyFate::Dropped);
    for error in [known, streamed] {
        let not_signed = error.not_signed().unwrap();
        assert!(matches!(not_signed.cause(), Cause::TooLarge { most: 6 }));
        assert_eq!(not_signed.name(), "orders");
        assert_eq!(
            error.to_string(),
            "the body is longer than the 6 bytes that are signed (orders)"
        );
        let refusal = error.refusal().unwrap();
        assert_eq!(refusal.kind(), RefusalKind::BodyTooLarge);
        assert_eq!(refusal.origin(), Some("orders"));
        assert!(refusal.was_never_sent());
        let boxed = BoxError::from(error);
        assert_eq!(Refusal::find(&*boxed), Some(&refusal));
    }
    assert_eq!(script.call_count(), 1);
    assert_eq!(script.reserved(), 0);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_body_that_breaks_fails_with_its_own_error() {
    let (wire, script) = wire();
    let service = layer(signer(OLD)).layer(wire);
    let broken = || {
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        post(ScriptedBody::new().data("abc").fail(reset))
    };
    let error = service.clone().oneshot(broken()).await.unwrap_err();
    assert!(matches!(
        error.not_signed().unwrap().cause(),
        Cause::Body(_)
    ));
    let shown = Inspect::error(&error).unwrap().to_string();
    assert_eq!(error.refusal().unwrap().kind(), RefusalKind::BadRequest);
    let boxed = BoxError::from(error);
    assert_eq!(boxed.to_string(), shown);
    assert!(boxed.downcast_ref::<Refusal>().is_none());

    // A layer further out ended it, for a reason of its own.
    let drained = Refusal::new(RefusalKind::Draining);
    let body = ScriptedBody::new().fail(drained.clone());
    let error = service.oneshot(post(body)).await.unwrap_err();
    assert_eq!(error.refusal(), Some(drained.before_sending()));
    assert_eq!(script.call_count(), 0);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn the_inner_error_passes_through() {
    let (inner, script) = Script::<Sent, Response<Full<Bytes>>, &str>::new()
        .then(Step::err("down"))
        .build();
    let service = layer(signer(OLD)).layer(inner);
    let error = service.oneshot(full("{}")).await.unwrap_err();
    assert!(error.not_signed().is_none());
    assert_eq!(error.into_inner(), Some("down"));
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn with_responses_the_error_stays_the_inner_one() {
    let (wire, script) = wire();
    let builder = SignLayer::builder(signer(OLD)).name("orders").max_body(2);
    let layer: SignLayer<Respond> = builder.responses().build().unwrap();
    let service = layer.layer(wire);
    let respond = async |mut request: Request<ScriptedBody>| {
        Tell::attach(request.extensions_mut());
        let response: Result<_, fmt::Error> = service.clone().oneshot(request).await;
        let response = response.unwrap();
        let told = Refusal::of(response.extensions()).map(Refusal::kind);
        (response.status().as_u16(), told)
    };
    assert_eq!(respond(post(ScriptedBody::new().data("ab"))).await.0, 200);
    assert_eq!(script.take_requests().len(), 1);
    assert_eq!(
        respond(post(ScriptedBody::new().data("abc"))).await,
        (413, Some(RefusalKind::BodyTooLarge))
    );
    assert_eq!(
        respond(post(ScriptedBody::new().fail("reset"))).await,
        (400, Some(RefusalKind::BadRequest))
    );
    let mut wrong = post(ScriptedBody::new());
    let value = HeaderValue::from_static("a.b");
    wrong.headers_mut().insert("webhook-id", value);
    assert_eq!(respond(wrong).await, (500, Some(RefusalKind::Internal)));
    assert_eq!(script.call_count(), 1);
    script.assert_finished();
}

#[tokio::test]
async fn the_answers_can_be_ones_own() {
    let layer = SignLayer::builder(signer(OLD))
        .max_body(0)
        .responses()
        .responder(|refusal: &Refusal, _: buttress_core::Head<'_>| {
            let mut response = Response::new(Bytes::from_static(b"no"));
            *response.status_mut() = refusal.status();
            response
                .headers_mut()
                .insert("x-ours", HeaderValue::from_static("1"));
            response
        });
    let service = layer.build().unwrap().layer(wire().0);
    let response = service.oneshot(full("{}")).await.unwrap();
    assert_eq!(response.status(), 413);
    assert_eq!(response.headers()["x-ours"], "1");
    let body = response.into_body().collect().await.unwrap();
    assert_eq!(body.to_bytes(), "no");
}

#[tokio::test(start_paused = true)]
async fn a_length_that_is_wrong_is_corrected() {
    let (wire, script) = wire();
    let service = layer(signer(OLD)).layer(wire);
    let cases: [(&[&str], &[&str]); 5] = [
        (&[], &[]),
        (&["4"], &["4"]),
        (&["3"], &["4"]),
        (&["4", "4"], &["4"]),
        (&["many"], &["4"]),
    ];
    for (before, after) in cases {
        let mut request = full("abcd");
        for value in before {
            let value = HeaderValue::from_str(value).unwrap();
            request.headers_mut().append("content-length", value);
        }
        service.clone().oneshot(request).await.unwrap();
        let sent = script.take_requests().remove(0);
        let lengths: Vec<_> = sent.headers().get_all("content-length").iter().collect();
        assert_eq!(lengths, after, "{before:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn trailers_are_sent_on() {
    let (wire, script) = wire();
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", HeaderValue::from_static("1"));
    let body = ScriptedBody::new().data("abc").trailers(trailers.clone());
    let service = layer(signer(OLD)).layer(wire);
    service.oneshot(post(body)).await.unwrap();
    let sent = script.take_requests().remove(0).into_body();
    let collected = sent.collect().await.unwrap();
    assert_eq!(collected.trailers(), Some(&trailers));
}

/// What was promised is held while the body comes, and free when it does not.
#[tokio::test(start_paused = true)]
async fn a_dropped_future_leaves_nothing() {
    let (wire, script) = wire();
    let mut service = layer(signer(OLD)).layer(ConcurrencyLimit::new(wire, 1));
    let body = ScriptedBody::new().data("abc").hang();
    let watch = body.watch();
    let request = post(body);
    ready(&mut service, &request).await;
    let mut call = task::spawn(service.call(request));
    assert_pending!(call.poll());
    let mut other = service.clone();
    assert!(!is_ready(&mut other));
    assert_eq!(format!("{:?}", &*call), "ErrorFuture::Collecting");
    drop(call);
    assert_eq!(watch.fate(), BodyFate::Dropped);
    assert!(is_ready(&mut other));
    // It was ready and is not called.
    assert!(!is_ready(&mut service));
    drop(other);
    assert!(is_ready(&mut service));
    assert_eq!(script.call_count(), 0);
}

/// A slot is free before the caller hears that nothing was sent.
#[tokio::test(start_paused = true)]
async fn a_refusal_gives_the_slot_back() {
    let (wire, _script) = wire();
    let sign = layer(signer(OLD));
    sign.handle().set_max_body(1);
    let mut service = sign.layer(ConcurrencyLimit::new(wire, 1));
    let request = full("abc");
    ready(&mut service, &request).await;
    let mut call = task::spawn(service.call(request));
    assert!(matches!(
        assert_ready!(call.poll()),
        Err(Error::NotSigned(_))
    ));
    // The future is still there.
    assert!(is_ready(&mut service));
}

#[tokio::test(start_paused = true)]
async fn secrets_are_replaced_while_it_serves() {
    let (wire, script) = wire();
    let sign = layer(signer(OLD));
    let handle: SignHandle = sign.clone().handle();
    let service = sign.layer(wire);
    let sent = || script.take_requests().remove(0);

    service.clone().oneshot(full("1")).await.unwrap();
    assert_eq!(verified(sent(), OLD, NOW).key_index, 0);

    // While a body comes, too: what is signed is signed by what is there then.
    let body = ScriptedBody::new().wait(Duration::from_secs(1)).data("2");
    let mut call = task::spawn(service.clone().oneshot(post(body)));
    assert_pending!(call.poll());
    let both = Signer::new(Standard::new(), [secret(NEW), secret(OLD)]).unwrap();
    handle.set_signer(both);
    call.await.unwrap();
    let request = sent();
    let value = request.headers()["webhook-signature"].to_str().unwrap();
    assert_eq!(value.split(' ').count(), 2);
    assert_eq!(verified(request, NEW, NOW).key_index, 0);

    handle.set_signer(Signer::new(Shopify, [secret("correct horse")]).unwrap());
    service.oneshot(full("3")).await.unwrap();
    let request = sent();
    assert!(!request.headers().contains_key("webhook-signature"));
    assert!(request.headers().contains_key("x-shopify-hmac-sha256"));
    assert_eq!(handle.signer().schemes().collect::<Vec<_>>(), ["shopify"]);
}

#[tokio::test]
async fn nothing_secret_is_shown() {
    let sign = layer(signer(OLD));
    let mut shown = format!("{sign:?} {:?}", sign.handle());
    shown += &format!("{:?}", SignLayer::builder(signer(OLD)));
    let service = sign.layer(wire().0);
    shown += &format!("{service:?}");
    let error = {
        sign.handle().set_max_body(0);
        service.oneshot(full("confidential")).await.unwrap_err()
    };
    shown += &format!("{error:?} {error} {:?}", error.refusal());
    assert!(shown.contains("orders"));
    for secret in ["MfKQ9", "whsec", "31f290f6", "49, 242", "confidential"] {
        assert!(!shown.contains(secret), "{secret}: {shown}");
    }
}

#[test]
fn a_name_that_makes_no_sense_is_refused() {
    for name in ["", "caf\u{e9}", "a\nb", &"x".repeat(129)] {
        let error = SignLayer::builder(signer(OLD)).name(name).build();
        assert!(error.unwrap_err().to_string().contains("name"), "{name:?}");
    }
}
