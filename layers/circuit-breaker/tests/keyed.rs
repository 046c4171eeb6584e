//! The layer with a breaker for each key.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use buttress_circuit_breaker::{
    CircuitBreakerLayer, CircuitOpen, PerKey, Registry, Respond, Settings, State,
};
use buttress_core::{
    Http, Refusal,
    classify::{HttpClassifier, Verdict},
    key::{self, ExtractKeyExt, Key},
    testing::{
        ReadinessProbe, Step, advance,
        web::{ScriptedBody, text},
    },
};
use bytes::Bytes;
use http::{Request, Response, StatusCode, header::RETRY_AFTER};
use http_body_util::{BodyExt, Full};
use tower::{Layer, Service, ServiceExt, service_fn};

type ByHost = CircuitBreakerLayer<Http, Respond, HttpClassifier, PerKey<Http>>;

fn by_host() -> ByHost {
    CircuitBreakerLayer::builder()
        .name("upstreams")
        .settings(Settings::aggressive())
        .per(key::host())
        .build()
        .unwrap()
}

fn to(host: &str) -> Request<()> {
    Request::builder()
        .uri(format!("http://{host}/some/path"))
        .body(())
        .unwrap()
}

/// An upstream for each host, which counts what reaches it; `dead` are.
#[derive(Clone, Default)]
struct Upstreams(Arc<Mutex<Vec<String>>>);

impl Upstreams {
    fn reached(&self, host: &str) -> usize {
        let seen = self.0.lock().unwrap();
        seen.iter().filter(|other| *other == host).count()
    }
}

impl Service<Request<()>> for Upstreams {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        let host = request.uri().host().unwrap_or("-").to_owned();
        let status = if host.starts_with("dead") { 502 } else { 200 };
        self.0.lock().unwrap().push(host);
        let response = Response::builder().status(status);
        ready(Ok(response.body(Full::from("hello")).unwrap()))
    }
}

/// The body is dropped, which decides nothing about a good head.
async fn status<S, B>(service: &S, request: Request<()>) -> u16
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible> + Clone,
{
    let response = service.clone().oneshot(request).await.unwrap();
    response.status().as_u16()
}

#[tokio::test(start_paused = true)]
async fn one_host_dies_and_the_other_is_unharmed() {
    let layer = by_host();
    let upstreams = Upstreams::default();
    let service = layer.layer(upstreams.clone());
    for _ in 0..3 {
        assert_eq!(status(&service, to("dead")).await, 502);
        assert_eq!(status(&service, to("alive")).await, 200);
    }
    for _ in 0..5 {
        let refused = service.clone().oneshot(to("DEAD.:8080")).await.unwrap();
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(refused.headers()[RETRY_AFTER], "10");
        // Nothing of the key is told to a client.
        let body = text(refused).await;
        assert!(
            !body.contains("dead") && !body.contains("upstreams"),
            "{body}"
        );
        assert_eq!(status(&service, to("alive")).await, 200);
    }
    assert_eq!(
        (upstreams.reached("dead"), upstreams.reached("alive")),
        (3, 8)
    );

    let states: Vec<_> = layer
        .registry()
        .statuses()
        .into_iter()
        .map(|(name, status)| (name.to_string(), status.state))
        .collect();
    let open = ("dead".to_owned(), State::Open);
    assert_eq!(states, [("alive".to_owned(), State::Closed), open]);

    // One probe, and it is dead yet.
    advance(Duration::from_secs(10)).await;
    assert_eq!(status(&service, to("dead")).await, 502);
    assert_eq!(status(&service, to("dead")).await, 503);
    assert_eq!(upstreams.reached("dead"), 4);
    layer.registry().reset_all();
    assert_eq!(status(&service, to("dead")).await, 502);
}

#[tokio::test(start_paused = true)]
async fn all_layers_and_services_of_one_share_its_breakers() {
    let registry = Registry::builder("shared")
        .settings(Settings::aggressive())
        .build()
        .unwrap();
    let layer = || {
        CircuitBreakerLayer::builder()
            .per(key::host())
            .registry(registry.clone())
            .build()
            .unwrap()
    };
    let upstreams = Upstreams::default();
    let (one, two) = (
        layer().layer(upstreams.clone()),
        layer().clone().layer(upstreams.clone()),
    );
    for service in [&one, &two, &one] {
        assert_eq!(status(service, to("dead")).await, 502);
    }
    assert_eq!(status(&two, to("dead")).await, 503);
    assert_eq!(registry.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn requests_without_a_key_share_one() {
    let layer = by_host();
    let upstreams = Upstreams::default();
    let failing = layer.layer(service_fn(|_: Request<()>| {
        ready(Ok::<_, Infallible>(
            Response::builder()
                .status(500)
                .body(Full::<Bytes>::default())
                .unwrap(),
        ))
    }));
    let bare = || Request::builder().uri("/").body(()).unwrap();
    for _ in 0..3 {
        assert_eq!(status(&failing, bare()).await, 500);
    }
    assert_eq!(status(&failing, bare()).await, 503);
    let shared = layer.registry().get(&Key::global()).unwrap();
    assert_eq!(shared.state(), State::Open);
    assert_eq!(
        status(&layer.layer(upstreams.clone()), to("alive")).await,
        200
    );
    assert_eq!(layer.registry().len(), 2);

    // Or another's, by choice.
    let named = CircuitBreakerLayer::builder()
        .per(key::host().or(Key::from("none")))
        .build()
        .unwrap();
    let service = named.layer(upstreams.clone());
    assert_eq!(status(&service, bare()).await, 200);
    assert!(named.registry().get("none").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_invents_hosts_gains_nothing() {
    let heard = Arc::new(Mutex::new(std::collections::BTreeSet::new()));
    let names = Arc::clone(&heard);
    let layer = CircuitBreakerLayer::builder()
        .name("proxy")
        .settings(Settings::aggressive())
        .on_event(move |name, _| {
            names.lock().unwrap().insert(name.to_owned());
        })
        .per(key::host())
        .max_keys(100)
        .build()
        .unwrap();
    let upstreams = Upstreams::default();
    let service = layer.layer(upstreams.clone());
    for _ in 0..3 {
        assert_eq!(status(&service, to("dead")).await, 502);
    }
    for n in 0..5000 {
        assert_eq!(status(&service, to(&format!("h{n}"))).await, 200);
        // A header is what the client says.
        let forged = Request::builder().header("host", format!("f{n}")).body(());
        assert_eq!(status(&service, forged.unwrap()).await, 200);
    }
    assert_eq!(status(&service, to("dead")).await, 503);
    assert_eq!(layer.registry().len(), 100);
    // One name, however many keys.
    let heard = heard.lock().unwrap();
    assert_eq!(heard.iter().collect::<Vec<_>>(), ["proxy"]);
}

#[tokio::test(start_paused = true)]
async fn a_body_tells_its_own_keys_breaker() {
    let layer = by_host();
    let service = layer.layer(service_fn(|request: Request<()>| {
        let body = ScriptedBody::new().data("half");
        let body = if request.uri().host() == Some("broken") {
            body.fail("cut off")
        } else {
            body.data(" and half")
        };
        ready(Ok::<_, Infallible>(Response::new(body)))
    }));
    for _ in 0..3 {
        for host in ["broken", "whole"] {
            let response = service.clone().oneshot(to(host)).await.unwrap();
            let whole = response.into_body().collect().await;
            assert_eq!(whole.is_ok(), host == "whole");
        }
    }
    let state = |host: &str| {
        let all = layer.registry().breakers().into_iter();
        let mut own = all.filter(|(name, _)| **name == *host);
        own.next().unwrap().1.state()
    };
    assert_eq!(
        (state("broken"), state("whole")),
        (State::Open, State::Closed)
    );
}

#[tokio::test(start_paused = true)]
async fn any_service_by_a_closure_with_errors_or_a_fallback() {
    let layer = CircuitBreakerLayer::any()
        .settings(Settings::new().consecutive_failures(1))
        .per(key::from_request(|job: &(&str, bool)| Key::from(job.0)))
        .name_keys(true)
        .build()
        .unwrap();
    let work =
        || service_fn(|(_, fine): (&'static str, bool)| ready(fine.then_some(1).ok_or("bad")));
    let service = layer.layer(work());
    let call = |tenant, fine| service.clone().oneshot((tenant, fine));
    assert_eq!(
        call("a", false).await.unwrap_err().into_inner(),
        Some("bad")
    );
    let error = call("a", true).await.unwrap_err();
    assert_eq!(error.open().unwrap().name().as_deref(), Some("a"));
    assert!(
        Refusal::from(*error.open().unwrap())
            .retry_after()
            .is_some()
    );
    assert_eq!(call("b", true).await.unwrap(), 1);

    let refused = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&refused);
    let layer = CircuitBreakerLayer::any()
        .per(key::from_request(|job: &(&str, bool)| Key::from(job.0)))
        .registry(layer.registry().clone())
        .fallback(move |_: (&'static str, bool), _: CircuitOpen| {
            counted.fetch_add(1, SeqCst);
            ready(Ok::<_, &'static str>(7))
        })
        .build()
        .unwrap();
    let service = layer.layer(work());
    assert_eq!(service.clone().oneshot(("a", true)).await, Ok(7));
    assert_eq!(service.oneshot(("b", true)).await, Ok(1));
    assert_eq!(refused.load(SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn readiness() {
    let layer = CircuitBreakerLayer::any()
        .per(key::from_request(|n: &u32| Key::from(*n)))
        .build()
        .unwrap();
    let probe = || ReadinessProbe::new(|| 1, |n: &u32| Step::<u32, Infallible>::ok(*n));
    probe().check(&layer).await;
    let breaker = layer.registry().get(&Key::from(1_u32)).unwrap();
    breaker.trip(None).unwrap();
    breaker.half_open().unwrap();
    probe().check(&layer).await;
    assert_eq!(breaker.status().probes_in_flight, 0);
}

/// A key that is there costs none, short or long, passed or refused.
#[test]
fn a_known_key_costs_no_allocation() {
    let long = "a-name-that-is-too-long-to-be-kept-inline.example.org";
    for host in ["short", long] {
        let registry = Registry::builder("r").build().unwrap();
        registry.get_or_create("open").force_open();
        let layer = CircuitBreakerLayer::any()
            .per(key::from_request(|n: &u64| Key::from(*n)))
            .registry(registry.clone())
            .build()
            .unwrap();
        let mut service = layer.layer(service_fn(|_: u64| ready(Ok::<_, ()>(()))));
        registry.get_or_create(&Key::from(8_u64)).force_open();
        let mut cost = || {
            let permit = registry.try_acquire(host).unwrap();
            permit.record(Verdict::Failure);
            assert!(registry.try_acquire("open").is_err());
            for n in [7, 8] {
                let mut call = std::pin::pin!(service.call(n));
                let poll = call.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                assert!(poll.is_ready());
            }
        };
        cost();
        let counted = allocation_counter::measure(cost);
        assert_eq!(counted.count_total, 0, "{host}");
    }
}

/// What a million keys take beyond the first thousand: nothing, and no place
/// of one that is open.
#[test]
fn a_flood_of_keys_takes_no_memory() {
    let registry = Registry::builder("flooded").build().unwrap();
    let flood = |keys: Range<u64>| {
        allocation_counter::measure(|| {
            for key in keys {
                let permit = registry.try_acquire(&Key::from(key)).unwrap();
                permit.record(Verdict::Success);
            }
        })
    };
    let dead = |key: u64| Key::from(u64::MAX - key);
    for key in 0..5 {
        registry.get_or_create(&dead(key)).trip(None).unwrap();
    }
    let first = flood(0..995);
    assert!(first.bytes_max < 1_500_000, "{first:?}");
    let rest = flood(995..1_000_000);
    // Here and there a table grows, as keys are not spread quite evenly.
    assert!(rest.bytes_max < 100_000, "{rest:?}");
    assert_eq!(registry.len(), 1000);
    assert_eq!(registry.evicted(), 999_005);
    assert_eq!(registry.overflowed(), 0);
    for key in 0..5 {
        let breaker = registry.get(&dead(key)).unwrap();
        assert_eq!(breaker.state(), State::Open);
    }
}
