//! `RUSTFLAGS="--cfg buttress_loom" cargo test -p buttress-retry --lib --release loom`

use buttress_core::{
    clock::Instant,
    sync::{Arc, model::model, thread},
};

use super::{adaptive::Ring, *};

const NOW: Instant = Instant::from_nanos(1 << 40);
const SECOND: u64 = 1_000_000_000;

fn withdraw(budget: &RetryBudget) -> usize {
    usize::from(budget.withdraw_at(|| NOW))
}

/// Runs it with what is shared in another thread.
fn beside<S: Send + Sync + 'static, T: 'static>(
    shared: &Arc<S>,
    f: impl FnOnce(&S) -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let shared = Arc::clone(shared);
    thread::spawn(move || f(&shared))
}

/// Three want the last two.
#[test]
fn what_is_saved_is_given_once() {
    model(|| {
        let budget = Arc::new(RetryBudget::new(100, 0).unwrap());
        budget.request();
        budget.request();
        let others = [beside(&budget, withdraw), beside(&budget, withdraw)];
        let mut given = withdraw(&budget);
        for other in others {
            given += other.join().unwrap();
        }
        assert_eq!(given, 2);
        assert_eq!(budget.saved(), 0);
    });
}

#[test]
fn the_minimum_is_given_once() {
    model(|| {
        let budget = Arc::new(RetryBudget::new(0, 2).unwrap());
        let others = [beside(&budget, withdraw), beside(&budget, withdraw)];
        let mut given = withdraw(&budget);
        for other in others {
            given += other.join().unwrap();
        }
        assert_eq!(given, 2);
        assert_eq!(withdraw(&budget), 0);
        // Half a second later there is one more.
        let later = Instant::from_nanos(NOW.as_nanos() + SECOND / 2);
        assert!(budget.withdraw_at(|| later));
        assert!(!budget.withdraw_at(|| later));
    });
}

/// Out of both buckets, while one of them fills.
#[test]
fn no_more_is_given_than_the_formula_says() {
    model(|| {
        let budget = Arc::new(RetryBudget::new(50, 1).unwrap());
        budget.request();
        let other = beside(&budget, |budget| {
            budget.request();
            withdraw(budget) + withdraw(budget)
        });
        let given = withdraw(&budget) + withdraw(&budget);
        let given = given + other.join().unwrap();
        // One of the minimum, one of two requests; which nobody may have seen
        // who asked too early.
        assert!((1..=2).contains(&given), "{given}");
        assert_eq!(given + withdraw(&budget), 2);
        assert_eq!(withdraw(&budget), 0);
    });
}

/// Several add at once to what is nearly full: what is above the bound is not
/// given.
#[test]
fn the_bound_holds_while_threads_add() {
    model(|| {
        let budget = Arc::new(RetryBudget::new(100, 0).unwrap().saving(1).unwrap());
        let others = [
            beside(&budget, Budget::request),
            beside(&budget, Budget::request),
        ];
        budget.request();
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(budget.saved(), 1);
        assert_eq!(withdraw(&budget), 1);
        assert_eq!(withdraw(&budget), 0);
    });
}

/// A request and a retry at once: the one does not undo the other.
#[test]
fn what_is_taken_while_a_request_adds_stays_taken() {
    model(|| {
        let budget = Arc::new(RetryBudget::new(100, 0).unwrap());
        budget.request();
        let others = [
            beside(&budget, Budget::request),
            beside(&budget, Budget::request),
        ];
        assert_eq!(withdraw(&budget), 1);
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(budget.saved(), 2);
    });
}

/// A withdrawal in the middle of them: one that was saved, and one for each
/// request after it.
#[test]
fn a_withdrawal_among_requests_takes_one() {
    model(|| {
        let budget = Arc::new(RetryBudget::new(100, 0).unwrap().saving(1).unwrap());
        budget.request();
        let other = beside(&budget, |budget| {
            budget.request();
            withdraw(budget)
        });
        let given = withdraw(&budget) + other.join().unwrap();
        assert!((1..=2).contains(&given), "{given}");
        let given = given + withdraw(&budget) + withdraw(&budget);
        assert!(given <= 2, "{given}");
    });
}

#[test]
fn no_outcome_is_lost() {
    model(|| {
        let throttle = Arc::new(Throttle::new(10, 100).unwrap());
        throttle.outcome(Verdict::Failure);
        let others = [Verdict::Failure, Verdict::Success]
            .map(|verdict| beside(&throttle, move |throttle| throttle.outcome(verdict)));
        throttle.outcome(Verdict::Failure);
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(throttle.tokens_thousandths(), 7100);
    });
}

#[test]
fn tokens_stay_within_their_bounds() {
    model(|| {
        let throttle = Arc::new(Throttle::new(1, 600).unwrap());
        let other = beside(&throttle, |throttle| {
            throttle.outcome(Verdict::Failure);
            throttle.outcome(Verdict::Success);
        });
        throttle.outcome(Verdict::Success);
        let seen = throttle.tokens_thousandths();
        other.join().unwrap();
        assert!(seen <= 1000);
        // Lost at the top, both kept, or one after the other was taken.
        let left = throttle.tokens_thousandths();
        assert!([600, 1000].contains(&left), "{left}");
    });
}

/// One counts in a span, one already in the next that has its place, and one
/// was held up there since the ring went round.
#[test]
fn a_span_that_is_over_does_not_count_in_another() {
    model(|| {
        let ring = Arc::new(Ring::new());
        ring.count(5);
        let others = [5, 21].map(|epoch| beside(&ring, move |ring| ring.count(epoch)));
        ring.count(21);
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(ring.sum(21), 2);
        assert_eq!(ring.sum(5), 0);
    });
}
