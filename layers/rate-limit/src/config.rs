//! Settings, checked once by `build()`.

use std::{borrow::Cow, fmt, num::NonZeroUsize, sync::Arc};

use buttress_core::{
    Any, Http, Responder, View,
    clock::{self, SharedWallClock, WallClock},
    key::{ExtractKey, Global, Key, SharedKey},
    keyed, label,
    respond::SharedResponder,
};
use http::{HeaderMap, StatusCode};

use crate::{
    ConfigError, Gcra, HeaderFormat, Quota, RateLimitLayer,
    layer::{Errors, Respond, Shared},
    limiter::{Callback, Limiter, Rule},
    store::{MAX_LIMITS, Table},
};

/// How many keys a limit remembers unless told otherwise.
const DEFAULT_MAX_KEYS: usize = 1_000_000;

/// What happens when a new key comes and `max_keys` others are in debt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WhenFull {
    /// One of the least indebted keys (of a sample) is forgotten, and has a
    /// whole quota again. Counted in a metric. The default.
    #[default]
    Evict,
    /// The new key's request is refused, 503, until there is room.
    Refuse,
}

/// What happens to a request that has no key: the header or the peer's address
/// that the key is made of is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MissingKey {
    /// All such requests share one key, [`Key::global`]. The default: leaving
    /// a header out gains nobody a quota of their own.
    ///
    /// [`Key::global`]: buttress_core::key::Key::global
    #[default]
    Share,
    /// Refused, 400.
    Refuse,
    /// This limit does not apply to them.
    Skip,
}

/// One limit: a quota for each key, what the key is, and what a request costs.
///
/// Defaults: named `default`, one key for all ([`Global`]), cost 1, a million
/// keys.
pub struct Limit<V: View = Http> {
    name: Cow<'static, str>,
    quota: Quota,
    quota_by: Option<Callback<V, Gcra>>,
    exceptions: Vec<(Key, Quota)>,
    key: SharedKey<V>,
    cost: u32,
    cost_by: Option<Callback<V, u32>>,
    missing: MissingKey,
    max_keys: usize,
    when_full: WhenFull,
}

impl Limit<Http> {
    /// A limit on HTTP requests.
    #[must_use]
    pub fn new(quota: Quota) -> Self {
        Self::on(quota)
    }
}

impl<Req: 'static> Limit<Any<Req>> {
    /// A limit on requests of any type, which key, cost and quota callbacks
    /// are shown as they are.
    #[must_use]
    pub fn any(quota: Quota) -> Self {
        Self::on(quota)
    }
}

impl<V: View> Limit<V> {
    fn on(quota: Quota) -> Self {
        Self {
            name: Cow::Borrowed("default"),
            quota,
            quota_by: None,
            exceptions: Vec::new(),
            key: SharedKey::new(Global),
            cost: 1,
            cost_by: None,
            missing: MissingKey::default(),
            max_keys: DEFAULT_MAX_KEYS,
            when_full: WhenFull::default(),
        }
    }

    /// Names the limit: for the draft's headers, metrics, events and the
    /// handle. 1 to 64 printable ASCII characters, one name for each limit of
    /// a layer.
    #[must_use]
    pub fn name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = name.into();
        self
    }

    /// What shares a quota. See [`buttress_core::key`].
    #[must_use]
    pub fn key(mut self, key: impl ExtractKey<V>) -> Self {
        self.key = SharedKey::new(key);
        self
    }

    /// What happens to a request without a key.
    #[must_use]
    pub fn missing_key(mut self, missing: MissingKey) -> Self {
        self.missing = missing;
        self
    }

    /// What every request costs. Default 1; 0 passes always and charges
    /// nothing.
    #[must_use]
    pub fn cost(mut self, cost: u32) -> Self {
        self.cost = cost;
        self
    }

    /// What this request costs, by a closure; in place of the fixed cost. A
    /// cost above the burst is refused for good: 403, no `Retry-After`.
    #[must_use]
    pub fn cost_by<F>(mut self, cost: F) -> Self
    where
        F: for<'a> Fn(V::Ref<'a>) -> u32 + Send + Sync + 'static,
    {
        self.cost_by = Some(Arc::new(cost));
        self
    }

    /// The quota of this request's key, by a closure: tiers. It returns
    /// [checked](Quota::check) quotas, made beforehand; what it reads to
    /// choose may change while it serves.
    ///
    /// A key is expected to have one quota at a time: make what chooses the
    /// quota a part of the key, or see to it that no client can choose. When it
    /// changes, what the key has spent stays spent, as the time that it takes
    /// to come back under the old quota, at most a whole burst of the new one.
    ///
    /// ```
    /// use buttress_core::{Head, key};
    /// use buttress_rate_limit::{Limit, Quota};
    ///
    /// /// What the layer that checks API keys attaches to a request. (A header
    /// /// would let clients choose.)
    /// #[derive(Clone)]
    /// enum Tier { Free, Gold }
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (free, gold) = (Quota::per_minute(10).check()?, Quota::per_minute(600).check()?);
    /// let limit = Limit::new(Quota::per_minute(10))
    ///     .key(key::header("x-api-key"))
    ///     .quota_by(move |head: Head<'_>| match head.extensions.get() {
    ///         Some(Tier::Gold) => gold,
    ///         Some(Tier::Free) | None => free,
    ///     });
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn quota_by<F>(mut self, quota: F) -> Self
    where
        F: for<'a> Fn(V::Ref<'a>) -> Gcra + Send + Sync + 'static,
    {
        self.quota_by = Some(Arc::new(quota));
        self
    }

    /// Gives one key a quota of its own. It goes before what
    /// [`quota_by`](Self::quota_by) says, and can be changed while serving, by
    /// [`Handle::set_quota_for`](crate::Handle::set_quota_for).
    ///
    /// ```
    /// use buttress_core::key;
    /// use buttress_rate_limit::{Limit, Quota};
    ///
    /// let by_key = key::header("x-api-key");
    /// let limit = Limit::new(Quota::per_second(5))
    ///     .quota_for(by_key.key("our-best-customer"), Quota::per_second(500))
    ///     .key(by_key);
    /// ```
    #[must_use]
    pub fn quota_for(mut self, key: Key, quota: Quota) -> Self {
        self.exceptions.push((key, quota));
        self
    }

    /// The most keys that are remembered in debt: a hard ceiling. Default
    /// 1,000,000, which take 16 to 24 MB when they are all there and next to
    /// nothing before.
    ///
    /// As long as fewer keys than this are in debt, none is forgotten in
    /// debt.
    #[must_use]
    pub fn max_keys(mut self, max_keys: usize) -> Self {
        self.max_keys = max_keys;
        self
    }

    /// What happens when the ceiling is reached.
    #[must_use]
    pub fn when_full(mut self, when_full: WhenFull) -> Self {
        self.when_full = when_full;
        self
    }

    pub(crate) fn check_name(&self) -> Result<(), ConfigError> {
        if label::is_sound(&self.name, 64) {
            return Ok(());
        }
        Err(ConfigError::BadName(self.name.clone()))
    }

    fn build(self) -> Result<(Rule<V>, Table), ConfigError> {
        self.check_name()?;
        let gcra = self.quota.check()?;
        if self.cost_by.is_none() && self.quota_by.is_none() && self.cost > gcra.burst() {
            return Err(ConfigError::CostAboveBurst);
        }
        let max_keys = NonZeroUsize::new(self.max_keys).ok_or(ConfigError::ZeroKeys)?;
        let when_full = match self.when_full {
            WhenFull::Evict => keyed::WhenFull::Evict,
            WhenFull::Refuse => keyed::WhenFull::Refuse,
        };
        let mut table = Table::new(self.name, gcra, max_keys, when_full);
        table.chosen = self.quota_by.is_some();
        for (key, quota) in self.exceptions {
            table.except(table.id(&key), Some(quota.check()?), clock::now());
        }
        let rule = Rule {
            key: self.key,
            cost: self.cost,
            cost_by: self.cost_by,
            quota_by: self.quota_by,
            missing: self.missing,
        };
        Ok((rule, table))
    }
}

impl<V: View> Clone for Limit<V> {
    /// The same settings. Two layers built of it have a state each.
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            quota: self.quota,
            quota_by: self.quota_by.clone(),
            exceptions: self.exceptions.clone(),
            key: self.key.clone(),
            cost: self.cost,
            cost_by: self.cost_by.clone(),
            missing: self.missing,
            max_keys: self.max_keys,
            when_full: self.when_full,
        }
    }
}

impl<V: View> fmt::Debug for Limit<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limit")
            .field("name", &self.name)
            .field("quota", &self.quota)
            .field("cost", &self.cost)
            .field("missing", &self.missing)
            .field("max_keys", &self.max_keys)
            .field("when_full", &self.when_full)
            .finish_non_exhaustive()
    }
}

/// The state is in this process: what a [`RateLimitBuilder`] builds unless it is
/// told otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub struct InMemory(());

/// Builds a [`RateLimitLayer`] (or a [`WaitLayer`](crate::WaitLayer), or with
/// the feature `redis` the layer of a whole fleet).
#[must_use = "nothing is limited before `build()`"]
pub struct RateLimitBuilder<V: View = Http, M = Respond, K = InMemory> {
    name: Cow<'static, str>,
    limits: Vec<Limit<V>>,
    bypass: Option<Callback<V, bool>>,
    shadow: bool,
    mode: M,
    /// Where the state is kept.
    pub(crate) kept: K,
}

impl RateLimitBuilder<Http, Respond> {
    pub(crate) fn respond() -> Self {
        Self::with(Respond::default())
    }
}

impl<K> RateLimitBuilder<Http, Respond, K> {
    /// Which headers are sent. Default: [`HeaderFormat::XRateLimit`]. None for
    /// an empty list; `Retry-After` is sent on refusals in any case.
    ///
    /// They stand on every response that a decision was made for, whatever
    /// its status, and on no other: not on what is bypassed, and not in
    /// shadow mode.
    pub fn headers(mut self, formats: impl IntoIterator<Item = HeaderFormat>) -> Self {
        self.mode.formats.clear();
        for format in formats {
            if !self.mode.formats.contains(&format) {
                self.mode.formats.push(format);
            }
        }
        self.mode.settle();
        self
    }

    /// Lets scripts of other origins read the headers, by
    /// `Access-Control-Expose-Headers`. Default: no. Costs allocations. Where
    /// no headers are sent nothing is exposed, `Retry-After` neither.
    pub fn expose_headers(mut self, expose: bool) -> Self {
        self.mode.expose = expose;
        self
    }

    /// Makes refusals into responses. Default:
    /// [`ProblemResponder`](buttress_core::ProblemResponder). The rate limit's
    /// headers are added to what it returns, `Retry-After` where it has none.
    pub fn responder(mut self, responder: impl Responder) -> Self {
        self.mode.responder = SharedResponder::new(responder);
        self
    }

    /// Gives handlers a [`RateLimitInfo`](crate::RateLimitInfo) as a request
    /// extension. Default: no, since extensions allocate.
    pub fn info(mut self, info: bool) -> Self {
        self.mode.info = info;
        self.mode.settle();
        self
    }

    /// Gives the charge back when the closure says so of the response: where
    /// only failures count, say.
    ///
    /// A request whose response is never seen (the inner service failed, or
    /// the client went away) stays charged. Only the head is shown: a gRPC
    /// status that comes in the trailers is not in it.
    ///
    /// ```
    /// use buttress_core::key::ClientIp;
    /// use buttress_rate_limit::{Limit, Quota, RateLimitLayer};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// // Five failed logins a minute.
    /// let logins = RateLimitLayer::builder()
    ///     .limit(Limit::new(Quota::per_minute(5)).key(ClientIp::new()))
    ///     .refund_if(|status, _headers| status.is_success())
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn refund_if<F>(mut self, refund: F) -> Self
    where
        F: Fn(StatusCode, &HeaderMap) -> bool + Send + Sync + 'static,
    {
        self.mode.refund = Some(Arc::new(refund));
        self
    }

    /// The clock that Reset is told by. Default: the system's. No decision
    /// depends on it.
    pub fn wall_clock(mut self, clock: impl WallClock) -> Self {
        self.mode.wall_clock = SharedWallClock::new(clock);
        self
    }

    /// Refuses with errors in place of responses, for clients: the service's
    /// error becomes [`BoxError`](buttress_core::BoxError), and a refusal is
    /// found in it by `downcast_ref::<Refusal>()`. What was set for responses
    /// is dropped.
    pub fn errors(self) -> RateLimitBuilder<Http, Errors, K> {
        RateLimitBuilder {
            name: self.name,
            limits: self.limits,
            bypass: self.bypass,
            shadow: self.shadow,
            mode: Errors::default(),
            kept: self.kept,
        }
    }
}

impl<Req: 'static> RateLimitBuilder<Any<Req>, Errors> {
    pub(crate) fn any() -> Self {
        Self::with(Errors::default())
    }
}

impl<V: View, M> RateLimitBuilder<V, M> {
    fn with(mode: M) -> Self {
        Self {
            name: Cow::Borrowed("default"),
            limits: Vec::new(),
            bypass: None,
            shadow: false,
            mode,
            kept: InMemory(()),
        }
    }
}

impl<V: View, M, K> RateLimitBuilder<V, M, K> {
    #[cfg(feature = "redis")]
    pub(crate) fn name_of(&self) -> &str {
        &self.name
    }

    /// The same with its state kept elsewhere.
    #[cfg(feature = "redis")]
    pub(crate) fn kept_in<L>(self, kept: L) -> RateLimitBuilder<V, M, L> {
        RateLimitBuilder {
            name: self.name,
            limits: self.limits,
            bypass: self.bypass,
            shadow: self.shadow,
            mode: self.mode,
            kept,
        }
    }

    /// Names the layer: the label `name` of metrics and events. Default
    /// `default`.
    pub fn name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = name.into();
        self
    }

    /// Adds a limit. Several are decided together: a request is charged to all
    /// or to none, at most 8.
    pub fn limit(mut self, limit: Limit<V>) -> Self {
        self.limits.push(limit);
        self
    }

    /// Lets requests by that the closure says so of: neither charged nor
    /// given headers.
    pub fn bypass<F>(mut self, bypass: F) -> Self
    where
        F: for<'a> Fn(V::Ref<'a>) -> bool + Send + Sync + 'static,
    {
        self.bypass = Some(Arc::new(bypass));
        self
    }

    /// Shadow mode: decides, charges and counts, but lets everything pass and
    /// sends no headers. For trying a quota on real traffic. Default: no.
    pub fn shadow(mut self, shadow: bool) -> Self {
        self.shadow = shadow;
        self
    }

    pub(crate) fn shared(self) -> Result<Shared<V, M>, ConfigError> {
        if self.limits.is_empty() {
            return Err(ConfigError::NoLimit);
        }
        if self.limits.len() > MAX_LIMITS {
            return Err(ConfigError::TooManyLimits);
        }
        let mut rules = Vec::with_capacity(self.limits.len());
        let mut tables: Vec<Table> = Vec::with_capacity(self.limits.len());
        for limit in self.limits {
            let (rule, table) = limit.build()?;
            if tables.iter().any(|other| other.name == table.name) {
                return Err(ConfigError::DuplicateName(table.name));
            }
            rules.push(rule);
            tables.push(table);
        }
        // Its first reading calibrates the clock, for as long as 200 ms: better
        // here than in the first request.
        let _ = clock::now();
        let limiter = Limiter::new(self.name, rules, tables, self.bypass, self.shadow);
        Ok(Shared {
            limiter,
            mode: self.mode,
        })
    }
}

impl<V: View, M> RateLimitBuilder<V, M> {
    /// Checks the settings and makes the state that all clones of the layer
    /// share.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings: see [`ConfigError`].
    pub fn build(self) -> Result<RateLimitLayer<V, M>, ConfigError> {
        Ok(RateLimitLayer::new(self.shared()?))
    }
}

#[cfg(feature = "wait")]
impl<V: View> RateLimitBuilder<V, Errors> {
    /// Builds a layer that waits for its turn in place of refusing.
    ///
    /// A request waits at most `longest`, behind at most `room` that wait
    /// already; see [`WaitLayer`](crate::WaitLayer).
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build), and where `longest` or `room` is zero.
    pub fn build_waiting(
        self,
        longest: std::time::Duration,
        room: usize,
    ) -> Result<crate::WaitLayer<V>, ConfigError> {
        if longest.is_zero() || room == 0 {
            return Err(ConfigError::NothingWaits);
        }
        Ok(crate::WaitLayer::new(self.shared()?, longest, room))
    }
}

impl<V: View, M, K> fmt::Debug for RateLimitBuilder<V, M, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimitBuilder")
            .field("name", &self.name)
            .field("limits", &self.limits)
            .field("shadow", &self.shadow)
            .finish_non_exhaustive()
    }
}

/// So that the compiler can say it where the layer is built, not where it is
/// used: what a server stack asks of a layer.
const _: fn() = || {
    fn fits<T: Clone + Send + Sync + 'static>() {}
    fits::<RateLimitLayer>();
    fits::<RateLimitLayer<Any<std::cell::Cell<u8>>, Errors>>();
};

#[cfg(test)]
mod tests {
    use super::*;

    fn error(builder: RateLimitBuilder) -> ConfigError {
        builder.build().unwrap_err()
    }

    fn limit() -> Limit {
        Limit::new(Quota::per_second(5))
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let with = |limit| RateLimitLayer::builder().limit(limit);
        assert_eq!(error(RateLimitLayer::builder()), ConfigError::NoLimit);
        assert_eq!(error(with(limit().max_keys(0))), ConfigError::ZeroKeys);
        assert_eq!(error(with(limit().cost(6))), ConfigError::CostAboveBurst);
        assert_eq!(
            error(with(Limit::new(Quota::per_second(0)))),
            ConfigError::ZeroLimit
        );
        assert_eq!(
            error(with(limit().quota_for(Key::global(), Quota::per_hour(0)))),
            ConfigError::ZeroLimit
        );
        for name in ["", "caf\u{e9}", "a\nb", &"x".repeat(65)] {
            let error = error(with(limit().name(name.to_owned())));
            assert_eq!(error, ConfigError::BadName(name.to_owned().into()));
        }
        assert_eq!(
            error(with(limit().name("a")).limit(limit().name("a"))),
            ConfigError::DuplicateName("a".into())
        );
        let many = (0..9).fold(RateLimitLayer::builder(), |builder, n| {
            builder.limit(limit().name(n.to_string()))
        });
        assert_eq!(error(many), ConfigError::TooManyLimits);
    }

    #[test]
    fn costs_that_a_closure_names_are_not_checked_beforehand() {
        let by_closure = limit().cost(6).cost_by(|_| 6);
        assert!(RateLimitLayer::builder().limit(by_closure).build().is_ok());
    }

    #[cfg(feature = "wait")]
    #[test]
    fn waiting_needs_time_and_room() {
        use std::time::Duration;

        let waiting = |longest, room| {
            let builder = RateLimitLayer::builder().limit(limit()).errors();
            builder.build_waiting(longest, room).map(|_| ())
        };
        assert_eq!(waiting(Duration::ZERO, 1), Err(ConfigError::NothingWaits));
        assert_eq!(
            waiting(Duration::from_secs(1), 0),
            Err(ConfigError::NothingWaits)
        );
        assert_eq!(waiting(Duration::from_secs(1), 1), Ok(()));
    }
}
