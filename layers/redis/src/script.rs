//! Scripts: by their hash, and by their text where the server has forgotten.

use std::fmt;

use redis::{Cmd, ToRedisArgs};

use crate::Key;

/// A Lua script, and its SHA-1.
///
/// Run by `EVALSHA`; where the server answers NOSCRIPT, once by `EVAL`, which
/// makes it known again: two trips, to the one node that has the keys.
///
/// A script touches the keys it is given and no others, which are all of one
/// hash tag; takes the time from the server (`redis.call('TIME')`); and sets a
/// TTL on all that it writes.
#[derive(Clone, Copy)]
pub struct Script {
    text: &'static str,
    /// Hexadecimal.
    hash: [u8; 40],
}

impl Script {
    /// The script of this text.
    #[must_use]
    pub fn new(text: &'static str) -> Self {
        let hex = redis::Script::new(text);
        let hash = hex.get_hash().as_bytes();
        Self {
            text,
            hash: hash.try_into().expect("a SHA-1 has 40 digits"),
        }
    }

    /// A call on these keys, to be given its arguments.
    #[must_use]
    pub fn on<'k>(
        &self,
        keys: impl IntoIterator<Item = &'k Key, IntoIter: ExactSizeIterator>,
    ) -> Call {
        let keys = keys.into_iter();
        // Room for keys of a usual length, and some arguments.
        let mut cmd = Cmd::with_capacity(keys.len() + 8, keys.len() * 64 + 128);
        cmd.arg("EVALSHA").arg(&self.hash).arg(keys.len());
        for key in keys {
            cmd.arg(key.as_str());
        }
        Call {
            cmd,
            text: self.text,
        }
    }
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hash = std::str::from_utf8(&self.hash).unwrap_or_default();
        f.debug_tuple("Script").field(&hash).finish()
    }
}

/// A script with its keys and arguments.
pub struct Call {
    pub(crate) cmd: Cmd,
    text: &'static str,
}

impl Call {
    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl ToRedisArgs) -> Self {
        self.cmd.arg(arg);
        self
    }

    /// Adds an argument.
    pub fn push(&mut self, arg: impl ToRedisArgs) {
        self.cmd.arg(arg);
    }

    /// The same with the script's text in the place of its hash.
    pub(crate) fn in_full(&self) -> Cmd {
        let mut cmd = Cmd::new();
        cmd.arg("EVAL").arg(self.text);
        for arg in self.cmd.args_iter().skip(2) {
            match arg {
                redis::Arg::Simple(arg) => cmd.arg(arg),
                // No other command than SCAN and its kin has one.
                _ => &mut cmd,
            };
        }
        cmd
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Call(..)")
    }
}
