//! A connection to the server or to the cluster.

use std::time::Duration;

use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, RedisResult, Value,
    aio::{MultiplexedConnection, PubSub},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
};

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
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Link {
    /// The answer as it came: what it is made into is another matter, of which
    /// an error says nothing of the connection.
    pub(crate) async fn query(&mut self, cmd: &Cmd) -> RedisResult<Value> {
        match &mut self.connection {
            Connection::Single(connection) => cmd.query_async(connection).await,
            Connection::Cluster(connection) => cmd.query_async(connection).await,
        }
    }
}

/// Makes connections.
pub(crate) enum Dialer {
    Single(Box<Client>),
    Cluster(Box<ClusterClient>, Vec<Client>),
}

impl Dialer {
    pub(crate) fn new(servers: Vec<ConnectionInfo>, timeout: Duration) -> RedisResult<Self> {
        if servers.len() == 1 {
            let server = servers.into_iter().next().expect("there is one");
            return Client::open(server).map(|client| Self::Single(Box::new(client)));
        }
        let clients = servers
            .iter()
            .cloned()
            .map(Client::open)
            .collect::<RedisResult<_>>()?;
        // Redirections are followed as retries; our own time limit rules.
        let cluster = ClusterClient::builder(servers)
            .retries(3)
            .min_retry_wait(5)
            .max_retry_wait(20)
            .connection_timeout(timeout)
            .response_timeout(timeout)
            .build()?;
        Ok(Self::Cluster(Box::new(cluster), clients))
    }

    pub(crate) fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster(..))
    }

    pub(crate) async fn link(&self, number: u64) -> RedisResult<Link> {
        let connection = match self {
            Self::Single(client) => {
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(None)
                    .set_response_timeout(None)
                    .set_pipeline_buffer_size(LINE);
                client
                    .get_multiplexed_async_connection_with_config(&config)
                    .await
                    .map(Connection::Single)
            }
            Self::Cluster(client, _) => {
                client.get_async_connection().await.map(Connection::Cluster)
            }
        };
        connection.map(|connection| Link { connection, number })
    }

    /// A connection for messages alone. In a cluster every node has all of
    /// them: the first that answers.
    pub(crate) async fn messages(&self) -> RedisResult<PubSub> {
        let clients = match self {
            Self::Single(client) => std::slice::from_ref(&**client),
            Self::Cluster(_, clients) => clients,
        };
        let mut last = None;
        for client in clients {
            match client.get_async_pubsub().await {
                Ok(messages) => return Ok(messages),
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("there is a server"))
    }

    /// A connection for one user alone.
    pub(crate) async fn dedicated(&self) -> RedisResult<MultiplexedConnection> {
        let client = match self {
            Self::Single(client) => client,
            Self::Cluster(_, clients) => &clients[0],
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None);
        client
            .get_multiplexed_async_connection_with_config(&config)
            .await
    }
}

/// What a write is asked of the server to see whether it can: a key of no
/// meaning that is gone after a second.
pub(crate) fn probe(prefix: &str) -> Cmd {
    let mut cmd = Cmd::new();
    cmd.arg("SET").arg(format!("{prefix}probe")).arg(1);
    cmd.arg("PX").arg(1000);
    cmd
}

/// Throws the answer away.
pub(crate) async fn ask(link: &mut Link, cmd: &Cmd) -> RedisResult<()> {
    link.query(cmd).await.map(drop)
}
