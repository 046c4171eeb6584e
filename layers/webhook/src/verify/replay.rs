//! Telling a repeat from a new message: what is remembered, and where.

mod memory;
#[cfg(feature = "redis")]
mod redis;

#[cfg(test)]
mod tests;

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use buttress_core::BoxError;

pub(crate) use self::memory::Memory;
#[cfg(feature = "redis")]
pub use self::redis::RedisReplays;

/// What a message is known by: the endpoint it came to, and the id that is
/// signed, or else the SHA-256 of what is signed. At most about 700 bytes.
///
/// Cheap to clone. [`Debug`](fmt::Debug) does not show it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ClaimKey(Arc<str>);

impl ClaimKey {
    /// The key of this text.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// Its text: printable but for what the sender's tenant is named, and the
    /// same in each process that has the layer under the same name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ClaimKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClaimKey(..)")
    }
}

/// Whose claim it is: a store gives each claim another one, so that what comes
/// too late from an earlier claim changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClaimToken(u128);

impl ClaimToken {
    /// A token of the store's choice, never the same twice.
    #[must_use]
    pub const fn new(token: u128) -> Self {
        Self(token)
    }

    /// What the store chose.
    #[must_use]
    pub const fn get(self) -> u128 {
        self.0
    }
}

/// What comes of asking for a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Claim {
    /// It is new, and whoever asked has it now: to be completed or released.
    New(ClaimToken),
    /// Somebody has it, and is not done.
    InProgress,
    /// It is done.
    Completed,
    /// There is no room to remember another one.
    Full {
        /// When there will be, where that is known.
        retry_after: Option<Duration>,
    },
}

/// What a [`ReplayStore`]'s methods return.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send + 'a>>;

/// Where claims are kept, if not in this process alone: in Redis
/// (`RedisReplays`, feature `redis`), or a store of one's own.
///
/// [`claim`](Self::claim) is one atomic step. Each method answers within a time
/// limit of its own and fails then; what the layer does of it is
/// [`OnStoreError`]. Errors are logged, so they must hold no secret.
///
/// A claim in progress is freed by its release. A store that outlives this
/// process frees one, too, whose process is gone: after a time of its own
/// choice, longer than a handler takes.
///
/// `buttress_webhook::testing`, with the feature `testing`, has what every
/// implementation must do as one test.
pub trait ReplayStore: Send + Sync + 'static {
    /// Claims the message, unless it is claimed or completed. What is completed
    /// counts for `keep` from its completion.
    ///
    /// Once polled it is polled to its end, in the background if nobody waits
    /// any longer; a claim that comes of it then is released. Where it fails
    /// after it may have claimed, on a time limit say, it is the store that has
    /// to give the claim back.
    fn claim<'a>(&'a self, key: &'a ClaimKey, keep: Duration) -> StoreFuture<'a, Claim>;

    /// The message is done: it is remembered for `keep` from now. Changes
    /// nothing if somebody else has claimed it since. Called in the background,
    /// and once: where it fails the message stays in progress, and once the
    /// store has freed it, it may come again.
    fn complete<'a>(
        &'a self,
        key: &'a ClaimKey,
        token: ClaimToken,
        keep: Duration,
    ) -> StoreFuture<'a, ()>;

    /// The message may come again. Changes nothing unless the claim of this
    /// token is in progress. Called in the background.
    fn release<'a>(&'a self, key: &'a ClaimKey, token: ClaimToken) -> StoreFuture<'a, ()>;

    /// A message that was claimed in this process while the store failed
    /// ([`OnStoreError::Local`]) is done: the store, once it works again, may
    /// remember it for `keep` from now, whoever has it by then. Called in the
    /// background, and once; its failure is not told. By default nothing
    /// happens.
    fn remember<'a>(&'a self, key: &'a ClaimKey, keep: Duration) -> StoreFuture<'a, ()> {
        let _ = (key, keep);
        Box::pin(std::future::ready(Ok(())))
    }
}

/// What happens to a genuine message when the [`ReplayStore`] fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnStoreError {
    /// 503: the sender comes again (the default).
    #[default]
    Deny,
    /// It is let pass, repeat or not. It is counted.
    Allow,
    /// It is claimed in the memory of this process, which knows no repeat of
    /// what went to another one or to the store. The store is told what is
    /// done so, if it [remembers](ReplayStore::remember).
    Local,
}

/// What a repeat gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Repeat {
    /// 200 with an empty body, so that the sender stops; the handler is not
    /// called. A gRPC call, whose answer cannot be empty, is refused.
    Acknowledge,
    /// 409, or gRPC's ALREADY_EXISTS, with `Retry-After: 1` while the first is
    /// in progress.
    Refuse,
    /// The handler is called, and told by [`Verified::repeat`](crate::Verified).
    Pass,
}
