//! One shard: an open-addressing table of its own, with the sweep that frees
//! what is spent. Pure: it is handed its `now` and knows no lock.

use std::mem;

use super::{Entry, SlotId};
use crate::clock::Instant;

/// The least table that is allocated.
const MIN_SLOTS: usize = 8;

/// What nothing is due before, in an empty shard.
pub(super) const NEVER: Instant = Instant::from_nanos(u64::MAX);
/// The latest moment at which something is spent: what lasts to the end of the
/// clock looks the same as a vacant slot.
const LAST: Instant = Instant::from_nanos(u64::MAX - 1);

/// How full a shard's table may be: by how many slots it has. A shard with few
/// entries is of a map that is far from its ceiling, and has memory to spare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fill {
    /// From a sixth to a third: nearly all probes end at once, which the
    /// processor then rightly expects.
    Sparse,
    /// From a half to three quarters.
    Loose,
    /// Once it has grown, from three quarters to seven eighths: slots of 16
    /// bytes come to at most 21.4 bytes a key.
    Dense,
}

impl Fill {
    /// How many entries are enough to be loose, and dense.
    const LOOSE: usize = 32;
    const DENSE: usize = 256;

    const fn of(slots: usize) -> Self {
        if slots < Self::LOOSE * 6 {
            Self::Sparse
        } else if slots < Self::DENSE * 2 {
            Self::Loose
        } else {
            Self::Dense
        }
    }

    /// How many entries a table holds before it grows.
    const fn most(slots: usize) -> usize {
        match Self::of(slots) {
            Self::Sparse => slots / 3,
            Self::Loose => slots / 4 * 3 + slots % 4 * 3 / 4,
            Self::Dense => slots / 8 * 7 + slots % 8 * 7 / 8,
        }
    }

    /// How many a table just grown is made for, at least.
    const fn least(slots: usize) -> usize {
        match Self::of(slots) {
            Self::Sparse => slots / 6,
            Self::Loose => slots / 2,
            Self::Dense => slots / 4 * 3 + slots % 4 * 3 / 4,
        }
    }

    /// The table that `len` entries are moved to.
    fn slots(len: usize) -> usize {
        match len {
            0 => 0,
            1..Self::LOOSE => (len * 6).max(MIN_SLOTS),
            Self::LOOSE..Self::DENSE => (len * 2).max(Self::LOOSE * 6),
            _ => (len * 4).div_ceil(3).max(Self::DENSE * 2),
        }
    }
}

/// What every look at a key reads comes first, so that it shares a cache line
/// with the lock before it; and with 16 bytes of what is shared, all does.
#[repr(C)]
pub(super) struct Shard<T: Entry> {
    /// Linear probing from `home`; never full, so that every probe ends at a
    /// vacant slot. Not allocated while there is no entry.
    slots: Box<[T]>,
    pub(super) shared: T::Shared,
    len: u32,
    /// The next slot to sweep; a pass goes from slot 0 to the last.
    cursor: u32,
    /// The least `spent_at` of what this pass has kept and of what came since
    /// it began.
    pass_least: Instant,
    /// No entry is spent before this, as far as the shard was told.
    pub(super) least: Instant,
}

/// What a look through a whole shard has found.
pub(super) struct Survey {
    pub(super) freed: usize,
    /// The entry that is spent first, and when.
    pub(super) least: Option<(SlotId, Instant)>,
    /// When the one after it is.
    pub(super) second: Instant,
}

impl<T: Entry> Shard<T> {
    pub(super) fn new(shared: T::Shared) -> Self {
        Self {
            slots: Box::default(),
            len: 0,
            cursor: 0,
            pass_least: NEVER,
            least: NEVER,
            shared,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len as usize
    }

    pub(super) fn capacity(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn get(&self, at: usize) -> &T {
        &self.slots[at]
    }

    #[inline]
    pub(super) fn get_mut(&mut self, at: usize) -> &mut T {
        &mut self.slots[at]
    }

    #[inline]
    pub(super) fn parts(&mut self, at: Option<usize>) -> (Option<&mut T>, &mut T::Shared) {
        (at.map(|at| &mut self.slots[at]), &mut self.shared)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter(|slot| slot.id().is_some())
    }

    /// Where the entry of `id` stands.
    #[inline]
    pub(super) fn find(&self, id: SlotId) -> Option<usize> {
        let mut at = home(id, self.slots.len());
        // No slots at all: the first `get` says so.
        while let Some(found) = self.slots.get(at)?.id() {
            if found == id {
                return Some(at);
            }
            at = next(at, self.slots.len());
        }
        None
    }

    /// Adds an entry whose id is not there yet. Returns its place.
    pub(super) fn add(&mut self, now: Instant, id: SlotId, entry: T) -> (usize, usize) {
        let mut freed = 0;
        if self.len() + 1 > Fill::most(self.slots.len()) {
            // Perhaps it was only never swept: the pass that fills a table has
            // looked at each slot once, but not at those spent since.
            freed = self.survey(now).freed;
            if self.len() + 1 > Fill::least(self.slots.len()) {
                self.resize(self.len() + 1);
            }
        }
        self.note(entry.spent_at());
        self.len += 1;
        (self.place(id, entry), freed)
    }

    /// An entry is now spent at `at`, which may be earlier than any other.
    #[inline]
    pub(super) fn note(&mut self, at: Instant) {
        self.least = self.least.min(at);
        self.pass_least = self.pass_least.min(at);
    }

    fn place(&mut self, id: SlotId, entry: T) -> usize {
        let mut at = home(id, self.slots.len());
        while self.slots[at].id().is_some() {
            at = next(at, self.slots.len());
        }
        self.slots[at] = entry;
        at
    }

    /// Takes out the entry at `at`, and gives memory back when little is left.
    pub(super) fn remove(&mut self, at: usize) -> T {
        let gone = self.vacate(at);
        // Entries may have moved back over the cursor, unseen by this pass.
        self.pass_least = self.pass_least.min(self.least);
        if self.len == 0 {
            self.least = NEVER;
        }
        self.shrink();
        gone
    }

    /// Backward-shift deletion: what stood further on because of this entry
    /// moves up, so that there are no tombstones to probe over for ever.
    fn vacate(&mut self, at: usize) -> T {
        let gone = mem::take(&mut self.slots[at]);
        self.len -= 1;
        let slots = self.slots.len();
        let mut hole = at;
        let mut from = next(at, slots);
        while let Some(id) = self.slots[from].id() {
            let displaced = distance(home(id, slots), from, slots);
            if displaced >= distance(hole, from, slots) {
                self.slots.swap(hole, from);
                hole = from;
            }
            from = next(from, slots);
        }
        gone
    }

    /// Looks at the next `count` slots of the pass and frees what is spent.
    /// Returns how many that was.
    pub(super) fn sweep(&mut self, now: Instant, count: usize) -> usize {
        let before = self.len();
        let now = now.min(LAST);
        // Never one slot twice, in a small table.
        for _ in 0..count.min(self.slots.len()) {
            if self.cursor as usize >= self.slots.len() {
                self.end_pass();
            }
            let Some(slot) = self.slots.get(self.cursor as usize) else {
                break;
            };
            let spent_at = spent_at(slot);
            if spent_at <= now {
                // Another entry may have moved here: the cursor stays.
                self.vacate(self.cursor as usize);
            } else {
                self.pass_least = self.pass_least.min(spent_at);
                self.cursor += 1;
            }
        }
        before - self.len()
    }

    fn end_pass(&mut self) {
        self.cursor = 0;
        self.least = mem::replace(&mut self.pass_least, NEVER);
        self.shrink();
    }

    /// Looks through the whole shard at once and frees what is spent.
    pub(super) fn survey(&mut self, now: Instant) -> Survey {
        let before = self.len();
        let now = now.min(LAST);
        let mut least: Option<(SlotId, Instant)> = None;
        let mut second = NEVER;
        let mut at = 0;
        while let Some(slot) = self.slots.get(at) {
            let spent_at = spent_at(slot);
            if spent_at <= now {
                self.vacate(at);
                continue;
            }
            at += 1;
            // Nearly always so, for the least of many is soon met.
            if spent_at >= second {
                continue;
            }
            let Some(id) = slot.id() else { continue };
            match least {
                // Moved round the end by a deletion, and met again.
                Some((known, _)) if known == id => {}
                Some((_, first)) if first <= spent_at => second = spent_at,
                first => {
                    second = first.map_or(second, |(_, at)| at);
                    least = Some((id, spent_at));
                }
            }
        }
        if least.is_none() {
            // They last for ever, if there are any: one is as good as another.
            let any = self.entries().next();
            least = any.and_then(|entry| Some((entry.id()?, NEVER)));
        }
        self.cursor = 0;
        self.pass_least = NEVER;
        self.least = least.map_or(NEVER, |(_, at)| at);
        Survey {
            freed: before - self.len(),
            least,
            second,
        }
    }

    /// Lets `change` change what is shared and every entry, and begins a new
    /// pass: nothing that was known of them need be so any more.
    pub(super) fn change_all(
        &mut self,
        change: &mut impl FnMut(&mut T::Shared, &mut dyn Iterator<Item = &mut T>),
    ) {
        let mut entries = self.slots.iter_mut().filter(|slot| slot.id().is_some());
        change(&mut self.shared, &mut entries);
        let first = self.entries().map(Entry::spent_at).min();
        self.least = first.unwrap_or(NEVER);
        self.pass_least = NEVER;
        self.cursor = 0;
    }

    fn shrink(&mut self) {
        if self.slots.len() > MIN_SLOTS && self.len() < self.slots.len() / 8 {
            self.resize(self.len());
        }
    }

    /// Moves to a table made for `len` entries.
    fn resize(&mut self, len: usize) {
        let new = (0..Fill::slots(len)).map(|_| T::default()).collect();
        // In the order of their homes, but for those that went round the end.
        for entry in mem::replace(&mut self.slots, new) {
            if let Some(id) = entry.id() {
                self.place(id, entry);
            }
        }
        self.cursor = 0;
        self.pass_least = NEVER;
    }

    /// Forgets everything and gives the memory back.
    pub(super) fn clear(&mut self) -> usize {
        let gone = self.len();
        self.slots = Box::default();
        self.len = 0;
        self.cursor = 0;
        self.pass_least = NEVER;
        self.least = NEVER;
        gone
    }
}

/// When the slot is to be freed: a vacant one never. A select and no branch,
/// for whether a slot is vacant is what no processor can predict.
#[inline]
fn spent_at<T: Entry>(slot: &T) -> Instant {
    let spent_at = slot.spent_at();
    if slot.id().is_some() { spent_at } else { NEVER }
}

/// Where an entry would like to stand: the id's 48 bits scaled to the slots
/// (Lemire's fast range), so that their number need not be a power of two.
#[inline]
const fn home(id: SlotId, slots: usize) -> usize {
    // Shifted first, while the shard is not locked yet: what is left to do then
    // is the high half of a product.
    let id = id.get() << (u64::BITS - SlotId::BITS);
    ((id as u128 * slots as u128) >> u64::BITS) as usize
}

#[inline]
const fn next(at: usize, slots: usize) -> usize {
    if at + 1 == slots { 0 } else { at + 1 }
}

#[inline]
const fn distance(from: usize, to: usize, slots: usize) -> usize {
    if to >= from {
        to - from
    } else {
        to + slots - from
    }
}
