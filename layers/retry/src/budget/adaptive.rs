//! Google's client-side throttle: the less was accepted lately, the less is
//! asked again.

use std::time::Duration;

use buttress_core::{
    classify::Verdict,
    clock::{self, Instant},
    random::{Random, SharedRandom},
    sync::{
        Padded,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::Budget;
use crate::error::ConfigError;

/// Spans in a window: it slides by a tenth.
const SPANS: u64 = 10;
/// A power of two above that.
pub(super) const RING: usize = 16;

const COUNT_BITS: u32 = 32;
const COUNT: u64 = (1 << COUNT_BITS) - 1;

/// Adaptive throttling: a retry is refused with the probability
///
/// ```text
/// max(0, (requests − K · accepts) / (requests + 1))
/// ```
///
/// where `requests` is how many attempts there were lately and `accepts` how
/// many of them succeeded. With K = 2 nothing is refused until more than half
/// of them fail. By default K is 2 and lately the last two minutes, sliding by
/// a tenth.
///
/// Attempts are counted when they begin, not when they end: those that hang
/// are what matters most. One that leave is asked for counts too when it is
/// refused, as in the book, so that asking in vain makes it rarer yet. One that
/// ends [ignored](Verdict::Ignored) is taken back.
///
/// It bounds how much is retried only on the whole, not in any moment. Each
/// request, and each outcome, is a look at a coarse clock and an atomic
/// exchange; what is asked costs the same whatever the window holds.
///
/// Source: "Site Reliability Engineering", Google 2016, chapter 21, "Handling
/// Overload". There it refuses first attempts as well; that is a breaker's work
/// here.
#[derive(Debug)]
pub struct Adaptive {
    requests: Padded<Ring>,
    accepts: Padded<Ring>,
    ignored: Padded<Ring>,
    multiplier: u32,
    /// How long a tenth of the window is, in nanoseconds.
    span: u64,
    random: SharedRandom,
}

impl Adaptive {
    /// With K in thousandths, from 1000 (one) to a million, and a window of a
    /// second to a day.
    ///
    /// # Errors
    ///
    /// When either is out of its range.
    pub fn new(multiplier_thousandths: u32, window: Duration) -> Result<Self, ConfigError> {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        if !(1000..=1_000_000).contains(&multiplier_thousandths) {
            return Err(ConfigError::new(
                "the multiplier of an adaptive throttle is below 1 or above 1000",
            ));
        }
        if !(Duration::from_secs(1)..=DAY).contains(&window) {
            return Err(ConfigError::new(
                "the window of an adaptive throttle is below a second or above a day",
            ));
        }
        Ok(Self::with(multiplier_thousandths, window))
    }

    fn with(multiplier: u32, window: Duration) -> Self {
        // The first reading of a process calibrates: not while it serves.
        let _ = clock::recent();
        Self {
            requests: Padded(Ring::new()),
            accepts: Padded(Ring::new()),
            ignored: Padded(Ring::new()),
            multiplier,
            span: u64::try_from(window.as_nanos()).unwrap_or(u64::MAX) / SPANS,
            random: SharedRandom::default(),
        }
    }

    /// What decides who is refused. Default: the thread's own generator.
    #[must_use]
    pub fn random(mut self, random: impl Random) -> Self {
        self.random = SharedRandom::new(random);
        self
    }

    /// How likely a retry is refused now: from 0 to below 1.
    #[must_use]
    pub fn refusal_probability(&self) -> f64 {
        let (requests, accepts) = self.sums(clock::recent());
        Chance::new(requests, accepts, self.multiplier).probability()
    }

    pub(super) fn request_at(&self, now: Instant) {
        self.requests.count(self.epoch(now));
    }

    pub(super) fn withdraw_at(&self, now: Instant) -> bool {
        let (requests, accepts) = self.sums(now);
        self.requests.count(self.epoch(now));
        let chance = Chance::new(requests, accepts, self.multiplier);
        // No draw where it is certain.
        chance.refused == 0 || !chance.refuses(self.random.next_u64())
    }

    pub(super) fn outcome_at(&self, verdict: Verdict, now: Instant) {
        let ring = match verdict {
            Verdict::Success => &self.accepts,
            Verdict::Ignored => &self.ignored,
            Verdict::Failure => return,
        };
        ring.count(self.epoch(now));
    }

    /// Attempts, without the ignored ones, and those accepted.
    pub(super) fn sums(&self, now: Instant) -> (u64, u64) {
        let epoch = self.epoch(now);
        let requests = self.requests.sum(epoch);
        let ignored = self.ignored.sum(epoch);
        (requests.saturating_sub(ignored), self.accepts.sum(epoch))
    }

    #[inline]
    fn epoch(&self, now: Instant) -> u64 {
        now.as_nanos() / self.span
    }
}

impl Budget for Adaptive {
    #[inline]
    fn request(&self) {
        self.request_at(clock::recent());
    }

    fn withdraw(&self) -> bool {
        self.withdraw_at(clock::recent())
    }

    #[inline]
    fn outcome(&self, verdict: Verdict) {
        if verdict != Verdict::Failure {
            self.outcome_at(verdict, clock::recent());
        }
    }
}

impl Default for Adaptive {
    fn default() -> Self {
        Self::with(2000, Duration::from_secs(120))
    }
}

/// The probability `refused / of`, whole numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chance {
    pub(super) refused: u64,
    pub(super) of: u64,
}

impl Chance {
    pub(super) const fn new(requests: u64, accepts: u64, multiplier: u32) -> Self {
        // Eleven counts of 32 bits, a thousand times a thousand: 56 bits.
        let accepted = accepts.saturating_mul(multiplier as u64);
        Self {
            refused: (requests.saturating_mul(1000)).saturating_sub(accepted),
            of: (requests + 1).saturating_mul(1000),
        }
    }

    /// Of all the draws there are, this part.
    pub(super) const fn refuses(self, draw: u64) -> bool {
        (draw as u128 * self.of as u128) < (self.refused as u128) << 64
    }

    #[expect(clippy::cast_precision_loss, reason = "for people to look at")]
    fn probability(self) -> f64 {
        self.refused as f64 / self.of as f64
    }
}

/// Counts by spans: `epoch:32 count:32` each. What is older than the window is
/// not summed, so nothing has to expire. An epoch is told apart from others for
/// 2³² of them: 13 years of the shortest.
#[derive(Debug)]
pub(super) struct Ring([AtomicU64; RING]);

impl Ring {
    pub(super) fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    #[inline]
    fn place(&self, epoch: u64) -> &AtomicU64 {
        &self.0[epoch as usize % RING]
    }

    /// One more in this epoch. Not by adding blindly: between the look and the
    /// addition the place may have become another epoch's.
    #[inline]
    pub(super) fn count(&self, epoch: u64) {
        let own = epoch & COUNT;
        let next = |seen: u64| {
            let tag = seen >> COUNT_BITS;
            if seen & COUNT == 0 {
                return Some(own << COUNT_BITS | 1);
            }
            match tag.wrapping_sub(own) & COUNT {
                // It stops before it runs over into the tag.
                0 if seen & COUNT == COUNT => None,
                0 => Some(seen + 1),
                // Whoever was held up until the ring had gone round is too
                // late. (Further ahead is what was left 13 years ago.)
                1..0x1_0000 => None,
                _ => Some(own << COUNT_BITS | 1),
            }
        };
        let _ = self.place(epoch).fetch_update(Relaxed, Relaxed, next);
    }

    /// What was counted in the window that ends with this epoch.
    pub(super) fn sum(&self, epoch: u64) -> u64 {
        (epoch.saturating_sub(SPANS - 1)..=epoch)
            .map(|epoch| {
                let seen = self.place(epoch).load(Relaxed);
                let own = seen >> COUNT_BITS == epoch & COUNT;
                if own { seen & COUNT } else { 0 }
            })
            .sum()
    }
}
