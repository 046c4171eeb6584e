//! Running a check, again and again.

use std::{future::poll_fn, pin::Pin, sync::Arc, task::Poll, time::Duration};

use buttress_core::{BoxError, clock, random::SharedRandom};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, warn};

use super::{CheckCell, Failure, Outcome, unless_panicked};

/// How much of an error's text is kept, in characters.
const TEXT: usize = 512;

/// Runs a check for as long as it is polled, at once and then at every
/// interval.
pub(crate) async fn run(cell: &CheckCell, registry: &str, random: &SharedRandom, news: &Notify) {
    // A run that somebody else began is over when they are gone.
    let _turn = cell.turn.lock().await;
    loop {
        let begun = Instant::now();
        let outcome = once(cell).await;
        tell(cell, registry, &outcome);
        cell.metrics.ran(outcome.took);
        *cell.last.lock() = Some(outcome);
        news.notify_one();
        sleep_until(begun + jittered(cell.check.interval, random)).await;
    }
}

/// A tenth less to a tenth more.
fn jittered(interval: Duration, random: &SharedRandom) -> Duration {
    interval - interval / 10 + random.up_to(interval / 5)
}

async fn once(cell: &CheckCell) -> Outcome {
    let begun = clock::now();
    let answer = timeout(cell.check.timeout, caught((cell.check.ask)())).await;
    let (failure, error) = match answer {
        Ok(Some(Ok(()))) => (None, None),
        Ok(Some(Err(error))) => match unless_panicked(|| text(error)) {
            Some(error) => (Some(Failure::Error), Some(error)),
            None => (Some(Failure::Panicked), None),
        },
        Ok(None) => (Some(Failure::Panicked), None),
        Err(_) => (Some(Failure::TimedOut), None),
    };
    let at = clock::now();
    Outcome {
        failure,
        error,
        at,
        took: at - begun,
    }
}

fn tell(cell: &CheckCell, registry: &str, outcome: &Outcome) {
    let check = &**cell.name();
    let took_ms = u64::try_from(outcome.took.as_millis()).unwrap_or(u64::MAX);
    match outcome.failure {
        None => debug!(name = registry, check, took_ms, "check passed"),
        Some(failure) => {
            let error = outcome.error.as_deref();
            let how = failure.as_str();
            // Once, and not at every interval of an outage.
            if cell
                .last
                .lock()
                .as_ref()
                .is_some_and(|last| last.failure == Some(failure))
            {
                debug!(
                    name = registry,
                    check, took_ms, how, error, "check failed again"
                );
            } else {
                warn!(name = registry, check, took_ms, how, error, "check failed");
            }
        }
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "dropped here, where a panic is caught"
)]
fn text(error: BoxError) -> Arc<str> {
    let text: String = error.to_string().chars().take(TEXT).collect();
    text.into()
}

/// What the future gives, unless it panics: when polled, or when dropped.
pub(crate) async fn caught<T>(future: Pin<Box<dyn Future<Output = T> + Send>>) -> Option<T> {
    let mut future = Guarded(Some(future));
    poll_fn(|cx| {
        let Some(inner) = &mut future.0 else {
            return Poll::Ready(None);
        };
        match unless_panicked(|| inner.as_mut().poll(cx)) {
            Some(Poll::Pending) => Poll::Pending,
            Some(Poll::Ready(output)) => Poll::Ready(future.end().then_some(output)),
            None => {
                future.end();
                Poll::Ready(None)
            }
        }
    })
    .await
}

struct Guarded<F>(Option<F>);

impl<F> Guarded<F> {
    /// Whether it went quietly.
    fn end(&mut self) -> bool {
        unless_panicked(|| drop(self.0.take())).is_some()
    }
}

impl<F> Drop for Guarded<F> {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Is ready at once, and panics when it is dropped.
    struct Bomb;

    impl Future for Bomb {
        type Output = ();
        fn poll(self: Pin<&mut Self>, _: &mut std::task::Context<'_>) -> Poll<()> {
            Poll::Ready(())
        }
    }

    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("in a destructor");
        }
    }

    #[tokio::test]
    async fn panics_are_caught_wherever_they_are() {
        assert_eq!(caught(Box::pin(async { 7 })).await, Some(7));
        assert_eq!(
            caught(Box::pin(async { panic!("first poll") })).await,
            None::<()>
        );
        let later = Box::pin(async {
            tokio::task::yield_now().await;
            panic!("later");
        });
        assert_eq!(caught(later).await, None::<()>);
        assert_eq!(caught(Box::pin(Bomb)).await, None);
        let bomb = Bomb;
        let pending = Box::pin(async move {
            let _bomb = &bomb;
            std::future::pending::<()>().await;
        });
        // The panic would come out of `timeout`.
        let dropped = timeout(Duration::from_millis(1), caught(pending)).await;
        assert!(dropped.is_err());
    }

    proptest! {
        #[test]
        fn the_interval_is_moved_by_a_tenth_at_most(millis in 1..86_400_000_u64, draw: u64) {
            let interval = Duration::from_millis(millis);
            let moved = jittered(interval, &SharedRandom::new(move || draw));
            prop_assert!(moved >= interval.mul_f64(0.899_999), "{:?}", moved);
            prop_assert!(moved <= interval.mul_f64(1.100_001), "{:?}", moved);
        }
    }

    #[test]
    fn both_ends_of_the_interval_are_reached() {
        let second = Duration::from_secs(1);
        let ends = [0, u64::MAX].map(|draw| jittered(second, &SharedRandom::new(move || draw)));
        assert_eq!(
            ends,
            [Duration::from_millis(900), Duration::from_millis(1100)]
        );
    }
}
