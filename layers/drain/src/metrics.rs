//! The names of what this layer counts, all of them.
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `drain_requests_in_flight` | gauge | `name` | requests, from the call to the end of the response's body |
//! | `drain_connections_open` | gauge | `name` | connections, upgraded ones too |
//! | `drain_duration_seconds` | histogram | `name` | how long a shutdown took, from the trigger to the last hook |
//! | `drain_cut_total` | counter | `name`, `kind` | what a shutdown cut off: `request`, `connection`, `tunnel`, `guard`, `hook` |
//!
//! `name` is the [`Shutdown`](crate::Shutdown)'s. It goes to the recorder that
//! is installed when that is built.

#[cfg(feature = "metrics")]
pub(crate) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(crate) use off::Metrics;

#[cfg(feature = "metrics")]
mod on {
    use std::{sync::Arc, time::Duration};

    use metrics::{
        Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge,
        describe_histogram, gauge, histogram,
    };

    const REQUESTS: &str = "drain_requests_in_flight";
    const CONNECTIONS: &str = "drain_connections_open";
    const DURATION: &str = "drain_duration_seconds";
    const CUT: &str = "drain_cut_total";

    /// Looked up once: a request costs one change of the gauge and one back,
    /// and a reference count.
    #[derive(Clone)]
    pub(crate) struct Metrics(Arc<Handles>);

    struct Handles {
        requests: Gauge,
        connections: Gauge,
        duration: Histogram,
        cut: [(&'static str, Counter); 5],
    }

    impl Metrics {
        pub(crate) fn new(name: &Arc<str>) -> Self {
            describe_gauge!(REQUESTS, "Requests, to the end of their responses' bodies.");
            describe_gauge!(CONNECTIONS, "Connections, upgraded ones too.");
            describe_histogram!(DURATION, Unit::Seconds, "How long a shutdown took.");
            describe_counter!(CUT, "What a shutdown cut off.");
            let cut = ["request", "connection", "tunnel", "guard", "hook"];
            Self(Arc::new(Handles {
                requests: gauge!(REQUESTS, "name" => Arc::clone(name)),
                connections: gauge!(CONNECTIONS, "name" => Arc::clone(name)),
                duration: histogram!(DURATION, "name" => Arc::clone(name)),
                cut: cut.map(|kind| {
                    let name = Arc::clone(name);
                    (kind, counter!(CUT, "name" => name, "kind" => kind))
                }),
            }))
        }

        #[inline]
        pub(crate) fn request_begins(&self) {
            self.0.requests.increment(1);
        }

        #[inline]
        pub(crate) fn request_ends(&self) {
            self.0.requests.decrement(1);
        }

        pub(crate) fn connection_begins(&self) {
            self.0.connections.increment(1);
        }

        pub(crate) fn connection_ends(&self) {
            self.0.connections.decrement(1);
        }

        pub(crate) fn took(&self, span: Duration) {
            self.0.duration.record(span);
        }

        pub(crate) fn cut(&self, kind: &'static str, count: u64) {
            for (_, counter) in self.0.cut.iter().filter(|(known, _)| *known == kind) {
                counter.increment(count);
            }
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use std::{sync::Arc, time::Duration};

    /// Nothing is counted without the feature `metrics`.
    #[derive(Clone)]
    pub(crate) struct Metrics(());

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl Metrics {
        pub(crate) fn new(_: &Arc<str>) -> Self {
            Self(())
        }

        #[inline]
        pub(crate) fn request_begins(&self) {}

        #[inline]
        pub(crate) fn request_ends(&self) {}

        #[inline]
        pub(crate) fn connection_begins(&self) {}

        #[inline]
        pub(crate) fn connection_ends(&self) {}

        #[inline]
        pub(crate) fn took(&self, _: Duration) {}

        #[inline]
        pub(crate) fn cut(&self, _: &'static str, _: u64) {}
    }
}
