//! The generic cell rate algorithm, exact and pure.
//!
//! A key's whole state is one [`Tat`], its *theoretical arrival time*: when its
//! quota will be whole again. With interval τ = period / limit, burst B and
//! cost c, a request at `now` would move it to
//!
//! ```text
//! x = max(TAT, now) + c·τ        and passes iff x − B·τ ≤ now
//! ```
//!
//! A request that passes stores x; one that does not stores nothing, so that
//! knocking on a closed door keeps it shut no longer. That is a token bucket
//! without a timer that refills it: B − (TAT − now)/τ tokens are in it.
//!
//! τ is a rational number of nanoseconds, so a `Tat` is whole nanoseconds and a
//! fraction whose denominator is the quota's. Rounding τ to nanoseconds (as
//! governor 0.10 does) would let a limit of 3 in a second have only two back
//! after a second, and drift at high rates by more.
//!
//! Source: ITU-T I.371 (virtual scheduling), as told by redis-cell 0.4 and
//! governor 0.10; the arithmetic is our own.

use std::time::Duration;

use crate::error::ConfigError;

/// Bits of the fraction: denominators up to 2²⁰.
pub(crate) const FRACTION_BITS: u32 = 20;
const MAX_DENOMINATOR: u32 = 1 << FRACTION_BITS;
/// Bits of the whole nanoseconds in a packed `Tat`: 36 years of clock.
const NANOS_BITS: u32 = 60;
/// Bits of the fraction beside them in one word.
const LOW_BITS: u32 = u64::BITS - NANOS_BITS;
const LOW_MASK: u32 = (1 << LOW_BITS) - 1;
/// A quota must be whole again within a quarter of that.
const MAX_TOLERANCE: u64 = 1 << 58;

/// A length or a point of time: nanoseconds and a fraction of one, whose
/// denominator is that of the quota it is used with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tat {
    nanos: u64,
    fraction: u32,
}

impl Tat {
    /// The same distance from `to` as it has from `from`.
    #[cfg(feature = "redis")]
    pub(crate) fn moved(self, from: u64, to: u64) -> Self {
        Self {
            nanos: self.nanos.saturating_sub(from).saturating_add(to),
            fraction: self.fraction,
        }
    }

    pub(crate) const fn at(nanos: u64) -> Self {
        Self { nanos, fraction: 0 }
    }

    /// In 80 bits: the nanoseconds in the lower word, so that a shift gets
    /// them out again, and the fraction around them.
    #[inline]
    pub(crate) const fn pack(self) -> u128 {
        debug_assert!(self.nanos >> NANOS_BITS == 0 && self.fraction < MAX_DENOMINATOR);
        let low = (self.nanos << LOW_BITS) | (self.fraction & LOW_MASK) as u64;
        let high = self.fraction >> LOW_BITS;
        ((high as u128) << u64::BITS) | low as u128
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "that is how it was packed")]
    pub(crate) const fn unpack(bits: u128) -> Self {
        let (low, high) = (bits as u64, (bits >> u64::BITS) as u32);
        let high = high & ((1 << (FRACTION_BITS - LOW_BITS)) - 1);
        Self {
            nanos: low >> LOW_BITS,
            fraction: (high << LOW_BITS) | (low as u32 & LOW_MASK),
        }
    }

    /// Whether it lies in the future: the quota is not whole.
    #[inline]
    pub(crate) const fn is_after(self, now: u64) -> bool {
        self.nanos > now || (self.nanos == now && self.fraction > 0)
    }

    /// Whole nanoseconds, rounded up.
    #[inline]
    pub(crate) const fn nanos_up(self) -> u64 {
        self.nanos + (self.fraction > 0) as u64
    }
}

/// A length of time as it is told to Redis: whole microseconds, and what is
/// left in parts, of which a nanosecond has as many as the quota's denominator.
#[cfg(feature = "redis")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) micros: u64,
    pub(crate) rest: u64,
}

/// A checked quota with its constants: the algorithm itself. Made by
/// [`Quota::check`](crate::Quota::check), cheap to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gcra {
    limit: u32,
    burst: u32,
    /// The period, in nanoseconds.
    period: u64,
    /// τ = numerator / denominator nanoseconds, in lowest terms.
    numerator: u64,
    denominator: u32,
    /// τ and B·τ.
    interval: Tat,
    tolerance: Tat,
}

/// What the algorithm says of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ruling {
    /// It passes, if `tat` is stored.
    Pass { tat: Tat },
    /// It may pass in `wait` nanoseconds. `heal` is to be stored in any case:
    /// the state was further ahead than this quota can ever be (the quota was
    /// replaced), and the wait holds only for the state put right.
    Wait { wait: u64, heal: Option<Tat> },
    /// It costs more than the burst.
    Never,
}

impl Gcra {
    pub(crate) const fn new(limit: u32, period: Duration, burst: u32) -> Result<Self, ConfigError> {
        let nanos = period.as_nanos();
        if nanos > MAX_TOLERANCE as u128 {
            return Err(ConfigError::TooSlow);
        }
        #[expect(clippy::cast_possible_truncation, reason = "checked above")]
        let period = nanos as u64;
        if period < limit as u64 {
            return Err(ConfigError::TooFast);
        }
        let divisor = gcd(period, limit as u64);
        let mut numerator = period / divisor;
        #[expect(clippy::cast_possible_truncation, reason = "not above the limit")]
        let mut denominator = (limit as u64 / divisor) as u32;
        if denominator > MAX_DENOMINATOR {
            // Too fine to keep: the interval is rounded up, by less than a
            // millionth of a nanosecond, so that the bound still holds.
            let scaled = (numerator as u128) << FRACTION_BITS;
            #[expect(clippy::cast_possible_truncation, reason = "τ < 2⁴⁰ for such limits")]
            {
                numerator = scaled.div_ceil(denominator as u128) as u64;
            }
            denominator = MAX_DENOMINATOR;
        }
        let (interval, tolerance) = match (
            product(numerator, denominator, 1),
            product(numerator, denominator, burst),
        ) {
            (Some(interval), Some(tolerance)) if tolerance.nanos <= MAX_TOLERANCE => {
                (interval, tolerance)
            }
            _ => return Err(ConfigError::TooSlow),
        };
        Ok(Self {
            limit,
            burst,
            period,
            numerator,
            denominator,
            interval,
            tolerance,
        })
    }

    /// How many requests come back in a period.
    #[must_use]
    pub const fn limit(&self) -> u32 {
        self.limit
    }

    /// How many may come at once.
    #[must_use]
    pub const fn burst(&self) -> u32 {
        self.burst
    }

    /// In how long `limit` requests come back.
    #[must_use]
    pub const fn period(&self) -> Duration {
        Duration::from_nanos(self.period)
    }

    /// How long an empty quota takes to be whole, rounded up to nanoseconds.
    #[must_use]
    pub const fn time_to_full(&self) -> Duration {
        Duration::from_nanos(self.tolerance.nanos_up())
    }

    /// Rules on a request of cost `cost` at `now`. `tat` is the key's state;
    /// a key never seen before has the zero.
    #[inline]
    pub(crate) fn decide(&self, tat: Tat, now: u64, cost: u32) -> Ruling {
        match self.pass(tat, now, cost) {
            Some(tat) => Ruling::Pass { tat },
            None => self.refuse(tat, now, cost),
        }
    }

    /// What is to be stored, if it passes.
    #[inline(always)]
    pub(crate) fn pass(&self, tat: Tat, now: u64, cost: u32) -> Option<Tat> {
        let start = self.clamp(tat, now);
        let arrival = self.plus(start, self.times(cost));
        let debt = Tat {
            nanos: arrival.nanos - now,
            fraction: arrival.fraction,
        };
        // One comparison nearly always, in place of two.
        let passes = debt.nanos < self.tolerance.nanos || debt <= self.tolerance;
        passes.then_some(arrival)
    }

    /// Off the path of what passes.
    #[cold]
    fn refuse(&self, tat: Tat, now: u64, cost: u32) -> Ruling {
        let latest = self.plus(Tat::at(now), self.tolerance);
        if cost > self.burst {
            return Ruling::Never;
        }
        let start = self.clamp(tat, now).min(latest);
        let heal = (tat > latest).then_some(latest);
        let arrival = self.plus(start, self.times(cost));
        if arrival <= latest {
            // Free of cost, and only the state was too far ahead.
            return Ruling::Pass { tat: arrival };
        }
        Ruling::Wait {
            wait: self.minus(arrival, latest).nanos_up(),
            heal,
        }
    }

    /// How many parts a nanosecond has.
    #[cfg(feature = "redis")]
    pub(crate) fn parts(&self) -> u32 {
        self.denominator
    }

    /// c·τ.
    #[cfg(feature = "redis")]
    pub(crate) fn charge(&self, cost: u32) -> Span {
        self.span(self.times(cost))
    }

    /// B·τ.
    #[cfg(feature = "redis")]
    pub(crate) fn most(&self) -> Span {
        self.span(self.tolerance)
    }

    #[cfg(feature = "redis")]
    fn span(&self, length: Tat) -> Span {
        Span {
            micros: length.nanos / 1000,
            rest: length.nanos % 1000 * u64::from(self.denominator) + u64::from(length.fraction),
        }
    }

    /// What lies `span` ahead of `now`, at most as far as anything can.
    #[cfg(feature = "redis")]
    pub(crate) fn ahead(&self, now: u64, span: Span) -> Tat {
        let parts = u64::from(self.denominator);
        let nanos = span
            .micros
            .saturating_mul(1000)
            .saturating_add(span.rest / parts);
        if nanos >= MAX_TOLERANCE {
            return Tat::at(now + MAX_TOLERANCE);
        }
        #[expect(clippy::cast_possible_truncation, reason = "below the denominator")]
        let fraction = (span.rest % parts) as u32;
        Tat {
            nanos: now + nanos,
            fraction,
        }
    }

    /// How many requests of cost 1 still fit at `now`.
    #[inline]
    pub(crate) fn remaining(&self, tat: Tat, now: u64) -> u32 {
        let debt = self.debt(tat, now);
        let left = self.minus(self.tolerance, debt.min(self.tolerance));
        // Below 2⁴⁴ ns (five hours) all of it fits 64 bits.
        let count = if left.nanos >> 44 == 0 {
            (left.nanos * u64::from(self.denominator) + u64::from(left.fraction)) / self.numerator
        } else {
            let parts =
                u128::from(left.nanos) * u128::from(self.denominator) + u128::from(left.fraction);
            u64::try_from(parts / u128::from(self.numerator)).unwrap_or(u64::MAX)
        };
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Nanoseconds until the quota is whole, rounded up.
    #[inline]
    pub(crate) fn until_full(&self, tat: Tat, now: u64) -> u64 {
        self.debt(tat, now).nanos_up()
    }

    /// Nanoseconds until one more request fits than does now, rounded up;
    /// zero when the quota is whole.
    pub(crate) fn until_more(&self, tat: Tat, now: u64) -> u64 {
        let debt = self.debt(tat, now);
        let remaining = self.remaining(tat, now);
        if remaining >= self.burst {
            return debt.nanos_up();
        }
        let spent_then = self.times(self.burst - remaining - 1);
        if debt <= spent_then {
            return 0;
        }
        self.minus(debt, spent_then).nanos_up()
    }

    /// Whole nanoseconds between two requests at the limit's rate.
    #[cfg(feature = "redis")]
    pub(crate) const fn interval_nanos(&self) -> u64 {
        self.interval.nanos
    }

    /// Nanoseconds that the whole burst takes to come back, rounded up.
    #[inline]
    pub(crate) fn window(&self) -> u64 {
        self.tolerance.nanos_up()
    }

    /// Nanoseconds until `cost`, which may be above the burst, has been let
    /// through in turns: how long the last of a queue waits.
    #[cfg(feature = "wait")]
    pub(crate) fn wait_behind(&self, tat: Tat, now: u64, cost: u64) -> u64 {
        let debt = self.debt(tat, now).nanos_up();
        let cost = u128::from(cost) * u128::from(self.numerator);
        let cost = cost.div_ceil(u128::from(self.denominator));
        let ahead = u128::from(debt) + cost;
        u64::try_from(ahead.saturating_sub(self.tolerance.nanos.into())).unwrap_or(u64::MAX)
    }

    /// The state after giving `cost` back. Never below `now`: what has come
    /// back by itself is not given back twice.
    pub(crate) fn refund(&self, tat: Tat, now: u64, cost: u32) -> Tat {
        let tat = self.clamp(tat, now);
        let back = self.times(cost);
        let floor = Tat::at(now);
        if tat <= self.plus(floor, back) {
            return floor;
        }
        self.minus(tat, back)
    }

    /// The state of a key under `self` that had `tat` under `old`: the same
    /// number of requests spent, at most all of them.
    pub(crate) fn convert(&self, tat: Tat, old: &Self, now: u64) -> Tat {
        let debt = old.debt(tat, now);
        if debt == Tat::default() {
            return Tat::at(now);
        }
        // debt / τ_old · τ_new in 128 bits: a debt in old fractions has 78, and
        // is divided before it is multiplied.
        let parts =
            u128::from(debt.nanos) * u128::from(old.denominator) + u128::from(debt.fraction);
        let spent = parts / u128::from(old.numerator);
        let rest = parts % u128::from(old.numerator);
        let empty = self.plus(Tat::at(now), self.tolerance);
        let Some(spent) = u32::try_from(spent)
            .ok()
            .filter(|&spent| spent < self.burst)
        else {
            return empty;
        };
        // The fraction of a request that was spent, rounded up to nanoseconds.
        let fraction = (rest * u128::from(self.numerator))
            .div_ceil(u128::from(old.numerator) * u128::from(self.denominator));
        let fraction = u64::try_from(fraction).unwrap_or(MAX_TOLERANCE);
        let spent = self.plus(Tat::at(now), self.times(spent));
        self.plus(spent, Tat::at(fraction)).min(empty)
    }

    /// How far `tat` lies ahead of `now`.
    #[inline]
    fn debt(&self, tat: Tat, now: u64) -> Tat {
        let start = self.clamp(tat, now);
        self.minus(start, Tat::at(now))
    }

    /// max(TAT, now), its fraction made sound: it may have been stored under
    /// a quota of another denominator, which shifts it by less than 1 ns.
    #[inline]
    fn clamp(&self, tat: Tat, now: u64) -> Tat {
        if tat.nanos < now {
            Tat::at(now)
        } else {
            Tat {
                nanos: tat.nanos,
                fraction: tat.fraction.min(self.denominator - 1),
            }
        }
    }

    #[inline]
    fn times(&self, cost: u32) -> Tat {
        if cost == 1 {
            self.interval
        } else {
            // A cost above the burst may be too long to say; it never fits, so
            // any length beyond the tolerance will do.
            product(self.numerator, self.denominator, cost)
                .filter(|span| span.nanos <= MAX_TOLERANCE)
                .unwrap_or(Tat::at(MAX_TOLERANCE + 1))
        }
    }

    #[inline]
    const fn plus(&self, a: Tat, b: Tat) -> Tat {
        let fraction = a.fraction + b.fraction;
        let carry = fraction >= self.denominator;
        Tat {
            nanos: a.nanos + b.nanos + carry as u64,
            fraction: if carry {
                fraction - self.denominator
            } else {
                fraction
            },
        }
    }

    /// `a − b`, where `a ≥ b`.
    #[inline]
    const fn minus(&self, a: Tat, b: Tat) -> Tat {
        let borrow = a.fraction < b.fraction;
        Tat {
            nanos: a.nanos - b.nanos - borrow as u64,
            fraction: if borrow {
                a.fraction + self.denominator - b.fraction
            } else {
                a.fraction - b.fraction
            },
        }
    }
}

/// `count · numerator / denominator`, if it can be said in 64 bits.
const fn product(numerator: u64, denominator: u32, count: u32) -> Option<Tat> {
    let parts = numerator as u128 * count as u128;
    let (nanos, fraction) = if parts >> 64 == 0 {
        #[expect(clippy::cast_possible_truncation, reason = "checked")]
        let parts = parts as u64;
        (parts / denominator as u64, parts % denominator as u64)
    } else {
        let nanos = parts / denominator as u128;
        if nanos >> 64 != 0 {
            return None;
        }
        #[expect(clippy::cast_possible_truncation, reason = "checked")]
        (nanos as u64, (parts % denominator as u128) as u64)
    };
    #[expect(clippy::cast_possible_truncation, reason = "below the denominator")]
    Some(Tat {
        nanos,
        fraction: fraction as u32,
    })
}

const fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests;
