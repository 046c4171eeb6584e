//! A server that drains: HTTP/1 and HTTP/2 on whatever can be listened on.

mod accept;
mod connection;
mod executor;
mod handshake;
mod limits;
mod peer;
mod rewind;
mod service;
pub(crate) mod slots;

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
};

use buttress_core::BoxError;
use http::{Request, Response};
use http_body::Body;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
};
use tower_service::Service;

pub(crate) use self::accept::Acceptor;
use self::connection::{Http, Same, connection};
#[cfg(feature = "tls")]
pub use self::handshake::{Tls, TlsInfo};
pub use self::{
    executor::StreamExecutor,
    handshake::{Handshake, Plain},
    limits::{Limits, LimitsBuilder},
    peer::{Peer, PeerAddrs, SetPeerAddr},
};
use crate::{Label, Phase, Shutdown, io::Told, listen::Listener};

/// A server for any service of HTTP requests (an axum `Router`, tonic's
/// `Routes`, a stack of one's own) that takes part in a [`Shutdown`]: the
/// [crate's front page](crate) has what happens when.
///
/// HTTP/1.1 and HTTP/2 are told apart by the first bytes; upgrades
/// (`hyper::upgrade::on`) work, and are counted and cut as the rest is; the
/// report names them by the [`Label`] in the extensions of their response,
/// where a [`DrainLayer`](crate::DrainLayer) that was told of routes puts one.
/// Bodies of answers that have none (to HEAD, a 204, a 304) are left out.
/// Each connection has a task of its own, and each request a clone of the
/// service.
///
/// Of a tunnel in a stream of HTTP/2 hyper tells when this end has sent all that
/// it will, not when the other has. From then on its connection gets a GOAWAY
/// like an idle one, and stays, for as long as the client answers it, until
/// hyper has seen the stream's end: a drain waits for that, up to the cut, and
/// reports the last such tunnel of a connection if nothing else is open on it.
///
/// ```
/// use std::{convert::Infallible, time::Duration};
/// use buttress_drain::{Limits, Server, Shutdown};
/// use http::{Request, Response};
/// use hyper::body::Incoming;
/// use tokio::net::TcpListener;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let shutdown = Shutdown::builder().build()?;
/// let hello = tower::service_fn(|_: Request<Incoming>| async {
///     Ok::<_, Infallible>(Response::new("hello".to_owned()))
/// });
/// let listener = TcpListener::bind("127.0.0.1:0").await?;
/// let limits = Limits::builder()
///     .idle_timeout(Duration::from_secs(120))
///     .build()?;
/// let server = Server::new(&shutdown).limits(limits).serve(listener, hello);
/// let server = tokio::spawn(server);
///
/// shutdown.trigger_without_delay("an example");
/// let report = shutdown.run().await;
/// assert_eq!(report.exit_code(), 0);
/// server.await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use = "it serves nothing before `serve`"]
pub struct Server<H = Plain> {
    shutdown: Shutdown,
    name: Label,
    limits: Limits,
    http: Http,
    handshake: H,
}

impl Server {
    /// A server that takes part in this shutdown, with the default limits and
    /// no TLS.
    pub fn new(shutdown: &Shutdown) -> Self {
        Self {
            shutdown: shutdown.clone(),
            name: "http".into(),
            limits: Limits::default(),
            http: Http::new(),
            handshake: Plain,
        }
    }
}

impl<H> Server<H> {
    /// What it is called in logs. Default `http`.
    pub fn name(mut self, name: impl Into<Label>) -> Self {
        self.name = name.into();
        self
    }

    /// What a connection may take.
    pub const fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// TLS on every connection, HTTP/2 or HTTP/1.1 by ALPN. The configuration,
    /// with its crypto provider and certificates, comes from outside; where it
    /// offers no protocols, these two are offered.
    #[cfg(feature = "tls")]
    pub fn tls(self, config: Arc<tokio_rustls::rustls::ServerConfig>) -> Server<Tls> {
        self.handshake(Tls::new(config))
    }

    /// A handshake of one's own on every connection.
    pub fn handshake<G>(self, handshake: G) -> Server<G> {
        Server {
            shutdown: self.shutdown,
            name: self.name,
            limits: self.limits,
            http: self.http,
            handshake,
        }
    }

    /// Sets what else hyper can be told of HTTP/1; the limits are set after it.
    /// A timer for its own header timeout is not wanted: that runs between
    /// requests, too.
    pub fn http1(mut self, set: impl FnOnce(&mut http1::Builder)) -> Self {
        set(&mut self.http.http1);
        self
    }

    /// Sets what else hyper can be told of HTTP/2: windows, frames; the limits
    /// are set after it. WebSockets over HTTP/2 (RFC 8441) are offered where
    /// they are asked for:
    ///
    /// ```
    /// # let shutdown = buttress_drain::Shutdown::builder().build()?;
    /// let server = buttress_drain::Server::new(&shutdown).http2(|http2| {
    ///     http2.enable_connect_protocol();
    /// });
    /// # let _ = server;
    /// # Ok::<(), buttress_drain::ConfigError>(())
    /// ```
    pub fn http2(mut self, set: impl FnOnce(&mut http2::Builder<StreamExecutor>)) -> Self {
        set(&mut self.http.http2);
        self
    }

    /// Serves until the shutdown closes the listener and every connection is
    /// gone, or was cut. No error of the listener ends it. Somebody must await
    /// [`Shutdown::run`] for it to come to an end.
    ///
    /// It counts as a server from this call on. Dropping the future closes the
    /// listener; the connections that were accepted go on, and are waited for,
    /// closed and cut by the shutdown as before.
    ///
    /// An axum `Router` is best given its state before, if only
    /// `with_state(())`: without it, it makes each handler ready anew for each
    /// request, which is an allocation.
    ///
    /// # Panics
    ///
    /// When it is polled outside of a tokio runtime with a timer.
    pub fn serve<L, S, B>(
        self,
        listener: L,
        service: S,
    ) -> impl Future<Output = ()> + Send + use<H, L, S, B>
    where
        L: Listener,
        H: Handshake<crate::DrainIo<L::Io>>,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<BoxError>,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        self.serve_with(listener, Same(service))
    }

    /// The same with a service made for each connection: by
    /// `Router::into_make_service_with_connect_info::<SocketAddr>()` of axum
    /// (feature `axum`), by [`PeerAddrs`], or by a service of one's own from
    /// [`Peer`] to a service.
    pub fn serve_with<L, M, S, B>(
        self,
        listener: L,
        make: M,
    ) -> impl Future<Output = ()> + Send + use<H, L, M, S, B>
    where
        L: Listener,
        H: Handshake<crate::DrainIo<L::Io>>,
        M: Service<Peer<L::Addr, H::Info>, Response = S> + Clone + Send + 'static,
        M::Future: Send,
        M::Error: Into<BoxError>,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<BoxError>,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        let Self {
            shutdown,
            name,
            limits,
            mut http,
            handshake,
        } = self;
        http.limit(&limits);
        let http = Arc::new(http);
        let mut acceptor = Acceptor::new(&shutdown, name, listener, limits, true);
        let slots = Arc::clone(acceptor.slots());
        async move {
            while let Some((io, remote)) = poll_fn(|cx| acceptor.poll_next(cx)).await {
                let local = L::local_addr(io.get_ref());
                let (handshake, make, http) = (handshake.clone(), make.clone(), Arc::clone(&http));
                tokio::spawn(connection(io, remote, local, handshake, make, http));
            }
            // Whoever holds what was cut and does not poll it is not waited
            // for.
            let mut over = pin!(Told::new(shutdown.reached(Phase::Hooks)));
            poll_fn(|cx| match slots.poll_empty(cx) {
                Poll::Ready(()) => Poll::Ready(()),
                Poll::Pending => over.as_mut().poll(cx),
            })
            .await;
        }
    }
}

impl<H: fmt::Debug> fmt::Debug for Server<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("name", &self.name)
            .field("limits", &self.limits)
            .field("handshake", &self.handshake)
            .finish_non_exhaustive()
    }
}
