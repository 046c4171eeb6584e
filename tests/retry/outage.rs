//! Everything fails: what the upstream counts is bounded.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use buttress::{
    circuit_breaker,
    retry::{GiveUp, RetryBudget},
};
use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::support::{
    Act, Bed, Caller, HELLO, MS, UNAVAILABLE, Upstream, attempts, http1, never, run,
};

type Client = Caller<Empty<Bytes>>;

fn client(budget: RetryBudget) -> Client {
    Caller::with(http1(), never(), |retry| {
        retry.settings(attempts(5)).budget(budget)
    })
}

/// So many requests, a bounded number at a time; says how many answers were
/// not 200.
async fn send(client: &Client, upstream: &Upstream, requests: usize) -> usize {
    let (left, failed) = (
        Arc::new(AtomicUsize::new(requests)),
        Arc::new(AtomicUsize::new(0)),
    );
    let mut callers = JoinSet::new();
    for _ in 0..20 {
        let (client, url) = (client.clone(), upstream.url());
        let (left, failed) = (Arc::clone(&left), Arc::clone(&failed));
        callers.spawn(async move {
            let take = |left: usize| left.checked_sub(1);
            while left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
                .is_ok()
            {
                let request = Request::get(&url).body(Empty::new()).unwrap();
                if client.send(request).await.unwrap().status != 200 {
                    failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    callers.join_all().await;
    failed.load(Ordering::Relaxed)
}

async fn dead(bed: &Bed) -> Upstream {
    let upstream = bed.upstream([]).await;
    upstream.otherwise(Act::Answer(UNAVAILABLE));
    upstream
}

/// How many seconds, with that of the minimum's burst.
fn seconds(since: Instant) -> usize {
    usize::try_from(since.elapsed().as_secs()).unwrap() + 2
}

#[test]
fn a_thousand_requests_in_a_total_outage() {
    run(async |bed| {
        let upstream = dead(&bed).await;
        let client = client(RetryBudget::new(20, 3).unwrap());
        let began = Instant::now();
        assert_eq!(send(&client, &upstream, 1_000).await, 1_000);
        let most = 1_200 + 3 * seconds(began);
        let came = upstream.requests();
        assert!(came <= most, "{came} of {most}");
        // What there is is used: all but what the first of them had not yet
        // paid in when others asked, and what the last have paid in.
        assert!(came >= 1_150, "{came}");
        assert_eq!(client.gave_up().len(), 1_000);
        assert!(client.gave_up().contains(&GiveUp::Budget));
        assert_eq!(client.causes().len(), came - 1_000);
    });
}

/// When all was well before, what was saved up then comes on top, and no more
/// than may be.
#[test]
fn an_outage_after_health() {
    run(async |bed| {
        let upstream = bed.upstream([]).await;
        upstream.otherwise(Act::Answer(HELLO));
        let client = client(RetryBudget::new(20, 3).unwrap().saving(30).unwrap());
        assert_eq!(send(&client, &upstream, 400).await, 0);
        assert_eq!(upstream.requests(), 400);

        upstream.otherwise(Act::Answer(UNAVAILABLE));
        let began = Instant::now();
        assert_eq!(send(&client, &upstream, 200).await, 200);
        let retries = upstream.requests() - 600;
        let most = 40 + 30 + 3 * seconds(began);
        assert!(retries <= most, "{retries} of {most}");
        assert!(retries >= 60, "{retries}");
    });
}

/// No budget: five attempts each.
#[test]
fn without_a_budget_an_outage_is_multiplied() {
    run(async |bed| {
        let upstream = dead(&bed).await;
        let client = Caller::new(http1(), attempts(5));
        assert_eq!(send(&client, &upstream, 50).await, 50);
        assert_eq!(upstream.requests(), 250);
    });
}

/// The breaker inside ends it sooner: what it refuses does not come there.
#[test]
fn with_a_breaker_an_outage_is_cut_short() {
    run(async |bed| {
        let upstream = dead(&bed).await;
        let opens = circuit_breaker::Settings::aggressive();
        let client = Caller::with(http1(), opens, |retry| retry.settings(attempts(5)));
        let request = || Request::get(upstream.url()).body(Empty::new()).unwrap();
        for _ in 0..2 {
            // It would wait as long as the breaker says, 10 s.
            let waits = timeout(500 * MS, client.send(request()));
            assert!(waits.await.is_err());
            assert_eq!(upstream.requests(), 3);
        }
    });
}
