//! The connector alone.

use std::{
    convert::Infallible,
    future::{Future, pending, ready},
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress_core::{BoxError, clock};
use buttress_delivery::guard::{Denied, Guard, GuardedConnector, Rule};
use http::Uri;
use hyper::rt;
use hyper_util::{
    client::legacy::connect::{Connection, HttpConnector, dns::Name},
    rt::TokioIo,
};
use tokio::net::{TcpListener, TcpStream};
use tower::{Service, ServiceExt, service_fn};

use crate::{Answers, Trap};

async fn dial<C>(connector: &C, uri: &str) -> Result<TcpStream, BoxError>
where
    C: Service<Uri, Response = TokioIo<TcpStream>> + Clone,
    C::Error: Into<BoxError>,
{
    let connected = connector.clone().oneshot(uri.parse().unwrap()).await;
    connected.map(TokioIo::into_inner).map_err(Into::into)
}

fn rule(result: Result<TcpStream, BoxError>) -> Option<Rule> {
    Denied::of(&*result.unwrap_err()).map(Denied::rule)
}

#[tokio::test]
async fn what_is_no_public_address_gets_no_socket_and_no_lookup() {
    let trap = Trap::set().await;
    let port = trap.port();
    let resolver = Answers::new([&["127.0.0.1"]]);
    let connector = GuardedConnector::new(Guard::new().allow_http()).resolver(resolver.clone());
    for (host, expected) in [
        ("127.1", Rule::Host),
        ("2130706433", Rule::Host),
        ("0x7f.1", Rule::Host),
        ("0x7f000001", Rule::Host),
        ("0177.0.0.1", Rule::Host),
        ("127.0.0.1.", Rule::Host),
        ("0", Rule::Host),
        ("0.0.0.0", Rule::Address),
        ("127.0.0.1", Rule::Address),
        ("127.255.255.254", Rule::Address),
        ("[::]", Rule::Address),
        ("[::1]", Rule::Address),
        ("[::127.0.0.1]", Rule::Address),
        ("[::ffff:127.0.0.1]", Rule::Address),
        ("[::ffff:0.0.0.0]", Rule::Address),
        ("[64:ff9b::7f00:1]", Rule::Address),
        ("[2002:7f00:1::]", Rule::Address),
        ("169.254.169.254", Rule::Address),
        ("[::ffff:169.254.169.254]", Rule::Address),
        ("[64:ff9b::a9fe:a9fe]", Rule::Address),
        ("[fd00:ec2::254]", Rule::Address),
        ("[fe80::1]", Rule::Address),
        ("localhost", Rule::Address),
        ("LOCALHOST.", Rule::Address),
        ("hook.localhost", Rule::Address),
        ("user@127.0.0.1", Rule::Userinfo),
    ] {
        for scheme in ["http", "https"] {
            let result = dial(&connector, &format!("{scheme}://{host}:{port}/")).await;
            assert_eq!(rule(result), Some(expected), "{host}");
        }
    }
    assert_eq!(resolver.asked(), 0);
    trap.assert_untouched().await;
}

/// Else the test above would prove nothing.
#[tokio::test]
async fn without_the_guard_they_get_through() {
    let trap = Trap::set().await;
    let port = trap.port();
    let mut unguarded = HttpConnector::new();
    unguarded.enforce_http(false);
    for host in ["127.1", "2130706433", "127.0.0.1", "0.0.0.0"] {
        let stream = dial(&unguarded, &format!("https://{host}:{port}/")).await;
        assert_eq!(stream.unwrap().peer_addr().unwrap().port(), port, "{host}");
    }
}

#[tokio::test]
async fn a_name_is_worth_its_addresses() {
    let trap = Trap::set().await;
    let uri = format!("https://hook.example:{}/", trap.port());
    for answer in [
        &["127.0.0.1"][..],
        &["::1"],
        &["::ffff:127.0.0.1"],
        &["0.0.0.0", "10.0.0.1", "127.0.0.1"],
    ] {
        let resolver = Answers::new([answer]);
        let connector = GuardedConnector::new(Guard::new()).resolver(resolver.clone());
        assert_eq!(rule(dial(&connector, &uri).await), Some(Rule::Address));
        assert_eq!(resolver.asked(), 1);
    }
    let denied = Guard::new().deny("127.0.0.0/8".parse().unwrap());
    let connector = GuardedConnector::new(denied).resolver(Answers::new([&["127.0.0.1"]]));
    assert_eq!(rule(dial(&connector, &uri).await), Some(Rule::DenyList));
    trap.assert_untouched().await;
}

/// Only Linux has all of 127.0.0.0/8 on its loopback.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn of_mixed_answers_the_permitted_remain() {
    let trap = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = trap.local_addr().unwrap().port();
    let trap = Trap { listener: trap };
    let receiver = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
    let guard = Guard::new().allow("127.0.0.2/32".parse().unwrap());
    let connector = GuardedConnector::new(guard).resolver(Answers::new([&[
        "::1",
        "127.0.0.1",
        "127.0.0.2",
        "10.0.0.1",
    ]]));

    let uri = format!("https://hook.example:{port}/");
    let stream = dial(&connector, &uri).await.unwrap();
    assert_eq!(stream.peer_addr().unwrap(), receiver.local_addr().unwrap());
    let (_, peer) = receiver.accept().await.unwrap();
    assert_eq!(peer, stream.local_addr().unwrap());
    trap.assert_untouched().await;
}

#[tokio::test]
async fn a_name_is_judged_again_at_each_dial() {
    let receiver = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = receiver.local_addr().unwrap().port();
    let guard = Guard::new().allow("127.0.0.1/32".parse().unwrap());
    let resolver = Answers::new([&["127.0.0.1"], &["127.0.0.2", "::1"], &["127.0.0.1"]]);
    let connector = GuardedConnector::new(guard).resolver(resolver.clone());

    let uri = format!("https://rebinds.example:{port}/");
    assert!(dial(&connector, &uri).await.is_ok());
    assert_eq!(rule(dial(&connector, &uri).await), Some(Rule::Address));
    assert!(dial(&connector, &uri).await.is_ok());
    assert_eq!(resolver.asked(), 3);
}

#[tokio::test]
async fn an_allow_list_lets_loopback_through() {
    let receiver = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = receiver.local_addr().unwrap().port();
    let guard = Guard::new().allow("127.0.0.0/8".parse().unwrap());
    let connector = GuardedConnector::new(guard);
    for host in ["127.0.0.1", "[::ffff:127.0.0.1]", "localhost"] {
        let stream = dial(&connector, &format!("https://{host}:{port}/")).await;
        let stream = stream.unwrap_or_else(|error| panic!("{host}: {error:?}"));
        assert!(stream.nodelay().unwrap());
    }
    // The other spellings stay out: what they mean is not for us to say.
    let result = dial(&connector, &format!("https://127.1:{port}/")).await;
    assert_eq!(rule(result), Some(Rule::Host));
}

#[tokio::test]
async fn the_port_is_the_uris_and_never_the_resolvers() {
    let trap = Trap::set().await;
    let answer = SocketAddr::from(([127, 0, 0, 1], trap.port()));
    let guard = Guard::new().allow("127.0.0.1/32".parse().unwrap());
    let connector = GuardedConnector::new(guard).resolver(Answers::of(vec![vec![answer]]));
    // Whether or not something is at 443 here.
    if let Ok(stream) = dial(&connector, "https://hook.example/").await {
        assert_eq!(stream.peer_addr().unwrap().port(), 443);
    }
    trap.assert_untouched().await;
}

#[tokio::test]
async fn a_resolver_that_fails_or_knows_nothing_is_no_denial() {
    let connector = GuardedConnector::new(Guard::new()).resolver(Answers::new([&[]]));
    assert_eq!(
        rule(dial(&connector, "https://nobody.example/").await),
        None
    );

    let broken = service_fn(|_: Name| {
        let failed = Err::<std::vec::IntoIter<SocketAddr>, _>(io::Error::other("SERVFAIL"));
        ready(failed)
    });
    let connector = GuardedConnector::new(Guard::new()).resolver(broken);
    assert_eq!(
        rule(dial(&connector, "https://nobody.example/").await),
        None
    );
}

#[tokio::test]
async fn of_many_addresses_sixteen_are_taken() {
    let receiver = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = receiver.local_addr().unwrap();
    let taken = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&taken);
    let many = service_fn(move |_: Name| {
        let counts = Arc::clone(&counts);
        let answer = std::iter::repeat_n(address, 1000).inspect(move |_| {
            counts.fetch_add(1, Ordering::Relaxed);
        });
        ready(Ok::<_, Infallible>(answer))
    });
    let guard = Guard::new().allow("127.0.0.1/32".parse().unwrap());
    let connector = GuardedConnector::new(guard).resolver(many);
    let uri = format!("https://many.example:{}/", address.port());
    assert!(dial(&connector, &uri).await.is_ok());
    assert_eq!(taken.load(Ordering::Relaxed), 16);
}

#[tokio::test(start_paused = true)]
async fn a_lookup_without_an_end_is_given_up() {
    let silent =
        service_fn(|_: Name| pending::<Result<std::vec::IntoIter<SocketAddr>, BoxError>>());
    let connector = GuardedConnector::new(Guard::new()).resolver(silent);
    for (connector, limit) in [
        (connector.clone(), 5),
        (connector.connect_timeout(Duration::from_secs(2)), 2),
    ] {
        let started = clock::now();
        let error = dial(&connector, "https://slow.example/").await.unwrap_err();
        let error = error.downcast::<io::Error>().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let took = clock::now().saturating_duration_since(started);
        assert_eq!(took.as_secs(), limit);
    }
}

/// The bounds of tonic's `connect_with_connector`, and those of hyper-util's
/// client.
#[test]
fn it_fits_where_connectors_go() {
    fn tonics<C>(_: &C)
    where
        C: Service<Uri> + Send + 'static,
        C::Response: rt::Read + rt::Write + Send + Unpin,
        C::Future: Send,
        BoxError: From<C::Error>,
    {
    }
    fn hypers<C>(_: &C)
    where
        C: Service<Uri> + Clone + Send + Sync + 'static,
        C::Response: rt::Read + rt::Write + Connection + Send + Unpin,
        C::Future: Future + Send + Unpin,
        C::Error: Into<BoxError>,
    {
    }
    let connector = GuardedConnector::new(Guard::new());
    tonics(&connector);
    hypers(&connector);
}
