//! Values: fenced, with a version, and as JSON.

use std::{fmt, sync::LazyLock, time::Duration};

use redis::Cmd;

use crate::{Error, FencingToken, Key, Redis, Script};

static FENCED_SET: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("value/fenced_set.lua")));
static CHANGE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("value/change.lua")));

/// How much longer than a fenced value its token is kept.
const FENCE: Duration = Duration::from_secs(24 * 3600);

/// A time to live as Redis takes it: in whole milliseconds, rounded up, at
/// least one and at most a hundred years.
pub(crate) fn millis(ttl: Duration) -> u64 {
    const MOST: u128 = 100 * 365 * 24 * 3600 * 1000;
    let millis = ttl.as_nanos().div_ceil(1_000_000).clamp(1, MOST);
    u64::try_from(millis).expect("a hundred years fit")
}

/// Values that [`FencingToken`]s protect. Each is a string under its key, and
/// the token that it was written with a second one beside it (`…:fence`), which
/// is kept for a day longer.
impl Redis {
    /// Sets a value, unless one was set with a greater token; equal ones pass,
    /// so that a holder may write several times. One trip.
    ///
    /// The value is kept for `ttl`, in milliseconds, rounded up. For a day
    /// longer the token is: a writer that was asleep for more than that after
    /// the value's end is not recognised.
    ///
    /// A future that is dropped has set it or has not.
    ///
    /// # Errors
    ///
    /// [`FencedError::Outdated`]: somebody with a greater token has been there.
    /// [`FencedError::Redis`]: perhaps set, perhaps not.
    pub async fn fenced_set(
        &self,
        key: &Key,
        value: impl AsRef<[u8]>,
        token: FencingToken,
        ttl: Duration,
    ) -> Result<(), FencedError> {
        let fence = key.clone().segment("fence");
        let call = FENCED_SET
            .on([key, &fence])
            .arg(value.as_ref())
            .arg(token.get())
            .arg(millis(ttl))
            .arg(millis(ttl.saturating_add(FENCE)));
        let newer = self.call::<Option<u64>>("fenced_set", &call).await?;
        match newer {
            None => Ok(()),
            Some(newer) => Err(FencedError::Outdated {
                newer: FencingToken::new(newer),
            }),
        }
    }

    /// The value, if there is one, and the token that it was set with. One
    /// trip. What is no string is as if it was not there.
    ///
    /// # Errors
    ///
    /// The server is gone, does not answer in time, or refuses.
    pub async fn fenced_get(&self, key: &Key) -> Result<Option<Fenced>, Error> {
        let fence = key.clone().segment("fence");
        let mut cmd = Cmd::new();
        cmd.arg("MGET").arg(key.as_str()).arg(fence.as_str());
        let (data, token) = self
            .run::<(Option<Vec<u8>>, Option<Vec<u8>>)>("fenced_get", &cmd)
            .await?;
        let token = token.and_then(|token| std::str::from_utf8(&token).ok()?.parse().ok());
        Ok(data.map(|data| Fenced {
            token: token.map(FencingToken::new),
            data,
        }))
    }
}

/// Values with a version, for changes that must not overwrite somebody else's
/// (compare and set). Each is a hash: `v`, the version, and `d`, the data.
impl Redis {
    /// Sets a value unless there is one. One trip. Kept for `ttl`, in
    /// milliseconds, rounded up.
    ///
    /// A future that is dropped has set it or has not.
    ///
    /// # Errors
    ///
    /// The server is gone, does not answer in time (perhaps set, perhaps not),
    /// or refuses: the key holds something else
    /// ([code](Error::code) `FOREIGN`), which is left alone.
    pub async fn create_if_absent(
        &self,
        key: &Key,
        value: impl AsRef<[u8]>,
        ttl: Duration,
    ) -> Result<Change, Error> {
        self.change("create", key, value.as_ref(), ttl, "").await
    }

    /// Sets a value if its version is this one. One trip. Kept for `ttl` from
    /// now on, in milliseconds, rounded up.
    ///
    /// A future that is dropped has set it or has not.
    ///
    /// # Errors
    ///
    /// As [`create_if_absent`](Self::create_if_absent).
    pub async fn update_if_version(
        &self,
        key: &Key,
        version: Version,
        value: impl AsRef<[u8]>,
        ttl: Duration,
    ) -> Result<Change, Error> {
        let version = version.0.to_string();
        self.change("update", key, value.as_ref(), ttl, &version)
            .await
    }

    /// The value and its version, if there is one. One trip.
    ///
    /// # Errors
    ///
    /// The server is gone, does not answer in time, or refuses: the key holds
    /// something else.
    pub async fn get_versioned(&self, key: &Key) -> Result<Option<Versioned>, Error> {
        let mut cmd = Cmd::new();
        cmd.arg("HMGET").arg(key.as_str()).arg("v").arg("d");
        let (version, data) = self.run("get_versioned", &cmd).await?;
        Ok(Versioned::of(version, data))
    }

    async fn change(
        &self,
        operation: &'static str,
        key: &Key,
        value: &[u8],
        ttl: Duration,
        expected: &str,
    ) -> Result<Change, Error> {
        let call = CHANGE.on([key]).arg(value).arg(millis(ttl)).arg(expected);
        let (done, version, data) = self
            .call::<(u64, Option<u64>, Option<Vec<u8>>)>(operation, &call)
            .await?;
        Ok(match (done, version) {
            (1, Some(version)) => Change::Done(Version(version)),
            _ => Change::Refused(Versioned::of(version, data)),
        })
    }
}

#[cfg(feature = "json")]
mod json {
    use std::{fmt, time::Duration};

    use redis::Cmd;
    use serde::{Serialize, de::DeserializeOwned};

    use super::millis;
    use crate::{Error, Key, Redis};

    /// Values as JSON: with the feature `json`. Each is a string.
    impl Redis {
        /// Sets a value, as JSON. One trip. Kept for `ttl`, in milliseconds,
        /// rounded up.
        ///
        /// A future that is dropped has set it or has not.
        ///
        /// # Errors
        ///
        /// The value cannot be JSON, and nothing was set; or the server is
        /// gone, does not answer in time (perhaps set, perhaps not), or
        /// refuses.
        pub async fn set_json<T: Serialize + ?Sized>(
            &self,
            key: &Key,
            value: &T,
            ttl: Duration,
        ) -> Result<(), JsonError> {
            let json = serde_json::to_vec(value).map_err(JsonError::Json)?;
            let mut cmd = Cmd::new();
            cmd.arg("SET").arg(key.as_str()).arg(json);
            cmd.arg("PX").arg(millis(ttl));
            self.run::<()>("set_json", &cmd)
                .await
                .map_err(JsonError::Redis)
        }

        /// The value, if there is one. One trip.
        ///
        /// # Errors
        ///
        /// What is there is no such JSON; or the server is gone, does not
        /// answer in time, or refuses.
        pub async fn get_json<T: DeserializeOwned>(
            &self,
            key: &Key,
        ) -> Result<Option<T>, JsonError> {
            let mut cmd = Cmd::new();
            cmd.arg("GET").arg(key.as_str());
            let json = self.run::<Option<Vec<u8>>>("get_json", &cmd).await;
            json.map_err(JsonError::Redis)?
                .map(|json| serde_json::from_slice(&json).map_err(JsonError::Json))
                .transpose()
        }
    }

    /// What can go wrong with a value as JSON.
    #[derive(Debug)]
    #[non_exhaustive]
    pub enum JsonError {
        /// It is not what it should be. The message of the cause tells where
        /// and of what kind, which can hold a piece of the value.
        Json(serde_json::Error),
        /// The server could not be asked.
        Redis(Error),
    }

    impl fmt::Display for JsonError {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(match self {
                Self::Json(_) => "the value is no such JSON",
                Self::Redis(_) => "the value's server could not be asked",
            })
        }
    }

    impl std::error::Error for JsonError {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(match self {
                Self::Json(error) => error,
                Self::Redis(error) => error,
            })
        }
    }
}

#[cfg(feature = "json")]
pub use json::JsonError;

/// A value that was set with a token: see [`Redis::fenced_get`].
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fenced {
    /// The token; `None` where the server has lost it.
    pub token: Option<FencingToken>,
    /// The value.
    pub data: Vec<u8>,
}

impl fmt::Debug for Fenced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fenced")
            .field("token", &self.token)
            .field("bytes", &self.data.len())
            .finish()
    }
}

/// Why a value was not set: see [`Redis::fenced_set`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum FencedError {
    /// It was set with a greater token: who brings this one holds the lock no
    /// more.
    Outdated {
        /// The greatest that was seen.
        newer: FencingToken,
    },
    /// The server could not be asked.
    Redis(Error),
}

impl From<Error> for FencedError {
    fn from(error: Error) -> Self {
        Self::Redis(error)
    }
}

impl fmt::Display for FencedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Outdated { .. } => "the value was set with a greater token",
            Self::Redis(_) => "the value's server could not be asked",
        })
    }
}

impl std::error::Error for FencedError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Outdated { .. } => None,
            Self::Redis(error) => Some(error),
        }
    }
}

/// Which state of a value it is. Each change gives it a greater one, and so
/// does being created anew, by the server's clock in microseconds: a version
/// that was read before a value's end does not come back after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(u64);

impl Version {
    /// A version that was told to somebody, as an `ETag` say, and comes back.
    #[must_use]
    pub const fn new(version: u64) -> Self {
        Self(version)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A value and its version: see [`Redis::get_versioned`].
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Versioned {
    /// The version.
    pub version: Version,
    /// The value.
    pub data: Vec<u8>,
}

impl Versioned {
    fn of(version: Option<u64>, data: Option<Vec<u8>>) -> Option<Self> {
        Some(Self {
            version: Version(version?),
            data: data?,
        })
    }
}

impl fmt::Debug for Versioned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Versioned")
            .field("version", &self.version)
            .field("bytes", &self.data.len())
            .finish()
    }
}

/// What came of asking for a change.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "it may have been refused"]
pub enum Change {
    /// It was made, and this is the value's version now.
    Done(Version),
    /// It was not: this is what is there, if anything is.
    Refused(Option<Versioned>),
}

impl Change {
    /// The new version, if it was made.
    #[must_use]
    pub fn done(self) -> Option<Version> {
        match self {
            Self::Done(version) => Some(version),
            Self::Refused(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_to_live_is_rounded_up() {
        let cases = [
            (Duration::ZERO, 1),
            (Duration::from_nanos(1), 1),
            (Duration::from_nanos(1_000_001), 2),
            (Duration::from_secs(1), 1000),
            (Duration::MAX, 3_153_600_000_000),
        ];
        for (ttl, expected) in cases {
            assert_eq!(millis(ttl), expected, "{ttl:?}");
        }
    }
}
