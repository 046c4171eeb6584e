//! Refusals as HTTP responses.
//!
//! A [`Responder`] turns a [`Refusal`] into a response. The default one,
//! [`ProblemResponder`], writes RFC 9457 `application/problem+json`, or gRPC
//! trailers-only where the request's content-type says gRPC. A closure is a
//! responder too:
//!
//! ```
//! use buttress_core::{Head, Refusal, Responder};
//! use bytes::Bytes;
//! use http::Response;
//!
//! let teapot = |refusal: &Refusal, _request: Head<'_>| {
//!     Response::builder()
//!         .status(418)
//!         .body(Bytes::from(refusal.detail().to_owned()))
//!         .unwrap()
//! };
//! # fn takes(_: impl Responder) {}
//! takes(teapot);
//! ```

use std::{
    fmt,
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use http::{
    Extensions, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER},
    request::Parts,
};

use crate::{Head, Refusal, RefusalKind, refusal::Tell};

/// `grpc-status`.
pub const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// `grpc-message`.
pub const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// `grpc-retry-pushback-ms`: when a gRPC client may retry (gRFC A6).
pub const GRPC_RETRY_PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// Turns a refusal into a response.
///
/// Called where the request is refused, outside every lock. The layer adds its
/// own headers (`X-RateLimit-*`, say) to what the responder made, and the
/// refusal itself for those who want to be [told](Tell): a layer asks its
/// responder through [`SharedResponder`], which does that.
pub trait Responder: Send + Sync + 'static {
    /// The response for `refusal` of `request`.
    fn respond(&self, refusal: &Refusal, request: Head<'_>) -> Response<Bytes>;

    /// What to keep of a request that may yet be refused after it was given
    /// away: what [`respond`](Self::respond) will then be shown.
    ///
    /// Only layers that refuse so late ask for it (one that turns the inner
    /// service's errors into responses, say), and they ask for every request.
    /// Default: a copy of the whole head, extensions included. A responder that
    /// looks at less says so here, with [`KeptHead::protocol`], and costs
    /// nothing.
    fn keep(&self, request: Head<'_>) -> KeptHead {
        KeptHead::whole(request)
    }
}

impl<F> Responder for F
where
    F: Fn(&Refusal, Head<'_>) -> Response<Bytes> + Send + Sync + 'static,
{
    fn respond(&self, refusal: &Refusal, request: Head<'_>) -> Response<Bytes> {
        self(refusal, request)
    }
}

/// The default responder: a problem document (RFC 9457), or, for gRPC,
/// HTTP 200 with the status in the headers (trailers-only).
///
/// `Retry-After` is in whole seconds, rounded up, at least 1; gRPC clients get
/// `grpc-retry-pushback-ms`, rounded up, instead.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProblemResponder;

impl Responder for ProblemResponder {
    fn respond(&self, refusal: &Refusal, request: Head<'_>) -> Response<Bytes> {
        match grpc_type(request) {
            Some(content_type) => grpc(refusal, content_type),
            None => problem(refusal),
        }
    }

    /// Whether it was gRPC, which is all it asks.
    fn keep(&self, request: Head<'_>) -> KeptHead {
        KeptHead::protocol(request)
    }
}

/// What a [`Responder`] keeps of a request: see [`Responder::keep`].
#[derive(Clone, Debug)]
pub struct KeptHead(Kept);

#[derive(Clone, Debug)]
enum Kept {
    // With whether the refusal is to be told.
    Protocol(Protocol, bool),
    Whole(Box<Parts>),
}

#[derive(Clone, Copy, Debug)]
enum Protocol {
    Http,
    Grpc,
    GrpcWeb,
}

impl KeptHead {
    /// Only whether the request was gRPC, and whether someone wants to be
    /// [told](Tell). No allocation; the head that comes of it has no other
    /// header and no other extension.
    #[must_use]
    pub fn protocol(request: Head<'_>) -> Self {
        let protocol = match grpc_type(request) {
            Some(GRPC_WEB) => Protocol::GrpcWeb,
            Some(_) => Protocol::Grpc,
            None => Protocol::Http,
        };
        Self(Kept::Protocol(protocol, Tell::is_in(request.extensions)))
    }

    /// A copy of the whole head: several allocations.
    #[must_use]
    pub fn whole(request: Head<'_>) -> Self {
        let (mut parts, ()) = Request::new(()).into_parts();
        parts.method = request.method.clone();
        parts.uri = request.uri.clone();
        parts.version = request.version;
        parts.headers = request.headers.clone();
        parts.extensions = request.extensions.clone();
        Self(Kept::Whole(Box::new(parts)))
    }

    /// What was kept, as a head. Of [`protocol`](Self::protocol): a GET, or
    /// a gRPC POST, of `/`.
    #[must_use]
    pub fn head(&self) -> Head<'_> {
        static HTTP: LazyLock<Request<()>> = LazyLock::new(Request::default);
        static GRPC: LazyLock<Request<()>> = LazyLock::new(|| grpc_request(self::GRPC));
        static WEB: LazyLock<Request<()>> = LazyLock::new(|| grpc_request(GRPC_WEB));
        static TELL: LazyLock<Extensions> = LazyLock::new(|| {
            let mut extensions = Extensions::new();
            Tell::attach(&mut extensions);
            extensions
        });

        let (protocol, tell) = match &self.0 {
            Kept::Protocol(protocol, tell) => (protocol, *tell),
            Kept::Whole(parts) => return Head::from(&**parts),
        };
        let mut head = Head::from(match protocol {
            Protocol::Http => &*HTTP,
            Protocol::Grpc => &*GRPC,
            Protocol::GrpcWeb => &*WEB,
        });
        if tell {
            head.extensions = &TELL;
        }
        head
    }
}

const GRPC: &str = "application/grpc";
const GRPC_WEB: &str = "application/grpc-web";

fn grpc_request(content_type: &'static str) -> Request<()> {
    let mut request = Request::default();
    *request.method_mut() = Method::POST;
    let content_type = HeaderValue::from_static(content_type);
    request.headers_mut().insert(CONTENT_TYPE, content_type);
    request
}

/// How to answer a gRPC request: browsers speak their own kind.
fn grpc_type(request: Head<'_>) -> Option<&'static str> {
    if !request.is_grpc() {
        return None;
    }
    let asked = request.headers.get(CONTENT_TYPE)?.as_bytes();
    let web = asked
        .get(..GRPC_WEB.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(GRPC_WEB.as_bytes()));
    Some(if web { GRPC_WEB } else { GRPC })
}

fn problem(refusal: &Refusal) -> Response<Bytes> {
    let body = if refusal.is_plain() {
        Bytes::from_static(refusal.kind().default_problem().as_bytes())
    } else {
        document(refusal)
    };
    let mut response = Response::new(body);
    *response.status_mut() = refusal.status();
    let headers = response.headers_mut();
    // One allocation for what the layers are about to add, too.
    headers.reserve(6);
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/problem+json"),
    );
    if let Some(secs) = refusal.retry_after_secs() {
        headers.insert(RETRY_AFTER, integer(secs));
    }
    response
}

fn document(refusal: &Refusal) -> Bytes {
    let kind = refusal.kind();
    let status = refusal.status();
    let mut document = serde_json::Map::new();
    let mut put = |name: &str, value: serde_json::Value| {
        document.insert(name.to_owned(), value);
    };
    put("type", kind.problem_type().into());
    // With `about:blank` the title is the status phrase (RFC 9457 §4.2.1).
    let title = if status == kind.status() {
        kind.title()
    } else {
        status.canonical_reason().unwrap_or(kind.title())
    };
    put("title", title.into());
    put("status", status.as_u16().into());
    put("detail", refusal.detail().into());
    put("reason", refusal.reason().into());
    for (name, value) in refusal.members() {
        put(name, value.clone());
    }
    serde_json::Value::Object(document).to_string().into()
}

fn grpc(refusal: &Refusal, content_type: &'static str) -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    headers.reserve(6);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(GRPC_STATUS, integer(refusal.kind().grpc_code().into()));
    headers.insert(GRPC_MESSAGE, percent_encoded(refusal.detail()));
    if let Some(wait) = refusal.retry_after() {
        let millis = wait.as_nanos().div_ceil(1_000_000);
        // A gRPC client reads it into 32 bits: 24 days.
        let millis = u64::try_from(millis)
            .unwrap_or(u64::MAX)
            .min(i32::MAX as u64);
        headers.insert(GRPC_RETRY_PUSHBACK, integer(millis));
    } else if refusal.kind() == RefusalKind::NeverFits {
        // Not ever, in the words of gRFC A6.
        headers.insert(GRPC_RETRY_PUSHBACK, HeaderValue::from_static("-1"));
    }
    response
}

/// `grpc-message`, percent-encoded as the gRPC specification asks: printable
/// ASCII but `%` stays as it is.
fn percent_encoded(message: &str) -> HeaderValue {
    use fmt::Write;

    let mut encoded = String::with_capacity(message.len());
    for byte in message.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
            _ => write!(encoded, "%{byte:02X}").expect("a string takes all"),
        }
    }
    HeaderValue::try_from(encoded).expect("only printable ASCII is left")
}

/// A whole number as a header value. Below 1000 it costs no allocation.
#[must_use]
pub fn integer(number: u64) -> HeaderValue {
    /// "000", "001", … "999".
    static SMALL: [[u8; 3]; 1000] = {
        let mut table = [[b'0'; 3]; 1000];
        let mut n = 0;
        while n < 1000 {
            #[expect(clippy::cast_possible_truncation)]
            let digits = [(n / 100) as u8, (n / 10 % 10) as u8, (n % 10) as u8];
            table[n] = [b'0' + digits[0], b'0' + digits[1], b'0' + digits[2]];
            n += 1;
        }
        table
    };

    match usize::try_from(number) {
        Ok(n) if n < SMALL.len() => {
            let skip = usize::from(n < 100) + usize::from(n < 10);
            let digits = std::str::from_utf8(&SMALL[n][skip..]).expect("digits are ASCII");
            HeaderValue::from_static(digits)
        }
        _ => {
            let mut buffer = itoa::Buffer::new();
            HeaderValue::from_str(buffer.format(number)).expect("digits are a valid value")
        }
    }
}

/// What `responder` answers, with the refusal itself for those who want to be
/// told.
pub(crate) fn respond(
    responder: &(impl Responder + ?Sized),
    refusal: &Refusal,
    request: Head<'_>,
) -> Response<Bytes> {
    let mut response = responder.respond(refusal, request);
    if Tell::is_in(request.extensions) {
        response.extensions_mut().insert(refusal.clone());
    }
    response
}

/// A [`Responder`] shared by the clones of a layer.
#[derive(Clone)]
pub struct SharedResponder(Arc<dyn Responder>);

impl SharedResponder {
    /// Shares `responder`.
    pub fn new(responder: impl Responder) -> Self {
        Self(Arc::new(responder))
    }

    /// The response for `refusal` of `request`, with the refusal in its
    /// extensions where the request [asks](Tell) for it.
    #[must_use]
    pub fn respond(&self, refusal: &Refusal, request: Head<'_>) -> Response<Bytes> {
        respond(&*self.0, refusal, request)
    }

    /// What to keep of a request that may yet be refused after it was given
    /// away: see [`Responder::keep`].
    #[must_use]
    pub fn keep(&self, request: Head<'_>) -> KeptHead {
        self.0.keep(request)
    }
}

impl Default for SharedResponder {
    fn default() -> Self {
        Self::new(ProblemResponder)
    }
}

impl fmt::Debug for SharedResponder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedResponder")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn respond(refusal: &Refusal, content_type: &str) -> Response<Bytes> {
        let request = Request::builder()
            .header(CONTENT_TYPE, content_type)
            .body(())
            .unwrap();
        ProblemResponder.respond(refusal, Head::from(&request))
    }

    #[test]
    fn http_gets_a_problem_document() {
        let refusal =
            Refusal::new(RefusalKind::RateLimited).with_retry_after(Duration::from_millis(2100));
        let response = respond(&refusal, "text/plain");
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "3");
        assert_eq!(
            response.headers()["content-type"],
            "application/problem+json"
        );
        let problem: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(problem["status"], 429);
        assert_eq!(problem["reason"], "rate_limited");
    }

    #[test]
    fn details_and_members_are_escaped() {
        let refusal = Refusal::new(RefusalKind::Unauthenticated)
            .with_detail("say \"please\"\n")
            .with_reason("timestamp_too_old")
            .with_status(StatusCode::FORBIDDEN)
            .with_member("hint", serde_json::json!(["a", 1]));
        let response = respond(&refusal, "text/plain");
        assert_eq!(response.status(), 403);
        let problem: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(problem["detail"], "say \"please\"\n");
        assert_eq!(problem["reason"], "timestamp_too_old");
        assert_eq!(problem["title"], "Forbidden");
        assert_eq!(problem["hint"][1], 1);
    }

    #[test]
    fn grpc_gets_trailers_only() {
        let refusal = Refusal::new(RefusalKind::RateLimited)
            .with_retry_after(Duration::from_micros(1500))
            .with_detail("100 % used, né");
        let response = respond(&refusal, "application/grpc+proto");
        assert_eq!(response.status(), 200);
        assert!(response.body().is_empty());
        let headers = response.headers();
        assert_eq!(headers["grpc-status"], "8");
        assert_eq!(headers["grpc-message"], "100 %25 used, n%C3%A9");
        assert_eq!(headers["grpc-retry-pushback-ms"], "2");
        assert!(!headers.contains_key("retry-after"));
    }

    #[test]
    fn a_head_is_kept_whole_or_as_its_protocol() {
        let request = Request::put("/a?b")
            .header("content-type", "application/grpc+proto")
            .header("x-tenant", "acme")
            .extension(7_u8)
            .body(())
            .unwrap();
        let kept = SharedResponder::default().keep(Head::from(&request));
        assert!(kept.head().is_grpc());
        assert_eq!(kept.head().headers.len(), 1);
        let kept = ProblemResponder.keep(Head::from(&Request::new(())));
        assert!(!kept.head().is_grpc());

        let closure = |_: &Refusal, _: Head<'_>| Response::new(Bytes::new());
        let kept = SharedResponder::new(closure).keep(Head::from(&request));
        let head = kept.head();
        assert_eq!((head.method, head.uri), (request.method(), request.uri()));
        assert_eq!(head.headers, request.headers());
        assert_eq!(head.extensions.get(), Some(&7_u8));
    }

    #[test]
    fn who_wants_to_be_told_finds_the_refusal() {
        let refusal = Refusal::new(RefusalKind::CircuitOpen)
            .with_retry_after(Duration::from_millis(1500))
            .with_origin("billing");
        let closure = |_: &Refusal, _: Head<'_>| {
            let mut response = Response::new(Bytes::new());
            response.extensions_mut().insert(7_u8);
            response
        };
        for responder in [SharedResponder::default(), SharedResponder::new(closure)] {
            for content_type in ["text/plain", "application/grpc", "application/grpc-web"] {
                let mut request = Request::builder()
                    .header("content-type", content_type)
                    .body(())
                    .unwrap();
                // At once, and of what was kept.
                let answers = |request: &Request<()>| {
                    let kept = responder.keep(Head::from(request));
                    let now = responder.respond(&refusal, Head::from(request));
                    [now, responder.respond(&refusal, kept.head())]
                };
                let untold = answers(&request);
                Tell::attach(request.extensions_mut());
                for (told, untold) in answers(&request).iter().zip(&untold) {
                    assert_eq!(Refusal::of(told.extensions()), Some(&refusal));
                    assert_eq!(Refusal::of(untold.extensions()), None);
                    // What is sent is the same.
                    assert_eq!(told.status(), untold.status());
                    assert_eq!(told.headers(), untold.headers());
                    assert_eq!(told.body(), untold.body());
                    assert_eq!(
                        told.extensions().get::<u8>(),
                        untold.extensions().get::<u8>()
                    );
                }
            }
        }
    }

    #[test]
    fn of_a_little_head_is_kept_that_someone_wants_to_be_told() {
        assert!(size_of::<KeptHead>() <= 16);
        let mut request = Request::builder()
            .header("content-type", "application/grpc-web+proto")
            .extension(7_u8)
            .body(())
            .unwrap();
        for tell in [false, true] {
            if tell {
                Tell::attach(request.extensions_mut());
            }
            let kept = KeptHead::protocol(Head::from(&request)).clone();
            assert_eq!(Tell::is_in(kept.head().extensions), tell);
            assert_eq!(kept.head().extensions.get::<u8>(), None);
            assert!(kept.head().is_grpc());
            let whole = KeptHead::whole(Head::from(&request));
            assert_eq!(Tell::is_in(whole.head().extensions), tell);
        }
    }

    #[test]
    fn grpc_clients_are_told_never_and_browsers_their_own_type() {
        let never = Refusal::new(RefusalKind::NeverFits);
        let response = respond(&never, "application/grpc-web+proto");
        assert_eq!(response.headers()["grpc-retry-pushback-ms"], "-1");
        assert_eq!(response.headers()["content-type"], "application/grpc-web");
        let request = Request::builder()
            .header(CONTENT_TYPE, "application/grpc-web-text")
            .body(())
            .unwrap();
        let kept = ProblemResponder.keep(Head::from(&request));
        let late = ProblemResponder.respond(&never, kept.head());
        assert_eq!(late.headers()["content-type"], "application/grpc-web");
    }

    #[test]
    fn numbers_read_as_they_are() {
        for number in [0, 7, 10, 42, 99, 100, 999, 1000, 1_790_000_000, u64::MAX] {
            assert_eq!(integer(number), number.to_string().as_str());
        }
    }
}
