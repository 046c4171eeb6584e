//! gRPC streams that both sides have open when the signal comes, on our server
//! and on tonic's with ours under it.

use std::{future::Future, pin::pin, time::Duration};

use buttress_drain::{CutKind, DrainLayer, DrainSignal, Phase, Server, Shutdown, TonicIncoming};
use bytes::Bytes;
use tokio::{net::TcpListener, time::sleep};
use tonic::{
    Request, Streaming,
    service::Routes,
    transport::{Channel, server::Server as Tonic},
};
use tower::Layer;

use crate::{
    Rig, limits, ms, shutdown_of, soon,
    talk::{PATH, Say, Talk, talk},
    until,
};

#[derive(Clone, Copy, Debug)]
enum Stack {
    Ours,
    Tonic,
}

const ALL: [Stack; 2] = [Stack::Ours, Stack::Tonic];

async fn rig<H, F>(stack: Stack, shutdown: Shutdown, handler: H) -> Rig
where
    H: Fn(Request<Streaming<Bytes>>, Say) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let limits = limits().build().unwrap();
    // A route of gRPC is its path.
    let layer = DrainLayer::new(&shutdown).signal();
    let layer = layer.route_by(|head| head.uri.path().to_owned().into());
    match stack {
        Stack::Ours => {
            let routes = layer.layer(Routes::new(Talk(handler)).prepare());
            let server = Server::new(&shutdown).limits(limits);
            let server = server.serve(listener, routes);
            Rig::with(shutdown, addr, server)
        }
        Stack::Tonic => {
            let incoming = TonicIncoming::new(&shutdown, "tonic", listener, limits);
            let graceful = incoming.graceful();
            let server = Tonic::builder().layer(layer).add_service(Talk(handler));
            let server = server.serve_with_incoming_shutdown(incoming, graceful);
            Rig::with(shutdown, addr, async move { server.await.unwrap() })
        }
    }
}

async fn channel(rig: &Rig) -> Channel {
    let endpoint = Channel::from_shared(format!("http://{}", rig.addr)).unwrap();
    soon(endpoint.connect()).await.unwrap()
}

async fn hear(answer: &mut Streaming<Bytes>) -> Option<Bytes> {
    soon(answer.message()).await.unwrap()
}

/// Says what it hears, and when it is told of the drain that it wants to go;
/// until the client says that this was all.
async fn polite(request: Request<Streaming<Bytes>>, say: Say) {
    let drain = request.extensions().get::<DrainSignal>().cloned();
    let drain = drain.expect("the layer is there");
    let mut said = request.into_inner();
    let mut told = pin!(drain.notified());
    let mut going = false;
    loop {
        let heard = tokio::select! {
            heard = said.message() => heard,
            () = &mut told, if !going => {
                going = true;
                Ok(Some("to be brief".into()))
            }
        };
        let Ok(Some(heard)) = heard else { return };
        let all = heard == "that is all";
        if say.send(Ok(heard)).await.is_err() || all {
            return;
        }
    }
}

#[tokio::test]
async fn a_conversation_is_told_of_the_drain_and_counts_to_its_end() {
    for stack in ALL {
        let rig = rig(stack, shutdown_of(100, 10_000, 500), polite).await;
        let channel = channel(&rig).await;
        let (say, mut answer) = soon(talk(channel.clone())).await.unwrap();
        say.send("one".into()).await.unwrap();
        assert_eq!(hear(&mut answer).await.unwrap(), "one");
        assert_eq!(rig.shutdown.requests(), 1);

        rig.trigger();
        assert_eq!(hear(&mut answer).await.unwrap(), "to be brief", "{stack:?}");
        let shutdown = rig.shutdown.clone();
        soon(shutdown.reached(Phase::Closed)).await;
        // Nobody hurries it.
        sleep(ms(300)).await;
        assert_eq!(shutdown.phase(), Phase::Closed, "{stack:?}");
        assert_eq!((shutdown.requests(), shutdown.connections()), (1, 1));
        for text in ["two", "that is all"] {
            say.send(text.into()).await.unwrap();
            assert_eq!(hear(&mut answer).await.unwrap(), text, "{stack:?}");
        }
        // With the status, which is OK.
        assert_eq!(hear(&mut answer).await, None, "{stack:?}");
        until(|| shutdown.requests() == 0).await;
        let report = rig.ended().await;
        assert_eq!(report.exit_code(), 0, "{stack:?}: {report}");
        assert_eq!((report.requests_cut(), report.cut().len()), (0, 0));
        let took = report.drained_after();
        assert!((ms(395)..ms(5000)).contains(&took), "{stack:?}: {took:?}");
        drop((channel, say));
    }
}

async fn rude(request: Request<Streaming<Bytes>>, say: Say) {
    let _said = request.into_inner();
    while say.send(Ok("and".into())).await.is_ok() {
        sleep(ms(20)).await;
    }
}

/// Says one thing, and listens for ever.
async fn dumb(request: Request<Streaming<Bytes>>, say: Say) {
    let _ = say.send(Ok("and".into())).await;
    let mut said = request.into_inner();
    while let Ok(Some(_)) = said.message().await {}
}

async fn is_cut<H, F>(stack: Stack, handler: H, bytes: u64)
where
    H: Fn(Request<Streaming<Bytes>>, Say) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    const CUT: Duration = Duration::from_millis(900);
    let rig = rig(stack, shutdown_of(100, 1800, 900), handler).await;
    let channel = channel(&rig).await;
    let (say, mut answer) = soon(talk(channel.clone())).await.unwrap();
    assert_eq!(hear(&mut answer).await.unwrap(), "and");
    let start = rig.trigger();
    let lost = loop {
        match soon(answer.message()).await {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert!(lost.is_err(), "{stack:?}: it looks whole");
    let took = buttress_core::clock::now() - start;
    assert!(
        (CUT - ms(10)..CUT + ms(3000)).contains(&took),
        "{stack:?}: {took:?}"
    );
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 124, "{stack:?}: {report}");
    let [cut] = report.cut() else {
        panic!("{stack:?}: {report}");
    };
    assert_eq!((cut.kind(), report.requests_cut()), (CutKind::Request, 1));
    assert!(cut.label().is_some_and(|label| *label == PATH), "{report}");
    assert!(cut.age() >= CUT, "{report}");
    assert!(cut.bytes().unwrap() >= bytes, "{report}");
    drop((channel, say));
}

#[tokio::test]
async fn a_conversation_that_ignores_the_notice_is_cut_and_named() {
    for stack in ALL {
        // Five bytes before each message are gRPC's: 45 of them in that time,
        // of which a busy machine manages some.
        is_cut(stack, rude, 8 * 10).await;
        is_cut(stack, dumb, 8).await;
    }
}
