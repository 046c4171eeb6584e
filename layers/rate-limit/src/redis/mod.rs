//! One quota for a whole fleet, in Redis.

mod ask;
mod fleet;
mod ground;
mod lane;
mod lease;
mod script;
mod strict;

pub use lease::Lease;

/// How processes share a quota.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// What passes was charged in Redis first. The default.
    #[default]
    Strict,
    /// Tokens are taken ahead, and charged in this process.
    Leased(Lease),
}

impl Mode {
    /// Leased, as it comes.
    #[must_use]
    pub fn leased() -> Self {
        Self::Leased(Lease::default())
    }
}
