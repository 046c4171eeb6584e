//! The one word that an admission reads: state, generation, and what else must
//! change together with them.
//!
//! ```text
//!  63             34 33                 10  9    8    7     6        5      4 3    2 0
//! ┌─────────────────┬─────────────────────┬────┬────┬─────┬────────┬──────┬──────┬─────┐
//! │   generation    │        data         │wait│told│armed│observed│ slow │window│state│
//! └─────────────────┴─────────────────────┴────┴────┴─────┴────────┴──────┴──────┴─────┘
//! data: failures in a row (closed, metrics-only)
//!       or probes in flight, good, failed: 8 bits each (half-open)
//! ```

use std::fmt;

use crate::State;

/// Where the rates are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counts {
    Nowhere,
    Calls,
    Time,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) u64);

const STATE: u64 = 0b111;
const COUNTS_AT: u32 = 3;
const SLOW: u64 = 1 << 5;
const OBSERVED: u64 = 1 << 6;
const ARMED: u64 = 1 << 7;
const TOLD: u64 = 1 << 8;
const WAITED_FOR: u64 = 1 << 9;
const DATA_AT: u32 = 10;
const DATA: u64 = ((1 << 24) - 1) << DATA_AT;
const GENERATION_AT: u32 = 34;
/// What is set with the settings and stays when the state changes.
const KEPT: u64 = 0b11 << COUNTS_AT | SLOW | OBSERVED;

/// The most that can be counted in a row.
pub(crate) const MAX_IN_A_ROW: u32 = (1 << 24) - 1;

/// Generations are counted modulo this; no call is in flight for that many
/// changes.
pub(crate) const GENERATIONS: u32 = 1 << 30;

/// The probes of a half-open state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Probes {
    pub(crate) in_flight: u8,
    pub(crate) good: u8,
    pub(crate) failed: u8,
}

impl Word {
    pub(crate) const fn new(generation: u32) -> Self {
        Self((generation as u64 % GENERATIONS as u64) << GENERATION_AT)
    }

    /// The word of another state, in the next generation: what was counted is
    /// gone, what the settings say stays.
    pub(crate) const fn next(self, state: State) -> Self {
        let generation = self.generation().wrapping_add(1);
        Self(Self::new(generation).0 | self.0 & KEPT | state as u64)
    }

    pub(crate) const fn with_settings(self, counts: Counts, slow: bool, observed: bool) -> Self {
        let counts = match counts {
            Counts::Nowhere => 0,
            Counts::Calls => 1 << COUNTS_AT,
            Counts::Time => 2 << COUNTS_AT,
        };
        let slow = if slow { SLOW } else { 0 };
        let observed = if observed { OBSERVED } else { 0 };
        Self(self.0 & !KEPT | counts | slow | observed)
    }

    #[inline]
    pub(crate) const fn state(self) -> State {
        match self.0 & STATE {
            0 => State::Closed,
            1 => State::Open,
            2 => State::HalfOpen,
            3 => State::ForcedOpen,
            4 => State::ForcedClosed,
            _ => State::MetricsOnly,
        }
    }

    #[inline]
    pub(crate) const fn generation(self) -> u32 {
        (self.0 >> GENERATION_AT) as u32
    }

    #[inline]
    pub(crate) const fn counts(self) -> Counts {
        match self.0 >> COUNTS_AT & 0b11 {
            0 => Counts::Nowhere,
            1 => Counts::Calls,
            _ => Counts::Time,
        }
    }

    /// Whether calls pass and nothing need be known of them but how they went:
    /// the state nearly always.
    #[inline]
    pub(crate) const fn is_plain(self) -> bool {
        self.0 & (STATE | SLOW | OBSERVED) == State::Closed as u64
    }

    /// Whether a success leaves a word like this, and all that is counted
    /// beside it, as it is.
    #[inline]
    pub(crate) const fn is_spotless(self) -> bool {
        self.0 & (DATA | 0b11 << COUNTS_AT) == 0
    }

    /// Whether calls are timed.
    #[inline]
    pub(crate) const fn is_timed(self) -> bool {
        self.0 & SLOW != 0
    }

    /// Whether someone hears of each call.
    #[inline]
    pub(crate) const fn is_observed(self) -> bool {
        self.0 & OBSERVED != 0
    }

    /// Whether a rate is reached already and only calls are lacking, so that a
    /// success may trip.
    #[inline]
    pub(crate) const fn is_armed(self) -> bool {
        self.0 & ARMED != 0
    }

    pub(crate) const fn with_armed(self, armed: bool) -> Self {
        Self(self.0 & !ARMED | if armed { ARMED } else { 0 })
    }

    /// Whether it was told (in metrics-only) that it would have opened.
    pub(crate) const fn is_told(self) -> bool {
        self.0 & TOLD != 0
    }

    pub(crate) const fn told(self) -> Self {
        Self(self.0 | TOLD)
    }

    /// Whether somebody waits for a change.
    pub(crate) const fn is_waited_for(self) -> bool {
        self.0 & WAITED_FOR != 0
    }

    pub(crate) const fn with_waiters(self, waiters: bool) -> Self {
        Self(self.0 & !WAITED_FOR | if waiters { WAITED_FOR } else { 0 })
    }

    /// Failures in a row, where they are counted.
    #[inline]
    pub(crate) const fn in_a_row(self) -> u32 {
        (self.0 >> DATA_AT) as u32 & MAX_IN_A_ROW
    }

    pub(crate) const fn with_in_a_row(self, failures: u32) -> Self {
        let failures = if failures < MAX_IN_A_ROW {
            failures
        } else {
            MAX_IN_A_ROW
        };
        Self(self.0 & !DATA | (failures as u64) << DATA_AT)
    }

    pub(crate) const fn probes(self) -> Probes {
        let [in_flight, good, failed, _] = self.in_a_row().to_le_bytes();
        Probes {
            in_flight,
            good,
            failed,
        }
    }

    pub(crate) const fn with_probes(self, probes: Probes) -> Self {
        let data = u32::from_le_bytes([probes.in_flight, probes.good, probes.failed, 0]);
        Self(self.0 & !DATA | (data as u64) << DATA_AT)
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Word")
            .field("state", &self.state())
            .field("generation", &self.generation())
            .field("in_a_row", &self.in_a_row())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 6] = [
        State::Closed,
        State::Open,
        State::HalfOpen,
        State::ForcedOpen,
        State::ForcedClosed,
        State::MetricsOnly,
    ];

    #[test]
    fn fields_do_not_touch_each_other() {
        for state in STATES {
            for generation in [0, 1, 12345, GENERATIONS - 2] {
                for counts in [Counts::Nowhere, Counts::Calls, Counts::Time] {
                    let word = Word::new(generation)
                        .with_settings(counts, true, false)
                        .next(state)
                        .with_in_a_row(u32::MAX)
                        .with_armed(true)
                        .told()
                        .with_waiters(true);
                    assert_eq!(word.state(), state);
                    assert_eq!(word.generation(), generation + 1);
                    assert_eq!(word.counts(), counts);
                    assert_eq!(word.in_a_row(), MAX_IN_A_ROW);
                    assert!(word.is_timed() && !word.is_observed());
                    assert!(word.is_armed() && word.is_told() && word.is_waited_for());
                    let probes = Probes {
                        in_flight: 255,
                        good: 1,
                        failed: 128,
                    };
                    let word = word.with_probes(probes).with_armed(false);
                    assert_eq!(word.probes(), probes);
                    assert_eq!(word.state(), state);
                    assert_eq!(word.generation(), generation + 1);
                    assert!(!word.is_armed() && word.is_told());
                }
            }
        }
    }

    #[test]
    fn another_state_starts_empty_in_the_next_generation() {
        let word = Word::new(GENERATIONS - 1)
            .with_settings(Counts::Time, false, true)
            .with_in_a_row(7)
            .with_armed(true)
            .told()
            .with_waiters(true);
        let next = word.next(State::Open);
        assert_eq!(next.generation(), 0);
        assert_eq!(next.in_a_row(), 0);
        assert!(!next.is_armed() && !next.is_told() && !next.is_waited_for());
        assert_eq!(next.counts(), Counts::Time);
        assert!(next.is_observed());
    }
}
