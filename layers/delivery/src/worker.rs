//! What makes the attempts: one task that says whose turn it is, and one for
//! each attempt.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use buttress_circuit_breaker::Permit;
use buttress_core::{clock, key::Key};
use buttress_webhook::{Message, WholeBody};
use http::{HeaderName, HeaderValue, Method, Request, header};
use tokio::{
    runtime::Handle,
    select,
    sync::oneshot,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tracing::{error, info, warn};

use crate::{
    Cause, DeliveryId, StartError,
    config::LOOK_AGAIN,
    outcome::{Next, backoff, judge},
    state::{Job, Now, Report},
    transport::{Exchange, caught},
    webhooks::Shared,
};

const ID: HeaderName = HeaderName::from_static("webhook-id");
const TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");

/// The worker of [`Webhooks`](crate::Webhooks): it makes attempts until it is
/// [stopped](Self::stop) or this is dropped.
///
/// Dropping it cuts the attempts off that are under way. What was accepted and
/// not delivered is in the queue, and the next
/// [`start`](crate::Webhooks::start) goes on with it.
#[must_use = "the worker ends when this is dropped"]
pub struct Worker {
    task: JoinHandle<Stopped>,
    stop: Option<oneshot::Sender<Duration>>,
    shared: Arc<Shared>,
}

/// How the worker has stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stopped {
    /// Attempts that were under way and came to their end.
    pub finished: usize,
    /// Attempts that were cut off. They will be made again: the endpoint may
    /// see these twice, with one id.
    pub cut_off: usize,
    /// Deliveries that are accepted and not over: they are in the queue.
    pub queued: usize,
}

impl Worker {
    /// Stops: no attempt begins any more, those under way have the grace to
    /// end, and what is left of them then is cut off. Nothing that was accepted
    /// is lost.
    ///
    /// Within the same grace the store is told of what has changed. What it has
    /// not taken by then it is told after the next start; in another process,
    /// what was delivered may be sent again.
    ///
    /// Dropping this future cuts them off at once.
    pub async fn stop(mut self, grace: Duration) -> Stopped {
        let began = clock::now();
        if let Some(stop) = self.stop.take() {
            // If nobody hears it, the runtime is shutting down.
            let _ = stop.send(grace);
        }
        let stopped = (&mut self.task).await.unwrap_or_default();
        let left = grace.saturating_sub(clock::now() - began);
        if timeout(left, self.shared.flush()).await.is_err() {
            let name = &*self.shared.name;
            warn!(name, "the store of deliveries was not told of all in time");
        }
        Stopped {
            queued: self.shared.state.lock().depth(),
            ..stopped
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.running.store(false, SeqCst);
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("name", &self.shared.name)
            .field("ended", &self.task.is_finished())
            .finish()
    }
}

pub(crate) fn start(shared: &Arc<Shared>) -> Result<Worker, StartError> {
    let handle = Handle::try_current().map_err(|_| StartError::NoRuntime)?;
    if shared.running.swap(true, SeqCst) {
        return Err(StartError::Running);
    }
    let (stop, stopped) = oneshot::channel();
    let task = handle.spawn(drive(Arc::clone(shared), stopped));
    Ok(Worker {
        task,
        stop: Some(stop),
        shared: Arc::clone(shared),
    })
}

async fn drive(shared: Arc<Shared>, mut stop: oneshot::Receiver<Duration>) -> Stopped {
    loop {
        // A clock of the user's may: what was under way is put back.
        match caught(work(&shared, &mut stop)).await {
            Some(stopped) => return stopped,
            None => error!(name = &*shared.name, "the webhooks' worker panicked"),
        }
        // It had been told to stop, and cannot be told again.
        if stop.is_terminated() {
            return Stopped::default();
        }
        sleep(LOOK_AGAIN).await;
    }
}

async fn work(shared: &Arc<Shared>, stop: &mut oneshot::Receiver<Duration>) -> Stopped {
    let mut flights = JoinSet::new();
    // Writes what no attempt does, so that the store keeps nobody waiting.
    let mut clerk = JoinSet::new();
    select! {
        biased;
        _ = &mut *stop => return Stopped::default(),
        () = shared.load() => {}
    }
    let grace = loop {
        while flights.try_join_next().is_some() {}
        let next = shared.dispatch(&mut flights);
        while clerk.try_join_next().is_some() {}
        if clerk.is_empty() && shared.state.lock().next_write().is_some() {
            let shared = Arc::clone(shared);
            clerk.spawn(async move { shared.flush().await });
        }
        let wait = next.map(|next| next - clock::now());
        select! {
            biased;
            grace = &mut *stop => break grace.unwrap_or_default(),
            () = shared.news.notified() => {}
            // More may have come while it was about to end.
            Some(_) = clerk.join_next(), if !clerk.is_empty() => {}
            () = sleep(wait.unwrap_or_default()), if wait.is_some() => {}
        }
    };
    // Not the tasks: one whose attempt is over may still wait for the store.
    let flying = || shared.state.lock().in_flight();
    let before = flying();
    let ends = async { while flights.join_next().await.is_some() {} };
    let _ = timeout(grace, ends).await;
    let cut_off = flying();
    // Each puts its delivery back when it is dropped.
    flights.shutdown().await;
    let stopped = Stopped {
        finished: before.saturating_sub(cut_off),
        cut_off,
        queued: shared.state.lock().depth(),
    };
    let Stopped {
        finished, queued, ..
    } = stopped;
    info!(
        name = &*shared.name,
        finished, cut_off, queued, "the webhooks' worker has stopped"
    );
    stopped
}

/// A delivery whose attempt is under way: unless it lands, it is put back.
struct Flight {
    shared: Arc<Shared>,
    id: DeliveryId,
    /// When it began, since the Unix epoch: nothing that may panic is asked
    /// when this is dropped.
    began: Duration,
    landed: bool,
}

impl Drop for Flight {
    fn drop(&mut self) {
        if !self.landed {
            let now = Now {
                at: clock::now(),
                unix: self.began,
            };
            self.shared.with(|state| state.cut_off(self.id, now));
            self.shared.news.notify_one();
        }
    }
}

impl Shared {
    /// Begins all attempts that may begin. When to come again.
    fn dispatch(self: &Arc<Self>, flights: &mut JoinSet<()>) -> Option<clock::Instant> {
        loop {
            let now = self.now();
            let (job, next) = self.with(|state| {
                state.fire(now);
                // Whose turn it is may be told to wait, too.
                (state.pick(now), state.next_timer())
            });
            let Some(job) = job else {
                return next;
            };
            let flight = Flight {
                shared: Arc::clone(self),
                id: job.record.id,
                began: now.unix,
                landed: false,
            };
            match self.gate(&job.target.lane) {
                Ok(permit) => drop(flights.spawn(attempt(flight, job, permit))),
                Err(wait) => {
                    let mut flight = flight;
                    flight.landed = true;
                    self.with(|state| state.put_back(flight.id, now.at + wait, now));
                }
            }
        }
    }

    /// Whether a lane may make an attempt, or when to ask again.
    fn gate(&self, lane: &str) -> Result<Option<Permit>, Duration> {
        let sound =
            |wait: Option<Duration>| wait.filter(|wait| !wait.is_zero()).unwrap_or(LOOK_AGAIN);
        let permit = match &self.breakers {
            None => None,
            Some(breakers) => {
                let permit = breakers.try_acquire(lane);
                Some(permit.map_err(|open| sound(open.retry_after()))?)
            }
        };
        // After the breaker: what it refuses costs the endpoint's rate nothing.
        // A permit that is not used counts as nothing.
        if let Some((_, rates)) = &self.rates {
            let charged = rates.check(&Key::from(lane));
            charged.map_err(|refusal| sound(refusal.retry_after()))?;
        }
        Ok(permit)
    }

    /// The request of one attempt: the same id and body, a new timestamp.
    fn request(&self, job: &Job, unix_now: Duration) -> Result<Request<WholeBody>, Cause> {
        let message = &job.record.message;
        let mut request = Request::new(WholeBody::new(message.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = job.target.url.clone();
        let headers = request.headers_mut();
        headers.clone_from(&job.target.headers);
        headers.insert(header::CONTENT_TYPE, message.content_type.clone());
        // For whose scheme signs neither: what a repeat is known by, in any
        // case.
        let id = HeaderValue::from_str(&message.id).map_err(|_| Cause::NotSigned)?;
        headers.insert(ID, id);
        headers.insert(TIMESTAMP, HeaderValue::from(unix_now.as_secs()));
        let Some(signer) = job.target.signer() else {
            return Ok(request);
        };
        let (mut head, body) = request.into_parts();
        let signed = Message {
            id: &message.id,
            timestamp: unix_now.as_secs(),
            body: &message.body,
        };
        signer
            .sign(&mut head, &signed)
            .map_err(|_| Cause::NotSigned)?;
        Ok(Request::from_parts(head, body))
    }
}

async fn attempt(mut flight: Flight, job: Job, permit: Option<Permit>) {
    let shared = Arc::clone(&flight.shared);
    let began = clock::now();
    let unix_now = shared.wall.unix_now();
    let mut exchange = Exchange::default();
    let outcome = caught(async {
        let request = shared.request(&job, unix_now)?;
        let transport = &shared.transport;
        let sending = transport.send(request, shared.caps, &shared.wall, &mut exchange);
        let limit = job.target.timeout;
        timeout(limit, sending).await.unwrap_or(Err(Cause::Timeout))
    });
    exchange.seen.trouble = match outcome.await {
        Some(Ok(())) => None,
        Some(Err(cause)) => Some(cause),
        None => {
            let (name, id) = (&*shared.name, flight.id);
            error!(name, %id, "the transport of webhooks panicked");
            Some(Cause::Panicked)
        }
    };
    let took = clock::now() - began;
    let Exchange { seen, body } = exchange;
    let judged = judge(&seen, &job.target.permanent);
    if let Some(permit) = permit {
        permit.record(judged.verdict);
    }
    let longest = job.target.max_retry_delay;
    let (wait, hold) = match &judged.next {
        Next::Retry { floor, .. } => {
            let retry = job.record.attempts.saturating_add(1);
            let first = job.target.retry_delay;
            // Whoever panics here must not have it sent again at once.
            let wait = caught(async { backoff(first, retry, longest, &shared.random) }).await;
            let wait = wait.unwrap_or(longest);
            let floor = floor.map(|floor| floor.min(longest));
            (wait.max(floor.unwrap_or_default()), floor)
        }
        _ => (Duration::ZERO, None),
    };
    let report = Report {
        next: judged.next,
        disable: judged.disable,
        wait,
        hold,
        status: seen.status,
        body: body.freeze(),
        took,
    };
    let now = shared.now();
    flight.landed = true;
    let outcome = shared.with(|state| state.conclude(flight.id, &report, now));
    shared.metrics.attempted(outcome, took);
    shared.news.notify_one();
    shared.flush().await;
}
