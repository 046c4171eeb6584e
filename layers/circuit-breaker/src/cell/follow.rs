//! Breakers of one name in several processes: what changes here is told, and
//! what has changed elsewhere is followed.
//!
//! Nothing of it is on the way of a call, but for the first that comes when an
//! open state's wait is over: it needs leave, so that of all processes one
//! probes.

use std::{fmt, time::Duration};

use buttress_core::{
    clock::Instant,
    sync::{MutexGuard, atomic::Ordering::Release},
};

use super::{Cell, Cold, place};
#[cfg(feature = "redis")]
use crate::{Cause, State};
use crate::{Transition, word::Word};
#[cfg(feature = "redis")]
use std::{mem, sync::Arc};

/// For how long a call is told to wait while leave to probe is asked for.
const ASKING: Duration = Duration::from_millis(10);

/// Tells other processes of a breaker. None of its methods may block or call
/// the breaker; none but [`grace`](Self::grace) is called under its lock.
pub(crate) trait Follower: Send + Sync + fmt::Debug {
    /// The state has changed, here or because it is so elsewhere. `asked` is
    /// for how long the callee wants to be left alone, whatever else opened it.
    fn changed(&self, change: &Transition, asked: Option<Duration>);

    /// A call has come that would begin to probe, and has no leave.
    fn wanted(&self);

    /// For how long leave is waited for.
    fn grace(&self) -> Duration;
}

impl Cold {
    /// Whether a call that would probe has to wait. Who was idle when the wait
    /// was over asks first, too: others may have been as idle.
    pub(super) fn needs_leave(&mut self, now: Instant) -> bool {
        let Some(follower) = &self.follower else {
            return false;
        };
        if self.hold == Instant::from_nanos(0) {
            return false;
        }
        let grace = follower.grace();
        if !self.asked && !grace.is_zero() {
            self.asked = true;
            self.hold = self.hold.max(now + grace);
        }
        now < self.hold
    }
}

impl Cell {
    /// Puts the call off that would have begun to probe.
    #[cold]
    pub(super) fn ask_for_leave(&self, cold: MutexGuard<'_, Cold>, word: Word, now: Instant) {
        let until = (now + ASKING).min(cold.hold);
        // In its own generation: an open state has no permits.
        self.hot.until[place(word)].store(until.as_nanos(), Release);
        let follower = cold.follower.clone();
        drop(cold);
        if let Some(follower) = follower {
            follower.wanted();
        }
    }
}

#[cfg(feature = "redis")]
impl Cell {
    pub(crate) fn set_follower(&self, follower: Arc<dyn Follower>) {
        self.lock().follower = Some(follower);
    }

    /// Gives leave to probe as soon as the wait is over, if it is open yet and
    /// in this generation.
    pub(crate) fn give_leave(&self, generation: u32) {
        self.put_off(generation, None, Instant::from_nanos(0));
    }

    /// Has it open until then, and for longer as long as there is no leave,
    /// but not past `hold`; if it is open and in this generation.
    pub(crate) fn delay(&self, generation: u32, until: Instant, hold: Instant) {
        self.put_off(generation, Some(until), hold);
    }

    fn put_off(&self, generation: u32, until: Option<Instant>, hold: Instant) {
        let mut cold = self.lock();
        let word = self.word();
        if word.generation() != generation || word.state() != State::Open {
            return;
        }
        let until = until.unwrap_or(cold.due);
        cold.due = until;
        cold.hold = hold;
        cold.asked = false;
        let before = self.until_locked(word);
        self.hot.until[place(word)].store(until.as_nanos(), Release);
        if until >= before {
            return;
        }
        // Who waits waits for too long.
        let wakers = mem::take(&mut cold.waiters);
        drop(cold);
        for waker in wakers.into_values() {
            waker.wake();
        }
    }

    /// Follows a change elsewhere, if it is still in this generation; whether
    /// it was.
    pub(crate) fn follow(
        &self,
        generation: u32,
        to: State,
        wait: Option<Duration>,
        now: Instant,
    ) -> bool {
        self.bring_about_in(Some(generation), to, wait, Cause::Remote, now)
            .is_ok()
    }

    /// The end of an open state as it was meant: see [`Cold::due`].
    pub(crate) fn due(&self) -> Instant {
        self.lock().due
    }
}
