//! Which of several places a thread writes to, so that two threads rarely write
//! to the same.

use std::{
    cell::Cell,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// How many places there are. Two are enough for every interleaving that a
/// model has.
pub(crate) const STRIPES: usize = if cfg!(buttress_loom) { 2 } else { 8 };

static NEXT: AtomicUsize = AtomicUsize::new(0);

std::thread_local! {
    static STRIPE: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// The place of this thread.
#[inline]
pub(crate) fn stripe() -> usize {
    let stripe = STRIPE.get();
    if stripe < STRIPES { stripe } else { choose() }
}

#[cold]
fn choose() -> usize {
    let stripe = NEXT.fetch_add(1, Relaxed) % STRIPES;
    STRIPE.set(stripe);
    stripe
}
