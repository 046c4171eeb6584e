//! A client that calls nobody but who the [guard](crate::guard) lets through.
//!
//! hyper-util's pooled client over rustls, HTTP/1.1 or 2 as the receiver
//! chooses by ALPN. It follows no redirect, takes no proxy from the
//! environment, and sends the body that this crate's engine and the signing
//! layer make, [`WholeBody`].
//!
//! ```text
//! Client ─ pool ─▶ Connector: TLS ─▶ GuardedConnector ─▶ socket
//! ```
//!
//! [`client`] has every default; [`ClientBuilder`] takes a resolver and times.
//! Whom TLS trusts is told by a [`ClientConfig`]: the roots of Mozilla
//! (`webpki_roots`, feature `webpki-roots`), those of the system
//! (`native_roots`, feature `native-roots`), or any that you build, such as
//! one with the certificate of a private authority.

use std::{
    fmt,
    future::{self, Future},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use buttress_core::BoxError;
use buttress_webhook::WholeBody;
use http::Uri;
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::{
    client::legacy::{
        self,
        connect::dns::{GaiResolver, Name},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::{net::TcpStream, time};
use tokio_rustls::rustls::ClientConfig;
use tower_service::Service;

use crate::guard::{Denied, Guard, GuardedConnector, timed_out};

#[cfg(any(feature = "webpki-roots", feature = "native-roots"))]
mod roots;

#[cfg(feature = "native-roots")]
pub use self::roots::native_roots;
#[cfg(feature = "webpki-roots")]
pub use self::roots::webpki_roots;

/// Name, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Shorter than the receivers' own, usually 60 s and more, so that few
/// requests meet a connection that is being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Of each host. Hosts are what others choose, and lanes are few.
const MOST_IDLE: usize = 4;

/// The guarded client: a `Service<Request<WholeBody>>`, cheap to clone, whose
/// clones share one pool.
pub type Client<R = GaiResolver> = legacy::Client<Connector<R>, WholeBody>;

/// A client behind this guard, which trusts what this configuration trusts;
/// all else as [`ClientBuilder`] has it.
///
/// ```
/// # #[cfg(feature = "webpki-roots")]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use buttress_delivery::{client, guard::{Denied, Guard, Rule}};
/// use buttress_webhook::WholeBody;
/// use http::Request;
///
/// let client = client::client(Guard::new(), client::webpki_roots());
/// let request = Request::post("https://localhost:9200/_search")
///     .body(WholeBody::new("{}".into()))
///     .unwrap();
///
/// let error = client.request(request).await.unwrap_err();
/// assert_eq!(Denied::of(&error).unwrap().rule(), Rule::Address);
/// # }
/// # #[cfg(not(feature = "webpki-roots"))]
/// # fn main() {}
/// ```
#[must_use]
pub fn client(guard: Guard, tls: ClientConfig) -> Client {
    ClientBuilder::new(guard, tls).build()
}

/// Settings of a guarded [`Client`].
#[derive(Clone)]
#[must_use = "nothing is built until `build` is called"]
pub struct ClientBuilder<R = GaiResolver> {
    dial: GuardedConnector<R>,
    tls: ClientConfig,
    connect_timeout: Duration,
    idle_timeout: Duration,
}

impl ClientBuilder {
    /// With the system's resolver, 10 s to connect, and connections kept for
    /// 30 s of idleness, four of a host at most.
    ///
    /// If the configuration names no ALPN protocols, `h2` and `http/1.1` are
    /// offered; else those it names.
    pub fn new(guard: Guard, tls: ClientConfig) -> Self {
        Self {
            dial: GuardedConnector::new(guard),
            tls,
            connect_timeout: CONNECT_TIMEOUT,
            idle_timeout: IDLE_TIMEOUT,
        }
    }
}

impl<R: Clone> ClientBuilder<R> {
    /// Resolves names by this: see [`GuardedConnector::resolver`].
    pub fn resolver<N: Clone>(self, resolver: N) -> ClientBuilder<N> {
        ClientBuilder {
            dial: self.dial.resolver(resolver),
            tls: self.tls,
            connect_timeout: self.connect_timeout,
            idle_timeout: self.idle_timeout,
        }
    }

    /// How long to resolve, connect and shake hands may take together; 10 s by
    /// default, of which 5 s at most until TCP is connected.
    pub const fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// How long a connection that nobody uses is kept; 30 s by default.
    pub const fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// The connector alone, for a client of your own making.
    pub fn connector(self) -> Connector<R> {
        let mut tls = self.tls;
        if tls.alpn_protocols.is_empty() {
            tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        }
        Connector {
            guard: self.dial.guard(),
            https: HttpsConnector::from((self.dial, tls)),
            timeout: self.connect_timeout,
        }
    }
}

impl<R> ClientBuilder<R>
where
    R: Service<Name> + Clone + Send + Sync + 'static,
    R::Response: Iterator<Item = SocketAddr>,
    R::Error: Into<BoxError>,
    R::Future: Send,
{
    /// The client. Its timers and tasks are on the tokio runtime that it is
    /// called in.
    #[must_use]
    pub fn build(self) -> Client<R> {
        legacy::Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(self.idle_timeout)
            .pool_max_idle_per_host(MOST_IDLE)
            .build(self.connector())
    }
}

impl<R> fmt::Debug for ClientBuilder<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBuilder")
            .field("dial", &self.dial)
            .field("connect_timeout", &self.connect_timeout)
            .field("idle_timeout", &self.idle_timeout)
            .finish_non_exhaustive()
    }
}

/// TLS over a [`GuardedConnector`]: a `Service<Uri>` for any client of
/// hyper-util's making. From [`ClientBuilder::connector`].
///
/// # Errors
///
/// As [`GuardedConnector`], and what TLS says.
#[derive(Clone)]
pub struct Connector<R = GaiResolver> {
    guard: Arc<Guard>,
    https: HttpsConnector<GuardedConnector<R>>,
    timeout: Duration,
}

impl<R> Service<Uri> for Connector<R>
where
    R: Service<Name> + Clone + Send + Sync + 'static,
    R::Response: Iterator<Item = SocketAddr>,
    R::Error: Into<BoxError>,
    R::Future: Send,
{
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = BoxError;
    type Future = Connecting;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.https.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Connecting {
        // Asked before TLS makes a name of the host: its complaint that
        // `127.1` is none would hide the denial.
        if let Err(denied) = self.guard.check_uri(&uri) {
            return Connecting(State::Denied(future::ready(denied)));
        }
        let connect = self.https.call(uri);
        let limit = self.timeout;
        Connecting(State::Connecting(Box::pin(async move {
            // Whoever accepts and never shakes hands would be waited for
            // without an end, by a task of the pool that no caller can drop.
            match time::timeout(limit, connect).await {
                Ok(connected) => connected,
                Err(_) => Err(timed_out()),
            }
        })))
    }
}

impl<R> fmt::Debug for Connector<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("connect_timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

type Connected = Result<MaybeHttpsStream<TokioIo<TcpStream>>, BoxError>;

/// Future of [`Connector`].
#[must_use = "futures do nothing unless polled"]
pub struct Connecting(State);

enum State {
    Denied(future::Ready<Denied>),
    Connecting(Pin<Box<dyn Future<Output = Connected> + Send>>),
}

impl Future for Connecting {
    type Output = Connected;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::Denied(denied) => Pin::new(denied).poll(cx).map(|denied| Err(denied.into())),
            State::Connecting(connecting) => connecting.as_mut().poll(cx),
        }
    }
}

impl fmt::Debug for Connecting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connecting").finish_non_exhaustive()
    }
}
