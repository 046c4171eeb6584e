//! The names of what is counted, all of them.
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `webhook_verifications_total` | counter | `name`, `scheme`, `result` | requests: `verified`, or why they were refused |
//! | `webhook_replays_total` | counter | `name`, `kind` | repeats: of what is `in_progress`, of what is `completed`; and messages for which the memory was `full` |
//! | `webhook_claims` | gauge | `name` | messages that are remembered in this process |
//! | `webhook_store_errors_total` | counter | `name`, `operation` | failures of the store to `claim`, `complete`, `release` |
//!
//! It goes to the recorder that is installed when the layer is built.

use crate::Reason;

#[cfg(feature = "metrics")]
pub(crate) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(crate) use off::Metrics;

/// What comes of a request before its repeats are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Verified,
    Refused(Reason),
    TooLarge,
    Broken,
    LookupFailed,
}

impl Verdict {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Verified => "verified",
            Self::Refused(reason) => reason.as_str(),
            Self::TooLarge => "body_too_large",
            Self::Broken => "body_broken",
            Self::LookupFailed => "lookup_failed",
        }
    }
}

/// Why a genuine message was not simply handed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    InProgress,
    Completed,
    Full,
}

impl Kind {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Full => "full",
        }
    }
}

#[cfg(feature = "metrics")]
mod on {
    use std::sync::Arc;

    use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};

    use super::{Kind, Verdict};
    use crate::Reason;

    const VERIFICATIONS: &str = "webhook_verifications_total";
    const REPLAYS: &str = "webhook_replays_total";
    const CLAIMS: &str = "webhook_claims";
    const STORE_ERRORS: &str = "webhook_store_errors_total";

    const VERDICTS: [Verdict; 15] = [
        Verdict::Verified,
        Verdict::TooLarge,
        Verdict::Broken,
        Verdict::LookupFailed,
        Verdict::Refused(Reason::MissingId),
        Verdict::Refused(Reason::MissingTimestamp),
        Verdict::Refused(Reason::MissingSignature),
        Verdict::Refused(Reason::MissingDigest),
        Verdict::Refused(Reason::Malformed),
        Verdict::Refused(Reason::SignatureMismatch),
        Verdict::Refused(Reason::TimestampTooOld),
        Verdict::Refused(Reason::TimestampTooNew),
        Verdict::Refused(Reason::UnsupportedScheme),
        Verdict::Refused(Reason::DuplicateHeader),
        Verdict::Refused(Reason::CoverageMissing),
    ];
    const KINDS: [Kind; 3] = [Kind::InProgress, Kind::Completed, Kind::Full];
    const OPERATIONS: [&str; 3] = ["claim", "complete", "release"];

    /// Looked up once: each costs one increment.
    pub(crate) struct Metrics {
        verifications: [Counter; VERDICTS.len()],
        replays: [Counter; KINDS.len()],
        store_errors: [Counter; OPERATIONS.len()],
        claims: Gauge,
    }

    impl Metrics {
        pub(crate) fn new(name: &Arc<str>, scheme: &'static str) -> Self {
            describe_counter!(VERIFICATIONS, "Signed requests, by what came of them.");
            describe_counter!(REPLAYS, "Genuine messages that were claimed already.");
            describe_gauge!(CLAIMS, "Messages that are remembered to know a repeat.");
            describe_counter!(STORE_ERRORS, "Failures of the store of claims.");
            Self {
                verifications: VERDICTS.map(|verdict| {
                    counter!(
                        VERIFICATIONS,
                        "name" => Arc::clone(name), "scheme" => scheme, "result" => verdict.as_str(),
                    )
                }),
                replays: KINDS.map(
                    |kind| counter!(REPLAYS, "name" => Arc::clone(name), "kind" => kind.as_str()),
                ),
                store_errors: OPERATIONS.map(|operation| {
                    counter!(STORE_ERRORS, "name" => Arc::clone(name), "operation" => operation)
                }),
                claims: gauge!(CLAIMS, "name" => Arc::clone(name)),
            }
        }

        pub(crate) fn judged(&self, verdict: Verdict) {
            add(&VERDICTS, &self.verifications, &verdict);
        }

        pub(crate) fn repeated(&self, kind: Kind) {
            add(&KINDS, &self.replays, &kind);
        }

        pub(crate) fn store_failed(&self, operation: &'static str) {
            add(&OPERATIONS, &self.store_errors, &operation);
        }

        /// Not set: layers of one name have one gauge.
        pub(crate) fn claims_changed(&self, before: usize, after: usize) {
            if after != before {
                #[expect(clippy::cast_precision_loss, reason = "there are not so many")]
                self.claims.increment(after as f64 - before as f64);
            }
        }
    }

    fn add<T: PartialEq>(labels: &[T], counters: &[Counter], label: &T) {
        let at = labels.iter().position(|other| other == label);
        if let Some(counter) = at.and_then(|at| counters.get(at)) {
            counter.increment(1);
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use std::sync::Arc;

    use super::{Kind, Verdict};

    /// Nothing is counted without the feature `metrics`.
    pub(crate) struct Metrics(());

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl Metrics {
        pub(crate) fn new(_: &Arc<str>, _: &'static str) -> Self {
            Self(())
        }

        #[inline]
        pub(crate) fn judged(&self, _: Verdict) {}

        #[inline]
        pub(crate) fn repeated(&self, _: Kind) {}

        #[inline]
        pub(crate) fn store_failed(&self, _: &'static str) {}

        #[inline]
        pub(crate) fn claims_changed(&self, _: usize, _: usize) {}
    }
}
