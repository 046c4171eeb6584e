//! A request that arrives as its connection is closed.

use std::io::ErrorKind;

use tokio::io::AsyncWriteExt;

use crate::{
    Rig,
    app::app,
    client::{Client, get},
    limits, ms, shutdown_of, soon, until,
};

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Answered,
    /// A FIN before any byte of an answer: a client may send it again.
    Closed,
    Reset,
}

async fn fate(client: &mut Client) -> Fate {
    match client.try_answer("GET").await {
        Ok(Some(answer)) => {
            assert_eq!(answer.text(), "hello");
            Fate::Answered
        }
        Ok(None) => Fate::Closed,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            Fate::Reset
        }
    }
}

/// The bytes are in the kernel before the listener is told to close: each is
/// answered, 1000 times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_arrived_is_answered() {
    for round in 0..10 {
        let rig = Rig::of(shutdown_of(0, 10_000, 500), limits(), app()).await;
        let mut clients = Vec::new();
        for n in 0..100 {
            let mut client = Client::new(rig.addr).await;
            // Half of them have been used before.
            if n % 2 == 0 {
                client.get("/").await;
            }
            clients.push(client);
        }
        let shutdown = rig.shutdown.clone();
        until(|| shutdown.connections() == 100).await;
        for client in &mut clients {
            client.send(get("/")).await.unwrap();
        }
        rig.trigger();
        for (n, client) in clients.iter_mut().enumerate() {
            assert_eq!(fate(client).await, Fate::Answered, "{round}: {n}");
        }
        drop(clients);
        assert_eq!(rig.ended().await.exit_code(), 0);
    }
}

/// The server's threads are kept busy, so that the runtime has heard nothing of
/// the bytes when it closes: only a look at the socket itself tells.
#[test]
fn what_the_runtime_has_not_heard_of_is_answered() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    for _ in 0..50 {
        runtime.block_on(async {
            let rig = Rig::of(shutdown_of(0, 10_000, 500), limits(), app()).await;
            let mut clients = Vec::new();
            for _ in 0..20 {
                let mut client = Client::new(rig.addr).await;
                client.get("/").await;
                clients.push(client);
            }
            // All within one turn of the only thread there is: the driver is
            // at the listeners' end when it is next polled, and so is every
            // connection.
            for client in &mut clients {
                let sent = client.io.get_ref().try_write(get("/").as_bytes());
                assert_eq!(sent.unwrap(), get("/").len());
            }
            rig.trigger();
            for client in &mut clients {
                assert_eq!(fate(client).await, Fate::Answered);
            }
            drop(clients);
            assert_eq!(rig.ended().await.exit_code(), 0);
        });
    }
}

/// At any moment around the close: answered or closed, never reset.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_crosses_the_close_is_not_reset() {
    let (mut answered, mut closed) = (0, 0);
    for round in 0..10 {
        let rig = Rig::of(shutdown_of(5, 10_000, 500), limits(), app()).await;
        let mut clients = Vec::new();
        for n in 0..100_u64 {
            let mut client = Client::new(rig.addr).await;
            if n % 4 != 0 {
                client.get("/").await;
            }
            clients.push((n, client));
        }
        rig.trigger();
        let fates = clients.into_iter().map(|(n, mut client)| {
            tokio::spawn(async move {
                let wait = std::time::Duration::from_micros(n * 150);
                tokio::time::sleep(wait).await;
                match client.send(get("/")).await {
                    Ok(()) => fate(&mut client).await,
                    // Its FIN is no trouble to who sends: only a reset is.
                    Err(error) => {
                        let kinds = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
                        assert!(kinds.contains(&error.kind()), "{error}");
                        Fate::Reset
                    }
                }
            })
        });
        for task in fates.collect::<Vec<_>>() {
            match soon(task).await.unwrap() {
                Fate::Answered => answered += 1,
                Fate::Closed => closed += 1,
                Fate::Reset => panic!("reset in round {round}"),
            }
        }
        assert_eq!(rig.ended().await.exit_code(), 0);
    }
    assert_eq!(answered + closed, 1000);
    assert!(answered > 300, "{answered}");
    assert!(closed > 0, "nothing crossed the close");
}

/// What is sent after the FIN, before the client has heard of it, is taken and
/// thrown away: had the socket been closed at once, the first of these would be
/// answered by a reset, and the second would fail.
pub(crate) async fn assert_lingers(client: &mut Client) {
    assert!(client.is_closed().await.unwrap());
    for _ in 0..3 {
        client.send(get("/")).await.unwrap();
        tokio::time::sleep(ms(30)).await;
    }
    assert!(client.is_closed().await.unwrap());
}

#[tokio::test]
async fn a_closed_connection_lingers() {
    let limits = || limits().linger(ms(600)).idle_timeout(ms(200));
    let rig = Rig::of(shutdown_of(0, 5000, 500), limits(), app()).await;
    // Idle for too long.
    let mut client = Client::new(rig.addr).await;
    client.get("/").await;
    assert_lingers(&mut client).await;
    // Closed by the client's wish, and by the drain.
    let mut asked = Client::new(rig.addr).await;
    asked
        .send("GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(asked.answer().await.text(), "hello");
    assert_lingers(&mut asked).await;
    let mut idle = Client::new(rig.addr).await;
    idle.get("/").await;
    rig.trigger();
    assert_lingers(&mut idle).await;
    // And not for long.
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0);
    assert!(report.drained_after() < ms(3000));
    drop((client, asked, idle));
}

/// A head of which a part has come is waited for.
#[tokio::test]
async fn half_a_head_is_not_closed_on() {
    let rig = Rig::of(shutdown_of(0, 5000, 500), limits(), app()).await;
    let mut client = Client::new(rig.addr).await;
    client.get("/").await;
    let request = get("/");
    let (first, rest) = request.split_at(9);
    client.send(first).await.unwrap();
    tokio::time::sleep(ms(50)).await;
    rig.trigger();
    tokio::time::sleep(ms(400)).await;
    client.send(rest).await.unwrap();
    let answer = client.answer().await;
    assert_eq!(answer.text(), "hello");
    assert!(answer.closes());
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// So is one that came with the request before it, of which nobody but hyper
/// knows.
#[tokio::test]
async fn half_a_head_that_was_sent_ahead_is_not_closed_on() {
    let rig = Rig::of(shutdown_of(0, 5000, 500), limits(), app()).await;
    let mut client = Client::new(rig.addr).await;
    client.send(get("/slow/100")).await.unwrap();
    let request = get("/");
    let (first, rest) = request.split_at(9);
    tokio::time::sleep(ms(30)).await;
    client.send(first).await.unwrap();
    assert!(!client.answer().await.closes());
    rig.trigger();
    // Longer than the moment of who may have sent nothing.
    tokio::time::sleep(ms(500)).await;
    client.send(rest).await.unwrap();
    assert_eq!(client.answer().await.text(), "hello");
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// The same in one read with the request before it, which is over when the rest
/// comes.
#[tokio::test]
async fn half_a_head_in_one_read_with_another_is_not_closed_on() {
    let rig = Rig::of(shutdown_of(0, 5000, 500), limits(), app()).await;
    let mut client = Client::new(rig.addr).await;
    let two = [get("/"), get("/")].concat();
    let (first, rest) = two.split_at(get("/").len() + 9);
    client.send(first).await.unwrap();
    assert_eq!(client.answer().await.text(), "hello");
    rig.trigger();
    tokio::time::sleep(ms(500)).await;
    client.send(rest).await.unwrap();
    assert_eq!(client.answer().await.text(), "hello");
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// And what ends with its head is idle, at once: with a body in the same read
/// nobody can tell, and it has a moment.
#[tokio::test]
async fn a_request_with_a_body_in_one_read_holds_no_drain() {
    let rig = Rig::of(shutdown_of(0, 5000, 500), limits(), app()).await;
    let mut client = Client::new(rig.addr).await;
    let post = "POST /size HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\n12345";
    client.send(post).await.unwrap();
    assert_eq!(client.answer().await.text(), "5");
    rig.trigger();
    assert!(client.is_closed().await.unwrap());
    drop(client);
    let report = rig.ended().await;
    assert!(report.drained_after() < ms(2000), "{report}");
}

/// A client that has closed its half, as some do after their last request.
#[tokio::test]
async fn a_client_that_is_gone_is_no_trouble() {
    let rig = Rig::new().await;
    for _ in 0..20 {
        let mut client = Client::new(rig.addr).await;
        client.get("/").await;
        client.io.get_mut().shutdown().await.unwrap();
        assert!(client.is_closed().await.unwrap());
    }
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 0).await;
    rig.trigger();
    assert_eq!(rig.ended().await.exit_code(), 0);
}
