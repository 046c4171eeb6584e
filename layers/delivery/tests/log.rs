//! What is logged.
//!
//! In a program of its own: `tracing` asks only the subscriber of the thread
//! that comes first by an event whether anybody wants it.

mod common;

use std::sync::{Arc, Mutex};

use buttress_core::testing::{Step, advance, settle};
use common::*;
use tracing::{Event, Level, Metadata, Subscriber, field, span, subscriber::set_default};

#[derive(Default)]
struct Log(Arc<Mutex<Vec<String>>>);

struct Line(Vec<String>);

impl field::Visit for Line {
    fn record_debug(&mut self, field: &field::Field, value: &dyn std::fmt::Debug) {
        // Random, and made of the instance.
        if field.name() != "id" {
            self.0.push(format!("{}={value:?}", field.name()));
        }
    }
    fn record_str(&mut self, field: &field::Field, value: &str) {
        self.0.push(format!("{}={value}", field.name()));
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("buttress_delivery") && *metadata.level() <= Level::DEBUG
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
async fn what_becomes_of_deliveries_is_logged_and_no_secret() {
    let log = Log::default();
    let lines = Arc::clone(&log.0);
    let _here = set_default(log);
    let take = || std::mem::take(&mut *lines.lock().unwrap());

    let (transport, receiver) = receiver(|_| status(200));
    receiver.push(Step::err("no route to https://a.example/T0KEN?key=K3Y"));
    let webhooks = builder()
        .name("shop")
        .max_dead_letters(1)
        .build(transport)
        .unwrap();
    let registration = hook("https://a.example/T0KEN?key=K3Y")
        .id("mine")
        .signed_by(buttress_webhook::Standard::new(), [secret()])
        .unwrap()
        .headers([("authorization", "B3ARER")]);
    webhooks.register(registration).unwrap();
    let worker = webhooks.start().unwrap();
    webhooks.emit(event("a.b").id("msg_1")).await.unwrap();
    settle().await;
    let of = "event=a.b event_id=msg_1 registration=mine";
    let mut all = take();
    assert_eq!(
        all,
        [format!(
            "INFO message=to be delivered again name=shop {of} attempt=1 error=transport retry_in=Some(1s)"
        )]
    );
    advance(secs(2)).await;
    let line = take();
    assert_eq!(
        line,
        [format!(
            "DEBUG message=delivered name=shop {of} attempt=2 status=200"
        )]
    );
    all.extend(line);

    for _ in 0..2 {
        receiver.push(status(302));
        webhooks.emit(event("a.b").id("msg_1")).await.unwrap();
        settle().await;
    }
    let line = take();
    let failed =
        format!("WARN message=not delivered name=shop {of} attempt=1 status=302 error=redirected");
    let dropped = "WARN message=a dead letter was dropped for want of room name=shop event=a.b event_id=msg_1";
    assert_eq!(line, [failed.clone(), failed, dropped.into()]);
    all.extend(line);

    receiver.push(Step::panic("on purpose"));
    webhooks.emit(event("a.b").id("msg_1")).await.unwrap();
    settle().await;
    all.extend(take());
    assert!(
        all.iter()
            .any(|line| line.contains("the transport of webhooks panicked"))
    );
    worker.stop(secs(1)).await;
    let line = take();
    assert_eq!(
        line,
        ["INFO message=the webhooks' worker has stopped name=shop finished=0 cut_off=0 queued=1"]
    );
    all.extend(line);
    for line in &all {
        for secret in ["T0KEN", "K3Y", "B3ARER", "MfKQ", "hello", "a.example"] {
            assert!(!line.contains(secret), "{secret} in {line}");
        }
    }
}
