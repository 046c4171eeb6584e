//! The layer: state that all of its services share.

use std::{fmt, marker::PhantomData, sync::Arc, time::Duration};

use buttress_core::{
    Any, Http, View,
    classify::{Classify, HttpClassifier, Verdict},
    clock::SharedWallClock,
    respond::SharedResponder,
};
use tower_layer::Layer;

use crate::{Breaker, CircuitBreaker, CircuitBreakerBuilder, PerKey, Registry, cell::Lease};

/// Breaks the circuit to a service that fails. The [crate's front page](crate)
/// shows it at work.
///
/// The state was made by [`build`](CircuitBreakerBuilder::build): clones of the
/// layer and all services they make share it.
pub struct CircuitBreakerLayer<V: View = Http, M = Respond, C = HttpClassifier, P = Breaker> {
    shared: Arc<Shared<M, C, P>>,
    view: PhantomData<fn(V)>,
}

/// What a layer and its services have in common.
pub(crate) struct Shared<M, C, P> {
    pub(crate) source: P,
    /// Told that a service is made.
    #[cfg(feature = "redis")]
    pub(crate) attend: fn(&P),
    /// The breaker's, if there is one for all.
    pub(crate) lease: Option<Lease>,
    pub(crate) classifier: C,
    pub(crate) hold: Option<Arc<Hold>>,
    #[cfg(feature = "back-pressure")]
    pub(crate) back_pressure: bool,
    pub(crate) mode: M,
}

/// Whether and for how long a callee may ask to be left alone.
pub(crate) struct Hold {
    pub(crate) max: Duration,
    pub(crate) wall_clock: SharedWallClock,
}

/// Refuses by responses: on HTTP, where the error type stays the inner one.
#[derive(Clone, Debug, Default)]
pub struct Respond {
    pub(crate) responder: SharedResponder,
}

/// Refuses by errors: [`Error::Open`](crate::Error::Open), which becomes a
/// [`Refusal`](buttress_core::Refusal) in a [`BoxError`](buttress_core::BoxError).
#[derive(Clone, Copy, Debug, Default)]
pub struct Errors(());

/// Has a [`Fallback`](crate::Fallback) answer what does not pass.
#[derive(Clone, Copy, Debug)]
pub struct Instead<F>(pub(crate) F);

/// An `Err` is a failure, an `Ok` a success: the default for services of any
/// kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResultClassifier;

impl<T, E> Classify<T, E> for ResultClassifier {
    #[inline]
    fn classify(&self, result: Result<&T, &E>) -> Verdict {
        match result {
            Ok(_) => Verdict::Success,
            Err(_) => Verdict::Failure,
        }
    }
}

impl CircuitBreakerLayer {
    /// Starts a layer over HTTP services that answers refusals by itself.
    pub fn builder() -> CircuitBreakerBuilder {
        CircuitBreakerBuilder::respond()
    }
}

impl<Req: 'static> CircuitBreakerLayer<Any<Req>, Errors, ResultClassifier> {
    /// Starts a layer over services of any request type, whose refusals are
    /// errors. An `Err` is a failure unless a
    /// [classifier](CircuitBreakerBuilder::classify) says otherwise.
    ///
    /// ```
    /// use buttress_circuit_breaker::{CircuitBreakerLayer, Settings};
    /// use tower::{Layer, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let layer = CircuitBreakerLayer::any()
    ///     .name("geocoder")
    ///     .settings(Settings::new().consecutive_failures(1))
    ///     .build()?;
    /// let service = layer.layer(service_fn(async |city: String| {
    ///     Err::<(f64, f64), _>(format!("{city} is nowhere"))
    /// }));
    /// let error = service.clone().oneshot("Atlantis".into()).await.unwrap_err();
    /// assert_eq!(error.into_inner().unwrap(), "Atlantis is nowhere");
    ///
    /// let error = service.oneshot("Oslo".into()).await.unwrap_err();
    /// assert_eq!(error.open().unwrap().name().as_deref(), Some("geocoder"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn any() -> CircuitBreakerBuilder<Any<Req>, Errors, ResultClassifier> {
        CircuitBreakerBuilder::any()
    }
}

impl<V: View, M, C, P> CircuitBreakerLayer<V, M, C, P> {
    pub(crate) fn new(shared: Shared<M, C, P>) -> Self {
        Self {
            shared: Arc::new(shared),
            view: PhantomData,
        }
    }
}

impl<V: View, M, C> CircuitBreakerLayer<V, M, C> {
    /// Its breaker: state, counts, overrides, reset, settings, while it
    /// serves. A clone of it can be kept.
    #[must_use]
    pub fn breaker(&self) -> &Breaker {
        &self.shared.source
    }
}

impl<V: View, M, C> CircuitBreakerLayer<V, M, C, PerKey<V>> {
    /// Its breakers, one for each key: states, reset, health, while it serves.
    /// A clone of it can be kept.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        self.shared.source.registry()
    }
}

impl<S, V: View, M, C, P> Layer<S> for CircuitBreakerLayer<V, M, C, P> {
    type Service = CircuitBreaker<S, V, M, C, P>;

    fn layer(&self, inner: S) -> Self::Service {
        #[cfg(feature = "redis")]
        (self.shared.attend)(&self.shared.source);
        CircuitBreaker::new(inner, Arc::clone(&self.shared))
    }
}

impl<V: View, M, C, P> Clone for CircuitBreakerLayer<V, M, C, P> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            view: PhantomData,
        }
    }
}

impl<V: View, M, C, P: fmt::Debug> fmt::Debug for CircuitBreakerLayer<V, M, C, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreakerLayer")
            .field("source", &self.shared.source)
            .finish_non_exhaustive()
    }
}
