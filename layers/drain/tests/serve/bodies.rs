//! To the last byte.

use std::{
    io::{Cursor, Read},
    time::Duration,
};

use tokio::time::timeout;

use crate::{
    Rig,
    app::{app, byte},
    client::{Client, get},
    limits, ms, shutdown_of, until,
};

const SIZE: usize = 10 * 1024 * 1024;

fn assert_whole(body: &[u8]) {
    assert_eq!(body.len(), SIZE);
    let wrong = (0..SIZE).find(|n| body[*n] != byte(*n));
    assert_eq!(wrong, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paced_download_arrives_whole() {
    let rig = Rig::of(shutdown_of(100, 10_000, 500), limits(), app()).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = Client::new(rig.addr).await;
        client.send(get(&format!("/paced/{SIZE}"))).await.unwrap();
        clients.push(client);
    }
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 4).await;
    tokio::time::sleep(ms(50)).await;
    rig.trigger();
    let downloads = clients.into_iter().map(|mut client| {
        tokio::spawn(async move {
            assert_whole(&client.answer().await.body);
            assert!(client.is_closed().await.unwrap());
        })
    });
    for download in downloads.collect::<Vec<_>>() {
        download.await.unwrap();
    }
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// What hyper has not flushed yet when the handler is done with it, and what
/// the client has not read yet when the server is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_of_single_bytes_gets_the_tail() {
    let rig = Rig::of(shutdown_of(0, 110_000, 500), limits(), app()).await;
    let mut client = Client::new(rig.addr).await;
    client.send(get(&format!("/paced/{SIZE}"))).await.unwrap();
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 1).await;
    let mut io = client.io.into_inner().into_std().unwrap();
    io.set_nonblocking(false).unwrap();
    // A system call for each byte of it, from the first of the head on: a
    // thread's work for some seconds.
    let reader = tokio::task::spawn_blocking(move || {
        let mut all = Vec::with_capacity(SIZE + SIZE / 64);
        let mut single = [0];
        while io.read(&mut single).unwrap() == 1 {
            all.push(single[0]);
        }
        all
    });
    tokio::time::sleep(ms(50)).await;
    rig.trigger();
    let all = timeout(Duration::from_secs(100), reader).await.unwrap();
    let mut all = Client::over(Cursor::new(all.unwrap()));
    assert_whole(&all.answer().await.body);
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn answers_without_a_body_count_no_longer_than_they_take() {
    let rig = Rig::new().await;
    let mut client = Client::new(rig.addr).await;
    for (method, path, status) in [
        ("HEAD", "/", 200),
        ("HEAD", "/paced/100000", 200),
        ("HEAD", "/endless", 200),
        ("GET", "/odd/204", 204),
        ("GET", "/odd/304", 304),
        ("GET", "/nothing", 204),
        ("GET", "/same", 304),
    ] {
        let request = format!("{method} {path} HTTP/1.1\r\nhost: test\r\n\r\n");
        client.send(request).await.unwrap();
        let answer = client.try_answer(method).await.unwrap().unwrap();
        assert_eq!((answer.status, answer.body.len()), (status, 0), "{path}");
    }
    // If one of them counted still, this would be cut.
    rig.trigger();
    assert!(client.is_closed().await.unwrap());
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0);
    assert!(report.drained_after() < ms(1400));
}

/// An answer that comes before the request's body has: closed at once, the
/// socket would be reset, and the answer lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_answer_is_not_lost_to_a_reset() {
    let rig = Rig::new().await;
    for _ in 0..20 {
        let mut client = Client::new(rig.addr).await;
        let head = "POST /ignored HTTP/1.1\r\nhost: test\r\ncontent-length: 200000\r\n\r\n";
        client.send(head).await.unwrap();
        client.send(vec![b'x'; 100_000]).await.unwrap();
        tokio::time::sleep(ms(2)).await;
        let _ = client.send(vec![b'x'; 100_000]).await;
        assert_eq!(client.answer().await.text(), "ignored");
        assert!(client.is_closed().await.unwrap());
    }
    rig.trigger();
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn an_upload_goes_on_through_the_drain() {
    let rig = Rig::of(shutdown_of(50, 4000, 500), limits(), app()).await;
    let mut client = Client::new(rig.addr).await;
    let head = "POST /size HTTP/1.1\r\nhost: test\r\ncontent-length: 100000\r\n\r\n";
    client.send(head).await.unwrap();
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 1).await;
    rig.trigger();
    for _ in 0..10 {
        tokio::time::sleep(ms(50)).await;
        client.send(vec![b'x'; 10_000]).await.unwrap();
    }
    let answer = client.answer().await;
    assert_eq!(answer.text(), "100000");
    assert!(answer.closes());
    assert_eq!(rig.ended().await.exit_code(), 0);
}
