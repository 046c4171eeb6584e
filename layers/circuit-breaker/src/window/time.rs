//! The last so long: ten spans of a tenth each, counted apart.
//!
//! What is older than ten spans is not summed, so nothing has to expire and
//! nothing is rescanned: the cost is the same for a hundred calls and for a
//! million. Good calls, of which there are most, are counted in stripes, so
//! that threads do not fight over one cache line; a call costs one write.

use std::time::Duration;

use buttress_core::{
    clock::Instant,
    sync::{
        Padded,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

use super::{
    Mark, Sums, clear, is_later,
    stripe::{OWNED, STRIPES, stripe},
};

/// The shortest window: its spans are no shorter than the tick by which good
/// calls are counted.
pub(crate) const MIN_TIME: Duration = Duration::from_millis(100);

/// Spans in a window: it slides by a tenth. (Fewer for loom, which visits
/// each.)
const SPANS: u64 = if cfg!(buttress_loom) { 2 } else { 10 };
/// A power of two above that.
const RING: usize = if cfg!(buttress_loom) { 4 } else { 16 };

/// A counter: `generation:6 round:30 count:28`. A round is once through the
/// ring, so that spans are told apart for 2³⁴ of them: five years of the
/// shortest.
const COUNT_BITS: u32 = 28;
const COUNT: u64 = (1 << COUNT_BITS) - 1;
const ROUND_BITS: u32 = 30;
const GENERATION_BITS: u32 = 6;

/// Numbers the spans of a window. They are of one length, a hair shorter than a
/// tenth because it divides by multiplying: by a 10⁻⁹ part for a window of
/// minutes, by 2·10⁻⁴ for one of a year.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Epochs(pub(crate) u64);

impl Epochs {
    pub(crate) fn of(window: Duration) -> Self {
        let span = u64::try_from(window.as_nanos()).unwrap_or(u64::MAX) / SPANS;
        Self(u64::MAX / span.max(1) + 1)
    }

    #[inline]
    pub(crate) const fn at(self, now: Instant) -> u64 {
        ((now.as_nanos() as u128 * self.0 as u128) >> 64) as u64
    }
}

/// The kinds of call that are rare enough to be counted in one place.
const RARE: usize = 3;

/// The good calls of one thread, or of a few.
#[derive(Debug)]
struct Stripe {
    ring: [AtomicU64; RING],
    /// Where its owner counted last: in this epoch and generation, at this
    /// place, from this on.
    epoch: AtomicU64,
    generation: AtomicU64,
    place: AtomicUsize,
    none: AtomicU64,
}

impl Stripe {
    fn new() -> Self {
        Self {
            ring: std::array::from_fn(|_| AtomicU64::new(0)),
            epoch: AtomicU64::new(u64::MAX),
            generation: AtomicU64::new(u64::MAX),
            place: AtomicUsize::new(0),
            none: AtomicU64::new(0),
        }
    }

    /// Counts a call, where no other thread does.
    ///
    /// Nearly always in the epoch of the call before. What is asked then is
    /// only whether it is so: the processor guesses that it is, and need not
    /// wait for the clock to know where to count.
    #[inline]
    fn count_alone(&self, generation: u32, epoch: u64) {
        let known = self.epoch.load(Relaxed) == epoch
            && self.generation.load(Relaxed) == u64::from(generation);
        if !known {
            self.enter(generation, epoch);
        }
        let counter = &self.ring[self.place.load(Relaxed) % RING];
        count_alone(counter, self.none.load(Relaxed));
    }

    #[cold]
    fn enter(&self, generation: u32, epoch: u64) {
        self.epoch.store(epoch, Relaxed);
        self.generation.store(generation.into(), Relaxed);
        self.place.store(epoch as usize % RING, Relaxed);
        self.none
            .store(tag(generation, epoch) << COUNT_BITS, Relaxed);
    }
}

#[derive(Debug)]
pub(crate) struct TimeWindow {
    good: Box<[Padded<Stripe>]>,
    /// Failed, slow, both.
    rare: [[AtomicU64; RING]; RARE],
}

impl TimeWindow {
    pub(crate) fn new() -> Self {
        let ring = || std::array::from_fn(|_| AtomicU64::new(0));
        Self {
            good: (0..STRIPES).map(|_| Padded(Stripe::new())).collect(),
            rare: std::array::from_fn(|_| ring()),
        }
    }

    fn counters(&self) -> impl Iterator<Item = &AtomicU64> {
        let good = self.good.iter().flat_map(|stripe| &stripe.ring);
        good.chain(self.rare.iter().flatten())
    }

    /// Forgets everything, before another generation begins.
    pub(crate) fn clear(&self) {
        for counter in self.counters() {
            clear(counter, 0);
        }
    }

    /// Notes a call that ended in this epoch.
    #[inline]
    pub(crate) fn note(&self, generation: u32, epoch: u64, mark: Mark) {
        let place = epoch as usize % RING;
        let counter = match (mark.failed, mark.slow) {
            (false, false) => {
                let stripe = stripe();
                if stripe < OWNED {
                    self.good[stripe].count_alone(generation, epoch);
                    return;
                }
                &self.good[stripe].ring[place]
            }
            (true, false) => &self.rare[0][place],
            (false, true) => &self.rare[1][place],
            (true, true) => &self.rare[2][place],
        };
        count(counter, tag(generation, epoch));
    }

    /// What this generation has noted in the ten epochs up to this one; and in
    /// the next, which another thread may have entered that looked before us:
    /// if we did not see its failure, nobody would see both.
    pub(crate) fn sums(&self, generation: u32, epoch: u64) -> Sums {
        let mut sums = Sums::default();
        for epoch in epoch.saturating_sub(SPANS - 1)..=epoch.saturating_add(1) {
            let place = epoch as usize % RING;
            let tag = tag(generation, epoch);
            let read = |counter: &AtomicU64| {
                let seen = counter.load(SeqCst);
                if seen >> COUNT_BITS == tag {
                    seen & COUNT
                } else {
                    0
                }
            };
            let [failed, slow, both] = [0, 1, 2].map(|kind: usize| read(&self.rare[kind][place]));
            let good: u64 = self
                .good
                .iter()
                .map(|stripe| read(&stripe.ring[place]))
                .sum();
            sums.calls += good + failed + slow + both;
            sums.failed += failed + both;
            sums.slow += slow + both;
        }
        sums
    }
}

/// One more. Not by adding blindly: between the look and the addition the
/// counter may have become another epoch's or another generation's, and what
/// is over must not count there. Nor may it run over into the tag: at a quarter
/// of a thousand million a rate hardly moves any more, and it stays there.
#[inline]
fn count(counter: &AtomicU64, tag: u64) {
    let mut seen = counter.load(Relaxed);
    loop {
        let new = if seen >> COUNT_BITS == tag {
            if seen & COUNT == COUNT {
                return;
            }
            seen + 1
        } else if is_before(tag, seen >> COUNT_BITS) {
            // Held up until the ring had gone round, or its generation was over.
            return;
        } else {
            tag << COUNT_BITS | 1
        };
        match counter.compare_exchange_weak(seen, new, SeqCst, Relaxed) {
            Ok(_) => return,
            Err(now) => seen = now,
        }
    }
}

/// The same, where no other thread counts. What it may write over is a clear
/// between its load and its store: with the tag of the generation before, for
/// which nobody asks any more.
///
/// Relaxed, so that a failure which arms the breaker at this moment may not
/// see it, nor be seen by it: then the next call completes the minimum.
///
/// `none` is what the counter is before its first call.
#[inline]
fn count_alone(counter: &AtomicU64, none: u64) {
    let seen = counter.load(Relaxed);
    if seen.wrapping_sub(none) < COUNT {
        counter.store(seen + 1, Relaxed);
    } else {
        begin_alone(counter, seen, none);
    }
}

/// It was another's, or is as high as it goes.
#[cold]
fn begin_alone(counter: &AtomicU64, seen: u64, none: u64) {
    let (tag, own) = (seen >> COUNT_BITS, none >> COUNT_BITS);
    if tag != own && !is_before(own, tag) {
        counter.store(none | 1, Relaxed);
    }
}

const fn tag(generation: u32, epoch: u64) -> u64 {
    let generation = generation as u64 & ((1 << GENERATION_BITS) - 1);
    // From 1 on, so that no tag of the first rounds reads as vacant.
    let round = (epoch / RING as u64 + 1) & ((1 << ROUND_BITS) - 1);
    generation << ROUND_BITS | round
}

const fn is_before(own: u64, other: u64) -> bool {
    if other == 0 {
        // Vacant.
        return false;
    }
    let generations = (other >> ROUND_BITS, own >> ROUND_BITS);
    if generations.0 == generations.1 {
        // Nobody is held up for so many rounds: what is further ahead is what
        // is left of very long ago.
        let ahead = other.wrapping_sub(own) & ((1 << ROUND_BITS) - 1);
        ahead != 0 && ahead < 1 << 16
    } else {
        is_later(generations.0, generations.1, GENERATION_BITS)
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn it_holds_what_ended_lately(
            window in prop_oneof![Just(10u64), Just(1000), 11u64..100_000],
            start in prop_oneof![Just(0u64), Just(1 << 40), Just((1 << 58) + 12345)],
            generation in prop_oneof![Just(0u32), Just(63), Just((1 << 30) - 1)],
            // Thousandths of the window to pass before each call.
            calls in prop::collection::vec(
                (prop_oneof![4 => 0u64..50, 1 => 0u64..3000], any::<bool>(), any::<bool>()),
                0..300,
            ),
        ) {
            let span = Duration::from_millis(window);
            let epochs = Epochs::of(span);
            let store = TimeWindow::new();
            let mut seen: Vec<(u64, Mark)> = Vec::new();
            let mut now = start;
            for (step, failed, slow) in calls {
                now += step * window * 1000;
                let epoch = epochs.at(Instant::from_nanos(now));
                let mark = Mark { failed, slow };
                store.note(generation, epoch, mark);
                seen.push((now, mark));
                let sums = store.sums(generation, epoch);
                let within = |part: f64| {
                    let nanos = (span.as_nanos() as f64 * part) as u64;
                    let inside = seen.iter().filter(|(at, _)| now - at < nanos);
                    inside.fold(Sums::default(), |sums, (_, mark)| Sums {
                        calls: sums.calls + 1,
                        failed: sums.failed + u64::from(mark.failed),
                        slow: sums.slow + u64::from(mark.slow),
                    })
                };
                // Nine tenths at least, the whole at most.
                let (least, most) = (within(0.899_999), within(1.0));
                prop_assert!(least.calls <= sums.calls && sums.calls <= most.calls);
                prop_assert!(least.failed <= sums.failed && sums.failed <= most.failed);
                prop_assert!(least.slow <= sums.slow && sums.slow <= most.slow);
            }
        }
    }

    const FAILED: Mark = Mark {
        failed: true,
        slow: false,
    };
    const GOOD: Mark = Mark {
        failed: false,
        slow: false,
    };

    #[test]
    fn a_late_call_does_not_spoil_a_newer_span() {
        let window = TimeWindow::new();
        window.note(1, 100, FAILED);
        window.note(1, 116, FAILED);
        window.note(1, 100, FAILED);
        assert_eq!(window.sums(1, 116).failed, 1);
        // Nor one of a generation that is over.
        window.note(2, 116, FAILED);
        window.note(1, 116, FAILED);
        assert_eq!(window.sums(2, 116).failed, 1);
        assert_eq!(window.sums(1, 116).failed, 0);
    }

    #[test]
    fn a_counter_stops_before_it_overflows() {
        let window = TimeWindow::new();
        window.note(3, 5, GOOD);
        let counter = &window.good[stripe()].ring[5];
        counter.store(tag(3, 5) << COUNT_BITS | (COUNT - 1), Relaxed);
        for _ in 0..10 {
            window.note(3, 5, GOOD);
        }
        assert_eq!(window.sums(3, 5).calls, COUNT);
    }

    #[test]
    fn the_cost_does_not_grow_with_the_calls() {
        let window = TimeWindow::new();
        for _ in 0..100_000 {
            window.note(1, 3, GOOD);
        }
        assert_eq!(window.sums(1, 3).calls, 100_000);
        assert_eq!(window.sums(1, 12).calls, 100_000);
        assert_eq!(window.sums(1, 13).calls, 0);
    }
}
