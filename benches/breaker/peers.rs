//! The peers: failsafe, which knows no Tower and is put into a service here,
//! and tower-resilience.

use std::{
    hint::black_box,
    task::{Context, Poll},
    time::Duration,
};

use failsafe::{
    Any, Config, FailurePolicy, StateMachine, backoff,
    failure_policy::{self, ConsecutiveFailures},
    futures::ResponseFuture,
};
use tower::{Layer, Service};
use tower_resilience_circuitbreaker::{
    CircuitBreakerHandle, CircuitBreakerLayer, SlidingWindowType,
};

use super::{Rule, bare};
use crate::measure::{Run, drive};

/// Open for longer than any bench lasts.
const LONG: Duration = Duration::from_secs(3600);

/// failsafe's breaker around the futures of a service. What is refused has
/// called the inner service for a future all the same, as its API has it.
#[derive(Debug)]
pub struct Failsafe<P, S> {
    breaker: StateMachine<P, ()>,
    inner: S,
}

impl<P, S: Clone> Clone for Failsafe<P, S> {
    fn clone(&self) -> Self {
        Self {
            breaker: self.breaker.clone(),
            inner: self.inner.clone(),
        }
    }
}

impl<P, S> Service<u64> for Failsafe<P, S>
where
    P: FailurePolicy + Send + Sync,
    S: Service<u64>,
{
    type Response = S::Response;
    type Error = failsafe::Error<S::Error>;
    type Future = ResponseFuture<S::Future, P, (), Any>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(failsafe::Error::Inner)
    }

    #[inline]
    fn call(&mut self, request: u64) -> Self::Future {
        failsafe::futures::CircuitBreaker::call(&self.breaker, self.inner.call(request))
    }
}

fn consecutive() -> ConsecutiveFailures<backoff::Constant> {
    failure_policy::consecutive_failures(5, backoff::constant(LONG))
}

/// Opens after five failures in a row.
#[must_use]
pub fn failsafe_consecutive()
-> impl Service<u64, Response = u64, Error: Send, Future: Send> + Clone + Send + 'static {
    Failsafe {
        breaker: Config::new().failure_policy(consecutive()).build(),
        inner: bare(),
    }
}

/// With its default policy: a success rate that is averaged over 30 s, or five
/// failures in a row.
#[must_use]
pub fn failsafe_default()
-> impl Service<u64, Response = u64, Error: Send, Future: Send> + Clone + Send + 'static {
    Failsafe {
        breaker: Config::new().build(),
        inner: bare(),
    }
}

/// Healthy calls through its plain API, which is for what does not wait.
#[must_use]
pub fn failsafe_plain() -> Run {
    let breaker = Config::new().failure_policy(consecutive()).build();
    let mut inner = bare();
    Box::new(move |calls| {
        for _ in 0..calls {
            let result =
                failsafe::CircuitBreaker::call(&breaker, || drive(&mut inner, black_box(1)));
            assert!(black_box(result).is_ok());
        }
    })
}

/// tower-resilience's breaker.
#[expect(missing_debug_implementations, reason = "its parts have none")]
pub struct Resilience {
    layer: CircuitBreakerLayer,
    handle: CircuitBreakerHandle,
}

impl Resilience {
    /// By its nearest rule. Its count window does not slide.
    ///
    /// # Panics
    ///
    /// Never: its settings are sound.
    #[must_use]
    pub fn new(rule: Rule) -> Self {
        let builder = CircuitBreakerLayer::builder().wait_duration_in_open(LONG);
        let builder = match rule {
            Rule::Consecutive => builder.consecutive_failures(5),
            Rule::Count => builder,
            Rule::Time => builder
                .sliding_window_type(SlidingWindowType::TimeBased)
                .sliding_window_duration(Duration::from_secs(10)),
        };
        let (layer, handle) = builder.build_with_handle().expect("it is sound");
        Self { layer, handle }
    }

    /// With a time window.
    ///
    /// # Panics
    ///
    /// Never: its settings are sound.
    #[must_use]
    pub fn with_window(window: Duration) -> Self {
        let builder = CircuitBreakerLayer::builder()
            .sliding_window_type(SlidingWindowType::TimeBased)
            .sliding_window_duration(window);
        let (layer, handle) = builder.build_with_handle().expect("it is sound");
        Self { layer, handle }
    }

    /// Over the bare service; all of these share one breaker.
    #[must_use]
    pub fn service(
        &self,
    ) -> impl Service<u64, Response = u64, Error: Send, Future: Send> + Clone + Send + use<> {
        self.layer.layer(bare())
    }

    /// Whether it refuses.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.handle.is_open()
    }
}
