//! The section `redis`: where the state is kept that processes share.

use std::{fmt, str::FromStr};

use buttress::redis::{self, Config, ConfigError};
use serde::{
    Deserialize, Deserializer,
    de::{SeqAccess, Visitor},
};

use super::{Secret, Span, present, scalar::from_scalar};

/// Which server, and how long to wait for it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a section of keys")]
pub(crate) struct Redis {
    #[serde(deserialize_with = "present")]
    pub(crate) url: Option<Urls>,
    pub(crate) key_prefix: String,
    pub(crate) timeout: Span,
    /// From the environment only: for URLs that name none.
    #[serde(skip)]
    pub(crate) database: Option<u32>,
}

impl Default for Redis {
    fn default() -> Self {
        Self {
            url: None,
            key_prefix: "buttress:".to_owned(),
            timeout: Span::millis(50),
            database: None,
        }
    }
}

impl Redis {
    /// The key that makes no sense, as a path from here, and why.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        self.open().map(drop).map_err(|error| {
            let key = match error {
                ConfigError::KeyPrefix => ".key_prefix",
                ConfigError::Timeout => ".timeout",
                _ => ".url",
            };
            // Without what the URL is: it may hold a password.
            (key, format!("expected otherwise: {error}"))
        })
    }

    /// The handle. Of settings that have been checked.
    pub(crate) fn handle(&self) -> redis::Redis {
        self.open().expect("checked in the settings")
    }

    fn open(&self) -> Result<redis::Redis, ConfigError> {
        let urls = self.url.as_ref().map_or(&[][..], |urls| &urls.0);
        let config = match urls {
            [url] => Config::new(url.0.expose()),
            urls => Config::cluster(urls.iter().map(|url| url.0.expose())),
        };
        let mut config = config.key_prefix(&*self.key_prefix).timeout(self.timeout.0);
        if let Some(database) = self.database {
            config = config.database(database);
        }
        redis::Redis::from_config(config)
    }
}

/// One URL, or those of a cluster's nodes.
#[derive(Clone, Debug)]
pub(crate) struct Urls(pub(crate) Vec<Url>);

impl<'de> Deserialize<'de> for Urls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMore;

        impl<'de> Visitor<'de> for OneOrMore {
            type Value = Urls;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a URL, or a list of the URLs of a cluster's nodes")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Urls, E> {
                let url = text.parse().map_err(E::custom)?;
                Ok(Urls(vec![url]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Urls, A::Error> {
                let mut urls = Vec::new();
                while let Some(url) = seq.next_element()? {
                    urls.push(url);
                }
                Ok(Urls(urls))
            }
        }

        deserializer.deserialize_any(OneOrMore)
    }
}

impl FromStr for Urls {
    type Err = String;

    /// As a flag has it: with commas between several.
    fn from_str(text: &str) -> Result<Self, String> {
        let urls = text.split(',').map(|url| url.trim().parse());
        urls.collect::<Result<_, _>>().map(Self)
    }
}

from_scalar!(Url);

/// A URL, which may hold a password: itself, `env:NAME` or `file:PATH`.
#[derive(Clone, Debug)]
pub(crate) struct Url(Secret);

impl FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self)
    }
}

impl fmt::Display for Url {
    /// With `***` for who logs in, and by what.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, rest) = self.0.expose().split_once("://").unwrap_or_default();
        // A password may have any of these in it; a host has not.
        let place = rest.rsplit_once('@');
        write!(f, "{scheme}://")?;
        let rest = match place {
            Some((_, place)) => {
                f.write_str("***@")?;
                place
            }
            None => rest,
        };
        let Some((path, query)) = rest.split_once('?') else {
            return f.write_str(rest);
        };
        for (index, pair) in query.split('&').enumerate() {
            let lead = if index == 0 { path } else { "" };
            let mark = if index == 0 { '?' } else { '&' };
            write!(f, "{lead}{mark}")?;
            match pair.split_once('=') {
                Some((name @ ("pass" | "user"), _)) => write!(f, "{name}=***")?,
                _ => f.write_str(pair)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_url_is_shown_with_its_password() {
        for (url, shown) in [
            ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
            ("redis://:hunter2@host/1", "redis://***@host/1"),
            ("rediss://me:hunt@er2@host:1", "rediss://***@host:1"),
            (
                "redis+unix:///run/redis.sock?db=2&user=me&pass=hunter2",
                "redis+unix:///run/redis.sock?db=2&user=***&pass=***",
            ),
        ] {
            let url: Url = url.parse().unwrap();
            assert_eq!(url.to_string(), shown);
        }
    }
}
