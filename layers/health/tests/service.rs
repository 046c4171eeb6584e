//! What the endpoints answer, in status, fields and documents.

use std::{convert::Infallible, time::Duration};

use buttress_core::testing::{settle, web};
use buttress_core::{Head, Refusal, testing::advance};
use buttress_health::{
    Check, Details, Endpoint, Gate, HealthRegistry, HealthService, Indicator, Latch, Source,
};
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use tower::ServiceExt;

async fn answer<B>(service: &HealthService, request: Request<B>) -> Response<Bytes> {
    let response = service.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Response::from_parts(parts, body)
}

async fn text(service: &HealthService, path: &str) -> String {
    let response = answer(service, web::get(path)).await;
    String::from_utf8(response.into_body().to_vec()).unwrap()
}

fn of(method: Method, path: &str) -> Request<()> {
    Request::builder()
        .method(method)
        .uri(path)
        .body(())
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn documents_are_json_that_nobody_keeps() {
    let health = HealthRegistry::builder().build().unwrap();
    let service = health.service();
    for path in [
        "/health/live",
        "/health/ready",
        "/health/startup",
        "/health",
    ] {
        let response = answer(&service, web::get(path)).await;
        assert_eq!(response.status(), 200);
        let headers = response.headers();
        assert_eq!(headers["content-type"], "application/json");
        assert_eq!(headers["cache-control"], "no-store");
        assert_eq!(headers["content-length"], response.body().len().to_string());
    }
    assert_eq!(
        text(&service, "/health/ready").await,
        r#"{"ready":true,"score":1.0}"#
    );
    health
        .add_gate("drain", Gate::closed("shutting_down"))
        .unwrap();
    let response = answer(&service, web::get("/health/ready?from=a-prober")).await;
    assert_eq!(response.status(), 503);
    let document = r#"{"ready":false,"reason":"shutting_down","score":1.0}"#;
    assert_eq!(response.body(), document);
    assert_eq!(response.headers()["cache-control"], "no-store");
}

#[tokio::test(start_paused = true)]
async fn head_is_get_without_the_body() {
    let health = HealthRegistry::builder().build().unwrap();
    let service = health.service();
    for closed in [false, true] {
        for path in [
            "/health/live",
            "/health/ready",
            "/health/startup",
            "/health",
            "/none",
        ] {
            let get = answer(&service, of(Method::GET, path)).await;
            let head = answer(&service, of(Method::HEAD, path)).await;
            assert_eq!(head.status(), get.status());
            assert_eq!(head.headers(), get.headers());
            assert!(head.body().is_empty() && !get.body().is_empty());
        }
        if !closed {
            health
                .add_gate("drain", Gate::closed("shutting_down"))
                .unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn other_methods_and_paths_are_told_so() {
    let service = HealthRegistry::builder().build().unwrap().service();
    for method in [
        Method::POST,
        Method::PUT,
        Method::DELETE,
        Method::OPTIONS,
        Method::TRACE,
    ] {
        let response = answer(&service, of(method, "/health/ready")).await;
        assert_eq!(response.status(), 405);
        assert_eq!(response.headers()["allow"], "GET, HEAD");
        assert_eq!(response.headers()["cache-control"], "no-store");
        assert_eq!(
            response.headers()["content-type"],
            "application/problem+json"
        );
        let problem: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(
            (&problem["status"], &problem["reason"]),
            (&405.into(), &"method_not_allowed".into())
        );
    }
    for path in [
        "/healthy",
        "/health/",
        "/health/live/",
        "/health/none",
        "/Health/live",
        "//health",
    ] {
        let response = answer(&service, of(Method::GET, path)).await;
        let expected = if path == "/health/" { 200 } else { 404 };
        assert_eq!(response.status(), expected, "{path}");
    }
    // An unknown path has no methods.
    assert_eq!(
        answer(&service, of(Method::POST, "/none")).await.status(),
        404
    );
    // gRPC is told in its own way.
    let response = answer(&service, web::grpc("/shop.Orders/Get")).await;
    assert_eq!(
        (
            response.status().as_u16(),
            &response.headers()["grpc-status"]
        ),
        (200, &"12".parse().unwrap())
    );
}

#[tokio::test(start_paused = true)]
async fn any_body_will_do_and_none_is_read() {
    let service = HealthRegistry::builder().build().unwrap().service();
    struct Whatever;
    let request = Request::get("/health/live").body(Whatever).unwrap();
    assert_eq!(answer(&service, request).await.status(), 200);
}

#[tokio::test(start_paused = true)]
async fn the_prefix_may_be_gone_and_paths_may_be_others() {
    let health = HealthRegistry::builder().build().unwrap();
    let service = health.service();
    for path in ["/live", "/ready", "/startup", "/"] {
        assert_eq!(
            answer(&service, of(Method::GET, path)).await.status(),
            200,
            "{path}"
        );
    }
    let service = HealthService::builder(&health)
        .path(Endpoint::Live, "/livez")
        .path(Endpoint::Ready, "/readyz")
        .path(Endpoint::Ready, "/health/ready")
        .path(Endpoint::Summary, "/live")
        .build()
        .unwrap();
    assert_eq!(text(&service, "/livez").await, r#"{"live":true}"#);
    for path in ["/readyz", "/health/ready"] {
        assert_eq!(text(&service, path).await, r#"{"ready":true,"score":1.0}"#);
    }
    assert!(text(&service, "/live").await.contains("started"));
    // The usual ones of these are gone, the others' are not.
    for (path, status) in [
        ("/health/live", 404),
        ("/ready", 404),
        ("/health", 404),
        ("/startup", 200),
    ] {
        assert_eq!(
            answer(&service, of(Method::GET, path)).await.status(),
            status,
            "{path}"
        );
    }
    let built = |path: &str| {
        HealthService::builder(&health)
            .path(Endpoint::Live, path)
            .build()
    };
    for path in ["", "livez", "/live?z", "/live#z", "/live z", "/l\u{ef}ve"] {
        assert!(built(path).is_err(), "{path}");
    }
    let twice = HealthService::builder(&health)
        .path(Endpoint::Live, "/z")
        .path(Endpoint::Ready, "/z");
    assert!(twice.build().unwrap_err().to_string().contains("twice"));
}

#[tokio::test(start_paused = true)]
async fn details_are_for_who_asked_for_them() {
    let (queue, breaker) = (Indicator::new("queue"), Indicator::new("orders"));
    let (routes, cache) = (Latch::new("routes"), Latch::new("cache"));
    let secret = "password hunter2 was refused";
    let health = HealthRegistry::builder()
        .source(Source::new(queue.clone()).weight(3.0))
        .source(Source::new(breaker.clone()).critical(true))
        .latch(&routes)
        .latch(&cache)
        .gate("drain", Gate::closed("shutting_down"))
        .gate("maintenance", Gate::open())
        .check(Check::required("db", move || async move {
            Err::<(), _>(secret)
        }))
        .check(
            Check::optional("dns", async || Ok::<_, Infallible>(()))
                .interval(Duration::from_secs(3600)),
        )
        .check(Check::optional("slow", async || {
            std::future::pending::<Result<(), Infallible>>().await
        }))
        .build()
        .unwrap();
    routes.release();
    queue.set(0.5);
    breaker.disable();
    let _running = health.start().unwrap();
    settle().await;
    advance(Duration::from_millis(1500)).await;

    let service = |details| {
        HealthService::builder(&health)
            .details(details)
            .build()
            .unwrap()
    };
    let hidden = r#"{"ready":false,"reason":"shutting_down","score":0.5,"started":false}"#;
    assert_eq!(text(&service(Details::Hidden), "/health").await, hidden);
    assert_eq!(text(&health.service(), "/health").await, hidden);
    let startup = r#"{"started":false,"reason":"starting"}"#;
    assert_eq!(text(&health.service(), "/health/startup").await, startup);

    let shown = text(&service(Details::Shown), "/health").await;
    let expected = concat!(
        r#"{"ready":false,"reason":"shutting_down","score":0.5,"started":false,"#,
        r#""sources":[{"name":"queue","score":0.5,"weight":3.0,"critical":false},"#,
        r#"{"name":"orders","score":null,"weight":1.0,"critical":true}],"#,
        r#""checks":[{"name":"db","required":true,"state":"failing","failure":"error","age_ms":1500,"took_ms":0},"#,
        r#"{"name":"dns","required":false,"state":"passing","age_ms":1500,"took_ms":0},"#,
        r#"{"name":"slow","required":false,"state":"unknown","age_ms":null,"took_ms":null}],"#,
        r#""gates":[{"name":"drain","open":false,"reason":"shutting_down"},{"name":"maintenance","open":true}],"#,
        r#""latches":[{"name":"routes","released":true},{"name":"cache","released":false}]}"#,
    );
    assert_eq!(shown, expected);
    let startup = r#"{"started":false,"reason":"starting","waiting":["cache"]}"#;
    assert_eq!(
        text(&service(Details::Shown), "/health/startup").await,
        startup
    );

    for details in [Details::Hidden, Details::Shown] {
        for path in [
            "/health",
            "/health/ready",
            "/health/startup",
            "/health/live",
        ] {
            assert!(!text(&service(details), path).await.contains("hunter2"));
        }
    }
    let errors = text(&service(Details::WithErrors), "/health").await;
    assert!(
        errors.contains(r#""took_ms":0,"error":"password hunter2 was refused"}"#),
        "{errors}"
    );
    assert!(
        !text(&service(Details::WithErrors), "/health/ready")
            .await
            .contains("hunter2")
    );
}

#[tokio::test(start_paused = true)]
async fn a_long_error_is_cut() {
    let health = HealthRegistry::builder()
        .check(Check::required("db", async || {
            Err::<(), _>("\u{e9}".repeat(100_000))
        }))
        .build()
        .unwrap();
    let _running = health.start().unwrap();
    settle().await;
    assert_eq!(
        health.report().checks[0].error.as_deref(),
        Some(&*"\u{e9}".repeat(512))
    );
}

#[tokio::test(start_paused = true)]
async fn refusals_can_be_made_otherwise() {
    let health = HealthRegistry::builder().build().unwrap();
    let service = HealthService::builder(&health)
        .responder(|refusal: &Refusal, _: Head<'_>| {
            let mut response = Response::new(Bytes::from_static(b"no"));
            *response.status_mut() = refusal.status();
            response
        })
        .build()
        .unwrap();
    let response = answer(&service, web::get("/none")).await;
    assert_eq!(
        (response.status().as_u16(), &**response.body()),
        (404, &b"no"[..])
    );
    assert_eq!(
        answer(&service, web::post("/live", "")).await.headers()["allow"],
        "GET, HEAD"
    );
    assert_eq!(
        answer(&service, web::get("/live")).await.body(),
        r#"{"live":true}"#
    );
}
