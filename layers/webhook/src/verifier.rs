//! Verifying without a stack around it.

use std::{sync::Arc, time::Duration};

use buttress_core::Head;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::{Keyring, Reason, Scheme, Secret, SecretError, Tag, mac::sha256};

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
        verify(
            &*self.scheme,
            &self.keys,
            self.tolerance,
            request,
            body,
            now,
        )
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
    /// What a repeat is known by where no id is signed.
    pub(crate) tag: Tag,
}

/// The checks that are the same for all schemes.
pub(crate) fn verify(
    scheme: &dyn Scheme,
    keys: &Keyring,
    tolerance: Duration,
    request: Head<'_>,
    body: &[u8],
    now: Duration,
) -> Result<Verified, Reason> {
    let envelope = scheme.read(request)?;
    let timely = |signed, expires| timely(signed, expires, tolerance, now);
    let mut late = None;
    let together = timely(envelope.timestamp, envelope.expires);
    let together = together.map_err(|reason| late = Some(reason)).is_ok();
    // Each of these has times of its own: what is stale of them is left out.
    let mut claims = Vec::new();
    for claim in &envelope.claims {
        match timely(claim.timestamp, claim.expires) {
            Ok(()) => claims.push(claim),
            Err(reason) => late = late.or(Some(reason)),
        }
    }
    let alone = envelope.claims.is_empty();
    if let Some(reason) = late
        && claims.is_empty()
        && !(together && envelope.tags.iter().next().is_some())
    {
        return Err(reason);
    }
    let [first, second, third, fourth] = envelope.before;
    let digested = claims.iter().any(|claim| claim.sha256_of_body.is_some());
    let digest = if digested { sha256(body) } else { [0; 32] };
    // Every key and every signature, whichever is right: how long it takes
    // tells nobody which.
    let mut right = u64::MAX;
    let mut which = u64::MAX;
    // By the first key, whichever it was signed with: else a repeat that leaves
    // out one of two signatures would look new.
    let mut repeat = Tag::new([0; 32]);
    for (index, key) in (0_u64..).zip(keys.keys()) {
        let mut compare = |computed: &Tag, claimed: &Tag, beside: Choice, at: u64| {
            let matches = computed.ct_eq(claimed) & beside & right.ct_eq(&u64::MAX);
            right.conditional_assign(&index, matches);
            which.conditional_assign(&at, matches);
        };
        if together && (alone || envelope.tags.iter().next().is_some()) {
            let computed = key.tag(&[first, second, third, fourth, body]);
            if index == 0 {
                repeat = computed;
            }
            for claimed in envelope.tags.iter() {
                compare(&computed, claimed, 1.into(), u64::MAX);
            }
        }
        for (at, claim) in (0_u64..).zip(&claims) {
            let computed = key.tag(&[&claim.base]);
            let body = claim
                .sha256_of_body
                .map_or(1.into(), |it| it.ct_eq(&digest));
            // Names are no secrets.
            let named = match (key.id(), &claim.key_id) {
                (Some(ours), Some(theirs)) => u8::from(ours == &**theirs).into(),
                _ => 1.into(),
            };
            compare(&computed, &claim.tag, body & named, at);
        }
    }
    if right == u64::MAX {
        return Err(Reason::SignatureMismatch);
    }
    let claim = usize::try_from(which).ok().and_then(|at| claims.get(at));
    if let Some(claim) = claim {
        let message = claim.known_by.as_ref().unwrap_or(&claim.base);
        let times = [claim.timestamp, claim.expires].map(|time| time.unwrap_or(0).to_be_bytes());
        let id = claim.id.as_deref().unwrap_or_default();
        let pieces: [&[u8]; 4] = [message, &times[0], &times[1], id.as_bytes()];
        repeat = keys.keys()[0].tag(&pieces);
    }
    Ok(Verified {
        id: match claim {
            Some(claim) => claim.id.clone(),
            None => envelope.id.map(Arc::from),
        },
        timestamp: claim.map_or(envelope.timestamp, |claim| claim.timestamp),
        key_index: usize::try_from(right).unwrap_or(usize::MAX),
        scheme: scheme.name(),
        tag: repeat,
    })
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

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Request, request::Parts};

    use super::*;
    use crate::{Claim, Envelope, Key, Message, SignError, Signer, Stripe};

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

    /// Without one of its signatures, each of which is right, a message is
    /// still the same: it was taken for another, and a replay for new.
    fn check<S: Scheme>(
        scheme: impl Fn() -> S,
        header: &'static str,
        keep_last: fn(&str) -> String,
    ) {
        let verifier = Verifier::new(scheme(), secrets()).unwrap();
        let judge = |request: &Parts| {
            let verified = verifier.verify(request.into(), b"{}", Duration::from_secs(NOW));
            let verified = verified.unwrap();
            (verified.key_index, verified.tag)
        };
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
        claims: [(u64, &'static [u8]); 2],
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
            for (time, base) in self.claims {
                let claim = Claim::new(key.tag(&[base]), b"base".to_vec());
                envelope = envelope.claim(claim.timestamp(time).id("claimed"));
            }
            Ok(envelope)
        }
    }

    #[test]
    fn each_signature_has_a_time_of_its_own() {
        const FRESH: u64 = NOW - 300;
        const STALE: u64 = NOW - 301;
        const AHEAD: u64 = NOW + 301;
        let judge = |together, claims| {
            let verifier = Verifier::new(Mixed { together, claims }, secrets()).unwrap();
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

        // Two messages that say the same are two, by their nonces.
        let verifier = Verifier::new(crate::HttpSignatures::new(), secrets()).unwrap();
        let mark = |id: &str| {
            let scheme = crate::HttpSignatures::new().id_as_nonce();
            let request = signed(scheme, id, NOW);
            let verified = verifier.verify((&request).into(), b"{}", Duration::from_secs(NOW));
            verified.unwrap().tag
        };
        assert_eq!(mark("msg_1"), mark("msg_1"));
        assert_ne!(mark("msg_1"), mark("msg_2"));
    }
}
