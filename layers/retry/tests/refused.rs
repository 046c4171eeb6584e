//! Refusals of layers further in that were made into responses.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress_core::{
    BoxError, Head, Refusal,
    RefusalKind::{
        self, BadGateway, CircuitOpen, Internal, NeverFits, Overloaded, RateLimited, TimedOut,
        Unavailable,
    },
    classify::GrpcCode,
    clock::{self, Instant},
    deadline::Deadline,
    refusal::Tell,
    respond::SharedResponder,
    testing::{Script, Step, elapsed, web},
};
use buttress_retry::{
    Backoff, Cause, GiveUp, HedgeLayer, Outcome, ReplayBody, RetryBuilder, RetryLayer, Settings,
};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use tower::{Layer, ServiceExt, service_fn, util::BoxCloneSyncService};

type Body = Full<Bytes>;
type Sent = Request<ReplayBody<Body>>;
type Gate = BoxCloneSyncService<Sent, Response<Body>, Infallible>;
type Calls = Arc<Mutex<Vec<Instant>>>;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Three attempts, a second between them, a minute for all.
fn settings() -> Settings {
    Settings::standard()
        .backoff(Backoff::fixed(SECOND))
        .total_timeout(60 * SECOND)
}

fn builder() -> RetryBuilder {
    RetryLayer::builder().settings(settings())
}

fn refused(kind: RefusalKind) -> Refusal {
    Refusal::new(kind)
}

fn later(kind: RefusalKind, wait: Duration) -> Refusal {
    refused(kind).with_retry_after(wait)
}

/// Refuses the first so, as a layer does; the others pass, and echo.
fn gate(refusal: Refusal, responder: SharedResponder) -> (Gate, Calls) {
    let calls = Calls::default();
    let hears = Arc::clone(&calls);
    let service = service_fn(move |request: Sent| {
        let mut calls = hears.lock().unwrap();
        calls.push(clock::now());
        let head = Head::from(&request);
        let refused = (calls.len() == 1).then(|| responder.respond(&refusal, head));
        let is_grpc = head.is_grpc();
        async move {
            if let Some(refused) = refused {
                return Ok(refused.map(Full::new));
            }
            let body = request.into_body().collect().await.unwrap();
            let mut response = web::response(200, body.to_bytes());
            if is_grpc {
                let ok = HeaderValue::from_static("0");
                response.headers_mut().insert("grpc-status", ok);
            }
            Ok(response)
        }
    });
    (Gate::new(service), calls)
}

/// How long after the first attempt the second came, if it did.
async fn waited(layer: &RetryLayer, refusal: Refusal, request: Request<Body>) -> Option<Duration> {
    waited_at(layer, gate(refusal, SharedResponder::default()), request).await
}

async fn waited_at(
    layer: &RetryLayer,
    (gate, calls): (Gate, Calls),
    request: Request<Body>,
) -> Option<Duration> {
    let sent = request.body().clone();
    let response = layer.layer(gate).oneshot(request).await.unwrap();
    let calls = calls.lock().unwrap().clone();
    assert!(calls.len() <= 2, "{calls:?}");
    let second = calls.get(1)?;
    // The whole of it came.
    assert_eq!(response.status(), 200);
    let body = response.into_body().collect().await.unwrap();
    assert_eq!(body.to_bytes(), sent.collect().await.unwrap().to_bytes());
    Some(*second - calls[0])
}

fn get() -> Request<Body> {
    web::get("/")
}

fn post() -> Request<Body> {
    web::post("/", "an order")
}

#[tokio::test(start_paused = true)]
async fn it_is_judged_by_what_it_is() {
    let layer = builder().build().unwrap();
    // The header would say 2, and 3.
    let open = later(CircuitOpen, 1300 * MS);
    let limited = later(RateLimited, 2500 * MS);
    let second = Some(SECOND);
    for (refusal, by_get, by_post) in [
        (open.clone(), Some(1300 * MS), Some(1300 * MS)),
        (limited, Some(2500 * MS), Some(2500 * MS)),
        (refused(Overloaded), second, second),
        // Until someone says otherwise.
        (refused(CircuitOpen), None, None),
        // It may have begun,
        (refused(TimedOut), second, None),
        (refused(BadGateway), second, None),
        // or surely has not.
        (refused(BadGateway).before_sending(), second, second),
        (refused(Unavailable).before_sending(), second, second),
        (
            later(Unavailable, 4 * SECOND).before_sending(),
            Some(4 * SECOND),
            Some(4 * SECOND),
        ),
        // It will not pass another time either.
        (refused(NeverFits), None, None),
        (refused(NeverFits).before_sending(), None, None),
        // Nothing that a retry knows of: its status.
        (refused(Internal), second, None),
        // Shorter than the backoff.
        (later(CircuitOpen, 10 * MS), second, second),
    ] {
        let text = format!("{refusal:?}");
        assert_eq!(
            waited(&layer, refusal.clone(), get()).await,
            by_get,
            "{text}"
        );
        assert_eq!(waited(&layer, refusal, post()).await, by_post, "{text}");
    }
    // Nor is more waited for than there is time.
    let layer = RetryLayer::builder()
        .settings(settings().total_timeout(1200 * MS))
        .build()
        .unwrap();
    assert_eq!(waited(&layer, open, get()).await, None);
}

#[tokio::test(start_paused = true)]
async fn listeners_hear_what_it_was() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let (again, ends) = (Arc::clone(&told), Arc::clone(&told));
    let layer = builder()
        .on_retry(move |_, _, cause| again.lock().unwrap().push((cause, None)))
        .on_give_up(move |_, cause, reason| ends.lock().unwrap().push((cause, Some(reason))))
        .build()
        .unwrap();
    for (refusal, request, expected) in [
        (
            later(CircuitOpen, SECOND).before_sending(),
            post(),
            (Cause::Refused(CircuitOpen), None),
        ),
        (
            refused(BadGateway).before_sending(),
            post(),
            (Cause::Unsent(BadGateway), None),
        ),
        (
            refused(BadGateway),
            get(),
            (Cause::Refused(BadGateway), None),
        ),
        (
            refused(BadGateway),
            post(),
            (Cause::Refused(BadGateway), Some(GiveUp::Unsafe)),
        ),
        (
            refused(CircuitOpen),
            get(),
            (Cause::Refused(CircuitOpen), Some(GiveUp::Pushback)),
        ),
    ] {
        waited(&layer, refusal, request).await;
        assert_eq!(std::mem::take(&mut *told.lock().unwrap()), [expected]);
    }
    assert_eq!(
        Cause::Unsent(BadGateway).to_string(),
        "refused before sending: bad_gateway"
    );
}

/// What an error says of it, and what a response does, is the same.
#[tokio::test(start_paused = true)]
async fn an_error_that_says_that_nothing_was_sent_is_repeated() {
    let layer = builder().boxed_errors().build().unwrap();
    for (refusal, calls) in [
        (refused(BadGateway), 1),
        (refused(BadGateway).before_sending(), 2),
    ] {
        let (inner, script) = Script::<Sent, Response<Body>, BoxError>::new()
            .then(Step::err(refusal.into()))
            .otherwise(|_| Step::ok(web::response(200, "")))
            .build();
        let _ = layer.layer(inner).oneshot(web::post("/", "")).await;
        assert_eq!(script.call_count(), calls);
    }
}

/// The first extension of a request allocates.
#[tokio::test(start_paused = true)]
async fn without_a_deadline_it_is_a_status() {
    let layer = RetryLayer::builder()
        .settings(settings().total_timeout(None))
        .build()
        .unwrap();
    let open = || later(CircuitOpen, 1300 * MS);
    let second = Some(SECOND);
    assert_eq!(waited(&layer, open(), get()).await, Some(2 * SECOND));
    assert_eq!(waited(&layer, open(), post()).await, None);
    assert_eq!(waited(&layer, refused(CircuitOpen), get()).await, second);

    // One of whoever is further out will do.
    let mut request = post();
    Deadline::after(60 * SECOND).attach(request.extensions_mut());
    assert_eq!(waited(&layer, open(), request).await, Some(1300 * MS));
    // And so will one of the attempts, all of which ask.
    let layer = RetryLayer::builder()
        .settings(settings().total_timeout(None).attempt_timeout(9 * SECOND))
        .build()
        .unwrap();
    assert_eq!(waited(&layer, open(), post()).await, Some(1300 * MS));
    let asked = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&asked);
    let inner = service_fn(move |request: Sent| {
        let told = Tell::is_in(request.extensions());
        hears.lock().unwrap().push(told);
        async { Ok::<_, Infallible>(web::response(503, "")) }
    });
    layer.layer(inner).oneshot(get()).await.unwrap();
    assert_eq!(*asked.lock().unwrap(), [true; 3]);
}

/// A status that was taken off the list is not repeated because it was ours;
/// but what has not begun was no answer of the callee's.
#[tokio::test(start_paused = true)]
async fn of_what_may_have_begun_the_status_counts_too() {
    let layer = builder()
        .statuses([StatusCode::BAD_GATEWAY])
        .build()
        .unwrap();
    assert_eq!(waited(&layer, refused(TimedOut), get()).await, None);
    let second = Some(SECOND);
    assert_eq!(waited(&layer, refused(BadGateway), get()).await, second);
    let open = later(CircuitOpen, 1300 * MS);
    assert_eq!(waited(&layer, open, get()).await, Some(1300 * MS));
}

#[tokio::test(start_paused = true)]
async fn a_responder_of_ones_own_makes_no_difference() {
    let layer = builder().build().unwrap();
    let teapot = |header: Option<&'static str>| {
        SharedResponder::new(move |_: &Refusal, _: Head<'_>| {
            let mut response = Response::new(Bytes::new());
            *response.status_mut() = StatusCode::IM_A_TEAPOT;
            if let Some(secs) = header {
                let secs = HeaderValue::from_static(secs);
                response.headers_mut().insert("retry-after", secs);
            }
            response
        })
    };
    for (refusal, header, expected) in [
        (later(CircuitOpen, 1300 * MS), None, Some(1300 * MS)),
        (later(RateLimited, 1300 * MS), Some("2"), Some(1300 * MS)),
        // What only the header says is not undercut.
        (refused(Overloaded), Some("5"), Some(5 * SECOND)),
        (refused(CircuitOpen), Some("5"), None),
    ] {
        let gate = gate(refusal, teapot(header));
        let waited = waited_at(&layer, gate, post()).await;
        assert_eq!(waited, expected, "{header:?}");
    }
}

/// A page from a cache, say.
#[tokio::test(start_paused = true)]
async fn what_was_made_a_good_answer_stands() {
    let layer = builder().build().unwrap();
    let (gate, calls) = gate(later(CircuitOpen, SECOND), SharedResponder::default());
    let inner = tower::util::MapResponse::new(gate, |mut response: Response<Body>| {
        assert!(Refusal::of(response.extensions()).is_some());
        *response.status_mut() = StatusCode::OK;
        response
    });
    let response = layer.layer(inner).oneshot(get()).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(calls.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn grpc_goes_by_the_code_but_for_what_has_not_begun() {
    let layers = [
        builder(),
        builder().grpc_codes([]),
        builder().grpc_codes([GrpcCode::DeadlineExceeded]),
    ]
    .map(|layer| layer.build().unwrap());
    let second = Some(SECOND);
    let exact = |millis: u32| [Some(millis * MS); 3];
    for (refusal, expected) in [
        (later(CircuitOpen, 1300 * MS), exact(1300)),
        // RESOURCE_EXHAUSTED.
        (later(RateLimited, 1300 * MS), exact(1300)),
        (refused(CircuitOpen), [None; 3]),
        (refused(TimedOut), [None, None, second]),
        (refused(BadGateway), [second, None, None]),
        (refused(BadGateway).before_sending(), [second; 3]),
        (refused(Internal), [None; 3]),
    ] {
        let mut found = Vec::new();
        for layer in &layers {
            let request = web::grpc("/shop.Orders/Create");
            found.push(waited(layer, refusal.clone(), request).await);
        }
        assert_eq!(found, expected, "{refusal:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_closure_can_look_at_it_and_has_the_last_word() {
    let layer = builder()
        .retry_if(|_, outcome| {
            let Outcome::Response { extensions, .. } = outcome else {
                return None;
            };
            match Refusal::of(extensions)?.origin()? {
                "yes" => Some(true),
                "no" => Some(false),
                _ => None,
            }
        })
        .build()
        .unwrap();
    let second = Some(SECOND);
    for (refusal, expected) in [
        (later(RateLimited, SECOND).with_origin("no"), None),
        (later(RateLimited, SECOND).with_origin("?"), second),
        // Worth it, but it may not be sent twice,
        (refused(NeverFits).with_origin("yes"), None),
        // unless it has not been sent.
        (
            refused(NeverFits).before_sending().with_origin("yes"),
            second,
        ),
        (
            later(NeverFits, 3 * SECOND)
                .before_sending()
                .with_origin("yes"),
            Some(3 * SECOND),
        ),
        // Forced open is forced open.
        (refused(CircuitOpen).with_origin("yes"), None),
    ] {
        let text = format!("{refusal:?}");
        assert_eq!(waited(&layer, refusal, post()).await, expected, "{text}");
    }
}

/// What a retry itself answers, where it has nothing in hand, is told who asks.
#[tokio::test(start_paused = true)]
async fn a_retry_tells_of_its_own_refusal() {
    let held = Arc::new(Mutex::new(Vec::new()));
    let inner = service_fn(move |request: Request<ReplayBody<Body>>| {
        let responder = SharedResponder::default();
        let late = responder.respond(&refused(TimedOut), Head::from(&request));
        // Its body is never given back.
        held.lock().unwrap().push(request);
        async { Ok::<_, Infallible>(late.map(Full::new)) }
    });
    let layer = builder().build().unwrap();
    let mut request = Request::put("/").body(Full::from("some")).unwrap();
    Tell::attach(request.extensions_mut());
    let response = layer.layer(inner).oneshot(request).await.unwrap();
    // What the one was that is no more in hand.
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    let refusal = Refusal::of(response.extensions()).unwrap();
    assert_eq!(refusal.kind(), TimedOut);
    assert!(!refusal.was_never_sent());
}

/// Forced open says not to come again, which no header does.
#[tokio::test(start_paused = true)]
async fn a_hedge_hears_it_where_there_is_a_deadline() {
    let layer = HedgeLayer::builder()
        .after(50 * MS)
        .max_hedges(5)
        .build()
        .unwrap();
    for (deadline, took, calls) in [(true, 250, 2), (false, 450, 6)] {
        let count = Mutex::new(0);
        let responder = SharedResponder::default();
        let (inner, script) = Script::<Sent, Response<Body>, Infallible>::new()
            .otherwise(move |request| {
                let mut count = count.lock().unwrap();
                *count += 1;
                if *count > 1 {
                    return Step::ok(web::response(500, "")).after(200 * MS);
                }
                let open = responder.respond(&refused(CircuitOpen), Head::from(request));
                Step::ok(open.map(Full::new)).after(70 * MS)
            })
            .build();
        let mut request = get();
        if deadline {
            Deadline::after(60 * SECOND).attach(request.extensions_mut());
        }
        let answer = layer.layer(inner).oneshot(request);
        let (waited, answer) = elapsed(answer).await;
        let status = if deadline { 503 } else { 500 };
        assert_eq!(answer.unwrap().status(), status);
        assert_eq!((waited, script.call_count()), (took * MS, calls));
    }
}
