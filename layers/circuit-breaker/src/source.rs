//! Which breaker a request has: one for all, or one for each key.

use std::fmt;

use buttress_core::{
    Refusal, View,
    key::{ExtractKey, Key, SharedKey},
};

use crate::{Breaker, CircuitOpen, Permit, Registry};

/// Where a layer's breakers come from: a [`Breaker`] for all requests, or
/// [`PerKey`]. There are no others.
pub trait Source<V: View>: sealed::Sealed<V> {}

impl<V: View> Source<V> for Breaker {}
impl<V: View> Source<V> for PerKey<V> {}

pub(crate) mod sealed {
    use super::{Breaker, CircuitOpen, Permit, Refusal, View};

    pub trait Sealed<V: View>: Send + Sync + 'static {
        /// Asks the request's breaker for leave to call, where its lease was
        /// not enough to say.
        fn admit(&self, request: V::Ref<'_>) -> Result<Permit, CircuitOpen>;

        /// The refusal that a responder is shown.
        fn refusal(&self, open: &CircuitOpen) -> Refusal;

        /// A service is made of it.
        #[cfg(feature = "redis")]
        fn attend(&self);

        /// The breaker of all requests, if that is one.
        fn one(&self) -> Option<&Breaker>;
    }
}

impl<V: View> sealed::Sealed<V> for Breaker {
    fn admit(&self, _: V::Ref<'_>) -> Result<Permit, CircuitOpen> {
        self.try_acquire_otherwise()
    }

    fn refusal(&self, open: &CircuitOpen) -> Refusal {
        // Without the lock that an error takes to learn the name.
        open.refusal().with_origin(self.name().to_string())
    }

    #[cfg(feature = "redis")]
    fn attend(&self) {
        Breaker::attend(self);
    }

    #[inline]
    fn one(&self) -> Option<&Breaker> {
        Some(self)
    }
}

/// A breaker for each key, from a [`Registry`]:
/// [`per`](crate::CircuitBreakerBuilder::per).
pub struct PerKey<V: View> {
    key: SharedKey<V>,
    registry: Registry,
}

impl<V: View> PerKey<V> {
    pub(crate) fn new(key: SharedKey<V>, registry: Registry) -> Self {
        Self { key, registry }
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }
}

impl<V: View> sealed::Sealed<V> for PerKey<V> {
    #[inline]
    fn admit(&self, request: V::Ref<'_>) -> Result<Permit, CircuitOpen> {
        let key = self.key.extract(request);
        self.registry.try_acquire(&key.unwrap_or(Key::global()))
    }

    fn refusal(&self, open: &CircuitOpen) -> Refusal {
        (*open).into()
    }

    #[cfg(feature = "redis")]
    fn attend(&self) {
        self.registry.attend();
    }

    #[inline]
    fn one(&self) -> Option<&Breaker> {
        None
    }
}

impl<V: View> fmt::Debug for PerKey<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PerKey").field(&self.registry).finish()
    }
}
