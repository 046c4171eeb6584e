//! What can be wrong with a configuration.

use std::{borrow::Cow, error::Error, fmt};

/// A configuration that makes no sense, found by `build()`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigError {
    /// A quota of no requests.
    ZeroLimit,
    /// A quota in no time.
    ZeroPeriod,
    /// A quota of which none may come at once.
    ZeroBurst,
    /// More than one request a nanosecond.
    TooFast,
    /// The burst takes more than nine years to come back.
    TooSlow,
    /// A layer without a limit.
    NoLimit,
    /// More limits than one layer decides together.
    TooManyLimits,
    /// Two limits of one name.
    DuplicateName(Cow<'static, str>),
    /// A limit's name that a header cannot carry.
    BadName(Cow<'static, str>),
    /// Room for no key.
    ZeroKeys,
    /// A fixed cost of more than the burst: nothing would ever pass.
    CostAboveBurst,
    /// Waiting for no time, or with room for nobody.
    NothingWaits,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ZeroLimit => "a quota's limit must be at least 1",
            Self::ZeroPeriod => "a quota's period must be longer than zero",
            Self::ZeroBurst => "a quota's burst must be at least 1",
            Self::TooFast => "a quota must not allow more than one request a nanosecond",
            Self::TooSlow => "a quota's burst must come back within nine years",
            Self::NoLimit => "a rate limit needs at least one limit",
            Self::TooManyLimits => "one layer decides at most 8 limits together",
            Self::DuplicateName(name) => {
                return write!(f, "two limits of one layer are named {name:?}");
            }
            Self::BadName(name) => {
                return write!(
                    f,
                    "the limit's name {name:?} must be 1 to 64 printable ASCII characters"
                );
            }
            Self::ZeroKeys => "max_keys must be at least 1",
            Self::CostAboveBurst => "a fixed cost must not be above the burst",
            Self::NothingWaits => "wait mode needs a longest wait and room for at least one",
        })
    }
}

impl Error for ConfigError {}
