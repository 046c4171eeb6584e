//! A request that can be sent again, over HTTP and elsewhere: what the future
//! of a retry does not know of it.

use std::{
    error::Error as StdError,
    fmt,
    marker::PhantomData,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress_core::{
    BoxError, Head, Inspect, Refusal, RefusalKind,
    body::ResponseBody,
    classify::{GrpcCode, Verdict},
    deadline::Deadline,
    refusal::Tell,
    respond::{SharedResponder, integer},
};
use http::{HeaderMap, HeaderName, Request, Response, request::Parts};
use http_body::Body;

use crate::{
    Cause, Elapsed, Error, GiveUp, NotReplayable, ReplayBody,
    replay::Replay,
    rules::{self, Outcome, Rules},
    session::{Hint, Seen},
};

/// What a request's attempts are made of. Sealed: the layer's own kinds only.
pub trait Call: sealed::Sealed {
    /// What the inner service is given.
    type Request;
    /// What it answers.
    type Response;
    /// What it fails with.
    type Error;
    /// What the retry's future yields.
    type Output;

    /// What there is to another attempt; `None` where the result stands.
    #[doc(hidden)]
    fn judge(&self, result: &Result<Self::Response, Self::Error>) -> Option<Judged>;

    /// What a result that stands is to a budget.
    #[doc(hidden)]
    fn verdict(&self, result: &Result<Self::Response, Self::Error>) -> Verdict;

    /// Whether the request may be sent again, and can be.
    #[doc(hidden)]
    fn check(&self, judged: Judged) -> Result<(), GiveUp>;

    /// The answer to be given at once in place of a wait of so long.
    #[doc(hidden)]
    fn instead(&self, wait: Duration) -> Option<Self::Output> {
        let _ = wait;
        None
    }

    /// The next attempt's request, as soon as the one before has given up what
    /// it needs of it; `None` if that was lost meanwhile.
    #[doc(hidden)]
    fn poll_repeat(&mut self, cx: &mut Context<'_>) -> Poll<Option<Self::Request>>;

    /// Writes on an attempt's request what is known only as it is sent.
    #[doc(hidden)]
    fn stamp(&self, request: &mut Self::Request, attempt: u32, deadline: Option<Deadline>);

    /// The last attempt's result, handed on.
    #[doc(hidden)]
    fn output(result: Result<Self::Response, Self::Error>) -> Self::Output;

    /// The answer where none is in hand: the last was given up for another
    /// attempt, which could not begin.
    #[doc(hidden)]
    fn gave_up(&self, reason: GiveUp, cause: Cause, attempts: u32) -> Self::Output;
}

/// What an attempt has told, and whether what it asked for may be repeated.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Judged(pub(crate) Seen);

mod sealed {
    pub trait Sealed {}
}

/// How a service's errors can be looked at: by what they are. For error types
/// that implement [`std::error::Error`], as most do, and for those of the
/// layers ([`Inspect`]).
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

/// The same of boxed ones: [`BoxError`], of a `Buffer` or a `Timeout`, say.
#[derive(Clone, Copy, Debug, Default)]
pub struct Boxed;

/// Not at all: a `String`, a number.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opaque;

/// Looks at errors of type `E`: [`Plain`], [`Boxed`] or [`Opaque`].
pub trait Looks<E>: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// The error, if it can be looked at.
    fn error(error: &E) -> Option<&(dyn StdError + 'static)>;

    /// The refusal that it is, if it is one that is not in that error's chain.
    fn refusal(error: &E) -> Option<Refusal> {
        let _ = error;
        None
    }
}

impl sealed::Sealed for Plain {}
impl sealed::Sealed for Boxed {}
impl sealed::Sealed for Opaque {}

impl<E: Inspect> Looks<E> for Plain {
    fn error(error: &E) -> Option<&(dyn StdError + 'static)> {
        error.error()
    }

    fn refusal(error: &E) -> Option<Refusal> {
        error.refusal()
    }
}

impl Looks<BoxError> for Boxed {
    fn error(error: &BoxError) -> Option<&(dyn StdError + 'static)> {
        Some(&**error)
    }
}

impl<E> Looks<E> for Opaque {
    fn error(_: &E) -> Option<&(dyn StdError + 'static)> {
        None
    }
}

pub(crate) type RefuseIf = Box<dyn Fn(Head<'_>, Duration) -> Option<Refusal> + Send + Sync>;

/// What all requests of a layer over HTTP have in common.
pub(crate) struct HttpShared {
    pub(crate) rules: Rules,
    pub(crate) refuse_if: Option<RefuseIf>,
    pub(crate) responder: SharedResponder,
    pub(crate) attempt_header: Option<HeaderName>,
}

/// An HTTP request, its body remembered while it streams.
pub struct HttpCall<B, R, E, I> {
    shared: Arc<HttpShared>,
    parts: Parts,
    replay: Replay<B>,
    answers: PhantomData<Answers<R, E, I>>,
}

type Answers<R, E, I> = fn() -> (R, E, I);

impl<B: Body, R, E, I> HttpCall<B, R, E, I> {
    pub(crate) const fn new(shared: Arc<HttpShared>, parts: Parts, replay: Replay<B>) -> Self {
        Self {
            shared,
            parts,
            replay,
            answers: PhantomData,
        }
    }
}

impl<B, R, E, I> sealed::Sealed for HttpCall<B, R, E, I> {}

impl<B, R, E, I> Call for HttpCall<B, R, E, I>
where
    B: Body,
    I: Looks<E>,
{
    type Request = Request<ReplayBody<B>>;
    type Response = Response<R>;
    type Error = E;
    type Output = Result<Response<ResponseBody<R>>, E>;

    fn judge(&self, result: &Result<Response<R>, E>) -> Option<Judged> {
        judge::<R, E, I>(&self.shared.rules, &self.parts, result)
    }

    fn verdict(&self, result: &Result<Response<R>, E>) -> Verdict {
        verdict(&self.parts, result)
    }

    fn check(&self, Judged(seen): Judged) -> Result<(), GiveUp> {
        let head = Head::from(&self.parts);
        if !seen.cause.was_never_begun() && !self.shared.rules.may_repeat(head) {
            return Err(GiveUp::Unsafe);
        }
        match self.replay.check() {
            // It is given up soon after the answer is.
            Ok(()) | Err(NotReplayable::InUse) => Ok(()),
            Err(_) => Err(GiveUp::Body),
        }
    }

    fn instead(&self, wait: Duration) -> Option<Self::Output> {
        let refuse_if = self.shared.refuse_if.as_ref()?;
        let refusal = refuse_if(Head::from(&self.parts), wait)?;
        Some(self.refused(&refusal))
    }

    fn poll_repeat(&mut self, cx: &mut Context<'_>) -> Poll<Option<Self::Request>> {
        let body = ready!(self.replay.poll_attempt(cx)).ok();
        Poll::Ready(body.map(|body| Request::from_parts(self.parts.clone(), body)))
    }

    fn stamp(&self, request: &mut Self::Request, attempt: u32, deadline: Option<Deadline>) {
        stamp(&self.shared, request, attempt, deadline);
    }

    #[inline]
    fn output(result: Result<Response<R>, E>) -> Self::Output {
        result.map(|response| response.map(ResponseBody::inner))
    }

    fn gave_up(&self, reason: GiveUp, cause: Cause, _: u32) -> Self::Output {
        let refusal = match reason {
            // What it was that is no more in hand.
            GiveUp::Body => of_lost(cause)
                .with_detail("the attempt failed, and its body could not be sent again"),
            _ => Refusal::new(RefusalKind::TimedOut),
        };
        self.refused(&refusal)
    }
}

impl<B, R, E, I> HttpCall<B, R, E, I> {
    fn refused(&self, refusal: &Refusal) -> Result<Response<ResponseBody<R>>, E> {
        let head = Head::from(&self.parts);
        let response = self.shared.responder.respond(refusal, head);
        Ok(response.map(ResponseBody::refusal))
    }
}

impl<B, R, E, I> fmt::Debug for HttpCall<B, R, E, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpCall")
            .field("method", &self.parts.method)
            .finish_non_exhaustive()
    }
}

/// The nearest to an answer that is lost. When it could be asked again has been
/// waited for.
fn of_lost(cause: Cause) -> Refusal {
    match cause {
        Cause::Refused(kind) | Cause::Unsent(kind) => Refusal::new(kind),
        Cause::Status(status) => {
            let kind = match status.as_u16() {
                429 => RefusalKind::RateLimited,
                503 => RefusalKind::Unavailable,
                504 => RefusalKind::TimedOut,
                _ => RefusalKind::BadGateway,
            };
            Refusal::new(kind).with_status(status)
        }
        Cause::Grpc(GrpcCode::ResourceExhausted) => Refusal::new(RefusalKind::RateLimited),
        Cause::Grpc(GrpcCode::DeadlineExceeded) => Refusal::new(RefusalKind::TimedOut),
        Cause::Grpc(_) => Refusal::new(RefusalKind::Unavailable),
        _ => Refusal::new(RefusalKind::BadGateway),
    }
}

/// What there is to another attempt of an HTTP request.
pub(crate) fn judge<R, E, I: Looks<E>>(
    rules: &Rules,
    parts: &Parts,
    result: &Result<Response<R>, E>,
) -> Option<Judged> {
    let outcome = match result {
        Ok(response) => Outcome::Response {
            status: response.status(),
            headers: response.headers(),
            extensions: response.extensions(),
        },
        Err(error) => Outcome::Error(I::error(error)),
    };
    let refusal = result.as_ref().err().and_then(I::refusal);
    let seen = rules.judge(Head::from(parts), outcome, refusal.as_ref());
    seen.map(Judged)
}

/// What an HTTP answer that stands is to a budget.
pub(crate) fn verdict<R, E>(parts: &Parts, result: &Result<Response<R>, E>) -> Verdict {
    let response = result.as_ref().ok();
    response.map_or(Verdict::Ignored, |response| {
        let (status, headers) = (response.status(), response.headers());
        rules::verdict(Head::from(parts), status, headers, response.extensions())
    })
}

/// And any other one.
#[inline]
pub(crate) const fn any_verdict<R, E>(result: &Result<R, E>) -> Verdict {
    match result {
        Ok(_) => Verdict::Success,
        Err(_) => Verdict::Ignored,
    }
}

/// Tells that a request is sent for the so-many-th time more, on top of what a
/// layer further out has said.
pub(crate) fn tell_repeats(headers: &mut HeaderMap, name: &HeaderName, repeats: u32) {
    let outer = headers.get(name).and_then(|value| value.to_str().ok());
    let outer: u64 = outer.and_then(|text| text.parse().ok()).unwrap_or(0);
    headers.insert(name, integer(outer.saturating_add(repeats.into())));
}

/// Writes on an attempt's request what is known only as it is sent.
pub(crate) fn stamp<B>(
    shared: &HttpShared,
    request: &mut Request<B>,
    attempt: u32,
    deadline: Option<Deadline>,
) {
    if let Some(deadline) = deadline {
        deadline.attach(request.extensions_mut());
        // Without a deadline it would be the first extension, which allocates.
        Tell::attach(request.extensions_mut());
    }
    // The first is no retry, and costs no header.
    if let (Some(name), 2..) = (&shared.attempt_header, attempt) {
        tell_repeats(request.headers_mut(), name, attempt - 1);
    }
}

/// What a closure says of a result. A `bool` will do where no time is told.
///
/// ```
/// use std::{io, time::Duration};
///
/// use buttress_retry::Again;
///
/// let busy = io::Error::from(io::ErrorKind::WouldBlock);
/// assert_eq!(Again::of(&busy), Again::Yes);
/// assert_eq!(Again::from(false), Again::No);
/// assert_eq!(Again::After(Duration::from_secs(2)), Again::After(Duration::from_secs(2)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// The result stands.
    No,
    /// Another attempt is worth it, after the backoff's wait.
    Yes,
    /// The same, and not before this long: what is waited is at least that, and
    /// longer by the backoff where that has jitter.
    After(Duration),
}

impl Again {
    /// What is done where no closure is asked: every error is worth another
    /// attempt, but for refusals of other layers that say that it is not, or
    /// not yet.
    pub fn of<E: Inspect>(error: &E) -> Self {
        match of_any::<E, Plain>(error).map(|judged| judged.0.hint) {
            None | Some(Hint::Never) => Self::No,
            Some(Hint::None) => Self::Yes,
            Some(Hint::After(wait) | Hint::At(wait)) => Self::After(wait),
        }
    }

    pub(crate) fn judged(self) -> Option<Judged> {
        let hint = match self {
            Self::No => return None,
            Self::Yes => Hint::None,
            Self::After(wait) => Hint::After(wait),
        };
        let cause = Cause::Error;
        Some(Judged(Seen { cause, hint }))
    }
}

impl From<bool> for Again {
    fn from(again: bool) -> Self {
        if again { Self::Yes } else { Self::No }
    }
}

/// Which results of a service of any kind are worth another attempt.
///
/// Implemented for closures over request and result, which say so by a `bool`
/// or by [`Again`], whatever the error is; and by [`AnyError`].
pub trait RetryIf<Req, Res, E> {
    /// Whether it is.
    #[doc(hidden)]
    fn judge(&self, request: &Req, result: Result<&Res, &E>) -> Option<Judged>;
}

impl<F, A, Req, Res, E> RetryIf<Req, Res, E> for F
where
    F: Fn(&Req, Result<&Res, &E>) -> A,
    A: Into<Again>,
{
    fn judge(&self, request: &Req, result: Result<&Res, &E>) -> Option<Judged> {
        self(request, result).into().judged()
    }
}

/// Every `Err` is worth another attempt, but for refusals that say that it is
/// not, or not yet: the default for services of any kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct AnyError<I = Plain>(PhantomData<I>);

impl<Req, Res, E, I: Looks<E>> RetryIf<Req, Res, E> for AnyError<I> {
    #[inline]
    fn judge(&self, _: &Req, result: Result<&Res, &E>) -> Option<Judged> {
        let error = result.err()?;
        of_any::<E, I>(error)
    }
}

/// Of an error that is worth another attempt if it is none of ours.
#[cold]
pub(crate) fn of_any<E, I: Looks<E>>(error: &E) -> Option<Judged> {
    if let Some(refusal) = I::refusal(error) {
        return rules::of_refusal(&refusal).map(Judged);
    }
    let Some(error) = I::error(error) else {
        return Some(Judged(Seen::new(Cause::Error)));
    };
    if let Some(refusal) = Refusal::find(error) {
        return rules::of_refusal(refusal).map(Judged);
    }
    let seen = rules::of_error(error);
    Some(Judged(seen.unwrap_or_else(|| Seen::new(Cause::Error))))
}

/// A request of any kind, cloned for each attempt.
pub struct AnyCall<Req, Res, E, W> {
    request: Req,
    judge: W,
    answers: PhantomData<fn() -> (Res, E)>,
}

impl<Req, Res, E, W> AnyCall<Req, Res, E, W> {
    #[inline]
    pub(crate) const fn new(request: Req, judge: W) -> Self {
        Self {
            request,
            judge,
            answers: PhantomData,
        }
    }
}

impl<Req, Res, E, W> sealed::Sealed for AnyCall<Req, Res, E, W> {}

impl<Req, Res, E, W> Call for AnyCall<Req, Res, E, W>
where
    Req: Clone,
    W: RetryIf<Req, Res, E>,
{
    type Request = Req;
    type Response = Res;
    type Error = E;
    type Output = Result<Res, Error<E>>;

    #[inline]
    fn judge(&self, result: &Result<Res, E>) -> Option<Judged> {
        self.judge.judge(&self.request, result.as_ref())
    }

    #[inline]
    fn verdict(&self, result: &Result<Res, E>) -> Verdict {
        any_verdict(result)
    }

    fn check(&self, _: Judged) -> Result<(), GiveUp> {
        Ok(())
    }

    fn poll_repeat(&mut self, _: &mut Context<'_>) -> Poll<Option<Req>> {
        Poll::Ready(Some(self.request.clone()))
    }

    fn stamp(&self, _: &mut Req, _: u32, _: Option<Deadline>) {}

    #[inline]
    fn output(result: Result<Res, E>) -> Self::Output {
        result.map_err(Error::Inner)
    }

    fn gave_up(&self, _: GiveUp, _: Cause, attempts: u32) -> Self::Output {
        Err(Error::Elapsed(Elapsed::after(attempts)))
    }
}

impl<Req, Res, E, W> fmt::Debug for AnyCall<Req, Res, E, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AnyCall").finish_non_exhaustive()
    }
}
