//! Where the arrival times are kept: one table of 16-byte cells a limit.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    mem,
    num::NonZeroUsize,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use buttress_core::{
    Refusal, RefusalKind,
    clock::{self, Instant},
    keyed::{Config, Entry, Full, Guard, KeyId, KeyedMap, SlotId, WhenFull},
    sync::Mutex,
};

use crate::gcra::{Gcra, Ruling, Tat};

/// Bits of a packed arrival time; the key's id has the rest.
const TAT_BITS: u32 = 80;

/// A key's whole state: 48 bits of its id, 80 of its arrival time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cell(u128);

impl Cell {
    fn new(id: KeyId, tat: Tat) -> Self {
        Self((u128::from(id.slot().get()) << TAT_BITS) | tat.pack())
    }

    fn tat(self) -> Tat {
        Tat::unpack(self.0)
    }
}

impl Entry for Cell {
    type Shared = Terms;

    #[inline]
    fn id(&self) -> Option<SlotId> {
        SlotId::new((self.0 >> TAT_BITS) as u64)
    }

    #[inline]
    fn spent_at(&self) -> Instant {
        Instant::from_nanos(self.tat().nanos_up())
    }
}

/// What each shard of a table knows, under the lock that a decision takes
/// anyway: reading the quota costs nothing, and replacing it no request waits
/// for.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    /// One for all shards: it stays in the nearest cache, and what a shard has
    /// of its own fits the line of its lock.
    gcra: Arc<Gcra>,
    /// The latest time a decision was taken at. A thread that read the clock
    /// and was then suspended must not turn it back.
    latest: u64,
}

/// How a key stands with its limit after a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Index of the limit.
    pub(crate) limit: usize,
    /// The burst.
    pub(crate) burst: u32,
    pub(crate) remaining: u32,
    /// Nanoseconds until the quota is whole, rounded up.
    pub(crate) until_full: u64,
    /// Nanoseconds until one more fits, rounded up.
    pub(crate) until_more: u64,
    /// Nanoseconds that the whole burst takes, rounded up.
    pub(crate) window: u64,
}

impl Standing {
    pub(crate) fn of(limit: usize, gcra: &Gcra, tat: Tat, now: u64, detail: Detail) -> Self {
        Self {
            limit,
            burst: gcra.burst(),
            remaining: gcra.remaining(tat, now),
            until_full: gcra.until_full(tat, now),
            // Only the draft's fields ask for it.
            until_more: if detail == Detail::All {
                gcra.until_more(tat, now)
            } else {
                0
            },
            window: gcra.window(),
        }
    }

    /// Whether a client should rather be shown `self` than `other`.
    pub(crate) fn is_tighter_than(&self, other: &Self) -> bool {
        (self.remaining, other.until_full) < (other.remaining, self.until_full)
    }
}

/// How much a decision is to tell of how the key stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detail {
    /// Nothing: no division is paid for.
    None,
    /// The tightest limit.
    Tightest,
    /// Every limit.
    All,
}

/// What one request asks of one limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    /// Index of the limit.
    pub(crate) limit: usize,
    pub(crate) id: KeyId,
    pub(crate) cost: u32,
    /// The quota of this key, where it is not the limit's own.
    pub(crate) quota: Option<Gcra>,
}

/// What the store says of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    /// It may pass in `wait` nanoseconds, as far as `limit` tells.
    Wait {
        limit: usize,
        wait: u64,
    },
    /// It costs more than `limit` can ever hold.
    Never {
        limit: usize,
    },
    /// There is no room to remember its key in `limit`.
    NoRoom {
        limit: usize,
    },
}

impl Verdict {
    /// What a client is told, and the limit that says so.
    #[cold]
    pub(crate) fn refusal(self) -> Option<(usize, Refusal)> {
        Some(match self {
            Self::Pass => return None,
            Self::Wait { limit, wait } => {
                let wait = Duration::from_nanos(wait);
                let refusal = Refusal::new(RefusalKind::RateLimited).with_retry_after(wait);
                (limit, refusal)
            }
            Self::Never { limit } => (limit, Refusal::new(RefusalKind::NeverFits)),
            Self::NoRoom { limit } => {
                let refusal = Refusal::new(RefusalKind::Overloaded)
                    .with_detail("too many clients are being limited at once")
                    .with_retry_after(Duration::from_secs(1));
                (limit, refusal)
            }
        })
    }
}

/// One limit's keys.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) name: Cow<'static, str>,
    map: KeyedMap<Cell>,
    exceptions: Exceptions,
    /// Held while quotas are replaced. Two that replace them shard by shard
    /// would overtake each other, and leave some shards with the one quota and
    /// some with the other.
    changing: Mutex<()>,
    /// Whether a closure chooses every request's quota.
    pub(crate) chosen: bool,
    /// How many of the map's evictions were counted in metrics.
    told: AtomicU64,
    /// Requests that had no key.
    keyless: AtomicU64,
}

/// Keys with a quota of their own. Put there by whoever runs the service, not
/// by clients, so there is no ceiling.
#[derive(Debug, Default)]
struct Exceptions {
    /// Spares those who have none the lock.
    any: AtomicBool,
    quotas: RwLock<HashMap<KeyId, Gcra>>,
}

impl Exceptions {
    #[inline]
    fn get(&self, id: KeyId) -> Option<Gcra> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        self.read().get(&id).copied()
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<KeyId, Gcra>> {
        self.quotas.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets or removes a quota; the one that was there.
    fn set(&self, id: KeyId, gcra: Option<Gcra>) -> Option<Gcra> {
        let mut quotas = self.quotas.write().unwrap_or_else(PoisonError::into_inner);
        let old = match gcra {
            Some(gcra) => quotas.insert(id, gcra),
            None => quotas.remove(&id),
        };
        self.any.store(!quotas.is_empty(), Ordering::Release);
        old
    }
}

/// A key's shard, locked for a decision.
pub(crate) struct Held<'a> {
    guard: Guard<'a, Cell>,
    tat: Tat,
    now: u64,
}

impl Table {
    pub(crate) fn new(
        name: Cow<'static, str>,
        gcra: Gcra,
        max_keys: NonZeroUsize,
        when_full: WhenFull,
    ) -> Self {
        let gcra = Arc::new(gcra);
        let terms = Terms { gcra, latest: 0 };
        let config = Config {
            max_keys,
            when_full,
        };
        Self {
            name,
            map: KeyedMap::new(config, terms),
            exceptions: Exceptions::default(),
            changing: Mutex::default(),
            chosen: false,
            told: AtomicU64::new(0),
            keyless: AtomicU64::new(0),
        }
    }

    /// Whether any key has a quota of its own.
    #[inline]
    pub(crate) fn has_exceptions(&self) -> bool {
        self.exceptions.any.load(Ordering::Acquire)
    }

    /// The quota of a key that has one of its own.
    #[inline]
    pub(crate) fn exception(&self, id: KeyId) -> Option<Gcra> {
        self.exceptions.get(id)
    }

    /// Gives a key a quota of its own, or the limit's again. It keeps the
    /// number of requests that it has spent.
    pub(crate) fn except(&self, id: KeyId, gcra: Option<Gcra>, now: Instant) {
        let _changing = self.changing.lock();
        // Held first: whoever finds the new quota finds the state made for it.
        let mut held = self.hold(id, now);
        let old = self.exceptions.set(id, gcra);
        if self.chosen && (old.is_none() || gcra.is_none()) {
            // Nobody here knows what the closure chose for the key: as where
            // the closure changes its mind, the time it owes stays the same,
            // and the next decision cuts it to a whole burst.
            return;
        }
        let common = *held.guard.shared().gcra;
        let (old, new) = (old.unwrap_or(common), gcra.unwrap_or(common));
        let tat = new.convert(held.tat, &old, held.now);
        let ask = Ask {
            limit: 0,
            id,
            cost: 0,
            quota: None,
        };
        held.put_back(&ask, tat);
    }

    /// The keys forgotten in debt that were not told of yet, and all of them.
    /// One insertion may cost several their place, to make up for others that
    /// were let in above the ceiling.
    pub(crate) fn tell_evictions(&self) -> (u64, u64) {
        let all = self.map.evicted();
        let told = self.told.fetch_max(all, Ordering::Relaxed);
        (all.saturating_sub(told), all)
    }

    /// Counts a request without a key; how many there were.
    pub(crate) fn count_keyless(&self) -> u64 {
        self.keyless.fetch_add(1, Ordering::Relaxed) + 1
    }

    #[inline(always)]
    pub(crate) fn id(&self, key: &impl std::hash::Hash) -> KeyId {
        self.map.id(key)
    }

    pub(crate) fn map(&self) -> &KeyedMap<Cell> {
        &self.map
    }

    /// Locks a key's shard for a decision at `now`, or at the time of the
    /// latest one in this shard.
    #[inline]
    pub(crate) fn hold(&self, id: KeyId, now: Instant) -> Held<'_> {
        let mut held = self.hold_known(id, now);
        held.catch_up();
        held
    }

    /// The same for a key that is thought to be there: before anything else is
    /// done than to charge it, [`Held::catch_up`] is due.
    ///
    /// What is there has lost nothing: a decision that is taken late by a
    /// clock that was read early finds the time owed by then, and is the
    /// stricter for it. It is where a key was forgotten since that a time
    /// before would be given twice.
    #[inline(always)]
    pub(crate) fn hold_known(&self, id: KeyId, now: Instant) -> Held<'_> {
        let guard = self.map.lock(id);
        let tat = guard.get().map_or(Tat::default(), |cell| cell.tat());
        let now = now.as_nanos();
        Held { guard, tat, now }
    }

    /// [`Held::charge_known`] at the present time. Whether it was charged.
    ///
    /// A function of its own, for in the middle of a service's there are not
    /// enough registers.
    #[inline(never)]
    pub(crate) fn charge_known(&self, id: KeyId, cost: u32) -> bool {
        self.hold_known(id, clock::now())
            .charge_known(id, cost)
            .is_some()
    }

    /// The same, and how the key stands after that, in the terms of limit 0.
    #[inline(never)]
    pub(crate) fn charge_known_and_tell(&self, id: KeyId, cost: u32) -> Option<Standing> {
        let mut held = self.hold_known(id, clock::now());
        let tat = held.charge_known(id, cost)?;
        Some(held.stands(0, tat))
    }

    /// How a key stands, charging nothing.
    pub(crate) fn peek(&self, ask: &Ask, now: Instant) -> Standing {
        let held = self.hold(ask.id, now);
        let gcra = ask.quota.unwrap_or(*held.guard.shared().gcra);
        Standing::of(ask.limit, &gcra, held.tat, held.now, Detail::All)
    }

    /// How long until `ask` fits behind what costs `ahead` and comes before
    /// it; `None` where it never does.
    #[cfg(feature = "wait")]
    pub(crate) fn wait_behind(&self, ask: &Ask, ahead: u64, now: Instant) -> Option<Duration> {
        let held = self.hold(ask.id, now);
        let gcra = ask.quota.unwrap_or(*held.guard.shared().gcra);
        let wait = || gcra.wait_behind(held.tat, held.now, ahead + u64::from(ask.cost));
        (ask.cost <= gcra.burst()).then(|| Duration::from_nanos(wait()))
    }

    /// Gives a charge back.
    pub(crate) fn refund(&self, ask: &Ask, now: Instant) {
        let mut held = self.hold(ask.id, now);
        let gcra = ask.quota.unwrap_or(*held.guard.shared().gcra);
        let tat = gcra.refund(held.tat, held.now, ask.cost);
        held.put_back(ask, tat);
    }

    /// When a key's quota is whole again, by what is stored.
    #[cfg(feature = "redis")]
    pub(crate) fn known(&self, id: KeyId, now: Instant) -> Tat {
        self.hold_known(id, now).tat
    }

    /// Sets when a key's quota is whole again. Where there is no room for it,
    /// it is not remembered.
    #[cfg(feature = "redis")]
    pub(crate) fn learn(&self, id: KeyId, tat: Tat, now: Instant) {
        let mut guard = self.map.lock(id);
        if tat.is_after(now.as_nanos()) {
            let _ = guard.insert(now, Cell::new(id, tat));
        } else {
            guard.remove();
        }
    }

    /// Forgets a key.
    #[cfg(feature = "redis")]
    pub(crate) fn forget(&self, id: KeyId) {
        self.map.lock(id).remove();
    }

    /// The quota of a key that has none of its own and for which none was
    /// chosen.
    #[cfg(feature = "redis")]
    pub(crate) fn common(&self, id: KeyId) -> Gcra {
        *self.map.lock(id).shared().gcra
    }

    /// Makes a key's quota whole. Whether it was not.
    pub(crate) fn reset(&self, id: KeyId, now: Instant) -> bool {
        let mut held = self.hold(id, now);
        held.guard.remove();
        held.tat.is_after(held.now)
    }

    /// Replaces the quota. Every key keeps the number of requests that it has
    /// spent, at most the new burst.
    pub(crate) fn replace(&self, gcra: Gcra, now: Instant) {
        let _changing = self.changing.lock();
        let excepted: HashSet<_> = self.exceptions.read().keys().map(|id| id.slot()).collect();
        let gcra = Arc::new(gcra);
        self.map.change_all(|terms, cells| {
            let old = mem::replace(&mut terms.gcra, Arc::clone(&gcra));
            let now = terms.latest.max(now.as_nanos());
            for cell in cells {
                if cell.id().is_some_and(|id| excepted.contains(&id)) {
                    continue;
                }
                let tat = gcra.convert(cell.tat(), &old, now);
                *cell = Cell((cell.0 >> TAT_BITS << TAT_BITS) | tat.pack());
            }
        });
    }
}

impl Held<'_> {
    /// Never decides earlier than was decided before.
    #[inline]
    pub(crate) fn catch_up(&mut self) {
        let terms = self.guard.shared_mut();
        self.now = self.now.max(terms.latest);
        terms.latest = self.now;
    }

    /// Charges a key that is known already under the limit's own quota, which
    /// is most of what is ever asked. `None`, and nothing was changed, where it
    /// is not so, or the request does not pass.
    ///
    /// Inlined, and the rest kept out of line, so that the common case is a
    /// straight run of instructions that moves no large structs about.
    #[inline(always)]
    pub(crate) fn charge_known(&mut self, id: KeyId, cost: u32) -> Option<Tat> {
        let (Some(cell), terms) = self.guard.parts() else {
            return None;
        };
        if cost == 0 {
            return None;
        }
        let tat = terms.gcra.pass(self.tat, self.now, cost)?;
        *cell = Cell::new(id, tat);
        // Whoever is refused by an earlier clock would take what is owed by
        // now for more than can be owed, and put it right.
        terms.latest = terms.latest.max(self.now);
        Some(tat)
    }

    /// How the key stands after that, in the terms of the limit `limit`.
    #[inline(always)]
    pub(crate) fn stands(self, limit: usize, tat: Tat) -> Standing {
        let (gcra, now) = (*self.guard.shared().gcra, self.now);
        // The numbers need a division: they are worked out without the lock.
        drop(self);
        Standing::of(limit, &gcra, tat, now, Detail::Tightest)
    }

    /// Stores the charge of `ask`.
    #[inline]
    fn commit(&mut self, ask: &Ask, tat: Tat) -> Result<Stored, Full> {
        if ask.cost == 0 {
            return Ok(Stored::Updated);
        }
        let cell = Cell::new(ask.id, tat);
        if let Some(stored) = self.guard.get_mut() {
            *stored = cell;
            return Ok(Stored::Updated);
        }
        match self.guard.insert(Instant::from_nanos(self.now), cell)? {
            None => Ok(Stored::Added),
            Some(_) => Ok(Stored::Evicting),
        }
    }

    fn heal(&mut self, ask: &Ask, tat: Option<Tat>) {
        if let Some(tat) = tat {
            self.put_back(ask, tat);
        }
    }

    /// Sets a key that is there to another time; one that is not there owes
    /// nothing that could change.
    fn put_back(&mut self, ask: &Ask, tat: Tat) {
        if !tat.is_after(self.now) {
            self.guard.remove();
        } else if self.guard.get().is_some() {
            // Through `insert`, for the table must know that it may be spent
            // earlier; what is there is replaced, so there is room.
            let cell = Cell::new(ask.id, tat);
            let _ = self.guard.insert(Instant::from_nanos(self.now), cell);
        }
    }
}

/// The most limits that are decided together.
pub(crate) const MAX_LIMITS: usize = 8;

/// What came of a decision.
#[derive(Debug)]
pub(crate) struct Decision {
    pub(crate) verdict: Verdict,
    /// The tightest limit, or the one that refused, if it was asked for.
    pub(crate) tightest: Option<Standing>,
    /// Every limit, if it was asked for.
    pub(crate) all: Vec<Standing>,
    /// What became of the tables.
    pub(crate) changes: Changes,
}

/// Which limits have a key more, and which of them forgot one in debt for it.
/// A bit for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    added: u8,
    evicted: u8,
}

impl Changes {
    fn note(&mut self, limit: usize, stored: Stored) {
        self.added |= u8::from(stored != Stored::Updated) << limit;
        self.evicted |= u8::from(stored == Stored::Evicting) << limit;
    }

    pub(crate) fn added(self, limit: usize) -> bool {
        self.added & (1 << limit) != 0
    }

    pub(crate) fn evicted(self, limit: usize) -> bool {
        self.evicted & (1 << limit) != 0
    }
}

/// How a charge was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    /// The key was there.
    Updated,
    /// The key was added.
    Added,
    /// The key was added, and another forgotten in debt.
    Evicting,
}

/// Decides one limit, whose key's shard is held.
#[inline(never)]
pub(crate) fn decide_one(mut held: Held<'_>, ask: &Ask, detail: Detail) -> Decision {
    let (now, before) = (held.now, held.tat);
    let gcra = ask.quota.as_ref().unwrap_or(&held.guard.shared().gcra);
    let ruling = gcra.decide(before, now, ask.cost);
    // Copied only where it is needed once the lock is gone.
    let gcra = (detail != Detail::None).then_some(*gcra);
    let mut decision = Decision {
        verdict: Verdict::Pass,
        tightest: None,
        all: Vec::new(),
        changes: Changes::default(),
    };
    let mut after = before;
    match ruling {
        Ruling::Pass { tat } => match held.commit(ask, tat) {
            Ok(stored) => {
                after = tat;
                decision.changes.note(ask.limit, stored);
            }
            Err(Full) => decision.verdict = Verdict::NoRoom { limit: ask.limit },
        },
        Ruling::Wait { wait, heal } => {
            held.heal(ask, heal);
            after = heal.unwrap_or(before);
            decision.verdict = Verdict::Wait {
                limit: ask.limit,
                wait,
            };
        }
        Ruling::Never => decision.verdict = Verdict::Never { limit: ask.limit },
    }
    drop(held);
    if let Some(gcra) = gcra {
        let standing = Standing::of(ask.limit, &gcra, after, now, detail);
        decision.tightest = Some(standing);
        if detail == Detail::All {
            decision.all.push(standing);
        }
    }
    decision
}

/// Decides several limits, all or none: each is locked, in the order of the
/// limits, until all have ruled. A thread holds at most one shard of a table,
/// and tables always in one order, so no two can wait for each other.
pub(crate) fn decide_all(
    tables: &[Table],
    asks: &[Option<Ask>],
    now: Instant,
    detail: Detail,
) -> Decision {
    let mut held: [Option<Held<'_>>; MAX_LIMITS] = [const { None }; MAX_LIMITS];
    let mut arrivals = [Tat::default(); MAX_LIMITS];
    let mut verdict = Verdict::Pass;
    for (index, ask) in asks.iter().flatten().enumerate() {
        let key = held[index].insert(tables[ask.limit].hold(ask.id, now));
        let gcra = match &ask.quota {
            Some(gcra) => gcra,
            None => &key.guard.shared().gcra,
        };
        let limit = ask.limit;
        match gcra.decide(key.tat, key.now, ask.cost) {
            Ruling::Pass { tat } => arrivals[index] = tat,
            Ruling::Wait { wait, heal } => {
                key.heal(ask, heal);
                key.tat = heal.unwrap_or(key.tat);
                verdict = match verdict {
                    Verdict::Pass => Verdict::Wait { limit, wait },
                    // Only when the longest wait is over do all let in.
                    Verdict::Wait { wait: longest, .. } if wait > longest => {
                        Verdict::Wait { limit, wait }
                    }
                    other => other,
                };
            }
            Ruling::Never => {
                if !matches!(verdict, Verdict::Never { .. }) {
                    verdict = Verdict::Never { limit };
                }
            }
        }
    }

    let mut changes = Changes::default();
    if verdict == Verdict::Pass {
        for (index, ask) in asks.iter().flatten().enumerate() {
            let key = held[index].as_mut().expect("locked above");
            match key.commit(ask, arrivals[index]) {
                Ok(stored) => changes.note(ask.limit, stored),
                Err(Full) => {
                    verdict = Verdict::NoRoom { limit: ask.limit };
                    // All or none: nobody has seen the charges made so far.
                    for (ask, held) in asks[..index].iter().flatten().zip(&mut held) {
                        held.as_mut().expect("locked above").undo(ask);
                    }
                    break;
                }
            }
        }
        if verdict == Verdict::Pass {
            for (key, arrival) in held.iter_mut().flatten().zip(arrivals) {
                key.tat = arrival;
            }
        }
    }

    let mut decision = Decision {
        verdict,
        tightest: None,
        all: Vec::new(),
        changes,
    };
    if detail == Detail::None {
        return decision;
    }
    // The numbers need divisions: they are worked out without the locks.
    let mut states = [const { None }; MAX_LIMITS];
    for ((held, ask), state) in held
        .iter()
        .flatten()
        .zip(asks.iter().flatten())
        .zip(&mut states)
    {
        let gcra = ask.quota.unwrap_or(*held.guard.shared().gcra);
        *state = Some((gcra, held.tat, held.now));
    }
    drop(held);
    for ((gcra, tat, now), ask) in states.iter().flatten().zip(asks.iter().flatten()) {
        let standing = Standing::of(ask.limit, gcra, *tat, *now, detail);
        if detail == Detail::All {
            decision.all.push(standing);
        }
        let shown = match verdict {
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
    decision
}

impl Held<'_> {
    /// Takes a charge back that was made under this very lock.
    #[cold]
    fn undo(&mut self, ask: &Ask) {
        self.put_back(ask, self.tat);
    }
}

#[cfg(all(test, buttress_loom))]
mod loom_tests;
#[cfg(all(test, not(buttress_loom)))]
mod tests;
