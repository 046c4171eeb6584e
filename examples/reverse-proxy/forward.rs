//! Sends a request to an endpoint of its route, and the answer back.
//!
//! The innermost service of a route's stack: one attempt at a request. It
//! [fails](Failed) with a [`Refusal`], which a layer around it turns into a
//! response.

use std::{
    convert::Infallible,
    error::Error,
    fmt, io,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress::{
    BoxError, Head, Refusal, RefusalKind,
    body::{BodyEnd, BodyGuard, GuardedBody},
    classify::{Classify, Expect, GrpcCode, HttpClassifier, Verdict},
    clock,
    deadline::Deadline,
    key::{ClientIp, PeerAddr},
    timeout::Elapsed,
};
use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE},
    request::Parts,
    uri::{Authority, PathAndQuery},
};
use http_body::Body as HttpBody;
use hyper::{
    body::Incoming,
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tower::Service;

use crate::{
    access::{Facts, Line},
    balance::{Balance, Tried},
    body::{Cut, Hold, Outgoing, Sending, Source, may_be_silent},
    grpc_timeout::{ClientWaits, GrpcTimeout},
    headers,
    settings::{Limits, Protocol},
    upstream::{Age, Connection, Endpoint, InFlight},
};

/// The upstream's answer, holding what the request holds until it has ended.
pub(crate) type Body = GuardedBody<Incoming, Ending>;

/// The service. Cheap to clone, as each request does.
#[derive(Clone)]
pub(crate) struct Forward(Arc<Rules>);

/// What a route says of its requests.
pub(crate) struct Rules {
    pub(crate) balance: Balance,
    pub(crate) limits: Arc<Limits>,
    pub(crate) client_ip: ClientIp,
    /// What clients speak to us: `https` or `http`.
    pub(crate) scheme: &'static str,
    pub(crate) grpc_timeout: GrpcTimeout,
    /// The prefix to take off the path; empty for none.
    pub(crate) strip: String,
    /// How long there is until the response's head. A retry around may grant
    /// an attempt less.
    pub(crate) timeout: Duration,
    /// How long a client may take for the next piece of its body.
    pub(crate) silence: Duration,
    /// What the breakers take for a failure.
    pub(crate) judge: HttpClassifier,
    /// What a retry around takes for one; `None` without a retry.
    pub(crate) retried: Option<Vec<StatusCode>>,
}

impl Forward {
    pub(crate) fn new(rules: Rules) -> Self {
        Self(Arc::new(rules))
    }
}

impl<B> Service<Request<B>> for Forward
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = Failed;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Failed>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let rules = Arc::clone(&self.0);
        Box::pin(async move { rules.forward(request).await })
    }
}

impl Rules {
    async fn forward<B>(&self, mut request: Request<B>) -> Result<Response<Body>, Failed>
    where
        B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        self.screen(&request)?;
        let facts: Arc<Facts> = request.extensions_mut().remove().unwrap_or_default();
        let now = clock::now();
        let granted = Deadline::of(request.extensions())
            .map_or(Duration::MAX, |deadline| deadline.remaining(now))
            .min(self.timeout);
        let client_waits = request.extensions().get::<ClientWaits>().copied();
        // Then it is the client's own time that may run out.
        let is_impatient = client_waits.is_some_and(|it| it.0.remaining(now) <= granted);
        let mut tried = facts.begin();
        let mut in_flight = self.balance.pick(&tried).map_err(|open| {
            facts.failed(open.to_string());
            Failed::refused(open.into())
        })?;

        let upgrade = headers::upgrade(request.version(), request.headers())
            .map(|protocol| (protocol, hyper::upgrade::on(&mut request)));
        let (head, body) = request.into_parts();
        let silence = (!may_be_silent(Head::from(&head))).then_some(self.silence);
        let source =
            (!body.is_end_stream()).then(|| Source::new(body, self.limits.max_body.0, silence));
        let source = source.as_ref();

        // In here, and not in a layer around all this: a timeout that dropped
        // us would look to the breaker like a client that went away.
        let request = (head, source, upgrade);
        let exchange = self.exchange(&mut in_flight, &mut tried, request, client_waits, &facts);
        let exchanged = tokio::time::timeout(granted, exchange).await;
        let is_past = || client_waits.is_some_and(|it| it.0.is_past(clock::now()));
        let is_client_gone = match &exchanged {
            // Who was told the deadline may be the first to give up at it.
            Ok(Ok(answer)) => was_cancelled(&answer.response) && is_past(),
            Ok(Err(_)) => is_past(),
            Err(_) => is_impatient,
        };
        let exchanged = match exchanged {
            _ if is_client_gone => {
                // It is about to go, as anyone may at any time: that says
                // nothing of the endpoint. Else a few requests without patience
                // could open a breaker.
                drop(in_flight.permit.take());
                Err(Failed::by_client())
            }
            Ok(exchanged) => exchanged,
            Err(_) if source.is_some_and(Source::waits_for_client) => Err(Failed::by_client()),
            Err(_) => Err(RefusalKind::TimedOut.into()),
        };
        facts.ended(tried, in_flight.endpoint());
        let answer = match exchanged {
            Ok(answer) => answer,
            Err(failed) => {
                in_flight.record(failed.blame());
                if let Some(source) = source {
                    source.give_back();
                }
                return Err(failed);
            }
        };
        let Answer {
            mut response,
            connection,
            hold,
            upgrade,
        } = answer;
        if let Some(source) = source {
            source.settle();
        }

        // A failure is one for good, a success only once its body has ended.
        in_flight.arrived();
        let verdict = self.judge.classify(Ok::<_, &Infallible>(&response));
        let expected = Classify::<_, Infallible>::expects(&self.judge, &response);
        if verdict != Verdict::Success || expected == Expect::Nothing {
            in_flight.record(verdict);
        }

        // The version is of the hop; hyper writes the client's own.
        *response.version_mut() = Version::HTTP_11;
        let protocol = response.headers().get(UPGRADE).cloned();
        headers::strip_hop_by_hop(response.headers_mut());
        if let (Some(client), Some(protocol)) = (upgrade, protocol) {
            response.headers_mut().insert(UPGRADE, protocol);
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("upgrade"));
            let upstream = hyper::upgrade::on(&mut response);
            facts.set_tunnel(Tunnel {
                client,
                upstream,
                in_flight,
            });
            return Ok(response.map(|body| GuardedBody::new(body, Ending(None))));
        }
        let ending = Ending(Some(Held {
            connection,
            in_flight,
            hold,
            sending: source.map(Source::downgrade),
            may_go_again: self.may_go_again(&response),
            judge: self.judge,
            expected,
        }));
        Ok(response.map(|body| GuardedBody::new(body, ending)))
    }

    /// Whether a retry may want the request again after this answer.
    fn may_go_again<B>(&self, response: &Response<B>) -> bool {
        self.retried.as_ref().is_some_and(|statuses| {
            statuses.contains(&response.status())
                || GrpcCode::of(response.headers()) == Some(GrpcCode::Unavailable)
        })
    }

    /// Sends the request to the endpoint, or to another one where that cannot
    /// be reached, and waits for the head of the answer.
    ///
    /// Once more where the pooled connection turned out to be stale: then on a
    /// fresh one, and only if nothing of it was written or it may be repeated
    /// (RFC 9110 §9.2.2, RFC 9112 §9.3.1).
    async fn exchange(
        &self,
        in_flight: &mut InFlight,
        tried: &mut Tried,
        (mut head, source, upgrade): Asked<'_>,
        client_waits: Option<ClientWaits>,
        facts: &Facts,
    ) -> Result<Answer, Failed> {
        let repeatable = matches!(
            head.method,
            Method::GET
                | Method::HEAD
                | Method::OPTIONS
                | Method::TRACE
                | Method::PUT
                | Method::DELETE
        );
        let waits = source.is_some() && headers::expects_continue(&head.headers);
        let body = || source.map_or_else(|| Some(Outgoing::empty()), Source::attempt);
        let mut outgoing = body().expect("nothing is lost yet");
        let target = self.prepare(&mut head, outgoing.size_hint().exact(), facts)?;
        let mut stale = None;
        let (response, connection, hold) = loop {
            let connecting = self.balance.connect(in_flight, stale.as_ref(), tried);
            let mut connection = connecting.await.map_err(|error| {
                facts.failed(format!("connect: {error}"));
                Failed::unsent(unreachable(&error))
            })?;
            let reused = connection.age() == Age::Reused;
            if !reused && let Some(source) = source {
                // What is written on it is not written again.
                source.sent_once();
            }
            let endpoint = in_flight.endpoint();
            let protocol = upgrade.as_ref().filter(|_| tunnels(endpoint));
            target.write(&mut head, endpoint, protocol.map(|it| &it.0));
            let hold = (waits && endpoint.protocol == Protocol::Http1)
                .then(|| hold_back(&mut head, &mut outgoing));

            let spare = (reused && repeatable).then(|| head.clone());
            let mut request = Request::from_parts(head, outgoing);
            if let Some(client_waits) = client_waits {
                request = self.grpc_timeout.tell(request, client_waits).await?;
            }
            facts.attempts.fetch_add(1, Ordering::Relaxed);
            let mut failed = match connection.send(request).await {
                Ok(response) => break (response, connection, hold),
                Err(failed) => failed,
            };
            let unwritten = failed.take_message().map(|it| it.into_parts().0);
            let error = failed.into_error();
            let unsent = unwritten.is_some();
            let again = unwritten.or(spare.filter(|_| is_stale(&error)));
            match again.zip(body()) {
                Some(again) if reused => {
                    (head, outgoing) = again;
                    stale = Some(connection);
                }
                // It was closed as soon as it was open: the same would come of
                // another one.
                Some(again) if self.balance.turn_elsewhere(in_flight, tried) => {
                    (head, outgoing) = again;
                    stale = None;
                }
                _ => {
                    facts.failed(chain(&error));
                    return Err(match source.and_then(|source| source.cut.get()) {
                        Some(Cut::TooLarge) => RefusalKind::BodyTooLarge.into(),
                        Some(Cut::Client) => Refusal::new(RefusalKind::BadRequest)
                            .with_detail("the request body broke off")
                            .into(),
                        Some(Cut::Stalled) => Refusal::new(RefusalKind::RequestTimeout)
                            .with_detail("the request body stalled")
                            .into(),
                        _ if unsent => Failed::unsent(RefusalKind::BadGateway),
                        _ => Failed::broken(error),
                    });
                }
            }
        };

        let nonsense = |what: &str| {
            facts.failed(what);
            Err(RefusalKind::BadGateway.into())
        };
        if headers::is_coded(response.headers()) {
            return nonsense("a transfer coding but chunked");
        }
        let upgrade = upgrade
            .map(|(_, client)| client)
            .filter(|_| tunnels(in_flight.endpoint()));
        let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if switched && (upgrade.is_none() || !response.headers().contains_key(UPGRADE)) {
            return nonsense("101 to a request that asked for none");
        }
        Ok(Answer {
            response,
            connection,
            hold,
            upgrade: upgrade.filter(|_| switched),
        })
    }

    /// Refuses what is too large, or has been here before.
    fn screen(&self, request: &Request<impl HttpBody>) -> Result<(), Refusal> {
        let limits = &self.limits;
        too_long(request.uri(), limits)?;
        if headers::size(request.headers()) > limits.max_headers.in_memory() {
            return Err(RefusalKind::HeadersTooLarge.into());
        }
        if request.body().size_hint().lower() > limits.max_body.0 {
            return Err(RefusalKind::BodyTooLarge.into());
        }
        if headers::has_passed_here(request.headers()) {
            return Err(RefusalKind::LoopDetected.into());
        }
        Ok(())
    }

    /// Makes of the client's head the one that goes upstream, wherever that is.
    fn prepare(
        &self,
        head: &mut Parts,
        exact: Option<u64>,
        facts: &Facts,
    ) -> Result<Target, Refusal> {
        let authority = headers::authority(head)?;
        let peer = head
            .extensions
            .get()
            .map_or(IpAddr::from([0, 0, 0, 0]), |PeerAddr(address)| {
                address.ip().to_canonical()
            });
        let client = self.client_ip.address(Head::from(&*head)).unwrap_or(peer);
        let trailers = headers::accepts_trailers(&head.headers);

        // First take away, then add: else `Connection: x-forwarded-for` would
        // take away what we say.
        headers::strip_hop_by_hop(&mut head.headers);
        headers::forward(
            &mut head.headers,
            &headers::Origin {
                peer,
                client,
                trusted: self.client_ip.is_trusted(peer),
                host: authority.as_ref(),
                version: head.version,
                scheme: self.scheme,
            },
        );
        headers::trace(&mut head.headers, &facts.traceparent);
        if trailers {
            head.headers
                .insert(TE, HeaderValue::from_static("trailers"));
        }

        let path = head.uri.path_and_query();
        let path = path.map_or_else(
            || PathAndQuery::from_static("/"),
            |path| match &*self.strip {
                "" => path.clone(),
                prefix => headers::strip_prefix(path, prefix),
            },
        );
        Ok(Target {
            authority,
            path,
            trailers,
            exact,
        })
    }
}

/// A request: its head, its body if it has one, and what it would become and
/// how, if that is a tunnel.
type Asked<'a> = (Parts, Option<&'a Source>, Option<(HeaderValue, OnUpgrade)>);

/// What a request is for, wherever it is sent.
struct Target {
    /// `None` where the client named none, as HTTP/1.0 may.
    authority: Option<Authority>,
    path: PathAndQuery,
    /// Trailers are welcome.
    trailers: bool,
    /// How long the body is, if that is known.
    exact: Option<u64>,
}

impl Target {
    /// Writes it into the head as this endpoint's protocol wants it, whatever
    /// another one's wanted.
    fn write(&self, head: &mut Parts, endpoint: &Endpoint, upgrade: Option<&HeaderValue>) {
        let authority = match &self.authority {
            Some(authority) => authority.clone(),
            None => endpoint.authority.parse().expect("checked in the settings"),
        };
        for name in [CONNECTION, UPGRADE, TRANSFER_ENCODING] {
            head.headers.remove(name);
        }
        match endpoint.protocol {
            Protocol::Http1 => {
                headers::join_cookies(&mut head.headers);
                let connection = match (upgrade, self.trailers) {
                    (Some(_), true) => Some("upgrade, te"),
                    (Some(_), false) => Some("upgrade"),
                    (None, true) => Some("te"),
                    (None, false) => None,
                };
                if let Some(connection) = connection {
                    head.headers
                        .insert(CONNECTION, HeaderValue::from_static(connection));
                }
                if let Some(protocol) = upgrade {
                    head.headers.insert(UPGRADE, protocol.clone());
                }
                frame(head, self.exact);
                head.headers.insert(HOST, host(&authority));
                head.uri = Uri::from(self.path.clone());
                head.version = Version::HTTP_11;
            }
            Protocol::H2c => {
                head.headers.remove(HOST);
                head.uri = Uri::builder()
                    .scheme("http")
                    .authority(authority)
                    .path_and_query(self.path.clone())
                    .build()
                    .expect("made of sound parts");
                head.version = Version::HTTP_2;
            }
        }
    }
}

/// A tunnel needs HTTP/1.1 on both sides.
fn tunnels(endpoint: &Endpoint) -> bool {
    endpoint.protocol == Protocol::Http1
}

fn host(authority: &Authority) -> HeaderValue {
    HeaderValue::from_str(authority.as_str()).expect("an authority is a value")
}

/// Refuses a target longer than allowed.
pub(crate) fn too_long(uri: &Uri, limits: &Limits) -> Result<(), Refusal> {
    let length = uri
        .path_and_query()
        .map_or(0, |target| target.as_str().len());
    if length > limits.max_path.in_memory() {
        return Err(RefusalKind::UriTooLong.into());
    }
    Ok(())
}

/// Says how long the body is where hyper's client would not: it takes a GET of
/// unknown length for one without a body.
fn frame(head: &mut Parts, exact: Option<u64>) {
    match exact {
        None => {
            head.headers.remove(CONTENT_LENGTH);
            head.headers
                .insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        Some(0) if matches!(head.method, Method::POST | Method::PUT | Method::PATCH) => {
            head.headers.insert(CONTENT_LENGTH, HeaderValue::from(0));
        }
        Some(_) => {}
    }
}

/// Lets the body wait for the upstream's `100 Continue`.
fn hold_back(head: &mut Parts, outgoing: &mut Outgoing) -> Hold {
    let hold = outgoing.hold();
    let release = hold.clone();
    // The extension's type is hyper's own, so that it needs a whole request.
    let mut carrier = Request::new(());
    hyper::ext::on_informational(&mut carrier, move |response| {
        if response.status() == StatusCode::CONTINUE {
            release.release();
        }
    });
    head.extensions = std::mem::take(carrier.extensions_mut());
    hold
}

/// Whether an error is what a connection shows that had been closed.
fn is_stale(error: &hyper::Error) -> bool {
    if error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
        return true;
    }
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::BrokenPipe
                    | io::ErrorKind::NotConnected
            );
        }
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM);
        }
        cause = error.source();
    }
    false
}

/// What tonic's servers answer when the time is up that `grpc-timeout` told
/// them.
fn was_cancelled(response: &Response<Incoming>) -> bool {
    GrpcCode::of(response.headers()) == Some(GrpcCode::Cancelled)
}

/// Who says no is a bad gateway; who says nothing has run out of time.
fn unreachable(error: &io::Error) -> RefusalKind {
    match error.kind() {
        io::ErrorKind::TimedOut => RefusalKind::TimedOut,
        _ => RefusalKind::BadGateway,
    }
}

/// Why there is no answer: what the client will be told, and what a retry is
/// to know.
#[derive(Debug)]
pub(crate) struct Failed {
    refusal: Refusal,
    /// What the retry sees in place of the refusal, where that does not say it
    /// all.
    cause: Option<BoxError>,
}

impl Failed {
    /// Nothing of the request has left.
    fn unsent(kind: RefusalKind) -> Self {
        Refusal::from(kind).before_sending().into()
    }

    /// The exchange broke off, and nobody knows how far it had come; but for
    /// HTTP/2, which may say that it had not begun.
    fn broken(error: hyper::Error) -> Self {
        let h2 = error.source().and_then(|it| it.downcast_ref::<h2::Error>());
        let refused = h2.is_some_and(|it| it.reason() == Some(h2::Reason::REFUSED_STREAM));
        Self {
            refusal: RefusalKind::BadGateway.into(),
            cause: refused.then(|| error.into()),
        }
    }

    /// No breaker lets it pass. The client is told when to come again; a retry
    /// is not, since it would wait for that here.
    pub(crate) fn refused(refusal: Refusal) -> Self {
        Self {
            cause: Some(Refusal::new(refusal.kind()).into()),
            refusal,
        }
    }

    /// Time ran out while the client's own body was waited for, or it was the
    /// client's own. Another attempt would fare no better.
    fn by_client() -> Self {
        Self {
            refusal: RefusalKind::TimedOut.into(),
            cause: Some(Cut::Client.into()),
        }
    }

    /// What it says of the endpoint: nothing where the client is to blame.
    /// Else anyone could open a breaker by a few requests sent slowly.
    fn blame(&self) -> Verdict {
        match self.refusal.kind() {
            RefusalKind::TimedOut if self.cause.as_ref().is_some_and(|it| it.is::<Cut>()) => {
                Verdict::Ignored
            }
            RefusalKind::BadGateway | RefusalKind::TimedOut => Verdict::Failure,
            _ => Verdict::Ignored,
        }
    }
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self {
            refusal,
            cause: None,
        }
    }
}

impl From<RefusalKind> for Failed {
    fn from(kind: RefusalKind) -> Self {
        Refusal::from(kind).into()
    }
}

/// The time that a client gave ran out.
impl From<Elapsed> for Failed {
    fn from(_: Elapsed) -> Self {
        Self::by_client()
    }
}

impl From<Failed> for Refusal {
    fn from(failed: Failed) -> Self {
        failed.refusal
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no answer from upstream")
    }
}

impl Error for Failed {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(match &self.cause {
            Some(cause) => &**cause,
            None => &self.refusal,
        })
    }
}

/// An error with its causes, for the operator.
fn chain(error: &hyper::Error) -> String {
    let (mut text, mut cause) = (error.to_string(), error.source());
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// An endpoint's answer.
struct Answer {
    response: Response<Incoming>,
    connection: Connection,
    hold: Option<Hold>,
    /// The client's side of a tunnel: it is a 101.
    upgrade: Option<OnUpgrade>,
}

/// What a request holds until its response has ended.
struct Held {
    connection: Connection,
    in_flight: InFlight,
    hold: Option<Hold>,
    sending: Option<Sending>,
    /// This answer may be given up for another.
    may_go_again: bool,
    judge: HttpClassifier,
    /// What the end must tell before a success is one.
    expected: Expect,
}

/// Lets go of what a request holds, when its response ends, and tells the
/// breaker how. A response that ended early takes its HTTP/1.1 connection with
/// it: the rest is still on it.
pub(crate) struct Ending(Option<Held>);

impl BodyGuard for Ending {
    fn ended(self, end: BodyEnd<'_>, _: u64) {
        let Some(Held {
            connection,
            mut in_flight,
            hold,
            sending,
            may_go_again,
            judge,
            expected,
        }) = self.0
        else {
            return;
        };
        if let Some(hold) = hold {
            hold.cut();
        }
        in_flight.record(match sending.as_ref().and_then(Sending::cut) {
            // What broke off was the request, and the answer with it.
            Some(_) => Verdict::Ignored,
            None => {
                Classify::<Response<Incoming>, Infallible>::classify_body(&judge, expected, end)
            }
        });
        let is_complete = matches!(end, BodyEnd::Complete { .. });
        if (may_go_again || !is_complete)
            && let Some(sending) = sending
        {
            // Whoever has failed wants no more of the request; a retry may.
            sending.give_back();
        }
        if is_complete {
            connection.finish(in_flight.endpoint());
        }
    }
}

/// Two connections that became one, after `101 Switching Protocols`.
#[derive(Debug)]
pub(crate) struct Tunnel {
    client: OnUpgrade,
    upstream: OnUpgrade,
    in_flight: InFlight,
}

impl Tunnel {
    /// Carries bytes both ways until both sides have ended.
    pub(crate) async fn run(self, mut line: Line) {
        let Self {
            client,
            upstream,
            in_flight,
        } = self;
        let Ok((client, upstream)) = tokio::try_join!(client, upstream) else {
            return;
        };
        let mut client = Counted {
            io: TokioIo::new(client),
            written: 0,
        };
        let mut upstream = TokioIo::new(upstream);
        let copied = tokio::io::copy_bidirectional(&mut client, &mut upstream).await;
        if let Err(error) = copied {
            line.facts.failed(format!("tunnel: {error}"));
        }
        line.add_bytes(client.written);
        drop(in_flight);
        // Written before the connection is gone that a shutdown waits for.
        drop(line);
    }
}

/// Counts what is written to it: a tunnel that ends with a reset, as most that
/// a browser has do, has carried bytes all the same.
struct Counted {
    io: TokioIo<Upgraded>,
    written: u64,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.written += written as u64;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use http_body::Frame;
    use http_body_util::BodyExt;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        sync::mpsc,
        time::{Instant, sleep, timeout},
    };

    use super::*;

    const SILENCE: Duration = Duration::from_millis(400);
    const LONG: Duration = Duration::from_secs(20);

    /// What a client sends, piece by piece.
    struct Sent(mpsc::Receiver<Bytes>);

    impl HttpBody for Sent {
        type Data = Bytes;
        type Error = hyper::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
            let data = ready!(self.0.poll_recv(cx));
            Poll::Ready(data.map(|data| Ok(Frame::data(data))))
        }
    }

    fn request() -> (mpsc::Sender<Bytes>, Request<Sent>) {
        let (client, sent) = mpsc::channel(1);
        let request = Request::post("/").header(HOST, "a");
        (client, request.body(Sent(sent)).unwrap())
    }

    /// Forwards to who does this once it has read a request's head and the
    /// first piece of its body.
    async fn to<F>(upstream: impl FnOnce(TcpStream) -> F + Send + 'static) -> Forward
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut seen = Vec::new();
            while !seen.ends_with(b"5\r\nfirst\r\n") {
                seen.push(stream.read_u8().await.unwrap());
            }
            upstream(stream).await;
        });
        let endpoint = format!("http://{address}").parse().unwrap();
        Forward::new(Rules {
            balance: Balance::new([Endpoint::new(&endpoint, None, LONG)], None),
            limits: Arc::default(),
            client_ip: ClientIp::new(),
            scheme: "http",
            grpc_timeout: GrpcTimeout::new(),
            strip: String::new(),
            timeout: LONG,
            silence: SILENCE,
            judge: HttpClassifier::default(),
            retried: None,
        })
    }

    async fn answered(
        mut forward: Forward,
        request: Request<Sent>,
    ) -> Result<Response<Body>, Failed> {
        timeout(LONG, forward.call(request)).await.unwrap()
    }

    fn is_in_time(begun: Instant) {
        let took = begun.elapsed();
        assert!(took >= SILENCE && took < 10 * SILENCE, "{took:?}");
    }

    #[tokio::test]
    async fn an_upload_that_stalls_before_the_answer_is_refused() {
        let forward = to(async |mut stream| {
            // The proxy hangs up.
            assert!(!matches!(stream.read(&mut [0]).await, Ok(1..)));
        })
        .await;
        let (client, request) = request();
        client.send("first".into()).await.unwrap();
        let begun = Instant::now();
        let failed = answered(forward, request).await.unwrap_err();
        is_in_time(begun);
        assert_eq!(failed.blame(), Verdict::Ignored);
        let refusal = Refusal::from(failed);
        assert_eq!(refusal.status(), StatusCode::REQUEST_TIMEOUT);
        assert_eq!(refusal.reason(), "request_timeout");
        timeout(LONG, client.closed()).await.unwrap();
    }

    /// Then the route's own timeout is over and done with.
    #[tokio::test]
    async fn an_upload_that_stalls_after_the_answers_head_is_cut_off() {
        let forward = to(async |mut stream| {
            let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nmore\r\n";
            stream.write_all(head).await.unwrap();
            assert!(!matches!(stream.read(&mut [0]).await, Ok(1..)));
        })
        .await;
        let (client, request) = request();
        client.send("first".into()).await.unwrap();
        let begun = Instant::now();
        let answer = answered(forward, request).await.unwrap();
        assert_eq!(answer.status(), 200);
        let body = timeout(LONG, answer.into_body().collect()).await.unwrap();
        assert!(body.is_err(), "{body:?}");
        is_in_time(begun);
        timeout(LONG, client.closed()).await.unwrap();
    }

    #[tokio::test]
    async fn an_upload_that_stalls_after_the_whole_answer_is_let_go() {
        let forward = to(async |mut stream| {
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone";
            stream.write_all(answer).await.unwrap();
            let _ = stream.read(&mut [0]).await;
        })
        .await;
        let (client, request) = request();
        client.send("first".into()).await.unwrap();
        let begun = Instant::now();
        let answer = answered(forward, request).await.unwrap();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, "done");
        // By this the server knows that it is to close the connection.
        timeout(LONG, client.closed()).await.unwrap();
        is_in_time(begun);
    }

    #[tokio::test]
    async fn a_slow_upload_is_not_one_that_stalls_nor_is_grpc_that_listens() {
        for grpc in [false, true] {
            let forward = to(async |mut stream| {
                let mut seen = Vec::new();
                while !seen.ends_with(b"0\r\n\r\n") {
                    seen.push(stream.read_u8().await.unwrap());
                }
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                stream.write_all(answer).await.unwrap();
                let _ = stream.read(&mut [0]).await;
            })
            .await;
            let (client, mut request) = request();
            if grpc {
                *request.version_mut() = Version::HTTP_2;
                *request.uri_mut() = "http://a/".parse().unwrap();
                let value = HeaderValue::from_static("application/grpc");
                request.headers_mut().insert("content-type", value);
            }
            client.send("first".into()).await.unwrap();
            tokio::spawn(async move {
                if grpc {
                    sleep(2 * SILENCE).await;
                }
                for _ in 0..8 {
                    sleep(SILENCE / 4).await;
                    client.send("next".into()).await.unwrap();
                }
            });
            let begun = Instant::now();
            let answer = answered(forward, request).await.unwrap();
            assert_eq!(answer.status(), 200, "{grpc}");
            assert!(begun.elapsed() >= 2 * SILENCE);
        }
    }
}
