//! Counts allocations and live bytes, for the bench that runs it: one line
//! for each run, tab-separated. Told `breaker`, `retry`, `drain` or `serve`, it
//! counts those of the circuit breakers, the retries, the drain or the servers,
//! else those of the rate limiters.

use std::{alloc::System, env};

use buttress_benches::{
    breaker, drain,
    measure::drive,
    retry,
    scenarios::{self, governor_by_key, lasting, ours_by_key},
    serve,
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const CALLS: u64 = 1000;

fn main() {
    match env::args().nth(1).as_deref() {
        Some("breaker") => allocations(breaker::ALL),
        Some("retry") => allocations(retry::ALL),
        Some("drain") => allocations(drain::ALL),
        Some("serve") => allocations(serve::ALL),
        _ => {
            allocations(scenarios::ALL);
            bytes();
        }
    }
}

#[expect(clippy::print_stdout, reason = "that is what it is for")]
fn allocations(runs: &[scenarios::Named]) {
    for (name, make) in runs {
        let mut run = make();
        // What is made once, and a table that has yet to be allocated.
        run(200);
        let region = Region::new(ALLOCATOR);
        run(CALLS);
        let change = region.change();
        let calls = change.allocations + change.reallocations;
        println!("allocations\t{name}\t{}", per_call(calls));
    }
}

#[expect(clippy::print_stdout, reason = "that is what it is for")]
fn bytes() {
    for keys in [100_000_u64, 300_000, 1_000_000] {
        let region = Region::new(ALLOCATOR);
        let mut service = ours_by_key::<u64>(lasting(keys).0, 1_000_000);
        for n in 0..keys {
            drive(&mut service, n).expect("the quota is endless");
        }
        println!("bytes\tours, {keys}\t{}", live(&region, keys));
        drop(service);

        let region = Region::new(ALLOCATOR);
        let limiter = governor_by_key::<u64>(lasting(keys).1);
        for n in 0..keys {
            limiter.check_key(&n).expect("the quota is endless");
        }
        println!("bytes\tgovernor, {keys}\t{}", live(&region, keys));
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2⁵²")]
fn per_call(count: usize) -> f64 {
    count as f64 / CALLS as f64
}

#[expect(clippy::cast_precision_loss, reason = "far below 2⁵²")]
fn live(region: &Region<'_, System>, keys: u64) -> f64 {
    let change = region.change();
    // The bytes of a reallocation are in the other two.
    let bytes = change.bytes_allocated as f64 - change.bytes_deallocated as f64;
    bytes / keys as f64
}
