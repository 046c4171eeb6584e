//! Ours, as the benches see it.

use std::time::Duration;

use buttress_circuit_breaker::{
    CircuitBreakerLayer, Errors, ResultClassifier, Settings, State, Window,
};
use buttress_core::Any;
use buttress_redis::Redis;
use tower::{Layer, Service};

use super::{Rule, bare};

/// Longer than any run: what is open stays open.
const LONG: Duration = Duration::from_secs(24 * 3600);

fn settings(rule: Rule) -> Settings {
    let rated = Settings::new().failure_rate(0.5);
    match rule {
        Rule::Consecutive => Settings::new().consecutive_failures(5),
        Rule::Count => rated.window(Window::Calls(100)),
        Rule::Time => rated.window(Window::Time(Duration::from_secs(10))),
    }
}

/// A breaker that never closes again.
#[derive(Clone, Debug)]
pub struct Ours(CircuitBreakerLayer<Any<u64>, Errors, ResultClassifier>);

impl Ours {
    /// By that rule.
    #[must_use]
    pub fn new(rule: Rule) -> Self {
        Self::with(settings(rule))
    }

    /// With a time window.
    #[must_use]
    pub fn with_window(window: Duration) -> Self {
        Self::with(
            Settings::new()
                .failure_rate(0.5)
                .window(Window::Time(window)),
        )
    }

    fn with(settings: Settings) -> Self {
        let layer = CircuitBreakerLayer::any()
            .settings(settings.reset_timeout(LONG))
            .build()
            .expect("sound settings");
        Self(layer)
    }

    /// By that rule, and one of a fleet's. Whether its Redis is there makes no
    /// difference to a call, and so it need not be.
    ///
    /// To be made in a runtime.
    #[must_use]
    pub fn shared(rule: Rule, redis: &Redis) -> Self {
        let layer = CircuitBreakerLayer::any()
            .settings(settings(rule).reset_timeout(LONG))
            .redis(redis)
            .build()
            .expect("sound settings");
        Self(layer)
    }

    /// Over the bare service; all of these share one breaker.
    #[must_use]
    pub fn service(
        &self,
    ) -> impl Service<u64, Response = u64, Error: Send, Future: Send> + Clone + Send + use<> {
        self.0.layer(bare())
    }

    /// Empties the window.
    pub fn reset(&self) {
        self.0.breaker().reset();
    }

    /// Whether it refuses.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.breaker().state() == State::Open
    }
}
