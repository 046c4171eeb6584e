//! The client on the connector.

use std::{
    convert::Infallible,
    error::Error,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress_core::clock;
use buttress_delivery::{
    client::{Client, ClientBuilder, client},
    guard::{Denied, Guard, Rule},
};
use buttress_webhook::WholeBody;
use bytes::Bytes;
use http::{Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ClientConfig, RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer},
    },
};
use tower::{Service, ServiceExt as _};

use crate::{Answers, Trap};

/// A receiver on loopback, which tells what it got, or redirects.
struct Receiver {
    port: u16,
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

#[derive(Clone, Default)]
struct Manner {
    tls: Option<Arc<ServerConfig>>,
    redirect: Option<String>,
}

impl Receiver {
    async fn open(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (connections, requests) = (Arc::default(), Arc::default());
        let mut tasks = JoinSet::new();
        let (accepted, answered) = (Arc::clone(&connections), Arc::clone(&requests));
        tasks.spawn(async move {
            let mut serving = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                AtomicUsize::fetch_add(&accepted, 1, Ordering::Relaxed);
                serving.spawn(serve(stream, manner.clone(), Arc::clone(&answered)));
            }
        });
        Self {
            port,
            connections,
            requests,
            _tasks: tasks,
        }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }
}

async fn serve(stream: TcpStream, manner: Manner, requests: Arc<AtomicUsize>) {
    let tls = manner.tls.clone();
    let answer = service_fn(move |request: Request<Incoming>| {
        requests.fetch_add(1, Ordering::Relaxed);
        let redirect = manner.redirect.clone();
        async move {
            let what = format!("{} {} ", request.method(), request.uri().path());
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let answer = [what.as_bytes(), &body].concat();
            let mut response = Response::new(Full::new(Bytes::from(answer)));
            if let Some(to) = redirect {
                *response.status_mut() = StatusCode::FOUND;
                response
                    .headers_mut()
                    .insert(header::LOCATION, to.parse().unwrap());
            }
            Ok::<_, Infallible>(response)
        }
    });
    let server = auto::Builder::new(TokioExecutor::new());
    // Clients that turn away in the middle are what some tests are of.
    let _ = match tls {
        Some(tls) => match TlsAcceptor::from(tls).accept(stream).await {
            Ok(stream) => server.serve_connection(TokioIo::new(stream), answer).await,
            Err(_) => Ok(()),
        },
        None => server.serve_connection(TokioIo::new(stream), answer).await,
    };
}

/// A server's side for `hook.example` with these protocols, and a client's
/// that trusts it alone.
fn authority(protocols: &[&str]) -> (Arc<ServerConfig>, ClientConfig) {
    let made = rcgen::generate_simple_self_signed(["hook.example".to_owned()]).unwrap();
    let certificate = CertificateDer::from(made.cert.der().to_vec());
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let mut server = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    server.alpn_protocols = protocols
        .iter()
        .map(|name| name.as_bytes().to_vec())
        .collect();
    (Arc::new(server), trusting(&[certificate]))
}

pub(crate) fn trusting(certificates: &[CertificateDer<'static>]) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.clone()).unwrap();
    }
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

fn house() -> Guard {
    Guard::new()
        .allow_http()
        .allow("127.0.0.1/32".parse().unwrap())
}

fn post(uri: &str) -> Request<WholeBody> {
    let body = WholeBody::new(Bytes::from_static(b"{\"a\":1}"));
    Request::post(uri).body(body).unwrap()
}

fn at_home(tls: ClientConfig) -> Client<Answers> {
    ClientBuilder::new(house(), tls)
        .resolver(Answers::new([&["127.0.0.1"]]))
        .build()
}

async fn text(response: Response<Incoming>) -> Bytes {
    response.into_body().collect().await.unwrap().to_bytes()
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[tokio::test]
async fn a_request_arrives_where_the_allow_list_lets_it() {
    let receiver = Receiver::open(Manner::default()).await;
    let mut client = client(house(), trusting(&[]));
    let uri = format!("http://127.0.0.1:{}/hook", receiver.port);
    for _ in 0..3 {
        let response = client.ready().await.unwrap().call(post(&uri)).await;
        assert_eq!(text(response.unwrap()).await, "POST /hook {\"a\":1}");
    }
    // What its pool keeps is used again.
    assert_eq!((receiver.connections(), receiver.requests()), (1, 3));
}

#[tokio::test]
async fn a_denial_is_found_in_the_clients_error() {
    let trap = Trap::set().await;
    let port = trap.port();
    let client = ClientBuilder::new(Guard::new(), trusting(&[]))
        .resolver(Answers::new([&["127.0.0.1", "::1"]]))
        .build();
    for (uri, expected) in [
        (format!("https://127.0.0.1:{port}/"), Rule::Address),
        (format!("https://[::ffff:127.0.0.1]:{port}/"), Rule::Address),
        (format!("https://2130706433:{port}/"), Rule::Host),
        (format!("https://hook.example:{port}/"), Rule::Address),
        (
            format!("https://hook.example@127.0.0.1:{port}/"),
            Rule::Userinfo,
        ),
        (format!("http://hook.example:{port}/"), Rule::Scheme),
    ] {
        let error = client.request(post(&uri)).await.unwrap_err();
        assert_eq!(
            Denied::of(&error).map(Denied::rule),
            Some(expected),
            "{uri}"
        );
    }
    trap.assert_untouched().await;
}

#[tokio::test]
async fn a_redirect_is_an_answer_and_not_followed() {
    let trap = Trap::set().await;
    let redirect = format!("http://127.0.0.1:{}/private", trap.port());
    let manner = Manner {
        redirect: Some(redirect.clone()),
        ..Manner::default()
    };
    let receiver = Receiver::open(manner).await;
    // It may go there, so nothing but the client's manners keeps it away.
    let client = client(house(), trusting(&[]));
    let uri = format!("http://127.0.0.1:{}/hook", receiver.port);
    let response = client.request(post(&uri)).await.unwrap();
    assert_eq!(response.status(), StatusCode::FOUND);
    assert_eq!(response.headers()[header::LOCATION], redirect);
    trap.assert_untouched().await;
}

#[tokio::test]
async fn tls_with_the_given_root_speaks_what_the_receiver_chooses() {
    for (protocols, version) in [
        (&["h2", "http/1.1"][..], Version::HTTP_2),
        (&["http/1.1"], Version::HTTP_11),
        (&[], Version::HTTP_11),
    ] {
        let (tls, root) = authority(protocols);
        let receiver = Receiver::open(Manner {
            tls: Some(tls),
            ..Manner::default()
        })
        .await;
        let uri = format!("https://hook.example:{}/hook", receiver.port);
        let response = at_home(root).request(post(&uri)).await;
        let response = response.unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(response.version(), version);
        assert_eq!(text(response).await, "POST /hook {\"a\":1}");
    }
}

#[tokio::test]
async fn a_protocol_that_was_named_is_the_only_one_offered() {
    let (tls, mut root) = authority(&["h2", "http/1.1"]);
    root.alpn_protocols = vec![b"http/1.1".to_vec()];
    let receiver = Receiver::open(Manner {
        tls: Some(tls),
        ..Manner::default()
    })
    .await;
    let uri = format!("https://hook.example:{}/hook", receiver.port);
    let response = at_home(root).request(post(&uri)).await.unwrap();
    assert_eq!(response.version(), Version::HTTP_11);
}

#[tokio::test]
async fn an_unknown_root_or_another_name_fails_before_a_byte_of_the_request() {
    let (tls, root) = authority(&["h2"]);
    let (_, another) = authority(&["h2"]);
    let receiver = Receiver::open(Manner {
        tls: Some(tls),
        ..Manner::default()
    })
    .await;
    let port = receiver.port;
    for (tls, name, said) in [
        (another, "hook.example", "BadSignature"),
        (trusting(&[]), "hook.example", "UnknownIssuer"),
        (root, "other.example", "not valid for name"),
    ] {
        let uri = format!("https://{name}:{port}/hook");
        let error = at_home(tls).request(post(&uri)).await.unwrap_err();
        assert!(error.is_connect());
        assert_eq!(Denied::of(&error), None);
        assert!(chain(&error).contains(said), "{}", chain(&error));
    }
    assert_eq!(receiver.requests(), 0);
}

#[cfg(feature = "webpki-roots")]
#[tokio::test]
async fn mozillas_roots_do_not_know_our_authority() {
    let (tls, _) = authority(&["h2"]);
    let receiver = Receiver::open(Manner {
        tls: Some(tls),
        ..Manner::default()
    })
    .await;
    let client = at_home(buttress_delivery::client::webpki_roots());
    let uri = format!("https://hook.example:{}/hook", receiver.port);
    let error = client.request(post(&uri)).await.unwrap_err();
    assert!(chain(&error).contains("UnknownIssuer"), "{}", chain(&error));
    assert_eq!((receiver.connections(), receiver.requests()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_handshake_without_an_end_is_given_up() {
    // It accepts, by its backlog, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!(
        "https://hook.example:{}/",
        silent.local_addr().unwrap().port()
    );
    let started = clock::now();
    let client = ClientBuilder::new(house(), trusting(&[]))
        .resolver(Answers::new([&["127.0.0.1"]]))
        .connect_timeout(Duration::from_secs(7))
        .build();
    let error = client.request(post(&uri)).await.unwrap_err();
    assert!(error.is_connect());
    let cause = error.source().unwrap().downcast_ref::<io::Error>().unwrap();
    assert_eq!(cause.kind(), io::ErrorKind::TimedOut);
    let took = clock::now().saturating_duration_since(started);
    assert_eq!(took.as_secs(), 7);
}
