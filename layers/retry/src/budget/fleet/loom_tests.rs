//! `RUSTFLAGS="--cfg buttress_loom" cargo test -p buttress-retry --features redis --lib --release loom`

use buttress_core::sync::{Arc, model::model, thread};

use super::{pocket::Pocket, *};

/// Two retries and a look at once: what there was is in one place afterwards.
#[test]
fn what_is_offered_is_not_spent_too() {
    model(|| {
        let budget = RetryBudget::new(100, 0).unwrap();
        let pocket = Arc::new(Pocket::new(100));
        for _ in 0..3 {
            pocket.request(RETRY);
        }
        let mut ledger = pocket.ledger();
        let other = {
            let pocket = Arc::clone(&pocket);
            thread::spawn(move || {
                pocket.request(RETRY);
                u64::from(pocket.withdraw()) + u64::from(pocket.withdraw())
            })
        };
        let report = pocket.report(&mut ledger, budget.rates());
        let given = other.join().unwrap();
        let left = pocket.balance();
        assert_eq!(report.offered + left + given * RETRY, 4 * RETRY);
    });
}
