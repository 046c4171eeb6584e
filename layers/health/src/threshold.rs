//! The threshold of the score, for who wants readiness to depend on it.

use std::{num::NonZeroU32, time::Duration};

use buttress_core::clock::Instant;

/// Below which score a process is not ready, and how sure that must be.
///
/// ```text
///          `down_after` evaluations in a row below
///  ready ──────────────────────────────────────────▶ not ready: `score`
///    ▲                                                   │
///    ├───── `up_after` in a row at the score or above ───┤
///    └───────────── after `retry_after`, to see ─────────┘
/// ```
///
/// What counts are the
/// [evaluations](crate::HealthRegistryBuilder::evaluate_every) in the
/// background: how often anybody asks makes no difference.
///
/// Think before you use it. What pulls the score down is mostly shared: a
/// database that is slow is slow for every replica, and all of them leave the
/// balancer at once. And a source that learns from traffic cannot recover
/// without: a breaker that is open stays so until somebody calls. Hence
/// [`retry_after`](Self::retry_after).
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use = "it does nothing until the registry is given it"]
pub struct Threshold {
    pub(crate) score: f64,
    pub(crate) down_after: NonZeroU32,
    pub(crate) up_after: NonZeroU32,
    pub(crate) retry_after: Option<Duration>,
}

impl Threshold {
    /// Not ready below this score: above 0.0 and at most 1.0.
    pub const fn new(score: f64) -> Self {
        Self {
            score,
            down_after: NonZeroU32::new(3).unwrap(),
            up_after: NonZeroU32::new(2).unwrap(),
            retry_after: Some(Duration::from_secs(60)),
        }
    }

    /// How many evaluations in a row must be below. Default 3.
    pub const fn down_after(mut self, evaluations: NonZeroU32) -> Self {
        self.down_after = evaluations;
        self
    }

    /// How many in a row must not be. Default 2.
    pub const fn up_after(mut self, evaluations: NonZeroU32) -> Self {
        self.up_after = evaluations;
        self
    }

    /// After how long it is ready again whatever the score, and judged anew: so
    /// that sources that learn from traffic get some. Counted from the
    /// evaluation that made it not ready, and decided by a later one. `None`:
    /// never. Default: a minute.
    pub fn retry_after(mut self, wait: impl Into<Option<Duration>>) -> Self {
        self.retry_after = wait.into();
        self
    }
}

/// A threshold at work.
#[derive(Clone, Debug)]
pub(crate) struct Hysteresis {
    threshold: Threshold,
    /// Since when it is below, if it is.
    low: Option<Instant>,
    /// How many evaluations in a row have spoken against that.
    against: u32,
}

impl Hysteresis {
    pub(crate) const fn new(threshold: Threshold) -> Self {
        Self {
            threshold,
            low: None,
            against: 0,
        }
    }

    /// Takes one more evaluation into account. Whether it is too low now.
    pub(crate) fn observe(&mut self, score: f64, now: Instant) -> bool {
        let Threshold {
            score: least,
            down_after,
            up_after,
            retry_after,
        } = self.threshold;
        let below = score < least;
        match self.low {
            None => {
                self.against = if below { self.against + 1 } else { 0 };
                if self.against >= down_after.get() {
                    (self.low, self.against) = (Some(now), 0);
                }
            }
            Some(since) => {
                self.against = if below { 0 } else { self.against + 1 };
                let enough = self.against >= up_after.get();
                if enough || retry_after.is_some_and(|wait| now - since >= wait) {
                    (self.low, self.against) = (None, 0);
                }
            }
        }
        self.low.is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// One evaluation a second; `#` where it is too low after it.
    fn run(threshold: Threshold, scores: &[f64]) -> String {
        let mut hysteresis = Hysteresis::new(threshold);
        let mut now = Instant::from_nanos(0);
        let judged = scores.iter().map(|score| {
            now = now + SECOND;
            if hysteresis.observe(*score, now) {
                '#'
            } else {
                '.'
            }
        });
        judged.collect()
    }

    #[test]
    fn three_down_and_two_up() {
        let judged = run(
            Threshold::new(0.5),
            &[
                0.4, 0.4, 0.5, 0.0, 0.0, 0.0, 0.5, 0.4, 0.5, 1.0, 0.4, 0.4, 0.4,
            ],
        );
        assert_eq!(judged, ".....####...#");
    }

    #[test]
    fn the_numbers_can_be_chosen() {
        let n = |n| NonZeroU32::new(n).unwrap();
        let threshold = Threshold::new(1.0).down_after(n(1)).up_after(n(3));
        let judged = run(threshold, &[1.0, 0.9, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]);
        assert_eq!(judged, ".######.#");
    }

    #[test]
    fn after_a_while_it_is_tried_again() {
        let threshold = Threshold::new(0.5).retry_after(4 * SECOND);
        assert_eq!(run(threshold, &[0.0; 12]), "..####...###");
        // As long as it takes.
        let threshold = Threshold::new(0.5).retry_after(None);
        let judged = run(threshold, &[0.0; 1000]);
        assert_eq!(judged.matches('#').count(), 998);
        // A minute where nothing is said.
        let judged = run(Threshold::new(0.5), &[0.0; 63]);
        assert_eq!(judged, format!("..{}.", "#".repeat(60)));
    }

    #[test]
    fn it_never_wears_out() {
        let mut hysteresis = Hysteresis::new(Threshold::new(0.5));
        let now = Instant::from_nanos(7);
        for _ in 0..100_000 {
            assert!(!hysteresis.observe(1.0, now));
        }
        assert_eq!(
            [0.0, 0.0, 0.0].map(|score| hysteresis.observe(score, now)),
            [false, false, true]
        );
    }

    proptest! {
        /// The naive model looks back over all that was since the last change.
        #[test]
        fn it_is_what_the_last_ones_in_a_row_say(
            scores in proptest::collection::vec(prop_oneof![Just(0.2), Just(0.5), Just(0.8)], 0..200),
            down in 1..5_u32,
            up in 1..5_u32,
            retry in proptest::option::of(1..20_usize),
        ) {
            let n = |n| NonZeroU32::new(n).unwrap();
            let wait = retry.map(|retry| SECOND * u32::try_from(retry).unwrap());
            let threshold = Threshold::new(0.5).down_after(n(down)).up_after(n(up)).retry_after(wait);
            let judged = run(threshold, &scores);

            let (mut low, mut since) = (false, 0);
            let mut expected = String::new();
            for at in 0..scores.len() {
                let after = &scores[since..=at];
                let in_a_row = |below: bool| after.iter().rev().take_while(|score| (**score < 0.5) == below).count();
                let turned = if low {
                    in_a_row(false) >= up as usize || retry.is_some_and(|retry| after.len() >= retry)
                } else {
                    in_a_row(true) >= down as usize
                };
                if turned {
                    low = !low;
                    since = at + 1;
                }
                expected.push(if low { '#' } else { '.' });
            }
            prop_assert_eq!(judged, expected);
        }
    }
}
