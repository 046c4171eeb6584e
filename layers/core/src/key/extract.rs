//! Extractors that read one place of a request.

use std::{any::type_name, fmt, marker::PhantomData};

use http::{
    HeaderName, HeaderValue,
    header::{self, AUTHORIZATION, PROXY_AUTHORIZATION},
};

use super::{
    ExtractKey, Key, ParseError,
    value::{KeyBuilder, Kind},
};
use crate::request::{Head, View};

/// One key for all requests.
///
/// ```
/// use buttress_core::{Head, key::{ExtractKey, ExtractKeyExt, Global, Key, SharedKey}};
/// use http::Request;
///
/// let all_as_one: SharedKey = Global.shared();
/// let request = Request::new(());
/// assert_eq!(all_as_one.extract(Head::from(&request)), Some(Key::global()));
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Global;

impl<V: View> ExtractKey<V> for Global {
    #[inline]
    fn extract(&self, _: V::Ref<'_>) -> Option<Key> {
        Some(Key::global())
    }
}

/// The value of a header field: see [`Header`].
///
/// ```
/// use buttress_core::{Head, key::{self, ExtractKey, Key}};
/// use http::Request;
///
/// let by_key = key::header("x-api-key");
/// let request = Request::builder().header("X-Api-Key", "k1").body(()).unwrap();
/// assert_eq!(by_key.extract(Head::from(&request)), Some(by_key.key("k1")));
///
/// let twice = Request::builder()
///     .header("X-Api-Key", "k1")
///     .header("X-Api-Key", "fresh")
///     .body(())
///     .unwrap();
/// assert_eq!(by_key.extract(Head::from(&twice)), Some(Key::ambiguous()));
/// ```
///
/// # Panics
///
/// Where `name` is not a field name. For names that are not in the source
/// there is [`Header::new`].
pub fn header<N>(name: N) -> Header
where
    N: TryInto<HeaderName, Error: fmt::Display>,
{
    Header::new(name).unwrap_or_else(|error| panic!("{error}"))
}

/// Extracts the value of a header field.
///
/// None where the field is missing or empty. Several lines of equal value are
/// that value, of different ones the [ambiguous](Key::ambiguous) key: a client
/// cannot gain a key of its own by repeating the field in an order that the
/// callee reads otherwise.
///
/// Outer white space does not count, nor do the case of the scheme and the
/// spaces after it in `Authorization` and `Proxy-Authorization` (RFC 9110
/// §11.1). Everything else does, a comma too: count by a list only where the
/// callee takes it whole.
#[derive(Clone, Debug)]
pub struct Header {
    name: HeaderName,
}

impl Header {
    /// The field called `name`, in any case.
    ///
    /// # Errors
    ///
    /// Where `name` is not a field name (RFC 9110 §5.1).
    pub fn new<N>(name: N) -> Result<Self, ParseError>
    where
        N: TryInto<HeaderName, Error: fmt::Display>,
    {
        match name.try_into() {
            Ok(name) => Ok(Self { name }),
            Err(error) => Err(ParseError(format!(
                "cannot take a key from this header: {error}; expected a field name such as `x-api-key`"
            ))),
        }
    }

    /// The key of requests whose field has this value, to look it up or reset
    /// it.
    #[must_use]
    pub fn key(&self, value: impl AsRef<[u8]>) -> Key {
        let value = value.as_ref().trim_ascii();
        if self.name != AUTHORIZATION && self.name != PROXY_AUTHORIZATION {
            return Key::of(Kind::Header, value);
        }
        let scheme = value.iter().position(u8::is_ascii_whitespace);
        let (scheme, credentials) = value.split_at(scheme.unwrap_or(value.len()));
        let mut builder = KeyBuilder::new(Kind::Header);
        builder.push_lowercase(scheme);
        builder.push(b" ");
        builder.push(credentials.trim_ascii());
        builder.finish()
    }
}

impl ExtractKey for Header {
    fn extract(&self, request: Head<'_>) -> Option<Key> {
        let mut lines = request.headers.get_all(&self.name).iter();
        let value = lines.next()?.as_bytes().trim_ascii();
        if !lines.all(|line| line.as_bytes().trim_ascii() == value) {
            return Some(Key::ambiguous());
        }
        (!value.is_empty()).then(|| self.key(value))
    }
}

/// The value of a cookie: see [`Cookie`].
///
/// ```
/// use buttress_core::{Head, key::{self, ExtractKey, Key}};
/// use http::Request;
///
/// let by_session = key::cookie("sid");
/// let request = Request::builder().header("cookie", "lang=de; sid=\"s1\"").body(()).unwrap();
/// assert_eq!(by_session.extract(Head::from(&request)), Some(by_session.key("s1")));
/// ```
///
/// # Panics
///
/// Where `name` is not a cookie's name. For names that are not in the source
/// there is [`Cookie::new`].
pub fn cookie(name: impl Into<String>) -> Cookie {
    Cookie::new(name).unwrap_or_else(|error| panic!("{error}"))
}

/// Extracts the value of a cookie from all `Cookie` lines (RFC 6265 §4.2.1).
///
/// None where the cookie is missing or empty. One that is there several times
/// with different values is the [ambiguous](Key::ambiguous) key, since callees
/// differ in which they take. A browser may do so without malice (two paths
/// may set one name), so [`or`](super::ExtractKeyExt::or) the address.
///
/// Names are case-sensitive. Quotes around the value do not count, and the
/// escapes that common servers undo are undone: `%41`, and within quotes
/// `\101` and `\"`.
#[derive(Clone, Debug)]
pub struct Cookie {
    name: Box<str>,
}

impl Cookie {
    /// The cookie called `name`.
    ///
    /// # Errors
    ///
    /// Where `name` is not a token (RFC 6265 §4.1.1).
    pub fn new(name: impl Into<String>) -> Result<Self, ParseError> {
        let name = name.into();
        if name.is_empty() || !name.bytes().all(is_token) {
            return Err(ParseError(format!(
                "cannot take a key from cookie {name:?}: expected a name of letters, digits and !#$%&'*+-.^_`|~"
            )));
        }
        Ok(Self { name: name.into() })
    }

    /// The key of requests whose cookie has this value (as it stands in the
    /// header), to look it up or reset it.
    #[must_use]
    pub fn key(&self, value: impl AsRef<[u8]>) -> Key {
        let value = value.as_ref().trim_ascii();
        let mut builder = KeyBuilder::new(Kind::Cookie);
        match unquoted(value) {
            Some(quoted) => builder.push_unescaped(quoted),
            None => builder.push_percent_decoded(value),
        }
        builder.finish()
    }

    fn values<'a>(&'a self, request: Head<'a>) -> impl Iterator<Item = &'a [u8]> {
        request
            .headers
            .get_all(header::COOKIE)
            .iter()
            .flat_map(|line| line.as_bytes().split(|byte| *byte == b';'))
            .filter_map(|pair| {
                let equals = pair.iter().position(|byte| *byte == b'=')?;
                let name = pair[..equals].trim_ascii();
                (name == self.name.as_bytes()).then(|| pair[equals + 1..].trim_ascii())
            })
    }
}

impl ExtractKey for Cookie {
    fn extract(&self, request: Head<'_>) -> Option<Key> {
        let mut values = self.values(request);
        let value = values.next()?;
        if !values.all(|other| other == value) {
            return Some(Key::ambiguous());
        }
        (!unquoted(value).unwrap_or(value).is_empty()).then(|| self.key(value))
    }
}

/// The path of the request: see [`Path`].
///
/// ```
/// use buttress_core::{Head, key::{self, ExtractKey}};
/// use http::Request;
///
/// let at = |uri| {
///     let request = Request::builder().uri(uri).body(()).unwrap();
///     key::path().extract(Head::from(&request)).unwrap()
/// };
/// assert_eq!(at("/a/b?c=d"), at("/%61/b"));
/// assert_ne!(at("/a/b"), at("/a"));
/// ```
#[must_use]
pub const fn path() -> Path {
    Path
}

/// Extracts the path without the query.
///
/// Percent-encoding does not count. Empty and dot segments and a slash at the
/// end do: where the callee folds them, or takes any path, a client can vary
/// its key. Then count by the route instead (axum leaves `MatchedPath` as an
/// [`extension_with`]), or beside the address.
#[derive(Clone, Copy, Debug, Default)]
pub struct Path;

impl ExtractKey for Path {
    fn extract(&self, request: Head<'_>) -> Option<Key> {
        let mut builder = KeyBuilder::new(Kind::Path);
        builder.push_percent_decoded(request.uri.path().as_bytes());
        Some(builder.finish())
    }
}

/// The method of the request, as a part of a tuple.
///
/// ```
/// use buttress_core::{Head, key::{self, ClientIp, ExtractKey}};
/// use http::Request;
///
/// let by = (ClientIp::new(), key::method());
/// # let _: &dyn ExtractKey = &by;
/// ```
#[must_use]
pub const fn method() -> Method {
    Method
}

/// Extracts the method. Any token is a method, so a client has as many as it
/// likes where the callee does not refuse what it does not know.
#[derive(Clone, Copy, Debug, Default)]
pub struct Method;

impl ExtractKey for Method {
    fn extract(&self, request: Head<'_>) -> Option<Key> {
        Some(Key::of(Kind::Method, request.method.as_str().as_bytes()))
    }
}

/// The host that the request is for: see [`Host`].
///
/// ```
/// use buttress_core::{Head, key::{self, ExtractKey}};
/// use http::Request;
///
/// let one = Request::builder().header("host", "Example.org:8080").body(()).unwrap();
/// let two = Request::builder().uri("http://example.org./").body(()).unwrap();
/// assert_eq!(
///     key::host().extract(Head::from(&one)),
///     key::host().extract(Head::from(&two)),
/// );
/// ```
#[must_use]
pub const fn host() -> Host {
    Host
}

/// Extracts the host from the target's authority (`:authority` in HTTP/2),
/// else from `Host` (RFC 9112 §3.2.2).
///
/// Case, port and the dot at the end do not count. None where there is none;
/// `Host` lines that differ are the [ambiguous](Key::ambiguous) key.
#[derive(Clone, Copy, Debug, Default)]
pub struct Host;

impl ExtractKey for Host {
    fn extract(&self, request: Head<'_>) -> Option<Key> {
        let host = if let Some(host) = request.uri.host() {
            host.as_bytes()
        } else {
            let mut lines = request.headers.get_all(header::HOST).iter();
            let first = lines.next().map(HeaderValue::as_bytes)?;
            if !lines.all(|line| line == first) {
                return Some(Key::ambiguous());
            }
            without_port(first.trim_ascii())
        };
        let host = host.strip_suffix(b".").unwrap_or(host);
        if host.is_empty() {
            return None;
        }
        let mut builder = KeyBuilder::new(Kind::Host);
        builder.push_lowercase(host);
        Some(builder.finish())
    }
}

/// What an earlier layer attached to the request, where a key can be made
/// from a reference to it.
///
/// None where no `T` is there.
///
/// ```
/// use buttress_core::{Head, key::{self, ExtractKey, Key}};
/// use http::Request;
///
/// #[derive(Clone)]
/// struct UserId(u64);
///
/// impl From<&UserId> for Key {
///     fn from(user: &UserId) -> Self {
///         user.0.into()
///     }
/// }
///
/// let by_user = key::extension::<UserId>();
/// let request = Request::builder().extension(UserId(7)).body(()).unwrap();
/// assert_eq!(by_user.extract(Head::from(&request)), Some(Key::from(7_u64)));
/// ```
#[must_use]
pub const fn extension<T>() -> Extension<T>
where
    T: Send + Sync + 'static,
    for<'a> &'a T: Into<Key>,
{
    Extension(PhantomData)
}

/// The extractor of [`extension`].
pub struct Extension<T>(PhantomData<fn(&T)>);

impl<T> Clone for Extension<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Extension<T> {}

impl<T> fmt::Debug for Extension<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Extension<{}>", type_name::<T>())
    }
}

impl<T> ExtractKey for Extension<T>
where
    T: Send + Sync + 'static,
    for<'a> &'a T: Into<Key>,
{
    fn extract(&self, request: Head<'_>) -> Option<Key> {
        request.extensions.get::<T>().map(Into::into)
    }
}

/// What an earlier layer attached to the request, through a closure that
/// makes it a [`Key`] or an `Option<Key>`.
///
/// ```
/// use buttress_core::{Head, key::{self, ExtractKey, Key}};
/// use http::Request;
///
/// #[derive(Clone)]
/// struct Session { user: Option<u64> }
///
/// let by_user = key::extension_with(|session: &Session| session.user.map(Key::from));
/// let request = Request::builder().extension(Session { user: Some(7) }).body(()).unwrap();
/// assert_eq!(by_user.extract(Head::from(&request)), Some(Key::from(7_u64)));
/// ```
pub fn extension_with<T, F, K>(make: F) -> ExtensionWith<T, F>
where
    T: Send + Sync + 'static,
    F: for<'a> Fn(&'a T) -> K + Send + Sync + 'static,
    K: Into<Option<Key>> + 'static,
{
    ExtensionWith {
        make,
        extension: PhantomData,
    }
}

/// The extractor of [`extension_with`].
pub struct ExtensionWith<T, F> {
    make: F,
    extension: PhantomData<fn(&T)>,
}

impl<T, F: Clone> Clone for ExtensionWith<T, F> {
    fn clone(&self) -> Self {
        Self {
            make: self.make.clone(),
            extension: self.extension,
        }
    }
}

impl<T, F> fmt::Debug for ExtensionWith<T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExtensionWith<{}>", type_name::<T>())
    }
}

impl<T, F, K> ExtractKey for ExtensionWith<T, F>
where
    T: Send + Sync + 'static,
    F: for<'a> Fn(&'a T) -> K + Send + Sync + 'static,
    K: Into<Option<Key>> + 'static,
{
    fn extract(&self, request: Head<'_>) -> Option<Key> {
        (self.make)(request.extensions.get::<T>()?).into()
    }
}

impl KeyBuilder {
    fn push_lowercase(&mut self, bytes: &[u8]) {
        for run in bytes.chunk_by(|a, b| a.is_ascii_uppercase() == b.is_ascii_uppercase()) {
            if run[0].is_ascii_uppercase() {
                for byte in run {
                    self.push(&[byte.to_ascii_lowercase()]);
                }
            } else {
                self.push(run);
            }
        }
    }

    /// Undoes `%41`; a `%` that begins no escape stays.
    fn push_percent_decoded(&mut self, mut bytes: &[u8]) {
        while let Some(percent) = bytes.iter().position(|byte| *byte == b'%') {
            let (plain, escape) = bytes.split_at(percent);
            self.push(plain);
            if let [_, high, low, rest @ ..] = escape
                && let (Some(high), Some(low)) = (hex(*high), hex(*low))
            {
                self.push(&[high << 4 | low]);
                bytes = rest;
            } else {
                self.push(b"%");
                bytes = &escape[1..];
            }
        }
        self.push(bytes);
    }

    /// Undoes the escapes of a quoted cookie: `\101`, `\"`, then `%41`.
    fn push_unescaped(&mut self, mut bytes: &[u8]) {
        while let Some(backslash) = bytes.iter().position(|byte| *byte == b'\\') {
            let (plain, escape) = bytes.split_at(backslash);
            self.push_percent_decoded(plain);
            bytes = match escape {
                [
                    _,
                    a @ b'0'..=b'3',
                    b @ b'0'..=b'7',
                    c @ b'0'..=b'7',
                    rest @ ..,
                ] => {
                    self.push(&[(a - b'0') << 6 | (b - b'0') << 3 | (c - b'0')]);
                    rest
                }
                [_, escaped, rest @ ..] => {
                    self.push(&[*escaped]);
                    rest
                }
                alone => {
                    self.push(alone);
                    &[]
                }
            };
        }
        self.push_percent_decoded(bytes);
    }
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

fn unquoted(value: &[u8]) -> Option<&[u8]> {
    value.strip_prefix(b"\"")?.strip_suffix(b"\"")
}

fn without_port(host: &[u8]) -> &[u8] {
    let end = if host.starts_with(b"[") {
        host.iter()
            .position(|byte| *byte == b']')
            .map(|bracket| bracket + 1)
    } else {
        host.iter().position(|byte| *byte == b':')
    };
    &host[..end.unwrap_or(host.len())]
}

/// RFC 9110 §5.6.2.
pub(super) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
