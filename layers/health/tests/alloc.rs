//! What it costs the path of a request to feed it: no allocation.

use std::time::Duration;

use buttress_health::{Beat, HealthRegistry, Indicator};

fn allocations(mut work: impl FnMut()) -> u64 {
    work();
    allocation_counter::measure(work).count_total
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(Box::new([1_u8; 7]))), 1);
}

/// There is no runtime here, and nothing that could wake one.
#[test]
fn feeding_costs_no_allocation() {
    let (indicator, beat) = (Indicator::new("a"), Beat::new("b", Duration::from_secs(1)));
    let health = HealthRegistry::builder()
        .source(indicator.clone())
        .source(beat.clone())
        .build()
        .unwrap();
    let cost = allocations(|| {
        for score in [0.0, 0.5, f64::NAN, 7.0] {
            indicator.set(score);
            beat.beat();
        }
        indicator.disable();
        indicator.set(0.5);
    });
    assert_eq!(cost, 0);
    assert_eq!(health.score(), 0.75);
    // Whoever asks for readiness pays nothing for a yes either.
    let cost = allocations(|| assert!(health.readiness().is_ready() && health.score() == 0.75));
    assert_eq!(cost, 0);
}
