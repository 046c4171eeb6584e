//! What may be kept waiting by somebody else, a log whose reader sleeps above
//! all, and must not keep the signals or the watchdog waiting.

use std::{
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

/// How long a last word may take.
const MOMENT: Duration = Duration::from_millis(100);

/// Does it on a thread of its own; on this one if there is none to be had.
pub(crate) fn run<F: FnOnce() + Send + 'static>(work: F) {
    let place = Arc::new(Mutex::new(Some(work)));
    let take = |place: &Mutex<Option<F>>| {
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        place.take()
    };
    let theirs = Arc::clone(&place);
    let thread = thread::Builder::new().name("buttress-aside".into());
    let spawned = thread.spawn(move || {
        if let Some(work) = take(&theirs) {
            work();
        }
    });
    if spawned.is_err()
        && let Some(work) = take(&place)
    {
        work();
    }
}

/// The same, and waits for it a moment: for what is said before the end.
pub(crate) fn say(what: impl FnOnce() + Send + 'static) {
    let (tell, told) = mpsc::sync_channel(1);
    run(move || {
        what();
        let _ = tell.send(());
    });
    let _ = told.recv_timeout(MOMENT);
}
