//! The host of a URI: an address, a name, or what pretends to be one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Denied, Rule};

/// What the DNS can hold (RFC 1035 §2.3.4), the root's dot not counted.
const LONGEST_NAME: usize = 253;
const LONGEST_LABEL: usize = 63;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Host<'u> {
    Address(IpAddr),
    /// A name that no resolver takes for an address.
    Name(&'u str),
}

impl<'u> Host<'u> {
    /// Of a URI's host, with the brackets around an IPv6 address.
    ///
    /// It reads addresses as the connector does, so that what was judged is
    /// what is dialled.
    pub(super) fn parse(host: &'u str) -> Result<Self, Denied> {
        let denied = Denied::new(Rule::Host);
        if let Some(rest) = host.strip_prefix('[') {
            let inside = rest.strip_suffix(']').ok_or(denied)?;
            let v6: Ipv6Addr = inside.parse().map_err(|_| denied)?;
            return Ok(Self::Address(v6.into()));
        }
        if let Ok(v4) = host.parse::<Ipv4Addr>() {
            return Ok(Self::Address(v4.into()));
        }
        if is_name(host) {
            Ok(Self::Name(host))
        } else {
            Err(denied)
        }
    }
}

/// Letters, digits, hyphens and underscores in labels, the last of which is no
/// number.
///
/// `inet_aton` and all that descends from it take `127.1`, `0x7f.1` and
/// `2130706433` for addresses, and do not agree whether `0177.0.0.1` is
/// octal. No top-level domain is a number, so nothing is lost (the URL
/// standard of WHATWG draws the line in the same place).
fn is_name(host: &str) -> bool {
    let name = host.strip_suffix('.').unwrap_or(host);
    let last = name.rsplit('.').next().unwrap_or(name);
    name.len() <= LONGEST_NAME && name.split('.').all(is_label) && !is_number(last)
}

fn is_label(label: &str) -> bool {
    (1..=LONGEST_LABEL).contains(&label.len())
        && label
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

fn is_number(label: &str) -> bool {
    match label.as_bytes() {
        // The standard reads a bare `0x` as 0.
        [b'0', b'x' | b'X', hex @ ..] => hex.iter().all(u8::is_ascii_hexdigit),
        digits => digits.iter().all(u8::is_ascii_digit),
    }
}

/// RFC 6761 §6.3: these mean loopback, whatever a resolver says.
pub(super) fn is_localhost(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let last = name.rsplit('.').next().unwrap_or(name);
    last.eq_ignore_ascii_case("localhost")
}
