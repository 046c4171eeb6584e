//! The state against whatever may happen, in any order: its books are right
//! after each step, every delivery ends once, and lanes keep their bounds.

use std::collections::HashMap;

use buttress_core::clock::Instant;
use http::HeaderValue;
use proptest::prelude::*;

use super::*;
use crate::{Message, Registration};

#[derive(Clone, Copy, Debug)]
enum Step {
    Register { which: u8, ordered: bool },
    Unregister(u8),
    Enable(u8),
    Emit { scope: u8 },
    Pick,
    PutBack { flying: usize, wait: u8 },
    End { flying: usize, code: u8, wait: u8 },
    CutOff(usize),
    Redrive(usize),
    Adopt(u8),
    Advance(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..6_u8, any::<bool>()).prop_map(|(which, ordered)| Step::Register { which, ordered }),
        1 => (0..6_u8).prop_map(Step::Unregister),
        1 => (0..6_u8).prop_map(Step::Enable),
        6 => (0..3_u8).prop_map(|scope| Step::Emit { scope }),
        8 => Just(Step::Pick),
        2 => (0..8_usize, 0..9_u8).prop_map(|(flying, wait)| Step::PutBack { flying, wait }),
        8 => (0..8_usize, 0..7_u8, 0..9_u8)
            .prop_map(|(flying, code, wait)| Step::End { flying, code, wait }),
        1 => (0..8_usize).prop_map(Step::CutOff),
        1 => (0..8_usize).prop_map(Step::Redrive),
        1 => (0..6_u8).prop_map(Step::Adopt),
        4 => (0..9_u8).prop_map(Step::Advance),
    ]
}

const LIMITS: Limits = Limits {
    capacity: 12,
    lane_capacity: 8,
    concurrency: 4,
    lane_concurrency: 2,
    registrations: 5,
    letters: 4,
    results: 6,
    results_in_scope: 3,
};

fn name(which: u8) -> String {
    format!("reg{which}")
}

fn target(which: u8, ordered: bool) -> Arc<Target> {
    // Two share a lane.
    let registration = Registration::new(format!("http://h{}/", which / 2))
        .id(name(which))
        .events(["*", "a.*"])
        .max_retries(u32::from(which % 3))
        .ordered(ordered)
        .scope(match which % 3 {
            2 => Scope::request("r2"),
            _ => Scope::Global,
        });
    Arc::new(registration.check(|| unreachable!()).ok().unwrap())
}

fn report(code: u8, wait: u8) -> Report {
    let wait = Duration::from_secs(wait.into());
    let (next, disable) = match code {
        0 | 1 => (Next::Delivered, None),
        2 | 3 => (
            Next::Retry {
                cause: Cause::Timeout,
                floor: None,
            },
            None,
        ),
        4 => (Next::Fail(Cause::Aborted), None),
        5 => (Next::Fail(Cause::Gone), Some(Cause::Gone)),
        _ => (Next::Delivered, Some(Cause::Disabled)),
    };
    Report {
        next,
        disable,
        wait,
        hold: (code == 3).then_some(wait),
        status: None,
        body: Bytes::new(),
        took: Duration::ZERO,
    }
}

fn message() -> Arc<Message> {
    Arc::new(Message {
        event: "a.b".into(),
        id: "msg".into(),
        request_id: None,
        content_type: HeaderValue::from_static("text/plain"),
        body: Bytes::new(),
        emitted: Duration::ZERO,
    })
}

struct Model {
    state: State,
    now: Now,
    ids: u128,
    flying: Vec<DeliveryId>,
    /// How often each delivery ended.
    ended: HashMap<DeliveryId, u32>,
    accepted: usize,
    /// What a store would hold.
    store: HashMap<DeliveryId, bool>,
}

impl Model {
    fn new() -> Self {
        Self {
            state: State::new(LIMITS),
            now: Now {
                at: Instant::from_nanos(1 << 50),
                unix: Duration::from_secs(1000),
            },
            ids: 0,
            flying: Vec::new(),
            ended: HashMap::new(),
            accepted: 0,
            store: HashMap::new(),
        }
    }

    fn record(&mut self, message: &Arc<Message>, target: &Target) -> Record {
        self.ids += 1;
        Record {
            id: DeliveryId::from_u128(self.ids),
            registration: target.id.clone(),
            scope: target.scope.clone(),
            message: Arc::clone(message),
            attempts: 0,
            due: Duration::ZERO,
        }
    }

    fn accept(&mut self, records: Vec<(u64, Record)>) {
        self.accepted += records.len();
        for (_, record) in &records {
            self.store.insert(record.id, false);
        }
        self.state.unreserve(records.len());
        self.state.accept(records, self.now);
    }

    fn take_flying(&mut self, which: usize) -> Option<DeliveryId> {
        (!self.flying.is_empty()).then(|| self.flying.swap_remove(which % self.flying.len()))
    }

    fn step(&mut self, step: Step) {
        let now = self.now;
        match step {
            Step::Register { which, ordered } => {
                let _ = self.state.register(&target(which, ordered), now);
            }
            Step::Unregister(which) => {
                self.state.unregister(&Selector::all().id(name(which)), now);
            }
            Step::Enable(which) => {
                self.state.enable(&name(which), now);
            }
            Step::Emit { scope } => {
                let request = format!("r{scope}");
                let found = self.state.find("a.b", Some(&request));
                if self.state.reserve(found.len()).is_err() {
                    assert!(self.state.depth() + found.len() > LIMITS.capacity);
                    return;
                }
                let message = message();
                let records = found
                    .into_iter()
                    .map(|(number, target)| (number, self.record(&message, &target)))
                    .collect();
                self.accept(records);
            }
            Step::Adopt(which) => {
                if self.state.depth() == LIMITS.capacity {
                    return;
                }
                let record = self.record(&message(), &target(which, false));
                self.accepted += 1;
                self.store.insert(record.id, false);
                self.state.adopt(record, now);
            }
            Step::Pick => {
                self.state.fire(now);
                if let Some(job) = self.state.pick(now) {
                    assert!(job.record.due <= now.unix, "it is early");
                    self.flying.push(job.record.id);
                }
            }
            Step::PutBack { flying, wait } => {
                if let Some(id) = self.take_flying(flying) {
                    let until = now.at + Duration::from_secs(wait.into());
                    self.state.put_back(id, until, now);
                }
            }
            Step::End { flying, code, wait } => {
                if let Some(id) = self.take_flying(flying) {
                    self.state.conclude(id, &report(code, wait), now);
                }
            }
            Step::CutOff(flying) => {
                if let Some(id) = self.take_flying(flying) {
                    self.state.cut_off(id, now);
                }
            }
            Step::Redrive(which) => {
                let letters: Vec<_> = self.state.letters.iter().cloned().collect();
                let Some(letter) = letters.get(which % letters.len().max(1)) else {
                    return;
                };
                if let Some((number, false)) = self.state.registration(&letter.record.registration)
                    && self.state.reserve(1).is_ok()
                {
                    self.ids += 1;
                    let mut record = letter.record.clone();
                    record.id = DeliveryId::from_u128(self.ids);
                    record.attempts = 0;
                    record.due = Duration::ZERO;
                    assert!(self.state.drop_letter(letter.record.id));
                    self.accept(vec![(number, record)]);
                }
            }
            Step::Advance(seconds) => {
                let span = Duration::from_secs(seconds.into());
                self.now = Now {
                    at: now.at + span,
                    unix: now.unix + span,
                };
                self.state.fire(self.now);
            }
        }
    }

    fn check(&mut self) {
        self.state.assert_sound();
        self.state.take_overflowed();
        for result in self.state.take_told() {
            if result.status.is_final() {
                *self.ended.entry(result.id).or_default() += 1;
            }
        }
        while let Some(write) = self.state.next_write() {
            match write {
                Write::Retry(id, ..) => assert_eq!(self.store.get(&id), Some(&false)),
                Write::Settle(id) => assert_eq!(self.store.remove(&id), Some(false)),
                Write::Bury(letter) => {
                    assert_eq!(self.store.insert(letter.record.id, true), Some(false));
                }
                Write::DropLetter(id) => assert_eq!(self.store.remove(&id), Some(true)),
            }
            self.state.written();
        }
        assert!(
            self.ended.values().all(|times| *times == 1),
            "one ended twice"
        );
        assert_eq!(
            self.accepted,
            self.ended.len() + self.state.depth(),
            "one is lost"
        );
        // The store holds what is here, and nothing else.
        let letters = self.store.values().filter(|letter| **letter).count();
        assert_eq!(letters, self.state.letters.len());
        assert_eq!(self.store.len() - letters, self.state.depth());
        assert!(letters <= LIMITS.letters && self.state.depth() <= LIMITS.capacity);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn nothing_is_lost_and_nothing_is_done_twice(
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let mut model = Model::new();
        model.step(Step::Register { which: 0, ordered: true });
        model.step(Step::Register { which: 1, ordered: false });
        for step in steps {
            model.step(step);
            model.check();
        }
        // In the end everything ends: whatever waits gets its turn, and whose
        // registration does not come is given up.
        for _ in 0..401 {
            model.step(Step::Advance(9));
        }
        for _ in 0..60 {
            model.step(Step::Advance(9));
            while let Some(id) = model.take_flying(0) {
                model.state.conclude(id, &report(0, 0), model.now);
            }
            model.step(Step::Pick);
            model.check();
        }
        prop_assert_eq!(model.state.depth(), 0);
        prop_assert!(model.state.lanes.is_empty());
        prop_assert!(model.state.runnable.is_empty());
    }
}
