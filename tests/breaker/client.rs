//! In front of hyper-util's client, with tower's timeout inside: an upstream
//! that dies, hangs, breaks off and recovers, and counts for itself who came.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress::{
    BoxError,
    circuit_breaker::{
        CircuitBreaker, CircuitBreakerLayer, Error, Errors, Reason, Settings, State,
    },
    classify::HttpClassifier,
};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    task::JoinSet,
    time::timeout,
};
use tower::{Layer, ServiceExt, timeout::Timeout};

const LONG: Duration = Duration::from_secs(10);
/// What an attempt may take.
const ATTEMPT: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Well,
    /// Answers 500.
    Fails,
    /// Closes without a word.
    Dies,
    /// Says nothing.
    Hangs,
    /// Promises ten bytes and sends five.
    BreaksOff,
    /// Sends a good head and half of its body, and then nothing.
    Stalls,
    /// Is well when it is told.
    Holds,
}

/// Answers as it is in the mood to, and counts.
struct Upstream {
    address: SocketAddr,
    mood: Arc<Mutex<Mood>>,
    calls: Arc<AtomicUsize>,
    let_go: watch::Sender<()>,
    _stop: oneshot::Sender<()>,
}

impl Upstream {
    async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (let_go, held) = watch::channel(());
        let (stop, mut stopped) = oneshot::channel::<()>();
        let mood = Arc::new(Mutex::new(Mood::Well));
        let calls = Arc::new(AtomicUsize::new(0));
        let (told, count) = (Arc::clone(&mood), Arc::clone(&calls));
        tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap(),
                    _ = &mut stopped => return,
                };
                let (told, count, held) = (Arc::clone(&told), Arc::clone(&count), held.clone());
                connections.spawn(serve(stream, told, count, held));
            }
        });
        Self {
            address,
            mood,
            calls,
            let_go,
            _stop: stop,
        }
    }

    fn is(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

/// One request, one connection.
async fn serve(
    mut stream: TcpStream,
    mood: Arc<Mutex<Mood>>,
    calls: Arc<AtomicUsize>,
    mut held: watch::Receiver<()>,
) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => request.push(byte),
            Err(_) => return,
        }
    }
    held.mark_unchanged();
    let mood = *mood.lock().unwrap();
    calls.fetch_add(1, Ordering::Relaxed);
    let well = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello";
    let half = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 10\r\n\r\nhello";
    let answer = match mood {
        Mood::Well => well,
        Mood::Fails => {
            "HTTP/1.1 500 Internal Server Error\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        }
        Mood::Dies => return,
        Mood::Hangs => return std::future::pending().await,
        Mood::BreaksOff | Mood::Stalls => half,
        Mood::Holds => {
            let _ = held.changed().await;
            well
        }
    };
    let _ = stream.write_all(answer.as_bytes()).await;
    if mood == Mood::Stalls {
        std::future::pending::<()>().await;
    }
}

type Http = Client<HttpConnector, Empty<Bytes>>;
type Broken = CircuitBreaker<Timeout<Http>, buttress::Http, Errors, HttpClassifier>;

fn layer(settings: Settings) -> CircuitBreakerLayer<buttress::Http, Errors> {
    CircuitBreakerLayer::builder()
        .settings(settings)
        .errors()
        .build()
        .unwrap()
}

fn client(layer: &CircuitBreakerLayer<buttress::Http, Errors>, attempt: Duration) -> Broken {
    let http = Client::builder(TokioExecutor::new()).build_http();
    layer.layer(Timeout::new(http, attempt))
}

/// Whole, or why not.
async fn send(client: &Broken, address: SocketAddr) -> Result<u16, Error<BoxError>> {
    let request = Request::get(format!("http://{address}/"))
        .body(Empty::new())
        .unwrap();
    let exchange = async {
        let response = client.clone().oneshot(request).await?;
        let status = response.status().as_u16();
        // Who reads a body gives up too, some time.
        match timeout(2 * ATTEMPT, response.into_body().collect()).await {
            Ok(Ok(_)) => Ok(status),
            Ok(Err(error)) => Err(Error::Inner(error.into())),
            Err(elapsed) => Err(Error::Inner(elapsed.into())),
        }
    };
    timeout(LONG, exchange).await.expect("in time")
}

/// The server's task may take a moment to notice that it is gone.
async fn until_it_fails(client: &Broken, address: SocketAddr) {
    let failed = async { while send(client, address).await.is_ok() {} };
    timeout(LONG, failed).await.expect("it fails");
}

#[tokio::test]
async fn every_illness_opens_it_and_health_closes_it() {
    for illness in [Mood::Fails, Mood::Dies, Mood::Hangs, Mood::BreaksOff] {
        let upstream = Upstream::start().await;
        let layer = layer(Settings::aggressive());
        let client = client(&layer, ATTEMPT);
        assert_eq!(send(&client, upstream.address).await.unwrap(), 200);

        upstream.is(illness);
        for _ in 0..3 {
            assert_eq!(layer.breaker().state(), State::Closed, "{illness:?}");
            match send(&client, upstream.address).await {
                Ok(status) => assert_eq!((status, illness), (500, Mood::Fails)),
                Err(error) => assert!(error.open().is_none(), "{error:?}"),
            }
        }
        assert_eq!(layer.breaker().state(), State::Open, "{illness:?}");
        for _ in 0..20 {
            let error = send(&client, upstream.address).await.unwrap_err();
            assert_eq!(error.open().unwrap().reason(), Reason::Open);
        }
        // The upstream was left alone.
        assert_eq!(upstream.calls(), 4, "{illness:?}");

        // One probe, which finds it ill still.
        layer.breaker().half_open().unwrap();
        let _ = send(&client, upstream.address).await;
        assert_eq!(layer.breaker().state(), State::Open, "{illness:?}");
        assert!(
            send(&client, upstream.address)
                .await
                .unwrap_err()
                .open()
                .is_some()
        );
        assert_eq!(upstream.calls(), 5, "{illness:?}");

        upstream.is(Mood::Well);
        layer.breaker().half_open().unwrap();
        assert_eq!(send(&client, upstream.address).await.unwrap(), 200);
        assert_eq!(layer.breaker().state(), State::Closed, "{illness:?}");
        assert_eq!(upstream.calls(), 6);
    }
}

/// Nobody listens any more; and then again, on the same port.
#[tokio::test]
async fn an_upstream_that_is_gone_and_comes_back() {
    let upstream = Upstream::start().await;
    let address = upstream.address;
    let layer = layer(Settings::aggressive());
    let client = client(&layer, LONG);
    assert_eq!(send(&client, address).await.unwrap(), 200);
    drop(upstream);
    for _ in 0..3 {
        until_it_fails(&client, address).await;
    }
    let error = send(&client, address).await.unwrap_err();
    assert_eq!(error.open().unwrap().reason(), Reason::Open);

    let listener = TcpListener::bind(address).await.unwrap();
    let (_keep, held) = watch::channel(());
    let calls = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&calls);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mood = Arc::new(Mutex::new(Mood::Well));
            tokio::spawn(serve(stream, mood, Arc::clone(&count), held.clone()));
        }
    });
    assert!(send(&client, address).await.unwrap_err().open().is_some());
    assert_eq!(calls.load(Ordering::Relaxed), 0);
    layer.breaker().half_open().unwrap();
    assert_eq!(send(&client, address).await.unwrap(), 200);
    assert_eq!(send(&client, address).await.unwrap(), 200);
}

/// Fifty callers at once, when a probe is due: the upstream sees one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_probe_of_fifty_callers() {
    let upstream = Upstream::start().await;
    let layer = layer(Settings::aggressive());
    let client = client(&layer, LONG);
    upstream.is(Mood::Holds);
    layer.breaker().trip(Duration::from_nanos(1)).unwrap();
    let mut callers = JoinSet::new();
    for _ in 0..50 {
        let (client, address) = (client.clone(), upstream.address);
        callers.spawn(async move { send(&client, address).await });
    }
    for _ in 0..49 {
        let refused = callers.join_next().await.unwrap().unwrap().unwrap_err();
        assert_eq!(refused.open().unwrap().reason(), Reason::HalfOpen);
    }
    assert_eq!(layer.breaker().status().probes_in_flight, 1);
    let arrived = async {
        while upstream.calls() == 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, arrived).await.expect("the probe arrives");
    upstream.let_go.send(()).unwrap();
    assert_eq!(callers.join_next().await.unwrap().unwrap().unwrap(), 200);
    assert_eq!(upstream.calls(), 1);
    assert_eq!(layer.breaker().state(), State::Closed);
}

/// A body that stalls: who gives it up decides nothing, and the place of a
/// probe is free again.
#[tokio::test]
async fn a_body_given_up_decides_nothing() {
    let upstream = Upstream::start().await;
    let layer = layer(Settings::aggressive().consecutive_failures(1));
    let client = client(&layer, LONG);
    upstream.is(Mood::Stalls);
    assert!(send(&client, upstream.address).await.is_err());
    assert_eq!(layer.breaker().state(), State::Closed);
    layer.breaker().trip(None).unwrap();
    layer.breaker().half_open().unwrap();
    assert!(send(&client, upstream.address).await.is_err());
    let status = layer.breaker().status();
    assert_eq!(
        (status.state, status.probes_in_flight),
        (State::HalfOpen, 0)
    );
    upstream.is(Mood::Well);
    assert_eq!(send(&client, upstream.address).await.unwrap(), 200);
    assert_eq!(layer.breaker().state(), State::Closed);
}

/// On the clock of the world: who waits as told finds a probe's place.
#[tokio::test]
async fn waiting_as_told_is_rewarded() {
    let upstream = Upstream::start().await;
    let wait = Duration::from_millis(50);
    let layer = layer(Settings::critical().reset_timeout(wait));
    let client = client(&layer, LONG);
    for _ in 0..3 {
        upstream.is(Mood::Fails);
        until_it_fails(&client, upstream.address).await;
        upstream.is(Mood::Well);
        let mut told = Duration::ZERO;
        if let Err(error) = send(&client, upstream.address).await {
            told = error.open().unwrap().retry_after().unwrap();
        }
        assert!(told <= wait);
        tokio::time::sleep(told).await;
        assert_eq!(send(&client, upstream.address).await.unwrap(), 200);
    }
}
