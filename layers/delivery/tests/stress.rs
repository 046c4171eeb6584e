//! Many at once, on several threads: whatever is accepted ends, once.

mod common;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
};

use buttress_core::testing::Step;
use buttress_delivery::{MemoryStore, Selector, Status, Webhooks};
use common::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_accepted_ends_once() {
    let calls = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&calls);
    let (transport, _receiver) = receiver(move |_| match counter.fetch_add(1, SeqCst) % 7 {
        0 => status(500),
        1 => status(302),
        2 => Step::err("reset"),
        3 => status(200).after(millis(2)),
        _ => status(200),
    });
    let store = MemoryStore::new();
    let webhooks = Webhooks::builder()
        .capacity(64)
        .concurrency(8)
        .lane_concurrency(2)
        .subscriber_capacity(100_000)
        .without_breaker()
        .store(store.clone())
        .build(transport)
        .unwrap();
    for number in 0..8 {
        let registration = hook(&format!("https://h{}.example/", number / 2))
            .retry_delay(millis(1))
            .ordered(number % 3 == 0);
        webhooks.register(registration).unwrap();
    }
    let mut updates = webhooks.subscribe(None);
    let accepted = Arc::new(AtomicUsize::new(0));
    let emitters: Vec<_> = (0..4)
        .map(|_| {
            let (webhooks, accepted) = (webhooks.clone(), Arc::clone(&accepted));
            tokio::spawn(async move {
                let mut sent = 0;
                // Ends: whatever is full empties itself.
                while sent < 50 {
                    match webhooks.emit(event("a")).await {
                        Ok(count) => {
                            accepted.fetch_add(count, SeqCst);
                            sent += 1;
                        }
                        Err(_) => tokio::time::sleep(millis(1)).await,
                    }
                }
            })
        })
        .collect();
    // Others come and go meanwhile, and so does the worker.
    let mut worker = webhooks.start().unwrap();
    for round in 0..10 {
        let registration = hook("https://brief.example/").retry_delay(millis(1));
        webhooks.register(registration).unwrap();
        tokio::time::sleep(millis(5)).await;
        webhooks
            .unregister(Selector::all().url("https://brief.example/"))
            .await;
        if round % 3 == 0 {
            worker.stop(millis(round)).await;
            worker = webhooks.start().unwrap();
        }
        for letter in webhooks.dead_letters().into_iter().take(2) {
            if webhooks.redrive(letter.record.id).await.is_ok() {
                accepted.fetch_add(1, SeqCst);
            }
        }
    }
    for emitter in emitters {
        emitter.await.unwrap();
    }
    for _ in 0..10_000 {
        if webhooks.status().queued == 0 {
            break;
        }
        tokio::time::sleep(millis(1)).await;
    }
    let stopped = worker.stop(secs(10)).await;
    assert_eq!((stopped.queued, stopped.cut_off), (0, 0));

    let mut ends: HashMap<_, u32> = HashMap::new();
    let mut failed = 0;
    while let Some(update) = updates.try_recv() {
        assert_eq!(update.missed, 0);
        if update.result.status.is_final() {
            *ends.entry(update.result.id).or_default() += 1;
            failed += u32::from(update.result.status == Status::Failed);
        }
    }
    assert_eq!(ends.len(), accepted.load(SeqCst));
    assert!(ends.values().all(|times| *times == 1));
    assert!(failed > 0 && calls.load(SeqCst) >= ends.len() as u64 / 2);
    // The store has heard of all of it.
    assert_eq!(store.len(), (0, webhooks.dead_letters().len()));
}
