//! Strict: what passes was charged in Redis.

use std::{pin::pin, sync::Arc};

use buttress_core::clock;
use buttress_redis::{Cmd, Slot, Value};
use tokio::{
    sync::oneshot,
    time::{Instant as Deadline, timeout_at},
};

use super::{
    ask::{self, FleetAsk},
    ground::{Ground, Stand, Unanswered},
    lane::{Charge, Check, Found, Lanes, States},
    script::{self, Alike, Scripts},
};
use crate::{
    gcra::Tat,
    store::{Decision, Detail, Verdict},
};

/// Every check that may pass is one of a script's in Redis.
pub(crate) struct Strict {
    ground: Arc<Ground>,
    lanes: Arc<Lanes>,
}

impl Strict {
    pub(crate) fn new(ground: Arc<Ground>) -> Self {
        Self::with(ground, Scripts::default())
    }

    pub(crate) fn with(ground: Arc<Ground>, scripts: Scripts) -> Self {
        let lanes = Arc::new(Lanes::new(Arc::clone(&ground), scripts));
        Self { ground, lanes }
    }

    #[cfg(test)]
    pub(crate) fn scripts(&self) -> &Scripts {
        self.lanes.scripts()
    }

    /// Refuses what is refused as far as this process knows.
    pub(crate) fn decide_now(&self, asks: &[FleetAsk], detail: Detail) -> Option<Decision> {
        // Of a server that is gone nothing is known.
        if !self.ground.redis.is_up() {
            return None;
        }
        self.ground.foresee(asks, detail)
    }

    pub(crate) async fn decide(
        &self,
        asks: &[FleetAsk],
        detail: Detail,
    ) -> Result<Decision, Unanswered> {
        let check: Check = asks.iter().map(|ask| self.charge(ask)).collect();
        let mut found = if check.len() > 1 && self.ground.redis.is_cluster() {
            Box::pin(self.check_apart(asks, check)).await?
        } else {
            self.lanes.check(check).await?
        };
        let now = found.now;
        Ok(ask::decide(asks, found.states.as_mut(), now, detail))
    }

    fn charge(&self, ask: &FleetAsk) -> Charge {
        Charge {
            limit: ask.limit,
            id: ask.id,
            key: self.ground.key(ask),
            gcra: ask.gcra,
            cost: ask.cost,
        }
    }

    /// Checks keys that may be in several slots: the slots in parallel, and
    /// where one refuses, what the others have charged is given back.
    async fn check_apart(&self, asks: &[FleetAsk], check: Check) -> Result<Found, Unanswered> {
        let mut parts: Vec<(Slot, Vec<usize>)> = Vec::new();
        for (index, charge) in check.iter().enumerate() {
            let slot = charge.key.slot();
            match parts.iter_mut().find(|(other, _)| *other == slot) {
                Some((_, indices)) => indices.push(index),
                None => parts.push((slot, vec![index])),
            }
        }
        if parts.len() == 1 {
            return self.lanes.check(check).await;
        }
        let parts: Vec<_> = (parts.into_iter())
            .map(|(_, indices)| {
                let check: Check = indices.iter().map(|&index| check[index].clone()).collect();
                let asks: Vec<_> = indices.iter().map(|&index| asks[index].clone()).collect();
                (indices, asks, check)
            })
            .collect();
        let count = asks.len();
        let (tell, told) = oneshot::channel();
        let deadline = Deadline::now() + self.ground.redis.timeout();
        // In a task of its own: who goes away in the middle of it would leave
        // some charged and others not.
        let (ground, lanes) = (Arc::clone(&self.ground), Arc::clone(&self.lanes));
        tokio::spawn(async move {
            let under_way: Vec<_> = parts
                .into_iter()
                .map(|(indices, asks, check)| {
                    let lanes = Arc::clone(&lanes);
                    let task = tokio::spawn(async move { lanes.check(check).await });
                    (indices, asks, task)
                })
                .collect();
            let now = clock::now().as_nanos();
            let mut states = vec![Tat::default(); count];
            let mut passed = Vec::new();
            let mut all = true;
            let mut failed = None;
            for (indices, asks, task) in under_way {
                match task.await.unwrap_or(Err(Unanswered::Unasked)) {
                    Ok(mut found) => {
                        for (&index, state) in indices.iter().zip(&*found.states.as_mut()) {
                            states[index] = state.moved(found.now, now);
                        }
                        let decision =
                            ask::decide(&asks, found.states.as_mut(), found.now, Detail::None);
                        if decision.verdict == Verdict::Pass {
                            passed.push(asks);
                        } else {
                            all = false;
                        }
                    }
                    Err(error) => {
                        all = false;
                        failed = Some(error);
                    }
                }
            }
            let answer = match failed {
                Some(error) => Err(error),
                None => Ok(Found {
                    now,
                    states: States::Several(states),
                }),
            };
            let give_back = async {
                for asks in passed.iter().filter(|_| !all) {
                    let _ = give_back(&ground, &lanes, asks).await;
                }
            };
            let mut give_back = pin!(give_back);
            // Before it is told, so that what is asked next finds it; but who
            // asked has no more time than one operation may take.
            let in_time = timeout_at(deadline, &mut give_back).await.is_ok();
            let _ = tell.send(answer);
            if !in_time {
                give_back.await;
            }
        });
        told.await.unwrap_or(Err(Unanswered::Unasked))
    }

    /// Gives the charges back, and tells how the keys stand then.
    pub(crate) async fn refund(&self, asks: &[FleetAsk]) -> Result<Vec<Stand>, Unanswered> {
        let mut parts: Vec<(Option<Slot>, Vec<usize>)> = Vec::new();
        let is_cluster = self.ground.redis.is_cluster();
        for (index, ask) in asks.iter().enumerate() {
            let slot = is_cluster.then(|| self.ground.key(ask).slot());
            match parts.iter_mut().find(|(other, _)| *other == slot) {
                Some((_, indices)) => indices.push(index),
                None => parts.push((slot, vec![index])),
            }
        }
        if parts.len() == 1 {
            return give_back(&self.ground, &self.lanes, asks).await;
        }
        // All at once: one after the other could take a timeout each.
        let under_way: Vec<_> = (parts.into_iter())
            .map(|(_, indices)| {
                let part: Vec<_> = indices.iter().map(|&index| asks[index].clone()).collect();
                let (ground, lanes) = (Arc::clone(&self.ground), Arc::clone(&self.lanes));
                let task = tokio::spawn(async move { give_back(&ground, &lanes, &part).await });
                (indices, task)
            })
            .collect();
        let mut stands = vec![(Tat::default(), 0); asks.len()];
        let mut failed = None;
        for (indices, task) in under_way {
            match task.await.unwrap_or(Err(Unanswered::Unasked)) {
                Ok(part) => {
                    for (index, stand) in indices.into_iter().zip(part) {
                        stands[index] = stand;
                    }
                }
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(stands), Err)
    }

    pub(crate) async fn peek(&self, ask: &FleetAsk) -> Result<Stand, Unanswered> {
        let key = self.ground.key(ask);
        // A charge of nothing.
        let call = self.lanes.scripts().check(&Alike {
            keys: vec![&key],
            counts: vec![1],
            gcra: ask.gcra,
            cost: 0,
        });
        let now = clock::now();
        let value: Value = self.ground.redis.call("rate_limit_peek", &call).await?;
        let states = script::answer(&value, [ask.gcra].into_iter(), now.as_nanos());
        let states = states.ok_or(Unanswered::Unheard)?;
        Ok((states[0], now.as_nanos()))
    }

    pub(crate) async fn reset(&self, ask: &FleetAsk) -> Result<bool, Unanswered> {
        let key = self.ground.key(ask);
        let mut cmd = Cmd::new();
        cmd.arg("DEL").arg(key.as_str());
        self.ground.forget(ask.limit, ask.id);
        let answer = self.ground.redis.run::<u64>("rate_limit_reset", &cmd).await;
        self.ground.forget(ask.limit, ask.id);
        Ok(answer? > 0)
    }
}

/// Gives back charges to keys of one slot.
async fn give_back(
    ground: &Ground,
    lanes: &Lanes,
    asks: &[FleetAsk],
) -> Result<Vec<Stand>, Unanswered> {
    let keys: Vec<_> = asks.iter().map(|ask| ground.key(ask)).collect();
    let charges: Vec<_> = (keys.iter().zip(asks))
        .map(|(key, ask)| (key, ask.gcra, ask.cost))
        .collect();
    let call = lanes.scripts().refund(&charges);
    // Before, so that no answer from before it is learnt after it; and after,
    // since answers that came in between know nothing of it.
    distrust(ground, asks);
    let now = clock::now().as_nanos();
    let answer = ground.redis.call::<Value>("rate_limit_refund", &call).await;
    if answer.is_err() {
        // What was known is all there is to go by now.
        distrust(ground, asks);
    } else {
        forget(ground, asks);
    }
    let gcras = asks.iter().map(|ask| ask.gcra);
    let states = script::answer(&answer?, gcras, now).ok_or(Unanswered::Unheard)?;
    Ok(states.into_iter().map(|state| (state, now)).collect())
}

fn distrust(ground: &Ground, asks: &[FleetAsk]) {
    for ask in asks {
        ground.distrust(ask.id);
    }
}

fn forget(ground: &Ground, asks: &[FleetAsk]) {
    for ask in asks {
        ground.forget(ask.limit, ask.id);
    }
}
