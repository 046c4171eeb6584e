//! What is agreed on before HTTP: nothing, or TLS.

use std::{future::Future, io};

use tokio::io::{AsyncRead, AsyncWrite};

/// What a connection goes through before HTTP is spoken on it; on a task of its
/// own, so that a slow one keeps nobody else waiting. Dropped when it takes
/// longer than the [limit](crate::LimitsBuilder::handshake_timeout).
pub trait Handshake<I>: Clone + Send + Sync + 'static {
    /// The connection after it. It must hand `poll_shutdown` on to the one
    /// before it, and read no more of that than it is asked for.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// What is known of the other end by then.
    type Info: Send + 'static;

    /// Whether the other end has a part in it.
    const TAKES_TIME: bool = true;

    /// Goes through it.
    fn handshake(&self, io: I) -> impl Future<Output = io::Result<(Self::Io, Self::Info)>> + Send;
}

/// No handshake.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

impl<I> Handshake<I> for Plain
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Io = I;
    type Info = ();

    const TAKES_TIME: bool = false;

    async fn handshake(&self, io: I) -> io::Result<(I, ())> {
        Ok((io, ()))
    }
}

#[cfg(feature = "tls")]
mod tls {
    use std::{fmt, io, sync::Arc};

    use tokio::io::{AsyncRead, AsyncWrite};
    use tokio_rustls::{
        TlsAcceptor,
        rustls::{ServerConfig, pki_types::CertificateDer},
        server::TlsStream,
    };

    use super::Handshake;

    /// TLS by rustls.
    #[derive(Clone)]
    pub struct Tls {
        acceptor: TlsAcceptor,
    }

    impl Tls {
        /// Where the configuration offers no protocols by ALPN, HTTP/2 and
        /// HTTP/1.1 are offered.
        #[must_use]
        pub fn new(mut config: Arc<ServerConfig>) -> Self {
            if config.alpn_protocols.is_empty() {
                let offered = [&b"h2"[..], b"http/1.1"];
                Arc::make_mut(&mut config).alpn_protocols = offered.map(Into::into).into();
            }
            Self {
                acceptor: config.into(),
            }
        }
    }

    impl fmt::Debug for Tls {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("Tls").finish_non_exhaustive()
        }
    }

    /// What a TLS handshake told of the other end.
    #[derive(Clone, Debug, Default)]
    #[non_exhaustive]
    pub struct TlsInfo {
        /// The name it asked for.
        pub server_name: Option<String>,
        /// The protocol that was agreed on by ALPN.
        pub alpn: Option<Vec<u8>>,
        /// The certificates it showed, its own first; checked as the
        /// configuration says. None unless that asks for them.
        pub certificates: Vec<CertificateDer<'static>>,
    }

    impl<I> Handshake<I> for Tls
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        type Io = TlsStream<I>;
        type Info = TlsInfo;

        async fn handshake(&self, io: I) -> io::Result<(TlsStream<I>, TlsInfo)> {
            let stream = self.acceptor.accept(io).await?;
            let (_, session) = stream.get_ref();
            let certificates = session.peer_certificates().unwrap_or_default();
            let info = TlsInfo {
                server_name: session.server_name().map(ToOwned::to_owned),
                alpn: session.alpn_protocol().map(ToOwned::to_owned),
                certificates: certificates
                    .iter()
                    .map(|c| c.clone().into_owned())
                    .collect(),
            };
            Ok((stream, info))
        }
    }
}

#[cfg(feature = "tls")]
pub use tls::{Tls, TlsInfo};
