//! The same stack by `ServiceBuilder`, in the order of the documentation.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress::{
    BoxError, RefusalKind, ServiceBuilderExt,
    circuit_breaker::{self, CircuitBreakerLayer, Settings, State},
    retry::{Cause, ReplayBody, RetryLayer},
    timeout::{self, TimeoutLayer},
};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy;
use tokio::time::Instant;
use tower::{ServiceBuilder, ServiceExt};

use crate::support::{Act, MS, UNAVAILABLE, attempts, http1, payload, run};

#[test]
fn retry_breaker_timeout_transport() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Answer(UNAVAILABLE), Act::Hang]).await;
        let retry = RetryLayer::builder().settings(attempts(3)).build().unwrap();
        let breaker = CircuitBreakerLayer::builder().build().unwrap();
        let limit = TimeoutLayer::builder().limit(300 * MS).build().unwrap();
        let service = ServiceBuilder::new()
            .retry_requests(retry)
            .circuit_breaker(breaker.clone())
            .limit_time(limit)
            .service(http1());
        let data = payload(10_000);
        let request = Request::put(upstream.url())
            .body(Full::new(data.clone()))
            .unwrap();
        let response = service.oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.to_bytes(), data);
        assert_eq!(upstream.requests(), 3);
        assert_eq!(breaker.breaker().state(), State::Closed);
    });
}

/// With errors in the place of responses the breaker says exactly how long it
/// is open, and that the request was not sent: a POST, too, comes again.
#[test]
fn with_errors_in_the_place_of_responses() {
    type Inner = circuit_breaker::Error<timeout::Error<legacy::Error>>;
    run(async |bed| {
        let upstream = bed.upstream([]).await;
        let causes = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&causes);
        let retry = RetryLayer::builder()
            .settings(attempts(5))
            .boxed_errors()
            .on_retry(move |_, wait, cause| told.lock().unwrap().push((wait, cause)))
            .build()
            .unwrap();
        let reset = 60 * MS;
        let breaker = CircuitBreakerLayer::builder()
            .settings(Settings::critical().reset_timeout(reset))
            .errors()
            .build()
            .unwrap();
        let limit = TimeoutLayer::builder()
            .limit(Duration::from_secs(5))
            .errors()
            .build()
            .unwrap();
        let service = ServiceBuilder::new()
            .retry_requests(retry)
            .map_err(|error: Inner| BoxError::from(error))
            .circuit_breaker(breaker.clone())
            .limit_time(limit)
            .map_request(|request: Request<ReplayBody<Full<_>>>| request)
            .service(http1());
        let began = Instant::now();
        breaker.breaker().trip(None).unwrap();
        let request = Request::post(upstream.url())
            .body(Full::new(payload(1_000)))
            .unwrap();
        let response = service.oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert!(began.elapsed() >= reset);
        assert_eq!(upstream.requests(), 1);
        let causes = causes.lock().unwrap();
        assert_eq!(causes.len(), 1, "{causes:?}");
        assert!(causes[0].0 <= reset + 10 * MS, "{causes:?}");
        assert_eq!(causes[0].1, Cause::Refused(RefusalKind::CircuitOpen));
    });
}
