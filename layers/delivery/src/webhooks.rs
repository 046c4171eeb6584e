//! The handle, and what it shares with the worker.

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use buttress_circuit_breaker::Registry;
use buttress_core::{
    BoxError,
    clock::{self, SharedWallClock},
    random::SharedRandom,
    sync::Mutex,
};
use buttress_rate_limit::{Handle, LimitHandle};
use buttress_webhook::Signer;
use tokio::sync::Notify;
use tracing::{debug, info, warn};

use crate::{
    DeadLetter, DeliveryId, DeliveryResult, DeliveryStore, EmitError, Event, Record, RedriveError,
    RegisterError, Registration, RegistrationId, RegistrationInfo, Scope, Selector, StartError,
    Status, Subscriber, WebhooksBuilder, Worker,
    guard::Guard,
    metrics::Metrics,
    state::{Now, State, Write},
    transport::{Caps, Transport, caught},
    worker,
};

/// Tells those who have registered of what happens. A cheap handle, whose
/// clones are all the same.
///
/// See the [front page](crate) for an example.
#[derive(Clone)]
pub struct Webhooks(Arc<Shared>);

pub(crate) struct Shared {
    pub(crate) name: Arc<str>,
    pub(crate) state: Mutex<State>,
    /// There is something to do for the worker.
    pub(crate) news: Notify,
    pub(crate) running: AtomicBool,
    pub(crate) loaded: AtomicBool,
    pub(crate) guard: Option<Guard>,
    pub(crate) store: Arc<dyn DeliveryStore>,
    /// Held while the store is written to: what is to be written keeps its
    /// order.
    pub(crate) writing: tokio::sync::Mutex<()>,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) breakers: Option<Registry>,
    pub(crate) rates: Option<(Handle, LimitHandle)>,
    pub(crate) wall: SharedWallClock,
    pub(crate) random: SharedRandom,
    /// The upper half of all ids that are made here.
    pub(crate) instance: u64,
    pub(crate) ids: AtomicU64,
    pub(crate) caps: Caps,
    pub(crate) max_body: usize,
    pub(crate) feed: usize,
    pub(crate) metrics: Metrics,
}

/// How much there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueStatus {
    /// Deliveries that are accepted and not over.
    pub queued: usize,
    /// Those of them whose attempt is under way.
    pub in_flight: usize,
    /// Dead letters that are kept.
    pub dead_letters: usize,
    /// Whether the worker runs.
    pub running: bool,
}

/// What became of [`redrive_all`](Webhooks::redrive_all).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Redriven {
    /// How many are queued again.
    pub queued: usize,
    /// How many are where they were: there was no room, or no registration
    /// that takes them.
    pub left: usize,
}

impl Webhooks {
    /// Starts with the defaults.
    pub fn builder() -> WebhooksBuilder {
        WebhooksBuilder::new()
    }

    pub(crate) fn new(shared: Shared) -> Self {
        Self(Arc::new(shared))
    }

    /// Starts the worker on the tokio runtime that this is called in. What the
    /// store has kept of an earlier run is taken up first.
    ///
    /// Events that are emitted before wait in the queue.
    ///
    /// # Errors
    ///
    /// If it is running already, or there is no runtime.
    pub fn start(&self) -> Result<Worker, StartError> {
        worker::start(&self.0)
    }

    /// Registers, from the next event on.
    ///
    /// # Errors
    ///
    /// If it makes no sense, its url is [denied](crate::WebhooksBuilder::guard),
    /// its id is taken, or there are as many as may be.
    pub fn register(&self, registration: Registration) -> Result<RegistrationId, RegisterError> {
        let target = Arc::new(registration.check(|| self.0.name_one("reg"))?);
        if let Some(guard) = &self.0.guard {
            let checked = guard.check_uri(&target.url);
            checked.map_err(RegisterError::Denied)?;
        }
        let id = target.id.clone();
        let now = self.0.now();
        self.0.with(|state| state.register(&target, now))?;
        self.0.news.notify_one();
        Ok(id)
    }

    /// Takes registrations back, and what is queued for them; how many. Their
    /// deliveries have failed ([`Cause::Unregistered`]) and are no dead
    /// letters. An attempt that is under way ends as it will, and is the last.
    ///
    /// They are gone when this future is first polled; dropping it later leaves
    /// it to the worker to tell the store.
    ///
    /// [`Cause::Unregistered`]: crate::Cause::Unregistered
    pub async fn unregister(&self, which: impl Into<Selector>) -> usize {
        let (which, now) = (which.into(), self.0.now());
        let count = self.0.with(|state| state.unregister(&which, now));
        self.0.news.notify_one();
        self.0.flush().await;
        count
    }

    /// All registrations, in the order in which they came.
    #[must_use]
    pub fn list(&self) -> Vec<RegistrationInfo> {
        self.0.state.lock().list()
    }

    /// Has the attempts of a registration signed by this from now on, also those
    /// of what is queued; whether there is one of this id. For a rotation: first
    /// by both secrets, then by the new one.
    #[expect(clippy::must_use_candidate, reason = "it does something")]
    pub fn sign_by(&self, id: &RegistrationId, signer: Signer) -> bool {
        let target = self.0.state.lock().target(id.as_str()).cloned();
        let Some(target) = target else {
            return false;
        };
        let old = target.signer.lock().replace(signer);
        // Wiped outside of the lock.
        drop(old);
        true
    }

    /// Lets a registration hear of events again that its endpoint has
    /// disabled; whether there is one of this id.
    #[expect(clippy::must_use_candidate, reason = "it does something")]
    pub fn enable(&self, id: &RegistrationId) -> bool {
        let now = self.0.now();
        let found = self.0.with(|state| state.enable(id.as_str(), now));
        self.0.news.notify_one();
        found
    }

    /// Tells all whose patterns and scope match of an event. How many
    /// deliveries are queued: 0 where nobody wants to know.
    ///
    /// What is queued is in the store, and will be delivered or be a dead
    /// letter. With the default store this does not wait for anything.
    ///
    /// Dropping the future: nothing of it was queued, unless the store keeps
    /// what it was asked to keep; then it is delivered after the next start of
    /// a process.
    ///
    /// # Errors
    ///
    /// If the queue has no room for all, the event makes no sense, or the store
    /// does not keep it. Nobody is told then.
    pub async fn emit(&self, event: Event) -> Result<usize, EmitError> {
        let shared = &self.0;
        event.check()?;
        let found = {
            let mut state = shared.state.lock();
            let found = state.find(event.name(), event.request());
            match state.reserve(found.len()) {
                Ok(()) => Ok(found),
                Err(over) => Err((found.len(), over)),
            }
        };
        let found = found.map_err(|(deliveries, over)| {
            shared.metrics.refused(deliveries);
            EmitError::Full { deliveries, over }
        })?;
        if found.is_empty() {
            return Ok(0);
        }
        let reserved = Reserved {
            shared,
            count: found.len(),
        };
        let now = shared.now();
        let made = || shared.name_one("msg");
        let message = Arc::new(event.seal(now.unix, shared.max_body, made)?);
        let records: Vec<(u64, Record)> = found
            .into_iter()
            .map(|(number, target)| {
                let record = Record {
                    id: shared.delivery_id(),
                    registration: target.id.clone(),
                    scope: target.scope.clone(),
                    message: Arc::clone(&message),
                    attempts: 0,
                    due: Duration::ZERO,
                };
                (number, record)
            })
            .collect();
        let kept = records.iter().map(|(_, record)| record.clone()).collect();
        shared.keep(kept).await.map_err(EmitError::Store)?;
        let (queued, whole) = shared.with(|state| {
            reserved.give_back(state);
            state.accept(records, now)
        });
        shared.news.notify_one();
        // What others have the store to write is not this one's to wait for.
        if !whole {
            shared.flush().await;
        }
        Ok(queued)
    }

    /// Hears of each change of the deliveries of a scope, or of all, from now
    /// on.
    #[must_use]
    pub fn subscribe(&self, scope: Option<Scope>) -> Subscriber {
        let (subscriber, feed) = Subscriber::new(self.0.feed);
        self.0.state.lock().subscribe(scope, feed);
        subscriber
    }

    /// How the deliveries of a scope stand, or of all: the newest first, at
    /// most so many. `None`: 100.
    ///
    /// The scope is the registration's: what global ones are told of a request
    /// is among the global results.
    #[must_use]
    pub fn results(
        &self,
        scope: Option<&Scope>,
        limit: impl Into<Option<usize>>,
    ) -> Vec<Arc<DeliveryResult>> {
        let limit = limit.into().unwrap_or(100);
        self.0.state.lock().results(scope, limit)
    }

    /// How much there is to do.
    #[must_use]
    pub fn status(&self) -> QueueStatus {
        let state = self.0.state.lock();
        QueueStatus {
            queued: state.depth(),
            in_flight: state.in_flight(),
            dead_letters: state.letters.len(),
            running: self.0.running.load(SeqCst),
        }
    }

    /// What has failed for good, the oldest first.
    #[must_use]
    pub fn dead_letters(&self) -> Vec<DeadLetter> {
        self.0.state.lock().letters.iter().cloned().collect()
    }

    /// Sends a dead letter again: the same event with the same id, to the
    /// registration of the same id as it is now, with all its attempts. The id
    /// of the new delivery.
    ///
    /// # Errors
    ///
    /// If there is no such letter, no registration that takes it, no room, or
    /// the store does not keep it. The letter is then where it was.
    pub async fn redrive(&self, id: DeliveryId) -> Result<DeliveryId, RedriveError> {
        let shared = &self.0;
        let (letter, number, scope) = {
            let mut state = shared.state.lock();
            let letter = state.letters.get(id).ok_or(RedriveError::Unknown)?.clone();
            let scope = state.target(letter.record.registration.as_str());
            let scope = scope.map(|target| target.scope.clone());
            let number = match state.registration(&letter.record.registration) {
                None => return Err(RedriveError::Unregistered),
                Some((_, true)) => return Err(RedriveError::Disabled),
                Some((number, false)) => number,
            };
            if state.is_crowded(number) {
                return Err(RedriveError::Full);
            }
            state.reserve(1).map_err(|_| RedriveError::Full)?;
            (letter, number, scope)
        };
        let reserved = Reserved { shared, count: 1 };
        let record = Record {
            id: shared.delivery_id(),
            attempts: 0,
            due: Duration::ZERO,
            scope: scope.unwrap_or(letter.record.scope),
            ..letter.record
        };
        let again = record.id;
        let kept = vec![record.clone()];
        shared.keep(kept).await.map_err(RedriveError::Store)?;
        let now = shared.now();
        let found = shared.with(|state| {
            reserved.give_back(state);
            let found = state.drop_letter(id);
            if found {
                state.accept(vec![(number, record)], now);
            } else {
                // Another was quicker.
                state.disown(again);
            }
            found
        });
        shared.news.notify_one();
        shared.flush().await;
        if found {
            Ok(again)
        } else {
            Err(RedriveError::Unknown)
        }
    }

    /// Sends all dead letters again, or those of one registration, the oldest
    /// first, as far as there is room: where one of a registration has none,
    /// none of it that is younger goes before it.
    pub async fn redrive_all(&self, registration: Option<&RegistrationId>) -> Redriven {
        let chosen: Vec<(DeliveryId, RegistrationId)> = {
            let state = self.0.state.lock();
            let letters = state.letters.iter().map(|letter| &letter.record);
            letters
                .filter(|record| registration.is_none_or(|id| *id == record.registration))
                .map(|record| (record.id, record.registration.clone()))
                .collect()
        };
        let mut redriven = Redriven {
            queued: 0,
            left: chosen.len(),
        };
        let mut crowded = HashSet::new();
        for (id, registration) in chosen {
            if crowded.contains(&registration) {
                continue;
            }
            match self.redrive(id).await {
                Ok(_) => {
                    redriven.queued += 1;
                    redriven.left -= 1;
                }
                Err(RedriveError::Full) => drop(crowded.insert(registration)),
                Err(RedriveError::Store(_)) => break,
                Err(_) => {}
            }
        }
        redriven
    }

    /// Drops a dead letter; whether there was one.
    pub async fn drop_letter(&self, id: DeliveryId) -> bool {
        let found = self.0.with(|state| state.drop_letter(id));
        self.0.news.notify_one();
        self.0.flush().await;
        found
    }

    /// The breakers of the lanes, by the lanes' names; `None` where there are
    /// none.
    ///
    /// A lane that waits for its breaker asks it again when it was to be ready,
    /// also where it was closed by hand before.
    #[must_use]
    pub fn breakers(&self) -> Option<&Registry> {
        self.0.breakers.as_ref()
    }

    /// The rate limits of the lanes, by the limit's name `webhooks` and the
    /// lanes' names as keys; `None` where there are none. Quotas can be replaced
    /// while they serve, also of one lane.
    #[must_use]
    pub fn rate_limits(&self) -> Option<&Handle> {
        self.0.rates.as_ref().map(|(handle, _)| handle)
    }
}

impl fmt::Debug for Webhooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhooks")
            .field("name", &self.0.name)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

/// Room in the queue for what the store is asked to keep.
struct Reserved<'a> {
    shared: &'a Shared,
    count: usize,
}

impl Reserved<'_> {
    fn give_back(mut self, state: &mut State) {
        state.unreserve(std::mem::take(&mut self.count));
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if self.count > 0 {
            self.shared.state.lock().unreserve(self.count);
        }
    }
}

impl Shared {
    pub(crate) fn now(&self) -> Now {
        Now {
            at: clock::now(),
            unix: self.wall.unix_now(),
        }
    }

    fn delivery_id(&self) -> DeliveryId {
        let number = self.ids.fetch_add(1, Relaxed);
        DeliveryId::from_u128((u128::from(self.instance) << 64) | u128::from(number))
    }

    /// Whether it was made here.
    pub(crate) fn is_ours(&self, id: DeliveryId) -> bool {
        id.as_u128() >> 64 == u128::from(self.instance)
    }

    fn name_one(&self, prefix: &str) -> Arc<str> {
        let number = self.ids.fetch_add(1, Relaxed);
        format!("{prefix}_{:016x}{number:016x}", self.instance).into()
    }

    /// Changes the state, and tells of it when it is unlocked.
    pub(crate) fn with<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let (result, told, dropped, before, after) = {
            let mut state = self.state.lock();
            let before = (state.depth(), state.letters.len());
            let result = change(&mut state);
            let dropped = state.take_overflowed();
            let after = (state.depth(), state.letters.len());
            (result, state.take_told(), dropped, before, after)
        };
        self.metrics.held(before, after);
        for result in &told {
            self.metrics.over(result.status);
            self.log(result);
        }
        if !dropped.is_empty() {
            self.metrics.dropped(dropped.len());
            for letter in &dropped {
                let (name, id, event) = (&*self.name, letter.record.id, &letter.record.message);
                let (event, event_id) = (&*event.event, &*event.id);
                warn!(name, %id, event, event_id, "a dead letter was dropped for want of room");
            }
        }
        result
    }

    fn log(&self, result: &DeliveryResult) {
        let DeliveryResult {
            id,
            event,
            event_id,
            registration,
            attempt,
            ..
        } = result;
        let (name, event, event_id, registration) =
            (&*self.name, &**event, &**event_id, registration.as_str());
        let status = result.response_status.map(|status| status.as_u16());
        // What the transport said is for the results: it may say too much.
        let error = result.error.as_ref().map(crate::Cause::as_str);
        match result.status {
            Status::Delivered => {
                debug!(name, %id, event, event_id, registration, attempt, status, "delivered");
            }
            Status::Failed => {
                warn!(name, %id, event, event_id, registration, attempt, status, error, "not delivered");
            }
            Status::Pending | Status::Retrying => {
                let retry_in = result.retry_in;
                info!(name, %id, event, event_id, registration, attempt, status, error, ?retry_in, "to be delivered again");
            }
        }
    }

    /// Has the store keep these. One that panics has not.
    async fn keep(&self, records: Vec<Record>) -> Result<(), BoxError> {
        let kept = caught(async { self.store.accept(records).await }).await;
        kept.unwrap_or_else(|| Err("the store of deliveries panicked".into()))
    }

    /// Writes what is to be written, in its order.
    pub(crate) async fn flush(&self) {
        let _turn = self.writing.lock().await;
        loop {
            let next = self.state.lock().next_write();
            let Some(write) = next else {
                return;
            };
            self.write(write).await;
            self.state.lock().written();
        }
    }

    async fn write(&self, write: Write) {
        let written = caught(async {
            match write {
                Write::Retry(id, attempts, due) => self.store.retry(id, attempts, due).await,
                Write::Settle(id) => self.store.settle(id).await,
                Write::Bury(letter) => self.store.bury(letter).await,
                Write::DropLetter(id) => self.store.drop_letter(id).await,
            }
        });
        let name = &*self.name;
        match written.await {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                warn!(name, %error, "the store of deliveries has not kept what has changed");
            }
            None => warn!(name, "the store of deliveries panicked"),
        }
    }

    /// Takes up what an earlier run has left, once.
    pub(crate) async fn load(&self) {
        if self.loaded.load(SeqCst) {
            return;
        }
        let kept = loop {
            match caught(async { self.store.load().await }).await {
                Some(Ok(kept)) => break kept,
                Some(Err(error)) => {
                    warn!(name = &*self.name, %error, "the store of deliveries cannot be read");
                }
                None => warn!(name = &*self.name, "the store of deliveries panicked"),
            }
            tokio::time::sleep(crate::config::LOOK_AGAIN).await;
        };
        let now = self.now();
        self.with(|state| {
            // A worker that was dropped while it read may have been quicker.
            if self.loaded.swap(true, SeqCst) {
                return;
            }
            for letter in kept.letters {
                if !self.is_ours(letter.record.id) {
                    state.bury(letter);
                }
            }
            for record in kept.records {
                if !self.is_ours(record.id) {
                    state.adopt(record, now);
                }
            }
        });
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        state.close();
        self.metrics
            .held((state.depth(), state.letters.len()), (0, 0));
    }
}

/// So that the compiler can say it here, not where it is used.
const _: fn() = || {
    fn fits<T: Clone + Send + Sync + 'static>() {}
    fits::<Webhooks>();
    fn moves<T: Send + Sync + 'static>() {}
    moves::<Worker>();
    moves::<Subscriber>();
    fn goes<T: Send>(_: &T) {}
    let _ = |webhooks: &Webhooks, event: Event, id: DeliveryId| {
        goes(&webhooks.emit(event));
        goes(&webhooks.unregister(Selector::all()));
        goes(&webhooks.redrive(id));
        goes(&webhooks.redrive_all(None));
        goes(&webhooks.drop_letter(id));
    };
};
