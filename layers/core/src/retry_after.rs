//! What a callee says about when to come again: `Retry-After` over HTTP
//! (RFC 9110 §10.2.3), `grpc-retry-pushback-ms` over gRPC (gRFC A6).
//!
//! Read so that who waits for what is given here is never early.
//!
//! ```
//! use std::time::Duration;
//!
//! use buttress_core::retry_after::{self, Pushback};
//! use http::HeaderMap;
//!
//! // 1994-11-06 08:49:30.25, on our wall clock.
//! let unix_now = Duration::from_millis(784_111_770_250);
//!
//! let mut headers = HeaderMap::new();
//! headers.insert("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT".parse().unwrap());
//! assert_eq!(retry_after::parse(&headers, unix_now), Some(Duration::from_secs(7)));
//!
//! let mut trailers = HeaderMap::new();
//! trailers.insert("grpc-retry-pushback-ms", "-1".parse().unwrap());
//! assert_eq!(retry_after::pushback(&trailers), Some(Pushback::Never));
//! ```

use std::time::{Duration, UNIX_EPOCH};

use http::{HeaderMap, HeaderValue, header::RETRY_AFTER};

use crate::respond::GRPC_RETRY_PUSHBACK;

/// How long `Retry-After` asks to wait, in whole seconds. `unix_now` is the
/// time since the Unix epoch (a [`WallClock`](crate::clock::WallClock)'s),
/// which only a date needs.
///
/// - Seconds: digits and nothing else. What no `u64` holds is `u64::MAX`
///   seconds, so add with care, and put a ceiling of your own on it.
/// - A date in any of the three forms of RFC 9110 §5.6.7: the time from
///   `unix_now`, rounded up; zero if it is past. By our clock: one that stands
///   apart from the callee's makes the wait that much longer or shorter.
///
/// `None` if there is no such header, or none that says anything: junk, a
/// negative or broken number, a day that never was (a leap second counts as
/// such), several that differ. The same one repeated is one.
#[must_use]
pub fn parse(headers: &HeaderMap, unix_now: Duration) -> Option<Duration> {
    let mut values = headers.get_all(RETRY_AFTER).iter().map(trimmed);
    let value = values.next()?;
    if values.any(|other| other != value) {
        return None;
    }
    let secs = match seconds(value) {
        Some(secs) => secs,
        // From the whole second that we are in: what is left of it is the
        // rounding up.
        None => date(value)?.saturating_sub(unix_now.as_secs()),
    };
    Some(Duration::from_secs(secs))
}

fn trimmed(value: &HeaderValue) -> &[u8] {
    value.as_bytes().trim_ascii()
}

/// `delay-seconds`: 1*DIGIT.
fn seconds(value: &[u8]) -> Option<u64> {
    if value.is_empty() {
        return None;
    }
    value.iter().try_fold(0_u64, |secs, byte| {
        let digit = byte.is_ascii_digit().then(|| byte - b'0')?;
        Some(secs.saturating_mul(10).saturating_add(digit.into()))
    })
}

/// `HTTP-date`, in seconds since the Unix epoch.
fn date(value: &[u8]) -> Option<u64> {
    let date = httpdate::parse_http_date(std::str::from_utf8(value).ok()?).ok()?;
    Some(date.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

/// A gRPC server's word on the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pushback {
    /// Not before this long.
    After(Duration),
    /// Not at all.
    Never,
}

/// What `grpc-retry-pushback-ms` asks for, in a gRPC answer's trailers (in its
/// headers, where it is trailers-only).
///
/// `None` if there is none. As gRFC A6 has it, what is negative or no 32-bit
/// number of milliseconds is [`Never`](Pushback::Never); so are several, as in
/// grpc-go.
#[must_use]
pub fn pushback(headers: &HeaderMap) -> Option<Pushback> {
    let mut values = headers.get_all(GRPC_RETRY_PUSHBACK).iter().map(trimmed);
    let value = values.next()?;
    let millis = std::str::from_utf8(value)
        .ok()
        .filter(|_| values.next().is_none())
        .and_then(|text| text.parse::<i32>().ok())
        .and_then(|millis| u64::try_from(millis).ok());
    Some(match millis {
        Some(millis) => Pushback::After(Duration::from_millis(millis)),
        None => Pushback::Never,
    })
}

#[cfg(test)]
mod tests {
    use http::HeaderName;
    use proptest::prelude::*;

    use super::*;

    fn headers(name: &HeaderName, values: &[&[u8]]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(name, HeaderValue::from_bytes(value).unwrap());
        }
        headers
    }

    /// 1994-11-06 08:49:37: the date of RFC 9110's examples.
    const DATE: u64 = 784_111_777;

    #[test]
    fn retry_after_in_all_its_forms() {
        let now = Duration::from_secs(DATE - 10);
        for (value, expected) in [
            ("0", Some(0)),
            ("120", Some(120)),
            ("007", Some(7)),
            (" 5", Some(5)),
            ("5\t ", Some(5)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", Some(u64::MAX)),
            (
                "99999999999999999999999999999999999999999999",
                Some(u64::MAX),
            ),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(10)),
            ("Sunday, 06-Nov-94 08:49:37 GMT", Some(10)),
            ("Sun Nov  6 08:49:37 1994", Some(10)),
            (" Sun, 06 Nov 1994 08:49:37 GMT ", Some(10)),
            ("Sun, 06 Nov 1994 08:49:27 GMT", Some(0)),
            ("Sun, 06 Nov 1994 08:49:26 GMT", Some(0)),
            ("Thu, 01 Jan 1970 00:00:00 GMT", Some(0)),
            (
                "Fri, 31 Dec 9999 23:59:59 GMT",
                Some(253_402_300_799 - (DATE - 10)),
            ),
            ("", None),
            (" ", None),
            ("-1", None),
            ("+1", None),
            ("1.5", None),
            ("1e3", None),
            ("0x10", None),
            ("5 5", None),
            ("5, 5", None),
            ("5s", None),
            ("soon", None),
            // A Monday that was a Sunday, another zone, a day that never was.
            ("Mon, 06 Nov 1994 08:49:37 GMT", None),
            ("Sun, 06 Nov 1994 08:49:37 CET", None),
            ("Wed, 30 Feb 1994 08:49:37 GMT", None),
            ("1994-11-06T08:49:37Z", None),
        ] {
            let headers = headers(&RETRY_AFTER, &[value.as_bytes()]);
            let expected = expected.map(Duration::from_secs);
            assert_eq!(parse(&headers, now), expected, "{value:?}");
        }
        assert_eq!(parse(&HeaderMap::new(), now), None);
        assert_eq!(parse(&headers(&RETRY_AFTER, &[b"\xff5"]), now), None);
    }

    #[test]
    fn a_date_is_never_early() {
        let headers = headers(&RETRY_AFTER, &[b"Sun, 06 Nov 1994 08:49:37 GMT"]);
        let date = Duration::from_secs(DATE);
        for before in [0, 1, 250, 999, 1000, 1001, 1999, 2000, 86_400_001] {
            let before = Duration::from_millis(before);
            let wait = parse(&headers, date - before).unwrap();
            assert!(wait >= before, "{before:?}");
            assert!(wait < before + Duration::from_secs(1), "{before:?}");
            assert_eq!(wait.subsec_nanos(), 0);
        }
        let late = date + Duration::from_nanos(1);
        assert_eq!(parse(&headers, late), Some(Duration::ZERO));
        assert_eq!(parse(&headers, Duration::MAX), Some(Duration::ZERO));
        assert_eq!(parse(&headers, Duration::ZERO), Some(date));
    }

    #[test]
    fn several_must_agree() {
        for (values, expected) in [
            ([b"5".as_slice(), b"5"], Some(5)),
            ([b"5", b" 5 "], Some(5)),
            ([b"5", b"6"], None),
            ([b"5", b"soon"], None),
            ([b"soon", b"5"], None),
        ] {
            let headers = headers(&RETRY_AFTER, &values);
            let expected = expected.map(Duration::from_secs);
            assert_eq!(parse(&headers, Duration::ZERO), expected, "{values:?}");
        }
    }

    #[test]
    fn pushback_is_a_time_or_never() {
        use Pushback::{After, Never};
        let after = |millis| After(Duration::from_millis(millis));
        for (values, expected) in [
            ([b"0".as_slice()].as_slice(), after(0)),
            (&[b"1500"], after(1500)),
            (&[b" 25 "], after(25)),
            (&[b"2147483647"], after(2_147_483_647)),
            (&[b"2147483648"], Never),
            (&[b"99999999999999999999999"], Never),
            (&[b"-1"], Never),
            (&[b"-2147483649"], Never),
            (&[b""], Never),
            (&[b"soon"], Never),
            (&[b"1.5"], Never),
            (&[b"\xff"], Never),
            (&[b"5", b"6"], Never),
            (&[b"5", b"5"], Never),
        ] {
            let headers = headers(&GRPC_RETRY_PUSHBACK, values);
            assert_eq!(pushback(&headers), Some(expected), "{values:?}");
        }
        assert_eq!(pushback(&HeaderMap::new()), None);
    }

    proptest! {
        /// From the wire: no value is so odd that reading it panics, and
        /// what we send we read again.
        #[test]
        fn any_value_can_be_read(bytes: Vec<u8>, secs: u64, now: Duration) {
            if let Ok(value) = HeaderValue::from_bytes(&bytes) {
                let mut headers = HeaderMap::new();
                headers.insert(RETRY_AFTER, value.clone());
                headers.insert(GRPC_RETRY_PUSHBACK, value);
                let _ = parse(&headers, now);
                let told = pushback(&headers);
                prop_assert!(told.is_some());
            }
            let headers = headers(&RETRY_AFTER, &[secs.to_string().as_bytes()]);
            prop_assert_eq!(parse(&headers, now), Some(Duration::from_secs(secs)));
        }

        #[test]
        fn anything_like_a_date_can_be_read(
            text in "(Sun|Mon|Sunday),? [0-9]{2}[ -](Feb|Nov)[ -][0-9]{2,4} [0-9]{2}:[0-9]{2}:[0-9]{2} (GMT|[0-9]{4})",
        ) {
            let headers = headers(&RETRY_AFTER, &[text.as_bytes()]);
            let wait = parse(&headers, Duration::ZERO);
            prop_assert!(wait.is_none_or(|wait| wait < Duration::from_secs(253_402_300_800)));
        }
    }
}
