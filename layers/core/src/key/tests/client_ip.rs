use std::net::Ipv6Addr;

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;

use super::*;

const X: HeaderName = HeaderName::from_static("x-forwarded-for");
const F: HeaderName = http::header::FORWARDED;

/// What the corpus trusts.
const TRUSTED: [&str; 4] = [
    "10.0.0.0/8",
    "2001:db8:1::/48",
    "::1",
    "::ffff:198.51.100.0/120",
];

fn behind(trusted: &[&str]) -> ClientIp {
    ClientIp::new().trust(trusted).unwrap()
}

fn from_peer(peer: &str, lines: &[(HeaderName, &[u8])]) -> Request<()> {
    let mut request = Request::new(());
    request
        .extensions_mut()
        .insert(PeerAddr(SocketAddr::new(ip(peer), 50_000)));
    for (name, line) in lines {
        request
            .headers_mut()
            .append(name, HeaderValue::from_bytes(line).unwrap());
    }
    request
}

fn address(client_ip: &ClientIp, peer: &str, lines: &[(HeaderName, &[u8])]) -> Option<IpAddr> {
    client_ip.address(Head::from(&from_peer(peer, lines)))
}

#[test]
fn spoofing_corpus() {
    // Peer, header lines (`X` X-Forwarded-For, `F` Forwarded), the client.
    // 10.*, 2001:db8:1:*, ::1 and 198.51.100.* are trusted; 6.6.6.6 is what a
    // spoofer wants to be.
    #[rustfmt::skip]
    let corpus: &[(&str, &[&str], &str)] = &[
        // The peer alone.
        ("192.0.2.7", &[], "192.0.2.7"),
        ("10.0.0.1", &[], "10.0.0.1"),
        ("2001:db8::7", &[], "2001:db8::7"),
        ("::ffff:192.0.2.7", &[], "192.0.2.7"),
        // A peer that is not trusted is the client, whatever it sends.
        ("192.0.2.7", &["X 6.6.6.6"], "192.0.2.7"),
        ("192.0.2.7", &["F for=6.6.6.6"], "192.0.2.7"),
        ("192.0.2.7", &["X 10.0.0.1"], "192.0.2.7"),
        ("192.0.2.7", &["X 6.6.6.6", "F for=6.6.6.6"], "192.0.2.7"),
        ("::ffff:192.0.2.7", &["X 6.6.6.6"], "192.0.2.7"),
        ("2001:db8::7", &["X 6.6.6.6"], "2001:db8::7"),
        ("11.0.0.0", &["X 6.6.6.6"], "11.0.0.0"),
        ("9.255.255.255", &["X 6.6.6.6"], "9.255.255.255"),
        ("2001:db8:2::", &["X 6.6.6.6"], "2001:db8:2::"),
        // A trusted one, mapped or not, tells the client.
        ("10.0.0.1", &["X 192.0.2.7"], "192.0.2.7"),
        ("10.255.255.255", &["X 192.0.2.7"], "192.0.2.7"),
        ("::ffff:10.0.0.1", &["X 192.0.2.7"], "192.0.2.7"),
        ("198.51.100.9", &["X 192.0.2.7"], "192.0.2.7"),
        ("2001:db8:1:ffff::1", &["X 192.0.2.7"], "192.0.2.7"),
        ("::1", &["X 2001:db8::7"], "2001:db8::7"),
        // The leftmost is what the client claims.
        ("10.0.0.1", &["X 6.6.6.6, 192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["X 6.6.6.6,192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["X 6.6.6.6, 6.6.6.6, 192.0.2.7, 10.0.0.2"], "192.0.2.7"),
        ("10.0.0.1", &["X 10.9.9.9, 192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["X 127.0.0.1, 192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["X \t6.6.6.6 ,\t 192.0.2.7 \t"], "192.0.2.7"),
        // Trusted chains.
        ("10.0.0.1", &["X 192.0.2.7, 10.0.0.3, 2001:db8:1::2, ::1"], "192.0.2.7"),
        ("10.0.0.1", &["X 10.0.0.4, 10.0.0.3, 10.0.0.2"], "10.0.0.4"),
        ("10.0.0.1", &["X 10.0.0.4"], "10.0.0.4"),
        // A spoofed hop mapped into IPv6 is the IPv4 hop: trusted as it is,
        // and no client of its own.
        ("10.0.0.1", &["X 192.0.2.7, ::ffff:10.0.0.2"], "192.0.2.7"),
        ("10.0.0.1", &["X 192.0.2.7, ::ffff:a00:2"], "192.0.2.7"),
        ("10.0.0.1", &["X 6.6.6.6, ::ffff:192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["X 6.6.6.6, [::ffff:192.0.2.7]:80"], "192.0.2.7"),
        // All lines are one list, in order.
        ("10.0.0.1", &["X 6.6.6.6", "X 192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["X 192.0.2.7", "X 10.0.0.2"], "192.0.2.7"),
        ("10.0.0.1", &["X 6.6.6.6", "X 6.6.6.6, 192.0.2.7", "X 10.0.0.3, 10.0.0.2"], "192.0.2.7"),
        ("10.0.0.1", &["X 192.0.2.7", "X ", "X 10.0.0.2"], "192.0.2.7"),
        ("10.0.0.1", &["X 6.6.6.6", "X junk", "X 10.0.0.2"], "10.0.0.2"),
        // Empty elements are none.
        ("10.0.0.1", &["X "], "10.0.0.1"),
        ("10.0.0.1", &["X ,, ,"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 192.0.2.7,"], "192.0.2.7"),
        ("10.0.0.1", &["X 6.6.6.6,,192.0.2.7,,10.0.0.2, ,"], "192.0.2.7"),
        ("10.0.0.1", &["X ,192.0.2.7"], "192.0.2.7"),
        // Ports, brackets, quotes.
        ("10.0.0.1", &["X 6.6.6.6, 192.0.2.7:65535"], "192.0.2.7"),
        ("10.0.0.1", &["X 192.0.2.7:1, 10.0.0.2:443"], "192.0.2.7"),
        ("10.0.0.1", &["X [2001:db8::7]:443"], "2001:db8::7"),
        ("10.0.0.1", &["X [2001:db8::7]"], "2001:db8::7"),
        ("10.0.0.1", &["X 2001:DB8::7, [2001:db8:1::2]:8080"], "2001:db8::7"),
        ("10.0.0.1", &["X \"192.0.2.7\""], "192.0.2.7"),
        ("10.0.0.1", &["X 6.6.6.6, \"[2001:db8::7]:80\""], "2001:db8::7"),
        ("10.0.0.1", &["X \"6.6.6.6, 192.0.2.7"], "192.0.2.7"),
        // Junk ends the walk at the hop that vouched for it.
        ("10.0.0.1", &["X junk"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, unknown"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, _hidden, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", &["X 6.6.6.6, unknown, 10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", &["X unknown, 192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["X 6.6.6.6, 192.0.2.07"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 192.0.2"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 3221226007"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 0xc0.0.2.7"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 192.0.2.7:"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 192.0.2.7:65536"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 192.0.2.7:+80"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 192.0.2.7:000080"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, [192.0.2.7]"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, [2001:db8::7"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, [2001:db8::7]80"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 2001:db8::7]"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, fe80::1%eth0"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, [fe80::1%25eth0]:80"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 192.0.2.7 10.0.0.2"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6; 10.0.0.2"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 10.0.0.0/8"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, example.org"], "10.0.0.1"),
        ("10.0.0.1", &["X 6.6.6.6, 192.0.2.\u{0667}"], "10.0.0.1"),
        ("10.0.0.1", &["X for=6.6.6.6"], "10.0.0.1"),
        // Forwarded.
        ("10.0.0.1", &["F for=192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["F for=6.6.6.6, for=192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["F FOR=192.0.2.7;Proto=https;by=10.0.0.2"], "192.0.2.7"),
        ("10.0.0.1", &["F proto=https ; for = \"192.0.2.7:80\" ; by=_x"], "192.0.2.7"),
        ("10.0.0.1", &["F for=\"[2001:db8::7]:80\""], "2001:db8::7"),
        ("10.0.0.1", &["F for=\"[2001:db8::7]\";host=\"a,b\", for=10.0.0.2"], "2001:db8::7"),
        ("10.0.0.1", &["F for=\"[2001:db8::7]:_port\""], "2001:db8::7"),
        ("10.0.0.1", &["F for=\"\\1\\92.0.2.7\""], "192.0.2.7"),
        ("10.0.0.1", &["F for=192.0.2.7;", "F for=10.0.0.2,"], "192.0.2.7"),
        ("10.0.0.1", &["F for=6.6.6.6", "F for=192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["F for=\"::ffff:192.0.2.7\""], "192.0.2.7"),
        // Commas and quotes that hide and seek.
        ("10.0.0.1", &["F for=192.0.2.7;host=\"x, for=6.6.6.6\""], "192.0.2.7"),
        ("10.0.0.1", &["F for=192.0.2.7;host=\"x\\\", for=6.6.6.6, \\\"\""], "192.0.2.7"),
        ("10.0.0.1", &["F for=192.0.2.7;host=\"x\\\\\", for=10.0.0.2"], "192.0.2.7"),
        ("10.0.0.1", &["F for=\"6.6.6.6, for=192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["F for=6.6.6.6;host=\", for=\"[2001:db8::7]\""], "2001:db8::7"),
        ("10.0.0.1", &["F for=6.6.6.6;host=\"\\, for=\"[2001:db8::7]\""], "2001:db8::7"),
        ("10.0.0.1", &["F for=6.6.6.6, for=\"192.0.2.7"], "10.0.0.1"),
        ("10.0.0.1", &["F for=6.6.6.6, for=192.0.2.7\""], "10.0.0.1"),
        ("10.0.0.1", &["F for=6.6.6.6, for=\"192.0.2.7\"x"], "10.0.0.1"),
        ("10.0.0.1", &["F for=6.6.6.6, for=\"192.0.2.7\\\""], "10.0.0.1"),
        ("10.0.0.1", &["F for=6.6.6.6, for=192.0.2.7;host=a\"b\""], "10.0.0.1"),
        // Hops that do not tell.
        ("10.0.0.1", &["F for=6.6.6.6, for=unknown"], "10.0.0.1"),
        ("10.0.0.1", &["F for=6.6.6.6, for=_hidden, for=10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", &["F for=6.6.6.6, proto=https"], "10.0.0.1"),
        ("10.0.0.1", &["F for=6.6.6.6, 192.0.2.7"], "10.0.0.1"),
        ("10.0.0.1", &["F for=6.6.6.6;for=192.0.2.7"], "10.0.0.1"),
        ("10.0.0.1", &["F for=6.6.6.6, for="], "10.0.0.1"),
        ("10.0.0.1", &["F for=6.6.6.6, =;for=192.0.2.7"], "10.0.0.1"),
        ("10.0.0.1", &["F for=6.6.6.6, xfor=192.0.2.7"], "10.0.0.1"),
        ("10.0.0.1", &["F for=192.0.2.7, for=\"unknown:80\", for=10.0.0.2"], "10.0.0.2"),
        // Both: X-Forwarded-For counts, even where it says nothing.
        ("10.0.0.1", &["F for=6.6.6.6", "X 192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", &["X 192.0.2.7", "F for=6.6.6.6"], "192.0.2.7"),
        ("10.0.0.1", &["X junk", "F for=6.6.6.6"], "10.0.0.1"),
        ("10.0.0.1", &["X ", "F for=6.6.6.6"], "10.0.0.1"),
    ];
    assert!(corpus.len() > 100);
    let client_ip = behind(&TRUSTED);
    for (peer, lines, expected) in corpus {
        let lines: Vec<(HeaderName, &[u8])> = lines
            .iter()
            .map(|line| {
                let (name, value) = line.split_once(' ').unwrap();
                (if name == "X" { X } else { F }, value.as_bytes())
            })
            .collect();
        assert_eq!(
            address(&client_ip, peer, &lines),
            Some(ip(expected)),
            "{peer} {lines:?}"
        );
    }
}

#[test]
fn without_a_peer_there_is_no_address() {
    let mut request = Request::new(());
    request
        .headers_mut()
        .insert(X, HeaderValue::from_static("6.6.6.6"));
    let everybody = behind(&["0.0.0.0/0", "::/0"]);
    assert_eq!(everybody.address(Head::from(&request)), None);
    assert_eq!(everybody.extract(Head::from(&request)), None);

    let unix = everybody.peer_from(|_| Some(IpAddr::V6(Ipv6Addr::LOCALHOST)));
    assert_eq!(unix.address(Head::from(&request)), Some(ip("6.6.6.6")));
}

#[test]
fn a_huge_header_is_walked_a_little() {
    let client_ip = behind(&TRUSTED);
    let spoofed = "6.6.6.6, ".repeat(9_999) + "192.0.2.7";
    assert_eq!(
        address(&client_ip, "10.0.0.1", &[(X, spoofed.as_bytes())]),
        Some(ip("192.0.2.7"))
    );
    // Nobody has so many proxies: what is left of the 64th is not read.
    let chain = |hops: usize| {
        let mut list = String::from("192.0.2.7");
        for hop in 0..hops {
            list += &format!(", 10.1.{}.{}", hop / 256, hop % 256);
        }
        address(&client_ip, "10.0.0.1", &[(X, list.as_bytes())]).unwrap()
    };
    assert_eq!(chain(63), ip("192.0.2.7"));
    assert_eq!(chain(64), ip("10.1.0.0"));
    assert_eq!(chain(10_000), ip("10.1.38.208")); // 64 from the right: 9936
    for filler in [",", "\"", "\\", "\\\"", "for=\"", ";", "[", "x=y;"] {
        for name in [X, F] {
            let line = filler.repeat(10_000);
            assert_eq!(
                address(&client_ip, "10.0.0.1", &[(name, line.as_bytes())]),
                Some(ip("10.0.0.1")),
                "{filler}"
            );
        }
    }
}

#[test]
fn the_key_is_cut_to_the_prefix() {
    let key = |client_ip: &ClientIp, peer| {
        let request = from_peer(peer, &[]);
        client_ip.extract(Head::from(&request)).unwrap()
    };
    let usual = ClientIp::new();
    assert_eq!(
        key(&usual, "2001:db8::1"),
        key(&usual, "2001:db8::ffff:0:0:2")
    );
    assert_ne!(key(&usual, "2001:db8::1"), key(&usual, "2001:db8:0:1::1"));
    assert_ne!(key(&usual, "192.0.2.1"), key(&usual, "192.0.2.2"));
    assert_eq!(key(&usual, "192.0.2.1"), key(&usual, "::ffff:192.0.2.1"));
    assert_eq!(key(&usual, "192.0.2.1"), usual.key(ip("192.0.2.1")));
    assert_eq!(key(&usual, "2001:db8::1"), Key::from(ip("2001:db8::")));

    let whole = usual.clone().ipv6_prefix(128).unwrap();
    assert_ne!(key(&whole, "2001:db8::1"), key(&whole, "2001:db8::2"));
    let coarse = usual
        .clone()
        .ipv4_prefix(24)
        .unwrap()
        .ipv6_prefix(48)
        .unwrap();
    assert_eq!(key(&coarse, "192.0.2.1"), key(&coarse, "192.0.2.255"));
    assert_ne!(key(&coarse, "192.0.2.1"), key(&coarse, "192.0.3.1"));
    assert_eq!(
        key(&coarse, "2001:db8::1"),
        key(&coarse, "2001:db8:0:ffff::1")
    );
    let halves = usual
        .clone()
        .ipv4_prefix(1)
        .unwrap()
        .ipv6_prefix(1)
        .unwrap();
    assert_eq!(key(&halves, "1.2.3.4"), key(&halves, "127.0.0.1"));
    assert_ne!(key(&halves, "1.2.3.4"), key(&halves, "128.0.0.1"));
    assert_ne!(key(&halves, "1.2.3.4"), key(&halves, "::2"));

    // The address itself is whole.
    assert_eq!(
        address(&coarse, "2001:db8::1", &[]),
        Some(ip("2001:db8::1"))
    );
}

#[test]
fn nonsense_is_refused_by_name() {
    for bad in [
        "",
        "10.0.0.0/33",
        "::/129",
        "10.0.0",
        "localhost",
        "10.0.0.0/-1",
        "010.0.0.1",
        "fe80::1%lo",
    ] {
        let error = ClientIp::new().trust(["10.0.0.1", bad]).unwrap_err();
        assert!(error.to_string().contains(&format!("{bad:?}")), "{error}");
    }
    for bits in [0, 129, 255] {
        let error = ClientIp::new().ipv6_prefix(bits).unwrap_err();
        assert!(error.to_string().contains(&bits.to_string()), "{error}");
    }
    for bits in [0, 33, 255] {
        assert!(ClientIp::new().ipv4_prefix(bits).is_err());
    }
}

#[test]
fn networks_are_matched_as_written() {
    let client_ip = behind(&["10.1.2.3/8", " 192.0.2.1 "])
        .trust(["2001:db8::/32"])
        .unwrap();
    for (address, trusted) in [
        ("10.0.0.0", true),
        ("10.255.255.255", true),
        ("11.0.0.0", false),
        ("192.0.2.1", true),
        ("192.0.2.2", false),
        ("192.0.2.0", false),
        ("::ffff:10.0.0.1", true),
        ("2001:db8:ffff::1", true),
        ("2001:db9::", false),
    ] {
        assert_eq!(client_ip.is_trusted(ip(address)), trusted, "{address}");
    }
    // `::/0` is all of IPv6 and nothing of IPv4, mapped or not.
    let six = behind(&["::/0"]);
    assert!(six.is_trusted(ip("2001:db8::1")));
    assert!(!six.is_trusted(ip("192.0.2.1")));
    assert!(!six.is_trusted(ip("::ffff:192.0.2.1")));
    assert!(behind(&["0.0.0.0/0"]).is_trusted(ip("::ffff:192.0.2.1")));
    assert!(behind(&["::ffff:0:0/96"]).is_trusted(ip("192.0.2.1")));
    assert!(!ClientIp::new().is_trusted(ip("127.0.0.1")));
}

#[test]
fn one_source_alone_may_be_named() {
    let all: &[(HeaderName, &[u8])] = &[
        (X, b"192.0.2.1"),
        (F, b"for=192.0.2.2"),
        (HeaderName::from_static("x-real-ip"), b"192.0.2.3"),
    ];
    let real_ip = Source::Header(HeaderName::from_static("x-real-ip"));
    for (source, expected) in [
        (Source::Either, "192.0.2.1"),
        (Source::XForwardedFor, "192.0.2.1"),
        (Source::Forwarded, "192.0.2.2"),
        (real_ip.clone(), "192.0.2.3"),
    ] {
        let client_ip = behind(&TRUSTED).source(source);
        assert_eq!(address(&client_ip, "10.0.0.1", all), Some(ip(expected)));
        assert_eq!(address(&client_ip, "192.0.2.9", all), Some(ip("192.0.2.9")));
    }
    let none: &[(HeaderName, &[u8])] = &[(F, b"for=6.6.6.6")];
    let client_ip = behind(&TRUSTED).source(Source::XForwardedFor);
    assert_eq!(address(&client_ip, "10.0.0.1", none), Some(ip("10.0.0.1")));
    // Sent twice: the last is the proxy's.
    let twice: &[(HeaderName, &[u8])] = &[
        (HeaderName::from_static("x-real-ip"), b"6.6.6.6"),
        (HeaderName::from_static("x-real-ip"), b"192.0.2.3"),
    ];
    let client_ip = behind(&TRUSTED).source(real_ip);
    assert_eq!(
        address(&client_ip, "10.0.0.1", twice),
        Some(ip("192.0.2.3"))
    );
}

#[test]
fn a_peer_of_ones_own_rules_alone() {
    #[derive(Clone)]
    struct Connection(IpAddr);

    let client_ip =
        ClientIp::new().peer_from(|extensions| extensions.get::<Connection>().map(|it| it.0));
    let mut request = from_peer("192.0.2.1", &[]);
    assert_eq!(client_ip.peer(Head::from(&request)), None);
    request
        .extensions_mut()
        .insert(Connection(ip("::ffff:192.0.2.2")));
    assert_eq!(client_ip.peer(Head::from(&request)), Some(ip("192.0.2.2")));
}

#[cfg(feature = "axum")]
#[test]
fn axum_tells_the_peer() {
    use axum::extract::{ConnectInfo, connect_info::MockConnectInfo};

    let peer = |host: u8| SocketAddr::from(([192, 0, 2, host], 50_000));
    let mut request = Request::new(());
    request.extensions_mut().insert(MockConnectInfo(peer(1)));
    let found = |request: &Request<()>| ClientIp::new().peer(Head::from(request));
    assert_eq!(found(&request), Some(ip("192.0.2.1")));
    request.extensions_mut().insert(ConnectInfo(peer(2)));
    assert_eq!(found(&request), Some(ip("192.0.2.2")));
    request.extensions_mut().insert(PeerAddr(peer(3)));
    assert_eq!(found(&request), Some(ip("192.0.2.3")));
}

#[cfg(feature = "tonic")]
#[test]
fn tonic_tells_the_peer() {
    use tonic::transport::server::TcpConnectInfo;

    let mut request = Request::new(());
    request.extensions_mut().insert(TcpConnectInfo {
        local_addr: None,
        remote_addr: Some(SocketAddr::from(([192, 0, 2, 1], 50_000))),
    });
    assert_eq!(
        ClientIp::new().peer(Head::from(&request)),
        Some(ip("192.0.2.1"))
    );
}

/// Lines of the letters that the parsers look at.
fn line() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        Just("10.0.0.2"),
        Just("192.0.2.7"),
        Just("2001:db8::7"),
        Just("[::ffff:10.0.0.3]:80"),
        Just("unknown"),
        Just("for="),
        Just("host="),
        Just("FoR="),
        Just("\""),
        Just("\\"),
        Just(","),
        Just(", "),
        Just(";"),
        Just(":"),
        Just("="),
        Just(" "),
        Just("%"),
        Just("\u{e9}"),
    ];
    prop_oneof![
        4 => proptest::collection::vec(word, 0..14).prop_map(|words| words.concat().into_bytes()),
        1 => proptest::collection::vec(any::<u8>(), 0..60).prop_map(|mut bytes| {
            // What no header value holds.
            bytes.retain(|byte| *byte == b'\t' || (*byte >= 32 && *byte != 127));
            bytes
        }),
    ]
}

fn lines() -> impl Strategy<Value = Vec<Vec<u8>>> {
    proptest::collection::vec(line(), 0..4)
}

fn name() -> impl Strategy<Value = HeaderName> {
    prop_oneof![Just(X), Just(F)]
}

fn resolve(client_ip: &ClientIp, peer: &str, name: &HeaderName, lines: &[Vec<u8>]) -> IpAddr {
    let lines: Vec<(HeaderName, &[u8])> = lines
        .iter()
        .map(|line| (name.clone(), line.as_slice()))
        .collect();
    address(client_ip, peer, &lines).unwrap()
}

/// One hop, and ways to write it in either header.
fn hop() -> impl Strategy<Value = (IpAddr, String, String)> {
    let address = prop_oneof![
        (0_u8..=255, 0_u8..=255).prop_map(|(a, b)| IpAddr::from([10, 0, a, b])),
        any::<[u8; 4]>().prop_map(IpAddr::from),
        any::<[u16; 8]>().prop_map(IpAddr::from),
        any::<u16>().prop_map(|last| IpAddr::from([0x2001, 0xdb8, 1, 0, 0, 0, 0, last])),
    ];
    let text = r#"([a-z,;= ]|\\["\\a]){0,8}"#;
    (address, any::<Option<u16>>(), 0_u8..4, text).prop_map(|(address, port, style, text)| {
        let node = match (address, port) {
            (address, Some(port)) => SocketAddr::new(address, port).to_string(),
            (IpAddr::V6(address), None) => format!("[{address}]"),
            (IpAddr::V4(address), None) if style == 3 => format!("[::ffff:{address}]"),
            (address, None) => address.to_string(),
        };
        let forwarded = match style {
            0 => format!("for=\"{node}\""),
            1 => format!("host=\"{text}\";FOR=\"{node}\""),
            2 => format!("For=\"{node}\" ; proto=https;by=\"{text}\""),
            _ => format!("for=\"{node}\";host=\"{text}\";"),
        };
        (address.to_canonical(), node, forwarded)
    })
}

/// Four times the usual, or of `PROPTEST_CASES`.
fn many_cases() -> ProptestConfig {
    let usual = ProptestConfig::default();
    ProptestConfig {
        cases: usual.cases.saturating_mul(4),
        ..usual
    }
}

proptest! {
    #![proptest_config(many_cases())]

    #[test]
    fn an_untrusted_peer_is_the_client(name in name(), lines in lines()) {
        let client_ip = behind(&TRUSTED);
        prop_assert_eq!(resolve(&client_ip, "192.0.2.9", &name, &lines), ip("192.0.2.9"));
    }

    #[test]
    fn what_stands_left_of_the_client_changes_nothing(
        name in name(),
        lines in lines(),
        left in line(),
        more in lines(),
    ) {
        let client_ip = behind(&TRUSTED);
        let found = resolve(&client_ip, "10.0.0.1", &name, &lines);
        if !client_ip.is_trusted(found) {
            let longer = [&more[..], &lines[..]].concat();
            prop_assert_eq!(resolve(&client_ip, "10.0.0.1", &name, &longer), found);
            let mut longer = lines;
            longer[0].splice(0..0, [&left[..], b","].concat());
            prop_assert_eq!(resolve(&client_ip, "10.0.0.1", &name, &longer), found);
        }
    }

    #[test]
    fn the_client_a_proxy_appends_is_found_behind_anything(
        (address, plain, forwarded) in hop()
            .prop_filter("a client", |(address, ..)| !behind(&TRUSTED).is_trusted(*address)),
        lines in lines(),
        same_line in any::<bool>(),
    ) {
        let client_ip = behind(&TRUSTED);
        for (name, element) in [(X, plain), (F, forwarded)] {
            let mut lines = lines.clone();
            match lines.last_mut() {
                Some(last) if same_line => last.extend_from_slice(format!(", {element}").as_bytes()),
                _ => lines.push(element.into_bytes()),
            }
            prop_assert_eq!(resolve(&client_ip, "10.0.0.1", &name, &lines), address);
        }
    }

    #[test]
    fn well_formed_lists_are_walked_as_the_model_does(
        hops in proptest::collection::vec((hop(), any::<bool>()), 0..8),
    ) {
        let client_ip = behind(&TRUSTED);
        let networks: Vec<IpNet> = ["10.0.0.0/8", "2001:db8:1::/48", "::1/128", "198.51.100.0/24"]
            .map(|network| network.parse().unwrap())
            .into();
        let trusted = |address: &IpAddr| networks.iter().any(|network| network.contains(address));
        let addresses: Vec<IpAddr> = hops.iter().map(|((address, ..), _)| *address).collect();
        let expected = addresses
            .iter()
            .rev()
            .find(|address| !trusted(address))
            .or(addresses.first())
            .copied()
            .unwrap_or(ip("10.0.0.1"));
        for name in [X, F] {
            let mut lines: Vec<Vec<u8>> = Vec::new();
            for ((_, plain, forwarded), new_line) in &hops {
                let element = if name == X { plain } else { forwarded };
                match lines.last_mut() {
                    Some(line) if !new_line => line.extend_from_slice(format!(",{element}").as_bytes()),
                    _ => lines.push(element.clone().into_bytes()),
                }
            }
            prop_assert_eq!(resolve(&client_ip, "10.0.0.1", &name, &lines), expected);
        }
    }

    #[test]
    fn trust_is_what_the_networks_say(
        networks in proptest::collection::vec((any::<[u8; 4]>(), 0_u8..=32, any::<u8>()), 0..12),
        near in any::<prop::sample::Index>(),
        flip in 0_u32..32,
        address in any::<[u8; 4]>(),
    ) {
        let v4: Vec<IpNet> = networks
            .iter()
            .map(|(network, bits, _)| IpNet::new(IpAddr::from(*network), *bits).unwrap())
            .collect();
        // The same bits as IPv6 networks.
        let six = |octets: [u8; 4]| {
            IpAddr::from(Ipv6Addr::from_bits(0x2001 << 112 | u128::from(u32::from_be_bytes(octets)) << 80))
        };
        let v6: Vec<IpNet> = networks
            .iter()
            .map(|(network, bits, _)| IpNet::new(six(*network), bits + 16).unwrap())
            .collect();
        let client_ip = ClientIp::new()
            .trust(v4.iter().chain(&v6).map(ToString::to_string))
            .unwrap();
        // One bit beside a network's own address, and anything.
        let mut candidates = vec![address];
        if !networks.is_empty() {
            let (network, ..) = near.get(&networks);
            candidates.push((u32::from_be_bytes(*network) ^ (1 << flip)).to_be_bytes());
        }
        for octets in candidates {
            let address = IpAddr::from(octets);
            prop_assert_eq!(client_ip.is_trusted(address), v4.iter().any(|net| net.contains(&address)));
            let address = six(octets);
            prop_assert_eq!(client_ip.is_trusted(address), v6.iter().any(|net| net.contains(&address)));
        }
    }
}

#[test]
fn a_header_map_keeps_the_order_of_lines() {
    // What "all lines in order" rests on.
    let mut headers = HeaderMap::new();
    for line in ["1", "2", "3"] {
        headers.append(X, HeaderValue::from_static(line));
    }
    let backwards: Vec<_> = headers.get_all(X).iter().rev().collect();
    assert_eq!(backwards, ["3", "2", "1"]);
}
