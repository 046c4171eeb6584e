//! TLS, by a certificate that is thrown away.

use std::{net::SocketAddr, sync::Arc};

use buttress_core::clock;
use buttress_drain::{LimitsBuilder, Server, Shutdown};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional, duplex},
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore, ServerConfig,
        crypto::{CryptoProvider, ring},
        pki_types::{PrivateKeyDer, ServerName},
    },
};

use crate::{
    Rig,
    app::app,
    client::{Client, get},
    limits, ms, shutdown, shutdown_of, soon, until,
};

pub(crate) struct Both {
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) client: ClientConfig,
}

pub(crate) fn configs() -> Both {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider: Arc<CryptoProvider> = ring::default_provider().into();
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    Both {
        server: Arc::new(server),
        client,
    }
}

async fn rig(shutdown: Shutdown, limits: LimitsBuilder) -> (Rig, ClientConfig) {
    let Both { server, client } = configs();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = Server::new(&shutdown)
        .limits(limits.build().unwrap())
        .tls(server)
        .serve(listener, app());
    (Rig::with(shutdown, addr, server), client)
}

pub(crate) async fn connect(
    config: &ClientConfig,
    alpn: &[&str],
    addr: SocketAddr,
) -> TlsStream<TcpStream> {
    let mut config = config.clone();
    config.alpn_protocols = alpn.iter().map(|name| (*name).into()).collect();
    let connector = TlsConnector::from(Arc::new(config));
    let io = soon(TcpStream::connect(addr)).await.unwrap();
    io.set_nodelay(true).unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    soon(connector.connect(name, io)).await.unwrap()
}

#[tokio::test]
async fn http1_is_served_and_drained() {
    let (rig, config) = rig(shutdown(), limits()).await;
    let mut old = Client::over(connect(&config, &[], rig.addr).await);
    assert!(!old.get("/").await.closes());
    let io = connect(&config, &["http/1.1"], rig.addr).await;
    assert_eq!(io.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let mut busy = Client::over(io);
    busy.send(get("/slow/500")).await.unwrap();
    rig.trigger();
    let mut new = Client::over(connect(&config, &[], rig.addr).await);
    let answer = new.get("/").await;
    assert!(answer.closes());
    // Closed by close_notify, not by the loss of the connection.
    assert!(new.is_closed().await.unwrap());
    assert!(old.is_closed().await.unwrap());
    assert_eq!(busy.answer().await.text(), "slow");
    assert!(busy.is_closed().await.unwrap());
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn http2_is_agreed_on_and_drained() {
    let (rig, config) = rig(shutdown(), limits()).await;
    let io = connect(&config, &["h2", "http/1.1"], rig.addr).await;
    assert_eq!(io.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut send, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io))
            .await
            .unwrap();
    let connection = tokio::spawn(connection);
    let request = |path: &str| {
        let uri = format!("https://localhost{path}");
        http::Request::get(uri).body(String::new()).unwrap()
    };
    assert_eq!(send.send_request(request("/")).await.unwrap().status(), 200);
    let slow = send.send_request(request("/slow/400"));
    rig.trigger();
    assert_eq!(soon(slow).await.unwrap().status(), 200);
    soon(connection).await.unwrap().unwrap();
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn a_silent_handshake_is_closed_and_keeps_nobody_waiting() {
    let (rig, config) = rig(shutdown(), limits().handshake_timeout(ms(1500))).await;
    let begun = clock::now();
    let mut silent = soon(TcpStream::connect(rig.addr)).await.unwrap();
    // A record of which only the beginning comes.
    let mut half = soon(TcpStream::connect(rig.addr)).await.unwrap();
    half.write_all(&[22, 3, 1, 1, 0, 1]).await.unwrap();
    let mut client = Client::over(connect(&config, &[], rig.addr).await);
    assert_eq!(client.get("/").await.text(), "hello");
    assert!(clock::now() - begun < ms(1400));
    for socket in [&mut silent, &mut half] {
        let _ = soon(socket.read_to_end(&mut Vec::new())).await;
        let took = clock::now() - begun;
        assert!((ms(1490)..ms(5000)).contains(&took), "{took:?}");
    }
    let shutdown = rig.shutdown.clone();
    until(|| shutdown.connections() == 1).await;
    // The limit is the handshake's alone.
    assert_eq!(client.get("/slow/1600").await.text(), "slow");
}

#[tokio::test]
async fn a_silent_handshake_does_not_hold_a_drain() {
    let (rig, _) = rig(shutdown_of(0, 5000, 500), limits()).await;
    let mut silent = soon(TcpStream::connect(rig.addr)).await.unwrap();
    let start = rig.trigger();
    let _ = soon(silent.read_to_end(&mut Vec::new())).await;
    drop(silent);
    assert_eq!(rig.ended().await.exit_code(), 0);
    let took = clock::now() - start;
    assert!((ms(290)..ms(3000)).contains(&took), "{took:?}");
}

#[tokio::test]
async fn what_has_arrived_is_answered() {
    for _ in 0..10 {
        let (rig, config) = rig(shutdown_of(0, 10_000, 500), limits()).await;
        let mut clients = Vec::new();
        for n in 0..10 {
            let mut client = Client::over(connect(&config, &[], rig.addr).await);
            if n % 2 == 0 {
                client.get("/").await;
            }
            clients.push(client);
        }
        for client in &mut clients {
            client.send(get("/")).await.unwrap();
        }
        rig.trigger();
        for client in &mut clients {
            assert_eq!(client.answer().await.text(), "hello");
        }
        drop(clients);
        assert_eq!(rig.ended().await.exit_code(), 0);
    }
}

/// Of a record that has come in part nothing is to be seen, neither on the
/// socket nor by hyper.
#[tokio::test]
async fn half_a_record_is_not_closed_on() {
    let (rig, config) = rig(shutdown_of(0, 10_000, 500), limits()).await;
    let mut tcp = soon(TcpStream::connect(rig.addr)).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    let (near, mut far) = duplex(64 * 1024);
    let connector = TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("localhost").unwrap();
    // What the client writes goes by hand, once there was a first answer.
    let begin = async {
        let io = connector.connect(name, near).await.unwrap();
        let mut client = Client::over(io);
        assert_eq!(client.get("/").await.text(), "hello");
        client
    };
    let mut client = tokio::select! {
        client = begin => client,
        copied = copy_bidirectional(&mut far, &mut tcp) => panic!("{copied:?}"),
    };
    client.send(get("/")).await.unwrap();
    let mut record = vec![0; 1024];
    let length = far.read(&mut record).await.unwrap();
    let (first, rest) = record[..length].split_at(length / 2);
    tcp.write_all(first).await.unwrap();
    sleep(ms(50)).await;
    rig.trigger();
    sleep(ms(200)).await;
    tcp.write_all(rest).await.unwrap();
    tokio::select! {
        answer = client.answer() => assert_eq!(answer.text(), "hello"),
        copied = copy_bidirectional(&mut far, &mut tcp) => panic!("{copied:?}"),
    }
    drop((client, tcp));
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paced_download_arrives_whole() {
    let (rig, config) = rig(shutdown_of(50, 10_000, 500), limits()).await;
    let mut client = Client::over(connect(&config, &[], rig.addr).await);
    client.send(get("/paced/10000000")).await.unwrap();
    let (status, _) = client.head().await.unwrap().unwrap();
    assert_eq!(status, 200);
    rig.trigger();
    let mut read = 0;
    while let Some(chunk) = client.chunk().await.unwrap() {
        for (n, byte) in chunk.iter().enumerate() {
            assert_eq!(*byte, crate::app::byte(read + n));
        }
        read += chunk.len();
    }
    assert_eq!(read, 10_000_000);
    assert!(client.is_closed().await.unwrap());
    assert_eq!(rig.ended().await.exit_code(), 0);
}

#[tokio::test]
async fn a_cut_ends_it() {
    let (rig, config) = rig(shutdown_of(0, 1000, 500), limits()).await;
    let mut client = Client::over(connect(&config, &[], rig.addr).await);
    client.send(get("/endless")).await.unwrap();
    client.head().await.unwrap();
    rig.trigger();
    while let Ok(Some(_)) = client.chunk().await {}
    let report = rig.ended().await;
    assert_eq!(report.exit_code(), 124);
    assert_eq!(report.cut().len(), 1, "{report}");
}
