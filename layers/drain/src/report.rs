//! What came of a shutdown.

use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

use crate::{ConnectionState, Label, Priority};

/// What came of a shutdown: what was cut, what the hooks did, and the exit
/// code. Its `Display` is a line, and one more for each thing that went wrong.
/// Cheap to clone.
#[derive(Clone, Debug)]
#[must_use = "it says whether anything was lost"]
pub struct Report(Arc<Facts>);

/// What is written down on the way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    pub(crate) reason: Cow<'static, str>,
    pub(crate) took: Duration,
    pub(crate) drained_after: Duration,
    pub(crate) forced: bool,
    pub(crate) deadline: bool,
    pub(crate) requests: usize,
    pub(crate) cut: Vec<Cut>,
    pub(crate) callbacks: Vec<HookReport>,
    pub(crate) hooks: Vec<HookReport>,
    pub(crate) failures: Vec<Failure>,
}

/// What was cut off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    pub(crate) kind: CutKind,
    pub(crate) label: Option<Label>,
    pub(crate) age: Duration,
    pub(crate) bytes: Option<u64>,
}

/// What kind of thing was cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CutKind {
    /// A request, of which the layer was told to keep
    /// [track](crate::DrainLayer::route).
    Request,
    /// A connection with requests on it that are not named, or with an answer
    /// that was not written to its end.
    Connection,
    /// A connection that had been upgraded, or a stream of one over HTTP/2.
    Tunnel,
    /// Work that held a [`Guard`](crate::Guard).
    Guard,
}

impl CutKind {
    /// In words for programs: `request`, `connection`, `tunnel`, `guard`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Connection => "connection",
            Self::Tunnel => "tunnel",
            Self::Guard => "guard",
        }
    }

    pub(crate) const fn of(state: ConnectionState) -> Option<Self> {
        match state {
            ConnectionState::Idle => None,
            ConnectionState::Busy => Some(Self::Connection),
            ConnectionState::Upgraded => Some(Self::Tunnel),
        }
    }
}

impl Cut {
    /// What kind of thing it was.
    #[must_use]
    pub const fn kind(&self) -> CutKind {
        self.kind
    }

    /// The route of a request, the name of a guard; of a connection what its
    /// server knew.
    #[must_use]
    pub const fn label(&self) -> Option<&Label> {
        self.label.as_ref()
    }

    /// How long it had been there.
    #[must_use]
    pub const fn age(&self) -> Duration {
        self.age
    }

    /// The bytes that had been sent: of a response's body, or of all that a
    /// connection ever wrote. `None` of guards.
    #[must_use]
    pub const fn bytes(&self) -> Option<u64> {
        self.bytes
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.as_str())?;
        if let Some(label) = &self.label {
            write!(f, " {label}")?;
        }
        write!(f, " after {:?}", self.age)?;
        match self.bytes {
            Some(bytes) => write!(f, " and {bytes} bytes"),
            None => Ok(()),
        }
    }
}

/// What came of a hook, or of an `on_drain` callback.
#[derive(Clone, Debug)]
pub struct HookReport {
    pub(crate) name: Label,
    pub(crate) priority: Priority,
    pub(crate) took: Duration,
    pub(crate) outcome: HookOutcome,
}

/// How a hook ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HookOutcome {
    /// Well.
    Done,
    /// With this error.
    Failed(String),
    /// With a panic, and this message if it had one.
    Panicked(String),
    /// It was dropped at its limit, or when all time was up.
    TimedOut,
    /// It never ran: no time was left, or the shutdown was forced.
    Skipped,
}

impl HookOutcome {
    /// In words for programs: `done`, `failed`, `panicked`, `timed_out`,
    /// `skipped`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed(_) => "failed",
            Self::Panicked(_) => "panicked",
            Self::TimedOut => "timed_out",
            Self::Skipped => "skipped",
        }
    }
}

impl HookReport {
    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &Label {
        &self.name
    }

    /// Its priority; of an `on_drain` callback the default.
    #[must_use]
    pub const fn priority(&self) -> Priority {
        self.priority
    }

    /// How long it took; zero if it was skipped.
    #[must_use]
    pub const fn took(&self) -> Duration {
        self.took
    }

    /// How it ended.
    #[must_use]
    pub const fn outcome(&self) -> &HookOutcome {
        &self.outcome
    }

    pub(crate) fn is_cut(&self) -> bool {
        matches!(self.outcome, HookOutcome::TimedOut | HookOutcome::Skipped)
    }
}

impl fmt::Display for HookReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (priority {}) ", self.name, self.priority)?;
        let took = self.took;
        match &self.outcome {
            HookOutcome::Done => write!(f, "done in {took:?}"),
            HookOutcome::Failed(why) => write!(f, "failed after {took:?}: {why}"),
            HookOutcome::Panicked(why) => write!(f, "panicked after {took:?}: {why}"),
            HookOutcome::TimedOut => write!(f, "was cut off after {took:?}"),
            HookOutcome::Skipped => f.write_str("was skipped"),
        }
    }
}

/// A server that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub(crate) server: Label,
    pub(crate) why: String,
}

impl Failure {
    /// The server's name.
    #[must_use]
    pub const fn server(&self) -> &Label {
        &self.server
    }

    /// What it said.
    #[must_use]
    pub fn why(&self) -> &str {
        &self.why
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "server {}: {}", self.server, self.why)
    }
}

/// A hook or a server failed, or it was forced.
const FAILED: i32 = 1;
/// A deadline cut something off; as timeout(1) has it.
pub(crate) const CUT: i32 = 124;

impl Report {
    pub(crate) fn new(facts: Facts) -> Self {
        Self(Arc::new(facts))
    }

    /// Why it was asked for.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    /// How long all of it took, from the trigger.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.0.took
    }

    /// How long it took until nothing was left in flight, or the rest was cut.
    #[must_use]
    pub fn drained_after(&self) -> Duration {
        self.0.drained_after
    }

    /// Whether it was ended by force: by a second signal, or by code.
    #[must_use]
    pub fn was_forced(&self) -> bool {
        self.0.forced
    }

    /// Whether nothing was cut and nothing failed.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.exit_code() == 0
    }

    /// How many requests were cut, tracked or not.
    #[must_use]
    pub fn requests_cut(&self) -> usize {
        self.0.requests
    }

    /// What was cut, as far as it is known by name: of the requests those that
    /// were tracked, of the connections those that were not idle.
    #[must_use]
    pub fn cut(&self) -> &[Cut] {
        &self.0.cut
    }

    /// What came of the `on_drain` callbacks.
    #[must_use]
    pub fn callbacks(&self) -> &[HookReport] {
        &self.0.callbacks
    }

    /// What came of the hooks: by priority, and of equal ones as they ended.
    #[must_use]
    pub fn hooks(&self) -> &[HookReport] {
        &self.0.hooks
    }

    /// The servers that failed.
    #[must_use]
    pub fn failures(&self) -> &[Failure] {
        &self.0.failures
    }

    /// What a process should end with: 124 if a deadline cut off a request, a
    /// guard, a connection that was not idle, a hook or a callback; otherwise 1
    /// if one of these or a server failed, or it was forced; otherwise 0.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        let facts = &*self.0;
        let hooks = || facts.hooks.iter().chain(&facts.callbacks);
        if facts.deadline || (!facts.forced && hooks().any(HookReport::is_cut)) {
            return CUT;
        }
        let failed = hooks().any(|hook| hook.outcome != HookOutcome::Done);
        match failed || facts.forced || !facts.failures.is_empty() {
            true => FAILED,
            false => 0,
        }
    }

    /// Ends the process with the [`exit_code`](Self::exit_code). What is still
    /// running on a thread of its own (`spawn_blocking`) is not waited for,
    /// as it would be when a runtime is dropped.
    pub fn exit(&self) -> ! {
        std::process::exit(self.exit_code())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let facts = &*self.0;
        write!(
            f,
            "shut down in {:?} ({}), exit code {}",
            facts.took,
            facts.reason,
            self.exit_code()
        )?;
        if facts.forced {
            f.write_str(", by force")?;
        }
        let known = facts.cut.iter().filter(|cut| cut.kind == CutKind::Request);
        let unknown = facts.requests.saturating_sub(known.count());
        if unknown > 0 {
            write!(f, "\ncut: {unknown} requests that were not tracked")?;
        }
        for cut in &facts.cut {
            write!(f, "\ncut: {cut}")?;
        }
        for callback in &facts.callbacks {
            if callback.outcome != HookOutcome::Done {
                write!(f, "\non_drain: {callback}")?;
            }
        }
        for hook in &facts.hooks {
            if hook.outcome != HookOutcome::Done {
                write!(f, "\nhook: {hook}")?;
            }
        }
        for failure in &facts.failures {
            write!(f, "\n{failure}")?;
        }
        Ok(())
    }
}
