use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use ::metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit,
    with_local_recorder,
};
use buttress_core::{key, testing::web};
use http::{Request, Response};
use tower::{Layer, Service, ServiceExt, service_fn};

use crate::{Limit, MissingKey, Quota, RateLimitBuilder, RateLimitLayer};

/// What was counted, under its name and its labels in their order.
#[derive(Default)]
struct Counts(Mutex<BTreeMap<String, Arc<AtomicU64>>>);

impl Counts {
    fn register(&self, key: &Key) -> Arc<AtomicU64> {
        let labels = key
            .labels()
            .map(|label| format!(" {}={}", label.key(), label.value()));
        let series = labels.fold(key.name().to_owned(), |series, label| series + &label);
        Arc::clone(self.0.lock().unwrap().entry(series).or_default())
    }

    /// What is not zero.
    fn counters(&self) -> Vec<(String, u64)> {
        let counts = self.0.lock().unwrap();
        let counts = counts
            .iter()
            .map(|(series, count)| (series.clone(), count.load(Relaxed)));
        counts
            .filter(|(series, count)| *count > 0 && !series.starts_with("rate_limit_keys"))
            .collect()
    }

    fn gauge(&self, series: &str) -> f64 {
        f64::from_bits(self.0.lock().unwrap()[series].load(Relaxed))
    }
}

impl Recorder for Counts {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.register(key))
    }
    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.register(key))
    }
    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// Sends a request with this `x-cost`.
fn send(layer: &RateLimitLayer, counts: &Counts, cost: Option<&str>) -> u16 {
    let mut inner = layer.layer(service_fn(async |_: Request<_>| {
        Ok::<_, Infallible>(Response::new(()))
    }));
    let mut request = web::get("/");
    if let Some(cost) = cost {
        request
            .headers_mut()
            .insert("x-cost", cost.parse().unwrap());
    }
    with_local_recorder(counts, || {
        let response =
            tokio_test::block_on(async { inner.ready().await.unwrap().call(request).await });
        response.unwrap().status().as_u16()
    })
}

fn costly() -> RateLimitBuilder {
    let limit = Limit::new(Quota::per_minute(3))
        .name("costs")
        .key(key::header("x-cost"))
        .missing_key(MissingKey::Refuse)
        .cost_by(|head| head.headers["x-cost"].to_str().unwrap().parse().unwrap());
    RateLimitLayer::builder().name("front").limit(limit)
}

fn series<const N: usize>(series: [(&str, u64); N]) -> Vec<(String, u64)> {
    series
        .map(|(series, count)| (series.to_owned(), count))
        .to_vec()
}

#[test]
fn every_request_and_every_refusal_is_counted_by_its_reason() {
    let counts = Counts::default();
    let layer = costly()
        .bypass(|head| head.uri.path() != "/")
        .build()
        .unwrap();
    let sent = [Some("2"), Some("2"), Some("4"), None].map(|cost| send(&layer, &counts, cost));
    assert_eq!(sent, [200, 429, 403, 400]);
    assert_eq!(
        counts.counters(),
        series([
            (
                "rate_limit_refusals_total name=front limit=costs reason=missing_key",
                1
            ),
            (
                "rate_limit_refusals_total name=front limit=costs reason=never_fits",
                1
            ),
            (
                "rate_limit_refusals_total name=front limit=costs reason=rate_limited",
                1
            ),
            ("rate_limit_requests_total name=front result=allowed", 1),
            ("rate_limit_requests_total name=front result=refused", 3),
        ])
    );
    assert_eq!(counts.gauge("rate_limit_keys name=front limit=costs"), 1.0);
}

#[test]
fn shadow_mode_counts_what_it_would_have_refused() {
    let counts = Counts::default();
    let layer = costly().shadow(true).build().unwrap();
    for cost in [Some("2"), Some("2"), None] {
        assert_eq!(send(&layer, &counts, cost), 200);
    }
    assert_eq!(
        counts.counters(),
        series([
            (
                "rate_limit_refusals_total name=front limit=costs reason=missing_key",
                1
            ),
            (
                "rate_limit_refusals_total name=front limit=costs reason=rate_limited",
                1
            ),
            ("rate_limit_requests_total name=front result=allowed", 1),
            ("rate_limit_requests_total name=front result=shadowed", 2),
        ])
    );
}

/// An insertion that makes up for others, let in above the ceiling while the
/// shards were busy, costs several keys their place; one was counted.
#[test]
fn every_eviction_is_counted() {
    let counts = Counts::default();
    let limit = Limit::new(Quota::per_hour(9))
        .key(key::header("x-cost"))
        .max_keys(64);
    let layer = RateLimitLayer::builder().limit(limit).build().unwrap();
    // The handles are those of the recorder that the first request finds.
    send(&layer, &counts, Some("first"));
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let layer = &layer;
            scope.spawn(move || {
                for n in 0..1_000 {
                    let key = format!("{thread}-{n}");
                    send(layer, &Counts::default(), Some(&key));
                }
            });
        }
    });
    let evicted = layer.handle().evicted("default").unwrap();
    assert!(evicted >= 8_001 - 64 - 65);
    let series = "rate_limit_evictions_total name=default limit=default";
    assert!(counts.counters().contains(&(series.to_owned(), evicted)));
}
