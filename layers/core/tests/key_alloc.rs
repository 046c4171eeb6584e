//! What the extractors cost on the hot path: no allocation for addresses and
//! for all that fits into a key.

use std::net::SocketAddr;

use buttress_core::{
    Head,
    key::{self, ClientIp, ExtractKey, ExtractKeyExt, Global, Key, PeerAddr},
};
use http::{HeaderValue, Request};

fn allocations<T>(work: impl FnOnce() -> T) -> u64 {
    let mut kept = None;
    let counted = allocation_counter::measure(|| kept = Some(work()));
    drop(kept);
    counted.count_total
}

fn request(peer: &str, headers: &[(&'static str, &str)]) -> Request<()> {
    let peer: SocketAddr = peer.parse().unwrap();
    let mut request = Request::builder()
        .uri("/orders/7?q=1")
        .extension(PeerAddr(peer))
        .body(())
        .unwrap();
    for (name, value) in headers {
        request
            .headers_mut()
            .append(*name, HeaderValue::from_str(value).unwrap());
    }
    request
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| Box::new([1_u8; 7])), 1);
    assert_eq!(allocations(|| Key::from("x".repeat(38))), 2);
}

#[test]
fn addresses_cost_no_allocation() {
    let client_ip = ClientIp::new()
        .trust(["10.0.0.0/8", "2001:db8:1::/48"])
        .unwrap();
    let long = "6.6.6.6, ".repeat(1000) + "2001:db8::7, 10.0.0.2";
    let chain = "10.0.0.2, ".repeat(1000);
    let quoted = r#"for="6.6.6.6, for="[2001:db8::7]:80";host="a\",b", for=10.0.0.2"#;
    for (peer, headers) in [
        ("192.0.2.1:80", &[][..]),
        ("[2001:db8::1]:80", &[]),
        ("192.0.2.1:80", &[("x-forwarded-for", long.as_str())]),
        ("10.0.0.1:80", &[("x-forwarded-for", long.as_str())]),
        ("10.0.0.1:80", &[("x-forwarded-for", chain.as_str())]),
        ("10.0.0.1:80", &[("forwarded", quoted)]),
        (
            "10.0.0.1:80",
            &[("x-forwarded-for", "junk, \"[::1%x]:80\"")],
        ),
    ] {
        let request = request(peer, headers);
        let mut key = None;
        let cost = allocations(|| key = client_ip.extract(Head::from(&request)));
        assert!(key.is_some());
        assert_eq!(cost, 0, "{peer} {headers:?}");
    }
}

#[test]
fn what_fits_costs_no_allocation() {
    let request = request(
        "[2001:db8::7]:80",
        &[
            ("x-api-key", "0f8fad5b-d9cb-469f-a165-70867728950e"),
            ("authorization", "BEARER  abcdefghijklmnop"),
            ("cookie", "lang=de; sid=%61bcdef0123456789"),
            ("host", "Orders.Example.org:8080"),
        ],
    );
    let head = Head::from(&request);
    let absent_or_address = key::header("x-absent").or(ClientIp::new());
    let extractors: [&dyn ExtractKey; 9] = [
        &Global,
        &key::header("x-api-key"),
        &key::header("authorization"),
        &key::cookie("sid"),
        &key::path(),
        &key::method(),
        &key::host(),
        &(ClientIp::new(), ClientIp::new()),
        &absent_or_address,
    ];
    for (number, extractor) in extractors.into_iter().enumerate() {
        let mut extracted = None;
        let cost = allocations(|| extracted = extractor.extract(head));
        assert!(extracted.is_some(), "{number}");
        assert_eq!(cost, 0, "{number}");
    }
    // A copy costs none either, a digest of what is too long neither.
    let key = key::header("x-api-key").extract(head).unwrap();
    assert_eq!(allocations(|| key.clone()), 0);
    let long = "x".repeat(100_000);
    assert_eq!(allocations(|| Key::from(long.as_str())), 0);
    // Between the two it is one.
    assert_eq!(allocations(|| Key::from(&long[..1000])), 1);
}
