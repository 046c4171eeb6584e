//! What may happen while something is logged.

use std::{convert::Infallible, sync::mpsc, thread, time::Duration};

use buttress_core::testing::{Log, Script, Step};
use buttress_rate_limit::{Limit, Quota, RateLimitLayer};
use tokio_test::{assert_pending, task};
use tower::{Layer, Service, ServiceExt};

/// What listens to events may ask the layer how it is: the lines are not
/// locked while it is told. (They were.)
#[tokio::test(start_paused = true)]
async fn events_are_told_unlocked() {
    let quota = Quota::new(2, Duration::from_millis(200));
    let layer = RateLimitLayer::any()
        .limit(Limit::any(quota).cost_by(|cost: &u32| *cost))
        .build_waiting(Duration::from_millis(150), 1)
        .unwrap();
    let (inner, _script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|n| Step::ok(*n))
        .build();
    let mut service = layer.layer(inner);
    let log = Log::new();
    let curious = log.clone().on_event(move |_| {
        // From another thread, where a lock that is held here is waited for.
        let (layer, (tell, told)) = (layer.clone(), mpsc::channel());
        thread::spawn(move || tell.send(layer.waiting()));
        told.recv_timeout(Duration::from_secs(20))
            .expect("the lines are locked");
    });
    service.ready().await.unwrap().call(2).await.unwrap();
    service.ready().await.unwrap();
    curious.within(|| {
        // More than there ever is, and a wait that is too long.
        drop(service.call(3));
        drop(service.call(2));
    });
    let mut first = task::spawn(service.ready().await.unwrap().call(1));
    assert_pending!(first.poll());
    service.ready().await.unwrap();
    // The line is full.
    curious.within(|| drop(service.call(1)));
    assert_eq!(log.events().len(), 3);
}
