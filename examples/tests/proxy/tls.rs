//! Clients that come by TLS.

use std::{path::PathBuf, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::CertificateDer},
};

use crate::support::{Proxy, Raw, Upstream, file, get, run, seen, soon, to};

/// A certificate, and the files of it and of its key.
struct Identity {
    certificate: CertificateDer<'static>,
    cert: PathBuf,
    key: PathBuf,
}

impl Identity {
    fn new() -> Self {
        let names = vec!["proxy.example".to_owned()];
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names).unwrap();
        Self {
            certificate: cert.der().clone(),
            cert: file(&cert.pem()),
            key: file(&signing_key.serialize_pem()),
        }
    }

    fn settings(&self) -> String {
        let (cert, key) = (self.cert.display(), self.key.display());
        format!("tls: {{ cert: '{cert}', key: '{key}' }}\n")
    }

    /// A connection that offers these protocols.
    async fn connect(&self, proxy: &Proxy, offered: &[&str]) -> TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = offered.iter().map(|name| name.as_bytes().into()).collect();
        let stream = TcpStream::connect(proxy.listen).await.unwrap();
        let name = "proxy.example".try_into().unwrap();
        let connecting = TlsConnector::from(Arc::new(config)).connect(name, stream);
        soon("the handshake", connecting).await.unwrap()
    }
}

#[tokio::test]
async fn both_protocols_are_spoken_by_what_is_agreed_on() {
    let (identity, upstream) = (Identity::new(), Upstream::mirror().await);
    let proxy = Proxy::start(&(identity.settings() + &to(upstream.address))).await;
    for (offered, agreed) in [
        (&["h2", "http/1.1"][..], Some("h2")),
        (&["http/1.1"], Some("http/1.1")),
        (&[], None),
    ] {
        let stream = identity.connect(&proxy, offered).await;
        let alpn = stream.get_ref().1.alpn_protocol();
        assert_eq!(alpn, agreed.map(str::as_bytes));
        let io = TokioIo::new(stream);
        let response = if agreed == Some("h2") {
            let executor = TokioExecutor::new();
            let (mut sender, connection) = http2::handshake(executor, io).await.unwrap();
            tokio::spawn(connection);
            let request = http::Request::get("https://proxy.example/");
            let request = request.body(Full::<bytes::Bytes>::default()).unwrap();
            soon("an answer", sender.send_request(request)).await
        } else {
            let (mut sender, connection) = http1::handshake(io).await.unwrap();
            tokio::spawn(connection);
            soon("an answer", sender.send_request(get("/"))).await
        };
        let (head, body) = response.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let response = http::Response::from_parts(head, body);
        assert_eq!(response.status(), 200);
        assert_eq!(seen(&response, "x-forwarded-proto"), ["https"]);
    }
    // Who speaks in the clear is not answered in the clear.
    let mut raw = Raw::connect(proxy.listen).await;
    raw.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(!raw.rest().await.contains("HTTP"));
}

#[tokio::test]
async fn it_stops_as_it_does_in_the_clear() {
    let (identity, upstream) = (Identity::new(), Upstream::mirror().await);
    let mut proxy = Proxy::start(&format!(
        "shutdown: {{ drain_delay: 300ms, timeout: 3s, hook_reserve: 1s }}\n{}{}",
        identity.settings(),
        to(upstream.address)
    ))
    .await;
    // One that is idle after a request, one before any, one that never begins
    // its handshake.
    let stream = identity.connect(&proxy, &["http/1.1"]).await;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let answer = soon("an answer", sender.send_request(get("/"))).await;
    answer.unwrap().collect().await.unwrap();
    let mut unused = identity.connect(&proxy, &["http/1.1"]).await;
    let mut silent = TcpStream::connect(proxy.listen).await.unwrap();

    let start = Instant::now();
    proxy.signal("TERM");
    // Closed by the rules of TLS: an end without a farewell would be an error.
    soon("the end", connection).await.unwrap().unwrap();
    let mut rest = Vec::new();
    let end = timeout(Duration::from_secs(5), unused.read_to_end(&mut rest)).await;
    assert_eq!(end.unwrap().unwrap(), 0);
    let end = timeout(Duration::from_secs(5), silent.read_to_end(&mut rest)).await;
    assert_eq!(end.unwrap().unwrap(), 0);
    assert_eq!(proxy.exit().await.code(), Some(0));
    let took = start.elapsed().as_millis();
    assert!((280..2500).contains(&took), "{took} ms");
}

#[test]
fn what_is_no_certificate_and_its_key_is_named() {
    let (identity, other) = (Identity::new(), Identity::new());
    let nothing = file("nothing\n");
    for (cert, key, path, expected) in [
        (&nothing, &identity.key, "tls.cert", "certificates in PEM"),
        (
            &identity.key,
            &identity.key,
            "tls.cert",
            "certificates in PEM",
        ),
        (&identity.cert, &nothing, "tls.key", "a private key in PEM"),
        (
            &identity.cert,
            &identity.cert,
            "tls.key",
            "a private key in PEM",
        ),
        (
            &identity.cert,
            &other.key,
            "tls",
            "a certificate and its key",
        ),
    ] {
        let settings = Identity {
            cert: cert.clone(),
            key: key.clone(),
            ..Identity::new()
        };
        let file = file(&(settings.settings() + &to(([127, 0, 0, 1], 1).into())));
        let file = file.to_str().unwrap();
        let output = run(&["--config", file], &[]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(
            error.starts_with(&format!("{file}: {path}: ")) && error.contains(expected),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let text = identity.settings() + &to(([127, 0, 0, 1], 1).into());
    let output = run(&["--config", file(&text).to_str().unwrap(), "--check"], &[]);
    let shown = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(shown.contains(identity.key.to_str().unwrap()), "{shown}");
    assert!(!shown.contains("PRIVATE"), "{shown}");
}
