//! TLS: the certificate and its key, read with the settings that name them.

use std::{fmt, fs, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer};
use tokio_rustls::rustls::{
    Error, ServerConfig,
    crypto::ring,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
};

use super::scalar::from_scalar;

/// What clients are shown.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section of keys")]
pub(crate) struct Tls {
    pub(super) cert: Certificates,
    pub(super) key: Key,
}

impl Tls {
    /// For a server: TLS 1.2 and 1.3.
    ///
    /// # Errors
    ///
    /// If the key is not the certificate's, or of a kind that is not known.
    pub(crate) fn config(&self) -> Result<Arc<ServerConfig>, Error> {
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(self.cert.chain.to_vec(), self.key.key.clone_key())?;
        Ok(Arc::new(config))
    }
}

from_scalar!(Certificates, Key);

/// A file of certificates, the server's own first.
#[derive(Clone)]
pub(super) struct Certificates {
    path: String,
    chain: Arc<[CertificateDer<'static>]>,
}

impl FromStr for Certificates {
    type Err = String;

    fn from_str(path: &str) -> Result<Self, String> {
        let wrong =
            |error: pem::Error| format!("expected certificates in PEM in {path}, but {error}");
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
        let chain = chain.map_err(wrong)?;
        if chain.is_empty() {
            return Err(wrong(pem::Error::NoItemsFound));
        }
        Ok(Self {
            path: path.to_owned(),
            chain: chain.into(),
        })
    }
}

/// A file with a private key.
#[derive(Clone)]
pub(super) struct Key {
    path: String,
    key: Arc<PrivateKeyDer<'static>>,
}

impl FromStr for Key {
    type Err = String;

    fn from_str(path: &str) -> Result<Self, String> {
        let key = PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| {
            // Other errors repeat what they stumble over: it may be the key.
            let what = match error {
                pem::Error::NoItemsFound => "there is none",
                _ => "it cannot be read",
            };
            format!("expected a private key in PEM in {path}, but {what}")
        })?;
        Ok(Self {
            path: path.to_owned(),
            key: Arc::new(key),
        })
    }
}

fn read(path: &str) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("the file {path} cannot be read: {error}"))
}

impl fmt::Display for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}
