//! What a layer is made of, checked once by `build()`.

use std::{fmt, marker::PhantomData, sync::Arc};

use buttress_core::{
    Responder,
    clock::{SharedWallClock, WallClock},
    label,
    respond::SharedResponder,
};

use super::{Errors, MessageId, Respond, SignConfigError, SignLayer, id::Ids, shared::Shared};
use crate::Signer;

/// The longest body that is signed, unless it is set otherwise.
const MAX_BODY: usize = 1024 * 1024;

/// Builds a [`SignLayer`].
#[must_use = "nothing is signed before `build()`"]
pub struct SignBuilder<M = Errors> {
    name: Arc<str>,
    signer: Signer,
    max_body: usize,
    clock: SharedWallClock,
    ids: Ids,
    responder: SharedResponder,
    mode: PhantomData<fn() -> M>,
}

impl SignBuilder {
    pub(crate) fn new(signer: Signer) -> Self {
        Self {
            name: "default".into(),
            signer,
            max_body: MAX_BODY,
            clock: SharedWallClock::default(),
            ids: Ids::default(),
            responder: SharedResponder::default(),
            mode: PhantomData,
        }
    }

    /// Answers with responses in the place of errors, so that the error type
    /// stays the inner one: 413 to a body that is too long, 400 to one that
    /// broke off, 500 to what a scheme cannot sign. For a proxy, say.
    pub fn responses(self) -> SignBuilder<Respond> {
        SignBuilder {
            name: self.name,
            signer: self.signer,
            max_body: self.max_body,
            clock: self.clock,
            ids: self.ids,
            responder: self.responder,
            mode: PhantomData,
        }
    }
}

impl SignBuilder<Respond> {
    /// Makes the answers to what is not signed. Default:
    /// [`ProblemResponder`](buttress_core::ProblemResponder).
    pub fn responder(mut self, responder: impl Responder) -> Self {
        self.responder = SharedResponder::new(responder);
        self
    }
}

impl<M> SignBuilder<M> {
    /// Names the layer: for logs and metrics. 1 to 128 printable ASCII
    /// characters. Default `default`.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// How many bytes of a body are kept to be signed. A longer one is not
    /// sent. Default 1 MiB. It can be changed later, by the
    /// [handle](crate::SignHandle).
    pub const fn max_body(mut self, bytes: usize) -> Self {
        self.max_body = bytes;
        self
    }

    /// The clock that timestamps are from, read when a request is signed.
    /// Default: the system's.
    pub fn wall_clock(mut self, clock: impl WallClock) -> Self {
        self.clock = SharedWallClock::new(clock);
        self
    }

    /// Where the ids come from of messages that have none. Default:
    /// [`MessageId::random`]. Called on the hot path, outside every lock.
    pub fn ids(mut self, ids: impl Fn() -> MessageId + Send + Sync + 'static) -> Self {
        self.ids = Ids::new(ids);
        self
    }

    /// Checks the settings and makes the state that all clones of the layer
    /// share.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings: see [`SignConfigError`].
    pub fn build(self) -> Result<SignLayer<M>, SignConfigError> {
        if !label::is_sound(&self.name, 128) {
            return Err(SignConfigError(()));
        }
        Ok(SignLayer::new(Shared::new(
            self.name,
            self.signer,
            self.max_body,
            self.clock,
            self.ids,
            self.responder,
        )))
    }
}

impl<M> fmt::Debug for SignBuilder<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignBuilder")
            .field("name", &self.name)
            .field("signer", &self.signer)
            .field("max_body", &self.max_body)
            .finish_non_exhaustive()
    }
}

/// So that the compiler can say it where the layer is built, not where it is
/// used: what a client's stack asks of a layer.
const _: fn() = || {
    fn fits<T: Clone + Send + Sync + 'static>() {}
    fits::<SignLayer>();
    fits::<SignLayer<Respond>>();
    fits::<super::Sign<()>>();
};
