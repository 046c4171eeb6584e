//! One of the processes: the example `drain`.

use std::{
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

/// Nothing here takes longer, or it hangs.
const LONG: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) listen: SocketAddr,
    pub(crate) admin: SocketAddr,
    delay: Duration,
    child: Child,
}

impl Replica {
    pub(crate) async fn start(delay: Duration) -> Self {
        // Of two that are free now, which a restart takes again.
        let free = [0; 2].map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"));
        let [listen, admin] = free.map(|socket| socket.local_addr().expect("it is bound"));
        let replica = Self {
            listen,
            admin,
            delay,
            child: spawn(listen, admin, delay),
        };
        replica.is_ready().await;
        replica
    }

    /// As an orchestrator does it: told to stop, waited for, and started anew.
    pub(crate) async fn restart(&mut self) {
        let pid = i32::try_from(self.child.id()).expect("a process");
        let pid = rustix::process::Pid::from_raw(pid).expect("a process");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
        let ended = async {
            loop {
                if let Some(status) = self.child.try_wait().expect("it is ours") {
                    return status;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        let status = timeout(LONG, ended).await.expect("it ends in its time");
        assert_eq!(status.code(), Some(0), "nothing was cut off");
        self.child = spawn(self.listen, self.admin, self.delay);
        self.is_ready().await;
    }

    async fn is_ready(&self) {
        let ready = async {
            while !ready(self.admin).await {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(LONG, ready).await.expect("it becomes ready");
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program, which `cargo test` builds beside the tests.
fn spawn(listen: SocketAddr, admin: SocketAddr, delay: Duration) -> Child {
    let path = std::env::current_exe().expect("a test has a path");
    let path = path.parent().and_then(|deps| deps.parent());
    let path: PathBuf = path.expect("deps").join("examples").join("drain");
    assert!(
        path.exists(),
        "the example is not built; run the tests by `cargo test -p buttress-examples`"
    );
    let mut child = Command::new(path)
        .args([listen.to_string(), admin.to_string()])
        .arg(delay.as_millis().to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let output = child.stdout.take().expect("piped");
    // What it has yet to print must have somewhere to go.
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if line.starts_with("shut down") {
                println!("  {line}");
            }
        }
    });
    child
}

/// What a balancer asks.
pub(crate) async fn ready(admin: SocketAddr) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(admin).await?;
        let request = "GET /health/ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer.starts_with("HTTP/1.1 200"))
    };
    let asked = timeout(Duration::from_secs(1), asked).await;
    asked.is_ok_and(|answer| answer.unwrap_or(false))
}
