//! The windows that rates are counted over. Both really slide, both are of a
//! fixed size however many calls they see, and neither has a lock.
//!
//! Every cell of them carries the generation that wrote it, so that a new
//! generation starts empty and one that is over cannot write into it.

use buttress_core::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Relaxed},
};

mod calls;
mod stripe;
mod time;

pub(crate) use calls::{CallWindow, MAX_CALLS};
pub(crate) use time::{Epochs, MIN_TIME, TimeWindow};

/// How a call went, for a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) failed: bool,
    pub(crate) slow: bool,
}

impl Mark {
    pub(crate) const GOOD: Self = Self {
        failed: false,
        slow: false,
    };
    pub(crate) const SLOW: Self = Self {
        failed: false,
        slow: true,
    };

    pub(crate) const fn is_good(self) -> bool {
        !self.failed && !self.slow
    }
}

/// What a window holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sums {
    pub(crate) calls: u64,
    pub(crate) failed: u64,
    pub(crate) slow: u64,
}

/// Whether `tag` was written by a later generation than `own`, both cut to
/// `bits`: nearer by going forward than by going back.
const fn is_later(tag: u64, own: u64, bits: u32) -> bool {
    let ahead = tag.wrapping_sub(own) & ((1 << bits) - 1);
    ahead != 0 && ahead < 1 << (bits - 1)
}

/// A window is written, and read by who decides, in one order with the armed
/// bit (`SeqCst`, which costs nothing over `AcqRel` on x86). loom knows that
/// order from fences only.
#[inline]
pub(crate) fn order_for_loom() {
    #[cfg(buttress_loom)]
    buttress_core::sync::atomic::fence(buttress_core::sync::atomic::Ordering::SeqCst);
}

/// Writes what a new generation begins with. loom orders a swap with the
/// exchanges of others, as the language does, but not a store.
fn clear(counter: &AtomicU64, to: u64) {
    if cfg!(buttress_loom) {
        counter.swap(to, AcqRel);
    } else {
        counter.store(to, Relaxed);
    }
}
