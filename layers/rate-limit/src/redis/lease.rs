//! Leased: tokens are taken ahead, and charged here.
//!
//! A process holds a *share* of a key's quota: tokens that are charged in Redis
//! already, for requests to come. A request that the share can pay takes no
//! trip, no future and some tens of nanoseconds. The share is asked for again
//! when a quarter of it is left, in the background, once at a time for a key;
//! it doubles while it lasts for less than a quarter of the time after which it
//! would be given back, and never holds more than [`Lease::share`] and a
//! quarter. Redis gives of what is left an eighth at most: near the limit a
//! share is one token, which is strict.
//!
//! ```text
//!            what is left / 8                  a request's cost
//!  Redis ───────────────────────▶ share ───────────────────────▶ passes
//!    ▲                              │
//!    └── not used up in time ◀──────┘
//! ```
//!
//! # The bounds
//!
//! With N processes and a share of k, over any span of time t all together let
//! no more through than
//!
//! ```text
//! burst + t × limit / period + N × 1.25 k
//! ```
//!
//! for a token is in Redis, in a share, or spent: it moves, and only time makes
//! more. The last term is what was in the shares when the span began; from an
//! unused quota on, it is nothing. What a process holds that was killed, or
//! whose answer from Redis was lost, nobody spends: `1.25 k` at most, and an
//! answer, until time has brought it back.
//!
//! What waits in a process for the same answer counts with its share until it
//! is told.
//!
//! A request that costs more than a share holds, or the whole burst, is charged
//! in Redis, as in strict mode, and shares its trip with others of its kind. The
//! bound is the same: it takes nothing ahead. Where it lacks what this process
//! holds of the key, that is given back first, and asked once more.
//!
//! A share that is not used up within a quarter of the time in which the whole
//! burst comes back, at least 100 ms and at most a second, is given back. Where
//! Redis cannot be reached it lapses after three times as long.
//!
//! Source: the prepaid lease of bucket4j's and RLQS's kind, with GCRA in the
//! place of a counter; the sizes are our own, found by simulation (`sim.rs`).

mod script;
mod share;
#[cfg(test)]
mod sim;
mod store;

use std::{sync::Arc, time::Duration};

use buttress_core::clock;
use tokio::time::{Instant as Deadline, timeout_at};

use super::{
    ask::FleetAsk,
    ground::{Ground, Stand, Unanswered},
    strict::Strict,
};
use crate::store::{Decision, Detail, Verdict};

use self::{share::MOST, store::Shares};

/// How much of a quota a process takes ahead: see
/// [`Mode::Leased`](super::Mode::Leased).
///
/// A share is of tokens that are charged in Redis already. It is asked for
/// again in the background before it is used up; it grows under load, to
/// [`share`](Self::share), and near the limit it shrinks to the one token that
/// a request needs, for Redis gives ahead an eighth of what is left at most.
/// What is not used up in a quarter of the time in which the whole burst comes
/// back (at least 100 ms, at most a second) is given back, and all of it at the
/// end: [`FleetHandle::give_back`](super::FleetHandle::give_back), or when the
/// last of the layer is dropped in a tokio runtime.
///
/// # How exact it is
///
/// With N processes and a share of k, in any span of time `t` all together let
/// through at most
///
/// ```text
/// burst + t × limit / period + N × 1.25 k
/// ```
///
/// The last term is what they held when the span began: from an unused quota
/// on, there is nothing of it, and what passes is within the bound of
/// [`Mode::Strict`](super::Mode::Strict). A process that is killed takes what
/// it holds with it, at most `1.25 k` and what its requests wait for, until
/// time has brought it back; an answer that is lost, what it granted.
///
/// A request that costs more than a share, or the whole burst, is charged in
/// Redis as in strict mode: the bound is the same. It passes only where Redis
/// has all of it, or would have with what its own process gives back: what
/// others hold it does without, at most until they give it back.
///
/// Where all processes ask for more than there is, each waits after a refusal
/// for as long as the next token takes, or for a 64th to a 16th of the time in
/// which the whole burst comes back, at most 250 ms, before it asks again:
/// simulated, they pass 99 % or more of what strict lets pass within ten
/// periods, from one process to 50 of ten requests a period each.
///
/// Remaining and Reset are what Redis said last and what is in hand: what other
/// processes took since is not in them.
///
/// While Redis is gone a share is spent, and then it goes as
/// [`on_store_error`](crate::RateLimitBuilder::on_store_error) says; what was
/// not spent after three times the time that it is kept is lost. At most
/// 100 000 keys of a limit (or its [`max_keys`](crate::Limit::max_keys)) have a
/// share at a time, and a key has one under one quota at a time, where a closure
/// chooses among several or it was replaced; what finds none is charged in
/// Redis, one request at a time.
///
/// ```
/// use buttress_rate_limit::redis::{Lease, Mode};
///
/// let mode = Mode::Leased(Lease::default().share(500));
/// # let _ = mode;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    share: u32,
}

impl Default for Lease {
    fn default() -> Self {
        Self { share: 100 }
    }
}

impl Lease {
    /// How many tokens of a key's quota a process takes at a time, at most.
    /// Default: 100. 0 is taken for 1, which is strict; more than 2²⁰ for that.
    ///
    /// The greater it is, the fewer trips a key costs that is asked for often;
    /// the share grows to it only under such load. The bounds on what the fleet
    /// lets through above the quota are in its proportion: see
    /// [`Mode::Leased`](super::Mode::Leased).
    #[must_use]
    pub fn share(mut self, tokens: u32) -> Self {
        self.share = tokens.clamp(1, MOST);
        self
    }
}

/// How much later than an operation's time a request's is over.
const GRACE: Duration = Duration::from_millis(5);

pub(crate) struct Leased {
    ground: Arc<Ground>,
    shares: Arc<Shares>,
    /// For what has no share.
    strict: Strict,
}

impl Leased {
    #[expect(clippy::needless_pass_by_value, reason = "it is what was set")]
    pub(crate) fn new(ground: Arc<Ground>, lease: Lease) -> Self {
        Self {
            shares: Shares::new(Arc::clone(&ground), lease.share),
            strict: Strict::new(Arc::clone(&ground)),
            ground,
        }
    }

    /// Charges the shares, where they can pay, and refuses what the server is
    /// known to refuse.
    #[inline]
    pub(crate) fn decide_now(&self, asks: &[FleetAsk], detail: Detail) -> Option<Decision> {
        if self.is_big(asks) {
            let refusal = self.strict.decide_now(asks, detail)?;
            // What is in hand may be what it lacks.
            return (!self.has_the_rest(asks)).then_some(refusal);
        }
        self.shares.decide_now(asks, detail)
    }

    /// Whether no share would help it: it is more than one holds, or all that
    /// there ever is.
    #[inline]
    fn is_big(&self, asks: &[FleetAsk]) -> bool {
        let most = self.shares.most();
        (asks.iter()).any(|ask| ask.cost > 0 && ask.cost >= ask.gcra.burst().min(most + 1))
    }

    /// Whether it would pass, as far as this process knows, if that gave back
    /// what it holds; and holds anything.
    #[cold]
    fn has_the_rest(&self, asks: &[FleetAsk]) -> bool {
        let at = clock::now();
        let now = at.as_nanos();
        let mut any = false;
        let all = asks.iter().all(|ask| {
            let in_hand = self.shares.in_hand(ask);
            any |= in_hand > 0;
            let tat = self.ground.known(ask, at);
            let tat = ask.gcra.refund(tat, now, in_hand);
            ask.gcra.pass(tat, now, ask.cost).is_some()
        });
        all && any
    }

    /// Decides in Redis, where what is in hand counts, too.
    async fn decide_big(&self, asks: &[FleetAsk], detail: Detail) -> Result<Decision, Unanswered> {
        // What is known to be refused is here for what is in hand.
        if self.strict.decide_now(asks, Detail::None).is_none() {
            let decision = self.strict.decide(asks, detail).await?;
            if !matches!(decision.verdict, Verdict::Wait { .. }) || !self.has_the_rest(asks) {
                return Ok(decision);
            }
        }
        self.shares.give_back_of(asks).await;
        self.strict.decide(asks, detail).await
    }

    pub(crate) async fn decide(
        &self,
        asks: &[FleetAsk],
        detail: Detail,
    ) -> Result<Decision, Unanswered> {
        // What the shares were waited for counts. Later than the call's own
        // time limit, of which the gate has to hear.
        let deadline = Deadline::now() + self.ground.redis.timeout() + GRACE;
        if self.is_big(asks) {
            return timeout_at(deadline, self.decide_big(asks, detail))
                .await
                .unwrap_or(Err(Unanswered::Unheard));
        }
        match self.shares.decide(asks, detail).await? {
            Some(decision) => Ok(decision),
            // There is no room for another share, or others were quicker time
            // and again.
            None => timeout_at(deadline, self.strict.decide(asks, detail))
                .await
                .unwrap_or(Err(Unanswered::Unheard)),
        }
    }

    /// Gives charges back: to the shares, where there is room.
    pub(crate) async fn refund(&self, asks: &[FleetAsk]) -> Result<Vec<Stand>, Unanswered> {
        if let Some(stands) = self.shares.refund(asks) {
            return Ok(stands);
        }
        self.strict.refund(asks).await
    }

    /// How the key stands in Redis, and what is in hand here still to come.
    pub(crate) async fn peek(&self, ask: &FleetAsk) -> Result<Stand, Unanswered> {
        let (tat, now) = self.strict.peek(ask).await?;
        let tat = match self.shares.in_hand(ask) {
            0 => tat,
            tokens => ask.gcra.refund(tat, now, tokens),
        };
        Ok((tat, now))
    }

    pub(crate) async fn reset(&self, ask: &FleetAsk) -> Result<bool, Unanswered> {
        // What is in hand was charged to what is about to be forgotten.
        let held = self.shares.reset(ask);
        let reset = self.strict.reset(ask).await;
        self.shares.reset(ask);
        reset.map(|reset| reset || held)
    }

    /// Gives all shares back, and takes none from then on.
    pub(crate) async fn give_back(&self) {
        self.shares.give_back_all().await;
    }
}
