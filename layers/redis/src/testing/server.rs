//! One `redis-server`.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::{Config, Redis};

/// A `redis-server` of one's own on a free loopback port, with a directory of
/// its own. Dropping it kills it.
///
/// The program is `redis-server` on the `PATH`, or what `REDIS_SERVER` names.
///
/// # Panics
///
/// Where the program is missing or does not start within ten seconds: a test
/// that wants it must not pass without.
pub struct Server {
    port: u16,
    args: Vec<String>,
    directory: TempDir,
    child: Option<Child>,
}

impl Server {
    /// A server with nothing in it that keeps nothing.
    pub async fn start() -> Self {
        Self::with([] as [&str; 0]).await
    }

    /// The same with more arguments, as `--appendonly yes`.
    pub async fn with<A: Into<String>>(args: impl IntoIterator<Item = A>) -> Self {
        let args: Vec<String> = args.into_iter().map(Into::into).collect();
        // Between the choice of a port and the server's taking it another
        // program may: then it ends at once, and another one is chosen.
        for _ in 0..10 {
            let mut server = Self {
                port: free_port(),
                args: args.clone(),
                directory: TempDir::new().expect("a directory for redis-server"),
                child: None,
            };
            if server.launch().await {
                return server;
            }
        }
        panic!("redis-server did not start");
    }

    /// Starts it once more on its port, after [`kill`](Self::kill): with what
    /// it has on disk, which is nothing unless it was told to keep it.
    pub async fn restart(&mut self) {
        self.kill();
        assert!(self.launch().await, "redis-server did not start again");
    }

    async fn launch(&mut self) -> bool {
        let program = std::env::var("REDIS_SERVER").unwrap_or_else(|_| "redis-server".to_owned());
        let mut command = Command::new(&program);
        command
            .args(["--port", &self.port.to_string()])
            .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .args(["--daemonize", "no", "--loglevel", "warning"])
            .arg("--dir")
            .arg(self.directory.path())
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn();
        let child = child.unwrap_or_else(|error| {
            panic!("{program}: {error}; `make test` installs it, or see README.md")
        });
        self.child = Some(child);
        for _ in 0..500 {
            let child = self.child.as_mut().expect("just started");
            if child.try_wait().expect("it is our child").is_some() {
                self.child = None;
                return false;
            }
            if self.answers().await {
                return true;
            }
            sleep(Duration::from_millis(20)).await;
        }
        self.kill();
        false
    }

    async fn answers(&self) -> bool {
        let exchange = async {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
            stream.write_all(b"PING\r\n").await?;
            let mut answer = [0; 1];
            stream.read_exact(&mut answer).await?;
            // Either knows us, or wants a password; it is not loading.
            let mut rest = [0; 8];
            let read = stream.read(&mut rest).await?;
            Ok::<_, std::io::Error>(!rest[..read].starts_with(b"LOADING"))
        };
        matches!(
            timeout(Duration::from_secs(1), exchange).await,
            Ok(Ok(true))
        )
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// A handle on it, with time limits that a busy machine keeps.
    #[must_use]
    pub fn redis(&self) -> Redis {
        let config = Config::new(self.url())
            .timeout(Duration::from_secs(5))
            .connect_timeout(Duration::from_secs(5));
        Redis::from_config(config).expect("the URL is sound")
    }

    /// Stops it in its tracks (SIGSTOP): connections stay, nothing answers.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Kills it; what is not on disk is lost.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may be gone, or stopped, which SIGKILL does not mind.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("the server runs");
        let pid = Pid::from_child(child);
        kill_process(pid, signal).expect("it is our child");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("it is bound").port()
}
