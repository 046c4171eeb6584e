//! The layer: state that all of its services share.

use std::{fmt, sync::Arc};

use buttress_core::{Any, Http, View, clock::SharedWallClock, respond::SharedResponder};
use http::{HeaderMap, StatusCode};
use tower_layer::Layer;

use crate::{Handle, HeaderFormat, RateLimit, RateLimitBuilder, limiter::Limiter, store::Detail};

/// Limits how many requests pass. The [crate's front page](crate) shows it at
/// work.
///
/// The state was made by [`build`](RateLimitBuilder::build): clones of the
/// layer and all services they make share it.
pub struct RateLimitLayer<V: View = Http, M = Respond> {
    shared: Arc<Shared<V, M>>,
}

/// What a layer, its services and their futures have in common.
pub(crate) struct Shared<V: View, M> {
    pub(crate) limiter: Limiter<V>,
    pub(crate) mode: M,
}

/// A closure over a response's status and headers.
pub(crate) type OnResponse = Arc<dyn Fn(StatusCode, &HeaderMap) -> bool + Send + Sync>;

/// Refuses by responses: on HTTP, where the error type stays the inner one.
#[derive(Clone)]
pub struct Respond {
    pub(crate) formats: Vec<HeaderFormat>,
    pub(crate) expose: bool,
    pub(crate) info: bool,
    pub(crate) refund: Option<OnResponse>,
    pub(crate) responder: SharedResponder,
    pub(crate) wall_clock: SharedWallClock,
    /// What a decision has to tell: see [`settle`](Self::settle).
    pub(crate) detail: Detail,
}

impl Respond {
    /// Whether handlers are told, or charges given back: what few ask for.
    #[inline]
    pub(crate) fn tells(&self) -> bool {
        self.info || self.refund.is_some()
    }

    /// Works out what a decision has to tell, once and not for each.
    pub(crate) fn settle(&mut self) {
        self.detail = if self.formats.contains(&HeaderFormat::Draft11) {
            Detail::All
        } else if self.info || !self.formats.is_empty() {
            Detail::Tightest
        } else {
            Detail::None
        };
    }
}

impl Default for Respond {
    fn default() -> Self {
        Self {
            formats: vec![HeaderFormat::XRateLimit],
            expose: false,
            info: false,
            refund: None,
            responder: SharedResponder::default(),
            wall_clock: SharedWallClock::default(),
            detail: Detail::Tightest,
        }
    }
}

impl fmt::Debug for Respond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Respond")
            .field("formats", &self.formats)
            .field("expose", &self.expose)
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

/// Refuses by errors: [`BoxError`](buttress_core::BoxError) holding a
/// [`Refusal`](buttress_core::Refusal).
#[derive(Clone, Copy, Debug, Default)]
pub struct Errors(());

impl RateLimitLayer {
    /// Starts a layer over HTTP services that answers refusals by itself.
    pub fn builder() -> RateLimitBuilder {
        RateLimitBuilder::respond()
    }
}

impl<Req: 'static> RateLimitLayer<Any<Req>, Errors> {
    /// Starts a layer over services of any request type. Its limits are made
    /// with [`Limit::any`](crate::Limit::any).
    ///
    /// ```
    /// use buttress_core::{Refusal, key::Key};
    /// use buttress_rate_limit::{Limit, Quota, RateLimitLayer};
    /// use tower::{Layer, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    /// let layer = RateLimitLayer::any()
    ///     .limit(Limit::any(Quota::per_minute(1)).key(|job: &String| Some(Key::from(job))))
    ///     .build()?;
    /// let service = layer.layer(service_fn(async |job: String| {
    ///     Ok::<_, std::convert::Infallible>(job.len())
    /// }));
    /// assert_eq!(service.clone().oneshot("resize".into()).await?, 6);
    /// let error = service.oneshot("resize".into()).await.unwrap_err();
    /// assert!(error.downcast_ref::<Refusal>().unwrap().retry_after().is_some());
    /// # Ok(())
    /// # }
    /// ```
    pub fn any() -> RateLimitBuilder<Any<Req>, Errors> {
        RateLimitBuilder::any()
    }
}

impl<V: View, M> RateLimitLayer<V, M> {
    pub(crate) fn new(shared: Shared<V, M>) -> Self {
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Looks up and resets keys and replaces quotas, while it serves.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(self.shared.limiter.tables()))
    }
}

impl<S, V: View, M> Layer<S> for RateLimitLayer<V, M> {
    type Service = RateLimit<S, V, M>;

    fn layer(&self, inner: S) -> Self::Service {
        RateLimit::new(inner, Arc::clone(&self.shared))
    }
}

impl<V: View, M> Clone for RateLimitLayer<V, M> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<V: View, M> fmt::Debug for RateLimitLayer<V, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimitLayer")
            .field("limiter", &self.shared.limiter)
            .finish_non_exhaustive()
    }
}
