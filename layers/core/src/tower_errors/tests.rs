use std::time::Duration;

use http_body_util::{BodyExt, Full};
use tower::{
    ServiceBuilder, ServiceExt, buffer::BufferLayer, limit::ConcurrencyLimitLayer,
    load_shed::LoadShedLayer, service_fn, timeout::TimeoutLayer,
};
use tower_test::mock;

use super::*;

type Answer = Response<Full<Bytes>>;

fn request(content_type: &'static str) -> Request<()> {
    Request::builder()
        .uri("/orders")
        .header("content-type", content_type)
        .body(())
        .unwrap()
}

/// A service that fails with what `error` makes.
fn failing<E: Into<BoxError>>(
    error: impl Fn() -> E + Clone,
) -> impl Service<Request<()>, Response = Answer, Error = E> + Clone {
    service_fn(move |_| std::future::ready(Err(error())))
}

#[derive(Debug)]
struct Wrapped(BoxError);

impl fmt::Display for Wrapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("wrapped")
    }
}

impl Error for Wrapped {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.0)
    }
}

async fn problem(response: Response<ResponseBody<Full<Bytes>>>) -> serde_json::Value {
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    serde_json::from_slice(&bytes).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_timeout_is_504_or_grpc_4() {
    let service = ServiceBuilder::new()
        .layer(RefuseErrorsLayer::new())
        .layer(TimeoutLayer::new(Duration::from_secs(1)))
        .service_fn(|_: Request<()>| std::future::pending::<Result<Answer, Infallible>>());

    let response = service.clone().oneshot(request("text/plain")).await;
    let response = response.unwrap();
    assert_eq!(response.status(), 504);
    assert_eq!(problem(response).await["reason"], "timed_out");

    let response = service.oneshot(request("application/grpc")).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["grpc-status"], "4");
    assert!(response.into_body().is_end_stream());
}

#[tokio::test]
async fn shed_load_is_503() {
    let service = ServiceBuilder::new()
        .layer(RefuseErrorsLayer::new().catch_all())
        .layer(LoadShedLayer::new())
        .layer(ConcurrencyLimitLayer::new(1))
        .service_fn(|_: Request<()>| std::future::pending::<Result<Answer, Infallible>>());

    let mut busy = service.clone();
    let held = busy.ready().await.unwrap().call(request("text/plain"));
    let response = service.clone().oneshot(request("text/plain")).await;
    let response = response.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(problem(response).await["reason"], "overloaded");
    drop(held);
}

#[tokio::test]
async fn a_refusal_is_found_through_sources_and_buffers() {
    let refuse = || {
        let refusal =
            Refusal::new(RefusalKind::CircuitOpen).with_retry_after(Duration::from_secs(7));
        Wrapped(Wrapped(refusal.into()).into())
    };
    let response = RefuseErrorsLayer::new()
        .layer(failing(refuse))
        .oneshot(request("text/plain"))
        .await
        .unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "7");

    // What killed a buffer's worker is told to every later caller.
    let (inner, mut handle) = mock::pair::<Request<()>, Answer>();
    handle.send_error(Wrapped(Box::new(tower::timeout::error::Elapsed::new())));
    let buffered = ServiceBuilder::new()
        .layer(RefuseErrorsLayer::new().catch_all())
        .layer(BufferLayer::new(4))
        .service(inner);
    for _ in 0..2 {
        let answer = buffered.clone().oneshot(request("text/plain")).await;
        assert_eq!(answer.unwrap().status(), 504);
    }
}

#[tokio::test]
async fn other_errors_pass_through() {
    let broken = || std::io::Error::other("secret");
    let error = RefuseErrorsLayer::new()
        .layer(failing(broken))
        .oneshot(request("text/plain"))
        .await
        .unwrap_err();
    assert_eq!(
        error.downcast_ref::<std::io::Error>().unwrap().to_string(),
        "secret"
    );
}

#[tokio::test]
async fn caught_errors_keep_their_text_to_themselves() {
    let service = RefuseErrorsLayer::new()
        .catch_all()
        .layer(failing(|| std::io::Error::other("secret")));
    let response = service.clone().oneshot(request("text/plain")).await;
    let response = response.unwrap();
    assert_eq!(response.status(), 500);
    let problem = problem(response).await;
    assert_eq!(problem["reason"], "internal");
    assert!(!problem.to_string().contains("secret"));

    let response = service.oneshot(request("application/grpc")).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "13");
    assert_eq!(
        response.headers()["grpc-message"],
        "something went wrong here"
    );
}

#[tokio::test]
async fn answers_pass_untouched() {
    let service = service_fn(|request: Request<()>| async move {
        assert_eq!(request.uri(), "/orders");
        Response::builder()
            .status(503)
            .header("x-inner", "1")
            .body(Full::new(Bytes::from_static(b"inner")))
    });
    let response = RefuseErrorsLayer::new()
        .catch_all()
        .layer(service)
        .oneshot(request("text/plain"))
        .await
        .unwrap();
    assert_eq!(
        (
            response.status().as_u16(),
            &response.headers()["x-inner"] == "1"
        ),
        (503, true)
    );
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "inner");
}

#[tokio::test]
async fn a_closure_sees_the_head_of_a_request_that_is_gone() {
    let shout = |refusal: &Refusal, request: Head<'_>| {
        let text = format!("{} {}", refusal.reason(), request.uri.path());
        Response::new(Bytes::from(text))
    };
    let response = RefuseErrorsLayer::new()
        .responder(shout)
        .layer(failing(tower::load_shed::error::Overloaded::new))
        .oneshot(request("text/plain"))
        .await
        .unwrap();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "overloaded /orders");
}

#[tokio::test]
async fn who_wants_to_be_told_finds_the_refusal() {
    let asking = || {
        let mut request = request("text/plain");
        crate::refusal::Tell::attach(request.extensions_mut());
        request
    };
    let shed = || failing(tower::load_shed::error::Overloaded::new);
    let (layer, overloaded) = (RefuseErrorsLayer::new(), RefusalKind::Overloaded.into());
    let response = layer.layer(shed()).oneshot(request("text/plain")).await;
    assert_eq!(Refusal::of(response.unwrap().extensions()), None);
    let response = layer.layer(shed()).oneshot(asking()).await.unwrap();
    assert_eq!(Refusal::of(response.extensions()), Some(&overloaded));

    // And of a service that could not get ready.
    let (inner, mut handle) = mock::pair::<Request<()>, Answer>();
    handle.send_error("down");
    let response = layer.catch_all().layer(inner).oneshot(asking()).await;
    let internal = RefusalKind::Internal.into();
    assert_eq!(Refusal::of(response.unwrap().extensions()), Some(&internal));
}

#[tokio::test]
async fn an_error_of_readiness_passes_on_or_is_answered_from_call() {
    let (inner, mut handle) = mock::pair::<Request<()>, Answer>();
    handle.send_error("down");
    let mut service = RefuseErrorsLayer::new().layer(inner);
    let error = service.ready().await.unwrap_err();
    assert_eq!(error.to_string(), "down");

    // The mock, too, panics on a call that was not promised; so the answers
    // show that the failed service was left alone.
    let (inner, mut handle) = mock::pair::<Request<()>, Answer>();
    handle.send_error("down");
    let mut service = RefuseErrorsLayer::new().catch_all().layer(inner);
    for _ in 0..2 {
        let service = service.ready().await.unwrap();
        let response = service.call(request("text/plain")).await.unwrap();
        assert_eq!(response.status(), 500);
    }
}

#[tokio::test]
async fn a_clone_of_a_failed_service_starts_anew() {
    /// Fails to get ready in the first instance only.
    struct Once(bool);
    impl Clone for Once {
        fn clone(&self) -> Self {
            Self(false)
        }
    }
    impl Service<Request<()>> for Once {
        type Response = Answer;
        type Error = &'static str;
        type Future = std::future::Ready<Result<Answer, &'static str>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
            Poll::Ready(if self.0 { Err("down") } else { Ok(()) })
        }
        fn call(&mut self, _: Request<()>) -> Self::Future {
            assert!(!self.0, "called after it failed");
            std::future::ready(Ok(Answer::default()))
        }
    }
    let mut service = RefuseErrorsLayer::new().catch_all().layer(Once(true));
    let failed = service.ready().await.unwrap();
    assert_eq!(failed.call(Request::new(())).await.unwrap().status(), 500);
    let answer = service.clone().oneshot(Request::new(())).await.unwrap();
    assert_eq!(answer.status(), 200);
}

#[tokio::test]
async fn the_instance_that_was_ready_is_called_and_a_dropped_future_frees_it() {
    let inner = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(1))
        .service_fn(|_: Request<()>| std::future::pending::<Result<Answer, Infallible>>());
    let mut service = RefuseErrorsLayer::new().catch_all().layer(inner);
    let mut other = service.clone();

    let held = service.ready().await.unwrap().call(Request::new(()));
    let mut waiting = tokio_test::task::spawn(other.ready());
    tokio_test::assert_pending!(waiting.poll());
    drop(held);
    assert!(waiting.is_woken());
    tokio_test::assert_ready_ok!(waiting.poll());
}

#[tokio::test]
async fn requests_go_in_whole() {
    let (inner, mut handle) = mock::pair::<Request<&'static str>, Answer>();
    let mut service = RefuseErrorsLayer::new().layer(inner);
    let answer = service.ready().await.unwrap().call(Request::new("body"));
    let (request, respond) = handle.next_request().await.unwrap();
    assert_eq!(request.into_body(), "body");
    respond.send_response(Answer::default());
    assert_eq!(answer.await.unwrap().status(), 200);
}

#[test]
fn a_chain_that_bites_its_tail_ends() {
    #[derive(Debug)]
    struct Ring;
    impl fmt::Display for Ring {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("ring")
        }
    }
    impl Error for Ring {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&Self)
        }
    }
    assert_eq!(refusal_of(&Ring), None);
}

#[cfg(feature = "axum")]
#[tokio::test(start_paused = true)]
async fn axum_needs_no_handle_error_layer() {
    use axum::{Router, body::Body, routing::get};

    let stack = ServiceBuilder::new()
        .layer(RefuseErrorsLayer::new().catch_all())
        .layer(LoadShedLayer::new())
        .layer(TimeoutLayer::new(Duration::from_secs(1)));
    let app = Router::<()>::new()
        .route("/", get(std::future::pending::<()>))
        .layer(stack);
    let response = app.oneshot(Request::new(Body::empty())).await.unwrap();
    assert_eq!(response.status(), 504);
}
