//! One budget for a fleet, over a cluster of three nodes.

use std::time::Duration;

use buttress_core::clock;
use buttress_redis::{Config, Redis, testing::Cluster};
use buttress_retry::{FleetBudget, RetryBudget};
use tokio::time::sleep;

use buttress_retry::Budget;

/// The longest that anything is waited for here: never needed.
const PATIENCE: Duration = Duration::from_secs(20);

fn budget(redis: &Redis, per_second: u32) -> FleetBudget {
    let budget = RetryBudget::new(0, per_second).unwrap();
    budget.redis(redis, "orders").unwrap()
}

async fn within(holds: impl Fn() -> bool) {
    let began = clock::now();
    while !holds() {
        assert!(clock::now() - began < PATIENCE, "it does not come to be");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_is_bounded_as_one_while_the_slot_moves() {
    let cluster = Cluster::start().await;
    let began = clock::now();
    let fleet: Vec<_> = (0..3).map(|_| budget(&cluster.redis(), 20)).collect();
    within(|| fleet.iter().all(|budget| budget.processes() == 3)).await;
    let tasks: Vec<_> = fleet
        .iter()
        .cloned()
        .map(|budget| {
            tokio::spawn(async move {
                let mut given = 0;
                for _ in 0..500 {
                    given += u32::from(budget.withdraw());
                    sleep(Duration::from_millis(5)).await;
                }
                given
            })
        })
        .collect();
    for _ in 0..3 {
        sleep(Duration::from_millis(500)).await;
        cluster.move_all().await;
    }
    let mut given = 0;
    for task in tasks {
        given += task.await.unwrap();
    }
    let seconds = (clock::now() - began).as_secs_f64();
    let most = 20.0 * (seconds + 1.0);
    assert!(f64::from(given) <= most, "{given} of {most}");
    // And most of it is used: 2.5 seconds at least.
    assert!(given >= 30, "{given}");
    assert!(fleet.iter().all(FleetBudget::is_shared));
}

#[tokio::test]
async fn without_the_node_each_has_its_part_until_it_is_back() {
    let mut cluster = Cluster::start().await;
    let config = || Config::cluster(cluster.urls()).timeout(Duration::from_millis(400));
    let fleet: Vec<_> = (0..2)
        .map(|_| budget(&Redis::from_config(config()).unwrap(), 10))
        .collect();
    within(|| fleet.iter().all(|budget| budget.processes() == 2)).await;
    let owner = cluster.owner(&cluster.keys().await[0]).await;
    cluster.node_mut(owner).kill();
    within(|| {
        for budget in &fleet {
            budget.withdraw();
        }
        fleet.iter().all(|budget| !budget.is_shared())
    })
    .await;
    cluster.node_mut(owner).restart().await;
    cluster.settled().await;
    within(|| {
        for budget in &fleet {
            budget.withdraw();
        }
        let shared = fleet.iter().all(FleetBudget::is_shared);
        shared && fleet.iter().all(|budget| budget.processes() == 2)
    })
    .await;
}
