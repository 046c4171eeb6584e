//! Settings that live as long as the process, so that what refers to them is
//! one word, `Copy`, and needs no count of its users.

use std::sync::{Mutex, PoisonError};

/// Every distinct value that was ever asked for, each leaked once.
///
/// Values come from configuration, never from a client: the list grows with
/// the settings that a process has tried, and not with its traffic. std's
/// mutex and not the shim's, which cannot stand in a static under loom.
pub(super) struct Interned<T: 'static>(Mutex<Vec<&'static T>>);

impl<T: PartialEq> Interned<T> {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// The one reference to a value like this.
    pub(super) fn get(&self, value: T) -> &'static T {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(same) = known.iter().find(|known| ***known == value) {
            return same;
        }
        let new: &'static T = Box::leak(Box::new(value));
        known.push(new);
        new
    }
}
