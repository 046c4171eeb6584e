//! A fleet in one thread: real breakers and links, a model of the script, and
//! a network that loses, doubles, delays and reorders.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
    time::Duration,
};

use buttress_core::clock::Instant;
use buttress_redis::Redis;
use proptest::prelude::*;

use super::{
    link::{Bell, Link},
    record::{NodeId, Op, Order, Reply, Request, Seen, Standing, Verdict, Watermark, code},
};
use crate::{
    Breaker, Cause, Settings, State, Transition,
    cell::{Cell, Follower, Outcome, Ticket},
    window::Mark,
};

const WAIT: u64 = 5_000;
const LEASE: u64 = 3_000;
const AHEAD: u64 = 500;
const GRACE: u64 = 1_000;
/// For how long a callee asks to be left alone.
const HOLD: u64 = 7_000;
/// How long a probe takes.
const PROBE: u64 = 2_100;
const MS: u64 = 1_000_000;

/// What the script does, in another language.
#[derive(Clone, Debug)]
struct Record {
    version: u64,
    state: State,
    until: u64,
    longest: u64,
    since: u64,
    owner: Option<NodeId>,
    /// When something was last done by hand.
    hand: u64,
    votes: BTreeMap<NodeId, u64>,
}

#[derive(Clone, Debug)]
struct Told {
    version: u64,
    previous: u64,
    state: State,
    left: u64,
    owner: Option<NodeId>,
}

struct Server {
    record: Record,
    top: u64,
    /// Which history it is, and how many there were.
    epoch: u64,
    epochs: u64,
    quorum: usize,
    /// Milliseconds by which its clock differs.
    skew: u64,
    told: Vec<Told>,
}

const BLANK: Record = Record {
    version: 0,
    state: State::Closed,
    until: 0,
    longest: 0,
    since: 0,
    owner: None,
    hand: 0,
    votes: BTreeMap::new(),
};

fn standing(state: State, left: u64, ours: bool) -> Standing {
    Standing::parse(code(state), left, ours).unwrap()
}

impl Server {
    fn left(&self, now: u64) -> u64 {
        let record = &self.record;
        record.until.saturating_sub(now).min(record.longest)
    }

    fn seen(&self, now: u64, node: NodeId) -> Seen {
        let ours = self.record.owner == Some(node);
        Seen {
            version: self.record.version,
            standing: standing(self.record.state, self.left(now), ours),
        }
    }

    fn set(&mut self, state: State, until: u64, base: u64, [now, at]: [u64; 2], node: NodeId) {
        let previous = self.top;
        if previous == 0 {
            self.epochs += 1;
            self.epoch = self.epochs;
        }
        let record = &mut self.record;
        let version = (now * 1000)
            .max(previous + 1)
            .max(record.version + 1)
            .max(base + 1);
        self.top = version;
        record.version = version;
        record.state = state;
        record.until = until;
        record.longest = until.saturating_sub(now);
        record.since = at;
        record.owner = Some(node);
        self.told.push(Told {
            version,
            previous,
            state,
            left: self.left(now),
            owner: Some(node),
        });
    }

    fn vote(&mut self, now: u64, wait: u64, node: NodeId) -> usize {
        let votes = &mut self.record.votes;
        votes.insert(node, now + wait);
        votes.retain(|_, until| *until > now);
        votes.len()
    }

    fn ask(&mut self, request: &Request, time: u64, node: NodeId) -> Reply {
        let now = time + self.skew;
        let base = request.base;
        if self.record.since > now {
            self.record.until = self.record.until.min(now);
            self.record.since = 0;
        }
        if self.record.hand > now {
            self.record.hand = 0;
        }
        let millis = |span: Duration| u64::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap();
        let age = u64::try_from(request.age.as_millis()).unwrap();
        let at = now.saturating_sub(age);
        let record = &self.record;
        let (state, until) = (record.state, record.until);
        let fresh = record.version == base || record.since <= at;
        let last = record.hand <= at + 2;
        let op = match request.op {
            Op::Keep { to } if record.version == 0 => Op::Hand {
                to,
                wait: Duration::ZERO,
            },
            op => op,
        };
        let fresh = match op {
            Op::Hand { to, .. } if to.is_override() => last || to == state,
            Op::Hand { .. } => last && fresh,
            _ => fresh,
        };
        let mine = state == State::HalfOpen && record.owner == Some(node);
        let lapsed = state == State::HalfOpen && until <= now;
        let open_or_lapsed = state == State::Open || lapsed;
        let mut verdict = Verdict::Lost;
        match op {
            Op::Read => {}
            Op::Trip { wait, asked } | Op::Reopen { wait, asked } => {
                let reopens = matches!(op, Op::Reopen { .. });
                let (wait, asked) = (millis(wait), millis(asked));
                let extends = asked > 0 && now + asked > until;
                let again = reopens && (mine || fresh && open_or_lapsed);
                if again || state == State::Closed && fresh {
                    if self.quorum <= 1 || self.vote(now, wait, node) >= self.quorum {
                        self.set(State::Open, now + wait, base, [now, at], node);
                        verdict = Verdict::Took;
                    } else {
                        if again {
                            self.set(State::Open, now, base, [now, at], node);
                        }
                        verdict = Verdict::Voted;
                    }
                } else if extends && state == State::Open {
                    self.set(State::Open, now + asked, base, [now, at], node);
                    verdict = Verdict::Took;
                }
            }
            Op::Claim { lease, by_hand } => {
                let held = state.is_override() && fresh && last;
                let seize = by_hand && (matches!(state, State::Open | State::HalfOpen) || held);
                let due = state == State::Open && until <= now + AHEAD;
                if seize || mine || lapsed || due {
                    let from = if state == State::Open && !seize {
                        until.max(now)
                    } else {
                        now
                    };
                    self.set(
                        State::HalfOpen,
                        from + millis(lease),
                        base,
                        [now, now],
                        node,
                    );
                    if seize {
                        self.record.hand = self.record.hand.max(at);
                    }
                    verdict = Verdict::Took;
                }
            }
            Op::Close => {
                if state == State::Closed && (record.version > 0 || self.quorum > 1) {
                    if record.version == base {
                        verdict = Verdict::Took;
                    }
                    self.record.votes.remove(&node);
                } else if state == State::Closed || mine || fresh && open_or_lapsed {
                    self.record.votes.clear();
                    self.set(State::Closed, now, base, [now, at], node);
                    verdict = Verdict::Took;
                }
            }
            Op::Hand { to, wait } if fresh => {
                verdict = Verdict::Took;
                if !(state == to && record.version > 0 && to != State::Open) {
                    if to != State::Open {
                        self.record.votes.clear();
                    }
                    self.set(to, now + millis(wait), base, [now, at], node);
                }
                self.record.hand = self.record.hand.max(at);
            }
            Op::Keep { to } if state == to => verdict = Verdict::Took,
            Op::Hand { .. } | Op::Keep { .. } => {}
        }
        Reply {
            verdict,
            seen: self.seen(now, node),
        }
    }
}

/// Heard at the next poll in any case.
struct Silent;

impl Bell for Silent {
    fn ring(&self, _: &Arc<Link>) {}

    fn is_heard(&self) -> bool {
        true
    }

    fn forget(&self, _: &str) {}
}

struct Node {
    breaker: Breaker,
    link: Arc<Link>,
    /// Nanoseconds by which its clock differs.
    skew: u64,
    known: Watermark,
    inbox: VecDeque<Told>,
    calls: Vec<Ticket>,
    /// Asked, answered, and on its way.
    answer: Option<(Request, Reply, Instant)>,
    cut: bool,
}

impl Node {
    fn cell(&self) -> &'static Cell {
        self.breaker.lease().cell
    }
}

struct Fleet {
    server: Server,
    nodes: Vec<Node>,
    /// Milliseconds.
    time: u64,
    log: String,
    /// When something was last done by hand, and what came of it, if that is
    /// for all to see.
    hand: (u64, Option<State>),
    /// Whether when it was is known of all that was done by hand.
    clear: bool,
}

impl Fleet {
    fn new(count: usize, quorum: usize) -> Self {
        let redis = Redis::from_url("redis://127.0.0.1:1").unwrap();
        let key = redis.keyspace("circuit-breaker").tag(["sim"]);
        let nodes = (0..count)
            .map(|number| {
                let settings = Settings::new()
                    .consecutive_failures(2)
                    .reset_timeout(Duration::from_millis(WAIT));
                let breaker = Breaker::builder("sim").settings(settings).build().unwrap();
                let cell = breaker.lease().cell;
                let generation = cell.word().generation();
                let bell = Arc::new(Silent);
                let weak = breaker.downgrade();
                let link = Link::new(key.clone(), weak, bell, true, generation);
                cell.set_follower(Arc::<Link>::clone(&link));
                Node {
                    breaker,
                    link,
                    // Ten minutes apart and more.
                    skew: (1 << 50) + number as u64 * 613_000 * MS,
                    known: Watermark::default(),
                    inbox: VecDeque::new(),
                    calls: Vec::new(),
                    answer: None,
                    cut: false,
                }
            })
            .collect();
        Self {
            server: Server {
                record: BLANK,
                top: 0,
                epoch: 0,
                epochs: 0,
                quorum,
                skew: 1 << 32,
                told: Vec::new(),
            },
            nodes,
            time: 0,
            log: String::new(),
            hand: (0, None),
            clear: true,
        }
    }

    fn now(&self, node: usize) -> Instant {
        Instant::from_nanos(self.nodes[node].skew + self.time * MS)
    }

    fn publish(&mut self) {
        for told in std::mem::take(&mut self.server.told) {
            for node in &mut self.nodes {
                if !node.cut {
                    node.inbox.push_back(told.clone());
                }
            }
        }
    }

    /// As a call: begins, and perhaps ends at once.
    fn call(&mut self, node: usize, good: Option<bool>) {
        let now = self.now(node);
        let cell = self.nodes[node].cell();
        let Ok(ticket) = cell.admit(|| now) else {
            return;
        };
        match good {
            Some(good) => end(cell, ticket, Some(good), now),
            None => self.nodes[node].calls.push(ticket),
        }
    }

    fn end_call(&mut self, node: usize, good: Option<bool>) {
        let now = self.now(node);
        let cell = self.nodes[node].cell();
        if let Some(ticket) = self.nodes[node].calls.pop() {
            end(cell, ticket, good, now);
        }
    }

    /// `fate`: 0 the answer comes later, 1 it is lost, 2 the request is; else
    /// both arrive.
    fn ask(&mut self, node: usize, fate: u64) -> bool {
        self.deliver_answer(node);
        let now = self.now(node);
        let link = Arc::clone(&self.nodes[node].link);
        let Some(request) = link.poll(now) else {
            return false;
        };
        let cut = self.nodes[node].cut;
        if cut || fate == 2 {
            link.unanswered(&request, now);
            return true;
        }
        let reply = self.server.ask(&request, self.time, link.id());
        let _ = writeln!(self.log, "{} n{node} {request:?} {reply:?}", self.time);
        self.publish();
        match fate {
            0 => self.nodes[node].answer = Some((request, reply, now)),
            1 => link.unanswered(&request, now),
            _ => link.answered(&request, &reply, now, now),
        }
        true
    }

    fn ask_all(&mut self, node: usize) {
        for _ in 0..20 {
            if !self.ask(node, 9) || self.nodes[node].cut {
                return;
            }
        }
        panic!("n{node} asks for ever");
    }

    fn deliver_answer(&mut self, node: usize) {
        let now = self.now(node);
        if let Some((request, reply, sent)) = self.nodes[node].answer.take() {
            self.nodes[node].link.answered(&request, &reply, sent, now);
        }
    }

    fn hear(&mut self, node: usize, place: usize, twice: bool) {
        let now = self.now(node);
        let this = &mut self.nodes[node];
        if this.inbox.is_empty() {
            return;
        }
        let place = place % this.inbox.len();
        let told = if twice {
            this.inbox[place].clone()
        } else {
            this.inbox.remove(place).unwrap()
        };
        if this.known.told(told.version, told.previous) == Order::Old {
            return;
        }
        let ours = told.owner == Some(this.link.id());
        let seen = Seen {
            version: told.version,
            standing: standing(told.state, told.left, ours),
        };
        let link = Arc::clone(&this.link);
        let _ = writeln!(self.log, "{} n{node} hears {seen:?}", self.time);
        link.heard(seen, now);
    }

    fn pull(&mut self, node: usize) {
        self.deliver_answer(node);
        if self.nodes[node].cut {
            return;
        }
        let now = self.now(node);
        let this = &self.nodes[node];
        let (epoch, latest) = (self.server.epoch, self.server.top);
        let all = this.known.wants_all(epoch, latest);
        let link = Arc::clone(&this.link);
        let _ = writeln!(self.log, "{} n{node} pulls {latest} all {all}", self.time);
        if latest > 0 && (all || latest > this.known.since().1) {
            link.want_read();
        } else if all {
            link.lost(now);
        }
        self.ask_all(node);
        self.nodes[node].known.pulled(epoch, latest);
    }

    /// No node is to be open for longer than one of them asked for, whatever
    /// happens.
    fn check(&mut self) {
        for node in 0..self.nodes.len() {
            let now = self.now(node);
            let view = self.nodes[node].cell().view(now);
            let _ = writeln!(self.log, "{} n{node} {:?}", self.time, view.state);
            if view.state == State::Open {
                let left = view.until.unwrap() - now;
                let most = Duration::from_millis(HOLD.max(LEASE + AHEAD));
                assert!(left <= most, "open for {left:?}");
            }
        }
    }

    fn states(&self) -> Vec<State> {
        (0..self.nodes.len())
            .map(|node| self.nodes[node].cell().view(self.now(node)).state)
            .collect()
    }

    fn settle(&mut self) {
        for node in 0..self.nodes.len() {
            self.nodes[node].cut = false;
            self.deliver_answer(node);
            while !self.nodes[node].calls.is_empty() {
                self.end_call(node, None);
            }
        }
        // A pull of each, and one more of those that had pulled before the
        // others told.
        for _ in 0..2 {
            for node in 0..self.nodes.len() {
                self.nodes[node].inbox.clear();
                self.pull(node);
            }
        }
        for node in 0..self.nodes.len() {
            self.nodes[node].inbox.clear();
            self.pull(node);
            assert!(!self.nodes[node].link.is_pending());
        }
    }

    fn agree(&self) {
        let record = &self.server.record;
        let forced = self.hand.1.filter(|state| state.is_override());
        if let (true, Some(state)) = (self.clear, forced) {
            assert_eq!(record.state, state, "an operator is overruled: {record:?}");
        }
        for (node, state) in self.states().into_iter().enumerate() {
            let agrees = match record.state {
                // Below the quorum one may be open by itself; and one that
                // began to probe alone tells what comes of it.
                State::Closed if self.server.quorum > 1 => !state.is_override(),
                State::Closed => matches!(state, State::Closed | State::HalfOpen),
                State::Open => state == State::Open,
                State::HalfOpen => {
                    let prober = record.owner == Some(self.nodes[node].link.id());
                    state == State::Open || prober && state == State::HalfOpen
                }
                forced => state == forced,
            };
            assert!(agrees, "n{node} is {state:?}, and the fleet {record:?}");
        }
    }

    /// All is quiet: does anybody go on talking?
    fn idle(&mut self) {
        if self.states().contains(&State::HalfOpen) {
            return;
        }
        let mut told = 0;
        for _ in 0..600 {
            self.time += 100;
            for node in 0..self.nodes.len() {
                while !self.nodes[node].inbox.is_empty() {
                    self.hear(node, 0, false);
                }
                let before = self.server.top;
                self.ask_all(node);
                told += u64::from(self.server.top != before);
            }
        }
        let most = 2 * self.nodes.len() as u64;
        assert!(told <= most, "{told} changes where nothing happens");
    }

    /// Calls succeed from now on: it closes everywhere, in time, and one at a
    /// time probes.
    fn recover(&mut self, connected: bool) {
        if self.server.record.state.is_override() {
            return;
        }
        for node in &mut self.nodes {
            node.cut = !connected;
        }
        let began = self.time;
        // Half-open has the time of the wait, where its calls were given up
        // on in another state.
        let limit = HOLD.max(LEASE + AHEAD) + LEASE + GRACE + 2 * PROBE + 1_000;
        while self.states().iter().any(|state| *state != State::Closed) {
            self.time += 7;
            assert!(self.time - began <= limit, "not closed after {limit} ms");
            for node in 0..self.nodes.len() {
                self.call(node, None);
                // Before it could be told that another probes.
                if connected && self.server.quorum == 1 {
                    let states = self.states();
                    let probing = states.iter().filter(|state| **state == State::HalfOpen);
                    assert!(probing.count() <= 1, "{states:?}");
                }
                while !self.nodes[node].inbox.is_empty() {
                    self.hear(node, 0, false);
                }
                self.ask_all(node);
            }
            // Long enough for who would not wait for it.
            if (self.time - began) % PROBE >= 7 {
                continue;
            }
            for node in 0..self.nodes.len() {
                while !self.nodes[node].calls.is_empty() {
                    self.end_call(node, Some(true));
                }
                self.ask_all(node);
            }
        }
    }

    fn step(&mut self, mut roll: u64) {
        let mut dice = |sides: u64| {
            let rolled = roll % sides;
            roll /= sides;
            rolled
        };
        let node = dice(self.nodes.len() as u64) as usize;
        match dice(24) {
            0 if dice(4) == 0 => {
                if self.states()[node] == State::Closed {
                    self.fail(node, Some(Duration::from_millis(HOLD)));
                }
            }
            0..=5 => self.call(
                node,
                [Some(true), Some(false), Some(false), None][dice(4) as usize],
            ),
            6 | 7 => {
                let good = [Some(true), Some(false), None][dice(3) as usize];
                self.end_call(node, good);
            }
            8..=11 => {
                let fate = dice(6);
                self.ask(node, fate);
            }
            12..=14 => {
                let (place, twice) = (dice(5) as usize, dice(4) == 0);
                self.hear(node, place, twice);
            }
            15 => drop(self.nodes[node].inbox.pop_front()),
            16 => self.pull(node),
            17 => self.nodes[node].cut ^= true,
            18 => self.by_hand(node, dice(12)),
            19 if dice(8) == 0 => {
                let _ = writeln!(self.log, "{} lost", self.time);
                self.server.record = BLANK;
                self.server.top = 0;
                self.clear = false;
                self.server.epoch = 0;
                // And with it the connections.
                for node in &mut self.nodes {
                    node.inbox.clear();
                }
            }
            19 if dice(8) == 0 => {
                self.server.skew ^= 600_000;
                self.clear = false;
            }
            _ => self.time += [1, 10, 100, 700, 3_000, 6_000][dice(6) as usize],
        }
        self.check();
    }

    fn by_hand(&mut self, node: usize, what: u64) {
        let before = self.states()[node];
        self.do_by_hand(node, what);
        let state = self.states()[node];
        let _ = writeln!(self.log, "{} n{node} by hand {state:?}", self.time);
        if before != state || what >= 7 {
            // Within a few milliseconds it is not known which was later.
            let sure = self.hand.0 + 4 < self.time;
            self.hand = (self.time, sure.then_some(state));
        }
    }

    fn do_by_hand(&mut self, node: usize, what: u64) {
        let now = self.now(node);
        let cell = self.nodes[node].cell();
        let to = match what {
            0 => State::ForcedOpen,
            1 => State::ForcedClosed,
            2 => State::MetricsOnly,
            3 => State::HalfOpen,
            4 | 5 => State::Open,
            6 => State::Closed,
            _ => return cell.reset(now),
        };
        let wait = Some(Duration::from_millis(WAIT / 2));
        // What makes no sense is refused.
        let _ = cell.bring_about(to, wait, Cause::Manual, now);
    }
}

fn end(cell: &Cell, ticket: Ticket, good: Option<bool>, now: Instant) {
    let outcome = match good {
        Some(true) => Outcome::Done(Mark::GOOD),
        Some(false) => Outcome::Done(Mark {
            failed: true,
            slow: false,
        }),
        None => Outcome::Nothing,
    };
    cell.record(ticket, outcome, None, || now);
}

fn run(count: usize, quorum: usize, steps: &[u64], connected: bool) {
    let mut fleet = Fleet::new(count, quorum);
    let result = catch_unwind(AssertUnwindSafe(|| {
        for &roll in steps {
            fleet.step(roll);
        }
        fleet.settle();
        fleet.agree();
        fleet.idle();
        fleet.recover(connected);
    }));
    if let Err(panic) = result {
        #[expect(clippy::print_stdout, reason = "shown where the test fails")]
        {
            println!("{}", fleet.log);
        }
        resume_unwind(panic);
    }
}

impl Fleet {
    fn fail(&mut self, node: usize, hold: Option<Duration>) {
        let now = self.now(node);
        let cell = self.nodes[node].cell();
        let ticket = cell.admit(|| now).unwrap();
        let failed = Mark {
            failed: true,
            slow: false,
        };
        cell.record(ticket, Outcome::Done(failed), hold, || now);
    }

    fn trip(&mut self, node: usize) {
        self.fail(node, None);
        self.fail(node, None);
    }

    fn all_are(&self, state: State) -> bool {
        self.states().iter().all(|it| *it == state)
    }
}

/// It was lost to a rule elsewhere that held later, before the word of it had
/// come.
#[test]
fn an_override_stands_over_what_rules_have_done_since() {
    let overrides = [State::ForcedOpen, State::ForcedClosed, State::MetricsOnly];
    for (what, state) in (0..).zip(overrides) {
        for quorum in [1, 2] {
            let mut fleet = Fleet::new(3, quorum);
            fleet.nodes[0].cut = true;
            fleet.by_hand(0, what);
            fleet.time += 1_000;
            fleet.trip(1);
            fleet.ask_all(1);
            fleet.trip(2);
            fleet.ask_all(2);
            fleet.settle();
            assert!(fleet.all_are(state), "{:?}", fleet.states());
            // And over those that come to it later.
            fleet.time += 1_000;
            fleet.pull(1);
            if state != State::ForcedOpen {
                fleet.trip(1);
            }
            fleet.settle();
            assert!(fleet.all_are(state), "{:?}", fleet.states());
            // Until it is taken back.
            fleet.time += 1_000;
            fleet.by_hand(2, 7);
            fleet.settle();
            assert!(fleet.all_are(State::Closed), "{:?}", fleet.states());
        }
    }
}

#[derive(Debug)]
struct Deaf;

impl Follower for Deaf {
    fn changed(&self, _: &Transition, _: Option<Duration>) {}

    fn wanted(&self) {}

    fn grace(&self) -> Duration {
        Duration::ZERO
    }
}

/// What was heard between an override and the word of it ended it, and then the
/// word was old.
#[test]
fn an_override_that_is_about_to_be_told_is_not_ended() {
    let mut fleet = Fleet::new(2, 1);
    fleet.trip(1);
    fleet.ask_all(1);
    let cell = fleet.nodes[0].cell();
    let link = Arc::clone(&fleet.nodes[0].link);
    cell.set_follower(Arc::new(Deaf));
    fleet.time += 10;
    fleet.by_hand(0, 0);
    let (now, view) = (fleet.now(0), cell.view(fleet.now(0)));
    cell.set_follower(Arc::<Link>::clone(&link));
    fleet.hear(0, 0, false);
    let word = Transition {
        from: State::Closed,
        to: State::ForcedOpen,
        generation: view.generation,
        at: now,
        cause: Cause::Manual,
        wait: None,
    };
    link.changed(&word, None);
    fleet.settle();
    assert!(fleet.all_are(State::ForcedOpen), "{:?}", fleet.states());
}

/// What another operator has done since stands, and what has come of that.
#[test]
fn an_override_of_before_another_word_does_not_come_again() {
    let mut fleet = Fleet::new(3, 1);
    fleet.nodes[0].cut = true;
    fleet.by_hand(0, 0);
    fleet.time += 1_000;
    fleet.by_hand(1, 1);
    fleet.ask_all(1);
    fleet.time += 1_000;
    fleet.by_hand(1, 7);
    fleet.ask_all(1);
    fleet.time += 1_000;
    fleet.trip(1);
    fleet.ask_all(1);
    fleet.settle();
    assert!(fleet.all_are(State::Open), "{:?}", fleet.states());
}

/// Who kept the record of an override there told it as if it were a word of the
/// time when it was heard, and what was said before that was lost.
#[test]
fn to_keep_an_override_is_no_new_word() {
    const MINUTE: u64 = 60_000;
    let mut fleet = Fleet::new(2, 1);
    fleet.nodes[1].cut = true;
    fleet.by_hand(0, 0);
    fleet.ask_all(0);
    fleet.nodes[0].cut = true;
    fleet.time += MINUTE;
    fleet.by_hand(0, 7);
    // One that hears of it later, and keeps it.
    fleet.time += MINUTE;
    fleet.nodes[1].cut = false;
    fleet.pull(1);
    assert_eq!(fleet.states()[1], State::ForcedOpen);
    for _ in 0..3 {
        fleet.time += 11 * MINUTE;
        assert!(fleet.ask(1, 9), "it is kept");
    }
    // Nor does one that has not heard of the end yet take it back.
    fleet.nodes[0].cut = false;
    fleet.ask_all(0);
    fleet.time += 11 * MINUTE;
    fleet.ask_all(1);
    fleet.settle();
    assert!(fleet.all_are(State::Closed), "{:?}", fleet.states());
}

/// One that came late counted from then on.
#[test]
fn a_probe_that_was_begun_by_hand_counts_from_when_it_was() {
    let mut fleet = Fleet::new(2, 1);
    fleet.trip(0);
    fleet.ask_all(0);
    fleet.pull(1);
    for node in 0..2 {
        fleet.nodes[node].cut = true;
        fleet.time += 1_000;
        fleet.by_hand(node, [3, 0][node]);
    }
    fleet.time += 1_000;
    fleet.nodes[0].cut = false;
    fleet.ask_all(0);
    assert_eq!(fleet.server.record.state, State::HalfOpen);
    fleet.settle();
    assert!(fleet.all_are(State::ForcedOpen), "{:?}", fleet.states());
}

/// The pause that the callee asked for beside failures that opened it was that
/// of the fleet only where it was the first to open it.
#[test]
fn a_pause_that_was_asked_for_holds_whatever_opens_it() {
    let asked = Duration::from_millis(4 * WAIT);
    for reopens in [false, true] {
        let mut fleet = Fleet::new(3, 1);
        // The other's wait is shorter, and known first.
        fleet.trip(1);
        fleet.ask_all(1);
        if reopens {
            fleet.settle();
            fleet.time += WAIT + GRACE + 1;
            // Both probe: each is alone.
            for node in [0, 1] {
                fleet.nodes[node].cut = true;
                fleet.call(node, None);
                fleet.ask_all(node);
                fleet.time += GRACE + 1;
                fleet.call(node, None);
                fleet.time += 1;
            }
            assert_eq!(fleet.states()[..2], [State::HalfOpen; 2]);
            let now = fleet.now(0);
            let ticket = fleet.nodes[0].calls.pop().unwrap();
            let failed = Mark {
                failed: true,
                slow: false,
            };
            let cell = fleet.nodes[0].cell();
            cell.record(ticket, Outcome::Done(failed), Some(asked), || now);
            fleet.time += 10;
            fleet.end_call(1, Some(false));
            fleet.nodes[1].cut = false;
            fleet.ask_all(1);
        } else {
            fleet.fail(0, None);
            fleet.fail(0, Some(asked));
        }
        fleet.settle();
        for node in 0..3 {
            let view = fleet.nodes[node].cell().view(fleet.now(node));
            assert_eq!(view.state, State::Open);
            let left = view.until.unwrap() - fleet.now(node);
            assert!(left > asked * 3 / 4, "n{node}: {left:?}, {reopens}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 400 }))]

    #[test]
    fn a_fleet_agrees_and_recovers(
        count in 1_usize..6,
        quorum in prop_oneof![3 => Just(1_usize), 1 => 2_usize..4],
        steps in prop::collection::vec(any::<u64>(), 1..300),
        connected in any::<bool>(),
    ) {
        run(count, quorum, &steps, connected);
    }
}

/// The script and its model, told the same: of spans so long or so short that
/// a millisecond between the two makes no difference.
#[tokio::test]
async fn the_model_is_the_script() {
    use super::script::{Answer, Scripts, read};

    let server = buttress_redis::testing::Server::start().await;
    let redis = server.redis();
    let scripts = Scripts::new();
    let keys = redis.keyspace("circuit-breaker");
    let hour = Duration::from_secs(3600);
    let random = buttress_core::random::SharedRandom::default();
    for round in 0..40_u64 {
        let quorum = 1 + round as usize % 3;
        let index = keys.tag([round.to_string()]);
        let record = index.clone().segment("x");
        let mut model = Server {
            record: BLANK,
            top: 0,
            epoch: 0,
            epochs: 0,
            quorum,
            skew: 0,
            told: Vec::new(),
        };
        // The versions are not the same, but which of them it is.
        let (mut ours, mut theirs) = (0, 0);
        let mut log = String::new();
        for step in 0..40 {
            let mut roll = random.next_u64();
            let mut dice = |sides: u64| {
                let rolled = roll % sides;
                roll /= sides;
                rolled
            };
            let span = [Duration::ZERO, hour][dice(2) as usize];
            let op = match dice(10) {
                0 => Op::Read,
                1 => Op::Trip {
                    wait: span,
                    asked: Duration::ZERO,
                },
                // Never the same twice.
                2 => Op::Trip {
                    wait: span,
                    asked: hour * (10 + step),
                },
                3 => Op::Reopen {
                    wait: span,
                    asked: [Duration::ZERO, hour * (10 + step)][dice(2) as usize],
                },
                4 | 5 => Op::Claim {
                    lease: span,
                    by_hand: dice(4) == 0,
                },
                6 => Op::Close,
                7 => Op::Keep {
                    to: [State::ForcedOpen, State::ForcedClosed, State::MetricsOnly]
                        [dice(3) as usize],
                },
                _ => Op::Hand {
                    to: [
                        State::Closed,
                        State::Open,
                        State::ForcedOpen,
                        State::ForcedClosed,
                        State::MetricsOnly,
                    ][dice(5) as usize],
                    wait: span,
                },
            };
            let node = NodeId(dice(3));
            let known = dice(2) == 0;
            let mut request = Request {
                op,
                base: if known { ours } else { 0 },
                age: [Duration::ZERO, 2 * hour][dice(2) as usize],
                generation: 0,
            };
            let mut time = buttress_redis::Cmd::new();
            time.arg("TIME");
            let (secs, micros): (u64, u64) = redis.run("test", &time).await.unwrap();
            let expected = model.ask(&request, secs * 1000 + micros / 1000, node);
            request.base = if known { theirs } else { 0 };
            let keys = [&record, &index];
            let quorum = u32::try_from(quorum).unwrap();
            let call = scripts.change(keys, &request, node, node, quorum, "channel");
            let answer = redis.call::<Answer>("test", &call).await.unwrap();
            let reply = read(answer).unwrap();
            let _ = writeln!(log, "{node} {request:?}\n  {expected:?}\n  {reply:?}");
            let near = |one: Duration, two: Duration| one.abs_diff(two) < Duration::from_secs(60);
            let same = match (expected.seen.standing, reply.seen.standing) {
                (Standing::Open(one), Standing::Open(two)) => near(one, two),
                (
                    Standing::Probing {
                        left: one,
                        ours: mine,
                    },
                    Standing::Probing {
                        left: two,
                        ours: its,
                    },
                ) => mine == its && near(one, two),
                (one, two) => one == two,
            };
            let changed = (expected.seen.version != ours, reply.seen.version != theirs);
            assert!(
                same && expected.verdict == reply.verdict && changed.0 == changed.1,
                "{log}"
            );
            (ours, theirs) = (expected.seen.version, reply.seen.version);
        }
    }
}
