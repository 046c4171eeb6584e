//! One key's share: pure, `now` is an argument.

use std::mem;

use crate::gcra::{Gcra, Ruling, Tat};

/// A share is asked for again when what is left of the last grant is this part
/// of it: early enough that under load nobody waits for the answer.
const LOW: u32 = 4;
/// A share grows when it lasted less than this part of the time after which it
/// is given back.
const BRISK: u64 = 4;
/// How long a share is kept that is not used up, at least and at most.
const KEEP_LEAST: u64 = 100_000_000;
const KEEP_MOST: u64 = 1_000_000_000;
/// A share that was not given back in this many such times is lost.
const LAPSE: u64 = 3;
/// Whoever was given less than was needed asks again after this long at most,
/// or after this part of the time in which the whole burst comes back: after
/// twice of it where that was not enough, and after four times at the most.
const HOLD_MOST: u64 = 250_000_000;
const HOLD_PART: u64 = 64;
const HOLD_DOUBLED: u8 = 2;

/// No more is asked for at once: the script's sums are exact up to that.
pub(crate) const MOST: u32 = 1 << 20;

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Take {
    /// It is paid from the share, or could be.
    Pass,
    /// The server is to be asked.
    Ask,
    /// The server would refuse it for so many nanoseconds more.
    Wait(u64),
    /// It costs more than the burst.
    Never,
}

/// What the server is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    /// With less than this nobody who waits is served: nothing is taken then.
    pub(crate) least: u32,
    /// What all who wait want: taken as far as there is any.
    pub(crate) need: u32,
    /// For the share: taken from plenty only, an eighth of what is left.
    pub(crate) more: u32,
}

/// What the server says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    /// How many tokens were charged for us.
    pub(crate) granted: u32,
    /// When the key owes nothing, as if the answer were as old as the question.
    pub(crate) tat: Tat,
}

/// What a process holds of one key's quota.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share {
    pub(crate) gcra: Gcra,
    /// Tokens that were charged and not spent.
    tokens: u32,
    /// How many of them are for those who waited when they were asked for:
    /// whoever comes later may not take them.
    reserved: u32,
    /// What those who wait want together.
    waiting: u32,
    /// The least of what they lack.
    least: u32,
    /// How much to ask for.
    size: u32,
    /// Of the last grant: how much it was, at most the size, and what is left
    /// of it when more is asked for. Both 0 where the server had none to spare.
    granted: u32,
    low: u32,
    granted_at: u64,
    /// Until when what is in hand may be spent.
    lapses_at: u64,
    used_at: u64,
    /// When the key owes nothing, by our clock, as the server told it last: at
    /// the earliest, for it is reckoned from when it was asked.
    tat: Tat,
    /// By how much later it may be: the last answer's time on the way.
    trip: u64,
    /// Not to be asked for any before.
    hold: u64,
    /// How often in a row, more or less, the server had not enough.
    short: u8,
    asking: bool,
    /// The key was made whole since it was asked for: what the answer says may
    /// be of before.
    void: bool,
}

impl Share {
    /// An empty share.
    pub(crate) fn new(gcra: Gcra, now: u64) -> Self {
        Self {
            gcra,
            tokens: 0,
            reserved: 0,
            waiting: 0,
            least: u32::MAX,
            size: 1,
            granted: 0,
            low: 0,
            granted_at: 0,
            lapses_at: 0,
            used_at: now,
            tat: Tat::default(),
            trip: 0,
            hold: 0,
            short: 0,
            asking: false,
            void: false,
        }
    }

    /// What is in hand.
    pub(crate) const fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Whether an answer is on its way.
    pub(crate) const fn is_asking(&self) -> bool {
        self.asking
    }

    /// How long the last answer was under way.
    pub(crate) const fn trip(&self) -> u64 {
        self.trip
    }

    /// How long a share is kept that is not used up, in nanoseconds.
    pub(crate) fn keep(&self) -> u64 {
        (self.gcra.window() / 4).clamp(KEEP_LEAST, KEEP_MOST)
    }

    /// Half of it by chance, or those who ask first would ever do so.
    fn hold_for(&self, sent: u64) -> u64 {
        let hold = ((self.gcra.window() / HOLD_PART) << self.short).min(HOLD_MOST);
        // Good enough for that: a multiplication stirs the low bits up.
        let chance = sent.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
        hold / 2 + hold / 2 * chance / 256
    }

    /// From when on nothing is lost by forgetting it.
    pub(crate) fn spent_at(&self) -> u64 {
        if self.asking || self.waiting > 0 {
            return u64::MAX - 1;
        }
        // Not for as long as it is refused: nobody may ask any more.
        let known = self.tat.nanos_up().max(self.hold);
        let idle = self.used_at + KEEP_MOST;
        let idle = idle.max(known.min(self.used_at + 10 * KEEP_MOST));
        if self.tokens > 0 {
            idle.max(self.lapses_at)
        } else {
            idle
        }
    }

    /// What may be taken by who did not wait.
    fn free(&self, now: u64) -> u32 {
        if now >= self.lapses_at {
            return 0;
        }
        self.tokens - self.reserved
    }

    /// What would come of a request of this cost. Changes nothing.
    ///
    /// What the server would refuse is known where it is `sure` that nobody
    /// gives charges back.
    #[inline]
    pub(crate) fn offer(&self, now: u64, cost: u32, sure: bool) -> Take {
        let free = self.free(now);
        if cost <= free {
            return Take::Pass;
        }
        self.offer_more(now, cost, free, sure)
    }

    #[cold]
    fn offer_more(&self, now: u64, cost: u32, free: u32, sure: bool) -> Take {
        if cost > self.gcra.burst() {
            return Take::Never;
        }
        let held = self.hold.saturating_sub(now);
        match self.gcra.decide(self.tat, now, cost - free) {
            Ruling::Pass { .. } if held == 0 => Take::Ask,
            Ruling::Wait { .. } if held == 0 && !sure => Take::Ask,
            Ruling::Pass { .. } => Take::Wait(held + self.trip),
            Ruling::Wait { wait, .. } => Take::Wait(wait.max(held) + self.trip),
            Ruling::Never => Take::Never,
        }
    }

    /// Spends what [`offer`](Self::offer) found to be there. Whether more is
    /// to be asked for by now.
    #[inline]
    pub(crate) fn spend(&mut self, now: u64, cost: u32) -> bool {
        debug_assert!(cost <= self.tokens - self.reserved);
        self.tokens -= cost;
        self.used_at = now;
        self.is_low(now)
    }

    #[inline]
    fn is_low(&self, now: u64) -> bool {
        self.low > 0 && self.tokens - self.reserved <= self.low && !self.asking && now >= self.hold
    }

    /// A request of this cost waits for the next answer.
    pub(crate) fn wait(&mut self, now: u64, cost: u32) {
        let lacking = cost - self.free(now).min(cost);
        self.waiting = self.waiting.saturating_add(cost);
        self.least = self.least.min(lacking.max(1));
        self.used_at = now;
    }

    /// It waits no longer: it has its answer, or went away.
    pub(crate) fn waited(&mut self, cost: u32) {
        self.waiting = self.waiting.saturating_sub(cost);
        self.reserved = self.reserved.saturating_sub(cost).min(self.waiting);
        if self.waiting == 0 {
            self.least = u32::MAX;
        }
    }

    /// What to ask the server for now, if anything: then it is asked, and
    /// [`answered`](Self::answered) or [`failed`](Self::failed) must follow.
    pub(crate) fn ask(&mut self, now: u64, most: u32) -> Option<Want> {
        if self.asking || (self.waiting == 0 && !self.is_low(now)) {
            return None;
        }
        // What is reserved is for some of those who wait.
        let held = if now < self.lapses_at { self.tokens } else { 0 };
        let burst = self.gcra.burst();
        let need = self.waiting.saturating_sub(held).min(burst).min(MOST);
        if need > 0 && now < self.hold {
            return None;
        }
        // Most keys are asked for seldom, and take nothing ahead.
        let lasted = now.saturating_sub(self.granted_at);
        let keep = self.keep();
        if self.granted >= self.size && lasted < keep / BRISK {
            self.size = self.size.saturating_mul(2).min(most);
        } else if lasted > keep {
            self.size = (self.size / 2).max(1);
        }
        self.size = self.size.min(most);
        self.asking = true;
        let least = if need == 0 { 0 } else { self.least.min(need) };
        self.least = u32::MAX;
        Some(Want {
            least,
            need,
            // Who waits takes its own at once, one of them of the share.
            more: self.size.saturating_sub(need.min(1)),
        })
    }

    /// The answer to what was asked at `sent`.
    pub(crate) fn answered(&mut self, sent: u64, now: u64, want: Want, grant: Grant) {
        self.asking = false;
        if mem::take(&mut self.void) {
            // What was charged after the reset all the same, time brings back.
            return;
        }
        if now >= self.lapses_at {
            self.tokens = 0;
            self.reserved = 0;
        }
        self.trip = now.saturating_sub(sent);
        self.tat = grant.tat;
        // Of several keys each is given or none: this one may have had enough.
        let for_another = grant.granted == 0
            && want.least > 0
            && self.gcra.pass(grant.tat, sent, want.least).is_some();
        if grant.granted < want.need && !for_another {
            // Others take what comes back before us: to ask more often than
            // anything is left would only cost the server.
            let fresh = sent > self.hold + self.keep();
            self.hold = sent + self.hold_for(sent);
            self.short = if fresh {
                0
            } else {
                (self.short + 1).min(HOLD_DOUBLED)
            };
        }
        self.tokens = self.tokens.saturating_add(grant.granted);
        self.reserved = self.tokens.min(self.waiting);
        self.granted = grant.granted.min(self.size);
        // Where there is little left nobody has any before it is needed: who
        // asks ahead is never refused, and would have the most of it.
        let in_full = grant.granted >= want.need.saturating_add(want.more);
        self.low = if in_full { self.granted / LOW } else { 0 };
        if grant.granted > 0 {
            // It was charged after that, so that it is no older.
            self.granted_at = sent;
            self.lapses_at = sent + LAPSE * self.keep();
        }
    }

    /// It was not asked after all.
    pub(crate) fn unasked(&mut self) {
        self.asking = false;
        self.void = false;
    }

    /// There is no answer. What may have been charged is lost: the next that is
    /// lost has nothing for the share.
    pub(crate) fn failed(&mut self) {
        self.unasked();
        self.size = 1;
        self.granted = 0;
        self.low = 0;
    }

    /// A charge that was taken back is made once more.
    pub(crate) fn withdraw(&mut self, cost: u32) {
        self.tokens = self.tokens.saturating_sub(cost).max(self.reserved);
    }

    /// What is to be given back by now, which is then no longer in hand: all,
    /// where `all` is said, or what was not used up in its time.
    pub(crate) fn give_back(&mut self, now: u64, all: bool) -> u32 {
        let stale = self.granted_at + self.keep() <= now;
        if self.tokens == 0 || self.asking || (!all && !stale) {
            return 0;
        }
        if now >= self.lapses_at {
            self.tokens = self.reserved.min(self.tokens);
            return 0;
        }
        let back = self.tokens - self.reserved;
        self.tokens = self.reserved;
        self.size = (self.size / 2).max(1);
        self.granted = 0;
        self.low = 0;
        // The server has more by so much than it said.
        self.tat = self.gcra.refund(self.tat, now, back);
        back
    }

    /// The quota is another one from now on: what the server said of the old one
    /// is void. Whether that can be: a token is worth what was paid for it, to
    /// be spent and to be given back, and what is in hand or on its way was
    /// charged under the old one.
    pub(crate) fn requote(&mut self, gcra: Gcra) -> bool {
        let is_idle = self.tokens == 0 && self.waiting == 0 && !self.asking;
        if is_idle {
            self.gcra = gcra;
            self.doubt();
        }
        is_idle
    }

    /// Forgets what the server said last.
    pub(crate) fn doubt(&mut self) {
        self.tat = Tat::default();
        self.hold = 0;
    }

    /// The key was made whole: what was charged for us is not any more.
    pub(crate) fn reset(&mut self) {
        self.tokens = 0;
        self.reserved = 0;
        self.void = self.asking;
        self.doubt();
    }

    /// Takes a charge back that was paid from here. Whether there is room.
    pub(crate) fn refund(&mut self, now: u64, cost: u32, most: u32) -> bool {
        let fits = self.tokens.saturating_add(cost) <= most;
        if fits {
            if self.tokens == 0 {
                // It was charged at least as long ago as the last grant.
                self.granted_at = self.granted_at.max(now.saturating_sub(self.keep() / 2));
                self.lapses_at = self.granted_at + LAPSE * self.keep();
            }
            self.tokens += cost;
        }
        fits
    }

    /// The arrival time to tell a client by: the server's, as last known, and
    /// what is in hand still to come.
    pub(crate) fn arrival(&self, now: u64) -> Tat {
        match self.free(now) {
            0 => self.tat,
            free => self.gcra.refund(self.tat, now, free),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Quota;

    const MS: u64 = 1_000_000;
    const START: u64 = 1_000_000 * MS;

    fn share() -> Share {
        // It is kept for 250 ms.
        Share::new(Quota::per_second(1_000).check().unwrap(), START)
    }

    /// Asks and is given all of it.
    fn fill(share: &mut Share, now: u64, most: u32) -> u32 {
        let want = share.ask(now, most).unwrap();
        let granted = want.need + want.more;
        let tat = Tat::at(now + u64::from(granted) * MS);
        share.answered(now, now, want, Grant { granted, tat });
        granted
    }

    /// Where another of a request's keys has no room for a share.
    #[test]
    fn what_was_not_asked_after_all_changes_no_size() {
        let mut share = grown();
        let size = share.size;
        share.wait(START, 8);
        share.ask(START, 8).unwrap();
        share.unasked();
        assert!(!share.is_asking());
        assert_eq!(share.size, size);
        assert!(share.granted > 0);
    }

    /// A share that has grown to 8 tokens, of which it has 7.
    fn grown() -> Share {
        let mut share = share();
        for expected in [1, 2, 4, 8] {
            while share.offer(START, 1, true) == Take::Pass {
                share.spend(START, 1);
            }
            share.wait(START, 1);
            assert_eq!(fill(&mut share, START, 100), expected);
            share.waited(1);
            share.spend(START, 1);
        }
        assert_eq!(share.tokens(), 7);
        share
    }

    #[test]
    fn it_grows_while_it_is_used_up_soon_and_shrinks_when_it_is_not() {
        let mut share = grown();
        for _ in 0..6 {
            share.spend(START + 100 * MS, 1);
        }
        // Half used up in time, and no faster: as much again.
        assert_eq!(fill(&mut share, START + 100 * MS, 100), 8);
        assert_eq!(share.give_back(START + 349 * MS, false), 0);
        assert_eq!(share.give_back(START + 350 * MS, false), 9);
        share.wait(START + 400 * MS, 1);
        assert_eq!(fill(&mut share, START + 400 * MS, 100), 2);
        // Never above what it may be.
        let mut share = grown();
        while share.tokens() > 2 {
            share.spend(START, 1);
        }
        assert_eq!(fill(&mut share, START, 10), 10);
    }

    #[test]
    fn it_is_asked_for_before_it_is_empty_and_once_at_a_time() {
        let mut share = grown();
        let low: Vec<bool> = (0..5).map(|_| share.spend(START, 1)).collect();
        assert_eq!(low, [false, false, false, false, true]);
        assert!(share.ask(START, 100).is_some());
        assert!(!share.spend(START, 1));
        assert_eq!(share.ask(START, 100), None);
        share.wait(START, 5);
        assert_eq!(share.ask(START, 100), None);
        share.failed();
        let want = share.ask(START, 100).unwrap();
        assert_eq!((want.least, want.need), (4, 4));
    }

    #[test]
    fn what_was_asked_for_is_for_who_waited() {
        let mut share = share();
        share.wait(START, 1);
        share.wait(START, 1);
        assert_eq!(fill(&mut share, START, 1), 2);
        // Who comes later does not get before them.
        assert_eq!(share.offer(START, 1, true), Take::Ask);
        share.waited(1);
        assert_eq!(share.offer(START, 1, true), Take::Pass);
        share.spend(START, 1);
        // One of them went away: what was for it is for all.
        share.waited(1);
        assert_eq!(share.offer(START, 1, true), Take::Pass);
    }

    #[test]
    fn what_is_not_given_back_lapses() {
        let mut share = grown();
        assert_eq!(share.offer(START + 749 * MS, 7, true), Take::Pass);
        assert_ne!(share.offer(START + 750 * MS, 1, true), Take::Pass);
        assert!(share.spent_at() >= START + 750 * MS);
        assert_eq!(share.give_back(START + 750 * MS, true), 0);
        assert_eq!(share.tokens(), 0);
    }

    #[test]
    fn what_the_server_refuses_is_refused_until_it_may_pass() {
        let mut share = Share::new(Quota::per_second(10).check().unwrap(), START);
        share.wait(START, 1);
        let want = share.ask(START, 100).unwrap();
        let tat = Tat::at(START + 1_000 * MS);
        let grant = Grant { granted: 0, tat };
        // The answer was under way for 2 ms.
        share.answered(START, START + 2 * MS, want, grant);
        share.waited(1);
        assert_eq!(share.offer(START + 2 * MS, 1, true), Take::Wait(100 * MS));
        assert_eq!(
            share.offer(START + 2 * MS, 10, true),
            Take::Wait(1_000 * MS)
        );
        assert_eq!(share.offer(START + 2 * MS, 11, true), Take::Never);
        assert_eq!(share.offer(START + 100 * MS, 1, true), Take::Ask);
        assert_eq!(share.offer(START + 100 * MS, 2, true), Take::Wait(102 * MS));
        // Where charges are given back, it may pass at any time, but nobody
        // asks all the time.
        assert_eq!(share.offer(START + 20 * MS, 1, false), Take::Ask);
        assert!(matches!(
            share.offer(START + 5 * MS, 1, false),
            Take::Wait(_)
        ));
        // It is remembered for as long.
        assert!(share.spent_at() >= START + 1_000 * MS);
    }

    #[test]
    fn what_is_told_is_the_server_s_and_what_is_in_hand() {
        let share = grown();
        let gcra = share.gcra;
        // The last answer said that 8 are charged, of which 7 are here.
        assert_eq!(gcra.remaining(share.arrival(START), START), 999);
        assert_eq!(gcra.until_full(share.arrival(START), START), MS);
    }

    #[test]
    fn a_charge_taken_back_is_in_hand_as_far_as_there_is_room() {
        let mut share = grown();
        assert!(share.refund(START, 3, 10));
        assert_eq!(share.tokens(), 10);
        assert!(!share.refund(START, 1, 10));
        share.withdraw(3);
        assert_eq!(share.tokens(), 7);
    }

    #[test]
    fn refused_for_another_key_s_sake_it_may_be_asked_for_again() {
        let mut share = share();
        share.wait(START, 1);
        let want = share.ask(START, 100).unwrap();
        // There is plenty of this key, and nothing of one that goes with it.
        let tat = Tat::at(START + 10 * MS);
        let grant = Grant { granted: 0, tat };
        share.answered(START, START, want, grant);
        share.waited(1);
        assert_eq!(share.offer(START, 1, true), Take::Ask);
        // This time it is the key's own refusal, by too little.
        share.wait(START, 1);
        let want = share.ask(START, 100).unwrap();
        let tat = Tat::at(START + 1_000 * MS);
        let grant = Grant { granted: 0, tat };
        share.answered(START, START, want, grant);
        share.waited(1);
        assert!(matches!(share.offer(START + MS, 1, true), Take::Wait(_)));
    }

    #[test]
    fn what_was_asked_for_before_a_reset_is_not_in_hand_after_it() {
        let mut share = grown();
        share.wait(START, 8);
        let want = share.ask(START, 100).unwrap();
        share.reset();
        let granted = want.need + want.more;
        let tat = Tat::at(START + 100 * MS);
        share.answered(START, START, want, Grant { granted, tat });
        assert_eq!(share.tokens(), 0);
        share.waited(8);
        assert_eq!(share.offer(START, 8, true), Take::Ask);
        assert!(fill_for(&mut share, 8) >= 8);
    }

    fn fill_for(share: &mut Share, cost: u32) -> u32 {
        share.wait(START, cost);
        let granted = fill(share, START, 100);
        share.waited(cost);
        granted
    }
}
