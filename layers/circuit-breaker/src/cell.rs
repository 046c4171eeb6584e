//! The state of one breaker, and every change of it.
//!
//! ```text
//! admit ──▶ word ──▶ ticket { generation } ─ ─ call ─ ─ ▶ record ──▶ same generation?
//!            │                                                        │ no: nothing
//!            │ open, and due                                          ▼ yes
//!            └──────────▶ lock ──▶ next generation ◀── a rule holds ── windows, failures in a row
//! ```
//!
//! A closed call loads one word when it comes and again when it is done. What
//! is counted is counted with atomics; the state itself only changes under the
//! lock, which then writes the deadline first and the word last, so that who
//! has read the word of a generation finds its deadline.
//!
//! Cells are never freed but used again, in later generations: so a call in
//! flight refers to its breaker by a plain reference and no count that threads
//! would fight over. A cell that was used again knows a late call by its
//! generation, as every breaker does.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, OnceLock},
    task::Waker,
    time::Duration,
};

use buttress_core::{
    clock::Instant,
    random::SharedRandom,
    sync::{
        Mutex, MutexGuard, Padded,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{Acquire, Relaxed, SeqCst},
        },
    },
};

use crate::{
    Cause, Event, Reason, State,
    event::Listener,
    metrics::Metrics,
    settings::Plan,
    window::{CallWindow, Mark, Sums, TimeWindow},
    word::{Probes, Word},
};

mod admit;
mod change;
mod follow;
mod lease;
mod look;
#[cfg(all(test, buttress_loom))]
mod loom_tests;
mod record;
mod wait;

pub(crate) use follow::Follower;
pub(crate) use lease::{AtOnce, Lease};

/// When nothing is due.
const NEVER: Instant = Instant::from_nanos(u64::MAX);

/// Who hears of a breaker.
pub(crate) struct Observer {
    pub(crate) name: Arc<str>,
    pub(crate) listeners: Box<[Listener]>,
    pub(crate) metrics: Metrics,
}

impl Observer {
    pub(crate) fn tell(&self, event: &Event) {
        self.metrics.event(event);
        for listener in &self.listeners {
            listener(&self.name, event);
        }
    }
}

/// The settings as a call reads them. Torn reads during a change do no harm:
/// it begins a new generation, and what was decided by a mixture is void.
struct Params {
    in_a_row: AtomicU32,
    failure_ppm: AtomicU32,
    slow_ppm: AtomicU32,
    minimum: AtomicU32,
    calls: AtomicU32,
    /// Probes, those at once, those that may fail, and whether dropped ones
    /// count: 8 bits each.
    probes: AtomicU32,
    epochs: AtomicU64,
    slow_nanos: AtomicU64,
}

struct Hot {
    word: AtomicU64,
    /// The end of open, or of half-open, by whether the generation is even.
    /// Written before the word.
    until: [AtomicU64; 2],
    params: Params,
}

struct Cold {
    /// Which of its owners the cell belongs to.
    tenancy: u64,
    observer: Option<Arc<Observer>>,
    plan: Option<Plan>,
    random: SharedRandom,
    since: Instant,
    /// Openings that are not forgotten.
    level: u32,
    opened: Option<Opened>,
    /// By a number of each, which is found soon however many wait.
    waiters: BTreeMap<u64, Waker>,
    /// Who tells other processes of it.
    follower: Option<Arc<dyn Follower>>,
    /// When the wait of an open state is over. The word's own end may be later,
    /// while leave to probe is asked for.
    due: Instant,
    /// Until when probing needs leave of a follower, and at least for a while
    /// from when it is first asked for; zero if it needs none.
    hold: Instant,
    asked: bool,
}

pub(crate) struct Cell {
    hot: Padded<Hot>,
    calls: OnceLock<CallWindow>,
    time: OnceLock<TimeWindow>,
    cold: Padded<Mutex<Cold>>,
}

/// Leave to call, from a generation: the word by which it was given, and one
/// word to hand on.
#[derive(Clone, Copy)]
pub(crate) struct Ticket(Word);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Call,
    Probe,
    /// Counts as nothing.
    Free,
}

/// No leave to call: `tenancy:17 reason:2 wait:45`, one word to hand on. The
/// wait is in microseconds, rounded up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rejection(u64);

impl Rejection {
    const REASON_AT: u32 = 45;
    const TENANCY_AT: u32 = Self::REASON_AT + 2;
    /// Nobody knows. Also the longest wait, 407 days: none is above 366.
    const UNKNOWN: u64 = (1 << Self::REASON_AT) - 1;

    #[inline]
    pub(crate) fn new(reason: Reason, retry_after: Option<Duration>) -> Self {
        let nanos = retry_after.map(|wait| u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX));
        let wait = nanos.map_or(Self::UNKNOWN, Self::micros);
        Self((reason as u64) << Self::REASON_AT | wait)
    }

    /// Open until so many nanoseconds have passed.
    #[inline]
    pub(crate) const fn open_for(nanos: u64) -> Self {
        Self(Self::micros(nanos))
    }

    #[inline]
    const fn micros(nanos: u64) -> u64 {
        let micros = nanos.div_ceil(1000);
        if micros < Self::UNKNOWN {
            micros
        } else {
            Self::UNKNOWN - 1
        }
    }

    /// By which owner of a cell, as far as there is room for it.
    #[inline]
    const fn by(self, tenancy: u64) -> Self {
        Self(tenancy << Self::TENANCY_AT | self.0)
    }

    /// Whether it was said by that owner. After 131,072 others of the same cell
    /// it is taken for one of them.
    const fn is_by(self, tenancy: u64) -> bool {
        self.0 >> Self::TENANCY_AT == tenancy << Self::TENANCY_AT >> Self::TENANCY_AT
    }

    #[inline]
    pub(crate) const fn reason(self) -> Reason {
        match self.0 >> Self::REASON_AT & 3 {
            0 => Reason::Open,
            1 => Reason::HalfOpen,
            _ => Reason::ForcedOpen,
        }
    }

    #[inline]
    pub(crate) const fn retry_after(self) -> Option<Duration> {
        match self.0 & Self::UNKNOWN {
            Self::UNKNOWN => None,
            micros => Some(Duration::from_micros(micros)),
        }
    }
}

impl fmt::Debug for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejection")
            .field("reason", &self.reason())
            .field("retry_after", &self.retry_after())
            .finish()
    }
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done(Mark),
    /// Given up on, after it had run past the slow limit.
    DroppedSlow,
    /// Says nothing.
    Nothing,
}

/// What opened a breaker that has not been closed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) cause: Cause,
    pub(crate) failures: u64,
}

/// What a breaker looks like from outside.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct View {
    pub(crate) state: State,
    pub(crate) generation: u32,
    pub(crate) since: Instant,
    pub(crate) until: Option<Instant>,
    /// Where they are a rule.
    pub(crate) in_a_row: Option<u32>,
    pub(crate) sums: Sums,
    pub(crate) probes: Probes,
    pub(crate) opened: Option<Opened>,
}

/// Whether a call would pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outlook {
    Passes,
    /// Not before this, if nothing else happens; `None` if only a change by
    /// hand helps.
    Waits(Option<Instant>),
}

/// What is to be told after unlocking.
#[must_use = "it must be told"]
pub(crate) struct News {
    /// Whose it is: the cell may be another's when it is told.
    tenancy: u64,
    observer: Option<Arc<Observer>>,
    event: Option<Event>,
    /// For how long the callee asked to be left alone, where it opened so.
    asked: Option<Duration>,
    follower: Option<Arc<dyn Follower>>,
    wakers: BTreeMap<u64, Waker>,
}

impl Cell {
    fn new() -> Self {
        let number = || AtomicU32::new(0);
        Self {
            hot: Padded(Hot {
                word: AtomicU64::new(Word::new(0).0),
                until: [(); 2].map(|()| AtomicU64::new(NEVER.as_nanos())),
                params: Params {
                    in_a_row: number(),
                    failure_ppm: number(),
                    slow_ppm: number(),
                    minimum: number(),
                    calls: number(),
                    probes: number(),
                    epochs: AtomicU64::new(0),
                    slow_nanos: AtomicU64::new(0),
                },
            }),
            calls: OnceLock::new(),
            time: OnceLock::new(),
            cold: Padded(Mutex::new(Cold {
                tenancy: 0,
                observer: None,
                plan: None,
                random: SharedRandom::default(),
                since: Instant::from_nanos(0),
                level: 0,
                opened: None,
                waiters: BTreeMap::new(),
                follower: None,
                due: Instant::from_nanos(0),
                hold: Instant::from_nanos(0),
                asked: false,
            })),
        }
    }

    #[inline]
    pub(crate) fn word(&self) -> Word {
        Word(self.hot.word.load(Acquire))
    }

    /// The end of this word's state; `None` if another generation has begun.
    #[inline]
    fn until(&self, word: Word) -> Option<Instant> {
        let until = Instant::from_nanos(self.hot.until[place(word)].load(Acquire));
        (self.word().generation() == word.generation()).then_some(until)
    }

    /// The end of the state, under the lock.
    fn until_locked(&self, word: Word) -> Instant {
        Instant::from_nanos(self.hot.until[place(word)].load(Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Cold> {
        self.cold.lock()
    }

    fn probes(&self) -> [u8; 4] {
        self.hot.params.probes.load(Relaxed).to_le_bytes()
    }

    fn swap(&self, from: Word, to: Word) -> bool {
        self.hot
            .word
            .compare_exchange(from.0, to.0, SeqCst, Acquire)
            .is_ok()
    }
}

/// Two generations in a row have their ends in different places.
const fn place(word: Word) -> usize {
    (word.generation() & 1) as usize
}

impl Ticket {
    /// In an open state nobody has one.
    #[inline]
    pub(crate) const fn of(word: Word) -> Self {
        Self(word)
    }

    #[inline]
    pub(crate) const fn generation(self) -> u32 {
        self.0.generation()
    }

    #[inline]
    pub(crate) const fn kind(self) -> Kind {
        match self.0.state() {
            State::HalfOpen => Kind::Probe,
            State::ForcedClosed => Kind::Free,
            _ => Kind::Call,
        }
    }

    /// Whether it is by this very word, and nothing has changed since.
    #[inline]
    const fn is(self, word: Word) -> bool {
        self.0.0 == word.0
    }

    /// Whether nothing need be known of the call but how it went.
    #[inline]
    pub(crate) const fn is_plain(self) -> bool {
        self.0.is_plain()
    }

    /// Whether the call is to be timed.
    #[inline]
    pub(crate) const fn timed(self) -> bool {
        self.0.is_timed()
    }

    /// Whether someone hears of the call.
    #[inline]
    pub(crate) const fn observed(self) -> bool {
        self.0.is_observed()
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("generation", &self.generation())
            .field("kind", &self.kind())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cell")
            .field("word", &self.word())
            .finish_non_exhaustive()
    }
}
