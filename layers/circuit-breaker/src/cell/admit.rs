//! A call comes.

use std::time::Duration;

use buttress_core::clock::{Instant, RECENT_LAG};

use super::{Cell, Outlook, Rejection, Ticket};
use crate::{Reason, State, word::Word};

/// How soon a refused call may find a place among the probes: nobody can tell,
/// but asking more often than this helps nobody.
const PROBE_PLACE: Duration = Duration::from_secs(1);

/// What a late clock may be late by, in nanoseconds.
#[expect(clippy::cast_possible_truncation, reason = "it is some milliseconds")]
const LATE: u64 = RECENT_LAG.as_nanos() as u64;

impl Cell {
    /// Refuses at once, where that is sure by a clock that may be late, and
    /// nobody has to hear of it.
    #[inline]
    pub(crate) fn refuse(&self, word: Word, recent: impl Fn() -> Instant) -> Option<Rejection> {
        if word.state() != State::Open || word.is_observed() {
            return None;
        }
        let left = self
            .until(word)?
            .as_nanos()
            .saturating_sub(recent().as_nanos());
        (left > LATE).then(|| Rejection::open_for(left))
    }

    /// Refuses while the wait of an open state lasts.
    #[inline]
    fn refuse_open(&self, word: Word, now: impl Fn() -> Instant) -> Option<Rejection> {
        let now = now().as_nanos();
        let until = self.until(word)?.as_nanos();
        (now < until).then(|| Rejection::open_for(until - now))
    }

    /// Lets a call pass or not, where no change of state and no place among the
    /// probes is needed for it: `None` where it is. Takes no lock, and calls no
    /// listener.
    #[inline]
    pub(crate) fn admit_settled(
        &self,
        now: impl Fn() -> Instant,
    ) -> Option<Result<Ticket, Rejection>> {
        let word = self.word();
        match word.state() {
            State::Closed | State::MetricsOnly | State::ForcedClosed => Some(Ok(Ticket::of(word))),
            State::ForcedOpen => Some(Err(Rejection::new(Reason::ForcedOpen, None))),
            State::Open => self.refuse_open(word, now).map(Err),
            State::HalfOpen => None,
        }
    }

    /// Lets a call pass or not. Every ticket must be recorded, or given back.
    pub(crate) fn admit(&self, now: impl Fn() -> Instant) -> Result<Ticket, Rejection> {
        let mut word = self.word();
        loop {
            match word.state() {
                State::Closed | State::MetricsOnly | State::ForcedClosed => {
                    return Ok(Ticket::of(word));
                }
                State::ForcedOpen => {
                    return Err(Rejection::new(Reason::ForcedOpen, None));
                }
                State::Open => {
                    let now = now();
                    match self.until(word) {
                        Some(until) if now < until => {
                            return Err(Rejection::new(Reason::Open, Some(until - now)));
                        }
                        Some(_) => {
                            if let Some(ticket) = self.begin_probing(word.generation(), now) {
                                return Ok(ticket);
                            }
                        }
                        None => {}
                    }
                }
                State::HalfOpen => {
                    let now = now();
                    match self.until(word) {
                        Some(until) if now >= until => self.overdue(word.generation(), now),
                        Some(until) if !self.has_place(word) => {
                            return Err(Rejection::new(
                                Reason::HalfOpen,
                                Some(PROBE_PLACE.min(until - now)),
                            ));
                        }
                        Some(_) => {
                            let mut probes = word.probes();
                            probes.in_flight += 1;
                            if self.swap(word, word.with_probes(probes)) {
                                return Ok(Ticket::of(word));
                            }
                        }
                        None => {}
                    }
                }
            }
            // It has changed meanwhile.
            word = self.word();
        }
    }

    /// Whether a call would pass now, without a place being taken.
    pub(crate) fn outlook(&self, now: Instant) -> Outlook {
        loop {
            let word = self.word();
            let Some(until) = self.until(word) else {
                continue;
            };
            return match word.state() {
                State::Closed | State::MetricsOnly | State::ForcedClosed => Outlook::Passes,
                State::ForcedOpen => Outlook::Waits(None),
                State::Open if now >= until => Outlook::Passes,
                State::Open => Outlook::Waits(Some(until)),
                State::HalfOpen if now >= until => {
                    self.overdue(word.generation(), now);
                    continue;
                }
                State::HalfOpen if self.has_place(word) => Outlook::Passes,
                State::HalfOpen => Outlook::Waits(Some(until)),
            };
        }
    }

    /// Whether another probe may pass.
    fn has_place(&self, word: Word) -> bool {
        let [most, at_once, ..] = self.probes();
        let probes = word.probes();
        let asked = u32::from(probes.in_flight) + u32::from(probes.good) + u32::from(probes.failed);
        probes.in_flight < at_once && asked < u32::from(most)
    }
}
