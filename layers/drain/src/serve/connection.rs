//! One connection, from the handshake to the linger.

use std::{
    convert::Infallible,
    fmt,
    future::{Future, Ready, poll_fn, ready},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};

use buttress_core::BoxError;
use http::{Request, Response};
use http_body::Body;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use pin_project_lite::pin_project;
use tokio::io::AsyncWriteExt;
use tower_service::Service;
use tracing::debug;

use super::{
    Handshake, Peer, StreamExecutor,
    limits::{DEFAULT_HEADERS, Limits},
    rewind::{Rewind, Version},
    service::OnConnection,
};
use crate::{
    Phase, Reached,
    io::{DrainIo, Lane, Protocol, Told},
    listen::Socket,
};

/// hyper's two, as they are set up for all connections.
#[derive(Clone, Debug)]
pub(super) struct Http {
    pub(super) http1: http1::Builder,
    pub(super) http2: http2::Builder<StreamExecutor>,
}

impl Http {
    pub(super) fn new() -> Self {
        let mut http1 = http1::Builder::new();
        // Its timer would run between requests as well, with the head's limit.
        http1.header_read_timeout(None);
        let mut http2 = http2::Builder::new(StreamExecutor);
        http2.timer(TokioTimer::new());
        Self { http1, http2 }
    }

    pub(super) fn limit(&mut self, limits: &Limits) {
        if limits.max_headers != DEFAULT_HEADERS {
            self.http1.max_headers(limits.max_headers);
        }
        self.http1
            .max_header_size(limits.max_header_bytes as usize)
            .max_buf_size(limits.max_buffer);
        self.http2
            .max_header_list_size(limits.max_header_bytes)
            .max_concurrent_streams(limits.max_concurrent_streams)
            .keep_alive_interval(limits.keep_alive_interval)
            .keep_alive_timeout(limits.keep_alive_timeout);
    }
}

/// Serves one connection to its end, or to the cut.
pub(super) async fn connection<I, A, H, M, S, B>(
    io: DrainIo<I>,
    remote: A,
    local: Option<A>,
    handshake: H,
    make: M,
    http: Arc<Http>,
) where
    I: Socket,
    H: Handshake<DrainIo<I>>,
    M: Service<Peer<A, H::Info>, Response = S>,
    M::Error: Into<BoxError>,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let lane = Arc::new(Lane::of(&io));
    let cut = Reached::new(Arc::clone(&lane.shutdown), Phase::Cut);
    let served = serve(io, remote, local, handshake, make, http, lane);
    let until = Until {
        told: Told::new(cut),
        served,
    };
    match until.await {
        Some(Ok(())) => {}
        Some(Err(error)) => debug!(error = %Chain(&*error), "a connection failed"),
        None => debug!("a connection was cut off"),
    }
}

async fn serve<I, A, H, M, S, B>(
    io: DrainIo<I>,
    remote: A,
    local: Option<A>,
    handshake: H,
    mut make: M,
    http: Arc<Http>,
    lane: Arc<Lane>,
) -> Result<(), BoxError>
where
    I: Socket,
    H: Handshake<DrainIo<I>>,
    M: Service<Peer<A, H::Info>, Response = S>,
    M::Error: Into<BoxError>,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let traffic = &lane.record.traffic;
    if H::TAKES_TIME {
        traffic.speak(Protocol::Handshake);
    }
    let (io, info) = handshake.handshake(io).await?;
    if H::TAKES_TIME {
        traffic.shaken();
    }
    let peer = Peer {
        remote,
        local,
        info,
    };
    poll_fn(|cx| make.poll_ready(cx))
        .await
        .map_err(Into::into)?;
    let service = make.call(peer).await.map_err(Into::into)?;

    let mut io = Rewind::new(io);
    let version = match io.version().await {
        Ok(version) => version,
        Err(error) => {
            io.shutdown().await?;
            return Err(error.into());
        }
    };
    let service = OnConnection::new(service, Arc::clone(&lane));
    match version {
        Version::Neither => io.shutdown().await?,
        Version::Http1 => {
            let io = TokioIo::new(io);
            let served = http.http1.serve_connection(io, service).with_upgrades();
            let mut served = pin!(served);
            poll_fn(|cx| {
                let polled = served.as_mut().poll(cx);
                let over = polled.is_pending()
                    && lane.shutdown.phase() >= Phase::Closing
                    && !traffic.is_busy();
                match over {
                    // hyper does not read on after a request: it has, and
                    // would be woken. What it reads now may be the end.
                    true => served.as_mut().poll(cx),
                    false => polled,
                }
            })
            .await?;
        }
        Version::Http2 => {
            traffic.speak(Protocol::Http2);
            let io = TokioIo::new(io);
            let mut served = pin!(http.http2.serve_connection(io, service));
            let mut told = false;
            poll_fn(|cx| {
                loop {
                    let busy = traffic.is_busy();
                    let polled = served.as_mut().poll(cx);
                    if polled.is_pending() && busy && !traffic.is_busy() {
                        // The last of an answer was written after the read,
                        // which has to know that it is idle now.
                        continue;
                    }
                    if polled.is_ready() || told || !traffic.is_leaving() {
                        return polled;
                    }
                    // Two GOAWAYs: between them streams are taken still.
                    told = true;
                    served.as_mut().graceful_shutdown();
                }
            })
            .await?;
        }
    }
    Ok(())
}

pin_project! {
    /// A connection until the cut. Whatever it is at is dropped then: reading
    /// would fail, but it may not be reading.
    struct Until<F> {
        #[pin]
        told: Told,
        #[pin]
        served: F,
    }
}

impl<F: Future> Future for Until<F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(output) = this.served.poll(cx) {
            return Poll::Ready(Some(output));
        }
        this.told.poll(cx).map(|()| None)
    }
}

/// The same service for every connection.
#[derive(Clone, Debug)]
pub(super) struct Same<S>(pub(super) S);

impl<S: Clone, T> Service<T> for Same<S> {
    type Response = S;
    type Error = Infallible;
    type Future = Ready<Result<S, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: T) -> Self::Future {
        ready(Ok(self.0.clone()))
    }
}

/// An error and what caused it.
struct Chain<'a>(&'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
