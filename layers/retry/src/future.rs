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
        state: State<C, S>,
    }
}

pin_project! {
    #[project = StateProj]
    #[project_replace = StateOwned]
    enum State<C: Call, S: Service<C::Request>> {
        First {
            #[pin]
            attempt: S::Future,
            rest: Rest<C, S>,
        },
        // In a box of its own, as most requests have no second attempt, and
        // their futures are moved about.
        Further {
            further: Kept<Further<C, S>>,
        },
        // All that was kept for another attempt is dropped when there is none.
        Done,
    }
}

/// A box that is dropped out of line. Dropping a future that has none is then so
/// little that it is inlined, and its answer stays in registers meanwhile: twice
/// as fast where nothing failed.
struct Kept<T>(Option<Pin<Box<T>>>);

impl<T> Kept<T> {
    fn new(kept: Pin<Box<T>>) -> Self {
        Self(Some(kept))
    }

    fn get(&self) -> &T {
        self.0.as_deref().expect("it is there until it is dropped")
    }

    fn get_pin(&mut self) -> Pin<&mut T> {
        let kept = self.0.as_mut().expect("it is there until it is dropped");
        kept.as_mut()
    }
}

impl<T> Drop for Kept<T> {
    #[inline]
    fn drop(&mut self) {
        #[cold]
        #[inline(never)]
        fn cold<T>(kept: Pin<Box<T>>) {
            drop(kept);
        }
        if let Some(kept) = self.0.take() {
            cold(kept);
        }
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
    // From the end of the first attempt on.
    struct Further<C: Call, S: Service<C::Request>> {
        rest: Rest<C, S>,
        // Why the last attempt was not enough.
        cause: Cause,
        #[pin]
        step: Step<C, S>,
    }
}

pin_project! {
    #[project = StepProj]
    enum Step<C: Call, S: Service<C::Request>> {
        Waiting {
            #[pin]
            wait: Sleep,
        },
        // For what the attempt before has not yet given up, and for the
        // service.
        Preparing {
            // Until when; made once there is something to wait for.
            #[pin]
            limit: Option<Sleep>,
            request: Option<C::Request>,
        },
        Calling {
            #[pin]
            attempt: S::Future,
        },
        // In place of a wait.
        Answering {
            answer: Option<C::Output>,
        },
    }
}

impl<C: Call, S: Service<C::Request>> Step<C, S> {
    /// To the next attempt.
    fn after(wait: Duration) -> Self {
        if wait.is_zero() {
            Self::preparing()
        } else {
            Self::Waiting { wait: sleep(wait) }
        }
    }

    const fn preparing() -> Self {
        Self::Preparing {
            limit: None,
            request: None,
        }
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
        let rest = Rest {
            call,
            service,
            shared,
            session,
        };
        Self {
            state: State::First { attempt, rest },
        }
    }
}

impl<C, S> Rest<C, S>
where
    C: Call,
    S: Service<C::Request, Response = C::Response, Error = C::Error>,
{
    /// After an attempt whose result stands.
    #[inline(always)]
    fn settled(&self, result: &Result<C::Response, C::Error>) {
        let verdict = || self.call.verdict(result);
        self.shared.settled(&self.session, verdict);
    }

    /// After one that is worth another: what is to be done, or `None` if its
    /// result is the answer all the same.
    #[cold]
    fn again(&mut self, judged: Judged) -> Option<Step<C, S>> {
        let mut answer = None;
        let obstacle = || self.call.check(judged);
        let leave = |wait| {
            answer = self.call.instead(wait);
            match answer {
                Some(_) => Err(GiveUp::Refused),
                None => Ok(()),
            }
        };
        let next = self
            .shared
            .next(&mut self.session, judged.0, obstacle, leave);
        match next {
            Ok(wait) => Some(Step::after(wait)),
            Err(_) => answer.is_some().then_some(Step::Answering { answer }),
        }
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
                    self.shared.ended(&self.session);
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
        let limit = limit.as_pin_mut().expect("it was set");
        // A service that uses up its task's budget whenever it is asked would
        // keep a constrained timer from ever being.
        ready!(pin!(unconstrained(limit)).poll(cx));
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
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let mut state = self.project().state;
        if let StateProj::First { attempt, rest } = state.as_mut().project() {
            let result = ready!(attempt.poll(cx));
            let goes_on = match rest.call.judge(&result) {
                None => {
                    rest.settled(&result);
                    false
                }
                Some(judged) => state.as_mut().goes_on(judged),
            };
            if !goes_on {
                state.set(State::Done);
                return Poll::Ready(C::output(result));
            }
            // Before the wait: what is given up on holds a connection.
            drop(result);
        }
        state.poll_further(cx)
    }
}

// Nothing but what is done is told to the caller, who would else have to find
// out in memory: see `Kept`.
impl<C, S> State<C, S>
where
    C: Call,
    S: Service<C::Request, Response = C::Response, Error = C::Error>,
{
    /// After a first attempt that is worth another: whether its result is not
    /// the answer.
    #[cold]
    #[inline(never)]
    fn goes_on(mut self: Pin<&mut Self>, judged: Judged) -> bool {
        let StateProj::First { rest, .. } = self.as_mut().project() else {
            unreachable!("the first attempt has ended");
        };
        let Some(step) = rest.again(judged) else {
            return false;
        };
        let StateOwned::First { rest, .. } = self.as_mut().project_replace(Self::Done) else {
            unreachable!("the first attempt has ended");
        };
        let cause = judged.0.cause;
        let further = Box::pin(Further { rest, cause, step });
        self.set(Self::Further {
            further: Kept::new(further),
        });
        true
    }

    #[cold]
    #[inline(never)]
    fn poll_further(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let StateProj::Further { further } = self.as_mut().project() else {
            panic!("polled after completion");
        };
        let output = ready!(further.get_pin().poll_attempts(cx));
        self.set(Self::Done);
        Poll::Ready(output)
    }
}

impl<C, S> Further<C, S>
where
    C: Call,
    S: Service<C::Request, Response = C::Response, Error = C::Error>,
{
    fn poll_attempts(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        loop {
            let mut this = self.as_mut().project();
            match this.step.as_mut().project() {
                StepProj::Waiting { wait } => {
                    ready!(wait.poll(cx));
                    this.step.set(Step::preparing());
                }
                StepProj::Preparing { limit, request } => {
                    match ready!(this.rest.poll_prepare(limit, request, *this.cause, cx)) {
                        Ok(attempt) => this.step.set(Step::Calling { attempt }),
                        Err(output) => return Poll::Ready(output),
                    }
                }
                StepProj::Calling { attempt } => {
                    let result = ready!(attempt.poll(cx));
                    let Some(judged) = this.rest.call.judge(&result) else {
                        this.rest.settled(&result);
                        return Poll::Ready(C::output(result));
                    };
                    let Some(step) = this.rest.again(judged) else {
                        return Poll::Ready(C::output(result));
                    };
                    drop(result);
                    *this.cause = judged.0.cause;
                    this.step.set(step);
                }
                StepProj::Answering { answer } => {
                    let answer = answer.take().expect("polled after completion");
                    return Poll::Ready(answer);
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
            State::First { .. } => "calling",
            State::Further { further } => match &further.get().step {
                Step::Waiting { .. } => "waiting",
                Step::Preparing { .. } => "preparing",
                Step::Calling { .. } => "calling",
                Step::Answering { .. } => "answering",
            },
            State::Done => "done",
        };
        f.debug_struct("ResponseFuture")
            .field("state", &state)
            .finish_non_exhaustive()
    }
}
