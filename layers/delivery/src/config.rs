//! Settings of the whole.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use buttress_circuit_breaker::{Registry, Settings};
use buttress_core::{
    BoxError,
    clock::{self, SharedWallClock, WallClock},
    label,
    random::{Random, SharedRandom, ThreadRandom},
    sync::Mutex,
};
use buttress_rate_limit::{Limit, Quota, RateLimitLayer};
use buttress_webhook::WholeBody;
use http::{Request, Response};
use http_body::Body;
use tokio::sync::Notify;
use tower_service::Service;

use crate::{
    ConfigError, DeliveryStore, MemoryStore, Webhooks,
    error::Problem,
    guard::Guard,
    metrics::Metrics,
    state::{Limits, State},
    transport::{self, Caps},
    webhooks::Shared,
};

/// What the rate limit is named in its handle.
const LIMIT: &str = "webhooks";

/// Settings of [`Webhooks`]: from [`Webhooks::builder`].
#[must_use = "settings do nothing until they are built"]
pub struct WebhooksBuilder {
    name: Arc<str>,
    limits: Limits,
    lane_capacity: Option<usize>,
    feed: usize,
    max_body: usize,
    caps: Caps,
    breaker: Option<Settings>,
    rate_limit: Option<Quota>,
    guard: Option<Guard>,
    store: Arc<dyn DeliveryStore>,
    wall: SharedWallClock,
    random: SharedRandom,
}

impl WebhooksBuilder {
    pub(crate) fn new() -> Self {
        Self {
            name: "default".into(),
            limits: Limits {
                capacity: 1000,
                lane_capacity: 1000,
                concurrency: 256,
                lane_concurrency: 4,
                registrations: 100_000,
                letters: 1000,
                results: 1000,
                results_in_scope: 100,
            },
            lane_capacity: None,
            feed: 256,
            max_body: 1024 * 1024,
            caps: Caps {
                read: 64 * 1024,
                kept: 4 * 1024,
            },
            breaker: Some(Settings::moderate()),
            rate_limit: None,
            guard: None,
            store: Arc::new(MemoryStore::new()),
            wall: SharedWallClock::default(),
            random: SharedRandom::default(),
        }
    }

    /// Names it: for logs and metrics. 1 to 128 printable characters of ASCII.
    /// Default `default`.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// How many deliveries may be accepted and not over: waiting, under way or
    /// to be retried. Default 1000.
    ///
    /// Each holds its event's body, which those of one event share: at worst as
    /// many of [`max_body`](Self::max_body) as there are deliveries, and as many
    /// again for the dead letters.
    pub const fn capacity(mut self, deliveries: usize) -> Self {
        self.limits.capacity = deliveries;
        self
    }

    /// How many of these may be for one lane, so that an endpoint that is down
    /// does not fill the queue for all. What is more goes to the dead letters
    /// at once ([`Cause::Crowded`](crate::Cause::Crowded)), since others are
    /// to be told of the same event. Default: as many as the whole.
    pub const fn lane_capacity(mut self, deliveries: usize) -> Self {
        self.lane_capacity = Some(deliveries);
        self
    }

    /// How many attempts run at once. Default 256.
    pub const fn concurrency(mut self, attempts: usize) -> Self {
        self.limits.concurrency = attempts;
        self
    }

    /// How many of these may be in one lane: at most half of all, so that none
    /// has them all. Default 4.
    pub const fn lane_concurrency(mut self, attempts: usize) -> Self {
        self.limits.lane_concurrency = attempts;
        self
    }

    /// How many registrations there may be. Default 100 000.
    pub const fn max_registrations(mut self, registrations: usize) -> Self {
        self.limits.registrations = registrations;
        self
    }

    /// How many dead letters are kept. When there are more, the oldest is
    /// dropped, with a warning and a count. Default 1000.
    pub const fn max_dead_letters(mut self, letters: usize) -> Self {
        self.limits.letters = letters;
        self
    }

    /// How many results of what is over are kept, of all scopes together and of
    /// each. Default 1000 and 100.
    pub const fn max_results(mut self, all: usize, of_each_scope: usize) -> Self {
        self.limits.results = all;
        self.limits.results_in_scope = of_each_scope;
        self
    }

    /// How many updates wait for each subscriber. Default 256.
    pub const fn subscriber_capacity(mut self, updates: usize) -> Self {
        self.feed = updates;
        self
    }

    /// How many bytes a message's body may have. Default 1 MiB.
    pub const fn max_body(mut self, bytes: usize) -> Self {
        self.max_body = bytes;
        self
    }

    /// How many bytes of an answer's body are read before the rest is dropped,
    /// and the connection with it. Default 64 KiB.
    pub const fn read_body(mut self, bytes: usize) -> Self {
        self.caps.read = bytes;
        self
    }

    /// How many of them are kept in the [result](crate::DeliveryResult). May be
    /// 0. Default 4 KiB.
    pub const fn kept_body(mut self, bytes: usize) -> Self {
        self.caps.kept = bytes;
        self
    }

    /// The breaker of each lane. Default [`Settings::moderate`]: open after 5
    /// failures in a row, for 30 s.
    pub fn breaker(mut self, settings: Settings) -> Self {
        self.breaker = Some(settings);
        self
    }

    /// No breaker.
    pub fn without_breaker(mut self) -> Self {
        self.breaker = None;
        self
    }

    /// How many attempts each lane may make in a time. Default: as many as
    /// there are.
    pub const fn rate_limit(mut self, quota: Quota) -> Self {
        self.rate_limit = Some(quota);
        self
    }

    /// Refuses to register what this guard would not let be dialled, as far as
    /// the url tells: so that who mistypes hears of it at once. It is the
    /// transport's connector that protects, and should have the same guard.
    /// Default: none.
    pub fn guard(mut self, guard: Guard) -> Self {
        self.guard = Some(guard);
        self
    }

    /// Where what is accepted is kept. Default: a [`MemoryStore`] of its own.
    pub fn store(mut self, store: impl DeliveryStore) -> Self {
        self.store = Arc::new(store);
        self
    }

    /// What timestamps and `Retry-After` dates are read from. Default: the
    /// system's clock.
    pub fn wall_clock(mut self, clock: impl WallClock) -> Self {
        self.wall = SharedWallClock::new(clock);
        self
    }

    /// Draws the jitter of retries. Default: the thread's generator.
    pub fn random(mut self, random: impl Random) -> Self {
        self.random = SharedRandom::new(random);
        self
    }

    /// Checks the settings. Nothing is sent before [`start`](Webhooks::start).
    ///
    /// Each attempt is made by a clone of `transport`, within the
    /// registration's timeout. It must not follow redirects, and must not
    /// retry. **It dials what users have registered**: give it one that is built
    /// on the [guarded connector](crate::guard), or whoever may register can
    /// have the machines of your own network called.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings.
    pub fn build<S, B>(self, transport: S) -> Result<Webhooks, ConfigError>
    where
        S: Service<Request<WholeBody>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send,
        B: Body + Send,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        if !label::is_sound(&self.name, 128) {
            return Err(Problem::Name.into());
        }
        let mut limits = self.limits;
        limits.lane_capacity = self.lane_capacity.unwrap_or(limits.capacity);
        for (what, count) in [
            ("the capacity", limits.capacity),
            ("the capacity of a lane", limits.lane_capacity),
            ("the attempts at once", limits.concurrency),
            ("the attempts at once in a lane", limits.lane_concurrency),
            ("the registrations", limits.registrations),
            ("the dead letters", limits.letters),
            ("the results", limits.results),
            ("the results of a scope", limits.results_in_scope),
            ("the updates of a subscriber", self.feed),
        ] {
            if !(1..=1_000_000).contains(&count) {
                return Err(Problem::Count(what).into());
            }
        }
        if limits.lane_concurrency > limits.concurrency / 2 {
            return Err(Problem::Lane.into());
        }
        if limits.lane_capacity > limits.capacity {
            return Err(Problem::LaneCapacity.into());
        }
        // Origins are what users register: an open breaker is never forgotten,
        // and has to have room beside all others.
        let most_lanes = limits.registrations.max(1000);
        let breakers = match self.breaker {
            None => None,
            Some(settings) => {
                let registry = Registry::builder(Arc::clone(&self.name))
                    .settings(settings)
                    .max_keys(most_lanes)
                    .name_keys(false)
                    .build();
                Some(registry.map_err(|error| Problem::Breaker(error.to_string()))?)
            }
        };
        let rates = match self.rate_limit {
            None => None,
            Some(quota) => {
                let limit = Limit::new(quota).name(LIMIT).max_keys(most_lanes);
                let layer = RateLimitLayer::builder().limit(limit).build();
                let layer = layer.map_err(|error| Problem::Quota(error.to_string()))?;
                let handle = layer.handle();
                let limit = handle.limit(LIMIT);
                let limit = limit.map_err(|error| Problem::Quota(error.to_string()))?;
                Some((handle, limit))
            }
        };
        // Its first reading takes a while.
        let _ = clock::now();
        Ok(Webhooks::new(Shared {
            metrics: Metrics::new(&self.name),
            name: self.name,
            state: Mutex::new(State::new(limits)),
            news: Notify::new(),
            running: AtomicBool::new(false),
            loaded: AtomicBool::new(false),
            guard: self.guard,
            store: self.store,
            writing: tokio::sync::Mutex::new(()),
            transport: transport::transport(transport),
            breakers,
            rates,
            wall: self.wall,
            random: self.random,
            instance: ThreadRandom.next_u64(),
            ids: AtomicU64::new(1),
            caps: Caps {
                kept: self.caps.kept.min(self.caps.read),
                ..self.caps
            },
            max_body: self.max_body,
            feed: self.feed,
        }))
    }
}

impl fmt::Debug for WebhooksBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhooksBuilder")
            .field("name", &self.name)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// How long the worker waits where nobody can say how long: a breaker that was
/// forced open, a store that cannot be read.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_secs(1);
