//! Services of any kind: readiness, and what is left of a call.

use std::{convert::Infallible, time::Duration};

use buttress_core::{
    Any, BoxError, Refusal, RefusalKind,
    key::{self, Global, Key},
    testing::{Fate, ReadinessProbe, Script, Step, web},
};
use buttress_lock::{Call, Error, Errors, LockLayer};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tokio_test::{assert_pending, task};
use tower::{Layer, ServiceExt, limit::ConcurrencyLimitLayer};

const SECOND: Duration = Duration::from_secs(1);

type Numbers = LockLayer<Any<u32>, Errors, Call>;

fn by_number(wait: Duration) -> Numbers {
    LockLayer::any(key::from_request(|number: &u32| {
        Key::from(u64::from(*number))
    }))
    .name("numbers")
    .wait(wait)
    .build()
    .unwrap()
}

#[tokio::test(start_paused = true)]
async fn readiness() {
    let probe = || ReadinessProbe::new(|| 1, |n: &u32| Step::<u32, Infallible>::ok(*n));
    probe().check(&by_number(Duration::ZERO)).await;
    probe().check(&by_number(SECOND)).await;
    // With calls that wait for those before them.
    let slow = |n: &u32| Step::<u32, Infallible>::ok(*n).after(SECOND / 10);
    let probe = ReadinessProbe::new(|| 1, slow);
    probe.check(&by_number(SECOND * 600)).await;
    let over_http = LockLayer::builder(Global).wait(SECOND).build().unwrap();
    ReadinessProbe::new(
        || Request::new(Full::<Bytes>::default()),
        |_: &_| Step::<_, Infallible>::ok(web::response(200, "ok")),
    )
    .check(&over_http)
    .await;
}

/// What waits for a lock has its slot already: no slot is taken twice, and none
/// is lost.
#[tokio::test(start_paused = true)]
async fn over_a_limit_whose_clones_start_unready() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|n| Step::ok(*n).after(SECOND))
        .build();
    let service = by_number(SECOND * 60).layer(ConcurrencyLimitLayer::new(2).layer(inner));
    let calls: Vec<_> = (0..8)
        .map(|n| tokio::spawn(service.clone().oneshot(n % 2)))
        .collect();
    for call in calls {
        assert!(call.await.unwrap().is_ok());
    }
    assert_eq!(script.call_count(), 8);
    assert!(script.peak_in_flight() <= 2);
    script.assert_sound();
}

#[tokio::test(start_paused = true)]
async fn it_is_held_until_the_answer() {
    let (inner, script) = Script::<u32, u32, &str>::new()
        .then(Step::ok(1).held())
        .then(Step::err("down"))
        .then(Step::ok(3))
        .build();
    let layer = by_number(Duration::ZERO);
    let service = layer.layer(inner);
    let mut first = task::spawn(service.clone().oneshot(1));
    assert_pending!(first.poll());
    let error = service.clone().oneshot(1).await.unwrap_err();
    let refusal = error.refusal().unwrap();
    assert_eq!(refusal.kind(), RefusalKind::Locked);
    assert_eq!(refusal.retry_after(), Some(SECOND));
    assert_eq!(
        error.to_string(),
        "the lock that the request needs is held by another one (retry after 1s)"
    );
    script.release(0);
    assert_eq!(first.await, Ok(1));
    assert_eq!(service.clone().oneshot(1).await, Err(Error::Inner("down")));
    assert_eq!(service.clone().oneshot(1).await, Ok(3));
    assert_eq!(layer.handle().held(), 0);
    script.assert_finished();
}

#[tokio::test(start_paused = true)]
async fn a_dropped_call_is_dropped_and_free() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .then(Step::hang())
        .then(Step::ok(2))
        .build();
    let service = by_number(SECOND).layer(inner);
    let mut first = task::spawn(service.clone().oneshot(1));
    assert_pending!(first.poll());
    let mut second = task::spawn(service.clone().oneshot(1));
    assert_pending!(second.poll());
    drop(first);
    assert_eq!(script.count(Fate::Dropped), 1);
    assert_eq!(second.await, Ok(2));
}

#[test]
fn its_errors_become_refusals() {
    let refusal = Refusal::new(RefusalKind::Locked);
    let error: BoxError = Error::<std::io::Error>::Refused(refusal.clone()).into();
    assert_eq!(Refusal::find(&*error), Some(&refusal));
    let inner = Error::Inner(std::io::Error::other("down"));
    assert_eq!(BoxError::from(inner).to_string(), "down");
}
