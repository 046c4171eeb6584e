//! Starts the program, and stands on both sides of it.

use std::{
    collections::VecDeque,
    fs,
    future::Future,
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, client::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// Nothing here takes longer, or it hangs.
const LONG: Duration = Duration::from_secs(20);

/// Ends the test if `future` hangs.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(LONG, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {LONG:?}"),
    }
}

/// Asks until it is so.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    soon(what, async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// The program, which `cargo test` builds beside the tests.
pub(crate) fn program() -> Command {
    let mut path = std::env::current_exe().expect("a test has a path");
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    path.push("examples");
    path.push(format!("reverse-proxy{}", std::env::consts::EXE_SUFFIX));
    assert!(
        path.exists(),
        "{} is not built: run `cargo build --example reverse-proxy` (with the same profile) first",
        path.display()
    );
    let mut command = Command::new(path);
    for variable in ["CONFIG", "LISTEN", "ADMIN", "LOG_FORMAT"] {
        command.env_remove(format!("BUTTRESS_{variable}"));
    }
    for variable in ["REDIS_URL", "REDIS_DB", "RUST_LOG"] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    command
}

/// A file with this text, in a place of its own.
pub(crate) fn file(text: &str) -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("proxy-{}-{next}.yaml", std::process::id());
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, text).expect("the target directory is ours");
    path
}

/// Sends a process a signal.
pub(crate) fn signal(process: u32, name: &str) {
    let kill = format!("kill -{name} {process}");
    let status = Command::new("sh").args(["-c", &kill]).status();
    assert!(status.unwrap().success());
}

/// Runs the program to its end.
pub(crate) fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    program()
        .args(arguments)
        .envs(variables.iter().copied())
        .output()
        .expect("it starts")
}

/// The program, serving.
pub(crate) struct Proxy {
    child: Child,
    pub(crate) listen: SocketAddr,
    pub(crate) admin: SocketAddr,
    log: Arc<Mutex<VecDeque<Value>>>,
    out: Arc<Mutex<String>>,
}

impl Proxy {
    /// With these settings; the ports are chosen by the system.
    pub(crate) async fn start(yaml: &str) -> Self {
        let path = file(yaml);
        let path = path.to_str().expect("a plain path");
        Self::start_with(&["--config", path, "--admin", "127.0.0.1:0"]).await
    }

    /// With these flags, on a port chosen by the system.
    pub(crate) async fn start_with(flags: &[&str]) -> Self {
        let mut child = program()
            .args(["--listen", "127.0.0.1:0", "--log-format", "json"])
            .args(flags)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let log: Arc<Mutex<VecDeque<Value>>> = Arc::default();
        let out: Arc<Mutex<String>> = Arc::default();
        let (errors, lines) = (child.stderr.take().expect("piped"), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                let value = serde_json::from_str(&line).unwrap_or(Value::String(line));
                lines.lock().unwrap().push_back(value);
            }
        });
        let (mut stdout, text) = (child.stdout.take().expect("piped"), Arc::clone(&out));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut buffer) {
                *text.lock().unwrap() += &String::from_utf8_lossy(&buffer[..n]);
            }
        });
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut proxy = Self {
            child,
            listen: nowhere,
            admin: nowhere,
            log,
            out,
        };
        let line = proxy
            .logged("listening", |line| line["message"] == "listening")
            .await;
        let address = |field: &str| line[field].as_str().unwrap().parse().unwrap();
        (proxy.listen, proxy.admin) = (address("listen"), address("admin"));
        proxy
    }

    /// The first line of the log that fits, taken out of it.
    pub(crate) async fn logged(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        for _ in 0..2000 {
            {
                let mut log = self.log.lock().unwrap();
                if let Some(index) = log.iter().position(&fits) {
                    return log.remove(index).expect("just found");
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!(
            "no line about {what} in the log: {:?}",
            self.log.lock().unwrap()
        );
    }

    /// The access line of the request to this path.
    pub(crate) async fn access(&self, path: &str) -> Value {
        self.logged(path, |line| {
            line["message"] == "request" && line["path"] == path
        })
        .await
    }

    /// What it has printed.
    pub(crate) fn printed(&self) -> String {
        self.out.lock().unwrap().clone()
    }

    pub(crate) async fn get(&self, path: &str) -> Response<Bytes> {
        fetch(self.listen, get(path)).await
    }

    /// The value of a metric that has all these labels.
    pub(crate) async fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let response = fetch(self.admin, get("/metrics")).await;
        let text = String::from_utf8(response.into_body().to_vec()).unwrap();
        text.lines()
            .filter(|line| {
                line.starts_with(name) && labels.iter().all(|label| line.contains(label))
            })
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum()
    }

    pub(crate) async fn in_flight(&self) -> f64 {
        self.metric("proxy_upstream_requests_in_flight", &[]).await
    }

    /// Kibibytes of memory, now and at the most, where the system tells.
    pub(crate) fn memory(&self) -> Option<(u64, u64)> {
        if !cfg!(target_os = "linux") {
            return None;
        }
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        Some((field("VmRSS:"), field("VmHWM:")))
    }

    pub(crate) fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    pub(crate) async fn exit(&mut self) -> ExitStatus {
        for _ in 0..4000 {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("it does not end");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One route for all paths, to this upstream.
pub(crate) fn to(upstream: SocketAddr) -> String {
    format!("routes: [{{ name: all, path: /, upstream: [\"http://{upstream}\"] }}]\n")
}

/// A port on which nobody listens.
pub(crate) async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
}

pub(crate) type Reply = Response<BoxBody<Bytes, hyper::Error>>;

/// An answer with this text.
pub(crate) fn reply(text: impl Into<Bytes>) -> Reply {
    Response::new(
        Full::new(text.into())
            .map_err(|never| match never {})
            .boxed(),
    )
}

/// An upstream, HTTP/1.1 and h2c alike.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    pub(crate) connections: Arc<AtomicUsize>,
}

impl Upstream {
    /// Answers by `answer`.
    pub(crate) async fn start<F>(
        answer: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Reply> + Send + 'static,
    {
        Self::raw(move |stream| {
            let answer = answer.clone();
            async move {
                let service = service_fn(move |request| {
                    let answer = answer(request);
                    async move { Ok::<_, std::convert::Infallible>(answer.await) }
                });
                let _ = auto::Builder::new(TokioExecutor::new())
                    .serve_connection_with_upgrades(TokioIo::new(stream), service)
                    .await;
            }
        })
        .await
    }

    /// Does what `serve` does with each connection.
    pub(crate) async fn raw<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serve(stream));
            }
        });
        Self {
            address,
            connections,
        }
    }

    /// Answers with the request's head as JSON: what it was like on arrival.
    pub(crate) async fn mirror() -> Self {
        Self::start(|request| async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await;
            let headers: Vec<_> = head
                .headers
                .iter()
                .map(|(name, value)| (name.as_str(), String::from_utf8_lossy(value.as_bytes())))
                .collect();
            let trailers = body
                .as_ref()
                .ok()
                .and_then(|body| body.trailers())
                .map(|trailers| format!("{trailers:?}"));
            let seen = serde_json::json!({
                "method": head.method.as_str(),
                "uri": head.uri.to_string(),
                "version": format!("{:?}", head.version),
                "headers": headers,
                "trailers": trailers,
                "body": body.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned()).ok(),
            });
            reply(seen.to_string())
        })
        .await
    }
}

/// What a mirror saw of a header: all its lines.
pub(crate) fn seen(response: &Response<Bytes>, header: &str) -> Vec<String> {
    let seen: Value = serde_json::from_slice(response.body()).unwrap();
    seen["headers"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|line| line[0] == header)
        .map(|line| line[1].as_str().unwrap().to_owned())
        .collect()
}

pub(crate) fn json(response: &Response<Bytes>) -> Value {
    serde_json::from_slice(response.body()).unwrap_or_else(|_| panic!("no JSON: {response:?}"))
}

/// The problem document of a refusal, which must be a whole one.
pub(crate) fn problem(response: &Response<Bytes>, status: u16, reason: &str) -> Value {
    assert_eq!(response.status(), status, "{response:?}");
    assert_eq!(
        response.headers()["content-type"],
        "application/problem+json"
    );
    let problem = json(response);
    assert_eq!(problem["status"], status);
    assert_eq!(problem["reason"], reason);
    for member in ["type", "title", "detail"] {
        assert!(
            problem[member]
                .as_str()
                .is_some_and(|text| !text.is_empty()),
            "{problem}"
        );
    }
    problem
}

/// A request of HTTP/1.1.
pub(crate) fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(path)
        .header("host", "test.example")
        .body(Full::default())
        .unwrap()
}

/// Sends one request on a connection of its own.
pub(crate) async fn fetch(address: SocketAddr, request: Request<Full<Bytes>>) -> Response<Bytes> {
    soon("an answer", async {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = http1::Builder::new()
            .max_headers(512)
            .handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        let (head, body) = sender.send_request(request).await.unwrap().into_parts();
        Response::from_parts(head, body.collect().await.unwrap().to_bytes())
    })
    .await
}

/// A connection on which every byte is ours.
pub(crate) struct Raw(pub(crate) TcpStream);

impl Raw {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self(TcpStream::connect(address).await.unwrap())
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.write_all(bytes.as_ref()).await.unwrap();
    }

    /// All that comes until the other side closes.
    pub(crate) async fn rest(&mut self) -> String {
        let mut bytes = Vec::new();
        // A reset ends it, too.
        let _ = soon("the end of a connection", self.0.read_to_end(&mut bytes)).await;
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// All that comes until and with `end`.
    pub(crate) async fn until(&mut self, end: &str) -> String {
        let mut bytes = Vec::new();
        soon(end, async {
            while !bytes.ends_with(end.as_bytes()) {
                match self.0.read_u8().await {
                    Ok(byte) => bytes.push(byte),
                    Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&bytes)),
                }
            }
        })
        .await;
        String::from_utf8(bytes).unwrap()
    }
}

/// A head on a raw upstream's connection; `None` at its end.
pub(crate) async fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        bytes.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Which of these a response has.
pub(crate) fn number(headers: &HeaderMap, name: &str) -> u64 {
    headers[name].to_str().unwrap().parse().unwrap()
}
