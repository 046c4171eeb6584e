//! The server, its connections and the adapters, on real sockets of the
//! loopback interface.

mod adapters;
mod app;
mod bodies;
mod client;
mod drain;
mod grpc;
mod http2;
mod limits;
mod listeners;
mod races;
mod stacks;
mod talk;
mod tls;
mod tunnels;
mod unread;
mod unsent;

use std::{future::Future, net::SocketAddr, time::Duration};

use buttress_core::clock::{self, Instant};
use buttress_drain::{Limits, LimitsBuilder, Report, Server, Shutdown};
use http::{Request, Response};
use hyper::body::Incoming;
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tower::Service;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Nothing here takes so long.
async fn soon<F: Future>(future: F) -> F::Output {
    timeout(Duration::from_secs(20), future)
        .await
        .expect("it takes too long")
}

/// A delay of 200 ms, 2 s in all, of which 500 ms are the hooks'.
fn shutdown() -> Shutdown {
    shutdown_of(200, 2000, 500)
}

fn shutdown_of(delay: u64, timeout: u64, reserve: u64) -> Shutdown {
    Shutdown::builder()
        .drain_delay(ms(delay))
        .timeout(ms(timeout))
        .hook_reserve(ms(reserve))
        .build()
        .unwrap()
}

/// Of which little is seen in tests that are about something else.
fn limits() -> LimitsBuilder {
    Limits::builder().linger(ms(100)).first_byte_grace(ms(300))
}

/// A server and the driver of its shutdown.
struct Rig {
    shutdown: Shutdown,
    addr: SocketAddr,
    server: JoinHandle<()>,
    driver: JoinHandle<Report>,
}

impl Rig {
    async fn new() -> Self {
        Self::of(shutdown(), limits(), app::app()).await
    }

    async fn of<S, B>(shutdown: Shutdown, limits: LimitsBuilder, service: S) -> Self
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<buttress_core::BoxError>,
        B: http_body::Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<buttress_core::BoxError>,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let server = Server::new(&shutdown).limits(limits.build().unwrap());
        let server = server.serve(listener, service);
        Self::with(shutdown, addr, server)
    }

    fn with(
        shutdown: Shutdown,
        addr: SocketAddr,
        server: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let driver = shutdown.clone();
        Self {
            shutdown,
            addr,
            server: tokio::spawn(server),
            driver: tokio::spawn(async move { driver.run().await }),
        }
    }

    fn trigger(&self) -> Instant {
        assert!(self.shutdown.trigger("a test"));
        clock::now()
    }

    /// The report, once the server has come to its end, too.
    async fn ended(self) -> Report {
        let report = soon(self.driver).await.unwrap();
        soon(self.server).await.unwrap();
        report
    }
}

/// Until it is so.
async fn until(so: impl Fn() -> bool) {
    soon(async {
        while !so() {
            tokio::time::sleep(ms(1)).await;
        }
    })
    .await;
}
