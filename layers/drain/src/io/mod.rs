//! A connection that is counted, timed, cut, and closed without a reset.

mod traffic;
mod watch;

#[cfg(test)]
mod tests;

use std::{
    fmt,
    future::poll_fn,
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use buttress_core::clock::{self, Instant};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    runtime::Handle,
};

pub(crate) use self::{
    traffic::{Count, Protocol, Traffic},
    watch::{Told, Watch},
};
use crate::{
    ConnectionGuard, Limits, Phase, Shutdown,
    guard::Connection,
    listen::Socket,
    serve::slots::Slot,
    shutdown::{Inner, Plan},
};

/// What is read and thrown away while a closed connection lingers.
const SCRAPS: usize = 4096;

const TAKES_NOTHING: &str = "the client takes nothing";

const THERE: &str = "there until it is dropped";

/// A connection that a [`Shutdown`] waits for until it is dropped, wherever
/// hyper has moved it: an upgraded connection owns it, too.
///
/// - When what is left is cut, its reads and writes fail, so that tasks which
///   nobody else can cancel come to an end.
/// - Shutting it down sends a FIN, and then reads on for a moment, and throws
///   away: to close a socket with bytes unread, or before the last of them has
///   come, is to reset it, and the client may lose what it was sent.
/// - A client that sends no first byte, or takes nothing of what it is sent,
///   is given up in time: see [`Limits`].
///
/// [`Server`](crate::Server) makes one of each connection that it accepts, and
/// tells it of requests: there the whole of a head and the time between
/// requests are limited as well, and an idle connection ends when listeners
/// close, unless bytes have arrived on it. To the reader it has then reached
/// its end, which is what hyper closes an idle connection for.
///
/// No allocation is made for a read or a write, and no timer is set for each:
/// it is, when it would fire too late.
pub struct DrainIo<I: Socket> {
    /// There until this is dropped.
    io: Option<I>,
    guard: ConnectionGuard,
    limits: Arc<Limits>,
    slot: Option<Slot>,
    /// Whether it is told of requests.
    managed: bool,
    reader: Option<Pin<Box<Watch>>>,
    /// The reader's, unless they may be on two tasks.
    writer: Option<Pin<Box<Watch>>>,
    /// The traffic there was at the last bytes that were read.
    mark: Option<Mark>,
    accepted: Instant,
    /// The last four bytes that were read.
    tail: u32,
    /// Since when there is a head that is not complete.
    head: Option<Spell>,
    /// Since when it may be closed, and nothing was read.
    closing: Option<Instant>,
    /// When it is told to leave: because of its age, or of a drain.
    expires: Option<Instant>,
    goaway: Option<Instant>,
    left: Option<Instant>,
    /// Something was read since.
    heard: bool,
    /// Since when nothing can be written.
    stalled: Option<Instant>,
    end: End,
}

#[derive(Clone, Copy, Debug)]
struct Mark {
    begun: u32,
    /// Within a request: of its body, or of the next one.
    busy: bool,
}

#[derive(Clone, Copy, Debug)]
struct Spell {
    begun: u32,
    since: Instant,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Open,
    /// The reader was told so.
    Over,
    /// The other end has said so.
    Eof,
    /// The FIN is out; somebody may still be reading.
    Half,
    /// The FIN is out; nobody is.
    Lingers(Instant),
    Closed,
}

/// What it is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// Nobody knows, or cares: only the cut counts.
    Unknown,
    Busy,
    /// A head has begun.
    Head,
    /// Nothing; nothing was ever sent on it if it is fresh, and something else
    /// than a request may have been if it is unsure.
    Idle {
        fresh: bool,
        unsure: bool,
    },
    Handshake,
    Http2 {
        open: bool,
    },
}

impl<I: Socket> DrainIo<I> {
    /// Counts a connection that something else than this crate's servers
    /// accepted. It knows nothing of the requests on it.
    pub fn new(io: I, shutdown: &Shutdown, limits: &Limits) -> Self {
        Self::wrap(io, shutdown.connection(), Arc::new(*limits), None, false)
    }
}

impl<I: Socket> DrainIo<I> {
    pub(crate) fn wrap(
        io: I,
        guard: ConnectionGuard,
        limits: Arc<Limits>,
        slot: Option<Slot>,
        managed: bool,
    ) -> Self {
        let since = clock::recent();
        let expires = match managed {
            true => limits.age().map(|age| since + age),
            false => None,
        };
        Self {
            io: Some(io),
            guard,
            limits,
            slot,
            managed,
            reader: None,
            writer: None,
            mark: None,
            tail: 0,
            accepted: since,
            head: None,
            closing: None,
            expires,
            goaway: None,
            left: None,
            heard: false,
            stalled: None,
            end: End::Open,
        }
    }

    /// What is counted and cut: its age, its bytes, its state.
    pub const fn guard(&self) -> &ConnectionGuard {
        &self.guard
    }

    /// The connection itself.
    pub fn get_ref(&self) -> &I {
        self.io.as_ref().expect(THERE)
    }

    /// The connection itself. What is read or written past this counts for
    /// nothing.
    pub fn get_mut(&mut self) -> &mut I {
        self.io.as_mut().expect(THERE)
    }

    #[inline]
    fn pinned(&mut self) -> Pin<&mut I> {
        Pin::new(self.get_mut())
    }

    #[inline]
    fn record(&self) -> &Connection {
        self.guard.shared().1
    }

    fn doing(&self) -> Doing {
        let record = self.record();
        if !self.managed {
            return match self.mark {
                Some(_) => Doing::Unknown,
                None => Doing::Idle {
                    fresh: true,
                    unsure: false,
                },
            };
        }
        let traffic = record.traffic.load();
        match record.traffic.protocol() {
            Protocol::Tunnel => return Doing::Unknown,
            Protocol::Http2 => {
                return Doing::Http2 {
                    open: traffic.is_busy() || self.stalled.is_some(),
                };
            }
            Protocol::Handshake => return Doing::Handshake,
            Protocol::Http1 => {}
        }
        match traffic.is_busy() {
            true => Doing::Busy,
            false => self.between(traffic.begun),
        }
    }

    /// What it is doing between requests over HTTP/1.
    fn between(&self, begun: u32) -> Doing {
        let traffic = &self.record().traffic;
        let idle = |unsure| Doing::Idle {
            fresh: !traffic.is_used(),
            unsure,
        };
        match self.mark {
            None => idle(false),
            // The request that began after it has taken it; what there is
            // after its head is the next one's, or its body.
            Some(mark) if mark.begun != begun => match self.ended_in_a_head() {
                true => idle(false),
                false if traffic.is_bare() => Doing::Head,
                false => idle(true),
            },
            // Nor of the body of a request that had none; by TLS it may be
            // something else altogether.
            Some(mark) if mark.busy && (traffic.is_shaken() || !traffic.is_bare()) => idle(true),
            Some(_) => Doing::Head,
        }
    }

    /// Whether an empty line that comes now stands before a request, where a
    /// server is to pass over it (RFC 9112, section 2.2).
    fn passes_over(&self, now: Count) -> bool {
        let traffic = &self.record().traffic;
        self.managed
            && traffic.protocol() == Protocol::Http1
            && !traffic.is_shaken()
            && (!now.is_busy() || traffic.is_bare())
            && matches!(self.between(now.begun), Doing::Idle { .. })
    }

    /// Whether what was read ends where a head does, as far as it can be seen.
    fn ended_in_a_head(&self) -> bool {
        let tail = self.tail.to_be_bytes();
        let ends = tail.ends_with(b"\n\r\n") || tail.ends_with(b"\n\n");
        ends || self.record().traffic.is_shaken()
    }

    /// Writes down that bytes were read.
    #[inline]
    fn stirs(&mut self, read: &[u8]) {
        let traffic = self.record().traffic.load();
        self.heard |= self.left.is_some();
        if read.iter().all(|byte| matches!(byte, b'\r' | b'\n')) && self.passes_over(traffic) {
            return;
        }
        for byte in &read[read.len().saturating_sub(4)..] {
            self.tail = self.tail << 8 | u32::from(*byte);
        }
        if self.mark.is_none()
            && let Some(slot) = &mut self.slot
        {
            slot.stirs();
        }
        self.mark = Some(Mark {
            begun: traffic.begun,
            busy: traffic.is_busy(),
        });
        self.closing = None;
    }

    /// Writes down that the other end has closed.
    const fn ends(&mut self) {
        match self.end {
            End::Open => self.end = End::Eof,
            End::Half => self.end = End::Closed,
            _ => {}
        }
    }

    fn cut_off(&self) -> io::Error {
        io::Error::new(
            io::ErrorKind::ConnectionAborted,
            "cut off by the shutdown's deadline",
        )
    }
}

/// Why reading ends.
enum Ending {
    /// As if the other end had closed it.
    Over,
    Failed(&'static str),
    Cut,
}

impl<I: Socket> DrainIo<I> {
    /// Nothing can be read: is it over? If it is not, the task is woken when
    /// it may be.
    ///
    /// hyper asks while it serves a request, and not again when it has: it
    /// knows that it will be woken. So a busy connection is watched like an
    /// idle one.
    fn tend(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        let doing = self.doing();
        // What hyper has not sent yet goes first.
        if self.stalled.is_some() && matches!(doing, Doing::Idle { .. }) {
            return Poll::Pending;
        }
        // Precise where a timer may just have fired, which was set by it.
        let mut fired = self.reader.as_ref().is_some_and(|watch| watch.is_due());
        loop {
            let phase = self.guard.phase();
            if phase >= Phase::Cut {
                return Poll::Ready(Ending::Cut);
            }
            let now = match fired {
                true => clock::now(),
                false => clock::recent(),
            };
            fired = true;
            let (due, until) = match doing {
                Doing::Busy => {
                    let until = match phase >= Phase::Closing {
                        true => Phase::Cut,
                        false => Phase::Closing,
                    };
                    let aged = self.ages(now);
                    let due = now + self.limits.idle_timeout;
                    (Some(aged.map_or(due, |at| at.min(due))), until)
                }
                Doing::Unknown => (None, Phase::Cut),
                Doing::Handshake => match self.handshake(phase) {
                    (due, _) if due <= now => {
                        return Poll::Ready(Ending::Failed("the handshake takes too long"));
                    }
                    (due, until) => (Some(due), until),
                },
                Doing::Head => {
                    let due = self.head(now);
                    if due <= now {
                        return Poll::Ready(Ending::Failed("the head takes too long"));
                    }
                    (Some(due), Phase::Cut)
                }
                Doing::Idle { fresh, unsure } => match self.idle(now, phase, fresh, unsure) {
                    Some((due, until)) => (Some(due), until),
                    // It comes by itself.
                    None if self.get_ref().has_unread() => (None, Phase::Cut),
                    None => return Poll::Ready(Ending::Over),
                },
                Doing::Http2 { open } => {
                    let late = self.untaken(now, open);
                    if late.is_some_and(|late| late <= now) {
                        return Poll::Ready(Ending::Failed(TAKES_NOTHING));
                    }
                    match self.http2(now, phase, open) {
                        Some((due, until)) => (due.into_iter().chain(late).min(), until),
                        None if self.get_ref().has_unread() => (None, Phase::Cut),
                        None => return Poll::Ready(Ending::Over),
                    }
                }
            };
            let reader = self.reader.get_or_insert_with(|| Box::pin(Watch::new()));
            let shutdown = self.guard.shared().0;
            let told = reader.as_mut().poll_phase(cx, shutdown, until);
            let late = due.map_or(Poll::Pending, |due| reader.as_mut().poll_due(cx, due));
            if told.is_pending() && late.is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// How long the handshake may take.
    fn handshake(&self, phase: Phase) -> (Instant, Phase) {
        let whole = self.accepted + self.limits.handshake_timeout;
        match (self.mark, phase >= Phase::Closing) {
            (None, true) => {
                let grace = self.accepted + self.limits.first_byte_grace;
                (whole.min(grace), Phase::Cut)
            }
            (_, true) => (whole, Phase::Cut),
            (_, false) => (whole, Phase::Closing),
        }
    }

    /// How long this head may take.
    fn head(&mut self, now: Instant) -> Instant {
        let begun = self.record().traffic.load().begun;
        let head = match self.head {
            Some(head) if head.begun == begun => head,
            // Of the first byte of this one nothing is known but that it came
            // since the last look.
            _ => *self.head.insert(Spell { begun, since: now }),
        };
        head.since + self.limits.header_timeout
    }

    /// How long it may be idle; `None` if it has been for long enough.
    fn idle(
        &mut self,
        now: Instant,
        phase: Phase,
        fresh: bool,
        unsure: bool,
    ) -> Option<(Instant, Phase)> {
        self.ages(now);
        let since = self.idle_since();
        let mut due = since + self.limits.idle_timeout;
        let mut until = Phase::Closing;
        if phase >= Phase::Closing {
            until = Phase::Cut;
            let grace = self.limits.first_byte_grace;
            if unsure {
                due = due.min(*self.closing.get_or_insert(now) + grace);
            } else if fresh {
                due = due.min(since + grace);
            } else {
                return None;
            }
        }
        (due > now).then_some((due, until))
    }

    /// When it will be too old; `None` if it is. The next answer says so then:
    /// to close an idle connection for it could cross a request.
    fn ages(&mut self, now: Instant) -> Option<Instant> {
        let at = self.expires?;
        if at <= now {
            self.record().traffic.leave();
            self.expires = None;
        }
        self.expires
    }

    /// Since when it has been idle, if it is.
    fn idle_since(&self) -> Instant {
        self.record().traffic.ended().unwrap_or(self.accepted)
    }

    /// When it is to be looked at again; `None` if it is over.
    fn http2(
        &mut self,
        now: Instant,
        phase: Phase,
        open: bool,
    ) -> Option<(Option<Instant>, Phase)> {
        let left = match self.left {
            Some(left) => left,
            None => {
                let due = self.leaves(now, phase, open);
                let until = match phase {
                    Phase::Serving => Phase::Draining,
                    _ => Phase::Closing,
                };
                if due.is_none_or(|due| due > now) {
                    return Some((due, until));
                }
                self.record().traffic.leave();
                *self.left.insert(now)
            }
        };
        // Who goes on opening streams has not heard of it, or does not care.
        let refuses = left + self.limits.header_timeout;
        let refuses = (refuses > now).then_some(refuses);
        if refuses.is_none() {
            self.record().traffic.refuse();
        }
        // hyper knows of the other half, and ends it with the last stream, if
        // the client is there to answer its ping.
        if open || self.heard && self.record().has_half_a_tunnel() {
            return Some((refuses, Phase::Cut));
        }
        let due = left.max(self.idle_since()) + self.limits.header_timeout;
        (due > now).then_some((Some(due), Phase::Cut))
    }

    /// When its answers have waited for a window for too long; if none does, a
    /// time to look again.
    fn untaken(&self, now: Instant, open: bool) -> Option<Instant> {
        let timeout = self.limits.write_timeout.filter(|_| open)?;
        Some(self.record().traffic.untaken().unwrap_or(now) + timeout)
    }

    /// When it gets its GOAWAY.
    fn leaves(&mut self, now: Instant, phase: Phase, open: bool) -> Option<Instant> {
        if phase >= Phase::Closing {
            return Some(now);
        }
        // Whether it is open still is looked at by then.
        let since = match open {
            true => now,
            false => self.idle_since(),
        };
        let idle = Some(since + self.limits.idle_timeout);
        let drain = match phase {
            Phase::Serving => None,
            _ => {
                let plan = self.guard.shared().0.plan.get();
                self.goaway = self.goaway.or_else(|| plan.map(|plan| jittered(plan, now)));
                self.goaway
            }
        };
        [idle, drain, self.expires].into_iter().flatten().min()
    }

    fn stall(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        let since = match self.stalled {
            Some(since) => since,
            None => {
                self.record().traffic.stall(true);
                *self.stalled.insert(clock::now())
            }
        };
        let tunnel = self.doing() == Doing::Unknown;
        let due = match self.limits.write_timeout {
            Some(timeout) if !(tunnel && self.managed) => Some(since + timeout),
            _ => None,
        };
        loop {
            if due.is_some_and(|due| due <= clock::now()) {
                return Poll::Ready(Ending::Failed(TAKES_NOTHING));
            }
            if self.guard.is_cut() {
                return Poll::Ready(Ending::Cut);
            }
            // The reader of an upgraded connection may be another task.
            let watch = match tunnel {
                true => &mut self.writer,
                false => &mut self.reader,
            };
            let watch = watch.get_or_insert_with(|| Box::pin(Watch::new()));
            let shutdown = self.guard.shared().0;
            let told = match tunnel {
                true => watch.as_mut().poll_phase(cx, shutdown, Phase::Cut),
                false => Poll::Pending,
            };
            let late = due.map_or(Poll::Pending, |due| watch.as_mut().poll_due(cx, due));
            if told.is_pending() && late.is_pending() {
                return Poll::Pending;
            }
        }
    }

    fn wrote(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match polled {
            Poll::Ready(written) => {
                if self.stalled.take().is_some() {
                    self.record().traffic.stall(false);
                }
                if let Ok(bytes) = &written {
                    self.guard.wrote(*bytes as u64);
                }
                Poll::Ready(written)
            }
            Poll::Pending => match ready!(self.stall(cx)) {
                Ending::Failed(why) => {
                    Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)))
                }
                Ending::Over | Ending::Cut => Poll::Ready(Err(self.cut_off())),
            },
        }
    }

    /// Reads what still comes, until the other end has closed as well.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut buffer = [MaybeUninit::uninit(); SCRAPS];
        while let End::Lingers(until) = self.end {
            // First the time: one who sends fast enough would never let us
            // look. How much it is does not count: who sends all of a body
            // before it reads is to find the refusal.
            if until <= clock::now() || self.guard.is_cut() {
                self.end = End::Closed;
                break;
            }
            let mut buffer = ReadBuf::uninit(&mut buffer);
            match self.pinned().poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
                Poll::Ready(_) => self.end = End::Closed,
                Poll::Pending => {
                    let reader = self.reader.get_or_insert_with(|| Box::pin(Watch::new()));
                    let shutdown = self.guard.shared().0;
                    let told = reader.as_mut().poll_phase(cx, shutdown, Phase::Cut);
                    if told.is_pending() && reader.as_mut().poll_due(cx, until).is_pending() {
                        return Poll::Pending;
                    }
                }
            }
        }
        Poll::Ready(())
    }

    fn lingers(&self) -> End {
        End::Lingers(clock::now() + self.limits.linger)
    }
}

/// Some time in the second half of the delay, or in what is left of it.
fn jittered(plan: &Plan, now: Instant) -> Instant {
    let half = plan.start + (plan.closing - plan.start) / 2;
    let from = half.max(now);
    from + (plan.closing - from).mul_f64(fastrand::f64())
}

impl<I: Socket> AsyncRead for DrainIo<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.guard.is_cut() {
            return Poll::Ready(Err(this.cut_off()));
        }
        if matches!(this.end, End::Over) {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        if let Poll::Ready(read) = this.pinned().poll_read(cx, buf) {
            if buf.filled().len() > before {
                this.stirs(&buf.filled()[before..]);
            } else if read.is_ok() && buf.remaining() > 0 {
                this.ends();
            }
            return Poll::Ready(read);
        }
        match ready!(this.tend(cx)) {
            Ending::Over => {
                this.end = End::Over;
                Poll::Ready(Ok(()))
            }
            Ending::Failed(why) => Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why))),
            Ending::Cut => Poll::Ready(Err(this.cut_off())),
        }
    }
}

impl<I: Socket> AsyncWrite for DrainIo<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.guard.is_cut() {
            return Poll::Ready(Err(this.cut_off()));
        }
        let polled = this.pinned().poll_write(cx, buf);
        this.wrote(cx, polled)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.guard.is_cut() {
            return Poll::Ready(Err(this.cut_off()));
        }
        let polled = this.pinned().poll_write_vectored(cx, bufs);
        this.wrote(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.get_ref().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.guard.is_cut() {
            return Poll::Ready(Err(this.cut_off()));
        }
        this.pinned().poll_flush(cx)
    }

    /// Sends the FIN. hyper's connections then read on until the other end has
    /// closed, too, or the [`linger`](crate::LimitsBuilder::linger) is over;
    /// others do so on a task of their own once this is dropped, since of an
    /// upgraded connection the other direction may go on.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if matches!(this.end, End::Open | End::Over | End::Eof) {
            let shut = ready!(this.pinned().poll_shutdown(cx));
            this.record().has_no_tunnels();
            let over = matches!(this.end, End::Eof) || this.limits.linger.is_zero();
            this.end = match this.doing() {
                _ if over || shut.is_err() || this.guard.is_cut() => End::Closed,
                _ if !this.managed => End::Half,
                Doing::Unknown => End::Half,
                _ => this.lingers(),
            };
            // The other end was there first, which is as good.
            shut.or_else(|error| match error.kind() {
                io::ErrorKind::NotConnected => Ok(()),
                _ => Err(error),
            })?;
        }
        this.poll_linger(cx).map(Ok)
    }
}

/// A connection whose FIN is out lingers on a task of its own, counted still.
impl<I: Socket> Drop for DrainIo<I> {
    fn drop(&mut self) {
        if !matches!(self.end, End::Half) || self.guard.is_cut() {
            return;
        }
        let (Some(io), Ok(runtime)) = (self.io.take(), Handle::try_current()) else {
            return;
        };
        let shutdown = Shutdown {
            inner: Arc::clone(self.guard.shared().0),
        };
        let (guard, limits) = (shutdown.connection(), Arc::clone(&self.limits));
        let mut rest = Self::wrap(io, guard, limits, self.slot.take(), false);
        rest.end = rest.lingers();
        runtime.spawn(async move { poll_fn(|cx| rest.poll_linger(cx)).await });
    }
}

impl<I: Socket + fmt::Debug> fmt::Debug for DrainIo<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DrainIo")
            .field("io", &self.io)
            .field("guard", &self.guard)
            .finish_non_exhaustive()
    }
}

/// What a server and its connection share.
pub(crate) struct Lane {
    pub(crate) shutdown: Arc<Inner>,
    pub(crate) record: Arc<Connection>,
}

impl Lane {
    pub(crate) fn of<I: Socket>(io: &DrainIo<I>) -> Self {
        let (shutdown, record) = io.guard.shared();
        Self {
            shutdown: Arc::clone(shutdown),
            record: Arc::clone(record),
        }
    }
}
