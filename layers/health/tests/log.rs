//! What is logged.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress_core::testing::{Log, advance, settle};
use buttress_health::{Check, Gate, HealthRegistry, Indicator};
use tracing::Level;

#[tokio::test(start_paused = true)]
async fn what_is_logged_is_what_has_changed() {
    let log = Log::new().target("buttress").max_level(Level::INFO);
    let _here = log.here();

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
    let mut begin = log.take();
    begin.sort_by_key(ToString::to_string);
    let expected = [
        "INFO ready name=shop score=1.0",
        "INFO the check passes name=shop check=dns",
    ];
    assert_eq!(begin, expected);

    source.set(0.25);
    fails.store(true, SeqCst);
    advance(Duration::from_secs(20)).await;
    let mut outage = log.take();
    outage.sort_by_key(ToString::to_string);
    let expected = [
        "WARN a listener is too slow for the changes of health name=shop lost=1",
        "WARN check failed name=shop check=dns took_ms=0 how=error error=no server",
        "WARN the score has fallen name=shop score=0.25 mark=0.5",
    ];
    assert_eq!(outage, expected);

    drain.close("shutting_down");
    advance(Duration::from_secs(1)).await;
    let closed = "WARN not ready name=shop score=0.25 reason=shutting_down";
    assert_eq!(log.take()[0], closed);
    running.stop().await;
    assert_eq!(log.take(), [""; 0]);
}
