//! A reverse proxy with the Buttress layers on every route.
//!
//! ```text
//!             ┌ serve ─────┐ ┌ proxy ────────────────────────────────────────────────────┐
//!             │ accept     │ │  route ─▶ rate limit ─▶ refusals ─▶ retry ─▶ forward      │
//!  client ──▶ │ count      │▶│    │                                 breaker ─▶ timeout ─▶ upstream
//!             │ time       │ │    └─ access line, written        balance, headers,       │
//!             │            │ │       when the body ends          pooled connections      │
//!             └────────────┘ └───────────────────────────────────────────────────────────┘
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

use std::{
    io::{self, IsTerminal, Write},
    net::SocketAddr,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use buttress::health::{Gate, Latch};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tracing_subscriber::EnvFilter;

use crate::{
    admin::Admin,
    cli::Start,
    proxy::Proxy,
    serve::{Stop, serve},
    settings::{Count, Limits, LogFormat, Nonsense},
};

/// How long requests in flight have once the program is told to stop.
const PATIENCE: Duration = Duration::from_secs(30);

/// Settings that make no sense.
const NONSENSE: u8 = 2;
/// A deadline cut something off.
const CUT_OFF: u8 = 124;

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
        settings.routes.push(demo::route(upstream));
    }
    settings.check(&origin)?;
    if check {
        let _ = io::stdout().write_all(settings.to_yaml().as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    start_logging(settings.log_format);
    let metrics = start_metrics();
    // Before the port is open: from then on, someone may want it to stop.
    let mut signals = Signals::new().map_err(|error| End::Io("signals".to_owned(), error))?;

    let (listener, listen) = bind(settings.listen.0).await?;
    let (admin_listener, admin) = bind(settings.admin.0).await?;
    let proxy = Arc::new(Proxy::new(&settings));
    let limits = Arc::new(settings.limits);

    let (stop, tell, mut all_gone) = Stop::new();
    // The admin port answers to the end, so that it is told to stop by nobody.
    let (never, _never, _) = Stop::new();
    let (routes, drain) = (Latch::new("routes"), Gate::open());
    let (health, endpoints) = admin::health(&proxy, &routes, drain.clone());
    let _watched = health.start().expect("this is a runtime");
    let page = Arc::new(Admin {
        proxy: Arc::clone(&proxy),
        health: endpoints,
        metrics,
        token: settings.admin_token,
    });
    let admin_limits = Arc::new(Limits {
        max_connections: Count(256),
        ..(*limits).clone()
    });
    tokio::spawn(serve(
        admin_listener,
        admin_limits,
        never,
        move |request, peer, busy| {
            let response = page.answer(request, peer, busy);
            std::future::ready(response)
        },
    ));
    let serving = tokio::spawn(serve(listener, limits, stop, move |request, peer, busy| {
        proxy.answer(request, peer, busy)
    }));
    routes.release();
    tracing::info!(%listen, %admin, "listening");
    if demo {
        // Nobody may be reading; the proxy does not depend on it.
        let _ = demo::greet(listen, admin);
    }

    let name = signals.next().await;
    drain.close("shutting_down");
    tracing::info!(signal = name, "stopping");
    let _ = tell.send(true);
    let gone = async {
        let _ = serving.await;
        // Ends when the last socket has let go of its end.
        all_gone.recv().await;
    };
    Ok(tokio::select! {
        biased;
        result = tokio::time::timeout(PATIENCE, gone) => match result {
            Ok(()) => {
                tracing::info!("stopped");
                ExitCode::SUCCESS
            }
            Err(_) => {
                tracing::warn!(after_ms = PATIENCE.as_millis() as u64, "cut off what was left");
                CUT_OFF.into()
            }
        },
        name = signals.next() => {
            tracing::warn!(signal = name, "stopped at once");
            ExitCode::FAILURE
        }
    })
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

/// The signals that stop the program.
#[cfg(unix)]
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};

        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Where there are no signals, Ctrl-C.
#[cfg(windows)]
struct Signals(tokio::signal::windows::CtrlC);

#[cfg(windows)]
impl Signals {
    fn new() -> io::Result<Self> {
        tokio::signal::windows::ctrl_c().map(Self)
    }

    async fn next(&mut self) -> &'static str {
        self.0.recv().await;
        "Ctrl-C"
    }
}
