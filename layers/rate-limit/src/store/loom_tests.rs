//! `RUSTFLAGS="--cfg buttress_loom" cargo test -p buttress-rate-limit --lib --release loom`

use std::time::Duration;

use buttress_core::sync::{Arc, model, thread};

use super::*;
use crate::Quota;

const NOW: Instant = Instant::from_nanos(1 << 40);

fn table(name: &'static str, burst: u32, max_keys: usize) -> Table {
    let gcra = Quota::new(1, Duration::from_secs(3600)).burst(burst);
    Table::new(
        name.into(),
        gcra.check().unwrap(),
        NonZeroUsize::new(max_keys).unwrap(),
        WhenFull::Refuse,
    )
}

fn ask(tables: &[Table], limit: usize, key: u64) -> Option<Ask> {
    Some(Ask {
        limit,
        id: tables[limit].id(&key),
        cost: 1,
        quota: None,
    })
}

fn left(tables: &[Table], limit: usize, key: u64) -> u32 {
    let ask = ask(tables, limit, key).unwrap();
    tables[limit].peek(&ask, NOW).remaining
}

fn passes(tables: &[Table], asks: &[Option<Ask>]) -> bool {
    decide_all(tables, asks, NOW, Detail::Tightest).verdict == Verdict::Pass
}

/// Two at once, where both limits let only one of them through: that one is
/// charged to both, the other to none.
#[test]
fn all_or_none() {
    model(|| {
        let tables = Arc::new([table("a", 3, 4), table("b", 1, 4)]);
        let other = Arc::clone(&tables);
        let other = thread::spawn(move || {
            let asks = [ask(&*other, 0, 7), ask(&*other, 1, 7)];
            passes(&*other, &asks)
        });
        let asks = [ask(&*tables, 0, 7), ask(&*tables, 1, 7)];
        let here = passes(&*tables, &asks);
        assert!(here != other.join().unwrap());
        assert_eq!((left(&*tables, 0, 7), left(&*tables, 1, 7)), (2, 0));
    });
}

/// One has no room in the second table: the charge to the first is undone
/// before anybody sees it.
#[test]
fn what_finds_no_room_is_charged_nowhere() {
    model(|| {
        let tables = Arc::new([table("a", 3, 4), table("b", 3, 1)]);
        let other = Arc::clone(&tables);
        let other = thread::spawn(move || {
            let asks = [ask(&*other, 0, 1), ask(&*other, 1, 1)];
            passes(&*other, &asks)
        });
        let asks = [ask(&*tables, 0, 2), ask(&*tables, 1, 2)];
        let here = passes(&*tables, &asks);
        let other = other.join().unwrap();
        assert!(here != other);
        let one = |charged| if charged { 2 } else { 3 };
        assert_eq!(
            (left(&*tables, 0, 1), left(&*tables, 1, 1)),
            (one(other), one(other))
        );
        assert_eq!(
            (left(&*tables, 0, 2), left(&*tables, 1, 2)),
            (one(here), one(here))
        );
        assert_eq!((tables[0].map().len(), tables[1].map().len()), (1, 1));
    });
}

/// A request of both limits, one of the second alone, and a refund: nobody
/// waits for ever, and every charge is there in the end.
#[test]
fn nobody_waits_for_ever() {
    model(|| {
        let tables = Arc::new([table("a", 3, 4), table("b", 3, 4)]);
        let spawn = |asks: fn(&[Table]) -> Vec<Option<Ask>>| {
            let tables = Arc::clone(&tables);
            thread::spawn(move || assert!(passes(&*tables, &asks(&*tables))))
        };
        let second = spawn(|tables| vec![ask(tables, 1, 7)]);
        let both = spawn(|tables| vec![ask(tables, 0, 7), ask(tables, 1, 7)]);
        // Before anything was charged it gives nothing back.
        tables[0].refund(&ask(&*tables, 0, 7).unwrap(), NOW);
        second.join().unwrap();
        both.join().unwrap();
        assert!(matches!(left(&*tables, 0, 7), 2 | 3));
        assert_eq!(left(&*tables, 1, 7), 1);
    });
}

/// A quota is replaced while a request is decided: what was spent of the old
/// one is spent of the new one, in whatever order.
#[test]
fn a_quota_replaced_meanwhile_loses_no_charge() {
    model(|| {
        let tables = Arc::new([table("a", 3, 4)]);
        let other = Arc::clone(&tables);
        let other = thread::spawn(move || {
            let quota = Quota::per_second(10).check().unwrap();
            other[0].replace(quota, NOW);
        });
        let one = ask(&*tables, 0, 7).unwrap();
        let verdict = decide_one(tables[0].hold(one.id, NOW), &one, Detail::None).verdict;
        assert_eq!(verdict, Verdict::Pass);
        other.join().unwrap();
        assert_eq!(left(&*tables, 0, 7), 9);
    });
}
