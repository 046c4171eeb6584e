//! From a request to a decision: bypass, keys, costs, quotas, and then the
//! store; and what is counted and told of it.

#[cfg(feature = "wait")]
use std::time::Duration;
use std::{borrow::Cow, fmt, sync::Arc};

use buttress_core::{
    Refusal, RefusalKind, View, clock,
    key::{Key, SharedKey},
    keyed::KeyId,
};

use crate::{
    Gcra, MissingKey,
    metrics::{self, Metrics, Reason},
    store::{self, Ask, Changes, Decision, Detail, MAX_LIMITS, Standing, Table, Verdict},
};

/// A user's rule over a request.
pub(crate) type Callback<V, T> = Arc<dyn for<'a> Fn(<V as View>::Ref<'a>) -> T + Send + Sync>;

/// What a limit reads off a request.
pub(crate) struct Rule<V: View> {
    pub(crate) key: SharedKey<V>,
    pub(crate) cost: u32,
    pub(crate) cost_by: Option<Callback<V, u32>>,
    pub(crate) quota_by: Option<Callback<V, Gcra>>,
    pub(crate) missing: MissingKey,
}

impl<V: View> Rule<V> {
    #[inline]
    fn cost(&self, request: V::Ref<'_>) -> u32 {
        match &self.cost_by {
            Some(cost) => cost(request),
            None => self.cost,
        }
    }
}

/// The state and the rules of a layer.
pub(crate) struct Limiter<V: View> {
    name: Cow<'static, str>,
    rules: Box<[Rule<V>]>,
    tables: Arc<[Table]>,
    bypass: Option<Callback<V, bool>>,
    shadow: bool,
    /// Whether no closure has a say in what becomes of a request, nor shadow
    /// mode.
    plain: bool,
    metrics: Metrics,
}

/// How far [`Limiter::admit_known`] got with a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Asked {
    /// It did not look.
    Nothing,
    /// The request has no key.
    Keyless,
    /// Its key and its cost, and that it is new or does not pass.
    Key(KeyId, u32),
}

/// What is to be done with a request.
pub(crate) enum Admission {
    /// No decision was made.
    Bypass,
    /// It passes, and was charged: the tightest limit, and all of them, if
    /// that was asked for.
    Pass(Option<Standing>, Vec<Standing>),
    /// It passes, although it should not: shadow mode.
    Shadow,
    /// It does not pass.
    Refuse(Refusal, Option<Standing>, Vec<Standing>),
}

/// Which limit lets a request in last, and when; `None` is never.
#[cfg(feature = "wait")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Behind {
    pub(crate) limit: usize,
    pub(crate) wait: Option<Duration>,
}

impl<V: View> Limiter<V> {
    pub(crate) fn new(
        name: Cow<'static, str>,
        rules: Vec<Rule<V>>,
        tables: Vec<Table>,
        bypass: Option<Callback<V, bool>>,
        shadow: bool,
    ) -> Self {
        let by_itself = |rule: &Rule<V>| rule.quota_by.is_none();
        Self {
            plain: rules.iter().all(by_itself) && bypass.is_none() && !shadow,
            name,
            rules: rules.into(),
            tables: tables.into(),
            bypass,
            shadow,
            metrics: Metrics::default(),
        }
    }

    pub(crate) fn tables(&self) -> &Arc<[Table]> {
        &self.tables
    }

    /// Decides on a request as most are decided, in a straight run of
    /// instructions: one limit, no closure but the key's and the cost's, and a
    /// key that is there and passes.
    ///
    /// What else there may be is kept out of line, and is told how far this
    /// got: nothing is read off a request twice.
    #[inline(always)]
    pub(crate) fn admit_known(
        &self,
        request: V::Ref<'_>,
        detail: Detail,
    ) -> Result<Option<Standing>, Asked> {
        let ([rule], [table]) = (&*self.rules, &*self.tables) else {
            return Err(Asked::Nothing);
        };
        if !self.plain || detail == Detail::All || table.has_exceptions() {
            return Err(Asked::Nothing);
        }
        let Some(id) = rule.key.identify(request, table.map().secret()) else {
            return Err(Asked::Keyless);
        };
        let cost = rule.cost(request);
        let standing = match detail {
            Detail::None if table.charge_known(id, cost) => None,
            Detail::None => return Err(Asked::Key(id, cost)),
            Detail::Tightest | Detail::All => match table.charge_known_and_tell(id, cost) {
                None => return Err(Asked::Key(id, cost)),
                standing => standing,
            },
        };
        self.count(metrics::Result::Allowed);
        Ok(standing)
    }

    /// Decides on a request that [`admit_known`](Self::admit_known) did not.
    #[inline(never)]
    pub(crate) fn admit_asked(
        &self,
        asked: Asked,
        request: V::Ref<'_>,
        detail: Detail,
    ) -> Admission {
        match asked {
            Asked::Key(id, cost) => self.admit_one(id, cost, request, detail),
            Asked::Keyless => self.admit_keyless(request, detail),
            Asked::Nothing => self.admit_any(request, detail),
        }
    }

    /// A decision by whatever rules there are.
    fn admit_any(&self, request: V::Ref<'_>, detail: Detail) -> Admission {
        if self.bypasses(request) {
            return Admission::Bypass;
        }
        // The common case keeps clear of the arrays of the other.
        if let ([rule], [_]) = (&*self.rules, &*self.tables) {
            return match self.id(0, rule, request) {
                Ok(Some(id)) => self.admit_one(id, rule.cost(request), request, detail),
                Ok(None) => self.bypassed(),
                Err(refusal) => self.conclude_without(refusal),
            };
        }
        self.admit_several(request, detail)
    }

    /// A decision on a request that has no key, where there is one limit.
    fn admit_keyless(&self, request: V::Ref<'_>, detail: Detail) -> Admission {
        let rule = &self.rules[0];
        match self.id_without_key(0, rule) {
            Ok(Some(id)) => self.admit_one(id, rule.cost(request), request, detail),
            Ok(None) => self.bypassed(),
            Err(refusal) => self.conclude_without(refusal),
        }
    }

    /// The only limit's decision, where the quota may be the key's own or
    /// more is to be told.
    fn admit_one(&self, id: KeyId, cost: u32, request: V::Ref<'_>, detail: Detail) -> Admission {
        let (rule, table) = (&self.rules[0], &self.tables[0]);
        let ask = Ask {
            limit: 0,
            id,
            cost,
            quota: Self::quota(rule, table, id, request),
        };
        let held = table.hold(id, clock::now());
        self.conclude(store::decide_one(held, &ask, detail))
    }

    #[inline(never)]
    fn admit_several(&self, request: V::Ref<'_>, detail: Detail) -> Admission {
        let mut asks = [None; MAX_LIMITS];
        let mut len = 0;
        for (index, rule) in self.rules.iter().enumerate() {
            match self.ask(index, rule, request) {
                Ok(Some(ask)) => {
                    asks[len] = Some(ask);
                    len += 1;
                }
                Ok(None) => {}
                Err(refusal) => return self.conclude_without(refusal),
            }
        }
        self.admit_asks(&asks[..len], detail)
    }

    /// The same, and what was asked is told: for those who give charges back.
    pub(crate) fn admit_and_tell(
        &self,
        request: V::Ref<'_>,
        detail: Detail,
    ) -> (Admission, Vec<Option<Ask>>) {
        match self.read(request) {
            Ok(asks) => (self.admit_asks(&asks, detail), asks),
            Err(admission) => (admission, Vec::new()),
        }
    }

    /// What a request asks of the limits, or what becomes of one that asks
    /// nothing.
    pub(crate) fn read(&self, request: V::Ref<'_>) -> Result<Vec<Option<Ask>>, Admission> {
        if self.bypasses(request) {
            return Err(Admission::Bypass);
        }
        let asks = self
            .rules
            .iter()
            .enumerate()
            .map(|(index, rule)| self.ask(index, rule, request));
        // `Ok(None)` is a limit that does not apply.
        asks.filter(|ask| !matches!(ask, Ok(None)))
            .collect::<Result<_, _>>()
            .map_err(|refusal| self.conclude_without(refusal))
    }

    /// What a request asks of a fleet's limits; nothing where none applies.
    #[cfg(feature = "redis")]
    pub(crate) fn read_fleet(
        &self,
        request: V::Ref<'_>,
    ) -> Result<Vec<crate::redis::FleetAsk>, Admission> {
        use buttress_core::key::ExtractKey;

        if self.bypasses(request) {
            return Err(Admission::Bypass);
        }
        let mut asks = Vec::with_capacity(self.rules.len());
        for (limit, (rule, table)) in self.rules.iter().zip(&*self.tables).enumerate() {
            let (key, id) = match rule.key.extract(request) {
                Some(key) => {
                    let id = table.id(&key);
                    (key, id)
                }
                None => match self.id_without_key(limit, rule) {
                    Ok(Some(id)) => (Key::global(), id),
                    Ok(None) => continue,
                    Err(refusal) => return Err(self.conclude_without(refusal)),
                },
            };
            let quota = Self::quota(rule, table, id, request);
            asks.push(crate::redis::FleetAsk {
                limit,
                key,
                id,
                cost: rule.cost(request),
                gcra: quota.unwrap_or_else(|| table.common(id)),
            });
        }
        if asks.is_empty() {
            return Err(self.bypassed());
        }
        Ok(asks)
    }

    /// Counts a request for which Redis could not be asked.
    #[cfg(feature = "redis")]
    pub(crate) fn without_store(&self, mode: crate::redis::OnStoreError) {
        self.metrics.without_store(&self.name, mode);
    }

    /// A refusal for want of Redis.
    #[cfg(feature = "redis")]
    pub(crate) fn conclude_unavailable(&self, limit: usize) -> Admission {
        let reason = Reason::StoreUnavailable;
        self.metrics
            .refusal(&self.name, &self.tables, limit, reason);
        self.conclude_without(Refusal::new(RefusalKind::StoreUnavailable))
    }

    pub(crate) fn admit_asks(&self, asks: &[Option<Ask>], detail: Detail) -> Admission {
        if asks.is_empty() {
            return self.bypassed();
        }
        let decision = store::decide_all(&self.tables, asks, clock::now(), detail);
        self.conclude(decision)
    }

    /// Gives the charges back, and tells how the key stands then: the tightest
    /// limit, and all of them.
    pub(crate) fn refund(&self, asks: &[Option<Ask>]) -> (Option<Standing>, Vec<Standing>) {
        let now = clock::now();
        let mut tightest: Option<Standing> = None;
        let mut all = Vec::with_capacity(asks.len());
        for ask in asks.iter().flatten() {
            let table = &self.tables[ask.limit];
            table.refund(ask, now);
            let standing = table.peek(ask, now);
            all.push(standing);
            if tightest.is_none_or(|tightest| standing.is_tighter_than(&tightest)) {
                tightest = Some(standing);
            }
        }
        (tightest, all)
    }

    /// Decides, and neither counts nor tells of it.
    #[cfg(feature = "wait")]
    pub(crate) fn decide(&self, asks: &[Option<Ask>]) -> Decision {
        store::decide_all(&self.tables, asks, clock::now(), Detail::None)
    }

    /// How long until all of `asks`, of which there is one, fit behind what
    /// costs `ahead`, in the order of the asks.
    #[cfg(feature = "wait")]
    pub(crate) fn wait_behind(
        &self,
        asks: &[Option<Ask>],
        ahead: &[u64],
        now: clock::Instant,
    ) -> Behind {
        let ahead = ahead.iter().copied().chain(std::iter::repeat(0));
        asks.iter()
            .flatten()
            .zip(ahead)
            .map(|(ask, ahead)| Behind {
                limit: ask.limit,
                wait: self.tables[ask.limit].wait_behind(ask, ahead, now),
            })
            .max_by_key(|behind| (behind.wait.is_none(), behind.wait))
            .expect("there is a limit that applies")
    }

    /// Counts a refusal that was decided by whoever waits.
    #[cfg(feature = "wait")]
    pub(crate) fn count_refusal(&self, refusal: &Refusal, limit: usize) {
        self.tell_refusal(limit, refusal);
        self.count(metrics::Result::Refused);
    }

    pub(crate) fn is_shadow(&self) -> bool {
        self.shadow
    }

    /// What a request asks of one limit; `None` where it does not apply.
    fn ask(
        &self,
        limit: usize,
        rule: &Rule<V>,
        request: V::Ref<'_>,
    ) -> Result<Option<Ask>, Refusal> {
        let Some(id) = self.id(limit, rule, request)? else {
            return Ok(None);
        };
        Ok(Some(Ask {
            limit,
            id,
            cost: rule.cost(request),
            quota: Self::quota(rule, &self.tables[limit], id, request),
        }))
    }

    /// By what the request is counted, if it is.
    #[inline(always)]
    fn id(
        &self,
        limit: usize,
        rule: &Rule<V>,
        request: V::Ref<'_>,
    ) -> Result<Option<KeyId>, Refusal> {
        let secret = self.tables[limit].map().secret();
        match rule.key.identify(request, secret) {
            Some(id) => Ok(Some(id)),
            None => self.id_without_key(limit, rule),
        }
    }

    /// The same, where the request has no key.
    #[cold]
    fn id_without_key(&self, limit: usize, rule: &Rule<V>) -> Result<Option<KeyId>, Refusal> {
        let table = &self.tables[limit];
        let name = &*self.name;
        match rule.missing {
            MissingKey::Share => {
                let requests = table.count_keyless();
                // Most often a mistake of whoever built the server (no
                // `ConnectInfo`, say), and then all clients are one: say so at
                // 1, 2, 4, 8, …
                if requests.is_power_of_two() {
                    tracing::warn!(
                        name,
                        limit = &*table.name,
                        requests,
                        "requests without a key share one quota"
                    );
                }
                // Nothing that a client can say makes this key.
                Ok(Some(table.id(&Key::global())))
            }
            MissingKey::Skip => Ok(None),
            MissingKey::Refuse => {
                tracing::debug!(name, limit = &*table.name, "request without a key");
                let reason = Reason::MissingKey;
                self.metrics.refusal(name, &self.tables, limit, reason);
                Err(Refusal::new(RefusalKind::BadRequest)
                    .with_detail("the request lacks what it is counted by")
                    .with_reason(reason.label()))
            }
        }
    }

    /// The quota of a key, where it is not the limit's own.
    #[inline(never)]
    fn quota(rule: &Rule<V>, table: &Table, id: KeyId, request: V::Ref<'_>) -> Option<Gcra> {
        let chosen = || rule.quota_by.as_ref().map(|quota| quota(request));
        table.exception(id).or_else(chosen)
    }

    #[inline]
    fn bypasses(&self, request: V::Ref<'_>) -> bool {
        let bypasses = self.bypass.as_ref().is_some_and(|bypass| bypass(request));
        if bypasses {
            self.count(metrics::Result::Bypassed);
        }
        bypasses
    }

    #[inline(never)]
    pub(crate) fn bypassed(&self) -> Admission {
        self.count(metrics::Result::Bypassed);
        Admission::Bypass
    }

    /// Counts and tells of a decision.
    #[inline(never)]
    pub(crate) fn conclude(&self, decision: Decision) -> Admission {
        if decision.changes != Changes::default() {
            self.tell_changes(decision.changes);
        }
        if decision.verdict == Verdict::Pass {
            self.count(metrics::Result::Allowed);
            return Admission::Pass(decision.tightest, decision.all);
        }
        self.refuse(decision)
    }

    #[cold]
    fn refuse(&self, decision: Decision) -> Admission {
        let (limit, refusal) = decision.verdict.refusal().expect("it does not pass");
        self.tell_refusal(limit, &refusal);
        if self.shadow {
            self.count(metrics::Result::Shadowed);
            return Admission::Shadow;
        }
        self.count(metrics::Result::Refused);
        Admission::Refuse(refusal, decision.tightest, decision.all)
    }

    fn tell_refusal(&self, limit: usize, refusal: &Refusal) {
        let reason = match refusal.kind() {
            RefusalKind::NeverFits => Reason::NeverFits,
            RefusalKind::Overloaded => Reason::Overloaded,
            _ => Reason::RateLimited,
        };
        self.metrics
            .refusal(&self.name, &self.tables, limit, reason);
        tracing::debug!(
            name = &*self.name,
            limit = &*self.tables[limit].name,
            reason = refusal.reason(),
            retry_after = ?refusal.retry_after(),
            shadow = self.shadow,
            "request over its rate limit"
        );
    }

    /// A refusal that no decision stands behind: the request has no key.
    #[cold]
    fn conclude_without(&self, refusal: Refusal) -> Admission {
        if self.shadow {
            self.count(metrics::Result::Shadowed);
            return Admission::Shadow;
        }
        self.count(metrics::Result::Refused);
        Admission::Refuse(refusal, None, Vec::new())
    }

    #[cold]
    fn tell_changes(&self, changes: Changes) {
        for (limit, table) in self.tables.iter().enumerate() {
            if changes.added(limit) {
                self.metrics.keys(&self.name, &self.tables, limit);
            }
            if changes.evicted(limit) {
                let (new, evicted) = table.tell_evictions();
                self.metrics.evicted(&self.name, &self.tables, limit, new);
                // Each may happen once a request: say so at 1, 2, 4, 8, …
                let told = evicted - new;
                if new > 0 && (told == 0 || told.ilog2() < evicted.ilog2()) {
                    tracing::warn!(
                        name = &*self.name,
                        limit = &*table.name,
                        evicted,
                        "max_keys reached: keys were forgotten in debt"
                    );
                }
            }
        }
    }

    #[inline]
    fn count(&self, result: metrics::Result) {
        self.metrics.request(&self.name, &self.tables, result);
    }
}

impl<V: View> fmt::Debug for Limiter<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter")
            .field("name", &self.name)
            .field("tables", &self.tables)
            .field("shadow", &self.shadow)
            .finish_non_exhaustive()
    }
}
