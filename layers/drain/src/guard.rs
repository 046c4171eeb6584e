//! What is waited for: connections, servers, and work of one's own.

#[cfg(feature = "serve")]
use std::mem;
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use buttress_core::{
    clock::{self, Instant},
    sync::Mutex,
};

#[cfg(feature = "serve")]
use slab::Slab;

use crate::{DrainSignal, Label, Phase, Reached, ledger::Kind, shutdown::Inner};

/// Work of one's own that the drain waits for until it is dropped: a job taken
/// from a queue, a task that was spawned.
///
/// ```
/// use buttress_drain::Shutdown;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let shutdown = Shutdown::builder().build()?;
/// let job = shutdown.guard("export");
/// assert_eq!(shutdown.guards(), 1);
/// drop(job);
/// assert_eq!(shutdown.guards(), 0);
/// # Ok(())
/// # }
/// ```
#[must_use = "dropping the guard ends what it guards"]
pub struct Guard {
    inner: Arc<Inner>,
    slot: usize,
}

/// A guard as the report knows it.
#[derive(Clone, Debug)]
pub(crate) struct Guarded {
    pub(crate) label: Label,
    pub(crate) since: Instant,
}

impl Guard {
    /// Counted in before the phase is looked at: whoever was let in is waited
    /// for.
    pub(crate) fn take(inner: &Arc<Inner>, label: Label) -> (Self, Phase) {
        let phase = inner.books.ledger.enter(Kind::Guard);
        let since = clock::now();
        let slot = inner.guards.lock().insert(Guarded { label, since });
        let inner = Arc::clone(inner);
        (Self { inner, slot }, phase)
    }

    /// What tells it of the notice and of the cut.
    #[must_use]
    pub fn signal(&self) -> DrainSignal {
        DrainSignal::new(Arc::clone(&self.inner))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let gone = self.inner.guards.lock().try_remove(self.slot);
        self.inner.leave(Kind::Guard);
        drop(gone);
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ConnectionState {
    /// Nothing that would be lost with it: no request, or none yet.
    Idle = 0,
    /// A request or several.
    Busy = 1,
    /// It was upgraded, and is a tunnel now.
    Upgraded = 2,
}

/// A connection: the drain waits until it is dropped, and tells it when it is
/// cut. For servers; held by what owns the socket, so that an upgraded
/// connection still counts.
#[must_use = "dropping the guard ends the connection's count"]
pub struct ConnectionGuard {
    inner: Arc<Inner>,
    record: Arc<Connection>,
    slot: usize,
}

/// A connection as the report knows it.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) since: Instant,
    bytes: AtomicU64,
    state: AtomicU8,
    route: Mutex<Option<Label>>,
    /// Over HTTP/2.
    #[cfg(feature = "serve")]
    tunnels: Mutex<Option<Box<Tunnels>>>,
    #[cfg(feature = "serve")]
    pub(crate) traffic: crate::io::Traffic,
}

/// A stream that was turned into a tunnel.
#[derive(Clone, Debug)]
pub(crate) struct Tunnel {
    pub(crate) label: Option<Label>,
    pub(crate) since: Instant,
}

/// Those of one connection.
#[cfg(feature = "serve")]
#[derive(Debug, Default)]
struct Tunnels {
    open: Slab<Tunnel>,
    /// The last of which this end has sent all that it will. Whether the other
    /// end has, too, hyper tells nobody.
    half: Option<Tunnel>,
}

impl Connection {
    pub(crate) fn state(&self) -> ConnectionState {
        match self.state.load(Relaxed) {
            #[cfg(feature = "serve")]
            0 if self.traffic.is_busy() => ConnectionState::Busy,
            0 => ConnectionState::Idle,
            1 => ConnectionState::Busy,
            _ => ConnectionState::Upgraded,
        }
    }

    #[cfg(feature = "serve")]
    pub(crate) fn upgraded(&self, route: Option<Label>) {
        self.state.store(ConnectionState::Upgraded as u8, Relaxed);
        if route.is_some() {
            let old = mem::replace(&mut *self.route.lock(), route);
            drop(old);
        }
    }

    #[cfg(feature = "serve")]
    pub(crate) fn tunnel_begins(&self, label: Option<Label>) -> usize {
        let since = clock::now();
        let mut tunnels = self.tunnels.lock();
        let tunnels = tunnels.get_or_insert_default();
        tunnels.open.insert(Tunnel { label, since })
    }

    #[cfg(feature = "serve")]
    pub(crate) fn tunnel_sent(&self, key: usize) {
        let mut old = None;
        if let Some(tunnels) = &mut *self.tunnels.lock() {
            let half = tunnels.open.try_remove(key);
            old = mem::replace(&mut tunnels.half, half);
        }
        drop(old);
    }

    /// Whether there may be a tunnel whose other end still sends.
    #[cfg(feature = "serve")]
    pub(crate) fn has_half_a_tunnel(&self) -> bool {
        let tunnels = self.tunnels.lock();
        tunnels.as_ref().is_some_and(|all| all.half.is_some())
    }

    /// hyper has ended it, with all that was on it.
    #[cfg(feature = "serve")]
    pub(crate) fn has_no_tunnels(&self) {
        let old = self.tunnels.lock().take();
        drop(old);
    }

    /// Those in streams of it; of halves the last, where it is all that keeps
    /// the connection.
    #[cfg(feature = "serve")]
    pub(crate) fn tunnels(&self) -> Vec<Tunnel> {
        let busy = self.traffic.is_busy();
        let tunnels = self.tunnels.lock();
        let Some(tunnels) = tunnels.as_ref() else {
            return Vec::new();
        };
        let half = tunnels.half.iter().filter(|_| !busy);
        let open = tunnels.open.iter().map(|(_, tunnel)| tunnel);
        open.chain(half).cloned().collect()
    }

    #[cfg(not(feature = "serve"))]
    pub(crate) const fn tunnels(&self) -> Vec<Tunnel> {
        Vec::new()
    }

    /// Whether these are all the requests on it.
    pub(crate) fn is_named_by(&self, requests: usize) -> bool {
        #[cfg(feature = "serve")]
        let open = self.traffic.load().open as usize;
        #[cfg(not(feature = "serve"))]
        let open = 0;
        requests >= open.max(1)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    pub(crate) fn route(&self) -> Option<Label> {
        self.route.lock().clone()
    }
}

impl ConnectionGuard {
    pub(crate) fn take(inner: &Arc<Inner>) -> Self {
        inner.books.ledger.enter(Kind::Connection);
        inner.metrics.connection_begins();
        let record = Arc::new(Connection {
            since: clock::now(),
            bytes: AtomicU64::new(0),
            state: AtomicU8::new(ConnectionState::Idle as u8),
            route: Mutex::new(None),
            #[cfg(feature = "serve")]
            tunnels: Mutex::new(None),
            #[cfg(feature = "serve")]
            traffic: crate::io::Traffic::default(),
        });
        let slot = inner.connections.lock().insert(Arc::clone(&record));
        let inner = Arc::clone(inner);
        Self {
            inner,
            record,
            slot,
        }
    }

    /// Counts bytes that were written to the socket, for the report.
    #[inline]
    pub fn wrote(&self, bytes: u64) {
        self.record.bytes.fetch_add(bytes, Relaxed);
    }

    /// The bytes written so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.record.bytes()
    }

    /// Says what it is doing. Idle at first; a connection that is idle when it
    /// is cut is not reported, and not held against the drain.
    #[inline]
    pub fn set_state(&self, state: ConnectionState) {
        self.record.state.store(state as u8, Relaxed);
    }

    /// What it was last said to be doing.
    #[must_use]
    pub fn state(&self) -> ConnectionState {
        self.record.state()
    }

    #[cfg(feature = "serve")]
    #[inline]
    pub(crate) fn phase(&self) -> Phase {
        self.inner.phase()
    }

    #[cfg(feature = "serve")]
    pub(crate) const fn shared(&self) -> (&Arc<Inner>, &Arc<Connection>) {
        (&self.inner, &self.record)
    }

    /// Names what it serves, for the report: where it was upgraded to, say.
    pub fn set_route(&self, route: impl Into<Label>) {
        let old = self.record.route.lock().replace(route.into());
        drop(old);
    }

    /// How long ago it was made.
    #[must_use]
    pub fn age(&self) -> Duration {
        clock::now() - self.record.since
    }

    /// Whether it is to be cut: one atomic load, for every read and write.
    #[must_use]
    #[inline]
    pub fn is_cut(&self) -> bool {
        self.inner.phase() >= Phase::Cut
    }

    /// Ready when it is to be cut.
    #[must_use]
    pub fn cut(&self) -> Reached {
        Reached::new(Arc::clone(&self.inner), Phase::Cut)
    }

    /// What tells it of the notice, too.
    #[must_use]
    pub fn signal(&self) -> DrainSignal {
        DrainSignal::new(Arc::clone(&self.inner))
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let gone = self.inner.connections.lock().try_remove(self.slot);
        self.inner.metrics.connection_ends();
        self.inner.leave(Kind::Connection);
        drop(gone);
    }
}

impl fmt::Debug for ConnectionGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionGuard")
            .field("state", &self.state())
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

/// A server with a listener: the drain goes on from
/// [`Closing`](Phase::Closing) to [`Closed`](Phase::Closed) when all of them
/// have dropped theirs.
///
/// It is told by [`closing`](Self::closing), accepts what waits in its backlog,
/// drops its listener and says so. Dropping the guard says the same.
#[must_use = "dropping the guard says that the listener is closed"]
pub struct ServerGuard {
    inner: Arc<Inner>,
    name: Label,
    /// None when the listener is closed.
    slot: Option<usize>,
}

impl ServerGuard {
    pub(crate) fn take(inner: &Arc<Inner>, name: Label) -> Self {
        inner.books.ledger.enter(Kind::Listener);
        let slot = Some(inner.servers.lock().insert(name.clone()));
        let inner = Arc::clone(inner);
        Self { inner, name, slot }
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &Label {
        &self.name
    }

    /// Ready when the listener is to be closed.
    #[must_use]
    pub fn closing(&self) -> Reached {
        Reached::new(Arc::clone(&self.inner), Phase::Closing)
    }

    /// Says that the listener is closed; once is enough.
    pub fn listener_closed(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.inner.servers.lock().try_remove(slot);
            self.inner.leave(Kind::Listener);
        }
    }

    /// Says that the server has failed: the report has it, and the exit code is
    /// 1. It triggers nothing.
    pub fn failed(&self, error: impl fmt::Display) {
        let why = error.to_string();
        self.inner.server_failed(self.name.clone(), why);
    }
}

impl Drop for ServerGuard {
    fn drop(&mut self) {
        self.listener_closed();
    }
}

impl fmt::Debug for ServerGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerGuard")
            .field("name", &self.name)
            .field("listening", &self.slot.is_some())
            .finish_non_exhaustive()
    }
}
