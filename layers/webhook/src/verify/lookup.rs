//! The secrets of many tenants: looked up by request, and kept for a while.

use std::{
    fmt::{self, Display},
    future::Future,
    hash::Hash,
    num::NonZeroUsize,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use buttress_core::{BoxError, Head, clock, clock::Instant};
use quick_cache::sync::Cache;

use crate::{Keyring, Scheme, Secret};

/// Finds the secrets of whoever a request says it is from.
///
/// In two steps: who it is, at once and from the request's head, and then what
/// secrets they have, which may take a while. What is found is
/// [kept](crate::VerifyBuilder::lookup_ttl). [`lookup_fn`] makes one of two
/// closures.
pub trait Lookup: Send + Sync + 'static {
    /// Who a request is from: a tenant's name or number. As it displays, it
    /// keeps the claims of tenants apart.
    type Tenant: Hash + Eq + Clone + Display + Send + Sync + 'static;

    /// Who the request says it is from; `None` is nobody we know. Nothing of it
    /// is verified yet, and what is returned is kept for a while: nothing, then,
    /// for what cannot be a tenant, such as a name that is too long.
    ///
    /// One value for each tenant, however the request spells it: where `ACME`
    /// finds the secrets of `acme`, a replay under the other spelling is
    /// another tenant's message, and new.
    fn tenant(&self, request: Head<'_>) -> Option<Self::Tenant>;

    /// Their secrets: at most 16, and `None` or none at all if there is no such
    /// tenant. Asked by several requests at once where it is not known.
    ///
    /// An error is a 503 for that request, is logged, and is not kept: it must
    /// hold no secret. Has a time limit of its own.
    fn secrets(
        &self,
        tenant: Self::Tenant,
    ) -> impl Future<Output = Result<Option<Vec<Secret>>, BoxError>> + Send;
}

/// A [`Lookup`] of two closures.
///
/// ```
/// use std::{collections::HashMap, sync::Arc};
/// use buttress_webhook::{Secret, Standard, VerifyLayer, lookup_fn};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
/// let table = Arc::new(HashMap::from([(7_u64, secret)]));
///
/// let lookup = lookup_fn(
///     |request| request.uri.path().strip_prefix("/hooks/")?.parse::<u64>().ok(),
///     move |tenant| {
///         let table = Arc::clone(&table);
///         async move { Ok(table.get(&tenant).map(|secret| vec![secret.clone()])) }
///     },
/// );
/// let layer = VerifyLayer::builder(Standard::new()).lookup(lookup).build()?;
/// # let _ = layer;
/// # Ok(())
/// # }
/// ```
pub fn lookup_fn<T, K, F, R>(tenant: T, secrets: F) -> LookupFn<T, F>
where
    T: Fn(Head<'_>) -> Option<K> + Send + Sync + 'static,
    K: Hash + Eq + Clone + Display + Send + Sync + 'static,
    F: Fn(K) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Option<Vec<Secret>>, BoxError>> + Send,
{
    LookupFn { tenant, secrets }
}

/// See [`lookup_fn`].
#[derive(Clone)]
pub struct LookupFn<T, F> {
    tenant: T,
    secrets: F,
}

impl<T, F> fmt::Debug for LookupFn<T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LookupFn")
    }
}

impl<T, K, F, R> Lookup for LookupFn<T, F>
where
    T: Fn(Head<'_>) -> Option<K> + Send + Sync + 'static,
    K: Hash + Eq + Clone + Display + Send + Sync + 'static,
    F: Fn(K) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Option<Vec<Secret>>, BoxError>> + Send,
{
    type Tenant = K;

    fn tenant(&self, request: Head<'_>) -> Option<K> {
        (self.tenant)(request)
    }

    fn secrets(
        &self,
        tenant: K,
    ) -> impl Future<Output = Result<Option<Vec<Secret>>, BoxError>> + Send {
        (self.secrets)(tenant)
    }
}

/// The keys of a tenant, and none of an unknown one.
pub(crate) type Looking =
    Pin<Box<dyn Future<Output = Result<Option<Keyring>, BoxError>> + Send + 'static>>;

/// What a look for a tenant's keys finds.
pub(crate) enum Found {
    /// The request names nobody.
    Nobody,
    /// They are here, and so is that there are none.
    Here(Option<Keyring>, String),
    /// They have to be asked for: nothing is, before it is polled.
    Away(Looking, String),
}

/// A [`Lookup`] with what it has found, whatever its tenants are.
pub(crate) trait Tenants: Send + Sync {
    fn find(&self, request: Head<'_>) -> Found;

    /// Forgets what was found, and what is being looked for.
    fn forget(&self);
}

/// How much is kept, and for how long.
#[derive(Clone, Copy)]
pub(crate) struct Keep {
    pub(crate) most: NonZeroUsize,
    pub(crate) known: Duration,
    pub(crate) unknown: Duration,
}

pub(crate) struct Cached<L: Lookup>(Arc<Inner<L>>);

struct Inner<L: Lookup> {
    lookup: L,
    scheme: Arc<dyn Scheme>,
    keep: Keep,
    /// Who comes once is forgotten before who comes again: a flood of names
    /// displaces itself.
    cache: Cache<L::Tenant, Kept>,
    /// What was asked for before a change of it does not count after.
    epoch: AtomicU64,
}

#[derive(Clone)]
struct Kept {
    keys: Option<Keyring>,
    until: Instant,
    epoch: u64,
}

impl<L: Lookup> Cached<L> {
    pub(crate) fn new(lookup: L, scheme: Arc<dyn Scheme>, keep: Keep) -> Self {
        Self(Arc::new(Inner {
            cache: Cache::new(keep.most.get()),
            lookup,
            scheme,
            keep,
            epoch: AtomicU64::new(0),
        }))
    }
}

impl<L: Lookup> Tenants for Cached<L> {
    fn find(&self, request: Head<'_>) -> Found {
        let Some(tenant) = self.0.lookup.tenant(request) else {
            return Found::Nobody;
        };
        let name = tenant.to_string();
        let epoch = self.0.epoch.load(Relaxed);
        match self.0.cache.get(&tenant) {
            Some(kept) if kept.epoch == epoch && clock::now() < kept.until => {
                Found::Here(kept.keys, name)
            }
            _ => Found::Away(Box::pin(ask(Arc::clone(&self.0), tenant, epoch)), name),
        }
    }

    fn forget(&self) {
        self.0.epoch.fetch_add(1, Relaxed);
        self.0.cache.clear();
    }
}

async fn ask<L: Lookup>(
    inner: Arc<Inner<L>>,
    tenant: L::Tenant,
    epoch: u64,
) -> Result<Option<Keyring>, BoxError> {
    let secrets = inner.lookup.secrets(tenant.clone()).await?;
    let keys = match secrets {
        Some(secrets) if !secrets.is_empty() => Some(Keyring::new(&*inner.scheme, secrets)?),
        _ => None,
    };
    let span = match keys {
        Some(_) => inner.keep.known,
        None => inner.keep.unknown,
    };
    let kept = Kept {
        keys: keys.clone(),
        until: clock::now() + span,
        epoch,
    };
    inner.cache.insert(tenant, kept);
    Ok(keys)
}
