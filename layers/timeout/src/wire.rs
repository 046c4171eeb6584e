//! How much time is left, as it is written in header fields. Pure.
//!
//! `grpc-timeout` is that of gRPC's `PROTOCOL-HTTP2.md`: one to eight digits
//! and a unit.

use std::time::Duration;

/// What eight digits can say is less than this.
const EIGHT_DIGITS: u128 = 100_000_000;

/// From the finest: the letter, and how many nanoseconds it means.
const UNITS: [(u8, u64); 6] = [
    (b'n', 1),
    (b'u', 1_000),
    (b'm', 1_000_000),
    (b'S', 1_000_000_000),
    (b'M', 60_000_000_000),
    (b'H', 3_600_000_000_000),
];

/// A field's value, which is always short ASCII.
#[derive(Clone, Copy)]
pub(crate) struct Text {
    bytes: [u8; Self::LEN],
    start: usize,
}

impl Text {
    /// The digits of a `u64`.
    const LEN: usize = 20;

    fn new(mut number: u64, unit: Option<u8>) -> Self {
        let mut text = Self {
            bytes: [0; Self::LEN],
            start: Self::LEN,
        };
        unit.into_iter().for_each(|unit| text.push_front(unit));
        loop {
            text.push_front(b'0' + (number % 10) as u8);
            number /= 10;
            if number == 0 {
                return text;
            }
        }
    }

    fn push_front(&mut self, byte: u8) {
        self.start -= 1;
        self.bytes[self.start] = byte;
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

/// `left` as `grpc-timeout`: in the finest unit that fits, rounded down. Never
/// zero, and at most 99 999 999 hours.
pub(crate) fn write_grpc(left: Duration) -> Text {
    let nanos = left.as_nanos().max(1);
    let most = EIGHT_DIGITS - 1;
    let (number, unit) = UNITS
        .iter()
        .map(|(letter, unit)| (nanos / u128::from(*unit), *letter))
        .find(|(number, _)| *number <= most)
        .unwrap_or((most, b'H'));
    Text::new(u64::try_from(number).unwrap_or(u64::MAX), Some(unit))
}

/// What `grpc-timeout` says; `None` if it is not as the specification has it.
///
/// Zero is read, although the specification asks for a positive number: grpc-go
/// sends it where nothing is left.
pub(crate) fn read_grpc(value: &[u8]) -> Option<Duration> {
    let (letter, number) = value.split_last()?;
    let (_, unit) = UNITS.iter().find(|(name, _)| name == letter)?;
    if number.len() > 8 {
        return None;
    }
    // 99 999 999 hours are more nanoseconds than fit.
    let nanos = u128::from(read_digits(number)?) * u128::from(*unit);
    let secs = u64::try_from(nanos / 1_000_000_000).ok()?;
    let rest = u32::try_from(nanos % 1_000_000_000).ok()?;
    Some(Duration::new(secs, rest))
}

/// `left` in whole milliseconds, rounded down, but never zero.
pub(crate) fn write_millis(left: Duration) -> Text {
    let millis = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
    Text::new(millis.max(1), None)
}

/// What a number of milliseconds says: digits and nothing else. One that no
/// `u64` holds is the largest.
pub(crate) fn read_millis(value: &[u8]) -> Option<Duration> {
    read_digits(value.trim_ascii()).map(Duration::from_millis)
}

/// 1*DIGIT, saturating.
fn read_digits(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| byte - b'0')?;
        Some(number.saturating_mul(10).saturating_add(digit.into()))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(written: Text) -> String {
        String::from_utf8(written.as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn the_finest_unit_that_fits_is_written() {
        let secs = Duration::from_secs;
        for (left, expected) in [
            (Duration::ZERO, "1n"),
            (Duration::from_nanos(1), "1n"),
            (Duration::from_nanos(99_999_999), "99999999n"),
            (Duration::from_nanos(100_000_000), "100000u"),
            (Duration::from_nanos(100_000_999), "100000u"),
            (secs(1), "1000000u"),
            (secs(99), "99000000u"),
            (secs(100), "100000m"),
            (secs(99_999), "99999000m"),
            (secs(100_000), "100000S"),
            (secs(100_000_000), "1666666M"),
            (secs(6_000_000_000), "1666666H"),
            (Duration::MAX, "99999999H"),
        ] {
            assert_eq!(text(write_grpc(left)), expected, "{left:?}");
        }
    }

    #[test]
    fn what_the_specification_allows_is_read() {
        for (value, expected) in [
            ("1n", Some(Duration::from_nanos(1))),
            ("250m", Some(Duration::from_millis(250))),
            ("007u", Some(Duration::from_micros(7))),
            ("1S", Some(Duration::from_secs(1))),
            ("2M", Some(Duration::from_secs(120))),
            ("3H", Some(Duration::from_secs(10_800))),
            ("99999999H", Some(Duration::from_secs(359_999_996_400))),
            ("0n", Some(Duration::ZERO)),
            ("", None),
            ("S", None),
            ("1", None),
            ("1s", None),
            ("1h", None),
            ("1ms", None),
            ("-1S", None),
            ("+1S", None),
            ("1.5S", None),
            ("1 S", None),
            (" 1S", None),
            ("1S ", None),
            ("100000000n", None),
            ("000000001S", None),
            ("1e3n", None),
        ] {
            assert_eq!(read_grpc(value.as_bytes()), expected, "{value:?}");
        }
    }

    #[test]
    fn milliseconds_are_whole_and_never_none() {
        for (left, expected) in [
            (Duration::ZERO, "1"),
            (Duration::from_micros(1), "1"),
            (Duration::from_micros(1_999), "1"),
            (Duration::from_secs(30), "30000"),
            (Duration::MAX, "18446744073709551615"),
        ] {
            assert_eq!(text(write_millis(left)), expected, "{left:?}");
        }
        for (value, expected) in [
            ("0", Some(0)),
            ("1500", Some(1500)),
            (" 25 ", Some(25)),
            ("99999999999999999999999", Some(u64::MAX)),
            ("", None),
            ("-1", None),
            ("1.5", None),
            ("1500ms", None),
        ] {
            let expected = expected.map(Duration::from_millis);
            assert_eq!(read_millis(value.as_bytes()), expected, "{value:?}");
        }
    }

    /// Small ones as likely as large ones.
    fn spans() -> impl Strategy<Value = Duration> {
        (any::<u64>(), 0_u32..64, 0_u32..1_000_000_000)
            .prop_map(|(secs, shift, nanos)| Duration::new(secs >> shift, nanos))
    }

    proptest! {
        /// An upstream is never promised more than is left, and loses less
        /// than one in a hundred thousand of it, unless it is told the most there is.
        #[test]
        fn what_is_written_is_read_and_never_longer(left in spans()) {
            let written = write_grpc(left);
            prop_assert!(written.as_bytes().len() <= 9);
            let read = read_grpc(written.as_bytes()).unwrap();
            prop_assert!(!read.is_zero());
            prop_assert!(read <= left.max(Duration::from_nanos(1)));
            let most = Duration::from_secs(99_999_999 * 3600);
            let lost = left.min(most) - read.min(left);
            prop_assert!(lost.as_nanos() <= left.as_nanos() / 100_000, "{lost:?}");

            let read = read_millis(write_millis(left).as_bytes()).unwrap();
            prop_assert!(!read.is_zero());
            prop_assert!(read <= left.max(Duration::from_millis(1)));
        }

        /// What every unit says exactly is written so that it says the same.
        #[test]
        fn what_is_read_is_written_as_the_same(number in 1_u32..100_000_000, unit in 0..6_usize) {
            let value = format!("{number}{}", char::from(UNITS[unit].0));
            let read = read_grpc(value.as_bytes()).unwrap();
            prop_assert_eq!(read_grpc(write_grpc(read).as_bytes()), Some(read));
        }

        #[test]
        fn any_bytes_can_be_read(bytes: Vec<u8>) {
            let _ = read_millis(&bytes);
            if let Some(read) = read_grpc(&bytes) {
                let text = std::str::from_utf8(&bytes).unwrap();
                let number: u64 = text[..text.len() - 1].parse().unwrap();
                prop_assert!(read >= Duration::from_nanos(number));
            }
        }

        #[test]
        fn anything_like_it_can_be_read(text in "[0-9]{0,10}[numSMHx]?") {
            let digits = text.trim_end_matches(|last: char| !last.is_ascii_digit()).len();
            let good = (1..=8).contains(&digits) && !text.ends_with('x') && digits < text.len();
            prop_assert_eq!(read_grpc(text.as_bytes()).is_some(), good);
            let _ = read_millis(text.as_bytes());
        }
    }
}
