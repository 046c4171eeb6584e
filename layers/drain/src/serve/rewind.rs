//! Telling HTTP/1 from HTTP/2 by the first bytes, and giving them back.

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// RFC 9113, section 3.4.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    Http1,
    Http2,
    /// It ended before it began.
    Neither,
}

/// A connection of which the first bytes were looked at.
pub(super) struct Rewind<I> {
    pub(super) io: I,
    bytes: [u8; PREFACE.len()],
    /// Those from `from` to `to` are still to be read.
    from: usize,
    to: usize,
}

impl<I: AsyncRead + Unpin> Rewind<I> {
    pub(super) const fn new(io: I) -> Self {
        Self {
            io,
            bytes: [0; PREFACE.len()],
            from: 0,
            to: 0,
        }
    }

    /// As soon as it can be told, within the time that the connection gives.
    pub(super) async fn version(&mut self) -> io::Result<Version> {
        poll_fn(|cx| self.poll_version(cx)).await
    }

    fn poll_version(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Version>> {
        loop {
            let mut rest = ReadBuf::new(&mut self.bytes[self.to..]);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut rest))?;
            let read = rest.filled().len();
            if read == 0 && self.to == 0 {
                return Poll::Ready(Ok(Version::Neither));
            }
            self.to += read;
            if read == 0 || self.bytes[..self.to] != PREFACE[..self.to] {
                return Poll::Ready(Ok(Version::Http1));
            }
            if self.to == PREFACE.len() {
                return Poll::Ready(Ok(Version::Http2));
            }
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Rewind<I> {
    #[inline]
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.from < this.to {
            let most = (this.to - this.from).min(buf.remaining());
            buf.put_slice(&this.bytes[this.from..this.from + most]);
            this.from += most;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.io).poll_read(cx, buf)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Rewind<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn what_was_looked_at_is_read_again() {
        for (parts, version) in [
            (&["GET / HTTP/1.1"][..], Version::Http1),
            (&["P", "RI * HTTP/1.0"], Version::Http1),
            (&["PRI * HT"], Version::Http1),
            (
                &["PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "more"],
                Version::Http2,
            ),
            (
                &["PRI * HTTP/2.0\r\n\r", "\nSM\r\n\r", "\nmore"],
                Version::Http2,
            ),
            (&[], Version::Neither),
        ] {
            let (mut client, server) = duplex(256);
            let mut server = Rewind::new(server);
            let parts = parts.iter().map(|part| (*part).to_owned());
            let parts: Vec<String> = parts.collect();
            let whole = parts.concat();
            let writer = tokio::spawn(async move {
                for part in parts {
                    client.write_all(part.as_bytes()).await.unwrap();
                    tokio::task::yield_now().await;
                }
            });
            assert_eq!(server.version().await.unwrap(), version, "{whole}");
            let mut first = [0; 3];
            let mut read = String::new();
            if version != Version::Neither {
                server.read_exact(&mut first).await.unwrap();
                read.push_str(std::str::from_utf8(&first).unwrap());
            }
            server.read_to_string(&mut read).await.unwrap();
            assert_eq!(read, whole);
            writer.await.unwrap();
        }
    }
}
