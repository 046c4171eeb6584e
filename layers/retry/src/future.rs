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

use crate::{Call, Cause, GiveUp, policy::Shared, session::Session};

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
            next: Option<Next<R>>,
        },
        Readying {
            // Until when the service is waited for; made once it is not ready.
            #[pin]
            limit: Option<Sleep>,
            next: Option<Next<R>>,
        },
    }
}

/// The next attempt's request, and why there is one.
struct Next<R> {
    request: R,
    cause: Cause,
}

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
    /// After an attempt: what comes after how long, or `None`.
    #[inline]
    fn after(
        &mut self,
        result: &Result<C::Response, C::Error>,
    ) -> Option<(Duration, Next<C::Request>)> {
        let Some(judged) = self.call.judge(result) else {
            self.shared.settled(&self.session);
            return None;
        };
        self.again(judged)
    }

    #[cold]
    fn again(&mut self, judged: crate::call::Judged) -> Option<(Duration, Next<C::Request>)> {
        let obstacle = || self.call.check(judged);
        let wait = self
            .shared
            .next(&mut self.session, judged.0, obstacle)
            .ok()?;
        let next = Next {
            request: self.call.repeat(),
            cause: judged.0.cause,
        };
        Some((wait, next))
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
                    let Some((wait, next)) = this.rest.after(&result) else {
                        return Poll::Ready(C::output(result));
                    };
                    // Before the wait: what is given up on holds a connection.
                    drop(result);
                    let next = Some(next);
                    this.state.set(if wait.is_zero() {
                        State::Readying { limit: None, next }
                    } else {
                        let wait = sleep(wait);
                        State::Waiting { wait, next }
                    });
                }
                StateProj::Waiting { wait, next } => {
                    ready!(wait.poll(cx));
                    let next = next.take();
                    this.state.set(State::Readying { limit: None, next });
                }
                StateProj::Readying { mut limit, next } => {
                    let Rest {
                        call,
                        service,
                        shared,
                        session,
                    } = this.rest;
                    let Next { mut request, cause } = match service.poll_ready(cx) {
                        Poll::Ready(Ok(())) => next.take().expect("polled after completion"),
                        Poll::Ready(Err(error)) => {
                            shared.settled(session);
                            return Poll::Ready(C::output(Err(error)));
                        }
                        Poll::Pending => {
                            let Some(deadline) = session.deadline() else {
                                return Poll::Pending;
                            };
                            if limit.is_none() {
                                limit.set(Some(sleep(deadline - clock::now())));
                            }
                            let limit = limit.as_pin_mut().expect("it was just made");
                            ready!(limit.poll(cx));
                            let cause = next.take().map_or(Cause::Error, |next| next.cause);
                            shared.gave_up(session, cause, GiveUp::Deadline);
                            return Poll::Ready(call.elapsed(session.attempts()));
                        }
                    };
                    let deadline = shared.attempt_deadline(session);
                    if deadline.is_some_and(|deadline| deadline.is_past(clock::now())) {
                        shared.gave_up(session, cause, GiveUp::Deadline);
                        return Poll::Ready(call.elapsed(session.attempts()));
                    }
                    session.begin();
                    call.stamp(&mut request, session.attempts(), deadline);
                    let attempt = service.call(request);
                    this.state.set(State::Calling { attempt });
                }
            }
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
            State::Readying { .. } => "readying",
        };
        f.debug_struct("ResponseFuture")
            .field("state", &state)
            .finish_non_exhaustive()
    }
}
