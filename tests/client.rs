//! The rate limiter in front of hyper-util's client: refusals as errors, and
//! waiting in line.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress::{
    BoxError, Head, Refusal, RefusalKind,
    clock::{self, Instant},
    deadline::Deadline,
    key::{self, ExtractKey},
    rate_limit::{Limit, Quota, RateLimitLayer, WaitLayer},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{Empty, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinSet, time::timeout};
use tokio_test::assert_ready;
use tower::{Layer, Service, ServiceExt};

const MS: Duration = Duration::from_millis(1);
const LONG: Duration = Duration::from_secs(10);

type Http = Client<HttpConnector, Empty<Bytes>>;

fn http() -> Http {
    Client::builder(TokioExecutor::new()).build_http()
}

/// Answers everything, and remembers what came and when.
struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<(String, Instant)>>>,
    _stop: oneshot::Sender<()>,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (stop, mut stopped) = oneshot::channel::<()>();
        let record = Arc::clone(&seen);
        tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap(),
                    _ = &mut stopped => return,
                };
                let record = Arc::clone(&record);
                let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                    let path = request.uri().path().to_owned();
                    record.lock().unwrap().push((path, clock::now()));
                    std::future::ready(Ok::<_, Infallible>(Response::new(Full::<Bytes>::default())))
                });
                connections.spawn(async move {
                    let server = hyper::server::conn::http1::Builder::new();
                    let _ = server.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self {
            address,
            seen,
            _stop: stop,
        }
    }

    fn request(&self, path: &str) -> Request<Empty<Bytes>> {
        Request::get(format!("http://{}{path}", self.address))
            .body(Empty::new())
            .unwrap()
    }

    fn paths(&self) -> Vec<String> {
        self.seen
            .lock()
            .unwrap()
            .iter()
            .map(|(path, _)| path.clone())
            .collect()
    }
}

async fn send<S>(client: &S, request: Request<Empty<Bytes>>) -> Result<u16, BoxError>
where
    S: Service<Request<Empty<Bytes>>, Response = Response<Incoming>, Error = BoxError> + Clone,
{
    let response = timeout(LONG, client.clone().oneshot(request))
        .await
        .expect("in time")?;
    Ok(response.status().as_u16())
}

#[track_caller]
fn refusal<T: std::fmt::Debug>(result: Result<T, BoxError>) -> Refusal {
    let error = result.unwrap_err();
    error
        .downcast_ref::<Refusal>()
        .unwrap_or_else(|| panic!("no refusal: {error}"))
        .clone()
}

fn waiting(quota: Quota, longest: Duration) -> WaitLayer {
    RateLimitLayer::builder()
        .limit(Limit::new(quota).key(key::host()))
        .errors()
        .build_waiting(longest, 100)
        .unwrap()
}

#[tokio::test]
async fn refusals_are_errors_and_errors_stay_errors() {
    let server = Server::start().await;
    let layer = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_hour(1).burst(3)))
        .errors()
        .build()
        .unwrap();
    let client = layer.layer(http());
    for _ in 0..2 {
        assert_eq!(send(&client, server.request("/")).await.unwrap(), 200);
    }
    // What cannot be reached is the client's own error, and charged.
    let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let closed = nobody.local_addr().unwrap();
    drop(nobody);
    let request = Request::get(format!("http://{closed}/"))
        .body(Empty::new())
        .unwrap();
    let error = send(&client, request).await.unwrap_err();
    assert!(error.downcast_ref::<legacy::Error>().unwrap().is_connect());

    let refusal = refusal(send(&client, server.request("/")).await);
    assert_eq!(refusal.kind(), RefusalKind::RateLimited);
    let wait = refusal.retry_after().unwrap();
    assert!(
        wait > Duration::from_secs(3590) && wait <= Duration::from_secs(3600),
        "{wait:?}"
    );
    assert_eq!(server.paths().len(), 2);
}

/// The server sees them in the order in which they were sent, no faster than
/// the quota allows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_keeps_order_and_pace() {
    let server = Server::start().await;
    let layer = waiting(Quota::new(1, 40 * MS), LONG);
    let client = layer.layer(http());
    let start = clock::now();
    let mut tasks = JoinSet::new();
    for n in 0..6 {
        // Polled once before the next is sent: in line.
        let mut call =
            tokio_test::task::spawn(client.clone().oneshot(server.request(&format!("/{n}"))));
        assert!(call.poll().is_pending());
        tasks.spawn(async move { call.await.unwrap().status().as_u16() });
    }
    let statuses = timeout(LONG, tasks.join_all()).await.unwrap();
    assert_eq!(statuses, [200; 6]);
    assert_eq!(layer.waiting(), 0);
    assert_eq!(server.paths(), ["/0", "/1", "/2", "/3", "/4", "/5"]);
    for (n, (_, at)) in (0..).zip(&*server.seen.lock().unwrap()) {
        assert!(*at - start >= 40 * MS * n, "{n} after {:?}", *at - start);
    }
}

#[tokio::test]
async fn deadlines_are_kept_and_hopeless_ones_known_at_once() {
    let server = Server::start().await;
    let client = waiting(Quota::new(1, 500 * MS), LONG).layer(http());
    send(&client, server.request("/first")).await.unwrap();
    let within = |path, span| {
        let mut request = server.request(path);
        Deadline::after(span).attach(request.extensions_mut());
        send(&client, request)
    };
    // Refused at the first poll: it does not even begin to wait.
    let mut hopeless = tokio_test::task::spawn(within("/hopeless", MS));
    let refused = refusal(assert_ready!(hopeless.poll()));
    assert_eq!(refused.kind(), RefusalKind::RateLimited);
    assert!(refused.retry_after().unwrap() <= 500 * MS);
    assert_eq!(within("/in-time", LONG).await.unwrap(), 200);
    assert_eq!(server.paths(), ["/first", "/in-time"]);
}

/// A caller that gives up leaves the line, and nothing of it reaches the
/// server.
#[tokio::test]
async fn who_gives_up_is_never_sent() {
    let server = Server::start().await;
    let layer = waiting(Quota::new(1, 300 * MS), LONG);
    let client = layer.layer(http());
    send(&client, server.request("/first")).await.unwrap();
    let gives_up = timeout(20 * MS, client.clone().oneshot(server.request("/gone")));
    let (gave_up, stayed) = tokio::join!(gives_up, send(&client, server.request("/stayed")));
    assert!(gave_up.is_err());
    assert_eq!(stayed.unwrap(), 200);
    assert_eq!(server.paths(), ["/first", "/stayed"]);
    assert_eq!(layer.waiting(), 0);
    // Nor was the quota charged for it: one interval is owed, not two.
    let host = key::host()
        .extract(Head::from(&server.request("/")))
        .unwrap();
    let usage = layer.handle().usage("default", &host).unwrap();
    assert!(usage.reset_after <= 300 * MS, "{usage:?}");
}
