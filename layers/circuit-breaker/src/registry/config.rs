//! What a registry is made of, checked once by `build()`.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use buttress_core::{
    keyed::Secret,
    random::{Random, SharedRandom},
    sync::{
        Mutex, Padded,
        atomic::{AtomicU64, AtomicUsize},
    },
};

use super::{Counts, Inner, Registry, SettingsFor, observer};
use crate::{
    Breaker, BreakerBuilder, ConfigError, Event, Settings, breaker::check_name, error::Problem,
    event::Listener, metrics::Metrics,
};

/// Keys unless told otherwise.
const MAX_KEYS: usize = 1000;
/// How long a breaker that has counted something is kept, unused.
pub(super) const FORGET_AFTER: Duration = Duration::from_secs(60);

/// A shard for so many keys, so that threads do not meet at one lock.
const SHARD_KEYS: usize = 32;
const MAX_SHARDS: usize = 64;

/// Makes a [`Registry`].
#[must_use = "nothing is made before `build()`"]
pub struct RegistryBuilder {
    name: Arc<str>,
    settings: Settings,
    settings_for: Option<SettingsFor>,
    max_keys: usize,
    listeners: Vec<Listener>,
    name_keys: Option<bool>,
    random: SharedRandom,
    forget_after: Duration,
    critical: bool,
    #[cfg(feature = "redis")]
    sharing: Option<crate::Sharing>,
}

impl RegistryBuilder {
    pub(super) fn new(name: Arc<str>) -> Self {
        Self {
            name,
            settings: Settings::new(),
            settings_for: None,
            max_keys: MAX_KEYS,
            listeners: Vec::new(),
            name_keys: None,
            random: SharedRandom::default(),
            forget_after: FORGET_AFTER,
            critical: false,
            #[cfg(feature = "redis")]
            sharing: None,
        }
    }

    /// When the breakers open, for how long, and what closes them. Default:
    /// [`Settings::moderate`].
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Settings that differ by name; `None` for those of all. Asked once for
    /// each breaker that is made (twice at most, where two threads ask for it
    /// first at once), with the name or with what a [`Key`](buttress_core::key::Key) says in words; not
    /// asked for keys that may not be told (headers, cookies, bytes, composite
    /// ones).
    ///
    /// Settings that make no sense are replaced by those of all, and a warning
    /// is logged.
    pub fn settings_for<F>(mut self, settings: F) -> Self
    where
        F: Fn(&str) -> Option<Settings> + Send + Sync + 'static,
    {
        self.settings_for = Some(Box::new(settings));
        self
    }

    /// The most breakers that there may be: a hard ceiling, at least 1. The
    /// overflow breaker is not counted. Default: 1000.
    pub fn max_keys(mut self, max_keys: usize) -> Self {
        self.max_keys = max_keys;
        self
    }

    /// For how long a closed breaker that has failures, slow calls or openings
    /// counted is kept, unused, when a new key finds the registry full.
    /// Default: one minute.
    pub fn forget_after(mut self, unused: Duration) -> Self {
        self.forget_after = unused;
        self
    }

    /// Has `listener` called for every [`Event`] of every breaker, with the
    /// breaker's name, in the thread where it happens, outside of every lock.
    /// It should be quick, and must not panic. Several may listen.
    pub fn on_event(mut self, listener: impl Fn(&str, &Event) + Send + Sync + 'static) -> Self {
        self.listeners.push(Box::new(listener));
        self
    }

    /// Whether a breaker is named by its key, for metrics, logs, listeners and
    /// [`CircuitOpen`](crate::CircuitOpen); or else all by the registry's name, and metrics count
    /// them together.
    ///
    /// Default: by its key, if the program gave a name; by the registry's, if
    /// it was the [`Key`](buttress_core::key::Key) of a request. A client may choose that (`Host` is
    /// what it says), and so it might choose how many series of metrics there
    /// are. Keys that may not be told (headers, cookies, bytes, composite
    /// ones) are never names.
    pub fn name_keys(mut self, name_keys: bool) -> Self {
        self.name_keys = Some(name_keys);
        self
    }

    /// Whether the whole is unhealthy when one of these is: the registry's
    /// health is the worst of its breakers' then, and not the mean. Default:
    /// no.
    pub fn critical(mut self, critical: bool) -> Self {
        self.critical = critical;
        self
    }

    /// Where the jitter of [`ReopenBackoff`](crate::ReopenBackoff) comes from.
    pub fn random(mut self, random: impl Random) -> Self {
        self.random = SharedRandom::new(random);
        self
    }

    /// Shares the breakers with all processes of a fleet that have a registry
    /// of this name, each with those of its key: see
    /// [`Sharing`](crate::Sharing). The overflow breaker is not shared, as it
    /// is not of the same keys everywhere.
    ///
    /// Keys reach Redis percent-encoded, and as a SHA-256 where they may not
    /// be told. A key that is new here is asked for only if the fleet has
    /// lately said that it is not closed.
    #[cfg(feature = "redis")]
    pub fn redis(mut self, sharing: impl Into<crate::Sharing>) -> Self {
        self.sharing = Some(sharing.into());
        self
    }

    /// What was said of one breaker is said of all.
    pub(crate) fn described_by(self, breaker: BreakerBuilder) -> Self {
        Self {
            name: breaker.name,
            settings: breaker.settings,
            listeners: breaker.listeners,
            random: breaker.random,
            #[cfg(feature = "redis")]
            sharing: breaker.sharing,
            ..self
        }
    }

    /// Makes the registry, empty.
    ///
    /// # Errors
    ///
    /// Settings that make no sense, a name that is not 1 to 128 printable
    /// ASCII characters, or room for no key.
    pub fn build(self) -> Result<Registry, ConfigError> {
        let Self {
            name,
            settings,
            settings_for,
            max_keys,
            listeners,
            name_keys,
            random,
            forget_after,
            critical,
            #[cfg(feature = "redis")]
            sharing,
        } = self;
        check_name(&name)?;
        let plan = settings.plan()?;
        if max_keys == 0 {
            return Err(Problem::MaxKeys.into());
        }
        #[cfg(feature = "redis")]
        if let Some(sharing) = &sharing {
            sharing.check()?;
        }
        let listeners: Arc<[Listener]> = listeners.into();
        let overflow = Breaker::observed(
            observer(format!("{name}:overflow").into(), &listeners, Metrics::new),
            settings.clone(),
            plan.clone(),
            random.clone(),
            critical,
        );
        let shards = (max_keys / SHARD_KEYS)
            .clamp(1, MAX_SHARDS)
            .next_power_of_two();
        Ok(Registry(Arc::new(Inner {
            observer: OnceLock::new(),
            name,
            max_keys,
            settings: Mutex::new((settings, plan)),
            version: AtomicU64::new(0),
            settings_for,
            listeners,
            name_keys,
            random,
            forget_after,
            critical,
            #[cfg(feature = "redis")]
            hub: sharing.map(|sharing| sharing.hub()),
            overflow,
            secret: Secret::random(),
            shards: (0..shards).map(|_| Padded::default()).collect(),
            counts: Padded(Counts {
                total: AtomicUsize::new(0),
                evicted: AtomicU64::new(0),
                overflowed: AtomicU64::new(0),
            }),
        })))
    }
}

impl fmt::Debug for RegistryBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryBuilder")
            .field("name", &self.name)
            .field("settings", &self.settings)
            .field("max_keys", &self.max_keys)
            .finish_non_exhaustive()
    }
}
