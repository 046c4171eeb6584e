//! What a layer is made of, checked once by `build()`.

use std::{fmt, future::Future, marker::PhantomData, sync::Arc, time::Duration};

use buttress_core::{
    Any, Http, Responder, View,
    classify::HttpClassifier,
    clock::{SharedWallClock, WallClock},
    random::Random,
    respond::SharedResponder,
};
use http::Request;

use crate::{
    Breaker, BreakerBuilder, CircuitBreakerLayer, CircuitOpen, ConfigError, Event, ServiceFallback,
    Settings,
    error::Problem,
    layer::{Errors, Hold, Instead, Respond, ResultClassifier, Shared, Source},
};

/// Builds a [`CircuitBreakerLayer`].
#[must_use = "nothing is protected before `build()`"]
pub struct CircuitBreakerBuilder<V: View = Http, M = Respond, C = HttpClassifier> {
    own: BreakerBuilder,
    /// Whether something was said of it.
    described: bool,
    given: Option<Breaker>,
    classifier: C,
    retry_after: Option<Duration>,
    wall_clock: SharedWallClock,
    #[cfg(feature = "back-pressure")]
    back_pressure: bool,
    mode: M,
    view: PhantomData<fn(V)>,
}

impl CircuitBreakerBuilder {
    pub(crate) fn respond() -> Self {
        Self::with(Respond::default(), HttpClassifier::new())
    }
}

impl<C> CircuitBreakerBuilder<Http, Respond, C> {
    /// Makes refusals into responses. Default:
    /// [`ProblemResponder`](buttress_core::ProblemResponder), a 503, or gRPC's
    /// UNAVAILABLE. `Retry-After` is added where it made none: the seconds
    /// until a probe may pass, which an override has none of.
    pub fn responder(mut self, responder: impl Responder) -> Self {
        self.mode.responder = SharedResponder::new(responder);
        self
    }

    /// Refuses with errors in place of responses, for clients: the service's
    /// error becomes [`Error`](crate::Error), and a response's body still
    /// tells the breaker how it ended.
    pub fn errors(self) -> CircuitBreakerBuilder<Http, Errors, C> {
        self.map(|_| Errors::default())
    }
}

impl<M, C> CircuitBreakerBuilder<Http, M, C> {
    /// Heeds a callee that asks to be left alone: a 503 or 429 with
    /// `Retry-After`, a gRPC UNAVAILABLE or RESOURCE_EXHAUSTED with
    /// `grpc-retry-pushback-ms`, in its headers or trailers. The breaker opens
    /// at once, whatever the rules say, for as long as is asked and at most
    /// `max`; a probe that is answered so opens it again. Default: no.
    ///
    /// For a callee that speaks for all of what stands behind the breaker:
    /// where a 429 is meant for one of many tenants, it would shut out the
    /// others. Costs each call a clone of an [`Arc`], and so threads on many
    /// cores some tens of nanoseconds.
    pub fn retry_after(mut self, max: Duration) -> Self {
        self.retry_after = Some(max);
        self
    }

    /// The clock by which a date in the callee's `Retry-After` is told.
    /// Default: the system's. Nothing else depends on it.
    pub fn wall_clock(mut self, clock: impl WallClock) -> Self {
        self.wall_clock = SharedWallClock::new(clock);
        self
    }

    /// Answers what does not pass by a closure in place of a refusal: from a
    /// cache, say. The error type stays the inner one. Its answers are not
    /// judged.
    ///
    /// ```
    /// use buttress_circuit_breaker::{CircuitBreakerLayer, CircuitOpen};
    /// use http::{Request, Response};
    /// use tower::{Layer, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let layer = CircuitBreakerLayer::builder()
    ///     .fallback(async |_: Request<String>, _: CircuitOpen| {
    ///         Ok::<_, std::convert::Infallible>(Response::new(String::from("yesterday's news")))
    ///     })
    ///     .build()?;
    /// let service = layer.layer(service_fn(async |_: Request<String>| {
    ///     Ok(Response::new(String::from("today's news")))
    /// }));
    /// layer.breaker().force_open();
    /// let response = service.oneshot(Request::default()).await?;
    /// # use http_body_util::BodyExt;
    /// assert_eq!(response.into_body().collect().await?.to_bytes(), "yesterday's news");
    /// # Ok(())
    /// # }
    /// ```
    pub fn fallback<F, B, Fut, T, E>(
        self,
        fallback: F,
    ) -> CircuitBreakerBuilder<Http, Instead<F>, C>
    where
        F: Fn(Request<B>, CircuitOpen) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.map(|_| Instead(fallback))
    }
}

impl<Req: 'static> CircuitBreakerBuilder<Any<Req>, Errors, ResultClassifier> {
    pub(crate) fn any() -> Self {
        Self::with(Errors::default(), ResultClassifier)
    }
}

impl<Req: 'static, M, C> CircuitBreakerBuilder<Any<Req>, M, C> {
    /// Answers what does not pass by a closure in place of a refusal: from a
    /// cache, say. The error type stays the inner one. Its answers are not
    /// judged.
    pub fn fallback<F, Fut, T, E>(
        self,
        fallback: F,
    ) -> CircuitBreakerBuilder<Any<Req>, Instead<F>, C>
    where
        F: Fn(Req, CircuitOpen) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.map(|_| Instead(fallback))
    }
}

impl<V: View, M, C> CircuitBreakerBuilder<V, M, C> {
    fn with(mode: M, classifier: C) -> Self {
        Self {
            own: Breaker::builder("default"),
            described: false,
            given: None,
            classifier,
            retry_after: None,
            wall_clock: SharedWallClock::default(),
            #[cfg(feature = "back-pressure")]
            back_pressure: false,
            mode,
            view: PhantomData,
        }
    }

    fn map<N>(self, mode: impl FnOnce(M) -> N) -> CircuitBreakerBuilder<V, N, C> {
        CircuitBreakerBuilder {
            own: self.own,
            described: self.described,
            given: self.given,
            classifier: self.classifier,
            retry_after: self.retry_after,
            wall_clock: self.wall_clock,
            #[cfg(feature = "back-pressure")]
            back_pressure: self.back_pressure,
            mode: mode(self.mode),
            view: PhantomData,
        }
    }

    fn describe(mut self, own: impl FnOnce(BreakerBuilder) -> BreakerBuilder) -> Self {
        self.own = own(self.own);
        self.described = true;
        self
    }

    /// Names the breaker: for logs, metrics and listeners. 1 to 128 printable
    /// ASCII characters. Default `default`.
    pub fn name(self, name: impl Into<Arc<str>>) -> Self {
        self.describe(|mut own| {
            own.name = name.into();
            own
        })
    }

    /// When it opens, for how long, and what closes it. Default:
    /// [`Settings::moderate`].
    pub fn settings(self, settings: Settings) -> Self {
        self.describe(|own| own.settings(settings))
    }

    /// Has `listener` called with the breaker's name for every [`Event`], in
    /// the thread where it happens, outside of every lock. It should be quick,
    /// and must not panic. Several may listen.
    pub fn on_event(self, listener: impl Fn(&str, &Event) + Send + Sync + 'static) -> Self {
        self.describe(|own| own.on_event(listener))
    }

    /// Where the jitter of [`ReopenBackoff`](crate::ReopenBackoff) comes from.
    pub fn random(self, random: impl Random) -> Self {
        self.describe(|own| own.random(random))
    }

    /// Uses a breaker that is there already: shared with another layer, or
    /// with what is no service. It has its name, settings, listeners and
    /// randomness; giving these here too is an error.
    pub fn breaker(mut self, breaker: Breaker) -> Self {
        self.given = Some(breaker);
        self
    }

    /// What is a failure, what a success, and what counts as nothing: a
    /// [classifier](buttress_core::classify) or a closure over the result.
    /// Default on HTTP: [`HttpClassifier`], errors and 5xx, and for gRPC by
    /// its status, trailers too. Elsewhere: [`ResultClassifier`].
    ///
    /// It is cloned into every call, so it should be cheap to clone.
    pub fn classify<D>(self, classifier: D) -> CircuitBreakerBuilder<V, M, D> {
        CircuitBreakerBuilder {
            own: self.own,
            described: self.described,
            given: self.given,
            classifier,
            retry_after: self.retry_after,
            wall_clock: self.wall_clock,
            #[cfg(feature = "back-pressure")]
            back_pressure: self.back_pressure,
            mode: self.mode,
            view: PhantomData,
        }
    }

    /// Answers what does not pass by a service in place of a refusal. Each
    /// such request has a clone of it, which is polled ready before it is
    /// called. The error type stays the inner one. Its answers are not judged.
    pub fn fallback_service<S>(
        self,
        service: S,
    ) -> CircuitBreakerBuilder<V, Instead<ServiceFallback<S>>, C> {
        self.map(|_| Instead(ServiceFallback::new(service)))
    }

    /// Whether `poll_ready` is pending while the breaker would refuse, so that
    /// a balancer passes it over. Default: no.
    ///
    /// Only where something else is ready meanwhile: in front of a single
    /// service, or behind a `Buffer`, callers would wait for as long as the
    /// breaker is open in place of being refused at once. What was ready is
    /// looked at again in `call`, and may still be refused there: two services
    /// that were ready at once may find one probe's place.
    ///
    /// The task is woken when the breaker closes, is reset, or is due to probe,
    /// and when a probe's place is free. Needs a tokio runtime with its timer.
    #[cfg(feature = "back-pressure")]
    pub fn back_pressure(mut self, back_pressure: bool) -> Self {
        self.back_pressure = back_pressure;
        self
    }

    /// Checks the settings and makes the state that all clones of the layer
    /// share.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings: see [`ConfigError`].
    pub fn build(self) -> Result<CircuitBreakerLayer<V, M, C>, ConfigError> {
        if self.retry_after.is_some_and(|max| max.is_zero()) {
            return Err(Problem::RetryAfterMax.into());
        }
        let wall_clock = self.wall_clock;
        let hold = self
            .retry_after
            .map(|max| Arc::new(Hold { max, wall_clock }));
        let breaker = match self.given {
            Some(_) if self.described => return Err(Problem::SharedBreaker.into()),
            Some(breaker) => breaker,
            None => self.own.build()?,
        };
        Ok(CircuitBreakerLayer::new(Shared {
            source: Source::One(breaker, PhantomData),
            classifier: self.classifier,
            hold,
            #[cfg(feature = "back-pressure")]
            back_pressure: self.back_pressure,
            mode: self.mode,
        }))
    }
}

impl<V: View, M, C> fmt::Debug for CircuitBreakerBuilder<V, M, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreakerBuilder")
            .field("own", &self.own)
            .field("given", &self.given)
            .field("retry_after", &self.retry_after)
            .finish_non_exhaustive()
    }
}

/// So that the compiler can say it where the layer is built, not where it is
/// used: what a server stack asks of a layer.
const _: fn() = || {
    fn fits<T: Clone + Send + Sync + 'static>() {}
    fits::<CircuitBreakerLayer>();
    fits::<CircuitBreakerLayer<Any<std::cell::Cell<u8>>, Errors, ResultClassifier>>();
    fits::<crate::CircuitBreaker<()>>();
};

#[cfg(test)]
mod tests {
    use super::*;

    fn error<V: View, M, C>(builder: CircuitBreakerBuilder<V, M, C>) -> String {
        builder.build().unwrap_err().to_string()
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let new = CircuitBreakerLayer::builder;
        for name in ["", "caf\u{e9}", "a\nb", &"x".repeat(129)] {
            assert!(error(new().name(name)).contains("name"), "{name:?}");
        }
        let settings = Settings::new().failure_rate(2.0);
        assert!(error(new().settings(settings)).contains("failure rate"));
        assert!(error(new().retry_after(Duration::ZERO)).contains("Retry-After"));
        assert!(new().build().is_ok());
    }

    #[test]
    fn a_shared_breaker_is_described_once() {
        let breaker = Breaker::builder("shared").build().unwrap();
        let new = || CircuitBreakerLayer::builder().breaker(breaker.clone());
        for builder in [
            new().name("other"),
            new().settings(Settings::tolerant()),
            new().on_event(|_, _| {}),
            new().random(|| 7),
        ] {
            assert!(error(builder).contains("shared"));
        }
        let layer = new().build().unwrap();
        assert!(layer.breaker().is(&breaker));
        let other = CircuitBreakerLayer::<Any<u8>, _, _>::any().breaker(breaker.clone());
        assert!(other.build().unwrap().breaker().is(&breaker));
    }
}
