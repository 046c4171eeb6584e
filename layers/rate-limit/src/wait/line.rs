//! Lines of waiting requests: who is where, and what those ahead cost.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use buttress_core::keyed::KeyId;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// The limits that apply to a request, and its key in each.
pub(super) type LineId = Box<[(usize, KeyId)]>;

/// Who waits for what.
#[derive(Default)]
pub(super) struct Lines {
    pub(super) state: Mutex<LinesState>,
}

#[derive(Default)]
pub(super) struct LinesState {
    waiting: usize,
    pub(super) lines: HashMap<LineId, Line>,
}

pub(super) struct Line {
    /// Has one permit, and hands it on in the order of asking: the front of
    /// the line.
    front: Arc<Semaphore>,
    waiting: usize,
    /// What all that wait cost, for each limit.
    ahead: Box<[u64]>,
}

impl Lines {
    pub(super) fn lock(&self) -> MutexGuard<'_, LinesState> {
        // Nothing under the lock is a user's, or panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LinesState {
    /// How many wait, in all lines.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// What those in a line cost, for each limit; `None` where nobody waits.
    pub(super) fn ahead(&self, id: &LineId) -> Option<&[u64]> {
        self.lines.get(id).map(|line| &*line.ahead)
    }

    /// Takes the last place in a line. `lines` is where `self` is.
    pub(super) fn join(&mut self, lines: &Arc<Lines>, id: LineId, costs: Box<[u32]>) -> Place {
        self.waiting += 1;
        let line = self.lines.entry(id.clone()).or_insert_with(|| Line {
            front: Arc::new(Semaphore::new(1)),
            waiting: 0,
            ahead: vec![0; costs.len()].into(),
        });
        line.waiting += 1;
        for (ahead, cost) in line.ahead.iter_mut().zip(&costs) {
            *ahead += u64::from(*cost);
        }
        Place {
            lines: Arc::clone(lines),
            front: Front::ask(&line.front),
            id,
            costs,
            left: false,
        }
    }
}

/// A place in a line, left on drop at the latest.
pub(super) struct Place {
    lines: Arc<Lines>,
    // Goes last, so that the line is as it is when the next one is in front.
    front: Front,
    id: LineId,
    costs: Box<[u32]>,
    left: bool,
}

impl Place {
    /// Waits until this place is the first.
    pub(super) async fn front(&mut self) {
        if let Front::Behind(turn) = &mut self.front {
            let permit = turn.as_mut().await;
            self.front = Front::First {
                _permit: permit.expect("the line's semaphore is never closed"),
            };
        }
    }

    /// Leaves the line, though its front is held until the drop.
    pub(super) fn leave(&mut self, state: &mut LinesState) {
        if mem::replace(&mut self.left, true) {
            return;
        }
        state.waiting -= 1;
        let Some(line) = state.lines.get_mut(&self.id) else {
            return;
        };
        line.waiting -= 1;
        if line.waiting == 0 {
            state.lines.remove(&self.id);
            return;
        }
        for (ahead, cost) in line.ahead.iter_mut().zip(&self.costs) {
            *ahead -= u64::from(*cost);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.left {
            let lines = Arc::clone(&self.lines);
            self.leave(&mut lines.lock());
        }
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place")
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

type Acquire = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

/// Whether one is the first in line.
enum Front {
    First { _permit: OwnedSemaphorePermit },
    Behind(Acquire),
}

impl Front {
    /// Asks for the front, so that the order is that of asking.
    fn ask(front: &Arc<Semaphore>) -> Self {
        let mut turn: Acquire = Box::pin(Arc::clone(front).acquire_owned());
        // A semaphore queues whom it has seen once. Nobody is to be woken yet:
        // who waits will poll again, and leave a waker then.
        match turn.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(permit) => Self::First {
                _permit: permit.expect("the line's semaphore is never closed"),
            },
            Poll::Pending => Self::Behind(turn),
        }
    }
}
