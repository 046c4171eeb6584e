use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;

/// An entry that is live until a moment, as a rate limiter's is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cell {
    id: u64,
    until: u64,
}

impl Entry for Cell {
    type Shared = u32;

    fn id(&self) -> Option<SlotId> {
        SlotId::new(self.id)
    }

    fn spent_at(&self) -> Instant {
        at(self.until)
    }
}

fn at(nanos: u64) -> Instant {
    Instant::from_nanos(nanos)
}

fn cell(id: KeyId, until: u64) -> Cell {
    Cell {
        id: id.slot().get(),
        until,
    }
}

fn map(max_keys: usize, when_full: WhenFull) -> KeyedMap<Cell> {
    let config = Config {
        max_keys: NonZeroUsize::new(max_keys).unwrap(),
        when_full,
    };
    let seeds = ahash::RandomState::with_seeds(1, 2, 3, 4);
    KeyedMap::with_secret(config, 7, Secret(seeds))
}

/// Puts the key in, whatever was there.
fn put(map: &KeyedMap<Cell>, id: KeyId, now: u64, until: u64) -> Result<Option<Cell>, Full> {
    map.lock(id).insert(at(now), cell(id, until))
}

fn holds(map: &KeyedMap<Cell>, id: KeyId) -> bool {
    map.lock(id).get().is_some()
}

/// What must be so after whatever was done.
fn assert_sound(map: &KeyedMap<Cell>) {
    let mut seen = HashSet::new();
    for (index, shard) in map.shards.iter().enumerate() {
        let shard = shard.lock();
        assert!(shard.len() <= shard.capacity() * 7 / 8);
        let bound = map.bounds[index].load(Relaxed);
        for entry in shard.entries() {
            assert!(entry.until >= bound, "a bound is never late");
            assert!(seen.insert((index, entry.id)), "one slot a key");
        }
        assert_eq!(shard.len(), shard.entries().count());
    }
    assert_eq!(map.len(), seen.len());
    assert!(map.len() <= map.room);
}

#[derive(Clone, Debug)]
enum Op {
    Put { key: u16, span: u64 },
    Longer { key: u16, by: u64 },
    Remove { key: u16 },
    Forward(u64),
    Back(u64),
    Clear,
}

fn ops(keys: u16) -> impl Strategy<Value = Vec<Op>> {
    let key = 0..keys;
    let op = prop_oneof![
        8 => (key.clone(), 0..200u64).prop_map(|(key, span)| Op::Put { key, span }),
        4 => (key.clone(), 0..200u64).prop_map(|(key, by)| Op::Longer { key, by }),
        2 => key.prop_map(|key| Op::Remove { key }),
        4 => (0..60u64).prop_map(Op::Forward),
        1 => (0..60u64).prop_map(Op::Back),
        1 => (200..500u64).prop_map(Op::Forward),
    ];
    // Rarely, or nothing would ever fill.
    let op = prop_oneof![200 => op, 1 => Just(Op::Clear)];
    prop::collection::vec(op, 1..600)
}

/// What the naive model knows of a key.
#[derive(Clone, Copy, Debug)]
struct Known {
    until: u64,
    /// It was spent at some moment, though the clock may have gone back
    /// since: the map was free to forget it.
    may_go: bool,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Against a hash map that forgets nothing: what the map no longer has was
    /// spent once, or was given up when it had to be, as the least of all.
    #[test]
    fn it_is_a_map_that_forgets_only_what_it_may(
        max_keys in prop_oneof![1..5usize, 30..40usize, 64..80usize, 250..270usize],
        refuse in any::<bool>(),
        // Few homes: ids that collide.
        homes in prop_oneof![Just(1u64), Just(3), Just(1 << 12)],
        ops in ops(320),
    ) {
        let when_full = if refuse { WhenFull::Refuse } else { WhenFull::Evict };
        let map = map(max_keys, when_full);
        let id = |key: u16| {
            let key = u64::from(key);
            let home = (key % homes) * (u64::from(u16::MAX) / homes);
            KeyId::from_hash(home << 48 | (key + 1) << 16 | key % 61)
        };
        let mut model: HashMap<KeyId, Known> = HashMap::new();
        let mut now = 1_000u64;
        let mut evicted = 0;
        for op in ops {
            match op {
                Op::Put { key, span } => {
                    let (id, until) = (id(key), now + span);
                    // A clock that went back brings the spent to life again,
                    // but the map may have forgotten them: who is live for
                    // sure, and who at most.
                    let others = model.iter().filter(|(other, _)| **other != id);
                    let (mut at_most, mut least) = (0, u64::MAX);
                    for (_, known) in others {
                        at_most += usize::from(known.until > now);
                        if !known.may_go {
                            least = least.min(known.until);
                        }
                    }
                    let was_there = holds(&map, id);
                    match put(&map, id, now, until) {
                        Ok(gone) => {
                            if let Some(gone) = gone {
                                prop_assert!(!refuse && !was_there);
                                prop_assert!(at_most >= max_keys, "nobody had to go");
                                prop_assert!(gone.until <= least, "it was not the least");
                                let before = model.len();
                                model.retain(|id, _| id.slot().get() != gone.id);
                                prop_assert_eq!(model.len() + 1, before);
                                evicted += 1;
                            }
                            model.insert(id, Known { until, may_go: until <= now });
                            prop_assert!(holds(&map, id));
                        }
                        Err(Full) => {
                            prop_assert!(refuse && !was_there);
                            prop_assert!(at_most >= max_keys, "there was room");
                        }
                    }
                }
                Op::Longer { key, by } => {
                    if let Some(entry) = map.lock(id(key)).get_mut() {
                        entry.until += by;
                        let known = model.get_mut(&id(key)).unwrap();
                        known.until += by;
                        known.may_go = known.until <= now;
                    }
                }
                Op::Remove { key } => {
                    let gone = map.lock(id(key)).remove();
                    let known = model.remove(&id(key));
                    if let Some(gone) = gone {
                        prop_assert_eq!(gone.until, known.unwrap().until);
                    }
                    prop_assert!(!holds(&map, id(key)));
                }
                Op::Forward(by) => now += by,
                Op::Back(by) => now -= by.min(now),
                Op::Clear => {
                    map.clear();
                    model.clear();
                    prop_assert_eq!(map.len(), 0);
                }
            }
            for known in model.values_mut() {
                known.may_go |= known.until <= now;
            }
            for (id, known) in &model {
                let found = map.lock(*id).get().copied();
                if let Some(found) = found {
                    prop_assert_eq!(found, cell(*id, known.until));
                } else {
                    prop_assert!(known.may_go, "lost");
                }
            }
            prop_assert!(map.len() <= max_keys);
            prop_assert_eq!(map.evicted(), evicted);
            assert_sound(&map);
        }
    }
}
