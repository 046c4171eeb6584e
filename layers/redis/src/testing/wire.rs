//! The network in between.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use buttress_core::sync::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};

use super::{Server, server::patient};
use crate::{Config, Redis};

/// A stretch of network in front of a server, on a loopback port of its own:
/// slow, stuck or cut, as it is told. Dropping it cuts all connections.
///
/// It runs in the tokio runtime in which it was made.
pub struct Wire {
    port: u16,
    url: String,
    state: watch::Sender<State>,
    /// How many bytes of answers pass before all is cut.
    budget: Arc<Mutex<Option<usize>>>,
    task: AbortHandle,
}

#[derive(Clone, Copy, Default)]
struct State {
    delay: Duration,
    stuck: bool,
    closed: bool,
    cuts: u64,
}

impl Wire {
    /// A wire to this server that does nothing yet but carry.
    ///
    /// # Panics
    ///
    /// There is no port for it.
    pub async fn to(server: &Server) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await;
        let listener = listener.expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let state = watch::Sender::<State>::default();
        let budget = Arc::default();
        let end = Far {
            address: ([127, 0, 0, 1], server.port()).into(),
            state: state.clone(),
            budget: Arc::clone(&budget),
        };
        Self {
            port,
            url: server.url_at(port),
            state,
            budget,
            task: tokio::spawn(end.serve(listener)).abort_handle(),
        }
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The server's URL by way of this wire.
    #[must_use]
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// A handle on the server by way of this wire, with time limits that a busy
    /// machine keeps.
    #[must_use]
    pub fn redis(&self) -> Redis {
        patient(Config::new(self.url()))
    }

    /// Every answer comes this much later from now on; their order and number
    /// stay.
    pub fn delay(&self, delay: Duration) {
        self.state.send_modify(|state| state.delay = delay);
    }

    /// Nothing passes any more, in either direction, and nobody is told: what a
    /// firewall does that drops packets. New connections are taken, and as mute.
    pub fn stall(&self) {
        self.state.send_modify(|state| state.stuck = true);
    }

    /// Lets through what [`stall`](Self::stall) has held back, and all else.
    pub fn flow(&self) {
        self.state.send_modify(|state| state.stuck = false);
    }

    /// Cuts all connections now. New ones are as good as ever.
    pub fn cut(&self) {
        self.state.send_modify(|state| state.cuts += 1);
    }

    /// Cuts all connections once so many more bytes of answers have passed:
    /// in the middle of one, that is.
    pub fn cut_after(&self, bytes: usize) {
        *self.budget.lock() = Some(bytes);
    }

    /// Cuts all connections, and each new one at once.
    pub fn close(&self) {
        self.state.send_modify(|state| {
            state.closed = true;
            state.cuts += 1;
        });
    }

    /// Takes connections again after [`close`](Self::close).
    pub fn open(&self) {
        self.state.send_modify(|state| state.closed = false);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // The connections are the task's, and go with it.
        self.task.abort();
    }
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wire")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

/// What a connection needs to know.
#[derive(Clone)]
struct Far {
    address: SocketAddr,
    state: watch::Sender<State>,
    budget: Arc<Mutex<Option<usize>>>,
}

impl Far {
    async fn serve(self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        while let Ok((near, _)) = listener.accept().await {
            while connections.try_join_next().is_some() {}
            if !self.state.borrow().closed {
                connections.spawn(self.clone().carry(near));
            }
        }
    }

    async fn carry(self, near: TcpStream) {
        let mut state = self.state.subscribe();
        let before = state.borrow_and_update().cuts;
        let cut = async {
            // The sender is ours: it does not end.
            let _ = state.wait_for(|now| now.cuts != before).await;
        };
        let carried = async {
            let far = TcpStream::connect(self.address).await?;
            let _ = near.set_nodelay(true);
            let _ = far.set_nodelay(true);
            let (near_in, near_out) = near.into_split();
            let (far_in, far_out) = far.into_split();
            // One end that closes closes both.
            futures_util::future::select(
                std::pin::pin!(self.pass(near_in, far_out, false)),
                std::pin::pin!(self.pass(far_in, near_out, true)),
            )
            .await;
            std::io::Result::Ok(())
        };
        futures_util::future::select(std::pin::pin!(cut), std::pin::pin!(carried)).await;
    }

    /// Reads on while it waits, so that a delay does not make it narrow.
    async fn pass(
        &self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
        answers: bool,
    ) {
        let (sender, mut chunks) = mpsc::channel::<(Instant, Vec<u8>)>(1024);
        let read = async {
            let mut buffer = vec![0; 16 * 1024];
            while let Ok(count @ 1..) = from.read(&mut buffer).await {
                let now = self.state.borrow().delay;
                let delay = if answers { now } else { Duration::ZERO };
                let chunk = (Instant::now() + delay, buffer[..count].to_vec());
                if sender.send(chunk).await.is_err() {
                    return;
                }
            }
            drop(sender);
        };
        let mut state = self.state.subscribe();
        let write = async {
            while let Some((due, mut chunk)) = chunks.recv().await {
                sleep_until(due).await;
                let _ = state.wait_for(|now| !now.stuck).await;
                let ends = answers && self.spend(&mut chunk);
                if to.write_all(&chunk).await.is_err() || ends {
                    break;
                }
            }
            if answers {
                let _ = to.shutdown().await;
            }
        };
        // What was read before the end is still written; one that cannot be
        // written to is not read to its end.
        let read = std::pin::pin!(read);
        let write = std::pin::pin!(write);
        if let futures_util::future::Either::Left(((), write)) =
            futures_util::future::select(read, write).await
        {
            write.await;
        }
    }

    /// Takes the chunk from the budget; whether that is at its end.
    fn spend(&self, chunk: &mut Vec<u8>) -> bool {
        let mut budget = self.budget.lock();
        let Some(left) = *budget else { return false };
        if chunk.len() < left {
            *budget = Some(left - chunk.len());
            return false;
        }
        chunk.truncate(left);
        *budget = None;
        drop(budget);
        self.state.send_modify(|state| state.cuts += 1);
        true
    }
}
