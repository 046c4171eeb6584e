//! What a proxy does to header fields: takes away what was meant for one hop
//! (RFC 9110 §7.6.1), says where a request came from, and refuses what two
//! parties could read in two ways.

use std::{
    borrow::Cow,
    net::IpAddr,
    sync::{LazyLock, OnceLock},
};

use buttress::{Refusal, RefusalKind};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, COOKIE, FORWARDED, HOST, PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE, VIA,
    },
    request::Parts,
    uri::{Authority, PathAndQuery},
};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The name that we sign `Via` with: of this process alone, since two proxies
/// in a row are no loop.
static PSEUDONYM: LazyLock<String> =
    LazyLock::new(|| format!("buttress-{:08x}", fastrand::u32(..)));

/// The comma-separated members of all lines of a field, in order. As bytes: a
/// member that is no text must not hide those beside it.
fn members<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    headers
        .get_all(name)
        .iter()
        .flat_map(|line| line.as_bytes().split(|&b| b == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|member| !member.is_empty())
}

fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    members(headers, name).any(|member| member.eq_ignore_ascii_case(token.as_bytes()))
}

/// The protocol that an HTTP/1.1 client asks to change to. HTTP/2 by upgrade
/// is not offered: a tunnel would carry requests past every rule here.
pub(crate) fn upgrade(version: Version, headers: &HeaderMap) -> Option<HeaderValue> {
    let wanted = version == Version::HTTP_11
        && has_token(headers, &CONNECTION, "upgrade")
        && !has_token(headers, &UPGRADE, "h2c");
    wanted.then(|| headers.get(UPGRADE).cloned()).flatten()
}

/// Whether the client waits for `100 Continue` before it sends its body.
pub(crate) fn expects_continue(headers: &HeaderMap) -> bool {
    headers
        .get(http::header::EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Takes away the fields that `Connection` names, and forgets that it did: what
/// is added in their place is then not taken away, too. What is asked for by
/// `Upgrade` and `TE` stays asked for.
pub(crate) fn forget_named(headers: &mut HeaderMap) {
    let upgrade = has_token(headers, &CONNECTION, "upgrade");
    remove_named(headers, &[UPGRADE, TE]);
    headers.remove(CONNECTION);
    if upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
}

fn remove_named(headers: &mut HeaderMap, but: &[HeaderName]) {
    // Every `Connection` line counts, not only the first.
    let named: Vec<HeaderName> = members(headers, &CONNECTION)
        .filter_map(|name| HeaderName::from_bytes(name).ok())
        .collect();
    for name in named {
        // What the next hop cannot do without is not for a sender to remove,
        // nor what is looked at below or was added by us already.
        let kept = [HOST, CONTENT_LENGTH, TRANSFER_ENCODING, X_REQUEST_ID];
        if !kept.contains(&name) && !but.contains(&name) {
            headers.remove(name);
        }
    }
}

/// Takes away what concerns one connection only. `Trailer` stays: it speaks of
/// the message, and hyper sends no trailer that it does not announce.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    remove_named(headers, &[]);
    // A length beside another framing is not to be believed, nor passed on
    // (RFC 9112 §6.3).
    if headers.remove(TRANSFER_ENCODING).is_some() {
        headers.remove(CONTENT_LENGTH);
    }
    for name in [
        CONNECTION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        TE,
        UPGRADE,
    ] {
        headers.remove(name);
    }
}

/// Makes the request's authority certain, or refuses: on HTTP/1.1 there must
/// be exactly one `Host` (RFC 9112 §3.2), and one beside an `:authority` must
/// say the same (RFC 9113 §8.3.1). `None` is an HTTP/1.0 request without one.
pub(crate) fn authority(head: &Parts) -> Result<Option<Authority>, Refusal> {
    let bad = |detail| Err(Refusal::new(RefusalKind::BadRequest).with_detail(detail));
    let mut hosts = head.headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return bad("more than one Host");
    }
    let host = match host.map(|host| Authority::try_from(host.as_bytes())) {
        None => None,
        Some(Ok(host)) if !host.as_str().contains('@') => Some(host),
        Some(_) => return bad("the Host is no host"),
    };
    match (head.uri.authority(), host) {
        (Some(target), Some(host)) if head.version == Version::HTTP_2 && *target != host => {
            bad("Host and :authority differ")
        }
        (Some(target), _) if target.as_str().contains('@') => bad("the authority is no host"),
        (_, None) if head.version == Version::HTTP_11 => bad("the Host is missing"),
        // The target's counts, also on HTTP/1.1 (RFC 9112 §3.2.2).
        (Some(target), _) => Ok(Some(target.clone())),
        (None, None) if head.version == Version::HTTP_2 => bad("the :authority is missing"),
        (None, host) => Ok(host),
    }
}

/// Refuses what an upstream might read differently from us.
pub(crate) fn unambiguous(head: &Parts) -> Result<(), Refusal> {
    if head.method == Method::CONNECT {
        let detail = "CONNECT is not supported";
        return Err(Refusal::new(RefusalKind::NotImplemented).with_detail(detail));
    }
    if is_coded(&head.headers) {
        let detail = "no transfer coding but chunked is supported";
        return Err(Refusal::new(RefusalKind::NotImplemented).with_detail(detail));
    }
    if path_can_climb(head.uri.path()) {
        let detail = "the path has dot segments or a null byte";
        return Err(Refusal::new(RefusalKind::BadRequest).with_detail(detail));
    }
    Ok(())
}

/// Whether a message has a transfer coding beside `chunked`. hyper has decoded
/// that one; under any other the bytes would go on without the word that says
/// what they are.
pub(crate) fn is_coded(headers: &HeaderMap) -> bool {
    let mut codings = members(headers, &TRANSFER_ENCODING);
    codings
        .next()
        .is_some_and(|coding| !coding.eq_ignore_ascii_case(b"chunked") || codings.next().is_some())
}

/// Whether a path, as some upstream may decode it, leads out of its prefix,
/// and so out of the route that was chosen for it. `%2F` by itself is fine.
fn path_can_climb(path: &str) -> bool {
    if !path.contains("/.") && !path.contains('%') && !path.contains('\\') {
        return false;
    }
    let path = path.to_ascii_lowercase();
    let path = path
        .replace("%2e", ".")
        .replace("%2f", "/")
        .replace("%5c", "/")
        .replace("%3b", ";")
        .replace('\\', "/");
    // Servlet containers take what follows a `;` off before they look.
    let is_dots = |segment: &str| matches!(segment.split(';').next(), Some("." | ".."));
    path.contains("%00") || path.split('/').any(is_dots)
}

/// Bytes that the head's fields take up in HTTP/1.1.
pub(crate) fn size(headers: &HeaderMap) -> usize {
    headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len())
        .sum()
}

/// Whether this very process has sent the request on before.
pub(crate) fn has_passed_here(headers: &HeaderMap) -> bool {
    members(headers, &VIA).any(|hop| {
        let mut parts = hop
            .split(u8::is_ascii_whitespace)
            .filter(|it| !it.is_empty());
        parts.nth(1) == Some(PSEUDONYM.as_bytes())
    })
}

/// Where a request came from.
pub(crate) struct Origin<'a> {
    /// The other end of the connection.
    pub(crate) peer: IpAddr,
    /// Who the request is from: the peer, or whom a trusted peer names.
    pub(crate) client: IpAddr,
    /// Whether the peer may speak for others.
    pub(crate) trusted: bool,
    /// What the client called us.
    pub(crate) host: Option<&'a Authority>,
    /// The protocol it spoke.
    pub(crate) version: Version,
    /// `https` where that was in TLS, else `http`.
    pub(crate) scheme: &'static str,
}

/// Says where the request came from. What a trusted peer said is added to;
/// what anyone else said is replaced, so that an upstream can believe it.
pub(crate) fn forward(headers: &mut HeaderMap, origin: &Origin<'_>) {
    let version = match origin.version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    };
    let via = format!("{version} {}", *PSEUDONYM);
    if !origin.trusted {
        for name in [
            X_FORWARDED_FOR,
            X_FORWARDED_PROTO,
            X_FORWARDED_HOST,
            FORWARDED,
            VIA,
        ] {
            headers.remove(name);
        }
        drop_lookalikes(headers);
    } else if !headers.contains_key(X_FORWARDED_FOR) && origin.client != origin.peer {
        // The chain came in `Forwarded`. Upstreams that look at this header
        // first must not take the peer for the client.
        headers.insert(X_FORWARDED_FOR, value(origin.client.to_string()));
    }
    append(headers, X_FORWARDED_FOR, &origin.peer.to_string());
    append(headers, VIA, &via);
    headers
        .entry(X_FORWARDED_PROTO)
        .or_insert(HeaderValue::from_static(origin.scheme));
    if let Some(host) = origin.host
        && !headers.contains_key(X_FORWARDED_HOST)
    {
        headers.insert(X_FORWARDED_HOST, value(host.to_string()));
    }
}

/// Takes off what CGI and its heirs cannot tell from the fields above: they
/// make `_` of `-`, and so of `X_Forwarded_For` what we say ourselves.
fn drop_lookalikes(headers: &mut HeaderMap) {
    let names: Vec<_> = headers
        .keys()
        .filter(|name| name.as_str().contains('_'))
        .filter(|name| name.as_str().replace('_', "-").starts_with("x-forwarded-"))
        .cloned()
        .collect();
    for name in names {
        headers.remove(name);
    }
}

/// Adds a member to a list, as one line: not every reader joins several.
fn append(headers: &mut HeaderMap, name: HeaderName, member: &str) {
    let mut list: Vec<u8> = Vec::new();
    for line in headers.get_all(&name) {
        list.extend_from_slice(line.as_bytes());
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(member.as_bytes());
    let list = HeaderValue::from_bytes(&list).expect("made of values");
    headers.insert(name, list);
}

fn value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("an address or authority is a value")
}

/// The request's id: the client's, if it can be logged as it is, or a new one.
pub(crate) fn request_id(headers: &mut HeaderMap) -> HeaderValue {
    let given = headers.get(X_REQUEST_ID).filter(|id| {
        (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
    });
    let id = given
        .cloned()
        .unwrap_or_else(|| value(format!("{:032x}", fastrand::u128(..))));
    headers.insert(X_REQUEST_ID, id.clone());
    id
}

/// Passes a trace context on (W3C Trace Context §4), or starts one.
pub(crate) fn trace(headers: &mut HeaderMap, made: &OnceLock<HeaderValue>) {
    let mut lines = headers.get_all(TRACEPARENT).iter();
    let sound = lines.next().is_some_and(is_traceparent) && lines.next().is_none();
    if !sound {
        // A state without its parent would be taken for the new one's.
        headers.remove(TRACESTATE);
        let made = made.get_or_init(|| {
            let (trace, span) = (fastrand::u128(1..), fastrand::u64(1..));
            value(format!("00-{trace:032x}-{span:016x}-01"))
        });
        headers.insert(TRACEPARENT, made.clone());
    }
}

fn is_traceparent(value: &HeaderValue) -> bool {
    let Ok(text) = value.to_str() else {
        return false;
    };
    let mut parts = text.split('-');
    let mut hex = |len: usize| {
        parts.next().filter(|part| {
            part.len() == len && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        })
    };
    let not_zero = |part: &str| part.bytes().any(|b| b != b'0');
    match (hex(2), hex(32), hex(16), hex(2)) {
        (Some(version), Some(trace), Some(span), Some(_)) => {
            version != "ff"
                && not_zero(trace)
                && not_zero(span)
                // Later versions may have more parts.
                && (version != "00" || parts.next().is_none())
        }
        _ => false,
    }
}

/// One `Cookie` line out of the many that HTTP/2 may split it into
/// (RFC 9113 §8.2.3): HTTP/1.1 allows no more.
pub(crate) fn join_cookies(headers: &mut HeaderMap) {
    let mut lines = headers.get_all(COOKIE).iter();
    if lines.next().is_some() && lines.next().is_some() {
        let lines: Vec<_> = headers
            .get_all(COOKIE)
            .iter()
            .map(HeaderValue::as_bytes)
            .collect();
        let joined = HeaderValue::from_bytes(&lines.join(&b"; "[..])).expect("made of values");
        headers.insert(COOKIE, joined);
    }
}

/// Whether the client understands trailers, which is all of `TE` that can be
/// passed on.
pub(crate) fn accepts_trailers(headers: &HeaderMap) -> bool {
    has_token(headers, &TE, "trailers")
}

/// A path as routes are chosen by: what is encoded though it need not be is
/// decoded (RFC 3986 §6.2.2.2), and slashes in a row are one, as upstreams
/// read it. Else `/%61dmin` would go past the limits of `/admin`.
pub(crate) fn plain_path(path: &str) -> Cow<'_, str> {
    if !path.contains('%') && !path.contains("//") {
        return Cow::Borrowed(path);
    }
    let mut plain = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(next) = rest.chars().next() {
        let hex = rest.get(1..3).filter(|_| next == '%');
        let decoded = hex
            .and_then(|hex| u8::from_str_radix(hex, 16).ok())
            .map(char::from)
            .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~'));
        let (c, length) = match decoded {
            Some(decoded) => (decoded, 3),
            None => (next, next.len_utf8()),
        };
        if c != '/' || !plain.ends_with('/') {
            plain.push(c);
        }
        rest = &rest[length..];
    }
    Cow::Owned(plain)
}

/// The path without a route's prefix.
pub(crate) fn strip_prefix(target: &PathAndQuery, prefix: &str) -> PathAndQuery {
    let rest = match target.path().strip_prefix(prefix) {
        Some(rest) => Cow::Borrowed(rest),
        // The route was chosen by another spelling of the same path.
        None => {
            let plain = plain_path(target.path());
            Cow::Owned(plain.strip_prefix(prefix).unwrap_or(&plain).to_owned())
        }
    };
    let slash = if rest.starts_with('/') { "" } else { "/" };
    let query = target.query().map(|query| format!("?{query}"));
    let query = query.unwrap_or_default();
    let target = format!("{slash}{rest}{query}");
    target.parse().expect("the end of a target is a target")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_path_has_one_spelling() {
        for (path, plain) in [
            ("/admin", "/admin"),
            ("/%61dmin/%7Eme", "/admin/~me"),
            ("/a%2fb%20c", "/a%2fb%20c"),
            ("//admin///x", "/admin/x"),
            ("/100%", "/100%"),
            ("/%6", "/%6"),
            ("/%zz%C3%A9", "/%zz%C3%A9"),
        ] {
            assert_eq!(plain_path(path), plain, "{path}");
        }
        let strip = |target: &str| {
            let target = target.parse().unwrap();
            strip_prefix(&target, "/admin").to_string()
        };
        assert_eq!(strip("/admin/a%20b?c=/admin"), "/a%20b?c=/admin");
        assert_eq!(strip("/%61dmin/x"), "/x");
        assert_eq!(strip("/admin?c"), "/?c");
    }

    fn map(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in lines {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn hop_by_hop_fields_go_whoever_names_them() {
        let mut headers = map(&[
            ("connection", "close, x-one"),
            ("connection", "X-Two"),
            ("x-one", "1"),
            ("x-two", "2"),
            ("keep-alive", "timeout=5"),
            ("te", "gzip"),
            ("proxy-connection", "close"),
            ("transfer-encoding", "chunked"),
            ("content-length", "5"),
            ("trailer", "x-sum"),
            ("x-stays", "yes"),
        ]);
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers, map(&[("trailer", "x-sum"), ("x-stays", "yes")]));
    }

    #[test]
    fn connection_cannot_take_the_frame_away() {
        let mut headers = map(&[
            ("connection", "host, content-length"),
            ("host", "a"),
            ("content-length", "5"),
        ]);
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers, map(&[("host", "a"), ("content-length", "5")]));
    }

    #[test]
    fn a_line_that_is_no_text_hides_nothing() {
        let mut headers = map(&[("x-one", "1")]);
        let junk = HeaderValue::from_bytes(b"x-\xff, x-one").unwrap();
        headers.append(CONNECTION, junk);
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers, map(&[]));

        headers.append(TRANSFER_ENCODING, HeaderValue::from_bytes(b"\xff").unwrap());
        headers.append(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        assert!(is_coded(&headers));
    }

    #[test]
    fn paths_that_climb_are_seen_through_their_encodings() {
        for path in [
            "/a/../b",
            "/a/..",
            "/./a",
            "/a/%2e%2e/b",
            "/a/.%2E/b",
            "/a/..%2fb",
            "/a%2f..%2fb",
            "/a/..\\b",
            "/a/..%5Cb",
            "/a/..;/b",
            "/a/..;x=1",
            "/a/%2e.%3bx/b",
            "/a%00",
        ] {
            assert!(path_can_climb(path), "{path}");
        }
        for path in [
            "/",
            "/a/.well-known/b",
            "/a/...",
            "/a..b/c",
            "/a/b;..",
            "/group%2Fproject",
            "/100%25",
        ] {
            assert!(!path_can_climb(path), "{path}");
        }
    }

    #[test]
    fn the_forwarding_chain_is_kept_from_the_trusted_only() {
        let origin = |trusted| Origin {
            peer: [10, 0, 0, 1].into(),
            client: [1, 2, 3, 4].into(),
            trusted,
            host: None,
            version: Version::HTTP_11,
            scheme: "http",
        };
        let given = map(&[
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-for", "10.0.0.2"),
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=1.2.3.4"),
            ("via", "1.1 edge"),
        ]);

        let mut headers = given.clone();
        forward(&mut headers, &origin(true));
        assert_eq!(headers["x-forwarded-for"], "1.2.3.4, 10.0.0.2, 10.0.0.1");
        assert_eq!(headers["x-forwarded-proto"], "https");
        assert!(
            headers["via"]
                .to_str()
                .unwrap()
                .starts_with("1.1 edge, 1.1 buttress-")
        );
        assert!(headers.contains_key("forwarded"));
        assert!(has_passed_here(&headers));

        let mut headers = given;
        forward(&mut headers, &origin(false));
        assert_eq!(headers["x-forwarded-for"], "10.0.0.1");
        assert_eq!(headers["x-forwarded-proto"], "http");
        assert!(
            headers["via"]
                .to_str()
                .unwrap()
                .starts_with("1.1 buttress-")
        );
        assert!(!headers.contains_key("forwarded"));

        let mut headers = map(&[("forwarded", "for=1.2.3.4")]);
        forward(&mut headers, &origin(true));
        assert_eq!(headers["x-forwarded-for"], "1.2.3.4, 10.0.0.1");
    }

    #[test]
    fn trace_contexts_are_kept_if_sound() {
        let sound = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let mut headers = map(&[("traceparent", sound), ("tracestate", "a=1")]);
        trace(&mut headers, &OnceLock::new());
        assert_eq!(headers["traceparent"], sound);
        assert!(headers.contains_key("tracestate"));
        for unsound in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-00",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            let mut headers = map(&[("traceparent", unsound), ("tracestate", "a=1")]);
            trace(&mut headers, &OnceLock::new());
            assert!(is_traceparent(&headers["traceparent"]));
            assert_ne!(headers["traceparent"], unsound);
            assert!(!headers.contains_key("tracestate"));
        }
    }

    #[test]
    fn a_prefix_is_taken_off_whole() {
        let strip = |target: &str, prefix| {
            strip_prefix(&target.parse().unwrap(), prefix)
                .as_str()
                .to_owned()
        };
        assert_eq!(strip("/orders/1?a=b", "/orders"), "/1?a=b");
        assert_eq!(strip("/orders", "/orders"), "/");
        assert_eq!(strip("/orders?a=b", "/orders"), "/?a=b");
        assert_eq!(strip("/orders", ""), "/orders");
    }
}
