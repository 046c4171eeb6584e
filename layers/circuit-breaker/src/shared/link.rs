//! One breaker of this process and its record: what to ask for, and what
//! becomes of the answer. No IO, and `now` is an argument.
//!
//! ```text
//! a change here ──▶ request ──▶ took:  the record is as it is here
//!                               voted: open here, closed in the fleet
//!                               lost:  the record is followed
//! a newer record, by whatever way ────────────▶ followed
//! ```
//!
//! What is followed comes back as a change by [`Cause::Remote`], which asks for
//! nothing: so no two nodes echo each other.

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::AcqRel},
    },
    time::Duration,
};

use buttress_core::{
    clock::Instant,
    random::{Random, ThreadRandom},
    sync::Mutex,
};
use buttress_redis::Key;

use super::record::{NodeId, Op, Reply, Request, Seen, Standing, Verdict};
use crate::{
    Cause, State, Transition,
    breaker::{Breaker, WeakBreaker},
    cell::{Cell, Follower, View},
};

/// How long a call that would probe waits for leave from a fleet that says
/// nothing.
pub(crate) const GRACE: Duration = Duration::from_secs(1);
/// For how long leave is given to whoever has not begun to probe.
const TURN: Duration = Duration::from_secs(1);
/// And to whoever has, and asks for more each second.
const LEASE: Duration = Duration::from_secs(3);
const RENEW: Duration = Duration::from_secs(1);
/// Between two times that an override is kept from expiring.
const KEEPING: Duration = Duration::from_secs(600);

/// What a link calls when it has something to ask for.
pub(crate) trait Bell: Send + Sync {
    fn ring(&self, link: &Arc<Link>);
    /// Whether somebody will come.
    fn is_heard(&self) -> bool;
    /// A link is gone.
    fn forget(&self, key: &str);
}

/// A breaker, and what is known of its record.
pub(crate) struct Link {
    me: Weak<Link>,
    key: Key,
    id: NodeId,
    breaker: WeakBreaker,
    bell: Arc<dyn Bell>,
    /// Whether what is done by hand is done for the fleet.
    by_hand: bool,
    /// Whether it waits in the hub's queue.
    pub(super) queued: AtomicBool,
    inner: Mutex<Inner>,
}

struct Inner {
    /// What was followed, or written, last.
    seen: Seen,
    heard: Option<Instant>,
    /// The generation of the latest change that was heard of.
    generation: u32,
    /// Changes that the fleet does not know: the latest by hand, and the
    /// latest if that was none.
    by_hand: Option<Change>,
    latest: Option<Change>,
    /// A call wants to probe.
    wanted: bool,
    /// Leave was asked for ahead of time, once for each record.
    asked: bool,
    read: bool,
    renew: Option<Instant>,
    keep: Option<Instant>,
    lead: Duration,
    /// When it is to be polled.
    pub(super) alarm: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Change {
    to: State,
    cause: Cause,
    generation: u32,
    at: Instant,
    /// The end of an open state.
    until: Option<Instant>,
    /// And until when the callee asked to be left alone, if it did.
    asked: Option<Instant>,
}

impl Change {
    fn op(&self, now: Instant) -> Op {
        let left = |end: Option<Instant>| end.map_or(Duration::ZERO, |end| end - now);
        let (wait, asked) = (left(self.until), left(self.asked));
        match (self.to, self.cause) {
            (State::HalfOpen, cause) => Op::Claim {
                lease: LEASE,
                by_hand: cause == Cause::Manual,
            },
            (to, Cause::Manual) => Op::Hand { to, wait },
            (State::Open, Cause::ProbeFailed | Cause::ProbesOverdue) => Op::Reopen { wait, asked },
            (State::Open, _) => Op::Trip { wait, asked },
            _ => Op::Close,
        }
    }
}

/// What the fleet is to this breaker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkView {
    pub(crate) seen: Seen,
    pub(crate) heard: Option<Instant>,
    pub(crate) pending: bool,
}

impl Link {
    pub(crate) fn new(
        key: Key,
        breaker: WeakBreaker,
        bell: Arc<dyn Bell>,
        by_hand: bool,
        generation: u32,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            key,
            id: NodeId(ThreadRandom.next_u64()),
            breaker,
            bell,
            by_hand,
            queued: AtomicBool::new(false),
            inner: Mutex::new(Inner {
                seen: NOTHING,
                heard: None,
                generation,
                by_hand: None,
                latest: None,
                wanted: false,
                asked: false,
                read: false,
                renew: None,
                keep: None,
                lead: Duration::ZERO,
                alarm: None,
            }),
        })
    }

    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    pub(crate) fn id(&self) -> NodeId {
        self.id
    }

    pub(crate) fn view(&self) -> LinkView {
        let inner = self.inner.lock();
        LinkView {
            seen: inner.seen,
            heard: inner.heard,
            pending: inner.is_pending(),
        }
    }

    fn ring(&self) {
        if let Some(me) = self.me.upgrade() {
            self.bell.ring(&me);
        }
    }

    /// Marks it as waiting in a queue; whether it did not.
    pub(super) fn enqueue(&self) -> bool {
        !self.queued.swap(true, AcqRel)
    }

    pub(super) fn dequeued(&self) {
        self.queued.swap(false, AcqRel);
    }

    /// Its record is to be read.
    pub(crate) fn want_read(&self) {
        self.inner.lock().read = true;
    }

    /// Whether there is something that the fleet does not know, or that is
    /// not known of it.
    pub(crate) fn is_pending(&self) -> bool {
        let inner = self.inner.lock();
        inner.is_pending() || inner.read
    }

    /// What is to be asked now. Until there is an answer, or word that there
    /// is none, it is not to be polled again.
    pub(crate) fn poll(&self, now: Instant) -> Option<Request> {
        let breaker = self.breaker.upgrade()?;
        let cell = breaker.lease().cell;
        // May find that half-open is overdue, and tell so.
        let view = cell.view(now);
        let due = cell.due();
        let mut inner = self.inner.lock();
        let request = |inner: &Inner, op, age, generation| {
            Some(Request {
                op,
                base: inner.seen.version,
                age,
                generation,
            })
        };
        if let Some(change) = inner.by_hand.or(inner.latest) {
            let age = now - change.at;
            return request(&inner, change.op(now), age, change.generation);
        }
        if inner.read {
            return request(&inner, Op::Read, Duration::ZERO, view.generation);
        }
        let op = match view.state {
            State::Open => {
                let ahead = matches!(inner.seen.standing, Standing::Open(_))
                    && !inner.asked
                    && now + inner.lead >= due;
                if ahead {
                    inner.asked = true;
                }
                (ahead || inner.wanted).then_some(Op::Claim {
                    lease: TURN,
                    by_hand: false,
                })
            }
            State::HalfOpen if inner.is_ours() && inner.renew.is_none_or(|at| now >= at) => {
                Some(Op::Claim {
                    lease: LEASE,
                    by_hand: false,
                })
            }
            state
                if self.by_hand
                    && state.is_override()
                    && inner.keep.is_some_and(|keep| now >= keep) =>
            {
                inner.keep = Some(now + KEEPING);
                Some(Op::Keep { to: state })
            }
            _ => None,
        };
        request(&inner, op?, now - view.since, view.generation)
    }

    /// When to poll it again, if nothing else happens; `None` if that is known
    /// to whoever polls.
    pub(crate) fn next_alarm(&self, now: Instant) -> Option<Instant> {
        let breaker = self.breaker.upgrade()?;
        let cell = breaker.lease().cell;
        let view = cell.view(now);
        let due = cell.due();
        let mut inner = self.inner.lock();
        let at = match view.state {
            State::Open if matches!(inner.seen.standing, Standing::Open(_)) && !inner.asked => {
                let lead = u64::try_from(inner.lead.as_nanos()).unwrap_or(0);
                Instant::from_nanos(due.as_nanos().saturating_sub(lead))
            }
            State::HalfOpen if inner.is_ours() => inner.renew?,
            state if state.is_override() => inner.keep?,
            _ => return None,
        };
        let at = at.max(now);
        if inner.alarm.is_some_and(|set| set <= at) {
            return None;
        }
        inner.alarm = Some(at);
        Some(at)
    }

    pub(crate) fn alarmed(&self) {
        self.inner.lock().alarm = None;
    }

    /// The answer, received now to what was asked at `sent`.
    pub(crate) fn answered(&self, request: &Request, reply: &Reply, sent: Instant, now: Instant) {
        let Some(breaker) = self.breaker.upgrade() else {
            return;
        };
        let cell = breaker.lease().cell;
        {
            let mut inner = self.inner.lock();
            inner.heard = Some(now);
            inner.done(request, now);
            if let (Verdict::Lost, Op::Hand { .. }) = (reply.verdict, request.op) {
                // Another word stands, be it of a record that was known.
                inner.seen = NOTHING;
            }
            let took = match (reply.verdict, request.op) {
                (_, Op::Read) | (Verdict::Lost, _) => false,
                (Verdict::Took | Verdict::Voted, _) => true,
            };
            if took {
                inner.know(reply.seen, now);
                if inner.is_ours() {
                    // From before it was given: it ends there no sooner.
                    inner.renew = Some(sent + RENEW);
                }
                drop(inner);
                // Open for the fleet it waits for leave; alone it needs none.
                if matches!(
                    reply.seen.standing,
                    Standing::Closed | Standing::Probing { ours: true, .. }
                ) {
                    cell.give_leave(request.generation);
                }
                return;
            }
        }
        if reply.seen.version == 0 {
            if self.inner.lock().seen.version > 0 {
                // A history that is lost, and this was a part of it.
                self.lost(now);
            }
            cell.give_leave(request.generation);
        } else {
            self.apply(&breaker, reply.seen, now);
        }
    }

    /// There was no answer: it is alone.
    pub(crate) fn unanswered(&self, request: &Request, now: Instant) {
        let Some(breaker) = self.breaker.upgrade() else {
            return;
        };
        {
            let mut inner = self.inner.lock();
            inner.wanted = false;
            if inner.renew.is_some() {
                inner.renew = Some(now + RENEW);
            }
        }
        breaker.lease().cell.give_leave(request.generation);
    }

    /// What others say.
    pub(crate) fn heard(&self, seen: Seen, now: Instant) {
        {
            let mut inner = self.inner.lock();
            if seen.version <= inner.seen.version {
                return;
            }
            inner.heard = Some(now);
        }
        if let Some(breaker) = self.breaker.upgrade() {
            self.apply(&breaker, seen, now);
        }
    }

    /// The fleet knows nothing of it: is there anything to tell?
    pub(crate) fn lost(&self, now: Instant) {
        let Some(breaker) = self.breaker.upgrade() else {
            return;
        };
        let view = breaker.lease().cell.view(now);
        let mut inner = self.inner.lock();
        inner.seen = NOTHING;
        inner.renew = None;
        if inner.is_pending() {
            return;
        }
        let change = Change {
            to: view.state,
            cause: if view.state.is_override() {
                Cause::Manual
            } else {
                view.opened.map_or(Cause::Remote, |opened| opened.cause)
            },
            generation: view.generation,
            at: view.since,
            until: view.until,
            asked: None,
        };
        match view.state {
            State::Closed => {}
            // A trip, whatever opened it.
            State::Open => {
                inner.latest = Some(Change {
                    cause: Cause::Remote,
                    ..change
                });
            }
            State::HalfOpen => {
                inner.latest = Some(Change {
                    cause: Cause::WaitOver,
                    ..change
                });
            }
            _ if self.by_hand => inner.by_hand = Some(change),
            _ => {}
        }
        let pending = inner.is_pending();
        drop(inner);
        if pending {
            self.ring();
        }
    }

    /// Does here what was done there.
    fn apply(&self, breaker: &Breaker, seen: Seen, now: Instant) {
        let cell = breaker.lease().cell;
        let view = cell.view(now);
        let new = {
            let mut inner = self.inner.lock();
            if inner.is_pending() {
                // The answer to that may be from before this.
                inner.read = true;
                return;
            }
            if self.by_hand
                && view.state.is_override()
                && inner.is_newer(view.generation)
                && inner.seen.standing != Standing::Forced(view.state)
            {
                // By hand at this very moment, and it is not told yet. What
                // comes of that may be this.
                inner.generation = view.generation;
                inner.by_hand = Some(Change {
                    to: view.state,
                    cause: Cause::Manual,
                    generation: view.generation,
                    at: view.since,
                    until: None,
                    asked: None,
                });
                inner.latest = None;
                drop(inner);
                self.ring();
                return;
            }
            // One that was followed from where it is done for all is not this
            // node's own, and ends with the fleet's.
            let theirs = inner.seen.standing == Standing::Forced(view.state);
            if !self.by_hand && view.state.is_override() && !theirs {
                // When it ends, the record is read.
                return;
            }
            let new = !seen.is(&inner.seen);
            inner.know(seen, now);
            new
        };
        // Probing by hand that is nobody else's business goes on.
        let unfounded = self.by_hand && view.state == State::HalfOpen;
        let closed = matches!(seen.standing, Standing::Closed);
        follow(cell, &view, seen.standing, new || unfounded && !closed, now);
        if !new && closed {
            cell.give_leave(view.generation);
        }
    }
}

/// Brings the breaker to where the record is: in the generation that was
/// looked at, as whatever else has happened is told by itself.
fn follow(cell: &Cell, view: &View, standing: Standing, new: bool, now: Instant) {
    let generation = view.generation;
    let left = match standing {
        Standing::Closed => {
            if new {
                cell.follow(generation, State::Closed, None, now);
            }
            return;
        }
        Standing::Forced(state) => {
            // Where it is so already, nothing changes.
            cell.follow(generation, state, None, now);
            return;
        }
        Standing::Probing { ours: true, .. } => {
            cell.give_leave(generation);
            return;
        }
        Standing::Open(left) | Standing::Probing { left, .. } => left,
    };
    match view.state {
        // Anchored here and now, so that nobody's wall clock matters.
        State::Open => cell.delay(generation, now + left, now + left + GRACE),
        _ if !new => {}
        State::Closed | State::HalfOpen => {
            cell.follow(generation, State::Open, Some(left), now);
        }
        State::ForcedOpen | State::ForcedClosed | State::MetricsOnly => {
            if cell.follow(generation, State::Closed, None, now) {
                let closed = generation.wrapping_add(1) % crate::word::GENERATIONS;
                cell.follow(closed, State::Open, Some(left), now);
            }
        }
    }
}

/// What is known where nothing is.
const NOTHING: Seen = Seen {
    version: 0,
    standing: Standing::Closed,
};

impl Inner {
    fn is_pending(&self) -> bool {
        self.by_hand.is_some() || self.latest.is_some()
    }

    fn is_ours(&self) -> bool {
        matches!(self.seen.standing, Standing::Probing { ours: true, .. })
    }

    fn know(&mut self, seen: Seen, now: Instant) {
        if seen.version != self.seen.version {
            self.asked = false;
            // Not all nodes at once: who is first spares the others the way.
            self.lead = Duration::from_millis(20 + ThreadRandom.next_u64() % 180);
            self.renew = None;
            self.keep = match seen.standing {
                Standing::Forced(_) => Some(now + KEEPING),
                _ => None,
            };
        }
        self.seen = seen;
    }

    /// What was asked is answered. What has happened since is not.
    fn done(&mut self, request: &Request, now: Instant) {
        match request.op {
            Op::Read => self.read = false,
            Op::Claim { .. } => {
                self.wanted = false;
                if let Some(renew) = &mut self.renew {
                    *renew = now + RENEW;
                }
            }
            _ => {}
        }
        let of_this = |change: &mut Change| change.generation == request.generation;
        if self.by_hand.take_if(of_this).is_none() {
            self.latest.take_if(of_this);
        }
    }

    fn is_newer(&self, generation: u32) -> bool {
        let ahead = generation.wrapping_sub(self.generation) % crate::word::GENERATIONS;
        ahead != 0 && ahead < crate::word::GENERATIONS / 2
    }
}

impl Follower for Link {
    fn changed(&self, change: &Transition, asked: Option<Duration>) {
        {
            let mut inner = self.inner.lock();
            if !inner.is_newer(change.generation) {
                return;
            }
            inner.generation = change.generation;
            inner.wanted = false;
            let known = Change {
                to: change.to,
                cause: change.cause,
                generation: change.generation,
                at: change.at,
                until: change.wait.map(|wait| change.at + wait),
                asked: asked.map(|asked| change.at + asked),
            };
            match change.cause {
                Cause::Remote => {
                    inner.by_hand = None;
                    inner.latest = None;
                }
                Cause::Manual if self.by_hand => {
                    inner.by_hand = Some(known);
                    inner.latest = None;
                }
                Cause::Manual => {
                    inner.latest = None;
                    // What was not followed under an override.
                    if change.from.is_override() && !change.to.is_override() {
                        inner.seen = NOTHING;
                        inner.read = true;
                    }
                }
                _ => {
                    // What has come of it counts, but an override that was
                    // ended must end elsewhere, too.
                    inner.by_hand.take_if(|change| change.to != State::Closed);
                    inner.latest = Some(known);
                }
            }
        }
        self.ring();
    }

    fn wanted(&self) {
        let first = {
            let mut inner = self.inner.lock();
            !std::mem::replace(&mut inner.wanted, true)
        };
        if first {
            self.ring();
        }
    }

    fn grace(&self) -> Duration {
        if self.bell.is_heard() {
            GRACE
        } else {
            Duration::ZERO
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.bell.forget(self.key.as_str());
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("id", &self.id.0)
            .finish_non_exhaustive()
    }
}
