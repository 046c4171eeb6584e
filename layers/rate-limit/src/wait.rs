//! Waiting for one's turn in place of being refused: for clients.

mod line;

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress_core::{
    BoxError, Http, Refusal, RefusalKind, Sees, View,
    clock::{self, Instant},
    deadline::Deadline,
};
use line::{LineId, Lines, Place};
use pin_project_lite::pin_project;
use tokio::time::{sleep, timeout};
use tower_layer::Layer;
use tower_service::Service;

use crate::{
    Handle,
    layer::{Errors, Shared},
    limiter::{Admission, Behind, Limiter},
    store::{Ask, Verdict},
};

/// Lets requests wait until they fit, in the order in which they came.
///
/// ```text
///            fits, and nobody waits
///  request ──────────────────────────────▶ inner service
///     │                                        ▲
///     │ else      the line of its key(s)       │ fits
///     └──▶ room? ──▶ [ 4th 3rd 2nd ] 1st ──────┘
///            │                        │
///            └─ no, or too late ──────┴──▶ error: Refusal, with retry_after
/// ```
///
/// Each combination of keys has a line of its own: within it nobody overtakes.
/// Lines that share one of several limits compete for it.
///
/// A request that cannot have its turn within the longest wait, or before its
/// [`Deadline`], is refused at once: what those ahead of it cost is known. So
/// is one that finds the room full. The others wait inside the response
/// future, holding the inner service that was polled ready for them; where
/// that is a permit of a concurrency limit, it is held while they wait, so put
/// such limits further in only with that in mind. Dropping the future leaves
/// the line, charges nothing, and lets the next one move up. A request comes
/// when it is called: one that stands in front and is not polled holds up its
/// line, until those behind it have waited too long.
///
/// Made by [`RateLimitBuilder::build_waiting`](crate::RateLimitBuilder::build_waiting).
/// Needs a tokio runtime with timers, whose resolution (1 ms) is how late a
/// request may start.
///
/// ```
/// use std::time::Duration;
/// use buttress_rate_limit::{Limit, Quota, RateLimitLayer};
/// use tower::{Layer, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
/// // An API that allows ten calls a second: the 21st starts a second late.
/// let layer = RateLimitLayer::any()
///     .limit(Limit::any(Quota::per_second(10)))
///     .build_waiting(Duration::from_secs(30), 1000)?;
/// let client = layer.layer(service_fn(async |call: u32| Ok::<_, std::io::Error>(call)));
///
/// let start = tokio::time::Instant::now();
/// for call in 0..21 {
///     client.clone().oneshot(call).await?;
/// }
/// assert!(start.elapsed() >= Duration::from_millis(1100));
/// # Ok(())
/// # }
/// ```
pub struct WaitLayer<V: View = Http> {
    shared: Arc<Waiting<V>>,
}

struct Waiting<V: View> {
    limiter: Limiter<V>,
    lines: Arc<Lines>,
    longest: Duration,
    room: usize,
}

/// What becomes of a request that comes.
enum Entry {
    Pass,
    Refuse(Refusal),
    Wait(Turn),
}

type Turn = Pin<Box<dyn Future<Output = Result<(), Refusal>> + Send>>;

impl<V: View> Waiting<V> {
    fn enter(this: &Arc<Self>, request: V::Ref<'_>, deadline: Option<Deadline>) -> Entry {
        let asks = match this.limiter.read(request) {
            Ok(asks) if asks.is_empty() => {
                this.limiter.bypassed();
                return Entry::Pass;
            }
            Ok(asks) => asks,
            Err(Admission::Refuse(refusal, ..)) => return Entry::Refuse(refusal),
            Err(_) => return Entry::Pass,
        };
        let id: LineId = asks
            .iter()
            .flatten()
            .map(|ask| (ask.limit, ask.id))
            .collect();
        let now = clock::now();
        let longest = deadline.map_or(this.longest, |deadline| {
            deadline.remaining(now).min(this.longest)
        });

        // Held while deciding, so that nobody who comes later gets in before
        // one who is just about to stand in line.
        let mut state = this.lines.lock();
        let ahead = state.ahead(&id);
        if ahead.is_none() {
            let decision = this.limiter.decide(&asks);
            let waits = matches!(decision.verdict, Verdict::Wait { .. });
            if !waits || this.limiter.is_shadow() {
                drop(state);
                return match this.limiter.conclude(decision) {
                    Admission::Refuse(refusal, ..) => Entry::Refuse(refusal),
                    _ => Entry::Pass,
                };
            }
        }
        let behind = this
            .limiter
            .wait_behind(&asks, ahead.unwrap_or_default(), now);
        let kind = match behind.wait {
            // It would hold up the line, only to be refused at its end.
            None => Some(RefusalKind::NeverFits),
            _ if state.waiting() >= this.room => Some(RefusalKind::Overloaded),
            Some(wait) if wait > longest => Some(RefusalKind::RateLimited),
            Some(_) => None,
        };
        if let Some(kind) = kind {
            drop(state);
            return Entry::Refuse(this.refusal(kind, behind));
        }

        let costs = asks.iter().flatten().map(|ask| ask.cost).collect();
        let place = state.join(&this.lines, id, costs);
        drop(state);
        Entry::Wait(Box::pin(Arc::clone(this).turn(asks, place, now, longest)))
    }

    /// Waits for the front of the line, then for the quota.
    async fn turn(
        self: Arc<Self>,
        asks: Vec<Option<Ask>>,
        mut place: Place,
        start: Instant,
        longest: Duration,
    ) -> Result<(), Refusal> {
        // Those ahead may fare worse than was reckoned when others share a
        // limit with them, so the longest wait is watched all the same; from
        // the call on, however late this is polled.
        let rest = longest.saturating_sub(clock::now() - start);
        if timeout(rest, place.front()).await.is_err() {
            let behind = self.limiter.wait_behind(&asks, &[], clock::now());
            return Err(self.refusal(RefusalKind::RateLimited, behind));
        }
        loop {
            // Charged and out of the line in one step: who comes in between
            // would reckon with both.
            let decision = {
                let mut state = self.lines.lock();
                let decision = self.limiter.decide(&asks);
                if !matches!(decision.verdict, Verdict::Wait { .. }) {
                    place.leave(&mut state);
                }
                decision
            };
            let Verdict::Wait { limit, wait } = decision.verdict else {
                return match self.limiter.conclude(decision) {
                    Admission::Refuse(refusal, ..) => Err(refusal),
                    _ => Ok(()),
                };
            };
            let wait = Duration::from_nanos(wait);
            if (clock::now() - start).saturating_add(wait) > longest {
                let wait = Some(wait);
                return Err(self.refusal(RefusalKind::RateLimited, Behind { limit, wait }));
            }
            sleep(wait).await;
        }
    }

    /// Counts and tells of it: not to be called while the lines are locked.
    fn refusal(&self, kind: RefusalKind, behind: Behind) -> Refusal {
        let refusal = Refusal::new(kind).with_retry_after(behind.wait);
        self.limiter.count_refusal(&refusal, behind.limit);
        refusal
    }
}

impl<V: View> WaitLayer<V> {
    pub(crate) fn new(shared: Shared<V, Errors>, longest: Duration, room: usize) -> Self {
        Self {
            shared: Arc::new(Waiting {
                limiter: shared.limiter,
                lines: Arc::default(),
                longest,
                room,
            }),
        }
    }

    /// Looks up and resets keys and replaces quotas, while it serves. Those
    /// that wait notice when their reckoned turn comes.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(self.shared.limiter.tables()))
    }

    /// How many requests are waiting.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.lines.lock().waiting()
    }
}

impl<V: View> Clone for WaitLayer<V> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<V: View> fmt::Debug for WaitLayer<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WaitLayer")
            .field("limiter", &self.shared.limiter)
            .field("longest", &self.shared.longest)
            .field("room", &self.shared.room)
            .finish_non_exhaustive()
    }
}

impl<S, V: View> Layer<S> for WaitLayer<V> {
    type Service = Wait<S, V>;

    fn layer(&self, inner: S) -> Self::Service {
        Wait {
            inner,
            shared: Arc::clone(&self.shared),
        }
    }
}

/// The service of a [`WaitLayer`].
pub struct Wait<S, V: View = Http> {
    inner: S,
    shared: Arc<Waiting<V>>,
}

impl<S, V: View> Wait<S, V> {
    /// The inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The inner service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The inner service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: Clone, V: View> Clone for Wait<S, V> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<S: fmt::Debug, V: View> fmt::Debug for Wait<S, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wait")
            .field("inner", &self.inner)
            .field("limiter", &self.shared.limiter)
            .finish_non_exhaustive()
    }
}

impl<S, V, Req> Service<Req> for Wait<S, V>
where
    V: Sees<Req>,
    S: Service<Req, Error: Into<BoxError>> + Clone,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = WaitFuture<S, Req, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let deadline = V::extensions(&request).and_then(Deadline::of);
        let state = match Waiting::enter(&self.shared, V::see(&request), deadline) {
            Entry::Pass => State::Calling {
                future: self.inner.call(request),
            },
            Entry::Refuse(refusal) => {
                // What was promised is not used: given back here, and not
                // when this instance happens to be called again.
                self.inner = self.inner.clone();
                State::Refused {
                    refusal: Some(refusal),
                }
            }
            Entry::Wait(turn) => {
                // Only the polled instance was promised ready: it goes with
                // the request, and the clone will be polled afresh.
                let fresh = self.inner.clone();
                let ready = mem::replace(&mut self.inner, fresh);
                State::Waiting {
                    turn,
                    held: Some((ready, request)),
                }
            }
        };
        WaitFuture { state }
    }
}

pin_project! {
    /// Response future of [`Wait`]. Dropping it while it waits leaves the line
    /// and charges nothing.
    pub struct WaitFuture<S, Req, F> {
        #[pin]
        state: State<S, Req, F>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, Req, F> {
        Waiting { turn: Turn, held: Option<(S, Req)> },
        Calling { #[pin] future: F },
        Refused { refusal: Option<Refusal> },
    }
}

impl<S, Req> Future for WaitFuture<S, Req, S::Future>
where
    S: Service<Req, Error: Into<BoxError>>,
{
    type Output = Result<S::Response, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                StateProj::Waiting { turn, held } => {
                    let turn = ready!(turn.as_mut().poll(cx));
                    let (mut inner, request) = held.take().expect("polled after completion");
                    turn?;
                    let future = inner.call(request);
                    state.set(State::Calling { future });
                }
                StateProj::Calling { future } => return future.poll(cx).map_err(Into::into),
                StateProj::Refused { refusal } => {
                    let refusal = refusal.take().expect("polled after completion");
                    return Poll::Ready(Err(refusal.into()));
                }
            }
        }
    }
}

impl<S, Req, F> fmt::Debug for WaitFuture<S, Req, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            State::Waiting { .. } => "WaitFuture::Waiting",
            State::Calling { .. } => "WaitFuture::Calling",
            State::Refused { .. } => "WaitFuture::Refused",
        })
    }
}

#[cfg(test)]
mod tests;
