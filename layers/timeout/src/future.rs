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

use buttress_core::{body::ResponseBody, deadline::Deadline, respond::KeptHead};
use bytes::Bytes;
use http::Response;
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
}

impl Watch {
    #[inline]
    pub(crate) const fn new(shared: Arc<Shared>, deadline: Deadline, left: Duration) -> Self {
        Self {
            shared,
            deadline,
            left,
        }
    }

    /// Counts it and tells of it.
    pub(crate) fn elapsed(&self, stage: Stage) -> Elapsed {
        self.shared.elapsed(self.left, stage)
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
type Outcome<T> = Result<(T, Option<Watch>), Watch>;

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

impl<F: Future> Limited<F> {
    /// When time is up, the call is gone.
    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome<F::Output>> {
        let mut this = self.project();
        let call = this.call.as_mut().as_pin_mut();
        // First, so that an answer that is there at the same moment wins.
        let polled = call.expect("polled after completion").poll(cx);
        if let Poll::Ready(output) = polled {
            this.timer.stop();
            return Poll::Ready(Ok((output, this.watch.take())));
        }
        let Some(watch) = this.watch.as_ref() else {
            return Poll::Pending;
        };
        ready!(this.timer.as_mut().poll(watch.deadline, cx));
        // Its connection is free before anybody hears of it.
        this.call.set(None);
        this.timer.stop();
        Poll::Ready(Err(this.watch.take().expect("just seen")))
    }
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
        Calling { #[pin] call: Limited<F>, kept: Option<KeptHead> },
        Late { response: Option<Response<Bytes>> },
    }
}

impl<F, X> ResponseFuture<F, X> {
    #[inline]
    pub(crate) const fn calling(call: Limited<F>, kept: Option<KeptHead>) -> Self {
        Self {
            state: State::Calling { call, kept },
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
            StateProj::Calling { call, kept } => match ready!(call.poll(cx)) {
                Ok((result, watch)) => {
                    let wrap = |response| X::wrap(response, watch).map(ResponseBody::inner);
                    return Poll::Ready(result.map(wrap));
                }
                Err(watch) => {
                    let kept = kept.take().expect("kept of every limited call");
                    watch
                        .shared
                        .respond(watch.elapsed(Stage::Response), kept.head())
                }
            },
            StateProj::Late { response } => response.take().expect("polled after completion"),
        };
        Poll::Ready(Ok(response.map(ResponseBody::refusal)))
    }
}

impl<F, X> fmt::Debug for ResponseFuture<F, X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.state {
            State::Calling { call, .. } => f
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
            ErrorStateProj::Calling { call } => match ready!(call.poll(cx)) {
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
