//! Requests without a pause, none of them sent twice.

use std::{
    fmt,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::Duration,
};

use http_body_util::{BodyExt, Empty};
use hyper::{Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::balancer::is_installed;

/// What all of them saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    answered: u64,
    failures: Vec<String>,
    /// Of those that only count.
    others: u64,
}

impl Seen {
    pub(crate) const fn answered(&self) -> u64 {
        self.answered
    }

    pub(crate) fn failed(&self) -> u64 {
        self.others + self.failures.len() as u64
    }

    fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.failures.extend(other.failures);
        self.others += other.others;
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answered, {} failed", self.answered, self.failed())?;
        for failure in self.failures.iter().take(5) {
            write!(f, "; {failure}")?;
        }
        Ok(())
    }
}

pub(crate) struct Load {
    clients: JoinSet<Seen>,
    wrk: Option<Child>,
    h2load: Option<Child>,
}

impl Load {
    pub(crate) async fn start(address: SocketAddr, length: Duration) -> Self {
        let end = Instant::now() + length;
        let mut clients = JoinSet::new();
        // In a hurry, at leisure, and such as keep an answer waiting.
        for pause in [0, 0, 5, 20, 100, 100, 250, 250, 300].map(Duration::from_millis) {
            clients.spawn(client(address, "/", pause, end));
        }
        for _ in 0..2 {
            clients.spawn(client(address, "/slow", Duration::ZERO, end));
        }
        let url = format!("http://{address}/");
        let whole = length.as_secs().to_string();
        let start = |program: &str, version: &str, args: &[&str]| {
            if !is_installed(program, version) {
                println!("{program} is not installed: the test's own clients only");
                return None;
            }
            let mut command = Command::new(program);
            let command = command.args(args).arg(&url).stdout(Stdio::piped());
            Some(command.spawn().expect("it is installed"))
        };
        Self {
            clients,
            wrk: start("wrk", "-v", &["-t1", "-c10", "-d", &whole]),
            h2load: start(
                "h2load",
                "--version",
                &["--h1", "-t1", "-c10", "-D", &whole],
            ),
        }
    }

    /// When all have ended.
    pub(crate) async fn end(mut self) -> Seen {
        let mut seen = Seen::default();
        while let Some(client) = self.clients.join_next().await {
            seen.add(client.expect("it does not panic"));
        }
        let output = |child: Child| {
            let output = child.wait_with_output().expect("it ends");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        if let Some(wrk) = self.wrk {
            let told = output(wrk);
            let lines: Vec<_> = told.lines().map(str::trim).collect();
            seen.answered += before(&lines, "requests in");
            // Told only where there are some.
            for line in &lines {
                if line.starts_with("Socket errors:") || line.starts_with("Non-2xx") {
                    seen.failures.push(format!("wrk: {line}"));
                }
            }
        }
        if let Some(h2load) = self.h2load {
            let told = output(h2load);
            let line = told.lines().find(|line| line.starts_with("requests:"));
            let line = line.unwrap_or_else(|| panic!("h2load told nothing: {told}"));
            let parts: Vec<_> = line.trim_start_matches("requests:").split(',').collect();
            let parts: Vec<_> = parts.iter().map(|part| part.trim()).collect();
            seen.answered += before(&parts, "succeeded");
            for what in ["failed", "errored", "timeout"] {
                if before(&parts, what) > 0 {
                    seen.failures.push(format!("h2load: {line}"));
                }
            }
        }
        seen
    }
}

/// The number that stands before this.
fn before(texts: &[&str], what: &str) -> u64 {
    let text = texts.iter().find(|text| text.contains(what));
    let text = text.unwrap_or_else(|| panic!("no {what:?} in {texts:?}"));
    let number = text.split_whitespace().next().expect("a number");
    number.parse().unwrap_or_else(|_| panic!("{text}"))
}

/// Asks on one connection as long as that is kept, and then on another.
async fn client(address: SocketAddr, path: &'static str, pause: Duration, end: Instant) -> Seen {
    let mut seen = Seen::default();
    let mut kept = None;
    while Instant::now() < end {
        match ask(&mut kept, address, path).await {
            Ok(200) => seen.answered += 1,
            Ok(status) => seen.failures.push(format!("{path}: {status}")),
            Err(error) => {
                kept = None;
                seen.failures.push(format!("{path}: {error}"));
                // Not in a tight loop where nobody listens.
                sleep(Duration::from_millis(5)).await;
            }
        }
        sleep(pause).await;
    }
    seen
}

type Sender = http1::SendRequest<Empty<Bytes>>;

async fn ask(
    kept: &mut Option<Sender>,
    address: SocketAddr,
    path: &str,
) -> Result<u16, Box<dyn std::error::Error + Send + Sync>> {
    let mut sender = match kept.take() {
        Some(sender) => sender,
        None => {
            let stream = TcpStream::connect(address).await?;
            let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            sender
        }
    };
    // A connection that was closed while it was kept is found out here, and
    // takes no request: that goes on another one, as with any client.
    if sender.ready().await.is_err() {
        return Box::pin(ask(kept, address, path)).await;
    }
    let request = Request::get(path).header("host", "replicas");
    let response = sender.send_request(request.body(Empty::new())?).await?;
    let (status, close) = (
        response.status().as_u16(),
        response
            .headers()
            .get("connection")
            .is_some_and(|it| it == "close"),
    );
    response.into_body().collect().await?;
    if !close {
        *kept = Some(sender);
    }
    Ok(status)
}
