//! What all ways to share a limit stand on: the server, the names of the keys
//! there, and what this process knows of them.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use buttress_core::{clock, key, keyed::KeyId};
use buttress_redis::{Error, ErrorKind, Family, Key, Redis};
use sha2::{Digest, Sha256};

use super::ask::{self, FleetAsk};
use crate::{
    Gcra,
    gcra::Tat,
    store::{Decision, Detail, Table, Verdict},
};

/// The namespace of the keys.
const NAMESPACE: &str = "rate-limit";

/// How many keys share one count of what made them forgotten.
const EPOCHS: usize = 64;

/// Redis, and the tables that hold what this process last heard of its keys.
///
/// A table's arrival times are on this process's own clock, and never later
/// than those in Redis were, but for a trip where that is short: what they
/// refuse Redis would refuse, or would have a trip before.
pub(crate) struct Ground {
    pub(crate) redis: Redis,
    pub(crate) tables: Arc<[Table]>,
    /// For each table the keys that it has in Redis.
    families: Box<[Family]>,
    /// Whether charges are given back by responses, so that what is refused
    /// now may pass at any time.
    gives_back: bool,
    epochs: [AtomicU64; EPOCHS],
}

/// The answer did not come.
#[derive(Clone, Debug)]
pub(crate) enum Unanswered {
    /// It was not asked for this, or who asked is gone with his runtime and
    /// connection.
    Unasked,
    /// It was asked, or may have been: there was no time left to hear it, or it
    /// makes no sense.
    Unheard,
    Failed(Error),
}

impl Unanswered {
    /// Whether what was asked for is still to be charged.
    pub(crate) fn is_owed(&self) -> bool {
        match self {
            Self::Unasked => true,
            Self::Unheard => false,
            // A server that was stopped does what it was sent when it goes on.
            // What went down with its connection more likely was not done.
            Self::Failed(error) => !error.may_be_done() || error.kind() == ErrorKind::Connection,
        }
    }
}

impl From<Error> for Unanswered {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// When a key's quota is whole again, and what time it is, on one clock.
pub(crate) type Stand = (Tat, u64);

/// When the server was asked: what it says is learnt only if nothing was given
/// back since.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Since {
    epoch: u64,
}

impl Ground {
    pub(crate) fn new(redis: Redis, tables: Arc<[Table]>, name: &str, gives_back: bool) -> Self {
        // Across slots others give back, too, what was not charged to all.
        let gives_back = gives_back || (redis.is_cluster() && tables.len() > 1);
        let space = redis.keyspace(NAMESPACE);
        let family = |table: &Table| space.family([name], &*table.name);
        Self {
            families: tables.iter().map(family).collect(),
            redis,
            tables,
            gives_back,
            epochs: [const { AtomicU64::new(0) }; EPOCHS],
        }
    }

    /// `{prefix}rate-limit:{layer:key}:limit`, the key being 128 bits of the
    /// SHA-256 of what it is: what a client is known by is not for everyone
    /// who can look into Redis. Limits by one key are on one node.
    pub(crate) fn key(&self, ask: &FleetAsk) -> Key {
        self.key_of(ask.limit, &ask.key)
    }

    pub(crate) fn key_of(&self, limit: usize, key: &key::Key) -> Key {
        let digest = Sha256::digest(key.as_bytes());
        let mut text = [0; 22];
        base64_url(&digest[..16], &mut text);
        self.families[limit].key(text)
    }

    /// What was last heard of a key; no later than it is.
    pub(crate) fn known(&self, ask: &FleetAsk, now: clock::Instant) -> Tat {
        self.tables[ask.limit].known(ask.id, now)
    }

    /// What was last heard of a key, if by that a charge of `cost` is refused.
    pub(crate) fn refused(
        &self,
        limit: usize,
        id: KeyId,
        gcra: &Gcra,
        cost: u32,
        now: clock::Instant,
    ) -> Option<Tat> {
        if self.gives_back {
            return None;
        }
        let known = self.tables[limit].known(id, now);
        (gcra.pass(known, now.as_nanos(), cost).is_none()).then_some(known)
    }

    pub(crate) fn since(&self, id: KeyId) -> Since {
        let epoch = self.epoch(id).load(Ordering::Acquire);
        Since { epoch }
    }

    fn epoch(&self, id: KeyId) -> &AtomicU64 {
        #[expect(clippy::cast_possible_truncation, reason = "the low bits are meant")]
        let index = id.slot().get() as usize % EPOCHS;
        &self.epochs[index]
    }

    /// Remembers what the server said that was asked `since`: `tat` on our
    /// clock, as if the answer were as old as the question.
    pub(crate) fn learn(
        &self,
        limit: usize,
        id: KeyId,
        tat: Tat,
        now: clock::Instant,
        since: Since,
    ) {
        if self.epoch(id).load(Ordering::Acquire) == since.epoch {
            self.tables[limit].learn(id, tat, now);
        }
    }

    /// Learns nothing that the server was asked before.
    pub(crate) fn distrust(&self, id: KeyId) {
        self.epoch(id).fetch_add(1, Ordering::AcqRel);
    }

    /// Forgets what was heard of a key, and what is about to be heard of it.
    pub(crate) fn forget(&self, limit: usize, id: KeyId) {
        self.distrust(id);
        self.tables[limit].forget(id);
    }

    /// Whether what is refused now stays refused until time has paid for it.
    pub(crate) fn is_sure(&self) -> bool {
        !self.gives_back
    }

    /// The refusal that is certain by what this process knows, if it is.
    pub(crate) fn foresee(&self, asks: &[FleetAsk], detail: Detail) -> Option<Decision> {
        let now = clock::now();
        if self.gives_back {
            // Only what never fits is certain.
            if asks.iter().all(|ask| ask.cost <= ask.gcra.burst()) {
                return None;
            }
        }
        if let [ask] = asks
            && ask
                .gcra
                .pass(self.known(ask, now), now.as_nanos(), ask.cost)
                .is_some()
        {
            return None;
        }
        let mut states: Vec<Tat> = asks.iter().map(|ask| self.known(ask, now)).collect();
        let decision = ask::decide(asks, &mut states, now.as_nanos(), detail);
        match decision.verdict {
            Verdict::Pass => None,
            Verdict::Wait { .. } if self.gives_back => None,
            _ => Some(decision),
        }
    }
}

/// Base64 of URLs without padding: as short as the characters go that a key
/// keeps as they are.
fn base64_url(bytes: &[u8], out: &mut [u8]) {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    for (chunk, digits) in bytes.chunks(3).zip(out.chunks_mut(4)) {
        let mut word = 0_u32;
        for index in 0..3 {
            word = word << 8 | u32::from(chunk.get(index).copied().unwrap_or(0));
        }
        for (index, digit) in digits.iter_mut().enumerate() {
            *digit = DIGITS[(word >> (18 - 6 * index)) as usize & 63];
        }
    }
}
