//! What the guard says when it says no.

use std::{error::Error, fmt, io};

/// The [`Guard`](super::Guard) let no connection be made.
///
/// It names the rule and never the address, which the one who chose the name
/// would learn our network from. In the chain of a client's error it is found
/// by [`Denied::of`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Denied {
    rule: Rule,
}

/// What a [`Denied`] was denied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// Not `https`, nor an `http` that was allowed.
    Scheme,
    /// A user or a password before the host.
    Userinfo,
    /// Port 0, or none of those that were named.
    Port,
    /// No host, or one that is neither a name nor an address in its plain
    /// form.
    Host,
    /// An address that is not public and that nothing allows; of a name: all
    /// of its addresses were denied, the first of them by this.
    Address,
    /// A network that was denied by hand; of a name as above.
    DenyList,
}

impl Denied {
    pub(super) const fn new(rule: Rule) -> Self {
        Self { rule }
    }

    /// The rule that it was denied by.
    #[must_use]
    pub const fn rule(&self) -> Rule {
        self.rule
    }

    /// The `Denied` in an error or in what caused it: why a client's call
    /// failed, where it was this. A failure to deliver for which there is one
    /// is not worth a retry soon.
    #[must_use]
    pub fn of<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(denied) = error.downcast_ref() {
                return Some(denied);
            }
            cause = match error.downcast_ref::<io::Error>() {
                // Its `source` is the source of what it wraps.
                Some(io) => io.get_ref().map(|inner| inner as _),
                None => error.source(),
            };
        }
        None
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.rule {
            Rule::Scheme => "the scheme may not be used",
            Rule::Userinfo => "a URI may not hold a user or a password",
            Rule::Port => "the port may not be dialled",
            Rule::Host => "the host is neither a name nor an address in its plain form",
            Rule::Address => "the address is not a public one",
            Rule::DenyList => "the address is denied",
        })
    }
}

impl Error for Denied {}
