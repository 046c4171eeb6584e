//! What a layer is made of, checked once by `build()`.

use std::{fmt, marker::PhantomData, num::NonZeroUsize, sync::Arc, time::Duration};

use buttress_core::{
    Any, Http, Responder,
    key::{ExtractKey, SharedKey},
    respond::SharedResponder,
};

use crate::{
    Call, ConfigError, Cut, Errors, Fence, Keep, LockLayer, MissingKey, Respond, Target,
    shared::{Core, Kind, Shared, Tell},
    store::{Store, memory::Memory},
};
#[cfg(feature = "redis")]
use crate::{OnStoreError, store::redis::Remote};

/// Builds a [`LockLayer`].
#[must_use = "nothing is locked before `build()`"]
pub struct LockBuilder<V: Target = Http, M = Respond, X = Keep> {
    name: Arc<str>,
    key: SharedKey<V>,
    missing: MissingKey,
    ttl: Duration,
    wait: Duration,
    retry_after: Option<Duration>,
    max_keys: NonZeroUsize,
    cut: bool,
    tell: Option<Tell<V>>,
    responder: SharedResponder,
    #[cfg(feature = "redis")]
    redis: Option<buttress_redis::Redis>,
    #[cfg(feature = "redis")]
    on_store_error: OnStoreError,
    kind: Kind<V, M, X>,
}

impl<V: Target, M, X> LockBuilder<V, M, X> {
    pub(crate) fn new(key: impl ExtractKey<V>) -> Self {
        Self {
            name: "default".into(),
            key: SharedKey::new(key),
            missing: MissingKey::default(),
            ttl: Duration::from_secs(30),
            wait: Duration::ZERO,
            retry_after: Some(Duration::from_secs(1)),
            max_keys: const { NonZeroUsize::new(100_000).unwrap() },
            cut: false,
            tell: None,
            responder: SharedResponder::default(),
            #[cfg(feature = "redis")]
            redis: None,
            #[cfg(feature = "redis")]
            on_store_error: OnStoreError::default(),
            kind: PhantomData,
        }
    }

    fn into_kind<N, Y>(self) -> LockBuilder<V, N, Y> {
        LockBuilder {
            name: self.name,
            key: self.key,
            missing: self.missing,
            ttl: self.ttl,
            wait: self.wait,
            retry_after: self.retry_after,
            max_keys: self.max_keys,
            cut: self.cut,
            tell: self.tell,
            responder: self.responder,
            #[cfg(feature = "redis")]
            redis: self.redis,
            #[cfg(feature = "redis")]
            on_store_error: self.on_store_error,
            kind: PhantomData,
        }
    }

    /// Names the layer: for logs, metrics and the keys in Redis, where layers
    /// of one name share their locks. 1 to 64 printable ASCII characters.
    /// Default `default`.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// What happens to a request without a key. Default: refused.
    pub fn missing_key(mut self, missing: MissingKey) -> Self {
        self.missing = missing;
        self
    }

    /// How long a lock is held in Redis by a process that has crashed. While a
    /// request holds it, it is extended each third of that. 10 ms to a day;
    /// several times Redis's time limit, so that an extension may fail.
    /// Default: 30 s. In one process it says nothing: a lock ends with its
    /// request.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// How long a request waits for a lock that another one holds. At most a
    /// day; default: not at all.
    ///
    /// In one process they are in line. Over Redis they are, too, and the first
    /// in line asks again each 25 to 50 ms; of several processes any may be
    /// next.
    ///
    /// While it waits it keeps what it was promised by the inner service (a
    /// slot of a concurrency limit, say).
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// When a request is told to come again that found the lock held. Default:
    /// a second; nobody can know.
    pub fn retry_after(mut self, wait: impl Into<Option<Duration>>) -> Self {
        self.retry_after = wait.into();
        self
    }

    /// How many keys can be held or waited for at once in this process; one
    /// more is refused, 503. Default: 100 000.
    pub fn max_keys(mut self, max_keys: NonZeroUsize) -> Self {
        self.max_keys = max_keys;
        self
    }

    /// Has the locks be leases in Redis, that all processes share whose layers
    /// have this [name](Self::name).
    #[cfg(feature = "redis")]
    pub fn redis(mut self, redis: &buttress_redis::Redis) -> Self {
        self.redis = Some(redis.clone());
        self
    }

    /// What happens to a request when Redis cannot be asked. Default: refused.
    #[cfg(feature = "redis")]
    pub fn on_store_error(mut self, on_store_error: OnStoreError) -> Self {
        self.on_store_error = on_store_error;
        self
    }

    /// Tells each request that has got its lock: over HTTP the extensions, in
    /// the place of the default, which puts the [`Fence`] there; elsewhere the
    /// request itself, and by default nothing.
    pub fn telling(
        mut self,
        tell: impl for<'a> Fn(V::Mut<'a>, Fence) + Send + Sync + 'static,
    ) -> Self {
        self.tell = Some(Arc::new(tell));
        self
    }

    /// Checks the settings and makes the state that all clones of the layer
    /// share.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings: see [`ConfigError`].
    pub fn build(self) -> Result<LockLayer<V, M, X>, ConfigError> {
        Shared::<V>::check(self.retry_after)?;
        let core = Core::new(self.name, self.ttl, self.wait)?;
        let line = Arc::new(Memory::new(self.max_keys));
        #[cfg(feature = "redis")]
        let store = match self.redis {
            Some(redis) => Store::Redis(Remote::new(redis), line),
            None => Store::Memory(line),
        };
        #[cfg(not(feature = "redis"))]
        let store = Store::Memory(line);
        Ok(LockLayer::new(Shared {
            core: Arc::new(core),
            key: self.key,
            missing: self.missing,
            retry_after: self.retry_after,
            cut: self.cut,
            tell: self.tell,
            responder: self.responder,
            store,
            #[cfg(feature = "redis")]
            on_store_error: self.on_store_error,
        }))
    }
}

impl<X> LockBuilder<Http, Respond, X> {
    /// Makes the answers where there is no lock. Default:
    /// [`ProblemResponder`](buttress_core::ProblemResponder), a 409, or gRPC's
    /// ABORTED.
    ///
    /// Where a request may yet be refused after it was given away (it waits,
    /// or is [cut](Self::cut_when_lost), or Redis is asked), the responder says
    /// what to [keep](Responder::keep) of it: nothing is allocated for the
    /// default one, the whole head is copied for a closure.
    pub fn responder(mut self, responder: impl Responder) -> Self {
        self.responder = SharedResponder::new(responder);
        self
    }

    /// Fails with errors in place of responses, for clients: the service's
    /// error becomes [`Error`](crate::Error).
    pub fn errors(self) -> LockBuilder<Http, Errors, X> {
        self.into_kind()
    }
}

impl<M> LockBuilder<Http, M, Keep> {
    /// Drops a call whose lock is lost, and cuts a body, which becomes a
    /// [`CutBody`](crate::CutBody): what was begun is not taken back, but as
    /// little as can be is done beside the next holder. Default: it goes on,
    /// and its [`Fence`] tells.
    pub fn cut_when_lost(mut self) -> LockBuilder<Http, M, Cut> {
        self.cut = true;
        self.into_kind()
    }
}

impl<Req: 'static> LockBuilder<Any<Req>, Errors, Call> {
    /// Drops a call whose lock is lost, and fails. Default: it goes on, and its
    /// [`Fence`] tells.
    pub fn cut_when_lost(mut self) -> Self {
        self.cut = true;
        self
    }
}

impl<V: Target, M, X> fmt::Debug for LockBuilder<V, M, X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockBuilder")
            .field("name", &self.name)
            .field("missing_key", &self.missing)
            .field("ttl", &self.ttl)
            .field("wait", &self.wait)
            .field("retry_after", &self.retry_after)
            .field("max_keys", &self.max_keys)
            .field("cut_when_lost", &self.cut)
            .finish_non_exhaustive()
    }
}

/// So that the compiler can say it where the layer is built, not where it is
/// used: what a server stack asks of a layer.
const _: fn() = || {
    fn fits<T: Clone + Send + Sync + 'static>() {}
    fits::<LockLayer>();
    fits::<LockLayer<Http, Errors, Cut>>();
    fits::<LockLayer<Any<std::cell::Cell<u8>>, Errors, Call>>();
    fits::<crate::Lock<()>>();
};

#[cfg(test)]
mod tests {
    use buttress_core::key::Global;

    use super::*;

    #[test]
    fn what_makes_no_sense_is_named() {
        let new = || LockLayer::builder(Global);
        for name in ["", "caf\u{e9}", "a\nb", &"x".repeat(65)] {
            let error = new().name(name).build().unwrap_err().to_string();
            assert!(error.contains("name"), "{name:?}");
        }
        let day = Duration::from_secs(24 * 3600);
        let nano = Duration::from_nanos(1);
        for ttl in [Duration::ZERO, Duration::from_millis(10) - nano, day + nano] {
            let error = new().ttl(ttl).build().unwrap_err().to_string();
            assert!(error.contains("lease"), "{ttl:?}");
        }
        let error = new().wait(day + nano).build().unwrap_err().to_string();
        assert!(error.contains("wait"));
        let error = new().retry_after(day + nano).build().unwrap_err();
        assert!(error.to_string().contains("retry_after"));
        let layer = new().ttl(day).wait(day).retry_after(day).build().unwrap();
        assert_eq!(layer.handle().ttl(), day);
        assert!(layer.handle().set_ttl(Duration::ZERO).is_err());
        assert!(layer.handle().set_wait(Duration::MAX).is_err());
        assert_eq!(layer.handle().ttl(), day);
        assert_eq!(layer.handle().wait(), day);
    }
}
