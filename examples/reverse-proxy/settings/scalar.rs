//! The small grammars of the file: durations, sizes, counts, names, secrets.
//!
//! Each is a type of its own, so that a value that exists is a value that
//! makes sense, and each error says what was expected. That matters more than
//! the type's name: the operator who reads it has never seen this source.

use std::{fmt, str::FromStr, time::Duration};

use buttress::webhook;
use serde::{
    Deserialize, Deserializer,
    de::{Error, Visitor},
};

/// Reads a scalar of the file as text, whatever type YAML gave it, so that
/// `-1`, `1.5` and `yes` get the same kind of error as `nonsense` does.
pub(super) fn scalar<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = String>,
{
    struct Text;

    impl Visitor<'_> for Text {
        type Value = String;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("one value")
        }
        fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
            Ok(text.to_owned())
        }
        fn visit_i64<E: Error>(self, number: i64) -> Result<String, E> {
            Ok(number.to_string())
        }
        fn visit_u64<E: Error>(self, number: u64) -> Result<String, E> {
            Ok(number.to_string())
        }
        fn visit_f64<E: Error>(self, number: f64) -> Result<String, E> {
            Ok(number.to_string())
        }
        fn visit_bool<E: Error>(self, truth: bool) -> Result<String, E> {
            Ok(truth.to_string())
        }
        fn visit_unit<E: Error>(self) -> Result<String, E> {
            Ok(String::new())
        }
    }

    let text = deserializer.deserialize_any(Text)?;
    text.parse().map_err(D::Error::custom)
}

/// `Deserialize` through [`scalar`].
macro_rules! from_scalar {
    ($($type:ty),*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::settings::scalar::scalar(deserializer)
            }
        }
    )*};
}
pub(super) use from_scalar;

/// A closed set of words, each a variant, with one error for all others.
macro_rules! words {
    ($(#[$doc:meta])* $type:ident { $($(#[$attribute:meta])* $variant:ident = $word:literal),* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $type { $($(#[$attribute])* $variant),* }

        impl FromStr for $type {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$variant),)*
                    _ => Err(format!("expected {}, got `{text}`", [$($word),*].join(" or "))),
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),* })
            }
        }
    };
}
pub(super) use words;

from_scalar!(Span, Delay, Size, Count, Rate, Name, Secret);

/// The number in front of a unit, times what the unit stands for.
fn with_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number
        .parse::<u64>()
        .ok()?
        .checked_mul(*factor)
        .filter(|&product| product > 0)
}

/// The largest unit that leaves no remainder: the inverse of [`with_unit`].
fn in_units(f: &mut fmt::Formatter<'_>, value: u64, units: &[(&str, u64)]) -> fmt::Result {
    let (name, factor) = units
        .iter()
        .rev()
        .find(|(_, factor)| value.is_multiple_of(*factor))
        .expect("the smallest unit divides everything");
    write!(f, "{}{name}", value / factor)
}

/// A duration above zero: `250ms`, `5s`, `2m`, `1h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

const SPANS: &[(&str, u64)] = &[("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];

impl Span {
    pub(crate) const fn secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }

    pub(crate) const fn millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        with_unit(text, SPANS)
            // A year is more than anyone means, and still far from where
            // arithmetic on points in time could overflow.
            .filter(|&millis| millis <= 366 * 24 * 3_600_000)
            .map(|millis| Self(Duration::from_millis(millis)))
            .ok_or_else(|| {
                format!("expected a duration above zero such as 250ms, 5s or 2m, got `{text}`")
            })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        in_units(f, millis, SPANS)
    }
}

/// A duration that may be none at all: `5s`, `0s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Delay(pub(crate) Duration);

impl FromStr for Delay {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if SPANS
            .iter()
            .any(|(unit, _)| text.strip_prefix('0') == Some(unit))
        {
            return Ok(Self(Duration::ZERO));
        }
        let span: Result<Span, _> = text.parse();
        span.map(|span| Self(span.0))
            .map_err(|_| format!("expected a duration such as 0s, 250ms or 5s, got `{text}`"))
    }
}

impl fmt::Display for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_zero() {
            return f.write_str("0s");
        }
        Span(self.0).fmt(f)
    }
}

/// A size above zero: `512B`, `64KiB`, `10MiB`, `1GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Size(pub(crate) u64);

const SIZES: &[(&str, u64)] = &[
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
];

impl Size {
    /// As the length of something in memory.
    pub(crate) fn in_memory(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        with_unit(text, SIZES).map(Self).ok_or_else(|| {
            format!("expected a size above zero such as 512B, 64KiB or 10MiB, got `{text}`")
        })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        in_units(f, self.0, SIZES)
    }
}

/// A whole number from 1 to `u32::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Count(pub(crate) u32);

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse()
            .ok()
            .filter(|&count| count > 0)
            .map(Self)
            .ok_or_else(|| {
                format!(
                    "expected a whole number from 1 to {}, got `{text}`",
                    u32::MAX
                )
            })
    }
}

/// A part of a whole: above 0, at most 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rate(pub(crate) f64);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse()
            .ok()
            .filter(|&rate| rate > 0.0 && rate <= 1.0)
            .map(Self)
            .ok_or_else(|| format!("expected a rate above 0 and at most 1, got `{text}`"))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A route's name: `[a-z0-9-]{1,64}`, fit for a label and a state key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name(pub(crate) String);

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = (1..=64).contains(&text.len())
            && text
                .bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "expected 1 to 64 characters out of a-z, 0-9 and `-`, got `{text}`"
            ))
        }
    }
}

/// A secret: itself, `env:NAME` or `file:PATH`. Neither printed nor logged.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(String);

impl Secret {
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }

    /// The same for who signs with it, or verifies: not empty and not short.
    pub(crate) fn of_webhook(&self) -> Result<webhook::Secret, webhook::SecretError> {
        webhook::Secret::new(&*self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl FromStr for Secret {
    type Err = String;

    // No message repeats the text: it may be the secret.
    fn from_str(text: &str) -> Result<Self, String> {
        let secret = if let Some(name) = text.strip_prefix("env:") {
            std::env::var(name)
                .map_err(|_| format!("the environment variable {name} is not set"))?
        } else if let Some(path) = text.strip_prefix("file:") {
            let secret = std::fs::read_to_string(path)
                .map_err(|error| format!("the file {path} cannot be read: {error}"))?;
            // Editors end a file with a newline, and `echo` does.
            secret.trim_end_matches(['\r', '\n']).to_owned()
        } else {
            text.to_owned()
        };
        if secret.is_empty() {
            return Err("expected a secret, `env:NAME` or `file:PATH`, got nothing".to_owned());
        }
        Ok(Self(secret))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_read_back_as_they_were_written() {
        for text in ["1ms", "250ms", "5s", "90s", "2m", "1h"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
        for text in ["0s", "250ms", "5s"] {
            assert_eq!(text.parse::<Delay>().unwrap().to_string(), text);
        }
        assert_eq!("1000ms".parse::<Span>().unwrap().to_string(), "1s");
        for text in ["1B", "1000B", "64KiB", "10MiB", "3GiB"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_only_looks_like_one_is_refused() {
        for text in [
            "", "5", "s", "0s", "-5s", "+5s", "5 s", "5S", "1.5s", "5s ", "1d", "9999999h",
        ] {
            assert!(text.parse::<Span>().is_err(), "{text:?}");
            let none = text == "0s";
            assert_eq!(text.parse::<Delay>().is_ok(), none, "{text:?}");
        }
        for text in ["0", "0S", "00s", "-0s"] {
            assert!(text.parse::<Delay>().is_err(), "{text:?}");
        }
        for text in ["", "5", "0B", "-1KiB", "64kb", "64K", "99999999999GiB"] {
            assert!(text.parse::<Size>().is_err(), "{text:?}");
        }
        for text in ["", "0", "-1", "1.5", "4294967296", "many"] {
            assert!(text.parse::<Count>().is_err(), "{text:?}");
        }
        for text in ["", "0", "-0.5", "1.1", "50%", "NaN", "inf"] {
            assert!(text.parse::<Rate>().is_err(), "{text:?}");
        }
    }
}
