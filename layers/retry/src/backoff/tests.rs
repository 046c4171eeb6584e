use std::{
    mem::size_of,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Splitmix64: the same sequence for the same seed.
fn seeded(seed: u64) -> SharedRandom {
    let state = AtomicU64::new(seed);
    SharedRandom::new(move || {
        let mut z = state.fetch_add(0x9E37_79B9_7F4A_7C15, Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

fn always(draw: u64) -> SharedRandom {
    SharedRandom::new(move || draw)
}

fn waits<const N: usize>(backoff: &Backoff, random: &SharedRandom) -> [Duration; N] {
    let mut delays = backoff.delays();
    [(); N].map(|()| delays.next(backoff, random))
}

/// The session after so many retries.
fn after(backoff: &Backoff, retries: u32) -> Delays {
    let mut delays = backoff.delays();
    delays.retries = retries;
    delays
}

#[test]
fn without_jitter_the_sequence_is_exact() {
    let random = seeded(1);
    assert_eq!(
        waits::<3>(&Backoff::fixed(1500 * MS), &random),
        [1500 * MS; 3]
    );
    assert_eq!(
        waits::<3>(&Backoff::fixed(Duration::ZERO), &random),
        [Duration::ZERO; 3]
    );
    assert_eq!(
        waits::<4>(&Backoff::linear(250 * MS).max(700 * MS), &random),
        [250 * MS, 500 * MS, 700 * MS, 700 * MS]
    );
    let doubling = Backoff::exponential(100 * MS).jitter(Jitter::None);
    assert_eq!(
        waits::<10>(&doubling, &random).map(|wait| wait.as_millis()),
        [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 20_000, 20_000]
    );
    let gentle = doubling.factor(1.5);
    assert_eq!(
        waits::<4>(&gentle, &random).map(|wait| wait.as_micros()),
        [100_000, 150_000, 225_000, 337_500]
    );
    let own = Backoff::custom(|n| SECOND / n).max(400 * MS);
    assert_eq!(
        waits::<4>(&own, &random),
        [400 * MS, 400 * MS, SECOND / 3, 250 * MS]
    );
}

#[test]
fn it_is_as_fine_as_a_nanosecond() {
    let odd = Duration::new(1, 1);
    let backoff = Backoff::exponential(odd).jitter(Jitter::None);
    assert_eq!(
        waits::<3>(&backoff, &seeded(1)),
        [odd, Duration::new(2, 2), Duration::new(4, 4)]
    );
    // The smallest there is doubles too.
    let nano = Backoff::exponential(Duration::from_nanos(1)).jitter(Jitter::None);
    assert_eq!(nano.without_jitter(31), Duration::from_nanos(1 << 30));
    // To the nearest: 1.5, 2.25 and 3.375.
    let gentle = nano.factor(1.5);
    assert_eq!(
        waits::<4>(&gentle, &seeded(1)).map(|wait| wait.as_nanos()),
        [1, 2, 2, 3]
    );
    // What a float cannot hold does not get shorter by that.
    let long = Duration::from_nanos((1 << 53) + 1);
    let constant = Backoff::exponential(long)
        .max(Duration::MAX)
        .factor(1.0)
        .jitter(Jitter::None);
    assert_eq!(waits::<3>(&constant, &seeded(1)), [long; 3]);
    // Drawn waits fall between whole seconds and between milliseconds.
    let full = Backoff::fixed(SECOND).jitter(Jitter::Full);
    let drawn = waits::<100>(&full, &seeded(2));
    let fine = |wait: &&Duration| !wait.subsec_nanos().is_multiple_of(1000);
    assert!(drawn.iter().filter(fine).count() > 90);
    let equal = Backoff::fixed(SECOND).jitter(Jitter::Equal);
    assert!(waits::<100>(&equal, &seeded(2)).iter().filter(fine).count() > 90);
}

#[test]
fn the_ends_of_each_jitter_are_reached() {
    let (low, high) = (always(0), always(u64::MAX));
    let backoff = Backoff::exponential(100 * MS).max(SECOND);
    assert_eq!(waits::<2>(&backoff, &low), [Duration::ZERO; 2]);
    assert_eq!(waits::<2>(&backoff, &high), [100 * MS, 200 * MS]);
    let equal = backoff.clone().jitter(Jitter::Equal);
    assert_eq!(waits::<2>(&equal, &low), [50 * MS, 100 * MS]);
    assert_eq!(waits::<2>(&equal, &high), [100 * MS, 200 * MS]);
    let odd = Backoff::fixed(Duration::from_nanos(3)).jitter(Jitter::Equal);
    assert_eq!(waits::<1>(&odd, &low), [Duration::from_nanos(1)]);
    assert_eq!(waits::<1>(&odd, &high), [Duration::from_nanos(3)]);
    let decorrelated = backoff.jitter(Jitter::Decorrelated);
    assert_eq!(waits::<3>(&decorrelated, &low), [100 * MS; 3]);
    assert_eq!(
        waits::<4>(&decorrelated, &high),
        [300 * MS, 900 * MS, SECOND, SECOND]
    );
}

/// The wait as a part of the range from `from` to `to`, over many draws: each
/// tenth of the range is drawn as often as the others.
fn assert_uniform(from: Duration, to: Duration, mut draw: impl FnMut() -> Duration) {
    const DRAWS: u32 = 20_000;
    let mut tenths = [0_u32; 10];
    for _ in 0..DRAWS {
        let wait = draw();
        assert!(from <= wait && wait <= to, "{wait:?}");
        let part = (wait - from).as_secs_f64() / (to - from).as_secs_f64();
        tenths[((part * 10.0) as usize).min(9)] += 1;
    }
    // 2000 each, with a standard deviation of 42.
    for count in tenths {
        assert!(count.abs_diff(DRAWS / 10) < 200, "{tenths:?}");
    }
}

#[test]
fn each_jitter_is_uniform_over_its_range() {
    let random = seeded(3);
    for retries in [0, 2, 50] {
        let backoff = Backoff::exponential(1500 * MS).max(10 * SECOND);
        let c = backoff.without_jitter(retries + 1);
        assert_uniform(Duration::ZERO, c, || {
            after(&backoff, retries).next(&backoff, &random)
        });
        let equal = backoff.jitter(Jitter::Equal);
        assert_uniform(c / 2, c, || after(&equal, retries).next(&equal, &random));
    }
    let backoff = Backoff::fixed(SECOND)
        .max(60 * SECOND)
        .jitter(Jitter::Decorrelated);
    assert_uniform(SECOND, 3 * SECOND, || {
        backoff.delays().next(&backoff, &random)
    });
    let mut later = backoff.delays();
    assert_uniform(SECOND, 15 * SECOND, || {
        later.previous = Some(5 * SECOND);
        later.next(&backoff, &random)
    });
}

#[test]
fn the_cap_comes_before_the_jitter() {
    // Far above the cap, as many waits lie in its lower half as ever: were the
    // jitter capped instead, nearly all of them would lie on it.
    let backoff = Backoff::exponential(SECOND).max(10 * SECOND);
    let random = seeded(4);
    let short = |_: &u32| after(&backoff, 20).next(&backoff, &random) < 5 * SECOND;
    let count = (0..1000).filter(short).count();
    assert!((400..600).contains(&count), "{count}");
}

/// Envoy's waits with its base of 25 ms: 0 to 24, 0 to 74, 0 to 174 ms, and at
/// most ten times the base. Its range of the n-th retry is (2ⁿ − 1) · 25 ms.
#[test]
fn envoys_backoff_can_be_said() {
    let envoy = Backoff::custom(|n| (25 * MS).saturating_mul(2_u32.saturating_pow(n) - 1))
        .max(250 * MS)
        .jitter(Jitter::Full);
    let longest = waits::<6>(&envoy, &always(u64::MAX)).map(|wait| wait.as_millis());
    assert_eq!(longest, [25, 75, 175, 250, 250, 250]);
    let random = seeded(5);
    for _ in 0..1000 {
        let drawn = waits::<4>(&envoy, &random);
        let bounds = [25, 75, 175, 250].map(Duration::from_millis);
        assert!(drawn.iter().zip(bounds).all(|(wait, bound)| *wait <= bound));
    }
    // Ours stay within them, one retry later.
    let ours = Backoff::exponential(25 * MS).max(250 * MS);
    let longest = waits::<6>(&ours, &always(u64::MAX)).map(|wait| wait.as_millis());
    assert_eq!(longest, [25, 50, 100, 200, 250, 250]);
}

#[test]
fn no_two_sessions_draw_the_same() {
    let backoff = Backoff::exponential(SECOND);
    let random = seeded(6);
    let first = waits::<5>(&backoff, &random);
    assert_ne!(waits::<5>(&backoff, &random), first);
    assert_ne!(waits::<5>(&backoff.clone(), &random.clone()), first);
    // Two that take turns at one generator draw apart as well.
    let (mut one, mut two) = (backoff.delays(), backoff.delays());
    let turns = [(); 5].map(|()| (one.next(&backoff, &random), two.next(&backoff, &random)));
    assert!(turns.iter().all(|(one, two)| one != two));
}

#[test]
fn nothing_overflows_however_often_it_is_tried() {
    let extremes = [Duration::from_nanos(1), SECOND, Duration::MAX];
    for initial in extremes {
        for backoff in [
            Backoff::fixed(initial),
            Backoff::linear(initial),
            Backoff::exponential(initial).max(Duration::MAX),
            Backoff::exponential(initial)
                .max(Duration::MAX)
                .factor(f64::MAX),
            Backoff::custom(move |n| initial.saturating_mul(n)),
        ] {
            for jitter in [
                Jitter::None,
                Jitter::Full,
                Jitter::Equal,
                Jitter::Decorrelated,
            ] {
                for draw in [0, u64::MAX] {
                    let backoff = backoff.clone().jitter(jitter);
                    for retries in [0, 1, 62, 1000, u32::MAX - 1, u32::MAX] {
                        let mut delays = after(&backoff, retries);
                        delays.next(&backoff, &always(draw));
                        delays.previous = Some(Duration::MAX);
                        delays.next(&backoff, &always(draw));
                    }
                }
            }
        }
    }
    let doubling = Backoff::exponential(SECOND).jitter(Jitter::None);
    for retry in [1000, 1025, u32::MAX] {
        assert_eq!(doubling.without_jitter(retry), 20 * SECOND);
        let uncapped = doubling.clone().max(Duration::MAX);
        assert_eq!(uncapped.without_jitter(retry), Duration::MAX);
    }
}

#[test]
fn a_restart_begins_with_the_first_wait() {
    let backoff = Backoff::exponential(SECOND)
        .max(9 * SECOND)
        .jitter(Jitter::Decorrelated);
    let mut delays = backoff.delays();
    let high = always(u64::MAX);
    assert_eq!(delays.next(&backoff, &high), 3 * SECOND);
    assert_eq!(delays.next(&backoff, &high), 9 * SECOND);
    delays.restart();
    assert_eq!(delays.next(&backoff, &high), 3 * SECOND);
    let doubling = backoff.jitter(Jitter::None);
    let mut delays = doubling.delays();
    delays.next(&doubling, &high);
    delays.next(&doubling, &high);
    delays.restart();
    assert_eq!(delays.next(&doubling, &high), SECOND);
}

#[test]
fn a_session_is_small() {
    assert!(size_of::<Delays>() <= 24);
}

#[test]
fn nonsense_is_refused() {
    let zero = Duration::ZERO;
    let refused = |backoff: Backoff| backoff.check().unwrap_err().to_string();
    for factor in [0.0, 0.999, -2.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let backoff = Backoff::exponential(SECOND).factor(factor);
        assert_eq!(
            refused(backoff),
            "the factor of a backoff is no finite number from 1 on"
        );
    }
    let growing = "a backoff that grows begins at zero";
    assert_eq!(refused(Backoff::exponential(zero)), growing);
    assert_eq!(refused(Backoff::linear(zero)), growing);
    let above = "the initial wait of a backoff is above its cap";
    assert_eq!(refused(Backoff::exponential(21 * SECOND)), above);
    assert_eq!(refused(Backoff::fixed(SECOND).max(zero)), above);
    let endless = Backoff::fixed(SECOND).jitter(Jitter::Decorrelated);
    assert_eq!(
        refused(endless),
        "decorrelated jitter grows for ever without a cap"
    );
    for fine in [
        Backoff::fixed(zero),
        Backoff::fixed(zero).max(zero),
        Backoff::linear(SECOND),
        Backoff::exponential(20 * SECOND).factor(1.0),
        Backoff::exponential(SECOND).jitter(Jitter::Decorrelated),
        Backoff::custom(|_| Duration::ZERO),
    ] {
        assert!(fine.check().is_ok(), "{fine:?}");
    }
}

fn durations() -> impl Strategy<Value = Duration> {
    prop_oneof![
        (0_u64..5_000_000_000).prop_map(Duration::from_nanos),
        (0_u64..100_000).prop_map(Duration::from_millis),
        (any::<u64>(), 0_u32..1_000_000_000).prop_map(|(secs, nanos)| Duration::new(secs, nanos)),
        Just(Duration::ZERO),
        Just(Duration::MAX),
    ]
}

fn backoffs() -> impl Strategy<Value = Backoff> {
    let factor = prop_oneof![
        1.0..4.0,
        Just(1.0),
        Just(f64::MAX),
        // Also what a check would refuse: there may not have been one.
        any::<f64>(),
    ];
    let jitter = prop_oneof![
        Just(Jitter::None),
        Just(Jitter::Full),
        Just(Jitter::Equal),
        Just(Jitter::Decorrelated),
    ];
    let max = prop_oneof![durations(), Just(Duration::MAX)];
    (0..4, durations(), factor, max, jitter).prop_map(|(kind, initial, factor, max, jitter)| {
        let backoff = match kind {
            0 => Backoff::fixed(initial),
            1 => Backoff::linear(initial),
            2 => Backoff::exponential(initial),
            _ => Backoff::custom(move |n| initial.saturating_mul(n % 7)),
        };
        backoff.factor(factor).max(max).jitter(jitter)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn each_wait_is_within_its_bounds(
        backoff in backoffs(),
        start in prop_oneof![0_u32..10, 900_u32..1100, u32::MAX - 5..=u32::MAX],
        seed: u64,
    ) {
        let random = seeded(seed);
        let mut delays = after(&backoff, start);
        for _ in 0..20 {
            let previous = delays.previous;
            let wait = delays.next(&backoff, &random);
            prop_assert!(wait <= backoff.longest());
            let c = backoff.without_jitter(delays.retries);
            match backoff.jitter {
                Jitter::None => prop_assert_eq!(wait, c),
                Jitter::Full => prop_assert!(wait <= c),
                Jitter::Equal => prop_assert!(c / 2 <= wait && wait <= c),
                Jitter::Decorrelated => {
                    let base = backoff.without_jitter(1);
                    let longest = previous.unwrap_or(base).saturating_mul(3);
                    prop_assert!(base <= wait && wait <= longest.max(base));
                }
            }
        }
    }

    #[test]
    fn it_never_gets_shorter_by_itself(initial in durations(), factor in 1.0..5.0_f64, max in durations()) {
        for backoff in [Backoff::exponential(initial).factor(factor), Backoff::linear(initial)] {
            let backoff = backoff.max(max);
            let mut last = Duration::ZERO;
            for retry in (1..100).chain([1000, 1_000_000, u32::MAX]) {
                let wait = backoff.without_jitter(retry);
                prop_assert!(wait >= last, "{:?} after {:?}", wait, last);
                last = wait;
            }
        }
    }

    /// The naive model: whole numbers, multiplied one retry after the other.
    #[test]
    fn a_whole_factor_is_exact(nanos in 1_u64..10_000_000_000, factor in 1_u32..=10, max in durations()) {
        let initial = Duration::from_nanos(nanos);
        let backoff = Backoff::exponential(initial).factor(factor.into()).max(max);
        let mut exact = u128::from(nanos);
        for retry in 1..=200 {
            // Beyond that a float is rounded, by less than 10⁻¹⁵ of it.
            if exact >> 53 != 0 {
                break;
            }
            let expected = Duration::from_nanos(exact as u64).min(max);
            prop_assert_eq!(backoff.without_jitter(retry), expected);
            exact = exact.saturating_mul(factor.into());
        }
    }
}
