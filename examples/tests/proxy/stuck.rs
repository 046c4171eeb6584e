//! A log that nobody reads: its pipe fills up, and every thread that writes a
//! line waits for ever, until no request is answered any more. It ends all the
//! same.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, ChildStderr, Stdio},
    time::Duration,
};

use serde_json::Value;
use tokio::{task::JoinSet, time::Instant};

use crate::support::{Raw, Upstream, file, program, reply, signal, soon, to};

struct Stuck {
    child: Child,
    /// Not read from any more, and not closed: that would be an error, and an
    /// end to the waiting.
    _log: BufReader<ChildStderr>,
}

impl Stuck {
    async fn new() -> Self {
        let upstream = Upstream::start(|_| async { reply("yes") }).await;
        let stop = crate::stopping::STOP;
        let path = file(&format!("{stop}{}", to(upstream.address)));
        let mut child = program()
            .args(["--config", path.to_str().unwrap(), "--log-format", "json"])
            .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            // However many cores there are.
            .env("TOKIO_WORKER_THREADS", "2")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let address = |line: &Value, field: &str| -> SocketAddr {
            line[field].as_str().unwrap().parse().unwrap()
        };
        let (listen, admin) = loop {
            let mut line = String::new();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "it has ended");
            let line: Value = serde_json::from_str(&line).unwrap();
            if line["message"] == "listening" {
                break (address(&line, "listen"), address(&line, "admin"));
            }
        };
        let stuck = Self { child, _log: log };
        let answered = fill(listen).await;
        assert!(answered > 20, "{answered}");
        // No thread is left for anything.
        let mut live = Raw::connect(admin).await;
        live.send("GET /health/live HTTP/1.1\r\nhost: a\r\n\r\n")
            .await;
        let answer = tokio::time::timeout(Duration::from_millis(500), live.0.readable()).await;
        assert!(answer.is_err(), "it still answers");
        stuck
    }

    /// Its exit code, and after how many milliseconds.
    async fn ends(&mut self, start: Instant) -> (Option<i32>, u128) {
        let status = soon("the end", async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        (status.await.code(), start.elapsed().as_millis())
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks on several connections, until none of them is answered: how many were.
async fn fill(listen: SocketAddr) -> usize {
    // Each line of the log has the path in it.
    let request = format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "x".repeat(1500));
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        let mut raw = Raw::connect(listen).await;
        let request = request.clone();
        clients.spawn(async move {
            for answered in 0..1000 {
                raw.send(&request).await;
                let answer = raw.until("yes");
                if tokio::time::timeout(Duration::from_millis(700), answer)
                    .await
                    .is_err()
                {
                    return answered;
                }
            }
            panic!("its log is endless");
        });
    }
    clients.join_all().await.into_iter().sum()
}

/// Half a second after the timeout, from a thread of its own.
#[tokio::test]
async fn the_watchdog_ends_it() {
    let mut stuck = Stuck::new().await;
    let start = Instant::now();
    signal(stuck.child.id(), "TERM");
    let (code, took) = stuck.ends(start).await;
    assert_eq!(code, Some(124));
    assert!((3450..6000).contains(&took), "{took} ms");
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let mut stuck = Stuck::new().await;
    signal(stuck.child.id(), "TERM");
    // Two that come at once may be one.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(stuck.child.try_wait().unwrap(), None);
    let start = Instant::now();
    signal(stuck.child.id(), "TERM");
    let (code, took) = stuck.ends(start).await;
    assert_eq!(code, Some(1));
    assert!(took < 1500, "{took} ms");
}
