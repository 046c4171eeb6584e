//! A thread that ends the process when the runtime cannot.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, Thread},
    time::Duration,
};

use buttress_core::clock;
use tracing::{error, warn};

use crate::{aside, report::CUT};

/// Ends the process, or what a test has in its place.
#[derive(Clone)]
pub(crate) struct Exit(Arc<dyn Fn(i32) + Send + Sync>);

impl Exit {
    pub(crate) fn new(exit: impl Fn(i32) + Send + Sync + 'static) -> Self {
        Self(Arc::new(exit))
    }

    pub(crate) fn call(&self, code: i32) {
        (self.0)(code);
    }
}

impl fmt::Debug for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Exit")
    }
}

/// How much later than all should have been over.
const GRACE: Duration = Duration::from_millis(500);

/// Armed; it stays so when it is dropped.
pub(crate) struct Watchdog {
    disarmed: Arc<AtomicBool>,
    thread: Thread,
}

impl Watchdog {
    /// Ends the process at `timeout` and a little, unless it is disarmed. None
    /// if there is no thread to be had.
    pub(crate) fn arm(name: Arc<str>, timeout: Duration, exit: Exit) -> Option<Self> {
        let disarmed = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&disarmed);
        let watch = move || {
            let end = clock::now() + timeout + GRACE;
            while !flag.load(Ordering::Acquire) {
                let left = end - clock::now();
                if left.is_zero() {
                    aside::say(move || {
                        error!(name = &*name, "the shutdown is stuck: the process ends");
                    });
                    exit.call(CUT);
                    return;
                }
                thread::park_timeout(left);
            }
        };
        let thread = thread::Builder::new().name("buttress-watchdog".into());
        match thread.spawn(watch) {
            Ok(handle) => Some(Self {
                disarmed,
                thread: handle.thread().clone(),
            }),
            Err(error) => {
                warn!(%error, "no thread for the watchdog");
                None
            }
        }
    }

    pub(crate) fn disarm(&self) {
        self.disarmed.store(true, Ordering::Release);
        self.thread.unpark();
    }
}
