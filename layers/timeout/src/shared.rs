//! What a layer, its services and their calls have in common.

use std::{
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use buttress_core::{
    Head, Refusal, classify::HttpClassifier, clock, deadline::Deadline, label,
    respond::SharedResponder,
};
use bytes::Bytes;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Response};
use tracing::debug;

use crate::{
    ConfigError, Elapsed,
    error::Problem,
    metrics::Metrics,
    wire::{self, Text},
};

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// What the types of a layer say, of which there are no values.
pub(crate) type Kind<V, M, X> = PhantomData<fn() -> (V, M, X)>;

pub(crate) struct Shared {
    name: Arc<str>,
    /// In nanoseconds; 0 where there is none.
    limit: AtomicU64,
    pub(crate) wire: Wire,
    /// Whether a deadline is attached where there was none.
    attach: bool,
    pub(crate) streaming: HttpClassifier,
    responder: SharedResponder,
    metrics: Metrics,
}

/// What is read from requests and written into them.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    pub(crate) adopt: bool,
    pub(crate) grpc_timeout: bool,
    pub(crate) header: Option<HeaderName>,
}

/// Until when a call that comes now may last.
pub(crate) enum Due {
    Whenever,
    /// It is too late already.
    Past,
    At(Deadline, Duration),
}

/// What had not come when time was up.
#[derive(Clone, Copy)]
pub(crate) enum Stage {
    /// The call itself: it was too late for it.
    Call,
    Response,
    /// The end of the response's body.
    Body,
}

impl Stage {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Call => "call",
            Self::Response => "response",
            Self::Body => "body",
        }
    }
}

/// A limit, as the atomic holds it.
fn nanos(limit: Option<Duration>) -> Result<u64, ConfigError> {
    match limit {
        None => Ok(0),
        Some(limit) if limit.is_zero() || limit > LONGEST => Err(Problem::Limit.into()),
        Some(limit) => u64::try_from(limit.as_nanos()).map_err(|_| Problem::Limit.into()),
    }
}

impl Shared {
    pub(crate) fn new(
        name: Arc<str>,
        limit: Option<Duration>,
        wire: Wire,
        attach: bool,
        streaming: HttpClassifier,
        responder: SharedResponder,
    ) -> Result<Self, ConfigError> {
        if !label::is_sound(&name, 128) {
            return Err(Problem::Name.into());
        }
        let limit = AtomicU64::new(nanos(limit)?);
        // Its first reading takes a while.
        let _ = clock::now();
        Ok(Self {
            metrics: Metrics::new(&name),
            name,
            limit,
            wire,
            attach,
            streaming,
            responder,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn limit(&self) -> Option<Duration> {
        match self.limit.load(Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    pub(crate) fn set_limit(&self, limit: Option<Duration>) -> Result<(), ConfigError> {
        self.limit.store(nanos(limit)?, Relaxed);
        Ok(())
    }

    /// The nearest of all: the limit's, the one attached, the caller's.
    #[inline]
    pub(crate) fn due(&self, attached: Option<Deadline>, adopted: Option<Duration>) -> Due {
        let span = match (self.limit(), adopted) {
            (Some(limit), Some(adopted)) => Some(limit.min(adopted)),
            (limit, adopted) => limit.or(adopted),
        };
        if span.is_none() && attached.is_none() {
            return Due::Whenever;
        }
        let now = clock::now();
        let spanned = span.map(|span| Deadline::at(now + span));
        let deadline = match (spanned, attached) {
            (Some(spanned), Some(attached)) => spanned.earliest(attached),
            (Some(deadline), None) | (None, Some(deadline)) => deadline,
            (None, None) => return Due::Whenever,
        };
        match deadline.remaining(now) {
            Duration::ZERO => Due::Past,
            left => Due::At(deadline, left),
        }
    }

    /// The same for a request over HTTP.
    #[inline]
    pub(crate) fn due_of(&self, request: Head<'_>) -> Due {
        let adopted = match self.wire.adopt {
            true => self.adopted(request),
            false => None,
        };
        self.due(Deadline::of(request.extensions), adopted)
    }

    fn adopted(&self, request: Head<'_>) -> Option<Duration> {
        let grpc = match request.is_grpc() {
            true => smallest(request.headers, &GRPC_TIMEOUT, wire::read_grpc),
            false => None,
        };
        let header = self.wire.header.as_ref();
        let header = header.and_then(|name| smallest(request.headers, name, wire::read_millis));
        [grpc, header].into_iter().flatten().min()
    }

    /// Tells layers further in until when; no later than they were told before,
    /// since that went into what is due.
    pub(crate) fn tell_layers(&self, extensions: &mut Extensions, deadline: Deadline) {
        if let Some(there) = extensions.get_mut::<Deadline>() {
            *there = deadline;
        } else if self.attach {
            extensions.insert(deadline);
        }
    }

    /// Tells upstreams how long.
    pub(crate) fn tell_upstream(&self, headers: &mut HeaderMap, grpc: bool, left: Duration) {
        if grpc && self.wire.grpc_timeout {
            write(
                headers,
                &GRPC_TIMEOUT,
                left,
                wire::read_grpc,
                wire::write_grpc,
            );
        }
        if let Some(header) = &self.wire.header {
            write(headers, header, left, wire::read_millis, wire::write_millis);
        }
    }

    /// Counts it and tells of it.
    #[cold]
    pub(crate) fn elapsed(&self, after: Duration, stage: Stage) -> Elapsed {
        self.metrics.timed_out();
        debug!(
            name = &*self.name,
            stage = stage.as_str(),
            after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
            "timed out"
        );
        Elapsed::new(Arc::clone(&self.name), after)
    }

    pub(crate) fn responder(&self) -> &SharedResponder {
        &self.responder
    }

    #[cold]
    pub(crate) fn respond(&self, elapsed: Elapsed, request: Head<'_>) -> Response<Bytes> {
        self.responder.respond(&Refusal::from(elapsed), request)
    }
}

/// Of a field that came several times, the one that says the least.
fn smallest(
    headers: &HeaderMap,
    name: &HeaderName,
    read: fn(&[u8]) -> Option<Duration>,
) -> Option<Duration> {
    let values = headers.get_all(name).iter();
    values.filter_map(|value| read(value.as_bytes())).min()
}

/// Says what is left, unless what is there says less.
fn write(
    headers: &mut HeaderMap,
    name: &HeaderName,
    left: Duration,
    read: fn(&[u8]) -> Option<Duration>,
    write: fn(Duration) -> Text,
) {
    let there = smallest(headers, name, read);
    if there.is_some_and(|there| there <= left) && headers.get_all(name).iter().count() == 1 {
        return;
    }
    let left = there.map_or(left, |there| there.min(left));
    let value = HeaderValue::from_bytes(write(left).as_bytes()).expect("ASCII is a valid value");
    headers.insert(name, value);
}
