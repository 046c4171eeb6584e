//! The two clocks.
//!
//! Decisions are taken on a monotonic clock, [`now`], which no operator and no
//! NTP step can move. What is shown to clients (the Unix seconds of a Reset
//! header, an HTTP date) comes from a [`WallClock`], which can be injected.
//!
//! With the feature `testing`, [`now`] is tokio's clock, so that
//! `#[tokio::test(start_paused = true)]` and `tokio::time::advance` rule it.

use std::{
    fmt,
    ops::{Add, Sub},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A point on the monotonic clock, in nanoseconds since some moment before the
/// process first asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// The point `nanos` nanoseconds after the clock's zero: for pure
    /// algorithms that are handed their time, and for their tests.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the clock's zero.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The time from `earlier` to `self`; zero if `earlier` is later.
    #[must_use]
    pub const fn saturating_duration_since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    /// Saturates at the end of the clock, 584 years from its zero.
    fn add(self, span: Duration) -> Self {
        let nanos = u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }
}

impl Sub for Instant {
    type Output = Duration;

    /// Zero if `earlier` is later.
    fn sub(self, earlier: Self) -> Duration {
        self.saturating_duration_since(earlier)
    }
}

/// What time it is on the monotonic clock.
///
/// About half the price of the standard library's: a calibrated counter read
/// in user space, where the processor has one (`quanta`). The first reading in
/// a process calibrates it, which blocks for some milliseconds, at most 200:
/// layers take theirs when they are built.
#[must_use]
#[inline]
pub fn now() -> Instant {
    source::now()
}

/// How far [`recent`] stays behind [`now`], with room to spare.
pub const RECENT_LAG: Duration = Duration::from_millis(20);

/// What time it was a moment ago, for what need not know it better: about a
/// third of the price of [`now`].
///
/// On Linux the time of the system's last tick (`CLOCK_MONOTONIC_COARSE`), on
/// the scale of [`now`]: 1 to 10 ms ago, as the kernel is built. That is less
/// than [`RECENT_LAG`], unless whoever keeps the system's time was itself kept
/// waiting. It may go back by less than a millisecond where the two clocks have
/// drifted apart, which is put right every second. Elsewhere, and with the
/// feature `testing`, the same as [`now`].
#[must_use]
#[inline]
pub fn recent() -> Instant {
    recent::now()
}

#[cfg(all(target_os = "linux", not(feature = "testing")))]
mod recent {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use rustix::time::{ClockId, clock_gettime};

    use super::Instant;
    use crate::sync::Padded;

    static SCALE: Padded<Scale> = Padded(Scale {
        offset: AtomicU64::new(0),
        due: AtomicU64::new(0),
    });

    /// From the system's scale to that of [`super::now`], and when it is to be
    /// asked for again. One without the other does no harm.
    struct Scale {
        offset: AtomicU64,
        due: AtomicU64,
    }

    const EVERY: u64 = 1_000_000_000;
    /// Whoever is suspended between the two readings finds too little.
    const TRIES: usize = 3;

    #[inline]
    pub(super) fn now() -> Instant {
        let tick = read(ClockId::MonotonicCoarse);
        if tick >= SCALE.0.due.load(Relaxed) {
            synchronize(tick);
        }
        Instant(tick.wrapping_add(SCALE.0.offset.load(Relaxed)))
    }

    #[cold]
    fn synchronize(tick: u64) {
        // Read before the system's: what comes of it is never ahead.
        let offset = || {
            let now = super::now().as_nanos();
            now.wrapping_sub(read(ClockId::Monotonic)).cast_signed()
        };
        let best = (0..TRIES).map(|_| offset()).max().unwrap_or_default();
        SCALE.0.offset.store(best.cast_unsigned(), Relaxed);
        SCALE.0.due.store(tick.saturating_add(EVERY), Relaxed);
    }

    #[inline]
    #[expect(clippy::cast_sign_loss, reason = "the system's clock begins at zero")]
    fn read(clock: ClockId) -> u64 {
        let time = clock_gettime(clock);
        (time.tv_sec as u64)
            .wrapping_mul(1_000_000_000)
            .wrapping_add(time.tv_nsec as u64)
    }
}

#[cfg(not(all(target_os = "linux", not(feature = "testing"))))]
use self::source as recent;

#[cfg(not(feature = "testing"))]
mod source {
    use std::sync::LazyLock;

    use super::Instant;

    static COUNTER: LazyLock<Counter> = LazyLock::new(|| {
        let clock = quanta::Clock::new();
        let scale = clock.delta_as_nanos(0, 1 << SHIFT);
        let zero = scaled(clock.raw(), scale).wrapping_sub(OFFSET);
        Counter { clock, scale, zero }
    });

    struct Counter {
        clock: quanta::Clock,
        /// Nanoseconds in 2⁴⁸ ticks: quanta's own scaling in fewer steps.
        scale: u64,
        /// What the counter said at the clock's zero, in nanoseconds.
        zero: u64,
    }

    const SHIFT: u32 = 48;

    /// Not zero at the start: a bucket may be charged for the past. More than
    /// the counters of two processors can be apart, too.
    const OFFSET: u64 = 1 << 40;

    #[inline]
    pub(super) fn now() -> Instant {
        let Counter { clock, scale, zero } = &*COUNTER;
        Instant(scaled(clock.raw(), *scale).wrapping_sub(*zero))
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "584 years of it fit")]
    const fn scaled(ticks: u64, scale: u64) -> u64 {
        ((ticks as u128 * scale as u128) >> SHIFT) as u64
    }
}

#[cfg(feature = "testing")]
mod source {
    use std::sync::LazyLock;

    use super::Instant;

    static START: LazyLock<tokio::time::Instant> = LazyLock::new(tokio::time::Instant::now);

    /// A paused clock may stand before the moment at which another test's
    /// runtime asked first, so that zero lies nine years back.
    const OFFSET: u64 = 1 << 58;

    pub(super) fn now() -> Instant {
        let now = tokio::time::Instant::now();
        let nanos = |span: std::time::Duration| u64::try_from(span.as_nanos()).unwrap_or(0);
        Instant(match now.checked_duration_since(*START) {
            Some(after) => OFFSET + nanos(after),
            None => OFFSET - nanos(START.saturating_duration_since(now)),
        })
    }
}

/// The time of day, as it is shown to clients. Never what a limiter or a
/// breaker decides by.
///
/// Implemented for closures; [`SystemClock`] is the default everywhere.
pub trait WallClock: Send + Sync + 'static {
    /// The time since the Unix epoch.
    fn unix_now(&self) -> Duration;
}

impl<F> WallClock for F
where
    F: Fn() -> Duration + Send + Sync + 'static,
{
    fn unix_now(&self) -> Duration {
        self()
    }
}

/// The system's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl WallClock for SystemClock {
    #[inline]
    fn unix_now(&self) -> Duration {
        // The one place that reads it; zero when it stands before 1970.
        #[expect(clippy::disallowed_methods)]
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
    }
}

/// A [`WallClock`] shared by the clones of a layer.
#[derive(Clone)]
pub struct SharedWallClock(Arc<dyn WallClock>);

impl SharedWallClock {
    /// Shares `clock`.
    pub fn new(clock: impl WallClock) -> Self {
        Self(Arc::new(clock))
    }

    /// The time since the Unix epoch.
    #[must_use]
    pub fn unix_now(&self) -> Duration {
        self.0.unix_now()
    }
}

impl Default for SharedWallClock {
    fn default() -> Self {
        Self::new(SystemClock)
    }
}

impl fmt::Debug for SharedWallClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedWallClock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_forward() {
        let first = now();
        let second = now();
        assert!(second >= first);
        assert!(now() - first < Duration::from_secs(60));
    }

    #[test]
    fn what_is_recent_was_just_now() {
        for _ in 0..1000 {
            let before = now();
            let recent = recent();
            let after = now();
            assert!(recent <= after + Duration::from_millis(1));
            // The system's own timekeeper may have been kept waiting.
            assert!(before - recent < Duration::from_secs(5));
        }
    }

    #[test]
    fn arithmetic_saturates() {
        let late = Instant::from_nanos(u64::MAX - 1);
        assert_eq!(late + Duration::from_secs(1), Instant::from_nanos(u64::MAX));
        assert_eq!(Instant::from_nanos(1) - late, Duration::ZERO);
    }

    #[test]
    fn a_closure_is_a_wall_clock() {
        let clock = SharedWallClock::new(|| Duration::from_secs(1000));
        assert_eq!(clock.unix_now().as_secs(), 1000);
        assert!(SharedWallClock::default().unix_now() > Duration::from_secs(1_700_000_000));
    }

    #[cfg(feature = "testing")]
    #[tokio::test(start_paused = true)]
    async fn a_paused_clock_rules_it() {
        let before = now();
        tokio::time::advance(Duration::from_millis(1500)).await;
        assert_eq!(now() - before, Duration::from_millis(1500));
    }
}
