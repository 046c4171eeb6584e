//! How far a shutdown has got, and waiting for it to get further.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::sync::futures::OwnedNotified;

use crate::shutdown::Inner;

/// How far a shutdown has got. It only ever goes forward; it may skip
/// [`Cut`](Phase::Cut), when there is nothing left to cut.
///
/// ```text
///         trigger         drain delay over    listeners dropped
/// Serving ───────▶ Draining ───────▶ Closing ────────▶ Closed
///                                       │                │ all has finished
///                                       │ deadline       ├──────────▶ Hooks ──▶ Done
///                                       └───────▶ Cut ◀──┘ deadline     ▲
///                                                  └────────────────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Phase {
    /// Nothing has been asked for.
    Serving = 0,
    /// The notice: unready, and all is served still, new connections too,
    /// until whoever sends them has heard of it.
    Draining = 1,
    /// Servers accept what waits in their backlog and drop their listeners.
    Closing = 2,
    /// No listener is left; what was accepted may finish.
    Closed = 3,
    /// The deadline: what is left is aborted.
    Cut = 4,
    /// The hooks run.
    Hooks = 5,
    /// It is over, and the report is there.
    Done = 6,
}

impl Phase {
    pub(crate) const COUNT: usize = 7;

    const ALL: [Self; Self::COUNT] = [
        Self::Serving,
        Self::Draining,
        Self::Closing,
        Self::Closed,
        Self::Cut,
        Self::Hooks,
        Self::Done,
    ];

    #[inline]
    pub(crate) const fn from_u8(byte: u8) -> Self {
        match byte {
            0 => Self::Serving,
            1 => Self::Draining,
            2 => Self::Closing,
            3 => Self::Closed,
            4 => Self::Cut,
            5 => Self::Hooks,
            _ => Self::Done,
        }
    }

    /// Those after `from`, up to this one.
    pub(crate) fn since(self, from: Self) -> &'static [Self] {
        Self::ALL
            .get(from as usize + 1..=self as usize)
            .unwrap_or_default()
    }

    /// In words for programs: `serving`, `draining`, `closing`, `closed`,
    /// `cut`, `hooks`, `done`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Draining => "draining",
            Self::Closing => "closing",
            Self::Closed => "closed",
            Self::Cut => "cut",
            Self::Hooks => "hooks",
            Self::Done => "done",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

pin_project! {
    /// Ready when a shutdown has reached a phase, or one after it.
    ///
    /// It misses nothing, whenever it is first polled; dropping it costs
    /// nothing. It borrows nothing, so that a task or a body can hold it, and
    /// after it was ready it is ready for good.
    pub struct Reached {
        inner: Arc<Inner>,
        phase: Phase,
        // Made at the first poll that has to wait.
        #[pin]
        notified: Option<OwnedNotified>,
    }
}

impl Reached {
    pub(crate) const fn new(inner: Arc<Inner>, phase: Phase) -> Self {
        Self {
            inner,
            phase,
            notified: None,
        }
    }

    /// Whether it would be ready: one atomic load.
    #[must_use]
    #[inline]
    pub fn is_reached(&self) -> bool {
        self.inner.phase() >= self.phase
    }
}

impl Future for Reached {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        loop {
            if this.inner.phase() >= *this.phase {
                this.notified.set(None);
                return Poll::Ready(());
            }
            if let Some(notified) = this.notified.as_mut().as_pin_mut() {
                ready!(notified.poll(cx));
            }
            // Hears of all that comes after this, so that the phase is looked
            // at once more.
            let notify = Arc::clone(this.inner.reached(*this.phase));
            this.notified.set(Some(notify.notified_owned()));
            if this.inner.phase() < *this.phase
                && let Some(notified) = this.notified.as_mut().as_pin_mut()
            {
                ready!(notified.poll(cx));
            }
        }
    }
}

impl fmt::Debug for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reached")
            .field("phase", &self.phase)
            .field("reached", &self.is_reached())
            .finish_non_exhaustive()
    }
}
