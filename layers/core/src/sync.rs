//! The loom shim: std's synchronisation, or loom's in a build with
//! `--cfg buttress_loom`.
//!
//! The cfg is our own because tokio changes itself under `--cfg loom`.
//! Every layer takes its atomics and locks from here, so that loom can run
//! the very code that ships.
//!
//! [`Mutex`] is std's. Uncontended lock and unlock, a release loop on a shared
//! 2.5 GHz Xeon: std 4.4–6.7 ns, parking_lot 0.12 5.2–7.6 ns in the same
//! rounds; and std's is half the size beside a `u64`.

use std::{
    fmt,
    ops::{Deref, DerefMut},
};

#[cfg(not(buttress_loom))]
use std::sync as imp;

#[cfg(buttress_loom)]
use loom::sync as imp;

#[cfg(buttress_loom)]
pub use loom::{model, thread};
#[cfg(not(buttress_loom))]
pub use std::thread;

pub use imp::{Arc, atomic};

/// A mutual exclusion lock that knows no poison: a panic while it was held
/// leaves the data as it was at the panic.
///
/// For sections that run no user code, and whose every step leaves the data
/// sound.
#[derive(Default)]
pub struct Mutex<T>(imp::Mutex<T>);

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    /// Locks, blocking the thread until it can.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(match self.0.lock() {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        })
    }

    /// Locks if nobody else has; never blocks.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Some(MutexGuard(guard)),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => {
                Some(MutexGuard(poisoned.into_inner()))
            }
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }
}

impl<T> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mutex").finish_non_exhaustive()
    }
}

/// The lock held on a [`Mutex`]; dropping it unlocks.
#[must_use = "dropping the guard unlocks"]
pub struct MutexGuard<'a, T>(imp::MutexGuard<'a, T>);

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MutexGuard").finish_non_exhaustive()
    }
}

/// A value on cache lines of its own: two threads on two of them do not slow
/// each other down.
///
/// 128 bytes, because x86 fetches lines in pairs and some ARM lines are so
/// long.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(128))]
pub struct Padded<T>(pub T);

impl<T> Deref for Padded<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_panic_does_not_poison() {
        let mutex = Arc::new(Mutex::new(1));
        let held = Arc::clone(&mutex);
        let panicked = thread::spawn(move || {
            let _guard = held.lock();
            panic!("while locked");
        })
        .join();
        assert!(panicked.is_err());
        *mutex.lock() += 1;
        assert_eq!(*mutex.try_lock().unwrap(), 2);
    }

    #[test]
    fn trying_does_not_wait() {
        let mutex = Mutex::new(());
        let guard = mutex.lock();
        assert!(mutex.try_lock().is_none());
        drop(guard);
        assert!(mutex.try_lock().is_some());
    }
}
