//! The names of what the signing layer counts, all of them.
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `webhook_signatures_total` | counter | `name`, `scheme`, `result` | requests by each scheme of the signer: `signed`; `too_large`, `body` (it broke off) and `unsignable`, which were not sent |
//!
//! It goes to the recorder that is installed when the layer is built, or given
//! another signer.

#[cfg(feature = "metrics")]
pub(crate) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(crate) use off::Metrics;

#[cfg(feature = "metrics")]
mod on {
    use std::sync::Arc;

    use metrics::{Counter, counter, describe_counter};

    use crate::{Signer, sign::Cause};

    const SIGNATURES: &str = "webhook_signatures_total";
    const SIGNED: &str = "signed";
    const RESULTS: [&str; 4] = [SIGNED, "too_large", "body", "unsignable"];

    /// Looked up once for a signer: a request costs one increment for each of
    /// its schemes.
    pub(crate) struct Metrics(Vec<[Counter; RESULTS.len()]>);

    impl Metrics {
        pub(crate) fn new(name: &Arc<str>, signer: &Signer) -> Self {
            describe_counter!(SIGNATURES, "Requests that were to be signed.");
            let counters = |scheme: &'static str| {
                RESULTS.map(|result| {
                    counter!(
                        SIGNATURES,
                        "name" => Arc::clone(name), "scheme" => scheme, "result" => result,
                    )
                })
            };
            Self(signer.schemes().map(counters).collect())
        }

        pub(crate) fn signed(&self) {
            self.count(SIGNED);
        }

        pub(crate) fn not_signed(&self, cause: &Cause) {
            self.count(cause.as_str());
        }

        fn count(&self, result: &str) {
            let at = RESULTS.iter().position(|one| *one == result);
            let at = at.expect("every result has a counter");
            for counters in &self.0 {
                counters[at].increment(1);
            }
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use crate::{Signer, sign::Cause};

    /// Nothing is counted without the feature `metrics`.
    pub(crate) struct Metrics(());

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl Metrics {
        pub(crate) fn new(_: &std::sync::Arc<str>, _: &Signer) -> Self {
            Self(())
        }

        #[inline]
        pub(crate) fn signed(&self) {}

        #[inline]
        pub(crate) fn not_signed(&self, _: &Cause) {}
    }
}
