//! `RUSTFLAGS="--cfg buttress_loom" cargo test -p buttress-retry --lib --release loom`

use buttress_core::sync::{Arc, model::model, thread};

use super::*;

const MICRO: Duration = Duration::from_micros(1);

fn at(seconds: u64) -> Instant {
    Instant::from_nanos(seconds * 1_000_000_000)
}

/// What a half holds, once nobody is in it.
fn held(half: &Half) -> (u64, u64, u32) {
    let sum = half.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum();
    (half.epoch.load(Acquire), half.count.load(Relaxed), sum)
}

/// Two enter a half that still holds what was two halves ago: it is emptied
/// once, nothing old is left, and only who met the other goes uncounted.
#[test]
fn a_half_is_emptied_once() {
    model(|| {
        let seen = Arc::new(Latencies::new(Duration::from_secs(2)));
        for _ in 0..3 {
            seen.record(MICRO, at(0));
        }
        let other = thread::spawn({
            let seen = Arc::clone(&seen);
            move || seen.record(MICRO, at(2))
        });
        seen.record(MICRO, at(2));
        other.join().unwrap();
        let (epoch, count, sum) = held(&seen.halves[0]);
        assert_eq!((epoch, count), (2, u64::from(sum)));
        assert!((1..=2).contains(&sum), "{sum}");
        // From then on nothing is lost.
        seen.record(MICRO, at(2));
        assert_eq!(held(&seen.halves[0]).2, sum + 1);
    });
}

/// Who asks meanwhile sees nothing of what is over.
#[test]
fn what_is_old_is_not_seen_while_it_is_emptied() {
    model(|| {
        let seen = Arc::new(Latencies::new(Duration::from_secs(2)));
        for _ in 0..MIN_SAMPLES {
            seen.record(MICRO, at(0));
        }
        let other = thread::spawn({
            let seen = Arc::clone(&seen);
            move || seen.record(MICRO, at(2))
        });
        assert_eq!(seen.percentile(0.5, at(2)), None);
        other.join().unwrap();
    });
}
