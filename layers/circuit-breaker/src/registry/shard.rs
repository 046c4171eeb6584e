//! A part of the registry's breakers, behind one lock, and the hand that goes
//! round them in search of one that may be forgotten.
//!
//! The search is CLOCK (Corbató, "A Paging Experiment with the Multics
//! System", 1968): a lookup marks its entry, the hand takes the mark away, and
//! the entry that it finds without one goes. Two things are added, as in 2Q
//! (Johnson and Shasha, 1994) an entry proves itself by a second use: one that
//! was never used again goes without more ado, so that a flood of keys
//! displaces itself; and one that was stays for a while, since its calls may
//! be under way yet.

use std::{
    collections::{HashMap, hash_map},
    hash::{BuildHasherDefault, Hasher},
    mem,
    sync::Arc,
    time::Duration,
};

use buttress_core::{clock::Instant, key::Key};

use super::key::Probe;
use crate::Breaker;

/// How long a breaker that was used again is not forgotten: longer than most
/// calls take, whose results it would miss.
pub(super) const RECENT: Duration = Duration::from_secs(10);

/// One breaker and its key.
pub(super) struct Entry {
    pub(super) id: u64,
    pub(super) key: Key,
    pub(super) label: Arc<str>,
    pub(super) breaker: Breaker,
    /// Whether it has settings of its own.
    pub(super) chosen: bool,
    pub(super) track: Track,
}

/// How an entry was used, as far as the hand wants to know.
pub(super) struct Track {
    /// Since the hand came by.
    used: bool,
    /// Ever since it was made.
    again: bool,
    /// Since when it is unused, as the hand has noticed.
    quiet_since: Instant,
}

impl Track {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            used: false,
            again: false,
            quiet_since: now,
        }
    }
}

/// Why an entry was not added.
pub(super) enum Refused {
    /// Another thread was first.
    There(Breaker),
    /// Another key has the same 48 bits of hash.
    Collides,
}

#[derive(Default)]
pub(super) struct Shard {
    index: HashMap<u64, usize, BuildHasherDefault<Spread>>,
    entries: Vec<Entry>,
    hand: usize,
}

impl Shard {
    /// Finds an entry.
    #[inline]
    pub(super) fn find(&mut self, id: u64, probe: Probe<'_>) -> Option<&mut Entry> {
        let entry = &mut self.entries[*self.index.get(&id)?];
        if Probe::of(&entry.key) != probe {
            return None;
        }
        Some(entry)
    }

    /// Adds an entry; else gives it back, to be dropped after unlocking.
    pub(super) fn add(&mut self, entry: Entry) -> Result<(), (Refused, Entry)> {
        match self.index.entry(entry.id) {
            hash_map::Entry::Vacant(vacant) => {
                vacant.insert(self.entries.len());
                self.entries.push(entry);
                Ok(())
            }
            hash_map::Entry::Occupied(there) => {
                let there = &mut self.entries[*there.get()];
                let refused = if there.key == entry.key {
                    Refused::There(there.used().clone())
                } else {
                    Refused::Collides
                };
                Err((refused, entry))
            }
        }
    }

    pub(super) fn remove(&mut self, id: u64, probe: Probe<'_>) -> Option<Entry> {
        let place = *self.index.get(&id)?;
        let found = Probe::of(&self.entries[place].key) == probe;
        found.then(|| self.take(place))
    }

    /// The last entry takes the place.
    fn take(&mut self, place: usize) -> Entry {
        let entry = self.entries.swap_remove(place);
        self.index.remove(&entry.id);
        if let Some(moved) = self.entries.get(place) {
            self.index.insert(moved.id, place);
        }
        entry
    }

    /// Takes out an entry that may be forgotten, if the hand finds one: at
    /// most once round, at most so many `looks`.
    pub(super) fn evict(
        &mut self,
        looks: &mut usize,
        now: Instant,
        forget_after: Duration,
    ) -> Option<Entry> {
        for _ in 0..self.entries.len() {
            *looks = looks.checked_sub(1)?;
            if self.hand >= self.entries.len() {
                self.hand = 0;
            }
            let place = self.hand;
            // Past the place in any case: what moves into it is the youngest.
            self.hand += 1;
            if self.entries[place].may_go(now, forget_after) {
                return Some(self.take(place));
            }
        }
        None
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }
}

impl Entry {
    /// The breaker, for a use that the hand will see.
    #[inline]
    pub(super) fn used(&mut self) -> &Breaker {
        self.track.used = true;
        &self.breaker
    }

    /// Whether it may be forgotten. If so its breaker is retired: it does not
    /// open any more.
    fn may_go(&mut self, now: Instant, forget_after: Duration) -> bool {
        let track = &mut self.track;
        // A handle that is out is a use. No other can come while the shard is
        // locked, since all are clones of this one.
        if mem::take(&mut track.used) || self.breaker.handles() > 1 {
            track.again = true;
            track.quiet_since = now;
            return false;
        }
        let quiet = now - track.quiet_since;
        if track.again && quiet < RECENT {
            return false;
        }
        self.breaker.retire(now, quiet >= forget_after)
    }
}

/// Keys of the index are hashes already, of 48 bits: these are spread over all
/// 64, as the table wants its high and low ones.
#[derive(Default)]
pub(super) struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("the index has numbers for keys");
    }

    #[inline]
    fn write_u64(&mut self, id: u64) {
        // 2⁶⁴ by the golden ratio (Knuth's multiplicative hashing).
        self.0 = id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}
