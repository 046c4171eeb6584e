use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;

/// The large tests are a tenth as large where nothing is optimised: they are
/// whole under `cargo test --release`.
const LARGE: u64 = if cfg!(debug_assertions) { 10 } else { 1 };

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
        let shard = shard.0.lock();
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
            KeyId::from_hash((home << 48) | ((key + 1) << 16) | (key % 61))
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

#[test]
fn a_million_keys_do_not_pass_the_ceiling() {
    for when_full in [WhenFull::Evict, WhenFull::Refuse] {
        let max_keys = 100_000 / LARGE;
        let map = map(max_keys as usize, when_full);
        let (mut refused, mut most) = (0, 0);
        for key in 0..1_000_000 / LARGE {
            // No two debts alike, those of later keys sometimes less.
            let until = 10_000_000 + key * 7_919 % 1_000_003;
            refused += u64::from(put(&map, map.id(&key), key, until).is_err());
            most = most.max(map.len());
        }
        assert_eq!(most as u64, max_keys);
        assert_eq!(map.live(at(1_000_000)) as u64, max_keys);
        assert_eq!(refused + map.evicted(), 9 * max_keys);
        assert_eq!(refused > 0, when_full == WhenFull::Refuse);
        // 16 bytes a slot; small shards, as a debug build has, are a third
        // full at least, larger ones three quarters.
        let most = if cfg!(debug_assertions) { 50 } else { 24 };
        assert!(map.allocated_bytes() as u64 <= max_keys * most);
        assert_sound(&map);
    }
}

/// Debtors that last, and others that come and go by the thousand: as long as
/// there is room for all who are live, nobody is lost.
#[test]
fn no_debtor_is_lost_below_the_ceiling() {
    const MAX: u64 = 100_000 / LARGE;
    // How many last; how many others are live at a time; how many those are.
    for (debtors, live, others) in [
        (MAX / 2, MAX / 2 - 1, 5 * MAX),
        (MAX - 1, 1, 2 * MAX),
        (MAX - MAX / 100, MAX / 100, 2 * MAX),
    ] {
        for when_full in [WhenFull::Evict, WhenFull::Refuse] {
            let map = map(MAX as usize, when_full);
            let ids: Vec<KeyId> = (0..debtors).map(|key| map.id(&key)).collect();
            for id in &ids {
                assert_eq!(put(&map, *id, 1_000, u64::MAX / 2), Ok(None));
            }
            for n in 0..others {
                let now = 1_000 + n;
                let other = map.id(&(debtors + n));
                assert_eq!(put(&map, other, now, now + live), Ok(None));
                assert!(map.len() <= map.room);
            }
            assert!(ids.iter().all(|id| holds(&map, *id)));
            assert_eq!(map.evicted(), 0);
            assert_sound(&map);
        }
    }
}

/// The bounds are all out of date, so that no look finds anything at first.
#[test]
fn bounds_out_of_date_cost_no_debtor() {
    let map = map(10_000, WhenFull::Evict);
    let ids: Vec<KeyId> = (0..9_999u64).map(|key| map.id(&key)).collect();
    for id in &ids {
        put(&map, *id, 1_000, 2_000).unwrap();
    }
    for id in &ids {
        // In place, as a limiter would: the bounds stay where they were.
        map.lock(*id).get_mut().unwrap().until = u64::MAX / 2;
    }
    for n in 0..1_000 {
        let now = 10_000 + n;
        assert_eq!(put(&map, map.id(&(10_000 + n)), now, now + 1), Ok(None));
        assert!(map.len() <= map.room);
    }
    assert!(ids.iter().all(|id| holds(&map, *id)));
    // And the leeway is given back.
    assert!(map.len() <= 10_000);
    assert_sound(&map);
}

/// A removal moves an entry from before the cursor's eyes to behind its back.
#[test]
fn a_pass_does_not_forget_what_moved_past_it() {
    let mut shard: Shard<Cell> = Shard::new(0);
    // All want slot 0 and stand in the slots 0, 1 and 2.
    for (id, until) in [(1, 100), (2, 100), (3, 50)] {
        let slot = SlotId::new(id).unwrap();
        shard.add(at(0), slot, Cell { id, until });
    }
    assert_eq!(shard.find(SlotId::new(3).unwrap()), Some(2));
    let slots = shard.capacity();
    shard.sweep(at(0), slots);
    // The next pass has seen the first two.
    shard.sweep(at(0), 2);
    assert_eq!(shard.remove(0).id, 1);
    shard.sweep(at(0), slots - 2);
    shard.sweep(at(0), 1);
    assert!(shard.least <= at(50));
    // The pass after that sees all again.
    shard.sweep(at(0), slots - 1);
    shard.sweep(at(0), 1);
    assert_eq!(shard.least, at(50));
}

/// Every table has room for what is moved into it, and is no larger than is
/// said.
#[test]
fn tables_are_as_full_as_they_say() {
    let mut shard: Shard<Cell> = Shard::new(0);
    let mut before = 0;
    for id in 1..=5_000 {
        let slot = SlotId::new(id << 32).unwrap();
        let until = 100;
        shard.add(
            at(0),
            slot,
            Cell {
                id: id << 32,
                until,
            },
        );
        let (len, slots) = (shard.len(), shard.capacity());
        assert!(slots >= before && len <= slots * 7 / 8, "{len} in {slots}");
        let most = match len {
            0..32 => len * 6,
            32..256 => (len * 3).max(32 * 6),
            _ => (len * 4).div_ceil(3).max(256 * 2),
        };
        assert!(slots <= most.max(8), "{slots} for {len}");
        before = slots;
    }
}

#[test]
fn the_least_debt_goes_first() {
    let map = map(10_000, WhenFull::Evict);
    let until = |key: u64| 1_000_000 + key * 7_919 % 10_007;
    for key in 0..10_000u64 {
        put(&map, map.id(&key), 0, until(key)).unwrap();
    }
    let mut debts: Vec<u64> = (0..10_000).map(until).collect();
    debts.sort_unstable();
    for (n, least) in debts.iter().take(5_000).enumerate() {
        let id = map.id(&(10_000 + n));
        let gone = put(&map, id, 1, u64::MAX / 2).unwrap();
        assert_eq!(gone.map(|gone| gone.until), Some(*least));
    }
    assert_sound(&map);
}

/// Where all are alike, no shard is emptied in favour of the others.
#[test]
fn equals_go_evenly() {
    let map = map(16_384, WhenFull::Evict);
    for key in 0..50_000u64 {
        put(&map, map.id(&key), 0, 1_000_000).unwrap();
    }
    let lens: Vec<usize> = map
        .shards
        .iter()
        .map(|shard| shard.0.lock().len())
        .collect();
    let (least, most) = (lens.iter().min().unwrap(), lens.iter().max().unwrap());
    // Binomial around 256, ± 16.
    assert!(*least > 170 && *most < 350, "{least}..{most}");
}

#[test]
fn tiny_maps_are_exact() {
    for max_keys in [1, 2, 10, 63] {
        let evicting = map(max_keys, WhenFull::Evict);
        let refusing = map(max_keys, WhenFull::Refuse);
        for key in 0..200u64 {
            let until = 1_000 + key;
            let gone = put(&evicting, evicting.id(&key), 0, until).unwrap();
            let refused = put(&refusing, refusing.id(&key), 0, until).is_err();
            let full = key >= max_keys as u64;
            let first = full.then(|| 1_000 + key - max_keys as u64);
            assert_eq!(gone.map(|gone| gone.until), first);
            assert_eq!(refused, full);
            assert_eq!(evicting.len(), max_keys.min(key as usize + 1));
            assert_eq!(refusing.len(), evicting.len());
        }
        // One is spent: one more is let in.
        assert_eq!(put(&refusing, refusing.id("a"), 1_000, 9_000), Ok(None));
        assert_eq!(put(&refusing, refusing.id("b"), 1_000, 9_000), Err(Full));
        // A key that is there is always welcome, spent or not.
        let newest = refusing.id("a");
        assert_eq!(put(&refusing, newest, 10_000, 20_000), Ok(None));
    }
}

#[test]
fn what_never_ends_makes_room_too() {
    for max_keys in [3, 1_000] {
        let map = map(max_keys, WhenFull::Evict);
        for key in 0..3_000u64 {
            put(&map, map.id(&key), u64::MAX, u64::MAX).unwrap();
            assert!(map.len() <= map.room);
        }
        assert!(map.evicted() >= 3_000 - map.room as u64);
        assert_sound(&map);
    }
}

/// At most 24 bytes a key on the whole way to a million and around it.
#[test]
fn a_key_costs_24_bytes_at_a_million() {
    let map = map(1_000_000, WhenFull::Evict);
    let mut worst = 0.0f64;
    for key in 0..1_000_000u64 {
        put(&map, map.id(&key), 0, 1_000 + key).unwrap();
        if key >= 700_000 && key % 10_000 == 0 {
            worst = worst.max(map.allocated_bytes() as f64 / map.len() as f64);
        }
    }
    worst = worst.max(map.allocated_bytes() as f64 / map.len() as f64);
    assert!(worst <= 22.0, "{worst}");
}

#[test]
fn memory_comes_back_after_expiry() {
    let map = map(100_000, WhenFull::Evict);
    let empty = map.allocated_bytes();
    for key in 0..100_000u64 {
        put(&map, map.id(&key), 0, 1_000).unwrap();
    }
    let full = map.allocated_bytes();
    // All are spent; some thousand new keys, whose sweeps see it.
    for key in 0..60_000u64 {
        put(&map, map.id(&(200_000 + key)), 2_000 + key, 2_010 + key).unwrap();
    }
    assert!(map.len() < 3_000, "{}", map.len());
    assert!(map.allocated_bytes() < full / 5);
    map.clear();
    assert_eq!(map.allocated_bytes(), empty);
    assert!(map.is_empty());
}

#[test]
fn a_guard_finds_what_it_put_there() {
    let map = map(100, WhenFull::Evict);
    let id = map.id("key");
    let mut guard = map.lock(id);
    assert_eq!((guard.id(), guard.get()), (id, None));
    guard.insert(at(5), cell(id, 10)).unwrap();
    assert_eq!(guard.get(), Some(&cell(id, 10)));
    guard.get_mut().unwrap().until = 20;
    assert_eq!(guard.parts(), (Some(&mut cell(id, 20)), &mut 7));
    assert_eq!(guard.remove(), Some(cell(id, 20)));
    assert_eq!(guard.get(), None);
    assert_eq!(guard.remove(), None);
    drop(guard);
    assert!(map.is_empty());
}

#[test]
fn what_is_shared_is_replaced_everywhere() {
    let map = map(10_000, WhenFull::Evict);
    map.set_shared(&8);
    assert!((0..1_000u64).all(|key| *map.lock(map.id(&key)).shared() == 8));
}

#[test]
fn a_refund_is_noticed() {
    let map = map(64, WhenFull::Refuse);
    for key in 0..64u64 {
        put(&map, map.id(&key), 0, 1_000).unwrap();
    }
    assert_eq!(put(&map, map.id(&64u64), 10, 1_000), Err(Full));
    put(&map, map.id(&7u64), 10, 10).unwrap();
    assert_eq!(put(&map, map.id(&64u64), 10, 1_000), Ok(None));
    assert!(!holds(&map, map.id(&7u64)));
}

#[test]
fn ids_keep_their_48_bits() {
    assert_eq!(SlotId::new(0), None);
    assert_eq!(SlotId::new(1 << 48), None);
    assert_eq!(SlotId::new((1 << 48) - 1).unwrap().get(), (1 << 48) - 1);
    assert_eq!(KeyId::from_hash(0).slot().get(), 1);
    assert_eq!(KeyId::from_hash(0xffff).slot().get(), 1);
    assert_eq!(KeyId::from_hash(u64::MAX).slot().get(), (1 << 48) - 1);
    assert_eq!(size_of::<Option<SlotId>>(), 8);
    // Two secrets, two ids: one chance in 2⁶⁴ to fail.
    assert_ne!(Secret::random().id("key"), Secret::random().id("key"));
}

#[test]
fn shards_are_many_enough() {
    let shards = |max_keys| map(max_keys, WhenFull::Evict).shards.len();
    assert_eq!(shards(1), 1);
    assert_eq!(shards(63), 1);
    assert_eq!(shards(64), 2);
    assert_eq!(shards(4_096), 64);
    assert_eq!(shards(100_000), 128);
    // 48 bits and these 10: the width the module tells of.
    assert_eq!(shards(1_000_000), 1024);
    assert_eq!(size_of::<Line<Mutex<Shard<Cell>>>>(), 64);
}

/// The leeway is used up, the shard that is due is held elsewhere, and the last
/// look, at the own shard, frees some: they used to stay in the count for good.
#[test]
fn what_the_last_look_frees_is_uncounted() {
    for spent in 0..8 {
        let config = Config {
            max_keys: NonZeroUsize::new(2).unwrap(),
            when_full: WhenFull::Evict,
        };
        let map: KeyedMap<Cell> = KeyedMap::with_shards(2, config, &7, Secret::random());
        let due = KeyId::from_hash(1 << 40 | 1);
        put(&map, due, 0, 5).unwrap();
        let busy = map.lock(due);
        // Spread over the shard, so that one eighth is not in the next sweep.
        let others = map.room as u64 - 1;
        for n in 0..others {
            let id = KeyId::from_hash((u64::MAX / others * n) & !0xffff);
            let until = if n * 8 / others == spent { 60 } else { 100 };
            assert_eq!(put(&map, id, 7, until), Ok(None));
        }
        assert_eq!(map.len(), map.room);
        put(&map, KeyId::from_hash(1 << 32), 60, 100).unwrap();
        drop(busy);
        assert_sound(&map);
        assert_eq!(map.evicted(), 0);
    }
}

/// Threads that come and go on one map: the counter is right, nothing is lost,
/// and what was let in above the ceiling is made up for.
#[test]
fn threads_share_the_ceiling() {
    let map = map(1_000, WhenFull::Evict);
    let debtors: Vec<KeyId> = (0..900u64).map(|key| map.id(&key)).collect();
    for id in &debtors {
        put(&map, *id, 0, u64::MAX / 2).unwrap();
    }
    std::thread::scope(|scope| {
        for thread in 1..5u64 {
            let map = &map;
            scope.spawn(move || {
                for n in 0..20_000 {
                    let id = map.id(&(thread * 1_000_000 + n));
                    // At most 4 of these are live at a time.
                    assert_eq!(put(map, id, 10, 11), Ok(None));
                    assert!(map.len() <= map.room);
                    map.lock(id).insert(at(10), cell(id, 10)).unwrap();
                }
            });
        }
    });
    assert!(debtors.iter().all(|id| holds(&map, *id)));
    assert_eq!(map.evicted(), 0);
    assert_sound(&map);
}
