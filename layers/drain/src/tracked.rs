//! The requests in flight, by name: for the report, where the layer was told
//! to keep track.
//!
//! A list apart from the counts, and not a part of every permit: who wants only
//! to drain pays for a number.

use buttress_core::{
    clock::Instant,
    sync::{Mutex, Padded},
};
use slab::Slab;

use crate::{
    Label,
    current::ConnectionId,
    stripe::{STRIPES, stripe},
};

/// A request as the report knows it.
#[derive(Clone, Debug)]
pub(crate) struct InFlight {
    pub(crate) route: Label,
    pub(crate) since: Instant,
    pub(crate) bytes: u64,
    /// None where no server of ours called the layer.
    pub(crate) connection: Option<ConnectionId>,
}

/// By the thread that they came on, so that two threads rarely meet. A place
/// is used again: when there were as many as there ever are, no more is
/// allocated.
pub(crate) struct Tracked {
    stripes: [Padded<Mutex<Slab<InFlight>>>; STRIPES],
}

/// Where a request is written down.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    stripe: usize,
    key: usize,
}

impl Tracked {
    pub(crate) fn new() -> Self {
        Self {
            stripes: std::array::from_fn(|_| Padded(Mutex::default())),
        }
    }

    pub(crate) fn insert(&self, route: Label, since: Instant) -> Slot {
        let stripe = stripe();
        let request = InFlight {
            route,
            since,
            bytes: 0,
            connection: ConnectionId::current(),
        };
        let key = self.stripes[stripe].lock().insert(request);
        Slot { stripe, key }
    }

    pub(crate) fn route(&self, slot: Slot) -> Option<Label> {
        let stripe = self.stripes[slot.stripe].lock();
        stripe.get(slot.key).map(|request| request.route.clone())
    }

    pub(crate) fn sent(&self, slot: Slot, bytes: u64) {
        if let Some(request) = self.stripes[slot.stripe].lock().get_mut(slot.key) {
            request.bytes += bytes;
        }
    }

    pub(crate) fn remove(&self, slot: Slot) {
        let gone = self.stripes[slot.stripe].lock().try_remove(slot.key);
        drop(gone);
    }

    pub(crate) fn snapshot(&self) -> Vec<InFlight> {
        let mut all = Vec::new();
        for stripe in &self.stripes {
            let stripe = stripe.lock();
            all.extend(stripe.iter().map(|(_, request)| request.clone()));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use buttress_core::clock;

    use super::*;

    #[test]
    fn what_is_there_is_told_wherever_it_came() {
        let tracked = Tracked::new();
        let insert = |route: &'static str| tracked.insert(route.into(), clock::now());
        let here = insert("/here");
        let there = std::thread::scope(|scope| scope.spawn(|| insert("/there")).join().unwrap());
        tracked.sent(there, 5);
        tracked.sent(there, 2);
        let mut all = tracked.snapshot();
        all.sort_by_key(|request| request.bytes);
        let told: Vec<_> = all.iter().map(|r| (r.route.as_str(), r.bytes)).collect();
        assert_eq!(told, [("/here", 0), ("/there", 7)]);
        tracked.remove(there);
        tracked.remove(here);
        assert!(tracked.snapshot().is_empty());
    }
}
