//! axum and tonic: on our server, and with ours under theirs.

use std::{future::IntoFuture, io, net::SocketAddr};

use axum::{
    Router,
    extract::ConnectInfo,
    routing::{any, get as on_get},
};
use buttress_core::clock;
use buttress_drain::{
    AxumListener, DrainLayer, Phase, Server, Shutdown, TcpConnectInfos, TonicIncoming,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tonic::{
    Code,
    service::Routes,
    transport::{Channel, server::TcpConnectInfo},
};
use tonic_health::{
    pb::{HealthCheckRequest, health_client::HealthClient, health_server::HealthServer},
    server::{HealthReporter, HealthService},
};

use crate::{
    LimitsBuilder, Rig,
    client::{Client, get},
    limits, ms, shutdown, shutdown_of, soon, until,
};

fn router() -> Router {
    Router::new()
        .route("/", on_get(|| async { "hello" }))
        .route(
            "/me",
            on_get(|ConnectInfo(addr): ConnectInfo<SocketAddr>| async move { addr.to_string() }),
        )
        .route(
            "/slow",
            on_get(|| async {
                sleep(ms(600)).await;
                "slow"
            }),
        )
        .route("/large", on_get(|| async { vec![0; 60_000_000] }))
        .route(
            "/echo",
            any(|mut request: axum::extract::Request| async move {
                tokio::spawn(async move {
                    let upgraded = hyper::upgrade::on(&mut request).await.unwrap();
                    let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
                let headers = [("connection", "upgrade"), ("upgrade", "echo")];
                (http::StatusCode::SWITCHING_PROTOCOLS, headers)
            }),
        )
}

async fn ours(shutdown: Shutdown) -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let app = router().into_make_service_with_connect_info::<SocketAddr>();
    let server = Server::new(&shutdown)
        .limits(limits().build().unwrap())
        .serve_with(listener, app);
    Rig::with(shutdown, addr, server)
}

async fn theirs(shutdown: Shutdown, limits: LimitsBuilder) -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let listener = AxumListener::new(&shutdown, "axum", listener, limits.build().unwrap());
    assert_eq!(axum::serve::Listener::local_addr(&listener).unwrap(), addr);
    let graceful = listener.graceful();
    let app = router()
        .layer(DrainLayer::new(&shutdown))
        .into_make_service_with_connect_info::<SocketAddr>();
    let server = axum::serve(listener.with_connect_info(), app).with_graceful_shutdown(graceful);
    let server = server.into_future();
    Rig::with(shutdown, addr, async move { server.await.unwrap() })
}

#[tokio::test]
async fn axum_knows_its_peers_on_both() {
    for rig in [ours(shutdown()).await, theirs(shutdown(), limits()).await] {
        let mut client = Client::new(rig.addr).await;
        let me = client.io.get_ref().local_addr().unwrap();
        assert_eq!(client.get("/me").await.text(), me.to_string());
    }
}

#[tokio::test]
async fn axum_is_drained_on_both() {
    for rig in [ours(shutdown()).await, theirs(shutdown(), limits()).await] {
        let mut idle = Client::new(rig.addr).await;
        assert!(!idle.get("/").await.closes());
        let mut busy = Client::new(rig.addr).await;
        busy.send(get("/slow")).await.unwrap();
        let shutdown = rig.shutdown.clone();
        until(|| shutdown.connections() == 2).await;
        rig.trigger();
        let mut new = Client::new(rig.addr).await;
        assert!(new.get("/").await.closes());
        assert!(new.is_closed().await.unwrap());
        assert!(idle.is_closed().await.unwrap());
        let addr = rig.addr;
        soon(shutdown.reached(Phase::Closed)).await;
        let refused = soon(TcpStream::connect(addr)).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let answer = busy.answer().await;
        assert!(answer.closes());
        assert_eq!(answer.text(), "slow");
        drop((idle, new, busy));
        let report = rig.ended().await;
        assert_eq!(report.exit_code(), 0, "{report}");
        assert!(report.drained_after() < ms(1400));
    }
}

#[tokio::test]
async fn tunnels_of_axum_are_waited_for_and_cut_on_both() {
    for of in [(0, 1000, 500), (0, 8000, 500)] {
        let shutdown = || shutdown_of(of.0, of.1, of.2);
        let rigs = [ours(shutdown()).await, theirs(shutdown(), limits()).await];
        // axum's own knows of no upgrades.
        for (rig, code) in rigs.into_iter().zip([124, 0]) {
            let mut client = Client::new(rig.addr).await;
            let upgrade =
                "GET /echo HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
            client.send(upgrade).await.unwrap();
            assert_eq!(client.head().await.unwrap().unwrap().0, 101);
            let shutdown = rig.shutdown.clone();
            rig.trigger();
            soon(shutdown.reached(Phase::Closed)).await;
            sleep(ms(100)).await;
            client.send("ping").await.unwrap();
            let mut echo = [0; 4];
            soon(client.io.read_exact(&mut echo)).await.unwrap();
            assert_eq!(shutdown.connections(), 1);
            if of.1 == 1000 {
                let _ = soon(client.io.read_to_end(&mut Vec::new())).await;
                until(|| shutdown.connections() == 0).await;
                assert_eq!(shutdown.phase().max(Phase::Cut), shutdown.phase());
            } else {
                drop(client);
            }
            let report = rig.ended().await;
            let cut = of.1 == 1000;
            assert_eq!(report.exit_code(), if cut { code } else { 0 }, "{report}");
            assert!(report.drained_after() < ms(3000), "{report}");
        }
    }
}

/// The layer's part is over when axum has the whole of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_cut_is_reported_on_both() {
    let shutdown = || shutdown_of(0, 1000, 500);
    for rig in [ours(shutdown()).await, theirs(shutdown(), limits()).await] {
        let mut client = Client::new(rig.addr).await;
        client.send(get("/large")).await.unwrap();
        assert_eq!(client.head().await.unwrap().unwrap().0, 200);
        sleep(ms(100)).await;
        assert_eq!(rig.shutdown.requests(), 0);
        rig.trigger();
        crate::unsent::assert_cut(&rig.ended().await);
        drop(client);
    }
}

/// What has come on a fresh connection is answered; one that has sent nothing
/// has its moment.
#[tokio::test]
async fn axum_hears_of_the_end_after_the_first_bytes() {
    let rig = theirs(shutdown_of(0, 5000, 500), limits()).await;
    let silent = Client::new(rig.addr).await;
    let mut clients = Vec::new();
    for _ in 0..20 {
        let mut client = Client::new(rig.addr).await;
        client.send(get("/")).await.unwrap();
        clients.push(client);
    }
    let start = rig.trigger();
    for client in &mut clients {
        assert_eq!(client.answer().await.text(), "hello");
    }
    drop(clients);
    assert_eq!(rig.ended().await.exit_code(), 0);
    let took = clock::now() - start;
    assert!((ms(290)..ms(3000)).contains(&took), "{took:?}");
    drop(silent);
}

#[tokio::test]
async fn axum_never_resets() {
    let rig = theirs(shutdown_of(5, 10_000, 500), limits()).await;
    let mut clients = Vec::new();
    for _ in 0..100 {
        let mut client = Client::new(rig.addr).await;
        client.get("/").await;
        clients.push(client);
    }
    rig.trigger();
    let tasks = clients.into_iter().enumerate().map(|(n, mut client)| {
        tokio::spawn(async move {
            sleep(std::time::Duration::from_micros(n as u64 * 150)).await;
            // Its FIN is no trouble to who sends: only a reset is.
            client.send(get("/")).await.unwrap();
            // Answered, or closed without an answer.
            client.try_answer("GET").await.unwrap();
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        soon(task).await.unwrap();
    }
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn what_axum_has_closed_lingers() {
    let rig = theirs(shutdown_of(0, 5000, 500), limits().linger(ms(600))).await;
    let mut idle = Client::new(rig.addr).await;
    idle.get("/").await;
    rig.trigger();
    crate::races::assert_lingers(&mut idle).await;
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0);
    assert!(report.drained_after() < ms(3000));
}

#[tokio::test]
async fn axum_accepts_no_more_than_the_limit() {
    let rig = theirs(shutdown(), limits().max_connections(1)).await;
    let mut first = Client::new(rig.addr).await;
    first.get("/").await;
    let mut second = Client::new(rig.addr).await;
    second.send(get("/")).await.unwrap();
    sleep(ms(100)).await;
    assert_eq!(rig.shutdown.connections(), 1);
    drop(first);
    assert_eq!(second.answer().await.text(), "hello");
}

fn health() -> (HealthReporter, HealthServer<HealthService>) {
    let reporter = HealthReporter::new();
    let service = HealthService::from_health_reporter(reporter.clone());
    (reporter, HealthServer::new(service))
}

async fn channel(addr: SocketAddr) -> HealthClient<Channel> {
    let channel = Channel::from_shared(format!("http://{addr}")).unwrap();
    HealthClient::new(soon(channel.connect()).await.unwrap())
}

/// A call that ends by itself and one that goes on until it is told.
async fn grpc(rig: Rig, reporter: HealthReporter) {
    let mut client = channel(rig.addr).await;
    let overall = || HealthCheckRequest {
        service: String::new(),
    };
    let checked = soon(client.check(overall())).await.unwrap();
    assert_eq!(checked.into_inner().status, 1);
    let mut watch = soon(client.watch(overall())).await.unwrap().into_inner();
    assert_eq!(soon(watch.message()).await.unwrap().unwrap().status, 1);
    rig.trigger();
    let shutdown = rig.shutdown.clone();
    soon(shutdown.reached(Phase::Closed)).await;
    // Taken before the GOAWAY, heard of after it.
    let stopped = tonic_health::ServingStatus::NotServing;
    reporter.set_service_status("", stopped).await;
    assert_eq!(soon(watch.message()).await.unwrap().unwrap().status, 2);
    drop((watch, client));
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0, "{report}");
}

#[tokio::test]
async fn tonic_is_drained_on_ours() {
    let (reporter, service) = health();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let shutdown = shutdown_of(200, 5000, 500);
    let server = Server::new(&shutdown)
        .limits(limits().build().unwrap())
        .serve_with(listener, TcpConnectInfos(Routes::new(service).prepare()));
    grpc(Rig::with(shutdown, addr, server), reporter).await;
}

#[tokio::test]
async fn tonic_is_drained_with_ours_under_it() {
    let (reporter, service) = health();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let shutdown = shutdown_of(200, 5000, 500);
    let incoming = TonicIncoming::new(&shutdown, "tonic", listener, limits().build().unwrap());
    let graceful = incoming.graceful();
    let server = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, graceful);
    grpc(
        Rig::with(shutdown, addr, async move { server.await.unwrap() }),
        reporter,
    )
    .await;
}

/// By an interceptor, which refuses whom it does not know.
#[tokio::test]
async fn tonic_knows_its_peers_on_both() {
    let known = |request: tonic::Request<()>| {
        let info = request.extensions().get::<TcpConnectInfo>().cloned();
        let info = info.ok_or_else(|| tonic::Status::internal("no connect info"))?;
        let told = format!("{} {}", info.remote_addr.unwrap(), info.local_addr.unwrap());
        assert_eq!(request.remote_addr(), info.remote_addr);
        Err(tonic::Status::new(Code::Unauthenticated, told))
    };
    let (_reporter, service) = health();
    let service = tonic::service::interceptor::InterceptedService::new(service, known);

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ours = listener.local_addr().unwrap();
    let shutdown = shutdown();
    let routes = Routes::new(service.clone()).prepare();
    let server = Server::new(&shutdown).serve_with(listener, TcpConnectInfos(routes));
    tokio::spawn(server);

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let theirs = listener.local_addr().unwrap();
    let incoming = TonicIncoming::new(&shutdown, "tonic", listener, limits().build().unwrap());
    let graceful = incoming.graceful();
    let server = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, graceful);
    tokio::spawn(server);

    for addr in [ours, theirs] {
        let mut client = channel(addr).await;
        let request = HealthCheckRequest {
            service: String::new(),
        };
        let refused = soon(client.check(request)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
        let told = refused.message();
        assert!(told.starts_with("127.0.0.1:"), "{told}");
        assert!(told.ends_with(&addr.to_string()), "{told}");
    }
}
