//! A client of HTTP/1 that sees every byte.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use crate::soon;

pub(crate) struct Client<I = TcpStream> {
    pub(crate) io: BufReader<I>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        let found = headers.find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn closes(&self) -> bool {
        self.header("connection") == Some("close")
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

impl Client {
    pub(crate) async fn new(addr: SocketAddr) -> Self {
        Self::over(soon(TcpStream::connect(addr)).await.unwrap())
    }
}

pub(crate) fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n")
}

impl<I: AsyncRead + AsyncWrite + Unpin> Client<I> {
    pub(crate) fn over(io: I) -> Self {
        Self {
            io: BufReader::new(io),
        }
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.io.get_mut().write_all(bytes.as_ref()).await?;
        self.io.get_mut().flush().await
    }

    pub(crate) async fn get(&mut self, path: &str) -> Answer {
        self.send(get(path)).await.unwrap();
        self.answer().await
    }

    pub(crate) async fn answer(&mut self) -> Answer {
        let answer = self.try_answer("GET").await.unwrap();
        answer.expect("it was closed without an answer")
    }

    pub(crate) async fn head(&mut self) -> io::Result<Option<(u16, Vec<(String, String)>)>> {
        let mut line = String::new();
        if soon(self.io.read_line(&mut line)).await? == 0 {
            return Ok(None);
        }
        let status = line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            soon(self.io.read_line(&mut line)).await?;
            match line.trim_end().split_once(": ") {
                Some((name, value)) => headers.push((name.to_owned(), value.to_owned())),
                None => break,
            }
        }
        Ok(Some((status.ok_or(io::ErrorKind::InvalidData)?, headers)))
    }

    /// `None` if it was closed before the first byte of it.
    pub(crate) async fn try_answer(&mut self, method: &str) -> io::Result<Option<Answer>> {
        let Some((status, headers)) = self.head().await? else {
            return Ok(None);
        };
        let mut answer = Answer {
            status,
            headers,
            body: Vec::new(),
        };
        if method == "HEAD" || matches!(status, 204 | 304) {
            return Ok(Some(answer));
        }
        if let Some(length) = answer.header("content-length") {
            let length = length.parse().unwrap();
            answer.body = vec![0; length];
            soon(self.io.read_exact(&mut answer.body)).await?;
        } else if answer.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = self.chunk().await? {
                answer.body.extend(chunk);
            }
        } else {
            soon(self.io.read_to_end(&mut answer.body)).await?;
        }
        Ok(Some(answer))
    }

    /// `None` at the last.
    pub(crate) async fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut line = String::new();
        soon(self.io.read_line(&mut line)).await?;
        let size = usize::from_str_radix(line.trim_end(), 16);
        let size = size.map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let mut chunk = vec![0; size + 2];
        soon(self.io.read_exact(&mut chunk)).await?;
        chunk.truncate(size);
        Ok((size > 0).then_some(chunk))
    }

    /// Whether it is closed properly, with nothing more.
    pub(crate) async fn is_closed(&mut self) -> io::Result<bool> {
        let mut byte = [0];
        Ok(soon(self.io.read(&mut byte)).await? == 0)
    }
}
