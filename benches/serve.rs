//! What is measured of the server: ours beside `axum::serve`, the same router
//! on both, over the loopback interface.

use std::{
    io::Write as _,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{Router, body::Body, routing::get, serve::ListenerExt};
use buttress_drain::{DrainLayer, Server, Shutdown};
use bytes::Bytes;
use http::Request;
use http_body::Body as _;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    time::sleep,
};
use tower::Layer;

use crate::{measure::Run, scenarios::Named};

/// Those that serve, by name.
pub const SERVERS: [&str; 4] = [AXUM, NODELAY, OURS, COUNTED];

/// `axum::serve` as it is.
pub const AXUM: &str = "axum";
/// The same with `TCP_NODELAY` set, as ours has it.
pub const NODELAY: &str = "axum, nodelay";
/// Our server.
pub const OURS: &str = "ours";
/// Our server with the layer that counts requests.
pub const COUNTED: &str = "ours, counted";

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One request after the other on a connection over HTTP/1.1.
    Http1,
    /// The same over HTTP/2, on streams of one connection.
    Http2,
    /// A connection for each request, over HTTP/1.1.
    Once,
}

/// With its state, as `axum::serve` gives it one: without it a router would
/// make its routes anew for each request.
fn router() -> Router {
    Router::new()
        .route("/", get(|| async { "hello" }))
        .with_state(())
}

/// Serves by the one of that name, for ever.
///
/// # Panics
///
/// If there is none.
pub async fn serve(name: &str, listener: TcpListener) {
    let shutdown = Shutdown::builder().build().expect("sound settings");
    let server = Server::new(&shutdown);
    match name {
        AXUM => axum::serve(listener, router()).await.expect("it serves"),
        NODELAY => {
            let listener = listener.tap_io(|io| io.set_nodelay(true).expect("a socket"));
            axum::serve(listener, router()).await.expect("it serves");
        }
        OURS => server.serve(listener, router()).await,
        COUNTED => {
            let counted = DrainLayer::new(&shutdown).layer(router());
            server.serve(listener, counted).await;
        }
        _ => panic!("there is no server {name}"),
    }
}

/// A client over HTTP/1.1 that allocates nothing.
#[derive(Debug)]
pub struct Plain {
    io: TcpStream,
    request: &'static [u8],
    /// Of each answer, by the first.
    length: usize,
}

impl Plain {
    /// Connects, and asks once.
    pub async fn connect(addr: SocketAddr, way: Way) -> Self {
        let io = TcpStream::connect(addr).await.expect("it listens");
        io.set_nodelay(true).expect("a socket");
        let request: &[u8] = match way {
            Way::Once => b"GET / HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n",
            _ => b"GET / HTTP/1.1\r\nhost: bench\r\n\r\n",
        };
        let mut new = Self {
            io,
            request,
            length: 0,
        };
        new.io.write_all(request).await.expect("it reads");
        let mut answer = [0; 1024];
        while !answer[..new.length].ends_with(b"hello") {
            let read = new.io.read(&mut answer[new.length..]).await;
            let read = read.expect("it answers");
            assert!(read > 0, "closed without an answer");
            new.length += read;
        }
        assert!(answer.starts_with(b"HTTP/1.1 200 "));
        new
    }

    /// Asks once more.
    pub async fn ask(&mut self) {
        self.io.write_all(self.request).await.expect("it reads");
        let mut answer = [0; 1024];
        let answer = &mut answer[..self.length];
        self.io.read_exact(answer).await.expect("it answers");
        assert!(answer.ends_with(b"hello"));
    }

    /// Until the server closes.
    pub async fn closed(mut self) {
        let read = self.io.read(&mut [0]).await;
        assert_eq!(read.expect("it is not reset"), 0);
    }
}

/// A client over HTTP/2.
#[derive(Clone, Debug)]
pub struct Streams(SendRequest<Body>);

impl Streams {
    /// Connects.
    pub async fn connect(addr: SocketAddr) -> Self {
        let io = TcpStream::connect(addr).await.expect("it listens");
        io.set_nodelay(true).expect("a socket");
        let shaken = handshake(TokioExecutor::new(), TokioIo::new(io)).await;
        let (send, connection) = shaken.expect("it speaks HTTP/2");
        tokio::spawn(connection);
        Self(send)
    }

    /// Asks once.
    pub async fn ask(&mut self) {
        self.0.ready().await.expect("it is there");
        let request = Request::get("http://bench/").body(Body::empty());
        let answer = self.0.send_request(request.expect("a request")).await;
        let answer = answer.expect("it answers");
        assert_eq!(answer.status(), 200);
        let mut body = std::pin::pin!(answer.into_body());
        let mut last = Bytes::new();
        while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            last = frame
                .expect("a frame")
                .into_data()
                .unwrap_or_else(|_| last.clone());
        }
        assert_eq!(last, "hello");
    }
}

/// How much load there is when it comes from in here.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Connections, and over HTTP/2 the streams of each.
    pub connections: usize,
    /// Streams.
    pub streams: usize,
    /// For how long.
    pub lasting: Duration,
}

/// Where neither wrk nor h2load is installed: how many requests were answered.
#[must_use]
pub fn load(addr: SocketAddr, way: Way, load: Load) -> u64 {
    let runtime = one_thread();
    let (over, done) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    runtime.block_on(async {
        let mut tasks = Vec::new();
        for _ in 0..load.connections {
            let streams = match way {
                Way::Http2 => Some(Streams::connect(addr).await),
                Way::Http1 | Way::Once => None,
            };
            for _ in 0..streams.as_ref().map_or(1, |_| load.streams) {
                let (over, done, streams) = (Arc::clone(&over), Arc::clone(&done), streams.clone());
                tasks.push(tokio::spawn(async move {
                    match streams {
                        Some(mut streams) => {
                            while !over.load(Relaxed) {
                                streams.ask().await;
                                done.fetch_add(1, Relaxed);
                            }
                        }
                        None if way == Way::Once => {
                            while !over.load(Relaxed) {
                                Plain::connect(addr, way).await.closed().await;
                                done.fetch_add(1, Relaxed);
                            }
                        }
                        None => {
                            let mut client = Plain::connect(addr, way).await;
                            while !over.load(Relaxed) {
                                client.ask().await;
                                done.fetch_add(1, Relaxed);
                            }
                        }
                    }
                }));
            }
        }
        sleep(load.lasting).await;
        over.store(true, Relaxed);
        let done = done.load(Relaxed);
        for task in tasks {
            task.await.expect("a client does not panic");
        }
        done
    })
}

fn one_thread() -> Runtime {
    let built = Builder::new_current_thread().enable_all().build();
    built.expect("a runtime")
}

/// A server and one client on one thread, a request at a time.
fn calls(name: &'static str, way: Way) -> Run {
    let runtime = one_thread();
    let addr = runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("bound");
        tokio::spawn(serve(name, listener));
        addr
    });
    match way {
        Way::Http1 => {
            let mut client = runtime.block_on(Plain::connect(addr, way));
            Box::new(move |calls| {
                runtime.block_on(async {
                    for _ in 0..calls {
                        client.ask().await;
                    }
                });
            })
        }
        Way::Http2 => {
            let mut client = runtime.block_on(Streams::connect(addr));
            Box::new(move |calls| {
                runtime.block_on(async {
                    for _ in 0..calls {
                        client.ask().await;
                    }
                });
            })
        }
        Way::Once => Box::new(move |calls| {
            runtime.block_on(async {
                for _ in 0..calls {
                    Plain::connect(addr, way).await.closed().await;
                }
            });
        }),
    }
}

/// All that can be counted.
pub const ALL: &[Named] = &[
    ("h1, axum", || calls(AXUM, Way::Http1)),
    ("h1, axum, nodelay", || calls(NODELAY, Way::Http1)),
    ("h1, ours", || calls(OURS, Way::Http1)),
    ("h1, ours, counted", || calls(COUNTED, Way::Http1)),
    ("h2, axum", || calls(AXUM, Way::Http2)),
    ("h2, axum, nodelay", || calls(NODELAY, Way::Http2)),
    ("h2, ours", || calls(OURS, Way::Http2)),
    ("h2, ours, counted", || calls(COUNTED, Way::Http2)),
    ("once, axum", || calls(AXUM, Way::Once)),
    ("once, axum, nodelay", || calls(NODELAY, Way::Once)),
    ("once, ours", || calls(OURS, Way::Once)),
    ("once, ours, counted", || calls(COUNTED, Way::Once)),
];

/// The run of that name.
#[must_use]
pub fn named(name: &str) -> Option<Run> {
    let (_, make) = ALL.iter().find(|(known, _)| *known == name)?;
    Some(make())
}

/// Serves on a thread of its own and one processor, says where, and tells at
/// each line what processor time it has had, until there are no more lines.
///
/// # Panics
///
/// If nobody listens to it.
pub fn process(name: &str) {
    crate::measure::pin_to(0);
    let built = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    let runtime = built.expect("a runtime");
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"));
    let listener = listener.expect("a port");
    let mut out = std::io::stdout();
    writeln!(out, "{}", listener.local_addr().expect("bound")).expect("somebody reads");
    let name = name.to_owned();
    runtime.spawn(async move { serve(&name, listener).await });
    for _ in std::io::stdin().lines() {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let nanos = time.tv_sec * 1_000_000_000 + time.tv_nsec;
        writeln!(out, "{nanos}").expect("somebody reads");
    }
}
