//! The map that all tables here are.

use std::collections::HashMap;

/// Keyed by ids and by what users register, so the hash is seeded at random;
/// `ahash`, since `emit` asks several of them for each delivery.
pub(crate) type Map<K, V> = HashMap<K, V, ahash::RandomState>;
