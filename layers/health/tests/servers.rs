//! On real sockets: axum and hyper, HTTP/1.1 and HTTP/2.

use std::{convert::Infallible, net::SocketAddr, sync::mpsc, time::Duration};

use axum::{Router, routing::get};
use buttress_health::{Gate, HealthRegistry};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::{http1, http2};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};

const LONG: Duration = Duration::from_secs(10);

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// One request on a connection of its own.
async fn ask(address: SocketAddr, h2: bool, method: Method, path: &str) -> Response<Bytes> {
    let asking = async {
        let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{address}{path}"))
            .header("host", address.to_string())
            .body(Empty::<Bytes>::new())
            .unwrap();
        let mut tasks = JoinSet::new();
        let response = if h2 {
            let (mut sender, connection) =
                http2::handshake(TokioExecutor::new(), io).await.unwrap();
            tasks.spawn(connection);
            sender.send_request(request).await.unwrap()
        } else {
            let (mut sender, connection) = http1::handshake(io).await.unwrap();
            tasks.spawn(connection);
            sender.send_request(request).await.unwrap()
        };
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Response::from_parts(parts, body)
    };
    timeout(LONG, asking).await.unwrap()
}

/// A server for as long as it is held.
fn serve_axum(listener: TcpListener, app: Router) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
    tasks
}

async fn check_all(address: SocketAddr, drain: &Gate) {
    for h2 in [false, true] {
        drain.reopen();
        for path in [
            "/health/live",
            "/health/ready",
            "/health/startup",
            "/health",
        ] {
            let got = ask(address, h2, Method::GET, path).await;
            assert_eq!(got.status(), 200, "{path}");
            assert_eq!(got.headers()["cache-control"], "no-store");
            assert_eq!(got.headers()["content-type"], "application/json");
            let head = ask(address, h2, Method::HEAD, path).await;
            assert_eq!(head.status(), 200);
            assert!(head.body().is_empty());
            let length = got.body().len().to_string();
            for field in ["content-type", "cache-control", "content-length"] {
                assert_eq!(head.headers().get_all(field).iter().count(), 1);
                assert_eq!(
                    head.headers()[field],
                    got.headers()[field],
                    "{path} {field}"
                );
            }
            assert_eq!(head.headers()["content-length"], *length);
            let posted = ask(address, h2, Method::POST, path).await;
            assert_eq!(posted.status(), 405);
            assert_eq!(posted.headers()["allow"], "GET, HEAD");
        }
        drain.close("shutting_down");
        let ready = ask(address, h2, Method::GET, "/health/ready").await;
        assert_eq!(ready.status(), 503);
        let document = r#"{"ready":false,"reason":"shutting_down","score":1.0}"#;
        assert_eq!(ready.body(), document);
        assert_eq!(
            ask(address, h2, Method::HEAD, "/health/ready")
                .await
                .status(),
            503
        );
        assert_eq!(
            ask(address, h2, Method::GET, "/health/live").await.status(),
            200
        );
    }
}

#[tokio::test]
async fn axum_nests_it_under_a_prefix() {
    let drain = Gate::open();
    let health = HealthRegistry::builder()
        .gate("drain", drain.clone())
        .build()
        .unwrap();
    let app = Router::new()
        .route("/", get(async || "hello"))
        .nest_service("/health", health.service());
    let (listener, address) = listen().await;
    let _server = serve_axum(listener, app);
    check_all(address, &drain).await;
    let none = ask(address, false, Method::GET, "/health/none").await;
    assert_eq!(none.status(), StatusCode::NOT_FOUND);
    assert_eq!(none.headers()["content-type"], "application/problem+json");
    assert_eq!(ask(address, false, Method::GET, "/").await.body(), "hello");
}

#[tokio::test]
async fn axum_routes_it_by_path_and_falls_back_to_it() {
    let drain = Gate::open();
    let health = HealthRegistry::builder()
        .gate("drain", drain.clone())
        .build()
        .unwrap();
    let service = health.service();
    let by_path = Router::new()
        .route_service("/health", service.clone())
        .route_service("/health/{endpoint}", service.clone());
    let fallback = Router::new().fallback_service(service);
    for app in [by_path, fallback] {
        let (listener, address) = listen().await;
        let _server = serve_axum(listener, app);
        check_all(address, &drain).await;
    }
}

#[tokio::test]
async fn hyper_serves_it_as_it_is() {
    let drain = Gate::open();
    let health = HealthRegistry::builder()
        .gate("drain", drain.clone())
        .build()
        .unwrap();
    let (listener, address) = listen().await;
    let mut tasks = JoinSet::new();
    let service = health.service();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = TowerToHyperService::new(service.clone());
            connections.spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                let _ = builder
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    check_all(address, &drain).await;
}

/// What goes over the wire for HEAD, to the byte: nothing after the head, so
/// that the connection can go on.
#[tokio::test]
async fn head_leaves_the_connection_in_order() {
    let health = HealthRegistry::builder().build().unwrap();
    let (listener, address) = listen().await;
    let _server = serve_axum(
        listener,
        Router::new().nest_service("/health", health.service()),
    );
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let requests = "HEAD /health/ready HTTP/1.1\r\nhost: a\r\n\r\nGET /health/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        stream.write_all(requests.as_bytes()).await.unwrap();
        let mut answers = String::new();
        stream.read_to_string(&mut answers).await.unwrap();
        answers
    };
    let answers = timeout(LONG, exchange).await.unwrap();
    let (head, rest) = answers.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("content-length: 26"), "{head}");
    assert!(rest.starts_with("HTTP/1.1 200 OK\r\n"), "{rest}");
    assert!(rest.ends_with("\r\n\r\n{\"live\":true}"), "{rest}");
}

/// The endpoints are served elsewhere, and tell of a runtime whose only worker
/// is blocked.
#[tokio::test]
async fn a_blocked_runtime_is_told_from_another() {
    let limit = Duration::from_millis(300);
    let health = HealthRegistry::builder()
        .stall_limit(limit)
        .build()
        .unwrap();
    let (listener, address) = listen().await;
    let _server = serve_axum(
        listener,
        Router::new().nest_service("/health", health.service()),
    );

    let (block, blocked) = mpsc::channel::<()>();
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let other = health.clone();
    let (up, started) = tokio::sync::oneshot::channel();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            let running = other.start().unwrap();
            tokio::task::yield_now().await;
            up.send(()).unwrap();
            // The worker, until it is let go.
            blocked.recv_timeout(LONG).unwrap();
            timeout(LONG, ended).await.unwrap().unwrap();
            running.stop().await;
        });
    });
    timeout(LONG, started).await.unwrap().unwrap();
    let until = async |status: u16| {
        let polling = async {
            loop {
                let response = ask(address, false, Method::GET, "/health/live").await;
                if response.status() == status {
                    return response;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(LONG, polling).await.unwrap()
    };
    let stalled = until(503).await;
    assert!(
        stalled
            .body()
            .starts_with(b"{\"live\":false,\"reason\":\"stalled\"")
    );
    block.send(()).unwrap();
    until(200).await;
    end.send(()).unwrap();
    let joined = tokio::task::spawn_blocking(|| thread.join());
    timeout(LONG, joined).await.unwrap().unwrap().unwrap();
}

/// What routers ask of a service.
#[test]
fn it_fits_where_services_go() {
    fn fits<S>(_: S)
    where
        S: tower::Service<Request<axum::body::Body>, Error = Infallible>
            + Clone
            + Send
            + Sync
            + 'static,
        S::Response: axum::response::IntoResponse,
        S::Future: Send + 'static,
    {
    }
    fits(HealthRegistry::builder().build().unwrap().service());
}
