//! What an event costs does not grow with those who do not want it: counted,
//! since a clock would tell of the machine.

mod common;

use buttress_delivery::Webhooks;
use common::*;
use tokio_test::{assert_ready, task};

/// The least of some, so that a table that grows just then does not count.
fn allocations(webhooks: &Webhooks) -> (u64, u64) {
    let emits = (0..40).map(|_| {
        let event = event("x.y.z");
        let info = allocation_counter::measure(|| {
            let mut emit = task::spawn(webhooks.emit(event));
            assert_eq!(assert_ready!(emit.poll()).unwrap(), 10);
        });
        (info.count_total, info.bytes_total)
    });
    emits.min().unwrap()
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_others_cost_nothing() {
    let with_others = |others: usize| {
        let (transport, _receiver) = receiver(|_| status(200));
        let webhooks = builder().capacity(10_000).build(transport).unwrap();
        for number in 0..others {
            let url = format!("https://h{number}.example/");
            let patterns = [format!("other.n{number}"), format!("under.n{number}.*")];
            let registration = buttress_delivery::Registration::new(url).events(patterns);
            webhooks.register(registration).unwrap();
        }
        for number in 0..10 {
            let url = format!("https://mine{number}.example/");
            webhooks.register(only(&url, &["x.*"])).unwrap();
        }
        allocations(&webhooks)
    };
    let (few, many) = (with_others(0), with_others(10_000));
    assert_eq!(few, many);
    // Of each delivery a record in two tables, a result and a place in a lane.
    assert!(few.0 <= 60, "{few:?}");
}
