//! Where something could be lost, late, or without an end.

mod common;

use std::{
    convert::Infallible,
    future::pending,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll},
};

use buttress_core::testing::{advance, elapsed, settle, web::ScriptedBody};
use buttress_delivery::{
    DeadLetter, DeliveryId, DeliveryStore, EmitError, Kept, MemoryStore, Record, RedriveError,
    Registration, Scope, Selector, Status, StoreFuture,
};
use bytes::Bytes;
use common::*;
use http::Response;
use http_body::{Body, Frame};

/// A hold has a timer of its own, also where no retry's stands beside it.
#[tokio::test(start_paused = true)]
async fn who_asked_to_be_left_alone_is_told_when_that_is_over() {
    for (retries, delay) in [(0, 1), (3, 1000)] {
        let (transport, receiver) = receiver(|_| status(200));
        receiver.push(with(429, &[("retry-after", "20")], ScriptedBody::new()));
        let webhooks = builder().build(transport).unwrap();
        let registration = hook("https://a.example/")
            .max_retries(retries)
            .retry_delay(secs(delay));
        webhooks.register(registration).unwrap();
        let _worker = webhooks.start().unwrap();
        webhooks.emit(event("a")).await.unwrap();
        settle().await;
        webhooks.emit(event("b")).await.unwrap();
        advance(secs(30)).await;
        assert_eq!(receiver.arrivals(), [secs(0), secs(20)], "{retries}");
    }
}

/// A date means a moment, however long the answer took.
#[tokio::test(start_paused = true)]
async fn a_retry_after_date_counts_from_the_answer() {
    let (transport, receiver) = receiver(|_| status(200));
    // 40 seconds after the test's beginning, said after 15.
    let date = [("retry-after", "Tue, 14 Nov 2023 22:14:00 GMT")];
    receiver.push(with(503, &date, ScriptedBody::new()).after(secs(15)));
    let webhooks = builder().build(transport).unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    advance(secs(60)).await;
    assert_eq!(receiver.arrivals(), [secs(0), secs(40)]);
}

/// The time of day in which a retry was put down may have been wrong.
#[tokio::test(start_paused = true)]
async fn no_clock_that_jumped_makes_a_kept_delivery_wait_for_years() {
    let store = MemoryStore::new();
    {
        let (transport, _receiver) = receiver(|_| status(500));
        let webhooks = builder()
            .wall_clock(|| secs(4_000_000_000))
            .store(store.clone())
            .build(transport)
            .unwrap();
        webhooks
            .register(hook("https://a.example/").id("mine"))
            .unwrap();
        let worker = webhooks.start().unwrap();
        webhooks.emit(event("a")).await.unwrap();
        settle().await;
        assert_eq!(worker.stop(secs(1)).await.queued, 1);
    }
    let (transport, receiver) = receiver(|_| status(200));
    let webhooks = builder().store(store).build(transport).unwrap();
    webhooks
        .register(
            hook("https://a.example/")
                .id("mine")
                .max_retry_delay(secs(60)),
        )
        .unwrap();
    let _worker = webhooks.start().unwrap();
    advance(secs(61)).await;
    assert_eq!(receiver.call_count(), 1);
    assert_eq!(newest(&webhooks).status, Status::Delivered);
}

/// Always ready, and says nothing.
#[derive(Clone, Copy)]
struct Nothing;

impl Body for Nothing {
    type Data = Bytes;
    type Error = Infallible;
    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::new()))))
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_empty_frames_without_end_is_cut() {
    let transport =
        tower::service_fn(|_: Sent| async { Ok::<_, Infallible>(Response::new(Nothing)) });
    let webhooks = builder().build(transport).unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    settle().await;
    assert_eq!(newest(&webhooks).status, Status::Delivered);
}

/// Keeps what it is asked to accept, and hangs where something changes.
#[derive(Clone, Default)]
struct Stuck {
    memory: MemoryStore,
    hangs: Arc<AtomicBool>,
}

impl Stuck {
    fn or<'a>(
        &'a self,
        change: impl FnOnce() -> StoreFuture<'a, ()> + Send + 'a,
    ) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            if self.hangs.load(SeqCst) {
                pending::<()>().await;
            }
            change().await
        })
    }
}

impl DeliveryStore for Stuck {
    fn accept(&self, records: Vec<Record>) -> StoreFuture<'_, ()> {
        self.memory.accept(records)
    }
    fn retry(
        &self,
        id: DeliveryId,
        attempts: u32,
        due: std::time::Duration,
    ) -> StoreFuture<'_, ()> {
        self.or(move || self.memory.retry(id, attempts, due))
    }
    fn settle(&self, id: DeliveryId) -> StoreFuture<'_, ()> {
        self.or(move || self.memory.settle(id))
    }
    fn bury(&self, letter: DeadLetter) -> StoreFuture<'_, ()> {
        self.or(move || self.memory.bury(letter))
    }
    fn drop_letter(&self, id: DeliveryId) -> StoreFuture<'_, ()> {
        self.or(move || self.memory.drop_letter(id))
    }
    fn load(&self) -> StoreFuture<'_, Kept> {
        self.memory.load()
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_hangs_holds_up_neither_deliveries_nor_a_stop() {
    let store = Stuck::default();
    store.hangs.store(true, SeqCst);
    let (transport, receiver) = receiver(|_| status(200));
    receiver.push(status(500));
    let webhooks = builder().store(store.clone()).build(transport).unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    let worker = webhooks.start().unwrap();
    for _ in 0..10 {
        webhooks.emit(event("a")).await.unwrap();
    }
    advance(secs(5)).await;
    assert_eq!((receiver.call_count(), webhooks.status().queued), (11, 0));
    let (took, stopped) = elapsed(worker.stop(secs(7))).await;
    assert_eq!(took, secs(7));
    // All of them had come to their end before.
    assert_eq!(
        (stopped.finished, stopped.cut_off, stopped.queued),
        (0, 0, 0)
    );
    assert_eq!(store.memory.len(), (10, 0));

    // What it has not been told, it is told when it can be.
    store.hangs.store(false, SeqCst);
    let worker = webhooks.start().unwrap();
    settle().await;
    assert!(store.memory.is_empty());
    drop(worker);
}

#[tokio::test(start_paused = true)]
async fn what_a_store_is_behind_with_has_a_ceiling() {
    let store = Stuck::default();
    store.hangs.store(true, SeqCst);
    let (transport, _receiver) = receiver(|_| status(200));
    let webhooks = builder()
        .capacity(10)
        .store(store.clone())
        .build(transport)
        .unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    let worker = webhooks.start().unwrap();
    let mut accepted = 0;
    let full = loop {
        match webhooks.emit(event("a")).await {
            Ok(count) => accepted += count,
            Err(error) => break error,
        }
        advance(millis(100)).await;
        assert!(accepted < 10_000, "there is no end");
    };
    assert!(matches!(
        full,
        EmitError::Full {
            deliveries: 1,
            over: 1
        }
    ));
    assert_eq!(webhooks.status().queued, 0);
    assert!(accepted >= 1000);
    store.hangs.store(false, SeqCst);
    // The write under way hangs for good; another worker makes it again.
    drop(worker);
    let _worker = webhooks.start().unwrap();
    settle().await;
    assert!(store.memory.is_empty());
    webhooks.emit(event("b")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_letter_whose_lane_is_full_stays_where_it_was() {
    let (transport, receiver) = receiver(|_| status(200));
    let webhooks = builder().lane_capacity(1).build(transport).unwrap();
    webhooks
        .register(only("https://a.example/", &["a"]))
        .unwrap();
    webhooks
        .register(only("https://b.example/", &["b"]))
        .unwrap();
    receiver.push(status(302));
    receiver.push(status(302));
    receiver.push(status(302));
    let worker = webhooks.start().unwrap();
    for name in ["a", "a", "b"] {
        webhooks.emit(event(name)).await.unwrap();
        settle().await;
    }
    let _ = worker.stop(secs(0)).await;
    let letters = webhooks.dead_letters();
    assert_eq!(letters.len(), 3);
    // Each of the two lanes has room for one.
    let redriven = webhooks.redrive_all(None).await;
    assert_eq!((redriven.queued, redriven.left), (2, 1));
    let left = webhooks.dead_letters();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].record.id, letters[1].record.id);
    let refused = webhooks.redrive(left[0].record.id).await;
    assert!(matches!(refused, Err(RedriveError::Full)));
}

fn ordered() -> Registration {
    hook("https://a.example/").id("mine").ordered(true)
}

#[tokio::test(start_paused = true)]
async fn what_an_earlier_run_left_goes_before_what_was_emitted_before_the_start() {
    let store = MemoryStore::new();
    {
        let (transport, _receiver) = receiver(|_| status(200));
        let webhooks = builder().store(store.clone()).build(transport).unwrap();
        webhooks.register(ordered()).unwrap();
        for name in ["a", "b"] {
            webhooks.emit(event(name)).await.unwrap();
        }
    }
    let (transport, receiver) = receiver(|_| status(200).after(secs(1)));
    let webhooks = builder().store(store.clone()).build(transport).unwrap();
    webhooks.register(ordered()).unwrap();
    for name in ["c", "d"] {
        webhooks.emit(event(name)).await.unwrap();
    }
    let _worker = webhooks.start().unwrap();
    advance(secs(10)).await;
    let names: Vec<String> = receiver
        .requests()
        .iter()
        .map(|request| {
            let body: serde_json::Value = serde_json::from_slice(request.body().bytes()).unwrap();
            body["type"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    assert!(store.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_letter_is_sent_to_its_registration_as_that_is_now() {
    let (transport, receiver) = receiver(|_| status(200));
    receiver.push(status(302));
    let webhooks = builder().build(transport).unwrap();
    let mine = || hook("https://a.example/").id("mine");
    webhooks.register(mine()).unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    settle().await;
    webhooks.unregister(Selector::all()).await;
    let scope = Scope::request("r");
    webhooks.register(mine().scope(scope.clone())).unwrap();
    assert_eq!(webhooks.redrive_all(None).await.queued, 1);
    settle().await;
    assert_eq!(newest(&webhooks).status, Status::Delivered);
    assert_eq!(webhooks.results(Some(&scope), None).len(), 1);
}

/// A panic after an attempt is none of the endpoint's: it has its retries, and
/// is not called again and again.
#[tokio::test(start_paused = true)]
async fn a_draw_that_panics_costs_the_endpoint_nothing() {
    let (transport, receiver) = receiver(|_| status(500));
    let webhooks = builder()
        .random(|| panic!("on purpose"))
        .without_breaker()
        .build(transport)
        .unwrap();
    let registration = hook("https://a.example/").max_retry_delay(secs(10));
    webhooks.register(registration).unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    advance(secs(100)).await;
    assert_eq!(receiver.arrivals(), [0, 10, 20, 30].map(secs));
    assert_eq!(webhooks.dead_letters().len(), 1);
}

/// One look at all of them for each would take minutes.
#[tokio::test(start_paused = true)]
async fn many_are_taken_back_in_no_time() {
    let (transport, receiver) = receiver(|_| status(200).after(secs(20)));
    let webhooks = builder().capacity(100_000).build(transport).unwrap();
    for number in 0..20_000 {
        let registration = only(&format!("https://h{number}.example/"), &["none"]);
        webhooks.register(registration).unwrap();
    }
    webhooks.register(ordered()).unwrap();
    let _worker = webhooks.start().unwrap();
    for _ in 0..50_000 {
        webhooks.emit(event("a")).await.unwrap();
    }
    settle().await;
    assert_eq!(receiver.in_flight(), 1);
    assert_eq!(webhooks.unregister(Selector::all()).await, 20_001);
    assert_eq!(webhooks.status().queued, 1);
    advance(secs(21)).await;
    assert_eq!(webhooks.status().queued, 0);
}

/// Panics where it is asked to keep something.
struct Panicking;

impl DeliveryStore for Panicking {
    fn accept(&self, _: Vec<Record>) -> StoreFuture<'_, ()> {
        panic!("on purpose")
    }
    fn retry(&self, _: DeliveryId, _: u32, _: std::time::Duration) -> StoreFuture<'_, ()> {
        unreachable!()
    }
    fn settle(&self, _: DeliveryId) -> StoreFuture<'_, ()> {
        unreachable!()
    }
    fn bury(&self, _: DeadLetter) -> StoreFuture<'_, ()> {
        unreachable!()
    }
    fn drop_letter(&self, _: DeliveryId) -> StoreFuture<'_, ()> {
        unreachable!()
    }
    fn load(&self) -> StoreFuture<'_, Kept> {
        Box::pin(std::future::ready(Ok(Kept::default())))
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_panics_is_one_that_keeps_nothing() {
    let (transport, receiver) = receiver(|_| status(200));
    let webhooks = builder()
        .capacity(1)
        .store(Panicking)
        .build(transport)
        .unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    let _worker = webhooks.start().unwrap();
    for _ in 0..3 {
        let refused = webhooks.emit(event("a")).await;
        assert!(matches!(refused, Err(EmitError::Store(_))));
    }
    settle().await;
    assert_eq!((receiver.call_count(), webhooks.status().queued), (0, 0));
}

/// Says everything twice.
struct Twice(MemoryStore);

impl DeliveryStore for Twice {
    fn accept(&self, records: Vec<Record>) -> StoreFuture<'_, ()> {
        self.0.accept(records)
    }
    fn retry(
        &self,
        id: DeliveryId,
        attempts: u32,
        due: std::time::Duration,
    ) -> StoreFuture<'_, ()> {
        self.0.retry(id, attempts, due)
    }
    fn settle(&self, id: DeliveryId) -> StoreFuture<'_, ()> {
        self.0.settle(id)
    }
    fn bury(&self, letter: DeadLetter) -> StoreFuture<'_, ()> {
        self.0.bury(letter)
    }
    fn drop_letter(&self, id: DeliveryId) -> StoreFuture<'_, ()> {
        self.0.drop_letter(id)
    }
    fn load(&self) -> StoreFuture<'_, Kept> {
        Box::pin(async {
            let mut kept = self.0.load().await?;
            kept.records.extend(kept.records.clone());
            Ok(kept)
        })
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_store_says_twice_is_one_delivery() {
    let store = MemoryStore::new();
    {
        let (transport, _receiver) = receiver(|_| status(200));
        let webhooks = builder().store(store.clone()).build(transport).unwrap();
        webhooks.register(ordered()).unwrap();
        webhooks.emit(event("a")).await.unwrap();
    }
    let (transport, receiver) = receiver(|_| status(200));
    let webhooks = builder().store(Twice(store)).build(transport).unwrap();
    webhooks.register(ordered()).unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("b")).await.unwrap();
    advance(secs(5)).await;
    assert_eq!((receiver.call_count(), webhooks.status().queued), (2, 0));
    assert_eq!(webhooks.list()[0].queued, 0);
}
