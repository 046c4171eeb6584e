//! Routes that let in only what is signed, and routes that sign: what the
//! sender gets, and what the upstream.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use buttress::webhook::{
    GitHub, Message, Scheme, Secret, Sha256, Signer, Slack, Standard, Stripe, Verifier,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::Full;
use tokio::sync::Notify;

use crate::support::{Proxy, Raw, Upstream, fetch, problem, reply, seen};

const STANDARD: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const OLD: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBk=";

#[expect(clippy::disallowed_methods, reason = "it is what is signed")]
fn unix_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap().as_secs()
}

/// A request as its sender signs it, so many seconds from now.
fn signed(
    scheme: impl Scheme,
    secret: &str,
    id: &str,
    body: &[u8],
    off: i64,
) -> Request<Full<Bytes>> {
    let request = Request::post("/hooks").header("host", "test.example");
    let (mut head, ()) = request.body(()).unwrap().into_parts();
    let signer = Signer::new(scheme, [Secret::new(secret).unwrap()]).unwrap();
    let timestamp = unix_now().checked_add_signed(off).unwrap();
    signer
        .sign(
            &mut head,
            &Message {
                id,
                timestamp,
                body,
            },
        )
        .unwrap();
    Request::from_parts(head, Full::new(Bytes::copy_from_slice(body)))
}

fn standard(id: &str) -> Request<Full<Bytes>> {
    signed(Standard::new(), STANDARD, id, b"{}", 0)
}

/// A route that verifies, and how often its upstream was called, which answers
/// with a status that can be changed.
struct Verified {
    proxy: Proxy,
    calls: Arc<AtomicUsize>,
    status: Arc<AtomicU16>,
    _upstream: Upstream,
}

impl Verified {
    async fn start(rule: &str) -> Self {
        Self::with("", rule).await
    }

    async fn with(settings: &str, rule: &str) -> Self {
        let calls = Arc::new(AtomicUsize::new(0));
        let status = Arc::new(AtomicU16::new(200));
        let (called, answers) = (Arc::clone(&calls), Arc::clone(&status));
        let upstream = Upstream::start(move |_| {
            called.fetch_add(1, Ordering::SeqCst);
            let status = answers.load(Ordering::SeqCst);
            async move {
                let mut response = reply("done");
                *response.status_mut() = status.try_into().unwrap();
                response
            }
        })
        .await;
        let url = upstream.address;
        let proxy = Proxy::start(&format!(
            "{settings}\nroutes: [{{ name: a, path: /, upstream: ['http://{url}'], verify_webhook: {rule} }}]"
        ))
        .await;
        Self {
            proxy,
            calls,
            status,
            _upstream: upstream,
        }
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Response<Bytes> {
        fetch(self.proxy.listen, request).await
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

#[tokio::test]
async fn each_scheme_lets_its_own_in() {
    async fn check(scheme: impl Scheme + Clone, name: &str, secret: &str) {
        let route = Verified::start(&format!("{{ scheme: {name}, secrets: ['{secret}'] }}")).await;
        let good = signed(scheme.clone(), secret, "msg_1", b"{\"a\":1}", 0);
        let (head, _) = good.clone().into_parts();
        let tampered = Request::from_parts(head, Full::from("{\"a\":2}"));
        problem(&route.send(tampered).await, 401, "signature_mismatch");
        let unsigned = Request::post("/")
            .header("host", "x")
            .body(Full::from("{}"));
        let unsigned = route.send(unsigned.unwrap()).await;
        let reason = crate::support::json(&unsigned)["reason"].clone();
        assert!(reason.as_str().unwrap().starts_with("missing_"), "{reason}");
        assert_eq!(route.calls(), 0, "{name}");

        let answer = route.send(good).await;
        assert_eq!(
            (answer.status().as_u16(), &answer.body()[..]),
            (200, &b"done"[..])
        );
        assert_eq!(route.calls(), 1);
        // Nothing that a stranger sees holds the signature or the secret.
        let printed = route.proxy.printed();
        assert!(!printed.contains(secret), "{printed}");
    }
    check(Sha256::new(), "sha256", "correct horse").await;
    check(Standard::new(), "standard", STANDARD).await;
    check(GitHub, "github", "correct horse").await;
    check(Stripe, "stripe", STANDARD).await;
    check(Slack, "slack", "correct horse").await;
}

#[tokio::test]
async fn either_secret_of_a_rotation_and_no_time_but_this() {
    let rule = format!("{{ scheme: standard, secrets: ['{STANDARD}', '{OLD}'], tolerance: 100s }}");
    let route = Verified::start(&rule).await;
    let scheme = Standard::new;
    let old = signed(scheme(), OLD, "msg_old", b"{}", 0);
    assert_eq!(route.send(old).await.status(), 200);
    let late = signed(scheme(), STANDARD, "msg_late", b"{}", -102);
    problem(&route.send(late).await, 401, "timestamp_too_old");
    let early = signed(scheme(), STANDARD, "msg_early", b"{}", 105);
    problem(&route.send(early).await, 401, "timestamp_too_new");
    let near = signed(scheme(), STANDARD, "msg_near", b"{}", -90);
    assert_eq!(route.send(near).await.status(), 200);
}

#[tokio::test]
async fn a_repeat_is_answered_and_not_forwarded() {
    let route = Verified::start(&format!("{{ scheme: standard, secrets: ['{STANDARD}'] }}")).await;
    assert_eq!(route.send(standard("msg_1")).await.body(), "done");
    // The same id under a new time is the same message.
    let again = route
        .send(signed(Standard::new(), STANDARD, "msg_1", b"{}", -5))
        .await;
    assert_eq!((again.status().as_u16(), again.body().len()), (200, 0));
    assert_eq!(route.calls(), 1);

    // Without an id there is no telling a repeat from a replay.
    let route = Verified::start(&format!("{{ scheme: stripe, secrets: ['{STANDARD}'] }}")).await;
    let event = signed(Stripe, STANDARD, "", b"{}", 0);
    assert_eq!(route.send(event.clone()).await.status(), 200);
    let again = route.send(event).await;
    problem(&again, 409, "replayed");
    assert!(!again.headers().contains_key("retry-after"));
    assert_eq!(route.calls(), 1);
}

#[tokio::test]
async fn only_where_asked_for_is_an_equal_body_a_replay() {
    let event = || signed(GitHub, "correct horse", "", b"{}", 0);
    let rule = "{ scheme: github, secrets: [correct horse] }";
    let route = Verified::start(rule).await;
    for _ in 0..2 {
        assert_eq!(route.send(event()).await.status(), 200);
    }
    let rule = "{ scheme: github, secrets: [correct horse], replay_protection: true }";
    let route = Verified::start(rule).await;
    assert_eq!(route.send(event()).await.status(), 200);
    problem(&route.send(event()).await, 409, "replayed");
    let rule = format!("{{ scheme: standard, secrets: ['{STANDARD}'], replay_protection: false }}");
    let route = Verified::start(&rule).await;
    for _ in 0..2 {
        assert_eq!(route.send(standard("msg_1")).await.body(), "done");
    }
}

#[tokio::test]
async fn what_the_upstream_failed_at_comes_again() {
    let route = Verified::start(&format!("{{ scheme: standard, secrets: ['{STANDARD}'] }}")).await;
    route.status.store(503, Ordering::SeqCst);
    assert_eq!(route.send(standard("msg_1")).await.status(), 503);
    route.status.store(200, Ordering::SeqCst);
    assert_eq!(route.send(standard("msg_1")).await.body(), "done");
    assert_eq!(route.calls(), 2);
}

#[tokio::test]
async fn a_repeat_of_what_is_in_progress_has_to_wait() {
    let go = Arc::new(Notify::new());
    let arrived = Arc::new(Notify::new());
    let (wait, here) = (Arc::clone(&go), Arc::clone(&arrived));
    let upstream = Upstream::start(move |_| {
        let (wait, here) = (Arc::clone(&wait), Arc::clone(&here));
        async move {
            here.notify_one();
            wait.notified().await;
            reply("done")
        }
    })
    .await;
    let url = upstream.address;
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: a, path: /, upstream: ['http://{url}'], verify_webhook: {{ scheme: standard, secrets: ['{STANDARD}'] }} }}]"
    ))
    .await;
    let first = tokio::spawn(fetch(proxy.listen, standard("msg_1")));
    arrived.notified().await;
    let second = fetch(proxy.listen, standard("msg_1")).await;
    problem(&second, 409, "in_progress");
    assert_eq!(second.headers()["retry-after"], "1");
    go.notify_one();
    assert_eq!(first.await.unwrap().body(), "done");
}

#[tokio::test]
async fn what_is_too_large_is_not_held() {
    let rule = format!("{{ scheme: standard, secrets: ['{STANDARD}'] }}");
    let route = Verified::with("limits: { max_body: 1KiB }", &rule).await;
    let fits = signed(Standard::new(), STANDARD, "msg_1", &[b'x'; 1024], 0);
    assert_eq!(route.send(fits).await.status(), 200);
    let larger = signed(Standard::new(), STANDARD, "msg_2", &[b'x'; 1025], 0);
    problem(&route.send(larger).await, 413, "body_too_large");
    // Nor waited for.
    let mut raw = Raw::connect(route.proxy.listen).await;
    raw.send("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 99999\r\n\r\n")
        .await;
    let answer = raw.until("\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert_eq!(route.calls(), 1);
}

#[tokio::test]
async fn grpc_is_told_in_its_own_way() {
    let route = Verified::start(&format!("{{ scheme: standard, secrets: ['{STANDARD}'] }}")).await;
    let grpc = |request: Request<Full<Bytes>>| {
        let (mut head, body) = request.into_parts();
        let value = http::HeaderValue::from_static("application/grpc");
        head.headers.insert("content-type", value);
        Request::from_parts(head, body)
    };
    let wrong = signed(Standard::new(), OLD, "msg_1", b"{}", 0);
    let answer = route.send(grpc(wrong)).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["grpc-status"], "16");
}

/// The headers that a mirror saw, as the upstream's own verifier takes them.
fn headers(response: &Response<Bytes>, names: &[&'static str]) -> HeaderMap {
    let one = |name: &&'static str| {
        let lines = seen(response, name);
        assert_eq!(lines.len(), 1, "{name}: {lines:?}");
        (
            http::HeaderName::from_static(name),
            lines[0].parse().unwrap(),
        )
    };
    names.iter().map(one).collect()
}

const WEBHOOK: [&str; 3] = ["webhook-id", "webhook-timestamp", "webhook-signature"];

fn is_genuine(headers: HeaderMap, body: &[u8]) -> bool {
    let secret = Secret::new(STANDARD).unwrap();
    let verifier = Verifier::new(Standard::new(), [secret]).unwrap();
    let (mut head, ()) = Request::new(()).into_parts();
    head.headers = headers;
    let now = Duration::from_secs(unix_now());
    verifier.verify((&head).into(), body, now).is_ok()
}

#[tokio::test]
async fn what_goes_out_is_signed_whatever_the_client_says() {
    let upstream = Upstream::mirror().await;
    let url = upstream.address;
    let proxy = Proxy::start(&format!(
        "limits: {{ max_body: 1KiB }}\nroutes: [{{ name: a, path: /, upstream: ['http://{url}'], sign_webhook: {{ scheme: standard, secret: '{STANDARD}' }} }}]"
    ))
    .await;
    let post = |body: &'static str| {
        Request::post("/")
            .header("host", "x")
            .body(Full::from(body))
            .unwrap()
    };
    let answer = fetch(proxy.listen, post("paid")).await;
    assert!(is_genuine(headers(&answer, &WEBHOOK), b"paid"));
    assert_eq!(crate::support::json(&answer)["body"], "paid");
    assert_eq!(seen(&answer, "content-length"), ["4"]);

    // A client that makes up a signature, or has it taken away.
    let mut forged = post("paid");
    for name in WEBHOOK {
        forged.headers_mut().insert(name, "forged".parse().unwrap());
    }
    let names = "webhook-signature, webhook-timestamp, webhook-id";
    forged
        .headers_mut()
        .insert("connection", names.parse().unwrap());
    let answer = fetch(proxy.listen, forged).await;
    assert!(is_genuine(headers(&answer, &WEBHOOK), b"paid"));

    // An id that is good is the message's, and one that is not is replaced: it
    // was a 500.
    let id = |values: &[&'static str]| {
        let mut request = post("paid");
        for value in values {
            request
                .headers_mut()
                .append("webhook-id", value.parse().unwrap());
        }
        async {
            let answer = fetch(proxy.listen, request).await;
            let headers = headers(&answer, &WEBHOOK);
            let id = headers["webhook-id"].to_str().unwrap().to_owned();
            assert!(is_genuine(headers, b"paid"), "{id}");
            id
        }
    };
    assert_eq!(id(&["order-7"]).await, "order-7");
    for bad in [&["order.7"][..], &["order 7"], &["order-7", "order-8"]] {
        assert!(id(bad).await.starts_with("msg_"), "{bad:?}");
    }

    let mut large = post("");
    *large.body_mut() = Full::from(vec![b'x'; 1025]);
    problem(&fetch(proxy.listen, large).await, 413, "body_too_large");
}

#[tokio::test]
async fn each_attempt_is_signed_anew_under_one_id() {
    let ids = Arc::new(std::sync::Mutex::new(Vec::new()));
    let heard = Arc::clone(&ids);
    let upstream = Upstream::start(move |request| {
        let head = request.into_parts().0;
        let mut ids = heard.lock().unwrap();
        let id = head.headers["webhook-id"].to_str().unwrap().to_owned();
        ids.push((id, is_genuine(head.headers, b"")));
        let status = if ids.len() < 3 { 503 } else { 200 };
        async move {
            let mut response = reply("done");
            *response.status_mut() = status.try_into().unwrap();
            response
        }
    })
    .await;
    let url = upstream.address;
    let proxy = Proxy::start(&format!(
        "routes: [{{ name: a, path: /, upstream: ['http://{url}'], retry: {{ max_attempts: 3, initial_delay: 1ms }}, sign_webhook: {{ scheme: standard, secret: '{STANDARD}' }} }}]"
    ))
    .await;
    assert_eq!(proxy.get("/").await.body(), "done");
    let ids = ids.lock().unwrap();
    assert_eq!(ids.len(), 3);
    assert!(ids.iter().all(|(_, genuine)| *genuine), "{ids:?}");
    assert!(ids.iter().all(|(id, _)| *id == ids[0].0), "{ids:?}");
}

#[tokio::test]
async fn the_demo_takes_what_is_signed_with_its_secret() {
    let proxy = Proxy::start_with(&["--admin", "127.0.0.1:0"]).await;
    let (mut head, body) =
        signed(Sha256::new(), "demo-secret", "", b"{\"order\":17}", 0).into_parts();
    head.uri = "/hooks/echo".parse().unwrap();
    let good = Request::from_parts(head.clone(), body);
    let answer = fetch(proxy.listen, good).await;
    let text = String::from_utf8_lossy(answer.body()).into_owned();
    assert!(text.starts_with("POST /echo"), "{text}");
    assert!(text.contains("\nwebhook-signature: v1,"), "{text}");
    assert!(answer.headers().contains_key("x-ratelimit-remaining"));
    let tampered = Request::from_parts(head, Full::from("{\"order\":18}"));
    problem(
        &fetch(proxy.listen, tampered).await,
        401,
        "signature_mismatch",
    );
}
