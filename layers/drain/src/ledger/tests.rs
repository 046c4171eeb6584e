use proptest::prelude::*;

use super::*;

const KINDS: usize = 4;

const ALL: [Kind; KINDS] = [Kind::Request, Kind::Connection, Kind::Guard, Kind::Listener];

#[test]
fn only_the_last_of_its_kind_wakes_and_only_a_drain() {
    let ledger = Ledger::new();
    for _ in 0..3 {
        assert_eq!(ledger.enter(Kind::Request), Phase::Serving);
    }
    assert_eq!(ledger.leave(Kind::Request), Left::Others);
    assert_eq!(ledger.advance(Phase::Draining), Phase::Serving);
    assert_eq!(ledger.enter(Kind::Connection), Phase::Draining);
    assert_eq!(ledger.leave(Kind::Request), Left::Others);
    assert_eq!(ledger.leave(Kind::Request), Left::Emptied);
    assert!(!ledger.is_idle());
    assert_eq!(ledger.leave(Kind::Connection), Left::Emptied);
    assert!(ledger.is_idle());
}

#[test]
fn counts_may_wrap() {
    let ledger = Ledger::new();
    for counter in &ledger.requests {
        counter.begun.store(usize::MAX, Relaxed);
        counter.ended.store(usize::MAX, Relaxed);
    }
    assert!(ledger.is_idle());
    ledger.enter(Kind::Request);
    assert_eq!(ledger.open(Kind::Request), 1);
    assert!(!ledger.is_idle());
    assert_eq!(ledger.leave(Kind::Request), Left::Others);
    assert!(ledger.is_idle());
}

#[test]
fn a_ledger_has_many_lives() {
    let ledger = Ledger::new();
    for life in 0..20 {
        ledger.enter(Kind::Request);
        assert_eq!(ledger.advance(Phase::Cut), Phase::Serving, "{life}");
        assert_eq!(ledger.advance(Phase::Closing), Phase::Cut);
        assert!(!ledger.abandon());
        assert_eq!(ledger.leave(Kind::Request), Left::Free);
        assert_eq!(ledger.phase(), Phase::Serving);
        assert!(ledger.is_idle());
        // And one that nobody ever used.
        assert!(ledger.abandon());
    }
}

proptest! {
    /// Whatever comes and goes: it is over if and only if nobody is there.
    #[test]
    fn idle_is_when_all_are_gone(steps in prop::collection::vec((0..KINDS, any::<bool>(), 0..STRIPES), 0..200)) {
        let ledger = Ledger::new();
        ledger.advance(Phase::Draining);
        let mut there = [0_usize; KINDS];
        for (kind, comes, stripe) in steps {
            if comes {
                there[kind] += 1;
                ledger.enter_at(ALL[kind], || stripe);
            } else if there[kind] > 0 {
                there[kind] -= 1;
                let left = match there[kind] {
                    0 => Left::Emptied,
                    _ => Left::Others,
                };
                prop_assert_eq!(ledger.leave_at(ALL[kind], || stripe), left);
            }
            prop_assert_eq!(ledger.open(ALL[kind]), there[kind]);
            prop_assert_eq!(ledger.is_idle_of(ALL[kind]), there[kind] == 0);
            prop_assert_eq!(ledger.is_idle(), there == [0; KINDS]);
        }
    }
}
