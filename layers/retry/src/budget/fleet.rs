//! One budget for a fleet.
//!
//! ```text
//! process                        pool, in Redis                     process
//! requests ─▶ pocket ─▶ retries        minimum: fills by time        pocket ─▶ retries
//!               │ ▲                    balance: what was saved up      ▲ │
//!               └─┴── each 200 ms: offered, or wanted ─▶ granted ──────┴─┘
//! ```
//!
//! A retry is paid from the pocket of its own process: no trip, no clock. A
//! task evens the pockets out over a pool, which one script changes by the
//! server's time. What pays for a retry is made by a request or by time, once,
//! and is in one place at any moment; so what all of them retry is bounded as
//! if they were one, however late or lost the messages are.

#[cfg(all(test, buttress_loom))]
mod loom_tests;
mod pocket;
#[cfg(all(test, not(buttress_loom)))]
mod tests;

use std::{
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use buttress_core::{
    clock, label,
    random::{SharedRandom, ThreadRandom},
    sync::{
        Mutex, Padded,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
};
use buttress_redis::{Key, Redis, Script};
use tokio::{runtime, time::sleep};

use self::pocket::{Answer, Ledger, Pocket, Report};
use super::{
    Budget, RetryBudget,
    percent::{RETRY, SECOND, bound},
};
use crate::error::ConfigError;

/// Between two looks at the pool, give or take a quarter.
const INTERVAL: Duration = Duration::from_millis(200);
/// So many in a row that failed, and this process is on its own.
const FAILURES: u32 = 3;

/// Who asks; what is offered and wanted, in thousandths of a retry; the
/// minimum each second; what is saved up at most, in thousandths; the number of
/// the look.
///
/// The pool is in millionths: a microsecond of one retry a second. What is
/// granted is half of what there is at most, that others are left some, but a
/// whole retry where there is one.
///
/// A cluster may be asked a second time, and do both. So the score of a process
/// is 256 times the milliseconds of its last look, plus the number of that look
/// modulo 256: what comes again, or late, offers nothing and gets nothing.
const SCRIPT: &str = "\
local pool = redis.pcall('HMGET', KEYS[1], 'minimum', 'balance', 'at')
if pool.err then return pool end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local offered, wanted = ARGV[2] * 1000, ARGV[3] * 1000
local ms = math.floor(now / 1000)
local look = ARGV[6] % 256
local last = redis.pcall('ZSCORE', KEYS[2], ARGV[1])
if type(last) == 'table' then return last end
last = last and tonumber(last)
local lately = last and last >= (ms - 3000) * 256 and last < (ms + 1000) * 256
local ahead = lately and (look - last) % 256 or 1
if ahead == 0 or ahead > 127 then
  offered, wanted = 0, 0
else
  local joined = redis.pcall('ZADD', KEYS[2], ms * 256 + look, ARGV[1])
  if type(joined) == 'table' then return joined end
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', (ms - 3000) * 256)
redis.call('ZREMRANGEBYSCORE', KEYS[2], (ms + 1000) * 256, '+inf')
redis.call('PEXPIRE', KEYS[2], 60000)

local rate, saved = tonumber(ARGV[4]), ARGV[5] * 1000
local whole = rate * 1000000
local sound = true
for i = 1, 3 do
  local number = tonumber(pool[i])
  sound = sound and number and number >= 0 and number < 9e15
  pool[i] = number
end
local minimum, balance, at = whole, 0, now
if sound then minimum, balance, at = pool[1], pool[2], pool[3] end

local passed = math.min(math.max(now - at, 0), 1000000)
minimum = math.floor(math.min(whole, minimum + passed * rate))
balance = math.floor(math.min(saved, balance + offered))
local there = minimum + balance
local granted = math.min(wanted, math.max(there / 2, math.min(there, 1000000)))
granted = math.floor(granted / 1000) * 1000
local first = math.min(minimum, granted)
minimum = minimum - first
balance = balance - (granted - first)
redis.call('HSET', KEYS[1], 'minimum', minimum, 'balance', balance, 'at', now)
redis.call('PEXPIRE', KEYS[1], 60000)
return {granted / 1000, balance >= saved and 1 or 0, redis.call('ZCARD', KEYS[2])}
";

/// What a process may retry while Redis does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnStoreError {
    /// By the same percentage of its own requests, and its part of the minimum
    /// and of what may be saved up: by as many processes as there were last
    /// (the default). One that has never reached Redis takes itself for the
    /// only one.
    #[default]
    Share,
    /// By the same rule as if it were the only one.
    Local,
    /// Whatever is asked for.
    Allow,
    /// Nothing.
    Deny,
}

/// A [`RetryBudget`] that all processes of a fleet share, over Redis.
///
/// Made by [`RetryBudget::redis`]. Decisions stay in the process: a request
/// costs what it does with a [`RetryBudget`], and a retry less, since it reads
/// no clock. A task looks at a pool in Redis each 200 ms (150 to 250, by
/// chance), gives what this process does not need and takes what it needs.
///
/// # The bound
///
/// From the beginning of the fleet, with any number of processes, and however
/// late or lost its messages are, all together
///
/// ```text
/// retries ≤ percent/100 · requests + minimum · (T + 1 s)
/// ```
///
/// and over any later time `T` besides what had been saved up before, and what
/// was in the pockets of processes then. That is, where little was retried
/// lately, one retry a process or half a second's minimum in all, whichever is
/// more; and where much was, not more than a second's minimum, what may be
/// [saved up](RetryBudget::saving) and what two looks' time has brought.
/// (Fifty processes with a [`RetryBudget`] each have fifty times the minimum,
/// and save up fifty times as much.)
///
/// The price is time: what a process saves up others may use a look later, and
/// one that suddenly wants more than its pocket holds gets half of the pool at
/// each look.
///
/// # When Redis fails
///
/// No request notices. After three looks in vain, half a second or so, it is as
/// [`OnStoreError`] says, by default by this process's part; with the first
/// look that is answered, which is within half a second of the server's return,
/// all share again. What was retried meanwhile is not made up for: the rule
/// allowed it. A server that comes back empty begins with the minimum of a
/// second and nothing saved up; where it answers, and cannot write or finds
/// what is not its own, it has failed.
///
/// # In Redis
///
/// `{prefix}retry-budget:{‹name›}` and `…:processes`, of one hash tag: about
/// 150 bytes, and 50 for each process of the last three seconds. Both have a
/// TTL of a minute. Each process runs five scripts a second.
///
/// # What else cannot be shared
///
/// A [`Throttle`](super::Throttle) and an [`Adaptive`](super::Adaptive) need
/// not be: both allow a part of what their own process sees, and such parts
/// add up to the same part of the whole. Only a minimum and savings are
/// multiplied by processes.
///
/// Clones are the same budget. It is the process's own, once for each name: two
/// of them are two processes to the others.
#[derive(Clone)]
pub struct FleetBudget {
    shared: Arc<Shared>,
}

struct Shared {
    pocket: Padded<Pocket>,
    /// For its rates.
    rule: RetryBudget,
    /// [`TOGETHER`], or how it is alone.
    alone: AtomicU64,
    /// Alone: how many of the minimum at once, and when the next is there.
    burst: AtomicU64,
    arrival: AtomicU64,
    processes: AtomicU64,
    /// Whether a task is there.
    attended: AtomicBool,
    on_store_error: Mutex<OnStoreError>,
    redis: Redis,
    script: Script,
    keys: [Key; 2],
    /// What the others know it by.
    id: String,
    /// How often it has looked at the pool.
    looks: AtomicU64,
    name: Box<str>,
    random: SharedRandom,
}

const TOGETHER: u64 = 0;
const ALLOW: u64 = 1;
const DENY: u64 = 2;
/// With no minimum. All others are nanoseconds between two of its retries, of
/// which there are a thousand at least.
const POCKET: u64 = 3;

impl RetryBudget {
    /// The same budget for a whole fleet: see [`FleetBudget`]. All processes
    /// that give it this name, of 1 to 128 printable ASCII characters, share
    /// it; they are to have the same rates.
    ///
    /// What was saved up so far does not count. Called in a tokio runtime it
    /// begins at once, else with the first retry that is asked for in one.
    ///
    /// ```
    /// use buttress_redis::Redis;
    /// use buttress_retry::{RetryBudget, RetryLayer};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let redis = Redis::from_url("redis://127.0.0.1:6379")?;
    /// let layer = RetryLayer::builder()
    ///     .budget(RetryBudget::new(20, 10)?.redis(&redis, "orders")?)
    ///     .build()?;
    /// # let _ = layer;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// When the name is none.
    pub fn redis(self, redis: &Redis, name: &str) -> Result<FleetBudget, ConfigError> {
        if !label::is_sound(name, 128) {
            return Err(ConfigError::new(
                "the name of a budget must be 1 to 128 printable ASCII characters",
            ));
        }
        let key = redis.keyspace("retry-budget").tag([name]);
        let random = SharedRandom::new(ThreadRandom);
        let budget = FleetBudget {
            shared: Arc::new(Shared {
                pocket: Padded(Pocket::new(self.saved)),
                rule: self,
                alone: AtomicU64::new(TOGETHER),
                burst: AtomicU64::new(0),
                arrival: AtomicU64::new(0),
                processes: AtomicU64::new(0),
                attended: AtomicBool::new(false),
                on_store_error: Mutex::default(),
                redis: redis.clone(),
                script: Script::new(SCRIPT),
                keys: [key.clone(), key.segment("processes")],
                id: format!("{:016x}", random.next_u64()),
                looks: AtomicU64::new(0),
                name: name.into(),
                random,
            }),
        };
        // Its first reading takes a while.
        let _ = clock::now();
        budget.shared.attend();
        Ok(budget)
    }
}

impl FleetBudget {
    /// What there is to retry while Redis does not answer. Default:
    /// [`OnStoreError::Share`].
    #[must_use]
    pub fn on_store_error(self, on_store_error: OnStoreError) -> Self {
        *self.shared.on_store_error.lock() = on_store_error;
        self
    }

    /// Other rates from now on: see [`RetryBudget::set`]. Each process is to be
    /// told.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn set(&self, percent: u32, min_per_second: u32) -> Result<(), ConfigError> {
        self.shared.rule.set(percent, min_per_second)
    }

    /// The percentage of requests.
    #[must_use]
    pub fn percent(&self) -> u32 {
        self.shared.rule.percent()
    }

    /// The minimum each second, of all processes together.
    #[must_use]
    pub fn min_per_second(&self) -> u32 {
        self.shared.rule.min_per_second()
    }

    /// How many retries this process has in its pocket, rounded down.
    #[must_use]
    pub fn pocket(&self) -> u64 {
        self.shared.pocket.balance() / RETRY
    }

    /// How many processes share it, as was told last; 0 before the first time.
    #[must_use]
    pub fn processes(&self) -> u64 {
        self.shared.processes.load(Relaxed)
    }

    /// Whether Redis has answered lately; if not, it is as
    /// [`OnStoreError`] says.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.shared.alone.load(Relaxed) == TOGETHER
    }
}

impl Budget for FleetBudget {
    #[inline]
    fn request(&self) {
        let shared = &*self.shared;
        shared.pocket.request(shared.rule.rates().deposit());
    }

    fn withdraw(&self) -> bool {
        let shared = &self.shared;
        shared.attend();
        match shared.alone.load(Relaxed) {
            TOGETHER => shared.pocket.withdraw(),
            ALLOW => true,
            DENY => false,
            POCKET => shared.pocket.withdraw(),
            interval => shared.arrives(interval) || shared.pocket.withdraw(),
        }
    }
}

impl Shared {
    /// Sees to it that somebody looks after the pool.
    #[inline]
    fn attend(self: &Arc<Self>) {
        if !self.attended.load(Acquire) {
            self.begin();
        }
    }

    #[cold]
    fn begin(self: &Arc<Self>) {
        match runtime::Handle::try_current() {
            Ok(runtime) if !self.attended.swap(true, AcqRel) => {
                let post = Post(Arc::downgrade(self));
                runtime.spawn(post.keep());
            }
            Ok(_) => {}
            Err(_) => {
                self.be_alone();
            }
        }
    }

    /// A retry out of this process's own minimum.
    fn arrives(&self, interval: u64) -> bool {
        let now = clock::now().as_nanos();
        let burst = self.burst.load(Relaxed);
        let latest = now.saturating_add(interval.saturating_mul(burst));
        let next = |arrival: u64| {
            let arrival = arrival.max(now).saturating_add(interval);
            (arrival <= latest).then_some(arrival)
        };
        self.arrival.fetch_update(Relaxed, Relaxed, next).is_ok()
    }

    /// Whether it was not alone before.
    fn be_alone(&self) -> bool {
        let on_store_error = *self.on_store_error.lock();
        let parts = match on_store_error {
            OnStoreError::Share => self.processes.load(Relaxed).max(1),
            _ => 1,
        };
        let per_second = u64::from(self.rule.min_per_second());
        let alone = match on_store_error {
            OnStoreError::Allow => ALLOW,
            OnStoreError::Deny => DENY,
            _ if per_second == 0 => POCKET,
            _ => (SECOND.saturating_mul(parts)).div_ceil(per_second),
        };
        self.burst.store((per_second / parts).max(1), Relaxed);
        self.pocket.save(self.rule.saved, parts);
        self.alone.swap(alone, Relaxed) == TOGETHER
    }

    /// Looks at the pool, once.
    async fn look(&self, ledger: &mut Ledger, failures: &mut u32) {
        let Report { offered, wanted } = self.pocket.report(ledger, self.rule.rates());
        let call = self
            .script
            .on(&self.keys)
            .arg(&self.id)
            .arg(offered)
            .arg(wanted)
            .arg(self.rule.min_per_second())
            .arg(bound(self.rule.saved))
            .arg(self.looks.fetch_add(1, Relaxed));
        let answer = self.redis.call::<(u64, bool, u64)>("retry_budget", &call);
        match answer.await {
            Ok((granted, full, processes)) => {
                let answer = Answer {
                    granted: granted.min(wanted),
                    full,
                    processes,
                };
                self.pocket.receive(ledger, answer, self.rule.saved);
                self.processes.store(processes, Relaxed);
                *failures = 0;
                if self.alone.swap(TOGETHER, Relaxed) != TOGETHER {
                    tracing::info!(name = &*self.name, "the retry budget is shared");
                }
            }
            Err(error) => {
                if !error.may_be_done() {
                    self.pocket.put(offered);
                }
                *failures = failures.saturating_add(1);
                if (*failures >= FAILURES || !self.redis.is_up()) && self.be_alone() {
                    let name = &*self.name;
                    tracing::warn!(name, %error, "the retry budget is not shared");
                }
            }
        }
    }
}

/// The task's place: given up when it ends, whatever ends it.
struct Post(Weak<Shared>);

impl Drop for Post {
    fn drop(&mut self) {
        if let Some(shared) = self.0.upgrade() {
            shared.be_alone();
            shared.attended.store(false, Release);
        }
    }
}

impl Post {
    async fn keep(self) {
        let Some(mut ledger) = self.0.upgrade().map(|shared| shared.pocket.ledger()) else {
            return;
        };
        let mut failures = 0;
        // Holds the budget only while it looks, so that it ends with it.
        while let Some(shared) = self.0.upgrade() {
            shared.look(&mut ledger, &mut failures).await;
            let pause = INTERVAL * 3 / 4 + shared.random.up_to(INTERVAL / 2);
            drop(shared);
            sleep(pause).await;
        }
    }
}

impl fmt::Debug for FleetBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FleetBudget")
            .field("name", &self.shared.name)
            .field("percent", &self.percent())
            .field("min_per_second", &self.min_per_second())
            .field("shared", &self.is_shared())
            .field("processes", &self.processes())
            .field("pocket", &self.pocket())
            .finish_non_exhaustive()
    }
}
