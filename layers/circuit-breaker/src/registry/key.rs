//! What a registry knows its breakers by.

use std::{
    borrow::Cow,
    fmt::Write as _,
    hash::{Hash, Hasher},
    net::{Ipv4Addr, Ipv6Addr},
};

use buttress_core::key::Key;

/// What a [`Registry`](crate::Registry) finds a breaker by: a name (`str`,
/// `String`), or the [`Key`] of a request.
///
/// A name is the same as `Key::from(name)`, so that what the layer has made
/// for the key of a closure is found by its name. Keys of other kinds, a host
/// say, are other keys, though they be written alike.
pub trait RegistryKey: sealed::Probing {}

impl RegistryKey for str {}
impl RegistryKey for String {}
impl RegistryKey for Key {}

pub(super) mod sealed {
    use buttress_core::key::Key;

    use super::Probe;

    pub trait Probing {
        /// Whether the program gave it as a name, which may be shown.
        const NAME: bool;

        /// What finds it. Allocates nothing.
        fn probe<R>(&self, find: impl FnOnce(Probe<'_>) -> R) -> R;

        /// What is kept of it.
        fn key(&self) -> Key;
    }
}

use sealed::Probing;

impl Probing for str {
    const NAME: bool = true;

    #[inline]
    fn probe<R>(&self, find: impl FnOnce(Probe<'_>) -> R) -> R {
        if self.len() < KEPT {
            find(Probe {
                kind: TEXT,
                value: self.as_bytes(),
            })
        } else {
            find(Probe::of(&Key::from(self)))
        }
    }

    fn key(&self) -> Key {
        self.into()
    }
}

impl Probing for String {
    const NAME: bool = true;

    #[inline]
    fn probe<R>(&self, find: impl FnOnce(Probe<'_>) -> R) -> R {
        self.as_str().probe(find)
    }

    fn key(&self) -> Key {
        self.into()
    }
}

impl Probing for Key {
    const NAME: bool = false;

    #[inline]
    fn probe<R>(&self, find: impl FnOnce(Probe<'_>) -> R) -> R {
        find(Probe::of(self))
    }

    fn key(&self) -> Key {
        self.clone()
    }
}

/// A key's canonical bytes, borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe<'a> {
    kind: u8,
    value: &'a [u8],
}

impl<'a> Probe<'a> {
    #[inline]
    pub(super) fn of(key: &'a Key) -> Self {
        match key.as_bytes() {
            [kind, value @ ..] => Self { kind: *kind, value },
            [] => unreachable!("a key begins with its kind"),
        }
    }
}

impl Hash for Probe<'_> {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_usize(self.value.len() << 8 | usize::from(self.kind));
        state.write(self.value);
    }
}

// How `Key`'s canonical bytes begin, for the kinds that have a meaning here;
// they never change, as they reach Redis.
const GLOBAL: u8 = 0;
const ADDRESS: u8 = 1;
const TEXT: u8 = 2;
const NUMBER: u8 = 3;
const PATH: u8 = 7;
const METHOD: u8 = 8;
const HOST: u8 = 9;
const AMBIGUOUS: u8 = 11;
/// Canonical bytes that a key keeps as they are.
const KEPT: usize = 1024;

/// The key in words, where it may be told: no header, no cookie, no bytes of
/// any kind, and nothing made of them.
pub(super) fn in_words(key: &Key) -> Option<Cow<'_, str>> {
    let Probe { kind, value } = Probe::of(key);
    Some(match kind {
        TEXT | PATH | METHOD | HOST => String::from_utf8_lossy(value),
        NUMBER => u128::from_be_bytes(value.try_into().ok()?)
            .to_string()
            .into(),
        ADDRESS => match <[u8; 4]>::try_from(value) {
            Ok(octets) => Ipv4Addr::from(octets).to_string().into(),
            Err(_) => Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?)
                .to_string()
                .into(),
        },
        GLOBAL => "global".into(),
        AMBIGUOUS => "ambiguous".into(),
        _ => return None,
    })
}

/// What a key is known by in other processes, too: its canonical bytes, or
/// where these may not be told, what nobody can tell them from.
#[cfg(feature = "redis")]
pub(super) fn in_redis(key: &Key, may_be_told: bool) -> Cow<'_, [u8]> {
    use sha2::{Digest, Sha256};
    if may_be_told {
        key.as_bytes().into()
    } else {
        // No key's own bytes: these begin with a small number.
        let mut hash = b"~".to_vec();
        for byte in Sha256::digest(key.as_bytes()) {
            hash.extend_from_slice(format!("{byte:02x}").as_bytes());
        }
        hash.into()
    }
}

/// In words of what may be a name: 1 to 128 printable ASCII characters. What
/// is not is escaped, what is too long is cut.
pub(super) fn printable(words: &str) -> String {
    const LONGEST: usize = 128;
    let mut name = String::with_capacity(words.len().min(LONGEST));
    for character in words.chars() {
        let before = name.len();
        if matches!(character, ' '..='~') {
            name.push(character);
        } else {
            let _ = write!(name, "{}", character.escape_unicode());
        }
        if name.len() > LONGEST {
            name.truncate(before);
            break;
        }
    }
    if name.is_empty() {
        name.push_str("(empty)");
    }
    name
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use buttress_core::{
        Head,
        key::{self, ExtractKey},
    };
    use http::Request;

    use super::*;

    fn extracted(extract: &impl ExtractKey) -> Key {
        let request = Request::builder()
            .uri("http://Example.org:80/a/b?secret=1")
            .header("x-api-key", "secret")
            .body(())
            .unwrap();
        extract.extract(Head::from(&request)).unwrap()
    }

    #[test]
    fn a_name_is_found_as_its_key_is() {
        for len in [0, 1, 37, 38, 39, 1021, 1022, 1023, 1024, 1025, 5000] {
            let name = "x".repeat(len);
            let key = Key::from(&name);
            name.probe(|probe| assert_eq!(probe, Probe::of(&key), "{len}"));
            assert_eq!(name.key(), key);
        }
    }

    #[test]
    fn in_words_only_what_may_be_told() {
        let address = |address: &str| Key::from(address.parse::<IpAddr>().unwrap());
        let words = |key: &Key| in_words(key).map(Cow::into_owned);
        for (key, told) in [
            (Key::from("caf\u{e9}"), "caf\u{e9}"),
            (Key::from(7_u64), "7"),
            (address("65.66.67.68"), "65.66.67.68"),
            (address("2001:db8::1"), "2001:db8::1"),
            (Key::global(), "global"),
            (Key::ambiguous(), "ambiguous"),
            (extracted(&key::host()), "example.org"),
            (extracted(&key::path()), "/a/b"),
            (extracted(&key::method()), "GET"),
        ] {
            assert_eq!(words(&key).as_deref(), Some(told), "{key:?}");
        }
        for key in [
            extracted(&key::header("x-api-key")),
            extracted(&(key::header("x-api-key"), key::host())),
            Key::from_bytes(b"secret"),
            Key::from("x".repeat(5000)),
        ] {
            assert_eq!(in_words(&key), None, "{key:?}");
        }
    }

    #[test]
    fn a_name_can_be_printed() {
        assert_eq!(printable("api.example.org:443"), "api.example.org:443");
        assert_eq!(printable("a\nb"), r"a\u{a}b");
        assert_eq!(printable(""), "(empty)");
        assert_eq!(printable(&"x".repeat(200)).len(), 128);
        assert!(printable(&"\u{e9}".repeat(200)).len() <= 128);
        assert!(crate::breaker::check_name(&printable(&"\u{e9}".repeat(200))).is_ok());
    }
}
