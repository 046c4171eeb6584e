//! The fleet's store, and what is done without it.

use std::{
    collections::{HashMap, hash_map::Entry},
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use buttress_core::{
    clock::{self, Instant},
    key::Key,
    keyed::KeyId,
    sync::Mutex,
};
use buttress_redis::{Cmd, Value};
use tokio::{runtime, time::timeout};

use super::{
    OnStoreError,
    ask::FleetAsk,
    fleet::Fleet,
    ground::{Ground, Stand, Unanswered},
    script::{self, Owing, Scripts},
};
use crate::{
    Gcra,
    gcra::Tat,
    store::{self, Ask, Decision, Detail, Verdict},
};

/// The most keys whose charges are remembered until the server is back: those
/// after them are let through and not told.
const MOST_OWED: usize = 16_384;

/// How long after it could not be told the server is told again.
const PAUSE: Duration = Duration::from_millis(100);

/// How often it is looked whether time has paid for what is owed to a server
/// that is gone.
const LOOK: Duration = Duration::from_secs(1);

/// For how long somebody waits for the server whose limiter is gone.
const ORPHANED: Duration = Duration::from_secs(60);

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
        if is_up && self.owed.untended.load(Ordering::Relaxed) {
            self.tend();
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
            // What it may have charged is not charged twice.
            Err(unanswered) => self.without(asks, detail, unanswered.is_owed()),
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
            let at = |tat: Tat| Instant::from_nanos(tat.nanos_up().max(now.as_nanos()));
            for (ask, known) in asks.iter().zip(known) {
                let until = self.ground.known(ask, now);
                self.owed.note(ask, at(known), at(until));
            }
            if self.owed.untended.load(Ordering::Relaxed) {
                self.tend();
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
        self.owed.forget(ask);
        self.fleet.reset(ask).await
    }

    /// Sees to it that the server is told what was let through without it, as
    /// soon as it is there, whether anybody asks for anything then or not.
    #[cold]
    fn tend(&self) {
        let Ok(runtime) = runtime::Handle::try_current() else {
            return;
        };
        if let Some(teller) = Teller::begin(&self.ground, &self.owed) {
            runtime.spawn(teller.stay());
        }
    }
}

/// What this process has let through alone.
#[derive(Default)]
struct Owed {
    /// Whether something is owed, and nobody is there to tell it.
    untended: AtomicBool,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    debts: HashMap<(usize, KeyId), Debt>,
    /// When it was looked through last because it was full.
    looked: Option<Instant>,
    /// Whether somebody is there to tell them.
    is_kept: bool,
}

struct Debt {
    key: Key,
    gcra: Gcra,
    cost: u32,
    /// From when on it is owed: when the first was let through, or what was
    /// owed by then would have been paid.
    first: Instant,
    /// When this process's own state of the key has come back.
    until: Instant,
}

impl Book {
    /// Drops what time has paid, here and in the fleet's state.
    fn clear(&mut self, now: Instant) {
        self.debts
            .retain(|_, debt| !debt.is_paid(now) || now < debt.until);
    }

    /// Whether there is room for another.
    fn has_room(&mut self, now: Instant) -> bool {
        // All are looked through: not for each that comes.
        if self.debts.len() >= MOST_OWED && self.looked.is_none_or(|at| now - at >= LOOK) {
            self.looked = Some(now);
            self.debts.retain(|_, debt| !debt.is_paid(now));
        }
        self.debts.len() < MOST_OWED
    }
}

impl Owed {
    /// `first`: from when on it is owed, as far as is known. `until`: when this
    /// process's own state has come back, where it may cost more.
    fn note(&self, ask: &FleetAsk, first: Instant, until: Instant) {
        if ask.cost == 0 {
            return;
        }
        let now = clock::now();
        let mut book = self.book.lock();
        let id = (ask.limit, ask.id);
        if !book.debts.contains_key(&id) && !book.has_room(now) {
            return;
        }
        let debt = match book.debts.entry(id) {
            Entry::Occupied(debt) => {
                let debt = debt.into_mut();
                if debt.is_paid(now) {
                    // Time that was left over pays for nothing later; and what
                    // is known is what this process has charged itself.
                    debt.cost = 0;
                    debt.first = now;
                }
                debt
            }
            Entry::Vacant(place) => place.insert(Debt {
                key: ask.key.clone(),
                gcra: ask.gcra,
                cost: 0,
                first,
                until,
            }),
        };
        debt.until = until;
        debt.gcra = ask.gcra;
        debt.cost = debt.cost.saturating_add(ask.cost);
        if !book.is_kept {
            self.untended.store(true, Ordering::Relaxed);
        }
    }

    fn take_back(&self, ask: &FleetAsk) {
        if let Some(debt) = self.book.lock().debts.get_mut(&(ask.limit, ask.id)) {
            debt.cost = debt.cost.saturating_sub(ask.cost);
        }
    }

    fn forget(&self, ask: &FleetAsk) {
        self.book.lock().debts.remove(&(ask.limit, ask.id));
    }
}

/// Who tells the server, in a task: one at a time, as long as anything is owed.
struct Teller {
    ground: Arc<Ground>,
    owed: Arc<Owed>,
    scripts: Scripts,
    is_done: bool,
}

impl Teller {
    /// Where something is owed and nobody is there to tell it.
    fn begin(ground: &Arc<Ground>, owed: &Arc<Owed>) -> Option<Self> {
        let mut book = owed.book.lock();
        owed.untended.store(false, Ordering::Relaxed);
        if book.debts.is_empty() || mem::replace(&mut book.is_kept, true) {
            return None;
        }
        Some(Self {
            ground: Arc::clone(ground),
            owed: Arc::clone(owed),
            scripts: Scripts::default(),
            is_done: false,
        })
    }

    async fn stay(mut self) {
        let mut watch = self.ground.redis.watch();
        let mut orphaned = None;
        loop {
            let told = if watch.is_up() {
                self.tell_all().await
            } else {
                0
            };
            let now = clock::now();
            let is_over = if Arc::strong_count(&self.owed) == 1 {
                now - *orphaned.get_or_insert(now) >= ORPHANED
            } else {
                false
            };
            if self.ends(is_over) {
                if told > 0 {
                    tracing::info!(
                        keys = told,
                        "redis was told what was let through without it"
                    );
                }
                return;
            }
            // One node of several may be gone for long, and the rest be up.
            let pause = if watch.is_up() { PAUSE } else { LOOK };
            let _ = timeout(pause, watch.changed()).await;
        }
    }

    /// Whether there is nothing left to tell: then whoever comes next begins
    /// anew.
    fn ends(&mut self, is_over: bool) -> bool {
        let now = clock::now();
        let mut book = self.owed.book.lock();
        book.clear(now);
        if is_over || book.debts.is_empty() {
            book.is_kept = false;
            self.is_done = true;
        }
        self.is_done
    }

    /// Tells what is owed now, as far as the server hears it. Of how many keys.
    async fn tell_all(&self) -> usize {
        let ids: Vec<_> = self.owed.book.lock().debts.keys().copied().collect();
        // Keys of one call are of one slot.
        let is_cluster = self.ground.redis.is_cluster();
        let at_once = if is_cluster { 1 } else { AT_ONCE };
        let mut count = 0;
        for ids in ids.chunks(at_once) {
            match self.tell(ids).await {
                Ok(told) => count += told,
                // Of several nodes another may well be there.
                Err(_) if is_cluster => {}
                Err(_) => break,
            }
        }
        count
    }

    /// Tells some of them. What is known not to be told is owed as before.
    async fn tell(&self, ids: &[(usize, KeyId)]) -> Result<usize, Unanswered> {
        self.listens(ids).await?;
        let some: Vec<_> = {
            let now = clock::now();
            let debts = &mut self.owed.book.lock().debts;
            let taken = ids.iter().filter_map(|id| debts.remove_entry(id));
            taken.filter(|(_, debt)| !debt.is_paid(now)).collect()
        };
        if some.is_empty() {
            return Ok(0);
        }
        let now = clock::now();
        let keys: Vec<_> = some
            .iter()
            .map(|((limit, _), debt)| self.ground.key_of(*limit, &debt.key))
            .collect();
        let owing: Vec<_> = keys
            .iter()
            .zip(&some)
            .map(|(key, (_, debt))| Owing {
                key,
                first: debt.ahead_of(now),
                gcra: debt.gcra,
                cost: debt.cost,
            })
            .collect();
        let call = self.scripts.owed(&owing);
        let since: Vec<_> = (some.iter())
            .map(|((_, id), _)| self.ground.since(*id))
            .collect();
        let redis = &self.ground.redis;
        let value = match redis.call::<Value>("rate_limit_owed", &call).await {
            Ok(value) => value,
            Err(error) => {
                let unanswered = Unanswered::from(error);
                // Told again, what may be done would be charged twice.
                if !unanswered.is_owed() {
                    return Ok(some.len());
                }
                self.take_again(some);
                return Err(unanswered);
            }
        };
        let gcras = some.iter().map(|(_, debt)| debt.gcra);
        if let Some(states) = script::answer(&value, gcras, now.as_nanos()) {
            for ((((limit, id), _), tat), since) in some.iter().zip(states).zip(since) {
                self.ground.learn(*limit, *id, tat, now, since);
            }
        }
        Ok(some.len())
    }

    /// Whether the server that has these keys answers, now: of one that stands
    /// still nobody would know whether it was told.
    async fn listens(&self, ids: &[(usize, KeyId)]) -> Result<(), Unanswered> {
        let key = ids.iter().find_map(|id| {
            let book = self.owed.book.lock();
            let debt = book.debts.get(id)?;
            Some(self.ground.key_of(id.0, &debt.key))
        });
        let Some(key) = key else { return Ok(()) };
        let mut cmd = Cmd::new();
        cmd.arg("MGET").arg(key.as_str());
        let redis = &self.ground.redis;
        let _: Value = redis.run("rate_limit_owed", &cmd).await?;
        Ok(())
    }

    /// These were not told.
    fn take_again(&self, some: Vec<((usize, KeyId), Debt)>) {
        let debts = &mut self.owed.book.lock().debts;
        for (id, debt) in some {
            // What has come since is owed on top.
            debts
                .entry(id)
                .and_modify(|later| {
                    later.cost = later.cost.saturating_add(debt.cost);
                    later.first = later.first.min(debt.first);
                })
                .or_insert(debt);
        }
    }
}

impl Drop for Teller {
    /// Its runtime may be gone before the server is back.
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        let mut book = self.owed.book.lock();
        book.is_kept = false;
        let is_owing = !book.debts.is_empty();
        self.owed.untended.store(is_owing, Ordering::Relaxed);
    }
}

impl Debt {
    /// Microseconds from `now` to when it began to be owed.
    fn ahead_of(&self, now: Instant) -> i64 {
        let micros = |span: Duration| i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
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

    const MS: Duration = Duration::from_millis(1);

    fn asks(quota: Quota) -> impl Fn(u64, u32) -> FleetAsk {
        let gcra = quota.check().unwrap();
        let max_keys = NonZeroUsize::new(10).unwrap();
        let table = Table::new("l".into(), gcra, max_keys, WhenFull::Evict);
        move |key, cost| {
            let key = Key::from(key);
            FleetAsk {
                limit: 0,
                id: table.id(&key),
                key,
                cost,
                gcra,
            }
        }
    }

    fn owes(owed: &Owed, ask: &FleetAsk) -> i64 {
        let book = owed.book.lock();
        let debt = &book.debts[&(0, ask.id)];
        let charge = debt.gcra.charge(debt.cost).micros.cast_signed();
        debt.ahead_of(clock::now()) + charge
    }

    #[tokio::test(start_paused = true)]
    async fn time_pays_for_what_was_before_it() {
        let ask = asks(Quota::per_second(10).burst(5))(0, 5);
        let owed = Owed::default();
        let now = clock::now();
        owed.note(&ask, now, now + 500 * MS);
        advance(300 * MS).await;
        // Two of five are owed still: these come on top.
        let now = clock::now();
        owed.note(&ask, now + 200 * MS, now + 700 * MS);
        advance(600 * MS).await;
        assert_eq!(owes(&owed, &ask), 100_000);
        advance(Duration::from_secs(10)).await;
        let now = clock::now();
        assert!(owed.book.lock().debts[&(0, ask.id)].is_paid(now));
        // Ten quiet seconds pay for nothing that comes after them.
        owed.note(&ask, now, now + 500 * MS);
        assert_eq!(owes(&owed, &ask), 500_000);
        // Nor where all of it was given back before.
        owed.take_back(&ask);
        advance(Duration::from_secs(10)).await;
        let now = clock::now();
        owed.note(&ask, now, now + 500 * MS);
        assert_eq!(owes(&owed, &ask), 500_000);
    }

    /// Where a process has a part of the quota, what it has charged itself for
    /// that was told as if the fleet had owed it before.
    #[tokio::test(start_paused = true)]
    async fn a_part_of_the_quota_is_owed_at_the_price_of_all() {
        let ask = asks(Quota::per_second(10).burst(10))(0, 1);
        let owed = Owed::default();
        let now = clock::now();
        // One of five processes.
        owed.note(&ask, now, now + 500 * MS);
        advance(200 * MS).await;
        let now = clock::now();
        owed.book.lock().clear(now);
        owed.note(&ask, now + 300 * MS, now + 800 * MS);
        assert_eq!(owes(&owed, &ask), 100_000);
        advance(799 * MS).await;
        owed.book.lock().clear(clock::now());
        assert_eq!(owed.book.lock().debts.len(), 1);
        advance(2 * MS).await;
        owed.book.lock().clear(clock::now());
        assert_eq!(owed.book.lock().debts.len(), 0);
    }

    /// All were looked through for each that came.
    #[tokio::test(start_paused = true)]
    async fn where_there_is_no_room_it_is_looked_for_now_and_then() {
        let slow = asks(Quota::per_hour(1));
        let quick = asks(Quota::per_second(10))(u64::MAX, 1);
        let owed = Owed::default();
        let note = |ask: &FleetAsk| owed.note(ask, clock::now(), clock::now());
        let has = |ask: &FleetAsk| owed.book.lock().debts.contains_key(&(0, ask.id));
        for n in 1..MOST_OWED as u64 {
            note(&slow(n, 1));
        }
        note(&quick);
        let (late, later) = (slow(0, 1), slow(1 << 40, 1));
        note(&late);
        assert!(!has(&late));
        advance(LOOK / 2).await;
        note(&late);
        assert!(!has(&late));
        advance(LOOK / 2).await;
        note(&late);
        assert!(has(&late) && !has(&quick));
        note(&later);
        assert!(!has(&later));
        // Those that are there are always known.
        note(&late);
        assert_eq!(owed.book.lock().debts[&(0, late.id)].cost, 2);
    }
}
