//! A stream to a server: TCP, TLS or a Unix socket.
//!
//! Ours and not the client library's, to be told at once when a connection
//! ends, and to bring our own certificates and cryptography.

use std::{io, pin::Pin};

use redis::{ConnectionAddr, ConnectionInfo, RedisConnectionInfo, RedisResult};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

#[cfg(feature = "tls")]
use crate::config::Certificates;

/// What a connection stands on.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Sync {}

impl<S: AsyncRead + AsyncWrite + Send + Sync> Stream for S {}

/// A server, and how to reach it.
#[derive(Clone)]
pub(crate) struct Server {
    address: ConnectionAddr,
    pub(crate) settings: RedisConnectionInfo,
    #[cfg(feature = "tls")]
    tls: tokio_rustls::TlsConnector,
}

impl Server {
    pub(crate) fn new(
        info: &ConnectionInfo,
        #[cfg(feature = "tls")] tls: &tokio_rustls::TlsConnector,
    ) -> Self {
        Self {
            address: info.addr().clone(),
            settings: info.redis_settings().clone(),
            #[cfg(feature = "tls")]
            tls: tls.clone(),
        }
    }

    /// Another one of the same kind, at `host:port`.
    pub(crate) fn at(&self, address: &str) -> Option<Self> {
        let (host, port) = host_and_port(address)?;
        let mut server = self.clone();
        match &mut server.address {
            ConnectionAddr::Tcp(its_host, its_port)
            | ConnectionAddr::TcpTls {
                host: its_host,
                port: its_port,
                ..
            } => {
                host.clone_into(its_host);
                *its_port = port;
            }
            _ => return None,
        }
        Some(server)
    }

    pub(crate) async fn stream(&self) -> RedisResult<Pin<Box<dyn Stream>>> {
        Ok(match &self.address {
            ConnectionAddr::Tcp(host, port) => Box::pin(tcp(host, *port).await?),
            #[cfg(unix)]
            ConnectionAddr::Unix(path) => Box::pin(tokio::net::UnixStream::connect(path).await?),
            #[cfg(feature = "tls")]
            ConnectionAddr::TcpTls { host, port, .. } => {
                let name = tokio_rustls::rustls::pki_types::ServerName::try_from(host.clone())
                    .map_err(io::Error::other)?;
                let stream = tcp(host, *port).await?;
                Box::pin(self.tls.connect(name, stream).await?)
            }
            // The configuration has been checked.
            _ => return Err(io::Error::from(io::ErrorKind::Unsupported).into()),
        })
    }
}

/// What a node of a cluster is said to be at; `None` without a host, which is
/// that of the node that said it.
pub(crate) fn host_and_port(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let is_named = !matches!(host, "" | "?" | "0.0.0.0" | "::");
    is_named.then_some((host, port.parse().ok()?))
}

async fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    // As in the configuration: nothing waits for the answer to what was before.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What all connections with TLS share.
///
/// # Errors
///
/// Certificates that make no sense.
#[cfg(feature = "tls")]
pub(crate) fn tls(
    certificates: &Certificates,
) -> Result<tokio_rustls::TlsConnector, Box<dyn std::error::Error + Send + Sync>> {
    use std::sync::Arc;

    use tokio_rustls::rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    };

    let mut roots = RootCertStore::empty();
    if let Some(pem) = &certificates.roots {
        for certificate in CertificateDer::pem_slice_iter(pem) {
            roots.add(certificate.map_err(unreadable)?)?;
        }
        if roots.is_empty() {
            return Err("no certificate is in the PEM".into());
        }
    } else {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    // Named, because a program may have none that stands for all, or two.
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let config = if let Some((chain, key)) = &certificates.own {
        let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<_, _>>();
        let key = PrivateKeyDer::from_pem_slice(key).map_err(unreadable)?;
        config.with_client_auth_cert(chain.map_err(unreadable)?, key)?
    } else {
        config.with_no_client_auth()
    };
    Ok(Arc::new(config).into())
}

/// What is wrong with a PEM is not told in its own words: they hold the line it
/// is in, which is the whole key where it has lost its line breaks.
#[cfg(feature = "tls")]
fn unreadable(_: tokio_rustls::rustls::pki_types::pem::Error) -> &'static str {
    "the PEM cannot be read, or holds no such thing"
}
