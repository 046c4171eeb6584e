//! What servers listen on: the seam, and sockets behind it.

use std::{
    io,
    mem::MaybeUninit,
    net::SocketAddr,
    task::{Context, Poll, Waker},
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream},
    net::{TcpListener, TcpStream},
};
use tracing::debug;

/// What connections come from: a TCP or Unix socket, or something of one's own.
pub trait Listener: Send + 'static {
    /// A connection.
    type Io: Socket;
    /// Where it comes from.
    type Addr: Send + 'static;

    /// Waits for a connection.
    ///
    /// # Errors
    ///
    /// None of them ends a server: it goes on after a pause, unless the error
    /// was of one connection only (reset, refused or aborted).
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(Self::Io, Self::Addr)>>;

    /// A connection that is there already, `None` if there is none: asked
    /// until then, just before the listener is dropped, since what waits in a
    /// backlog then is reset.
    ///
    /// # Errors
    ///
    /// Those of [`poll_accept`](Self::poll_accept).
    fn accept_now(&mut self) -> io::Result<Option<(Self::Io, Self::Addr)>> {
        let mut cx = Context::from_waker(Waker::noop());
        match self.poll_accept(&mut cx) {
            Poll::Ready(accepted) => accepted.map(Some),
            Poll::Pending => Ok(None),
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// The system's, or that it is not known, the default.
    fn bound_addr(&self) -> io::Result<Self::Addr> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The address of this end of a connection, if it is known.
    fn local_addr(_io: &Self::Io) -> Option<Self::Addr> {
        None
    }
}

/// A connection, as the system knows it.
pub trait Socket: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Whether bytes have arrived that were not read yet. An idle connection
    /// is not closed then: they may be a request. What cannot tell says that
    /// there are none, the default.
    fn has_unread(&self) -> bool {
        false
    }
}

/// Looks at the system's own buffer. That nothing is there to be read by what
/// the runtime has heard of (`try_read`, `poll_peek`) says nothing of what came
/// since.
fn peek(socket: &SockRef<'_>) -> bool {
    let mut byte = [MaybeUninit::uninit()];
    // Nothing at all is the end of the stream.
    socket.peek(&mut byte).is_ok_and(|bytes| bytes > 0)
}

impl Socket for TcpStream {
    fn has_unread(&self) -> bool {
        peek(&SockRef::from(self))
    }
}

/// For tests.
impl Socket for DuplexStream {}

/// `None` if there is nothing, by a system call of its own: the runtime's
/// accept would first have to hear that there is something.
fn accept_now(listener: &SockRef<'_>) -> io::Result<Option<socket2::Socket>> {
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(true)?;
                return Ok(Some(socket));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Its connections have `TCP_NODELAY` set.
impl Listener for TcpListener {
    type Io = TcpStream;
    type Addr = SocketAddr;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        Self::poll_accept(self, cx).map_ok(|(stream, addr)| {
            no_delay(&stream);
            (stream, addr)
        })
    }

    fn accept_now(&mut self) -> io::Result<Option<(TcpStream, SocketAddr)>> {
        let Some(socket) = accept_now(&SockRef::from(&*self))? else {
            return Ok(None);
        };
        let stream = TcpStream::from_std(socket.into())?;
        no_delay(&stream);
        let addr = stream.peer_addr()?;
        Ok(Some((stream, addr)))
    }

    fn bound_addr(&self) -> io::Result<SocketAddr> {
        self.local_addr()
    }

    fn local_addr(io: &TcpStream) -> Option<SocketAddr> {
        io.local_addr().ok()
    }
}

fn no_delay(stream: &TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "TCP_NODELAY cannot be set");
    }
}

#[cfg(unix)]
mod unix {
    use std::{
        io,
        task::{Context, Poll},
    };

    use socket2::SockRef;
    use tokio::net::{UnixListener, UnixStream, unix::SocketAddr};

    use super::{Listener, Socket, accept_now, peek};

    impl Socket for UnixStream {
        fn has_unread(&self) -> bool {
            peek(&SockRef::from(self))
        }
    }

    impl Listener for UnixListener {
        type Io = UnixStream;
        type Addr = SocketAddr;

        fn poll_accept(
            &mut self,
            cx: &mut Context<'_>,
        ) -> Poll<io::Result<(UnixStream, SocketAddr)>> {
            Self::poll_accept(self, cx)
        }

        fn accept_now(&mut self) -> io::Result<Option<(UnixStream, SocketAddr)>> {
            let Some(socket) = accept_now(&SockRef::from(&*self))? else {
                return Ok(None);
            };
            let stream = UnixStream::from_std(socket.into())?;
            let addr = stream.peer_addr()?;
            Ok(Some((stream, addr)))
        }

        fn bound_addr(&self) -> io::Result<SocketAddr> {
            self.local_addr()
        }

        fn local_addr(io: &UnixStream) -> Option<SocketAddr> {
            io.local_addr().ok()
        }
    }
}
