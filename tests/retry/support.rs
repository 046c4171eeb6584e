//! An upstream that does what it is told and keeps what it is sent, a client's
//! whole stack, and an end to each test that leaves nothing behind.

use std::{
    collections::VecDeque,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress::{
    BoxError,
    circuit_breaker::{self, Breaker, CircuitBreakerLayer, Event},
    retry::{Backoff, Cause, GiveUp, ReplayBody, RetryLayer, Settings},
    timeout::TimeoutLayer,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Collected, combinators::UnsyncBoxBody};
use hyper::body::Body;
use hyper_util::{
    client::legacy::{self, Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    runtime::{self, Handle},
    sync::oneshot,
    time::{sleep, timeout},
};
use tower::{Layer, ServiceExt, util::BoxCloneSyncService};

pub(crate) const LONG: Duration = Duration::from_secs(10);
pub(crate) const MS: Duration = Duration::from_millis(1);

pub(crate) const UNAVAILABLE: &str =
    "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 5\r\n\r\nsorry";

pub(crate) const HELLO: &str = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";

/// Runs a test on a runtime of its own, and for a bounded time. When it is
/// over no task is left, and its upstreams have seen all of their connections
/// closed.
pub(crate) fn run(test: impl AsyncFnOnce(Bed)) {
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let bed = Bed::default();
        let ended = timeout(3 * LONG, test(bed.clone())).await;
        ended.expect("the test ends in time");
        let left = || (bed.sockets(), Handle::current().metrics().num_alive_tasks());
        let gone = timeout(LONG, async {
            while left() != (0, 0) {
                sleep(MS).await;
            }
        });
        assert!(
            gone.await.is_ok(),
            "left behind, sockets and tasks: {:?}",
            left()
        );
    });
}

/// Until it is so.
pub(crate) async fn until(what: &str, is: impl Fn() -> bool) {
    let holds = async {
        while !is() {
            sleep(MS).await;
        }
    };
    timeout(LONG, holds)
        .await
        .unwrap_or_else(|_| panic!("in time: {what}"));
}

/// `len` bytes of which no two parts are alike.
pub(crate) fn payload(len: usize) -> Bytes {
    let mut state = 1_u32;
    let next = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    next.take(len).collect()
}

/// Counts the upstreams' open sockets.
#[derive(Clone, Default)]
pub(crate) struct Bed(Arc<AtomicUsize>);

/// One of them.
pub(crate) struct Socket(Bed);

impl Bed {
    pub(crate) fn sockets(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    pub(crate) fn socket(&self) -> Socket {
        self.0.fetch_add(1, Ordering::SeqCst);
        Socket(self.clone())
    }

    /// An upstream that does these one after another, and then what echoes.
    pub(crate) async fn upstream(&self, acts: impl IntoIterator<Item = Act>) -> Upstream {
        let listener = listen().await;
        self.upstream_at(listener, acts)
    }

    pub(crate) fn upstream_at(
        &self,
        listener: TcpListener,
        acts: impl IntoIterator<Item = Act>,
    ) -> Upstream {
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            acts: Mutex::new(acts.into_iter().collect()),
            otherwise: Mutex::new(Act::Echo),
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
        });
        let shared = Arc::clone(&state);
        let bed = self.clone();
        let stop = accept(listener, move |stream| {
            let (state, socket) = (Arc::clone(&shared), bed.socket());
            state.connections.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                // Whatever ends it, it is over.
                let _ = serve(stream, &state).await;
                drop(socket);
            });
        });
        Upstream {
            address,
            state,
            _stop: stop,
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

pub(crate) async fn listen() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap()
}

/// Listens until the answer is dropped. Connections go on.
pub(crate) fn accept(
    listener: TcpListener,
    mut serve: impl FnMut(TcpStream) + Send + 'static,
) -> oneshot::Sender<()> {
    let (stop, mut stopped) = oneshot::channel();
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = &mut stopped => return,
            };
            serve(accepted.unwrap().0);
        }
    });
    stop
}

/// What an upstream does with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Act {
    /// Reads it all and sends its body back, with 200.
    Echo,
    /// Reads it all and answers.
    Answer(&'static str),
    /// The same, and closes.
    AnswerAndClose(&'static str),
    /// Answers when it has the head, and takes the rest after that.
    Early(&'static str),
    /// Answers when it has the head and closes its side, but reads on.
    EarlyAndClose(&'static str),
    /// Reads so much of the body and resets the connection.
    Reset(usize),
    /// Reads it all and says nothing, until the caller goes.
    Hang,
    /// Reads it all and sends it back after so long.
    Slow(Duration),
    /// Reads it all, and does that when so many requests have come whole.
    Once(usize, &'static Act),
}

/// One request, as far as it came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: String,
    /// It came to its end.
    pub(crate) whole: bool,
    /// The caller closed the connection, of which no answer had come.
    pub(crate) gone: bool,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (there, value) = line.split_once(':')?;
            there.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

struct State {
    acts: Mutex<VecDeque<Act>>,
    otherwise: Mutex<Act>,
    seen: Mutex<Vec<Seen>>,
    connections: AtomicUsize,
}

impl State {
    fn seen<T>(&self, request: usize, change: impl FnOnce(&mut Seen) -> T) -> T {
        change(&mut self.seen.lock().unwrap()[request])
    }

    /// How many requests have come to their end.
    fn whole(&self) -> usize {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|seen| seen.whole).count()
    }
}

/// Listens until it is dropped.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
    _stop: oneshot::Sender<()>,
}

impl Upstream {
    pub(crate) fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// What it does when it has done all that it was told.
    pub(crate) fn otherwise(&self, act: Act) {
        *self.state.otherwise.lock().unwrap() = act;
    }

    /// Requests whose head came.
    pub(crate) fn requests(&self) -> usize {
        self.state.seen.lock().unwrap().len()
    }

    /// Those that came to their end.
    pub(crate) fn whole(&self) -> usize {
        self.state.whole()
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    /// What came of the first, the second, …
    pub(crate) fn request(&self, index: usize) -> Seen {
        self.state.seen(index, |seen| seen.clone())
    }

    pub(crate) fn last(&self) -> Seen {
        self.seen().pop().expect("a request came")
    }

    pub(crate) fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }
}

async fn serve(stream: TcpStream, state: &State) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    loop {
        let head = read_head(&mut stream).await?;
        let request = {
            let mut seen = state.seen.lock().unwrap();
            seen.push(Seen {
                head,
                ..Seen::default()
            });
            seen.len() - 1
        };
        let next = state.acts.lock().unwrap().pop_front();
        let mut act = next.unwrap_or_else(|| *state.otherwise.lock().unwrap());
        if let Act::Once(requests, then) = act {
            read_body(&mut stream, state, request, usize::MAX).await?;
            while state.whole() < requests {
                sleep(MS).await;
            }
            act = *then;
        }
        match act {
            Act::Echo | Act::Slow(_) => {
                read_body(&mut stream, state, request, usize::MAX).await?;
                if let Act::Slow(span) = act {
                    sleep(span).await;
                }
                let body = state.seen(request, |seen| seen.body.clone());
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                stream.write_all(head.as_bytes()).await?;
                stream.write_all(&body).await?;
            }
            Act::Answer(answer) | Act::AnswerAndClose(answer) => {
                read_body(&mut stream, state, request, usize::MAX).await?;
                stream.write_all(answer.as_bytes()).await?;
                if matches!(act, Act::AnswerAndClose(_)) {
                    return stream.shutdown().await;
                }
            }
            Act::Early(answer) => {
                stream.write_all(answer.as_bytes()).await?;
                read_body(&mut stream, state, request, usize::MAX).await?;
            }
            Act::EarlyAndClose(answer) => {
                stream.write_all(answer.as_bytes()).await?;
                stream.shutdown().await?;
                // So that no reset overtakes the answer.
                read_body(&mut stream, state, request, usize::MAX).await?;
                stream.read_to_end(&mut Vec::new()).await?;
                return Ok(());
            }
            Act::Reset(after) => {
                read_body(&mut stream, state, request, after).await?;
                return stream.into_inner().set_zero_linger();
            }
            Act::Hang => {
                read_body(&mut stream, state, request, usize::MAX).await?;
                let closed = stream.read_to_end(&mut Vec::new()).await;
                state.seen(request, |seen| seen.gone = true);
                return closed.map(drop);
            }
            Act::Once(..) => unreachable!("it is not said twice"),
        }
    }
}

async fn read_line(stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<String> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line)
}

/// Lines up to the empty one.
async fn read_head(stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<String> {
    let mut head = String::new();
    loop {
        let line = read_line(stream).await?;
        if line == "\r\n" {
            return Ok(head);
        }
        head.push_str(&line);
    }
}

/// Reads at most so many bytes of the body of `request`, byte by byte as they
/// come.
async fn read_body(
    stream: &mut (impl AsyncBufRead + Unpin),
    state: &State,
    request: usize,
    mut most: usize,
) -> io::Result<()> {
    if state.seen(request, |seen| seen.whole) {
        return Ok(());
    }
    let (length, chunked) = state.seen(request, |seen| {
        let length = seen.header("content-length").map(str::parse::<usize>);
        (
            length.transpose().unwrap(),
            seen.header("transfer-encoding").is_some(),
        )
    });
    loop {
        let chunk = match length {
            Some(length) => length,
            None if chunked => {
                let size = read_line(stream).await?;
                usize::from_str_radix(size.trim(), 16).map_err(io::Error::other)?
            }
            None => 0,
        };
        let mut left = chunk;
        while left > 0 {
            if most == 0 {
                return Ok(());
            }
            let there = stream.fill_buf().await?;
            if there.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let part = there.len().min(left).min(most);
            state.seen(request, |seen| seen.body.extend_from_slice(&there[..part]));
            stream.consume(part);
            left -= part;
            most -= part;
        }
        if !chunked || chunk == 0 {
            break;
        }
        read_line(stream).await?;
    }
    let trailers = if chunked {
        read_head(stream).await?
    } else {
        String::new()
    };
    state.seen(request, |seen| {
        seen.trailers = trailers;
        seen.whole = true;
    });
    Ok(())
}

/// Any number of attempts, 10 ms apart.
pub(crate) fn attempts(attempts: u32) -> Settings {
    Settings::standard()
        .max_attempts(attempts)
        .backoff(Backoff::fixed(10 * MS))
}

/// A breaker that never opens.
pub(crate) fn never() -> circuit_breaker::Settings {
    circuit_breaker::Settings::moderate().consecutive_failures(1_000_000)
}

pub(crate) type Transport<B> = Client<HttpConnector, ReplayBody<B>>;

pub(crate) fn http1<B>() -> Transport<B>
where
    B: Body<Data = Bytes> + Send,
{
    Client::builder(TokioExecutor::new()).build_http()
}

pub(crate) fn http2<B>() -> Transport<B>
where
    B: Body<Data = Bytes> + Send,
{
    Client::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http()
}

pub(crate) type BoxBody = UnsyncBoxBody<Bytes, BoxError>;
pub(crate) type Service<B> = BoxCloneSyncService<Request<B>, Response<BoxBody>, legacy::Error>;

/// One type for a stack of any, of which all can be cloned and sent.
pub(crate) fn boxed_service<S, B, R>(service: S) -> Service<B>
where
    S: tower::Service<Request<B>, Response = Response<R>, Error = legacy::Error>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
    B: 'static,
    R: Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    BoxCloneSyncService::new(service.map_response(|response: Response<R>| {
        response.map(|body| BodyExt::map_err(body, Into::into).boxed_unsync())
    }))
}

/// The answer to a request, whole.
pub(crate) async fn exchange<B>(
    service: Service<B>,
    request: Request<B>,
) -> Result<Answer, legacy::Error> {
    let exchange = async {
        let (head, body) = service.oneshot(request).await?.into_parts();
        let body = body.collect().await;
        Ok(Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            body: body.map(Collected::to_bytes),
        })
    };
    timeout(LONG, exchange).await.expect("an answer in time")
}

/// A whole stack, and what is heard of it.
#[derive(Clone)]
pub(crate) struct Caller<B> {
    pub(crate) service: Service<B>,
    pub(crate) breaker: Breaker,
    failures: Arc<AtomicUsize>,
    causes: Arc<Mutex<Vec<Cause>>>,
    given_up: Arc<Mutex<Vec<GiveUp>>>,
}

type RetryBuilder = buttress::retry::RetryBuilder;

impl<B> Caller<B>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    pub(crate) fn new(http: Transport<B>, settings: Settings) -> Self {
        Self::with(http, never(), |retry| retry.settings(settings))
    }

    pub(crate) fn with(
        http: Transport<B>,
        breaker: circuit_breaker::Settings,
        change: impl FnOnce(RetryBuilder) -> RetryBuilder,
    ) -> Self {
        let (causes, given_up) = <(Arc<Mutex<Vec<_>>>, Arc<Mutex<Vec<_>>>)>::default();
        let (told, gave_up) = (Arc::clone(&causes), Arc::clone(&given_up));
        let retry = change(RetryLayer::builder())
            .on_retry(move |_, _, cause| told.lock().unwrap().push(cause))
            .on_give_up(move |_, _, reason| gave_up.lock().unwrap().push(reason))
            .build()
            .unwrap();
        let failures = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&failures);
        let breaker = CircuitBreakerLayer::builder()
            .settings(breaker)
            .on_event(move |_, event| {
                if matches!(event, Event::Failure { .. }) {
                    count.fetch_add(1, Ordering::SeqCst);
                }
            })
            .build()
            .unwrap();
        let limit = TimeoutLayer::builder().build().unwrap();
        let service = retry.layer(breaker.layer(limit.layer(http)));
        Self {
            service: boxed_service(service),
            breaker: breaker.breaker().clone(),
            failures,
            causes,
            given_up,
        }
    }

    /// The answer, whole.
    pub(crate) async fn send(&self, request: Request<B>) -> Result<Answer, legacy::Error> {
        exchange(self.service.clone(), request).await
    }

    /// How many the breaker has counted.
    pub(crate) fn failures(&self) -> usize {
        self.failures.load(Ordering::SeqCst)
    }

    /// Why there were retries, one by one.
    pub(crate) fn causes(&self) -> Vec<Cause> {
        self.causes.lock().unwrap().clone()
    }

    /// Why there was no further one.
    pub(crate) fn gave_up(&self) -> Vec<GiveUp> {
        self.given_up.lock().unwrap().clone()
    }
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Result<Bytes, BoxError>,
}
