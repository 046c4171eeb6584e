//! For tonic's server.

use std::{
    convert::Infallible,
    fmt,
    future::{Future, Ready, ready},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use futures_core::Stream;
use http::Request;
use tokio::net::TcpListener;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tower_service::Service;

use crate::{
    DrainIo, Label, Limits, Shutdown,
    listen::{Listener, Socket},
    serve::{Acceptor, Peer},
};

/// An incoming stream for tonic's server that takes part in a [`Shutdown`].
///
/// ```
/// use buttress_drain::{Limits, Shutdown, TonicIncoming};
/// use tonic::transport::Server;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let shutdown = Shutdown::builder().build()?;
/// let (_reporter, health) = tonic_health::server::health_reporter();
///
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
/// let incoming = TonicIncoming::new(&shutdown, "grpc", listener, Limits::default());
/// let graceful = incoming.graceful();
/// let server = Server::builder()
///     .add_service(health)
///     .serve_with_incoming_shutdown(incoming, graceful);
/// let server = tokio::spawn(server);
///
/// shutdown.trigger_without_delay("an example");
/// assert_eq!(shutdown.run().await.exit_code(), 0);
/// server.await??;
/// # Ok(())
/// # }
/// ```
///
/// Its connections are counted and cut; the backlog is accepted before the
/// listener is closed; connections are closed by a FIN and linger; one that has
/// sent nothing is given up after the idle timeout, or after the first byte's
/// grace once listeners close; one that takes nothing of what is sent to it,
/// after the write timeout; and `max_connections` holds. tonic's connect info
/// is that of the connection.
///
/// What a [`Server`](crate::Server) does and this cannot, since it sees no
/// requests and tonic closes connections by itself:
///
/// - the GOAWAYs of all connections go out at once, when the listener is
///   closed; a connection without a request has no limit but tonic's HTTP/2
///   keep-alive and age, which are to be set there;
/// - on HTTP/1 (gRPC-Web) an idle connection is closed whether bytes have just
///   arrived on it or not;
/// - over HTTP/2, hyper sends what body an answer to HEAD, a 204 or a 304 was
///   given, unless a router leaves it out;
/// - in the report a connection is idle, and not named, unless a
///   [`DrainLayer`](crate::DrainLayer) knows of a request on it, or it is sent
///   something that its client's socket does not take at the time of the cut;
///   of an answer that waits for a window of HTTP/2 nobody knows once tonic has
///   the last of it;
/// - with tonic's own TLS it is the encrypted bytes that are counted, and
///   handshakes have no limit but tonic's.
///
/// For gRPC on a [`Server`](crate::Server) see [`TcpConnectInfos`].
pub struct TonicIncoming<L = TcpListener> {
    acceptor: Acceptor<L>,
    /// Nothing comes any more.
    closed: bool,
}

impl<L: Listener> TonicIncoming<L> {
    /// Counts as a server of this name from now on.
    pub fn new(shutdown: &Shutdown, name: impl Into<Label>, listener: L, limits: Limits) -> Self {
        Self {
            acceptor: Acceptor::new(shutdown, name.into(), listener, limits, false),
            closed: false,
        }
    }

    /// For `serve_with_incoming_shutdown`: ready once the listener is closed.
    /// Without it tonic serves on, until the connections are cut.
    pub fn graceful(&self) -> impl Future<Output = ()> + Send + use<L> {
        self.acceptor.graceful()
    }
}

impl<L: Listener + Unpin> Stream for TonicIncoming<L> {
    type Item = Result<DrainIo<L::Io>, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if !this.closed {
            match this.acceptor.poll_next(cx) {
                Poll::Ready(Some((io, _))) => return Poll::Ready(Some(Ok(io))),
                Poll::Ready(None) => this.closed = true,
                Poll::Pending => {}
            }
        }
        // The end of the stream would be the end of the connections.
        Poll::Pending
    }
}

impl<L: Listener> fmt::Debug for TonicIncoming<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TonicIncoming")
            .field("listening", &!self.closed)
            .finish_non_exhaustive()
    }
}

/// That of the connection itself.
impl<I: Socket + Connected> Connected for DrainIo<I> {
    type ConnectInfo = I::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.get_ref().connect_info()
    }
}

/// Gives every connection of a [`Server`](crate::Server) this service, and
/// writes tonic's `TcpConnectInfo` into the extensions of each request, so that
/// `tonic::Request::remote_addr` works. What tonic's own server offers besides
/// (its timeouts, its limits) is then to come from layers.
///
/// ```no_run
/// use buttress_drain::{Server, Shutdown, TcpConnectInfos};
/// use tonic::service::Routes;
///
/// # async fn example(shutdown: Shutdown, listener: tokio::net::TcpListener) {
/// let (_reporter, health) = tonic_health::server::health_reporter();
/// let routes = Routes::new(health).prepare();
/// Server::new(&shutdown)
///     .name("grpc")
///     .serve_with(listener, TcpConnectInfos(routes))
///     .await;
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct TcpConnectInfos<S>(pub S);

impl<S: Clone, T> Service<Peer<SocketAddr, T>> for TcpConnectInfos<S> {
    type Response = SetTcpConnectInfo<S>;
    type Error = Infallible;
    type Future = Ready<Result<SetTcpConnectInfo<S>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, peer: Peer<SocketAddr, T>) -> Self::Future {
        ready(Ok(SetTcpConnectInfo {
            inner: self.0.clone(),
            info: TcpConnectInfo {
                local_addr: peer.local,
                remote_addr: Some(peer.remote),
            },
        }))
    }
}

/// The service of [`TcpConnectInfos`], for one connection.
#[derive(Clone, Debug)]
pub struct SetTcpConnectInfo<S> {
    inner: S,
    info: TcpConnectInfo,
}

impl<S, B> Service<Request<B>> for SetTcpConnectInfo<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> S::Future {
        request.extensions_mut().insert(self.info.clone());
        self.inner.call(request)
    }
}
