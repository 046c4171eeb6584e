use super::*;
use crate::Quota;

const KEY: KeyId = KeyId::from_hash(7 << 16);

fn secs(secs: u64) -> Instant {
    Instant::from_nanos(secs * 1_000_000_000)
}

/// Two at once, of which one comes back every second.
fn table() -> Table {
    let gcra = Quota::per_second(1).burst(2).check().unwrap();
    let max_keys = NonZeroUsize::new(100).unwrap();
    Table::new("a".into(), gcra, max_keys, WhenFull::Evict)
}

fn passes(table: &Table, now: Instant) -> bool {
    let ask = Ask {
        limit: 0,
        id: KEY,
        cost: 1,
        quota: None,
    };
    decide_one(table.hold(KEY, now), &ask, Detail::None).verdict == Verdict::Pass
}

/// A thread reads the clock, sleeps while others decide, and then decides by
/// what it read.
#[test]
fn a_late_decision_gives_nothing_twice() {
    let table = table();
    assert!(passes(&table, secs(20)) && passes(&table, secs(20)));
    assert!(!passes(&table, secs(20)));
    // The key is there: what it owes is what it owes.
    let mut held = table.hold_known(KEY, secs(5));
    assert_eq!(held.charge_known(KEY, 1), None);
    drop(held);
    assert!(!passes(&table, secs(5)));

    // It was forgotten: the time is that of whoever did so, and the charge
    // is still owed at that time.
    assert!(table.reset(KEY, secs(20)));
    let mut held = table.hold_known(KEY, secs(5));
    assert_eq!(held.charge_known(KEY, 1), None);
    held.catch_up();
    assert_eq!(held.now, secs(20).as_nanos());
    drop(held);
    assert!(passes(&table, secs(5)) && passes(&table, secs(5)));
    assert!(!passes(&table, secs(20)));
    assert!(passes(&table, secs(21)));
}

/// What a thread that slept finds owed is more than its clock says can be
/// owed: it was cut to that, and the time slept through given once more.
#[test]
fn a_late_refusal_gives_nothing_back() {
    let table = table();
    assert!(passes(&table, secs(5)));
    for _ in 0..2 {
        let mut held = table.hold_known(KEY, secs(20));
        assert!(held.charge_known(KEY, 1).is_some());
    }
    assert!(!passes(&table, secs(5)));
    assert!(!passes(&table, secs(20)));
}

/// The path of most requests and the other are one algorithm.
#[test]
fn both_paths_agree() {
    let (quick, table) = (table(), table());
    assert!(passes(&quick, secs(10)) && passes(&table, secs(10)));
    for (tenths, cost) in [(101, 1), (102, 1), (113, 1), (113, 2), (140, 2), (141, 1)] {
        let now = Instant::from_nanos(tenths * 100_000_000);
        let ask = Ask {
            limit: 0,
            id: KEY,
            cost,
            quota: None,
        };
        let quickly = quick.hold_known(KEY, now).charge_known(KEY, cost);
        let decision = decide_one(table.hold(KEY, now), &ask, Detail::None);
        assert_eq!(quickly.is_some(), decision.verdict == Verdict::Pass);
        assert_eq!(quick.peek(&ask, now), table.peek(&ask, now), "{tenths}");
    }
}
