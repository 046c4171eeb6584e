//! What is logged.
//!
//! In a program of its own: `tracing` asks only the subscriber of the thread
//! that comes first by an event whether anybody wants it.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress_core::testing::{advance, settle};
use buttress_health::{Check, Gate, HealthRegistry, Indicator};
use tracing::{Event, Level, Metadata, Subscriber, field, span, subscriber::set_default};

#[derive(Default)]
struct Log(Arc<Mutex<Vec<String>>>);

struct Line(Vec<String>);

impl field::Visit for Line {
    fn record_debug(&mut self, field: &field::Field, value: &dyn std::fmt::Debug) {
        self.0.push(format!("{}={value:?}", field.name()));
    }
    fn record_str(&mut self, field: &field::Field, value: &str) {
        self.0.push(format!("{}={value}", field.name()));
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("buttress") && *metadata.level() <= Level::INFO
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut line = Line(vec![event.metadata().level().to_string()]);
        event.record(&mut line);
        self.0.lock().unwrap().push(line.0.join(" "));
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[tokio::test(start_paused = true)]
async fn what_is_logged_is_what_has_changed() {
    let log = Log::default();
    let lines = Arc::clone(&log.0);
    let _here = set_default(log);
    let take = || std::mem::take(&mut *lines.lock().unwrap());

    let fails = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&fails);
    let check = Check::optional("dns", move || {
        let fails = asked.load(SeqCst);
        async move { if fails { Err("no server") } else { Ok(()) } }
    });
    let (source, drain) = (Indicator::new("queue"), Gate::open());
    let health = HealthRegistry::builder()
        .name("shop")
        .source(source.clone())
        .gate("drain", drain.clone())
        .check(check)
        .mark(0.5)
        .capacity(1)
        .on_change(|_| std::future::pending())
        .build()
        .unwrap();
    let running = health.start().unwrap();
    settle().await;
    // Whichever task came first.
    let mut begin = take();
    begin.sort();
    let expected = [
        "INFO message=ready name=shop score=1.0",
        "INFO message=the check passes name=shop check=dns",
    ];
    assert_eq!(begin, expected);

    source.set(0.25);
    fails.store(true, SeqCst);
    advance(Duration::from_secs(20)).await;
    let mut outage = take();
    outage.sort();
    let expected = [
        "WARN message=a listener is too slow for the changes of health name=shop lost=1",
        "WARN message=check failed name=shop check=dns took_ms=0 how=error error=no server",
        "WARN message=the score has fallen name=shop score=0.25 mark=0.5",
    ];
    assert_eq!(outage, expected);

    drain.close("shutting_down");
    advance(Duration::from_secs(1)).await;
    let closed = "WARN message=not ready name=shop score=0.25 reason=shutting_down";
    assert_eq!(take()[0], closed);
    running.stop().await;
    assert_eq!(take(), [""; 0]);
}
