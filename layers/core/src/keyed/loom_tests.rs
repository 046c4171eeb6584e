//! Run by
//!
//! ```text
//! RUSTFLAGS="--cfg buttress_loom" cargo test -p buttress-core --lib --release loom
//! ```

use super::*;
use crate::sync::{Arc, thread};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cell {
    id: u64,
    until: u64,
}

impl Entry for Cell {
    type Shared = ();

    fn id(&self) -> Option<SlotId> {
        SlotId::new(self.id)
    }

    fn spent_at(&self) -> Instant {
        Instant::from_nanos(self.until)
    }
}

fn map(max_keys: usize, shards: usize, when_full: WhenFull) -> Arc<KeyedMap<Cell>> {
    let config = Config {
        max_keys: NonZeroUsize::new(max_keys).unwrap(),
        when_full,
    };
    // loom replays: nothing may be random.
    let secret = Secret(ahash::RandomState::with_seeds(1, 2, 3, 4));
    Arc::new(KeyedMap::with_shards(shards, config, &(), secret))
}

/// The `n`th key of a shard.
fn id(shard: u64, n: u64) -> KeyId {
    KeyId::from_hash(((n + 1) << 40) | shard)
}

fn put(map: &KeyedMap<Cell>, id: KeyId, now: u64, until: u64) -> Result<Option<Cell>, Full> {
    let cell = Cell {
        id: id.slot().get(),
        until,
    };
    map.lock(id).insert(Instant::from_nanos(now), cell)
}

fn count(map: &KeyedMap<Cell>) -> usize {
    let mut count = 0;
    map.for_each(|_| count += 1);
    count
}

fn model(f: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(f);
}

/// One shard: the ceiling holds at every moment.
#[test]
fn loom_one_shard_is_exact() {
    model(|| {
        let map = map(2, 1, WhenFull::Evict);
        let threads = [0, 1].map(|n| {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                let gone = put(&map, id(0, n), 0, 10 + n).unwrap();
                assert!(map.len() <= 2);
                gone.is_some()
            })
        });
        let mut evicted = u64::from(put(&map, id(0, 2), 0, 12).unwrap().is_some());
        let removed = map.lock(id(0, 2)).remove().is_some();
        for thread in threads {
            evicted += u64::from(thread.join().unwrap());
        }
        assert_eq!(map.evicted(), evicted);
        assert_eq!(map.len(), count(&map));
        assert_eq!(count(&map) as u64, 3 - evicted - u64::from(removed));
    });
}

/// Two threads at the ceiling, each with a shard of its own, each in need of
/// the other's: neither waits for the other, and nobody is evicted, for one
/// spent entry is there for each.
#[test]
fn loom_two_shards_make_room_in_each_other() {
    model(|| {
        let map = map(2, 2, WhenFull::Evict);
        put(&map, id(0, 0), 0, 5).unwrap();
        put(&map, id(1, 0), 0, 5).unwrap();
        let other = Arc::clone(&map);
        let thread = thread::spawn(move || put(&other, id(1, 1), 7, 20).unwrap());
        let mine = put(&map, id(0, 1), 7, 20).unwrap();
        assert_eq!((mine, thread.join().unwrap()), (None, None));
        assert_eq!(map.evicted(), 0);
        assert_eq!(map.len(), count(&map));
        for key in [id(0, 1), id(1, 1)] {
            assert!(map.lock(key).get().is_some());
        }
    });
}

/// All are live: one is evicted for each that comes, from whichever shard, and
/// what got in above the ceiling meanwhile is made up for.
#[test]
fn loom_two_shards_evict() {
    model(|| {
        let map = map(1, 2, WhenFull::Evict);
        put(&map, id(0, 0), 0, 50).unwrap();
        let other = Arc::clone(&map);
        let thread = thread::spawn(move || {
            put(&other, id(1, 1), 7, 60).unwrap();
        });
        put(&map, id(0, 1), 7, 70).unwrap();
        thread.join().unwrap();
        assert_eq!(map.len(), count(&map));
        assert_eq!(map.len() as u64 + map.evicted(), 3);
        // Alone, an insertion brings the map back to its ceiling.
        put(&map, id(0, 2), 7, 80).unwrap();
        assert_eq!((map.len(), count(&map)), (1, 1));
    });
}
