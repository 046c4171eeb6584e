//! How often, how soon and for how long.

use std::time::Duration;

use crate::{Backoff, ConfigError};

/// The longest of all times here: a year.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// The rules of a retry: plain data, checked where a policy or a layer is
/// built from it.
///
/// | preset | attempts, the first included | first wait, up to | in all |
/// | --- | --- | --- | --- |
/// | [`quick`](Self::quick) | 2 | 100 ms | 5 s |
/// | [`standard`](Self::standard) (default) | 3 | 1 s | 30 s |
/// | [`patient`](Self::patient) | 5 | 2 s | 120 s |
/// | [`aggressive`](Self::aggressive) | 10 | 500 ms | 60 s |
///
/// All of them wait [exponentially](Backoff::exponential) with full jitter, at
/// most 10 s at a time.
///
/// ```
/// use std::time::Duration;
///
/// use buttress_retry::{Backoff, Settings};
///
/// let settings = Settings::standard()
///     .max_attempts(4)
///     .backoff(Backoff::fixed(Duration::from_millis(250)))
///     .attempt_timeout(Duration::from_secs(2));
/// ```
#[derive(Clone, Debug)]
#[must_use = "it is plain data, to be given to a policy or a layer"]
#[non_exhaustive]
pub struct Settings {
    /// See [`max_attempts`](Self::max_attempts()).
    pub max_attempts: u32,
    /// See [`backoff`](Self::backoff()).
    pub backoff: Backoff,
    /// See [`total_timeout`](Self::total_timeout()).
    pub total_timeout: Option<Duration>,
    /// See [`attempt_timeout`](Self::attempt_timeout()).
    pub attempt_timeout: Option<Duration>,
    /// See [`max_retry_after`](Self::max_retry_after()).
    pub max_retry_after: Duration,
}

impl Settings {
    fn preset(max_attempts: u32, initial: Duration, total: Duration) -> Self {
        Self {
            max_attempts,
            backoff: Backoff::exponential(initial).max(Duration::from_secs(10)),
            total_timeout: Some(total),
            attempt_timeout: None,
            max_retry_after: Duration::from_secs(300),
        }
    }

    /// Two attempts, the second within 100 ms, 5 s in all: where a person
    /// waits.
    pub fn quick() -> Self {
        Self::preset(2, Duration::from_millis(100), Duration::from_secs(5))
    }

    /// Three attempts, waits of up to 1 s and 2 s, 30 s in all.
    pub fn standard() -> Self {
        Self::preset(3, Duration::from_secs(1), Duration::from_secs(30))
    }

    /// Five attempts, waits of up to 2 s to 10 s, two minutes in all: where
    /// nobody waits.
    pub fn patient() -> Self {
        Self::preset(5, Duration::from_secs(2), Duration::from_secs(120))
    }

    /// Ten attempts, waits of up to 500 ms to 10 s, a minute in all. Only with
    /// a [budget](crate::Budget): ten times the load is what kills a callee
    /// that is ill.
    pub fn aggressive() -> Self {
        Self::preset(10, Duration::from_millis(500), Duration::from_secs(60))
    }

    /// How many attempts there are, the first included; at least 1, which is
    /// no retry at all, but for a stream that HTTP/2 refused: that attempt was
    /// none, and is made up for once whatever is set here (as gRPC's
    /// transparent retry, gRFC A6). Default: 3.
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = attempts;
        self
    }

    /// How many retries there are: one less than
    /// [`max_attempts`](Self::max_attempts).
    pub fn max_retries(self, retries: u32) -> Self {
        self.max_attempts(retries.saturating_add(1))
    }

    /// How long to wait before each retry. Default: exponential from 1 s,
    /// at most 10 s, with full jitter.
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }

    /// How long all attempts and waits may take together; `None` for no
    /// end. Default: 30 s.
    ///
    /// No wait is begun that would not end before, and the service is not
    /// waited for any longer. An attempt under way is ended by the timeout
    /// layer further in, to which the nearer of this and the
    /// [attempt's own](Self::attempt_timeout) is handed down as a
    /// [`Deadline`](buttress_core::deadline::Deadline): over HTTP an extension
    /// of the request, whose first one allocates. `None`, and no attempt's
    /// either, spares that.
    pub fn total_timeout(mut self, total: impl Into<Option<Duration>>) -> Self {
        self.total_timeout = total.into();
        self
    }

    /// How long one attempt may take, as is handed down to the timeout layer
    /// further in. Default: as long as there is in all.
    pub fn attempt_timeout(mut self, attempt: impl Into<Option<Duration>>) -> Self {
        self.attempt_timeout = attempt.into();
        self
    }

    /// The longest wait that a callee may ask for (`Retry-After`, gRPC
    /// pushback, a refusal of a layer further in). Who asks for more is not
    /// asked again, since it would be too early. Default: 5 min.
    pub fn max_retry_after(mut self, longest: Duration) -> Self {
        self.max_retry_after = longest;
        self
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        self.backoff.check()?;
        let sound =
            |span: Option<Duration>| span.is_none_or(|span| !span.is_zero() && span <= LONGEST);
        if self.max_attempts == 0 {
            return Err(ConfigError::new("there must be at least one attempt"));
        }
        if !sound(self.total_timeout) {
            return Err(ConfigError::new(
                "the total timeout must be above 0 and at most 366 days",
            ));
        }
        if !sound(self.attempt_timeout) {
            return Err(ConfigError::new(
                "the attempt timeout must be above 0 and at most 366 days",
            ));
        }
        if self.max_retry_after > LONGEST {
            return Err(ConfigError::new(
                "the longest Retry-After must be at most 366 days",
            ));
        }
        Ok(())
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self::standard()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn presets_are_what_they_are_said_to_be() {
        for (settings, attempts, initial, total) in [
            (Settings::quick(), 2, 100, 5),
            (Settings::standard(), 3, 1000, 30),
            (Settings::patient(), 5, 2000, 120),
            (Settings::aggressive(), 10, 500, 60),
        ] {
            settings.check().unwrap();
            assert_eq!(settings.max_attempts, attempts);
            assert_eq!(settings.total_timeout, Some(Duration::from_secs(total)));
            let highest = buttress_core::random::SharedRandom::new(|| u64::MAX);
            let mut delays = settings.backoff.delays();
            assert_eq!(delays.next(&settings.backoff, &highest), initial * MS);
        }
        assert_eq!(Settings::default().max_retries(4).max_attempts, 5);
        assert_eq!(
            Settings::default().max_retries(u32::MAX).max_attempts,
            u32::MAX
        );
    }

    #[test]
    fn nonsense_cannot_be_built() {
        let says = |settings: Settings| settings.check().unwrap_err().to_string();
        let new = Settings::standard;
        assert!(says(new().max_attempts(0)).contains("one attempt"));
        assert!(says(new().total_timeout(Duration::ZERO)).contains("total timeout"));
        assert!(says(new().attempt_timeout(Duration::MAX)).contains("attempt timeout"));
        assert!(says(new().max_retry_after(Duration::MAX)).contains("Retry-After"));
        new()
            .total_timeout(None)
            .attempt_timeout(MS)
            .check()
            .unwrap();
    }
}
