//! Who may be called: a guard against server-side request forgery.
//!
//! Whoever registers a webhook chooses where this service's machine sends
//! requests to, and that machine may reach what they cannot: the cloud's
//! metadata, databases, the neighbour's port. A [`Guard`] says which addresses
//! may be dialled. The connector (`GuardedConnector`, feature `connector`) asks
//! it at the moment of dialling, of the very address that the socket is then
//! opened to. So a name that answered with a public address at registration
//! and with `127.0.0.1` today (DNS rebinding) gets no connection.
//!
//! ```text
//! URI ─▶ scheme, userinfo, port, host ─┬─ an address ─────────────▶ judged ─▶ dialled
//!                                      └─ a name ─▶ resolver ─▶ each judged ─▶ what is left is dialled
//! ```
//!
//! # What is judged, and how
//!
//! | What | Rule, unless set otherwise |
//! |---|---|
//! | Scheme | `https`; `http` with [`allow_http`](Guard::allow_http); nothing else |
//! | Userinfo (`https://user@host/`) | refused: it makes one host look like another |
//! | Port | any but 0; with [`port`](Guard::port) those that were named |
//! | Host that is nearly an address (`127.1`, `2130706433`, `0x7f.1`, `0177.0.0.1`) | refused, and no resolver sees it: what it means depends on who reads it |
//! | `localhost` and names under it | as 127.0.0.1 and `::1` are judged (RFC 6761) |
//! | Any other name | resolved at each dial; its addresses that may not be dialled are left out, and none left is a refusal |
//! | IPv4 | public, unless in a block of IANA's special-purpose registry, multicast (224.0.0.0/4) or 168.63.129.16 (the host's own service in Azure) |
//! | IPv6 | public within 2000::/3, unless in 2001::/23 (Teredo, benchmarks, ORCHID …), 2001:db8::/32, 2002::/16 (6to4), 2620:4f:8000::/48 or 3fff::/20 |
//! | `::ffff:0:0/96`, v4-mapped | is the IPv4 address to the system, and judged as that alone |
//! | `64:ff9b::/96`, NAT64 | as the IPv4 address inside: behind DNS64 every IPv4 host looks so |
//! | 2002::/16, 2001::/32 with an allow-list that names them | as the IPv4 addresses inside |
//! | `64:ff9b:1::/48`, `fc00::/7`, `fe80::/10`, `::`, `::1` and all else outside 2000::/3 | refused |
//!
//! [`allow`](Guard::allow) opens a network, for tests and for receivers in
//! one's own house; [`deny`](Guard::deny) closes one, and wins. An IPv6 address
//! with an IPv4 address inside is dialled only if each of the two may be.
//!
//! # What it cannot do
//!
//! - **A proxy resolves for itself.** Behind a forward proxy the guard sees the
//!   proxy's address and nothing else: let the proxy judge. None is taken from
//!   the environment.
//! - **A client that is not built on `GuardedConnector` is not guarded.**
//!   [`check_uri`](Guard::check_uri) at registration is good manners towards
//!   those who mistype, and no protection.
//! - **A redirect is a new request.** On a guarded client it is judged like the
//!   first, but follow none: hyper-util's client does not.
//! - **It knows the public registries, not your network.** Public addresses of
//!   one's own that are open only from inside, and a NAT64 prefix of one's own,
//!   want a [`deny`](Guard::deny).
//! - **It judges connections.** One that is kept alive was judged when it was
//!   made.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::{Uri, uri::Scheme};
use ipnet::{IpNet, Ipv4Net};

mod address;
#[cfg(feature = "connector")]
mod connect;
mod denied;
mod host;
#[cfg(test)]
mod tests;

#[cfg(feature = "client")]
pub(crate) use self::connect::timed_out;
#[cfg(feature = "connector")]
pub use self::connect::{Connecting, GuardedConnector};
pub use self::denied::{Denied, Rule};

use self::host::Host;

/// Which addresses may be dialled: the [module](self) has the table.
///
/// The default lets `https` through to public addresses, at any port.
///
/// ```
/// use buttress_delivery::guard::{Guard, Rule};
/// use http::Uri;
///
/// let guard = Guard::new();
/// let denied = |uri| guard.check_uri(&Uri::from_static(uri)).unwrap_err().rule();
///
/// assert!(guard.check_uri(&Uri::from_static("https://example.com/hook")).is_ok());
/// assert_eq!(denied("https://169.254.169.254/latest"), Rule::Address);
/// assert_eq!(denied("https://[::ffff:10.0.0.1]/"), Rule::Address);
/// assert_eq!(denied("https://127.1/"), Rule::Host);
/// assert_eq!(denied("http://example.com/"), Rule::Scheme);
///
/// let ours = Guard::new()
///     .allow("10.20.0.0/16".parse()?)
///     .deny("10.20.0.1/32".parse()?);
/// assert!(ours.check_ip([10, 20, 3, 4].into()).is_ok());
/// assert!(ours.check_ip([10, 20, 0, 1].into()).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Guard {
    http: bool,
    ports: Vec<u16>,
    allowed: Vec<IpNet>,
    denied: Vec<IpNet>,
}

impl Guard {
    /// Public addresses over `https`, and nothing else.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            http: false,
            ports: Vec::new(),
            allowed: Vec::new(),
            denied: Vec::new(),
        }
    }

    /// Lets this network be dialled, public or not.
    ///
    /// A v4-mapped network (`::ffff:10.0.0.0/104`) is the IPv4 network. An
    /// IPv6 network says nothing of the IPv4 addresses inside its addresses:
    /// `::/0` opens no way to 127.0.0.1.
    #[must_use]
    pub fn allow(mut self, network: IpNet) -> Self {
        self.allowed.push(canonical(network));
        self
    }

    /// Closes this network, even where [`allow`](Self::allow) opens it, and in
    /// each form that embeds it: v4-mapped, NAT64, 6to4, Teredo.
    #[must_use]
    pub fn deny(mut self, network: IpNet) -> Self {
        self.denied.push(canonical(network));
        self
    }

    /// Lets `http` through beside `https`.
    #[must_use]
    pub const fn allow_http(mut self) -> Self {
        self.http = true;
        self
    }

    /// Lets this port through, and only those that are named so. Without, any
    /// port.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.ports.push(port);
        self
    }

    /// Whether this address may be dialled.
    ///
    /// # Errors
    ///
    /// If not: with [`Rule::DenyList`] or [`Rule::Address`].
    pub fn check_ip(&self, ip: IpAddr) -> Result<(), Denied> {
        match self.judge(ip) {
            Ok(()) => Ok(()),
            Err((rule, block)) => {
                // The operator may know what the address was; the one who
                // chose the name, and reads the error, would map our network.
                tracing::debug!(%ip, block, "an address was not dialled");
                Err(Denied::new(rule))
            }
        }
    }

    /// What can be said of a URI before its name is resolved.
    ///
    /// For the moment somebody registers it: a good answer promises nothing of
    /// what the name will resolve to. `GuardedConnector` asks the same, and
    /// then of each address.
    ///
    /// # Errors
    ///
    /// If it could never be dialled; the rule says why.
    pub fn check_uri(&self, uri: &Uri) -> Result<(), Denied> {
        self.host_of(uri).map(|_| ())
    }

    fn host_of<'u>(&self, uri: &'u Uri) -> Result<Host<'u>, Denied> {
        let default_port = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTPS => 443,
            Some(scheme) if *scheme == Scheme::HTTP && self.http => 80,
            _ => return Err(Denied::new(Rule::Scheme)),
        };
        let authority = uri.authority().ok_or(Denied::new(Rule::Host))?;
        if authority.as_str().contains('@') {
            return Err(Denied::new(Rule::Userinfo));
        }
        let port = match authority.port() {
            Some(port) => port.as_u16(),
            None => default_port,
        };
        if port == 0 || (!self.ports.is_empty() && !self.ports.contains(&port)) {
            return Err(Denied::new(Rule::Port));
        }
        let host = Host::parse(authority.host())?;
        match host {
            Host::Address(ip) => self.check_ip(ip)?,
            Host::Name(name) if host::is_localhost(name) => {
                let v4 = self.check_ip(Ipv4Addr::LOCALHOST.into());
                v4.or_else(|_| self.check_ip(Ipv6Addr::LOCALHOST.into()))?;
            }
            Host::Name(_) => {}
        }
        Ok(host)
    }

    fn judge(&self, ip: IpAddr) -> Result<(), (Rule, &'static str)> {
        // The system dials the IPv4 address, so there is no other.
        let ip = ip.to_canonical();
        if contains(&self.denied, ip) {
            return Err((Rule::DenyList, "deny-list"));
        }
        if !contains(&self.allowed, ip)
            && let Some(block) = address::special(ip)
        {
            return Err((Rule::Address, block));
        }
        if let IpAddr::V6(v6) = ip {
            for inside in address::embedded(v6).into_iter().flatten() {
                self.judge(inside.into())?;
            }
        }
        Ok(())
    }
}

fn contains(networks: &[IpNet], ip: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&ip))
}

/// Addresses are judged in their canonical form, so networks are written in it.
fn canonical(network: IpNet) -> IpNet {
    if let IpNet::V6(v6) = network
        && let Some(v4) = v6.addr().to_ipv4_mapped()
        && let Some(length) = v6.prefix_len().checked_sub(96)
        && let Ok(v4) = Ipv4Net::new(v4, length)
    {
        return v4.into();
    }
    network
}
