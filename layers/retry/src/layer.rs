//! The layer: rules that all of its services share.

use std::{fmt, marker::PhantomData, sync::Arc};

use buttress_core::{Any, Http, View};
use tower_layer::Layer;

use crate::{
    AnyError, Memory, Retry, RetryBuilder, RetryPolicy,
    call::{HttpShared, Plain},
};

/// Repeats requests that have failed. The [crate's front page](crate) shows it
/// at work.
///
/// The state was made by [`build`](RetryBuilder::build): clones of the layer
/// and all services they make share its budget and its memory for bodies.
pub struct RetryLayer<V: View = Http, M = Respond> {
    pub(crate) policy: RetryPolicy,
    pub(crate) mode: M,
    pub(crate) view: PhantomData<fn(V)>,
}

/// Over HTTP: bodies are replayed, and the error type stays the inner one.
pub struct Respond<I = Plain> {
    pub(crate) shared: Arc<HttpShared>,
    pub(crate) max_body: usize,
    pub(crate) memory: Memory,
    pub(crate) inspect: PhantomData<I>,
}

impl<I> Clone for Respond<I> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            max_body: self.max_body,
            memory: self.memory.clone(),
            inspect: PhantomData,
        }
    }
}

impl<I> fmt::Debug for Respond<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Respond")
            .field("rules", &self.shared.rules)
            .field("max_body", &self.max_body)
            .field("memory", &self.memory)
            .finish()
    }
}

/// Over any service whose requests can be cloned: `W` says what is worth
/// another attempt.
#[derive(Clone, Copy, Debug)]
pub struct Errors<W = AnyError> {
    pub(crate) judge: W,
}

impl RetryLayer {
    /// Starts a layer over HTTP services.
    pub fn builder() -> RetryBuilder {
        RetryBuilder::http()
    }
}

impl<Req: 'static> RetryLayer<Any<Req>, Errors> {
    /// Starts a layer over services of any request type that can be cloned:
    /// once for each attempt, the last one too, for what judges its result is
    /// shown the request.
    /// Every `Err` is worth another attempt, but for refusals of other layers
    /// that say otherwise, unless a [closure](RetryBuilder::retry_if) knows
    /// better. The [total timeout](crate::Settings::total_timeout) ends the
    /// waits; an attempt under way is told nothing of it.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use buttress_retry::{Backoff, RetryLayer, Settings};
    /// use tower::{Layer, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let layer = RetryLayer::any()
    ///     .settings(Settings::quick().backoff(Backoff::fixed(Duration::from_millis(1))))
    ///     .build()?;
    /// let mut answers = vec![Ok(42), Err(std::io::Error::other("not yet"))];
    /// let answers = std::sync::Arc::new(std::sync::Mutex::new(answers));
    /// let service = layer.layer(service_fn(move |_: &'static str| {
    ///     let answer = answers.lock().unwrap().pop().unwrap();
    ///     async move { answer }
    /// }));
    /// assert_eq!(service.oneshot("the question").await.unwrap(), 42);
    /// # Ok(())
    /// # }
    /// ```
    pub fn any() -> RetryBuilder<Any<Req>, Errors> {
        RetryBuilder::any()
    }
}

impl<V: View, M> RetryLayer<V, M> {
    /// Its rules: to look at them, to change them while serving, and to run
    /// other functions by them.
    #[must_use]
    pub fn policy(&self) -> &RetryPolicy {
        &self.policy
    }
}

impl<I> RetryLayer<Http, Respond<I>> {
    /// The memory that request bodies are remembered in.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.mode.memory
    }
}

impl<S, V: View, M: Clone> Layer<S> for RetryLayer<V, M> {
    type Service = Retry<S, V, M>;

    fn layer(&self, inner: S) -> Self::Service {
        Retry::new(inner, Arc::clone(&self.policy.0), self.mode.clone())
    }
}

impl<V: View, M: Clone> Clone for RetryLayer<V, M> {
    fn clone(&self) -> Self {
        Self {
            policy: self.policy.clone(),
            mode: self.mode.clone(),
            view: PhantomData,
        }
    }
}

impl<V: View, M: fmt::Debug> fmt::Debug for RetryLayer<V, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryLayer")
            .field("policy", &self.policy)
            .field("mode", &self.mode)
            .finish()
    }
}
