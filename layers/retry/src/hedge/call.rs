//! A request that may be sent twice at once, over HTTP and elsewhere.

use std::{fmt, marker::PhantomData, sync::Arc};

use buttress_core::{classify::Verdict, clock, deadline::Deadline};
use http::{HeaderName, Request, Response, request::Parts};
use http_body::Body;

use crate::{
    Looks, Memory, NotReplayable, ReplayBody, RetryIf,
    call::{Judged, any_verdict, judge, tell_repeats, verdict},
    replay::Replay,
    rules::Rules,
    session::Hint,
};

/// What a request's attempts are made of. Sealed: the layer's own kinds only.
pub trait Call: sealed::Sealed {
    /// What the inner service is given.
    type Request;
    /// What it answers.
    type Response;
    /// What it fails with.
    type Error;

    /// What is wrong with an answer; `None` if it is good.
    #[doc(hidden)]
    fn judge(&self, result: &Result<Self::Response, Self::Error>) -> Option<Bad>;

    /// What a good one is to a budget.
    #[doc(hidden)]
    fn verdict(&self, result: &Result<Self::Response, Self::Error>) -> Verdict;

    /// Whether there may be a further attempt now.
    #[doc(hidden)]
    fn check(&self) -> Result<(), Obstacle>;

    /// The request of the hedge of this number, from 1, if nothing has come in
    /// its way.
    #[doc(hidden)]
    fn hedge(&mut self, number: u32) -> Option<Self::Request>;

    /// There will be none any more: what was kept for it may go.
    #[doc(hidden)]
    fn no_more(&mut self);
}

mod sealed {
    pub trait Sealed {}
}

/// An answer that waits for a better one.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Bad {
    /// It says when to come again, or not to.
    pub(super) told: bool,
}

impl From<Judged> for Bad {
    fn from(Judged(seen): Judged) -> Self {
        Self {
            told: seen.hint != Hint::None,
        }
    }
}

/// What is in the way of a further attempt.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub enum Obstacle {
    /// It may pass.
    Now,
    /// It will not.
    Ever,
}

/// What all requests of a layer over HTTP have in common.
#[derive(Clone, Debug)]
pub(super) struct Web {
    pub(super) rules: Rules,
    pub(super) attempt_header: Option<HeaderName>,
    pub(super) max_body: usize,
    pub(super) memory: Memory,
}

/// An HTTP request, its body remembered while it streams.
pub struct HttpCall<B, R, E, I> {
    web: Arc<Web>,
    parts: Parts,
    replay: Option<Replay<B>>,
    answers: PhantomData<Answers<R, E, I>>,
}

type Answers<R, E, I> = fn() -> (R, E, I);

impl<B: Body, R, E, I> HttpCall<B, R, E, I> {
    pub(super) const fn new(web: Arc<Web>, parts: Parts, replay: Replay<B>) -> Self {
        Self {
            web,
            parts,
            replay: Some(replay),
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

    fn judge(&self, result: &Result<Response<R>, E>) -> Option<Bad> {
        judge::<R, E, I>(&self.web.rules, &self.parts, result).map(Bad::from)
    }

    fn verdict(&self, result: &Result<Response<R>, E>) -> Verdict {
        verdict(&self.parts, result)
    }

    fn check(&self) -> Result<(), Obstacle> {
        let deadline = Deadline::of(&self.parts.extensions);
        if deadline.is_some_and(|deadline| deadline.is_past(clock::now())) {
            return Err(Obstacle::Ever);
        }
        let replay = self.replay.as_ref().ok_or(Obstacle::Ever)?;
        replay.check().map_err(|why| match why {
            NotReplayable::InUse => Obstacle::Now,
            _ => Obstacle::Ever,
        })
    }

    fn hedge(&mut self, number: u32) -> Option<Self::Request> {
        let body = self.replay.as_mut()?.attempt().ok()?;
        let mut request = Request::from_parts(self.parts.clone(), body);
        if let Some(name) = &self.web.attempt_header {
            tell_repeats(request.headers_mut(), name, number);
        }
        Some(request)
    }

    fn no_more(&mut self) {
        self.replay = None;
    }
}

impl<B, R, E, I> fmt::Debug for HttpCall<B, R, E, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpCall")
            .field("method", &self.parts.method)
            .finish_non_exhaustive()
    }
}

/// A request of any kind, cloned for each attempt.
pub struct AnyCall<Req, Res, E, W> {
    request: Req,
    judge: W,
    answers: PhantomData<fn() -> (Res, E)>,
}

impl<Req, Res, E, W> AnyCall<Req, Res, E, W> {
    pub(super) const fn new(request: Req, judge: W) -> Self {
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

    #[inline]
    fn judge(&self, result: &Result<Res, E>) -> Option<Bad> {
        let judged = self.judge.judge(&self.request, result.as_ref());
        judged.map(Bad::from)
    }

    #[inline]
    fn verdict(&self, result: &Result<Res, E>) -> Verdict {
        any_verdict(result)
    }

    fn check(&self) -> Result<(), Obstacle> {
        Ok(())
    }

    fn hedge(&mut self, _: u32) -> Option<Req> {
        Some(self.request.clone())
    }

    fn no_more(&mut self) {}
}

impl<Req, Res, E, W> fmt::Debug for AnyCall<Req, Res, E, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AnyCall").finish_non_exhaustive()
    }
}
