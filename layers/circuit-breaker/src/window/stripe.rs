//! Which counters a thread writes.
//!
//! The first threads that count have a stripe each, which nobody else writes:
//! there an addition is a load and a store, and costs no more than in a
//! program of one thread. The others share a few, where it is an exchange. A
//! thread that ends leaves its stripe to the next.

/// Stripes of one thread each.
pub(super) const OWNED: usize = if cfg!(buttress_loom) { 0 } else { 8 };
/// Stripes for all others.
const SHARED: usize = if cfg!(buttress_loom) { 2 } else { 4 };
pub(super) const STRIPES: usize = OWNED + SHARED;

#[cfg(not(buttress_loom))]
pub(super) use threads::stripe;

/// A model's threads share them, which is the harder case.
#[cfg(buttress_loom)]
pub(super) fn stripe() -> usize {
    0
}

#[cfg(not(buttress_loom))]
mod threads {
    use std::{
        cell::Cell,
        sync::atomic::{
            AtomicUsize,
            Ordering::{AcqRel, Relaxed, Release},
        },
    };

    use super::{OWNED, SHARED, STRIPES};

    /// A bit for each stripe that has an owner.
    static TAKEN: AtomicUsize = AtomicUsize::new(0);
    /// Spreads the others.
    static OTHERS: AtomicUsize = AtomicUsize::new(0);

    std::thread_local! {
        static STRIPE: Cell<usize> = const { Cell::new(usize::MAX) };
        static OWNER: Owner = Owner::new();
    }

    /// The stripe of this thread.
    #[inline]
    pub(in super::super) fn stripe() -> usize {
        let own = STRIPE.get();
        if own < STRIPES { own } else { choose() }
    }

    #[cold]
    fn choose() -> usize {
        // A thread that is ending has no more owner to be.
        let owned = OWNER.try_with(|owner| owner.0).ok().flatten();
        let own = owned.unwrap_or_else(|| OWNED + OTHERS.fetch_add(1, Relaxed) % SHARED);
        STRIPE.set(own);
        own
    }

    struct Owner(Option<usize>);

    impl Owner {
        fn new() -> Self {
            let mut taken = TAKEN.load(Relaxed);
            loop {
                let free = taken.trailing_ones() as usize;
                if free >= OWNED {
                    return Self(None);
                }
                // Acquires what the owner before has counted.
                match TAKEN.compare_exchange_weak(taken, taken | 1 << free, AcqRel, Relaxed) {
                    Ok(_) => return Self(Some(free)),
                    Err(now) => taken = now,
                }
            }
        }
    }

    impl Drop for Owner {
        fn drop(&mut self) {
            if let Self(Some(own)) = *self {
                // Whatever this thread still counts as it ends is counted
                // among the others'.
                STRIPE.set(usize::MAX);
                TAKEN.fetch_and(!(1 << own), Release);
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use std::sync::{Barrier, Mutex};

        use super::*;

        #[test]
        fn no_two_threads_own_one() {
            for _ in 0..20 {
                let seen = Mutex::new(Vec::new());
                let all = Barrier::new(2 * OWNED);
                std::thread::scope(|scope| {
                    for _ in 0..2 * OWNED {
                        scope.spawn(|| {
                            let own = stripe();
                            assert_eq!(own, stripe());
                            assert!(own < STRIPES);
                            seen.lock().unwrap().push(own);
                            all.wait();
                        });
                    }
                });
                let mut owned: Vec<_> = seen.into_inner().unwrap();
                owned.retain(|&own| own < OWNED);
                owned.sort_unstable();
                let count = owned.len();
                owned.dedup();
                assert_eq!(owned.len(), count);
            }
        }
    }
}
