//! Breakers by name: one for each key, never more than so many.

mod config;
mod health;
mod key;
#[cfg(all(test, buttress_loom))]
mod loom_tests;
mod shard;
#[cfg(all(test, not(buttress_loom)))]
mod tests;

use std::{
    fmt, mem,
    sync::{Arc, OnceLock},
    time::Duration,
};

use buttress_core::{
    clock,
    key::Key,
    keyed::Secret,
    random::SharedRandom,
    sync::{
        Mutex, Padded,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
};

pub use config::RegistryBuilder;
pub use health::HealthSummary;
pub use key::RegistryKey;

use self::{
    key::{Probe, in_words, printable},
    shard::{Entry, Refused, Shard, Track},
};
#[cfg(feature = "redis")]
use crate::shared::{Hub, Membership};
use crate::{
    Breaker, CircuitOpen, ConfigError, Event, Permit, Settings, Status, cell::Observer,
    event::Listener, metrics::Metrics, settings::Plan,
};

/// Breakers that a new key looks at in search of room, and the shards that it
/// locks for it.
const LOOKS: usize = 32;
const SHARDS_LOOKED: usize = 8;

/// Named breakers, made when they are first asked for: one for each host,
/// endpoint, tenant or whatever fails by itself. A cheap handle, whose clones
/// are all the same registry.
///
/// ```
/// use buttress_circuit_breaker::{Registry, Settings, State};
///
/// let services = Registry::builder("services")
///     .settings_for(Settings::for_service)
///     .build()?;
/// let openai = services.get_or_create("openai");
/// assert_eq!(openai.settings(), Settings::tolerant());
///
/// openai.force_open();
/// assert!(services.try_acquire("openai").is_err());
/// assert!(services.try_acquire("redis").is_ok());
/// let states: Vec<_> = services
///     .statuses()
///     .into_iter()
///     .map(|(name, status)| (name.to_string(), status.state))
///     .collect();
/// assert_eq!(states, [("openai".into(), State::ForcedOpen), ("redis".into(), State::Closed)]);
/// # Ok::<(), buttress_circuit_breaker::ConfigError>(())
/// ```
///
/// # The ceiling
///
/// There are never more than [`max_keys`](RegistryBuilder::max_keys) breakers.
/// When it is full, a new key takes the place of one that nothing is lost by
/// forgetting:
///
/// - it is closed, and no failure, no slow call and no opening is counted for
///   it any more; or it has not been used for
///   [`forget_after`](RegistryBuilder::forget_after), and then whatever was
///   counted while it was closed may be forgotten,
/// - nobody outside has a handle of it,
/// - it was not used lately: not since the hand that goes round in search of
///   room (CLOCK) came by, and not for 10 s if it was ever used a second time.
///
/// Open, half-open, forced and metrics-only ones are never forgotten. What is
/// forgotten starts closed when it comes again, and the calls that it had in
/// flight count for nobody.
///
/// If none can go, the new key shares the [overflow](Self::overflow) breaker
/// with all others that found no room, until it finds some: each time that it
/// is asked for, it is looked for again.
///
/// Where clients choose the keys, they can fill the registry with breakers
/// that are open, by calling what fails. These stay until someone calls them
/// again, or they are [removed](Self::remove) or [reset](Self::reset); all new
/// keys share one fate until then. Better take keys that clients cannot choose
/// (the route, the endpoint that a balancer has chosen), or let only known
/// ones pass.
///
/// # What it costs
///
/// A key that is there: a hash and a short lock of one of up to 64 shards; no
/// allocation. No callback runs under a lock. A new key: the making of a
/// breaker (some allocations, its metrics' look-up), and where it is full, a
/// look at no more than 32 others in 8 shards, so that a flood of new keys
/// costs the same for each. All keys together: `max_keys` breakers, of about
/// 1.3 kB without windows (a window of calls takes 1.4 kB more, one of time
/// 3 kB); what a forgotten one had is taken up again, not freed.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

type SettingsFor = Box<dyn Fn(&str) -> Option<Settings> + Send + Sync>;

struct Inner {
    name: Arc<str>,
    max_keys: usize,
    settings: Mutex<(Settings, Plan)>,
    /// How often they were replaced.
    version: AtomicU64,
    settings_for: Option<SettingsFor>,
    listeners: Arc<[Listener]>,
    name_keys: Option<bool>,
    /// Of all breakers that have no name of their own.
    observer: OnceLock<Arc<Observer>>,
    random: SharedRandom,
    forget_after: Duration,
    critical: bool,
    #[cfg(feature = "redis")]
    hub: Option<Arc<Hub>>,
    overflow: Breaker,
    secret: Secret,
    shards: Box<[Padded<Mutex<Shard>>]>,
    // Only new keys and removed ones touch these.
    counts: Padded<Counts>,
}

struct Counts {
    /// Breakers in all shards, and those about to be added.
    total: AtomicUsize,
    evicted: AtomicU64,
    overflowed: AtomicU64,
}

fn observer(
    name: Arc<str>,
    listeners: &Arc<[Listener]>,
    metrics: fn(&Arc<str>) -> Metrics,
) -> Arc<Observer> {
    let all = (!listeners.is_empty()).then(|| {
        let listeners = Arc::clone(listeners);
        Box::new(move |name: &str, event: &Event| {
            for listener in &*listeners {
                listener(name, event);
            }
        }) as Listener
    });
    Arc::new(Observer {
        metrics: metrics(&name),
        listeners: all.into_iter().collect(),
        name,
    })
}

impl Registry {
    /// Starts a registry of this name: for logs and metrics.
    pub fn builder(name: impl Into<Arc<str>>) -> RegistryBuilder {
        RegistryBuilder::new(name.into())
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.0.name
    }

    /// The breaker of this key, made if need be: closed. The
    /// [overflow](Self::overflow) breaker, if it is new and there is no room.
    ///
    /// As long as the handle is kept, the breaker is not forgotten. Whoever
    /// was given the overflow breaker and keeps it keeps that one; ask again,
    /// or call through [`try_acquire`](Self::try_acquire).
    #[must_use]
    pub fn get_or_create<K: RegistryKey + ?Sized>(&self, key: &K) -> Breaker {
        self.get(key).unwrap_or_else(|| self.create(key))
    }

    /// The breaker of this key, if it has one of its own.
    #[must_use]
    pub fn get<K: RegistryKey + ?Sized>(&self, key: &K) -> Option<Breaker> {
        self.find(key, |entry| entry.used().clone())
    }

    /// Asks the breaker of this key for leave to call. It is made if need be,
    /// and the overflow breaker is asked if there is no room.
    ///
    /// The permit is given while the breaker is in its place, so that it is
    /// never another key's. It does not keep it there: should the breaker be
    /// forgotten while the call is under way, its result is lost.
    ///
    /// # Errors
    ///
    /// As [`Breaker::try_acquire`].
    #[inline]
    pub fn try_acquire<K: RegistryKey + ?Sized>(&self, key: &K) -> Result<Permit, CircuitOpen> {
        // A handle is taken only where the state has to change, which calls
        // listeners: they must not run under the lock.
        let admission = self.find(key, |entry| {
            let breaker = entry.used();
            breaker.admit_settled().ok_or_else(|| breaker.clone())
        });
        match admission {
            Some(Ok(admission)) => admission.tell(),
            Some(Err(breaker)) => breaker.try_acquire(),
            None => self.create(key).try_acquire(),
        }
    }

    /// Takes the breaker of this key out, whatever its state; whether there
    /// was one. It lives on in the handles that are outside, and for the calls
    /// in flight. The next who asks is given a new one, closed.
    pub fn remove<K: RegistryKey + ?Sized>(&self, key: &K) -> bool {
        let removed = key.probe(|probe| {
            let id = self.0.id(probe);
            self.0.shard(id).lock().remove(id, probe)
        });
        let found = removed.is_some();
        if found {
            self.0.release();
        }
        found
    }

    /// Closes the breaker of this key, empty and automatic again; whether
    /// there is one.
    pub fn reset<K: RegistryKey + ?Sized>(&self, key: &K) -> bool {
        // No use, in the eyes of the hand: it may be what makes room.
        let breaker = self.find(key, |entry| entry.breaker.clone());
        if let Some(breaker) = &breaker {
            breaker.reset();
        }
        breaker.is_some()
    }

    /// Closes all breakers, the overflow one too, empty and automatic again.
    pub fn reset_all(&self) {
        for (_, breaker) in self.handles() {
            breaker.reset();
        }
        self.0.overflow.reset();
    }

    /// Replaces the settings of all, while they serve: of the breakers that
    /// [`settings_for`](RegistryBuilder::settings_for) has given none of their
    /// own, of new ones and of the overflow one. See [`Breaker::configure`].
    ///
    /// # Errors
    ///
    /// Settings that make no sense; nothing is changed then.
    pub fn configure(&self, settings: &Settings) -> Result<(), ConfigError> {
        let plan = settings.plan()?;
        {
            let mut held = self.0.settings.lock();
            self.0.version.fetch_add(1, Release);
            *held = (settings.clone(), plan);
        }
        // Until nobody has replaced them in the meantime. What is added to a
        // shard after this has come by sees the version for itself.
        loop {
            let (version, settings) = self.0.common();
            self.0.overflow.configure(settings.clone())?;
            for shard in &self.0.shards {
                let common: Vec<_> = {
                    let shard = shard.lock();
                    let common = shard.entries().iter().filter(|entry| !entry.chosen);
                    common.map(|entry| entry.breaker.clone()).collect()
                };
                for breaker in common {
                    breaker.configure(settings.clone())?;
                }
            }
            if self.0.version.load(Acquire) == version {
                return Ok(());
            }
        }
    }

    /// The breaker of all keys that found no room.
    #[must_use]
    pub fn overflow(&self) -> &Breaker {
        &self.0.overflow
    }

    /// How many breakers there are, the overflow one not counted. Never more
    /// than [`max_keys`](Self::max_keys).
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.counts.total.load(Acquire)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The most breakers that there may be.
    #[must_use]
    pub fn max_keys(&self) -> usize {
        self.0.max_keys
    }

    /// How many breakers were forgotten to make room, ever.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.0.counts.evicted.load(Relaxed)
    }

    /// How often a key found no room and was given the overflow breaker, ever.
    #[must_use]
    pub fn overflowed(&self) -> u64 {
        self.0.counts.overflowed.load(Relaxed)
    }

    /// All breakers as they are now, sorted by what they are called here: by
    /// their keys, where these may be told, even if
    /// [`name_keys`](RegistryBuilder::name_keys) keeps them out of the metrics;
    /// else by the kind of the key and a number that stays the same as long as
    /// the process (`header#41c2…`). Last comes the overflow breaker, once it
    /// was needed.
    #[must_use]
    pub fn statuses(&self) -> Vec<(Arc<str>, Status)> {
        self.breakers()
            .into_iter()
            .map(|(name, breaker)| (name, breaker.status()))
            .collect()
    }

    /// All breakers, in the order and by the names of
    /// [`statuses`](Self::statuses). Whoever goes through them holds no lock.
    /// They are asked shard by shard, so that under way a key may come or go.
    #[must_use]
    pub fn breakers(&self) -> Vec<(Arc<str>, Breaker)> {
        let mut all = self.handles();
        all.sort_unstable_by(|(one, _), (two, _)| one.cmp(two));
        if self.overflowed() > 0 {
            let overflow = &self.0.overflow;
            all.push((Arc::clone(overflow.name()), overflow.clone()));
        }
        all
    }

    fn handles(&self) -> Vec<(Arc<str>, Breaker)> {
        let mut all = Vec::with_capacity(self.len());
        for shard in &self.0.shards {
            let shard = shard.lock();
            let entries = shard.entries().iter();
            all.extend(entries.map(|entry| (Arc::clone(&entry.label), entry.breaker.clone())));
        }
        all
    }

    /// How many breakers are in which state, the overflow one among them once
    /// it was needed.
    #[must_use]
    pub fn health_summary(&self) -> HealthSummary {
        let mut summary = HealthSummary::default();
        // Not under a lock: a half-open one may be overdue, and tell so.
        for (_, breaker) in self.handles() {
            summary.count(breaker.state());
        }
        if self.overflowed() > 0 {
            summary.count(self.0.overflow.state());
        }
        summary
    }

    /// Sees to it that the fleet is heard, where there is a runtime for it.
    #[cfg(feature = "redis")]
    pub(crate) fn attend(&self) {
        if let Some(hub) = &self.0.hub {
            hub.ensure();
        }
    }

    /// Whether two handles are of one registry.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    #[inline]
    fn find<K, R>(&self, key: &K, hit: impl FnOnce(&mut Entry) -> R) -> Option<R>
    where
        K: RegistryKey + ?Sized,
    {
        key.probe(|probe| {
            let id = self.0.id(probe);
            let mut shard = self.0.shard(id).lock();
            shard.find(id, probe).map(hit)
        })
    }

    #[cold]
    fn create<K: RegistryKey + ?Sized>(&self, key: &K) -> Breaker {
        self.0
            .create(key.key(), self.0.name_keys.unwrap_or(K::NAME))
    }
}

impl Inner {
    /// 48 bits: see [`Secret`].
    #[inline]
    fn id(&self, probe: Probe<'_>) -> u64 {
        self.secret.id(&probe).slot().get()
    }

    #[inline]
    fn home(&self, id: u64) -> usize {
        // The index spreads by the low bits.
        (id >> 32) as usize & (self.shards.len() - 1)
    }

    #[inline]
    fn shard(&self, id: u64) -> &Mutex<Shard> {
        &self.shards[self.home(id)]
    }

    fn create(&self, key: Key, named: bool) -> Breaker {
        let id = self.id(Probe::of(&key));
        let Some(room) = self.room(self.home(id)) else {
            return self.crowded_out();
        };
        let (entry, mut version) = self.make(id, key, named);
        let breaker = entry.breaker.clone();
        let chosen = entry.chosen;
        let added = self.shard(id).lock().add(entry);
        match added {
            Ok(()) => {
                room.taken();
                while !chosen && self.version.load(Acquire) != version {
                    let settings;
                    (version, settings) = self.common();
                    // They have been checked.
                    let _ = breaker.configure(settings);
                }
                breaker
            }
            Err((Refused::There(breaker), _)) => breaker,
            Err((Refused::Collides, _)) => self.crowded_out(),
        }
    }

    /// The settings of all, and their version.
    fn common(&self) -> (u64, Settings) {
        let held = self.settings.lock();
        (self.version.load(Acquire), held.0.clone())
    }

    /// The new breaker, and the version of the settings of all. Calls what is
    /// the user's, so no lock is held.
    fn make(&self, id: u64, key: Key, named: bool) -> (Entry, u64) {
        let words = in_words(&key);
        let own = words.as_deref().and_then(|words| {
            let settings = self.settings_for.as_ref()?(words)?;
            match settings.plan() {
                Ok(plan) => Some((settings, plan)),
                Err(error) => {
                    let name = &*self.name;
                    tracing::warn!(name, %error, "circuit breaker without settings of its own");
                    None
                }
            }
        });
        let chosen = own.is_some();
        let (settings, version) = {
            let held = self.settings.lock();
            let version = self.version.load(Acquire);
            (own.unwrap_or_else(|| held.clone()), version)
        };
        let (settings, plan) = settings;
        let label: Arc<str> = match &words {
            Some(words) => printable(words).into(),
            None => unspoken(&key, id).into(),
        };
        let observer = if named && words.is_some() {
            observer(Arc::clone(&label), &self.listeners, Metrics::new)
        } else {
            Arc::clone(self.observer.get().unwrap_or_else(|| {
                // Made before it is put there: a recorder is the user's.
                let made = observer(Arc::clone(&self.name), &self.listeners, Metrics::of_many);
                self.observer.get_or_init(|| made)
            }))
        };
        let breaker =
            Breaker::observed(observer, settings, plan, self.random.clone(), self.critical);
        #[cfg(feature = "redis")]
        if let Some(hub) = &self.hub {
            let name = key::in_redis(&key, words.is_some());
            let key = hub.key([self.name.as_bytes(), &name]);
            let hub = Arc::clone(hub);
            breaker.join(Membership { hub, key });
        }
        drop(words);
        let entry = Entry {
            id,
            key,
            label,
            breaker,
            chosen,
            track: Track::new(clock::now()),
        };
        (entry, version)
    }

    /// Room for one more: what is left, or someone's that may be forgotten.
    fn room(&self, home: usize) -> Option<Room<'_>> {
        let more = |total| (total < self.max_keys).then_some(total + 1);
        let left = self.counts.total.fetch_update(AcqRel, Relaxed, more);
        if left.is_ok() {
            return Some(Room(self));
        }
        let now = clock::now();
        let mut looks = LOOKS;
        // One's own shard first: so none grows at the expense of others.
        for step in 0..self.shards.len().min(SHARDS_LOOKED) {
            let shard = &self.shards[(home + step) & (self.shards.len() - 1)];
            let evicted = shard.lock().evict(&mut looks, now, self.forget_after);
            if let Some(entry) = evicted {
                let room = Room(self);
                self.counts.evicted.fetch_add(1, Relaxed);
                // Unlocked, as what it drops may be the user's.
                drop(entry);
                return Some(room);
            }
            if looks == 0 {
                break;
            }
        }
        None
    }

    fn crowded_out(&self) -> Breaker {
        let times = self.counts.overflowed.fetch_add(1, Relaxed) + 1;
        // Clients may bring it about: not a line for each.
        if times.is_power_of_two() {
            tracing::warn!(
                name = &*self.name,
                max_keys = self.max_keys,
                times,
                "circuit breakers are all in use: new keys share one"
            );
        }
        self.overflow.clone()
    }

    fn release(&self) {
        self.counts.total.fetch_sub(1, AcqRel);
    }
}

/// Counted in the total; given back if nothing came of it.
struct Room<'a>(&'a Inner);

impl Room<'_> {
    fn taken(self) {
        mem::forget(self);
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// What a key is called that may not be told.
fn unspoken(key: &Key, id: u64) -> String {
    let kind = format!("{key:?}");
    let kind = kind.strip_prefix("Key(").unwrap_or(&kind);
    format!("{}#{id:012x}", kind.trim_end_matches(')'))
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("name", &self.0.name)
            .field("len", &self.len())
            .field("max_keys", &self.0.max_keys)
            .finish_non_exhaustive()
    }
}
