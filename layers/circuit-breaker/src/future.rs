//! Response futures: the inner one with its permit, or what stands in the
//! place of a call that was refused.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress_core::{
    body::{BodyEnd, BodyGuard, GuardedBody, ResponseBody},
    classify::{Classify, Expect, GrpcCode, Verdict},
    retry_after::{self, Pushback},
};
use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use http_body::Body;
use pin_project_lite::pin_project;

use crate::{CircuitOpen, Error, Permit, layer::Hold};

impl Hold {
    /// How long this head asks to be left alone.
    #[cold]
    fn head(&self, status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
        let asked = match status {
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                retry_after::parse(headers, self.wall_clock.unix_now())
            }
            _ => return self.grpc(headers),
        };
        self.held(asked)
    }

    /// The same of gRPC's headers (trailers-only) or trailers.
    #[cold]
    fn grpc(&self, fields: &HeaderMap) -> Option<Duration> {
        match GrpcCode::of(fields)? {
            GrpcCode::Unavailable | GrpcCode::ResourceExhausted => {}
            _ => return None,
        }
        self.held(match retry_after::pushback(fields)? {
            Pushback::After(wait) => Some(wait),
            // Not this call again: that says nothing of others.
            Pushback::Never => None,
        })
    }

    fn held(&self, asked: Option<Duration>) -> Option<Duration> {
        asked
            .map(|wait| wait.min(self.max))
            .filter(|wait| !wait.is_zero())
    }
}

/// What a call is judged by.
pub(crate) struct Judge<C> {
    pub(crate) classifier: C,
    pub(crate) hold: Option<Arc<Hold>>,
}

/// A head's verdict.
struct Head {
    verdict: Verdict,
    /// Of a success: what its body has yet to tell.
    expected: Expect,
    hold: Option<Duration>,
}

impl<C> Judge<C> {
    #[inline]
    fn head<B, E>(&self, result: &Result<Response<B>, E>) -> Head
    where
        C: Classify<Response<B>, E>,
    {
        let verdict = self.classifier.classify(result.as_ref());
        let hold = match (&self.hold, result) {
            (Some(hold), Ok(response)) => hold.head(response.status(), response.headers()),
            _ => None,
        };
        let expected = match (verdict, result) {
            (Verdict::Success, Ok(response)) => self.classifier.expects(response),
            _ => Expect::Nothing,
        };
        Head {
            verdict,
            expected,
            hold,
        }
    }
}

/// A success so far, which holds its permit until the body tells.
struct Provisional<C> {
    permit: Permit,
    judge: Judge<C>,
    expected: Expect,
    /// The classifier's `classify_body`, for the types of this call, so that
    /// the body's type need not name them.
    end: fn(&C, Expect, BodyEnd<'_>) -> Verdict,
}

/// Tells the breaker how a response's body ended, and with it the call.
///
/// Complete, it is the classifier's to judge, trailers and all; broken off, it
/// is a failure; dropped early, it decides nothing, and the call counts as
/// given up on.
pub struct Guard<C>(Option<Provisional<C>>);

impl<C> Guard<C> {
    const DECIDED: Self = Self(None);
}

impl<C> BodyGuard for Guard<C> {
    #[inline]
    fn ended(self, end: BodyEnd<'_>, _: u64) {
        let Some(Provisional {
            mut permit,
            judge,
            expected,
            end: judge_end,
        }) = self.0
        else {
            return;
        };
        let verdict = permit.during(|| judge_end(&judge.classifier, expected, end));
        let hold = match (&judge.hold, end) {
            (
                Some(hold),
                BodyEnd::Complete {
                    trailers: Some(trailers),
                },
            ) => hold.grpc(trailers),
            _ => None,
        };
        record(permit, verdict, hold, end == BodyEnd::Dropped);
    }
}

#[inline]
fn record(permit: Permit, verdict: Verdict, hold: Option<Duration>, dropped: bool) {
    match hold {
        Some(hold) => permit.record_holding_off(verdict, hold),
        // Who gave up after the slow limit is counted by the permit itself.
        None if dropped && verdict == Verdict::Ignored => drop(permit),
        None => permit.record(verdict),
    }
}

impl<C> fmt::Debug for Guard<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Guard")
            .field(&self.0.as_ref().map(|provisional| &provisional.permit))
            .finish()
    }
}

pin_project! {
    /// An HTTP call with its permit, which goes on into the response's body.
    ///
    /// Dropping it gives the call up: see [`Permit`].
    pub struct Guarded<F, C> {
        // Before the permit, so that a probe's place is free when its call is
        // really gone.
        #[pin]
        future: F,
        permit: Option<Permit>,
        judge: Option<Judge<C>>,
    }
}

impl<F, C> Guarded<F, C> {
    #[inline]
    pub(crate) fn judged(future: F, permit: Permit, judge: Judge<C>) -> Self {
        Self {
            future,
            permit: Some(permit),
            judge: Some(judge),
        }
    }

    /// A call that is none of the breaker's.
    #[inline]
    pub(crate) fn passed(future: F) -> Self {
        Self {
            future,
            permit: None,
            judge: None,
        }
    }
}

impl<F, C> Guarded<F, C> {
    /// The response with its body guarded, and wrapped at once: each step by
    /// itself would move the whole of it.
    #[inline(always)]
    fn poll_wrapped<B, E, W>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        wrap: impl FnOnce(GuardedBody<B, Guard<C>>) -> W,
    ) -> Poll<Result<Response<W>, E>>
    where
        F: Future<Output = Result<Response<B>, E>>,
        C: Classify<Response<B>, E>,
        B: Body,
    {
        let this = self.project();
        let result = ready!(Permit::during_if_any(this.permit, || this.future.poll(cx)));
        let mut guard = Guard::DECIDED;
        if let Some(judge) = this.judge.take() {
            let Head {
                verdict,
                expected,
                hold,
            } = Permit::during_if_any(this.permit, || judge.head(&result));
            if let Some(mut permit) = this.permit.take() {
                if verdict == Verdict::Success && expected != Expect::Nothing && hold.is_none() {
                    permit.arrived();
                    guard = Guard(Some(Provisional {
                        permit,
                        judge,
                        expected,
                        end: <C as Classify<Response<B>, E>>::classify_body,
                    }));
                } else {
                    record(permit, verdict, hold, false);
                }
            }
        }
        Poll::Ready(result.map(|response| response.map(|body| wrap(GuardedBody::new(body, guard)))))
    }
}

impl<F, C, B, E> Future for Guarded<F, C>
where
    F: Future<Output = Result<Response<B>, E>>,
    C: Classify<Response<B>, E>,
    B: Body,
{
    type Output = Result<Response<GuardedBody<B, Guard<C>>>, E>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_wrapped(cx, |body| body)
    }
}

impl<F, C> fmt::Debug for Guarded<F, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guarded")
            .field("permit", &self.permit)
            .finish_non_exhaustive()
    }
}

pin_project! {
    /// A call of any kind with its permit: judged by its result.
    ///
    /// Dropping it gives the call up: see [`Permit`].
    pub struct Judged<F, C> {
        #[pin]
        future: F,
        permit: Permit,
        classifier: C,
    }
}

impl<F, C> Judged<F, C> {
    #[inline]
    pub(crate) fn new(future: F, permit: Permit, classifier: C) -> Self {
        Self {
            future,
            permit,
            classifier,
        }
    }
}

impl<F, C, T, E> Future for Judged<F, C>
where
    F: Future<Output = Result<T, E>>,
    C: Classify<T, E>,
{
    type Output = Result<T, E>;

    #[inline(always)]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = ready!(this.permit.during(|| this.future.poll(cx)));
        let verdict = this
            .permit
            .during(|| this.classifier.classify(result.as_ref()));
        this.permit.conclude(verdict);
        Poll::Ready(result)
    }
}

impl<F, C> fmt::Debug for Judged<F, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Judged")
            .field("permit", &self.permit)
            .finish_non_exhaustive()
    }
}

pin_project! {
    /// Response future of [`CircuitBreaker`](crate::CircuitBreaker) where
    /// refusals are responses. Dropping it gives the call up.
    pub struct ResponseFuture<F, C> {
        #[pin]
        state: State<F, C>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, C> {
        Calling { #[pin] call: Guarded<F, C> },
        Refused { response: Option<Response<Bytes>> },
    }
}

impl<F, C> ResponseFuture<F, C> {
    #[inline]
    pub(crate) fn calling(call: Guarded<F, C>) -> Self {
        Self {
            state: State::Calling { call },
        }
    }

    #[inline]
    pub(crate) fn refused(response: Response<Bytes>) -> Self {
        Self {
            state: State::Refused {
                response: Some(response),
            },
        }
    }
}

impl<F, C, B, E> Future for ResponseFuture<F, C>
where
    F: Future<Output = Result<Response<B>, E>>,
    C: Classify<Response<B>, E>,
    B: Body,
{
    type Output = Result<Response<ResponseBody<GuardedBody<B, Guard<C>>>>, E>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProj::Calling { call } => call.poll_wrapped(cx, ResponseBody::inner),
            StateProj::Refused { response } => {
                let response = response.take().expect("polled after completion");
                Poll::Ready(Ok(response.map(ResponseBody::refusal)))
            }
        }
    }
}

impl<F, C> fmt::Debug for ResponseFuture<F, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.state {
            State::Calling { call } => f.debug_tuple("ResponseFuture").field(call).finish(),
            State::Refused { .. } => f.write_str("ResponseFuture::Refused"),
        }
    }
}

pin_project! {
    /// Response future of [`CircuitBreaker`](crate::CircuitBreaker) where
    /// refusals are errors: `P` is [`Guarded`] or [`Judged`]. Dropping it gives
    /// the call up.
    pub struct ErrorFuture<P> {
        #[pin]
        state: ErrorState<P>,
    }
}

pin_project! {
    #[project = ErrorStateProj]
    enum ErrorState<P> {
        Calling { #[pin] call: P },
        Refused { open: Option<CircuitOpen> },
    }
}

impl<P> ErrorFuture<P> {
    #[inline]
    pub(crate) fn calling(call: P) -> Self {
        Self {
            state: ErrorState::Calling { call },
        }
    }

    #[inline]
    pub(crate) fn refused(open: CircuitOpen) -> Self {
        Self {
            state: ErrorState::Refused { open: Some(open) },
        }
    }
}

impl<P, T, E> Future for ErrorFuture<P>
where
    P: Future<Output = Result<T, E>>,
{
    type Output = Result<T, Error<E>>;

    #[inline(always)]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            ErrorStateProj::Calling { call } => call.poll(cx).map_err(Error::Inner),
            ErrorStateProj::Refused { open } => {
                let open = open.take().expect("polled after completion");
                Poll::Ready(Err(Error::Open(open)))
            }
        }
    }
}

impl<P: fmt::Debug> fmt::Debug for ErrorFuture<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.state {
            ErrorState::Calling { call } => f.debug_tuple("ErrorFuture").field(call).finish(),
            ErrorState::Refused { open } => f.debug_tuple("ErrorFuture").field(open).finish(),
        }
    }
}

pin_project! {
    /// Response future of [`CircuitBreaker`](crate::CircuitBreaker) with a
    /// fallback: `P` is the call, `I` what is done instead. Dropping it gives
    /// up whichever it is.
    pub struct FallbackFuture<P, I> {
        #[pin]
        state: FallbackState<P, I>,
    }
}

pin_project! {
    #[project = FallbackStateProj]
    enum FallbackState<P, I> {
        Calling { #[pin] call: P },
        Instead { #[pin] instead: I },
    }
}

impl<P, I> FallbackFuture<P, I> {
    #[inline]
    pub(crate) fn calling(call: P) -> Self {
        Self {
            state: FallbackState::Calling { call },
        }
    }

    #[inline]
    pub(crate) fn instead(instead: I) -> Self {
        Self {
            state: FallbackState::Instead { instead },
        }
    }
}

impl<P, I> Future for FallbackFuture<P, I>
where
    P: Future,
    I: Future<Output = P::Output>,
{
    type Output = P::Output;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            FallbackStateProj::Calling { call } => call.poll(cx),
            FallbackStateProj::Instead { instead } => instead.poll(cx),
        }
    }
}

impl<P, I> fmt::Debug for FallbackFuture<P, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            FallbackState::Calling { .. } => "FallbackFuture::Calling",
            FallbackState::Instead { .. } => "FallbackFuture::Instead",
        })
    }
}
