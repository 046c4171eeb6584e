//! What a layer, its services and their calls have in common.

use std::{
    error::Error as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use buttress_core::{Head, Refusal, clock::SharedWallClock, respond::SharedResponder};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, header::CONTENT_LENGTH, request::Parts};
use tracing::debug;

use super::{Cause, NotSigned, id::Ids, metrics::Metrics};
use crate::{Message, MessageId, SignError, Signer, current::Current};

pub(crate) struct Shared {
    name: Arc<str>,
    active: Current<Arc<Active>>,
    max_body: AtomicUsize,
    clock: SharedWallClock,
    ids: Ids,
    responder: SharedResponder,
}

/// A signer with what counts its signatures.
pub(crate) struct Active {
    pub(crate) signer: Signer,
    metrics: Metrics,
}

impl Shared {
    pub(crate) fn new(
        name: Arc<str>,
        signer: Signer,
        max_body: usize,
        clock: SharedWallClock,
        ids: Ids,
        responder: SharedResponder,
    ) -> Self {
        Self {
            active: Current::new(Active::new(&name, signer)),
            name,
            max_body: AtomicUsize::new(max_body),
            clock,
            ids,
            responder,
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn active(&self) -> Arc<Active> {
        self.active.get()
    }

    pub(crate) fn set_signer(&self, signer: Signer) {
        self.active.set(Active::new(&self.name, signer));
    }

    pub(crate) fn max_body(&self) -> usize {
        self.max_body.load(Relaxed)
    }

    pub(crate) fn set_max_body(&self, bytes: usize) {
        self.max_body.store(bytes, Relaxed);
    }

    /// Signs the request with the body that it is to have.
    pub(crate) fn sign(&self, request: &mut Parts, body: &[u8]) -> Result<(), Cause> {
        // Before, since it may be among what is signed.
        correct_length(&mut request.headers, body.len());
        let active = self.active();
        let signed = self.id(&active.signer, request).and_then(|id| {
            let message = Message {
                id: id.as_ref().map_or("", MessageId::as_str),
                timestamp: self.clock.unix_now().as_secs(),
                body,
            };
            active.signer.sign(request, &message)
        });
        match signed {
            Ok(()) => {
                active.metrics.signed();
                Ok(())
            }
            Err(error) => Err(Cause::Sign(error)),
        }
    }

    /// The header's, the one attached, or a new one where it is needed.
    fn id(&self, signer: &Signer, request: &Parts) -> Result<Option<MessageId>, SignError> {
        if let Some(id) = signer.id(Head::from(request))? {
            return Ok(Some(id));
        }
        if let Some(id) = MessageId::of(&request.extensions) {
            return Ok(Some(id.clone()));
        }
        Ok(signer.signs_id().then(|| self.ids.make()))
    }

    /// Counts it and tells of it.
    #[cold]
    pub(crate) fn not_signed(&self, cause: Cause) -> NotSigned {
        self.active().metrics.not_signed(&cause);
        let result = cause.as_str();
        let why = NotSigned::new(Arc::clone(&self.name), cause);
        debug!(
            name = &*self.name,
            result,
            error = &why as &dyn std::error::Error,
            cause = why.source().map(tracing::field::display),
            "not signed"
        );
        why
    }

    #[cold]
    pub(crate) fn respond(&self, why: &NotSigned, request: &Parts) -> Response<Bytes> {
        self.responder
            .respond(&Refusal::from(why), Head::from(request))
    }
}

impl Active {
    fn new(name: &Arc<str>, signer: Signer) -> Arc<Self> {
        Arc::new(Self {
            metrics: Metrics::new(name, &signer),
            signer,
        })
    }
}

/// What a length says that was set before the body was changed would have the
/// transport cut it off, or wait for more.
fn correct_length(headers: &mut HeaderMap, length: usize) {
    let mut there = headers.get_all(CONTENT_LENGTH).iter();
    let Some(first) = there.next() else {
        return;
    };
    let mut digits = itoa::Buffer::new();
    if first != digits.format(length) || there.next().is_some() {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
}
