//! A process with nothing to do, asked to end: what its probes, its clients and
//! its parent see of it. On our own server, and on axum's and tonic's with ours
//! under them: each is this program again, as what `BUTTRESS_DRAIN_IDLE` says.
#![cfg(unix)]

use std::{
    env,
    future::IntoFuture,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use axum::{Router, routing::get};
use buttress::{
    clock::{self, Instant},
    drain::{AxumListener, DrainLayer, Limits, Server, Shutdown, TonicIncoming},
    health::HealthRegistry,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Builder,
    time::{sleep, timeout},
};
use tonic::{Streaming, service::Routes, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

const ROLE: &str = "BUTTRESS_DRAIN_IDLE";
const LONG: Duration = Duration::from_secs(20);

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// So long that a machine which is busy with other things does all that is
/// asked of it in the meantime.
const DELAY: Duration = ms(1500);
/// Before anything is cut, which is after four seconds.
const SOON: Duration = ms(3500);

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
        .timeout(ms(6000))
        .hook_reserve(ms(2000))
        .exit_process()
        .build()
        .unwrap();
    shutdown.install_signals().unwrap();
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let health = HealthRegistry::builder()
            .gate("drain", shutdown.clone())
            .build()
            .unwrap();
        let _running = health.start().unwrap();
        let (admin, probes) = listen().await;
        let routes = Routes::new(health.grpc_server()).into_axum_router();
        let routes = routes.nest_service("/health", health.service());
        tokio::spawn(axum::serve(admin, routes).into_future());

        let (listener, addr) = listen().await;
        let layer = DrainLayer::new(&shutdown);
        let app = Router::new().route("/", get(|| async { "hello" }));
        match &*role {
            "ours" => {
                let server = Server::new(&shutdown);
                tokio::spawn(server.serve(listener, app.layer(layer)));
            }
            "axum" => {
                let limits = Limits::default();
                let listener = AxumListener::new(&shutdown, "axum", listener, limits);
                let graceful = listener.graceful();
                let server = axum::serve(listener, app.layer(layer));
                tokio::spawn(server.with_graceful_shutdown(graceful).into_future());
            }
            "tonic" => {
                let limits = Limits::default();
                let incoming = TonicIncoming::new(&shutdown, "tonic", listener, limits);
                let graceful = incoming.graceful();
                let server = tonic::transport::Server::builder()
                    .layer(layer)
                    .add_service(health.grpc_server());
                tokio::spawn(server.serve_with_incoming_shutdown(incoming, graceful));
            }
            _ => panic!("no such role: {role}"),
        }
        say(&format!("at {addr} {probes}"));
        shutdown.run().await.exit()
    });
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

struct Served {
    child: Child,
    /// There to the end: what it has yet to print must have somewhere to go.
    _out: BufReader<ChildStdout>,
    addr: SocketAddr,
    probes: SocketAddr,
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
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let (addr, probes) = loop {
            let mut line = String::new();
            assert_ne!(out.read_line(&mut line).unwrap(), 0, "it says nothing");
            // The test harness begins a line of its own.
            if let Some((_, addrs)) = line.split_once("child: at ") {
                let (addr, probes) = addrs.trim_end().split_once(' ').unwrap();
                break (addr.parse().unwrap(), probes.parse().unwrap());
            }
        };
        Self {
            child,
            _out: out,
            addr,
            probes,
        }
    }

    fn terminate(&self) -> Instant {
        let start = clock::now();
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        start
    }

    async fn probe(&self, path: &str) -> u16 {
        let (status, _) = soon(ask(connect(self.probes).await, path)).await;
        status
    }

    /// Its exit code, and when.
    async fn ended(&mut self) -> (Option<i32>, Instant) {
        soon(async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return (status.code(), clock::now());
                }
                sleep(ms(1)).await;
            }
        })
        .await
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(LONG, future).await.expect("it takes too long")
}

async fn connect(addr: SocketAddr) -> TcpStream {
    soon(TcpStream::connect(addr)).await.unwrap()
}

/// The only request of a connection: its status, and the whole answer.
async fn ask(mut io: TcpStream, path: &str) -> (u16, String) {
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    io.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    io.read_to_string(&mut answer).await.unwrap();
    (answer[9..12].parse().unwrap(), answer)
}

/// A client that has asked once, and then is idle until it is closed.
async fn idle(addr: SocketAddr) -> tokio::task::JoinHandle<Instant> {
    let mut io = connect(addr).await;
    io.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    while !answer.ends_with("hello") {
        answer.push(soon(io.read_u8()).await.unwrap().into());
    }
    assert!(!answer.contains("connection: close"), "{answer}");
    tokio::spawn(async move {
        assert_eq!(soon(io.read(&mut [0])).await.unwrap(), 0);
        clock::now()
    })
}

async fn grpc(addr: SocketAddr) -> HealthClient<Channel> {
    let channel = Channel::from_shared(format!("http://{addr}")).unwrap();
    HealthClient::new(soon(channel.connect()).await.unwrap())
}

async fn next(watch: &mut Streaming<HealthCheckResponse>) -> ServingStatus {
    soon(watch.message()).await.unwrap().unwrap().status()
}

/// Its probes before and after the signal, which is sent on the way. The
/// latest of these moments is well within the delay.
async fn turns_unready(served: &Served) -> Instant {
    assert_eq!(served.probe("/health/ready").await, 200);
    let mut probes = grpc(served.probes).await;
    let watch = soon(probes.watch(HealthCheckRequest::default())).await;
    let mut watch = watch.unwrap().into_inner();
    // It may not have looked yet.
    while next(&mut watch).await != ServingStatus::Serving {}

    let start = served.terminate();
    while served.probe("/health/ready").await == 200 {
        assert!(clock::now() - start < DELAY, "it never says so");
    }
    let unready = clock::now() - start;
    // At once; 50 ms on a machine that is not busy.
    assert!(unready < ms(500), "unready after {unready:?}");
    assert_eq!(next(&mut watch).await, ServingStatus::NotServing);
    assert_eq!(served.probe("/health/ready").await, 503);
    assert_eq!(served.probe("/health/live").await, 200);
    assert_eq!(served.probe("/health/startup").await, 200);
    let told = clock::now() - start;
    assert!(told < ms(1200), "all were told after {told:?}");
    start
}

async fn ends_after_the_delay(mut served: Served, start: Instant) {
    let (code, end) = served.ended().await;
    assert_eq!(code, Some(0));
    let took = end - start;
    assert!((DELAY..SOON).contains(&took), "{took:?}");
    assert!(TcpStream::connect(served.addr).await.is_err());
}

async fn http(role: &str) {
    let mut served = Served::start(role);
    let idle = idle(served.addr).await;
    let start = turns_unready(&served).await;
    // Who comes all the same is served.
    let (status, answer) = soon(ask(connect(served.addr).await, "/")).await;
    assert_eq!(status, 200, "{answer}");
    assert!(answer.ends_with("hello"), "{answer}");
    assert!(clock::now() - start < DELAY, "it came too late");
    assert_eq!(served.child.try_wait().unwrap(), None);
    // And who is idle is left alone until nobody comes any more.
    let closed = soon(idle).await.unwrap() - start;
    assert!((DELAY..SOON).contains(&closed), "{closed:?}");
    ends_after_the_delay(served, start).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_server_of_ours_ends_after_the_delay() {
    http("ours").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_axum_ends_after_the_delay() {
    http("axum").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_tonic_ends_after_the_delay() {
    let served = Served::start("tonic");
    let mut client = grpc(served.addr).await;
    let mut check = async || {
        let request = HealthCheckRequest::default();
        soon(client.check(request)).await.unwrap().into_inner()
    };
    while check().await.status() != ServingStatus::Serving {}
    let start = turns_unready(&served).await;
    assert_eq!(check().await.status(), ServingStatus::NotServing);
    assert!(clock::now() - start < DELAY, "it came too late");
    // Its connection is there, idle, until the GOAWAY.
    ends_after_the_delay(served, start).await;
    drop(client);
}
