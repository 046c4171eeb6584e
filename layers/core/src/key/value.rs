//! [`Key`], and the builder that bounds it.

use std::{
    fmt,
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use sha2::{Digest, Sha256};

/// Canonical bytes that need no allocation: an IPv6 address with its tag, a
/// pair of them, a digest, a UUID in text. With two bytes of bookkeeping it
/// makes a key of 40 bytes.
const INLINE: usize = 38;

/// Canonical bytes kept as they are; above it a digest stands for them.
const KEPT: usize = 1024;

/// In the first canonical byte: the rest is a digest.
const DIGESTED: u8 = 0x80;

/// What a key was made of: the first canonical byte, so that a header and an
/// address of equal bytes are different keys.
///
/// The numbers reach Redis. They are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Global = 0,
    Address = 1,
    Text = 2,
    Number = 3,
    Bytes = 4,
    Header = 5,
    Cookie = 6,
    Path = 7,
    Method = 8,
    Host = 9,
    Composite = 10,
    Ambiguous = 11,
}

impl Kind {
    const fn name(tag: u8) -> &'static str {
        match tag {
            0 => "global",
            1 => "address",
            2 => "text",
            3 => "number",
            4 => "bytes",
            5 => "header",
            6 => "cookie",
            7 => "path",
            8 => "method",
            9 => "host",
            10 => "composite",
            _ => "ambiguous",
        }
    }
}

/// What requests are counted by: an owned value of bounded size.
///
/// A key is a kind (address, header, text and so on) and a value. Up to 37
/// bytes of value are kept inside the key, up to 1 KiB on the heap, and of
/// anything longer the SHA-256 digest: whatever a client sends, a key costs
/// at most 40 bytes and 1 KiB. Keys of different kinds are never equal.
///
/// `Debug` tells the kind and never the value, so that a key may be logged.
///
/// ```
/// use std::net::IpAddr;
/// use buttress_core::key::Key;
///
/// let address: IpAddr = "192.0.2.1".parse().unwrap();
/// assert_eq!(Key::from(address), Key::from(address));
/// assert_ne!(Key::from("192.0.2.1"), Key::from(address));
/// assert_eq!(format!("{:?}", Key::from("alice")), "Key(text)");
/// ```
#[derive(Clone)]
pub struct Key(Repr);

#[derive(Clone)]
enum Repr {
    Inline { len: u8, bytes: [u8; INLINE] },
    Heap(Box<[u8]>),
}

impl Key {
    /// The one key of everybody.
    #[must_use]
    pub const fn global() -> Self {
        Self::bare(Kind::Global)
    }

    /// The one key of all requests that answer the question for their key
    /// twice and differently: two lines of one header, say.
    ///
    /// Nobody can tell which answer counts upstream. Were it the first, the
    /// joined or none of them, a client could mint fresh keys (or none) by
    /// repeating itself; so all who do share this one, unless
    /// [`or`](crate::key::ExtractKeyExt::or) knows better.
    #[must_use]
    pub const fn ambiguous() -> Self {
        Self::bare(Kind::Ambiguous)
    }

    /// Whether this is [`Key::ambiguous`].
    #[must_use]
    pub fn is_ambiguous(&self) -> bool {
        self.as_bytes() == [Kind::Ambiguous as u8]
    }

    /// A key of any bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self::of(Kind::Bytes, bytes)
    }

    /// The canonical bytes: a tag for the kind, then the value (or, with the
    /// tag's highest bit set, its digest). Two keys have the same bytes only
    /// where they have the same kind and value, up to collisions of SHA-256.
    ///
    /// They hold what the client sent: hash them before they leave the
    /// process.
    #[must_use]
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Repr::Inline { len, bytes } => &bytes[..usize::from(*len)],
            Repr::Heap(bytes) => bytes,
        }
    }

    pub(crate) fn of(kind: Kind, value: &[u8]) -> Self {
        let mut builder = KeyBuilder::new(kind);
        builder.push(value);
        builder.finish()
    }

    const fn bare(kind: Kind) -> Self {
        let mut bytes = [0; INLINE];
        bytes[0] = kind as u8;
        Self(Repr::Inline { len: 1, bytes })
    }

    /// A short value whose length is known to the compiler.
    #[inline]
    fn fixed<const N: usize>(kind: Kind, value: [u8; N]) -> Self {
        const { assert!(N < INLINE) };
        let mut bytes = [0; INLINE];
        bytes[0] = kind as u8;
        bytes[1..=N].copy_from_slice(&value);
        #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
        let len = N as u8 + 1;
        Self(Repr::Inline { len, bytes })
    }

    /// Several keys as one. Each part goes behind its length, so that no two
    /// sequences of parts have the same bytes.
    pub(crate) fn composite<const N: usize>(parts: [Self; N]) -> Self {
        let mut builder = KeyBuilder::new(Kind::Composite);
        for part in parts {
            builder.part(&part);
        }
        builder.finish()
    }
}

impl PartialEq for Key {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for Key {}

impl Hash for Key {
    #[inline(always)]
    fn hash<H: Hasher>(&self, state: &mut H) {
        // The value apart from its tag: it was written just now, and a word
        // read across two writes waits until both have reached the cache,
        // which costs as much as the hash itself.
        if let [kind, value @ ..] = self.as_bytes() {
            // The tag and the length as one word, for each word costs a
            // multiplication that waits for the one before. A value has at
            // most 1 KiB.
            #[expect(clippy::cast_possible_truncation)]
            state.write_u32(u32::from(*kind) | (value.len() as u32) << 8);
            state.write(value);
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", Kind::name(self.as_bytes()[0] & !DIGESTED))
    }
}

/// An address in registers, IPv4 mapped into IPv6 unmapped.
///
/// `IpAddr` is an odd number of bytes: each copy of it through memory is
/// written in other pieces than it is read, and the processor waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Address {
    V4(u32),
    V6(u128),
}

impl From<Ipv6Addr> for Address {
    #[inline]
    fn from(address: Ipv6Addr) -> Self {
        let bits = address.to_bits();
        if bits >> 32 == 0xffff {
            #[expect(clippy::cast_possible_truncation, reason = "the rest is the prefix")]
            Self::V4(bits as u32)
        } else {
            Self::V6(bits)
        }
    }
}

impl From<IpAddr> for Address {
    #[inline]
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::V4(address.to_bits()),
            IpAddr::V6(address) => address.into(),
        }
    }
}

impl From<&SocketAddr> for Address {
    #[inline]
    fn from(address: &SocketAddr) -> Self {
        match address {
            SocketAddr::V4(address) => Self::V4(address.ip().to_bits()),
            SocketAddr::V6(address) => (*address.ip()).into(),
        }
    }
}

impl From<Address> for IpAddr {
    #[inline]
    fn from(address: Address) -> Self {
        match address {
            Address::V4(bits) => Self::V4(Ipv4Addr::from_bits(bits)),
            Address::V6(bits) => Self::V6(Ipv6Addr::from_bits(bits)),
        }
    }
}

impl From<Address> for Key {
    #[inline]
    fn from(address: Address) -> Self {
        match address {
            Address::V4(bits) => Self::fixed(Kind::Address, bits.to_be_bytes()),
            Address::V6(bits) => Self::fixed(Kind::Address, bits.to_be_bytes()),
        }
    }
}

impl From<IpAddr> for Key {
    /// The whole address. An IPv4 address mapped into IPv6 is the IPv4
    /// address.
    #[inline]
    fn from(address: IpAddr) -> Self {
        Address::from(address).into()
    }
}

impl From<Ipv4Addr> for Key {
    #[inline]
    fn from(address: Ipv4Addr) -> Self {
        Self::fixed(Kind::Address, address.octets())
    }
}

impl From<Ipv6Addr> for Key {
    #[inline]
    fn from(address: Ipv6Addr) -> Self {
        Address::from(address).into()
    }
}

impl From<u64> for Key {
    #[inline]
    fn from(number: u64) -> Self {
        u128::from(number).into()
    }
}

impl From<u32> for Key {
    #[inline]
    fn from(number: u32) -> Self {
        u128::from(number).into()
    }
}

impl From<u128> for Key {
    /// A number of any width: `7_u64` and `7_u128` are the same key. A UUID
    /// fits, too.
    #[inline]
    fn from(number: u128) -> Self {
        Self::fixed(Kind::Number, number.to_be_bytes())
    }
}

impl From<&str> for Key {
    fn from(text: &str) -> Self {
        Self::of(Kind::Text, text.as_bytes())
    }
}

impl From<String> for Key {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl From<&String> for Key {
    fn from(text: &String) -> Self {
        text.as_str().into()
    }
}

impl From<&Key> for Key {
    fn from(key: &Key) -> Self {
        key.clone()
    }
}

macro_rules! from_references {
    ($($type:ty)*) => {$(
        impl From<&$type> for Key {
            fn from(value: &$type) -> Self {
                (*value).into()
            }
        }
    )*};
}

// What `extension::<T>()` reads in place.
from_references!(IpAddr Ipv4Addr Ipv6Addr u32 u64 u128);

/// Builds a key piece by piece: inline first, then on the heap, then as a
/// digest, so that it holds at most [`KEPT`] bytes whatever is pushed.
pub(crate) struct KeyBuilder {
    kind: Kind,
    state: State,
}

enum State {
    Inline { len: u8, bytes: [u8; INLINE] },
    Heap(Vec<u8>),
    Digest(Sha256),
}

impl KeyBuilder {
    pub(crate) fn new(kind: Kind) -> Self {
        let mut bytes = [0; INLINE];
        bytes[0] = kind as u8;
        Self {
            kind,
            state: State::Inline { len: 1, bytes },
        }
    }

    pub(crate) fn push(&mut self, more: &[u8]) {
        match &mut self.state {
            State::Inline { len, bytes } => {
                let used = usize::from(*len);
                if let Some(free) = bytes[used..].get_mut(..more.len()) {
                    free.copy_from_slice(more);
                    *len += u8::try_from(more.len()).expect("it fitted");
                    return;
                }
                self.state = if used + more.len() <= KEPT {
                    let mut heap = Vec::with_capacity(used + more.len());
                    heap.extend_from_slice(&bytes[..used]);
                    heap.extend_from_slice(more);
                    State::Heap(heap)
                } else {
                    State::digest(&bytes[..used], more)
                };
            }
            State::Heap(heap) if heap.len() + more.len() <= KEPT => heap.extend_from_slice(more),
            State::Heap(heap) => self.state = State::digest(heap, more),
            State::Digest(hasher) => hasher.update(more),
        }
    }

    /// Pushes a part of a composite: its length in LEB128 (one byte below
    /// 128, so that two IPv6 addresses stay inline), then its bytes.
    fn part(&mut self, part: &Key) {
        let bytes = part.as_bytes();
        let mut rest = bytes.len();
        while rest >= 0x80 {
            #[expect(clippy::cast_possible_truncation, reason = "seven bits at a time")]
            self.push(&[rest as u8 | 0x80]);
            rest >>= 7;
        }
        #[expect(clippy::cast_possible_truncation, reason = "seven bits at a time")]
        self.push(&[rest as u8]);
        self.push(bytes);
    }

    pub(crate) fn finish(self) -> Key {
        Key(match self.state {
            State::Inline { len, bytes } => Repr::Inline { len, bytes },
            State::Heap(heap) => Repr::Heap(heap.into_boxed_slice()),
            State::Digest(hasher) => {
                let digest = hasher.finalize();
                let mut bytes = [0; INLINE];
                bytes[0] = self.kind as u8 | DIGESTED;
                bytes[1..=digest.len()].copy_from_slice(&digest);
                Repr::Inline { len: 33, bytes }
            }
        })
    }
}

impl State {
    fn digest(so_far: &[u8], more: &[u8]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(so_far);
        hasher.update(more);
        Self::Digest(hasher)
    }
}
