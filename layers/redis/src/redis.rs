//! The handle that everything shares.

use std::{fmt, sync::Arc, time::Duration};

use buttress_core::random::{Random, ThreadRandom};
use redis::{Cmd, FromRedisValue, Value};
use tokio::{sync::watch, time::timeout};

use crate::{
    Call, Config, ConfigError, Error, ErrorKind, Keyspace,
    gate::{Gate, Ticket},
    keeper::Keeper,
    link::{Dialer, Link, Single},
    metrics::Metrics,
    nodes::Gates,
    subscribe::Subscription,
};

/// A Redis server or cluster, on one connection that is shared by all clones.
///
/// Making one does nothing yet: the connection is made in the background by the
/// first that asks, in its tokio runtime, and again whenever it is lost. No
/// operation takes longer than the [time limit](Config::timeout); and where
/// three in a row have failed, none is tried, until a probe (each 200 ms, give
/// or take) finds the server able to write; where operations are denied though
/// probes pass, less and less often, every 5 s at last.
#[derive(Clone)]
pub struct Redis {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) gates: Arc<Gates>,
    pub(crate) dialer: Dialer,
    pub(crate) keeper: Keeper,
    id: u64,
    pub(crate) prefix: Box<str>,
    pub(crate) timeout: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) metrics: Metrics,
}

impl Redis {
    /// The server or cluster of this configuration.
    ///
    /// # Errors
    ///
    /// A configuration that makes no sense. Whether a server is there is found
    /// out later.
    pub fn from_config(config: Config) -> Result<Self, ConfigError> {
        let servers = config.check()?;
        let gates = if servers.cluster {
            Gates::cluster()
        } else {
            Gates::single()
        };
        let dialer = Dialer::new(&servers, config.connect_timeout)?;
        Ok(Self {
            shared: Arc::new(Shared {
                gates: Arc::new(gates),
                dialer,
                keeper: Keeper::default(),
                id: ThreadRandom.next_u64(),
                prefix: config.key_prefix.into(),
                timeout: config.timeout,
                connect_timeout: config.connect_timeout,
                metrics: Metrics::new(),
            }),
        })
    }

    /// The server of this URL: [`Config::new`].
    ///
    /// # Errors
    ///
    /// A URL that makes no sense.
    pub fn from_url(url: impl Into<String>) -> Result<Self, ConfigError> {
        Self::from_config(Config::new(url))
    }

    /// The server that the environment names: [`Config::from_env`].
    ///
    /// # Errors
    ///
    /// Variables that make no sense.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::from_config(Config::from_env()?)
    }

    /// The keys of one purpose, `namespace` being lower-case letters and
    /// dashes.
    #[must_use]
    pub fn keyspace(&self, namespace: &'static str) -> Keyspace {
        Keyspace::new(&self.shared.prefix, namespace)
    }

    /// Whether it is a cluster, where a script's keys must be of one slot.
    #[must_use]
    pub fn is_cluster(&self) -> bool {
        self.shared.dialer.is_cluster()
    }

    /// A random number of this handle's and its clones': who a process is to a
    /// fleet, as long as it lives.
    #[must_use]
    pub fn handle_id(&self) -> u64 {
        self.shared.id
    }

    /// How long one operation takes at most.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.shared.timeout
    }

    /// Whether operations are tried now: one load, but in a cluster, where it
    /// is whether any node's are. True before the first.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.shared.gates.any_open()
    }

    /// Tells of the server's coming and going, from now on.
    #[must_use]
    pub fn watch(&self) -> Watch {
        Watch {
            redis: self.clone(),
            states: self.shared.keeper.states(),
        }
    }

    /// Waits until there is a connection, as long as [`Config::timeout`] and
    /// [`Config::connect_timeout`] together say. Nobody need: the first
    /// operation does so within its own time. It is for programs that would
    /// rather not start without, and for a first request without the wait.
    ///
    /// # Errors
    ///
    /// There is none yet, and why; it is tried on in the background.
    pub async fn connect(&self) -> Result<(), Error> {
        let shared = &self.shared;
        let limit = shared.timeout + shared.connect_timeout;
        match timeout(limit, shared.keeper.linked(shared, true)).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) | Err(_) => {
                let why = shared.keeper.why();
                Err(why.unwrap_or_else(|| Error::new(ErrorKind::Timeout, "connect")))
            }
        }
    }

    /// Runs a command. `operation` is its name in metrics and errors: one of a
    /// few, in lower case.
    ///
    /// No command that blocks ([`dedicated`](Self::dedicated) is for those) or
    /// changes the connection (`SELECT`, `MULTI`, `SUBSCRIBE`): all share it.
    /// A future that is dropped takes nothing back: the command may have been
    /// sent.
    ///
    /// # Errors
    ///
    /// The server is gone, does not answer within the time limit, or refuses.
    pub async fn run<T: FromRedisValue>(
        &self,
        operation: &'static str,
        cmd: &Cmd,
    ) -> Result<T, Error> {
        self.attempt(operation, self.shared.timeout, cmd, async |link| {
            link.query(cmd)
                .await
                .map_err(|cause| Error::caused(operation, cause))
        })
        .await
    }

    /// Runs a script, as [`run`](Self::run) does a command.
    ///
    /// # Errors
    ///
    /// The server is gone, does not answer within the time limit, or refuses.
    pub async fn call<T: FromRedisValue>(
        &self,
        operation: &'static str,
        call: &Call,
    ) -> Result<T, Error> {
        self.call_within(self.shared.timeout, operation, call).await
    }

    /// The same for who has waited already: within `limit`, where that is
    /// shorter than the time limit of all operations.
    ///
    /// # Errors
    ///
    /// The server is gone, does not answer within the time limit, or refuses.
    pub async fn call_within<T: FromRedisValue>(
        &self,
        limit: Duration,
        operation: &'static str,
        call: &Call,
    ) -> Result<T, Error> {
        let limit = limit.min(self.shared.timeout);
        self.attempt(operation, limit, &call.cmd, async |link| {
            let failed = |cause| Error::caused(operation, cause);
            match link.query(&call.cmd).await {
                Err(error) if error.code() == Some("NOSCRIPT") => {
                    link.query(&call.in_full()).await.map_err(failed)
                }
                answer => answer.map_err(failed),
            }
        })
        .await
    }

    async fn attempt<T: FromRedisValue>(
        &self,
        operation: &'static str,
        limit: Duration,
        cmd: &Cmd,
        work: impl AsyncFnOnce(&mut Link) -> Result<Value, Error>,
    ) -> Result<T, Error> {
        let shared = &*self.shared;
        let timer = shared.metrics.begin();
        let gate = shared.gates.of(cmd);
        let Some(ticket) = gate.pass() else {
            let error = Error::new(ErrorKind::Gone, operation);
            shared.metrics.failed(&error);
            return Err(error);
        };
        let mut number = None;
        let answer = timeout(limit, async {
            let mut link = self.link(operation).await?;
            number = Some(link.number);
            work(&mut link).await
        })
        .await;
        let answer = answer.unwrap_or_else(|_| match number {
            Some(_) => Err(Error::new(ErrorKind::Timeout, operation)),
            None => Err(Error::unsent(operation)),
        });
        let number = number.unwrap_or(0);
        shared.metrics.ended(operation, timer);
        match &answer {
            Ok(_) => gate.answered(ticket),
            Err(error) => shared.failed(gate, ticket, error, number),
        }
        T::from_redis_value(answer?).map_err(|cause| {
            let error = Error::answer(operation, cause);
            shared.metrics.failed(&error);
            error
        })
    }

    /// The connection, waiting for it where it is being made.
    async fn link(&self, operation: &'static str) -> Result<Link, Error> {
        let keeper = &self.shared.keeper;
        if let Some(link) = keeper.link() {
            return Ok(link);
        }
        keeper
            .linked(&self.shared, false)
            .await
            .ok_or_else(|| Error::new(ErrorKind::Gone, operation))
    }

    /// Listens to a channel, on a connection of its own: see [`Subscription`].
    #[must_use]
    pub fn subscribe(&self, channel: impl Into<String>) -> Subscription {
        Subscription::new(Arc::clone(&self.shared), channel.into())
    }

    /// A connection of one's own, for commands that block: on the shared one
    /// they would make all others wait. It has no gate and does not reconnect.
    /// In a cluster it is to the first of the nodes that were named.
    ///
    /// # Errors
    ///
    /// It could not be made within [`Config::connect_timeout`].
    pub async fn dedicated(&self) -> Result<Dedicated, Error> {
        match timeout(self.shared.connect_timeout, self.shared.dialer.dedicated()).await {
            Ok(made) => made
                .map(Dedicated)
                .map_err(|cause| Error::caused("connect", cause)),
            Err(_) => Err(Error::new(ErrorKind::Timeout, "connect")),
        }
    }
}

#[cfg(all(test, not(buttress_loom)))]
impl Redis {
    pub(crate) const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Shared {
    /// Tells everyone of an operation that failed on the connection of this
    /// number.
    #[cold]
    pub(crate) fn failed(&self, gate: &Gate, ticket: Ticket, error: &Error, number: u64) {
        self.metrics.failed(error);
        if !error.kind().is_outage() {
            gate.answered(ticket);
            return;
        }
        if self.gates.is_cluster() {
            self.keeper.doubt(error);
        }
        let has_shut = match error.kind() {
            ErrorKind::Denied => gate.denied(ticket),
            _ => gate.failed(ticket),
        };
        if has_shut {
            if self.gates.any_open() {
                self.keeper.lost_part(error);
            } else {
                self.keeper.lost(error);
            }
        } else if error.wants_another_link() && !self.gates.is_cluster() {
            self.keeper.mend(number);
        }
    }
}

/// A connection of one's own: see [`Redis::dedicated`]. Dropping it closes it.
pub struct Dedicated(Single);

impl Dedicated {
    /// Runs a command, which may block for less than `limit`.
    ///
    /// # Errors
    ///
    /// No answer within `limit`, a lost connection, or the server refuses. After
    /// the first two it is of no use any more.
    pub async fn run<T: FromRedisValue>(
        &mut self,
        operation: &'static str,
        cmd: &Cmd,
        limit: Duration,
    ) -> Result<T, Error> {
        let value = match timeout(limit, self.0.query(cmd)).await {
            Ok(answer) => answer.map_err(|cause| Error::caused(operation, cause))?,
            Err(_) => return Err(Error::new(ErrorKind::Timeout, operation)),
        };
        T::from_redis_value(value).map_err(|cause| Error::answer(operation, cause))
    }
}

impl fmt::Debug for Dedicated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dedicated(..)")
    }
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis")
            .field("prefix", &self.shared.prefix)
            .field("timeout", &self.shared.timeout)
            .field("cluster", &self.is_cluster())
            .field("up", &self.is_up())
            .finish_non_exhaustive()
    }
}

/// Tells of the server's coming and going: see [`Redis::watch`].
#[derive(Clone)]
pub struct Watch {
    redis: Redis,
    states: watch::Receiver<u64>,
}

impl Watch {
    /// Whether operations are tried now.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.redis.is_up()
    }

    /// Waits for the next coming or going after the last that was seen; whether
    /// the server is there then. What came and went in between is told once.
    pub async fn changed(&mut self) -> bool {
        // The sender lives as long as `redis`.
        let _ = self.states.changed().await;
        self.redis.is_up()
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("up", &self.is_up()).finish()
    }
}
