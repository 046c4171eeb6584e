//! HMAC-SHA-256 (RFC 2104, FIPS 180-4) with the key's schedule kept.

#[cfg(feature = "aws-lc-rs")]
mod aws_lc;
#[cfg(any(test, not(feature = "aws-lc-rs")))]
mod rust_crypto;

use std::{fmt, sync::Arc};

use subtle::{Choice, ConstantTimeEq};
use zeroize::Zeroize;

#[cfg(feature = "aws-lc-rs")]
use self::aws_lc as backend;
#[cfg(not(feature = "aws-lc-rs"))]
use self::rust_crypto as backend;
use crate::{Secret, SecretError};

pub(crate) use self::backend::sha256;

/// The bytes of an HMAC-SHA-256.
pub const TAG: usize = 32;

/// A key with its schedule computed, so that a call pays only for its message.
///
/// Cheap to clone, wiped with the last clone, and never shown. Computed by
/// `hmac` and `sha2`, or by AWS-LC with the feature `aws-lc-rs`: the same
/// result.
#[derive(Clone)]
pub struct Key {
    start: Arc<backend::Start>,
    id: Option<Arc<str>>,
}

impl Key {
    /// The key of these bytes. Longer ones than 64 are hashed first, as RFC
    /// 2104 says.
    ///
    /// # Errors
    ///
    /// If there are none: anyone could forge.
    pub fn new(bytes: &[u8]) -> Result<Self, SecretError> {
        if bytes.is_empty() {
            return Err(SecretError::Empty);
        }
        Ok(Self {
            start: Arc::new(backend::Start::new(bytes)),
            id: None,
        })
    }

    /// The key of a secret's bytes, under its name.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn of(secret: &Secret) -> Result<Self, SecretError> {
        Self::of_bytes(secret.expose(), secret)
    }

    /// The key of what a scheme has read from a secret, under its name.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn of_bytes(bytes: &[u8], secret: &Secret) -> Result<Self, SecretError> {
        let mut key = Self::new(bytes)?;
        key.id = secret.shared_id();
        Ok(key)
    }

    /// The name of its secret.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// The MAC of these pieces, one after the other.
    #[must_use]
    pub fn tag(&self, pieces: &[&[u8]]) -> Tag {
        Tag(self.start.tag(pieces))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// A MAC: one that was computed, or one that somebody claims.
///
/// Compared in constant time. What was computed is what a forger wants to
/// know, so it is never shown.
#[derive(Clone, Copy)]
pub struct Tag(pub(crate) [u8; TAG]);

impl Tag {
    /// A claimed MAC.
    #[must_use]
    pub const fn new(bytes: [u8; TAG]) -> Self {
        Self(bytes)
    }

    /// Its bytes, to be written into a signature.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; TAG] {
        &self.0
    }
}

impl ConstantTimeEq for Tag {
    /// By words, of which the barrier against a clever compiler costs a quarter
    /// of what it does by bytes.
    #[inline]
    fn ct_eq(&self, other: &Self) -> Choice {
        let words = |tag: &Self| {
            let (words, _) = tag.0.as_chunks::<8>();
            [0, 1, 2, 3].map(|at: usize| u64::from_ne_bytes(words[at]))
        };
        let differences = words(self).into_iter().zip(words(other));
        let difference = differences.fold(0, |all, (ours, theirs)| all | (ours ^ theirs));
        difference.ct_eq(&0)
    }
}

impl PartialEq for Tag {
    fn eq(&self, other: &Self) -> bool {
        self.ct_eq(other).into()
    }
}

impl Eq for Tag {}

impl Zeroize for Tag {
    fn zeroize(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tag(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, test cases 1, 2, 6 and 7.
    #[test]
    fn it_is_the_hmac_of_the_rfc() {
        let cases: [(&[u8], &[u8], &str); 4] = [
            (
                &[0x0b; 20],
                b"Hi There",
                "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
            ),
            (
                b"Jefe",
                b"what do ya want for nothing?",
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
            (
                &[0xaa; 131],
                b"Test Using Larger Than Block-Size Key - Hash Key First",
                "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
            ),
            (
                &[0xaa; 131],
                b"This is a test using a larger than block-size key and a larger than block-size data. The key needs to be hashed before being used by the HMAC algorithm.",
                "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2",
            ),
        ];
        for (key, message, expected) in cases {
            let key = Key::new(key).unwrap();
            assert_eq!(const_hex::encode(key.tag(&[message]).as_bytes()), expected);
            let (start, end) = message.split_at(message.len() / 3);
            assert_eq!(key.tag(&[start, b"", end]), key.tag(&[message]));
        }
    }

    #[test]
    fn there_is_no_empty_key_and_none_is_shown() {
        assert!(matches!(Key::new(b""), Err(SecretError::Empty)));
        let key = Key::new(b"correct horse").unwrap();
        let shown = format!("{key:?} {:?}", key.tag(&[b"x"]));
        assert_eq!(shown, "Key { id: None, .. } Tag(***)");
    }

    /// FIPS 180-4's own examples.
    #[test]
    fn it_is_the_hash_of_the_standard() {
        let cases: [(&[u8], &str); 2] = [
            (
                b"",
                "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            ),
            (
                b"abc",
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
        ];
        for (message, expected) in cases {
            assert_eq!(const_hex::encode(backend::sha256(&[message])), expected);
        }
    }

    #[cfg(feature = "aws-lc-rs")]
    proptest::proptest! {
        /// Keys on both sides of a block's length, messages on both sides of
        /// several.
        #[test]
        fn both_backends_agree(
            key in proptest::collection::vec(proptest::prelude::any::<u8>(), 1..140),
            pieces in proptest::collection::vec(
                proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
                0..6,
            ),
        ) {
            let pieces: Vec<&[u8]> = pieces.iter().map(|piece| &**piece).collect();
            let ours = rust_crypto::Start::new(&key).tag(&pieces);
            proptest::prop_assert_eq!(ours, aws_lc::Start::new(&key).tag(&pieces));
            let whole = pieces.concat();
            proptest::prop_assert_eq!(rust_crypto::sha256(&[&whole]), aws_lc::sha256(&[&whole]));
        }
    }
}
