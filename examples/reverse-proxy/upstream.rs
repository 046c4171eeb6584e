//! One endpoint of a route: its connections, and how much is in flight.
//!
//! Connections are pooled here, and not by hyper-util's legacy client, because
//! that one pools by the authority of the request: keeping the client's `Host`
//! would split its pool, and on HTTP/2 `:authority` could not be kept at all.

use std::{
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress::clock::{self, Instant};
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

/// How many idle connections are kept for a burst to come.
const MAX_IDLE: usize = 1024;

/// An endpoint.
pub(crate) struct Endpoint {
    /// As it is written in the settings.
    pub(crate) url: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) authority: String,
    in_flight: AtomicUsize,
    idle: Mutex<Vec<Idle>>,
    /// HTTP/2 needs one connection; who finds none opens it, the others wait.
    shared: Mutex<Option<http2::SendRequest<Outgoing>>>,
    opening: tokio::sync::Mutex<()>,
}

struct Idle {
    sender: http1::SendRequest<Outgoing>,
    since: Instant,
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
    pub(crate) fn new(upstream: &Upstream) -> Arc<Self> {
        let endpoint = Arc::new(Self {
            url: upstream.to_string().into(),
            protocol: upstream.protocol,
            authority: upstream.authority.clone(),
            in_flight: AtomicUsize::new(0),
            idle: Mutex::new(Vec::new()),
            shared: Mutex::new(None),
            opening: tokio::sync::Mutex::new(()),
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

    /// Counts a request as in flight until the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    /// A pooled connection, or a new one; a new one in any case if `fresh`.
    pub(crate) async fn connection(&self, fresh: bool) -> io::Result<Connection> {
        match self.protocol {
            Protocol::Http1 => {
                if !fresh && let Some(sender) = self.pooled() {
                    return Ok(Connection::Http1(sender, Age::Reused));
                }
                let (sender, connection) = http1::handshake(TokioIo::new(self.dial().await?))
                    .await
                    .map_err(io::Error::other)?;
                tokio::spawn(connection.with_upgrades());
                Ok(Connection::Http1(sender, Age::Fresh))
            }
            Protocol::H2c => {
                let current = || {
                    lock(&self.shared)
                        .clone()
                        .filter(|sender| !sender.is_closed())
                };
                if !fresh && let Some(sender) = current() {
                    return Ok(Connection::H2c(sender, Age::Reused));
                }
                let _one_at_a_time = self.opening.lock().await;
                if !fresh && let Some(sender) = current() {
                    return Ok(Connection::H2c(sender, Age::Reused));
                }
                let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                    .timer(TokioTimer::new())
                    // A peer that vanished without a word is found out.
                    .keep_alive_interval(Duration::from_secs(20))
                    .adaptive_window(true)
                    .handshake(TokioIo::new(self.dial().await?))
                    .await
                    .map_err(io::Error::other)?;
                tokio::spawn(connection);
                *lock(&self.shared) = Some(sender.clone());
                Ok(Connection::H2c(sender, Age::Fresh))
            }
        }
    }

    async fn dial(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(&self.authority).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
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

/// A request in flight.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Endpoint>);

impl InFlight {
    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
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
    H2c(http2::SendRequest<Outgoing>, Age),
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
            Self::H2c(sender, _) => sender.try_send_request(request).await,
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
