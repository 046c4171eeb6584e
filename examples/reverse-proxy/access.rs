//! The access log: one line for each request, written when its response body
//! has ended, and the metrics that go with it.
//!
//! The [`Line`] travels: with the request's future, then inside the response's
//! body (or the tunnel that an upgrade leaves), and is written when it is
//! dropped. So a client that goes away is logged, too, whenever it goes.

use std::{
    mem,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use buttress::{
    body::{BodyEnd, BodyGuard},
    clock::{self, Instant},
};
use http::{HeaderValue, Method};
use metrics::{Counter, Histogram, Unit};

use crate::{balance::Tried, forward::Tunnel, upstream::Endpoint};

/// Names of the proxy's own metrics.
mod names {
    pub(super) const REQUESTS: &str = "proxy_requests_total";
    pub(super) const DURATION: &str = "proxy_request_duration_seconds";
}

/// The status of a request that its client gave up before there was one, as
/// nginx logs it.
const CLIENT_GONE: u16 = 499;

/// What is learned about a request while it is served.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    /// How often it was sent upstream.
    pub(crate) attempts: AtomicU32,
    /// The `traceparent` that was made for it: one for all attempts.
    pub(crate) traceparent: OnceLock<HeaderValue>,
    last: Mutex<Last>,
    /// Where it has been in vain.
    tried: Mutex<Tried>,
    /// What an upgrade leaves to be done once the 101 is on its way.
    tunnel: Mutex<Option<Tunnel>>,
}

/// What is known of the last attempt.
#[derive(Debug, Default)]
struct Last {
    upstream: Option<Arc<str>>,
    /// What went wrong, for the operator; the client is told less.
    error: Option<String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Facts {
    /// Another attempt begins: where it has been so far.
    pub(crate) fn begin(&self) -> Tried {
        lock(&self.last).error = None;
        mem::take(&mut *lock(&self.tried))
    }

    /// The attempt has ended here.
    pub(crate) fn ended(&self, mut tried: Tried, endpoint: &Arc<Endpoint>) {
        lock(&self.last).upstream = Some(Arc::clone(&endpoint.url));
        tried.ended(endpoint);
        *lock(&self.tried) = tried;
    }

    /// What went wrong: only the first word on an attempt counts.
    pub(crate) fn failed(&self, error: impl Into<String>) {
        lock(&self.last).error.get_or_insert(error.into());
    }

    pub(crate) fn set_tunnel(&self, tunnel: Tunnel) {
        *lock(&self.tunnel) = Some(tunnel);
    }

    pub(crate) fn take_tunnel(&self) -> Option<Tunnel> {
        lock(&self.tunnel).take()
    }
}

/// A line of the access log.
pub(crate) struct Line {
    pub(crate) facts: Arc<Facts>,
    pub(crate) status: u16,
    pub(crate) route: Arc<str>,
    meters: Arc<Meters>,
    started: Instant,
    method: Method,
    path: Box<str>,
    request_id: HeaderValue,
    bytes: u64,
}

impl Line {
    pub(crate) fn new(
        head: &http::request::Parts,
        request_id: HeaderValue,
        (route, meters): (Arc<str>, Arc<Meters>),
    ) -> Self {
        Self {
            facts: Arc::default(),
            status: CLIENT_GONE,
            route,
            meters,
            started: clock::now(),
            method: head.method.clone(),
            path: head.uri.path().into(),
            request_id,
            bytes: 0,
        }
    }

    /// Bytes that went to the client after the head, where no body counts them.
    pub(crate) fn add_bytes(&mut self, bytes: u64) {
        self.bytes += bytes;
    }
}

impl BodyGuard for Line {
    fn ended(mut self, end: BodyEnd<'_>, bytes: u64) {
        self.bytes = bytes;
        if matches!(end, BodyEnd::Failed) {
            // The status was sent long ago, and knows nothing of it.
            self.facts.failed("the response broke off");
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let took = clock::now() - self.started;
        let last = lock(&self.facts.last);
        self.meters.duration.record(took);
        self.meters.by_class[usize::from(self.status / 100).clamp(1, 5) - 1].increment(1);
        tracing::info!(
            target: "access",
            method = self.method.as_str(),
            path = &*self.path,
            status = self.status,
            bytes = self.bytes,
            duration_ms = took.as_micros() as f64 / 1000.0,
            route = &*self.route,
            upstream = last.upstream.as_deref().unwrap_or_default(),
            attempts = self.facts.attempts.load(Ordering::Relaxed),
            request_id = self.request_id.to_str().unwrap_or_default(),
            error = last.error.as_deref(),
            "request",
        );
    }
}

/// A route's metrics, looked up once and not for each request.
pub(crate) struct Meters {
    by_class: [Counter; 5],
    duration: Histogram,
}

impl Meters {
    pub(crate) fn new(route: &str) -> Arc<Self> {
        metrics::describe_counter!(
            names::REQUESTS,
            "Requests answered, by route and class of status"
        );
        metrics::describe_histogram!(
            names::DURATION,
            Unit::Seconds,
            "From a request's head to its response's end"
        );
        let counter = |class: &'static str| metrics::counter!(names::REQUESTS, "route" => route.to_owned(), "class" => class);
        Arc::new(Self {
            by_class: ["1xx", "2xx", "3xx", "4xx", "5xx"].map(counter),
            duration: metrics::histogram!(names::DURATION, "route" => route.to_owned()),
        })
    }
}
