//! What a layer, its services and their calls have in common.

use std::{
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use buttress_core::{
    Head, Refusal, RefusalKind,
    clock::Instant,
    key::{ExtractKey, Key, SharedKey},
    label,
    respond::SharedResponder,
};
use bytes::Bytes;
use http::Response;
use tracing::debug;

#[cfg(feature = "redis")]
use crate::OnStoreError;
use crate::{
    ConfigError, Fence, MissingKey, Reaches, Target,
    error::Problem,
    lease::Lease,
    metrics::{Metrics, Outcome},
    store::{Claim, Claimed, Claiming, Denied, Store},
};

/// What the types of a layer say, of which there are no values.
pub(crate) type Kind<V, M, X> = PhantomData<fn() -> (V, M, X)>;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// What handles, leases and tasks know of the layer, whatever it sees of
/// requests.
pub(crate) struct Core {
    name: Arc<str>,
    /// In nanoseconds.
    ttl: AtomicU64,
    wait: AtomicU64,
    held: AtomicUsize,
    metrics: Metrics,
    /// Whether the store has failed and not worked since.
    #[cfg(feature = "redis")]
    failing: std::sync::atomic::AtomicBool,
}

fn nanos(span: Duration, shortest: Duration, problem: Problem) -> Result<u64, ConfigError> {
    if span < shortest || span > DAY {
        return Err(problem.into());
    }
    u64::try_from(span.as_nanos()).map_err(|_| problem.into())
}

impl Core {
    pub(crate) fn new(name: Arc<str>, ttl: Duration, wait: Duration) -> Result<Self, ConfigError> {
        // As long as a segment of a Redis key that is readable.
        if !label::is_sound(&name, 64) {
            return Err(Problem::Name.into());
        }
        // Its first reading takes a while.
        let _ = buttress_core::clock::now();
        let core = Self {
            metrics: Metrics::new(&name),
            name,
            ttl: AtomicU64::new(0),
            wait: AtomicU64::new(0),
            held: AtomicUsize::new(0),
            #[cfg(feature = "redis")]
            failing: false.into(),
        };
        core.set_ttl(ttl)?;
        core.set_wait(wait)?;
        Ok(core)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn ttl(&self) -> Duration {
        Duration::from_nanos(self.ttl.load(Relaxed))
    }

    pub(crate) fn set_ttl(&self, ttl: Duration) -> Result<(), ConfigError> {
        let nanos = nanos(ttl, Duration::from_millis(10), Problem::Ttl)?;
        self.ttl.store(nanos, Relaxed);
        Ok(())
    }

    pub(crate) fn wait(&self) -> Duration {
        Duration::from_nanos(self.wait.load(Relaxed))
    }

    pub(crate) fn set_wait(&self, wait: Duration) -> Result<(), ConfigError> {
        let nanos = nanos(wait, Duration::ZERO, Problem::Wait)?;
        self.wait.store(nanos, Relaxed);
        Ok(())
    }

    pub(crate) fn held(&self) -> usize {
        self.held.load(Relaxed)
    }

    pub(crate) fn took(&self) {
        self.held.fetch_add(1, Relaxed);
        self.metrics.took();
    }

    pub(crate) fn gave_back(&self) {
        self.held.fetch_sub(1, Relaxed);
        self.metrics.gave_back();
    }

    pub(crate) fn waited(&self, since: Instant) {
        self.metrics.waited(buttress_core::clock::now() - since);
    }

    fn refusal(&self, kind: RefusalKind) -> Refusal {
        Refusal::new(kind).with_origin(self.name.to_string())
    }

    /// What is said where a lock was lost and the rule is to cut.
    pub(crate) fn lost(&self) -> Refusal {
        self.refusal(RefusalKind::StoreUnavailable)
            .with_reason("lock_lost")
            .with_detail("the lock was lost while the request was served")
    }

    fn count(&self, outcome: Outcome) {
        self.metrics.request(outcome);
    }

    #[cold]
    fn refuse(&self, outcome: Outcome, kind: RefusalKind) -> Refusal {
        self.count(outcome);
        debug!(name = &*self.name, reason = outcome.as_str(), "not locked");
        // Whatever it is: the inner service has not seen it.
        self.refusal(kind).before_sending()
    }
}

#[cfg(feature = "redis")]
impl Core {
    pub(crate) fn lock_lost(&self, how: &'static str) {
        self.metrics.lost();
        tracing::warn!(name = &*self.name, how, "a lock was lost");
    }

    pub(crate) fn store_works(&self) {
        if self.failing.load(Relaxed) && self.failing.swap(false, Relaxed) {
            tracing::info!(name = &*self.name, "locks can be had again");
        }
    }

    #[cold]
    fn store_failed(&self, error: &(dyn std::error::Error + 'static)) {
        // Once, not for each request.
        if !self.failing.swap(true, Relaxed) {
            tracing::warn!(name = &*self.name, error, "no locks can be had");
        }
    }
}

/// Tells a request of its fence.
pub(crate) type Tell<V> = Arc<dyn for<'a> Fn(<V as Target>::Mut<'a>, Fence) + Send + Sync>;

pub(crate) struct Shared<V: Target> {
    pub(crate) core: Arc<Core>,
    pub(crate) key: SharedKey<V>,
    pub(crate) missing: MissingKey,
    pub(crate) retry_after: Option<Duration>,
    /// Whether a call is dropped when its lock is lost.
    pub(crate) cut: bool,
    pub(crate) tell: Option<Tell<V>>,
    pub(crate) responder: SharedResponder,
    pub(crate) store: Store,
    #[cfg(feature = "redis")]
    pub(crate) on_store_error: OnStoreError,
}

/// How a request goes on.
pub(crate) enum Asked {
    /// With a lock, or without one where that is the rule.
    Pass(Option<Lease>),
    Refuse(Refusal),
    Later(Claiming),
}

impl<V: Target> Shared<V> {
    pub(crate) fn check(retry_after: Option<Duration>) -> Result<(), ConfigError> {
        if retry_after.is_some_and(|wait| wait > DAY) {
            return Err(Problem::RetryAfter.into());
        }
        Ok(())
    }

    pub(crate) fn ask(&self, request: V::Ref<'_>) -> Asked {
        let core = &self.core;
        let key = match (self.key.extract(request), self.missing) {
            (Some(key), _) => key,
            (None, MissingKey::Share) => Key::global(),
            (None, MissingKey::Skip) => {
                core.count(Outcome::Skipped);
                return Asked::Pass(None);
            }
            (None, MissingKey::Refuse) => {
                let refusal = core.refuse(Outcome::MissingKey, RefusalKind::BadRequest);
                let detail = "the request has nothing to be locked by";
                return Asked::Refuse(refusal.with_reason("missing_key").with_detail(detail));
            }
        };
        match self.store.claim(core, &key, core.wait()) {
            Claim::Later(claiming) => Asked::Later(claiming),
            Claim::Now(claimed) => match self.judge(claimed) {
                Ok(lease) => Asked::Pass(lease),
                Err(refusal) => Asked::Refuse(refusal),
            },
        }
    }

    /// What the store's answer means.
    pub(crate) fn judge(&self, claimed: Claimed) -> Result<Option<Lease>, Refusal> {
        let core = &self.core;
        match claimed {
            Ok(lease) => {
                core.count(Outcome::Locked);
                Ok(Some(lease))
            }
            Err(Denied::Busy) => Err(core
                .refuse(Outcome::Busy, RefusalKind::Locked)
                .with_retry_after(self.retry_after)),
            Err(Denied::Full) => Err(core
                .refuse(Outcome::Full, RefusalKind::Overloaded)
                .with_retry_after(self.retry_after)),
            #[cfg(feature = "redis")]
            Err(Denied::Failed(error)) => {
                core.store_failed(&*error);
                match self.on_store_error {
                    OnStoreError::Deny => {
                        Err(core.refuse(Outcome::Denied, RefusalKind::StoreUnavailable))
                    }
                    OnStoreError::Allow => {
                        core.count(Outcome::Allowed);
                        Ok(None)
                    }
                }
            }
        }
    }

    pub(crate) fn tell<Req>(&self, request: &mut Req, lease: Option<&Lease>)
    where
        V: Reaches<Req>,
    {
        if let (Some(tell), Some(lease)) = (&self.tell, lease) {
            tell(V::reach(request), lease.fence().clone());
        }
    }

    #[cold]
    pub(crate) fn respond(&self, refusal: &Refusal, request: Head<'_>) -> Response<Bytes> {
        self.responder.respond(refusal, request)
    }
}
