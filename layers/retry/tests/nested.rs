//! Retries and hedges in one stack, either way round: to the instant.

use std::{
    fmt::Debug,
    future::Future,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress_core::{
    body::ResponseBody,
    clock,
    deadline::Deadline,
    testing::{
        elapsed,
        web::{ScriptedBody, get, response},
    },
};
use buttress_retry::{
    Backoff, HedgeBuilder, HedgeLayer, Memory, ReplayBody, RetryBuilder, RetryLayer, Settings,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use proptest::{collection::vec, prelude::*};
use tower::{Layer, Service, ServiceExt, service_fn, util::BoxCloneSyncService};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

type Whole = Full<Bytes>;
type Twice<B> = Request<ReplayBody<ReplayBody<B>>>;
type Boxed<B> = BoxCloneSyncService<Request<B>, Response<ResponseBody<Whole>>, io::Error>;

#[derive(Clone, Copy, Debug)]
enum Outer {
    Retry,
    Hedge,
}

struct Stack {
    retry: RetryBuilder,
    hedge: HedgeBuilder,
}

impl Stack {
    /// Attempts 10 ms apart of 1 s each, hedged after 50 ms.
    fn new(attempts: u32, hedges: u32) -> Self {
        let settings = Settings::standard()
            .max_attempts(attempts)
            .backoff(Backoff::fixed(10 * MS))
            .attempt_timeout(SECOND)
            .total_timeout(3600 * SECOND);
        Self {
            retry: RetryLayer::builder().settings(settings).attempt_header(),
            hedge: HedgeLayer::builder()
                .after(50 * MS)
                .max_hedges(hedges)
                .without_budget()
                .attempt_header(),
        }
    }

    fn memory(self, memory: &Memory) -> Self {
        Self {
            retry: self.retry.memory(memory.clone()),
            hedge: self.hedge.memory(memory.clone()),
        }
    }

    fn over<S, B>(self, outer: Outer, inner: S) -> Boxed<B>
    where
        S: Service<Twice<B>, Response = Response<Whole>, Error = io::Error, Future: Send>
            + Clone
            + Send
            + Sync
            + 'static,
        B: Body + Send + 'static,
    {
        let (retry, hedge) = (self.retry.build().unwrap(), self.hedge.build().unwrap());
        match outer {
            Outer::Retry => BoxCloneSyncService::new(retry.layer(hedge.layer(inner))),
            Outer::Hedge => BoxCloneSyncService::new(hedge.layer(retry.layer(inner))),
        }
    }
}

/// An attempt: when it came, until when it was awaited, in milliseconds, and
/// what it said of those before.
type Came = (u128, u128, Option<u32>);
type AllCame = Arc<Mutex<Vec<Came>>>;

/// Answers the n-th after so many milliseconds with this status.
fn answers(
    steps: &[(u64, u16)],
) -> (
    impl Service<Twice<Whole>, Response = Response<Whole>, Error = io::Error, Future: Send>
    + Clone
    + Send
    + Sync
    + 'static,
    AllCame,
) {
    let steps = steps.to_vec();
    let came = Arc::new(Mutex::new(Vec::new()));
    let start = clock::now();
    let service = service_fn({
        let came = Arc::clone(&came);
        move |request: Twice<Whole>| {
            let deadline = Deadline::of(request.extensions()).unwrap();
            let repeats = request.headers().get("x-retry-attempt");
            let repeats = repeats.map(|value| value.to_str().unwrap().parse().unwrap());
            let mut came = came.lock().unwrap();
            let (wait, status) = steps[came.len()];
            came.push((
                (clock::now() - start).as_millis(),
                (deadline.instant() - start).as_millis(),
                repeats,
            ));
            async move {
                tokio::time::sleep(Duration::from_millis(wait)).await;
                Ok(response(status, ""))
            }
        }
    });
    (service, came)
}

/// A hedge has what is left to its attempt, a retry's first has its own.
#[tokio::test(start_paused = true)]
async fn deadlines_and_numbers_of_a_retry_of_hedges() {
    let (inner, came) = answers(&[
        (900, 503),
        (300, 503),
        (900, 503),
        (900, 503),
        (5000, 200),
        (20, 200),
    ]);
    let service = Stack::new(3, 1).over(Outer::Retry, inner);
    let (took, answered) = elapsed(service.oneshot(get("/"))).await;
    assert_eq!(answered.unwrap().status(), 200);
    let expected = [
        (0, 1000, None),
        (50, 1000, Some(1)),
        (910, 1910, Some(1)),
        (960, 1910, Some(2)),
        // The hedge before was the last to end.
        (1870, 2870, Some(2)),
        (1920, 2870, Some(3)),
    ];
    assert_eq!(*came.lock().unwrap(), expected);
    assert_eq!(took, 1940 * MS);
}

/// Each hedge is retried by itself, and has its own time.
#[tokio::test(start_paused = true)]
async fn deadlines_and_numbers_of_a_hedge_of_retries() {
    let (inner, came) = answers(&[(30, 503), (900, 503), (60, 503), (5000, 200), (20, 200)]);
    let service = Stack::new(3, 1).over(Outer::Hedge, inner);
    let (took, answered) = elapsed(service.oneshot(get("/"))).await;
    assert_eq!(answered.unwrap().status(), 200);
    let expected = [
        (0, 1000, None),
        (40, 1040, Some(1)),
        (50, 1050, Some(1)),
        (120, 1120, Some(2)),
    ];
    assert_eq!(came.lock().unwrap()[..4], expected);
    // The first's third.
    assert_eq!(came.lock().unwrap()[4..], [(950, 1950, Some(2))]);
    assert_eq!(took, 970 * MS);
}

/// What a caller further out has set is nearer, and holds for all; past it
/// there is neither a retry nor a hedge.
#[tokio::test(start_paused = true)]
async fn a_deadline_of_further_out_holds_for_all() {
    let [first, hedge, retry, of_hedge] = [
        (0, 100, None),
        (50, 100, Some(1)),
        (90, 100, Some(1)),
        (90, 100, Some(2)),
    ];
    for (outer, expected) in [
        (Outer::Retry, &[first, hedge, retry][..]),
        (Outer::Hedge, &[first, hedge, retry, of_hedge]),
    ] {
        let (inner, came) = answers(&[(80, 503), (30, 503), (30, 503), (30, 503)]);
        let service = Stack::new(9, 9).over(outer, inner);
        let mut request = get("/");
        Deadline::after(100 * MS).attach(request.extensions_mut());
        let (took, answered) = elapsed(service.oneshot(request)).await;
        assert_eq!(answered.unwrap().status(), 503);
        assert_eq!(*came.lock().unwrap(), expected, "{outer:?}");
        assert_eq!(took, 120 * MS, "{outer:?}");
    }
}

/// Each layer counts what it keeps, the outer one first: where there is room
/// for one copy it has it.
#[tokio::test(start_paused = true)]
async fn one_memory_for_both() {
    for (room, outer, expected) in [
        // The hedge, and the retry when both have failed.
        (10, Outer::Retry, &[0, 50, 160][..]),
        // The first's own retry is sooner.
        (10, Outer::Hedge, &[0, 50, 110]),
        // No hedge.
        (9, Outer::Retry, &[0, 110]),
        // No retry of the first, but of the hedge, which needs the other copy
        // no more.
        (9, Outer::Hedge, &[0, 50, 160]),
        (4, Outer::Retry, &[0]),
        (4, Outer::Hedge, &[0]),
    ] {
        let memory = Memory::new(room);
        let came = Arc::new(Mutex::new(Vec::new()));
        let start = clock::now();
        let inner = service_fn({
            let came = Arc::clone(&came);
            move |request: Twice<Whole>| {
                let at = (clock::now() - start).as_millis();
                came.lock().unwrap().push(at);
                async move {
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    assert_eq!(body, "hello");
                    if at > 100 {
                        return Ok(response(200, ""));
                    }
                    tokio::time::sleep(100 * MS).await;
                    Ok(response(503, ""))
                }
            }
        });
        let service = Stack::new(2, 1).memory(&memory).over(outer, inner);
        let request = Request::put("/").body(Full::from("hello")).unwrap();
        let mut answer = tokio_test::task::spawn(service.oneshot(request));
        assert!(answer.poll().is_pending());
        assert_eq!(memory.used(), room / 5 * 5, "{outer:?} {room}");
        let status = answer.await.unwrap().status();
        assert_eq!(status, if room < 5 { 503 } else { 200 });
        assert_eq!(memory.used(), 0, "{outer:?} {room}");
        assert_eq!(*came.lock().unwrap(), expected, "{outer:?} {room}");
    }
}

/// What an attempt does that fails.
#[derive(Clone, Copy, Debug)]
struct Act {
    /// Of the body, that it takes.
    bytes: usize,
    /// How many milliseconds it holds the body then.
    holds: u32,
    /// How many until it fails, after that.
    fails: u32,
}

fn act() -> impl Strategy<Value = Act> {
    let fails = prop_oneof![Just(0), 0_u32..120, Just(1_000)];
    (0_usize..300, 0_u32..120, fails).prop_map(|(bytes, holds, fails)| Act {
        bytes,
        holds,
        fails,
    })
}

fn trailers() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", HeaderValue::from_static("42"));
    trailers
}

/// Takes of it at least so many bytes, if it has them; what it took, and
/// whether it came to the end, with trailers.
async fn take<B>(body: &mut B, bytes: usize) -> (Vec<u8>, Option<Option<HeaderMap>>)
where
    B: Body<Data = Bytes, Error: Debug> + Unpin,
{
    let mut read = Vec::new();
    let mut trailers = None;
    while read.len() < bytes {
        let Some(frame) = body.frame().await else {
            return (read, Some(trailers));
        };
        match frame.unwrap().into_data() {
            Ok(data) => read.extend_from_slice(&data),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    (read, None)
}

fn block_on(future: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(future);
}

proptest! {
    /// However much of it each attempt takes, how long it holds it and when it
    /// fails: each gets the same bytes, and the answer is to all of them.
    #[test]
    fn bodies_are_the_same_through_both(
        chunks in vec((0_usize..60, 0_u32..40), 0..6),
        with_trailers in any::<bool>(),
        acts in vec(act(), 0..6),
        hedge_outside in any::<bool>(),
    ) {
        let outer = if hedge_outside { Outer::Hedge } else { Outer::Retry };
        let mut whole = Vec::new();
        let mut body = ScriptedBody::new();
        for (index, (len, wait)) in chunks.into_iter().enumerate() {
            let chunk: Vec<_> = (0..len).map(|at| u8::try_from(index * 40 + at % 40).unwrap()).collect();
            whole.extend_from_slice(&chunk);
            body = body.wait(wait * MS).data(chunk);
        }
        if with_trailers {
            body = body.trailers(trailers());
        }
        let failing = acts.len();
        let attempts = Arc::new(Mutex::new(0));
        let inner = service_fn({
            let (whole, attempts) = (whole.clone(), Arc::clone(&attempts));
            let acts = Arc::new(Mutex::new(acts.into_iter()));
            move |request: Twice<ScriptedBody>| {
                *attempts.lock().unwrap() += 1;
                let act = acts.lock().unwrap().next();
                let whole = whole.clone();
                async move {
                    let mut body = request.into_body();
                    let (read, end) = take(&mut body, act.map_or(usize::MAX, |act| act.bytes)).await;
                    assert_eq!(read, whole[..read.len()]);
                    if let Some(trailed) = end {
                        assert_eq!(read.len(), whole.len());
                        assert_eq!(trailed, with_trailers.then(trailers));
                    }
                    let Some(act) = act else {
                        return Ok(response(200, read));
                    };
                    tokio::time::sleep(act.holds * MS).await;
                    drop(body);
                    tokio::time::sleep(act.fails * MS).await;
                    Err(io::ErrorKind::ConnectionReset.into())
                }
            }
        });
        block_on(async {
            let memory = Memory::new(10_000);
            let service = Stack::new(10, 2).memory(&memory).over(outer, inner);
            let request = Request::put("/").body(body).unwrap();
            let answered = service.oneshot(request).await.unwrap();
            let answered = answered.into_body().collect().await.unwrap();
            assert_eq!(answered.to_bytes(), whole);
            assert_eq!(memory.used(), 0);
        });
        let attempts = *attempts.lock().unwrap();
        // Each that fails once, and no more than three that do not.
        assert!(attempts <= failing + 3, "{attempts} attempts, of which {failing} fail");
    }
}
