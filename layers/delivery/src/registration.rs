//! Who is told of what, and how.

use std::{borrow::Borrow, fmt, sync::Arc, time::Duration};

use buttress_core::{label, sync::Mutex};
use buttress_webhook::{Scheme, Secret, SecretError, Signer};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};

use crate::{Cause, error::Problem, outcome::Permanent, pattern::Pattern};

const LONGEST_URL: usize = 2048;
/// Whoever registers may be anybody: what one of them takes has an end.
const MOST_PATTERNS: usize = 256;
const MOST_HEADERS: usize = 64;
/// Of all headers' names and values together.
const LONGEST_HEADERS: usize = 16 * 1024;
/// Of retries and time limits.
pub(crate) const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// Which events a registration hears of.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// All.
    #[default]
    Global,
    /// Those of one request.
    Request(
        /// The request's id.
        Arc<str>,
    ),
}

impl Scope {
    /// The events of this request.
    pub fn request(id: impl Into<Arc<str>>) -> Self {
        Self::Request(id.into())
    }
}

/// What a registration is known by.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegistrationId(pub(crate) Arc<str>);

impl RegistrationId {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for RegistrationId {
    fn from(id: &str) -> Self {
        Self(id.into())
    }
}

impl From<String> for RegistrationId {
    fn from(id: String) -> Self {
        Self(id.into())
    }
}

impl Borrow<str> for RegistrationId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RegistrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RegistrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Asks for events to be sent to a url, for
/// [`Webhooks::register`](crate::Webhooks::register).
///
/// ```
/// use std::time::Duration;
/// use buttress_delivery::{Registration, Scope};
/// use buttress_webhook::{Secret, Standard};
///
/// let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
/// let registration = Registration::new("https://example.com/hooks")
///     .events(["request.completed", "agent.*"])
///     .signed_by(Standard::new(), [secret])?
///     .scope(Scope::request("req_7"))
///     .timeout(Duration::from_secs(10));
/// assert!(!format!("{registration:?}").contains("MfKQ"));
/// # Ok::<(), buttress_webhook::SecretError>(())
/// ```
#[derive(Clone)]
#[must_use = "a registration does nothing until it is registered"]
pub struct Registration {
    id: Option<Arc<str>>,
    url: String,
    events: Vec<String>,
    scope: Scope,
    signer: Option<Signer>,
    headers: Vec<(String, String)>,
    timeout: Duration,
    max_retries: u32,
    retry_delay: Duration,
    max_retry_delay: Duration,
    permanent: Permanent,
    ordered: bool,
    lane: Option<Arc<str>>,
}

impl Registration {
    /// Of this url: `http` or `https`, with a host, without user, password and
    /// fragment.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            id: None,
            url: url.into(),
            events: Vec::new(),
            scope: Scope::Global,
            signer: None,
            headers: Vec::new(),
            timeout: Duration::from_secs(30),
            max_retries: 3,
            retry_delay: Duration::from_secs(1),
            max_retry_delay: Duration::from_secs(3600),
            permanent: Permanent::default(),
            ordered: false,
            lane: None,
        }
    }

    /// Its id, by which a [store](crate::DeliveryStore) finds it again after a
    /// restart: 1 to 128 printable characters of ASCII. Default: one is made.
    pub fn id(mut self, id: impl Into<Arc<str>>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// Which events it is for, beside those that were said before: a name
    /// (`request.completed`), all under a name however deep (`agent.*`), or
    /// all (`*`). However many of them match, an event is told once. At most 256.
    pub fn events<E: Into<String>>(mut self, patterns: impl IntoIterator<Item = E>) -> Self {
        self.events.extend(patterns.into_iter().map(Into::into));
        self
    }

    /// Of which requests. Default: [`Scope::Global`].
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Signs each attempt by this scheme, with each of the secrets.
    ///
    /// # Errors
    ///
    /// As [`Signer::new`].
    pub fn signed_by(
        self,
        scheme: impl Scheme,
        secrets: impl IntoIterator<Item = Secret>,
    ) -> Result<Self, SecretError> {
        Ok(self.signer(Signer::new(scheme, secrets)?))
    }

    /// Signs each attempt by this signer: several schemes at once, or what
    /// other registrations sign with. Default: nothing is signed.
    pub fn signer(mut self, signer: Signer) -> Self {
        self.signer = Some(signer);
        self
    }

    /// Sends these headers, too, with each attempt. Their values are shown
    /// nowhere. At most 64, with names and values of 16 KiB together.
    pub fn headers<N: Into<String>, V: Into<String>>(
        mut self,
        headers: impl IntoIterator<Item = (N, V)>,
    ) -> Self {
        let headers = headers.into_iter();
        self.headers
            .extend(headers.map(|(name, value)| (name.into(), value.into())));
        self
    }

    /// How long an attempt may take, from the transport's readiness to the end
    /// of the answer's body. 1 ms to 366 days. Default 30 s.
    pub const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How many attempts may follow the first. Default 3.
    pub const fn max_retries(mut self, retries: u32) -> Self {
        self.max_retries = retries;
        self
    }

    /// How long to wait before the first retry; twice as long before each that
    /// follows. Half of each wait is jittered: it is between a half and the
    /// whole. 1 ms to 366 days. Default 1 s.
    pub const fn retry_delay(mut self, delay: Duration) -> Self {
        self.retry_delay = delay;
        self
    }

    /// The longest wait, whether the endpoint asks for it by `Retry-After` or
    /// not. Not below the [first](Self::retry_delay); at most 366 days. Default
    /// 1 hour.
    pub const fn max_retry_delay(mut self, delay: Duration) -> Self {
        self.max_retry_delay = delay;
        self
    }

    /// Statuses after which there is no retry: 4xx and 5xx, but for 408, 425
    /// and 429. Default: none but 410.
    pub fn permanent_statuses(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        self.permanent.statuses.extend(statuses);
        self
    }

    /// No retry after any 4xx, but for 408, 425 and 429.
    pub const fn permanent_client_errors(mut self) -> Self {
        self.permanent.client_errors = true;
        self
    }

    /// Tells it of its events in their order: the next is not sent before the
    /// one before it is delivered or dead. Default: no.
    pub const fn ordered(mut self, ordered: bool) -> Self {
        self.ordered = ordered;
        self
    }

    /// The lane that it shares with others of this name: attempts at once, the
    /// breaker and the rate limit. 1 to 256 printable characters of ASCII.
    /// Default: the url's origin, `https://example.com:443`.
    pub fn lane(mut self, lane: impl Into<Arc<str>>) -> Self {
        self.lane = Some(lane.into());
        self
    }

    pub(crate) fn check(self, make_id: impl FnOnce() -> Arc<str>) -> Result<Target, Problem> {
        let (url, origin) = endpoint(&self.url)?;
        if self.events.len() > MOST_PATTERNS {
            return Err(Problem::Patterns);
        }
        let mut patterns = self
            .events
            .iter()
            .map(|text| Pattern::parse(text))
            .collect::<Result<Vec<_>, _>>()?;
        if patterns.is_empty() {
            return Err(Problem::NoPattern);
        }
        // Told once, and taken out of the index once.
        let mut seen: Vec<Pattern> = Vec::with_capacity(patterns.len());
        patterns.retain(|pattern| {
            let new = !seen.contains(pattern);
            if new {
                seen.push(pattern.clone());
            }
            new
        });
        if let Scope::Request(id) = &self.scope
            && !label::is_sound(id, 256)
        {
            return Err(Problem::RequestId);
        }
        for (what, span) in [
            ("the timeout", self.timeout),
            ("the delay of a retry", self.retry_delay),
            ("the longest delay of a retry", self.max_retry_delay),
        ] {
            check_span(what, span)?;
        }
        if self.max_retry_delay < self.retry_delay {
            return Err(Problem::Span(
                "the longest delay, above the first, of a retry",
            ));
        }
        for status in &self.permanent.statuses {
            if !Permanent::may_hold(*status) {
                return Err(Problem::Status(status.as_u16()));
            }
        }
        let id = self.id.unwrap_or_else(make_id);
        if !label::is_sound(&id, 128) {
            return Err(Problem::Id);
        }
        let lane = self.lane.unwrap_or(origin);
        if !label::is_sound(&lane, 256) {
            return Err(Problem::LaneName);
        }
        Ok(Target {
            id: RegistrationId(id),
            url_text: self.url.into(),
            url,
            patterns,
            scope: self.scope,
            signer: Mutex::new(self.signer),
            headers: headers(&self.headers)?,
            timeout: self.timeout,
            max_retries: self.max_retries,
            retry_delay: self.retry_delay,
            max_retry_delay: self.max_retry_delay,
            permanent: self.permanent,
            ordered: self.ordered,
            lane,
        })
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A url's path may be a secret, and values of headers often are.
        f.debug_struct("Registration")
            .field("id", &self.id)
            .field("events", &self.events)
            .field("scope", &self.scope)
            .field("signed", &self.signer.is_some())
            .field("ordered", &self.ordered)
            .field("lane", &self.lane)
            .finish_non_exhaustive()
    }
}

pub(crate) fn check_span(what: &'static str, span: Duration) -> Result<(), Problem> {
    if (Duration::from_millis(1)..=LONGEST).contains(&span) {
        return Ok(());
    }
    Err(Problem::Span(what))
}

/// The url, and its origin with the port.
fn endpoint(text: &str) -> Result<(Uri, Arc<str>), Problem> {
    if text.len() > LONGEST_URL {
        return Err(Problem::Url("must have at most 2048 bytes"));
    }
    // It is cut off without a word otherwise.
    if text.contains('#') {
        return Err(Problem::Url("must have no fragment"));
    }
    let url: Uri = text.parse().map_err(|_| Problem::Url("cannot be read"))?;
    let standard = match url.scheme_str() {
        Some("http") => 80,
        Some("https") => 443,
        _ => return Err(Problem::Url("must begin with http:// or https://")),
    };
    let authority = url.authority().map_or("", http::uri::Authority::as_str);
    if authority.contains('@') {
        return Err(Problem::Url("must have neither user nor password"));
    }
    let host = url.host().unwrap_or("");
    if host.is_empty() {
        return Err(Problem::Url("must have a host"));
    }
    // `http` takes what is no number for no port.
    let port = authority.strip_prefix(host).unwrap_or("");
    let port = match port.strip_prefix(':') {
        None => standard,
        Some(_) => url
            .port_u16()
            .filter(|port| *port != 0)
            .ok_or(Problem::Url("has no such port"))?,
    };
    let scheme = url.scheme_str().unwrap_or("");
    let origin = format!("{scheme}://{}:{port}", host.to_ascii_lowercase());
    Ok((url, origin.into()))
}

fn headers(pairs: &[(String, String)]) -> Result<HeaderMap, Problem> {
    /// What belongs to the connection or the message's framing, and what the
    /// delivery writes itself.
    const OURS: [&str; 17] = [
        "connection",
        "content-digest",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "signature",
        "signature-input",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    let lengths = pairs.iter().map(|(name, value)| name.len() + value.len());
    if pairs.len() > MOST_HEADERS || lengths.sum::<usize>() > LONGEST_HEADERS {
        return Err(Problem::Headers);
    }
    let mut headers = HeaderMap::with_capacity(pairs.len());
    for (name, value) in pairs {
        let refused = || Problem::Header(name.as_str().into());
        let name: HeaderName = name.parse().map_err(|_| refused())?;
        let text = name.as_str();
        let signs = text.starts_with("webhook-")
            || text.starts_with("svix-")
            || text.starts_with("x-slack-")
            || text.ends_with("-signature")
            || text.contains("-signature-")
            || text.ends_with("-hmac-sha256");
        if signs || OURS.contains(&text) {
            return Err(refused());
        }
        let mut value = HeaderValue::from_str(value).map_err(|_| refused())?;
        value.set_sensitive(true);
        headers.append(name, value);
    }
    if !headers.contains_key(header::USER_AGENT) {
        let us = HeaderValue::from_static(concat!("buttress-delivery/", env!("CARGO_PKG_VERSION")));
        headers.insert(header::USER_AGENT, us);
    }
    Ok(headers)
}

/// A registration that is sound.
pub(crate) struct Target {
    pub(crate) id: RegistrationId,
    pub(crate) url_text: Box<str>,
    pub(crate) url: Uri,
    pub(crate) patterns: Vec<Pattern>,
    pub(crate) scope: Scope,
    /// Changed while it serves.
    pub(crate) signer: Mutex<Option<Signer>>,
    pub(crate) headers: HeaderMap,
    pub(crate) timeout: Duration,
    pub(crate) max_retries: u32,
    pub(crate) retry_delay: Duration,
    pub(crate) max_retry_delay: Duration,
    pub(crate) permanent: Permanent,
    pub(crate) ordered: bool,
    pub(crate) lane: Arc<str>,
}

impl Target {
    /// What signs the next attempt.
    pub(crate) fn signer(&self) -> Option<Signer> {
        self.signer.lock().clone()
    }
}

/// A registration as it stands: see [`Webhooks::list`](crate::Webhooks::list).
#[derive(Clone)]
#[non_exhaustive]
pub struct RegistrationInfo {
    /// Its id.
    pub id: RegistrationId,
    /// Where its events go. May hold a secret: not for logs.
    pub url: String,
    /// Its patterns.
    pub events: Vec<String>,
    /// Its scope.
    pub scope: Scope,
    /// The lane it is in.
    pub lane: Arc<str>,
    /// By which schemes its messages are signed.
    pub schemes: Vec<&'static str>,
    /// Whether its events keep their order.
    pub ordered: bool,
    /// Why it is sent nothing any more, if so.
    pub disabled: Option<Cause>,
    /// How many deliveries of it are accepted and not over.
    pub queued: usize,
}

impl RegistrationInfo {
    pub(crate) fn of(target: &Target, disabled: Option<Cause>, queued: usize) -> Self {
        let events = target.patterns.iter().map(|pattern| match pattern {
            Pattern::All => "*".to_owned(),
            Pattern::Exact(name) => name.to_string(),
            Pattern::Under(name) => format!("{name}.*"),
        });
        Self {
            id: target.id.clone(),
            url: target.url_text.to_string(),
            events: events.collect(),
            scope: target.scope.clone(),
            lane: Arc::clone(&target.lane),
            schemes: target.signer().iter().flat_map(Signer::schemes).collect(),
            ordered: target.ordered,
            disabled,
            queued,
        }
    }
}

impl fmt::Debug for RegistrationInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistrationInfo")
            .field("id", &self.id)
            .field("events", &self.events)
            .field("scope", &self.scope)
            .field("schemes", &self.schemes)
            .field("ordered", &self.ordered)
            .field("disabled", &self.disabled)
            .field("queued", &self.queued)
            .finish_non_exhaustive()
    }
}

/// Which registrations: all that are like what is said of them.
///
/// ```
/// use buttress_delivery::{Scope, Selector};
///
/// let of_a_request = Selector::all().scope(Scope::request("req_7"));
/// let one_url_of_it = of_a_request.clone().url("https://example.com/hooks");
/// ```
#[derive(Clone, Default)]
#[must_use = "a selector does nothing by itself"]
pub struct Selector {
    id: Option<RegistrationId>,
    scope: Option<Scope>,
    url: Option<String>,
}

impl Selector {
    /// All of them.
    pub fn all() -> Self {
        Self::default()
    }

    /// The one of this id.
    pub fn id(mut self, id: impl Into<RegistrationId>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// Those of this scope.
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = Some(scope);
        self
    }

    /// Those of this url, as it was given.
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.url = Some(url.into());
        self
    }

    pub(crate) fn fits(&self, target: &Target) -> bool {
        self.id.as_ref().is_none_or(|id| *id == target.id)
            && self
                .scope
                .as_ref()
                .is_none_or(|scope| *scope == target.scope)
            && self
                .url
                .as_ref()
                .is_none_or(|url| **url == *target.url_text)
    }
}

impl fmt::Debug for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Selector")
            .field("id", &self.id)
            .field("scope", &self.scope)
            .field("url", &self.url.as_ref().map(|_| "…"))
            .finish()
    }
}

impl From<RegistrationId> for Selector {
    fn from(id: RegistrationId) -> Self {
        Self::all().id(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ConfigError;

    fn checked(registration: Registration) -> Result<Target, Problem> {
        registration.check(|| "reg".into())
    }

    fn of(url: &str) -> Registration {
        Registration::new(url).events(["*"])
    }

    #[test]
    fn urls_are_of_the_web_and_name_nobody() {
        for (url, lane) in [
            ("https://Example.com/a?b=c", "https://example.com:443"),
            ("http://example.com", "http://example.com:80"),
            ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
            ("https://[::1]:8443/x", "https://[::1]:8443"),
        ] {
            assert_eq!(&*checked(of(url)).ok().unwrap().lane, lane, "{url}");
        }
        for url in [
            "",
            "/hooks",
            "example.com",
            "ftp://example.com/",
            "file:///etc/passwd",
            "http://",
            "https:///hooks",
            "https://ann@example.com/",
            "https://ann:secret@example.com/",
            "https://example.com/#there",
            "https://example.com:0/",
            "https://example.com:65536/",
            "https://example.com:/",
            "https://exa mple.com/",
            &format!("https://example.com/{}", "x".repeat(2048)),
        ] {
            assert!(
                matches!(checked(of(url)), Err(Problem::Url(_))),
                "{url} is let in"
            );
        }
    }

    #[test]
    fn headers_that_are_not_the_users_are_refused() {
        for name in [
            "Host",
            "content-length",
            "Transfer-Encoding",
            "connection",
            "content-type",
            "webhook-id",
            "X-Webhook-Signature",
            "stripe-signature",
            "x-slack-request-timestamp",
            "x-hub-signature-256",
            "x-shopify-hmac-sha256",
            "signature",
            "a b",
            "",
        ] {
            let refused = checked(of("http://a/").headers([(name, "x")]));
            assert!(matches!(refused, Err(Problem::Header(_))), "{name}");
        }
        let refused = checked(of("http://a/").headers([("x-a", "x\r\nhost: b")]));
        assert!(matches!(refused, Err(Problem::Header(_))));
        let target = checked(of("http://a/").headers([("Authorization", "Bearer x")]));
        let headers = target.ok().unwrap().headers;
        assert!(headers["authorization"].is_sensitive());
        assert!(
            headers["user-agent"]
                .to_str()
                .unwrap()
                .starts_with("buttress")
        );
    }

    #[test]
    fn nonsense_cannot_be_registered() {
        let url = "http://a/";
        assert_eq!(
            checked(Registration::new(url)).err(),
            Some(Problem::NoPattern)
        );
        let second = Duration::from_secs(1);
        for (registration, problem) in [
            (of(url).timeout(Duration::ZERO), "the timeout must"),
            (of(url).retry_delay(Duration::ZERO), "the delay of"),
            (of(url).max_retry_delay(second / 2), "the longest delay"),
            (of(url).scope(Scope::request("")), "a request's id"),
            (of(url).id("ä"), "an id must"),
            (of(url).lane(""), "a lane's name"),
            (of(url).events(["a*"]), "\"a*\" is no pattern"),
            (of(url).permanent_statuses([StatusCode::OK]), "200 cannot"),
            (
                of(url).permanent_statuses([StatusCode::TOO_MANY_REQUESTS]),
                "429 cannot",
            ),
        ] {
            let error = ConfigError::from(checked(registration).err().expect(problem));
            assert!(error.to_string().starts_with(problem), "{error}");
        }
        // A map of headers that is asked for more than it can hold panics.
        let headers = |count: usize| of(url).headers((0..count).map(|at| (format!("x-{at}"), "")));
        let long = |length: usize| of(url).headers([("x-a", "x".repeat(length - 3))]);
        let patterns =
            |count: usize| Registration::new(url).events((0..count).map(|at| format!("a.{at}")));
        for (fits, too_much, problem) in [
            (headers(64), headers(65), "a registration may set"),
            (headers(0), headers(40_000), "a registration may set"),
            (
                long(16 * 1024),
                long(16 * 1024 + 1),
                "a registration may set",
            ),
            (patterns(256), patterns(257), "a registration may name"),
        ] {
            assert!(checked(fits).is_ok(), "{problem}");
            let error = ConfigError::from(checked(too_much).err().expect(problem));
            assert!(error.to_string().starts_with(problem), "{error}");
        }
        let twice = checked(of(url).events(["a", "*", "a"])).ok().unwrap();
        assert_eq!(twice.patterns.len(), 2);
    }

    #[test]
    fn neither_the_url_nor_a_header_nor_a_secret_is_shown() {
        let registration = of("https://a/T0KEN?key=K3Y")
            .headers([("authorization", "B3ARER")])
            .signer(
                Signer::new(
                    buttress_webhook::GitHub,
                    [Secret::new("S3CRETS3CRET").unwrap()],
                )
                .unwrap(),
            );
        let shown = format!("{registration:#?}");
        let info = RegistrationInfo::of(&checked(registration).ok().unwrap(), None, 0);
        let shown = shown + &format!("{info:#?} {:?}", Selector::all().url("https://a/T0KEN"));
        for secret in ["T0KEN", "K3Y", "B3ARER", "S3CRET"] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }
}
