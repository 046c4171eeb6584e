//! The client's address, behind trusted proxies only.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use http::{Extensions, HeaderMap, HeaderName};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{
    ExtractKey, Key, ParseError,
    forwarded::{self, Syntax},
    value::Address,
};
use crate::request::Head;

const FORWARDED: HeaderName = http::header::FORWARDED;
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// How far the walk goes. Real chains have a handful of proxies; a longer
/// list is somebody's attempt to keep us busy.
const MOST_HOPS: usize = 64;

/// The peer of the connection that a request came over, as an extension: for
/// servers that neither axum's `ConnectInfo` nor tonic's `TcpConnectInfo`
/// serves.
///
/// ```
/// use std::net::SocketAddr;
/// use buttress_core::key::PeerAddr;
/// use http::Request;
///
/// # let peer: SocketAddr = "192.0.2.1:50000".parse().unwrap();
/// // In the accept loop, `peer` being what `accept` returned:
/// let mut request = Request::new(());
/// request.extensions_mut().insert(PeerAddr(peer));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PeerAddr(pub SocketAddr);

/// Where trusted proxies write the client's address.
///
/// A proxy that sets one header hands on whatever the client sent in the
/// others. Name the header that yours sets, or see to it that it removes the
/// rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// `X-Forwarded-For`, and `Forwarded` only where the request has no
    /// `X-Forwarded-For` at all.
    #[default]
    Either,
    /// `X-Forwarded-For` alone.
    XForwardedFor,
    /// `Forwarded` (RFC 7239) alone.
    Forwarded,
    /// A header of one address, such as `X-Real-IP` or `CF-Connecting-IP`
    /// (or a list of them like `X-Forwarded-For`).
    Header(HeaderName),
}

/// Extracts the client's address.
///
/// That is the peer of the connection, unless the peer is a proxy that you
/// [`trust`](Self::trust). Then its header is read from the right, all lines
/// as one list, over every trusted hop, to the first that is not trusted: the
/// client, as the last proxy of yours saw it. What stands further left was
/// sent by the client, and may be anything.
///
/// ```text
///   peer 10.0.0.1    X-Forwarded-For:  6.6.6.6,  192.0.2.7,  10.0.0.2
///        trusted ───────────────────────────────────────────▶ trusted
///                                                ◀── client ──┘
///                                      (never read)
/// ```
///
/// - From a peer that is not trusted no header is read.
/// - Ports, brackets and quotes are understood, and an IPv4 address mapped
///   into IPv6 is the IPv4 address wherever it stands.
/// - Where a hop is not an address (`unknown`, `_hidden`, junk), the walk ends
///   at the hop before, which vouched for it: the peer, if there was none.
///   Nothing left of junk is believed.
/// - Where every hop is trusted, the leftmost is the client; the walk ends
///   after 64.
/// - Without a peer (a Unix socket) there is no address and no key.
///
/// The key is the address with its last bits cut off: IPv6 to a /64, since
/// that is what one subscriber has (RFC 6177), IPv4 whole.
/// [`address`](Self::address) is not cut.
///
/// The peer is found in the extensions [`PeerAddr`], axum's `ConnectInfo`
/// (feature `axum`: `into_make_service_with_connect_info::<SocketAddr>()`)
/// and tonic's `TcpConnectInfo` (feature `tonic`), or where
/// [`peer_from`](Self::peer_from) says. Nothing here allocates.
///
/// ```
/// use std::net::SocketAddr;
/// use buttress_core::{Head, key::{ClientIp, ExtractKey, PeerAddr}};
/// use http::Request;
///
/// let client_ip = ClientIp::new().trust(["10.0.0.0/8", "2001:db8::1"])?;
/// let request = Request::builder()
///     .extension(PeerAddr(SocketAddr::from(([10, 0, 0, 1], 443))))
///     .header("x-forwarded-for", "6.6.6.6, 192.0.2.7, 10.0.0.2")
///     .body(())
///     .unwrap();
///
/// let head = Head::from(&request);
/// let address = client_ip.address(head).unwrap();
/// assert_eq!(address.to_string(), "192.0.2.7");
/// assert_eq!(client_ip.extract(head), Some(client_ip.key(address)));
/// # Ok::<(), buttress_core::key::ParseError>(())
/// ```
#[derive(Clone)]
pub struct ClientIp {
    trusted: Arc<Trusted>,
    source: Source,
    ipv4_mask: u32,
    ipv6_mask: u128,
    peer: Option<Arc<PeerFrom>>,
}

type PeerFrom = dyn Fn(&Extensions) -> Option<IpAddr> + Send + Sync;

/// Networks in order, none inside another.
#[derive(Clone, Debug, Default)]
struct Trusted {
    v4: Vec<Ipv4Net>,
    v6: Vec<Ipv6Net>,
}

impl Trusted {
    #[inline]
    fn contains(&self, address: Address) -> bool {
        if self.v4.is_empty() && self.v6.is_empty() {
            return false;
        }
        self.search(address)
    }

    fn search(&self, address: Address) -> bool {
        match address {
            Address::V4(bits) => {
                let address = Ipv4Addr::from_bits(bits);
                let after = self.v4.partition_point(|net| net.network() <= address);
                after > 0 && self.v4[after - 1].contains(&address)
            }
            Address::V6(bits) => {
                let address = Ipv6Addr::from_bits(bits);
                let after = self.v6.partition_point(|net| net.network() <= address);
                after > 0 && self.v6[after - 1].contains(&address)
            }
        }
    }
}

impl ClientIp {
    /// The peer of the connection: no proxy is trusted.
    #[must_use]
    pub fn new() -> Self {
        Self {
            trusted: Arc::default(),
            source: Source::default(),
            ipv4_mask: u32::MAX,
            ipv6_mask: u128::MAX << 64,
            peer: None,
        }
    }

    /// Trusts the proxies in these networks, beside those named before.
    /// A bare address is itself alone; bits beyond the prefix do not count
    /// (`10.1.2.3/8` is `10.0.0.0/8`). IPv4 addresses are matched by IPv4
    /// networks (and those mapped into `::ffff:0:0/96`) only, not by `::/0`.
    ///
    /// Name only what is yours: every address in here may choose the client
    /// address of its requests.
    ///
    /// # Errors
    ///
    /// Where one is neither an address nor a network, naming it.
    ///
    /// ```
    /// use buttress_core::key::ClientIp;
    ///
    /// let error = ClientIp::new().trust(["10.0.0.0/8", "10.0.0.0/33"]).unwrap_err();
    /// assert!(error.to_string().contains("10.0.0.0/33"));
    /// ```
    pub fn trust<I>(mut self, networks: I) -> Result<Self, ParseError>
    where
        I: IntoIterator<Item: AsRef<str>>,
    {
        let trusted = Arc::make_mut(&mut self.trusted);
        for network in networks {
            match parse_network(network.as_ref())? {
                IpNet::V4(network) => trusted.v4.push(network),
                IpNet::V6(network) => trusted.v6.push(network),
            }
        }
        // Sorted and without overlap: what the search needs.
        trusted.v4 = Ipv4Net::aggregate(&trusted.v4);
        trusted.v6 = Ipv6Net::aggregate(&trusted.v6);
        trusted.v4.sort_unstable();
        trusted.v6.sort_unstable();
        Ok(self)
    }

    /// Where trusted proxies write the client's address; by default
    /// [`Source::Either`].
    #[must_use]
    pub fn source(mut self, source: Source) -> Self {
        self.source = source;
        self
    }

    /// Counts IPv6 addresses by networks of this prefix, 1 to 128; by default
    /// 64.
    ///
    /// # Errors
    ///
    /// Where `bits` is out of this range.
    pub fn ipv6_prefix(mut self, bits: u8) -> Result<Self, ParseError> {
        match bits {
            1..=128 => {
                self.ipv6_mask = u128::MAX << (128 - bits);
                Ok(self)
            }
            _ => Err(ParseError(format!(
                "an IPv6 prefix of {bits} bits: expected 1 to 128"
            ))),
        }
    }

    /// Counts IPv4 addresses by networks of this prefix, 1 to 32; by default
    /// 32.
    ///
    /// # Errors
    ///
    /// Where `bits` is out of this range.
    pub fn ipv4_prefix(mut self, bits: u8) -> Result<Self, ParseError> {
        match bits {
            1..=32 => {
                self.ipv4_mask = u32::MAX << (32 - bits);
                Ok(self)
            }
            _ => Err(ParseError(format!(
                "an IPv4 prefix of {bits} bits: expected 1 to 32"
            ))),
        }
    }

    /// Finds the peer through a closure over the request's extensions, and
    /// nowhere else: for another server's connection info, or to give a Unix
    /// socket, whose peer is a proxy on this machine, an address to trust.
    ///
    /// ```
    /// use std::net::{IpAddr, Ipv4Addr};
    /// use buttress_core::key::ClientIp;
    ///
    /// let behind_a_unix_socket = ClientIp::new()
    ///     .peer_from(|_| Some(IpAddr::V4(Ipv4Addr::LOCALHOST)))
    ///     .trust(["127.0.0.1"])?;
    /// # Ok::<(), buttress_core::key::ParseError>(())
    /// ```
    #[must_use]
    pub fn peer_from<F>(mut self, peer: F) -> Self
    where
        F: Fn(&Extensions) -> Option<IpAddr> + Send + Sync + 'static,
    {
        self.peer = Some(Arc::new(peer));
        self
    }

    /// The address at the other end of the connection, a proxy's or the
    /// client's.
    #[must_use]
    #[inline]
    pub fn peer(&self, request: Head<'_>) -> Option<IpAddr> {
        self.peer_address(request).map(IpAddr::from)
    }

    /// Whether `address` is one of the proxies trusted.
    #[must_use]
    #[inline]
    pub fn is_trusted(&self, address: IpAddr) -> bool {
        self.trusted.contains(address.into())
    }

    /// The client's address, not cut to a prefix: what an access log wants.
    #[must_use]
    #[inline]
    pub fn address(&self, request: Head<'_>) -> Option<IpAddr> {
        self.client(request).map(IpAddr::from)
    }

    #[inline]
    fn client(&self, request: Head<'_>) -> Option<Address> {
        let peer = self.peer_address(request)?;
        Some(if self.trusted.contains(peer) {
            self.walk(peer, request.headers)
        } else {
            peer
        })
    }

    #[inline]
    fn peer_address(&self, request: Head<'_>) -> Option<Address> {
        match &self.peer {
            Some(peer) => peer(request.extensions).map(Address::from),
            None => known_peer(request.extensions),
        }
    }

    /// The client's address as `peer`, which is trusted, reports it.
    #[inline(never)]
    fn walk(&self, peer: Address, headers: &HeaderMap) -> Address {
        let (name, syntax) = match &self.source {
            Source::Either if headers.contains_key(X_FORWARDED_FOR) => {
                (&X_FORWARDED_FOR, Syntax::Plain)
            }
            Source::Either | Source::Forwarded => (&FORWARDED, Syntax::Forwarded),
            Source::XForwardedFor => (&X_FORWARDED_FOR, Syntax::Plain),
            Source::Header(name) => (name, Syntax::Plain),
        };
        let mut known = peer;
        for hop in forwarded::hops(headers, name, syntax).take(MOST_HOPS) {
            match hop {
                None => break,
                Some(hop) if self.trusted.contains(hop) => known = hop,
                Some(client) => return client,
            }
        }
        known
    }

    /// The key of clients with this address: cut to the prefix.
    #[must_use]
    #[inline]
    pub fn key(&self, address: IpAddr) -> Key {
        self.cut(address.into()).into()
    }

    #[inline]
    fn cut(&self, address: Address) -> Address {
        match address {
            Address::V4(bits) => Address::V4(bits & self.ipv4_mask),
            Address::V6(bits) => Address::V6(bits & self.ipv6_mask),
        }
    }
}

impl Default for ClientIp {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for ClientIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientIp")
            .field("trusted", &self.trusted)
            .field("source", &self.source)
            .field("ipv4_prefix", &self.ipv4_mask.leading_ones())
            .field("ipv6_prefix", &self.ipv6_mask.leading_ones())
            .finish_non_exhaustive()
    }
}

impl ExtractKey for ClientIp {
    fn extract(&self, request: Head<'_>) -> Option<Key> {
        self.client(request).map(|address| self.cut(address).into())
    }
}

fn parse_network(text: &str) -> Result<IpNet, ParseError> {
    let text = text.trim();
    let network = text
        .parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| {
            ParseError(format!(
                "cannot trust {text:?}: expected an address or a network such as 10.0.0.0/8 or 2001:db8::/32"
            ))
        })?
        .trunc();
    // Peers are unmapped before they are looked for, so networks are, too.
    if let IpNet::V6(v6) = network
        && let Some(v4) = v6.network().to_ipv4_mapped()
        && let Some(bits) = v6.prefix_len().checked_sub(96)
    {
        return Ok(IpNet::V4(
            Ipv4Net::new(v4, bits).expect("at most 32 bits are left"),
        ));
    }
    Ok(network)
}

#[inline]
fn known_peer(extensions: &Extensions) -> Option<Address> {
    if let Some(PeerAddr(peer)) = extensions.get() {
        return Some(peer.into());
    }
    #[cfg(feature = "axum")]
    if let Some(axum::extract::ConnectInfo(peer)) =
        extensions.get::<axum::extract::ConnectInfo<SocketAddr>>()
    {
        return Some(peer.into());
    }
    // What `MockConnectInfo` puts in place of a connection in tests.
    #[cfg(feature = "axum")]
    if let Some(axum::extract::connect_info::MockConnectInfo(peer)) =
        extensions.get::<axum::extract::connect_info::MockConnectInfo<SocketAddr>>()
    {
        return Some(peer.into());
    }
    #[cfg(feature = "tonic")]
    if let Some(peer) = extensions
        .get::<tonic::transport::server::TcpConnectInfo>()
        .and_then(tonic::transport::server::TcpConnectInfo::remote_addr)
    {
        return Some((&peer).into());
    }
    None
}
