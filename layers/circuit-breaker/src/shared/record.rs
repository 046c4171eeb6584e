//! What the fleet knows of one breaker, and what a node asks to be done with
//! it. Pure.

use std::{fmt, time::Duration};

use crate::State;

/// Who writes: drawn at random for each breaker of each process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodeId(pub(crate) u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// How a breaker stands in the fleet. What is left is told by the server's
/// clock alone, as a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Closed,
    /// For so long yet.
    Open(Duration),
    /// One node has leave to probe, for so long yet.
    Probing {
        left: Duration,
        ours: bool,
    },
    /// An override.
    Forced(State),
}

impl Standing {
    /// As it is written: what is left in milliseconds apart.
    pub(crate) fn parse(code: &str, left: u64, ours: bool) -> Option<Self> {
        let left = Duration::from_millis(left);
        Some(match code {
            "c" => Self::Closed,
            "o" => Self::Open(left),
            "p" => Self::Probing { left, ours },
            "fo" => Self::Forced(State::ForcedOpen),
            "fc" => Self::Forced(State::ForcedClosed),
            "m" => Self::Forced(State::MetricsOnly),
            _ => return None,
        })
    }
}

/// The code of a state that is brought about by hand.
pub(crate) const fn code(state: State) -> &'static str {
    match state {
        State::Closed => "c",
        State::Open => "o",
        State::HalfOpen => "p",
        State::ForcedOpen => "fo",
        State::ForcedClosed => "fc",
        State::MetricsOnly => "m",
    }
}

/// A breaker's record. Versions only grow, and are the fleet's: no two records
/// have one. Zero is that of what is not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) version: u64,
    pub(crate) standing: Standing,
}

impl Seen {
    /// Whether it is the same record, whatever is left of it. Versions of a
    /// history that is lost may come again if the server's clock was set back.
    pub(crate) fn is(&self, other: &Self) -> bool {
        let same = match (self.standing, other.standing) {
            (Standing::Open(_), Standing::Open(_)) => true,
            (Standing::Probing { ours: one, .. }, Standing::Probing { ours: two, .. }) => {
                one == two
            }
            (one, two) => one == two,
        };
        same && self.version == other.version
    }
}

/// What a node asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// To be told.
    Read,
    /// A rule held: open for so long; and where it is open already, for as long
    /// as the callee asked to be left alone, if it did.
    Trip { wait: Duration, asked: Duration },
    /// A probe failed.
    Reopen { wait: Duration, asked: Duration },
    /// Leave to probe for so long; by hand, whoever has it.
    Claim { lease: Duration, by_hand: bool },
    /// Probes have succeeded.
    Close,
    /// By hand. An override stands over all but what was done by hand since.
    Hand { to: State, wait: Duration },
    /// To keep the record of an override that stands: no new word.
    Keep { to: State },
}

/// An [`Op`], and what it was decided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) op: Op,
    /// The version of the record that is known.
    pub(crate) base: u64,
    /// How long ago it happened.
    pub(crate) age: Duration,
    /// The generation of the breaker it speaks of.
    pub(crate) generation: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is so now.
    Took,
    /// A vote was cast, and it was not the last that it takes.
    Voted,
    /// It is otherwise.
    Lost,
}

impl Verdict {
    pub(crate) fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "took" => Self::Took,
            "voted" => Self::Voted,
            "lost" => Self::Lost,
            _ => return None,
        })
    }

    #[cfg(feature = "metrics")]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Took => "took",
            Self::Voted => "voted",
            Self::Lost => "lost",
        }
    }
}

/// The answer, with the record as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) verdict: Verdict,
    pub(crate) seen: Seen,
}

/// A change, as it is told to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    pub(crate) version: u64,
    /// The version of the change before it, of whatever breaker.
    pub(crate) previous: u64,
    pub(crate) code: &'a str,
    /// Milliseconds.
    pub(crate) left: u64,
    pub(crate) owner: Option<NodeId>,
    pub(crate) key: &'a str,
}

impl<'a> Message<'a> {
    /// `version previous code left owner key`; `None` for what is none.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut words = text.splitn(6, ' ');
        let mut word = || words.next();
        let message = Self {
            version: word()?.parse().ok()?,
            previous: word()?.parse().ok()?,
            code: word()?,
            left: word()?.parse().ok()?,
            owner: u64::from_str_radix(word()?, 16).ok().map(NodeId),
            key: word()?,
        };
        message.seen_by(None).map(|_| message)
    }

    /// What it says to this node.
    pub(crate) fn seen_by(&self, node: Option<NodeId>) -> Option<Seen> {
        let ours = node.is_some() && self.owner == node;
        Some(Seen {
            version: self.version,
            standing: Standing::parse(self.code, self.left, ours)?,
        })
    }
}

/// Up to which version all changes of the fleet are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Watermark {
    /// When the history of these versions was begun; 0 if none was seen.
    epoch: u64,
    version: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Known already.
    Old,
    Next,
    /// There is one between that was missed.
    Gap,
}

impl Watermark {
    /// A change was told, after another.
    pub(crate) fn told(&mut self, version: u64, previous: u64) -> Order {
        // With none before it a history begins: maybe anew.
        if self.epoch == 0 || previous == 0 {
            Order::Gap
        } else if version <= self.version {
            Order::Old
        } else if previous == self.version {
            self.version = version;
            Order::Next
        } else {
            Order::Gap
        }
    }

    /// Of which history, and since when, it is to be asked.
    pub(crate) fn since(self) -> (u64, u64) {
        (self.epoch, self.version)
    }

    /// Whether all is to be looked at when this is the latest version: at
    /// first, and when history is lost.
    pub(crate) fn wants_all(self, epoch: u64, latest: u64) -> bool {
        self.epoch == 0 || epoch != self.epoch || latest < self.version
    }

    /// All that has changed up to there was looked at.
    pub(crate) fn pulled(&mut self, epoch: u64, latest: u64) {
        *self = Self {
            epoch,
            version: latest,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_or_refused() {
        let message =
            Message::parse(b"12 11 p 3000 00000000000000ff buttress:x:{a b}:c d").unwrap();
        assert_eq!((message.version, message.previous), (12, 11));
        assert_eq!(message.key, "buttress:x:{a b}:c d");
        let seen = |node| message.seen_by(node).unwrap().standing;
        let left = Duration::from_secs(3);
        assert_eq!(
            seen(Some(NodeId(255))),
            Standing::Probing { left, ours: true }
        );
        assert_eq!(
            seen(Some(NodeId(254))),
            Standing::Probing { left, ours: false }
        );
        for wrong in [
            &b""[..],
            b"12 11 p 3000 ff",
            b"x 11 p 3000 ff key",
            b"12 11 z 3000 ff key",
            b"12 11 p -1 ff key",
            b"\xff\xff",
        ] {
            assert_eq!(Message::parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn codes_are_read_back() {
        for state in [
            State::Closed,
            State::Open,
            State::HalfOpen,
            State::ForcedOpen,
            State::ForcedClosed,
            State::MetricsOnly,
        ] {
            let standing = Standing::parse(code(state), 7, false).unwrap();
            assert_eq!(
                standing,
                match state {
                    State::Closed => Standing::Closed,
                    State::Open => Standing::Open(Duration::from_millis(7)),
                    State::HalfOpen => Standing::Probing {
                        left: Duration::from_millis(7),
                        ours: false
                    },
                    state => Standing::Forced(state),
                }
            );
        }
    }
}
