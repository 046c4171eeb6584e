//! Standard Webhooks.

use base64::{
    Engine,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use buttress_core::Head;
use http::{HeaderName, HeaderValue, request::Parts};
use zeroize::Zeroizing;

use crate::{Envelope, Key, Message, Reason, Scheme, Secret, SecretError, SignError, text};

/// Secrets are pasted with and without their padding.
const SECRETS: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
const SHORTEST: usize = 24;
const LONGEST: usize = 64;

/// Standard Webhooks 1.0.0: `webhook-id`, `webhook-timestamp` and
/// `webhook-signature: v1,<base64>` over `id.timestamp.body`; several
/// signatures are separated by spaces.
///
/// A secret is base64, after `whsec_` or without it, of 24 to 64 bytes; one
/// [of bytes](Secret::from_bytes) is taken as it is. `v1a`, by asymmetric keys,
/// is passed over.
///
/// An id with a `.` is not signed, since another message has the same signed
/// bytes. For the same reason one with what could be a time between its dots
/// is [malformed](Reason::Malformed): it may be the id and the time of another
/// message, whose body begins with a time and a `.`, read one piece further on.
#[derive(Clone, Debug)]
pub struct Standard {
    id: HeaderName,
    timestamp: HeaderName,
    signature: HeaderName,
    name: &'static str,
}

impl Standard {
    /// With the headers of the specification.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            id: HeaderName::from_static("webhook-id"),
            timestamp: HeaderName::from_static("webhook-timestamp"),
            signature: HeaderName::from_static("webhook-signature"),
            name: "standard",
        }
    }

    /// With svix's: `svix-id`, `svix-timestamp` and `svix-signature`.
    #[must_use]
    pub const fn svix() -> Self {
        Self {
            id: HeaderName::from_static("svix-id"),
            timestamp: HeaderName::from_static("svix-timestamp"),
            signature: HeaderName::from_static("svix-signature"),
            name: "svix",
        }
    }
}

impl Default for Standard {
    fn default() -> Self {
        Self::new()
    }
}

impl Scheme for Standard {
    fn name(&self) -> &'static str {
        self.name
    }

    fn key(&self, secret: &Secret) -> Result<Key, SecretError> {
        let decoded;
        let bytes = if secret.is_raw() {
            secret.expose()
        } else {
            let text = secret.expose();
            if text.starts_with(b"whsk_") || text.starts_with(b"whpk_") {
                return Err(SecretError::WrongKind);
            }
            let text = text.strip_prefix(b"whsec_").unwrap_or(text);
            decoded = Zeroizing::new(SECRETS.decode(text).map_err(|_| SecretError::NotBase64)?);
            &decoded
        };
        match bytes.len() {
            0 => Err(SecretError::Empty),
            length if length < SHORTEST => Err(SecretError::TooShort { least: SHORTEST }),
            length if length > LONGEST => Err(SecretError::TooLong),
            _ => Key::of_bytes(bytes, secret),
        }
    }

    fn most_keys(&self) -> usize {
        crate::MOST_SIGNATURES
    }

    fn signs_id(&self) -> bool {
        true
    }

    fn id_header(&self) -> Option<&HeaderName> {
        Some(&self.id)
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
        if !text::is_id(message.id) || has_dot(message.id) {
            return Err(SignError::Id);
        }
        let id = HeaderValue::from_str(message.id).map_err(|_| SignError::Id)?;
        let mut digits = itoa::Buffer::new();
        let timestamp = digits.format(message.timestamp);
        const ENTRY: usize = "v1,".len() + text::BASE64;
        let mut signatures = Vec::with_capacity((keys.len() * (ENTRY + 1)).saturating_sub(1));
        for key in keys {
            let signed: [&[u8]; 5] = [
                message.id.as_bytes(),
                b".",
                timestamp.as_bytes(),
                b".",
                message.body,
            ];
            if !signatures.is_empty() {
                signatures.push(b' ');
            }
            signatures.extend_from_slice(b"v1,");
            text::push_base64(&mut signatures, &key.tag(&signed));
        }
        let timestamp = text::header(timestamp.into());
        request.headers.insert(&self.id, id);
        request.headers.insert(&self.timestamp, timestamp);
        request
            .headers
            .insert(&self.signature, text::header(signatures));
        Ok(())
    }

    fn read<'r>(&self, request: Head<'r>) -> Result<Envelope<'r>, Reason> {
        let headers = request.headers;
        let id = text::single(headers, &self.id, Reason::MissingId)?;
        let timestamp = text::single(headers, &self.timestamp, Reason::MissingTimestamp)?;
        let signatures = text::single(headers, &self.signature, Reason::MissingSignature)?;
        if !text::is_id(id) || has_time(id) {
            return Err(Reason::Malformed);
        }
        let mut envelope = Envelope {
            id: Some(id),
            timestamp: Some(text::seconds(timestamp)?),
            before: [id.as_bytes(), b".", timestamp.as_bytes(), b"."],
            ..Envelope::new()
        };
        // One entry that cannot be read does not spoil the others.
        let mut nothing = Reason::MissingSignature;
        for entry in signatures.split_ascii_whitespace() {
            if let Some(text) = entry.strip_prefix("v1,") {
                match text::base64(text) {
                    Some(_) if envelope.is_full() => return Err(Reason::Malformed),
                    Some(tag) => envelope.tags.push(tag),
                    None => nothing = Reason::Malformed,
                }
            } else if !entry.contains(',') {
                nothing = Reason::Malformed;
            } else if nothing == Reason::MissingSignature {
                nothing = Reason::UnsupportedScheme;
            }
        }
        if envelope.is_empty() {
            return Err(nothing);
        }
        Ok(envelope)
    }
}

/// Whether the id may be that of another message with its time behind it: of ten
/// digits or more, as all are since 2001. Shorter numbers are ids of senders who
/// count.
fn has_time(id: &str) -> bool {
    let is_time =
        |piece: &str| piece.len() >= 10 && piece.bytes().all(|byte| byte.is_ascii_digit());
    // Nearly none has a dot.
    has_dot(id) && id.split('.').skip(1).any(is_time)
}

fn has_dot(id: &str) -> bool {
    text::has(id, |byte| byte == b'.')
}
