//! Response futures: the inner one with its limit, or what stands in the place
//! of a call that came too late.

use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress_core::{
    body::ResponseBody,
    classify::GrpcCode,
    clock,
    deadline::Deadline,
    respond::{GRPC_STATUS, KeptHead},
};
use bytes::Bytes;
use http::{HeaderMap, Response};
use pin_project_lite::pin_project;

use crate::{
    Elapsed, Error, Extent, ToHead,
    shared::{Shared, Stage},
    timer::Timer,
};

/// Until when a call may last, and whom to tell if it does not end by then.
pub struct Watch {
    pub(crate) shared: Arc<Shared>,
    pub(crate) deadline: Deadline,
    /// What was left when the call came.
    left: Duration,
    /// What the responder needs to know of the request, if it is to answer.
    kept: Option<KeptHead>,
}

impl Watch {
    #[inline]
    pub(crate) const fn new(shared: Arc<Shared>, deadline: Deadline, left: Duration) -> Self {
        Self {
            shared,
            deadline,
            left,
            kept: None,
        }
    }

    /// The responder is to answer.
    #[inline]
    pub(crate) fn answering(mut self, kept: KeptHead) -> Self {
        self.kept = Some(kept);
        self
    }

    /// Nobody is to: who stands outside hears of it by an error.
    pub(crate) fn unanswered(mut self) -> Self {
        self.kept = None;
        self
    }

    pub(crate) fn is_past(&self) -> bool {
        self.deadline.is_past(clock::now())
    }

    /// Counts it and tells of it.
    pub(crate) fn elapsed(&self, stage: Stage) -> Elapsed {
        self.shared.elapsed(self.left, stage)
    }

    fn respond(&self) -> Response<Bytes> {
        let kept = self.kept.as_ref().expect("kept of every limited call");
        let elapsed = self.elapsed(Stage::Response);
        self.shared.respond(elapsed, kept.head())
    }

    /// The end of a gRPC stream: what the responder would have answered its
    /// call with, if it is to answer.
    pub(crate) fn trailers(&self, elapsed: Elapsed) -> Result<HeaderMap, Elapsed> {
        let Some(kept) = &self.kept else {
            return Err(elapsed);
        };
        let answer = self.shared.respond(elapsed.clone(), kept.head());
        if !answer.headers().contains_key(GRPC_STATUS) {
            return Err(elapsed);
        }
        let fields = answer.headers().iter();
        let fields = fields.filter(|(name, _)| name.as_str().starts_with("grpc-"));
        let fields = fields.map(|(name, value)| (name.clone(), value.clone()));
        Ok(fields.collect())
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("name", &self.shared.name())
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// What a call came to, with what watched over it; or, when time was up, only
/// that.
type Outcome<T, E> = Result<(Result<T, E>, Option<Watch>), Watch>;

pin_project! {
    /// A call, and its time if that is limited.
    pub(crate) struct Limited<F> {
        // None when time was up.
        #[pin]
        call: Option<F>,
        #[pin]
        timer: Timer,
        watch: Option<Watch>,
    }
}

impl<F> Limited<F> {
    #[inline]
    pub(crate) const fn new(call: F, watch: Option<Watch>) -> Self {
        Self {
            call: Some(call),
            timer: Timer::new(),
            watch,
        }
    }
}

impl<F, T, E> Limited<F>
where
    F: Future<Output = Result<T, E>>,
{
    /// When time is up, the call is gone. `gave_up`: whether a response says
    /// no more than that the callee's time was up.
    #[inline]
    fn poll(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        gave_up: impl FnOnce(&T) -> bool,
    ) -> Poll<Outcome<T, E>> {
        let mut this = self.project();
        let call = this.call.as_mut().as_pin_mut();
        // First, so that an answer that is there at the same moment wins.
        let polled = call.expect("polled after completion").poll(cx);
        match (polled, this.watch.as_ref()) {
            // Who was told the deadline may give up at it, too, and fail: time
            // is up whoever is first.
            (Poll::Ready(Err(_)), Some(watch)) if watch.is_past() => {}
            (Poll::Ready(Ok(response)), Some(watch)) if gave_up(&response) && watch.is_past() => {}
            (Poll::Ready(result), _) => {
                this.timer.stop();
                return Poll::Ready(Ok((result, this.watch.take())));
            }
            (Poll::Pending, None) => return Poll::Pending,
            (Poll::Pending, Some(watch)) => ready!(this.timer.as_mut().poll(watch.deadline, cx)),
        }
        // Its connection is free before anybody hears of it.
        this.call.set(None);
        this.timer.stop();
        Poll::Ready(Err(this.watch.take().expect("just seen")))
    }
}

/// What tonic's servers answer when the time is up that `grpc-timeout` told
/// them.
fn was_cancelled<B>(response: &Response<B>) -> bool {
    GrpcCode::of(response.headers()) == Some(GrpcCode::Cancelled)
}

pin_project! {
    /// Response future of [`Timeout`](crate::Timeout) where it answers by
    /// responses. Dropping it drops the call and its timer.
    ///
    /// # Panics
    ///
    /// If it has to wait for a limited call outside of a tokio runtime with a
    /// timer.
    pub struct ResponseFuture<F, X = ToHead> {
        #[pin]
        state: State<F>,
        extent: PhantomData<fn() -> X>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F> {
        Calling { #[pin] call: Limited<F> },
        Late { response: Option<Response<Bytes>> },
    }
}

impl<F, X> ResponseFuture<F, X> {
    #[inline]
    pub(crate) const fn calling(call: Limited<F>) -> Self {
        Self {
            state: State::Calling { call },
            extent: PhantomData,
        }
    }

    pub(crate) const fn late(response: Response<Bytes>) -> Self {
        Self {
            state: State::Late {
                response: Some(response),
            },
            extent: PhantomData,
        }
    }
}

impl<F, X, B, E, W> Future for ResponseFuture<F, X>
where
    F: Future<Output = Result<Response<B>, E>>,
    X: Extent<Response<B>, Output = Response<W>>,
{
    type Output = Result<Response<ResponseBody<W>>, E>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let response = match self.project().state.project() {
            StateProj::Calling { call } => match ready!(call.poll(cx, was_cancelled)) {
                Ok((result, watch)) => {
                    let wrap = |response| X::wrap(response, watch).map(ResponseBody::inner);
                    return Poll::Ready(result.map(wrap));
                }
                Err(watch) => watch.respond(),
            },
            StateProj::Late { response } => response.take().expect("polled after completion"),
        };
        Poll::Ready(Ok(response.map(ResponseBody::refusal)))
    }
}

impl<F, X> fmt::Debug for ResponseFuture<F, X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.state {
            State::Calling { call } => f
                .debug_tuple("ResponseFuture::Calling")
                .field(&call.watch)
                .finish(),
            State::Late { .. } => f.write_str("ResponseFuture::Late"),
        }
    }
}

pin_project! {
    /// Response future of [`Timeout`](crate::Timeout) where it fails when time
    /// is up. Dropping it drops the call and its timer.
    ///
    /// # Panics
    ///
    /// If it has to wait for a limited call outside of a tokio runtime with a
    /// timer.
    pub struct ErrorFuture<F, X = ToHead> {
        #[pin]
        state: ErrorState<F>,
        extent: PhantomData<fn() -> X>,
    }
}

pin_project! {
    #[project = ErrorStateProj]
    enum ErrorState<F> {
        Calling { #[pin] call: Limited<F> },
        Late { elapsed: Option<Elapsed> },
    }
}

impl<F, X> ErrorFuture<F, X> {
    #[inline]
    pub(crate) const fn calling(call: Limited<F>) -> Self {
        Self {
            state: ErrorState::Calling { call },
            extent: PhantomData,
        }
    }

    pub(crate) const fn late(elapsed: Elapsed) -> Self {
        Self {
            state: ErrorState::Late {
                elapsed: Some(elapsed),
            },
            extent: PhantomData,
        }
    }
}

impl<F, X, T, E> Future for ErrorFuture<F, X>
where
    F: Future<Output = Result<T, E>>,
    X: Extent<T>,
{
    type Output = Result<X::Output, Error<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let elapsed = match self.project().state.project() {
            ErrorStateProj::Calling { call } => match ready!(call.poll(cx, |_| false)) {
                Ok((Ok(response), watch)) => return Poll::Ready(Ok(X::wrap(response, watch))),
                Ok((Err(error), _)) => return Poll::Ready(Err(Error::Inner(error))),
                Err(watch) => watch.elapsed(Stage::Response),
            },
            ErrorStateProj::Late { elapsed } => elapsed.take().expect("polled after completion"),
        };
        Poll::Ready(Err(Error::Elapsed(elapsed)))
    }
}

impl<F, X> fmt::Debug for ErrorFuture<F, X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.state {
            ErrorState::Calling { call } => f
                .debug_tuple("ErrorFuture::Calling")
                .field(&call.watch)
                .finish(),
            ErrorState::Late { elapsed } => {
                f.debug_tuple("ErrorFuture::Late").field(elapsed).finish()
            }
        }
    }
}
