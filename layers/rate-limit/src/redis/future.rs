//! Response futures of a fleet: the answer of Redis, then the inner response,
//! then what it gives back.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use buttress_core::{BoxError, Http, Refusal, View, body::ResponseBody};
use bytes::Bytes;
use http::{Request, Response};
use pin_project_lite::pin_project;
use tokio::sync::oneshot;
use tower_service::Service;

use super::{FleetAsk, FleetShared, ask, ground::Stand, service::Deciding};
use crate::{
    Respond,
    future::After,
    layer::Errors,
    store::{Changes, Decision, Detail, Verdict},
};

type Told = oneshot::Receiver<Vec<Stand>>;

/// What a request was charged, and to whom it goes back.
pub(super) struct Refund {
    pub(super) shared: Arc<FleetShared<Http, Respond>>,
    pub(super) asks: Vec<FleetAsk>,
    pub(super) alone: bool,
}

impl Refund {
    /// Gives it back if the response is such, in a task of its own: a client
    /// that goes away now loses nothing.
    fn begin<R>(&self, response: &Response<R>) -> Option<Told> {
        let refund = self.shared.shared.mode.refund.as_ref()?;
        if !refund(response.status(), response.headers()) {
            return None;
        }
        let (tell, told) = oneshot::channel();
        let backed = Arc::clone(&self.shared.backed);
        let (asks, alone) = (self.asks.clone(), self.alone);
        tokio::spawn(async move {
            let _ = tell.send(backed.refund(&asks, alone).await);
        });
        Some(told)
    }

    /// What is told is what is true after it.
    fn tell(&self, stands: &[Stand], after: &mut After) {
        let mut decision = Decision {
            verdict: Verdict::Pass,
            tightest: None,
            all: Vec::new(),
            changes: Changes::default(),
        };
        for (ask, &(tat, now)) in self.asks.iter().zip(stands) {
            let ask = std::slice::from_ref(ask);
            ask::tell(ask, &[tat], now, Detail::All, &mut decision);
        }
        if let Some(tightest) = &decision.tightest {
            after.retell(&self.shared.shared, tightest, &decision.all);
        }
    }
}

pin_project! {
    /// Response future of [`FleetRateLimit`](super::FleetRateLimit) on HTTP.
    ///
    /// Dropped before Redis was asked, it has charged nothing; after that once,
    /// if the request was to pass.
    pub struct ResponseFuture<S, B, R, F> {
        #[pin]
        state: State<S, B, R, F>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, B, R, F> {
        Deciding {
            deciding: Deciding,
            shared: Arc<FleetShared<Http, Respond>>,
            held: Option<(S, Request<B>)>,
        },
        Calling { #[pin] future: F, after: After, refund: Option<Refund> },
        Refunding { told: Told, response: Option<Response<R>>, after: After, refund: Refund },
        Refused { response: Option<Response<Bytes>> },
    }
}

impl<S, B, R, F> ResponseFuture<S, B, R, F> {
    pub(super) fn deciding(
        deciding: Deciding,
        shared: Arc<FleetShared<Http, Respond>>,
        ready: S,
        request: Request<B>,
    ) -> Self {
        Self {
            state: State::Deciding {
                deciding,
                shared,
                held: Some((ready, request)),
            },
        }
    }

    pub(super) fn calling(future: F, after: After, refund: Option<Refund>) -> Self {
        Self {
            state: State::Calling {
                future,
                after,
                refund,
            },
        }
    }

    pub(super) fn refused(response: Response<Bytes>) -> Self {
        Self {
            state: State::Refused {
                response: Some(response),
            },
        }
    }
}

impl<S, B, R> Future for ResponseFuture<S, B, R, S::Future>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Output = Result<Response<ResponseBody<R>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                StateProj::Deciding {
                    deciding,
                    shared,
                    held,
                } => {
                    let (outcome, asks) = ready!(deciding.as_mut().poll(cx));
                    let (mut inner, mut request) = held.take().expect("polled after completion");
                    match FleetShared::settle(shared, outcome, asks, &mut request) {
                        Ok((after, refund)) => {
                            let future = inner.call(request);
                            state.set(State::Calling {
                                future,
                                after,
                                refund,
                            });
                        }
                        Err(response) => {
                            return Poll::Ready(Ok(response.map(ResponseBody::refusal)));
                        }
                    }
                }
                StateProj::Calling {
                    future,
                    after,
                    refund,
                } => {
                    let response = ready!(future.poll(cx))?;
                    let after = mem::take(after);
                    let begun = refund.take().and_then(|refund| {
                        let told = refund.begin(&response)?;
                        Some((told, refund))
                    });
                    let Some((told, refund)) = begun else {
                        return Poll::Ready(Ok(after.told(response)));
                    };
                    state.set(State::Refunding {
                        told,
                        response: Some(response),
                        after,
                        refund,
                    });
                }
                StateProj::Refunding {
                    told,
                    response,
                    after,
                    refund,
                } => {
                    let stands = ready!(Pin::new(told).poll(cx));
                    let mut after = mem::take(after);
                    if let Ok(stands) = stands {
                        refund.tell(&stands, &mut after);
                    }
                    let response = response.take().expect("polled after completion");
                    return Poll::Ready(Ok(after.told(response)));
                }
                StateProj::Refused { response } => {
                    let response = response.take().expect("polled after completion");
                    return Poll::Ready(Ok(response.map(ResponseBody::refusal)));
                }
            }
        }
    }
}

impl<S, B, R, F> fmt::Debug for ResponseFuture<S, B, R, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            State::Deciding { .. } => "ResponseFuture::Deciding",
            State::Calling { .. } => "ResponseFuture::Calling",
            State::Refunding { .. } => "ResponseFuture::Refunding",
            State::Refused { .. } => "ResponseFuture::Refused",
        })
    }
}

pin_project! {
    /// Response future of [`FleetRateLimit`](super::FleetRateLimit) where
    /// refusals are errors.
    pub struct ErrorFuture<S, V: View, Req, F> {
        #[pin]
        state: ErrorState<S, V, Req, F>,
    }
}

pin_project! {
    #[project = ErrorStateProj]
    enum ErrorState<S, V: View, Req, F> {
        Deciding {
            deciding: Deciding,
            shared: Arc<FleetShared<V, Errors>>,
            held: Option<(S, Req)>,
        },
        Calling { #[pin] future: F },
        Refused { refusal: Option<Refusal> },
    }
}

impl<S, V: View, Req, F> ErrorFuture<S, V, Req, F> {
    pub(super) fn deciding(
        deciding: Deciding,
        shared: Arc<FleetShared<V, Errors>>,
        ready: S,
        request: Req,
    ) -> Self {
        Self {
            state: ErrorState::Deciding {
                deciding,
                shared,
                held: Some((ready, request)),
            },
        }
    }

    pub(super) fn calling(future: F) -> Self {
        Self {
            state: ErrorState::Calling { future },
        }
    }

    pub(super) fn refused(refusal: Refusal) -> Self {
        Self {
            state: ErrorState::Refused {
                refusal: Some(refusal),
            },
        }
    }
}

impl<S, V, Req> Future for ErrorFuture<S, V, Req, S::Future>
where
    V: View,
    S: Service<Req, Error: Into<BoxError>>,
{
    type Output = Result<S::Response, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                ErrorStateProj::Deciding {
                    deciding,
                    shared,
                    held,
                } => {
                    let (outcome, asks) = ready!(deciding.as_mut().poll(cx));
                    let (mut inner, request) = held.take().expect("polled after completion");
                    if let Some(refusal) = shared.refusal(outcome, &asks) {
                        return Poll::Ready(Err(refusal.into()));
                    }
                    let future = inner.call(request);
                    state.set(ErrorState::Calling { future });
                }
                ErrorStateProj::Calling { future } => return future.poll(cx).map_err(Into::into),
                ErrorStateProj::Refused { refusal } => {
                    let refusal = refusal.take().expect("polled after completion");
                    return Poll::Ready(Err(refusal.into()));
                }
            }
        }
    }
}

impl<S, V: View, Req, F> fmt::Debug for ErrorFuture<S, V, Req, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            ErrorState::Deciding { .. } => "ErrorFuture::Deciding",
            ErrorState::Calling { .. } => "ErrorFuture::Calling",
            ErrorState::Refused { .. } => "ErrorFuture::Refused",
        })
    }
}
