//! Locks that are leases, each with a token that only grows.

use std::{
    any::Any,
    fmt,
    pin::Pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress_core::{
    clock::{self, Instant},
    random::SharedRandom,
};
use futures_util::future::join;
use tokio::{
    runtime::Handle,
    sync::{Mutex, watch},
    time::{sleep, timeout},
};

use crate::{Call, Error, ErrorKind, Key, Redis, Script, value::millis};

static TAKE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("lock/take.lua")));
static EXTEND: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("lock/extend.lua")));
static RELEASE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("lock/release.lua")));

const SHORTEST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// What is over, on any clock.
const OVER: Instant = Instant::from_nanos(0);

impl Redis {
    /// A lock by this name, to be taken: see [`LockBuilder`]. The front page
    /// says [what it is not](crate#what-a-lease-is-not).
    ///
    /// The name may be anything, since it is encoded as a segment of a
    /// [key](crate::Keyspace): `{prefix}lock:{name}`, and with `:fence` behind
    /// it for the counter. Both are of one hash tag, so that it works in a
    /// cluster, too; on one node, as any lock.
    pub fn lock(&self, name: impl AsRef<[u8]>) -> LockBuilder {
        self.lock_of([name])
    }

    /// A lock whose name has several parts: `lock_of(["orders", "42"])` is
    /// another one than `lock("orders:42")`.
    pub fn lock_of<S: AsRef<[u8]>>(&self, parts: impl IntoIterator<Item = S>) -> LockBuilder {
        LockBuilder {
            redis: self.clone(),
            key: self.keyspace("lock").tag(parts),
            ttl: Duration::from_secs(30),
            wait: Duration::ZERO,
            every: Duration::from_millis(50),
            fence: None,
            companion: None,
        }
    }
}

/// A lock that may be taken, as often as one likes.
///
/// ```no_run
/// use std::time::Duration;
///
/// use buttress_redis::{LockError, Redis};
///
/// # async fn report(redis: &Redis) -> Result<(), LockError> {
/// let lock = redis
///     .lock("nightly-report")
///     .ttl(Duration::from_secs(20))
///     .wait(Duration::from_secs(2))
///     .take()
///     .await?;
/// tokio::select! {
///     () = write_report(lock.token()) => {}
///     () = lock.lost() => return Err(LockError::Lost),
/// }
/// lock.release().await
/// # }
/// # async fn write_report(_: buttress_redis::FencingToken) {}
/// ```
#[derive(Clone)]
#[must_use = "nothing is locked before `take()`"]
pub struct LockBuilder {
    redis: Redis,
    key: Key,
    ttl: Duration,
    wait: Duration,
    every: Duration,
    fence: Option<Duration>,
    companion: Option<Companion>,
}

/// What goes with a lock.
type Companion = Arc<dyn Any + Send + Sync>;

impl LockBuilder {
    /// How long the lease lasts unless it is [extended](Lock::extend): after a
    /// crash of its holder, nobody else has the lock for that long. In
    /// milliseconds, rounded up; 10 ms to a day. Default: 30 s.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// How long to wait for a lock that somebody else holds, asking again and
    /// again. Default: zero, which asks once.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// How long between two questions while waiting, at most; it is half of
    /// that at least, at random. Default: 50 ms; at least 1 ms.
    pub fn every(mut self, every: Duration) -> Self {
        self.every = every.max(Duration::from_millis(1));
        self
    }

    /// How long the counter of the tokens is kept after the lock was last
    /// taken. Default: for ever, which is right for names that a program has
    /// and wrong for those that clients choose. Where it is gone tokens come
    /// of the server's clock alone.
    pub fn keep_fence(mut self, keep: Duration) -> Self {
        self.fence = Some(keep);
        self
    }

    /// Something that is kept, and dropped once the lock is free again as far
    /// as this side can see to that: with this builder and its clones, or when
    /// what was taken, or may have been, was given back, in the background,
    /// too. A permit of this process, say: who is next here finds the lock
    /// free. Default: nothing.
    pub fn keep(mut self, companion: impl Send + Sync + 'static) -> Self {
        self.companion = Some(Arc::new(companion));
        self
    }

    /// Takes the lock: one trip for each question.
    ///
    /// Who waits is not in line: of several, any may be next. A future that is
    /// dropped gives back, in the background, what it may have taken: at once,
    /// and where the answer says that this came too early, again. That takes
    /// two time limits of an operation at most.
    ///
    /// # Errors
    ///
    /// - [`LockError::Busy`]: somebody else held it all the time.
    /// - [`LockError::Redis`], at once and without more waiting: what may have
    ///   been taken is given back.
    /// - [`LockError::Late`]: the answer took longer than the lease.
    /// - [`LockError::Ttl`]: the lease is too short or too long.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime with a timer.
    pub async fn take(&self) -> Result<Lock, LockError> {
        check(self.ttl)?;
        let deadline = clock::now() + self.wait;
        let random = SharedRandom::default();
        loop {
            let left = match self.attempt().await {
                Ok(lock) => return Ok(lock),
                Err(LockError::Busy { left }) => left,
                Err(error) => return Err(error),
            };
            let rest = deadline - clock::now();
            if rest.is_zero() {
                return Err(LockError::Busy { left });
            }
            let pause = self.every / 2 + random.up_to(self.every / 2);
            sleep(pause.min(rest)).await;
        }
    }

    async fn attempt(&self) -> Result<Lock, LockError> {
        let fence = self.key.clone().segment("fence");
        // Before it is asked for: should the answer never come, or come to
        // nobody, it may have been taken all the same.
        let held = Held::new(self);
        let call = TAKE
            .on([&self.key, &fence])
            .arg(held.owner.as_bytes())
            .arg(millis(self.ttl))
            .arg(self.fence.map_or(0, millis));
        let sent = clock::now();
        let (mut held, answer) = Question::new(held, call).await;
        let (taken, number) = answer.inspect_err(|error| {
            if error.kind() == ErrorKind::Gone {
                held.let_go();
            }
        })?;
        if taken == 0 {
            held.let_go();
            let left = Duration::from_millis(number);
            return Err(LockError::Busy { left });
        }
        let until = until(sent, self.ttl);
        if until <= clock::now() {
            return Err(LockError::Late);
        }
        Ok(Lock {
            held,
            token: FencingToken(number),
            until: watch::Sender::new(until),
            extending: Mutex::new(()),
        })
    }
}

impl fmt::Debug for LockBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockBuilder")
            .field("ttl", &self.ttl)
            .field("wait", &self.wait)
            .field("every", &self.every)
            .field("keep_fence", &self.fence)
            .finish_non_exhaustive()
    }
}

fn check(ttl: Duration) -> Result<(), LockError> {
    if ttl < SHORTEST || ttl > LONGEST {
        return Err(LockError::Ttl);
    }
    Ok(())
}

/// Until when the holder may believe in a lease that was asked for at `sent`.
/// The server counts from later on, when the question came; and its clock may
/// run faster than ours: by a hundredth, and two milliseconds for the grain of
/// its timers, as Redis's own documentation of distributed locks allows.
fn until(sent: Instant, ttl: Duration) -> Instant {
    sent + (ttl - ttl / 100).saturating_sub(Duration::from_millis(2))
}

/// A lock that is held, for as long as its lease lasts.
///
/// Dropping it gives it back in the background, which is tried once: where the
/// server is gone, the lease ends by itself. To know that it was given back,
/// [`release`](Self::release).
///
/// Nothing extends it but [`extend`](Self::extend).
pub struct Lock {
    held: Held,
    token: FencingToken,
    until: watch::Sender<Instant>,
    /// One extension after the other, so that the last one that was sent is
    /// the one that counts.
    extending: Mutex<()>,
}

impl Lock {
    /// Who holds it: 128 random bits in hexadecimal, made for this taking. It
    /// is what the server knows the holder by; who knows it can release the
    /// lock.
    #[must_use]
    pub fn owner(&self) -> &str {
        &self.held.owner
    }

    /// What the resource that the lock protects is to be told with each write,
    /// and to refuse where it has seen a greater one: see
    /// [`Redis::fenced_set`].
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.token
    }

    /// Until when it is held, as far as this side can know: counted by the
    /// monotonic clock from when it was asked for, not from when the answer
    /// came, less a hundredth of the lease and 2 ms for clocks that do not run
    /// alike.
    #[must_use]
    pub fn valid_until(&self) -> Instant {
        *self.until.borrow()
    }

    /// Whether it is held, as far as this side can know.
    #[must_use]
    pub fn is_held(&self) -> bool {
        clock::now() < self.valid_until()
    }

    /// Waits until it is held no more: the lease has run out, or an extension
    /// has found it in other hands.
    pub async fn lost(&self) {
        self.validity().lost().await;
    }

    /// Tells others whether it is held, without keeping it.
    #[must_use]
    pub fn validity(&self) -> Validity {
        Validity(self.until.subscribe())
    }

    /// Has the lease last for `ttl` from now on: longer, or shorter. 10 ms to a
    /// day. A lease that is over for this side, though not yet for the server,
    /// comes back by it.
    ///
    /// A future that is dropped has extended the lease or has not;
    /// [`valid_until`](Self::valid_until) says the lesser.
    ///
    /// # Errors
    ///
    /// [`LockError::Lost`]: the server knows nothing of it, or somebody else
    /// has it; it is over then. [`LockError::Redis`]: perhaps extended, perhaps
    /// not; the lesser counts. [`LockError::Ttl`].
    pub async fn extend(&self, ttl: Duration) -> Result<(), LockError> {
        check(ttl)?;
        let _alone = self.extending.lock().await;
        let call = self.held.call(&EXTEND).arg(millis(ttl));
        let until = until(clock::now(), ttl);
        // Should it shorten the lease, and nobody hear of it.
        self.until.send_if_modified(|now| {
            let shorter = until < *now;
            *now = until.min(*now);
            shorter
        });
        let extended = self.held.redis.call::<u64>("extend", &call).await?;
        if extended == 0 {
            self.until.send_replace(OVER);
            return Err(LockError::Lost);
        }
        self.until.send_replace(until);
        Ok(())
    }

    /// Gives it back. For this side it is over with the call; a future that is
    /// dropped has it tried in the background, and so has an error.
    ///
    /// # Errors
    ///
    /// [`LockError::Lost`]: it was not held any more, so that somebody else may
    /// have been at work meanwhile. [`LockError::Redis`]: perhaps given back,
    /// perhaps not; the lease ends by itself.
    pub fn release(mut self) -> impl Future<Output = Result<(), LockError>> + Send {
        // Somebody else may have it before the answer is here.
        self.until.send_replace(OVER);
        async move {
            let call = self.held.call(&RELEASE);
            let released = self.held.redis.call::<u64>("unlock", &call).await?;
            self.held.let_go();
            if released == 0 {
                return Err(LockError::Lost);
            }
            Ok(())
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before anybody else can have it.
        self.until.send_replace(OVER);
    }
}

impl fmt::Debug for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lock")
            .field("token", &self.token)
            .field("is_held", &self.is_held())
            .finish_non_exhaustive()
    }
}

/// Tells whether a [`Lock`] is held, and does not keep it: cheap to clone, and
/// over when the lock is dropped.
#[derive(Clone)]
pub struct Validity(watch::Receiver<Instant>);

impl Validity {
    /// Whether it is held, as [`Lock::is_held`].
    #[must_use]
    pub fn is_held(&self) -> bool {
        clock::now() < *self.0.borrow()
    }

    /// Waits until it is held no more, as [`Lock::lost`]; or was given back.
    pub async fn lost(&self) {
        let mut until = self.0.clone();
        loop {
            let left = *until.borrow_and_update() - clock::now();
            if left.is_zero() {
                return;
            }
            // Extended, shortened, or nobody is there any more to do so.
            if let Ok(Err(_)) = timeout(left, until.changed()).await {
                return;
            }
        }
    }
}

impl fmt::Debug for Validity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Validity")
            .field("is_held", &self.is_held())
            .finish()
    }
}

/// What the server may hold for us, and is given back when this is dropped.
struct Held {
    redis: Redis,
    key: Key,
    owner: String,
    /// Of those who took it: it may be dropped where there is none. `None` once
    /// there is nothing to give back.
    runtime: Option<Handle>,
    companion: Option<Companion>,
}

impl Held {
    fn new(builder: &LockBuilder) -> Self {
        let mut bits = [0; 16];
        getrandom::fill(&mut bits).expect("the system has randomness");
        Self {
            redis: builder.redis.clone(),
            key: builder.key.clone(),
            owner: format!("{:032x}", u128::from_ne_bytes(bits)),
            runtime: Some(Handle::current()),
            companion: builder.companion.clone(),
        }
    }

    fn call(&self, script: &Script) -> Call {
        script.on([&self.key]).arg(self.owner.as_bytes())
    }

    /// There is nothing to give back.
    fn let_go(&mut self) {
        self.runtime = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            let call = self.call(&RELEASE);
            let redis = self.redis.clone();
            let companion = self.companion.take();
            runtime.spawn(async move {
                // The lease ends by itself where this fails.
                let _ = redis.call::<u64>("unlock", &call).await;
                drop(companion);
            });
        }
    }
}

/// What is asked when a lock is to be taken, until there is an answer.
struct Question(Option<(Answering, Held)>);

type Answer = Result<(u64, u64), Error>;
type Answering = Pin<Box<dyn Future<Output = Answer> + Send>>;

impl Question {
    fn new(held: Held, call: Call) -> Self {
        let redis = held.redis.clone();
        // To go on in the background, should nobody wait for it.
        let answering = Box::pin(async move { redis.call("lock", &call).await });
        Self(Some((answering, held)))
    }
}

impl Future for Question {
    type Output = (Held, Answer);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (answering, _) = self.0.as_mut().expect("polled after completion");
        let answer = ready!(answering.as_mut().poll(cx));
        let (_, held) = self.0.take().expect("it is there");
        Poll::Ready((held, answer))
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        let Some((answering, mut held)) = self.0.take() else {
            return;
        };
        let Some(runtime) = held.runtime.take() else {
            return;
        };
        // In a runtime that has ended it is dropped, and the lease ends by
        // itself.
        runtime.spawn(async move {
            let call = held.call(&RELEASE);
            // Right behind the question. It may overtake it all the same, where
            // that goes a longer way: by another node, or in full.
            let release = held.redis.call::<u64>("unlock", &call);
            let (answer, released) = join(answering, release).await;
            let free = match (answer, released) {
                (_, Ok(1..)) | (Ok((0, _)), _) => true,
                (Err(error), _) => error.kind() == ErrorKind::Gone,
                (Ok(_), _) => false,
            };
            if !free {
                let _ = held.redis.call::<u64>("unlock", &call).await;
            }
        });
    }
}

/// A number that is greater for each who takes a lock than for all who took it
/// before, even where the server has forgotten all of them: it is the server's
/// time in microseconds, or one more than the last, whichever is greater.
///
/// It goes back only where the server loses its data (or the counter that was
/// [kept for a time](LockBuilder::keep_fence)) and its clock is set back by
/// more than the time since the last taking, both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FencingToken(u64);

impl FencingToken {
    /// A token that came from elsewhere: over the network, or from a lock
    /// service of another kind.
    #[must_use]
    pub const fn new(token: u64) -> Self {
        Self(token)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a lock is not held.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum LockError {
    /// Somebody else holds it.
    Busy {
        /// When their lease ends if it is neither given back nor extended.
        left: Duration,
    },
    /// It was held, and is not any more.
    Lost,
    /// When the answer came its lease was over.
    Late,
    /// The server could not be asked.
    Redis(Error),
    /// The lease is shorter than 10 ms or longer than a day.
    Ttl,
}

impl From<Error> for LockError {
    fn from(error: Error) -> Self {
        Self::Redis(error)
    }
}

impl fmt::Display for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Busy { .. } => "somebody else holds the lock",
            Self::Lost => "the lock is not held any more",
            Self::Late => "the lease was over when the answer came",
            Self::Redis(_) => "the lock's server could not be asked",
            Self::Ttl => "a lease must be from 10 ms to a day",
        })
    }
}

impl std::error::Error for LockError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Redis(error) => Some(error),
            _ => None,
        }
    }
}
