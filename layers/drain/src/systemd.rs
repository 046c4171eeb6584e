//! What systemd, and whoever speaks like it, hands over and wants to know.
//!
//! # Sockets
//!
//! With socket activation the listening socket is systemd's: it stays open
//! while one process stops and the next one starts, and who connects meanwhile
//! waits in its backlog. So it is with any parent that hands its sockets down
//! (`systemfd`, a supervisor of one's own): by `LISTEN_FDS`, the number of
//! descriptors from 3 on, `LISTEN_PID`, if there is one the process that they
//! are for, and `LISTEN_FDNAMES`, their names.
//!
//! ```no_run
//! use buttress_drain::{Server, Shutdown, systemd};
//! use tokio::net::TcpListener;
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     // Before there are threads: it changes the environment.
//!     let sockets = systemd::Sockets::from_env();
//!     tokio::runtime::Runtime::new()?.block_on(serve(sockets))
//! }
//!
//! async fn serve(mut sockets: systemd::Sockets) -> Result<(), Box<dyn std::error::Error>> {
//!     let shutdown = Shutdown::builder().build()?;
//!     let listener = match sockets.take_tcp("http")? {
//!         Some(listener) => listener,
//!         None => TcpListener::bind("127.0.0.1:8080").await?,
//!     };
//! #   let app = tower::service_fn(|_: http::Request<hyper::body::Incoming>| async {
//! #       Ok::<_, std::convert::Infallible>(http::Response::new(String::new()))
//! #   });
//!     tokio::spawn(Server::new(&shutdown).serve(listener, app));
//!     tokio::spawn(systemd::announce(&shutdown)?);
//!     shutdown.run().await.exit()
//! }
//! ```
//!
//! ```text
//! # app.socket                # app.service
//! [Socket]                    [Service]
//! ListenStream=8080           Type=notify
//! FileDescriptorName=http     ExecStart=/usr/bin/app
//!                             TimeoutStopSec=35
//! ```
//!
//! The listener that a drain drops is this process's descriptor only: the
//! socket goes on listening for the next one.

use std::{env, fmt, future::Future, io, process, time::Duration};

use buttress_core::clock;
use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::net::{TcpListener, UnixListener};
use tracing::warn;

use crate::{Phase, Shutdown};

/// What the end of a shutdown may be late by: its own last resort ends the
/// process half a second after its time is up.
const SPARE: Duration = Duration::from_secs(1);

/// The listening sockets that were handed over. Each can be taken once.
pub struct Sockets {
    fds: ListenFd,
    names: Vec<String>,
}

impl Sockets {
    /// Those of the environment, none if it has none, or not for this process.
    ///
    /// `LISTEN_FDS` and `LISTEN_PID` are removed, so that no child takes them
    /// for its own: call it once, before other threads are started, since
    /// foreign code in them may read the environment.
    #[must_use]
    pub fn from_env() -> Self {
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        Self {
            fds: ListenFd::from_env(),
            names: names.split(':').map(Into::into).collect(),
        }
    }

    /// How many there were.
    #[must_use]
    pub fn len(&self) -> usize {
        self.fds.len()
    }

    /// Whether there were none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their names, in order. Without `LISTEN_FDNAMES` they have none.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names
            .iter()
            .map(String::as_str)
            .filter(|name| !name.is_empty())
            .take(self.len())
    }

    /// The TCP socket of this name; the first one, if they have no names.
    /// `None` if there is none, or it was taken.
    ///
    /// # Errors
    ///
    /// If it is no TCP socket.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with IO.
    pub fn take_tcp(&mut self, name: &str) -> io::Result<Option<TcpListener>> {
        match self.index(name) {
            Some(index) => self.take_tcp_at(index),
            None => Ok(None),
        }
    }

    /// The TCP socket at this place, counted from 0.
    ///
    /// # Errors
    ///
    /// If it is no TCP socket.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with IO.
    pub fn take_tcp_at(&mut self, index: usize) -> io::Result<Option<TcpListener>> {
        let Some(listener) = self.fds.take_tcp_listener(index)? else {
            return Ok(None);
        };
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener).map(Some)
    }

    /// The Unix socket of this name; the first one, if they have no names.
    /// `None` if there is none, or it was taken.
    ///
    /// # Errors
    ///
    /// If it is no Unix stream socket.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with IO.
    pub fn take_unix(&mut self, name: &str) -> io::Result<Option<UnixListener>> {
        match self.index(name) {
            Some(index) => self.take_unix_at(index),
            None => Ok(None),
        }
    }

    /// The Unix socket at this place, counted from 0.
    ///
    /// # Errors
    ///
    /// If it is no Unix stream socket.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with IO.
    pub fn take_unix_at(&mut self, index: usize) -> io::Result<Option<UnixListener>> {
        let Some(listener) = self.fds.take_unix_listener(index)? else {
            return Ok(None);
        };
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener).map(Some)
    }

    fn index(&self, name: &str) -> Option<usize> {
        if self.names().next().is_none() {
            return Some(0);
        }
        self.names.iter().position(|known| known == name)
    }
}

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sockets")
            .field("len", &self.len())
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

/// Tells the service manager that this process is ready (`READY=1`, and
/// `MAINPID`, so that it may be a child of the one that was started); the
/// future then waits for the shutdown and tells of that (`STOPPING=1`), with
/// the time that it may take (`EXTEND_TIMEOUT_USEC`). Call it once the
/// listeners are bound, and spawn the future.
///
/// Without a service manager (`NOTIFY_SOCKET` is not set) nothing is told.
///
/// # Errors
///
/// Why the readiness could not be told. What goes wrong later is logged.
pub fn announce(
    shutdown: &Shutdown,
) -> io::Result<impl Future<Output = ()> + Send + 'static + use<>> {
    sd_notify::notify(&[NotifyState::Ready, NotifyState::MainPid(process::id())])?;
    let shutdown = shutdown.clone();
    Ok(async move {
        shutdown.reached(Phase::Draining).await;
        let Some(schedule) = shutdown.schedule() else {
            return;
        };
        let left = schedule.end() - clock::now() + SPARE;
        let extend = format!("EXTEND_TIMEOUT_USEC={}", left.as_micros());
        let status = format!("STATUS=shutting down: {}", line(schedule.reason()));
        let told = sd_notify::notify(&[
            NotifyState::Stopping,
            NotifyState::Custom(&extend),
            NotifyState::Custom(&status),
        ]);
        if let Err(error) = told {
            warn!(%error, "the service manager cannot be told of the shutdown");
        }
    })
}

/// A line of its protocol ends at the end of the line.
fn line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sockets(names: &str) -> Sockets {
        Sockets {
            fds: ListenFd::empty(),
            names: names.split(':').map(Into::into).collect(),
        }
    }

    #[tokio::test]
    async fn none_were_handed_over() {
        let mut none = sockets("");
        assert!(none.is_empty());
        assert_eq!(none.names().count(), 0);
        assert!(none.take_tcp("http").unwrap().is_none());
        assert!(none.take_unix_at(0).unwrap().is_none());
    }

    #[test]
    fn the_first_is_meant_where_there_are_no_names() {
        assert_eq!(sockets("").index("http"), Some(0));
    }

    #[test]
    fn a_line_is_a_line() {
        assert_eq!(line("SIGTERM\nMAINPID=1"), "SIGTERM");
        assert_eq!(line(""), "");
    }
}
