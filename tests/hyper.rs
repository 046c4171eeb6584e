//! The rate limiter on a bare hyper server, read as bytes from a socket.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use buttress::{
    clock::{SystemClock, WallClock},
    key::{ClientIp, PeerAddr},
    rate_limit::{HeaderFormat, Limit, Quota, RateLimitLayer},
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body, Frame, Incoming};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinSet,
    time::{sleep, timeout},
};
use tower::{ServiceBuilder, service_fn};

const LONG: Duration = Duration::from_secs(10);

/// An answer in two frames and a trailer: what passes must pass whole.
struct Answered(VecDeque<Frame<Bytes>>);

impl Body for Answered {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(Ok))
    }
}

async fn answer(_: Request<Incoming>) -> Result<Response<Answered>, Infallible> {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "11".parse().unwrap());
    Ok(Response::new(Answered(VecDeque::from([
        Frame::data(Bytes::from_static(b"hello ")),
        Frame::data(Bytes::from_static(b"world")),
        Frame::trailers(trailers),
    ]))))
}

/// Serves until it is dropped.
struct Server {
    address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Server {
    async fn start(layer: RateLimitLayer) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, mut stopped) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, peer) = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap(),
                    _ = &mut stopped => return,
                };
                // A service of its own for each connection, as servers do.
                let service = ServiceBuilder::new()
                    .map_request(move |mut request: Request<Incoming>| {
                        request.extensions_mut().insert(PeerAddr(peer));
                        request
                    })
                    .layer(layer.clone())
                    .service(service_fn(answer));
                connections.spawn(async move {
                    let server = auto::Builder::new(TokioExecutor::new());
                    let service = TowerToHyperService::new(service);
                    // Clients of this test leave without a word.
                    let _ = server.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self {
            address,
            _stop: stop,
        }
    }

    async fn connect(&self) -> Client {
        let stream = TcpStream::connect(self.address).await.unwrap();
        Client { stream }
    }

    async fn get(&self) -> Answer {
        self.connect()
            .await
            .exchange(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
            .await
    }
}

/// One HTTP/1.1 connection.
struct Client {
    stream: TcpStream,
}

/// A head as it came, line by line.
#[derive(Debug)]
struct Answer {
    lines: Vec<String>,
}

impl Answer {
    fn status_line(&self) -> &str {
        &self.lines[0]
    }

    /// The value of a field that must be there once, and be so written.
    #[track_caller]
    fn field(&self, name: &str) -> Option<&str> {
        let mut found = None;
        for line in &self.lines[1..] {
            let (field, value) = line.split_once(": ").expect("name: value");
            if field == name {
                assert!(found.replace(value).is_none(), "{name} twice in {self:?}");
            }
        }
        found
    }

    #[track_caller]
    fn number(&self, name: &str) -> u64 {
        let value = self
            .field(name)
            .unwrap_or_else(|| panic!("no {name} in {self:?}"));
        assert!(value.bytes().all(|byte| byte.is_ascii_digit()), "{value:?}");
        value.parse().unwrap()
    }
}

impl Client {
    /// Sends, and reads one whole answer: head, and body by its framing.
    async fn exchange(&mut self, request: &[u8]) -> Answer {
        self.stream.write_all(request).await.unwrap();
        timeout(LONG, self.read(true))
            .await
            .expect("an answer in time")
    }

    async fn read(&mut self, body: bool) -> Answer {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.stream.read_u8().await.expect("a whole head"));
        }
        let head = String::from_utf8(head).unwrap();
        let answer = Answer {
            lines: head.trim_end().split("\r\n").map(str::to_owned).collect(),
        };
        if !body {
            return answer;
        }
        if answer.field("transfer-encoding") == Some("chunked") {
            let mut body = Vec::new();
            while !body.ends_with(b"0\r\n\r\n") {
                body.push(self.stream.read_u8().await.unwrap());
            }
            assert_eq!(body, b"6\r\nhello \r\n5\r\nworld\r\n0\r\n\r\n");
        } else {
            let length = answer.number("content-length");
            let mut body = vec![0; usize::try_from(length).unwrap()];
            self.stream.read_exact(&mut body).await.unwrap();
            assert!(body.starts_with(b"{") && body.ends_with(b"}"));
        }
        answer
    }
}

fn limit(quota: Quota) -> RateLimitLayer {
    RateLimitLayer::builder()
        .limit(Limit::new(quota))
        .build()
        .unwrap()
}

fn unix_now() -> Duration {
    SystemClock.unix_now()
}

#[tokio::test]
async fn the_numbers_are_right() {
    // One comes back every 200 s.
    let server = Server::start(limit(Quota::new(18, Duration::from_secs(3600)).burst(4))).await;
    let mut client = server.connect().await;
    for left in [3, 2, 1, 0] {
        let before = unix_now();
        let answer = client
            .exchange(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
            .await;
        let after = unix_now();
        assert_eq!(answer.status_line(), "HTTP/1.1 200 OK");
        assert_eq!(answer.number("x-ratelimit-limit"), 4);
        assert_eq!(answer.number("x-ratelimit-remaining"), left);
        // Whole when what was spent is back: at 200 s for each after the first
        // was charged, which was at most the test's length ago.
        let reset = answer.number("x-ratelimit-reset");
        let spent = Duration::from_secs(200 * (4 - left));
        assert!(
            reset <= (after + spent).as_secs() + 1,
            "{reset} after {after:?}"
        );
        assert!(
            reset >= (before + spent - LONG).as_secs(),
            "{reset} after {before:?}"
        );
        if left == 3 {
            assert!(reset >= (before + spent).as_secs());
        }
        assert_eq!(answer.field("retry-after"), None);
    }
    let refused = client
        .exchange(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
        .await;
    assert_eq!(refused.status_line(), "HTTP/1.1 429 Too Many Requests");
    assert_eq!(refused.number("x-ratelimit-limit"), 4);
    assert_eq!(refused.number("x-ratelimit-remaining"), 0);
    assert!((190..=200).contains(&refused.number("retry-after")));
    assert_eq!(
        refused.field("content-type"),
        Some("application/problem+json")
    );
    // On the same connection, still open, and on another one.
    let again = client
        .exchange(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
        .await;
    assert_eq!(again.status_line(), refused.status_line());
    assert_eq!(server.get().await.status_line(), refused.status_line());
}

/// On the clock of the world: who waits as told is let in.
#[tokio::test]
async fn waiting_as_told_is_rewarded() {
    let server = Server::start(limit(Quota::per_second(2))).await;
    for _ in 0..2 {
        let mut last = server.get().await;
        while last.status_line() == "HTTP/1.1 200 OK" {
            last = server.get().await;
        }
        let wait = last.number("retry-after");
        assert_eq!(wait, 1);
        sleep(Duration::from_secs(wait)).await;
        assert_eq!(server.get().await.status_line(), "HTTP/1.1 200 OK");
    }
}

/// A refusal is answered though the request's body is still on its way, and a
/// HEAD has no body.
#[tokio::test]
async fn refusals_do_not_wait_for_the_request() {
    let server = Server::start(limit(Quota::per_hour(1))).await;
    server.get().await;

    let mut client = server.connect().await;
    let answer = client
        .exchange(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 1000000\r\n\r\nonly so much")
        .await;
    assert_eq!(answer.status_line(), "HTTP/1.1 429 Too Many Requests");

    // Who waits for leave to send the body is refused it.
    let mut client = server.connect().await;
    let answer = client
        .exchange(b"POST / HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: 1000\r\n\r\n")
        .await;
    assert_eq!(answer.status_line(), "HTTP/1.1 429 Too Many Requests");

    let mut client = server.connect().await;
    client
        .stream
        .write_all(b"HEAD / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let answer = timeout(LONG, client.read(false)).await.unwrap();
    assert_eq!(answer.status_line(), "HTTP/1.1 429 Too Many Requests");
    assert!(answer.number("retry-after") > 3500);
    let mut rest = Vec::new();
    timeout(LONG, client.stream.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert!(rest.is_empty());
}

/// HTTP/2 on the same port: many streams of one connection, trailers and all.
#[tokio::test]
async fn http2() {
    let layer = RateLimitLayer::builder()
        .limit(Limit::new(Quota::per_hour(10)).key(ClientIp::new()))
        .headers([HeaderFormat::XRateLimit, HeaderFormat::Draft11])
        .build()
        .unwrap();
    let server = Server::start(layer.clone()).await;
    let stream = TcpStream::connect(server.address).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    let mut streams = JoinSet::new();
    for _ in 0..30 {
        let mut sender = sender.clone();
        let request = Request::get(format!("http://{}/", server.address))
            .body(Empty::<Bytes>::new())
            .unwrap();
        streams.spawn(async move {
            let response = timeout(LONG, sender.send_request(request))
                .await
                .unwrap()
                .unwrap();
            let (head, body) = response.into_parts();
            let whole = timeout(LONG, body.collect()).await.unwrap().unwrap();
            (head, whole.trailers().cloned(), whole.to_bytes())
        });
    }
    let mut remaining = Vec::new();
    for (head, trailers, body) in streams.join_all().await {
        let left = head.headers["x-ratelimit-remaining"]
            .to_str()
            .unwrap()
            .parse::<u32>()
            .unwrap();
        assert!(
            head.headers["ratelimit"]
                .to_str()
                .unwrap()
                .starts_with(&format!("\"default\";r={left};t="))
        );
        assert_eq!(head.headers["ratelimit-policy"], r#""default";q=10;w=3600"#);
        if head.status == 200 {
            remaining.push(left);
            assert_eq!(body, "hello world");
            assert_eq!(trailers.unwrap()["x-sum"], "11");
        } else {
            assert_eq!((head.status.as_u16(), left), (429, 0));
            assert_eq!(trailers, None);
        }
    }
    remaining.sort_unstable();
    assert_eq!(remaining, Vec::from_iter(0..10));
    let peer = ClientIp::new().key(Ipv4Addr::LOCALHOST.into());
    assert_eq!(layer.handle().usage("default", &peer).unwrap().remaining, 0);
}
