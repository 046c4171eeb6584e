//! What a layer is made of, checked once by `build()`.

use std::{
    fmt::{self, Display},
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use buttress_core::{
    Head, Responder,
    clock::{SharedWallClock, WallClock},
    label,
    respond::SharedResponder,
    sync::Mutex,
};
use http::{HeaderMap, StatusCode};

use super::{
    Lookup, OnStoreError, Repeat, ReplayStore, VerifyConfigError, VerifyLayer,
    error::Problem,
    lookup::{Cached, Keep, Tenants},
    replay::Memory,
    shared::{Completes, Endpoint, Parts, Replays, Secrets, Shared},
};
use crate::{Keyring, Scheme, Secret, current::Current, verifier::TOLERANCE};

const MAX_BODY: usize = 1024 * 1024;
const MAX_REPLAYS: NonZeroUsize = NonZeroUsize::new(100_000).unwrap();
const MAX_TENANTS: NonZeroUsize = NonZeroUsize::new(10_000).unwrap();
const LOOKUP_TTL: Duration = Duration::from_secs(60);
const UNKNOWN_TTL: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// Builds a [`VerifyLayer`].
#[must_use = "nothing is verified before `build()`"]
pub struct VerifyBuilder {
    scheme: Arc<dyn Scheme>,
    name: Arc<str>,
    secrets: Option<Vec<Secret>>,
    lookup: Option<MakeTenants>,
    keep: Keep,
    tolerance: Duration,
    max_body: usize,
    clock: SharedWallClock,
    responder: SharedResponder,
    protected: bool,
    max_replays: NonZeroUsize,
    store: Option<Arc<dyn ReplayStore>>,
    on_store_error: OnStoreError,
    completed: Repeat,
    in_progress: Repeat,
    completes: Option<Completes>,
    endpoint: Option<Endpoint>,
}

type MakeTenants = Box<dyn FnOnce(Arc<dyn Scheme>, Keep) -> Box<dyn Tenants> + Send + Sync>;

impl VerifyBuilder {
    pub(crate) fn new(scheme: Arc<dyn Scheme>) -> Self {
        Self {
            name: "default".into(),
            secrets: None,
            lookup: None,
            keep: Keep {
                most: MAX_TENANTS,
                known: LOOKUP_TTL,
                unknown: UNKNOWN_TTL,
            },
            tolerance: TOLERANCE,
            max_body: MAX_BODY,
            clock: SharedWallClock::default(),
            responder: SharedResponder::default(),
            protected: scheme.signs_id() || scheme.signs_time(),
            max_replays: MAX_REPLAYS,
            store: None,
            on_store_error: OnStoreError::default(),
            completed: match scheme.signs_id() {
                true => Repeat::Acknowledge,
                false => Repeat::Refuse,
            },
            in_progress: Repeat::Refuse,
            completes: None,
            endpoint: None,
            scheme,
        }
    }

    /// Names the layer: for logs and metrics, and as the endpoint that repeats
    /// are told apart by, so that layers with one [store](Self::replay_store)
    /// need names of their own. 1 to 128 printable ASCII characters. Default
    /// `default`.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// The secrets, each of which may have signed: the newer one first, in a
    /// rotation. 1 to 16. They can be replaced later, by the
    /// [handle](crate::VerifyHandle).
    pub fn secrets(mut self, secrets: impl IntoIterator<Item = Secret>) -> Self {
        self.secrets = Some(secrets.into_iter().collect());
        self
    }

    /// Looks the secrets up by request, in the place of
    /// [`secrets`](Self::secrets), where there are many tenants. An unknown one
    /// is a `signature_mismatch` like any other, a lookup that fails a 503.
    ///
    /// Asked when the body is there and the signature's headers can be read,
    /// and not more often than [`lookup_ttl`](Self::lookup_ttl) says; but by
    /// each of the requests that come at once while it is not known.
    pub fn lookup(mut self, lookup: impl Lookup) -> Self {
        self.lookup = Some(Box::new(|scheme, keep| {
            Box::new(Cached::new(lookup, scheme, keep))
        }));
        self
    }

    /// How long what was looked up counts: secrets, and that there is no such
    /// tenant. Above 0 and at most 366 days. Default 60 s and 10 s. The
    /// [handle](crate::VerifyHandle::forget_secrets) forgets it sooner.
    pub fn lookup_ttl(mut self, known: Duration, unknown: Duration) -> Self {
        self.keep.known = known;
        self.keep.unknown = unknown;
        self
    }

    /// Of how many tenants what was looked up is kept. Default 10 000.
    pub fn max_tenants(mut self, max_tenants: NonZeroUsize) -> Self {
        self.keep.most = max_tenants;
        self
    }

    /// How long ago, and how far in the future by this end's clock, a message
    /// may have been signed; completed messages are remembered for twice that
    /// and a second. Whole seconds, from 1 to 366 days' worth. Default 300 s.
    /// It can be changed later, by the [handle](crate::VerifyHandle).
    pub fn tolerance(mut self, tolerance: Duration) -> Self {
        self.tolerance = tolerance;
        self
    }

    /// How many bytes a body may have, since all of it is held; a larger one is
    /// a 413 before anything is computed. At least 1. Default 1 MiB. It can be
    /// changed later, by the [handle](crate::VerifyHandle).
    pub fn max_body(mut self, max_body: usize) -> Self {
        self.max_body = max_body;
        self
    }

    /// The clock that timestamps are compared with. Default: the system's.
    pub fn wall_clock(mut self, clock: impl WallClock) -> Self {
        self.clock = SharedWallClock::new(clock);
        self
    }

    /// Makes the answers of what is refused. Default:
    /// [`ProblemResponder`](buttress_core::ProblemResponder).
    pub fn responder(mut self, responder: impl Responder) -> Self {
        self.responder = SharedResponder::new(responder);
        self
    }

    /// Whether repeats are known. Default: yes where the scheme signs an id or
    /// a time. Where it signs neither, a message can be told from another one
    /// by its bytes alone, so that two that are equal by chance are a repeat,
    /// and a late repeat is none.
    pub fn replay_protection(mut self, replay_protection: bool) -> Self {
        self.protected = replay_protection;
        self
    }

    /// How many messages are remembered in this process: at so many a new one
    /// gets a 503, since none is forgotten before its time. Default 100 000,
    /// which with ids of 40 bytes take about 25 MB. With the default
    /// [tolerance](Self::tolerance) that is 166 new messages a second for good:
    /// have room for as many as come in twice the tolerance and a second.
    pub fn max_replays(mut self, max_replays: NonZeroUsize) -> Self {
        self.max_replays = max_replays;
        self
    }

    /// Keeps claims in a store, as for a fleet, and not in this process. There
    /// must be some: see [`replay_protection`](Self::replay_protection).
    pub fn replay_store(mut self, store: impl ReplayStore) -> Self {
        self.store = Some(Arc::new(store));
        self
    }

    /// Keeps claims in Redis, for a fleet: as [`replay_store`](Self::replay_store)
    /// with [`RedisReplays::new`](crate::RedisReplays::new). All processes of
    /// the fleet have the layer under the same [name](Self::name).
    #[cfg(feature = "redis")]
    pub fn redis(self, redis: &buttress_redis::Redis) -> Self {
        self.replay_store(crate::RedisReplays::new(redis))
    }

    /// What happens when that store fails. Default: a 503.
    pub fn on_store_error(mut self, on_store_error: OnStoreError) -> Self {
        self.on_store_error = on_store_error;
        self
    }

    /// What a repeat of a completed message gets. Default:
    /// [`Acknowledge`](Repeat::Acknowledge) where the scheme signs an id, since
    /// a sender that lost the first answer must stop;
    /// [`Refuse`](Repeat::Refuse) where it does not.
    pub fn completed(mut self, repeat: Repeat) -> Self {
        self.completed = repeat;
        self
    }

    /// What a repeat gets while the first is in progress. Default:
    /// [`Refuse`](Repeat::Refuse).
    pub fn in_progress(mut self, repeat: Repeat) -> Self {
        self.in_progress = repeat;
        self
    }

    /// Whether a message is done with an answer of this status and these
    /// headers; if not, its repeat reaches the handler again. Default: with a
    /// 2xx, but not with a `grpc-status` other than 0, since senders come again
    /// after all others. Whatever it says, a body that breaks, or trailers with
    /// such a status, leave it undone.
    pub fn completes<F>(mut self, completes: F) -> Self
    where
        F: Fn(StatusCode, &HeaderMap) -> bool + Send + Sync + 'static,
    {
        self.completes = Some(Box::new(completes));
        self
    }

    /// Sets repeats apart by more than the layer's name: where one layer stands
    /// before several endpoints, to each of which a sender brings the same id.
    /// Default: by nothing more (but by the tenant where secrets are looked
    /// up).
    ///
    /// What it looks at must be signed, or one of few values: who can choose it
    /// freely, as a path that is not, has a repeat that looks new.
    pub fn endpoint<F, E>(mut self, endpoint: F) -> Self
    where
        F: Fn(Head<'_>) -> E + Send + Sync + 'static,
        E: Display,
    {
        self.endpoint = Some(Box::new(move |request| endpoint(request).to_string()));
        self
    }

    /// Checks the settings and makes the state that all clones of the layer
    /// share.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings or the secrets: see
    /// [`VerifyConfigError`].
    pub fn build(self) -> Result<VerifyLayer, VerifyConfigError> {
        if !label::is_sound(&self.name, 128) {
            return Err(Problem::Name.into());
        }
        if self.store.is_some() && !self.protected {
            return Err(Problem::IdleStore.into());
        }
        let secrets = match (self.secrets, self.lookup) {
            (Some(_), Some(_)) => return Err(Problem::TwoSources.into()),
            (None, None) => return Err(Problem::NoSecrets.into()),
            (Some(secrets), None) => {
                Secrets::Given(Current::new(Keyring::new(&*self.scheme, secrets)?))
            }
            (None, Some(make)) => {
                let sound = |ttl: Duration| !ttl.is_zero() && ttl <= LONGEST;
                if !sound(self.keep.known) || !sound(self.keep.unknown) {
                    return Err(Problem::LookupTtl.into());
                }
                Secrets::LookedUp(make(Arc::clone(&self.scheme), self.keep))
            }
        };
        let replays = self.protected.then(|| Replays {
            memory: Mutex::new(Memory::new(self.max_replays.get())),
            store: self.store,
            on_store_error: self.on_store_error,
            completed: self.completed,
            in_progress: self.in_progress,
            completes: self.completes,
            endpoint: self.endpoint,
        });
        Ok(VerifyLayer::new(Shared::new(Parts {
            name: self.name,
            scheme: self.scheme,
            secrets,
            tolerance: self.tolerance,
            max_body: self.max_body,
            clock: self.clock,
            responder: self.responder,
            replays,
        })?))
    }
}

impl fmt::Debug for VerifyBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyBuilder")
            .field("name", &self.name)
            .field("scheme", &self.scheme.name())
            .field("tolerance", &self.tolerance)
            .field("max_body", &self.max_body)
            .field("replay_protection", &self.protected)
            .finish_non_exhaustive()
    }
}

/// So that the compiler can say it where the layer is built, not where it is
/// used: what a server stack asks of a layer.
const _: fn() = || {
    fn fits<T: Clone + Send + Sync + 'static>() {}
    fits::<VerifyLayer>();
    fits::<super::Verify<()>>();
};
