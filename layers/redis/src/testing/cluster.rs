//! Three servers that are one cluster.

use std::fmt::Write as _;

use tokio::time::sleep;

use super::{
    Server, Wire,
    server::{LOOK, PATIENCE, free_port, patient},
};
use crate::{Config, Key, Redis};

const SLOTS: u16 = 16_384;
const NODES: u16 = 3;

/// A Redis Cluster of one's own: three masters on free loopback ports, a third
/// of the slots each, no replicas. Dropping it kills them.
///
/// A node that is gone takes its slots with it and no others
/// (`cluster-require-full-coverage no`), and is missed after two seconds.
///
/// # Panics
///
/// Where `redis-server` is missing or older than 7.0, or something is not done
/// within ten seconds: a test that wants it must not pass without.
pub struct Cluster {
    nodes: Vec<Server>,
    /// What they call themselves.
    names: Vec<String>,
}

impl Cluster {
    /// A cluster with nothing in it.
    pub async fn start() -> Self {
        Self::with([] as [&str; 0]).await
    }

    /// The same with more arguments for each server.
    ///
    /// # Panics
    ///
    /// It does not come up.
    pub async fn with<A: Into<String>>(args: impl IntoIterator<Item = A>) -> Self {
        let args: Vec<String> = args.into_iter().map(Into::into).collect();
        let mut nodes = Vec::new();
        let mut buses = Vec::new();
        for _ in 0..NODES {
            // The usual one, 10000 above the port, may be too high or taken.
            let bus = free_port().to_string();
            let setup = Server::setup()
                .args(["--cluster-enabled", "yes", "--cluster-port", &bus])
                .args(["--cluster-node-timeout", "2000"])
                .args(["--cluster-require-full-coverage", "no"])
                .args(["--cluster-allow-replica-migration", "no"])
                .args(args.iter().cloned());
            nodes.push(setup.start().await);
            buses.push(bus);
        }
        let mut names = Vec::new();
        for (index, node) in (0..).zip(&nodes) {
            let first = (SLOTS / NODES * index).to_string();
            let last = if index == NODES - 1 {
                SLOTS - 1
            } else {
                SLOTS / NODES * (index + 1) - 1
            };
            node.cmd::<()>(&["CLUSTER", "ADDSLOTSRANGE", &first, &last.to_string()])
                .await;
            // No two of the same age: who is right is settled by it.
            let epoch = (index + 1).to_string();
            node.cmd::<()>(&["CLUSTER", "SET-CONFIG-EPOCH", &epoch])
                .await;
            names.push(node.cmd::<String>(&["CLUSTER", "MYID"]).await);
        }
        for (node, bus) in nodes.iter().zip(&buses).skip(1) {
            let port = node.port().to_string();
            nodes[0]
                .cmd::<()>(&["CLUSTER", "MEET", "127.0.0.1", &port, bus])
                .await;
        }
        let cluster = Self { nodes, names };
        cluster.settled().await;
        cluster
    }

    /// Waits until every node that answers knows every slot's owner and finds
    /// the cluster well.
    ///
    /// # Panics
    ///
    /// It does not come to that.
    pub async fn settled(&self) {
        for _ in 0..PATIENCE.as_millis() / LOOK.as_millis() {
            let mut agreed = true;
            for node in &self.nodes {
                let info: String = node.cmd(&["CLUSTER", "INFO"]).await;
                let says = |line: &str| info.lines().any(|it| it.trim_end() == line);
                agreed &= says("cluster_state:ok")
                    && says("cluster_known_nodes:3")
                    && says("cluster_slots_ok:16384");
            }
            if agreed {
                return;
            }
            sleep(LOOK).await;
        }
        panic!("the cluster does not come up");
    }

    /// The nodes, in the order of their slots at first.
    #[must_use]
    pub fn nodes(&self) -> &[Server] {
        &self.nodes
    }

    /// One of them, to be killed and restarted.
    ///
    /// # Panics
    ///
    /// There are only three.
    #[must_use]
    pub fn node_mut(&mut self, index: usize) -> &mut Server {
        &mut self.nodes[index]
    }

    /// The nodes' URLs.
    #[must_use]
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(Server::url).collect()
    }

    /// The URLs with commas between them, as in `REDIS_URL`.
    #[must_use]
    pub fn url(&self) -> String {
        self.urls().join(",")
    }

    /// A handle on it, with time limits that a busy machine keeps.
    #[must_use]
    pub fn redis(&self) -> Redis {
        patient(Config::cluster(self.urls()))
    }

    /// A wire in front of this node that from now on all take for the node: its
    /// port is what the nodes tell clients.
    ///
    /// # Panics
    ///
    /// They do not hear of it.
    pub async fn wire_to(&self, index: usize) -> Wire {
        let wire = Wire::to(&self.nodes[index]).await;
        let port = wire.port().to_string();
        let words = ["CONFIG", "SET", "cluster-announce-port", &port];
        self.nodes[index].cmd::<()>(&words).await;
        let told = format!(":{port}@");
        for _ in 0..PATIENCE.as_millis() / LOOK.as_millis() {
            let mut all = true;
            for node in &self.nodes {
                let nodes: String = node.cmd(&["CLUSTER", "NODES"]).await;
                all &= nodes.contains(&told);
            }
            if all {
                return wire;
            }
            sleep(LOOK).await;
        }
        panic!("the nodes do not hear of the wire");
    }

    /// All keys that are there, but for those that a connection is tried with.
    ///
    /// # Panics
    ///
    /// A node does not answer.
    pub async fn keys(&self) -> Vec<Key> {
        let mut keys = Vec::new();
        for node in &self.nodes {
            let there: Vec<String> = node.cmd(&["KEYS", "*"]).await;
            let is_ours = |key: &String| !key.contains(":probe");
            keys.extend(there.into_iter().filter(is_ours).map(Key::read));
        }
        keys
    }

    /// Moves the slots of all of these [`keys`](Self::keys), each to the node
    /// after the one that has it.
    ///
    /// # Panics
    ///
    /// They cannot be moved.
    pub async fn move_all(&self) {
        let mut moved = Vec::new();
        for key in self.keys().await {
            if !moved.contains(&key.slot()) {
                moved.push(key.slot());
                let to = (self.owner(&key).await + 1) % self.nodes.len();
                self.move_slot(&key, to).await;
            }
        }
    }

    /// Which node has the slot of this key, as the first one knows.
    ///
    /// # Panics
    ///
    /// It does not answer.
    pub async fn owner(&self, key: &Key) -> usize {
        let number = self.slot(key).await;
        let view = View::of(&self.nodes[0]).await;
        let owner = view.owner(number).expect("every slot has an owner");
        let owner = self.names.iter().position(|it| it == owner);
        owner.expect("it is one of ours")
    }

    /// Whether all have heard of it and of each other's last moves; `None` where
    /// one holds the slot for another's.
    async fn agrees(&self, slot: u16, to: usize) -> Option<bool> {
        let mut known: Option<View> = None;
        let mut all = true;
        for node in &self.nodes {
            let view = View::of(node).await;
            if view.owner(slot) != Some(&self.names[to]) {
                return None;
            }
            let epochs = view.epochs();
            let is_alone = |epoch: &&str| epochs.iter().filter(|(_, it)| it == epoch).count() == 1;
            all &= epochs.iter().map(|(_, epoch)| epoch).all(is_alone);
            all &= known.as_ref().is_none_or(|it| it.epochs() == epochs);
            known = Some(view);
        }
        Some(all)
    }

    async fn slot(&self, key: &Key) -> u16 {
        let words = ["CLUSTER", "KEYSLOT", key.as_str()];
        self.nodes[0].cmd(&words).await
    }

    /// Moves the slot of this key, with all that is in it, to another node:
    /// clients are redirected (MOVED) from then on.
    ///
    /// # Panics
    ///
    /// It cannot be moved.
    pub async fn move_slot(&self, key: &Key, to: usize) {
        self.begin_move(key, to).await;
        self.finish_move(key, to).await;
    }

    /// The first half of a move: the keys are there, the slot is still here, and
    /// clients are sent there for once (ASK).
    ///
    /// # Panics
    ///
    /// It cannot be moved.
    pub async fn begin_move(&self, key: &Key, to: usize) {
        let from = self.owner(key).await;
        let number = self.slot(key).await.to_string();
        let (source, target) = (&self.nodes[from], &self.nodes[to]);
        let set = ["CLUSTER", "SETSLOT", &number];
        let words = [&set[..], &["IMPORTING", &self.names[from]]].concat();
        target.cmd::<()>(&words).await;
        let words = [&set[..], &["MIGRATING", &self.names[to]]].concat();
        source.cmd::<()>(&words).await;
        let port = target.port().to_string();
        loop {
            let keys: Vec<String> = source
                .cmd(&["CLUSTER", "GETKEYSINSLOT", &number, "100"])
                .await;
            if keys.is_empty() {
                return;
            }
            let mut words = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
            words.extend(keys.iter().map(String::as_str));
            source.cmd::<String>(&words).await;
        }
    }

    /// The second half: the slot is there.
    ///
    /// # Panics
    ///
    /// The nodes do not agree to it.
    pub async fn finish_move(&self, key: &Key, to: usize) {
        let slot = self.slot(key).await;
        let number = slot.to_string();
        let words = ["CLUSTER", "SETSLOT", &number, "NODE", &self.names[to]];
        // Two moves at the same time may give two nodes one epoch; until they
        // have another, what they say of their slots can undo this.
        for _ in 0..1000 {
            // The new owner first, so that it is never nobody's.
            self.nodes[to].cmd::<()>(&words).await;
            for (index, node) in self.nodes.iter().enumerate() {
                if index != to {
                    node.cmd::<()>(&words).await;
                }
            }
            for _ in 0..20 {
                match self.agrees(slot, to).await {
                    Some(true) => return,
                    Some(false) => sleep(LOOK).await,
                    None => break,
                }
            }
        }
        panic!("the nodes do not agree on a move");
    }
}

/// What a node says of all, a line each.
struct View(String);

impl View {
    async fn of(node: &Server) -> Self {
        Self(node.cmd(&["CLUSTER", "NODES"]).await)
    }

    fn owner(&self, slot: u16) -> Option<&str> {
        let has = |line: &&str| {
            line.split(' ').skip(8).any(|range| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                match (first.parse::<u16>(), last.parse::<u16>()) {
                    (Ok(first), Ok(last)) => (first..=last).contains(&slot),
                    // One that moves, in brackets.
                    _ => false,
                }
            })
        };
        self.0.lines().find(has)?.split(' ').next()
    }

    /// How new what each says of its slots is.
    fn epochs(&self) -> Vec<(&str, &str)> {
        let mut epochs: Vec<_> = (self.0.lines())
            .filter_map(|line| Some((line.split(' ').next()?, line.split(' ').nth(6)?)))
            .collect();
        epochs.sort_unstable();
        epochs
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut ports = String::new();
        for node in &self.nodes {
            write!(ports, "{} ", node.port())?;
        }
        f.debug_struct("Cluster")
            .field("ports", &ports.trim_end())
            .finish_non_exhaustive()
    }
}
