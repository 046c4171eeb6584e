//! Checks that share a trip.
//!
//! ```text
//!            there is a way
//! check ──────────────────────────▶ asks alone, in its own future
//!   │                                    │ done, or dropped
//!   │ else                               ▼
//!   └──▶ [ … 3rd 2nd 1st ] ──────▶ a task asks for all that wait, and again
//!                                   for all that came meanwhile, until none is
//! ```
//!
//! At most two calls of a script are under way in a lane at a time: while the
//! server is at one, this process is at the other. There is one lane, or in a
//! cluster one for each slot. A check that finds none or one under way goes at
//! once, with no task between it and the server. The task is no check's own:
//! dropping a check's future strands no other, and if it waits still, it is not
//! sent.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    future::{Future, poll_fn},
    hash::{BuildHasherDefault, Hasher},
    mem,
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use buttress_core::{
    clock::{self, Instant},
    keyed::KeyId,
    sync::Mutex,
};
use buttress_redis::{Call, Key, Slot, Value};
use tokio::{
    runtime,
    sync::oneshot::{self, error::TryRecvError},
    time::timeout,
};

use super::{
    ground::{Ground, Since, Unanswered},
    script::{self, Alike, Mixed, Scripts},
};
use crate::{Gcra, gcra::Tat};

/// How many keys one call has at most, unless a single check has more.
const MOST: usize = 128;

/// How many calls are under way in a lane at most.
const WAYS: usize = 2;

/// From so many on those that wait are halved, where the other way is free.
const HALVED: usize = 16;

/// From so many on that wait, the next call goes before those of the last are
/// told, who would share it if they were told first.
const ENOUGH: usize = 64;

/// A refusal from memory may be late by a trip, where so many of them take no
/// longer than a token's time.
const LATE: u64 = 32;

/// Beyond its time a check that waits gives its lane this long to tell it so.
const GRACE: Duration = Duration::from_millis(5);

/// One charge of a check.
#[derive(Clone, Debug)]
pub(crate) struct Charge {
    pub(crate) limit: usize,
    pub(crate) id: KeyId,
    pub(crate) key: Key,
    pub(crate) gcra: Gcra,
    pub(crate) cost: u32,
}

/// Some charges, all or none, to keys of one slot.
pub(crate) type Check = Vec<Charge>;

/// How the keys of a check stood when its turn came, in their order, and the
/// time in those terms.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) now: u64,
    pub(crate) states: States,
}

/// Mostly one.
#[derive(Clone, Debug)]
pub(crate) enum States {
    One([Tat; 1]),
    Several(Vec<Tat>),
}

impl States {
    pub(crate) fn as_mut(&mut self) -> &mut [Tat] {
        match self {
            Self::One(state) => state,
            Self::Several(states) => states,
        }
    }
}

pub(crate) struct Lanes {
    ground: Arc<Ground>,
    scripts: Scripts,
    /// The lanes where a call is under way.
    busy: Mutex<Busy>,
}

#[derive(Default)]
struct Busy {
    lanes: HashMap<Option<Slot>, Lane>,
    /// How many there ever were.
    count: u64,
}

/// Who waits for the call that is under way.
struct Lane {
    number: u64,
    /// How many calls are under way.
    ways: usize,
    /// The keys that these ask for and that hardly anybody may have: whoever
    /// comes for one of them waits for the answer, which may be his, too.
    scarce: Vec<(usize, KeyId)>,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    check: Check,
    since: Instant,
    tell: oneshot::Sender<Result<Found, Unanswered>>,
}

/// What was answered to some, who are told when it is dropped.
struct Answered {
    now: u64,
    found: Vec<(oneshot::Sender<Result<Found, Unanswered>>, States)>,
}

/// Those that are asked for. Where their task ends before the answer, with its
/// runtime, nobody hears what became of them.
struct Sent(Vec<Waiting>);

impl Sent {
    fn answered(mut self) -> Vec<Waiting> {
        mem::take(&mut self.0)
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        for one in self.0.drain(..) {
            let _ = one.tell.send(Err(Unanswered::Unheard));
        }
    }
}

/// The right to use a lane.
struct Baton {
    lanes: Arc<Lanes>,
    slot: Option<Slot>,
    number: u64,
    scarce: Option<(usize, KeyId)>,
}

enum Turn {
    Now(Baton, Check),
    Later(u64, oneshot::Receiver<Result<Found, Unanswered>>),
}

impl Lanes {
    pub(crate) fn new(ground: Arc<Ground>, scripts: Scripts) -> Self {
        Self {
            ground,
            scripts,
            busy: Mutex::default(),
        }
    }

    pub(crate) fn scripts(&self) -> &Scripts {
        &self.scripts
    }

    /// Checks, and tells how the keys stood before. They were charged if by
    /// that the check passes.
    ///
    /// Takes no longer than an operation may. Dropped, the check is made or
    /// not.
    pub(crate) async fn check(self: &Arc<Self>, check: Check) -> Result<Found, Unanswered> {
        let slot = (self.ground.redis.is_cluster()).then(|| check[0].key.slot());
        match self.enter(slot, check) {
            Turn::Now(baton, check) => {
                // In a box of its own: those who wait, who are many, have no
                // room for it.
                let found = Box::pin(self.ask_one(&check)).await;
                drop(baton);
                found
            }
            Turn::Later(number, mut told) => {
                let limit = self.ground.redis.timeout() + GRACE;
                match timeout(limit, &mut told).await {
                    Ok(Ok(found)) => found,
                    // Whoever was under way is gone, with his runtime.
                    Ok(Err(_)) => Err(Unanswered::Unasked),
                    Err(_) => {
                        self.abandon(slot, number);
                        match told.try_recv() {
                            Ok(found) => found,
                            // It waited still, and was dropped.
                            Err(TryRecvError::Closed) => Err(Unanswered::Unasked),
                            Err(TryRecvError::Empty) => Err(Unanswered::Unheard),
                        }
                    }
                }
            }
        }
    }

    fn enter(self: &Arc<Self>, slot: Option<Slot>, check: Check) -> Turn {
        let mut busy = self.busy.lock();
        let busy = &mut *busy;
        match busy.lanes.entry(slot) {
            Entry::Occupied(mut lane) => {
                let lane = lane.get_mut();
                if lane.ways < WAYS && lane.waiting.is_empty() {
                    let scarce = self.scarce(&check);
                    if !scarce.is_some_and(|key| lane.scarce.contains(&key)) {
                        lane.ways += 1;
                        lane.scarce.extend(scarce);
                        let baton = self.baton(slot, lane.number, scarce);
                        return Turn::Now(baton, check);
                    }
                }
                let (tell, told) = oneshot::channel();
                lane.waiting.push_back(Waiting {
                    check,
                    since: clock::now(),
                    tell,
                });
                Turn::Later(lane.number, told)
            }
            Entry::Vacant(lane) => {
                let scarce = self.scarce(&check);
                busy.count += 1;
                let number = busy.count;
                lane.insert(Lane {
                    number,
                    ways: 1,
                    scarce: scarce.into_iter().collect(),
                    waiting: VecDeque::new(),
                });
                Turn::Now(self.baton(slot, number, scarce), check)
            }
        }
    }

    /// The key of a check of one, where as far as this process knows not two of
    /// its kind would pass.
    fn scarce(&self, check: &Check) -> Option<(usize, KeyId)> {
        let [charge] = &check[..] else {
            return None;
        };
        let two = charge.cost.saturating_mul(2);
        let now = clock::now();
        let refused = self
            .ground
            .refused(charge.limit, charge.id, &charge.gcra, two, now);
        refused.map(|_| (charge.limit, charge.id))
    }

    fn baton(
        self: &Arc<Self>,
        slot: Option<Slot>,
        number: u64,
        scarce: Option<(usize, KeyId)>,
    ) -> Baton {
        Baton {
            lanes: Arc::clone(self),
            slot,
            number,
            scarce,
        }
    }

    fn post(self: &Arc<Self>, slot: Option<Slot>, number: u64) -> Post {
        Post {
            lanes: Arc::clone(self),
            slot,
            number,
            is_held: true,
        }
    }

    /// Gives a lane up in which nothing moves: its task's runtime is not being
    /// run, say.
    fn abandon(&self, slot: Option<Slot>, number: u64) {
        let gone = {
            let mut busy = self.busy.lock();
            match busy.lanes.entry(slot) {
                Entry::Occupied(lane) if lane.get().number == number => Some(lane.remove()),
                _ => None,
            }
        };
        drop(gone);
    }

    /// Asks for a check that is alone.
    async fn ask_one(&self, check: &Check) -> Result<Found, Unanswered> {
        let call = match &check[..] {
            [charge] => self.scripts.check(&Alike {
                keys: vec![&charge.key],
                counts: vec![1],
                gcra: charge.gcra,
                cost: charge.cost,
            }),
            charges => self.scripts.checks(&Mixed {
                keys: charges
                    .iter()
                    .map(|charge| (&charge.key, charge.gcra))
                    .collect(),
                checks: vec![
                    (charges.iter().enumerate())
                        .map(|(index, charge)| (index, charge.cost))
                        .collect(),
                ],
            }),
        };
        let asked = Asked::new(&self.ground, check.iter());
        let (now, before) = asked
            .answer(&self.ground, self.ground.redis.timeout(), &call)
            .await?;
        let mut after = before.clone();
        charge(check.iter().enumerate(), &mut after, now.as_nanos());
        asked.learn(&self.ground, &after, now);
        Ok(Found {
            now: now.as_nanos(),
            states: match before[..] {
                [state] => States::One([state]),
                _ => States::Several(before),
            },
        })
    }

    /// Asks for all that wait, until nobody does.
    async fn drive(post: Post) {
        let lanes = Arc::clone(&post.lanes);
        let (slot, number) = (post.slot, post.number);
        let mut answered: Option<Answered> = None;
        loop {
            if lanes.len(slot, number) < ENOUGH {
                drop(answered.take());
                // Those that were told just now may have come again.
                tokio::task::yield_now().await;
            }
            let Some(mut waiting) = lanes.take(slot, number) else {
                drop(answered);
                post.leave();
                return;
            };
            // What the last answer told of their keys they are told, too.
            lanes.refuse_known(&mut waiting);
            if waiting.is_empty() {
                continue;
            }
            let plan = Plan::new(&waiting);
            let rest = waiting.split_off(plan.count);
            if !rest.is_empty() {
                lanes.put_back(slot, number, rest);
            }
            // The first has waited longest.
            let waited = clock::now() - waiting[0].since;
            let limit = lanes.ground.redis.timeout().saturating_sub(waited);
            let call = plan.call(&lanes.scripts, &waiting);
            let charges = plan
                .keys
                .iter()
                .map(|&(check, charge)| &waiting[check].check[charge]);
            let asked = Asked::new(&lanes.ground, charges);
            let sent = Sent(waiting);
            let mut answer = pin!(asked.answer(&lanes.ground, limit, &call));
            // Sent before those of the last call are told: the server is at this
            // one while they go on.
            let at_once = poll_fn(|cx| match answer.as_mut().poll(cx) {
                Poll::Ready(answer) => Poll::Ready(Some(answer)),
                Poll::Pending => Poll::Ready(None),
            });
            let at_once = at_once.await;
            drop(answered.take());
            let answer = match at_once {
                Some(answer) => answer,
                None => answer.await,
            };
            let waiting = sent.answered();
            match answer {
                Ok((now, mut states)) => {
                    let mut found = Vec::with_capacity(waiting.len());
                    let mut rest = &plan.indices[..];
                    for one in waiting {
                        let (indices, behind) = rest.split_at(one.check.len());
                        rest = behind;
                        let before = match indices[..] {
                            [index] => States::One([states[index]]),
                            _ => States::Several(indices.iter().map(|&i| states[i]).collect()),
                        };
                        let charges = indices.iter().copied().zip(&one.check);
                        charge(charges, &mut states, now.as_nanos());
                        found.push((one.tell, before));
                    }
                    asked.learn(&lanes.ground, &states, now);
                    let now = now.as_nanos();
                    answered = Some(Answered { now, found });
                }
                Err(error) => {
                    for one in waiting {
                        let _ = one.tell.send(Err(error.clone()));
                    }
                }
            }
        }
    }

    /// Answers those that are refused by what has been heard since they came.
    fn refuse_known(&self, waiting: &mut Vec<Waiting>) {
        let now = clock::now();
        for one in mem::take(waiting) {
            let known = match &one.check[..] {
                [it] => (self.ground).refused(it.limit, it.id, &it.gcra, it.cost, now),
                _ => None,
            };
            let Some(known) = known else {
                waiting.push(one);
                continue;
            };
            let states = States::One([known]);
            let now = now.as_nanos();
            let _ = one.tell.send(Ok(Found { now, states }));
        }
    }

    /// The next to be asked for; the lane ends where nobody waits.
    fn take(self: &Arc<Self>, slot: Option<Slot>, number: u64) -> Option<Vec<Waiting>> {
        let mut busy = self.busy.lock();
        let Entry::Occupied(mut entry) = busy.lanes.entry(slot) else {
            return None;
        };
        let lane = entry.get_mut();
        if lane.number != number {
            return None;
        }
        let len = lane.waiting.len();
        let is_alone = lane.ways < WAYS;
        let most = if is_alone && len >= HALVED {
            len.div_ceil(WAYS)
        } else {
            len
        };
        let mut taken = Vec::with_capacity(most.min(MOST));
        let mut keys = 0;
        while let Some(next) = lane.waiting.front() {
            keys += next.check.len();
            if taken.len() >= most || (keys > MOST && !taken.is_empty()) {
                break;
            }
            let next = lane.waiting.pop_front().expect("it was there");
            if next.tell.is_closed() {
                keys -= next.check.len();
            } else {
                taken.push(next);
            }
        }
        if taken.is_empty() {
            lane.ways -= 1;
            if lane.ways == 0 {
                entry.remove();
            }
            return None;
        }
        let another = is_alone && !lane.waiting.is_empty();
        if another {
            lane.ways += 1;
        }
        drop(busy);
        if another {
            tokio::spawn(Self::drive(self.post(slot, number)));
        }
        Some(taken)
    }

    /// How many wait.
    fn len(&self, slot: Option<Slot>, number: u64) -> usize {
        match self.busy.lock().lanes.get(&slot) {
            Some(lane) if lane.number == number => lane.waiting.len(),
            _ => 0,
        }
    }

    fn put_back(&self, slot: Option<Slot>, number: u64, rest: Vec<Waiting>) {
        let mut busy = self.busy.lock();
        // Where the lane was given up, dropping them tells them.
        if let Some(lane) = busy.lanes.get_mut(&slot)
            && lane.number == number
        {
            for one in rest.into_iter().rev() {
                lane.waiting.push_front(one);
            }
        }
    }
}

impl Drop for Answered {
    fn drop(&mut self) {
        let now = self.now;
        for (tell, states) in self.found.drain(..) {
            // Who is gone by now was charged all the same.
            let _ = tell.send(Ok(Found { now, states }));
        }
    }
}

impl Drop for Baton {
    /// The check that was alone is answered, or nobody waits for its answer any
    /// more: whoever came meanwhile is asked for by a task.
    fn drop(&mut self) {
        let Self {
            lanes,
            slot,
            number,
            scarce,
        } = self;
        {
            let mut busy = lanes.busy.lock();
            match busy.lanes.entry(*slot) {
                Entry::Occupied(mut lane) if lane.get().number == *number => {
                    lane.get_mut().scarce.retain(|key| Some(*key) != *scarce);
                    if lane.get().waiting.is_empty() {
                        lane.get_mut().ways -= 1;
                        if lane.get().ways == 0 {
                            lane.remove();
                        }
                        return;
                    }
                }
                _ => return,
            }
        }
        match runtime::Handle::try_current() {
            Ok(runtime) => {
                runtime.spawn(Lanes::drive(lanes.post(*slot, *number)));
            }
            Err(_) => lanes.abandon(*slot, *number),
        }
    }
}

/// A task's place in a lane. Whatever ends the task before its work is done (its
/// runtime ends, say) ends the lane with it.
struct Post {
    lanes: Arc<Lanes>,
    slot: Option<Slot>,
    number: u64,
    is_held: bool,
}

impl Post {
    /// The work is done.
    fn leave(mut self) {
        self.is_held = false;
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        if self.is_held {
            self.lanes.abandon(self.slot, self.number);
        }
    }
}

/// Charges `states` if all of the charges pass, by the ruling in memory: what
/// the script has done.
fn charge<'a>(
    charges: impl Iterator<Item = (usize, &'a Charge)> + Clone,
    states: &mut [Tat],
    now: u64,
) {
    use crate::gcra::Ruling;

    let ruling = |(index, charge): (usize, &Charge), states: &[Tat]| {
        charge.gcra.decide(states[index], now, charge.cost)
    };
    let mut rest = charges.clone();
    if let (Some(only), None) = (rest.next(), rest.next()) {
        match ruling(only, states) {
            Ruling::Pass { tat }
            | Ruling::Wait {
                heal: Some(tat), ..
            } => states[only.0] = tat,
            _ => {}
        }
        return;
    }
    let passes = charges
        .clone()
        .all(|charge| matches!(ruling(charge, states), Ruling::Pass { .. }));
    for charge in charges {
        match ruling(charge, states) {
            Ruling::Pass { tat } if passes => states[charge.0] = tat,
            Ruling::Wait {
                heal: Some(heal), ..
            } => states[charge.0] = heal,
            _ => {}
        }
    }
}

/// The keys of a call that is under way.
struct Asked {
    keys: Vec<(usize, KeyId, Gcra, Since)>,
}

impl Asked {
    fn new<'a>(ground: &Ground, charges: impl Iterator<Item = &'a Charge>) -> Self {
        let keys = charges
            .map(|charge| {
                let since = ground.since(charge.id);
                (charge.limit, charge.id, charge.gcra, since)
            })
            .collect();
        Self { keys }
    }

    /// Asks, and tells when, and how the keys stood.
    async fn answer(
        &self,
        ground: &Ground,
        limit: Duration,
        call: &Call,
    ) -> Result<(Instant, Vec<Tat>), Unanswered> {
        let now = clock::now();
        let value: Value = ground.redis.call_within(limit, "rate_limit", call).await?;
        let gcras = self.keys.iter().map(|&(_, _, gcra, _)| gcra);
        let states = script::answer(&value, gcras, now.as_nanos()).ok_or(Unanswered::Unheard)?;
        Ok((now, states))
    }

    /// Remembers how the keys stand. The server decided at some time of the trip:
    /// at its begin, to be sure; or, where that makes no difference that anybody
    /// could see, at its end, so that nobody asks just a little too early.
    fn learn(&self, ground: &Ground, states: &[Tat], now: Instant) {
        let trip = u64::try_from((clock::now() - now).as_nanos()).unwrap_or(u64::MAX);
        for (&(limit, id, gcra, since), &tat) in self.keys.iter().zip(states) {
            let is_short = trip.saturating_mul(LATE) <= gcra.interval_nanos();
            let tat = match tat.is_after(now.as_nanos()) && is_short {
                true => tat.moved(0, trip),
                false => tat,
            };
            ground.learn(limit, id, tat, now, since);
        }
    }
}

/// A [`KeyId`] is a hash already, under a secret: it and the limit are spread
/// over what the table looks at.
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("a limit and an id are numbers");
    }

    #[inline]
    fn write_usize(&mut self, limit: usize) {
        self.write_u64(limit as u64);
    }

    #[inline]
    fn write_u64(&mut self, id: u64) {
        // 2⁶⁴ by the golden ratio (Knuth's multiplicative hashing).
        self.0 = (self.0.rotate_left(32) ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// How checks become one call.
struct Plan {
    /// How many there are in it.
    count: usize,
    /// The keys, no two alike: in which check and which of its charges each
    /// comes first.
    keys: Vec<(usize, usize)>,
    /// Of each charge of each check the index of its key.
    indices: Vec<usize>,
    /// How often each key is checked, where all checks are alike.
    alike: Option<Vec<u32>>,
}

impl Plan {
    fn new(waiting: &[Waiting]) -> Self {
        let first = &waiting[0].check[0];
        let mut plan = Self {
            count: 0,
            keys: Vec::with_capacity(waiting.len()),
            indices: Vec::with_capacity(waiting.len()),
            alike: Some(Vec::with_capacity(waiting.len())),
        };
        let mut indices: HashMap<(usize, KeyId), usize, BuildHasherDefault<Spread>> =
            HashMap::with_capacity_and_hasher(waiting.len(), BuildHasherDefault::default());
        for (number, one) in waiting.iter().enumerate() {
            // A key has one quota in a call: whoever knows another one waits.
            let conflicts = one.check.iter().any(|charge| {
                indices
                    .get(&(charge.limit, charge.id))
                    .is_some_and(|&index| {
                        let (check, first) = plan.keys[index];
                        waiting[check].check[first].gcra != charge.gcra
                    })
            });
            if conflicts {
                break;
            }
            let is_alike = matches!(&one.check[..], [charge]
                if charge.cost == first.cost && charge.gcra == first.gcra);
            if !is_alike {
                plan.alike = None;
            }
            for (which, charge) in one.check.iter().enumerate() {
                let index = *indices.entry((charge.limit, charge.id)).or_insert_with(|| {
                    plan.keys.push((number, which));
                    if let Some(counts) = &mut plan.alike {
                        counts.push(0);
                    }
                    plan.keys.len() - 1
                });
                if let Some(counts) = &mut plan.alike {
                    counts[index] += 1;
                }
                plan.indices.push(index);
            }
            plan.count += 1;
        }
        plan
    }

    fn call(&self, scripts: &Scripts, waiting: &[Waiting]) -> Call {
        let charge = |&(check, which): &(usize, usize)| &waiting[check].check[which];
        if let Some(counts) = &self.alike {
            let first = charge(&self.keys[0]);
            return scripts.check(&Alike {
                keys: self.keys.iter().map(|key| &charge(key).key).collect(),
                counts: counts.clone(),
                gcra: first.gcra,
                cost: first.cost,
            });
        }
        let mut indices = self.indices.iter().copied();
        let checks = waiting.iter().map(|one| {
            let costs = one.check.iter().map(|charge| charge.cost);
            // In this order: the one that ends first is asked first.
            let pairs = costs.zip(indices.by_ref());
            pairs.map(|(cost, index)| (index, cost)).collect()
        });
        scripts.checks(&Mixed {
            keys: self
                .keys
                .iter()
                .map(|key| (&charge(key).key, charge(key).gcra))
                .collect(),
            checks: checks.collect(),
        })
    }
}
