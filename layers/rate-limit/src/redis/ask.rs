//! What a request asks of a fleet's limits, and what comes of what is known of
//! its keys.

use buttress_core::{key::Key, keyed::KeyId};

use crate::{
    Gcra,
    gcra::{Ruling, Tat},
    store::{Ask, Changes, Decision, Detail, Standing, Verdict},
};

/// What one request asks of one limit.
#[derive(Clone, Debug)]
pub(crate) struct FleetAsk {
    /// Index of the limit.
    pub(crate) limit: usize,
    /// The key by what every process knows it by.
    pub(crate) key: Key,
    /// The key by what this process knows it by.
    pub(crate) id: KeyId,
    pub(crate) cost: u32,
    /// The key's quota, as this process has it.
    pub(crate) gcra: Gcra,
}

impl FleetAsk {
    /// The same of a table in memory.
    pub(crate) fn local(&self) -> Ask {
        Ask {
            limit: self.limit,
            id: self.id,
            cost: self.cost,
            quota: Some(self.gcra),
        }
    }
}

/// Decides by the states `before`, one for each of `asks`, at `now`: all pass
/// or none does. What they are after that, too: of those that owe the charge if
/// all pass, or were put right if not.
///
/// The very ruling of the store in memory, so that the two cannot differ.
pub(crate) fn decide(asks: &[FleetAsk], states: &mut [Tat], now: u64, detail: Detail) -> Decision {
    let mut verdict = Verdict::Pass;
    for (ask, &before) in asks.iter().zip(&*states) {
        let limit = ask.limit;
        match ask.gcra.decide(before, now, ask.cost) {
            Ruling::Pass { .. } => {}
            Ruling::Wait { wait, .. } => {
                verdict = match verdict {
                    Verdict::Pass => Verdict::Wait { limit, wait },
                    // Only when the longest wait is over do all let in.
                    Verdict::Wait { wait: longest, .. } if wait > longest => {
                        Verdict::Wait { limit, wait }
                    }
                    other => other,
                }
            }
            Ruling::Never => {
                if !matches!(verdict, Verdict::Never { .. }) {
                    verdict = Verdict::Never { limit };
                }
            }
        }
    }
    for (ask, state) in asks.iter().zip(&mut *states) {
        match ask.gcra.decide(*state, now, ask.cost) {
            Ruling::Pass { tat } if verdict == Verdict::Pass => *state = tat,
            Ruling::Wait {
                heal: Some(heal), ..
            } => *state = heal,
            _ => {}
        }
    }
    let mut decision = Decision {
        verdict,
        tightest: None,
        all: Vec::new(),
        changes: Changes::default(),
    };
    tell(asks, states, now, detail, &mut decision);
    decision
}

/// Works out how the keys stand.
pub(crate) fn tell(
    asks: &[FleetAsk],
    states: &[Tat],
    now: u64,
    detail: Detail,
    decision: &mut Decision,
) {
    if detail == Detail::None {
        return;
    }
    for (ask, &tat) in asks.iter().zip(states) {
        let standing = Standing::of(ask.limit, &ask.gcra, tat, now, detail);
        if detail == Detail::All {
            decision.all.push(standing);
        }
        let shown = match decision.verdict {
            // A refusal is told in the terms of the limit that refused.
            Verdict::Wait { limit, .. } | Verdict::Never { limit } | Verdict::NoRoom { limit } => {
                limit == ask.limit
            }
            Verdict::Pass => decision
                .tightest
                .is_none_or(|tightest| standing.is_tighter_than(&tightest)),
        };
        if shown {
            decision.tightest = Some(standing);
        }
    }
}
