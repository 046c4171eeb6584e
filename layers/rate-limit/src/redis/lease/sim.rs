//! Many nodes, one model server, and a clock that is told.

use std::{cmp::Reverse, collections::BinaryHeap, time::Duration};

use proptest::prelude::*;

use super::share::{Grant, Share, Take, Want};
use crate::{
    Quota,
    gcra::{Gcra, Ruling, Tat},
};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
/// How long an operation may take.
const LIMIT: u64 = 100 * MS;
/// Not at the clock's zero, where all arrival times are.
const START: u64 = 1_000 * SECOND;

/// What the script does, on the exact arithmetic of the limiter in memory.
struct Server {
    gcra: Gcra,
    tat: Tat,
}

impl Server {
    fn take(&mut self, now: u64, want: Want) -> Grant {
        let left = self.gcra.remaining(self.tat, now);
        let granted = if left < want.least {
            0
        } else {
            want.need.min(left) + want.more.min(left.saturating_sub(want.need) / 8)
        };
        if granted > 0 {
            match self.gcra.decide(self.tat, now, granted) {
                Ruling::Pass { tat } => self.tat = tat,
                other => panic!("{granted} of {left}: {other:?}"),
            }
        }
        Grant {
            granted,
            tat: if self.tat.is_after(now) {
                self.tat
            } else {
                Tat::at(now)
            },
        }
    }

    fn refund(&mut self, now: u64, back: u32) {
        self.tat = self.gcra.refund(self.tat, now, back);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A request comes to a node.
    Arrival(usize),
    /// The node's ask is at the server.
    Asked(usize, u64, [u32; 3]),
    /// The answer is back.
    Answered(usize, u64, [u32; 3], u32, Tat),
    /// A request that no share would help is at the server.
    Charged(usize, u32, bool),
    /// It has its answer.
    Decided(usize, u32, bool, bool),
    /// Shares are given back where they are due.
    Tick,
    /// What was given back is at the server.
    Returned(u32),
}

/// How often a node's requests come, from when to when, and what they cost.
#[derive(Clone, Copy, Debug)]
struct Demand {
    every: u64,
    from: u64,
    to: u64,
    cost: u32,
}

struct Node {
    share: Share,
    demand: Demand,
    /// Their costs, first come first served; and whether the answer that is
    /// awaited is to a question in which they are counted.
    /// What each costs, whether it is counted in a question, and since when.
    waiting: Vec<(u32, bool, u64)>,
    /// Their sum, and that of those before them whose answer was shared out
    /// last.
    wanted: u64,
    /// What those cost together that wait for an answer of their own.
    big: u64,
    alive: bool,
    passed: u64,
    refused: u64,
}

struct Fleet {
    server: Server,
    nodes: Vec<Node>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    sequence: u64,
    random: fastrand::Rng,
    trip: u64,
    most: u32,
    asks: u64,
    passed: u64,
    /// Granted, and not yet in anybody's hand.
    on_its_way: u64,
    /// The least that was passed and is in shares, less what came back.
    least: i128,
}

impl Fleet {
    fn new(gcra: Gcra, most: u32, trip: u64, demands: &[Demand], seed: u64) -> Self {
        let mut fleet = Self {
            server: Server {
                gcra,
                tat: Tat::default(),
            },
            nodes: demands
                .iter()
                .map(|&demand| Node {
                    share: Share::new(gcra, START),
                    demand,
                    waiting: Vec::new(),
                    wanted: 0,
                    big: 0,
                    alive: true,
                    passed: 0,
                    refused: 0,
                })
                .collect(),
            events: BinaryHeap::new(),
            sequence: 0,
            random: fastrand::Rng::with_seed(seed),
            trip,
            most,
            asks: 0,
            passed: 0,
            on_its_way: 0,
            least: i128::MAX,
        };
        for (index, demand) in demands.iter().enumerate() {
            let jitter = fleet.random.u64(0..=demand.every);
            fleet.schedule(START + demand.from + jitter, Event::Arrival(index));
        }
        fleet.schedule(START, Event::Tick);
        fleet
    }

    fn schedule(&mut self, at: u64, event: Event) {
        // Events of one moment come in the order they were made.
        self.sequence += 1;
        self.events.push(Reverse((at, self.sequence, event)));
    }

    fn latency(&mut self) -> u64 {
        self.random.u64(self.trip / 4..=self.trip / 2)
    }

    fn outstanding(&self) -> u64 {
        let alive = self.nodes.iter().filter(|node| node.alive);
        let held: u64 = alive.map(|node| u64::from(node.share.tokens())).sum();
        held + self.on_its_way
    }

    /// Asserts the bound over every span that ends now.
    fn check(&mut self, now: u64) {
        let gcra = self.server.gcra;
        // In parts of a token, so that nothing is rounded.
        let unit = i128::try_from(gcra.period().as_nanos()).expect("it fits");
        let refilled = i128::from(gcra.limit()) * i128::from(now - START);
        let passed = i128::from(self.passed) * unit - refilled;
        self.least = self
            .least
            .min(passed + i128::from(self.outstanding()) * unit);
        let burst = i128::from(gcra.burst()) * unit;
        assert!(
            passed <= burst + self.least,
            "above the bound at {}",
            now - START
        );
        let part = self.most + self.most / 4;
        let mut most = 0;
        for node in &self.nodes {
            let bound = u64::from(part) + node.wanted;
            assert!(
                u64::from(node.share.tokens()) <= bound,
                "more than a share at {now}: {:?} wanted {} waiting {:?}",
                node.share,
                node.wanted,
                node.waiting
            );
            most += bound + node.big;
        }
        assert!(self.outstanding() <= most, "more than all shares");
    }

    fn ask(&mut self, index: usize, now: u64) {
        let Some(want) = self.nodes[index].share.ask(now, self.most) else {
            return;
        };
        self.asks += 1;
        let at = now + self.latency();
        let want = [want.least, want.need, want.more];
        self.schedule(at, Event::Asked(index, now, want));
    }

    /// Decides on one request. Whether it waits.
    fn decide(&mut self, index: usize, now: u64, cost: u32, since: u64, may_wait: bool) {
        if cost >= self.server.gcra.burst().min(self.most + 1) {
            self.nodes[index].big += u64::from(cost);
            let at = now + self.latency();
            self.schedule(at, Event::Charged(index, cost, true));
            return;
        }
        let is_counted = !self.nodes[index].share.is_asking();
        let node = &mut self.nodes[index];
        match node.share.offer(now, cost, true) {
            Take::Pass => {
                let low = node.share.spend(now, cost);
                node.passed += u64::from(cost);
                self.passed += u64::from(cost);
                if low {
                    self.ask(index, now);
                }
            }
            Take::Ask if may_wait => {
                node.share.wait(now, cost);
                node.waiting.push((cost, is_counted, since));
                node.wanted += u64::from(cost);
                self.ask(index, now);
            }
            Take::Ask | Take::Wait(_) | Take::Never => node.refused += 1,
        }
    }

    fn run(&mut self, until: u64) {
        while let Some(&Reverse((now, _, event))) = self.events.peek() {
            if now > START + until {
                break;
            }
            self.events.pop();
            self.step(now, event);
            self.check(now);
        }
    }

    fn step(&mut self, now: u64, event: Event) {
        match event {
            Event::Arrival(index) => {
                let node = &self.nodes[index];
                let Demand {
                    every, to, cost, ..
                } = node.demand;
                if node.alive {
                    self.decide(index, now, cost, now, true);
                }
                // Like clockwork, some would ever come just after others.
                let next = now + every / 2 + self.random.u64(0..=every);
                if next < START + to {
                    self.schedule(next, Event::Arrival(index));
                }
            }
            Event::Asked(index, sent, want) => {
                let [least, need, more] = want;
                let grant = self.server.take(now, Want { least, need, more });
                self.on_its_way += u64::from(grant.granted);
                let at = now + self.latency();
                let answer =
                    Event::Answered(index, sent, want, grant.granted, grant.tat.moved(now, sent));
                self.schedule(at, answer);
            }
            Event::Answered(index, sent, [least, need, more], granted, tat) => {
                self.on_its_way -= u64::from(granted);
                let node = &mut self.nodes[index];
                if !node.alive {
                    return;
                }
                let want = Want { least, need, more };
                node.share.answered(sent, now, want, Grant { granted, tat });
                let waiting = std::mem::take(&mut node.waiting);
                node.wanted = waiting.iter().map(|&(cost, ..)| u64::from(cost)).sum();
                for (cost, was_counted, since) in waiting {
                    self.nodes[index].share.waited(cost);
                    // Whoever was counted has its answer; and nobody waits for
                    // longer than an operation may take.
                    let may_wait = !was_counted && now - since < LIMIT;
                    self.decide(index, now, cost, since, may_wait);
                }
                self.ask(index, now);
            }
            Event::Charged(index, cost, is_first) => {
                let passes = match self.server.gcra.decide(self.server.tat, now, cost) {
                    Ruling::Pass { tat } => {
                        self.server.tat = tat;
                        self.on_its_way += u64::from(cost);
                        true
                    }
                    Ruling::Wait { .. } | Ruling::Never => false,
                };
                let at = now + self.latency();
                self.schedule(at, Event::Decided(index, cost, passes, is_first));
            }
            Event::Decided(index, cost, passes, is_first) => {
                if passes {
                    self.on_its_way -= u64::from(cost);
                }
                let node = &mut self.nodes[index];
                node.big -= u64::from(cost);
                if !node.alive {
                    return;
                }
                if passes {
                    node.passed += u64::from(cost);
                    self.passed += u64::from(cost);
                    return;
                }
                let back = match is_first {
                    true => node.share.give_back(now, true),
                    false => 0,
                };
                if back == 0 {
                    node.refused += 1;
                    return;
                }
                // What is in hand may be what it lacks.
                node.big += u64::from(cost);
                self.on_its_way += u64::from(back);
                let at = now + self.latency();
                self.schedule(at, Event::Returned(back));
                self.schedule(at, Event::Charged(index, cost, false));
            }
            Event::Tick => {
                let mut all = 0;
                for node in self.nodes.iter_mut().filter(|node| node.alive) {
                    all += node.share.give_back(now, false);
                }
                if all > 0 {
                    self.on_its_way += u64::from(all);
                    let at = now + self.latency();
                    self.schedule(at, Event::Returned(all));
                }
                self.schedule(now + 100 * MS, Event::Tick);
            }
            Event::Returned(back) => {
                self.on_its_way -= u64::from(back);
                self.server.refund(now, back);
            }
        }
    }

    fn kill(&mut self, index: usize) -> u32 {
        let node = &mut self.nodes[index];
        node.alive = false;
        node.share.tokens()
    }
}

fn quota(limit: u32, period: Duration) -> Gcra {
    Quota::new(limit, period).check().unwrap()
}

/// Every node's part of `times` the quota.
fn full_demand(gcra: Gcra, nodes: u32, times: u64) -> Vec<Demand> {
    let period = u64::try_from(gcra.period().as_nanos()).unwrap();
    let every = period * u64::from(nodes) / u64::from(gcra.limit()) / times;
    let demand = Demand {
        every: every.max(1),
        from: 0,
        to: u64::MAX / 2,
        cost: 1,
    };
    vec![demand; nodes as usize]
}

/// Ten periods of it; what passed, as a part of what strict would let pass.
fn ratio(gcra: Gcra, most: u32, nodes: u32, times: u64, trip: u64, seed: u64) -> (f64, Fleet) {
    let demands = full_demand(gcra, nodes, times);
    let mut fleet = Fleet::new(gcra, most, trip, &demands, seed);
    fleet.run(10 * u64::try_from(gcra.period().as_nanos()).unwrap());
    let strict = gcra.burst() + 10 * gcra.limit();
    (fleet.passed as f64 / f64::from(strict), fleet)
}

#[test]
fn together_they_pass_as_much_as_strict() {
    for (nodes, per_node) in [
        (1, 10),
        (1, 1000),
        (2, 10),
        (2, 1000),
        (10, 10),
        (10, 37),
        (10, 1000),
        (50, 10),
        (50, 40),
    ] {
        for (period, times) in [(1, 2), (1, 10), (60, 3)] {
            let gcra = quota(nodes * per_node, Duration::from_secs(period));
            let (ratio, fleet) = ratio(gcra, 100, nodes, times, 2 * MS, 7);
            let asks = fleet.asks as f64 / fleet.passed as f64;
            let fleet = format!("{nodes} nodes, {gcra:?}, demand x{times}");
            assert!((0.95..=1.0).contains(&ratio), "{fleet}: {ratio} of strict");
            assert!(asks <= 3.0, "{fleet}: {asks} asks for each");
        }
    }
}

#[test]
fn nobody_is_starved_of_a_part() {
    let gcra = quota(1000, Duration::from_secs(1));
    let (_, fleet) = ratio(gcra, 100, 10, 3, 2 * MS, 11);
    let passed: Vec<_> = fleet.nodes.iter().map(|node| node.passed).collect();
    let fair = fleet.passed / 10;
    for node in &passed {
        assert!((fair / 2..=fair * 2).contains(node), "{passed:?}");
    }
}

#[test]
fn who_has_all_the_load_has_all_the_quota() {
    let gcra = quota(1000, Duration::from_secs(1));
    // All have a share, and then only one has requests.
    let mut demands = full_demand(gcra, 10, 1);
    for demand in &mut demands[1..] {
        demand.to = 100 * MS;
    }
    demands[0].every = SECOND / 3000;
    let mut fleet = Fleet::new(gcra, 100, 2 * MS, &demands, 3);
    fleet.run(2 * SECOND);
    let idle: u32 = fleet.nodes[1..]
        .iter()
        .map(|node| node.share.tokens())
        .sum();
    assert_eq!(idle, 0, "kept by who has no use for it");
    let before = fleet.nodes[0].passed;
    fleet.run(12 * SECOND);
    let passed = fleet.nodes[0].passed - before;
    assert!((9_800..=10_100).contains(&passed), "{passed}");
}

#[test]
fn a_share_saves_the_server_most_of_the_work() {
    // One node far below the limit: 20 000 a second of a million.
    let gcra = quota(1_000_000, Duration::from_secs(1));
    let mut demands = full_demand(gcra, 1, 1);
    demands[0].every = SECOND / 20_000;
    let mut fleet = Fleet::new(gcra, 100, MS, &demands, 5);
    fleet.run(SECOND);
    assert_eq!(fleet.nodes[0].refused, 0);
    let asks = fleet.asks as f64 / fleet.passed as f64;
    assert!(asks <= 0.011, "{asks}");
}

#[test]
fn who_is_seldom_asked_takes_nothing_ahead() {
    let gcra = quota(6_000, Duration::from_secs(60));
    let mut demands = full_demand(gcra, 1, 1);
    demands[0].every = 2 * SECOND;
    let mut fleet = Fleet::new(gcra, 100, MS, &demands, 5);
    for second in 1..30 {
        fleet.run(second * SECOND);
        assert_eq!(fleet.outstanding(), 0);
    }
}

#[test]
fn the_last_token_is_had_and_none_beyond() {
    // One node, one request after another: as in memory.
    for limit in [1, 5, 10, 100, 500] {
        let gcra = quota(limit, Duration::from_secs(3600));
        let mut demands = full_demand(gcra, 1, 1);
        demands[0].every = 5 * MS;
        let mut fleet = Fleet::new(gcra, 100, MS, &demands, 5);
        fleet.run(u64::from(limit + 50) * 5 * MS);
        assert_eq!(fleet.passed, u64::from(limit));
        assert!(fleet.nodes[0].refused >= 40);
        assert_eq!(fleet.nodes[0].share.tokens(), 0);
    }
}

#[test]
fn the_killed_strand_a_share_at_most() {
    let gcra = quota(10_000, Duration::from_secs(10));
    let demands = full_demand(gcra, 10, 1);
    let mut fleet = Fleet::new(gcra, 40, 2 * MS, &demands, 9);
    fleet.run(SECOND);
    let stranded: u32 = (0..5).map(|index| fleet.kill(index)).sum();
    assert!((1..=5 * 50).contains(&stranded), "{stranded}");
    // Its part of the quota is the others'.
    let before = fleet.passed;
    for node in &mut fleet.nodes {
        node.demand.every /= 3;
    }
    fleet.run(101 * SECOND);
    let passed = fleet.passed - before;
    assert!(passed >= 100_000 * 98 / 100, "{passed}");
}

/// Nine nodes' requests cost 1, and the tenth's the whole burst: it passes where
/// there is one, and the shares stay what they are.
#[test]
fn who_wants_all_of_it_has_it_when_the_others_rest() {
    let gcra = quota(1000, Duration::from_secs(1));
    let mut demands = full_demand(gcra, 10, 3);
    for demand in &mut demands {
        demand.to = SECOND;
    }
    demands[9] = Demand {
        every: 50 * MS,
        from: 0,
        to: 4 * SECOND,
        cost: 1000,
    };
    let mut fleet = Fleet::new(gcra, 100, 2 * MS, &demands, 13);
    fleet.run(SECOND);
    let before = fleet.nodes[9].passed;
    fleet.run(5 * SECOND);
    let after = fleet.nodes[9].passed - before;
    // Once a second, the first when the others' shares are back.
    assert!((2_000..=3_000).contains(&after), "{after}");
    let others: u64 = fleet.nodes[..9].iter().map(|node| node.passed).sum();
    assert!((900..=2_000).contains(&others), "{others}");
}

fn demand() -> impl Strategy<Value = Demand> {
    let cost = prop_oneof![4 => 1_u32..=8, 1 => 9_u32..=600];
    (500_u64..40_000, 0_u64..2000, 100_u64..4000, cost).prop_map(|(every, from, length, cost)| {
        Demand {
            every: every * 1000,
            from: from * MS,
            to: (from + length) * MS,
            cost,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// `check` asserts it after each event, over every span that ends there.
    #[test]
    fn no_span_passes_more_than_the_bound(
        limit in 1_u32..5_000,
        burst in 1_u32..2_000,
        period in 10_u64..20_000,
        most in 1_u32..500,
        trip in 10_u64..50_000,
        seed: u64,
        demands in proptest::collection::vec(demand(), 1..12),
    ) {
        let quota = Quota::new(limit, Duration::from_millis(period)).burst(burst);
        let Ok(gcra) = quota.check() else { return Ok(()) };
        let mut fleet = Fleet::new(gcra, most, trip * 1000, &demands, seed);
        fleet.run(3 * SECOND);
        let killed = fleet.nodes.len() / 2;
        for index in 0..killed {
            prop_assert!(u64::from(fleet.kill(index)) <= u64::from(most + most / 4) + 8 * 5_000);
        }
        fleet.run(6 * SECOND);
        // All that could still be in hand has been spent or given back.
        fleet.run(20 * SECOND);
        for node in fleet.nodes.iter().filter(|node| node.alive) {
            prop_assert_eq!(node.share.tokens(), 0, "{:?} {:?}", node.share, node.waiting);
        }
        prop_assert_eq!(fleet.outstanding(), 0);
    }
}
