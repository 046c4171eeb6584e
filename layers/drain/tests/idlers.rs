//! Thousands of idle and slow connections beside clients that want something:
//! a server in a process of its own (this program again, as what
//! `BUTTRESS_DRAIN_IDLERS` says), so that each side has its own descriptors.
#![cfg(unix)]

use std::{
    convert::Infallible,
    env,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
        mpsc,
    },
    time::Duration,
};

use buttress_core::clock::{self, Instant};
use buttress_drain::{CutKind, DrainLayer, Limits, Server, Shutdown};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Channel, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    runtime::{Builder, Runtime},
    task::JoinSet,
    time::{interval, sleep, timeout},
};
use tower::Layer;

const ROLE: &str = "BUTTRESS_DRAIN_IDLERS";
const PATIENCE: Duration = Duration::from_secs(30);
/// What a debug build on a busy machine may be late by.
const SLACK: Duration = Duration::from_millis(1500);

const DELAY: Duration = Duration::from_millis(400);
const CUT: Duration = Duration::from_secs(5);
const RESERVE: Duration = Duration::from_secs(1);
const HEAD: Duration = Duration::from_secs(2);
const GRACE: Duration = Duration::from_secs(1);

/// Where the server's places are few.
const PLACES: usize = 300;
const TURN: Duration = Duration::from_millis(800);

/// More than all buffers between a handler and a client that does not read.
const LARGE: usize = 2 * 1024 * 1024;
const SMALL_BUFFER: u32 = 4096;

/// Each of these has the machine to itself.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn runtime() -> Runtime {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap()
}

/// Has the system allow as many descriptors as are wanted, and tells what part
/// of it there is to be had, in percent.
#[expect(clippy::print_stderr, reason = "what was not proven is said aloud")]
fn raise(wanted: usize) -> usize {
    let limit = getrlimit(Resource::Nofile);
    let wanted = wanted as u64 + 500;
    let most = limit.maximum.unwrap_or(u64::MAX).min(wanted);
    if limit.current.is_some_and(|now| now < most) {
        let raised = Rlimit {
            current: Some(most),
            maximum: limit.maximum,
        };
        setrlimit(Resource::Nofile, raised).unwrap();
    }
    if most == wanted {
        return 100;
    }
    let percent = usize::try_from((most - 500) * 100 / wanted).unwrap();
    eprintln!("ONLY {percent} % OF THE CONNECTIONS: no more than {most} descriptors are allowed");
    assert!(env::var_os("CI").is_none(), "this is to run at full size");
    percent
}

// The server.

fn limits(role: &str) -> Limits {
    let limits = Limits::builder().header_timeout(HEAD);
    match role {
        // Their system may still take something for them, when it is asked
        // again: after 0.2, 0.6, 1.4 and 3 seconds, the last of them before
        // the cut.
        "taking" => limits.write_timeout(Duration::from_secs(1)),
        "full" => limits
            .max_connections(PLACES)
            .header_timeout(TURN)
            .idle_timeout(TURN),
        _ => limits,
    }
    .build()
    .unwrap()
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// In pieces: a request that is open until the last of them is gone.
fn pieces(mut large: Bytes) -> Body {
    let (mut sender, body) = Channel::<Bytes, Infallible>::new(1);
    tokio::spawn(async move {
        while !large.is_empty() {
            let piece = large.split_to(large.len().min(16 * 1024));
            if sender.send_data(piece).await.is_err() {
                return;
            }
        }
    });
    body.boxed_unsync()
}

async fn answer(large: Bytes, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let body = match request.uri().path() {
        "/large" => large,
        "/pieces" => return Ok(Response::new(pieces(large))),
        "/slow" => {
            sleep(Duration::from_millis(1500)).await;
            "slow".into()
        }
        _ => "hello".into(),
    };
    Ok(Response::new(Full::new(body).boxed_unsync()))
}

/// A line for the test.
fn say(what: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "child: {what}").unwrap();
    out.flush().unwrap();
}

/// What the tests below start. By itself it does nothing.
#[test]
fn child() {
    let Ok(role) = env::var(ROLE) else { return };
    let shutdown = Shutdown::builder()
        .drain_delay(DELAY)
        .timeout(CUT + RESERVE)
        .hook_reserve(RESERVE)
        .exit_process()
        .build()
        .unwrap();
    shutdown.install_signals().unwrap();
    let report = runtime().block_on(async {
        let socket = TcpSocket::new_v4().unwrap();
        // Theirs too: or each slow reader would have megabytes of the kernel's.
        socket.set_send_buffer_size(4 * SMALL_BUFFER).unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        let listener = socket.listen(4096).unwrap();
        let addr = listener.local_addr().unwrap();
        let large = Bytes::from(vec![b'x'; LARGE]);
        let app = tower::service_fn(move |request| answer(large.clone(), request));
        let app = DrainLayer::new(&shutdown).layer(app);
        let server = Server::new(&shutdown).limits(limits(&role));
        tokio::spawn(server.serve(listener, app));
        say(&format!("at {addr}"));
        shutdown.run().await
    });
    let cut = report.cut().iter();
    let connections = cut.filter(|cut| cut.kind() == CutKind::Connection).count();
    let requests = report.requests_cut();
    say(&format!("cut {requests} {connections}"));
    report.exit();
}

struct Served {
    child: Child,
    lines: mpsc::Receiver<String>,
    addr: SocketAddr,
}

impl Served {
    fn start(role: &str) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (tell, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                // The test harness begins a line of its own.
                if let Some((_, line)) = line.split_once("child: ")
                    && tell.send(line.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let mut served = Self {
            child,
            lines,
            addr: ([127, 0, 0, 1], 0).into(),
        };
        served.addr = served.told("at ").parse().unwrap();
        served
    }

    fn told(&self, what: &str) -> String {
        let line = self.lines.recv_timeout(PATIENCE).expect("it says nothing");
        line.strip_prefix(what).expect(&line).to_owned()
    }

    fn terminate(&self) -> Instant {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        clock::now()
    }

    /// Its exit code, and when.
    async fn ended(&mut self) -> (Option<i32>, Instant) {
        let ended = async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return (status.code(), clock::now());
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, ended).await.expect("it goes on and on")
    }

    /// How many requests and connections were cut.
    fn cut(&self) -> (usize, usize) {
        let told = self.told("cut ");
        let (requests, connections) = told.split_once(' ').unwrap();
        (requests.parse().unwrap(), connections.parse().unwrap())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// Those who want something.

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n";

/// The whole of an answer to which there is little; `None` if it was closed
/// instead.
async fn read_answer(io: &mut TcpStream, last: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
    let mut answer = Vec::new();
    let mut buffer = [0; 512];
    while !answer.ends_with(last) {
        let read = timeout(PATIENCE, io.read(&mut buffer)).await??;
        if read == 0 {
            assert!(answer.is_empty(), "half an answer");
            return Ok(None);
        }
        answer.extend(&buffer[..read]);
    }
    assert!(answer.starts_with(b"HTTP/1.1 200 "));
    Ok(Some(answer))
}

fn closes(answer: &[u8]) -> bool {
    answer.windows(17).any(|at| at == b"connection: close")
}

async fn connect(addr: SocketAddr) -> TcpStream {
    let io = timeout(PATIENCE, TcpStream::connect(addr)).await;
    let io = io.expect("nobody accepts").unwrap();
    io.set_nodelay(true).unwrap();
    io
}

/// How long each of so many requests took, of a few clients that ask one after
/// the other; one in twenty on a connection of its own.
async fn times(addr: SocketAddr) -> Vec<Duration> {
    let clients = (0..CLIENTS).map(|_| {
        tokio::spawn(async move {
            let mut io = connect(addr).await;
            let mut times = Vec::new();
            for n in 0..REQUESTS {
                let start = clock::now();
                if n % 20 == 19 {
                    io = connect(addr).await;
                }
                io.write_all(GET).await.unwrap();
                let answer = read_answer(&mut io, b"hello").await.unwrap();
                assert!(answer.is_some(), "closed without an answer");
                times.push(clock::now() - start);
            }
            times
        })
    });
    let mut all = Vec::new();
    for client in clients.collect::<Vec<_>>() {
        all.extend(client.await.unwrap());
    }
    all
}

const CLIENTS: usize = 4;
const REQUESTS: usize = 200;
const ROUNDS: usize = 12;

fn p99(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() * 99 / 100]
}

fn median<T: PartialOrd + Copy>(mut values: Vec<T>) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).unwrap());
    values[values.len() / 2]
}

/// Asks until it is told to go elsewhere: how many were answered.
async fn asks_until_told(addr: SocketAddr) -> usize {
    let mut io = connect(addr).await;
    let mut answered = 0;
    loop {
        io.write_all(GET).await.unwrap();
        // What was sent before anybody had said that it closes is answered.
        let answer = read_answer(&mut io, b"hello").await.unwrap().unwrap();
        answered += 1;
        if closes(&answer) {
            assert_eq!(io.read(&mut [0]).await.unwrap(), 0);
            return answered;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Asks for something that takes its time.
async fn asks_slowly(addr: SocketAddr, sent: Arc<AtomicUsize>) {
    let mut io = connect(addr).await;
    let request = b"GET /slow HTTP/1.1\r\nhost: test\r\n\r\n";
    io.write_all(request).await.unwrap();
    sent.fetch_add(1, SeqCst);
    let answer = read_answer(&mut io, b"slow").await.unwrap().unwrap();
    assert!(closes(&answer));
}

// Those who do not.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Answered once, and then nothing.
    Idle,
    /// Not a byte.
    Silent,
    /// A head, a byte now and then; and again, as often as it is closed.
    Head,
    /// A large answer, of one piece or many, a byte now and then.
    Reader,
}

/// Who has gone, because the server wanted so.
struct Gone {
    kind: Kind,
    at: Instant,
    /// Half of them never close their end.
    _held: Option<TcpStream>,
}

/// A head that was cut short.
#[derive(Clone, Copy, Debug)]
struct Spell {
    begun: Instant,
    ended: Instant,
}

/// What all of them share.
struct Crowd {
    addr: SocketAddr,
    /// Those who trickle hold still.
    still: AtomicBool,
    /// How many are where they want to be.
    there: AtomicUsize,
    spells: Mutex<Vec<Spell>>,
}

/// How slow they are.
const PACE: Duration = Duration::from_secs(1);

impl Crowd {
    fn new(addr: SocketAddr) -> Arc<Self> {
        Arc::new(Self {
            addr,
            still: AtomicBool::new(false),
            there: AtomicUsize::new(0),
            spells: Mutex::default(),
        })
    }

    /// So many of each kind, a few at a time.
    async fn gather(self: &Arc<Self>, kinds: &[(Kind, usize)], tasks: &mut JoinSet<Gone>) {
        let mut come = 0;
        for &(kind, count) in kinds {
            for n in 0..count {
                let crowd = Arc::clone(self);
                tasks.spawn(async move { crowd.one(kind, n % 2 == 0).await });
                come += 1;
                if come % 100 == 0 {
                    self.are_there(come - 50).await;
                }
            }
        }
        self.are_there(come).await;
    }

    async fn are_there(&self, count: usize) {
        let all = async {
            while self.there.load(SeqCst) < count {
                sleep(Duration::from_millis(2)).await;
            }
        };
        let all = timeout(PATIENCE, all).await;
        all.unwrap_or_else(|_| panic!("{} of {count}", self.there.load(SeqCst)));
    }

    async fn one(&self, kind: Kind, holds: bool) -> Gone {
        let mut held = None;
        let at = match kind {
            Kind::Idle => {
                let mut io = connect(self.addr).await;
                io.write_all(GET).await.unwrap();
                read_answer(&mut io, b"hello").await.unwrap().unwrap();
                self.there.fetch_add(1, SeqCst);
                let at = closed(&mut io).await;
                held = holds.then_some(io);
                at
            }
            Kind::Silent => {
                let mut io = connect(self.addr).await;
                self.there.fetch_add(1, SeqCst);
                let at = closed(&mut io).await;
                held = holds.then_some(io);
                at
            }
            Kind::Head => self.heads().await,
            Kind::Reader if holds => self.reads("/large").await,
            Kind::Reader => self.reads("/pieces").await,
        };
        Gone {
            kind,
            at,
            _held: held,
        }
    }

    async fn heads(&self) -> Instant {
        let mut io = connect(self.addr).await;
        self.there.fetch_add(1, SeqCst);
        loop {
            let begun = clock::now();
            let mut pace = interval(PACE);
            let mut byte = [0];
            for next in b"GET / HTTP/1.1\r\nx: ".iter().chain([&b'y'; 100]) {
                tokio::select! {
                    // Closed, or reset, or told why.
                    _ = io.read(&mut byte) => break,
                    _ = pace.tick() => {
                        if !self.still.load(Relaxed) && io.write_all(&[*next]).await.is_err() {
                            break;
                        }
                    }
                }
            }
            let ended = clock::now();
            drop(io);
            self.spells.lock().unwrap().push(Spell { begun, ended });
            match TcpStream::connect(self.addr).await {
                Ok(new) => io = new,
                // The listener is closed.
                Err(_) => return ended,
            }
        }
    }

    async fn reads(&self, path: &str) -> Instant {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(SMALL_BUFFER).unwrap();
        let mut io = socket.connect(self.addr).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n");
        io.write_all(request.as_bytes()).await.unwrap();
        let mut byte = [0];
        io.read_exact(&mut byte).await.unwrap();
        self.there.fetch_add(1, SeqCst);
        let mut pace = interval(PACE);
        loop {
            pace.tick().await;
            if !self.still.load(Relaxed) && !io.read(&mut byte).await.is_ok_and(|read| read > 0) {
                return clock::now();
            }
        }
    }
}

/// When it was, by FIN or reset.
async fn closed(io: &mut TcpStream) -> Instant {
    let mut buffer = [0; 512];
    while io.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
    clock::now()
}

/// Of each of these kinds everybody is gone by then.
async fn are_gone(tasks: &mut JoinSet<Gone>, kinds: &[(Kind, usize, Instant)]) -> Vec<Gone> {
    let mut left: usize = kinds.iter().map(|(_, count, _)| count).sum();
    let mut all = Vec::new();
    while left > 0 {
        let next = timeout(PATIENCE, tasks.join_next()).await;
        let gone = next.expect("some stay").unwrap().unwrap();
        if let Some((kind, _, by)) = kinds.iter().find(|(kind, ..)| *kind == gone.kind) {
            let late = gone.at - *by;
            assert!(gone.at <= *by, "{kind:?} late by {late:?}");
            left -= 1;
            all.push(gone);
        }
    }
    all
}

fn scaled(percent: usize) -> [(Kind, usize); 4] {
    [
        (Kind::Idle, 2000),
        (Kind::Silent, 1000),
        (Kind::Head, 1000),
        (Kind::Reader, 1000),
    ]
    .map(|(kind, count)| (kind, count * percent / 100))
}

/// The goal: the slowest of a hundred legitimate requests takes no longer than
/// twice what it takes where there is nobody else, and the drain keeps its
/// deadline.
#[test]
#[expect(clippy::print_stderr, reason = "what was measured")]
fn nobody_else_is_slow_and_the_drain_ends_on_time() {
    let _alone = alone();
    let kinds = scaled(raise(5000));
    let quiet = Served::start("quiet");
    let mut crowded = Served::start("crowded");
    runtime().block_on(async {
        // So that neither is told apart by what it does for the first time.
        let before = [times(quiet.addr).await, times(crowded.addr).await].map(p99);
        let crowd = Crowd::new(crowded.addr);
        let mut tasks = JoinSet::new();
        let begun = clock::now();
        crowd.gather(&kinds, &mut tasks).await;
        let gathered = clock::now() - begun;

        let mut rounds = Vec::new();
        // Long enough for every slow head to be cut short once.
        while rounds.len() < ROUNDS || clock::now() - begun < HEAD * 2 {
            let round = rounds.len();
            let mut both = [Duration::ZERO; 2];
            for step in 0..2 {
                let at = (round + step) % 2;
                crowd.still.store(at == 0, Relaxed);
                let addr = [quiet.addr, crowded.addr][at];
                both[at] = p99(times(addr).await);
            }
            rounds.push(both);
        }
        let ratios = rounds
            .iter()
            .map(|[without, with]| with.div_duration_f64(*without));
        let ratio = median(ratios.collect());
        let [without, with] = [0, 1].map(|at| median(rounds.iter().map(|both| both[at]).collect()));
        eprintln!(
            "p99 {without:?} without, {with:?} with; median ratio {ratio:.2}; before {before:?}, \
             gathered in {gathered:?}"
        );
        assert!(ratio <= 2.0, "{ratio}: {rounds:?}");

        let spells = crowd.spells.lock().unwrap().clone();
        assert!(spells.len() >= kinds[2].1, "{}", spells.len());
        for spell in spells {
            let took = spell.ended - spell.begun;
            let limit = HEAD - Duration::from_millis(50)..HEAD + SLACK;
            assert!(limit.contains(&took), "{took:?}");
        }

        let addr = crowded.addr;
        let sent = Arc::new(AtomicUsize::new(0));
        let slow = (0..20).map(|_| tokio::spawn(asks_slowly(addr, Arc::clone(&sent))));
        let slow: Vec<_> = slow.collect();
        let asking = (0..10).map(|_| tokio::spawn(asks_until_told(addr)));
        let asking: Vec<_> = asking.collect();
        while sent.load(SeqCst) < slow.len() {
            sleep(Duration::from_millis(1)).await;
        }
        sleep(Duration::from_millis(100)).await;
        let start = crowded.terminate();
        for client in asking {
            assert!(client.await.unwrap() > 1);
        }
        for client in slow {
            client.await.unwrap();
        }
        let [idle, silent, heads, readers] = kinds.map(|(_, count)| count);
        let closing = start + DELAY;
        let gone = are_gone(
            &mut tasks,
            &[
                (Kind::Idle, idle, closing + SLACK),
                (Kind::Silent, silent, closing + GRACE + SLACK),
                (Kind::Head, heads, closing + HEAD + SLACK),
            ],
        )
        .await;
        let idle = gone.iter().filter(|gone| gone.kind == Kind::Idle);
        let first = idle.map(|gone| gone.at).min();
        assert!(first.is_some_and(|at| at >= closing), "within the delay");

        let (code, at) = crowded.ended().await;
        let took = at - start;
        assert_eq!(code, Some(124));
        // Of a body that was handed over whole the server alone knows that
        // there is more of it.
        assert_eq!(crowded.cut(), (readers / 2, readers));
        assert!((CUT..CUT + RESERVE + SLACK).contains(&took), "{took:?}");
        eprintln!("drained after {took:?}");
        drop(gone);
    });
}

/// Where those who read nothing are given up in time, nothing is left to cut:
/// the rest never counts.
#[test]
#[expect(clippy::print_stderr, reason = "what was measured")]
fn who_takes_nothing_does_not_hold_it() {
    let _alone = alone();
    let kinds = scaled(raise(5000));
    let mut served = Served::start("taking");
    runtime().block_on(async {
        let crowd = Crowd::new(served.addr);
        let mut tasks = JoinSet::new();
        crowd.gather(&kinds, &mut tasks).await;
        let addr = served.addr;
        let sent = Arc::new(AtomicUsize::new(0));
        let slow = tokio::spawn(asks_slowly(addr, Arc::clone(&sent)));
        while sent.load(SeqCst) == 0 {
            sleep(Duration::from_millis(1)).await;
        }
        sleep(Duration::from_millis(100)).await;
        let start = served.terminate();
        slow.await.unwrap();
        let (code, at) = served.ended().await;
        let took = at - start;
        assert_eq!((code, served.cut()), (Some(0), (0, 0)), "{took:?}");
        assert!(took < CUT, "{took:?}");
        eprintln!("drained after {took:?}");
    });
}

/// Twice as many as there are places, who all come back at once.
#[test]
#[expect(clippy::print_stderr, reason = "what was measured")]
fn there_is_a_turn_for_everybody() {
    let _alone = alone();
    let percent = raise(5000);
    assert!(
        percent * 50 > PLACES * 3,
        "too few descriptors for any of it"
    );
    let mut served = Served::start("full");
    runtime().block_on(async {
        let crowd = Crowd::new(served.addr);
        let mut tasks = JoinSet::new();
        crowd
            .gather(&[(Kind::Silent, 0), (Kind::Head, 2 * PLACES)], &mut tasks)
            .await;
        let mut clients = JoinSet::new();
        let addr = served.addr;
        for n in 0..20 {
            clients.spawn(async move {
                sleep(Duration::from_millis(n * 40)).await;
                let mut waits = Vec::new();
                for _ in 0..3 {
                    let start = clock::now();
                    let mut io = connect(addr).await;
                    io.write_all(GET).await.unwrap();
                    read_answer(&mut io, b"hello").await.unwrap().unwrap();
                    waits.push(clock::now() - start);
                }
                waits
            });
        }
        let mut waits = Vec::new();
        while let Some(waited) = clients.join_next().await {
            waits.extend(waited.unwrap());
        }
        waits.sort();
        let (middle, longest) = (waits[waits.len() / 2], waits[waits.len() - 1]);
        eprintln!("a turn came after {middle:?}, at the latest {longest:?}");
        assert!(longest < 2 * TURN + SLACK, "{waits:?}");
        assert!(longest > TURN / 4, "there was room: {waits:?}");

        // In the backlog, at the end.
        let mut last = connect(addr).await;
        last.write_all(GET).await.unwrap();
        let start = served.terminate();
        let answer = read_answer(&mut last, b"hello").await.unwrap().unwrap();
        assert!(closes(&answer));
        drop(last);
        let (code, at) = served.ended().await;
        let took = at - start;
        assert_eq!((code, served.cut()), (Some(0), (0, 0)), "{took:?}");
        assert!(took < CUT, "{took:?}");
        eprintln!("drained after {took:?}");
    });
}
