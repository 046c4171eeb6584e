use proptest::prelude::*;

use super::*;
use crate::{Backoff, Jitter};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const START: Instant = Instant::from_nanos(1 << 50);

fn fixed(delay: Duration) -> Settings {
    Settings::standard()
        .backoff(Backoff::fixed(delay))
        .max_attempts(100)
        .total_timeout(None)
}

fn session(settings: &Settings) -> Session {
    Session::new(settings.total_timeout.map(|total| START + total))
}

fn error(hint: Hint) -> Seen {
    Seen {
        cause: Cause::Error,
        hint,
    }
}

#[expect(clippy::unnecessary_wraps, reason = "as leave is given")]
fn always(_: Duration) -> Result<(), GiveUp> {
    Ok(())
}

fn highest() -> SharedRandom {
    SharedRandom::new(|| u64::MAX)
}

#[test]
fn there_are_as_many_attempts_as_were_asked_for() {
    for attempts in 1..6 {
        let settings = fixed(MS).max_attempts(attempts);
        let mut session = session(&settings);
        let next = |session: &mut Session| {
            session.next(&settings, error(Hint::None), START, &highest(), always)
        };
        for _ in 1..attempts {
            assert_eq!(next(&mut session), Ok(MS));
            session.begin();
        }
        assert_eq!(next(&mut session), Err(GiveUp::Attempts));
        assert_eq!(session.attempts(), attempts);
    }
}

#[test]
fn a_wait_that_ends_at_the_deadline_is_not_begun() {
    let settings = fixed(SECOND).total_timeout(3 * SECOND);
    let next = |now| {
        session(&settings).next(
            &settings,
            error(Hint::None),
            START + now,
            &highest(),
            always,
        )
    };
    assert_eq!(next(2 * SECOND - Duration::from_nanos(1)), Ok(SECOND));
    assert_eq!(next(2 * SECOND), Err(GiveUp::Deadline));
    assert_eq!(next(4 * SECOND), Err(GiveUp::Deadline));
}

#[test]
fn a_hint_is_never_early_and_stretched_only_where_there_is_jitter() {
    let jittered = Settings::standard()
        .backoff(Backoff::exponential(SECOND).jitter(Jitter::Full))
        .total_timeout(10 * SECOND);
    let plain = fixed(SECOND).total_timeout(10 * SECOND);
    let next = |settings: &Settings, hint| {
        session(settings).next(settings, error(hint), START, &highest(), always)
    };
    assert_eq!(next(&jittered, Hint::After(2 * SECOND)), Ok(3 * SECOND));
    assert_eq!(next(&plain, Hint::After(2 * SECOND)), Ok(2 * SECOND));
    // The backoff is the longer one.
    assert_eq!(next(&plain, Hint::After(Duration::ZERO)), Ok(SECOND));
    // The stretch is cut at the deadline, the hint is not.
    assert_eq!(next(&jittered, Hint::After(9500 * MS)), Ok(9500 * MS));
    assert_eq!(
        next(&jittered, Hint::After(10 * SECOND)),
        Err(GiveUp::Deadline)
    );
    let patient = jittered.clone().total_timeout(None);
    assert_eq!(next(&patient, Hint::After(300 * SECOND)), Ok(301 * SECOND));
    assert_eq!(
        next(&patient, Hint::After(300 * SECOND + MS)),
        Err(GiveUp::Pushback)
    );
    assert_eq!(next(&patient, Hint::Never), Err(GiveUp::Pushback));
}

/// Scenario 45.
#[test]
fn after_pushback_the_backoff_begins_anew() {
    let settings = Settings::standard()
        .backoff(Backoff::exponential(SECOND).jitter(Jitter::None))
        .total_timeout(None)
        .max_attempts(10);
    let mut session = session(&settings);
    let mut next = |hint| {
        session
            .next(&settings, error(hint), START, &highest(), always)
            .unwrap()
    };
    assert_eq!(next(Hint::None), SECOND);
    assert_eq!(next(Hint::None), 2 * SECOND);
    assert_eq!(next(Hint::At(5 * SECOND)), 5 * SECOND);
    assert_eq!(next(Hint::None), SECOND);
}

#[test]
fn a_refused_stream_is_repeated_once_for_free() {
    let settings = fixed(SECOND).max_attempts(2);
    let mut session = session(&settings);
    let refused = Seen::new(Cause::RefusedStream);
    let never = |_| -> Result<(), GiveUp> { panic!("it is free") };
    assert_eq!(
        session.next(&settings, refused, START, &highest(), never),
        Ok(Duration::ZERO)
    );
    session.begin();
    assert_eq!(session.attempts(), 1);
    assert_eq!(
        session.next(&settings, refused, START, &highest(), always),
        Ok(SECOND)
    );
    session.begin();
    assert_eq!(
        session.next(&settings, refused, START, &highest(), always),
        Err(GiveUp::Attempts)
    );
}

#[test]
fn the_budget_is_asked_last() {
    let settings = fixed(SECOND).max_attempts(2).total_timeout(2 * SECOND);
    let mut one = session(&settings);
    let seen = error(Hint::None);
    assert_eq!(
        one.next(&settings, seen, START, &highest(), |_| Err(GiveUp::Budget)),
        Err(GiveUp::Budget)
    );
    // What was refused was not begun.
    assert_eq!(one.attempts(), 1);
    let never = |_| -> Result<(), GiveUp> { panic!("it would have been in vain") };
    assert_eq!(
        one.next(&settings, seen, START + SECOND, &highest(), never),
        Err(GiveUp::Deadline)
    );
}

fn hint() -> impl Strategy<Value = Hint> {
    let wait = (0_u64..400_000).prop_map(Duration::from_millis);
    prop_oneof![
        3 => Just(Hint::None),
        2 => wait.clone().prop_map(Hint::After),
        1 => wait.prop_map(Hint::At),
        1 => Just(Hint::Never),
    ]
}

proptest! {
    /// Attempts that take as long as they like, hints of any kind: all waits
    /// end before the deadline, none is shorter than was asked for.
    #[test]
    fn the_sum_of_waits_never_passes_the_total(
        total in 1_u64..600_000,
        initial in 1_u64..60_000,
        steps in prop::collection::vec((0_u64..50_000, hint(), any::<u64>()), 1..60),
    ) {
        let settings = Settings::aggressive()
            .max_attempts(1000)
            .backoff(Backoff::exponential(Duration::from_millis(initial)))
            .total_timeout(Duration::from_millis(total));
        let mut session = session(&settings);
        let deadline = START + Duration::from_millis(total);
        let mut now = START;
        for (took, hint, draw) in steps {
            now = now + Duration::from_millis(took);
            let random = SharedRandom::new(move || draw);
            match session.next(&settings, error(hint), now, &random, always) {
                Ok(wait) => {
                    if let Hint::After(least) | Hint::At(least) = hint {
                        prop_assert!(wait >= least);
                    }
                    now = now + wait;
                    session.begin();
                    prop_assert!(now < deadline);
                }
                Err(GiveUp::Deadline) => {}
                Err(GiveUp::Pushback) => prop_assert!(hint != Hint::None),
                Err(other) => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
