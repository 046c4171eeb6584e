//! For `axum::serve`.

use std::{
    fmt,
    future::{Future, pending, poll_fn},
    io,
    net::SocketAddr,
};

use axum::{
    extract::connect_info::Connected,
    serve::{ListenerExt, TapIo},
};
use tokio::net::TcpListener;

use crate::{
    DrainIo, Label, Limits, Shutdown,
    listen::Listener,
    serve::{Acceptor, Peer},
};

/// A listener for `axum::serve` that takes part in a [`Shutdown`].
///
/// ```
/// use std::{future::IntoFuture, net::SocketAddr};
///
/// use axum::{Router, routing::get};
/// use buttress_drain::{AxumListener, Limits, Shutdown};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let shutdown = Shutdown::builder().build()?;
/// let app = Router::new().route("/", get(|| async { "hello" }));
/// let app = app.into_make_service_with_connect_info::<SocketAddr>();
///
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
/// let listener = AxumListener::new(&shutdown, "http", listener, Limits::default());
/// let graceful = listener.graceful();
/// let listener = listener.with_connect_info();
/// let server = axum::serve(listener, app).with_graceful_shutdown(graceful);
/// let server = tokio::spawn(server.into_future());
///
/// shutdown.trigger_without_delay("an example");
/// assert_eq!(shutdown.run().await.exit_code(), 0);
/// server.await??;
/// # Ok(())
/// # }
/// ```
///
/// Its connections are counted, upgraded ones too, and cut; the backlog is
/// accepted before the listener is closed; connections are closed by a FIN and
/// linger; one that has sent nothing is given up after the idle timeout, or
/// after the first byte's grace once listeners close; one that takes nothing of
/// what is sent to it, after the write timeout; and `max_connections` holds.
///
/// What a [`Server`](crate::Server) does and this cannot, since it sees no
/// requests and axum closes connections by itself:
///
/// - no time limits of heads and between requests: axum sets none;
/// - an idle connection is closed by axum, whether bytes have just arrived on
///   it or not: that request is lost, if not to a reset;
/// - no GOAWAY before the listener closes, none by age, no HTTP/2 keep-alive;
///   `Connection: close` only by a [`DrainLayer`](crate::DrainLayer);
/// - over HTTP/2, hyper sends what body an answer to HEAD, a 204 or a 304 was
///   given, unless a router leaves it out;
/// - in the report a connection is idle, and not named, unless the layer knows
///   of a request on it, or it is sent something that its client's socket does
///   not take at the time of the cut; an upgraded one too, so that a tunnel that is cut
///   does not make the exit code 124 by itself: hold a
///   [`Guard`](crate::Guard) in its task for that;
/// - a task that neither reads nor writes when the cut comes goes on until it
///   does.
pub struct AxumListener<L = TcpListener> {
    acceptor: Acceptor<L>,
}

/// What [`AxumListener::with_connect_info`] makes.
pub type TappedListener<L> =
    TapIo<AxumListener<L>, fn(&mut <AxumListener<L> as axum::serve::Listener>::Io)>;

impl<L: Listener> AxumListener<L> {
    /// Counts as a server of this name from now on.
    pub fn new(shutdown: &Shutdown, name: impl Into<Label>, listener: L, limits: Limits) -> Self {
        Self {
            acceptor: Acceptor::new(shutdown, name.into(), listener, limits, false),
        }
    }

    /// For `with_graceful_shutdown`: ready once the listener is closed. Without
    /// it axum serves on, until the connections are cut.
    pub fn graceful(&self) -> impl Future<Output = ()> + Send + use<L> {
        self.acceptor.graceful()
    }

    /// The same for `into_make_service_with_connect_info::<SocketAddr>()`,
    /// which axum has for its own listeners and for one that is tapped.
    pub fn with_connect_info(self) -> TappedListener<L> {
        self.tap_io(|_| {})
    }
}

impl<L: Listener> axum::serve::Listener for AxumListener<L> {
    type Io = DrainIo<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match poll_fn(|cx| self.acceptor.poll_next(cx)).await {
            Some(accepted) => accepted,
            // Until axum hears of it.
            None => pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<L::Addr> {
        match self.acceptor.listener() {
            Some(listener) => listener.bound_addr(),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl<L: Listener> fmt::Debug for AxumListener<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AxumListener")
            .field("listening", &self.acceptor.listener().is_some())
            .finish_non_exhaustive()
    }
}

/// `ConnectInfo<SocketAddr>` on a [`Server`](crate::Server), by
/// [`serve_with`](crate::Server::serve_with).
impl<T> Connected<Peer<Self, T>> for SocketAddr {
    fn connect_info(peer: Peer<Self, T>) -> Self {
        peer.remote
    }
}
