//! What a message is known by, whichever attempt brings it.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{Extensions, Request};
use tower_layer::Layer;
use tower_service::Service;

use crate::{SignError, text};

/// The id of a message, as an extension of the request that carries it: the
/// same for each attempt, so that the receiver knows a repeat.
///
/// ```
/// use buttress_webhook::MessageId;
/// use http::Request;
///
/// let mut request = Request::post("/hooks").body(())?;
/// MessageId::new("evt_4711")?.attach(request.extensions_mut());
/// assert_eq!(MessageId::of(request.extensions()).unwrap().as_str(), "evt_4711");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct MessageId(Arc<str>);

impl MessageId {
    /// This id.
    ///
    /// # Errors
    ///
    /// Unless it is 1 to 256 printable characters of ASCII without spaces.
    /// [`Standard`](crate::Standard) signs none with a `.`.
    pub fn new(id: impl Into<Arc<str>>) -> Result<Self, SignError> {
        let id = id.into();
        match text::is_id(&id) {
            true => Ok(Self(id)),
            false => Err(SignError::Id),
        }
    }

    /// `msg_` and 128 random bits of the system's, in characters that need no
    /// escape in a URL: letters, digits, `-` and `_`.
    ///
    /// # Panics
    ///
    /// If the system has no randomness.
    #[must_use]
    pub fn random() -> Self {
        const PREFIX: &[u8] = b"msg_";
        let mut bits = [0; 16];
        getrandom::fill(&mut bits).expect("the system has randomness");
        let mut text = [0; PREFIX.len() + 22];
        text[..PREFIX.len()].copy_from_slice(PREFIX);
        BASE64_URL_SAFE_NO_PAD
            .encode_slice(bits, &mut text[PREFIX.len()..])
            .expect("22 characters hold 16 bytes");
        let text = str::from_utf8(&text).expect("base64 is ASCII");
        Self(text.into())
    }

    /// The id that is attached to a request. Give the request's extensions.
    #[must_use]
    pub fn of(extensions: &Extensions) -> Option<&Self> {
        extensions.get()
    }

    /// Attaches it to a request, in the place of one that may be there.
    pub fn attach(self, extensions: &mut Extensions) {
        extensions.insert(self);
    }

    /// Its characters.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MessageId").field(&self.0).finish()
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where new ids come from.
#[derive(Clone)]
pub(crate) struct Ids(Arc<dyn Fn() -> MessageId + Send + Sync>);

impl Ids {
    pub(crate) fn new(ids: impl Fn() -> MessageId + Send + Sync + 'static) -> Self {
        Self(Arc::new(ids))
    }

    pub(crate) fn make(&self) -> MessageId {
        (self.0)()
    }
}

impl Default for Ids {
    fn default() -> Self {
        Self::new(MessageId::random)
    }
}

impl fmt::Debug for Ids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ids")
    }
}

/// Attaches a [`MessageId`] to each request that has none.
///
/// It stands outside of a retry, and the [`SignLayer`](crate::SignLayer)
/// inside: a retry clones the request with its extensions, so that all
/// attempts are signed with this id. Without it each attempt would get one of
/// its own, and the receiver would take them for several messages.
#[derive(Clone, Debug, Default)]
pub struct MessageIdLayer {
    ids: Ids,
}

impl MessageIdLayer {
    /// With [random](MessageId::random) ids.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With ids from here: ones that sort, or that a test knows. Called on the
    /// hot path, outside every lock.
    #[must_use]
    pub fn ids(mut self, ids: impl Fn() -> MessageId + Send + Sync + 'static) -> Self {
        self.ids = Ids::new(ids);
        self
    }
}

impl<S> Layer<S> for MessageIdLayer {
    type Service = MessageIds<S>;

    fn layer(&self, inner: S) -> Self::Service {
        MessageIds {
            inner,
            ids: self.ids.clone(),
        }
    }
}

/// The service of a [`MessageIdLayer`]. Readiness, responses, errors and
/// futures are the inner service's.
#[derive(Clone, Debug)]
pub struct MessageIds<S> {
    inner: S,
    ids: Ids,
}

impl<S> MessageIds<S> {
    /// The inner service.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The inner service.
    pub const fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// The inner service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, B> Service<Request<B>> for MessageIds<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> S::Future {
        if MessageId::of(request.extensions()).is_none() {
            self.ids.make().attach(request.extensions_mut());
        }
        self.inner.call(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_ids_are_ids_and_differ() {
        let id = MessageId::random();
        assert_eq!(id.as_str().len(), 26);
        assert!(id.as_str().starts_with("msg_"));
        // 2⁻¹²⁸ for a false alarm.
        assert_ne!(id, MessageId::random());
        for _ in 0..1000 {
            let id = MessageId::random();
            let sound = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
            assert!(id.as_str().bytes().all(sound), "{id}");
            assert!(MessageId::new(id.to_string()).is_ok());
        }
    }

    #[test]
    fn what_is_no_id_is_none() {
        for id in ["", "a b", "a\nb", "ä", &"x".repeat(257)] {
            assert_eq!(MessageId::new(id), Err(SignError::Id), "{id:?}");
        }
        assert!(MessageId::new("x".repeat(256)).is_ok());
    }
}
