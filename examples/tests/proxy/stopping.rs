//! Stopping it: who is told what and when, what is waited for, what is cut, and
//! the exit code.

use std::{sync::Arc, time::Duration};

use http_body_util::Full;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
    time::{Instant, timeout},
};

use crate::support::{
    Proxy, Raw, Upstream, eventually, fetch, get, json, nobody, read_head, reply, soon, to,
};

/// Listens on for half a second, cuts after two, and ends after three.
pub(crate) const STOP: &str = "shutdown: { drain_delay: 500ms, timeout: 3s, hook_reserve: 1s }\n";

const ASK: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";

/// A proxy with these times, and one route.
async fn stoppable(upstream: &Upstream) -> Proxy {
    Proxy::start(&format!("{STOP}{}", to(upstream.address))).await
}

/// An upstream that answers when told.
async fn patient() -> (Upstream, Arc<Semaphore>) {
    let go = Arc::new(Semaphore::new(0));
    let wait = Arc::clone(&go);
    let upstream = Upstream::start(move |_| {
        let wait = Arc::clone(&wait);
        async move {
            wait.acquire().await.unwrap().forget();
            reply("at last")
        }
    })
    .await;
    (upstream, go)
}

/// An upstream that says yes.
async fn willing() -> Upstream {
    Upstream::start(|_| async { reply("yes") }).await
}

/// An upstream that does this with each connection once its head was read.
async fn after_head<F>(then: impl Fn(TcpStream) -> F + Clone + Send + Sync + 'static) -> Upstream
where
    F: Future<Output = ()> + Send + 'static,
{
    Upstream::raw(move |mut stream| {
        let then = then.clone();
        async move {
            if read_head(&mut stream).await.is_some() {
                then(stream).await;
            }
        }
    })
    .await
}

/// An upstream that goes on and on.
async fn endless() -> Upstream {
    after_head(|mut stream| async move {
        let head =
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
        let mut more = stream.write_all(head.as_bytes()).await;
        while more.is_ok() {
            more = stream.write_all(b"data: more\n\n").await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
}

/// An upstream that switches to an echo.
async fn echo() -> Upstream {
    after_head(|mut stream| async move {
        let head =
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
        let _ = stream.write_all(head).await;
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    })
    .await
}

async fn tunnel(proxy: &Proxy) -> Raw {
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET /tunnel HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        .await;
    raw.until("\r\n\r\n").await;
    raw
}

async fn busy(proxy: &Proxy, requests: f64) {
    eventually("the requests to arrive", || async {
        proxy.in_flight().await == requests
    })
    .await;
}

pub(crate) async fn phase(proxy: &Proxy, phase: &str) {
    proxy
        .logged(phase, |line| {
            line["phase"] == phase && line["name"] == "proxy"
        })
        .await;
}

/// Waits for the end: its code, and how long after `start` it was.
pub(crate) async fn end(proxy: &mut Proxy, start: Instant) -> (Option<i32>, u128) {
    let code = proxy.exit().await.code();
    (code, start.elapsed().as_millis())
}

/// What the log says of what was cut.
pub(crate) async fn cut(proxy: &Proxy, kind: &str) -> Value {
    let line = proxy
        .logged(kind, |line| {
            line["message"] == "cut off" && line["kind"] == kind
        })
        .await;
    assert_eq!(
        (&line["level"], &line["route"]),
        (&"WARN".into(), &"all".into())
    );
    line
}

#[tokio::test]
async fn idle_it_serves_for_the_delay_and_ends() {
    for signal in ["TERM", "INT"] {
        let upstream = willing().await;
        let mut proxy = stoppable(&upstream).await;
        let mut idle = Raw::connect(proxy.listen).await;
        idle.send(ASK).await;
        assert!(!idle.until("yes").await.contains("connection: close"));
        let health = async |path: &str| {
            let response = fetch(proxy.admin, get(path)).await;
            (response.status().as_u16(), json(&response))
        };

        let start = Instant::now();
        proxy.signal(signal);
        // By the time that `kill` has returned, or within a moment.
        soon("unready", async {
            while health("/health/ready").await.0 == 200 {}
        })
        .await;
        let took = start.elapsed();
        assert!(took < Duration::from_millis(150), "unready after {took:?}");
        let (status, ready) = health("/health/ready").await;
        let unready =
            serde_json::json!({ "ready": false, "reason": "shutting_down", "score": 1.0 });
        assert_eq!((status, ready), (503, unready));
        assert_eq!(health("/health/live").await.0, 200);
        assert_eq!(health("/health/startup").await.0, 200);
        let (status, all) = health("/health").await;
        assert_eq!((status, &all["gates"][0]["open"]), (503, &false.into()));

        // Who comes all the same is served, and told to go elsewhere next time.
        let mut late = Raw::connect(proxy.listen).await;
        late.send(ASK).await;
        let answer = late.rest().await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(answer.contains("connection: close\r\n"), "{answer}");
        assert!(start.elapsed() < Duration::from_millis(450), "{answer}");

        // Who is idle is left alone until the port closes.
        assert_eq!(idle.rest().await, "");
        assert!(start.elapsed() >= Duration::from_millis(480));
        let (code, took) = end(&mut proxy, start).await;
        assert_eq!(code, Some(0), "{signal}");
        assert!((480..1500).contains(&took), "{took} ms");
        assert!(TcpStream::connect(proxy.listen).await.is_err());
        assert!(TcpStream::connect(proxy.admin).await.is_err());
    }
}

#[tokio::test]
async fn what_has_begun_is_finished_after_the_port_is_closed() {
    let (upstream, go) = patient().await;
    let mut proxy = stoppable(&upstream).await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send(ASK).await;
    busy(&proxy, 1.0).await;
    // A body on its way up is a request, too.
    let mut up = Raw::connect(proxy.listen).await;
    up.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\nhalf")
        .await;
    busy(&proxy, 2.0).await;

    let start = Instant::now();
    proxy.signal("TERM");
    phase(&proxy, "closed").await;
    assert!(TcpStream::connect(proxy.listen).await.is_err());
    // The admin port still says that it lives.
    assert_eq!(fetch(proxy.admin, get("/health/live")).await.status(), 200);
    assert_eq!(proxy.in_flight().await, 2.0);
    assert!(start.elapsed() >= Duration::from_millis(480));
    up.send("half").await;
    go.add_permits(2);
    for mut raw in [raw, up] {
        let answer = raw.rest().await;
        assert!(
            answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("at last"),
            "{answer}"
        );
        assert!(answer.contains("connection: close\r\n"), "{answer}");
    }
    let (code, took) = end(&mut proxy, start).await;
    assert_eq!(code, Some(0));
    assert!(took < 2000, "{took} ms");
}

#[tokio::test]
async fn answers_without_a_body_are_over_when_they_are_sent() {
    let upstream = Upstream::start(|request| async move {
        let mut response = reply("");
        let status = request.uri().path()[1..].parse();
        *response.status_mut() = status.unwrap_or(http::StatusCode::OK);
        response
    })
    .await;
    let mut proxy = stoppable(&upstream).await;
    let mut held = Vec::new();
    for line in ["HEAD /", "GET /204", "GET /304", "HEAD /404"] {
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send(format!("{line} HTTP/1.1\r\nhost: a\r\n\r\n"))
            .await;
        raw.until("\r\n\r\n").await;
        held.push(raw);
    }
    let start = Instant::now();
    proxy.signal("TERM");
    for raw in &mut held {
        assert_eq!(raw.rest().await, "");
    }
    let (code, took) = end(&mut proxy, start).await;
    assert_eq!(code, Some(0));
    assert!(took < 1500, "{took} ms");
}

#[tokio::test]
async fn a_signal_as_soon_as_it_listens_is_heeded() {
    let upstream = willing().await;
    let listen = nobody().await;
    let path = crate::support::file(&format!("{STOP}{}", to(upstream.address)));
    let mut command = crate::support::program();
    command.args(["--config", path.to_str().unwrap(), "--admin", "127.0.0.1:0"]);
    let mut child = command
        .args(["--listen", &listen.to_string()])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    soon("the port", async {
        while TcpStream::connect(listen).await.is_err() {}
    })
    .await;
    crate::support::signal(child.id(), "TERM");
    let status = soon("the end", async {
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert_eq!(status.await.code(), Some(0));
}

#[tokio::test]
async fn who_waits_in_the_backlog_is_served() {
    let (upstream, go) = patient().await;
    let limits = "limits: { max_connections: 1 }\n";
    let mut proxy = Proxy::start(&format!("{STOP}{limits}{}", to(upstream.address))).await;
    let mut first = Raw::connect(proxy.listen).await;
    first.send(ASK).await;
    busy(&proxy, 1.0).await;
    let mut waiting = Vec::new();
    for _ in 0..5 {
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send(ASK).await;
        waiting.push(raw);
    }
    proxy.signal("TERM");
    phase(&proxy, "draining").await;
    assert_eq!(proxy.in_flight().await, 1.0);
    busy(&proxy, 6.0).await;
    assert!(TcpStream::connect(proxy.listen).await.is_err());
    go.add_permits(6);
    waiting.push(first);
    for raw in &mut waiting {
        let answer = raw.rest().await;
        assert!(answer.ends_with("at last"), "{answer}");
    }
    assert_eq!(proxy.exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_large_download_at_the_moment_of_the_signal_arrives_whole() {
    const BLOCK: usize = 64 << 10;
    const BLOCKS: usize = 160;
    fn byte(at: usize) -> u8 {
        // Not a pattern that a lost block would hide in.
        (at / BLOCK * 7 + at % 251) as u8
    }
    // Ten megabytes in some 1.3 s: over the whole of the delay, and past it.
    let upstream = after_head(|mut stream| async move {
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n",
            BLOCK * BLOCKS
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        for block in 0..BLOCKS {
            let bytes: Vec<u8> = (0..BLOCK).map(|at| byte(block * BLOCK + at)).collect();
            stream.write_all(&bytes).await.unwrap();
            tokio::time::sleep(Duration::from_millis(7)).await;
        }
    })
    .await;
    // It is not to be cut on a busy machine.
    let patient = STOP.replace("3s", "19s");
    let mut proxy = Proxy::start(&format!("{patient}{}", to(upstream.address))).await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send(ASK).await;
    raw.until("\r\n\r\n").await;
    let start = Instant::now();
    proxy.signal("TERM");
    let mut bytes = Vec::new();
    let read = soon("the download", raw.0.read_to_end(&mut bytes)).await;
    assert_eq!(read.unwrap(), BLOCK * BLOCKS);
    assert!(bytes.iter().enumerate().all(|(at, it)| *it == byte(at)));
    let (code, took) = end(&mut proxy, start).await;
    assert_eq!(code, Some(0));
    assert!((800..18_000).contains(&took), "{took} ms");
}

#[tokio::test]
async fn what_never_ends_is_cut_and_named() {
    let upstream = endless().await;
    let mut proxy = stoppable(&upstream).await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET /events HTTP/1.1\r\nhost: a\r\n\r\n").await;
    raw.until("data: more\n\n").await;
    let start = Instant::now();
    proxy.signal("TERM");
    let rest = raw.rest().await;
    let took = start.elapsed().as_millis();
    assert!((1900..2800).contains(&took), "cut after {took} ms");
    // Its end was not made to look like one.
    assert!(rest.contains("data: more") && !rest.ends_with("0\r\n\r\n"));
    let (code, took) = end(&mut proxy, start).await;
    assert_eq!(code, Some(124));
    assert!((1950..3000).contains(&took), "{took} ms");
    let line = cut(&proxy, "request").await;
    assert!((1900..4000).contains(&line["age_ms"].as_u64().unwrap()));
    assert!(
        (200..2000).contains(&line["bytes"].as_u64().unwrap()),
        "{line}"
    );
    let access = proxy.access("/events").await;
    assert_eq!(access["status"], 200);
    assert!(access["bytes"].as_u64().unwrap() > 200, "{access}");
    // The hooks run all the same.
    let hook = |line: &Value| line["message"] == "hook" && line["result"] == "done";
    proxy.logged("a hook", hook).await;
}

#[tokio::test]
async fn an_open_tunnel_is_in_flight_too() {
    let upstream = echo().await;
    let mut proxy = stoppable(&upstream).await;
    let mut raw = tunnel(&proxy).await;
    proxy.signal("TERM");
    phase(&proxy, "closed").await;
    raw.send("still here").await;
    raw.until("still here").await;
    // One way, and then the other.
    raw.0.shutdown().await.unwrap();
    assert_eq!(raw.rest().await, "");
    assert_eq!(proxy.exit().await.code(), Some(0));
    assert_eq!(proxy.access("/tunnel").await["bytes"], 10);
}

#[tokio::test]
async fn a_tunnel_that_stays_is_cut_and_named() {
    let upstream = echo().await;
    let mut proxy = stoppable(&upstream).await;
    let mut raw = tunnel(&proxy).await;
    raw.send("hello").await;
    raw.until("hello").await;
    let start = Instant::now();
    proxy.signal("TERM");
    assert_eq!(raw.rest().await, "");
    let (code, took) = end(&mut proxy, start).await;
    assert_eq!(code, Some(124));
    assert!((1950..3000).contains(&took), "{took} ms");
    let line = cut(&proxy, "tunnel").await;
    assert!((1900..4000).contains(&line["age_ms"].as_u64().unwrap()));
    // Of all that was written on the connection: the head of the 101, too.
    assert!(
        (5..500).contains(&line["bytes"].as_u64().unwrap()),
        "{line}"
    );
    let access = proxy.access("/tunnel").await;
    assert_eq!(
        (&access["status"], &access["bytes"]),
        (&101.into(), &5.into())
    );
    assert!(
        access["error"].as_str().unwrap().contains("cut off"),
        "{access}"
    );
}

#[tokio::test]
async fn silent_and_slow_ones_hold_nothing_up() {
    let upstream = willing().await;
    let mut proxy = stoppable(&upstream).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(Raw::connect(proxy.listen).await);
    }
    let mut h2 = Raw::connect(proxy.listen).await;
    h2.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    h2.send([0, 0, 0, 4, 0, 0, 0, 0, 0]).await;
    let start = Instant::now();
    proxy.signal("TERM");
    // Too late to be asked anything within the delay: it has a second for its
    // first byte.
    tokio::time::sleep(Duration::from_millis(400)).await;
    let mut late = Raw::connect(proxy.listen).await;
    phase(&proxy, "closed").await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    late.send(ASK).await;
    let answer = late.rest().await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    for raw in &mut silent {
        assert_eq!(raw.rest().await, "");
    }
    // It answers no PING, and never goes by itself.
    h2.rest().await;
    let (code, took) = end(&mut proxy, start).await;
    assert_eq!(code, Some(0));
    assert!((480..2900).contains(&took), "{took} ms");
}

#[tokio::test]
async fn a_slow_head_does_not_outlast_the_cut() {
    let upstream = willing().await;
    let mut proxy = stoppable(&upstream).await;
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET / HTTP/1.1\r\nho").await;
    let start = Instant::now();
    proxy.signal("TERM");
    phase(&proxy, "closed").await;
    raw.rest().await;
    let (code, took) = end(&mut proxy, start).await;
    // Nothing that would have been lost: no request was there yet.
    assert_eq!(code, Some(0));
    assert!((1900..2900).contains(&took), "{took} ms");
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    for (first, second) in [("TERM", "INT"), ("INT", "TERM"), ("TERM", "TERM")] {
        let (upstream, _go) = patient().await;
        let mut proxy = stoppable(&upstream).await;
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send(ASK).await;
        busy(&proxy, 1.0).await;
        proxy.signal(first);
        phase(&proxy, "draining").await;
        let start = Instant::now();
        proxy.signal(second);
        let (code, took) = end(&mut proxy, start).await;
        assert_eq!(code, Some(1));
        assert!(took < 400, "{took} ms");
    }
}

#[tokio::test]
async fn what_crosses_the_close_is_answered_or_closed_and_never_reset() {
    let upstream = willing().await;
    let mut proxy = stoppable(&upstream).await;
    let mut held = Vec::new();
    for _ in 0..80 {
        let mut raw = Raw::connect(proxy.listen).await;
        raw.send(ASK).await;
        raw.until("yes").await;
        held.push(raw);
    }
    proxy.signal("TERM");
    phase(&proxy, "draining").await;
    let start = Instant::now();
    let clients = held.into_iter().enumerate().map(|(n, mut raw)| {
        tokio::spawn(async move {
            // Around the moment when the port closes.
            tokio::time::sleep_until(start + Duration::from_millis(440 + 2 * n as u64)).await;
            let mut answer = Vec::new();
            // A reset would show when it is read.
            let sent = raw.0.write_all(ASK.as_bytes()).await;
            let read = timeout(Duration::from_secs(5), raw.0.read_to_end(&mut answer)).await;
            let read = read.expect("an end");
            assert!(sent.is_err() || read.is_ok(), "{n}: {read:?}");
            let answer = String::from_utf8(answer).unwrap();
            let whole = answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("yes");
            assert!(answer.is_empty() || whole, "{n}: {answer}");
            whole
        })
    });
    let mut answered = 0;
    for client in clients.collect::<Vec<_>>() {
        answered += usize::from(client.await.unwrap());
    }
    assert!((10..80).contains(&answered), "{answered}");
    assert_eq!(proxy.exit().await.code(), Some(0));
}

/// HTTP/2 by the byte: clients refuse to open what this test has to.
struct Frames(Raw);

impl Frames {
    const HEADERS: u8 = 1;
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const GOAWAY: u8 = 7;

    async fn connect(proxy: &Proxy) -> Self {
        let mut frames = Self(Raw::connect(proxy.listen).await);
        frames.0.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        frames.send(Self::SETTINGS, 0, 0, &[]).await;
        frames
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u8::try_from(payload.len()).unwrap();
        let mut frame = vec![0, 0, length, kind, flags];
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.0.send(frame).await;
    }

    /// A whole GET of `/`, on the host `a`.
    async fn get(&mut self, stream: u32) {
        self.send(Self::HEADERS, 5, stream, &[0x82, 0x86, 0x84, 0x41, 1, b'a'])
            .await;
    }

    /// The next frame of this kind: its flags, its stream and its payload.
    /// `None` at the end.
    async fn next(&mut self, kind: u8) -> Option<(u8, u32, Vec<u8>)> {
        let next = async {
            loop {
                let mut head = [0; 9];
                self.0.0.read_exact(&mut head).await.ok()?;
                let [a, b, c, found, flags, d, e, f, g] = head;
                let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
                self.0.0.read_exact(&mut payload).await.ok()?;
                if found == kind {
                    return Some((flags, u32::from_be_bytes([d, e, f, g]), payload));
                }
            }
        };
        soon("a frame", next).await
    }

    async fn goaway(&mut self) -> (u32, u32) {
        let (_, _, payload) = self.next(Self::GOAWAY).await.expect("a GOAWAY");
        let word = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }
}

#[tokio::test]
async fn http2_is_told_in_time_and_what_it_opens_meanwhile_is_served() {
    const ALL: u32 = u32::MAX >> 1;
    let (upstream, go) = patient().await;
    let mut proxy = stoppable(&upstream).await;
    let mut idle = Frames::connect(&proxy).await;
    let mut h2 = Frames::connect(&proxy).await;
    h2.get(1).await;
    busy(&proxy, 1.0).await;

    let start = Instant::now();
    proxy.signal("TERM");
    // In the second half of the delay, and from then on it is counted.
    for frames in [&mut idle, &mut h2] {
        assert_eq!(frames.goaway().await, (ALL, 0));
        let took = start.elapsed().as_millis();
        assert!((200..900).contains(&took), "{took} ms");
    }
    // The client has not heard of it yet, and opens another one.
    h2.get(3).await;
    busy(&proxy, 2.0).await;
    for (frames, last) in [(&mut idle, 0), (&mut h2, 3)] {
        let (flags, _, ping) = frames.next(Frames::PING).await.expect("a PING");
        assert_eq!(flags & 1, 0);
        frames.send(Frames::PING, 1, 0, &ping).await;
        assert_eq!(frames.goaway().await, (last, 0));
    }
    assert!(idle.next(Frames::GOAWAY).await.is_none());
    phase(&proxy, "closed").await;
    go.add_permits(2);
    let mut answered = Vec::new();
    while let Some((_, stream, block)) = h2.next(Frames::HEADERS).await {
        // `:status: 200` is the eighth of the static table.
        assert_eq!(block[0], 0x88);
        answered.push(stream);
    }
    answered.sort_unstable();
    assert_eq!(answered, [1, 3]);
    let (code, took) = end(&mut proxy, start).await;
    assert_eq!(code, Some(0));
    assert!(took < 2000, "{took} ms");
}

#[tokio::test]
async fn a_request_on_the_admin_port_is_no_reason_to_wait() {
    let upstream = willing().await;
    let mut proxy = stoppable(&upstream).await;
    // One that is kept open, and one with half a head.
    let mut open = Raw::connect(proxy.admin).await;
    open.send("GET /health/live HTTP/1.1\r\nhost: a\r\n\r\n")
        .await;
    open.until("{\"live\":true}").await;
    let mut half = Raw::connect(proxy.admin).await;
    half.send("GET /").await;
    let start = Instant::now();
    proxy.signal("TERM");
    let metrics = fetch(proxy.admin, get("/metrics")).await;
    assert_eq!(metrics.status(), 200);
    let (code, took) = end(&mut proxy, start).await;
    assert_eq!(code, Some(0));
    assert!(took < 1500, "{took} ms");
}

#[tokio::test]
async fn without_a_delay_it_closes_at_once() {
    let upstream = willing().await;
    let mut proxy = Proxy::start(&format!(
        "shutdown: {{ drain_delay: 0s, timeout: 2s, hook_reserve: 0s }}\n{}",
        to(upstream.address)
    ))
    .await;
    let request = http::Request::get("/").header("host", "a");
    let request = request.body(Full::default()).unwrap();
    assert_eq!(fetch(proxy.listen, request).await.status(), 200);
    let start = Instant::now();
    proxy.signal("TERM");
    let (code, took) = end(&mut proxy, start).await;
    assert_eq!(code, Some(0));
    assert!(took < 400, "{took} ms");
}
