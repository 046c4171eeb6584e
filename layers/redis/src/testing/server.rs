//! One `redis-server`.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use redis::{AsyncConnectionConfig, Client, Cmd, FromRedisValue};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::{Config, Error, ErrorKind, Redis};

/// How long anything here may take before the test has failed.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Between two looks.
pub(super) const LOOK: Duration = Duration::from_millis(10);

/// A `redis-server` of one's own on a free loopback port, with a directory of
/// its own. Dropping it kills it.
///
/// The program is `redis-server` on the `PATH`, or what `REDIS_SERVER` names.
///
/// # Panics
///
/// Where the program is missing, or something is not done within ten seconds: a
/// test that wants it must not pass without.
pub struct Server {
    port: u16,
    setup: Setup,
    directory: TempDir,
    child: Option<Child>,
}

/// How a [`Server`] is to be.
#[derive(Clone, Default)]
pub struct Setup {
    args: Vec<String>,
    /// Name, if any, and password.
    login: Option<(Option<String>, String)>,
    socket: bool,
}

impl Setup {
    /// One more argument for the program, as `--appendonly` and then `yes`.
    #[must_use]
    pub fn arg(self, arg: impl Into<String>) -> Self {
        self.args([arg])
    }

    /// More arguments.
    #[must_use]
    pub fn args<A: Into<String>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Nobody gets in without this password, of letters and digits.
    #[must_use]
    pub fn password(mut self, password: &str) -> Self {
        self.login = Some((None, password.to_owned()));
        self.args(["--requirepass", password, "--masterauth", password])
    }

    /// Nobody gets in but this user, who may do all. Letters and digits.
    #[must_use]
    pub fn user(mut self, name: &str, password: &str) -> Self {
        self.login = Some((Some(name.to_owned()), password.to_owned()));
        self.args(["--user", "default", "off"])
            .args(["--user", name, "on", &format!(">{password}")])
            .args(["~*", "&*", "+@all"])
    }

    /// Listens on a Unix socket, too.
    #[must_use]
    pub fn unix_socket(mut self) -> Self {
        self.socket = true;
        self
    }

    /// Starts it.
    ///
    /// # Panics
    ///
    /// It cannot be started.
    pub async fn start(self) -> Server {
        // Between the choice of a port and the server's taking it another
        // program may: then it ends at once, and another one is chosen.
        for _ in 0..10 {
            let mut server = Server {
                port: free_port(),
                setup: self.clone(),
                directory: TempDir::new().expect("a directory for redis-server"),
                child: None,
            };
            if server.launch().await {
                return server;
            }
        }
        panic!("redis-server did not start");
    }
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Setup").finish_non_exhaustive()
    }
}

impl Server {
    /// A server with nothing in it that keeps nothing.
    pub async fn start() -> Self {
        Setup::default().start().await
    }

    /// The same with more arguments, as `--appendonly yes`.
    pub async fn with<A: Into<String>>(args: impl IntoIterator<Item = A>) -> Self {
        Setup::default().args(args).start().await
    }

    /// A server of a kind.
    #[must_use]
    pub fn setup() -> Setup {
        Setup::default()
    }

    /// Starts it once more on its port, after [`kill`](Self::kill): with what
    /// it has on disk, which is nothing unless it was told to keep it.
    ///
    /// # Panics
    ///
    /// It does not come back.
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
            // A replica of an empty server need not wait for company.
            .args(["--repl-diskless-sync-delay", "0"])
            .arg("--dir")
            .arg(self.directory.path())
            .args(&self.setup.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if self.setup.socket {
            command.arg("--unixsocket").arg(self.socket());
        }
        let child = command.spawn();
        let child = child.unwrap_or_else(|error| {
            panic!("{program}: {error}; `make test` installs it, or see README.md")
        });
        self.child = Some(child);
        for _ in 0..PATIENCE.as_millis() / LOOK.as_millis() {
            let child = self.child.as_mut().expect("just started");
            if child.try_wait().expect("it is our child").is_some() {
                self.child = None;
                return false;
            }
            if self.answers().await {
                return true;
            }
            sleep(LOOK).await;
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

    /// Its URL, with user and password where it wants them.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_at(self.port)
    }

    /// The same, by way of another port.
    pub(super) fn url_at(&self, port: u16) -> String {
        let login = match &self.setup.login {
            Some((name, password)) => format!("{}:{password}@", name.as_deref().unwrap_or("")),
            None => String::new(),
        };
        format!("redis://{login}127.0.0.1:{port}")
    }

    /// The URL of its Unix socket.
    ///
    /// # Panics
    ///
    /// It was set up without one.
    #[must_use]
    pub fn unix_url(&self) -> String {
        assert!(self.setup.socket, "Setup::unix_socket was not asked for");
        let login = match &self.setup.login {
            Some((Some(name), password)) => format!("?user={name}&pass={password}"),
            Some((None, password)) => format!("?pass={password}"),
            None => String::new(),
        };
        format!("redis+unix://{}{login}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("redis.sock")
    }

    /// A handle on it, with time limits that a busy machine keeps.
    #[must_use]
    pub fn redis(&self) -> Redis {
        patient(Config::new(self.url()))
    }

    /// Runs a command, given word by word, on a connection of its own, and so
    /// past all that is tested.
    ///
    /// # Panics
    ///
    /// The server refuses, or does not answer.
    pub async fn cmd<T: FromRedisValue>(&self, words: &[&str]) -> T {
        let answer = self.try_cmd(words).await;
        answer.unwrap_or_else(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            panic!("{words:?}: {error}: {}", cause.unwrap_or_default())
        })
    }

    /// The same, where it may be refused.
    ///
    /// # Errors
    ///
    /// The server refuses, or does not answer.
    pub async fn try_cmd<T: FromRedisValue>(&self, words: &[&str]) -> Result<T, Error> {
        let mut cmd = Cmd::new();
        for word in words {
            cmd.arg(word);
        }
        let failed = |cause| Error::caused("test", cause);
        let exchange = async {
            // One time limit is enough: theirs is half a second.
            let config = AsyncConnectionConfig::new()
                .set_connection_timeout(None)
                .set_response_timeout(None);
            let client = Client::open(self.url())?;
            let connected = client.get_multiplexed_async_connection_with_config(&config);
            let mut connection = connected.await?;
            cmd.query_async(&mut connection).await
        };
        match timeout(PATIENCE, exchange).await {
            Ok(answer) => answer.map_err(failed),
            Err(_) => Err(Error::new(ErrorKind::Timeout, "test")),
        }
    }

    /// What `INFO` says in this section, field by field.
    ///
    /// # Panics
    ///
    /// The server does not answer.
    pub async fn info(&self, section: &str) -> BTreeMap<String, String> {
        let text: String = self.cmd(&["INFO", section]).await;
        text.lines()
            .filter_map(|line| line.trim_end().split_once(':'))
            .map(|(field, value)| (field.to_owned(), value.to_owned()))
            .collect()
    }

    /// How often each command was run so far, by its name in lower case
    /// (`config|get`): by scripts, too, and by these helpers.
    ///
    /// # Panics
    ///
    /// The server does not answer.
    pub async fn commands(&self) -> BTreeMap<String, u64> {
        let stats = self.info("commandstats").await;
        stats
            .into_iter()
            .filter_map(|(field, value)| {
                let name = field.strip_prefix("cmdstat_")?;
                let calls = value.strip_prefix("calls=")?.split(',').next()?;
                Some((name.to_owned(), calls.parse().ok()?))
            })
            .collect()
    }

    /// How often scripts were called so far, by hash or by text: with one script
    /// a decision, how many decisions asked the server.
    ///
    /// # Panics
    ///
    /// The server does not answer.
    pub async fn scripts(&self) -> u64 {
        let commands = self.commands().await;
        let of = |name: &str| commands.get(name).copied().unwrap_or(0);
        of("evalsha") + of("eval")
    }

    /// How many commands were run so far that are some handle's work: not the
    /// connecting, not the keeper's looks (`PING`), not what these helpers ask.
    /// What scripts do inside counts as well.
    ///
    /// # Panics
    ///
    /// The server does not answer.
    pub async fn calls(&self) -> u64 {
        let commands = self.commands().await;
        let counted = commands.iter().filter(|(name, _)| {
            let name = name.split('|').next().unwrap_or_default();
            !matches!(
                name,
                "auth" | "client" | "cluster" | "command" | "config" | "hello" | "info"
            ) && !matches!(name, "ping" | "readonly" | "replconf" | "psync" | "select")
        });
        counted.map(|(_, calls)| calls).sum()
    }

    /// How long it has computed so far, in user and in kernel mode.
    ///
    /// # Panics
    ///
    /// The server does not answer.
    pub async fn cpu(&self) -> Duration {
        let info = self.info("cpu").await;
        let of = |field: &str| -> f64 {
            let value = info.get(field).expect("INFO cpu has it");
            value.parse().expect("a number of seconds")
        };
        Duration::from_secs_f64(of("used_cpu_user") + of("used_cpu_sys"))
    }

    /// Makes it a replica of another, and waits until it has all of it.
    ///
    /// # Panics
    ///
    /// It does not come to that.
    pub async fn replica_of(&self, master: &Server) {
        let port = master.port.to_string();
        self.cmd::<()>(&["REPLICAOF", "127.0.0.1", &port]).await;
        for _ in 0..PATIENCE.as_millis() / LOOK.as_millis() {
            let info = self.info("replication").await;
            if info.get("master_link_status").is_some_and(|it| it == "up") {
                return;
            }
            sleep(LOOK).await;
        }
        panic!("the replica does not reach its master");
    }

    /// Makes it a master of its own again.
    ///
    /// # Panics
    ///
    /// The server does not answer.
    pub async fn promote(&self) {
        self.cmd::<()>(&["REPLICAOF", "NO", "ONE"]).await;
    }

    /// Cuts all connections but the one that says so (`CLIENT KILL`).
    ///
    /// # Panics
    ///
    /// The server does not answer.
    pub async fn kick(&self) {
        for kind in ["normal", "pubsub"] {
            self.cmd::<i64>(&["CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes"])
                .await;
        }
    }

    /// Stops it in its tracks (SIGSTOP): connections stay, nothing answers.
    ///
    /// # Panics
    ///
    /// It was killed.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    ///
    /// # Panics
    ///
    /// It was killed.
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

/// A handle that waits rather than fail a test on a busy machine.
pub(super) fn patient(config: Config) -> Redis {
    let config = config
        .timeout(Duration::from_secs(5))
        .connect_timeout(Duration::from_secs(5));
    Redis::from_config(config).expect("the URL is sound")
}

pub(super) fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("it is bound").port()
}
