//! All breakers of this process that a fleet shares, and the one task that
//! tells of them and hears of the others.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::AcqRel, Ordering::Acquire, Ordering::Relaxed},
    },
    time::Duration,
};

use buttress_core::{
    clock::{self, Instant},
    random::SharedRandom,
    sync::Mutex,
};
use buttress_redis::{Key, Notice, Redis, Subscription, Watch};
use tokio::{runtime::Handle, sync::Notify, task::JoinSet, time::sleep};

use super::{
    link::{Bell, Link},
    record::{Message, NodeId, Order, Reply, Request, Watermark},
    script::{Answer, Scripts, read},
};
use crate::{Breaker, metrics::FleetMetrics};

/// Questions under way at once.
const AT_ONCE: usize = 16;
/// Names that are kept in mind of breakers that this process has not: as many
/// as the index in Redis has.
const NAMES: usize = 10_000;
/// No retry of what failed is sooner than the next pull, or this.
const AGAIN: Duration = Duration::from_secs(1);

pub(crate) struct Hub {
    me: Weak<Self>,
    redis: Redis,
    index: Key,
    channel: String,
    quorum: u32,
    pull: Duration,
    by_hand: bool,
    scripts: Scripts,
    metrics: FleetMetrics,
    bell: Arc<Notify>,
    /// Whether the task is there.
    kept: Arc<AtomicBool>,
    up: AtomicBool,
    refused: AtomicU64,
    book: Mutex<Book>,
    /// Weak: where there is no task, it would keep what keeps it.
    queue: Mutex<Vec<Weak<Link>>>,
}

#[derive(Default)]
struct Book {
    links: HashMap<Box<str>, Vec<Weak<Link>>>,
    /// Keys that were last heard of as not closed.
    known: HashSet<Box<str>>,
}

impl Hub {
    pub(super) fn new(
        redis: &Redis,
        fleet: &str,
        quorum: u32,
        pull: Duration,
        by_hand: bool,
    ) -> Arc<Self> {
        let keys = redis.keyspace("circuit-breaker");
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            redis: redis.clone(),
            index: keys.tag([fleet]),
            channel: keys.channel(fleet),
            quorum,
            pull,
            by_hand,
            scripts: Scripts::new(),
            metrics: FleetMetrics::new(fleet),
            bell: Arc::default(),
            kept: Arc::default(),
            up: AtomicBool::new(false),
            refused: AtomicU64::new(0),
            book: Mutex::default(),
            queue: Mutex::default(),
        })
    }

    /// The key of a breaker, by the segments of its name.
    pub(crate) fn key<S: AsRef<[u8]>>(&self, name: impl IntoIterator<Item = S>) -> Key {
        name.into_iter().fold(self.index.clone(), Key::segment)
    }

    /// Has the breaker be the fleet's of this key.
    pub(crate) fn join(self: &Arc<Self>, key: Key, breaker: &Breaker) -> Arc<Link> {
        let cell = breaker.lease().cell;
        let bell: Arc<dyn Bell> = Arc::<Self>::clone(self);
        let generation = cell.word().generation();
        let link = Link::new(key, breaker.downgrade(), bell, self.by_hand, generation);
        self.ensure();
        let known = {
            let mut book = self.book.lock();
            let name = link.key().as_str();
            let links = book.links.entry(name.into()).or_default();
            links.push(Arc::downgrade(&link));
            book.known.contains(name)
        };
        cell.set_follower(Arc::<Link>::clone(&link));
        if known {
            link.want_read();
            self.ring(&link);
        }
        link
    }

    /// Starts the task, if there is none and there is a runtime for it.
    #[inline]
    pub(crate) fn ensure(&self) {
        if !self.kept.load(Acquire) {
            self.start();
        }
    }

    #[cold]
    fn start(&self) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        if self.kept.swap(true, AcqRel) {
            return;
        }
        // Made here: should the runtime be ending, it is dropped unpolled.
        let kept = Kept(Arc::clone(&self.kept));
        let task = Task::new(self);
        runtime.spawn(async move {
            let _kept = kept;
            task.run().await;
        });
    }

    pub(crate) fn is_up(&self) -> bool {
        self.kept.load(Acquire) && self.up.load(Relaxed)
    }

    fn set_up(&self, up: bool) {
        if self.up.swap(up, Relaxed) != up {
            self.metrics.up(up);
            if up {
                tracing::info!("circuit breakers follow their fleet");
            } else {
                tracing::warn!("circuit breakers are alone: the fleet cannot be asked");
            }
        }
    }

    fn links_of(&self, key: &str) -> Vec<Arc<Link>> {
        let book = self.book.lock();
        let links = book.links.get(key);
        links.map_or_else(Vec::new, |links| {
            links.iter().filter_map(Weak::upgrade).collect()
        })
    }

    fn all(&self) -> Vec<Arc<Link>> {
        let book = self.book.lock();
        book.links
            .values()
            .flatten()
            .filter_map(Weak::upgrade)
            .collect()
    }

    fn remember(&self, key: &str, closed: bool) {
        let mut book = self.book.lock();
        if closed {
            book.known.remove(key);
        } else if book.known.len() < NAMES {
            book.known.insert(key.into());
        }
    }

    async fn ask(&self, link: &Link, request: &Request) -> Option<Reply> {
        let operation = match request.op {
            super::record::Op::Read => "circuit_breaker_read",
            _ => "circuit_breaker_change",
        };
        let keys = [link.key(), &self.index];
        let (node, voter) = (link.id(), NodeId(self.redis.handle_id()));
        let call = self
            .scripts
            .change(keys, request, node, voter, self.quorum, &self.channel);
        match self.redis.call::<Answer>(operation, &call).await {
            Ok(answer) => {
                let reply = read(answer);
                if reply.is_none() {
                    self.complain(&"an answer that makes no sense");
                }
                reply
            }
            Err(error) => {
                // An outage is told of by its own.
                if !error.kind().is_outage() {
                    self.complain(&error);
                }
                None
            }
        }
    }

    fn complain(&self, error: &dyn fmt::Display) {
        let times = self.refused.fetch_add(1, Relaxed) + 1;
        if times.is_power_of_two() {
            tracing::warn!(%error, times, "circuit breakers cannot be shared");
        }
    }
}

impl Bell for Hub {
    fn ring(&self, link: &Arc<Link>) {
        if link.enqueue() {
            self.queue.lock().push(Arc::downgrade(link));
        }
        self.ensure();
        self.bell.notify_one();
    }

    fn is_heard(&self) -> bool {
        self.kept.load(Acquire)
    }

    fn forget(&self, key: &str) {
        let mut book = self.book.lock();
        if let Some(links) = book.links.get_mut(key) {
            links.retain(|link| link.strong_count() > 0);
            if links.is_empty() {
                book.links.remove(key);
            }
        }
        drop(book);
        if !self.is_heard() {
            // Nobody takes them out, however many come and go.
            self.queue.lock().retain(|link| link.strong_count() > 0);
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // The task finds that nobody is left.
        self.bell.notify_one();
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("up", &self.is_up())
            .finish_non_exhaustive()
    }
}

/// There is a task.
struct Kept(Arc<AtomicBool>);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.swap(false, AcqRel);
    }
}

type Listening = Pin<Box<dyn Future<Output = (Notice, Subscription)> + Send>>;

struct Task {
    hub: Weak<Hub>,
    bell: Arc<Notify>,
    notices: Listening,
    watch: Watch,
    random: SharedRandom,
    alarms: BTreeMap<(Instant, u64), Weak<Link>>,
    number: u64,
    known: Watermark,
    pull_at: Instant,
    queue: Vec<Arc<Link>>,
}

enum Woken {
    Notice(Notice, Subscription),
    Watch(bool),
    Rung,
}

fn listen(mut subscription: Subscription) -> Listening {
    Box::pin(async move {
        let notice = subscription.next().await;
        (notice, subscription)
    })
}

impl Task {
    fn new(hub: &Hub) -> Self {
        Self {
            hub: hub.me.clone(),
            bell: Arc::clone(&hub.bell),
            notices: listen(hub.redis.subscribe(hub.channel.as_str())),
            watch: hub.redis.watch(),
            random: SharedRandom::default(),
            alarms: BTreeMap::new(),
            number: 0,
            known: Watermark::default(),
            // Whether or not there is a subscription by then.
            pull_at: clock::now() + hub.pull,
            queue: Vec::new(),
        }
    }

    async fn run(mut self) {
        // What came before the task, if it is not the first.
        if let Some(hub) = self.hub.upgrade() {
            hub.queue.lock().clear();
            self.queue = hub.all();
            for link in &self.queue {
                link.enqueue();
                // It was set with a task that is gone.
                link.alarmed();
            }
        }
        loop {
            if self.queue.is_empty() {
                let woken = self.wait().await;
                let Some(hub) = self.hub.upgrade() else {
                    return;
                };
                self.woken(&hub, woken);
            }
            let Some(hub) = self.hub.upgrade() else {
                return;
            };
            self.collect(&hub);
            if clock::now() >= self.pull_at {
                self.pull(&hub).await;
            }
            let queue = std::mem::take(&mut self.queue);
            self.ask_all(&hub, queue).await;
            // One round of everything, so that news are not kept waiting.
            self.collect(&hub);
        }
    }

    async fn wait(&mut self) -> Woken {
        let alarm = self.alarms.first_key_value().map(|((at, _), _)| *at);
        let at = alarm.unwrap_or(self.pull_at).min(self.pull_at);
        tokio::select! {
            (notice, subscription) = &mut self.notices => Woken::Notice(notice, subscription),
            up = self.watch.changed() => Woken::Watch(up),
            () = self.bell.notified() => Woken::Rung,
            () = sleep(at - clock::now()) => Woken::Rung,
        }
    }

    fn woken(&mut self, hub: &Hub, woken: Woken) {
        match woken {
            Woken::Notice(notice, subscription) => {
                self.notices = listen(subscription);
                match notice {
                    Notice::Message(message) => self.hear(hub, &message),
                    // What was said before is to be asked for.
                    _ => self.pull_at = clock::now(),
                }
            }
            Woken::Watch(true) => self.pull_at = clock::now(),
            Woken::Watch(false) => hub.set_up(false),
            Woken::Rung => {}
        }
    }

    fn hear(&mut self, hub: &Hub, message: &[u8]) {
        let Some(message) = Message::parse(message) else {
            hub.complain(&"a message that makes no sense");
            return;
        };
        let order = self.known.told(message.version, message.previous);
        if order == Order::Old {
            return;
        }
        hub.metrics.message();
        hub.remember(message.key, message.code == "c");
        let now = clock::now();
        for link in hub.links_of(message.key) {
            if let Some(seen) = message.seen_by(Some(link.id())) {
                link.heard(seen, now);
                self.schedule(&link);
            }
        }
        if order == Order::Gap {
            self.pull_at = now;
        }
    }

    /// Who has something to ask.
    fn collect(&mut self, hub: &Hub) {
        let mut rung = hub.queue.lock();
        self.queue
            .extend(rung.drain(..).filter_map(|link| link.upgrade()));
        drop(rung);
        // No two questions of one at once.
        self.queue.sort_unstable_by_key(Arc::as_ptr);
        self.queue.dedup_by(|one, two| Arc::ptr_eq(one, two));
        let now = clock::now();
        while let Some(alarm) = self.alarms.first_entry() {
            if alarm.key().0 > now {
                break;
            }
            if let Some(link) = alarm.remove().upgrade() {
                link.alarmed();
                if link.enqueue() {
                    self.queue.push(link);
                }
            }
        }
    }

    fn schedule(&mut self, link: &Arc<Link>) {
        if let Some(at) = link.next_alarm(clock::now()) {
            self.number += 1;
            self.alarms.insert((at, self.number), Arc::downgrade(link));
        }
    }

    /// Asks for each of them; whether all were answered.
    async fn ask_all(&mut self, hub: &Arc<Hub>, links: Vec<Arc<Link>>) -> bool {
        let mut answered = true;
        let mut links = links.into_iter();
        let mut asked = JoinSet::new();
        loop {
            while asked.len() < AT_ONCE
                && let Some(link) = links.next()
            {
                link.dequeued();
                let Some(request) = link.poll(clock::now()) else {
                    self.schedule(&link);
                    continue;
                };
                let hub = Arc::clone(hub);
                asked.spawn(async move {
                    let sent = clock::now();
                    let reply = hub.ask(&link, &request).await;
                    (link, request, sent, reply)
                });
            }
            let Some(done) = asked.join_next().await else {
                return answered;
            };
            let Ok((link, request, sent, reply)) = done else {
                answered = false;
                continue;
            };
            let now = clock::now();
            if let Some(reply) = reply {
                hub.metrics.answered(request.op, reply.verdict);
                link.answered(&request, &reply, sent, now);
                if link.is_pending() {
                    hub.ring(&link);
                }
            } else {
                answered = false;
                hub.metrics.failed();
                link.unanswered(&request, now);
                // What is pending is tried again with the next pull.
                self.pull_at = self.pull_at.min(now + AGAIN);
            }
            self.schedule(&link);
        }
    }

    /// Asks what has changed.
    async fn pull(&mut self, hub: &Arc<Hub>) {
        let spread = hub.pull / 5;
        let next = hub.pull - spread + self.random.up_to(spread * 2);
        self.pull_at = clock::now() + next;
        let call = hub.scripts.changes(&hub.index, self.known);
        let answer = hub
            .redis
            .call::<(u64, u64, Vec<String>)>("circuit_breaker_changes", &call)
            .await;
        let (epoch, version, keys) = match answer {
            Ok(answer) => answer,
            Err(error) => {
                if !error.kind().is_outage() {
                    hub.complain(&error);
                }
                hub.set_up(false);
                return;
            }
        };
        hub.set_up(true);
        let all = self.known.wants_all(epoch, version);
        if all {
            hub.book.lock().known.clear();
        }
        let mut changed = Vec::new();
        for key in &keys {
            hub.metrics.pulled();
            hub.remember(key, false);
            changed.extend(hub.links_of(key));
        }
        let now = clock::now();
        for link in &changed {
            link.want_read();
        }
        let keys: HashSet<&str> = keys.iter().map(String::as_str).collect();
        for link in hub.all() {
            if all && !keys.contains(link.key().as_str()) {
                link.lost(now);
            }
            // What failed before.
            if link.is_pending() {
                hub.ring(&link);
            }
        }
        if self.ask_all(hub, changed).await {
            self.known.pulled(epoch, version);
        }
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;
    use crate::Sharing;

    /// What was to be told had the hub, which had it.
    #[test]
    fn what_nobody_tells_keeps_nothing_alive() {
        let redis = Redis::from_url("redis://127.0.0.1:1").unwrap();
        let sharing = Sharing::new(&redis);
        let hub = Arc::downgrade(&sharing.hub());
        let breaker = |name: &str| {
            let builder = Breaker::builder(name).redis(sharing.clone());
            let breaker = builder.build().unwrap();
            breaker.force_open();
            breaker
        };
        let one = breaker("one");
        drop(breaker("two"));
        let waiting = hub.upgrade().unwrap().queue.lock().len();
        assert_eq!(waiting, 1);
        drop(sharing);
        drop(one);
        assert!(hub.upgrade().is_none());
    }
}
