//! Any body, stopped anywhere, against the plain original.

use proptest::prelude::*;

use super::*;

/// A body's course: what it does, and how it tells of itself.
#[derive(Clone, Debug)]
struct Course {
    steps: Vec<Step>,
    knows_its_end: bool,
    size: Sized,
}

#[derive(Clone, Copy, Debug)]
enum Sized {
    Unknown,
    AtLeast,
    Exact,
}

impl Course {
    fn data(&self) -> Vec<u8> {
        let chunks = self.steps.iter().filter_map(|step| match step {
            Step::Data(chunk) => Some(chunk.to_vec()),
            _ => None,
        });
        chunks.flatten().collect()
    }

    fn trailers(&self) -> Option<HeaderMap> {
        self.steps.iter().find_map(|step| match step {
            Step::Trailers(trailers) => Some(trailers.clone()),
            _ => None,
        })
    }

    fn fails(&self) -> bool {
        let fails = |step: &Step| matches!(step, Step::Error);
        self.steps.iter().any(fails)
    }

    fn plan(&self) -> Plan {
        let total = self.data().len() as u64;
        let plan = Plan::new(self.steps.clone());
        let plan = if self.knows_its_end {
            plan.knowing_its_end()
        } else {
            plan
        };
        match self.size {
            Sized::Unknown => plan,
            Sized::AtLeast => plan.sized(total / 2, None),
            Sized::Exact => plan.sized(total, Some(total)),
        }
    }
}

fn course() -> impl Strategy<Value = Course> {
    let chunk = prop_oneof![
        1 => Just(Vec::new()),
        5 => prop::collection::vec(any::<u8>(), 1..20),
        1 => prop::collection::vec(any::<u8>(), 100..300),
    ];
    let step = prop_oneof![
        4 => chunk.prop_map(|chunk| Step::Data(chunk.into())),
        1 => Just(Step::Pending),
    ];
    let end = prop_oneof![
        3 => Just(None),
        2 => "[a-z]{1,9}".prop_map(|value| {
            let mut map = HeaderMap::new();
            map.insert("sum", value.parse().unwrap());
            map.append("sum", "2".parse().unwrap());
            Some(Step::Trailers(map))
        }),
        1 => Just(Some(Step::Error)),
    ];
    let size = prop_oneof![
        Just(Sized::Unknown),
        Just(Sized::AtLeast),
        Just(Sized::Exact),
    ];
    (prop::collection::vec(step, 0..12), end, any::<bool>(), size).prop_map(
        |(mut steps, end, knows_its_end, size)| {
            steps.extend(end);
            Course {
                steps,
                knows_its_end,
                size,
            }
        },
    )
}

/// What the model knows of the live body: it is read in order, once.
struct Model<'a> {
    course: &'a Course,
    cap: usize,
    memory: usize,
    /// Steps of the live body taken.
    taken: usize,
    kept: usize,
    charged: usize,
    chunks: usize,
    complete: bool,
    lost: Option<NotReplayable>,
}

impl Model<'_> {
    fn keep(&mut self, bytes: usize, extra: usize) {
        if self.lost.is_some() {
            return;
        }
        if self.kept + bytes > self.cap {
            self.lost = Some(NotReplayable::TooLarge);
        } else if self.charged + bytes + extra > self.memory {
            self.lost = Some(NotReplayable::NoMemory);
        } else {
            self.kept += bytes;
            self.charged += bytes + extra;
        }
        if self.lost.is_some() {
            self.charged = 0;
        }
    }

    /// What one more poll of the live body does.
    fn step(&mut self) {
        let step = self.course.steps.get(self.taken);
        self.taken += usize::from(step.is_some());
        match step {
            None => self.complete = true,
            Some(Step::Data(chunk)) if !chunk.is_empty() => {
                let extra = if self.chunks == 0 { 0 } else { Buffer::PLACE };
                self.chunks += 1;
                self.keep(chunk.len(), extra);
            }
            Some(Step::Trailers(trailers)) => {
                self.keep(buffer::size(trailers), 0);
                self.complete = true;
            }
            Some(Step::Error) => {
                self.lost.get_or_insert(NotReplayable::BodyFailed);
                self.charged = 0;
            }
            // An end that comes without a frame is found by the next poll.
            Some(Step::Pending) => return,
            Some(Step::Data(_) | Step::Panic) => {}
        }
        if self.course.knows_its_end && self.taken == self.course.steps.len() {
            self.complete = true;
        }
    }
}

/// Runs attempts that stop after so many polls; the last runs to its end.
fn run(
    course: &Course,
    stops: &[usize],
    cap: usize,
    max: usize,
    orphaned_at: Option<usize>,
) -> Result<(), TestCaseError> {
    let memory = Memory::new(max);
    let plan = course.plan();
    let watch = plan.watch();
    let hint = plan.size_hint();
    let empty = plan.is_end_stream();
    let (data, trailers, fails) = (course.data(), course.trailers(), course.fails());
    let mut replay = Some(Replay::new(plan, cap, &memory));
    let mut model = Model {
        course,
        cap: if hint.lower() > cap as u64 { 0 } else { cap },
        memory: max,
        taken: 0,
        kept: 0,
        charged: 0,
        chunks: 0,
        complete: empty,
        lost: None,
    };
    let mut held = Vec::new();
    for (number, stop) in stops.iter().copied().chain([ALL]).enumerate() {
        let Some(kept) = &mut replay else { break };
        prop_assert_eq!(kept.check().err(), model.lost);
        let mut body = match kept.attempt() {
            Ok(body) => body,
            Err(why) => {
                prop_assert_eq!(Some(why), model.lost);
                break;
            }
        };
        prop_assert_eq!(model.lost, None);
        let now = body.size_hint();
        prop_assert_eq!((now.lower(), now.upper()), (hint.lower(), hint.upper()));

        let mut seen = Read::default();
        let mut polls = 0;
        while polls < stop && !seen.ended && !seen.error {
            if orphaned_at == Some(polls) {
                replay = None;
            }
            polls += 1;
            let live = watch.polls();
            let at_end = body.is_end_stream();
            let one = read(&mut body, 1);
            // A body that says it has ended has.
            prop_assert!(!at_end || one.ended);
            seen.data.extend(one.data);
            seen.trailers = seen.trailers.or(one.trailers);
            seen.ended = one.ended;
            seen.error = one.error;
            match watch.polls() - live {
                0 => {}
                1 => model.step(),
                more => prop_assert!(false, "{more} polls of the live body in one"),
            }
            let left = hint
                .upper()
                .map(|upper| upper.saturating_sub(seen.data.len() as u64));
            prop_assert_eq!(body.size_hint().upper(), left);
            prop_assert!(memory.used() <= max);
            if replay.is_some() {
                prop_assert_eq!(memory.used(), model.charged);
            }
            if let (Some(replay), false) = (&replay, model.complete) {
                // Held: in its own way until it is lost.
                let why = model.lost.unwrap_or(NotReplayable::InUse);
                prop_assert_eq!(replay.check(), Err(why));
            }
        }
        prop_assert!(data.starts_with(&seen.data));
        if seen.ended {
            prop_assert!(!fails);
            prop_assert_eq!(&seen.data, &data);
            prop_assert_eq!(&seen.trailers, &trailers);
            prop_assert!(body.is_end_stream());
        } else if seen.error {
            prop_assert!(fails);
            prop_assert_eq!(&seen.data, &data);
        } else {
            prop_assert!(stop != ALL);
        }
        // What is at its end may be held by whoever likes.
        if model.complete && number % 2 == 0 {
            held.push(body);
        }
    }
    // Each step was taken once, however often it was sent.
    prop_assert!(watch.polls() <= course.steps.len() + 1);
    if model.complete || fails && model.taken == course.steps.len() {
        prop_assert!(watch.is_dropped());
    }
    drop(replay);
    // Those that have not ended may still replay it.
    held.clear();
    prop_assert_eq!(memory.used(), 0);
    prop_assert!(watch.is_dropped());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]

    #[test]
    fn every_attempt_sends_the_original(
        course in course(),
        stops in prop::collection::vec(prop_oneof![4 => 0_usize..16, 1 => Just(ALL)], 0..6),
        cap in prop_oneof![0_usize..200, Just(10_000)],
        max in prop_oneof![1 => 0_usize..400, 2 => Just(1 << 20)],
    ) {
        run(&course, &stops, cap, max, None)?;
    }

    #[test]
    fn nothing_leaks_wherever_the_retry_is_dropped(
        course in course(),
        stops in prop::collection::vec(0_usize..16, 0..4),
        cap in prop_oneof![0_usize..200, Just(10_000)],
        orphaned_at in 0_usize..16,
    ) {
        run(&course, &stops, cap, 1 << 20, Some(orphaned_at))?;
    }
}
