//! The addresses that proxies report, from the nearest to the farthest.
//!
//! Every proxy appends what it saw to the right, so the lists are read from
//! the right, and each element by itself: what a client sent stands to the
//! left and cannot change how an element to its right is read. That is why
//! `Forwarded` is split backwards, too, and not by a parser that comes from
//! the left and that an open quote would mislead.

use std::net::{IpAddr, Ipv6Addr};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{extract::is_token, value::Address};

/// Whose list it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Syntax {
    /// Addresses between commas.
    Plain,
    /// RFC 7239.
    Forwarded,
}

/// The hops of all lines of `name` from the right; `None` for one that does
/// not tell its address. Empty elements are no hops (RFC 9110 §5.6.1.2).
pub(super) fn hops(
    headers: &HeaderMap,
    name: &HeaderName,
    syntax: Syntax,
) -> impl Iterator<Item = Option<Address>> {
    headers
        .get_all(name)
        .iter()
        .rev()
        .flat_map(move |line| Elements {
            rest: Some(HeaderValue::as_bytes(line)),
            syntax,
        })
        .map(move |element| match syntax {
            Syntax::Plain => plain_node(element),
            Syntax::Forwarded => forwarded_for(element),
        })
}

/// The non-empty elements of one line from the right.
struct Elements<'a> {
    rest: Option<&'a [u8]>,
    syntax: Syntax,
}

impl<'a> Iterator for Elements<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        loop {
            let rest = self.rest?;
            let comma = match self.syntax {
                Syntax::Plain => rest.iter().rposition(|byte| *byte == b','),
                Syntax::Forwarded => last_comma(rest),
            };
            let element = match comma {
                Some(comma) => {
                    self.rest = Some(&rest[..comma]);
                    &rest[comma + 1..]
                }
                None => {
                    self.rest = None;
                    rest
                }
            };
            let element = element.trim_ascii();
            if !element.is_empty() {
                return Some(element);
            }
        }
    }
}

/// The last comma outside quotes, where quotes are told from the right: one
/// behind an odd number of backslashes is escaped. On well-formed text that
/// is what a parser from the left finds.
fn last_comma(line: &[u8]) -> Option<usize> {
    let mut quoted = false;
    let mut at = line.len();
    while let Some(before) = at.checked_sub(1) {
        at = before;
        match line[at] {
            b',' if !quoted => return Some(at),
            b'"' => {
                let backslashes = line[..at]
                    .iter()
                    .rev()
                    .take_while(|byte| **byte == b'\\')
                    .count();
                if backslashes % 2 == 0 {
                    quoted = !quoted;
                }
                at -= backslashes;
            }
            _ => {}
        }
    }
    None
}

/// The address of the one `for` parameter of a `Forwarded` element
/// (RFC 7239 §4).
fn forwarded_for(element: &[u8]) -> Option<Address> {
    let mut address = None;
    let mut rest = element;
    loop {
        let equals = rest.iter().position(|byte| *byte == b'=')?;
        let name = rest[..equals].trim_ascii();
        if name.is_empty() || !name.iter().copied().all(is_token) {
            return None;
        }
        let value = rest[equals + 1..].trim_ascii_start();
        let mut unescaped = [0; LONGEST_NODE];
        let (value, after) = if let Some(quoted) = value.strip_prefix(b"\"") {
            unquote(quoted, &mut unescaped)?
        } else {
            let end = value.iter().position(|byte| *byte == b';');
            let (value, after) = value.split_at(end.unwrap_or(value.len()));
            if value.contains(&b'"') {
                return None;
            }
            (Some(value.trim_ascii()), after)
        };
        if name.eq_ignore_ascii_case(b"for") {
            // Twice in one element is forbidden: which would count?
            if address.is_some() {
                return None;
            }
            address = Some(node(value?, true)?);
        }
        match after.trim_ascii_start() {
            [] => return address,
            [b';', more @ ..] if !more.trim_ascii().is_empty() => rest = more,
            // Some write a semicolon behind the last parameter.
            [b';', ..] => return address,
            _ => return None,
        }
    }
}

/// `[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]:65535` is shorter.
const LONGEST_NODE: usize = 64;

/// The unescaped text up to the closing quote (`None` if it is too long to
/// be a node), and what follows the quote. `None` where no quote closes.
fn unquote<'t, 'b>(
    text: &'t [u8],
    unescaped: &'b mut [u8; LONGEST_NODE],
) -> Option<(Option<&'b [u8]>, &'t [u8])> {
    let mut len = 0;
    let mut at = 0;
    loop {
        let byte = match *text.get(at)? {
            b'"' => break,
            b'\\' => {
                at += 1;
                *text.get(at)?
            }
            byte => byte,
        };
        if let Some(slot) = unescaped.get_mut(len) {
            *slot = byte;
        }
        len += 1;
        at += 1;
    }
    let unescaped: &'b [u8] = unescaped;
    Some((unescaped.get(..len), &text[at + 1..]))
}

/// An element of `X-Forwarded-For` or of a header with one address. Quotes
/// are not its custom, but some proxies write them.
fn plain_node(element: &[u8]) -> Option<Address> {
    let bare = match element {
        [b'"', inner @ .., b'"'] => inner.trim_ascii(),
        other => other,
    };
    node(bare, false)
}

/// An address with or without port, an IPv6 address with or without brackets.
/// `None` for `unknown`, obfuscated identifiers, zones and all else.
fn node(text: &[u8], obfuscated_port: bool) -> Option<Address> {
    if text.len() > LONGEST_NODE {
        return None;
    }
    let text = std::str::from_utf8(text).ok()?;
    let (address, port) = if let Some(bracketed) = text.strip_prefix('[') {
        let (address, port) = bracketed.split_once(']')?;
        let port = match port {
            "" => None,
            port => Some(port.strip_prefix(':')?),
        };
        (IpAddr::V6(address.parse::<Ipv6Addr>().ok()?), port)
    } else {
        match text.split_once(':') {
            None => (IpAddr::V4(text.parse().ok()?), None),
            // A second colon: IPv6 without brackets has no port.
            Some((_, port)) if port.contains(':') => (IpAddr::V6(text.parse().ok()?), None),
            Some((address, port)) => (IpAddr::V4(address.parse().ok()?), Some(port)),
        }
    };
    let sound = port.is_none_or(|port| {
        let digits = (1..=5).contains(&port.len()) && port.bytes().all(|b| b.is_ascii_digit());
        (digits && port.parse::<u16>().is_ok())
            || (obfuscated_port && port.len() > 1 && port.starts_with('_'))
    });
    sound.then(|| address.into())
}
