//! Other listeners than TCP, and errors of theirs.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
};

use buttress_core::clock;
use buttress_drain::{Listener, PeerAddrs, Server};
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::{
    io::{AsyncReadExt, DuplexStream, duplex},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use crate::{Rig, app::app, client::Client, limits, ms, shutdown, shutdown_of, soon};

/// TCP, but for the errors that come first.
struct Failing {
    listener: TcpListener,
    errors: VecDeque<io::Error>,
    asked: Arc<AtomicUsize>,
}

impl Listener for Failing {
    type Io = TcpStream;
    type Addr = std::net::SocketAddr;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, Self::Addr)>> {
        self.asked.fetch_add(1, SeqCst);
        match self.errors.pop_front() {
            Some(error) => Poll::Ready(Err(error)),
            None => Listener::poll_accept(&mut self.listener, cx),
        }
    }
}

async fn failing(errors: impl IntoIterator<Item = io::Error>) -> (Rig, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let listener = Failing {
        listener,
        errors: errors.into_iter().collect(),
        asked: Arc::clone(&asked),
    };
    let shutdown = shutdown();
    let server = Server::new(&shutdown)
        .limits(limits().build().unwrap())
        .serve(listener, app());
    (Rig::with(shutdown, addr, server), asked)
}

/// Errors for the backlog only, and room for one connection until then.
struct FailingLater(Failing);

impl Listener for FailingLater {
    type Io = TcpStream;
    type Addr = std::net::SocketAddr;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, Self::Addr)>> {
        Listener::poll_accept(&mut self.0.listener, cx)
    }

    fn accept_now(&mut self) -> io::Result<Option<(TcpStream, Self::Addr)>> {
        match self.0.errors.pop_front() {
            Some(error) => Err(error),
            None => self.0.listener.accept_now(),
        }
    }
}

/// Lingers so many milliseconds, which is what the listener is asked again for.
async fn failing_later(linger: u64, errors: impl IntoIterator<Item = io::Error>) -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let listener = FailingLater(Failing {
        listener,
        errors: errors.into_iter().collect(),
        asked: Arc::default(),
    });
    let shutdown = shutdown_of(200, 2000 + 4 * linger, 500);
    let limits = limits().linger(ms(linger)).max_connections(1);
    let server = Server::new(&shutdown)
        .limits(limits.build().unwrap())
        .serve(listener, app());
    Rig::with(shutdown, addr, server)
}

/// EMFILE, "too many open files".
fn exhausted() -> io::Error {
    io::Error::from_raw_os_error(24)
}

#[tokio::test]
async fn a_listener_that_fails_is_asked_again_after_a_pause() {
    let (rig, asked) = failing((0..6).map(|_| exhausted())).await;
    let begun = clock::now();
    let mut client = Client::new(rig.addr).await;
    assert_eq!(client.get("/").await.text(), "hello");
    let took = clock::now() - begun;
    // 5, 10, 20, 40, 80 and 160 ms.
    assert!((ms(300)..ms(3000)).contains(&took), "{took:?}");
    let asked = asked.load(SeqCst);
    assert!(asked <= 10, "asked {asked} times");
    drop(client);
    rig.trigger();
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn a_connection_that_is_gone_costs_no_pause() {
    let gone = || io::Error::from(io::ErrorKind::ConnectionAborted);
    let (rig, _) = failing((0..100).map(|_| gone())).await;
    let begun = clock::now();
    let mut client = Client::new(rig.addr).await;
    assert_eq!(client.get("/").await.text(), "hello");
    let took = clock::now() - begun;
    assert!(took < ms(1000), "{took:?}");
}

/// It is in a pause of a second when the time comes.
#[tokio::test]
async fn a_listener_that_fails_for_good_drains_in_time() {
    let (rig, asked) = failing((0..10_000).map(|_| exhausted())).await;
    tokio::time::sleep(ms(1300)).await;
    let start = rig.trigger();
    assert_eq!(rig.ended().await.exit_code(), 0);
    let took = clock::now() - start;
    assert!((ms(200)..ms(900)).contains(&took), "{took:?}");
    let asked = asked.load(SeqCst);
    assert!(asked <= 20, "asked {asked} times");
}

/// What waits in the backlog is not given up with the first error, which may
/// be over in a moment.
#[tokio::test]
async fn a_listener_that_fails_at_the_end_is_asked_again() {
    let rig = failing_later(2000, (0..4).map(|_| exhausted())).await;
    let mut first = Client::new(rig.addr).await;
    first.get("/").await;
    let mut second = Client::new(rig.addr).await;
    second.send(crate::client::get("/")).await.unwrap();
    // No room for it until then.
    rig.trigger();
    assert_eq!(second.answer().await.text(), "hello");
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// A descriptor comes back as a connection that was closed has lingered.
#[tokio::test]
async fn a_listener_that_fails_at_the_end_is_asked_for_as_long_as_others_linger() {
    let rig = failing_later(2000, (0..7).map(|_| exhausted())).await;
    let mut first = Client::new(rig.addr).await;
    first.get("/").await;
    let mut second = Client::new(rig.addr).await;
    second.send(crate::client::get("/")).await.unwrap();
    rig.trigger();
    assert_eq!(second.answer().await.text(), "hello");
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// But not until the cut, which would be the listener's failure.
#[tokio::test]
async fn a_listener_that_fails_to_the_end_is_closed() {
    let rig = failing_later(100, (0..10_000).map(|_| exhausted())).await;
    let begun = rig.trigger();
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 0, "{report}");
    let took = clock::now() - begun;
    assert!((ms(350)..ms(1000)).contains(&took), "{took:?}");
}

/// So many that wait when the listener closes, all of them there at once.
struct Crowded {
    left: usize,
    accepted: Arc<AtomicUsize>,
}

impl Listener for Crowded {
    type Io = DuplexStream;
    type Addr = ();

    fn poll_accept(&mut self, _: &mut Context<'_>) -> Poll<io::Result<(DuplexStream, ())>> {
        Poll::Pending
    }

    fn accept_now(&mut self) -> io::Result<Option<(DuplexStream, ())>> {
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(None);
        };
        self.left = left;
        self.accepted.fetch_add(1, SeqCst);
        Ok(Some((duplex(64).1, ())))
    }
}

/// A thread that has others to run runs them meanwhile.
#[tokio::test]
async fn a_long_backlog_is_accepted_in_turns() {
    let accepted = Arc::new(AtomicUsize::new(0));
    let listener = Crowded {
        left: 2000,
        accepted: Arc::clone(&accepted),
    };
    let shutdown = shutdown_of(0, 5000, 500);
    let server = Server::new(&shutdown).serve(listener, app());
    let rig = Rig::with(shutdown, ([127, 0, 0, 1], 0).into(), server);
    tokio::task::yield_now().await;
    rig.trigger();
    let seen = soon(async {
        let mut seen = std::collections::BTreeSet::new();
        loop {
            let accepted = accepted.load(SeqCst);
            seen.insert(accepted);
            if accepted == 2000 {
                return seen;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(seen.len() > 10, "{seen:?}");
    assert_eq!(rig.ended().await.exit_code(), 0);
}

/// No socket at all.
struct InMemory(mpsc::UnboundedReceiver<DuplexStream>);

impl Listener for InMemory {
    type Io = DuplexStream;
    type Addr = ();

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(DuplexStream, ())>> {
        match self.0.poll_recv(cx) {
            Poll::Ready(Some(io)) => Poll::Ready(Ok((io, ()))),
            _ => Poll::Pending,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn anything_that_gives_connections_will_do() {
    let (sender, receiver) = mpsc::unbounded_channel();
    let shutdown = shutdown();
    let server = Server::new(&shutdown).serve(InMemory(receiver), app());
    let rig = Rig::with(shutdown, ([127, 0, 0, 1], 0).into(), server);
    let connect = || {
        let (client, server) = duplex(1024);
        sender.send(server).unwrap();
        Client::over(client)
    };
    let mut client = connect();
    assert_eq!(client.get("/slow/5000").await.text(), "slow");
    // Its idle timeout, by a clock that jumps to it.
    let begun = clock::now();
    assert!(
        super::timeout(ms(100_000), client.io.get_mut().read_u8())
            .await
            .unwrap()
            .is_err()
    );
    let took = clock::now() - begun;
    assert!((ms(74_900)..ms(75_600)).contains(&took), "{took:?}");
    let mut client = connect();
    client.get("/").await;
    rig.trigger();
    // What waits when the listener is closed.
    let mut late = connect();
    assert_eq!(late.get("/").await.text(), "hello");
    drop((client, late));
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn the_peers_address_is_in_the_extensions() {
    let whoami = tower::service_fn(|request: Request<Incoming>| async move {
        let peer = request.extensions().get::<buttress_core::key::PeerAddr>();
        Ok::<_, io::Error>(Response::new(peer.unwrap().0.to_string()))
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let shutdown = shutdown();
    let server = Server::new(&shutdown).serve_with(listener, PeerAddrs(whoami));
    let rig = Rig::with(shutdown, addr, server);
    let mut client = Client::new(rig.addr).await;
    let me = client.io.get_ref().local_addr().unwrap();
    assert_eq!(client.get("/").await.text(), me.to_string());
}

#[cfg(unix)]
mod unix {
    use buttress_drain::Server;
    use tokio::net::{UnixListener, UnixStream};

    use crate::{
        Rig,
        app::app,
        client::{Client, get},
        limits, shutdown, shutdown_of, soon,
    };

    fn path(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("buttress-{}-{name}.sock", std::process::id()))
    }

    #[tokio::test]
    async fn a_unix_socket_is_served_and_drained() {
        let path = path("served");
        let listener = UnixListener::bind(&path).unwrap();
        let shutdown = shutdown();
        let server = Server::new(&shutdown)
            .limits(limits().build().unwrap())
            .serve(listener, app());
        let rig = Rig::with(shutdown, ([127, 0, 0, 1], 0).into(), server);
        let connect = async || Client::over(soon(UnixStream::connect(&path)).await.unwrap());
        let mut idle = connect().await;
        assert!(!idle.get("/").await.closes());
        let mut busy = connect().await;
        busy.send(get("/slow/500")).await.unwrap();
        rig.trigger();
        let mut new = connect().await;
        assert!(new.get("/").await.closes());
        assert!(idle.is_closed().await.unwrap());
        assert_eq!(busy.answer().await.text(), "slow");
        drop((idle, busy, new));
        assert_eq!(rig.ended().await.exit_code(), 0);
        assert!(UnixStream::connect(&path).await.is_err());
        std::fs::remove_file(&path).unwrap();
    }

    #[tokio::test]
    async fn what_has_arrived_is_answered() {
        let path = path("races");
        for _ in 0..10 {
            let listener = UnixListener::bind(&path).unwrap();
            let shutdown = shutdown_of(0, 5000, 500);
            let server = Server::new(&shutdown)
                .limits(limits().build().unwrap())
                .serve(listener, app());
            let rig = Rig::with(shutdown, ([127, 0, 0, 1], 0).into(), server);
            let mut clients = Vec::new();
            for _ in 0..20 {
                let io = soon(UnixStream::connect(&path)).await.unwrap();
                let mut client = Client::over(io);
                client.get("/").await;
                clients.push(client);
            }
            // And some in the backlog.
            for _ in 0..5 {
                let io = soon(UnixStream::connect(&path)).await.unwrap();
                clients.push(Client::over(io));
            }
            for client in &mut clients {
                let sent = client.io.get_ref().try_write(get("/").as_bytes());
                assert_eq!(sent.unwrap(), get("/").len());
            }
            rig.trigger();
            for client in &mut clients {
                assert_eq!(client.answer().await.text(), "hello");
            }
            drop(clients);
            assert_eq!(rig.ended().await.exit_code(), 0);
            std::fs::remove_file(&path).unwrap();
        }
    }
}

mod together {
    use std::{
        io::{self, IoSlice},
        pin::Pin,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::SeqCst},
        },
        task::{Context, Poll},
    };

    use buttress_drain::{Listener, Server, Socket};
    use tokio::{
        io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex},
        sync::mpsc,
    };

    use crate::{app::app, shutdown, soon};

    /// Counts the writes, which would be system calls.
    struct Counting {
        io: DuplexStream,
        writes: Arc<AtomicUsize>,
    }

    impl AsyncRead for Counting {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Counting {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.writes.fetch_add(1, SeqCst);
            Pin::new(&mut self.io).poll_write(cx, buf)
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.writes.fetch_add(1, SeqCst);
            Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
        }

        fn is_write_vectored(&self) -> bool {
            self.io.is_write_vectored()
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_shutdown(cx)
        }
    }

    impl Socket for Counting {}

    struct InMemory(mpsc::UnboundedReceiver<Counting>);

    impl Listener for InMemory {
        type Io = Counting;
        type Addr = ();

        fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(Counting, ())>> {
            match self.0.poll_recv(cx) {
                Poll::Ready(Some(io)) => Poll::Ready(Ok((io, ()))),
                _ => Poll::Pending,
            }
        }
    }

    /// Of HTTP/2: each by itself, sixteen answers would be sixteen writes and
    /// more. All of it is on one worker, which runs a task that was woken just
    /// now before all others.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn streams_that_answer_at_the_same_time_are_sent_together() {
        soon(tokio::spawn(counted())).await.unwrap();
    }

    async fn counted() {
        const STREAMS: usize = 16;
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(Server::new(&shutdown()).serve(InMemory(receiver), app()));
        let (client, io) = duplex(64 * 1024);
        let writes = Arc::new(AtomicUsize::new(0));
        let counting = Counting {
            io,
            writes: Arc::clone(&writes),
        };
        assert!(sender.send(counting).is_ok());
        let (send, connection) = h2::client::handshake(client).await.unwrap();
        tokio::spawn(connection);
        let mut send = soon(send.ready()).await.unwrap();
        for round in 0..3 {
            let before = writes.load(SeqCst);
            let mut answers = Vec::new();
            for _ in 0..STREAMS {
                let request = http::Request::get("http://test/").body(()).unwrap();
                answers.push(send.send_request(request, true).unwrap().0);
            }
            for answer in answers {
                let answer = soon(answer).await.unwrap();
                assert_eq!(answer.status(), 200);
                let mut body = answer.into_body();
                while let Some(data) = soon(body.data()).await {
                    data.unwrap();
                }
            }
            let took = writes.load(SeqCst) - before;
            // The first round has the settings in it.
            assert!(round == 0 || took <= 4, "{took} writes");
        }
    }
}
