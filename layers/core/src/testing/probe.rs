//! The readiness probe.

use std::{
    fmt,
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Wake, Waker},
    time::Duration,
};

use tokio::time::timeout;
use tower_layer::Layer;
use tower_service::Service;

use super::{Script, ScriptHandle, Scripted, Step, elapsed, settle};

/// How long anything may take, on tokio's clock, before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Puts a layer to the test: does it treat its inner service's readiness as
/// `tower::Service` demands?
///
/// The inner service is a [`Scripted`] one, pending when it is first asked
/// ([`Script::pending_first`]), whose clones start unready. What is found out:
///
/// - a call to an instance that was not polled ready: the clone, most often,
///   made in `call` and called there;
/// - readiness that is taken and never used or given back, which would starve
///   a `ConcurrencyLimit` underneath;
/// - `Pending` from `poll_ready` without a wake-up to come;
/// - a dropped future that leaves its call in flight or its readiness taken;
/// - an answer that never comes.
///
/// A layer may refuse: whether and how the requests are answered is its own
/// affair.
///
/// ```
/// use buttress_core::testing::{ReadinessProbe, Step};
/// use tower::limit::ConcurrencyLimitLayer;
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// ReadinessProbe::new(|| "request", |_: &&str| Step::<_, ()>::ok("response"))
///     .check(&ConcurrencyLimitLayer::new(1))
///     .await;
/// # }
/// ```
pub struct ReadinessProbe<Req, Res, Err> {
    request: Box<dyn Fn() -> Req + Send + Sync>,
    answer: Answer<Req, Res, Err>,
}

type Answer<Req, Res, Err> = Arc<dyn Fn(&Req) -> Step<Res, Err> + Send + Sync>;

impl<Req, Res, Err> fmt::Debug for ReadinessProbe<Req, Res, Err> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadinessProbe").finish_non_exhaustive()
    }
}

impl<Req, Res, Err> ReadinessProbe<Req, Res, Err>
where
    Req: 'static,
    Res: 'static,
    Err: 'static,
{
    /// A probe that sends such requests, and whose inner service answers them
    /// so.
    pub fn new(
        request: impl Fn() -> Req + Send + Sync + 'static,
        answer: impl Fn(&Req) -> Step<Res, Err> + Send + Sync + 'static,
    ) -> Self {
        Self {
            request: Box::new(request),
            answer: Arc::new(answer),
        }
    }

    /// Tests the layer. What is hung is given an hour on tokio's clock: run it
    /// under `start_paused`, where an hour is nothing.
    ///
    /// # Panics
    ///
    /// If the layer fails; with what it did wrong.
    pub async fn check<L>(&self, layer: &L)
    where
        L: Layer<Scripted<Req, Res, Err>>,
        L::Service: Service<Req> + Clone,
    {
        self.calls_in_a_row(layer).await;
        self.clones(layer).await;
        self.unready(layer).await;
        self.ready_and_dropped(layer).await;
        self.futures_dropped(layer).await;
    }

    /// One instance, called again and again.
    async fn calls_in_a_row<L>(&self, layer: &L)
    where
        L: Layer<Scripted<Req, Res, Err>>,
        L::Service: Service<Req>,
    {
        let (inner, script) = self.script().build();
        let mut service = layer.layer(inner);
        for _ in 0..3 {
            self.call(&mut service, "a call in a row").await;
            at_rest(&script, "after a call").await;
        }
    }

    /// A clone is made where it might share what it should not.
    async fn clones<L>(&self, layer: &L)
    where
        L: Layer<Scripted<Req, Res, Err>>,
        L::Service: Service<Req> + Clone,
    {
        let (inner, script) = self.script().build();
        let mut first = layer.layer(inner);
        if ready(&mut first, "to be cloned").await {
            let mut second = first.clone();
            let answer = first.call((self.request)());
            let _ = within(answer, "the answer to the instance that was cloned").await;
            self.call(&mut second, "a clone").await;
            drop(second);
        }
        at_rest(&script, "after calls to clones").await;
    }

    /// The inner service gets ready late.
    async fn unready<L>(&self, layer: &L)
    where
        L: Layer<Scripted<Req, Res, Err>>,
        L::Service: Service<Req>,
    {
        let (inner, script) = self.script().unready().build();
        let mut service = layer.layer(inner);
        let woken = Arc::new(Woken(AtomicBool::new(false)));
        let waker = Waker::from(Arc::clone(&woken));
        // A layer may wake its own task and look again, but not for ever.
        let mut asleep = false;
        for _ in 0..100 {
            woken.0.store(false, Ordering::Release);
            let mut cx = Context::from_waker(&waker);
            let pending = service.poll_ready(&mut cx).is_pending();
            settle().await;
            asleep = pending && !woken.0.load(Ordering::Acquire);
            if asleep || !pending {
                break;
            }
        }
        script.set_ready();
        settle().await;
        assert!(
            !asleep || woken.0.load(Ordering::Acquire),
            "poll_ready was pending, and nothing woke its task when the inner service got ready"
        );
        self.call(&mut service, "one that was unready").await;
        at_rest(&script, "after the inner service got ready late").await;
    }

    /// Ready, and then not needed.
    async fn ready_and_dropped<L>(&self, layer: &L)
    where
        L: Layer<Scripted<Req, Res, Err>>,
        L::Service: Service<Req>,
    {
        let (inner, script) = self.script().build();
        let mut service = layer.layer(inner);
        ready(&mut service, "to be dropped").await;
        drop(service);
        at_rest(&script, "after a ready service was dropped").await;
    }

    /// The caller leaves: before the future was ever polled, and after.
    async fn futures_dropped<L>(&self, layer: &L)
    where
        L: Layer<Scripted<Req, Res, Err>>,
        L::Service: Service<Req>,
    {
        let script = Script::new().pending_first().otherwise(|_| Step::hang());
        let (inner, script) = script.build();
        let mut service = layer.layer(inner);
        for polls in 0..3 {
            if !ready(&mut service, "before its future is dropped").await {
                return;
            }
            let mut answer = Box::pin(service.call((self.request)()));
            for _ in 0..polls {
                if is_over(answer.as_mut()) {
                    break;
                }
                settle().await;
            }
            drop(answer);
            at_rest(&script, "after a future was dropped").await;
        }
    }

    fn script(&self) -> Script<Req, Res, Err> {
        let answer = Arc::clone(&self.answer);
        Script::new()
            .pending_first()
            .otherwise(move |request| answer(request))
    }

    async fn call<S: Service<Req>>(&self, service: &mut S, which: &str) {
        if ready(service, which).await {
            let answer = service.call((self.request)());
            let _ = within(answer, &format!("the answer to {which}")).await;
        }
    }
}

/// Polls it once, and lets no context live on over an await.
fn is_over(future: Pin<&mut impl Future>) -> bool {
    let mut cx = Context::from_waker(Waker::noop());
    future.poll(&mut cx).is_ready()
}

/// Whether it got ready; if not, it has failed, and may not be called.
async fn ready<Req, S: Service<Req>>(service: &mut S, which: &str) -> bool {
    let ready = poll_fn(|cx| service.poll_ready(cx));
    within(ready, &format!("readiness ({which})")).await.is_ok()
}

async fn within<F: Future>(future: F, what: &str) -> F::Output {
    match elapsed(timeout(PATIENCE, pin!(future))).await {
        // What is ready only because the time-out had it polled was not woken.
        (took, Ok(output)) if took < PATIENCE => output,
        _ => panic!("{what} never came"),
    }
}

async fn at_rest<Req, Res, Err>(script: &ScriptHandle<Req, Res, Err>, when: &str) {
    settle().await;
    script.assert_sound();
    let reserved = script.reserved();
    assert_eq!(
        reserved, 0,
        "{when}, inner instances are held that were polled ready and not called"
    );
    let in_flight = script.in_flight();
    assert_eq!(in_flight, 0, "{when}, calls are still in flight");
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}
