//! Numbers to and from scripts as one flat array of [MessagePack], which is
//! read in a fraction of the time that a reply of as many numbers takes.
//!
//! [MessagePack]: https://github.com/msgpack/msgpack/blob/master/spec.md

/// An array that is being written.
#[derive(Default)]
pub(crate) struct Pack {
    bytes: Vec<u8>,
    len: u32,
}

impl Pack {
    pub(crate) fn push(&mut self, number: u64) {
        self.len += 1;
        if self.bytes.is_empty() {
            // Room for the head, which knows how many there are.
            self.bytes.extend([0xdd, 0, 0, 0, 0]);
        }
        #[expect(clippy::cast_possible_truncation, reason = "each is matched")]
        match number {
            0..=0x7f => self.bytes.push(number as u8),
            0x80..=0xffff => {
                self.bytes.push(0xcd);
                self.bytes.extend((number as u16).to_be_bytes());
            }
            0x1_0000..=0xffff_ffff => {
                self.bytes.push(0xce);
                self.bytes.extend((number as u32).to_be_bytes());
            }
            _ => {
                self.bytes.push(0xcf);
                self.bytes.extend(number.to_be_bytes());
            }
        }
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.bytes[1..5].copy_from_slice(&self.len.to_be_bytes());
        self.bytes
    }
}

/// The numbers of an array, in order; `None` in the place of what is no such
/// array, or none of ours.
pub(crate) fn unpack(bytes: &[u8]) -> Option<Unpack<'_>> {
    let (&head, rest) = bytes.split_first()?;
    let (len, rest) = match head {
        0x90..=0x9f => (u64::from(head & 0xf), rest),
        0xdc => number::<2>(rest)?,
        0xdd => number::<4>(rest)?,
        _ => return None,
    };
    let len = usize::try_from(len).ok()?;
    // Each takes a byte at least: nobody makes us believe in more.
    (len <= rest.len()).then_some(Unpack { rest, len })
}

#[derive(Clone)]
pub(crate) struct Unpack<'a> {
    rest: &'a [u8],
    len: usize,
}

impl Unpack<'_> {
    /// How many are still to come.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn next(&mut self) -> Option<u64> {
        let (&head, rest) = self.rest.split_first()?;
        self.len = self.len.checked_sub(1)?;
        let (number, rest) = match head {
            0..=0x7f => (u64::from(head), rest),
            0xcc => number::<1>(rest)?,
            0xcd => number::<2>(rest)?,
            0xce => number::<4>(rest)?,
            0xcf => number::<8>(rest)?,
            // Less than nothing, parts of one, and everything else.
            _ => return None,
        };
        self.rest = rest;
        Some(number)
    }
}

/// The first `N` bytes as a number, and what is behind them.
fn number<const N: usize>(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<N>()?;
    let number = number
        .iter()
        .fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    Some((number, rest))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn numbers(bytes: &[u8]) -> Option<Vec<u64>> {
        let mut numbers = unpack(bytes)?;
        let len = numbers.len();
        (0..len).map(|_| numbers.next()).collect()
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            all in vec((any::<u64>(), 0..64_u32).prop_map(|(n, shift)| n >> shift), 1..200)
        ) {
            let mut pack = Pack::default();
            all.iter().for_each(|&number| pack.push(number));
            let bytes = pack.finish();
            prop_assert_eq!(numbers(&bytes), Some(all));
            // What was cut is no array.
            prop_assert_eq!(numbers(&bytes[..bytes.len() - 1]), None);
        }

        #[test]
        fn anything_else_is_refused_and_never_a_panic(bytes in vec(any::<u8>(), 0..40)) {
            if let Some(all) = numbers(&bytes) {
                prop_assert!(all.len() < bytes.len());
            }
        }
    }

    #[test]
    fn all_that_the_server_writes_is_read() {
        let short = [0x93, 0x7f, 0xcc, 0x80, 0xcd, 1, 0];
        assert_eq!(numbers(&short), Some(vec![127, 128, 256]));
        assert_eq!(numbers(&[0xdc, 0, 1, 5]), Some(vec![5]));
        // -1, 1.5, nil.
        for not in [
            &[0x91, 0xff][..],
            &[0x91, 0xcb, 63, 248, 0, 0, 0, 0, 0, 0],
            &[0x91, 0xc0],
        ] {
            assert_eq!(numbers(not), None);
        }
        assert_eq!(numbers(&[0xdd, 0xff, 0xff, 0xff, 0xff, 1]), None);
    }
}
