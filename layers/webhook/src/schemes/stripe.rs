//! Stripe's scheme.

use buttress_core::Head;
use http::{HeaderName, request::Parts};

use crate::{Envelope, Key, Message, Reason, Scheme, SignError, text};

const SIGNATURE: HeaderName = HeaderName::from_static("stripe-signature");

/// Stripe's `Stripe-Signature: t=<seconds>,v1=<hex>` over `t.body`; several
/// `v1` during a rotation. The key is the text of the whole secret, its
/// `whsec_` included.
///
/// Other versions (`v0`) are passed over. Where `t` stands twice Stripe's
/// libraries do not agree which one counts, and it is refused here.
///
/// Source: Stripe's "Verify webhook signatures manually".
#[derive(Clone, Copy, Debug, Default)]
pub struct Stripe;

impl Scheme for Stripe {
    fn name(&self) -> &'static str {
        "stripe"
    }

    fn most_keys(&self) -> usize {
        crate::MOST_SIGNATURES
    }

    fn signs_time(&self) -> bool {
        true
    }

    fn sign(
        &self,
        request: &mut Parts,
        message: &Message<'_>,
        keys: &[Key],
    ) -> Result<(), SignError> {
        let mut digits = itoa::Buffer::new();
        let timestamp = digits.format(message.timestamp);
        const ENTRY: usize = ",v1=".len() + text::HEX;
        let mut value = Vec::with_capacity(2 + timestamp.len() + keys.len() * ENTRY);
        value.extend_from_slice(b"t=");
        value.extend_from_slice(timestamp.as_bytes());
        for key in keys {
            let tag = key.tag(&[timestamp.as_bytes(), b".", message.body]);
            value.extend_from_slice(b",v1=");
            text::push_hex(&mut value, &tag);
        }
        request.headers.insert(SIGNATURE, text::header(value));
        Ok(())
    }

    fn read<'r>(&self, request: Head<'r>) -> Result<Envelope<'r>, Reason> {
        let value = text::single(request.headers, &SIGNATURE, Reason::MissingSignature)?;
        let mut timestamp = None;
        let mut envelope = Envelope::new();
        // One entry that cannot be read does not spoil the others.
        let mut nothing = Reason::MissingSignature;
        for entry in value.split(',') {
            if let Some(text) = entry.strip_prefix("v1=") {
                match text::hex(text) {
                    Some(_) if envelope.is_full() => return Err(Reason::Malformed),
                    Some(tag) => envelope.tags.push(tag),
                    None => nothing = Reason::Malformed,
                }
            } else if let Some(text) = entry.strip_prefix("t=") {
                if timestamp.replace(text).is_some() {
                    return Err(Reason::DuplicateHeader);
                }
            } else if !entry.contains('=') {
                nothing = Reason::Malformed;
            } else if nothing == Reason::MissingSignature {
                nothing = Reason::UnsupportedScheme;
            }
        }
        let Some(timestamp) = timestamp else {
            return Err(match nothing {
                Reason::Malformed => nothing,
                _ => Reason::MissingTimestamp,
            });
        };
        if envelope.is_empty() {
            return Err(nothing);
        }
        envelope.timestamp = Some(text::seconds(timestamp)?);
        envelope.before = [timestamp.as_bytes(), b".", b"", b""];
        Ok(envelope)
    }
}
