use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

use tracing::{Level, instrument::WithSubscriber};

use super::*;

#[test]
fn an_event_is_its_level_its_message_and_its_fields_as_text() {
    let log = Log::new();
    log.within(|| {
        let name = String::from("shop");
        tracing::warn!(
            name: "outage",
            target: "shop::till",
            name,
            why = ?Some("x y"),
            nobody = None::<u32>,
            share = 1.0,
            error = %"no route",
            "open for {}",
            7
        );
        tracing::trace!(code = 7);
    });
    let [outage, bare] = &log.events()[..] else {
        panic!("{log:?}");
    };

    assert_eq!(outage.level(), Level::WARN);
    assert_eq!(outage.target(), "shop::till");
    assert_eq!(outage.name(), "outage");
    assert_eq!(outage.message(), "open for 7");
    assert_eq!(outage.field("message"), Some("open for 7"));
    assert_eq!(outage.field("name"), Some("shop"));
    assert_eq!(outage.field("why"), Some("Some(\"x y\")"));
    assert_eq!(outage.field("nobody"), None);
    assert_eq!(outage.field("nothing"), None);
    let fields: Vec<_> = outage.fields().map(|(name, _)| name).collect();
    assert_eq!(fields, ["message", "name", "why", "share", "error"]);
    let line = "WARN open for 7 name=shop why=Some(\"x y\") share=1.0 error=no route";
    assert_eq!(outage.to_string(), line);
    assert_eq!(format!("{outage:?}"), format!("{line:?}"));

    assert_eq!(bare.message(), "");
    assert_eq!(bare.target(), module_path!());
    assert_eq!(*bare, "TRACE code=7");
    assert_ne!(*bare, "TRACE code=8");
}

#[test]
fn settings_say_what_is_recorded() {
    fn speak() {
        tracing::info!(target: "shop::till", "1");
        tracing::info!(target: "till::shop", "2");
        tracing::debug!(target: "shop", "3");
        tracing::error!(target: "shop", "4");
    }
    let all = Log::new();
    let shop = all.clone().target("shop");
    let grave = shop.clone().max_level(Level::INFO);
    all.within(speak);
    assert_eq!(all.take(), ["INFO 1", "INFO 2", "DEBUG 3", "ERROR 4"]);
    shop.within(speak);
    assert_eq!(all.take(), ["INFO 1", "DEBUG 3", "ERROR 4"]);
    grave.within(speak);
    assert_eq!(shop.take(), ["INFO 1", "ERROR 4"]);
    assert_eq!(all.take(), [""; 0]);
    assert!(Log::default().within(|| tracing::enabled!(target: "shop", Level::TRACE)));
    assert!(!grave.within(|| tracing::enabled!(target: "shop", Level::DEBUG)));
}

#[test]
fn events_are_found_by_what_is_in_them() {
    let log = Log::new();
    log.within(|| {
        tracing::info!(name = "a", "opened");
        tracing::info!(name = "b", "opened");
        tracing::info!(name = "a", "opened again");
    });
    assert_eq!(
        log.saying("opened"),
        ["INFO opened name=a", "INFO opened name=b"]
    );
    assert_eq!(
        log.with("name", "a"),
        ["INFO opened name=a", "INFO opened again name=a"]
    );
    assert_eq!(log.with("nick", "a"), [""; 0]);
    assert_eq!(log.events().len(), 3);
}

/// The inner log for as long as its guard is there, and no other thread ever.
#[test]
fn a_log_hears_its_thread_while_it_is_installed() {
    let (outer, inner) = (Log::new(), Log::new());
    tracing::info!("before");
    {
        let _outer = outer.here();
        tracing::info!("outer");
        {
            let _inner = inner.here();
            tracing::info!("inner");
        }
        thread::spawn(|| tracing::info!("elsewhere"))
            .join()
            .unwrap();
        tracing::info!("outer again");
    }
    tracing::info!("after");
    assert_eq!(outer.take(), ["INFO outer", "INFO outer again"]);
    assert_eq!(inner.take(), ["INFO inner"]);
}

#[test]
fn a_future_takes_its_log_along() {
    let log = Log::new();
    let future = async { tracing::info!("elsewhere") }.with_subscriber(log.clone());
    thread::spawn(|| tokio_test::block_on(future))
        .join()
        .unwrap();
    assert_eq!(log.take(), ["INFO elsewhere"]);
}

/// The thread without a log comes first, and `tracing` would have asked it
/// alone whether anybody wants to hear of this.
#[test]
fn a_thread_without_a_log_silences_nothing() {
    fn speak() {
        tracing::info!("said");
    }
    let log = Log::new();
    let _here = log.here();
    thread::spawn(speak).join().unwrap();
    speak();
    assert_eq!(log.take(), ["INFO said"]);
}

/// As above, and the place was known before there was any log at all, and
/// between two of them.
#[test]
fn a_log_hears_what_was_silent_before() {
    fn speak() {
        tracing::info!("said");
    }
    for _ in 0..3 {
        speak();
        let log = Log::new();
        log.within(speak);
        assert_eq!(log.take(), ["INFO said"]);
    }
}

#[test]
fn a_listener_may_look_at_the_log() {
    let log = Log::new();
    let (seen, heard) = (log.clone(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&heard);
    let told = log.clone().max_level(Level::INFO).on_event(move |event| {
        // From elsewhere, too: were it locked, this would never end.
        let events = thread::scope(|scope| scope.spawn(|| seen.events()).join().unwrap());
        assert_eq!(events.last().unwrap().to_string(), event.to_string());
        count.fetch_add(1, SeqCst);
    });
    told.within(|| {
        tracing::info!("first");
        tracing::debug!("not recorded");
        tracing::info!("second");
    });
    assert_eq!(heard.load(SeqCst), 2);
    assert_eq!(log.take(), ["INFO first", "INFO second"]);
}

#[test]
fn a_listener_or_a_value_that_panics_leaves_the_log_usable() {
    /// Reads the log while it is written down, and breaks.
    struct Breaks(Log);
    impl fmt::Display for Breaks {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            panic!("after {}", self.0.events().len());
        }
    }
    let log = Log::new();
    let breaks = Breaks(log.clone());
    let told = log
        .clone()
        .on_event(|event| assert_ne!(event.message(), "no"));
    let panics = |f: &dyn Fn()| catch_unwind(AssertUnwindSafe(|| told.within(f))).is_err();
    assert!(panics(&|| tracing::info!("no")));
    assert!(panics(&|| tracing::info!(value = %breaks, "yes")));
    assert!(!panics(&|| tracing::info!("yes")));
    assert_eq!(log.take(), ["INFO no", "INFO yes"]);
}

#[test]
fn the_global_log_hears_every_thread_that_has_no_other() {
    let log = Log::global();
    tracing::info!(test = "global", "here");
    thread::spawn(|| tracing::info!(test = "global", "there"))
        .join()
        .unwrap();
    Log::new().within(|| tracing::info!(test = "global", "scoped"));
    assert_eq!(
        log.with("test", "global"),
        ["INFO here test=global", "INFO there test=global"]
    );
    assert_eq!(Log::global().with("test", "global").len(), 2);
}
