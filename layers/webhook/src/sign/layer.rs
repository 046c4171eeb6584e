//! The layer: a signer that all of its services share.

use std::{fmt, marker::PhantomData, sync::Arc};

use tower_layer::Layer;

use super::{Sign, SignBuilder, SignHandle, shared::Shared};
use crate::Signer;

/// Signs what a client sends. The [module](crate::sign) shows it at work.
///
/// It is the innermost layer, so that each attempt of a retry is signed anew:
/// with the time of the attempt, and the id of the message. That is, whichever
/// is there first:
///
/// 1. the header that a scheme of the signer has for it (`webhook-id`, say),
/// 2. the [`MessageId`](crate::MessageId) that is attached to the request,
/// 3. one that is made, where a scheme signs one.
///
/// A retry further out sends clones of the request, each of which would be
/// given an id by the third rule: a [`MessageIdLayer`](crate::MessageIdLayer)
/// outside of it has them share one.
///
/// The body is read as a whole before anything is sent, up to
/// [`max_body`](SignBuilder::max_body); the inner service gets it as a
/// [`WholeBody`](crate::WholeBody). A `Content-Length` that says something
/// else is corrected. What cannot be signed is not sent: an
/// [error](crate::sign::Error), or with [`responses`](SignBuilder::responses)
/// a response.
///
/// The state was made by [`build`](SignBuilder::build): clones of the layer and
/// all services they make share it.
pub struct SignLayer<M = Errors> {
    shared: Arc<Shared>,
    mode: PhantomData<fn() -> M>,
}

/// Answers by responses what is not signed: on HTTP, where the error type stays
/// the inner one.
#[derive(Clone, Copy, Debug)]
pub enum Respond {}

/// Fails with what is not signed: [`Error`](crate::sign::Error), which becomes
/// a [`Refusal`](buttress_core::Refusal) in a
/// [`BoxError`](buttress_core::BoxError).
#[derive(Clone, Copy, Debug)]
pub enum Errors {}

impl SignLayer {
    /// Starts a layer that signs by `signer`, and fails with what it cannot
    /// sign.
    pub fn builder(signer: Signer) -> SignBuilder {
        SignBuilder::new(signer)
    }
}

impl<M> SignLayer<M> {
    pub(crate) fn new(shared: Shared) -> Self {
        Self {
            shared: Arc::new(shared),
            mode: PhantomData,
        }
    }

    /// Looks at what signs and changes it, while it serves.
    #[must_use]
    pub fn handle(&self) -> SignHandle {
        SignHandle::new(Arc::clone(&self.shared))
    }
}

impl<S, M> Layer<S> for SignLayer<M> {
    type Service = Sign<S, M>;

    fn layer(&self, inner: S) -> Self::Service {
        Sign::new(inner, Arc::clone(&self.shared))
    }
}

impl<M> Clone for SignLayer<M> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            mode: PhantomData,
        }
    }
}

impl<M> fmt::Debug for SignLayer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignLayer")
            .field("name", &self.shared.name())
            .field("signer", &self.shared.active().signer)
            .finish_non_exhaustive()
    }
}
