//! The signals that a process is asked to end by.

use std::{
    io::{self, IsTerminal},
    sync::{Arc, atomic::Ordering, mpsc},
    thread,
};

use tokio::runtime;
use tracing::{info, warn};

use crate::{Shutdown, aside};

impl Shutdown {
    /// Installs the signals that trigger it: SIGTERM and SIGINT; on Windows
    /// Ctrl-C, Ctrl-Break and the end of the console or the system. When this
    /// returns they are installed: call it before the listener is bound, since
    /// a process without a handler dies of SIGTERM, or as PID 1 does not heed
    /// it at all.
    ///
    /// SIGINT at a terminal asks for no delay: nobody else sends requests then.
    /// A second signal of any of them ends it at once: the process, with exit
    /// code 1, where that is [allowed](crate::ShutdownBuilder::exit_process),
    /// and otherwise by [force](Self::force). Signals are counted, not triggers:
    /// the first after a trigger by code changes nothing.
    ///
    /// They are listened to on a thread of their own, for as long as the
    /// process lives, so that a runtime that is blocked does not keep them
    /// from being heard. Once they are installed, another call does nothing.
    ///
    /// # Errors
    ///
    /// If there is no thread, no descriptor, or no handler to be had.
    pub fn install_signals(&self) -> io::Result<()> {
        let installed = &self.inner.signals;
        if installed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let result = self.listen_to_signals();
        if result.is_err() {
            installed.store(false, Ordering::Release);
        }
        result
    }

    fn listen_to_signals(&self) -> io::Result<()> {
        let shutdown = self.clone();
        let (tell, told) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("buttress-signals".into())
            .spawn(move || {
                let runtime = runtime::Builder::new_current_thread().enable_io().build();
                let runtime = match runtime {
                    Ok(runtime) => runtime,
                    Err(error) => return drop(tell.send(Err(error))),
                };
                runtime.block_on(async {
                    match Signals::install() {
                        Err(error) => drop(tell.send(Err(error))),
                        Ok(mut signals) => {
                            drop(tell.send(Ok(())));
                            shutdown.signalled(signals.next().await);
                            loop {
                                shutdown.signalled_again(signals.next().await);
                            }
                        }
                    }
                });
            })?;
        let gone = |_| io::Error::other("the signals' thread ended");
        told.recv().map_err(gone)?
    }

    // Neither waits for a log: one that does not take its lines is one of the
    // reasons why there is a second signal.
    fn signalled(&self, signal: Signal) {
        let shutdown = self.clone();
        let Signal { name, interactive } = signal;
        aside::run(move || {
            let at_terminal = interactive && at_terminal();
            if at_terminal {
                shutdown.trigger_without_delay(name);
            } else {
                shutdown.trigger(name);
            }
            info!(
                name = &**shutdown.name(),
                signal = name,
                at_terminal,
                "a signal"
            );
        });
    }

    fn signalled_again(&self, signal: Signal) {
        let name = signal.name;
        match &self.inner.settings.exit {
            Some(exit) => {
                let shutdown = Arc::clone(self.name());
                aside::say(move || {
                    let name = &*shutdown;
                    warn!(
                        name,
                        signal = signal.name,
                        "a second signal: the process ends"
                    );
                });
                exit.call(1);
            }
            None => {
                let shutdown = self.clone();
                aside::run(move || shutdown.force(name));
            }
        }
    }
}

fn at_terminal() -> bool {
    io::stdin().is_terminal() || io::stderr().is_terminal()
}

#[derive(Clone, Copy)]
struct Signal {
    name: &'static str,
    /// Whether people send it by a key.
    interactive: bool,
}

#[cfg(unix)]
use unix::Signals;

#[cfg(unix)]
mod unix {
    use std::{future::poll_fn, io, task::Poll};

    use tokio::signal::unix::{SignalKind, signal};

    use super::Signal;

    pub(super) struct Signals {
        terminate: tokio::signal::unix::Signal,
        interrupt: tokio::signal::unix::Signal,
    }

    impl Signals {
        pub(super) fn install() -> io::Result<Self> {
            Ok(Self {
                terminate: signal(SignalKind::terminate())?,
                interrupt: signal(SignalKind::interrupt())?,
            })
        }

        pub(super) async fn next(&mut self) -> Signal {
            poll_fn(|cx| {
                if self.terminate.poll_recv(cx).is_ready() {
                    return Poll::Ready(Signal {
                        name: "SIGTERM",
                        interactive: false,
                    });
                }
                self.interrupt.poll_recv(cx).map(|_| Signal {
                    name: "SIGINT",
                    interactive: true,
                })
            })
            .await
        }
    }
}

#[cfg(windows)]
use windows::Signals;

#[cfg(windows)]
mod windows {
    use std::{future::poll_fn, io, task::Poll};

    use tokio::signal::windows::{self, CtrlBreak, CtrlC, CtrlClose, CtrlShutdown};

    use super::Signal;

    pub(super) struct Signals {
        interrupt: CtrlC,
        stop: CtrlBreak,
        close: CtrlClose,
        shutdown: CtrlShutdown,
    }

    impl Signals {
        pub(super) fn install() -> io::Result<Self> {
            Ok(Self {
                interrupt: windows::ctrl_c()?,
                stop: windows::ctrl_break()?,
                close: windows::ctrl_close()?,
                shutdown: windows::ctrl_shutdown()?,
            })
        }

        pub(super) async fn next(&mut self) -> Signal {
            poll_fn(|cx| {
                let name = if self.stop.poll_recv(cx).is_ready() {
                    "CTRL_BREAK"
                } else if self.close.poll_recv(cx).is_ready() {
                    "CTRL_CLOSE"
                } else if self.shutdown.poll_recv(cx).is_ready() {
                    "CTRL_SHUTDOWN"
                } else {
                    return self.interrupt.poll_recv(cx).map(|_| Signal {
                        name: "CTRL_C",
                        interactive: true,
                    });
                };
                Poll::Ready(Signal {
                    name,
                    interactive: false,
                })
            })
            .await
        }
    }
}
