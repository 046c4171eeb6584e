//! Real signals, sent to processes of the test's own: this program again, as
//! what `BUTTRESS_DRAIN_CHILD` says.
#![cfg(unix)]

use std::{
    env,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use buttress_core::{clock, testing::Log};
use buttress_drain::{Hook, Phase, Shutdown, ShutdownBuilder};
use rustix::{
    process::{Pid, Signal, kill_process},
    pty::{self, OpenptFlags},
};

const ROLE: &str = "BUTTRESS_DRAIN_CHILD";
const PATIENCE: Duration = Duration::from_secs(30);

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn builder(role: &str) -> ShutdownBuilder {
    // Longer than anybody waits here.
    let (delay, timeout) = match role {
        "interactive" => (PATIENCE * 2, PATIENCE * 3),
        _ => (millis(300), millis(2_000)),
    };
    Shutdown::builder()
        .drain_delay(delay)
        .timeout(timeout)
        .hook_reserve(millis(500))
        .exit_process()
}

/// The line by which a child says how far it is.
fn say(what: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "child: {what}").unwrap();
    out.flush().unwrap();
}

/// What the tests below start. By itself it does nothing.
#[test]
fn child() {
    let Ok(role) = env::var(ROLE) else { return };
    let shutdown = builder(&role).build().unwrap();
    // Without a runtime, and before anything else.
    shutdown.install_signals().unwrap();
    // Once is enough.
    shutdown.install_signals().unwrap();
    if role == "mute" {
        // A log whose reader has gone to sleep: whoever writes waits.
        let mute = Log::new().on_event(|_| {
            loop {
                thread::park();
            }
        });
        tracing::subscriber::set_global_default(mute).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    shutdown.hook(Hook::new("last", async || say("hook")));
    let stuck = (role == "stuck").then(|| shutdown.guard("stuck"));
    let report = runtime.block_on(async {
        let seen = shutdown.reached(Phase::Draining);
        tokio::spawn(async move {
            seen.await;
            say("draining");
        });
        if role == "untracked" {
            tokio::task::spawn_blocking(|| thread::park_timeout(PATIENCE * 2));
        }
        say("ready");
        if role == "mute" || role == "blocked" {
            let (_tell, never) = mpsc::channel::<()>();
            let _ = never.recv_timeout(PATIENCE * 2);
        }
        shutdown.run().await
    });
    drop(stuck);
    say(&report.to_string());
    if role == "lingering" {
        // Still here when it is all over: a second signal ends it.
        let (_tell, never) = mpsc::channel::<()>();
        let _ = never.recv_timeout(PATIENCE * 2);
    }
    report.exit();
}

/// A child, its lines, and when it was signalled.
struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Running {
    fn start(role: &str) -> Self {
        Self::start_at(role, Stdio::null())
    }

    fn start_at(role: &str, stdin: impl Into<Stdio>) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (tell, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                // The test harness begins a line of its own.
                if let Some((_, line)) = line.split_once("child: ")
                    && tell.send(line.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let mut running = Self { child, lines };
        running.expect("ready");
        running
    }

    /// The next line that begins so.
    fn expect(&mut self, what: &str) {
        let begins = |line: &String| line.starts_with(what);
        let mut line = self.lines.recv_timeout(PATIENCE);
        while line.as_ref().is_ok_and(|line| !begins(line)) {
            line = self.lines.recv_timeout(PATIENCE);
        }
        if line.is_err() {
            let mut errors = String::new();
            let _ = self.child.kill();
            let stderr = self.child.stderr.take();
            let _ = stderr.map(|mut stderr| stderr.read_to_string(&mut errors));
            panic!("waited for {what:?}: {line:?} {errors}");
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// With what it ends, and after how long; killed if it does not.
    fn ends(&mut self) -> (Option<i32>, Duration) {
        let start = clock::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code(), clock::now() - start);
            }
            assert!(clock::now() - start < PATIENCE, "it goes on and on");
            thread::park_timeout(millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_signal_drains_and_the_process_ends_well() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut child = Running::start("plain");
        child.signal(signal);
        child.expect("draining");
        child.expect("hook");
        let name = if signal == Signal::TERM {
            "SIGTERM"
        } else {
            "SIGINT"
        };
        child.expect("shut down in ");
        let (code, took) = child.ends();
        assert_eq!(code, Some(0), "{name}");
        assert!(took < millis(1_500), "{took:?}");
    }
}

/// Somebody sits there and waits: no delay. SIGTERM comes from elsewhere.
#[test]
fn an_interrupt_at_a_terminal_has_no_delay() {
    let terminal = pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    pty::grantpt(&terminal).unwrap();
    pty::unlockpt(&terminal).unwrap();
    let name = pty::ptsname(&terminal, Vec::new()).unwrap();
    let stdin = || File::open(name.to_str().unwrap()).unwrap();

    let mut child = Running::start_at("interactive", stdin());
    child.signal(Signal::INT);
    // The notice is told by a task beside it, which may come later.
    child.expect("shut down in ");
    let (code, took) = child.ends();
    assert_eq!(code, Some(0));
    assert!(took < millis(5_000), "{took:?}");

    let mut child = Running::start_at("interactive", stdin());
    child.signal(Signal::TERM);
    child.expect("draining");
    thread::park_timeout(millis(300));
    assert!(child.lines.try_recv().is_err(), "it has the delay");
    child.signal(Signal::INT);
    assert_eq!(child.ends().0, Some(1));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    for (first, second) in [(Signal::TERM, Signal::TERM), (Signal::TERM, Signal::INT)] {
        let mut child = Running::start("stuck");
        child.signal(first);
        child.expect("draining");
        child.signal(second);
        let (code, took) = child.ends();
        // Long before the cut, and no hook ran.
        assert_eq!(code, Some(1));
        assert!(took < millis(1_000), "{took:?}");
        assert!(child.lines.recv_timeout(PATIENCE).is_err());
    }
}

#[test]
fn a_signal_ends_what_lingers_after_the_end() {
    let mut child = Running::start("lingering");
    child.signal(Signal::TERM);
    child.expect("draining");
    child.expect("hook");
    child.expect("shut down in ");
    child.signal(Signal::TERM);
    assert_eq!(child.ends().0, Some(1));
}

#[test]
fn a_deadline_is_124_and_the_hooks_run() {
    let mut child = Running::start("stuck");
    child.signal(Signal::TERM);
    child.expect("draining");
    child.expect("hook");
    child.expect("shut down in ");
    assert_eq!(child.ends().0, Some(124));
}

/// Nothing in the runtime runs any more, and then not a line of the log gets
/// through either: the signal is heard, the watchdog bites half a second after
/// the timeout, and a second signal ends it at once.
#[test]
fn neither_a_blocked_runtime_nor_a_blocked_log_keeps_the_end_waiting() {
    for role in ["blocked", "mute"] {
        let mut child = Running::start(role);
        child.signal(Signal::TERM);
        let (code, took) = child.ends();
        assert_eq!(code, Some(124), "{role}");
        let range = millis(2_300)..millis(6_000);
        assert!(range.contains(&took), "{role}: {took:?}");

        let mut child = Running::start(role);
        child.signal(Signal::TERM);
        // Two that come at once may be one.
        thread::park_timeout(millis(200));
        child.signal(Signal::TERM);
        let (code, took) = child.ends();
        assert_eq!(code, Some(1), "{role}");
        assert!(took < millis(1_500), "{role}: {took:?}");
    }
}

/// What nobody has a guard for is not waited for.
#[test]
fn work_without_a_guard_does_not_hold_the_end() {
    let mut child = Running::start("untracked");
    child.signal(Signal::TERM);
    child.expect("shut down in ");
    let (code, took) = child.ends();
    assert_eq!(code, Some(0));
    assert!(took < millis(1_500), "{took:?}");
}

/// Where nobody may end the process: by force.
#[test]
fn without_leave_to_exit_a_second_trigger_is_force() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let shutdown = Shutdown::builder().build().unwrap();
    let _stuck = shutdown.guard("stuck");
    shutdown.install_signals().unwrap();
    let driver = shutdown.clone();
    let report = runtime.block_on(async {
        let me = rustix::process::getpid();
        let drive = tokio::spawn(async move { driver.run().await });
        kill_process(me, Signal::TERM).unwrap();
        shutdown.reached(Phase::Draining).await;
        kill_process(me, Signal::TERM).unwrap();
        tokio::time::timeout(PATIENCE, drive)
            .await
            .unwrap()
            .unwrap()
    });
    assert!(report.was_forced());
    assert_eq!((report.exit_code(), report.reason()), (1, "SIGTERM"));
}
