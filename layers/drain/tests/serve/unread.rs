//! axum and tonic close a connection whether bytes have arrived on it or not.
//! With ours under them its client reads a FIN, and is never reset.

use std::{future::IntoFuture, time::Duration};

use axum::{Router, routing::any_service};
use buttress_drain::{AxumListener, DrainLayer, Shutdown, TonicIncoming};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Builder,
    task::JoinSet,
};
use tonic::{service::Routes, transport::Server as Tonic};

use crate::{
    LimitsBuilder, Rig,
    app::app_of,
    client::{Client, get},
    http2::{Frames, crosses_the_close},
    limits, ms, shutdown_of,
};

#[derive(Clone, Copy, Debug)]
enum Stack {
    Axum,
    Tonic,
}

const BOTH: [Stack; 2] = [Stack::Axum, Stack::Tonic];

async fn rig(stack: Stack, shutdown: Shutdown, limits: LimitsBuilder) -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let limits = limits.build().unwrap();
    let app = any_service(app_of());
    let router = Router::new().route("/", app.clone()).route("/{*path}", app);
    let router = router.layer(DrainLayer::new(&shutdown));
    match stack {
        Stack::Axum => {
            let listener = AxumListener::new(&shutdown, "axum", listener, limits);
            let graceful = listener.graceful();
            let served = axum::serve(listener, router).with_graceful_shutdown(graceful);
            let served = served.into_future();
            Rig::with(shutdown, addr, async move { served.await.unwrap() })
        }
        Stack::Tonic => {
            let incoming = TonicIncoming::new(&shutdown, "tonic", listener, limits);
            let graceful = incoming.graceful();
            let served = Tonic::builder()
                // gRPC-Web's.
                .accept_http1(true)
                .add_routes(Routes::from(router))
                .serve_with_incoming_shutdown(incoming, graceful);
            Rig::with(shutdown, addr, async move { served.await.unwrap() })
        }
    }
}

/// A reset that comes after the FIN is seen by nobody who reads: it is left in
/// the socket.
async fn assert_no_reset(io: &TcpStream) {
    tokio::time::sleep(ms(20)).await;
    let error = io.take_error().unwrap();
    assert!(error.is_none(), "{error:?}");
}

/// Whether it was answered before it was closed.
async fn answered(client: &mut Client) -> bool {
    // A reset would be an error.
    let answer = client.try_answer("POST").await.unwrap();
    if let Some(answer) = &answer {
        assert_eq!(answer.status, 200);
    }
    assert!(client.is_closed().await.unwrap());
    assert_no_reset(client.io.get_ref()).await;
    answer.is_some()
}

/// The server's only thread hears of the bytes and of the end at the same time.
/// 400 of them on each.
#[test]
fn what_was_not_read_at_the_close_is_no_reason_for_a_reset() {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let upload = vec![b'x'; 60_000];
    let head = "POST /size HTTP/1.1\r\nhost: test\r\ncontent-length: 60000\r\n\r\n";
    let upload = [head.as_bytes(), &upload].concat();
    for stack in BOTH {
        let mut closed = 0;
        for _ in 0..20 {
            runtime.block_on(async {
                // The linger outlasts what the clients take to look.
                let limits = limits().linger(ms(2000));
                let rig = rig(stack, shutdown_of(0, 10_000, 500), limits).await;
                let mut clients = Vec::new();
                for _ in 0..20 {
                    let mut client = Client::new(rig.addr).await;
                    client.get("/").await;
                    clients.push(client);
                }
                for (n, client) in clients.iter().enumerate() {
                    let request = match n % 2 {
                        0 => get("/").into_bytes(),
                        _ => upload.clone(),
                    };
                    let sent = client.io.get_ref().try_write(&request);
                    assert_eq!(sent.unwrap(), request.len());
                }
                rig.trigger();
                let mut looking = JoinSet::new();
                for mut client in clients {
                    looking.spawn(async move { answered(&mut client).await });
                }
                for answered in looking.join_all().await {
                    closed += usize::from(!answered);
                }
                let report = rig.ended().await;
                assert_eq!(report.exit_code(), 0, "{stack:?}: {report}");
                assert!(report.drained_after() < ms(1500), "{report}");
            });
        }
        assert!(closed > 0, "{stack:?}: nothing was left unread");
    }
}

/// Of HTTP/2 what is sent behind the answer to the last PING: 200 of them on
/// each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_that_cross_the_last_goaway_are_no_reason_for_a_reset() {
    for stack in BOTH {
        for _ in 0..10 {
            let limits = limits().linger(ms(2000));
            let rig = rig(stack, shutdown_of(0, 10_000, 500), limits).await;
            let mut clients = Vec::new();
            for _ in 0..20 {
                let mut client = Frames::new(rig.addr).await;
                client.get(1, "/").await;
                assert_eq!(client.answer(1).await, b"hello");
                clients.push(client);
            }
            let mut crossing = JoinSet::new();
            for (n, client) in clients.into_iter().enumerate() {
                let wait = Duration::from_micros(n as u64 * 50);
                crossing.spawn(async move {
                    let io = crosses_the_close(client, wait).await;
                    assert_no_reset(&io).await;
                });
            }
            rig.trigger();
            crossing.join_all().await;
            let report = rig.ended().await;
            assert_eq!(report.exit_code(), 0, "{stack:?}: {report}");
            assert!(report.drained_after() < ms(1900), "{report}");
        }
    }
}

/// After the FIN, for as long as it lingers.
#[tokio::test]
async fn what_tonic_has_closed_lingers() {
    let limits = limits().linger(ms(600));
    let rig = rig(Stack::Tonic, shutdown_of(0, 5000, 500), limits).await;
    let mut idle = Client::new(rig.addr).await;
    idle.get("/").await;
    rig.trigger();
    crate::races::assert_lingers(&mut idle).await;
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0);
    assert!(report.drained_after() < ms(3000));
}
