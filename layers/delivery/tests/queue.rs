//! Who is told, whose turn it is, and what a stop leaves.

mod common;

use std::sync::Arc;

use buttress_circuit_breaker::Settings;
use buttress_core::testing::{Fate, Script, Step, advance, elapsed, settle, web::ScriptedBody};
use buttress_delivery::{
    Cause, DeliveryStore, EmitError, Kept, MemoryStore, Record, RegisterError, Scope, Selector,
    StartError, Status, StoreFuture, Webhooks,
};
use buttress_rate_limit::Quota;
use buttress_webhook::{Secret, Signer, Standard};
use common::*;

fn host(request: &Sent) -> &str {
    request.uri().host().unwrap()
}

fn names(receiver: &Receiver) -> Vec<String> {
    let requests = receiver.requests();
    let names = requests.iter().map(|request| {
        let body: serde_json::Value = serde_json::from_slice(request.body().bytes()).unwrap();
        body["type"].as_str().unwrap().to_owned()
    });
    names.collect()
}

#[tokio::test(start_paused = true)]
async fn each_is_told_once_of_what_it_asked_for() {
    let (transport, receiver) = receiver(|_| status(200));
    let webhooks = builder().build(transport).unwrap();
    let register = |url: &str, patterns: &[&str], scope: Scope| {
        let registration = buttress_delivery::Registration::new(url);
        webhooks
            .register(registration.events(patterns.iter().copied()).scope(scope))
            .unwrap()
    };
    register(
        "https://a.example/",
        &["agent.*", "agent.a.b", "*"],
        Scope::Global,
    );
    register("https://b.example/", &["agent.a"], Scope::Global);
    register("https://c.example/", &["agent.*"], Scope::request("r1"));
    register("https://d.example/", &["agent.*"], Scope::request("r2"));
    let _worker = webhooks.start().unwrap();

    assert_eq!(
        webhooks
            .emit(event("agent.a.b").request_id("r1"))
            .await
            .unwrap(),
        2
    );
    assert_eq!(webhooks.emit(event("agent.a")).await.unwrap(), 2);
    assert_eq!(
        webhooks
            .emit(event("other").request_id("r2"))
            .await
            .unwrap(),
        1
    );
    settle().await;
    let requests = receiver.requests();
    let hosts: Vec<&str> = requests.iter().map(host).collect();
    assert_eq!(
        hosts,
        [
            "a.example",
            "c.example",
            "b.example",
            "a.example",
            "a.example"
        ]
    );
    // By scope, the newest first.
    let of = |scope| webhooks.results(Some(&scope), None).len();
    assert_eq!(
        (
            of(Scope::Global),
            of(Scope::request("r1")),
            of(Scope::request("r2"))
        ),
        (4, 1, 0)
    );
    assert_eq!(
        &*webhooks.results(Some(&Scope::Global), 1)[0].event,
        "other"
    );
    assert_eq!(webhooks.results(None, None).len(), 5);
}

#[tokio::test(start_paused = true)]
async fn what_is_taken_back_is_told_nothing_more() {
    let (transport, receiver) = receiver(|_| status(500));
    let webhooks = builder().build(transport).unwrap();
    let of_request = Scope::request("r1");
    webhooks.register(hook("https://a.example/")).unwrap();
    webhooks
        .register(hook("https://a.example/").scope(of_request.clone()))
        .unwrap();
    let third = webhooks
        .register(hook("https://b.example/").scope(of_request.clone()))
        .unwrap();
    let worker = webhooks.start().unwrap();
    assert_eq!(webhooks.emit(event("a").request_id("r1")).await.unwrap(), 3);
    settle().await;
    assert_eq!(
        webhooks
            .list()
            .iter()
            .map(|info| info.queued)
            .sum::<usize>(),
        3
    );

    let one = Selector::all()
        .scope(of_request.clone())
        .url("https://a.example/");
    assert_eq!(webhooks.unregister(one).await, 1);
    assert_eq!(
        webhooks
            .unregister(Selector::all().url("https://a.example/"))
            .await,
        1
    );
    assert_eq!(
        webhooks
            .unregister(Selector::all().scope(Scope::Global))
            .await,
        0
    );
    assert_eq!(webhooks.status().queued, 1);
    assert_eq!(webhooks.list().len(), 1);
    assert_eq!(webhooks.unregister(third).await, 1);
    advance(secs(60)).await;
    assert_eq!(receiver.call_count(), 3);
    let cause = Some(Cause::Unregistered);
    assert!(
        webhooks
            .results(None, None)
            .iter()
            .all(|result| result.error == cause)
    );
    assert!(webhooks.dead_letters().is_empty());
    assert_eq!(webhooks.emit(event("a").request_id("r1")).await.unwrap(), 0);
    drop(worker);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_under_way_when_its_registration_goes_is_the_last() {
    for (code, expected) in [
        (200, (Status::Delivered, None)),
        (500, (Status::Failed, Some(Cause::Unregistered))),
    ] {
        let (transport, receiver) = receiver(move |_| status(code).after(secs(1)));
        let webhooks = builder().build(transport).unwrap();
        let id = webhooks.register(hook("https://a.example/")).unwrap();
        let _worker = webhooks.start().unwrap();
        webhooks.emit(event("a")).await.unwrap();
        settle().await;
        webhooks.unregister(id).await;
        assert_eq!(webhooks.status().queued, 1);
        advance(secs(60)).await;
        let result = newest(&webhooks);
        assert_eq!((result.status, result.error.clone()), expected);
        assert_eq!((receiver.call_count(), webhooks.status().queued), (1, 0));
        assert!(webhooks.dead_letters().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_is_told_to_who_emits_and_takes_nothing_of_it() {
    let (transport, receiver) = receiver(|_| status(200));
    let webhooks = builder().capacity(5).build(transport).unwrap();
    for url in [
        "https://a.example/",
        "https://b.example/",
        "https://c.example/",
    ] {
        webhooks.register(hook(url)).unwrap();
    }
    assert_eq!(webhooks.emit(event("a")).await.unwrap(), 3);
    let full = webhooks.emit(event("b")).await.unwrap_err();
    assert!(
        matches!(
            full,
            EmitError::Full {
                deliveries: 3,
                over: 1
            }
        ),
        "{full:?}"
    );
    assert_eq!(webhooks.status().queued, 3);
    let _worker = webhooks.start().unwrap();
    settle().await;
    assert_eq!(webhooks.emit(event("b")).await.unwrap(), 3);
    settle().await;
    assert_eq!(names(&receiver), ["a", "a", "a", "b", "b", "b"]);
}

#[tokio::test(start_paused = true)]
async fn a_lane_has_its_share_of_the_queue_where_it_is_given_one() {
    let (transport, receiver) = receiver(|request| match host(request) {
        "dead.example" => Step::hang(),
        _ => status(200),
    });
    let webhooks = builder()
        .capacity(10)
        .lane_capacity(2)
        .build(transport)
        .unwrap();
    webhooks.register(hook("https://dead.example/")).unwrap();
    webhooks.register(hook("https://b.example/")).unwrap();
    let _worker = webhooks.start().unwrap();
    for expected in [2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1] {
        assert_eq!(webhooks.emit(event("a")).await.unwrap(), expected);
        settle().await;
    }
    assert_eq!(receiver.count(Fate::Answered), 12);
    let letters = webhooks.dead_letters();
    assert_eq!(letters.len(), 10);
    assert!(letters.iter().all(|letter| letter.cause == Cause::Crowded));
}

#[tokio::test(start_paused = true)]
async fn a_slow_endpoint_delays_no_other() {
    let (transport, receiver) = receiver(|request| match host(request) {
        "slow.example" => Step::hang(),
        _ => status(200).after(millis(10)),
    });
    let webhooks = builder()
        .concurrency(8)
        .lane_concurrency(4)
        .build(transport)
        .unwrap();
    webhooks.register(hook("https://slow.example/")).unwrap();
    let _worker = webhooks.start().unwrap();
    for _ in 0..50 {
        webhooks.emit(event("a")).await.unwrap();
    }
    settle().await;
    assert_eq!(webhooks.status().in_flight, 4);
    webhooks
        .register(only("https://quick.example/", &["quick"]))
        .unwrap();
    let mut quick = webhooks.subscribe(None);
    let (took, ()) = elapsed(async {
        webhooks.emit(event("quick")).await.unwrap();
        loop {
            let update = quick.recv().await.unwrap();
            if update.result.status == Status::Delivered {
                break;
            }
        }
    })
    .await;
    assert_eq!(took, millis(10));
    assert_eq!(receiver.peak_in_flight(), 5);
}

#[tokio::test(start_paused = true)]
async fn lanes_take_turns() {
    let (transport, receiver) = receiver(|_| status(200).after(secs(1)));
    let webhooks = builder()
        .concurrency(2)
        .lane_concurrency(1)
        .build(transport)
        .unwrap();
    for url in [
        "https://a.example/",
        "https://b.example/",
        "https://c.example/",
    ] {
        webhooks.register(hook(url)).unwrap();
    }
    for _ in 0..2 {
        webhooks.emit(event("a")).await.unwrap();
    }
    let _worker = webhooks.start().unwrap();
    advance(secs(10)).await;
    let requests = receiver.requests();
    let hosts: Vec<&str> = requests.iter().map(|request| &host(request)[..1]).collect();
    assert_eq!(hosts, ["a", "b", "c", "a", "b", "c"]);
    assert_eq!(receiver.arrivals(), [0, 0, 1, 1, 2, 2].map(secs));
}

#[tokio::test(start_paused = true)]
async fn order_is_kept_where_it_is_asked_for() {
    for (ordered, expected) in [
        (true, vec!["a", "a", "b", "c"]),
        (false, vec!["a", "b", "c", "a"]),
    ] {
        let (transport, receiver) = receiver(|_| status(200));
        receiver.push(status(500));
        let webhooks = builder().build(transport).unwrap();
        webhooks
            .register(hook("https://a.example/").ordered(ordered))
            .unwrap();
        let _worker = webhooks.start().unwrap();
        for name in ["a", "b", "c"] {
            webhooks.emit(event(name)).await.unwrap();
        }
        advance(secs(10)).await;
        assert_eq!(names(&receiver), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_dead_lets_the_next_of_its_order_go() {
    let (transport, receiver) = receiver(|_| status(200));
    receiver.push(status(302));
    let webhooks = builder().build(transport).unwrap();
    webhooks
        .register(hook("https://a.example/").ordered(true))
        .unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    webhooks.emit(event("b")).await.unwrap();
    settle().await;
    assert_eq!(names(&receiver), ["a", "b"]);
    assert_eq!(
        (webhooks.status().queued, webhooks.dead_letters().len()),
        (0, 1)
    );
}

#[tokio::test(start_paused = true)]
async fn a_breaker_that_is_open_holds_the_lane_and_costs_no_attempt() {
    let (transport, receiver) = receiver(|request| match host(request) {
        "down.example" => status(503),
        _ => status(200),
    });
    let breaker = Settings::new()
        .consecutive_failures(2)
        .reset_timeout(secs(30));
    let webhooks = builder().breaker(breaker).build(transport).unwrap();
    webhooks
        .register(hook("https://down.example/").max_retries(5))
        .unwrap();
    webhooks
        .register(only("https://up.example/", &["up"]))
        .unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    // 0 and 1 s fail, and open it until 31 s.
    advance(secs(10)).await;
    assert_eq!(receiver.arrivals(), [secs(0), secs(1)]);
    assert_eq!(newest(&webhooks).attempt, 2);
    let breakers = webhooks.breakers().unwrap();
    assert!(
        !breakers
            .get("https://down.example:443")
            .unwrap()
            .would_pass()
    );
    // Others are none the worse for it.
    webhooks.emit(event("up")).await.unwrap();
    advance(secs(20)).await;
    assert_eq!(receiver.count(Fate::Answered), 3);
    // The probe fails, and it is open for as long again; then all is well.
    receiver.push(status(503));
    advance(secs(2)).await;
    assert_eq!(receiver.arrivals().last(), Some(&secs(31)));
    receiver.push(status(200));
    receiver.push(status(200));
    advance(secs(28)).await;
    assert_eq!(receiver.call_count(), 4);
    advance(secs(2)).await;
    assert_eq!(receiver.arrivals()[4..], [secs(61), secs(61)]);
    assert!(
        webhooks
            .results(None, None)
            .iter()
            .all(|result| result.status == Status::Delivered)
    );
}

#[tokio::test(start_paused = true)]
async fn a_rate_limit_paces_a_lane() {
    let (transport, receiver) = receiver(|_| status(200));
    let quota = Quota::per_second(1).burst(2);
    let webhooks = builder().rate_limit(quota).build(transport).unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    webhooks
        .register(only("https://b.example/", &["b"]))
        .unwrap();
    let _worker = webhooks.start().unwrap();
    for _ in 0..5 {
        webhooks.emit(event("a")).await.unwrap();
    }
    advance(secs(10)).await;
    assert_eq!(receiver.arrivals(), [0, 0, 1, 2, 3].map(secs));
    assert!(
        webhooks
            .results(None, None)
            .iter()
            .all(|result| result.attempt == 1)
    );
}

#[tokio::test(start_paused = true)]
async fn a_stop_waits_for_its_grace_and_loses_nothing() {
    let (transport, receiver) = receiver(|request| match host(request) {
        "soon.example" => status(200).after(secs(2)),
        "late.example" => status(200).after(secs(10)),
        _ => status(500),
    });
    let webhooks = builder().without_breaker().build(transport).unwrap();
    for url in [
        "https://soon.example/",
        "https://late.example/",
        "https://down.example/",
    ] {
        webhooks.register(hook(url)).unwrap();
    }
    assert_eq!(webhooks.emit(event("a")).await.unwrap(), 3);
    let worker = webhooks.start().unwrap();
    assert_eq!(webhooks.start().unwrap_err(), StartError::Running);
    settle().await;
    assert!(webhooks.status().running);
    let (took, stopped) = elapsed(worker.stop(secs(5))).await;
    assert_eq!(took, secs(5));
    assert_eq!(
        (stopped.finished, stopped.cut_off, stopped.queued),
        (1, 1, 2)
    );
    assert_eq!(receiver.count(Fate::Dropped), 1);
    assert_eq!(receiver.in_flight(), 0);
    let status_of = webhooks.status();
    assert_eq!(
        (status_of.queued, status_of.in_flight, status_of.running),
        (2, 0, false)
    );

    // Nothing begins while it is stopped; what is emitted waits.
    webhooks.emit(event("b")).await.unwrap();
    advance(secs(60)).await;
    assert_eq!(receiver.call_count(), 3);

    let worker = webhooks.start().unwrap();
    advance(secs(60)).await;
    let results = webhooks.results(None, None);
    let delivered = results
        .iter()
        .filter(|result| result.status == Status::Delivered);
    assert_eq!((delivered.count(), results.len()), (4, 6));
    assert_eq!(
        (webhooks.status().queued, webhooks.dead_letters().len()),
        (0, 2)
    );
    // What was cut off has lost no attempt.
    assert!(
        results
            .iter()
            .filter(|r| r.status == Status::Delivered)
            .all(|r| r.attempt == 1)
    );

    // What there is to wait for is waited for, and no longer.
    webhooks
        .unregister(Selector::all().url("https://down.example/"))
        .await;
    webhooks.emit(event("c")).await.unwrap();
    settle().await;
    let (took, stopped) = elapsed(worker.stop(secs(60))).await;
    assert_eq!((took, stopped.finished, stopped.queued), (secs(10), 2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_is_dropped_loses_nothing() {
    let (transport, receiver) = receiver(|_| status(200));
    receiver.push(Step::hang());
    let webhooks = builder().build(transport).unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    webhooks.emit(event("a")).await.unwrap();
    let worker = webhooks.start().unwrap();
    settle().await;
    assert_eq!(webhooks.status().in_flight, 1);
    drop(worker);
    settle().await;
    assert_eq!(
        (webhooks.status().in_flight, webhooks.status().queued),
        (0, 1)
    );
    let _worker = webhooks.start().unwrap();
    settle().await;
    assert_eq!(newest(&webhooks).status, Status::Delivered);
}

#[test]
fn a_runtime_that_is_gone_loses_nothing() {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_time().start_paused(true).build().unwrap()
    };
    let first = runtime();
    let (transport, receiver) = receiver(|_| status(200));
    receiver.push(Step::hang());
    let webhooks = Webhooks::builder().build(transport).unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    assert_eq!(webhooks.start().unwrap_err(), StartError::NoRuntime);
    let worker = first.block_on(async {
        webhooks.emit(event("a")).await.unwrap();
        let worker = webhooks.start().unwrap();
        settle().await;
        worker
    });
    drop(first);
    drop(worker);
    assert_eq!(
        (webhooks.status().in_flight, webhooks.status().queued),
        (0, 1)
    );
    runtime().block_on(async {
        let _worker = webhooks.start().unwrap();
        settle().await;
        assert_eq!(newest(&webhooks).status, Status::Delivered);
    });
}

#[tokio::test(start_paused = true)]
async fn what_a_store_keeps_goes_on_in_another_process() {
    let store = MemoryStore::new();
    let hooks = || hook("https://a.example/").id("mine");
    {
        let (transport, _receiver) = receiver(|_| status(500));
        let webhooks = builder().store(store.clone()).build(transport).unwrap();
        webhooks.register(hooks()).unwrap();
        webhooks
            .register(only("https://b.example/", &["b"]).id("gone"))
            .unwrap();
        let worker = webhooks.start().unwrap();
        webhooks.emit(event("dead")).await.unwrap();
        advance(secs(10)).await;
        webhooks.emit(event("b").id("msg_b")).await.unwrap();
        settle().await;
        let stopped = worker.stop(secs(1)).await;
        assert_eq!(stopped.queued, 2);
        assert_eq!(store.len(), (2, 1));
    }
    let (transport, receiver) = receiver(|_| status(200));
    let began = buttress_core::clock::now();
    let webhooks = builder()
        .wall_clock(move || secs(EPOCH + 10) + (buttress_core::clock::now() - began))
        .store(store.clone())
        .build(transport)
        .unwrap();
    webhooks.register(hooks()).unwrap();
    let _worker = webhooks.start().unwrap();
    settle().await;
    assert_eq!(
        (webhooks.status().queued, webhooks.dead_letters().len()),
        (2, 1)
    );
    // Its second attempt is due a second after the first.
    assert_eq!(receiver.call_count(), 0);
    advance(secs(2)).await;
    assert_eq!(receiver.arrivals(), [secs(1)]);
    assert_eq!(receiver.requests()[0].headers()["webhook-id"], "msg_b");
    // The other waits for its registration.
    assert_eq!(webhooks.status().queued, 1);
    webhooks
        .register(hook("https://b.example/").id("gone"))
        .unwrap();
    settle().await;
    assert_eq!((receiver.call_count(), webhooks.status().queued), (2, 0));
    let letter = webhooks.dead_letters().remove(0).record.id;
    webhooks.redrive(letter).await.unwrap();
    settle().await;
    assert_eq!(names(&receiver), ["b", "b", "dead"]);
    assert!(store.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_nobody_claims_is_a_dead_letter_after_an_hour() {
    let store = MemoryStore::new();
    let first = {
        let (transport, _receiver) = receiver(|_| status(500));
        let webhooks = builder().store(store.clone()).build(transport).unwrap();
        webhooks
            .register(hook("https://a.example/").id("mine"))
            .unwrap();
        webhooks.emit(event("a")).await.unwrap();
        newest(&webhooks).id
    };
    let (transport, receiver) = receiver(|_| status(200));
    let webhooks = builder().store(store.clone()).build(transport).unwrap();
    let _worker = webhooks.start().unwrap();
    advance(secs(3599)).await;
    assert_eq!(webhooks.status().queued, 1);
    advance(secs(1)).await;
    assert_eq!(webhooks.status().queued, 0);
    let letter = webhooks.dead_letters().remove(0);
    assert_eq!(
        (letter.record.id, letter.cause),
        (first, Cause::Unregistered)
    );
    // Who comes late has it sent again.
    webhooks
        .register(hook("https://a.example/").id("mine"))
        .unwrap();
    assert_eq!(webhooks.redrive_all(None).await.queued, 1);
    settle().await;
    assert_eq!((receiver.call_count(), store.is_empty()), (1, true));
}

/// Fails as it is told.
#[derive(Clone, Default)]
struct Faulty {
    memory: MemoryStore,
    refuses: Arc<std::sync::atomic::AtomicBool>,
}

impl Faulty {
    fn or<'a, T: Send + 'a>(&self, done: StoreFuture<'a, T>) -> StoreFuture<'a, T> {
        if self.refuses.load(std::sync::atomic::Ordering::SeqCst) {
            return Box::pin(std::future::ready(Err("the store is down".into())));
        }
        done
    }
}

impl DeliveryStore for Faulty {
    fn accept(&self, records: Vec<Record>) -> StoreFuture<'_, ()> {
        self.or(Box::pin(async { self.memory.accept(records).await }))
    }
    fn retry(
        &self,
        id: buttress_delivery::DeliveryId,
        attempts: u32,
        due: std::time::Duration,
    ) -> StoreFuture<'_, ()> {
        self.or(self.memory.retry(id, attempts, due))
    }
    fn settle(&self, id: buttress_delivery::DeliveryId) -> StoreFuture<'_, ()> {
        self.or(Box::pin(async move { self.memory.settle(id).await }))
    }
    fn bury(&self, letter: buttress_delivery::DeadLetter) -> StoreFuture<'_, ()> {
        self.or(self.memory.bury(letter))
    }
    fn drop_letter(&self, id: buttress_delivery::DeliveryId) -> StoreFuture<'_, ()> {
        self.or(self.memory.drop_letter(id))
    }
    fn load(&self) -> StoreFuture<'_, Kept> {
        self.or(self.memory.load())
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_store_does_not_keep_is_not_accepted() {
    let store = Faulty::default();
    let switch = Arc::clone(&store.refuses);
    let refuse = |refuses| switch.store(refuses, std::sync::atomic::Ordering::SeqCst);
    let (transport, receiver) = receiver(|_| status(200));
    let webhooks = builder()
        .capacity(1)
        .store(store.clone())
        .build(transport)
        .unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    refuse(true);
    let worker = webhooks.start().unwrap();
    for _ in 0..3 {
        let refused = webhooks.emit(event("a")).await.unwrap_err();
        assert!(matches!(&refused, EmitError::Store(error) if error.to_string().contains("down")));
    }
    assert_eq!(webhooks.status().queued, 0);
    refuse(false);
    // The room is free, and the worker reads the store when it can.
    webhooks.emit(event("b")).await.unwrap();
    advance(secs(2)).await;
    assert_eq!(names(&receiver), ["b"]);
    // What it does not hear of later is delivered all the same.
    webhooks.emit(event("c")).await.unwrap();
    refuse(true);
    advance(secs(2)).await;
    assert_eq!(newest(&webhooks).status, Status::Delivered);
    assert_eq!(store.memory.len(), (1, 0));
    drop(worker);
}

#[tokio::test(start_paused = true)]
async fn subscribers_hear_of_their_scope_and_of_what_they_missed() {
    let (transport, receiver) = receiver(|_| status(200));
    receiver.push(status(500));
    let webhooks = builder().subscriber_capacity(2).build(transport).unwrap();
    webhooks
        .register(hook("https://a.example/").scope(Scope::request("r")))
        .unwrap();
    let mut mine = webhooks.subscribe(Some(Scope::request("r")));
    let mut others = webhooks.subscribe(Some(Scope::Global));
    let mut slow = webhooks.subscribe(None);
    let worker = webhooks.start().unwrap();
    webhooks.emit(event("a").request_id("r")).await.unwrap();
    let mut statuses = Vec::new();
    for _ in 0..3 {
        let update = mine.recv().await.unwrap();
        statuses.push((update.result.status, update.missed));
    }
    assert_eq!(
        statuses,
        [
            (Status::Pending, 0),
            (Status::Retrying, 0),
            (Status::Delivered, 0)
        ]
    );
    assert!(others.try_recv().is_none());
    let update = slow.recv().await.unwrap();
    assert_eq!((update.result.status, update.missed), (Status::Retrying, 1));
    drop((worker, webhooks));
    settle().await;
    assert!(mine.recv().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn results_are_kept_within_their_bounds() {
    let (transport, _receiver) = receiver(|_| status(200));
    let webhooks = builder().max_results(5, 3).build(transport).unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    webhooks
        .register(hook("https://a.example/").scope(Scope::request("r")))
        .unwrap();
    let _worker = webhooks.start().unwrap();
    for _ in 0..10 {
        webhooks.emit(event("a").request_id("r")).await.unwrap();
        settle().await;
    }
    assert_eq!(webhooks.results(None, None).len(), 5);
    assert_eq!(webhooks.results(Some(&Scope::request("r")), None).len(), 3);
    assert_eq!(webhooks.results(None, 2).len(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_transport_is_called_as_a_service_may_be() {
    // Clones that start unready, readiness that comes late.
    let script = Script::new()
        .ready_after(secs(1))
        .otherwise(|_: &Sent| status(200));
    let (transport, receiver) = script.build();
    let webhooks = builder().build(transport).unwrap();
    webhooks
        .register(hook("https://a.example/").timeout(secs(2)))
        .unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    advance(secs(1)).await;
    assert_eq!(newest(&webhooks).status, Status::Delivered);
    // Readiness is in the attempt's time.
    receiver.set_unready();
    webhooks.emit(event("b")).await.unwrap();
    advance(secs(2)).await;
    assert_eq!(newest(&webhooks).error, Some(Cause::Timeout));
    receiver.assert_sound();
    assert_eq!(receiver.reserved(), 0);
}

#[tokio::test(start_paused = true)]
async fn settings_and_registrations_that_make_no_sense() {
    let build = |builder: buttress_delivery::WebhooksBuilder| {
        let (transport, _receiver) = receiver(|_| status(200));
        builder
            .build(transport)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    for (builder, problem) in [
        (builder().name(""), "the name"),
        (builder().capacity(0), "the capacity must"),
        (builder().concurrency(8), ""),
        (builder().concurrency(7).lane_concurrency(4), "a lane may"),
        (builder().lane_capacity(1001), "a lane cannot"),
        (builder().max_dead_letters(0), "the dead letters"),
        (
            builder().breaker(Settings::new().consecutive_failures(0)),
            "the breaker: ",
        ),
        (
            builder().rate_limit(Quota::per_second(0)),
            "the rate limit: ",
        ),
    ] {
        match build(builder) {
            Ok(()) => assert_eq!(problem, ""),
            Err(error) => assert!(error.starts_with(problem) && !problem.is_empty(), "{error}"),
        }
    }
    let (transport, _receiver) = receiver(|_| status(200));
    let webhooks = builder()
        .max_registrations(1)
        .max_body(60)
        .build(transport)
        .unwrap();
    webhooks
        .register(hook("https://a.example/").id("mine"))
        .unwrap();
    let taken = webhooks
        .register(hook("https://a.example/").id("mine"))
        .unwrap_err();
    assert_eq!(taken, RegisterError::Taken("mine".into()));
    let many = webhooks.register(hook("https://a.example/")).unwrap_err();
    assert_eq!(many, RegisterError::TooMany { most: 1 });
    let refused = webhooks.emit(event("a")).await.unwrap_err();
    assert!(matches!(refused, EmitError::TooLarge { most: 60 }));
    // The room it had taken is free again.
    assert_eq!(webhooks.status().queued, 0);
    let full = (0..1001)
        .map(|_| event_raw())
        .map(|event| webhooks.emit(event));
    let mut accepted = 0;
    for emitted in full {
        accepted += emitted.await.unwrap_or(0);
    }
    assert_eq!(accepted, 1000);
}

fn event_raw() -> buttress_delivery::Event {
    buttress_delivery::Event::raw("a", "text/plain", "x")
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_others_are_not_asked() {
    let (transport, receiver) = receiver(|_| status(200));
    let webhooks = builder().capacity(100_000).build(transport).unwrap();
    for number in 0..10_000 {
        let registration =
            buttress_delivery::Registration::new(format!("https://h{number}.example/"));
        let registration =
            registration.events([format!("other.n{number}"), format!("under.n{number}.*")]);
        webhooks.register(registration).unwrap();
    }
    for number in 0..10 {
        webhooks
            .register(only(&format!("https://mine{number}.example/"), &["x.*"]))
            .unwrap();
    }
    assert_eq!(webhooks.emit(event("x.y.z")).await.unwrap(), 10);
    assert_eq!(webhooks.emit(event("other.n77")).await.unwrap(), 1);
    assert_eq!(webhooks.emit(event("under.n5.a.b")).await.unwrap(), 1);
    let _worker = webhooks.start().unwrap();
    advance(secs(1)).await;
    assert_eq!(receiver.call_count(), 12);
}

#[tokio::test(start_paused = true)]
async fn a_secret_is_rotated_while_it_serves() {
    let (transport, receiver) = receiver(|_| status(200));
    receiver.push(status(500));
    let webhooks = builder().build(transport).unwrap();
    let old = Secret::from_bytes([7; 32]).unwrap();
    let registration = hook("https://a.example/").signed_by(Standard::new(), [old]);
    let id = webhooks.register(registration.unwrap()).unwrap();
    let _worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    settle().await;
    let new = Signer::new(Standard::new(), [secret()]).unwrap();
    assert!(webhooks.sign_by(&id, new.clone()));
    assert!(!webhooks.sign_by(&"other".into(), new));
    // The retry of what was queued before is signed by it, too.
    advance(secs(1)).await;
    let requests = receiver.requests();
    let signed: Vec<bool> = (0..2)
        .map(|n| is_signed(Standard::new(), &requests[n], secs(EPOCH)))
        .collect();
    assert_eq!(signed, [false, true]);
}

#[tokio::test(start_paused = true)]
async fn a_rate_is_replaced_while_it_serves() {
    let (transport, receiver) = receiver(|_| status(200));
    let webhooks = builder()
        .rate_limit(Quota::per_hour(1))
        .build(transport)
        .unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    let _worker = webhooks.start().unwrap();
    let limits = webhooks.rate_limits().unwrap();
    let lane = buttress_core::key::Key::from("https://a.example:443");
    limits
        .set_quota_for("webhooks", &lane, Some(Quota::per_second(1)))
        .unwrap();
    for _ in 0..3 {
        webhooks.emit(event("a")).await.unwrap();
    }
    advance(secs(5)).await;
    assert_eq!(receiver.arrivals(), [0, 1, 2].map(secs));
}

#[tokio::test(start_paused = true)]
async fn who_asks_to_be_left_alone_speaks_for_itself() {
    // One host, two tenants.
    let (transport, receiver) = receiver(|request| match request.uri().path() {
        "/busy" => with(429, &[("retry-after", "3600")], ScriptedBody::new()),
        _ => status(200),
    });
    let webhooks = builder().build(transport).unwrap();
    webhooks.register(hook("https://a.example/busy")).unwrap();
    webhooks.register(hook("https://a.example/other")).unwrap();
    let _worker = webhooks.start().unwrap();
    for _ in 0..10 {
        webhooks.emit(event("a")).await.unwrap();
        advance(secs(1)).await;
    }
    assert_eq!(receiver.call_count(), 11);
    assert_eq!(webhooks.status().queued, 10);
    // All of them at once, and none before its time.
    advance(secs(3600)).await;
    assert_eq!(receiver.arrivals()[11], secs(3600));
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_panics_ends_neither_the_worker_nor_the_process() {
    let panics = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let broken = Arc::clone(&panics);
    let (transport, _receiver) = receiver(|_| status(200).after(secs(1)));
    let webhooks = builder()
        .wall_clock(move || {
            assert!(
                !broken.load(std::sync::atomic::Ordering::SeqCst),
                "on purpose"
            );
            secs(EPOCH)
        })
        .build(transport)
        .unwrap();
    webhooks.register(hook("https://a.example/")).unwrap();
    let worker = webhooks.start().unwrap();
    webhooks.emit(event("a")).await.unwrap();
    settle().await;
    panics.store(true, std::sync::atomic::Ordering::SeqCst);
    advance(secs(5)).await;
    assert_eq!(webhooks.status().queued, 1);
    panics.store(false, std::sync::atomic::Ordering::SeqCst);
    advance(secs(5)).await;
    assert_eq!(newest(&webhooks).status, Status::Delivered);
    // A grace without end is one.
    assert_eq!(worker.stop(std::time::Duration::MAX).await.queued, 0);
}
