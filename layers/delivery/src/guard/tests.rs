//! The guard against a naive model: the registries' tables, read bit by bit.

use std::{
    error::Error as _,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use http::Uri;
use ipnet::{IpNet, Ipv4Net};
use proptest::prelude::*;

use super::{Denied, Guard, Rule, host::Host};

/// IANA's special-purpose IPv4 addresses, multicast, and the host's own agent
/// in Azure.
const SPECIAL_V4: &[&str] = &[
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "168.63.129.16/32",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "255.255.255.255/32",
];

/// What of 2000::/3 is special.
const SPECIAL_V6: &[&str] = &[
    "2001::/23",
    "2001:db8::/32",
    "2002::/16",
    "2620:4f:8000::/48",
    "3fff::/20",
];

/// Each of the registry by its own name, were it not in a larger block above.
const ALSO_SPECIAL_V6: &[&str] = &[
    "::/128",
    "::1/128",
    "::/96",
    "::ffff:0:0:0/96",
    "64:ff9b:1::/48",
    "100::/64",
    "100:0:0:1::/64",
    "2001::/32",
    "2001:1::1/128",
    "2001:1::2/128",
    "2001:1::3/128",
    "2001:2::/48",
    "2001:3::/32",
    "2001:4:112::/48",
    "2001:10::/28",
    "2001:20::/28",
    "2001:30::/28",
    "5f00::/16",
    "fc00::/7",
    "fd00:ec2::254/128",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
];

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// The address's bits, from the left.
fn bits(ip: IpAddr) -> (u128, u32) {
    match ip {
        IpAddr::V4(v4) => (u128::from(u32::from(v4)), 32),
        IpAddr::V6(v6) => (u128::from(v6), 128),
    }
}

fn inside(ip: IpAddr, block: IpNet) -> bool {
    let ((ip, width), (base, base_width)) = (bits(ip), bits(block.addr()));
    let rest = base_width - u32::from(block.prefix_len());
    width == base_width && ip.checked_shr(rest) == base.checked_shr(rest)
}

fn in_any(ip: IpAddr, blocks: &[&str]) -> bool {
    blocks.iter().any(|block| inside(ip, net(block)))
}

fn public_v4(ip: Ipv4Addr) -> bool {
    !in_any(ip.into(), SPECIAL_V4)
}

fn public_v6(ip: Ipv6Addr) -> bool {
    inside(ip.into(), net("2000::/3")) && !in_any(ip.into(), SPECIAL_V6)
}

fn mapped(v4: Ipv4Addr) -> IpAddr {
    IpAddr::V6(v4.to_ipv6_mapped())
}

fn nat64(v4: Ipv4Addr) -> IpAddr {
    Ipv6Addr::from((0x64_ff9b_u128 << 96) | u128::from(u32::from(v4))).into()
}

fn six_to_four(v4: Ipv4Addr, rest: u128) -> IpAddr {
    let rest = rest & ((1 << 80) - 1);
    Ipv6Addr::from((0x2002 << 112) | (u128::from(u32::from(v4)) << 80) | rest).into()
}

fn teredo(server: Ipv4Addr, client: Ipv4Addr, flags: u32) -> IpAddr {
    let server = u128::from(u32::from(server)) << 64;
    let client = u128::from(!u32::from(client));
    Ipv6Addr::from((0x2001_0000 << 96) | server | (u128::from(flags) << 32) | client).into()
}

/// First and last of a block, and their neighbours outside.
fn edges(block: IpNet) -> Vec<IpAddr> {
    let (low, width) = bits(block.network());
    let (high, _) = bits(block.broadcast());
    let make = |bits: u128| match width {
        32 => u32::try_from(bits).ok().map(|v4| Ipv4Addr::from(v4).into()),
        _ => Some(Ipv6Addr::from(bits).into()),
    };
    [
        low.checked_sub(1),
        Some(low),
        Some(high),
        high.checked_add(1),
    ]
    .into_iter()
    .flatten()
    .filter_map(make)
    .collect()
}

fn any_v4() -> impl Strategy<Value = Ipv4Addr> {
    let near =
        (0..SPECIAL_V4.len(), any::<prop::sample::Index>()).prop_map(|(block, which)| match *which
            .get(&edges(net(SPECIAL_V4[block])))
        {
            IpAddr::V4(v4) => v4,
            IpAddr::V6(_) => unreachable!("a table of IPv4"),
        });
    let within = (0..SPECIAL_V4.len(), any::<u32>()).prop_map(|(block, host)| {
        let block = net(SPECIAL_V4[block]);
        let (base, _) = bits(block.network());
        let mask = u32::MAX
            .checked_shr(u32::from(block.prefix_len()))
            .unwrap_or(0);
        Ipv4Addr::from(u32::try_from(base).unwrap() | (host & mask))
    });
    prop_oneof![any::<Ipv4Addr>(), near, within]
}

fn any_v6() -> impl Strategy<Value = Ipv6Addr> {
    let blocks: Vec<&str> = [SPECIAL_V6, ALSO_SPECIAL_V6, &["2000::/3"]].concat();
    let near =
        (0..blocks.len(), any::<prop::sample::Index>()).prop_map(
            move |(block, which)| match *which.get(&edges(net(blocks[block]))) {
                IpAddr::V6(v6) => v6,
                IpAddr::V4(_) => unreachable!("a table of IPv6"),
            },
        );
    let global = any::<u128>().prop_map(|bits| Ipv6Addr::from((bits >> 3) | (1 << 125)));
    prop_oneof![any::<Ipv6Addr>(), near, global]
}

fn any_network() -> impl Strategy<Value = Ipv4Net> {
    (any_v4(), 0..=32_u8).prop_map(|(ip, length)| Ipv4Net::new(ip, length).unwrap())
}

fn passes(guard: &Guard, ip: IpAddr) -> bool {
    guard.check_ip(ip).is_ok()
}

#[test]
fn each_block_is_refused_from_its_first_address_to_its_last() {
    let guard = Guard::new();
    for block in [SPECIAL_V4, SPECIAL_V6, ALSO_SPECIAL_V6].concat() {
        let block = net(block);
        for ip in [block.network(), block.broadcast()] {
            assert!(!passes(&guard, ip), "{ip} of {block}");
        }
    }
    for outside in [
        "1.1.1.1",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "168.63.129.15",
        "168.63.129.17",
        "172.15.255.255",
        "172.32.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2000::",
        "2001:200::",
        "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff",
        "2001:db9::",
        "2003::",
        "2606:4700:4700::1111",
        "2620:4f:8001::",
        "3ffe:ffff::",
        "3fff:1000::",
        "3fff:ffff::",
    ] {
        assert!(passes(&guard, outside.parse().unwrap()), "{outside}");
    }
}

#[test]
fn the_addresses_of_clouds_are_refused() {
    for ip in [
        "169.254.169.254",
        "169.254.170.2",
        "100.100.100.200",
        "192.0.0.192",
        "168.63.129.16",
        "fd00:ec2::254",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::",
        "::a9fe:a9fe",
    ] {
        let denied = Guard::new().check_ip(ip.parse().unwrap()).unwrap_err();
        assert_eq!(denied.rule(), Rule::Address, "{ip}");
    }
}

#[test]
fn tunnels_are_refused_whatever_they_lead_to() {
    let (public, private) = (Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::new(10, 0, 0, 1));
    let guard = Guard::new();
    assert!(!passes(&guard, six_to_four(public, 0)));
    assert!(!passes(&guard, teredo(public, public, 0)));

    // An allow-list opens the tunnel, and not what is at its end.
    let open = Guard::new().allow(net("2002::/16")).allow(net("2001::/32"));
    assert!(passes(&open, six_to_four(public, 1)));
    assert!(!passes(&open, six_to_four(private, 1)));
    assert!(passes(&open, teredo(public, public, 1)));
    assert!(!passes(&open, teredo(private, public, 1)));
    assert!(!passes(&open, teredo(public, private, 1)));
}

#[test]
fn a_network_opened_in_ipv6_opens_none_in_ipv4() {
    let guard = Guard::new().allow(net("::/0"));
    assert!(passes(&guard, "::1".parse().unwrap()));
    assert!(passes(&guard, "fd00::1".parse().unwrap()));
    for ip in [
        "127.0.0.1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ] {
        assert!(!passes(&guard, ip.parse().unwrap()), "{ip}");
    }
}

#[test]
fn a_v4_mapped_network_is_the_ipv4_network() {
    let guard = Guard::new()
        .allow(net("::ffff:10.0.0.0/104"))
        .deny(net("::ffff:10.1.0.0/112"));
    assert!(passes(&guard, "10.2.0.1".parse().unwrap()));
    assert!(!passes(&guard, "192.168.0.1".parse().unwrap()));
    assert_eq!(
        guard.check_ip("10.1.0.1".parse().unwrap()),
        Err(Denied::new(Rule::DenyList))
    );
}

fn verdict(guard: &Guard, uri: &str) -> Result<(), Rule> {
    let uri: Uri = uri.parse().unwrap_or_else(|_| panic!("{uri}"));
    guard.check_uri(&uri).map_err(|denied| denied.rule())
}

#[test]
fn uris_are_judged_before_anything_is_resolved() {
    let guard = Guard::new();
    for (uri, expected) in [
        ("https://example.com", Ok(())),
        ("https://example.com:8443/hook?a=b", Ok(())),
        ("https://EXAMPLE.com./", Ok(())),
        ("https://under_score.example-1.com/", Ok(())),
        ("https://1.2.3.4.example/", Ok(())),
        ("https://0xdead.example/", Ok(())),
        ("https://intranet/", Ok(())),
        ("https://localhost.example.com/", Ok(())),
        ("https://notlocalhost/", Ok(())),
        ("https://1.1.1.1/", Ok(())),
        ("https://[2606:4700::1111]:443/", Ok(())),
        ("https://[::ffff:1.1.1.1]/", Ok(())),
        ("https://[64:ff9b::1.1.1.1]/", Ok(())),
        ("http://example.com/", Err(Rule::Scheme)),
        ("ftp://example.com/", Err(Rule::Scheme)),
        ("file://example.com/etc/passwd", Err(Rule::Scheme)),
        ("/hook", Err(Rule::Scheme)),
        ("example.com", Err(Rule::Scheme)),
        ("https://user@example.com/", Err(Rule::Userinfo)),
        ("https://user:pass@example.com/", Err(Rule::Userinfo)),
        ("https://example.com@10.0.0.1/", Err(Rule::Userinfo)),
        ("https://@example.com/", Err(Rule::Userinfo)),
        ("https://example.com:0/", Err(Rule::Port)),
        ("https://127.1/", Err(Rule::Host)),
        ("https://2130706433/", Err(Rule::Host)),
        ("https://0x7f.1/", Err(Rule::Host)),
        ("https://0X7F000001/", Err(Rule::Host)),
        ("https://0x/", Err(Rule::Host)),
        ("https://0177.0.0.1/", Err(Rule::Host)),
        ("https://127.0.0.1./", Err(Rule::Host)),
        ("https://1.1.1.1./", Err(Rule::Host)),
        ("https://01.1.1.1/", Err(Rule::Host)),
        ("https://256.1.1.1/", Err(Rule::Host)),
        ("https://1.1.1.1.1/", Err(Rule::Host)),
        ("https://0/", Err(Rule::Host)),
        ("https://example.0/", Err(Rule::Host)),
        ("https://example..com/", Err(Rule::Host)),
        ("https://.example.com/", Err(Rule::Host)),
        ("https://example.com../", Err(Rule::Host)),
        ("https://exa$mple.com/", Err(Rule::Host)),
        ("https://exa~mple.com/", Err(Rule::Host)),
        ("https://127.0.0.1/", Err(Rule::Address)),
        ("https://0.0.0.0/", Err(Rule::Address)),
        ("https://[::]/", Err(Rule::Address)),
        ("https://[::1]/", Err(Rule::Address)),
        ("https://[::ffff:7f00:1]/", Err(Rule::Address)),
        ("https://[::127.0.0.1]/", Err(Rule::Address)),
        ("https://localhost/", Err(Rule::Address)),
        ("https://LocalHost.:9200/", Err(Rule::Address)),
        ("https://app.localhost/", Err(Rule::Address)),
    ] {
        assert_eq!(verdict(&guard, uri), expected, "{uri}");
    }
    let long = "a".repeat(64);
    assert_eq!(
        verdict(&guard, &format!("https://{long}.com/")),
        Err(Rule::Host)
    );
    let long = "a.".repeat(127);
    assert_eq!(verdict(&guard, &format!("https://{long}/")), Ok(()));
    assert_eq!(
        verdict(&guard, &format!("https://{long}a/")),
        Err(Rule::Host)
    );
}

#[test]
fn what_is_set_is_let_through() {
    let guard = Guard::new().allow_http().port(443).port(8080);
    assert_eq!(verdict(&guard, "http://example.com:8080/"), Ok(()));
    assert_eq!(verdict(&guard, "https://example.com/"), Ok(()));
    assert_eq!(verdict(&guard, "http://example.com/"), Err(Rule::Port));
    assert_eq!(
        verdict(&guard, "https://example.com:6379/"),
        Err(Rule::Port)
    );
    assert_eq!(verdict(&guard, "ws://example.com:8080/"), Err(Rule::Scheme));

    // Either family's loopback is enough for the name of both.
    for loopback in ["127.0.0.0/8", "::1/128"] {
        let guard = Guard::new().allow(net(loopback));
        assert_eq!(verdict(&guard, "https://localhost/"), Ok(()));
    }
    let denied = Guard::new().deny(net("1.1.1.0/24"));
    assert_eq!(verdict(&denied, "https://1.1.1.1/"), Err(Rule::DenyList));
    assert_eq!(
        verdict(&denied, "https://[64:ff9b::1.1.1.1]/"),
        Err(Rule::DenyList)
    );
}

#[test]
fn a_denial_is_found_in_what_it_caused_and_tells_no_address() {
    let denied = Guard::new().check_ip([10, 11, 12, 13].into()).unwrap_err();
    assert_eq!(denied.to_string(), "the address is not a public one");
    assert!(!format!("{denied:?}").contains("11"));
    assert!(denied.source().is_none());

    assert_eq!(Denied::of(&denied), Some(&denied));
    let wrapped = io::Error::other(io::Error::other(denied));
    assert_eq!(Denied::of(&wrapped), Some(&denied));
    assert_eq!(Denied::of(&io::Error::other("no")), None);
}

/// What `inet_aton` takes for an address: one to four numbers, decimal, octal
/// or hexadecimal, of which the last fills what is left.
fn inet_aton(host: &str) -> Option<Ipv4Addr> {
    let parts: Vec<u64> = host
        .split('.')
        .map(|part| match part {
            _ if part.starts_with("0x") => u64::from_str_radix(&part[2..], 16).ok(),
            "0" => Some(0),
            _ if part.starts_with('0') => u64::from_str_radix(&part[1..], 8).ok(),
            _ => part.parse().ok(),
        })
        .collect::<Option<_>>()?;
    let (last, first) = parts.split_last()?;
    let left = 4_u32.checked_sub(u32::try_from(first.len()).ok()?)?;
    if first.iter().any(|part| *part > 255) || left == 0 || *last >= 1 << (8 * left) {
        return None;
    }
    let head = first.iter().zip([24, 16, 8]);
    let head = head.fold(0, |sum, (part, shift)| sum | (part << shift));
    Some(u32::try_from(head | last).unwrap().into())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn v4_is_judged_as_the_registry_says(ip in any_v4()) {
        prop_assert_eq!(passes(&Guard::new(), ip.into()), public_v4(ip));
    }

    #[test]
    fn v6_is_judged_as_the_registry_says(ip in any_v6()) {
        let expected = if let Some(v4) = ip.to_ipv4_mapped() {
            public_v4(v4)
        } else if inside(ip.into(), net("64:ff9b::/96")) {
            public_v4(Ipv4Addr::from(u32::try_from(u128::from(ip) & 0xffff_ffff).unwrap()))
        } else {
            public_v6(ip)
        };
        prop_assert_eq!(passes(&Guard::new(), ip.into()), expected);
    }

    #[test]
    fn an_embedded_address_is_judged_as_itself(
        (v4, other) in (any_v4(), any_v4()),
        (rest, flags) in (any::<u128>(), any::<u32>()),
        allowed in prop::option::of(any_network()),
        denied in prop::option::of(any_network()),
    ) {
        let mut guard = Guard::new()
            .allow(net("2002::/16"))
            .allow(net("2001::/32"));
        if let Some(allowed) = allowed {
            guard = guard.allow(allowed.into());
        }
        if let Some(denied) = denied {
            guard = guard.deny(denied.into());
        }
        let model = |v4: Ipv4Addr| {
            let within = |net: Option<Ipv4Net>| net.is_some_and(|net| inside(v4.into(), net.trunc().into()));
            !within(denied) && (within(allowed) || public_v4(v4))
        };
        prop_assert_eq!(passes(&guard, v4.into()), model(v4));
        prop_assert_eq!(passes(&guard, mapped(v4)), model(v4));
        prop_assert_eq!(passes(&guard, nat64(v4)), model(v4));
        prop_assert_eq!(passes(&guard, six_to_four(v4, rest)), model(v4));
        prop_assert_eq!(passes(&guard, teredo(v4, other, flags)), model(v4) && model(other));
        prop_assert!(!passes(&Guard::new(), six_to_four(v4, rest)));
        prop_assert!(!passes(&Guard::new(), teredo(v4, other, flags)));
    }

    #[test]
    fn no_resolver_sees_what_inet_aton_takes_for_an_address(
        host in r"(0x[0-9a-f]{0,9}|0[0-7]{0,11}|[0-9]{1,10})(\.(0x[0-9a-f]{0,5}|0[0-7]{0,4}|[0-9]{1,4})){0,4}\.?",
    ) {
        match Host::parse(&host) {
            Ok(Host::Name(name)) => prop_assert!(false, "{} is a name", name),
            Ok(Host::Address(ip)) => {
                prop_assert_eq!(Some(ip), inet_aton(&host).map(IpAddr::V4));
            }
            Err(denied) => prop_assert_eq!(denied.rule(), Rule::Host),
        }
    }

    #[test]
    fn any_host_is_a_name_an_address_or_refused(host in r"[a-zA-Z0-9._\[\]:%x-]{0,40}") {
        if let Ok(Host::Name(name)) = Host::parse(&host) {
            prop_assert_eq!(name, &host);
            prop_assert_eq!(inet_aton(name), None);
            prop_assert!(name.parse::<IpAddr>().is_err());
        }
    }
}
