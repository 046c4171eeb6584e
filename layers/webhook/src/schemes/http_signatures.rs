//! HTTP message signatures.

mod component;
mod fields;

use std::{error, fmt, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use buttress_core::Head;
use http::{
    HeaderMap, HeaderName, HeaderValue,
    request::Parts,
    uri::{Authority, Scheme as UriScheme},
};
use sfv::{BareItemFromInput, Integer, KeyRef, ListSerializer, StringRef};

pub use self::component::Component;
use self::{
    component::{CONTENT_DIGEST, End, Target},
    fields::{Item, Member, Value},
};
use crate::{
    Envelope, Key, MOST_SIGNATURES, Message, Reason, Scheme, SignError, Statement, TAG, Tag,
    mac::sha256, text,
};

const SIGNATURE: HeaderName = HeaderName::from_static("signature");
const SIGNATURE_INPUT: HeaderName = HeaderName::from_static("signature-input");
const ALGORITHM: &str = "hmac-sha256";
/// How much of a request is put together to be compared, for all signatures:
/// each of them may be of every header.
const LONGEST: usize = 64 * 1024;
/// The largest integer of structured fields.
const LARGEST: u64 = 999_999_999_999_999;

/// HTTP message signatures (RFC 9421) by `hmac-sha256`, over the body's digest
/// (RFC 9530), the method, and where the request goes.
///
/// ```text
/// Content-Digest: sha-256=:…:
/// Signature-Input: webhook=("@method" "@authority" "@path" "@query" "content-digest");created=1700000000;keyid="k1";alg="hmac-sha256"
/// Signature: webhook=:…:
/// ```
///
/// The same components are signed and demanded: a signature that leaves out one
/// of them counts for nothing, one that covers more is as good. `keyid` is the
/// secret's [name](crate::Secret::with_id); where it and a secret both have one, they
/// must be the same. Each secret gives a signature of its own: `webhook`,
/// `webhook-2` and so on. Signatures under other labels are kept.
///
/// Where the request goes is not the same at both ends if a proxy stands
/// between: [`scheme`](Self::scheme) and [`authority`](Self::authority) say
/// what the other end sees.
///
/// What is read is read strictly: a label, a component or a parameter that
/// stands twice is refused, and so is a component with a parameter (`;req`,
/// `;sf`, `;bs`, `;key`, `;tr`) or of another kind than [`Component`] has:
/// [`UnsupportedScheme`](Reason::UnsupportedScheme). Labels say nothing, as RFC
/// 9421 §3.2 has it; of several signatures, one that is right is enough. Of the
/// digests `sha-256` must be there; others are passed over.
///
/// Without [a nonce](Self::id_as_nonce) a repeat is known by the components that
/// are demanded and the time of signing, whatever else is covered. So a sender
/// whose signatures of one message are of different seconds has sent as many
/// messages: have it sign a nonce.
///
/// ```
/// use buttress_webhook::{HttpSignatures, Message, Secret, Signer, Verifier};
/// use http::Request;
/// use std::time::Duration;
///
/// let secret = Secret::new("correct horse battery staple")?.with_id("k1")?;
/// let signer = Signer::new(HttpSignatures::new(), [secret.clone()])?;
/// let (mut request, ()) = Request::post("https://example.com/hooks").body(())?.into_parts();
/// let message = Message { id: "", timestamp: 1_700_000_000, body: b"{}" };
/// signer.sign(&mut request, &message)?;
///
/// let verifier = Verifier::new(HttpSignatures::new(), [secret])?;
/// let now = Duration::from_secs(1_700_000_001);
/// assert!(verifier.verify((&request).into(), b"{}", now).is_ok());
/// assert!(verifier.verify((&request).into(), b"{ }", now).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct HttpSignatures {
    label: Box<str>,
    components: Vec<Component>,
    lifetime: Option<Duration>,
    id_as_nonce: bool,
    tag: Option<Box<str>>,
    scheme: Option<UriScheme>,
    authority: Option<Authority>,
}

impl HttpSignatures {
    /// Over `@method`, `@authority`, `@path`, `@query` and `content-digest`.
    #[must_use]
    pub fn new() -> Self {
        Self {
            label: "webhook".into(),
            components: vec![
                Component::Method,
                Component::Authority,
                Component::Path,
                Component::Query,
                Component::content_digest(),
            ],
            lifetime: None,
            id_as_nonce: false,
            tag: None,
            scheme: None,
            authority: None,
        }
    }

    /// Over this header field, too. A request without it is neither signed nor
    /// believed.
    #[must_use]
    pub fn field(mut self, name: HeaderName) -> Self {
        self.cover(Component::Field(name));
        self
    }

    /// Over these components and nothing else.
    ///
    /// Without [`content_digest`](Component::content_digest) the body is not
    /// signed, and whoever can change it on its way, may. What is left out can
    /// be made up, too.
    #[must_use]
    pub fn components(mut self, components: impl IntoIterator<Item = Component>) -> Self {
        self.components.clear();
        for component in components {
            self.cover(component);
        }
        self
    }

    /// The label of the signature. Default `webhook`.
    ///
    /// # Errors
    ///
    /// Unless it is a key of structured fields: a small letter or `*`, and then
    /// small letters, digits, `_`, `-`, `.` and `*`.
    pub fn label(mut self, label: &str) -> Result<Self, ParameterError> {
        KeyRef::from_str(label).map_err(|_| ParameterError(()))?;
        self.label = label.into();
        Ok(self)
    }

    /// A `tag`, which says what the signature is for. Signatures with another
    /// or none are passed over. Default: none is written, and any is taken.
    ///
    /// # Errors
    ///
    /// Unless it is printable ASCII.
    pub fn tag(mut self, tag: &str) -> Result<Self, ParameterError> {
        StringRef::from_str(tag).map_err(|_| ParameterError(()))?;
        self.tag = Some(tag.into());
        Ok(self)
    }

    /// Signs when the signature is worth nothing any more: so many seconds
    /// after it was made. That is heeded of every signature. Default: it says
    /// nothing, and the verifier's tolerance holds.
    #[must_use]
    pub const fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = Some(lifetime);
        self
    }

    /// Signs the message's id as `nonce`, and demands one, which is then the
    /// message's id: so a repeat is known by it, and each attempt is a repeat
    /// of the first. Default: no nonce, and a repeat is known by what is
    /// signed.
    #[must_use]
    pub const fn id_as_nonce(mut self) -> Self {
        self.id_as_nonce = true;
        self
    }

    /// The scheme that the sender's URI has. It decides which port is left out
    /// of the authority. Default: the request's, where its target has one; else
    /// `https`.
    #[must_use]
    pub fn scheme(mut self, scheme: UriScheme) -> Self {
        self.scheme = Some(scheme);
        self
    }

    /// The authority that the sender's URI has. Default: the request's, of its
    /// target or `Host`.
    #[must_use]
    pub fn authority(mut self, authority: Authority) -> Self {
        self.authority = Some(authority);
        self
    }

    fn cover(&mut self, component: Component) {
        if !self.components.contains(&component) {
            self.components.push(component);
        }
    }

    fn covers_body(&self) -> bool {
        self.components.contains(&Component::content_digest())
    }

    fn target<'a>(&'a self, request: Head<'a>, end: End<'a>) -> Target<'a> {
        Target {
            request,
            scheme: self.scheme.as_ref(),
            authority: self.authority.as_ref(),
            end,
        }
    }

    /// The list of components and the parameters, as they are signed.
    fn parameters(&self, message: &Message<'_>, key: &Key) -> String {
        let created = message.timestamp.min(LARGEST);
        let mut text = String::with_capacity(160);
        let mut list = ListSerializer::with_buffer(&mut text);
        let mut inner = list.inner_list();
        for component in &self.components {
            let _ = inner.bare_item(string(component.name()));
        }
        let mut parameters = inner.finish().parameter(name("created"), integer(created));
        if let Some(id) = key.id() {
            parameters = parameters.parameter(name("keyid"), string(id));
        }
        parameters = parameters.parameter(name("alg"), string(ALGORITHM));
        if let Some(lifetime) = self.lifetime {
            let expires = created.saturating_add(lifetime.as_secs()).min(LARGEST);
            parameters = parameters.parameter(name("expires"), integer(expires));
        }
        if self.id_as_nonce {
            parameters = parameters.parameter(name("nonce"), string(message.id));
        }
        if let Some(tag) = &self.tag {
            parameters = parameters.parameter(name("tag"), string(tag));
        }
        let _ = parameters.finish();
        text
    }

    /// What one label claims; nothing if it is none of ours.
    fn statement(
        &self,
        input: &Member<'_>,
        signatures: &[Member<'_>],
        target: &Target<'_>,
        digest: &mut Option<Result<[u8; TAG], Reason>>,
        length: &mut usize,
    ) -> Result<Option<Statement>, Reason> {
        let parameters = &input.parameters;
        if self.tag.is_some() && self.tag.as_deref() != text_of(parameters.get("tag")) {
            return Ok(None);
        }
        let Value::List(items) = &input.value else {
            return Err(Reason::Malformed);
        };
        let components = components(items)?;
        let algorithm = parameters.get("alg");
        if algorithm.is_some() && text_of(algorithm) != Some(ALGORITHM) {
            return Err(Reason::UnsupportedScheme);
        }
        let created = parameters.get("created").ok_or(Reason::MissingTimestamp)?;
        let created = u64::try_from(number(created)?).map_err(|_| Reason::Malformed)?;
        let is_missing = |component| !components.contains(component);
        if self.components.iter().any(is_missing) {
            return Err(Reason::CoverageMissing);
        }
        let signature = signatures.iter().find(|member| member.key == input.key);
        let signature = signature.ok_or(Reason::MissingSignature)?;
        let tag = Tag::new(bytes(&signature.value)?);

        let mut base = Vec::with_capacity(512);
        let mut covered_digest = None;
        for component in &components {
            if *component == Component::content_digest() {
                let headers = target.request.headers;
                let digest = digest.get_or_insert_with(|| sha256_claimed(headers));
                covered_digest = Some((*digest)?);
            }
            let before = base.len();
            let pushed = push_line(target, component, &mut base);
            // Of what comes to nothing, too.
            *length += base.len() - before;
            if *length > LONGEST {
                return Err(Reason::Malformed);
            }
            pushed.map_err(|error| match error {
                // As if it had been changed.
                SignError::Field => Reason::SignatureMismatch,
                _ => Reason::Malformed,
            })?;
        }
        // What any signature of the message must be of, in one order: another
        // one that is good may be of more, or name another key.
        let mut known_by = Vec::with_capacity(base.len());
        for component in &self.components {
            push_line(target, component, &mut known_by).map_err(|_| Reason::Malformed)?;
        }
        let nonce = text_of(parameters.get("nonce"));
        known_by.extend(nonce.unwrap_or_default().bytes());
        base.extend(PARAMETERS);
        base.extend(fields::canonical(items, parameters).bytes());

        let mut statement = Statement::new(tag, base)
            .known_by(known_by)
            .timestamp(created);
        if let Some(digest) = covered_digest {
            statement = statement.sha256_of_body(digest);
        }
        if let Some(expires) = parameters.get("expires") {
            statement = statement.expires(u64::try_from(number(expires)?).unwrap_or(0));
        }
        if let Some(key_id) = parameters.get("keyid") {
            statement = statement.key_id(text_of(Some(key_id)).ok_or(Reason::Malformed)?);
        }
        if self.id_as_nonce {
            let _ = parameters.get("nonce").ok_or(Reason::MissingId)?;
            let id = nonce.filter(|id| text::is_id(id));
            statement = statement.id(id.ok_or(Reason::Malformed)?);
        }
        Ok(Some(statement))
    }
}

impl Default for HttpSignatures {
    fn default() -> Self {
        Self::new()
    }
}

impl Scheme for HttpSignatures {
    fn name(&self) -> &'static str {
        "http_signatures"
    }

    fn most_keys(&self) -> usize {
        MOST_SIGNATURES
    }

    fn signs_id(&self) -> bool {
        self.id_as_nonce
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
        if self.id_as_nonce && !text::is_id(message.id) {
            return Err(SignError::Id);
        }
        let digest = match self.covers_body() {
            true => Some(content_digest(&request.headers, message.body)),
            false => None,
        };
        let target = self.target(Head::from(&*request), End::Sender(digest.as_ref()));
        let mut lines = Vec::with_capacity(512);
        for component in &self.components {
            push_line(&target, component, &mut lines)?;
        }

        let label = |at: usize| match at {
            0 => String::from(&*self.label),
            at => format!("{}-{}", self.label, at + 1),
        };
        let ours: Vec<String> = (0..keys.len()).map(label).collect();
        let goes = |key: &str| ours.iter().any(|label| label == key);
        let mut inputs = fields::others(&request.headers, &SIGNATURE_INPUT, goes);
        let mut signatures = fields::others(&request.headers, &SIGNATURE, goes);
        for (label, key) in ours.iter().zip(keys) {
            let parameters = self.parameters(message, key);
            let tag = key.tag(&[&lines, PARAMETERS, parameters.as_bytes()]);
            push_member(&mut inputs, label, |to| to.push_str(&parameters));
            push_member(&mut signatures, label, |to| {
                to.push(':');
                BASE64_STANDARD.encode_string(tag.as_bytes(), to);
                to.push(':');
            });
        }
        if let Some(digest) = digest {
            request.headers.insert(CONTENT_DIGEST, digest);
        }
        let inputs = text::header(inputs.into());
        request.headers.insert(SIGNATURE_INPUT, inputs);
        let signatures = text::header(signatures.into());
        request.headers.insert(SIGNATURE, signatures);
        Ok(())
    }

    fn read<'r>(&self, request: Head<'r>) -> Result<Envelope<'r>, Reason> {
        let missing = Reason::MissingSignature;
        let inputs = fields::read(request.headers, &SIGNATURE_INPUT, missing)?;
        let signatures = fields::read(request.headers, &SIGNATURE, missing)?;
        let target = self.target(request, End::Receiver);
        let mut envelope = Envelope::new();
        let mut digest = None;
        let mut length = 0;
        // One that cannot be read does not spoil the others.
        let mut nothing = None;
        for input in &inputs {
            let read = self.statement(input, &signatures, &target, &mut digest, &mut length);
            if length > LONGEST {
                return Err(Reason::Malformed);
            }
            match read {
                Ok(Some(statement)) => {
                    if envelope.is_full() {
                        return Err(Reason::Malformed);
                    }
                    envelope = envelope.statement(statement);
                }
                Ok(None) => {}
                Err(reason) => nothing = nothing.or(Some(reason)),
            }
        }
        if envelope.is_empty() {
            return Err(nothing.unwrap_or(missing));
        }
        Ok(envelope)
    }
}

/// What stands before the last line of what is signed.
const PARAMETERS: &[u8] = b"\"@signature-params\": ";

fn push_line(
    target: &Target<'_>,
    component: &Component,
    to: &mut Vec<u8>,
) -> Result<(), SignError> {
    to.push(b'"');
    to.extend(component.name().bytes());
    to.extend(b"\": ");
    target.write(component, to)?;
    to.push(b'\n');
    Ok(())
}

fn push_member(to: &mut String, label: &str, value: impl FnOnce(&mut String)) {
    if !to.is_empty() {
        to.push_str(", ");
    }
    to.push_str(label);
    to.push('=');
    value(to);
}

/// The components of a list, each of which stands there once.
fn components(items: &[Item<'_>]) -> Result<Vec<Component>, Reason> {
    let mut components = Vec::with_capacity(items.len());
    for item in items {
        let name = text_of(Some(&item.value)).ok_or(Reason::Malformed)?;
        if !item.parameters.is_empty() {
            return Err(Reason::UnsupportedScheme);
        }
        let component = Component::named(name)?;
        if components.contains(&component) {
            return Err(Reason::DuplicateHeader);
        }
        components.push(component);
    }
    Ok(components)
}

/// The digest that is there, if it is right: it may be among what others have
/// signed.
fn content_digest(headers: &HeaderMap, body: &[u8]) -> HeaderValue {
    let digest = sha256(&[body]);
    let mut there = headers.get_all(CONTENT_DIGEST).iter();
    if let (Some(only), None) = (there.next(), there.next())
        && sha256_claimed(headers) == Ok(digest)
    {
        return only.clone();
    }
    let mut value = String::with_capacity(10 + 44);
    value.push_str("sha-256=:");
    BASE64_STANDARD.encode_string(digest, &mut value);
    value.push(':');
    text::header(value.into())
}

fn sha256_claimed(headers: &HeaderMap) -> Result<[u8; TAG], Reason> {
    let digests = fields::read(headers, &CONTENT_DIGEST, Reason::MissingDigest)?;
    let digest = digests.iter().find(|it| it.key.as_str() == "sha-256");
    bytes(&digest.ok_or(Reason::UnsupportedScheme)?.value)
}

fn bytes(value: &Value<'_>) -> Result<[u8; TAG], Reason> {
    match value {
        Value::Item(BareItemFromInput::ByteSequence(bytes)) => {
            bytes[..].try_into().map_err(|_| Reason::Malformed)
        }
        _ => Err(Reason::Malformed),
    }
}

fn text_of<'a>(item: Option<&'a BareItemFromInput<'_>>) -> Option<&'a str> {
    match item {
        Some(BareItemFromInput::String(text)) => Some(text.as_str()),
        _ => None,
    }
}

fn number(item: &BareItemFromInput<'_>) -> Result<i64, Reason> {
    match item {
        BareItemFromInput::Integer(number) => Ok(i64::from(*number)),
        _ => Err(Reason::Malformed),
    }
}

fn name(name: &'static str) -> &'static KeyRef {
    KeyRef::from_str(name).expect("it is a key")
}

/// Of what was checked to be one, or is a header's name.
fn string(text: &str) -> &StringRef {
    StringRef::from_str(text).expect("it is printable ASCII")
}

fn integer(number: u64) -> Integer {
    Integer::try_from(number).expect("it is no larger than the largest")
}

/// A label or tag that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterError(());

impl fmt::Display for ParameterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a label must be a key of structured fields, and a tag printable ASCII")
    }
}

impl error::Error for ParameterError {}
