//! Reading and writing what schemes have in common.

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{Reason, Tag, mac::TAG, scheme::LONGEST_ID};

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
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Reason::Malformed);
    }
    if text.len() > 1 && text.starts_with('0') {
        return Err(Reason::Malformed);
    }
    text.parse().map_err(|_| Reason::Malformed)
}

/// An id as it may be signed and kept: printable, and not endless.
pub(crate) fn is_id(text: &str) -> bool {
    (1..=LONGEST_ID).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Small letters only, as all who publish a scheme write and accept.
pub(crate) fn hex(text: &str) -> Option<Tag> {
    let mut tag = [0; TAG];
    if text.len() != TAG * 2 {
        return None;
    }
    base16ct::lower::decode(text, &mut tag).ok()?;
    Some(Tag::new(tag))
}

/// Padded, and with no bits left over.
pub(crate) fn base64(text: &str) -> Option<Tag> {
    // The decoder wants room for whole groups.
    let mut room = [0; TAG + 4];
    if text.len() != TAG.div_ceil(3) * 4 {
        return None;
    }
    let count = BASE64_STANDARD.decode_slice(text, &mut room).ok()?;
    let tag = room.get(..count)?.try_into().ok()?;
    Some(Tag::new(tag))
}

/// `prefix` and the tag in hexadecimal.
pub(crate) fn hex_value(prefix: &str, tag: &Tag) -> HeaderValue {
    let mut digits = [0; TAG * 2];
    base16ct::lower::encode(tag.as_bytes(), &mut digits).expect("there is room for each byte");
    let mut value = Vec::with_capacity(prefix.len() + digits.len());
    value.extend_from_slice(prefix.as_bytes());
    value.extend_from_slice(&digits);
    header(value)
}

/// Appends the tag in base64.
pub(crate) fn push_base64(to: &mut String, tag: &Tag) {
    BASE64_STANDARD.encode_string(tag.as_bytes(), to);
}

/// What was put together from ASCII.
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
    fn tags_are_32_bytes_written_in_one_way() {
        let tag = Tag::new(std::array::from_fn(|at| at as u8 * 7));
        let value = hex_value("v0=", &tag);
        let text = value.to_str().unwrap().strip_prefix("v0=").unwrap();
        assert_eq!(hex(text), Some(tag));
        assert_eq!(hex(&text.to_uppercase()), None);
        assert_eq!(hex(&text[2..]), None);
        assert_eq!(hex(&format!("{text}00")), None);
        assert_eq!(hex(&text.replace('0', "g")), None);

        let mut text = String::new();
        push_base64(&mut text, &tag);
        assert_eq!(base64(&text), Some(tag));
        assert_eq!(base64(text.trim_end_matches('=')), None);
        assert_eq!(base64(&format!("{text}=")), None);
        // The same bytes with a bit left over.
        let last = text.len() - 2;
        let loose = format!("{}{}=", &text[..last], (text.as_bytes()[last] + 1) as char);
        assert_eq!(base64(&loose), None);
    }
}
