//! The background: the checks, who looks for changes, who tells of them.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::Ordering::{Relaxed, SeqCst},
    },
    time::Duration,
};

use buttress_core::clock;
use tokio::{
    runtime::Handle,
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};
use tracing::{info, warn};

use crate::{
    Change, CheckState, Notice, Standing, StartError,
    change::{Outbox, Outboxes, deliver},
    check,
    registry::Inner,
    threshold::Hysteresis,
};

/// The background tasks of a registry: they run until this is dropped, or
/// [stopped](Self::stop).
#[must_use = "the background tasks end when this is dropped"]
pub struct Running {
    tasks: JoinSet<()>,
    inner: Arc<Inner>,
}

impl Running {
    /// Ends the background tasks and waits until they have. A check or a
    /// listener that is at work is dropped where it waits.
    ///
    /// Dropping this future ends them as well, and waits for nothing.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Before others may start.
        self.tasks.abort_all();
        self.inner.running.store(false, SeqCst);
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running")
            .field("name", &self.inner.name)
            .field("tasks", &self.tasks.len())
            .finish()
    }
}

pub(crate) fn start(inner: &Arc<Inner>) -> Result<Running, StartError> {
    let handle = Handle::try_current().map_err(|_| StartError::NoRuntime)?;
    if inner.running.swap(true, SeqCst) {
        return Err(StartError::Running);
    }
    let mut tasks = JoinSet::new();
    let mut boxes = Vec::new();
    for listener in &inner.listeners {
        let (sender, receiver) = mpsc::channel(inner.capacity);
        boxes.push(Outbox::new(sender));
        tasks.spawn_on(deliver(Arc::clone(listener), receiver), &handle);
    }
    for index in 0..inner.checks.len() {
        let inner = Arc::clone(inner);
        let run = async move {
            check::run(
                &inner.checks[index],
                &inner.name,
                &inner.random,
                &inner.news,
            )
            .await;
        };
        tasks.spawn_on(run, &handle);
    }
    if let Some(limit) = inner.stall {
        tasks.spawn_on(tick(Arc::clone(inner), limit), &handle);
    }
    tasks.spawn_on(watch(Arc::clone(inner), Outboxes { boxes }), &handle);
    Ok(Running {
        tasks,
        inner: Arc::clone(inner),
    })
}

/// Shows that the runtime comes round to its tasks.
async fn tick(inner: Arc<Inner>, limit: Duration) {
    /// What is not meant to tick any more is not late.
    struct Off(Arc<Inner>);
    impl Drop for Off {
        fn drop(&mut self) {
            self.0.tick.store(0, Relaxed);
        }
    }
    let inner = Off(inner);
    loop {
        inner.0.tick.store(clock::now().as_nanos().max(1), Relaxed);
        sleep(limit / 4).await;
    }
}

/// Looks for changes and tells of them.
async fn watch(inner: Arc<Inner>, outboxes: Outboxes) {
    /// What is not watched any more is not too low.
    struct Off<'a>(&'a Inner);
    impl Drop for Off<'_> {
        fn drop(&mut self) {
            self.0.low.store(false, Relaxed);
        }
    }
    // What an earlier start has left is gone before this begins.
    let _turn = inner.turn.lock().await;
    let _off = Off(&inner);
    #[cfg(feature = "grpc")]
    let _told = inner.grpc.until_dropped();
    let mut watch = Watch::new(&inner, outboxes);
    let mut evaluation = Instant::now();
    loop {
        let now = Instant::now();
        if now >= evaluation {
            evaluation = now + inner.evaluate_every;
            watch.evaluate();
        }
        watch.look();
        #[cfg(feature = "grpc")]
        inner.grpc.tell(&inner).await;
        let next = evaluation.min(now + inner.look_every);
        let _ = timeout_at(next, inner.news.notified()).await;
    }
}

/// What was last told.
struct Watch<'a> {
    inner: &'a Inner,
    outboxes: Outboxes,
    hysteresis: Option<Hysteresis>,
    standing: Option<Standing>,
    /// For each mark whether the score is below.
    below: Vec<bool>,
    checks: Vec<CheckState>,
}

impl<'a> Watch<'a> {
    fn new(inner: &'a Inner, outboxes: Outboxes) -> Self {
        for check in &inner.checks {
            check.metrics.up(false);
        }
        Self {
            outboxes,
            hysteresis: inner.threshold.map(Hysteresis::new),
            standing: None,
            below: vec![false; inner.marks.len()],
            checks: vec![CheckState::Unknown; inner.checks.len()],
            inner,
        }
    }

    /// Takes the score into account.
    fn evaluate(&mut self) {
        let score = self.inner.score();
        let now = clock::now();
        self.inner.metrics.score(score);
        if let Some(hysteresis) = &mut self.hysteresis {
            let low = hysteresis.observe(score, now);
            self.inner.low.store(low, Relaxed);
        }
        let standing = self.inner.standing(now);
        for index in 0..self.below.len() {
            let mark = self.inner.marks[index];
            let below = score < mark;
            if below == self.below[index] {
                continue;
            }
            self.below[index] = below;
            let name = &*self.inner.name;
            if below {
                warn!(name, score, mark, "the score has fallen");
                self.tell(Change::ScoreBelow(mark), &standing, score);
            } else {
                info!(name, score, mark, "the score has risen");
                self.tell(Change::ScoreReached(mark), &standing, score);
            }
        }
    }

    /// Takes gates, latches and checks into account.
    fn look(&mut self) {
        self.outboxes.flush();
        let now = clock::now();
        let standing = self.inner.standing(now);
        for index in 0..self.checks.len() {
            let check = &self.inner.checks[index];
            let state = check.state(now);
            if state == self.checks[index] {
                continue;
            }
            self.checks[index] = state;
            check.metrics.up(state.is_passing());
            let (name, check) = (&*self.inner.name, Arc::clone(check.name()));
            match state {
                CheckState::Passing => info!(name, %check, "the check passes"),
                // Its error was told when it came.
                CheckState::Failing(_) => {}
                CheckState::Unknown => {
                    warn!(name, %check, "nothing is known of the check any more");
                }
            }
            self.tell(Change::Check(check, state), &standing, self.inner.score());
        }
        if self.standing.as_ref() == Some(&standing) {
            return;
        }
        self.inner.metrics.ready(standing.is_ready());
        let (name, score) = (&*self.inner.name, self.inner.score());
        match &standing {
            Standing::Ready => info!(name, score, "ready"),
            Standing::NotReady(reason) => {
                let (reason, check) = (reason.as_str(), reason.check());
                warn!(name, score, reason, check, "not ready");
            }
        }
        self.tell(Change::Readiness, &standing, score);
        self.standing = Some(standing);
    }

    fn tell(&mut self, change: Change, standing: &Standing, score: f64) {
        if self.outboxes.boxes.is_empty() {
            return;
        }
        let notice = Notice {
            change,
            standing: standing.clone(),
            score,
            at: clock::now(),
            missed: 0,
        };
        let Inner {
            name,
            missed,
            metrics,
            ..
        } = self.inner;
        self.outboxes.send(&notice, name, missed, metrics);
    }
}
