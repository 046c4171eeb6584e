//! One endpoint of a route: its connections, and how much is in flight.
//!
//! Connections are pooled here, and not by hyper-util's legacy client, because
//! that one pools by the authority of the request: keeping the client's `Host`
//! would split its pool, and on HTTP/2 `:authority` could not be kept at all.

use std::{
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress::{
    circuit_breaker::{Breaker, CircuitOpen, Permit, State},
    classify::Verdict,
    clock::{self, Instant},
};
use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;

use crate::{
    body::Outgoing,
    settings::{Protocol, Upstream},
};

/// How long a connection may lie idle. Below the five seconds after which the
/// most impatient of common servers close theirs: a request on a connection
/// that is just being closed is lost, unless it may go again.
const IDLE: Duration = Duration::from_secs(4);

/// How long connecting may take. A host that is gone answers nothing at all,
/// and would look like the least loaded of all for as long.
pub(crate) const CONNECT: Duration = Duration::from_secs(2);

/// How many idle connections are kept for a burst to come.
const MAX_IDLE: usize = 1024;

/// How long an endpoint that could not be reached is passed over. It has
/// nothing in flight, and would otherwise look like the least loaded of all.
const REST: Duration = Duration::from_secs(1);

/// How much of one response an HTTP/2 upstream may send ahead of its client.
const STREAM_WINDOW: u32 = 256 << 10;

/// What all responses on a connection together may: as much as HTTP/2 can say.
/// They share it, so that under any less a few clients that do not read would
/// bring everyone else's responses to a halt; memory is bounded by each stream.
const MAX_WINDOW: u32 = (1 << 31) - 1;

/// How much the fields of a response may come to on HTTP/2, and how many they
/// may be on HTTP/1.1: what its upstream may say there is what any may.
const MAX_LIST: u32 = 256 << 10;
const MAX_FIELDS: usize = 256;

/// An endpoint.
pub(crate) struct Endpoint {
    /// As it is written in the settings.
    pub(crate) url: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) authority: String,
    /// Of its own; none where the route has one for all, or none at all.
    pub(crate) breaker: Option<Breaker>,
    /// How long connecting may take.
    patience: Duration,
    in_flight: AtomicUsize,
    /// When it could not be reached, in the clock's nanoseconds; or zero.
    unreachable: AtomicU64,
    idle: Mutex<Vec<Idle>>,
    /// HTTP/2 needs one connection; who finds none opens it, the others wait.
    shared: Mutex<Option<Shared>>,
    /// How the last one to open it failed, if so, and when.
    opening: tokio::sync::Mutex<Option<(Instant, io::ErrorKind)>>,
}

struct Idle {
    sender: http1::SendRequest<Outgoing>,
    since: Instant,
}

#[derive(Clone)]
pub(crate) struct Shared {
    sender: http2::SendRequest<Outgoing>,
    /// Tells a connection from the one that came before it.
    number: u64,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoint").field(&self.url).finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic cannot leave a list of connections half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Endpoint {
    /// Needs a runtime: idle connections are closed by a task of their own.
    pub(crate) fn new(
        upstream: &Upstream,
        breaker: Option<Breaker>,
        patience: Duration,
    ) -> Arc<Self> {
        let endpoint = Arc::new(Self {
            url: upstream.to_string().into(),
            protocol: upstream.protocol,
            authority: upstream.authority.clone(),
            breaker,
            patience,
            in_flight: AtomicUsize::new(0),
            unreachable: AtomicU64::new(0),
            idle: Mutex::new(Vec::new()),
            shared: Mutex::new(None),
            opening: tokio::sync::Mutex::new(None),
        });
        if endpoint.protocol == Protocol::Http1 {
            tokio::spawn(close_idle(Arc::downgrade(&endpoint)));
        }
        endpoint
    }

    /// Requests sent whose response has not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Whether its breaker would let a request pass.
    pub(crate) fn passes(&self) -> bool {
        self.breaker.as_ref().is_none_or(Breaker::would_pass)
    }

    /// Whether its breaker has a place for a probe.
    pub(crate) fn wants_probe(&self) -> bool {
        self.breaker.as_ref().is_some_and(|breaker| {
            matches!(breaker.state(), State::Open | State::HalfOpen) && breaker.would_pass()
        })
    }

    /// Counts a request as in flight until the guard is dropped, if the
    /// breaker lets it pass.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<InFlight, CircuitOpen> {
        let permit = self
            .breaker
            .as_ref()
            .map(Breaker::try_acquire)
            .transpose()?;
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(InFlight {
            endpoint: Arc::clone(self),
            permit,
        })
    }

    /// Whether it could not be reached a moment ago.
    pub(crate) fn rests(&self) -> bool {
        match self.unreachable.load(Ordering::Relaxed) {
            0 => false,
            since => clock::now() - Instant::from_nanos(since) < REST,
        }
    }

    /// A pooled connection, or a new one. Where one turned out to be stale, it
    /// is never that one nor any other that might be.
    pub(crate) async fn connection(&self, stale: Option<&Connection>) -> io::Result<Connection> {
        match self.protocol {
            Protocol::Http1 => {
                if stale.is_none()
                    && let Some(sender) = self.pooled()
                {
                    return Ok(Connection::Http1(sender, Age::Reused));
                }
                let (sender, connection) = http1::Builder::new()
                    // As many as a client may send.
                    .max_headers(MAX_FIELDS)
                    .handshake(self.dial().await?)
                    .await
                    .map_err(io::Error::other)?;
                tokio::spawn(connection.with_upgrades());
                Ok(Connection::Http1(sender, Age::Fresh))
            }
            Protocol::H2c => {
                let after = match stale {
                    Some(Connection::H2c(shared, _)) => shared.number,
                    _ => 0,
                };
                let current = || {
                    let shared = lock(&self.shared).clone();
                    shared.filter(|it| it.number > after && !it.sender.is_closed())
                };
                if let Some(shared) = current() {
                    return Ok(Connection::H2c(shared, Age::Reused));
                }
                let asked = clock::now();
                let mut one_at_a_time = self.opening.lock().await;
                if let Some(shared) = current() {
                    return Ok(Connection::H2c(shared, Age::Reused));
                }
                if let Some((failed, kind)) = *one_at_a_time
                    && failed >= asked
                {
                    // Whoever waited has waited long enough.
                    return Err(kind.into());
                }
                let stream = self.dial().await.inspect_err(|error| {
                    *one_at_a_time = Some((clock::now(), error.kind()));
                })?;
                let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                    .timer(TokioTimer::new())
                    // A peer that vanished without a word is found out.
                    .keep_alive_interval(Duration::from_secs(20))
                    .max_header_list_size(MAX_LIST)
                    .initial_stream_window_size(STREAM_WINDOW)
                    .initial_connection_window_size(MAX_WINDOW)
                    .handshake(stream)
                    .await
                    .map_err(io::Error::other)?;
                tokio::spawn(connection);
                let mut shared = lock(&self.shared);
                let number = shared.as_ref().map_or(0, |shared| shared.number) + 1;
                let opened = Shared { sender, number };
                *shared = Some(opened.clone());
                Ok(Connection::H2c(opened, Age::Fresh))
            }
        }
    }

    async fn dial(&self) -> io::Result<TokioIo<TcpStream>> {
        let connecting = TcpStream::connect(&self.authority);
        let connected = match tokio::time::timeout(self.patience, connecting).await {
            Ok(connected) => connected,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        let since = match connected {
            Ok(_) => 0,
            Err(_) => clock::now().as_nanos(),
        };
        self.unreachable.store(since, Ordering::Relaxed);
        let stream = connected?;
        stream.set_nodelay(true)?;
        Ok(TokioIo::new(stream))
    }

    /// The connection used last: the least likely to be closed meanwhile.
    fn pooled(&self) -> Option<http1::SendRequest<Outgoing>> {
        let now = clock::now();
        let mut idle = lock(&self.idle);
        while let Some(Idle { sender, since }) = idle.pop() {
            if now - since > IDLE {
                // All before it have lain idle even longer.
                idle.clear();
                return None;
            }
            if sender.is_ready() {
                return Some(sender);
            }
        }
        None
    }

    fn put_back(&self, sender: http1::SendRequest<Outgoing>) {
        let mut idle = lock(&self.idle);
        if idle.len() < MAX_IDLE {
            let since = clock::now();
            idle.push(Idle { sender, since });
        }
    }
}

async fn close_idle(endpoint: Weak<Endpoint>) {
    loop {
        tokio::time::sleep(IDLE).await;
        let Some(endpoint) = endpoint.upgrade() else {
            return;
        };
        let now = clock::now();
        lock(&endpoint.idle).retain(|idle| now - idle.since <= IDLE && idle.sender.is_ready());
    }
}

/// A request in flight, and a breaker's leave for it. Dropped without a
/// verdict it was given up on, which says nothing of the endpoint.
#[derive(Debug)]
pub(crate) struct InFlight {
    endpoint: Arc<Endpoint>,
    pub(crate) permit: Option<Permit>,
}

impl InFlight {
    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// The response's head is there: how long it took is settled.
    pub(crate) fn arrived(&mut self) {
        if let Some(permit) = &mut self.permit {
            permit.arrived();
        }
    }

    /// Tells the breaker how it went. Only the first word counts.
    pub(crate) fn record(&mut self, verdict: Verdict) {
        if let Some(permit) = self.permit.take() {
            permit.record(verdict);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.endpoint.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether a connection had been used before: only then can it be stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Age {
    Fresh,
    Reused,
}

/// A connection that one request may use.
pub(crate) enum Connection {
    Http1(http1::SendRequest<Outgoing>, Age),
    H2c(Shared, Age),
}

impl Connection {
    pub(crate) const fn age(&self) -> Age {
        let (Self::Http1(_, age) | Self::H2c(_, age)) = self;
        *age
    }

    /// Sends a request. The error gives it back where none of it was written.
    pub(crate) async fn send(
        &mut self,
        request: Request<Outgoing>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Outgoing>>> {
        match self {
            Self::Http1(sender, _) => sender.try_send_request(request).await,
            Self::H2c(shared, _) => shared.sender.try_send_request(request).await,
        }
    }

    /// The response has ended: the connection is free for the next request,
    /// as soon as what is left of this one has been written.
    pub(crate) fn finish(self, endpoint: &Arc<Endpoint>) {
        let Self::Http1(mut sender, _) = self else {
            return;
        };
        if sender.is_ready() {
            endpoint.put_back(sender);
        } else if !sender.is_closed() {
            let endpoint = Arc::downgrade(endpoint);
            tokio::spawn(async move {
                if sender.ready().await.is_ok()
                    && let Some(endpoint) = endpoint.upgrade()
                {
                    endpoint.put_back(sender);
                }
            });
        }
    }
}
