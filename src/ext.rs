//! The layers as methods of `tower::ServiceBuilder`.

/// Adds the layers as methods to `tower::ServiceBuilder`.
///
/// ```
/// # #[cfg(feature = "rate-limit")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use buttress::{
///     ServiceBuilderExt,
///     rate_limit::{Limit, Quota, RateLimitLayer},
/// };
/// use tower::{ServiceBuilder, service_fn};
///
/// let limit = RateLimitLayer::builder()
///     .limit(Limit::new(Quota::per_second(5)))
///     .build()?;
/// let service = ServiceBuilder::new()
///     .limit_rate(limit)
///     .service(service_fn(async |_: http::Request<String>| {
///         Ok::<_, std::convert::Infallible>(http::Response::new(String::new()))
///     }));
/// # let _ = service;
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "rate-limit"))]
/// # fn main() {}
/// ```
pub trait ServiceBuilderExt<L>: sealed::Sealed<L> + Sized {
    /// Breaks the circuit to a service that fails: see
    /// [`CircuitBreakerLayer`](crate::circuit_breaker::CircuitBreakerLayer).
    ///
    /// ```
    /// use buttress::{ServiceBuilderExt, circuit_breaker::CircuitBreakerLayer};
    /// use http::{Request, Response};
    /// use tower::{ServiceBuilder, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreakerLayer::builder().name("inventory").build()?;
    /// let service = ServiceBuilder::new()
    ///     .circuit_breaker(breaker.clone())
    ///     .service(service_fn(async |_: Request<String>| {
    ///         Ok::<_, std::convert::Infallible>(Response::new(String::new()))
    ///     }));
    /// breaker.breaker().force_open();
    /// assert_eq!(service.oneshot(Request::default()).await?.status(), 503);
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "circuit-breaker")]
    fn circuit_breaker<V: crate::View, M, C, P>(
        self,
        layer: crate::circuit_breaker::CircuitBreakerLayer<V, M, C, P>,
    ) -> tower::ServiceBuilder<
        tower_layer::Stack<crate::circuit_breaker::CircuitBreakerLayer<V, M, C, P>, L>,
    >;

    /// Counts requests for a shutdown, which waits for them: see
    /// [`DrainLayer`](crate::drain::DrainLayer). It stands first.
    ///
    /// ```
    /// use buttress::{ServiceBuilderExt, drain::{DrainLayer, Shutdown}};
    /// use http::{Request, Response};
    /// use tower::{ServiceBuilder, service_fn};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let shutdown = Shutdown::builder().build()?;
    /// let service = ServiceBuilder::new()
    ///     .drain_requests(DrainLayer::new(&shutdown))
    ///     .service(service_fn(async |_: Request<String>| {
    ///         Ok::<_, std::convert::Infallible>(Response::new(String::new()))
    ///     }));
    /// # let _ = service;
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "drain")]
    fn drain_requests(
        self,
        layer: crate::drain::DrainLayer,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::drain::DrainLayer, L>>;

    /// Sends a second attempt while the first is slow: see
    /// [`HedgeLayer`](crate::retry::HedgeLayer).
    #[cfg(feature = "retry")]
    fn hedge_requests<V: crate::View, M>(
        self,
        layer: crate::retry::HedgeLayer<V, M>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::retry::HedgeLayer<V, M>, L>>;

    /// Limits the rate of requests: see
    /// [`RateLimitLayer`](crate::rate_limit::RateLimitLayer), and, for what is
    /// kept in Redis, `FleetLayer` beside it.
    ///
    /// Not called `rate_limit`, since `ServiceBuilder` has a method of that
    /// name.
    #[cfg(feature = "rate-limit")]
    fn limit_rate<R: sealed::LimitsRate>(
        self,
        layer: R,
    ) -> tower::ServiceBuilder<tower_layer::Stack<R, L>>;

    /// Serves one request a key at a time: see
    /// [`LockLayer`](crate::lock::LockLayer).
    #[cfg(feature = "lock")]
    fn lock_requests<V: crate::lock::Target, M, X>(
        self,
        layer: crate::lock::LockLayer<V, M, X>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::lock::LockLayer<V, M, X>, L>>;

    /// Sends again what has failed: see
    /// [`RetryLayer`](crate::retry::RetryLayer).
    ///
    /// Not called `retry`, since `ServiceBuilder` has a method of that name.
    #[cfg(feature = "retry")]
    fn retry_requests<V: crate::View, M>(
        self,
        layer: crate::retry::RetryLayer<V, M>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::retry::RetryLayer<V, M>, L>>;

    /// Signs requests as webhooks, the body and what goes with it: see
    /// [`SignLayer`](crate::webhook::SignLayer). It stands last, before the
    /// transport.
    ///
    /// ```
    /// use buttress::{
    ///     ServiceBuilderExt,
    ///     webhook::{GitHub, Secret, SignLayer, Signer, WholeBody},
    /// };
    /// use http::{Request, Response};
    /// use tower::{ServiceBuilder, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let secret = Secret::new("It's a Secret to Everybody")?;
    /// let sign = SignLayer::builder(Signer::new(GitHub, [secret])?).build()?;
    /// let service = ServiceBuilder::new()
    ///     .sign_webhooks(sign)
    ///     .service(service_fn(async |request: Request<WholeBody>| {
    ///         let signature = request.headers()["x-hub-signature-256"].clone();
    ///         Ok::<_, std::convert::Infallible>(Response::new(signature))
    ///     }));
    /// let request = Request::post("/hooks").body(String::from("Hello, World!"))?;
    /// let response = service.oneshot(request).await.unwrap();
    /// assert!(response.body().to_str()?.starts_with("sha256=757107ea"));
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "webhook")]
    fn sign_webhooks<M>(
        self,
        layer: crate::webhook::SignLayer<M>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::webhook::SignLayer<M>, L>>;

    /// Gives each message an id, which its attempts share: see
    /// [`MessageIdLayer`](crate::webhook::MessageIdLayer). It stands outside of
    /// a retry.
    #[cfg(feature = "webhook")]
    fn message_ids(
        self,
        layer: crate::webhook::MessageIdLayer,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::webhook::MessageIdLayer, L>>;

    /// Lets requests wait for their turn: see
    /// [`WaitLayer`](crate::rate_limit::WaitLayer).
    #[cfg(feature = "wait")]
    fn wait_for_rate<V: crate::View>(
        self,
        layer: crate::rate_limit::WaitLayer<V>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::rate_limit::WaitLayer<V>, L>>;

    /// Lets in what is signed, once: see
    /// [`VerifyLayer`](crate::webhook::VerifyLayer).
    ///
    /// ```
    /// use buttress::{
    ///     ServiceBuilderExt,
    ///     webhook::{Secret, Standard, VerifyLayer, WholeBody},
    /// };
    /// use http::{Request, Response};
    /// use tower::{ServiceBuilder, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
    /// let verify = VerifyLayer::builder(Standard::new()).secrets([secret]).build()?;
    /// let service = ServiceBuilder::new()
    ///     .verify_webhooks(verify)
    ///     .service(service_fn(async |_: Request<WholeBody>| {
    ///         Ok::<_, std::convert::Infallible>(Response::new(String::new()))
    ///     }));
    /// let unsigned = Request::new(String::new());
    /// assert_eq!(service.oneshot(unsigned).await?.status(), 401);
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "webhook")]
    fn verify_webhooks(
        self,
        layer: crate::webhook::VerifyLayer,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::webhook::VerifyLayer, L>>;

    /// Ends calls that take too long: see
    /// [`TimeoutLayer`](crate::timeout::TimeoutLayer).
    ///
    /// Not called `timeout`, since `ServiceBuilder` has a method of that name,
    /// whose errors would need handling.
    ///
    /// ```
    /// use std::time::Duration;
    /// use buttress::{ServiceBuilderExt, timeout::TimeoutLayer};
    /// use http::{Request, Response};
    /// use tower::{ServiceBuilder, ServiceExt, service_fn};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let limit = TimeoutLayer::builder().limit(Duration::from_millis(20)).build()?;
    /// let service = ServiceBuilder::new()
    ///     .limit_time(limit)
    ///     .service(service_fn(async |_: Request<String>| {
    ///         std::future::pending::<()>().await;
    ///         Ok::<_, std::convert::Infallible>(Response::new(String::new()))
    ///     }));
    /// assert_eq!(service.oneshot(Request::default()).await?.status(), 504);
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "timeout")]
    fn limit_time<V: crate::View, M, X>(
        self,
        layer: crate::timeout::TimeoutLayer<V, M, X>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::timeout::TimeoutLayer<V, M, X>, L>>;
}

impl<L> ServiceBuilderExt<L> for tower::ServiceBuilder<L> {
    #[cfg(feature = "circuit-breaker")]
    fn circuit_breaker<V: crate::View, M, C, P>(
        self,
        layer: crate::circuit_breaker::CircuitBreakerLayer<V, M, C, P>,
    ) -> tower::ServiceBuilder<
        tower_layer::Stack<crate::circuit_breaker::CircuitBreakerLayer<V, M, C, P>, L>,
    > {
        self.layer(layer)
    }

    #[cfg(feature = "drain")]
    fn drain_requests(
        self,
        layer: crate::drain::DrainLayer,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::drain::DrainLayer, L>> {
        self.layer(layer)
    }

    #[cfg(feature = "retry")]
    fn hedge_requests<V: crate::View, M>(
        self,
        layer: crate::retry::HedgeLayer<V, M>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::retry::HedgeLayer<V, M>, L>> {
        self.layer(layer)
    }

    #[cfg(feature = "rate-limit")]
    fn limit_rate<R: sealed::LimitsRate>(
        self,
        layer: R,
    ) -> tower::ServiceBuilder<tower_layer::Stack<R, L>> {
        self.layer(layer)
    }

    #[cfg(feature = "lock")]
    fn lock_requests<V: crate::lock::Target, M, X>(
        self,
        layer: crate::lock::LockLayer<V, M, X>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::lock::LockLayer<V, M, X>, L>> {
        self.layer(layer)
    }

    #[cfg(feature = "retry")]
    fn retry_requests<V: crate::View, M>(
        self,
        layer: crate::retry::RetryLayer<V, M>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::retry::RetryLayer<V, M>, L>> {
        self.layer(layer)
    }

    #[cfg(feature = "webhook")]
    fn sign_webhooks<M>(
        self,
        layer: crate::webhook::SignLayer<M>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::webhook::SignLayer<M>, L>> {
        self.layer(layer)
    }

    #[cfg(feature = "webhook")]
    fn message_ids(
        self,
        layer: crate::webhook::MessageIdLayer,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::webhook::MessageIdLayer, L>> {
        self.layer(layer)
    }

    #[cfg(feature = "wait")]
    fn wait_for_rate<V: crate::View>(
        self,
        layer: crate::rate_limit::WaitLayer<V>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::rate_limit::WaitLayer<V>, L>> {
        self.layer(layer)
    }

    #[cfg(feature = "webhook")]
    fn verify_webhooks(
        self,
        layer: crate::webhook::VerifyLayer,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::webhook::VerifyLayer, L>> {
        self.layer(layer)
    }

    #[cfg(feature = "timeout")]
    fn limit_time<V: crate::View, M, X>(
        self,
        layer: crate::timeout::TimeoutLayer<V, M, X>,
    ) -> tower::ServiceBuilder<tower_layer::Stack<crate::timeout::TimeoutLayer<V, M, X>, L>> {
        self.layer(layer)
    }
}

mod sealed {
    pub trait Sealed<L> {}
    impl<L> Sealed<L> for tower::ServiceBuilder<L> {}

    /// The rate limiter's layers: in this process, and for a fleet.
    #[cfg(feature = "rate-limit")]
    pub trait LimitsRate {}

    #[cfg(feature = "rate-limit")]
    impl<V: crate::View, M> LimitsRate for crate::rate_limit::RateLimitLayer<V, M> {}

    #[cfg(all(feature = "rate-limit", feature = "redis"))]
    impl<V: crate::View, M> LimitsRate for crate::rate_limit::redis::FleetLayer<V, M> {}
}
