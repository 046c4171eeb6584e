//! Response futures: first the lock, then the call, then the lock goes with
//! the response.

use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use buttress_core::{
    Http, Refusal,
    body::ResponseBody,
    clock::{self, Instant},
    respond::KeptHead,
};
use bytes::Bytes;
use http::{Request, Response};
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    Call, Error, Extent, Keep, Reaches, Target,
    lease::{Lease, Lost},
    shared::Shared,
    store::Claiming,
};

pin_project! {
    /// A request from the lock to the response.
    pub(crate) struct Locking<S, Req, V>
    where
        S: Service<Req>,
        V: Target,
    {
        #[pin]
        state: State<S, S::Future, Req, V>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, F, Req, V>
    where
        V: Target,
    {
        Claiming { claiming: Claiming, waiting: Option<Waiting<S, Req, V>> },
        // Should the call panic or be dropped, the lease is dropped after it.
        Calling { #[pin] response: F, lost: Option<Lost>, lease: Option<Lease> },
        Refused { refusal: Option<Refusal> },
        Over,
    }
}

/// What waits for the lock: the instance that was polled ready, and the
/// request.
struct Waiting<S, Req, V: Target> {
    inner: S,
    request: Req,
    shared: Arc<Shared<V>>,
    since: Instant,
}

impl<S, Req, V> Locking<S, Req, V>
where
    S: Service<Req>,
    V: Target,
{
    pub(crate) fn calling(response: S::Future, lease: Option<Lease>, cut: bool) -> Self {
        Self {
            state: State::calling(response, lease, cut),
        }
    }

    pub(crate) const fn refused(refusal: Refusal) -> Self {
        Self {
            state: State::Refused {
                refusal: Some(refusal),
            },
        }
    }

    pub(crate) fn claiming(
        claiming: Claiming,
        inner: S,
        request: Req,
        shared: Arc<Shared<V>>,
    ) -> Self {
        Self {
            state: State::Claiming {
                claiming,
                waiting: Some(Waiting {
                    inner,
                    request,
                    shared,
                    since: clock::now(),
                }),
            },
        }
    }
}

impl<S, F, Req, V: Target> State<S, F, Req, V> {
    fn calling(response: F, lease: Option<Lease>, cut: bool) -> Self {
        let lost = lease.as_ref().filter(|_| cut).and_then(Lease::lost);
        Self::Calling {
            response,
            lost,
            lease,
        }
    }
}

/// What a request came to, with the lock that goes on; or that there was none,
/// or that it was lost.
type Outcome<T, E> = Result<(Result<T, E>, Option<Lease>), Refusal>;

impl<S, Req, V> Locking<S, Req, V>
where
    S: Service<Req>,
    V: Reaches<Req>,
{
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome<S::Response, S::Error>> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                StateProj::Claiming { claiming, waiting } => {
                    let claimed = ready!(claiming.as_mut().poll(cx));
                    let Waiting {
                        mut inner,
                        mut request,
                        shared,
                        since,
                    } = waiting.take().expect(OVER);
                    shared.core.waited(since);
                    let lease = match shared.judge(claimed) {
                        Ok(lease) => lease,
                        Err(refusal) => {
                            state.set(State::Over);
                            return Poll::Ready(Err(refusal));
                        }
                    };
                    shared.tell(&mut request, lease.as_ref());
                    let response = inner.call(request);
                    state.set(State::calling(response, lease, shared.cut));
                }
                StateProj::Calling {
                    response,
                    lost,
                    lease,
                } => {
                    // First, so that an answer that is there wins.
                    if let Poll::Ready(result) = response.poll(cx) {
                        let lease = lease.take();
                        state.set(State::Over);
                        return Poll::Ready(Ok((result, lease)));
                    }
                    let Some(is_lost) = lost else {
                        return Poll::Pending;
                    };
                    ready!(is_lost.as_mut().poll(cx));
                    let refusal = lease.as_ref().expect(OVER).core().lost();
                    state.set(State::Over);
                    return Poll::Ready(Err(refusal));
                }
                StateProj::Refused { refusal } => {
                    return Poll::Ready(Err(refusal.take().expect(OVER)));
                }
                StateProj::Over => panic!("{OVER}"),
            }
        }
    }
}

const OVER: &str = "polled after completion";

impl<S, Req, V> fmt::Debug for Locking<S, Req, V>
where
    S: Service<Req>,
    V: Target,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.state {
            State::Claiming { .. } => "Claiming",
            State::Calling { .. } => "Calling",
            State::Refused { .. } => "Refused",
            State::Over => "Over",
        })
    }
}

pin_project! {
    /// Response future of [`Lock`](crate::Lock) where it answers by responses.
    /// Dropping it drops the call, and then gives back the lock.
    ///
    /// # Panics
    ///
    /// If it has to wait for a lock outside of a tokio runtime with a timer.
    pub struct ResponseFuture<S, Req, X = Keep>
    where
        S: Service<Req>,
    {
        #[pin]
        state: Answering<Locking<S, Req, Http>>,
        extent: PhantomData<fn() -> X>,
    }
}

pin_project! {
    #[project = AnsweringProj]
    enum Answering<L> {
        Locking { #[pin] locking: L, answer: Option<(KeptHead, Arc<Shared<Http>>)> },
        Refused { response: Option<Response<Bytes>> },
    }
}

impl<S, Req, X> ResponseFuture<S, Req, X>
where
    S: Service<Req>,
{
    /// `answer`: what is needed to answer, if it may yet be refused.
    pub(crate) const fn locking(
        locking: Locking<S, Req, Http>,
        answer: Option<(KeptHead, Arc<Shared<Http>>)>,
    ) -> Self {
        Self {
            state: Answering::Locking { locking, answer },
            extent: PhantomData,
        }
    }

    pub(crate) const fn refused(response: Response<Bytes>) -> Self {
        Self {
            state: Answering::Refused {
                response: Some(response),
            },
            extent: PhantomData,
        }
    }
}

impl<S, B, X, R, W> Future for ResponseFuture<S, Request<B>, X>
where
    S: Service<Request<B>, Response = Response<R>>,
    X: Extent<Response<R>, Output = Response<W>>,
{
    type Output = Result<Response<ResponseBody<W>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let response = match self.project().state.project() {
            AnsweringProj::Locking { locking, answer } => match ready!(locking.poll(cx)) {
                Ok((result, lease)) => {
                    let hold = |response| X::hold(response, lease).map(ResponseBody::inner);
                    return Poll::Ready(result.map(hold));
                }
                Err(refusal) => {
                    let (kept, shared) = answer.take().expect("kept where it may be refused");
                    shared.respond(&refusal, kept.head())
                }
            },
            AnsweringProj::Refused { response } => response.take().expect(OVER),
        };
        Poll::Ready(Ok(response.map(ResponseBody::refusal)))
    }
}

impl<S, Req, X> fmt::Debug for ResponseFuture<S, Req, X>
where
    S: Service<Req>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_tuple("ResponseFuture");
        match &self.state {
            Answering::Locking { locking, .. } => debug.field(locking),
            Answering::Refused { .. } => debug.field(&"Refused"),
        };
        debug.finish()
    }
}

pin_project! {
    /// Response future of [`Lock`](crate::Lock) where it fails without a lock.
    /// Dropping it drops the call, and then gives back the lock.
    ///
    /// # Panics
    ///
    /// If it has to wait for a lock outside of a tokio runtime with a timer.
    pub struct ErrorFuture<S, Req, V = Http, X = Call>
    where
        S: Service<Req>,
        V: Target,
    {
        #[pin]
        locking: Locking<S, Req, V>,
        extent: PhantomData<fn() -> X>,
    }
}

impl<S, Req, V, X> ErrorFuture<S, Req, V, X>
where
    S: Service<Req>,
    V: Target,
{
    pub(crate) const fn locking(locking: Locking<S, Req, V>) -> Self {
        Self {
            locking,
            extent: PhantomData,
        }
    }
}

impl<S, Req, V, X> Future for ErrorFuture<S, Req, V, X>
where
    S: Service<Req>,
    V: Reaches<Req>,
    X: Extent<S::Response>,
{
    type Output = Result<X::Output, Error<S::Error>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match ready!(self.project().locking.poll(cx)) {
            Ok((Ok(response), lease)) => Ok(X::hold(response, lease)),
            Ok((Err(error), _)) => Err(Error::Inner(error)),
            Err(refusal) => Err(Error::Refused(refusal)),
        })
    }
}

impl<S, Req, V, X> fmt::Debug for ErrorFuture<S, Req, V, X>
where
    S: Service<Req>,
    V: Target,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ErrorFuture").field(&self.locking).finish()
    }
}
