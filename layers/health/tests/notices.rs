//! What listeners are told of, by the paused clock.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress_core::testing::{advance, settle};
use buttress_health::{
    Change, Check, CheckState, Failure, Gate, HealthRegistry, HealthRegistryBuilder, Indicator,
    Latch, Notice, Reason, Standing, Threshold,
};
use tokio::sync::Semaphore;

const SECOND: Duration = Duration::from_secs(1);

type Heard = Arc<Mutex<Vec<Notice>>>;

fn listening(builder: HealthRegistryBuilder) -> (HealthRegistryBuilder, Heard) {
    let heard = Heard::default();
    let hears = Arc::clone(&heard);
    let builder = builder.on_change(move |notice| {
        let hears = Arc::clone(&hears);
        async move { hears.lock().unwrap().push(notice) }
    });
    (builder, heard)
}

/// What was heard since it was last asked, in short.
fn take(heard: &Heard) -> Vec<String> {
    let notices = std::mem::take(&mut *heard.lock().unwrap());
    let short = notices.iter().map(|notice| {
        assert_eq!(notice.missed, 0);
        match &notice.change {
            Change::Readiness => match &notice.standing {
                Standing::Ready => "ready".to_owned(),
                Standing::NotReady(reason) => format!("not ready: {}", reason.as_str()),
            },
            Change::ScoreBelow(mark) => format!("{} < {mark}", notice.score),
            Change::ScoreReached(mark) => format!("{} >= {mark}", notice.score),
            Change::Check(name, state) => format!("{name}: {}", state.as_str()),
            other => panic!("{other:?}"),
        }
    });
    short.collect()
}

#[tokio::test(start_paused = true)]
async fn every_change_of_readiness_is_told_with_its_reason() {
    let (drain, latch) = (Gate::open(), Latch::new("routes"));
    let builder = HealthRegistry::builder()
        .gate("drain", drain.clone())
        .latch(&latch);
    let (builder, heard) = listening(builder);
    let (builder, too) = listening(builder);
    let health = builder.build().unwrap();
    drain.close("nobody hears it yet");
    drain.reopen();
    let running = health.start().unwrap();
    settle().await;
    assert_eq!(take(&heard), ["not ready: starting"]);
    advance(SECOND).await;
    assert_eq!(take(&heard), [""; 0]);
    latch.release();
    advance(Duration::from_millis(60)).await;
    assert_eq!(take(&heard), ["ready"]);
    drain.close("shutting_down");
    // Who says so is heard at once.
    health.look();
    settle().await;
    assert_eq!(take(&heard), ["not ready: shutting_down"]);
    drain.close("still_shutting_down");
    advance(Duration::from_millis(60)).await;
    assert_eq!(take(&heard), ["not ready: still_shutting_down"]);
    assert_eq!(take(&too).len(), 4);

    running.stop().await;
    drain.reopen();
    advance(SECOND).await;
    assert_eq!(take(&heard), [""; 0]);
    // Each start tells how it stands.
    let _running = health.start().unwrap();
    settle().await;
    assert_eq!(take(&heard), ["ready"]);
}

#[tokio::test(start_paused = true)]
async fn crossings_of_marks_are_told_once_and_so_is_the_threshold() {
    let source = Indicator::new("queue");
    let builder = HealthRegistry::builder()
        .source(source.clone())
        .mark(0.9)
        .mark(0.9)
        .threshold(Threshold::new(0.5))
        .evaluate_every(SECOND);
    let (builder, heard) = listening(builder);
    let health = builder.build().unwrap();
    let _running = health.start().unwrap();
    let at = async |score, secs: u32| {
        source.set(score);
        advance(SECOND * secs).await;
        take(&heard)
    };
    assert_eq!(at(1.0, 1).await, ["ready"]);
    assert_eq!(at(0.89, 5).await, ["0.89 < 0.9"]);
    assert_eq!(at(0.9, 5).await, ["0.9 >= 0.9"]);
    let down = ["0.1 < 0.5", "0.1 < 0.9", "not ready: score"];
    assert_eq!(at(0.1, 5).await, down);
    assert_eq!(at(0.0, 5).await, [""; 0]);
    assert_eq!(at(0.6, 5).await, ["0.6 >= 0.5", "ready"]);
    assert_eq!(at(1.0, 5).await, ["1 >= 0.9"]);
}

#[tokio::test(start_paused = true)]
async fn changes_of_checks_are_told_at_once() {
    let fails = Arc::new(Mutex::new(false));
    let asked = Arc::clone(&fails);
    let check = Check::required("db", move || {
        let fails = *asked.lock().unwrap();
        async move { if fails { Err("down") } else { Ok(()) } }
    });
    // So rarely that only news can be the reason.
    let builder = HealthRegistry::builder()
        .check(check)
        .look_every(3600 * SECOND);
    let (builder, heard) = listening(builder.evaluate_every(3600 * SECOND));
    let health = builder.build().unwrap();
    let running = health.start().unwrap();
    settle().await;
    // Whichever task came first.
    let mut begin = take(&heard);
    begin.retain(|heard| heard != "not ready: unknown");
    assert_eq!(begin, ["db: passing", "ready"]);
    *fails.lock().unwrap() = true;
    advance(6 * SECOND).await;
    let last = heard.lock().unwrap()[0].clone();
    assert_eq!(
        last.change,
        Change::Check("db".into(), CheckState::Failing(Failure::Error))
    );
    assert_eq!(
        last.standing,
        Standing::NotReady(Reason::CheckFailed("db".into()))
    );
    assert_eq!(take(&heard), ["db: failing", "not ready: check_failed"]);
    // An outage is told once.
    advance(60 * SECOND).await;
    assert_eq!(take(&heard), [""; 0]);
    drop(running);
}

#[tokio::test(start_paused = true)]
async fn a_slow_listener_keeps_nobody_waiting_and_is_told_what_it_missed() {
    let turns = Arc::new(Semaphore::new(0));
    let slow = Heard::default();
    let (turn, hears) = (Arc::clone(&turns), Arc::clone(&slow));
    let drain = Gate::open();
    let builder = HealthRegistry::builder()
        .gate("drain", drain.clone())
        .capacity(2)
        .on_change(move |notice| {
            let (turn, hears) = (Arc::clone(&turn), Arc::clone(&hears));
            async move {
                turn.acquire().await.unwrap().forget();
                hears.lock().unwrap().push(notice);
            }
        });
    let (builder, quick) = listening(builder);
    let health = builder.build().unwrap();
    let _running = health.start().unwrap();
    settle().await;
    const REASONS: [&str; 8] = ["1", "2", "3", "4", "5", "6", "7", "8"];
    for reason in REASONS {
        drain.close(reason);
        health.look();
        settle().await;
        // The other one hears each at once.
        assert_eq!(take(&quick).pop().unwrap(), format!("not ready: {reason}"));
    }
    // The first is at work, two wait, one more does; the rest is lost.
    assert_eq!(health.missed_notices(), 5);
    turns.add_permits(100);
    advance(SECOND).await;
    let heard: Vec<(Option<&str>, u64)> = {
        let notices = std::mem::take(&mut *slow.lock().unwrap());
        let short = |notice: &Notice| {
            let reason = match notice.standing.reason() {
                Some(Reason::Gate(reason)) => Some(*reason),
                None => None,
                other => panic!("{other:?}"),
            };
            (reason, notice.missed)
        };
        notices.iter().map(short).collect()
    };
    // And the last of all is known.
    let expected = [(None, 0), (Some("1"), 0), (Some("2"), 0), (Some("8"), 5)];
    assert_eq!(heard, expected);

    drain.reopen();
    advance(SECOND).await;
    assert_eq!(slow.lock().unwrap().pop().unwrap().missed, 0);
    assert_eq!(health.missed_notices(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_listener_that_panics_hears_the_next() {
    let drain = Gate::open();
    let heard = Arc::new(Mutex::new(0));
    let hears = Arc::clone(&heard);
    let health = HealthRegistry::builder()
        .gate("drain", drain.clone())
        .on_change(move |notice| {
            *hears.lock().unwrap() += 1;
            assert!(!notice.standing.is_ready(), "a listener's own fault");
            async {}
        })
        .build()
        .unwrap();
    let _running = health.start().unwrap();
    settle().await;
    drain.close("shutting_down");
    advance(SECOND).await;
    // A poisoned lock would say so.
    assert!(heard.lock().is_ok_and(|heard| *heard == 2));
}
