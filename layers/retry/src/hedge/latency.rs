//! The latencies of lately, and their percentile: what a hedge waits for. Pure:
//! what time it is, is an argument.
//!
//! A histogram with buckets of logarithmic width, each octave in 32 of equal
//! width (as HdrHistogram's), in two halves that take turns: one fills while
//! the other holds what was before, so that what is known is between a half
//! and the whole of the window old. (tower's `hedge` has two too, and knows
//! only what is in the older.) To record is two increments, and the percentile
//! is worked out anew only when a sixteenth of what there is came since.

use std::{fmt, time::Duration};

use buttress_core::{
    clock::Instant,
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// An octave has 2⁵ buckets: none is wider than a 32nd of where it begins.
/// (Fewer for loom, which visits each.)
const SUB_BITS: u32 = if cfg!(buttress_loom) { 1 } else { 5 };
const SUBS: usize = 1 << SUB_BITS;
/// Longer ones count as this: 71 minutes.
const LONGEST_BITS: u32 = if cfg!(buttress_loom) { 2 } else { 32 };
const LONGEST: u64 = (1 << LONGEST_BITS) - 1;
const BUCKETS: usize = SUBS * (LONGEST_BITS - SUB_BITS + 1) as usize;

/// Fewer say nothing.
pub(super) const MIN_SAMPLES: u64 = 20;

/// Of a half that someone is emptying.
const EMPTYING: u64 = u64::MAX;

/// In microseconds: finer than any timer.
fn bucket(latency: Duration) -> usize {
    let micros = u64::try_from(latency.as_micros()).unwrap_or(LONGEST);
    let micros = micros.min(LONGEST);
    let bits = u64::BITS - micros.leading_zeros();
    let shift = bits.saturating_sub(SUB_BITS + 1);
    shift as usize * SUBS + (micros >> shift) as usize
}

/// Where the bucket ends.
fn end(bucket: usize) -> Duration {
    let shift = (bucket / SUBS).saturating_sub(1);
    let sub = (bucket - shift * SUBS) as u64;
    Duration::from_micros((sub + 1) << shift)
}

struct Half {
    /// The half of a window that it counts, numbered from the clock's zero.
    epoch: AtomicU64,
    count: AtomicU64,
    buckets: Box<[AtomicU32]>,
}

impl Half {
    fn new(epoch: u64) -> Self {
        Self {
            epoch: AtomicU64::new(epoch),
            count: AtomicU64::new(0),
            buckets: (0..BUCKETS).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// Whether it counts this epoch, which it does once someone is in it. Who
    /// comes while another empties it, or after its time, goes uncounted.
    fn enter(&self, epoch: u64) -> bool {
        let was = self.epoch.load(Acquire);
        if was == epoch {
            return true;
        }
        let old = was != EMPTYING && was < epoch;
        if !old
            || self
                .epoch
                .compare_exchange(was, EMPTYING, Acquire, Relaxed)
                .is_err()
        {
            return false;
        }
        for bucket in &self.buckets {
            bucket.store(0, Relaxed);
        }
        self.count.store(0, Relaxed);
        self.epoch.store(epoch, Release);
        true
    }
}

/// Latencies of the last half to whole window. Memory is fixed: 7 KiB.
pub(super) struct Latencies {
    half: u64,
    halves: [Half; 2],
    /// The last result, in nanoseconds, and what it was drawn from. Two threads
    /// that write at once leave a mixture, which is as good for as long.
    known: AtomicU64,
    known_in: AtomicU64,
    known_of: AtomicU64,
    known_percentile: AtomicU64,
}

impl Latencies {
    pub(super) fn new(window: Duration) -> Self {
        let window = u64::try_from(window.as_nanos()).unwrap_or(u64::MAX);
        Self {
            half: (window / 2).max(1),
            halves: [Half::new(0), Half::new(1)],
            known: AtomicU64::new(0),
            known_in: AtomicU64::new(EMPTYING),
            known_of: AtomicU64::new(0),
            known_percentile: AtomicU64::new(0),
        }
    }

    const fn epoch(&self, now: Instant) -> u64 {
        now.as_nanos() / self.half
    }

    pub(super) fn record(&self, latency: Duration, now: Instant) {
        let epoch = self.epoch(now);
        let half = &self.halves[(epoch % 2) as usize];
        if half.enter(epoch) {
            half.buckets[bucket(latency)].fetch_add(1, Relaxed);
            half.count.fetch_add(1, Relaxed);
        }
    }

    /// Those that count now.
    fn live(&self, epoch: u64) -> impl Iterator<Item = &Half> + Clone {
        let counts = move |half: &&Half| {
            let of = half.epoch.load(Acquire);
            of == epoch || of.wrapping_add(1) == epoch
        };
        self.halves.iter().filter(counts)
    }

    /// The least time that so large a part of the latencies does not exceed:
    /// never less than it is, more by at most a 32nd and a microsecond; of
    /// latencies of which a 16th may be missing. `None` of fewer than
    /// [`MIN_SAMPLES`]. `percentile` is above 0 and below 1.
    pub(super) fn percentile(&self, percentile: f64, now: Instant) -> Option<Duration> {
        let epoch = self.epoch(now);
        let live = self.live(epoch);
        let count: u64 = live.clone().map(|half| half.count.load(Relaxed)).sum();
        if count < MIN_SAMPLES {
            return None;
        }
        let new = count.saturating_sub(self.known_of.load(Relaxed));
        let known = self.known_in.load(Relaxed) == epoch
            && self.known_percentile.load(Relaxed) == percentile.to_bits();
        if known && new <= count / 16 {
            return Some(Duration::from_nanos(self.known.load(Relaxed)));
        }
        let found = scan(percentile, &live)?;
        let nanos = u64::try_from(found.as_nanos()).unwrap_or(u64::MAX);
        self.known.store(nanos, Relaxed);
        self.known_of.store(count, Relaxed);
        self.known_percentile.store(percentile.to_bits(), Relaxed);
        self.known_in.store(epoch, Relaxed);
        Some(found)
    }
}

#[cold]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "above 2⁵³ latencies in a minute one more or less is nothing"
)]
fn scan<'a>(percentile: f64, live: &(impl Iterator<Item = &'a Half> + Clone)) -> Option<Duration> {
    let at = |bucket: usize| {
        let counts = live.clone().map(move |half| &half.buckets[bucket]);
        counts.map(|count| u64::from(count.load(Relaxed))).sum()
    };
    // Not the count, which others may be ahead of.
    let mut sums = [0_u64; BUCKETS];
    for (bucket, sum) in sums.iter_mut().enumerate() {
        *sum = at(bucket);
    }
    let total: u64 = sums.iter().sum();
    let rank = ((percentile * total as f64).ceil() as u64).max(1);
    let mut below = 0;
    let found = sums.iter().position(|sum| {
        below += sum;
        below >= rank
    });
    found.map(end)
}

impl fmt::Debug for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Latencies")
            .field("window", &Duration::from_nanos(self.half.saturating_mul(2)))
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, buttress_loom))]
mod loom_tests;
#[cfg(all(test, not(buttress_loom)))]
mod tests;
