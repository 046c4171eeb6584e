//! What requests are counted by: [`Key`]s, and what extracts them.
//!
//! An [`ExtractKey`] takes a key from a request. There are extractors for the
//! client's address ([`ClientIp`]), a [`header`], a [`cookie`], an
//! [`extension`], the [`path`], the [`method`], the [`host`] and [`Global`]; a
//! closure is one, too; a tuple of extractors counts by all of them together,
//! and [`or`](ExtractKeyExt::or) names a second choice:
//!
//! ```
//! use buttress_core::key::{self, ClientIp, ExtractKey, ExtractKeyExt, Key};
//! # use buttress_core::{Head, key::PeerAddr};
//! # use http::Request;
//!
//! // Behind a proxy in 10.0.0.0/8, by API key or else by address; apart for
//! // each method.
//! let by = (
//!     key::header("x-api-key").or(ClientIp::new().trust(["10.0.0.0/8"])?),
//!     key::method(),
//! );
//! # let mut request = Request::builder().header("x-api-key", "k1").body(()).unwrap();
//! # let first = by.extract(Head::from(&request)).unwrap();
//! # *request.method_mut() = http::Method::POST;
//! # assert_ne!(by.extract(Head::from(&request)).unwrap(), first);
//!
//! // By tenant, as the closure knows it.
//! let by_tenant = key::from_fn(|head| {
//!     let tenant = head.uri.host()?.split('.').next()?;
//!     Some(Key::from(tenant))
//! });
//! # let _ = by_tenant.or(ClientIp::new());
//! # Ok::<(), buttress_core::key::ParseError>(())
//! ```
//!
//! # What a client can choose
//!
//! A limit is only as good as its key is hard to change. Headers, cookies,
//! paths and hosts are what the client says: who wants a fresh key sends
//! another value. Count by them where the value is checked (an API key that
//! is refused when it is unknown, behind the layer that refuses it), or
//! beside a limit by address. What an authenticating layer left as an
//! [`extension`] cannot be forged.
//!
//! Where one value can be spelled in many ways, extractors fold the spellings
//! into one key, since each would otherwise be a fresh one for the same
//! client. Each says what it folds.

use std::{fmt, sync::Arc};

use crate::{
    keyed::{KeyId, Secret},
    request::{Any, Head, Http, View},
};

mod client_ip;
mod extract;
mod forwarded;
#[cfg(test)]
mod tests;
mod value;

pub use client_ip::{ClientIp, PeerAddr, Source};
pub use extract::{
    Cookie, Extension, ExtensionWith, Global, Header, Host, Method, Path, cookie, extension,
    extension_with, header, host, method, path,
};
pub use value::Key;

/// Takes the key from a request.
///
/// `None` says that the request has none; the layer decides what that means
/// ([`or`](ExtractKeyExt::or) names another key instead). Called for each
/// request, outside every lock: it should neither block nor allocate.
///
/// On HTTP a closure is given a [`Head`], elsewhere the request itself.
/// [`from_fn`] spares it the annotation.
///
/// ```
/// use buttress_core::{Any, Head, key::{ExtractKey, Key}};
///
/// fn http(_: impl ExtractKey) {}
/// http(|head: Head<'_>| Some(Key::from(head.method.as_str())));
///
/// fn queue(_: impl ExtractKey<Any<String>>) {}
/// queue(|message: &String| Some(Key::from(message)));
/// ```
pub trait ExtractKey<V: View = Http>: Send + Sync + 'static {
    /// The key of `request`, if it has one.
    fn extract(&self, request: V::Ref<'_>) -> Option<Key>;
}

impl<V, F> ExtractKey<V> for F
where
    V: View,
    F: for<'a> Fn(V::Ref<'a>) -> Option<Key> + Send + Sync + 'static,
{
    #[inline]
    fn extract(&self, request: V::Ref<'_>) -> Option<Key> {
        self(request)
    }
}

/// A key is the extractor that always gives it: a constant part of a tuple.
impl<V: View> ExtractKey<V> for Key {
    fn extract(&self, _: V::Ref<'_>) -> Option<Key> {
        Some(self.clone())
    }
}

macro_rules! tuples {
    ($(($($name:ident $part:ident),*))*) => {$(
        /// All of them together, in this order: the requests must agree in
        /// every part to be counted together. `None` where one has none.
        impl<V: View, $($name: ExtractKey<V>),*> ExtractKey<V> for ($($name,)*) {
            fn extract(&self, request: V::Ref<'_>) -> Option<Key> {
                let ($($part,)*) = self;
                Some(Key::composite([$($part.extract(request)?),*]))
            }
        }
    )*};
}

tuples! {
    (A a, B b)
    (A a, B b, C c)
    (A a, B b, C c, D d)
}

/// A closure over a [`Head`] as an extractor, its argument's type inferred.
/// It returns a [`Key`] or an `Option<Key>`.
///
/// ```
/// use buttress_core::{Head, key::{self, ExtractKey, Key}};
/// use http::Request;
///
/// let by_version = key::from_fn(|head| Key::from(format!("{:?}", head.version)));
/// let request = Request::new(());
/// assert_eq!(by_version.extract(Head::from(&request)), Some(Key::from("HTTP/1.1")));
/// ```
pub fn from_fn<F, K>(extract: F) -> FromFn<F>
where
    F: for<'a> Fn(Head<'a>) -> K + Send + Sync + 'static,
    K: Into<Option<Key>> + 'static,
{
    FromFn { extract }
}

/// [`from_fn`] for services that do not speak HTTP: the closure is given the
/// request itself.
///
/// ```
/// use buttress_core::key::{self, ExtractKey, Key};
///
/// struct Job { tenant: u64 }
/// let by_tenant = key::from_request(|job: &Job| Key::from(job.tenant));
/// assert_eq!(by_tenant.extract(&Job { tenant: 7 }), Some(Key::from(7_u64)));
/// ```
pub fn from_request<Req, F, K>(extract: F) -> FromRequest<F, Req>
where
    Req: 'static,
    F: for<'a> Fn(&'a Req) -> K + Send + Sync + 'static,
    K: Into<Option<Key>> + 'static,
{
    FromRequest {
        extract,
        request: std::marker::PhantomData,
    }
}

/// The extractor of [`from_fn`].
#[derive(Clone, Copy)]
pub struct FromFn<F> {
    extract: F,
}

impl<F> fmt::Debug for FromFn<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FromFn")
    }
}

impl<F, K> ExtractKey for FromFn<F>
where
    F: for<'a> Fn(Head<'a>) -> K + Send + Sync + 'static,
    K: Into<Option<Key>> + 'static,
{
    #[inline]
    fn extract(&self, request: Head<'_>) -> Option<Key> {
        (self.extract)(request).into()
    }
}

/// The extractor of [`from_request`].
pub struct FromRequest<F, Req> {
    extract: F,
    request: std::marker::PhantomData<fn(&Req)>,
}

impl<F: Clone, Req> Clone for FromRequest<F, Req> {
    fn clone(&self) -> Self {
        Self {
            extract: self.extract.clone(),
            request: self.request,
        }
    }
}

impl<F, Req> fmt::Debug for FromRequest<F, Req> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FromRequest")
    }
}

impl<F, Req, K> ExtractKey<Any<Req>> for FromRequest<F, Req>
where
    Req: 'static,
    F: for<'a> Fn(&'a Req) -> K + Send + Sync + 'static,
    K: Into<Option<Key>> + 'static,
{
    #[inline]
    fn extract(&self, request: &Req) -> Option<Key> {
        (self.extract)(request).into()
    }
}

/// Combines extractors.
pub trait ExtractKeyExt<V: View = Http>: ExtractKey<V> + Sized {
    /// The key of `other` where this one finds none, or finds
    /// [several](Key::ambiguous).
    ///
    /// Where both find none there is none; where the first is ambiguous and
    /// the other finds none it stays ambiguous.
    ///
    /// Two extractors of one kind share their keys: with
    /// `header("x-user").or(header("x-guest"))` a guest who calls himself
    /// `alice` counts as the user. A constant tells them apart:
    /// `header("x-user").or((Key::from("guest"), header("x-guest")))`.
    ///
    /// ```
    /// use buttress_core::{Head, key::{self, ExtractKey, ExtractKeyExt, Global, Key}};
    /// use http::Request;
    ///
    /// let by = key::header("x-api-key").or(Global);
    /// let request = Request::new(());
    /// assert_eq!(by.extract(Head::from(&request)), Some(Key::global()));
    /// ```
    fn or<E: ExtractKey<V>>(self, other: E) -> Or<Self, E> {
        Or { first: self, other }
    }

    /// This extractor behind an [`Arc`], its type forgotten.
    fn shared(self) -> SharedKey<V> {
        SharedKey::new(self)
    }
}

impl<V: View, E: ExtractKey<V>> ExtractKeyExt<V> for E {}

/// The extractor of [`ExtractKeyExt::or`].
#[derive(Clone, Copy, Debug)]
pub struct Or<A, B> {
    first: A,
    other: B,
}

impl<V: View, A: ExtractKey<V>, B: ExtractKey<V>> ExtractKey<V> for Or<A, B> {
    fn extract(&self, request: V::Ref<'_>) -> Option<Key> {
        match self.first.extract(request) {
            Some(key) if !key.is_ambiguous() => Some(key),
            none_or_ambiguous => self.other.extract(request).or(none_or_ambiguous),
        }
    }
}

/// An extractor of any type, shared by the clones of a layer.
///
/// ```
/// use buttress_core::key::{self, ClientIp, ExtractKeyExt, Global, SharedKey};
///
/// # fn from_configuration(word: &str) -> SharedKey {
/// match word {
///     "client_ip" => SharedKey::new(ClientIp::new()),
///     _ => Global.shared(),
/// }
/// # }
/// # from_configuration("client_ip");
/// ```
pub struct SharedKey<V: View = Http>(Arc<dyn Identify<V>>);

/// What an extractor can do whose type is forgotten.
trait Identify<V: View>: ExtractKey<V> {
    fn identify(&self, request: V::Ref<'_>, secret: &Secret) -> Option<KeyId>;
}

impl<V: View, E: ExtractKey<V>> Identify<V> for E {
    #[inline]
    fn identify(&self, request: V::Ref<'_>, secret: &Secret) -> Option<KeyId> {
        // Looked at where it was made: a key that is moved before it is hashed
        // costs more than its hash.
        self.extract(request).as_ref().map(|key| secret.id(key))
    }
}

impl<V: View> SharedKey<V> {
    /// Shares `extractor`.
    pub fn new(extractor: impl ExtractKey<V>) -> Self {
        Self(Arc::new(extractor))
    }

    /// The id of the request's key, if it has one: all that a
    /// [`KeyedMap`](crate::keyed::KeyedMap) asks of it, and half the price of
    /// the key.
    #[inline]
    pub fn identify(&self, request: V::Ref<'_>, secret: &Secret) -> Option<KeyId> {
        self.0.identify(request, secret)
    }
}

impl<V: View> Clone for SharedKey<V> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<V: View> fmt::Debug for SharedKey<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedKey")
    }
}

impl<V: View> ExtractKey<V> for SharedKey<V> {
    #[inline]
    fn extract(&self, request: V::Ref<'_>) -> Option<Key> {
        self.0.extract(request)
    }
}

/// A setting of an extractor that makes no sense: its message names the bad
/// part and what is expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError(String);

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ParseError {}
