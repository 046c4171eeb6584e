//! The rate limiter on axum, over real sockets: no `HandleErrorLayer`, and one
//! state however axum layers it.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, State, connect_info::MockConnectInfo},
    handler::Handler,
    http::{Request, Response, StatusCode},
    response::IntoResponse,
    routing::{get, post},
};
use buttress::{
    body::ResponseBody,
    key::{self, ClientIp, Key},
    rate_limit::{Limit, Quota, RateLimitInfo, RateLimitLayer},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Notify, oneshot},
    task::JoinSet,
    time::timeout,
};
use tower::{ServiceBuilder, ServiceExt};

const LONG: Duration = Duration::from_secs(10);

/// So slow that nothing comes back during a test.
fn hourly(burst: u32) -> RateLimitLayer {
    let quota = Quota::per_hour(1).burst(burst);
    RateLimitLayer::builder()
        .limit(Limit::new(quota))
        .build()
        .unwrap()
}

fn left(layer: &RateLimitLayer) -> u32 {
    layer
        .handle()
        .usage("default", &Key::global())
        .unwrap()
        .remaining
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
            let serve = axum::serve(listener, router);
            tokio::select! {
                result = serve => result.unwrap(),
                _ = stopped => {}
            }
        });
        Self {
            address,
            _stop: stop,
        }
    }

    /// The same, telling each request its peer.
    async fn start_with_peers(router: Router) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        tokio::spawn(async move {
            let service = router.into_make_service_with_connect_info::<SocketAddr>();
            tokio::select! {
                result = axum::serve(listener, service) => result.unwrap(),
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
        self.request(path, "").await
    }

    async fn request(&self, path: &str, headers: &str) -> (u16, String) {
        let exchange = async {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            let head =
                format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let answer = timeout(LONG, exchange).await.expect("an answer in time");
        let status = answer.get(9..12).and_then(|status| status.parse().ok());
        (
            status.unwrap_or_else(|| panic!("no status in {answer:?}")),
            answer,
        )
    }

    /// How many of these paths are answered 200; the rest must be 429.
    async fn admitted(&self, paths: impl IntoIterator<Item = &str>) -> usize {
        let mut admitted = 0;
        for path in paths {
            match self.get(path).await.0 {
                200 => admitted += 1,
                status => assert_eq!(status, 429, "{path}"),
            }
        }
        admitted
    }
}

/// Compiles only where the layered router is infallible still.
#[tokio::test]
async fn the_error_type_stays_infallible() {
    let layer = hourly(2);
    let router: Router = Router::new()
        .route("/", get(|| async { "hello" }))
        .layer(layer);
    let statuses = async || {
        let response = router.clone().oneshot(Request::new(Body::empty())).await;
        let Ok::<_, Infallible>(response) = response;
        response.status().as_u16()
    };
    assert_eq!(
        [statuses().await, statuses().await, statuses().await],
        [200, 200, 429]
    );
}

/// New connections, many at once: exactly the burst, and one state.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn connections_share_one_state() {
    let layer = hourly(20);
    let calls = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&calls);
    let router = Router::new()
        .route(
            "/",
            get(move || async move { count.fetch_add(1, Ordering::Relaxed).to_string() }),
        )
        .layer(layer.clone());
    let server = Arc::new(Server::start(router).await);
    let mut tasks = JoinSet::new();
    for _ in 0..60 {
        let server = Arc::clone(&server);
        tasks.spawn(async move { server.get("/").await.0 });
    }
    let statuses = tasks.join_all().await;
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 20);
    assert_eq!(statuses.iter().filter(|status| **status == 429).count(), 40);
    // What was refused never reached the handler.
    assert_eq!(calls.load(Ordering::Relaxed), 20);
    assert_eq!(left(&layer), 0);
}

/// One layer in every place where axum takes one: they all count together.
#[tokio::test]
async fn every_way_of_layering_shares_one_state() {
    let layer = hourly(10);
    async fn hello() -> &'static str {
        "hello"
    }
    async fn state(State(word): State<&'static str>) -> &'static str {
        word
    }
    let nested = Router::new()
        .route("/leaf", get(hello))
        .layer(layer.clone());
    let router = Router::new()
        .route("/method", get(hello).layer(layer.clone()))
        .route("/handler", get(hello.layer(layer.clone())))
        .route("/both", get(hello).post(hello).layer(layer.clone()))
        .nest("/nest", nested)
        .route_service(
            "/service",
            ServiceBuilder::new()
                .layer(layer.clone())
                .service(get(hello)),
        )
        .merge(
            Router::new()
                .route("/state", get(state))
                .route(
                    "/routed/{id}",
                    get(|Path(id): Path<u32>| async move { id.to_string() }),
                )
                .route_layer(layer.clone())
                .with_state("state"),
        )
        .fallback(get(hello).layer(layer.clone()))
        .route("/free", get(hello));
    let server = Server::start(router).await;
    let all = [
        "/method",
        "/handler",
        "/both",
        "/nest/leaf",
        "/service",
        "/state",
        "/routed/7",
        "/nowhere",
    ];
    assert_eq!(server.admitted(all).await, 8);
    assert_eq!(left(&layer), 2);
    assert_eq!(server.admitted(all).await, 2);
    assert_eq!(server.admitted(["/free"]).await, 1);
    let (_, free) = server.get("/free").await;
    assert!(!free.to_ascii_lowercase().contains("ratelimit"), "{free}");
}

/// `Router::layer` covers routes, fallbacks and wrong methods; a charge each,
/// once, though it stands on every route.
#[tokio::test]
async fn a_layered_router_charges_each_request_once() {
    let layer = hourly(100);
    let inner = Router::new().route("/x", get(|| async {}));
    let router = Router::new()
        .route("/a", get(|| async {}))
        .route("/b", post(|| async {}))
        .nest("/n", inner)
        .fallback(|| async { StatusCode::NOT_FOUND })
        .layer(layer.clone());
    let server = Server::start(router).await;
    for (n, (path, expected)) in (1..).zip([
        ("/a", 200),
        ("/b", 405),
        ("/n/x", 200),
        ("/n/y", 404),
        ("/c", 404),
    ]) {
        let (status, answer) = server.get(path).await;
        assert_eq!(status, expected, "{path}");
        // On whatever status.
        let remaining = format!("x-ratelimit-remaining: {}\r\n", 100 - n);
        assert!(
            answer.to_ascii_lowercase().contains(&remaining),
            "{path}: {answer}"
        );
        assert_eq!(left(&layer), 100 - n, "{path}");
    }
}

/// `route_layer` leaves what has no route alone.
#[tokio::test]
async fn a_route_layer_does_not_charge_what_has_no_route() {
    let layer = hourly(1);
    let router = Router::new()
        .route("/a", get(|| async {}))
        .route_layer(layer.clone());
    let server = Server::start(router).await;
    assert_eq!(server.get("/nowhere").await.0, 404);
    assert_eq!(left(&layer), 1);
    assert_eq!(server.get("/a").await.0, 200);
    assert_eq!(server.get("/a").await.0, 429);
    assert_eq!(server.get("/nowhere").await.0, 404);
}

/// The refusal is a problem document, whatever the handlers answer with.
#[tokio::test]
async fn a_refusal_is_a_problem_document() {
    let router = Router::new()
        .route("/", get(|| async { "hello" }))
        .layer(hourly(1));
    let server = Server::start(router).await;
    assert!(server.get("/").await.1.ends_with("hello"));
    let (status, answer) = server.get("/").await;
    assert_eq!(status, 429);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let head = head.to_ascii_lowercase();
    assert!(
        head.contains("content-type: application/problem+json"),
        "{head}"
    );
    assert!(head.contains("retry-after: 3600"), "{head}");
    assert!(
        head.contains(&format!("content-length: {}", body.len())),
        "{head}"
    );
    let problem: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(problem["status"], 429);
    assert_eq!(
        problem["type"],
        "https://iana.org/assignments/http-problem-types#quota-exceeded"
    );
}

#[tokio::test]
async fn clients_are_told_apart_by_their_address() {
    let layer = RateLimitLayer::builder()
        .limit(
            Limit::new(Quota::per_hour(1).burst(2))
                .key(ClientIp::new().trust(["127.0.0.1"]).unwrap()),
        )
        .build()
        .unwrap();
    let handle = layer.handle();
    let router = Router::new()
        .route("/", get(|| async {}))
        .layer(layer.clone());
    let server = Server::start_with_peers(router.clone()).await;
    let from = async |client: &str| {
        server
            .request("/", &format!("x-forwarded-for: {client}\r\n"))
            .await
            .0
    };
    // The test is the proxy that is trusted.
    let first = [
        from("192.0.2.1").await,
        from("6.6.6.6, 192.0.2.1").await,
        from("192.0.2.1").await,
    ];
    assert_eq!(first, [200, 200, 429]);
    assert_eq!(from("192.0.2.2").await, 200);
    assert_eq!(from("2001:db8::1").await, 200);
    assert_eq!(from("2001:db8::ffff").await, 200);
    assert_eq!(from("2001:db8::2").await, 429);
    assert_eq!(handle.keys("default").unwrap(), 3);
    let peer = ClientIp::new().key(Ipv4Addr::LOCALHOST.into());
    assert_eq!(handle.usage("default", &peer).unwrap().remaining, 2);
    assert_eq!(server.get("/").await.0, 200);
    assert_eq!(handle.usage("default", &peer).unwrap().remaining, 1);

    // In a test without a connection.
    let mock = router.layer(MockConnectInfo(SocketAddr::from(([127, 0, 0, 1], 1))));
    let response = mock.oneshot(Request::new(Body::empty())).await.unwrap();
    assert_eq!(response.headers()["x-ratelimit-remaining"], "0");
}

#[tokio::test]
async fn handlers_read_how_the_client_stands() {
    let layer = RateLimitLayer::builder()
        .limit(
            Limit::new(Quota::per_hour(7))
                .name("seven")
                .key(key::header("x-key")),
        )
        .info(true)
        .build()
        .unwrap();
    async fn tell(Extension(info): Extension<RateLimitInfo>) -> impl IntoResponse {
        format!("{} of {} by {}", info.remaining, info.limit, info.name)
    }
    let server = Server::start(Router::new().route("/", get(tell)).layer(layer)).await;
    for left in [6, 5, 4] {
        let (_, answer) = server.request("/", "x-key: a\r\n").await;
        assert!(
            answer.ends_with(&format!("\r\n\r\n{left} of 7 by seven")),
            "{answer}"
        );
    }
    let (_, answer) = server.request("/", "x-key: b\r\n").await;
    assert!(answer.ends_with("6 of 7 by seven"), "{answer}");
}

/// A handler that panics ends its connection and keeps its charge.
#[tokio::test]
async fn a_panic_of_a_handler_is_charged_and_breaks_nothing() {
    let layer = hourly(5);
    async fn panics() {
        panic!("as it should");
    }
    let router = Router::new()
        .route("/", get(|| async {}))
        .route("/panic", get(panics))
        .layer(layer.clone());
    let server = Server::start(router).await;
    for left_then in [4, 2] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream
            .write_all(b"GET /panic HTTP/1.1\r\nhost: test\r\n\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        let _ = timeout(LONG, stream.read_to_end(&mut answer))
            .await
            .expect("closed in time");
        assert!(answer.is_empty());
        assert_eq!(left(&layer), left_then);
        assert_eq!(server.get("/").await.0, 200);
    }
    assert_eq!(left(&layer), 1);
}

/// A client that goes away in the middle of its request stays charged, its
/// handler is dropped, and the next is served.
#[tokio::test]
async fn a_client_that_goes_away_stays_charged() {
    struct Gone(Arc<Notify>);
    impl Drop for Gone {
        fn drop(&mut self) {
            self.0.notify_one();
        }
    }
    let layer = hourly(2);
    let (started, gone) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let hang = {
        let (started, gone) = (Arc::clone(&started), Arc::clone(&gone));
        move || async move {
            let _gone = Gone(gone);
            started.notify_one();
            std::future::pending::<()>().await;
        }
    };
    let router = Router::new()
        .route("/", get(|| async {}))
        .route("/hang", get(hang))
        .layer(layer.clone());
    let server = Server::start(router).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream
        .write_all(b"GET /hang HTTP/1.1\r\nhost: test\r\n\r\n")
        .await
        .unwrap();
    timeout(LONG, started.notified())
        .await
        .expect("the handler starts");
    drop(stream);
    timeout(LONG, gone.notified())
        .await
        .expect("the handler is dropped");
    assert_eq!(left(&layer), 1);
    assert_eq!(server.get("/").await.0, 200);
    assert_eq!(server.get("/").await.0, 429);
}

/// Wherever it stands in a `ServiceBuilder`, among layers that change the
/// body's type and ask for readiness.
#[tokio::test]
async fn in_a_service_builder_with_tower_layers() {
    let layer = hourly(3);
    let stack = ServiceBuilder::new()
        .layer(layer.clone())
        .concurrency_limit(1)
        .map_response(|response: Response<ResponseBody<Body>>| response.map(Body::new))
        .layer(layer.clone());
    let server = Server::start(Router::new().route("/", get(|| async {})).layer(stack)).await;
    // Each is charged twice; the second one's second charge is the fourth of
    // three.
    assert_eq!(server.get("/").await.0, 200);
    assert_eq!(left(&layer), 1);
    assert_eq!(server.get("/").await.0, 429);
    assert_eq!(left(&layer), 0);
    assert_eq!(server.get("/").await.0, 429);
    layer.handle().reset_all("default").unwrap();
    assert_eq!(server.get("/").await.0, 200);
}
