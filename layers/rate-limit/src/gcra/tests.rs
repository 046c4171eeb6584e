use std::num::NonZeroU32;

use governor::{RateLimiter, clock::FakeRelativeClock};
use num_rational::Ratio;
use proptest::prelude::*;

use super::*;
use crate::Quota;

const SECOND: u64 = 1_000_000_000;
const START: u64 = 1000 * SECOND;

fn gcra(limit: u32, period: Duration, burst: u32) -> Gcra {
    Quota::new(limit, period).burst(burst).check().unwrap()
}

/// One key under one quota.
struct Bucket {
    gcra: Gcra,
    tat: Tat,
}

impl Bucket {
    fn new(limit: u32, period_secs: u64) -> Self {
        Self {
            gcra: gcra(limit, Duration::from_secs(period_secs), limit),
            tat: Tat::default(),
        }
    }

    /// `Ok(remaining)`, or `Err(wait in ns)`; stores what is to be stored.
    fn take(&mut self, now: u64, cost: u32) -> Result<u32, u64> {
        match self.gcra.decide(self.tat, now, cost) {
            Ruling::Pass { tat } => {
                self.tat = tat;
                Ok(self.gcra.remaining(tat, now))
            }
            Ruling::Wait { wait, heal } => {
                self.tat = heal.unwrap_or(self.tat);
                Err(wait)
            }
            Ruling::Never => Err(u64::MAX),
        }
    }

    fn remaining(&self, now: u64) -> u32 {
        self.gcra.remaining(self.tat, now)
    }

    fn reset(&self, now: u64) -> u64 {
        self.gcra.until_full(self.tat, now)
    }
}

#[test]
fn five_in_ten_seconds_drained_at_once() {
    let mut bucket = Bucket::new(5, 10);
    for (left, reset) in [(4, 2), (3, 4), (2, 6), (1, 8), (0, 10)] {
        assert_eq!(bucket.take(START, 1), Ok(left));
        assert_eq!(bucket.reset(START), reset * SECOND);
    }
    assert_eq!(bucket.take(START, 1), Err(2 * SECOND));
    assert_eq!(bucket.reset(START), 10 * SECOND);
}

#[test]
fn five_in_five_seconds_comes_back_one_a_second() {
    let mut bucket = Bucket::new(5, 5);
    for _ in 0..5 {
        bucket.take(START, 1).unwrap();
    }
    for (millis, left, reset) in [
        (3000, 2, 3000),
        (3100, 1, 3900),
        (4000, 1, 4000),
        (8000, 4, 1000),
        (9500, 4, 1000),
    ] {
        let now = START + millis * 1_000_000;
        assert_eq!(bucket.take(now, 1), Ok(left));
        assert_eq!(bucket.reset(now), reset * 1_000_000);
    }
}

#[test]
fn after_two_idle_seconds_exactly_the_burst_passes() {
    let mut bucket = Bucket::new(5, 1);
    for now in [START, START + 2 * SECOND] {
        for _ in 0..5 {
            assert!(bucket.take(now, 1).is_ok());
        }
        assert_eq!(bucket.take(now, 1), Err(SECOND / 5));
    }
}

#[test]
fn denials_change_nothing() {
    let mut bucket = Bucket::new(10, 3600);
    for _ in 0..10 {
        bucket.take(START, 1).unwrap();
    }
    let before = bucket.tat;
    for _ in 0..100 {
        assert_eq!(bucket.take(START, 1), Err(360 * SECOND));
    }
    assert_eq!(bucket.tat, before);
    assert_eq!(bucket.reset(START), 3600 * SECOND);
}

#[test]
fn costs_are_charged_whole_or_not_at_all() {
    let mut bucket = Bucket::new(10, 1);
    assert_eq!(bucket.take(START, 8), Ok(2));
    assert_eq!(bucket.take(START, 5), Err(SECOND * 3 / 10));
    assert_eq!(bucket.remaining(START), 2);
    assert_eq!(bucket.take(START, 0), Ok(2));
    assert_eq!(bucket.gcra.decide(bucket.tat, START, 11), Ruling::Never);
    assert_eq!(
        bucket.gcra.decide(bucket.tat, START, u32::MAX),
        Ruling::Never
    );
}

#[test]
fn an_interval_of_a_third_of_a_second_is_exact() {
    let mut bucket = Bucket::new(3, 1);
    // Off every grid, and again after ten thousand seconds under load.
    for second in 0..10_000 {
        let now = START + 7 + second * SECOND;
        for left in [2, 1, 0] {
            assert_eq!(bucket.take(now, 1), Ok(left));
        }
        assert_eq!(bucket.take(now, 1), Err(333_333_334));
        assert_eq!(bucket.reset(now), SECOND);
    }
}

#[test]
fn arrival_101_at_1_under_four_a_second() {
    // A state far ahead, as a replaced quota leaves it: it is put right, and
    // the wait then holds.
    let mut bucket = Bucket::new(4, 1);
    bucket.tat = Tat::at(101 * SECOND);
    let now = SECOND;
    assert_eq!(bucket.take(now, 1), Err(250_000_000));
    assert_eq!(bucket.reset(now), SECOND);
    assert_eq!(bucket.take(now + 250_000_000, 1), Ok(0));
}

#[test]
fn more_comes_before_all() {
    let mut bucket = Bucket::new(10, 1);
    assert_eq!(bucket.gcra.until_more(bucket.tat, START), 0);
    bucket.take(START, 1).unwrap();
    assert_eq!(bucket.gcra.until_more(bucket.tat, START), SECOND / 10);
    bucket.take(START, 9).unwrap();
    assert_eq!(bucket.gcra.until_more(bucket.tat, START), SECOND / 10);
    assert_eq!(
        bucket.gcra.until_more(bucket.tat, START + 1),
        SECOND / 10 - 1
    );
}

#[test]
fn what_comes_back_by_itself_is_not_refunded() {
    let mut bucket = Bucket::new(10, 1);
    bucket.take(START, 3).unwrap();
    let half = bucket.gcra.refund(bucket.tat, START, 2);
    assert_eq!(bucket.gcra.remaining(half, START), 9);
    // 0.3 s later all is back; a refund then gives nothing.
    let later = START + SECOND;
    let whole = bucket.gcra.refund(bucket.tat, later, 3);
    assert_eq!(bucket.gcra.remaining(whole, later), 10);
    assert!(!whole.is_after(later));
}

#[test]
fn a_replaced_quota_keeps_what_was_spent() {
    let mut bucket = Bucket::new(100, 1);
    bucket.take(START, 60).unwrap();
    let left = |limit: u32| {
        let new = gcra(limit, Duration::from_secs(1), limit);
        new.remaining(new.convert(bucket.tat, &bucket.gcra, START), START)
    };
    assert_eq!(left(200), 140);
    assert_eq!(left(100), 40);
    assert_eq!(left(61), 1);
    assert_eq!(left(20), 0);
}

#[test]
fn nonsense_cannot_be_built() {
    let second = Duration::from_secs(1);
    let error = |quota: Quota| quota.check().unwrap_err();
    assert_eq!(error(Quota::per_second(0)), ConfigError::ZeroLimit);
    assert_eq!(error(Quota::per_second(1).burst(0)), ConfigError::ZeroBurst);
    assert_eq!(
        error(Quota::new(1, Duration::ZERO)),
        ConfigError::ZeroPeriod
    );
    assert_eq!(error(Quota::new(1, Duration::MAX)), ConfigError::TooSlow);
    assert_eq!(
        error(Quota::per_second(1).burst(u32::MAX)),
        ConfigError::TooSlow
    );
    assert_eq!(
        error(Quota::per_second(2_000_000_000)),
        ConfigError::TooFast
    );
    assert!(Quota::per_second(1_000_000_000).check().is_ok());
    assert!(
        Quota::new(1, second * 60 * 60 * 24 * 365 * 9)
            .check()
            .is_ok()
    );
}

type Rational = Ratio<i128>;

/// The textbook, with rational numbers.
struct Model {
    interval: Rational,
    burst: i128,
    tat: Rational,
}

impl Model {
    fn new(limit: u32, period: u64, burst: u32) -> Self {
        Self {
            interval: Rational::new(period.into(), limit.into()),
            burst: burst.into(),
            tat: Rational::from(0),
        }
    }

    fn take(&mut self, now: u64, cost: u32) -> Option<Result<(), Rational>> {
        let now = Rational::from(i128::from(now));
        let tolerance = self.interval * self.burst;
        let arrival = self.tat.max(now) + self.interval * i128::from(cost);
        if i128::from(cost) > self.burst {
            None
        } else if arrival - tolerance <= now {
            self.tat = arrival;
            Some(Ok(()))
        } else {
            Some(Err(arrival - tolerance - now))
        }
    }

    fn debt(&self, now: u64) -> Rational {
        (self.tat - Rational::from(i128::from(now))).max(Rational::from(0))
    }

    fn remaining(&self, now: u64) -> i128 {
        ((self.interval * self.burst - self.debt(now)) / self.interval)
            .floor()
            .to_integer()
    }
}

/// Limits, periods (ns) and bursts of every size, awkward ones included.
fn quotas() -> impl Strategy<Value = (u32, u64, u32)> {
    let limit = prop_oneof![
        1..=20_u32,
        Just(999_983), // a prime
        Just(1_000_000),
        1..=1_000_000_u32
    ];
    let period = prop_oneof![
        Just(SECOND),
        Just(60 * SECOND),
        Just(3600 * SECOND),
        1_000_000..=100 * SECOND
    ];
    (limit, period, prop_oneof![1..=10_u32, 1..=1000_u32])
}

/// Steps in nanoseconds, and costs.
fn schedule() -> impl Strategy<Value = Vec<(u64, u32)>> {
    let step = prop_oneof![
        3 => Just(0_u64),
        2 => 0..1000_u64,
        2 => 0..SECOND,
        1 => 0..100 * SECOND
    ];
    prop::collection::vec((step, prop_oneof![4 => Just(1_u32), 1 => 0..5_u32]), 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn it_is_the_model((limit, period, burst) in quotas(), schedule in schedule()) {
        let gcra = gcra(limit, Duration::from_nanos(period), burst);
        let mut bucket = Bucket { gcra, tat: Tat::default() };
        let mut model = Model::new(limit, period, burst);
        let mut now = START;
        for (step, cost) in schedule {
            now += step;
            let expected = match model.take(now, cost) {
                Some(Ok(())) => Ok(u32::try_from(model.remaining(now)).unwrap()),
                Some(Err(wait)) => Err(u64::try_from(wait.ceil().to_integer()).unwrap()),
                None => Err(u64::MAX),
            };
            prop_assert_eq!(bucket.take(now, cost), expected);
            prop_assert_eq!(i128::from(bucket.remaining(now)), model.remaining(now));
            let reset = model.debt(now).ceil().to_integer();
            prop_assert_eq!(i128::from(bucket.reset(now)), reset);
            prop_assert_eq!(Tat::unpack(bucket.tat.pack()), bucket.tat);

            // One more fits when `until_more` says so, and not before.
            let more = gcra.until_more(bucket.tat, now);
            let left = model.remaining(now);
            if left < i128::from(burst) {
                prop_assert!(model.remaining(now + more) > left);
                prop_assert!(more > 0 && model.remaining(now + more - 1) == left);
            }
        }
    }

    /// Any quota, those too fine to be exact included: the bound holds over
    /// every span, and a wait that was named lets in.
    #[test]
    fn never_above_burst_and_rate(
        limit in prop_oneof![1..=1_000_u32, 1..=u32::MAX],
        period in prop_oneof![Just(SECOND), 5 * SECOND..=1000 * SECOND],
        burst in 1..=20_u32,
        schedule in schedule(),
    ) {
        prop_assume!(u64::from(limit) <= period);
        let gcra = gcra(limit, Duration::from_nanos(period), burst);
        let mut bucket = Bucket { gcra, tat: Tat::default() };
        let mut passed: Vec<(u64, u64)> = Vec::new();
        let mut now = START;
        for (step, cost) in schedule {
            now += step;
            match bucket.take(now, cost) {
                Ok(_) => passed.push((now, cost.into())),
                Err(u64::MAX) => prop_assert!(cost > burst),
                Err(wait) => {
                    prop_assert!(wait > 0);
                    now += wait;
                    prop_assert!(bucket.take(now, cost).is_ok());
                    passed.push((now, cost.into()));
                }
            }
        }
        for (index, (from, _)) in passed.iter().enumerate() {
            let mut sum = 0_i128;
            for (to, cost) in &passed[index..] {
                sum += i128::from(*cost);
                let span = i128::from(to - from) * i128::from(limit);
                prop_assert!(
                    (sum - i128::from(burst)) * i128::from(period) <= span,
                    "{sum} from {from} to {to}"
                );
            }
        }
    }

    /// A clock that goes back admits no more than the same requests in order
    /// would have been admitted at the latest time seen.
    #[test]
    fn a_clock_that_goes_back_gives_nothing_away(
        (limit, period, burst) in quotas(),
        times in prop::collection::vec(0..10 * SECOND, 1..60),
    ) {
        let gcra = gcra(limit, Duration::from_nanos(period), burst);
        let mut bucket = Bucket { gcra, tat: Tat::default() };
        let mut passed = 0_i128;
        for time in &times {
            if gcra.decide(bucket.tat, START + time, 1) != Ruling::Never
                && let Ruling::Pass { tat } = gcra.decide(bucket.tat, START + time, 1)
            {
                // It never moves back.
                prop_assert!(tat > bucket.tat);
                bucket.tat = tat;
                passed += 1;
            }
        }
        let span = i128::from(*times.iter().max().unwrap());
        prop_assert!((passed - i128::from(burst)) * i128::from(period) <= span * i128::from(limit));
    }

    #[test]
    fn a_refund_undoes_a_charge(
        (limit, period, burst) in quotas(),
        schedule in schedule(),
    ) {
        let gcra = gcra(limit, Duration::from_nanos(period), burst);
        let mut tat = Tat::default();
        let mut now = START;
        for (step, cost) in schedule {
            now += step;
            if let Ruling::Pass { tat: charged } = gcra.decide(tat, now, cost) {
                let back = gcra.refund(charged, now, cost);
                prop_assert_eq!(gcra.until_full(back, now), gcra.until_full(tat, now));
                prop_assert_eq!(gcra.remaining(back, now), gcra.remaining(tat, now));
                tat = charged;
            }
        }
    }

    /// governor, where its whole nanoseconds are exact too.
    #[test]
    fn governor_agrees(
        per_second in prop::sample::select(vec![1_u32, 2, 4, 5, 8, 10, 100, 1000, 1_000_000]),
        burst in 1..=50_u32,
        steps in prop::collection::vec(prop_oneof![Just(0_u64), 0..SECOND, 0..3 * SECOND], 1..200),
    ) {
        let quota = governor::Quota::per_second(NonZeroU32::new(per_second).unwrap())
            .allow_burst(NonZeroU32::new(burst).unwrap());
        let clock = FakeRelativeClock::default();
        let oracle = RateLimiter::direct_with_clock(quota, clock.clone());
        let gcra = gcra(per_second, Duration::from_secs(1), burst);
        let mut bucket = Bucket { gcra, tat: Tat::default() };
        let mut now = START;
        for step in steps {
            now += step;
            clock.advance(Duration::from_nanos(step));
            prop_assert_eq!(bucket.take(now, 1).is_ok(), oracle.check().is_ok());
        }
    }

    #[test]
    fn a_new_quota_owes_the_same_count(
        (limit, period, burst) in quotas(),
        (new_limit, new_period, new_burst) in quotas(),
        cost in 1..1000_u32,
        after in 0..SECOND,
    ) {
        let old = gcra(limit, Duration::from_nanos(period), burst);
        let new = gcra(new_limit, Duration::from_nanos(new_period), new_burst);
        let Ruling::Pass { tat } = old.decide(Tat::default(), START, cost) else {
            return Ok(());
        };
        let now = START + after;
        let spent = burst - old.remaining(tat, now);
        let converted = new.convert(tat, &old, now);
        let spent_then = new_burst - new.remaining(converted, now);
        // Rounding a nanosecond up may cost a request where one takes less.
        let slack = new_limit / u32::try_from(new_period.min(u64::from(u32::MAX))).unwrap() + 1;
        prop_assert!(spent_then >= spent.min(new_burst));
        prop_assert!(spent_then <= (spent + slack).min(new_burst));
    }
}

/// Any quota that can be built, the ends of every range among them.
fn any_quota() -> impl Strategy<Value = Gcra> {
    let number = || prop_oneof![1..=9_u32, Just(1 << 20), 1..=u32::MAX, Just(u32::MAX)];
    let period = prop_oneof![1..=99_u64, Just(SECOND), 1..=1_u64 << 58, Just(1 << 58)];
    (number(), period, number()).prop_filter_map("cannot be built", |(limit, period, burst)| {
        let quota = Quota::new(limit, Duration::from_nanos(period));
        quota.burst(burst).check().ok()
    })
}

#[derive(Clone, Debug)]
enum Op {
    Decide { cost: u32 },
    Refund { cost: u32 },
    Convert { to: usize },
    Pass { nanos: u64 },
}

fn any_op() -> impl Strategy<Value = Op> {
    let cost = || prop_oneof![0..=9_u32, any::<u32>(), Just(u32::MAX)];
    prop_oneof![
        4 => cost().prop_map(|cost| Op::Decide { cost }),
        1 => cost().prop_map(|cost| Op::Refund { cost }),
        1 => (0..3_usize).prop_map(|to| Op::Convert { to }),
        2 => prop_oneof![0..=99_u64, 1..=1_u64 << 50].prop_map(|nanos| Op::Pass { nanos }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Several quotas take turns at one state, as a closure's may: nothing
    /// overflows, what is stored can be stored, and what is promised is kept.
    #[test]
    fn one_state_under_several_quotas(
        quotas in prop::collection::vec(any_quota(), 3),
        ops in prop::collection::vec((0..3_usize, any_op()), 1..60),
        // A process's first moment, and one of a paused clock.
        start in prop_oneof![Just(1_u64 << 40), Just(1_u64 << 58)],
    ) {
        let (mut tat, mut now) = (Tat::default(), start);
        for (which, op) in ops {
            let gcra = &quotas[which];
            match op {
                Op::Decide { cost } => match gcra.decide(tat, now, cost) {
                    Ruling::Pass { tat: arrival } => {
                        prop_assert!(cost == 0 || arrival.nanos_up() >= tat.nanos_up());
                        prop_assert!(cost <= gcra.burst());
                        if cost > 0 {
                            tat = arrival;
                        }
                    }
                    Ruling::Wait { wait, heal } => {
                        tat = heal.unwrap_or(tat);
                        let passes = |now| matches!(
                            gcra.decide(tat, now, cost),
                            Ruling::Pass { .. }
                        );
                        prop_assert!(passes(now + wait));
                        prop_assert!(!passes(now + wait - 1));
                    }
                    Ruling::Never => prop_assert!(cost > gcra.burst()),
                },
                Op::Refund { cost } => {
                    let back = gcra.refund(tat, now, cost);
                    prop_assert!(gcra.until_full(back, now) <= gcra.until_full(tat, now));
                    tat = back;
                }
                Op::Convert { to } => {
                    tat = quotas[to].convert(tat, gcra, now);
                    prop_assert!(quotas[to].until_full(tat, now) <= quotas[to].window());
                }
                Op::Pass { nanos } => now += nanos,
            }
            prop_assert_eq!(Tat::unpack(tat.pack()), tat);
            for gcra in &quotas {
                let (remaining, full) = (gcra.remaining(tat, now), gcra.until_full(tat, now));
                let more = gcra.until_more(tat, now);
                prop_assert!(remaining <= gcra.burst() && more <= full);
                prop_assert!(remaining == gcra.burst() || gcra.remaining(tat, now + more) > remaining);
            }
        }
    }
}
