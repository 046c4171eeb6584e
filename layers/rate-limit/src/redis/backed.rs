//! The fleet's store, and what is done without it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use buttress_core::{
    clock::{self, Instant},
    key::Key,
    keyed::KeyId,
    sync::Mutex,
};
use buttress_redis::{ErrorKind, Value};
use tokio::runtime;

use super::{
    OnStoreError,
    ask::FleetAsk,
    fleet::Fleet,
    ground::{Ground, Stand, Unanswered},
    script::{self, Owing, Scripts},
};
use crate::{
    Gcra,
    store::{self, Ask, Decision, Detail, Verdict},
};

/// The most keys whose charges are remembered until the server is back: those
/// after them are let through and not told.
const MOST_OWED: usize = 16_384;

/// How long after it could not be told the server is told again.
const PAUSE: Duration = Duration::from_millis(100);

/// How many of them go in one call.
const AT_ONCE: usize = 64;

pub(crate) struct Backed {
    pub(crate) ground: Arc<Ground>,
    fleet: Fleet,
    on_error: OnStoreError,
    /// How many processes share the quota when each is alone.
    share: u32,
    owed: Arc<Owed>,
}

/// What becomes of a request.
pub(crate) enum Outcome {
    /// It was decided, by the fleet's state or this process's.
    Decided(Decision),
    /// The same, by this process's alone.
    Alone(Decision),
    /// No decision: it is let through.
    Allowed,
    /// No decision: it is refused.
    Denied,
}

impl Backed {
    pub(crate) fn new(
        ground: Arc<Ground>,
        fleet: Fleet,
        on_error: OnStoreError,
        share: u32,
    ) -> Self {
        Self {
            ground,
            fleet,
            on_error,
            share,
            owed: Arc::default(),
        }
    }

    /// Decides here and now, where the server need not be asked or cannot be.
    pub(crate) fn decide_now(&self, asks: &[FleetAsk], detail: Detail) -> Option<Outcome> {
        let is_up = self.ground.redis.is_up();
        if is_up && self.owed.any.load(Ordering::Relaxed) {
            self.write_back();
        }
        if let Some(decision) = self.fleet.decide_now(asks, detail) {
            return Some(Outcome::Decided(decision));
        }
        // Who would ask it now would only hear that it is gone.
        (!is_up).then(|| self.without(asks, detail, true))
    }

    /// Decides, within the time that an operation may take.
    pub(crate) async fn decide(&self, asks: &[FleetAsk], detail: Detail) -> Outcome {
        match self.fleet.decide(asks, detail).await {
            Ok(decision) => Outcome::Decided(decision),
            Err(Unanswered(error)) => {
                // A server that was stopped does what it was sent when it goes
                // on: what it may have charged yet is not charged twice.
                let kind = error.as_ref().map(buttress_redis::Error::kind);
                self.without(asks, detail, kind != Some(ErrorKind::Timeout))
            }
        }
    }

    #[cold]
    fn without(&self, asks: &[FleetAsk], detail: Detail, owes: bool) -> Outcome {
        match self.on_error {
            OnStoreError::Allow => Outcome::Allowed,
            OnStoreError::Deny => Outcome::Denied,
            OnStoreError::Local => Outcome::Alone(self.decide_alone(asks, detail, owes)),
        }
    }

    /// Decides by what this process knows, and charges it here.
    fn decide_alone(&self, asks: &[FleetAsk], detail: Detail, owes: bool) -> Decision {
        let now = clock::now();
        let known: Vec<_> = asks.iter().map(|ask| self.ground.known(ask, now)).collect();
        let local: Vec<_> = asks.iter().map(|ask| Some(self.local(ask))).collect();
        let decision = store::decide_all(&self.ground.tables, &local, now, detail);
        if owes && decision.verdict == Verdict::Pass {
            for (ask, known) in asks.iter().zip(known) {
                let first = known.nanos_up().max(now.as_nanos());
                self.owed.note(ask, Instant::from_nanos(first));
            }
        }
        decision
    }

    /// An N-th of the quota is the quota where everything costs N times as
    /// much: what the fleet owes is owed by each, for as long as before.
    fn local(&self, ask: &FleetAsk) -> Ask {
        let mut local = ask.local();
        if ask.cost > 0 && ask.cost <= ask.gcra.burst() {
            local.cost = (ask.cost.saturating_mul(self.share)).min(ask.gcra.burst());
        }
        local
    }

    /// Gives charges back, and tells how the keys stand then. What was decided
    /// `alone` is given back here.
    pub(crate) async fn refund(&self, asks: &[FleetAsk], alone: bool) -> Vec<Stand> {
        if !alone && let Ok(stands) = self.fleet.refund(asks).await {
            return stands;
        }
        let now = clock::now();
        asks.iter()
            .map(|ask| {
                self.owed.take_back(ask);
                // At the price at which it was charged.
                let local = if alone { self.local(ask) } else { ask.local() };
                self.ground.tables[ask.limit].refund(&local, now);
                (self.ground.known(ask, now), now.as_nanos())
            })
            .collect()
    }

    pub(crate) async fn peek(&self, ask: &FleetAsk) -> Result<Stand, Unanswered> {
        self.fleet.peek(ask).await
    }

    pub(crate) async fn give_back(&self) {
        self.fleet.give_back().await;
    }

    pub(crate) async fn reset(&self, ask: &FleetAsk) -> Result<bool, Unanswered> {
        self.owed.keys.lock().remove(&(ask.limit, ask.id));
        self.fleet.reset(ask).await
    }

    /// Tells the server what was let through while it was away.
    #[cold]
    fn write_back(&self) {
        let Ok(runtime) = runtime::Handle::try_current() else {
            return;
        };
        if clock::now().as_nanos() < self.owed.again.load(Ordering::Relaxed) {
            return;
        }
        if !self.owed.any.swap(false, Ordering::AcqRel) {
            return;
        }
        let (ground, owed) = (Arc::clone(&self.ground), Arc::clone(&self.owed));
        runtime.spawn(async move { owed.write_back(&ground).await });
    }
}

/// What this process has let through alone.
#[derive(Default)]
struct Owed {
    any: AtomicBool,
    /// The server is not told before that: one node of several may be gone for
    /// long.
    again: AtomicU64,
    keys: Mutex<HashMap<(usize, KeyId), Debt>>,
}

struct Debt {
    key: Key,
    gcra: Gcra,
    cost: u32,
    /// From when on it is owed: when the first was let through, or what was
    /// owed by then would have been paid.
    first: Instant,
}

impl Owed {
    fn note(&self, ask: &FleetAsk, first: Instant) {
        if ask.cost == 0 {
            return;
        }
        {
            let mut keys = self.keys.lock();
            if keys.len() >= MOST_OWED && !keys.contains_key(&(ask.limit, ask.id)) {
                // What has been paid by time alone makes room.
                let now = clock::now();
                keys.retain(|_, debt| !debt.is_paid(now));
                if keys.len() >= MOST_OWED {
                    return;
                }
            }
            let debt = keys.entry((ask.limit, ask.id)).or_insert_with(|| Debt {
                key: ask.key.clone(),
                gcra: ask.gcra,
                cost: 0,
                first,
            });
            let now = clock::now();
            if debt.is_paid(now) {
                // Time that was left over pays for nothing later.
                debt.cost = 0;
                debt.first = first;
            }
            debt.gcra = ask.gcra;
            debt.cost = debt.cost.saturating_add(ask.cost);
        }
        self.any.store(true, Ordering::Release);
    }

    fn take_back(&self, ask: &FleetAsk) {
        if let Some(debt) = self.keys.lock().get_mut(&(ask.limit, ask.id)) {
            debt.cost = debt.cost.saturating_sub(ask.cost);
        }
    }

    async fn write_back(&self, ground: &Ground) {
        let scripts = Scripts::default();
        let now = clock::now();
        let mut keys = std::mem::take(&mut *self.keys.lock());
        keys.retain(|_, debt| !debt.is_paid(now));
        let mut rest: Vec<_> = keys.into_iter().collect();
        let count = rest.len();
        let mut untold = Vec::new();
        // Keys of one call are of one slot.
        let is_cluster = ground.redis.is_cluster();
        let at_once = if is_cluster { 1 } else { AT_ONCE };
        while !rest.is_empty() {
            let some: Vec<_> = rest.split_off(rest.len().saturating_sub(at_once));
            if self.tell(ground, &scripts, &some).await.is_err() {
                untold.extend(some);
                if !is_cluster {
                    // Of several nodes another may well be there.
                    untold.append(&mut rest);
                }
            }
        }
        if !untold.is_empty() {
            let mut keys = self.keys.lock();
            for (id, debt) in untold {
                // What has come since is owed on top.
                keys.entry(id)
                    .and_modify(|later| {
                        later.cost = later.cost.saturating_add(debt.cost);
                        later.first = later.first.min(debt.first);
                    })
                    .or_insert(debt);
            }
            drop(keys);
            let again = clock::now() + PAUSE;
            self.again.store(again.as_nanos(), Ordering::Relaxed);
            self.any.store(true, Ordering::Release);
            return;
        }
        tracing::info!(
            keys = count,
            "redis was told what was let through without it"
        );
    }

    async fn tell(
        &self,
        ground: &Ground,
        scripts: &Scripts,
        some: &[((usize, KeyId), Debt)],
    ) -> Result<(), Unanswered> {
        let now = clock::now();
        let keys: Vec<_> = some
            .iter()
            .map(|((limit, _), debt)| ground.key_of(*limit, &debt.key))
            .collect();
        let owing: Vec<_> = keys
            .iter()
            .zip(some)
            .map(|(key, (_, debt))| Owing {
                key,
                first: debt.ahead_of(now),
                gcra: debt.gcra,
                cost: debt.cost,
            })
            .collect();
        let call = scripts.owed(&owing);
        let since: Vec<_> = some.iter().map(|((_, id), _)| ground.since(*id)).collect();
        let value = ground.redis.call::<Value>("rate_limit_owed", &call).await;
        let value = match value {
            // It may have been done: told again, it would be owed twice.
            Err(error) if error.kind() == ErrorKind::Timeout => return Ok(()),
            value => value?,
        };
        let gcras = some.iter().map(|(_, debt)| debt.gcra);
        let states = script::answer(&value, gcras, now.as_nanos()).ok_or(Unanswered(None))?;
        for ((((limit, id), _), tat), since) in some.iter().zip(states).zip(since) {
            ground.learn(*limit, *id, tat, now, since);
        }
        Ok(())
    }
}

impl Debt {
    /// Microseconds from `now` to when it began to be owed.
    fn ahead_of(&self, now: Instant) -> i64 {
        let micros =
            |span: std::time::Duration| i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
        micros(self.first - now) - micros(now - self.first)
    }

    /// Whether time alone has paid it.
    fn is_paid(&self, now: Instant) -> bool {
        let charge = i64::try_from(self.gcra.charge(self.cost).micros).unwrap_or(i64::MAX);
        self.cost == 0 || self.ahead_of(now).saturating_add(charge) < 0
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use buttress_core::keyed::WhenFull;
    use tokio::time::advance;

    use super::*;
    use crate::{Quota, store::Table};

    #[tokio::test(start_paused = true)]
    async fn time_pays_for_what_was_before_it() {
        let gcra = Quota::per_second(10).burst(5).check().unwrap();
        let max_keys = NonZeroUsize::new(10).unwrap();
        let table = Table::new("l".into(), gcra, max_keys, WhenFull::Evict);
        let key = Key::from("a");
        let id = table.id(&key);
        let ask = FleetAsk {
            limit: 0,
            id,
            key,
            cost: 5,
            gcra,
        };
        let owed = Owed::default();
        owed.note(&ask, clock::now());
        advance(Duration::from_millis(300)).await;
        // Two of five are owed still: these come on top.
        owed.note(&ask, clock::now() + Duration::from_millis(200));
        advance(Duration::from_millis(600)).await;
        let owes = |owed: &Owed| {
            let keys = owed.keys.lock();
            let debt = &keys[&(0, id)];
            let charge = debt.gcra.charge(debt.cost).micros.cast_signed();
            debt.ahead_of(clock::now()) + charge
        };
        assert_eq!(owes(&owed), 100_000);
        advance(Duration::from_secs(10)).await;
        assert!(owed.keys.lock()[&(0, id)].is_paid(clock::now()));
        // Ten quiet seconds pay for nothing that comes after them.
        owed.note(&ask, clock::now());
        assert_eq!(owes(&owed), 500_000);
    }
}
