//! The scripted service.

use std::{
    borrow::Cow,
    collections::VecDeque,
    fmt, mem,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Sleep, sleep, timeout},
};
use tower_service::Service;

use crate::clock::{self, Instant};

/// What becomes of one call: an outcome, and what comes before it.
pub struct Step<Res, Err> {
    delay: Duration,
    held: bool,
    outcome: Outcome<Res, Err>,
}

enum Outcome<Res, Err> {
    Done(Result<Res, Err>),
    Hang,
    Panic(Cow<'static, str>),
    PanicInCall(Cow<'static, str>),
}

impl<Res, Err> Step<Res, Err> {
    const fn of(outcome: Outcome<Res, Err>) -> Self {
        Self {
            delay: Duration::ZERO,
            held: false,
            outcome,
        }
    }

    /// An answer.
    pub const fn ok(response: Res) -> Self {
        Self::of(Outcome::Done(Ok(response)))
    }

    /// An error.
    pub const fn err(error: Err) -> Self {
        Self::of(Outcome::Done(Err(error)))
    }

    /// A future that never ends.
    #[must_use]
    pub const fn hang() -> Self {
        Self::of(Outcome::Hang)
    }

    /// A future that panics when it would end.
    #[must_use]
    pub fn panic(message: impl Into<Cow<'static, str>>) -> Self {
        Self::of(Outcome::Panic(message.into()))
    }

    /// A panic in `call` itself, before there is a future.
    #[must_use]
    pub fn panic_in_call(message: impl Into<Cow<'static, str>>) -> Self {
        Self::of(Outcome::PanicInCall(message.into()))
    }

    /// Comes this long after the call, on tokio's clock.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Comes when the handle [releases](ScriptHandle::release) the call, and
    /// no earlier than [`after`](Self::after) says.
    #[must_use]
    pub fn held(mut self) -> Self {
        self.held = true;
        self
    }
}

impl<Res, Err> fmt::Debug for Step<Res, Err> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match &self.outcome {
            Outcome::Done(Ok(_)) => "ok",
            Outcome::Done(Err(_)) => "err",
            Outcome::Hang => "hang",
            Outcome::Panic(_) => "panic",
            Outcome::PanicInCall(_) => "panic in call",
        };
        f.debug_struct("Step")
            .field("outcome", &outcome)
            .field("after", &self.delay)
            .field("held", &self.held)
            .finish()
    }
}

/// Writes a scripted service: one [`Step`] a call, in the order of the calls.
///
/// ```
/// use std::time::Duration;
/// use buttress_core::testing::{Fate, Script, Step};
/// use tower::{Service, ServiceExt};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let (mut service, script) = Script::<u32, &str, &str>::new()
///     .then(Step::ok("first").after(Duration::from_secs(2)))
///     .then(Step::err("down"))
///     .build();
///
/// assert_eq!(service.ready().await.unwrap().call(1).await, Ok("first"));
/// assert_eq!(service.ready().await.unwrap().call(2).await, Err("down"));
///
/// assert_eq!(script.requests(), [1, 2]);
/// assert_eq!(script.arrivals(), [Duration::ZERO, Duration::from_secs(2)]);
/// assert_eq!(script.count(Fate::Failed), 1);
/// script.assert_finished();
/// # }
/// ```
pub struct Script<Req, Res, Err> {
    steps: VecDeque<Step<Res, Err>>,
    otherwise: Option<Otherwise<Req, Res, Err>>,
    ready: bool,
    ready_after: Duration,
    pending_first: bool,
}

type Otherwise<Req, Res, Err> = Box<dyn Fn(&Req) -> Step<Res, Err> + Send + Sync>;

impl<Req, Res, Err> Script<Req, Res, Err> {
    /// An empty script of a service that is always ready.
    #[must_use]
    pub fn new() -> Self {
        Self {
            steps: VecDeque::new(),
            otherwise: None,
            ready: true,
            ready_after: Duration::ZERO,
            pending_first: false,
        }
    }

    /// Adds a step.
    #[must_use]
    pub fn then(mut self, step: Step<Res, Err>) -> Self {
        self.steps.push_back(step);
        self
    }

    /// What becomes of calls for which no step is left. Without it such a call
    /// panics.
    #[must_use]
    pub fn otherwise(
        mut self,
        step: impl Fn(&Req) -> Step<Res, Err> + Send + Sync + 'static,
    ) -> Self {
        self.otherwise = Some(Box::new(step));
        self
    }

    /// Starts unready: nothing is ready until
    /// [`set_ready`](ScriptHandle::set_ready).
    #[must_use]
    pub fn unready(mut self) -> Self {
        self.ready = false;
        self
    }

    /// Every instance gets ready this long after it is first asked, on tokio's
    /// clock, and again so after each call.
    #[must_use]
    pub fn ready_after(mut self, delay: Duration) -> Self {
        self.ready_after = delay;
        self
    }

    /// Every instance is pending when it is first asked, wakes its task at
    /// once, and is ready when asked again; and again so after each call. What
    /// polls an inner service only once, or drops a `Pending`, is found out.
    #[must_use]
    pub fn pending_first(mut self) -> Self {
        self.pending_first = true;
        self
    }

    /// The service, and the handle that rules and observes all its clones.
    #[must_use]
    pub fn build(self) -> (Scripted<Req, Res, Err>, ScriptHandle<Req, Res, Err>) {
        let shared = Arc::new(Shared {
            started: clock::now(),
            otherwise: self.otherwise,
            ready_after: self.ready_after,
            pending_first: self.pending_first,
            arrived: Notify::new(),
            state: Mutex::new(State {
                steps: self.steps,
                ready: self.ready,
                ready_errors: VecDeque::new(),
                waiting: Vec::new(),
                ready_polls: 0,
                reserved: 0,
                requests: Vec::new(),
                calls: Vec::new(),
                peak: 0,
                violations: Vec::new(),
            }),
        });
        let handle = ScriptHandle {
            shared: Arc::clone(&shared),
        };
        (Scripted::unready(shared), handle)
    }
}

impl<Req, Res, Err> Default for Script<Req, Res, Err> {
    fn default() -> Self {
        Self::new()
    }
}

impl<Req, Res, Err> fmt::Debug for Script<Req, Res, Err> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script")
            .field("steps", &self.steps)
            .field("otherwise", &self.otherwise.is_some())
            .finish_non_exhaustive()
    }
}

struct Shared<Req, Res, Err> {
    started: Instant,
    otherwise: Option<Otherwise<Req, Res, Err>>,
    ready_after: Duration,
    pending_first: bool,
    arrived: Notify,
    state: Mutex<State<Req, Res, Err>>,
}

struct State<Req, Res, Err> {
    steps: VecDeque<Step<Res, Err>>,
    ready: bool,
    ready_errors: VecDeque<Err>,
    waiting: Vec<Waker>,
    ready_polls: usize,
    reserved: usize,
    requests: Vec<Req>,
    calls: Vec<Running>,
    peak: usize,
    violations: Vec<String>,
}

struct Running {
    call: Call,
    released: bool,
    waker: Option<Waker>,
}

impl<Req, Res, Err> Shared<Req, Res, Err> {
    fn lock(&self) -> MutexGuard<'_, State<Req, Res, Err>> {
        // A panic is a step like any other.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Req, Res, Err> State<Req, Res, Err> {
    fn count(&self, fate: Fate) -> usize {
        self.calls
            .iter()
            .filter(|running| running.call.fate == fate)
            .count()
    }
}

/// One call that a scripted service got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Call {
    /// When it came: since the script was built, on tokio's clock.
    pub at: Duration,
    /// What became of it.
    pub fate: Fate,
}

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// Nothing yet.
    InFlight,
    /// It was answered.
    Answered,
    /// It failed.
    Failed,
    /// It panicked.
    Panicked,
    /// Its future was dropped before the end.
    Dropped,
}

/// A service that follows a [`Script`].
///
/// It insists on the contract of `tower::Service`: each instance must have
/// been polled ready since its last call, and a clone starts unready. A call
/// that breaks this **panics**, and is kept as a violation for
/// [`assert_finished`](ScriptHandle::assert_finished), in case the panic was
/// swallowed by a task. So does a call for which there is no step.
///
/// It keeps every request until
/// [`take_requests`](ScriptHandle::take_requests), with all that is in it.
pub struct Scripted<Req, Res, Err> {
    shared: Arc<Shared<Req, Res, Err>>,
    ready: Ready,
}

enum Ready {
    No,
    Waiting(Pin<Box<Sleep>>),
    /// Was pending once, as `pending_first` wants.
    Asked,
    Yes,
}

impl<Req, Res, Err> Scripted<Req, Res, Err> {
    const fn unready(shared: Arc<Shared<Req, Res, Err>>) -> Self {
        Self {
            shared,
            ready: Ready::No,
        }
    }

    /// Gives the readiness back.
    fn unreserve(&mut self, state: &mut State<Req, Res, Err>) -> bool {
        let was = matches!(mem::replace(&mut self.ready, Ready::No), Ready::Yes);
        state.reserved -= usize::from(was);
        was
    }
}

impl<Req, Res, Err> Clone for Scripted<Req, Res, Err> {
    fn clone(&self) -> Self {
        Self::unready(Arc::clone(&self.shared))
    }
}

impl<Req, Res, Err> Drop for Scripted<Req, Res, Err> {
    fn drop(&mut self) {
        let shared = Arc::clone(&self.shared);
        self.unreserve(&mut shared.lock());
    }
}

impl<Req, Res, Err> fmt::Debug for Scripted<Req, Res, Err> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scripted")
            .field("ready", &matches!(self.ready, Ready::Yes))
            .finish_non_exhaustive()
    }
}

impl<Req, Res, Err> Service<Req> for Scripted<Req, Res, Err> {
    type Response = Res;
    type Error = Err;
    type Future = ScriptedFuture<Req, Res, Err>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Err>> {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        state.ready_polls += 1;
        if let Some(error) = state.ready_errors.pop_front() {
            self.unreserve(&mut state);
            return Poll::Ready(Err(error));
        }
        if matches!(self.ready, Ready::Yes) {
            return Poll::Ready(Ok(()));
        }
        if !state.ready {
            self.ready = Ready::No;
            if !state.waiting.iter().any(|w| w.will_wake(cx.waker())) {
                state.waiting.push(cx.waker().clone());
            }
            return Poll::Pending;
        }
        // Timers and wakers are other people's code.
        drop(state);
        loop {
            match &mut self.ready {
                Ready::No if shared.pending_first => {
                    self.ready = Ready::Asked;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Ready::No | Ready::Asked if !shared.ready_after.is_zero() => {
                    self.ready = Ready::Waiting(Box::pin(sleep(shared.ready_after)));
                }
                Ready::Waiting(sleep) => {
                    ready!(sleep.as_mut().poll(cx));
                    break;
                }
                _ => break,
            }
        }
        self.ready = Ready::Yes;
        shared.lock().reserved += 1;
        Poll::Ready(Ok(()))
    }

    #[track_caller]
    fn call(&mut self, request: Req) -> Self::Future {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        let nth = state.calls.len();
        if !self.unreserve(&mut state) {
            let violation = format!(
                "call {nth} came to an instance that was not polled ready: \
                 call the instance that was, and keep the clone"
            );
            state.violations.push(violation.clone());
            drop(state);
            panic!("{violation}");
        }
        let step = state.steps.pop_front();
        drop(state);

        let step = step.or_else(|| Some((shared.otherwise.as_ref()?)(&request)));
        let mut state = shared.lock();
        let Some(step) = step else {
            let violation = format!("call {nth} came, and the script had come to its end");
            state.violations.push(violation.clone());
            drop(state);
            panic!("{violation}");
        };

        let id = state.calls.len();
        let at = clock::now() - shared.started;
        let fate = match step.outcome {
            Outcome::PanicInCall(_) => Fate::Panicked,
            _ => Fate::InFlight,
        };
        state.requests.push(request);
        state.calls.push(Running {
            call: Call { at, fate },
            released: false,
            waker: None,
        });
        state.peak = state.peak.max(state.count(Fate::InFlight));
        drop(state);
        shared.arrived.notify_waiters();
        if let Outcome::PanicInCall(message) = &step.outcome {
            panic!("{message}");
        }
        ScriptedFuture {
            shared,
            id,
            sleep: (!step.delay.is_zero()).then(|| Box::pin(sleep(step.delay))),
            held: step.held,
            outcome: Some(step.outcome),
        }
    }
}

/// The response future of [`Scripted`].
pub struct ScriptedFuture<Req, Res, Err> {
    shared: Arc<Shared<Req, Res, Err>>,
    id: usize,
    sleep: Option<Pin<Box<Sleep>>>,
    held: bool,
    /// `None` once it has ended.
    outcome: Option<Outcome<Res, Err>>,
}

/// Nothing in it is pinned.
impl<Req, Res, Err> Unpin for ScriptedFuture<Req, Res, Err> {}

impl<Req, Res, Err> ScriptedFuture<Req, Res, Err> {
    fn end(&self, fate: Fate) {
        let mut state = self.shared.lock();
        let running = &mut state.calls[self.id];
        running.call.fate = fate;
        running.waker = None;
    }
}

impl<Req, Res, Err> Future for ScriptedFuture<Req, Res, Err> {
    type Output = Result<Res, Err>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(sleep) = &mut self.sleep {
            ready!(sleep.as_mut().poll(cx));
            self.sleep = None;
        }
        if self.held {
            let id = self.id;
            let mut state = self.shared.lock();
            let running = &mut state.calls[id];
            if !running.released {
                running.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            drop(state);
            self.held = false;
        }
        match self.outcome.take().expect("polled after completion") {
            Outcome::Done(result) => {
                self.end(if result.is_ok() {
                    Fate::Answered
                } else {
                    Fate::Failed
                });
                Poll::Ready(result)
            }
            Outcome::Hang => {
                self.outcome = Some(Outcome::Hang);
                Poll::Pending
            }
            Outcome::Panic(message) | Outcome::PanicInCall(message) => {
                self.end(Fate::Panicked);
                panic!("{message}");
            }
        }
    }
}

impl<Req, Res, Err> Drop for ScriptedFuture<Req, Res, Err> {
    fn drop(&mut self) {
        if self.outcome.is_some() {
            self.end(Fate::Dropped);
        }
    }
}

impl<Req, Res, Err> fmt::Debug for ScriptedFuture<Req, Res, Err> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptedFuture")
            .field("call", &self.id)
            .finish_non_exhaustive()
    }
}

/// Rules a [`Scripted`] service and all its clones, and tells what they saw.
///
/// Calls are numbered from 0 in the order in which they came.
pub struct ScriptHandle<Req, Res, Err> {
    shared: Arc<Shared<Req, Res, Err>>,
}

impl<Req, Res, Err> ScriptHandle<Req, Res, Err> {
    /// Adds a step at the end of the script.
    pub fn push(&self, step: Step<Res, Err>) {
        self.shared.lock().steps.push_back(step);
    }

    /// Everything may get ready from now on; who waits is woken.
    pub fn set_ready(&self) {
        let mut state = self.shared.lock();
        state.ready = true;
        let waiting = mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Nothing gets ready from now on. What was promised is kept: an instance
    /// that is ready stays so until it is called.
    pub fn set_unready(&self) {
        self.shared.lock().ready = false;
    }

    /// The next `poll_ready`, of whichever instance, gives this error; who
    /// waits is woken.
    pub fn fail_readiness(&self, error: Err) {
        let mut state = self.shared.lock();
        state.ready_errors.push_back(error);
        let waiting = mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Lets the [held](Step::held) call of this number end.
    ///
    /// # Panics
    ///
    /// If no such call has come.
    #[track_caller]
    pub fn release(&self, call: usize) {
        let mut state = self.shared.lock();
        let came = state.calls.len();
        let Some(running) = state.calls.get_mut(call) else {
            drop(state);
            panic!("call {call} was to be released, and {came} have come");
        };
        running.released = true;
        let waker = running.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Lets every [held](Step::held) call that has come so far end.
    pub fn release_all(&self) {
        let came = self.shared.lock().calls.len();
        (0..came).for_each(|call| self.release(call));
    }

    /// The requests, which are not kept any longer.
    #[must_use]
    pub fn take_requests(&self) -> Vec<Req> {
        mem::take(&mut self.shared.lock().requests)
    }

    /// Copies of the requests that were not taken yet.
    #[must_use]
    pub fn requests(&self) -> Vec<Req>
    where
        Req: Clone,
    {
        self.shared.lock().requests.clone()
    }

    /// The calls so far.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        let state = self.shared.lock();
        state.calls.iter().map(|running| running.call).collect()
    }

    /// When the calls came: since the script was built, on tokio's clock.
    #[must_use]
    pub fn arrivals(&self) -> Vec<Duration> {
        self.calls().into_iter().map(|call| call.at).collect()
    }

    /// How many calls have come.
    #[must_use]
    pub fn call_count(&self) -> usize {
        self.shared.lock().calls.len()
    }

    /// How many calls have met this fate.
    #[must_use]
    pub fn count(&self, fate: Fate) -> usize {
        self.shared.lock().count(fate)
    }

    /// How many calls are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.count(Fate::InFlight)
    }

    /// How many calls were in flight at most.
    #[must_use]
    pub fn peak_in_flight(&self) -> usize {
        self.shared.lock().peak
    }

    /// How many instances were polled ready and neither called nor dropped
    /// since: what a layer holds in reserve.
    #[must_use]
    pub fn reserved(&self) -> usize {
        self.shared.lock().reserved
    }

    /// How often `poll_ready` was called.
    #[must_use]
    pub fn ready_polls(&self) -> usize {
        self.shared.lock().ready_polls
    }

    /// Waits until this many calls have come. Dropping the future changes
    /// nothing.
    ///
    /// # Panics
    ///
    /// If they have not come within a year on tokio's clock: paused, that is
    /// at once when there is nothing left that could make them come.
    pub async fn wait_for_calls(&self, calls: usize) {
        const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

        let all = async {
            loop {
                let mut arrived = pin!(self.shared.arrived.notified());
                // Listens before it looks: what comes in between is heard.
                arrived.as_mut().enable();
                if self.call_count() >= calls {
                    return;
                }
                arrived.await;
            }
        };
        if timeout(YEAR, all).await.is_err() {
            let came = self.call_count();
            panic!("{calls} calls were waited for, and {came} have come");
        }
    }

    /// Asserts that no call broke the contract of `tower::Service`.
    ///
    /// # Panics
    ///
    /// If one did; with what it did.
    #[track_caller]
    pub fn assert_sound(&self) {
        let violations = self.shared.lock().violations.clone();
        assert!(violations.is_empty(), "{}", violations.join("\n"));
    }

    /// Asserts that all is over: no call broke the contract, every step was
    /// used, nothing is in flight and no readiness is held in reserve.
    ///
    /// # Panics
    ///
    /// If it is not so; with what is not.
    #[track_caller]
    pub fn assert_finished(&self) {
        self.assert_sound();
        let state = self.shared.lock();
        let (steps, in_flight) = (state.steps.len(), state.count(Fate::InFlight));
        let reserved = state.reserved;
        drop(state);
        assert_eq!(steps, 0, "steps of the script were not used");
        assert_eq!(in_flight, 0, "calls are still in flight");
        assert_eq!(reserved, 0, "instances were polled ready and never called");
    }
}

impl<Req, Res, Err> Clone for ScriptHandle<Req, Res, Err> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<Req, Res, Err> fmt::Debug for ScriptHandle<Req, Res, Err> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.lock();
        f.debug_struct("ScriptHandle")
            .field("steps", &state.steps)
            .field("ready", &state.ready)
            .field("reserved", &state.reserved)
            .field(
                "calls",
                &state.calls.iter().map(|r| r.call).collect::<Vec<_>>(),
            )
            .field("violations", &state.violations)
            .finish_non_exhaustive()
    }
}
