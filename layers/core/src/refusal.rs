//! What a layer says when it does not let a request through.
//!
//! A [`Refusal`] is made by the layer that refuses, and then becomes either an
//! HTTP response, through a [`Responder`](crate::Responder), or an error: it
//! implements [`std::error::Error`], so that a service without HTTP (or a
//! client) finds it again with [`Refusal::find`], however the layers between
//! wrapped it.
//!
//! A response says less: a status, and whole seconds. A layer further out that
//! wants to know more (a retry) attaches [`Tell`] to the request, and finds the
//! refusal in the extensions of the response, with [`Refusal::of`].

use std::{borrow::Cow, fmt, time::Duration};

use http::{Extensions, StatusCode};

/// Why a request was refused.
///
/// Each kind has its HTTP status, its gRPC code and its `reason`, a word for
/// programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RefusalKind {
    /// Over a limit; it will fit later.
    RateLimited,
    /// Its cost is above what the limit can ever hold.
    NeverFits,
    /// A circuit breaker is open.
    CircuitOpen,
    /// Too much is in flight, or too many are waiting.
    Overloaded,
    /// Time ran out.
    TimedOut,
    /// The shared store is down and the rule says to deny.
    StoreUnavailable,
    /// The service is shutting down.
    Draining,
    /// A signature is missing, wrong or stale.
    Unauthenticated,
    /// The same request was accepted before, or is being served.
    Replayed,
    /// Somebody else holds the lock that it needs.
    Locked,
    /// The body is larger than allowed.
    BodyTooLarge,
    /// The request target is longer than allowed.
    UriTooLong,
    /// The header fields are larger than allowed.
    HeadersTooLarge,
    /// The request did not arrive in time.
    RequestTimeout,
    /// The request cannot be understood.
    BadRequest,
    /// Nothing is configured for this request.
    NoRoute,
    /// The callee cannot be reached, or answered nonsense.
    BadGateway,
    /// No callee is available.
    Unavailable,
    /// The request has passed here before.
    LoopDetected,
    /// What was asked for is not built in.
    NotImplemented,
    /// A fault of ours.
    Internal,
}

impl RefusalKind {
    /// Whether who refuses so has sent nothing of the request to the callee,
    /// in any case.
    #[must_use]
    pub const fn is_before_sending(self) -> bool {
        matches!(
            self,
            Self::RateLimited | Self::CircuitOpen | Self::Overloaded
        )
    }
}

/// One row for each kind: everything that a client can see of it. The prose
/// of `detail` is also baked into the static body that costs no allocation.
macro_rules! kinds {
    ($($kind:ident $status:literal $grpc:literal $reason:literal $title:literal $type:literal $detail:literal;)*) => {
        impl RefusalKind {
            /// The HTTP status.
            #[must_use]
            pub fn status(self) -> StatusCode {
                StatusCode::from_u16(match self { $(Self::$kind => $status,)* })
                    .expect("the table holds valid statuses")
            }

            /// The gRPC status code.
            #[must_use]
            pub const fn grpc_code(self) -> u8 {
                match self { $(Self::$kind => $grpc,)* }
            }

            /// A word for programs: the problem's `reason` member, and the
            /// label of metrics.
            #[must_use]
            pub const fn reason(self) -> &'static str {
                match self { $(Self::$kind => $reason,)* }
            }

            /// The problem's `title`.
            #[must_use]
            pub const fn title(self) -> &'static str {
                match self { $(Self::$kind => $title,)* }
            }

            /// The problem's `type`: registered with IANA, or `about:blank`.
            #[must_use]
            pub const fn problem_type(self) -> &'static str {
                match self { $(Self::$kind => $type,)* }
            }

            /// The `detail` that a refusal has when it is given none.
            #[must_use]
            pub const fn default_detail(self) -> &'static str {
                match self { $(Self::$kind => $detail,)* }
            }

            /// The whole problem document with the default detail.
            pub(crate) const fn default_problem(self) -> &'static str {
                match self { $(Self::$kind => concat!(
                    "{\"type\":\"", $type, "\",\"title\":\"", $title, "\",\"status\":", $status,
                    ",\"detail\":\"", $detail, "\",\"reason\":\"", $reason, "\"}"
                ),)* }
            }

            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$kind,)*];
        }
    };
}

kinds! {
    RateLimited 429 8 "rate_limited" "Too Many Requests"
        "https://iana.org/assignments/http-problem-types#quota-exceeded"
        "the quota is used up for now";
    NeverFits 403 8 "never_fits" "Forbidden" "about:blank"
        "the request costs more than its limit can ever hold";
    CircuitOpen 503 14 "circuit_open" "Service Unavailable" "about:blank"
        "the circuit breaker in front of the service is open";
    Overloaded 503 8 "overloaded" "Service Unavailable" "about:blank"
        "too many requests are waiting or in flight";
    TimedOut 504 4 "timed_out" "Gateway Timeout" "about:blank"
        "the request took too long";
    StoreUnavailable 503 14 "store_unavailable" "Service Unavailable" "about:blank"
        "the shared state cannot be reached";
    Draining 503 14 "draining" "Service Unavailable" "about:blank"
        "the service is shutting down";
    Unauthenticated 401 16 "unauthenticated" "Unauthorized" "about:blank"
        "the request could not be authenticated";
    Replayed 409 6 "replayed" "Conflict" "about:blank"
        "the request was accepted before";
    Locked 409 10 "locked" "Conflict" "about:blank"
        "the lock that the request needs is held by another one";
    BodyTooLarge 413 8 "body_too_large" "Content Too Large" "about:blank"
        "the request body is too large";
    UriTooLong 414 8 "uri_too_long" "URI Too Long" "about:blank"
        "the request target is too long";
    HeadersTooLarge 431 8 "headers_too_large" "Request Header Fields Too Large" "about:blank"
        "the request header fields are too large";
    RequestTimeout 408 4 "request_timeout" "Request Timeout" "about:blank"
        "the request took too long to arrive";
    BadRequest 400 3 "bad_request" "Bad Request" "about:blank"
        "the request cannot be understood";
    NoRoute 404 12 "no_route" "Not Found" "about:blank"
        "nothing is served here";
    BadGateway 502 14 "bad_gateway" "Bad Gateway" "about:blank"
        "the upstream cannot be reached or did not answer properly";
    Unavailable 503 14 "unavailable" "Service Unavailable" "about:blank"
        "no upstream is available";
    LoopDetected 508 14 "loop_detected" "Loop Detected" "about:blank"
        "the request has passed here before";
    NotImplemented 501 12 "not_implemented" "Not Implemented" "about:blank"
        "this is not supported";
    Internal 500 13 "internal" "Internal Server Error" "about:blank"
        "something went wrong here";
}

/// A request that was not let through: why, and when it may be tried again.
#[derive(Clone, PartialEq, Eq)]
pub struct Refusal {
    kind: RefusalKind,
    unsent: bool,
    // `retry_after` taken apart, so that the kind fits in beside it: its
    // nanoseconds are `NO_RETRY`, and its seconds 0, where there is none.
    retry_nanos: u32,
    retry_secs: u64,
    // Not with the rest: an open breaker names itself on every refusal, and
    // must not allocate for it.
    origin: Option<Cow<'static, str>>,
    // Rare, so one word for all of it: a refusal stays small.
    extra: Option<Box<Extra>>,
}

#[derive(Clone, Default, PartialEq, Eq)]
struct Extra {
    reason: Option<&'static str>,
    detail: Option<Cow<'static, str>>,
    status: Option<StatusCode>,
    members: Vec<(&'static str, serde_json::Value)>,
}

/// More nanoseconds than a second has.
const NO_RETRY: u32 = u32::MAX;

impl Refusal {
    /// A refusal of this kind, with its default detail and no `retry_after`.
    #[must_use]
    pub const fn new(kind: RefusalKind) -> Self {
        Self {
            kind,
            unsent: false,
            retry_nanos: NO_RETRY,
            retry_secs: 0,
            origin: None,
            extra: None,
        }
    }

    /// Says when the request may be tried again: not before this long.
    #[must_use]
    pub fn with_retry_after(mut self, wait: impl Into<Option<Duration>>) -> Self {
        (self.retry_secs, self.retry_nanos) = match wait.into() {
            Some(wait) => (wait.as_secs(), wait.subsec_nanos()),
            None => (0, NO_RETRY),
        };
        self
    }

    /// Says that nothing of the request was sent to the callee: no connection
    /// could be made, say. So any request may be sent again, whatever its
    /// method. Some kinds [say so](RefusalKind::is_before_sending) themselves.
    #[must_use]
    pub const fn before_sending(mut self) -> Self {
        self.unsent = true;
        self
    }

    /// Replaces the `detail`: a sentence for people. It is sent to the
    /// client, so it must hold no secret.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.extra().detail = Some(detail.into());
        self
    }

    /// Replaces the `reason`: a word for programs, finer than the kind's.
    #[must_use]
    pub fn with_reason(mut self, reason: &'static str) -> Self {
        self.extra().reason = Some(reason);
        self
    }

    /// Replaces the kind's HTTP status.
    #[must_use]
    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.extra().status = Some(status);
        self
    }

    /// Adds a member to the problem document (RFC 9457 §3.2).
    #[must_use]
    pub fn with_member(mut self, name: &'static str, value: impl Into<serde_json::Value>) -> Self {
        self.extra().members.push((name, value.into()));
        self
    }

    /// Names the instance that refused (a breaker's name, say), for the logs
    /// of this side: it shows in `Debug`, and is never sent to the client. A
    /// borrowed name costs no allocation.
    #[must_use]
    pub fn with_origin(mut self, origin: impl Into<Cow<'static, str>>) -> Self {
        self.origin = Some(origin.into());
        self
    }

    /// The refusal that `error` is, or else the first in the chain of its
    /// [`source`](std::error::Error::source)s, of which 32 are looked at.
    ///
    /// For a [`BoxError`](crate::BoxError), give `&*error`.
    #[must_use]
    pub fn find<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Self> {
        std::iter::successors(Some(error), |error| error.source())
            .take(1 + 32)
            .find_map(|error| error.downcast_ref())
    }

    /// The refusal that a response was made of, where someone further out
    /// wanted to be [told](Tell). Give the response's extensions.
    #[must_use]
    pub fn of(extensions: &Extensions) -> Option<&Self> {
        extensions.get()
    }

    fn extra(&mut self) -> &mut Extra {
        self.extra.get_or_insert_default()
    }

    /// Why.
    #[must_use]
    pub const fn kind(&self) -> RefusalKind {
        self.kind
    }

    /// How long to wait before the request may be tried again; `None` where
    /// waiting does not help or nobody can tell.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self.retry_nanos {
            NO_RETRY => None,
            nanos => Some(Duration::new(self.retry_secs, nanos)),
        }
    }

    /// Whether nothing of the request was sent to the callee: by its
    /// [kind](RefusalKind::is_before_sending), or because it
    /// [was said](Self::before_sending).
    #[must_use]
    pub const fn was_never_sent(&self) -> bool {
        self.unsent || self.kind.is_before_sending()
    }

    /// [`retry_after`](Self::retry_after) in whole seconds as `Retry-After`
    /// carries them: rounded up, at least 1, so that a client that waits them
    /// has waited long enough.
    #[must_use]
    pub fn retry_after_secs(&self) -> Option<u64> {
        self.retry_after().map(|wait| {
            let up = u64::from(wait.subsec_nanos() > 0);
            wait.as_secs().saturating_add(up).max(1)
        })
    }

    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.extra
            .as_ref()
            .and_then(|extra| extra.status)
            .unwrap_or_else(|| self.kind.status())
    }

    /// A word for programs.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.extra
            .as_ref()
            .and_then(|extra| extra.reason)
            .unwrap_or_else(|| self.kind.reason())
    }

    /// The instance that refused, if it has a name.
    #[must_use]
    pub fn origin(&self) -> Option<&str> {
        self.origin.as_deref()
    }

    /// A sentence for people.
    #[must_use]
    pub fn detail(&self) -> &str {
        self.extra
            .as_ref()
            .and_then(|extra| extra.detail.as_deref())
            .unwrap_or_else(|| self.kind.default_detail())
    }

    /// The members added to the problem document.
    pub fn members(&self) -> impl Iterator<Item = (&'static str, &serde_json::Value)> {
        self.extra
            .iter()
            .flat_map(|extra| extra.members.iter().map(|(name, value)| (*name, value)))
    }

    /// Whether the document of its kind says all that a client is told.
    pub(crate) const fn is_plain(&self) -> bool {
        self.extra.is_none()
    }
}

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Refusal");
        debug.field("kind", &self.kind);
        if let Some(origin) = self.origin() {
            debug.field("origin", &origin);
        }
        if self.was_never_sent() {
            debug.field("was_never_sent", &true);
        }
        debug
            .field("retry_after", &self.retry_after())
            .field("detail", &self.detail())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.detail())?;
        match self.retry_after() {
            Some(wait) => write!(f, " (retry after {wait:?})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {}

impl From<RefusalKind> for Refusal {
    fn from(kind: RefusalKind) -> Self {
        Self::new(kind)
    }
}

/// Asks whoever refuses a request over HTTP to tell why, as errors do: put
/// into the request's extensions by a layer further out, it has the [`Refusal`]
/// attached to the response's. Nothing of either is sent.
///
/// [`SharedResponder`](crate::respond::SharedResponder) does as it asks, whoever
/// wrote the responder, and with it all layers that refuse; a response that has
/// not been refused, or not here, has none. Not asked, it costs nothing.
///
/// ```
/// use std::time::Duration;
/// use buttress_core::{
///     Head, Refusal, RefusalKind,
///     refusal::Tell,
///     respond::SharedResponder,
/// };
/// use http::Request;
///
/// let responder = SharedResponder::default();
/// let refusal =
///     Refusal::new(RefusalKind::RateLimited).with_retry_after(Duration::from_millis(1200));
///
/// let mut request = Request::new(());
/// let response = responder.respond(&refusal, Head::from(&request));
/// assert_eq!(Refusal::of(response.extensions()), None);
///
/// Tell::attach(request.extensions_mut());
/// let response = responder.respond(&refusal, Head::from(&request));
/// assert_eq!(response.headers()["retry-after"], "2");
/// assert_eq!(Refusal::of(response.extensions()), Some(&refusal));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tell(());

impl Tell {
    /// Asks it of those that the request comes to.
    ///
    /// The first extension of a request allocates, this one itself does not:
    /// attach it where there are others.
    pub fn attach(extensions: &mut Extensions) {
        extensions.insert(Self(()));
    }

    /// Whether it was asked.
    #[must_use]
    pub fn is_in(extensions: &Extensions) -> bool {
        extensions.get::<Self>().is_some()
    }
}

/// An error that a layer further out can look into, to see what it is.
///
/// All that implement [`std::error::Error`] can be. The error types of the
/// layers do not, so that they can become a [`BoxError`](crate::BoxError), and
/// say it here.
pub trait Inspect {
    /// The error, with its chain of sources.
    fn error(&self) -> Option<&(dyn std::error::Error + 'static)>;

    /// The refusal that it is, where that is not in the chain.
    fn refusal(&self) -> Option<Refusal> {
        None
    }
}

impl<E: std::error::Error + 'static> Inspect for E {
    fn error(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Head, ProblemResponder, Responder};

    #[test]
    fn it_is_small_and_found_again() {
        assert!(size_of::<Refusal>() <= 48);
        let error: crate::BoxError = Refusal::new(RefusalKind::RateLimited)
            .with_retry_after(Duration::from_millis(1500))
            .into();
        let refusal = error.downcast_ref::<Refusal>().unwrap();
        assert_eq!(refusal.retry_after_secs(), Some(2));
        assert_eq!(
            error.to_string(),
            "the quota is used up for now (retry after 1.5s)"
        );
    }

    #[test]
    fn retry_after_is_at_least_a_second_and_rounded_up() {
        let secs = |wait| {
            Refusal::new(RefusalKind::RateLimited)
                .with_retry_after(wait)
                .retry_after_secs()
                .unwrap()
        };
        assert_eq!(secs(Duration::ZERO), 1);
        assert_eq!(secs(Duration::from_nanos(1)), 1);
        assert_eq!(secs(Duration::from_secs(1)), 1);
        assert_eq!(secs(Duration::from_nanos(1_000_000_001)), 2);
        assert_eq!(secs(Duration::MAX), u64::MAX);

        let none = Refusal::new(RefusalKind::RateLimited);
        for wait in [Duration::ZERO, Duration::new(1, 999_999_999), Duration::MAX] {
            let some = none.clone().with_retry_after(wait);
            assert_eq!(some.retry_after(), Some(wait));
            assert_ne!(some, none);
            assert_eq!(some.with_retry_after(None), none);
        }
        assert_eq!(none.retry_after(), None);
    }

    #[test]
    fn its_origin_is_for_logs_alone() {
        let plain = Refusal::new(RefusalKind::CircuitOpen);
        assert_eq!(plain.origin(), None);
        let named = plain.clone().with_origin("billing");
        assert_eq!(named.origin(), Some("billing"));
        assert_eq!(named, plain.clone().with_origin("billing".to_owned()));
        assert!(format!("{named:?}").contains("origin: \"billing\""));
        assert!(!format!("{plain:?}").contains("origin"));

        // And the document stays the one that costs no allocation.
        assert!(named.is_plain());
        assert_eq!(named.to_string(), plain.to_string());
        let request = http::Request::new(());
        for refusal in [named.clone(), named.with_detail("not now")] {
            let response = ProblemResponder.respond(&refusal, Head::from(&request));
            assert!(!format!("{response:?}").contains("billing"));
        }
    }

    #[test]
    fn it_says_whether_anything_was_sent() {
        for &kind in RefusalKind::ALL {
            let refusal = Refusal::new(kind);
            let by_kind = matches!(
                kind,
                RefusalKind::RateLimited | RefusalKind::CircuitOpen | RefusalKind::Overloaded
            );
            assert_eq!(refusal.was_never_sent(), by_kind, "{kind:?}");
            let said = format!("{refusal:?}").contains("was_never_sent: true");
            assert_eq!(said, by_kind);
            assert!(refusal.before_sending().was_never_sent());
        }
        // The document stays the one that costs no allocation.
        assert!(
            Refusal::new(RefusalKind::BadGateway)
                .before_sending()
                .is_plain()
        );
    }

    /// An error that was caused by another, or by itself.
    #[derive(Debug)]
    struct Wrapped(Option<crate::BoxError>);

    impl fmt::Display for Wrapped {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("wrapped")
        }
    }

    impl std::error::Error for Wrapped {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            match &self.0 {
                Some(cause) => Some(&**cause),
                None => Some(self),
            }
        }
    }

    fn wrapped(cause: impl Into<crate::BoxError>, times: usize) -> crate::BoxError {
        (0..times).fold(cause.into(), |cause, _| Wrapped(Some(cause)).into())
    }

    #[test]
    fn it_is_found_wherever_it_is_wrapped() {
        let refusal = Refusal::new(RefusalKind::CircuitOpen);
        for times in [0, 1, 2, 32] {
            let error = wrapped(refusal.clone(), times);
            assert_eq!(Refusal::find(&*error), Some(&refusal), "{times}");
        }
        let inner = refusal.clone().with_origin("inner");
        let error = wrapped(inner.clone(), 3);
        assert_eq!(Refusal::find(&*error), Some(&inner));
        assert_eq!(Refusal::find(&*wrapped("io", 3)), None);
        // Not for ever.
        assert_eq!(Refusal::find(&*wrapped(refusal, 33)), None);
        assert_eq!(Refusal::find(&Wrapped(None)), None);
    }

    #[test]
    fn every_kind_has_a_sound_document() {
        for kind in RefusalKind::ALL {
            let problem: serde_json::Value = serde_json::from_str(kind.default_problem()).unwrap();
            assert_eq!(problem["status"], kind.status().as_u16());
            assert_eq!(problem["reason"], kind.reason());
            assert_eq!(problem["title"], kind.title());
            assert!(kind.grpc_code() <= 16);
        }
    }
}
