//! What is logged.
//!
//! In a program of its own: `tracing` asks only the subscriber of the thread
//! that comes first by an event whether anybody wants it.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress_core::testing::web::{self, ScriptedBody};
use buttress_drain::{ConnectionState, DrainLayer, Hook, Shutdown};
use http::Response;
use tower::{Layer, ServiceExt, service_fn};
use tracing::{Event, Metadata, Subscriber, field, span, subscriber::set_default};

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
        metadata.target().starts_with("buttress")
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
async fn each_phase_and_all_that_is_lost() {
    let log = Log::default();
    let lines = Arc::clone(&log.0);
    let _here = set_default(log);

    let shutdown = Shutdown::builder().name("orders").build().unwrap();
    let handler = service_fn(async |_: http::Request<_>| {
        Ok::<_, std::convert::Infallible>(Response::new(ScriptedBody::new().hang()))
    });
    let named = DrainLayer::new(&shutdown).route("/export").layer(handler);
    let plain = DrainLayer::new(&shutdown).layer(handler);
    let tunnel = shutdown.connection();
    tunnel.set_state(ConnectionState::Upgraded);
    tunnel.wrote(12);
    let _one = named.oneshot(web::get("/export?secret")).await.unwrap();
    let _other = plain.oneshot(web::get("/")).await.unwrap();
    let _job = shutdown.guard("job");
    let late = Duration::from_secs(99);
    let slow = move || async move { tokio::time::sleep(late).await };
    shutdown.hook(Hook::new("flush", async || Err("disk full")).priority(100));
    shutdown.hook(Hook::new("slow", slow).limit(late));
    shutdown.hook(Hook::new("never", async || ()).priority(1));
    shutdown.on_drain("leave", async || ());
    shutdown.trigger("SIGTERM");
    assert!(!shutdown.trigger("SIGTERM"));
    let report = shutdown.run().await;
    assert_eq!(report.exit_code(), 124);

    assert_eq!(
        *lines.lock().unwrap(),
        [
            "INFO message=shutdown name=orders phase=draining reason=SIGTERM requests=2 connections=1 guards=1",
            "INFO message=shutting down already name=orders reason=SIGTERM",
            "INFO message=hook name=orders hook=leave priority=50 took_ms=0 result=done",
            "INFO message=shutdown name=orders phase=closing reason=SIGTERM requests=2 connections=1 guards=1",
            "INFO message=shutdown name=orders phase=closed reason=SIGTERM requests=2 connections=1 guards=1",
            "WARN message=cut off name=orders kind=request route=/export age_ms=25000 bytes=0",
            "WARN message=cut off name=orders kind=tunnel age_ms=25000 bytes=12",
            "WARN message=cut off name=orders kind=guard route=job age_ms=25000",
            "WARN message=cut off, not tracked name=orders requests=1",
            "INFO message=shutdown name=orders phase=cut reason=SIGTERM requests=2 connections=1 guards=1",
            "WARN message=what was cut is still there name=orders requests=2 connections=1 guards=1",
            "INFO message=shutdown name=orders phase=hooks reason=SIGTERM requests=2 connections=1 guards=1",
            "ERROR message=hook name=orders hook=flush priority=100 took_ms=0 result=failed why=disk full",
            "WARN message=hook name=orders hook=slow priority=50 took_ms=4500 result=timed_out",
            "WARN message=hook name=orders hook=never priority=1 took_ms=0 result=skipped",
            "INFO message=shutdown name=orders phase=done reason=SIGTERM requests=2 connections=1 guards=1",
            "INFO message=shut down name=orders took_ms=30000 exit_code=124",
        ]
    );
}
