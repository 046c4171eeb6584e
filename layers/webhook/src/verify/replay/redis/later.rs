//! The scripts, and what could not be told at once.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
    time::Duration,
};

use buttress_core::{
    clock::{self, Instant},
    sync::Mutex,
};
use buttress_redis::{Call, Error, Key, Keyspace, Redis, Script};
use tokio::{runtime, time::sleep};

use super::super::ClaimToken;

/// What the script of a claim answers.
pub(super) const NEW: u8 = 1;
pub(super) const IN_PROGRESS: u8 = 2;
pub(super) const COMPLETED: u8 = 3;

/// How many wait to be told.
const MOST: usize = 10_000;
/// Between two looks whether the server is back.
const LOOK: Duration = Duration::from_millis(100);

/// The token, the lease, and how long what is done is kept. A full server
/// refuses the write, and still tells what it knows. A TTL that somebody took
/// away is set again: else the message would never be free. A cluster may be
/// asked a second time when the first answer was cut off: it is the same claim.
const CLAIM: &str = "\
local set = redis.pcall('SET', KEYS[1], 'p' .. ARGV[1], 'NX', 'PX', ARGV[2])
if type(set) == 'table' and set.ok then return 1 end
local held = redis.pcall('GET', KEYS[1])
local done = held == 'c'
if held == 'p' .. ARGV[1] then return 1 end
if not done and not (type(held) == 'string' and #held == 17 and string.sub(held, 1, 1) == 'p') then
  if type(set) == 'table' and set.err then return set end
  return redis.error_reply('FOREIGN value under the key of a webhook')
end
if redis.call('PTTL', KEYS[1]) < 0 then
  redis.call('PEXPIRE', KEYS[1], done and ARGV[3] or ARGV[2])
end
return done and 3 or 2
";

/// The token, or nothing for whoever has it; and for how long. Also where
/// nobody has it any more: it is done.
const COMPLETE: &str = "\
local held = redis.pcall('GET', KEYS[1])
if held ~= false then
  local ours = type(held) == 'string'
    and (held == 'c' or (#held == 17 and string.sub(held, 1, 1) == 'p'))
  if not ours then return redis.error_reply('FOREIGN value under the key of a webhook') end
  if ARGV[1] ~= '' and held ~= 'p' .. ARGV[1] then return 0 end
end
redis.call('SET', KEYS[1], 'c', 'PX', ARGV[2])
return 1
";

/// The token.
const RELEASE: &str = "\
if redis.pcall('GET', KEYS[1]) ~= 'p' .. ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
";

/// How a message ends, as the server is to know.
#[derive(Clone, Copy)]
pub(super) enum Work {
    /// It is done, and remembered until then; where there is no token, whoever
    /// has it.
    Complete {
        token: Option<ClaimToken>,
        until: Instant,
    },
    /// It may come again, which it may by itself from then on.
    Release { token: ClaimToken, until: Instant },
}

/// Tells the server of messages.
pub(super) struct Desk {
    pub(super) redis: Redis,
    keys: Keyspace,
    claim: Script,
    complete: Script,
    release: Script,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    works: VecDeque<(Key, Work)>,
    /// Whether a task is there for them.
    attended: bool,
}

impl Desk {
    pub(super) fn new(redis: Redis) -> Self {
        Self {
            keys: redis.keyspace("webhook"),
            redis,
            claim: Script::new(CLAIM),
            complete: Script::new(COMPLETE),
            release: Script::new(RELEASE),
            waiting: Mutex::default(),
        }
    }

    pub(super) fn key(&self, digest: String) -> Key {
        self.keys.tag([digest])
    }

    pub(super) fn claim(
        &self,
        key: &Key,
        token: ClaimToken,
        lease: Duration,
        keep: Duration,
    ) -> Call {
        let token = token.get().to_be_bytes();
        let call = self.claim.on([key]).arg(&token[..]);
        call.arg(millis(lease)).arg(millis(keep))
    }

    /// Nothing where it would come too late.
    pub(super) async fn settle(&self, key: &Key, work: &Work) -> Result<(), Error> {
        match *work {
            Work::Complete { token, until } => {
                let keep = until - clock::now();
                if keep.is_zero() {
                    return Ok(());
                }
                let token = token.map(|token| token.get().to_be_bytes());
                let token = token.as_ref().map_or(&[][..], |token| &token[..]);
                let call = self.complete.on([key]).arg(token).arg(millis(keep));
                self.redis.call("webhook_complete", &call).await
            }
            Work::Release { token, until } => {
                if clock::now() >= until {
                    return Ok(());
                }
                let call = self.release.on([key]).arg(&token.get().to_be_bytes()[..]);
                self.redis.call("webhook_release", &call).await
            }
        }
    }

    /// Tells it when the server is back, unless too many wait already.
    pub(super) fn later(self: &Arc<Self>, key: Key, work: Work) {
        let mut waiting = self.waiting.lock();
        if waiting.works.len() >= MOST {
            return;
        }
        waiting.works.push_back((key, work));
        if waiting.attended {
            return;
        }
        // Without a runtime nobody could have asked.
        if let Ok(runtime) = runtime::Handle::try_current() {
            waiting.attended = true;
            // Unlocked: a runtime that is ending drops the clerk at once, and
            // that locks.
            drop(waiting);
            let clerk = Clerk(Arc::downgrade(self));
            runtime.spawn(clerk.attend());
        }
    }
}

/// The task that tells what waits; whatever ends it, the next that is to wait
/// starts another.
struct Clerk(Weak<Desk>);

impl Drop for Clerk {
    fn drop(&mut self) {
        if let Some(desk) = self.0.upgrade() {
            desk.waiting.lock().attended = false;
        }
    }
}

impl Clerk {
    async fn attend(mut self) {
        // Ends with the store, too: only while it tells one does it hold it.
        while let Some(desk) = self.0.upgrade() {
            let next = {
                let mut waiting = desk.waiting.lock();
                let next = waiting.works.front().cloned();
                // Under the lock: who comes next sees that nobody is there.
                waiting.attended = next.is_some();
                next
            };
            let Some((key, work)) = next else {
                // Somebody else may have the place by now.
                self.0 = Weak::new();
                return;
            };
            let told = desk.redis.is_up() && {
                let told = desk.settle(&key, &work).await;
                // What is refused now would be refused for good.
                !told.is_err_and(|error| error.kind().is_outage())
            };
            if told {
                desk.waiting.lock().works.pop_front();
                continue;
            }
            drop(desk);
            sleep(LOOK).await;
        }
    }
}

/// Rounded up: nothing is forgotten early.
fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use buttress_redis::testing::Server;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn release(token: u128) -> Work {
        Work::Release {
            token: ClaimToken::new(token),
            until: clock::now() + MINUTE,
        }
    }

    /// It locked a lock that it held: the thread never came back.
    #[test]
    fn what_waits_when_its_runtime_ends_is_told_by_the_next() {
        let (send, over) = mpsc::channel();
        std::thread::spawn(move || {
            let runtime = || {
                runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap()
            };
            let home = runtime();
            let server = home.block_on(Server::start());
            let desk = Arc::new(Desk::new(server.redis()));
            let other = runtime();
            let ended = other.handle().clone();
            drop(other);
            {
                let _ended = ended.enter();
                desk.later(desk.key("one".into()), release(1));
            }
            home.block_on(async {
                desk.later(desk.key("two".into()), release(2));
                while !desk.waiting.lock().works.is_empty() {
                    sleep(Duration::from_millis(5)).await;
                }
            });
            send.send(()).unwrap();
        });
        over.recv_timeout(Duration::from_secs(20)).unwrap();
    }

    /// It was told that somebody else is at it, and nobody was.
    #[tokio::test]
    async fn a_claim_that_is_asked_for_twice_is_one_claim() {
        let server = Server::start().await;
        let desk = Desk::new(server.redis());
        let key = desk.key("one".into());
        let claim = async |token| {
            let call = desk.claim(&key, ClaimToken::new(token), MINUTE, MINUTE);
            desk.redis.call::<u8>("webhook_claim", &call).await.unwrap()
        };
        assert_eq!(claim(1).await, NEW);
        assert_eq!(claim(1).await, NEW);
        assert_eq!(claim(2).await, IN_PROGRESS);
    }
}
