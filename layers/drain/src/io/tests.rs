use std::{task::Waker, time::Duration};

use buttress_core::clock::Instant;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split},
    time::{sleep, timeout},
};
use tokio_test::{assert_pending, assert_ready, task};

use super::*;

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

struct Rig {
    shutdown: Shutdown,
    client: DuplexStream,
    io: DrainIo<DuplexStream>,
}

/// Delay 5 s, 30 s in all, 5 s of them the hooks'.
fn rig(managed: bool, limits: Limits) -> Rig {
    let shutdown = Shutdown::builder().build().unwrap();
    let (client, server) = duplex(64);
    let io = DrainIo::wrap(
        server,
        shutdown.connection(),
        Arc::new(limits),
        None,
        managed,
    );
    Rig {
        shutdown,
        client,
        io,
    }
}

impl Rig {
    fn managed() -> Self {
        rig(true, Limits::default())
    }

    fn traffic(&self) -> &Traffic {
        &self.io.record().traffic
    }

    /// Through the phases, as if all listeners were closed at once.
    fn driven(&self) {
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move { shutdown.run().await });
    }

    fn trigger(&self, delay: bool) {
        self.driven();
        assert!(match delay {
            true => self.shutdown.trigger("a test"),
            false => self.shutdown.trigger_without_delay("a test"),
        });
    }

    /// What the next read gives, and after how long.
    async fn read(&mut self) -> (Duration, io::Result<usize>) {
        let start = clock::now();
        let mut bytes = [0; 16];
        let read = timeout(secs(100_000), self.io.read(&mut bytes));
        let read = read.await.expect("it waits for ever");
        (clock::now() - start, read)
    }

    async fn ends_after(&mut self, after: Duration) {
        let (took, read) = self.read().await;
        assert_eq!(read.unwrap(), 0);
        assert_near(took, after);
    }

    async fn fails_after(&mut self, after: Duration, kind: io::ErrorKind) {
        let (took, read) = self.read().await;
        assert_eq!(read.unwrap_err().kind(), kind);
        assert_near(took, after);
    }

    async fn request(&mut self) {
        self.client.write_all(b"GET\r\n\r\n").await.unwrap();
        assert_eq!(self.read().await.1.unwrap(), 7);
        self.traffic().begin();
    }
}

/// Timers are precise to a millisecond.
fn assert_near(took: Duration, after: Duration) {
    let near = after..after + millis(5);
    assert!(near.contains(&took), "{took:?}, not {after:?}");
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_ends_after_the_idle_timeout() {
    for managed in [true, false] {
        let mut rig = rig(managed, Limits::default());
        rig.ends_after(secs(75)).await;
        // For good.
        rig.client.write_all(b"late").await.unwrap();
        rig.ends_after(Duration::ZERO).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_time_between_requests_counts_from_the_end_of_the_last() {
    let mut rig = Rig::managed();
    for _ in 0..3 {
        rig.request().await;
        // hyper asks while it serves, and the timer is what it was.
        let waited = timeout(secs(200), rig.io.read_u8()).await;
        assert!(waited.is_err(), "it is busy");
        rig.traffic().end();
        sleep(secs(70)).await;
    }
    rig.ends_after(secs(5)).await;
}

#[tokio::test(start_paused = true)]
async fn a_head_has_ten_seconds_from_its_first_byte() {
    let mut rig = Rig::managed();
    rig.request().await;
    rig.traffic().end();
    sleep(secs(60)).await;
    let start = clock::now();
    loop {
        rig.client.write_all(b"x").await.unwrap();
        let (_, read) = rig.read().await;
        if read.unwrap() == 0 {
            panic!("it is no end");
        }
        if let Ok(failed) = timeout(secs(3), rig.io.read_u8()).await {
            assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::TimedOut);
            break;
        }
    }
    assert_near(clock::now() - start, secs(10));
}

#[tokio::test(start_paused = true)]
async fn a_head_that_is_complete_has_no_limit_left() {
    let mut rig = Rig::managed();
    rig.client.write_all(b"x").await.unwrap();
    rig.read().await.1.unwrap();
    let waited = timeout(secs(9), rig.io.read_u8()).await;
    assert!(waited.is_err());
    rig.request().await;
    rig.traffic().end();
    rig.ends_after(secs(75)).await;
}

#[tokio::test(start_paused = true)]
async fn the_handshake_has_ten_seconds_in_all() {
    let mut rig = Rig::managed();
    rig.traffic().speak(Protocol::Handshake);
    rig.client.write_all(b"x").await.unwrap();
    rig.read().await.1.unwrap();
    let waited = timeout(secs(6), rig.io.read_u8()).await;
    assert!(waited.is_err());
    rig.fails_after(secs(4), io::ErrorKind::TimedOut).await;

    let mut rig = Rig::managed();
    rig.traffic().speak(Protocol::Handshake);
    rig.client.write_all(b"x").await.unwrap();
    rig.read().await.1.unwrap();
    rig.traffic().shaken();
    rig.ends_after(secs(75)).await;
}

#[tokio::test(start_paused = true)]
async fn when_listeners_close_idle_connections_end() {
    // Used before.
    let mut rig = Rig::managed();
    rig.request().await;
    rig.traffic().end();
    rig.trigger(true);
    rig.ends_after(secs(5)).await;
    // Fresh: of a second ago, and of now.
    for managed in [true, false] {
        let mut old = super::tests::rig(managed, Limits::default());
        sleep(millis(700)).await;
        old.trigger(false);
        old.ends_after(millis(300)).await;
        let mut young = super::tests::rig(managed, Limits::default());
        young.trigger(false);
        young.ends_after(secs(1)).await;
    }
    // A head that has begun goes on; so does a request.
    let mut rig = Rig::managed();
    rig.client.write_all(b"x").await.unwrap();
    rig.read().await.1.unwrap();
    rig.trigger(false);
    rig.fails_after(secs(10), io::ErrorKind::TimedOut).await;
    let mut rig = Rig::managed();
    rig.request().await;
    rig.trigger(false);
    let waited = timeout(secs(20), rig.io.read_u8()).await;
    assert!(waited.is_err());
    rig.traffic().end();
    rig.ends_after(Duration::ZERO).await;
}

#[tokio::test(start_paused = true)]
async fn what_may_have_begun_within_a_request_has_a_moment() {
    // The rest of its body, as it turns out.
    let mut rig = Rig::managed();
    rig.request().await;
    rig.client.write_all(b"body").await.unwrap();
    rig.read().await.1.unwrap();
    rig.traffic().end();
    rig.trigger(false);
    rig.ends_after(secs(1)).await;

    let mut rig = Rig::managed();
    rig.request().await;
    rig.client.write_all(b"GE").await.unwrap();
    rig.read().await.1.unwrap();
    rig.traffic().end();
    rig.trigger(false);
    let waited = timeout(millis(700), rig.io.read_u8()).await;
    assert!(waited.is_err());
    // More of it: another moment.
    rig.client.write_all(b"T").await.unwrap();
    rig.read().await.1.unwrap();
    rig.fails_after(secs(10), io::ErrorKind::TimedOut).await;
}

#[tokio::test(start_paused = true)]
async fn an_old_connection_is_to_leave_and_not_closed() {
    let limits = Limits::builder().max_age(secs(30)).build().unwrap();
    let mut rig = rig(true, limits);
    rig.request().await;
    let waited = timeout(secs(26), rig.io.read_u8()).await;
    assert!(waited.is_err());
    assert!(!rig.traffic().is_leaving());
    let waited = timeout(secs(8), rig.io.read_u8()).await;
    assert!(waited.is_err());
    assert!(rig.traffic().is_leaving());
    rig.traffic().end();
    rig.ends_after(secs(75)).await;
}

#[tokio::test(start_paused = true)]
async fn http2_is_told_to_leave_and_then_given_up() {
    let limits = Limits::builder().max_age(secs(1000)).build().unwrap();
    for end in ["idle", "drain", "age"] {
        let mut rig = rig(true, limits);
        rig.traffic().speak(Protocol::Http2);
        rig.traffic().begin();
        let (least, most) = match end {
            "idle" => {
                rig.traffic().end();
                (secs(75), secs(75))
            }
            "drain" => {
                rig.trigger(true);
                (millis(2500), secs(5))
            }
            _ => (secs(900), secs(1100)),
        };
        let start = clock::now();
        let mut took = Duration::ZERO;
        while !rig.traffic().is_leaving() {
            let waited = timeout(millis(100), rig.io.read_u8()).await;
            assert!(waited.is_err(), "{end}");
            took = clock::now() - start;
        }
        assert!(took + millis(101) >= least, "{end}: {took:?}");
        assert!(took <= most + millis(110), "{end}: {took:?}");
        if end != "idle" {
            // As long as there are streams it stays.
            let waited = timeout(secs(3), rig.io.read_u8()).await;
            assert!(waited.is_err(), "{end}");
            rig.traffic().end();
        }
        let (took, read) = rig.read().await;
        assert_eq!(read.unwrap(), 0, "{end}");
        assert!(took <= secs(10) + millis(5), "{end}: {took:?}");
        assert!(took >= secs(9), "{end}: {took:?}");
    }
}

/// One of which the runtime has not heard yet that bytes have come.
struct Unheard(DuplexStream);

impl AsyncRead for Unheard {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

impl AsyncWrite for Unheard {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Socket for Unheard {
    fn has_unread(&self) -> bool {
        true
    }
}

#[tokio::test(start_paused = true)]
async fn what_has_come_is_not_closed_on() {
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let shutdown = Shutdown::builder().build().unwrap();
        let (_client, server) = duplex(64);
        let limits = Arc::new(Limits::default());
        let guard = shutdown.connection();
        let mut io = DrainIo::wrap(Unheard(server), guard, limits, None, true);
        io.record().traffic.speak(protocol);
        let waited = timeout(secs(1000), io.read_u8()).await;
        assert!(waited.is_err(), "{protocol:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_nothing_is_given_up() {
    let mut rig = Rig::managed();
    rig.request().await;
    rig.io.write_all(&[0; 64]).await.unwrap();
    let start = clock::now();
    let waited = timeout(secs(50), rig.io.write_u8(0)).await;
    assert!(waited.is_err());
    // A single byte is progress.
    rig.client.read_u8().await.unwrap();
    rig.io.write_u8(0).await.unwrap();
    let failed = rig.io.write_u8(0).await.unwrap_err();
    assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
    assert_near(clock::now() - start, secs(110));
    // Not of a tunnel.
    let mut rig = Rig::managed();
    rig.traffic().speak(Protocol::Tunnel);
    rig.io.write_all(&[0; 64]).await.unwrap();
    let waited = timeout(secs(3600), rig.io.write_u8(0)).await;
    assert!(waited.is_err());
}

/// An answer that is not out yet is not cut short by the end of listeners.
#[tokio::test(start_paused = true)]
async fn what_is_not_written_yet_goes_first() {
    let mut rig = Rig::managed();
    rig.request().await;
    rig.io.write_all(&[0; 64]).await.unwrap();
    let waited = timeout(secs(1), rig.io.write_u8(0)).await;
    assert!(waited.is_err());
    rig.traffic().end();
    rig.trigger(false);
    let waited = timeout(secs(2), rig.io.read_u8()).await;
    assert!(waited.is_err());
    rig.client.read_u8().await.unwrap();
    rig.io.write_u8(0).await.unwrap();
    rig.ends_after(Duration::ZERO).await;
}

#[tokio::test(start_paused = true)]
async fn a_cut_fails_both_directions_on_whatever_task() {
    for tunnel in [true, false] {
        let mut rig = rig(tunnel, Limits::default());
        rig.request().await;
        if tunnel {
            rig.traffic().speak(Protocol::Tunnel);
        }
        rig.io.write_all(&[0; 64]).await.unwrap();
        let shutdown = rig.shutdown.clone();
        rig.trigger(true);
        let (mut reader, mut writer) = split(rig.io);
        let reader = tokio::spawn(async move { reader.read_u8().await.unwrap_err().kind() });
        let writer = tokio::spawn(async move { writer.write_u8(0).await.unwrap_err().kind() });
        shutdown.reached(Phase::Cut).await;
        for task in [reader, writer] {
            let failed = timeout(millis(10), task).await.unwrap().unwrap();
            assert_eq!(failed, io::ErrorKind::ConnectionAborted);
        }
        assert_eq!(shutdown.connections(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_may_move_to_another_task() {
    let mut rig = rig(false, Limits::default());
    rig.client.write_all(b"x").await.unwrap();
    rig.read().await.1.unwrap();
    {
        let mut byte = [0];
        let mut first = task::spawn(rig.io.read(&mut byte));
        assert_pending!(first.poll());
    }
    rig.trigger(true);
    // 25 s, although it was another task that waited first.
    rig.fails_after(secs(25), io::ErrorKind::ConnectionAborted)
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_closed_connection_lingers_for_its_time_or_the_other_ends() {
    // For its time.
    let mut rig = Rig::managed();
    let start = clock::now();
    rig.io.shutdown().await.unwrap();
    assert_near(clock::now() - start, millis(500));
    assert_eq!(rig.client.read(&mut [0]).await.unwrap(), 0);

    // Until the other end has closed it, too; what came before is thrown away.
    let mut rig = Rig::managed();
    rig.client.write_all(b"too late").await.unwrap();
    let mut closing = task::spawn(rig.io.shutdown());
    assert_pending!(closing.poll());
    drop(rig.client);
    assert_ready!(closing.poll()).unwrap();

    // Not when it was first.
    let mut rig = Rig::managed();
    rig.client.shutdown().await.unwrap();
    rig.ends_after(Duration::ZERO).await;
    let start = clock::now();
    rig.io.shutdown().await.unwrap();
    assert_eq!(clock::now(), start);

    // Nor for ever, if it sends on and on; nor less long if that is much: who
    // sends all of a body before it reads is to find the refusal.
    let mut rig = Rig::managed();
    let start = clock::now();
    let flood = async {
        let much = vec![0; 4 << 20];
        rig.client.write_all(&much).await.unwrap();
        while timeout(secs(1), rig.client.write_all(&[0; 4096]))
            .await
            .is_ok()
        {
            sleep(millis(10)).await;
        }
    };
    let closing = async {
        rig.io.shutdown().await.unwrap();
        clock::now() - start
    };
    let ((), took) = tokio::join!(flood, closing);
    assert_near(took, millis(500));
}

#[tokio::test(start_paused = true)]
async fn what_others_have_closed_lingers_on_its_own() {
    let mut rig = rig(false, Limits::default());
    let start = clock::now();
    rig.io.shutdown().await.unwrap();
    assert_eq!(clock::now(), start, "the other direction may go on");
    rig.client.write_all(b"it does").await.unwrap();
    assert_eq!(rig.read().await.1.unwrap(), 7);
    drop(rig.io);
    assert_eq!(rig.shutdown.connections(), 1);
    assert_eq!(rig.client.read(&mut [0]).await.unwrap(), 0);
    rig.client.write_all(b"too late").await.unwrap();
    sleep(millis(499)).await;
    assert_eq!(rig.shutdown.connections(), 1);
    sleep(millis(5)).await;
    assert_eq!(rig.shutdown.connections(), 0);
    assert!(rig.client.write_all(b"later still").await.is_err());
}

/// Nothing is set, made or locked for a read that finds the timer as it was.
#[tokio::test(start_paused = true)]
async fn a_request_costs_no_allocation_and_no_timer() {
    let mut rig = Rig::managed();
    let mut cx = Context::from_waker(Waker::noop());
    let mut bytes = [0; 16];
    let mut cycle = |rig: &mut Rig| {
        let sent = Pin::new(&mut rig.client).poll_write(&mut cx, b"GET");
        assert!(sent.is_ready());
        let mut buffer = ReadBuf::new(&mut bytes);
        assert!(
            Pin::new(&mut rig.io)
                .poll_read(&mut cx, &mut buffer)
                .is_ready()
        );
        rig.traffic().begin();
        let mut buffer = ReadBuf::new(&mut bytes);
        assert!(
            Pin::new(&mut rig.io)
                .poll_read(&mut cx, &mut buffer)
                .is_pending()
        );
        let sent = Pin::new(&mut rig.io).poll_write(&mut cx, b"200");
        assert!(sent.is_ready());
        rig.traffic().end();
        let mut buffer = ReadBuf::new(&mut bytes);
        assert!(
            Pin::new(&mut rig.client)
                .poll_read(&mut cx, &mut buffer)
                .is_ready()
        );
    };
    cycle(&mut rig);
    sleep(secs(1)).await;
    let armed = |rig: &Rig| rig.io.reader.as_ref().unwrap().as_ref().get_ref().armed();
    let before: Instant = armed(&rig);
    let info = allocation_counter::measure(|| {
        // As many as tokio lets a task do before it is to yield.
        for _ in 0..15 {
            cycle(&mut rig);
        }
    });
    assert_eq!(info.count_total, 0);
    assert_eq!(armed(&rig), before);
}
