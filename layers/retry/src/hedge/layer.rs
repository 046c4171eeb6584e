//! The layer: rules, latencies and a budget that all of its services share.

use std::{
    fmt,
    marker::PhantomData,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use buttress_core::{Any, Http, View};
use tower_layer::Layer;

use super::{
    Hedge, HedgeBuilder,
    call::Web,
    config::check_max_hedges,
    shared::{After, Shared},
};
use crate::{AnyError, ConfigError, Plain};

/// Sends a second attempt where the first is slow. The [module](crate::hedge)
/// shows it at work.
///
/// The state was made by [`build`](HedgeBuilder::build): clones of the layer
/// and all services they make share its latencies, its budget and its memory
/// for bodies.
pub struct HedgeLayer<V: View = Http, M = OverHttp> {
    pub(super) policy: HedgePolicy,
    pub(super) mode: M,
    pub(super) view: PhantomData<fn(V)>,
}

/// Over HTTP: the error type and the response stay the inner ones.
pub struct OverHttp<I = Plain> {
    pub(super) web: Arc<Web>,
    pub(super) inspect: PhantomData<I>,
}

impl<I> Clone for OverHttp<I> {
    fn clone(&self) -> Self {
        Self {
            web: Arc::clone(&self.web),
            inspect: PhantomData,
        }
    }
}

impl<I> fmt::Debug for OverHttp<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OverHttp").field(&self.web).finish()
    }
}

/// Over any service whose requests can be cloned: `W` says which results are
/// bad.
pub struct OverAny<Req, W = AnyError> {
    pub(super) judge: W,
    pub(super) hedge_if: Option<HedgeIf<Req>>,
}

pub(super) type HedgeIf<Req> = Arc<dyn Fn(&Req) -> bool + Send + Sync>;

impl<Req, W: Clone> Clone for OverAny<Req, W> {
    fn clone(&self) -> Self {
        Self {
            judge: self.judge.clone(),
            hedge_if: self.hedge_if.clone(),
        }
    }
}

impl<Req, W> fmt::Debug for OverAny<Req, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OverAny")
            .field("hedge_if", &self.hedge_if.is_some())
            .finish_non_exhaustive()
    }
}

impl HedgeLayer {
    /// Starts a layer over HTTP services.
    pub fn builder() -> HedgeBuilder {
        HedgeBuilder::http()
    }
}

impl<Req: 'static> HedgeLayer<Any<Req>, OverAny<Req>> {
    /// Starts a layer over services of any request type that can be cloned. All
    /// requests are hedged, unless a [closure](HedgeBuilder::hedge_if) knows
    /// better, and every `Err` is bad, but for refusals of other layers that
    /// stand.
    pub fn any() -> HedgeBuilder<Any<Req>, OverAny<Req>> {
        HedgeBuilder::any()
    }
}

impl<V: View, M> HedgeLayer<V, M> {
    /// Its rules: to look at them, and to change them while serving.
    #[must_use]
    pub fn policy(&self) -> &HedgePolicy {
        &self.policy
    }
}

/// The rules of a layer, to look at and to change while serving. Cheap to
/// clone; requests that wait for their hedge already are not concerned.
#[derive(Clone)]
pub struct HedgePolicy(pub(super) Arc<Shared>);

impl HedgePolicy {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// How long a request would wait for its hedge now.
    #[must_use]
    pub fn delay(&self) -> Duration {
        self.0.delay(None)
    }

    /// As [`HedgeBuilder::after`].
    ///
    /// # Errors
    ///
    /// [`ConfigError`] above an hour; the old delay stays.
    pub fn set_after(&self, delay: Duration) -> Result<(), ConfigError> {
        self.set(After::Fixed(delay))
    }

    /// As [`HedgeBuilder::after_percentile`]. What is known of latencies is
    /// kept; under a fixed delay there was none.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if something is out of its range; the old delay stays.
    pub fn set_after_percentile(
        &self,
        percentile: f64,
        min: Duration,
        max: Duration,
    ) -> Result<(), ConfigError> {
        self.set(After::Percentile(percentile, min, max))
    }

    fn set(&self, after: After) -> Result<(), ConfigError> {
        after.check()?;
        self.0.delay.set(after);
        Ok(())
    }

    /// As [`HedgeBuilder::max_hedges`]: 0 switches hedging off.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] above 16; the old number stays.
    pub fn set_max_hedges(&self, hedges: u32) -> Result<(), ConfigError> {
        check_max_hedges(hedges)?;
        self.0.max_hedges.store(hedges, Relaxed);
        Ok(())
    }
}

impl fmt::Debug for HedgePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<S, V: View, M: Clone> Layer<S> for HedgeLayer<V, M> {
    type Service = Hedge<S, V, M>;

    fn layer(&self, inner: S) -> Self::Service {
        Hedge::new(inner, Arc::clone(&self.policy.0), self.mode.clone())
    }
}

impl<V: View, M: Clone> Clone for HedgeLayer<V, M> {
    fn clone(&self) -> Self {
        Self {
            policy: self.policy.clone(),
            mode: self.mode.clone(),
            view: PhantomData,
        }
    }
}

impl<V: View, M: fmt::Debug> fmt::Debug for HedgeLayer<V, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HedgeLayer")
            .field("policy", &self.policy)
            .field("mode", &self.mode)
            .finish()
    }
}
