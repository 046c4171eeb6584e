//! HTTP/2, frame by frame.

use std::{io, net::SocketAddr, time::Duration};

use buttress_core::clock;
use buttress_drain::Phase;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{Rig, app::app, limits, ms, shutdown, shutdown_of, soon, until};

pub(crate) const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;

const END: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

const ANY_STREAM: u32 = 0x7fff_ffff;

/// A client that answers nothing by itself but settings.
pub(crate) struct Frames<I = TcpStream> {
    io: I,
}

#[derive(Debug)]
pub(crate) struct Frame {
    kind: u8,
    flags: u8,
    pub(crate) stream: u32,
    payload: Vec<u8>,
}

impl Frame {
    fn last_stream(&self) -> u32 {
        assert_eq!(self.kind, GOAWAY);
        assert_eq!(self.payload[4..8], [0; 4], "an error: {self:?}");
        u32::from_be_bytes(self.payload[..4].try_into().unwrap())
    }
}

impl Frames {
    pub(crate) async fn new(addr: SocketAddr) -> Self {
        let io = soon(TcpStream::connect(addr)).await.unwrap();
        io.set_nodelay(true).unwrap();
        Self::over(io).await
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> Frames<I> {
    pub(crate) async fn over(mut io: I) -> Self {
        io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await
            .unwrap();
        let mut frames = Self { io };
        frames.send(SETTINGS, 0, 0, &[]).await;
        frames
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.io.write_all(&frame).await.unwrap();
        self.io.flush().await.unwrap();
    }

    pub(crate) async fn get(&mut self, stream: u32, path: &str) {
        // GET by the static table.
        self.ask(stream, &[0x82], path).await;
    }

    async fn ask(&mut self, stream: u32, method: &[u8], path: &str) {
        // http, and literals by the static table.
        let mut head = [method, &[0x86, 0x04, u8::try_from(path.len()).unwrap()]].concat();
        head.extend(path.as_bytes());
        head.extend([0x01, 4]);
        head.extend(b"test");
        self.send(HEADERS, END | END_HEADERS, stream, &head).await;
    }

    /// `None` at the end.
    async fn next(&mut self) -> io::Result<Option<Frame>> {
        loop {
            let mut head = [0; 9];
            if soon(self.io.read(&mut head[..1])).await? == 0 {
                return Ok(None);
            }
            soon(self.io.read_exact(&mut head[1..])).await?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            soon(self.io.read_exact(&mut payload)).await?;
            let frame = Frame {
                kind: head[3],
                flags: head[4],
                stream: u32::from_be_bytes(head[5..9].try_into().unwrap()),
                payload,
            };
            match (frame.kind, frame.flags & ACK) {
                (SETTINGS, 0) => self.send(SETTINGS, ACK, 0, &[]).await,
                (SETTINGS, _) => {}
                _ => return Ok(Some(frame)),
            }
        }
    }

    pub(crate) async fn next_of(&mut self, kind: u8) -> Frame {
        loop {
            let frame = self.next().await.unwrap().expect("it was closed");
            if frame.kind == kind {
                return frame;
            }
        }
    }

    /// Of status 200, with its body.
    pub(crate) async fn answer(&mut self, stream: u32) -> Vec<u8> {
        let head = self.next_of(HEADERS).await;
        assert_eq!((head.stream, head.payload[0]), (stream, 0x88), "{head:?}");
        let mut body = Vec::new();
        loop {
            let data = self.next_of(DATA).await;
            body.extend(data.payload);
            if data.flags & END != 0 {
                return body;
            }
        }
    }

    async fn acknowledge(&mut self, ping: &Frame) {
        self.send(PING, ACK, 0, &ping.payload).await;
    }

    async fn is_closed(&mut self) -> bool {
        soon(self.next()).await.unwrap().is_none()
    }
}

#[tokio::test]
async fn a_stream_between_the_two_goaways_is_answered() {
    let rig = Rig::new().await;
    let client = Frames::new(rig.addr).await;
    let took = between_goaways(&rig, client).await;
    assert!((ms(95)..ms(1400)).contains(&took), "{took:?}");
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// How long after the notice the first of them came.
pub(crate) async fn between_goaways<I>(rig: &Rig, mut client: Frames<I>) -> Duration
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    client.get(1, "/").await;
    assert_eq!(client.answer(1).await, b"hello");
    let start = rig.trigger();
    let first = client.next_of(GOAWAY).await;
    assert_eq!(first.last_stream(), ANY_STREAM);
    let took = clock::now() - start;
    let ping = client.next_of(PING).await;

    // Sent before the client had seen it, for all the server knows.
    client.get(3, "/slow/50").await;
    assert_eq!(client.answer(3).await, b"slow");
    client.get(5, "/slow/300").await;
    client.acknowledge(&ping).await;
    let second = client.next_of(GOAWAY).await;
    assert_eq!(second.last_stream(), 5);
    assert_eq!(client.answer(5).await, b"slow");
    assert!(client.is_closed().await);
    took
}

/// Answers the PING between the GOAWAYs with more behind it than the server
/// reads at once, and after a while with more still; gives the socket back at
/// its end, which is a FIN.
pub(crate) async fn crosses_the_close(mut client: Frames, wait: Duration) -> TcpStream {
    assert_eq!(client.next_of(GOAWAY).await.last_stream(), ANY_STREAM);
    let ping = client.next_of(PING).await;
    // WINDOW_UPDATE of the connection by 1: nothing that is answered.
    let update = [0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let mut frames = vec![0, 0, 8, PING, ACK, 0, 0, 0, 0];
    frames.extend(&ping.payload);
    frames.extend(update.repeat(5000));
    client.io.write_all(&frames).await.unwrap();
    tokio::time::sleep(wait).await;
    // Its FIN is no trouble to who sends: only a reset is.
    client.io.write_all(&update.repeat(100)).await.unwrap();
    // The end of the GOAWAYs, and of the connection.
    assert_eq!(client.next_of(GOAWAY).await.last_stream(), 1);
    assert!(client.is_closed().await);
    client.io
}

#[tokio::test]
async fn goaways_are_spread_over_the_second_half_of_the_delay() {
    let rig = Rig::of(shutdown_of(600, 3000, 500), limits(), app()).await;
    let mut clients = Vec::new();
    for _ in 0..30 {
        let mut client = Frames::new(rig.addr).await;
        client.get(1, "/").await;
        client.answer(1).await;
        clients.push(client);
    }
    let start = rig.trigger();
    let tasks = clients.into_iter().map(|mut client| {
        tokio::spawn(async move {
            client.next_of(GOAWAY).await;
            let at = clock::now() - start;
            let ping = client.next_of(PING).await;
            client.acknowledge(&ping).await;
            client.next_of(GOAWAY).await;
            assert!(client.is_closed().await);
            at
        })
    });
    let mut times = Vec::new();
    for task in tasks.collect::<Vec<_>>() {
        times.push(task.await.unwrap());
    }
    times.sort();
    let (first, last) = (times[0], times[29]);
    assert!(first >= ms(295), "{first:?}");
    assert!(last < ms(1500), "{last:?}");
    assert!(last - first > ms(150), "{first:?} to {last:?}");
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// A new connection is served during the delay, too, and then asked to go.
#[tokio::test]
async fn a_connection_that_comes_late_is_served() {
    let rig = Rig::of(shutdown_of(400, 3000, 500), limits(), app()).await;
    rig.trigger();
    tokio::time::sleep(ms(300)).await;
    let mut client = Frames::new(rig.addr).await;
    client.get(1, "/").await;
    assert_eq!(client.answer(1).await, b"hello");
    let ping = client.next_of(PING).await;
    client.acknowledge(&ping).await;
    assert_eq!(client.next_of(GOAWAY).await.last_stream(), 1);
    assert!(client.is_closed().await);
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// Without an answer to its ping hyper would wait for ever.
#[tokio::test]
async fn a_client_that_never_answers_the_ping_is_not_waited_for() {
    let limits = limits().header_timeout(ms(300));
    let rig = Rig::of(shutdown_of(0, 5000, 500), limits, app()).await;
    let mut client = Frames::new(rig.addr).await;
    client.get(1, "/").await;
    client.answer(1).await;
    let start = rig.trigger();
    client.next_of(GOAWAY).await;
    while client.next().await.unwrap().is_some() {}
    let took = clock::now() - start;
    assert!((ms(290)..ms(3000)).contains(&took), "{took:?}");
    drop(client);
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// Nor is one that opens streams on and on: after a time for its answer they
/// are refused, which says that they may be sent again, and what is there is
/// finished.
#[tokio::test]
async fn a_client_that_goes_on_without_an_answer_to_the_ping_is_refused() {
    let limits = limits().header_timeout(ms(300));
    let rig = Rig::of(shutdown_of(0, 8000, 500), limits, app()).await;
    let mut client = Frames::new(rig.addr).await;
    client.get(1, "/").await;
    client.answer(1).await;
    let start = rig.trigger();
    client.next_of(PING).await;
    let (mut stream, mut answered) = (3, Vec::new());
    client.get(stream, "/slow/1000").await;
    let refused = loop {
        tokio::time::sleep(ms(50)).await;
        stream += 2;
        client.get(stream, "/").await;
        let frame = client.next().await.unwrap().expect("it was closed");
        match frame.kind {
            RST_STREAM => break frame,
            HEADERS => answered.push(frame.stream),
            _ => {}
        }
        assert!(clock::now() - start < ms(2000));
    };
    let took = clock::now() - start;
    assert!((ms(290)..ms(950)).contains(&took), "{took:?}");
    assert_eq!(refused.payload, 7_u32.to_be_bytes(), "REFUSED_STREAM");
    assert!(answered.len() > 1, "{answered:?}");
    while let Some(frame) = client.next().await.unwrap() {
        if frame.kind == HEADERS {
            answered.push(frame.stream);
        }
    }
    assert!(answered.contains(&3), "it had begun");
    assert!(clock::now() - start < ms(4000));
    drop(client);
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn a_preface_that_has_begun_is_waited_for() {
    let limits = limits().header_timeout(ms(500));
    let rig = Rig::of(shutdown_of(0, 5000, 500), limits, app()).await;
    let mut half = soon(TcpStream::connect(rig.addr)).await.unwrap();
    half.write_all(b"PRI * HTTP/2").await.unwrap();
    tokio::time::sleep(ms(50)).await;
    let start = rig.trigger();
    let mut rest = Vec::new();
    let _ = soon(half.read_to_end(&mut rest)).await;
    let took = clock::now() - start;
    assert!((ms(400)..ms(3000)).contains(&took), "{took:?}");
    drop(half);
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn idle_and_old_connections_get_a_goaway() {
    for limits in [limits().idle_timeout(ms(200)), limits().max_age(ms(200))] {
        let rig = Rig::of(shutdown(), limits, app()).await;
        let mut client = Frames::new(rig.addr).await;
        client.get(1, "/slow/150").await;
        assert_eq!(client.answer(1).await, b"slow");
        assert_eq!(client.next_of(GOAWAY).await.last_stream(), ANY_STREAM);
        let ping = client.next_of(PING).await;
        client.acknowledge(&ping).await;
        assert_eq!(client.next_of(GOAWAY).await.last_stream(), 1);
        assert!(client.is_closed().await);
    }
}

#[tokio::test]
async fn a_long_stream_is_not_idle() {
    let limits = limits().idle_timeout(ms(100)).header_timeout(ms(100));
    let rig = Rig::of(shutdown(), limits, app()).await;
    let mut client = Frames::new(rig.addr).await;
    client.get(1, "/slow/500").await;
    loop {
        let frame = client.next().await.unwrap().unwrap();
        assert_ne!(frame.kind, GOAWAY);
        if frame.kind == HEADERS {
            break;
        }
    }
}

#[tokio::test]
async fn a_peer_that_answers_no_pings_is_dropped() {
    let limits = limits()
        .keep_alive_interval(ms(150))
        .keep_alive_timeout(ms(150));
    let rig = Rig::of(shutdown(), limits, app()).await;
    let mut client = Frames::new(rig.addr).await;
    client.next_of(PING).await;
    while let Ok(Some(_)) = client.next().await {}
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 0).await;
}

#[tokio::test]
async fn a_stream_that_does_not_end_is_cut() {
    let rig = Rig::of(shutdown_of(0, 1000, 500), limits(), app()).await;
    let mut client = Frames::new(rig.addr).await;
    client.get(1, "/endless").await;
    client.next_of(DATA).await;
    let start = rig.trigger();
    let shutdown = rig.shutdown.clone();
    soon(shutdown.reached(Phase::Closed)).await;
    while let Ok(Some(_)) = client.next().await {}
    let took = clock::now() - start;
    assert!((ms(490)..ms(3000)).contains(&took), "{took:?}");
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 124);
    assert_eq!(report.cut().len(), 1, "{report}");
}

/// hyper would strip it, and warn.
#[tokio::test]
async fn no_answer_says_connection_close() {
    let rig = Rig::of(shutdown_of(500, 3000, 500), limits(), app()).await;
    let io = soon(TcpStream::connect(rig.addr)).await.unwrap();
    let (mut send, connection) = h2::client::handshake(io).await.unwrap();
    let connection = tokio::spawn(connection);
    rig.trigger();
    let request = http::Request::get("http://test/").body(()).unwrap();
    let (answer, _) = send.send_request(request, true).unwrap();
    let answer = soon(answer).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(!answer.headers().contains_key("connection"));
    drop((send, answer));
    soon(connection).await.unwrap().unwrap();
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// Many streams on one connection, and the signal in the middle of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_stream_that_was_taken_is_lost() {
    let rig = Rig::of(shutdown_of(100, 5000, 500), limits(), app()).await;
    let mut tasks = Vec::new();
    for _ in 0..8 {
        let io = soon(TcpStream::connect(rig.addr)).await.unwrap();
        let (send, connection) = h2::client::handshake(io).await.unwrap();
        tokio::spawn(connection);
        tasks.push(tokio::spawn(async move {
            let mut answered = 0;
            // Until it is told to go.
            while let Ok(mut ready) = send.clone().ready().await {
                let request = http::Request::get("http://test/slow/5").body(()).unwrap();
                let Ok((answer, _)) = ready.send_request(request, true) else {
                    break;
                };
                match soon(answer).await {
                    Ok(answer) => assert_eq!(answer.status(), 200),
                    // Above the last that the server took: sent again elsewhere.
                    Err(error) => {
                        let refused = error.reason() == Some(h2::Reason::REFUSED_STREAM);
                        assert!(error.is_go_away() || refused, "{error:?}");
                        break;
                    }
                }
                answered += 1;
            }
            answered
        }));
    }
    tokio::time::sleep(ms(100)).await;
    rig.trigger();
    for task in tasks {
        let answered = timeout(Duration::from_secs(10), task).await.unwrap();
        assert!(answered.unwrap() > 5);
    }
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// hyper would send a body that no such answer has.
#[tokio::test]
async fn answers_without_a_body_end_with_their_head() {
    let rig = Rig::of(shutdown(), limits(), app()).await;
    let mut frames = Frames::new(rig.addr).await;
    // The method by its name, that of the static table's second.
    let head: &[u8] = &[0x02, 4, b'H', b'E', b'A', b'D'];
    let get: &[u8] = &[0x82];
    for (n, (method, path)) in [
        (head, "/"),
        (head, "/paced/100000"),
        (head, "/endless"),
        (get, "/odd/204"),
        (get, "/odd/304"),
    ]
    .into_iter()
    .enumerate()
    {
        let stream = 2 * n as u32 + 1;
        frames.ask(stream, method, path).await;
        loop {
            let frame = frames.next().await.unwrap().unwrap();
            if frame.stream == stream {
                assert_eq!((frame.kind, frame.flags & END), (HEADERS, END), "{path}");
                break;
            }
        }
    }
    // If one of them counted still, this would be cut.
    rig.trigger();
    frames.next_of(GOAWAY).await;
    let ping = frames.next_of(PING).await;
    frames.acknowledge(&ping).await;
    frames.next_of(GOAWAY).await;
    assert!(frames.is_closed().await);
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0, "{report}");
    assert!(report.drained_after() < ms(1400), "{report}");
}
