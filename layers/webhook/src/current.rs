//! What is read by each call and seldom replaced.

use std::sync::{PoisonError, RwLock};

/// A value that is cheap to clone: locked for no longer than that takes, so that
/// readers do not wait for one another, and no reader for what is dropped.
pub(crate) struct Current<T>(RwLock<T>);

impl<T: Clone> Current<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(RwLock::new(value))
    }

    pub(crate) fn get(&self) -> T {
        let value = self.0.read().unwrap_or_else(PoisonError::into_inner);
        value.clone()
    }

    /// The old one is dropped unlocked: it may be the last clone of keys that
    /// are wiped, or of a scheme of the user's.
    pub(crate) fn set(&self, new: T) {
        let mut value = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *value, new);
        drop(value);
        drop(old);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Weak};

    use super::*;

    /// Reads what it was in when it is dropped.
    #[derive(Clone)]
    struct Reader(Arc<Reading>);

    struct Reading {
        number: u64,
        of: Weak<Current<Reader>>,
    }

    impl Drop for Reading {
        fn drop(&mut self) {
            if let Some(current) = self.of.upgrade() {
                assert!(current.0.try_read().is_ok(), "dropped under the lock");
            }
        }
    }

    #[test]
    fn what_is_replaced_is_dropped_unlocked() {
        let current = Arc::new_cyclic(|of| {
            let of = Weak::clone(of);
            Current::new(Reader(Arc::new(Reading { number: 1, of })))
        });
        let held = current.get();
        let of = Arc::downgrade(&current);
        current.set(Reader(Arc::new(Reading { number: 2, of })));
        assert_eq!((held.0.number, current.get().0.number), (1, 2));
        let of = Weak::new();
        current.set(Reader(Arc::new(Reading { number: 3, of })));
        assert_eq!(current.get().0.number, 3);
    }
}
