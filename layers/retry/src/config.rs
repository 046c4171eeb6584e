//! What a layer is made of, checked once by `build()`.

use std::{fmt, marker::PhantomData, sync::Arc, time::Duration};

use buttress_core::{
    Any, Head, Http, Refusal, Responder, View,
    classify::GrpcCode,
    clock::{SharedWallClock, WallClock},
    random::Random,
    respond::SharedResponder,
};
use http::{HeaderName, Method, StatusCode};

use crate::{
    Again, AnyError, Boxed, Budget, Cause, ConfigError, GiveUp, Memory, Opaque, Outcome,
    PolicyBuilder, RetryLayer, RetryPolicy, Settings,
    call::{HttpShared, Plain, RefuseIf},
    layer::{Errors, Respond},
    rules::{Repeat, Rules},
};

/// `x-retry-attempt`.
const RETRY_ATTEMPT: HeaderName = HeaderName::from_static("x-retry-attempt");

/// What a body may have and still be repeated, unless said otherwise.
const MAX_BODY: usize = 64 * 1024;

/// Builds a [`RetryLayer`].
#[must_use = "nothing is retried before `build()`"]
pub struct RetryBuilder<V: View = Http, M = Web> {
    policy: PolicyBuilder,
    mode: M,
    view: PhantomData<fn(V)>,
}

/// What a layer over HTTP is asked for.
pub struct Web<I = Plain> {
    rules: Rules,
    refuse_if: Option<RefuseIf>,
    responder: SharedResponder,
    attempt_header: Option<HeaderName>,
    max_body: usize,
    memory: Memory,
    inspect: PhantomData<I>,
}

impl<I> fmt::Debug for Web<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Web")
            .field("rules", &self.rules)
            .field("max_body", &self.max_body)
            .finish_non_exhaustive()
    }
}

impl RetryBuilder {
    pub(crate) fn http() -> Self {
        Self {
            policy: RetryPolicy::builder(),
            mode: Web {
                rules: Rules::default(),
                refuse_if: None,
                responder: SharedResponder::default(),
                attempt_header: None,
                max_body: MAX_BODY,
                memory: Memory::default(),
                inspect: PhantomData,
            },
            view: PhantomData,
        }
    }
}

impl<Req: 'static> RetryBuilder<Any<Req>, Errors> {
    pub(crate) fn any() -> Self {
        Self {
            policy: RetryPolicy::builder(),
            mode: Errors {
                judge: AnyError::default(),
            },
            view: PhantomData,
        }
    }
}

impl<V: View, M> RetryBuilder<V, M> {
    /// The name in logs and metrics: 1 to 128 printable ASCII characters.
    /// Default: `default`.
    pub fn name(self, name: impl Into<Arc<str>>) -> Self {
        self.with(|policy| policy.name(name))
    }

    /// How often, how soon and for how long. Default:
    /// [`Settings::standard`].
    pub fn settings(self, settings: Settings) -> Self {
        self.with(|policy| policy.settings(settings))
    }

    /// What bounds how many requests are repeated, all together: see
    /// [`PolicyBuilder::budget`]. Default: none.
    pub fn budget(self, budget: impl Budget) -> Self {
        self.with(|policy| policy.budget(budget))
    }

    /// Where jitter comes from. Default: the thread's generator.
    pub fn random(self, random: impl Random) -> Self {
        self.with(|policy| policy.random(random))
    }

    /// Calls `listener(attempt, delay, cause)` before each wait: see
    /// [`PolicyBuilder::on_retry`].
    pub fn on_retry(self, listener: impl Fn(u32, Duration, Cause) + Send + Sync + 'static) -> Self {
        self.with(|policy| policy.on_retry(listener))
    }

    /// Calls `listener(attempts, cause, reason)` where there was no further
    /// attempt: see [`PolicyBuilder::on_give_up`].
    pub fn on_give_up(self, listener: impl Fn(u32, Cause, GiveUp) + Send + Sync + 'static) -> Self {
        self.with(|policy| policy.on_give_up(listener))
    }

    fn with(mut self, change: impl FnOnce(PolicyBuilder) -> PolicyBuilder) -> Self {
        self.policy = change(self.policy);
        self
    }

    fn mode<N>(self, change: impl FnOnce(M) -> N) -> RetryBuilder<V, N> {
        RetryBuilder {
            policy: self.policy,
            mode: change(self.mode),
            view: PhantomData,
        }
    }
}

impl<I> RetryBuilder<Http, Web<I>> {
    /// The methods of requests that may be sent twice though the callee may
    /// have acted on the first; those with an `Idempotency-Key` may be in any
    /// case, and so may gRPC's, whose codes rule it. Default: GET, HEAD,
    /// OPTIONS, TRACE, PUT and DELETE, the idempotent ones (RFC 9110 §9.2.2).
    ///
    /// What the callee has surely not begun (no connection, a refused stream,
    /// a breaker or limiter further in that refused it) may always be sent again.
    pub fn methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.mode.rules.methods = methods.into_iter().collect();
        self.mode.rules.repeat = Repeat::ByMethod;
        self
    }

    /// All requests may be sent twice, whatever their method.
    pub fn repeat_always(mut self) -> Self {
        self.mode.rules.repeat = Repeat::Always;
        self
    }

    /// Only what was surely not begun is sent again.
    pub fn repeat_never(mut self) -> Self {
        self.mode.rules.repeat = Repeat::Never;
        self
    }

    /// A closure says which requests may be sent twice.
    pub fn repeat_if(mut self, may: impl Fn(Head<'_>) -> bool + Send + Sync + 'static) -> Self {
        self.mode.rules.repeat = Repeat::By(Arc::new(may));
        self
    }

    /// The statuses that are worth another attempt. Default: 408, 425, 429,
    /// 500, 502, 503 and 504.
    pub fn statuses(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        self.mode.rules.statuses = statuses.into_iter().map(|status| status.as_u16()).collect();
        self
    }

    /// The codes that are worth another attempt where the request is gRPC and
    /// the code stands in the response's head (trailers-only), or where a
    /// [`PeekLayer`](crate::PeekLayer) found it; a response with a body has
    /// begun to be told to the caller, and stands. Default: UNAVAILABLE.
    pub fn grpc_codes(mut self, codes: impl IntoIterator<Item = GrpcCode>) -> Self {
        self.mode.rules.codes = codes.into_iter().collect();
        self
    }

    /// A closure over request and result that says whether it is worth another
    /// attempt; `None` leaves it to the other rules. It does not make what may
    /// not be sent twice be sent twice.
    pub fn retry_if(
        mut self,
        asked: impl Fn(Head<'_>, Outcome<'_>) -> Option<bool> + Send + Sync + 'static,
    ) -> Self {
        self.mode.rules.asked = Some(Arc::new(asked));
        self
    }

    /// Up to how many bytes of a request's body are remembered while it
    /// streams to the first attempt. A longer one goes once, streaming, and is
    /// not repeated. Default: 64 KiB.
    pub fn max_body(mut self, bytes: usize) -> Self {
        self.mode.max_body = bytes;
        self
    }

    /// The memory for the bodies of all requests under way, which other layers
    /// may share. Default: 64 MiB of its own.
    pub fn memory(mut self, memory: Memory) -> Self {
        self.mode.memory = memory;
        self
    }

    /// Sends `x-retry-attempt` with each retry: 1 with the first one. So that
    /// retriers further in can see that someone further out is at it already.
    /// Default: no.
    pub fn attempt_header(self) -> Self {
        self.attempt_header_named(RETRY_ATTEMPT)
    }

    /// The same under another name.
    pub fn attempt_header_named(mut self, name: HeaderName) -> Self {
        self.mode.attempt_header = Some(name);
        self
    }

    /// A closure that is shown a request whose attempt has failed, and how long
    /// there is to wait for the next one: the refusal that it returns is
    /// answered at once, and the attempt's own answer dropped. For who knows
    /// already that there will be nobody to ask: all breakers are open, say.
    /// Asked when nothing else is in the way of the attempt, before the budget
    /// is charged, outside every lock. Default: none.
    pub fn refuse_if(
        mut self,
        refuse_if: impl Fn(Head<'_>, Duration) -> Option<Refusal> + Send + Sync + 'static,
    ) -> Self {
        self.mode.refuse_if = Some(Box::new(refuse_if));
        self
    }

    /// Makes the answer where the service was not ready again before the
    /// deadline: a 504, or gRPC's DEADLINE_EXCEEDED. Default:
    /// [`ProblemResponder`](buttress_core::ProblemResponder).
    pub fn responder(mut self, responder: impl Responder) -> Self {
        self.mode.responder = SharedResponder::new(responder);
        self
    }

    /// The clock by which a date in `Retry-After` is told. Default: the
    /// system's.
    pub fn wall_clock(mut self, clock: impl WallClock) -> Self {
        self.mode.rules.wall_clock = SharedWallClock::new(clock);
        self
    }

    /// Over a service whose errors are [`BoxError`](buttress_core::BoxError)s.
    pub fn boxed_errors(self) -> RetryBuilder<Http, Web<Boxed>> {
        self.inspect()
    }

    /// Over a service whose errors do not implement
    /// [`std::error::Error`]: they are shown to nobody, and none is worth
    /// another attempt.
    pub fn opaque_errors(self) -> RetryBuilder<Http, Web<Opaque>> {
        self.inspect()
    }

    fn inspect<J>(self) -> RetryBuilder<Http, Web<J>> {
        self.mode(|web| Web {
            rules: web.rules,
            refuse_if: web.refuse_if,
            responder: web.responder,
            attempt_header: web.attempt_header,
            max_body: web.max_body,
            memory: web.memory,
            inspect: PhantomData,
        })
    }

    /// Builds the layer.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if the settings make no sense.
    pub fn build(self) -> Result<RetryLayer<Http, Respond<I>>, ConfigError> {
        let Web {
            rules,
            refuse_if,
            responder,
            attempt_header,
            max_body,
            memory,
            ..
        } = self.mode;
        Ok(RetryLayer {
            policy: self.policy.build()?,
            mode: Respond {
                shared: Arc::new(HttpShared {
                    rules,
                    refuse_if,
                    responder,
                    attempt_header,
                }),
                max_body,
                memory,
                inspect: PhantomData,
            },
            view: PhantomData,
        })
    }
}

impl<Req: 'static, W> RetryBuilder<Any<Req>, Errors<W>> {
    /// A closure over request and result that says whether it is worth another
    /// attempt, by a `bool`, or by [`Again`], which can tell when at the
    /// soonest. It has the last word, on refusals of other layers too: one that
    /// says `true` to all asks a breaker again that is open for a minute.
    /// [`Again::of`] is what is done where no closure is asked.
    pub fn retry_if<Res, E, A, F>(self, judge: F) -> RetryBuilder<Any<Req>, Errors<F>>
    where
        F: Fn(&Req, Result<&Res, &E>) -> A,
        A: Into<Again>,
    {
        self.mode(|_| Errors { judge })
    }

    /// Over a service whose errors are [`BoxError`](buttress_core::BoxError)s.
    pub fn boxed_errors(self) -> RetryBuilder<Any<Req>, Errors<AnyError<Boxed>>> {
        self.mode(|_| Errors {
            judge: AnyError::default(),
        })
    }

    /// Over a service whose errors do not implement
    /// [`std::error::Error`]: each is worth another attempt.
    pub fn opaque_errors(self) -> RetryBuilder<Any<Req>, Errors<AnyError<Opaque>>> {
        self.mode(|_| Errors {
            judge: AnyError::default(),
        })
    }

    /// Builds the layer.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if the settings make no sense, or have an
    /// [`attempt_timeout`](Settings::attempt_timeout): there is no place on a
    /// request of any kind to tell a layer further in.
    pub fn build(self) -> Result<RetryLayer<Any<Req>, Errors<W>>, ConfigError> {
        let policy = self.policy.without_attempt_timeout().build()?;
        Ok(RetryLayer {
            policy,
            mode: self.mode,
            view: PhantomData,
        })
    }
}

impl<V: View, M: fmt::Debug> fmt::Debug for RetryBuilder<V, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryBuilder")
            .field("policy", &self.policy)
            .field("mode", &self.mode)
            .finish()
    }
}
