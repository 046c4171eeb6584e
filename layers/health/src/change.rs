//! What is told of changes, and how it gets to who listens.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use buttress_core::clock::Instant;
use tokio::sync::mpsc::{self, error::TrySendError};

use crate::{CheckState, Standing, check::caught, metrics::Metrics};

/// Something has changed.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Change {
    /// Whether the process is ready, or the reason why not. The first that is
    /// told after each start, too.
    Readiness,
    /// The score has fallen below a [mark](crate::HealthRegistryBuilder::mark),
    /// or the threshold.
    ScoreBelow(f64),
    /// The score has come back to a mark, or the threshold.
    ScoreReached(f64),
    /// What is known of a check.
    Check(Arc<str>, CheckState),
}

/// A change, and how things stood then.
///
/// How they stand is in each of them, so that whoever was too slow for some
/// knows by the last one what is the case.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Notice {
    /// What has changed.
    pub change: Change,
    /// Whether the process was ready.
    pub standing: Standing,
    /// The score.
    pub score: f64,
    /// When that was.
    pub at: Instant,
    /// How many notices before this one did not reach you, since you were too
    /// slow: 0, as a rule.
    pub missed: u64,
}

/// A user's callback.
pub(crate) type Listener =
    Arc<dyn Fn(Notice) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

pub(crate) fn listener<F>(listen: impl Fn(Notice) -> F + Send + Sync + 'static) -> Listener
where
    F: Future<Output = ()> + Send + 'static,
{
    let listen = Arc::new(listen);
    Arc::new(move |notice| {
        let listen = Arc::clone(&listen);
        Box::pin(async move { listen(notice).await })
    })
}

/// Calls a listener for each notice until there will be no more.
pub(crate) async fn deliver(listener: Listener, mut notices: mpsc::Receiver<Notice>) {
    while let Some(notice) = notices.recv().await {
        if caught(listener(notice)).await.is_none() {
            tracing::error!("a listener to changes of health panicked");
        }
    }
}

/// The near end of the channel to one listener. What does not fit takes the
/// place of what did not fit before: the newest is never lost, and what is, is
/// counted.
pub(crate) struct Outbox {
    channel: mpsc::Sender<Notice>,
    waiting: Option<Notice>,
    missed: u64,
}

impl Outbox {
    pub(crate) const fn new(channel: mpsc::Sender<Notice>) -> Self {
        Self {
            channel,
            waiting: None,
            missed: 0,
        }
    }

    /// Sends it now, or when there is room. How many were lost for it: 0 or 1.
    pub(crate) fn send(&mut self, notice: Notice) -> u64 {
        self.flush();
        let lost = u64::from(self.waiting.is_some());
        self.missed += lost;
        self.waiting = Some(notice);
        self.flush();
        lost
    }

    /// Sends what waits, if there is room by now.
    pub(crate) fn flush(&mut self) {
        let Some(mut notice) = self.waiting.take() else {
            return;
        };
        notice.missed = self.missed;
        match self.channel.try_send(notice) {
            // Nobody listens any more.
            Ok(()) | Err(TrySendError::Closed(_)) => self.missed = 0,
            Err(TrySendError::Full(notice)) => self.waiting = Some(notice),
        }
    }
}

/// The near ends of all of them.
pub(crate) struct Outboxes {
    pub(crate) boxes: Vec<Outbox>,
}

impl Outboxes {
    pub(crate) fn send(
        &mut self,
        notice: &Notice,
        registry: &str,
        missed: &AtomicU64,
        metrics: &Metrics,
    ) {
        let lost = self
            .boxes
            .iter_mut()
            .map(|outbox| outbox.send(notice.clone()))
            .sum();
        if lost > 0 {
            missed.fetch_add(lost, Relaxed);
            metrics.missed(lost);
            tracing::warn!(
                name = registry,
                lost,
                "a listener is too slow for the changes of health"
            );
        }
    }

    pub(crate) fn flush(&mut self) {
        self.boxes.iter_mut().for_each(Outbox::flush);
    }
}

impl fmt::Debug for Outboxes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Outboxes").field(&self.boxes.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn notice(number: u64) -> Notice {
        Notice {
            change: Change::Readiness,
            standing: Standing::Ready,
            score: 1.0,
            at: Instant::from_nanos(number),
            missed: 0,
        }
    }

    #[test]
    fn the_newest_is_kept_and_the_lost_are_told() {
        let (sender, mut receiver) = mpsc::channel(2);
        let mut outbox = Outbox::new(sender);
        let lost: Vec<u64> = (0..6).map(|n| outbox.send(notice(n))).collect();
        assert_eq!(lost, [0, 0, 0, 1, 1, 1]);
        let mut next = || {
            let notice = receiver.try_recv().ok()?;
            Some((notice.at.as_nanos(), notice.missed))
        };
        assert_eq!(next(), Some((0, 0)));
        assert_eq!(next(), Some((1, 0)));
        assert_eq!(next(), None);
        outbox.flush();
        assert_eq!(next(), Some((5, 3)));
        outbox.send(notice(6));
        assert_eq!(next(), Some((6, 0)));
    }

    proptest! {
        /// Whatever the listener does: what it hears is in order, what it did
        /// not hear is counted, and in the end it knows the last.
        #[test]
        fn nothing_is_lost_without_a_word(
            capacity in 1..5_usize,
            steps in proptest::collection::vec((any::<bool>(), 0..4_usize), 1..100),
        ) {
            let (sender, mut receiver) = mpsc::channel(capacity);
            let mut outbox = Outbox::new(sender);
            let (mut sent, mut lost) = (0, 0);
            let mut heard: Vec<Notice> = Vec::new();
            for (send, hear) in steps {
                if send {
                    sent += 1;
                    lost += outbox.send(notice(sent));
                } else {
                    outbox.flush();
                }
                heard.extend((0..hear).map_while(|_| receiver.try_recv().ok()));
            }
            while let Ok(notice) = receiver.try_recv() {
                heard.push(notice);
            }
            outbox.flush();
            heard.extend(receiver.try_recv());

            let missed: u64 = heard.iter().map(|notice| notice.missed).sum();
            prop_assert_eq!(missed, lost);
            prop_assert_eq!(heard.len() as u64 + missed, sent);
            prop_assert_eq!(heard.last().map_or(0, |last| last.at.as_nanos()), sent);
            let mut number = 0;
            for notice in heard {
                number += notice.missed + 1;
                prop_assert_eq!(notice.at.as_nanos(), number);
            }
        }
    }
}
