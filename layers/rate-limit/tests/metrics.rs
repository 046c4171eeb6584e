//! What is counted, under the names that the documentation gives.

use std::{collections::BTreeMap, convert::Infallible, time::Duration};

use buttress_core::{
    Any,
    key::{self, Key},
    testing::settle,
};
use buttress_rate_limit::{Limit, MissingKey, Quota, RateLimitLayer};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tower::{Layer, Service, ServiceExt, service_fn};

/// Name and labels as Prometheus would write them, and the value.
fn values(snapshotter: &Snapshotter) -> BTreeMap<String, f64> {
    let snapshot = snapshotter.snapshot().into_vec();
    let values = snapshot.into_iter().map(|(key, _, description, value)| {
        assert!(description.is_some(), "{key:?} is not described");
        let (_, key) = key.into_parts();
        let labels = key
            .labels()
            .map(|label| format!("{}={}", label.key(), label.value()));
        let name = format!("{}{{{}}}", key.name(), labels.collect::<Vec<_>>().join(","));
        let value = match value {
            DebugValue::Counter(count) => count as f64,
            DebugValue::Gauge(value) => value.into_inner(),
            // How long Redis took.
            DebugValue::Histogram(_) => 0.0,
        };
        (name, value)
    });
    values.filter(|(_, value)| *value != 0.0).collect()
}

fn expected<const N: usize>(values: [(&str, u32); N]) -> BTreeMap<String, f64> {
    values
        .map(|(name, value)| (name.to_owned(), value.into()))
        .into()
}

fn inner() -> impl Service<u64, Response = (), Error = Infallible, Future: Send> + Clone + Send {
    service_fn(async |_: u64| Ok(()))
}

fn by_number(n: &u64) -> Option<Key> {
    (*n != 0).then(|| Key::from(*n))
}

#[tokio::test(start_paused = true)]
async fn requests_refusals_evictions_and_keys() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let layer = RateLimitLayer::any()
        .name("api")
        .limit(
            Limit::any(Quota::per_hour(2))
                .name("all")
                .cost_by(|n: &u64| if *n == 9 { 3 } else { 1 }),
        )
        .limit(
            Limit::any(Quota::per_hour(1))
                .name("each")
                .key(by_number)
                .max_keys(1),
        )
        .bypass(|n: &u64| *n == 7)
        .build()
        .unwrap();
    let service = layer.layer(inner());
    // Two pass, the second of which takes the first one's place in the table.
    for request in [1, 2] {
        service.clone().oneshot(request).await.unwrap();
    }
    for request in [2, 3, 3, 9] {
        service.clone().oneshot(request).await.unwrap_err();
    }
    service.clone().oneshot(7).await.unwrap();
    assert_eq!(
        values(&snapshotter),
        expected([
            ("rate_limit_requests_total{name=api,result=allowed}", 2),
            ("rate_limit_requests_total{name=api,result=refused}", 4),
            ("rate_limit_requests_total{name=api,result=bypassed}", 1),
            (
                "rate_limit_refusals_total{name=api,limit=all,reason=rate_limited}",
                2
            ),
            // The second request of 2: both refuse, and this one for longer.
            (
                "rate_limit_refusals_total{name=api,limit=each,reason=rate_limited}",
                1
            ),
            (
                "rate_limit_refusals_total{name=api,limit=all,reason=never_fits}",
                1
            ),
            ("rate_limit_evictions_total{name=api,limit=each}", 1),
            ("rate_limit_keys{name=api,limit=all}", 1),
            ("rate_limit_keys{name=api,limit=each}", 1),
        ])
    );
}

#[tokio::test(start_paused = true)]
async fn shadow_mode_counts_what_would_have_been() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let layer = RateLimitLayer::any()
        .shadow(true)
        .limit(
            Limit::any(Quota::per_hour(1))
                .key(by_number)
                .missing_key(MissingKey::Refuse),
        )
        .build()
        .unwrap();
    let service = layer.layer(inner());
    for request in [1, 1, 1, 0] {
        service.clone().oneshot(request).await.unwrap();
    }
    let values = values(&snapshotter);
    assert_eq!(
        values["rate_limit_requests_total{name=default,result=allowed}"],
        1.0
    );
    assert_eq!(
        values["rate_limit_requests_total{name=default,result=shadowed}"],
        3.0
    );
    let refusals = "rate_limit_refusals_total{name=default,limit=default,reason=rate_limited}";
    assert_eq!(values[refusals], 2.0);
    let refusals = "rate_limit_refusals_total{name=default,limit=default,reason=missing_key}";
    assert_eq!(values[refusals], 1.0);
}

/// An insertion that makes up for others, let in above the ceiling while the
/// shards were busy, costs several keys their place. (One was counted.)
#[test]
fn every_eviction_is_counted() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let limit = Limit::any(Quota::per_hour(9)).key(by_number).max_keys(64);
    let layer = RateLimitLayer::any().limit(limit).build().unwrap();
    let service = layer.layer(inner());
    // The recorder is the one that the first request finds.
    tokio_test::block_on(service.clone().oneshot(1)).unwrap();
    std::thread::scope(|scope| {
        for thread in 1..=8 {
            let service = service.clone();
            scope.spawn(move || {
                for n in 0..1_000 {
                    let call = service.clone().oneshot(thread * 1_000 + n);
                    tokio_test::block_on(call).unwrap();
                }
            });
        }
    });
    let evicted = layer.handle().evicted("default").unwrap();
    let counted = values(&snapshotter)["rate_limit_evictions_total{name=default,limit=default}"];
    assert_eq!(counted, evicted as f64);
    assert!(evicted >= 8_001 - 64 - 65);
}

/// Who waits is counted once, when it passes or is refused, and by the limit
/// that is in the way. (It was the first one's, always.)
#[tokio::test(start_paused = true)]
async fn waiting_is_counted_when_it_ends() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let layer = RateLimitLayer::<Any<u64>, _>::any()
        .limit(Limit::any(Quota::per_second(1000)).name("wide"))
        .limit(
            Limit::any(Quota::per_second(1))
                .name("narrow")
                .key(key::from_request(|n: &u64| Key::from(*n))),
        )
        .build_waiting(Duration::from_secs(2), 2)
        .unwrap();
    let service = layer.layer(inner());
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..4 {
        calls.spawn(service.clone().oneshot(1));
        settle().await;
    }
    let passed = calls
        .join_all()
        .await
        .into_iter()
        .filter(Result::is_ok)
        .count();
    assert_eq!(passed, 3);
    assert_eq!(
        values(&snapshotter),
        expected([
            ("rate_limit_requests_total{name=default,result=allowed}", 3),
            ("rate_limit_requests_total{name=default,result=refused}", 1),
            (
                "rate_limit_refusals_total{name=default,limit=narrow,reason=overloaded}",
                1
            ),
            ("rate_limit_keys{name=default,limit=wide}", 1),
            ("rate_limit_keys{name=default,limit=narrow}", 1),
        ])
    );
}

#[cfg(feature = "redis")]
#[tokio::test]
async fn without_redis_it_is_counted_what_was_done_instead() {
    use buttress_rate_limit::redis::OnStoreError;

    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);
    // Nobody listens there.
    let redis = buttress_redis::Redis::from_url("redis://127.0.0.1:1").unwrap();
    for (on_error, name, times) in [
        (OnStoreError::Local, "l", 3),
        (OnStoreError::Allow, "a", 2),
        (OnStoreError::Deny, "d", 1),
    ] {
        let layer = RateLimitLayer::any()
            .name(name)
            .limit(Limit::any(Quota::per_hour(2)))
            .redis(&redis)
            .on_store_error(on_error)
            .build()
            .unwrap();
        let service = layer.layer(inner());
        for n in 0..times {
            let _ = service.clone().oneshot(n).await;
        }
    }
    let mut counted = values(&snapshotter);
    counted.retain(|name, _| name.starts_with("rate_limit"));
    counted.retain(|name, _| !name.starts_with("rate_limit_keys"));
    assert_eq!(
        counted,
        expected([
            ("rate_limit_without_store_total{name=l,mode=local}", 3),
            ("rate_limit_without_store_total{name=a,mode=allow}", 2),
            ("rate_limit_without_store_total{name=d,mode=deny}", 1),
            ("rate_limit_requests_total{name=l,result=allowed}", 2),
            ("rate_limit_requests_total{name=l,result=refused}", 1),
            ("rate_limit_requests_total{name=a,result=bypassed}", 2),
            ("rate_limit_requests_total{name=d,result=refused}", 1),
            (
                "rate_limit_refusals_total{name=l,limit=default,reason=rate_limited}",
                1
            ),
            (
                "rate_limit_refusals_total{name=d,limit=default,reason=store_unavailable}",
                1
            ),
        ])
    );
}
