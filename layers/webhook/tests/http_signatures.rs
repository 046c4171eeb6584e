//! HTTP message signatures against the RFCs' own examples, against themselves,
//! and against what must not pass.

use std::{convert::Infallible, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use buttress_webhook::{
    Component, HttpSignatures, Key, Message, Reason, Secret, SignError, SignLayer, Signer,
    Standard, Verified, Verifier, WholeBody, sign::Cause,
};
use http::{
    HeaderName, HeaderValue, Request, Uri,
    header::{CONTENT_LENGTH, HOST},
    request::Parts,
    uri,
};
use http_body_util::Full;
use proptest::prelude::*;
use tower::{Layer, ServiceExt, service_fn};

const NOW: u64 = 1_700_000_000;
const BODY: &[u8] = br#"{"hello": "world"}"#;
const TEXT: &str = "correct horse battery staple";
const DATE: HeaderName = http::header::DATE;

fn secret() -> Secret {
    Secret::new(TEXT).unwrap()
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn post(uri: &str) -> Parts {
    Request::post(uri).body(()).unwrap().into_parts().0
}

fn sign(scheme: HttpSignatures, request: &mut Parts, body: &[u8]) -> Result<(), SignError> {
    let message = Message {
        id: "msg_1",
        timestamp: NOW,
        body,
    };
    let signer = Signer::new(scheme, [secret()]).unwrap();
    signer.sign(request, &message)
}

fn signed(scheme: HttpSignatures, uri: &str) -> Parts {
    let mut request = post(uri);
    request
        .headers
        .insert("x-kind", HeaderValue::from_static("order"));
    sign(scheme, &mut request, BODY).unwrap();
    request
}

fn judged(scheme: HttpSignatures, request: &Parts, body: &[u8]) -> Result<Verified, Reason> {
    let verifier = Verifier::new(scheme, [secret()]).unwrap();
    verifier.verify(request.into(), body, seconds(NOW))
}

fn set(request: &mut Parts, name: &'static str, value: &str) {
    let value = HeaderValue::from_str(value).unwrap();
    request.headers.insert(name, value);
}

fn text(request: &Parts, name: &str) -> String {
    request.headers[name].to_str().unwrap().to_owned()
}

fn encoded(base: &str) -> String {
    let tag = Key::new(TEXT.as_bytes()).unwrap().tag(&[base.as_bytes()]);
    format!(":{}:", BASE64_STANDARD.encode(tag.as_bytes()))
}

/// RFC 9421, B.2 (`test-request`).
fn test_request() -> Parts {
    let request = Request::post("/foo?param=Value&Pet=dog")
        .header("host", "example.com")
        .header("date", "Tue, 20 Apr 2021 02:07:55 GMT")
        .header("content-type", "application/json")
        .header(
            "content-digest",
            "sha-512=:WZDPaVn/7XgHaAy8pmojAkGWoRx2UFChF41A2svX+TaPm+AbwAgBWnrIiYllu7BNNyealdVLvRwEmTHWXvJwew==:",
        )
        .header("content-length", "18");
    request.body(()).unwrap().into_parts().0
}

fn shared_secret() -> Secret {
    let text =
        "uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ==";
    Secret::from_base64(text).unwrap()
}

/// RFC 9421, B.2.5.
#[test]
fn the_rfcs_example() {
    let mut request = test_request();
    set(
        &mut request,
        "signature-input",
        r#"sig-b25=("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret""#,
    );
    set(
        &mut request,
        "signature",
        "sig-b25=:pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=:",
    );
    let judge = |scheme: HttpSignatures, secret: Secret, request: &Parts| {
        let verifier = Verifier::new(scheme, [secret]).unwrap();
        verifier.verify(request.into(), BODY, seconds(1_618_884_473))
    };
    // It leaves out the body, so it is to be asked for.
    let default = judge(HttpSignatures::new(), shared_secret(), &request);
    assert_eq!(default, Err(Reason::CoverageMissing));
    let loose = || HttpSignatures::new().components([Component::Authority, Component::Field(DATE)]);
    let verified = judge(loose(), shared_secret(), &request).unwrap();
    assert_eq!(verified.timestamp, Some(1_618_884_473));
    let named = shared_secret().with_id("test-shared-secret").unwrap();
    assert!(judge(loose(), named, &request).is_ok());

    let mismatch = Err(Reason::SignatureMismatch);
    assert_eq!(judge(loose(), secret(), &request), mismatch);
    let other_name = shared_secret().with_id("another").unwrap();
    assert_eq!(judge(loose(), other_name, &request), mismatch);
    set(&mut request, "date", "Tue, 20 Apr 2021 02:07:56 GMT");
    assert_eq!(judge(loose(), shared_secret(), &request), mismatch);
}

/// RFC 9530, of its B.1: the line break is among what is digested.
#[test]
fn the_digest_of_the_rfcs_example() {
    let mut request = post("https://example.com/");
    sign(
        HttpSignatures::new(),
        &mut request,
        b"{\"hello\": \"world\"}\n",
    )
    .unwrap();
    let digest = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:";
    assert_eq!(request.headers["content-digest"], digest);
    let mut request = test_request();
    sign(HttpSignatures::new(), &mut request, BODY).unwrap();
    let digest = "sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:";
    assert_eq!(request.headers["content-digest"], digest);
}

#[test]
fn what_is_signed_is_as_the_rfc_has_it() {
    let mut request = post("https://Example.com:443/hooks?a=%2F&b");
    let scheme = HttpSignatures::new()
        .field(HeaderName::from_static("x-kind"))
        .label("sig1")
        .unwrap()
        .tag("orders")
        .unwrap()
        .lifetime(seconds(60))
        .id_as_nonce();
    request
        .headers
        .append("x-kind", HeaderValue::from_static(" a"));
    request
        .headers
        .append("x-kind", HeaderValue::from_static("b\t "));
    let named = secret().with_id("k1").unwrap();
    let signer = Signer::new(scheme.clone(), [named]).unwrap();
    let message = Message {
        id: r#"msg_"\1"#,
        timestamp: NOW,
        body: BODY,
    };
    signer.sign(&mut request, &message).unwrap();
    let parameters = r#"("@method" "@authority" "@path" "@query" "content-digest" "x-kind");created=1700000000;keyid="k1";alg="hmac-sha256";expires=1700000060;nonce="msg_\"\\1";tag="orders""#;
    assert_eq!(
        text(&request, "signature-input"),
        format!("sig1={parameters}")
    );
    let base = format!(
        "\"@method\": POST\n\"@authority\": example.com\n\"@path\": /hooks\n\"@query\": ?a=%2F&b\n\
         \"content-digest\": sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:\n\
         \"x-kind\": a, b\n\"@signature-params\": {parameters}"
    );
    assert_eq!(
        text(&request, "signature"),
        format!("sig1={}", encoded(&base))
    );
    let verified = judged(scheme, &request, BODY).unwrap();
    assert_eq!(verified.id.as_deref(), Some(r#"msg_"\1"#));
    assert_eq!(verified.scheme, "http_signatures");
}

#[test]
fn whatever_is_changed_is_refused() {
    let scheme = || HttpSignatures::new().field(HeaderName::from_static("x-kind"));
    let good = signed(scheme(), "https://example.com/hooks?a=1");
    for body in [BODY, b"", &[0, 159, 146, 150, 255], &vec![7; 1024 * 1024]] {
        let mut request = good.clone();
        sign(scheme(), &mut request, body).unwrap();
        assert!(judged(scheme(), &request, body).is_ok());
        let changed = [body, b"x"].concat();
        let verdict = judged(scheme(), &request, &changed);
        assert_eq!(verdict, Err(Reason::SignatureMismatch));
    }
    let mismatch = |what: &str, change: &dyn Fn(&mut Parts)| {
        let mut request = good.clone();
        change(&mut request);
        let verdict = judged(scheme(), &request, BODY);
        assert_eq!(verdict, Err(Reason::SignatureMismatch), "{what}");
    };
    let uri = |uri: &'static str| move |request: &mut Parts| request.uri = Uri::from_static(uri);
    mismatch("method", &|request| request.method = http::Method::PUT);
    mismatch("authority", &uri("https://example.org/hooks?a=1"));
    mismatch("port", &uri("https://example.com:8443/hooks?a=1"));
    mismatch("path", &uri("https://example.com/hook?a=1"));
    mismatch("query", &uri("https://example.com/hooks?a=2"));
    mismatch("no query", &uri("https://example.com/hooks"));
    mismatch("field", &|request| set(request, "x-kind", "refund"));
    mismatch("no field", &|request| {
        request.headers.remove("x-kind");
    });
    mismatch("one more", &|request| {
        let value = HeaderValue::from_static("refund");
        request.headers.append("x-kind", value);
    });
    // The digest of another body.
    mismatch("digest", &|request| {
        let other = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:";
        set(request, "content-digest", other);
    });
    for (from, to) in [
        ("1700000000", "1700000001"),
        ("\"@path\" \"@query\"", "\"@query\" \"@path\""),
        (";alg=\"hmac-sha256\"", ""),
        ("hmac-sha256\"", "hmac-sha256\";expires=1700000100"),
    ] {
        mismatch(from, &|request| {
            let input = text(request, "signature-input").replace(from, to);
            set(request, "signature-input", &input);
        });
    }
}

#[test]
fn each_header_is_there_once() {
    let good = signed(HttpSignatures::new(), "https://example.com/");
    for name in ["signature", "signature-input", "content-digest"] {
        let judge = |change: &dyn Fn(&mut Parts)| {
            let mut request = good.clone();
            change(&mut request);
            judged(HttpSignatures::new(), &request, BODY).unwrap_err()
        };
        let twice = judge(&|request| {
            let value = request.headers[name].clone();
            request.headers.append(name, value);
        });
        assert_eq!(twice, Reason::DuplicateHeader, "{name}");
        let opaque = judge(&|request| {
            let value = HeaderValue::from_bytes(b"\xff").unwrap();
            request.headers.insert(name, value);
        });
        assert_eq!(opaque, Reason::Malformed, "{name}");
        let without = judge(&|request| drop(request.headers.remove(name)));
        let expected = match name {
            "content-digest" => Reason::MissingDigest,
            _ => Reason::MissingSignature,
        };
        assert_eq!(without, expected, "{name}");
        let empty = judge(&|request| set(request, name, ""));
        assert_eq!(empty, expected, "{name}");
    }
}

/// The right MAC over parameters of our own.
fn made(parameters: &str) -> Parts {
    let mut request = signed(HttpSignatures::new(), "https://example.com/hooks");
    let base = format!(
        "\"@method\": POST\n\"@authority\": example.com\n\"@path\": /hooks\n\"@query\": ?\n\
         \"content-digest\": {}\n\"@signature-params\": {parameters}",
        text(&request, "content-digest"),
    );
    set(&mut request, "signature-input", &format!("a={parameters}"));
    set(&mut request, "signature", &format!("a={}", encoded(&base)));
    request
}

const ALL: &str = r#"("@method" "@authority" "@path" "@query" "content-digest")"#;

#[test]
fn parameters_are_read_strictly() {
    let verdict = |parameters: &str| {
        let request = made(parameters);
        judged(HttpSignatures::new(), &request, BODY).map(|verified| verified.timestamp)
    };
    let with = |parameters: &str| verdict(&format!("{ALL}{parameters}"));
    let good = Ok(Some(NOW));
    assert_eq!(with(";created=1700000000"), good);
    assert_eq!(with(";created=1700000000;alg=\"hmac-sha256\""), good);
    // What is not known is signed, and means nothing.
    assert_eq!(with(";created=1700000000;x=1.5;y;z=tok;n=\"?\""), good);
    assert_eq!(with(";created=1700000000;expires=1700000001"), good);

    let refused = [
        ("", Reason::MissingTimestamp),
        (";created", Reason::Malformed),
        (";created=-1", Reason::Malformed),
        (";created=1700000000.0", Reason::Malformed),
        (";created=\"1700000000\"", Reason::Malformed),
        (";created=@1700000000", Reason::Malformed),
        (";created=1700000000;created=1700000000", Reason::Malformed),
        (";created=1699999699", Reason::TimestampTooOld),
        (";created=1700000301", Reason::TimestampTooNew),
        (
            ";created=1700000000;expires=1700000000",
            Reason::TimestampTooOld,
        ),
        (";created=1700000000;expires=-1", Reason::TimestampTooOld),
        (";created=1700000000;expires=soon", Reason::Malformed),
        (";created=1700000000;keyid=1", Reason::Malformed),
        (
            ";created=1700000000;alg=\"hmac-sha512\"",
            Reason::UnsupportedScheme,
        ),
        (
            ";created=1700000000;alg=\"HMAC-SHA256\"",
            Reason::UnsupportedScheme,
        ),
        (
            ";created=1700000000;alg=hmac-sha256",
            Reason::UnsupportedScheme,
        ),
        (";created=1700000000;alg", Reason::UnsupportedScheme),
    ];
    for (parameters, reason) in refused {
        assert_eq!(with(parameters), Err(reason), "{parameters}");
    }
    assert_eq!(with(";created=1699999700"), Ok(Some(NOW - 300)));
    assert_eq!(with(";created=1700000300"), Ok(Some(NOW + 300)));
}

#[test]
fn components_are_read_strictly() {
    let verdict = |components: &str| {
        let request = made(&format!("{components};created=1700000000"));
        judged(HttpSignatures::new(), &request, BODY).unwrap_err()
    };
    let instead = |from: &str, to: &str| verdict(&ALL.replace(from, to));
    for left_out in [
        "\"@method\" ",
        "\"@authority\" ",
        "\"@path\" ",
        "\"@query\" ",
    ] {
        assert_eq!(instead(left_out, ""), Reason::CoverageMissing);
    }
    assert_eq!(instead(" \"content-digest\"", ""), Reason::CoverageMissing);
    assert_eq!(verdict("()"), Reason::CoverageMissing);

    assert_eq!(instead(")", " \"@path\")"), Reason::DuplicateHeader);
    assert_eq!(instead(")", " \"date\" \"date\")"), Reason::DuplicateHeader);
    for parameter in ["req", "sf", "bs", "key=\"a\"", "tr", "unknown"] {
        let with = format!("\"content-digest\";{parameter}");
        let reason = instead("\"content-digest\"", &with);
        assert_eq!(reason, Reason::UnsupportedScheme, "{parameter}");
    }
    for derived in [
        "@status",
        "@query-param",
        "@request-target",
        "@",
        "@signature-params",
    ] {
        let with = format!(" \"{derived}\")");
        assert_eq!(instead(")", &with), Reason::UnsupportedScheme, "{derived}");
    }
    for wrong in ["Date", "a b", "", "a:b", "x\\\""] {
        let with = format!(" \"{wrong}\")");
        assert_eq!(instead(")", &with), Reason::Malformed, "{wrong}");
    }
    assert_eq!(instead(")", " date)"), Reason::Malformed);
    assert_eq!(instead(")", " 1)"), Reason::Malformed);
    // One that is covered and is not there.
    assert_eq!(instead(")", " \"date\")"), Reason::SignatureMismatch);
    // More than are looked at.
    let many: String = (0..64).map(|at| format!(" \"x-{at}\"")).collect();
    assert_eq!(instead(")", &format!("{many})")), Reason::Malformed);

    let not_a_list = made(ALL);
    let judge = |input: &str| {
        let mut request = not_a_list.clone();
        set(&mut request, "signature-input", input);
        judged(HttpSignatures::new(), &request, BODY).unwrap_err()
    };
    for input in [
        "a", "a=1", "a=\"x\"", "a=(", "a=()()", "=()", "A=()", "a=();", "a=(),",
    ] {
        assert_eq!(judge(input), Reason::Malformed, "{input}");
    }
}

/// RFC 9421 §2.5: what is signed is the list in its one way of being written.
#[test]
fn the_list_may_be_written_in_another_way() {
    let mut request = made(&format!("{ALL};created=1700000000"));
    let input = text(&request, "signature-input")
        .replace("(\"", "(  \"")
        .replace("\" \"@path", "\"   \"@path")
        .replace("\")", "\"  )")
        .replace(";created", ";  created");
    set(&mut request, "signature-input", &format!("  {input}  "));
    assert!(judged(HttpSignatures::new(), &request, BODY).is_ok());
}

#[test]
fn signatures_are_32_bytes() {
    let good = made(&format!("{ALL};created=1700000000"));
    let judge = |value: &str| {
        let mut request = good.clone();
        set(&mut request, "signature", value);
        judged(HttpSignatures::new(), &request, BODY).map(|_| ())
    };
    let value = text(&good, "signature");
    assert_eq!(judge(&value), Ok(()));
    assert_eq!(judge(&format!("{value}, b=:AAAA:")), Ok(()));
    assert_eq!(judge(&format!("{value};x=1")), Ok(()));
    let short = format!("a=:{}:", BASE64_STANDARD.encode([0; 31]));
    let long = format!("a=:{}:", BASE64_STANDARD.encode([0; 33]));
    for malformed in ["a", "a=1", "a=:!:", "a=(:AAAA:)", &short, &long] {
        assert_eq!(judge(malformed), Err(Reason::Malformed), "{malformed}");
    }
    let other = value.replace("a=", "b=");
    assert_eq!(judge(&other), Err(Reason::MissingSignature));
    let zero = format!("a=:{}:", BASE64_STANDARD.encode([0; 32]));
    assert_eq!(judge(&zero), Err(Reason::SignatureMismatch));
}

#[test]
fn the_digest_is_sha_256() {
    let good = signed(HttpSignatures::new(), "https://example.com/");
    let digest = text(&good, "content-digest");
    // Others are passed over, and signed if they are there.
    let mut both = post("https://example.com/");
    let others = format!("md5=:AAAA:, {digest}, x=1;y");
    set(&mut both, "content-digest", &others);
    sign(HttpSignatures::new(), &mut both, BODY).unwrap();
    assert_eq!(text(&both, "content-digest"), others);
    assert!(judged(HttpSignatures::new(), &both, BODY).is_ok());

    for (value, reason) in [
        ("sha-512=:AAAA:", Reason::UnsupportedScheme),
        ("sha-256", Reason::Malformed),
        ("sha-256=1", Reason::Malformed),
        ("sha-256=:AAAA:", Reason::Malformed),
        ("sha-256=(:AAAA:)", Reason::Malformed),
        ("sha-256=:AAAA", Reason::Malformed),
    ] {
        let mut request = good.clone();
        set(&mut request, "content-digest", value);
        let verdict = judged(HttpSignatures::new(), &request, BODY);
        assert_eq!(verdict, Err(reason), "{value}");
        // Who signs puts the right one in its place.
        sign(HttpSignatures::new(), &mut request, BODY).unwrap();
        assert_eq!(text(&request, "content-digest"), digest);
    }
}

/// Both ends see the same, whatever the one was told and the other gets.
#[test]
fn the_authority_is_normalized() {
    let received = |host: &str| {
        let mut request = post("/hooks");
        set(&mut request, "host", host);
        request
    };
    let carry = |from: &Parts, mut to: Parts| {
        for name in ["signature", "signature-input", "content-digest"] {
            to.headers.insert(name, from.headers[name].clone());
        }
        to
    };
    let default = HttpSignatures::new;
    let http = || HttpSignatures::new().scheme(uri::Scheme::HTTP);
    for (sent, host) in [
        ("https://example.com/hooks", "example.com"),
        ("https://EXAMPLE.com/hooks", "Example.COM"),
        ("https://example.com:443/hooks", "example.com"),
        ("https://example.com/hooks", "example.com:443"),
        ("https://example.com:8443/hooks", "example.com:8443"),
        ("https://user:pass@example.com/hooks", "example.com"),
        ("https://[2001:DB8::1]:443/hooks", "[2001:db8::1]"),
        ("https://[::1]:9000/hooks", "[::1]:9000"),
    ] {
        let request = carry(&signed(default(), sent), received(host));
        assert!(judged(default(), &request, BODY).is_ok(), "{sent} {host}");
    }
    // By HTTP the other port is the usual one.
    let request = signed(default(), "http://example.com:80/hooks");
    let request = carry(&request, received("example.com"));
    assert!(judged(http(), &request, BODY).is_ok());
    let request = signed(default(), "http://example.com:443/hooks");
    let request = carry(&request, received("example.com:443"));
    assert!(judged(http(), &request, BODY).is_ok());
    let mismatch = Err(Reason::SignatureMismatch);
    assert_eq!(judged(default(), &request, BODY), mismatch);

    // A proxy's own name is not what was signed.
    let request = signed(default(), "https://example.com/hooks");
    let request = carry(&request, received("10.0.0.7:8080"));
    assert_eq!(judged(default(), &request, BODY), mismatch);
    let told = default().authority(uri::Authority::from_static("example.com:443"));
    assert!(judged(told.clone(), &request, BODY).is_ok());
    assert_eq!(
        judged(told.scheme(uri::Scheme::HTTP), &request, BODY),
        mismatch
    );

    // HTTP/2 has it in the target, which counts for more than `Host`.
    let mut request = signed(default(), "https://example.com/hooks");
    set(&mut request, "host", "example.org");
    assert!(judged(default(), &request, BODY).is_ok());
    // HTTP/1 goes with the `Host` that is set.
    let mut request = post("https://example.com/hooks");
    set(&mut request, "host", "example.org");
    sign(default(), &mut request, BODY).unwrap();
    let request = carry(&request, received("example.org"));
    assert!(judged(default(), &request, BODY).is_ok());

    for host in ["", "a b", ":80", "example.com:99999", "example.com:x"] {
        let request = carry(
            &signed(default(), "https://example.com/hooks"),
            received(host),
        );
        let verdict = judged(default(), &request, BODY);
        assert_eq!(verdict, Err(Reason::Malformed), "{host}");
    }
    let mut twice = received("example.com");
    let value = HeaderValue::from_static("example.com");
    twice.headers.append(HOST, value);
    let twice = carry(&signed(default(), "https://example.com/hooks"), twice);
    assert_eq!(judged(default(), &twice, BODY), Err(Reason::Malformed));
}

#[test]
fn paths_queries_and_targets() {
    let all = || {
        HttpSignatures::new().components([
            Component::Path,
            Component::Query,
            Component::Scheme,
            Component::TargetUri,
        ])
    };
    for (uri, lines) in [
        (
            "https://example.com",
            "\"@path\": /\n\"@query\": ?\n\"@scheme\": https\n\"@target-uri\": https://example.com/\n",
        ),
        (
            "http://example.com:8080/a%20b?",
            "\"@path\": /a%20b\n\"@query\": ?\n\"@scheme\": http\n\"@target-uri\": http://example.com:8080/a%20b?\n",
        ),
        (
            "https://example.com/?q=%3F&&",
            "\"@path\": /\n\"@query\": ?q=%3F&&\n\"@scheme\": https\n\"@target-uri\": https://example.com/?q=%3F&&\n",
        ),
    ] {
        let request = signed(all(), uri);
        let input = text(&request, "signature-input");
        let parameters = input.strip_prefix("webhook=").unwrap();
        let base = format!("{lines}\"@signature-params\": {parameters}");
        let expected = format!("webhook={}", encoded(&base));
        assert_eq!(text(&request, "signature"), expected, "{uri}");
        assert!(!request.headers.contains_key("content-digest"));
        assert!(judged(all(), &request, b"not signed").is_ok());
    }
}

#[test]
fn what_cannot_be_signed_is_left_as_it_was() {
    let signing = |scheme: HttpSignatures, uri: &str| {
        let mut request = post(uri);
        let error = sign(scheme, &mut request, BODY).unwrap_err();
        assert!(request.headers.is_empty());
        error
    };
    assert_eq!(
        signing(HttpSignatures::new(), "/hooks"),
        SignError::Authority
    );
    let dated = HttpSignatures::new().field(DATE);
    assert_eq!(signing(dated, "https://example.com/"), SignError::Field);
    let signer = Signer::new(HttpSignatures::new().id_as_nonce(), [secret()]).unwrap();
    assert!(signer.signs_id());
    let message = Message {
        id: "",
        timestamp: NOW,
        body: BODY,
    };
    let mut request = post("https://example.com/");
    assert_eq!(signer.sign(&mut request, &message), Err(SignError::Id));

    for label in ["", "A", "1", "a b", "ä", "a=", "-a"] {
        assert!(HttpSignatures::new().label(label).is_err(), "{label}");
    }
    assert!(HttpSignatures::new().label("*a-1_.*").is_ok());
    assert!(HttpSignatures::new().tag("a\nb").is_err());
    assert!(HttpSignatures::new().tag("ä").is_err());
}

#[test]
fn two_secrets_have_two_labels() {
    let old = secret().with_id("old").unwrap();
    let new = Secret::new("battery staple")
        .unwrap()
        .with_id("new")
        .unwrap();
    let signer = Signer::new(HttpSignatures::new(), [new.clone(), old.clone()]).unwrap();
    let mut request = post("https://example.com/");
    let message = Message {
        id: "",
        timestamp: NOW,
        body: BODY,
    };
    signer.sign(&mut request, &message).unwrap();
    let input = text(&request, "signature-input");
    assert!(
        input.starts_with("webhook=(") && input.contains(", webhook-2=("),
        "{input}"
    );
    let judge = |secrets: Vec<Secret>| {
        let verifier = Verifier::new(HttpSignatures::new(), secrets).unwrap();
        let verified = verifier.verify((&request).into(), BODY, seconds(NOW));
        verified.map(|verified| verified.key_index)
    };
    assert_eq!(judge(vec![old.clone()]), Ok(0));
    assert_eq!(judge(vec![new.clone()]), Ok(0));
    assert_eq!(judge(vec![old.clone(), new.clone()]), Ok(0));
    assert_eq!(judge(vec![secret()]), Ok(0), "without a name it is any");
    let misnamed = old.with_id("new").unwrap();
    assert_eq!(
        judge(vec![misnamed.clone()]),
        Err(Reason::SignatureMismatch)
    );
    assert_eq!(judge(vec![misnamed, new]), Ok(1));
}

#[test]
fn signatures_of_others_are_kept_and_do_not_count() {
    let ours = signed(HttpSignatures::new(), "https://example.com/");
    let mut request = ours.clone();
    let foreign = r#"proxy=("@method" "x";sf "forwarded";key="for");created=5;alg="ed25519""#;
    set(&mut request, "signature-input", foreign);
    set(&mut request, "signature", "proxy=:AAAA:, webhook=:AAAA:");
    sign(HttpSignatures::new(), &mut request, BODY).unwrap();
    let input = text(&request, "signature-input");
    assert_eq!(
        input,
        format!("{foreign}, {}", text(&ours, "signature-input"))
    );
    let signature = text(&request, "signature");
    assert_eq!(
        signature,
        format!("proxy=:AAAA:, {}", text(&ours, "signature"))
    );
    assert!(judged(HttpSignatures::new(), &request, BODY).is_ok());

    // Two schemes of one signer, too.
    let other = HttpSignatures::new().label("other").unwrap();
    let other = other.components([Component::Method]);
    let signer = Signer::new(HttpSignatures::new(), [secret()]).unwrap();
    let signer = signer.and(other.clone(), [secret()]).unwrap();
    let standard = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
    let signer = signer.and(Standard::new(), [standard]).unwrap();
    let mut request = post("https://example.com/");
    let message = Message {
        id: "msg_1",
        timestamp: NOW,
        body: BODY,
    };
    signer.sign(&mut request, &message).unwrap();
    assert!(judged(HttpSignatures::new(), &request, BODY).is_ok());
    assert!(judged(other, &request, b"").is_ok());
    assert!(request.headers.contains_key("webhook-signature"));

    // What cannot be read is not kept.
    set(&mut request, "signature-input", "a=(");
    set(&mut request, "signature", "a=:AAAA:, a=:AAAA:");
    sign(HttpSignatures::new(), &mut request, BODY).unwrap();
    assert!(judged(HttpSignatures::new(), &request, BODY).is_ok());
}

/// Each signature has a base and times of its own, and one that is right is
/// enough.
#[test]
fn of_several_one_that_is_right_is_enough() {
    let good = made(&format!("{ALL};created=1700000000"));
    let with = |inputs: &[&str]| {
        let mut request = good.clone();
        let (mut input, mut signature) = (String::new(), String::new());
        for (at, other) in inputs.iter().enumerate() {
            input += &format!("b{at}={other}, ");
            signature += &format!("b{at}=:{}:, ", BASE64_STANDARD.encode([0; 32]));
        }
        let (last, tag) = (text(&good, "signature-input"), text(&good, "signature"));
        set(&mut request, "signature-input", &(input.clone() + &last));
        set(&mut request, "signature", &(signature.clone() + &tag));
        let before = judged(HttpSignatures::new(), &request, BODY);
        // In whichever order, and on lines of their own.
        let others = input.trim_end_matches(", ");
        set(&mut request, "signature-input", &last);
        let value = HeaderValue::from_str(others).unwrap();
        request.headers.append("signature-input", value);
        assert_eq!(judged(HttpSignatures::new(), &request, BODY), before);
        before.map(|verified| verified.timestamp)
    };
    let passes = Ok(Some(NOW));
    let other = format!("{ALL};created=1700000100");
    let stale = format!("{ALL};created=1600000000");
    let ahead = format!("{ALL};created=1800000000");
    assert_eq!(with(&[&other]), passes);
    assert_eq!(with(&[&stale, &ahead]), passes);
    assert_eq!(
        with(&["(\"@method\");created=1700000000", "1", "(\"@path\";req)"]),
        passes
    );
    let fifteen = vec![&*other; 15];
    assert_eq!(with(&fifteen), passes);
    assert_eq!(with(&[&*other; 16]), Err(Reason::Malformed));

    // The right one is stale, and another is there in time.
    let mut request = made(&stale);
    let input = format!("{}, b={other}", text(&request, "signature-input"));
    let zero = BASE64_STANDARD.encode([0; 32]);
    let signature = format!("{}, b=:{zero}:", text(&request, "signature"));
    let verdict = judged(HttpSignatures::new(), &request, BODY);
    assert_eq!(verdict, Err(Reason::TimestampTooOld));
    set(&mut request, "signature-input", &input);
    set(&mut request, "signature", &signature);
    let verdict = judged(HttpSignatures::new(), &request, BODY);
    assert_eq!(verdict, Err(Reason::SignatureMismatch));
}

#[test]
fn what_is_put_together_is_bounded() {
    let big = HeaderName::from_static("x-big");
    let scheme = || HttpSignatures::new().field(HeaderName::from_static("x-big"));
    let mut request = post("https://example.com/");
    let value = HeaderValue::from_str(&"x".repeat(60_000)).unwrap();
    request.headers.insert(&big, value);
    sign(scheme(), &mut request, BODY).unwrap();
    assert!(judged(scheme(), &request, BODY).is_ok());
    let value = HeaderValue::from_str(&"x".repeat(66_000)).unwrap();
    request.headers.insert(&big, value);
    sign(scheme(), &mut request, BODY).unwrap();
    let verdict = judged(scheme(), &request, BODY);
    assert_eq!(verdict, Err(Reason::Malformed));
}

/// Nor does it count less where it comes to nothing: 64 labels that name a long
/// header had it copied 64 times.
#[test]
fn what_comes_to_nothing_is_bounded_too() {
    let scheme = || HttpSignatures::new();
    let with = |labels: usize| {
        let mut request = signed(scheme(), "https://example.com/hooks");
        let big = HeaderValue::from_str(&"x".repeat(20_000)).unwrap();
        request.headers.insert("x-big", big);
        let (mut inputs, mut signatures) = (
            text(&request, "signature-input"),
            text(&request, "signature"),
        );
        let zero = BASE64_STANDARD.encode([0; 32]);
        let list = ALL.replace(')', r#" "x-big" "x-absent")"#);
        for at in 0..labels {
            inputs += &format!(", b{at}={list};created={NOW}");
            signatures += &format!(", b{at}=:{zero}:");
        }
        set(&mut request, "signature-input", &inputs);
        set(&mut request, "signature", &signatures);
        judged(scheme(), &request, BODY).map(|verified| verified.key_index)
    };
    assert_eq!(with(3), Ok(0));
    assert_eq!(with(4), Err(Reason::Malformed));
}

#[test]
fn a_tag_says_which_signatures_count() {
    let orders = || HttpSignatures::new().tag("orders").unwrap();
    let refunds = || HttpSignatures::new().tag("refunds").unwrap();
    let request = signed(orders(), "https://example.com/");
    assert!(judged(orders(), &request, BODY).is_ok());
    assert!(judged(HttpSignatures::new(), &request, BODY).is_ok());
    let verdict = judged(refunds(), &request, BODY);
    assert_eq!(verdict, Err(Reason::MissingSignature));
    let untagged = signed(HttpSignatures::new(), "https://example.com/");
    let verdict = judged(orders(), &untagged, BODY);
    assert_eq!(verdict, Err(Reason::MissingSignature));
}

#[test]
fn a_nonce_is_the_id() {
    let scheme = || HttpSignatures::new().id_as_nonce();
    let request = signed(scheme(), "https://example.com/");
    let verified = judged(scheme(), &request, BODY).unwrap();
    assert_eq!(verified.id.as_deref(), Some("msg_1"));
    let without = signed(HttpSignatures::new(), "https://example.com/");
    let verdict = judged(scheme(), &without, BODY);
    assert_eq!(verdict, Err(Reason::MissingId));
    // Where none is asked for, it is another's affair.
    let verified = judged(HttpSignatures::new(), &request, BODY).unwrap();
    assert_eq!(verified.id, None);
    for nonce in ["1", "\"\"", "\"a b\"", "tok"] {
        let request = made(&format!("{ALL};created=1700000000;nonce={nonce}"));
        let verdict = judged(scheme(), &request, BODY);
        assert_eq!(verdict, Err(Reason::Malformed), "{nonce}");
    }
}

/// What the layer sets right is set right before it is signed.
#[tokio::test]
async fn a_length_may_be_covered() {
    let scheme = || HttpSignatures::new().field(CONTENT_LENGTH);
    let signer = Signer::new(scheme(), [secret()]).unwrap();
    let layer = SignLayer::builder(signer).wall_clock(|| seconds(NOW));
    let service = layer
        .build()
        .unwrap()
        .layer(service_fn(async |request: Request<WholeBody>| {
            Ok::<_, Infallible>(request)
        }));
    let request = || Request::post("https://example.com/");
    let sent = request().header(CONTENT_LENGTH, 3).body(Full::new(BODY));
    let sent = service.clone().oneshot(sent.unwrap()).await.unwrap();
    assert_eq!(sent.headers()[CONTENT_LENGTH], "18");
    let (parts, body) = sent.into_parts();
    assert!(judged(scheme(), &parts, body.bytes()).is_ok());

    let without = request().body(Full::new(BODY)).unwrap();
    let error = service.oneshot(without).await.unwrap_err();
    let cause = error.not_signed().unwrap().cause();
    assert!(matches!(cause, Cause::Sign(SignError::Field)));
}

const PIECES: &str = r#"(webhook|a|sig1)?=?(\("@method" "@authority" "@path" "@query" "content-digest"( "[a-z-]{0,8}"(;(req|sf|tr))?)?\)|[ -~]{0,20})(;created=17000000[0-9]{2}|;alg="hmac-sha256"|;keyid="[a-z]{0,3}"|;[ -~]{0,9}){0,3}"#;

proptest! {
    /// No text in a header makes a verifier panic, or lets anything in.
    #[test]
    fn nothing_that_was_made_up_passes(
        inputs in prop::collection::vec(PIECES, 0..4),
        signature in r#"((webhook|a|sig1)=:[A-Za-z0-9+/]{43}=:(, )?|[ -~]{0,60}){0,3}"#,
        digest in r#"(sha-256=:[A-Za-z0-9+/]{43}=:|[ -~]{0,60})"#,
        host in "[ -~]{0,20}",
        body in prop::collection::vec(any::<u8>(), 0..40),
        right_digest: bool,
    ) {
        let mut request = post("/hooks?x");
        set(&mut request, "host", &host);
        if right_digest {
            set(&mut request, "host", "example.com");
            sign(HttpSignatures::new(), &mut request, &body).unwrap();
        } else {
            set(&mut request, "content-digest", &digest);
        }
        set(&mut request, "signature-input", &inputs.join(", "));
        set(&mut request, "signature", &signature);
        prop_assert!(judged(HttpSignatures::new(), &request, &body).is_err());
        let loose = HttpSignatures::new().components([]);
        prop_assert!(judged(loose, &request, &body).is_err());
    }

    /// What is signed is verified, and nothing of it can be changed.
    #[test]
    fn what_is_signed_is_verified(
        method in "(GET|POST|PUT|[A-Z]{1,8})",
        host in "[a-z][a-zA-Z0-9-]{0,9}(\\.[a-z]{2,5})?(:[1-9][0-9]{1,3})?",
        path in "(/[a-zA-Z0-9%._~-]{0,9}){0,3}",
        query in prop::option::of("[a-zA-Z0-9=&%._~/?-]{0,20}"),
        value in "[!-~]([ -~]{0,20}[!-~])?",
        body in prop::collection::vec(any::<u8>(), 0..200),
        flip in any::<prop::sample::Index>(),
    ) {
        let scheme = || HttpSignatures::new().field(HeaderName::from_static("x-kind"));
        let query = query.map(|query| format!("?{query}")).unwrap_or_default();
        let uri = format!("https://{host}{path}{query}");
        let mut request = Request::builder().method(&*method).uri(&*uri).body(()).unwrap().into_parts().0;
        set(&mut request, "x-kind", &value);
        sign(scheme(), &mut request, &body).unwrap();
        prop_assert!(judged(scheme(), &request, &body).is_ok());

        // As a server of HTTP/1 gets it.
        let mut received = request.clone();
        let target = received.uri.path_and_query().map_or("/", |it| it.as_str());
        let slash = if target.starts_with('/') { "" } else { "/" };
        let target = format!("{slash}{target}");
        received.uri = target.parse().unwrap();
        set(&mut received, "host", &host);
        prop_assert!(judged(scheme(), &received, &body).is_ok());

        let refused = |request: &Parts, body: &[u8]| judged(scheme(), request, body).is_err();
        let mut changed = received.clone();
        changed.method = http::Method::from_bytes(format!("{method}X").as_bytes()).unwrap();
        prop_assert!(refused(&changed, &body));
        let mut changed = received.clone();
        set(&mut changed, "host", &format!("x{host}"));
        prop_assert!(refused(&changed, &body));
        let mut changed = received.clone();
        changed.uri = format!("/x{target}").parse().unwrap();
        prop_assert!(refused(&changed, &body));
        let mut changed = received.clone();
        let separator = if target.contains('?') { "" } else { "?" };
        changed.uri = format!("{target}{separator}x").parse().unwrap();
        prop_assert!(refused(&changed, &body));
        let mut changed = received.clone();
        set(&mut changed, "x-kind", &format!("{value}x"));
        prop_assert!(refused(&changed, &body));
        let mut other = body.clone();
        if body.is_empty() { other.push(0); } else { other[flip.index(body.len())] ^= 1; }
        prop_assert!(refused(&received, &other));
    }
}
