//! Back-pressure: pending while it would refuse, woken when it would not.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::poll_fn,
    sync::{Arc, Mutex},
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use buttress_circuit_breaker::{
    Breaker, CircuitBreaker, CircuitBreakerLayer, Errors, Reason, ResultClassifier, Settings, State,
};
use buttress_core::{
    Any, BoxError,
    classify::Verdict,
    testing::{ReadinessProbe, Script, Scripted, Step, advance, elapsed, settle},
};
use tokio::task::JoinSet;
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};
use tower::{
    Layer, Service, ServiceExt, balance::p2c::Balance, discover::ServiceList,
    limit::ConcurrencyLimit, service_fn,
};

const SECOND: Duration = Duration::from_secs(1);

type Numbers = CircuitBreakerLayer<Any<u32>, Errors, ResultClassifier>;
type Echo<E = Infallible> = Scripted<u32, u32, E>;

fn numbers(settings: Settings) -> Numbers {
    CircuitBreakerLayer::any()
        .settings(settings)
        .back_pressure(true)
        .build()
        .unwrap()
}

fn touchy() -> Settings {
    Settings::aggressive().consecutive_failures(1)
}

fn echo() -> Echo {
    Script::new().otherwise(|n| Step::ok(*n)).build().0
}

type Ready<S> = task::Spawn<CircuitBreaker<S, Any<u32>, Errors, ResultClassifier>>;

fn poll<S>(service: &mut Ready<S>) -> Poll<bool>
where
    S: Service<u32> + Unpin,
{
    service
        .enter(|cx, mut service| service.poll_ready(cx))
        .map(|ready| ready.is_ok())
}

fn spawn(layer: &Numbers) -> Ready<Echo> {
    task::spawn(layer.layer(echo()))
}

#[tokio::test(start_paused = true)]
async fn readiness() {
    let probe = || ReadinessProbe::new(|| 1, |n: &u32| Step::<u32, Infallible>::ok(*n));
    let layer = numbers(touchy());
    probe().check(&layer).await;
    // Pending at first, and then a probe.
    layer.breaker().trip(None).unwrap();
    probe().check(&layer).await;
    assert_eq!(layer.breaker().state(), State::Closed);
}

/// Every change that lets calls pass wakes who waits.
#[tokio::test(start_paused = true)]
async fn it_is_woken_by_every_way_out() {
    type Way = (&'static str, fn(&Breaker));
    let ways: [Way; 5] = [
        ("reset", |breaker| breaker.reset()),
        ("closed", |breaker| breaker.close().unwrap()),
        ("half-open", |breaker| breaker.half_open().unwrap()),
        ("switched off", |breaker| breaker.force_closed()),
        ("metrics-only", |breaker| breaker.metrics_only()),
    ];
    for (way, change) in ways {
        let layer = numbers(touchy());
        layer.breaker().trip(None).unwrap();
        let mut service = spawn(&layer);
        assert_pending!(poll(&mut service), "{way}");
        assert_pending!(poll(&mut service), "{way}");
        assert!(!service.is_woken());
        change(layer.breaker());
        assert!(service.is_woken(), "{way}");
        assert!(assert_ready!(poll(&mut service), "{way}"));
    }
    // Forced open it waits for no time, only for a hand.
    let layer = numbers(touchy());
    layer.breaker().force_open();
    let mut service = spawn(&layer);
    assert_pending!(poll(&mut service));
    advance(1000 * SECOND).await;
    assert!(!service.is_woken());
    layer.breaker().reset();
    assert!(service.is_woken());
}

/// The timer wakes it when a probe is due; also after the wait was changed
/// meanwhile.
#[tokio::test(start_paused = true)]
async fn it_is_woken_when_it_is_due() {
    let layer = numbers(touchy());
    let breaker = layer.breaker();
    breaker.trip(None).unwrap();
    let mut service = spawn(&layer);
    assert_pending!(poll(&mut service));
    advance(10 * SECOND - Duration::from_millis(1)).await;
    assert!(!service.is_woken());
    advance(Duration::from_millis(1)).await;
    assert!(service.is_woken());
    // Nobody has called yet: it is open, and due.
    assert_eq!(breaker.state(), State::Open);
    assert!(assert_ready!(poll(&mut service)));

    breaker.reset();
    breaker.trip(60 * SECOND).unwrap();
    assert_pending!(poll(&mut service));
    breaker.reset();
    breaker.trip(5 * SECOND).unwrap();
    assert!(service.is_woken());
    assert_pending!(poll(&mut service));
    let (took, ready) = elapsed(poll_fn(|cx| service.poll_ready(cx))).await;
    ready.unwrap();
    assert_eq!(took, 5 * SECOND);
}

/// Half-open with its probes under way: woken when a place is free, and when
/// half-open was undecided for too long.
#[tokio::test(start_paused = true)]
async fn it_waits_for_a_probes_place() {
    let layer = numbers(touchy().half_open_probes(2).half_open_concurrency(1));
    let breaker = layer.breaker();
    breaker.trip(None).unwrap();
    breaker.half_open().unwrap();
    let mut service = spawn(&layer);
    assert!(assert_ready!(poll(&mut service)));
    let probe = breaker.try_acquire().unwrap();
    assert_pending!(poll(&mut service));
    drop(probe);
    assert!(service.is_woken());
    assert!(assert_ready!(poll(&mut service)));

    let probe = breaker.try_acquire().unwrap();
    assert_pending!(poll(&mut service));
    probe.record(Verdict::Success);
    assert!(service.is_woken());
    assert!(assert_ready!(poll(&mut service)));
    assert_eq!(breaker.state(), State::HalfOpen);

    let _hangs = breaker.try_acquire().unwrap();
    assert_pending!(poll(&mut service));
    // Overdue after 10 s, open for 10 s since then.
    let (took, ready) = elapsed(poll_fn(|cx| service.poll_ready(cx))).await;
    ready.unwrap();
    assert_eq!(took, 20 * SECOND);
}

/// The readiness of a moment ago may be wrong by now: the call is refused, and
/// takes no place.
#[tokio::test(start_paused = true)]
async fn it_is_looked_at_again_in_call() {
    let layer = numbers(touchy());
    layer.breaker().trip(None).unwrap();
    layer.breaker().half_open().unwrap();
    let (mut first, mut second) = (spawn(&layer), spawn(&layer));
    assert!(assert_ready!(poll(&mut first)) && assert_ready!(poll(&mut second)));
    let probe = first.call(1);
    let refused = second.call(2).await.unwrap_err();
    assert_eq!(refused.open().unwrap().reason(), Reason::HalfOpen);
    assert_pending!(poll(&mut second));
    assert_eq!(probe.await.unwrap(), 1);
    assert!(second.is_woken());
    assert!(assert_ready!(poll(&mut second)));
}

/// A service that is dropped while it waits is not woken, and a clone waits
/// for itself.
#[tokio::test(start_paused = true)]
async fn who_is_gone_is_not_woken_and_clones_wait_for_themselves() {
    let layer = numbers(touchy());
    layer.breaker().trip(None).unwrap();
    let (mut stays, mut goes) = (spawn(&layer), spawn(&layer));
    assert_pending!(poll(&mut stays));
    assert_pending!(poll(&mut goes));
    let mut clone = task::spawn(CircuitBreaker::clone(&stays));
    assert_pending!(poll(&mut clone));
    let late = task::spawn(CircuitBreaker::clone(&stays));
    *goes = layer.layer(echo());
    layer.breaker().reset();
    assert!(stays.is_woken() && clone.is_woken());
    assert!(!goes.is_woken() && !late.is_woken());

    // Ready again, it is not woken any more.
    assert!(assert_ready!(poll(&mut stays)));
    layer.breaker().trip(None).unwrap();
    layer.breaker().reset();
    assert!(!stays.is_woken());
}

/// Who has left changed the order of those that stay.
#[tokio::test(start_paused = true)]
async fn who_came_first_is_woken_first() {
    struct Numbered(usize, Arc<Mutex<Vec<usize>>>);
    impl Wake for Numbered {
        fn wake(self: Arc<Self>) {
            self.1.lock().unwrap().push(self.0);
        }
    }
    let layer = numbers(touchy());
    layer.breaker().force_open();
    let woken = Arc::new(Mutex::new(Vec::new()));
    let mut services: Vec<_> = (0..6)
        .map(|number| {
            let waker = Waker::from(Arc::new(Numbered(number, Arc::clone(&woken))));
            let mut service = layer.layer(service_fn(async |n: u32| Ok::<_, Infallible>(n)));
            assert_pending!(service.poll_ready(&mut Context::from_waker(&waker)));
            service
        })
        .collect();
    drop(services.remove(1));
    layer.breaker().reset();
    assert_eq!(*woken.lock().unwrap(), [0, 2, 3, 4, 5]);
}

/// No waiter, no timer and no breaker is kept alive by who has left.
#[tokio::test(start_paused = true)]
async fn nothing_leaks() {
    struct Counted(Arc<()>);
    let alive = Arc::new(());
    let counted = Counted(Arc::clone(&alive));
    let breaker = Breaker::builder("counted")
        .on_event(move |_, _| {
            let _ = &counted.0;
        })
        .build()
        .unwrap();
    let layer: Numbers = CircuitBreakerLayer::any()
        .breaker(breaker)
        .back_pressure(true)
        .build()
        .unwrap();
    layer.breaker().force_open();
    let mut services: Vec<_> = (0..100).map(|_| spawn(&layer)).collect();
    for service in &mut services {
        assert_pending!(poll(service));
    }
    drop(layer);
    assert_eq!(Arc::strong_count(&alive), 2);
    drop(services);
    assert_eq!(Arc::strong_count(&alive), 1);
}

/// While it waits it asks the inner service for nothing, and when it is
/// dropped nothing is reserved.
#[tokio::test(start_paused = true)]
async fn nothing_is_reserved_while_it_waits() {
    let (inner, script) = Script::<u32, u32, Infallible>::new()
        .otherwise(|n| Step::ok(*n))
        .build();
    let layer = numbers(touchy());
    layer.breaker().trip(None).unwrap();
    let limited = ConcurrencyLimit::new(inner, 1);
    let mut waits = task::spawn(layer.layer(limited.clone()));
    assert_pending!(poll(&mut waits));
    let mut other = limited;
    assert_eq!(other.ready().await.unwrap().call(5).await.unwrap(), 5);

    layer.breaker().reset();
    assert!(assert_ready!(poll(&mut waits)));
    layer.breaker().trip(None).unwrap();
    assert_pending!(poll(&mut waits));
    drop(waits);
    let mut other = task::spawn(other);
    assert_ready_ok!(other.enter(|cx, mut other| other.poll_ready(cx)));
    drop(other);
    script.assert_finished();
}

/// Many wait on threads, and are woken by a probe each: nobody is forgotten.
#[test]
fn no_wake_is_lost_under_contention() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .unwrap();
    let layer = numbers(touchy().half_open_probes(255).half_open_concurrency(1));
    layer.breaker().trip(None).unwrap();
    layer.breaker().half_open().unwrap();
    let service = layer.layer(service_fn(async |n: u32| {
        tokio::task::yield_now().await;
        Ok::<_, Infallible>(n)
    }));
    let done = runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for n in 0..200 {
            let mut service = service.clone();
            tasks.spawn(async move {
                // Refused where another was first: then it waits again.
                loop {
                    let result = service.ready().await.unwrap().call(n).await;
                    if let Ok(n) = result {
                        break n;
                    }
                }
            });
        }
        let all = tokio::time::timeout(60 * SECOND, tasks.join_all());
        all.await.expect("nobody waits for ever")
    });
    assert_eq!(done.len(), 200);
    assert_eq!(layer.breaker().status().probes_succeeded, 200);
}

// ---- Under tower's balancer.

/// Endpoints by number, each with a breaker, and how often each was called.
struct Endpoints {
    layers: Vec<Numbers>,
    calls: Arc<Mutex<HashMap<usize, u32>>>,
    down: Arc<Mutex<Option<usize>>>,
}

impl Endpoints {
    fn new(count: usize) -> Self {
        Self {
            layers: (0..count).map(|_| numbers(touchy())).collect(),
            calls: Arc::default(),
            down: Arc::default(),
        }
    }

    fn balance(
        &self,
    ) -> impl Service<u32, Response = usize, Error = BoxError, Future: Send> + use<> {
        let services = self.layers.iter().enumerate().map(|(endpoint, layer)| {
            let (calls, down) = (Arc::clone(&self.calls), Arc::clone(&self.down));
            let inner = service_fn(move |_: u32| {
                *calls.lock().unwrap().entry(endpoint).or_default() += 1;
                let down = *down.lock().unwrap() == Some(endpoint);
                async move { if down { Err("down") } else { Ok(endpoint) } }
            });
            tower::load::Constant::new(layer.layer(inner), 1)
        });
        let services: Vec<_> = services.collect();
        Balance::new(ServiceList::new(services))
    }

    fn take(&self) -> HashMap<usize, u32> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

/// An endpoint whose breaker is open is passed over, and comes back when it is
/// due.
#[tokio::test(start_paused = true)]
async fn a_balancer_passes_over_what_is_open() {
    let endpoints = Endpoints::new(2);
    let mut balance = endpoints.balance();
    for _ in 0..20 {
        balance.ready().await.unwrap().call(0).await.unwrap();
    }
    assert_eq!(endpoints.take().len(), 2);

    *endpoints.down.lock().unwrap() = Some(0);
    let mut failures = 0;
    for _ in 0..50 {
        failures += u32::from(balance.ready().await.unwrap().call(0).await.is_err());
    }
    // The one failure that opened it.
    assert_eq!(failures, 1);
    assert_eq!(endpoints.take()[&0], 1);

    // A probe, which fails, and again nothing.
    advance(10 * SECOND).await;
    settle().await;
    for _ in 0..50 {
        failures += u32::from(balance.ready().await.unwrap().call(0).await.is_err());
    }
    assert_eq!((failures, endpoints.take()[&0]), (2, 1));

    *endpoints.down.lock().unwrap() = None;
    advance(10 * SECOND).await;
    settle().await;
    for _ in 0..50 {
        balance.ready().await.unwrap().call(0).await.unwrap();
    }
    let calls = endpoints.take();
    assert!(calls[&0] > 5 && calls[&1] > 5, "{calls:?}");
    assert_eq!(endpoints.layers[0].breaker().state(), State::Closed);
}

/// With all of them open the balancer waits, and is woken by the first to be
/// due.
#[tokio::test(start_paused = true)]
async fn a_balancer_waits_for_the_first_that_is_due() {
    let endpoints = Endpoints::new(3);
    let mut balance = endpoints.balance();
    for (layer, wait) in endpoints.layers.iter().zip([30, 7, 20]) {
        layer.breaker().trip(wait * SECOND).unwrap();
    }
    let (took, answer) = elapsed(async { balance.ready().await.unwrap().call(0).await }).await;
    assert_eq!((took, answer.unwrap()), (7 * SECOND, 1));
}
