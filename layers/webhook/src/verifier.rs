//! Verifying without a stack around it.

use std::{sync::Arc, time::Duration};

use buttress_core::Head;
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::{Envelope, Keyring, Reason, Scheme, Secret, SecretError, scheme::Covers};

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
        judge(
            &*self.scheme,
            &self.keys,
            self.tolerance,
            request,
            body,
            now,
        )
        .map(|(verified, _)| verified)
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

/// Reads what the request claims, and whether that is timely.
pub(crate) fn screen<'r>(
    scheme: &dyn Scheme,
    tolerance: Duration,
    request: Head<'r>,
    now: Duration,
) -> Result<Envelope<'r>, Reason> {
    let envelope = scheme.read(request)?;
    // Whole seconds, as the timestamps are.
    let now = now.as_secs();
    if let Some(signed) = envelope.timestamp {
        if Duration::from_secs(now.saturating_sub(signed)) > tolerance {
            return Err(Reason::TimestampTooOld);
        }
        if Duration::from_secs(signed.saturating_sub(now)) > tolerance {
            return Err(Reason::TimestampTooNew);
        }
    }
    if envelope.expires.is_some_and(|expires| expires <= now) {
        return Err(Reason::TimestampTooOld);
    }
    Ok(envelope)
}

/// The checks that are the same for all schemes, and what passed them.
pub(crate) fn judge<'r>(
    scheme: &dyn Scheme,
    keys: &Keyring,
    tolerance: Duration,
    request: Head<'r>,
    body: &[u8],
    now: Duration,
) -> Result<(Verified, Envelope<'r>), Reason> {
    let envelope = screen(scheme, tolerance, request, now)?;
    let [first, second, third, fourth] = envelope.before;
    let (last, digested) = match &envelope.covers {
        Covers::Body => (body, 1.into()),
        Covers::Sha256(claimed) => {
            let digest: [u8; 32] = Sha256::digest(body).into();
            (&*envelope.base, digest.ct_eq(claimed))
        }
    };
    // Every key and every signature, whichever is right: how long it takes
    // tells nobody which.
    let mut right = u64::MAX;
    for (index, key) in (0_u64..).zip(keys.keys()) {
        let computed = key.tag(&[first, second, third, fourth, last]);
        for claimed in envelope.tags.iter() {
            let matches = computed.ct_eq(claimed) & digested & right.ct_eq(&u64::MAX);
            right.conditional_assign(&index, matches);
        }
    }
    if right == u64::MAX {
        return Err(Reason::SignatureMismatch);
    }
    let verified = Verified {
        id: envelope.id.map(Arc::from),
        timestamp: envelope.timestamp,
        key_index: usize::try_from(right).unwrap_or(usize::MAX),
        scheme: scheme.name(),
        repeat: false,
    };
    Ok((verified, envelope))
}

/// What a message is known by where it has no id: the SHA-256 of the bytes that
/// are signed. Not its MAC, which is another one under each secret: who drops
/// the first of two signatures, or waits until the secrets are replaced, would
/// have a message that looks new.
pub(crate) fn digest(envelope: &Envelope<'_>, body: &[u8]) -> [u8; 32] {
    let mut running = Sha256::new();
    for piece in envelope.before {
        running.update(piece);
    }
    running.update(match envelope.covers {
        Covers::Body => body,
        Covers::Sha256(_) => &envelope.base,
    });
    running.finalize().into()
}
