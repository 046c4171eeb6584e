//! The shares of all keys, and what goes to and fro between them and Redis.

use std::{
    mem,
    num::NonZeroUsize,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use buttress_core::{
    clock::{self, Instant},
    key::Key,
    keyed::{Config, Entry, Guard, KeyId, KeyedMap, SlotId, WhenFull},
};
use buttress_redis::{Script, Value};
use tokio::{
    runtime,
    sync::Notify,
    time::{Instant as Deadline, sleep, timeout_at},
};

use super::{
    GRACE, script,
    share::{Grant, Share, Take, Want},
};
use crate::{
    Gcra,
    gcra::{Ruling, Tat},
    redis::{
        ask::{self, FleetAsk},
        ground::{Ground, Stand, Unanswered},
        script::{Scripts, answer},
    },
    store::{Ask, Changes, Decision, Detail, MAX_LIMITS, Verdict},
};

/// The most keys that have a share at a time, of each limit: what finds no room
/// is decided in Redis, one by one.
const MOST_SHARES: usize = 100_000;
/// How often shares are looked through for what was not used up in time.
const EVERY: Duration = Duration::from_millis(100);
/// How many keys go in one call when they are given back.
const AT_ONCE: usize = 64;
/// How often a request waits for an answer: for one that is on its way already,
/// and for one to a question in which it is counted.
const ROUNDS: usize = 4;

/// One key's share; boxed, so that the table is small and quick to look
/// through.
#[derive(Default)]
struct Cell {
    id: Option<SlotId>,
    held: Option<Box<Held>>,
}

struct Held {
    share: Share,
    key: Key,
    keyed: KeyId,
    /// What is being asked.
    flight: Option<Arc<Flight>>,
}

impl Entry for Cell {
    type Shared = ();

    #[inline]
    fn id(&self) -> Option<SlotId> {
        self.id
    }

    fn spent_at(&self) -> Instant {
        let spent = self.held.as_ref().map_or(0, |held| held.share.spent_at());
        Instant::from_nanos(spent)
    }
}

/// A question to Redis, for who waits for the answer.
#[derive(Default)]
struct Flight {
    has_landed: AtomicBool,
    landed: Notify,
    error: OnceLock<Unanswered>,
}

/// A share that is asked for.
struct Asked {
    limit: usize,
    id: KeyId,
    key: Key,
    gcra: Gcra,
    want: Want,
    flight: Arc<Flight>,
}

/// Tokens of a key that go back.
type Back = (usize, KeyId, Key, Gcra, u32);

pub(super) struct Shares {
    ground: Arc<Ground>,
    maps: Box<[KeyedMap<Cell>]>,
    script: Script,
    scripts: Scripts,
    /// How much is taken at a time.
    most: AtomicU32,
    /// Whether somebody gives back what was not used up.
    swept: AtomicBool,
    /// Whether it is there only to give back what another had.
    last: bool,
    this: Weak<Self>,
}

/// What came of a try.
enum Tried {
    Decided(Decision),
    /// Redis is being asked for some of it.
    Waiting(Vec<Arc<Flight>>),
    /// There is no room for its share, or the key has one under another quota.
    NoRoom,
}

/// For which of its keys a request is counted among those who wait.
struct Joined<'a> {
    shares: &'a Shares,
    asks: &'a [FleetAsk],
    keys: u8,
    /// For which of them the answer was to a question in which it is counted:
    /// what is not there by then is refused.
    counted: u8,
}

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        for (index, ask) in self.asks.iter().enumerate() {
            if self.keys & (1 << index) != 0
                && let Some(held) = self.shares.lock(ask).get_mut().and_then(Cell::held)
            {
                held.share.waited(ask.cost);
            }
        }
    }
}

impl Cell {
    #[inline]
    fn held(&mut self) -> Option<&mut Held> {
        self.held.as_deref_mut()
    }
}

impl Shares {
    pub(super) fn new(ground: Arc<Ground>, most: u32) -> Arc<Self> {
        let maps = ground
            .tables
            .iter()
            .map(|table| {
                let config = Config {
                    max_keys: NonZeroUsize::new(table.map().max_keys().min(MOST_SHARES))
                        .unwrap_or(NonZeroUsize::MIN),
                    // Given up, what is in a share would be lost.
                    when_full: WhenFull::Refuse,
                };
                KeyedMap::with_secret(config, (), table.map().secret().clone())
            })
            .collect();
        Arc::new_cyclic(|this| Self {
            ground,
            maps,
            script: script::script(),
            scripts: Scripts::default(),
            most: AtomicU32::new(most),
            swept: AtomicBool::new(false),
            last: false,
            this: this.clone(),
        })
    }

    #[inline]
    fn lock(&self, ask: &FleetAsk) -> Guard<'_, Cell> {
        self.maps[ask.limit].lock(ask.id)
    }

    #[inline]
    pub(super) fn most(&self) -> u32 {
        self.most.load(Ordering::Relaxed)
    }

    #[inline]
    pub(super) fn decide_now(&self, asks: &[FleetAsk], detail: Detail) -> Option<Decision> {
        let now = clock::now().as_nanos();
        if let [ask] = asks {
            return self.decide_one_now(ask, detail, now);
        }
        match self.try_all(asks, detail, now, None) {
            Tried::Decided(decision) => Some(decision),
            Tried::Waiting(_) | Tried::NoRoom => None,
        }
    }

    /// As most are decided: one limit, whose share can pay.
    fn decide_one_now(&self, ask: &FleetAsk, detail: Detail, now: u64) -> Option<Decision> {
        let mut guard = self.lock(ask);
        let held = match guard.get_mut().and_then(Cell::held) {
            Some(held) if held.share.gcra == ask.gcra => held,
            _ => {
                drop(guard);
                return self.refuse_now(ask, detail, now);
            }
        };
        match held.share.offer(now, ask.cost, self.ground.is_sure()) {
            Take::Pass => {
                let is_low = held.share.spend(now, ask.cost);
                let tat = told(&held.share, now, detail);
                let asked = if is_low {
                    self.ahead(ask, held, now)
                } else {
                    None
                };
                drop(guard);
                if let Some(asked) = asked {
                    self.send(vec![asked]);
                }
                let asks = std::slice::from_ref(ask);
                Some(decided(asks, Verdict::Pass, &[tat], now, detail))
            }
            Take::Wait(_) if !self.ground.redis.is_up() => {
                // Of a server that is gone nothing is known, and less of the
                // one that comes back.
                held.share.doubt();
                None
            }
            Take::Wait(wait) => {
                let tat = told(&held.share, now, detail);
                drop(guard);
                let limit = ask.limit;
                let verdict = Verdict::Wait { limit, wait };
                let asks = std::slice::from_ref(ask);
                Some(decided(asks, verdict, &[tat], now, detail))
            }
            Take::Never | Take::Ask => None,
        }
    }

    /// Refuses what no share can pay and the server is known to refuse.
    #[cold]
    fn refuse_now(&self, ask: &FleetAsk, detail: Detail, now: u64) -> Option<Decision> {
        let (wait, tat) = self.refused(ask, now)?;
        let limit = ask.limit;
        let verdict = Verdict::Wait { limit, wait };
        let asks = std::slice::from_ref(ask);
        Some(decided(asks, verdict, &[tat], now, detail))
    }

    /// For how long the server refuses this, by when the key owes nothing as it
    /// was last heard.
    fn refused(&self, ask: &FleetAsk, now: u64) -> Option<(u64, Tat)> {
        let ground = &self.ground;
        // Of a server that is gone nothing is known.
        if !ground.redis.is_up() {
            return None;
        }
        let at = Instant::from_nanos(now);
        let known = ground.refused(ask.limit, ask.id, &ask.gcra, ask.cost, at)?;
        match ask.gcra.decide(known, now, ask.cost) {
            Ruling::Wait { wait, .. } => Some((wait, known)),
            Ruling::Pass { .. } | Ruling::Never => None,
        }
    }

    /// What is to be asked for ahead, if anything can be.
    #[cold]
    fn ahead(&self, ask: &FleetAsk, held: &mut Held, now: u64) -> Option<Asked> {
        // A share is asked for in a task, and spent where there can be none.
        if !self.ground.redis.is_up() || runtime::Handle::try_current().is_err() {
            return None;
        }
        self.ask(ask, held, now)
    }

    fn ask(&self, ask: &FleetAsk, held: &mut Held, now: u64) -> Option<Asked> {
        let want = held.share.ask(now, self.most())?;
        let flight = Arc::<Flight>::default();
        held.flight = Some(Arc::clone(&flight));
        Some(Asked {
            limit: ask.limit,
            id: ask.id,
            key: held.key.clone(),
            gcra: held.share.gcra,
            want,
            flight,
        })
    }

    /// Decides by the shares: charges all or none. `joined` is there for who
    /// can wait, and tells for which keys it has waited already.
    fn try_all(
        &self,
        asks: &[FleetAsk],
        detail: Detail,
        now: u64,
        mut joined: Option<&mut Joined<'_>>,
    ) -> Tried {
        let mut guards: [Option<Guard<'_, Cell>>; MAX_LIMITS] = [const { None }; MAX_LIMITS];
        let mut takes = [Take::Ask; MAX_LIMITS];
        let mut states = [Tat::default(); MAX_LIMITS];
        let mut verdict = Verdict::Pass;
        let mut lacks = false;
        // Of the last try only: what could be paid then may be gone by now.
        let counted = joined
            .as_deref_mut()
            .map_or(0, |joined| mem::take(&mut joined.counted));
        let sure = self.ground.is_sure();
        // In the order of the limits, as everyone does.
        for (index, ask) in asks.iter().enumerate() {
            let guard = guards[index].insert(self.lock(ask));
            let limit = ask.limit;
            let mut held = guard.get_mut().and_then(Cell::held);
            let is_its = held
                .as_deref_mut()
                .is_none_or(|held| held.share.gcra == ask.gcra || held.share.requote(ask.gcra));
            let take = match held {
                None if ask.cost > ask.gcra.burst() => Take::Never,
                None if ask.cost == 0 => Take::Pass,
                None => match self.refused(ask, now) {
                    Some((wait, tat)) => {
                        states[index] = tat;
                        Take::Wait(wait)
                    }
                    None => Take::Ask,
                },
                Some(_) if !is_its => match self.refused(ask, now) {
                    Some((wait, tat)) => {
                        states[index] = tat;
                        Take::Wait(wait)
                    }
                    None => return Tried::NoRoom,
                },
                Some(held) => {
                    if let Some(joined) = joined.as_deref_mut()
                        && joined.keys & (1 << index) != 0
                    {
                        joined.keys &= !(1 << index);
                        held.share.waited(ask.cost);
                    }
                    states[index] = told(&held.share, now, detail);
                    match held.share.offer(now, ask.cost, sure) {
                        Take::Ask if counted & (1 << index) != 0 => Take::Wait(held.share.trip()),
                        take => take,
                    }
                }
            };
            takes[index] = take;
            match (take, verdict) {
                (Take::Pass, _) => {}
                (Take::Ask, _) => lacks = true,
                (Take::Never, Verdict::Never { .. }) | (Take::Wait(_), Verdict::Never { .. }) => {}
                (Take::Never, _) => verdict = Verdict::Never { limit },
                (Take::Wait(wait), Verdict::Wait { wait: longest, .. }) if wait <= longest => {}
                (Take::Wait(wait), _) => verdict = Verdict::Wait { limit, wait },
            }
        }
        let is_known = matches!(verdict, Verdict::Never { .. }) || self.ground.redis.is_up();
        if verdict != Verdict::Pass && (is_known || joined.is_some()) {
            drop(guards);
            return Tried::Decided(decided(asks, verdict, &states, now, detail));
        }
        if lacks || verdict != Verdict::Pass {
            return match joined {
                Some(joined) => self.join(asks, &takes, &mut guards, joined, now),
                None => Tried::Waiting(Vec::new()),
            };
        }
        let mut asked = Vec::new();
        for (index, ask) in asks.iter().enumerate() {
            let guard = guards[index].as_mut();
            let Some(held) = guard.and_then(Guard::get_mut).and_then(Cell::held) else {
                continue;
            };
            if held.share.spend(now, ask.cost) {
                asked.extend(self.ahead(ask, held, now));
            }
            states[index] = told(&held.share, now, detail);
        }
        drop(guards);
        if !asked.is_empty() {
            self.send(asked);
        }
        Tried::Decided(decided(asks, Verdict::Pass, &states, now, detail))
    }

    /// Waits for what is lacking, and asks for what nobody has asked for.
    #[cold]
    fn join(
        &self,
        asks: &[FleetAsk],
        takes: &[Take; MAX_LIMITS],
        guards: &mut [Option<Guard<'_, Cell>>; MAX_LIMITS],
        joined: &mut Joined<'_>,
        now: u64,
    ) -> Tried {
        let mut asked = Vec::new();
        let mut flights = Vec::new();
        for (index, ask) in asks.iter().enumerate() {
            if takes[index] != Take::Ask {
                continue;
            }
            let guard = guards[index].as_mut().expect("locked before");
            if guard.get().is_none() {
                let cell = Cell {
                    id: Some(ask.id.slot()),
                    held: Some(Box::new(Held {
                        share: Share::new(ask.gcra, now),
                        key: ask.key.clone(),
                        keyed: ask.id,
                        flight: None,
                    })),
                };
                if guard.insert(Instant::from_nanos(now), cell).is_err() {
                    // What was joined already is left when `joined` is dropped.
                    self.take_back(guards, asks, asked);
                    return Tried::NoRoom;
                }
            }
            let guard = guards[index].as_mut().expect("locked before");
            let held = guard
                .get_mut()
                .and_then(Cell::held)
                .expect("just put there");
            held.share.wait(now, ask.cost);
            joined.keys |= 1 << index;
            if !held.share.is_asking() {
                asked.extend(self.ask(ask, held, now));
                joined.counted |= 1 << index;
            }
            flights.extend(held.flight.clone());
        }
        for guard in guards {
            *guard = None;
        }
        if !asked.is_empty() {
            self.send(asked);
        }
        Tried::Waiting(flights)
    }

    /// Nothing was sent of these yet.
    fn take_back(
        &self,
        guards: &mut [Option<Guard<'_, Cell>>; MAX_LIMITS],
        asks: &[FleetAsk],
        asked: Vec<Asked>,
    ) {
        for asked in asked {
            let index = asks.iter().position(|ask| ask.limit == asked.limit);
            let guard = index.and_then(|index| guards[index].as_mut());
            if let Some(held) = guard.and_then(Guard::get_mut).and_then(Cell::held) {
                held.share.unasked();
                held.flight = None;
            }
            asked.flight.land();
        }
    }

    /// Decides, asking Redis for what is lacking. `None` where it is better
    /// asked for this request alone.
    pub(super) async fn decide(
        &self,
        asks: &[FleetAsk],
        detail: Detail,
    ) -> Result<Option<Decision>, Unanswered> {
        // Who asks for us tells us first, where he is out of time.
        let deadline = Deadline::now() + self.ground.redis.timeout() + GRACE;
        let mut joined = Joined {
            shares: self,
            asks,
            keys: 0,
            counted: 0,
        };
        for _ in 0..ROUNDS {
            let now = clock::now().as_nanos();
            let flights = match self.try_all(asks, detail, now, Some(&mut joined)) {
                Tried::Decided(decision) => return Ok(Some(decision)),
                Tried::NoRoom => return Ok(None),
                Tried::Waiting(flights) => flights,
            };
            if flights.is_empty() {
                return Ok(None);
            }
            for flight in flights {
                timeout_at(deadline, flight.landed())
                    .await
                    // What is granted yet is the share's, and not this one's.
                    .map_err(|_| Unanswered::Unasked)?;
                if let Some(error) = flight.error.get() {
                    // What was not in the question nobody has charged.
                    return Err(match joined.counted {
                        0 => Unanswered::Unasked,
                        _ => error.clone(),
                    });
                }
            }
        }
        Ok(None)
    }

    /// Asks Redis, in a task of its own: who goes away takes nothing with it.
    fn send(&self, mut asked: Vec<Asked>) {
        let Some(this) = self.this.upgrade() else {
            return;
        };
        // A script's keys are of one slot.
        while let Some(first) = asked.first() {
            let rest = if self.ground.redis.is_cluster() {
                let slot = |asked: &Asked| self.ground.key_of(asked.limit, &asked.key).slot();
                let of = slot(first);
                let (same, rest) = asked.into_iter().partition(|asked| slot(asked) == of);
                asked = same;
                rest
            } else {
                Vec::new()
            };
            let crew = Crew {
                shares: Arc::clone(&this),
                asked: mem::replace(&mut asked, rest),
            };
            tokio::spawn(crew.fly());
        }
    }

    /// Sees to it that what is not used up is given back.
    fn sweep_later(&self) {
        if self.swept.load(Ordering::Relaxed) || self.swept.swap(true, Ordering::AcqRel) {
            return;
        }
        let broom = Broom(self.this.clone());
        tokio::spawn(async move {
            loop {
                sleep(EVERY).await;
                let Some(this) = broom.0.upgrade() else {
                    return;
                };
                if !this.give_back(false).await {
                    drop(broom);
                    // What came since it looked found it still sweeping.
                    if this.has_any() {
                        this.sweep_later();
                    }
                    return;
                }
            }
        });
    }

    /// Gives back what was not used up in time, or all. Whether there is
    /// anything left that may have to be.
    async fn give_back(&self, all: bool) -> bool {
        let now = clock::now().as_nanos();
        let mut left = false;
        let mut back = Vec::new();
        for (limit, map) in self.maps.iter().enumerate() {
            map.change_all(|(), cells| {
                for held in cells.filter_map(Cell::held) {
                    let tokens = held.share.give_back(now, all);
                    if tokens > 0 {
                        back.push((limit, held.keyed, held.key.clone(), held.share.gcra, tokens));
                    }
                    left |= held.share.tokens() > 0 || held.share.is_asking();
                }
            });
        }
        self.give_these_back(&back).await;
        left
    }

    /// Gives back what is in hand of these keys, as far as nobody waits for it.
    pub(super) async fn give_back_of(&self, asks: &[FleetAsk]) {
        let now = clock::now().as_nanos();
        let mut back = Vec::with_capacity(asks.len());
        for ask in asks {
            let mut guard = self.lock(ask);
            let Some(held) = guard.get_mut().and_then(Cell::held) else {
                continue;
            };
            let tokens = held.share.give_back(now, true);
            if tokens > 0 {
                let key = held.key.clone();
                back.push((ask.limit, ask.id, key, held.share.gcra, tokens));
            }
        }
        let Some(this) = self.this.upgrade() else {
            return;
        };
        if !back.is_empty() {
            // In a task of its own: it is out of the shares by now, and lost
            // where who asked goes away.
            let _ = tokio::spawn(async move { this.give_these_back(&back).await }).await;
        }
    }

    async fn give_these_back(&self, back: &[Back]) {
        // Keys of one call are of one slot.
        let is_cluster = self.ground.redis.is_cluster();
        for some in back.chunks(if is_cluster { 1 } else { AT_ONCE }) {
            self.give_some_back(some).await;
        }
    }

    /// Gives back tokens of keys of one slot.
    async fn give_some_back(&self, some: &[Back]) {
        let ground = &self.ground;
        let keys: Vec<_> = (some.iter())
            .map(|(limit, _, key, ..)| ground.key_of(*limit, key))
            .collect();
        let charges: Vec<_> = (keys.iter().zip(some))
            .map(|(key, (.., gcra, tokens))| (key, *gcra, *tokens))
            .collect();
        let call = self.scripts.refund(&charges);
        // No answer is learnt that may be of before it.
        let distrust = || some.iter().for_each(|(_, id, ..)| ground.distrust(*id));
        distrust();
        let now = clock::now();
        let given = ground.redis.call::<Value>("rate_limit_give_back", &call);
        let given = given.await;
        distrust();
        let gcras = some.iter().map(|(.., gcra, _)| *gcra);
        let states = given.ok();
        let states = states.and_then(|value| answer(&value, gcras, now.as_nanos()));
        for (index, (limit, id, _, gcra, tokens)) in some.iter().enumerate() {
            match &states {
                Some(states) => ground.learn(*limit, *id, states[index], now, ground.since(*id)),
                // What cannot be given back comes back by itself; it may be.
                None => ground.tables[*limit].refund(
                    &Ask {
                        limit: *limit,
                        id: *id,
                        cost: *tokens,
                        quota: Some(*gcra),
                    },
                    now,
                ),
            }
        }
    }

    /// Whether anything is in hand, or on its way.
    fn has_any(&self) -> bool {
        let mut any = false;
        for map in &self.maps {
            map.for_each(|cell| {
                let share = cell.held.as_ref().map(|held| &held.share);
                any |= share.is_some_and(|share| share.tokens() > 0 || share.is_asking());
            });
        }
        any
    }

    pub(super) async fn give_back_all(&self) {
        self.most.store(1, Ordering::Relaxed);
        if !self.give_back(true).await {
            return;
        }
        // What is on its way yet.
        let mut flights = Vec::new();
        for map in &self.maps {
            map.for_each(|cell| {
                flights.extend(cell.held.as_ref().and_then(|held| held.flight.clone()));
            });
        }
        let deadline = Deadline::now() + self.ground.redis.timeout();
        for flight in flights {
            let _ = timeout_at(deadline, flight.landed()).await;
        }
        self.give_back(true).await;
    }

    /// Takes charges back into the shares: all or none.
    pub(super) fn refund(&self, asks: &[FleetAsk]) -> Option<Vec<Stand>> {
        let now = clock::now().as_nanos();
        let mut stands = Vec::with_capacity(asks.len());
        let most = self.most();
        for (index, ask) in asks.iter().enumerate() {
            let mut guard = self.lock(ask);
            let held = guard.get_mut().and_then(Cell::held);
            let held = held.filter(|held| held.share.gcra == ask.gcra);
            if let Some(held) = held
                && held.share.refund(now, ask.cost, most)
            {
                stands.push((held.share.arrival(now), now));
                continue;
            }
            drop(guard);
            // What was taken back so far is spent again.
            for ask in &asks[..index] {
                if let Some(held) = self.lock(ask).get_mut().and_then(Cell::held) {
                    held.share.withdraw(ask.cost);
                }
            }
            return None;
        }
        self.sweep_later_if_can();
        Some(stands)
    }

    fn sweep_later_if_can(&self) {
        if runtime::Handle::try_current().is_ok() {
            self.sweep_later();
        }
    }

    /// What the process holds of a key.
    pub(super) fn in_hand(&self, ask: &FleetAsk) -> u32 {
        let mut guard = self.lock(ask);
        let held = guard.get_mut().and_then(Cell::held);
        held.map_or(0, |held| held.share.tokens())
    }

    /// Forgets what is in hand of a key that is made whole. Whether there was
    /// anything.
    pub(super) fn reset(&self, ask: &FleetAsk) -> bool {
        let mut guard = self.lock(ask);
        let Some(held) = guard.get_mut().and_then(Cell::held) else {
            return false;
        };
        let had = held.share.tokens() > 0;
        held.share.reset();
        had
    }
}

impl Drop for Shares {
    /// Nobody is left who could spend it.
    fn drop(&mut self) {
        if self.last || !self.has_any() {
            return;
        }
        if let Ok(runtime) = runtime::Handle::try_current() {
            let last = Self {
                ground: Arc::clone(&self.ground),
                maps: mem::take(&mut self.maps),
                script: self.script,
                scripts: Scripts::default(),
                most: AtomicU32::new(1),
                swept: AtomicBool::new(true),
                last: true,
                this: Weak::new(),
            };
            runtime.spawn(async move { last.give_back(true).await });
        }
    }
}

/// Who sweeps. Gone with its runtime, it makes room for another.
struct Broom(Weak<Shares>);

impl Drop for Broom {
    fn drop(&mut self) {
        if let Some(shares) = self.0.upgrade() {
            shares.swept.store(false, Ordering::Release);
        }
    }
}

impl Flight {
    /// Waits until there is an answer or none will come.
    async fn landed(&self) {
        // It hears of what happens from here on.
        let landed = self.landed.notified();
        if !self.has_landed.load(Ordering::Acquire) {
            landed.await;
        }
    }

    fn land(&self) {
        self.has_landed.store(true, Ordering::Release);
        self.landed.notify_waiters();
    }
}

/// Who asks. Whatever becomes of the task, who waits is told.
struct Crew {
    shares: Arc<Shares>,
    asked: Vec<Asked>,
}

impl Crew {
    async fn fly(mut self) {
        let shares = Arc::clone(&self.shares);
        let ground = &shares.ground;
        let wants: Vec<_> = (self.asked.iter())
            .map(|asked| {
                let key = ground.key_of(asked.limit, &asked.key);
                (key, asked.gcra, asked.want)
            })
            .collect();
        let since: Vec<_> = self
            .asked
            .iter()
            .map(|asked| ground.since(asked.id))
            .collect();
        let call = script::call(&shares.script, &wants);
        let sent = clock::now();
        let answer = ground.redis.call::<Value>("rate_limit_lease", &call).await;
        let answer = match answer {
            Ok(value) => script::answer(&value, &wants, sent.as_nanos()).ok_or(Unanswered::Unheard),
            Err(error) => Err(error.into()),
        };
        match answer {
            Ok(grants) => {
                let asked = mem::take(&mut self.asked);
                for ((asked, grant), since) in asked.iter().zip(grants).zip(since) {
                    ground.learn(asked.limit, asked.id, grant.tat, sent, since);
                    shares.land(asked, sent.as_nanos(), grant);
                }
                shares.sweep_later();
            }
            Err(error) => {
                for asked in &self.asked {
                    let _ = asked.flight.error.set(error.clone());
                }
            }
        }
    }
}

impl Shares {
    fn land(&self, asked: &Asked, sent: u64, grant: Grant) {
        let mut guard = self.maps[asked.limit].lock(asked.id);
        // It is kept as long as it asks.
        if let Some(held) = guard.get_mut().and_then(Cell::held) {
            let now = clock::now().as_nanos();
            held.share.answered(sent, now, asked.want, grant);
            held.flight = None;
        }
        drop(guard);
        asked.flight.land();
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for asked in &self.asked {
            let mut guard = self.shares.maps[asked.limit].lock(asked.id);
            if let Some(held) = guard.get_mut().and_then(Cell::held) {
                held.share.failed();
                held.flight = None;
            }
            drop(guard);
            let _ = asked.flight.error.set(Unanswered::Unasked);
            asked.flight.land();
        }
    }
}

/// What a client is told by, where it is told.
#[inline]
fn told(share: &Share, now: u64, detail: Detail) -> Tat {
    match detail {
        Detail::None => Tat::default(),
        Detail::Tightest | Detail::All => share.arrival(now),
    }
}

#[inline]
fn decided(
    asks: &[FleetAsk],
    verdict: Verdict,
    states: &[Tat],
    now: u64,
    detail: Detail,
) -> Decision {
    let mut decision = Decision {
        verdict,
        tightest: None,
        all: Vec::new(),
        changes: Changes::default(),
    };
    ask::tell(asks, states, now, detail, &mut decision);
    decision
}
