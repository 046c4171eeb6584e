use proptest::{collection::vec, prelude::*};

use super::*;

const WINDOW: Duration = Duration::from_secs(60);

fn at(seconds: u64) -> Instant {
    Instant::from_nanos(seconds * 1_000_000_000)
}

fn micros() -> impl Strategy<Value = u64> {
    // Of every magnitude.
    (0..=LONGEST_BITS, any::<u64>()).prop_map(|(bits, draw)| draw & ((1 << bits) - 1))
}

/// What it is of sorted data: the nearest rank.
fn exact(latencies: &[u64], percentile: f64) -> u64 {
    let mut sorted = latencies.to_vec();
    sorted.sort_unstable();
    let rank = (percentile * sorted.len() as f64).ceil() as usize;
    sorted[rank.max(1) - 1]
}

proptest! {
    #[test]
    fn a_bucket_holds_what_falls_into_it(micros in micros()) {
        let latency = Duration::from_micros(micros);
        let bucket = bucket(latency);
        prop_assert!(latency < end(bucket));
        prop_assert!(bucket == 0 || end(bucket - 1) <= latency);
    }

    #[test]
    fn the_percentile_is_never_low_and_at_most_a_32nd_high(
        latencies in vec(micros(), 20..400),
        percentile in 0.01..0.999,
    ) {
        let seen = Latencies::new(WINDOW);
        for micros in &latencies {
            seen.record(Duration::from_micros(*micros), at(100));
        }
        let found = seen.percentile(percentile, at(100)).unwrap();
        let exact = Duration::from_micros(exact(&latencies, percentile));
        prop_assert!(found >= exact, "{found:?} < {exact:?}");
        prop_assert!(
            found <= exact + exact / 32 + Duration::from_micros(1),
            "{found:?} > {exact:?}"
        );
    }

    /// Asked after each, when most answers are remembered ones.
    #[test]
    fn what_is_remembered_is_that_of_fifteen_16ths(
        latencies in vec(micros(), 20..200),
        percentile in 0.5..0.999,
    ) {
        let seen = Latencies::new(WINDOW);
        for (before, micros) in latencies.iter().enumerate() {
            seen.record(Duration::from_micros(*micros), at(100));
            let found = seen.percentile(percentile, at(100));
            let now = before + 1;
            if (now as u64) < MIN_SAMPLES {
                prop_assert_eq!(found, None);
                continue;
            }
            let found = found.unwrap();
            let fits = (now - now / 16..=now).any(|count| {
                let exact = exact(&latencies[..count], percentile);
                found == end(bucket(Duration::from_micros(exact)))
            });
            prop_assert!(fits, "{found:?} after {now}");
        }
    }

    /// Half the window is always known, and nothing older than the whole.
    #[test]
    fn the_window_slides(
        marks in vec((0_u64..30, 0_u64..5), 1..300),
    ) {
        let seen = Latencies::new(WINDOW);
        let mut now = 0;
        let mut all = Vec::new();
        for (step, many) in marks {
            now += step;
            for _ in 0..many {
                // Each tells when it was.
                seen.record(Duration::from_micros(now), at(now));
                all.push(now);
            }
            let live = seen.live(seen.epoch(at(now)));
            let known: u64 = live.map(|half| half.count.load(Relaxed)).sum();
            let since = |span: u64| all.iter().filter(|at| **at + span > now).count() as u64;
            prop_assert!(known >= since(30), "{known} are known at {now}");
            prop_assert!(known <= since(60), "{known} are known at {now}");
        }
    }
}

#[test]
fn the_longest_have_a_bucket_too() {
    assert_eq!(bucket(Duration::MAX), BUCKETS - 1);
    assert_eq!(end(BUCKETS - 1), Duration::from_micros(1 << 32));
    assert_eq!(bucket(Duration::ZERO), 0);
}

#[test]
fn a_long_run_is_forgotten_as_fast_as_a_short_one() {
    let seen = Latencies::new(WINDOW);
    for _ in 0..100_000 {
        seen.record(Duration::from_secs(9), at(10));
    }
    assert!(seen.percentile(0.5, at(59)).unwrap() > Duration::from_secs(8));
    assert_eq!(seen.percentile(0.5, at(60)), None);
    for _ in 0..MIN_SAMPLES {
        seen.record(Duration::from_millis(1), at(61));
    }
    assert!(seen.percentile(0.5, at(61)).unwrap() < Duration::from_millis(2));
}

#[test]
fn who_comes_after_the_time_goes_uncounted() {
    let seen = Latencies::new(WINDOW);
    seen.record(Duration::from_millis(1), at(70));
    // Of the half before last.
    seen.record(Duration::from_millis(1), at(5));
    assert_eq!(seen.halves[0].count.load(Relaxed), 1);
}

#[test]
fn threads_lose_nothing_within_a_half() {
    let seen = Latencies::new(WINDOW);
    // Whoever meets another that empties the half goes uncounted.
    seen.record(Duration::from_millis(3), at(200));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..10_000 {
                    seen.record(Duration::from_millis(3), at(200));
                    let _ = seen.percentile(0.5, at(200));
                }
            });
        }
    });
    assert_eq!(seen.halves[0].count.load(Relaxed), 40_001);
    assert_eq!(
        seen.percentile(0.5, at(200)),
        Some(end(bucket(Duration::from_millis(3))))
    );
}
