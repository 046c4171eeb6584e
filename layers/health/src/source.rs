//! What the score is made of, and sources that are fed by hand.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use buttress_core::{
    clock::{self, Instant},
    health::{Health, HealthSource},
};

use crate::{
    ConfigError,
    error::{self, Problem},
    score::{HEAVIEST, LIGHTEST, Part},
};

/// A [`HealthSource`] as a registry has it: how much it weighs, and whether
/// the score may be better than it is.
///
/// Made of a source by `into()`, with weight 1, and critical if the source says
/// so. The source is asked for its name and for that only now. One that panics
/// when it is asked for its health is at 0.0.
///
/// ```
/// use buttress_health::{HealthRegistry, Indicator, Source};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (queue, disk) = (Indicator::new("queue"), Indicator::new("disk"));
/// let health = HealthRegistry::builder()
///     .source(queue.clone())
///     .source(Source::new(disk.clone()).weight(3.0))
///     .build()?;
///
/// queue.set(0.2);
/// assert_eq!(health.score(), 0.8);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Source {
    name: Arc<str>,
    source: Arc<dyn HealthSource>,
    weight: f64,
    critical: bool,
}

impl Source {
    /// This source, with weight 1.
    #[must_use]
    pub fn new(source: impl HealthSource + 'static) -> Self {
        Self {
            name: source.name().into(),
            critical: source.critical(),
            source: Arc::new(source),
            weight: 1.0,
        }
    }

    /// How much it counts beside the others: 0.000001 to 1,000,000.
    #[must_use]
    pub const fn weight(mut self, weight: f64) -> Self {
        self.weight = weight;
        self
    }

    /// Whether the score is never above that of this source, whatever it says
    /// itself.
    #[must_use]
    pub const fn critical(mut self, critical: bool) -> Self {
        self.critical = critical;
        self
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        error::name("a source", &self.name)?;
        // Not NaN either.
        if !(LIGHTEST..=HEAVIEST).contains(&self.weight) {
            return Err(Problem::Weight(Arc::clone(&self.name)).into());
        }
        Ok(())
    }

    pub(crate) const fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(crate) fn part(&self) -> Part {
        Part {
            score: self.health().score(),
            weight: self.weight,
            critical: self.critical,
        }
    }

    /// One that panics is not well; who asks goes on.
    pub(crate) fn health(&self) -> Health {
        catch_unwind(AssertUnwindSafe(|| self.source.health())).unwrap_or(Health::UNHEALTHY)
    }
}

impl<S: HealthSource + 'static> From<S> for Source {
    fn from(source: S) -> Self {
        Self::new(source)
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("name", &self.name)
            .field("weight", &self.weight)
            .field("critical", &self.critical)
            .finish_non_exhaustive()
    }
}

/// A source that shows what it was last told. Clones are the same one.
///
/// Telling it is one atomic store: nothing is allocated, locked or woken.
#[derive(Clone)]
pub struct Indicator(Arc<Shown>);

struct Shown {
    name: Arc<str>,
    /// The bits of the score; of NaN, which no score is, where it is off.
    bits: AtomicU64,
}

impl Indicator {
    /// One that shows 1.0.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(Arc::new(Shown {
            name: name.into(),
            bits: AtomicU64::new(1_f64.to_bits()),
        }))
    }

    /// Shows this score from now on. As [`Health::scored`] has it: what lies
    /// outside of 0.0 to 1.0 is moved to its nearer end, and NaN is 0.0.
    pub fn set(&self, score: f64) {
        self.show(Health::scored(score));
    }

    /// Is left out of the score until it is set again.
    pub fn disable(&self) {
        self.show(Health::DISABLED);
    }

    fn show(&self, health: Health) {
        let bits = health.score().unwrap_or(f64::NAN).to_bits();
        self.0.bits.store(bits, Relaxed);
    }
}

impl HealthSource for Indicator {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn health(&self) -> Health {
        let score = f64::from_bits(self.0.bits.load(Relaxed));
        if score.is_nan() {
            return Health::DISABLED;
        }
        Health::scored(score)
    }
}

impl fmt::Debug for Indicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Indicator")
            .field("name", &self.name())
            .field("score", &self.health().score())
            .finish()
    }
}

/// A source that is well for as long as somebody says so often enough: a
/// consumer that has had a message, a loop that has gone round. Clones are the
/// same one.
///
/// A beat reads the clock, as [`clock::recent`] does, and stores what it says:
/// one atomic. Nothing is allocated, locked or woken.
#[derive(Clone)]
pub struct Beat(Arc<Pulse>);

struct Pulse {
    name: Arc<str>,
    within: Duration,
    /// The last beat, on the monotonic clock.
    last: AtomicU64,
}

impl Beat {
    /// One that beats now, and is 0.0 when its last beat is longer ago than
    /// this: 1.0 until then. Up to [`RECENT_LAG`](clock::RECENT_LAG) sooner,
    /// so that it should be a good deal more.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, within: Duration) -> Self {
        Self(Arc::new(Pulse {
            name: name.into(),
            within,
            last: AtomicU64::new(clock::now().as_nanos()),
        }))
    }

    /// Is well from now on, for its time.
    #[inline]
    pub fn beat(&self) {
        self.0.last.store(clock::recent().as_nanos(), Relaxed);
    }

    /// How long ago its last beat was.
    #[must_use]
    pub fn age(&self) -> Duration {
        clock::now() - Instant::from_nanos(self.0.last.load(Relaxed))
    }
}

impl HealthSource for Beat {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn health(&self) -> Health {
        if self.age() > self.0.within {
            Health::UNHEALTHY
        } else {
            Health::HEALTHY
        }
    }
}

impl fmt::Debug for Beat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Beat")
            .field("name", &self.name())
            .field("within", &self.0.within)
            .field("age", &self.age())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_indicator_shows_what_it_was_told() {
        let indicator = Indicator::new("queue");
        let clone = indicator.clone();
        assert_eq!(clone.health(), Health::HEALTHY);
        for (told, shown) in [(0.25, 0.25), (-1.0, 0.0), (f64::NAN, 0.0), (7.0, 1.0)] {
            indicator.set(told);
            assert_eq!(clone.health().score(), Some(shown));
        }
        indicator.disable();
        assert!(clone.health().is_disabled());
        indicator.set(0.5);
        assert_eq!(clone.health().score(), Some(0.5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_beat_lasts_its_time() {
        let beat = Beat::new("consumer", Duration::from_secs(10));
        assert_eq!(beat.health(), Health::HEALTHY);
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(beat.health(), Health::HEALTHY);
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(beat.health(), Health::UNHEALTHY);
        beat.clone().beat();
        assert_eq!(beat.health(), Health::HEALTHY);
        assert_eq!(beat.age(), Duration::ZERO);
    }

    #[test]
    fn a_source_that_panics_is_not_well() {
        struct Bad;
        impl HealthSource for Bad {
            fn name(&self) -> &str {
                "bad"
            }
            fn health(&self) -> Health {
                panic!("a source's own fault")
            }
        }
        assert_eq!(Source::new(Bad).health(), Health::UNHEALTHY);
    }

    #[test]
    fn weights_are_checked() {
        let weighing = |weight| Source::new(Indicator::new("a")).weight(weight).check();
        for weight in [1e-6, 1.0, 1e6] {
            assert!(weighing(weight).is_ok(), "{weight}");
        }
        for weight in [0.0, -1.0, 1e-7, 1e7, f64::NAN, f64::INFINITY] {
            let error = weighing(weight).unwrap_err().to_string();
            assert!(error.contains("weight"), "{weight}");
        }
        assert!(Source::new(Indicator::new("")).check().is_err());
    }
}
