//! What is done with made-up bytes: each target reads them as a stranger's
//! request would bring them, and panics where something is wrong.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::pin,
    sync::LazyLock,
    task::{Context, Poll, Waker},
    time::Duration,
};

use buttress::{
    delivery::{Registration, Selector, Webhooks, guard::Guard},
    timeout::TimeoutLayer,
    webhook::{
        GitHub, HttpSignatures, Scheme, Secret, Sha256, Shopify, Slack, Standard, Stripe, Verifier,
        WholeBody,
    },
};
use buttress_core::{Head, key::ClientIp, retry_after};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use tower_layer::Layer;
use tower_service::Service;

/// A target by its name.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("webhook", webhook),
    ("client-ip", client_ip),
    ("times", times),
    ("urls", urls),
];

/// Words that a random text would hardly hit.
pub const WORDS: &[&str] = &[
    "sha256=",
    "sha1=",
    "v1,",
    "v1a,",
    "v0=",
    "v1=",
    "t=",
    ",",
    " ",
    "=",
    ":",
    ";",
    "\"",
    "(",
    ")",
    "1700000000",
    "1699999999",
    "whsec_",
    "sha-256=:",
    "created",
    "expires",
    "keyid",
    "alg",
    "hmac-sha256",
    "@method",
    "@authority",
    "@path",
    "@query",
    "content-digest",
    "sig1",
    "sig1=",
    "sig1=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:",
    "sha-256=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:",
    "()",
    "(\"@method\" \"@authority\" \"@path\" \"@query\" \"content-digest\")",
    ";created=1700000000",
    ";nonce=\"a\"",
    "for=",
    "by=",
    "https://",
    "http://",
    "127.1",
    "2130706433",
    "0x7f.1",
    "[::1]",
    "[::ffff:10.0.0.1]",
    "localhost",
    "example.com",
    "user@",
    ":443",
    "/hooks?x=1",
    "order.",
    "*",
    ".*",
    "proto=https",
    "[2001:db8::1]",
    "192.0.2.1",
    "10.0.0.1",
    "unknown",
    "_hidden",
    "\\\"",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "Sun, 06 Nov 1994 08:49:37 GMT",
    "0000000000000000000000000000000000000000000000000000000000000000",
];

/// The first byte of each line picks the header that the rest is the value of.
fn request(data: &[u8], names: &[HeaderName]) -> (Request<()>, Vec<u8>) {
    let mut lines = data.split(|&byte| byte == b'\n');
    let body = lines.next().unwrap_or_default().to_vec();
    let mut request = Request::post("https://hooks.example.com/in?kind=paid")
        .body(())
        .unwrap();
    for line in lines {
        let Some((&first, value)) = line.split_first() else {
            continue;
        };
        let name = names[usize::from(first) % names.len()].clone();
        if let Ok(value) = HeaderValue::from_bytes(value) {
            request.headers_mut().append(name, value);
        }
    }
    (request, body)
}

fn names(names: &[&'static str]) -> Vec<HeaderName> {
    names
        .iter()
        .map(|name| HeaderName::from_static(name))
        .collect()
}

/// No made-up signature is believed, of any scheme, and no made-up secret is
/// read but by its rules.
pub fn webhook(data: &[u8]) {
    static VERIFIERS: LazyLock<Vec<Verifier>> = LazyLock::new(|| {
        let secret = || Secret::from_bytes(std::array::from_fn::<u8, 32, _>(|_| fastrand::u8(..)));
        let schemes: Vec<Box<dyn Scheme>> = vec![
            Box::new(Sha256::new()),
            Box::new(GitHub),
            Box::new(Shopify),
            Box::new(Slack),
            Box::new(Stripe),
            Box::new(Standard::new()),
            Box::new(Standard::svix()),
            Box::new(HttpSignatures::new()),
            Box::new(HttpSignatures::new().components([]).id_as_nonce()),
        ];
        let verifiers = schemes.into_iter();
        verifiers
            .map(|scheme| Verifier::new(scheme, [secret().unwrap()]).unwrap())
            .collect()
    });
    static NAMES: LazyLock<Vec<HeaderName>> = LazyLock::new(|| {
        names(&[
            "x-webhook-signature",
            "x-hub-signature-256",
            "x-shopify-hmac-sha256",
            "x-slack-signature",
            "x-slack-request-timestamp",
            "stripe-signature",
            "webhook-id",
            "webhook-timestamp",
            "webhook-signature",
            "svix-id",
            "svix-timestamp",
            "svix-signature",
            "signature",
            "signature-input",
            "content-digest",
        ])
    });
    let (request, body) = request(data, &NAMES);
    for verifier in VERIFIERS.iter() {
        let verdict = verifier.verify(
            Head::from(&request),
            &body,
            Duration::from_secs(1_700_000_000),
        );
        assert!(verdict.is_err(), "{request:?}");
    }
    if let Ok(text) = String::from_utf8(data.to_vec())
        && let Ok(secret) = Secret::new(text)
    {
        let _ = Standard::new().key(&secret);
    }
}

/// Who is not trusted is who it is, whatever its headers say; and an address
/// that was read is one that stands there.
pub fn client_ip(data: &[u8]) {
    static TRUSTING: LazyLock<ClientIp> =
        LazyLock::new(|| ClientIp::new().trust(["10.0.0.0/8"]).unwrap());
    static NAMES: LazyLock<Vec<HeaderName>> =
        LazyLock::new(|| names(&["x-forwarded-for", "forwarded"]));
    let (mut request, _) = request(data, &NAMES);
    for trusted in [false, true] {
        let peer = IpAddr::V4(match trusted {
            true => Ipv4Addr::new(10, 0, 0, 1),
            false => Ipv4Addr::new(192, 0, 2, 7),
        });
        request.extensions_mut().insert(SocketAddr::new(peer, 1));
        let address = TRUSTING.address(Head::from(&request));
        if !trusted {
            assert!(address.is_none() || address == Some(peer), "{request:?}");
        }
    }
}

/// Times that others send: `Retry-After`, pushback, `grpc-timeout`.
pub fn times(data: &[u8]) {
    let names = names(&[
        "retry-after",
        "grpc-retry-pushback-ms",
        "grpc-timeout",
        "x-request-timeout",
    ]);
    let (mut request, _) = request(data, &names);
    let headers: &HeaderMap = request.headers();
    let _ = retry_after::parse(headers, Duration::from_secs(1_700_000_000));
    let _ = retry_after::pushback(headers);

    let layer = TimeoutLayer::builder()
        .adopt()
        .header(HeaderName::from_static("x-request-timeout"))
        .build()
        .unwrap();
    request.headers_mut().insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    let mut service = layer.layer(Answers);
    let answer = pin!(service.call(request));
    // At once: no timer is made, and no runtime needed.
    let _ = answer.poll(&mut Context::from_waker(Waker::noop()));
}

/// Urls, patterns and headers that users register: what the guard lets pass is
/// public, and what is registered is one url without a user.
pub fn urls(data: &[u8]) {
    static GUARD: LazyLock<Guard> = LazyLock::new(|| Guard::new().allow_http());
    static WEBHOOKS: LazyLock<Webhooks> = LazyLock::new(|| {
        let transport = tower::service_fn(async |_: Request<WholeBody>| {
            Ok::<_, Infallible>(Response::new(WholeBody::default()))
        });
        Webhooks::builder().build(transport).unwrap()
    });
    let text = String::from_utf8_lossy(data);
    let mut lines = text.lines();
    let url = lines.next().unwrap_or_default();
    if let Ok(uri) = url.parse::<http::Uri>()
        && GUARD.check_uri(&uri).is_ok()
    {
        let host = uri.host().expect("it was judged");
        assert!(
            !uri.authority()
                .expect("it has a host")
                .as_str()
                .contains('@')
        );
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = host.parse::<IpAddr>() {
            assert!(GUARD.check_ip(address).is_ok(), "{url}");
            assert!(!address.is_loopback() && !address.is_unspecified(), "{url}");
        }
        // What would be a number to who reads addresses freely is no name.
        let last = host.trim_end_matches('.').rsplit('.').next();
        let last = last.unwrap_or_default();
        let number = !last.is_empty() && last.bytes().all(|byte| byte.is_ascii_digit());
        assert!(!number || host.parse::<Ipv4Addr>().is_ok(), "{url}");
    }
    let events: Vec<_> = lines.by_ref().take(3).map(str::to_owned).collect();
    let headers: Vec<_> = lines.filter_map(|line| line.split_once(':')).collect();
    let registration = Registration::new(url).events(events).headers(headers);
    let _ = format!("{registration:?}");
    if let Ok(id) = WEBHOOKS.register(registration) {
        assert!(!url.contains('@') || !url.split('/').nth(2).unwrap_or_default().contains('@'));
        let gone = pin!(WEBHOOKS.unregister(Selector::all().id(id)));
        let gone = gone.poll(&mut Context::from_waker(Waker::noop()));
        assert!(matches!(gone, Poll::Ready(1)));
    }
}

#[derive(Clone)]
struct Answers;

impl Service<Request<()>> for Answers {
    type Response = Response<String>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Response<String>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<()>) -> Self::Future {
        std::future::ready(Ok(Response::new(String::new())))
    }
}
