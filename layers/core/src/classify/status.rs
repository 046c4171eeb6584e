//! HTTP by its status.

use std::fmt;

use http::{Response, StatusCode};

use super::{Classify, Expect, Verdict, intern::Interned, upgraded};

/// HTTP by its status: 5xx are failures, unless told otherwise.
///
/// Errors are failures. A 101 is final at its head ([`Expect::Nothing`]).
///
/// One word, made to be copied into every call: it refers to a table. The
/// tables of custom rules are kept for the life of the process (240 bytes),
/// once for each that differs, the steps of a builder chain included. Build
/// them from configuration and not for each request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct StatusClassifier(&'static Rules);

#[derive(Clone, Copy, PartialEq, Eq)]
struct Rules {
    failures: StatusSet,
    ignored: StatusSet,
}

static DEFAULT: Rules = Rules {
    failures: StatusSet::SERVER_ERRORS,
    ignored: StatusSet::EMPTY,
};

static CUSTOM: Interned<Rules> = Interned::new();

impl StatusClassifier {
    /// 500 to 599 are failures, nothing is ignored.
    #[must_use]
    pub const fn new() -> Self {
        Self(&DEFAULT)
    }

    /// Replaces the statuses that are failures.
    #[must_use]
    pub fn failures(self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        Self::of(Rules {
            failures: statuses.into_iter().collect(),
            ..*self.0
        })
    }

    /// Replaces the statuses that count as nothing, even if they are among the
    /// failures.
    #[must_use]
    pub fn ignored(self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        Self::of(Rules {
            ignored: statuses.into_iter().collect(),
            ..*self.0
        })
    }

    fn of(rules: Rules) -> Self {
        if rules == DEFAULT {
            Self::new()
        } else {
            Self(CUSTOM.get(rules))
        }
    }

    #[cfg(test)]
    pub(super) fn table(self) -> *const () {
        std::ptr::from_ref(self.0).cast()
    }

    pub(super) fn status(self, status: StatusCode) -> Verdict {
        if self.0.ignored.contains(status) {
            Verdict::Ignored
        } else if self.0.failures.contains(status) {
            Verdict::Failure
        } else {
            Verdict::Success
        }
    }
}

impl Default for StatusClassifier {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for StatusClassifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StatusClassifier")
            .field("failures", &self.0.failures)
            .field("ignored", &self.0.ignored)
            .finish()
    }
}

impl<B, E> Classify<Response<B>, E> for StatusClassifier {
    fn classify(&self, result: Result<&Response<B>, &E>) -> Verdict {
        match result {
            Ok(response) => self.status(response.status()),
            Err(_) => Verdict::Failure,
        }
    }

    fn expects(&self, response: &Response<B>) -> Expect {
        if upgraded(response) {
            Expect::Nothing
        } else {
            Expect::End
        }
    }
}

/// One bit for each of 100 to 999, which is all that a status can be.
#[derive(Clone, Copy, PartialEq, Eq)]
struct StatusSet([u64; 15]);

impl StatusSet {
    const EMPTY: Self = Self([0; 15]);

    const SERVER_ERRORS: Self = {
        let mut set = Self::EMPTY;
        let mut status = 500;
        while status < 600 {
            let (word, bit) = Self::place(status);
            set.0[word] |= bit;
            status += 1;
        }
        set
    };

    const fn place(status: u16) -> (usize, u64) {
        let index = (status - 100) as usize;
        (index / 64, 1 << (index % 64))
    }

    const fn has(&self, status: u16) -> bool {
        let (word, bit) = Self::place(status);
        self.0[word] & bit != 0
    }

    fn contains(&self, status: StatusCode) -> bool {
        self.has(status.as_u16())
    }
}

impl FromIterator<StatusCode> for StatusSet {
    fn from_iter<I: IntoIterator<Item = StatusCode>>(statuses: I) -> Self {
        let mut set = Self::EMPTY;
        for status in statuses {
            let (word, bit) = Self::place(status.as_u16());
            set.0[word] |= bit;
        }
        set
    }
}

/// As ranges: `{429, 500..=599}`.
impl fmt::Debug for StatusSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ranges = f.debug_set();
        let mut from = None;
        for status in 100..=1000 {
            match (from, status < 1000 && self.has(status)) {
                (None, true) => from = Some(status),
                (Some(first), false) => {
                    if first == status - 1 {
                        ranges.entry(&first);
                    } else {
                        ranges.entry(&(first..=status - 1));
                    }
                    from = None;
                }
                _ => {}
            }
        }
        ranges.finish()
    }
}
