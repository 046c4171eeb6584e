//! TLS, with an authority of our own.

use std::{net::TcpListener, path::Path, time::Duration};

use buttress_redis::{Cmd, Config, ErrorKind, Redis, testing::Server};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

/// An authority, and what it signs.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Not that of what it signs, which would look as if it had done so itself.
        params
            .distinguished_name
            .push(DnType::CommonName, "authority");
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate and its key.
    fn sign(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        (
            params.signed_by(&key, &self.0).unwrap().pem(),
            key.serialize_pem(),
        )
    }
}

async fn server(directory: &Path, authority: &Authority, wants_ours: &str) -> (Server, String) {
    let (certificate, key) = authority.sign("localhost");
    let write = |name: &str, text: &str| {
        let path = directory.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
        .to_string();
    let server = Server::setup()
        .args(["--tls-port", &port, "--tls-auth-clients", wants_ours])
        .args(["--tls-cert-file", &write("server.pem", &certificate)])
        .args(["--tls-key-file", &write("server.key", &key)])
        .args(["--tls-ca-cert-file", &write("ca.pem", &authority.pem())])
        .password("opensesame")
        .start()
        .await;
    (server, format!("rediss://:opensesame@localhost:{port}"))
}

fn config(url: &str) -> Config {
    let second = Duration::from_secs(5);
    Config::new(url).timeout(second).connect_timeout(second)
}

async fn works(config: Config) {
    let redis = Redis::from_config(config).unwrap();
    redis.connect().await.unwrap();
    let mut set = Cmd::new();
    set.arg("SET").arg("k").arg("v").arg("PX").arg(1000);
    redis.run::<()>("test", &set).await.unwrap();
    let mut news = redis.subscribe("news");
    news.next().await;
    redis.dedicated().await.unwrap();
}

#[tokio::test]
async fn a_private_authority_is_trusted_where_it_is_named() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    let (_server, url) = server(directory.path(), &authority, "no").await;
    works(config(&url).root_certificates(authority.pem())).await;

    let stranger = Authority::new();
    for config in [
        config(&url),
        config(&url).root_certificates(stranger.pem()),
        // A name that the certificate does not have.
        config(&url.replace("localhost", "127.0.0.1")).root_certificates(authority.pem()),
    ] {
        let config = config
            .connect_timeout(Duration::from_millis(500))
            .timeout(Duration::from_millis(500));
        let error = Redis::from_config(config)
            .unwrap()
            .connect()
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Connection, "{error:?}");
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.contains("certificate"), "{why}");
    }
}

#[tokio::test]
async fn a_server_may_want_our_certificate() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    let (_server, url) = server(directory.path(), &authority, "yes").await;
    let (certificate, key) = authority.sign("client");
    let ours = config(&url).root_certificates(authority.pem());
    works(ours.clone().client_certificate(certificate.clone(), key)).await;
    let hasty = ours
        .clone()
        .connect_timeout(Duration::from_millis(500))
        .timeout(Duration::from_millis(500));
    let error = Redis::from_config(hasty)
        .unwrap()
        .connect()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connection, "{error:?}");
    let (_, wrong) = authority.sign("other");
    let mismatched = ours.client_certificate(certificate, wrong);
    assert!(Redis::from_config(mismatched).is_err());
}
