//! What is logged.

use std::{convert::Infallible, future::pending, time::Duration};

use buttress_core::{
    deadline::Deadline,
    testing::{
        Log,
        web::{self, ScriptedBody},
    },
};
use buttress_timeout::TimeoutLayer;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tower::{Layer, ServiceExt, service_fn};

#[tokio::test(start_paused = true)]
async fn what_is_logged_is_plain() {
    let log = Log::new().target("buttress");
    let _here = log.here();

    let layer = TimeoutLayer::builder()
        .name("api")
        .limit(Duration::from_millis(1500))
        .to_the_end()
        .build()
        .unwrap();
    let service = layer.layer(service_fn(async |request: Request<Full<Bytes>>| {
        let body = match request.uri().path() {
            "/hangs" => pending().await,
            "/stalls" => ScriptedBody::new().hang(),
            _ => ScriptedBody::new(),
        };
        Ok::<_, Infallible>(Response::new(body))
    }));
    let mut late = web::get("/");
    Deadline::after(Duration::ZERO).attach(late.extensions_mut());
    for request in [
        web::get("/"),
        web::get("/hangs"),
        web::get("/stalls?secret"),
        late,
    ] {
        let response = service.clone().oneshot(request).await.unwrap();
        let _ = response.into_body().collect().await;
    }
    assert_eq!(
        log.take(),
        [
            "DEBUG timed out name=api stage=response after_ms=1500",
            "DEBUG timed out name=api stage=body after_ms=1500",
            "DEBUG timed out name=api stage=call after_ms=0",
        ]
    );
}
