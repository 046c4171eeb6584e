//! Which server, and how long to wait for it.

use std::{error::Error, fmt, time::Duration};

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisError};

/// Which server to use, and how.
///
/// ```
/// use std::time::Duration;
///
/// use buttress_redis::{Config, Redis};
///
/// # fn main() -> Result<(), buttress_redis::ConfigError> {
/// let redis = Redis::from_config(
///     Config::new("redis://127.0.0.1:6379/1")
///         .key_prefix("shop:")
///         .timeout(Duration::from_millis(20)),
/// )?;
/// # let _ = redis;
/// # Ok(())
/// # }
/// ```
///
/// Neither URLs nor passwords are shown by [`Debug`](fmt::Debug), in errors or
/// in the log.
#[derive(Clone)]
pub struct Config {
    servers: Vec<Place>,
    cluster: bool,
    database: Option<u32>,
    user: Option<String>,
    password: Option<String>,
    pub(crate) key_prefix: String,
    pub(crate) timeout: Duration,
    pub(crate) connect_timeout: Duration,
    #[cfg(feature = "tls")]
    certificates: Certificates,
}

#[derive(Clone)]
enum Place {
    Url(String),
    Host(String, u16),
}

/// Certificates and keys, in PEM.
#[cfg(feature = "tls")]
#[derive(Clone, Default)]
pub(crate) struct Certificates {
    /// Those that sign servers, where it is not Mozilla's.
    pub(crate) roots: Option<Vec<u8>>,
    /// Ours, with its chain, and its key.
    pub(crate) own: Option<(Vec<u8>, Vec<u8>)>,
}

/// A configuration that makes sense.
pub(crate) struct Servers {
    /// At least one.
    pub(crate) all: Vec<ConnectionInfo>,
    pub(crate) cluster: bool,
    #[cfg(feature = "tls")]
    pub(crate) certificates: Certificates,
}

impl Config {
    /// The longest time limit that is accepted: a minute.
    const LONGEST: Duration = Duration::from_secs(60);

    /// The server of this URL: `redis://`, `rediss://` (TLS, with the feature
    /// `tls`) or `redis+unix://`, with user, password and database:
    ///
    /// ```text
    /// redis://user:password@host:6379/1
    /// redis+unix:///run/redis.sock?db=1&user=user&pass=password
    /// ```
    ///
    /// Several with commas between them are nodes of a
    /// [cluster](Self::cluster), and so is one with a comma behind it. What is
    /// not a letter or a digit in a user or a password wants percent-encoding.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        let url = url.into();
        let urls = url.split(',').map(str::trim).filter(|url| !url.is_empty());
        let mut config = Self::cluster(urls);
        config.cluster = url.contains(',');
        config
    }

    /// The Redis Cluster that these nodes are of; one is enough to find the
    /// others, more are for when that one is gone. All with the same user and
    /// password, and all with TLS or none.
    #[must_use]
    pub fn cluster<U: Into<String>>(urls: impl IntoIterator<Item = U>) -> Self {
        let servers = urls.into_iter().map(|url| Place::Url(url.into()));
        Self::at(servers.collect(), true)
    }

    fn at(servers: Vec<Place>, cluster: bool) -> Self {
        Self {
            servers,
            cluster,
            database: None,
            user: None,
            password: None,
            key_prefix: "buttress:".to_owned(),
            timeout: Duration::from_millis(50),
            connect_timeout: Duration::from_millis(500),
            #[cfg(feature = "tls")]
            certificates: Certificates::default(),
        }
    }

    /// What the environment says: `REDIS_URL` (as in [`new`](Self::new)), and
    /// `REDIS_DB` where that names no database; or else `REDIS_HOST` (default
    /// `127.0.0.1`), `REDIS_PORT` (default 6379), `REDIS_PASSWORD` and
    /// `REDIS_DB`. An empty variable is none.
    ///
    /// # Errors
    ///
    /// A port or a database that is no number.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// The same, asking `var` for the variables.
    ///
    /// # Errors
    ///
    /// A port or a database that is no number.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let var = |name: &'static str| {
            let value = var(name)?;
            let value = value.trim();
            (!value.is_empty()).then(|| value.to_owned())
        };
        let mut config = if let Some(url) = var("REDIS_URL") {
            Self::new(url)
        } else {
            let host = var("REDIS_HOST").unwrap_or_else(|| "127.0.0.1".to_owned());
            let port = number("REDIS_PORT", var("REDIS_PORT"))?.unwrap_or(6379);
            // As it is written in a URL.
            let bare = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
            let host = bare.map_or(host.clone(), ToOwned::to_owned);
            let mut config = Self::at(vec![Place::Host(host, port)], false);
            config.password = var("REDIS_PASSWORD");
            config
        };
        config.database = number("REDIS_DB", var("REDIS_DB"))?;
        Ok(config)
    }

    /// The database, where the URL names none. Default: 0, which is the only
    /// one of a cluster.
    #[must_use]
    pub fn database(mut self, database: u32) -> Self {
        self.database = Some(database);
        self
    }

    /// The user, where the URL names none. Default: none, which is the user
    /// `default`.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// The password, where the URL has none.
    #[must_use]
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.password = Some(password.into());
        self
    }

    /// The certificates, in PEM, of who signs those of the servers: a private
    /// authority. Default: those that Mozilla trusts.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn root_certificates(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.certificates.roots = Some(pem.into());
        self
    }

    /// Our own certificate (with its chain) and its key, both in PEM, for
    /// servers that want one.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn client_certificate(
        mut self,
        certificate: impl Into<Vec<u8>>,
        key: impl Into<Vec<u8>>,
    ) -> Self {
        self.certificates.own = Some((certificate.into(), key.into()));
        self
    }

    /// What every key and channel begins with. Default: `buttress:`. At most
    /// 64 printable ASCII characters, no space and no brace. Two services that
    /// share a server want two prefixes, none the beginning of the other.
    #[must_use]
    pub fn key_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.key_prefix = prefix.into();
        self
    }

    /// How long one operation may take at most, its second trip and the waiting
    /// for the connection included. Default: 50 ms; 1 ms to a minute.
    ///
    /// A server that takes longer than this for one write is as good as gone:
    /// it is not used until it is faster.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How long it may take to connect. No operation waits for it longer than
    /// its own time limit. Default: 500 ms; 1 ms to a minute. In a cluster each
    /// node has half of it, and all together have it twice.
    ///
    /// Where packets are dropped, so long is also the wait for the next attempt
    /// to connect: with much more than the default it takes longer than a
    /// second to find a server that is back.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    pub(crate) fn check(&self) -> Result<Servers, ConfigError> {
        let prefix_is_sound = self.key_prefix.len() <= 64
            && (self.key_prefix.bytes())
                .all(|byte| matches!(byte, b'!'..=b'~') && byte != b'{' && byte != b'}');
        if !prefix_is_sound {
            return Err(ConfigError::KeyPrefix);
        }
        for timeout in [self.timeout, self.connect_timeout] {
            if timeout < Duration::from_millis(1) || timeout > Self::LONGEST {
                return Err(ConfigError::Timeout);
            }
        }
        let all = self.servers.iter().map(|place| self.server(place));
        let all = all.collect::<Result<Vec<_>, _>>()?;
        let first = all.first().ok_or(ConfigError::NoServer)?;
        if self.cluster {
            for node in &all {
                if node.redis_settings().db() != 0 {
                    return Err(ConfigError::ClusterDatabase);
                }
                let ours = (node.redis_settings(), node.addr());
                let theirs = (first.redis_settings(), first.addr());
                if ours.0.username() != theirs.0.username()
                    || ours.0.password() != theirs.0.password()
                    || is_tls(ours.1) != is_tls(theirs.1)
                    || matches!(ours.1, ConnectionAddr::Unix(_))
                {
                    return Err(ConfigError::ClusterNodes);
                }
            }
        }
        Ok(Servers {
            all,
            cluster: self.cluster,
            #[cfg(feature = "tls")]
            certificates: self.certificates.clone(),
        })
    }

    fn server(&self, place: &Place) -> Result<ConnectionInfo, ConfigError> {
        let (server, names_database) = match place {
            Place::Url(text) => parse(text)?,
            Place::Host(host, port) => {
                let address = ConnectionAddr::Tcp(host.clone(), *port);
                let server = address.into_connection_info();
                (server.map_err(ConfigError::Url)?, false)
            }
        };
        if !server.addr().is_supported() || is_insecure(server.addr()) {
            return Err(ConfigError::NotBuiltIn);
        }
        let mut settings = server.redis_settings().clone();
        if settings.db() < 0 {
            return Err(ConfigError::Database);
        }
        if let (Some(database), false) = (self.database, names_database) {
            settings = settings.set_db(database.into());
        }
        if let (Some(user), None) = (&self.user, settings.username()) {
            settings = settings.set_username(user);
        }
        if let (Some(password), None) = (&self.password, settings.password()) {
            settings = settings.set_password(password);
        }
        // Several write at once on one socket: none waits for the answer to
        // another (Nagle), which can take 40 ms.
        let tcp = server.tcp_settings().clone().set_nodelay(true);
        Ok(server.set_redis_settings(settings).set_tcp_settings(tcp))
    }
}

/// The server of a URL, and whether it names a database.
fn parse(text: &str) -> Result<(ConnectionInfo, bool), ConfigError> {
    let url = redis::parse_redis_url(text).ok_or(ConfigError::Scheme)?;
    if matches!(url.scheme(), "rediss" | "valkeys") && cfg!(not(feature = "tls")) {
        return Err(ConfigError::NotBuiltIn);
    }
    let names_database = if url.scheme().ends_with("unix") {
        url.query_pairs().any(|(name, _)| name == "db")
    } else {
        !url.path().trim_matches('/').is_empty()
    };
    let server = url.into_connection_info().map_err(ConfigError::Url)?;
    Ok((server, names_database))
}

fn is_tls(address: &ConnectionAddr) -> bool {
    matches!(address, ConnectionAddr::TcpTls { .. })
}

/// Whether a URL asks for TLS that proves nothing (`#insecure`).
fn is_insecure(address: &ConnectionAddr) -> bool {
    matches!(address, ConnectionAddr::TcpTls { insecure: true, .. })
}

fn number<T: std::str::FromStr>(
    name: &'static str,
    value: Option<String>,
) -> Result<Option<T>, ConfigError> {
    value
        .map(|value| value.parse().map_err(|_| ConfigError::Variable(name)))
        .transpose()
}

impl fmt::Debug for Config {
    /// Without the URLs, which may hold passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("servers", &self.servers.len())
            .field("cluster", &self.cluster)
            .field("key_prefix", &self.key_prefix)
            .field("timeout", &self.timeout)
            .field("connect_timeout", &self.connect_timeout)
            .finish_non_exhaustive()
    }
}

/// What can be wrong with a [`Config`]. Nothing of a URL is shown.
#[derive(Debug)]
#[non_exhaustive]
pub enum ConfigError {
    /// There is no URL.
    NoServer,
    /// A URL is none, or of another kind.
    Scheme,
    /// A URL makes no sense.
    Url(RedisError),
    /// A URL asks for what is not built in: TLS, TLS that checks nothing, or
    /// Unix sockets on a system that has none.
    NotBuiltIn,
    /// The number of the database is below zero.
    Database,
    /// A cluster with a database other than 0.
    ClusterDatabase,
    /// The nodes of a cluster differ in user, password or TLS, or one of them
    /// is a Unix socket.
    ClusterNodes,
    /// A certificate or a key that cannot be read, or do not fit each other.
    Certificate(Box<dyn Error + Send + Sync>),
    /// The prefix of the keys is too long, or has a character that it must not
    /// have.
    KeyPrefix,
    /// A time limit below 1 ms or above a minute.
    Timeout,
    /// The variable of this name is no number, or too large.
    Variable(&'static str),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoServer => f.write_str("there is no URL"),
            Self::Scheme => {
                f.write_str("the URL must begin with redis://, rediss:// or redis+unix://")
            }
            Self::Url(_) => f.write_str("the URL makes no sense"),
            Self::NotBuiltIn => f.write_str(
                "the URL asks for what is not built in (rediss:// wants the feature tls, and cannot be #insecure)",
            ),
            Self::Database => f.write_str("the number of the database is below zero"),
            Self::ClusterDatabase => f.write_str("a cluster has no database other than 0"),
            Self::ClusterNodes => f.write_str(
                "the nodes of a cluster must have one user and password, all TLS or none, and no Unix socket",
            ),
            Self::Certificate(_) => f.write_str("a certificate or its key makes no sense"),
            Self::KeyPrefix => f.write_str(
                "the key prefix must be at most 64 printable ASCII characters, without space or brace",
            ),
            Self::Timeout => f.write_str("a time limit must be from 1 ms to a minute"),
            Self::Variable(name) => write!(f, "{name} must be a number"),
        }
    }
}

impl Error for ConfigError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Url(cause) => Some(cause),
            Self::Certificate(cause) => Some(&**cause),
            _ => None,
        }
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests;
