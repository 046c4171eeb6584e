//! The scripts, and what goes in and comes out.
//!
//! They read, cut, add, compare and write. What a client is told, and whether
//! a check has passed, is worked out here, from what they found, by the same
//! code that rules in memory.

use buttress_redis::{Call, Key, Script, Value};

use super::pack::{Pack, unpack};
use crate::{
    Gcra,
    gcra::{Span, Tat},
};

/// Where the time comes from: the server.
macro_rules! by_server {
    ($($part:literal),+) => {
        concat!(
            "local time = redis.call('TIME')\n",
            "local now = time[1] * 1000000 + time[2]\n",
            $(include_str!($part)),+
        )
    };
}

/// Or the last argument, in microseconds: for tests that have to know what
/// time it is.
#[cfg(test)]
macro_rules! by_caller {
    ($($part:literal),+) => {
        concat!(
            "local now = table.remove(ARGV) + 0\n",
            // By the server's clock, a key is to stay as long as the test.
            "local server, redis = redis, { pcall = redis.pcall }\n",
            "function redis.call(command, ...)\n",
            "  if command ~= 'PSETEX' then return server.call(command, ...) end\n",
            "  local key, _, value = ...\n",
            "  return server.call(command, key, 600000, value)\n",
            "end\n",
            $(include_str!($part)),+
        )
    };
}

#[derive(Debug)]
pub(crate) struct Scripts {
    check: Script,
    checks: Script,
    refund: Script,
    owed: Script,
    /// What time it is, where the server is not asked.
    #[cfg(test)]
    pub(crate) clock: Option<std::sync::atomic::AtomicU64>,
}

impl Default for Scripts {
    fn default() -> Self {
        Self {
            check: Script::new(by_server!("single.lua", "common.lua", "check.lua")),
            checks: Script::new(by_server!("common.lua", "checks.lua")),
            refund: Script::new(by_server!("common.lua", "refund.lua")),
            owed: Script::new(by_server!("common.lua", "owed.lua")),
            #[cfg(test)]
            clock: None,
        }
    }
}

/// So many checks of one cost under one quota, on each of these keys.
pub(crate) struct Alike<'a> {
    pub(crate) keys: Vec<&'a Key>,
    pub(crate) counts: Vec<u32>,
    pub(crate) gcra: Gcra,
    pub(crate) cost: u32,
}

/// Checks of any kind, one after the other.
pub(crate) struct Mixed<'a> {
    pub(crate) keys: Vec<(&'a Key, Gcra)>,
    /// For each check the index and the cost of each of its keys.
    pub(crate) checks: Vec<Vec<(usize, u32)>>,
}

/// What was let through in this process alone.
pub(crate) struct Owing<'a> {
    pub(crate) key: &'a Key,
    /// How far ahead the key was known to be, when the first was let through,
    /// or how long ago that was: in microseconds from now.
    pub(crate) first: i64,
    pub(crate) gcra: Gcra,
    pub(crate) cost: u32,
}

impl Scripts {
    #[cfg(test)]
    pub(crate) fn by_caller(now: u64) -> Self {
        Self {
            check: Script::new(by_caller!("single.lua", "common.lua", "check.lua")),
            checks: Script::new(by_caller!("common.lua", "checks.lua")),
            refund: Script::new(by_caller!("common.lua", "refund.lua")),
            owed: Script::new(by_caller!("common.lua", "owed.lua")),
            clock: Some(now.into()),
        }
    }

    pub(crate) fn check(&self, alike: &Alike<'_>) -> Call {
        let Alike {
            keys,
            counts,
            gcra,
            cost,
        } = alike;
        let mut call = self.check.on(keys.iter().copied());
        let (charge, tolerance) = (gcra.charge(*cost), gcra.most());
        call.push(charge.micros);
        call.push(tolerance.micros);
        let once = *cost > 0 && counts.iter().all(|&count| count == 1);
        if !once || charge.rest != 0 || tolerance.rest != 0 || gcra.parts() != 1 {
            call.push(charge.rest);
            call.push(tolerance.rest);
            call.push(gcra.parts());
        }
        if !once {
            for count in counts {
                // What costs nothing changes nothing.
                call.push(if *cost > 0 { *count } else { 0 });
            }
        }
        self.finish(call)
    }

    pub(crate) fn checks(&self, mixed: &Mixed<'_>) -> Call {
        let mut pack = Pack::default();
        for (_, gcra) in &mixed.keys {
            let tolerance = gcra.most();
            pack.push(tolerance.micros);
            pack.push(tolerance.rest);
            pack.push(gcra.parts().into());
        }
        for check in &mixed.checks {
            pack.push(check.len() as u64);
            for &(index, cost) in check {
                let charge = mixed.keys[index].1.charge(cost);
                pack.push(index as u64 + 1);
                pack.push(charge.micros);
                pack.push(charge.rest);
            }
        }
        let keys: Vec<&Key> = mixed.keys.iter().map(|(key, _)| *key).collect();
        let mut call = self.checks.on(keys);
        call.push(pack.finish());
        self.finish(call)
    }

    pub(crate) fn refund(&self, charges: &[(&Key, Gcra, u32)]) -> Call {
        let keys: Vec<&Key> = charges.iter().map(|(key, ..)| *key).collect();
        let mut call = self.refund.on(keys);
        for (_, gcra, cost) in charges {
            let charge = gcra.charge(*cost);
            call.push(charge.micros);
            call.push(charge.rest);
            call.push(gcra.parts());
        }
        self.finish(call)
    }

    pub(crate) fn owed(&self, owing: &[Owing<'_>]) -> Call {
        let keys: Vec<&Key> = owing.iter().map(|owing| owing.key).collect();
        let mut call = self.owed.on(keys);
        for Owing {
            first, gcra, cost, ..
        } in owing
        {
            call.push(*first);
            call.push(gcra.charge(*cost).micros);
            call.push(gcra.most().micros);
        }
        self.finish(call)
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "tests have a clock of their own")]
    fn finish(&self, call: Call) -> Call {
        call
    }

    #[cfg(test)]
    fn finish(&self, mut call: Call) -> Call {
        if let Some(clock) = &self.clock {
            call.push(clock.load(std::sync::atomic::Ordering::SeqCst));
        }
        call
    }
}

/// What a script says of `gcras`' keys: when each is whole again, on a clock on
/// which it was asked at `now`. `None` where that makes no sense.
pub(crate) fn answer(
    value: &Value,
    mut gcras: impl ExactSizeIterator<Item = Gcra>,
    now: u64,
) -> Option<Vec<Tat>> {
    let count = gcras.len();
    let (mut micros, mut rests) = match value {
        Value::Int(micros) if count == 1 => {
            let micros = u64::try_from(*micros).ok()?;
            return Some(vec![ahead(gcras.next()?, now, micros, 0)]);
        }
        Value::BulkString(bytes) => {
            let numbers = unpack(bytes)?;
            (numbers.clone(), numbers)
        }
        _ => return None,
    };
    let has_rests = match micros.len() {
        len if len == count => false,
        len if len == 2 * count => true,
        _ => return None,
    };
    if has_rests {
        for _ in 0..count {
            rests.next()?;
        }
    }
    gcras
        .map(|gcra| {
            let rest = if has_rests { rests.next()? } else { 0 };
            Some(ahead(gcra, now, micros.next()?, rest))
        })
        .collect()
}

fn ahead(gcra: Gcra, now: u64, micros: u64, rest: u64) -> Tat {
    gcra.ahead(now, Span { micros, rest })
}
