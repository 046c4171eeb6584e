//! Upgraded connections.

use std::{
    convert::Infallible,
    future::{Future, pending, poll_fn},
    pin::{Pin, pin},
};

use buttress_core::{Head, clock};
use buttress_drain::{CutKind, DrainLayer, Label, Phase, Server};
use bytes::Bytes;
use h2::{RecvStream, client::SendRequest};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};

use tower::{Layer, ServiceExt};

use crate::{
    Rig,
    app::app,
    client::Client,
    http2::{DATA, Frames},
    limits, ms, shutdown_of, soon, until,
};

const UPGRADE: &str =
    "GET /tunnel HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";

async fn tunnel(rig: &Rig) -> Client {
    let mut client = Client::new(rig.addr).await;
    client.send(UPGRADE).await.unwrap();
    let (status, headers) = client.head().await.unwrap().unwrap();
    assert_eq!(status, 101);
    assert!(headers.contains(&("connection".to_owned(), "upgrade".to_owned())));
    client
}

async fn echo(client: &mut Client, text: &str) {
    client.send(text).await.unwrap();
    let mut echo = vec![0; text.len()];
    soon(client.io.read_exact(&mut echo)).await.unwrap();
    assert_eq!(echo, text.as_bytes());
}

#[tokio::test]
async fn a_tunnel_counts_until_it_is_closed() {
    // No limit on idlers holds for it.
    let limits = limits().idle_timeout(ms(50)).header_timeout(ms(50));
    let rig = Rig::of(shutdown_of(100, 5000, 500), limits, app()).await;
    let mut client = tunnel(&rig).await;
    echo(&mut client, "before").await;
    rig.trigger();
    let shutdown = rig.shutdown.clone();
    soon(shutdown.reached(Phase::Closed)).await;
    tokio::time::sleep(ms(200)).await;
    assert_eq!(
        (shutdown.phase(), shutdown.connections()),
        (Phase::Closed, 1)
    );
    echo(&mut client, "after").await;
    drop(client);
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0, "{report}");
}

#[tokio::test]
async fn during_the_delay_there_may_be_new_ones() {
    let rig = Rig::of(shutdown_of(300, 5000, 500), limits(), app()).await;
    rig.trigger();
    let mut client = tunnel(&rig).await;
    echo(&mut client, "late").await;
    drop(client);
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn a_tunnel_is_cut_and_named() {
    let rig = Rig::of(shutdown_of(0, 1000, 500), limits(), app()).await;
    let mut client = tunnel(&rig).await;
    echo(&mut client, "0123456789").await;
    let start = rig.trigger();
    let mut rest = Vec::new();
    let _ = soon(client.io.read_to_end(&mut rest)).await;
    let took = clock::now() - start;
    assert!((ms(490)..ms(3000)).contains(&took), "{took:?}");
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 0).await;
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 124);
    let [cut] = report.cut() else {
        panic!("{report}");
    };
    assert_eq!(cut.kind(), CutKind::Tunnel);
    assert_eq!(cut.label().unwrap().as_str(), "/tunnel");
    assert!(cut.bytes().unwrap() > 10);
}

/// By the layer, which knows the routes.
#[tokio::test]
async fn a_tunnel_is_named_as_its_request_was() {
    let service = tower::service_fn(|mut request: Request<Incoming>| async move {
        tokio::spawn(async move {
            let io = hyper::upgrade::on(&mut request).await.unwrap();
            let _ = TokioIo::new(io).read_u8().await;
        });
        let response = Response::builder()
            .status(101)
            .header("connection", "upgrade")
            .header("upgrade", "echo");
        Ok::<_, Infallible>(response.body(String::new()).unwrap())
    });
    let shutdown = shutdown_of(0, 600, 300);
    let layer = DrainLayer::new(&shutdown).route("/live");
    let rig = Rig::of(shutdown, limits(), layer.layer(service)).await;
    let client = tunnel(&rig).await;
    until(|| rig.shutdown.requests() == 0).await;
    rig.trigger();
    let report = rig.ended().await;
    let [cut] = report.cut() else {
        panic!("{report}");
    };
    assert_eq!(cut.kind(), CutKind::Tunnel);
    assert_eq!(cut.label().unwrap().as_str(), "/live");
    drop(client);
}

/// One direction is closed, and the other goes on.
#[tokio::test]
async fn half_a_tunnel_may_be_closed() {
    let rig = Rig::new().await;
    let mut client = tunnel(&rig).await;
    let text = "x".repeat(300_000);
    let (mut read, mut write) = client.io.get_mut().split();
    let sent = async {
        write.write_all(text.as_bytes()).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut back = String::new();
    let (read, ()) = tokio::join!(soon(read.read_to_string(&mut back)), sent);
    read.unwrap();
    assert_eq!(back.len(), text.len());
}

/// The server's direction first: what comes after its FIN is not thrown away.
#[tokio::test]
async fn a_tunnel_that_was_shut_down_is_read_to_its_end() {
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let service = tower::service_fn(move |mut request: Request<Incoming>| {
        let sender = sender.clone();
        async move {
            tokio::spawn(async move {
                let upgraded = hyper::upgrade::on(&mut request).await.unwrap();
                let mut io = TokioIo::new(upgraded);
                io.shutdown().await.unwrap();
                let mut read = Vec::new();
                io.read_to_end(&mut read).await.unwrap();
                sender.send(read.len()).unwrap();
            });
            let response = Response::builder()
                .status(101)
                .header("connection", "upgrade")
                .header("upgrade", "echo");
            Ok::<_, Infallible>(response.body(String::new()).unwrap())
        }
    });
    let rig = Rig::of(shutdown_of(0, 5000, 500), limits(), service).await;
    let mut client = tunnel(&rig).await;
    assert!(client.is_closed().await.unwrap());
    for _ in 0..10 {
        tokio::time::sleep(ms(20)).await;
        client.send("x".repeat(1000)).await.unwrap();
    }
    client.io.get_mut().shutdown().await.unwrap();
    assert_eq!(soon(receiver.recv()).await, Some(10_000));
}

/// A client of HTTP/2, once it knows of extended CONNECT (RFC 8441) or that
/// there is none.
async fn http2(rig: &Rig, extended: bool) -> (SendRequest<Bytes>, JoinHandle<()>) {
    let io = soon(TcpStream::connect(rig.addr)).await.unwrap();
    let (send, mut connection) = h2::client::handshake(io).await.unwrap();
    let mut ping = connection.ping_pong().unwrap();
    let mut pong = pin!(ping.ping(h2::Ping::opaque()));
    // What comes before it, the settings, is there then.
    soon(poll_fn(|cx| {
        assert!(Pin::new(&mut connection).poll(cx).is_pending());
        pong.as_mut().poll(cx)
    }))
    .await
    .unwrap();
    assert_eq!(send.is_extended_connect_protocol_enabled(), extended);
    let connection = tokio::spawn(async move {
        let _ = connection.await;
    });
    (send, connection)
}

/// A stream that was turned into a tunnel.
#[tokio::test]
async fn a_tunnel_in_a_stream_counts_too() {
    let limits = limits().idle_timeout(ms(100)).header_timeout(ms(100));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let shutdown = shutdown_of(50, 1500, 500);
    let server = Server::new(&shutdown)
        .limits(limits.build().unwrap())
        .http2(|http2| {
            http2.enable_connect_protocol();
        })
        .serve(listener, app());
    let rig = Rig::with(shutdown, addr, server);
    let (mut send, _connection) = http2(&rig, true).await;
    let request = http::Request::connect("http://test/tunnel")
        .extension(h2::ext::Protocol::from_static("echo"))
        .body(())
        .unwrap();
    let (answer, mut to) = send.send_request(request, false).unwrap();
    let answer = soon(answer).await.unwrap();
    assert_eq!(answer.status(), 200);
    let mut from = answer.into_body();
    tokio::time::sleep(ms(300)).await;
    rig.trigger();
    let shutdown = rig.shutdown.clone();
    soon(shutdown.reached(Phase::Closed)).await;
    tokio::time::sleep(ms(300)).await;
    to.send_data(Bytes::from("still"), false).unwrap();
    let data = soon(from.data()).await.unwrap().unwrap();
    assert_eq!(data, "still");
    // It ends when it is cut.
    while let Some(Ok(_)) = soon(from.data()).await {}
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 124);
    let [cut] = report.cut() else {
        panic!("{report}");
    };
    assert_eq!(cut.kind(), CutKind::Tunnel);
    assert_eq!(cut.label().unwrap().as_str(), "/tunnel");
}

async fn assert_ended(from: &mut RecvStream) {
    while let Some(data) = soon(from.data()).await {
        assert_eq!(data.unwrap(), "");
    }
}

/// By the layer, over HTTP/2 as well; and a request beside them is not lost
/// among tunnels, of which one is over.
#[tokio::test]
async fn tunnels_in_streams_are_named_as_their_requests_were() {
    let service = tower::service_fn(|mut request: Request<Incoming>| async move {
        if request.method() != Method::CONNECT {
            pending::<()>().await;
        }
        tokio::spawn(async move {
            let io = hyper::upgrade::on(&mut request).await.unwrap();
            let _ = TokioIo::new(io).read_u8().await;
        });
        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
    });
    let shutdown = shutdown_of(0, 600, 300);
    let layer = DrainLayer::new(&shutdown).route_by(|request: Head<'_>| {
        Label::from(match request.uri.authority() {
            Some(to) => format!("to {}", to.host()),
            None => "elsewhere".to_owned(),
        })
    });
    let rig = Rig::of(shutdown, limits(), layer.layer(service)).await;
    let (mut send, _connection) = http2(&rig, false).await;
    let mut tunnels = Vec::new();
    for to in ["one:1", "two:2", "three:3"] {
        let request = Request::connect(to).body(()).unwrap();
        let (answer, to) = send.send_request(request, false).unwrap();
        let answer = soon(answer).await.unwrap();
        assert_eq!(answer.status(), 200);
        tunnels.push((answer.into_body(), to));
    }
    let (mut from, mut over) = tunnels.remove(1);
    over.send_data(Bytes::from("x"), true).unwrap();
    assert_ended(&mut from).await;
    let request = Request::get("http://beside/").body(()).unwrap();
    let (_answer, _) = send.send_request(request, true).unwrap();
    until(|| rig.shutdown.requests() == 1).await;
    rig.trigger();
    let report = rig.ended().await;
    let mut cut: Vec<_> = report
        .cut()
        .iter()
        .map(|cut| (cut.kind().as_str(), cut.label().unwrap().as_str()))
        .collect();
    cut.sort_unstable();
    assert_eq!(
        cut,
        [
            ("request", "to beside"),
            ("tunnel", "to one"),
            ("tunnel", "to three")
        ]
    );
    drop(tunnels);
}

/// The server's direction first, over HTTP/2: what is sent on it still holds
/// the drain, and is cut by name.
#[tokio::test]
async fn a_tunnel_in_a_stream_that_was_shut_down_is_read_to_its_end() {
    for ends in [true, false] {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let service = tower::service_fn(move |mut request: Request<Incoming>| {
            let sender = sender.clone();
            async move {
                tokio::spawn(async move {
                    let upgraded = hyper::upgrade::on(&mut request).await.unwrap();
                    let mut io = TokioIo::new(upgraded);
                    io.shutdown().await.unwrap();
                    let mut read = Vec::new();
                    let whole = io.read_to_end(&mut read).await.is_ok();
                    sender.send((whole, read.len())).unwrap();
                });
                let label = Label::from("/up");
                let response = Response::builder().extension(label);
                Ok::<_, Infallible>(response.body(Empty::<Bytes>::new()).unwrap())
            }
        });
        let limits = limits().header_timeout(ms(100));
        let rig = Rig::of(shutdown_of(0, 2000, 500), limits, service).await;
        let (mut send, _connection) = http2(&rig, false).await;
        let request = Request::connect("test:443").body(()).unwrap();
        let (answer, mut to) = send.send_request(request, false).unwrap();
        let mut from = soon(answer).await.unwrap().into_body();
        assert_ended(&mut from).await;
        rig.trigger();
        // Quiet for longer than a connection has that is to close.
        for _ in 0..4 {
            tokio::time::sleep(ms(200)).await;
            to.send_data(Bytes::from(vec![b'x'; 1000]), false).unwrap();
        }
        if ends {
            to.send_data(Bytes::new(), true).unwrap();
            assert_eq!(soon(receiver.recv()).await, Some((true, 4000)));
            let report = rig.ended().await;
            assert_eq!(report.exit_code(), 0, "{report}");
            assert!(report.drained_after() < ms(1400), "{report}");
        } else {
            let report = rig.ended().await;
            assert_eq!(report.exit_code(), 124);
            let [cut] = report.cut() else {
                panic!("{report}");
            };
            assert_eq!(cut.kind(), CutKind::Tunnel);
            assert_eq!(cut.label().unwrap().as_str(), "/up");
        }
    }
}

/// There are none by 101 over HTTP/2: what is answered so is a request, and
/// counts as long as it is, whatever is opened beside it.
#[tokio::test]
async fn no_tunnel_comes_of_a_101_in_a_stream() {
    let service = tower::service_fn(|request: Request<Incoming>| async move {
        let app = app();
        let odd = request.uri().path() == "/endless";
        let mut answer = app.oneshot(request).await.unwrap();
        if odd {
            *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        }
        Ok::<_, Infallible>(answer)
    });
    let limits = limits().header_timeout(ms(100));
    let rig = Rig::of(shutdown_of(0, 1500, 500), limits, service).await;
    let mut client = Frames::new(rig.addr).await;
    client.get(1, "/endless").await;
    client.next_of(DATA).await;
    client.get(3, "/").await;
    loop {
        let data = client.next_of(DATA).await;
        if data.stream == 3 {
            break;
        }
    }
    rig.trigger();
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 124, "{report}");
    let [cut] = report.cut() else {
        panic!("{report}");
    };
    assert_eq!(cut.kind(), CutKind::Connection);
}

/// And no longer than it is there.
#[tokio::test]
async fn a_tunnel_in_a_stream_that_is_over_keeps_no_connection() {
    let limits = || limits().idle_timeout(ms(200)).header_timeout(ms(100));
    // Ended by the client, by its reset, and one that nobody on the server
    // takes up.
    for end in ["end", "reset", "none"] {
        let service = tower::service_fn(move |mut request: Request<Incoming>| async move {
            tokio::spawn(async move {
                let upgraded = hyper::upgrade::on(&mut request).await.unwrap();
                let mut io = TokioIo::new(upgraded);
                if end != "none" {
                    let _ = io.read_to_end(&mut Vec::new()).await;
                }
            });
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        });
        let rig = Rig::of(shutdown_of(50, 1500, 500), limits(), service).await;
        let (mut send, connection) = http2(&rig, false).await;
        let request = http::Request::connect("test:443").body(()).unwrap();
        let (answer, mut to) = send.send_request(request, false).unwrap();
        let answer = soon(answer).await.unwrap();
        assert_eq!(answer.status(), 200);
        if end != "none" {
            // Not idle, whatever it does.
            tokio::time::sleep(ms(500)).await;
            assert!(!connection.is_finished());
        }
        match end {
            "end" => to.send_data(Bytes::new(), true).unwrap(),
            "reset" => to.send_reset(h2::Reason::CANCEL),
            _ => {}
        }
        soon(connection).await.unwrap();
        until(|| rig.shutdown.connections() == 0).await;
        drop((answer, to, send));
    }
}
