//! The response future: attempt, wait, attempt.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress_core::clock;
use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};
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
        Waiting {
            #[pin]
            wait: Sleep,
            cause: Cause,
        },
        // For what the attempt before has not yet given up, and for the
        // service.
        Preparing {
            // Until when; made once there is something to wait for.
            #[pin]
            limit: Option<Sleep>,
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
    #[inline]
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
    #[inline]
    fn after(&mut self, result: &Result<C::Response, C::Error>) -> Option<(Duration, Cause)> {
        let Some(judged) = self.call.judge(result) else {
            self.shared.settled(&self.session, result.is_ok());
            return None;
        };
        self.again(judged)
    }

    #[cold]
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
        self.call.gave_up(reason, self.session.attempts())
    }

    /// The next attempt, as soon as there is all that it takes.
    fn poll_prepare(
        &mut self,
        mut limit: Pin<&mut Option<Sleep>>,
        request: &mut Option<C::Request>,
        cause: Cause,
        cx: &mut Context<'_>,
    ) -> Poll<Result<S::Future, C::Output>> {
        let mut latest = self.session.deadline();
        if request.is_none() {
            match self.call.poll_repeat(cx) {
                Poll::Ready(Some(next)) => {
                    *request = Some(next);
                    limit.set(None);
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
                    self.shared.settled(&self.session, false);
                    return Poll::Ready(Err(C::output(Err(error))));
                }
                Poll::Pending => {}
            }
        }
        let Some(latest) = latest else {
            return Poll::Pending;
        };
        if limit.is_none() {
            limit.set(Some(sleep(latest - clock::now())));
        }
        ready!(limit.as_pin_mut().expect("it was just made").poll(cx));
        let reason = match request {
            Some(_) => GiveUp::Deadline,
            None => GiveUp::Body,
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

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Calling { attempt } => {
                    let result = ready!(attempt.poll(cx));
                    let Some((wait, cause)) = this.rest.after(&result) else {
                        return Poll::Ready(C::output(result));
                    };
                    // Before the wait: what is given up on holds a connection.
                    drop(result);
                    this.state.set(if wait.is_zero() {
                        State::preparing(cause)
                    } else {
                        let wait = sleep(wait);
                        State::Waiting { wait, cause }
                    });
                }
                StateProj::Waiting { wait, cause } => {
                    let cause = *cause;
                    ready!(wait.poll(cx));
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
