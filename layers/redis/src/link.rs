//! A connection to the server or to the cluster.

use std::{sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Cmd, Pipeline, RedisResult, Value,
    aio::{ConnectionLike, MultiplexedConnection, PubSub},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
};
use tokio::{task::AbortHandle, time::timeout};

use crate::{ConfigError, config::Servers, detour::Detours, dial::Server, nodes::Gates};

/// How many commands may stand in line for the socket. Those that find no
/// place wait, within their own time limit.
const LINE: usize = 1024;

/// One connection that all share. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Link {
    connection: Connection,
    /// Which it is of all that were made.
    pub(crate) number: u64,
}

#[derive(Clone)]
enum Connection {
    Single(Single),
    Cluster(ClusterConnection, Arc<Detours>, Arc<Gates>),
}

/// A connection to one server. It is closed with the last clone.
#[derive(Clone)]
pub(crate) struct Single {
    connection: MultiplexedConnection,
    _driver: Arc<Driver>,
}

/// The task that reads and writes. Left to itself it would wait for all answers
/// that are due, from a server that may never give them.
struct Driver(AbortHandle);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Single {
    /// The answer as it came: what it is made into is another matter, of which
    /// an error says nothing of the connection.
    pub(crate) async fn query(&mut self, cmd: &Cmd) -> RedisResult<Value> {
        cmd.query_async(&mut self.connection).await
    }

    /// The same of a node to which the key is just moving. In one piece, or
    /// another's command could come between and take the leave.
    pub(crate) async fn query_asking(&mut self, cmd: &Cmd) -> RedisResult<Value> {
        let mut both = Pipeline::with_capacity(2);
        both.cmd("ASKING").add_command(cmd.clone());
        let answers = self.connection.req_packed_commands(&both, 0, 2).await?;
        let answer = answers.into_iter().last();
        answer.map_or(Ok(Value::Nil), Value::extract_error)
    }
}

impl Link {
    pub(crate) async fn query(&mut self, cmd: &Cmd) -> RedisResult<Value> {
        match &mut self.connection {
            Connection::Single(connection) => connection.query(cmd).await,
            Connection::Cluster(connection, detours, gates) => {
                let mut answer = None;
                if !gates.any_lost() {
                    let theirs = cmd.query_async(connection).await;
                    match &theirs {
                        Ok(_) => return theirs,
                        Err(error) if error.is_connection_dropped() => gates.lose(cmd),
                        Err(_) => {}
                    }
                    answer = Some(theirs);
                }
                // Seldom, and not of a size that all should carry.
                Box::pin(detours.send(cmd, connection, answer)).await
            }
        }
    }
}

/// Makes connections.
pub(crate) struct Dialer {
    servers: Vec<Server>,
    cluster: Option<Box<ClusterClient>>,
    limit: Duration,
}

impl Dialer {
    pub(crate) fn new(servers: &Servers, limit: Duration) -> Result<Self, ConfigError> {
        #[cfg(feature = "tls")]
        let tls = crate::dial::tls(&servers.certificates).map_err(ConfigError::Certificate)?;
        let cluster = servers.cluster.then(|| cluster(servers, limit));
        let server = |info| {
            Server::new(
                info,
                #[cfg(feature = "tls")]
                &tls,
            )
        };
        Ok(Self {
            servers: servers.all.iter().map(server).collect(),
            cluster: cluster.transpose().map_err(ConfigError::Url)?.map(Box::new),
            limit,
        })
    }

    pub(crate) fn is_cluster(&self) -> bool {
        self.cluster.is_some()
    }

    /// The node at this address, if it is one.
    pub(crate) fn node(&self, address: &str) -> Option<Server> {
        self.servers[0].at(address)
    }

    /// The servers of these addresses; and those that were named to us, where
    /// there are no others, or some that may be these.
    pub(crate) fn nodes(&self, addresses: &[String]) -> Vec<Server> {
        let known = addresses.iter().filter_map(|address| self.node(address));
        let mut known: Vec<_> = known.collect();
        if known.is_empty() || known.len() < addresses.len() {
            known.extend(self.servers.iter().cloned());
        }
        known
    }

    /// A connection, and whom to tell when it has ended.
    pub(crate) async fn link(
        &self,
        number: u64,
        gates: &Arc<Gates>,
        ended: impl FnOnce() + Send + 'static,
    ) -> RedisResult<Link> {
        let connection = match &self.cluster {
            None => Connection::Single(single(&self.servers[0], ended).await?),
            Some(client) => {
                let gates = Arc::clone(gates);
                let like = self.servers[0].clone();
                let detours = Detours::new(like, self.limit, Arc::clone(&gates));
                let connection = client.get_async_connection().await?;
                gates.all_found();
                Connection::Cluster(connection, Arc::new(detours), gates)
            }
        };
        Ok(Link { connection, number })
    }

    /// A connection for messages alone. In a cluster every node has all of
    /// them: the first that answers within the time limit.
    pub(crate) async fn messages(&self, limit: Duration, channel: &str) -> Option<PubSub> {
        for server in &self.servers {
            let listened = timeout(limit, async {
                let mut messages = PubSub::new(&server.settings, server.stream().await?).await?;
                messages.subscribe(channel).await?;
                RedisResult::Ok(messages)
            });
            if let Ok(Ok(messages)) = listened.await {
                return Some(messages);
            }
        }
        None
    }

    /// A connection for one user alone.
    pub(crate) async fn dedicated(&self) -> RedisResult<Single> {
        single(&self.servers[0], || {}).await
    }
}

pub(crate) async fn single(
    server: &Server,
    ended: impl FnOnce() + Send + 'static,
) -> RedisResult<Single> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(None)
        .set_response_timeout(None)
        .set_pipeline_buffer_size(LINE);
    let stream = server.stream().await?;
    let (connection, driver) =
        MultiplexedConnection::new_with_config(&server.settings, stream, config).await?;
    let driver = tokio::spawn(async move {
        driver.await;
        ended();
    });
    Ok(Single {
        connection,
        _driver: Arc::new(Driver(driver.abort_handle())),
    })
}

fn cluster(servers: &Servers, limit: Duration) -> RedisResult<ClusterClient> {
    let tcp = servers.all[0].tcp_settings().clone();
    // What it sends again may have been done: redirections are followed by us.
    let builder = ClusterClient::builder(servers.all.iter().cloned())
        .retries(0)
        .tcp_settings(tcp)
        .connection_timeout(limit / 2)
        .response_timeout(limit / 2);
    #[cfg(feature = "tls")]
    let builder = if let redis::ConnectionAddr::TcpTls { .. } = servers.all[0].addr() {
        use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
        // The cluster's connections take the cryptography that stands for all.
        if CryptoProvider::get_default().is_none() {
            // Another thread may have chosen in between: as well.
            let _ = ring::default_provider().install_default();
        }
        let certificates = &servers.certificates;
        let own = certificates.own.clone();
        builder.certs(redis::TlsCertificates {
            client_tls: own.map(|(client_cert, client_key)| redis::ClientTlsConfig {
                client_cert,
                client_key,
            }),
            root_cert: certificates.roots.clone(),
        })
    } else {
        builder
    };
    builder.build()
}

/// What a write is asked of the server to see whether it can: a key of no
/// meaning that is gone after a second.
pub(crate) fn probe(key: &str) -> Cmd {
    let mut cmd = Cmd::new();
    cmd.arg("SET").arg(key).arg(1).arg("PX").arg(1000);
    cmd
}

/// Throws the answer away.
pub(crate) async fn ask(link: &mut Link, cmd: &Cmd) -> RedisResult<()> {
    link.query(cmd).await.map(drop)
}
