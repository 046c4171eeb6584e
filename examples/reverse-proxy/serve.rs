//! Accepts connections and times them.
//!
//! hyper's own head timeout doubles as the limit of idleness between two
//! requests, and does not run before it knows the protocol. So the phases are
//! told apart here: a [`Pulse`] for each connection knows whether it is busy,
//! idle, or sending a head, and since when; a timer looks at it now and then,
//! which costs a request two atomic writes.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress::{
    BoxError,
    clock::{self, Instant},
};
use bytes::Bytes;
use http::{Request, Response, Version};
use http_body::Body;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::Sleep,
};

use crate::settings::Limits;

/// How long a client that goes on sending is listened to after our last word.
const LINGER: Duration = Duration::from_secs(1);

/// HTTP/2 writes no more than this at once where it only keeps a connection
/// up: a few frames of 9 to 17 bytes.
const UPKEEP: usize = 64;

/// Tells connections to stop, and who waits for them, when they have.
#[derive(Clone)]
pub(crate) struct Stop {
    told: watch::Receiver<bool>,
    /// Held by every socket.
    _alive: mpsc::Sender<()>,
}

impl Stop {
    /// The rule, who may invoke it, and what ends when all have obeyed.
    pub(crate) fn new() -> (Self, watch::Sender<bool>, mpsc::Receiver<()>) {
        let (tell, told) = watch::channel(false);
        let (alive, gone) = mpsc::channel(1);
        (
            Self {
                told,
                _alive: alive,
            },
            tell,
            gone,
        )
    }

    async fn wait(&mut self) {
        // An error means that nobody is left to tell: as good as told.
        let _ = self.told.wait_for(|told| *told).await;
    }
}

/// Serves what `listener` accepts until told to stop; requests in flight then
/// go on in tasks of their own.
pub(crate) async fn serve<H, F, B>(
    listener: TcpListener,
    limits: Arc<Limits>,
    mut stop: Stop,
    handler: H,
) where
    H: Fn(Request<Incoming>, SocketAddr, Busy) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let slots = usize::try_from(limits.max_connections.0).unwrap_or(usize::MAX);
    let slots = Arc::new(Semaphore::new(slots.min(Semaphore::MAX_PERMITS)));
    loop {
        let accepted = async {
            // First the slot: at the limit, nothing more is accepted.
            let slot = Arc::clone(&slots)
                .acquire_owned()
                .await
                .expect("never closed");
            (listener.accept().await, slot)
        };
        let (accepted, slot) = tokio::select! {
            () = stop.wait() => return,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let socket = Socket::new(stream, slot, stop.clone());
                tokio::spawn(connection(
                    socket,
                    peer,
                    limits.clone(),
                    stop.clone(),
                    handler.clone(),
                ));
            }
            Err(error) => {
                // Out of descriptors, mostly: it passes when others close.
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection<H, F, B>(
    socket: Socket,
    peer: SocketAddr,
    limits: Arc<Limits>,
    mut stop: Stop,
    handler: H,
) where
    H: Fn(Request<Incoming>, SocketAddr, Busy) -> F + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let pulse = Arc::clone(&socket.pulse);
    let service = service_fn(|request: Request<Incoming>| {
        let busy = Busy::new(&pulse, request.version());
        let response = handler(request, peer, busy);
        async move { Ok::<_, Infallible>(response.await) }
    });
    let builder = builder(&limits);
    let mut connection =
        pin!(builder.serve_connection_with_upgrades(TokioIo::new(socket), service));
    let (mut stopping, mut leaving) = (false, false);
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%peer, error, "connection");
                }
                return;
            }
            () = stop.wait(), if !stopping => {
                connection.as_mut().graceful_shutdown();
                stopping = true;
            }
            phase = pulse.overdue(&limits) => match phase {
                // HTTP/2 is told with a GOAWAY; then it has the time of a head
                // to go.
                Phase::Idle if !leaving => {
                    connection.as_mut().graceful_shutdown();
                    leaving = true;
                    pulse.enter(Phase::Head);
                }
                _ => return,
            },
        }
    }
}

fn builder(limits: &Limits) -> auto::Builder<TokioExecutor> {
    // The parser's own limits, which answer without a body, stand above ours,
    // which answer with a problem document.
    let head = limits
        .max_headers
        .in_memory()
        .saturating_add(limits.max_path.in_memory());
    let room = head.saturating_add(64 << 10);
    let list = u32::try_from(room.saturating_mul(2)).unwrap_or(u32::MAX);
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().max_buf_size(room).max_headers(256);
    builder
        .http2()
        .timer(TokioTimer::new())
        // A client that vanished without a word is found out.
        .keep_alive_interval(Duration::from_secs(20))
        .max_header_list_size(list);
    builder
}

/// What a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It has begun to send a head, or is expected to send its first one.
    Head,
    /// Between two requests.
    Idle,
}

/// Whether a connection is busy, idle or sending a head, and since when. Its
/// parts are written one by one: the timer may see a mixture, and then looks
/// again a little later than it could.
#[derive(Debug)]
pub(crate) struct Pulse {
    busy: AtomicUsize,
    head: AtomicBool,
    http2: AtomicBool,
    since: AtomicU64,
}

impl Pulse {
    fn enter(&self, phase: Phase) {
        self.since.store(clock::now().as_nanos(), Relaxed);
        self.head.store(phase == Phase::Head, Relaxed);
    }

    fn is_busy(&self) -> bool {
        self.busy.load(Relaxed) > 0
    }

    /// Bytes came in.
    fn read(&self, bytes: &[u8]) {
        if self.is_busy() || self.http2.load(Relaxed) {
            return;
        }
        if self.head.load(Relaxed) {
            // The preface is no request: a client may open its HTTP/2
            // connection long before it needs it.
            if bytes.starts_with(b"PRI *") {
                self.http2.store(true, Relaxed);
                self.enter(Phase::Idle);
            }
        } else {
            self.enter(Phase::Head);
        }
    }

    /// Bytes went out: the end of a response on a slow line is no idleness.
    /// Neither pings nor their answers are a response, and both sides may send
    /// them for ever.
    fn wrote(&self, bytes: usize) {
        let upkeep = self.http2.load(Relaxed) && bytes <= UPKEEP;
        if !upkeep && !self.head.load(Relaxed) {
            self.since.store(clock::now().as_nanos(), Relaxed);
        }
    }

    /// How long the phase has lasted.
    fn lasted(&self) -> Duration {
        clock::now() - Instant::from_nanos(self.since.load(Relaxed))
    }

    /// Ends when a phase has lasted longer than allowed.
    async fn overdue(&self, limits: &Limits) -> Phase {
        let (head, idle) = (limits.header_timeout.0, limits.idle_timeout.0);
        loop {
            let (phase, allowed) = if self.head.load(Relaxed) {
                (Phase::Head, head)
            } else {
                (Phase::Idle, idle)
            };
            let lasted = self.lasted();
            let rest = if self.is_busy() {
                head
            } else if lasted >= allowed {
                return phase;
            } else {
                allowed - lasted
            };
            // Never past the end of a head that may begin meanwhile.
            tokio::time::sleep(rest.min(head)).await;
        }
    }
}

/// A request being served: its connection is neither idle nor slow.
#[derive(Debug)]
pub(crate) struct Busy(Arc<Pulse>);

impl Busy {
    fn new(pulse: &Arc<Pulse>, version: Version) -> Self {
        pulse.busy.fetch_add(1, Relaxed);
        pulse.head.store(false, Relaxed);
        if version == Version::HTTP_2 {
            pulse.http2.store(true, Relaxed);
        }
        Self(Arc::clone(pulse))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // Before it is idle it is idle since now.
        self.0.enter(Phase::Idle);
        self.0.busy.fetch_sub(1, Relaxed);
    }
}

/// An accepted socket. It holds the connection's slot, and keeps the program
/// from ending, for as long as it is open: under an upgrade, too.
struct Socket {
    stream: TcpStream,
    pulse: Arc<Pulse>,
    /// How long the end is put off; set once our side is closed.
    lingers: Option<Pin<Box<Sleep>>>,
    _slot: OwnedSemaphorePermit,
    _stop: Stop,
}

impl Socket {
    fn new(stream: TcpStream, slot: OwnedSemaphorePermit, stop: Stop) -> Self {
        // Only costs latency where it fails.
        let _ = stream.set_nodelay(true);
        let pulse = Arc::new(Pulse {
            busy: AtomicUsize::new(0),
            head: AtomicBool::new(true),
            http2: AtomicBool::new(false),
            since: AtomicU64::new(clock::now().as_nanos()),
        });
        Self {
            stream,
            pulse,
            lingers: None,
            _slot: slot,
            _stop: stop,
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let new = &buf.filled()[before..];
        if !new.is_empty() {
            self.pulse.read(new);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let wrote = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        self.pulse.wrote(wrote);
        Poll::Ready(Ok(wrote))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs))?;
        self.pulse.wrote(wrote);
        Poll::Ready(Ok(wrote))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Closes our side, and then reads away what still comes, for a while: a
    /// socket that is closed over unread bytes is reset, and the reset may
    /// overtake the answer (a 413, say) on its way to the client's program.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.pulse.is_busy() {
            // A tunnel closes one way, and still carries bytes the other.
            return Pin::new(&mut this.stream).poll_shutdown(cx);
        }
        if this.lingers.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
            // Who has lain idle for longer has nothing under way.
            let rest = LINGER.saturating_sub(this.pulse.lasted());
            this.lingers = Some(Box::pin(tokio::time::sleep(rest)));
        }
        // First the time: one who sends fast enough would never let us look.
        let until = this.lingers.as_mut().expect("just set");
        if until.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        let mut waste = [0; 16 << 10];
        loop {
            let mut waste = ReadBuf::new(&mut waste);
            let read = ready!(Pin::new(&mut this.stream).poll_read(cx, &mut waste));
            if read.is_err() || waste.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}
