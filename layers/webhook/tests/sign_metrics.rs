//! What the signing layer counts, under the name that the documentation gives.

use std::convert::Infallible;

use buttress_core::testing::web::ScriptedBody;
use buttress_webhook::{GitHub, Secret, SignLayer, Signer, Slack, Standard, WholeBody};
use http::{HeaderValue, Request, Response};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tower::{Layer, ServiceExt, service_fn};

/// Name and labels as Prometheus would write them, of what was counted.
fn counted(snapshotter: &Snapshotter) -> Vec<String> {
    let snapshot = snapshotter.snapshot().into_vec();
    let values = snapshot
        .into_iter()
        .filter_map(|(key, _, description, value)| {
            assert!(description.is_some(), "{key:?} is not described");
            let (_, key) = key.into_parts();
            let labels = key
                .labels()
                .map(|label| format!("{}={}", label.key(), label.value()));
            let name = format!("{}{{{}}}", key.name(), labels.collect::<Vec<_>>().join(","));
            match value {
                DebugValue::Counter(0) => None,
                DebugValue::Counter(count) => Some(format!("{name} {count}")),
                other => panic!("{name} is {other:?}"),
            }
        });
    let mut values: Vec<_> = values.collect();
    values.sort();
    values
}

/// The debugging recorder starts each snapshot's counters anew.
#[tokio::test]
async fn signatures_by_scheme_and_result() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _here = metrics::set_default_local_recorder(&recorder);

    let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
    let signer = Signer::new(Standard::new(), [secret.clone()]).unwrap();
    let signer = signer.and(GitHub, [secret.clone()]).unwrap();
    let layer = SignLayer::builder(signer)
        .name("orders")
        .max_body(2)
        .build();
    let layer = layer.unwrap();
    let handle = layer.handle();
    let service = layer.layer(service_fn(async |_: Request<WholeBody>| {
        Ok::<_, Infallible>(Response::new(()))
    }));
    let count = async |body: ScriptedBody, id: &'static str| {
        let mut request = Request::new(body);
        let id = HeaderValue::from_static(id);
        request.headers_mut().insert("webhook-id", id);
        let _ = service.clone().oneshot(request).await;
        counted(&snapshotter)
    };
    let told = |schemes: &[&str], result: &str| -> Vec<String> {
        let line = |scheme: &&str| {
            format!("webhook_signatures_total{{name=orders,scheme={scheme},result={result}}} 1")
        };
        schemes.iter().map(line).collect()
    };
    let both = ["github", "standard"];
    let body = ScriptedBody::new;
    assert_eq!(count(body().data("{}"), "evt").await, told(&both, "signed"));
    let long = body().data("{ }");
    assert_eq!(count(long, "evt").await, told(&both, "too_large"));
    let broken = body().fail("reset");
    assert_eq!(count(broken, "evt").await, told(&both, "body"));
    assert_eq!(count(body(), "e.v.t").await, told(&both, "unsignable"));

    handle.set_signer(Signer::new(Slack, [secret]).unwrap());
    assert_eq!(count(body(), "evt").await, told(&["slack"], "signed"));
}
