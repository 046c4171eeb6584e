//! The response future: attempt, wait, attempt.

use std::{
    fmt,
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress_core::clock;
use pin_project_lite::pin_project;
use tokio::{
    task::unconstrained,
    time::{Sleep, sleep},
};
use tower_service::Service;

use crate::{Call, Cause, GiveUp, call::Judged, policy::Shared, session::Session};

pin_project! {
    /// Response future of [`Retry`](crate::Retry). Dropping it drops the
    /// attempt that is under way, and there is no further one.
    ///
    /// Not tower's: its wait for the service between two attempts has no end,
    /// and neither the first attempt nor a later one could be told until when
    /// it is awaited.
    pub struct ResponseFuture<C: Call, S: Service<C::Request>> {
        #[pin]
        state: State<C::Request, S::Future>,
        rest: Rest<C, S>,
    }
}

/// What there is to do once an attempt has ended.
struct Rest<C, S> {
    call: C,
    service: S,
    shared: Arc<Shared>,
    session: Session,
}

pin_project! {
    #[project = StateProj]
    enum State<R, F> {
        Calling {
            #[pin]
            attempt: F,
        },
        // Boxed, as a timer is large, and most futures never have one but are
        // moved about.
        Waiting {
            wait: Pin<Box<Sleep>>,
            cause: Cause,
        },
        // For what the attempt before has not yet given up, and for the
        // service.
        Preparing {
            // Until when; made once there is something to wait for.
            limit: Option<Pin<Box<Sleep>>>,
            request: Option<R>,
            cause: Cause,
        },
    }
}

/// How long a connection has to give a body up whose answer was dropped: it
/// does so when its task runs next.
const HAND_BACK: Duration = Duration::from_secs(1);

impl<C, S> ResponseFuture<C, S>
where
    C: Call,
    S: Service<C::Request>,
{
    #[inline(always)]
    pub(crate) fn new(
        attempt: S::Future,
        call: C,
        service: S,
        shared: Arc<Shared>,
        session: Session,
    ) -> Self {
        Self {
            state: State::Calling { attempt },
            rest: Rest {
                call,
                service,
                shared,
                session,
            },
        }
    }
}

impl<C, S> Rest<C, S>
where
    C: Call,
    S: Service<C::Request, Response = C::Response, Error = C::Error>,
{
    /// After an attempt: how long until the next, or `None`.
    #[inline(always)]
    fn after(&mut self, result: &Result<C::Response, C::Error>) -> Option<(Duration, Cause)> {
        let Some(judged) = self.call.judge(result) else {
            let verdict = || self.call.verdict(result);
            self.shared.settled(&self.session, verdict);
            return None;
        };
        self.again(judged)
    }

    #[cold]
    #[inline(never)]
    fn again(&mut self, judged: Judged) -> Option<(Duration, Cause)> {
        let obstacle = || self.call.check(judged);
        let wait = self
            .shared
            .next(&mut self.session, judged.0, obstacle)
            .ok()?;
        Some((wait, judged.0.cause))
    }

    /// There is no answer in hand, and no further attempt.
    #[cold]
    fn gave_up(&self, cause: Cause, reason: GiveUp) -> C::Output {
        self.shared.gave_up(&self.session, cause, reason);
        self.call.gave_up(reason, cause, self.session.attempts())
    }

    /// The next attempt, as soon as there is all that it takes.
    fn poll_prepare(
        &mut self,
        limit: &mut Option<Pin<Box<Sleep>>>,
        request: &mut Option<C::Request>,
        cause: Cause,
        cx: &mut Context<'_>,
    ) -> Poll<Result<S::Future, C::Output>> {
        let mut latest = self.session.deadline();
        if request.is_none() {
            match self.call.poll_repeat(cx) {
                Poll::Ready(Some(next)) => {
                    *request = Some(next);
                    *limit = None;
                }
                Poll::Ready(None) => return Poll::Ready(Err(self.gave_up(cause, GiveUp::Body))),
                Poll::Pending => {
                    let enough = clock::now() + HAND_BACK;
                    latest = Some(latest.map_or(enough, |latest| latest.min(enough)));
                }
            }
        }
        if request.is_some() {
            match self.service.poll_ready(cx) {
                Poll::Ready(Ok(())) => return Poll::Ready(self.send(request, cause)),
                Poll::Ready(Err(error)) => {
                    self.shared.ended(&self.session);
                    return Poll::Ready(Err(C::output(Err(error))));
                }
                Poll::Pending => {}
            }
        }
        let Some(latest) = latest else {
            return Poll::Pending;
        };
        let limit = limit.get_or_insert_with(|| Box::pin(sleep(latest - clock::now())));
        // A service that uses up its task's budget whenever it is asked would
        // keep a constrained timer from ever being.
        ready!(pin!(unconstrained(limit.as_mut())).poll(cx));
        let now = clock::now();
        let is_past = self.session.deadline().is_some_and(|end| end <= now);
        let reason = if request.is_some() || is_past {
            GiveUp::Deadline
        } else {
            GiveUp::Body
        };
        Poll::Ready(Err(self.gave_up(cause, reason)))
    }

    /// Sends it to the service, which is ready.
    fn send(
        &mut self,
        request: &mut Option<C::Request>,
        cause: Cause,
    ) -> Result<S::Future, C::Output> {
        let deadline = self.shared.attempt_deadline(&self.session);
        if deadline.is_some_and(|deadline| deadline.is_past(clock::now())) {
            return Err(self.gave_up(cause, GiveUp::Deadline));
        }
        let mut request = request.take().expect("polled after completion");
        self.session.begin();
        self.call
            .stamp(&mut request, self.session.attempts(), deadline);
        Ok(self.service.call(request))
    }
}

impl<C, S> Future for ResponseFuture<C, S>
where
    C: Call,
    S: Service<C::Request, Response = C::Response, Error = C::Error>,
{
    type Output = C::Output;

    // What is nearly always all of it, so that it is inlined.
    #[inline(always)]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let this = self.as_mut().project();
        if let StateProj::Calling { attempt } = this.state.project() {
            let result = ready!(attempt.poll(cx));
            let Some((wait, cause)) = this.rest.after(&result) else {
                return Poll::Ready(C::output(result));
            };
            // Before the wait: what is given up on holds a connection.
            drop(result);
            self.as_mut().wait(wait, cause);
        }
        self.poll_further(cx)
    }
}

impl<C, S> ResponseFuture<C, S>
where
    C: Call,
    S: Service<C::Request, Response = C::Response, Error = C::Error>,
{
    #[cold]
    fn wait(self: Pin<&mut Self>, wait: Duration, cause: Cause) {
        self.project().state.set(if wait.is_zero() {
            State::preparing(cause)
        } else {
            let wait = Box::pin(sleep(wait));
            State::Waiting { wait, cause }
        });
    }

    /// After the first attempt.
    #[cold]
    #[inline(never)]
    fn poll_further(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        loop {
            let mut this = self.as_mut().project();
            match this.state.as_mut().project() {
                StateProj::Calling { attempt } => {
                    let result = ready!(attempt.poll(cx));
                    let Some((wait, cause)) = this.rest.after(&result) else {
                        return Poll::Ready(C::output(result));
                    };
                    drop(result);
                    self.as_mut().wait(wait, cause);
                }
                StateProj::Waiting { wait, cause } => {
                    let cause = *cause;
                    ready!(wait.as_mut().poll(cx));
                    this.state.set(State::preparing(cause));
                }
                StateProj::Preparing {
                    limit,
                    request,
                    cause,
                } => match ready!(this.rest.poll_prepare(limit, request, *cause, cx)) {
                    Ok(attempt) => this.state.set(State::Calling { attempt }),
                    Err(output) => return Poll::Ready(output),
                },
            }
        }
    }
}

impl<R, F> State<R, F> {
    const fn preparing(cause: Cause) -> Self {
        Self::Preparing {
            limit: None,
            request: None,
            cause,
        }
    }
}

impl<C, S> fmt::Debug for ResponseFuture<C, S>
where
    C: Call,
    S: Service<C::Request>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Calling { .. } => "calling",
            State::Waiting { .. } => "waiting",
            State::Preparing { .. } => "preparing",
        };
        f.debug_struct("ResponseFuture")
            .field("state", &state)
            .finish_non_exhaustive()
    }
}
