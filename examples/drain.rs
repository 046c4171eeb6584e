//! A server that can be restarted at any time, and nobody notices: it finishes
//! what it has begun, and says beforehand that it is about to go.
//!
//! ```text
//! cargo run --example drain [ADDRESS [ADMIN [DRAIN-DELAY-MS]]]
//! ```

#![expect(clippy::print_stdout, reason = "it is there to be read")]

use std::{env, error::Error, process, time::Duration};

use axum::{Extension, Router, routing::get};
use buttress::{
    drain::{DrainLayer, DrainSignal, Hook, Priority, Server, Shutdown},
    health::{HealthRegistry, Latch},
};
use tokio::{net::TcpListener, time::sleep};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let argument = |at, default: &str| env::args().nth(at).unwrap_or_else(|| default.into());
    let delay = argument(3, "5000").parse().map(Duration::from_millis)?;

    // Half a minute in all, the last five seconds for the hooks. Before any
    // address is listened on, so that no signal finds it unprepared.
    let shutdown = Shutdown::builder()
        .drain_delay(delay)
        .exit_process()
        .build()?;
    shutdown.install_signals()?;
    let flush = Hook::new("flush", async || {
        println!("  written what was not yet written");
    });
    shutdown.hook(flush.priority(Priority::HIGH));

    // One answers at once, the other takes its time, and can be told.
    let app = Router::new()
        .route("/", get(|| async { "hello\n" }))
        .route("/slow", get(slow))
        .layer(DrainLayer::new(&shutdown).signal());

    // Probes are asked at an address of their own, to the very end.
    let routes = Latch::new("routes");
    let health = HealthRegistry::builder()
        .gate("drain", shutdown.clone())
        .latch(&routes)
        .build()?;
    let _checks = health.start()?;
    let admin = TcpListener::bind(argument(2, "127.0.0.1:3001")).await?;
    let probes = admin.local_addr()?;
    tokio::spawn(async move {
        let probes = Router::new().nest_service("/health", health.service());
        axum::serve(admin, probes).await
    });

    let listener = TcpListener::bind(argument(1, "127.0.0.1:3000")).await?;
    let url = format!("http://{}", listener.local_addr()?);
    tokio::spawn(Server::new(&shutdown).serve(listener, app));
    routes.release();
    println!(
        "Listening, process {}. An answer that takes three seconds:\n",
        process::id()
    );
    println!("    curl -i {url}/slow\n");
    println!("Stop it meanwhile (again to stop it at once), and ask whether it is ready:\n");
    println!(
        "    kill {}; curl -i http://{probes}/health/ready\n",
        process::id()
    );

    let report = shutdown.run().await;
    println!("{report}");
    report.exit()
}

/// Three seconds; it would be less if it were told to be brief.
async fn slow(Extension(drain): Extension<DrainSignal>) -> String {
    sleep(Duration::from_secs(3)).await;
    match drain.remaining() {
        None => "at last\n".to_owned(),
        Some(left) => format!("at last, with {} s to spare\n", left.as_secs()),
    }
}
