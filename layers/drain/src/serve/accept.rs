//! Accepting: as long as there is room, past errors, and at the end what waits
//! in the backlog.

use std::{
    future::Future,
    io, mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress_core::clock::{self, Instant};
use tokio::time::{Sleep, sleep};
use tracing::{debug, warn};

use crate::{
    Label, Limits, Phase, ServerGuard, Shutdown,
    io::{DrainIo, Told},
    listen::Listener,
    serve::slots::Slots,
};

/// After an error that is not of one connection only, most likely because the
/// process has no descriptor left: doubled up to a second.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// At the end it is tried again to accept what waits in the backlog, for as
/// long as connections that are closed now linger, and this: their descriptors
/// are free then.
const LAST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_LAST_PAUSE: Duration = Duration::from_millis(50);

/// How many of the backlog are accepted before others have their turn.
const TURN: u8 = 128;

/// What may wait in a backlog, at most: whoever comes faster than they are
/// accepted does not keep the listener open.
const BACKLOG: usize = 65_536;

/// Accepts for a server, of whatever make.
pub(crate) struct Acceptor<L> {
    /// None when it is closed.
    listener: Option<L>,
    guard: ServerGuard,
    closing: Pin<Box<Told>>,
    pause: Option<Pin<Box<Sleep>>>,
    next_pause: Duration,
    backlog: usize,
    /// How many more in this turn.
    turn: u8,
    /// Until when it is tried again to accept the backlog.
    last_try: Option<Instant>,
    last_pause: Option<Pin<Box<Sleep>>>,
    shutdown: Shutdown,
    limits: Arc<Limits>,
    slots: Arc<Slots>,
    managed: bool,
}

type Accepted<L> = (DrainIo<<L as Listener>::Io>, <L as Listener>::Addr);

impl<L: Listener> Acceptor<L> {
    pub(crate) fn new(
        shutdown: &Shutdown,
        name: Label,
        listener: L,
        limits: Limits,
        managed: bool,
    ) -> Self {
        let guard = shutdown.server(name);
        Self {
            listener: Some(listener),
            closing: Box::pin(Told::new(guard.closing())),
            guard,
            pause: None,
            next_pause: FIRST_PAUSE,
            backlog: BACKLOG,
            turn: TURN,
            last_try: None,
            last_pause: None,
            shutdown: shutdown.clone(),
            limits: Arc::new(limits),
            slots: Slots::new(limits.max_connections),
            managed,
        }
    }

    pub(crate) const fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    #[cfg(feature = "axum")]
    pub(crate) const fn listener(&self) -> Option<&L> {
        self.listener.as_ref()
    }

    /// When a server that closes connections by itself is told to: once the
    /// listener is closed, and after a moment for connections that have sent
    /// nothing yet.
    #[cfg(any(feature = "axum", feature = "tonic"))]
    pub(crate) fn graceful(&self) -> impl Future<Output = ()> + Send + use<L> {
        let closed = self.shutdown.reached(crate::Phase::Closed);
        let slots = Arc::clone(&self.slots);
        let grace = self.limits.first_byte_grace;
        async move {
            closed.await;
            if slots.fresh() > 0 {
                sleep(grace).await;
            }
        }
    }

    /// The next connection, `None` once the listener is closed.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Accepted<L>>> {
        loop {
            let Some(listener) = &mut self.listener else {
                return Poll::Ready(None);
            };
            if self.closing.as_mut().poll(cx).is_ready() {
                return self.poll_backlog(cx);
            }
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            ready!(self.slots.poll_room(cx));
            match ready!(listener.poll_accept(cx)) {
                Ok((io, addr)) => {
                    self.next_pause = FIRST_PAUSE;
                    return Poll::Ready(Some((self.wrap(io), addr)));
                }
                Err(error) if is_of_connection(&error) => {
                    debug!(server = %self.guard.name(), %error, "a connection was gone before it was accepted");
                }
                Err(error) => {
                    let pause = self.next_pause;
                    self.next_pause = (pause * 2).min(LONGEST_PAUSE);
                    warn!(server = %self.guard.name(), %error, ?pause, "cannot accept");
                    self.pause = Some(Box::pin(sleep(pause)));
                }
            }
        }
    }

    /// What is there already, and then nothing: the listener is dropped.
    fn poll_backlog(&mut self, cx: &mut Context<'_>) -> Poll<Option<Accepted<L>>> {
        while let (Some(listener), Some(left)) = (&mut self.listener, self.backlog.checked_sub(1)) {
            if let Some(pause) = &mut self.last_pause {
                ready!(pause.as_mut().poll(cx));
                self.last_pause = None;
            }
            if self.turn == 0 {
                self.turn = TURN;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            self.turn -= 1;
            self.backlog = left;
            match listener.accept_now() {
                Ok(Some((io, addr))) => return Poll::Ready(Some((self.wrap(io), addr))),
                Ok(None) => break,
                Err(error) if is_of_connection(&error) => {}
                Err(error) => {
                    let now = clock::now();
                    let until = match self.last_try {
                        Some(until) => until,
                        None => {
                            warn!(server = %self.guard.name(), %error, "cannot accept what waits in the backlog");
                            self.next_pause = FIRST_PAUSE;
                            *self.last_try.insert(self.last_try_by(now))
                        }
                    };
                    if until <= now || self.shutdown.phase() >= Phase::Cut {
                        warn!(server = %self.guard.name(), %error, "what waits in the backlog is given up");
                        break;
                    }
                    let pause = self.next_pause.min(until - now);
                    self.next_pause = (pause * 2).min(LONGEST_LAST_PAUSE);
                    self.last_pause = Some(Box::pin(sleep(pause)));
                }
            }
        }
        drop(mem::take(&mut self.listener));
        self.guard.listener_closed();
        debug!(server = %self.guard.name(), "the listener is closed");
        Poll::Ready(None)
    }

    /// Well before the cut, at which a listener that is open has failed.
    fn last_try_by(&self, now: Instant) -> Instant {
        let wait = self.limits.linger + LAST_WAIT;
        let plan = self.shutdown.inner.plan.get();
        now + plan.map_or(wait, |plan| wait.min((plan.cut - now) / 2))
    }

    fn wrap(&self, io: L::Io) -> DrainIo<L::Io> {
        let guard = self.shutdown.connection();
        let slot = self.slots.take();
        DrainIo::wrap(
            io,
            guard,
            Arc::clone(&self.limits),
            Some(slot),
            self.managed,
        )
    }
}

/// Of a connection that is gone: the next one may be there already.
fn is_of_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected
    )
}
