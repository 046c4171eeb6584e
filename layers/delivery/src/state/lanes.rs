//! Whose turn it is: a lane for each endpoint, and turns between the lanes.

use std::{collections::VecDeque, sync::Arc};

use buttress_core::clock::Instant;

use super::{Fate, Job, Now, Phase, State, Wake};
use crate::DeliveryId;

/// What is to be sent to one endpoint.
#[derive(Default)]
pub(super) struct Lane {
    ready: VecDeque<DeliveryId>,
    /// All of its deliveries, wherever they are.
    pub(super) held: usize,
    in_flight: usize,
    /// Whether it is among the runnable ones.
    listed: bool,
    /// Until when its breaker or its rate lets nothing pass: the timer's.
    blocked: Option<(Instant, u64)>,
}

impl Lane {
    pub(super) fn take_ready(&mut self, id: DeliveryId) {
        if let Some(at) = self.ready.iter().position(|other| *other == id) {
            self.ready.remove(at);
        }
    }
}

impl State {
    /// Starts the next attempt that may be, whose lane's turn it is.
    pub(crate) fn pick(&mut self, now: Now) -> Option<Job> {
        while self.in_flight < self.limits.concurrency {
            let key = self.runnable.pop_front()?;
            let Some(lane) = self.lanes.get_mut(&key) else {
                continue;
            };
            lane.listed = false;
            if lane.blocked.is_some() || lane.in_flight >= self.limits.lane_concurrency {
                continue;
            }
            let Some(id) = lane.ready.pop_front() else {
                continue;
            };
            let Some(delivery) = self.deliveries.get_mut(&id) else {
                continue;
            };
            let Some(home) = &delivery.home else {
                continue;
            };
            let hold = self
                .registrations
                .get(&home.registration)
                .and_then(|entry| entry.hold);
            if let Some(until) = hold.filter(|until| *until > now.at) {
                self.wait(id, until);
                self.enlist_lane(&key);
                continue;
            }
            lane.in_flight += 1;
            self.in_flight += 1;
            delivery.phase = Phase::Flying;
            let job = Job {
                record: delivery.record.clone(),
                target: Arc::clone(&home.target),
            };
            self.enlist_lane(&key);
            return Some(job);
        }
        None
    }

    /// Puts back what was picked, for the lane may send nothing yet.
    pub(crate) fn put_back(&mut self, id: DeliveryId, until: Instant, now: Now) {
        let Some(delivery) = self.deliveries.get(&id) else {
            return;
        };
        if let Some(cause) = delivery.doomed.clone() {
            return self.end(id, Fate::doomed(cause), now);
        }
        if let Some(home) = &delivery.home {
            let lane = Arc::clone(&home.target.lane);
            self.block(&lane, until);
        }
        self.land(id, false);
        self.ready_first(id);
    }

    /// When something is due next.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.timers.first_key_value().map(|((at, _), _)| *at)
    }

    /// Wakes what is due.
    pub(crate) fn fire(&mut self, now: Now) {
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > now.at {
                return;
            }
            match entry.remove() {
                Wake::Delivery(id) => self.ready(id),
                Wake::Orphan(id) => self.give_up_orphan(id, now),
                Wake::Lane(key) => {
                    if let Some(lane) = self.lanes.get_mut(&key) {
                        lane.blocked = None;
                    }
                    self.enlist_lane(&key);
                }
            }
        }
    }

    pub(super) fn ready(&mut self, id: DeliveryId) {
        self.put(id, VecDeque::push_back);
    }

    pub(super) fn ready_first(&mut self, id: DeliveryId) {
        self.put(id, VecDeque::push_front);
    }

    fn put(&mut self, id: DeliveryId, push: fn(&mut VecDeque<DeliveryId>, DeliveryId)) {
        let Some(delivery) = self.deliveries.get_mut(&id) else {
            return;
        };
        let Some(home) = &delivery.home else {
            return;
        };
        delivery.phase = Phase::Ready;
        let key = Arc::clone(&home.target.lane);
        if let Some(lane) = self.lanes.get_mut(&key) {
            push(&mut lane.ready, id);
        }
        self.enlist_lane(&key);
    }

    /// An attempt is not under way any more. One that was made may have been
    /// the probe whose end the others wait for.
    pub(super) fn land(&mut self, id: DeliveryId, was_made: bool) {
        let Some(delivery) = self.deliveries.get(&id) else {
            return;
        };
        self.in_flight -= 1;
        if let Some(home) = &delivery.home {
            let key = Arc::clone(&home.target.lane);
            self.landed(&key, was_made);
        }
    }

    fn landed(&mut self, key: &Arc<str>, was_made: bool) {
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        lane.in_flight -= 1;
        if was_made && let Some(timer) = lane.blocked.take() {
            self.timers.remove(&timer);
        }
        self.enlist_lane(key);
    }

    /// A delivery of this lane is gone.
    pub(super) fn leave(&mut self, key: &Arc<str>, id: DeliveryId, phase: Phase) {
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        lane.held -= 1;
        match phase {
            Phase::Ready => lane.take_ready(id),
            Phase::Flying => self.landed(key, true),
            Phase::New | Phase::Orphan(_) | Phase::Chained | Phase::Waiting(_) => {}
        }
        self.forget_lane(key);
    }

    fn block(&mut self, key: &Arc<str>, until: Instant) {
        let timer = (until, self.count());
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        if let Some(before) = lane.blocked.replace(timer) {
            self.timers.remove(&before);
        }
        self.timers.insert(timer, Wake::Lane(Arc::clone(key)));
    }

    fn enlist_lane(&mut self, key: &Arc<str>) {
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        let may = lane.blocked.is_none()
            && !lane.ready.is_empty()
            && lane.in_flight < self.limits.lane_concurrency;
        if may && !lane.listed {
            lane.listed = true;
            self.runnable.push_back(Arc::clone(key));
        }
    }

    /// A lane is there for its deliveries: what its breaker and its rate know,
    /// they remember themselves.
    fn forget_lane(&mut self, key: &Arc<str>) {
        if self.lanes.get(key).is_none_or(|lane| lane.held > 0) {
            return;
        }
        let Some(lane) = self.lanes.remove(key) else {
            return;
        };
        if let Some(timer) = lane.blocked {
            self.timers.remove(&timer);
        }
        // Only where what was ready was taken back.
        if lane.listed {
            self.runnable.retain(|other| other != key);
        }
    }

    #[cfg(test)]
    pub(super) fn assert_sound(&self) {
        let flying = |phase| matches!(phase, Phase::Flying);
        let all = self.deliveries.values();
        assert_eq!(
            self.in_flight,
            all.clone().filter(|d| flying(d.phase)).count()
        );
        assert!(self.in_flight <= self.limits.concurrency);
        let mut timers = 0;
        for (key, lane) in &self.lanes {
            let of_lane = || {
                all.clone()
                    .filter(|d| d.home.as_ref().is_some_and(|home| home.target.lane == *key))
            };
            assert_eq!(lane.held, of_lane().count());
            assert_eq!(
                lane.in_flight,
                of_lane().filter(|d| flying(d.phase)).count()
            );
            assert!(lane.in_flight <= self.limits.lane_concurrency);
            let ready = of_lane().filter(|d| d.phase == Phase::Ready).count();
            assert_eq!(lane.ready.len(), ready);
            assert!(lane.held > 0, "an idle lane is kept");
            let may = lane.blocked.is_none()
                && ready > 0
                && lane.in_flight < self.limits.lane_concurrency;
            assert!(!may || lane.listed, "a lane that may send is forgotten");
            let turns = self.runnable.iter().filter(|other| *other == key).count();
            assert_eq!(turns, usize::from(lane.listed));
            if let Some(timer) = &lane.blocked {
                assert!(matches!(self.timers.get(timer), Some(Wake::Lane(k)) if k == key));
                timers += 1;
            }
        }
        for delivery in all.clone() {
            if let Phase::Waiting(timer) = delivery.phase {
                let id = delivery.record.id;
                assert!(matches!(self.timers.get(&timer), Some(Wake::Delivery(d)) if *d == id));
                timers += 1;
            }
        }
        timers += self.orphans.values().map(Vec::len).sum::<usize>();
        assert_eq!(self.timers.len(), timers, "a timer is left behind");
        let known = |key: &Arc<str>| self.lanes.contains_key(key);
        assert!(self.runnable.iter().all(known), "a turn is left behind");
        for waiting in self.orphans.values() {
            let orphan = |id| matches!(self.deliveries[id].phase, Phase::Orphan(_));
            assert!(!waiting.is_empty() && waiting.iter().all(orphan));
        }
        for (number, entry) in &self.registrations {
            let mine = || {
                all.clone().filter(|d| {
                    d.home
                        .as_ref()
                        .is_some_and(|home| home.registration == *number)
                })
            };
            assert_eq!(entry.queued, mine().count());
            if entry.target.ordered {
                assert_eq!(entry.chain.len(), mine().count());
                for (place, id) in entry.chain.iter().enumerate() {
                    let chained = self.deliveries[id].phase == Phase::Chained;
                    assert_eq!(chained, place > 0, "only the first of a chain goes");
                }
            }
        }
    }
}
