//! Any fallible async function, retried.

use std::{
    error::Error as StdError,
    fmt,
    future::{Future, Pending, pending},
    pin::pin,
    task::Poll,
    time::Duration,
};

use buttress_core::{
    Inspect, RefusalKind,
    classify::Verdict,
    clock::{self, Instant},
    deadline::Deadline,
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use crate::{
    Again, Cause, GiveUp, RetryPolicy,
    call::{Judged, Plain, of_any},
    policy::Shared,
    session::{Seen, Session},
};

impl RetryPolicy {
    /// Runs `f` until it succeeds, or the rules say that it is enough. Every
    /// `Err` is worth another attempt, but for
    /// [refusals](buttress_core::Refusal) that say that it is not, or not yet.
    /// A [`runner`](Self::runner) can be told otherwise.
    ///
    /// Here the timeouts are enforced: an attempt that takes longer than it may
    /// is dropped, and counts as one that failed. Dropping the future drops the
    /// attempt under way, and there is no further one.
    ///
    /// # Errors
    ///
    /// [`RetryError`] with the last error, and what came of the last attempt.
    ///
    /// ```
    /// use buttress_retry::{RetryPolicy, Settings};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # tokio::time::pause();
    /// let policy = RetryPolicy::builder().settings(Settings::patient()).build()?;
    /// let mut asked = 0;
    /// let answer = policy
    ///     .run(|| {
    ///         asked += 1;
    ///         let answer = if asked < 3 { Err(std::io::Error::other("not yet")) } else { Ok(42) };
    ///         async move { answer }
    ///     })
    ///     .await?;
    /// assert_eq!((answer, asked), (42, 3));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn run<F, Fut, T, E>(&self, f: F) -> Result<T, RetryError<E>>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, E>>,
        E: Inspect,
    {
        self.runner().run(f).await
    }

    /// Runs functions whose errors are of another kind, or that can be told to
    /// stop.
    pub fn runner(&self) -> Runner<'_> {
        Runner {
            policy: self,
            deadline: None,
            judge: AllErrors,
            stop: Never,
        }
    }
}

/// Runs functions by a [`RetryPolicy`].
///
/// ```
/// use buttress_retry::{AbortHandle, GiveUp, RetryPolicy};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = RetryPolicy::builder().build()?;
/// let abort = AbortHandle::new();
/// let never = policy
///     .runner()
///     .retry_if(|error: &&str| *error != "no such city")
///     .stop_on(abort.aborted())
///     .run(async || Err::<(), _>("the line is busy"));
/// abort.abort();
/// let error = never.await.unwrap_err();
/// assert_eq!(error.reason(), Some(GiveUp::Aborted));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use = "nothing runs before `run()`"]
pub struct Runner<'a, J = AllErrors, S = Never> {
    policy: &'a RetryPolicy,
    deadline: Option<Deadline>,
    judge: J,
    stop: S,
}

/// Every error is worth another attempt, but for refusals that say otherwise.
#[derive(Clone, Copy, Debug)]
pub struct AllErrors;

/// Nobody says to stop.
#[derive(Clone, Copy, Debug)]
pub struct Never;

impl IntoFuture for Never {
    type Output = ();
    type IntoFuture = Pending<()>;

    fn into_future(self) -> Pending<()> {
        pending()
    }
}

/// Which errors of a function are worth another attempt: [`AllErrors`], or
/// those that a closure says.
pub trait JudgeError<E> {
    /// What there is to it.
    #[doc(hidden)]
    fn judge(&mut self, error: &E) -> Option<Judged>;
}

impl<E: Inspect> JudgeError<E> for AllErrors {
    fn judge(&mut self, error: &E) -> Option<Judged> {
        of_any::<E, Plain>(error)
    }
}

impl<E, A: Into<Again>, J: FnMut(&E) -> A> JudgeError<E> for J {
    fn judge(&mut self, error: &E) -> Option<Judged> {
        self(error).into().judged()
    }
}

impl<'a, J, S> Runner<'a, J, S> {
    /// Until when the caller waits, if that is known: the nearer of this and
    /// the [total timeout](crate::Settings::total_timeout()) rules. Default:
    /// none.
    pub fn deadline(mut self, deadline: impl Into<Option<Deadline>>) -> Self {
        self.deadline = deadline.into();
        self
    }

    /// A closure says which errors are worth another attempt, and [when at the
    /// soonest](Again::After) if they tell; they may be of any type. It has the
    /// last word, on [refusals](buttress_core::Refusal) too; [`Again::of`] is
    /// what is done where no closure is asked.
    pub fn retry_if<E, A: Into<Again>, K: FnMut(&E) -> A>(self, judge: K) -> Runner<'a, K, S> {
        Runner {
            policy: self.policy,
            deadline: self.deadline,
            judge,
            stop: self.stop,
        }
    }

    /// When `stop` is over, the attempt under way is dropped and there is no
    /// further one: an [`AbortHandle`]'s [`aborted`](AbortHandle::aborted), or
    /// any other future.
    pub fn stop_on<T: IntoFuture<Output = ()>>(self, stop: T) -> Runner<'a, J, T> {
        Runner {
            policy: self.policy,
            deadline: self.deadline,
            judge: self.judge,
            stop,
        }
    }

    /// Runs `f` until it succeeds, or the rules say that it is enough: see
    /// [`RetryPolicy::run`].
    ///
    /// # Errors
    ///
    /// [`RetryError`] with the last attempt's error.
    pub async fn run<F, Fut, T, E>(self, f: F) -> Result<T, RetryError<E>>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, E>>,
        J: JudgeError<E>,
        S: IntoFuture<Output = ()>,
    {
        let shared = &*self.policy.0;
        let mut running = Running {
            shared,
            session: shared.begin(self.deadline),
            judge: self.judge,
            last: None,
            cause: None,
            begun: false,
        };
        let mut stop = pin!(self.stop.into_future());
        let ended = {
            let mut attempts = pin!(running.attempts(f));
            // Stopping first, so that what was stopped before does not begin.
            std::future::poll_fn(|cx| match stop.as_mut().poll(cx) {
                Poll::Ready(()) => Poll::Ready(None),
                Poll::Pending => attempts.as_mut().poll(cx).map(Some),
            })
            .await
        };
        match ended {
            Some(Ok(value)) => Ok(value),
            Some(Err(reason)) => Err(running.error(reason)),
            None => {
                if running.begun {
                    let cause = running.cause.unwrap_or(Cause::Error);
                    shared.gave_up(&running.session, cause, GiveUp::Aborted);
                }
                Err(running.error(Some(GiveUp::Aborted)))
            }
        }
    }
}

/// The attempts of one function.
struct Running<'a, J, E> {
    shared: &'a Shared,
    session: Session,
    judge: J,
    last: Option<E>,
    /// What the last attempt has told that was worth another.
    cause: Option<Cause>,
    /// The first attempt was.
    begun: bool,
}

impl<J: JudgeError<E>, E> Running<'_, J, E> {
    /// Until one succeeds, or the reason why there is no further one: none
    /// where an error is not worth it.
    async fn attempts<F, Fut, T>(&mut self, mut f: F) -> Result<T, Option<GiveUp>>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        loop {
            let until = self.shared.attempt_deadline(&self.session);
            self.begun = true;
            let judged = match within(until.map(Deadline::instant), f()).await {
                Some(Ok(value)) => {
                    self.shared.settled(&self.session, || Verdict::Success);
                    return Ok(value);
                }
                Some(Err(error)) => {
                    let judged = self.judge.judge(&error);
                    self.last = Some(error);
                    judged
                }
                None => Some(Judged(Seen::new(Cause::Refused(RefusalKind::TimedOut)))),
            };
            self.cause = judged.map(|Judged(seen)| seen.cause);
            let Some(Judged(seen)) = judged else {
                self.shared.settled(&self.session, || Verdict::Ignored);
                return Err(None);
            };
            match self
                .shared
                .next(&mut self.session, seen, || Ok(()), |_| Ok(()))
            {
                Ok(wait) => {
                    sleep(wait).await;
                    // The timer may be late.
                    let end = self.session.deadline();
                    if end.is_some_and(|end| end <= clock::now()) {
                        let reason = GiveUp::Deadline;
                        self.shared.gave_up(&self.session, seen.cause, reason);
                        return Err(Some(reason));
                    }
                    self.session.begin();
                }
                Err(reason) => return Err(Some(reason)),
            }
        }
    }

    fn error(self, reason: Option<GiveUp>) -> RetryError<E> {
        RetryError {
            last: self.last,
            cause: self.cause,
            attempts: if self.begun {
                self.session.attempts()
            } else {
                0
            },
            reason,
        }
    }
}

/// `None` if it is not over by then.
async fn within<F: Future>(until: Option<Instant>, future: F) -> Option<F::Output> {
    match until {
        None => Some(future.await),
        Some(until) => {
            let left: Duration = until - clock::now();
            timeout(left, future).await.ok()
        }
    }
}

/// No attempt has succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryError<E> {
    last: Option<E>,
    cause: Option<Cause>,
    attempts: u32,
    reason: Option<GiveUp>,
}

impl<E> RetryError<E> {
    /// The error of the last attempt that had one; `None` if each of them took
    /// too long.
    pub const fn last(&self) -> Option<&E> {
        self.last.as_ref()
    }

    /// The same, to keep.
    pub fn into_inner(self) -> Option<E> {
        self.last
    }

    /// What the last attempt has told, a [timeout](RefusalKind::TimedOut) too,
    /// of which there is no error; `None` where it was not worth another, or
    /// there was none.
    pub const fn cause(&self) -> Option<Cause> {
        self.cause
    }

    /// How many attempts were begun.
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Why there was no further one; `None` where the last error was not worth
    /// it.
    pub const fn reason(&self) -> Option<GiveUp> {
        self.reason
    }
}

impl<E> fmt::Display for RetryError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.attempts == 1 { "" } else { "s" };
        write!(f, "failed after {} attempt{plural}", self.attempts)?;
        if let Some(reason) = self.reason {
            write!(f, ": {reason}")?;
        }
        match self.cause {
            Some(Cause::Refused(RefusalKind::TimedOut)) => f.write_str(", the last took too long"),
            _ => Ok(()),
        }
    }
}

impl<E: StdError + 'static> StdError for RetryError<E> {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.last.as_ref().map(|last| last as _)
    }
}

/// Stops what [runs until it is aborted](Runner::stop_on). Clones are one
/// handle; it can be dropped without consequences.
#[derive(Clone, Debug)]
pub struct AbortHandle(watch::Sender<bool>);

impl AbortHandle {
    /// A handle that nobody has used yet.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    /// Stops it, or what will be run with it later.
    pub fn abort(&self) {
        self.0.send_replace(true);
    }

    /// Over when [`abort`](Self::abort) is called, or was.
    pub fn aborted(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut abort = self.0.subscribe();
        async move {
            if abort.wait_for(|aborted| *aborted).await.is_err() {
                // Nobody is left who could.
                pending::<()>().await;
            }
        }
    }
}

impl Default for AbortHandle {
    fn default() -> Self {
        Self::new()
    }
}
