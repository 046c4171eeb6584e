//! The names of what this layer counts, all of them.
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `circuit_breaker_state` | gauge | `name` | 0 closed (forced and metrics-only too), 1 half-open, 2 open (forced too) |
//! | `circuit_breaker_state_changes_total` | counter | `name`, `from`, `to`: `closed`, `open`, `half_open`, `forced_open`, `forced_closed`, `metrics_only` | changes of state |
//! | `circuit_breaker_requests_total` | counter | `name`, `result`: `success`, `failure`, `ignored` | calls that were let through, when their result is known |
//! | `circuit_breaker_rejections_total` | counter | `name`, `reason`: `open`, `half_open`, `forced_open` | calls refused |
//!
//! Where the breakers of a registry share a name (see
//! [`name_keys`](crate::RegistryBuilder::name_keys)), the counters are of all of
//! them, and the gauge is of the worst: 2 if one is open.
//!
//! The gauge of a breaker that is gone is 0. Two breakers that were each given
//! the same name write one gauge, which shows whoever changed last: name them
//! apart, or take one for both.
//!
//! Of breakers that are [shared](crate::BreakerBuilder), with the feature `redis`:
//!
//! | metric | kind | labels | counts |
//! | --- | --- | --- | --- |
//! | `circuit_breaker_fleet_changes_total` | counter | `fleet`, `result`: `took`, `voted`, `lost`, `failed` | changes told, by what became of them; `failed` is no answer |
//! | `circuit_breaker_fleet_news_total` | counter | `fleet`, `via`: `message`, `pull` | changes heard of, one's own among them |
//! | `circuit_breaker_fleet_up` | gauge | `fleet` | 1 while the fleet can be asked, else 0 |
//!
//! They go to the recorder that is installed when the breaker is built.

#[cfg(feature = "metrics")]
pub(crate) use on::Metrics;

#[cfg(not(feature = "metrics"))]
pub(crate) use off::Metrics;

#[cfg(all(feature = "redis", feature = "metrics"))]
pub(crate) use fleet::FleetMetrics;

#[cfg(all(feature = "redis", not(feature = "metrics")))]
pub(crate) use off::FleetMetrics;

#[cfg(feature = "metrics")]
mod on {
    use std::sync::atomic::{AtomicI64, Ordering::SeqCst};

    use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};

    use crate::{Event, Reason, State};

    const STATE: &str = "circuit_breaker_state";
    const CHANGES: &str = "circuit_breaker_state_changes_total";
    const REQUESTS: &str = "circuit_breaker_requests_total";
    const REJECTIONS: &str = "circuit_breaker_rejections_total";

    /// Looked up once: a call costs one increment.
    pub(crate) struct Metrics {
        name: std::sync::Arc<str>,
        state: Gauge,
        success: Counter,
        failure: Counter,
        ignored: Counter,
        rejections: [Counter; 3],
        /// Where several breakers share the name.
        tally: Option<Tally>,
    }

    /// How many breakers are not closed. What is told of them comes in any
    /// order, so that these are below zero at times.
    #[derive(Default)]
    struct Tally {
        half_open: AtomicI64,
        open: AtomicI64,
    }

    impl Tally {
        fn add(&self, state: State, more: i64) {
            match state {
                State::Closed | State::ForcedClosed | State::MetricsOnly => return,
                State::HalfOpen => &self.half_open,
                State::Open | State::ForcedOpen => &self.open,
            }
            .fetch_add(more, SeqCst);
        }

        fn worst(&self) -> State {
            if self.open.load(SeqCst) > 0 {
                State::Open
            } else if self.half_open.load(SeqCst) > 0 {
                State::HalfOpen
            } else {
                State::Closed
            }
        }
    }

    impl Metrics {
        /// Those of all breakers that share this name.
        pub(crate) fn of_many(name: &std::sync::Arc<str>) -> Self {
            Self {
                tally: Some(Tally::default()),
                ..Self::new(name)
            }
        }

        pub(crate) fn new(name: &std::sync::Arc<str>) -> Self {
            describe_gauge!(STATE, "0 closed, 1 half-open, 2 open.");
            describe_counter!(CHANGES, "Changes of a circuit breaker's state.");
            describe_counter!(REQUESTS, "Calls let through, by their result.");
            describe_counter!(REJECTIONS, "Calls refused by an open circuit breaker.");
            let requests = |result: &'static str| counter!(REQUESTS, "name" => std::sync::Arc::clone(name), "result" => result);
            let state = gauge!(STATE, "name" => std::sync::Arc::clone(name));
            state.set(0.0);
            Self {
                state,
                success: requests("success"),
                failure: requests("failure"),
                ignored: requests("ignored"),
                rejections: Reason::ALL.map(|reason| {
                    let name = std::sync::Arc::clone(name);
                    counter!(REJECTIONS, "name" => name, "reason" => reason.as_str())
                }),
                name: std::sync::Arc::clone(name),
                tally: None,
            }
        }

        pub(crate) const fn is_on() -> bool {
            true
        }

        pub(crate) fn event(&self, event: &Event) {
            match event {
                Event::StateChange(transition) => {
                    let (from, to) = (transition.from.as_str(), transition.to.as_str());
                    let name = std::sync::Arc::clone(&self.name);
                    counter!(CHANGES, "name" => name, "from" => from, "to" => to).increment(1);
                    if let Some(tally) = &self.tally {
                        tally.add(transition.from, -1);
                        tally.add(transition.to, 1);
                        self.show_worst(tally);
                    }
                }
                Event::Success { .. } => self.success.increment(1),
                Event::Failure { .. } => self.failure.increment(1),
                Event::Ignored => self.ignored.increment(1),
                Event::Rejected(reason) => self.rejections[*reason as usize].increment(1),
                Event::Call | Event::WouldOpen(_) => {}
            }
        }

        /// Called in the order of the changes, which events need not be.
        pub(crate) fn state(&self, state: State) {
            if self.tally.is_none() {
                self.show(state);
            }
        }

        /// A breaker is gone, in this state.
        pub(crate) fn gone(&self, state: State) {
            if let Some(tally) = &self.tally {
                tally.add(state, -1);
                self.show_worst(tally);
            } else if value(state) > 0.0 {
                // An alert on what is not there any more would never end.
                self.show(State::Closed);
            }
        }

        fn show_worst(&self, tally: &Tally) {
            loop {
                let worst = tally.worst();
                self.show(worst);
                if tally.worst() == worst {
                    break;
                }
            }
        }

        fn show(&self, state: State) {
            self.state.set(value(state));
        }
    }

    /// What the gauge shows of a state.
    const fn value(state: State) -> f64 {
        match state {
            State::Closed | State::ForcedClosed | State::MetricsOnly => 0.0,
            State::HalfOpen => 1.0,
            State::Open | State::ForcedOpen => 2.0,
        }
    }
}

#[cfg(all(feature = "redis", feature = "metrics"))]
mod fleet {
    use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};

    use crate::shared::{Op, Verdict};

    const CHANGES: &str = "circuit_breaker_fleet_changes_total";
    const NEWS: &str = "circuit_breaker_fleet_news_total";
    const UP: &str = "circuit_breaker_fleet_up";

    pub(crate) struct FleetMetrics {
        /// By verdict, and failed ones.
        changes: [(&'static str, Counter); 4],
        message: Counter,
        pull: Counter,
        up: Gauge,
    }

    impl FleetMetrics {
        pub(crate) fn new(fleet: &str) -> Self {
            describe_counter!(
                CHANGES,
                "Changes told to the fleet, by what became of them."
            );
            describe_counter!(NEWS, "Changes heard of in the fleet.");
            describe_gauge!(UP, "1 while the fleet can be asked.");
            let fleet: std::sync::Arc<str> = fleet.into();
            let news = |via: &'static str| counter!(NEWS, "fleet" => std::sync::Arc::clone(&fleet), "via" => via);
            let up = gauge!(UP, "fleet" => std::sync::Arc::clone(&fleet));
            up.set(0.0);
            Self {
                changes: ["took", "voted", "lost", "failed"].map(|result| {
                    let fleet = std::sync::Arc::clone(&fleet);
                    (
                        result,
                        counter!(CHANGES, "fleet" => fleet, "result" => result),
                    )
                }),
                message: news("message"),
                pull: news("pull"),
                up,
            }
        }

        pub(crate) fn answered(&self, op: Op, verdict: Verdict) {
            if op != Op::Read {
                self.changed(verdict.as_str());
            }
        }

        pub(crate) fn failed(&self) {
            self.changed("failed");
        }

        fn changed(&self, result: &str) {
            for (known, counter) in &self.changes {
                if *known == result {
                    counter.increment(1);
                }
            }
        }

        pub(crate) fn message(&self) {
            self.message.increment(1);
        }

        pub(crate) fn pulled(&self) {
            self.pull.increment(1);
        }

        pub(crate) fn up(&self, up: bool) {
            self.up.set(if up { 1.0 } else { 0.0 });
        }
    }
}

#[cfg(not(feature = "metrics"))]
mod off {
    use crate::{Event, State};

    /// Nothing is counted without the feature `metrics`.
    pub(crate) struct Metrics(());

    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl Metrics {
        pub(crate) fn new(_: &std::sync::Arc<str>) -> Self {
            Self(())
        }

        pub(crate) fn of_many(_: &std::sync::Arc<str>) -> Self {
            Self(())
        }

        pub(crate) const fn is_on() -> bool {
            false
        }

        #[inline]
        pub(crate) fn event(&self, _: &Event) {}
        #[inline]
        pub(crate) fn state(&self, _: State) {}
        #[inline]
        pub(crate) fn gone(&self, _: State) {}
    }

    #[cfg(feature = "redis")]
    pub(crate) struct FleetMetrics(());

    #[cfg(feature = "redis")]
    #[expect(clippy::unused_self, reason = "the same shape as with the feature")]
    impl FleetMetrics {
        pub(crate) fn new(_: &str) -> Self {
            Self(())
        }

        #[inline]
        pub(crate) fn answered(&self, _: crate::shared::Op, _: crate::shared::Verdict) {}
        #[inline]
        pub(crate) fn failed(&self) {}
        #[inline]
        pub(crate) fn message(&self) {}
        #[inline]
        pub(crate) fn pulled(&self) {}
        #[inline]
        pub(crate) fn up(&self, _: bool) {}
    }
}
