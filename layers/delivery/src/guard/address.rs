//! Which addresses are public.
//!
//! From IANA's registries of special-purpose addresses, IPv4 and IPv6
//! (RFC 6890 and its updates), of multicast, and of IPv6's global unicast
//! space. What they call globally reachable but nobody serves from (anycast of
//! relays, AS112) is refused like the rest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The special block that an address is in; of a public one, none.
///
/// A v4-mapped address has to be [made canonical](IpAddr::to_canonical) first.
pub(super) fn special(ip: IpAddr) -> Option<&'static str> {
    match ip {
        IpAddr::V4(v4) => special_v4(v4),
        IpAddr::V6(v6) => special_v6(v6),
    }
}

const fn special_v4(ip: Ipv4Addr) -> Option<&'static str> {
    Some(match ip.octets() {
        [0, ..] => "this network",
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => "private",
        [100, 64..=127, ..] => "shared by carriers",
        [127, ..] => "loopback",
        [169, 254, ..] => "link-local",
        // A public address by the registry, and the host's own agent to every
        // virtual machine in Azure.
        [168, 63, 129, 16] => "cloud host",
        [192, 0, 0, _] => "protocol assignments",
        [192, 0, 2, _] | [198, 51, 100, _] | [203, 0, 113, _] => "documentation",
        [192, 31, 196, _] | [192, 175, 48, _] => "AS112",
        [192, 52, 193, _] => "AMT",
        [192, 88, 99, _] => "6to4 relay",
        [198, 18..=19, ..] => "benchmarking",
        [224..=239, ..] => "multicast",
        [240..=255, ..] => "reserved",
        _ => return None,
    })
}

const fn special_v6(ip: Ipv6Addr) -> Option<&'static str> {
    Some(match ip.segments() {
        // NAT64 is judged by the address inside.
        [0x64, 0xff9b, 0, 0, 0, 0, _, _] => return None,
        [0..=0x1fff | 0x4000..=0xffff, ..] => "not global unicast",
        [0x2001, 0, ..] => "Teredo",
        [0x2001, 0..=0x1ff, ..] => "protocol assignments",
        [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => "documentation",
        [0x2002, ..] => "6to4",
        [0x2620, 0x4f, 0x8000, ..] => "AS112",
        _ => return None,
    })
}

/// The IPv4 addresses that an IPv6 address leads to.
///
/// NAT64 (RFC 6052 §2.1), 6to4 (RFC 3056 §2), and Teredo's server and client
/// (RFC 4380 §4, the client's with its bits turned over).
pub(super) const fn embedded(ip: Ipv6Addr) -> [Option<Ipv4Addr>; 2] {
    match ip.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => [Some(join(high, low)), None],
        [0x2002, high, low, ..] => [Some(join(high, low)), None],
        [0x2001, 0, high, low, _, _, client_high, client_low] => {
            [Some(join(high, low)), Some(join(!client_high, !client_low))]
        }
        _ => [None, None],
    }
}

const fn join(high: u16, low: u16) -> Ipv4Addr {
    let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
    Ipv4Addr::new(a, b, c, d)
}
