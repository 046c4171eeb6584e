//! A rolling restart, as an operator does it: three processes behind a balancer
//! that polls their readiness, load without a pause, and one process after the
//! other is stopped and started anew. Nobody may notice.
//!
//! The balancer is HAProxy where it is installed, else a small one of the
//! test's own; the load is `wrk` and `h2load` where they are installed, and in
//! any case clients that see every answer. No one sends anything twice. How
//! long, and how often in a row: `ROLLING_SECONDS` (6) and `ROLLING_TIMES` (1);
//! `make rolling` takes what the page on rolling restarts tells.

#![expect(clippy::print_stdout, reason = "it is there to be read")]

mod balancer;
mod load;
mod replica;

use std::{env, time::Duration};

use balancer::Balancer;
use load::Load;
use replica::Replica;
use tokio::time::{Instant, sleep, timeout_at};

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |value| value.parse().expect("a whole number"))
}

fn seconds() -> Duration {
    Duration::from_secs(number("ROLLING_SECONDS", 6))
}

/// Whoever is unready is passed over by then: a balancer looks every 100 ms.
const DELAY: Duration = Duration::from_millis(1000);

/// Restarts one after the other until the time is over, and every one once in
/// any case. How often it has.
async fn restart_in_turn(replicas: &mut [Replica], length: Duration) -> usize {
    let end = Instant::now() + length;
    let mut restarts = 0;
    while restarts < replicas.len() || Instant::now() < end {
        let replica = &mut replicas[restarts % 3];
        replica.restart().await;
        restarts += 1;
        // So that there are always two.
        sleep(Duration::from_millis(300)).await;
    }
    restarts
}

/// What came of the load while they were restarted.
async fn roll(delay: Duration, length: Duration) -> (load::Seen, usize) {
    let mut replicas = Vec::new();
    for _ in 0..3 {
        replicas.push(Replica::start(delay).await);
    }
    let balancer = Balancer::start(&replicas).await;
    let load = Load::start(balancer.address(), length).await;
    let restarts = restart_in_turn(&mut replicas, length).await;
    let seen = timeout_at(
        Instant::now() + length + Duration::from_secs(30),
        load.end(),
    );
    let seen = seen.await.expect("the load ends in its time");
    println!("{}: {restarts} restarts; {seen}", balancer.name());
    (seen, restarts)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_in_a_rolling_restart() {
    for _ in 0..number("ROLLING_TIMES", 1) {
        let (seen, restarts) = roll(DELAY, seconds()).await;
        assert!(restarts >= 3);
        assert!(seen.answered() > 1000, "{seen}");
        assert_eq!(seen.failed(), 0, "{seen}");
    }
}

/// Whoever stops listening before the balancer knows loses requests: so the
/// test above can fail.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_delay_requests_do() {
    let (seen, _) = roll(Duration::ZERO, Duration::from_secs(3)).await;
    assert!(seen.failed() > 0, "{seen}");
}
