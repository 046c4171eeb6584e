//! What is counted, under the names that the documentation gives.

use std::{convert::Infallible, num::NonZeroUsize, time::Duration};

use buttress_core::testing::settle;
use buttress_webhook::{
    Claim, ClaimKey, ClaimToken, Message, OnStoreError, ReplayStore, Secret, Signer, Standard,
    StoreFuture, VerifyLayer, WholeBody,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tower::{Layer, ServiceExt, service_fn};

const NOW: u64 = 1_700_000_000;

fn secret() -> Secret {
    Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap()
}

/// Name and labels as Prometheus would write them, and the values that are not
/// zero.
fn values(snapshotter: &Snapshotter) -> Vec<(String, f64)> {
    let snapshot = snapshotter.snapshot().into_vec();
    let mut values: Vec<_> = snapshot
        .into_iter()
        .map(|(key, _, description, value)| {
            assert!(description.is_some(), "{key:?} is not described");
            let (_, key) = key.into_parts();
            let labels = key
                .labels()
                .map(|label| format!("{}={}", label.key(), label.value()));
            let name = format!("{}{{{}}}", key.name(), labels.collect::<Vec<_>>().join(","));
            match value {
                DebugValue::Counter(count) => (name, count as f64),
                DebugValue::Gauge(value) => (name, value.into_inner()),
                other => panic!("{name} is {other:?}"),
            }
        })
        .filter(|(_, value)| *value != 0.0)
        .collect();
    values.sort_by(|one, other| one.0.cmp(&other.0));
    values
}

struct Down;

impl ReplayStore for Down {
    fn claim<'a>(&'a self, _: &'a ClaimKey, _: Duration) -> StoreFuture<'a, Claim> {
        Box::pin(async { Err("down".into()) })
    }
    fn complete<'a>(&'a self, _: &'a ClaimKey, _: ClaimToken, _: Duration) -> StoreFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
    fn release<'a>(&'a self, _: &'a ClaimKey, _: ClaimToken) -> StoreFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

fn signed(id: &str) -> Request<Full<Bytes>> {
    let signer = Signer::new(Standard::new(), [secret()]).unwrap();
    let (mut parts, ()) = Request::post("/hooks").body(()).unwrap().into_parts();
    let message = Message {
        id,
        timestamp: NOW,
        body: b"{}",
    };
    signer.sign(&mut parts, &message).unwrap();
    Request::from_parts(parts, Full::new(Bytes::from_static(b"{}")))
}

/// The debugging recorder starts each snapshot anew, and with it the gauge: it
/// shows what has changed.
#[tokio::test(start_paused = true)]
async fn verifications_replays_claims_and_the_stores_errors() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let builder = || {
        VerifyLayer::builder(Standard::new())
            .name("orders")
            .secrets([secret()])
            .wall_clock(|| Duration::from_secs(NOW))
    };
    let handler = service_fn(async |_: Request<WholeBody>| {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    });
    let send = async |layer: &VerifyLayer, request| {
        let response = layer.layer(handler).oneshot(request).await.unwrap();
        response.into_body().collect().await.unwrap();
        settle().await;
        values(&snapshotter)
    };
    let verified = "webhook_verifications_total{name=orders,scheme=standard,result=verified}";
    let claims = "webhook_claims{name=orders}";
    let is = |told: Vec<(String, f64)>, expected: &[(&str, f64)]| {
        let expected: Vec<_> = expected
            .iter()
            .map(|(name, value)| ((*name).to_owned(), *value))
            .collect();
        assert_eq!(told, expected);
    };

    let layer = builder().max_replays(NonZeroUsize::MIN).build().unwrap();
    let mut forged = signed("1");
    *forged.body_mut() = Full::new(Bytes::from_static(b"[]"));
    let mismatch =
        "webhook_verifications_total{name=orders,scheme=standard,result=signature_mismatch}";
    is(send(&layer, forged).await, &[(mismatch, 1.0)]);
    is(
        send(&layer, signed("1")).await,
        &[(claims, 1.0), (verified, 1.0)],
    );
    let completed = "webhook_replays_total{name=orders,kind=completed}";
    is(
        send(&layer, signed("1")).await,
        &[(completed, 1.0), (verified, 1.0)],
    );
    let full = "webhook_replays_total{name=orders,kind=full}";
    is(
        send(&layer, signed("2")).await,
        &[(full, 1.0), (verified, 1.0)],
    );
    drop(layer);
    is(values(&snapshotter), &[(claims, -1.0)]);

    let layer = builder()
        .replay_store(Down)
        .on_store_error(OnStoreError::Allow)
        .build()
        .unwrap();
    let failed = "webhook_store_errors_total{name=orders,operation=claim}";
    is(
        send(&layer, signed("1")).await,
        &[(failed, 1.0), (verified, 1.0)],
    );
}
