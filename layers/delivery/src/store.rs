//! Where accepted deliveries outlive the process.

use std::{fmt, pin::Pin, sync::Arc, time::Duration};

use buttress_core::{BoxError, sync::Mutex};

use crate::{Cause, Message, RegistrationId, Scope, map::Map};

/// What a delivery is known by: 128 bits, unlike those of all others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeliveryId(u128);

impl DeliveryId {
    /// The id of these bits: for a store that reads it back.
    #[must_use]
    pub const fn from_u128(bits: u128) -> Self {
        Self(bits)
    }

    /// Its bits.
    #[must_use]
    pub const fn as_u128(self) -> u128 {
        self.0
    }
}

impl fmt::Display for DeliveryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dlv_{:032x}", self.0)
    }
}

impl fmt::Debug for DeliveryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A delivery as a store keeps it: one message to one registration.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its id.
    pub id: DeliveryId,
    /// To whom.
    pub registration: RegistrationId,
    /// The registration's scope.
    pub scope: Scope,
    /// What is sent.
    pub message: Arc<Message>,
    /// How many attempts are behind it.
    pub attempts: u32,
    /// When the next is due, since the Unix epoch; zero before the first.
    pub due: Duration,
}

/// A delivery that has failed for good, kept until it is sent again or
/// dropped.
///
/// Holds neither secrets nor headers nor the url: these are the registration's.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The delivery.
    pub record: Record,
    /// Why there was no other attempt.
    pub cause: Cause,
    /// When that was, since the Unix epoch.
    pub died: Duration,
}

impl DeadLetter {
    /// A letter that a store has kept.
    #[must_use]
    pub const fn new(record: Record, cause: Cause, died: Duration) -> Self {
        Self {
            record,
            cause,
            died,
        }
    }
}

/// What a store has kept.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// What was accepted and is not over, in the order in which it was
    /// accepted.
    pub records: Vec<Record>,
    /// The dead letters, the oldest first.
    pub letters: Vec<DeadLetter>,
}

/// What a store does, boxed so that it can be any.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send + 'a>>;

/// Keeps what was accepted until it is over: the seam for Redis or SQL.
/// [`MemoryStore`] is the default.
///
/// The schedule is the worker's and in memory; a store is written to when a
/// delivery is accepted (before [`emit`](crate::Webhooks::emit) says so), after
/// each attempt that failed, and when it is over, and it is read once, when the
/// worker starts. So it serves one process at a time. What it has kept for a
/// registration whose id is not there waits an hour for it, and is a dead letter
/// then.
///
/// What it says of [`accept`](Self::accept) goes to the caller. Elsewhere an
/// error is logged, and the delivery goes on in memory: after a crash the
/// receiver may then see it again, and knows it by its id.
///
/// Futures may be dropped where they wait, when the worker is cut off: the same
/// is then asked again. One that hangs holds up no attempt; as soon as more
/// changes wait for it than the queue has places, 1024 at least, nothing is
/// accepted any more.
pub trait DeliveryStore: Send + Sync + 'static {
    /// Keeps these, all or none.
    fn accept(&self, records: Vec<Record>) -> StoreFuture<'_, ()>;

    /// Notes that an attempt failed: how many there were, and when the next is
    /// due, since the Unix epoch.
    fn retry(&self, id: DeliveryId, attempts: u32, due: Duration) -> StoreFuture<'_, ()>;

    /// Forgets a delivery: it was delivered, or taken back.
    fn settle(&self, id: DeliveryId) -> StoreFuture<'_, ()>;

    /// Keeps a dead letter in the place of its delivery, where there is one.
    fn bury(&self, letter: DeadLetter) -> StoreFuture<'_, ()>;

    /// Forgets a dead letter: it was dropped, or is accepted anew under
    /// another id.
    fn drop_letter(&self, id: DeliveryId) -> StoreFuture<'_, ()>;

    /// All that it keeps.
    fn load(&self) -> StoreFuture<'_, Kept>;
}

/// Keeps deliveries in memory: what is accepted survives the worker and the
/// [`Webhooks`](crate::Webhooks) that share it, not the process. Cheap to
/// clone; the clones are one store.
///
/// As large as the queue and the dead letters, whose bodies it shares.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore(Arc<Mutex<Memory>>);

#[derive(Debug, Default)]
struct Memory {
    next: u64,
    records: Map<DeliveryId, (u64, Record)>,
    letters: Map<DeliveryId, (u64, DeadLetter)>,
}

impl MemoryStore {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many deliveries it keeps, and how many dead letters.
    #[must_use]
    pub fn len(&self) -> (usize, usize) {
        let memory = self.0.lock();
        (memory.records.len(), memory.letters.len())
    }

    /// Whether it keeps nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == (0, 0)
    }

    fn write<'a>(&self, change: impl FnOnce(&mut Memory)) -> StoreFuture<'a, ()> {
        change(&mut self.0.lock());
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Memory {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl DeliveryStore for MemoryStore {
    fn accept(&self, records: Vec<Record>) -> StoreFuture<'_, ()> {
        self.write(|memory| {
            for record in records {
                let number = memory.number();
                memory.records.insert(record.id, (number, record));
            }
        })
    }

    fn retry(&self, id: DeliveryId, attempts: u32, due: Duration) -> StoreFuture<'_, ()> {
        self.write(|memory| {
            if let Some((_, record)) = memory.records.get_mut(&id) {
                record.attempts = attempts;
                record.due = due;
            }
        })
    }

    fn settle(&self, id: DeliveryId) -> StoreFuture<'_, ()> {
        self.write(|memory| drop(memory.records.remove(&id)))
    }

    fn bury(&self, letter: DeadLetter) -> StoreFuture<'_, ()> {
        self.write(|memory| {
            memory.records.remove(&letter.record.id);
            let number = memory.number();
            memory.letters.insert(letter.record.id, (number, letter));
        })
    }

    fn drop_letter(&self, id: DeliveryId) -> StoreFuture<'_, ()> {
        self.write(|memory| drop(memory.letters.remove(&id)))
    }

    fn load(&self) -> StoreFuture<'_, Kept> {
        fn in_order<T: Clone>(map: &Map<DeliveryId, (u64, T)>) -> Vec<T> {
            let mut all: Vec<&(u64, T)> = map.values().collect();
            all.sort_unstable_by_key(|(number, _)| *number);
            all.into_iter().map(|(_, kept)| kept.clone()).collect()
        }
        let memory = self.0.lock();
        let kept = Kept {
            records: in_order(&memory.records),
            letters: in_order(&memory.letters),
        };
        Box::pin(std::future::ready(Ok(kept)))
    }
}
