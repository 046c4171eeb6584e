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
//! One task, in the runtime of whoever asked first. Where that runtime ends,
//! the task ends with it, and the next that asks starts another.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use buttress_core::{
    random::{SharedRandom, ThreadRandom},
    sync::atomic::{AtomicBool, Ordering},
};
use redis::{Cmd, RedisError};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use crate::{
    Error, ErrorKind,
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
    random: SharedRandom,
}

#[derive(Clone, Default)]
enum Standing {
    /// Being made for the first time, or again after it was lost.
    #[default]
    Awaited,
    Linked(Link),
    Gone,
}

impl Default for Keeper {
    fn default() -> Self {
        Self {
            link: watch::Sender::default(),
            states: watch::Sender::default(),
            kept: AtomicBool::new(false),
            random: SharedRandom::new(ThreadRandom),
        }
    }
}

impl Keeper {
    /// The connection, if there is one.
    pub(crate) fn link(&self) -> Option<Link> {
        match &*self.link.borrow() {
            Standing::Linked(link) => Some(link.clone()),
            Standing::Awaited | Standing::Gone => None,
        }
    }

    /// The connection, once it is there; `None` once it is known that it will
    /// not be soon.
    pub(crate) async fn linked(&self) -> Option<Link> {
        let mut link = self.link.subscribe();
        let standing = link
            .wait_for(|standing| !matches!(standing, Standing::Awaited))
            .await
            .ok()?;
        match &*standing {
            Standing::Linked(link) => Some(link.clone()),
            Standing::Awaited | Standing::Gone => None,
        }
    }

    pub(crate) fn states(&self) -> watch::Receiver<u64> {
        self.states.subscribe()
    }

    /// Sees to it that somebody looks after the connection.
    pub(crate) fn ensure(&self, shared: &Arc<Shared>) {
        if self.kept.load(Ordering::Acquire) || self.kept.swap(true, Ordering::AcqRel) {
            return;
        }
        let post = Post(Arc::downgrade(shared));
        tokio::spawn(async move { post.keep().await });
    }

    /// The gate was shut.
    pub(crate) fn lost(&self, why: &Error) {
        tracing::warn!(error = %Chain(why), "redis is gone: it is skipped until it is back");
        self.link.send_replace(Standing::Gone);
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
            keeper.link.send_replace(Standing::Awaited);
            shared.metrics.connected(false);
            // Nobody would open it again: who asks next finds out for himself.
            shared.gate.open();
            keeper.kept.store(false, Ordering::Release);
        }
    }
}

impl Post {
    async fn keep(&self) {
        let mut number = 0;
        // Holds the handle only while it does something, so that it ends when
        // the last of the others is gone.
        while let Some(shared) = self.0.upgrade() {
            number += 1;
            match connect(&shared, number).await {
                Ok(link) => {
                    welcome(&shared, &link);
                    drop(shared);
                    self.look_after(link).await;
                }
                Err(error) => {
                    shared.metrics.failed(&error);
                    if shared.gate.shut() {
                        shared.keeper.lost(&error);
                    } else {
                        shared.keeper.link.send_replace(Standing::Gone);
                    }
                    let pause = shared.keeper.pause();
                    drop(shared);
                    sleep(pause).await;
                }
            }
        }
    }

    /// Returns when the connection is of no use any more.
    async fn look_after(&self, mut link: Link) {
        let mut ping = Cmd::new();
        ping.arg("PING");
        let Some(mut standing) = self
            .0
            .upgrade()
            .map(|shared| shared.keeper.link.subscribe())
        else {
            return;
        };
        loop {
            let replaced = standing
                .wait_for(|now| !matches!(now, Standing::Linked(it) if it.number == link.number));
            // An error says that the last handle is gone.
            let is_over = timeout(LOOK, replaced).await.is_ok();
            let Some(shared) = self.0.upgrade() else {
                return;
            };
            if is_over {
                shared.metrics.connected(false);
                return;
            }
            let Some(ticket) = shared.gate.pass() else {
                continue;
            };
            let error = match timeout(shared.timeout, link::ask(&mut link, &ping)).await {
                Ok(Ok(())) => {
                    shared.gate.answered(ticket);
                    continue;
                }
                Ok(Err(cause)) => Error::caused("ping", cause),
                Err(_) => Error::new(ErrorKind::Timeout, "ping"),
            };
            shared.failed(ticket, &error, link.number);
        }
    }
}

/// A new connection, on which a write has gone through.
async fn connect(shared: &Shared, number: u64) -> Result<Link, Error> {
    let failed = |cause: RedisError| Error::caused("connect", cause);
    let made = timeout(shared.connect_timeout, async {
        let mut link = shared.dialer.link(number).await.map_err(failed)?;
        link::ask(&mut link, &link::probe(&shared.prefix))
            .await
            .map_err(failed)?;
        Ok(link)
    });
    match made.await {
        Ok(made) => made,
        Err(_) => Err(Error::new(ErrorKind::Timeout, "connect")),
    }
}

fn welcome(shared: &Shared, link: &Link) {
    let keeper = &shared.keeper;
    keeper.link.send_replace(Standing::Linked(link.clone()));
    shared.metrics.connected(true);
    // After the connection is there: who finds the gate open finds it, too.
    if shared.gate.open() {
        tracing::info!("redis is back");
    }
    keeper.states.send_modify(|changes| *changes += 1);
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
