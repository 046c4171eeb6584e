//! Silent and slow clients.

use axum::{Router, routing::post};
use buttress_core::clock;
use bytes::Bytes;
use tokio::{net::TcpStream, time::sleep};
use tower_http::timeout::RequestBodyTimeoutLayer;

use crate::{
    Rig,
    app::app,
    client::{Client, get},
    limits, ms, shutdown, soon, until,
};

#[tokio::test]
async fn no_more_than_the_limit_are_accepted() {
    let rig = Rig::of(shutdown(), limits().max_connections(2), app()).await;
    let mut first = Client::new(rig.addr).await;
    let mut second = Client::new(rig.addr).await;
    first.get("/").await;
    second.get("/").await;
    // The kernel takes it, the server does not.
    let mut third = Client::new(rig.addr).await;
    third.send(get("/")).await.unwrap();
    tokio::time::sleep(ms(100)).await;
    assert_eq!(rig.shutdown.connections(), 2);
    drop(first);
    assert_eq!(third.answer().await.text(), "hello");
    assert_eq!(rig.shutdown.connections(), 2);
    drop((second, third));
    rig.trigger();
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn a_head_that_trickles_in_is_closed() {
    let rig = Rig::of(shutdown(), limits().header_timeout(ms(200)), app()).await;
    // The first of a connection, of which not even the version is known, and
    // a later one.
    for used in [false, true] {
        for start in ["G", "GET / HTTP/1.1\r\nx: "] {
            let mut client = Client::new(rig.addr).await;
            if used {
                client.get("/").await;
            }
            let begun = clock::now();
            client.send(start).await.unwrap();
            let mut byte = [0];
            let closed = async {
                loop {
                    tokio::time::sleep(ms(20)).await;
                    if client.send("G").await.is_err() {
                        break;
                    }
                    let read = client.io.get_ref().try_read(&mut byte);
                    if !read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock) {
                        break;
                    }
                }
            };
            soon(closed).await;
            let took = clock::now() - begun;
            assert!((ms(190)..ms(3000)).contains(&took), "{took:?}");
        }
    }
    rig.trigger();
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// One that came in the same read as the request before it, too.
#[tokio::test]
async fn a_head_that_was_sent_ahead_and_stops_is_closed() {
    let rig = Rig::of(shutdown(), limits().header_timeout(ms(200)), app()).await;
    let mut client = Client::new(rig.addr).await;
    client.send([&get("/"), "GET /"].concat()).await.unwrap();
    assert_eq!(client.answer().await.text(), "hello");
    let begun = clock::now();
    assert!(client.is_closed().await.unwrap());
    let took = clock::now() - begun;
    assert!((ms(150)..ms(3000)).contains(&took), "{took:?}");
}

/// And one that came while the request before it was served.
#[tokio::test]
async fn a_head_that_begins_within_a_request_and_stops_is_closed() {
    let rig = Rig::of(shutdown(), limits().header_timeout(ms(200)), app()).await;
    let mut client = Client::new(rig.addr).await;
    client.send(get("/slow/150")).await.unwrap();
    tokio::time::sleep(ms(50)).await;
    client.send("GET /b").await.unwrap();
    assert_eq!(client.answer().await.text(), "slow");
    let begun = clock::now();
    assert!(client.is_closed().await.unwrap());
    let took = clock::now() - begun;
    assert!((ms(150)..ms(3000)).contains(&took), "{took:?}");
}

/// Which a server is to pass over (RFC 9112, section 2.2): it begins no head.
#[tokio::test]
async fn an_empty_line_between_requests_is_none() {
    let rig = Rig::of(shutdown(), limits().header_timeout(ms(100)), app()).await;
    let mut before = Client::new(rig.addr).await;
    before.send("\r\n").await.unwrap();
    let mut after = Client::new(rig.addr).await;
    after.get("/").await;
    after.send("\r\n").await.unwrap();
    let mut within = Client::new(rig.addr).await;
    within.send(get("/slow/100")).await.unwrap();
    tokio::time::sleep(ms(50)).await;
    within.send("\r\n").await.unwrap();
    assert_eq!(within.answer().await.text(), "slow");
    tokio::time::sleep(ms(400)).await;
    for client in [&mut before, &mut after, &mut within] {
        assert_eq!(client.get("/").await.text(), "hello");
        client.send("\r\n").await.unwrap();
    }
    // And it holds no drain.
    tokio::time::sleep(ms(50)).await;
    rig.trigger();
    for client in [&mut before, &mut after, &mut within] {
        assert!(client.is_closed().await.unwrap());
    }
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0, "{report}");
}

/// Over HTTP/2 nothing is written, and nothing stalls, where a client opens no
/// window.
#[tokio::test]
async fn a_client_that_opens_no_window_is_dropped() {
    let limits = limits().write_timeout(ms(300));
    let rig = Rig::of(shutdown(), limits, app()).await;
    // Of none at all, and of one that is full.
    for (window, path) in [(0, "/full/100"), (65_535, "/full/1000000")] {
        let io = soon(TcpStream::connect(rig.addr)).await.unwrap();
        let mut builder = h2::client::Builder::new();
        let client = builder.initial_window_size(window);
        let (mut send, connection) = client.handshake::<_, bytes::Bytes>(io).await.unwrap();
        let connection = tokio::spawn(connection);
        let request = http::Request::get(format!("http://test{path}"));
        let (answer, _) = send.send_request(request.body(()).unwrap(), true).unwrap();
        let answer = soon(answer).await.unwrap();
        assert_eq!(answer.status(), 200);
        let begun = clock::now();
        let _ = soon(connection).await;
        let took = clock::now() - begun;
        assert!((ms(250)..ms(3000)).contains(&took), "{took:?}");
        let shutdown = rig.shutdown.clone();
        until(|| shutdown.connections() == 0).await;
        drop((answer, send));
    }
}

/// Whoever waits for a handler, or takes what there is, is not.
#[tokio::test]
async fn a_client_that_waits_for_a_stream_is_not() {
    let rig = Rig::of(shutdown(), limits().write_timeout(ms(300)), app()).await;
    let io = soon(TcpStream::connect(rig.addr)).await.unwrap();
    let (mut send, connection) = h2::client::handshake(io).await.unwrap();
    let connection = tokio::spawn(connection);
    for path in ["/slow/1000", "/pause/1000"] {
        let request = http::Request::get(format!("http://test{path}"));
        let (answer, _) = send.send_request(request.body(()).unwrap(), true).unwrap();
        let mut body = soon(answer).await.unwrap().into_body();
        let mut all = Vec::new();
        while let Some(data) = soon(body.data()).await {
            all.extend_from_slice(&data.unwrap());
        }
        assert!(all.starts_with(b"slow"), "{path}");
        assert!(!connection.is_finished());
    }
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let rig = Rig::of(shutdown(), limits().idle_timeout(ms(200)), app()).await;
    let mut silent = Client::new(rig.addr).await;
    let mut used = Client::new(rig.addr).await;
    let begun = clock::now();
    for _ in 0..5 {
        tokio::time::sleep(ms(100)).await;
        // Each request begins a new spell.
        assert_eq!(used.get("/").await.text(), "hello");
    }
    assert!(silent.is_closed().await.unwrap());
    let last = clock::now();
    assert!(last - begun >= ms(500));
    assert!(used.is_closed().await.unwrap());
    let took = clock::now() - last;
    assert!((ms(150)..ms(3000)).contains(&took), "{took:?}");
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 0).await;
}

#[tokio::test]
async fn a_handler_may_take_longer_than_a_client_may_idle() {
    let limits = limits().idle_timeout(ms(100)).header_timeout(ms(100));
    let rig = Rig::of(shutdown(), limits, app()).await;
    let mut client = Client::new(rig.addr).await;
    assert_eq!(client.get("/slow/400").await.text(), "slow");
    let mut client = Client::new(rig.addr).await;
    let head = "POST /size HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\n";
    client.send(head).await.unwrap();
    tokio::time::sleep(ms(300)).await;
    client.send("12345").await.unwrap();
    assert_eq!(client.answer().await.text(), "5");
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_dropped() {
    let rig = Rig::of(shutdown(), limits().write_timeout(ms(300)), app()).await;
    let mut client = Client::new(rig.addr).await;
    client.send(get("/paced/100000000")).await.unwrap();
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 1).await;
    until(|| shutdown.connections() == 0).await;
    drop(client);
}

#[tokio::test]
async fn old_connections_are_asked_to_go() {
    let rig = Rig::of(shutdown(), limits().max_age(ms(200)), app()).await;
    let mut client = Client::new(rig.addr).await;
    assert!(!client.get("/").await.closes());
    tokio::time::sleep(ms(300)).await;
    // It is asked with an answer, and not closed before it.
    let mut answers = 0;
    soon(async {
        while !client.get("/").await.closes() {
            answers += 1;
        }
    })
    .await;
    assert!(answers <= 1, "{answers}");
    assert!(client.is_closed().await.unwrap());
}

#[tokio::test]
async fn heads_have_a_size() {
    let limits = limits().max_header_bytes(1000).max_headers(10);
    let rig = Rig::of(shutdown(), limits, app()).await;
    for head in [
        format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(2000)),
        format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(11)),
    ] {
        let mut client = Client::new(rig.addr).await;
        client.send(head).await.unwrap();
        assert_eq!(client.answer().await.status, 431);
        assert!(client.is_closed().await.unwrap());
    }
    let mut client = Client::new(rig.addr).await;
    assert_eq!(client.get("/").await.status, 200);
}

/// As the front page has it for what is not ours to limit.
fn uploads() -> Router {
    let poll = async |body: Bytes| {
        sleep(ms(900)).await;
        body
    };
    Router::new()
        .route("/size", post(async |body: Bytes| body.len().to_string()))
        .route("/poll", post(poll))
        .layer(RequestBodyTimeoutLayer::new(ms(300)))
}

fn post_of(path: &str, length: usize, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n{body}")
}

#[tokio::test]
async fn a_body_that_stalls_gives_its_place_back() {
    let rig = Rig::of(shutdown(), limits().max_connections(1), uploads()).await;
    let mut stalled = Client::new(rig.addr).await;
    let begun = clock::now();
    stalled.send(post_of("/size", 9, "half")).await.unwrap();
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 1).await;
    let mut next = Client::new(rig.addr).await;
    next.send(post_of("/size", 5, "whole")).await.unwrap();
    let answer = stalled.answer().await;
    assert_eq!(answer.status, 400);
    let took = clock::now() - begun;
    assert!((ms(290)..ms(3000)).contains(&took), "{took:?}");
    assert!(stalled.is_closed().await.unwrap());
    drop(stalled);
    assert_eq!(next.answer().await.text(), "5");
}

/// Over HTTP/2 it is one of the streams of its connection.
#[tokio::test]
async fn a_body_that_stalls_takes_no_other_stream_with_it() {
    let rig = Rig::of(shutdown(), limits(), uploads()).await;
    let io = soon(TcpStream::connect(rig.addr)).await.unwrap();
    let (mut send, connection) = h2::client::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let request = |path: &str| {
        let request = http::Request::post(format!("http://test{path}"));
        request.body(()).unwrap()
    };
    let (stalled, mut half) = send.send_request(request("/size"), false).unwrap();
    half.send_data(Bytes::from("half"), false).unwrap();
    let (polled, mut whole) = send.send_request(request("/poll"), false).unwrap();
    whole.send_data(Bytes::from("whole"), true).unwrap();
    assert_eq!(soon(stalled).await.unwrap().status(), 400);
    assert_eq!(soon(polled).await.unwrap().status(), 200);
    assert_eq!(rig.shutdown.connections(), 1);
}

#[tokio::test]
async fn neither_a_slow_upload_nor_a_long_poll_stalls() {
    let rig = Rig::of(shutdown(), limits(), uploads()).await;
    let mut slow = Client::new(rig.addr).await;
    slow.send(post_of("/size", 8, "")).await.unwrap();
    for _ in 0..8 {
        sleep(ms(100)).await;
        slow.send("x").await.unwrap();
    }
    assert_eq!(slow.answer().await.text(), "8");
    let mut polls = Client::new(rig.addr).await;
    polls.send(post_of("/poll", 5, "whole")).await.unwrap();
    assert_eq!(polls.answer().await.text(), "whole");
}

#[tokio::test]
async fn a_body_that_stalls_holds_no_drain() {
    let rig = Rig::of(shutdown(), limits(), uploads()).await;
    let mut stalled = Client::new(rig.addr).await;
    stalled.send(post_of("/size", 9, "half")).await.unwrap();
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 1).await;
    rig.trigger();
    assert_eq!(stalled.answer().await.status, 400);
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0, "{report}");
    // Long before the cut.
    assert!(report.took() < ms(1400), "{report}");
}
