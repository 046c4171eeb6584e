//! `RUSTFLAGS="--cfg buttress_loom" cargo test -p buttress-redis --lib --release loom`

use buttress_core::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
    model, thread,
};

use super::*;

#[test]
fn three_failures_at_once_shut_it_and_one_is_told() {
    model(|| {
        let gate = Arc::new(Gate::default());
        let told = Arc::new(AtomicUsize::new(0));
        let ticket = gate.pass().unwrap();
        let fail = {
            let (gate, told) = (Arc::clone(&gate), Arc::clone(&told));
            move || {
                if gate.failed(ticket) {
                    told.fetch_add(1, SeqCst);
                    assert!(gate.pass().is_none(), "the one that is told finds it shut");
                }
            }
        };
        let threads = [thread::spawn(fail.clone()), thread::spawn(fail.clone())];
        fail();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(!gate.is_open());
        assert_eq!(told.load(SeqCst), 1);
    });
}

#[test]
fn an_answer_between_failures_keeps_it_open() {
    model(|| {
        let gate = Arc::new(Gate::default());
        let ticket = gate.pass().unwrap();
        gate.failed(ticket);
        gate.failed(ticket);
        let answered = thread::spawn({
            let gate = Arc::clone(&gate);
            move || gate.answered(ticket)
        });
        let shut = gate.failed(ticket);
        answered.join().unwrap();
        // In whichever order: the third failure was the last straw, or the
        // first after the answer.
        assert_eq!(shut, !gate.is_open());
        if !shut {
            let left = u64::from(!gate.failed(ticket)) + u64::from(!gate.failed(ticket));
            assert!(left >= 1, "a failure was lost or counted twice");
        }
    });
}

#[test]
fn what_began_before_it_opened_says_nothing() {
    model(|| {
        let gate = Arc::new(Gate::default());
        let before = gate.pass().unwrap();
        gate.failed(before);
        gate.failed(before);
        gate.shut();
        let late = thread::spawn({
            let gate = Arc::clone(&gate);
            move || assert!(!gate.failed(before))
        });
        assert!(gate.open(), "it was shut");
        late.join().unwrap();
        let now = gate.pass().expect("what came late shut nothing");
        assert!(!gate.failed(now));
        assert!(!gate.failed(now));
        assert!(gate.failed(now));
    });
}

#[test]
fn what_passes_ends_what_was_denied_before() {
    model(|| {
        let gate = Arc::new(Gate::default());
        gate.shut();
        gate.open();
        let ticket = gate.pass().unwrap();
        gate.denied(ticket);
        gate.denied(ticket);
        let answered = thread::spawn({
            let gate = Arc::clone(&gate);
            move || gate.answered(ticket)
        });
        let shut = gate.denied(ticket);
        let due = gate.is_due();
        answered.join().unwrap();
        // Either it was shut first, and waits; or something has passed, and it
        // is neither shut nor does it wait.
        assert_eq!(shut, !gate.is_open());
        assert_eq!(due, !shut, "a probe left out, or none");
        assert!(gate.is_due());
    });
}

#[test]
fn shutting_and_opening_are_each_told_once() {
    model(|| {
        let gate = Arc::new(Gate::default());
        let count = |told: bool| usize::from(told);
        let other = thread::spawn({
            let gate = Arc::clone(&gate);
            move || (usize::from(gate.shut()), usize::from(gate.open()))
        });
        let ours = (count(gate.shut()), count(gate.open()));
        let theirs = other.join().unwrap();
        assert!(gate.is_open());
        assert_eq!(
            ours.0 + theirs.0,
            ours.1 + theirs.1,
            "as often shut as opened"
        );
    });
}
