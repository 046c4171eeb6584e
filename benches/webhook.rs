//! What is measured of signing and verifying: over the bare MAC of the same
//! bytes, with the key's schedule kept on either side.

use std::{hint::black_box, time::Duration};

use aws_lc_rs::hmac as hmac_aws_lc;
use buttress_webhook::{GitHub, Message, Scheme, Secret, Signer, Standard, Stripe, Verifier};
use hmac::{Hmac, KeyInit, Mac};
use http::{Request, request::Parts};
use sha2::Sha256;

use crate::measure::Run;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
const NOW: u64 = 1_700_000_000;

fn secret() -> Secret {
    Secret::new(SECRET).expect("it is long enough")
}

fn message(body: &[u8]) -> Message<'_> {
    Message {
        id: ID,
        timestamp: NOW,
        body,
    }
}

fn parts() -> Parts {
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.headers.reserve(8);
    parts
}

/// The MAC of what is signed with a body of so many bytes, and nothing else.
/// All of it is one piece, as nobody has it who does not copy the body.
#[must_use]
pub fn bare(before: &str, length: usize) -> Run {
    let signed = [before.as_bytes(), &vec![b'x'; length]].concat();
    let key = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).expect("any length will do");
    Box::new(move |calls| {
        for _ in 0..calls {
            let mut mac = key.clone();
            mac.update(black_box(&signed));
            black_box(mac.finalize().into_bytes());
        }
    })
}

/// The same by AWS-LC.
#[must_use]
pub fn bare_aws_lc(length: usize) -> Run {
    let body = vec![b'x'; length];
    let key = hmac_aws_lc::Key::new(hmac_aws_lc::HMAC_SHA256, SECRET.as_bytes());
    Box::new(move |calls| {
        for _ in 0..calls {
            black_box(hmac_aws_lc::sign(&key, black_box(&body)));
        }
    })
}

/// A request signed by `scheme`, its headers written into a map that has room.
#[must_use]
pub fn sign(scheme: impl Scheme, length: usize) -> Run {
    let body = vec![b'x'; length];
    let signer = Signer::new(scheme, [secret()]).expect("a secret of every scheme");
    let mut request = parts();
    Box::new(move |calls| {
        for _ in 0..calls {
            let signed = signer.sign(&mut request, &message(black_box(&body)));
            signed.expect("a sound message");
            black_box(&request);
        }
    })
}

/// A request verified that was signed by `scheme`.
#[must_use]
pub fn verify(scheme: impl Scheme + Clone, length: usize) -> Run {
    let body = vec![b'x'; length];
    let mut request = parts();
    let signer = Signer::new(scheme.clone(), [secret()]).expect("a secret of every scheme");
    let signed = signer.sign(&mut request, &message(&body));
    signed.expect("a sound message");
    let verifier = Verifier::new(scheme, [secret()]).expect("a secret of every scheme");
    Box::new(move |calls| {
        for _ in 0..calls {
            let now = Duration::from_secs(NOW);
            let verified = verifier.verify((&request).into(), black_box(&body), now);
            let _ = black_box(verified.expect("it is genuine"));
        }
    })
}

/// Makes a run for a body of so many bytes.
pub type Make = fn(usize) -> Run;

/// What is signed and verified: the scheme's name, its MAC alone, signing,
/// verifying.
pub const SCHEMES: [(&str, Make, Make, Make); 3] = [
    (
        "standard",
        |n| bare(&format!("{ID}.{NOW}."), n),
        |n| sign(Standard::new(), n),
        |n| verify(Standard::new(), n),
    ),
    (
        "stripe",
        |n| bare(&format!("{NOW}."), n),
        |n| sign(Stripe, n),
        |n| verify(Stripe, n),
    ),
    (
        "github",
        |n| bare("", n),
        |n| sign(GitHub, n),
        |n| verify(GitHub, n),
    ),
];
