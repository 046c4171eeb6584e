//! What may happen while something is logged.
//!
//! In a program of its own: `tracing` asks only the subscriber of the thread
//! that comes first by an event whether anybody wants it, so that another
//! test's thread could switch it off for this one.

use std::{
    cell::RefCell,
    convert::Infallible,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use buttress_core::{
    Any,
    testing::{Script, Step},
};
use buttress_rate_limit::{Limit, Quota, RateLimitLayer, WaitLayer};
use tokio_test::{assert_pending, task};
use tower::{Layer, Service, ServiceExt};
use tracing::{Event, Metadata, Subscriber, span, subscriber::with_default};

thread_local! {
    static LAYER: RefCell<Option<WaitLayer<Any<u32>>>> = const { RefCell::new(None) };
}
static EVENTS: AtomicUsize = AtomicUsize::new(0);

struct Curious;

impl Subscriber for Curious {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, _: &Event<'_>) {
        let Some(layer) = LAYER.with_borrow(Clone::clone) else {
            return;
        };
        // From another thread, where a lock that is held here is waited for.
        let (tell, told) = mpsc::channel();
        thread::spawn(move || tell.send(layer.waiting()));
        told.recv_timeout(Duration::from_secs(20))
            .expect("the lines are locked");
        EVENTS.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

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
    LAYER.set(Some(layer));
    service.ready().await.unwrap().call(2).await.unwrap();
    service.ready().await.unwrap();
    with_default(Curious, || {
        // More than there ever is, and a wait that is too long.
        drop(service.call(3));
        drop(service.call(2));
    });
    let mut first = task::spawn(service.ready().await.unwrap().call(1));
    assert_pending!(first.poll());
    service.ready().await.unwrap();
    // The line is full.
    with_default(Curious, || drop(service.call(1)));
    assert_eq!(EVENTS.load(Ordering::Relaxed), 3);
    LAYER.set(None);
}
