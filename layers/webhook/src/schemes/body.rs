//! Schemes that sign the body alone: they know neither an old message nor a
//! repeated one.

use buttress_core::Head;
use http::{HeaderName, request::Parts};

use crate::{Envelope, Key, Message, Reason, Scheme, SignError, text};

/// `X-Webhook-Signature: sha256=<hex>` over the body, with the secret's bytes
/// as key.
///
/// It is GitHub's under another header, and many senders' under one of their
/// own: [`header`](Self::header).
#[derive(Clone, Debug)]
pub struct Sha256 {
    header: HeaderName,
}

impl Sha256 {
    /// With the header `x-webhook-signature`.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            header: HeaderName::from_static("x-webhook-signature"),
        }
    }

    /// The same in another header.
    #[must_use]
    pub fn header(mut self, name: HeaderName) -> Self {
        self.header = name;
        self
    }
}

impl Default for Sha256 {
    fn default() -> Self {
        Self::new()
    }
}

impl Scheme for Sha256 {
    fn name(&self) -> &'static str {
        "sha256"
    }

    fn sign(
        &self,
        request: &mut Parts,
        message: &Message<'_>,
        keys: &[Key],
    ) -> Result<(), SignError> {
        sign_hex(&self.header, request, message, keys);
        Ok(())
    }

    fn read<'r>(&self, request: Head<'r>) -> Result<Envelope<'r>, Reason> {
        read_hex(&self.header, request)
    }
}

/// GitHub's `X-Hub-Signature-256: sha256=<hex>` over the body. The older
/// header with SHA-1 is not looked at, and `sha1=` in this one is refused.
///
/// Source: GitHub's "Validating webhook deliveries".
#[derive(Clone, Copy, Debug, Default)]
pub struct GitHub;

const GITHUB: HeaderName = HeaderName::from_static("x-hub-signature-256");

impl Scheme for GitHub {
    fn name(&self) -> &'static str {
        "github"
    }

    fn sign(
        &self,
        request: &mut Parts,
        message: &Message<'_>,
        keys: &[Key],
    ) -> Result<(), SignError> {
        sign_hex(&GITHUB, request, message, keys);
        Ok(())
    }

    fn read<'r>(&self, request: Head<'r>) -> Result<Envelope<'r>, Reason> {
        read_hex(&GITHUB, request)
    }
}

/// Shopify's `X-Shopify-Hmac-Sha256: <base64>` over the body, with the bytes of
/// the app's client secret as key.
///
/// After a rotation Shopify may sign with the old one for up to an hour: keep
/// both for so long.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shopify;

const SHOPIFY: HeaderName = HeaderName::from_static("x-shopify-hmac-sha256");

impl Scheme for Shopify {
    fn name(&self) -> &'static str {
        "shopify"
    }

    fn sign(
        &self,
        request: &mut Parts,
        message: &Message<'_>,
        keys: &[Key],
    ) -> Result<(), SignError> {
        if let Some(key) = keys.first() {
            let mut value = Vec::with_capacity(text::BASE64);
            text::push_base64(&mut value, &key.tag(&[message.body]));
            request.headers.insert(SHOPIFY, text::header(value));
        }
        Ok(())
    }

    fn read<'r>(&self, request: Head<'r>) -> Result<Envelope<'r>, Reason> {
        let value = text::single(request.headers, &SHOPIFY, Reason::MissingSignature)?;
        let tag = text::base64(value).ok_or(Reason::Malformed)?;
        Ok(Envelope::new().tag(tag))
    }
}

fn sign_hex(header: &HeaderName, request: &mut Parts, message: &Message<'_>, keys: &[Key]) {
    if let Some(key) = keys.first() {
        let value = text::hex_value("sha256=", &key.tag(&[message.body]));
        request.headers.insert(header, value);
    }
}

fn read_hex<'r>(header: &HeaderName, request: Head<'r>) -> Result<Envelope<'r>, Reason> {
    let value = text::single(request.headers, header, Reason::MissingSignature)?;
    let digits = text::of_algorithm(value, "sha256")?;
    let tag = text::hex(digits).ok_or(Reason::Malformed)?;
    Ok(Envelope::new().tag(tag))
}
