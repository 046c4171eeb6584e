//! A paused clock.

use std::time::Duration;

use tokio::{
    task::yield_now,
    time::{self, Instant},
};

/// Lets a paused clock run on by exactly this long, and everything that is due
/// on the way happen at its own time: an interval ticks at each of its ticks.
/// (`tokio::time::advance` jumps, and they all come at the end; so here do
/// those of the last two milliseconds.)
///
/// What becomes due at the very end has run, too, when this returns, as far as
/// [`settle`] can tell.
///
/// # Panics
///
/// Unless the clock is paused (`#[tokio::test(start_paused = true)]`), on the
/// current-thread runtime.
pub async fn advance(span: Duration) {
    // A sleep on tokio's paused clock may end late by almost two of its ticks
    // of a millisecond: sleep to before the end, and jump the rest.
    const SLACK: Duration = Duration::from_millis(2);

    // Panics here, and not in the middle, when the clock is not paused.
    time::advance(Duration::ZERO).await;
    let end = Instant::now() + span;
    if span > SLACK {
        time::sleep_until(end - SLACK).await;
    }
    time::advance(end.saturating_duration_since(Instant::now())).await;
    settle().await;
}

/// Gives the other tasks of a current-thread runtime their turns, without
/// moving the clock: enough that a chain of a hundred wake-ups ends.
pub async fn settle() {
    for _ in 0..100 {
        yield_now().await;
    }
}

/// How long this took, on tokio's clock, and what came of it. Paused, the
/// clock shows what was waited for, exactly, and nothing else; timers are
/// rounded up to a millisecond.
///
/// ```
/// use std::time::Duration;
/// use buttress_core::testing::elapsed;
/// use tokio::time::sleep;
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let (took, ()) = elapsed(sleep(Duration::from_secs(3600))).await;
/// assert_eq!(took, Duration::from_secs(3600));
/// # }
/// ```
pub async fn elapsed<F: Future>(future: F) -> (Duration, F::Output) {
    let start = Instant::now();
    let output = future.await;
    (start.elapsed(), output)
}
