//! A gate for the server, or one for each node of a cluster, so that a node
//! that is gone takes nothing with it but its slots.

use buttress_core::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicU8, Ordering},
};
use redis::{Cmd, FromRedisValue, Value};

use crate::{Slot, dial::host_and_port, gate::Gate};

/// More masters than these share gates.
const MOST: usize = 64;

/// How many keys are tried to find one of a node's.
const TRIES: usize = 100_000;

/// The gates.
pub(crate) struct Gates {
    gates: Box<[Gate]>,
    cluster: Option<Cluster>,
}

struct Cluster {
    /// The gate of each slot.
    owners: Box<[AtomicU8]>,
    /// The master behind each gate.
    names: Mutex<Vec<Option<String>>>,
    /// To whom the connection is lost, as far as it was noticed.
    lost: Box<[AtomicBool]>,
    any_lost: AtomicBool,
}

impl Gates {
    /// The one gate of one server.
    pub(crate) fn single() -> Self {
        Self {
            gates: [Gate::default()].into(),
            cluster: None,
        }
    }

    /// Those of a cluster. Until its slots are known it has one.
    pub(crate) fn cluster() -> Self {
        Self {
            gates: (0..MOST).map(|_| Gate::default()).collect(),
            cluster: Some(Cluster {
                owners: (0..Slot::COUNT).map(|_| AtomicU8::new(0)).collect(),
                names: Mutex::new(vec![Some(String::new())]),
                lost: (0..MOST).map(|_| AtomicBool::new(false)).collect(),
                any_lost: AtomicBool::new(false),
            }),
        }
    }

    pub(crate) fn is_cluster(&self) -> bool {
        self.cluster.is_some()
    }

    /// Which gate a command has to pass.
    #[inline]
    pub(crate) fn of(&self, cmd: &Cmd) -> &Gate {
        match &self.cluster {
            None => &self.gates[0],
            Some(cluster) => &self.gates[cluster.owner(key(cmd))],
        }
    }

    /// Those that somebody stands behind.
    pub(crate) fn used(&self) -> impl Iterator<Item = (usize, &Gate)> {
        let used: Vec<bool> = match &self.cluster {
            None => vec![true],
            Some(cluster) => cluster.names.lock().iter().map(Option::is_some).collect(),
        };
        (self.gates.iter().enumerate())
            .zip(used)
            .filter_map(|(gate, used)| used.then_some(gate))
    }

    /// Whether anything is tried at all.
    pub(crate) fn any_open(&self) -> bool {
        match &self.cluster {
            None => self.gates[0].is_open(),
            Some(_) => self.used().any(|(_, gate)| gate.is_open()),
        }
    }

    /// Those that may be probed.
    pub(crate) fn awake(&self) -> impl Iterator<Item = (usize, &Gate)> {
        self.used().filter(|(_, gate)| !gate.rests())
    }

    /// Shuts all. Whether one was open. Those that rest are shut, and go on to.
    pub(crate) fn shut(&self) -> bool {
        self.awake()
            .fold(false, |was_open, (_, gate)| gate.shut() | was_open)
    }

    /// Opens all. Whether one was shut.
    pub(crate) fn open(&self) -> bool {
        self.used()
            .fold(false, |was_shut, (_, gate)| gate.open() | was_shut)
    }

    /// Whether a connection to a node of a cluster was lost of late.
    #[inline]
    pub(crate) fn any_lost(&self) -> bool {
        let cluster = self.cluster.as_ref();
        cluster.is_some_and(|it| it.any_lost.load(Ordering::Relaxed))
    }

    /// The connection for this command is lost.
    #[cold]
    pub(crate) fn lose(&self, cmd: &Cmd) {
        if let (Some(cluster), Some(key)) = (&self.cluster, sole_key(cmd)) {
            cluster.lost[cluster.owner(Some(key))].store(true, Ordering::Relaxed);
            cluster.any_lost.store(true, Ordering::Relaxed);
        }
    }

    /// Which node the command is for, where the connection to it is lost and
    /// it is known where it is.
    pub(crate) fn lost(&self, cmd: &Cmd) -> Option<String> {
        let cluster = self.cluster.as_ref()?;
        let owner = cluster.owner(Some(sole_key(cmd)?));
        let is_lost = cluster.lost[owner].load(Ordering::Relaxed);
        let name: String = is_lost.then(|| self.master(owner))??;
        host_and_port(&name).is_some().then_some(name)
    }

    /// The connections to all of them are there.
    pub(crate) fn all_found(&self) {
        if let Some(cluster) = &self.cluster {
            cluster.any_lost.store(false, Ordering::Relaxed);
            for lost in &cluster.lost {
                lost.store(false, Ordering::Relaxed);
            }
        }
    }

    /// The address of the node behind this gate.
    pub(crate) fn master(&self, gate: usize) -> Option<String> {
        let names = self.cluster.as_ref()?.names.lock();
        names.get(gate).cloned()?
    }

    /// The addresses of a cluster's masters, as far as they are known.
    pub(crate) fn masters(&self) -> Vec<String> {
        let cluster = self.cluster.as_ref();
        cluster.map_or_else(Vec::new, |cluster| {
            cluster.names.lock().iter().flatten().cloned().collect()
        })
    }

    /// A key with this beginning that is behind this gate.
    pub(crate) fn key_behind(&self, gate: usize, beginning: &str) -> Option<String> {
        match &self.cluster {
            None => Some(beginning.to_owned()),
            Some(cluster) => (0..TRIES)
                .map(|n| format!("{beginning}:{n}"))
                .find(|key| cluster.owner(Some(key.as_bytes())) == gate),
        }
    }

    /// Takes in what `CLUSTER SLOTS` says. Whether that made sense.
    pub(crate) fn learn(&self, slots: &Value) -> bool {
        let (Some(cluster), Value::Array(ranges)) = (&self.cluster, slots) else {
            return false;
        };
        let ranges: Option<Vec<Range>> = ranges.iter().map(Range::read).collect();
        let Some(ranges) = ranges.filter(|ranges| !ranges.is_empty()) else {
            return false;
        };
        let mut names = cluster.names.lock();
        for (index, name) in names.iter_mut().enumerate() {
            // Who comes in its place finds it open.
            if name
                .take_if(|name| ranges.iter().all(|range| range.master != *name))
                .is_some()
            {
                self.gates[index].open();
            }
        }
        for range in ranges {
            let known = |name: &Option<String>| name.as_deref() == Some(&range.master);
            let index = names.iter().position(known).unwrap_or_else(|| {
                let free = names.iter().position(Option::is_none);
                let index = free.unwrap_or_else(|| {
                    if names.len() < MOST {
                        names.push(None);
                    }
                    names.len() - 1
                });
                names[index] = Some(range.master);
                index
            });
            let owner = u8::try_from(index).expect("there are few gates");
            for slot in &cluster.owners[range.slots] {
                slot.store(owner, Ordering::Relaxed);
            }
        }
        true
    }
}

impl Cluster {
    fn owner(&self, key: Option<&[u8]>) -> usize {
        let slot = key.map_or(0, |key| Slot::of(key).number());
        self.owners[usize::from(slot)]
            .load(Ordering::Relaxed)
            .into()
    }
}

/// Slots and their master.
struct Range {
    slots: std::ops::RangeInclusive<usize>,
    master: String,
}

impl Range {
    fn read(value: &Value) -> Option<Self> {
        let Value::Array(fields) = value else {
            return None;
        };
        let [first, last, master, ..] = &fields[..] else {
            return None;
        };
        let slot = |value: &Value| {
            let slot = u16::from_redis_value_ref(value).ok()?;
            (slot < Slot::COUNT).then_some(usize::from(slot))
        };
        let Value::Array(master) = master else {
            return None;
        };
        // Address and port: what it calls itself changes with a reset.
        let host = String::from_redis_value_ref(master.first()?).unwrap_or_default();
        let port = u16::from_redis_value_ref(master.get(1)?).ok()?;
        let slots = slot(first)?..=slot(last)?;
        (!slots.is_empty()).then(|| Self {
            slots,
            master: format!("{host}:{port}"),
        })
    }
}

/// The first key of a command: behind the text and the number of keys in those
/// that run scripts, and at once in all others that a layer sends.
fn key(cmd: &Cmd) -> Option<&[u8]> {
    let arg = |index| match cmd.args_iter().nth(index)? {
        redis::Arg::Simple(arg) => Some(arg),
        _ => None,
    };
    let name = arg(0)?;
    let runs_script = [&b"EVALSHA"[..], b"EVAL", b"FCALL"]
        .iter()
        .any(|it| name.eq_ignore_ascii_case(it));
    match runs_script {
        true => arg(3),
        false => arg(1),
    }
}

/// The same of one that goes to the node of that key and to no other, as far
/// as the client knows the command.
fn sole_key(cmd: &Cmd) -> Option<&[u8]> {
    /// What is asked of a node or of all, with words behind it that are no keys.
    const OF_NODES: [&[u8]; 16] = [
        b"ACL",
        b"CLIENT",
        b"CLUSTER",
        b"COMMAND",
        b"CONFIG",
        b"FLUSHALL",
        b"FLUSHDB",
        b"FUNCTION",
        b"INFO",
        b"KEYS",
        b"LATENCY",
        b"MEMORY",
        b"PING",
        b"PUBSUB",
        b"SCRIPT",
        b"WAIT",
    ];
    /// What the client takes apart where it is of several slots.
    const OF_KEYS: [&[u8]; 5] = [b"DEL", b"EXISTS", b"MGET", b"TOUCH", b"UNLINK"];
    let redis::Arg::Simple(name) = cmd.args_iter().next()? else {
        return None;
    };
    let is_of = |names: &[&[u8]]| names.iter().any(|it| name.eq_ignore_ascii_case(it));
    let first = key(cmd)?;
    let is_beside =
        |arg| matches!(arg, redis::Arg::Simple(key) if Slot::of(key) == Slot::of(first));
    let is_sole = !is_of(&OF_NODES)
        && !name.eq_ignore_ascii_case(b"MSET")
        && (!is_of(&OF_KEYS) || cmd.args_iter().skip(1).all(is_beside));
    is_sole.then_some(first)
}

#[cfg(all(test, not(buttress_loom)))]
mod tests;
