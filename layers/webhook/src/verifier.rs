//! Verifying without a stack around it.

use std::{sync::Arc, time::Duration};

use buttress_core::Head;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::{Envelope, Keyring, Reason, Scheme, Secret, SecretError, mac::sha256};

/// Tells what was signed by who has the secret, and lately.
///
/// What [`VerifyLayer`](crate::VerifyLayer) does its work with; by itself for
/// what comes in another way, as from a queue. It remembers nothing, so it does
/// not know a repeat. Cheap to clone.
///
/// ```
/// use std::time::Duration;
/// use buttress_webhook::{Reason, Secret, Standard, Verifier};
/// use http::Request;
///
/// let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
/// let verifier = Verifier::new(Standard::new(), [secret])?;
///
/// let request = Request::post("/hooks")
///     .header("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek")
///     .header("webhook-timestamp", "1614265330")
///     .header("webhook-signature", "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=")
///     .body(())?;
/// let body = br#"{"test": 2432232314}"#;
/// let now = Duration::from_secs(1_614_265_400);
///
/// let verified = verifier.verify((&request).into(), body, now)?;
/// assert_eq!(verified.id.as_deref(), Some("msg_p5jXN8AQM9LWM0D4loKWxJek"));
///
/// let tampered = verifier.verify((&request).into(), b"{}", now);
/// assert_eq!(tampered.unwrap_err(), Reason::SignatureMismatch);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Verifier {
    scheme: Arc<dyn Scheme>,
    keys: Keyring,
    tolerance: Duration,
}

/// How far the sender's clock may be off, and how long its request may take.
pub(crate) const TOLERANCE: Duration = Duration::from_secs(300);

impl Verifier {
    /// Accepts what is signed by `scheme` with one of the secrets, at most 300
    /// seconds ago or ahead.
    ///
    /// # Errors
    ///
    /// If there are no secrets or more than 16, or if one is none of this
    /// scheme.
    pub fn new(
        scheme: impl Scheme,
        secrets: impl IntoIterator<Item = Secret>,
    ) -> Result<Self, SecretError> {
        let keys = Keyring::new(&scheme, secrets)?;
        Ok(Self {
            scheme: Arc::new(scheme),
            keys,
            tolerance: TOLERANCE,
        })
    }

    /// How long ago, and how far in the future by this end's clock, a message
    /// may have been signed. In whole seconds as the timestamps are; without
    /// meaning where the scheme signs no time. Default 300 s.
    #[must_use]
    pub const fn tolerance(mut self, tolerance: Duration) -> Self {
        self.tolerance = tolerance;
        self
    }

    /// Whether the message is genuine, by the time since the Unix epoch.
    ///
    /// # Errors
    ///
    /// Why it is not believed.
    pub fn verify(
        &self,
        request: Head<'_>,
        body: &[u8],
        now: Duration,
    ) -> Result<Verified, Reason> {
        let mut read = self.scheme.read(request);
        let envelope = screen(&mut read, self.tolerance, now)?;
        judge(&*self.scheme, &self.keys, envelope, body).map(|judged| judged.verified)
    }
}

/// A message that is genuine: an extension of the request that
/// [`VerifyLayer`](crate::VerifyLayer) hands on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// The message's id, where the scheme signs one.
    pub id: Option<Arc<str>>,
    /// When it was signed, in seconds since the Unix epoch, where the scheme
    /// signs a time.
    pub timestamp: Option<u64>,
    /// Which of the secrets it was signed with, from 0 on: once none comes with
    /// the old one, it may go.
    pub key_index: usize,
    /// The scheme's [name](Scheme::name).
    pub scheme: &'static str,
    /// Whether it came before, and the layer was told to
    /// [let repeats pass](crate::Repeat::Pass).
    pub repeat: bool,
}

/// What a [scheme has read](Scheme::read), without what is not timely. In its
/// place: it is long to copy.
pub(crate) fn screen<'a, 'r>(
    read: &'a mut Result<Envelope<'r>, Reason>,
    tolerance: Duration,
    now: Duration,
) -> Result<&'a Envelope<'r>, Reason> {
    let envelope = read.as_mut().map_err(|reason| *reason)?;
    let mut late = None;
    let timely = |signed, expires| timely(signed, expires, tolerance, now);
    if let Err(reason) = timely(envelope.timestamp, envelope.expires) {
        envelope.tags.clear();
        late = Some(reason);
    }
    // Each of these has times of its own.
    envelope.statements.retain(|statement| {
        let timely = timely(statement.timestamp, statement.expires);
        late = late.or(timely.err());
        timely.is_ok()
    });
    match envelope.is_empty() {
        true => Err(late.unwrap_or(Reason::MissingSignature)),
        false => Ok(envelope),
    }
}

/// Whether something that was signed then, and is worth nothing from `expires`
/// on, is judged by its signature at all.
fn timely(
    signed: Option<u64>,
    expires: Option<u64>,
    tolerance: Duration,
    now: Duration,
) -> Result<(), Reason> {
    // Whole seconds, as the timestamps are.
    let now = now.as_secs();
    if let Some(signed) = signed {
        if Duration::from_secs(now.saturating_sub(signed)) > tolerance {
            return Err(Reason::TimestampTooOld);
        }
        if Duration::from_secs(signed.saturating_sub(now)) > tolerance {
            return Err(Reason::TimestampTooNew);
        }
    }
    if expires.is_some_and(|expires| expires <= now) {
        return Err(Reason::TimestampTooOld);
    }
    Ok(())
}

/// A message that is genuine, and by which of its signatures.
pub(crate) struct Judged {
    pub(crate) verified: Verified,
    statement: Option<usize>,
}

impl Judged {
    /// What the message is known by where it has no id: the SHA-256 of the
    /// bytes that are signed. Not its MAC, which is another one under each
    /// secret: who drops the first of two signatures, or waits until the
    /// secrets are replaced, would have a message that looks new.
    pub(crate) fn digest(&self, envelope: &Envelope<'_>, body: &[u8]) -> [u8; 32] {
        match self.statement {
            Some(at) => {
                let statement = &envelope.statements[at];
                let message = statement.known_by.as_ref().unwrap_or(&statement.base);
                let signed = statement.timestamp.unwrap_or(0).to_be_bytes();
                sha256(&[message, &signed])
            }
            None => {
                let [first, second, third, fourth] = envelope.before;
                sha256(&[first, second, third, fourth, body])
            }
        }
    }
}

/// Whether what was [screened](screen) is signed with one of the keys.
pub(crate) fn judge(
    scheme: &dyn Scheme,
    keys: &Keyring,
    envelope: &Envelope<'_>,
    body: &[u8],
) -> Result<Judged, Reason> {
    let [first, second, third, fourth] = envelope.before;
    let statements = &envelope.statements;
    let is_digested = statements.iter().any(|it| it.sha256_of_body.is_some());
    let digest = if is_digested {
        sha256(&[body])
    } else {
        [0; 32]
    };
    // Every key and every signature, whichever is right: how long it takes
    // tells nobody which.
    let mut key_index = u64::MAX;
    let mut which = u64::MAX;
    for (index, key) in (0_u64..).zip(keys.keys()) {
        let mut found = |matches: Choice, at: u64| {
            let matches = matches & key_index.ct_eq(&u64::MAX);
            key_index.conditional_assign(&index, matches);
            which.conditional_assign(&at, matches);
        };
        if !envelope.tags.is_empty() {
            let computed = key.tag(&[first, second, third, fourth, body]);
            for claimed in envelope.tags.iter() {
                found(computed.ct_eq(claimed), u64::MAX);
            }
        }
        for (at, statement) in (0_u64..).zip(statements) {
            let computed = key.tag(&[&statement.base]);
            let bound = statement.sha256_of_body.as_ref();
            let bound = bound.map_or(1.into(), |claimed| claimed.ct_eq(&digest));
            // Names are no secrets.
            let named = match (key.id(), &statement.key_id) {
                (Some(ours), Some(theirs)) => u8::from(ours == &**theirs).into(),
                _ => 1.into(),
            };
            found(computed.ct_eq(&statement.tag) & bound & named, at);
        }
    }
    if key_index == u64::MAX {
        return Err(Reason::SignatureMismatch);
    }
    let statement = usize::try_from(which)
        .ok()
        .filter(|&at| at < statements.len());
    let (id, timestamp) = match statement.map(|at| &statements[at]) {
        Some(statement) => (statement.id.clone(), statement.timestamp),
        None => (envelope.id.map(Arc::from), envelope.timestamp),
    };
    Ok(Judged {
        verified: Verified {
            id,
            timestamp,
            key_index: usize::try_from(key_index).unwrap_or(usize::MAX),
            scheme: scheme.name(),
            repeat: false,
        },
        statement,
    })
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Request, request::Parts};

    use super::*;
    use crate::{Key, Message, SignError, Signer, Statement, Stripe};

    const NOW: u64 = 1_700_000_000;

    fn secrets() -> [Secret; 2] {
        ["correct horse", "battery staple"].map(|text| Secret::new(text).unwrap())
    }

    fn signed(scheme: impl Scheme, id: &str, timestamp: u64) -> Parts {
        let signer = Signer::new(scheme, secrets()).unwrap();
        let request = Request::post("https://example.com/");
        let (mut request, ()) = request.body(()).unwrap().into_parts();
        let message = Message {
            id,
            timestamp,
            body: b"{}",
        };
        signer.sign(&mut request, &message).unwrap();
        request
    }

    /// By which key, and what the message is known by.
    fn judged(verifier: &Verifier, request: &Parts) -> (usize, [u8; 32]) {
        let now = Duration::from_secs(NOW);
        let (scheme, keys) = (&*verifier.scheme, &verifier.keys);
        let mut read = scheme.read(request.into());
        let envelope = screen(&mut read, TOLERANCE, now).unwrap();
        let judged = judge(scheme, keys, envelope, b"{}").unwrap_or_else(|why| panic!("{why}"));
        (judged.verified.key_index, judged.digest(envelope, b"{}"))
    }

    /// Without one of its signatures, each of which is right, a message is
    /// still the same: it was taken for another, and a replay for new.
    fn check<S: Scheme>(
        scheme: impl Fn() -> S,
        header: &'static str,
        keep_last: fn(&str) -> String,
    ) {
        let verifier = Verifier::new(scheme(), secrets()).unwrap();
        let judge = |request: &Parts| judged(&verifier, request);
        let both = signed(scheme(), "", NOW);
        let mut one = both.clone();
        let value = keep_last(both.headers[header].to_str().unwrap());
        let value = HeaderValue::try_from(value).unwrap();
        one.headers.insert(header, value);
        let (both, one) = (judge(&both), judge(&one));
        assert_eq!((both.0, one.0), (0, 1));
        assert_eq!(both.1, one.1);
        assert_ne!(both.1, judge(&signed(scheme(), "", NOW + 1)).1);
    }

    /// One signature of the body, by a time of its own, beside two of other
    /// bytes.
    #[derive(Debug)]
    struct Mixed {
        together: Option<(u64, &'static [u8])>,
        statements: [(u64, &'static [u8]); 2],
    }

    impl Scheme for Mixed {
        fn name(&self) -> &'static str {
            "mixed"
        }

        fn key(&self, secret: &Secret) -> Result<Key, SecretError> {
            Key::of(secret)
        }

        fn sign(&self, _: &mut Parts, _: &Message<'_>, _: &[Key]) -> Result<(), SignError> {
            Ok(())
        }

        fn read<'r>(&self, _: Head<'r>) -> Result<Envelope<'r>, Reason> {
            let key = Key::of(&secrets()[1]).unwrap();
            let mut envelope = Envelope::new();
            if let Some((time, body)) = self.together {
                envelope = envelope.timestamp(time).tag(key.tag(&[body]));
            }
            for (time, base) in self.statements {
                let statement = Statement::new(key.tag(&[base]), b"base".to_vec());
                envelope = envelope.statement(statement.timestamp(time).id("claimed"));
            }
            Ok(envelope)
        }
    }

    #[test]
    fn each_signature_has_a_time_of_its_own() {
        const FRESH: u64 = NOW - 300;
        const STALE: u64 = NOW - 301;
        const AHEAD: u64 = NOW + 301;
        let judge = |together, statements| {
            let verifier = Verifier::new(
                Mixed {
                    together,
                    statements,
                },
                secrets(),
            )
            .unwrap();
            let request = signed(Stripe, "", NOW);
            let verified = verifier.verify((&request).into(), b"{}", Duration::from_secs(NOW));
            verified.map(|verified| (verified.timestamp, verified.id.is_some()))
        };
        let (body, base, wrong): (&[u8], &[u8], &[u8]) = (b"{}", b"base", b"wrong");
        let mismatch = Err(Reason::SignatureMismatch);
        let old = Err(Reason::TimestampTooOld);
        let none = [(STALE, base), (AHEAD, base)];
        let second = [(STALE, base), (FRESH, base)];
        let forged = [(FRESH, wrong), (FRESH, wrong)];

        assert_eq!(judge(None, none), old);
        assert_eq!(judge(Some((STALE, body)), none), old);
        assert_eq!(
            judge(Some((AHEAD, body)), none),
            Err(Reason::TimestampTooNew)
        );
        assert_eq!(judge(Some((FRESH, body)), none), Ok((Some(FRESH), false)));
        assert_eq!(judge(Some((FRESH, wrong)), none), mismatch);
        assert_eq!(judge(None, second), Ok((Some(FRESH), true)));
        assert_eq!(judge(Some((STALE, body)), second), Ok((Some(FRESH), true)));
        assert_eq!(judge(Some((STALE, body)), forged), mismatch);
        assert_eq!(judge(Some((NOW, body)), forged), Ok((Some(NOW), false)));
        // The body is no base, and the base is no body.
        assert_eq!(judge(Some((NOW, base)), [(NOW, body); 2]), mismatch);
    }

    #[test]
    fn a_repeat_is_known_without_one_of_its_signatures() {
        check(
            || Stripe,
            "stripe-signature",
            |value| {
                let parts: Vec<_> = value.split(',').collect();
                format!("{},{}", parts[0], parts[2])
            },
        );
    }

    #[cfg(feature = "http-signatures")]
    #[test]
    fn nor_without_one_of_its_labels() {
        check(crate::HttpSignatures::new, "signature-input", |value| {
            value.split_once(", ").unwrap().1.to_owned()
        });

        // Nor by one that is of more, and for longer, beside it.
        let date = || http::header::DATE;
        let more = crate::HttpSignatures::new().field(date());
        let more = more
            .label("more")
            .unwrap()
            .lifetime(Duration::from_secs(60));
        let signer = Signer::new(crate::HttpSignatures::new(), secrets()[..1].to_vec());
        let signer = signer.unwrap().and(more, secrets()[1..].to_vec()).unwrap();
        let request = Request::post("https://example.com/").header(date(), "today");
        let (mut both, ()) = request.body(()).unwrap().into_parts();
        let message = Message {
            id: "",
            timestamp: NOW,
            body: b"{}",
        };
        signer.sign(&mut both, &message).unwrap();
        let mut one = both.clone();
        let inputs = both.headers["signature-input"].to_str().unwrap();
        let (_, second) = inputs.split_once(", ").unwrap();
        assert!(second.starts_with("more="), "{inputs}");
        one.headers
            .insert("signature-input", second.parse().unwrap());
        let verifier = Verifier::new(crate::HttpSignatures::new(), secrets()).unwrap();
        let (both, one) = (judged(&verifier, &both), judged(&verifier, &one));
        assert_eq!((both.0, one.0), (0, 1));
        assert_eq!(both.1, one.1);

        // Two messages that say the same are two, by their nonces.
        let verifier = Verifier::new(crate::HttpSignatures::new(), secrets()).unwrap();
        let mark = |id: &str| {
            let scheme = crate::HttpSignatures::new().id_as_nonce();
            let request = signed(scheme, id, NOW);
            judged(&verifier, &request).1
        };
        assert_eq!(mark("msg_1"), mark("msg_1"));
        assert_ne!(mark("msg_1"), mark("msg_2"));
    }
}
