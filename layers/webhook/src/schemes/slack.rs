//! Slack's scheme.

use buttress_core::Head;
use http::{HeaderName, request::Parts};

use crate::{Envelope, Key, Message, Reason, Scheme, SignError, text};

const TIMESTAMP: HeaderName = HeaderName::from_static("x-slack-request-timestamp");
const SIGNATURE: HeaderName = HeaderName::from_static("x-slack-signature");

/// Slack's `X-Slack-Request-Timestamp` and `X-Slack-Signature: v0=<hex>` over
/// `v0:timestamp:body`, with the bytes of the signing secret as key.
///
/// Source: Slack's "Verifying requests from Slack".
#[derive(Clone, Copy, Debug, Default)]
pub struct Slack;

impl Scheme for Slack {
    fn name(&self) -> &'static str {
        "slack"
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
        if let Some(key) = keys.first() {
            let mut digits = itoa::Buffer::new();
            let timestamp = digits.format(message.timestamp).as_bytes();
            let tag = key.tag(&[b"v0:", timestamp, b":", message.body]);
            let signature = text::hex_value("v0=", &tag);
            let timestamp = text::header(timestamp.to_vec());
            request.headers.insert(TIMESTAMP, timestamp);
            request.headers.insert(SIGNATURE, signature);
        }
        Ok(())
    }

    fn read<'r>(&self, request: Head<'r>) -> Result<Envelope<'r>, Reason> {
        let timestamp = text::single(request.headers, &TIMESTAMP, Reason::MissingTimestamp)?;
        let value = text::single(request.headers, &SIGNATURE, Reason::MissingSignature)?;
        let digits = text::of_algorithm(value, "v0")?;
        let tag = text::hex(digits).ok_or(Reason::Malformed)?;
        Ok(Envelope::new()
            .tag(tag)
            .timestamp(text::seconds(timestamp)?)
            .signed_before([b"v0:", timestamp.as_bytes(), b":", b""]))
    }
}
