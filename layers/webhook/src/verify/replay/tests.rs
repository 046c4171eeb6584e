use std::collections::HashMap;

use buttress_core::{
    clock::{self, Instant},
    sync::Mutex,
};
use proptest::prelude::*;

use super::*;
use crate::testing::check_replay_store;

const KEEP: Duration = Duration::from_secs(601);

fn key(key: usize) -> ClaimKey {
    ClaimKey::new(format!("id:{key}"))
}

fn at(seconds: u64) -> Instant {
    Instant::from_nanos((1000 + seconds) * 1_000_000_000)
}

fn granted(claim: Claim) -> ClaimToken {
    match claim {
        Claim::New(token) => token,
        other => panic!("{other:?}"),
    }
}

/// The memory in the clothes of a store.
struct Here(Mutex<Memory>);

impl ReplayStore for Here {
    fn claim<'a>(&'a self, key: &'a ClaimKey, keep: Duration) -> StoreFuture<'a, Claim> {
        Box::pin(async move { Ok(self.0.lock().claim(key, clock::now(), keep)) })
    }

    fn complete<'a>(
        &'a self,
        _: &'a ClaimKey,
        token: ClaimToken,
        _: Duration,
    ) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            self.0.lock().complete(token, clock::now());
            Ok(())
        })
    }

    fn release<'a>(&'a self, _: &'a ClaimKey, token: ClaimToken) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            self.0.lock().release(token);
            Ok(())
        })
    }
}

#[tokio::test(start_paused = true)]
async fn the_memory_does_what_every_store_must() {
    let memory = Here(Mutex::new(Memory::new(100)));
    check_replay_store(memory, "test ", tokio::time::advance).await;
}

#[test]
fn what_counts_is_kept_when_it_is_full() {
    let mut memory = Memory::new(3);
    for n in 0..3 {
        let token = granted(memory.claim(&key(n), at(0), KEEP));
        memory.complete(token, at(n as u64));
    }
    let full = |seconds| Claim::Full {
        retry_after: Some(Duration::from_secs(seconds)),
    };
    assert_eq!(memory.claim(&key(3), at(10), KEEP), full(591));
    assert_eq!(memory.claim(&key(3), at(600), KEEP), full(1));
    assert_eq!(memory.claim(&key(0), at(600), KEEP), Claim::Completed);
    // A second later the first has gone, and one has room.
    granted(memory.claim(&key(3), at(601), KEEP));
    assert_eq!(memory.claim(&key(4), at(601), KEEP), full(1));
    assert_eq!(memory.claim(&key(1), at(601), KEEP), Claim::Completed);
    assert_eq!(memory.claim(&key(2), at(601), KEEP), Claim::Completed);
}

#[test]
fn who_is_in_progress_makes_no_room() {
    let mut memory = Memory::new(2);
    let first = granted(memory.claim(&key(0), at(0), KEEP));
    granted(memory.claim(&key(1), at(0), KEEP));
    let full = Claim::Full { retry_after: None };
    assert_eq!(memory.claim(&key(2), at(1_000_000), KEEP), full);
    assert_eq!(
        memory.claim(&key(0), at(1_000_000), KEEP),
        Claim::InProgress
    );
    memory.release(first);
    granted(memory.claim(&key(2), at(1_000_000), KEEP));
}

#[test]
fn another_tolerance_counts_for_all() {
    let mut memory = Memory::new(10);
    let token = granted(memory.claim(&key(0), at(0), KEEP));
    memory.complete(token, at(0));
    assert_eq!(memory.claim(&key(0), at(700), KEEP * 2), Claim::Completed);
    granted(memory.claim(&key(0), at(700), KEEP));
}

/// None of them is looked through as a whole, and none pile up.
#[test]
fn long_after_a_flood_it_is_empty() {
    let mut memory = Memory::new(20_000);
    for n in 0..20_000 {
        let token = granted(memory.claim(&key(n), at(0), KEEP));
        memory.complete(token, at(0));
    }
    let mut sizes = Vec::new();
    for n in 0..4_000 {
        let token = granted(memory.claim(&key(100_000 + n), at(700), KEEP));
        memory.complete(token, at(700));
        sizes.push(memory.len());
    }
    assert!(
        sizes
            .windows(2)
            .all(|two| two[0] - 7 == two[1] || two[1] == two[0] + 1)
    );
    assert_eq!(memory.len(), 4_000);
}

#[derive(Clone, Debug)]
enum Step {
    Claim(usize),
    Complete(usize),
    Release(usize),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0..12_usize).prop_map(Step::Claim),
        4 => any::<usize>().prop_map(Step::Complete),
        2 => any::<usize>().prop_map(Step::Release),
        3 => (1..300_u64).prop_map(Step::Pass),
    ]
}

/// What is told of a key in a plain map.
#[derive(Clone, Copy)]
enum Told {
    InProgress(usize),
    Completed(u64),
}

proptest! {
    #[test]
    fn it_is_a_bounded_map(
        most in 1..8_usize,
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let keep = 601;
        let mut memory = Memory::new(most);
        let mut model: HashMap<usize, Told> = HashMap::new();
        // All tokens ever, so that late ones are tried, too.
        let mut tokens: Vec<(usize, ClaimToken)> = Vec::new();
        let mut now = 0;
        for step in steps {
            model.retain(|_, told| !matches!(told, Told::Completed(done) if *done + keep <= now));
            match step {
                Step::Pass(seconds) => now += seconds,
                Step::Claim(n) => {
                    let claim = memory.claim(&key(n), at(now), KEEP);
                    match model.get(&n) {
                        Some(Told::InProgress(_)) => prop_assert_eq!(claim, Claim::InProgress),
                        Some(Told::Completed(_)) => prop_assert_eq!(claim, Claim::Completed),
                        None if model.len() == most => {
                            let first = model.values().filter_map(|told| match told {
                                Told::Completed(done) => Some(done + keep - now),
                                Told::InProgress(_) => None,
                            });
                            let retry_after = first.min().map(Duration::from_secs);
                            prop_assert_eq!(claim, Claim::Full { retry_after });
                        }
                        None => {
                            let token = granted(claim);
                            let known = tokens.iter().any(|(_, other)| *other == token);
                            prop_assert!(!known, "a token twice");
                            model.insert(n, Told::InProgress(tokens.len()));
                            tokens.push((n, token));
                        }
                    }
                }
                Step::Complete(which) | Step::Release(which) if !tokens.is_empty() => {
                    let which = which % tokens.len();
                    let (n, token) = tokens[which];
                    let current = matches!(
                        model.get(&n),
                        Some(Told::InProgress(current)) if *current == which
                    );
                    if matches!(step, Step::Complete(_)) {
                        memory.complete(token, at(now));
                        if current {
                            model.insert(n, Told::Completed(now));
                        }
                    } else {
                        memory.release(token);
                        if current {
                            model.remove(&n);
                        }
                    }
                }
                Step::Complete(_) | Step::Release(_) => {}
            }
            prop_assert!(memory.len() <= most);
        }
    }
}
