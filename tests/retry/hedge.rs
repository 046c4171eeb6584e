//! Hedges on real sockets, `hedge → hyper-util's client`: what the callee sees
//! of both attempts, and of the one that lost.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress::{
    BoxError,
    retry::{HedgeBuilder, HedgeLayer, HedgePolicy, Memory, RetryBudget, RetryLayer, SharedBudget},
    timeout::TimeoutLayer,
};
use bytes::Bytes;
use h2::Reason;
use http::{HeaderValue, Request, Uri};
use http_body_util::{BodyExt, Empty, Full, channel::Channel};
use hyper::body::Body;
use hyper_util::{
    client::legacy::{self, Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tower::{Layer, ServiceExt, service_fn};

use crate::{
    bodies::{boxed, put, streaming, trailers},
    http2,
    support::{
        Act, Answer, Bed, BoxBody, HELLO, LONG, MS, Service, Transport, UNAVAILABLE, Upstream,
        attempts, boxed_service, exchange, http1, http2, payload, run, until,
    },
};

const LEN: usize = 60_000;
const DELAY: Duration = Duration::from_millis(30);
const SLOW: Act = Act::Slow(Duration::from_millis(50));
const LATER_503: &str =
    "HTTP/1.1 503 Service Unavailable\r\nretry-after: 7\r\ncontent-length: 5\r\n\r\nlater";

/// A client that hedges, and how often it has.
#[derive(Clone)]
struct Caller<B> {
    service: Service<B>,
    policy: HedgePolicy,
    hedges: Arc<AtomicUsize>,
}

impl<B> Caller<B>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    fn new(http: Transport<B>) -> Self {
        Self::with(http, |hedge| hedge)
    }

    fn with(http: Transport<B>, change: impl FnOnce(HedgeBuilder) -> HedgeBuilder) -> Self {
        let hedges = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&hedges);
        let layer = change(HedgeLayer::builder().after(DELAY))
            .on_hedge(move |_, _| {
                count.fetch_add(1, Ordering::SeqCst);
            })
            .build()
            .unwrap();
        Self {
            service: boxed_service(layer.layer(http)),
            policy: layer.policy().clone(),
            hedges,
        }
    }

    async fn send(&self, request: Request<B>) -> Result<Answer, legacy::Error> {
        exchange(self.service.clone(), request).await
    }

    fn hedges(&self) -> usize {
        self.hedges.load(Ordering::SeqCst)
    }
}

fn get(upstream: &Upstream) -> Request<Empty<Bytes>> {
    Request::get(upstream.url()).body(Empty::new()).unwrap()
}

/// The first that loses is closed, the second is kept for what comes.
#[test]
fn the_slow_first_is_overtaken_and_closed() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Hang]).await;
        let caller = Caller::new(http1());
        let data = payload(LEN);
        let request = put(&upstream, Full::new(data.clone()));
        let answer = caller.send(request).await.unwrap();
        assert_eq!((answer.status, answer.body.unwrap()), (200, data.clone()));
        until("the first is closed", || upstream.request(0).gone).await;
        until("the second is kept", || bed.sockets() == 1).await;
        assert_eq!((upstream.requests(), caller.hedges()), (2, 1));
        assert_eq!(upstream.connections(), 2);
        for seen in upstream.seen() {
            assert_eq!(seen.header("content-length"), Some("60000"));
            assert!(seen.whole && seen.body == data);
        }
    });
}

#[test]
fn a_hedge_that_is_overtaken_is_closed() {
    run(async |bed| {
        let acts = [Act::Once(2, &Act::Answer(HELLO)), Act::Hang];
        let upstream = bed.upstream(acts).await;
        let caller = Caller::new(http1());
        let answer = caller.send(get(&upstream)).await.unwrap();
        assert_eq!(answer.body.unwrap(), "hello");
        until("the hedge is closed", || upstream.request(1).gone).await;
        until("the first is kept", || bed.sockets() == 1).await;
        assert_eq!(upstream.requests(), 2);
    });
}

/// A client of which the first connection never comes about.
fn connects_second(http2_only: bool) -> Service<BoxBody> {
    let connects = Arc::new(AtomicUsize::new(0));
    let connector = service_fn(move |uri: Uri| {
        let first = connects.fetch_add(1, Ordering::SeqCst) == 0;
        Box::pin(async move {
            if first {
                std::future::pending::<()>().await;
            }
            HttpConnector::new().oneshot(uri).await
        })
    });
    let http = Client::builder(TokioExecutor::new())
        .http2_only(http2_only)
        .build(connector);
    let layer = HedgeLayer::builder().after(DELAY).build().unwrap();
    boxed_service(layer.layer(http))
}

/// But where the first holds a body of which it has read nothing, and over
/// HTTP/2, where hyper-util makes one connection at a time for both: that is
/// for a limit to connecting.
#[test]
fn a_first_that_never_connects_is_overtaken() {
    run(async |bed| {
        let upstream = bed.upstream([]).await;
        let empty = || put(&upstream, boxed(Empty::new()));
        let answer = exchange(connects_second(false), empty()).await.unwrap();
        assert_eq!((answer.status, upstream.connections()), (200, 1));

        let request = put(&upstream, boxed(Full::new(payload(LEN))));
        for (http2_only, request) in [(false, request), (true, empty())] {
            let waits = exchange(connects_second(http2_only), request);
            assert!(timeout(10 * DELAY, waits).await.is_err());
            assert_eq!(upstream.requests(), 1, "HTTP/2: {http2_only}");
        }
    });
}

/// All that lose, not the last of them only.
#[test]
fn of_four_attempts_three_are_closed() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Hang; 3]).await;
        let caller = Caller::with(http1(), |hedge| hedge.max_hedges(3));
        let data = payload(LEN);
        let request = put(&upstream, Full::new(data.clone()));
        let answer = caller.send(request).await.unwrap();
        assert_eq!(answer.body.unwrap(), data);
        until("they are closed", || {
            upstream.seen()[..3].iter().all(|seen| seen.gone)
        })
        .await;
        until("the last is kept", || bed.sockets() == 1).await;
        assert_eq!(upstream.requests(), 4);
        assert!(upstream.seen().iter().all(|seen| seen.body == data));
    });
}

/// Its stream alone: the connection is the other's too.
#[test]
fn over_http2_the_loser_is_reset() {
    run(async |bed| {
        let upstream = http2::Upstream::start(&bed, [http2::Act::Hang]).await;
        let caller = Caller::new(http2());
        let data = payload(LEN);
        let body = Full::new(data.clone()).with_trailers(std::future::ready(Some(Ok(trailers()))));
        let answer = caller.send(upstream.request("PUT", body)).await.unwrap();
        assert_eq!(answer.status, 200);
        until("the first is reset", || {
            upstream.seen()[0].reset == Some(Reason::CANCEL)
        })
        .await;
        let seen = upstream.seen();
        assert_eq!((seen.len(), bed.sockets()), (2, 1));
        assert_eq!(seen[1].reset, None);
        assert_eq!(seen[1].trailers, Some(trailers()));
        assert!(seen.iter().all(|seen| seen.body == data));
    });
}

/// The first attempt has read it to its end when it is looked at once more,
/// after 100, 200, 300 and 400 ms.
#[test]
fn a_body_that_streams_slowly_is_the_same_on_both() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Hang]).await;
        let caller = Caller::with(http1(), |hedge| hedge.after(100 * MS));
        let data = payload(LEN);
        let (mut sender, body) = Channel::<Bytes>::new(1);
        let writes = async {
            let mut rest = data.clone();
            sender.send_data(rest.split_to(1_500)).await.unwrap();
            sleep(150 * MS).await;
            while !rest.is_empty() {
                let chunk = rest.split_to(rest.len().min(9_000));
                sender.send_data(chunk).await.unwrap();
            }
            sender.send_trailers(trailers()).await.unwrap();
            drop(sender);
        };
        let mut request = put(&upstream, body);
        request
            .headers_mut()
            .insert("trailer", HeaderValue::from_static("x-checksum"));
        let (answer, ()) = tokio::join!(caller.send(request), writes);
        assert_eq!(answer.unwrap().body.unwrap(), data);
        assert_eq!((upstream.requests(), caller.hedges()), (2, 1));
        for seen in upstream.seen() {
            assert!(seen.whole && seen.body == data);
            assert_eq!(seen.trailers, "x-checksum: 42\r\n");
        }
    });
}

/// It is slow by itself: another attempt would not be faster.
#[test]
fn a_body_that_streams_longer_goes_once() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Slow(200 * MS)]).await;
        let memory = Memory::new(1 << 20);
        let caller = Caller::with(http1(), |hedge| hedge.after(20 * MS).memory(memory.clone()));
        let data = payload(LEN);
        let (mut sender, body) = Channel::<Bytes>::new(1);
        let writes = async {
            let mut rest = data.clone();
            sender.send_data(rest.split_to(1_500)).await.unwrap();
            // It was looked at four times, and given up: what was kept is free.
            until("it is kept", || memory.used() > 0).await;
            until("it is no more kept", || memory.used() == 0).await;
            sender.send_data(rest).await.unwrap();
            drop(sender);
        };
        let (answer, ()) = tokio::join!(caller.send(put(&upstream, body)), writes);
        assert_eq!(answer.unwrap().body.unwrap(), data);
        assert_eq!((upstream.requests(), caller.hedges()), (1, 0));
        assert_eq!(upstream.last().body, data);
    });
}

#[test]
fn a_body_over_the_cap_goes_once() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Slow(150 * MS); 2]).await;
        let caller = Caller::new(http1());
        let data = payload(64 * 1024 + 1);
        for body in [boxed(Full::new(data.clone())), boxed(streaming(&data))] {
            let answer = caller.send(put(&upstream, body)).await.unwrap();
            assert_eq!(answer.body.unwrap(), data);
        }
        assert_eq!((upstream.requests(), caller.hedges()), (2, 0));
    });
}

#[test]
fn a_post_is_hedged_with_a_key_only() {
    run(async |bed| {
        let acts = [Act::Slow(150 * MS), Act::Hang];
        let upstream = bed.upstream(acts).await;
        let caller = Caller::new(http1());
        let data = payload(LEN);
        let post = || {
            Request::post(upstream.url())
                .body(Full::new(data.clone()))
                .unwrap()
        };
        let answer = caller.send(post()).await.unwrap();
        assert_eq!(answer.body.unwrap(), data);
        assert_eq!((upstream.requests(), caller.hedges()), (1, 0));

        let mut keyed = post();
        let key = HeaderValue::from_static("8e03978e-40d5-43dd-bc93-6894a57f9324");
        keyed.headers_mut().insert("idempotency-key", key.clone());
        let answer = caller.send(keyed).await.unwrap();
        assert_eq!(answer.body.unwrap(), data);
        assert_eq!((upstream.requests(), caller.hedges()), (3, 1));
        for seen in &upstream.seen()[1..] {
            assert_eq!(seen.header("idempotency-key"), key.to_str().ok());
            assert_eq!(seen.body, data);
        }
    });
}

/// A bad answer waits for the other, whichever it is.
#[test]
fn one_that_fails_leaves_it_to_the_other() {
    run(async |bed| {
        for bad in [
            &Act::Answer(UNAVAILABLE),
            &Act::Reset(LEN),
            &Act::AnswerAndClose(""),
        ] {
            for acts in [
                // The bad one first, and the good one when that is through.
                [Act::Once(2, bad), SLOW],
                [Act::Once(2, &SLOW), *bad],
            ] {
                let upstream = bed.upstream(acts).await;
                let caller = Caller::new(http1());
                let data = payload(LEN);
                let request = put(&upstream, Full::new(data.clone()));
                let answer = caller.send(request).await.unwrap();
                assert_eq!((answer.status, answer.body.unwrap()), (200, data));
                assert_eq!(upstream.requests(), 2, "{acts:?}");
            }
        }
    });
}

/// And there is no third.
#[test]
fn both_fail() {
    run(async |bed| {
        let caller = Caller::with(http1(), |hedge| hedge.max_hedges(1));
        let later = &Act::Answer(LATER_503);
        let sorry = &Act::Answer(UNAVAILABLE);
        for acts in [[later, sorry], [sorry, later]] {
            let acts = acts.map(|act| Act::Once(2, act));
            let upstream = bed.upstream(acts).await;
            let answer = caller.send(get(&upstream)).await.unwrap();
            // In whatever order they come.
            assert_eq!(answer.headers["retry-after"], "7");
            assert_eq!(
                (answer.status, answer.body.unwrap()),
                (503, "later".as_bytes().into())
            );
            assert_eq!(upstream.requests(), 2);
        }

        let upstream = bed.upstream([Act::Once(2, &Act::Reset(0)); 2]).await;
        caller.send(get(&upstream)).await.unwrap_err();
        assert_eq!(upstream.requests(), 2);
        // The good connections are kept.
        until("those that failed are closed", || bed.sockets() <= 4).await;
    });
}

/// All attempts go with it, and what it would have sent yet.
#[test]
fn a_client_that_goes_away() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Hang; 17]).await;
        let caller = Caller::with(http1(), |hedge| hedge.max_hedges(16));
        let sent = caller.clone();
        let request = put(&upstream, Full::new(payload(LEN)));
        let send = tokio::spawn(async move { sent.send(request).await.map(drop) });
        until("three hang", || upstream.whole() >= 3).await;
        send.abort();
        assert!(send.await.unwrap_err().is_cancelled());
        let hedges = caller.hedges();
        until("all are closed", || bed.sockets() == 0).await;
        sleep(3 * DELAY).await;
        assert_eq!(caller.hedges(), hedges);
        assert!(upstream.requests() <= 1 + hedges);
        let seen = upstream.seen();
        assert!(seen.iter().all(|seen| seen.gone || !seen.whole));
        assert_eq!(bed.sockets(), 0);
    });
}

#[test]
fn a_client_that_goes_away_over_http2() {
    run(async |bed| {
        let upstream = http2::Upstream::start(&bed, [http2::Act::Hang; 3]).await;
        let caller = Caller::with(http2(), |hedge| hedge.max_hedges(2));
        let sent = caller.clone();
        let request = upstream.request("PUT", Full::new(payload(20_000)));
        let send = tokio::spawn(async move { sent.send(request).await.map(drop) });
        until("three hang", || {
            let seen = upstream.seen();
            seen.len() == 3 && seen.iter().all(|seen| seen.body.len() == 20_000)
        })
        .await;
        send.abort();
        assert!(send.await.unwrap_err().is_cancelled());
        until("all are reset", || {
            let mut seen = upstream.seen().into_iter();
            seen.all(|seen| seen.reset == Some(Reason::CANCEL))
        })
        .await;
        assert_eq!(bed.sockets(), 1);
    });
}

#[test]
fn the_delay_is_learned_from_real_answers() {
    const LATE: Duration = Duration::from_secs(60);
    run(async |bed| {
        let mut acts = [Act::Slow(20 * MS); 21];
        acts[20] = Act::Hang;
        let upstream = bed.upstream(acts).await;
        let caller = Caller::with(http1(), |hedge| hedge.after_percentile(0.5, MS, LATE));
        for _ in 0..20 {
            assert_eq!(caller.policy.delay(), LATE);
            assert_eq!(caller.send(get(&upstream)).await.unwrap().status, 200);
        }
        assert_eq!((upstream.requests(), caller.hedges()), (20, 0));
        let delay = caller.policy.delay();
        assert!(delay >= 20 * MS && delay < LONG, "{delay:?}");

        let began = Instant::now();
        assert_eq!(caller.send(get(&upstream)).await.unwrap().status, 200);
        assert!(began.elapsed() >= delay);
        assert_eq!((upstream.requests(), caller.hedges()), (22, 1));
        until("the loser is closed", || upstream.request(20).gone).await;
    });
}

/// Hedges and retries are a fifth of the requests together, however many would
/// want to.
#[test]
fn in_a_total_stall_one_budget_bounds_hedges_and_retries() {
    const REQUESTS: usize = 200;
    run(async |bed: Bed| {
        let upstream = bed.upstream([]).await;
        upstream.otherwise(Act::Hang);
        let budget = SharedBudget::new(RetryBudget::new(20, 0).unwrap());
        let retries = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&retries);
        let retry = RetryLayer::builder()
            .settings(attempts(4).attempt_timeout(500 * MS))
            .budget(budget.clone())
            .on_retry(move |_, _, _| {
                count.fetch_add(1, Ordering::SeqCst);
            })
            .build()
            .unwrap();
        let hedges = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&hedges);
        let hedge = HedgeLayer::builder()
            .after(DELAY)
            .max_hedges(3)
            .budget_of_retry(budget)
            .on_hedge(move |_, _| {
                count.fetch_add(1, Ordering::SeqCst);
            })
            .build()
            .unwrap();
        let limit = TimeoutLayer::builder().build().unwrap();
        let service = boxed_service(retry.layer(hedge.layer(limit.layer(http1()))));
        let mut callers = JoinSet::new();
        for _ in 0..REQUESTS {
            callers.spawn(exchange(service.clone(), get(&upstream)));
        }
        for answer in callers.join_all().await {
            assert_eq!(answer.unwrap().status, 504);
        }
        let (hedges, retries) = (
            hedges.load(Ordering::SeqCst),
            retries.load(Ordering::SeqCst),
        );
        // Each has paid in by the time that the last asks.
        assert_eq!(hedges + retries, REQUESTS / 5, "{hedges} and {retries}");
        assert!(hedges > 0);
        // An attempt that was given up early may never have come.
        assert!(upstream.requests() <= REQUESTS + REQUESTS / 5);
        until("all are closed", || bed.sockets() == 0).await;
    });
}
