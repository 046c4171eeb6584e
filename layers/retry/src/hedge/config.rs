//! What a layer is made of, checked once by `build()`.

use std::{
    fmt,
    marker::PhantomData,
    sync::{Arc, atomic::AtomicU32},
    time::Duration,
};

use buttress_core::{
    Any, Head, Http, Refusal, View,
    classify::GrpcCode,
    clock::{SharedWallClock, WallClock},
};
use http::{HeaderName, Method, StatusCode};

use super::{
    HedgeLayer, HedgePolicy,
    call::Web,
    layer::{OverAny, OverHttp},
    metrics::Metrics,
    shared::{After, Delay, OnHedge, Shared},
};
use crate::{
    AnyError, Boxed, Budget, ConfigError, Memory, Opaque, Outcome, SharedBudget,
    policy::check_name,
    rules::{Repeat, Rules},
};

/// As a retry's, so that those further in see both.
const RETRY_ATTEMPT: HeaderName = HeaderName::from_static("x-retry-attempt");

/// What a body may have and still be sent twice, unless said otherwise.
const MAX_BODY: usize = 64 * 1024;

/// More at once is an attack.
const MAX_HEDGES: u32 = 16;

pub(super) fn check_max_hedges(hedges: u32) -> Result<(), ConfigError> {
    if hedges > MAX_HEDGES {
        return Err(ConfigError::new("there must be at most 16 hedges"));
    }
    Ok(())
}

/// Builds a [`HedgeLayer`].
#[must_use = "nothing is hedged before `build()`"]
pub struct HedgeBuilder<V: View = Http, M = OverHttp> {
    name: Arc<str>,
    after: Option<After>,
    window: Duration,
    max_hedges: u32,
    budget: Option<SharedBudget>,
    counted_outside: bool,
    on_hedge: Vec<OnHedge>,
    mode: M,
    view: PhantomData<fn(V)>,
}

/// Any error but a refusal that stands: an error is no answer, and another
/// attempt that is under way costs nothing more.
fn any_error(outcome: Outcome<'_>) -> Option<bool> {
    match outcome {
        Outcome::Error(error) => error.and_then(Refusal::find).is_none().then_some(true),
        Outcome::Response { .. } => None,
    }
}

impl HedgeBuilder {
    pub(super) fn http() -> Self {
        Self::of(OverHttp {
            web: Arc::new(Web {
                rules: Rules {
                    asked: Some(Arc::new(|_, outcome| any_error(outcome))),
                    ..Rules::default()
                },
                attempt_header: None,
                max_body: MAX_BODY,
                memory: Memory::default(),
            }),
            inspect: PhantomData,
        })
    }
}

impl<Req: 'static> HedgeBuilder<Any<Req>, OverAny<Req>> {
    pub(super) fn any() -> Self {
        Self::of(OverAny {
            judge: AnyError::default(),
            hedge_if: None,
        })
    }
}

impl<V: View, M> HedgeBuilder<V, M> {
    fn of(mode: M) -> Self {
        Self {
            name: "default".into(),
            after: None,
            window: Duration::from_secs(60),
            max_hedges: 1,
            budget: Some(SharedBudget::default()),
            counted_outside: false,
            on_hedge: Vec::new(),
            mode,
            view: PhantomData,
        }
    }

    /// The name in logs and metrics: 1 to 128 printable ASCII characters.
    /// Default: `default`.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// Sends a hedge this long after the attempt before was found not to be
    /// over at once; at most an hour. With zero both are sent together. There
    /// is no default: this or
    /// [`after_percentile`](Self::after_percentile) must be said.
    pub fn after(mut self, delay: Duration) -> Self {
        self.after = Some(After::Fixed(delay));
        self
    }

    /// Sends a hedge when the attempt takes longer than this part of those of
    /// lately did, but never before `min` nor later than `max`. 0.95 hedges a
    /// twentieth of the requests.
    ///
    /// What counts is how long the first attempts of requests that may be
    /// hedged took to a good answer, over the last half to whole
    /// [`window`](Self::window); those that lost, with the time that they had.
    /// The delay is right to 4 % upward. Of fewer than 20 nothing is said, and
    /// the delay is `max`.
    pub fn after_percentile(mut self, percentile: f64, min: Duration, max: Duration) -> Self {
        self.after = Some(After::Percentile(percentile, min, max));
        self
    }

    /// Over how long latencies are remembered, for
    /// [`after_percentile`](Self::after_percentile): from 1 s to a day. Default: a
    /// minute.
    pub fn window(mut self, window: Duration) -> Self {
        self.window = window;
        self
    }

    /// How many hedges a request may have, besides its first attempt: at most
    /// 16, each after the delay again; none if 0. Default: 1.
    pub fn max_hedges(mut self, hedges: u32) -> Self {
        self.max_hedges = hedges;
        self
    }

    /// What bounds how many hedges there are, all together; asked when a hedge
    /// could be sent at once. What it refuses is not asked for again. Default:
    /// [`RetryBudget::default`](crate::RetryBudget), of its own.
    ///
    /// Every request that may be hedged is counted, whether it is or not, and
    /// every attempt of it that ends has its outcome.
    pub fn budget(mut self, budget: impl Budget) -> Self {
        self.budget = Some(SharedBudget::new(budget));
        self.counted_outside = false;
        self
    }

    /// The budget of a retry further out, which counts the requests and the
    /// outcomes that it sees itself: hedges only take from it, and tell it of
    /// bad answers that were not handed on.
    pub fn budget_of_retry(mut self, budget: SharedBudget) -> Self {
        self.budget = Some(budget);
        self.counted_outside = true;
        self
    }

    /// As many hedges as there are slow requests: all of them, when the callee
    /// is ill.
    pub fn without_budget(mut self) -> Self {
        self.budget = None;
        self
    }

    /// Calls `listener` as a hedge is sent: with the number of the attempt,
    /// from 2, and the delay since the one before. Called outside every lock,
    /// on the task of the request.
    pub fn on_hedge(mut self, listener: impl Fn(u32, Duration) + Send + Sync + 'static) -> Self {
        self.on_hedge.push(Box::new(listener));
        self
    }

    fn mode<N>(self, change: impl FnOnce(M) -> N) -> HedgeBuilder<V, N> {
        HedgeBuilder {
            name: self.name,
            after: self.after,
            window: self.window,
            max_hedges: self.max_hedges,
            budget: self.budget,
            counted_outside: self.counted_outside,
            on_hedge: self.on_hedge,
            mode: change(self.mode),
            view: PhantomData,
        }
    }

    fn delay(&self) -> Result<Delay, ConfigError> {
        const DAY: Duration = Duration::from_secs(24 * 3600);

        let after = self
            .after
            .ok_or(ConfigError::new("a hedge needs a delay"))?;
        after.check()?;
        if self.window < Duration::from_secs(1) || self.window > DAY {
            return Err(ConfigError::new(
                "the window of latencies must be from a second to a day",
            ));
        }
        Ok(Delay::new(after, self.window))
    }

    /// Builds the layer.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if there is no delay, or a setting is out of its range.
    pub fn build(self) -> Result<HedgeLayer<V, M>, ConfigError> {
        check_name(&self.name)?;
        let delay = self.delay()?;
        check_max_hedges(self.max_hedges)?;
        Ok(HedgeLayer {
            policy: HedgePolicy(Arc::new(Shared {
                metrics: Metrics::new(&self.name),
                name: self.name,
                delay,
                max_hedges: AtomicU32::new(self.max_hedges),
                budget: self.budget,
                counted_outside: self.counted_outside,
                on_hedge: self.on_hedge,
            })),
            mode: self.mode,
            view: PhantomData,
        })
    }
}

impl<I> HedgeBuilder<Http, OverHttp<I>> {
    fn web(mut self, change: impl FnOnce(&mut Web)) -> Self {
        change(Arc::make_mut(&mut self.mode.web));
        self
    }

    fn rules(self, change: impl FnOnce(&mut Rules)) -> Self {
        self.web(|web| change(&mut web.rules))
    }

    /// The methods of requests that are hedged; those with an
    /// `Idempotency-Key` are in any case. gRPC is POST throughout, and nobody
    /// can tell which of its methods are idempotent: say so by
    /// [`hedge_if`](Self::hedge_if). Default: GET, HEAD, OPTIONS, TRACE, PUT
    /// and DELETE, the idempotent ones (RFC 9110 §9.2.2).
    pub fn methods(self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.rules(|rules| {
            rules.methods = methods.into_iter().collect();
            rules.repeat = Repeat::ByMethod;
        })
    }

    /// All requests are hedged, whatever their method.
    pub fn hedge_always(self) -> Self {
        self.rules(|rules| rules.repeat = Repeat::Always)
    }

    /// A closure says which requests are hedged. It is asked once for each.
    pub fn hedge_if(self, may: impl Fn(Head<'_>) -> bool + Send + Sync + 'static) -> Self {
        self.rules(|rules| rules.repeat = Repeat::By(Arc::new(may)))
    }

    /// The statuses that are bad. Default, as a retry's: 408, 425, 429, 500,
    /// 502, 503 and 504.
    pub fn statuses(self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        self.rules(|rules| {
            rules.statuses = statuses.into_iter().map(|status| status.as_u16()).collect();
        })
    }

    /// The codes that are bad where the request is gRPC and the code stands in
    /// the response's head (trailers-only), or where a
    /// [`PeekLayer`](crate::PeekLayer) found it. Default: UNAVAILABLE.
    pub fn grpc_codes(self, codes: impl IntoIterator<Item = GrpcCode>) -> Self {
        self.rules(|rules| rules.codes = codes.into_iter().collect())
    }

    /// A closure over request and result that says whether it is bad; `None`
    /// leaves it to the other rules, by which every error is, but for a refusal
    /// of a layer further in that stands.
    pub fn bad_if(
        self,
        asked: impl Fn(Head<'_>, Outcome<'_>) -> Option<bool> + Send + Sync + 'static,
    ) -> Self {
        self.rules(|rules| {
            rules.asked = Some(Arc::new(move |head, outcome| {
                asked(head, outcome).or_else(|| any_error(outcome))
            }));
        })
    }

    /// Up to how many bytes of a request's body are remembered while it
    /// streams to the first attempt. A longer one goes once, streaming, and is
    /// not hedged. Nor is one that the first attempt has not read to its end
    /// by then: it is looked at again after the delay, three times. Default:
    /// 64 KiB.
    pub fn max_body(self, bytes: usize) -> Self {
        self.web(|web| web.max_body = bytes)
    }

    /// The memory for the bodies of all requests under way, which other layers
    /// may share. Default: 64 MiB of its own.
    pub fn memory(self, memory: Memory) -> Self {
        self.web(|web| web.memory = memory)
    }

    /// Sends `x-retry-attempt` with each hedge: 1 with the first one, or one
    /// more than a retry further out has sent. Default: no.
    pub fn attempt_header(self) -> Self {
        self.attempt_header_named(RETRY_ATTEMPT)
    }

    /// The same under another name.
    pub fn attempt_header_named(self, name: HeaderName) -> Self {
        self.web(|web| web.attempt_header = Some(name))
    }

    /// The clock by which a date in `Retry-After` is told. Default: the
    /// system's.
    pub fn wall_clock(self, clock: impl WallClock) -> Self {
        self.rules(|rules| rules.wall_clock = SharedWallClock::new(clock))
    }

    /// Over a service whose errors are [`BoxError`](buttress_core::BoxError)s.
    pub fn boxed_errors(self) -> HedgeBuilder<Http, OverHttp<Boxed>> {
        self.inspect()
    }

    /// Over a service whose errors do not implement [`std::error::Error`]:
    /// each is bad.
    pub fn opaque_errors(self) -> HedgeBuilder<Http, OverHttp<Opaque>> {
        self.inspect()
    }

    fn inspect<J>(self) -> HedgeBuilder<Http, OverHttp<J>> {
        self.mode(|mode| OverHttp {
            web: mode.web,
            inspect: PhantomData,
        })
    }
}

impl<Req: 'static, W> HedgeBuilder<Any<Req>, OverAny<Req, W>> {
    /// A closure says which requests are hedged. Default: all.
    pub fn hedge_if(mut self, may: impl Fn(&Req) -> bool + Send + Sync + 'static) -> Self {
        self.mode.hedge_if = Some(Arc::new(may));
        self
    }

    /// A closure over request and result that says whether it is bad.
    pub fn bad_if<Res, E, F>(self, judge: F) -> HedgeBuilder<Any<Req>, OverAny<Req, F>>
    where
        F: Fn(&Req, Result<&Res, &E>) -> bool,
    {
        self.judge(judge)
    }

    /// Over a service whose errors are [`BoxError`](buttress_core::BoxError)s.
    pub fn boxed_errors(self) -> HedgeBuilder<Any<Req>, OverAny<Req, AnyError<Boxed>>> {
        self.judge(AnyError::default())
    }

    /// Over a service whose errors do not implement
    /// [`std::error::Error`]: each is bad.
    pub fn opaque_errors(self) -> HedgeBuilder<Any<Req>, OverAny<Req, AnyError<Opaque>>> {
        self.judge(AnyError::default())
    }

    fn judge<N>(self, judge: N) -> HedgeBuilder<Any<Req>, OverAny<Req, N>> {
        self.mode(|mode| OverAny {
            judge,
            hedge_if: mode.hedge_if,
        })
    }
}

impl<V: View, M: fmt::Debug> fmt::Debug for HedgeBuilder<V, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HedgeBuilder")
            .field("name", &self.name)
            .field("after", &self.after)
            .field("max_hedges", &self.max_hedges)
            .field("budget", &self.budget)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}
