//! The last N calls: a ring of two bits each.
//!
//! A full ring of nothing but good calls looks the same after one more, so
//! that one need not be written: while all is well, a success costs a load.
//! Otherwise a call costs two writes at most: its place in the ring, and its
//! bits if they change.

use buttress_core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, SeqCst},
};

use super::{Mark, Sums, clear, is_later};

/// The longest window.
pub(crate) const MAX_CALLS: u32 = 4096;

const CALLS_A_WORD: u32 = 24;
const WORDS: usize = if cfg!(buttress_loom) {
    2
} else {
    MAX_CALLS.div_ceil(CALLS_A_WORD) as usize
};

/// Generations of a word of bits: the 16 bits above its 48.
const TAG_BITS: u32 = 16;
const BITS: u64 = (1 << 48) - 1;
const FAILED: u64 = 0x5555_5555_5555;
const SLOW: u64 = FAILED << 1;

/// Where the ring stands: `generation:24 at:13 filled:13 good:13`.
#[derive(Clone, Copy)]
struct Ring {
    generation: u64,
    /// The place of the next call.
    at: u32,
    /// Calls that it holds.
    filled: u32,
    /// Good calls since the last that was not, up to the whole ring.
    good: u32,
}

const RING_BITS: u32 = 24;

impl Ring {
    const fn unpack(word: u64) -> Self {
        const FIELD: u32 = (1 << 13) - 1;
        Self {
            generation: word >> 39,
            at: (word >> 26) as u32 & FIELD,
            filled: (word >> 13) as u32 & FIELD,
            good: word as u32 & FIELD,
        }
    }

    const fn pack(self) -> u64 {
        self.generation << 39
            | (self.at as u64) << 26
            | (self.filled as u64) << 13
            | self.good as u64
    }

    const fn empty(generation: u64) -> Self {
        Self {
            generation,
            at: 0,
            filled: 0,
            good: 0,
        }
    }
}

/// A window over the last calls. Two generations are told apart as long as
/// they are fewer than 2¹⁵ apart; what is older has been cleared.
#[derive(Debug)]
pub(crate) struct CallWindow {
    ring: AtomicU64,
    bits: Box<[AtomicU64]>,
}

impl CallWindow {
    pub(crate) fn new() -> Self {
        Self {
            ring: AtomicU64::new(0),
            bits: (0..WORDS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Forgets everything, before `generation` begins.
    pub(crate) fn clear(&self, generation: u32) {
        let generation = u64::from(generation) & ((1 << RING_BITS) - 1);
        for word in &self.bits {
            clear(word, 0);
        }
        clear(&self.ring, Ring::empty(generation).pack());
    }

    /// Notes a call in a window of `length`. Whether that changed anything.
    ///
    /// Threads that take their places in one order may write their bits in
    /// another. One that is held up between the two for as long as the ring
    /// takes to go round marks a place that is another's by then: one result
    /// is lost, and nothing drifts, as the bits are what is counted.
    #[inline]
    pub(crate) fn note(&self, generation: u32, length: u32, mark: Mark) -> bool {
        let seen = self.ring.load(Acquire);
        let ring = Ring::unpack(seen);
        let own = u64::from(generation) & ((1 << RING_BITS) - 1);
        if mark.is_good() && ring.good >= length && ring.generation == own {
            return false;
        }
        self.write(generation, length, mark, seen);
        true
    }

    fn write(&self, generation: u32, length: u32, mark: Mark, mut seen: u64) {
        let own = u64::from(generation) & ((1 << RING_BITS) - 1);
        let place = loop {
            let mut ring = Ring::unpack(seen);
            if ring.generation != own {
                if is_later(ring.generation, own, RING_BITS) {
                    return;
                }
                ring = Ring::empty(own);
            }
            let place = ring.at;
            let next = Ring {
                generation: own,
                at: if place + 1 >= length { 0 } else { place + 1 },
                filled: length.min(ring.filled + 1),
                good: if mark.is_good() {
                    length.min(ring.good + 1)
                } else {
                    0
                },
            };
            match self
                .ring
                .compare_exchange_weak(seen, next.pack(), SeqCst, Acquire)
            {
                Ok(_) => break place,
                Err(now) => seen = now,
            }
        };
        self.mark(generation, place, mark);
        if !mark.is_good() {
            self.keep_writing(generation);
        }
    }

    /// After a call that was not good has left its mark. Were good calls noted
    /// since it took its place, one of them may have passed over the mark
    /// before it was there, and once they fill the ring nobody writes any
    /// more: so their count begins again, and the next round clears the mark.
    fn keep_writing(&self, generation: u32) {
        let own = u64::from(generation) & ((1 << RING_BITS) - 1);
        let mut seen = self.ring.load(SeqCst);
        loop {
            let ring = Ring::unpack(seen);
            if ring.generation != own || ring.good == 0 {
                return;
            }
            let next = Ring { good: 0, ..ring };
            match self
                .ring
                .compare_exchange_weak(seen, next.pack(), SeqCst, SeqCst)
            {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    fn mark(&self, generation: u32, place: u32, mark: Mark) {
        let own = u64::from(generation) & ((1 << TAG_BITS) - 1);
        let word = &self.bits[(place / CALLS_A_WORD) as usize];
        let shift = place % CALLS_A_WORD * 2;
        let wanted = (u64::from(mark.failed) | u64::from(mark.slow) << 1) << shift;
        let mut seen = word.load(Relaxed);
        loop {
            let tag = seen >> 48;
            let bits = if tag == own {
                seen & BITS
            } else if seen != 0 && is_later(tag, own, TAG_BITS) {
                return;
            } else {
                0
            };
            let new = bits & !(0b11 << shift) | wanted;
            // What an earlier generation has left counts as zeroes.
            if new == bits {
                return;
            }
            match word.compare_exchange_weak(seen, own << 48 | new, SeqCst, Relaxed) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// What this generation has noted.
    pub(crate) fn sums(&self, generation: u32, length: u32) -> Sums {
        let ring = Ring::unpack(self.ring.load(SeqCst));
        if ring.generation != u64::from(generation) & ((1 << RING_BITS) - 1) {
            return Sums::default();
        }
        let own = u64::from(generation) & ((1 << TAG_BITS) - 1);
        let mut sums = Sums {
            calls: u64::from(ring.filled),
            ..Sums::default()
        };
        for word in &self.bits[..length.div_ceil(CALLS_A_WORD) as usize] {
            let word = word.load(SeqCst);
            if word >> 48 == own {
                sums.failed += u64::from((word & FAILED).count_ones());
                sums.slow += u64::from((word & SLOW).count_ones());
            }
        }
        sums
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const GOOD: Mark = Mark {
        failed: false,
        slow: false,
    };
    const FAILED: Mark = Mark {
        failed: true,
        slow: false,
    };

    fn model(last: &VecDeque<Mark>) -> Sums {
        let count =
            |which: fn(&Mark) -> bool| last.iter().filter(|mark| which(mark)).count() as u64;
        Sums {
            calls: last.len() as u64,
            failed: count(|mark| mark.failed),
            slow: count(|mark| mark.slow),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn it_holds_the_last_calls(
            length in prop_oneof![1u32..60, Just(100), Just(4096)],
            generation in prop_oneof![Just(0u32), Just(7), Just((1 << 24) - 1), Just((1 << 30) - 1)],
            marks in prop::collection::vec((prop::bool::weighted(0.2), prop::bool::weighted(0.1)), 0..400),
            healthy in prop_oneof![Just(0u32), Just(5000)],
        ) {
            let window = CallWindow::new();
            window.clear(generation);
            let mut last = VecDeque::new();
            for index in 0..healthy + marks.len() as u32 {
                let mark = match index.checked_sub(healthy) {
                    None => GOOD,
                    Some(index) => {
                        let (failed, slow) = marks[index as usize];
                        Mark { failed, slow }
                    }
                };
                window.note(generation, length, mark);
                last.push_back(mark);
                if last.len() > length as usize {
                    last.pop_front();
                }
                if index >= healthy {
                    prop_assert_eq!(window.sums(generation, length), model(&last));
                }
            }
        }
    }

    #[test]
    fn a_healthy_full_window_is_not_written() {
        let window = CallWindow::new();
        for _ in 0..100 {
            window.note(1, 100, GOOD);
        }
        let before = window.ring.load(Relaxed);
        for _ in 0..1000 {
            window.note(1, 100, GOOD);
        }
        assert_eq!(window.ring.load(Relaxed), before);
        for _ in 0..50 {
            window.note(1, 100, FAILED);
        }
        let sums = window.sums(1, 100);
        assert_eq!((sums.calls, sums.failed), (100, 50));
    }

    /// A mark that came late, after the ring had gone round, stayed for as
    /// long as all was well, and then counted beside the next failure.
    #[test]
    fn a_late_mark_goes_with_the_next_round() {
        let window = CallWindow::new();
        let length = 3;
        // It takes its place, and is held up before its mark…
        window.note(1, length, FAILED);
        window.mark(1, 0, GOOD);
        for _ in 0..10 {
            window.note(1, length, GOOD);
        }
        // … which it makes now.
        window.mark(1, 0, FAILED);
        window.keep_writing(1);
        assert_eq!(window.sums(1, length).failed, 1);
        for _ in 0..length {
            window.note(1, length, GOOD);
        }
        assert_eq!(window.sums(1, length).failed, 0);
    }

    #[test]
    fn generations_are_apart() {
        let window = CallWindow::new();
        for _ in 0..30 {
            window.note(5, 100, FAILED);
        }
        assert_eq!(window.sums(6, 100), Sums::default());
        // Without a clear, too: the new one overwrites, the old one cannot.
        window.note(6, 100, GOOD);
        window.note(5, 100, FAILED);
        let sums = window.sums(6, 100);
        assert_eq!((sums.calls, sums.failed), (1, 0));
        window.note(6, 100, FAILED);
        assert_eq!(window.sums(6, 100).failed, 1);
        window.mark(5, 0, FAILED);
        assert_eq!(window.sums(6, 100).failed, 1);
        window.clear(7);
        assert_eq!(window.sums(7, 100), Sums::default());
    }
}
