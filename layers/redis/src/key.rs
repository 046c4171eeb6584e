//! Keys: typed, prefixed, and no two inputs one key.

use std::{fmt, sync::Arc};

use sha2::{Digest, Sha256};

/// A segment longer than this, once encoded, is told by its hash.
const LONGEST: usize = 64;

/// The keys of one purpose: `{prefix}{namespace}:`. Cheap to clone.
///
/// ```text
/// buttress:rate-limit:{orders:10.0.0.7}:per-second
/// └prefix─┘└namespace┘└──hash tag─────┘ └segments┘
/// ```
///
/// Segments are percent-encoded but for letters, digits, `-`, `_` and `.`, so
/// that a `:` or a brace in what a client says separates nothing; an IPv6
/// address reads `2001%3Adb8%3A%3A`. A segment of more than 64 bytes by then
/// is `~` and the SHA-256 of what it was, in hexadecimal; an empty one is `%`,
/// and a tag of none `%%`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Keyspace(Arc<str>);

impl Keyspace {
    pub(crate) fn new(prefix: &str, namespace: &'static str) -> Self {
        debug_assert!(
            !namespace.is_empty()
                && namespace
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b == b'-'),
            "a namespace is a-z and dashes"
        );
        Self(format!("{prefix}{namespace}:").into())
    }

    /// The key whose hash tag is made of these segments: all keys of one tag
    /// are on one node, and one script can touch them together.
    #[must_use]
    pub fn tag<S: AsRef<[u8]>>(&self, segments: impl IntoIterator<Item = S>) -> Key {
        let mut text = String::with_capacity(self.0.len() + 48);
        text.push_str(&self.0);
        text.push('{');
        let start = text.len();
        for (index, segment) in segments.into_iter().enumerate() {
            if index > 0 {
                text.push(':');
            }
            encode(segment.as_ref(), &mut text);
        }
        if text.len() == start {
            // As below, and not the same as one empty segment.
            text.push_str("%%");
        }
        text.push('}');
        Key(text)
    }

    /// Keys that differ in the last segment of their tag alone, all else being
    /// worked out once: its [`key`](Family::key) of `x` is `tag` with `x`
    /// behind the segments of `tag`, and then `behind`.
    #[must_use]
    pub fn family<S: AsRef<[u8]>>(
        &self,
        tag: impl IntoIterator<Item = S>,
        behind: impl AsRef<[u8]>,
    ) -> Family {
        let mut before = format!("{}{{", self.0);
        for segment in tag {
            encode(segment.as_ref(), &mut before);
            before.push(':');
        }
        let mut after = String::from("}:");
        encode(behind.as_ref(), &mut after);
        Family {
            before: before.into(),
            after: after.into(),
        }
    }

    /// A name that is no key, for a pub/sub channel.
    #[must_use]
    pub fn channel(&self, name: impl AsRef<[u8]>) -> String {
        let mut text = String::from(&*self.0);
        encode(name.as_ref(), &mut text);
        text
    }
}

impl fmt::Debug for Keyspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keyspace").field(&self.0).finish()
    }
}

/// Keys that differ in one segment: see [`Keyspace::family`].
#[derive(Clone, Debug)]
pub struct Family {
    before: Box<str>,
    after: Box<str>,
}

impl Family {
    /// The one that has this segment.
    #[must_use]
    pub fn key(&self, segment: impl AsRef<[u8]>) -> Key {
        let segment = segment.as_ref();
        let length = self.before.len() + segment.len() + self.after.len();
        let mut text = String::with_capacity(length);
        text.push_str(&self.before);
        encode(segment, &mut text);
        text.push_str(&self.after);
        Key(text)
    }
}

/// One key. [`Debug`](fmt::Debug) does not show it: it may hold what a client
/// is known by.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(String);

impl Key {
    /// The key with one more segment behind its tag: on the same node.
    #[must_use]
    pub fn segment(mut self, segment: impl AsRef<[u8]>) -> Self {
        self.0.push(':');
        encode(segment.as_ref(), &mut self.0);
        self
    }

    /// One that was read in Redis.
    #[cfg(feature = "testing")]
    pub(crate) fn read(key: String) -> Self {
        Self(key)
    }

    /// As it is written in Redis.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The slot of Redis Cluster it is in: keys of one slot can be touched by
    /// one script.
    #[must_use]
    pub fn slot(&self) -> Slot {
        Slot::of(self.0.as_bytes())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// A slot of Redis Cluster, of which there are 16384.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot(u16);

impl Slot {
    pub(crate) const COUNT: u16 = 16_384;

    /// By the [specification]: CRC16 of the hash tag, or of the whole key where
    /// it has none.
    ///
    /// [specification]: https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
    pub(crate) fn of(key: &[u8]) -> Self {
        let tag = || {
            let (_, rest) = split(key, b'{')?;
            let (tag, _) = split(rest, b'}')?;
            (!tag.is_empty()).then_some(tag)
        };
        Self(crc16::State::<crc16::XMODEM>::calculate(tag().unwrap_or(key)) % Self::COUNT)
    }

    /// Which of the 16384, from 0.
    #[must_use]
    pub const fn number(self) -> u16 {
        self.0
    }
}

fn split(text: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let index = text.iter().position(|&byte| byte == at)?;
    Some((&text[..index], &text[index + 1..]))
}

fn encode(segment: &[u8], out: &mut String) {
    if segment.is_empty() {
        // `{}` would be no hash tag; and nothing else encodes to a bare `%`.
        out.push('%');
        return;
    }
    // Most are all of such, and not long.
    if segment.len() <= LONGEST
        && segment.iter().copied().all(stays)
        && let Ok(text) = str::from_utf8(segment)
    {
        out.push_str(text);
        return;
    }
    let start = out.len();
    for &byte in segment {
        if stays(byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            push_hex(byte, out);
        }
        if out.len() - start > LONGEST {
            out.truncate(start);
            out.push('~');
            for byte in Sha256::digest(segment) {
                push_hex(byte, out);
            }
            return;
        }
    }
}

/// Whether it is written as it is.
const fn stays(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

fn push_hex(byte: u8, out: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    out.push(char::from(DIGITS[usize::from(byte >> 4)]));
    out.push(char::from(DIGITS[usize::from(byte & 15)]));
}

#[cfg(all(test, not(buttress_loom)))]
mod tests;
