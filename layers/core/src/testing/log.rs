//! What is logged.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use tracing::{
    Dispatch, Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
    subscriber::{DefaultGuard, Interest, set_default, set_global_default, with_default},
};

/// Records what a stack logs through `tracing`, for a test to look at.
///
/// It is a [`Subscriber`], and hears what is logged where it is installed:
///
/// | | hears |
/// |---|---|
/// | [`here`](Self::here), [`within`](Self::within) | this thread: a test on the current-thread runtime with all its tasks |
/// | [`global`](Self::global) | every thread of the program that has no log of its own: a test on several threads |
/// | `future.with_subscriber(log.clone())` | a future wherever it is polled, by [`tracing::instrument::WithSubscriber`] |
///
/// ```
/// use buttress_core::testing::Log;
/// use tracing::Level;
///
/// let log = Log::new().max_level(Level::INFO);
/// let _here = log.here();
///
/// tracing::debug!("asked again");
/// tracing::warn!(name = "shop", wait_ms = 1500, error = %"no route", "not reachable");
///
/// let [event] = &log.take()[..] else { panic!("one event") };
/// assert_eq!(event.level(), Level::WARN);
/// assert_eq!(event.message(), "not reachable");
/// assert_eq!(event.field("wait_ms"), Some("1500"));
/// // Or all of it in one line.
/// assert_eq!(*event, "WARN not reachable name=shop wait_ms=1500 error=no route");
/// ```
///
/// Clones share what they have recorded; settings are each handle's own, and
/// hold where that handle is installed. Without any, all events are recorded,
/// and kept until they are [taken](Self::take).
///
/// Spans are not recorded.
///
/// # Beside other tests
///
/// `tracing` remembers for each place in the code whether anybody wants its
/// events, and while there is a single subscriber it asks none but the thread
/// that comes by first: another test's, it may be, which has no log, and the
/// place is silent from then on. So a subscriber of one thread commonly needs a
/// test program of its own. This one does not: from the first log on, `tracing`
/// asks every time, until the program ends, and tests with logs of their own
/// and tests without any may run side by side. In a program that measures how
/// fast or with how many allocations nothing is logged, that is one question
/// more.
#[derive(Clone)]
pub struct Log {
    target: String,
    max_level: Level,
    listener: Option<Listener>,
    events: Arc<Mutex<Vec<LogEvent>>>,
}

type Listener = Arc<dyn Fn(&LogEvent) + Send + Sync>;

impl Log {
    /// An empty log of all that is logged where it will be installed.
    #[must_use]
    pub fn new() -> Self {
        // With more than one subscriber about, `tracing` asks all of them for
        // their interest and not only the current thread's. They must outlive
        // this log: what other threads register later is asked for once, too.
        static AWAKE: OnceLock<[Dispatch; 2]> = OnceLock::new();
        AWAKE.get_or_init(|| [(); 2].map(|()| Dispatch::new(Self::bare())));
        Self::bare()
    }

    fn bare() -> Self {
        Self {
            target: String::new(),
            max_level: Level::TRACE,
            listener: None,
            events: Arc::default(),
        }
    }

    /// The program's one log, which is made its global default when it is first
    /// asked for, and stays that. It records all that is logged from then on,
    /// by any thread that has no other subscriber of its own. Tests that share
    /// it tell their events apart by what is in them ([`with`](Self::with)),
    /// and leave them there for the others.
    ///
    /// For a global log with settings: `tracing::subscriber::set_global_default`.
    ///
    /// # Panics
    ///
    /// If the program has another global default already.
    #[must_use]
    pub fn global() -> Self {
        static GLOBAL: OnceLock<Log> = OnceLock::new();
        let install = || {
            let log = Self::new();
            set_global_default(log.clone()).expect("the program has a global subscriber already");
            log
        };
        GLOBAL.get_or_init(install).clone()
    }

    /// Records only events whose target begins so. An event's target is the
    /// path of its module, unless it says otherwise: `buttress` stands for all
    /// layers of the house, `buttress_retry` for one.
    #[must_use]
    pub fn target(mut self, prefix: impl Into<String>) -> Self {
        self.target = prefix.into();
        self
    }

    /// Records only events of this level and of graver ones: under
    /// [`Level::INFO`] neither `DEBUG` nor `TRACE`.
    #[must_use]
    pub fn max_level(mut self, level: Level) -> Self {
        self.max_level = level;
        self
    }

    /// Calls this with each event that is recorded, on the thread that logs it
    /// and before it goes on: to look at what holds at this very moment, to let
    /// something come between, or to be a log that blocks. The event is in the
    /// log already, and the log is not locked. A second call replaces the first.
    ///
    /// It should log nothing itself: nobody hears that, except under a global
    /// default, where it would be called for that, too, and so on without end.
    #[must_use]
    pub fn on_event(mut self, listener: impl Fn(&LogEvent) + Send + Sync + 'static) -> Self {
        self.listener = Some(Arc::new(listener));
        self
    }

    /// Hears this thread until the guard is dropped. Guards are dropped in
    /// the reverse of their order.
    ///
    /// On the current-thread runtime, which is the default of `tokio::test`,
    /// that is the test with all that it spawns, but not what runs in
    /// `spawn_blocking`.
    #[must_use = "the log hears nothing after its guard is dropped"]
    pub fn here(&self) -> DefaultGuard {
        set_default(self.clone())
    }

    /// Hears this thread while the closure runs.
    pub fn within<T>(&self, f: impl FnOnce() -> T) -> T {
        with_default(self.clone(), f)
    }

    /// The events so far, in the order in which they came.
    #[must_use]
    pub fn events(&self) -> Vec<LogEvent> {
        self.lock().clone()
    }

    /// The events so far, which are forgotten: the next call has what came
    /// after this one.
    #[must_use]
    pub fn take(&self) -> Vec<LogEvent> {
        std::mem::take(&mut *self.lock())
    }

    /// The events so far with this message, word for word.
    #[must_use]
    pub fn saying(&self, message: &str) -> Vec<LogEvent> {
        self.filtered(|event| event.message() == message)
    }

    /// The events so far that have this field with this text in it:
    /// `log.with("name", "checkout")` is what a layer of that name has to say.
    #[must_use]
    pub fn with(&self, field: &str, text: &str) -> Vec<LogEvent> {
        self.filtered(|event| event.field(field) == Some(text))
    }

    fn filtered(&self, wanted: impl Fn(&LogEvent) -> bool) -> Vec<LogEvent> {
        let events = self.lock();
        events
            .iter()
            .filter(|event| wanted(event))
            .cloned()
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<LogEvent>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Log {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log")
            .field("target", &self.target)
            .field("max_level", &self.max_level)
            .field("events", &*self.lock())
            .finish_non_exhaustive()
    }
}

impl Subscriber for Log {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.max_level && metadata.target().starts_with(&self.target)
    }

    fn event(&self, event: &Event<'_>) {
        let mut recorded = LogEvent {
            metadata: event.metadata(),
            fields: Vec::new(),
        };
        // Users' `Debug` and `Display` run here: not under the lock.
        event.record(&mut recorded);
        self.lock().push(recorded.clone());
        if let Some(listener) = &self.listener {
            listener(&recorded);
        }
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// An event that a [`Log`] has recorded.
///
/// It is written, compared and shown in a failed assertion as one line: the
/// level, the message, and the other fields in their order. The target is not
/// in it, as it is the name of a module.
///
/// ```
/// use buttress_core::testing::Log;
///
/// let log = Log::new();
/// log.within(|| {
///     tracing::info!(name = "shop", "ready");
///     tracing::error!(name = "shop", code = 7, "lost");
/// });
/// assert_eq!(log.take(), ["INFO ready name=shop", "ERROR lost name=shop code=7"]);
/// ```
#[derive(Clone)]
pub struct LogEvent {
    metadata: &'static Metadata<'static>,
    fields: Vec<(&'static str, String)>,
}

impl LogEvent {
    /// How grave it is.
    #[must_use]
    pub fn level(&self) -> Level {
        *self.metadata.level()
    }

    /// Where it comes from: the path of its module, unless it says otherwise.
    #[must_use]
    pub fn target(&self) -> &'static str {
        self.metadata.target()
    }

    /// What the event is called: `event`, its file and its line, unless it says
    /// otherwise (`info!(name: "…")`). A field `name` is another thing.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.metadata.name()
    }

    /// The message, or nothing (`""`).
    #[must_use]
    pub fn message(&self) -> &str {
        self.field("message").unwrap_or_default()
    }

    /// The text of a field: a string as it is, anything else as its `Debug`
    /// writes it, or its `Display` where it was logged with `%`. None if the
    /// event has no such field or it was left empty (an `Option`, say).
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields()
            .find_map(|(field, text)| (field == name).then_some(text))
    }

    /// All fields that are not empty, in their order, the message among them.
    pub fn fields(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.fields.iter().map(|(name, text)| (*name, &**text))
    }
}

impl Visit for LogEvent {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.fields.push((field.name(), format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.push((field.name(), value.to_owned()));
    }
}

impl fmt::Display for LogEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.level())?;
        if let Some(message) = self.field("message") {
            write!(f, " {message}")?;
        }
        self.fields()
            .filter(|(name, _)| *name != "message")
            .try_for_each(|(name, text)| write!(f, " {name}={text}"))
    }
}

/// The line, quoted.
impl fmt::Debug for LogEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

impl PartialEq<str> for LogEvent {
    fn eq(&self, line: &str) -> bool {
        let own = self.to_string();
        own == line
    }
}

impl PartialEq<&str> for LogEvent {
    fn eq(&self, line: &&str) -> bool {
        *self == **line
    }
}
