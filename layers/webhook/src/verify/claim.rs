//! A claim that is held, and how it ends.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use buttress_core::{
    BoxError,
    body::{BodyEnd, BodyGuard, GuardedBody, ResponseBody},
    respond::GRPC_STATUS,
};
use http::HeaderMap;
use tokio::runtime;

use super::{
    replay::{Claim, ClaimKey, ClaimToken, ReplayStore},
    shared::Shared,
};

/// The body of a response behind [`VerifyLayer`](crate::VerifyLayer): a
/// refusal's, or the handler's, with whose end a claim is completed or
/// released.
pub type VerifyBody<B> = ResponseBody<GuardedBody<B, Settle>>;

/// A claim in the hands of the one request that has it. Dropping it releases
/// it.
pub(crate) struct Held {
    shared: Arc<Shared>,
    place: Option<Place>,
}

/// Where a claim is.
pub(crate) enum Place {
    Memory(ClaimToken),
    /// In memory, since the store failed.
    Local(Arc<dyn ReplayStore>, ClaimKey, ClaimToken),
    Store(Arc<dyn ReplayStore>, ClaimKey, ClaimToken),
}

impl Held {
    pub(crate) const fn new(shared: Arc<Shared>, place: Place) -> Self {
        Self {
            shared,
            place: Some(place),
        }
    }

    pub(crate) fn complete(mut self) {
        match self.place.take() {
            None => {}
            Some(Place::Memory(token)) => self.shared.complete_here(token),
            Some(Place::Local(store, key, token)) => {
                self.shared.complete_here(token);
                let keep = self.shared.keep();
                // That the store fails has been told, and not that it works.
                if let Ok(runtime) = runtime::Handle::try_current() {
                    runtime.spawn(async move { store.remember(&key, keep).await });
                }
            }
            Some(Place::Store(store, key, token)) => {
                let keep = self.shared.keep();
                self.shared.in_background("complete", async move {
                    store.complete(&key, token, keep).await
                });
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        match self.place.take() {
            None => {}
            Some(Place::Memory(token) | Place::Local(_, _, token)) => {
                self.shared.release_here(token);
            }
            Some(Place::Store(store, key, token)) => {
                self.shared
                    .in_background("release", async move { store.release(&key, token).await });
            }
        }
    }
}

/// Settles a claim when the response's body has ended.
pub struct Settle(Option<Held>);

impl Settle {
    pub(crate) const fn new(held: Option<Held>) -> Self {
        Self(held)
    }
}

impl BodyGuard for Settle {
    fn ended(self, end: BodyEnd<'_>, _: u64) {
        let Some(held) = self.0 else {
            return;
        };
        match end {
            BodyEnd::Complete { trailers } if trailers.is_some_and(has_grpc_failed) => {}
            // The head said that it is done, and who left did not undo it.
            BodyEnd::Complete { .. } | BodyEnd::Dropped => held.complete(),
            _ => {}
        }
    }
}

impl fmt::Debug for Settle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Settle").field(&self.0.is_some()).finish()
    }
}

/// Whether the headers or trailers have a status of gRPC that is not OK.
pub(crate) fn has_grpc_failed(fields: &HeaderMap) -> bool {
    fields.get(GRPC_STATUS).is_some_and(|status| status != "0")
}

type Asking = Pin<Box<dyn Future<Output = Result<Claim, BoxError>> + Send>>;

/// A claim that is asked for in a store.
///
/// Whoever drops it does not know whether the store has granted it already. So
/// it is waited for in the background, and given back.
pub(crate) struct Claiming {
    shared: Arc<Shared>,
    store: Arc<dyn ReplayStore>,
    key: ClaimKey,
    asking: Option<Asking>,
    asked: bool,
}

impl Claiming {
    pub(crate) fn new(shared: Arc<Shared>, store: Arc<dyn ReplayStore>, key: ClaimKey) -> Self {
        let keep = shared.keep();
        let asking = {
            let (store, key) = (Arc::clone(&store), key.clone());
            Box::pin(async move { store.claim(&key, keep).await })
        };
        Self {
            shared,
            store,
            key,
            asking: Some(asking),
            asked: false,
        }
    }

    pub(crate) fn key(&self) -> &ClaimKey {
        &self.key
    }

    /// Where what was granted is that the store has not decided.
    pub(crate) fn local(&self, token: ClaimToken) -> Place {
        Place::Local(Arc::clone(&self.store), self.key.clone(), token)
    }

    /// Where what was granted is.
    pub(crate) fn place(&self, token: ClaimToken) -> Place {
        Place::Store(Arc::clone(&self.store), self.key.clone(), token)
    }
}

impl Future for Claiming {
    type Output = Result<Claim, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.asked = true;
        let asking = self.asking.as_mut().expect("polled after completion");
        let claim = ready!(asking.as_mut().poll(cx));
        self.asking = None;
        Poll::Ready(claim)
    }
}

impl Drop for Claiming {
    fn drop(&mut self) {
        let Some(asking) = self.asking.take().filter(|_| self.asked) else {
            return;
        };
        let (store, key) = (Arc::clone(&self.store), self.key.clone());
        self.shared.in_background("release", async move {
            match asking.await? {
                Claim::New(token) => store.release(&key, token).await,
                _ => Ok(()),
            }
        });
    }
}
