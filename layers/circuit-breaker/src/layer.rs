//! The layer: state that all of its services share.

use std::{fmt, marker::PhantomData, sync::Arc, time::Duration};

use buttress_core::{
    Any, Http, Refusal, View,
    classify::{Classify, HttpClassifier, Verdict},
    clock::SharedWallClock,
    respond::SharedResponder,
};
use tower_layer::Layer;

use crate::{Breaker, CircuitBreaker, CircuitBreakerBuilder, CircuitOpen, Permit};

/// Breaks the circuit to a service that fails. The [crate's front page](crate)
/// shows it at work.
///
/// The state was made by [`build`](CircuitBreakerBuilder::build): clones of the
/// layer and all services they make share it.
pub struct CircuitBreakerLayer<V: View = Http, M = Respond, C = HttpClassifier> {
    shared: Arc<Shared<V, M, C>>,
}

/// What a layer and its services have in common.
pub(crate) struct Shared<V: View, M, C> {
    pub(crate) source: Source<V>,
    pub(crate) classifier: C,
    pub(crate) hold: Option<Arc<Hold>>,
    #[cfg(feature = "back-pressure")]
    pub(crate) back_pressure: bool,
    pub(crate) mode: M,
}

/// Where a request's breaker comes from.
pub(crate) enum Source<V: View> {
    One(Breaker, PhantomData<fn(V)>),
}

impl<V: View> Source<V> {
    #[inline]
    pub(crate) fn admit(&self, _: V::Ref<'_>) -> Result<Permit, CircuitOpen> {
        match self {
            Self::One(breaker, _) => breaker.try_acquire(),
        }
    }

    /// The refusal that a responder is shown.
    pub(crate) fn refusal(&self, open: &CircuitOpen) -> Refusal {
        match self {
            // Without the lock that an error takes to learn the name.
            Self::One(breaker, _) => open.refusal().with_origin(breaker.name().to_string()),
        }
    }

    pub(crate) fn breaker(&self) -> &Breaker {
        match self {
            Self::One(breaker, _) => breaker,
        }
    }
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
/// [`Refusal`] in a [`BoxError`](buttress_core::BoxError).
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

impl<V: View, M, C> CircuitBreakerLayer<V, M, C> {
    pub(crate) fn new(shared: Shared<V, M, C>) -> Self {
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Its breaker: state, counts, overrides, reset, settings, while it
    /// serves. A clone of it can be kept.
    #[must_use]
    pub fn breaker(&self) -> &Breaker {
        self.shared.source.breaker()
    }
}

impl<S, V: View, M, C> Layer<S> for CircuitBreakerLayer<V, M, C> {
    type Service = CircuitBreaker<S, V, M, C>;

    fn layer(&self, inner: S) -> Self::Service {
        CircuitBreaker::new(inner, Arc::clone(&self.shared))
    }
}

impl<V: View, M, C> Clone for CircuitBreakerLayer<V, M, C> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<V: View, M, C> fmt::Debug for CircuitBreakerLayer<V, M, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreakerLayer")
            .field("breaker", self.breaker())
            .finish_non_exhaustive()
    }
}
