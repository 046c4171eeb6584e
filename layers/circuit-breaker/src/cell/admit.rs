//! A call comes.

use std::time::Duration;

use buttress_core::clock::Instant;

use super::{Cell, Kind, Outlook, Rejection, Ticket};
use crate::{Reason, State, word::Word};

/// How soon a refused call may find a place among the probes: nobody can tell,
/// but asking more often than this helps nobody.
const PROBE_PLACE: Duration = Duration::from_secs(1);

impl Cell {
    /// Lets a call pass or not. Every ticket must be recorded, or given back.
    #[cfg(test)]
    pub(crate) fn admit(&self, now: impl Fn() -> Instant) -> Result<Ticket, Rejection> {
        self.admit_closed()
            .or_else(|word| self.admit_otherwise(word, now))
    }

    /// The first step of it, which is the only one where it is closed. What it
    /// has read is for the [second](Self::admit_otherwise).
    #[inline]
    pub(crate) fn admit_closed(&self) -> Result<Ticket, Word> {
        let word = self.word();
        if word.state().counts() {
            Ok(Ticket::of(word))
        } else {
            Err(word)
        }
    }

    pub(crate) fn admit_otherwise(
        &self,
        mut word: Word,
        now: impl Fn() -> Instant,
    ) -> Result<Ticket, Rejection> {
        loop {
            match word.state() {
                State::Closed | State::MetricsOnly => return Ok(Ticket::of(word)),
                State::ForcedClosed => return Ok(Ticket::of(word)),
                State::ForcedOpen => {
                    return Err(Rejection {
                        reason: Reason::ForcedOpen,
                        retry_after: None,
                    });
                }
                State::Open => {
                    let now = now();
                    match self.until(word) {
                        Some(until) if now < until => {
                            return Err(Rejection {
                                reason: Reason::Open,
                                retry_after: Some(until - now),
                            });
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
                            return Err(Rejection {
                                reason: Reason::HalfOpen,
                                retry_after: Some(PROBE_PLACE.min(until - now)),
                            });
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
