//! Where a cluster's redirections lead.
//!
//! The client library follows them too, but only as one of the failures after
//! which it sends again, and among those are lost connections and searches for
//! other nodes, when the command may have been done. So it sends once, and what
//! was surely not done is sent again from here: `MOVED`, `ASK` and `TRYAGAIN`
//! come before a command or a script begins. The node that they name may be one
//! that the library does not know (yet), or is connecting to: these connections
//! are our own, and few are ever made.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Weak},
    time::Duration,
};

use buttress_core::sync::Mutex;
use redis::{
    Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind, Value,
    cluster_async::ClusterConnection,
};
use tokio::{
    sync::OnceCell,
    time::{sleep, timeout},
};

use crate::{
    dial::Server,
    link::{Single, single},
};

/// How often one command is redirected at most.
const HOPS: u32 = 6;

/// Before it is sent for the third time; twice as long before each other.
const PAUSE: Duration = Duration::from_millis(2);

/// Connections to the nodes that redirections have named.
pub(crate) struct Detours {
    /// With whose settings they are made.
    like: Server,
    /// How long making one takes at most.
    limit: Duration,
    nodes: Mutex<HashMap<String, Way>>,
}

/// Made by the first that needs it.
type Way = Arc<OnceCell<Single>>;

impl Detours {
    pub(crate) fn new(like: Server, limit: Duration) -> Self {
        Self {
            like,
            limit,
            nodes: Mutex::default(),
        }
    }

    /// Sends the command on as long as it is redirected.
    pub(crate) async fn follow(
        self: &Arc<Self>,
        cmd: &Cmd,
        known: &mut ClusterConnection,
        mut answer: RedisResult<Value>,
    ) -> RedisResult<Value> {
        for hop in 0..HOPS {
            let Err(error) = &answer else { break };
            let Some(turn) = Turn::of(error) else { break };
            // Two that name each other, or keys on their way.
            if hop > 0 {
                sleep(PAUSE * 2_u32.pow(hop - 1)).await;
            }
            answer = match turn {
                Turn::Back => cmd.query_async(known).await,
                Turn::Node { address, asking } => self.ask(&address, asking, cmd).await,
            };
        }
        answer
    }

    async fn ask(self: &Arc<Self>, address: &str, asking: bool, cmd: &Cmd) -> RedisResult<Value> {
        let way = Arc::clone(self.nodes.lock().entry(address.to_owned()).or_default());
        // One that does not answer is not asked again, nor is one that is lost.
        let mut trust = Trust {
            detours: self,
            address,
            way: &way,
            is_kept: false,
        };
        let mut node = match way.get() {
            Some(node) => node.clone(),
            None => self.dial(address, &way).await?,
        };
        let answer = if asking {
            node.query_asking(cmd).await
        } else {
            node.query(cmd).await
        };
        trust.is_kept = match &answer {
            Ok(_) => true,
            Err(error) => matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension),
        };
        answer
    }

    /// Goes on when the one that began it has no more time.
    async fn dial(self: &Arc<Self>, address: &str, way: &Way) -> RedisResult<Single> {
        let server = self.like.at(address).ok_or_else(|| {
            let what = "a redirection names no address";
            RedisError::from(io::Error::new(io::ErrorKind::InvalidData, what))
        })?;
        let (detours, limit) = (Arc::downgrade(self), self.limit);
        let (address, way) = (address.to_owned(), Arc::clone(way));
        let made = tokio::spawn(async move {
            let weak = Arc::downgrade(&way);
            let ended = move || forget(&detours, &address, &weak);
            let dial = async || match timeout(limit, single(&server, ended)).await {
                Ok(made) => made,
                Err(late) => Err(io::Error::from(late).into()),
            };
            way.get_or_try_init(dial).await.cloned()
        });
        made.await.map_err(io::Error::other)?
    }
}

fn forget(detours: &Weak<Detours>, address: &str, way: &Weak<OnceCell<Single>>) {
    if let (Some(detours), Some(way)) = (detours.upgrade(), way.upgrade()) {
        detours.forget(address, &way);
    }
}

impl Detours {
    fn forget(&self, address: &str, way: &Way) {
        let mut nodes = self.nodes.lock();
        if nodes.get(address).is_some_and(|it| Arc::ptr_eq(it, way)) {
            let gone = nodes.remove(address);
            drop(nodes);
            drop(gone);
        }
    }
}

/// Until it is kept, a connection is given up by who drops this.
struct Trust<'a> {
    detours: &'a Detours,
    address: &'a str,
    way: &'a Way,
    is_kept: bool,
}

impl Drop for Trust<'_> {
    fn drop(&mut self) {
        // Being made is not yet being silent.
        if !self.is_kept && self.way.initialized() {
            self.detours.forget(self.address, self.way);
        }
    }
}

/// Whom to ask instead.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Node {
        address: String,
        asking: bool,
    },
    /// The ones that are known, once more.
    Back,
}

impl Turn {
    fn of(error: &RedisError) -> Option<Self> {
        let asking = match error.kind() {
            ErrorKind::Server(ServerErrorKind::Moved) => false,
            ErrorKind::Server(ServerErrorKind::Ask) => true,
            ErrorKind::Server(ServerErrorKind::TryAgain) => return Some(Self::Back),
            _ => return None,
        };
        let (address, _) = error.redirect_node()?;
        // Without a host it is the one that was asked, and only the library
        // knows which: it has learned by now whose the slot is.
        if address.starts_with([':', '?']) {
            return Some(Self::Back);
        }
        Some(Self::Node {
            address: address.to_owned(),
            asking,
        })
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;

    fn turn(answer: &str) -> Option<Turn> {
        let value = redis::parse_redis_value(answer.as_bytes()).unwrap();
        Turn::of(&value.extract_error().unwrap_err())
    }

    #[test]
    fn redirections_and_nothing_else_are_followed() {
        let node = |address: &str, asking| {
            let address = address.to_owned();
            Some(Turn::Node { address, asking })
        };
        assert_eq!(turn("-MOVED 1 h:6379\r\n"), node("h:6379", false));
        assert_eq!(turn("-ASK 1 [::1]:6379\r\n"), node("[::1]:6379", true));
        assert_eq!(turn("-MOVED 1 :6379\r\n"), Some(Turn::Back));
        assert_eq!(turn("-MOVED 1 ?:6379\r\n"), Some(Turn::Back));
        assert_eq!(turn("-TRYAGAIN later\r\n"), Some(Turn::Back));
        for other in ["-MOVED\r\n", "-CLUSTERDOWN x\r\n", "-READONLY x\r\n"] {
            assert_eq!(turn(other), None, "{other}");
        }
        let lost = io::Error::from(io::ErrorKind::BrokenPipe).into();
        assert_eq!(Turn::of(&lost), None);
    }
}
