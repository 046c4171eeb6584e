//! What has failed for good, as much as there may be of it.

use std::collections::BTreeMap;

use crate::{DeadLetter, DeliveryId, map::Map};

pub(crate) struct Letters {
    most: usize,
    next: u64,
    by_number: BTreeMap<u64, DeadLetter>,
    numbers: Map<DeliveryId, u64>,
}

impl Letters {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            next: 0,
            by_number: BTreeMap::new(),
            numbers: Map::default(),
        }
    }

    /// Adds the newest. Where there is no room, the oldest gives way.
    pub(super) fn push(&mut self, letter: DeadLetter) -> Option<DeadLetter> {
        let id = letter.record.id;
        self.remove(id);
        self.numbers.insert(id, self.next);
        self.by_number.insert(self.next, letter);
        self.next += 1;
        if self.by_number.len() <= self.most {
            return None;
        }
        let (_, oldest) = self.by_number.pop_first()?;
        self.numbers.remove(&oldest.record.id);
        Some(oldest)
    }

    pub(crate) fn get(&self, id: DeliveryId) -> Option<&DeadLetter> {
        self.by_number.get(self.numbers.get(&id)?)
    }

    pub(super) fn remove(&mut self, id: DeliveryId) -> Option<DeadLetter> {
        let number = self.numbers.remove(&id)?;
        self.by_number.remove(&number)
    }

    /// The oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &DeadLetter> {
        self.by_number.values()
    }

    pub(crate) fn len(&self) -> usize {
        self.by_number.len()
    }
}
