use std::{
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use buttress_core::{clock::Instant, testing::advance};
use proptest::prelude::*;

use super::{
    adaptive::{Chance, Ring},
    *,
};
use crate::ConfigError;

const SECOND: u64 = 1_000_000_000;
const START: u64 = 1 << 40;

fn withdraw(budget: &RetryBudget, nanos: u64) -> bool {
    budget.withdraw_at(|| Instant::from_nanos(nanos))
}

/// How many of so many are given.
fn given(budget: &RetryBudget, nanos: u64, wanted: usize) -> usize {
    (0..wanted).filter(|_| withdraw(budget, nanos)).count()
}

fn requests(budget: &impl Budget, count: usize) {
    for _ in 0..count {
        budget.request();
    }
}

mod percent {
    use super::*;

    #[test]
    fn a_total_outage_is_not_multiplied() {
        // All begin before the first has failed: of their 200 retries no more
        // are saved up than the bound.
        let budget = RetryBudget::new(20, 3).unwrap();
        let mut attempts = 0;
        requests(&budget, 1000);
        for _ in 0..1000 {
            let retries = (0..4).take_while(|_| withdraw(&budget, START));
            attempts += 1 + retries.count();
        }
        assert_eq!(attempts, 1000 + 100 + 3);

        // One after the other, in the same moment.
        let budget = RetryBudget::new(20, 3).unwrap();
        let mut attempts = 0;
        for _ in 0..1000 {
            budget.request();
            attempts += 1;
            attempts += (0..4).take_while(|_| withdraw(&budget, START)).count();
        }
        assert_eq!(attempts, 1000 + 200 + 3);

        // Over a second: the minimum of this second too.
        let budget = RetryBudget::new(20, 3).unwrap();
        let mut retries = 0;
        for request in 0..1000 {
            budget.request();
            let now = START + request * SECOND / 1000;
            retries += (0..4).take_while(|_| withdraw(&budget, now)).count();
        }
        assert_eq!(retries, 200 + 3 + 2);
    }

    #[test]
    fn a_percentage_is_exact() {
        for percent in [1, 7, 20, 33, 100, 250, 1000] {
            let budget = RetryBudget::new(percent, 0).unwrap();
            let mut retries = 0;
            for _ in 0..1000 {
                budget.request();
                retries += given(&budget, START, 100);
            }
            assert_eq!(retries, percent as usize * 10, "{percent} %");
        }
    }

    #[test]
    fn both_zero_means_never() {
        let budget = RetryBudget::new(0, 0).unwrap();
        requests(&budget, 10_000);
        assert_eq!(given(&budget, START + 3600 * SECOND, 10), 0);
    }

    #[test]
    fn the_minimum_comes_back_with_time_alone() {
        let budget = RetryBudget::new(0, 4).unwrap();
        assert_eq!(given(&budget, START, 10), 4);
        assert_eq!(given(&budget, START + SECOND / 4 - 1, 10), 0);
        assert_eq!(given(&budget, START + SECOND / 4, 10), 1);
        assert_eq!(given(&budget, START + SECOND, 10), 3);
    }

    #[test]
    fn an_interval_is_never_shorter_than_its_rate() {
        let budget = RetryBudget::new(0, 3).unwrap();
        assert_eq!(given(&budget, START, 10), 3);
        assert_eq!(given(&budget, START + SECOND / 3, 10), 0);
        assert_eq!(given(&budget, START + SECOND / 3 + 1, 10), 1);
        // Nor at the highest rates, where a nanosecond is the most.
        let budget = RetryBudget::new(0, 999_999).unwrap();
        assert_eq!(given(&budget, START, 2_000_000), 999_999);
        let half = given(&budget, START + SECOND / 2, 1_000_000);
        assert!((499_000..=499_999).contains(&half), "{half}");
    }

    #[test]
    fn an_idle_day_gives_no_more_than_a_second_of_the_minimum() {
        let budget = RetryBudget::new(0, 10).unwrap();
        let day = 24 * 3600 * SECOND;
        for days in 1..10 {
            assert_eq!(given(&budget, START + days * day, 1000), 10);
        }
    }

    #[test]
    fn what_is_saved_up_is_bounded() {
        let budget = RetryBudget::new(20, 0).unwrap();
        requests(&budget, 1_000_000);
        assert_eq!(budget.saved(), 100);
        assert_eq!(given(&budget, START, 1000), 100);
        // And is not there again until it was earned again.
        requests(&budget, 4);
        assert_eq!(given(&budget, START, 1000), 0);
        requests(&budget, 1);
        assert_eq!(given(&budget, START, 1000), 1);

        let frugal = RetryBudget::new(30, 0).unwrap().saving(1).unwrap();
        requests(&frugal, 1000);
        assert_eq!(given(&frugal, START, 1000), 1);
        // 1200 thousandths were there, of which 200 are not counted.
        requests(&frugal, 3);
        assert_eq!(given(&frugal, START, 1000), 0);
        requests(&frugal, 1);
        assert_eq!(given(&frugal, START, 1000), 1);
    }

    #[test]
    fn the_minimum_is_taken_first() {
        let budget = RetryBudget::new(100, 2).unwrap();
        requests(&budget, 5);
        assert_eq!(given(&budget, START, 2), 2);
        assert_eq!(budget.saved(), 5);
        assert_eq!(given(&budget, START, 10), 5);
    }

    #[test]
    fn each_retry_takes_from_one_bucket() {
        let budget = RetryBudget::new(100, 3).unwrap();
        requests(&budget, 4);
        assert_eq!(given(&budget, START, 100), 7);
    }

    #[test]
    fn a_clock_read_early_gives_nothing_twice() {
        let budget = RetryBudget::new(0, 5).unwrap();
        assert_eq!(given(&budget, START + SECOND, 10), 5);
        assert_eq!(given(&budget, START, 10), 0);
        assert_eq!(given(&budget, START + SECOND, 10), 0);
        // Nor does the end of time overflow.
        assert_eq!(given(&budget, u64::MAX, 3), 3);
    }

    #[test]
    fn the_clock_is_read_for_the_minimum_only() {
        let budget = RetryBudget::new(100, 0).unwrap();
        budget.request();
        assert!(budget.withdraw_at(|| unreachable!("no rule needs it")));
    }

    #[test]
    fn rates_are_changed_while_it_serves() {
        let budget = RetryBudget::new(100, 0).unwrap();
        requests(&budget, 2);
        budget.set(0, 1).unwrap();
        assert_eq!((budget.percent(), budget.min_per_second()), (0, 1));
        requests(&budget, 100);
        assert_eq!(given(&budget, START, 100), 1 + 2);
        assert!(budget.set(1001, 1).is_err());
        assert_eq!((budget.percent(), budget.min_per_second()), (0, 1));
        budget.set(50, 1_000_000).unwrap();
        assert_eq!(given(&budget, START + 2 * SECOND, 2_000_000), 1_000_000);
    }

    #[test]
    fn nonsense_is_refused() {
        let said = |made: Result<RetryBudget, ConfigError>| made.unwrap_err().to_string();
        assert_eq!(
            said(RetryBudget::new(1001, 0)),
            "a budget of more than 1000 percent"
        );
        assert_eq!(
            said(RetryBudget::new(0, 1_000_001)),
            "a budget of more than a million retries a second"
        );
        let saving = |percent, saved| RetryBudget::new(percent, 0).unwrap().saving(saved);
        assert_eq!(
            said(saving(1000, 9)),
            "a budget saves up less than one request brings"
        );
        assert!(saving(1, 0).is_err());
        assert!(saving(0, 0).is_ok());
        assert!(saving(1000, 10).is_ok());
        assert!(saving(1000, u32::MAX).is_ok());
    }

    #[test]
    fn the_default_is_finagles() {
        let budget = RetryBudget::default();
        assert_eq!((budget.percent(), budget.min_per_second()), (20, 10));
        let shown = format!("{:?}", SharedBudget::new(budget));
        assert_eq!(
            shown,
            "RetryBudget { percent: 20, min_per_second: 10, saved: 0, .. }"
        );
    }

    #[test]
    fn threads_do_not_get_more_than_there_is() {
        let budget = RetryBudget::new(20, 3).unwrap();
        let retries = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..250 {
                        budget.request();
                        retries.fetch_add(given(&budget, START, 4), Relaxed);
                    }
                });
            }
        });
        // Each asked as soon as there was something, so nothing is left over.
        assert_eq!(retries.load(Relaxed) + given(&budget, START, 1000), 203);
    }

    #[tokio::test(start_paused = true)]
    async fn the_clock_of_the_toolkit_rules_it() {
        let budget = Arc::new(RetryBudget::new(20, 2).unwrap());
        let shared = SharedBudget::new(Arc::clone(&budget));
        requests(&shared, 5);
        let other = shared.clone();
        assert!(other.withdraw() && shared.withdraw() && other.withdraw());
        assert!(!shared.withdraw() && !other.withdraw() && !budget.withdraw());
        advance(Duration::from_millis(499)).await;
        assert!(!shared.withdraw());
        advance(Duration::from_millis(1)).await;
        assert!(other.withdraw());
        assert!(!shared.withdraw());
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Pass(u64),
        Requests(u32),
        Wants(u32),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            prop_oneof![
                3 => 0..SECOND / 10,
                1 => 0..3 * SECOND,
                1 => Just(86_400 * SECOND),
            ]
            .prop_map(Step::Pass),
            (0_u32..30).prop_map(Step::Requests),
            (0_u32..30).prop_map(Step::Wants),
        ];
        prop::collection::vec(step, 0..120)
    }

    /// Two levels that are filled and emptied.
    #[derive(Debug)]
    struct Model {
        /// In nanoseconds: a retry is an interval of them.
        minimum: u64,
        thousandths: u64,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn it_is_two_buckets_and_never_more_than_its_formula(
            percent in prop_oneof![0_u32..=100, 0_u32..=1000],
            per_second in prop_oneof![Just(0_u32), 1_u32..20, 1_u32..=1_000_000],
            saved in prop_oneof![Just(100_u32), 10_u32..1000],
            start in prop_oneof![Just(0_u64), Just(START), Just(1 << 58)],
            steps in steps(),
        ) {
            let budget = RetryBudget::new(percent, per_second).unwrap().saving(saved).unwrap();
            let interval = SECOND.div_ceil(u64::from(per_second).max(1));
            let full = interval * u64::from(per_second);
            let bound = u64::from(saved) * 1000;
            let mut model = Model { minimum: full, thousandths: 0 };
            let mut now = start;
            // When, requests and retries so far.
            let mut history = vec![(now, 0_u64, 0_u64)];
            for step in steps {
                let (_, mut requested, mut retried) = history[history.len() - 1];
                match step {
                    Step::Pass(nanos) => {
                        now += nanos;
                        model.minimum = full.min(model.minimum.saturating_add(nanos));
                    }
                    Step::Requests(count) => {
                        for _ in 0..count {
                            budget.request();
                            if model.thousandths < bound {
                                model.thousandths += u64::from(percent) * 10;
                            }
                        }
                        requested += u64::from(count);
                    }
                    Step::Wants(count) => {
                        for _ in 0..count {
                            let expected = if per_second > 0 && model.minimum >= interval {
                                model.minimum -= interval;
                                true
                            } else if model.thousandths.min(bound) >= 1000 {
                                model.thousandths = model.thousandths.min(bound) - 1000;
                                true
                            } else {
                                false
                            };
                            prop_assert_eq!(withdraw(&budget, now), expected);
                            retried += u64::from(expected);
                        }
                    }
                }
                history.push((now, requested, retried));
            }
            // Over any time: all in billionths of a thousandth of a retry.
            for (from, &(began, requests_before, retries_before)) in history.iter().enumerate() {
                for &(ended, requests_after, retries_after) in &history[from..] {
                    let wide = u128::from;
                    let unit = wide(1000 * SECOND);
                    let retries = wide(retries_after - retries_before) * unit;
                    let of_requests = wide(requests_after - requests_before)
                        * wide(u64::from(percent) * 10) * wide(SECOND);
                    let of_time = wide(u64::from(per_second)) * 1000 * wide(ended - began + SECOND);
                    prop_assert!(retries <= of_requests + of_time + wide(saved.into()) * unit);
                }
            }
        }
    }
}

mod throttle {
    use super::*;

    const FAILED: Verdict = Verdict::Failure;
    const DONE: Verdict = Verdict::Success;

    fn after(throttle: &Throttle, verdict: Verdict, times: usize) -> bool {
        for _ in 0..times {
            throttle.outcome(verdict);
        }
        throttle.withdraw()
    }

    /// The example of gRFC A6: 10 tokens, ratio 0.1.
    #[test]
    fn four_failures_are_retried_and_the_fifth_is_not() {
        let throttle = Throttle::new(10, 100).unwrap();
        assert!(throttle.withdraw());
        for _ in 0..4 {
            assert!(after(&throttle, FAILED, 1));
        }
        assert!(!after(&throttle, FAILED, 1));
        // Ten successes are one token, which a failure takes.
        assert!(after(&throttle, DONE, 10));
        assert!(!after(&throttle, FAILED, 1));
        // Eleven leave a tenth above the half.
        assert!(after(&throttle, DONE, 11));
        assert!(after(&throttle, FAILED, 1));
        assert_eq!(throttle.tokens_thousandths(), 5100);
        assert!(!after(&throttle, FAILED, 1));
    }

    #[test]
    fn leave_costs_nothing_and_requests_are_nothing_to_it() {
        let throttle = Throttle::new(10, 100).unwrap();
        requests(&throttle, 1000);
        assert!((0..1000).all(|_| throttle.withdraw()));
        assert!(after(&throttle, Verdict::Ignored, 1000));
        assert_eq!(throttle.tokens_thousandths(), 10_000);
    }

    #[test]
    fn tokens_are_between_none_and_all() {
        let throttle = Throttle::new(3, 700).unwrap();
        assert!(!after(&throttle, FAILED, 100));
        assert_eq!(throttle.tokens_thousandths(), 0);
        // A half of three is 1.5: three times 0.7 is above, twice is not.
        assert!(!after(&throttle, DONE, 2));
        assert!(after(&throttle, DONE, 1));
        assert!(after(&throttle, DONE, 100));
        assert_eq!(throttle.tokens_thousandths(), 3000);
        // With one token, one failure is too much.
        assert!(!after(&Throttle::new(1, 1).unwrap(), FAILED, 1));
    }

    #[test]
    fn nonsense_is_refused() {
        for (tokens, ratio) in [(0, 100), (1001, 100), (10, 0), (10, 10_001)] {
            assert!(Throttle::new(tokens, ratio).is_err(), "{tokens} {ratio}");
        }
        for (tokens, ratio) in [(1, 1), (1000, 1), (10, 10_000)] {
            assert!(Throttle::new(tokens, ratio).is_ok(), "{tokens} {ratio}");
        }
    }

    proptest! {
        /// Against tokens that are fractions, with A6's own words for rules.
        #[test]
        fn it_counts_as_the_proposal_says(
            max in 1_u32..=1000,
            ratio in 1_u32..=1000,
            verdicts in prop::collection::vec(
                prop_oneof![Just(FAILED), Just(DONE), Just(Verdict::Ignored)],
                0..300,
            ),
        ) {
            let throttle = Throttle::new(max, ratio).unwrap();
            let mut tokens = f64::from(max);
            for verdict in verdicts {
                throttle.outcome(verdict);
                match verdict {
                    FAILED => tokens = (tokens - 1.0).max(0.0),
                    DONE => tokens = (tokens + f64::from(ratio) / 1000.0).min(max.into()),
                    Verdict::Ignored => {}
                }
                let left = tokens - f64::from(max) / 2.0;
                // Where the fractions are too inexact to tell, they do not.
                if left.abs() > 1e-6 {
                    prop_assert_eq!(throttle.withdraw(), left > 0.0);
                }
            }
        }
    }
}

mod adaptive {
    use super::*;

    const ALWAYS_REFUSED: fn() -> u64 = || 0;

    #[test]
    fn the_formula_is_the_books() {
        let chance = |requests, accepts| Chance::new(requests, accepts, 2000);
        assert_eq!(chance(100, 50).refused, 0);
        assert_eq!(chance(100, 80).refused, 0);
        let chance = chance(100, 10);
        assert_eq!((chance.refused, chance.of), (80_000, 101_000));
        // Of the draws below 80/101 of them all, and no others.
        let edge = u64::try_from((80_u128 << 64) / 101).unwrap();
        assert!(chance.refuses(0) && chance.refuses(edge));
        assert!(!chance.refuses(edge + 1) && !chance.refuses(u64::MAX));
        // Nothing is known yet.
        assert_eq!(Chance::new(0, 0, 2000).refused, 0);
        // Nor does it overflow.
        let most = Chance::new(11 << 32, 11 << 32, 1_000_000);
        assert_eq!(most.refused, 0);
        assert!(Chance::new(11 << 32, 0, 1_000_000).refuses(1 << 63));
    }

    #[test]
    fn so_many_are_refused() {
        let throttle = Adaptive::default();
        let now = Instant::from_nanos(START);
        let mut refused = 0;
        for _ in 0..1000 {
            // Of a hundred attempts ten succeed.
            let throttle = Adaptive::default();
            for attempt in 0..100 {
                throttle.request_at(now);
                let verdict = if attempt % 10 == 0 {
                    Verdict::Success
                } else {
                    Verdict::Failure
                };
                throttle.outcome_at(verdict, now);
            }
            refused += usize::from(!throttle.withdraw_at(now));
        }
        // 792, with a standard deviation of 13.
        assert!((720..860).contains(&refused), "{refused}");
        // And none while all is well, whatever is drawn.
        let throttle = throttle.random(ALWAYS_REFUSED);
        for _ in 0..100 {
            throttle.request_at(now);
            throttle.outcome_at(Verdict::Success, now);
            assert!(throttle.withdraw_at(now));
            throttle.outcome_at(Verdict::Failure, now);
        }
    }

    #[test]
    fn attempts_count_when_they_begin() {
        let throttle = Adaptive::default().random(ALWAYS_REFUSED);
        let now = Instant::from_nanos(START);
        // Ten that hang: none of them has ended.
        for _ in 0..10 {
            throttle.request_at(now);
        }
        assert_eq!(throttle.sums(now), (10, 0));
        assert!(!throttle.withdraw_at(now));
        assert_eq!(throttle.sums(now), (11, 0));
        // What is ignored in the end was none.
        throttle.outcome_at(Verdict::Ignored, now);
        assert_eq!(throttle.sums(now), (10, 0));
        throttle.outcome_at(Verdict::Failure, now);
        assert_eq!(throttle.sums(now), (10, 0));
        throttle.outcome_at(Verdict::Success, now);
        assert_eq!(throttle.sums(now), (10, 1));
    }

    #[test]
    fn it_forgets_after_the_window() {
        let throttle = Adaptive::default().random(ALWAYS_REFUSED);
        let at = |secs: u64| Instant::from_nanos(START / SECOND / 12 * 12 * SECOND + secs * SECOND);
        // A long healthy while weighs no more than the window holds of it.
        for second in 0..10_000 {
            throttle.request_at(at(second));
            throttle.outcome_at(Verdict::Success, at(second));
        }
        let failing = (0..1000).take_while(|second| throttle.withdraw_at(at(10_000 + second)));
        let failing = failing.count() as u64;
        assert!((50..=61).contains(&failing), "{failing}");
        let later = at(10_000 + failing + 120);
        assert_eq!(throttle.sums(later), (0, 0));
        assert!(throttle.withdraw_at(later));
    }

    #[test]
    fn who_comes_late_does_not_spoil_a_newer_span() {
        let ring = Ring::new();
        ring.count(100);
        ring.count(116);
        ring.count(100);
        ring.count(116);
        assert_eq!([ring.sum(116), ring.sum(100)], [2, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_clock_of_the_toolkit_rules_it() {
        let throttle = Adaptive::new(1000, Duration::from_secs(10)).unwrap();
        let throttle = Arc::new(throttle.random(ALWAYS_REFUSED));
        let shared = SharedBudget::new(Arc::clone(&throttle));
        shared.request();
        shared.outcome(Verdict::Failure);
        assert!((throttle.refusal_probability() - 0.5).abs() < 1e-9);
        assert!(!shared.withdraw());
        advance(Duration::from_secs(10)).await;
        assert!(throttle.refusal_probability() < 1e-9);
        assert!(shared.withdraw());
        shared.outcome(Verdict::Success);
        shared.outcome(Verdict::Success);
        assert!(shared.withdraw());
    }

    #[test]
    fn nonsense_is_refused() {
        let second = Duration::from_secs(1);
        for (multiplier, window) in [
            (999, second),
            (1_000_001, second),
            (2000, second / 2),
            (2000, second * 86_401),
            (2000, Duration::MAX),
        ] {
            assert!(Adaptive::new(multiplier, window).is_err());
        }
        assert!(Adaptive::new(1000, second).is_ok());
        assert!(Adaptive::new(1_000_000, second * 86_400).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn it_holds_what_was_lately(
            seconds in prop_oneof![1_u64..10, Just(120), Just(86_400)],
            start in prop_oneof![
                Just(0_u64),
                Just(START),
                Just(1 << 58),
                // Where the number of the span is cut off.
                Just((1 << 32) * (SECOND / 10) - SECOND / 5),
            ],
            // Thousandths of the window to pass before each.
            steps in prop::collection::vec(
                (prop_oneof![4 => 0_u64..50, 1 => 0_u64..3000], 0_u8..4),
                0..300,
            ),
        ) {
            let window = seconds * SECOND;
            let throttle = Adaptive::new(2000, Duration::from_nanos(window)).unwrap();
            let mut seen: Vec<(u64, u8)> = Vec::new();
            let mut now = start;
            for (step, what) in steps {
                now += step * (window / 1000);
                let at = Instant::from_nanos(now);
                match what {
                    0 => throttle.request_at(at),
                    1 => throttle.outcome_at(Verdict::Success, at),
                    2 => throttle.outcome_at(Verdict::Ignored, at),
                    _ => { throttle.withdraw_at(at); }
                }
                seen.push((now, what));
                let within = |nanos: u64, what: &[u8]| {
                    let lately = seen.iter().filter(|(at, _)| now - at < nanos);
                    lately.filter(|(_, kind)| what.contains(kind)).count() as u64
                };
                let (requests, accepts) = throttle.sums(at);
                // Nine tenths at least, the whole at most.
                let (least, most) = (window / 10 * 9, window);
                prop_assert!(within(least, &[1]) <= accepts && accepts <= within(most, &[1]));
                prop_assert!(requests <= within(most, &[0, 3]).saturating_sub(within(least, &[2])));
                prop_assert!(requests >= within(least, &[0, 3]).saturating_sub(within(most, &[2])));
            }
        }
    }
}

/// A budget of one's own, which counts what it is told.
#[derive(Debug, Default)]
struct Counting(AtomicU64);

impl Budget for Counting {
    fn request(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    fn withdraw(&self) -> bool {
        self.0.fetch_add(100, Relaxed) == 1
    }
}

#[test]
fn a_shared_budget_forwards() {
    let counting = Arc::new(Counting::default());
    let shared = SharedBudget::new(Arc::clone(&counting));
    shared.clone().request();
    assert!(shared.withdraw());
    assert!(!shared.clone().withdraw());
    // Not asked for: nothing happens.
    shared.outcome(Verdict::Failure);
    assert_eq!(counting.0.load(Relaxed), 201);
    assert!(format!("{:?}", SharedBudget::default()).starts_with("RetryBudget"));

    let throttle = Arc::new(Throttle::new(1, 1).unwrap());
    let shared = SharedBudget::new(SharedBudget::new(Arc::clone(&throttle)));
    shared.outcome(Verdict::Failure);
    assert_eq!(throttle.tokens_thousandths(), 0);
    assert!(!shared.withdraw());
}
