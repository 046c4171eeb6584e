//! Whom TLS trusts, with ring for its cryptography.

#[cfg(feature = "native-roots")]
use std::io;
use std::sync::Arc;

use hyper_rustls::ConfigBuilderExt as _;
use tokio_rustls::rustls::{
    ClientConfig, ConfigBuilder, WantsVerifier, client::WantsClientCert, crypto::ring,
};

/// Trusts the authorities that Mozilla trusts, as they were when the crate
/// `webpki-roots` was built.
#[cfg(feature = "webpki-roots")]
#[must_use]
pub fn webpki_roots() -> ClientConfig {
    finish(builder().with_webpki_roots())
}

/// Trusts the authorities that the system trusts, as they are now: reads
/// files, so call it once.
///
/// # Errors
///
/// If the system's authorities cannot be read, or there are none.
#[cfg(feature = "native-roots")]
pub fn native_roots() -> io::Result<ClientConfig> {
    Ok(finish(builder().with_native_roots()?))
}

fn builder() -> ConfigBuilder<ClientConfig, WantsVerifier> {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has suites for TLS 1.2 and 1.3")
}

fn finish(builder: ConfigBuilder<ClientConfig, WantsClientCert>) -> ClientConfig {
    builder.with_no_client_auth()
}
