//! Where the guard stands: between a resolver's answer and the socket.

use std::{
    fmt,
    future::{self, Future},
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
    vec,
};

use buttress_core::BoxError;
use http::Uri;
use hyper_util::{
    client::legacy::connect::{
        HttpConnector,
        dns::{GaiResolver, Name},
    },
    rt::TokioIo,
};
use pin_project_lite::pin_project;
use tokio::{net::TcpStream, time};
use tower_service::Service;

use super::{Denied, Guard};

/// Two SYNs that were lost are sent again within it, at 1 and 3 s.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Of one name. The time to connect is divided among them, so an answer with
/// a thousand would leave none of them any; nor are we to knock at a thousand
/// doors because a name says so.
const MOST_ADDRESSES: usize = 16;

/// A connector for hyper-util's client, tonic's `Endpoint` and whatever else
/// takes a `Service<Uri>`, which dials only what its [`Guard`] lets through.
///
/// Plain TCP, whatever the scheme: TLS goes around it, as the feature
/// `client` does with hyper-rustls. A URI is judged by
/// [`Guard::check_uri`] and the addresses of its name, each time it is called,
/// before a socket is opened. Of the addresses that are left, 16 at most are
/// tried, IPv4 and IPv6 side by side (RFC 8305's happy eyeballs).
///
/// Names are resolved by the system unless [`resolver`](Self::resolver) says
/// otherwise. To resolve and connect take 5 s at most, and Nagle's algorithm is
/// off. No proxy is taken from the environment.
///
/// # Errors
///
/// Its future ends with a [`Denied`], or an error that [`Denied::of`] finds it
/// in; with an [`io::Error`] of the kind `TimedOut`; or with what the resolver
/// or the socket said.
///
/// # Cancellation
///
/// Dropping the future closes the socket. A lookup by the system's resolver
/// holds its thread until the system gives up; nothing can be done about it.
///
/// ```
/// use buttress_delivery::guard::{Denied, Guard, GuardedConnector};
/// use http::Uri;
/// use tower::{Service, ServiceExt};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let mut connector = GuardedConnector::new(Guard::new());
/// let metadata = Uri::from_static("https://[64:ff9b::a9fe:a9fe]/latest/meta-data");
/// let error = connector.ready().await.unwrap().call(metadata).await.unwrap_err();
/// assert!(Denied::of(&*error).is_some());
/// # }
/// ```
#[derive(Clone)]
pub struct GuardedConnector<R = GaiResolver> {
    guard: Arc<Guard>,
    http: HttpConnector<Resolver<R>>,
    resolver: R,
    timeout: Duration,
}

impl GuardedConnector {
    /// With the system's resolver.
    #[must_use]
    pub fn new(guard: Guard) -> Self {
        Self::assemble(Arc::new(guard), GaiResolver::new(), CONNECT_TIMEOUT)
    }
}

impl<R: Clone> GuardedConnector<R> {
    /// Resolves names by this, a `Service<Name>` that answers with an iterator
    /// of [`SocketAddr`]s. Their ports count for nothing.
    #[must_use]
    pub fn resolver<N: Clone>(self, resolver: N) -> GuardedConnector<N> {
        GuardedConnector::assemble(self.guard, resolver, self.timeout)
    }

    /// How long to resolve and connect may take together; 5 s by default.
    ///
    /// Where a name has several addresses, the time is divided evenly among
    /// those of a family.
    #[must_use]
    pub fn connect_timeout(self, timeout: Duration) -> Self {
        Self::assemble(self.guard, self.resolver, timeout)
    }

    #[cfg(feature = "client")]
    pub(crate) fn guard(&self) -> Arc<Guard> {
        Arc::clone(&self.guard)
    }

    fn assemble(guard: Arc<Guard>, resolver: R, timeout: Duration) -> Self {
        let guarded = Resolver {
            guard: Arc::clone(&guard),
            inner: resolver.clone(),
        };
        let mut http = HttpConnector::new_with_resolver(guarded);
        // The guard has judged the scheme.
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(timeout));
        Self {
            guard,
            http,
            resolver,
            timeout,
        }
    }
}

impl<R> Service<Uri> for GuardedConnector<R>
where
    R: Service<Name> + Clone + Send + Sync + 'static,
    R::Response: Iterator<Item = SocketAddr>,
    R::Error: Into<BoxError>,
    R::Future: Send,
{
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = Connecting;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.http.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Connecting {
        // Literal addresses never come to the resolver: this is their judge.
        if let Err(denied) = self.guard.check_uri(&uri) {
            return Connecting(State::Denied(future::ready(denied)));
        }
        let dial = self.http.call(uri);
        let limit = self.timeout;
        // Boxed, for hyper-util's client asks for a future that is `Unpin`.
        Connecting(State::Dialling(Box::pin(async move {
            match time::timeout(limit, dial).await {
                Ok(connected) => connected.map_err(Into::into),
                Err(_) => Err(timed_out()),
            }
        })))
    }
}

pub(crate) fn timed_out() -> BoxError {
    io::Error::new(io::ErrorKind::TimedOut, "no connection within the time set").into()
}

impl<R> fmt::Debug for GuardedConnector<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardedConnector")
            .field("guard", &self.guard)
            .field("connect_timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// Future of [`GuardedConnector`].
#[must_use = "futures do nothing unless polled"]
pub struct Connecting(State);

enum State {
    Denied(future::Ready<Denied>),
    Dialling(Pin<Box<dyn Future<Output = Result<TokioIo<TcpStream>, BoxError>> + Send>>),
}

impl Future for Connecting {
    type Output = Result<TokioIo<TcpStream>, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::Denied(denied) => Pin::new(denied).poll(cx).map(|denied| Err(denied.into())),
            State::Dialling(dialling) => dialling.as_mut().poll(cx),
        }
    }
}

impl fmt::Debug for Connecting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connecting").finish_non_exhaustive()
    }
}

/// A resolver that hands on what may be dialled.
#[derive(Clone)]
struct Resolver<R> {
    guard: Arc<Guard>,
    inner: R,
}

impl<R> Service<Name> for Resolver<R>
where
    R: Service<Name>,
    R::Response: Iterator<Item = SocketAddr>,
    R::Error: Into<BoxError>,
{
    type Response = vec::IntoIter<SocketAddr>;
    type Error = BoxError;
    type Future = Resolving<R::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, name: Name) -> Self::Future {
        Resolving {
            guard: Arc::clone(&self.guard),
            answer: self.inner.call(name),
        }
    }
}

pin_project! {
    struct Resolving<F> {
        guard: Arc<Guard>,
        #[pin]
        answer: F,
    }
}

impl<F, A, E> Future for Resolving<F>
where
    F: Future<Output = Result<A, E>>,
    A: Iterator<Item = SocketAddr>,
    E: Into<BoxError>,
{
    type Output = Result<vec::IntoIter<SocketAddr>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = ready!(this.answer.poll(cx)).map_err(Into::into)?;
        Poll::Ready(this.guard.sift(answer).map_err(Into::into))
    }
}

impl Guard {
    /// What of an answer may be dialled.
    fn sift(
        &self,
        answer: impl Iterator<Item = SocketAddr>,
    ) -> Result<vec::IntoIter<SocketAddr>, Denied> {
        let mut first_denial = None;
        let mut left = Vec::new();
        for mut address in answer {
            match self.check_ip(address.ip()) {
                Ok(()) => {
                    // The port was judged in the URI: one that a resolver
                    // brings must not take its place.
                    address.set_port(0);
                    left.push(address);
                }
                Err(denied) => first_denial = first_denial.or(Some(denied)),
            }
            if left.len() == MOST_ADDRESSES {
                break;
            }
        }
        match first_denial {
            Some(denied) if left.is_empty() => Err(denied),
            _ => Ok(left.into_iter()),
        }
    }
}
