//! Response futures: the body's reading, the signing, and the inner call.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use buttress_core::{BoxError, body::ResponseBody};
use http::{Request, Response, request::Parts};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_service::Service;

use super::{Cause, Error, NotSigned, shared::Shared};
use crate::{
    WholeBody,
    collect::{Collect, NotWhole},
};

/// What waits for the body.
pub(crate) struct Held<S> {
    inner: S,
    request: Parts,
    shared: Arc<Shared>,
    most: usize,
}

impl<S> Held<S> {
    pub(crate) const fn new(inner: S, request: Parts, shared: Arc<Shared>, most: usize) -> Self {
        Self {
            inner,
            request,
            shared,
            most,
        }
    }
}

pin_project! {
    /// A request on its way to being sent.
    pub(crate) struct Signing<S, F, B> {
        #[pin]
        state: State<S, F, B>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, F, B> {
        Collecting { #[pin] collect: Collect<B>, held: Option<Held<S>> },
        Calling { #[pin] response: F },
        Done,
    }
}

/// What a request came to.
enum Outcome<T, E> {
    Called(Result<T, E>),
    Not(Box<Refused>),
}

struct Refused {
    why: NotSigned,
    request: Parts,
    shared: Arc<Shared>,
}

impl<S, F, B: Body> Signing<S, F, B> {
    pub(crate) fn new(held: Held<S>, body: B) -> Self {
        Self {
            state: State::Collecting {
                collect: Collect::new(body, held.most),
                held: Some(held),
            },
        }
    }
}

impl<S, B> Signing<S, S::Future, B>
where
    S: Service<Request<WholeBody>>,
    B: Body,
    B::Error: Into<BoxError>,
{
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome<S::Response, S::Error>> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                StateProj::Collecting { collect, held } => {
                    let collected = ready!(collect.poll(cx));
                    let held = held.take().expect("held until the body is there");
                    // The body is gone before anything else happens.
                    state.set(State::Done);
                    let Held {
                        mut inner,
                        mut request,
                        shared,
                        most,
                    } = held;
                    let signed = match collected {
                        Ok(body) => shared.sign(&mut request, body.bytes()).map(|()| body),
                        Err(NotWhole::TooLarge) => Err(Cause::TooLarge { most }),
                        Err(NotWhole::Broken(error)) => Err(Cause::Body(error.into())),
                    };
                    match signed {
                        Ok(body) => {
                            let response = inner.call(Request::from_parts(request, body));
                            state.set(State::Calling { response });
                        }
                        Err(cause) => {
                            // What it was promised is free before anybody hears of it.
                            drop(inner);
                            let why = shared.not_signed(cause);
                            return Poll::Ready(Outcome::Not(Box::new(Refused {
                                why,
                                request,
                                shared,
                            })));
                        }
                    }
                }
                StateProj::Calling { response } => return response.poll(cx).map(Outcome::Called),
                StateProj::Done => panic!("polled after completion"),
            }
        }
    }
}

impl<S, F, B> Signing<S, F, B> {
    const fn stage(&self) -> &'static str {
        match self.state {
            State::Collecting { .. } => "Collecting",
            State::Calling { .. } => "Calling",
            State::Done => "Done",
        }
    }
}

pin_project! {
    /// Response future of [`Sign`](crate::Sign) where it fails with what is not
    /// signed. Dropping it drops the body, or the call.
    pub struct ErrorFuture<S, F, B> {
        #[pin]
        signing: Signing<S, F, B>,
    }
}

impl<S, F, B> ErrorFuture<S, F, B> {
    pub(crate) const fn new(signing: Signing<S, F, B>) -> Self {
        Self { signing }
    }
}

impl<S, B> Future for ErrorFuture<S, S::Future, B>
where
    S: Service<Request<WholeBody>>,
    B: Body,
    B::Error: Into<BoxError>,
{
    type Output = Result<S::Response, Error<S::Error>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match ready!(self.project().signing.poll(cx)) {
            Outcome::Called(result) => result.map_err(Error::Inner),
            Outcome::Not(refused) => Err(Error::NotSigned(refused.why)),
        })
    }
}

impl<S, F, B> fmt::Debug for ErrorFuture<S, F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ErrorFuture::{}", self.signing.stage())
    }
}

pin_project! {
    /// Response future of [`Sign`](crate::Sign) where it answers by responses.
    /// Dropping it drops the body, or the call.
    pub struct ResponseFuture<S, F, B> {
        #[pin]
        signing: Signing<S, F, B>,
    }
}

impl<S, F, B> ResponseFuture<S, F, B> {
    pub(crate) const fn new(signing: Signing<S, F, B>) -> Self {
        Self { signing }
    }
}

impl<S, B, R> Future for ResponseFuture<S, S::Future, B>
where
    S: Service<Request<WholeBody>, Response = Response<R>>,
    B: Body,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<ResponseBody<R>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match ready!(self.project().signing.poll(cx)) {
            Outcome::Called(result) => result.map(|response| response.map(ResponseBody::inner)),
            Outcome::Not(refused) => {
                let response = refused.shared.respond(&refused.why, &refused.request);
                Ok(response.map(ResponseBody::refusal))
            }
        })
    }
}

impl<S, F, B> fmt::Debug for ResponseFuture<S, F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ResponseFuture::{}", self.signing.stage())
    }
}
