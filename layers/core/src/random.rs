//! Randomness that can be injected: jitter, and the choice of who goes first.
//!
//! A backoff without it brings back together all who failed together. What
//! draws from a [`SharedRandom`] spreads them, and in a test does what the test
//! says:
//!
//! ```
//! use std::time::Duration;
//!
//! use buttress_core::random::SharedRandom;
//!
//! let wait = SharedRandom::default().up_to(Duration::from_secs(2));
//! assert!(wait <= Duration::from_secs(2));
//!
//! let always_half = SharedRandom::new(|| 1 << 63);
//! assert_eq!(always_half.up_to(Duration::from_secs(2)), Duration::from_secs(1));
//! ```

use std::{fmt, sync::Arc, time::Duration};

/// A source of random numbers. Not for secrets: the default is no
/// cryptographic generator, and nothing here needs one.
///
/// Shared by every clone of a layer and called on the hot path, outside every
/// lock. Implemented for closures; [`ThreadRandom`] is the default everywhere.
pub trait Random: Send + Sync + 'static {
    /// The next number, uniform over all of `u64`.
    fn next_u64(&self) -> u64;
}

impl<F> Random for F
where
    F: Fn() -> u64 + Send + Sync + 'static,
{
    fn next_u64(&self) -> u64 {
        self()
    }
}

/// The thread's own generator (wyrand, from the `fastrand` crate): each thread
/// is seeded apart, so no two draw the same sequence, and none waits for
/// another.
#[derive(Clone, Copy, Debug, Default)]
pub struct ThreadRandom;

impl Random for ThreadRandom {
    #[inline]
    fn next_u64(&self) -> u64 {
        fastrand::u64(..)
    }
}

/// A [`Random`] shared by the clones of a layer.
#[derive(Clone)]
pub struct SharedRandom(Arc<dyn Random>);

impl SharedRandom {
    /// Shares `random`.
    pub fn new(random: impl Random) -> Self {
        Self(Arc::new(random))
    }

    /// The next number, uniform over all of `u64`.
    #[must_use]
    pub fn next_u64(&self) -> u64 {
        self.0.next_u64()
    }

    /// A time from zero to `span`, both included, uniform: one draw.
    ///
    /// In steps of a nanosecond; of 4.3 seconds where `span` is longer than
    /// 584 years. Scaled by the high half of a product (Lemire, "Fast Random
    /// Integer Generation in an Interval", without its rejection): one step is
    /// more likely than another by at most `span` in nanoseconds / 2⁶⁴, which
    /// for an hour is less than a millionth. The lowest draw gives zero, the
    /// highest `span`.
    #[must_use]
    pub fn up_to(&self, span: Duration) -> Duration {
        let nanos = span.as_nanos();
        let step = if nanos > u128::from(u64::MAX) { 32 } else { 0 };
        // The draw is below 2⁶⁴, the other factor no more than that: it fits.
        let scaled = (u128::from(self.next_u64()) * ((nanos >> step) + 1)) >> 64;
        from_nanos(scaled << step)
    }
}

/// `Duration::from_nanos` for what is longer than 584 years, but no longer than
/// a `Duration`.
fn from_nanos(nanos: u128) -> Duration {
    const SECOND: u128 = 1_000_000_000;
    #[expect(clippy::cast_possible_truncation, reason = "no more than a Duration")]
    Duration::new((nanos / SECOND) as u64, (nanos % SECOND) as u32)
}

impl Default for SharedRandom {
    fn default() -> Self {
        Self::new(ThreadRandom)
    }
}

impl fmt::Debug for SharedRandom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedRandom")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn two_draws_differ_and_so_do_two_threads() {
        let random = SharedRandom::default();
        // 2⁻¹²⁸ for a false alarm.
        let three = [(); 3].map(|()| random.next_u64());
        assert!(three[0] != three[1] || three[1] != three[2]);
        let other = random.clone();
        let theirs = std::thread::spawn(move || [(); 3].map(|()| other.next_u64()));
        assert_ne!(theirs.join().unwrap(), three);
    }

    #[test]
    fn a_closure_rules_it() {
        let drawn = AtomicU64::new(0);
        let counting = SharedRandom::new(move || drawn.fetch_add(1, Ordering::Relaxed) << 62);
        let span = Duration::from_secs(4);
        for secs in 0..4 {
            assert_eq!(counting.up_to(span), Duration::from_secs(secs));
        }
    }

    #[test]
    fn both_ends_are_reached_and_nothing_overflows() {
        let lowest = SharedRandom::new(|| 0);
        let highest = SharedRandom::new(|| u64::MAX);
        for span in [
            Duration::ZERO,
            Duration::from_nanos(1),
            Duration::from_millis(100),
            Duration::from_nanos(u64::MAX),
        ] {
            assert_eq!(lowest.up_to(span), Duration::ZERO);
            assert_eq!(highest.up_to(span), span);
        }
        for span in [
            Duration::from_nanos(u64::MAX) + Duration::from_nanos(1),
            Duration::MAX,
        ] {
            assert_eq!(lowest.up_to(span), Duration::ZERO);
            let high = highest.up_to(span);
            assert!(high <= span && span - high < Duration::from_secs(5));
        }
    }

    #[test]
    fn every_step_is_as_likely() {
        // All the draws there are, in even strides: 0, 1 and 2 ns share them.
        let draw = Arc::new(AtomicU64::new(0));
        let source = Arc::clone(&draw);
        let random = SharedRandom::new(move || source.load(Ordering::Relaxed));
        let mut counts = [0; 3];
        for stride in 0..=u16::MAX {
            draw.store(u64::from(stride) << 48, Ordering::Relaxed);
            counts[random.up_to(Duration::from_nanos(2)).as_nanos() as usize] += 1;
        }
        assert_eq!(counts, [21846, 21845, 21845]);
    }

    proptest! {
        #[test]
        fn never_beyond_the_span(draw: u64, secs: u64, nanos in 0..1_000_000_000_u32) {
            let span = Duration::new(secs, nanos);
            let short = Duration::new(secs % 100, nanos);
            let random = SharedRandom::new(move || draw);
            prop_assert!(random.up_to(span) <= span);
            prop_assert!(random.up_to(short) <= short);
        }
    }
}
