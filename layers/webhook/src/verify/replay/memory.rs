//! Claims in memory: bounded, and pure decisions on the time they are handed.

use std::{
    collections::{VecDeque, hash_map::RandomState},
    hash::BuildHasher,
    time::Duration,
};

use buttress_core::clock::Instant;
use hashbrown::HashTable;
use slab::Slab;

use super::{Claim, ClaimKey, ClaimToken};

/// How many are forgotten with each claim, at most: more than come with it, so
/// that none pile up, and few enough that nobody waits for them.
const SWEEP: usize = 8;

/// Keys are kept whole, so that no two of them are ever taken for one. What is
/// completed stands in a queue in the order of its completion, and how long it
/// counts is the same for all: so the first is always the first to go.
#[derive(Debug)]
pub(crate) struct Memory {
    /// The whole hash beside the slot: growing reads no key.
    table: HashTable<(u64, usize)>,
    slots: Slab<Slot>,
    completed: VecDeque<Done>,
    most: usize,
    generation: u64,
    hasher: RandomState,
}

#[derive(Debug)]
struct Slot {
    key: ClaimKey,
    hash: u64,
    generation: u64,
    /// `None` while it is in progress.
    completed: Option<Instant>,
}

#[derive(Debug)]
struct Done {
    at: Instant,
    slot: usize,
    generation: u64,
}

impl Memory {
    /// Has room for `most`; takes none yet.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            table: HashTable::new(),
            slots: Slab::new(),
            completed: VecDeque::new(),
            most,
            generation: 0,
            hasher: RandomState::new(),
        }
    }

    /// How many there are, those not yet swept among them.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Claims the message, unless it is in progress, or was completed less than
    /// `keep` ago.
    pub(crate) fn claim(&mut self, key: &ClaimKey, now: Instant, keep: Duration) -> Claim {
        self.sweep(now, keep);
        let hash = self.hasher.hash_one(key);
        let slots = &self.slots;
        let found = self
            .table
            .find(hash, |&(other, slot)| {
                other == hash && slots[slot].key == *key
            })
            .map(|&(_, slot)| slot);
        if let Some(index) = found {
            let slot = &mut self.slots[index];
            match slot.completed {
                None => return Claim::InProgress,
                Some(at) if now < at + keep => return Claim::Completed,
                Some(_) => {
                    // Not yet swept: what stands in the queue is of another
                    // generation now.
                    self.generation += 1;
                    slot.generation = self.generation;
                    slot.completed = None;
                    return Claim::New(token(index, self.generation));
                }
            }
        }
        if self.slots.len() >= self.most {
            let first = self.completed.front();
            return Claim::Full {
                retry_after: first.map(|done| done.at + keep - now),
            };
        }
        self.generation += 1;
        let slot = self.slots.insert(Slot {
            key: key.clone(),
            hash,
            generation: self.generation,
            completed: None,
        });
        self.table
            .insert_unique(hash, (hash, slot), |&(hash, _)| hash);
        Claim::New(token(slot, self.generation))
    }

    /// It counts from now on.
    pub(crate) fn complete(&mut self, token: ClaimToken, now: Instant) {
        let (index, generation) = parts(token);
        let Some(slot) = self.in_progress(index, generation) else {
            return;
        };
        // Two threads may come in another order than they looked at the clock.
        let last = self.completed.back().map(|done| done.at);
        let at = last.map_or(now, |last| last.max(now));
        self.slots[slot].completed = Some(at);
        self.completed.push_back(Done {
            at,
            slot,
            generation,
        });
    }

    /// It may come again.
    pub(crate) fn release(&mut self, token: ClaimToken) {
        let (index, generation) = parts(token);
        if let Some(slot) = self.in_progress(index, generation) {
            self.remove(slot);
        }
    }

    fn in_progress(&self, index: usize, generation: u64) -> Option<usize> {
        let slot = self.slots.get(index)?;
        (slot.generation == generation && slot.completed.is_none()).then_some(index)
    }

    /// Forgets some of what no longer counts; at the ceiling one at least, if
    /// there is any.
    fn sweep(&mut self, now: Instant, keep: Duration) {
        let mut looked = 0;
        while let Some(done) = self.completed.front() {
            let enough = looked >= SWEEP && self.slots.len() < self.most;
            if enough || now < done.at + keep {
                return;
            }
            let (slot, generation) = (done.slot, done.generation);
            self.completed.pop_front();
            looked += 1;
            let same = |slot: &Slot| slot.generation == generation;
            if self.slots.get(slot).is_some_and(same) {
                self.remove(slot);
            }
        }
    }

    fn remove(&mut self, index: usize) {
        let slot = self.slots.remove(index);
        let entry = self.table.find_entry(slot.hash, |&(_, at)| at == index);
        if let Ok(entry) = entry {
            entry.remove();
        }
    }
}

fn token(slot: usize, generation: u64) -> ClaimToken {
    ClaimToken::new(u128::from(generation) << 64 | slot as u128)
}

#[expect(clippy::cast_possible_truncation, reason = "as they were put in")]
fn parts(token: ClaimToken) -> (usize, u64) {
    (token.get() as u64 as usize, (token.get() >> 64) as u64)
}
