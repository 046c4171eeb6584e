//! The settings: what the file may say, what goes without saying, and what
//! makes no sense.
//!
//! The types here are the schema. A key that they do not name is an error, so
//! that a misspelt `rate_limt` can never mean "no limit". What a single value
//! must look like is in [`scalar`]; what several must be together is checked
//! by [`Settings::check`]. Both end in one [`Nonsense`]: the file, the key's
//! path, and what was expected.

mod breaker;
mod redis;
mod retry;
mod scalar;
mod show;
mod shutdown;
mod tls;
mod webhook;

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::Path,
    str::FromStr,
    time::Duration,
};

use buttress::rate_limit::Quota;
use config::{Config, ConfigError, File, FileFormat};
use http::HeaderName;
use ipnet::IpNet;
use scalar::{from_scalar, words};
use serde::{Deserialize, Deserializer};

pub(crate) use breaker::{CircuitBreaker, Per, Shared};
pub(crate) use redis::Redis;
pub(crate) use retry::{Budget, Retry};
pub(crate) use scalar::{Count, Delay, Name, Rate, Secret, Size, Span};
pub(crate) use shutdown::Shutdown;
pub(crate) use tls::Tls;
pub(crate) use webhook::{SignWebhook, VerifyWebhook};

/// Everything that can be set.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section of keys")]
pub(crate) struct Settings {
    pub(crate) listen: Address,
    pub(crate) admin: Address,
    #[serde(deserialize_with = "present")]
    pub(crate) tls: Option<Tls>,
    #[serde(deserialize_with = "present")]
    pub(crate) log_format: Option<LogFormat>,
    pub(crate) trusted_proxies: Vec<Network>,
    #[serde(deserialize_with = "present")]
    pub(crate) admin_token: Option<Secret>,
    #[serde(deserialize_with = "present")]
    pub(crate) redis: Option<Redis>,
    pub(crate) shutdown: Shutdown,
    pub(crate) limits: Limits,
    pub(crate) routes: Vec<Route>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: Address(([127, 0, 0, 1], 8080).into()),
            admin: Address(([127, 0, 0, 1], 9090).into()),
            tls: None,
            log_format: None,
            trusted_proxies: Vec::new(),
            admin_token: None,
            redis: None,
            shutdown: Shutdown::default(),
            limits: Limits::default(),
            routes: Vec::new(),
        }
    }
}

/// What one client may ask of us.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section of keys")]
pub(crate) struct Limits {
    pub(crate) max_body: Size,
    pub(crate) max_path: Size,
    pub(crate) max_headers: Size,
    pub(crate) header_timeout: Span,
    pub(crate) idle_timeout: Span,
    pub(crate) max_connections: Count,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_body: Size(10 << 20),
            max_path: Size(8 << 10),
            max_headers: Size(64 << 10),
            header_timeout: Span::secs(10),
            idle_timeout: Span::secs(75),
            max_connections: Count(10_000),
        }
    }
}

/// Requests for one path, and where they go.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section of keys")]
pub(crate) struct Route {
    pub(crate) name: Name,
    pub(crate) path: Prefix,
    #[serde(default, deserialize_with = "present")]
    pub(crate) host: Option<Host>,
    #[serde(default)]
    pub(crate) strip_prefix: bool,
    #[serde(default)]
    pub(crate) upstream: Vec<Upstream>,
    #[serde(default = "thirty_seconds")]
    pub(crate) timeout: Span,
    #[serde(default, deserialize_with = "present")]
    pub(crate) rate_limit: Option<RateLimit>,
    #[serde(default, deserialize_with = "present")]
    pub(crate) circuit_breaker: Option<CircuitBreaker>,
    #[serde(default, deserialize_with = "present")]
    pub(crate) retry: Option<Retry>,
    #[serde(default, deserialize_with = "present")]
    pub(crate) verify_webhook: Option<VerifyWebhook>,
    #[serde(default, deserialize_with = "present")]
    pub(crate) sign_webhook: Option<SignWebhook>,
}

impl Route {
    /// How long one attempt at a request may take.
    pub(crate) fn attempt(&self) -> Duration {
        let rule = self.retry.as_ref();
        rule.map_or(self.timeout.0, |rule| rule.attempt(self.timeout.0))
    }

    /// What the circuit breaker of this endpoint is called.
    pub(crate) fn breaker_at(&self, upstream: &Upstream) -> String {
        format!("{}@{}", self.name.0, upstream.authority)
    }
}

/// Reads what need not be there, but is. YAML takes a key with nothing behind
/// it for null, and serde takes that for an absent one: an empty `rate_limit:`
/// would be no limit, an empty `admin_token:` an open door.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

const fn thirty_seconds() -> Span {
    Span::secs(30)
}

/// How often.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section of keys")]
pub(crate) struct RateLimit {
    pub(crate) limit: Count,
    #[serde(default = "one_second")]
    pub(crate) period: Span,
    #[serde(default, deserialize_with = "present")]
    pub(crate) burst: Option<Count>,
    #[serde(default)]
    pub(crate) key: Key,
    #[serde(default = "x_ratelimit")]
    pub(crate) headers: Vec<LimitHeaders>,
    #[serde(default = "one_million")]
    pub(crate) max_keys: Count,
    #[serde(default)]
    pub(crate) mode: Mode,
    #[serde(default = "local")]
    pub(crate) on_store_error: OnStoreError,
}

impl RateLimit {
    pub(crate) fn quota(&self) -> Quota {
        Quota::new(self.limit.0, self.period.0).burst(self.burst.unwrap_or(self.limit).0)
    }
}

const fn one_second() -> Span {
    Span::secs(1)
}

fn x_ratelimit() -> Vec<LimitHeaders> {
    vec![LimitHeaders::XRateLimit]
}

const fn local() -> OnStoreError {
    OnStoreError::Local
}

const fn one_million() -> Count {
    Count(1_000_000)
}

from_scalar!(
    Address,
    Network,
    Prefix,
    Host,
    Upstream,
    Key,
    LimitHeaders,
    Mode,
    OnStoreError,
    LogFormat
);

/// An address to listen on; port 0 lets the system choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address(pub(crate) SocketAddr);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| {
            format!("expected an address with its port such as 127.0.0.1:8080, got `{text}`")
        })
    }
}

/// A network in CIDR notation, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Network(pub(crate) IpNet);

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<IpNet>()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
            .map(Self)
            .map_err(|_| {
                format!("expected a network such as 10.0.0.0/8 or one address, got `{text}`")
            })
    }
}

/// A path prefix without its trailing slash: `/` is the empty string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prefix(pub(crate) String);

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let sound = text.starts_with('/')
            && !text.contains("//")
            && !text.split('/').any(|segment| matches!(segment, "." | ".."))
            && text
                .bytes()
                .all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#' | b'\\' | b'*'));
        if sound {
            Ok(Self(text.strip_suffix('/').unwrap_or(text).to_owned()))
        } else {
            Err(format!(
                "expected a path such as /orders, without query, wildcard or dot segments, got `{text}`"
            ))
        }
    }
}

/// The name of a virtual host, in lower case, without a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host(pub(crate) String);

impl FromStr for Host {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<http::uri::Authority>()
            .ok()
            // A wildcard would be one that no request ever has.
            .filter(|host| host.host() == text && !text.contains('*'))
            .map(|host| Self(host.host().to_ascii_lowercase()))
            .ok_or_else(|| {
                format!("expected a host name without a port such as api.example.com, got `{text}`")
            })
    }
}

/// Which protocol an upstream speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 without TLS, by prior knowledge.
    H2c,
}

/// One endpoint of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Upstream {
    pub(crate) protocol: Protocol,
    /// Host and port.
    pub(crate) authority: String,
}

impl FromStr for Upstream {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected http://HOST:PORT or h2c://HOST:PORT, got `{text}`");
        let (scheme, authority) = text.split_once("://").ok_or_else(expected)?;
        let protocol = match scheme {
            "http" => Protocol::Http1,
            "h2c" => Protocol::H2c,
            "https" => return Err(format!("https is not built in yet: {}", expected())),
            _ => return Err(expected()),
        };
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let parsed: http::uri::Authority = authority.parse().map_err(|_| expected())?;
        if parsed.host().is_empty() || authority.contains('@') {
            return Err(expected());
        }
        let authority = match parsed.port() {
            Some(port) if port.as_u16() == 0 => return Err(expected()),
            Some(_) => authority.to_owned(),
            // There is something behind the host, but no port.
            None if authority != parsed.host() => return Err(expected()),
            None => format!("{authority}:80"),
        };
        Ok(Self {
            protocol,
            authority,
        })
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.protocol {
            Protocol::Http1 => "http",
            Protocol::H2c => "h2c",
        };
        write!(f, "{scheme}://{}", self.authority)
    }
}

/// What a client is told apart by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Key {
    #[default]
    ClientIp,
    Global,
    Header(HeaderName),
    Cookie(String),
}

impl FromStr for Key {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected =
            || format!("expected client_ip, global, header:NAME or cookie:NAME, got `{text}`");
        match text.split_once(':') {
            None if text == "client_ip" => Ok(Self::ClientIp),
            None if text == "global" => Ok(Self::Global),
            Some(("header", name)) => name.parse().map(Self::Header).map_err(|_| expected()),
            // A cookie's name is a token, as a header's is, but keeps its case.
            Some(("cookie", name)) if name.parse::<HeaderName>().is_ok() => {
                Ok(Self::Cookie(name.to_owned()))
            }
            _ => Err(expected()),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClientIp => f.write_str("client_ip"),
            Self::Global => f.write_str("global"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Cookie(name) => write!(f, "cookie:{name}"),
        }
    }
}

words!(
    /// Which headers tell a client its limit.
    LimitHeaders { XRateLimit = "x-ratelimit", Draft = "draft" }
);
words!(
    /// How the log is written.
    LogFormat { Text = "text", Json = "json" }
);

words!(
    /// How the limiter charges where processes share its state: each request
    /// in Redis, or a share ahead.
    #[derive(Default)]
    Mode { #[default] Strict = "strict", Leased = "leased" }
);
words!(
    /// What becomes of a request when Redis fails.
    OnStoreError { Local = "local", Allow = "allow", Deny = "deny" }
);

/// The longest name that a circuit breaker takes.
const MAX_NAME: usize = 128;

/// The longest that a connection may be waited for.
const LONGEST: Span = Span::secs(24 * 3600);

/// The longest target that `http::Uri` takes.
const MAX_PATH: u64 = u16::MAX as u64 - 1;

/// A setting that makes no sense, as the one line that the program ends with.
#[derive(Debug)]
pub(crate) struct Nonsense(String);

impl Nonsense {
    /// In the setting at `path` of `origin` (the file, a flag, a variable).
    pub(crate) fn at(origin: impl fmt::Display, path: &str, expected: impl fmt::Display) -> Self {
        let line = match path {
            "" => format!("{origin}: {expected}"),
            _ => format!("{origin}: {path}: {expected}"),
        };
        // A parser's message may have several lines; ours has one.
        Self(line.split_whitespace().collect::<Vec<_>>().join(" "))
    }
}

impl fmt::Display for Nonsense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Settings {
    /// Reads a file. What several settings must be together is not checked
    /// yet: flags may still change them.
    pub(crate) fn read(file: &Path) -> Result<Self, Nonsense> {
        let text = std::fs::read_to_string(file).map_err(|error| {
            Nonsense::at(file.display(), "", format!("cannot be read: {error}"))
        })?;
        Config::builder()
            .add_source(File::from_str(&text, FileFormat::Yaml))
            .build()
            .and_then(Config::try_deserialize)
            .map_err(|error| {
                let (path, expected) = explain(error);
                Nonsense::at(file.display(), &with_dots(&path), expected)
            })
    }

    /// Checks what no single value can tell.
    pub(crate) fn check(&self, origin: &str) -> Result<(), Nonsense> {
        let nonsense = |path: &str, expected: String| Err(Nonsense::at(origin, path, expected));
        if !self.admin.0.ip().is_loopback() && self.admin_token.is_none() {
            return nonsense(
                "admin_token",
                format!(
                    "expected a token, because admin ({}) is not a loopback address",
                    self.admin.0
                ),
            );
        }
        if let Some(Err(error)) = self.tls.as_ref().map(Tls::config) {
            return nonsense(
                "tls",
                format!("expected a certificate and its key: {error}"),
            );
        }
        if let Some(Err((key, expected))) = self.redis.as_ref().map(Redis::check) {
            return nonsense(&format!("redis{key}"), expected);
        }
        if let Err(error) = self.shutdown.builder().build() {
            return nonsense("shutdown.timeout", error.to_string());
        }
        for (key, span) in [
            ("limits.header_timeout", self.limits.header_timeout),
            ("limits.idle_timeout", self.limits.idle_timeout),
        ] {
            if span.0 > LONGEST.0 {
                return nonsense(key, format!("expected at most {LONGEST}, got `{span}`"));
            }
        }
        if self.limits.max_path.0 > MAX_PATH {
            return nonsense(
                "limits.max_path",
                format!("expected at most {MAX_PATH}B, the longest that is understood"),
            );
        }
        if self.routes.is_empty() {
            return nonsense("routes", "expected at least one route".to_owned());
        }
        let mut names = HashMap::new();
        let mut places = HashMap::new();
        for (index, route) in self.routes.iter().enumerate() {
            let at = |key: &str| format!("routes[{index}].{key}");
            if route.upstream.is_empty() {
                return nonsense(&at("upstream"), "expected at least one URL".to_owned());
            }
            if let Some(Err(error)) = route.rate_limit.as_ref().map(|rule| rule.quota().check()) {
                return nonsense(&at("rate_limit"), error.to_string());
            }
            if let Some(rule) = &route.circuit_breaker {
                if let Err((key, expected)) = rule.check() {
                    return nonsense(&at(&format!("circuit_breaker{key}")), expected);
                }
                for (number, upstream) in route.upstream.iter().enumerate() {
                    let name = route.breaker_at(upstream);
                    if rule.per == Per::Upstream && name.len() > MAX_NAME {
                        let expected = format!(
                            "expected a host so short that the breaker's name `{name}` has at most {MAX_NAME} characters"
                        );
                        return nonsense(&at(&format!("upstream[{number}]")), expected);
                    }
                }
            }
            if let Some(Err((key, expected))) = route.retry.as_ref().map(Retry::check) {
                return nonsense(&at(&format!("retry{key}")), expected);
            }
            if let Some(Err((key, expected))) =
                route.verify_webhook.as_ref().map(VerifyWebhook::check)
            {
                return nonsense(&at(&format!("verify_webhook{key}")), expected);
            }
            if let Some(Err((key, expected))) = route.sign_webhook.as_ref().map(SignWebhook::check)
            {
                return nonsense(&at(&format!("sign_webhook{key}")), expected);
            }
            if let Some(first) = names.insert(&route.name.0, index) {
                let expected = format!(
                    "expected a name of its own, but routes[{first}] is `{}`, too",
                    route.name.0
                );
                return nonsense(&at("name"), expected);
            }
            let host = route.host.as_ref().map(|host| &host.0);
            if let Some(first) = places.insert((host, &route.path.0), index) {
                let expected = format!(
                    "expected a host and path of its own, but routes[{first}] has the same"
                );
                return nonsense(&at("path"), expected);
            }
        }
        Ok(())
    }
}

/// A path as people write it: after an index `config` leaves the dot out.
fn with_dots(path: &str) -> String {
    let mut dotted = String::with_capacity(path.len() + 4);
    for part in path.split_inclusive(']') {
        if dotted.ends_with(']') && !part.starts_with(['[', '.']) {
            dotted.push('.');
        }
        dotted += part;
    }
    dotted
}

/// The path of the key that `error` is about, and what it says of it.
fn explain(error: ConfigError) -> (String, String) {
    match error {
        ConfigError::At { error, key, .. } => {
            let (inner, expected) = explain(*error);
            let outer = key.unwrap_or_default();
            let dot = if outer.is_empty() || inner.is_empty() {
                ""
            } else {
                "."
            };
            (format!("{outer}{dot}{inner}"), expected)
        }
        ConfigError::Type {
            unexpected,
            expected,
            key,
            ..
        } => (
            key.unwrap_or_default(),
            format!("expected {expected}, got {unexpected}"),
        ),
        ConfigError::NotFound(key) => (key, "expected a value, but it is missing".to_owned()),
        ConfigError::FileParse { cause, .. } => (String::new(), format!("expected YAML: {cause}")),
        error => {
            let message = error.to_string();
            // serde names the field in the message only; here it belongs to
            // the path.
            let unknown = message
                .strip_prefix("unknown field `")
                .and_then(|rest| rest.split_once("`, "));
            match unknown {
                Some((field, expected)) => (field.to_owned(), format!("unknown key, {expected}")),
                None => (String::new(), message),
            }
        }
    }
}
