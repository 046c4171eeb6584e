//! The layer: a lock that all of its services share.

use std::{fmt, marker::PhantomData, sync::Arc};

use buttress_core::{Any, Http, key::ExtractKey};
use http::Response;
use http_body::Body;
use tower_layer::Layer;

use crate::{
    CutBody, Handle, Lock, LockBuilder, LockedBody, Target,
    lease::Lease,
    shared::{Kind, Shared},
};

/// Serves one request a key at a time. The [crate's front page](crate) shows
/// it at work.
///
/// The state was made by [`build`](LockBuilder::build): clones of the layer
/// and all services they make share it.
pub struct LockLayer<V: Target = Http, M = Respond, X = Keep> {
    shared: Arc<Shared<V>>,
    kind: Kind<V, M, X>,
}

/// Answers by responses where there is no lock: on HTTP, where the error type
/// stays the inner one.
#[derive(Clone, Copy, Debug)]
pub enum Respond {}

/// Fails where there is no lock: [`Error::Refused`](crate::Error::Refused),
/// which becomes a [`Refusal`](buttress_core::Refusal) in a
/// [`BoxError`](buttress_core::BoxError).
#[derive(Clone, Copy, Debug)]
pub enum Errors {}

/// The lock is held until the response is there: for services that do not
/// speak HTTP.
#[derive(Clone, Copy, Debug)]
pub enum Call {}

/// The lock is held until the response's body has ended, and a body whose lock
/// is lost goes on.
#[derive(Clone, Copy, Debug)]
pub enum Keep {}

/// The lock is held until the response's body has ended, and a body whose lock
/// is lost is cut.
#[derive(Clone, Copy, Debug)]
pub enum Cut {}

/// How long a lock is held: [`Call`], [`Keep`] or [`Cut`].
pub trait Extent<T>: sealed::Sealed {
    /// The response as it is handed on.
    type Output;

    /// Has the response hold the lease, if it is not over with it.
    #[doc(hidden)]
    fn hold(response: T, lease: Option<Lease>) -> Self::Output;
}

impl<T> Extent<T> for Call {
    type Output = T;

    #[inline]
    fn hold(response: T, lease: Option<Lease>) -> T {
        drop(lease);
        response
    }
}

impl<B: Body> Extent<Response<B>> for Keep {
    type Output = Response<LockedBody<B>>;

    #[inline]
    fn hold(response: Response<B>, lease: Option<Lease>) -> Self::Output {
        response.map(|body| LockedBody::new(body, lease))
    }
}

impl<B: Body> Extent<Response<B>> for Cut {
    type Output = Response<CutBody<B>>;

    #[inline]
    fn hold(response: Response<B>, lease: Option<Lease>) -> Self::Output {
        response.map(|body| CutBody::new(body, lease))
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Call {}
    impl Sealed for super::Keep {}
    impl Sealed for super::Cut {}
}

impl LockLayer {
    /// Starts a layer over HTTP services, which locks by this key of the
    /// requests: see [`buttress_core::key`].
    pub fn builder(key: impl ExtractKey) -> LockBuilder {
        LockBuilder::new(key).telling(|extensions, fence| {
            extensions.insert(fence);
        })
    }
}

impl<Req: 'static> LockLayer<Any<Req>, Errors, Call> {
    /// Starts a layer over services of any request type, which locks by this
    /// key of the requests, until they are answered.
    ///
    /// ```
    /// use buttress_core::key::{self, Key};
    /// use buttress_lock::{Fence, LockLayer};
    /// use tower::{Layer, ServiceExt, service_fn};
    ///
    /// struct Job { account: u64, fence: Option<Fence> }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let layer = LockLayer::any(key::from_request(|job: &Job| Key::from(job.account)))
    ///     .telling(|job: &mut Job, fence| job.fence = Some(fence))
    ///     .build()?;
    /// let service = layer.layer(service_fn(async |job: Job| {
    ///     let fence = job.fence.expect("it holds the lock");
    ///     Ok::<_, std::io::Error>(fence.token())
    /// }));
    /// let job = || Job { account: 7, fence: None };
    /// let first = service.clone().oneshot(job()).await.unwrap();
    /// assert!(service.oneshot(job()).await.unwrap() > first);
    /// # Ok(())
    /// # }
    /// ```
    pub fn any(key: impl ExtractKey<Any<Req>>) -> LockBuilder<Any<Req>, Errors, Call> {
        LockBuilder::new(key)
    }
}

impl<V: Target, M, X> LockLayer<V, M, X> {
    pub(crate) fn new(shared: Shared<V>) -> Self {
        Self {
            shared: Arc::new(shared),
            kind: PhantomData,
        }
    }

    /// Looks at the lock and changes it, while it serves.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(&self.shared.core))
    }
}

impl<S, V: Target, M, X> Layer<S> for LockLayer<V, M, X> {
    type Service = Lock<S, V, M, X>;

    fn layer(&self, inner: S) -> Self::Service {
        Lock::new(inner, Arc::clone(&self.shared))
    }
}

impl<V: Target, M, X> Clone for LockLayer<V, M, X> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            kind: PhantomData,
        }
    }
}

impl<V: Target, M, X> fmt::Debug for LockLayer<V, M, X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockLayer")
            .field("name", &self.shared.core.name())
            .field("held", &self.shared.core.held())
            .finish_non_exhaustive()
    }
}
