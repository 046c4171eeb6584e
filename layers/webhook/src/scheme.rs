//! What a way of signing decides, and nothing else: where in a request its
//! signature stands, and which bytes it is of.

use std::{fmt, sync::Arc};

use buttress_core::Head;
use http::{HeaderName, request::Parts};

use crate::{Key, Secret, SecretError, SignError, Tag};

/// How many signatures of one request are looked at: a rotation has two or
/// three, and whoever sends more makes this end compute.
pub const MOST_SIGNATURES: usize = 16;
/// How long an id may be, in bytes: it is kept for as long as a replay could
/// come.
pub const LONGEST_ID: usize = 256;

/// A way of signing: [`Sha256`](crate::Sha256), [`Standard`](crate::Standard),
/// [`Stripe`](crate::Stripe) and the others, or your own.
///
/// It computes no MAC and compares none: it says which bytes are signed, and
/// finds what is claimed of them. Time, secrets and the comparison, in constant
/// time, are the same for all.
///
/// ```
/// use buttress_core::Head;
/// use buttress_webhook::{Envelope, Key, Message, Reason, Scheme, SignError, Tag};
/// use http::{HeaderValue, request::Parts};
///
/// /// `x-acme-mac: <hex>` over the body.
/// #[derive(Debug)]
/// struct Acme;
///
/// impl Scheme for Acme {
///     fn name(&self) -> &'static str {
///         "acme"
///     }
///
///     fn sign(
///         &self,
///         request: &mut Parts,
///         message: &Message<'_>,
///         keys: &[Key],
///     ) -> Result<(), SignError> {
///         let tag = keys[0].tag(&[message.body]);
///         let value = const_hex::encode(tag.as_bytes());
///         let value = HeaderValue::try_from(value).expect("it is ASCII");
///         request.headers.insert("x-acme-mac", value);
///         Ok(())
///     }
///
///     fn read<'r>(&self, request: Head<'r>) -> Result<Envelope<'r>, Reason> {
///         let mut values = request.headers.get_all("x-acme-mac").iter();
///         let value = values.next().ok_or(Reason::MissingSignature)?;
///         if values.next().is_some() {
///             return Err(Reason::DuplicateHeader);
///         }
///         match const_hex::decode_to_array(value) {
///             Ok(tag) => Ok(Envelope::new().tag(Tag::new(tag))),
///             Err(_) => Err(Reason::Malformed),
///         }
///     }
/// }
/// ```
pub trait Scheme: fmt::Debug + Send + Sync + 'static {
    /// Its name: a label in metrics and logs.
    fn name(&self) -> &'static str;

    /// Reads a secret as this scheme writes it down. Default: its bytes are the
    /// key's.
    ///
    /// # Errors
    ///
    /// If this scheme has no such secrets.
    fn key(&self, secret: &Secret) -> Result<Key, SecretError> {
        Key::of(secret)
    }

    /// How many keys can sign one message. Default: 1, for a scheme whose
    /// header has room for one signature.
    fn most_keys(&self) -> usize {
        1
    }

    /// Whether the message's id is among the signed bytes, so that a repeat is
    /// known by it. Default: no.
    fn signs_id(&self) -> bool {
        false
    }

    /// The header that the message's id stands in, where the scheme has one for
    /// it: what is there already is signed. Default: none.
    fn id_header(&self) -> Option<&HeaderName> {
        None
    }

    /// Whether a time is among the signed bytes, so that an old message is
    /// known by it. Default: no.
    fn signs_time(&self) -> bool {
        false
    }

    /// Writes the signature into the request's headers, in the place of one
    /// that may be there. There are 1 to [`most_keys`](Self::most_keys) keys.
    ///
    /// # Errors
    ///
    /// If the message cannot be signed; the request is then as it was.
    fn sign(
        &self,
        request: &mut Parts,
        message: &Message<'_>,
        keys: &[Key],
    ) -> Result<(), SignError>;

    /// What the request claims. Nothing of it is believed yet.
    ///
    /// # Errors
    ///
    /// If it is not signed in this way, or not clearly.
    fn read<'r>(&self, request: Head<'r>) -> Result<Envelope<'r>, Reason>;
}

/// What is to be signed.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// The message's id: the same for each attempt to deliver it. May be empty
    /// where no scheme of the signer [signs it](Scheme::signs_id).
    pub id: &'a str,
    /// The time of this attempt, in seconds since the Unix epoch.
    pub timestamp: u64,
    /// The very bytes of the body.
    pub body: &'a [u8],
}

/// What a request claims of itself: see [`Scheme::read`].
#[derive(Clone, Debug)]
pub struct Envelope<'r> {
    pub(crate) id: Option<&'r str>,
    pub(crate) timestamp: Option<u64>,
    pub(crate) expires: Option<u64>,
    pub(crate) before: [&'r [u8]; 4],
    pub(crate) tags: Tags,
    pub(crate) statements: Vec<Statement>,
}

impl<'r> Envelope<'r> {
    /// One whose signature is of the body alone.
    #[must_use]
    #[inline]
    pub const fn new() -> Self {
        Self {
            id: None,
            timestamp: None,
            expires: None,
            before: [&[]; 4],
            tags: Tags::new(),
            statements: Vec::new(),
        }
    }

    /// The message's id, which is signed: it is among the bytes
    /// [before](Self::signed_before) the body.
    #[must_use]
    #[inline]
    pub const fn id(mut self, id: &'r str) -> Self {
        self.id = Some(id);
        self
    }

    /// The time of signing in seconds since the Unix epoch, which is signed.
    #[must_use]
    #[inline]
    pub const fn timestamp(mut self, timestamp: u64) -> Self {
        self.timestamp = Some(timestamp);
        self
    }

    /// The time, in seconds since the Unix epoch, from which the signature is
    /// worth nothing, which is signed.
    #[must_use]
    #[inline]
    pub const fn expires(mut self, expires: u64) -> Self {
        self.expires = Some(expires);
        self
    }

    /// What is signed before the body, as it stands in the request.
    #[must_use]
    #[inline]
    pub const fn signed_before(mut self, pieces: [&'r [u8]; 4]) -> Self {
        self.before = pieces;
        self
    }

    /// One more signature: one that is right is enough. Those beyond
    /// [`MOST_SIGNATURES`] are why [`is_full`](Self::is_full) is to be asked
    /// before.
    #[must_use]
    #[inline]
    pub fn tag(mut self, tag: Tag) -> Self {
        if !self.is_full() {
            self.tags.push(tag);
        }
        self
    }

    /// One more signature, of bytes of its own in the place of the body, with
    /// an id and times of its own. It counts as a [tag](Self::tag) does.
    #[must_use]
    #[inline]
    pub fn statement(mut self, statement: Statement) -> Self {
        if !self.is_full() {
            self.statements.push(statement);
        }
        self
    }

    /// Whether there is no room for another signature: such a request is
    /// [malformed](Reason::Malformed).
    #[must_use]
    #[inline]
    pub const fn is_full(&self) -> bool {
        self.tags.count() + self.statements.len() >= MOST_SIGNATURES
    }

    /// Whether there is no signature yet.
    #[must_use]
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.tags.is_empty() && self.statements.is_empty()
    }
}

impl Default for Envelope<'_> {
    fn default() -> Self {
        Self::new()
    }
}

/// A signature that is of other bytes than those beside it, which may be of
/// other senders: see [`Envelope::statement`].
#[derive(Clone, Debug)]
pub struct Statement {
    pub(crate) tag: Tag,
    pub(crate) base: Vec<u8>,
    pub(crate) known_by: Option<Vec<u8>>,
    pub(crate) sha256_of_body: Option<[u8; 32]>,
    pub(crate) timestamp: Option<u64>,
    pub(crate) expires: Option<u64>,
    pub(crate) id: Option<Arc<str>>,
    pub(crate) key_id: Option<Box<str>>,
}

impl Statement {
    /// That `tag` is the MAC of `base`. It says nothing of the body yet.
    #[must_use]
    pub const fn new(tag: Tag, base: Vec<u8>) -> Self {
        Self {
            tag,
            base,
            known_by: None,
            sha256_of_body: None,
            timestamp: None,
            expires: None,
            id: None,
            key_id: None,
        }
    }

    /// What of the signed bytes a repeat of the message is known by, beside the
    /// id and the time of signing: what all signatures of one message have in common, so
    /// that one that leaves out some of them is known. Default: all of the
    /// base.
    #[must_use]
    pub fn known_by(mut self, bytes: Vec<u8>) -> Self {
        self.known_by = Some(bytes);
        self
    }

    /// The SHA-256 of the body, which is among what is signed.
    #[must_use]
    pub const fn sha256_of_body(mut self, digest: [u8; 32]) -> Self {
        self.sha256_of_body = Some(digest);
        self
    }

    /// As [`Envelope::timestamp`], of this signature alone.
    #[must_use]
    pub const fn timestamp(mut self, timestamp: u64) -> Self {
        self.timestamp = Some(timestamp);
        self
    }

    /// As [`Envelope::expires`], of this signature alone.
    #[must_use]
    pub const fn expires(mut self, expires: u64) -> Self {
        self.expires = Some(expires);
        self
    }

    /// As [`Envelope::id`], of this signature alone.
    #[must_use]
    pub fn id(mut self, id: impl Into<Arc<str>>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// The name of the key that it is said to be by. A secret of [another
    /// name](Secret::with_id) is not that key; one without a name may be.
    #[must_use]
    pub fn key_id(mut self, key_id: impl Into<Box<str>>) -> Self {
        self.key_id = Some(key_id.into());
        self
    }
}

/// Some signatures: without an allocation where there is one, as nearly always.
#[derive(Clone, Debug)]
pub(crate) struct Tags {
    first: Option<Tag>,
    more: Vec<Tag>,
}

impl Tags {
    const fn new() -> Self {
        Self {
            first: None,
            more: Vec::new(),
        }
    }

    #[inline]
    pub(crate) fn push(&mut self, tag: Tag) {
        match self.first {
            None => self.first = Some(tag),
            Some(_) => self.more.push(tag),
        }
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::new();
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    const fn count(&self) -> usize {
        match self.first {
            None => 0,
            Some(_) => 1 + self.more.len(),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Tag> {
        self.first.iter().chain(&self.more)
    }
}

/// Why a request is not believed: a class, that tells who sends rightly what
/// to mend, and a forger nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// There is no id.
    MissingId,
    /// There is no time.
    MissingTimestamp,
    /// There is no signature.
    MissingSignature,
    /// There is no digest of the body.
    MissingDigest,
    /// Something of it cannot be read, or is too much.
    Malformed,
    /// No signature is that of this message by a secret of ours.
    SignatureMismatch,
    /// It was signed longer ago than is tolerated, or has expired.
    TimestampTooOld,
    /// It was signed further in the future than is tolerated.
    TimestampTooNew,
    /// It is signed, but by no algorithm or version that is accepted here.
    UnsupportedScheme,
    /// Something stands twice that may stand once.
    DuplicateHeader,
    /// The signature leaves out something that must be signed.
    CoverageMissing,
}

impl Reason {
    /// A word for programs: the `reason` of the answer, and a label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MissingId => "missing_id",
            Self::MissingTimestamp => "missing_timestamp",
            Self::MissingSignature => "missing_signature",
            Self::MissingDigest => "missing_digest",
            Self::Malformed => "malformed",
            Self::SignatureMismatch => "signature_mismatch",
            Self::TimestampTooOld => "timestamp_too_old",
            Self::TimestampTooNew => "timestamp_too_new",
            Self::UnsupportedScheme => "unsupported_scheme",
            Self::DuplicateHeader => "duplicate_header",
            Self::CoverageMissing => "coverage_missing",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MissingId => "the message has no id",
            Self::MissingTimestamp => "the message has no timestamp",
            Self::MissingSignature => "the message is not signed",
            Self::MissingDigest => "the message has no digest of its body",
            Self::Malformed => "the signature's headers cannot be read",
            Self::SignatureMismatch => "no signature matches the message",
            Self::TimestampTooOld => "the message was signed too long ago",
            Self::TimestampTooNew => "the message was signed in the future",
            Self::UnsupportedScheme => "the message is signed in a way that is not accepted here",
            Self::DuplicateHeader => "a header of the signature stands twice",
            Self::CoverageMissing => "the signature does not cover what it must",
        })
    }
}

impl std::error::Error for Reason {}

impl<S: Scheme + ?Sized> Scheme for Box<S> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn key(&self, secret: &Secret) -> Result<Key, SecretError> {
        (**self).key(secret)
    }

    fn most_keys(&self) -> usize {
        (**self).most_keys()
    }

    fn signs_id(&self) -> bool {
        (**self).signs_id()
    }

    fn id_header(&self) -> Option<&HeaderName> {
        (**self).id_header()
    }

    fn signs_time(&self) -> bool {
        (**self).signs_time()
    }

    fn sign(
        &self,
        request: &mut Parts,
        message: &Message<'_>,
        keys: &[Key],
    ) -> Result<(), SignError> {
        (**self).sign(request, message, keys)
    }

    fn read<'r>(&self, request: Head<'r>) -> Result<Envelope<'r>, Reason> {
        (**self).read(request)
    }
}
