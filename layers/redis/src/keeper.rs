//! Keeps the connection: makes it, watches it, and makes it again.
//!
//! ```text
//!             connects, and a probe writes
//!   ┌──────┐ ──────────────────────────────▶ ┌────────┐
//!   │ gone │                                  │ linked │ ── each second: PING
//!   └──────┘ ◀────────────────────────────── └────────┘
//!      └─ again in 200 ms   three failures, a lost connection, READONLY
//! ```
//!
//! Where operations are denied though probes pass, it is longer than 200 ms: see
//! the gate.
//!
//! One task, in the runtime of whoever asked first. Where that runtime ends,
//! the task ends with it, and the next that asks starts another.
//!
//! In a cluster the connection leads to all nodes and mends itself; what is
//! looked at is whose slots are whose, and the nodes whose gates are shut. A
//! first failure has all nodes asked at once, over connections of their own:
//! where none answers, nobody waits for the failures of each of them.

use std::{
    pin::pin,
    sync::{Arc, Weak},
    time::Duration,
};

use buttress_core::{
    random::{SharedRandom, ThreadRandom},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};
use futures_util::future::{Either, join, join_all, select, select_ok};
use redis::{Cmd, RedisError, Value};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until, timeout},
};

use crate::{
    Error, ErrorKind,
    gate::Gate,
    link::{self, Link},
    redis::Shared,
};

/// Between two probes, give or take a quarter.
const PROBE: Duration = Duration::from_millis(200);

/// Between two looks at a connection that nobody complains of.
const LOOK: Duration = Duration::from_secs(1);

/// The connection, and who looks after it.
pub(crate) struct Keeper {
    link: watch::Sender<Standing>,
    /// Counts the comings and goings.
    states: watch::Sender<u64>,
    /// Whether a task is there.
    kept: AtomicBool,
    /// How many connections were tried, by all tasks: what fails on one of an
    /// earlier task says nothing of those of the next.
    tried: AtomicU64,
    /// Told of failures from which the whole cluster may be gone.
    doubts: Arc<Notify>,
    random: SharedRandom,
}

#[derive(Clone, Default)]
enum Standing {
    /// Being made for the first time, or again after it was lost.
    #[default]
    Awaited,
    Linked(Link),
    /// And why.
    Gone(Error),
}

impl Default for Keeper {
    fn default() -> Self {
        Self {
            link: watch::Sender::default(),
            states: watch::Sender::default(),
            kept: AtomicBool::new(false),
            tried: AtomicU64::new(0),
            doubts: Arc::default(),
            random: SharedRandom::new(ThreadRandom),
        }
    }
}

impl Keeper {
    /// The connection, if there is one.
    #[inline]
    pub(crate) fn link(&self) -> Option<Link> {
        match &*self.link.borrow() {
            Standing::Linked(link) => Some(link.clone()),
            Standing::Awaited | Standing::Gone(_) => None,
        }
    }

    /// The connection, once it is there; `None` once it is known that it will
    /// not be soon, unless one waits on for it.
    pub(crate) async fn linked(&self, shared: &Arc<Shared>, waits_on: bool) -> Option<Link> {
        let mut link = self.link.subscribe();
        loop {
            self.ensure(shared);
            let standing = link.wait_for(|standing| match standing {
                // The task may end with its runtime while we wait.
                Standing::Awaited => !self.kept.load(Ordering::Acquire),
                Standing::Linked(_) => true,
                Standing::Gone(_) => !waits_on || !self.kept.load(Ordering::Acquire),
            });
            match &*standing.await.ok()? {
                Standing::Linked(link) => return Some(link.clone()),
                Standing::Gone(_) if !waits_on => return None,
                Standing::Awaited | Standing::Gone(_) => {}
            }
        }
    }

    /// Why there is none, where that is known.
    pub(crate) fn why(&self) -> Option<Error> {
        match &*self.link.borrow() {
            Standing::Gone(why) => Some(why.clone()),
            Standing::Awaited | Standing::Linked(_) => None,
        }
    }

    pub(crate) fn states(&self) -> watch::Receiver<u64> {
        self.states.subscribe()
    }

    /// Sees to it that somebody looks after the connection.
    fn ensure(&self, shared: &Arc<Shared>) {
        if self.kept.load(Ordering::Acquire) || self.kept.swap(true, Ordering::AcqRel) {
            return;
        }
        let post = Post(Arc::downgrade(shared));
        tokio::spawn(async move { post.keep().await });
    }

    /// The gate was shut, or all were.
    pub(crate) fn lost(&self, why: &Error) {
        tracing::warn!(error = %Chain(why), "redis is gone: it is skipped until it is back");
        self.link.send_replace(Standing::Gone(why.clone()));
        self.changed();
    }

    /// The gate of one node of a cluster was shut.
    pub(crate) fn lost_part(&self, why: &Error) {
        tracing::warn!(error = %Chain(why), "a redis node is gone: its slots are skipped until it is back");
        self.changed();
    }

    /// An operation failed in a cluster: it may be one node, or all.
    pub(crate) fn doubt(&self, error: &Error) {
        if is_silence(error) {
            self.doubts.notify_one();
        }
    }

    fn changed(&self) {
        self.states.send_modify(|changes| *changes += 1);
    }

    /// Until the next probe.
    pub(crate) fn pause(&self) -> Duration {
        PROBE * 3 / 4 + self.random.up_to(PROBE / 2)
    }

    /// This connection is lost, or leads astray; the server may be there.
    pub(crate) fn mend(&self, number: u64) {
        self.link.send_if_modified(|standing| {
            // What was sent on an earlier one says nothing of this one.
            let is_it = matches!(standing, Standing::Linked(link) if link.number == number);
            if is_it {
                *standing = Standing::Awaited;
            }
            is_it
        });
    }
}

/// The task's place: given up when it ends, whatever ends it.
struct Post(Weak<Shared>);

impl Drop for Post {
    fn drop(&mut self) {
        if let Some(shared) = self.0.upgrade() {
            let keeper = &shared.keeper;
            shared.metrics.connected(false);
            // Who waits for us sees both, that there is nothing and nobody.
            keeper.link.send_modify(|standing| {
                *standing = Standing::Awaited;
                keeper.kept.store(false, Ordering::Release);
            });
            // Nobody would open it again: who asks next finds out for himself.
            // At last, or who fails on the connection of before could shut it
            // once more, with nobody there.
            shared.gates.open();
        }
    }
}

impl Post {
    async fn keep(&self) {
        // Holds the handle only while it does something, so that it ends when
        // the last of the others is gone.
        while let Some(shared) = self.0.upgrade() {
            // A server that takes connections and drops them is asked no more
            // often than one that takes none.
            let next = Instant::now() + shared.keeper.pause();
            // Not each time where it was connected for nothing before.
            let due = |due, (_, gate): (usize, &Gate)| gate.is_due() || due;
            if !shared.gates.used().fold(false, due) {
                drop(shared);
                sleep_until(next).await;
                continue;
            }
            let number = shared.keeper.tried.fetch_add(1, Ordering::Relaxed);
            match connect(&shared, number).await {
                Ok((link, open)) => {
                    welcome(&shared, &link, &open);
                    drop(shared);
                    self.look_after(link).await;
                }
                Err(error) => {
                    shared.metrics.failed(&error);
                    if shared.gates.shut() {
                        shared.keeper.lost(&error);
                    } else {
                        // Known already, by everyone but those who ask why.
                        shared.keeper.link.send_replace(Standing::Gone(error));
                    }
                    drop(shared);
                }
            }
            sleep_until(next).await;
        }
    }

    /// Returns when the connection is of no use any more.
    async fn look_after(&self, mut link: Link) {
        let Some(shared) = self.0.upgrade() else {
            return;
        };
        let mut standing = shared.keeper.link.subscribe();
        let doubts = Arc::clone(&shared.keeper.doubts);
        drop(shared);
        let mut next = Instant::now() + LOOK;
        // Before which no doubt is looked into.
        let mut rest = Instant::now();
        loop {
            let replaced = standing
                .wait_for(|now| !matches!(now, Standing::Linked(it) if it.number == link.number));
            let woken = async {
                let doubted = pin!(async {
                    sleep_until(rest).await;
                    doubts.notified().await;
                });
                matches!(
                    select(doubted, pin!(sleep_until(next))).await,
                    Either::Left(_)
                )
            };
            // An error says that the last handle is gone.
            let event = match select(pin!(replaced), pin!(woken)).await {
                Either::Left(_) => None,
                Either::Right((is_doubt, _)) => Some(is_doubt),
            };
            let Some(shared) = self.0.upgrade() else {
                return;
            };
            let Some(is_doubt) = event else {
                shared.metrics.connected(false);
                return;
            };
            if is_doubt {
                rest = Instant::now() + PROBE;
                if let Some(why) = nobody_answers(&shared).await
                    && shared.gates.shut()
                {
                    shared.keeper.lost(&why);
                }
                continue;
            }
            let wait = if shared.gates.is_cluster() {
                look_at_nodes(&shared, &mut link).await
            } else {
                look(&shared, &mut link).await
            };
            next = Instant::now() + wait;
        }
    }
}

/// Asks a server for a sign of life; when to look again.
async fn look(shared: &Shared, link: &mut Link) -> Duration {
    let ping = ping();
    let gate = shared.gates.of(&ping);
    let Some(ticket) = gate.pass() else {
        return LOOK;
    };
    let error = match timeout(shared.timeout, link::ask(link, &ping)).await {
        Ok(Ok(())) => {
            gate.is_alive(ticket);
            return LOOK;
        }
        // Who may not ask that may ask other things.
        Ok(Err(cause)) if cause.code() == Some("NOPERM") => {
            gate.is_alive(ticket);
            return LOOK;
        }
        Ok(Err(cause)) => Error::caused("ping", cause),
        Err(_) => Error::new(ErrorKind::Timeout, "ping"),
    };
    shared.failed(gate, ticket, &error, link.number);
    // No second is lost on a server that is silent.
    Duration::ZERO
}

/// Asks a cluster whose slots are whose, and its lost nodes whether they are
/// back; when to look again.
async fn look_at_nodes(shared: &Shared, link: &mut Link) -> Duration {
    let mut pinged = link.clone();
    let (learned, pinged) = join(
        timeout(shared.timeout, learn(shared, link)),
        // Finds the connections that were lost while nobody asked: the client
        // sees it by what it sends, and mends them.
        timeout(shared.timeout, link::ask(&mut pinged, &ping())),
    )
    .await;
    if let Ok(Ok(())) = pinged {
        shared.gates.all_found();
    }
    let shut: Vec<_> = shared
        .gates
        .used()
        .filter(|(_, gate)| !gate.is_open())
        .collect();
    let all_answer = matches!(learned, Ok(Ok(()))) && shut.is_empty();
    if !shut.is_empty() {
        let due = shut.into_iter().filter(|(_, gate)| gate.is_due());
        let (back, why) = probe(shared, link, true, due).await;
        for gate in &back {
            gate.open();
        }
        if !back.is_empty() {
            tracing::info!("a redis node is back");
            shared.keeper.changed();
        } else if let (false, Some(why)) = (shared.gates.any_open(), why) {
            // To begin with the nodes that were named to us.
            shared.keeper.link.send_replace(Standing::Gone(why));
        }
    }
    if all_answer {
        LOOK
    } else {
        shared.keeper.pause()
    }
}

/// Whether nobody may be there.
fn is_silence(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Connection)
}

fn ping() -> Cmd {
    let mut ping = Cmd::new();
    ping.arg("PING");
    ping
}

/// Whether all nodes of a cluster are gone, and why. Each is asked over a new
/// connection: the one that all share may stand still for one of them.
async fn nobody_answers(shared: &Shared) -> Option<Error> {
    let nodes = shared.dialer.nodes(&shared.gates.masters());
    let asked = nodes.into_iter().map(|node| {
        Box::pin(async move {
            let asked = in_time(dial_limit(shared), async move {
                let mut node = link::single(&node, || {}).await?;
                node.query(&ping()).await
            });
            match asked.await {
                Err(error) if is_silence(&error) => Err(error),
                // One that denies it is there.
                Ok(_) | Err(_) => Ok(()),
            }
        })
    });
    select_ok(asked).await.err()
}

/// Asks any node, and another where that one is silent.
async fn learn_soon(shared: &Shared, link: &mut Link) -> Result<(), Error> {
    let mut result = Err(Error::new(ErrorKind::Timeout, "connect"));
    for _ in 0..3 {
        result = match timeout(shared.timeout, learn(shared, link)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(cause)) => Err(Error::caused("connect", cause)),
            Err(_) => result,
        };
    }
    result
}

async fn learn(shared: &Shared, link: &mut Link) -> Result<(), RedisError> {
    let mut slots = Cmd::new();
    slots.arg("CLUSTER").arg("SLOTS");
    let slots: Value = link.query(&slots).await?;
    shared.gates.learn(&slots);
    Ok(())
}

/// Those gates behind which a write goes through within the time of an
/// operation, and why one does not: over this link, or apart from it, over a new
/// connection to each. On the link it would be another node that is asked for
/// one that was lost, and everybody held up until that is tried.
async fn probe<'s>(
    shared: &Shared,
    link: &Link,
    apart: bool,
    gates: impl IntoIterator<Item = (usize, &'s Gate)>,
) -> (Vec<&'s Gate>, Option<Error>) {
    let probes = gates.into_iter().map(|(index, gate)| {
        let link = link.clone();
        async move { writes(shared, link, apart, index).await.map(|()| gate) }
    });
    let mut open = Vec::new();
    let mut why = None;
    for result in join_all(probes).await {
        match result {
            Ok(gate) => open.push(gate),
            Err(error) => why = Some(error),
        }
    }
    (open, why)
}

async fn writes(shared: &Shared, mut link: Link, apart: bool, gate: usize) -> Result<(), Error> {
    // A node without slots is in nobody's way.
    let Some(cmd) = probe_of(shared, gate) else {
        return Ok(());
    };
    let node = apart.then(|| shared.gates.master(gate)).flatten();
    // Where one is that does not know its own address, only the client knows.
    let Some(server) = node.and_then(|address| shared.dialer.node(&address)) else {
        return in_time(shared.timeout, link::ask(&mut link, &cmd)).await;
    };
    let made = link::single(&server, || {});
    let mut node = in_time(dial_limit(shared), made).await?;
    in_time(shared.timeout, node.query(&cmd)).await.map(drop)
}

/// A write behind this gate.
fn probe_of(shared: &Shared, gate: usize) -> Option<Cmd> {
    let beginning = format!("{}probe", shared.prefix);
    let key = shared.gates.key_behind(gate, &beginning)?;
    Some(link::probe(&key))
}

/// A connection is made in a few trips where an operation is one.
fn dial_limit(shared: &Shared) -> Duration {
    (shared.timeout * 4).min(shared.connect_timeout)
}

async fn in_time<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, RedisError>>,
) -> Result<T, Error> {
    match timeout(limit, work).await {
        Ok(done) => done.map_err(|cause| Error::caused("connect", cause)),
        Err(_) => Err(Error::new(ErrorKind::Timeout, "connect")),
    }
}

/// A new connection, and the gates behind which a write has gone through on it.
async fn connect(shared: &Arc<Shared>, number: u64) -> Result<(Link, Vec<&Gate>), Error> {
    let failed = |cause: RedisError| Error::caused("connect", cause);
    let weak = Arc::downgrade(shared);
    let ended = move || {
        if let Some(shared) = weak.upgrade() {
            shared.keeper.mend(number);
        }
    };
    let is_cluster = shared.gates.is_cluster();
    // A cluster's nodes have half of it each, and are asked one after another
    // for the others: a silent one must not spoil it.
    let limit = shared.connect_timeout * if is_cluster { 2 } else { 1 };
    let made = timeout(limit, async {
        let mut link = shared
            .dialer
            .link(number, &shared.gates, ended)
            .await
            .map_err(failed)?;
        if is_cluster {
            learn_soon(shared, &mut link).await?;
        }
        Ok(link)
    });
    let link = match made.await {
        Ok(made) => made?,
        Err(_) => return Err(Error::new(ErrorKind::Timeout, "connect")),
    };
    match probe(shared, &link, false, shared.gates.awake()).await {
        (open, Some(why)) if open.is_empty() => Err(why),
        (open, _) => Ok((link, open)),
    }
}

fn welcome(shared: &Shared, link: &Link, open: &[&Gate]) {
    let keeper = &shared.keeper;
    keeper.link.send_replace(Standing::Linked(link.clone()));
    shared.metrics.connected(true);
    // After the connection is there: who finds the gate open finds it, too.
    let was_shut = open
        .iter()
        .fold(false, |was_shut, gate| gate.open() | was_shut);
    if was_shut {
        tracing::info!("redis is back");
    }
    keeper.changed();
}

/// An error with all its causes, in one line.
struct Chain<'a>(&'a Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = std::error::Error::source(self.0);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;
    use crate::Redis;

    /// The last failures of those who had the connection came between the two
    /// halves of the task's end, and shut for ever what it had opened.
    #[test]
    fn a_task_that_ends_leaves_the_gate_open() {
        let redis = Redis::from_url("redis://127.0.0.1:1").unwrap();
        let shared = redis.shared();
        shared.keeper.kept.store(true, Ordering::Release);
        let post = Post(Arc::downgrade(shared));
        // Has its end wait where it says that nobody is there.
        let reading = shared.keeper.link.borrow();
        let end = thread::spawn(move || drop(post));
        let (_silent, pause) = mpsc::channel::<()>();
        let _ = pause.recv_timeout(Duration::from_millis(200));
        let gate = shared.gates.of(&Cmd::new());
        let ticket = gate.pass().unwrap();
        assert!((0..3).any(|_| gate.failed(ticket)), "shut");
        drop(reading);
        end.join().unwrap();
        assert!(!shared.keeper.kept.load(Ordering::Acquire));
        assert!(redis.is_up(), "nobody is there to open it");
    }

    /// Each task counted from one, so that a failure on a connection of the one
    /// before took away that of the next.
    #[cfg(feature = "testing")]
    #[test]
    fn no_two_connections_have_one_number() {
        let runtime = || {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(1).enable_all().build().unwrap()
        };
        let home = runtime();
        let server = home.block_on(crate::testing::Server::start());
        let redis = server.redis();
        let numbers = [(); 2].map(|()| {
            let other = runtime();
            other.block_on(redis.connect()).unwrap();
            let number = redis.shared().keeper.link().unwrap().number;
            other.shutdown_timeout(Duration::from_secs(5));
            number
        });
        assert_ne!(numbers[0], numbers[1]);
        home.block_on(async { drop(server) });
    }
}
