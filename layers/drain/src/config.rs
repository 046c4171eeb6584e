//! What a shutdown is made of, checked once by `build()`.

use std::{sync::Arc, time::Duration};

use buttress_core::label;

use crate::{ConfigError, Shutdown, error::Problem, watchdog::Exit};

const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Builds a [`Shutdown`].
#[derive(Clone, Debug)]
#[must_use = "there is no shutdown before `build()`"]
pub struct ShutdownBuilder {
    settings: Settings,
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// None for the default, since a builder is made at compile time.
    name: Option<Arc<str>>,
    pub(crate) drain_delay: Duration,
    pub(crate) timeout: Duration,
    pub(crate) hook_reserve: Duration,
    pub(crate) hook_limit: Duration,
    /// None where nobody may end the process.
    pub(crate) exit: Option<Exit>,
}

impl ShutdownBuilder {
    pub(crate) const fn new() -> Self {
        Self {
            settings: Settings {
                name: None,
                drain_delay: Duration::from_secs(5),
                timeout: Duration::from_secs(30),
                hook_reserve: Duration::from_secs(5),
                hook_limit: Duration::from_secs(5),
                exit: None,
            },
        }
    }

    /// Names it: for logs and metrics. 1 to 128 printable ASCII characters.
    /// Default `default`; a process that has several gives each its own.
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.settings.name = Some(name.into());
        self
    }

    /// For how long all is still served after the notice, new connections
    /// too: until load balancers and clients have heard that this process is
    /// unready. Default 5 s.
    pub fn drain_delay(mut self, delay: Duration) -> Self {
        self.settings.drain_delay = delay;
        self
    }

    /// How long all of it may take, from the trigger to the last hook. Above 0
    /// and at most a day. Default 30 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = timeout;
        self
    }

    /// What of the timeout is the hooks' alone: what is in flight is cut this
    /// long before it is over. Default 5 s.
    pub fn hook_reserve(mut self, reserve: Duration) -> Self {
        self.settings.hook_reserve = reserve;
        self
    }

    /// How long a hook may take that says nothing else of itself. Above 0 and
    /// at most a day. Default 5 s.
    pub fn hook_limit(mut self, limit: Duration) -> Self {
        self.settings.hook_limit = limit;
        self
    }

    /// Lets it end the process by `std::process::exit`: with code 1 at a second
    /// signal, and with 124 by a thread of its own, a watchdog, if all of it
    /// is not over half a second after the timeout, because the runtime is
    /// blocked. Default: it ends nothing, and a second signal
    /// [forces](Shutdown::force) it.
    ///
    /// An end that goes well is yours, too: [`Report::exit`](crate::Report::exit).
    /// When the report is there the watchdog's work is done: a `main` that
    /// returns instead waits for what its runtime still has in
    /// `spawn_blocking`, for ever if need be.
    pub fn exit_process(self) -> Self {
        self.exit_with(|code| std::process::exit(code))
    }

    /// The same with something else in the place of `std::process::exit`:
    /// called on a thread of its own.
    pub fn exit_with(mut self, exit: impl Fn(i32) + Send + Sync + 'static) -> Self {
        self.settings.exit = Some(Exit::new(exit));
        self
    }

    /// Checks the settings and makes the state that all clones share.
    ///
    /// # Errors
    ///
    /// What is wrong with the settings: see [`ConfigError`].
    pub fn build(self) -> Result<Shutdown, ConfigError> {
        let Settings {
            name: _,
            drain_delay,
            timeout,
            hook_reserve,
            hook_limit,
            exit: _,
        } = self.settings;
        if !label::is_sound(&self.settings.name(), 128) {
            return Err(Problem::Name.into());
        }
        if timeout.is_zero() || timeout > LONGEST {
            return Err(Problem::Timeout.into());
        }
        if drain_delay.saturating_add(hook_reserve) >= timeout {
            return Err(Problem::Fit.into());
        }
        if hook_limit.is_zero() || hook_limit > LONGEST {
            return Err(Problem::HookLimit.into());
        }
        Ok(Shutdown::new(self.settings))
    }
}

impl Settings {
    pub(crate) fn name(&self) -> Arc<str> {
        self.name.clone().unwrap_or_else(|| "default".into())
    }
}

/// So that the compiler can say it where it is built, not where it is used.
const _: fn() = || {
    fn fits<T: Clone + Send + Sync + 'static>() {}
    fits::<Shutdown>();
    fits::<crate::DrainSignal>();
    fn moves<T: Send + Sync + 'static>() {}
    moves::<crate::Guard>();
    moves::<crate::ConnectionGuard>();
    moves::<crate::ServerGuard>();
    moves::<crate::Reached>();
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_named() {
        let secs = Duration::from_secs;
        let new = Shutdown::builder;
        let told = |builder: ShutdownBuilder| builder.build().unwrap_err().to_string();
        for timeout in [Duration::ZERO, LONGEST + secs(1), Duration::MAX] {
            assert!(told(new().timeout(timeout)).contains("timeout"));
        }
        for limit in [Duration::ZERO, Duration::MAX] {
            assert!(told(new().hook_limit(limit)).contains("limit"));
        }
        for name in ["", "a\nb", "é", &"x".repeat(129)] {
            assert!(told(new().name(name)).contains("name"), "{name:?}");
        }
        assert_eq!(**new().build().unwrap().name(), *"default");
        let longest = "x".repeat(128);
        let named = new().name(longest.as_str()).build().unwrap();
        assert_eq!(**named.name(), longest);
        for (delay, reserve) in [
            (secs(25), secs(5)),
            (secs(30), Duration::ZERO),
            (Duration::ZERO, secs(30)),
            (Duration::MAX, Duration::MAX),
        ] {
            let error = told(new().drain_delay(delay).hook_reserve(reserve));
            assert!(error.contains("below the timeout"), "{delay:?}");
        }
        let tight = new().drain_delay(Duration::from_millis(24_999));
        assert!(tight.build().is_ok());
        let none = new()
            .drain_delay(Duration::ZERO)
            .hook_reserve(Duration::ZERO)
            .timeout(Duration::from_nanos(1));
        assert!(none.build().is_ok());
    }
}
