//! A bounded map from hashed keys to small entries: what a layer remembers of
//! each key that a client can choose.
//!
//! The table keeps 48 bits of a key's hash and never the key, so that an entry
//! can be 16 bytes whatever the key was. It never holds many more than
//! [`Config::max_keys`] entries, and what may be forgotten is the entry's own
//! say: once [`Entry::spent_at`] has come, forgetting it loses nothing.
//!
//! ```
//! use std::{num::NonZeroUsize, time::Duration};
//!
//! use buttress_core::{
//!     clock::{self, Instant},
//!     keyed::{Config, Entry, KeyedMap, SlotId},
//! };
//!
//! /// Who called, and how often within the minute after the first call.
//! #[derive(Default)]
//! struct Calls {
//!     id: Option<SlotId>,
//!     until: Option<Instant>,
//!     count: u64,
//! }
//!
//! impl Entry for Calls {
//!     type Shared = ();
//!
//!     fn id(&self) -> Option<SlotId> {
//!         self.id
//!     }
//!
//!     fn spent_at(&self) -> Instant {
//!         self.until.unwrap_or(Instant::from_nanos(0))
//!     }
//! }
//!
//! let calls: KeyedMap<Calls> = KeyedMap::new(
//!     Config {
//!         max_keys: NonZeroUsize::new(10_000).unwrap(),
//!         ..Config::default()
//!     },
//!     (),
//! );
//! let count = |key: &str| {
//!     let now = clock::now();
//!     let mut slot = calls.lock(calls.id(key));
//!     if let Some(entry) = slot.get_mut().filter(|entry| entry.spent_at() > now) {
//!         entry.count += 1;
//!         return Ok(entry.count);
//!     }
//!     let first = Calls {
//!         id: Some(slot.id().slot()),
//!         until: Some(now + Duration::from_secs(60)),
//!         count: 1,
//!     };
//!     slot.insert(now, first).map(|_evicted| 1)
//! };
//! assert_eq!(count("ann"), Ok(1));
//! assert_eq!(count("ann"), Ok(2));
//! assert_eq!(count("bob"), Ok(1));
//! ```
//!
//! # The ceiling
//!
//! One counter knows how many entries all shards hold. While it is below
//! `max_keys`, a new key is simply added. At `max_keys`, room is made first,
//! as [`WhenFull`] says: by freeing a spent entry anywhere, else by giving up
//! the one that is spent first, or by refusing the new key. So that the spent
//! one is found without a search, every shard says in one word (its *bound*)
//! when the first of its entries will be spent, at the earliest. A bound is
//! never later than the truth, for it is lowered by what is inserted, and
//! raised only by a look at every slot:
//!
//! - If a spent entry exists, its shard's bound has passed. So when no bound
//!   has passed, every entry is live and there are `max_keys` of them: only
//!   then a live one is given up, and no debtor is ever lost while live
//!   debtors are fewer than `max_keys`. (Above two million keys, 2048 bounds
//!   are read and not all: there a live one may go while the only spent ones
//!   are in shards not asked.)
//! - A bound that is too early (its entry was updated) costs one look through
//!   that shard, after which it is exact.
//!
//! A look is at about a thousand slots, and an insertion takes no more than
//! eight. Should these all have been in vain while more bounds have passed, or
//! should another thread hold the shard that is due, the entry is let in above
//! `max_keys`, by at most `max_keys / 64 + 64` altogether, and the next
//! insertions make up for it. A map of one shard (`max_keys` below 64) needs
//! no such leeway and has none.
//!
//! # No pauses
//!
//! Nothing stops the map: shards grow and shrink alone, some microseconds
//! each. Each insertion of a new key sweeps the next 8 slots of its shard and
//! frees what is spent (64 when the map is more than three quarters full), so
//! that a shard is swept as a whole before it grows.
//!
//! # Two keys, one entry
//!
//! Two of `n` keys share an entry when their hashes have the same 48 high bits
//! and choose the same shard: a chance of `n² / 2⁴⁹ / shards` that any two do,
//! below one in a million for 10⁶ keys in a map made for 10⁶ (1024 shards, 58
//! bits). The hash is keyed with a random [`Secret`], so that nobody outside
//! can aim for it.

mod shard;

#[cfg(all(test, buttress_loom))]
mod loom_tests;
#[cfg(all(test, not(buttress_loom)))]
mod tests;

use std::{
    fmt,
    hash::{BuildHasher, Hash, Hasher},
    num::{NonZeroU64, NonZeroUsize},
};

use shard::{NEVER, Shard, Survey};

use crate::{
    clock::Instant,
    sync::{
        Mutex, MutexGuard, Padded,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

/// Keys a shard is made for.
const SHARD_KEYS: usize = 1024;
/// A small map has more shards than that for the threads' sake, but none for
/// fewer keys than this.
const SMALL_SHARD_KEYS: usize = 32;
/// How many shards a small map has at most.
const SMALL_SHARDS: usize = 64;
/// As many as the 16 low bits of a hash can choose.
const MAX_SHARDS: usize = 1 << 16;

/// Slots swept for each new key.
const SWEEP: usize = 8;
/// The same, in a map more than three quarters full.
const SWEEP_MORE: usize = 64;
/// Looks through a shard in search of room, for each new key at the ceiling.
const LOOKS: usize = 8;
/// Bounds read for each such look: all of them up to two million keys.
const BOUNDS_READ: usize = 2048;

/// One slot of a [`KeyedMap`]; the default is the vacant slot.
pub trait Entry: Default {
    /// What every shard keeps a copy of under its own lock: settings that a
    /// decision reads with no second lock, and [`KeyedMap::set_shared`]
    /// replaces.
    type Shared: Clone;

    /// The key's id as it was given to the entry; `None` is a vacant slot.
    fn id(&self) -> Option<SlotId>;

    /// From when on nothing is lost by forgetting the entry.
    ///
    /// When a live entry must go, one with the earliest goes. Should be cheap:
    /// sweeps ask it of every entry.
    fn spent_at(&self) -> Instant;
}

/// The hash of a key: which shard, and the [`SlotId`] in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyId(u64);

impl KeyId {
    /// The id of a key that is hashed already. The hash should be secret, or
    /// clients can choose keys that share an entry.
    #[must_use]
    #[inline]
    pub const fn from_hash(hash: u64) -> Self {
        Self(hash)
    }

    /// What the entry keeps of it.
    #[must_use]
    #[inline]
    pub const fn slot(self) -> SlotId {
        match NonZeroU64::new(self.0 >> (u64::BITS - SlotId::BITS)) {
            Some(id) => SlotId(id),
            // One value in 2⁴⁸ is twice as likely as the others.
            None => SlotId(NonZeroU64::MIN),
        }
    }
}

/// What a slot keeps of a key: 48 bits of its hash, never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(NonZeroU64);

impl SlotId {
    /// The width of an id.
    pub const BITS: u32 = 48;

    /// The id that an entry has packed; `None` if it is 0 or wider than
    /// [`BITS`](Self::BITS).
    #[must_use]
    #[inline]
    pub const fn new(id: u64) -> Option<Self> {
        match NonZeroU64::new(id) {
            Some(id) if id.get() >> Self::BITS == 0 => Some(Self(id)),
            _ => None,
        }
    }

    /// The id as a number.
    #[must_use]
    #[inline]
    pub const fn get(self) -> u64 {
        self.0.get()
    }
}

/// The random key of the hash. Maps that are asked for the same keys can share
/// one, so that a key is hashed once.
#[derive(Clone)]
pub struct Secret(ahash::RandomState);

impl Secret {
    /// A new one, from the operating system's randomness.
    #[must_use]
    pub fn random() -> Self {
        Self(ahash::RandomState::new())
    }

    /// The id of `key` under this secret.
    #[inline(always)]
    #[expect(
        clippy::manual_hash_one,
        reason = "never out of line: a key that was just made is hashed in registers"
    )]
    pub fn id<K: Hash + ?Sized>(&self, key: &K) -> KeyId {
        let mut hasher = self.0.build_hasher();
        key.hash(&mut hasher);
        KeyId::from_hash(hasher.finish())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// What happens to a new key when `max_keys` live ones are there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The entry that is spent first is forgotten before its time, and
    /// counted (the default). Up to two million keys it is the first of all,
    /// beyond of a good sample.
    #[default]
    Evict,
    /// The new key is refused with [`Full`].
    Refuse,
}

/// How large a [`KeyedMap`] may become.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How many live keys are kept; the default is 100 000.
    pub max_keys: NonZeroUsize,
    /// What happens at that many; the default evicts.
    pub when_full: WhenFull,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_keys: const { NonZeroUsize::new(100_000).unwrap() },
            when_full: WhenFull::Evict,
        }
    }
}

/// There are `max_keys` live keys, and this is a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no room for another key")
    }
}

impl std::error::Error for Full {}

/// A bounded map from keys to entries: see the [module](self).
pub struct KeyedMap<T: Entry> {
    shards: Box<[Line<Mutex<Shard<T>>>]>,
    /// Each shard's `least` for all to see without its lock. Written under it.
    bounds: Box<[AtomicU64]>,
    secret: Secret,
    max_keys: usize,
    room: usize,
    when_full: WhenFull,
    // Only new keys and removed ones touch these.
    counts: Padded<Counts>,
}

/// On cache lines of its own, of 64 bytes: were they [`Padded`], every other
/// line of the nearest cache would be left to the slots alone, and the shards
/// of a large map would crowd each other out of the rest.
#[repr(align(64))]
struct Line<T>(T);

struct Counts {
    /// Entries in all shards, and those about to be added.
    total: AtomicUsize,
    evicted: AtomicU64,
    /// Where a look at some of the bounds begins.
    looked: AtomicUsize,
}

impl<T: Entry> KeyedMap<T> {
    /// An empty map, with a secret of its own. Allocates no entries yet.
    #[must_use]
    pub fn new(config: Config, shared: T::Shared) -> Self {
        Self::with_secret(config, shared, Secret::random())
    }

    /// An empty map that knows its keys by `secret`.
    #[must_use]
    #[expect(clippy::needless_pass_by_value, reason = "it is kept, in copies")]
    pub fn with_secret(config: Config, shared: T::Shared, secret: Secret) -> Self {
        let max_keys = config.max_keys.get();
        let large = (max_keys / SHARD_KEYS).clamp(1, MAX_SHARDS);
        let small = (max_keys / SMALL_SHARD_KEYS).clamp(1, SMALL_SHARDS);
        Self::with_shards(
            large.max(small).next_power_of_two(),
            config,
            &shared,
            secret,
        )
    }

    fn with_shards(shards: usize, config: Config, shared: &T::Shared, secret: Secret) -> Self {
        let max_keys = config.max_keys.get();
        let room = if shards == 1 {
            max_keys
        } else {
            max_keys.saturating_add(max_keys / 64 + 64)
        };
        Self {
            shards: (0..shards)
                .map(|_| Line(Mutex::new(Shard::new(shared.clone()))))
                .collect(),
            bounds: (0..shards)
                .map(|_| AtomicU64::new(NEVER.as_nanos()))
                .collect(),
            secret,
            max_keys,
            room,
            when_full: config.when_full,
            counts: Padded(Counts {
                total: AtomicUsize::new(0),
                evicted: AtomicU64::new(0),
                looked: AtomicUsize::new(0),
            }),
        }
    }

    /// What the map knows its keys by.
    #[must_use]
    #[inline]
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// The id of `key` in this map.
    #[inline(always)]
    pub fn id<K: Hash + ?Sized>(&self, key: &K) -> KeyId {
        self.secret.id(key)
    }

    /// Locks the shard of `id` and finds its entry.
    ///
    /// Whoever decides several limits at once locks their maps always in the
    /// same order, and one key of a map at a time: two keys can have one
    /// shard. Do not hold the guard over an await or over a user's code.
    #[inline(always)]
    pub fn lock(&self, id: KeyId) -> Guard<'_, T> {
        let shard = self.shards[self.index(id)].0.lock();
        let found = shard.find(id.slot());
        Guard {
            map: self,
            shard,
            id,
            found,
        }
    }

    #[inline]
    fn index(&self, id: KeyId) -> usize {
        id.0 as usize & (self.shards.len() - 1)
    }

    /// Gives every shard a copy of `shared`, one after the other: for a
    /// moment some decide by the old, some by the new.
    pub fn set_shared(&self, shared: &T::Shared) {
        for shard in &self.shards {
            let new = shared.clone();
            let old = std::mem::replace(&mut shard.0.lock().shared, new);
            // Unlocked by now, should dropping it be work.
            drop(old);
        }
    }

    /// Changes what is shared and every entry, spent ones not yet swept too,
    /// shard by shard under its lock: a change of settings that the entries
    /// have to be converted for. `change` must be short, leave the map alone
    /// and the entries' ids as they are.
    pub fn change_all(
        &self,
        mut change: impl FnMut(&mut T::Shared, &mut dyn Iterator<Item = &mut T>),
    ) {
        for (index, shard) in self.shards.iter().enumerate() {
            let mut shard = shard.0.lock();
            shard.change_all(&mut change);
            self.publish(index, &shard);
        }
    }

    /// Shows every entry to `visit`, spent ones not yet swept too, shard by
    /// shard under its lock: `visit` must be short and leave the map alone.
    pub fn for_each(&self, mut visit: impl FnMut(&T)) {
        for shard in &self.shards {
            shard.0.lock().entries().for_each(&mut visit);
        }
    }

    /// How many keys are live. Walks over all slots, one shard at a time.
    #[must_use]
    pub fn live(&self, now: Instant) -> usize {
        let mut live = 0;
        self.for_each(|entry| live += usize::from(entry.spent_at() > now));
        live
    }

    /// How many entries there are, spent ones not yet swept among them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.counts.total.load(Relaxed)
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many entries were given up before they were spent, ever.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.counts.evicted.load(Relaxed)
    }

    /// How many live keys are kept.
    #[must_use]
    pub fn max_keys(&self) -> usize {
        self.max_keys
    }

    /// How many bytes the map has allocated; what the entries themselves have
    /// is not in it.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        let slots: usize = self
            .shards
            .iter()
            .map(|shard| shard.0.lock().capacity())
            .sum();
        slots * size_of::<T>() + size_of_val(&*self.shards) + size_of_val(&*self.bounds)
    }

    /// Forgets all keys and gives their memory back, shard by shard.
    pub fn clear(&self) {
        for (index, shard) in self.shards.iter().enumerate() {
            let mut shard = shard.0.lock();
            let gone = shard.clear();
            self.publish(index, &shard);
            self.release(gone);
        }
    }

    #[inline]
    fn publish(&self, index: usize, shard: &Shard<T>) {
        let least = shard.least.as_nanos();
        // Read first: eight shards share a line, and seldom have news.
        if self.bounds[index].load(Relaxed) != least {
            self.bounds[index].store(least, Relaxed);
        }
    }

    /// Claims the right to add an entry while there are fewer than `limit`.
    fn reserve(&self, limit: usize) -> bool {
        self.counts
            .total
            .fetch_update(Relaxed, Relaxed, |total| {
                (total < limit).then_some(total + 1)
            })
            .is_ok()
    }

    fn release(&self, entries: usize) {
        if entries > 0 {
            self.counts.total.fetch_sub(entries, Relaxed);
        }
    }

    /// The shard whose first entry is spent first, but `skip`; of several,
    /// `own`, so that where all are alike each shard gives up its own and none
    /// outgrows the others.
    fn first_due(&self, own: usize, skip: Option<usize>) -> Due {
        let shards = self.bounds.len();
        let read = shards.min(BOUNDS_READ);
        let start = if read < shards {
            self.counts.looked.fetch_add(read, Relaxed)
        } else {
            0
        };
        let mut due = Due {
            shard: None,
            at: NEVER,
            next_at: NEVER,
            of_all: read == shards && skip.is_none(),
        };
        for step in 0..read {
            let index = start.wrapping_add(step) & (shards - 1);
            let at = Instant::from_nanos(self.bounds[index].load(Relaxed));
            if at > due.next_at || skip == Some(index) {
                continue;
            }
            if at < due.at || (at == due.at && index == own) {
                due.next_at = due.at;
                due.at = at;
                due.shard = Some(index);
            } else {
                due.next_at = at;
            }
        }
        due
    }
}

impl<T: Entry> fmt::Debug for KeyedMap<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyedMap")
            .field("max_keys", &self.max_keys)
            .field("when_full", &self.when_full)
            .field("len", &self.len())
            .field("evicted", &self.evicted())
            .finish_non_exhaustive()
    }
}

struct Due {
    /// `None` if no shard has anything that is ever spent.
    shard: Option<usize>,
    at: Instant,
    /// The same of the next such shard.
    next_at: Instant,
    /// Whether no shard was left out.
    of_all: bool,
}

/// A key's shard, locked: what is decided here is decided for all threads.
///
/// Dropping it unlocks.
#[must_use = "dropping the guard unlocks"]
pub struct Guard<'a, T: Entry> {
    map: &'a KeyedMap<T>,
    shard: MutexGuard<'a, Shard<T>>,
    id: KeyId,
    found: Option<usize>,
}

impl<T: Entry> Guard<'_, T> {
    fn index(&self) -> usize {
        self.map.index(self.id)
    }

    /// The key that was locked.
    #[must_use]
    #[inline]
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The shard's copy of what the map was given to share.
    #[must_use]
    #[inline]
    pub fn shared(&self) -> &T::Shared {
        &self.shard.shared
    }

    /// The shard's copy of what is shared, for what a shard notes for itself.
    #[inline]
    pub fn shared_mut(&mut self) -> &mut T::Shared {
        &mut self.shard.shared
    }

    /// The key's entry, perhaps spent.
    #[must_use]
    #[inline]
    pub fn get(&self) -> Option<&T> {
        self.found.map(|at| self.shard.get(at))
    }

    /// The key's entry, perhaps spent, to be changed in place.
    ///
    /// Its id must stay. A change that makes it spent earlier should go
    /// through [`insert`](Self::insert): until the next sweep the map would
    /// not know.
    #[must_use]
    #[inline]
    pub fn get_mut(&mut self) -> Option<&mut T> {
        self.found.map(|at| self.shard.get_mut(at))
    }

    /// The key's entry and what is shared.
    #[must_use]
    #[inline]
    pub fn parts(&mut self) -> (Option<&mut T>, &mut T::Shared) {
        self.shard.parts(self.found)
    }

    /// Puts `entry` in the place of the key's entry, or makes room for it,
    /// and returns what had to be given up for that before it was spent (the
    /// last, if several).
    ///
    /// A replaced entry costs as much as [`get_mut`](Self::get_mut). A new one
    /// sweeps some slots of the shard, and may grow it.
    ///
    /// # Errors
    ///
    /// [`Full`] if there are `max_keys` live keys and [`WhenFull::Refuse`] was
    /// chosen. With [`WhenFull::Evict`] only if at that moment other threads
    /// hold every shard that could give up something and this one is empty.
    ///
    /// # Panics
    ///
    /// In debug builds, if the entry's id is not the key's.
    #[inline]
    pub fn insert(&mut self, now: Instant, entry: T) -> Result<Option<T>, Full> {
        debug_assert_eq!(entry.id(), Some(self.id.slot()), "an entry of another key");
        match self.found {
            Some(at) => {
                self.shard.note(entry.spent_at());
                self.map.publish(self.index(), &self.shard);
                *self.shard.get_mut(at) = entry;
                Ok(None)
            }
            None => self.insert_new(now, entry),
        }
    }

    #[inline(never)]
    fn insert_new(&mut self, now: Instant, entry: T) -> Result<Option<T>, Full> {
        let map = self.map;
        let crowded = map.len() > map.max_keys / 4 * 3;
        let count = if crowded { SWEEP_MORE } else { SWEEP };
        map.release(self.shard.sweep(now, count));
        map.publish(self.index(), &self.shard);

        let evicted = self.make_room(now)?;
        let (at, freed) = self.shard.add(now, self.id.slot(), entry);
        map.release(freed);
        map.publish(self.index(), &self.shard);
        self.found = Some(at);
        Ok(evicted)
    }

    /// Reserves room for one entry: the ceiling, as the module tells.
    fn make_room(&mut self, now: Instant) -> Result<Option<T>, Full> {
        let map = self.map;
        let mut evicted = None;
        let mut skip = None;
        for look in 1..=LOOKS {
            if map.reserve(map.max_keys) {
                return Ok(evicted);
            }
            let due = map.first_due(self.index(), skip);
            let passed = due.at <= now;
            if map.when_full == WhenFull::Refuse && !passed && due.of_all {
                return Err(Full);
            }
            // Where nothing is ever spent, any shard is as good.
            let index = due.shard.unwrap_or(self.index());
            let may_evict = map.when_full == WhenFull::Evict && !passed;
            let last = look == LOOKS;
            let looked = self.with_shard(index, |shard| {
                let Survey {
                    freed,
                    least,
                    second,
                } = shard.survey(now);
                let (id, at) = least?;
                // The bound was too early, and another shard's is earlier now.
                if freed > 0 || !may_evict || (at > due.next_at && !last) {
                    return None;
                }
                let place = shard.find(id)?;
                shard.least = second;
                Some(shard.remove(place))
            });
            match looked {
                Some(Some(gone)) => {
                    map.counts.evicted.fetch_add(1, Relaxed);
                    evicted = Some(gone);
                }
                Some(None) => {}
                // Another thread holds it. If something in it may be spent,
                // nobody else has to go: ask again.
                None if passed => std::hint::spin_loop(),
                None => skip = Some(index),
            }
        }
        if map.reserve(map.max_keys) || map.reserve(map.room) {
            return Ok(evicted);
        }
        if map.when_full == WhenFull::Refuse {
            return Err(Full);
        }
        // The leeway is used up as well: the place of one goes to the other.
        let Survey { freed, least, .. } = self.shard.survey(now);
        map.release(freed);
        if map.reserve(map.room) {
            return Ok(evicted);
        }
        let (id, _) = least.ok_or(Full)?;
        let place = self.shard.find(id).ok_or(Full)?;
        let gone = self.shard.remove(place);
        map.counts.evicted.fetch_add(1, Relaxed);
        Ok(Some(gone))
    }

    /// Runs `f` on a shard, unless another thread has it: this one holds its
    /// own, and two that wait for each other would wait for ever. What `f`
    /// takes out is taken off the total.
    fn with_shard<R>(&mut self, index: usize, f: impl FnOnce(&mut Shard<T>) -> R) -> Option<R> {
        let map = self.map;
        let mut other;
        let shard = if index == self.index() {
            &mut self.shard
        } else {
            other = map.shards[index].0.try_lock()?;
            &mut other
        };
        let before = shard.len();
        let result = f(shard);
        map.publish(index, shard);
        map.release(before - shard.len());
        Some(result)
    }

    /// Forgets the key. Returns its entry, perhaps spent.
    pub fn remove(&mut self) -> Option<T> {
        let gone = self.shard.remove(self.found.take()?);
        self.map.publish(self.index(), &self.shard);
        self.map.release(1);
        Some(gone)
    }
}

impl<T: Entry> fmt::Debug for Guard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("id", &self.id)
            .field("found", &self.found.is_some())
            .finish_non_exhaustive()
    }
}
