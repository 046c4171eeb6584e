//! The sequence, on HTTP/1.

use std::io::ErrorKind;

use buttress_core::clock;
use buttress_drain::{CutKind, DrainLayer, Phase};
use tokio::net::TcpStream;
use tower::{Layer, ServiceExt};

use crate::{
    Rig,
    client::{Client, get},
    limits, ms, shutdown_of, soon, until,
};

#[tokio::test]
async fn with_nobody_there_it_ends_after_the_delay() {
    let rig = Rig::new().await;
    let mut client = Client::new(rig.addr).await;
    assert_eq!(client.get("/").await.text(), "hello");
    drop(client);
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 0).await;
    let start = rig.trigger();
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0);
    let took = clock::now() - start;
    assert!((ms(200)..ms(1400)).contains(&took), "{took:?}");
}

#[tokio::test]
async fn an_idle_client_that_closes_too_costs_nothing() {
    let rig = Rig::new().await;
    let mut client = Client::new(rig.addr).await;
    assert!(!client.get("/").await.closes());
    let start = rig.trigger();
    assert!(client.is_closed().await.unwrap());
    drop(client);
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0);
    let took = clock::now() - start;
    assert!((ms(200)..ms(1400)).contains(&took), "{took:?}");
}

#[tokio::test]
async fn all_is_served_during_the_delay_and_refused_after_it() {
    let rig = Rig::new().await;
    let mut old = Client::new(rig.addr).await;
    assert!(!old.get("/").await.closes());
    rig.trigger();
    // On a connection that was there, and on a new one.
    let mut new = Client::new(rig.addr).await;
    for client in [&mut old, &mut new] {
        let answer = client.get("/").await;
        assert_eq!(answer.text(), "hello");
        assert!(answer.closes(), "{answer:?}");
        assert!(client.is_closed().await.unwrap());
    }
    let (shutdown, addr) = (rig.shutdown.clone(), rig.addr);
    soon(shutdown.reached(Phase::Closed)).await;
    let refused = soon(TcpStream::connect(addr)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn what_is_in_flight_is_finished_after_the_listener_is_closed() {
    let rig = Rig::new().await;
    let mut client = Client::new(rig.addr).await;
    client.send(get("/slow/600")).await.unwrap();
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 1).await;
    rig.trigger();
    soon(shutdown.reached(Phase::Closed)).await;
    let answer = client.answer().await;
    assert_eq!(answer.text(), "slow");
    assert!(answer.closes());
    assert!(client.is_closed().await.unwrap());
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0);
    assert!(report.drained_after() >= ms(400));
}

/// Its head was sent before the notice: it could not say so.
#[tokio::test]
async fn the_next_request_on_a_connection_that_was_told_nothing_is_answered() {
    let rig = Rig::of(shutdown_of(50, 3000, 500), limits(), crate::app::app()).await;
    let mut client = Client::new(rig.addr).await;
    // 200 pauses of 3 ms at least.
    client.send(get("/paced/13000000")).await.unwrap();
    let (status, _) = client.head().await.unwrap().unwrap();
    assert_eq!(status, 200);
    let shutdown = rig.shutdown.clone();
    rig.trigger();
    soon(shutdown.reached(Phase::Closed)).await;
    // Sent ahead, as a client may that was told nothing.
    client.send(get("/")).await.unwrap();
    while client.chunk().await.unwrap().is_some() {}
    let answer = client.answer().await;
    assert_eq!(answer.text(), "hello");
    assert!(answer.closes());
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// The same, where nothing more is sent.
#[tokio::test]
async fn a_connection_that_was_told_nothing_is_closed_when_it_is_idle() {
    let rig = Rig::of(shutdown_of(50, 5000, 500), limits(), crate::app::app()).await;
    let mut client = Client::new(rig.addr).await;
    client.send(get("/paced/13000000")).await.unwrap();
    let (status, _) = client.head().await.unwrap().unwrap();
    assert_eq!(status, 200);
    let shutdown = rig.shutdown.clone();
    rig.trigger();
    soon(shutdown.reached(Phase::Closed)).await;
    while client.chunk().await.unwrap().is_some() {}
    assert!(client.is_closed().await.unwrap());
    drop(client);
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0);
    assert!(report.drained_after() < ms(3000));
}

#[tokio::test]
async fn silent_connections_have_a_moment_for_their_first_byte() {
    let rig = Rig::of(shutdown_of(0, 5000, 500), limits(), crate::app::app()).await;
    let mut silent = Client::new(rig.addr).await;
    let mut late = Client::new(rig.addr).await;
    let start = rig.trigger();
    soon(rig.shutdown.reached(Phase::Closed)).await;
    tokio::time::sleep(ms(100)).await;
    let answer = late.get("/").await;
    assert!(answer.closes());
    assert_eq!(answer.text(), "hello");
    drop(late);
    assert!(silent.is_closed().await.unwrap());
    let took = clock::now() - start;
    assert!((ms(290)..ms(3000)).contains(&took), "{took:?}");
    drop(silent);
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn what_waits_in_the_backlog_is_served() {
    // No room for them, so that they wait there.
    let limits = limits().max_connections(1);
    let rig = Rig::of(shutdown_of(100, 3000, 500), limits, crate::app::app()).await;
    let mut first = Client::new(rig.addr).await;
    first.get("/").await;
    let mut waiting = Vec::new();
    for _ in 0..20 {
        let mut client = Client::new(rig.addr).await;
        client.send(get("/")).await.unwrap();
        waiting.push(client);
    }
    assert_eq!(rig.shutdown.connections(), 1);
    rig.trigger();
    for mut client in waiting {
        assert_eq!(client.answer().await.text(), "hello");
    }
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn what_ignores_the_notice_is_cut_and_reported() {
    let rig = Rig::of(shutdown_of(100, 1500, 700), limits(), crate::app::app()).await;
    let mut client = Client::new(rig.addr).await;
    client.send(get("/endless")).await.unwrap();
    let (status, _) = client.head().await.unwrap().unwrap();
    assert_eq!(status, 200);
    let start = rig.trigger();
    while let Ok(Some(_)) = client.chunk().await {}
    let took = clock::now() - start;
    assert!((ms(800)..ms(1450)).contains(&took), "{took:?}");
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 124);
    let [cut] = report.cut() else {
        panic!("{report}");
    };
    assert_eq!(cut.kind(), CutKind::Connection);
    assert!(cut.age() >= ms(800));
    assert!(cut.bytes().unwrap() > 300);
}

/// With the layer, too, which knows the request's name: once, not as a request
/// and as a connection that is busy with it.
#[tokio::test]
async fn what_is_cut_is_named_once() {
    let shutdown = shutdown_of(0, 900, 500);
    let named = DrainLayer::new(&shutdown).route("endless");
    let rig = Rig::of(shutdown, limits(), named.layer(crate::app::app())).await;
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut client = Client::new(rig.addr).await;
        client.send(get("/endless")).await.unwrap();
        client.head().await.unwrap().unwrap();
        clients.push(client);
    }
    rig.trigger();
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 124);
    let cut = report
        .cut()
        .iter()
        .map(|cut| (cut.kind(), cut.label().map(ToString::to_string)));
    let named = (CutKind::Request, Some("endless".to_owned()));
    assert_eq!(cut.collect::<Vec<_>>(), [named.clone(), named], "{report}");
}

/// A request that is named on one connection, and one that nobody names on
/// another, of another server: each is told of.
#[tokio::test]
async fn a_connection_is_told_of_unless_its_own_requests_are_named() {
    let shutdown = shutdown_of(0, 900, 500);
    let named = DrainLayer::new(&shutdown).route("endless");
    // Called on the first poll, as it is behind a router.
    let named = named.layer(crate::app::app());
    let named = tower::service_fn(move |request| named.clone().oneshot(request));
    let rig = Rig::of(shutdown.clone(), limits(), named).await;
    let other = Rig::of(shutdown, limits(), crate::app::app()).await;
    let mut clients = Vec::new();
    for addr in [rig.addr, other.addr] {
        let mut client = Client::new(addr).await;
        client.send(get("/endless")).await.unwrap();
        client.head().await.unwrap().unwrap();
        clients.push(client);
    }
    rig.trigger();
    let report = rig.ended().await;
    let cut = report.cut().iter().map(buttress_drain::Cut::kind);
    let kinds = [CutKind::Request, CutKind::Connection];
    assert_eq!(cut.collect::<Vec<_>>(), kinds, "{report}");
}

/// hyper does not read on a connection while what it has read is not used up.
#[tokio::test]
async fn a_cut_does_not_wait_for_a_read() {
    let rig = Rig::of(shutdown_of(0, 600, 300), limits(), crate::app::app()).await;
    let mut client = Client::new(rig.addr).await;
    let two = [get("/slow/60000"), get("/")].concat();
    client.send(two).await.unwrap();
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 1).await;
    tokio::time::sleep(ms(50)).await;
    rig.trigger();
    soon(shutdown.reached(Phase::Cut)).await;
    until(|| shutdown.connections() == 0).await;
    assert_eq!(rig.ended().await.exit_code(), 124);
}

#[tokio::test]
async fn idle_sockets_do_not_count_against_it() {
    // Never closed by the client, and never by the server before the cut.
    let limits = limits().linger(ms(60_000));
    let rig = Rig::of(shutdown_of(0, 600, 300), limits, crate::app::app()).await;
    let mut client = Client::new(rig.addr).await;
    client.get("/").await;
    rig.trigger();
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0);
    assert!(report.cut().is_empty(), "{report}");
    drop(client);
}

#[tokio::test]
async fn a_panic_ends_its_connection_and_its_count() {
    let rig = Rig::new().await;
    let mut client = Client::new(rig.addr).await;
    client.send(get("/panic")).await.unwrap();
    assert!(client.is_closed().await.unwrap_or(true));
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 0).await;
    let mut next = Client::new(rig.addr).await;
    assert_eq!(next.get("/").await.text(), "hello");
    drop(next);
    rig.trigger();
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn dropping_the_server_closes_its_listener_only() {
    let rig = Rig::new().await;
    let mut client = Client::new(rig.addr).await;
    client.get("/").await;
    rig.server.abort();
    let addr = rig.addr;
    soon(async {
        while TcpStream::connect(addr).await.is_ok() {
            tokio::time::sleep(ms(1)).await;
        }
    })
    .await;
    assert_eq!(client.get("/").await.text(), "hello");
    rig.shutdown.trigger("a test");
    assert!(client.get("/").await.closes());
    assert_eq!(soon(rig.driver).await.unwrap().exit_code(), 0);
}
