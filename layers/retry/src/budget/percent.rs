//! A percentage of the requests, and a minimum each second.
//!
//! Two words, each of them a bucket, and every withdrawal takes from exactly
//! one, in one compare-and-exchange:
//!
//! - The *minimum* is an arrival time (GCRA): the bucket refills `min` times a
//!   second by the passing of time alone, and holds one second of it. Nothing
//!   has to be caught up with after an idle day.
//! - The *balance*, in thousandths of a retry: a request adds `percent · 10`, a
//!   retry takes 1000. It holds what may be saved up, and begins empty.
//!
//! So over any time `T`, and with any number of threads,
//!
//! ```text
//! retries ≤ percent/100 · (requests in T) + min · (T + 1 s) + saved
//! ```
//!
//! because a bucket gives no more than it held at first and what came in since.
//! The balance may stand above its bound for a moment, where several threads
//! add at once; a withdrawal counts nothing of that. Nothing else is told by
//! either word, so that no ordering is asked of them but their own.
//!
//! The minimum is taken first: what it would have given is lost when it is
//! full, and while retries are few the balance stays at its bound, where a
//! request only reads it.
//!
//! Source: Finagle's `RetryBudget` (a balance in whole thousandths, deposits
//! per request). Its deposits expire after 10 seconds, which costs each request
//! a look at the clock; here a bound on the balance does that. tower 0.5's
//! reserve is `min · ttl` (a hundred retries at once, by default) and its
//! withdrawals look and subtract in two steps.

use std::fmt;

use buttress_core::{
    clock::{self, Instant},
    sync::{
        Padded,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::Budget;
use crate::error::ConfigError;

pub(super) const SECOND: u64 = 1_000_000_000;
/// A retry, in the unit of the balance.
pub(super) const RETRY: u64 = 1000;
const MAX_PERCENT: u32 = 1000;
/// A microsecond apart: the interval is whole nanoseconds, and then not wrong
/// by more than a thousandth.
const MAX_PER_SECOND: u32 = 1_000_000;
const DEFAULT_SAVED: u32 = 100;

/// Retries are at most a percentage of the requests and a minimum each second.
///
/// Over any time `T`, whoever shares it, retries ≤ percent/100 · requests in
/// `T` + minimum · (`T` + 1 s) + what was [saved up](Self::saving) before. Of a
/// thousand requests in one moment that all fail, with 20 % and 3 each second
/// and nothing saved up, at most 203 attempts are repeated, however many each
/// would like. (Fewer, if all begin before the first has failed: what they
/// bring is saved up in the meantime, and no more than can be.)
///
/// The default is Finagle's: 20 %, and 10 each second for those with few
/// requests.
///
/// [`request`](Budget::request) is an atomic addition, and only a read as long
/// as nothing more can be saved up. A [`withdraw`](Budget::withdraw) reads the
/// clock.
///
/// ```
/// use buttress_retry::{Budget, RetryBudget};
///
/// # fn main() -> Result<(), buttress_retry::ConfigError> {
/// let budget = RetryBudget::new(20, 2)?;
/// for _ in 0..10 {
///     budget.request();
/// }
/// let given = (0..100).filter(|_| budget.withdraw()).count();
/// assert_eq!(given, 2 + 2);
/// # Ok(())
/// # }
/// ```
pub struct RetryBudget {
    /// Away from the counters of the `Arc` around it, which clones write.
    words: Padded<Words>,
    /// `percent:32 min:32`.
    rates: AtomicU64,
    pub(super) saved: u32,
}

#[derive(Debug)]
struct Words {
    balance: AtomicU64,
    arrival: AtomicU64,
}

/// The arithmetic, pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rates {
    pub(super) percent: u32,
    pub(super) per_second: u32,
}

impl Rates {
    const fn new(percent: u32, per_second: u32, saved: u32) -> Result<Self, ConfigError> {
        if percent > MAX_PERCENT {
            return Err(ConfigError::new("a budget of more than 1000 percent"));
        }
        if per_second > MAX_PER_SECOND {
            return Err(ConfigError::new(
                "a budget of more than a million retries a second",
            ));
        }
        let rates = Self {
            percent,
            per_second,
        };
        if rates.deposit() > bound(saved) {
            return Err(ConfigError::new(
                "a budget saves up less than one request brings",
            ));
        }
        if percent > 0 && saved == 0 {
            return Err(ConfigError::new(
                "a budget of a percentage saves up no retry",
            ));
        }
        Ok(rates)
    }

    const fn pack(self) -> u64 {
        (self.percent as u64) << 32 | self.per_second as u64
    }

    #[inline]
    const fn unpack(word: u64) -> Self {
        Self {
            percent: (word >> 32) as u32,
            per_second: word as u32,
        }
    }

    /// What a request adds to the balance.
    #[inline]
    pub(super) const fn deposit(self) -> u64 {
        self.percent as u64 * (RETRY / 100)
    }

    /// The arrival time after a retry out of the minimum at `now`, if it has
    /// one. Rounded so that it never gives more than its rate.
    fn arrival(self, arrival: u64, now: Instant) -> Option<u64> {
        if self.per_second == 0 {
            return None;
        }
        let now = now.as_nanos();
        let interval = SECOND.div_ceil(self.per_second.into());
        let latest = now.saturating_add(interval * u64::from(self.per_second));
        let arrival = arrival.max(now).saturating_add(interval);
        (arrival <= latest).then_some(arrival)
    }
}

/// The most that the balance counts.
#[inline]
pub(super) const fn bound(saved: u32) -> u64 {
    saved as u64 * RETRY
}

/// The balance after a retry, if it has one.
#[inline]
const fn spent(balance: u64, bound: u64) -> Option<u64> {
    let balance = if balance < bound { balance } else { bound };
    balance.checked_sub(RETRY)
}

impl RetryBudget {
    /// Retries are at most `percent` of the requests, 0 to 1000, and
    /// `min_per_second`, at most a million. With both zero there are never any.
    ///
    /// The percentage begins with nothing saved, the minimum with its second.
    ///
    /// # Errors
    ///
    /// When either is out of its range.
    pub fn new(percent: u32, min_per_second: u32) -> Result<Self, ConfigError> {
        let rates = Rates::new(percent, min_per_second, DEFAULT_SAVED)?;
        Ok(Self::with(rates))
    }

    fn with(rates: Rates) -> Self {
        // The first reading of a process calibrates: not while it serves.
        let _ = clock::now();
        Self {
            words: Padded(Words {
                balance: AtomicU64::new(0),
                arrival: AtomicU64::new(0),
            }),
            rates: AtomicU64::new(rates.pack()),
            saved: DEFAULT_SAVED,
        }
    }

    /// How many retries the percentage may save up for later. Default: 100, as
    /// many as the AWS SDKs' token buckets.
    ///
    /// That is how many calls may be made good at once that failed together,
    /// such as those on one connection, and how many more there may be at the
    /// beginning of an outage than the percentage says. It does not come back
    /// before as many requests have paid for it again.
    ///
    /// # Errors
    ///
    /// When it is less than one request brings, or than one retry.
    pub fn saving(mut self, retries: u32) -> Result<Self, ConfigError> {
        let Rates {
            percent,
            per_second,
        } = self.rates();
        Rates::new(percent, per_second, retries)?;
        self.saved = retries;
        Ok(self)
    }

    /// Other rates from now on, while it is in use. What was saved up stays.
    ///
    /// # Errors
    ///
    /// As in [`new`](Self::new), or when a request would then bring more than
    /// can be [saved up](Self::saving); nothing is changed then.
    pub fn set(&self, percent: u32, min_per_second: u32) -> Result<(), ConfigError> {
        let rates = Rates::new(percent, min_per_second, self.saved)?;
        self.rates.store(rates.pack(), Relaxed);
        Ok(())
    }

    /// The percentage of requests.
    #[must_use]
    pub fn percent(&self) -> u32 {
        self.rates().percent
    }

    /// The minimum each second.
    #[must_use]
    pub fn min_per_second(&self) -> u32 {
        self.rates().per_second
    }

    /// How many retries the percentage has saved up, rounded down.
    #[must_use]
    pub fn saved(&self) -> u32 {
        let balance = self.words.balance.load(Relaxed).min(bound(self.saved));
        u32::try_from(balance / RETRY).unwrap_or(u32::MAX)
    }

    #[inline]
    pub(super) fn rates(&self) -> Rates {
        Rates::unpack(self.rates.load(Relaxed))
    }

    /// A retry, with the clock as it is asked for.
    pub(super) fn withdraw_at(&self, now: impl FnOnce() -> Instant) -> bool {
        let rates = self.rates();
        if rates.per_second > 0 {
            let now = now();
            let next = |arrival| rates.arrival(arrival, now);
            if self
                .words
                .arrival
                .fetch_update(Relaxed, Relaxed, next)
                .is_ok()
            {
                return true;
            }
        }
        let next = |balance| spent(balance, bound(self.saved));
        self.words
            .balance
            .fetch_update(Relaxed, Relaxed, next)
            .is_ok()
    }
}

impl Budget for RetryBudget {
    #[inline]
    fn request(&self) {
        let deposit = self.rates().deposit();
        let balance = &self.words.balance;
        // Nothing is written where nothing more is saved: as a rule, while all
        // is well. So it passes the bound by one deposit a thread at most.
        if deposit > 0 && balance.load(Relaxed) < bound(self.saved) {
            balance.fetch_add(deposit, Relaxed);
        }
    }

    fn withdraw(&self) -> bool {
        self.withdraw_at(clock::now)
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self::with(Rates {
            percent: 20,
            per_second: 10,
        })
    }
}

impl fmt::Debug for RetryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryBudget")
            .field("percent", &self.percent())
            .field("min_per_second", &self.min_per_second())
            .field("saved", &self.saved())
            .finish_non_exhaustive()
    }
}
