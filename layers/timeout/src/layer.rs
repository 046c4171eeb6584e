//! The layer: a limit that all of its services share.

use std::{fmt, marker::PhantomData, sync::Arc};

use buttress_core::{
    Any, Http, View,
    classify::{Classify, Expect},
};
use http::Response;
use http_body::Body;
use tower_layer::Layer;

use crate::{
    Handle, TimedBody, Timeout, TimeoutBuilder,
    future::Watch,
    shared::{Kind, Shared},
};

/// Limits how long a call may take. The [crate's front page](crate) shows it
/// at work.
///
/// The state was made by [`build`](TimeoutBuilder::build): clones of the layer
/// and all services they make share it.
pub struct TimeoutLayer<V: View = Http, M = Respond, X = ToHead> {
    shared: Arc<Shared>,
    kind: Kind<V, M, X>,
}

/// Answers by responses when time is up: on HTTP, where the error type stays
/// the inner one.
#[derive(Clone, Copy, Debug)]
pub enum Respond {}

/// Fails when time is up: [`Error::Elapsed`](crate::Error::Elapsed), which
/// becomes a [`Refusal`](buttress_core::Refusal) in a
/// [`BoxError`](buttress_core::BoxError).
#[derive(Clone, Copy, Debug)]
pub enum Errors {}

/// The limit is one of the time to the response, which over HTTP is its head.
#[derive(Clone, Copy, Debug)]
pub enum ToHead {}

/// The limit is one of the time to the end of the response's body.
#[derive(Clone, Copy, Debug)]
pub enum ToEnd {}

/// How far a limit reaches: [`ToHead`] or [`ToEnd`].
pub trait Extent<T>: sealed::Sealed {
    /// The response as it is handed on.
    type Output;

    /// Has `watch` go on with the response, if it is not over with it.
    #[doc(hidden)]
    fn wrap(response: T, watch: Option<Watch>) -> Self::Output;
}

impl<T> Extent<T> for ToHead {
    type Output = T;

    #[inline]
    fn wrap(response: T, _: Option<Watch>) -> T {
        response
    }
}

impl<B: Body> Extent<Response<B>> for ToEnd {
    type Output = Response<TimedBody<B>>;

    #[inline]
    fn wrap(response: Response<B>, watch: Option<Watch>) -> Self::Output {
        let watch = watch.and_then(|watch| {
            let classifier = &watch.shared.streaming;
            match Classify::<_, ()>::expects(classifier, &response) {
                Expect::Nothing => None,
                Expect::GrpcStatus => Some(watch),
                _ => Some(watch.unanswered()),
            }
        });
        response.map(|body| TimedBody::new(body, watch))
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::ToHead {}
    impl Sealed for super::ToEnd {}
}

impl TimeoutLayer {
    /// Starts a layer over HTTP services that answers by itself when time is
    /// up.
    pub fn builder() -> TimeoutBuilder {
        TimeoutBuilder::new()
    }
}

impl<Req: 'static> TimeoutLayer<Any<Req>, Errors> {
    /// Starts a layer over services of any request type, which fails when time
    /// is up.
    ///
    /// ```
    /// use std::time::Duration;
    /// use buttress_timeout::TimeoutLayer;
    /// use tower::{Layer, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let limit = Duration::from_millis(250);
    /// let layer = TimeoutLayer::any().name("geocoder").limit(limit).build()?;
    /// let service = layer.layer(service_fn(async |city: String| {
    ///     if city == "Atlantis" {
    ///         std::future::pending::<()>().await;
    ///     }
    ///     Ok::<_, std::io::Error>((59.9, 10.7))
    /// }));
    /// assert!(service.clone().oneshot("Oslo".into()).await.is_ok());
    ///
    /// let error = service.oneshot("Atlantis".into()).await.unwrap_err();
    /// assert_eq!(error.elapsed().unwrap().after(), limit);
    /// # Ok(())
    /// # }
    /// ```
    pub fn any() -> TimeoutBuilder<Any<Req>, Errors> {
        TimeoutBuilder::new()
    }
}

impl<V: View, M, X> TimeoutLayer<V, M, X> {
    pub(crate) fn new(shared: Shared) -> Self {
        Self {
            shared: Arc::new(shared),
            kind: PhantomData,
        }
    }

    /// Looks at the limit and changes it, while it serves.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(&self.shared))
    }
}

impl<S, V: View, M, X> Layer<S> for TimeoutLayer<V, M, X> {
    type Service = Timeout<S, V, M, X>;

    fn layer(&self, inner: S) -> Self::Service {
        Timeout::new(inner, Arc::clone(&self.shared))
    }
}

impl<V: View, M, X> Clone for TimeoutLayer<V, M, X> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            kind: PhantomData,
        }
    }
}

impl<V: View, M, X> fmt::Debug for TimeoutLayer<V, M, X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TimeoutLayer")
            .field("name", &self.shared.name())
            .field("limit", &self.shared.limit())
            .finish_non_exhaustive()
    }
}
