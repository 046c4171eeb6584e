use proptest::prelude::*;

use super::*;

const ALL: [Kind; KINDS] = [Kind::Request, Kind::Connection, Kind::Guard, Kind::Listener];

#[test]
fn only_the_last_of_its_kind_wakes_and_only_a_drain() {
    let ledger = Ledger::new();
    for _ in 0..3 {
        assert_eq!(ledger.enter(Kind::Request), Phase::Serving);
    }
    assert!(!ledger.leave(Kind::Request));
    assert_eq!(ledger.advance(Phase::Draining), Phase::Serving);
    assert_eq!(ledger.enter(Kind::Connection), Phase::Draining);
    assert!(!ledger.leave(Kind::Request));
    assert!(ledger.leave(Kind::Request));
    assert!(!ledger.is_idle());
    assert!(ledger.leave(Kind::Connection));
    assert!(ledger.is_idle());
}

#[test]
fn counts_may_wrap() {
    let ledger = Ledger::new();
    let counter = &ledger.counters[0];
    counter.begun.store(usize::MAX, Relaxed);
    counter.ended.store(usize::MAX, Relaxed);
    assert!(ledger.is_idle());
    ledger.enter(Kind::Request);
    assert_eq!(ledger.open(Kind::Request), 1);
    assert!(!ledger.is_idle());
    assert!(!ledger.leave(Kind::Request));
    assert!(ledger.is_idle());
}

proptest! {
    /// Whatever comes and goes: it is over if and only if nobody is there.
    #[test]
    fn idle_is_when_all_are_gone(steps in prop::collection::vec((0..KINDS, any::<bool>()), 0..200)) {
        let ledger = Ledger::new();
        ledger.advance(Phase::Draining);
        let mut there = [0_usize; KINDS];
        for (kind, comes) in steps {
            if comes {
                there[kind] += 1;
                ledger.enter(ALL[kind]);
            } else if there[kind] > 0 {
                there[kind] -= 1;
                prop_assert_eq!(ledger.leave(ALL[kind]), there[kind] == 0);
            }
            prop_assert_eq!(ledger.open(ALL[kind]), there[kind]);
            prop_assert_eq!(ledger.is_idle(), there == [0; KINDS]);
        }
    }
}
