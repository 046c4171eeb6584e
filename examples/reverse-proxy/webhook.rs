//! Verifying what comes in and signing what goes out, where a route asks for
//! it: then a request's body is held as a whole, within `max_body`.

use std::{
    num::NonZeroUsize,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use buttress::{
    BoxError, Refusal,
    redis::Redis,
    webhook::{MessageId, SignLayer, VerifyLayer, WholeBody, sign::Error},
};
use bytes::Bytes;
use http::{HeaderValue, Request, header::GetAll};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use pin_project_lite::pin_project;

use crate::{
    body::Timed,
    forward::Failed,
    headers,
    settings::{Limits, Name, SignWebhook, VerifyWebhook},
};

/// How many messages a route remembers: for the ten minutes that five of
/// tolerance take, 1600 a second. At some 250 bytes each.
const MAX_REPLAYS: NonZeroUsize = NonZeroUsize::new(1_000_000).unwrap();

/// The layer for a route whose requests must be signed.
pub(crate) fn verify(
    name: &Name,
    rule: &VerifyWebhook,
    limits: &Limits,
    redis: Option<&Redis>,
) -> VerifyLayer {
    let mut layer = rule
        .builder()
        .name(name.0.clone())
        .max_body(limits.max_body.in_memory())
        .max_replays(MAX_REPLAYS);
    if let (Some(redis), true) = (redis, rule.effective_replay_protection()) {
        layer = layer.redis(redis);
    }
    layer.build().expect("checked in the settings")
}

/// The layer for a route that signs each attempt.
pub(crate) fn sign(name: &Name, rule: &SignWebhook, limits: &Limits) -> SignLayer {
    SignLayer::builder(rule.signer())
        .name(name.0.clone())
        .max_body(limits.max_body.in_memory())
        .build()
        .expect("the name is a good one")
}

/// What comes before the signature. A client that names its headers in
/// `Connection` would have them taken away after they are written; and with an
/// id that cannot be signed its request could not go at all.
pub(crate) fn signable<B>(
    rule: &SignWebhook,
) -> impl Fn(Request<B>) -> Request<B> + Clone + use<B> {
    let id = rule.id_header();
    move |mut request| {
        let headers = request.headers_mut();
        headers::forget_named(headers);
        if let Some(id) = &id
            && !is_good(&headers.get_all(id))
        {
            headers.remove(id);
        }
        request
    }
}

/// Whether it stands once and can be signed, by each of the schemes.
fn is_good(values: &GetAll<'_, HeaderValue>) -> bool {
    let mut values = values.iter();
    let (Some(id), None) = (values.next(), values.next()) else {
        return false;
    };
    id.to_str()
        .is_ok_and(|id| !id.contains('.') && MessageId::new(id).is_ok())
}

impl From<Error<Failed>> for Failed {
    fn from(error: Error<Failed>) -> Self {
        match error {
            Error::Inner(failed) => failed,
            Error::NotSigned(not_signed) => Refusal::from(&not_signed).into(),
        }
    }
}

pin_project! {
    /// A request's body on its way through a route's layers.
    #[project = UploadProj]
    pub(crate) enum Upload {
        /// As the client sends it.
        Streaming { #[pin] body: Timed<Incoming> },
        /// All of it, verified.
        Whole { #[pin] body: WholeBody },
    }
}

impl Upload {
    /// With how long a client may send nothing of what is going to be held; what
    /// is forwarded as it comes is timed there.
    pub(crate) fn of(
        silence: Option<Duration>,
    ) -> impl Fn(Request<Incoming>) -> Request<Self> + Clone {
        move |request| {
            request.map(|body| Self::Streaming {
                body: Timed::new(body, silence),
            })
        }
    }

    pub(crate) fn whole(request: Request<WholeBody>) -> Request<Self> {
        request.map(|body| Self::Whole { body })
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.project() {
            UploadProj::Streaming { body } => body.poll_frame(cx),
            UploadProj::Whole { body } => body.poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Streaming { body } => body.is_end_stream(),
            Self::Whole { body } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Streaming { body } => body.size_hint(),
            Self::Whole { body } => body.size_hint(),
        }
    }
}
