//! One request's attempts: whether there is another, and when. Pure: what time
//! it is, what was seen and what is drawn are arguments.

use std::time::Duration;

use buttress_core::{clock::Instant, random::SharedRandom};

use crate::{Cause, Delays, GiveUp, Settings};

/// What an attempt that is worth another has told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) cause: Cause,
    pub(crate) hint: Hint,
}

impl Seen {
    pub(crate) const fn new(cause: Cause) -> Self {
        Self {
            cause,
            hint: Hint::None,
        }
    }
}

/// When the callee would like to be asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hint {
    None,
    /// Not before this long; later will do. Who was told the same should not
    /// all come at the same time.
    After(Duration),
    /// After this long, and as if it were the first retry (gRFC A6).
    At(Duration),
    Never,
}

/// How far a request's attempts have come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Session {
    /// Those that were begun.
    attempts: u32,
    /// From the first wait on: most requests have none.
    delays: Option<Delays>,
    /// A refused stream was repeated for free.
    freed: bool,
    /// And is about to be.
    is_free: bool,
    /// Until when all must be over.
    deadline: Option<Instant>,
}

impl Session {
    /// With the first attempt begun.
    #[inline]
    pub(crate) const fn new(deadline: Option<Instant>) -> Self {
        Self {
            attempts: 1,
            delays: None,
            freed: false,
            is_free: false,
            deadline,
        }
    }

    pub(crate) const fn attempts(&self) -> u32 {
        self.attempts
    }

    pub(crate) const fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The attempt that there is after [`next`](Self::next) begins.
    pub(crate) const fn begin(&mut self) {
        if self.is_free {
            self.is_free = false;
        } else {
            self.attempts += 1;
        }
    }

    /// Whether there is another attempt after one that went like this, and
    /// after how long. `leave` is asked last, when nothing else is in the way,
    /// with that.
    pub(crate) fn next(
        &mut self,
        settings: &Settings,
        seen: Seen,
        now: Instant,
        random: &SharedRandom,
        leave: impl FnOnce(Duration) -> Result<(), GiveUp>,
    ) -> Result<Duration, GiveUp> {
        let left = self.deadline.map(|deadline| deadline - now);
        if seen.cause == Cause::RefusedStream && !self.freed {
            if left.is_some_and(|left| left.is_zero()) {
                return Err(GiveUp::Deadline);
            }
            self.freed = true;
            self.is_free = true;
            return Ok(Duration::ZERO);
        }
        if self.attempts >= settings.max_attempts {
            return Err(GiveUp::Attempts);
        }
        let (least, wait) = self.wait(settings, seen.hint, random)?;
        let wait = match left {
            // At the deadline itself there is no time for an attempt.
            Some(left) if least >= left => return Err(GiveUp::Deadline),
            // What a hint was stretched by is cut.
            Some(left) if wait >= left => least,
            _ => wait,
        };
        leave(wait)?;
        Ok(wait)
    }

    /// The least that there is to wait, and what it shall be.
    fn wait(
        &mut self,
        settings: &Settings,
        hint: Hint,
        random: &SharedRandom,
    ) -> Result<(Duration, Duration), GiveUp> {
        match hint {
            Hint::Never => return Err(GiveUp::Pushback),
            Hint::After(wait) | Hint::At(wait) if wait > settings.max_retry_after => {
                return Err(GiveUp::Pushback);
            }
            Hint::At(wait) => {
                self.delays = None;
                return Ok((wait, wait));
            }
            Hint::None | Hint::After(_) => {}
        }
        let backoff = &settings.backoff;
        let delays = self.delays.get_or_insert_with(|| backoff.delays());
        let delay = delays.next(backoff, random);
        Ok(match hint {
            Hint::After(wait) => {
                let least = wait.max(delay);
                let stretched = wait.saturating_add(delay);
                (
                    least,
                    if backoff.is_jittered() {
                        stretched
                    } else {
                        least
                    },
                )
            }
            _ => (delay, delay),
        })
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests;
