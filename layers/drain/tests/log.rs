//! What is logged.

use std::time::Duration;

use buttress_core::testing::{
    Log,
    web::{self, ScriptedBody},
};
use buttress_drain::{ConnectionState, DrainLayer, Hook, Shutdown};
use http::Response;
use tower::{Layer, ServiceExt, service_fn};

#[tokio::test(start_paused = true)]
async fn each_phase_and_all_that_is_lost() {
    let log = Log::new().target("buttress");
    let _here = log.here();

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
        log.take(),
        [
            "INFO shutdown name=orders phase=draining reason=SIGTERM requests=2 connections=1 guards=1",
            "INFO shutting down already name=orders reason=SIGTERM",
            "INFO hook name=orders hook=leave priority=50 took_ms=0 result=done",
            "INFO shutdown name=orders phase=closing reason=SIGTERM requests=2 connections=1 guards=1",
            "INFO shutdown name=orders phase=closed reason=SIGTERM requests=2 connections=1 guards=1",
            "WARN cut off name=orders kind=request route=/export age_ms=25000 bytes=0",
            "WARN cut off name=orders kind=tunnel age_ms=25000 bytes=12",
            "WARN cut off name=orders kind=guard route=job age_ms=25000",
            "WARN cut off, not tracked name=orders requests=1",
            "INFO shutdown name=orders phase=cut reason=SIGTERM requests=2 connections=1 guards=1",
            "WARN what was cut is still there name=orders requests=2 connections=1 guards=1",
            "INFO shutdown name=orders phase=hooks reason=SIGTERM requests=2 connections=1 guards=1",
            "ERROR hook name=orders hook=flush priority=100 took_ms=0 result=failed why=disk full",
            "WARN hook name=orders hook=slow priority=50 took_ms=4500 result=timed_out",
            "WARN hook name=orders hook=never priority=1 took_ms=0 result=skipped",
            "INFO shutdown name=orders phase=done reason=SIGTERM requests=2 connections=1 guards=1",
            "INFO shut down name=orders took_ms=30000 exit_code=124",
        ]
    );
}
