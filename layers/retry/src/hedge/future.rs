//! The response future: an attempt, more of them while it lasts, and the first
//! good answer.

use std::{
    fmt,
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use buttress_core::{classify::Verdict, clock::Instant};
use pin_project_lite::pin_project;
use tokio::{
    task::unconstrained,
    time::{Sleep, sleep},
};
use tower_service::Service;

use super::{
    Call,
    call::{Bad, Obstacle},
    metrics::Result as Went,
    shared::Shared,
};

/// How often a hedge is put off because the first attempt still reads the
/// body. A body that takes longer is slow by itself.
const MAX_PUT_OFF: u32 = 3;

/// Before the body is looked at again, where the delay is shorter.
const PUT_OFF: Duration = Duration::from_millis(1);

pin_project! {
    /// Response future of [`Hedge`](crate::Hedge). Dropping it drops all
    /// attempts that are under way. Those that have lost are dropped when there
    /// is an answer, before this is.
    pub struct ResponseFuture<C: Call, S: Service<C::Request>> {
        #[pin]
        first: Option<S::Future>,
        // Made when the first attempt was polled and is not over.
        #[pin]
        timer: Option<Sleep>,
        // None where there is no hedge in any case.
        rest: Option<Rest<C, S>>,
    }
}

/// What there is besides the first attempt.
struct Rest<C: Call, S: Service<C::Request>> {
    call: C,
    /// For the next hedge; gone when there will be none, and with it the
    /// readiness that it may hold.
    service: Option<S>,
    shared: Arc<Shared>,
    /// When the first attempt began.
    started: Option<Instant>,
    hedges: Vec<Attempt<S::Future>>,
    begun: u32,
    put_off: u32,
    delay: Duration,
    stage: Stage,
    /// A bad answer that said when to come again.
    told: Option<Result<C::Response, C::Error>>,
}

struct Attempt<F> {
    future: Pin<Box<F>>,
    started: Option<Instant>,
}

/// How far the next hedge is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The attempt before has just begun.
    Begun,
    Waiting,
    Readying,
    /// There is no next.
    Over,
}

/// Which attempt it was.
#[derive(Clone, Copy)]
enum Which {
    First,
    Hedge { started: Option<Instant> },
}

impl<C: Call, S: Service<C::Request>> ResponseFuture<C, S> {
    /// Of a request that is sent once.
    pub(super) const fn alone(first: S::Future) -> Self {
        Self {
            first: Some(first),
            timer: None,
            rest: None,
        }
    }

    #[inline]
    pub(super) fn new(
        first: S::Future,
        call: C,
        service: S,
        shared: Arc<Shared>,
        started: Option<Instant>,
    ) -> Self {
        Self {
            first: Some(first),
            timer: None,
            rest: Some(Rest {
                call,
                service: Some(service),
                shared,
                started,
                hedges: Vec::new(),
                begun: 0,
                put_off: 0,
                delay: Duration::ZERO,
                stage: Stage::Begun,
                told: None,
            }),
        }
    }
}

impl<C, S> Rest<C, S>
where
    C: Call,
    S: Service<C::Request, Response = C::Response, Error = C::Error>,
{
    /// An attempt has ended: the answer, if this makes one. `first`: the first
    /// is under way.
    #[inline]
    fn ended(
        &mut self,
        which: Which,
        result: Result<C::Response, C::Error>,
        first: bool,
    ) -> Option<Result<C::Response, C::Error>> {
        if let Some(bad) = self.call.judge(&result) {
            return self.bad(which, bad, result, first);
        }
        let started = match which {
            // It would have taken longer yet. Were it left out, the percentile
            // would be one of the fast.
            Which::Hedge { .. } if first => self.started,
            Which::Hedge { started } => started,
            Which::First => self.started,
        };
        self.shared.record(started);
        self.shared.answered(|| self.call.verdict(&result));
        if let Which::Hedge { .. } = which {
            self.shared.metrics.hedges(Went::Won, 1);
        }
        if !self.hedges.is_empty() {
            let lost = self.hedges.len() as u64;
            self.shared.metrics.hedges(Went::Lost, lost);
        }
        Some(result)
    }

    #[cold]
    fn bad(
        &mut self,
        which: Which,
        bad: Bad,
        result: Result<C::Response, C::Error>,
        first: bool,
    ) -> Option<Result<C::Response, C::Error>> {
        if let Which::Hedge { .. } = which {
            self.shared.metrics.hedges(Went::Lost, 1);
        }
        if first || !self.hedges.is_empty() {
            self.shared.failed();
            // One that told nothing is dropped now, and its connection freed.
            if bad.told {
                self.over();
                self.told = Some(result);
            }
            return None;
        }
        self.shared.answered(|| Verdict::Failure);
        match self.told.take() {
            Some(told) if !bad.told => Some(told),
            _ => Some(result),
        }
    }

    /// There will be no further hedge.
    #[cold]
    fn over(&mut self) {
        self.stage = Stage::Over;
        self.service = None;
        self.call.no_more();
    }

    /// What there is to be done for the next hedge; `true` if one has begun.
    fn next(&mut self, mut timer: Pin<&mut Option<Sleep>>, cx: &mut Context<'_>) -> bool {
        loop {
            match self.stage {
                Stage::Begun => {
                    self.delay = self.shared.delay(self.started);
                    self.stage = if self.delay.is_zero() {
                        Stage::Readying
                    } else {
                        timer.set(Some(sleep(self.delay)));
                        Stage::Waiting
                    };
                }
                Stage::Waiting => {
                    let sleep = timer.as_mut().as_pin_mut().expect("it waits for it");
                    // An attempt that uses up its task's budget whenever it is
                    // polled would keep a constrained timer from being asked.
                    if pin!(unconstrained(sleep)).poll(cx).is_pending() {
                        return false;
                    }
                    timer.set(None);
                    self.stage = Stage::Readying;
                }
                Stage::Readying => {
                    match self.call.check() {
                        Ok(()) => {}
                        Err(Obstacle::Now) if self.put_off < MAX_PUT_OFF => {
                            self.put_off += 1;
                            timer.set(Some(sleep(self.delay.max(PUT_OFF))));
                            self.stage = Stage::Waiting;
                            continue;
                        }
                        Err(_) => {
                            self.over();
                            return false;
                        }
                    }
                    let service = self.service.as_mut().expect("there is a next");
                    match service.poll_ready(cx) {
                        Poll::Pending => return false,
                        Poll::Ready(Ok(())) => return self.begin(),
                        // The first attempt knows nothing of it.
                        Poll::Ready(Err(_)) => self.over(),
                    }
                }
                Stage::Over => return false,
            }
        }
    }

    /// Sends the hedge, unless the budget is used up.
    #[cold]
    fn begin(&mut self) -> bool {
        let request = self
            .shared
            .withdraw()
            .then(|| self.call.hedge(self.begun + 1));
        let (Some(Some(request)), Some(service)) = (request, &mut self.service) else {
            self.over();
            return false;
        };
        self.begun += 1;
        self.shared.hedging(self.begun + 1, self.delay);
        let started = self.shared.started();
        let future = Box::pin(service.call(request));
        self.hedges.push(Attempt { future, started });
        if self.begun < self.shared.max_hedges() {
            self.stage = Stage::Begun;
        } else {
            self.over();
        }
        true
    }
}

impl<C, S> Future for ResponseFuture<C, S>
where
    C: Call,
    S: Service<C::Request, Response = C::Response, Error = C::Error>,
{
    type Output = Result<C::Response, C::Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some(rest) = this.rest else {
            let first = this.first.as_pin_mut().expect("polled after completion");
            return first.poll(cx);
        };
        let answer = 'answer: loop {
            if let Some(first) = this.first.as_mut().as_pin_mut()
                && let Poll::Ready(result) = first.poll(cx)
            {
                this.first.set(None);
                if let Some(answer) = rest.ended(Which::First, result, false) {
                    break answer;
                }
            }
            let mut at = 0;
            while let Some(attempt) = rest.hedges.get_mut(at) {
                let Poll::Ready(result) = attempt.future.as_mut().poll(cx) else {
                    at += 1;
                    continue;
                };
                let Attempt { started, .. } = rest.hedges.remove(at);
                let which = Which::Hedge { started };
                if let Some(answer) = rest.ended(which, result, this.first.is_some()) {
                    break 'answer answer;
                }
            }
            if !rest.next(this.timer.as_mut(), cx) {
                return Poll::Pending;
            }
        };
        // The losers, now, and not when the caller drops this.
        this.first.set(None);
        this.timer.set(None);
        *this.rest = None;
        Poll::Ready(answer)
    }
}

impl<C, S> fmt::Debug for ResponseFuture<C, S>
where
    C: Call,
    S: Service<C::Request>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rest = self.rest.as_ref();
        f.debug_struct("ResponseFuture")
            .field("first", &self.first.is_some())
            .field("hedges", &rest.map_or(0, |rest| rest.hedges.len()))
            .finish_non_exhaustive()
    }
}
