//! The request's body on its way upstream.
//!
//! It streams, and is never collected. What it does beside: it counts, and
//! fails when it grows past the limit, or when the client has stopped sending
//! it; it keeps the first bytes until the
//! upstream has answered, so that a request that hit a stale connection can go
//! again; and it waits for the upstream's word where the client does
//! (`Expect: 100-continue`).

use std::{
    fmt, mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use buttress::{BoxError, Head, Refusal, RefusalKind};
use bytes::Bytes;
use http::{HeaderMap, Version};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::{
    sync::oneshot,
    time::{Instant, Sleep, sleep_until},
};

/// How much of a body is kept for going again.
const KEPT: usize = 64 << 10;

/// How long an upstream that says nothing may hold a body back. It may be too
/// old for `100 Continue`, so that RFC 9110 §10.1.1 forbids to wait for ever.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a client may take for the next piece of a body that is asked for
/// it: so long as one that takes nothing of its answer has. Else it would hold
/// its place for ever where the upstream has answered before the end, and no
/// route's `timeout` rules any more.
pub(crate) const SILENCE: Duration = Duration::from_secs(60);

/// Whether a client that sends no more of this request's body may still be
/// listening: over gRPC either side may, for as long as it likes, and HTTP/2
/// asks by pings whether it is there.
pub(crate) fn may_be_silent(request: Head<'_>) -> bool {
    request.version == Version::HTTP_2 && request.is_grpc()
}

/// Why a body ended before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// It is larger than allowed.
    TooLarge,
    /// The client went away, or what it sent is no body.
    Client,
    /// The client is there, and sends no more.
    Stalled,
    /// Another attempt has taken over, or the upstream does not want it.
    Unwanted,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLarge => "the request body is too large",
            Self::Client => "the request body broke off",
            Self::Stalled => "the request body stalled",
            Self::Unwanted => "the request body is not wanted any more",
        })
    }
}

impl std::error::Error for Cut {}

pin_project! {
    /// A body of a client that may not have none for too long, once it is asked
    /// for more: it ends by the refusal that the client gets.
    pub(crate) struct Timed<B> {
        #[pin]
        body: B,
        // `None` for ever.
        silence: Option<Duration>,
        // Until then, while it has none.
        stall: Option<Pin<Box<Sleep>>>,
        pending: bool,
    }
}

impl<B> Timed<B> {
    pub(crate) const fn new(body: B, silence: Option<Duration>) -> Self {
        Self {
            body,
            silence,
            stall: None,
            pending: false,
        }
    }
}

impl<B> Body for Timed<B>
where
    B: Body<Data = Bytes, Error: Into<BoxError>>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.project();
        // Before the clock: what has come in time may be asked for late.
        if let Poll::Ready(frame) = this.body.poll_frame(cx) {
            *this.pending = false;
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let was_pending = mem::replace(this.pending, true);
        let Some(silence) = *this.silence else {
            return Poll::Pending;
        };
        let end = || Instant::now() + silence;
        let stall = match this.stall {
            Some(stall) => {
                if !was_pending {
                    stall.as_mut().reset(end());
                }
                stall
            }
            none => none.insert(Box::pin(sleep_until(end()))),
        };
        ready!(stall.as_mut().poll(cx));
        let stalled =
            Refusal::new(RefusalKind::RequestTimeout).with_detail("the request body stalled");
        Poll::Ready(Some(Err(stalled.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What the client sends, as the layers around give it to us.
type Live = Pin<Box<dyn Body<Data = Bytes, Error = BoxError> + Send>>;

/// The one body that the client sends, shared by the attempts to send it on.
#[derive(Clone)]
pub(crate) struct Source {
    inner: Arc<Mutex<Inner>>,
    /// Why the body ended early, if it did.
    pub(crate) cut: Arc<OnceLock<Cut>>,
}

struct Inner {
    /// `None` once it was given back.
    body: Option<Live>,
    seen: u64,
    limit: u64,
    /// Asked for more, the client had none.
    pending: bool,
    /// Of the connection that asked.
    waker: Option<Waker>,
    /// Data frames already handed on, while all of them are kept.
    kept: Vec<Bytes>,
    kept_trailers: Option<HeaderMap>,
    keeping: bool,
    /// Which attempt may read. An earlier one's connection may still hold its
    /// [`Outgoing`], and must not steal a frame.
    attempt: u32,
}

impl Source {
    pub(crate) fn new<B>(body: B, limit: u64, silence: Option<Duration>) -> Self
    where
        B: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                body: Some(Box::pin(Timed::new(body, silence))),
                seen: 0,
                limit,
                pending: false,
                waker: None,
                kept: Vec::new(),
                kept_trailers: None,
                keeping: true,
                attempt: 0,
            })),
            cut: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here can be left half done by a panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The body from its start, for the next attempt; the earlier ones get no
    /// more. `None` where its start is gone.
    pub(crate) fn attempt(&self) -> Option<Outgoing> {
        let mut inner = self.lock();
        inner.attempt += 1;
        inner.pending = false;
        // Of what nobody has asked for, nothing is lost.
        inner.keeping |= inner.seen == 0;
        inner.keeping.then(|| Outgoing {
            attempt: inner.attempt,
            next: 0,
            trailed: false,
            source: Some(self.clone()),
            wait: None,
        })
    }

    /// Lets go of what was kept: the request will not go again.
    pub(crate) fn settle(&self) {
        let mut inner = self.lock();
        inner.keeping = false;
        inner.kept = Vec::new();
    }

    /// Gives the body back to the layers around, for an attempt of theirs. The
    /// connection that still sends it breaks off.
    pub(crate) fn give_back(&self) {
        let mut inner = self.lock();
        inner.attempt += 1;
        inner.keeping = false;
        inner.kept = Vec::new();
        let (body, waker) = (inner.body.take(), inner.waker.take());
        drop(inner);
        drop(body);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// What is left of it while a connection still sends it.
    pub(crate) fn downgrade(&self) -> Sending {
        Sending {
            inner: Arc::downgrade(&self.inner),
            cut: Arc::clone(&self.cut),
        }
    }

    /// Keeps nothing of what is going to be sent, unless some of it was before.
    pub(crate) fn sent_once(&self) {
        let mut inner = self.lock();
        inner.keeping &= inner.seen > 0;
    }

    /// Whether it is the client's turn: what has come so far is sent on.
    pub(crate) fn waits_for_client(&self) -> bool {
        self.lock().pending
    }
}

/// A body as who has the answer sees it: there for as long as it is sent.
pub(crate) struct Sending {
    inner: Weak<Mutex<Inner>>,
    cut: Arc<OnceLock<Cut>>,
}

impl Sending {
    /// Why the body ended early, if it did.
    pub(crate) fn cut(&self) -> Option<Cut> {
        self.cut.get().copied()
    }

    /// As [`Source::give_back`].
    pub(crate) fn give_back(self) {
        if let Some(inner) = self.inner.upgrade() {
            let cut = self.cut;
            Source { inner, cut }.give_back();
        }
    }
}

/// The request's body as one attempt sends it.
pub(crate) struct Outgoing {
    /// Where it comes from; `None` for no body at all.
    source: Option<Source>,
    attempt: u32,
    next: usize,
    trailed: bool,
    wait: Option<Pin<Box<dyn Future<Output = bool> + Send>>>,
}

impl Outgoing {
    /// No body.
    pub(crate) const fn empty() -> Self {
        Self {
            source: None,
            attempt: 0,
            next: 0,
            trailed: false,
            wait: None,
        }
    }

    /// Holds the body back until the upstream says so, or says nothing for a
    /// while. The client's own `100 Continue` is sent when hyper is first asked
    /// for the body, so that waiting here makes it the upstream's.
    pub(crate) fn hold(&mut self) -> Hold {
        let (open, opened) = oneshot::channel();
        self.wait = Some(Box::pin(async move {
            match tokio::time::timeout(PATIENCE, opened).await {
                Ok(Ok(())) | Err(_) => true,
                Ok(Err(_)) => false,
            }
        }));
        Hold(Arc::new(Mutex::new(Some(open))))
    }
}

/// What holds an [`Outgoing`] back.
#[derive(Clone)]
pub(crate) struct Hold(Arc<Mutex<Option<oneshot::Sender<()>>>>);

impl Hold {
    fn take(&self) -> Option<oneshot::Sender<()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Lets the body go.
    pub(crate) fn release(&self) {
        if let Some(open) = self.take() {
            let _ = open.send(());
        }
    }

    /// The upstream has answered without it: a body still held back is cut
    /// off, and the connection with it, since its framing promised one.
    pub(crate) fn cut(&self) {
        drop(self.take());
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let this = &mut *self;
        if let Some(wait) = &mut this.wait {
            if !ready!(wait.as_mut().poll(cx)) {
                return Poll::Ready(Some(Err(Cut::Unwanted)));
            }
            this.wait = None;
        }
        let Some(source) = &this.source else {
            return Poll::Ready(None);
        };
        let mut inner = source.lock();
        if inner.attempt != this.attempt {
            return Poll::Ready(Some(Err(Cut::Unwanted)));
        }
        let cut_off = |cut| Poll::Ready(Some(Err(*source.cut.get_or_init(|| cut))));
        if let Some(cut) = source.cut.get() {
            return cut_off(*cut);
        }
        if let Some(data) = inner.kept.get(this.next) {
            this.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(data.clone()))));
        }
        if this.trailed {
            return Poll::Ready(None);
        }
        if let Some(trailers) = &inner.kept_trailers {
            this.trailed = true;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers.clone()))));
        }
        let Some(body) = &mut inner.body else {
            return Poll::Ready(Some(Err(Cut::Unwanted)));
        };
        let polled = body.as_mut().poll_frame(cx);
        inner.pending = polled.is_pending();
        if inner.pending {
            inner.waker = Some(cx.waker().clone());
        }
        let frame = match ready!(polled) {
            None => return Poll::Ready(None),
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                return cut_off(match Refusal::find(&*error).map(Refusal::kind) {
                    Some(RefusalKind::RequestTimeout) => Cut::Stalled,
                    _ => Cut::Client,
                });
            }
        };
        if let Some(data) = frame.data_ref() {
            inner.seen += data.len() as u64;
            if inner.seen > inner.limit {
                return cut_off(Cut::TooLarge);
            }
            if inner.keeping && inner.seen <= KEPT as u64 {
                let data = data.clone();
                inner.kept.push(data);
                this.next += 1;
            } else {
                inner.keeping = false;
                inner.kept = Vec::new();
            }
        } else {
            this.trailed = true;
            if inner.keeping {
                inner.kept_trailers = frame.trailers_ref().cloned();
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.source.as_ref().is_none_or(|source| {
            let inner = source.lock();
            let replayed =
                inner.kept.len() <= self.next && (self.trailed || inner.kept_trailers.is_none());
            replayed && inner.body.as_ref().is_none_or(Body::is_end_stream)
        })
    }

    fn size_hint(&self) -> SizeHint {
        let Some(source) = &self.source else {
            return SizeHint::with_exact(0);
        };
        let inner = source.lock();
        // Asked before the first frame, when hyper chooses the framing.
        let again: usize = inner.kept.iter().skip(self.next).map(Bytes::len).sum();
        match inner.body.as_ref().and_then(|it| it.size_hint().exact()) {
            Some(rest) => SizeHint::with_exact(rest + again as u64),
            None => SizeHint::default(),
        }
    }
}
