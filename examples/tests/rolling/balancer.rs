//! What stands before the processes, and knows of them only what it asks.

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::replica::{Replica, ready};

/// How often readiness is asked for.
const EVERY: Duration = Duration::from_millis(100);

pub(crate) enum Balancer {
    Haproxy {
        child: Child,
        config: PathBuf,
        address: SocketAddr,
    },
    Own {
        address: SocketAddr,
        // Aborted when it is dropped.
        _tasks: JoinSet<()>,
    },
}

impl Balancer {
    pub(crate) async fn start(replicas: &[Replica]) -> Self {
        let balancer = if is_installed("haproxy", "-v") {
            haproxy(replicas)
        } else {
            println!("HAProxy is not installed: a balancer of the test's own");
            own(replicas).await
        };
        let listens = async {
            while TcpStream::connect(balancer.address()).await.is_err() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let listens = timeout(Duration::from_secs(20), listens).await;
        listens.expect("the balancer listens");
        balancer
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        match self {
            Self::Haproxy { address, .. } | Self::Own { address, .. } => *address,
        }
    }

    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Haproxy { .. } => "haproxy",
            Self::Own { .. } => "own balancer",
        }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if let Self::Haproxy { child, config, .. } = self {
            let _ = child.kill();
            let _ = child.wait();
            let _ = fs::remove_file(config);
        }
    }
}

/// Whether there is such a program.
pub(crate) fn is_installed(program: &str, version: &str) -> bool {
    let mut command = Command::new(program);
    let command = command
        .arg(version)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok()
}

fn haproxy(replicas: &[Replica]) -> Balancer {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = free.local_addr().expect("it is bound");
    drop(free);
    // No retries: what it is given, it sends once.
    let mut text = format!(
        "global\n  maxconn 2000\n\
         defaults\n  mode http\n  timeout connect 2s\n  timeout client 30s\n  timeout server 30s\n  retries 0\n\
         frontend all\n  bind {address}\n  default_backend replicas\n\
         backend replicas\n  balance roundrobin\n  option httpchk GET /health/ready\n\
         \x20 default-server inter {}ms fall 1 rise 1\n",
        EVERY.as_millis()
    );
    for (at, replica) in replicas.iter().enumerate() {
        let (listen, port) = (replica.listen, replica.admin.port());
        let _ = writeln!(text, "  server r{at} {listen} check port {port}");
    }
    let config = std::env::temp_dir().join(format!("rolling-{}.cfg", address.port()));
    fs::write(&config, text).expect("a file of our own");
    let child = Command::new("haproxy")
        .args(["-q", "-db", "-f"])
        .arg(&config)
        .spawn()
        .expect("it is installed");
    Balancer::Haproxy {
        child,
        config,
        address,
    }
}

/// Connection by connection, in turn, to those that were ready when they were
/// last asked.
async fn own(replicas: &[Replica]) -> Balancer {
    let socket = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = socket.local_addr().expect("it is bound");
    let mut tasks = JoinSet::new();
    let mut backends = Vec::new();
    for replica in replicas {
        let is_ready = Arc::new(AtomicBool::new(true));
        backends.push((replica.listen, Arc::clone(&is_ready)));
        let admin = replica.admin;
        tasks.spawn(async move {
            loop {
                is_ready.store(ready(admin).await, Relaxed);
                sleep(EVERY).await;
            }
        });
    }
    let (backends, turn) = (Arc::new(backends), AtomicUsize::new(0));
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let Ok((mut client, _)) = socket.accept().await else {
                continue;
            };
            let first = turn.fetch_add(1, Relaxed);
            let backends = Arc::clone(&backends);
            while connections.try_join_next().is_some() {}
            connections.spawn(async move {
                let mut places = (0..backends.len()).map(|at| &backends[(first + at) % 3]);
                let Some((listen, _)) = places.find(|(_, is_ready)| is_ready.load(Relaxed)) else {
                    return;
                };
                if let Ok(mut server) = TcpStream::connect(listen).await {
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
    });
    Balancer::Own {
        address,
        _tasks: tasks,
    }
}
