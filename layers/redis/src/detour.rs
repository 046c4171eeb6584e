//! Where a cluster's redirections lead, and the way around lost connections.
//!
//! The client library follows redirections too, but only as one of the failures
//! after which it sends again, and among those are lost connections and searches
//! for other nodes, when the command may have been done. So it sends once, and
//! what was surely not done is sent again from here: `MOVED`, `ASK` and
//! `TRYAGAIN` come before a command or a script begins. The node that they name
//! may be one that the library does not know yet.
//!
//! Where the library has lost its connection to a node, it asks another one in
//! its place, is redirected, and then holds up everything until it has tried
//! that node again: it is spared that, and the node is asked from here, too.

use std::{collections::HashMap, io, pin::Pin, sync::Arc, time::Duration};

use buttress_core::sync::Mutex;
use futures_util::future::{FutureExt, Shared};
use redis::{
    Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind, Value,
    cluster_async::ClusterConnection,
};
use tokio::time::{sleep, timeout};

use crate::{
    dial::{Server, host_and_port},
    link::{Single, single},
    nodes::Gates,
};

/// How often one command is redirected at most. The time limit of operations
/// is shorter, mostly: nodes may need a while until they agree on a move.
const HOPS: u32 = 64;

/// Before it is sent for the third time; twice as long before each other, up to
/// 32 ms.
const PAUSE: Duration = Duration::from_millis(2);

/// Connections of our own to single nodes, made when there is need.
pub(crate) struct Detours {
    /// With whose settings they are made.
    like: Server,
    /// How long making one takes at most.
    limit: Duration,
    /// Knows the connections that are lost.
    gates: Arc<Gates>,
    ways: Mutex<Ways>,
}

#[derive(Default)]
struct Ways {
    made: u64,
    open: HashMap<String, Way>,
}

/// There, or being made: by one task for all that wait.
#[derive(Clone)]
struct Way {
    number: u64,
    node: Shared<Pin<Box<dyn Future<Output = RedisResult<Single>> + Send>>>,
}

impl Detours {
    pub(crate) fn new(like: Server, limit: Duration, gates: Arc<Gates>) -> Self {
        Self {
            like,
            limit,
            gates,
            ways: Mutex::default(),
        }
    }

    /// Sends a command in which the library has no part, or no luck: where the
    /// connection for it is lost, and as long as it is redirected.
    pub(crate) async fn send(
        self: &Arc<Self>,
        cmd: &Cmd,
        known: &mut ClusterConnection,
        answer: Option<RedisResult<Value>>,
    ) -> RedisResult<Value> {
        let mut answer = match (answer, self.gates.lost(cmd)) {
            (Some(answer), _) => answer,
            (None, Some(address)) => self.ask(&address, false, cmd).await,
            (None, None) => cmd.query_async(known).await,
        };
        for hop in 0..HOPS {
            let Err(error) = &answer else { break };
            let Some(turn) = Turn::of(error) else { break };
            // Two that name each other, or keys on their way.
            if hop > 0 {
                sleep(PAUSE * 2_u32.pow((hop - 1).min(4))).await;
            }
            answer = match turn {
                Turn::Back => cmd.query_async(known).await,
                Turn::Node { address, asking } => self.ask(&address, asking, cmd).await,
            };
        }
        answer
    }

    async fn ask(self: &Arc<Self>, address: &str, asking: bool, cmd: &Cmd) -> RedisResult<Value> {
        let way = self.way(address)?;
        let mut node = way.node.await?;
        // One that does not answer is not asked again, nor is one that is lost.
        let mut trust = Trust {
            detours: self,
            address,
            number: way.number,
            is_kept: false,
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

    /// The one that is there, or another; that is made whoever waits for it.
    fn way(self: &Arc<Self>, address: &str) -> RedisResult<Way> {
        let mut ways = self.ways.lock();
        if let Some(way) = ways.open.get(address) {
            return Ok(way.clone());
        }
        let server = self.like.at(address).ok_or_else(|| {
            let what = "a redirection names no address";
            RedisError::from(io::Error::new(io::ErrorKind::InvalidData, what))
        })?;
        ways.made += 1;
        let (number, limit) = (ways.made, self.limit);
        let forget = {
            let (detours, address) = (Arc::downgrade(self), address.to_owned());
            move || {
                if let Some(detours) = detours.upgrade() {
                    detours.forget(&address, number);
                }
            }
        };
        let made = tokio::spawn(async move {
            let made = match timeout(limit, single(&server, forget.clone())).await {
                Ok(made) => made,
                Err(late) => Err(io::Error::from(late).into()),
            };
            if made.is_err() {
                forget();
            }
            made
        });
        let forget_lost = Arc::downgrade(self);
        let lost_address = address.to_owned();
        let node = async move {
            made.await.unwrap_or_else(|lost| {
                // With the runtime that it was in.
                if let Some(detours) = forget_lost.upgrade() {
                    detours.forget(&lost_address, number);
                }
                Err(io::Error::other(lost).into())
            })
        };
        let way = Way {
            number,
            node: node.boxed().shared(),
        };
        ways.open.insert(address.to_owned(), way.clone());
        Ok(way)
    }

    fn forget(&self, address: &str, number: u64) {
        let mut ways = self.ways.lock();
        if ways.open.get(address).is_some_and(|it| it.number == number) {
            let gone = ways.open.remove(address);
            drop(ways);
            drop(gone);
        }
    }
}

/// Until it is kept, a connection is given up by who drops this.
struct Trust<'a> {
    detours: &'a Detours,
    address: &'a str,
    number: u64,
    is_kept: bool,
}

impl Drop for Trust<'_> {
    fn drop(&mut self) {
        if !self.is_kept {
            self.detours.forget(self.address, self.number);
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
        if host_and_port(address).is_none() {
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
        // As the servers write it.
        assert_eq!(turn("-ASK 1 ::1:6379\r\n"), node("::1:6379", true));
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
