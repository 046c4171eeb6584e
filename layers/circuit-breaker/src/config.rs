//! What a layer is made of, checked once by `build()`.

use std::{fmt, future::Future, marker::PhantomData, sync::Arc, time::Duration};

use buttress_core::{
    Any, Http, Responder, View,
    classify::HttpClassifier,
    clock::{SharedWallClock, WallClock},
    key::{ExtractKey, SharedKey},
    random::Random,
    respond::SharedResponder,
};
use http::Request;

use crate::{
    Breaker, BreakerBuilder, CircuitBreakerLayer, CircuitOpen, ConfigError, Event, PerKey,
    Registry, RegistryBuilder, ServiceFallback, Settings, Source,
    error::Problem,
    layer::{Errors, Hold, Instead, Respond, ResultClassifier, Shared},
};

/// Builds a [`CircuitBreakerLayer`].
#[must_use = "nothing is protected before `build()`"]
pub struct CircuitBreakerBuilder<V: View = Http, M = Respond, C = HttpClassifier, P = One> {
    own: BreakerBuilder,
    /// Whether something was said of it.
    described: bool,
    scope: P,
    classifier: C,
    retry_after: Option<Duration>,
    wall_clock: SharedWallClock,
    #[cfg(feature = "back-pressure")]
    back_pressure: bool,
    mode: M,
    view: PhantomData<fn(V)>,
}

/// One breaker for all requests.
#[derive(Debug, Default)]
pub struct One {
    given: Option<Breaker>,
}

/// A breaker for each key.
pub struct Per<V: View> {
    key: SharedKey<V>,
    given: Option<Registry>,
    /// Whether something was said of a registry of its own.
    described: bool,
    /// Whether one breaker for all was given before.
    breaker_given: bool,
    own: RegistryBuilder,
}

impl CircuitBreakerBuilder {
    pub(crate) fn respond() -> Self {
        Self::with(Respond::default(), HttpClassifier::new())
    }
}

impl<C, P> CircuitBreakerBuilder<Http, Respond, C, P> {
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
    pub fn errors(self) -> CircuitBreakerBuilder<Http, Errors, C, P> {
        self.map(|_| Errors::default())
    }
}

impl<M, C, P> CircuitBreakerBuilder<Http, M, C, P> {
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
    ) -> CircuitBreakerBuilder<Http, Instead<F>, C, P>
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

impl<Req: 'static, M, C, P> CircuitBreakerBuilder<Any<Req>, M, C, P> {
    /// Answers what does not pass by a closure in place of a refusal: from a
    /// cache, say. The error type stays the inner one. Its answers are not
    /// judged.
    pub fn fallback<F, Fut, T, E>(
        self,
        fallback: F,
    ) -> CircuitBreakerBuilder<Any<Req>, Instead<F>, C, P>
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
            scope: One::default(),
            classifier,
            retry_after: None,
            wall_clock: SharedWallClock::default(),
            #[cfg(feature = "back-pressure")]
            back_pressure: false,
            mode,
            view: PhantomData,
        }
    }

    /// Uses a breaker that is there already: shared with another layer, or
    /// with what is no service. It has its name, settings, listeners and
    /// randomness; giving these here too is an error.
    pub fn breaker(mut self, breaker: Breaker) -> Self {
        self.scope.given = Some(breaker);
        self
    }

    /// A breaker for each key in place of one for all: for each host, endpoint,
    /// route, tenant, or whatever fails by itself.
    ///
    /// What was said of the breaker is said of each of them: settings,
    /// listeners, randomness. The name is the [`Registry`]'s, and by default
    /// all breakers' in metrics and logs, since a client may choose the key.
    /// Requests that have no key share one, [`Key::global`]; name another with
    /// [`or`](buttress_core::key::ExtractKeyExt::or).
    ///
    /// Not for use with [back-pressure](Self::back_pressure): before there is
    /// a request there is no key.
    ///
    /// ```
    /// use buttress_circuit_breaker::{CircuitBreakerLayer, State};
    /// use buttress_core::key;
    /// use http::{Request, Response};
    /// use tower::{Layer, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let layer = CircuitBreakerLayer::builder()
    ///     .name("upstreams")
    ///     .per(key::host())
    ///     .max_keys(200)
    ///     .build()?;
    /// let service = layer.layer(service_fn(async |request: Request<String>| {
    ///     let status = if request.uri().host() == Some("dead") { 502 } else { 200 };
    ///     Response::builder().status(status).body(String::new())
    /// }));
    /// let call = async |uri: &'static str| {
    ///     let request = Request::builder().uri(uri).body(String::new()).unwrap();
    ///     service.clone().oneshot(request).await.unwrap().status().as_u16()
    /// };
    /// for _ in 0..5 {
    ///     assert_eq!(call("http://dead/").await, 502);
    /// }
    /// assert_eq!(call("http://dead/").await, 503);
    /// assert_eq!(call("http://alive/").await, 200);
    /// let states: Vec<_> = layer.registry().statuses().into_iter()
    ///     .map(|(name, status)| (name.to_string(), status.state))
    ///     .collect();
    /// assert_eq!(states, [("alive".into(), State::Closed), ("dead".into(), State::Open)]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// [`Key::global`]: buttress_core::key::Key::global
    pub fn per(self, key: impl ExtractKey<V>) -> CircuitBreakerBuilder<V, M, C, Per<V>> {
        CircuitBreakerBuilder {
            described: self.described,
            own: self.own,
            scope: Per {
                key: SharedKey::new(key),
                given: None,
                described: false,
                breaker_given: self.scope.given.is_some(),
                own: Registry::builder("default"),
            },
            classifier: self.classifier,
            retry_after: self.retry_after,
            wall_clock: self.wall_clock,
            #[cfg(feature = "back-pressure")]
            back_pressure: self.back_pressure,
            mode: self.mode,
            view: PhantomData,
        }
    }
}

impl<V: View, M, C> CircuitBreakerBuilder<V, M, C, Per<V>> {
    fn describe_all(mut self, own: impl FnOnce(RegistryBuilder) -> RegistryBuilder) -> Self {
        self.scope.own = own(self.scope.own);
        self.scope.described = true;
        self
    }

    /// The most breakers that there may be: see
    /// [`RegistryBuilder::max_keys`]. Default: 1000.
    pub fn max_keys(self, max_keys: usize) -> Self {
        self.describe_all(|own| own.max_keys(max_keys))
    }

    /// Settings that differ by key: see [`RegistryBuilder::settings_for`].
    pub fn settings_for<F>(self, settings: F) -> Self
    where
        F: Fn(&str) -> Option<Settings> + Send + Sync + 'static,
    {
        self.describe_all(|own| own.settings_for(settings))
    }

    /// Whether breakers are named by their keys, in metrics too: see
    /// [`RegistryBuilder::name_keys`]. Only where the keys are few and no
    /// client's choice. Default: no.
    pub fn name_keys(self, name_keys: bool) -> Self {
        self.describe_all(|own| own.name_keys(name_keys))
    }

    /// Uses a registry that is there already: shared with another layer, or
    /// with what is no service. It has its name, settings, listeners,
    /// randomness and bound; giving these here too is an error.
    pub fn registry(mut self, registry: Registry) -> Self {
        self.scope.given = Some(registry);
        self
    }

    /// Checks the settings and makes the state that all clones of the layer
    /// share.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings: see [`ConfigError`].
    pub fn build(self) -> Result<CircuitBreakerLayer<V, M, C, PerKey<V>>, ConfigError> {
        if self.scope.breaker_given {
            return Err(Problem::BreakerAndKeys.into());
        }
        #[cfg(feature = "back-pressure")]
        if self.back_pressure {
            return Err(Problem::KeyedBackPressure.into());
        }
        let described = self.described;
        self.finish(|scope, own| {
            let registry = match scope.given {
                Some(_) if described || scope.described => {
                    return Err(Problem::SharedRegistry.into());
                }
                Some(registry) => registry,
                None => scope.own.described_by(own).build()?,
            };
            Ok(PerKey::new(scope.key, registry))
        })
    }
}

impl<V: View, M, C> CircuitBreakerBuilder<V, M, C> {
    /// Checks the settings and makes the state that all clones of the layer
    /// share.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings: see [`ConfigError`].
    pub fn build(self) -> Result<CircuitBreakerLayer<V, M, C>, ConfigError> {
        let described = self.described;
        self.finish(|scope, own| match scope.given {
            Some(_) if described => Err(Problem::SharedBreaker.into()),
            Some(breaker) => Ok(breaker),
            None => own.build(),
        })
    }
}

impl<V: View, M, C, P> CircuitBreakerBuilder<V, M, C, P> {
    fn map<N>(self, mode: impl FnOnce(M) -> N) -> CircuitBreakerBuilder<V, N, C, P> {
        CircuitBreakerBuilder {
            own: self.own,
            described: self.described,
            scope: self.scope,
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

    /// Shares the breaker, or the breakers of all keys, with all processes of
    /// a fleet that have one of this name: see [`Sharing`](crate::Sharing).
    /// Takes a [`Redis`](buttress_redis::Redis), too.
    ///
    /// Build it in a tokio runtime, or make a service of it there.
    #[cfg(feature = "redis")]
    pub fn redis(self, sharing: impl Into<crate::Sharing>) -> Self {
        self.describe(|own| own.redis(sharing))
    }

    /// Where the jitter of [`ReopenBackoff`](crate::ReopenBackoff) comes from.
    pub fn random(self, random: impl Random) -> Self {
        self.describe(|own| own.random(random))
    }

    /// What is a failure, what a success, and what counts as nothing: a
    /// [classifier](buttress_core::classify) or a closure over the result.
    /// Default on HTTP: [`HttpClassifier`], errors and 5xx, and for gRPC by
    /// its status, trailers too. Elsewhere: [`ResultClassifier`].
    ///
    /// It is cloned into every call, so it should be cheap to clone.
    pub fn classify<D>(self, classifier: D) -> CircuitBreakerBuilder<V, M, D, P> {
        CircuitBreakerBuilder {
            own: self.own,
            described: self.described,
            scope: self.scope,
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
    ) -> CircuitBreakerBuilder<V, Instead<ServiceFallback<S>>, C, P> {
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

    fn finish<S: Source<V>>(
        self,
        source: impl FnOnce(P, BreakerBuilder) -> Result<S, ConfigError>,
    ) -> Result<CircuitBreakerLayer<V, M, C, S>, ConfigError> {
        if self.retry_after.is_some_and(|max| max.is_zero()) {
            return Err(Problem::RetryAfterMax.into());
        }
        let wall_clock = self.wall_clock;
        let hold = self
            .retry_after
            .map(|max| Arc::new(Hold { max, wall_clock }));
        let source = source(self.scope, self.own)?;
        Ok(CircuitBreakerLayer::new(Shared {
            lease: source.one().map(Breaker::lease),
            source,
            #[cfg(feature = "redis")]
            attend: S::attend,
            classifier: self.classifier,
            hold,
            #[cfg(feature = "back-pressure")]
            back_pressure: self.back_pressure,
            mode: self.mode,
        }))
    }
}

impl<V: View> fmt::Debug for Per<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Per")
            .field("given", &self.given)
            .field("own", &self.own)
            .finish_non_exhaustive()
    }
}

impl<V: View, M, C, P: fmt::Debug> fmt::Debug for CircuitBreakerBuilder<V, M, C, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreakerBuilder")
            .field("own", &self.own)
            .field("scope", &self.scope)
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
    fits::<CircuitBreakerLayer<Http, Respond, HttpClassifier, PerKey<Http>>>();
    fits::<crate::CircuitBreaker<()>>();
};

#[cfg(test)]
mod tests {
    use buttress_core::key;
    use tower_layer::Layer;

    use super::*;

    fn error<V: View, M, C>(builder: CircuitBreakerBuilder<V, M, C>) -> String {
        builder.build().unwrap_err().to_string()
    }

    fn keyed_error<V: View, M, C>(builder: CircuitBreakerBuilder<V, M, C, Per<V>>) -> String {
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
    fn a_shared_registry_is_described_once() {
        let registry = Registry::builder("shared").build().unwrap();
        let new = || CircuitBreakerLayer::builder().per(key::host());
        let shared = || new().registry(registry.clone());
        for builder in [
            shared().name("other"),
            shared().settings(Settings::tolerant()),
            shared().on_event(|_, _| {}),
            shared().random(|| 7),
            shared().max_keys(7),
            shared().settings_for(Settings::for_service),
            shared().name_keys(true),
        ] {
            assert!(keyed_error(builder).contains("shared"));
        }
        let layer = shared().build().unwrap();
        assert!(layer.registry().is(&registry));
        assert!(layer.layer(()).registry().is(&registry));

        assert!(keyed_error(new().max_keys(0)).contains("most keys"));
        assert!(keyed_error(new().name("")).contains("name"));
        let breaker = Breaker::builder("one").build().unwrap();
        let both = CircuitBreakerLayer::builder().breaker(breaker);
        assert!(keyed_error(both.per(key::host())).contains("each key"));
        #[cfg(feature = "back-pressure")]
        assert!(keyed_error(new().back_pressure(true)).contains("back-pressure"));
    }

    #[test]
    fn what_is_said_of_one_is_said_of_each() {
        let before = CircuitBreakerLayer::builder().settings(Settings::tolerant());
        let layer = before.per(key::host()).name("hosts").build().unwrap();
        assert_eq!(&**layer.registry().name(), "hosts");
        let breaker = layer.registry().get_or_create("a");
        assert_eq!(breaker.settings(), Settings::tolerant());
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
