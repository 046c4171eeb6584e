//! What a handler is done with, and the client has not taken yet.

use std::net::SocketAddr;

use buttress_drain::{CutKind, Report};
use tokio::{
    io::AsyncReadExt,
    net::{TcpSocket, TcpStream},
    time::sleep,
};

use crate::{
    Rig,
    app::{app, byte},
    client::{Client, get},
    limits, ms, shutdown_of, soon,
};

const SIZE: usize = 6_000_000;

/// About 3 MB/s.
async fn pace(bytes: usize) {
    sleep(ms(bytes as u64 / 3000)).await;
}

/// That the system keeps little of it.
async fn narrow(addr: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 * 1024).unwrap();
    soon(socket.connect(addr)).await.unwrap()
}

fn assert_whole(body: &[u8], of: usize) {
    assert_eq!(body.len(), of);
    assert!((0..of).all(|n| body[n] == byte(n)));
}

struct Http2 {
    /// As long as it is there, the client does not close by itself.
    _send: h2::client::SendRequest<bytes::Bytes>,
    body: h2::RecvStream,
}

impl Http2 {
    async fn get(addr: SocketAddr, path: &str) -> Self {
        let io = soon(TcpStream::connect(addr)).await.unwrap();
        let (mut send, connection) = h2::client::handshake(io).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::get(format!("http://test{path}"));
        let (answer, _) = send.send_request(request.body(()).unwrap(), true).unwrap();
        let answer = soon(answer).await.unwrap();
        assert_eq!(answer.status(), 200);
        let body = answer.into_body();
        Self { _send: send, body }
    }

    async fn rest(&mut self) -> Result<Vec<u8>, h2::Error> {
        let mut all = Vec::new();
        while let Some(chunk) = soon(self.body.data()).await {
            let chunk = chunk?;
            all.extend_from_slice(&chunk);
            pace(chunk.len()).await;
            self.body.flow_control().release_capacity(chunk.len())?;
        }
        Ok(all)
    }
}

async fn http1(addr: SocketAddr, path: &str) -> Client {
    let mut client = Client::over(narrow(addr).await);
    client.send(get(path)).await.unwrap();
    let (status, _) = client.head().await.unwrap().unwrap();
    assert_eq!(status, 200);
    client
}

async fn rest(client: &mut Client, of: usize) -> Vec<u8> {
    let mut all = Vec::new();
    let mut some = vec![0; 32 * 1024];
    while all.len() < of {
        let read = soon(client.io.read(&mut some)).await.unwrap();
        assert!(read > 0, "closed after {} bytes", all.len());
        all.extend_from_slice(&some[..read]);
        pace(read).await;
    }
    all
}

/// Neither the drain nor what limits an idle connection ends it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_gets_all_of_an_answer_that_was_given_at_once() {
    for drained in [true, false] {
        let limits = limits().header_timeout(ms(300)).idle_timeout(ms(300));
        let rig = Rig::of(shutdown_of(0, 15_000, 500), limits, app()).await;
        let path = format!("/full/{SIZE}");
        let mut two = Http2::get(rig.addr, &path).await;
        let mut one = http1(rig.addr, &path).await;
        if drained {
            rig.trigger();
        }
        let (two, one) = tokio::join!(two.rest(), rest(&mut one, SIZE));
        assert_whole(&two.unwrap(), SIZE);
        assert_whole(&one, SIZE);
        if drained {
            let report = rig.ended().await;
            assert_eq!(report.exit_code(), 0, "{report}");
        }
    }
}

pub(crate) fn assert_cut(report: &Report) {
    assert_eq!(report.exit_code(), 124, "{report}");
    let [cut] = report.cut() else {
        panic!("{report}");
    };
    assert_eq!(cut.kind(), CutKind::Connection, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_deadline_cuts_of_it_is_reported() {
    // More than the system's buffers take.
    let path = "/full/60000000";
    let of = || shutdown_of(0, 1500, 500);

    let rig = Rig::of(of(), limits(), app()).await;
    let mut two = Http2::get(rig.addr, path).await;
    rig.trigger();
    assert!(two.rest().await.is_err());
    assert_cut(&rig.ended().await);

    let rig = Rig::of(of(), limits(), app()).await;
    let one = http1(rig.addr, path).await;
    sleep(ms(100)).await;
    rig.trigger();
    assert_cut(&rig.ended().await);
    drop(one);
}

/// An idle connection is known as one again when the last of it is written.
#[tokio::test]
async fn when_it_is_written_the_connection_is_idle() {
    let limits = limits().header_timeout(ms(200)).idle_timeout(ms(300));
    let rig = Rig::of(shutdown_of(0, 15_000, 500), limits, app()).await;
    let mut two = Http2::get(rig.addr, "/full/1000000").await;
    assert_whole(&two.rest().await.unwrap(), 1_000_000);
    crate::until(|| rig.shutdown.connections() == 0).await;
}
