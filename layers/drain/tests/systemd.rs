//! Sockets that are handed over, and what a service manager is told: a parent
//! that does it, and this very program as its child.

#![cfg(unix)]

use std::{
    env, fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    process::{Child, Command, Stdio},
    time::Duration,
};

use buttress_drain::{Server, Shutdown, systemd};
use http::{Request, Response};
use hyper::body::Incoming;

const CHILD: &str = "BUTTRESS_TEST_CHILD";
const BOUND: Duration = Duration::from_secs(20);

/// Not a test of its own: what the others start. It serves what it was handed
/// until it is told to stop.
#[test]
fn child() {
    let Ok(what) = env::var(CHILD) else {
        return;
    };
    let sockets = systemd::Sockets::from_env();
    // Not for children of its own.
    assert!(env::var_os("LISTEN_FDS").is_none());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(serve(sockets, &what));
}

async fn serve(mut sockets: systemd::Sockets, what: &str) {
    let shutdown = Shutdown::builder()
        .drain_delay(Duration::from_millis(200))
        .timeout(Duration::from_secs(10))
        .build()
        .unwrap();
    shutdown.install_signals().unwrap();
    let names: Vec<_> = sockets.names().map(ToOwned::to_owned).collect();
    let told = format!("{} {}", sockets.len(), names.join(","));
    let listener = match what {
        "named" => {
            assert!(sockets.take_tcp("other").unwrap().is_none());
            // The first is no TCP socket, and stays where it is.
            assert!(sockets.take_tcp_at(0).is_err());
            assert!(sockets.take_unix_at(0).unwrap().is_some());
            sockets.take_tcp("http").unwrap().unwrap()
        }
        _ => sockets.take_tcp("whatever").unwrap().unwrap(),
    };
    assert!(sockets.take_tcp("http").unwrap().is_none());
    let app = tower::service_fn(move |_: Request<Incoming>| {
        let told = told.clone();
        async move { Ok::<_, std::io::Error>(Response::new(told)) }
    });
    tokio::spawn(Server::new(&shutdown).serve(listener, app));
    tokio::spawn(systemd::announce(&shutdown).unwrap());
    shutdown.run().await.exit()
}

/// This program again, with descriptor 3, and 4, and what is said of them.
fn start(what: &str, extra: &str, first: OwnedFd, second: Option<OwnedFd>) -> Child {
    let script = match second {
        Some(_) => "exec 3<&0 4<&1 0</dev/null 1>/dev/null",
        None => "exec 3<&0 0</dev/null",
    };
    let this = env::current_exe().unwrap();
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(format!(
            "{script}; export {extra}; exec \"$0\" --exact child"
        ))
        .arg(this)
        .env(CHILD, what)
        .stdin(Stdio::from(first));
    match second {
        Some(second) => command.stdout(Stdio::from(second)),
        None => command.stdout(Stdio::null()),
    };
    command.spawn().unwrap()
}

fn get(addr: std::net::SocketAddr) -> String {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    body.to_owned()
}

fn terminate(child: &Child) {
    let pid = i32::try_from(child.id()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

/// One process after the other on one socket: who connects between the two
/// waits, and nobody is refused.
#[test]
fn a_socket_outlives_its_processes() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    for extra in ["LISTEN_FDS=1 LISTEN_PID=$$", "LISTEN_FDS=1"] {
        let mine = listener.try_clone().unwrap();
        let mut child = start("plain", extra, mine.into(), None);
        assert_eq!(get(addr), "1 ");
        terminate(&child);
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(0));
    }
    // Nobody serves it now, and it listens.
    let waiting = std::thread::spawn(move || get(addr));
    let mut child = start("plain", "LISTEN_FDS=1", listener.into(), None);
    assert_eq!(waiting.join().unwrap(), "1 ");
    terminate(&child);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn sockets_are_known_by_name_and_the_manager_is_told() {
    let dir = env::temp_dir().join(format!("buttress-systemd-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let notify = UnixDatagram::bind(dir.join("notify")).unwrap();
    notify.set_read_timeout(Some(BOUND)).unwrap();
    let unix = std::os::unix::net::UnixListener::bind(dir.join("unix")).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = tcp.local_addr().unwrap();
    let extra = format!(
        "LISTEN_FDS=2 LISTEN_PID=$$ LISTEN_FDNAMES=unix:http NOTIFY_SOCKET='{}'",
        dir.join("notify").display()
    );
    let mut child = start("named", &extra, unix.into(), Some(tcp.into()));

    let message = || {
        let mut buffer = [0; 1024];
        let length = notify.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    let ready = message();
    assert!(ready.contains("READY=1\n"), "{ready}");
    assert!(
        ready.contains(&format!("MAINPID={}\n", child.id())),
        "{ready}"
    );
    assert_eq!(get(addr), "2 unix,http");

    terminate(&child);
    let stopping = message();
    assert!(stopping.contains("STOPPING=1\n"), "{stopping}");
    assert!(
        stopping.contains("STATUS=shutting down: SIGTERM"),
        "{stopping}"
    );
    let extended = stopping
        .lines()
        .find_map(|line| line.strip_prefix("EXTEND_TIMEOUT_USEC="));
    let extended: u64 = extended.unwrap().parse().unwrap();
    // 10 s, and a second to spare.
    assert!((10_500_000..=11_000_000).contains(&extended), "{extended}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    fs::remove_dir_all(dir).unwrap();
}

/// What is meant for another process is left alone.
#[test]
fn sockets_of_others_are_not_taken() {
    let this = env::current_exe().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let output = Command::new("sh")
        .arg("-c")
        .arg("exec 3<&0; export LISTEN_FDS=1 LISTEN_PID=1; exec \"$0\" --exact child")
        .arg(this)
        .env(CHILD, "plain")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .output()
        .unwrap();
    assert!(!output.status.success(), "there was nothing to take");
}
