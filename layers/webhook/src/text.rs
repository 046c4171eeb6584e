//! Reading and writing what schemes have in common.

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{Reason, Tag, mac::TAG, scheme::LONGEST_ID};

/// How long a tag is in hexadecimal.
pub(crate) const HEX: usize = TAG * 2;
/// How long a tag is in base64.
pub(crate) const BASE64: usize = TAG.div_ceil(3) * 4;

/// A header that stands once.
pub(crate) fn single<'r>(
    headers: &'r HeaderMap,
    name: &HeaderName,
    missing: Reason,
) -> Result<&'r str, Reason> {
    let value = headers.get(name).ok_or(missing)?;
    // Looked for a second time only where something at all stands twice.
    let repeats = headers.len() > headers.keys_len();
    if repeats && headers.get_all(name).iter().nth(1).is_some() {
        return Err(Reason::DuplicateHeader);
    }
    value.to_str().map_err(|_| Reason::Malformed)
}

/// Seconds in digits and nothing else: a number that is read more freely than
/// it is signed has other texts, by which a replay looks new.
pub(crate) fn seconds(text: &str) -> Result<u64, Reason> {
    // The one sign that the number's own parser passes over.
    if text.starts_with('+') || (text.len() > 1 && text.starts_with('0')) {
        return Err(Reason::Malformed);
    }
    text.parse().map_err(|_| Reason::Malformed)
}

/// An id as it may be signed and kept: printable, and not endless.
pub(crate) fn is_id(text: &str) -> bool {
    (1..=LONGEST_ID).contains(&text.len()) && !has(text, |byte| !byte.is_ascii_graphic())
}

/// Whether there is such a byte. It looks at all of them whatever it finds, and
/// so at many at once.
pub(crate) fn has(text: &str, such: impl Fn(u8) -> bool) -> bool {
    text.bytes().fold(false, |any, byte| any | such(byte))
}

/// Small letters only, as all who publish a scheme write and accept.
pub(crate) fn hex(text: &str) -> Option<Tag> {
    if text.len() != HEX || has(text, |byte| byte.is_ascii_uppercase()) {
        return None;
    }
    // It would pass over `0x`, but not over two digits too few.
    const_hex::decode_to_array(text).ok().map(Tag::new)
}

/// Padded, and with no bits left over.
pub(crate) fn base64(text: &str) -> Option<Tag> {
    // The decoder wants room for whole groups.
    let mut room = [0; TAG + 4];
    if text.len() != BASE64 {
        return None;
    }
    let count = BASE64_STANDARD.decode_slice(text, &mut room).ok()?;
    let tag = room.get(..count)?.try_into().ok()?;
    Some(Tag::new(tag))
}

/// What stands behind `algorithm` and `=`.
pub(crate) fn of_algorithm<'r>(value: &'r str, algorithm: &str) -> Result<&'r str, Reason> {
    let behind = value.strip_prefix(algorithm);
    match behind.and_then(|behind| behind.strip_prefix('=')) {
        Some(behind) => Ok(behind),
        None if value.contains('=') => Err(Reason::UnsupportedScheme),
        None => Err(Reason::Malformed),
    }
}

/// `prefix` and the tag in hexadecimal.
pub(crate) fn hex_value(prefix: &str, tag: &Tag) -> HeaderValue {
    let mut value = Vec::with_capacity(prefix.len() + HEX);
    value.extend_from_slice(prefix.as_bytes());
    push_hex(&mut value, tag);
    header(value)
}

/// Appends the tag in hexadecimal.
pub(crate) fn push_hex(to: &mut Vec<u8>, tag: &Tag) {
    let mut digits = [0; HEX];
    const_hex::encode_to_slice(tag.as_bytes(), &mut digits).expect("there is room for each byte");
    to.extend_from_slice(&digits);
}

/// Appends the tag in base64.
pub(crate) fn push_base64(to: &mut Vec<u8>, tag: &Tag) {
    let mut text = [0; BASE64];
    let room = BASE64_STANDARD.encode_slice(tag.as_bytes(), &mut text);
    room.expect("there is room for each group");
    to.extend_from_slice(&text);
}

/// What was put together from ASCII. Best in a vector that is full: what has
/// room left over takes a second allocation.
pub(crate) fn header(value: Vec<u8>) -> HeaderValue {
    HeaderValue::from_maybe_shared(bytes::Bytes::from(value)).expect("it is printable ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_digits_only() {
        assert_eq!(seconds("0"), Ok(0));
        assert_eq!(seconds("1700000000"), Ok(1_700_000_000));
        assert_eq!(seconds("18446744073709551615"), Ok(u64::MAX));
        let wrong = [
            "",
            " 1",
            "1 ",
            "+1",
            "-1",
            "1.0",
            "1e9",
            "01",
            "1_0",
            "١",
            "18446744073709551616",
        ];
        for text in wrong {
            assert_eq!(seconds(text), Err(Reason::Malformed), "{text:?}");
        }
    }

    #[test]
    fn hexadecimal_is_sixteen_characters_wherever_they_stand() {
        let tag = Tag::new(std::array::from_fn(|at| at as u8 * 7));
        let mut digits = Vec::new();
        push_hex(&mut digits, &tag);
        for at in 0..HEX {
            for byte in 0..128 {
                let mut digits = digits.clone();
                digits[at] = byte;
                let text = String::from_utf8(digits).unwrap();
                let value = (byte as char)
                    .to_digit(16)
                    .filter(|_| !byte.is_ascii_uppercase());
                let expected = value.map(|value| {
                    let mut bytes = *tag.as_bytes();
                    let (shift, other) = if at % 2 == 0 { (4, 0x0f) } else { (0, 0xf0) };
                    bytes[at / 2] = bytes[at / 2] & other | (value as u8) << shift;
                    Tag::new(bytes)
                });
                assert_eq!(hex(&text), expected, "{text}");
            }
        }
    }

    #[test]
    fn what_is_by_another_algorithm_is_told_from_what_is_nothing() {
        assert_eq!(of_algorithm("v0=ab=c", "v0"), Ok("ab=c"));
        assert_eq!(of_algorithm("v0=", "v0"), Ok(""));
        let unsupported = Err(Reason::UnsupportedScheme);
        for text in ["v1=ab", "=ab", "v00=ab", "V0=ab", "v=0=ab"] {
            assert_eq!(of_algorithm(text, "v0"), unsupported, "{text}");
        }
        for text in ["", "v0", "ab", "v0:ab"] {
            assert_eq!(of_algorithm(text, "v0"), Err(Reason::Malformed), "{text}");
        }
    }

    #[test]
    fn tags_are_32_bytes_written_in_one_way() {
        let tag = Tag::new(std::array::from_fn(|at| at as u8 * 7));
        let value = hex_value("v0=", &tag);
        let text = value.to_str().unwrap().strip_prefix("v0=").unwrap();
        assert_eq!(hex(text), Some(tag));
        assert_eq!(hex(&text.to_uppercase()), None);
        assert_eq!(hex(&text[2..]), None);
        assert_eq!(hex(&format!("{text}00")), None);
        assert_eq!(hex(&text.replace('0', "g")), None);
        assert_eq!(hex(&format!("0x{text}")), None);
        assert_eq!(hex(&format!("0x{}", &text[2..])), None);
        assert_eq!(hex(&format!("0X{}", &text[2..])), None);

        let mut text = Vec::new();
        push_base64(&mut text, &tag);
        let text = String::from_utf8(text).unwrap();
        assert_eq!(base64(&text), Some(tag));
        assert_eq!(base64(text.trim_end_matches('=')), None);
        assert_eq!(base64(&format!("{text}=")), None);
        // The same bytes with a bit left over.
        let last = text.len() - 2;
        let loose = format!("{}{}=", &text[..last], (text.as_bytes()[last] + 1) as char);
        assert_eq!(base64(&loose), None);
    }
}
