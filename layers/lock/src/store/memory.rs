//! Locks of this process; and before those of a fleet, the line of those that
//! wait for one here.

use std::{
    collections::HashMap,
    fmt,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

#[cfg(feature = "redis")]
use buttress_core::clock::{self, Instant};
use buttress_core::{
    clock::{SystemClock, WallClock},
    key::Key,
    sync::Mutex,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};

use crate::Fence;

/// A lock for each key that is held or waited for, and for no other. Who waits
/// is in line.
pub(crate) struct Memory {
    lines: Mutex<HashMap<Key, Arc<Line>>>,
    max_keys: usize,
    /// The last token.
    last: AtomicU64,
}

/// Whose turn it is, for one key.
struct Line {
    turns: Arc<Semaphore>,
    /// Since when who has the turn is on its way out, in nanoseconds.
    #[cfg(feature = "redis")]
    leaving: AtomicU64,
}

/// It is not.
#[cfg(feature = "redis")]
const STAYS: u64 = u64::MAX;

impl Line {
    fn new() -> Self {
        Self {
            turns: Arc::new(Semaphore::new(1)),
            #[cfg(feature = "redis")]
            leaving: AtomicU64::new(STAYS),
        }
    }
}

/// `max_keys` are held, and this is another one.
#[derive(Debug)]
pub(crate) struct Full;

impl Memory {
    pub(crate) fn new(max_keys: NonZeroUsize) -> Self {
        Self {
            lines: Mutex::default(),
            max_keys: max_keys.get(),
            last: AtomicU64::new(0),
        }
    }

    /// A place in the line of `key`.
    pub(crate) fn claim(self: Arc<Self>, key: Key) -> Result<Place, Full> {
        let mut lines = self.lines.lock();
        let line = match lines.get(&key) {
            Some(line) => Arc::clone(line),
            None if lines.len() >= self.max_keys => return Err(Full),
            None => {
                let line = Arc::new(Line::new());
                lines.insert(key.clone(), Arc::clone(&line));
                line
            }
        };
        drop(lines);
        Ok(Place {
            line: Some(line),
            key,
            memory: self,
        })
    }

    /// As Redis makes them: the time, or one more than the last. So they grow
    /// over a restart, too, unless the clock is set back.
    fn token(&self) -> u64 {
        let micros = SystemClock.unix_now().as_micros();
        let now = u64::try_from(micros).unwrap_or(u64::MAX);
        let next = |last: u64| now.max(last.saturating_add(1));
        match self
            .last
            .fetch_update(Relaxed, Relaxed, |last| Some(next(last)))
        {
            Ok(last) | Err(last) => next(last),
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.lines.lock().len()
    }
}

/// A place in the line of a key, first or not.
pub(crate) struct Place {
    /// There until it is dropped.
    line: Option<Arc<Line>>,
    key: Key,
    memory: Arc<Memory>,
}

impl Place {
    fn line(&self) -> &Line {
        self.line.as_ref().expect("it is not dropped yet")
    }

    fn turns(&self) -> Arc<Semaphore> {
        Arc::clone(&self.line().turns)
    }

    /// For how long who has the turn has been giving it back, if it is.
    #[cfg(feature = "redis")]
    pub(crate) fn leaving(&self) -> Option<Duration> {
        let since = self.line().leaving.load(Relaxed);
        (since != STAYS).then(|| clock::now() - Instant::from_nanos(since))
    }

    /// Its turn, if nobody else has it.
    pub(crate) fn try_take(self) -> Result<Turn, Self> {
        match self.turns().try_acquire_owned() {
            Ok(turn) => Ok(Turn::new(turn, self)),
            Err(_) => Err(self),
        }
    }

    /// Its turn, once those before it have had theirs.
    pub(crate) async fn take(self, wait: Duration) -> Result<Turn, Self> {
        match timeout(wait, self.turns().acquire_owned()).await {
            Ok(turn) => Ok(Turn::new(turn.expect("it is never closed"), self)),
            Err(_) => Err(self),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lines = self.memory.lines.lock();
        // Given up under the lock, or two that leave at once would each count
        // the other. What is left is the map's, and nobody can get another.
        self.line = None;
        let last = |line: &Arc<_>| Arc::strong_count(line) == 1;
        if lines.get(&self.key).is_some_and(last) {
            lines.remove(&self.key);
        }
    }
}

/// To be first in line. In this order: the next one has its turn, and then
/// the place is left.
pub(crate) struct Turn {
    _turn: OwnedSemaphorePermit,
    place: Place,
}

impl Turn {
    fn new(turn: OwnedSemaphorePermit, place: Place) -> Self {
        #[cfg(feature = "redis")]
        place.line().leaving.store(STAYS, Relaxed);
        Self { _turn: turn, place }
    }

    /// It will be over soon.
    #[cfg(feature = "redis")]
    pub(crate) fn leave(&self) {
        let now = clock::now().as_nanos();
        self.place.line().leaving.store(now, Relaxed);
    }

    /// Where this process alone counts, it is the lock.
    pub(crate) fn into_lock(self) -> (Fence, Held) {
        let (held, fence) = watch::channel(());
        let fence = Fence::here(self.place.memory.token(), fence);
        let held = Held {
            _fence: held,
            _turn: self,
        };
        (fence, held)
    }
}

/// A lock that is held. In this order: first the fence is over, and then the
/// next one has its turn.
pub(crate) struct Held {
    _fence: watch::Sender<()>,
    _turn: Turn,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Place")
    }
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Turn")
    }
}

#[cfg(test)]
mod tests {
    use buttress_core::testing::settle;
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    fn memory(max_keys: usize) -> Arc<Memory> {
        Arc::new(Memory::new(max_keys.try_into().unwrap()))
    }

    fn place(memory: &Arc<Memory>, key: &str) -> Result<Place, Full> {
        Arc::clone(memory).claim(Key::from(key))
    }

    fn taken(place: Place) -> (Fence, Held) {
        place.try_take().unwrap().into_lock()
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_in_line_and_leaves_nothing_behind() {
        let memory = memory(2);
        let wait = Duration::from_secs(1);
        let (fence, held) = taken(place(&memory, "a").unwrap());
        let mut waiting: Vec<_> = (0..3)
            .map(|_| task::spawn(place(&memory, "a").unwrap().take(wait)))
            .collect();
        for one in &mut waiting {
            assert_pending!(one.poll());
        }
        assert!(place(&memory, "a").unwrap().try_take().is_err());
        // The second gives up, and the first has it, not who comes by.
        drop(waiting.remove(1));
        assert!(fence.is_held());
        drop(held);
        assert!(!fence.is_held());
        assert!(place(&memory, "a").unwrap().try_take().is_err());
        let (first, held) = assert_ready!(waiting[0].poll()).unwrap().into_lock();
        assert!(first.token() > fence.token());
        assert_pending!(waiting[1].poll());
        // A turn that is given to somebody who is dropped goes on to the next.
        let mut last = task::spawn(place(&memory, "a").unwrap().take(wait));
        assert_pending!(last.poll());
        drop(held);
        drop(waiting);
        let (_, held) = assert_ready!(last.poll()).unwrap().into_lock();
        drop(held);
        settle().await;
        drop(last);
        assert_eq!(memory.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends() {
        let memory = memory(2);
        let (_, held) = taken(place(&memory, "a").unwrap());
        let wait = Duration::from_millis(300);
        let began = tokio::time::Instant::now();
        assert!(place(&memory, "a").unwrap().take(wait).await.is_err());
        assert_eq!(began.elapsed(), wait);
        drop(held);
        assert_eq!(memory.len(), 0);
    }

    #[test]
    fn there_is_a_ceiling() {
        let memory = memory(2);
        let held: Vec<_> = ["a", "b"]
            .map(|key| taken(place(&memory, key).unwrap()))
            .into();
        assert!(place(&memory, "c").is_err());
        // For one that is there, there is room.
        assert!(place(&memory, "a").unwrap().try_take().is_err());
        drop(held);
        assert!(place(&memory, "c").unwrap().try_take().is_ok());
        assert_eq!(memory.len(), 0);
    }

    /// Two that left at once each saw the other, and neither tidied up.
    #[test]
    fn nothing_is_left_by_threads_that_leave_together() {
        let memory = memory(1);
        let barrier = std::sync::Barrier::new(4);
        let left = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..5000 {
                        let place = place(&memory, "a").ok();
                        barrier.wait();
                        drop(place.map(Place::try_take));
                        barrier.wait();
                        left.fetch_add(memory.len(), Relaxed);
                        barrier.wait();
                    }
                });
            }
        });
        assert_eq!(left.into_inner(), 0);
    }

    #[test]
    fn tokens_grow() {
        let memory = memory(2);
        let mut last = 1_700_000_000_000_000;
        for _ in 0..10_000 {
            let token = memory.token();
            assert!(token > last);
            last = token;
        }
        memory.last.store(u64::MAX - 1, Relaxed);
        assert_eq!(memory.token(), u64::MAX);
    }
}
