//! What is measured: ours and the peers', each as a closure that makes as many
//! calls as it is told. The timings, the counts of allocations and the counts
//! of instructions all use these.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};

use axum::{body::Body, extract::ConnectInfo};
use buttress_core::{
    Any, Head,
    key::{ClientIp, ExtractKey, Key, PeerAddr},
};
use buttress_rate_limit::{HeaderFormat, Limit, Quota, RateLimitLayer};
use governor::{DefaultKeyedRateLimiter, RateLimiter};
use http::{Request, Response};
use tower::{Layer, Service, service_fn};
use tower_governor::{
    GovernorError, GovernorLayer, governor::GovernorConfigBuilder, key_extractor::KeyExtractor,
    key_extractor::PeerIpKeyExtractor,
};
use tower_rate_tier::{RateTier, TierIdentity, TierLimitLayer};

use crate::measure::{Run, drive};

/// Numbers below `count` in no order a cache could guess.
#[derive(Clone, Debug)]
pub struct Shuffled {
    state: u64,
    count: u64,
}

impl Shuffled {
    /// Numbers below `count`.
    #[must_use]
    pub fn below(count: u64) -> Self {
        Self { state: 1, count }
    }

    /// The next.
    #[inline]
    pub fn draw(&mut self) -> u64 {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.state >> 32) * self.count) >> 32
    }
}

/// A key that both sides can be asked by.
pub trait Number: Copy + Send + Sync + std::hash::Hash + Eq + Into<Key> + 'static {
    /// The `n`th of them.
    fn nth(n: u64) -> Self;
}

impl Number for u64 {
    #[inline]
    fn nth(n: u64) -> Self {
        n
    }
}

impl Number for IpAddr {
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are no more addresses"
    )]
    fn nth(n: u64) -> Self {
        Ipv4Addr::from_bits(0x0A00_0000 | n as u32).into()
    }
}

/// Our decision for a key, its clock reading included: through the service of
/// a layer over no service at all.
#[must_use]
pub fn ours_by_key<K: Number>(
    quota: Quota,
    max_keys: usize,
) -> impl Service<K, Error = buttress_core::BoxError, Response = ()> + Clone + Send {
    let limit = Limit::any(quota)
        .key(|key: &K| Some((*key).into()))
        .max_keys(max_keys);
    let layer = RateLimitLayer::any()
        .limit(limit)
        .build()
        .expect("the quota is sound");
    layer.layer(service_fn(|_: K| ready(Ok::<(), Infallible>(()))))
}

/// governor's, with its default store, hash and clock.
#[must_use]
pub fn governor_by_key<K: Number>(quota: governor::Quota) -> Arc<DefaultKeyedRateLimiter<K>> {
    Arc::new(RateLimiter::keyed(quota))
}

/// A quota for each side under which a key that is asked for every now and
/// then stays in debt, and never uses up its burst. One key alone is asked for
/// so often that its debt must be small, or it would be longer than a clock.
///
/// # Panics
///
/// Never: it is sound.
#[must_use]
pub fn lasting(keys: u64) -> (Quota, governor::Quota) {
    let (secs, burst) = if keys == 1 {
        (1, const { NonZeroU32::new(200_000_000).unwrap() })
    } else {
        (100, const { NonZeroU32::new(2_000_000).unwrap() })
    };
    let period = Duration::from_secs(secs);
    (
        Quota::new(1, period).burst(burst.get()),
        governor::Quota::with_period(period)
            .expect("not zero")
            .allow_burst(burst),
    )
}

/// Decisions on `count` keys, all of them known.
#[must_use]
pub fn our_decisions<K: Number>(count: u64) -> Run {
    let limit = Limit::any(lasting(count).0).max_keys(1_000_000);
    let layer: RateLimitLayer<Any<()>, _> = RateLimitLayer::any()
        .limit(limit)
        .build()
        .expect("the quota is sound");
    let limit = layer.handle().limit("default").expect("it has that one");
    for n in 0..count {
        limit
            .check(&K::nth(n).into())
            .expect("the quota is endless");
    }
    let mut keys = Shuffled::below(count);
    Box::new(move |calls| {
        for _ in 0..calls {
            let passed = limit.check(&black_box(K::nth(keys.draw())).into());
            passed.expect("the quota is endless");
        }
    })
}

/// The same as a service over requests that are their own keys.
#[must_use]
pub fn our_service_decisions<K: Number>(count: u64) -> Run {
    let mut service = ours_by_key::<K>(lasting(count).0, 1_000_000);
    for n in 0..count {
        drive(&mut service, K::nth(n)).expect("the quota is endless");
    }
    let mut keys = Shuffled::below(count);
    Box::new(move |calls| {
        for _ in 0..calls {
            let passed = drive(&mut service, black_box(K::nth(keys.draw())));
            passed.expect("the quota is endless");
        }
    })
}

/// The same by governor.
#[must_use]
pub fn governor_decisions<K: Number>(count: u64) -> Run {
    let limiter = governor_by_key::<K>(lasting(count).1);
    for n in 0..count {
        limiter.check_key(&K::nth(n)).expect("the quota is endless");
    }
    let mut keys = Shuffled::below(count);
    Box::new(move |calls| {
        for _ in 0..calls {
            let passed = limiter.check_key(&black_box(K::nth(keys.draw())));
            passed.expect("the quota is endless");
        }
    })
}

/// What the loop costs.
#[must_use]
pub fn the_loop() -> Run {
    let mut keys = Shuffled::below(10_000);
    Box::new(move |calls| {
        for _ in 0..calls {
            black_box(keys.draw());
        }
    })
}

/// What the loop and the service cost without a decision.
#[must_use]
pub fn no_decisions() -> Run {
    let mut service = service_fn(|_: u64| ready(Ok::<(), Infallible>(())));
    let mut keys = Shuffled::below(10_000);
    Box::new(move |calls| {
        for _ in 0..calls {
            let Ok(()) = drive(&mut service, black_box(keys.draw()));
        }
    })
}

/// Two of our runs on different keys, so many each, that share one limiter or
/// do not.
#[must_use]
pub fn our_pair(keys: u64, shared: bool) -> [Run; 2] {
    let service = ours_by_key::<u64>(lasting(keys).0, 1_000_000);
    let other = if shared {
        service.clone()
    } else {
        ours_by_key::<u64>(lasting(keys).0, 1_000_000)
    };
    [(service, 0), (other, 1)].map(|(mut service, half)| {
        let mut keys = Shuffled::below(keys);
        let run: Run = Box::new(move |calls| {
            for _ in 0..calls {
                let passed = drive(&mut service, black_box(keys.draw() * 2 + half));
                passed.expect("the quota is endless");
            }
        });
        run
    })
}

/// The same by governor, with one limiter.
#[must_use]
pub fn governor_pair(keys: u64) -> [Run; 2] {
    let limiter = governor_by_key::<u64>(lasting(keys).1);
    [0, 1].map(|half| {
        let limiter = Arc::clone(&limiter);
        let mut keys = Shuffled::below(keys);
        let run: Run = Box::new(move |calls| {
            for _ in 0..calls {
                let passed = limiter.check_key(&black_box(keys.draw() * 2 + half));
                passed.expect("the quota is endless");
            }
        });
        run
    })
}

/// The one client of most of the runs over HTTP.
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7));

/// A quota that is whole again before the next call.
const QUICK: (u32, u32) = (1_000_000_000, 900);
/// One for ten thousand clients: in debt all the time, never refused.
const BUSY: (u32, u32) = (1, 5000);
/// One that is used up by the first.
const SLOW: (u32, u32) = (1, 1);

type Answer = Ready<Result<Response<Body>, Infallible>>;

/// The bare service: it takes a request and gives an empty response.
fn bare()
-> impl Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Answer>
+ Clone
+ Send
+ 'static {
    service_fn(|request: Request<Body>| {
        drop(black_box(request));
        ready(Ok(Response::new(Body::empty())))
    })
}

fn repeat<S, B>(mut service: S, request: impl Fn() -> Request<Body> + Send + 'static) -> Run
where
    S: Service<Request<Body>, Response = Response<B>, Error = Infallible> + Send + 'static,
{
    Box::new(move |calls| {
        for _ in 0..calls {
            let Ok(response) = drive(&mut service, black_box(request()));
            drop(black_box(response));
        }
    })
}

fn plain() -> Request<Body> {
    Request::new(Body::empty())
}

/// The bare service alone.
#[must_use]
pub fn http_bare() -> Run {
    repeat(bare(), plain)
}

fn ours(
    quota: (u32, u32),
    headers: impl IntoIterator<Item = HeaderFormat>,
    key: impl ExtractKey,
) -> RateLimitLayer {
    let quota = Quota::per_second(quota.0).burst(quota.1);
    RateLimitLayer::builder()
        .limit(Limit::new(quota).key(key))
        .headers(headers)
        .build()
        .expect("the quota is sound")
}

fn client(_: Head<'_>) -> Option<Key> {
    Some(Key::from(black_box(CLIENT)))
}

/// Allowed, no headers.
#[must_use]
pub fn http_ours() -> Run {
    repeat(ours(QUICK, [], client).layer(bare()), plain)
}

/// Allowed, with the X- headers.
#[must_use]
pub fn http_ours_headers() -> Run {
    let layer = ours(QUICK, [HeaderFormat::XRateLimit], client);
    repeat(layer.layer(bare()), plain)
}

/// The same, where the numbers have many digits.
#[must_use]
pub fn http_ours_digits() -> Run {
    let layer = ours(
        (1_000_000_000, 1_000_000),
        [HeaderFormat::XRateLimit],
        client,
    );
    repeat(layer.layer(bare()), plain)
}

/// Allowed, with the draft's headers.
#[must_use]
pub fn http_ours_draft() -> Run {
    let layer = ours(QUICK, [HeaderFormat::Draft11], client);
    repeat(layer.layer(bare()), plain)
}

/// Refused, with the X- headers, as by default.
#[must_use]
pub fn http_ours_refused() -> Run {
    let layer = ours(SLOW, [HeaderFormat::XRateLimit], client);
    let mut run = repeat(layer.layer(bare()), plain);
    run(1);
    run
}

#[derive(Clone)]
struct Fixed;

impl KeyExtractor for Fixed {
    type Key = IpAddr;

    fn extract<T>(&self, _: &Request<T>) -> Result<IpAddr, GovernorError> {
        Ok(black_box(CLIENT))
    }
}

fn peer_builder(
    quota: (u32, u32),
) -> GovernorConfigBuilder<Fixed, governor::middleware::NoOpMiddleware> {
    let mut builder = GovernorConfigBuilder::default();
    builder
        .period(Duration::from_secs(1) / quota.0)
        .burst_size(quota.1);
    builder.key_extractor(Fixed)
}

/// `tower_governor` allowing, no headers.
#[must_use]
pub fn http_peer() -> Run {
    let config = peer_builder(QUICK).finish().expect("the quota is sound");
    repeat(GovernorLayer::new(config).layer(bare()), plain)
}

/// The same with its headers, of which it has two.
#[must_use]
pub fn http_peer_headers() -> Run {
    let config = peer_builder(QUICK)
        .use_headers()
        .finish()
        .expect("the quota is sound");
    repeat(GovernorLayer::new(config).layer(bare()), plain)
}

/// The same, where the numbers have many digits.
#[must_use]
pub fn http_peer_digits() -> Run {
    let mut builder = peer_builder((1_000_000_000, 1_000_000));
    let config = builder.use_headers().finish().expect("the quota is sound");
    repeat(GovernorLayer::new(config).layer(bare()), plain)
}

/// `tower_governor` refusing, as it does by default.
#[must_use]
pub fn http_peer_refused() -> Run {
    let config = peer_builder((1, 1))
        .period(Duration::from_secs(3600))
        .finish();
    let layer = GovernorLayer::new(config.expect("the quota is sound"));
    let mut run = repeat(layer.layer(bare()), plain);
    run(1);
    run
}

/// tower-rate-tier, which always has a user's name and headers.
#[must_use]
pub fn http_tier(refusing: bool) -> Run {
    let quota = if refusing {
        tower_rate_tier::Quota::per_hour(1)
    } else {
        tower_rate_tier::Quota::with_window(1_000_000_000, Duration::from_secs(1))
    };
    let tiers = RateTier::builder().tier("free", quota).disable_gc().build();
    let layer = TierLimitLayer::new(tiers)
        .identifier_fn(|_| Some(TierIdentity::new(black_box("192.0.2.7"), "free")));
    let inner = service_fn(|request: Request<Body>| {
        drop(black_box(request));
        ready(Ok::<_, Infallible>(Response::new(Body::empty())))
    });
    let mut run = repeat(layer.layer(inner), plain);
    run(1);
    run
}

/// Requests of ten thousand clients, as a server sees them: with the socket's
/// address attached in the way that each side reads.
fn from_socket<E>(extension: fn(SocketAddr) -> E) -> impl Fn() -> Request<Body> + Send
where
    E: Clone + Send + Sync + 'static,
{
    let keys = std::sync::Mutex::new(Shuffled::below(10_000));
    move || {
        let n = keys.lock().expect("it does not panic").draw();
        let mut request = plain();
        let address = SocketAddr::new(IpAddr::nth(n), 4711);
        request.extensions_mut().insert(extension(address));
        request
    }
}

/// The bare service, addresses attached.
#[must_use]
pub fn http_bare_clients() -> Run {
    repeat(bare(), from_socket(ConnectInfo))
}

/// Ours by the client's address, with the X- headers.
#[must_use]
pub fn http_ours_clients() -> Run {
    let layer = ours(BUSY, [HeaderFormat::XRateLimit], ClientIp::new());
    repeat(layer.layer(bare()), from_socket(PeerAddr))
}

/// `tower_governor` by the client's address, with its headers.
#[must_use]
pub fn http_peer_clients() -> Run {
    let mut builder = peer_builder(BUSY).key_extractor(PeerIpKeyExtractor);
    let config = builder.use_headers().finish().expect("the quota is sound");
    repeat(
        GovernorLayer::new(config).layer(bare()),
        from_socket(ConnectInfo),
    )
}

/// A run and its name, for the programs that are told one.
pub type Named = (&'static str, fn() -> Run);

/// All that can be counted.
pub const ALL: &[Named] = &[
    ("loop", the_loop),
    ("no decision", no_decisions),
    ("decision, 1 key", || our_decisions::<u64>(1)),
    ("service, 1 key", || our_service_decisions::<u64>(1)),
    ("service, 10^4 keys", || {
        our_service_decisions::<u64>(10_000)
    }),
    ("decision, 1 key, governor", || governor_decisions::<u64>(1)),
    ("decision, 10^4 keys", || our_decisions::<u64>(10_000)),
    ("decision, 10^4 keys, governor", || {
        governor_decisions::<u64>(10_000)
    }),
    ("decision, 10^4 addresses", || {
        our_decisions::<IpAddr>(10_000)
    }),
    ("decision, 10^4 addresses, governor", || {
        governor_decisions::<IpAddr>(10_000)
    }),
    ("http, bare", http_bare),
    ("http", http_ours),
    ("http, tower_governor", http_peer),
    ("http, headers", http_ours_headers),
    ("http, headers, tower_governor", http_peer_headers),
    ("http, many digits", http_ours_digits),
    ("http, many digits, tower_governor", http_peer_digits),
    ("http, draft headers", http_ours_draft),
    ("http, refused", http_ours_refused),
    ("http, refused, tower_governor", http_peer_refused),
    ("http, tower-rate-tier", || http_tier(false)),
    ("http, refused, tower-rate-tier", || http_tier(true)),
    ("http, clients, bare", http_bare_clients),
    ("http, clients", http_ours_clients),
    ("http, clients, tower_governor", http_peer_clients),
];

/// The run of that name.
#[must_use]
pub fn named(name: &str) -> Option<Run> {
    let (_, make) = ALL.iter().find(|(known, _)| *known == name)?;
    Some(make())
}
