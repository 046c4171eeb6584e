//! The same on every server: ours, with TLS and without it, axum's and tonic's
//! with ours under it; over HTTP/1.1 and HTTP/2.

use std::{
    error::Error,
    future::IntoFuture,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use axum::{Router, routing::any_service};
use buttress_core::{BoxError, clock};
use buttress_drain::{AxumListener, DrainLayer, Hook, Phase, Server, Shutdown, TonicIncoming};
use bytes::Bytes;
use http::{Method, Request, Response, Version};
use http_body_util::{BodyExt, Channel};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tokio_rustls::rustls::ClientConfig;
use tonic::service::Routes;
use tower::Layer;

use crate::{
    LimitsBuilder, Rig,
    app::{Body, app, app_of, byte, text},
    client::Client,
    http2::{Frames, between_goaways},
    limits, ms, shutdown, shutdown_of, soon, tls, until,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stack {
    Ours,
    Tls,
    Axum,
    Tonic,
}

const ALL: [(Stack, Version); 7] = [
    (Stack::Ours, Version::HTTP_11),
    (Stack::Ours, Version::HTTP_2),
    (Stack::Tls, Version::HTTP_11),
    (Stack::Tls, Version::HTTP_2),
    (Stack::Axum, Version::HTTP_11),
    (Stack::Axum, Version::HTTP_2),
    (Stack::Tonic, Version::HTTP_2),
];

/// By its method router, or axum would send a body to HEAD.
fn routes() -> Router {
    let app = any_service(app_of());
    Router::new().route("/", app.clone()).route("/{*path}", app)
}

struct Started {
    stack: Stack,
    version: Version,
    rig: Rig,
    tls: Option<ClientConfig>,
}

impl Started {
    async fn new(of: (Stack, Version), shutdown: Shutdown, limits: LimitsBuilder) -> Self {
        let (stack, version) = of;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let limits = limits.build().unwrap();
        let layer = DrainLayer::new(&shutdown).end_streams(["text/event-stream"]);
        let server = Server::new(&shutdown).limits(limits);
        let mut tls = None;
        let rig = match stack {
            Stack::Ours => {
                let served = server.serve(listener, layer.layer(app()));
                Rig::with(shutdown, addr, served)
            }
            Stack::Tls => {
                let both = tls::configs();
                tls = Some(both.client);
                let served = server.tls(both.server).serve(listener, layer.layer(app()));
                Rig::with(shutdown, addr, served)
            }
            Stack::Axum => {
                let router = routes().layer(layer);
                let listener = AxumListener::new(&shutdown, "axum", listener, limits);
                let graceful = listener.graceful();
                let served = axum::serve(listener, router).with_graceful_shutdown(graceful);
                let served = served.into_future();
                Rig::with(shutdown, addr, async move { served.await.unwrap() })
            }
            Stack::Tonic => {
                let router = routes().layer(layer);
                let incoming = TonicIncoming::new(&shutdown, "tonic", listener, limits);
                let graceful = incoming.graceful();
                let served = tonic::transport::Server::builder()
                    .add_routes(Routes::from(router))
                    .serve_with_incoming_shutdown(incoming, graceful);
                Rig::with(shutdown, addr, async move { served.await.unwrap() })
            }
        };
        Self {
            stack,
            version,
            rig,
            tls,
        }
    }

    async fn client(&self) -> Sender {
        match &self.tls {
            Some(config) => {
                let alpn = match self.version {
                    Version::HTTP_2 => "h2",
                    _ => "http/1.1",
                };
                self.over(tls::connect(config, &[alpn], self.rig.addr).await)
                    .await
            }
            None => {
                let io = soon(TcpStream::connect(self.rig.addr)).await.unwrap();
                io.set_nodelay(true).unwrap();
                self.over(io).await
            }
        }
    }

    async fn over<I>(&self, io: I) -> Sender
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let io = TokioIo::new(io);
        if self.version == Version::HTTP_2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
            tokio::spawn(connection);
            return Sender::Two(sender);
        }
        let (sender, connection) = http1::handshake(io).await.unwrap();
        tokio::spawn(connection);
        Sender::One(sender)
    }

    fn told(&self) -> String {
        format!("{:?} over {:?}", self.stack, self.version)
    }
}

enum Sender {
    One(http1::SendRequest<Body>),
    Two(http2::SendRequest<Body>),
}

impl Sender {
    async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: Body,
    ) -> hyper::Result<Response<Incoming>> {
        let request = Request::builder().method(method);
        match self {
            Self::One(sender) => {
                soon(sender.ready()).await?;
                let request = request.uri(path).header("host", "test");
                soon(sender.send_request(request.body(body).unwrap())).await
            }
            Self::Two(sender) => {
                soon(sender.ready()).await?;
                let request = request.uri(format!("http://test{path}"));
                soon(sender.send_request(request.body(body).unwrap())).await
            }
        }
    }

    async fn get(&mut self, path: &str) -> Response<Incoming> {
        self.send(Method::GET, path, text("")).await.unwrap()
    }
}

async fn whole(response: Response<Incoming>) -> Bytes {
    soon(response.into_body().collect())
        .await
        .unwrap()
        .to_bytes()
}

fn closes(response: &Response<Incoming>) -> bool {
    let said = response.headers().get("connection");
    said.is_some_and(|said| said == "close")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paced_download_arrives_whole() {
    const SIZE: usize = 10 * 1024 * 1024;
    for of in ALL {
        let started = Started::new(of, shutdown_of(50, 15_000, 500), limits()).await;
        let told = started.told();
        let mut client = started.client().await;
        let mut body = client.get(&format!("/paced/{SIZE}")).await.into_body();
        started.rig.trigger();
        let mut read = 0;
        while let Some(frame) = soon(body.frame()).await {
            let data = frame.unwrap().into_data().unwrap();
            assert!(data.iter().enumerate().all(|(n, is)| *is == byte(read + n)));
            read += data.len();
        }
        assert_eq!(read, SIZE, "{told}");
        drop(client);
        assert_eq!(started.rig.ended().await.exit_code(), 0, "{told}");
    }
}

#[tokio::test]
async fn answers_without_a_body_count_no_longer_than_they_take() {
    for of in ALL {
        let started = Started::new(of, shutdown(), limits()).await;
        let told = started.told();
        let mut client = started.client().await;
        for (method, path, status) in [
            (Method::HEAD, "/", 200),
            (Method::HEAD, "/paced/100000", 200),
            (Method::HEAD, "/endless", 200),
            (Method::GET, "/nothing", 204),
            (Method::GET, "/same", 304),
        ] {
            let answer = client.send(method.clone(), path, text("")).await.unwrap();
            assert_eq!(answer.status(), status, "{told}");
            if method == Method::HEAD && path == "/" {
                assert_eq!(answer.headers()["content-length"], "5", "{told}");
            }
            assert!(whole(answer).await.is_empty(), "{told}");
        }
        let shutdown = started.rig.shutdown.clone();
        until(|| shutdown.requests() == 0).await;
        started.rig.trigger();
        let report = started.rig.ended().await;
        assert_eq!(report.exit_code(), 0, "{told}");
        assert!(report.drained_after() < ms(1200), "{told}: {report}");
        drop(client);
    }
}

#[tokio::test]
async fn a_panic_ends_its_count() {
    for of in ALL {
        let started = Started::new(of, shutdown(), limits()).await;
        let told = started.told();
        let mut client = started.client().await;
        let lost = client.send(Method::GET, "/panic", text("")).await;
        assert!(lost.is_err(), "{told}");
        let shutdown = started.rig.shutdown.clone();
        until(|| shutdown.requests() == 0).await;
        // Of HTTP/2 the connection goes on.
        if started.version != Version::HTTP_2 {
            client = started.client().await;
        }
        assert_eq!(whole(client.get("/").await).await, "hello", "{told}");
        started.rig.trigger();
        let report = started.rig.ended().await;
        assert_eq!(report.exit_code(), 0, "{told}: {report}");
    }
}

#[tokio::test]
async fn what_is_in_flight_is_finished_and_the_rest_refused() {
    for of in ALL {
        let started = Started::new(of, shutdown(), limits()).await;
        let told = started.told();
        let mut idle = started.client().await;
        assert_eq!(whole(idle.get("/").await).await, "hello");
        let mut client = started.client().await;
        let slow = tokio::spawn(async move {
            let answer = client.get("/slow/600").await;
            (closes(&answer), whole(answer).await, client)
        });
        let shutdown = started.rig.shutdown.clone();
        until(|| shutdown.requests() == 1).await;
        started.rig.trigger();
        let mut new = started.client().await;
        let answer = new.get("/").await;
        assert_eq!(
            closes(&answer),
            started.version == Version::HTTP_11,
            "{told}"
        );
        assert_eq!(whole(answer).await, "hello", "{told}");
        soon(shutdown.reached(Phase::Closed)).await;
        let refused = soon(TcpStream::connect(started.rig.addr))
            .await
            .unwrap_err();
        assert_eq!(
            refused.kind(),
            std::io::ErrorKind::ConnectionRefused,
            "{told}"
        );
        let (closed, answer, _client) = soon(slow).await.unwrap();
        assert_eq!(closed, started.version == Version::HTTP_11, "{told}");
        assert_eq!(answer, "slow", "{told}");
        let report = started.rig.ended().await;
        assert_eq!(report.exit_code(), 0, "{told}: {report}");
        assert!(report.drained_after() < ms(1200), "{told}: {report}");
    }
}

#[tokio::test]
async fn a_stream_that_ignores_the_notice_is_cut_and_the_hooks_run() {
    for of in ALL {
        let started = Started::new(of, shutdown_of(0, 1500, 900), limits()).await;
        let told = started.told();
        let ran = Arc::new(AtomicBool::new(false));
        let hook = Arc::clone(&ran);
        let hook = Hook::new("last", async move || hook.store(true, SeqCst));
        started.rig.shutdown.hook(hook);
        let mut client = started.client().await;
        let mut body = client.get("/endless").await.into_body();
        let start = started.rig.trigger();
        let lost = loop {
            match soon(body.frame()).await {
                Some(Ok(_)) => {}
                other => break other,
            }
        };
        assert!(
            lost.is_some_and(|frame| frame.is_err()),
            "{told}: it looks whole"
        );
        let took = clock::now() - start;
        assert!((ms(590)..ms(1400)).contains(&took), "{told}: {took:?}");
        let report = started.rig.ended().await;
        assert_eq!(report.exit_code(), 124, "{told}");
        assert_eq!(report.requests_cut(), 1, "{told}: {report}");
        assert!(ran.load(SeqCst), "{told}");
    }
}

#[tokio::test]
async fn a_stream_of_events_is_ended_at_the_notice() {
    for of in ALL {
        let started = Started::new(of, shutdown_of(200, 8000, 500), limits()).await;
        let told = started.told();
        let mut client = started.client().await;
        let mut body = client.get("/events").await.into_body();
        assert!(soon(body.frame()).await.unwrap().is_ok());
        started.rig.trigger();
        // To its proper end.
        let rest = soon(body.collect()).await;
        assert!(rest.is_ok(), "{told}: {rest:?}");
        drop(client);
        let report = started.rig.ended().await;
        assert_eq!(report.exit_code(), 0, "{told}: {report}");
        assert!(report.drained_after() < ms(1500), "{told}: {report}");
    }
}

/// What goes to and fro is not cut by the close, and ends when its client does.
#[tokio::test]
async fn both_directions_go_on_through_the_close() {
    for of in ALL {
        let started = Started::new(of, shutdown_of(100, 8000, 500), limits()).await;
        let told = started.told();
        let mut client = started.client().await;
        let (mut to, body) = Channel::<Bytes, BoxError>::new(1);
        to.send_data("before".into()).await.unwrap();
        let sent = client.send(Method::POST, "/echo", Body::new(body));
        let mut from = sent.await.unwrap().into_body();
        let mut next = async || {
            let frame = soon(from.frame()).await.expect("it has ended");
            frame.unwrap().into_data().unwrap()
        };
        assert_eq!(next().await, "before", "{told}");
        started.rig.trigger();
        soon(started.rig.shutdown.reached(Phase::Closed)).await;
        sleep(ms(200)).await;
        for n in 0..3 {
            to.send_data(format!("after {n}").into()).await.unwrap();
            assert_eq!(next().await, format!("after {n}"), "{told}");
        }
        assert_eq!(started.rig.shutdown.requests(), 1, "{told}");
        drop(to);
        let rest = soon(from.collect()).await.unwrap();
        assert!(rest.to_bytes().is_empty(), "{told}");
        drop(client);
        let report = started.rig.ended().await;
        assert_eq!(report.exit_code(), 0, "{told}: {report}");
    }
}

/// Whether the server is known not to have taken it, so that it can be sent
/// again elsewhere.
fn never_taken(error: &hyper::Error) -> bool {
    if error.is_canceled() || error.is_closed() {
        return true;
    }
    let h2 = error
        .source()
        .and_then(|error| error.downcast_ref::<h2::Error>());
    h2.is_some_and(|error| error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
}

/// Requests all the time, and the signal in the middle of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_that_was_taken_is_lost() {
    for of in ALL {
        let started = Started::new(of, shutdown_of(100, 8000, 500), limits()).await;
        let mut tasks = Vec::new();
        for _ in 0..8 {
            let mut client = started.client().await;
            let told = started.told();
            tasks.push(tokio::spawn(async move {
                let mut answered = 0;
                loop {
                    match client.send(Method::GET, "/slow/3", text("")).await {
                        Ok(answer) => {
                            let closes = closes(&answer);
                            assert_eq!(whole(answer).await, "slow", "{told}");
                            answered += 1;
                            if closes {
                                return answered;
                            }
                        }
                        Err(error) => {
                            assert!(never_taken(&error), "{told}: {error:?}");
                            return answered;
                        }
                    }
                }
            }));
        }
        sleep(ms(60)).await;
        started.rig.trigger();
        for task in tasks {
            assert!(soon(task).await.unwrap() > 3);
        }
        let report = started.rig.ended().await;
        assert_eq!(report.exit_code(), 0, "{of:?}: {report}");
    }
}

#[tokio::test]
async fn silent_connections_do_not_hold_it() {
    for of in [Stack::Ours, Stack::Tls, Stack::Axum, Stack::Tonic] {
        let of = (of, Version::HTTP_2);
        let started = Started::new(of, shutdown_of(0, 8000, 500), limits()).await;
        let told = started.told();
        let silent = soon(TcpStream::connect(started.rig.addr)).await.unwrap();
        let shutdown = started.rig.shutdown.clone();
        until(|| shutdown.connections() == 1).await;
        started.rig.trigger();
        let report = started.rig.ended().await;
        assert_eq!(report.exit_code(), 0, "{told}: {report}");
        assert!(report.drained_after() < ms(1500), "{told}: {report}");
        drop(silent);
    }
}

#[tokio::test]
async fn a_stream_between_the_two_goaways_is_answered() {
    for of in [Stack::Tls, Stack::Axum, Stack::Tonic] {
        let of = (of, Version::HTTP_2);
        let started = Started::new(of, shutdown(), limits()).await;
        let io = soon(TcpStream::connect(started.rig.addr)).await.unwrap();
        io.set_nodelay(true).unwrap();
        match &started.tls {
            Some(config) => {
                let io = tls::connect(config, &["h2"], started.rig.addr).await;
                between_goaways(&started.rig, Frames::over(io).await).await;
            }
            None => {
                between_goaways(&started.rig, Frames::over(io).await).await;
            }
        }
        let report = started.rig.ended().await;
        assert_eq!(report.exit_code(), 0, "{of:?}: {report}");
    }
}

/// The client waits for leave to send its body, which is given after the close
/// as before it.
#[tokio::test]
async fn leave_to_send_a_body_is_given_through_the_close() {
    for of in [Stack::Ours, Stack::Axum] {
        let of = (of, Version::HTTP_11);
        let started = Started::new(of, shutdown_of(0, 8000, 500), limits()).await;
        let mut client = Client::new(started.rig.addr).await;
        let head = "POST /size HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\
                    expect: 100-continue\r\n\r\n";
        client.send(head).await.unwrap();
        let shutdown = started.rig.shutdown.clone();
        until(|| shutdown.requests() == 1).await;
        started.rig.trigger();
        soon(shutdown.reached(Phase::Closed)).await;
        let (status, _) = client.head().await.unwrap().unwrap();
        assert_eq!(status, 100, "{of:?}");
        client.send("12345").await.unwrap();
        let answer = client.answer().await;
        assert_eq!(answer.text(), "5", "{of:?}");
        assert!(answer.closes(), "{of:?}");
        assert!(client.is_closed().await.unwrap());
        assert_eq!(started.rig.ended().await.exit_code(), 0, "{of:?}");
    }
}

/// HTTP/1.0 keeps nothing alive.
#[tokio::test]
async fn clients_of_a_single_request_are_answered_and_closed() {
    for of in [Stack::Ours, Stack::Axum] {
        let of = (of, Version::HTTP_11);
        let started = Started::new(of, shutdown(), limits()).await;
        for draining in [false, true] {
            if draining {
                started.rig.trigger();
            }
            let mut client = Client::new(started.rig.addr).await;
            client.send("GET / HTTP/1.0\r\n\r\n").await.unwrap();
            let answer = client.answer().await;
            assert_eq!(answer.text(), "hello", "{of:?}");
            assert!(client.is_closed().await.unwrap(), "{of:?}");
        }
        assert_eq!(started.rig.ended().await.exit_code(), 0, "{of:?}");
    }
}
