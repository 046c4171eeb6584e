//! What there is to deliver, and what is next: no clock, no task, no socket.
//! `now` and the time of day are arguments.

mod lanes;
mod letters;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::{Arc, Weak},
    time::Duration,
};

use buttress_core::clock::Instant;
use bytes::Bytes;
use http::StatusCode;

use self::lanes::Lane;
pub(crate) use self::letters::Letters;
use crate::{
    Cause, DeadLetter, DeliveryId, DeliveryResult, Record, RegisterError, RegistrationId,
    RegistrationInfo, Scope, Selector, Status,
    map::Map,
    outcome::Next,
    pattern::Index,
    registration::Target,
    result::{Feed, Feeds, History},
};

/// How long a delivery of an earlier run waits for its registration.
const ORPHANED: Duration = Duration::from_secs(3600);

/// How far a store may be behind, in changes, where the queue is smaller.
const LEAST_BEHIND: usize = 1024;

/// How much there may be of everything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) capacity: usize,
    pub(crate) lane_capacity: usize,
    pub(crate) concurrency: usize,
    pub(crate) lane_concurrency: usize,
    pub(crate) registrations: usize,
    pub(crate) letters: usize,
    pub(crate) results: usize,
    pub(crate) results_in_scope: usize,
}

pub(crate) struct State {
    limits: Limits,
    /// By number, in the order in which they came.
    registrations: BTreeMap<u64, Entry>,
    numbers: Map<RegistrationId, u64>,
    global: Index,
    scoped: Map<Arc<str>, Index>,
    deliveries: Map<DeliveryId, Delivery>,
    /// Room that is taken for what the store is asked to keep.
    reserved: usize,
    /// Deliveries of an earlier run whose registration is not there yet.
    orphans: Map<RegistrationId, Vec<DeliveryId>>,
    lanes: Map<Arc<str>, Lane>,
    /// Lanes that have something to send and may, each once: they take turns.
    runnable: VecDeque<Arc<str>>,
    timers: BTreeMap<(Instant, u64), Wake>,
    in_flight: usize,
    pub(crate) letters: Letters,
    history: History,
    feeds: Feeds,
    /// What has changed since it was last asked: for logs and metrics.
    told: Vec<Arc<DeliveryResult>>,
    /// What is to be written into the store, in this order.
    writes: VecDeque<Write>,
    /// Letters that there was no room for.
    overflowed: Vec<DeadLetter>,
    counter: u64,
}

struct Entry {
    target: Arc<Target>,
    disabled: Option<Cause>,
    /// Until when its endpoint asks to be left alone.
    hold: Option<Instant>,
    /// Its deliveries in their order, where it keeps one. Only the first is
    /// with the lane or the timer.
    chain: VecDeque<DeliveryId>,
    queued: usize,
}

struct Delivery {
    record: Record,
    /// `None`: an orphan.
    home: Option<Home>,
    phase: Phase,
    /// An earlier run has left it: it goes before what this one has emitted.
    adopted: bool,
    /// Why it will not be tried again, whatever comes of the attempt under way.
    doomed: Option<Cause>,
    number: u64,
    result: Arc<DeliveryResult>,
}

#[derive(Clone)]
struct Home {
    registration: u64,
    target: Arc<Target>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nowhere yet.
    New,
    /// Its registration is not there yet; the timer ends the wait for it.
    Orphan((Instant, u64)),
    /// Another of its registration goes first.
    Chained,
    /// In its lane.
    Ready,
    /// With the timer.
    Waiting((Instant, u64)),
    /// An attempt is under way.
    Flying,
}

enum Wake {
    Delivery(DeliveryId),
    Orphan(DeliveryId),
    Lane(Arc<str>),
}

/// What is to be written into the store.
#[derive(Clone, Debug)]
pub(crate) enum Write {
    Retry(DeliveryId, u32, Duration),
    Settle(DeliveryId),
    Bury(DeadLetter),
    DropLetter(DeliveryId),
}

/// An attempt to be made.
pub(crate) struct Job {
    pub(crate) record: Record,
    pub(crate) target: Arc<Target>,
}

/// What came of an attempt.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    pub(crate) next: Next,
    pub(crate) disable: Option<Cause>,
    /// Until the next attempt, if there is one.
    pub(crate) wait: Duration,
    /// For how long the endpoint asks to be left alone.
    pub(crate) hold: Option<Duration>,
    pub(crate) status: Option<StatusCode>,
    pub(crate) body: Bytes,
    pub(crate) took: Duration,
}

/// What becomes of a delivery after an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    Delivered,
    Retry(Cause),
    Dead(Cause),
    /// Taken back: nobody wants it any more.
    Dropped(Cause),
}

impl Fate {
    fn doomed(cause: Cause) -> Self {
        match cause {
            Cause::Unregistered => Self::Dropped(cause),
            _ => Self::Dead(cause),
        }
    }
}

/// The time in both ways.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) at: Instant,
    pub(crate) unix: Duration,
}

impl State {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            letters: Letters::new(limits.letters),
            history: History::new(limits.results, limits.results_in_scope),
            limits,
            registrations: BTreeMap::new(),
            numbers: Map::default(),
            global: Index::default(),
            scoped: Map::default(),
            deliveries: Map::default(),
            reserved: 0,
            orphans: Map::default(),
            lanes: Map::default(),
            runnable: VecDeque::new(),
            timers: BTreeMap::new(),
            in_flight: 0,
            feeds: Feeds::default(),
            told: Vec::new(),
            writes: VecDeque::new(),
            overflowed: Vec::new(),
            counter: 0,
        }
    }

    fn count(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    // Registrations.

    pub(crate) fn register(&mut self, target: &Arc<Target>, now: Now) -> Result<(), RegisterError> {
        if self.numbers.contains_key(&target.id) {
            return Err(RegisterError::Taken(Arc::clone(&target.id.0)));
        }
        let most = self.limits.registrations;
        if self.registrations.len() >= most {
            return Err(RegisterError::TooMany { most });
        }
        let number = self.count();
        self.numbers.insert(target.id.clone(), number);
        self.enlist(number, target);
        let waiting = self.orphans.remove(&target.id).unwrap_or_default();
        let entry = Entry {
            target: Arc::clone(target),
            disabled: None,
            hold: None,
            chain: VecDeque::new(),
            queued: 0,
        };
        self.registrations.insert(number, entry);
        for id in waiting {
            self.settle_in(id, number, target, now);
        }
        Ok(())
    }

    fn enlist(&mut self, number: u64, target: &Target) {
        let index = match &target.scope {
            Scope::Global => &mut self.global,
            Scope::Request(id) => self.scoped.entry(Arc::clone(id)).or_default(),
        };
        for pattern in &target.patterns {
            index.insert(pattern, number);
        }
    }

    fn delist(&mut self, number: u64, target: &Target) {
        let index = match &target.scope {
            Scope::Global => &mut self.global,
            Scope::Request(id) => match self.scoped.get_mut(id) {
                Some(index) => index,
                None => return,
            },
        };
        for pattern in &target.patterns {
            index.remove(pattern, number);
        }
        if let Scope::Request(id) = &target.scope
            && index.is_empty()
        {
            self.scoped.remove(id);
        }
    }

    pub(crate) fn unregister(&mut self, selector: &Selector, now: Now) -> usize {
        let chosen: Vec<u64> = self
            .registrations
            .iter()
            .filter(|(_, entry)| selector.fits(&entry.target))
            .map(|(number, _)| *number)
            .collect();
        let all = chosen.iter().copied().collect();
        self.cancel(&all, &Cause::Unregistered, now);
        // The newest first: the index looks for them from its end.
        for number in chosen.iter().rev() {
            if let Some(entry) = self.registrations.remove(number) {
                self.numbers.remove(&entry.target.id);
                self.delist(*number, &entry.target);
            }
        }
        chosen.len()
    }

    /// Sends them nothing any more, until they are enabled.
    fn disable(&mut self, number: u64, cause: &Cause, now: Now) {
        let Some(entry) = self.registrations.get_mut(&number) else {
            return;
        };
        if entry.disabled.replace(cause.clone()).is_some() {
            return;
        }
        let target = Arc::clone(&entry.target);
        self.delist(number, &target);
        self.cancel(&HashSet::from([number]), cause, now);
    }

    /// Whether there is one of this id.
    pub(crate) fn enable(&mut self, id: &str, now: Now) -> bool {
        let Some(number) = self.numbers.get(id).copied() else {
            return false;
        };
        let Some(entry) = self.registrations.get_mut(&number) else {
            return false;
        };
        if entry.disabled.take().is_some() {
            let target = Arc::clone(&entry.target);
            self.enlist(number, &target);
            for id in self.orphans.remove(id).unwrap_or_default() {
                self.settle_in(id, number, &target, now);
            }
        }
        true
    }

    pub(crate) fn target(&self, id: &str) -> Option<&Arc<Target>> {
        let number = self.numbers.get(id)?;
        Some(&self.registrations.get(number)?.target)
    }

    pub(crate) fn list(&self) -> Vec<RegistrationInfo> {
        self.registrations
            .values()
            .map(|entry| RegistrationInfo::of(&entry.target, entry.disabled.clone(), entry.queued))
            .collect()
    }

    /// Those that are told of an event, each once, in the order in which they
    /// came.
    pub(crate) fn find(&self, event: &str, request: Option<&str>) -> Vec<(u64, Arc<Target>)> {
        let mut found = Vec::new();
        self.global.find(event, &mut found);
        if let Some(index) = request.and_then(|request| self.scoped.get(request)) {
            index.find(event, &mut found);
        }
        found.sort_unstable();
        found.dedup();
        let target = |number| Some((number, Arc::clone(&self.registrations.get(&number)?.target)));
        found.into_iter().filter_map(target).collect()
    }

    /// Whether the lane of a registration holds as much as it may.
    pub(crate) fn is_crowded(&self, number: u64) -> bool {
        let entry = self.registrations.get(&number);
        let lane = entry.and_then(|entry| self.lanes.get(&entry.target.lane));
        lane.is_some_and(|lane| lane.held >= self.limits.lane_capacity)
    }

    /// The registration that a letter is to be sent to again, and whether it is
    /// disabled.
    pub(crate) fn registration(&self, id: &RegistrationId) -> Option<(u64, bool)> {
        let number = *self.numbers.get(id)?;
        let entry = self.registrations.get(&number)?;
        Some((number, entry.disabled.is_some()))
    }

    // The queue.

    /// Accepted and not over.
    pub(crate) fn depth(&self) -> usize {
        self.deliveries.len()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Takes room for so many, all or none; else how many are too many.
    pub(crate) fn reserve(&mut self, count: usize) -> Result<(), usize> {
        let over =
            (self.deliveries.len() + self.reserved + count).saturating_sub(self.limits.capacity);
        if count > 0 && over > 0 {
            return Err(over.min(count));
        }
        // What the store has not been told of takes memory, too.
        if count > 0 && self.writes.len() >= self.limits.capacity.max(LEAST_BEHIND) {
            return Err(count);
        }
        self.reserved += count;
        Ok(())
    }

    pub(crate) fn unreserve(&mut self, count: usize) {
        self.reserved -= count;
    }

    /// Takes on what the store has kept, for which there is room. How many are
    /// queued, and whether all of them are still.
    pub(crate) fn accept(&mut self, records: Vec<(u64, Record)>, now: Now) -> (usize, bool) {
        let (mut queued, mut whole) = (0, true);
        for (number, record) in records {
            let id = record.id;
            // It may have gone while the store was asked.
            let target = match self.registrations.get(&number) {
                Some(entry) if entry.disabled.is_none() => Ok(Arc::clone(&entry.target)),
                Some(entry) => Err(entry.disabled.clone()),
                None => Err(None),
            };
            self.add(record, now);
            let target = match target {
                Ok(target) => target,
                Err(cause) => {
                    let fate = Fate::doomed(cause.unwrap_or(Cause::Unregistered));
                    self.end(id, fate, now);
                    // As if it had gone a moment later.
                    queued += 1;
                    whole = false;
                    continue;
                }
            };
            let lane = self.lanes.get(&target.lane);
            if lane.is_some_and(|lane| lane.held >= self.limits.lane_capacity) {
                self.end(id, Fate::Dead(Cause::Crowded), now);
                whole = false;
                continue;
            }
            self.settle_in(id, number, &target, now);
            queued += 1;
        }
        (queued, whole)
    }

    /// Takes on what an earlier run has left.
    pub(crate) fn adopt(&mut self, record: Record, now: Now) {
        let id = record.id;
        if self.deliveries.contains_key(&id) {
            return;
        }
        let registration = record.registration.clone();
        self.add(record, now);
        if let Some(delivery) = self.deliveries.get_mut(&id) {
            delivery.adopted = true;
        }
        if let Some((number, false)) = self.registration(&registration)
            && let Some(entry) = self.registrations.get(&number)
        {
            let target = Arc::clone(&entry.target);
            self.settle_in(id, number, &target, now);
        } else {
            let key = (now.at + ORPHANED, self.count());
            if let Some(delivery) = self.deliveries.get_mut(&id) {
                delivery.phase = Phase::Orphan(key);
            }
            self.timers.insert(key, Wake::Orphan(id));
            self.orphans.entry(registration).or_default().push(id);
        }
    }

    /// Its registration has not come.
    fn give_up_orphan(&mut self, id: DeliveryId, now: Now) {
        self.end(id, Fate::Dead(Cause::Unregistered), now);
    }

    fn add(&mut self, record: Record, now: Now) {
        let status = if record.attempts == 0 {
            Status::Pending
        } else {
            Status::Retrying
        };
        let result = Arc::new(first_result(&record, status, now.unix));
        let number = self.count();
        self.tell(&result);
        let delivery = Delivery {
            record,
            home: None,
            phase: Phase::New,
            adopted: false,
            doomed: None,
            number,
            result,
        };
        self.deliveries.insert(delivery.record.id, delivery);
    }

    /// Puts a delivery where its registration's are.
    fn settle_in(&mut self, id: DeliveryId, number: u64, target: &Arc<Target>, now: Now) {
        let (Some(entry), Some(delivery)) = (
            self.registrations.get_mut(&number),
            self.deliveries.get_mut(&id),
        ) else {
            return;
        };
        if let Phase::Orphan(key) = delivery.phase {
            self.timers.remove(&key);
        }
        delivery.home = Some(Home {
            registration: number,
            target: Arc::clone(target),
        });
        entry.queued += 1;
        self.lanes.entry(Arc::clone(&target.lane)).or_default().held += 1;
        if target.ordered {
            let adopted = delivery.adopted;
            delivery.phase = Phase::Chained;
            let before = |other: &DeliveryId| self.deliveries.get(other).is_some_and(|d| d.adopted);
            let place = match entry.chain.front().copied() {
                Some(first) if adopted && !before(&first) => usize::from(!self.step_back(first)),
                _ if adopted => entry.chain.partition_point(before),
                _ => entry.chain.len(),
            };
            let Some(entry) = self.registrations.get_mut(&number) else {
                return;
            };
            entry.chain.insert(place, id);
            if place > 0 {
                return;
            }
        }
        self.begin(id, now);
    }

    /// Has the first of its registration wait behind another, unless its
    /// attempt is under way.
    fn step_back(&mut self, id: DeliveryId) -> bool {
        let Some(delivery) = self.deliveries.get_mut(&id) else {
            return true;
        };
        match delivery.phase {
            Phase::Flying => return false,
            Phase::Waiting(key) => drop(self.timers.remove(&key)),
            Phase::Ready => {
                if let Some(home) = &delivery.home
                    && let Some(lane) = self.lanes.get_mut(&home.target.lane)
                {
                    lane.take_ready(id);
                }
            }
            Phase::New | Phase::Orphan(_) | Phase::Chained => {}
        }
        delivery.phase = Phase::Chained;
        true
    }

    /// Its turn in its registration has come.
    fn begin(&mut self, id: DeliveryId, now: Now) {
        let Some(delivery) = self.deliveries.get(&id) else {
            return;
        };
        // By a time of day that may have been another when it was put down: no
        // wait is longer than the longest.
        let longest = delivery
            .home
            .as_ref()
            .map_or(Duration::ZERO, |home| home.target.max_retry_delay);
        let wait = delivery.record.due.saturating_sub(now.unix).min(longest);
        if wait.is_zero() {
            self.ready(id);
        } else {
            self.wait(id, now.at + wait);
        }
    }

    fn wait(&mut self, id: DeliveryId, until: Instant) {
        let key = (until, self.count());
        if let Some(delivery) = self.deliveries.get_mut(&id) {
            delivery.phase = Phase::Waiting(key);
            self.timers.insert(key, Wake::Delivery(id));
        }
    }

    /// Takes a delivery out, wherever it is.
    fn remove(&mut self, id: DeliveryId, now: Now) -> Option<Delivery> {
        let delivery = self.deliveries.remove(&id)?;
        match delivery.phase {
            Phase::Waiting(key) => drop(self.timers.remove(&key)),
            Phase::Flying => self.in_flight -= 1,
            Phase::Orphan(key) => {
                self.timers.remove(&key);
                if let Some(waiting) = self.orphans.get_mut(&delivery.record.registration) {
                    waiting.retain(|other| *other != id);
                    if waiting.is_empty() {
                        self.orphans.remove(&delivery.record.registration);
                    }
                }
            }
            Phase::New | Phase::Chained | Phase::Ready => {}
        }
        if let Some(home) = &delivery.home {
            self.leave(&home.target.lane, id, delivery.phase);
            if let Some(entry) = self.registrations.get_mut(&home.registration) {
                entry.queued -= 1;
                let was_first = entry.chain.front() == Some(&id);
                if was_first {
                    entry.chain.pop_front();
                    if let Some(next) = entry.chain.front().copied() {
                        self.begin(next, now);
                    }
                } else if let Some(at) = entry.chain.iter().position(|other| *other == id) {
                    // Where all are taken back, it is near the front.
                    entry.chain.remove(at);
                }
            }
        }
        Some(delivery)
    }

    /// Takes back what is not under way of these registrations, and sees to it
    /// that what is will not be tried again.
    fn cancel(&mut self, registrations: &HashSet<u64>, cause: &Cause, now: Now) {
        let mut waiting = Vec::new();
        for delivery in self.deliveries.values_mut() {
            let home = delivery.home.as_ref();
            if !home.is_some_and(|home| registrations.contains(&home.registration)) {
                continue;
            }
            if delivery.phase == Phase::Flying {
                delivery.doomed = Some(cause.clone());
            } else {
                waiting.push((delivery.number, delivery.record.id));
            }
        }
        waiting.sort_unstable();
        let fate = Fate::doomed(cause.clone());
        for (_, id) in waiting {
            self.end(id, fate.clone(), now);
        }
    }

    // Attempts.

    /// An attempt is over. How its delivery stands now.
    pub(crate) fn conclude(&mut self, id: DeliveryId, report: &Report, now: Now) -> Status {
        let Some(delivery) = self.deliveries.get_mut(&id) else {
            return Status::Failed;
        };
        let fate = delivery.fate(report);
        let status = match fate {
            Fate::Delivered => Status::Delivered,
            Fate::Retry(_) => Status::Retrying,
            Fate::Dead(_) | Fate::Dropped(_) => Status::Failed,
        };
        delivery.record.attempts = delivery.record.attempts.saturating_add(1);
        let mut result = DeliveryResult::clone(&delivery.result);
        result.attempt = delivery.record.attempts;
        result.response_status = report.status;
        result.body = report.body.clone();
        result.duration = Some(report.took);
        delivery.result = Arc::new(result);
        let home = delivery.home.clone();

        if let (Some(hold), Some(home)) = (report.hold, &home)
            && let Some(entry) = self.registrations.get_mut(&home.registration)
        {
            entry.hold = entry.hold.max(Some(now.at + hold));
        }
        match fate {
            Fate::Retry(cause) => self.retry(id, cause, report.wait, now),
            fate => self.end(id, fate, now),
        }
        if let (Some(cause), Some(home)) = (&report.disable, home) {
            self.disable(home.registration, cause, now);
        }
        status
    }

    fn retry(&mut self, id: DeliveryId, cause: Cause, wait: Duration, now: Now) {
        self.land(id, true);
        let number = self.count();
        let Some(delivery) = self.deliveries.get_mut(&id) else {
            return;
        };
        delivery.record.due = now.unix.saturating_add(wait);
        let attempts = delivery.record.attempts;
        self.writes
            .push_back(Write::Retry(id, attempts, now.unix.saturating_add(wait)));
        let mut result = DeliveryResult::clone(&delivery.result);
        result.status = Status::Retrying;
        result.error = Some(cause);
        result.time = now.unix;
        result.retry_in = Some(wait);
        let result = Arc::new(result);
        delivery.result = Arc::clone(&result);
        delivery.number = number;
        self.tell(&result);
        self.wait(id, now.at + wait);
    }

    /// It is over with a delivery.
    fn end(&mut self, id: DeliveryId, fate: Fate, now: Now) {
        let Some(delivery) = self.remove(id, now) else {
            return;
        };
        let mut result = DeliveryResult::clone(&delivery.result);
        result.time = now.unix;
        result.retry_in = None;
        let write = match fate {
            Fate::Delivered => {
                result.status = Status::Delivered;
                result.error = None;
                Write::Settle(id)
            }
            Fate::Dropped(cause) | Fate::Retry(cause) => {
                result.status = Status::Failed;
                result.error = Some(cause);
                Write::Settle(id)
            }
            Fate::Dead(cause) => {
                result.status = Status::Failed;
                result.error = Some(cause.clone());
                Write::Bury(DeadLetter::new(delivery.record, cause, now.unix))
            }
        };
        if let Write::Bury(letter) = &write {
            self.bury(letter.clone());
        }
        self.writes.push_back(write);
        let result = Arc::new(result);
        let number = self.count();
        self.history.push(number, Arc::clone(&result));
        self.tell(&result);
    }

    /// Keeps a dead letter. Where there is no room, the oldest gives way.
    pub(crate) fn bury(&mut self, letter: DeadLetter) {
        if let Some(oldest) = self.letters.push(letter) {
            self.overflowed.push(oldest);
        }
    }

    /// An attempt was cut off, nobody knows how far it had come: it is made
    /// again, before the others.
    pub(crate) fn cut_off(&mut self, id: DeliveryId, now: Now) {
        let Some(delivery) = self.deliveries.get(&id) else {
            return;
        };
        if delivery.phase != Phase::Flying {
            return;
        }
        if let Some(cause) = delivery.doomed.clone() {
            return self.end(id, Fate::doomed(cause), now);
        }
        self.land(id, true);
        self.ready_first(id);
    }

    // What is told.

    pub(crate) fn subscribe(&mut self, scope: Option<Scope>, feed: Weak<Feed>) {
        self.feeds.add(scope, feed);
    }

    pub(crate) fn close(&mut self) {
        self.feeds.close();
    }

    fn tell(&mut self, result: &Arc<DeliveryResult>) {
        self.feeds.tell(result);
        if result.status != Status::Pending {
            self.told.push(Arc::clone(result));
        }
    }

    /// What is to be written into the store next. It is there until it
    /// [is](Self::written): who writes it may be cut off.
    pub(crate) fn next_write(&self) -> Option<Write> {
        self.writes.front().cloned()
    }

    pub(crate) fn written(&mut self) {
        self.writes.pop_front();
    }

    /// Forgets a letter, here and in the store.
    pub(crate) fn drop_letter(&mut self, id: DeliveryId) -> bool {
        let found = self.letters.remove(id).is_some();
        if found {
            self.writes.push_back(Write::DropLetter(id));
        }
        found
    }

    /// What the store has accepted and is not wanted.
    pub(crate) fn disown(&mut self, id: DeliveryId) {
        self.writes.push_back(Write::Settle(id));
    }

    /// Dead letters that gave way since this was last asked.
    pub(crate) fn take_overflowed(&mut self) -> Vec<DeadLetter> {
        let overflowed = std::mem::take(&mut self.overflowed);
        let drops = overflowed
            .iter()
            .map(|letter| Write::DropLetter(letter.record.id));
        self.writes.extend(drops);
        overflowed
    }

    /// What has been told since it was last asked, but for what is pending.
    pub(crate) fn take_told(&mut self) -> Vec<Arc<DeliveryResult>> {
        std::mem::take(&mut self.told)
    }

    /// Newest first.
    pub(crate) fn results(&self, scope: Option<&Scope>, limit: usize) -> Vec<Arc<DeliveryResult>> {
        let fits = |result: &DeliveryResult| scope.is_none_or(|scope| *scope == result.scope);
        let mut all: Vec<(u64, &Arc<DeliveryResult>)> = self
            .deliveries
            .values()
            .filter(|delivery| fits(&delivery.result))
            .map(|delivery| (delivery.number, &delivery.result))
            .collect();
        all.extend(self.history.newest(scope).take(limit));
        all.sort_unstable_by_key(|(number, _)| std::cmp::Reverse(*number));
        let newest = all.into_iter().take(limit);
        newest.map(|(_, result)| Arc::clone(result)).collect()
    }
}

impl Delivery {
    fn fate(&self, report: &Report) -> Fate {
        let retries = self.home.as_ref().map_or(0, |home| home.target.max_retries);
        match (&report.next, &self.doomed) {
            (Next::Delivered, _) => Fate::Delivered,
            (Next::Retry { .. }, Some(cause)) => Fate::doomed(cause.clone()),
            (Next::Fail(_), Some(Cause::Unregistered)) => Fate::Dropped(Cause::Unregistered),
            (Next::Fail(cause), _) => Fate::Dead(cause.clone()),
            (Next::Retry { cause, .. }, None) if self.record.attempts >= retries => {
                Fate::Dead(cause.clone())
            }
            (Next::Retry { cause, .. }, None) => Fate::Retry(cause.clone()),
        }
    }
}

fn first_result(record: &Record, status: Status, unix: Duration) -> DeliveryResult {
    DeliveryResult {
        id: record.id,
        event_id: Arc::clone(&record.message.id),
        event: Arc::clone(&record.message.event),
        request_id: record.message.request_id.clone(),
        registration: record.registration.clone(),
        scope: record.scope.clone(),
        status,
        attempt: record.attempts,
        response_status: None,
        body: Bytes::new(),
        error: None,
        time: unix,
        duration: None,
        retry_in: None,
    }
}
