//! With whom breakers are shared, and how.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use buttress_core::{clock::Instant, label};
use buttress_redis::{Key, Redis};

use super::{Hub, Link, link::LinkView, record::Standing};
use crate::{ConfigError, error::Problem};

/// The most nodes that a quorum may ask for.
const MOST: u32 = 10_000;

/// Breakers of the same name are one for a fleet of processes, over Redis:
/// [`redis`](crate::CircuitBreakerBuilder::redis) of a layer, a breaker or a
/// registry takes this, or simply the [`Redis`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use buttress_circuit_breaker::{CircuitBreakerLayer, Sharing};
/// use buttress_redis::Redis;
///
/// let redis = Redis::from_url("redis://127.0.0.1:6379")?;
/// // Open in all processes within a second of one of them opening it.
/// let inventory = CircuitBreakerLayer::builder()
///     .name("inventory")
///     .redis(&redis)
///     .build()?;
/// // For all only when two have found it so.
/// let payments = CircuitBreakerLayer::builder()
///     .name("payments")
///     .redis(Sharing::new(&redis).quorum(2))
///     .build()?;
/// # Ok(())
/// # }
/// ```
///
/// # What is shared
///
/// Each process decides by its own calls: none of them asks Redis, nor waits
/// for it. What is told is the change of a state:
///
/// | here | elsewhere |
/// | --- | --- |
/// | a rule opens it | open, for what is left of the wait; where it is open already, for longer if the callee asked for that by `Retry-After` |
/// | the wait is over | one of the processes has leave to probe; the others stay open until it tells, or has been silent for 3 s |
/// | probes succeed | closed |
/// | a probe fails | open, for the new wait |
/// | by hand: forced, reset, tripped, closed | the same, unless [said otherwise](Self::by_hand) |
///
/// What is told carries spans and no times, by the clock of the Redis server
/// alone, so that the clocks of the processes may be wrong. Two changes at
/// once: the one that happened later stands. But an override (forced open,
/// forced closed, metrics-only) stands over all that rules do anywhere, before
/// it is known there and after, until another word of an operator: of two of
/// these, too, the later one. Settings, counts and windows are
/// not shared, and the wait is that of who opened it: give all the same
/// settings. A breaker that follows has
/// [`Cause::Remote`](crate::Cause::Remote) in its events.
///
/// # How late
///
/// News take one script and one message: with Redis near, a few milliseconds.
/// A message that is lost is made up for by the next [pull](Self::pull), so
/// that no process that reaches Redis knows less than its state of 1.2 pulls
/// and two time limits of an operation ago: 6 s and a bit, by default.
///
/// Calls that get through meanwhile: (N − 1) · r · δ, where N processes make
/// r calls per second each and hear of it after δ. 50 processes of 200 calls
/// per second and 10 ms: 98 calls.
///
/// # One prober
///
/// Leave to probe is asked for in the background, ahead of the end of the
/// wait, and again when a call comes that has none. That call is refused, for
/// 10 ms; where a second has brought no answer, the next probes in any case.
/// Leave lasts for a second, unless it is made use of, and then for as long as
/// the probing does. It is a lease: two may probe where a process has been
/// stopped for longer than that, or where Redis has been.
///
/// # When Redis is gone
///
/// Each process goes on alone, as if it shared nothing. What has changed is
/// told when Redis is back, and what is newer there is followed.
///
/// # What it costs
///
/// A call costs what it did; the first after an open state's wait may be
/// refused as said above. Of Redis: a script for each change, each second of
/// probing and each pull (one for all breakers of the process), a message to
/// each process for each change, and a connection more for each process. Of
/// its memory: a record of some 400 bytes for each breaker that has ever
/// opened, kept for an hour after; and of 10,000 at most an index.
///
/// Clones share one task and one connection for their messages: give layers
/// that are to share them clones of one.
#[derive(Clone)]
pub struct Sharing {
    redis: Redis,
    fleet: Arc<str>,
    quorum: u32,
    pull: Duration,
    by_hand: bool,
    hub: Arc<OnceLock<Arc<Hub>>>,
}

impl Sharing {
    /// Shares with all that use this Redis, with its prefix.
    #[must_use]
    pub fn new(redis: &Redis) -> Self {
        Self {
            redis: redis.clone(),
            fleet: "default".into(),
            quorum: 1,
            pull: Duration::from_secs(5),
            by_hand: true,
            hub: Arc::default(),
        }
    }

    fn change(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        // Others of which this was a clone are shared otherwise.
        self.hub = Arc::default();
        self
    }

    /// Shares only with those of this fleet: 1 to 128 printable ASCII
    /// characters. Default `default`.
    #[must_use]
    pub fn fleet(self, fleet: impl Into<Arc<str>>) -> Self {
        self.change(|this| this.fleet = fleet.into())
    }

    /// How many processes must have opened a breaker, and be open yet, before it
    /// opens for all. A process is a [`Redis`] handle: of several breakers of
    /// one name on its clones any has the one vote. Who opens it is open himself
    /// at once. Default 1; 2 where a process whose network alone is bad must not
    /// open it for others.
    ///
    /// Under a quorum a probe that fails is a vote, too: the next node may
    /// try at once, and so many must fail for it to be open for all again.
    /// What is done by hand needs none.
    #[must_use]
    pub fn quorum(self, nodes: u32) -> Self {
        self.change(|this| this.quorum = nodes)
    }

    /// How often it is asked for what messages may have failed to tell, give
    /// or take a fifth: 100 ms to an hour. Default 5 s.
    #[must_use]
    pub fn pull(self, interval: Duration) -> Self {
        self.change(|this| this.pull = interval)
    }

    /// Whether what is done by hand at one node (forced, tripped, closed,
    /// reset) is done for all. Default: yes. If not, a breaker under an
    /// override follows nobody until it is reset.
    #[must_use]
    pub fn by_hand(self, shared: bool) -> Self {
        self.change(|this| this.by_hand = shared)
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if !label::is_sound(&self.fleet, 128) {
            return Err(Problem::Fleet.into());
        }
        if !(1..=MOST).contains(&self.quorum) {
            return Err(Problem::Quorum.into());
        }
        let pulls = Duration::from_millis(100)..=Duration::from_secs(3600);
        if !pulls.contains(&self.pull) {
            return Err(Problem::Pull.into());
        }
        Ok(())
    }

    /// Of settings that have been checked.
    pub(crate) fn hub(&self) -> Arc<Hub> {
        let hub = self.hub.get_or_init(|| {
            Hub::new(
                &self.redis,
                &self.fleet,
                self.quorum,
                self.pull,
                self.by_hand,
            )
        });
        Arc::clone(hub)
    }
}

impl From<&Redis> for Sharing {
    fn from(redis: &Redis) -> Self {
        Self::new(redis)
    }
}

impl From<Redis> for Sharing {
    fn from(redis: Redis) -> Self {
        Self::new(&redis)
    }
}

impl fmt::Debug for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sharing")
            .field("fleet", &self.fleet)
            .field("quorum", &self.quorum)
            .field("pull", &self.pull)
            .field("by_hand", &self.by_hand)
            .finish_non_exhaustive()
    }
}

/// A shared breaker in its fleet: [`Breaker::fleet`](crate::Breaker::fleet).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FleetStatus {
    /// Whether Redis answered when it was last asked.
    pub up: bool,
    /// The version of what is known of this breaker; 0 if nothing is.
    pub version: u64,
    /// When it was last heard of, or told.
    pub heard: Option<Instant>,
    /// Whether there is something yet to be told.
    pub pending: bool,
    /// Whether the fleet says closed, be it open here or not.
    pub closed: bool,
    /// Whether this node has leave to probe.
    pub leave: bool,
}

/// Where a breaker belongs, before it is there.
#[derive(Clone)]
pub(crate) struct Membership {
    pub(crate) hub: Arc<Hub>,
    pub(crate) key: Key,
}

impl FleetStatus {
    pub(crate) fn of(hub: &Hub, link: &Link) -> Self {
        let LinkView {
            seen,
            heard,
            pending,
        } = link.view();
        Self {
            up: hub.is_up(),
            version: seen.version,
            heard,
            pending,
            closed: seen.standing == Standing::Closed,
            leave: matches!(seen.standing, Standing::Probing { ours: true, .. }),
        }
    }
}
