//! What the vendors' own libraries sign and what they say of it, beside what
//! we do. `scripts/webhook-vectors/make` makes the requests again.

use std::{collections::BTreeMap, sync::LazyLock, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use buttress_webhook::{
    GitHub, Message, Scheme, Secret, Signer, Slack, Standard, Stripe, Verifier,
};
use http::{HeaderName, HeaderValue, Request, request::Parts};
use serde_json::Value;

/// Requests that are judged in another way here than by every library that was
/// asked, and why.
const ON_PURPOSE: &[(&str, bool, &str)] = &[
    ("binary", true, "the libraries take text only"),
    (
        "stripe: +301 s",
        false,
        "Stripe's bound no time in the future",
    ),
    ("timestamp '+1700000000'", false, "digits only"),
    ("time '+1700000000'", false, "digits only"),
    ("timestamp ' 1700000000'", false, "digits only"),
    ("timestamp '01700000000'", false, "one text for each number"),
    ("timestamp '1700000000.9'", false, "digits only"),
    (
        "http-signatures: +300 s",
        true,
        "the tolerance is the same both ways",
    ),
];

struct Case {
    name: String,
    scheme: String,
    secret: String,
    now: u64,
    request: Parts,
    body: Vec<u8>,
    signed: Option<Signed>,
    verdicts: BTreeMap<String, bool>,
}

struct Signed {
    id: String,
    timestamp: u64,
    secrets: Vec<String>,
}

static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| {
    let cases: Value = serde_json::from_str(include_str!("vectors/vendors.json")).unwrap();
    let cases: Vec<_> = cases.as_array().unwrap().iter().map(read).collect();
    assert!(cases.len() > 200);
    cases
});

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn read(case: &Value) -> Case {
    let url = case["url"].as_str().unwrap();
    let mut request = Request::post(url).body(()).unwrap().into_parts().0;
    for header in case["headers"].as_array().unwrap() {
        let name: HeaderName = header[0].as_str().unwrap().parse().unwrap();
        let value = HeaderValue::from_str(header[1].as_str().unwrap()).unwrap();
        request.headers.append(name, value);
    }
    let body = BASE64_STANDARD.decode(case["body"].as_str().unwrap());
    let times = usize::try_from(case["times"].as_u64().unwrap()).unwrap();
    let signed = case["signed"].as_object().map(|signed| Signed {
        id: text(&signed["id"]),
        timestamp: signed["timestamp"].as_u64().unwrap(),
        secrets: signed["secrets"]
            .as_array()
            .unwrap()
            .iter()
            .map(text)
            .collect(),
    });
    let verdicts = case["verdicts"].as_object().unwrap().iter();
    Case {
        name: text(&case["name"]),
        scheme: text(&case["scheme"]),
        secret: text(&case["secret"]),
        now: case["now"].as_u64().unwrap(),
        request,
        body: body.unwrap().repeat(times),
        signed,
        verdicts: verdicts
            .map(|(library, verdict)| (library.clone(), verdict.as_bool().unwrap()))
            .collect(),
    }
}

fn scheme(name: &str) -> Option<Box<dyn Scheme>> {
    Some(match name {
        "standard" => Box::new(Standard::new()),
        "svix" => Box::new(Standard::svix()),
        "stripe" => Box::new(Stripe),
        "slack" => Box::new(Slack),
        "github" => Box::new(GitHub),
        #[cfg(feature = "http-signatures")]
        "http-signatures" => Box::new(buttress_webhook::HttpSignatures::new()),
        _ => return None,
    })
}

fn accepts(case: &Case, scheme: Box<dyn Scheme>) -> bool {
    let secret = Secret::new(&*case.secret).unwrap();
    let verifier = Verifier::new(scheme, [secret]).unwrap();
    let now = Duration::from_secs(case.now);
    verifier
        .verify((&case.request).into(), &case.body, now)
        .is_ok()
}

#[test]
fn what_they_all_accept_is_accepted_and_what_they_all_refuse_is_refused() {
    let mut wrong = Vec::new();
    let mut used = vec![false; ON_PURPOSE.len()];
    for case in CASES.iter() {
        let Some(scheme) = scheme(&case.scheme) else {
            continue;
        };
        let ours = accepts(case, scheme);
        // Where they do not agree with one another, either verdict is theirs.
        if case.verdicts.values().any(|&theirs| theirs == ours) {
            continue;
        }
        let known = ON_PURPOSE
            .iter()
            .position(|(name, verdict, _)| case.name.contains(name) && *verdict == ours);
        match known {
            Some(at) => used[at] = true,
            None => wrong.push(format!("{}: {ours}, they: {:?}", case.name, case.verdicts)),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let unused = ON_PURPOSE.iter().zip(used).filter(|((name, ..), used)| {
        let built = cfg!(feature = "http-signatures") || !name.starts_with("http-signatures");
        built && !used
    });
    let unused: Vec<_> = unused.map(|((name, ..), _)| name).collect();
    assert!(unused.is_empty(), "no such difference: {unused:?}");
}

/// Where they differ among themselves the stricter side is ours, but for what
/// is genuine and one of them cannot read.
#[test]
fn of_two_verdicts_the_stricter_is_ours() {
    for case in CASES.iter() {
        let Some(scheme) = scheme(&case.scheme) else {
            continue;
        };
        let verdicts: Vec<_> = case.verdicts.values().collect();
        let is_genuine = case.signed.is_some() || case.name.contains("ours");
        if is_genuine || verdicts.iter().all(|&verdict| verdict == verdicts[0]) {
            continue;
        }
        // A word that is no signature spoils none that is one.
        let genuine = case.name.ends_with("a word before");
        assert_eq!(accepts(case, scheme), genuine, "{}", case.name);
    }
}

/// The same bytes: what we sign they verify.
#[test]
fn what_is_signed_here_is_what_they_sign() {
    let mut compared = 0;
    for case in CASES.iter() {
        let (Some(scheme), Some(signed)) = (scheme(&case.scheme), &case.signed) else {
            continue;
        };
        let secrets = signed
            .secrets
            .iter()
            .map(|text| Secret::new(&**text).unwrap());
        let signer = Signer::new(scheme, secrets).unwrap();
        let (mut request, ()) = Request::new(()).into_parts();
        let message = Message {
            id: &signed.id,
            timestamp: signed.timestamp,
            body: &case.body,
        };
        signer.sign(&mut request, &message).unwrap();
        assert_eq!(request.headers, case.request.headers, "{}", case.name);
        compared += 1;
    }
    assert!(compared >= 5 * 7, "{compared}");
}

/// Requests as they are signed here, which the script has the libraries judge.
#[cfg(feature = "http-signatures")]
fn ours() -> Value {
    let standard = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let text = "It's a Secret to Everybody";
    let schemes = [
        ("standard", standard),
        ("svix", standard),
        ("stripe", standard),
        ("slack", text),
        ("github", text),
        ("http-signatures", text),
    ];
    let bodies = [
        &b"{\"object\":\"event\"}"[..],
        b"",
        "{\"object\":\"\u{1f980}\"}".as_bytes(),
    ];
    let mut requests = Vec::new();
    for (name, secret) in schemes {
        for body in bodies {
            let keyed = Secret::new(secret).unwrap().with_id("key-1").unwrap();
            let signer = Signer::new(scheme(name).unwrap(), [keyed]).unwrap();
            let request = Request::post("https://hooks.example.com/in/orders?kind=paid&x=%20y");
            let (mut request, ()) = request.body(()).unwrap().into_parts();
            let message = Message {
                id: "msg_2KWPBgLlAfxdpx2AI54pPJ85f4W",
                timestamp: 1_700_000_000,
                body,
            };
            signer.sign(&mut request, &message).unwrap();
            let headers = request.headers.iter();
            let headers = headers.map(|(name, value)| [name.as_str(), value.to_str().unwrap()]);
            requests.push(serde_json::json!({
                "scheme": name,
                "secret": secret,
                "headers": headers.collect::<Vec<_>>(),
                "body": BASE64_STANDARD.encode(body),
            }));
        }
    }
    requests.into()
}

/// What the libraries have judged is what is signed here today, and they take
/// all of it. With `WEBHOOK_VECTORS=write` it is written for them instead.
#[cfg(feature = "http-signatures")]
#[test]
fn what_is_signed_here_they_verify() {
    let place = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/ours.json");
    if std::env::var_os("WEBHOOK_VECTORS").is_some_and(|it| it == "write") {
        let text = serde_json::to_string_pretty(&ours()).unwrap();
        std::fs::write(place, text + "\n").unwrap();
        return;
    }
    let written: Value = serde_json::from_str(&std::fs::read_to_string(place).unwrap()).unwrap();
    assert_eq!(written, ours(), "run scripts/webhook-vectors/make");
    let judged: Vec<_> = CASES.iter().filter(|it| it.name.contains("ours")).collect();
    assert_eq!(judged.len(), written.as_array().unwrap().len());
    for case in judged {
        // One of the libraries takes no empty body.
        let takes = |(library, verdict): (&String, &bool)| {
            *verdict || (case.body.is_empty() && library.contains("octokit"))
        };
        assert!(
            case.verdicts.iter().all(takes),
            "{}: {:?}",
            case.name,
            case.verdicts
        );
    }
}
