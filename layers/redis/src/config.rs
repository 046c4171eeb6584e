//! Which server, and how long to wait for it.

use std::{error::Error, fmt, time::Duration};

use redis::{ConnectionInfo, IntoConnectionInfo, RedisError};

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
#[derive(Clone)]
pub struct Config {
    pub(crate) urls: Vec<String>,
    pub(crate) database: Option<i64>,
    pub(crate) password: Option<String>,
    pub(crate) key_prefix: String,
    pub(crate) timeout: Duration,
    pub(crate) connect_timeout: Duration,
}

impl Config {
    /// The longest time limit that is accepted: a minute.
    const LONGEST: Duration = Duration::from_secs(60);

    /// The server of this URL: `redis://`, `rediss://` (TLS, with the feature
    /// `tls`) or `redis+unix://`, with user, password and database.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self::cluster([url.into()])
    }

    /// The Redis Cluster that these nodes are of, where it is more than one.
    #[must_use]
    pub fn cluster<U: Into<String>>(urls: impl IntoIterator<Item = U>) -> Self {
        Self {
            urls: urls.into_iter().map(Into::into).collect(),
            database: None,
            password: None,
            key_prefix: "buttress:".to_owned(),
            timeout: Duration::from_millis(50),
            connect_timeout: Duration::from_millis(500),
        }
    }

    /// What the environment says: `REDIS_URL` (several, with commas between
    /// them, are a cluster), and `REDIS_DB` where that names no database; or
    /// else `REDIS_HOST` (default `127.0.0.1`), `REDIS_PORT` (default 6379),
    /// `REDIS_PASSWORD` and `REDIS_DB`.
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
        let var = |name: &'static str| var(name).filter(|value| !value.is_empty());
        let mut config = match var("REDIS_URL") {
            Some(urls) => Self::cluster(urls.split(',').map(str::trim)),
            None => {
                let host = var("REDIS_HOST").unwrap_or_else(|| "127.0.0.1".to_owned());
                let port = number::<u16>("REDIS_PORT", var("REDIS_PORT"))?.unwrap_or(6379);
                let host = if host.contains(':') && !host.starts_with('[') {
                    format!("[{host}]")
                } else {
                    host
                };
                let mut config = Self::new(format!("redis://{host}:{port}"));
                config.password = var("REDIS_PASSWORD");
                config
            }
        };
        config.database = number("REDIS_DB", var("REDIS_DB"))?;
        Ok(config)
    }

    /// The database, where the URL names none. Default: 0.
    #[must_use]
    pub fn database(mut self, database: u32) -> Self {
        self.database = Some(database.into());
        self
    }

    /// What every key and channel begins with. Default: `buttress:`. At most
    /// 64 printable ASCII characters, no space and no brace.
    #[must_use]
    pub fn key_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.key_prefix = prefix.into();
        self
    }

    /// How long one operation may take at most, its second trip included.
    /// Default: 50 ms; 1 ms to a minute.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How long it may take to connect. No request waits for it. Default:
    /// 500 ms; 1 ms to a minute.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    pub(crate) fn check(&self) -> Result<Vec<ConnectionInfo>, ConfigError> {
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
        if self.urls.is_empty() {
            return Err(ConfigError::NoServer);
        }
        self.urls.iter().map(|url| self.server(url)).collect()
    }

    fn server(&self, text: &str) -> Result<ConnectionInfo, ConfigError> {
        let url = redis::parse_redis_url(text).ok_or(ConfigError::Scheme)?;
        let names_database = !url.path().trim_matches('/').is_empty()
            && !url.scheme().ends_with("unix")
            || url.query_pairs().any(|(name, _)| name == "db");
        let mut server = url.into_connection_info().map_err(ConfigError::Url)?;
        if !server.addr().is_supported() {
            return Err(ConfigError::NotBuiltIn);
        }
        let mut settings = server.redis_settings().clone();
        if let (Some(database), false) = (self.database, names_database) {
            settings = settings.set_db(database);
        }
        if let Some(password) = &self.password {
            settings = settings.set_password(password);
        }
        server = server.set_redis_settings(settings);
        Ok(server)
    }
}

fn number<T: std::str::FromStr>(
    name: &'static str,
    value: Option<String>,
) -> Result<Option<T>, ConfigError> {
    value
        .map(|value| {
            value
                .trim()
                .parse()
                .map_err(|_| ConfigError::Variable(name))
        })
        .transpose()
}

impl fmt::Debug for Config {
    /// Without the URLs, which may hold passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("servers", &self.urls.len())
            .field("key_prefix", &self.key_prefix)
            .field("timeout", &self.timeout)
            .field("connect_timeout", &self.connect_timeout)
            .finish_non_exhaustive()
    }
}

/// What can be wrong with a [`Config`].
#[derive(Debug)]
#[non_exhaustive]
pub enum ConfigError {
    /// There is no URL.
    NoServer,
    /// A URL is none, or of another kind.
    Scheme,
    /// A URL makes no sense.
    Url(RedisError),
    /// A URL asks for what is not built in: TLS, or Unix sockets on a system
    /// that has none.
    NotBuiltIn,
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
            Self::NotBuiltIn => {
                f.write_str("the URL asks for what is not built in (rediss:// wants the feature tls)")
            }
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
            _ => None,
        }
    }
}
