//! The memory that the bodies of all requests in flight share.

use std::fmt;

use buttress_core::sync::{
    Arc, Padded,
    atomic::{AtomicUsize, Ordering},
};

/// A cap on what is remembered of request bodies, over all requests in flight.
///
/// Every clone is the same memory: give one to several layers, and it caps
/// their sum. A body for which no room is left is sent once, streaming, and is
/// not retried.
///
/// Where one layer stands inside of another, each counts the same bytes for
/// itself.
///
/// What is counted: the bytes of data and trailers, and 64 more for every
/// chunk of a body after its first. A chunk that is a small part of a larger
/// allocation keeps the whole of it; that is not counted, as nobody can tell.
///
/// Defaults to 64 MiB.
#[derive(Clone)]
pub struct Memory(Arc<Pool>);

struct Pool {
    max: usize,
    /// Apart from the count of the clones, which every request changes too.
    used: Padded<AtomicUsize>,
}

impl Memory {
    /// Room for so many bytes. With none, only empty bodies are sent again, and
    /// those of which nothing was read.
    #[must_use]
    pub fn new(max_bytes: usize) -> Self {
        Self(Arc::new(Pool {
            max: max_bytes,
            used: Padded(AtomicUsize::new(0)),
        }))
    }

    /// Bytes in use now; never more than [`max`](Self::max).
    #[must_use]
    pub fn used(&self) -> usize {
        self.0.used.load(Ordering::Relaxed)
    }

    /// Bytes that there is room for.
    #[must_use]
    pub fn max(&self) -> usize {
        self.0.max
    }

    /// Takes so many bytes, or none if so many are not left.
    ///
    /// Not added first and taken back if it was too much: two that try at once
    /// would find no room where there is room for one.
    pub(super) fn reserve(&self, bytes: usize) -> bool {
        self.0
            .used
            // A mere count: it publishes nothing.
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|used| *used <= self.0.max)
            })
            .is_ok()
    }

    /// Gives back what was reserved.
    pub(super) fn release(&self, bytes: usize) {
        if bytes > 0 {
            self.0.used.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new(64 << 20)
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory")
            .field("max", &self.max())
            .field("used", &self.used())
            .finish()
    }
}
