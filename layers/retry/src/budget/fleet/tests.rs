//! A fleet whose messages are late and lost, and the script beside a model.

use std::collections::VecDeque;

use buttress_redis::{Cmd, testing::Server};
use proptest::prelude::*;

use super::{super::percent::Rates, *};

/// The script in Rust: `now` in microseconds, all else as there.
#[derive(Debug, Default)]
struct Pool {
    /// In millionths, and as of when.
    held: Option<(u64, u64, u64)>,
}

impl Pool {
    fn look(&mut self, now: u64, report: Report, rule: Rule) -> (u64, bool) {
        let (whole, saved) = (rule.per_second * 1_000_000, rule.saved * 1_000_000);
        let (minimum, balance, at) = self.held.unwrap_or((whole, 0, now));
        let passed = now.saturating_sub(at).min(1_000_000);
        let minimum = whole.min(minimum + passed * rule.per_second);
        let balance = saved.min(balance + report.offered * 1000);
        let there = minimum + balance;
        let most = (there / 2).max(there.min(1_000_000));
        let granted = (report.wanted * 1000).min(most) / 1000 * 1000;
        let first = granted.min(minimum);
        let balance = balance - (granted - first);
        self.held = Some((minimum - first, balance, now));
        (granted / 1000, balance >= saved)
    }
}

#[derive(Clone, Copy, Debug)]
struct Rule {
    percent: u64,
    per_second: u64,
    saved: u64,
}

impl Rule {
    fn budget(self) -> RetryBudget {
        let small = |number| u32::try_from(number).unwrap();
        let budget = RetryBudget::new(small(self.percent), small(self.per_second)).unwrap();
        budget.saving(small(self.saved)).unwrap()
    }
}

/// A generator that a case is repeated by.
struct Chance(u64);

impl Chance {
    /// Below `most`.
    fn below(&mut self, most: u64) -> u64 {
        // SplitMix64, by Vigna.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % most.max(1)
    }

    fn one_in(&mut self, many: u64) -> bool {
        many > 0 && self.below(many) == 0
    }
}

/// All in microseconds.
struct Node {
    pocket: Pocket,
    ledger: Ledger,
    next: u64,
    asking: Option<(u64, Report)>,
    coming: Option<(u64, Answer)>,
    looked: u64,
}

/// How the network is: delays of a message in microseconds at most, and one in
/// how many is lost.
#[derive(Clone, Copy, Debug)]
struct Network {
    delay: u64,
    lost: u64,
}

struct Fleet {
    rule: Rule,
    rates: Rates,
    network: Network,
    pool: Pool,
    nodes: Vec<Node>,
    now: u64,
    requests: u64,
    retries: u64,
    chance: Chance,
}

const MILLISECOND: u64 = 1000;

impl Fleet {
    fn new(nodes: usize, rule: Rule, network: Network, seed: u64) -> Self {
        let mut fleet = Self {
            rule,
            rates: rule.budget().rates(),
            network,
            pool: Pool::default(),
            nodes: Vec::new(),
            now: 1 << 50,
            requests: 0,
            retries: 0,
            chance: Chance(seed),
        };
        for _ in 0..nodes {
            let node = fleet.fresh();
            fleet.nodes.push(node);
        }
        fleet
    }

    fn fresh(&mut self) -> Node {
        let pocket = Pocket::new(u32::try_from(self.rule.saved).unwrap());
        Node {
            ledger: pocket.ledger(),
            pocket,
            next: self.now + self.chance.below(250_000),
            asking: None,
            coming: None,
            looked: 0,
        }
    }

    /// Requests of this node, each of which would like so many retries. How
    /// many there were.
    fn serve(&mut self, node: usize, requests: u64, wants: u64) -> u64 {
        let pocket = &self.nodes[node].pocket;
        let before = self.retries;
        for _ in 0..requests {
            pocket.request(self.rates.deposit());
            self.requests += 1;
            self.retries += (0..wants).take_while(|_| pocket.withdraw()).count() as u64;
        }
        self.retries - before
    }

    /// A millisecond goes by, and messages come and go.
    fn pass(&mut self) {
        self.now += MILLISECOND;
        let now = self.now;
        for index in 0..self.nodes.len() {
            let (there, back) = (
                self.chance.below(self.network.delay),
                self.chance.below(self.network.delay),
            );
            let lost = self.chance.one_in(self.network.lost);
            let lately = self
                .nodes
                .iter()
                .filter(|node| node.looked + 3_000_000 > now);
            let processes = 1 + lately.count() as u64;
            let node = &mut self.nodes[index];
            if node.asking.is_none() && node.coming.is_none() && now >= node.next {
                node.next = now + 150_000 + self.chance.below(100_000);
                let report = node.pocket.report(&mut node.ledger, self.rates);
                if !lost {
                    node.asking = Some((now + there, report));
                }
            }
            if let Some((at, report)) = node.asking
                && now >= at
            {
                node.asking = None;
                node.looked = now;
                let (granted, full) = self.pool.look(now, report, self.rule);
                let answer = Answer {
                    granted,
                    full,
                    processes,
                };
                if !lost {
                    node.coming = Some((now + back, answer));
                }
            }
            if let Some((at, answer)) = node.coming
                && now >= at
            {
                node.coming = None;
                let saved = u32::try_from(self.rule.saved).unwrap();
                node.pocket.receive(&mut node.ledger, answer, saved);
            }
        }
    }

    /// What is not in the pool, in thousandths.
    fn held(&self) -> u64 {
        let held = |node: &Node| {
            node.pocket.balance()
                + node.asking.map_or(0, |(_, report)| report.offered)
                + node.coming.map_or(0, |(_, answer)| answer.granted)
        };
        self.nodes.iter().map(held).sum()
    }
}

#[derive(Clone, Copy)]
struct Moment {
    now: u64,
    requests: u64,
    retries: u64,
    held: u64,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn a_fleet_is_bounded_as_one(
        nodes in 1_usize..12,
        percent in prop_oneof![Just(0_u64), Just(20), 1_u64..300],
        per_second in prop_oneof![Just(0_u64), 1_u64..20, 1_u64..2000],
        saved in prop_oneof![Just(100_u64), 3_u64..50],
        delay in prop_oneof![Just(0_u64), 1000_u64..50_000],
        lost in prop_oneof![Just(0_u64), 3_u64..100],
        crashes in prop_oneof![Just(0_u64), 100_u64..1000],
        seed in any::<u64>(),
    ) {
        let rule = Rule { percent, per_second, saved };
        let mut fleet = Fleet::new(nodes, rule, Network { delay, lost }, seed);
        let mut history: Vec<Moment> = Vec::new();
        let mut phase = vec![(0, 0); nodes];
        for millisecond in 0..4000 {
            if millisecond % 400 == 0 {
                for (requests, wants) in &mut phase {
                    // Many stand still, some fail, and some have much to do.
                    *requests = [0, 0, 1, 3, 30][fleet.chance.below(5) as usize];
                    *wants = [0, 0, 1, 3][fleet.chance.below(4) as usize];
                }
            }
            if millisecond % 40 == 0 {
                let Fleet { now, requests, retries, .. } = fleet;
                history.push(Moment { now, requests, retries, held: fleet.held() });
            }
            for (node, &(requests, wants)) in phase.iter().enumerate() {
                let requests = fleet.chance.below(requests + 1);
                fleet.serve(node, requests, wants);
                if fleet.chance.one_in(crashes * 10) {
                    fleet.nodes[node] = fleet.fresh();
                }
            }
            fleet.pass();
        }
        // In millionths of a retry.
        let of_time = |from: &Moment, to: &Moment| per_second * (to.now - from.now);
        let of_requests = |from: &Moment, to: &Moment| percent * 10_000 * (to.requests - from.requests);
        let second = per_second * 1_000_000;
        for (at, from) in history.iter().enumerate() {
            for to in &history[at..] {
                let retries = (to.retries - from.retries) * 1_000_000;
                let before = match at {
                    0 => 0,
                    _ => saved * 1_000_000 + from.held * 1000,
                };
                prop_assert!(
                    retries <= of_requests(from, to) + of_time(from, to) + second + before,
                );
            }
            // And what the pockets hold is what the documentation says: two
            // looks are half a second, and four messages between them.
            let looks = 500_000 + 4 * delay + 40_000;
            let before = history.iter().find(|before| before.now + looks >= from.now);
            let before = before.unwrap_or(from);
            let quiet = (nodes as u64 * 1_000_000).max(second / 2);
            let lately = second + saved * 1_000_000 + of_time(before, from) + of_requests(before, from);
            prop_assert!(from.held * 1000 <= quiet + lately, "{} {quiet} {lately}", from.held);
        }
    }
}

const NEAR: Network = Network {
    delay: 2000,
    lost: 0,
};

/// Ten processes, one of which has all the failures: it has all of the minimum.
#[test]
fn one_that_needs_it_gets_what_others_do_not() {
    let rule = Rule {
        percent: 0,
        per_second: 10,
        saved: 100,
    };
    let mut fleet = Fleet::new(10, rule, NEAR, 1);
    let mut retries = 0;
    for _ in 0..20_000 {
        retries += fleet.serve(3, 1, 1);
        fleet.pass();
    }
    assert!((180..=210).contains(&retries), "{retries}");
}

#[test]
fn what_all_need_each_gets_its_part_of() {
    let rule = Rule {
        percent: 0,
        per_second: 50,
        saved: 100,
    };
    let mut fleet = Fleet::new(10, rule, NEAR, 2);
    let mut retries = [0; 10];
    for _ in 0..20_000 {
        for (node, retries) in retries.iter_mut().enumerate() {
            *retries += fleet.serve(node, 1, 1);
        }
        fleet.pass();
    }
    let all: u64 = retries.iter().sum();
    assert!((950..=1050).contains(&all), "{all}");
    assert!(
        retries.iter().all(|&each| (50..=160).contains(&each)),
        "{retries:?}"
    );
}

#[test]
fn what_one_saves_up_another_may_spend() {
    let rule = Rule {
        percent: 20,
        per_second: 0,
        saved: 100,
    };
    let mut fleet = Fleet::new(5, rule, NEAR, 3);
    for _ in 0..5000 {
        fleet.serve(0, 1, 0);
        fleet.pass();
    }
    // All is saved up that may be, and nobody is in need: nothing is written.
    let before = fleet.nodes[0].pocket.balance();
    fleet.serve(0, 1000, 0);
    assert_eq!(fleet.nodes[0].pocket.balance(), before);
    let mut retries = 0;
    for _ in 0..10_000 {
        fleet.serve(0, 1, 0);
        retries += fleet.serve(4, 1, 1);
        fleet.pass();
    }
    // A hundred that were saved up, and a fifth of 20 000.
    assert!((3600..=4105).contains(&retries), "{retries}");
}

#[test]
fn the_first_that_fails_waits_for_nobody() {
    let rule = Rule {
        percent: 20,
        per_second: 10,
        saved: 100,
    };
    let mut fleet = Fleet::new(20, rule, NEAR, 4);
    for _ in 0..5000 {
        fleet.pass();
    }
    for node in 0..20 {
        assert_eq!(fleet.serve(node, 1, 1), 1, "{node}");
    }
}

/// The same questions to the script and to the model, by the server's time.
#[tokio::test]
async fn the_script_is_the_model() {
    let server = Server::start().await;
    let redis = server.redis();
    let script = Script::new(SCRIPT);
    let mut chance = Chance(5);
    for round in 0..20 {
        let rule = Rule {
            percent: 1,
            per_second: [0, 1, 7, 10, 333, 1_000_000][chance.below(6) as usize],
            saved: [1, 100, u64::from(u32::MAX)][chance.below(3) as usize],
        };
        let key = redis.keyspace("test").tag([format!("round {round}")]);
        let keys = [key.clone(), key.segment("processes")];
        let mut model = Pool::default();
        let mut seen = VecDeque::new();
        for look in 0..25 {
            let much = [1, 1500, 200_000, 5_000_000_000][chance.below(4) as usize];
            let amount = chance.below(much);
            let (offered, wanted) = if chance.one_in(2) {
                (amount, 0)
            } else {
                (0, amount)
            };
            let id = ["a", "b"][chance.below(2) as usize];
            let call = script.on(&keys).arg(id);
            let call = call.arg(offered).arg(wanted);
            let call = call.arg(rule.per_second).arg(rule.saved * 1000).arg(look);
            let (granted, full, processes): (u64, bool, u64) =
                redis.call("test", &call).await.unwrap();
            let mut get = Cmd::new();
            get.arg("HMGET").arg(keys[0].as_str());
            get.arg("minimum").arg("balance").arg("at");
            let (minimum, balance, at): (u64, u64, u64) = redis.run("test", &get).await.unwrap();
            let expected = model.look(at, Report { offered, wanted }, rule);
            assert_eq!((granted, full), expected, "{rule:?}");
            assert_eq!(Some((minimum, balance, at)), model.held, "{rule:?}");
            seen.push_back(id);
            let both = seen.contains(&"a") && seen.contains(&"b");
            assert!(processes > u64::from(both));
        }
    }
}

/// A cluster whose node is slow is asked again, and does both: what was offered
/// once was in the pool twice.
#[tokio::test]
async fn what_is_asked_twice_is_done_once() {
    let server = Server::start().await;
    let redis = server.redis();
    let script = Script::new(SCRIPT);
    let key = redis.keyspace("test").tag(["pool"]);
    let keys = [key.clone(), key.segment("processes")];
    let look = async |id: &str, offered: u64, look: u64| {
        let call = script.on(&keys).arg(id).arg(offered).arg(0);
        let call = call.arg(0).arg(100_000).arg(look);
        redis.call::<(u64, bool, u64)>("test", &call).await.unwrap();
        let mut get = Cmd::new();
        get.arg("HGET").arg(keys[0].as_str()).arg("balance");
        redis.run::<u64>("test", &get).await.unwrap() / 1000
    };
    assert_eq!(look("a", 1000, 254).await, 1000);
    assert_eq!(look("a", 1000, 254).await, 1000, "again");
    assert_eq!(look("a", 1000, 255).await, 2000);
    assert_eq!(look("a", 1000, 254).await, 2000, "late");
    assert_eq!(look("a", 1000, 256).await, 3000);
    assert_eq!(look("b", 1000, 256).await, 4000, "another's");
    // Who was away for long may be at any number.
    tokio::time::sleep(Duration::from_millis(3100)).await;
    assert_eq!(look("a", 1000, 256 + 200).await, 5000);
}
