//! Signing without a stack around it.

use std::sync::Arc;

use buttress_core::Head;
use http::request::Parts;

use crate::{Key, Keyring, Message, MessageId, Scheme, Secret, SecretError, SignError};

/// Signs requests, by one scheme or by several at once.
///
/// What [`SignLayer`](crate::SignLayer) does its work with; by itself for who
/// sends in another way, or tests a receiver. Cheap to clone.
///
/// ```
/// use buttress_webhook::{Message, Secret, Signer, Standard, Stripe};
/// use http::Request;
///
/// let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
/// let signer = Signer::new(Standard::new(), [secret.clone()])?.and(Stripe, [secret])?;
///
/// let (mut request, ()) = Request::post("/hooks").body(())?.into_parts();
/// signer.sign(
///     &mut request,
///     &Message {
///         id: "msg_p5jXN8AQM9LWM0D4loKWxJek",
///         timestamp: 1_614_265_330,
///         body: br#"{"test": 2432232314}"#,
///     },
/// )?;
/// assert_eq!(
///     request.headers["webhook-signature"],
///     "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
/// );
/// assert!(request.headers["stripe-signature"].to_str()?.starts_with("t=1614265330,v1="));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Signer {
    first: Arc<Part>,
    more: Vec<Arc<Part>>,
}

#[derive(Debug)]
struct Part {
    scheme: Box<dyn Scheme>,
    keys: Keyring,
}

impl Signer {
    /// Signs by `scheme`, with each of the secrets: two during a rotation,
    /// the newer one first.
    ///
    /// # Errors
    ///
    /// If there is none, if there are more than the scheme has room for, or if
    /// one is none of this scheme.
    pub fn new(
        scheme: impl Scheme,
        secrets: impl IntoIterator<Item = Secret>,
    ) -> Result<Self, SecretError> {
        Ok(Self {
            first: Part::new(scheme, secrets)?,
            more: Vec::new(),
        })
    }

    /// Signs by `scheme`, too: while receivers move from one to the other.
    ///
    /// Give it a secret of its own where it is not told apart by its key: who
    /// has a signature of a body by one scheme has that of another one, where
    /// the signed bytes and the key's are the same. A scheme that writes the
    /// headers of one before it replaces its signatures: the secrets of a
    /// rotation go to it together.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn and(
        mut self,
        scheme: impl Scheme,
        secrets: impl IntoIterator<Item = Secret>,
    ) -> Result<Self, SecretError> {
        self.more.push(Part::new(scheme, secrets)?);
        Ok(self)
    }

    /// Writes the signatures into the request's headers, in the place of those
    /// that may be there.
    ///
    /// # Errors
    ///
    /// If a scheme cannot sign the message; the request is then not to be sent,
    /// since others may have signed it.
    pub fn sign(&self, request: &mut Parts, message: &Message<'_>) -> Result<(), SignError> {
        self.first.sign(request, message)?;
        self.more
            .iter()
            .try_for_each(|part| part.sign(request, message))
    }

    /// The names of the schemes.
    pub fn schemes(&self) -> impl Iterator<Item = &'static str> {
        self.parts().map(|part| part.scheme.name())
    }

    /// Whether one of the schemes signs the message's id.
    #[must_use]
    pub fn signs_id(&self) -> bool {
        self.parts().any(|part| part.scheme.signs_id())
    }

    /// The id that stands in a [header](Scheme::id_header) of one of the
    /// schemes.
    pub(crate) fn id(&self, request: Head<'_>) -> Result<Option<MessageId>, SignError> {
        let headers = self.parts().filter_map(|part| part.scheme.id_header());
        for header in headers {
            let mut values = request.headers.get_all(header).iter();
            let Some(value) = values.next() else {
                continue;
            };
            let only = values.next().is_none();
            let id = value.to_str().ok().filter(|_| only);
            return MessageId::new(id.ok_or(SignError::Id)?).map(Some);
        }
        Ok(None)
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        std::iter::once(&self.first)
            .chain(&self.more)
            .map(|part| &**part)
    }
}

impl Part {
    fn new(
        scheme: impl Scheme,
        secrets: impl IntoIterator<Item = Secret>,
    ) -> Result<Arc<Self>, SecretError> {
        let keys = Keyring::new(&scheme, secrets)?;
        let most = scheme.most_keys();
        if keys.len() > most {
            return Err(match most {
                1 => SecretError::OneOnly {
                    scheme: scheme.name(),
                },
                most => SecretError::TooMany { most },
            });
        }
        Ok(Arc::new(Self {
            scheme: Box::new(scheme),
            keys,
        }))
    }

    fn sign(&self, request: &mut Parts, message: &Message<'_>) -> Result<(), SignError> {
        let keys: &[Key] = self.keys.keys();
        self.scheme.sign(request, message, keys)
    }
}
