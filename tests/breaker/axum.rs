//! On axum: no `HandleErrorLayer`, and one state however axum layers it.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::State,
    handler::Handler,
    http::{Request, Response, StatusCode},
    routing::get,
};
use buttress::{
    body::{GuardedBody, ResponseBody},
    circuit_breaker::{self, CircuitBreakerLayer, Guard, Settings},
};
use bytes::Bytes;
use http_body_util::StreamBody;
use hyper::body::Frame;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinSet,
    time::timeout,
};
use tower::{ServiceBuilder, ServiceExt};

const LONG: Duration = Duration::from_secs(10);

fn after(failures: u32) -> CircuitBreakerLayer {
    CircuitBreakerLayer::builder()
        .settings(Settings::moderate().consecutive_failures(failures))
        .build()
        .unwrap()
}

/// A server until it is dropped.
struct Server {
    address: SocketAddr,
    _stop: oneshot::Sender<Infallible>,
}

impl Server {
    async fn start(router: Router) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        tokio::spawn(async move {
            tokio::select! {
                result = axum::serve(listener, router) => result.unwrap(),
                _ = stopped => {}
            }
        });
        Self {
            address,
            _stop: stop,
        }
    }

    /// A request on a connection of its own: status and the whole answer.
    async fn get(&self, path: &str) -> (u16, String) {
        let answer = self.answer(path).await;
        let status = answer.get(9..12).and_then(|status| status.parse().ok());
        (
            status.unwrap_or_else(|| panic!("no status in {answer:?}")),
            answer,
        )
    }

    /// What came, which is nothing where a body breaks before its head is out.
    async fn answer(&self, path: &str) -> String {
        let exchange = async {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            let head = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            // A broken body may end in a reset.
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8(answer).unwrap()
        };
        timeout(LONG, exchange).await.expect("an answer in time")
    }

    async fn status(&self, path: &str) -> u16 {
        self.get(path).await.0
    }
}

async fn fails() -> StatusCode {
    StatusCode::INTERNAL_SERVER_ERROR
}

/// Compiles only where the layered router is infallible still.
#[tokio::test]
async fn the_error_type_stays_infallible() {
    let router: Router = Router::new().route("/", get(fails)).layer(after(2));
    let send = async || {
        let response = router.clone().oneshot(Request::new(Body::empty())).await;
        let Ok::<_, Infallible>(response) = response;
        response.status().as_u16()
    };
    assert_eq!([send().await, send().await, send().await], [500, 500, 503]);
}

/// Failures on many connections at once are counted by one state, and what is
/// refused never reaches the handler.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn connections_share_one_state() {
    let layer = after(10);
    let (calls, healthy) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let (count, is_healthy) = (Arc::clone(&calls), Arc::clone(&healthy));
    let handler = move || async move {
        count.fetch_add(1, Ordering::Relaxed);
        if is_healthy.load(Ordering::Relaxed) {
            StatusCode::OK
        } else {
            StatusCode::BAD_GATEWAY
        }
    };
    let router = Router::new().route("/", get(handler)).layer(layer.clone());
    let server = Arc::new(Server::start(router).await);
    for _ in 0..10 {
        assert_eq!(server.status("/").await, 502);
    }
    let mut tasks = JoinSet::new();
    for _ in 0..40 {
        let server = Arc::clone(&server);
        tasks.spawn(async move { server.status("/").await });
    }
    assert_eq!(tasks.join_all().await, [503; 40]);
    assert_eq!(calls.load(Ordering::Relaxed), 10);

    healthy.store(true, Ordering::Relaxed);
    layer.breaker().half_open().unwrap();
    assert_eq!(server.status("/").await, 200);
    assert_eq!(layer.breaker().state(), circuit_breaker::State::Closed);
    assert_eq!(server.status("/").await, 200);
}

/// One layer in every place where axum takes one: they all count together.
#[tokio::test]
async fn every_way_of_layering_shares_one_state() {
    let layer = after(7);
    async fn state(State(status): State<StatusCode>) -> StatusCode {
        status
    }
    let nested = Router::new()
        .route("/leaf", get(fails))
        .layer(layer.clone());
    let router = Router::new()
        .route("/method", get(fails).layer(layer.clone()))
        .route("/handler", get(fails.layer(layer.clone())))
        .nest("/nest", nested)
        .route_service(
            "/service",
            ServiceBuilder::new()
                .layer(layer.clone())
                .service(get(fails)),
        )
        .merge(
            Router::new()
                .route("/state", get(state))
                .route_layer(layer.clone())
                .with_state(StatusCode::SERVICE_UNAVAILABLE),
        )
        .fallback(get(fails).layer(layer.clone()))
        .route("/free", get(fails));
    let server = Server::start(router).await;
    let all = [
        "/method",
        "/handler",
        "/nest/leaf",
        "/service",
        "/state",
        "/nowhere",
    ];
    for (failures, path) in (1..).zip(all) {
        assert!([500, 503].contains(&server.status(path).await), "{path}");
        assert_eq!(layer.breaker().status().failures, failures, "{path}");
    }
    assert_eq!(server.status("/method").await, 500);
    for path in all {
        let (status, answer) = server.get(path).await;
        assert_eq!(status, 503, "{path}");
        assert!(answer.contains("circuit_open"), "{path}: {answer}");
    }
    assert_eq!(server.status("/free").await, 500);
}

/// A breaker for each route: one that fails does not take the others with it.
#[tokio::test]
async fn a_breaker_for_each_route() {
    let (bad, good) = (after(1), after(1));
    let router = Router::new()
        .route("/bad", get(fails).layer(bad.clone()))
        .route("/good", get(|| async {}).layer(good.clone()));
    let server = Server::start(router).await;
    let answers = [
        server.status("/bad").await,
        server.status("/bad").await,
        server.status("/good").await,
    ];
    assert_eq!(answers, [500, 503, 200]);
    assert_eq!(good.breaker().state(), circuit_breaker::State::Closed);
}

#[tokio::test]
async fn a_refusal_is_a_problem_document() {
    let layer = after(1);
    let router = Router::new().route("/", get(fails)).layer(layer);
    let server = Server::start(router).await;
    server.get("/").await;
    let (status, answer) = server.get("/").await;
    assert_eq!(status, 503);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let head = head.to_ascii_lowercase();
    assert!(
        head.contains("content-type: application/problem+json"),
        "{head}"
    );
    assert!(head.contains("retry-after: 30\r\n"), "{head}");
    assert!(
        head.contains(&format!("content-length: {}", body.len())),
        "{head}"
    );
    let problem: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(
        (&problem["status"], &problem["reason"]),
        (&503.into(), &"circuit_open".into())
    );
}

/// A handler's stream that breaks off after a good head is a failure, and one
/// that is sent whole is a success.
#[tokio::test]
async fn streams_are_judged_by_their_end() {
    fn streamed(breaks: bool) -> Response<Body> {
        let end = breaks.then(|| Err("broken off"));
        let frames = [Ok(Bytes::from_static(b"first"))].into_iter().chain(end);
        let frames = frames.map(|data| data.map(Frame::data));
        let stream = tonic::codegen::tokio_stream::iter(frames);
        Response::new(Body::new(StreamBody::new(stream)))
    }
    let layer = after(2);
    let router = Router::new()
        .route("/whole", get(|| async { streamed(false) }))
        .route("/broken", get(|| async { streamed(true) }))
        .layer(layer.clone());
    let server = Server::start(router).await;
    let failures = || layer.breaker().status().failures;
    server.answer("/broken").await;
    assert_eq!(failures(), 1);
    assert_eq!((server.status("/whole").await, failures()), (200, 0));
    server.answer("/broken").await;
    server.answer("/broken").await;
    assert_eq!(server.status("/whole").await, 503);
}

/// Among layers that change the body's type and ask for readiness.
#[tokio::test]
async fn in_a_service_builder_with_tower_layers() {
    let layer = after(1);
    type Guarded = ResponseBody<GuardedBody<Body, Guard<buttress::classify::HttpClassifier>>>;
    let stack = ServiceBuilder::new()
        .concurrency_limit(1)
        .map_response(|response: Response<Guarded>| response.map(Body::new))
        .layer(layer.clone());
    let server = Server::start(Router::new().route("/", get(fails)).layer(stack)).await;
    assert_eq!(
        [server.status("/").await, server.status("/").await],
        [500, 503]
    );
    layer.breaker().reset();
    assert_eq!(server.status("/").await, 500);
}

/// A handler that panics ends its connection, and has failed.
#[tokio::test]
async fn a_panic_of_a_handler_is_a_failure() {
    async fn panics() {
        panic!("as it should");
    }
    let layer = after(2);
    let router = Router::new().route("/", get(panics)).layer(layer.clone());
    let server = Server::start(router).await;
    for _ in 0..2 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let head = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n";
        stream.write_all(head).await.unwrap();
        let mut answer = Vec::new();
        let _ = timeout(LONG, stream.read_to_end(&mut answer))
            .await
            .expect("closed in time");
        assert!(answer.is_empty());
    }
    assert_eq!(server.status("/").await, 503);
}
