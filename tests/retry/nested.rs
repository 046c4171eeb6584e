//! Retries and hedges in one stack, either way round, by `ServiceBuilder`:
//! `retry → hedge → timeout → hyper-util's client`, as the documentation has
//! it, and `hedge → retry → timeout → …`.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::body;
use buttress::{
    BoxError, ServiceBuilderExt,
    classify::Verdict,
    retry::{
        Budget, HedgeBuilder, HedgeLayer, Memory, ReplayBody, RetryBuilder, RetryLayer, Settings,
        SharedBudget,
    },
    timeout::TimeoutLayer,
};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, channel::Channel};
use hyper::{
    body::{Body, Incoming},
    server::conn::http1 as server,
    service::service_fn,
};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use tower::{ServiceBuilder, ServiceExt};

use crate::{
    bodies::{boxed, put, streaming},
    support::{
        Act, Bed, BoxBody, MS, Service, UNAVAILABLE, Upstream, accept, attempts, boxed_service,
        exchange, http1, listen, payload, run, until,
    },
};

const LEN: usize = 30_000;
const LEFT: HeaderName = HeaderName::from_static("x-time-left");

/// Which is the outer one.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Outer {
    Retry,
    Hedge,
}

/// Leaves to send more so often, and notes what it is asked and told.
#[derive(Debug)]
struct Noted {
    leave: AtomicUsize,
    requests: AtomicUsize,
    good: AtomicUsize,
    bad: AtomicUsize,
}

impl Noted {
    fn new(leave: usize) -> Arc<Self> {
        let [requests, good, bad] = [0; 3].map(AtomicUsize::new);
        let leave = AtomicUsize::new(leave);
        Arc::new(Self {
            leave,
            requests,
            good,
            bad,
        })
    }

    /// Of what is left, and of what was told.
    fn seen(&self) -> [usize; 4] {
        [&self.leave, &self.requests, &self.good, &self.bad]
            .map(|count| count.load(Ordering::SeqCst))
    }
}

impl Budget for Noted {
    fn request(&self) {
        self.requests.fetch_add(1, Ordering::SeqCst);
    }

    fn withdraw(&self) -> bool {
        let take = |leave: usize| leave.checked_sub(1);
        self.leave
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take)
            .is_ok()
    }

    fn outcome(&self, verdict: Verdict) {
        let count = match verdict {
            Verdict::Success => &self.good,
            _ => &self.bad,
        };
        count.fetch_add(1, Ordering::SeqCst);
    }
}

/// What both layers have in common.
struct Stack {
    after: Duration,
    settings: Settings,
    budget: Arc<Noted>,
    memory: Memory,
}

impl Stack {
    fn new(settings: Settings, leave: usize) -> Self {
        Self {
            after: 30 * MS,
            settings,
            budget: Noted::new(leave),
            memory: Memory::new(1 << 20),
        }
    }

    /// So late that an attempt that is broken off has no hedge.
    fn after(mut self, after: Duration) -> Self {
        self.after = after;
        self
    }

    fn layers(&self) -> (RetryBuilder, HedgeBuilder, TimeoutLayer) {
        let budget = SharedBudget::new(Arc::clone(&self.budget));
        let retry = RetryLayer::builder()
            .settings(self.settings.clone())
            .budget(budget.clone())
            .memory(self.memory.clone())
            .attempt_header();
        let hedge = HedgeLayer::builder()
            .after(self.after)
            .budget_of_retry(budget)
            .memory(self.memory.clone())
            .attempt_header();
        let limit = TimeoutLayer::builder().header(LEFT).build().unwrap();
        (retry, hedge, limit)
    }

    /// Over a client of exactly their bodies.
    fn service<B>(&self, outer: Outer) -> Service<B>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let (retry, hedge, limit) = self.layers();
        let (retry, hedge) = (retry.build().unwrap(), hedge.build().unwrap());
        let builder = ServiceBuilder::new();
        match outer {
            Outer::Retry => boxed_service(
                builder
                    .retry_requests(retry)
                    .hedge_requests(hedge)
                    .limit_time(limit)
                    .service(http1()),
            ),
            Outer::Hedge => boxed_service(
                builder
                    .hedge_requests(hedge)
                    .retry_requests(retry)
                    .limit_time(limit)
                    .service(http1()),
            ),
        }
    }
}

/// `x-retry-attempt` of each request.
fn told(upstream: &Upstream) -> Vec<Option<u32>> {
    let seen = upstream.seen();
    let told = |value: &str| value.parse().unwrap();
    seen.iter()
        .map(|seen| seen.header("x-retry-attempt").map(told))
        .collect()
}

/// How many milliseconds each had left.
fn left(upstream: &Upstream) -> Vec<u32> {
    let seen = upstream.seen();
    seen.iter()
        .map(|seen| seen.header(LEFT.as_str()).unwrap().parse().unwrap())
        .collect()
}

fn assert_whole(upstream: &Upstream, data: &Bytes) {
    for seen in upstream.seen() {
        assert!(seen.whole && seen.body == *data);
    }
}

const SORRY: &Act = &Act::Answer(UNAVAILABLE);

/// The first and its hedge are bad, then the retry hangs and its hedge is the
/// answer: two and two, of one request.
const BOTH_BAD_THEN_ONE_HANGS: [Act; 4] = [
    Act::Once(2, SORRY),
    Act::Once(2, SORRY),
    Act::Hang,
    Act::Echo,
];

#[test]
fn a_retry_of_hedges() {
    run(async |bed| {
        let upstream = bed.upstream(BOTH_BAD_THEN_ONE_HANGS).await;
        let settings = attempts(3).attempt_timeout(4_000 * MS);
        let stack = Stack::new(settings, 10);
        let service = stack.service(Outer::Retry);
        let data = payload(LEN);
        let request = put(&upstream, Full::new(data.clone()));
        let answer = exchange(service.clone(), request).await.unwrap();
        assert_eq!((answer.status, answer.body.unwrap()), (200, data.clone()));

        assert_whole(&upstream, &data);
        let seen = upstream.seen();
        assert!(
            seen.iter()
                .all(|seen| seen.header("content-length") == Some("30000"))
        );
        // How many were before it of the same request, and of the same attempt.
        assert_eq!(told(&upstream), [None, Some(1), Some(1), Some(2)]);
        // A hedge has what is left to its attempt, a retry begins anew.
        let left = left(&upstream);
        assert!(left[0] <= 4_000, "{left:?}");
        assert!(left[1] + 29 <= left[0], "{left:?}");
        assert!(left[2] > left[1], "{left:?}");
        assert!(left[3] + 29 <= left[2], "{left:?}");
        // One request, three of ten, one that was good, and two bad.
        assert_eq!(stack.budget.seen(), [7, 1, 1, 2]);
        until("the loser is closed", || upstream.request(2).gone).await;
        until("nothing is kept", || stack.memory.used() == 0).await;
        drop(service);
    });
}

/// Each of the hedge's attempts is a request that is retried by itself.
#[test]
fn a_hedge_of_retries() {
    run(async |bed| {
        // The second's retry comes when that of the first hangs.
        let acts = [
            Act::Once(2, SORRY),
            Act::Once(3, SORRY),
            Act::Hang,
            Act::Echo,
        ];
        let upstream = bed.upstream(acts).await;
        let stack = Stack::new(attempts(3).total_timeout(4_000 * MS), 10);
        let service = stack.service(Outer::Hedge);
        let data = payload(LEN);
        let request = put(&upstream, Full::new(data.clone()));
        let answer = exchange(service.clone(), request).await.unwrap();
        assert_eq!((answer.status, answer.body.unwrap()), (200, data.clone()));

        assert_whole(&upstream, &data);
        assert_eq!(told(&upstream), [None, Some(1), Some(1), Some(2)]);
        assert!(left(&upstream).iter().all(|left| *left <= 4_000));
        assert_eq!(stack.budget.seen()[0], 7);
        until("the loser is closed", || upstream.request(2).gone).await;
        until("nothing is kept", || stack.memory.used() == 0).await;
        drop(service);
    });
}

/// What one has taken, the other has no more.
#[test]
fn one_budget_for_both() {
    run(async |bed| {
        for outer in [Outer::Retry, Outer::Hedge] {
            let upstream = bed.upstream([*SORRY, Act::Slow(100 * MS)]).await;
            let stack = Stack::new(attempts(4), 0);
            for (status, requests) in [(503, 1), (200, 2)] {
                let request = put(&upstream, Full::new(payload(100)));
                let answer = exchange(stack.service(outer), request).await.unwrap();
                assert_eq!((answer.status, upstream.requests()), (status, requests));
            }

            // The hedge has the first, and a retry the second.
            for leave in [1, 2] {
                let upstream = bed.upstream([Act::Once(2, SORRY); 8]).await;
                let stack = Stack::new(attempts(4), leave);
                let request = put(&upstream, Full::new(payload(100)));
                let answer = exchange(stack.service(outer), request).await.unwrap();
                assert_eq!(answer.status, 503, "{outer:?} {leave}");
                assert_eq!(upstream.requests(), 1 + leave, "{outer:?} {leave}");
                assert_eq!(stack.budget.seen()[0], 0);
            }
        }
    });
}

/// The hang of both attempts ends with the retry's deadline, and none of them
/// outlives it.
#[test]
fn hedges_end_with_their_attempt() {
    run(async |bed| {
        let upstream = bed.upstream([Act::Hang; 4]).await;
        let settings = attempts(2).attempt_timeout(200 * MS);
        let stack = Stack::new(settings, 10);
        let service = stack.service(Outer::Retry);
        let data = payload(LEN);
        let request = put(&upstream, boxed(streaming(&data)));
        let answer = exchange(service.clone(), request).await.unwrap();
        assert_eq!(answer.status, 504);
        assert_eq!(told(&upstream), [None, Some(1), Some(1), Some(2)]);
        assert_eq!(stack.budget.seen(), [7, 1, 0, 4]);
        until("all are closed", || bed.sockets() == 0).await;
        assert_whole(&upstream, &data);
        drop(service);
    });
}

/// Who goes away takes both with it, of whichever attempt.
#[test]
fn a_client_that_goes_away() {
    run(async |bed| {
        for outer in [Outer::Retry, Outer::Hedge] {
            let acts = [
                Act::Once(2, SORRY),
                Act::Once(2, SORRY),
                Act::Hang,
                Act::Hang,
            ];
            let upstream = bed.upstream(acts).await;
            let stack = Stack::new(attempts(5), 10);
            let service = stack.service(outer);
            let request = put(&upstream, Full::new(payload(LEN)));
            let send = tokio::spawn(exchange(service.clone(), request));
            until("both hang", || upstream.whole() == 4).await;
            send.abort();
            assert!(send.await.unwrap_err().is_cancelled());
            until("both are closed", || bed.sockets() == 0).await;
            until("nothing is kept", || stack.memory.used() == 0).await;
            tokio::time::sleep(50 * MS).await;
            assert_eq!(upstream.requests(), 4);
        }
    });
}

/// A chunked body is the same through both, wherever an attempt ended.
#[test]
fn streams_broken_off_at_all_points() {
    run(async |bed| {
        for outer in [Outer::Retry, Outer::Hedge] {
            let points = [0, 1, 1_000, 20_000, LEN - 1];
            let acts = points.map(Act::Reset);
            let upstream = bed.upstream(acts).await;
            let stack = Stack::new(attempts(10), points.len()).after(20_000 * MS);
            let data = payload(LEN);
            let mut request = put(&upstream, boxed(streaming(&data)));
            let trailer = HeaderValue::from_static("x-checksum");
            request.headers_mut().insert("trailer", trailer);
            let answer = exchange(stack.service(outer), request).await.unwrap();
            assert_eq!((answer.status, answer.body.unwrap()), (200, data.clone()));
            for (seen, after) in upstream.seen().iter().zip(points) {
                assert_eq!(seen.body, data[..after]);
            }
            let last = upstream.last();
            assert_eq!(last.body, data);
            assert_eq!(last.trailers, "x-checksum: 42\r\n");
        }
    });
}

/// Over a client that wants axum's own bodies.
fn over_axum(stack: &Stack, outer: Outer) -> Service<body::Body> {
    type Twice = ReplayBody<ReplayBody<body::Body>>;
    let (retry, hedge, limit) = stack.layers();
    let (retry, hedge) = (retry.build().unwrap(), hedge.build().unwrap());
    let http = Client::builder(TokioExecutor::new()).build_http::<body::Body>();
    let http = http.map_request(|request: Request<Twice>| request.map(body::Body::new));
    let builder = ServiceBuilder::new();
    match outer {
        Outer::Retry => boxed_service(
            builder
                .retry_requests(retry)
                .hedge_requests(hedge)
                .limit_time(limit)
                .service(http),
        ),
        Outer::Hedge => boxed_service(
            builder
                .hedge_requests(hedge)
                .retry_requests(retry)
                .limit_time(limit)
                .service(http),
        ),
    }
}

#[test]
fn bodies_of_axum() {
    run(async |bed| {
        for outer in [Outer::Retry, Outer::Hedge] {
            let acts = [Act::Reset(20_000), Act::Hang, Act::Echo];
            let upstream = bed.upstream(acts).await;
            let stack = Stack::new(attempts(3), 10).after(100 * MS);
            let data = payload(LEN);
            let request = put(&upstream, body::Body::new(streaming(&data)));
            let answer = exchange(over_axum(&stack, outer), request).await.unwrap();
            assert_eq!((answer.status, answer.body.unwrap()), (200, data.clone()));
            assert_eq!(upstream.requests(), 3);
            let seen = upstream.seen();
            assert!(seen[1..].iter().all(|seen| seen.body == data));
            until("the loser is closed", || upstream.request(1).gone).await;
        }
    });
}

/// Answers on one connection with what the service says.
fn forward(
    bed: &Bed,
    listener: tokio::net::TcpListener,
    uri: Uri,
    service: Service<Incoming>,
) -> tokio::sync::oneshot::Sender<()> {
    let bed = bed.clone();
    accept(listener, move |stream| {
        let (sends, uri, socket) = (service.clone(), uri.clone(), bed.socket());
        let service = service_fn(move |mut request: Request<Incoming>| {
            *request.uri_mut() = uri.clone();
            let sends = sends.clone();
            async move {
                let sent = sends.oneshot(request).await;
                Ok::<_, Infallible>(sent.unwrap_or_else(|_| bad_gateway()))
            }
        });
        tokio::spawn(async move {
            let connection = server::Builder::new().serve_connection(TokioIo::new(stream), service);
            let _ = connection.await;
            drop(socket);
        });
    })
}

fn bad_gateway() -> Response<BoxBody> {
    let mut response = Response::new(boxed(Full::default()));
    *response.status_mut() = StatusCode::BAD_GATEWAY;
    response
}

/// What is read of one connection goes to four others, the last of it after
/// the first of them is gone.
#[test]
fn bodies_that_hyper_reads() {
    run(async |bed| {
        for outer in [Outer::Retry, Outer::Hedge] {
            let acts = [Act::Reset(700), Act::Reset(20_000), Act::Hang];
            let upstream = bed.upstream(acts).await;
            let stack = Stack::new(attempts(5), 10).after(100 * MS);
            let listener = listen().await;
            let address = listener.local_addr().unwrap();
            let uri = upstream.url().parse().unwrap();
            let stop = forward(&bed, listener, uri, stack.service(outer));

            let data = payload(LEN);
            let client = Client::builder(TokioExecutor::new()).build_http::<Channel<Bytes>>();
            let (mut sender, body) = Channel::<Bytes>::new(1);
            let request = Request::put(format!("http://{address}/"))
                .body(body)
                .unwrap();
            let writes = async {
                let mut rest = data.clone();
                sender.send_data(rest.split_to(1_000)).await.unwrap();
                until("the second attempt came", || upstream.requests() == 2).await;
                while !rest.is_empty() {
                    let chunk = rest.split_to(rest.len().min(7_000));
                    sender.send_data(chunk).await.unwrap();
                }
                drop(sender);
            };
            let (response, ()) = tokio::join!(client.request(request), writes);
            let response = response.unwrap();
            assert_eq!(response.status(), 200, "{outer:?}");
            let body = response.into_body().collect().await.unwrap();
            assert_eq!(body.to_bytes(), data);
            assert_eq!(upstream.requests(), 4);
            let seen = upstream.seen();
            assert!(seen[2..].iter().all(|seen| seen.body == data));
            until("the loser is closed", || upstream.request(2).gone).await;
            drop(stop);
        }
    });
}
