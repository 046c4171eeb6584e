//! The layer over HTTP services: what counts, for how long, and who hears.

use std::{
    convert::Infallible,
    future::pending,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress_core::{
    BoxError, Head, Refusal,
    testing::{
        ReadinessProbe, Step, advance, settle,
        web::{self, BodyFate, ScriptedBody},
    },
};
use buttress_drain::{CutKind, DrainLayer, DrainSignal, Phase, RefuseLayer, Report, Shutdown};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Version, header};
use http_body::Body;
use http_body_util::{BodyExt, Empty, Full};
use tokio::task::JoinHandle;
use tokio_test::{assert_pending, assert_ready, task};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, limit::ConcurrencyLimit, service_fn};

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn shutdown() -> Shutdown {
    Shutdown::builder().build().unwrap()
}

fn run(shutdown: &Shutdown) -> JoinHandle<Report> {
    let shutdown = shutdown.clone();
    tokio::spawn(async move { shutdown.run().await })
}

type Request_ = Request<Full<Bytes>>;

/// A service that answers with this body.
fn answers<B: Body>(
    body: impl Fn() -> B + Clone,
) -> impl Service<Request_, Response = Response<B>, Error = Infallible> + Clone {
    service_fn(move |_| std::future::ready(Ok(Response::new(body()))))
}

#[tokio::test(start_paused = true)]
async fn readiness() {
    let shutdown = shutdown();
    let probe = || {
        ReadinessProbe::new(
            || web::get("/"),
            |_| Step::<_, Infallible>::ok(web::response(200, "x")),
        )
    };
    probe().check(&DrainLayer::new(&shutdown)).await;
    probe()
        .check(&DrainLayer::new(&shutdown).signal().route("/"))
        .await;
    probe().check(&RefuseLayer::new(&shutdown)).await;
    shutdown.force("test");
    let _ = shutdown.run().await;
    probe().check(&DrainLayer::new(&shutdown)).await;
    assert_eq!(shutdown.requests(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_slot_of_a_concurrency_limit_is_freed_with_the_body() {
    let shutdown = shutdown();
    let layer = DrainLayer::new(&shutdown);
    let inner = ConcurrencyLimit::new(answers(|| Full::<Bytes>::from("x")), 1);
    let mut first = layer.layer(inner);
    let mut second = tower_test::mock::Spawn::new(first.clone());
    first.ready().await.unwrap();
    assert_pending!(second.poll_ready::<Request_>());
    let response = first.call(web::get("/"));
    assert_eq!(shutdown.requests(), 1);
    drop(response);
    assert_eq!(shutdown.requests(), 0);
    assert!(second.is_woken());
    assert!(assert_ready!(second.poll_ready::<Request_>()).is_ok());
}

/// From the call, before anything is polled, to the last frame.
#[tokio::test(start_paused = true)]
async fn a_request_counts_to_the_end_of_its_body() {
    let shutdown = shutdown();
    let layer = DrainLayer::new(&shutdown);
    let body = || ScriptedBody::new().data("a").wait(secs(1)).data("b");
    let mut service = layer.layer(answers(body));
    let call = service.call(web::get("/"));
    assert_eq!(shutdown.requests(), 1);
    let mut body = call.await.unwrap().into_body();
    assert_eq!(shutdown.requests(), 1);
    for expected in ["a", "b"] {
        let frame = body.frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), expected);
        assert_eq!(shutdown.requests(), 1);
    }
    // This one cannot tell that it is at its end, before it is.
    assert!(body.frame().await.is_none());
    assert_eq!(shutdown.requests(), 0);
    drop(body);
    assert_eq!(shutdown.requests(), 0);
}

/// hyper does not poll again after what says that it was the last.
#[tokio::test(start_paused = true)]
async fn the_last_frame_is_the_end() {
    let shutdown = shutdown();
    let mut service = DrainLayer::new(&shutdown).layer(answers(|| Full::<Bytes>::from("whole")));
    let mut body = service.call(web::get("/")).await.unwrap().into_body();
    assert_eq!(body.size_hint().exact(), Some(5));
    assert!(body.frame().await.unwrap().is_ok());
    assert_eq!(shutdown.requests(), 0);
    assert!(body.is_end_stream());

    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let with_trailers = trailers.clone();
    let body = move || {
        ScriptedBody::new()
            .data("x")
            .trailers(with_trailers.clone())
    };
    let mut service = DrainLayer::new(&shutdown).layer(answers(body));
    let mut body = service.call(web::get("/")).await.unwrap().into_body();
    assert!(body.frame().await.unwrap().unwrap().is_data());
    assert_eq!(shutdown.requests(), 1);
    let frame = body.frame().await.unwrap().unwrap();
    assert_eq!(frame.into_trailers().unwrap(), trailers);
    assert_eq!(shutdown.requests(), 0);
}

/// HEAD, 204, 304: hyper drops what it need not send.
#[tokio::test(start_paused = true)]
async fn a_body_that_is_not_sent_counts_no_longer() {
    let shutdown = shutdown();
    let mut service = DrainLayer::new(&shutdown).layer(answers(Empty::<Bytes>::new));
    let response = service.call(web::get("/")).await.unwrap();
    assert_eq!(shutdown.requests(), 0);
    drop(response);

    let mut service = DrainLayer::new(&shutdown).layer(answers(|| ScriptedBody::new().hang()));
    let response = service.call(web::get("/")).await.unwrap();
    assert_eq!(shutdown.requests(), 1);
    drop(response);
    assert_eq!(shutdown.requests(), 0);
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_is_over() {
    let shutdown = shutdown();
    let layer = DrainLayer::new(&shutdown);
    // The service itself: its error stays what it was.
    let mut fails = layer.layer(service_fn(async |_: Request_| {
        Err::<Response<Full<Bytes>>, _>(std::io::Error::other("no"))
    }));
    let error: std::io::Error = fails.call(web::get("/")).await.unwrap_err();
    assert_eq!(error.to_string(), "no");
    assert_eq!(shutdown.requests(), 0);
    // Its body.
    let mut breaks = layer.layer(answers(|| ScriptedBody::new().data("x").fail("broken")));
    let mut body = breaks.call(web::get("/")).await.unwrap().into_body();
    assert!(body.frame().await.unwrap().is_ok());
    assert_eq!(shutdown.requests(), 1);
    assert!(body.frame().await.unwrap().is_err());
    assert_eq!(shutdown.requests(), 0);
    // Nobody waits for it any longer: unpolled, in the midst of it, and with
    // the body not read.
    let mut hangs = layer.layer(service_fn(async |_: Request_| {
        pending::<Result<Response<Full<Bytes>>, Infallible>>().await
    }));
    drop(hangs.call(web::get("/")));
    let mut call = task::spawn(hangs.call(web::get("/")));
    assert_pending!(call.poll());
    assert_eq!(shutdown.requests(), 1);
    drop(call);
    assert_eq!(shutdown.requests(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_the_end() {
    struct Panics;
    impl Body for Panics {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
            panic!("in the body")
        }
    }
    fn at_once(_: Request_) -> std::future::Ready<Result<Response<Full<Bytes>>, Infallible>> {
        panic!("in the call")
    }
    let shutdown = shutdown();
    let layer = DrainLayer::new(&shutdown).route("/");
    let mut service = layer.layer(service_fn(at_once));
    assert!(catch_unwind(AssertUnwindSafe(|| drop(service.call(web::get("/"))))).is_err());
    assert_eq!(shutdown.requests(), 0);

    let service = layer.layer(service_fn(async |_: Request_| {
        if true {
            panic!("in the handler");
        }
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    }));
    let call = tokio::spawn(service.oneshot(web::get("/")));
    assert!(call.await.unwrap_err().is_panic());
    assert_eq!(shutdown.requests(), 0);

    let mut service = layer.layer(answers(|| Panics));
    let body = service.call(web::get("/")).await.unwrap().into_body();
    let mut body = Box::pin(body);
    assert_eq!(shutdown.requests(), 1);
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    let poll = || body.as_mut().poll_frame(&mut cx).is_ready();
    assert!(catch_unwind(AssertUnwindSafe(poll)).is_err());
    // Before the body itself goes.
    assert_eq!(shutdown.requests(), 0);
}

/// Clones of the layer and of its services count for one.
#[tokio::test(start_paused = true)]
async fn all_count_for_the_same_shutdown() {
    let shutdown = shutdown();
    let layer = DrainLayer::new(&shutdown);
    let hang = || ScriptedBody::new().hang();
    let service = layer.layer(answers(hang));
    let other = layer.clone().layer(answers(hang));
    let first = service.clone().oneshot(web::get("/")).await.unwrap();
    let second = service.oneshot(web::get("/")).await.unwrap();
    let third = other.oneshot(web::get("/")).await.unwrap();
    assert_eq!(shutdown.requests(), 3);
    let driver = run(&shutdown);
    shutdown.trigger_without_delay("test");
    settle().await;
    drop((first, third));
    settle().await;
    assert_eq!(shutdown.phase(), Phase::Closed);
    drop(second);
    assert!(driver.await.unwrap().is_clean());
}

/// A chain of requests, each begun by the one before: nobody is let go.
#[tokio::test(start_paused = true)]
async fn it_waits_while_requests_come_and_go() {
    let shutdown = shutdown();
    let body = || ScriptedBody::new().wait(secs(1)).data("x");
    let service = DrainLayer::new(&shutdown).layer(answers(body));
    let driver = run(&shutdown);
    shutdown.trigger_without_delay("test");
    for _ in 0..10 {
        let response = service.clone().oneshot(web::get("/")).await.unwrap();
        assert!(response.into_body().collect().await.is_ok());
        // The next comes on the same connection before this is looked at.
        let next = service.clone().oneshot(web::get("/")).await.unwrap();
        settle().await;
        assert!(!driver.is_finished());
        drop(next);
    }
    assert_eq!(driver.await.unwrap().exit_code(), 0);
}

async fn connection(shutdown: &Shutdown, version: Version, status: u16) -> Option<HeaderValue> {
    let mut request = web::get("/");
    *request.version_mut() = version;
    connection_of(shutdown, request, status).await
}

async fn connection_of(shutdown: &Shutdown, request: Request_, status: u16) -> Option<HeaderValue> {
    let service = service_fn(move |_: Request_| {
        let mut response = web::response(status, "x");
        let keep = HeaderValue::from_static("keep-alive");
        response.headers_mut().insert(header::CONNECTION, keep);
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let layer = DrainLayer::new(shutdown);
    let response = layer.layer(service).oneshot(request).await.unwrap();
    let mut all = response.headers().get_all(header::CONNECTION).iter();
    let one = all.next().cloned();
    assert!(all.next().is_none());
    one
}

#[tokio::test(start_paused = true)]
async fn connections_close_while_it_drains() {
    let shutdown = shutdown();
    let versions = [
        Version::HTTP_10,
        Version::HTTP_11,
        Version::HTTP_2,
        Version::HTTP_3,
    ];
    for version in versions {
        let told = connection(&shutdown, version, 200).await;
        assert_eq!(told.unwrap(), "keep-alive");
    }
    shutdown.trigger("test");
    for (version, expected) in versions
        .iter()
        .zip(["close", "close", "keep-alive", "keep-alive"])
    {
        let told = connection(&shutdown, *version, 200).await;
        assert_eq!(told.unwrap(), expected, "{version:?}");
    }
    // A tunnel's head is not to be touched.
    let told = connection(&shutdown, Version::HTTP_11, 101).await;
    assert_eq!(told.unwrap(), "keep-alive");
    for (status, expected) in [(200, "keep-alive"), (407, "close")] {
        let mut connect = web::get("test:443");
        *connect.method_mut() = Method::CONNECT;
        let told = connection_of(&shutdown, connect, status).await;
        assert_eq!(told.unwrap(), expected, "{status}");
    }
}

/// A 426 says what to upgrade to, and names the header.
#[tokio::test(start_paused = true)]
async fn what_else_an_answer_says_of_its_connection_stands() {
    let shutdown = shutdown();
    shutdown.trigger("test");
    for (said, expected) in [
        (&["upgrade"][..], "upgrade, close"),
        (&["Keep-Alive, upgrade", "x"], "upgrade, x, close"),
        (&["Close"], "close"),
        (&[], "close"),
    ] {
        let service = service_fn(move |_: Request_| async move {
            let mut response = Response::builder().status(426);
            for value in said {
                response = response.header("connection", *value);
            }
            Ok::<_, Infallible>(response.body(String::new()).unwrap())
        });
        let service = DrainLayer::new(&shutdown).layer(service);
        let response = service.oneshot(Request::default()).await.unwrap();
        let told: Vec<_> = response.headers().get_all("connection").iter().collect();
        assert_eq!(told, [expected]);
    }
}

#[tokio::test(start_paused = true)]
async fn handlers_hear_of_it_where_that_is_asked_for() {
    let shutdown = shutdown();
    let seen: Arc<Mutex<Vec<bool>>> = Arc::default();
    let handler = || {
        let seen = Arc::clone(&seen);
        service_fn(move |request: Request_| {
            let signal = request.extensions().get::<DrainSignal>().cloned();
            seen.lock().unwrap().push(signal.is_some());
            async move {
                if let Some(signal) = signal {
                    signal.notified().await;
                    assert_eq!(signal.remaining(), Some(secs(25)));
                }
                Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
            }
        })
    };
    let plain = DrainLayer::new(&shutdown).layer(handler());
    assert!(plain.oneshot(web::get("/")).await.is_ok());
    let told = DrainLayer::new(&shutdown).signal().layer(handler());
    let mut call = task::spawn(told.oneshot(web::get("/")));
    assert_pending!(call.poll());
    shutdown.trigger("test");
    assert!(call.is_woken());
    assert!(assert_ready!(call.poll()).is_ok());
    assert_eq!(*seen.lock().unwrap(), [false, true]);
}

fn stream(content_type: &'static str, body: ScriptedBody) -> Response<ScriptedBody> {
    let mut response = Response::new(body);
    let content_type = HeaderValue::from_static(content_type);
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, content_type);
    response
}

async fn streamed(
    layer: &DrainLayer,
    response: Response<ScriptedBody>,
) -> impl Body<Data = Bytes, Error = BoxError> + Unpin + use<> {
    let response = Arc::new(Mutex::new(Some(response)));
    let service = layer.layer(service_fn(move |_: Request_| {
        let response = response.lock().unwrap().take().unwrap();
        std::future::ready(Ok::<_, Infallible>(response))
    }));
    Box::pin(service.oneshot(web::get("/")).await.unwrap().into_body())
}

#[tokio::test(start_paused = true)]
async fn streams_end_at_the_notice_where_that_is_asked_for() {
    let shutdown = shutdown();
    let types = ["Text/Event-Stream; charset=utf-8", "application/grpc", ""];
    let layer = DrainLayer::new(&shutdown).end_streams(types);
    let events = || ScriptedBody::new().data("event").hang();
    let body = events();
    let fate = body.watch();
    let mut sse = streamed(&layer, stream("text/event-stream", body)).await;
    let mut other = streamed(&layer, stream("text/plain", events())).await;
    let mut grpc = streamed(&layer, stream("application/grpc", events())).await;
    for body in [&mut sse, &mut other, &mut grpc] {
        assert!(body.frame().await.unwrap().is_ok());
    }
    assert_eq!(sse.size_hint().exact(), None);
    let mut next = task::spawn(sse.frame());
    assert_pending!(next.poll());
    assert_eq!(shutdown.requests(), 3);

    let driver = run(&shutdown);
    settle().await;
    shutdown.trigger("test");
    assert!(next.is_woken());
    assert!(assert_ready!(next.poll()).is_none());
    drop(next);
    assert_eq!(fate.fate(), BodyFate::Dropped);
    assert!(sse.is_end_stream() && sse.frame().await.is_none());
    assert_eq!(shutdown.requests(), 2);

    // Who comes straight back keeps its stream until there is nobody here.
    let mut back = streamed(&layer, stream("text/event-stream;x=y", events())).await;
    assert!(back.frame().await.unwrap().is_ok());
    let mut next = task::spawn(back.frame());
    assert_pending!(next.poll());
    advance(secs(5)).await;
    assert_eq!(shutdown.phase(), Phase::Closed);
    assert!(next.is_woken());
    assert!(assert_ready!(next.poll()).is_none());
    drop((next, other, grpc));
    assert!(driver.await.unwrap().is_clean());
}

/// A stream that ends by itself keeps its trailers.
#[tokio::test(start_paused = true)]
async fn a_stream_that_may_be_ended_keeps_its_trailers() {
    let shutdown = shutdown();
    let layer = DrainLayer::new(&shutdown).end_streams(["text/event-stream"]);
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", HeaderValue::from_static("7"));
    let body = ScriptedBody::new().data("x").trailers(trailers.clone());
    let body = streamed(&layer, stream("text/event-stream", body)).await;
    let whole = body.collect().await.unwrap();
    assert_eq!(whole.trailers(), Some(&trailers));
    assert_eq!(whole.to_bytes(), "x");
}

/// With it around, requests have names.
#[tokio::test(start_paused = true)]
async fn the_report_names_what_was_cut() {
    let shutdown = shutdown();
    let body = || {
        ScriptedBody::new()
            .data("12345")
            .wait(secs(1))
            .data("678")
            .hang()
    };
    let named = DrainLayer::new(&shutdown).route_by(|request: Head<'_>| match request.uri.path() {
        "/export" => "/export".into(),
        path => format!("other {}", path.len()).into(),
    });
    let plain = DrainLayer::new(&shutdown).layer(answers(body));
    let one = DrainLayer::new(&shutdown)
        .route("/one")
        .layer(answers(ScriptedBody::new));
    let named = named.layer(answers(body));

    let mut export = named.clone().oneshot(web::get("/export")).await.unwrap();
    for _ in 0..2 {
        assert!(export.body_mut().frame().await.unwrap().is_ok());
    }
    advance(secs(4)).await;
    let other = named.oneshot(web::get("/a/b?secret")).await.unwrap();
    let unknown = plain.oneshot(web::get("/")).await.unwrap();
    let whole = one.oneshot(web::get("/")).await.unwrap();
    assert!(whole.into_body().collect().await.is_ok());

    shutdown.trigger("test");
    let report = shutdown.run().await;
    assert_eq!((report.requests_cut(), report.exit_code()), (3, 124));
    let mut cut: Vec<_> = report.cut().iter().collect();
    cut.sort_by_key(|cut| cut.bytes());
    assert!(cut.iter().all(|cut| cut.kind() == CutKind::Request));
    let cut: Vec<_> = cut
        .iter()
        .map(|cut| {
            (
                cut.label().unwrap().as_str(),
                cut.age(),
                cut.bytes().unwrap(),
            )
        })
        .collect();
    assert_eq!(cut, [("other 4", secs(25), 0), ("/export", secs(30), 8)]);
    let text = report.to_string();
    assert!(
        text.contains("cut: 1 requests that were not tracked"),
        "{text}"
    );
    assert!(
        text.contains("cut: request /export after 30s and 8 bytes"),
        "{text}"
    );
    assert!(!text.contains("secret"));
    drop((export, other, unknown));
    assert_eq!(shutdown.requests(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_comes_after_the_listeners_are_closed_is_refused_where_that_is_asked_for() {
    let shutdown = shutdown();
    let layers = ServiceBuilder::new()
        .layer(DrainLayer::new(&shutdown))
        .layer(RefuseLayer::new(&shutdown).retry_after(secs(7)));
    let service = layers.service(answers(|| Full::<Bytes>::from("hello")));
    let ask = async |request: Request_| service.clone().oneshot(request).await.unwrap();
    let server = shutdown.server("http");
    let held = shutdown.guard("holds it open");
    let driver = run(&shutdown);
    settle().await;
    assert_eq!(ask(web::get("/")).await.status(), 200);
    shutdown.trigger("test");
    // For the whole delay, and from the backlog.
    assert_eq!(ask(web::get("/")).await.status(), 200);
    advance(secs(6)).await;
    assert_eq!(shutdown.phase(), Phase::Closing);
    let last = ask(web::get("/")).await;
    assert_eq!(last.status(), 200);
    drop(server);
    settle().await;

    let response = ask(web::get("/")).await;
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "7");
    assert_eq!(response.headers()["connection"], "close");
    assert!(
        web::text(response)
            .await
            .contains("\"reason\":\"draining\"")
    );
    let mut second = web::get("/");
    *second.version_mut() = Version::HTTP_2;
    assert!(!ask(second).await.headers().contains_key("connection"));
    let mut call = web::grpc("/svc/Method");
    *call.version_mut() = Version::HTTP_2;
    let response = ask(call).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["grpc-status"], "14");
    assert_eq!(response.headers()["grpc-retry-pushback-ms"], "7000");
    // What was answered before is not taken back.
    assert_eq!(web::text(last).await, "hello");
    assert_eq!(shutdown.requests(), 0);
    drop(held);
    assert!(driver.await.unwrap().is_clean());
}

#[tokio::test(start_paused = true)]
async fn refusals_can_be_ones_own() {
    let shutdown = shutdown();
    let responder = |refusal: &Refusal, request: Head<'_>| {
        let text = format!("{} {:?}", request.uri, refusal.retry_after());
        Response::builder()
            .status(410)
            .body(Bytes::from(text))
            .unwrap()
    };
    let layer = RefuseLayer::new(&shutdown)
        .retry_after(None)
        .responder(responder);
    let service = layer.layer(answers(|| Full::<Bytes>::from("hello")));
    shutdown.force("test");
    let _ = shutdown.run().await;
    let response = service.oneshot(web::get("/late")).await.unwrap();
    assert_eq!(response.status(), 410);
    assert_eq!(response.headers()["connection"], "close");
    assert_eq!(web::text(response).await, "/late None");
}
