//! A reverse proxy with the Buttress layers on every route.
//!
//! ```text
//!             ┌ serve ─────┐ ┌ proxy ─────────────────────────────────────────────────────────┐
//!             │ the drain: │ │  route ─▶ drain ─▶ rate limit ─▶ refusals ─▶ retry ─▶ forward  │
//!  client ──▶ │ accept     │▶│    │                                      breaker ─▶ timeout ─▶ upstream
//!             │ limit      │ │    └─ access line, written             balance, headers,       │
//!             │ stop       │ │       when the body ends               pooled connections      │
//!             └────────────┘ └────────────────────────────────────────────────────────────────┘
//! ```
//!
//! `README.md` beside this file says how to start it and what the settings
//! mean. All that is clever about the layers is in the layers; what is here is
//! what any proxy needs.

mod access;
mod admin;
mod balance;
mod body;
mod cli;
mod demo;
mod forward;
mod grpc_timeout;
mod headers;
mod proxy;
mod serve;
mod settings;
mod upstream;
mod webhook;

use std::{
    convert::Infallible,
    future::ready,
    io::{self, IsTerminal, Write},
    net::SocketAddr,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use buttress::{
    drain::{Hook, PeerAddrs, Priority, Shutdown},
    health::Latch,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tower::service_fn;
use tracing_subscriber::EnvFilter;

use crate::{
    admin::Admin,
    cli::Start,
    proxy::Proxy,
    serve::server,
    settings::{Count, Limits, LogFormat, Nonsense, Tls},
};

/// Settings that make no sense.
const NONSENSE: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(code) => code,
        Err(End::Nonsense(nonsense)) => end(NONSENSE, &nonsense.to_string()),
        Err(End::Io(what, error)) => end(1, &format!("{what}: {error}")),
    }
}

/// Why the program ends before it has served.
enum End {
    Nonsense(Nonsense),
    Io(String, io::Error),
}

impl From<Nonsense> for End {
    fn from(nonsense: Nonsense) -> Self {
        Self::Nonsense(nonsense)
    }
}

/// One line on standard error. Not through the log: it may be filtered, and
/// not be set up yet.
fn end(code: u8, line: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "{line}");
    code.into()
}

async fn run() -> Result<ExitCode, End> {
    let Start {
        mut settings,
        origin,
        demo,
        check,
    } = Start::read()?;
    if demo {
        let upstream = demo::upstream()
            .await
            .map_err(|error| End::Io("the demo's upstream".to_owned(), error))?;
        settings.routes.extend(demo::routes(upstream));
    }
    settings.check(&origin)?;
    if check {
        let _ = io::stdout().write_all(settings.to_yaml().as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    start_logging(settings.log_format);
    let metrics = start_metrics();
    let shutdown = settings.shutdown.builder().name("proxy");
    let shutdown = shutdown.exit_process().build();
    let shutdown = shutdown.expect("checked in the settings");
    // Before the port is open: from then on, someone may want it to stop.
    shutdown
        .install_signals()
        .map_err(|error| End::Io("signals".to_owned(), error))?;

    let (listener, listen) = bind(settings.listen.0).await?;
    let (admin_listener, admin) = bind(settings.admin.0).await?;
    let proxy = Arc::new(Proxy::new(&settings, &shutdown));
    let routes = Latch::new("routes");
    let (health, endpoints) = admin::health(&proxy, &routes, shutdown.clone());

    // Nobody waits for the admin port, and nobody closes it but the last hook:
    // until then it says how the shutdown goes.
    let apart = Shutdown::builder().name("admin").build();
    let apart = apart.expect("these are the defaults");
    let admin_limits = Limits {
        max_connections: Count(256),
        ..settings.limits.clone()
    };
    let page = Arc::new(Admin {
        proxy: Arc::clone(&proxy),
        health: endpoints,
        metrics,
        token: settings.admin_token,
    });
    let page = service_fn(move |request| ready(Ok::<_, Infallible>(page.answer(request))));
    let page = server(&apart, &admin_limits).serve(admin_listener, page);
    let page = tokio::spawn(page);
    let close = Hook::new("admin port", async move || page.abort());
    shutdown.hook(close.priority(Priority::BACKGROUND));

    let limits = Arc::clone(&proxy);
    shutdown.hook(Hook::new("limits", async move || limits.give_back().await));

    let service = PeerAddrs(service_fn(move |request| {
        let answer = proxy.answer(request);
        async { Ok::<_, Infallible>(answer.await) }
    }));
    let server = server(&shutdown, &settings.limits);
    match settings.tls.as_ref().map(Tls::config) {
        Some(tls) => {
            let server = server.tls(tls.expect("checked in the settings"));
            tokio::spawn(server.serve_with(listener, service));
        }
        None => drop(tokio::spawn(server.serve_with(listener, service))),
    }
    routes.release();
    let _watched = health.start().expect("this is a runtime");
    tracing::info!(%listen, %admin, "listening");
    if demo {
        // Nobody may be reading; the proxy does not depend on it.
        let _ = demo::greet(listen, admin);
    }
    // Not by returning: that would wait for a name being looked up.
    shutdown.run().await.exit()
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), End> {
    let failed = |error| End::Io(address.to_string(), error);
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

fn start_logging(format: Option<LogFormat>) {
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::Level::INFO.into())
        .from_env_lossy();
    let terminal = io::stderr().is_terminal();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(terminal);
    match format {
        Some(LogFormat::Json) => log.json().flatten_event(true).init(),
        None if !terminal => log.json().flatten_event(true).init(),
        _ => log.init(),
    }
}

fn start_metrics() -> PrometheusHandle {
    // Seconds, from a fast answer in the next rack to a slow report.
    const BUCKETS: [f64; 12] = [
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0,
    ];
    const ATTEMPTS: [f64; 5] = [1.0, 2.0, 3.0, 5.0, 10.0];
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &BUCKETS)
        .expect("there are buckets")
        .set_buckets_for_metric(Matcher::Suffix("_attempts_count".to_owned()), &ATTEMPTS)
        .expect("there are buckets")
        .install_recorder()
        .expect("nobody was here before");
    let upkeep = handle.clone();
    tokio::spawn(async move {
        // Else a histogram that nobody reads grows for ever.
        let mut every = tokio::time::interval(Duration::from_secs(5));
        loop {
            every.tick().await;
            upkeep.run_upkeep();
        }
    });
    handle
}
