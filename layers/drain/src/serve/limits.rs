//! How long, how many and how much: what a connection may take.

use std::time::Duration;

use crate::{ConfigError, error::Problem};

const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// What hyper asks for at least.
const SMALLEST_BUFFER: usize = 8192;
/// How far the age of a connection is off, so that those that came together do
/// not leave together.
const JITTER: f64 = 0.1;

/// What a connection may take, so that a client that sends no requests, or
/// takes no answers, holds neither a drain nor a place. Cheap to copy; the
/// [crate's front page](crate) has the table of defaults.
///
/// None of them is of a request's body, which goes to the service as hyper has
/// it: a handler that waits for bytes that never come holds its place, and a
/// drain until the cut. What a client may take for the next piece is tower-http's
/// `RequestBodyTimeoutLayer` to say (its feature `timeout`), on the routes that
/// take bodies; the [crate's front page](crate) shows what comes of it. The
/// timeout layer limits all that a handler takes, a long poll too.
///
/// ```
/// use std::time::Duration;
/// use axum::{Router, routing::post};
/// use buttress_drain::Limits;
/// use bytes::Bytes;
/// use tower_http::timeout::RequestBodyTimeoutLayer;
///
/// let app: Router = Router::new()
///     .route("/uploads", post(async |body: Bytes| body.len().to_string()))
///     .layer(RequestBodyTimeoutLayer::new(Duration::from_secs(60)));
/// let limits = Limits::builder()
///     .header_timeout(Duration::from_secs(5))
///     .max_connections(500)
///     .build()?;
/// # let _ = (app, limits);
/// # Ok::<(), buttress_drain::ConfigError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    pub(crate) first_byte_grace: Duration,
    pub(crate) handshake_timeout: Duration,
    pub(crate) header_timeout: Duration,
    pub(crate) idle_timeout: Duration,
    pub(crate) write_timeout: Option<Duration>,
    pub(crate) linger: Duration,
    pub(crate) max_age: Option<Duration>,
    pub(crate) max_connections: usize,
    pub(crate) max_headers: usize,
    pub(crate) max_header_bytes: u32,
    pub(crate) max_buffer: usize,
    pub(crate) max_concurrent_streams: u32,
    pub(crate) keep_alive_interval: Option<Duration>,
    pub(crate) keep_alive_timeout: Duration,
}

impl Limits {
    const DEFAULT: Self = Self {
        first_byte_grace: Duration::from_secs(1),
        handshake_timeout: Duration::from_secs(10),
        header_timeout: Duration::from_secs(10),
        idle_timeout: Duration::from_secs(75),
        write_timeout: Some(Duration::from_secs(60)),
        linger: Duration::from_millis(500),
        max_age: None,
        max_connections: 10_000,
        max_headers: DEFAULT_HEADERS,
        max_header_bytes: 64 * 1024,
        max_buffer: 400 * 1024,
        max_concurrent_streams: 200,
        keep_alive_interval: Some(Duration::from_secs(30)),
        keep_alive_timeout: Duration::from_secs(10),
    };

    /// Starts with the defaults.
    pub const fn builder() -> LimitsBuilder {
        LimitsBuilder {
            limits: Self::DEFAULT,
        }
    }

    /// How long this connection may live.
    pub(crate) fn age(&self) -> Option<Duration> {
        let off = JITTER * fastrand::f64().mul_add(2.0, -1.0);
        Some(self.max_age?.mul_f64(1.0 + off))
    }
}

/// hyper's own; any other number costs an allocation for each request.
pub(crate) const DEFAULT_HEADERS: usize = 100;

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Builds [`Limits`].
#[derive(Clone, Debug)]
#[must_use = "there are no limits before `build()`"]
pub struct LimitsBuilder {
    limits: Limits,
}

impl LimitsBuilder {
    /// Once listeners close: how long a connection that has sent nothing yet
    /// may still take for its first byte. Default 1 s.
    pub const fn first_byte_grace(mut self, grace: Duration) -> Self {
        self.limits.first_byte_grace = grace;
        self
    }

    /// How long a TLS handshake may take. Above 0, at most a day. Default 10 s.
    pub const fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.limits.handshake_timeout = timeout;
        self
    }

    /// How long a request's head may take from its first byte to its last,
    /// however steadily it trickles in (by TLS: from its first bytes that do not
    /// come with the request before it); and a connection over HTTP/2 to close
    /// when it was told to and has no request; streams that its client opens
    /// later than so are refused. Above 0, at most a day. Default 10 s.
    pub const fn header_timeout(mut self, timeout: Duration) -> Self {
        self.limits.header_timeout = timeout;
        self
    }

    /// How long a connection is kept without a request. It should be longer
    /// than that of a balancer before it (60 s are common), which would else
    /// send a request as this end closes. Above 0, at most a day. Default 75 s.
    pub const fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.limits.idle_timeout = timeout;
        self
    }

    /// How long a client may take nothing of what is sent to it, not one byte,
    /// before its connection is dropped; not of upgraded ones. Over HTTP/2 that
    /// is a client, too, that opens no window for an answer and takes nothing of
    /// any other: on a [`Server`](crate::Server), which is twice as long about
    /// it at most. Above 0, at most a day. Default 60 s.
    pub fn write_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.limits.write_timeout = timeout.into();
        self
    }

    /// How long a connection that this end has closed is still read from, for
    /// the other to close it too: closed at once, it would be reset where a
    /// request crosses the close. At most a day. Default 500 ms.
    pub const fn linger(mut self, linger: Duration) -> Self {
        self.limits.linger = linger;
        self
    }

    /// After how long, give or take 10 %, a connection is asked to go: by a
    /// GOAWAY, or `Connection: close` on its next answer. Above 0, at most a
    /// day. Default: never.
    pub fn max_age(mut self, age: impl Into<Option<Duration>>) -> Self {
        self.limits.max_age = age.into();
        self
    }

    /// How many connections there may be on one listener: no more are accepted
    /// until one is gone, and wait in the backlog. Only what waits there when
    /// the listener closes is accepted beyond it. Above 0. Default 10 000.
    pub const fn max_connections(mut self, max: usize) -> Self {
        self.limits.max_connections = max;
        self
    }

    /// How many header fields an HTTP/1 request may have, before it is answered
    /// with 431. Any other number than the default costs an allocation for each
    /// request. Above 0. Default 100.
    pub const fn max_headers(mut self, max: usize) -> Self {
        self.limits.max_headers = max;
        self
    }

    /// How long a request's head may be in bytes, before it is answered with
    /// 431. Above 0. Default 64 KiB.
    pub const fn max_header_bytes(mut self, max: u32) -> Self {
        self.limits.max_header_bytes = max;
        self
    }

    /// How large the buffers of an HTTP/1 connection may grow, in bytes; at
    /// least 8 KiB. Default 400 KiB.
    pub const fn max_buffer(mut self, max: usize) -> Self {
        self.limits.max_buffer = max;
        self
    }

    /// How many requests a connection over HTTP/2 may have at a time. Above 0.
    /// Default 200.
    pub const fn max_concurrent_streams(mut self, max: u32) -> Self {
        self.limits.max_concurrent_streams = max;
        self
    }

    /// How often a silent peer is pinged over HTTP/2, to tell whether it is
    /// still there. Above 0, at most a day. Default 30 s.
    pub fn keep_alive_interval(mut self, interval: impl Into<Option<Duration>>) -> Self {
        self.limits.keep_alive_interval = interval.into();
        self
    }

    /// How long it may take to answer such a ping, before its connection is
    /// dropped. Above 0, at most a day. Default 10 s.
    pub const fn keep_alive_timeout(mut self, timeout: Duration) -> Self {
        self.limits.keep_alive_timeout = timeout;
        self
    }

    /// Checks the limits.
    ///
    /// # Errors
    ///
    /// What is wrong with them: see [`ConfigError`].
    pub fn build(self) -> Result<Limits, ConfigError> {
        let limits = self.limits;
        let wrong = |told| Err(Problem::Limit(told).into());
        let bad = |span: Duration| span.is_zero() || span > LONGEST;
        for (span, told) in [
            (
                Some(limits.handshake_timeout),
                "the handshake timeout must be above 0 and at most a day",
            ),
            (
                Some(limits.header_timeout),
                "the header timeout must be above 0 and at most a day",
            ),
            (
                Some(limits.idle_timeout),
                "the idle timeout must be above 0 and at most a day",
            ),
            (
                limits.write_timeout,
                "the write timeout must be above 0 and at most a day",
            ),
            (
                limits.max_age,
                "the age of connections must be above 0 and at most a day",
            ),
            (
                limits.keep_alive_interval,
                "the keep-alive interval must be above 0 and at most a day",
            ),
            (
                Some(limits.keep_alive_timeout),
                "the keep-alive timeout must be above 0 and at most a day",
            ),
        ] {
            if span.is_some_and(bad) {
                return wrong(told);
            }
        }
        if limits.first_byte_grace > LONGEST {
            return wrong("the first byte's grace must be at most a day");
        }
        if limits.linger > LONGEST {
            return wrong("the linger must be at most a day");
        }
        for (number, told) in [
            (limits.max_connections, "there must be room for connections"),
            (limits.max_headers, "there must be room for header fields"),
            (
                limits.max_header_bytes as usize,
                "there must be room for a head",
            ),
            (
                limits.max_concurrent_streams as usize,
                "there must be room for streams",
            ),
        ] {
            if number == 0 {
                return wrong(told);
            }
        }
        if limits.max_buffer < SMALLEST_BUFFER {
            return wrong("buffers must be at least 8 KiB");
        }
        Ok(limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_named() {
        type Set = fn(LimitsBuilder) -> LimitsBuilder;
        let zero = Duration::ZERO;
        let told = |builder: LimitsBuilder| builder.build().unwrap_err().to_string();
        let cases: [(Set, &str); 12] = [
            (|b| b.handshake_timeout(Duration::ZERO), "handshake"),
            (|b| b.header_timeout(Duration::MAX), "header"),
            (|b| b.idle_timeout(Duration::ZERO), "idle"),
            (|b| b.write_timeout(Duration::ZERO), "write"),
            (|b| b.max_age(Duration::ZERO), "age"),
            (|b| b.keep_alive_interval(Duration::MAX), "interval"),
            (|b| b.keep_alive_timeout(Duration::ZERO), "keep-alive"),
            (|b| b.first_byte_grace(Duration::MAX), "grace"),
            (|b| b.linger(Duration::MAX), "linger"),
            (|b| b.max_connections(0), "connections"),
            (|b| b.max_concurrent_streams(0), "streams"),
            (|b| b.max_buffer(8191), "8 KiB"),
        ];
        for (set, part) in cases {
            let told = told(set(Limits::builder()));
            assert!(told.contains(part), "{told}");
        }
        for builder in [
            Limits::builder().max_headers(0),
            Limits::builder().max_header_bytes(0),
        ] {
            assert!(told(builder).contains("room"));
        }
        assert_eq!(Limits::builder().build(), Ok(Limits::default()));
        let off = Limits::builder()
            .write_timeout(None)
            .max_age(None)
            .keep_alive_interval(None)
            .linger(zero)
            .first_byte_grace(zero);
        assert!(off.build().is_ok());
    }

    #[test]
    fn ages_differ_by_a_tenth_at_most() {
        let secs = Duration::from_secs;
        let limits = Limits::builder().max_age(secs(100)).build().unwrap();
        let ages: Vec<_> = (0..200).filter_map(|_| limits.age()).collect();
        assert!(ages.iter().all(|age| (secs(90)..=secs(110)).contains(age)));
        assert!(ages.iter().any(|age| *age < secs(97)));
        assert!(ages.iter().any(|age| *age > secs(103)));
    }
}
