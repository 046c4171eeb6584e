//! What answers in the place of a service that is not called.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower_service::Service;

use crate::CircuitOpen;

/// Answers a request that the breaker did not let pass.
///
/// Implemented for closures over the request and the [`CircuitOpen`], and by
/// [`ServiceFallback`]. What it answers is not judged by the breaker.
pub trait Fallback<Req> {
    /// Of the inner service's type.
    type Response;
    /// Of the inner service's type.
    type Error;
    /// The answer.
    type Future: Future<Output = Result<Self::Response, Self::Error>>;

    /// Answers `request`. Called in `call`, outside of every lock.
    fn fall_back(&self, request: Req, open: CircuitOpen) -> Self::Future;
}

impl<F, Req, Fut, T, E> Fallback<Req> for F
where
    F: Fn(Req, CircuitOpen) -> Fut,
    Fut: Future<Output = Result<T, E>>,
{
    type Response = T;
    type Error = E;
    type Future = Fut;

    fn fall_back(&self, request: Req, open: CircuitOpen) -> Fut {
        self(request, open)
    }
}

/// A service as a [`Fallback`]: each request has a clone of it, which is polled
/// ready before it is called.
#[derive(Clone, Copy, Debug)]
pub struct ServiceFallback<S>(S);

impl<S> ServiceFallback<S> {
    /// Falls back to clones of `service`.
    pub const fn new(service: S) -> Self {
        Self(service)
    }
}

impl<S, Req> Fallback<Req> for ServiceFallback<S>
where
    S: Service<Req> + Clone,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = FallbackService<S, Req>;

    fn fall_back(&self, request: Req, _: CircuitOpen) -> Self::Future {
        FallbackService {
            state: State::Readying {
                held: Some((self.0.clone(), request)),
            },
        }
    }
}

pin_project! {
    /// Waits for a [`ServiceFallback`]'s clone to be ready, and calls it.
    /// Dropping it drops the clone, and with it what it was promised.
    pub struct FallbackService<S, Req>
    where
        S: Service<Req>,
    {
        #[pin]
        state: State<S, Req, S::Future>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<S, Req, F> {
        Readying { held: Option<(S, Req)> },
        Calling { #[pin] future: F },
    }
}

impl<S: Service<Req>, Req> Future for FallbackService<S, Req> {
    type Output = Result<S::Response, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                StateProj::Readying { held } => {
                    let (service, _) = held.as_mut().expect("polled after completion");
                    ready!(service.poll_ready(cx))?;
                    let (mut service, request) = mem::take(held).expect("just seen");
                    let future = service.call(request);
                    state.set(State::Calling { future });
                }
                StateProj::Calling { future } => return future.poll(cx),
            }
        }
    }
}

impl<S: Service<Req>, Req> fmt::Debug for FallbackService<S, Req> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            State::Readying { .. } => "FallbackService::Readying",
            State::Calling { .. } => "FallbackService::Calling",
        })
    }
}
