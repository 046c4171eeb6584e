//! Ours, as the benches see it.
//!
//! **This is not the layer yet** but its floor, what none can do without: a
//! load of the state, and for a time window a clock reading and an addition to
//! a counter that few share. The table says so below itself.

use std::{
    pin::Pin,
    sync::atomic::{
        AtomicU64, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use buttress_core::clock;
use tower::Service;

use super::{Rule, bare};

/// Whether the figures are the layer's.
pub const IS_THE_LAYER: bool = false;

#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe(AtomicU64);

#[derive(Debug)]
struct State {
    /// In a row; it is open from `most` on.
    failures: AtomicU64,
    most: u64,
    timed: bool,
    stripes: [Stripe; 64],
    clones: AtomicUsize,
}

/// A breaker that never closes again.
#[derive(Clone, Copy, Debug)]
pub struct Ours(&'static State);

impl Ours {
    /// By that rule.
    #[must_use]
    pub fn new(rule: Rule) -> Self {
        let state = State {
            failures: AtomicU64::new(0),
            most: if rule == Rule::Consecutive { 5 } else { 50 },
            timed: rule == Rule::Time,
            stripes: [const { Stripe(AtomicU64::new(0)) }; 64],
            clones: AtomicUsize::new(1),
        };
        Self(Box::leak(Box::new(state)))
    }

    /// With a time window.
    #[must_use]
    pub fn with_window(_: Duration) -> Self {
        Self::new(Rule::Time)
    }

    /// Over the bare service; all of these share one breaker.
    #[must_use]
    pub fn service(
        &self,
    ) -> impl Service<u64, Response = u64, Error: Send, Future: Send> + Clone + Send + use<> {
        Floor {
            state: self.0,
            at: 0,
            inner: bare(),
        }
    }

    /// Empties the window.
    pub fn reset(&self) {
        self.0.failures.store(0, SeqCst);
    }

    /// Whether it refuses.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.failures.load(Relaxed) >= self.0.most
    }
}

struct Floor<S> {
    state: &'static State,
    at: usize,
    inner: S,
}

impl<S: Clone> Clone for Floor<S> {
    fn clone(&self) -> Self {
        Self {
            state: self.state,
            at: self.state.clones.fetch_add(1, Relaxed) % 64,
            inner: self.inner.clone(),
        }
    }
}

enum Answer<F> {
    Refused,
    Of(F, &'static State, usize),
}

impl<F: Future<Output = Result<u64, E>> + Unpin, E> Future for Answer<F> {
    type Output = Result<u64, Option<E>>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self::Of(inner, state, at) = &mut *self else {
            return Poll::Ready(Err(None));
        };
        Pin::new(inner).poll(cx).map(|result| {
            if state.timed {
                let now = clock::now().as_nanos();
                state.stripes[*at].0.fetch_add(now | 1, Relaxed);
            }
            if result.is_err() {
                state.failures.fetch_add(1, Relaxed);
            } else if state.failures.load(Relaxed) != 0 {
                state.failures.store(0, Relaxed);
            }
            result.map_err(Some)
        })
    }
}

impl<S: Service<u64, Response = u64, Future: Unpin>> Service<u64> for Floor<S> {
    type Response = u64;
    type Error = Option<S::Error>;
    type Future = Answer<S::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Some)
    }

    #[inline]
    fn call(&mut self, request: u64) -> Self::Future {
        if self.state.failures.load(Relaxed) >= self.state.most {
            return Answer::Refused;
        }
        Answer::Of(self.inner.call(request), self.state, self.at)
    }
}
