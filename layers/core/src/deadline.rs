//! Deadlines: until when an answer is of use, handed down a stack.
//!
//! A layer that sets one (a timeout, a retry with a total deadline) attaches
//! it to the request's extensions. Layers further in read it there: one that
//! would have to wait beyond it gives up at once, a timeout does not run past
//! it. Going inwards a deadline only ever comes nearer.
//!
//! ```
//! use std::time::Duration;
//! use buttress_core::{clock, deadline::Deadline};
//! use http::Request;
//!
//! let mut request = Request::new(());
//! Deadline::after(Duration::from_secs(2)).attach(request.extensions_mut());
//! // A layer further in would grant more; what is there is nearer.
//! Deadline::after(Duration::from_secs(30)).attach(request.extensions_mut());
//!
//! let deadline = Deadline::of(request.extensions()).unwrap();
//! assert!(deadline.remaining(clock::now()) <= Duration::from_secs(2));
//! ```

use std::time::Duration;

use http::Extensions;

use crate::clock::{self, Instant};

/// The moment, on the monotonic clock, from which an answer is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Deadline(Instant);

impl Deadline {
    /// At this moment.
    #[must_use]
    pub const fn at(instant: Instant) -> Self {
        Self(instant)
    }

    /// This long from now.
    #[must_use]
    pub fn after(span: Duration) -> Self {
        Self(clock::now() + span)
    }

    /// The moment.
    #[must_use]
    pub const fn instant(self) -> Instant {
        self.0
    }

    /// How long there is from `now`; zero when it is past.
    #[must_use]
    pub const fn remaining(self, now: Instant) -> Duration {
        self.0.saturating_duration_since(now)
    }

    /// Whether nothing remains: at the moment itself, too.
    #[must_use]
    pub const fn is_past(self, now: Instant) -> bool {
        self.remaining(now).is_zero()
    }

    /// The nearer of the two.
    #[must_use]
    pub fn earliest(self, other: Self) -> Self {
        self.min(other)
    }

    /// The one that was attached, if one was.
    #[must_use]
    pub fn of(extensions: &Extensions) -> Option<Self> {
        extensions.get().copied()
    }

    /// Attaches it, unless one that is nearer is there already. Returns the
    /// one that holds.
    ///
    /// The first extension of a request allocates: attach a deadline where one
    /// was asked for.
    pub fn attach(self, extensions: &mut Extensions) -> Self {
        match Self::of(extensions) {
            Some(there) if there <= self => there,
            _ => {
                extensions.insert(self);
                self
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(nanos: u64) -> Deadline {
        Deadline::at(Instant::from_nanos(nanos))
    }

    #[test]
    fn it_is_past_when_nothing_remains() {
        let deadline = at(100);
        let now = Instant::from_nanos;
        assert_eq!(deadline.remaining(now(40)), Duration::from_nanos(60));
        assert!(!deadline.is_past(now(99)));
        assert!(deadline.is_past(now(100)));
        assert_eq!(deadline.remaining(now(500)), Duration::ZERO);
    }

    #[test]
    fn the_nearer_one_holds() {
        let mut extensions = Extensions::new();
        assert_eq!(Deadline::of(&extensions), None);
        assert_eq!(at(7).attach(&mut extensions), at(7));
        assert_eq!(at(9).attach(&mut extensions), at(7));
        assert_eq!(Deadline::of(&extensions), Some(at(7)));
        assert_eq!(at(5).attach(&mut extensions), at(5));
        assert_eq!(Deadline::of(&extensions), Some(at(5)));
        assert_eq!(at(1).earliest(at(2)), at(1));
        assert_eq!(at(2).earliest(at(1)), at(1));
    }

    #[test]
    fn after_is_from_now_and_does_not_wrap() {
        let before = clock::now();
        let deadline = Deadline::after(Duration::from_secs(5));
        assert!(deadline.instant() >= before + Duration::from_secs(5));
        assert!(!Deadline::after(Duration::MAX).is_past(before));
    }
}
