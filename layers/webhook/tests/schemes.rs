//! Every scheme against its publisher's own example, against itself, and
//! against what must not pass.

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use buttress_webhook::{
    GitHub, Message, Reason, Scheme, Secret, SecretError, Sha256, Shopify, SignError, Signer,
    Slack, Standard, Stripe, Verifier,
};
use http::{HeaderValue, Request, request::Parts};
use proptest::prelude::*;

const STANDARD: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const OTHER: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBk=";
const NOW: u64 = 1_700_000_000;

fn secret(text: &str) -> Secret {
    Secret::new(text).unwrap()
}

fn request(headers: &[(&'static str, &str)]) -> Parts {
    let mut request = Request::post("/hooks");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// What a verifier of `scheme` says of `request` at [`NOW`].
fn judged(scheme: impl Scheme, text: &str, request: &Parts, body: &[u8]) -> Result<usize, Reason> {
    let verifier = Verifier::new(scheme, [secret(text)]).unwrap();
    let verified = verifier.verify(request.into(), body, seconds(NOW))?;
    Ok(verified.key_index)
}

fn signed(scheme: impl Scheme, texts: &[&str], body: &[u8]) -> Parts {
    let secrets = texts.iter().map(|text| secret(text));
    let signer = Signer::new(scheme, secrets).unwrap();
    let mut request = request(&[]);
    let message = Message {
        id: "msg_1",
        timestamp: NOW,
        body,
    };
    signer.sign(&mut request, &message).unwrap();
    request
}

/// From GitHub's documentation.
#[test]
fn githubs_example() {
    let headers = [(
        "x-hub-signature-256",
        "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
    )];
    let example = request(&headers);
    let text = "It's a Secret to Everybody";
    assert_eq!(judged(GitHub, text, &example, b"Hello, World!"), Ok(0));
    let ours = signed(GitHub, &[text], b"Hello, World!");
    assert_eq!(ours.headers, example.headers);
}

/// From Slack's documentation.
#[test]
fn slacks_example() {
    let body = b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow\
        &channel_id=G8PSS9T3V&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner\
        &command=%2Fwebhook-collect&text=\
        &response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554\
        %2F96rGlfmibIGlgcZRskXaIFfN&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c";
    let example = request(&[
        ("x-slack-request-timestamp", "1531420618"),
        (
            "x-slack-signature",
            "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
        ),
    ]);
    let verifier = Verifier::new(Slack, [secret("8f742231b10e8888abcd99yyyzzz85a5")]).unwrap();
    let verified = verifier.verify((&example).into(), body, seconds(1_531_420_700));
    assert_eq!(verified.unwrap().timestamp, Some(1_531_420_618));
}

#[test]
fn each_accepts_its_own_and_nothing_that_was_changed() {
    fn check(scheme: &(impl Scheme + Clone), text: &str, other: &str) {
        let name = scheme.name();
        for body in [&b""[..], b"{}", &[0, 159, 146, 150, 255], "🦀".as_bytes()] {
            let request = signed(scheme.clone(), &[text], body);
            assert_eq!(
                judged(scheme.clone(), text, &request, body),
                Ok(0),
                "{name}"
            );
            let changed = [body, b"x"].concat();
            let mismatch = Err(Reason::SignatureMismatch);
            assert_eq!(judged(scheme.clone(), text, &request, &changed), mismatch);
            assert_eq!(judged(scheme.clone(), other, &request, body), mismatch);

            // Whatever is signed stands once.
            for signing in request.headers.keys() {
                let mut twice = request.clone();
                let value = twice.headers[signing].clone();
                twice.headers.append(signing, value);
                let verdict = judged(scheme.clone(), text, &twice, body);
                assert_eq!(verdict, Err(Reason::DuplicateHeader), "{name} {signing}");

                let mut without = request.clone();
                without.headers.remove(signing);
                let verdict = judged(scheme.clone(), text, &without, body).unwrap_err();
                assert!(verdict.as_str().starts_with("missing_"), "{name} {verdict}");

                let mut opaque = request.clone();
                let value = HeaderValue::from_bytes(b"\xff").unwrap();
                opaque.headers.insert(signing, value);
                let verdict = judged(scheme.clone(), text, &opaque, body);
                assert_eq!(verdict, Err(Reason::Malformed), "{name} {signing}");
            }
        }
    }
    check(&Sha256::new(), "correct horse", "battery staple");
    check(
        &Sha256::new().header(http::HeaderName::from_static("x-acme")),
        "correct horse",
        "battery staple",
    );
    check(&GitHub, "correct horse", "battery staple");
    check(&Shopify, "correct horse", "battery staple");
    check(&Slack, "correct horse", "battery staple");
    check(&Stripe, STANDARD, OTHER);
    check(&Standard::new(), STANDARD, OTHER);
    check(&Standard::svix(), STANDARD, OTHER);
}

#[test]
fn the_age_of_a_message_is_bounded_both_ways() {
    fn check(scheme: &(impl Scheme + Clone)) {
        let request = signed(scheme.clone(), &[STANDARD], b"{}");
        let verifier = Verifier::new(scheme.clone(), [secret(STANDARD)]).unwrap();
        let judge = |now| {
            let verified = verifier.verify((&request).into(), b"{}", now);
            verified.map(|verified| verified.timestamp)
        };
        assert_eq!(judge(seconds(NOW + 300)), Ok(Some(NOW)));
        assert_eq!(
            judge(seconds(NOW + 301) - Duration::from_nanos(1)),
            Ok(Some(NOW))
        );
        assert_eq!(judge(seconds(NOW + 301)), Err(Reason::TimestampTooOld));
        assert_eq!(judge(seconds(NOW - 300)), Ok(Some(NOW)));
        assert_eq!(judge(seconds(NOW - 301)), Err(Reason::TimestampTooNew));
    }
    check(&Standard::new());
    check(&Stripe);
    check(&Slack);
}

#[test]
fn during_a_rotation_either_secret_will_do() {
    let body = b"{}";
    let both = signed(Standard::new(), &[OTHER, STANDARD], body);
    assert_eq!(judged(Standard::new(), STANDARD, &both, body), Ok(0));
    assert_eq!(judged(Standard::new(), OTHER, &both, body), Ok(0));
    let both = signed(Stripe, &[OTHER, STANDARD], body);
    assert_eq!(judged(Stripe, STANDARD, &both, body), Ok(0));

    let old = signed(GitHub, &["battery staple"], body);
    let secrets = [secret("correct horse"), secret("battery staple")];
    let verifier = Verifier::new(GitHub, secrets.clone()).unwrap();
    let verified = verifier.verify((&old).into(), body, seconds(0)).unwrap();
    assert_eq!((verified.key_index, verified.scheme), (1, "github"));
    assert_eq!((verified.id, verified.timestamp), (None, None));

    // One header, one signature: the second secret would be lost.
    let one = Signer::new(GitHub, secrets).unwrap_err();
    assert!(matches!(one, SecretError::OneOnly { scheme: "github" }));
    let none = Signer::new(GitHub, []).unwrap_err();
    assert!(matches!(none, SecretError::None));
    let many = Verifier::new(GitHub, vec![secret("correct horse"); 17]).unwrap_err();
    assert!(matches!(many, SecretError::TooMany { most: 16 }));
}

#[test]
fn one_right_signature_among_others_is_enough() {
    let body = b"{}";
    let good = signed(Standard::new(), &[STANDARD], body);
    let value = good.headers["webhook-signature"].to_str().unwrap();
    let wrong = "v1,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let with = |signatures: String| {
        let mut request = good.clone();
        let value = HeaderValue::try_from(signatures).unwrap();
        request.headers.insert("webhook-signature", value);
        judged(Standard::new(), STANDARD, &request, body)
    };
    assert_eq!(with(format!("{wrong} {wrong} {wrong} {value}")), Ok(0));
    assert_eq!(with(format!("v1a,xyz garbage v1,garbage {value}")), Ok(0));
    assert_eq!(with(wrong.to_owned()), Err(Reason::SignatureMismatch));
    assert_eq!(with("v1a,xyz".to_owned()), Err(Reason::UnsupportedScheme));
    assert_eq!(with("v1,xyz v1a,xyz".to_owned()), Err(Reason::Malformed));
    assert_eq!(with("garbage".to_owned()), Err(Reason::Malformed));
    assert_eq!(with(String::new()), Err(Reason::MissingSignature));
    // As many as there may be, and one more.
    let many = [wrong; 15].join(" ");
    assert_eq!(with(format!("{many} {value}")), Ok(0));
    assert_eq!(
        with(format!("{many} {value} {wrong}")),
        Err(Reason::Malformed)
    );
}

#[test]
fn stripes_header_is_read_strictly() {
    let body = b"{}";
    let good = signed(Stripe, &[STANDARD], body);
    let value = good.headers["stripe-signature"].to_str().unwrap();
    let (time, signature) = value.split_once(',').unwrap();
    let with = |value: String| {
        let request = request(&[("stripe-signature", &value)]);
        judged(Stripe, STANDARD, &request, body)
    };
    assert_eq!(with(format!("{signature},{time}")), Ok(0));
    assert_eq!(with(format!("{time},v0=abc,{signature}")), Ok(0));
    assert_eq!(
        with(format!("{time},{time},{signature}")),
        Err(Reason::DuplicateHeader)
    );
    assert_eq!(with(signature.to_owned()), Err(Reason::MissingTimestamp));
    assert_eq!(with(time.to_owned()), Err(Reason::MissingSignature));
    assert_eq!(
        with(format!("{time},v0=abc")),
        Err(Reason::UnsupportedScheme)
    );
    assert_eq!(with(format!("{time},v1=abc")), Err(Reason::Malformed));
    assert_eq!(
        with(format!("t=+{NOW},{signature}")),
        Err(Reason::Malformed)
    );
    assert_eq!(with("garbage".to_owned()), Err(Reason::Malformed));
}

#[test]
fn the_algorithm_is_pinned() {
    let sha1 = request(&[("x-hub-signature-256", "sha1=abc")]);
    let unsupported = Err(Reason::UnsupportedScheme);
    assert_eq!(judged(GitHub, "correct horse", &sha1, b""), unsupported);
    let old = request(&[("x-hub-signature", "sha1=abc")]);
    let missing = Err(Reason::MissingSignature);
    assert_eq!(judged(GitHub, "correct horse", &old, b""), missing);
    let slack = request(&[
        ("x-slack-request-timestamp", "1700000000"),
        ("x-slack-signature", "v1=abc"),
    ]);
    assert_eq!(judged(Slack, "correct horse", &slack, b""), unsupported);
}

#[test]
fn the_scheme_reads_its_own_secrets() {
    let refused = |text: &str| Standard::new().key(&secret(text)).unwrap_err();
    assert!(matches!(refused("not base64!"), SecretError::NotBase64));
    assert!(matches!(refused("whsec_!!!!!!!!"), SecretError::NotBase64));
    assert!(matches!(
        refused("whsec_aGVsbG8="),
        SecretError::TooShort { least: 24 }
    ));
    assert!(matches!(refused("whsk_aGVsbG8="), SecretError::WrongKind));
    assert!(matches!(refused("whpk_aGVsbG8="), SecretError::WrongKind));
    let long = format!("whsec_{}", "A".repeat(88));
    assert!(matches!(refused(&long), SecretError::TooLong));
    let empty = Secret::new("whsec_").map(|secret| Standard::new().key(&secret));
    assert!(matches!(empty, Err(SecretError::TooShort { .. })));

    // With its prefix and without, padded or not, or as bytes: one key.
    let body = b"{}";
    let request = signed(Standard::new(), &[OTHER], body);
    let bare = OTHER.strip_prefix("whsec_").unwrap();
    assert_eq!(judged(Standard::new(), bare, &request, body), Ok(0));
    let bare = bare.trim_end_matches('=');
    assert_eq!(judged(Standard::new(), bare, &request, body), Ok(0));
    let bytes = Secret::from_bytes((0..26).collect::<Vec<u8>>()).unwrap();
    let verifier = Verifier::new(Standard::new(), [bytes]).unwrap();
    assert!(
        verifier
            .verify((&request).into(), body, seconds(NOW))
            .is_ok()
    );

    // The text itself is Stripe's key, prefix and all.
    let request = signed(Stripe, &[STANDARD], body);
    let bare = STANDARD.strip_prefix("whsec_").unwrap();
    let mismatch = Err(Reason::SignatureMismatch);
    assert_eq!(judged(Stripe, bare, &request, body), mismatch);
}

#[test]
fn an_id_that_says_two_things_is_not_signed() {
    let signer = Signer::new(Standard::new(), [secret(STANDARD)]).unwrap();
    for id in ["", "a.b", "a b", "ä", "a\nb", &"x".repeat(257)] {
        let mut request = request(&[]);
        let message = Message {
            id,
            timestamp: NOW,
            body: b"",
        };
        let error = signer.sign(&mut request, &message).unwrap_err();
        assert_eq!(error, SignError::Id, "{id:?}");
        assert!(request.headers.is_empty());
    }
}

/// What was signed as `msg_1`, at a time and with a body that begins with one,
/// has the bytes of another id, time and body: a replay that looked new, as old
/// as it was.
#[test]
fn a_message_read_one_piece_further_on_is_no_other_message() {
    const LONG_AGO: u64 = NOW - 1_000_000;
    let signer = Signer::new(Standard::new(), [secret(STANDARD)]).unwrap();
    let sent = |id: &str, body: &[u8]| {
        let mut request = request(&[]);
        let message = Message {
            id,
            timestamp: LONG_AGO,
            body,
        };
        signer.sign(&mut request, &message).unwrap();
        request
    };
    let read_as = |mut request: Parts, id: &str, body: &[u8]| {
        let value = HeaderValue::from_str(id).unwrap();
        request.headers.insert("webhook-id", value);
        let now = HeaderValue::from(NOW);
        request.headers.insert("webhook-timestamp", now);
        judged(Standard::new(), STANDARD, &request, body)
    };
    let message = sent("msg_1", format!("{NOW}.5 paid").as_bytes());
    let further = format!("msg_1.{LONG_AGO}");
    assert_eq!(
        read_as(message, &further, b"5 paid"),
        Err(Reason::Malformed)
    );
    let message = sent("msg_1", format!("a.{NOW}.5 paid").as_bytes());
    let further = format!("msg_1.{LONG_AGO}.a");
    assert_eq!(
        read_as(message, &further, b"5 paid"),
        Err(Reason::Malformed)
    );

    // Dots alone are no times.
    let key = Standard::new().key(&secret(STANDARD)).unwrap();
    for id in ["order.42", "evt.paid.1a2b3c4d5e6f", "1700000000.x", "a..b"] {
        let tag = key.tag(&[format!("{id}.{NOW}.").as_bytes(), b"{}"]);
        let signature = format!("v1,{}", BASE64_STANDARD.encode(tag.as_bytes()));
        let message = request(&[
            ("webhook-id", id),
            ("webhook-timestamp", &NOW.to_string()),
            ("webhook-signature", &signature),
        ]);
        assert_eq!(
            judged(Standard::new(), STANDARD, &message, b"{}"),
            Ok(0),
            "{id}"
        );
    }
}

proptest! {
    /// No text in a header makes a verifier panic, or lets anything in.
    #[test]
    fn nothing_that_was_made_up_passes(
        id in "[ -~]{0,12}",
        time in "([ -~]{0,12}|17000000[0-9]{2})",
        signature in "([ -~]{0,80}|(v1,[A-Za-z0-9+/]{43}= ?){0,3}|t=1700000000,v1=[0-9a-f]{64}|(v0|sha256)=[0-9a-f]{64}|[A-Za-z0-9+/]{43}=)",
        body in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let made_up = request(&[
            ("webhook-id", &id), ("webhook-timestamp", &time), ("webhook-signature", &signature),
            ("stripe-signature", &signature), ("x-slack-request-timestamp", &time),
            ("x-slack-signature", &signature), ("x-hub-signature-256", &signature),
            ("x-webhook-signature", &signature), ("x-shopify-hmac-sha256", &signature),
        ]);
        prop_assert!(judged(Standard::new(), STANDARD, &made_up, &body).is_err());
        prop_assert!(judged(Stripe, STANDARD, &made_up, &body).is_err());
        prop_assert!(judged(Slack, STANDARD, &made_up, &body).is_err());
        prop_assert!(judged(GitHub, STANDARD, &made_up, &body).is_err());
        prop_assert!(judged(Sha256::new(), STANDARD, &made_up, &body).is_err());
        prop_assert!(judged(Shopify, STANDARD, &made_up, &body).is_err());
    }

    /// What is signed in any way is verified in the same way, whichever of the
    /// secrets it was, and whatever the body.
    #[test]
    fn what_is_signed_is_verified(
        body in prop::collection::vec(any::<u8>(), 0..400),
        texts in prop::collection::vec("[!-~]{8,40}", 1..4),
        which in any::<prop::sample::Index>(),
    ) {
        let at = which.index(texts.len());
        let secrets = texts.iter().map(|text| secret(text));
        let verifier = Verifier::new(Stripe, secrets).unwrap();
        let request = signed(Stripe, &[&texts[at]], &body);
        let verified = verifier.verify((&request).into(), &body, seconds(NOW)).unwrap();
        prop_assert_eq!(&texts[verified.key_index], &texts[at]);
    }
}
