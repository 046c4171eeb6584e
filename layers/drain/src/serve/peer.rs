//! Who is at the other end.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    net::SocketAddr,
    task::{Context, Poll},
};

use buttress_core::key::PeerAddr;
use http::Request;
use tower_service::Service;

/// The ends of a connection, for those who make a service for each.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Peer<A, T = ()> {
    /// The other end's address.
    pub remote: A,
    /// This end's, if the listener knows.
    pub local: Option<A>,
    /// What the handshake told: `TlsInfo` by rustls.
    pub info: T,
}

/// Gives every connection this service, and writes the address of its other end
/// into the extensions of each request, as core's [`PeerAddr`]: for limits by
/// client address on other servers than axum's and tonic's. The extension costs
/// allocations for each request.
///
/// ```
/// # use buttress_drain::{PeerAddrs, Server, Shutdown};
/// # use http::{Request, Response};
/// # use hyper::body::Incoming;
/// # async fn example(shutdown: Shutdown, listener: tokio::net::TcpListener) {
/// let whoami = tower::service_fn(|request: Request<Incoming>| async move {
///     let peer = request.extensions().get::<buttress_core::key::PeerAddr>();
///     Ok::<_, std::convert::Infallible>(Response::new(format!("{peer:?}")))
/// });
/// Server::new(&shutdown).serve_with(listener, PeerAddrs(whoami)).await;
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct PeerAddrs<S>(pub S);

impl<S: Clone, T> Service<Peer<SocketAddr, T>> for PeerAddrs<S> {
    type Response = SetPeerAddr<S>;
    type Error = Infallible;
    type Future = Ready<Result<SetPeerAddr<S>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, peer: Peer<SocketAddr, T>) -> Self::Future {
        ready(Ok(SetPeerAddr {
            inner: self.0.clone(),
            peer: PeerAddr(peer.remote),
        }))
    }
}

/// The service of [`PeerAddrs`], for one connection.
#[derive(Clone, Copy, Debug)]
pub struct SetPeerAddr<S> {
    inner: S,
    peer: PeerAddr,
}

impl<S, B> Service<Request<B>> for SetPeerAddr<S>
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
        request.extensions_mut().insert(self.peer);
        self.inner.call(request)
    }
}
