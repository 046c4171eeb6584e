//! `RUSTFLAGS="--cfg buttress_loom" cargo test -p buttress-drain --lib --release loom`

use buttress_core::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
    model::{Builder, model},
    thread,
};

use super::*;

/// A ledger, and how often who waits was woken.
struct Drain {
    ledger: Ledger,
    woken: AtomicUsize,
}

impl Drain {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            ledger: Ledger::new(),
            woken: AtomicUsize::new(0),
        })
    }

    fn enter(&self, kind: Kind) -> Phase {
        self.ledger.enter_at(kind, || 0)
    }

    fn leave(&self, kind: Kind) {
        self.leave_at(kind, 0);
    }

    fn leave_at(&self, kind: Kind, stripe: usize) {
        if self.ledger.leave_at(kind, || stripe) != Left::Others {
            self.woken.fetch_add(1, SeqCst);
        }
    }

    /// What the drain does before it sleeps. If it has to, somebody wakes it.
    fn wait(&self) -> bool {
        self.ledger.is_idle()
    }
}

fn beside<T: 'static>(
    drain: &Arc<Drain>,
    f: impl FnOnce(&Drain) -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let drain = Arc::clone(drain);
    thread::spawn(move || f(&drain))
}

/// Race 1: whoever was let in is waited for.
#[test]
fn nobody_is_let_in_and_forgotten() {
    model(|| {
        let drain = Drain::new();
        let request = beside(&drain, |drain| {
            let admitted = drain.enter(Kind::Request) < Phase::Closed;
            if !admitted {
                drain.leave(Kind::Request);
            }
            admitted
        });
        drain.ledger.advance(Phase::Closed);
        let finished = drain.wait();
        let admitted = request.join().unwrap();
        assert!(!(finished && admitted), "it is still there");
        if !admitted {
            assert!(drain.ledger.is_idle());
        }
    });
}

/// Whoever goes wakes whoever waits.
#[test]
fn no_wake_up_is_lost() {
    model(|| {
        let drain = Drain::new();
        drain.enter(Kind::Request);
        drain.enter(Kind::Connection);
        let other = beside(&drain, |drain| {
            drain.leave(Kind::Request);
            drain.leave(Kind::Connection);
        });
        drain.ledger.advance(Phase::Closed);
        // It listens before it looks.
        let before = drain.woken.fetch_add(0, SeqCst);
        let finished = drain.wait();
        other.join().unwrap();
        assert!(drain.ledger.is_idle());
        assert!(finished || drain.woken.load(SeqCst) > before);
    });
}

/// The wait for the listeners is for one kind alone.
#[test]
fn no_wake_up_of_a_kind_is_lost() {
    model(|| {
        let drain = Drain::new();
        drain.enter(Kind::Listener);
        drain.enter(Kind::Connection);
        let other = beside(&drain, |drain| drain.leave(Kind::Listener));
        drain.ledger.advance(Phase::Closing);
        let before = drain.woken.fetch_add(0, SeqCst);
        let finished = drain.ledger.is_idle_of(Kind::Listener);
        other.join().unwrap();
        assert!(finished || drain.woken.load(SeqCst) > before);
    });
}

/// Of two that go at once one is the last, and knows.
#[test]
fn the_last_of_a_kind_wakes() {
    model(|| {
        let drain = Drain::new();
        drain.enter(Kind::Request);
        drain.enter(Kind::Request);
        drain.ledger.advance(Phase::Draining);
        // On another thread than it came, and on two stripes.
        let other = beside(&drain, |drain| drain.leave_at(Kind::Request, 1));
        drain.leave(Kind::Request);
        other.join().unwrap();
        assert!(drain.woken.load(SeqCst) > 0);
        assert!(drain.ledger.is_idle());
    });
}

/// Of those who might put an abandoned ledger back, one does. Both read all of
/// it, which is a minute's work with every interleaving there is.
#[test]
fn it_is_put_back_once() {
    let mut some = Builder::new();
    some.preemption_bound = Some(3);
    some.check(|| {
        let drain = Drain::new();
        drain.enter(Kind::Request);
        let other = beside(&drain, |drain| {
            let left = drain.ledger.leave_at(Kind::Request, || 1);
            usize::from(left == Left::Free)
        });
        let freed = usize::from(drain.ledger.abandon());
        assert_eq!(freed + other.join().unwrap(), 1);
        assert_eq!(drain.ledger.phase(), Phase::Serving);
    });
}

/// One comes on a connection as another goes: at no time was there nobody.
#[test]
fn a_relay_is_never_taken_for_nobody() {
    model(|| {
        let drain = Drain::new();
        drain.enter(Kind::Guard);
        let relay = beside(&drain, |drain| {
            drain.enter(Kind::Request);
            drain.leave(Kind::Guard);
            drain.enter(Kind::Connection);
            drain.leave(Kind::Request);
        });
        drain.ledger.advance(Phase::Closed);
        assert!(
            !drain.wait(),
            "the connection is there, or what came before"
        );
        relay.join().unwrap();
        assert!(!drain.ledger.is_idle());
        drain.leave(Kind::Connection);
        assert!(drain.ledger.is_idle());
    });
}

#[test]
fn a_phase_never_goes_back() {
    model(|| {
        let drain = Drain::new();
        let other = beside(&drain, |drain| drain.ledger.advance(Phase::Draining));
        let before = drain.ledger.advance(Phase::Cut);
        let other = other.join().unwrap();
        assert_eq!(drain.ledger.phase(), Phase::Cut);
        // Each step is somebody's.
        assert!(matches!(
            (before, other),
            (Phase::Serving, Phase::Cut) | (Phase::Draining, Phase::Serving)
        ));
    });
}
